"""XFM: language encoder, vision encoder and fusion encoder with their heads (arXiv 2301.05065)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast import checkpoint
from xfm_fast.checkpoint import Head
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels import ops
from xfm_fast.models import inputs
from xfm_fast.models.fusion import FusionEncoder, ImageMemory, PackedMemory
from xfm_fast.models.heads import MLPHead
from xfm_fast.models.text import TextEncoder
from xfm_fast.models.vision import Block, VisionEncoder
from xfm_fast.packing import ImageGroups, Packing, Sequences

ALL_HEADS: tuple[Head, ...] = get_args(Head)
Encoder = Literal["vision", "text", "fusion"]
ALL_ENCODERS: tuple[Encoder, ...] = get_args(Encoder)


class XFM(nn.Module):
    """The pretraining model; fine-tuning models are subclasses with fewer heads and one of their own.

    Parameter names are those of the official code, so its checkpoints, optimizer groups and tools apply as they are.

    Args:
        config: sizes.
        heads: which heads to build: `mlm` (language), `imlm` (fusion), `contrastive`, `matching`, `boxes`.
        encoders: which encoders to build; a task that reads one modality has no use for the others.
    """

    load_report: checkpoint.LoadReport | None = None
    """Changes and omissions of loading an official checkpoint."""

    def __init__(
        self, config: XFMConfig, *, heads: Iterable[Head] = ALL_HEADS, encoders: Iterable[Encoder] = ALL_ENCODERS
    ) -> None:
        super().__init__()
        self.config = config
        self.heads = tuple(heads)
        for head in self.heads:
            if head not in ALL_HEADS:
                raise InputError(f"head {head!r} is unknown; choose from {', '.join(ALL_HEADS)}")
        built = tuple(encoders)
        for encoder in built:
            if encoder not in ALL_ENCODERS:
                raise InputError(f"encoder {encoder!r} is unknown; choose from {', '.join(ALL_ENCODERS)}")
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

    @classmethod
    def from_official(
        cls,
        source: str | Path | Mapping[str, Tensor],
        config: XFMConfig,
        *,
        heads: Iterable[Head] = ALL_HEADS,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load an official checkpoint, of pretraining or fine-tuning.

        Position tables are interpolated to `config.image_size`, dead weights are left out; `load_report` of the model
        says so.

        Args:
            source: a `.th`/`.pth`/`.bin` file (read with `weights_only=True`), a `.safetensors` file, or a state dict.
            config: sizes of the model.
            heads: heads to load; a fine-tuned checkpoint lacks some. Those not named are left out.
            dtype: of the parameters.

        Raises:
            CheckpointError: the file cannot be read, or lists every parameter that is missing, unexpected or misshapen.
        """
        what = "state dict" if isinstance(source, Mapping) else f"checkpoint {source}"
        state = source if isinstance(source, Mapping) else checkpoint.read_state_dict(source)
        ours, report = checkpoint.to_ours(state, config)
        heads = tuple(heads)
        model = cls._loaded(config, heads, checkpoint.select_heads(ours, heads), what, dtype)
        model.load_report = report
        return model

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, heads: Iterable[Head] | None = None, dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load a folder that `save_pretrained` wrote; by default with the heads that it holds."""
        files = checkpoint.load_pretrained_files(folder)
        heads = checkpoint.heads_in(files.state) if heads is None else tuple(heads)
        return cls._loaded(files.config, heads, checkpoint.select_heads(files.state, heads), f"model {folder}", dtype)

    @classmethod
    def _loaded(
        cls, config: XFMConfig, heads: tuple[Head, ...], state: Mapping[str, Tensor], what: str, dtype: torch.dtype
    ) -> Self:
        checkpoint.require_depth(config, state, what=what)
        # Drawing 300 million random numbers only to overwrite them would take longer than reading the file.
        with torch.device("meta"):
            model = cls(config, heads=heads)
        checkpoint.compare(model, state, what=what)
        model = model.to(dtype).to_empty(device="cpu")
        if not config.learnable_temperature and "contrastive" in heads:
            model.temp.fill_(config.temperature)
        checkpoint.load_into(model, state, what=what)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; each appears whole or not at all."""
        checkpoint.save_pretrained(self.state_dict(), self.config, folder)

    def set_image_size(self, image_size: int) -> None:
        """Adapt to another resolution, in place: position tables are interpolated as the official loader does."""
        config = self.config.replace(image_size=image_size)
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

    def require_head(self, head: Head) -> None:
        if head not in self.heads:
            raise UnavailableError(
                f"this model was built without the {head!r} head (it has: {', '.join(self.heads) or 'none'}); "
                f"build or load it with heads=(..., {head!r})"
            )

    def require_encoder(self, encoder: Encoder) -> None:
        if encoder not in self.encoders:
            raise UnavailableError(
                f"this model was built without the {encoder} encoder (it has: {', '.join(self.encoders) or 'none'}); "
                f"build it with encoders=(..., {encoder!r})"
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

    def encode_regions(self, pixels: Tensor, image_index: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor]:
        """R regions of B images.

        Args:
            pixels: `[B, 3, R, R]`.
            image_index: `[R]` image of each region.
            region_mask: `[R, 1 + N]`, non-zero for token 0 and the patches of the region.

        Returns:
            Two `[R, 1 + N, vision_width]`: with the region's token first, and the whole image.
        """
        checked = self._checked_regions(pixels, image_index, region_mask)
        if not region_mask.shape[0]:
            return self._no_images(pixels), self._no_images(pixels)
        return self.vision_encoder.regions(*checked)

    def encode_region_tokens(self, pixels: Tensor, image_index: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor]:
        """`encode_regions` without a copy of its image for every region; arguments as there.

        Returns:
            The tokens that regions have to themselves, `[R, 1, vision_width]` (`[R, 1 + N, vision_width]` with
            `local_attn_depth > 0`), and the images `[B, 1 + N, vision_width]`.
        """
        checked = self._checked_regions(pixels, image_index, region_mask)
        if not region_mask.shape[0]:
            tokens = self._no_images(pixels)
            return tokens if self.config.local_attn_depth > 0 else tokens[:, :1], self.encode_image(pixels)
        return self.vision_encoder.region_tokens(*checked)

    def _no_images(self, pixels: Tensor) -> Tensor:
        return self._cast(pixels).new_zeros(0, self.config.num_image_tokens, self.config.vision_width)

    def _checked_regions(
        self, pixels: Tensor, image_index: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.require_encoder("vision")
        inputs.check_pixels(pixels, self.config)
        inputs.check_token_mask(region_mask, (len(region_mask), self.config.num_image_tokens), "region_mask")
        image_index = inputs.check_image_index(image_index, pixels.shape[0], region_mask.shape[0], "regions")
        region_mask = inputs.check_region_mask(region_mask, region_mask.shape[0], self.config)
        return self._cast(pixels), image_index, region_mask

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, keep_padding: bool = False
    ) -> Tensor:
        """Language encoder. Texts run without their padding; padded positions of the result are zero.

        Args:
            input_ids: `[B, L]`.
            attention_mask: `[B, L]`, non-zero for real tokens; by default everything but the padding id.
            keep_padding: compute padded positions too, as the official code does.

        Returns:
            `[B, L, text_width]`.
        """
        self.require_encoder("text")
        mask = inputs.check_tokens(input_ids, attention_mask, self.config)
        packing = Packing.from_mask(mask, keep_padding=keep_padding)
        return packing.unpad(self.text_encoder(input_ids, packing))

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """Contrastive feature of the image token: `[B, 1 + N, vision_width]` → `[B, embed_dim]`, L2-normalised."""
        self.require_head("contrastive")
        inputs.check_embeddings(image_embeds, self.config.vision_width, "image embeddings")
        return F.normalize(ops.linear(image_embeds[:, 0], self.vision_proj.weight, self.vision_proj.bias), dim=-1)

    def project_text(self, text_embeds: Tensor) -> Tensor:
        """Contrastive feature of text token 0: `[B, L, text_width]` → `[B, embed_dim]`, L2-normalised."""
        self.require_head("contrastive")
        inputs.check_embeddings(text_embeds, self.config.text_width, "text embeddings")
        return F.normalize(ops.linear(text_embeds[:, 0], self.text_proj.weight, self.text_proj.bias), dim=-1)

    def image_memory(self, image_embeds: Tensor, token_mask: Tensor | None = None) -> ImageMemory:
        """Keys and values of every fusion layer, computed once per image.

        Args:
            image_embeds: `[B, 1 + N, vision_width]` (or any number of tokens).
            token_mask: `[B, 1 + N]`, zero for tokens that texts must not attend to (patches outside a region).
        """
        self.require_encoder("fusion")
        inputs.check_embeddings(image_embeds, self.config.vision_width, "image embeddings")
        if not self.config.fusion_layers:
            raise UnavailableError("this model has no fusion layers (fusion_layers=0)")
        if token_mask is not None:
            token_mask = inputs.check_token_mask(
                token_mask, (image_embeds.shape[0], image_embeds.shape[1]), "token_mask"
            )
        return self.fusion_encoder.memory(image_embeds, token_mask)

    def packed_memory(self, tokens: Tensor, cu_keys: Tensor, longest: int, rows: Tensor | None = None) -> PackedMemory:
        """Keys and values of image tokens `[K, vision_width]`, projected once each, for groups that see some of them.

        The other arguments are attributes of the `PackedMemory` that comes back.
        """
        if not self.config.fusion_layers:
            raise UnavailableError("this model has no fusion layers (fusion_layers=0)")
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
            memory: of the B images.
            image_index: `[P]` image of each text, in any order; by default text b belongs to image b.
            first_token_only: compute only what heads on token 0 read; the last layer is then nearly free.
            keep_padding: compute padded positions too, as the official code does.

        Returns:
            `[P, L, text_width]`, zeros at padded positions; `[P, 1, text_width]` with `first_token_only`.
        """
        inputs.check_embeddings(text_embeds, self.config.text_width, "text embeddings")
        mask = inputs.check_attention_mask(attention_mask, [*text_embeds.shape[:2]])
        texts = text_embeds.shape[0]
        if image_index is None:
            if texts != memory.images:
                raise InputError(f"{texts} texts and {memory.images} images do not pair up; pass image_index")
            image_index = torch.arange(texts, device=text_embeds.device)
        image_index = inputs.check_image_index(image_index, memory.images, texts, "texts")
        groups = ImageGroups.from_index(image_index, memory.images)
        packing = Packing.from_mask(mask, order=groups.order, keep_padding=keep_padding)
        fused = self.fusion_encoder(
            packing.pack(text_embeds), packing, memory, groups, first_token_only=first_token_only
        )
        return packing.restore(fused)[:, None] if first_token_only else packing.unpad(fused)

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
    """The intermediate results of a model's encoders, in the order in which they were computed.

    Attributes:
        vision: `[B, 1 + N, vision_width]` embeddings, class token first, and the output of every block.
        text: `[B, L, text_width]` embeddings and the output of every layer, zeros at padded positions.
        fusion: `[P, L, text_width]` output of every layer that computes whole texts, zeros at padded positions.
    """

    vision: list[Tensor] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)
    fusion: list[Tensor] = field(default_factory=list)


@contextmanager
def record_hidden_states(model: XFM) -> Iterator[HiddenStates]:
    """Record what `encode_image`, `encode_text` and `fuse` compute on the way, for the time of a block.

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
            undo.callback(blocks[0].register_forward_pre_hook(lambda _, args: states.vision.append(args[0])).remove)
            for block in blocks:
                undo.callback(block.register_forward_hook(after_block).remove)
        for name in ("text", "fusion"):
            if hasattr(model, f"{name}_encoder"):
                _record_texts(getattr(model, f"{name}_encoder"), getattr(states, name), undo)
        yield states


def _record_texts(encoder: TextEncoder | FusionEncoder, kept: list[Tensor], undo: ExitStack) -> None:
    packings: list[Sequences] = []

    def keep(module: nn.Module, args: object, packed: Tensor) -> None:
        packing = packings[-1]
        # A last layer that computes only what is read has no place for it in a padded batch.
        if isinstance(packing, Packing) and packed.shape[0] == packing.positions.shape[0]:
            kept.append(packing.unpad(packed))

    def recorded(feed_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        out = feed_forward(x)
        keep(encoder, (), out)
        return out

    undo.callback(encoder.register_forward_pre_hook(lambda _, args: packings.append(args[1])).remove)
    if isinstance(encoder, TextEncoder):
        undo.callback(encoder.roberta.embeddings.register_forward_hook(keep).remove)
    for layer in encoder.roberta.encoder:
        # Hooks see whole modules only, and a layer of texts is called by its parts, of which this is the last.
        own = vars(layer)
        former = own.get("feed_forward")
        undo.callback(own.pop, "feed_forward") if former is None else undo.callback(own.update, feed_forward=former)
        own["feed_forward"] = partial(recorded, layer.feed_forward)
