"""`attn_implementation="xfm_fast"`: our attention in every model of transformers that lets one choose its own.

Texts attend to real keys only, and biases of position (BEiT, Data2Vec-Vision, Swin, T5) go to `ops.bias_attention` with
their gradient. Registration is a call and no side effect of an import: it changes tables that all models of a process
share, and needs transformers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.errors import UnavailableError
from xfm_fast.kernels import ops
from xfm_fast.replace.bert_layer import attend_to_real_keys

NAME = "xfm_fast"


def register_attention(name: str = NAME) -> str:
    """Make an attention implementation known to transformers: `from_pretrained(..., attn_implementation="xfm_fast")`.

    Masks of padding stay `[B, N]`, and keys at padding are left out; biases and masks of numbers are added to the
    scores by a kernel that also has their gradient; causal masks, grouped heads and what else there is run as in
    `"sdpa"`. A query whose keys are all hidden receives zeros. Registering twice does no harm.

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
    _register_data2vec(name)
    return name


def padding_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of a batch, as transformers asks for it: `[B, N]` for padding alone, otherwise that of `"sdpa"`.

    Models that add a bias of position to the mask themselves get it as numbers.
    """
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
    """Attention `[B, H, L, D]` → `[B, L, H, D]`, as transformers calls it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    padding = attention_mask is not None and attention_mask.ndim == 2
    special = query.shape[1] != key.shape[1] or value.shape != key.shape or kwargs.get("softcap") is not None
    if not special:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        position = kwargs.get("position_bias")
        if attention_mask is not None and padding and position is None:
            return attend_to_real_keys(q, k, v, attention_mask, dropout, scaling), None
        bias = _bias(module, query, attention_mask, position, kwargs.get("is_causal"))
        if bias is not None:
            keys = attention_mask.bool() if attention_mask is not None and padding else None
            return ops.bias_attention(q, k, v, bias, keys, dropout, scale=scaling), None
    if attention_mask is not None and padding:
        attention_mask = attention_mask.bool()[:, None, None, :]
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def _bias(
    module: nn.Module, query: Tensor, mask: Tensor | None, position: Tensor | None, causal: bool | None
) -> Tensor | None:
    """What is added to the scores, `[B or 1, H or 1, L or 1, N]`; None where nothing is, or more than that."""
    numbers = mask if mask is not None and mask.ndim == 4 and mask.is_floating_point() else None
    if position is None:
        added = numbers
    elif numbers is not None:
        added = position + numbers
    elif mask is not None:
        added = position if mask.ndim == 2 else None
    else:
        added = None if (getattr(module, "is_causal", True) if causal is None else causal) else position
    if added is None or added.ndim != 4 or query.shape[0] % added.shape[0]:
        return None
    wide = torch.float64 in (added.dtype, query.dtype)
    return added.to(query.dtype) if wide else added


@cache
def _data2vec_attention(original: type[nn.Module]) -> type[nn.Module]:
    """Data2Vec-Vision's attention, which is a class by the implementation's name and no function."""
    plain: Any = original

    class FastData2VecVisionSelfAttention(plain):
        def forward(
            self,
            hidden_states: Tensor,
            output_attentions: bool = False,
            relative_position_bias: Tensor | None = None,
            interpolate_pos_encoding: bool = False,
            resolution: tuple[int, int] | None = None,
        ) -> Any:
            biased = self.has_relative_position_bias or relative_position_bias is not None
            if output_attentions or not biased:
                return super().forward(
                    hidden_states, output_attentions, relative_position_bias, interpolate_pos_encoding, resolution
                )
            bias = relative_position_bias
            if self.has_relative_position_bias:
                assert resolution is not None
                window = tuple(side // self.config.patch_size for side in resolution)
                own = self.relative_position_bias(window, interpolate_pos_encoding, dim_size=hidden_states.shape[1])
                bias = own if bias is None else own + bias
            shape = (self.num_attention_heads, self.attention_head_size)
            q, k, v = (part(hidden_states).unflatten(-1, shape) for part in (self.query, self.key, self.value))
            bias = bias[None] if bias is not None and bias.ndim == 3 else bias
            dropout = self.dropout.p if self.training else 0.0
            return (ops.bias_attention(q, k, v, bias, None, dropout).flatten(2),)

    return FastData2VecVisionSelfAttention


def _register_data2vec(name: str) -> None:
    try:
        from transformers.models.data2vec import modeling_data2vec_vision as family
    except ImportError:
        return
    # Later versions ask the common table, and have no table of their own.
    classes = getattr(family, "DATA2VEC_VISION_SELF_ATTENTION_CLASSES", None)
    if classes is not None:
        classes[name] = _data2vec_attention(classes["sdpa"])
