"""Attention within windows of patches, with learned biases of relative position: Swin and Swin V2.

Windows lie one after the other in the batch, all of an image together. Where the grid was shifted before it was cut,
every window of an image has a mask of its own, the same in all images: bias and mask are one bias of `[W, H, N, N]`,
which is read once for the whole batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.kernels.derived import derived
from xfm_fast.nn.attention import check_heads, check_probability, qkv_bias

# Scores of cosine attention stay below 100 (arXiv 2111.09883, section 3.2).
_LARGEST_LOGIT_SCALE = math.log(100.0)


def window_position_index(window: tuple[int, int]) -> Tensor:
    """Row of the position table for every (query, key) pair of a window: `[N, N]`, N = wh·ww.

    Patches are row-major; the entry is `(dy + wh - 1)·(2·ww - 1) + (dx + ww - 1)` with (dy, dx) = query - key (Swin,
    arXiv 2103.14030).
    """
    height, width = window
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    dy = rows[:, None] - rows[None, :] + height - 1
    dx = columns[:, None] - columns[None, :] + width - 1
    return dy * (2 * width - 1) + dx


def shifted_window_mask(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """The masks of windows whose grid was rolled by `-shift`: `[W, N, N]`, 0 within a region and -inf beyond.

    Args:
        grid: (height, width) in patches, multiples of the window's.
        window: (wh, ww) in patches.
        shift: (sh, sw) in patches, smaller than the window.

    Raises:
        InputError: a grid that windows do not tile, or a shift that is none.
    """
    for side, size, step in zip(grid, window, shift, strict=True):
        if size < 1 or side < 1 or side % size or not 0 <= step < size:
            raise InputError(
                f"windows of {window} patches, shifted by {shift}, do not tile a grid of {grid}: pad the grid to"
                " multiples of the window, and shift by less than a window"
            )
    # Along each axis, the last window holds what was next to it and what was rolled round from the other end.
    sides = zip(grid, shift, strict=True)
    rows, columns = (torch.arange(side).ge(side - step).long() for side, step in sides)
    region = _partitioned((2 * rows[:, None] + columns[None, :])[None, ..., None], window)[..., 0]
    return torch.zeros(region.shape[0], *2 * region.shape[1:]).masked_fill(
        region[:, :, None] != region[:, None, :], -torch.inf
    )


def partition_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """A grid `[B, H, W, C]` → windows `[B·(H/wh)·(W/ww), wh·ww, C]`, all of an image together, row-major.

    Raises:
        InputError: a grid that windows do not tile.
    """
    if x.ndim != 4 or x.shape[1] % window[0] or x.shape[2] % window[1]:
        raise InputError(
            f"x is {[*x.shape]}; windows of {window} patches need [B, H, W, C] with H and W multiples of theirs: pad it"
        )
    return _partitioned(x, window)


def merge_windows(windows: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """The inverse of `partition_windows`: `[B·W, wh·ww, C]` → `[B, H, W, C]` for a grid of (H, W).

    Raises:
        InputError: windows that do not fill whole grids.
    """
    down, across = grid[0] // window[0], grid[1] // window[1]
    fills = grid[0] % window[0] == 0 and grid[1] % window[1] == 0 and down * across > 0
    if (
        windows.ndim != 3
        or not fills
        or windows.shape[1] != window[0] * window[1]
        or windows.shape[0] % (down * across)
    ):
        raise InputError(f"windows are {[*windows.shape]}; windows of {window} patches do not fill grids of {grid}")
    parts = windows.view(-1, down, across, *window, windows.shape[-1])
    return parts.transpose(2, 3).reshape(-1, *grid, windows.shape[-1])


def _partitioned(x: Tensor, window: tuple[int, int]) -> Tensor:
    height, width = window
    parts = x.view(x.shape[0], x.shape[1] // height, height, x.shape[2] // width, width, x.shape[3])
    return parts.transpose(2, 3).reshape(-1, height * width, x.shape[3])


class _Windows(nn.Module):
    """Projections, dropout and the bias of a window's positions; how scores are made is each version's own."""

    index: Tensor

    def __init__(self, width: int, heads: int, window: tuple[int, int], dropout: float) -> None:
        super().__init__()
        check_heads(width, heads)
        if min(window) < 1:
            raise InputError(f"window={window} holds no patch; it is (height, width) in patches")
        check_probability(dropout)
        self.heads = heads
        self.window = window
        self.dropout = dropout
        self.proj = nn.Linear(width, width)
        self.register_buffer("index", window_position_index(window).view(-1), persistent=False)

    def _biased(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        bias = self.position_bias()
        if mask is not None:
            bias = bias + mask[:, None].to(bias.dtype)
        dropout = self.dropout if self.training else 0.0
        attended = ops.bias_attention(q, k, v, bias, None, dropout, scale=scale).flatten(2)
        return ops.linear(attended, self.proj.weight, self.proj.bias)

    def _split(self, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        tokens = self.window[0] * self.window[1]
        if x.ndim != 3 or x.shape[1] != tokens:
            raise InputError(f"x is {[*x.shape]}; windows of {self.window} patches need [B·W, {tokens}, width]")
        if mask is not None and (mask.shape[1:] != (tokens, tokens) or not mask.shape[0] or x.shape[0] % mask.shape[0]):
            raise InputError(
                f"mask is {[*mask.shape]} for {x.shape[0]} windows; it must be [W, {tokens}, {tokens}] for the W"
                " windows of an image"
            )
        return ops.linear(x, weight, bias).unflatten(-1, (3, self.heads, -1)).unbind(2)

    def position_bias(self) -> Tensor:
        raise NotImplementedError

    def _looked_up(self, table: Tensor) -> Tensor:
        tokens = self.window[0] * self.window[1]
        return table[self.index].view(tokens, tokens, self.heads).permute(2, 0, 1)[None]

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}, dropout={self.dropout}"


class WindowAttention(_Windows):
    """Self-attention within windows of patches with a table of biases (Swin, arXiv 2103.14030).

    Example:
        >>> attention = WindowAttention(96, heads=3, window=(7, 7))
        >>> mask = shifted_window_mask((56, 56), (7, 7), (3, 3))
        >>> attention(torch.randn(2 * 64, 49, 96), mask).shape
        torch.Size([128, 49, 96])

    Args:
        width: of the tokens.
        heads: divides the width.
        window: (height, width) in patches.
        dropout: probability of dropping an attention weight in training.

    Raises:
        InputError: heads that do not divide the width, a window without patches, or a dropout outside [0, 1).
    """

    def __init__(self, width: int, heads: int, window: tuple[int, int], *, dropout: float = 0.0) -> None:
        super().__init__(width, heads, window, dropout)
        self.qkv = nn.Linear(width, 3 * width)
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Swin's initialisation: truncated normal matrices and table, no bias of the projections."""
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend, each window to itself.

        Args:
            x: `[B·W, wh·ww, width]`, the W windows of an image together.
            mask: `[W, wh·ww, wh·ww]`, added to the scores, such as that of `shifted_window_mask`.

        Returns:
            `[B·W, wh·ww, width]`.

        Raises:
            InputError: another number of tokens, or a mask that does not fit.
        """
        q, k, v = self._split(x, mask, self.qkv.weight, self.qkv.bias)
        return self._biased(q, k, v, mask, None)

    def position_bias(self) -> Tensor:
        """`[1, heads, wh·ww, wh·ww]`."""
        return self._looked_up(self.relative_position_bias_table)


class CosineWindowAttention(_Windows):
    """Self-attention within windows by cosines, with a bias that a small network makes (Swin V2, arXiv 2111.09883).

    Scores are cosines times a learned factor of each head, up to 100; the bias is 16 times the sigmoid of what a
    network makes of the distance, on a logarithmic scale, so that a window may grow after pretraining.

    Example:
        >>> attention = CosineWindowAttention(96, heads=3, window=(8, 8))
        >>> attention(torch.randn(128, 64, 96)).shape
        torch.Size([128, 64, 96])

    Args:
        width: of the tokens.
        heads: divides the width.
        window: (height, width) in patches.
        pretrained_window: that of the pretraining, which distances are measured by; the window by default.
        hidden: width of the network's hidden layer.
        dropout: probability of dropping an attention weight in training.

    Raises:
        InputError: heads that do not divide the width, a window without patches, or a dropout outside [0, 1).
    """

    distances: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        window: tuple[int, int],
        *,
        pretrained_window: tuple[int, int] | None = None,
        hidden: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, heads, window, dropout)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.logit_scale = nn.Parameter(torch.empty(heads, 1))
        self.position_mlp = nn.Sequential(
            nn.Linear(2, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, heads, bias=False)
        )
        self.register_buffer("distances", _log_distances(window, pretrained_window or window), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Swin V2's initialisation: truncated normal matrices, no bias, scores of ten times the cosine."""
        for linear in (self.qkv, self.proj, self.position_mlp[0], self.position_mlp[2]):
            assert isinstance(linear, nn.Linear)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for zero in (self.q_bias, self.v_bias):
            nn.init.zeros_(zero)
        nn.init.constant_(self.logit_scale, math.log(10.0))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend, each window to itself; arguments and result are those of `WindowAttention`."""
        q, k, v = self._split(x, mask, self.qkv.weight, qkv_bias(self.q_bias, self.v_bias))
        factor = self.logit_scale.clamp(max=_LARGEST_LOGIT_SCALE).exp()
        # The factor is the head's own, so it goes into the queries and leaves 1 as the scale of all.
        q = (F.normalize(q, dim=-1) * factor).to(v.dtype)
        return self._biased(q, F.normalize(k, dim=-1).to(v.dtype), v, mask, 1.0)

    def position_bias(self) -> Tensor:
        """`[1, heads, wh·ww, wh·ww]`; computed once while the network does not change and needs no gradient."""
        parameters = tuple(self.position_mlp.parameters())
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return self._made_bias()
        return derived("window bias", parameters, self._made_bias)

    def _made_bias(self) -> Tensor:
        return 16 * torch.sigmoid(self._looked_up(self.position_mlp(self.distances).view(-1, self.heads)))


def _log_distances(window: tuple[int, int], pretrained: tuple[int, int]) -> Tensor:
    """`[(2wh-1)·(2ww-1), 2]`: distances (dy, dx) over the pretrained window's, from -1 to 1 on a logarithmic scale."""
    axes = []
    for side, before in zip(window, pretrained, strict=True):
        distance = torch.arange(1 - side, side, dtype=torch.float32) * (8 / max(1, before - 1))
        axes.append(distance.sign() * (distance.abs() + 1).log2() / 3)
    return torch.cartesian_prod(*axes)
