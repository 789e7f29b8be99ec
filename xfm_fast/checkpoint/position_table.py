"""Relative-position tables of the vision encoder: size, index, and interpolation to another window.

A table has `(2w - 1)^2 + 3` rows for a window of `w` x `w` patches: one row per offset, row-major, then class query,
class key, and class to class.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from xfm_fast.errors import InputError, needs
from xfm_fast.kernels import reference

CLASS_ROWS = 3
# A cubic spline needs four points per axis, and a window of w has 2w - 1.
_SMALLEST_SOURCE = 3


def table_rows(window: int) -> int:
    """Rows of the table for a `window` x `window` grid of patches."""
    return (2 * window - 1) ** 2 + CLASS_ROWS


def window_of(table: Tensor) -> int:
    """The window of a table `[(2w - 1)^2 + 3, heads]`; raises `InputError` if its shape fits none."""
    if table.dim() != 2:
        raise InputError(f"a relative-position table has shape {list(table.shape)}; give [(2w-1)^2+3, heads]")
    side = math.isqrt(max(table.shape[0] - CLASS_ROWS, 0))
    window = (side + 1) // 2
    if window < 1 or table_rows(window) != table.shape[0]:
        raise InputError(
            f"a relative-position table has {table.shape[0]} rows; a square window w has (2w-1)^2+3, such as 4 or 12"
        )
    return window


def relative_position_index(window: int) -> Tensor:
    """Row of the table for query i and key j, `int64 [w*w + 1, w*w + 1]`; token 0 is the class token."""
    return reference.relative_position_index((window, window))


def interpolate_table(table: Tensor, target_window: tuple[int, int]) -> Tensor:
    """Resample a relative-position table to a square window `(rows, columns)`, as the official loaders do.

    The source offsets lie on a grid whose spacing grows geometrically from the centre, so that the outermost source
    offset meets the outermost target offset; a bicubic spline through them is evaluated at the integers. The three
    class rows are copied. Returns `table` itself if the window is the same, otherwise a new float32 table (float64 for
    float64) on the same device, computed in float64. Raises `InputError` for a table or window that is not square, or
    cannot be reached.
    """
    rows, columns = target_window
    if rows != columns:
        raise InputError(f"target_window={tuple(target_window)} is not square; pad or crop the image to a square")
    if rows < 1:
        raise InputError(f"target_window={tuple(target_window)} has no patches; use at least (1, 1)")
    if not table.is_floating_point():
        raise InputError(f"a relative-position table has dtype {table.dtype}; give a floating-point table")
    source = window_of(table)
    if source == rows:
        return table
    if source < _SMALLEST_SOURCE:
        raise InputError(
            f"a {source}x{source} window is too small to interpolate; start from {_SMALLEST_SOURCE}x{_SMALLEST_SOURCE}"
        )

    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    side_from, side_to = 2 * source - 1, 2 * rows - 1
    matrix = torch.from_numpy(_spline_matrix(side_from, side_to))
    offsets = table[:-CLASS_ROWS].detach().to("cpu", torch.float64).view(side_from, side_from, -1)
    # A bicubic tensor-product spline is the same linear map along either axis, for all heads at once.
    resampled = torch.einsum("yu,xv,uvh->yxh", matrix, matrix, offsets).reshape(side_to**2, -1)
    return torch.cat([resampled.to(table.device, dtype), table[-CLASS_ROWS:].detach().to(dtype)])


def source_positions(side_from: int, side_to: int) -> np.ndarray:
    """Positions of the `side_from` source offsets on the axis of the target offsets `-(side_to // 2) ...`, float64."""
    steps, reach = side_from // 2, side_to // 2
    low, high = 1.01, 1.5
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    positive = np.cumsum([ratio**step for step in range(steps)])
    return np.concatenate([-positive[::-1], [0.0], positive])


@lru_cache(maxsize=16)
def _spline_matrix(side_from: int, side_to: int) -> np.ndarray:
    """Float64 `[side_to, side_from]` matrix that maps values at the source offsets to values at the integers."""
    # scipy costs more to import than the rest of this package, and most runs never interpolate.
    with needs("vision"):
        from scipy.interpolate import make_interp_spline

    x = source_positions(side_from, side_to)
    # The bisection stops short of the outermost target by up to 1e-4; the official spline then repeats its border.
    targets = np.clip(np.arange(side_to) - float(side_to // 2), x[0], x[-1])
    return np.ascontiguousarray(make_interp_spline(x, np.eye(side_from), k=3)(targets))
