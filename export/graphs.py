"""The graphs that are exported: the model cut into parts that a server composes, in shapes that compilers like.

The four graphs `vision`, `text`, `image_memory` and `fusion` let a server reuse work: an image is encoded once, its
memory is projected once, and every text that comes later pays for the fusion encoder alone. `match` is the whole way
from pixels and ids to a score, in one file.

The graphs compute what `XFM` computes, with its parameters, but padded instead of packed: engines plan for shapes, and
a packed batch has none. Padding is masked with a finite value, so that a row without any real token stays finite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels.reference import relative_position_index
from xfm_fast.models.frozen import is_frozen
from xfm_fast.models.heads import MLPHead
from xfm_fast.models.text import LayerStack, ResidualNorm, TransformerLayer
from xfm_fast.models.vision import Block
from xfm_fast.models.xfm import XFM

from .request import GRAPHS, GraphName

_MASKED = -10000.0


@dataclass(frozen=True)
class Axis:
    """A dimension whose size is known only when the graph runs."""

    name: str
    least: int = 1


BATCH, TEXTS, LENGTH = Axis("batch"), Axis("texts"), Axis("length")


@dataclass(frozen=True)
class TensorSpec:
    """Name, type and dimensions of an input or output; a dimension is a number or an `Axis`."""

    name: str
    dtype: Literal["compute", "int64"]
    dims: tuple[int | Axis, ...]

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """The dimensions as numbers, given the sizes of the axes by name."""
        return tuple(sizes[dim.name] if isinstance(dim, Axis) else dim for dim in self.dims)

    @property
    def axes(self) -> dict[int, Axis]:
        """Position → axis of the dimensions that vary."""
        return {place: dim for place, dim in enumerate(self.dims) if isinstance(dim, Axis)}


AttentionForm = Literal["function", "opset23", "primitives"]
"""The spelling of attention in a graph.

`function`: a node `xfm::Attention` with a body of its own in the model (opset 23 `Attention`), which a runtime inlines
and a TensorRT plugin of the same name takes over. `opset23`: the standard node. `primitives`: two products and a
softmax, for opsets below 23 and for runtimes that fuse these themselves.
"""

DOMAIN, OPERATOR = "xfm", "Attention"


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, form: AttentionForm) -> Tensor:
    """softmax(q kᵀ / √D + bias) v.

    Args:
        q: `[B, H, N, D]`; k, v: `[B, H, M, D]`.
        bias: added to the scores, broadcast against `[B, H, N, M]`; None adds nothing.
        form: what an export of this call contains. Outside of an export the result is the same for all forms.

    Returns:
        `[B, H, N, D]`.
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
    if form == "opset23":
        return torch.onnx.ops.attention(q, k, v, bias, scale=scale)[0]
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}", inputs, {"scale": scale}, dtype=q.dtype, shape=q.shape, version=1
    )


class Graph(nn.Module):
    """A part of the model with named inputs and outputs.

    Attributes:
        inputs, outputs: in the order of `forward`'s arguments and results.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    form: AttentionForm

    def own_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The sizes of those axes that this graph has."""
        axes = {axis.name for spec in self.inputs for axis in spec.axes.values()}
        return {axis: size for axis, size in sizes.items() if axis in axes}


class _Joined(nn.Module):
    """Linear layers of one input as one product.

    Weights are joined when the graph is built: an exporter folds a constant up to a size only, and leaves the joining
    of large ones to every inference.
    """

    def __init__(self, *parts: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        # Buffers: the parameters of a graph are those of the model, once.
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
        size, tokens = config.image_size, config.num_image_tokens
        # Gathered here for the reason that `_Joined` has: a gather in every layer of every inference otherwise.
        index = relative_position_index((config.grid, config.grid)).flatten()
        for number, block in enumerate(self.encoder.blocks):
            assert isinstance(block, Block)
            table = block.attn.relative_position_bias_table.detach()
            bias = table.t()[:, index.to(table.device)].view(1, block.attn.heads, tokens, tokens)
            self.register_buffer(f"position_bias_{number}", bias, persistent=False)
        self.inputs = (TensorSpec("pixels", "compute", (BATCH, 3, size, size)),)
        self.outputs = (TensorSpec("image_embeds", "compute", (BATCH, tokens, config.vision_width)),)
        if self.projection is not None:
            self.outputs += (TensorSpec("image_feature", "compute", (BATCH, config.embed_dim)),)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """`[B, 3, R, R]` → `[B, 1 + N, vision_width]`, `[B, embed_dim]`."""
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
        return _with_feature(x, self.projection)

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
    """Token ids to text embeddings and the contrastive feature. Padded positions hold what padding computes."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__()
        config = model.config
        self.encoder, self.form = model.text_encoder.roberta, form
        self.projection = model.text_proj if "contrastive" in model.heads else None
        self.attentions = nn.ModuleList(_SelfAttention(layer, form) for layer in _layers(self.encoder.encoder))
        self.inputs = (
            TensorSpec("input_ids", "int64", (BATCH, LENGTH)),
            TensorSpec("attention_mask", "int64", (BATCH, LENGTH)),
        )
        self.outputs = (TensorSpec("text_embeds", "compute", (BATCH, LENGTH, config.text_width)),)
        if self.projection is not None:
            self.outputs += (TensorSpec("text_feature", "compute", (BATCH, config.embed_dim)),)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """`[B, L]` ids and mask → `[B, L, text_width]`, `[B, embed_dim]`."""
        embeddings = self.encoder.embeddings
        x = F.embedding(input_ids, embeddings.word_embeddings.weight)
        positions = embeddings.position_ids(input_ids)
        x = x + F.embedding(positions, embeddings.position_embeddings.weight)
        x = _norm(embeddings.LayerNorm, x + embeddings.token_type_embeddings.weight[0])
        mask = _additive(attention_mask, x.dtype)
        for attend, layer in zip(self.attentions, _layers(self.encoder.encoder), strict=True):
            x = _feed_forward(layer, attend(x, mask))
        return _with_feature(x, self.projection)


class ImageMemoryGraph(Graph):
    """Image embeddings to the keys and values of every fusion layer, in the layout that attention reads."""

    def __init__(self, model: XFM, form: AttentionForm) -> None:
        super().__init__()
        config = model.config
        _require_fusion(model)
        self.heads, self.layers = config.text_heads, config.fusion_layers
        # The projections alone, not the layers that they belong to: the graph weighs what it needs.
        attentions = [layer.crossattention.self for layer in _layers(model.fusion_encoder.roberta.encoder)]
        projections = [part for parts in attentions for part in (parts.key, parts.value)]
        self.parts = nn.ModuleList(projections)
        self.projections = _Joined(*projections)
        tokens = config.num_image_tokens
        self.inputs = (TensorSpec("image_embeds", "compute", (BATCH, tokens, config.vision_width)),)
        self.outputs = (_memory_spec(model),)

    def forward(self, image_embeds: Tensor) -> tuple[Tensor]:
        """`[B, M, vision_width]` → `[B, layers, 2, H, M, D]`."""
        # One product for all layers: its result is put in order once, where 24 results would be joined as well.
        projected = self.projections(image_embeds).unflatten(-1, (self.layers, 2, self.heads, -1))
        return (projected.permute(0, 2, 3, 4, 1, 5).contiguous(),)


class FusionGraph(Graph):
    """T texts on each of B memories to fused embeddings, and what the model's heads make of token 0.

    One memory for all texts is B = 1; a memory for every text is T = 1. The texts of a memory are one long query
    sequence of the cross-attention, which has no mask between queries.
    """

    def __init__(self, model: XFM, form: AttentionForm, *, all_tokens: bool = False) -> None:
        super().__init__()
        config = model.config
        _require_fusion(model)
        self.stack, self.form, self.all_tokens = model.fusion_encoder.roberta.encoder, form, all_tokens
        last = len(self.stack) - 1
        self.attentions = nn.ModuleList(
            _SelfAttention(layer, form, first_only=number == last and not all_tokens)
            for number, layer in enumerate(_layers(self.stack))
        )
        self.match_head = model.itm_head if "matching" in model.heads else None
        self.box_head = model.bbox_head if "boxes" in model.heads else None
        self.inputs = (
            TensorSpec("text_embeds", "compute", (BATCH, TEXTS, LENGTH, config.text_width)),
            TensorSpec("attention_mask", "int64", (BATCH, TEXTS, LENGTH)),
            _memory_spec(model),
        )
        fused = (BATCH, TEXTS, LENGTH, config.text_width) if all_tokens else (BATCH, TEXTS, config.text_width)
        self.outputs = (TensorSpec("fused", "compute", fused),)
        if self.match_head is not None:
            self.outputs += (TensorSpec("match_logits", "compute", (BATCH, TEXTS, 2)),)
        if self.box_head is not None:
            self.outputs += (TensorSpec("boxes", "compute", (BATCH, TEXTS, 4)),)

    def forward(self, text_embeds: Tensor, attention_mask: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        """`[B, T, L, width]`, `[B, T, L]`, `[B, layers, 2, H, M, D]` → fused, `[B, T, 2]`, `[B, T, 4]`.

        `fused` is token 0 of every text, `[B, T, width]`, or all tokens `[B, T, L, width]`.
        """
        fused = self.fuse(text_embeds, attention_mask, memory)
        first = fused[:, :, 0] if self.all_tokens else fused
        results = (fused,)
        if self.match_head is not None:
            results += (self.match_logits(first),)
        if self.box_head is not None:
            results += (_head(self.box_head, first).sigmoid(),)
        return results

    def match_logits(self, first: Tensor) -> Tensor:
        """Token 0 of every text, `[..., width]` → `[..., 2]`."""
        assert self.match_head is not None
        return _head(self.match_head, first)

    def fuse(self, text_embeds: Tensor, attention_mask: Tensor, memory: Tensor) -> Tensor:
        """The first result of `forward`."""
        batch, texts, length, width = text_embeds.shape
        x = text_embeds.reshape(batch * texts, length, width)
        mask = _additive(attention_mask.reshape(batch * texts, length), x.dtype)
        # Keys and values of all layers side by side, so that runtimes that copy what they cut copy it once.
        memory = memory.flatten(1, 2)
        for number, (attend, layer) in enumerate(zip(self.attentions, _layers(self.stack), strict=True)):
            x = attend(x, mask)
            parts = layer.crossattention
            q = parts.self.query(x).reshape(batch, -1, parts.self.heads, width // parts.self.heads).transpose(1, 2)
            context = attention(q, memory[:, 2 * number], memory[:, 2 * number + 1], None, self.form)
            x = _residual_norm(parts.output, context.transpose(1, 2).reshape(x.shape), x)
            x = _feed_forward(layer, x)
        if not self.all_tokens:
            return x.reshape(batch, texts, width)
        return x.reshape(batch, texts, length, width)


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
        (memory,) = self.memory(self.vision(pixels)[0])
        batch, texts, length = input_ids.shape
        rows = (batch * texts, length)
        embeds = self.text(input_ids.reshape(rows), attention_mask.reshape(rows))[0]
        fused = self.fusion.fuse(embeds.reshape(batch, texts, length, -1), attention_mask, memory)
        return (self.fusion.match_logits(fused)[..., 1],)


def build(name: GraphName, model: XFM, form: AttentionForm, *, all_tokens: bool = False) -> Graph:
    """One graph of a model, sharing its parameters, in evaluation mode.

    A graph returns what the model has heads for: without the contrastive head `vision` and `text` have no feature, and
    `fusion` has no match logits without the matching head, no boxes without that of boxes.

    Args:
        name: which one.
        model: `match` needs its matching head.
        form: how attention is spelt; see `AttentionForm`.
        all_tokens: `fusion` returns every token instead of token 0.

    Raises:
        UnavailableError: the graph is unknown, or the model lacks an encoder or head that it needs.
        InputError: the model is frozen.
    """
    if name not in GRAPHS:
        raise UnavailableError(f"graph {name!r} is unknown; choose from {', '.join(GRAPHS)}")
    if is_frozen(model):
        raise InputError("the model is frozen for inference, and a graph holds its weights; call unfreeze() first")
    if name == "match" and "matching" not in model.heads:
        raise UnavailableError(
            "graph 'match' needs the 'matching' head, which this model was built without (it has: "
            f"{', '.join(model.heads) or 'none'}); load it with heads=(..., 'matching')"
        )
    encoders = {"vision": ("vision",), "text": ("text",), "image_memory": ("fusion",), "fusion": ("fusion",)}
    for encoder in encoders.get(name, ("vision", "text", "fusion")):
        if not hasattr(model, f"{encoder}_encoder"):
            raise UnavailableError(
                f"graph {name!r} needs the {encoder} encoder, which this model was built without; "
                f"build it with encoders=(..., {encoder!r})"
            )
    if name == "fusion":
        return FusionGraph(model, form, all_tokens=all_tokens).eval()
    kinds = {"vision": VisionGraph, "text": TextGraph, "image_memory": ImageMemoryGraph, "match": MatchGraph}
    return kinds[name](model, form).eval()


def _require_fusion(model: XFM) -> None:
    if not model.config.fusion_layers:
        raise UnavailableError("this model has no fusion layers (fusion_layers=0); export vision and text alone")


def _memory_spec(model: XFM) -> TensorSpec:
    config = model.config
    heads = config.text_heads
    dims = (BATCH, config.fusion_layers, 2, heads, config.num_image_tokens, config.text_width // heads)
    return TensorSpec("memory", "compute", dims)


def _layers(stack: LayerStack) -> list[TransformerLayer]:
    return list(stack)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _with_feature(embeds: Tensor, projection: nn.Linear | None) -> tuple[Tensor, ...]:
    if projection is None:
        return (embeds,)
    # PyTorch's own 1e-12 is zero in half precision, and a feature of zeros would be divided by it.
    eps = 1e-12 if embeds.dtype.itemsize > 2 else 2.0**-20
    return embeds, F.normalize(projection(embeds[:, 0]), dim=-1, eps=eps)


def _head(head: MLPHead, x: Tensor) -> Tensor:
    for part in head:
        x = part(x)
    return x


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`[P, L]` of ones and zeros → `[P, 1, 1, L]` to be added to attention scores."""
    return (1 - mask[:, None, None, :].to(dtype)) * _MASKED


class _SelfAttention(nn.Module):
    """The self-attention branch of a layer, `[P, L, width]` → the same, or `[P, 1, width]` for token 0 alone."""

    form: AttentionForm

    def __init__(self, layer: TransformerLayer, form: AttentionForm, *, first_only: bool = False) -> None:
        super().__init__()
        parts = layer.attention.self
        self.form, self.heads, self.first_only = form, parts.heads, first_only
        self.output = layer.attention.output
        self.first = parts.query if first_only else None
        self.products = _Joined(*(() if first_only else (parts.query,)), parts.key, parts.value)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend among the tokens of a text, where `mask` `[P, 1, 1, L]` is added to the scores."""
        queries = x[:, :1] if self.first_only else x
        projected = self.products(x)
        if self.first is not None:
            projected = projected.unflatten(-1, (2, self.heads, -1))
            q = self.first(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        context = attention(q, k, v, mask, self.form).transpose(1, 2).flatten(2)
        return _residual_norm(self.output, context, queries)


def _feed_forward(layer: TransformerLayer, x: Tensor) -> Tensor:
    return _residual_norm(layer.output, F.gelu(layer.intermediate.dense(x)), x)


def _residual_norm(part: ResidualNorm, x: Tensor, residual: Tensor) -> Tensor:
    return _norm(part.LayerNorm, part.dense(x) + residual)


_EXAMPLE_SIZES = {"batch": 2, "texts": 3, "length": 7}
_LARGEST_SIZES = {"batch": 4096, "texts": 4096, "length": 512}


def tracing_call(
    graph: Graph, dtype: torch.dtype, fixed: Mapping[str, int]
) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace a graph with, and for each its dimensions that stay dynamic.

    Args:
        dtype: type of the inputs that are not ids.
        fixed: axes that get a constant size.
    """
    dims: dict[str, Any] = {}

    def dimension(axis: Axis) -> Any:
        if axis.name in fixed:
            return None
        return dims.setdefault(axis.name, torch.export.Dim(axis.name, min=axis.least, max=_LARGEST_SIZES[axis.name]))

    shapes = tuple(
        {place: dim for place, axis in spec.axes.items() if (dim := dimension(axis)) is not None}
        for spec in graph.inputs
    )
    return random_inputs(graph, _EXAMPLE_SIZES | dict(fixed), dtype), shapes


def random_inputs(graph: Graph, sizes: Mapping[str, int], dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of a graph at the given sizes of its axes: noise, ids of every vocabulary, texts of falling length."""
    generator = torch.Generator().manual_seed(seed)

    def values(spec: TensorSpec) -> Tensor:
        shape = spec.shape(dict(sizes))
        if spec.name == "input_ids":
            return torch.randint(4, 200, shape, generator=generator).masked_fill(~_real(shape), 1)
        if spec.name == "attention_mask":
            return _real(shape).long()
        return torch.randn(shape, generator=generator).to(dtype)

    return tuple(values(spec) for spec in graph.inputs)


def _real(shape: tuple[int, ...]) -> Tensor:
    """True for the real tokens of texts `[..., L]`: text n has n % L tokens less than the longest."""
    length = shape[-1]
    texts = torch.arange(torch.Size(shape[:-1]).numel()).view(*shape[:-1], 1)
    return torch.arange(length).expand(shape) < (length - texts % length)


def check_fixed(graphs: Iterable[Graph], fixed: Mapping[str, int]) -> None:
    """Raise `InputError` for a fixed axis that none of the graphs has, or a size that is not positive."""
    known = {axis.name for graph in graphs for spec in graph.inputs for axis in spec.axes.values()}
    for name, size in fixed.items():
        if name not in known:
            raise InputError(f"axis {name!r} cannot be fixed; choose from {', '.join(sorted(known)) or 'none'}")
        if size < 1:
            raise InputError(f"{name}={size} is no size; give a positive number")


@contextlib.contextmanager
def frozen(graph: Graph) -> Iterator[None]:
    """Stop the parameters from needing gradients: what is derived from trainable ones does not export."""
    trainable = [parameter for parameter in graph.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
