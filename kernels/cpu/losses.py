"""Cross-entropy over a vocabulary on CPU, without the logits of all rows: forward and backward.

`linear_cross_entropy_forward` turns each block of logits into its gradient while the block is in cache: three GEMMs, as
in eager mode. It saves the gradients themselves; for few rows, the gradient of the logits, and the backward runs the
last GEMM. `token_log_likelihood_forward` lacks the upstream gradient of its rows: it saves two numbers per row, and the
backward recomputes the logits, one slice of the vocabulary at a time: four GEMMs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import checks, host
from ..checks import Needs, RowStatistics, Vocabulary
from .gemm import CPU_DTYPES
from .selection import Race, operands, register, select
from .workspace import even_slices, in_dtype, scratch

# The logits of a block. Fewer rows would make the GEMMs slower, more rows gain no time.
_BLOCK_BYTES = 56 << 20
# Vocabulary entries of a slice.
_SLICE = 4096
# Logits per thread that the passes over a slice process at once: widened to fp32 they stay in the core's own cache.
_TILE = 1 << 18
# Up to this many blocks of rows, the gradient of the vocabulary in half precision is rounded at every block. With more,
# an fp32 copy sums them, which takes more memory than the logits and much of the time.
_ROUNDED_BLOCKS = 4

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_cross_entropy_forward(
    a: Vocabulary, dlogits: Tensor | None = None
) -> tuple[Tensor, Gradients]:
    """Return the mean loss (at least fp32) and its gradients (dh, dw, db), None unless in `needs`.

    With `dlogits` `[rows, V]` from `logits_gradient`, the gradient of the logits is written there for
    `vocabulary_gradient`, and dw is None. Working memory: about 60 MB of logits, and an fp32 `[V, K]` if dw in half
    precision sums more than four blocks of rows. IndexError for a target outside the vocabulary.
    """
    h, w, b, target, needs = a.h, a.w, a.b, a.target, a.needs
    ignore_index, label_smoothing = a.ignore_index, a.label_smoothing
    rows, targets, indices = counted_rows(h, target, w.shape[0], ignore_index)
    weight = 1 / max(rows.shape[0], 1)
    blocks = _row_blocks(rows, w.shape[0] if any(needs) else _SLICE)
    early = needs if dlogits is None else (needs[0], False, needs[2])
    if dlogits is not None:
        # Rows that do not count leave memory unused: the results of an operator must be a function of its arguments.
        dlogits.view(-1)[rows.shape[0] * w.shape[0] :].zero_()
    gradients = _Accumulators(rows, w, b, early, len(blocks), weight)
    slices = _vocabulary_slices(w.shape[0])
    # A gradient needs the logits of all slices until the row's normaliser is known; otherwise one buffer is enough.
    memory = _memory(rows, blocks, slices if any(needs) else slices[:1])
    total = torch.zeros((), dtype=gradients.dtype)
    for block in blocks:
        h_block, t_block = rows[block], targets[block]
        logits: list[Tensor] = []
        running = _Running(h_block.shape[0], gradients.dtype)
        for index, entries in enumerate(slices):
            slice_logits = _logits(h_block, w, b, entries, memory[index % len(memory)])
            running.add(slice_logits, t_block, entries, label_smoothing)
            if any(needs):
                logits.append(slice_logits)
        statistics = running.statistics()
        total += running.losses(statistics, label_smoothing, w.shape[0]).sum()
        # Backwards, because the last slice is still in cache.
        for entries in reversed(slices if any(needs) else []):
            gradient = _to_gradient(
                logits.pop(), statistics, t_block, None, entries, label_smoothing, w.shape[0]
            )
            gradients.add(gradient, block, entries)
            if dlogits is not None:
                _slice_of(dlogits, rows.shape[0], entries).copy_(gradient)
    return total * weight, gradients.finish(h, indices)


def logits_gradient(h: Tensor, w: Tensor) -> Tensor | None:
    """Return memory for the gradient of all logits, `[rows, V]`, where it replaces the gradient of w; else None."""
    return h.new_empty(math.prod(h.shape[:-1]), w.shape[0]) if keeps_logits(h, w) else None


def keeps_logits(h: Tensor, w: Tensor) -> bool:
    """Return whether the gradient of all logits is one block and no larger than w: the forward saves it for dw."""
    width = h.shape[-1]
    # Not `Size.numel`, which specialises symbols: every number of rows would recompile.
    rows = math.prod(h.shape[:-1]) if width else 0
    return 0 < rows <= width and len(_row_blocks(h.reshape(-1, width), w.shape[0])) == 1


def vocabulary_gradient(
    h: Tensor, target: Tensor, dlogits: Tensor, ignore_index: int = -100
) -> Tensor:
    """Return dw `[V, K]` for an upstream gradient of 1, bit for bit as from the forward, from its `dlogits`."""
    vocabulary = dlogits.shape[1]
    rows, _, _ = counted_rows(h, target, vocabulary, ignore_index)
    count = rows.shape[0]
    if not count:
        return h.new_zeros(vocabulary, h.shape[-1])
    dw = h.new_empty(vocabulary, h.shape[-1])
    for entries in _vocabulary_slices(vocabulary):
        gradient = _slice_of(dlogits, count, entries)
        _add_gemm(dw[entries], gradient.t(), rows.t(), "vocabulary dw", 1 / count, first=True)
    return dw


def _slice_of(dlogits: Tensor, rows: int, entries: slice) -> Tensor:
    """Return the memory of a slice of the vocabulary, contiguous for the GEMM."""
    memory = dlogits.view(-1)[rows * entries.start : rows * entries.stop]
    return memory.view(rows, entries.stop - entries.start)


def token_log_likelihood_forward(a: Vocabulary) -> tuple[Tensor, RowStatistics]:
    """Return `log softmax(h w^T + b)[target]` `[...]`, at least fp32, and the statistics for the backward pass.

    One GEMM, in the memory of a slice of logits. IndexError for a target outside the vocabulary.
    """
    h, w, b, target, ignore_index = a.h, a.w, a.b, a.target, a.ignore_index
    checks.check_targets(target, w.shape[0], ignore_index)
    rows, targets = h.reshape(-1, h.shape[-1]), target.reshape(-1)
    dtype = torch.promote_types(h.dtype, torch.float32)
    out = torch.empty(rows.shape[0], dtype=dtype)
    maximum, log_sum = torch.empty_like(out), torch.empty_like(out)
    blocks, slices = _row_blocks(rows, _SLICE), _vocabulary_slices(w.shape[0])
    memory = _memory(rows, blocks, slices[:1])
    for block in blocks:
        running = _Running(rows[block].shape[0], dtype)
        for entries in slices:
            logits = _logits(rows[block], w, b, entries, memory[0])
            running.add(logits, targets[block], entries, 0.0)
        maximum[block], log_sum[block] = statistics = running.statistics()
        out[block] = -running.losses(statistics, 0.0, w.shape[0])
    out.masked_fill_(targets == ignore_index, 0)
    return out.view(target.shape), RowStatistics(maximum, log_sum)


def token_log_likelihood_backward(
    dout: Tensor, a: Vocabulary, statistics: RowStatistics, needs: Needs
) -> Gradients:
    """Return (dh, dw, db), None unless in `needs`; `dout` `[...]` is the gradient of every row's log-likelihood."""
    h, w, b, target = a.h, a.w, a.b, a.target
    rows, targets = h.reshape(-1, h.shape[-1]), target.reshape(-1)
    upstream = dout.reshape(-1).to(statistics.maximum.dtype)
    coefficients = -upstream.masked_fill(targets == a.ignore_index, 0)
    blocks = _row_blocks(rows, _SLICE)
    gradients = _Accumulators(rows, w, b, needs, len(blocks), 1.0)
    slices = _vocabulary_slices(w.shape[0]) if any(needs) else []
    memory = _memory(rows, blocks, slices[:1])
    for entries in slices:
        # Slices outside, blocks inside: a slice of the vocabulary is read from memory once, its gradient written once.
        for block in blocks:
            block_statistics = RowStatistics(statistics.maximum[block], statistics.log_sum[block])
            gradient = _to_gradient(
                _logits(rows[block], w, b, entries, memory[0]),
                block_statistics,
                targets[block],
                coefficients[block],
                entries,
                0.0,
                w.shape[0],
            )
            gradients.add(gradient, block, entries)
    return gradients.finish(h, None)


def _memory(h: Tensor, blocks: list[slice], slices: list[slice]) -> Tensor:
    """Allocate memory for the logits of one block, with a row for each of these slices, or for one more entry."""
    rows, width = _longest(blocks), _longest(slices)
    return h.new_empty(len(slices), rows * (width + 1))


def _longest(slices: list[slice]) -> int:
    return max((s.stop - s.start for s in slices), default=0)


class _Running:
    """Softmax normalisers, target logits and sums of logits of some rows, slice by slice."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.target_logit = torch.zeros(rows, dtype=dtype)
        self.total = torch.zeros(rows, dtype=dtype)
        self.maxima: list[Tensor] = []
        self.sums: list[Tensor] = []

    def add(self, logits: Tensor, target: Tensor, entries: slice, label_smoothing: float) -> None:
        """Add the logits of a slice of the vocabulary."""
        maxima, sums = (torch.empty(logits.shape[0], dtype=self.dtype) for _ in range(2))
        for tile in _tiles(logits):
            wide = in_dtype("vocabulary logits", logits[tile], self.dtype)
            # In a slice of -inf alone, differences to the maximum would be NaN.
            maximum = wide.amax(1).clamp_min_(torch.finfo(self.dtype).min)
            maxima[tile] = maximum
            if label_smoothing:
                self.total[tile] += wide.sum(1)
            exponents = scratch("vocabulary exponents", tuple(wide.shape), self.dtype)
            sums[tile] = torch.sub(wide, maximum[:, None], out=exponents).exp_().sum(1)
        self.maxima.append(maxima)
        self.sums.append(sums)
        inside = _rows_inside(target, entries)
        self.target_logit[inside] = logits[inside, target[inside] - entries.start].to(self.dtype)

    def statistics(self) -> RowStatistics:
        """Return the normalisers."""
        maxima = torch.stack(self.maxima)
        maximum = maxima.amax(0)
        sums = (torch.stack(self.sums) * (maxima - maximum).exp_()).sum(0)
        return RowStatistics(maximum=maximum, log_sum=sums.log_())

    def losses(self, statistics: RowStatistics, label_smoothing: float, vocabulary: int) -> Tensor:
        """Return the loss of each row."""
        losses = statistics.log_sum - (self.target_logit - statistics.maximum)
        if not label_smoothing:
            return losses
        uniform = statistics.log_sum - (self.total / vocabulary - statistics.maximum)
        return (1 - label_smoothing) * losses + label_smoothing * uniform


class _Accumulators:
    """The gradients of h, w and b: `scale` times the sums over blocks of rows and slices of the vocabulary."""

    def __init__(
        self, h: Tensor, w: Tensor, b: Tensor | None, needs: Needs, blocks: int, scale: float
    ) -> None:
        self.h, self.w, self.b, self.scale = h, w, b, scale
        self.dtype = torch.promote_types(h.dtype, torch.float32)
        self.dh = self.dw = self.db = None
        if needs[0]:
            self.dh = torch.zeros_like(h, dtype=self.dtype)
        if needs[1]:
            # The rows of a block are summed inside the GEMM, in fp32, and with the blocks before where the GEMM can add
            # to its result.
            rounded = _ROUNDED_BLOCKS if _select("vocabulary dw", h.dtype) == "aten" else 1
            make = torch.empty_like if blocks else torch.zeros_like
            self.dw = make(w, dtype=w.dtype if blocks <= rounded else self.dtype)
        if needs[2] and b is not None:
            self.db = torch.zeros_like(b, dtype=self.dtype)

    def add(self, gradient: Tensor, block: slice, entries: slice) -> None:
        """Add the gradient of the logits of a block of rows and a slice of the vocabulary."""
        if self.dh is not None:
            _add_gemm(self.dh[block], gradient, self.w[entries].t(), "vocabulary dh", self.scale)
        if self.dw is not None:
            first, rows = block.start == 0, self.h[block].t()
            dw = self.dw[entries]
            _add_gemm(dw, gradient.t(), rows, "vocabulary dw", self.scale, first=first)
        if self.db is not None:
            for tile in _tiles(gradient):
                wide = in_dtype("vocabulary logits", gradient[tile], self.dtype)
                self.db[entries] += wide.sum(0)

    def finish(self, h: Tensor, indices: Tensor | None) -> Gradients:
        """Return the gradients in the dtypes of h, w and b; `indices` are those of the rows that count."""
        dh, dw, db = self.dh, self.dw, self.db
        if dh is not None:
            dh = dh.to(h.dtype)
            if indices is not None:
                zeros = dh.new_zeros(h.numel() // h.shape[-1], h.shape[-1])
                dh = zeros.index_copy_(0, indices, dh)
            dh = dh.view(h.shape)
        dw = None if dw is None else dw.to(self.w.dtype)
        db = None if db is None or self.b is None else (db * self.scale).to(self.b.dtype)
        return dh, dw, db


def _to_gradient(
    logits: Tensor,
    statistics: RowStatistics,
    target: Tensor,
    coefficients: Tensor | None,
    entries: slice,
    label_smoothing: float,
    vocabulary: int,
) -> Tensor:
    """Turn a slice of logits into `coefficient · (softmax - smoothed target)` in place; None for coefficients of 1."""
    inside = _rows_inside(target, entries)
    columns = target[inside] - entries.start

    def gradient(wide: Tensor, rows: slice | Tensor) -> Tensor:
        wide.sub_(statistics.maximum[rows, None]).sub_(statistics.log_sum[rows, None]).exp_()
        if label_smoothing:
            wide.sub_(label_smoothing / vocabulary)
        return wide

    # At the target, 1 is subtracted before the rounding to half precision.
    dtype = statistics.maximum.dtype
    at_target = gradient(logits[inside, columns].to(dtype)[:, None], inside)[:, 0]
    at_target = at_target - (1 - label_smoothing)
    if coefficients is not None:
        at_target *= coefficients[inside]
    for tile in _tiles(logits):
        wide = gradient(in_dtype("vocabulary logits", logits[tile], dtype), tile)
        if coefficients is not None:
            wide.mul_(coefficients[tile, None])
        if wide.dtype != logits.dtype:
            logits[tile] = wide
    logits[inside, columns] = at_target.to(logits.dtype)
    return logits


def _tiles(logits: Tensor) -> list[slice]:
    """Return slices of rows that are processed at once."""
    return even_slices(logits.shape[0], max(1, torch.get_num_threads() * _TILE // logits.shape[1]))


def _rows_inside(target: Tensor, entries: slice) -> Tensor:
    return host.true_places((target >= entries.start) & (target < entries.stop))


def _onednn_gemm(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")


_GEMMS: dict[str, Callable[..., Tensor]] = {
    "aten": lambda x, y: x @ y.t(),
    "onednn": _onednn_gemm,
}


def _example(role: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return operands of the GEMM `x y^T` with this role, strided as in use, about the size of a slice."""
    h, w, gradient = operands(dtype, (256, 512), (512, 512), (256, 512))
    if role == "vocabulary logits":
        return h, w
    return (gradient, w.t()) if role == "vocabulary dh" else (gradient.t(), h.t())


for _role in ("vocabulary logits", "vocabulary dh", "vocabulary dw"):
    register(_role, Race(_GEMMS, partial(_example, _role), 2 * 256 * 512 * 512))


def _select(role: str, dtype: torch.dtype) -> str:
    return select(role, dtype) if dtype in CPU_DTYPES else "aten"


def _logits(h: Tensor, w: Tensor, b: Tensor | None, entries: slice, memory: Tensor) -> Tensor:
    bias = None if b is None else b[entries]
    if _select("vocabulary logits", h.dtype) == "onednn":
        # Inside the GEMM the bias is added before the rounding to half precision.
        return _onednn_gemm(h, w[entries], None if bias is None else bias.contiguous())
    shape = (h.shape[0], entries.stop - entries.start)
    out = memory[: math.prod(shape)].view(shape)
    if bias is None:
        return torch.mm(h, w[entries].t(), out=out)
    return torch.addmm(bias, h, w[entries].t(), out=out)


def _add_gemm(
    accumulator: Tensor, x: Tensor, y: Tensor, role: str, scale: float, *, first: bool = False
) -> None:
    """Compute `accumulator += scale · x y^T`; the first time, its contents are overwritten."""
    name = _select(role, x.dtype)
    if name == "aten" and accumulator.dtype == x.dtype:
        accumulator.addmm_(x, y.t(), beta=0 if first else 1, alpha=scale)
    elif first:
        accumulator.copy_(_GEMMS[name](x, y)).mul_(scale)
    else:
        accumulator.add_(_GEMMS[name](x, y), alpha=scale)


def counted_rows(
    h: Tensor, target: Tensor, vocabulary: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return rows `[M', K]` and targets that count, and their indices if some do not."""
    checks.check_targets(target, vocabulary, ignore_index)
    rows, targets = h.reshape(-1, h.shape[-1]), target.reshape(-1)
    counted = targets != ignore_index
    if host.all_true(counted):
        return rows, targets, None
    indices = host.true_places(counted)
    return rows[indices], targets[indices], indices


def logits_at_once(dtype: torch.dtype) -> int:
    """Return how many logits a block may have."""
    return _BLOCK_BYTES // dtype.itemsize


def _row_blocks(h: Tensor, width: int) -> list[slice]:
    """Return even blocks of rows with `width` logits each that fit the budget."""
    # Half-precision logits are widened slice by slice: their stored size counts.
    return even_slices(h.shape[0], max(1, logits_at_once(h.dtype) // width))


def _vocabulary_slices(vocabulary: int) -> list[slice]:
    return even_slices(vocabulary, _SLICE)
