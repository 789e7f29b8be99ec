"""Hard negatives: one draw per row from softmax weights, without a row ever waiting for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, host, reference


@torch.no_grad()
def sample_hard_negatives(
    similarity: Tensor, mask: Tensor, generator: torch.Generator | None = None, *, check: bool = False
) -> Tensor:
    """Draw one column per row, the more similar the likelier; all rows in one batched step.

    Column c of row r is drawn with a probability proportional to `softmax(similarity[r])[c] + 1e-5`, or never where
    the mask excludes it (X-FM's rule; see `reference.hard_negative_weights`). The draw is an exponential race: the
    largest of `weight / Exp(1)` has the distribution of `torch.multinomial`, which would check its weights on the host.

    Args:
        similarity: `[B, C]`, already divided by the temperature; half precision is widened to fp32.
        mask: `[B, C]` boolean, True for what must not be drawn from a row.
        generator: source of the randomness, on the device of `similarity`. Equal states draw equal columns.
        check: look at the contents on accelerators too, which synchronises with the host, as within
            `check_contents()`. On CPU, outside of compilation, they are always looked at. Unchecked, a row with nothing
            to draw yields an arbitrary column.

    Returns:
        `[B]` int64 columns.

    Raises:
        ValueError: shapes or dtypes that do not fit; a row with nothing left to draw; NaN or infinite similarities.
    """
    if similarity.ndim != 2 or not similarity.is_floating_point():
        raise ValueError(f"similarity is {similarity.dtype} {[*similarity.shape]}; it must be floating point [B, C]")
    if mask.dtype != torch.bool or mask.shape != similarity.shape:
        raise ValueError(f"mask is {mask.dtype} {[*mask.shape]}; it must be bool {[*similarity.shape]}")
    if mask.device != similarity.device:
        raise ValueError(f"mask lives on {mask.device} and similarity on {similarity.device}")
    if not similarity.shape[1]:
        if similarity.shape[0]:
            raise ValueError(f"similarity is {[*similarity.shape]}: there is no column to draw")
        return torch.empty(0, dtype=torch.long, device=similarity.device)
    weights = reference.hard_negative_weights(similarity, mask)
    if not torch.compiler.is_compiling() and (check or checks.looked_at(similarity)):
        _check_rows(weights, mask)
    return race(weights, generator)


def race(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One column per row of weights `[B, C]`, drawn in proportion to them by an exponential race: `[B]`."""
    arrivals = torch.empty_like(weights).exponential_(generator=generator)
    # An arrival of exactly zero would win, or be NaN, whatever its weight.
    return (weights / arrivals.clamp_min(torch.finfo(weights.dtype).tiny)).argmax(1)


def _check_rows(weights: Tensor, mask: Tensor) -> None:
    exhausted = mask.all(1)
    if host.any_true(exhausted):
        rows = host.integers(host.true_places(exhausted))
        raise ValueError(
            f"{len(rows)} of {mask.shape[0]} rows exclude every column (the first is row {rows[0]}), so no negative "
            "can be drawn for them: put more than one image into the batch"
        )
    finite = weights.isfinite().all(1)
    if not host.all_true(finite):
        raise ValueError(f"similarity of row {host.integer(finite.long().argmin())} holds NaN or infinity")
