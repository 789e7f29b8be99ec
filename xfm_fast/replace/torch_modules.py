"""PyTorch's attention and encoder layers, and LayerNorm where a kernel is faster."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from xfm_fast.kernels import ops
from xfm_fast.kernels.backend import resolve
from xfm_fast.replace.bert_layer import Packed, plan
from xfm_fast.replace.structure import Attend, Parts, post_norm, pre_norm
from xfm_fast.replace.swap import (
    Fused,
    Kinds,
    Rule,
    Settings,
    find,
    is_erf_gelu,
    observed,
    original_class,
    probability,
    why_not_bypassed,
)

_ATTENTION_PARTS: dict[str, Kinds] = {"out_proj": NonDynamicallyQuantizableLinear}
_LAYER_PARTS: dict[str, Kinds] = {
    "self_attn": nn.MultiheadAttention,
    "self_attn.out_proj": NonDynamicallyQuantizableLinear,
    "linear1": nn.Linear,
    "dropout": nn.Dropout,
    "linear2": nn.Linear,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
    "dropout1": nn.Dropout,
    "dropout2": nn.Dropout,
}


class FusedMultiheadAttention(Fused):
    """`torch.nn.MultiheadAttention` without attention weights, or with them for inference in another dtype.

    (The original would run in autocast there, which copies the weights for every position of a sequence-first batch.)
    """

    bypassed: ClassVar[Mapping[str, Kinds]] = _ATTENTION_PARTS

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        attention = cast(Any, module)
        if attention.bias_k is not None:
            return "add_bias_kv appends a key and a value"
        if attention.add_zero_attn:
            return "add_zero_attn appends a key and a value"
        return why_not_bypassed(module, _ATTENTION_PARTS)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Any:
        rest = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        given = [t for t in (query, key, value) if t.ndim == 3 and not t.is_nested]
        module, settings = cast(Any, self), self.settings
        original = need_weights and (settings.dtype is None or torch.is_grad_enabled())
        if original or len(given) < 3 or (is_causal and attn_mask is None) or not self.intact():
            return super().forward(query, key, value, *rest)
        with settings.own_types(query.device):
            # Self-attention is detected by identity, which the transpose below would destroy.
            same = (key is query, value is key)
            if not module.batch_first:
                query = query.transpose(0, 1)
                key = query if same[0] else key.transpose(0, 1)
                value = key if same[1] else value.transpose(0, 1)
            q, k, v = _project(module, query, key, value, settings)
            mask = _merged(key_padding_mask, attn_mask, q, k.shape[1])
            dropout_p, weights = module.dropout if self.training else 0.0, None
            if need_weights:
                context, weights = _attend_with_weights(q, k, v, mask, dropout_p)
                weights = weights.mean(1) if average_attn_weights else weights
            else:
                context = _attend(q, k, v, mask, dropout_p)
            out = settings.linear(context, module.out_proj.weight, module.out_proj.bias)
        return (out if module.batch_first else out.transpose(0, 1)), weights


class FusedTransformerEncoderLayer(Fused):
    """`torch.nn.TransformerEncoderLayer`: one GEMM for q, k, v; activation, residual and norm fused."""

    bypassed: ClassVar[Mapping[str, Kinds]] = _LAYER_PARTS

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        layer = cast(Any, module)
        if layer.norm1.bias is None or layer.norm2.bias is None:
            return "its norms have no bias"
        reason = why_not_bypassed(module, _LAYER_PARTS)
        return reason or FusedMultiheadAttention.refusal(layer.self_attn, settings)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.ndim != 3 or src.is_nested or (is_causal and src_mask is None) or not self.intact():
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        batch_first = cast(Any, self).self_attn.batch_first

        def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
            if not batch_first:
                q, k, v = (t.transpose(0, 1) for t in (q, k, v))
            mask = _merged(src_key_padding_mask, src_mask, q, k.shape[1])
            out = _attend(q, k, v, mask, dropout_p)
            return out if batch_first else out.transpose(0, 1)

        with self.settings.own_types(src.device):
            return self.run(src, attend)

    def run(self, x: Tensor, attend: Attend) -> Tensor:
        """The layer on `[..., width]`; `attend` maps q, k, v `[..., H, D]` to `[..., width]`."""
        order = pre_norm if cast(Any, self).norm_first else post_norm
        return order(self._parts(), self.settings.operand(x), attend, self.settings)

    def _parts(self) -> Parts:
        layer: Any = self
        attention, activation, linear1 = layer.self_attn, layer.activation, layer.linear1
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        if weight is None:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            qkv = tuple(zip(weights, (None,) * 3 if bias is None else bias.chunk(3), strict=True))
        else:
            qkv = ((weight, bias),)
        return Parts(
            norms=(layer.norm1, layer.norm2),
            qkv=qkv,
            heads=attention.num_heads,
            scale=1.0,
            proj=attention.out_proj,
            fc1=linear1,
            fc2=layer.linear2,
            hidden=None if is_erf_gelu(activation) else lambda x, linear: activation(linear(linear1, x)),
            attention_p=attention.dropout if attention.training else 0.0,
            hidden_p=probability(layer.dropout),
            branch_p=(probability(layer.dropout1), probability(layer.dropout2)),
        )


class UnpaddedTransformerEncoder(Fused):
    """`torch.nn.TransformerEncoder` on packed tokens; outputs at padding are zero."""

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return None if settings.unpad else "PyTorch handles its padding; unpad=True skips it in training too"

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        layers = self._layers()
        hidden = src_key_padding_mask
        if layers is None or hidden is None or hidden.dtype != torch.bool or mask is not None or src.ndim != 3:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        batch_first = cast(Any, layers[0]).self_attn.batch_first
        padded = src if batch_first else src.transpose(0, 1)
        planned = plan(~hidden, keep_first=False) if hidden.shape == padded.shape[:2] else None
        if planned is None:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        packing, _ = planned
        cu, longest = packing.cu_seqlens, packing.longest
        attend = Packed(cu, cu, longest, longest)
        with self.settings.own_types(src.device):
            x = packing.pack(padded)
            for layer in layers:
                x = layer.run(x, attend)
        norm = cast(Any, self).norm
        # Unpack after the norm, which would map padding to its bias.
        out = packing.unpad(x if norm is None else norm(x))
        return out if batch_first else out.transpose(0, 1)

    def _layers(self) -> list[FusedTransformerEncoderLayer] | None:
        """The layers, if all can run on packed tokens now."""
        layers = find(self, "layers")
        norm = find(self, "norm")
        if torch.compiler.is_compiling() or layers is None or (norm is not None and observed(norm)):
            return None
        fused = [layer for layer in layers.children() if isinstance(layer, FusedTransformerEncoderLayer)]
        ready = all(layer.intact() and not observed(layer) for layer in fused)
        return fused if fused and ready and len(fused) == len(list(layers.children())) else None


class FusedLayerNorm(Fused):
    """`torch.nn.LayerNorm` over one dimension, by a kernel."""

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        norm = cast(nn.LayerNorm, module)
        if norm.weight is None or norm.bias is None:
            return "it has no weight or no bias"
        if len(norm.normalized_shape) != 1:
            return f"it normalises {len(norm.normalized_shape)} dimensions"
        chosen = resolve(settings.backend, norm.weight)
        return None if chosen == "triton" else "PyTorch's is as fast here; a kernel replaces it on NVIDIA GPUs"

    def forward(self, input: Tensor) -> Tensor:
        norm, settings = cast(Any, self), self.settings
        with settings.own_types(input.device):
            return _norm(norm, settings.operand(input), settings)


def _project(attention: Any, query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> tuple[Tensor, ...]:
    """q, k, v `[..., H, D]` of a MultiheadAttention, with as few GEMMs as the inputs allow."""
    heads, width, bias = attention.num_heads, attention.embed_dim, attention.in_proj_bias
    # Convert a shared input once, so that it stays one tensor.
    converted = {id(t): settings.operand(t) for t in (query, key, value)}
    query, key, value = (converted[id(t)] for t in (query, key, value))
    packed = attention.in_proj_weight
    if packed is None:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        made = [settings.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
    elif key is query and value is key:
        made = settings.linear(query, packed, bias).chunk(3, -1)
    else:
        weights, both = (packed[:width], packed[width:]), (None, None) if bias is None else (bias[:width], bias[width:])
        made = [settings.linear(query, weights[0], both[0])]
        if value is key:
            made += settings.linear(key, weights[1], both[1]).chunk(2, -1)
        else:
            halves = (None, None) if both[1] is None else both[1].chunk(2)
            for x, w, b in zip((key, value), weights[1].chunk(2), halves, strict=True):
                made.append(settings.linear(x, w, b))
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in made)
    return q, k, v


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """Attention of q `[B, L, H, D]` over k and v `[B, S, H, D]`: `[B, L, H·D]`."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p).transpose(1, 2).flatten(2)


def _attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """The same, and the weights `[B, H, L, S]`."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout_p, dropout_p > 0)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def _merged(padding: Tensor | None, mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    """Both masks (True hides) as one additive mask that broadcasts to `[B, H, L, S]`."""
    added = None
    if mask is not None:
        added = _additive(mask, q.dtype)
        added = added if mask.ndim == 2 else added.unflatten(0, (q.shape[0], -1))
    if padding is not None:
        hidden = _additive(padding, q.dtype).view(-1, 1, 1, keys)
        added = hidden if added is None else added + hidden
    return added


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _norm(norm: Any, x: Tensor, settings: Settings) -> Tensor:
    return ops.layer_norm(x, *settings.affine(norm.weight, norm.bias), norm.eps, backend=settings.backend)


def _is(kind: type[nn.Module], module: nn.Module) -> bool:
    return original_class(module) is kind


RULES: tuple[Rule, ...] = (
    Rule(
        "UnpaddedTransformerEncoder",
        partial(_is, nn.TransformerEncoder),
        UnpaddedTransformerEncoder,
        "padding left out of all layers",
    ),
    Rule(
        "FusedTransformerEncoderLayer",
        partial(_is, nn.TransformerEncoderLayer),
        FusedTransformerEncoderLayer,
        "one product for q, k, v; activation, residual and norm fused",
    ),
    Rule(
        "FusedMultiheadAttention",
        partial(_is, nn.MultiheadAttention),
        FusedMultiheadAttention,
        "one product for inputs that are the same (calls with need_weights=False)",
    ),
    Rule("FusedLayerNorm", partial(_is, nn.LayerNorm), FusedLayerNorm, "one pass over memory"),
)
