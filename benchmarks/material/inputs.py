"""The inputs of requests: pixels of photographs, captions or synthetic texts as tokens, and their embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from xfm_fast.config import PresetName, XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.tokenizer import CaptionTokenizer

from ..record import Data, Skip
from .photographs import Collection
from .subjects import Subjects, preset_config

MAX_TOKENS = 40
"""Length to which the official evaluation pads captions."""
# Distributions of synthetic lengths: shares of the mean that texts have in turn.
_SHAPES = {"fixed": (1.0,), "uniform": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "bimodal": (0.25, 1.75)}


def make_tokenizer(preset: PresetName, files: Path | None, collection: Collection) -> CaptionTokenizer:
    """RoBERTa's from its files, or one trained on the captions."""
    if files is not None:
        return CaptionTokenizer.from_files(files)
    return CaptionTokenizer.train_on_texts(collection.captions, preset_config(preset).vocab_size)


def described(collection: Collection, tokenizer: CaptionTokenizer) -> Data:
    """Photographs, captions and tokens, for the head of a document."""
    return Data(
        origin=collection.origin, photos=len(collection.names), captions=len(collection.captions),
        skipped=[Skip(what=one.what, reason=one.reason) for one in collection.skipped],
        left_unread=collection.left_unread, tokenizer=tokenizer.origin, vocabulary=tokenizer.vocab_size,
    )  # fmt: skip


class Texts(NamedTuple):
    """Encoded captions."""

    ids: Tensor
    mask: Tensor

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()

    @property
    def span(self) -> str:
        """Shortest and longest, for names."""
        low, high = min(self.lengths), max(self.lengths)
        return str(low) if low == high else f"{low}-{high}"


@dataclass
class Material:
    """Models, photographs and captions; embeddings are computed once, in fp32.

    Attributes:
        seed: of synthetic texts.
    """

    subjects: Subjects
    collection: Collection
    tokenizer: CaptionTokenizer
    seed: int = 0
    _images: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.subjects.device

    def config(self, image_size: int) -> XFMConfig:
        return self.subjects.config.replace(image_size=image_size)

    def pixels(self, count: int, image_size: int) -> Tensor:
        """`[count, 3, R, R]`; photographs come again where there are too few."""
        photos = len(self.collection.names)
        return self.collection.pixels((i % photos for i in range(count)), image_size).to(self.device)

    def images(self, count: int, image_size: int) -> tuple[Tensor, Tensor]:
        """Embeddings and features of photographs."""
        if (count, image_size) not in self._images:
            model = self.subjects.model(image_size, torch.float32)
            with torch.inference_mode():
                parts = [model.encode_image(part) for part in self.pixels(count, image_size).split(8)]
                embeds = torch.cat(parts)
                self._images[count, image_size] = embeds, model.project_image(embeds)
        return self._images[count, image_size]

    def texts(self, count: int, lengths: str = "captions") -> Texts:
        """Captions, or synthetic texts: `fixed-16` are 16 tokens, `uniform-16` 4 to 28, `bimodal-16` 4 or 28.

        Raises:
            InputError: the distribution is unknown, or longer than the model takes.
        """
        if lengths == "captions":
            return self.encoded(self.collection.texts(count))
        shape, _, mean = lengths.partition("-")
        if shape not in _SHAPES or not mean.isdigit():
            raise InputError(
                f"length distribution {lengths!r} is unknown; choose captions, or {', '.join(_SHAPES)} with a mean, "
                "such as fixed-16"
            )
        config = self.subjects.config
        sizes = [max(3, round(int(mean) * _SHAPES[shape][i % len(_SHAPES[shape])])) for i in range(count)]
        room = config.max_positions - config.pad_token_id - 1
        if max(sizes) > room:
            raise InputError(
                f"lengths {lengths!r} reach {max(sizes)} tokens, and this model takes {room}; ask for less"
            )
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.full((count, max(MAX_TOKENS, *sizes)), config.pad_token_id)
        first = max(config.pad_token_id, config.bos_token_id, config.eos_token_id) + 1
        for row, size in zip(ids, sizes, strict=True):
            row[:size] = torch.randint(first, config.vocab_size, (size,), generator=generator)
            row[0], row[size - 1] = config.bos_token_id, config.eos_token_id
        ids = ids.to(self.device)
        return Texts(ids, ids.ne(config.pad_token_id).long())

    def encoded(self, captions: list[str]) -> Texts:
        """Captions padded to 40 tokens, as the official evaluation does it."""
        ids, mask = self.tokenizer.encode(captions, MAX_TOKENS)
        return Texts(ids.to(self.device), mask.to(self.device))

    @cached_property
    def weights(self) -> dict[str, int]:
        """Numbers that take part, by part of the model; tables of embeddings are read by the row."""
        state = self.subjects.model(self.subjects.config.image_size, torch.float32).state_dict()
        parts = {
            "vision": "vision_encoder.",
            "text": "text_encoder.roberta.encoder.",
            "fusion": "fusion_encoder.roberta.encoder.",
        }
        return {
            part: sum(t.numel() for n, t in state.items() if n.startswith(prefix)) for part, prefix in parts.items()
        }
