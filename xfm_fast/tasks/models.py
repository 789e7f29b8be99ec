"""Models that tasks share: loading, a text decoder, and classification heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast import checkpoint
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.models import inputs
from xfm_fast.models.decoder import DecoderMemory, TextDecoder
from xfm_fast.models.hub import Download, local_folder
from xfm_fast.models.processor import read_tokenizer
from xfm_fast.models.text import DeepMLPHead, MLPHead
from xfm_fast.models.xfm import ALL_ENCODERS, XFM, Encoder, Head, Precision
from xfm_fast.packing import Packing
from xfm_fast.tokenizer import CaptionTokenizer

Modality = Literal["image", "text", "pair"]
HeadKind = Literal["linear", "mlp", "official_image"]
_ENCODERS: dict[Modality, tuple[Encoder, ...]] = {
    "image": ("vision",),
    "text": ("text",),
    "pair": ("vision", "text", "fusion"),
}


class TaskModel(XFM):
    """X-FM with the encoders and heads of a task, and modules that pretraining does not have."""

    if TYPE_CHECKING:
        # Arguments differ between tasks; the result is the loss.
        forward: Callable[..., Any]

    new_modules: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of parameters that pretraining checkpoints lack."""
    own_graphs: ClassVar[tuple[str, ...]] = ()
    """Graphs that only exports of this model have."""
    decoder_reads: ClassVar[Literal["image", "fusion"] | None] = None
    """States that `text_decoder` reads: image tokens, or the tokens of the fusion encoder."""

    def graph_results(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> dict[str, Tensor]:
        """Compute the reference outputs of `own_graphs` for I images and T texts."""
        return {}

    def load_official(self, source: str | Path | Mapping[str, Tensor]) -> checkpoint.LoadResult:
        """Load an official pretraining or task checkpoint in place, atomically.

        Unused weights are dropped, position tables are interpolated, and new modules are
        initialised as in the official code. The result lists `fresh` parameters and `surplus`
        entries.
        """
        if isinstance(source, Mapping):
            name, official = "state dict", source
        else:
            name, official = f"checkpoint {source}", checkpoint.read_state_dict(source)
        state, self.load_report = checkpoint.to_ours(official, self.config)
        return self._load(state, self.load_report.unused, name)

    def _load(
        self, state: Mapping[str, Tensor], unused: Mapping[str, Tensor], name: str
    ) -> checkpoint.LoadResult:
        """Load our state dict, and initialise new modules from it and the `unused` weights."""
        surplus = []
        for encoder in ALL_ENCODERS:
            if not hasattr(self, f"{encoder}_encoder"):
                surplus.append(f"{encoder}_encoder.")
        for head, prefixes in checkpoint.HEAD_PREFIXES.items():
            if head not in self.heads:
                surplus += prefixes
        # A checkpoint with any parameter of the new modules must have all of them.
        fine_tuned = any(key.startswith(self.new_modules) for key in state)
        fresh = () if fine_tuned else self.new_modules
        result = checkpoint.load_into(self, state, what=name, fresh=fresh, surplus=surplus)
        if result.fresh:
            result.fresh = self._initialise_new({**state, **unused}, result.fresh)
        return result

    def _initialise_new(self, pretrained: Mapping[str, Tensor], fresh: list[str]) -> list[str]:
        """Initialise new modules from pretrained weights; return the parameters that stay random."""
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
        dtype: Precision | Literal["auto"] = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Load a `save_pretrained` folder of this task or a pretraining model.

        `options` are Hub options of `XFM.from_pretrained` and the constructor arguments of the
        saved model; `heads` is ignored.
        """
        download = {name: options.pop(name) for name in Download.__annotations__ if name in options}
        path = local_folder(folder, **download)
        files = checkpoint.load_pretrained_files(path)
        if dtype == "auto":
            dtype = next((tensor.dtype for tensor in files.state.values()), torch.float32)
        model = cls(files.config, **options)
        model._load(files.state, files.unused or {}, f"model {folder}")
        model.load_tokenizer(tokenizer, path)
        return model.cast(dtype).eval()


class DecoderModel(TaskModel):
    """A task model with a text decoder, initialised from a pretrained encoder."""

    new_modules = ("text_decoder.",)
    text_decoder: TextDecoder

    @property
    def writer(self) -> TextDecoder:
        return self.text_decoder

    def states(self, states: Tensor, mask: Tensor | None = None) -> DecoderMemory:
        """Project states `[B, M, width]` to keys and values, once for all steps and beams."""
        return self.text_decoder.memory(states, mask)

    def _initialise_new(self, pretrained: Mapping[str, Tensor], fresh: list[str]) -> list[str]:
        return [f"text_decoder.{name}" for name in self.text_decoder.initialise_from(pretrained)]


class ClassificationModel(TaskModel):
    """A classification head on the image token, text token 0, or fused token 0.

    `labels=1` is a regression. Heads: `linear` (default if `frozen`), `mlp`
    (Linear·LayerNorm·GELU·Linear, official for texts and pairs), `official_image` (five linear
    layers on the image token concatenated with the mean of the patches: identical vectors unless
    `local_attn_depth > 0`). A `frozen` encoder stays in evaluation mode without gradients; the
    official "linear probe" (81.2 on ImageNet) trains `official_image` and leaves DropPath active.
    Encoders that the modality does not need are not built.
    """

    new_modules = ("cls_head.",)

    def __init__(
        self,
        config: XFMConfig,
        labels: int,
        *,
        modality: Modality,
        head: HeadKind | None = None,
        frozen: bool = False,
    ) -> None:
        if modality not in _ENCODERS:
            raise InputError(
                f"modality {modality!r} is unknown; choose from {', '.join(_ENCODERS)}"
            )
        if labels < 1:
            raise InputError(f"labels={labels}; a classifier has at least one output")
        if head == "official_image" and modality != "image":
            raise InputError(
                f"head 'official_image' reads an image; for modality {modality!r} choose 'mlp' or 'linear'"
            )
        super().__init__(config, heads=(), encoders=_ENCODERS[modality])
        self.labels = labels
        self.modality: Modality = modality
        self.head: HeadKind = head or ("linear" if frozen else "mlp")
        self.frozen = frozen
        width = config.vision_width if modality == "image" else config.text_width
        if self.head == "official_image":
            self.cls_head: nn.Module = DeepMLPHead(2 * width, labels, config.head_layer_norm_eps)
        elif self.head == "mlp":
            self.cls_head = MLPHead(width, labels, config.head_layer_norm_eps)
        else:
            self.cls_head = nn.Linear(width, labels)
        if frozen:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.startswith("cls_head."))
            self.train(self.training)

    def train(self, mode: bool = True) -> ClassificationModel:
        """Set the mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            for name, module in self.named_children():
                module.train(mode and name == "cls_head")
        return self

    def features(
        self,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the head's inputs `[B, width]`; the official image head has twice the width."""
        reads = {"pixels": self.modality != "text", "input_ids": self.modality != "image"}
        for name, value in (("pixels", pixels), ("input_ids", input_ids)):
            if reads[name] == (value is None):
                required = " and ".join(argument for argument in reads if reads[argument])
                raise InputError(
                    f"{name} is {'missing' if value is None else 'given'}; a classifier of modality "
                    f"{self.modality!r} reads {required}"
                )
        with torch.no_grad() if self.frozen else nullcontext():
            if pixels is None:
                assert input_ids is not None
                mask = inputs.check_tokens(input_ids, attention_mask, self.config)
                packing = Packing.from_mask(mask)
                return packing.restore(self.text_encoder(input_ids, packing, first_token_only=True))
            image = self.encode_image(pixels)
            if input_ids is not None:
                mask = inputs.check_tokens(input_ids, attention_mask, self.config)
                text = self.encode_text(input_ids, mask)
                return self.fuse(text, mask, self.image_memory(image), first_token_only=True)[:, 0]
            if self.head == "official_image":
                return torch.cat([image[:, 0], image[:, 1:].mean(1)], dim=-1)
            return image[:, 0]

    def logits(
        self,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return logits `[B, labels]`; arguments as in `features`."""
        return self.cls_head(self.features(pixels, input_ids, attention_mask))

    def forward(
        self,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        targets: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Return the mean cross-entropy of classes `[B]` or probabilities `[B, labels]`.

        For a regression return the mean squared error.
        """
        logits = self.logits(pixels, input_ids, attention_mask)
        if self.labels == 1:
            return F.mse_loss(logits[:, 0], targets.to(logits.dtype))
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


class ClassificationSession:
    """Methods for `xfm_fast.export.Session`: the head is an output of the last graph."""

    def logits(
        self: Any,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return logits as `ClassificationModel.logits` does."""
        if input_ids is None:
            if pixels is None:
                raise InputError(
                    "pixels and input_ids are missing; a classifier reads one of them, or both"
                )
            return self.class_logits(self.encode_image(pixels), "encode_image")
        mask = inputs.check_tokens(input_ids, attention_mask, self.config)
        texts = self.encode_text(input_ids, mask)
        if pixels is None:
            return self.class_logits(texts, "encode_text")
        memory = self.image_memory(self.encode_image(pixels))
        return self.class_logits(self.fuse(texts, mask, memory, first_token_only=True), "fuse")
