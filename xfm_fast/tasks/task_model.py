"""Base class of fine-tuning models: loading of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from xfm_fast import checkpoint
from xfm_fast.config import XFMConfig
from xfm_fast.models.decoder import DecoderMemory, TextDecoder
from xfm_fast.models.hub import Download, local_folder
from xfm_fast.models.processor import read_tokenizer
from xfm_fast.models.xfm import ALL_ENCODERS, XFM, Head, Precision
from xfm_fast.tokenizer import CaptionTokenizer


class TaskModel(XFM):
    """X-FM with the encoders and heads of a task, and new task-specific parts."""

    if TYPE_CHECKING:
        # A task takes what it needs, and returns its loss.
        forward: Callable[..., Any]

    own_parts: ClassVar[tuple[str, ...]] = ()
    """Prefixes of parameters missing in pretraining checkpoints."""
    own_graphs: ClassVar[tuple[str, ...]] = ()
    """Graphs of an export that no other model has."""
    decoder_reads: ClassVar[Literal["image", "fusion"] | None] = None
    """States that `text_decoder` reads: image tokens, or the tokens of the fusion encoder."""

    def graph_results(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Outputs of `own_graphs` for I images and T texts, which an export is compared with."""
        return {}

    def load_official(self, source: str | Path | Mapping[str, Tensor]) -> checkpoint.LoadResult:
        """Load an official pretraining or task checkpoint in place, atomically.

        Unused weights are dropped, position tables are interpolated, and new parts are initialised as in the official
        code. The result lists `fresh` parameters and `surplus` entries.
        """
        what = "state dict" if isinstance(source, Mapping) else f"checkpoint {source}"
        official = source if isinstance(source, Mapping) else checkpoint.read_state_dict(source)
        state, self.load_report = checkpoint.to_ours(official, self.config)
        result = self._load(state, what)
        if result.fresh:
            result.fresh = self._start_own_parts(state | self.load_report.unused, result.fresh)
        return result

    def _load(self, state: Mapping[str, Tensor], what: str) -> checkpoint.LoadResult:
        surplus = [f"{encoder}_encoder." for encoder in ALL_ENCODERS if not hasattr(self, f"{encoder}_encoder")]
        for head, prefixes in checkpoint.HEAD_PREFIXES.items():
            if head not in self.heads:
                surplus += prefixes
        # A checkpoint that has the task's own part must have it whole.
        fine_tuned = any(name.startswith(self.own_parts) for name in state)
        return checkpoint.load_into(self, state, what=what, fresh=() if fine_tuned else self.own_parts, surplus=surplus)

    def _start_own_parts(self, pretrained: Mapping[str, Tensor], fresh: list[str]) -> list[str]:
        """Initialise new parts; returns the names of parameters that stay random."""
        return fresh

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Tensor],
        config: XFMConfig,
        *,
        heads: Iterable[Head] = (),
        dtype: Precision = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Build the model and `load_official`; `options` go to the constructor, `heads` is ignored."""
        model = cls(config, **options)
        model.tokenizer = None if tokenizer is None else read_tokenizer(tokenizer, config)
        model.load_official(source)
        return model.cast(dtype).eval()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        heads: Iterable[Head] | None = None,
        dtype: Precision = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Load a `save_pretrained` folder of this task or a pretraining model.

        `options` are Hub options of `XFM.from_pretrained` and the constructor arguments of the saved model; `heads` is
        ignored.
        """
        download = {name: options.pop(name) for name in Download.__annotations__ if name in options}
        place = local_folder(folder, **download)
        files = checkpoint.load_pretrained_files(place)
        model = cls(files.config, **options)
        result = model._load(files.state, f"model {folder}")
        if result.fresh:
            model._start_own_parts(files.state | (files.unused or {}), result.fresh)
        model.load_tokenizer(tokenizer, place)
        return model.cast(dtype).eval()


class DecoderModel(TaskModel):
    """A task model with a text decoder, which starts from an encoder of pretraining."""

    own_parts = ("text_decoder.",)
    text_decoder: TextDecoder

    @property
    def writer(self) -> TextDecoder:
        return self.text_decoder

    def states(self, states: Tensor, mask: Tensor | None = None) -> DecoderMemory:
        """Keys and values of states `[B, M, width]`, projected once for all steps and beams."""
        return self.text_decoder.memory(states, mask)

    def _start_own_parts(self, pretrained: Mapping[str, Tensor], fresh: list[str]) -> list[str]:
        return [f"text_decoder.{name}" for name in self.text_decoder.initialise_from(pretrained)]
