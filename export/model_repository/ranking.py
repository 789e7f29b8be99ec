"""What the `rank` model of a repository does: its requests checked, its graphs run by the server.

`xfm_fast.tasks.ranking` answers them, several at a time, and keeps image memories between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from xfm_fast.errors import DataError, InputError
from xfm_fast.tasks import ranking
from xfm_fast.tasks.ranking import Query
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

from ..manifest import GraphRecord
from ..request import RankLimits
from ..session import Session
from ..session.ranking import SessionRanks
from ..slots import Slot


class Ranker(ranking.Ranker):
    """Answers requests over a session.

    Args:
        session: one with the graphs `vision`, `text`, `image_memory` and `fusion`.
        tokenizer: the model's.
        limits: bounds of a request.
        cache_bytes: room for image memories between requests.
    """

    def __init__(self, session: Session, tokenizer: CaptionTokenizer, limits: RankLimits, cache_bytes: int) -> None:
        super().__init__(SessionRanks(session), cache_bytes)
        self.session, self.tokenizer, self.limits = session, tokenizer, limits

    def query(self, images: Sequence[bytes], captions: Sequence[bytes]) -> Query:
        """Check a request and tokenise its captions, cleaned and cut as the official evaluation does.

        Raises:
            InputError: none or too many images or captions, or one that is too large.
            DataError: a caption that is no UTF-8 or without words.
        """
        limits = self.limits
        for noun, items, most in (("images", images, limits.images), ("captions", captions, limits.captions)):
            if not items:
                raise InputError(f"the request has no {noun}; give 1 to {most}")
            if len(items) > most:
                raise InputError(f"the request has {len(items)} {noun}; give at most {most}, and the rest in another")
        for number, content in enumerate(images):
            if len(content) > limits.image_bytes:
                raise InputError(
                    f"image {number} has {len(content):,} bytes, over the limit of {limits.image_bytes:,}; shrink it"
                )
        pictures = tuple(self.picture(content, f"image {number}") for number, content in enumerate(images))
        texts = [self._text(number, caption) for number, caption in enumerate(captions)]
        return Query(pictures, tuple(map(tuple, self.tokenizer.encode_ids(texts, limits.tokens))))

    def _text(self, number: int, caption: bytes) -> str:
        try:
            text = caption.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"caption {number} is no UTF-8 ({error}); encode it so") from None
        if len(text) > self.limits.caption_characters:
            raise InputError(
                f"caption {number} has {len(text):,} characters, over the limit of "
                f"{self.limits.caption_characters:,}; shorten it"
            )
        try:
            return pre_caption(text)
        except DataError as error:
            raise DataError(f"caption {number}: {error}") from None


Infer = Callable[[str, Mapping[str, Tensor], Sequence[str]], dict[str, Tensor]]
"""Runs a model by its name: inputs by name and the names of the outputs → outputs that the caller owns.

Raises `ExportError` when the model is not there or fails.
"""


def model_name(prefix: str, graph: str) -> str:
    """The name of the model that serves a graph."""
    return f"{prefix}_{graph}"


class ServedRuntime:
    """A `Runtime` whose graphs are models of the server.

    Args:
        infer: how a model is run.
        prefix: beginning of the models' names.
        device: where tensors go in and come out.
    """

    enqueues = False

    def __init__(self, infer: Infer, prefix: str, device: torch.device) -> None:
        self.description = f"models {prefix}_* of the server ({device})"
        self.device = device
        self._infer, self._prefix = infer, prefix

    def load(self, record: GraphRecord, path: Path) -> ServedGraph:
        """The model of a graph; the server has loaded it, or has not yet."""
        return ServedGraph(self._infer, model_name(self._prefix, record.name), [out.name for out in record.outputs])


class ServedGraph:
    """A `LoadedGraph` in the server."""

    def __init__(self, infer: Infer, name: str, outputs: Sequence[str]) -> None:
        self._infer, self._name, self._outputs = infer, name, outputs

    def run(self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """See `LoadedGraph`."""
        return self._infer(self._name, inputs, self._outputs)
