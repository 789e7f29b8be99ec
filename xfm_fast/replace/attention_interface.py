"""`attn_implementation="xfm_fast"`: our attention in any model of transformers that supports custom attention.

Registration is an explicit call: it changes process-wide tables of transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.errors import UnavailableError
from xfm_fast.kernels import ops
from xfm_fast.replace.attention import attend_to_real_keys

NAME = "xfm_fast"
# Vision models of transformers 4 that select an attention class by implementation name: it stays that of PyTorch.
_TABLES = {
    "transformers.models.beit.modeling_beit": "BEIT_SELF_ATTENTION_CLASSES",
    "transformers.models.data2vec.modeling_data2vec_vision": "DATA2VEC_VISION_SELF_ATTENTION_CLASSES",
}


def register_attention(name: str = NAME) -> str:
    """Register our attention with transformers and return its name for `attn_implementation`. Idempotent.

    Padding masks stay `[B, N]` and padded keys are skipped; position biases and float masks are added to the scores
    by a kernel with a gradient; causal masks, grouped heads and the rest run as in `"sdpa"`. A query without visible
    keys gets zeros. Raises UnavailableError without transformers ≥ 4.53.
    """
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise UnavailableError(
            f"transformers with an attention interface is needed ({error}); pip install 'transformers>=4.53'"
        ) from None
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, padding_mask)
    for family, table in _TABLES.items():
        try:
            classes = getattr(import_module(family), table, None)
        except ImportError:
            continue
        if classes is not None:
            classes[name] = classes["sdpa"]
    return name


def padding_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask callback of transformers: `[B, N]` for plain padding, otherwise the mask of `"sdpa"` or eager attention."""
    from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

    config = kwargs.get("config")
    if any(getattr(config, f"use_{kind}relative_position_bias", False) for kind in ("", "shared_")):
        return eager_mask(*args, **kwargs)
    mask = kwargs.get("attention_mask")
    plain = kwargs.get("mask_function") is bidirectional_mask_function and not kwargs.get("kv_offset")
    if plain and mask is not None and mask.ndim == 2 and mask.shape[1] == kwargs.get("kv_length"):
        return mask
    return sdpa_mask(*args, **kwargs)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention `[B, H, L, D]` → `[B, L, H, D]`, with the signature of transformers."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    padding = attention_mask is not None and attention_mask.ndim == 2
    special = query.shape[1] != key.shape[1] or value.shape != key.shape or kwargs.get("softcap") is not None
    if not special:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        position = kwargs.get("position_bias")
        if attention_mask is not None and padding and position is None:
            return attend_to_real_keys(q, k, v, attention_mask, dropout, scaling), None
        bias, causal = position, kwargs.get("is_causal")
        if attention_mask is None:
            causal = getattr(module, "is_causal", True) if causal is None else causal
            bias = None if causal else position
        elif attention_mask.ndim == 4 and attention_mask.is_floating_point():
            bias = attention_mask if position is None else position + attention_mask
        elif not padding:
            bias = None
        if bias is not None and bias.ndim == 4 and query.shape[0] % bias.shape[0] == 0:
            keys = attention_mask.bool() if attention_mask is not None and padding else None
            bias = bias.to(query.dtype) if torch.float64 in (bias.dtype, query.dtype) else bias
            return ops.bias_attention(q, k, v, bias, keys, dropout, scale=scaling), None
    if attention_mask is not None and padding:
        attention_mask = attention_mask.bool()[:, None, None, :]
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
