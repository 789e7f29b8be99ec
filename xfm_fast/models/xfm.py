"""XFM: language encoder, vision encoder and fusion encoder with their heads (arXiv 2301.05065).

`encode`, `match`, `ground` and `similarity` take strings and images; the methods below them take tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.checkpoint import Head as Head
from xfm_fast.checkpoint import interpolate_table
from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError, UnavailableError, explain_types
from xfm_fast.kernels import ops
from xfm_fast.models import inputs
from xfm_fast.models.fusion import FusionEncoder, ImageMemory, PackedMemory
from xfm_fast.models.precision import PRECISIONS as PRECISIONS
from xfm_fast.models.precision import Precision as Precision
from xfm_fast.models.pretrained import ALL_HEADS, PretrainedMixin
from xfm_fast.models.processor import (
    Picture,
    are_texts,
    as_list,
    batches,
    evaluating,
    image_pixels,
    is_picture,
    open_image,
    pixel_boxes,
    text_tokens,
)
from xfm_fast.models.text import MLPHead, TextEncoder
from xfm_fast.models.vision import Block, VisionEncoder
from xfm_fast.packing import ImageGroups, Packing

Encoder = Literal["vision", "text", "fusion"]
ALL_ENCODERS: tuple[Encoder, ...] = get_args(Encoder)


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


class XFM(PretrainedMixin):
    """The pretraining model; fine-tuning models are subclasses with fewer heads and one of their own.

    Parameter names are the official ones, so official checkpoints, optimizer groups and tools apply unchanged.

    Args:
        config: sizes of the model.
        heads: heads to build: `mlm` (language), `imlm` (fusion), `contrastive`, `matching` and
            `boxes`; on request `codes`, with which MIM predicts the codes of an image tokenizer.
        encoders: encoders to build; a task with one modality needs only one.
    """

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
        self.encoders = tuple(encoders)
        for head in self.heads:
            if head not in get_args(Head):
                raise InputError(
                    f"head {head!r} is unknown; choose from {', '.join(get_args(Head))}"
                )
        for encoder in self.encoders:
            if encoder not in ALL_ENCODERS:
                raise InputError(
                    f"encoder {encoder!r} is unknown; choose from {', '.join(ALL_ENCODERS)}"
                )
        if "vision" in self.encoders:
            self.vision_encoder = VisionEncoder(config)
        if "text" in self.encoders:
            self.text_encoder = TextEncoder(config, lm_head="mlm" in self.heads)
        if "fusion" in self.encoders:
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

    @explain_types
    def set_image_size(self, image_size: int) -> None:
        """Interpolate the position tables to another resolution, in place, as the official loader does."""
        if not isinstance(image_size, int):
            raise InputError(f"image_size is {image_size!r}; give a number of pixels")
        config = self.config.resized(image_size)
        window = (config.grid, config.grid)
        for block in self.vision_encoder.blocks:
            assert isinstance(block, Block)
            table = block.attn.relative_position_bias_table
            resized = interpolate_table(table.detach().cpu(), window)
            block.attn.relative_position_bias_table = nn.Parameter(
                resized.to(table.device, table.dtype), requires_grad=table.requires_grad
            )
            block.attn.window = window
        self.config = self.vision_encoder.config = config

    def require_head(self, head: Head) -> None:
        """Raise `UnavailableError` unless the model has the head."""
        if head not in self.heads:
            raise UnavailableError(
                f"the model has no {head!r} head (it has: {', '.join(self.heads) or 'none'}); "
                f"load it with heads=(..., {head!r})"
            )

    def require_encoder(self, encoder: Encoder) -> None:
        """Raise `UnavailableError` unless the model has the encoder."""
        if encoder not in self.encoders:
            raise UnavailableError(
                f"the model has no {encoder} encoder (it has: {', '.join(self.encoders) or 'none'}); "
                f"build it with encoders=(..., {encoder!r})"
            )

    @explain_types
    def encode(
        self, items: str | Picture | Sequence[str] | Sequence[Picture], *, batch_size: int = 32
    ) -> Tensor:
        """Compute contrastive features of texts or images; their dot product is the cosine similarity.

            >>> model.encode("a dog on a beach").shape
            torch.Size([256])
            >>> model.encode([Path("a.jpg"), PIL.Image.open("b.png")]).shape
            torch.Size([2, 256])

        Args:
            items: one or a list of strings (texts), or of `Path`s or PIL images (images). Texts are
                cleaned as captions and truncated to 40 tokens, images resized whole.
            batch_size: items per forward pass.

        Returns:
            `[embed_dim]` of one, `[N, embed_dim]` of a list; L2-normalised.

        Raises:
            InputError: items of another type, texts and images in one list, or a string that names a
                file.
            UnavailableError: the model lacks the contrastive head, or has no tokenizer for texts.
            DataError: an image is broken, or a text is empty after cleaning.
        """
        sequence: Sequence[str] | Sequence[Picture] = as_list(items)
        self.require_head("contrastive")
        features = []
        with evaluating(self):
            if are_texts(sequence):
                for texts in batches(sequence, batch_size):
                    input_ids, mask = text_tokens(texts, self.tokenizer, self.config, self.device)
                    features.append(self.project_text(self.encode_text(input_ids, mask)))
            else:
                for images in batches(sequence, batch_size):
                    pixels = image_pixels(images, self.config.image_size, self.device)
                    features.append(self.project_image(self.encode_image(pixels)))
        if isinstance(items, str) or is_picture(items):
            return features[0][0]
        return torch.cat(features)

    @explain_types
    def similarity(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> Tensor:
        """Compute the cosine similarity of images and texts: `[I, T]`, without the dimension of a single one.

        Args:
            images: image files (strings or paths) or PIL images.
            texts: as for `encode`, whose errors this raises.
        """
        pictures = [Path(item) if isinstance(item, str) else item for item in as_list(images)]
        image_features, text_features = self.encode(pictures), self.encode(texts)
        cosines = image_features @ text_features.t()
        return cosines[0] if isinstance(images, str) or is_picture(images) else cosines

    @explain_types
    def match(self, image: Picture, texts: str | Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Compute the probability that each text describes the image: `[T]`, or a scalar for one text.

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
            fused = self._fuse_texts(open_image(image), texts, batch_size)
            logits = torch.cat([self.match_logits(chunk) for chunk in fused])
        probabilities = logits.float().softmax(1)[:, 1]
        return probabilities[0] if isinstance(texts, str) else probabilities

    @explain_types
    def ground(self, image: Picture, text: str | Sequence[str], *, batch_size: int = 256) -> Tensor:
        """Predict boxes of the objects that texts refer to: `[T, 4]`, or `[4]` for one text.

        Boxes are (x, y, w, h) in pixels of the image. Arguments and errors are those of `match`, with
        the head `boxes`. An EXIF orientation of the image is not applied.
        """
        self.require_head("boxes")
        picture = open_image(image)
        with evaluating(self):
            fused = self._fuse_texts(picture, text, batch_size)
            relative = torch.cat([self.predict_boxes(chunk) for chunk in fused]).float()
        boxes = pixel_boxes(relative, relative.new_tensor([picture.size]))
        return boxes[0] if isinstance(text, str) else boxes

    def _fuse_texts(
        self, image: Picture, texts: str | Sequence[str], batch_size: int
    ) -> Iterator[Tensor]:
        """Yield `[T, 1, text_width]` for chunks of T texts fused with the image, which is encoded once."""
        captions = as_list(texts)
        if not are_texts(captions):
            raise InputError("texts are images; give the image first, then strings")
        memory = None
        for chunk in batches(captions, batch_size):
            input_ids, mask = text_tokens(chunk, self.tokenizer, self.config, self.device)
            if memory is None:
                pixels = image_pixels([image], self.config.image_size, self.device)
                memory = self.image_memory(self.encode_image(pixels))
            index = torch.zeros(len(chunk), dtype=torch.long, device=self.device)
            embeds = self.encode_text(input_ids, mask)
            yield self.fuse(embeds, mask, memory, index, first_token_only=True)

    def forward(
        self,
        pixels: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> XFMOutput:
        """Compute all results for B images, B texts, or B pairs.

        This is the entry point of DDP, `torch.compile` and trainers; losses are in
        `xfm_fast.objectives`. Heads that a loss does not read get no gradient, so DDP needs
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
        results: dict[str, Tensor] = {}
        contrastive = "contrastive" in self.heads
        if pixels is not None:
            results["image_embeds"] = image = self.encode_image(pixels)
            if contrastive:
                results["image_features"] = self.project_image(image)
        if input_ids is not None:
            if attention_mask is None:
                attention_mask = input_ids.ne(self.config.pad_token_id)
            results["text_embeds"] = text = self.encode_text(input_ids, attention_mask)
            if contrastive:
                results["text_features"] = self.project_text(text)
            if pixels is not None and self.config.fusion_layers:
                memory = self.image_memory(results["image_embeds"])
                results["fused"] = fused = self.fuse(text, attention_mask, memory)
                if "matching" in self.heads:
                    results["match_logits"] = self.match_logits(fused)
                if "boxes" in self.heads:
                    results["boxes"] = self.predict_boxes(fused)
        return XFMOutput(**results)

    def encode_image(self, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Encode images.

        Args:
            pixels: `[B, 3, R, R]` normalised images.
            patch_mask: `[B, N]`, True for patches that the mask token replaces.

        Returns:
            `[B, 1 + N, vision_width]`: image token, then patches.
        """
        self.require_encoder("vision")
        inputs.check_pixels(pixels, self.config)
        if patch_mask is not None:
            patch_mask = inputs.check_patch_mask(patch_mask, pixels, self.config)
        if not pixels.shape[0]:
            return self._no_image_tokens(pixels)
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
            return self._no_image_tokens(pixels), self._no_image_tokens(pixels)
        return self.vision_encoder.regions(*checked)

    def encode_region_tokens(
        self, pixels: Tensor, image_index: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode regions as `encode_regions` does, without a copy of the image for every region.

        Returns:
            The tokens of the regions, `[R, 1, vision_width]` (`[R, 1 + N, vision_width]` with
            `local_attn_depth > 0`), and the images `[B, 1 + N, vision_width]`.
        """
        checked = self._check_regions(pixels, image_index, region_mask)
        if not region_mask.shape[0]:
            tokens = self._no_image_tokens(pixels)
            if self.config.local_attn_depth <= 0:
                tokens = tokens[:, :1]
            return tokens, self.encode_image(pixels)
        return self.vision_encoder.region_tokens(*checked)

    def _no_image_tokens(self, pixels: Tensor) -> Tensor:
        shape = 0, self.config.num_image_tokens, self.config.vision_width
        return self._cast(pixels).new_zeros(shape)

    def _check_regions(
        self, pixels: Tensor, image_index: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.require_encoder("vision")
        inputs.check_pixels(pixels, self.config)
        mask = inputs.check_region_mask(region_mask, self.config)
        index = inputs.check_image_index(image_index, len(pixels), len(mask), "regions")
        return self._cast(pixels), index, mask

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, keep_padding: bool = False
    ) -> Tensor:
        """Encode texts. They run unpadded; padded positions of the result are zero.

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
        """Compute the contrastive feature of the image token: `[B, 1 + N, vision_width]` → `[B, embed_dim]`.

        Features are L2-normalised.
        """
        self.require_head("contrastive")
        inputs.check_embeddings(image_embeds, self.config.vision_width, "image embeddings")
        layer = self.vision_proj
        return F.normalize(ops.linear(image_embeds[:, 0], layer.weight, layer.bias), dim=-1)

    def project_text(self, text_embeds: Tensor) -> Tensor:
        """Compute the contrastive feature of text token 0: `[B, L, text_width]` → `[B, embed_dim]`.

        Features are L2-normalised.
        """
        self.require_head("contrastive")
        inputs.check_embeddings(text_embeds, self.config.text_width, "text embeddings")
        layer = self.text_proj
        return F.normalize(ops.linear(text_embeds[:, 0], layer.weight, layer.bias), dim=-1)

    def image_memory(self, image_embeds: Tensor, token_mask: Tensor | None = None) -> ImageMemory:
        """Compute keys and values of every fusion layer, once per image.

        Args:
            image_embeds: `[B, 1 + N, vision_width]` (or any number of tokens).
            token_mask: `[B, 1 + N]`, zero for tokens that texts must not attend to, such as patches
                outside a region.
        """
        self.require_encoder("fusion")
        inputs.check_embeddings(image_embeds, self.config.vision_width, "image embeddings")
        self._require_fusion_layers()
        if token_mask is not None:
            token_mask = inputs.check_token_mask(token_mask, image_embeds.shape[:2], "token_mask")
        return self.fusion_encoder.memory(image_embeds, token_mask)

    def packed_memory(
        self, tokens: Tensor, cu_keys: Tensor, longest: int, rows: Tensor | None = None
    ) -> PackedMemory:
        """Compute keys and values of image tokens `[K, vision_width]`, for groups with overlapping tokens.

        Each token is projected once. The other arguments are attributes of `PackedMemory`.
        """
        self._require_fusion_layers()
        return PackedMemory(self.fusion_encoder.project(tokens), cu_keys, longest, rows)

    def _require_fusion_layers(self) -> None:
        if not self.config.fusion_layers:
            raise UnavailableError(
                "fusion_layers=0: this model cannot fuse; use a configuration with fusion layers"
            )

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
            first_token_only: compute only token 0, which most heads read; the last layer is then
                nearly free.
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
        """Check the arguments of `fuse`; returns the boolean mask and the texts grouped by image."""
        if not isinstance(memory, ImageMemory):
            raise InputError(
                f"memory is a {type(memory).__name__}; give the result of image_memory"
            )
        inputs.check_embeddings(text_embeds, self.config.text_width, "text embeddings")
        texts = text_embeds.shape[0]
        mask = inputs.check_attention_mask(attention_mask, text_embeds.shape[:2])
        if image_index is not None:
            image_index = inputs.check_image_index(image_index, memory.images, texts, "texts")
            return mask, ImageGroups.from_index(image_index, memory.images, text_embeds.device)
        if texts != memory.images:
            raise InputError(
                f"{texts} texts and {memory.images} images do not pair up; pass image_index"
            )
        cu_texts = torch.arange(texts + 1, dtype=torch.int32, device=text_embeds.device)
        return mask, ImageGroups(cu_texts)

    def match_logits(self, fused: Tensor) -> Tensor:
        """Score fused embeddings `[P, L, text_width]`: `[P, 2]`, column 1 for "text describes image"."""
        self.require_head("matching")
        return self._on_first_token(self.itm_head, fused)

    def predict_boxes(self, fused: Tensor) -> Tensor:
        """Predict boxes (cx, cy, w, h) relative to the image: `[P, L, text_width]` → `[P, 4]`."""
        self.require_head("boxes")
        return self._on_first_token(self.bbox_head, fused).sigmoid()

    def mlm_logits(self, text_embeds: Tensor) -> Tensor:
        """Compute vocabulary logits of the language encoder: `[..., text_width]` → `[..., vocab_size]`."""
        self.require_head("mlm")
        return self.text_encoder.lm_head(text_embeds, self.text_encoder.word_embeddings)

    def imlm_logits(self, fused: Tensor) -> Tensor:
        """Compute vocabulary logits of the fusion encoder: `[..., text_width]` → `[..., vocab_size]`."""
        self.require_head("imlm")
        return self.fusion_encoder.lm_head(fused, self.fusion_encoder.word_embeddings)

    def _on_first_token(self, head: nn.Module, fused: Tensor) -> Tensor:
        inputs.check_embeddings(fused, self.config.text_width, "fused embeddings")
        return head(fused[:, 0])

    def _cast(self, pixels: Tensor) -> Tensor:
        return pixels if torch.is_autocast_enabled(pixels.device.type) else pixels.to(self.dtype)
