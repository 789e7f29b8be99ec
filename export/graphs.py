"""The exported graphs: the model cut into parts that a server composes, in shapes that compilers handle well.

`vision`, `text`, `image_memory` and `fusion` let a server reuse work: an image is encoded and projected once, and every
further caption costs the fusion encoder only. `match` is the whole model from pixels and ids to a score.

A fine-tuned model has further graphs: heads are outputs of the graph that computes their input, `nlvr2` is the fusion
encoder over a pair of images with its head, `decoder_memory` projects the decoder's states once, and `decoder_step`
writes one token of every text.

The graphs compute the results of `XFM` with its parameters, padded instead of packed, because engines plan for shapes.
Padding is masked with a finite value, so that a row without any real token stays finite.

Packed `text` and `fusion` take captions side by side in rows of one length; a block mask keeps captions separate, and
only the ends of rows are padding.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels.reference import relative_position_index
from xfm_fast.models.decoder import TextDecoder
from xfm_fast.models.frozen import is_frozen
from xfm_fast.models.text import LayerStack, ResidualNorm, TransformerLayer
from xfm_fast.models.vision import Block
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.captioning import CaptioningModel
from xfm_fast.tasks.classification import ClassificationModel, Modality
from xfm_fast.tasks.nlvr2 import NLVR2Model
from xfm_fast.tasks.vqa import VQAModel

from .request import ALL_GRAPHS, DEFAULT_GRAPHS, GraphName

M = TypeVar("M", bound=nn.Module)

_MASKED = -10000.0


@dataclass(frozen=True)
class Axis:
    """A dimension whose size is known at run time."""

    name: str
    least: int = 1


BATCH, TEXTS, LENGTH, PAST = Axis("batch"), Axis("texts"), Axis("length"), Axis("past")
ROWS = Axis("rows")
LONGEST_ROW = 512
"""Tokens of a packed row; positions restart with every caption, so the model's positions do not bound it."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and dimensions of an input or output; a dimension is a number or an `Axis`."""

    name: str
    dtype: Literal["compute", "int64"]
    dims: tuple[int | Axis, ...]

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The dimensions as numbers, given the sizes of the axes by name."""
        return tuple(sizes[dim.name] if isinstance(dim, Axis) else dim for dim in self.dims)

    @property
    def axes(self) -> dict[int, Axis]:
        """Position → axis of the dynamic dimensions."""
        return {place: dim for place, dim in enumerate(self.dims) if isinstance(dim, Axis)}


AttentionForm = Literal["opset23", "primitives"]
"""Attention in a graph: the node `Attention` of opset 23, or two GEMMs and a softmax.

Text self-attention uses primitives in both forms, see `_SelfAttention`.
"""


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, form: AttentionForm) -> Tensor:
    """softmax(q kᵀ / √D + bias) v; q `[B, H, N, D]`, k and v `[B, H, M, D]`, bias broadcast to `[B, H, N, M]`."""
    if not torch.onnx.is_in_onnx_export():
        return F.scaled_dot_product_attention(q, k, v, bias)
    scale = q.shape[-1] ** -0.5
    if form == "primitives":
        scores = torch.matmul(q * scale, k.transpose(-1, -2))
        return torch.matmul((scores if bias is None else scores + bias).softmax(-1), v)
    if bias is not None:
        # ONNX Runtime's CPU kernel broadcasts the heads of a mask, and neither its batch nor its queries.
        bias = bias.expand(q.shape[0], -1, q.shape[2], k.shape[2]) if bias.shape[-2] == 1 else bias
    return torch.onnx.ops.attention(q, k, v, bias, scale=scale)[0]


class Graph(nn.Module):
    """A part of the model with named inputs and outputs, in the order of `forward`'s arguments and results."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    form: AttentionForm
    gathered: int = 0
    """How many of the last inputs are the tuple `*memory` of `forward`."""

    def own_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes of the axes that this graph has."""
        axes = {axis.name for spec in self.inputs for axis in spec.axes.values()}
        return {axis: size for axis, size in sizes.items() if axis in axes}


class _Joined(nn.Module):
    """Linear layers of one input as one GEMM, joined on construction: exporters fold only small constants."""

    def __init__(self, *parts: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        # Buffers, because the parameters of a graph are the model's own.
        self.register_buffer("weight", torch.cat([part.weight.detach() for part in parts]), persistent=False)
        self.register_buffer("bias", torch.cat([part.bias.detach() for part in parts]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class VisionGraph(Graph):
    """Pixels to image embeddings and the contrastive feature."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__()
        config = model.config
        self.pools = config.local_attn_depth <= 0
        self.encoder, self.form = model.vision_encoder, form
        self.projection = model.vision_proj if "contrastive" in model.heads else None
        self.class_head = _class_head(model, "image")
        self.reads_mean = isinstance(model, ClassificationModel) and model.head == "official_image"
        size, tokens = config.image_size, config.num_image_tokens
        # Gathered on construction, as in `_Joined`: otherwise every layer gathers in every inference.
        index = relative_position_index((config.grid, config.grid)).flatten()
        for number, block in enumerate(self.encoder.blocks):
            assert isinstance(block, Block)
            table = block.attn.relative_position_bias_table.detach()
            bias = table.t()[:, index.to(table.device)].view(1, block.attn.heads, tokens, tokens)
            # Half precision is finest near 0, and softmax ignores a constant of a row.
            bias = bias - bias.amax(-1, keepdim=True)
            self.register_buffer(f"position_bias_{number}", bias, persistent=False)
        self.inputs = (TensorSpec("pixels", "compute", (BATCH, 3, size, size)),)
        self.outputs = (TensorSpec("image_embeds", "compute", (BATCH, tokens, config.vision_width)),)
        if self.projection is not None:
            self.outputs += (TensorSpec("image_feature", "compute", (BATCH, config.embed_dim)),)
        self.outputs += _class_spec(model, "image", BATCH)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """`[B, 3, R, R]` → `[B, 1 + N, vision_width]`, `[B, embed_dim]`, `[B, classes]`."""
        encoder = self.encoder
        convolution = encoder.patch_embed.proj
        patches = F.conv2d(pixels, convolution.weight, convolution.bias, stride=convolution.stride)
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([encoder.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for number, block in enumerate(encoder.blocks):
            assert isinstance(block, Block)
            x = self._block(block, x, self.get_buffer(f"position_bias_{number}"))
        if self.pools:
            x = _norm(encoder.fc_norm, x[:, 1:])
            x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        else:
            x = _norm(encoder.fc_norm, x)
        results = _with_feature(x, self.projection, x[:, 0])
        if self.class_head is None:
            return results
        read = torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=-1) if self.reads_mean else x[:, 0]
        return (*results, _head(self.class_head, read))

    def _block(self, block: Block, x: Tensor, position: Tensor) -> Tensor:
        parts = block.attn
        bias = torch.cat([parts.q_bias, torch.zeros_like(parts.q_bias), parts.v_bias])
        qkv = F.linear(_norm(block.norm1, x), parts.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, parts.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        context = attention(q, k, v, position, self.form).transpose(1, 2).flatten(2)
        x = x + block.gamma_1 * parts.proj(context)
        hidden = F.gelu(block.mlp.fc1(_norm(block.norm2, x)))
        return x + block.gamma_2 * block.mlp.fc2(hidden)


class TextGraph(Graph):
    """Token ids to text embeddings and the contrastive feature; padded positions hold arbitrary values."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__()
        config = model.config
        self.encoder, self.form = model.text_encoder.roberta, form
        self.projection = model.text_proj if "contrastive" in model.heads else None
        self.class_head = _class_head(model, "text")
        self.attentions = nn.ModuleList(_SelfAttention(layer) for layer in _layers(self.encoder.encoder))
        self.inputs = (
            TensorSpec("input_ids", "int64", (BATCH, LENGTH)),
            TensorSpec("attention_mask", "int64", (BATCH, LENGTH)),
        )
        self.outputs = (TensorSpec("text_embeds", "compute", (BATCH, LENGTH, config.text_width)),)
        if self.projection is not None:
            self.outputs += (TensorSpec("text_feature", "compute", (BATCH, config.embed_dim)),)
        self.outputs += _class_spec(model, "text", BATCH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """`[B, L]` ids and mask → `[B, L, text_width]`, `[B, embed_dim]`, `[B, classes]`."""
        embeddings = self.encoder.embeddings
        mask = _additive(attention_mask, embeddings.word_embeddings.weight.dtype)
        x = self.encode(input_ids, embeddings.position_ids(input_ids), mask)
        return self.with_heads(x, x[:, 0])

    def encode(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """`[R, L]` ids and positions, and the additive attention mask → `[R, L, text_width]`."""
        embeddings = self.encoder.embeddings
        x = F.embedding(ids, embeddings.word_embeddings.weight)
        x = x + F.embedding(positions, embeddings.position_embeddings.weight)
        x = _norm(embeddings.LayerNorm, x + embeddings.token_type_embeddings.weight[0])
        for attend, layer in zip(self.attentions, _layers(self.encoder.encoder), strict=True):
            x = _feed_forward(layer, attend(x, mask))
        return x

    def with_heads(self, embeds: Tensor, first: Tensor) -> tuple[Tensor, ...]:
        """Embeddings, and the heads' outputs for token 0 of every caption, `[B, text_width]`."""
        results = _with_feature(embeds, self.projection, first)
        return results if self.class_head is None else (*results, _head(self.class_head, first))


class PackedTextGraph(TextGraph):
    """The text graph on packed rows."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__(model, form)
        self.inputs = (
            TensorSpec("packed_ids", "int64", (ROWS, LENGTH)),
            TensorSpec("positions", "int64", (ROWS, LENGTH)),
            # Number of the caption of a token, from 1; 0 for padding.
            TensorSpec("segments", "int64", (ROWS, LENGTH)),
            # Row of every caption, and position of its token 0 in it.
            TensorSpec("firsts", "int64", (BATCH, 2)),
        )
        embeds = TensorSpec("packed_embeds", "compute", (ROWS, LENGTH, model.config.text_width))
        self.outputs = (embeds, *self.outputs[1:])

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a graph is called by the names of its inputs
        self, packed_ids: Tensor, positions: Tensor, segments: Tensor, firsts: Tensor
    ) -> tuple[Tensor, ...]:
        """R rows of L tokens with B captions → `[R, L, text_width]`, `[B, embed_dim]`, `[B, classes]`."""
        mask = _between(segments, segments, self.encoder.embeddings.word_embeddings.weight.dtype)
        x = self.encode(packed_ids, positions, mask)
        places = firsts[:, 0] * packed_ids.shape[1] + firsts[:, 1]
        return self.with_heads(x, x.flatten(0, 1).index_select(0, places))


class _MemoryGraph(Graph):
    """States to the keys and values of every layer, as separate tensors so that the reading graph copies none."""

    def __init__(self, stack: LayerStack) -> None:
        super().__init__()
        # Only the projections: the file then holds only their weights.
        attentions = [layer.crossattention.self for layer in _layers(stack)]
        self.heads = attentions[0].heads
        self.parts = nn.ModuleList(part for parts in attentions for part in (parts.key, parts.value))
        self.projections = _Joined(*(part for parts in attentions for part in (parts.key, parts.value)))

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        """`[B, M, width]` → keys and values of layer 0, of layer 1, ...: `[B, H, M, D]` each."""
        projected = self.projections(states).unflatten(-1, (len(self.parts), self.heads, -1))
        return tuple(projected[:, :, number].transpose(1, 2).contiguous() for number in range(len(self.parts)))


class ImageMemoryGraph(_MemoryGraph):
    """Image embeddings to the keys and values of every fusion layer."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        _require_fusion(model)
        super().__init__(model.fusion_encoder.roberta.encoder)
        dims = (BATCH, model.config.num_image_tokens, model.config.vision_width)
        self.inputs = (TensorSpec("image_embeds", "compute", dims),)
        self.outputs = _memory_specs(model, BATCH)


class FusionGraph(Graph):
    """T captions on each of B memories to fused embeddings and head outputs; captions form one long query sequence."""

    def __init__(self, model: XFM, form: AttentionForm, *, all_tokens: bool = False) -> None:
        super().__init__()
        config = model.config
        _require_fusion(model)
        self.stack, self.form, self.all_tokens = model.fusion_encoder.roberta.encoder, form, all_tokens
        last = len(self.stack) - 1
        self.attentions = nn.ModuleList(
            _SelfAttention(layer, first_only=number == last and not all_tokens)
            for number, layer in enumerate(_layers(self.stack))
        )
        self.match_head = model.itm_head if "matching" in model.heads else None
        self.box_head = model.bbox_head if "boxes" in model.heads else None
        self.class_head = _class_head(model, "pair")
        self.inputs = (
            TensorSpec("text_embeds", "compute", (BATCH, TEXTS, LENGTH, config.text_width)),
            TensorSpec("attention_mask", "int64", (BATCH, TEXTS, LENGTH)),
            *_memory_specs(model, BATCH),
        )
        self.gathered = 2 * config.fusion_layers
        fused = (BATCH, TEXTS, LENGTH, config.text_width) if all_tokens else (BATCH, TEXTS, config.text_width)
        self.outputs = (TensorSpec("fused", "compute", fused),)
        if self.match_head is not None:
            self.outputs += (TensorSpec("match_logits", "compute", (BATCH, TEXTS, 2)),)
        if self.box_head is not None:
            self.outputs += (TensorSpec("boxes", "compute", (BATCH, TEXTS, 4)),)
        self.outputs += _class_spec(model, "pair", BATCH, TEXTS)

    def forward(self, text_embeds: Tensor, attention_mask: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        """`[B, T, L, width]`, `[B, T, L]`, keys and values `[B, H, M, D]` of every layer → token 0 (or all), heads."""
        fused = self.fuse(text_embeds, attention_mask, memory)
        return self.with_heads(fused, fused[:, :, 0] if self.all_tokens else fused)

    def with_heads(self, fused: Tensor, first: Tensor) -> tuple[Tensor, ...]:
        """Fused captions, and the heads' outputs for token 0 of each, `[B, T, width]`."""
        results = (fused,)
        if self.match_head is not None:
            results += (self.match_logits(first),)
        if self.box_head is not None:
            results += (_head(self.box_head, first).sigmoid(),)
        if self.class_head is not None:
            results += (_head(self.class_head, first),)
        return results

    def match_logits(self, first: Tensor) -> Tensor:
        """Token 0 of every text, `[..., width]` → `[..., 2]`."""
        assert self.match_head is not None
        return _head(self.match_head, first)

    def fuse(self, text_embeds: Tensor, attention_mask: Tensor, memory: Sequence[Tensor]) -> Tensor:
        """The first result of `forward`."""
        batch, texts, length, width = text_embeds.shape
        x = text_embeds.reshape(batch * texts, length, width)
        mask = _additive(attention_mask.reshape(batch * texts, length), x.dtype)
        x = self.layers(x, mask, memory, batch)
        if not self.all_tokens:
            return x.reshape(batch, texts, width)
        return x.reshape(batch, texts, length, width)

    def layers(
        self,
        x: Tensor,
        mask: Tensor,
        memory: Sequence[Tensor],
        memories: int,
        *,
        self_attended: bool = False,
        last: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The encoder on `[P, L, width]`; `last` gives tokens, mask and queries of the last layer (default token 0)."""
        for number, (attend, layer) in enumerate(zip(self.attentions, _layers(self.stack), strict=True)):
            if last is not None and number == len(self.stack) - 1:
                x = attend(*last(x))
            elif number or not self_attended:
                x = attend(x, mask)
            x = _cross(layer, x, memory[2 * number], memory[2 * number + 1], None, memories, self.form)
            x = _feed_forward(layer, x)
        return x


class PackedFusionGraph(FusionGraph):
    """The fusion graph on packed rows, R rows on each of B memories."""

    def __init__(self, model: XFM, form: AttentionForm, *, all_tokens: bool = False) -> None:
        super().__init__(model, form, all_tokens=all_tokens)
        rows = (BATCH, ROWS, LENGTH)
        embeds, fused = ((*rows, model.config.text_width), (BATCH, TEXTS, model.config.text_width))
        self.inputs = (
            TensorSpec("packed_embeds", "compute", embeds),
            # As in `PackedTextGraph`; numbers are unique over the rows of an image.
            TensorSpec("segments", "int64", rows),
            TensorSpec("firsts", "int64", (BATCH, TEXTS, 2)),
            *self.inputs[2:],
        )
        every = (TensorSpec("fused_tokens", "compute", embeds),) if all_tokens else ()
        self.outputs = (TensorSpec("fused", "compute", fused), *self.outputs[1:], *every)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a graph is called by the names of its inputs
        self, packed_embeds: Tensor, segments: Tensor, firsts: Tensor, *memory: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Token 0 of every caption `[B, T, width]`, `[B, T, 2]`, `[B, T, 4]`, classes; last all tokens as packed."""
        batch, rows, length, width = packed_embeds.shape
        texts, tokens = firsts.shape[1], rows * length
        x, numbers = packed_embeds.flatten(0, 1), segments.flatten(0, 1)
        places = firsts[..., 0] * length + firsts[..., 1]
        places = (places + torch.arange(batch, device=places.device)[:, None] * tokens).flatten()

        def chosen(x: Tensor) -> Tensor:
            return x.reshape(batch * tokens, width).index_select(0, places).reshape(batch, texts, width)

        def last(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # All rows of an image form one sequence, because rows differ in their number of captions.
            every, own = segments.reshape(batch, tokens), segments.flatten().index_select(0, places)
            mask = _between(own.reshape(batch, texts), every, x.dtype)
            return x.reshape(batch, tokens, width), mask, chosen(x)

        mask = _between(numbers, numbers, x.dtype)
        x = self.layers(x, mask, memory, batch, last=None if self.all_tokens else last)
        if not self.all_tokens:
            return self.with_heads(x, x)
        first = chosen(x)
        return (*self.with_heads(first, first), x.reshape(batch, rows, length, width))


class MatchGraph(Graph):
    """Pixels and ids to match scores: the whole model in one file."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__()
        config = model.config
        self.vision, self.text = VisionGraph(model, form), TextGraph(model, form)
        self.memory, self.fusion = ImageMemoryGraph(model, form), FusionGraph(model, form)
        self.inputs = (
            TensorSpec("pixels", "compute", (BATCH, 3, config.image_size, config.image_size)),
            TensorSpec("input_ids", "int64", (BATCH, TEXTS, LENGTH)),
            TensorSpec("attention_mask", "int64", (BATCH, TEXTS, LENGTH)),
        )
        self.outputs = (TensorSpec("scores", "compute", (BATCH, TEXTS)),)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """`[B, 3, R, R]`, `[B, T, L]` ids and mask → `[B, T]`: the logit of "text describes image"."""
        memory = self.memory(self.vision(pixels)[0])
        batch, texts, length = input_ids.shape
        rows = (batch * texts, length)
        embeds = self.text(input_ids.reshape(rows), attention_mask.reshape(rows))[0]
        fused = self.fusion.fuse(embeds.reshape(batch, texts, length, -1), attention_mask, memory)
        return (self.fusion.match_logits(fused)[..., 1],)


class NLVR2Graph(Graph):
    """A sentence fused with each of two images, and the head on both: logits of "false" and "true"."""

    def __init__(self, model: NLVR2Model, form: AttentionForm) -> None:
        super().__init__()
        config = model.config
        self.fusion, self.form = FusionGraph(model, form), form
        self.class_head = model.cls_head
        self.inputs = (
            TensorSpec("text_embeds", "compute", (BATCH, LENGTH, config.text_width)),
            TensorSpec("attention_mask", "int64", (BATCH, LENGTH)),
            *_memory_specs(model, BATCH, 2),
        )
        self.gathered = 2 * config.fusion_layers
        self.outputs = (TensorSpec("class_logits", "compute", (BATCH, 2)),)

    def forward(self, text_embeds: Tensor, attention_mask: Tensor, *memory: Tensor) -> tuple[Tensor]:
        """`[B, L, width]`, `[B, L]`, keys and values `[B, 2, H, M, D]` of both images, layer by layer → `[B, 2]`."""
        mask = _additive(attention_mask, text_embeds.dtype)
        # The self-attention of layer 0 reads no image and is computed once for both.
        x = self.fusion.attentions[0](text_embeds, mask)
        x, mask = (each.repeat_interleave(2, dim=0) for each in (x, mask))
        both = [part.flatten(0, 1) for part in memory]
        first = self.fusion.layers(x, mask, both, x.shape[0], self_attended=True)
        return (_head(self.class_head, first.reshape(text_embeds.shape[0], -1)),)


class DecoderMemoryGraph(_MemoryGraph):
    """The states that a decoder reads to the keys and values of its layers."""

    def __init__(self, model: VQAModel | CaptioningModel, form: AttentionForm) -> None:
        super().__init__(model.text_decoder.roberta.encoder)
        width = model.config.text_width if isinstance(model, VQAModel) else model.config.vision_width
        self.inputs = (TensorSpec("states", "compute", (BATCH, _states_axis(model), width)),)
        self.outputs = _decoder_memory_specs(model)


class DecoderStepGraph(Graph):
    """One more token of T texts for each of B states; before the first token the past is one masked token."""

    def __init__(self, model: VQAModel | CaptioningModel, form: AttentionForm) -> None:
        super().__init__()
        config = model.config
        self.decoder: TextDecoder = model.text_decoder
        self.heads = config.text_heads
        layers = _layers(self.decoder.roberta.encoder)
        self.products = nn.ModuleList(
            _Joined(parts.query, parts.key, parts.value) for parts in (layer.attention.self for layer in layers)
        )
        cached = (len(layers), 2, config.text_heads)
        size, masked = config.text_width // config.text_heads, isinstance(model, VQAModel)
        memory = _decoder_memory_specs(model)
        self.gathered, self.has_mask = len(memory) + masked, masked
        self.inputs = (
            TensorSpec("token_ids", "int64", (BATCH, TEXTS)),
            TensorSpec("past", "compute", (BATCH, TEXTS, *cached, PAST, size)),
            # Zero for tokens that do not exist.
            TensorSpec("past_mask", "int64", (BATCH, TEXTS, PAST)),
            *memory,
        )
        if masked:
            self.inputs += (TensorSpec("memory_mask", "int64", (BATCH, LENGTH)),)
        self.outputs = (
            TensorSpec("logits", "compute", (BATCH, TEXTS, config.vocab_size)),
            TensorSpec("present", "compute", (BATCH, TEXTS, *cached, size)),
        )

    def forward(self, token_ids: Tensor, past: Tensor, past_mask: Tensor, *memory: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, T, vocabulary]`, and keys and values of the token `[B, T, layers, 2, H, D]`."""
        batch, texts = token_ids.shape
        rows = batch * texts
        embeddings, head = self.decoder.roberta.embeddings, self.decoder.lm_head
        words = embeddings.word_embeddings.weight
        mask = past_mask.reshape(rows, -1)
        positions = mask.sum(1) + embeddings.pad_token_id + 1
        x = F.embedding(token_ids.reshape(rows), words) + F.embedding(positions, embeddings.position_embeddings.weight)
        x = _norm(embeddings.LayerNorm, x + embeddings.token_type_embeddings.weight[0])[:, None]
        hidden = _additive(F.pad(mask, (0, 1), value=1), x.dtype)
        memory_mask = _additive(memory[-1], x.dtype) if self.has_mask else None
        past = past.flatten(0, 1)
        present = []
        for number, (product, layer) in enumerate(
            zip(self.products, _layers(self.decoder.roberta.encoder), strict=True)
        ):
            q, k, v = product(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            keys, values = (torch.cat([past[:, number, place], new], dim=2) for place, new in enumerate((k, v)))
            present += [k[:, :, 0], v[:, :, 0]]
            # TensorRT for RTX 1.7 builds no attention of one query over a past of any length.
            context = attention(q, keys, values, hidden, "primitives").transpose(1, 2).flatten(2)
            x = _residual_norm(layer.attention.output, context, x)
            x = _cross(layer, x, memory[2 * number], memory[2 * number + 1], memory_mask, batch, "primitives")
            x = _feed_forward(layer, x)
        transformed = _norm(head.layer_norm, F.gelu(head.dense(x)))
        logits = F.linear(transformed, words, head.bias).reshape(batch, texts, -1)
        known = torch.stack(present, dim=1)
        return logits, known.reshape(batch, texts, -1, 2, self.heads, known.shape[-1])


def default_graphs(model: XFM) -> tuple[GraphName, ...]:
    """The default graphs of a model: all but `match` of a pretrained one, those of the task of a fine-tuned one."""
    if isinstance(model, NLVR2Model):
        return ("vision", "text", "image_memory", "nlvr2")
    if isinstance(model, VQAModel):
        return (*DEFAULT_GRAPHS, "decoder_memory", "decoder_step")
    if isinstance(model, CaptioningModel):
        return ("vision", "decoder_memory", "decoder_step")
    if isinstance(model, ClassificationModel) and model.modality != "pair":
        return ("vision",) if model.modality == "image" else ("text",)
    return DEFAULT_GRAPHS


def needs_all_tokens(model: XFM, asked: bool) -> bool:
    """Whether `fusion` returns every token: on request, or because a decoder reads them."""
    return asked or isinstance(model, VQAModel)


def build(name: GraphName, model: XFM, form: AttentionForm, *, all_tokens: bool = False, packed: bool = False) -> Graph:
    """One graph in evaluation mode that shares the model's parameters; its outputs follow the model's heads."""
    if name not in ALL_GRAPHS:
        raise UnavailableError(f"graph {name!r} is unknown; choose from {', '.join(ALL_GRAPHS)}")
    if is_frozen(model):
        raise InputError("the model is frozen for inference, and a graph holds its weights; call unfreeze() first")
    if name == "match" and "matching" not in model.heads:
        raise UnavailableError(
            "graph 'match' needs the 'matching' head, which this model was built without (it has: "
            f"{', '.join(model.heads) or 'none'}); load it with heads=(..., 'matching')"
        )
    if name == "nlvr2":
        if not isinstance(model, NLVR2Model):
            raise UnavailableError("graph 'nlvr2' needs the head over two images, which a run of the task nlvr2 has")
        return NLVR2Graph(model, form).eval()
    if name in ("decoder_memory", "decoder_step"):
        if not isinstance(model, VQAModel | CaptioningModel):
            raise UnavailableError(f"graph {name!r} needs a decoder, which runs of the tasks vqa and captioning have")
        return (DecoderMemoryGraph if name == "decoder_memory" else DecoderStepGraph)(model, form).eval()
    encoders = {"vision": ("vision",), "text": ("text",), "image_memory": ("fusion",), "fusion": ("fusion",)}
    for encoder in encoders.get(name, ("vision", "text", "fusion")):
        if not hasattr(model, f"{encoder}_encoder"):
            raise UnavailableError(
                f"graph {name!r} needs the {encoder} encoder, which this model was built without; "
                f"build it with encoders=(..., {encoder!r})"
            )
    if name == "fusion":
        return (PackedFusionGraph if packed else FusionGraph)(model, form, all_tokens=all_tokens).eval()
    text = PackedTextGraph if packed else TextGraph
    kinds = {"vision": VisionGraph, "text": text, "image_memory": ImageMemoryGraph, "match": MatchGraph}
    return kinds[name](model, form).eval()


def _require_fusion(model: XFM) -> None:
    if not model.config.fusion_layers:
        raise UnavailableError("this model has no fusion layers (fusion_layers=0); export vision and text alone")


def _memory_specs(model: XFM, *axes: Axis | int) -> tuple[TensorSpec, ...]:
    config = model.config
    dims = (*axes, config.text_heads, config.num_image_tokens, config.text_width // config.text_heads)
    return tuple(TensorSpec(name, "compute", dims) for name in memory_names(config.fusion_layers))


def is_memory(name: str) -> bool:
    """Whether a tensor is the keys or values of a fusion layer."""
    return name.startswith(("memory_keys_", "memory_values_"))


def memory_names(layers: int, owner: str = "memory") -> list[str]:
    """Names of the keys and values of layers, in the order of graph inputs and outputs."""
    return [f"{owner}_{kind}_{number}" for number in range(layers) for kind in ("keys", "values")]


def _decoder_memory_specs(model: VQAModel | CaptioningModel) -> tuple[TensorSpec, ...]:
    config, layers = model.config, len(model.text_decoder.roberta.encoder)
    dims = (BATCH, config.text_heads, _states_axis(model), config.text_width // config.text_heads)
    return tuple(TensorSpec(name, "compute", dims) for name in memory_names(layers, "decoder"))


def _states_axis(model: VQAModel | CaptioningModel) -> Axis | int:
    """Tokens of a state: dynamic for questions, constant for images."""
    return LENGTH if isinstance(model, VQAModel) else model.config.num_image_tokens


def _class_head(model: XFM, modality: Modality) -> nn.Module | None:
    """The head of a classifier of a modality."""
    return model.cls_head if isinstance(model, ClassificationModel) and model.modality == modality else None


def _class_spec(model: XFM, modality: Modality, *axes: Axis) -> tuple[TensorSpec, ...]:
    """The output of that head, if any."""
    if not isinstance(model, ClassificationModel) or model.modality != modality:
        return ()
    return (TensorSpec("class_logits", "compute", (*axes, model.labels)),)


def _layers(stack: LayerStack) -> list[TransformerLayer]:
    return list(stack)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _with_feature(embeds: Tensor, projection: nn.Linear | None, first: Tensor) -> tuple[Tensor, ...]:
    if projection is None:
        return (embeds,)
    # PyTorch's own 1e-12 is zero in half precision, and a feature of zeros would be divided by it.
    eps = 1e-12 if embeds.dtype.itemsize > 2 else 2.0**-20
    return embeds, F.normalize(projection(first), dim=-1, eps=eps)


def _head(head: nn.Module, x: Tensor) -> Tensor:
    for part in head if isinstance(head, nn.Sequential) else (head,):
        x = part(x)
    return x


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`[P, L]` of ones and zeros → `[P, 1, 1, L]`, added to attention scores."""
    return (1 - mask[:, None, None, :].to(dtype)) * _MASKED


def _between(own: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """Caption numbers of queries `[P, Q]` and keys `[P, K]` → block mask `[P, 1, Q, K]`, added to scores."""
    return (own[:, None, :, None] != others[:, None, None, :]).to(dtype) * _MASKED


class _SelfAttention(nn.Module):
    """The self-attention branch of a layer, `[P, L, width]` → the same, or `[P, Q, width]` for some queries."""

    weight: Tensor
    output_bias: Tensor

    def __init__(self, layer: TransformerLayer, *, first_only: bool = False) -> None:
        super().__init__()
        parts = layer.attention.self
        self.heads, self.first_only = parts.heads, first_only
        self.output = layer.attention.output
        self.first = parts.query if first_only else None
        products = (*(() if first_only else (parts.query,)), parts.key, parts.value)
        self.register_buffer("weight", torch.cat([each.weight.detach() for each in products]), persistent=False)
        dense = self.output.dense
        # TensorRT fuses primitives into an attention in the layout of the next GEMM, where its operator costs a copy;
        # a GEMM without bias needs one layout kernel, one with bias three. The key bias adds a constant to all scores
        # of a query, which softmax ignores; the value bias moves into the next GEMM's bias.
        self.query_bias = parts.query.bias
        bias = (dense.bias + dense.weight @ parts.value.bias).detach()
        self.register_buffer("output_bias", bias, persistent=False)

    def forward(self, x: Tensor, mask: Tensor, queries: Tensor | None = None) -> Tensor:
        """Attend with `mask` `[P, 1, Q or 1, L]`; `queries` `[P, Q, width]` default to token 0 where `first_only`."""
        if queries is None:
            queries = x[:, :1] if self.first_only else x
        projected = F.linear(x, self.weight)
        if self.first is not None:
            projected = projected.unflatten(-1, (2, self.heads, -1))
            q = self.first(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            q = q + self.query_bias.view(self.heads, 1, -1)
        context = attention(q, k, v, mask, "primitives").transpose(1, 2).flatten(2)
        return _norm(self.output.LayerNorm, F.linear(context, self.output.dense.weight, self.output_bias) + queries)


def _feed_forward(layer: TransformerLayer, x: Tensor) -> Tensor:
    return _residual_norm(layer.output, F.gelu(layer.intermediate.dense(x)), x)


def _cross(
    layer: TransformerLayer,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    memories: int,
    form: AttentionForm,
) -> Tensor:
    """The cross-attention branch: `[P, L, width]` over B memories `[B, H, M, D]`, P / B captions on each."""
    parts = layer.crossattention
    heads = parts.self.heads
    q = parts.self.query(x).reshape(memories, -1, heads, x.shape[-1] // heads).transpose(1, 2)
    context = attention(q, keys, values, mask, form)
    return _residual_norm(parts.output, context.transpose(1, 2).reshape(x.shape), x)


def _residual_norm(part: ResidualNorm, x: Tensor, residual: Tensor) -> Tensor:
    return _norm(part.LayerNorm, part.dense(x) + residual)


_EXAMPLE_SIZES = {"batch": 2, "texts": 3, "length": 7, "past": 5, "rows": 4}
_LARGEST_SIZES = {"batch": 4096, "texts": 4096, "length": LONGEST_ROW, "past": 512, "rows": 4096}


def tracing_call(
    graph: Graph, dtype: torch.dtype, fixed: Mapping[str, int]
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Inputs to trace a graph with, and the dynamic dimensions of each, in `forward`'s order."""
    dims: dict[str, Any] = {}

    def dimension(axis: Axis) -> Any:
        if axis.name in fixed:
            return None
        return dims.setdefault(axis.name, torch.export.Dim(axis.name, min=axis.least, max=_LARGEST_SIZES[axis.name]))

    shapes = tuple(
        {place: dim for place, axis in spec.axes.items() if (dim := dimension(axis)) is not None}
        for spec in graph.inputs
    )
    inputs = random_inputs(graph, _EXAMPLE_SIZES | dict(fixed), dtype)
    if graph.gathered:
        shapes = (*shapes[: -graph.gathered], shapes[-graph.gathered :])
    return inputs, shapes


def random_inputs(graph: Graph, sizes: Mapping[str, int], dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of a graph at given axis sizes: noise, small ids, captions of decreasing length."""
    generator = torch.Generator().manual_seed(seed)

    def values(spec: TensorSpec) -> Tensor:
        shape = spec.shape(dict(sizes))
        if spec.name == "input_ids":
            return torch.randint(4, 200, shape, generator=generator).masked_fill(~_real(shape), 1)
        if spec.name == "token_ids":
            return torch.randint(4, 200, shape, generator=generator)
        if spec.name in ("attention_mask", "past_mask", "memory_mask"):
            return _real(shape).long()
        if spec.name == "packed_ids":
            return torch.randint(4, 200, shape, generator=generator)
        if spec.name in ("positions", "segments"):
            # A text in every row.
            real = _real(shape)
            count = real.cumsum(-1) + 1 if spec.name == "positions" else torch.arange(shape[-2])[:, None] + 1
            return torch.where(real, count, int(spec.name == "positions"))
        if spec.name == "firsts":
            rows = torch.arange(shape[-2]) % sizes["rows"]
            return torch.stack([rows, torch.zeros_like(rows)], -1).expand(shape).clone()
        return torch.randn(shape, generator=generator).to(dtype)

    return tuple(values(spec) for spec in graph.inputs)


def _real(shape: tuple[int, ...]) -> Tensor:
    """Mask of real tokens of captions `[..., L]`: caption n is n % L tokens shorter than the longest."""
    length = shape[-1]
    texts = torch.arange(torch.Size(shape[:-1]).numel()).view(*shape[:-1], 1)
    return torch.arange(length).expand(shape) < (length - texts % length)


def check_fixed(graphs: Iterable[Graph], fixed: Mapping[str, int]) -> None:
    """Raise `InputError` for a fixed axis that no graph has, or a size below 1."""
    known = {axis.name for graph in graphs for spec in graph.inputs for axis in spec.axes.values()}
    for name, size in fixed.items():
        if name not in known:
            raise InputError(f"axis {name!r} cannot be fixed; choose from {', '.join(sorted(known)) or 'none'}")
        if size < 1:
            raise InputError(f"{name}={size} is no size; give a positive number")


def in_dtype(module: M, dtype: torch.dtype) -> M:
    """The module in `dtype`: itself where it already is, else a copy."""
    tensors = [each for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()]
    if all(each.dtype == dtype for each in tensors):
        return module
    # Converted tensor by tensor: a copy of the module first would hold all weights in the old dtype.
    converted: dict[int, Any] = {}
    for each in tensors:
        value = each.detach().to(dtype)
        is_parameter = isinstance(each, nn.Parameter)
        converted[id(each)] = nn.Parameter(value, requires_grad=each.requires_grad) if is_parameter else value
    return copy.deepcopy(module, converted).to(dtype)


@contextlib.contextmanager
def frozen(graph: Graph) -> Iterator[None]:
    """Disable gradients of the parameters: tensors derived from trainable parameters do not export."""
    trainable = [parameter for parameter in graph.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
