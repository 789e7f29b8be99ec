"""Schemas of requests, responses and errors, in the formats of Cohere, Jina, OpenAI and vLLM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from xfm_fast.tasks.reranking import Rank

_EXAMPLE_IMAGE: JsonValue = {"image": "data:image/jpeg;base64,..."}


class Request(BaseModel):
    """The common fields of requests; unknown ones are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = Field(None, description="name of the served model; may be left out")


class ImageURL(BaseModel):
    """An image in a message part."""

    url: str


class Part(BaseModel):
    """A message part in the format of OpenAI's API: a text or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | None = None


class Item(BaseModel):
    """A text, or an image as a data URL, base64 or, with `--allow-urls`, a URL; or a message with one part."""

    model_config = ConfigDict(extra="ignore")

    text: str | None = None
    image: str | None = Field(None, description="data:image/jpeg;base64,..., or base64")
    content: Annotated[list[Part], Field(max_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Item:
        if self.content is not None:
            if not self.content or self.text is not None or self.image is not None:
                raise ValueError("give one text or one image; the model reads no mixture of them")
            part = self.content[0]
            self.text, self.image = part.text, part.image_url.url if part.image_url else None
        if (self.text is None) == (self.image is None):
            raise ValueError('give either {"text": "..."} or {"image": "data:image/jpeg;base64,..."}')
        return self


def _as_list(value: Any) -> Any:
    if not isinstance(value, list):
        return [value]
    if value and isinstance(value[0], int | list):
        raise ValueError("holds token ids, which belong to another vocabulary; send texts")
    return value


TextOrImage = Annotated[
    Item,
    BeforeValidator(
        lambda value: {"text": value} if isinstance(value, str) else value, json_schema_input_type=str | Item
    ),
]
Items = Annotated[list[TextOrImage], Field(min_length=1)]
OneOrMore = Annotated[Items, BeforeValidator(_as_list, json_schema_input_type=TextOrImage | Items)]


class RerankRequest(Request):
    """Documents to be ordered by their relevance to a query.

    The fusion encoder compares a text with an image: `relevance_score` is the probability that the text describes the
    image; with `--rank` it is the cosine similarity or match logit + cosine. Two texts, or two images, are compared by
    their features: cosine similarity, mapped from [-1, 1] to [0, 1]. All documents are of one kind, because the two
    scores are not comparable.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "a dog on a beach", "documents": [_EXAMPLE_IMAGE], "top_n": 3}]}
    )

    query: TextOrImage
    documents: Items
    top_n: Annotated[int | None, Field(ge=1)] = None
    return_documents: bool = False


class EmbeddingsRequest(Request):
    """Texts and images to be embedded: L2-normalised features, whose dot products are cosine similarities."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["a dog", _EXAMPLE_IMAGE]}]})

    input: OneOrMore
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="that of the model; the features cannot be shortened")


class ScoreRequest(Request):
    """Pairs to be scored like documents of `RerankRequest`: one with each of the others, or as many with as many."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text_1": "a dog", "text_2": _EXAMPLE_IMAGE}]})

    text_1: OneOrMore = Field(validation_alias=AliasChoices("text_1", "data_1", "queries"))
    text_2: OneOrMore = Field(validation_alias=AliasChoices("text_2", "data_2", "documents", "items"))


class Usage(BaseModel):
    """Text tokens and image patches of a request."""

    prompt_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """The common fields of responses."""

    id: str
    model: str
    usage: Usage
    warning: str | None = Field(None, description="present where the weights are random and results mean nothing")


class Ranked(BaseModel):
    """A document of a `RerankAnswer`."""

    index: int
    relevance_score: float
    document: dict[str, Any] | None = None


class RerankAnswer(Answer):
    """Documents, the most relevant first."""

    object: Literal["list"] = "list"
    results: list[Ranked]
    scoring: Rank
    meta: dict[str, Any] = Field(description="for Cohere's clients")


class Embedding(BaseModel):
    """The features of an input; base64 encodes little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(Answer):
    """Features, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]


class Score(BaseModel):
    """The score of a pair."""

    object: Literal["score"] = "score"
    index: int
    score: float


class ScoreAnswer(Answer):
    """Scores, in the order of the pairs."""

    object: Literal["list"] = "list"
    created: int
    data: list[Score]
    scoring: Rank


class ErrorContent(BaseModel):
    """Message and type of an error."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorAnswer(BaseModel):
    """An error in the format of OpenAI's API; `message` is repeated for clients of Cohere's."""

    error: ErrorContent
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


class Problem(HTTPException):
    """An error response: status, and a detail that names the thing, its value and the remedy."""

    def response(self) -> JSONResponse:
        """The response in the format of `ErrorAnswer`."""
        kind = _ERROR_TYPES.get(self.status_code, "invalid_request_error")
        error = ErrorContent(message=self.detail, type=kind, code=self.status_code)
        answer = ErrorAnswer(error=error, message=self.detail)
        return JSONResponse(answer.model_dump(), self.status_code, self.headers)
