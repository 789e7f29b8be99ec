"""Image-memory re-ranking for third-party cross-encoders: ALBEF, X-VLM, X²-VLM, BLIP, BERT with cross-attention.

Scored pair by pair, the same image tokens are projected to keys and values for every text and layer, which is most of
the work. `Reranker` projects an image once, packs the texts without padding, treats all texts of an image as one query
sequence in cross-attention, and computes only token 0 of each text in the last layer.
"""

from __future__ import annotations

from collections.abc import Callable
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
from xfm_fast.replace.adapters import is_adapted
from xfm_fast.replace.attention import Memory, Packed
from xfm_fast.replace.official import (
    TEXT_LAYER,
    drops_paths,
    has_cross_attention,
    is_layer,
    why_not_plain,
)
from xfm_fast.replace.structure import post_norm
from xfm_fast.replace.swap import Settings, find, observed, original_class, why_not_bypassed


class Reranker:
    """Scores many texts against few images with a third-party cross-encoder; equal to scoring each pair separately.

    The text encoder is any module with one stack of BERT-shaped layers, of which the last ones or all have a
    `crossattention`: BertModel and RobertaModel of transformers built with `add_cross_attention`, its BlipTextModel,
    the text and fusion encoders of ALBEF, BLIP, X-VLM, X²-VLM and X-FM. It is not modified, and its parameters may
    continue to train. Self-attention is bidirectional, as in matching. `head` maps token 0 `[P, width]` to logits;
    `scores` requires it. `kernels` and `dtype` as in `accelerate`. Raises InputError for any other encoder.

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
        self._alone, self._fusing = self._layers[:first], self._layers[first:]
        self._crossing = [layer for layer in self._fusing if has_cross_attention(layer)]
        self._width = self._layers[0].attention.self.query.in_features
        self._image_width = self._crossing[0].crossattention.self.key.in_features

    def image_memory(self, image_embeds: Tensor, token_mask: Tensor | None = None) -> ImageMemory:
        """Project images `[B, M, image width]` for every cross-attention layer: `[B, M, 2, H, D]` each.

        `token_mask` `[B, M]` is non-zero for visible tokens; all by default.
        """
        check_embeddings(image_embeds, self._image_width, "image_embeds")
        if token_mask is not None:
            images, tokens = image_embeds.shape[:2]
            token_mask = check_token_mask(token_mask, (images, tokens), "token_mask")
        settings = self._settings
        with settings.own_types(image_embeds.device):
            layers = []
            for layer in self._crossing:
                projections = layer.crossattention.self
                key, value, heads = (
                    projections.key,
                    projections.value,
                    projections.num_attention_heads,
                )
                if is_adapted(key) or is_adapted(value):
                    both = torch.stack(
                        settings.products("kv", image_embeds, key, value), -2
                    ).unflatten(-1, (heads, -1))
                else:
                    weight = concatenated("kv weight", key.weight, value.weight)
                    bias = concatenated("kv bias", key.bias, value.bias)
                    both = settings.linear(image_embeds, weight, bias).unflatten(-1, (2, heads, -1))
                layers.append(both)
        return ImageMemory(tuple(layers), token_mask)

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Text states `[P, L, width]` before the first image layer, reusable for all images; zeros at padding."""
        packing = Packing.from_mask(_text_mask(attention_mask, input_ids))
        with self._settings.own_types(input_ids.device):
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
        """Token 0 of every text after the last layer, `[P, width]`.

        Texts are `input_ids` `[P, L]` or `text_embeds` `[P, L, width]`. `attention_mask` `[P, L]` is non-zero for real
        tokens, token 0 included; all by default. `image_index` `[P]` is the image of each text, optional with one.
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
        with settings.own_types(texts.device):
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
        """Matching scores `[P]`: the last logit of the head. Arguments as for `fused`."""
        if self.head is None:
            raise InputError(
                "scores come from a matching head; give Reranker(text_encoder, head=model.itm_head)"
            )
        fused = self.fused(memory, input_ids, attention_mask, image_index, text_embeds=text_embeds)
        own = next(self.head.parameters(), None) if isinstance(self.head, nn.Module) else None
        # The dtype of the head's parameters, unless autocast decides.
        logits = self.head(fused if own is None else fused.to(own.dtype))
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
        """Packed tokens `[T, width]` after the layers without cross-attention."""
        if self._embeddings is None:
            raise InputError("this text encoder has no embeddings; give the texts as text_embeds")
        x = packing.pack(self._embeddings(input_ids=input_ids))
        self._check_mode()
        attend = Packed.within(packing)
        for layer in self._alone:
            x = post_norm(TEXT_LAYER.parts(layer), x, attend, self._settings)
        return x

    def _fuse(
        self, x: Tensor, packing: Packing, memory: ImageMemory, groups: ImageGroups
    ) -> Tensor:
        """Packed tokens `[T, width]` → token 0 of each text `[P, width]`, in packed order."""
        self._check_mode()
        cu_keys, key_mask = memory.cu_keys, memory.key_mask
        projected = 0
        for layer in self._fusing:
            queries: Sequences = packing
            reads = None
            if layer is self._fusing[-1]:
                queries = Reads.first_tokens(packing)
                reads = queries.rows
            seen = cross = None
            if has_cross_attention(layer):
                # All texts of an image are one query sequence: cross-attention has no mask between queries.
                cu_queries = groups.token_offsets(queries.cu_seqlens)
                across = Packed(cu_queries, cu_keys, x.shape[0], memory.longest, key_mask)
                seen = Memory(memory.keys_values(projected), across, projected=True)
                projected, cross = projected + 1, TEXT_LAYER.cross_parts(layer)
            within = Packed(
                queries.cu_seqlens, packing.cu_seqlens, queries.longest, packing.longest
            )
            x = post_norm(TEXT_LAYER.parts(layer), x, within, self._settings, seen, cross, reads)
        return x


def _text_mask(mask: Tensor | None, texts: Tensor) -> Tensor:
    """The mask `[P, L]` of texts `[P, L]` or `[P, L, width]`; all tokens are real by default."""
    if texts.ndim != 2 and not texts.is_floating_point():
        raise InputError(f"input_ids are {[*texts.shape]}; texts must be [P, L]")
    if mask is None:
        return torch.ones(texts.shape[:2], dtype=torch.bool, device=texts.device)
    return check_attention_mask(mask, [*texts.shape[:2]])


def _stack(encoder: nn.Module) -> tuple[list[Any], nn.Module | None]:
    """The layers of a text encoder, and its embeddings if there are any."""
    name = original_class(encoder).__name__
    holders = [
        (path, part)
        for path, part in encoder.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) and all(is_layer(layer) for layer in part)
    ]
    if len(holders) != 1:
        found = ", ".join(path for path, _ in holders) or "none"
        raise InputError(
            f"{name} must hold one stack of BERT-shaped layers (attention, crossattention, intermediate, output), and "
            f"{found} was found; give the text encoder itself"
        )
    path, layers = holders[0]
    for number, layer in enumerate(layers):
        reason = why_not_plain(layer) or why_not_bypassed(
            layer, TEXT_LAYER.bypassed(original_class(layer))
        )
        if reason is None and observed(layer):
            reason = "it has hooks"
        if reason is not None:
            raise InputError(f"layer {path}.{number} cannot be re-ranked with: {reason}")
    # Layers are at `encoder.layer`; the embeddings are a sibling of `encoder`.
    *outer, _, _ = ["", *path.split(".")] if "." not in path else path.split(".")
    parent = find(encoder, ".".join(outer)) if outer else encoder
    return list(layers), None if parent is None or "." not in path else parent._modules.get(
        "embeddings"
    )
