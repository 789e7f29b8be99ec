"""Attention as exported graphs spell it: one node for those who know it, or primitives for everyone else."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionForm = Literal["function", "opset23", "primitives"]
"""How a graph spells attention.

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
        # ONNX Runtime's CPU kernel does not broadcast the batch and query dimensions of a mask.
        bias = bias.expand(*q.shape[:3], k.shape[2]) if bias.shape[-2] == 1 else bias
    if form == "opset23":
        return torch.onnx.ops.attention(q, k, v, bias, scale=scale)[0]
    inputs = (q, k, v) if bias is None else (q, k, v, bias)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OPERATOR}", inputs, {"scale": scale}, dtype=q.dtype, shape=q.shape, version=1
    )
