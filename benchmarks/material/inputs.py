"""Models with shared weights, and the inputs of requests: photographs, captions or synthetic texts, embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xfm_fast import checkpoint
from xfm_fast.config import PresetName, XFMConfig
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.loading import Source, open_model
from xfm_fast.models.xfm import XFM, Head
from xfm_fast.tasks.captioning import CaptioningModel
from xfm_fast.tasks.grounding import GroundingModel
from xfm_fast.tasks.nlvr2 import NLVR2Model
from xfm_fast.tasks.vqa import VQAModel
from xfm_fast.tokenizer import CaptionTokenizer

from ..record import Data, Skip
from .photographs import Collection

HEADS: tuple[Head, ...] = ("contrastive", "matching")
_TABLE = ".relative_position_bias_table"
MAX_TOKENS = 40
"""Length to which the official evaluation pads captions."""
# The official decoder has 12 layers; that of a small model has as many as its fusion encoder.
_DECODER_LAYERS = 12
# Synthetic lengths: shares of the mean, in turn.
_SHAPES = {"fixed": (1.0,), "uniform": (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75), "bimodal": (0.25, 1.75)}


def decoder_layers(config: XFMConfig) -> int:
    """Layers of the decoder that a task adds to a model of these sizes."""
    return min(_DECODER_LAYERS, config.fusion_layers)


TASK_MODELS: Mapping[str, Callable[[XFMConfig], XFM]] = {
    "vqa": lambda config: VQAModel(config, decoder_layers=decoder_layers(config)),
    "nlvr2": NLVR2Model,
    "grounding": GroundingModel,
    "captioning": lambda config: CaptioningModel(config, decoder_layers=decoder_layers(config)),
}


class Subjects:
    """Models of one set of weights, built on first use, on `device`; `origin` is for reports.

    Resolutions share all tensors but the position tables, which are interpolated; every dtype has one converted copy.
    The head of a task is random, and only the models of the last task are kept.
    """

    def __init__(self, config: XFMConfig, state: Mapping[str, Tensor], origin: str, *, trained: bool) -> None:
        self.config, self.origin, self.trained = config, origin, trained
        self.tokenizer: CaptionTokenizer | None = None
        self.device = torch.device("cpu")
        self._state = state
        self._shared: dict[torch.dtype, dict[str, nn.Parameter]] = {}
        self._models: dict[tuple[str, int, torch.dtype], XFM] = {}

    @classmethod
    def open(cls, source: Source) -> Subjects:
        """The weights of a model, or random ones; raises the errors of `open_model`."""
        source.check()
        if source.model is None:
            config = preset_config(source.random or "base")
            return cls(config, random_state(config, HEADS, 0), "random weights (seed 0)", trained=False)
        opened = open_model(source, needs=HEADS, device="cpu")
        if lacking := {*HEADS} - {*opened.model.heads}:
            raise UnavailableError(f"{source.model} has no {' or '.join(lacking)} head; give a pretrained model")
        state = checkpoint.select_heads(opened.model.state_dict(), HEADS)
        subjects = cls(opened.model.config, state, opened.origin, trained=True)
        subjects.tokenizer = opened.model.tokenizer
        return subjects

    def model(self, image_size: int, dtype: torch.dtype, work: str = "") -> XFM:
        """The model for a resolution, a dtype and a kind of work, in evaluation mode."""
        task = work.partition("-")[0]
        task = task if task in TASK_MODELS else ""
        key = (task, image_size, dtype)
        if key not in self._models:
            if task:
                self._models = {known: model for known, model in self._models.items() if known[0] in ("", task)}
            config = self.config.replace(image_size=image_size)
            if dtype not in self._shared:
                self._shared[dtype] = {
                    name: nn.Parameter(tensor.to(self.device, dtype), requires_grad=False)
                    for name, tensor in self._state.items()
                    if not name.endswith(_TABLE)
                }
            tables = {
                name: checkpoint.interpolate_table(tensor, (config.grid, config.grid)).to(self.device, dtype)
                for name, tensor in self._state.items()
                if name.endswith(_TABLE)
            }
            with torch.device("meta"):
                model = TASK_MODELS[task](config) if task else XFM(config, heads=HEADS)
            wanted = model.state_dict()
            own = checkpoint.random_tensors(
                {name: tensor for name, tensor in wanted.items() if name not in self._state}, 0
            )
            given = {**self._shared[dtype], **tables, **{n: t.to(self.device, dtype) for n, t in own.items()}}
            model.load_state_dict({name: given[name] for name in wanted}, assign=True)
            self._models[key] = model.eval().requires_grad_(False)
        return self._models[key]


def preset_config(preset: PresetName) -> XFMConfig:
    """A preset with a vocabulary that gives captions their usual length."""
    return XFMConfig.preset(preset, **({"vocab_size": 2048} if preset == "tiny" else {}))


def random_state(config: XFMConfig, heads: Iterable[Head], seed: int) -> dict[str, Tensor]:
    """Random weights without zeros, unlike a fresh model, so that comparisons cover every term."""
    with torch.device("meta"):
        return checkpoint.random_tensors(XFM(config, heads=heads).state_dict(), seed)


def make_tokenizer(preset: PresetName, files: Path | None, collection: Collection) -> CaptionTokenizer:
    """RoBERTa's tokenizer from its files, or one trained on the captions."""
    if files is not None:
        return CaptionTokenizer.from_files(files)
    return CaptionTokenizer.train_on_texts(collection.captions, preset_config(preset).vocab_size)


def described(collection: Collection, tokenizer: CaptionTokenizer) -> Data:
    """The photographs, captions and tokenizer of a document."""
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
        """Shortest and longest length."""
        low, high = min(self.lengths), max(self.lengths)
        return str(low) if low == high else f"{low}-{high}"


@dataclass
class Material:
    """Models, photographs and captions; embeddings are computed once, in fp32, and `seed` draws synthetic texts."""

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
        """`[count, 3, R, R]`; photographs repeat if there are too few."""
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

        `mixed-16` are 3 to 40 tokens with a mean of 16, most of them short. Raises `InputError` for an unknown
        distribution, or one with longer texts than the model takes.
        """
        if lengths == "captions":
            return self.encoded(self.collection.texts(count))
        shape, _, number = lengths.partition("-")
        shapes = [*_SHAPES, "mixed"]
        if shape not in shapes or not number.isdigit():
            raise InputError(
                f"length distribution {lengths!r} is unknown; choose captions, or {', '.join(shapes)} with a mean, "
                "such as fixed-16"
            )
        config, mean, least = self.subjects.config, int(number), 3
        if shape != "mixed":
            sizes = [max(least, round(mean * _SHAPES[shape][i % len(_SHAPES[shape])])) for i in range(count)]
        elif least < mean <= MAX_TOKENS:
            # The mean of x ** power over [0, 1] is 1 / (1 + power).
            power = (MAX_TOKENS - least) / (mean - least) - 1
            sizes = [round(least + (MAX_TOKENS - least) * (i / max(count - 1, 1)) ** power) for i in range(count)]
        else:
            raise InputError(f"lengths {lengths!r} have no such mean; ask for {least + 1} to {MAX_TOKENS}")
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
        """Captions padded to 40 tokens, as in the official evaluation."""
        ids, mask = self.tokenizer.encode(captions, MAX_TOKENS)
        return Texts(ids.to(self.device), mask.to(self.device))

    @cached_property
    def weights(self) -> dict[str, int]:
        """Parameters that a pass reads, by encoder; embedding tables are read by row."""
        state = self.subjects.model(self.subjects.config.image_size, torch.float32).state_dict()
        parts = {
            "vision": "vision_encoder.",
            "text": "text_encoder.roberta.encoder.",
            "fusion": "fusion_encoder.roberta.encoder.",
        }
        return {
            part: sum(t.numel() for n, t in state.items() if n.startswith(prefix)) for part, prefix in parts.items()
        }
