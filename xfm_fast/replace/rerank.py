"""Image-memory re-ranking for third-party cross-encoders: ALBEF, X-VLM, X²-VLM, BLIP, BERT with cross-attention.

Scored pair by pair, the same image tokens are projected to keys and values for every text and
layer, which is most of the work. `Reranker` projects an image once, packs the texts without
padding, treats all texts of an image as one query sequence in cross-attention, and computes only
token 0 of each text in the last layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels.backend import Backend
from xfm_fast.models.fusion import ImageMemory
from xfm_fast.models.inputs import (
    check_attention_mask,
    check_embeddings,
    check_image_index,
    check_token_mask,
)
from xfm_fast.models.text import concatenated
from xfm_fast.packing import ImageGroups, Packing, Reads, Sequences
from xfm_fast.plans.orders import post_norm
from xfm_fast.replace.adapters import is_adapted
from xfm_fast.replace.attention import Memory, Packed
from xfm_fast.replace.official import (
    TEXT_LAYER,
    drops_paths,
    has_cross_attention,
    is_layer,
    why_unsupported,
)
from xfm_fast.replace.structure import LayerCall
from xfm_fast.replace.swap import Settings, observed, original_class, why_not_bypassed


class Reranker:
    """Scores many texts against few images with a third-party cross-encoder; equal to scoring each pair separately.

    The encoder is not modified, and its parameters may continue to train. Self-attention is
    bidirectional, as in matching.

    Args:
        text_encoder: Module with one stack of BERT-shaped layers, of which the last ones or all
            have a `crossattention`: BertModel and RobertaModel of transformers built with
            `add_cross_attention`, its BlipTextModel, the text and fusion encoders of ALBEF, BLIP,
            X-VLM, X²-VLM and X-FM.
        head: Maps token 0 `[P, width]` to logits; required by `scores`.
        kernels: Backend of the ops, as in `accelerate`.
        dtype: Compute dtype, as in `accelerate`.

    Raises:
        InputError: The encoder has no such stack, or no cross-attention.

    Example:
        >>> reranker = Reranker(model.text_encoder, head=model.itm_head)
        >>> memory = reranker.image_memory(model.visual_encoder(pixels))
        >>> scores = reranker.scores(memory, input_ids, attention_mask, image_index)
    """

    def __init__(
        self,
        text_encoder: nn.Module,
        head: Callable[[Tensor], Tensor] | None = None,
        *,
        kernels: Backend = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.head = head
        self._settings = Settings(kernels, dtype)
        self._layers, self._embeddings = _stack(text_encoder)
        crossing = [has_cross_attention(layer) for layer in self._layers]
        if not any(crossing):
            raise InputError(
                f"no layer of {original_class(text_encoder).__name__} has a crossattention, so it cannot match texts "
                "with images; build the model with cross-attention (add_cross_attention=True in transformers)"
            )
        first = crossing.index(True)
        self._text_only, self._fusing = self._layers[:first], self._layers[first:]
        self._crossing = [layer for layer in self._fusing if has_cross_attention(layer)]
        self._width = self._layers[0].attention.self.query.in_features
        self._image_width = self._crossing[0].crossattention.self.key.in_features

    def image_memory(self, image_embeds: Tensor, token_mask: Tensor | None = None) -> ImageMemory:
        """Project images to keys and values for every cross-attention layer: `[B, M, 2, H, D]` each.

        Args:
            image_embeds: `[B, M, image width]`.
            token_mask: `[B, M]`, non-zero for visible tokens; all by default.
        """
        check_embeddings(image_embeds, self._image_width, "image_embeds")
        if token_mask is not None:
            images, tokens = image_embeds.shape[:2]
            token_mask = check_token_mask(token_mask, (images, tokens), "token_mask")
        settings = self._settings
        with settings.without_autocast(image_embeds.device):
            layers = []
            for layer in self._crossing:
                attention = layer.crossattention.self
                key, value, heads = attention.key, attention.value, attention.num_attention_heads
                if is_adapted(key) or is_adapted(value):
                    projected = settings.linears("kv", image_embeds, key, value)
                    layers.append(torch.stack([*projected], -2).unflatten(-1, (heads, -1)))
                else:
                    weight = concatenated("kv weight", key.weight, value.weight)
                    bias = concatenated("kv bias", key.bias, value.bias)
                    out = settings.linear(image_embeds, weight, bias)
                    layers.append(out.unflatten(-1, (2, heads, -1)))
        return ImageMemory(tuple(layers), token_mask)

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute the layers before cross-attention, whose output `[P, L, width]` serves all images; zeros at padding.

        Args:
            input_ids: `[P, L]`.
            attention_mask: `[P, L]`, non-zero for real tokens; all by default.
        """
        packing = Packing.from_mask(_text_mask(attention_mask, input_ids))
        with self._settings.without_autocast(input_ids.device):
            return packing.unpad(self._embedded(input_ids, packing))

    def fused(
        self,
        memory: ImageMemory,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        *,
        text_embeds: Tensor | None = None,
    ) -> Tensor:
        """Compute token 0 of every text after the last layer: `[P, width]`.

        Args:
            memory: Images from `image_memory`.
            input_ids: Texts `[P, L]`.
            attention_mask: `[P, L]`, non-zero for real tokens, token 0 included; all by default.
            image_index: `[P]`, the image of each text; optional with one image.
            text_embeds: `[P, L, width]` from `text_embeds`, in place of `input_ids`.

        Raises:
            InputError: Both or none of the texts are given, or shapes or indices do not fit.
        """
        if (input_ids is None) == (text_embeds is None):
            raise InputError("texts are given as input_ids or as text_embeds: give one of them")
        if text_embeds is not None:
            check_embeddings(text_embeds, self._width, "text_embeds")
        texts = input_ids if text_embeds is None else text_embeds
        assert texts is not None
        mask = _text_mask(attention_mask, texts)
        if image_index is not None:
            index = check_image_index(image_index, memory.images, len(texts), "texts")
        elif memory.images == 1:
            index = torch.zeros(len(texts), dtype=torch.long, device=texts.device)
        else:
            raise InputError(
                f"image_index is needed: the memory holds {memory.images} images for {len(texts)} texts"
            )
        if not len(texts):
            return memory.layers[0].new_zeros(0, self._width)
        groups = ImageGroups.from_index(index, memory.images)
        packing = Packing.from_mask(mask, order=groups.order)
        settings = self._settings
        with settings.without_autocast(texts.device):
            if text_embeds is None:
                assert input_ids is not None
                tokens = self._embedded(input_ids, packing)
            else:
                tokens = packing.pack(text_embeds)
            return packing.restore(self._fuse(tokens, packing, memory, groups))

    def scores(
        self,
        memory: ImageMemory,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        *,
        text_embeds: Tensor | None = None,
    ) -> Tensor:
        """Compute matching scores `[P]`, the last logit of the head. Arguments as for `fused`."""
        if self.head is None:
            raise InputError(
                "scores come from a matching head; give Reranker(text_encoder, head=model.itm_head)"
            )
        fused = self.fused(memory, input_ids, attention_mask, image_index, text_embeds=text_embeds)
        parameter = next(self.head.parameters(), None) if isinstance(self.head, nn.Module) else None
        # The dtype of the head's parameters, unless autocast decides.
        logits = self.head(fused if parameter is None else fused.to(parameter.dtype))
        if logits.ndim != 2 or logits.shape[1] not in (1, 2):
            raise InputError(
                f"the head gave {[*logits.shape]}; a matching head gives [P, 2] or [P, 1]"
            )
        return logits[:, -1]

    def _check_mode(self) -> None:
        if any(drops_paths(layer) for layer in self._layers):
            raise InputError(
                "the text encoder is training with stochastic depth; call eval() on it to re-rank"
            )

    def _embedded(self, input_ids: Tensor, packing: Packing) -> Tensor:
        """Run the layers without cross-attention on packed tokens: `[T, width]`."""
        if self._embeddings is None:
            raise InputError("this text encoder has no embeddings; give the texts as text_embeds")
        x = packing.pack(self._embeddings(input_ids=input_ids))
        self._check_mode()
        attend = Packed.within(packing)
        for layer in self._text_only:
            call = LayerCall(TEXT_LAYER.modules(layer), attend, self._settings, wide=True)
            x = post_norm(call, x)
        return x

    def _fuse(
        self, x: Tensor, packing: Packing, memory: ImageMemory, groups: ImageGroups
    ) -> Tensor:
        """Map packed tokens `[T, width]` to token 0 of each text `[P, width]`, in packed order."""
        self._check_mode()
        cu_keys, key_mask = memory.cu_keys, memory.key_mask
        projected = 0
        for layer in self._fusing:
            queries: Sequences = packing
            rows = None
            if layer is self._fusing[-1]:
                queries = Reads.first_tokens(packing)
                rows = queries.rows
            cu_queries = queries.cu_seqlens
            within = Packed(cu_queries, packing.cu_seqlens, queries.longest, packing.longest)
            modules = TEXT_LAYER.modules(layer)
            call = LayerCall(modules, within, self._settings, wide=True, rows=rows)
            cross_attention = None
            if has_cross_attention(layer):
                # All texts of an image are one query sequence: cross-attention has no mask between
                # queries.
                cu_queries = groups.token_offsets(cu_queries)
                across = Packed(cu_queries, cu_keys, x.shape[0], memory.longest, key_mask)
                image = Memory(memory.keys_values(projected), across, projected=True)
                cross = TEXT_LAYER.cross_attention(layer)
                cross_attention = partial(call.cross_attention, cross, image)
                projected += 1
            x = post_norm(call, x, cross_attention, rows)
        return x


def _text_mask(mask: Tensor | None, texts: Tensor) -> Tensor:
    """Return the mask `[P, L]` of texts; all tokens are real by default."""
    if texts.ndim != 2 and not texts.is_floating_point():
        raise InputError(f"input_ids are {[*texts.shape]}; texts must be [P, L]")
    if mask is None:
        return torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device)
    return check_attention_mask(mask, [*texts.shape[:2]])


def _stack(encoder: nn.Module) -> tuple[list[Any], nn.Module | None]:
    """Return the layers of a text encoder, and its embeddings or None."""
    name = original_class(encoder).__name__
    stacks = {
        path: module
        for path, module in encoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(is_layer, module))
    }
    if len(stacks) != 1:
        raise InputError(
            f"{name} must hold one stack of BERT-shaped layers (attention, crossattention, intermediate, output), and "
            f"{', '.join(stacks) or 'none'} was found; give the text encoder itself"
        )
    ((path, layers),) = stacks.items()
    for index, layer in enumerate(layers):
        bypassed = TEXT_LAYER.bypassed(original_class(layer))
        reason = why_unsupported(layer) or why_not_bypassed(layer, bypassed)
        if reason is None and observed(layer):
            reason = "it has hooks"
        if reason is not None:
            raise InputError(f"layer {path}.{index} cannot be re-ranked with: {reason}")
    # Embeddings are next to the module that holds the layers, such as `embeddings` and
    # `encoder.layer`.
    *outer, _, _ = ["", "", *path.split(".")]
    parent = encoder.get_submodule(".".join(filter(None, outer)))
    return list(layers), parent._modules.get("embeddings") if "." in path else None
