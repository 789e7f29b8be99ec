"""Schemas of requests and errors, in the formats of Cohere, Jina, OpenAI, TEI and vLLM."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from xfm_fast.serve.model import Reading
from xfm_fast.serve.options import ServiceOptions

MAX_INPUTS: ContextVar[int] = ContextVar("MAX_INPUTS", default=ServiceOptions.max_inputs)
"""Items of a list: `ServiceOptions.max_inputs` of the service that reads the request."""
_EXAMPLE_IMAGE: Any = {"image": "data:image/jpeg;base64,..."}


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image as a data URL, base64 or, with `--allow-urls`, a URL."""

    image: str


Item: TypeAlias = str | ImageItem
"""A text, or an image."""


def _read_item(value: Any) -> Item:
    """Make an item from a text, `{"text": ...}`, `{"image": ...}` or a message with one block."""
    if isinstance(value, dict) and isinstance(value.get("content"), list):
        blocks = value["content"]
        value = blocks[0] if len(blocks) == 1 else None
    match value:
        case str(text):
            pass
        case {"text": str(text)} if value.get("image") is None:
            pass
        case {"image": str(url)} | {"image_url": {"url": str(url)}} if value.get("text") is None:
            return ImageItem(url)
        case _:
            raise ValueError(
                'give a text, {"text": "..."} or {"image": "data:image/jpeg;base64,..."}'
            )
    if not text.isascii():
        # Lone surrogates, which JSON can escape.
        text.encode()
    return text


def _as_list(value: Any) -> Any:
    if not isinstance(value, list):
        return [value]
    if value and isinstance(value[0], int | list):
        raise ValueError(
            "holds token ids, and their vocabulary is unknown; send texts (LangChain's OpenAIEmbeddings: "
            "check_embedding_ctx_length=False)"
        )
    return value


def check_length(value: Any) -> Any:
    """Return a value, unless it is a list of more items than a request may have."""
    limit = MAX_INPUTS.get()
    if isinstance(value, list) and len(value) > limit:
        raise ValueError(
            f"has {len(value):,} items, over the limit of {limit:,} (--max-inputs); send fewer"
        )
    return value


_ITEM_SCHEMA: Any = {
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
        {"type": "object", "properties": {"image": {"type": "string"}}, "required": ["image"]},
    ]
}
TextOrImage = Annotated[Any, PlainValidator(_read_item), WithJsonSchema(_ITEM_SCHEMA)]
Items = Annotated[
    list[TextOrImage], Field(min_length=1, fail_fast=True), BeforeValidator(check_length)
]
OneOrMore = Annotated[Items, BeforeValidator(_as_list, json_schema_input_type=TextOrImage | Items)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True), BeforeValidator(check_length)]
OneOrMoreTexts = Annotated[Texts, BeforeValidator(_as_list, json_schema_input_type=str | Texts)]
Dimensions = Annotated[
    int | None, Field(ge=1, description="shorten features to the first numbers, and normalise them")
]


EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class Body(BaseModel):
    """The common fields of requests; unknown ones are ignored."""

    model_config = ConfigDict(strict=True)

    model: str | None = Field(default=None, description="name of a served model; may be left out")
    prompt_name: str | None = Field(
        default=None, description="one of the model's prompts, for all texts"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class TextsBody(Body):
    """The common fields of requests whose texts may be truncated."""

    truncate: bool = Field(default=True, description="false refuses longer texts")
    truncation_direction: Literal["left", "right", "Left", "Right"] = "right"

    def reading(self) -> Reading:
        """Return how the texts are to be read."""
        side = "left" if self.truncation_direction.lower() == "left" else "right"
        return Reading(prompt=self.prompt_name, truncate=self.truncate, side=side)


class RerankRequest(TextsBody):
    """Documents to order by their relevance to a query; `texts` in place of `documents` is TEI's form."""

    query: TextOrImage = Field(examples=["a dog on a beach"])
    documents: Items | None = Field(default=None, examples=[[_EXAMPLE_IMAGE]])
    texts: Items | None = None
    top_n: Annotated[int | None, Field(ge=1)] = None
    return_documents: Annotated[
        bool, Field(validation_alias=AliasChoices("return_documents", "return_text"))
    ] = False
    raw_scores: bool = False

    @model_validator(mode="after")
    def _check_lists(self) -> RerankRequest:
        if (self.documents is None) == (self.texts is None):
            raise ValueError("give documents, or texts in TEI's form")
        return self


class EmbeddingsRequest(TextsBody):
    """Texts and images to embed, in the form of OpenAI and Jina."""

    input: OneOrMore = Field(examples=[["a dog", _EXAMPLE_IMAGE]])
    encoding_format: Annotated[
        EmbeddingType,
        Field(validation_alias=AliasChoices("encoding_format", "embedding_type")),
    ] = "float"
    dimensions: Dimensions = None
    task: str | None = Field(
        default=None, description="Jina's: retrieval.query, retrieval.passage, ..."
    )
    normalized: bool = True


class EmbedRequest(Body):
    """Texts or images to embed, in Cohere's form."""

    texts: Annotated[Items | None, Field(examples=[["a dog"]])] = None
    images: Annotated[
        list[str] | None, BeforeValidator(check_length), Field(description="data URLs")
    ] = None
    inputs: Items | None = None
    input_type: str | None = Field(default=None, description="search_query, search_document, ...")
    embedding_types: list[EmbeddingType] | None = None
    output_dimension: Dimensions = None
    truncate: Literal["NONE", "START", "END"] = "END"

    @model_validator(mode="after")
    def _check_lists(self) -> EmbedRequest:
        lists = [items for items in (self.texts, self.images, self.inputs) if items]
        if len(lists) != 1:
            raise ValueError("give texts, images or inputs, one of them")
        return self

    def reading(self) -> Reading:
        """Return how the texts are to be read."""
        side = "left" if self.truncate == "START" else "right"
        return Reading(prompt=self.prompt_name, truncate=self.truncate != "NONE", side=side)


class ScoreRequest(Body):
    """Pairs to score: one item against many, or two lists of equal length elementwise."""

    text_1: OneOrMore = Field(
        validation_alias=AliasChoices("text_1", "data_1", "queries"), examples=["a dog"]
    )
    text_2: OneOrMore = Field(
        validation_alias=AliasChoices("text_2", "data_2", "documents", "items"),
        examples=[_EXAMPLE_IMAGE],
    )


class TeiEmbedRequest(TextsBody):
    """Texts to embed, in TEI's form."""

    inputs: OneOrMore = Field(examples=[["a dog"]])
    normalize: bool = True
    dimensions: Dimensions = None


class TeiPredictRequest(TextsBody):
    """Texts or pairs of texts to classify, in TEI's form."""

    inputs: Any = Field(examples=["a dog", ["a dog", "an animal"], [["a dog"], ["a dog", "a cat"]]])
    raw_scores: bool = False


class Similarity(BaseModel):
    """A sentence, and sentences to compare with it."""

    source_sentence: str
    sentences: Texts


class TeiSimilarityRequest(Body):
    """Sentences to compare by cosine similarity, in TEI's form."""

    inputs: Similarity
    parameters: TextsBody = TextsBody()


class TeiTokenizeRequest(Body):
    """Texts to tokenise, in TEI's form."""

    inputs: OneOrMoreTexts
    add_special_tokens: bool = True


class Answer(BaseModel):
    """The common fields of responses."""

    id: str
    model: str
    object: Literal["list"]
    usage: dict[str, int] = Field(description="text tokens and image patches of the request")
    truncated: list[str] | None = Field(
        default=None,
        description="texts that were truncated; the header x-truncated-inputs has their number",
    )
    warning: str | None = Field(
        None, description="present where the weights are random and results mean nothing"
    )


class Embedding(BaseModel):
    """The features of an input; base64 encodes little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | list[int] | str


class EmbeddingsAnswer(Answer):
    """Features, in the order of the inputs."""

    data: list[Embedding]


class Ranked(BaseModel):
    """A document of a `RerankAnswer`."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RerankAnswer(Answer):
    """Documents, the most relevant first; `scoring` says what their scores are."""

    results: list[Ranked]
    scoring: str


class Score(BaseModel):
    """The score of a pair."""

    object: Literal["score"]
    index: int
    score: float


class ScoreAnswer(Answer):
    """Scores, in the order of the pairs."""

    created: int
    data: list[Score]
    scoring: str


class ErrorAnswer(BaseModel):
    """An error in the format of OpenAI's API: message, type, param and code; `message` is repeated for Cohere's.

    Routes of TEI answer in its form: `{"error": "...", "error_type": "..."}`.
    """

    error: dict[str, str | int | None]
    message: str


# The types of OpenAI's API; clients choose their exceptions by status.
_ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}
_TEI_ERROR_TYPES = {
    413: "Validation",
    429: "Overloaded",
    500: "Backend",
    503: "Unhealthy",
    504: "Backend",
}


class Problem(HTTPException):
    """An error response: status, and a detail that names the thing, its value and the remedy."""

    def response(self, is_tei: bool = False) -> JSONResponse:
        """Make the response in the format of `ErrorAnswer`."""
        status = self.status_code
        if is_tei:
            error_type = _TEI_ERROR_TYPES.get(status, "Validation")
            content = {"error": self.detail, "error_type": error_type, "message": self.detail}
            return JSONResponse(content, status, self.headers)
        error = {
            "message": self.detail,
            "type": _ERROR_TYPES.get(status, "invalid_request_error"),
            "param": None,
            "code": status,
        }
        content = {"error": error, "message": self.detail}
        return JSONResponse(content, status, self.headers)
