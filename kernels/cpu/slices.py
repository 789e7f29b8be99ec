"""A 16-bit product of oneDNN as a whole, or some rows at a time: whichever this CPU runs faster.

With AMX, oneDNN divides a product among the threads by a model of the caches, which at some sizes prefers a single
thread and leaves the others idle: on two threads, 832 rows through the second layer of a base-size MLP take 1.7 times
as long as in slices. Where that happens depends on all sizes and on the threads, so it is measured, once for each.
Few rows are always divided well.

The clock is a wall clock, which alone sees idle threads. It sees interruptions too, so the best of several rounds
counts, and slices have to win by a margin that little else than an idle thread explains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Product = Callable[..., Tensor]
"""Of x `[n, K]`, weight `[M, K]`, bias `[M]` or None, and further tensors of n rows: `[n, M]`."""

# Rows of a slice for each thread: enough to keep it busy, and always divided well.
_ROWS = 208
# Row counts this close share an answer; slices are cut to whole AMX tiles.
_BUCKET, _TILE = 64, 16
_ROUNDS = 4
_MARGIN = 0.85

_slices_win: dict[tuple[Product, torch.Size, torch.dtype, int, int], bool] = {}


def multiply(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
    """`product(x, weight, bias, *others)`, where x and `others` may be taken a slice of rows at a time.

    Under `torch.use_deterministic_algorithms(True)` nothing is timed and the product runs whole.
    """
    rows, threads = x.shape[0], torch.get_num_threads()
    most = _ROWS * threads
    if x.element_size() != 2 or threads == 1 or rows <= most or torch.are_deterministic_algorithms_enabled():
        return product(x, weight, bias, *others)
    sliced = partial(_sliced, product, _even_step(rows, most))
    key = (product, weight.shape, x.dtype, rows // _BUCKET, threads)
    if key not in _slices_win:
        whole_seconds, sliced_seconds = _best_seconds((product, sliced), (x, weight, bias, *others))
        _slices_win[key] = sliced_seconds < _MARGIN * whole_seconds
    return (sliced if _slices_win[key] else product)(x, weight, bias, *others)


def _even_step(rows: int, most: int) -> int:
    """Rows of a slice, so that slices are of one size and no longer than `most`, which is a number of whole tiles."""
    slices = -(-rows // most)
    return -(-rows // (slices * _TILE)) * _TILE


def _sliced(product: Product, step: int, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        out[part] = product(x[part], weight, bias, *(other[part] for other in others))
    return out


def _best_seconds(products: Sequence[Product], arguments: tuple[Any, ...]) -> list[float]:
    """The best time of each, taken in turns."""
    best = [float("inf")] * len(products)
    for _ in range(_ROUNDS):
        for i, product in enumerate(products):
            start = time.perf_counter()
            product(*arguments)
            best[i] = min(best[i], time.perf_counter() - start)
    return best
