"""Cross-entropy over a vocabulary without materialised logits: public functions and operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import checks, host, reference
from .backend import Backend
from .checks import RowStatistics, Vocabulary
from .cpu import losses as cpu
from .cpu.selection import Race, operands, register, select
from .ladder import Call, Op
from .library import Gradients, autocast_dtype, differentiable, operator


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
    given = Vocabulary(h, w, b, target, ignore_index, label_smoothing)
    return _linear_cross_entropy(given, backend)


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
    return _token_log_likelihood(Vocabulary(h, w, b, target, ignore_index), backend)


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


def _kernel(name: str, a: Vocabulary, call: Call) -> Tensor:
    grad = torch.is_grad_enabled()
    needs = tuple(grad and t is not None and t.requires_grad for t in a[:3])
    a = a._replace(target=a.target.long(), needs=needs)
    if call.chosen == "cpu" and not torch.compiler.is_compiling() and _is_eager(name, a):
        return _EAGER[name](a)
    return _OPERATORS[name](a, call.chosen)[0]


def _is_eager(name: str, a: Vocabulary) -> bool:
    """Whether PyTorch's operations on all logits at once measured faster, where these are no more than a block."""
    dtype = a.h.dtype if a.h.dtype == torch.float64 else autocast_dtype(a.h.device) or a.h.dtype
    logits = a.target.numel() * a.w.shape[0]
    # Of other types, slices are as fast and take less memory.
    if dtype != torch.bfloat16 or not 0 < logits <= cpu.logits_at_once(dtype):
        return False
    return (
        select(f"{name} of {'few' if logits <= _FEW_LOGITS else 'many'} logits", dtype) == "eager"
    )


def _eager_cross_entropy(a: Vocabulary) -> Tensor:
    # Rows that do not count may hold anything.
    rows, targets, _ = cpu.counted_rows(a.h, a.target, a.w.shape[0], a.ignore_index)
    return reference.linear_cross_entropy(
        rows, a.w, a.b, targets, a.ignore_index, a.label_smoothing
    )


def _eager_log_likelihood(a: Vocabulary) -> Tensor:
    checks.check_targets(a.target, a.w.shape[0], a.ignore_index)
    return reference.token_log_likelihood(*a[:5])


def _forward(a: Vocabulary, backend: str) -> tuple[Tensor, ...]:
    """The loss; on a CPU its gradients, the logits' in place of that of w where they are smaller; else statistics."""
    if backend == "cpu":
        dlogits = cpu.logits_gradient(a.h, a.w) if a.needs[1] else None
        loss, (dh, dw, db) = cpu.linear_cross_entropy_forward(a, dlogits)
        kept = (dh, dw if dlogits is None else dlogits, db)
        return loss, *(a.h.new_empty(0) if t is None else t for t in kept)
    if checks.should_check_values(a.target):
        checks.check_targets(a.target, a.w.shape[0], a.ignore_index)
    loss, statistics = _module(backend).linear_cross_entropy_forward(a)
    return loss, *statistics, a.h.new_empty(0)


def _fake(a: Vocabulary, backend: str) -> tuple[Tensor, ...]:
    h, w = a.h, a.w
    wide = torch.promote_types(h.dtype, torch.float32)
    loss = h.new_empty((), dtype=wide)
    if backend == "cpu":
        pairs = zip(a[:3], a.needs, strict=True)
        dh, dw, db = (
            t.new_empty(t.shape) if t is not None and need else h.new_empty(0) for t, need in pairs
        )
        dlogits = cpu.logits_gradient(h, w) if a.needs[1] else None
        return loss, dh, dw if dlogits is None else dlogits, db
    rows = math.prod(h.shape[:-1])
    return loss, h.new_empty(rows, dtype=wide), h.new_empty(rows, dtype=wide), h.new_empty(0)


def _saved_for_backward(
    a: Vocabulary, outputs: Sequence[Tensor], backend: str
) -> tuple[Vocabulary, Sequence[Any]]:
    if backend != "cpu":
        return a, (None, *outputs[1:3], None)
    late = a.needs[1] and cpu.keeps_logits(a.h, a.w)
    a = a._replace(w=None, b=None) if late else a._replace(h=None, w=None, b=None, target=None)
    return a, (None, *outputs[1:])


def _gradient(
    call: Any,
    upstream: Gradients,
    a: Vocabulary,
    outputs: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
) -> Gradients:
    if backend != "cpu":
        return call(upstream, a, outputs, needs, backend)
    dloss, (dh, dw, db) = upstream[0], (t.detach() for t in outputs[1:])
    assert dloss is not None
    if a.h is not None:
        dw = _vocabulary_grad(a.h.detach(), a.target, dw, a.ignore_index)
    gradients = tuple(g if need else None for g, need in zip((dh, dw, db), a.needs, strict=True))
    if not is_fake(dloss) and host.number(dloss) == 1:
        return gradients
    return tuple(None if g is None else g * dloss.to(g.dtype) for g in gradients)


def _backward(
    name: str,
    upstream: Gradients,
    a: Vocabulary,
    outputs: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
) -> Gradients:
    return getattr(_module(backend), name)(
        upstream[0], a, RowStatistics(*outputs[1:3]), tuple(needs)
    )


_vocabulary_grad = operator(
    "vocabulary_gradient(Tensor h, Tensor target, Tensor dlogits, int ignore_index) -> Tensor",
    cpu.vocabulary_gradient,
    lambda h, _, dlogits, __: h.new_empty(dlogits.shape[1], h.shape[-1]),
)
_cross_entropy = differentiable(
    "linear_cross_entropy",
    Vocabulary,
    _forward,
    _fake,
    partial(_backward, "linear_cross_entropy_backward"),
    wrt=("h", "w", "b"),
    outputs=4,
    # On a CPU the outputs that are saved are the gradients, whose own gradients have to be refused.
    results=lambda _, backend: 4 if backend == "cpu" else 1,
    keep=_saved_for_backward,
    around=_gradient,
    autocast=True,
)
_linear_cross_entropy = Op(
    "linear_cross_entropy",
    Vocabulary,
    {
        "kernel": lambda a, call: _kernel("linear_cross_entropy", a, call),
        "reference": lambda a, _: reference.linear_cross_entropy(
            *a._replace(target=a.target.long())[:6]
        ),
    },
)


def _rows_forward(a: Vocabulary, backend: str) -> tuple[Tensor, ...]:
    if backend == "triton" and checks.should_check_values(a.target):
        checks.check_targets(a.target, a.w.shape[0], a.ignore_index)
    out, statistics = _module(backend).token_log_likelihood_forward(a)
    return out, *statistics


def _rows_fake(a: Vocabulary, _: str) -> tuple[Tensor, ...]:
    wide, rows = torch.promote_types(a.h.dtype, torch.float32), math.prod(a.h.shape[:-1])
    return tuple(a.h.new_empty(shape, dtype=wide) for shape in (a.target.shape, rows, rows))


_log_likelihood = differentiable(
    "token_log_likelihood",
    Vocabulary,
    _rows_forward,
    _rows_fake,
    partial(_backward, "token_log_likelihood_backward"),
    wrt=("h", "w", "b"),
    outputs=3,
    keep=lambda a, outputs, _: (a, (None, *outputs[1:])),
    autocast=True,
)
_token_log_likelihood = Op(
    "token_log_likelihood",
    Vocabulary,
    {
        "kernel": lambda a, call: _kernel("token_log_likelihood", a, call),
        "reference": lambda a, _: reference.token_log_likelihood(
            *a._replace(target=a.target.long())[:5]
        ),
    },
)

_OPERATORS = {"linear_cross_entropy": _cross_entropy, "token_log_likelihood": _log_likelihood}
_EAGER = {
    "linear_cross_entropy": _eager_cross_entropy,
    "token_log_likelihood": _eager_log_likelihood,
}
# What the last cache holds in fp32, roughly; beyond it, passes over all logits wait for memory.
_FEW_LOGITS = 1 << 21
# Rows, entries of the vocabulary, and width.
_EXAMPLES = {"few": (64, 4096, 512), "many": (80, 32768, 256)}


def _example(size: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rows, vocabulary, width = _EXAMPLES[size]
    h, w, b = operands(dtype, (rows, width), (vocabulary, width), (vocabulary,))
    return h, w * width**-0.5, b, torch.arange(rows)


@torch.enable_grad()
def _trained(run: Callable[[Vocabulary], Tensor], *tensors: Tensor) -> Tensor:
    """The gradient of the vocabulary, which takes all that a step of training does."""
    h, w, b = (t.detach().requires_grad_() for t in tensors[:3])
    return torch.autograd.grad(run(Vocabulary(h, w, b, tensors[3])).sum(), (h, w, b))[1]


def _trained_in_bf16(run: Callable[[Vocabulary], Tensor], *tensors: Tensor) -> Tensor:
    if tensors[0].dtype != torch.bfloat16:
        raise NotImplementedError("all logits at once are for bf16")
    return _trained(run, *tensors)


for _name, _size in product(_OPERATORS, _EXAMPLES):
    _candidates = {
        "sliced": partial(_trained, lambda a, run=_OPERATORS[_name]: run(a, "cpu")[0]),
        "eager": partial(_trained_in_bf16, _EAGER[_name]),
    }
    register(
        f"{_name} of {_size} logits",
        Race(_candidates, partial(_example, _size), 6 * math.prod(_EXAMPLES[_size])),
    )
