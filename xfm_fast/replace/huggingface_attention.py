"""`attn_implementation="xfm_fast"`: attention over real keys only, for models of transformers that let one choose."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from xfm_fast.errors import UnavailableError
from xfm_fast.replace.packed_layers import attend_to_real_keys

NAME = "xfm_fast"


def register_attention(name: str = NAME) -> str:
    """Make an attention implementation known to transformers: `from_pretrained(..., attn_implementation="xfm_fast")`.

    Masks of padding stay `[B, N]`, and keys at padding are left out; causal masks, grouped heads and what else there is
    run as in `"sdpa"`. Registering twice does no harm.

    Returns:
        The name, for `attn_implementation` and `model.set_attn_implementation`.

    Raises:
        UnavailableError: transformers is absent, or older than 4.53, which has no interface for masks.
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
    return name


def padding_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of a batch, as transformers asks for it: `[B, N]` for padding alone, otherwise that of `"sdpa"`."""
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

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
    """Attention `[B, H, L, D]` → `[B, L, H, D]`, as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    grouped = query.shape[1] != key.shape[1]
    special = grouped or any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
    if attention_mask is not None and attention_mask.ndim == 2:
        if not special:
            q, k, v = (t.transpose(1, 2) for t in (query, key, value))
            return attend_to_real_keys(q, k, v, attention_mask, dropout, scaling), None
        attention_mask = attention_mask.bool()[:, None, None, :]
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
