"""XFM: language encoder, vision encoder and fusion encoder with their heads (arXiv 2301.05065).

`encode`, `match`, `ground` and `similarity` take strings and images; the methods below them take tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Self, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast import checkpoint
from xfm_fast.checkpoint import Head
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError, UnavailableError, explain_types
from xfm_fast.kernels import flags, fp8, ops
from xfm_fast.kernels.flags import EightBits
from xfm_fast.kernels.linear import floating_dtype
from xfm_fast.models import frozen, hub, inputs
from xfm_fast.models.fusion import FusionEncoder, ImageMemory, PackedMemory
from xfm_fast.models.processor import (
    Picture,
    XFMProcessor,
    are_texts,
    as_list,
    batches,
    evaluating,
    find_tokenizer,
    image_pixels,
    is_picture,
    open_image,
    pixel_boxes,
    read_tokenizer,
    text_tokens,
)
from xfm_fast.models.text import MLPHead, TextEncoder, TransformerLayer
from xfm_fast.models.vision import Block, VisionEncoder
from xfm_fast.packing import ImageGroups, Packing, Sequences
from xfm_fast.tokenizer import CaptionTokenizer

ALL_HEADS: tuple[Head, ...] = ("mlm", "imlm", "contrastive", "matching", "boxes")
"""The heads of the paper's model."""
Encoder = Literal["vision", "text", "fusion"]
ALL_ENCODERS: tuple[Encoder, ...] = get_args(Encoder)
Precision = torch.dtype | EightBits
"""A dtype of the parameters; or linear layers in int8 (on a CPU) or fp8, and the rest in the fastest float dtype."""
PRECISIONS: dict[str, Precision] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": "int8", "fp8": "fp8",
}  # fmt: skip
"""Names on the command line."""


def float_type(precision: Precision, device: torch.device) -> torch.dtype:
    """The floating-point dtype of a precision; int8 and fp8 apply to linear layers only.

    Raises `UnavailableError` for an 8-bit type that the device lacks, and `InputError` for an unknown precision.
    """
    if isinstance(precision, torch.dtype):
        return precision
    return floating_dtype(precision, device) or torch.float32


# Inference tensors have no version counter, so tensors computed from such parameters could not be cached.
_outside_inference = torch.inference_mode(False)


class XFMOutput(NamedTuple):
    """The results of `XFM.forward`; None if the input or the head is missing.

    Attributes:
        image_embeds: `[B, 1 + N, vision_width]`.
        text_embeds: `[B, L, text_width]`, zeros at padded positions.
        image_features, text_features: `[B, embed_dim]`, L2-normalised.
        fused: `[B, L, text_width]`, text b with image b, zeros at padded positions.
        match_logits: `[B, 2]`; column 1 scores "text describes image".
        boxes: `[B, 4]` (cx, cy, w, h) relative to the image.
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    fused: Tensor | None = None
    match_logits: Tensor | None = None
    boxes: Tensor | None = None


class XFM(nn.Module):
    """The pretraining model; fine-tuning models are subclasses with fewer heads and one of their own.

    Parameter names are the official ones, so official checkpoints, optimizer groups and tools apply unchanged.

    Args:
        config: sizes of the model.
        heads: heads to build: `mlm` (language), `imlm` (fusion), `contrastive`, `matching`, `boxes`; and if named,
            `codes`, by which MIM predicts the codes of an image tokenizer.
        encoders: encoders to build; a task with one modality needs only one.
    """

    load_report: checkpoint.LoadReport | None = None
    """What was changed or dropped when an official checkpoint was loaded."""

    tokenizer: CaptionTokenizer | None = None
    """Tokenizer of `encode`, `match` and `ground`; saved with the model."""

    @explain_types
    def __init__(
        self,
        config: XFMConfig,
        *,
        heads: Iterable[Head] = ALL_HEADS,
        encoders: Iterable[Encoder] = ALL_ENCODERS,
    ) -> None:
        super().__init__()
        self.config = config
        self.heads = tuple(heads)
        for head in self.heads:
            if head not in get_args(Head):
                raise InputError(
                    f"head {head!r} is unknown; choose from {', '.join(get_args(Head))}"
                )
        built = tuple(encoders)
        for encoder in built:
            if encoder not in ALL_ENCODERS:
                raise InputError(
                    f"encoder {encoder!r} is unknown; choose from {', '.join(ALL_ENCODERS)}"
                )
        self.encoders = built
        if "vision" in built:
            self.vision_encoder = VisionEncoder(config)
        if "text" in built:
            self.text_encoder = TextEncoder(config, lm_head="mlm" in self.heads)
        if "fusion" in built:
            self.fusion_encoder = FusionEncoder(config, lm_head="imlm" in self.heads)
        if "contrastive" in self.heads:
            self.vision_proj = nn.Linear(config.vision_width, config.embed_dim)
            self.text_proj = nn.Linear(config.text_width, config.embed_dim)
            temperature = torch.tensor(config.temperature)
            if config.learnable_temperature:
                self.temp = nn.Parameter(temperature)
            else:
                self.register_buffer("temp", temperature, persistent=False)
        if "matching" in self.heads:
            self.itm_head = MLPHead(config.text_width, 2, config.head_layer_norm_eps)
        if "boxes" in self.heads:
            self.bbox_head = MLPHead(config.text_width, 4, config.head_layer_norm_eps)
        if "codes" in self.heads:
            self.lm_head = nn.Linear(config.vision_width, config.codebook_size)

    @classmethod
    @_outside_inference
    @explain_types
    def from_official(
        cls,
        source: str | Path | Mapping[str, Tensor],
        config: XFMConfig,
        *,
        heads: Iterable[Head] = ALL_HEADS,
        dtype: Precision = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
    ) -> Self:
        """Load an official checkpoint of pretraining or fine-tuning.

        Position tables are interpolated to `config.image_size` and dead weights are dropped, as `load_report` lists.

        Args:
            source: a `.th`/`.pth`/`.bin` file (read with `weights_only=True`), a `.safetensors` file, or a state dict.
            config: sizes of the model.
            heads: heads to load; a fine-tuned checkpoint lacks some. Others are dropped.
            dtype: dtype of the parameters; or "int8" or "fp8", see `quantise`.
            tokenizer: a tokenizer, or a folder with RoBERTa's `vocab.json` and `merges.txt`, or a `tokenizer.json`.

        Raises:
            DataError: the tokenizer cannot be read, or belongs to another model.
            CheckpointError: the file cannot be read, or has missing, unexpected or misshapen parameters, all listed.
        """
        what = "state dict" if isinstance(source, Mapping) else f"checkpoint {source}"
        vocabulary = None if tokenizer is None else read_tokenizer(tokenizer, config)
        state = source if isinstance(source, Mapping) else checkpoint.read_state_dict(source)
        checkpoint.refuse_relative(state, what)
        ours, report = checkpoint.to_ours(state, config)
        heads = tuple(heads)
        shared = isinstance(source, Mapping)
        model = cls._from_state(
            config, heads, checkpoint.select_heads(ours, heads), what, dtype, shared
        )
        model.load_report, model.tokenizer = report, vocabulary
        return model

    @classmethod
    @_outside_inference
    @explain_types
    def from_x2vlm(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        image_size: int | None = None,
        text_heads: int | None = None,
        dtype: Precision = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
    ) -> Self:
        """Load a checkpoint of X²-VLM or CCLM-X²-VLM, which are the same model with other parameter names.

        Sizes and heads follow from the weights. The mask token of masked image modelling, which X²-VLM lacks, is zero,
        and there is no vocabulary head on the language layers.

        Args:
            source: as for `from_official`.
            image_size: in pixels; by default that of the weights.
            text_heads: attention heads of language and fusion; by default one per 64 columns.
            dtype: dtype of the parameters; or "int8" or "fp8", see `quantise`.
            tokenizer: a folder with BERT's `vocab.txt`, or a `tokenizer.json` (of XLM-R for CCLM).

        Raises:
            DataError: the tokenizer cannot be read, or belongs to another model.
            CheckpointError: the file cannot be read, is incomplete, of an unsupported task, or of an incompatible model
                (X-VLM, ALBEF, BLIP).
        """
        what = "state dict" if isinstance(source, Mapping) else f"checkpoint {source}"
        state = source if isinstance(source, Mapping) else checkpoint.read_state_dict(source)
        found = checkpoint.read_x2vlm(
            state, what=what, image_size=image_size, text_heads=text_heads
        )
        vocabulary = None if tokenizer is None else read_tokenizer(tokenizer, found.config)
        model = cls._from_state(
            found.config,
            checkpoint.heads_in(found.state),
            found.state,
            what,
            dtype,
            isinstance(source, Mapping),
        )
        model.load_report, model.tokenizer = found.report, vocabulary
        return model

    @classmethod
    @_outside_inference
    @explain_types
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        heads: Iterable[Head] | None = None,
        dtype: Precision = torch.float32,
        tokenizer: CaptionTokenizer | str | Path | None = None,
        **download: Unpack[hub.Download],
    ) -> Self:
        """Load a folder written by `save_pretrained`, or a model on the Hugging Face Hub, with its tokenizer.

        Parameters in their stored dtype are memory-mapped: replace the file only as `save_pretrained` does, and do not
        write into it while the model lives.

        Args:
            folder: the folder, or the Hub name `"org/name"`.
            heads: heads to load; by default all in the folder.
            dtype: dtype of the parameters; or "int8" or "fp8", see `quantise`.
            tokenizer: replaces the tokenizer of the folder; see `from_official`.
            download: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` of the Hub.

        Raises:
            CheckpointError: the folder is missing, or its model is missing or damaged.
            ConfigError: its `config.json` is not a valid model configuration.
            DataError: the tokenizer cannot be read, or belongs to another model.
        """
        place = hub.local_folder(folder, **download)
        files = checkpoint.load_pretrained_files(place)
        heads = checkpoint.heads_in(files.state) if heads is None else tuple(heads)
        model = cls._from_state(
            files.config,
            heads,
            checkpoint.select_heads(files.state, heads),
            f"model {folder}",
            dtype,
        )
        model.load_tokenizer(tokenizer, place)
        return model

    def load_tokenizer(self, source: CaptionTokenizer | str | Path | None, folder: Path) -> None:
        """Set the tokenizer from `source`, or from a folder of weights if it has one."""
        self.tokenizer = (
            find_tokenizer(folder, self.config)
            if source is None
            else read_tokenizer(source, self.config)
        )

    @classmethod
    def _from_state(
        cls,
        config: XFMConfig,
        heads: tuple[Head, ...],
        state: Mapping[str, Tensor],
        what: str,
        dtype: Precision,
        shared: bool = False,
    ) -> Self:
        """Build a model from a state dict; tensors shared with the caller are copied."""
        kind = dtype if isinstance(dtype, str) else None
        dtype = float_type(dtype, torch.device("cpu"))
        checkpoint.require_depth(config, state, what=what)
        # Drawing 300 million random numbers would take longer than reading the file.
        with checkpoint.without_values():
            model = cls(config, heads=heads)
        model = model.to(dtype)
        if shared:
            checkpoint.compare(model, state, what=what)
            model = model.to_empty(device="cpu")
            checkpoint.load_into(model, state, what=what)
        else:
            checkpoint.assign_into(model, state, what=what)
        if not config.learnable_temperature and "contrastive" in heads:
            model.register_buffer(
                "temp", torch.tensor(config.temperature, dtype=dtype), persistent=False
            )
        return model.eval() if kind is None else model.quantise(kind).eval()

    @explain_types
    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors`, `preprocessor_config.json` and, if there is a tokenizer,
        `tokenizer.json`.

        Files are written atomically.
        """
        files = XFMProcessor(self.config, self.tokenizer).files()
        checkpoint.save_pretrained(self.state_dict(), self.config, folder, files=files)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        commit_message: str = "Upload X-FM",
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub as `"org/name"`; returns the commit's address.

        A model card is added if there is none. Arguments are those of `huggingface_hub.PyTorchModelHubMixin`.

        Raises:
            UnavailableError: `huggingface_hub` is not installed.
            StorageError: the Hub cannot be reached, or refuses.
        """
        return hub.push(
            self,
            name,
            private=private,
            commit_message=commit_message,
            token=token,
            branch=branch,
            create_pr=create_pr,
        )

    def quantise(
        self,
        kind: EightBits = "int8",
        agreement: Callable[[], float] | None = None,
        *,
        least: float = 0.97,
    ) -> Self:
        """Run the linear layers of all blocks in 8 bits; in place.

        Weights are quantised once per output channel, activations per token at run time. Patch embedding, embeddings,
        attention, norms and heads keep their dtype. The original parameters stay beneath, so that the model can be
        saved, trained and dequantised as before.

        Args:
            kind: "int8" on a CPU, for inference; "fp8" on a GPU of compute capability 8.9 or newer, for inference only.
                A CPU emulates fp8, slowly, to show its effect on results. A model in fp8 may be moved; a model in int8
                computes in floating point on a GPU.
            agreement: a function that scores this model's results on your data against those in floating point, as a
                cosine or a share of equal rankings. While the score is below `least`, the blocks that cost most of it
                return to floating point. It is called at most twice per block.
            least: minimum agreement.

        Raises:
            UnavailableError: this processor or GPU has no fast GEMMs of that kind.
            InputError: the model is quantised already, frozen, or in a dtype without such GEMMs; or no block fits
                `least`, and the model stays in floating point.
        """
        if self.quantised:
            raise InputError(
                f"the model is in {self.quantised} already; call dequantise() to return to floating point"
            )
        if frozen.is_frozen(self):
            raise InputError(
                f"the model is frozen and {kind} needs other weights; call unfreeze() first"
            )
        floating_dtype(kind, self.device)
        known = (
            (torch.float32, torch.bfloat16)
            if kind == "int8"
            else (torch.float32, torch.bfloat16, torch.float16)
        )
        if self.dtype not in known:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in known)
            raise InputError(
                f"{kind} needs activations of {names}, not {self.dtype}; convert the model first"
            )
        blocks = [
            [*filter(fp8.fits, block)] if kind == "fp8" else block
            for block in self._weights_by_block()
        ]
        flags.mark((weight for block in blocks for weight in block), kind)
        if kind == "fp8":
            flags.mark(self._block_weights(nn.LayerNorm), kind)
        if agreement is not None and flags.keep_within(agreement, blocks, kind, least) == len(
            blocks
        ):
            self.dequantise()
            raise InputError(
                f"no block reaches agreement() {least} in {kind}; lower least, or compare with floating point"
            )
        return self

    def cast(self, precision: Precision) -> Self:
        """Convert parameters to a precision, in place; for int8 and fp8, to the fastest dtype, then `quantise`."""
        model = self.to(float_type(precision, self.device))
        return model if isinstance(precision, torch.dtype) else model.quantise(precision)

    def dequantise(self) -> Self:
        """Undo `quantise`, in place; a model in floating point stays unchanged."""
        flags.unmark([*self._block_weights(), *self._block_weights(nn.LayerNorm)])
        return self

    @property
    def quantised(self) -> EightBits | None:
        """The 8-bit kind of the blocks, or None for a model in floating point."""
        for weight in self._block_weights():
            if (kind := flags.kind_of(weight)) is not None:
                return kind
        return None

    def _block_weights(self, of: type[nn.Linear | nn.LayerNorm] = nn.Linear) -> list[Tensor]:
        return [weight for block in self._weights_by_block(of) for weight in block]

    def _weights_by_block(
        self, of: type[nn.Linear | nn.LayerNorm] = nn.Linear
    ) -> list[list[Tensor]]:
        blocks = (block for block in self.modules() if isinstance(block, Block | TransformerLayer))
        return [
            [part.weight for part in block.modules() if isinstance(part, of)] for block in blocks
        ]

    @explain_types
    def set_image_size(self, image_size: int) -> None:
        """Adapt to another resolution, in place: position tables are interpolated as the official loader does."""
        if not isinstance(image_size, int):
            raise InputError(f"image_size is {image_size!r}; give a number of pixels")
        config = self.config.resized(image_size)
        window = (config.grid, config.grid)
        for block in self.vision_encoder.blocks:
            assert isinstance(block, Block)
            table = block.attn.relative_position_bias_table
            resized = checkpoint.interpolate_table(table.detach().cpu(), window)
            block.attn.relative_position_bias_table = nn.Parameter(
                resized.to(table.device, table.dtype), requires_grad=table.requires_grad
            )
            block.attn.window = window
        self.config = self.vision_encoder.config = config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def freeze(self) -> Self:
        """Convert the encoders' weights to the CPU's fastest GEMM layout, in place and without extra memory, for
        inference.

        The gain is largest for few tokens, where most of the time is spent reading weights. State dicts and
        `save_pretrained` are the same to the bit; training, autocast, compilers and exports need `unfreeze` first.
        Moving or converting the model unfreezes it.

        Returns:
            The model.

        Raises:
            InputError: the model is not on a CPU, not in float32 or bfloat16, in int8, or in training mode.
        """
        if self.quantised:
            raise InputError(f"the model is in {self.quantised}; call dequantise() before freeze()")
        frozen.freeze(self)
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze`."""
        frozen.unfreeze(self)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training mode or, with False, evaluation mode.

        Raises:
            InputError: training mode of a frozen model.
        """
        if mode and frozen.is_frozen(self):
            raise InputError("the model is frozen for inference; call unfreeze() to train it")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moving or converting needs the original weights.
        frozen.unfreeze(self)
        with flags.keep_fp8_flags(self):
            return super()._apply(fn, recurse)

    def require_head(self, head: Head) -> None:
        if head not in self.heads:
            raise UnavailableError(
                f"the model has no {head!r} head (it has: {', '.join(self.heads) or 'none'}); "
                f"load it with heads=(..., {head!r})"
            )

    def require_encoder(self, encoder: Encoder) -> None:
        if encoder not in self.encoders:
            raise UnavailableError(
                f"the model has no {encoder} encoder (it has: {', '.join(self.encoders) or 'none'}); "
                f"build it with encoders=(..., {encoder!r})"
            )

    @explain_types
    def encode(
        self, items: str | Picture | Sequence[str] | Sequence[Picture], *, batch_size: int = 32
    ) -> Tensor:
        """Contrastive features of texts or images; their dot product is the cosine similarity.

            >>> model.encode("a dog on a beach").shape
            torch.Size([256])
            >>> model.encode([Path("a.jpg"), PIL.Image.open("b.png")]).shape
            torch.Size([2, 256])

        Args:
            items: one or a list of strings (texts), or of `Path`s or PIL images (images). Texts are cleaned as captions
                and truncated to 40 tokens, images resized whole.
            batch_size: items per forward pass.

        Returns:
            `[embed_dim]` of one, `[N, embed_dim]` of a list; L2-normalised.

        Raises:
            InputError: items of another type, both kinds in one list, or a string that names a file.
            UnavailableError: the model lacks the contrastive head, or has no tokenizer for texts.
            DataError: an image is broken, or a text is empty after cleaning.
        """
        single = isinstance(items, str) or is_picture(items)
        every: Sequence[str] | Sequence[Picture] = as_list(items)
        self.require_head("contrastive")
        features = []
        with evaluating(self):
            if are_texts(every):
                for texts in batches(every, batch_size):
                    input_ids, mask = text_tokens(texts, self.tokenizer, self.config, self.device)
                    features.append(self.project_text(self.encode_text(input_ids, mask)))
            else:
                for images in batches(every, batch_size):
                    pixels = image_pixels(images, self.config, self.device)
                    features.append(self.project_image(self.encode_image(pixels)))
        return features[0][0] if single else torch.cat(features)

    @explain_types
    def similarity(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> Tensor:
        """Cosine similarity of images and texts: `[I, T]`, without the dimension of a single image or text.

        Args:
            images: image files (strings or paths) or PIL images.
            texts: as for `encode`, whose errors this raises.
        """
        single = isinstance(images, str) or is_picture(images)
        many: list[Picture] = as_list(images)
        of_images = self.encode([Path(each) if isinstance(each, str) else each for each in many])
        of_texts = self.encode(texts)
        found = of_images @ (of_texts if isinstance(texts, str) else of_texts.T)
        return found[0] if single else found

    @explain_types
    def match(self, image: Picture, texts: str | Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Probability that each text describes the image: `[T]`, or a scalar for one text.

        Args:
            image: image file (string or path) or PIL image, encoded once.
            texts: as for `encode`.
            batch_size: texts per forward pass.

        Raises:
            InputError: there are no texts.
            UnavailableError: the model lacks the matching head, or has no tokenizer.
            DataError: the image is broken, or a text is empty after cleaning.
        """
        self.require_head("matching")
        with evaluating(self):
            logits = [
                self.match_logits(fused)
                for fused in self._fuse_texts(open_image(image), texts, batch_size)
            ]
        found = torch.cat(logits).float().softmax(1)[:, 1]
        return found[0] if isinstance(texts, str) else found

    @explain_types
    def ground(self, image: Picture, text: str | Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Boxes of the objects that texts refer to, in pixels of the image: `[T, 4]` (x, y, w, h), or `[4]` for one
        text.

        Arguments and errors as for `match`, with the head `boxes`. An EXIF orientation of the image is not applied.
        """
        self.require_head("boxes")
        picture = open_image(image)
        with evaluating(self):
            boxes = [
                self.predict_boxes(fused) for fused in self._fuse_texts(picture, text, batch_size)
            ]
        relative = torch.cat(boxes).float()
        found = pixel_boxes(relative, relative.new_tensor([picture.size]).expand(len(relative), 2))
        return found[0] if isinstance(text, str) else found

    def _fuse_texts(
        self, image: Picture, texts: str | Sequence[str], batch_size: int
    ) -> Iterator[Tensor]:
        """Yield `[T, 1, text_width]` for chunks of T texts fused with the image, whose memory is computed once."""
        every = as_list(texts)
        if not are_texts(every):
            raise InputError("texts are images; give the image first, then strings")
        memory = None
        for some in batches(every, batch_size):
            input_ids, mask = text_tokens(some, self.tokenizer, self.config, self.device)
            if memory is None:
                memory = self.image_memory(
                    self.encode_image(image_pixels([image], self.config, self.device))
                )
            of_one = torch.zeros(len(some), dtype=torch.long, device=self.device)
            yield self.fuse(
                self.encode_text(input_ids, mask), mask, memory, of_one, first_token_only=True
            )

    def forward(
        self,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> XFMOutput:
        """All results for B images, B texts, or B pairs: the entry point of DDP, `torch.compile` and trainers.

        Losses are in `xfm_fast.objectives`. Heads that a loss does not read get no gradient, so DDP needs
        `find_unused_parameters=True`.

        Args:
            pixels: `[B, 3, R, R]` normalised images.
            input_ids: `[B, L]`.
            attention_mask: `[B, L]`, non-zero for real tokens; by default everything but the padding id.

        Raises:
            InputError: images and texts are both missing, or not what the encoders accept.
        """
        if pixels is None and input_ids is None:
            raise InputError("neither pixels nor input_ids were given; pass one or both")
        image = None if pixels is None else self.encode_image(pixels)
        if input_ids is not None and attention_mask is None:
            attention_mask = input_ids.ne(self.config.pad_token_id)
        text = None if input_ids is None else self.encode_text(input_ids, attention_mask)
        fused = None
        if image is not None and text is not None and self.config.fusion_layers:
            assert attention_mask is not None
            fused = self.fuse(text, attention_mask, self.image_memory(image))
        contrastive = "contrastive" in self.heads
        return XFMOutput(
            image_embeds=image,
            text_embeds=text,
            image_features=self.project_image(image) if contrastive and image is not None else None,
            text_features=self.project_text(text) if contrastive and text is not None else None,
            fused=fused,
            match_logits=self.match_logits(fused)
            if "matching" in self.heads and fused is not None
            else None,
            boxes=self.predict_boxes(fused)
            if "boxes" in self.heads and fused is not None
            else None,
        )

    def encode_image(self, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Vision encoder.

        Args:
            pixels: `[B, 3, R, R]` normalised images.
            patch_mask: `[B, N]`, True where the patch is replaced by the mask token.

        Returns:
            `[B, 1 + N, vision_width]`: image token, then patches.
        """
        self.require_encoder("vision")
        inputs.check_pixels(pixels, self.config)
        if patch_mask is not None:
            patch_mask = inputs.check_patch_mask(patch_mask, pixels, self.config)
        if not pixels.shape[0]:
            return self._no_images(pixels)
        return self.vision_encoder(self._cast(pixels), patch_mask)

    def encode_regions(
        self, pixels: Tensor, image_index: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode R regions of B images.

        Args:
            pixels: `[B, 3, R, R]`.
            image_index: `[R]` image of each region.
            region_mask: `[R, 1 + N]`, non-zero for token 0 and the patches of the region.

        Returns:
            Two `[R, 1 + N, vision_width]`: with the region's token first, and the whole image.
        """
        checked = self._check_regions(pixels, image_index, region_mask)
        if not region_mask.shape[0]:
            return self._no_images(pixels), self._no_images(pixels)
        return self.vision_encoder.regions(*checked)

    def encode_region_tokens(
        self, pixels: Tensor, image_index: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`encode_regions` without a copy of the image for every region; the arguments are the same.

        Returns:
            The regions' own tokens, `[R, 1, vision_width]` (`[R, 1 + N, vision_width]` with `local_attn_depth > 0`),
            and the images `[B, 1 + N, vision_width]`.
        """
        checked = self._check_regions(pixels, image_index, region_mask)
        if not region_mask.shape[0]:
            tokens = self._no_images(pixels)
            return tokens if self.config.local_attn_depth > 0 else tokens[:, :1], self.encode_image(
                pixels
            )
        return self.vision_encoder.region_tokens(*checked)

    def _no_images(self, pixels: Tensor) -> Tensor:
        return self._cast(pixels).new_zeros(
            0, self.config.num_image_tokens, self.config.vision_width
        )

    def _check_regions(
        self, pixels: Tensor, image_index: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.require_encoder("vision")
        inputs.check_pixels(pixels, self.config)
        inputs.check_token_mask(
            region_mask, (len(region_mask), self.config.num_image_tokens), "region_mask"
        )
        image_index = inputs.check_image_index(
            image_index, pixels.shape[0], region_mask.shape[0], "regions"
        )
        region_mask = inputs.check_region_mask(region_mask, region_mask.shape[0], self.config)
        return self._cast(pixels), image_index, region_mask

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, keep_padding: bool = False
    ) -> Tensor:
        """Language encoder. Texts run unpadded; padded positions of the result are zero.

        Args:
            input_ids: `[B, L]`.
            attention_mask: `[B, L]`, non-zero for real tokens; by default everything but the padding id.
            keep_padding: compute padded positions too, as the official code does.

        Returns:
            `[B, L, text_width]`.
        """
        self.require_encoder("text")
        mask = inputs.check_tokens(input_ids, attention_mask, self.config)
        exporting = torch.compiler.is_exporting()
        packing = Packing.from_mask(mask, keep_padding=keep_padding or exporting)
        embeds = packing.unpad(self.text_encoder(input_ids, packing))
        return embeds if keep_padding or not exporting else embeds * mask.bool()[..., None]

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """Contrastive feature of the image token: `[B, 1 + N, vision_width]` → `[B, embed_dim]`, L2-normalised."""
        self.require_head("contrastive")
        inputs.check_embeddings(image_embeds, self.config.vision_width, "image embeddings")
        return F.normalize(
            ops.linear(image_embeds[:, 0], self.vision_proj.weight, self.vision_proj.bias), dim=-1
        )

    def project_text(self, text_embeds: Tensor) -> Tensor:
        """Contrastive feature of text token 0: `[B, L, text_width]` → `[B, embed_dim]`, L2-normalised."""
        self.require_head("contrastive")
        inputs.check_embeddings(text_embeds, self.config.text_width, "text embeddings")
        return F.normalize(
            ops.linear(text_embeds[:, 0], self.text_proj.weight, self.text_proj.bias), dim=-1
        )

    def image_memory(self, image_embeds: Tensor, token_mask: Tensor | None = None) -> ImageMemory:
        """Keys and values of every fusion layer, computed once per image.

        Args:
            image_embeds: `[B, 1 + N, vision_width]` (or any number of tokens).
            token_mask: `[B, 1 + N]`, zero for tokens that texts must not attend to (patches outside a region).
        """
        self.require_encoder("fusion")
        inputs.check_embeddings(image_embeds, self.config.vision_width, "image embeddings")
        if not self.config.fusion_layers:
            raise UnavailableError(
                "fusion_layers=0: this model cannot fuse; use a configuration with fusion layers"
            )
        if token_mask is not None:
            token_mask = inputs.check_token_mask(
                token_mask, (image_embeds.shape[0], image_embeds.shape[1]), "token_mask"
            )
        return self.fusion_encoder.memory(image_embeds, token_mask)

    def packed_memory(
        self, tokens: Tensor, cu_keys: Tensor, longest: int, rows: Tensor | None = None
    ) -> PackedMemory:
        """Keys and values of image tokens `[K, vision_width]`, each projected once, for groups with overlapping tokens.

        The other arguments are attributes of the returned `PackedMemory`.
        """
        if not self.config.fusion_layers:
            raise UnavailableError(
                "fusion_layers=0: this model cannot fuse; use a configuration with fusion layers"
            )
        return PackedMemory(self.fusion_encoder.project(tokens), cu_keys, longest, rows)

    def fuse(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        memory: ImageMemory,
        image_index: Tensor | None = None,
        *,
        first_token_only: bool = False,
        keep_padding: bool = False,
    ) -> Tensor:
        """Fuse P texts with B images.

        Args:
            text_embeds: `[P, L, text_width]` from `encode_text`.
            attention_mask: `[P, L]`, non-zero for real tokens.
            memory: of the B images, from `image_memory`.
            image_index: `[P]` image of each text, in any order; by default text b belongs to image b.
            first_token_only: compute only token 0, which most heads read; the last layer is then nearly free.
            keep_padding: compute padded positions too, as the official code does.

        Returns:
            `[P, L, text_width]`, zeros at padded positions; `[P, 1, text_width]` with `first_token_only`.
        """
        mask, groups = self.check_pairs(text_embeds, attention_mask, memory, image_index)
        packing = Packing.from_mask(mask, order=groups.order, keep_padding=keep_padding)
        fused = self.fusion_encoder(
            packing.pack(text_embeds), packing, memory, groups, first_token_only=first_token_only
        )
        return packing.restore(fused)[:, None] if first_token_only else packing.unpad(fused)

    def check_pairs(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        memory: ImageMemory,
        image_index: Tensor | None,
    ) -> tuple[Tensor, ImageGroups]:
        """Validate the arguments of `fuse`; returns the boolean mask and the texts grouped by image."""
        if not isinstance(memory, ImageMemory):
            raise InputError(
                f"memory is a {type(memory).__name__}; give the result of image_memory"
            )
        inputs.check_embeddings(text_embeds, self.config.text_width, "text embeddings")
        mask, texts = (
            inputs.check_attention_mask(attention_mask, [*text_embeds.shape[:2]]),
            text_embeds.shape[0],
        )
        if image_index is not None:
            image_index = inputs.check_image_index(image_index, memory.images, texts, "texts")
            return mask, ImageGroups.from_index(image_index, memory.images, text_embeds.device)
        if texts != memory.images:
            raise InputError(
                f"{texts} texts and {memory.images} images do not pair up; pass image_index"
            )
        return mask, ImageGroups(
            torch.arange(texts + 1, dtype=torch.int32, device=text_embeds.device)
        )

    def match_logits(self, fused: Tensor) -> Tensor:
        """Fused embeddings `[P, L, text_width]` → `[P, 2]`; column 1 scores "text describes image"."""
        self.require_head("matching")
        return self._on_first_token(self.itm_head, fused)

    def predict_boxes(self, fused: Tensor) -> Tensor:
        """Fused embeddings `[P, L, text_width]` → `[P, 4]` boxes (cx, cy, w, h) relative to the image."""
        self.require_head("boxes")
        return self._on_first_token(self.bbox_head, fused).sigmoid()

    def mlm_logits(self, text_embeds: Tensor) -> Tensor:
        """Vocabulary logits of the language encoder: `[..., text_width]` → `[..., vocab_size]`."""
        self.require_head("mlm")
        return self.text_encoder.lm_head(text_embeds, self.text_encoder.word_embeddings)

    def imlm_logits(self, fused: Tensor) -> Tensor:
        """Vocabulary logits of the fusion encoder: `[..., text_width]` → `[..., vocab_size]`."""
        self.require_head("imlm")
        return self.fusion_encoder.lm_head(fused, self.fusion_encoder.word_embeddings)

    def _on_first_token(self, head: nn.Module, fused: Tensor) -> Tensor:
        inputs.check_embeddings(fused, self.config.text_width, "fused embeddings")
        return head(fused[:, 0])

    def _cast(self, pixels: Tensor) -> Tensor:
        return pixels if torch.is_autocast_enabled(pixels.device.type) else pixels.to(self.dtype)


@dataclass
class HiddenStates:
    """Intermediate results of the encoders, in the order of computation."""

    # [B, 1 + N, vision_width] embeddings, class token first, and the output of every block
    vision: list[Tensor] = field(default_factory=list)
    # [B, L, text_width] embeddings and the output of every layer, zeros at padding
    text: list[Tensor] = field(default_factory=list)
    # [P, L, text_width] output of every layer that computes whole texts, zeros at padding
    fusion: list[Tensor] = field(default_factory=list)


@contextmanager
def record_hidden_states(model: XFM) -> Iterator[HiddenStates]:
    """Record the intermediate results of `encode_image`, `encode_text` and `fuse` in a `with` block.

    Example:
        >>> with record_hidden_states(model) as states:
        ...     embeds = model.encode_image(pixels)
        >>> states.vision[-1].shape == embeds.shape
        True
    """
    states = HiddenStates()

    def after_block(block: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        states.vision.append(out)

    with ExitStack() as undo:
        if hasattr(model, "vision_encoder"):
            blocks = model.vision_encoder.blocks
            undo.callback(
                blocks[0]
                .register_forward_pre_hook(lambda _, args: states.vision.append(args[0]))
                .remove
            )
            for block in blocks:
                undo.callback(block.register_forward_hook(after_block).remove)
        for name in ("text", "fusion"):
            if hasattr(model, f"{name}_encoder"):
                _record_texts(getattr(model, f"{name}_encoder"), getattr(states, name), undo)
        yield states


def _record_texts(
    encoder: TextEncoder | FusionEncoder, kept: list[Tensor], undo: ExitStack
) -> None:
    packings: list[Sequences] = []

    def keep(module: nn.Module, args: object, packed: Tensor) -> None:
        packing = packings[-1]
        # The output of a last layer that computes only reads does not fit the padded batch.
        if isinstance(packing, Packing) and packed.shape[0] == packing.positions.shape[0]:
            kept.append(packing.unpad(packed))

    def recorded(feed_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        out = feed_forward(x)
        keep(encoder, (), out)
        return out

    undo.callback(
        encoder.register_forward_pre_hook(lambda _, args: packings.append(args[1])).remove
    )
    if isinstance(encoder, TextEncoder):
        undo.callback(encoder.roberta.embeddings.register_forward_hook(keep).remove)
    for layer in encoder.roberta.encoder:
        # Hooks fire on whole modules only, and text layers are called by their parts; this is the last one.
        own = vars(layer)
        former = own.get("feed_forward")
        undo.callback(own.pop, "feed_forward") if former is None else undo.callback(
            own.update, feed_forward=former
        )
        own["feed_forward"] = partial(recorded, layer.feed_forward)
