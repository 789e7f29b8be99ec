"""Cross-entropy over a vocabulary whose logits never exist in full: checks, registration, gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import checks, host, reference
from .backend import Backend, resolve
from .cpu import losses as cpu
from .library import operator


def linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """Mean cross-entropy of the logits `h w^T + b`, in chunks of rows and vocabulary.

    On CPU the gradients are computed with the loss, while a chunk of logits is in cache; on a GPU the backward pass
    computes the chunks again.

    Args:
        h: `[..., K]`; w: `[V, K]`; b: `[V]`; target: `[...]` integers below V.
        ignore_index: target of rows that do not count; without any row that does, the loss and its gradients are 0.
        label_smoothing: share of the target probability that is spread evenly over the vocabulary.

    Returns:
        A scalar, at least fp32.

    Raises:
        ValueError: shapes or devices that do not fit together, or a backend that cannot run here.
        IndexError: a target outside the vocabulary, on CPU and within `check_contents()`; or else the loss is NaN.
    """
    checks.vocabulary_arguments(h, w, b, target)
    target = target.long()
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing} lies outside [0, 1]")
    chosen = resolve(backend, h, w, b, target)
    if chosen not in ("cpu", "triton"):
        return reference.linear_cross_entropy(h, w, b, target, ignore_index, label_smoothing)
    grad = torch.is_grad_enabled()
    needs = tuple(grad and t is not None and t.requires_grad for t in (h, w, b))
    return _cross_entropy(h, w, b, target, ignore_index, label_smoothing, *needs, chosen)[0]


def token_log_likelihood(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Tensor:
    """`log softmax(h w^T + b)[target]` of every row, exactly, without logits in full.

    Args:
        h: `[..., K]`; w: `[V, K]`; b: `[V]`; target: `[...]` integers below V.
        ignore_index: target of rows whose result and gradients are 0.

    Returns:
        `[...]`, at least fp32.

    Raises:
        ValueError, IndexError: as in `linear_cross_entropy`; on a GPU a row whose target is outside is NaN.
    """
    checks.vocabulary_arguments(h, w, b, target)
    target = target.long()
    chosen = resolve(backend, h, w, b, target)
    if chosen not in ("cpu", "triton"):
        return reference.token_log_likelihood(h, w, b, target, ignore_index)
    return _log_likelihood(h, w, b, target, ignore_index, chosen)[0]


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


def _module(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from .triton import cross_entropy

    return cross_entropy


def _present(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns tensors only: an empty one says that there is none."""
    return like.new_empty(0) if tensor is None else tensor


def _forward(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_h: bool,
    need_w: bool,
    need_b: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if backend == "cpu":
        needs = (need_h, need_w, need_b)
        loss, gradients = cpu.linear_cross_entropy_forward(h, w, b, target, ignore_index, label_smoothing, needs)
        return loss, *(_present(g, h) for g in gradients)  # pyright: ignore[reportReturnType]
    if checks.looked_at(target):
        checks.targets_inside(target, w.shape[0], ignore_index)
    loss, statistics = _module(backend).linear_cross_entropy_forward(h, w, b, target, ignore_index, label_smoothing)
    return loss, statistics.maximum, statistics.log_sum, h.new_empty(0)


def _forward_fake(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_h: bool,
    need_w: bool,
    need_b: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(h.dtype, torch.float32)
    loss = h.new_empty((), dtype=wide)
    if backend == "cpu":
        kept = [t if t is not None and need else None for t, need in ((h, need_h), (w, need_w), (b, need_b))]
        saved = [h.new_empty(0) if t is None else t.new_empty(t.shape) for t in kept]
        return loss, saved[0], saved[1], saved[2]
    rows = math.prod(h.shape[:-1])
    return loss, h.new_empty(rows, dtype=wide), h.new_empty(rows, dtype=wide), h.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, w, b, target, ctx.ignore_index, ctx.label_smoothing, *ctx.needs, ctx.backend = inputs
    ctx.has_bias = b is not None
    ctx.mark_non_differentiable(*output[1:])
    # Or else zeros are written for results that have no gradient.
    ctx.set_materialize_grads(False)
    if ctx.backend == "cpu":
        ctx.save_for_backward(*output[1:])
    else:
        ctx.save_for_backward(h, w, b, target, output[1], output[2])


def _gradient(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * 7
    if dloss is None:
        return (None, None, None, *rest)
    if ctx.backend == "cpu":
        gradients = tuple(g if need else None for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True))
        if is_fake(dloss):
            return (*(None if g is None else g * dloss.to(g.dtype) for g in gradients), *rest)
        return (*cpu.linear_cross_entropy_backward(dloss, gradients), *rest)  # pyright: ignore[reportArgumentType]
    options = (ctx.ignore_index, ctx.label_smoothing, *ctx.needs, ctx.backend)
    gradients = _cross_entropy_grad(dloss, *ctx.saved_tensors, *options)
    return (*(g if need else None for g, need in zip(gradients, ctx.needs, strict=True)), *rest)


def _backward(
    dloss: Tensor,
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_h: bool,
    need_w: bool,
    need_b: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module, needs = _module(backend), (need_h, need_w, need_b)
    statistics = module.RowStatistics(maximum, log_sum)
    arguments = (dloss, h, w, b, target, statistics, ignore_index, label_smoothing, needs)
    dh, dw, db = module.linear_cross_entropy_backward(*arguments)
    return _present(dh, h), _present(dw, h), _present(db, h)


def _backward_fake(
    dloss: Tensor,
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    label_smoothing: float,
    need_h: bool,
    need_w: bool,
    need_b: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(h, w, b, (need_h, need_w, need_b))


def _gradients_like(
    h: Tensor, w: Tensor, b: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    kept = [t if t is not None and need else None for t, need in zip((h, w, b), needs, strict=True)]
    made = [h.new_empty(0) if t is None else t.new_empty(t.shape) for t in kept]
    return made[0], made[1], made[2]


def _rows_forward(
    h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton" and checks.looked_at(target):
        checks.targets_inside(target, w.shape[0], ignore_index)
    out, statistics = _module(backend).token_log_likelihood_forward(h, w, b, target, ignore_index)
    return out, statistics.maximum, statistics.log_sum


def _rows_forward_fake(
    h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(h.dtype, torch.float32)
    rows = math.prod(h.shape[:-1])
    return h.new_empty(target.shape, dtype=wide), h.new_empty(rows, dtype=wide), h.new_empty(rows, dtype=wide)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, w, b, target, ctx.ignore_index, ctx.backend = inputs
    ctx.save_for_backward(h, w, b, target, output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _rows_gradient(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    needs = tuple(ctx.needs_input_grad[:3])
    gradients = _log_likelihood_grad(dout, *ctx.saved_tensors, ctx.ignore_index, *needs, ctx.backend)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None)


def _rows_backward(
    dout: Tensor,
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    need_h: bool,
    need_w: bool,
    need_b: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module, needs = _module(backend), (need_h, need_w, need_b)
    statistics = module.RowStatistics(maximum, log_sum)
    dh, dw, db = module.token_log_likelihood_backward(dout, h, w, b, target, statistics, ignore_index, needs)
    return _present(dh, h), _present(dw, h), _present(db, h)


def _rows_backward_fake(
    dout: Tensor,
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    need_h: bool,
    need_w: bool,
    need_b: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_like(h, w, b, (need_h, need_w, need_b))


_cross_entropy_grad = operator(
    "linear_cross_entropy_backward(Tensor dloss, Tensor h, Tensor w, Tensor? b, Tensor target, Tensor maximum, "
    "Tensor log_sum, int ignore_index, float label_smoothing, bool need_h, bool need_w, bool need_b, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_cross_entropy = operator(
    "linear_cross_entropy(Tensor h, Tensor w, Tensor? b, Tensor target, int ignore_index, float label_smoothing, "
    "bool need_h, bool need_w, bool need_b, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_gradient,
    autocast=True,
)
_log_likelihood_grad = operator(
    "token_log_likelihood_backward(Tensor dout, Tensor h, Tensor w, Tensor? b, Tensor target, Tensor maximum, "
    "Tensor log_sum, int ignore_index, bool need_h, bool need_w, bool need_b, str backend) -> (Tensor, Tensor, Tensor)",
    _rows_backward,
    _rows_backward_fake,
)
_log_likelihood = operator(
    "token_log_likelihood(Tensor h, Tensor w, Tensor? b, Tensor target, int ignore_index, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _rows_forward,
    _rows_forward_fake,
    setup_context=_rows_setup,
    backward=_rows_gradient,
    autocast=True,
)
