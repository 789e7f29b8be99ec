"""Cross-entropy over a vocabulary on a GPU, without the logits of all rows.

cuBLAS multiplies a block of rows with a slice of the vocabulary into one buffer, small enough to stay in the
second-level cache, and one kernel passes over it: the forward folds the slice into the running softmax of every row,
the backward recomputes the slice and replaces it by its gradient, the operand of two more GEMMs.

So a row saves two numbers, and forward and backward take four GEMMs instead of the CPU path's three: here GEMMs are
cheap, and fp32 gradients of the vocabulary from several blocks of rows are not. A slice of dw is written once.
"""

# Triton's stubs know neither launch options nor that a constant is passed as a plain number.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import Needs, RowStatistics, Vocabulary
from .launch import LaunchConfig, launch_options, multiprocessors
from .rows import load_fp32, row_spec

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# Columns of a slice, and bytes of a block of it: half of an H100's or A100's second-level cache.
_SLICE = 8192
_BUFFER_BYTES = 24 << 20


@triton.jit
def load_slice(pointers, offsets, columns):
    """Load logits of a slice in fp32, -inf beyond its columns.

    A row of the buffer is longer than the slice. Elements up to the next multiple of 16 are loaded, and stored, with
    it: an arbitrary mask would make every load as narrow as one element.
    """
    logits = load_fp32(pointers, offsets < (columns + 15) // 16 * 16)
    return tl.where(offsets < columns, logits, float("-inf"))


@triton.jit(do_not_specialize=["start", "columns", "vocabulary", "ignore_index"])
def running_softmax_kernel(
    logits_ptr,
    target_ptr,
    maximum_ptr,
    sum_ptr,
    picked_ptr,
    total_ptr,
    loss_ptr,
    stride_logits,
    start,
    columns,
    vocabulary,
    ignore_index,
    smoothing,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold slice `[start, start + columns)` of a row into its maximum, sum, target logit and total.

    The last slice stores the logarithm of the sum, and the loss: 0 where ignored, NaN for a target outside.
    """
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    base = logits_ptr + row.to(tl.int64) * stride_logits
    logits = load_slice(base + offsets, offsets, columns)
    # If all logits are -inf, differences from the maximum would be NaN.
    maximum = tl.maximum(tl.max(logits, 0), -3.0e38)
    here = (target >= start) & (target < start + columns)
    picked = load_fp32(base + (target - start), here)
    total = picked
    if SMOOTH:
        total = tl.sum(tl.where(inside, logits, 0.0), 0)
    if FIRST:
        sums = tl.sum(tl.exp(logits - maximum), 0)
    else:
        before = tl.load(maximum_ptr + row)
        maximum = tl.maximum(maximum, before)
        sums = tl.load(sum_ptr + row) * tl.exp(before - maximum) + tl.sum(
            tl.exp(logits - maximum), 0
        )
        picked += tl.load(picked_ptr + row)
        if SMOOTH:
            total += tl.load(total_ptr + row)
    tl.store(maximum_ptr + row, maximum)
    if LAST:
        log_sum = tl.log(sums)
        loss = log_sum - (picked - maximum)
        if SMOOTH:
            loss = (1 - smoothing) * loss + smoothing * (log_sum - (total / vocabulary - maximum))
        wrong = (target != ignore_index) & ((target < 0) | (target >= vocabulary))
        tl.store(sum_ptr + row, tl.where(wrong, float("nan"), log_sum))
        tl.store(
            loss_ptr + row,
            tl.where(target == ignore_index, 0.0, tl.where(wrong, float("nan"), loss)),
        )
    else:
        tl.store(sum_ptr + row, sums)
        tl.store(picked_ptr + row, picked)
        if SMOOTH:
            tl.store(total_ptr + row, total)


@triton.jit(do_not_specialize=["start", "columns", "vocabulary"])
def softmax_gradient_kernel(
    logits_ptr,
    target_ptr,
    maximum_ptr,
    log_sum_ptr,
    coefficient_ptr,
    stride_logits,
    start,
    columns,
    vocabulary,
    smoothing,
    BLOCK: tl.constexpr,
):
    """Replace a row's slice of logits by `coefficient · (softmax - smoothed target)`, in place."""
    row = tl.program_id(0)
    target = tl.load(target_ptr + row)
    maximum = tl.load(maximum_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    coefficient = tl.load(coefficient_ptr + row)
    offsets = tl.arange(0, BLOCK)
    pointers = logits_ptr + row.to(tl.int64) * stride_logits + offsets
    logits = load_slice(pointers, offsets, columns)
    error = tl.exp(logits - maximum - log_sum) - smoothing / vocabulary
    error = tl.where(start + offsets == target, error - (1 - smoothing), error)
    # NaN and infinite logits of an ignored row must not reach the gradients.
    gradient = tl.where(coefficient == 0.0, 0.0, coefficient * error)
    tl.store(pointers, gradient, mask=offsets < (columns + 15) // 16 * 16)


def softmax_config(width: int) -> LaunchConfig:
    """Configure a slice of a row in registers, up to 32 elements a thread."""
    block = max(64, triton.next_power_of_2(width))
    return LaunchConfig({"BLOCK": block}, num_warps=min(8, max(1, block // 512)), num_stages=1)


RUNNING_SOFTMAX = row_spec(
    "running_softmax",
    running_softmax_kernel,
    (
        {"width": 7232, "first": False, "last": False, "smooth": False},
        {"width": 7232, "first": False, "last": True, "smooth": True},
    ),
    softmax_config,
    lambda variant: {name.upper(): variant[name] for name in ("first", "last", "smooth")},
)
SOFTMAX_GRADIENT = row_spec(
    "softmax_gradient", softmax_gradient_kernel, ({"width": 7232},), softmax_config
)
KERNELS = [RUNNING_SOFTMAX, SOFTMAX_GRADIENT]


def linear_cross_entropy_forward(a: Vocabulary) -> tuple[Tensor, RowStatistics]:
    """Return the mean fp32 cross-entropy of `h w^T + b` over the rows not ignored (0 if all are), and the statistics.

    The loss is NaN if a target is outside the vocabulary.
    """
    losses, statistics = _row_losses(a)
    return losses.sum() / (a.target != a.ignore_index).sum().clamp_min(1), statistics


def linear_cross_entropy_backward(
    dloss: Tensor, a: Vocabulary, statistics: RowStatistics, needs: Needs
) -> Gradients:
    """Return (dh, dw, db), as selected by `needs`, for the scalar gradient `dloss` of the loss."""
    counted = a.target.reshape(-1) != a.ignore_index
    return _gradients(counted * (dloss.float() / counted.sum().clamp_min(1)), a, statistics, needs)


def token_log_likelihood_forward(a: Vocabulary) -> tuple[Tensor, RowStatistics]:
    """Return `log softmax(h w^T + b)[target]` `[...]` in fp32: 0 where ignored, NaN outside the vocabulary."""
    losses, statistics = _row_losses(a)
    # A subtraction gives ignored rows 0, a negation would give -0.
    return (0 - losses).view(a.target.shape), statistics


def token_log_likelihood_backward(
    dout: Tensor, a: Vocabulary, statistics: RowStatistics, needs: Needs
) -> Gradients:
    """Return (dh, dw, db), as selected by `needs`; `dout` `[...]` is the gradient of the log-likelihoods."""
    coefficients = -dout.reshape(-1).float().masked_fill(a.target.reshape(-1) == a.ignore_index, 0)
    return _gradients(coefficients, a, statistics, needs)


class _Blocks:
    """Partition of rows and vocabulary, and the buffer for the logits of one block of rows and one slice."""

    def __init__(self, a: Vocabulary) -> None:
        self.h, self.w, self.b = a.h.reshape(-1, a.h.shape[-1]), a.w, a.b
        self.target = a.target.reshape(-1).contiguous()
        count, vocabulary = self.h.shape[0], self.w.shape[0]
        # Slices of nearly one size, whose rows, and their splits in a split-K GEMM, begin at aligned addresses.
        alignment = 64 * split_k(count, self.w.shape[1], multiprocessors(self.h.device))
        width = triton.cdiv(vocabulary, triton.cdiv(vocabulary, _SLICE))
        self.width = triton.cdiv(width, alignment) * alignment
        height = max(1, _BUFFER_BYTES // (self.width * self.h.element_size()))
        self.columns = [
            slice(i, min(i + self.width, vocabulary)) for i in range(0, vocabulary, self.width)
        ]
        self.rows = [slice(i, min(i + height, count)) for i in range(0, count, height)]
        self.buffer = self.h.new_empty(min(height, count), self.width)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        out = self.buffer[: rows.stop - rows.start, : columns.stop - columns.start]
        if self.b is None:
            return torch.mm(self.h[rows], self.w[columns].t(), out=out)
        return torch.addmm(self.b[columns], self.h[rows], self.w[columns].t(), out=out)


def _row_losses(a: Vocabulary) -> tuple[Tensor, RowStatistics]:
    blocks, vocabulary = _Blocks(a), a.w.shape[0]
    count = blocks.h.shape[0]
    maximum, sums, picked, total, losses = (
        a.h.new_empty(count, dtype=torch.float32) for _ in range(5)
    )
    for rows in blocks.rows:
        for columns in blocks.columns:
            logits = blocks.logits(rows, columns)
            flags = {
                "first": columns.start == 0,
                "last": columns.stop == vocabulary,
                "smooth": a.label_smoothing > 0,
            }
            options, _ = launch_options(RUNNING_SOFTMAX, a.h, width=blocks.width, **flags)
            # The kernel reads a row of the buffer beyond the logits.
            running_softmax_kernel[(logits.shape[0],)](
                blocks.buffer,
                blocks.target[rows],
                maximum[rows],
                sums[rows],
                picked[rows],
                total[rows],
                losses[rows],
                blocks.width,
                columns.start,
                logits.shape[1],
                vocabulary,
                a.ignore_index,
                a.label_smoothing,
                **options,
            )
    return losses, RowStatistics(maximum, sums)


def _gradients(
    coefficients: Tensor, a: Vocabulary, statistics: RowStatistics, needs: Needs
) -> Gradients:
    blocks, h, w, b = _Blocks(a), a.h, a.w, a.b
    options, _ = launch_options(SOFTMAX_GRADIENT, h, width=blocks.width)
    needs_b = needs[2] and b is not None
    dh = torch.zeros(blocks.h.shape, dtype=torch.float32, device=h.device) if needs[0] else None
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device) if needs[1] else None
    db = torch.zeros(b.shape, dtype=torch.float32, device=b.device) if needs_b else None
    for columns in blocks.columns if any(needs) else []:
        # The gradient of a slice of w: accumulated in fp32 if there are several blocks of rows.
        wide = None
        if len(blocks.rows) != 1:
            wide = w.new_zeros(columns.stop - columns.start, w.shape[1], dtype=torch.float32)
        for rows in blocks.rows:
            gradient = blocks.logits(rows, columns)
            softmax_gradient_kernel[(gradient.shape[0],)](
                blocks.buffer,
                blocks.target[rows],
                statistics.maximum[rows],
                statistics.log_sum[rows],
                coefficients[rows],
                blocks.width,
                columns.start,
                gradient.shape[1],
                w.shape[0],
                a.label_smoothing,
                **options,
            )
            if dh is not None:
                _add_product(dh[rows], gradient, w[columns])
            if db is not None:
                db[columns] += gradient.sum(0, dtype=torch.float32)
            if dw is not None and wide is None:
                torch.mm(gradient.t(), blocks.h[rows], out=dw[columns])
            elif dw is not None and wide is not None:
                wide += _wide_product(gradient.t(), blocks.h[rows])
        if dw is not None and wide is not None:
            dw[columns] = wide
    dh = None if dh is None else dh.to(h.dtype).view(h.shape)
    return dh, dw, None if db is None or b is None else db.to(b.dtype)


def _wide_product(x: Tensor, y: Tensor) -> Tensor:
    """Multiply, with an fp32 result if the library supports it."""
    multiply = torch.mm if x.ndim == 2 else torch.bmm
    if x.is_cuda and x.dtype != torch.float32:
        return multiply(x, y, out_dtype=torch.float32)
    return multiply(x, y)


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add `x y` to `total` in fp32, by a split-K GEMM over the slice of the vocabulary."""
    splits = split_k(x.shape[0], y.shape[1], multiprocessors(x.device))
    # The splits of the last slice may begin at odd addresses.
    if splits == 1 or x.shape[1] % (8 * splits):
        total += _wide_product(x, y)
        return
    shape = splits, x.shape[1] // splits
    left, right = x.unflatten(1, shape).transpose(0, 1), y.unflatten(0, shape)
    total += _wide_product(left, right).sum(0)


# Rows and columns of a GEMM's tile, which one multiprocessor computes, and the cost of one more partial sum of it,
# relative to the time for a slice of the vocabulary.
_TILE, _PARTIAL = 128, 1e-3


def split_k(rows: int, columns: int, processors: int) -> int:
    """Return the split-K factor of a GEMM, 1 to 8, that keeps the multiprocessors busy.

    The gradient of 1,440 rows of 768 numbers is 72 tiles: little more than half of an H100. In three splits: 216.
    """
    tiles = triton.cdiv(rows, _TILE) * triton.cdiv(columns, _TILE)

    def time(splits: int) -> float:
        return triton.cdiv(tiles * splits, processors) / splits + _PARTIAL * tiles * (splits - 1)

    return min(range(1, 9), key=time)
