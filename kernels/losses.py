"""Cross-entropy over a vocabulary without materialised logits: public functions and operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import checks, host, reference
from .backend import Backend, autocast_dtype
from .checks import RowStatistics, Vocabulary
from .cpu import losses as cpu
from .cpu.selection import Race, operands, register, select
from .ladder import Call, Op
from .library import Gradients, Needs, Outputs, Upstream, differentiable, operator


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
    """Return the mean cross-entropy of the logits `h w^T + b`, computed in chunks of rows and vocabulary.

    On CPU the gradients are computed with the loss, while a chunk of logits is in cache, except that of w where the
    logits are smaller; on a GPU the backward pass recomputes the chunks.

    Args:
        h: `[..., K]`; w: `[V, K]`; b: `[V]`; target: `[...]` integers below V.
        ignore_index: target of rows that do not count; if no row counts, the loss and its gradients are 0. Of no rows
            the loss is NaN, as PyTorch's.
        label_smoothing: share of the target probability that is spread evenly over the vocabulary.

    Returns:
        A scalar, at least fp32.

    Raises:
        ValueError: inconsistent shapes or devices, or a backend that cannot run here.
        IndexError: a target outside the vocabulary, on CPU and within `check_contents()`; otherwise the loss is NaN.
    """
    args = Vocabulary(h, w, b, target, ignore_index, label_smoothing)
    loss = LINEAR_CROSS_ENTROPY(args, backend)
    return loss if target.numel() else loss + math.nan


def token_log_likelihood(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Tensor:
    """Return `log softmax(h w^T + b)[target]` of every row, exactly, without materialised logits.

    Args:
        h: `[..., K]`; w: `[V, K]`; b: `[V]`; target: `[...]` integers below V.
        ignore_index: target of rows whose result and gradients are 0.

    Returns:
        `[...]`, at least fp32.

    Raises:
        ValueError, IndexError: as in `linear_cross_entropy`; on a GPU a row with a target outside is NaN.
    """
    return TOKEN_LOG_LIKELIHOOD(Vocabulary(h, w, b, target, ignore_index), backend)


def race(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one column per row of weights `[B, C]`, in proportion to them, by an exponential race: `[B]`."""
    arrivals = torch.empty_like(weights).exponential_(generator=generator)
    # An arrival of exactly zero would win at any weight, or be NaN.
    return (weights / arrivals.clamp_min(torch.finfo(weights.dtype).tiny)).argmax(1)


def _module(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from .triton import cross_entropy

    return cross_entropy


def _run(name: str, a: Vocabulary, call: Call) -> Tensor:
    """Run the operator of a loss, or PyTorch's operations on all logits at once."""
    if torch.is_grad_enabled():
        a.needs = (a.h.requires_grad, a.w.requires_grad, a.b is not None and a.b.requires_grad)
    else:
        a.needs = (False, False, False)
    a.target = a.target.long()
    if call.backend == "cpu" and not torch.compiler.is_compiling() and _is_eager(name, a):
        return _EAGER[name](a)
    return _OPERATORS[name](a, call.backend)[0]


def _is_eager(name: str, a: Vocabulary) -> bool:
    """Return whether PyTorch's operations on all logits at once measured faster, where they fit a block."""
    dtype = a.h.dtype if a.h.dtype == torch.float64 else autocast_dtype(a.h.device) or a.h.dtype
    logits = a.target.numel() * a.w.shape[0]
    # In other dtypes, slices are as fast and take less memory.
    if dtype != torch.bfloat16 or not 0 < logits <= cpu.logits_at_once(dtype):
        return False
    size = "few" if logits <= _FEW_LOGITS else "many"
    return select(f"{name} of {size} logits", dtype) == "eager"


def _vocabulary_backward(
    name: str, upstream: Upstream, a: Vocabulary, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    compute = getattr(_module(backend), f"{name}_backward")
    statistics = RowStatistics(maximum=outputs[1], log_sum=outputs[2])
    return dict(zip("hwb", compute(upstream[0], a, statistics, [*needs.values()]), strict=True))


# The mean cross-entropy.


def _loss_reference(a: Vocabulary) -> Tensor:
    target = a.target.long()
    return reference.linear_cross_entropy(a.h, a.w, a.b, target, a.ignore_index, a.label_smoothing)


def _eager_loss(a: Vocabulary) -> Tensor:
    # Rows that do not count may hold anything.
    rows, targets, _ = cpu.counted_rows(a.h, a.target, a.w.shape[0], a.ignore_index)
    return reference.linear_cross_entropy(
        rows, a.w, a.b, targets, a.ignore_index, a.label_smoothing
    )


def _loss_forward(a: Vocabulary, backend: str) -> tuple[Tensor, ...]:
    """Return the loss and what is saved.

    On a CPU these are the gradients, with the logits' in place of that of w where they are smaller; else statistics.
    """
    empty = a.h.new_empty(0)
    if backend == "cpu":
        dlogits = cpu.logits_gradient(a.h, a.w) if a.needs[1] else None
        loss, (dh, dw, db) = cpu.linear_cross_entropy_forward(a, dlogits)
        saved = (dh, dw if dlogits is None else dlogits, db)
        return loss, *(empty if gradient is None else gradient for gradient in saved)
    if checks.should_check_values(a.target):
        checks.check_targets(a.target, a.w.shape[0], a.ignore_index)
    loss, statistics = _module(backend).linear_cross_entropy_forward(a)
    return loss, *statistics, empty


def _loss_fake(a: Vocabulary, backend: str) -> tuple[Tensor, ...]:
    h, w, b = a.h, a.w, a.b
    wide = torch.promote_types(h.dtype, torch.float32)
    loss, empty = h.new_empty((), dtype=wide), h.new_empty(0)
    if backend != "cpu":
        rows = math.prod(h.shape[:-1])
        return loss, h.new_empty(rows, dtype=wide), h.new_empty(rows, dtype=wide), empty
    dh = h.new_empty(h.shape) if a.needs[0] else empty
    dw = w.new_empty(w.shape) if a.needs[1] else empty
    db = b.new_empty(b.shape) if b is not None and a.needs[2] else empty
    dlogits = cpu.logits_gradient(h, w) if a.needs[1] else None
    return loss, dh, dw if dlogits is None else dlogits, db


def _keep_for_loss(a: Vocabulary, outputs: Outputs, backend: str) -> tuple[Vocabulary, Outputs]:
    if backend != "cpu":
        return a, (None, *outputs[1:3], None)
    late = a.needs[1] and cpu.keeps_logits(a.h, a.w)
    saved: Any = a
    saved.w = saved.b = None
    if not late:
        saved.h = saved.target = None
    return saved, (None, *outputs[1:])


def _scale_gradients(
    call: Any, upstream: Upstream, a: Vocabulary, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    """Scale the gradients that a CPU has computed with the loss, and compute that of w where it saved the logits'."""
    if backend != "cpu":
        return call(upstream, a, outputs, needs, backend)
    (dloss, *_), (dh, dw, db) = upstream, (saved.detach() for saved in outputs[1:])
    assert dloss is not None
    if a.h is not None:
        dw = _vocabulary_gradient(a.h.detach(), a.target, dw, a.ignore_index)
    unscaled = not is_fake(dloss) and host.number(dloss) == 1
    gradients = {}
    for name, gradient, need in zip("hwb", (dh, dw, db), a.needs, strict=True):
        if need:
            gradients[name] = gradient if unscaled else gradient * dloss.to(gradient.dtype)
    return gradients


_vocabulary_gradient = operator(
    "vocabulary_gradient(Tensor h, Tensor target, Tensor dlogits, int ignore_index) -> Tensor",
    cpu.vocabulary_gradient,
    lambda h, _, dlogits, __: h.new_empty(dlogits.shape[1], h.shape[-1]),
)
_loss = differentiable(
    "linear_cross_entropy",
    Vocabulary,
    _loss_forward,
    _loss_fake,
    partial(_vocabulary_backward, "linear_cross_entropy"),
    outputs=4,
    # On a CPU the outputs that are saved are the gradients, whose own gradients have to be refused.
    results=lambda _, backend: 4 if backend == "cpu" else 1,
    keep=_keep_for_loss,
    around=_scale_gradients,
    autocast=True,
)
LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    Vocabulary,
    {"kernel": partial(_run, "linear_cross_entropy")},
    reference=_loss_reference,
)


# The log-likelihood of every row.


def _rows_reference(a: Vocabulary) -> Tensor:
    return reference.token_log_likelihood(a.h, a.w, a.b, a.target.long(), a.ignore_index)


def _eager_rows(a: Vocabulary) -> Tensor:
    checks.check_targets(a.target, a.w.shape[0], a.ignore_index)
    return _rows_reference(a)


def _rows_forward(a: Vocabulary, backend: str) -> tuple[Tensor, ...]:
    if backend == "triton" and checks.should_check_values(a.target):
        checks.check_targets(a.target, a.w.shape[0], a.ignore_index)
    out, statistics = _module(backend).token_log_likelihood_forward(a)
    return out, *statistics


def _rows_fake(a: Vocabulary, _: str) -> tuple[Tensor, ...]:
    wide, rows = torch.promote_types(a.h.dtype, torch.float32), math.prod(a.h.shape[:-1])
    return tuple(a.h.new_empty(shape, dtype=wide) for shape in (a.target.shape, rows, rows))


_rows = differentiable(
    "token_log_likelihood",
    Vocabulary,
    _rows_forward,
    _rows_fake,
    partial(_vocabulary_backward, "token_log_likelihood"),
    outputs=3,
    keep=lambda a, outputs, _: (a, (None, *outputs[1:])),
    autocast=True,
)
TOKEN_LOG_LIKELIHOOD = Op(
    "token_log_likelihood",
    Vocabulary,
    {"kernel": partial(_run, "token_log_likelihood")},
    reference=_rows_reference,
)


# The comparison of slices with all logits at once.

_OPERATORS = {"linear_cross_entropy": _loss, "token_log_likelihood": _rows}
_EAGER = {"linear_cross_entropy": _eager_loss, "token_log_likelihood": _eager_rows}
# What the last cache holds in fp32, roughly; beyond it, passes over all logits wait for memory.
_FEW_LOGITS = 1 << 21
# Rows, entries of the vocabulary, and width.
_EXAMPLES = {"few": (64, 4096, 512), "many": (80, 32768, 256)}


def _example(size: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, vocabulary, width = _EXAMPLES[size]
    h, w, b = operands(dtype, (rows, width), (vocabulary, width), (vocabulary,))
    return h, w * width**-0.5, b, torch.arange(rows)


@torch.enable_grad()
def _train(run: Callable[[Vocabulary], Tensor], *tensors: Tensor) -> Tensor:
    """Return the gradient of the vocabulary, which takes all that a step of training does."""
    h, w, b = (tensor.detach().requires_grad_() for tensor in tensors[:3])
    return torch.autograd.grad(run(Vocabulary(h, w, b, tensors[3])).sum(), (h, w, b))[1]


def _train_in_bf16(run: Callable[[Vocabulary], Tensor], *tensors: Tensor) -> Tensor:
    if tensors[0].dtype != torch.bfloat16:
        raise NotImplementedError("all logits at once are for bf16")
    return _train(run, *tensors)


for _name, _size in product(_OPERATORS, _EXAMPLES):
    _candidates = {
        "sliced": partial(_train, lambda a, run=_OPERATORS[_name]: run(a, "cpu")[0]),
        "eager": partial(_train_in_bf16, _EAGER[_name]),
    }
    register(
        f"{_name} of {_size} logits",
        Race(_candidates, partial(_example, _size), 6 * math.prod(_EXAMPLES[_size])),
    )
