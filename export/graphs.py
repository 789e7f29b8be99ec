"""The exported graphs: the model cut into parts that a server composes, in shapes that compilers handle well.

`vision`, `text`, `image_memory` and `fusion` let a server reuse work: an image is encoded and projected once, and every
further caption costs the fusion encoder only. `match` is the whole model from pixels and ids to a score.

A fine-tuned model has further graphs: heads are outputs of the graph that computes their input, `PAIR_GRAPH` is the
fusion encoder over a pair of images with its head, `decoder_memory` projects the decoder's states once, and
`decoder_step` writes one token of every text.

The graphs are made of the model's own modules, with their attention written for compilers; texts are padded instead of
packed, because the number of packed tokens depends on values. Padding is masked with a finite value, so that a row
without any real token stays finite.

Packed `text` and `fusion` take captions side by side in rows of one length; a block mask keeps captions separate, and
only the ends of rows are padding.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels import ops
from xfm_fast.kernels.reference import position_bias
from xfm_fast.models.frozen import is_frozen
from xfm_fast.models.text import LayerStack, TransformerLayer
from xfm_fast.models.vision import Block, RelPosAttention
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.models import TaskModel

from .manifest import AXES, TensorRecord
from .request import ALL_GRAPHS, DEFAULT_GRAPHS, GRAPHS, PAIR_GRAPH, AttentionForm, DType, GraphName

M = TypeVar("M", bound=nn.Module)

DTYPES: dict[DType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

_MASKED = -10000.0


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, form: AttentionForm) -> Tensor:
    """softmax(q kᵀ / √D + bias) v; q `[B, H, N, D]`, k and v `[B, H, M, D]`, bias broadcast to `[B, H, N, M]`.

    In ONNX it is the node `Attention` of opset 23, or two GEMMs and a softmax. Text self-attention uses primitives in
    both forms, see `_SelfAttention`.
    """
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

    inputs: list[TensorRecord]
    outputs: list[TensorRecord]
    gathered: int = 0
    """How many of the last inputs are the tuple `*memory` of `forward`."""

    def describe(
        self, model: XFM, inputs: Sequence[str], outputs: Sequence[str], *keep: str, **sizes: int
    ) -> None:
        """Set inputs and outputs by name; `keep` names the dimensions in brackets that they have."""
        config = model.config
        sizes = {
            "side": config.image_size, "image_tokens": config.num_image_tokens, "vision_width": config.vision_width,
            "width": config.text_width, "heads": config.text_heads, "size": config.text_width // config.text_heads,
            "embed": config.embed_dim, "vocabulary": config.vocab_size, "labels": getattr(model, "labels", 0),
            "pair": 2, **sizes,
        }  # fmt: skip

        self.inputs, self.outputs = (
            [TensorRecord.of(name, keep, sizes) for name in names] for names in (inputs, outputs)
        )

    def own_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes of the axes that this graph has."""
        return {axis: size for axis, size in sizes.items() if axis in self.axes}

    @property
    def axes(self) -> list[str]:
        """The axes of all inputs that vary."""
        return [
            *dict.fromkeys(
                dim for tensor in self.inputs for dim in tensor.dims if isinstance(dim, str)
            )
        ]


class _Heads(nn.ModuleDict):
    """The heads that the model has, by the names of their outputs, on token 0 or the image token, `[..., width]`."""

    def __init__(self, **heads: nn.Module | None) -> None:
        super().__init__({name: head for name, head in heads.items() if head is not None})

    def forward(self, first: Tensor) -> tuple[Tensor, ...]:
        results = {name: head(first) for name, head in self.items()}
        if "boxes" in results:
            results["boxes"] = results["boxes"].sigmoid()
        for name, result in results.items():
            if name.endswith("_feature"):
                # PyTorch's own 1e-12 is zero in half precision, and a feature of zeros would be divided by it.
                eps = 1e-12 if result.dtype.itemsize > 2 else 2.0**-20
                results[name] = F.normalize(result, dim=-1, eps=eps)
        return tuple(results.values())


def _class_head(model: Any, modality: str) -> nn.Module | None:
    return model.cls_head if getattr(model, "modality", None) == modality else None


class _Joined(nn.Module):
    """Linear layers of one input as one GEMM, joined on construction: exporters fold only small constants."""

    def __init__(self, *parts: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        # Buffers, because the parameters of a graph are the model's own.
        self.register_buffer(
            "weight", torch.cat([part.weight.detach() for part in parts]), persistent=False
        )
        self.register_buffer(
            "bias", torch.cat([part.bias.detach() for part in parts]), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _Patches(nn.Module):
    """`PatchEmbed` as the convolution that compilers know."""

    def __init__(self, proj: nn.Conv2d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, pixels: Tensor) -> Tensor:
        return (
            F.conv2d(pixels, self.proj.weight, self.proj.bias, stride=self.proj.stride)
            .flatten(2)
            .transpose(1, 2)
        )


class _PositionAttention(nn.Module):
    """`RelPosAttention` with its bias gathered on construction: otherwise every layer gathers in every inference."""

    bias: Tensor

    def __init__(self, attn: RelPosAttention, form: AttentionForm) -> None:
        super().__init__()
        self.heads = attn.heads
        self.form: AttentionForm = form
        self.qkv, self.proj, self.q_bias, self.v_bias = (
            attn.qkv,
            attn.proj,
            attn.q_bias,
            attn.v_bias,
        )
        # Not read, but among the weights that the graph is made of.
        self.relative_position_bias_table = attn.relative_position_bias_table
        bias = position_bias(attn.relative_position_bias_table.detach(), attn.window)[None]
        # Half precision is finest near 0, and softmax ignores a constant of a row.
        self.register_buffer("bias", bias - bias.amax(-1, keepdim=True), persistent=False)

    def attend(self, x: Tensor, key_mask: None = None, norm: nn.LayerNorm | None = None) -> Tensor:
        """See `RelPosAttention.attend`."""
        x = x if norm is None else ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return attention(q, k, v, self.bias, self.form).transpose(1, 2).flatten(2)


def _with_parts(module: M, **parts: nn.Module) -> M:
    """The module with other submodules, sharing the rest."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **parts}
    return changed


class VisionGraph(Graph):
    """Pixels to image embeddings and the contrastive feature: the model's encoder."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__()
        encoder = model.vision_encoder
        blocks = [block for block in encoder.blocks if isinstance(block, Block)]
        self.encoder = _with_parts(
            encoder,
            patch_embed=_Patches(encoder.patch_embed.proj),
            blocks=nn.ModuleList(
                _with_parts(block, attn=_PositionAttention(block.attn, form)) for block in blocks
            ),
        )
        self.heads = _Heads(
            image_feature=model.vision_proj if "contrastive" in model.heads else None,
            class_logits=_class_head(model, "image"),
        )
        self.reads_mean = getattr(model, "head", None) == "official_image"
        self.describe(model, ["pixels"], ["image_embeds", *self.heads])

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """`[B, 3, R, R]` → `[B, 1 + N, vision_width]`, `[B, embed_dim]`, `[B, classes]`."""
        encoder = self.encoder
        x = encoder.embed(pixels)
        for block in encoder.blocks:
            x = block(x)
        norm = encoder.fc_norm
        if encoder.config.local_attn_depth > 0:
            x = ops.layer_norm(x, norm.weight, norm.bias, norm.eps)
        else:
            # Without the class token, which the mean of the patches replaces: TensorRT fuses this into the last GEMM.
            x = ops.layer_norm(x[:, 1:], norm.weight, norm.bias, norm.eps)
            x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        return (
            x,
            *self.heads(
                torch.cat([x[:, 0], x[:, 1:].mean(1)], dim=-1) if self.reads_mean else x[:, 0]
            ),
        )


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
        linears = (*(() if first_only else (parts.query,)), parts.key, parts.value)
        self.register_buffer(
            "weight", torch.cat([each.weight.detach() for each in linears]), persistent=False
        )
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
            q = self.first(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = projected.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            q = q + self.query_bias.view(self.heads, 1, -1)
        context = attention(q, k, v, mask, "primitives").transpose(1, 2).flatten(2)
        norm = self.output.LayerNorm
        summed = F.linear(context, self.output.dense.weight, self.output_bias) + queries
        return ops.layer_norm(summed, norm.weight, norm.bias, norm.eps)


def _cross_attention(
    layer: TransformerLayer,
    x: Tensor,
    memory: Sequence[Tensor],
    mask: Tensor | None,
    form: AttentionForm,
) -> Tensor:
    """The cross-attention branch: `[P, L, width]` over keys and values of B memories `[B, H, M, D]`, P / B on each."""
    parts = layer.crossattention
    heads, (keys, values) = parts.self.heads, memory
    q = parts.self.query(x).reshape(keys.shape[0], -1, heads, x.shape[-1] // heads).transpose(1, 2)
    context = attention(q, keys, values, mask, form)
    return parts.output(context.transpose(1, 2).reshape(x.shape), x)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`[P, L]` of ones and zeros → `[P, 1, 1, L]`, added to attention scores."""
    return (1 - mask[:, None, None, :].to(dtype)) * _MASKED


def _between(own: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """Caption numbers of queries `[P, Q]` and keys `[P, K]` → block mask `[P, 1, Q, K]`, added to scores."""
    return (own[:, None, :, None] != others[:, None, None, :]).to(dtype) * _MASKED


class TextGraph(Graph):
    """Token ids to text embeddings and the contrastive feature; padded positions hold arbitrary values."""

    def __init__(self, model: XFM, form: AttentionForm, *, packed: bool = False) -> None:
        super().__init__()
        self.encoder = model.text_encoder.roberta
        self.attentions = nn.ModuleList(map(_SelfAttention, self.encoder.encoder))
        self.heads = _Heads(
            text_feature=model.text_proj if "contrastive" in model.heads else None,
            class_logits=_class_head(model, "text"),
        )
        inputs = (
            ["packed_ids", "positions", "segments", "firsts"]
            if packed
            else ["input_ids", "attention_mask"]
        )
        self.describe(model, inputs, ["packed_embeds" if packed else "text_embeds", *self.heads])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """`[B, L]` ids and mask → `[B, L, text_width]`, `[B, embed_dim]`, `[B, classes]`."""
        mask = _additive(attention_mask, self.encoder.embeddings.LayerNorm.weight.dtype)
        x = self.encode(input_ids, self.encoder.embeddings.position_ids(input_ids), mask)
        return (x, *self.heads(x[:, 0]))

    def encode(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """`[R, L]` ids and positions, and the additive attention mask → `[R, L, text_width]`."""
        x = self.encoder.embeddings(ids, positions)
        for attend, layer in zip(self.attentions, self.encoder.encoder, strict=True):
            x = layer.feed_forward(attend(x, mask))
        return x


class PackedTextGraph(TextGraph):
    """The text graph on packed rows."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__(model, form, packed=True)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # a graph is called by the names of its inputs
        self, packed_ids: Tensor, positions: Tensor, segments: Tensor, firsts: Tensor
    ) -> tuple[Tensor, ...]:
        """R rows of L tokens with B captions → `[R, L, text_width]`, `[B, embed_dim]`, `[B, classes]`."""
        mask = _between(segments, segments, self.encoder.embeddings.LayerNorm.weight.dtype)
        x = self.encode(packed_ids, positions, mask)
        places = firsts[:, 0] * packed_ids.shape[1] + firsts[:, 1]
        return (x, *self.heads(x.flatten(0, 1).index_select(0, places)))


class _MemoryGraph(Graph):
    """States to the keys and values of every layer, as separate tensors so that the reading graph copies none."""

    def __init__(self, stack: LayerStack) -> None:
        super().__init__()
        # Only the projections: the file then holds only their weights.
        attentions = [layer.crossattention.self for layer in stack]
        self.heads = attentions[0].heads
        self.parts = nn.ModuleList(
            part for parts in attentions for part in (parts.key, parts.value)
        )
        self.projections = _Joined(
            *(part for parts in attentions for part in (parts.key, parts.value))
        )

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        """`[B, M, width]` → keys and values of layer 0, of layer 1, ...: `[B, H, M, D]` each."""
        projected = self.projections(states).unflatten(-1, (len(self.parts), self.heads, -1))
        return tuple(
            projected[:, :, number].transpose(1, 2).contiguous()
            for number in range(len(self.parts))
        )


class ImageMemoryGraph(_MemoryGraph):
    """Image embeddings to the keys and values of every fusion layer."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__(model.fusion_encoder.roberta.encoder)
        self.describe(model, ["image_embeds"], memory_names(model.config.fusion_layers))


class FusionGraph(Graph):
    """T captions on each of B memories to fused embeddings and head outputs; captions form one long query sequence."""

    def __init__(self, model: XFM, form: AttentionForm, *, all_tokens: bool = False) -> None:
        super().__init__()
        self.stack, self.all_tokens = model.fusion_encoder.roberta.encoder, all_tokens
        self.form: AttentionForm = form
        last = self.stack[len(self.stack) - 1]
        self.attentions = nn.ModuleList(
            _SelfAttention(layer, first_only=layer is last and not all_tokens)
            for layer in self.stack
        )
        self.heads = _Heads(
            match_logits=model.itm_head if "matching" in model.heads else None,
            boxes=model.bbox_head if "boxes" in model.heads else None,
            class_logits=_class_head(model, "pair"),
        )
        memory = memory_names(model.config.fusion_layers)
        self.gathered = len(memory)
        keep = ("texts", "length") if all_tokens else ("texts",)
        self.describe(
            model, ["text_embeds", "attention_mask", *memory], ["fused", *self.heads], *keep
        )

    def forward(
        self, text_embeds: Tensor, attention_mask: Tensor, *memory: Tensor
    ) -> tuple[Tensor, ...]:
        """`[B, T, L, width]`, `[B, T, L]`, keys and values `[B, H, M, D]` of every layer → token 0 (or all), heads."""
        batch, texts, length, width = text_embeds.shape
        mask = _additive(attention_mask.reshape(batch * texts, length), text_embeds.dtype)
        x = self.layers(text_embeds.reshape(batch * texts, length, width), mask, memory)
        fused = (
            x.reshape(batch, texts, length, width)
            if self.all_tokens
            else x.reshape(batch, texts, width)
        )
        return (fused, *self.heads(fused[:, :, 0] if self.all_tokens else fused))

    def layers(
        self,
        x: Tensor,
        mask: Tensor,
        memory: Sequence[Tensor],
        *,
        self_attended: bool = False,
        last: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The encoder on `[P, L, width]`; `last` gives tokens, mask and queries of the last layer (default token 0)."""
        for number, (attend, layer) in enumerate(zip(self.attentions, self.stack, strict=True)):
            if last is not None and number == len(self.stack) - 1:
                x = attend(*last(x))
            elif number or not self_attended:
                x = attend(x, mask)
            x = layer.feed_forward(
                _cross_attention(layer, x, memory[2 * number : 2 * number + 2], None, self.form)
            )
        return x


class PackedFusionGraph(FusionGraph):
    """The fusion graph on packed rows, R rows on each of B memories."""

    def __init__(self, model: XFM, form: AttentionForm, *, all_tokens: bool = False) -> None:
        super().__init__(model, form, all_tokens=all_tokens)
        memory = memory_names(model.config.fusion_layers)
        every = ["fused_tokens"] if all_tokens else []
        self.describe(
            model, ["packed_embeds", "segments", "firsts", *memory], ["fused", *self.heads, *every], "batch",
            "texts",
        )  # fmt: skip

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
            return (
                x.reshape(batch * tokens, width)
                .index_select(0, places)
                .reshape(batch, texts, width)
            )

        def last(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # All rows of an image form one sequence, because rows differ in their number of captions.
            every, own = segments.reshape(batch, tokens), segments.flatten().index_select(0, places)
            mask = _between(own.reshape(batch, texts), every, x.dtype)
            return x.reshape(batch, tokens, width), mask, chosen(x)

        mask = _between(numbers, numbers, x.dtype)
        x = self.layers(x, mask, memory, last=None if self.all_tokens else last)
        if not self.all_tokens:
            return (x, *self.heads(x))
        first = chosen(x)
        return (first, *self.heads(first), x.reshape(batch, rows, length, width))


class MatchGraph(Graph):
    """Pixels and ids to match scores: the whole model in one file."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__()
        self.vision, self.text = VisionGraph(model, form), TextGraph(model, form)
        self.memory, self.fusion = ImageMemoryGraph(model, form), FusionGraph(model, form)
        self.describe(model, ["pixels", "input_ids", "attention_mask"], ["scores"], "texts")

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        """`[B, 3, R, R]`, `[B, T, L]` ids and mask → `[B, T]`: the logit of "text describes image"."""
        memory = self.memory(self.vision(pixels)[0])
        batch, texts, length = input_ids.shape
        rows = (batch * texts, length)
        embeds = self.text(input_ids.reshape(rows), attention_mask.reshape(rows))[0]
        fused = self.fusion(embeds.reshape(batch, texts, length, -1), attention_mask, *memory)
        return (fused[1][..., 1],)


class PairGraph(Graph):
    """A sentence fused with each of two images, and the head on both: logits of "false" and "true"."""

    def __init__(self, model: Any, form: AttentionForm) -> None:
        super().__init__()
        self.fusion, self.class_head = FusionGraph(model, form), model.cls_head
        memory = memory_names(model.config.fusion_layers)
        self.gathered = len(memory)
        inputs = ["text_embeds", "attention_mask", *memory]
        self.describe(model, inputs, ["class_logits"], "pair", labels=2)

    def forward(
        self, text_embeds: Tensor, attention_mask: Tensor, *memory: Tensor
    ) -> tuple[Tensor]:
        """`[B, L, width]`, `[B, L]`, keys and values `[B, 2, H, M, D]` of both images, layer by layer → `[B, 2]`."""
        mask = _additive(attention_mask, text_embeds.dtype)
        # The self-attention of layer 0 reads no image and is computed once for both.
        x = self.fusion.attentions[0](text_embeds, mask)
        x, mask = (each.repeat_interleave(2, dim=0) for each in (x, mask))
        both = [part.flatten(0, 1) for part in memory]
        first = self.fusion.layers(x, mask, both, self_attended=True)
        return (self.class_head(first.reshape(text_embeds.shape[0], -1)),)


class DecoderMemoryGraph(_MemoryGraph):
    """The states that a decoder reads to the keys and values of its layers."""

    def __init__(self, model: Any, form: AttentionForm) -> None:
        super().__init__(model.text_decoder.roberta.encoder)
        names = memory_names(len(model.text_decoder.roberta.encoder), "decoder")
        self.describe(model, ["states"], names, **_states_sizes(model))


class DecoderStepGraph(Graph):
    """One more token of T texts for each of B states; before the first token the past is one masked token."""

    def __init__(self, model: Any, form: AttentionForm) -> None:
        super().__init__()
        self.decoder, self.heads = model.text_decoder, model.config.text_heads
        stack = self.decoder.roberta.encoder
        self.linears = nn.ModuleList(
            _Joined(parts.query, parts.key, parts.value)
            for parts in (layer.attention.self for layer in stack)
        )
        self.has_mask = decoder_reads(model) == "fusion"
        memory = [*memory_names(len(stack), "decoder"), *(["memory_mask"] if self.has_mask else [])]
        self.gathered = len(memory)
        self.describe(
            model, ["token_ids", "past", "past_mask", *memory], ["logits", "present"], layers=len(stack),
            **_states_sizes(model),
        )  # fmt: skip

    def forward(
        self, token_ids: Tensor, past: Tensor, past_mask: Tensor, *memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits `[B, T, vocabulary]`, and keys and values of the token `[B, T, layers, 2, H, D]`."""
        batch, texts = token_ids.shape
        rows, embeddings = batch * texts, self.decoder.roberta.embeddings
        mask = past_mask.reshape(rows, -1)
        x = embeddings(token_ids.reshape(rows), mask.sum(1) + embeddings.pad_token_id + 1)[:, None]
        hidden = _additive(F.pad(mask, (0, 1), value=1), x.dtype)
        memory_mask = _additive(memory[-1], x.dtype) if self.has_mask else None
        past = past.flatten(0, 1)
        present = []
        for number, (linear, layer) in enumerate(
            zip(self.linears, self.decoder.roberta.encoder, strict=True)
        ):
            q, k, v = linear(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            keys, values = (
                torch.cat([past[:, number, place], new], dim=2) for place, new in enumerate((k, v))
            )
            present += [k[:, :, 0], v[:, :, 0]]
            # TensorRT for RTX 1.7 builds no attention of one query over a past of any length.
            context = attention(q, keys, values, hidden, "primitives").transpose(1, 2).flatten(2)
            x = layer.attention.output(context, x)
            pair = memory[2 * number : 2 * number + 2]
            x = layer.feed_forward(_cross_attention(layer, x, pair, memory_mask, "primitives"))
        known = torch.stack(present, dim=1)
        known = known.reshape(batch, texts, -1, 2, self.heads, known.shape[-1])
        return self.decoder.logits(x).reshape(batch, texts, -1), known


def decoder_reads(model: XFM) -> Literal["image", "fusion"] | None:
    """What the decoder of a model attends to; None without a decoder."""
    return model.decoder_reads if isinstance(model, TaskModel) else None


def _states_sizes(model: XFM) -> dict[str, int]:
    """Width and, for images, number of the tokens of a state; questions have any number."""
    config = model.config
    if decoder_reads(model) == "fusion":
        return {"states_width": config.text_width}
    return {"states_width": config.vision_width, "length": config.num_image_tokens}


GRAPH_CLASSES: dict[GraphName, type[Graph]] = {
    "vision": VisionGraph,
    "text": TextGraph,
    "image_memory": ImageMemoryGraph,
    "fusion": FusionGraph,
    "match": MatchGraph,
    PAIR_GRAPH: PairGraph,
    "decoder_memory": DecoderMemoryGraph,
    "decoder_step": DecoderStepGraph,
}


def default_graphs(model: XFM) -> tuple[GraphName, ...]:
    """The default graphs of a model: all but `match` of a pretrained one, those of the task of a fine-tuned one."""
    if isinstance(model, TaskModel) and model.own_graphs:
        return ("vision", "text", "image_memory", *model.own_graphs)  # pyright: ignore[reportReturnType]
    if (reads := decoder_reads(model)) is not None:
        return (
            *(("vision",) if reads == "image" else DEFAULT_GRAPHS),
            "decoder_memory",
            "decoder_step",
        )
    modality = getattr(model, "modality", "pair")
    return (
        DEFAULT_GRAPHS if modality == "pair" else ("vision",) if modality == "image" else ("text",)
    )


def needs_all_tokens(model: XFM, all_tokens: bool) -> bool:
    """True if `fusion` returns every token: on request, or because a decoder reads them."""
    return all_tokens or decoder_reads(model) == "fusion"


def build(
    name: GraphName,
    model: XFM,
    form: AttentionForm,
    *,
    all_tokens: bool = False,
    packed: bool = False,
) -> Graph:
    """One graph in evaluation mode that shares the model's parameters; its outputs follow the model's heads."""
    if name not in ALL_GRAPHS:
        raise UnavailableError(f"graph {name!r} is unknown; choose from {', '.join(ALL_GRAPHS)}")
    if is_frozen(model):
        raise InputError(
            "the model is frozen for inference, and a graph holds its weights; call unfreeze() first"
        )
    needs = {"vision": "vision", "text": "text", "match": "vision text fusion"}.get(name, "fusion")
    lacks = [
        f"the {each} encoder" for each in needs.split() if not hasattr(model, f"{each}_encoder")
    ]
    if name == "match" and "matching" not in model.heads:
        lacks.append("the head 'matching'")
    if name not in (*GRAPHS, "decoder_memory", "decoder_step") and name not in getattr(
        model, "own_graphs", ()
    ):
        lacks.append(f"the head of the task {name}")
    if name.startswith("decoder_"):
        lacks = ["a decoder"] if decoder_reads(model) is None else []
    elif "fusion" in needs and not model.config.fusion_layers:
        lacks.append("fusion layers")
    if lacks:
        raise UnavailableError(
            f"graph {name!r} needs {' and '.join(lacks)}, which this model was built without; export other graphs"
        )
    if name == "fusion":
        return (PackedFusionGraph if packed else FusionGraph)(
            model, form, all_tokens=all_tokens
        ).eval()
    made: Any = PackedTextGraph if packed and name == "text" else GRAPH_CLASSES[name]
    return made(model, form).eval()


def is_memory(name: str) -> bool:
    """True for the keys or values of a fusion layer."""
    return name.startswith(("memory_keys_", "memory_values_"))


def memory_names(layers: int, owner: str = "memory") -> list[str]:
    """Names of the keys and values of layers, in the order of graph inputs and outputs."""
    return [f"{owner}_{kind}_{number}" for number in range(layers) for kind in ("keys", "values")]


def trace(
    graph: Graph, dtype: DType, fixed: Mapping[str, int], device: str = "cpu"
) -> torch.export.ExportedProgram:
    """The exported program of a graph with parameters in `dtype`, on a device."""
    inputs, shapes = tracing_call(graph, DTYPES[dtype], graph.own_sizes(fixed))
    with torch.no_grad(), frozen(graph):
        program = torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
    if device == "cuda":
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(program, device)
    return program


def tracing_call(
    graph: Graph, dtype: torch.dtype, fixed: Mapping[str, int]
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Inputs to trace a graph with, and the dynamic dimensions of each, in `forward`'s order."""
    dims = {
        name: torch.export.Dim(name, min=1, max=axis.most)
        for name, axis in AXES.items()
        if name not in fixed
    }
    shapes = tuple(
        {
            place: dims[axis]
            for place, axis in enumerate(tensor.dims)
            if isinstance(axis, str) and axis in dims
        }
        for tensor in graph.inputs
    )
    inputs = random_inputs(
        graph, {name: axis.traced for name, axis in AXES.items()} | dict(fixed), dtype
    )
    if graph.gathered:
        shapes = (*shapes[: -graph.gathered], shapes[-graph.gathered :])
    return inputs, shapes


def random_inputs(
    graph: Graph, sizes: Mapping[str, int], dtype: torch.dtype, *, seed: int = 0
) -> tuple[Tensor, ...]:
    """Inputs of a graph at given axis sizes: noise, small ids, captions of decreasing length."""
    generator = torch.Generator().manual_seed(seed)

    def values(spec: TensorRecord) -> Tensor:
        shape = spec.shape(sizes)
        if spec.name.endswith("_ids"):
            ids = torch.randint(4, 200, shape, generator=generator)
            return ids.masked_fill(~_real(shape), 1) if spec.name == "input_ids" else ids
        if spec.name.endswith("_mask"):
            return _real(shape).long()
        if spec.name in ("positions", "segments"):
            # A text in every row.
            real = _real(shape)
            count = (
                real.cumsum(-1) + 1
                if spec.name == "positions"
                else torch.arange(shape[-2])[:, None] + 1
            )
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
    known = {axis for graph in graphs for axis in graph.axes}
    for name, size in fixed.items():
        if name not in known:
            raise InputError(
                f"axis {name!r} cannot be fixed; choose from {', '.join(sorted(known)) or 'none'}"
            )
        if size < 1:
            raise InputError(f"{name}={size} is no size; give a positive number")


def in_dtype(module: M, dtype: torch.dtype) -> M:
    """The module in `dtype`: itself where it already is, else a copy."""
    tensors = [
        each for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()
    ]
    if all(each.dtype == dtype for each in tensors):
        return module
    # Converted tensor by tensor: a copy of the module first would hold all weights in the old dtype.
    converted: dict[int, Any] = {}
    for each in tensors:
        value = each.detach().to(dtype)
        is_parameter = isinstance(each, nn.Parameter)
        converted[id(each)] = (
            nn.Parameter(value, requires_grad=each.requires_grad) if is_parameter else value
        )
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
