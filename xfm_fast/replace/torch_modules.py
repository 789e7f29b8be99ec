"""PyTorch's attention and encoder layers, and LayerNorm where a kernel is faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from xfm_fast.kernels.backend import resolve
from xfm_fast.replace.attention import Attend, Packed, sdpa
from xfm_fast.replace.layer import LayerSpec, Mlp, can_run_packed, register, run_packed
from xfm_fast.replace.structure import apply_norm
from xfm_fast.replace.swap import Fused, ModuleClasses, Settings, observed, why_not_bypassed
from xfm_fast.replace.unpadded import plan


class FusedMultiheadAttention(Fused):
    """`torch.nn.MultiheadAttention` without attention weights, or with them for inference in another dtype.

    (The original would run in autocast, which copies the weights for every position of a
    sequence-first batch.)
    """

    benefit: ClassVar[str] = "one GEMM for equal inputs (calls with need_weights=False)"
    replaces: ClassVar[Any] = (nn.MultiheadAttention,)
    bypassed: ClassVar[Mapping[str, ModuleClasses]] = {"out_proj": NonDynamicallyQuantizableLinear}

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        attention = cast(Any, module)
        if attention.bias_k is not None:
            return "add_bias_kv appends a key and a value"
        if attention.add_zero_attn:
            return "add_zero_attn appends a key and a value"
        return why_not_bypassed(module, cls.bypassed)

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
        module, settings = cast(Any, self), self.settings
        covered = all(t.ndim == 3 and not t.is_nested for t in (query, key, value))
        if need_weights and (settings.dtype is None or torch.is_grad_enabled()):
            covered = False
        if not covered or (is_causal and attn_mask is None) or not self.intact():
            options = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return super().forward(query, key, value, *options)
        self.count()
        with settings.without_autocast(query.device):
            # Self-attention is detected by identity, which the transpose below would destroy.
            key_is_query, value_is_key = key is query, value is key
            if not module.batch_first:
                query = query.transpose(0, 1)
                key = query if key_is_query else key.transpose(0, 1)
                value = key if value_is_key else value.transpose(0, 1)
            q, k, v = _project(module, query, key, value, settings)
            mask = _merged(key_padding_mask, attn_mask, q, k.shape[1])
            dropout_p, weights = module.dropout if self.training else 0.0, None
            if need_weights:
                q, k, v = (t.transpose(1, 2) for t in (q, k, v))
                scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
                if mask is not None:
                    scores = scores + mask
                weights = F.dropout(scores.softmax(-1), dropout_p, dropout_p > 0)
                context = (weights @ v).transpose(1, 2).flatten(2)
                weights = weights.mean(1) if average_attn_weights else weights
            else:
                context = sdpa(q, k, v, mask, dropout_p)
            out = settings.linear(context, module.out_proj.weight, module.out_proj.bias)
        return (out if module.batch_first else out.transpose(0, 1)), weights


def _layer_refusal(layer: Any) -> str | None:
    if layer.self_attn.in_proj_weight is None:
        return "self_attn has separate projections"
    return FusedMultiheadAttention.refusal(layer.self_attn, Settings())


def _layer_attention(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    mask, padding = call.get("src_mask"), call.get("src_key_padding_mask")
    if call["src"].is_nested or (call.get("is_causal") and mask is None):
        return None
    batch_first = layer.self_attn.batch_first

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        if not batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        out = sdpa(q, k, v, _merged(padding, mask, q, k.shape[1]), dropout_p)
        return out if batch_first else out.transpose(0, 1)

    return attend


register(
    LayerSpec(
        layer=nn.TransformerEncoderLayer,
        order=lambda layer: "before" if layer.norm_first else "behind sums",
        attention="self_attn",
        own=(nn.MultiheadAttention,),
        proj="self_attn.out_proj",
        norms=("norm1", "norm2"),
        mlps=(Mlp(("linear1",), "activation", "linear2", dropout="dropout"),),
        heads="self_attn.num_heads",
        weights_p="self_attn.dropout",
        branch_p=("dropout1", "dropout2"),
        scores=_layer_attention,
        also_takes=("src_mask", "src_key_padding_mask", "is_causal"),
        adjust=lambda layer, modules: modules._replace(
            qkv=(layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
        ),
        refuses=_layer_refusal,
        # Its fast path reads the weights of linear layers and does not call them.
        adaptable=False,
    )
)


class UnpaddedTransformerEncoder(Fused):
    """`torch.nn.TransformerEncoder` on packed tokens; outputs at padding are zero."""

    benefit: ClassVar[str] = "padding left out of all layers"
    replaces: ClassVar[Any] = (nn.TransformerEncoder,)

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        if settings.unpad:
            return None
        return "PyTorch handles its padding; unpad=True skips it in training too"

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        module, padding = cast(Any, self), src_key_padding_mask
        layers, padded, planned = list(module.layers), src, None
        covered = mask is None and src.ndim == 3 and not torch.compiler.is_compiling()
        if module.norm is not None and observed(module.norm):
            covered = False
        if (
            covered
            and padding is not None
            and padding.dtype == torch.bool
            and can_run_packed(layers)
        ):
            padded = src if layers[0].self_attn.batch_first else src.transpose(0, 1)
            if padding.shape == padded.shape[:2]:
                planned = plan(~padding, keep_first=False)
        if planned is None:
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        self.count()
        packing, _ = planned
        x = run_packed(layers, packing.pack(padded), Packed.within(packing))
        # Unpack after the norm, which would map padding to its bias.
        out = packing.unpad(x if module.norm is None else module.norm(x))
        return out if layers[0].self_attn.batch_first else out.transpose(0, 1)


class FusedLayerNorm(Fused):
    """`torch.nn.LayerNorm` over one dimension, by our kernel."""

    benefit: ClassVar[str] = "one pass over memory"
    replaces: ClassVar[Any] = (nn.LayerNorm,)

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        norm = cast(nn.LayerNorm, module)
        if norm.weight is None or norm.bias is None:
            return "it has no weight or no bias"
        if len(norm.normalized_shape) != 1:
            return f"it normalises {len(norm.normalized_shape)} dimensions"
        if resolve(settings.backend, norm.weight) == "triton":
            return None
        return "PyTorch's is as fast here; a kernel replaces it on NVIDIA GPUs"

    def forward(self, input: Tensor) -> Tensor:
        self.count()
        norm, settings = cast(Any, self), self.settings
        with settings.without_autocast(input.device):
            return apply_norm(norm, settings.operand(input), settings)


def _project(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, settings: Settings
) -> tuple[Tensor, ...]:
    """Project to q, k, v `[..., H, D]`, with one GEMM for adjacent projections of one input."""
    width, joined, bias = attention.embed_dim, attention.in_proj_weight, attention.in_proj_bias
    separate = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    inputs, outputs, start = (query, key, value), [], 0
    for end in (1, 2, 3):
        if end < 3 and joined is not None and inputs[end] is inputs[start]:
            continue
        rows = slice(start * width, end * width)
        # A slice is another tensor each time, whose converted or packed form would not be cached.
        entire = joined is not None and end - start == 3
        if joined is None:
            weight = separate[start]
        else:
            weight = joined if entire else joined[rows]
        shift = bias if bias is None or entire else bias[rows]
        outputs += settings.linear(inputs[start], weight, shift).chunk(end - start, -1)
        start = end
    return tuple(output.unflatten(-1, (attention.num_heads, -1)) for output in outputs)


def _merged(padding: Tensor | None, mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    """Merge both masks (True hides) into one additive mask that broadcasts to `[B, H, L, S]`."""
    merged = None if mask is None else _additive(mask, q.dtype)
    if merged is not None and merged.ndim == 3:
        merged = merged.unflatten(0, (q.shape[0], -1))
    if padding is None:
        return merged
    key_mask = _additive(padding, q.dtype).view(-1, 1, 1, keys)
    return key_mask if merged is None else merged + key_mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
