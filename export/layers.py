"""The modules of the graphs: layers of the model with their attention written for compilers.

Linear layers of one input are joined, biases are gathered or moved where that saves a kernel; parameters are shared
with the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import ops
from xfm_fast.kernels.reference import position_bias
from xfm_fast.models.text import TransformerLayer
from xfm_fast.models.vision import RelPosAttention

from .request import AttentionForm

M = TypeVar("M", bound=nn.Module)

# Finite, so that a row without any real token stays finite.
MASKED = -10000.0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    form: AttentionForm,
    scale: float | None = None,
) -> Tensor:
    """softmax(q kᵀ / √D + bias) v; q `[B, H, N, D]`, k and v `[B, H, M, D]`, bias broadcast to `[B, H, N, M]`.

    In ONNX it is the node `Attention` of opset 23, or two GEMMs and a softmax. Text self-attention uses primitives in
    both forms, see `SelfAttention`.
    """
    if not torch.onnx.is_in_onnx_export():
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    if scale is None:
        scale = float(q.shape[-1] ** -0.5)
    if form == "primitives":
        scores = torch.matmul(q * scale, k.transpose(-1, -2))
        return torch.matmul((scores if bias is None else scores + bias).softmax(-1), v)
    if bias is not None and bias.shape[-2] == 1:
        # ONNX Runtime's CPU kernel broadcasts the heads of a mask, and neither its batch nor its queries.
        bias = bias.expand(q.shape[0], -1, q.shape[2], k.shape[2])
    return torch.onnx.ops.attention(q, k, v, bias, scale=scale)[0]


class Heads(nn.ModuleDict):
    """The model's heads by the names of their outputs, on token 0 or the image token, `[..., width]`."""

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


def class_head(model: Any, modality: str) -> nn.Module | None:
    """Return the classification head of a model whose task has this modality."""
    return model.cls_head if getattr(model, "modality", None) == modality else None


def _concatenated(linears: Iterable[nn.Linear], name: str) -> Tensor:
    return torch.cat([getattr(linear, name).detach() for linear in linears])


class JoinedLinears(nn.Module):
    """Linear layers of one input as one GEMM, joined on construction: exporters fold only small constants."""

    weight: Tensor
    bias: Tensor

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        # Buffers, because the parameters of a graph are the model's own.
        self.register_buffer("weight", _concatenated(linears, "weight"), persistent=False)
        self.register_buffer("bias", _concatenated(linears, "bias"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Patches(nn.Module):
    """`PatchEmbed` as the convolution that compilers know."""

    def __init__(self, proj: nn.Conv2d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, pixels: Tensor) -> Tensor:
        proj = self.proj
        patches = F.conv2d(pixels, proj.weight, proj.bias, stride=proj.stride)
        return patches.flatten(2).transpose(1, 2)


class PositionAttention(nn.Module):
    """`RelPosAttention` with its bias gathered on construction: otherwise every layer gathers in every inference."""

    bias: Tensor

    def __init__(self, attn: RelPosAttention, form: AttentionForm) -> None:
        super().__init__()
        self.heads = attn.heads
        self.form: AttentionForm = form
        self.qkv, self.proj = attn.qkv, attn.proj
        self.q_bias, self.v_bias = attn.q_bias, attn.v_bias
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
        q, k, v = split_heads(qkv, 3, self.heads)
        return attention(q, k, v, self.bias, self.form).transpose(1, 2).flatten(2)


def with_children(module: M, **children: nn.Module) -> M:
    """Return a shallow copy of a module with some of its submodules replaced."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **children}
    return changed


def split_heads(projected: Tensor, count: int, heads: int) -> tuple[Tensor, ...]:
    """Split `[B, N, count · width]` into `count` tensors `[B, H, N, D]`."""
    return projected.unflatten(-1, (count, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class JoinedAttention(nn.Module):
    """The projections of a self-attention as one GEMM, with biases where they cost no kernel."""

    weight: Tensor
    bias: Tensor | None
    query_bias: Tensor | None
    position_bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, proj: tuple[Tensor, Tensor | None], heads: int
    ) -> None:
        super().__init__()
        self.heads, self.count = heads, weight.shape[0] // proj[0].shape[1]
        query_bias, moved = None, proj[1]
        if bias is not None:
            # TensorRT fuses primitives into an attention in the layout of the next GEMM, where its operator costs a
            # copy; a GEMM without bias needs one layout kernel, one with bias three. The key bias adds a constant to
            # all scores of a query, which softmax ignores; the value bias moves into the next GEMM's bias.
            *queries, _, values = bias.chunk(self.count)
            query_bias = queries[0].view(heads, 1, -1) if queries else None
            moved = proj[0] @ values if moved is None else moved + proj[0] @ values
        buffers = {"weight": weight, "bias": bias, "query_bias": query_bias, "position_bias": None}
        for name, value in buffers.items():
            self.register_buffer(name, None if value is None else value.detach(), persistent=False)
        width, inner = proj[0].shape
        self.output: Any = nn.Linear(inner, width, device="meta")
        # Merged adapters are no parameter.
        self.output.weight, self.output.bias = (
            value if isinstance(value, nn.Parameter | None) else nn.Parameter(value.detach(), False)
            for value in (proj[0], moved)
        )

    def constant(self, make_bias: Callable[[], Tensor]) -> Tensor:
        """Return a bias that depends on no input, gathered before the trace: a compiler gathers in every inference."""
        bias = self.position_bias
        if bias is None:
            bias = make_bias()
            # Half precision is finest near 0, and softmax ignores a constant of a row.
            bias = bias - bias.amax(-1, keepdim=True)
        if not torch.compiler.is_exporting():
            self.position_bias = bias.detach()
        return bias

    def project(self, x: Tensor, *, biased: bool = False) -> tuple[Tensor, ...]:
        """Project `[B, N, width]` to `[B, H, N, D]` each; `biased` adds the biases of keys and values too."""
        projected = F.linear(x, self.weight, self.bias if biased else None)
        q, *memory = split_heads(projected, self.count, self.heads)
        if self.query_bias is not None and not biased:
            q = q + self.query_bias
        return q, *memory


class SelfAttention(JoinedAttention):
    """The self-attention branch of a layer, `[P, L, width]` → the same, or `[P, Q, width]` for some queries."""

    def __init__(self, layer: TransformerLayer, *, first_only: bool = False) -> None:
        projections, branch = layer.attention.self, layer.attention.output
        linears = [projections.key, projections.value]
        if not first_only:
            linears.insert(0, projections.query)
        weight, bias = _concatenated(linears, "weight"), _concatenated(linears, "bias")
        super().__init__(weight, bias, (branch.dense.weight, branch.dense.bias), projections.heads)
        self.norm, self.first_only = branch.LayerNorm, first_only
        self.first = projections.query if first_only else None

    def forward(self, x: Tensor, mask: Tensor, queries: Tensor | None = None) -> Tensor:
        """Attend with `mask` `[P, 1, Q or 1, L]`; `queries` `[P, Q, width]` default to token 0 where `first_only`."""
        if queries is None:
            queries = x[:, :1] if self.first_only else x
        if self.first is None:
            q, k, v = self.project(x)
        else:
            q = self.first(queries).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            k, v = self.project(x)
        context = attention(q, k, v, mask, "primitives").transpose(1, 2).flatten(2)
        summed = self.output(context) + queries
        return ops.layer_norm(summed, self.norm.weight, self.norm.bias, self.norm.eps)


def cross_attention(
    layer: TransformerLayer,
    x: Tensor,
    memory: Sequence[Tensor],
    mask: Tensor | None,
    form: AttentionForm,
) -> Tensor:
    """Attend from `[P, L, width]` to keys and values of B memories `[B, H, M, D]`, P / B sequences on each."""
    branch = layer.crossattention
    heads, (keys, values) = branch.self.heads, memory
    q = branch.self.query(x).reshape(keys.shape[0], -1, heads, x.shape[-1] // heads)
    context = attention(q.transpose(1, 2), keys, values, mask, form)
    return branch.output(context.transpose(1, 2).reshape(x.shape), x)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask to one that is added to attention scores: keys `[P, L]`, or any other but for its values."""
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    elif mask.is_floating_point():
        # The lowest value of a dtype would make a row without any real token infinite.
        return mask.clamp(min=MASKED).to(dtype)
    return (1 - mask.to(dtype)) * MASKED


def block_mask(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Compare caption numbers `[P, Q]` and `[P, K]`: a mask `[P, 1, Q, K]`, added to scores."""
    return (queries[:, None, :, None] != keys[:, None, None, :]).to(dtype) * MASKED
