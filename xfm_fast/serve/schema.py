"""Requests and answers, in the shapes that clients of Cohere, Jina, OpenAI and vLLM send and read.

Fields that only other services know are ignored, as these ignore each other's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from xfm_fast.tasks.reranking import Rank


class Request(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = Field(None, description="name of the served model; may be left out")


class ImageURL(BaseModel):
    """An image in a part of a message, as OpenAI's API writes it."""

    url: str


class Part(BaseModel):
    """A part of a message: a text or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | None = None


class Item(BaseModel):
    """A text, or an image as a data URL, as base64 or, where the service allows it, as a URL.

    Either by `text` or `image`, or as the one part of a message.
    """

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


def _no_tokens(value: Any) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], int | list):
        raise ValueError("holds token ids, which mean something in one vocabulary alone; send texts")
    return value


# A value's type chooses its validator: one error, not one per type.
AnyItem = Annotated[
    Annotated[str, Tag("string")] | Annotated[Item, Tag("object")],
    Discriminator(lambda value: "string" if isinstance(value, str) else "object"),
]
"""A string is a text."""

Items = Annotated[list[AnyItem], Field(min_length=1)]
OneOrMore = Annotated[
    Annotated[AnyItem, Tag("one")] | Annotated[Items, Tag("more")],
    Discriminator(lambda value: "more" if isinstance(value, list) else "one"),
]


class RerankRequest(Request):
    """Documents to be ordered by their relevance to a query.

    A text and an image are compared by the fusion encoder: `relevance_score` is the probability that the text describes
    the image; a service with another `--rank` compares them by features, or gives match logit + cosine. Two texts, or
    two images, are compared by their features: it is the cosine similarity, from [-1, 1] to [0, 1]. Documents are of
    one kind, since the two are not comparable.
    """

    query: AnyItem
    documents: Items
    top_n: Annotated[int | None, Field(ge=1)] = None
    return_documents: bool = False


class EmbeddingsRequest(Request):
    """Texts and images to be embedded: L2-normalised features, of which dot products are cosine similarities."""

    input: Annotated[OneOrMore, BeforeValidator(_no_tokens)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="that of the model; the features cannot be shortened")


class ScoreRequest(Request):
    """Pairs to be scored as `RerankRequest` says: one with each of the others, or as many with as many."""

    text_1: OneOrMore = Field(validation_alias=AliasChoices("text_1", "data_1", "queries"))
    text_2: OneOrMore = Field(validation_alias=AliasChoices("text_2", "data_2", "documents", "items"))


class Usage(BaseModel):
    """Tokens of texts, and patches of images, that were read."""

    prompt_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """What all answers have."""

    id: str
    model: str
    usage: Usage
    warning: str | None = Field(None, description="there where the weights are random and results mean nothing")


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
    meta: dict[str, Any] = Field(description="as Cohere's clients read it")


class Embedding(BaseModel):
    """The features of an input; as base64, they are little-endian 32-bit floating point."""

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
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(BaseModel):
    """An error, as OpenAI's API gives it; `message` once more for clients of Cohere's."""

    error: ErrorContent
    message: str
