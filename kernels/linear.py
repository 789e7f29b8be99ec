"""Linear layers with what precedes and follows them: public functions, rungs, and the operator of CPU training."""

# Parts of named tuples are passed on as positional arguments, whose number no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError, UnavailableError

from . import fp8, reference
from .backend import Backend, resolve
from .checks import LARGEST_WIDTH, Branch, LinearGELU
from .cpu import gemm as cpu
from .cpu import int8
from .cpu import norms as cpu_norms
from .cpu.workspace import Dropout, in_dtype, scratch
from .flags import EightBits, kind_of
from .ladder import CPU_DTYPES, Call, Op, Rung, trains
from .library import Gradients, autocast_dtype, differentiable, on_device_of_arguments
from .norms import add_layer_norm, layer_norm


def floating_dtype(kind: str, device: torch.device) -> torch.dtype | None:
    """The floating-point dtype for a model with 8-bit GEMMs: bfloat16 where it is fast, else as stored.

    InputError for an unknown 8-bit format, UnavailableError where the device lacks it.
    """
    if kind not in get_args(EightBits):
        raise InputError(f"dtype={kind!r} is unknown; give a torch.dtype, 'int8' or 'fp8'")
    if kind == "fp8":
        fp8.require(device)
    elif device.type != "cpu":
        raise UnavailableError(
            f"int8 is for CPUs, and the model is on {device}; move it with model.to('cpu')"
        )
    else:
        int8.require()
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else None


def _infer(a: Branch, _: Call) -> Tensor:
    """On a CPU, without a norm."""
    if a.weight_out is not None:
        return cpu.mlp_residual(
            a.x, a.weight, a.bias, a.weight_out, a.bias_out, a.residual, a.gamma
        )
    if a.residual is not None:
        return cpu.linear_residual(a.x, a.weight, a.bias, a.residual, a.gamma)
    return cpu.linear(a.x, a.weight, a.bias)


def _infer_in_int8(a: Branch, _: Call) -> Tensor:
    norm = None if a.norm_weight is None else a[3:6]
    if a.weight_out is not None:
        layers = (a.weight, a.bias, a.weight_out, a.bias_out)
        return int8.mlp_residual(a.x, *layers, a.residual, a.gamma, norm=norm)
    if a.residual is not None:
        return int8.linear_residual(a.x, a.weight, a.bias, a.residual, a.gamma)
    return int8.linear(a.x, a.weight, a.bias, norm=norm)


def _in_fp8(a: Branch, call: Call) -> Tensor:
    out = fp8.linear(a.x, a.weight, a.bias, call.backend)
    return (
        out
        if a.residual is None
        else reference.branch_end(out, a.residual, a.gamma, a.row_scale, a.dropout_p)
    )


def _by_reference(a: Branch, _: Call) -> Tensor:
    out = reference.linear(a.x, a.weight, a.bias)
    return (
        out
        if a.residual is None
        else reference.branch_end(out, a.residual, a.gamma, a.row_scale, a.dropout_p)
    )


def _layer_by_layer(a: Branch, call: Call) -> Tensor:
    """The norm, each linear layer and the residual sum by operations of their own."""
    if a.norm_weight is not None:
        normed = layer_norm(a.x, *a[3:6], backend=call.backend)
        rest = a._replace(x=normed, norm_weight=None, norm_bias=None)
        return (_linear if a.weight_out is None else _mlp_residual)(rest, call.backend)
    hidden = linear_gelu(a.x, a.weight, a.bias, backend=call.backend)
    last = a._replace(
        x=hidden, weight=a.weight_out, bias=a.bias_out, weight_out=None, bias_out=None
    )
    return _linear_residual(last, call.backend)


def _train(a: Branch, _: Call) -> Tensor:
    """The operator in the dtype of its GEMMs; a normed x keeps its own. Dropout and learned factors are outside."""
    dtype = autocast_dtype(a.x.device) or a.x.dtype
    x = a.x.to(dtype) if a.norm_weight is None else a.x
    inner = a._replace(x=x, residual_is_x=a.residual is x, dtype=dtype)
    if a.dropout_p or (a.row_scale is not None and a.row_scale.requires_grad):
        inner = inner._replace(
            residual=None, gamma=None, row_scale=None, dropout_p=0.0, residual_is_x=False
        )
        out = _branch(inner, "cpu")[0]
        if a.dropout_p:
            dropout = Dropout(a.dropout_p, torch.randint(1 << 62, (1,)))
            # Not in the scratch memory of the mask, which the backward pass reads.
            out = out * torch.mul(dropout.mask(tuple(out.shape), out.dtype), 1 / dropout.kept)
        return cpu_norms.add_branch(out, a.residual, a.gamma, a.row_scale)
    return _branch(inner, "cpu")[0]


_SINGLE: dict[Rung, Any] = {
    "frozen": _infer,
    "fp8": _in_fp8,
    "int8": _infer_in_int8,
    "inference": _infer,
    "training": _train,
    "reference": _by_reference,
}
_SEVERAL: dict[Rung, Any] = {**_SINGLE, "fp8": _layer_by_layer, "reference": _layer_by_layer}
_NORMED = {rung: run for rung, run in _SEVERAL.items() if rung not in ("frozen", "inference")}
_LAYERS = ("weight", "weight_out")
_linear = Op("linear", Branch, _SINGLE, weights=("weight",), int8_race="linear")
_linear_residual = Op(
    "linear_residual", Branch, _SINGLE, weights=("weight",), int8_race="linear_residual"
)
_mlp_residual = Op("mlp_residual", Branch, _SEVERAL, weights=_LAYERS, int8_race="mlp_residual")
_layer_norm_linear = Op(
    "layer_norm_linear", Branch, _NORMED, weights=("weight",), int8_race="linear"
)
_layer_norm_mlp = Op("layer_norm_mlp", Branch, _NORMED, weights=_LAYERS, int8_race="mlp_residual")


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None
) -> Tensor:
    """`x W^T + b`. x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    return _linear(Branch(x, weight, bias), backend)


def joined_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    backend: Backend | None = None,
) -> Tensor:
    """`linear` of several layers in one GEMM: x `[..., K]`, weights `[M_i, K]`, biases `[M_i]` → `[..., Σ M_i]`.

    Any bias may be None, or there is none. Training on a CPU does not save the concatenated weights, which for query,
    key and value would be a copy.
    """
    if not weights or len(biases) not in (0, len(weights)):
        raise InputError(
            f"{len(weights)} weights and {len(biases)} biases: give a bias, or None, for each of the weights"
        )
    for weight, bias in zip(weights, biases or [None] * len(weights), strict=True):
        Branch(x, weight, bias).check()
    given = any(bias is not None for bias in biases)
    biases = (
        [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
        if given
        else []
    )
    call = Call(backend, resolve(backend, x, *weights, *biases))
    if trains(call, [x, *weights, *biases]) and not any(
        kind_of(w) or fp8.is_active(w) for w in weights
    ):
        dtype = autocast_dtype(x.device) or x.dtype
        return _side_by_side(_Joined(x.to(dtype), [*weights], [*biases], dtype), "cpu")[0]
    return linear(
        x, torch.cat([*weights]), torch.cat([*biases]) if biases else None, backend=backend
    )


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None
) -> Tensor:
    """`gelu(x W^T + b)` with the erf form of GELU. x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    return _linear_gelu(LinearGELU(x, weight, bias), backend)


def _gelu_in_fp8(a: LinearGELU, call: Call) -> Tensor:
    x, weight, bias, _ = a
    wide = weight.shape[0] > LARGEST_WIDTH
    if wide or not fp8.makes_fp8_rows(call.chosen, weight, x, bias):
        return F.gelu(fp8.linear(x, weight, bias, call.backend))
    from .triton.rows import bias_gelu_quantise

    product = fp8.linear(x, weight, None, call.backend)
    run = on_device_of_arguments(bias_gelu_quantise) if x.is_cuda else bias_gelu_quantise
    return fp8.keep(*run(product, bias))


def _gelu_kernel(a: LinearGELU, call: Call) -> Tensor:
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in a[:3])
    return _gelu_operator(a._replace(keep=keep), call.chosen)[0]


def _gelu_forward(a: LinearGELU, backend: str) -> tuple[Tensor, Tensor]:
    x, weight, bias, keep = a
    if backend == "triton":
        from .triton.rows import linear_gelu_forward

        out, kept = linear_gelu_forward(x, weight, bias, keep=keep)
    else:
        kept = (
            cpu.trained_linear(x, weight, bias)
            if x.dtype in CPU_DTYPES
            else F.linear(x, weight, bias)
        )
        out = F.gelu(kept)
    return out, x.new_empty(0) if kept is None or not keep else kept


def _gelu_fake(a: LinearGELU, backend: str) -> tuple[Tensor, Tensor]:
    shape = (*a.x.shape[:-1], a.weight.shape[0])
    return a.x.new_empty(shape), a.x.new_empty(shape if a.keep else 0)


def _gelu_backward(
    upstream: Gradients,
    a: LinearGELU,
    outputs: Sequence[Tensor],
    needs: Sequence[bool],
    backend: str,
) -> Gradients:
    dout, kept = upstream[0], outputs[1]
    assert dout is not None
    if backend == "triton":
        from .triton.rows import linear_gelu_backward

        return linear_gelu_backward(dout, *a[:3], kept, tuple(needs))
    dkept = torch.ops.aten.gelu_backward(dout.contiguous(), kept)
    return _linear_gradients(dkept, a.x, a.weight.to(a.x.dtype), _Needs(*needs))[:3]


_gelu_operator = differentiable(
    "linear_gelu",
    LinearGELU,
    _gelu_forward,
    _gelu_fake,
    _gelu_backward,
    wrt=("x", "weight", "bias"),
    outputs=2,
    keep=lambda a, outputs, _: (a, (None, outputs[1])),
    autocast=True,
)
_linear_gelu = Op(
    "linear_gelu",
    LinearGELU,
    {
        "fp8": _gelu_in_fp8,
        "int8": lambda a, _: int8.linear_gelu(*a[:3]),
        "inference": lambda a, _: cpu.linear_gelu(*a[:3]),
        "kernel": _gelu_kernel,
        "reference": lambda a, _: reference.linear_gelu(*a[:3]),
    },
    weights=("weight",),
    int8_race="linear",
)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """`residual + row_scale · gamma · dropout(x W^T + b)`: the end of a transformer branch.

    Args:
        x: `[..., K]`; weight: `[M, K]`; bias: `[M]`; residual: `[..., M]`.
        gamma: LayerScale `[M]` (arXiv 2103.17239).
        row_scale: `[B]`, one factor per entry of the first dimension: stochastic depth.
        dropout_p: probability of zeroing an element of the branch.
    """
    branch = Branch(
        x, weight, bias, residual=residual, gamma=gamma, row_scale=row_scale, dropout_p=dropout_p
    )
    return _linear_residual(branch, backend)


def mlp_residual(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    residual: Tensor,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """The MLP branch of a transformer: `residual + row_scale · gamma · dropout(gelu(x W1^T + b1) W2^T + b2)`.

    Args:
        x, residual: `[..., M]`; weight_in: `[F, M]`; bias_in: `[F]`; weight_out: `[M, F]`; bias_out: `[M]`.
        gamma, row_scale, dropout_p: as in `linear_residual`.
    """
    layers = (weight_in, bias_in, None, None, 0.0, weight_out, bias_out)
    return _mlp_residual(Branch(x, *layers, residual, gamma, row_scale, dropout_p), backend)


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """`linear` of `layer_norm` of x. Training on a CPU recomputes the normalised rows instead of saving them.

    Args:
        x: `[..., K]`; norm_weight, norm_bias, eps: of the norm; weight: `[M, K]`; bias: `[M]`.
    """
    return _layer_norm_linear(Branch(x, weight, bias, norm_weight, norm_bias, eps), backend)


def layer_norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The MLP branch of a pre-norm layer: `mlp_residual` of `layer_norm` of x, added to x.

    Training on a CPU saves only x and the input of the GELU.

    Args:
        x: `[..., M]`; norm_weight, norm_bias, eps: of the norm; the others as in `mlp_residual`.
    """
    layers = (weight_in, bias_in, norm_weight, norm_bias, eps, weight_out, bias_out)
    return _layer_norm_mlp(Branch(x, *layers, x, gamma, row_scale), backend)


class _LinearNorm(NamedTuple):
    """A linear layer at the end of a branch, and the norm of the sum."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    gamma: Tensor | None = None
    row_scale: Tensor | None = None
    dropout_p: float = 0.0
    wide: bool = False

    @property
    def branch(self) -> Branch:
        """All but the norm."""
        return Branch(*self[:3], None, None, 0.0, None, None, self.residual, *self[7:10])

    def check(self) -> None:
        self.branch.check()


def linear_add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    wide: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """The end of a branch and the next norm: `add_layer_norm` of `x W^T + b`.

    A CPU adds the residual inside the GEMM and normalises afterwards; a GPU adds it in the norm.

    Args:
        x: `[..., K]`; weight: `[M, K]`; bias: `[M]`; residual: `[..., M]`.
        norm_weight, norm_bias, eps, gamma, row_scale, dropout_p, wide: as in `add_layer_norm`.

    Returns:
        (normed, summed), both `[..., M]`.
    """
    given = (
        x,
        weight,
        bias,
        residual,
        norm_weight,
        norm_bias,
        eps,
        gamma,
        row_scale,
        dropout_p,
        wide,
    )
    return _linear_add_layer_norm(_LinearNorm(*given), backend)


def _sum_then_norm(a: _LinearNorm, call: Call) -> tuple[Tensor, Tensor]:
    summed = _linear_residual(a.branch, call.backend)
    return reference.layer_norm(summed, *a[4:7]), summed


def _infer_then_norm(a: _LinearNorm, _: Call) -> tuple[Tensor, Tensor]:
    summed = cpu.linear_residual(*a[:4], a.gamma)
    return reference.layer_norm(summed, *a[4:7]), summed


def _linear_then_norm(a: _LinearNorm, call: Call) -> tuple[Tensor, Tensor]:
    made = linear(*a[:3], backend=call.backend)
    options = {"gamma": a.gamma, "row_scale": a.row_scale, "dropout_p": a.dropout_p, "wide": a.wide}
    return add_layer_norm(made, *a[3:7], **options, backend=call.backend)


_linear_add_layer_norm = Op(
    "linear_add_layer_norm",
    _LinearNorm,
    {
        "frozen": _infer_then_norm,
        "fp8": _linear_then_norm,
        "int8": _sum_then_norm,
        "inference": _infer_then_norm,
        "reference": _linear_then_norm,
    },
    weights=("weight",),
    int8_race="linear_residual",
)


class _Joined(NamedTuple):
    """Training of layers side by side. A list of tensors costs an operator tens of microseconds."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    dtype: torch.dtype
    norm_weight = weight_out = residual = gamma = row_scale = None
    residual_is_x = False


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenated weights in the dtype of the GEMM, in scratch memory; a single weight as it is."""
    if len(parts) == 1:
        return parts[0]
    place = scratch("joined weights", (sum(len(part) for part in parts), parts[0].shape[1]), dtype)
    for rows, part in zip(place.split([len(part) for part in parts]), parts, strict=True):
        rows.copy_(part)
    return place


def _wide(weights: Sequence[Tensor], dtype: torch.dtype, gamma: Tensor | None) -> torch.dtype:
    """The dtype of the gradients of weights and biases: the storage dtype, if it is wider than the GEMM's."""
    for t in (*weights, *([] if gamma is None else [gamma])):
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


class _Needs(NamedTuple):
    """The required gradients of a linear layer."""

    x: bool
    weight: bool
    bias: bool
    gamma: bool = False


def _linear_gradients(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: _Needs,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    wide: torch.dtype | None = None,
    place: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and gamma of `gamma · (x W^T + b)` on a CPU, without the output of the layer.

    With `M = dout^T x`, the gradient of the weight but for its factor, the gradient of gamma is the sum of `W · M` over
    every row and of `b · Σ dout`: less work than a sum over all tokens, and the branch need not be saved. `wide` is the
    dtype of the gradients of weight and bias; `place` is memory for the gradient of x.
    """
    x = x.reshape(-1, x.shape[-1])
    none = x.new_empty(0)
    known = x.dtype in CPU_DTYPES
    wide = x.dtype if wide is None else wide
    dgamma = dweight = dbias = none
    of_weight, of_bias = needs.weight or needs.gamma, needs.bias or needs.gamma
    if known and of_weight:
        dbias = torch.empty(dout.shape[-1]) if of_bias else none
        dweight = cpu.weight_gradient(dout, x, wide, dbias if of_bias else None)
    else:
        dweight = (dout.flatten(0, -2).t() @ x).to(wide) if of_weight else none
        dbias = cpu.bias_gradient(dout) if of_bias else none
    dbias = dbias.to(wide)
    if gamma is not None:
        if needs.gamma:
            dgamma = torch.mul(
                dweight, weight, out=scratch("weights and gradients", tuple(weight.shape), wide)
            ).sum(1)
            dgamma = (dgamma if bias is None else dgamma.addcmul_(bias.to(dgamma.dtype), dbias)).to(
                gamma.dtype
            )
        dweight = dweight.mul_(gamma[:, None]) if needs.weight else none
        dbias = dbias.mul_(gamma) if needs.bias else none
    if not needs.x:
        return none, dweight, dbias, dgamma
    if known:
        return cpu.input_gradient(dout, weight, gamma, place), dweight, dbias, dgamma
    weight = weight if gamma is None else weight * gamma[:, None].to(weight.dtype)
    return dout @ weight, dweight, dbias, dgamma


def _normed(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows in the dtype of a GEMM, possibly in scratch memory, and their statistics; empty without a norm."""
    if a.norm_weight is None:
        return in_dtype("normed", a.x, a.dtype), a.x.new_empty(0), a.x.new_empty(0)
    normed, mean, rstd = cpu_norms.layer_norm_forward(a.x, a.norm_weight, a.norm_bias, a.eps)
    return in_dtype("normed", normed, a.dtype), mean, rstd


def _activated(kept: Tensor) -> Tensor:
    """The hidden layer of an MLP, in scratch memory."""
    return torch.ops.aten.gelu.out(kept, out=scratch("hidden", tuple(kept.shape), kept.dtype))


def _branch_forward(a: Any, _: str) -> tuple[Tensor, ...]:
    """The sum, the input of the GELU, and the statistics of the norm; the latter are empty without it."""
    rows, mean, rstd = _normed(a)
    bias = torch.cat([*a.biases]).to(a.dtype) if a.biases else None
    out, kept = cpu.trained_linear(rows, _joined(a.weights, a.dtype), bias), a.x.new_empty(0)
    if a.weight_out is not None:
        kept, bias = out, None if a.bias_out is None else a.bias_out.to(a.dtype)
        out = cpu.trained_linear(_activated(kept), a.weight_out, bias)
    if a.residual is not None:
        out = cpu_norms.add_branch(out, a.residual, a.gamma, a.row_scale, in_place=True)
    return out, kept, mean, rstd


def _branch_fake(a: Any, _: str) -> tuple[Tensor, ...]:
    wide = a.dtype if a.residual is None else torch.promote_types(a.dtype, a.residual.dtype)
    rows, inner = a.x.shape[:-1], sum(w.shape[0] for w in a.weights)
    outer = inner if a.weight_out is None else a.weight_out.shape[0]
    kept = a.x.new_empty(0) if a.weight_out is None else a.x.new_empty(*rows, inner, dtype=a.dtype)
    statistics = [a.x.new_empty(0) for _ in range(2)]
    if a.norm_weight is not None:
        kind = torch.promote_types(a.x.dtype, torch.float32)
        statistics = [a.x.new_empty(math.prod(rows), dtype=kind) for _ in range(2)]
    return a.x.new_empty(*rows, outer, dtype=wide), kept, *statistics


def _branch_backward(
    grads: Gradients, a: Any, outputs: Sequence[Tensor], needs: Sequence[bool], backend: str
) -> Gradients:
    (dout,), (kept, mean, rstd) = grads, outputs[1:]
    assert dout is not None
    need = dict.fromkeys(_WRT, False) | dict(zip(_WRT, needs, strict=False))
    need_x = need["x"] or need["norm_weight"] or need["norm_bias"]
    upstream = in_dtype("upstream", dout, a.dtype)
    if a.row_scale is not None:
        # The gradient of a branch without its LayerScale, in the dtype of its GEMMs.
        upstream = scratch("upstream", tuple(dout.shape), a.dtype)
        torch.mul(dout, cpu_norms.of_rows(a.row_scale, dout), out=upstream)
    gamma, of_gamma, of_outer = a.gamma, need["gamma"], (None, None, None)
    if a.weight_out is not None:
        hidden = _activated(kept) if need["weight_out"] or of_gamma else kept
        outer = _Needs(True, need["weight_out"], need["bias_out"], of_gamma)
        wide, place = (
            _wide([a.weight_out], a.dtype, gamma),
            scratch("hidden gradient", tuple(kept.shape), a.dtype),
        )
        dhidden, *of_outer = _linear_gradients(
            upstream, hidden, a.weight_out, outer, a.bias_out, gamma, wide=wide, place=place
        )
        dhidden = dhidden.view(kept.shape)
        upstream = torch.ops.aten.gelu_backward.grad_input(dhidden, kept, grad_input=dhidden)
        gamma, of_gamma = None, False
    rows, bias = _normed(a)[0], torch.cat([*a.biases]) if a.biases else None
    inner, wide = (
        _Needs(need_x, need["weight"], need["bias"], of_gamma),
        _wide(a.weights, a.dtype, gamma),
    )
    weight = _joined(a.weights, a.dtype)
    dx, dweight, dbias, dgamma = _linear_gradients(
        upstream, rows, weight, inner, bias, gamma, wide=wide
    )
    of_norm = (None, None)
    if need_x and a.norm_weight is not None:
        dx, *of_norm = cpu_norms.layer_norm_backward(dx, a.x, a.norm_weight, mean, rstd)
    if need_x and a.residual_is_x:
        dx = dx.add_(dout)
    dgamma = dgamma if a.weight_out is None else of_outer[2]
    return (
        dx,
        _as_parts(dweight, a.weights),
        _as_parts(dbias, a.biases),
        *of_norm,
        *of_outer[:2],
        dgamma,
        None,
    )


def _as_parts(gradient: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The gradient of a concatenation in its dtype."""
    for part in parts:
        gradient = gradient if gradient.dtype == part.dtype else gradient.to(part.dtype)
    return gradient


def _branch_gradient(call: Any, grads: Gradients, a: Branch, *rest: Any) -> Gradients:
    """That of a residual which is not x is the upstream gradient itself."""
    *found, _ = call(grads, a, *rest)
    needs = rest[1]
    return *found, grads[0] if needs[-1] and not a.residual_is_x else None


_WRT = (
    "x",
    "weight",
    "bias",
    "norm_weight",
    "norm_bias",
    "weight_out",
    "bias_out",
    "gamma",
    "residual",
)
_branch = differentiable(
    "trained_branch",
    Branch,
    _branch_forward,
    _branch_fake,
    _branch_backward,
    wrt=_WRT,
    outputs=4,
    # Not the hidden layer: its GELU is a hundredth of the work of the branch, and a quarter of what a block would keep.
    keep=lambda a, outputs, _: (a._replace(residual=None), (None, *outputs[1:])),
    around=_branch_gradient,
    autocast=(),
)
_side_by_side = differentiable(
    "trained_side_by_side",
    _Joined,
    _branch_forward,
    _branch_fake,
    lambda *given: _branch_backward(*given)[:3],
    wrt=("x", "weights", "biases"),
    outputs=4,
    keep=lambda a, outputs, _: (a, (None, *outputs[1:])),
    autocast=(),
)
