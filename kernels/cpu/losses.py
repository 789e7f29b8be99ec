"""Cross-entropy over a vocabulary on CPU, without the logits of all rows: forward and backward.

`linear_cross_entropy_forward` turns each block of logits into its gradient while the block is in cache: three GEMMs, as
in eager mode. It saves the gradients themselves; for few rows, the gradient of the logits, and the backward runs the
last GEMM. `token_log_likelihood_forward` does not know the gradient of its rows: it saves two numbers per row, and the
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
from .selection import Race, operands, register, select
from .workspace import even_slices, in_dtype, scratch

# The logits of a block. Fewer rows would make the GEMMs slower, more rows gain no time.
_BLOCK_BYTES = 56 << 20
# Vocabulary entries of a slice.
_SLICE = 4096
# Logits that the passes over a slice take at once, for each thread: widened to fp32 they stay in the core's own cache.
_TILE = 1 << 18
# In half precision, the gradient of the vocabulary may be rounded at every block of rows, if these are no more. Or else
# an fp32 copy of it collects them, which takes more memory than the logits do and a good part of the time.
_ROUNDED_BLOCKS = 4
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def linear_cross_entropy_forward(
    a: Vocabulary, dlogits: Tensor | None = None
) -> tuple[Tensor, Gradients]:
    """Mean loss (at least fp32) and its gradients (dh, dw, db) as selected by `needs`, None for the others.

    With `dlogits` `[rows, V]` from `logits_gradient`, the gradient of the logits is written there for
    `vocabulary_gradient`, and dw is None. Working memory: about 60 MB of logits, and an fp32 `[V, K]` if dw in half
    precision sums more than four blocks of rows. IndexError for a target outside the vocabulary.
    """
    h, w, b, target, needs = a.h, a.w, a.b, a.target, a.needs
    ignore_index, label_smoothing = a.ignore_index, a.label_smoothing
    rows, targets, kept = counted_rows(h, target, w.shape[0], ignore_index)
    weight = 1 / max(rows.shape[0], 1)
    blocks = _row_blocks(rows, w.shape[0] if any(needs) else _SLICE)
    early = needs if dlogits is None else (needs[0], False, needs[2])
    if dlogits is not None:
        # The places of rows that do not count: an operator's results are a function of its arguments, to the last one.
        dlogits.view(-1)[rows.shape[0] * w.shape[0] :].zero_()
    gradients = _Accumulators(rows, w, b, early, len(blocks), weight)
    slices = _vocabulary_slices(w.shape[0])
    # For a gradient the logits of all slices are kept until the row's normaliser is known; or else one place is enough.
    memory = _memory(rows, blocks, slices if any(needs) else slices[:1])
    total = torch.zeros((), dtype=gradients.dtype)
    for block in blocks:
        h_block, t_block = rows[block], targets[block]
        logits: list[Tensor] = []
        running = _Running(h_block.shape[0], gradients.dtype)
        for i, part in enumerate(slices):
            piece = _logits(h_block, w, b, part, memory[i % len(memory)])
            running.add(piece, t_block, part, label_smoothing)
            if any(needs):
                logits.append(piece)
        statistics = running.statistics()
        total += running.losses(statistics, label_smoothing, w.shape[0]).sum()
        # The last slice is the one that cache still holds.
        for part in reversed(slices if any(needs) else []):
            gradient = _to_gradient(
                logits.pop(), statistics, t_block, None, part, label_smoothing, w.shape[0]
            )
            gradients.add(gradient, block, part)
            if dlogits is not None:
                _slice_of(dlogits, rows.shape[0], part).copy_(gradient)
    return total * weight, gradients.finish(h, kept)


def logits_gradient(h: Tensor, w: Tensor) -> Tensor | None:
    """Memory for the gradient of all logits, `[rows, V]`, where it replaces the gradient of w; None elsewhere."""
    return h.new_empty(math.prod(h.shape[:-1]), w.shape[0]) if keeps_logits(h, w) else None


def keeps_logits(h: Tensor, w: Tensor) -> bool:
    """Whether the gradient of all logits is one block and no larger than w: the forward then saves it for dw."""
    # Not `Size.numel`, which specialises symbols: every number of rows would recompile.
    rows = math.prod(h.shape[:-1]) if h.shape[-1] else 0
    return 0 < rows <= h.shape[-1] and len(_row_blocks(h.reshape(-1, h.shape[-1]), w.shape[0])) == 1


def vocabulary_gradient(
    h: Tensor, target: Tensor, dlogits: Tensor, ignore_index: int = -100
) -> Tensor:
    """`[V, K]`: dw for a loss with gradient 1, bit for bit as from the forward; arguments as there."""
    vocabulary = dlogits.shape[1]
    rows, _, _ = counted_rows(h, target, vocabulary, ignore_index)
    number = rows.shape[0]
    dw = (h.new_empty if number else h.new_zeros)(vocabulary, h.shape[-1])
    for part in _vocabulary_slices(vocabulary) if number else []:
        gradient = _slice_of(dlogits, number, part)
        _add_product(dw[part], gradient.t(), rows.t(), "vocabulary dw", 1 / number, first=True)
    return dw


def _slice_of(dlogits: Tensor, rows: int, part: slice) -> Tensor:
    """A slice of the vocabulary, contiguous for the GEMM."""
    return dlogits.view(-1)[rows * part.start : rows * part.stop].view(rows, part.stop - part.start)


def token_log_likelihood_forward(a: Vocabulary) -> tuple[Tensor, RowStatistics]:
    """`log softmax(h w^T + b)[target]` `[...]` per row, at least fp32, and the statistics for the backward pass.

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
        for part in slices:
            running.add(_logits(rows[block], w, b, part, memory[0]), targets[block], part, 0.0)
        maximum[block], log_sum[block] = statistics = running.statistics()
        out[block] = -running.losses(statistics, 0.0, w.shape[0])
    out.masked_fill_(targets == ignore_index, 0)
    return out.view(target.shape), RowStatistics(maximum, log_sum)


def token_log_likelihood_backward(
    dout: Tensor, a: Vocabulary, statistics: RowStatistics, needs: Needs
) -> Gradients:
    """(dh, dw, db), None where not needed; `dout` `[...]` is the gradient of every row's log-likelihood."""
    h, w, b, target = a.h, a.w, a.b, a.target
    rows, targets = h.reshape(-1, h.shape[-1]), target.reshape(-1)
    coefficients = (
        -dout.reshape(-1).to(statistics.maximum.dtype).masked_fill(targets == a.ignore_index, 0)
    )
    blocks = _row_blocks(rows, _SLICE)
    gradients = _Accumulators(rows, w, b, needs, len(blocks), 1.0)
    slices = _vocabulary_slices(w.shape[0]) if any(needs) else []
    memory = _memory(rows, blocks, slices[:1])
    for part in slices:
        # Slices outside, blocks inside: a slice of the vocabulary is read from memory once, its gradient written once.
        for block in blocks:
            here = RowStatistics(*(s[block] for s in statistics))
            logits = _logits(rows[block], w, b, part, memory[0])
            gradient = _to_gradient(
                logits, here, targets[block], coefficients[block], part, 0.0, w.shape[0]
            )
            gradients.add(gradient, block, part)
    return gradients.finish(h, None)


def _memory(h: Tensor, blocks: list[slice], slices: list[slice]) -> Tensor:
    """Memory for the logits of one block, allocated once, with a row for each of these slices or of one more entry."""
    rows = max((b.stop - b.start for b in blocks), default=0)
    return h.new_empty(len(slices), rows * (max((s.stop - s.start for s in slices), default=0) + 1))


class _Running:
    """Softmax normalisers, target logits and sums of logits of some rows, slice by slice."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.target_logit = torch.zeros(rows, dtype=dtype)
        self.total = torch.zeros(rows, dtype=dtype)
        self.maxima: list[Tensor] = []
        self.sums: list[Tensor] = []

    def add(self, logits: Tensor, target: Tensor, part: slice, label_smoothing: float) -> None:
        maxima, sums = (torch.empty(logits.shape[0], dtype=self.dtype) for _ in range(2))
        for tile in _tiles(logits):
            wide = in_dtype("vocabulary logits", logits[tile], self.dtype)
            # In a slice of -inf only, differences to the maximum would be NaN.
            maximum = wide.amax(1).clamp_min_(torch.finfo(self.dtype).min)
            maxima[tile] = maximum
            if label_smoothing:
                self.total[tile] += wide.sum(1)
            exponents = scratch("vocabulary exponents", tuple(wide.shape), self.dtype)
            sums[tile] = torch.sub(wide, maximum[:, None], out=exponents).exp_().sum(1)
        self.maxima.append(maxima)
        self.sums.append(sums)
        inside = _rows_inside(target, part)
        self.target_logit[inside] = logits[inside, target[inside] - part.start].to(self.dtype)

    def statistics(self) -> RowStatistics:
        maxima = torch.stack(self.maxima)
        maximum = maxima.amax(0)
        return RowStatistics(
            maximum, (torch.stack(self.sums) * (maxima - maximum).exp_()).sum(0).log_()
        )

    def losses(self, statistics: RowStatistics, label_smoothing: float, vocabulary: int) -> Tensor:
        losses = statistics.log_sum - (self.target_logit - statistics.maximum)
        if not label_smoothing:
            return losses
        uniform = statistics.log_sum - (self.total / vocabulary - statistics.maximum)
        return (1 - label_smoothing) * losses + label_smoothing * uniform


class _Accumulators:
    """The three gradients: `scale` times the sums over blocks of rows and slices of the vocabulary."""

    def __init__(
        self, h: Tensor, w: Tensor, b: Tensor | None, needs: Needs, blocks: int, scale: float
    ) -> None:
        self.h, self.w, self.b, self.scale = h, w, b, scale
        self.dtype = torch.promote_types(h.dtype, torch.float32)
        # The rows of a block are summed inside the product, which is as wide as fp32, and with the blocks before where
        # the product can add to its result.
        adds = _chosen("vocabulary dw", h.dtype) == "aten"
        dtype = w.dtype if blocks <= (_ROUNDED_BLOCKS if adds else 1) else self.dtype
        self.dw = (
            (torch.empty_like if blocks else torch.zeros_like)(w, dtype=dtype) if needs[1] else None
        )
        self.dh = torch.zeros_like(h, dtype=self.dtype) if needs[0] else None
        self.db = torch.zeros_like(b, dtype=self.dtype) if needs[2] and b is not None else None

    def add(self, gradient: Tensor, block: slice, part: slice) -> None:
        if self.dh is not None:
            _add_product(self.dh[block], gradient, self.w[part].t(), "vocabulary dh", self.scale)
        if self.dw is not None:
            first = block.start == 0
            _add_product(
                self.dw[part],
                gradient.t(),
                self.h[block].t(),
                "vocabulary dw",
                self.scale,
                first=first,
            )
        if self.db is not None:
            for tile in _tiles(gradient):
                self.db[part] += in_dtype("vocabulary logits", gradient[tile], self.dtype).sum(0)

    def finish(self, h: Tensor, kept: Tensor | None) -> Gradients:
        dh, dw, db = self.dh, self.dw, self.db
        if dh is not None:
            dh = dh.to(h.dtype)
            if kept is not None:
                dh = dh.new_zeros(h.numel() // h.shape[-1], h.shape[-1]).index_copy_(0, kept, dh)
            dh = dh.view(h.shape)
        dw = None if dw is None else dw.to(self.w.dtype)
        db = None if db is None or self.b is None else (db * self.scale).to(self.b.dtype)
        return dh, dw, db


def _to_gradient(
    logits: Tensor,
    statistics: RowStatistics,
    target: Tensor,
    coefficients: Tensor | None,
    part: slice,
    label_smoothing: float,
    vocabulary: int,
) -> Tensor:
    """Turn a slice of logits into `coefficient · (softmax - smoothed target)` in place; None for coefficients of 1."""
    inside = _rows_inside(target, part)
    columns = target[inside] - part.start

    def gradient(wide: Tensor, rows: slice | Tensor) -> Tensor:
        wide.sub_(statistics.maximum[rows, None]).sub_(statistics.log_sum[rows, None]).exp_()
        if label_smoothing:
            wide.sub_(label_smoothing / vocabulary)
        return wide

    # Where the target is, 1 is subtracted before the rounding to half precision.
    dtype = statistics.maximum.dtype
    picked = gradient(logits[inside, columns].to(dtype)[:, None], inside)[:, 0] - (
        1 - label_smoothing
    )
    if coefficients is not None:
        picked *= coefficients[inside]
    for tile in _tiles(logits):
        wide = gradient(in_dtype("vocabulary logits", logits[tile], dtype), tile)
        if coefficients is not None:
            wide.mul_(coefficients[tile, None])
        if wide.dtype != logits.dtype:
            logits[tile] = wide
    logits[inside, columns] = picked.to(logits.dtype)
    return logits


def _tiles(logits: Tensor) -> list[slice]:
    """Rows of a slice that are passed over together."""
    return even_slices(logits.shape[0], max(1, torch.get_num_threads() * _TILE // logits.shape[1]))


def _rows_inside(target: Tensor, part: slice) -> Tensor:
    return host.true_places((target >= part.start) & (target < part.stop))


def _onednn_product(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "aten": lambda x, y: x @ y.t(),
    "onednn": _onednn_product,
}


def _example(role: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Operands of the GEMM `x y^T` with this role, strided as in use, about the size of a slice."""
    h, w, g = operands(dtype, (256, 512), (512, 512), (256, 512))
    return {
        "vocabulary logits": (h, w),
        "vocabulary dh": (g, w.t()),
        "vocabulary dw": (g.t(), h.t()),
    }[role]


for _role in ("vocabulary logits", "vocabulary dh", "vocabulary dw"):
    register(_role, Race(_PRODUCTS, partial(_example, _role), 2 * 256 * 512 * 512))


def _chosen(role: str, dtype: torch.dtype) -> str:
    return select(role, dtype) if dtype in _ONEDNN_DTYPES else "aten"


def _logits(h: Tensor, w: Tensor, b: Tensor | None, part: slice, memory: Tensor) -> Tensor:
    bias = None if b is None else b[part]
    if _chosen("vocabulary logits", h.dtype) == "onednn":
        # Inside the product the bias is added before the rounding to half precision.
        return _onednn_product(h, w[part], None if bias is None else bias.contiguous())
    shape = (h.shape[0], part.stop - part.start)
    out = memory[: math.prod(shape)].view(shape)
    return (
        torch.mm(h, w[part].t(), out=out)
        if bias is None
        else torch.addmm(bias, h, w[part].t(), out=out)
    )


def _add_product(
    accumulator: Tensor, x: Tensor, y: Tensor, role: str, scale: float, *, first: bool = False
) -> None:
    """`accumulator += scale · x y^T`; the first time, what it held before does not count."""
    name = _chosen(role, x.dtype)
    if name == "aten" and accumulator.dtype == x.dtype:
        accumulator.addmm_(x, y.t(), beta=0 if first else 1, alpha=scale)
    elif first:
        accumulator.copy_(_PRODUCTS[name](x, y)).mul_(scale)
    else:
        accumulator.add_(_PRODUCTS[name](x, y), alpha=scale)


def counted_rows(
    h: Tensor, target: Tensor, vocabulary: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows `[M', K]` and targets that count, and their numbers if some do not."""
    checks.check_targets(target, vocabulary, ignore_index)
    rows, targets = h.reshape(-1, h.shape[-1]), target.reshape(-1)
    counted = targets != ignore_index
    if host.all_true(counted):
        return rows, targets, None
    kept = host.true_places(counted)
    return rows[kept], targets[kept], kept


def logits_at_once(dtype: torch.dtype) -> int:
    """Return how many logits a block may have."""
    return _BLOCK_BYTES // dtype.itemsize


def _row_blocks(h: Tensor, width: int) -> list[slice]:
    """Even blocks of rows with `width` logits each that fit the budget."""
    # Half precision logits are widened slice by slice, so what counts is how they are stored.
    return even_slices(h.shape[0], max(1, logits_at_once(h.dtype) // width))


def _vocabulary_slices(vocabulary: int) -> list[slice]:
    return even_slices(vocabulary, _SLICE)
