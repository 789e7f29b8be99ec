"""The attention of BEiT's vision transformer as a module over the operations of `xfm_fast.kernels.ops`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.kernels.derived import derived


class RelPosAttention(nn.Module):
    """Self-attention of a class token and a window of patches, with a learned relative position bias (BEiT).

    Queries and values have a bias, keys have none: softmax would cancel it (arXiv 2106.08254).

    Example:
        >>> attention = RelPosAttention(768, heads=12, window=(14, 14))
        >>> attention(torch.randn(8, 197, 768)).shape
        torch.Size([8, 197, 768])

    Args:
        width: size of a token; a multiple of `heads`.
        heads: number of attention heads.
        window: (height, width) in patches.
    """

    def __init__(self, width: int, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise InputError(f"heads={heads} does not divide the width of {width}")
        if min(window) < 1:
            raise InputError(f"window={window} has no patch; it is (height, width) in patches")
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window[0] - 1) * (2 * window[1] - 1) + 3, heads)
        )
        self.proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BEiT's initialisation: truncated normal matrices, zeros elsewhere."""
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        for zero in (self.q_bias, self.v_bias, self.relative_position_bias_table, self.proj.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Attention over `[B, N, width]`, N = 1 + height * width; `key_mask` `[B, N]` is False for keys to ignore."""
        tokens = 1 + self.window[0] * self.window[1]
        if x.ndim != 3 or x.shape[1] != tokens:
            raise InputError(f"x is {[*x.shape]}; a window of {self.window} patches needs [B, {tokens}, width]")
        return ops.linear(self.attend(x, key_mask), self.proj.weight, self.proj.bias)

    def attend(self, x: Tensor, key_mask: Tensor | None = None, norm: nn.LayerNorm | None = None) -> Tensor:
        """`forward` without the output projection, for models that fuse it; `norm` is applied to x first."""
        bias = qkv_bias(self.q_bias, self.v_bias)
        if norm is None:
            qkv = ops.linear(x, self.qkv.weight, bias)
        else:
            qkv = ops.layer_norm_linear(x, norm.weight, norm.bias, norm.eps, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        table = self.relative_position_bias_table
        return ops.relpos_attention(q, k, v, table, self.window, key_mask=key_mask).flatten(2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}"


def qkv_bias(q_bias: Tensor, v_bias: Tensor) -> Tensor:
    """The bias `[3 * width]` of a joint linear layer for q, k and v; cached for inference."""

    def compute() -> Tensor:
        return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])

    if torch.is_grad_enabled() and q_bias.requires_grad:
        return compute()
    return derived("qkv bias", (q_bias, v_bias), compute)
