"""Schemas of requests, responses and errors, in the formats of Cohere, Jina, OpenAI and vLLM."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from xfm_fast.serve.options import ServiceOptions
from xfm_fast.tasks.reranking import Rank

MAX_INPUTS: ContextVar[int] = ContextVar("MAX_INPUTS", default=ServiceOptions.max_inputs)
"""Items of a list: `ServiceOptions.max_inputs` of the service that reads the request."""
_EXAMPLE_IMAGE: Any = {"image": "data:image/jpeg;base64,..."}


class Item(BaseModel):
    """A text, or an image as a data URL, base64 or, with `--allow-urls`, a URL.

    A message with one block is accepted, too: `{"content": [{"type": "image_url", "image_url":
    {"url": "..."}}]}`.
    """

    text: str | None = None
    image: str | None = Field(None, description="data:image/jpeg;base64,..., or base64")

    @model_validator(mode="after")
    def _check_one(self) -> Item:
        if (self.text is None) == (self.image is None):
            raise ValueError(
                'give either {"text": "..."} or {"image": "data:image/jpeg;base64,..."}'
            )
        return self


def _as_item(value: Any) -> Any:
    match value:
        case str(text) | {"content": [{"text": str(text)}]}:
            return {"text": text}
        case {"content": [{"image_url": {"url": str(url)}}]}:
            return {"image": url}
    return value


def _as_list(value: Any) -> Any:
    if not isinstance(value, list):
        return [value]
    if value and isinstance(value[0], int | list):
        raise ValueError("holds token ids, which belong to another vocabulary; send texts")
    return value


def _check_length(value: Any) -> Any:
    limit = MAX_INPUTS.get()
    if isinstance(value, list) and len(value) > limit:
        raise ValueError(
            f"has {len(value):,} items, over the limit of {limit:,} (--max-inputs); send fewer"
        )
    return value


TextOrImage = Annotated[Item, BeforeValidator(_as_item, json_schema_input_type=str | Item)]
Items = Annotated[
    list[TextOrImage], Field(min_length=1, fail_fast=True), BeforeValidator(_check_length)
]
OneOrMore = Annotated[Items, BeforeValidator(_as_list, json_schema_input_type=TextOrImage | Items)]


class Body(BaseModel):
    """The common fields of requests; unknown ones are ignored."""

    model_config = ConfigDict(strict=True)

    model: str | None = Field(None, description="name of the served model; may be left out")


class RerankRequest(Body):
    """Documents, all texts or all images, to order by their relevance to a query."""

    query: TextOrImage = Field(examples=["a dog on a beach"])
    documents: Items = Field(examples=[[_EXAMPLE_IMAGE]])
    top_n: Annotated[int | None, Field(ge=1)] = None
    return_documents: bool = False


class EmbeddingsRequest(Body):
    """Texts and images to embed."""

    input: OneOrMore = Field(examples=[["a dog", _EXAMPLE_IMAGE]])
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        None, description="that of the model; the features cannot be shortened"
    )


class ScoreRequest(Body):
    """Pairs to score: one item against many, or two lists of equal length elementwise."""

    text_1: OneOrMore = Field(
        validation_alias=AliasChoices("text_1", "data_1", "queries"), examples=["a dog"]
    )
    text_2: OneOrMore = Field(
        validation_alias=AliasChoices("text_2", "data_2", "documents", "items"),
        examples=[_EXAMPLE_IMAGE],
    )


class Answer(BaseModel):
    """The common fields of responses."""

    id: str
    model: str
    object: Literal["list"] = "list"
    usage: dict[str, int] = Field(description="text tokens and image patches of the request")
    truncated: list[str] | None = Field(
        None,
        description="texts that were truncated; the header x-truncated-inputs has their number",
    )
    warning: str | None = Field(
        None, description="present where the weights are random and results mean nothing"
    )


class Ranked(BaseModel):
    """A document of a `RerankAnswer`."""

    index: int
    relevance_score: float
    document: dict[str, Any] | None = None


class RerankAnswer(Answer):
    """Documents, the most relevant first."""

    results: list[Ranked]
    scoring: Rank


class Embedding(BaseModel):
    """The features of an input; base64 encodes little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(Answer):
    """Features, in the order of the inputs."""

    data: list[Embedding]


class Score(BaseModel):
    """The score of a pair."""

    object: Literal["score"] = "score"
    index: int
    score: float


class ScoreAnswer(Answer):
    """Scores, in the order of the pairs."""

    created: int
    data: list[Score]
    scoring: Rank


class ErrorAnswer(BaseModel):
    """An error in the format of OpenAI's API: message, type, param and code; `message` is repeated for Cohere's."""

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


class Problem(HTTPException):
    """An error response: status, and a detail that names the thing, its value and the remedy."""

    def response(self) -> JSONResponse:
        """Make the response in the format of `ErrorAnswer`."""
        error = {
            "message": self.detail,
            "type": _ERROR_TYPES.get(self.status_code, "invalid_request_error"),
            "param": None,
            "code": self.status_code,
        }
        content = {"error": error, "message": self.detail}
        return JSONResponse(content, self.status_code, self.headers)
