"""Cross-entropy over a vocabulary without materialised logits: checks, registration, gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import checks, reference
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

    On CPU the gradients are computed with the loss, while a chunk of logits is in cache, except that of w where the
    logits are smaller; on a GPU the backward pass recomputes the chunks.

    Args:
        h: `[..., K]`; w: `[V, K]`; b: `[V]`; target: `[...]` integers below V.
        ignore_index: target of rows that do not count; if no row counts, the loss and its gradients are 0.
        label_smoothing: share of the target probability that is spread evenly over the vocabulary.

    Returns:
        A scalar, at least fp32.

    Raises:
        ValueError: inconsistent shapes or devices, or a backend that cannot run here.
        IndexError: a target outside the vocabulary, on CPU and within `check_contents()`; otherwise the loss is NaN.
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
    """`log softmax(h w^T + b)[target]` of every row, exactly, without materialised logits.

    Args:
        h: `[..., K]`; w: `[V, K]`; b: `[V]`; target: `[...]` integers below V.
        ignore_index: target of rows whose result and gradients are 0.

    Returns:
        `[...]`, at least fp32.

    Raises:
        ValueError, IndexError: as in `linear_cross_entropy`; on a GPU a row with a target outside is NaN.
    """
    checks.vocabulary_arguments(h, w, b, target)
    target = target.long()
    chosen = resolve(backend, h, w, b, target)
    if chosen not in ("cpu", "triton"):
        return reference.token_log_likelihood(h, w, b, target, ignore_index)
    return _log_likelihood(h, w, b, target, ignore_index, chosen)[0]


def race(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One column per row of weights `[B, C]`, drawn in proportion to them by an exponential race: `[B]`."""
    arrivals = torch.empty_like(weights).exponential_(generator=generator)
    # An arrival of exactly zero would win at any weight, or be NaN.
    return (weights / arrivals.clamp_min(torch.finfo(weights.dtype).tiny)).argmax(1)


def _module(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from .triton import cross_entropy

    return cross_entropy


def _present(tensor: Tensor | None, like: Tensor) -> Tensor:
    """The tensor, or an empty one for None: an operator returns tensors only."""
    return like.new_empty(0) if tensor is None else tensor


def _forward(
    h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, ignore_index: int, label_smoothing: float, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *needs, backend = rest
    arguments = (h, w, b, target, ignore_index, label_smoothing)
    if backend == "cpu":
        dlogits = cpu.logits_gradient(h, w) if needs[1] else None
        loss, (dh, dw, db) = cpu.linear_cross_entropy_forward(*arguments, needs, dlogits)
        return loss, _present(dh, h), _present(dw if dlogits is None else dlogits, h), _present(db, h)
    if checks.should_check_values(target):
        checks.check_targets(target, w.shape[0], ignore_index)
    loss, statistics = _module(backend).linear_cross_entropy_forward(*arguments)
    return loss, statistics.maximum, statistics.log_sum, h.new_empty(0)


def _forward_fake(
    h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, _, *needs, backend = rest
    wide = torch.promote_types(h.dtype, torch.float32)
    loss = h.new_empty((), dtype=wide)
    if backend == "cpu":
        dh, dw, db = _gradients_like(h, w, b, needs)
        dlogits = cpu.logits_gradient(h, w) if needs[1] else None
        return loss, dh, dw if dlogits is None else dlogits, db
    rows = math.prod(h.shape[:-1])
    return loss, h.new_empty(rows, dtype=wide), h.new_empty(rows, dtype=wide), h.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, w, b, target, ctx.ignore_index, ctx.label_smoothing, *ctx.needs, ctx.backend = inputs
    ctx.has_bias = b is not None
    # Or else zeros are written for results that have no gradient.
    ctx.set_materialize_grads(False)
    if ctx.backend == "cpu":
        # The gradients depend on the inputs, and a gradient of them has to be refused.
        late = ctx.needs[1] and cpu.keeps_logits(h, w)
        ctx.save_for_backward(*output[1:], *((h, target) if late else ()))
    else:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(h, w, b, target, output[1], output[2])


def _gradient(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * 7
    if dloss is None:
        return (None, None, None, *rest)
    if ctx.backend == "cpu":
        dh, dw, db, *late = (t.detach() for t in ctx.saved_tensors)
        if late:
            dw = _vocabulary_grad(*late, dw, ctx.ignore_index)
        gradients = tuple(g if need else None for g, need in zip((dh, dw, db), ctx.needs, strict=True))
        if is_fake(dloss):
            return (*(None if g is None else g * dloss.to(g.dtype) for g in gradients), *rest)
        return (*cpu.linear_cross_entropy_backward(dloss, gradients), *rest)  # pyright: ignore[reportArgumentType]
    options = (ctx.ignore_index, ctx.label_smoothing, *ctx.needs, ctx.backend)
    gradients = _cross_entropy_grad(dloss, *ctx.saved_tensors, *options)
    return (*(g if need else None for g, need in zip(gradients, ctx.needs, strict=True)), *rest)


def _backward(
    name: str, dout: Tensor, h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    maximum, log_sum, *options, need_h, need_w, need_b, backend = rest
    module = _module(backend)
    statistics = module.RowStatistics(maximum, log_sum)
    needs = (need_h, need_w, need_b)
    dh, dw, db = getattr(module, name)(dout, h, w, b, target, statistics, *options, needs)
    return _present(dh, h), _present(dw, h), _present(db, h)


def _backward_fake(dloss: Tensor, h: Tensor, w: Tensor, b: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_h, need_w, need_b, _ = rest
    return _gradients_like(h, w, b, (need_h, need_w, need_b))


def _gradients_like(h: Tensor, w: Tensor, b: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    kept = [t if t is not None and need else None for t, need in zip((h, w, b), needs, strict=True)]
    made = [h.new_empty(0) if t is None else t.new_empty(t.shape) for t in kept]
    return made[0], made[1], made[2]


def _rows_forward(
    h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton" and checks.should_check_values(target):
        checks.check_targets(target, w.shape[0], ignore_index)
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


_vocabulary_grad = operator(
    "vocabulary_gradient(Tensor h, Tensor target, Tensor dlogits, int ignore_index) -> Tensor",
    cpu.vocabulary_gradient,
    lambda h, _, dlogits, __: h.new_empty(dlogits.shape[1], h.shape[-1]),
)
_cross_entropy_grad = operator(
    "linear_cross_entropy_backward(Tensor dloss, Tensor h, Tensor w, Tensor? b, Tensor target, Tensor maximum, "
    "Tensor log_sum, int ignore_index, float label_smoothing, bool need_h, bool need_w, bool need_b, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    partial(_backward, "linear_cross_entropy_backward"),
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
    partial(_backward, "token_log_likelihood_backward"),
    _backward_fake,
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
