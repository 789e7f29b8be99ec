"""DeBERTa's disentangled attention (arXiv 2006.03654) as a score bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.replace.masks import add_mask
from xfm_fast.replace.structure import Attend, apply_linear
from xfm_fast.replace.swap import Settings
from xfm_fast.replace.vit_block import attention


def disentangled(layer: Any, call: Mapping[str, Any]) -> Attend | None:
    """Attention of a DeBERTa-v2/v3 layer call; None without relative positions.

    Scores are `(q kᵀ + q k_posᵀ[i - j] + (k q_posᵀ)[j - i]) / √(D · terms)`.
    """
    module = layer.attention.self
    mask, places, table = (cast(Any, call.get(name)) for name in ("attention_mask", "relative_pos", "rel_embeddings"))
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not set(module.pos_att_type) <= {"c2p", "p2c"}:
        return None
    if module.relative_attention and not (
        isinstance(places, Tensor) and places.ndim <= 4 and isinstance(table, Tensor)
    ):
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        kinds = [kind for kind in ("c2p", "p2c") if kind in module.pos_att_type]
        scale = (q.shape[-1] * (1 + len(kinds))) ** -0.5
        bias = q.new_zeros((1, 1, 1, 1))
        if module.relative_attention:
            positions = module.pos_dropout(table)[: 2 * module.pos_ebd_size]
            for kind in kinds:
                bias = bias + scale * _toward(kind, module, positions, places, q, k, settings)
        if torch.is_grad_enabled():
            # A query without visible keys (padding) has uniform weights and must not pass gradients to keys.
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale + bias
            weights = scores.masked_fill(~mask.bool(), torch.finfo(q.dtype).min).softmax(-1)
            return torch.einsum("bhnm,bmhd->bnhd", F.dropout(weights, dropout_p), v.to(weights.dtype)).flatten(2)
        shape = (*bias.shape[:2], *mask.shape[-2:]) if bias.shape[-1] == 1 else bias.shape
        added = add_mask(bias.expand(shape), mask.bool(), q.dtype)
        return attention(q, k, v, scale, added, settings, dropout_p=dropout_p)

    return attend


def _toward(kind: str, module: Any, positions: Tensor, places: Any, q: Tensor, k: Tensor, settings: Settings) -> Tensor:
    """Scores `[B, H, N, N]` of content and position: "c2p" queries to positions, "p2c" positions to keys."""
    span = module.pos_ebd_size
    if module.share_att_key:
        layer = module.key_proj if kind == "c2p" else module.query_proj
    else:
        layer = module.pos_key_proj if kind == "c2p" else module.pos_query_proj
    made = apply_linear(layer, positions, settings).unflatten(-1, (q.shape[2], -1))
    content = q if kind == "c2p" else k
    scores = torch.einsum("bnhd,phd->bhnp", content, made.to(content.dtype))
    places = places.reshape(-1, 1, *places.shape[-2:])
    index = (places if kind == "c2p" else -places) + span
    index = index.clamp(0, 2 * span - 1).expand(*scores.shape[:3], places.shape[-1])
    found = scores.gather(-1, index)
    return found if kind == "c2p" else found.transpose(-1, -2)
