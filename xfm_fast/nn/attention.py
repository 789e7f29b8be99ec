"""Attention modules: of images with a position table, of packed texts, and of texts over shared image tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.kernels.derived import derived


class RelPosAttention(nn.Module):
    """Self-attention of a window of patches behind a class token, with a learned relative position bias (BEiT).

    Queries and values have a bias, keys none: it would change nothing (arXiv 2106.08254).

    Example:
        >>> attention = RelPosAttention(768, heads=12, window=(14, 14))
        >>> attention(torch.randn(8, 197, 768)).shape
        torch.Size([8, 197, 768])

    Args:
        width: of the tokens.
        heads: divides the width.
        window: (height, width) in patches.

    Raises:
        InputError: heads that do not divide the width, or a window without patches.
    """

    def __init__(self, width: int, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        check_heads(width, heads)
        if min(window) < 1:
            raise InputError(f"window={window} holds no patch; it is (height, width) in patches")
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
        """BEiT's initialisation: truncated normal matrices, no bias, no preference for any position."""
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        for zero in (self.q_bias, self.v_bias, self.relative_position_bias_table, self.proj.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: `[B, N, width]`, class token first, N = 1 + height·width of the window.
            key_mask: `[B, N]` boolean, False for tokens that no query attends to.

        Returns:
            `[B, N, width]`.

        Raises:
            InputError: another number of tokens.
        """
        tokens = 1 + self.window[0] * self.window[1]
        if x.ndim != 3 or x.shape[1] != tokens:
            raise InputError(f"x is {[*x.shape]}; a window of {self.window} patches needs [B, {tokens}, width]")
        return ops.linear(self.attend(x, key_mask), self.proj.weight, self.proj.bias)

    def attend(self, x: Tensor, key_mask: Tensor | None = None, norm: nn.LayerNorm | None = None) -> Tensor:
        """`forward` before the output projection, for models that fuse it with what follows; arguments as there.

        Args:
            norm: what x passes first.
        """
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


class PackedSelfAttention(nn.Module):
    """Self-attention of sequences that lie one after the other, without padding.

    Example:
        >>> attention = PackedSelfAttention(768, heads=12)
        >>> cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
        >>> attention(torch.randn(12, 768), cu_seqlens, 7).shape
        torch.Size([12, 768])

    Args:
        width: of the tokens.
        heads: divides the width.
        dropout: probability of dropping an attention weight in training.

    Raises:
        InputError: heads that do not divide the width, or a dropout outside [0, 1).
    """

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        check_probability(dropout)
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's initialisation: normal(0, 0.02) matrices, no bias."""
        _initialise(self.qkv, self.proj)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int, key_mask: Tensor | None = None) -> Tensor:
        """Attend, each sequence to itself.

        Args:
            x: `[T, width]` tokens of S sequences.
            cu_seqlens: `[S + 1]` int32 offsets of the sequences, from 0 to T.
            longest: an upper bound of their lengths.
            key_mask: `[T]` boolean, False for tokens that no query attends to.

        Returns:
            `[T, width]`.
        """
        q, k, v = ops.linear(x, self.qkv.weight, self.qkv.bias).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        context = ops.varlen_attention(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            dropout_p=self.dropout if self.training else 0.0,
            key_mask=key_mask,
        )
        return ops.linear(context.flatten(-2), self.proj.weight, self.proj.bias)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}"


class GroupedCrossAttention(nn.Module):
    """Cross-attention of packed texts over image tokens that were projected once and are shared by all their texts.

    Cross-attention has no mask between queries, so the texts of an image are one query sequence.

    Example, five text tokens of two images with 197 tokens each:
        >>> attention = GroupedCrossAttention(768, heads=12, memory_width=1024)
        >>> memory = attention.project_memory(torch.randn(2, 197, 1024)).flatten(0, 1)
        >>> cu_queries = torch.tensor([0, 3, 5], dtype=torch.int32)
        >>> cu_keys = torch.tensor([0, 197, 394], dtype=torch.int32)
        >>> attention(torch.randn(5, 768), memory, cu_queries, cu_keys, 3, 197).shape
        torch.Size([5, 768])

    Args:
        width: of the text tokens.
        heads: divides the width.
        memory_width: of the image tokens; by default that of the text.
        dropout: probability of dropping an attention weight in training.

    Raises:
        InputError: heads that do not divide the width, or a dropout outside [0, 1).
    """

    def __init__(self, width: int, heads: int, *, memory_width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        check_probability(dropout)
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width if memory_width is None else memory_width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BERT's initialisation: normal(0, 0.02) matrices, no bias."""
        _initialise(self.query, self.key_value, self.proj)

    def project_memory(self, memory: Tensor) -> Tensor:
        """Keys and values of image tokens, to be reused for every text: `[..., memory_width]` → `[..., 2, H, D]`."""
        projected = ops.linear(memory, self.key_value.weight, self.key_value.bias)
        return projected.unflatten(-1, (2, self.heads, -1))

    def forward(
        self,
        x: Tensor,
        keys_values: Tensor,
        cu_queries: Tensor,
        cu_keys: Tensor,
        longest_queries: int,
        longest_keys: int,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend, the texts of each of B images to its tokens.

        Args:
            x: `[T, width]` text tokens, grouped by image.
            keys_values: `[K, 2, H, D]` from `project_memory`, image after image.
            cu_queries: `[B + 1]` int32 offsets of the images in x.
            cu_keys: `[B + 1]` int32 offsets of the images in keys_values.
            longest_queries, longest_keys: upper bounds of the lengths; `len(x)` will do for the first.
            key_mask: `[K]` boolean, False for image tokens that no query attends to.

        Returns:
            `[T, width]`.
        """
        q = ops.linear(x, self.query.weight, self.query.bias).unflatten(-1, (self.heads, -1))
        k, v = keys_values.unbind(-3)
        context = ops.varlen_attention(
            q,
            k,
            v,
            cu_queries,
            cu_keys,
            longest_queries,
            longest_keys,
            dropout_p=self.dropout if self.training else 0.0,
            key_mask=key_mask,
        )
        return ops.linear(context.flatten(-2), self.proj.weight, self.proj.bias)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}"


def qkv_bias(q_bias: Tensor, v_bias: Tensor) -> Tensor:
    """The bias of one product for q, k and v, `[3 * width]`, from those of queries and values: keys have none."""

    def compute() -> Tensor:
        return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])

    if torch.is_grad_enabled() and q_bias.requires_grad:
        return compute()
    return derived("qkv bias", (q_bias, v_bias), compute)


def check_probability(dropout: float) -> None:
    """A dropout is below 1."""
    if not 0 <= dropout < 1:
        raise InputError(f"dropout={dropout} is no probability below 1")


def check_heads(width: int, heads: int) -> None:
    """Heads share the width evenly."""
    if heads < 1 or width % heads:
        raise InputError(f"heads={heads} does not divide the width of {width}")


def _initialise(*linears: nn.Linear) -> None:
    for linear in linears:
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
