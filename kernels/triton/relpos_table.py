"""BEiT's relative position bias: from the table to the padded bias, and from its gradient back to the table."""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..checks import BIAS_TILE
from .launch import KernelSpec, LaunchConfig, Variant, architecture, launch_options


def bias_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp16 for both half precisions: 8 times as precise as bf16, and one instruction less per two scores."""
    return torch.float32 if dtype == torch.float32 else torch.float16


FRAGMENT_HEAD_DIMS = (64,)


@triton.jit
def fragment_rows(quarter, lines):
    """Return the rows of the lines `[64]` of a quarter of a tile of 128 x 64 scores in fragment layout.

    On Hopper, a thread of eight warps holds rows 16·warp + lane / 4 and 8 more of the accumulators, and in each the
    columns 2 · (lane % 4) and 1 more of every eight. Tiles are stored as `[256, 32]`, so that a thread loads its 32
    elements as four times 16 bytes, coalesced within the warp.
    """
    return lines // 8 * 16 + quarter // 2 * 8 + lines % 8


@triton.jit
def fragment_columns(quarter, elements):
    """Return the columns of the elements `[32]` of every line of a quarter; see `fragment_rows`."""
    return quarter % 2 * 32 + elements // 2 % 4 * 8 + elements // 8 * 2 + elements % 2


@triton.jit
def unfold_fragments(words):
    """Unpack a tile in fragment layout, `[256, 16]` words of two neighbours, to `[128, 64]` fp16.

    No element leaves its thread.
    """
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return (
        tl.join(low, high)
        .reshape(2, 2, 8, 8, 4, 4, 2)
        .permute(2, 0, 3, 1, 5, 4, 6)
        .reshape(128, 64)
    )


@triton.jit
def first_columns(tile, COLUMNS: tl.constexpr):
    """Return the first 16, 32 or all 64 columns of a tile `[128, 64]`."""
    if COLUMNS < 64:
        tile, _ = tl.split(tile.reshape(128, 2, 32).permute(0, 2, 1))
    if COLUMNS < 32:
        tile, _ = tl.split(tile.reshape(128, 2, 16).permute(0, 2, 1))
    return tile


@triton.jit(do_not_specialize=["heads", "height", "width"])
def bias_kernel(
    entries_ptr,
    largest_ptr,
    bias_ptr,
    stride_bias,
    heads,
    height,
    width,
    inverse,
    LARGEST: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    FRAGMENTS: tl.constexpr = False,
):
    """Gather ROWS queries (keys if TURNED) and BLOCK keys (queries) of one head's bias, divided by the scale.

    Each query's maximum is subtracted, which changes no softmax and saves digits for differences: for a patch, that of
    its window (`largest_ptr`, `[H, N - 1]`) or of its entry for the class token. Entries `[H, entries]` are fp32, in
    the order of `reference.relative_position_index`; columns beyond the last receive -inf.
    """
    tokens = 1 + height * width
    h = tl.program_id(1).to(tl.int64)
    lines, elements = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    tile, quarter = tl.program_id(0) // 4, tl.program_id(0) % 4
    if FRAGMENTS:
        rows = tile * 128 + fragment_rows(quarter, lines)
        columns = tl.program_id(2) * 64 + fragment_columns(quarter, elements)
    else:
        rows = tl.program_id(0) * ROWS + lines
        columns = tl.program_id(2) * BLOCK + elements
    # Rows beyond the last repeat it; their values have no effect.
    present = tl.minimum(rows, tokens - 1)
    row_y, row_x = (present - 1) // width, (present - 1) % width
    column_y, column_x = (columns - 1) // width, (columns - 1) % width
    span = 2 * width - 1
    patches = (2 * height - 1) * span
    # The entry of two patches is a sum of a term of the row and one of the column; the class token has its own entries.
    sign = -1 if TURNED else 1
    of_row = sign * (row_y * span + row_x) + (height - 1) * span + width - 1
    of_column = -sign * (column_y * span + column_x)
    row_class, column_class = patches + (1 if TURNED else 0), patches + (0 if TURNED else 1)
    patch = (rows > 0).to(tl.int32)
    entry = tl.where(rows > 0, of_row, row_class)[:, None] + of_column[None, :] * patch[:, None]
    first = tl.where(rows > 0, column_class, patches + 2)
    entry = tl.where((columns == 0)[None, :], first[:, None], entry)
    inside = (columns < tokens)[None, :]
    entries_ptr += h * (patches + 3)
    queries = columns if TURNED else present
    windows = largest_ptr + h * (tokens - 1) + queries - 1
    largest = tl.load(windows, mask=(queries > 0) & (queries < tokens), other=float("-inf"))
    largest = tl.maximum(largest, tl.load(entries_ptr + patches + 1))
    of_class = tl.maximum(tl.load(entries_ptr + patches), tl.load(entries_ptr + patches + 2))
    largest = tl.where(queries > 0, largest, of_class)
    value = tl.load(entries_ptr + entry, mask=inside, other=0.0)
    value = (value - (largest[None, :] if TURNED else largest[:, None])) * inverse
    # Comparisons with NaN are false, so NaN is preserved.
    value = tl.where(inside, tl.where(value < -LARGEST, -LARGEST, value), float("-inf"))
    if FRAGMENTS:
        tiles = (h * tl.cdiv(tokens, 128) + tile) * (stride_bias // 64) + tl.program_id(2)
        base = bias_ptr + tiles * 8192 + quarter * (ROWS * BLOCK)
        tl.store(base + (lines[:, None] * BLOCK + elements[None, :]), value)
    else:
        base = bias_ptr + h * tokens * stride_bias
        tl.store(
            base + rows[:, None] * stride_bias + columns[None, :],
            value,
            mask=(rows < tokens)[:, None],
        )


def _bias_config(variant: Variant, dtype: str, arch: int) -> LaunchConfig:
    # A quarter of a tile of fragments is contiguous in memory.
    rows, block = (64, 32) if variant.get("fragments") else (32, 128)
    return LaunchConfig({"ROWS": rows, "BLOCK": block}, num_warps=4, num_stages=1)


BIAS = KernelSpec(
    name="relpos_bias",
    kernel=bias_kernel,
    variants=({"turned": False}, {"turned": True}, {"turned": False, "fragments": True}),
    config=_bias_config,
    constants=lambda variant, dtype, config: {
        # Quotients so far below their query's maximum have weight 0 in a softmax, and stay finite.
        "LARGEST": 1e30 if dtype == "fp32" else 60000.0,
        "TURNED": variant["turned"],
        "FRAGMENTS": variant.get("fragments", False),
    },
    types=lambda variant, dtype: {"bias_ptr": "*fp32" if dtype == "fp32" else "*fp16"},
    tensor_core=False,
)


def materialise_bias(
    table: Tensor,
    window: tuple[int, int],
    dtype: torch.dtype,
    scale: float,
    *,
    turned: bool = False,
    fragments: bool = False,
) -> Tensor:
    """Return the bias of all (query, key) pairs over the scale, at most 0, with -inf columns up to a multiple of 128.

    `[H, N, N_pad]` in `bias_dtype(dtype)`, `turned` with keys as rows; in fragments `[H, N_pad / 128, N_pad / 64, 256,
    32]`, see `fragment_rows`. Each query's maximum is 0. Quotients below -60000 in fp16 and -1e30 in fp32 are clamped,
    -inf with them: at head dimension 64, a bias of 7500 below another has weight 0.
    """
    table = table.detach()
    tokens, heads = 1 + window[0] * window[1], table.shape[1]
    storage = bias_dtype(dtype)
    shape = checks.bias_shape(tokens, heads, fragments=fragments)
    padded = triton.cdiv(tokens, BIAS_TILE) * BIAS_TILE
    # Contiguous entries of a head, for the gather.
    entries = torch.empty((heads, table.shape[0]), dtype=torch.float32, device=table.device)
    entries.copy_(table.t())
    # The window of a query at (y, x) begins at (y, x) in the table of distances.
    distances = entries[:, :-3].reshape(heads, 2 * window[0] - 1, 2 * window[1] - 1)
    largest = F.max_pool2d(F.max_pool2d(distances, (window[0], 1), 1), (1, window[1]), 1)
    bias = torch.empty(shape, dtype=storage, device=table.device)
    options, config = launch_options(BIAS, bias, turned=turned, fragments=fragments)
    if fragments:
        grid = 4 * padded // 128, heads, padded // 64
    else:
        rows, columns = config.tiles["ROWS"], config.tiles["BLOCK"]
        grid = triton.cdiv(tokens, rows), heads, padded // columns
    bias_kernel[grid](entries, largest, bias, padded, heads, *window, 1 / scale, **options)
    return bias


def takes_fragments(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the forward kernel reads its bias in fragments: in half precision on Hopper."""
    half = dtype in (torch.float16, torch.bfloat16)
    return half and head_dim in FRAGMENT_HEAD_DIMS and 90 <= architecture(device) < 100


@triton.jit(do_not_specialize=["splits", "heads", "height", "width"])
def table_gradient_kernel(
    dbias_ptr,
    dtable_ptr,
    stride_bias,
    splits,
    heads,
    height,
    width,
    TURNED: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_DX: tl.constexpr,
):
    """Sum the bias gradients of all pairs with one entry of the table, in a fixed order.

    A program owns one head, one vertical distance and BLOCK_DX horizontal ones; it visits queries (y, x) with that
    distance to their keys row by row. The last program of a head owns the three entries of the class token. TURNED
    exchanges queries and keys: distances are those of keys to queries.
    """
    tokens = 1 + height * width
    span = 2 * width - 1
    blocks = tl.cdiv(span, BLOCK_DX)
    h = tl.program_id(1)
    program = tl.program_id(0)
    last = (2 * height - 1) * blocks
    split_size = tl.cast(heads, tl.int64) * tokens * stride_bias
    head_base = dbias_ptr + h.to(tl.int64) * tokens * stride_bias
    if program < last:
        dy = program // blocks - (height - 1)
        columns = program % blocks * BLOCK_DX + tl.arange(0, BLOCK_DX)
        dx = columns - (width - 1)
        # Reduced over x at the end: a reduction over a tile's rows would dominate the loop.
        acc = tl.zeros([BLOCK_X, BLOCK_DX], tl.float32)
        for split in range(splits):
            for first in range(0, width, BLOCK_X):
                x = first + tl.arange(0, BLOCK_X)
                key_x = x[:, None] - dx[None, :]
                inside = (x < width)[:, None] & (key_x >= 0) & (key_x < width)
                y = tl.maximum(dy, 0)
                pair = (1 + y * width + x[:, None]) * stride_bias + 1 + (y - dy) * width + key_x
                pointers = head_base + split * split_size + pair
                for _ in range(y, tl.minimum(height, height + dy)):
                    acc += tl.load(pointers, mask=inside, other=0.0)
                    pointers += width * (stride_bias + 1)
        rows = (dy + height - 1) * span + columns
        if TURNED:
            rows = (2 * height - 1) * span - 1 - rows
        tl.store(dtable_ptr + rows * heads + h, tl.sum(acc, 0), mask=columns < span)
    else:
        of_first_row = tl.zeros([BLOCK_DX], tl.float32)
        of_first_column = tl.zeros([BLOCK_DX], tl.float32)
        to_itself = 0.0
        for split in range(splits):
            base = head_base + split * split_size
            to_itself += tl.load(base)
            for first in range(1, tokens, BLOCK_DX):
                patch = first + tl.arange(0, BLOCK_DX)
                of_first_row += tl.load(base + patch, mask=patch < tokens, other=0.0)
                of_first_column += tl.load(
                    base + patch * stride_bias, mask=patch < tokens, other=0.0
                )
        class_rows = dtable_ptr + (2 * height - 1) * span * heads + h
        tl.store(class_rows + (heads if TURNED else 0), tl.sum(of_first_row, 0))
        tl.store(class_rows + (0 if TURNED else heads), tl.sum(of_first_column, 0))
        tl.store(class_rows + 2 * heads, to_itself)


def _table_config(variant: Variant, dtype: str, arch: int) -> LaunchConfig:
    width = variant["width"]
    tiles = {
        "BLOCK_X": min(32, triton.next_power_of_2(width)),
        "BLOCK_DX": min(64, triton.next_power_of_2(2 * width - 1)),
    }
    return LaunchConfig(tiles, num_warps=2 if width <= 16 else 4, num_stages=2)


TABLE_GRADIENT = KernelSpec(
    name="relpos_table_gradient",
    kernel=table_gradient_kernel,
    variants=({"width": 14}, {"width": 24}),
    config=_table_config,
    constants=lambda variant, dtype, config: {"TURNED": variant.get("turned", True)},
    types=lambda variant, dtype: {"dbias_ptr": "*fp32", "dtable_ptr": "*fp32"},
    tensor_core=False,
    dtypes=("fp32",),
)
KERNELS = [BIAS, TABLE_GRADIENT]


def table_gradient(dbias: Tensor, window: tuple[int, int], *, turned: bool = False) -> Tensor:
    """Sum the bias gradients `[splits, H, N, N_pad]` in fp32 into the table's: `[(2wh-1)(2ww-1)+3, H]` in fp32.

    Rows are queries and columns keys, or vice versa if `turned`.
    """
    height, width = window
    splits, heads = dbias.shape[:2]
    rows = (2 * height - 1) * (2 * width - 1) + 3
    dtable = torch.empty((rows, heads), dtype=torch.float32, device=dbias.device)
    options, config = launch_options(TABLE_GRADIENT, dbias, width=width, turned=turned)
    programs = (2 * height - 1) * triton.cdiv(2 * width - 1, config.tiles["BLOCK_DX"]) + 1
    table_gradient_kernel[(programs, heads)](
        dbias, dtable, dbias.stride(2), splits, heads, height, width, **options
    )
    return dtable
