"""Linear layers with what follows them: inference, gradients, registration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError, UnavailableError

from . import checks, fp8, reference
from .backend import Backend, named, resolve
from .cpu import int8
from .cpu import norms as cpu_norms
from .cpu import products as cpu
from .cpu.workspace import Dropout, scratch
from .library import autocast_dtype, on_device_of_arguments, operator
from .limits import LARGEST_WIDTH
from .marked import EightBits, kind_of

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def runs_cpu_inference(backend: Backend | None, *tensors: Tensor | None) -> bool:
    """True where the inference-only CPU path applies: one supported dtype, no graph, no trace, no autocast.

    InputError for a weight in oneDNN's layout where it does not apply.
    """
    if _infers_on_cpu(backend, *tensors):
        return True
    if not torch.compiler.is_compiling() and any(t is not None and cpu.is_frozen(t) for t in tensors):
        raise InputError(
            "a weight is frozen for CPU inference and supports no gradient, autocast, other dtype or backend: "
            "call unfreeze() on the model first"
        )
    return False


def skips_checks(backend: Backend | None, x: Tensor, weight: Tensor) -> bool:
    """True for a frozen model's GEMM in inference mode: it skips checks, which cost few tokens as much as the GEMM."""
    return (
        not torch.compiler.is_compiling()
        and cpu.is_frozen(weight)
        and torch.is_inference_mode_enabled()
        and x.is_cpu
        and x.dtype == weight.dtype
        and x.shape[-1] == weight.shape[1]
        and not named(backend)
        and not torch.is_autocast_enabled("cpu")
    )


def _infers_on_cpu(backend: Backend | None, *tensors: Tensor | None) -> bool:
    if resolve(backend, *tensors) != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    present = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in present):
        return False
    return present[0].dtype in _CPU_DTYPES and all(t.dtype == present[0].dtype for t in present)


def type_beside(kind: str, device: torch.device) -> torch.dtype | None:
    """The floating-point dtype for a model with 8-bit GEMMs: bfloat16 where it is fast, else as stored.

    InputError for an unknown 8-bit format, UnavailableError where the device lacks it.
    """
    if kind not in get_args(EightBits):
        raise InputError(f"dtype={kind!r} is unknown; give a torch.dtype, 'int8' or 'fp8'")
    if kind == "fp8":
        fp8.require(device)
    elif device.type != "cpu":
        raise UnavailableError(f"int8 is for CPUs, and the model is on {device}; move it with model.to('cpu')")
    else:
        int8.require()
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else None


def runs_in_int8(backend: Backend | None, weight: Tensor, x: Tensor, *others: Tensor | None) -> bool:
    """True where the GEMMs of a flagged weight may run in int8, in any stored dtype."""
    if kind_of(weight) != "int8" or torch.compiler.is_compiling():
        return False
    if weight.is_inference() or weight.device != x.device:
        return False
    return not (torch.is_grad_enabled() and weight.requires_grad) and runs_cpu_inference(backend, x, *others)


def _floating(x: Tensor, weight: Tensor) -> Tensor:
    """The weight of a floating-point GEMM; a flagged weight may have another dtype than x."""
    return weight if kind_of(weight) is None else weight.to(x.dtype)


def trains_on_cpu(backend: Backend | None, *tensors: Tensor | None) -> bool:
    """True where the operator for CPU training applies, which is opaque to compilers."""
    if resolve(backend, *tensors) != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    present = [t for t in tensors if t is not None]
    if torch.is_autocast_enabled("cpu"):
        types = {torch.get_autocast_dtype("cpu")}
        known = all(t.dtype in (torch.float32, torch.bfloat16) for t in present)
    else:
        types, known = {t.dtype for t in present}, True
    # Frozen weights are refused with a reason where products are made one by one.
    known = known and not any(cpu.is_frozen(t) for t in present)
    return known and len(types) == 1 and types <= set(_CPU_DTYPES) and any(t.requires_grad for t in present)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None) -> Tensor:
    """`x W^T + b`. x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    if skips_checks(backend, x, weight):
        return cpu.linear(x, weight, bias)
    checks.linear_arguments(x, weight, bias)
    if fp8.applies(x, weight, bias):
        return fp8.linear(x, weight, bias, backend)
    if runs_in_int8(backend, weight, x, bias) and int8.pays("linear", x, weight):
        return int8.linear(x, weight, bias)
    weight = _floating(x, weight)
    if runs_cpu_inference(backend, x, weight, bias):
        return cpu.linear(x, weight, bias)
    if trains_on_cpu(backend, x, weight, bias):
        return trained_linear(x, [weight], [] if bias is None else [bias])
    return reference.linear(x, weight, bias)


def joined_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, backend: Backend | None = None
) -> Tensor:
    """`linear` of several layers in one GEMM: x `[..., K]`, weights `[M_i, K]`, biases `[M_i]` → `[..., Σ M_i]`.

    Training on a CPU does not save the concatenated weights, which for query, key and value would be a copy.
    """
    if trains_on_cpu(backend, x, *weights, *biases) and not any(kind_of(w) or fp8.concerns(w) for w in weights):
        for number, weight in enumerate(weights):
            checks.linear_arguments(x, weight, biases[number] if biases else None)
        return trained_linear(x, [*weights], [*biases])
    return linear(x, torch.cat([*weights]), torch.cat([*biases]) if biases else None, backend=backend)


def trained_linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    norm: tuple[Tensor, Tensor, float] | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """The operator of a linear layer in training on a CPU, with the norm (weight, bias, eps) before it."""
    x, before, dtype = _operands(x, norm)
    return _linear(x, weights, biases, *before, residual, gamma, row_scale, dtype)[0]


def trained_mlp(
    x: Tensor,
    layers: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    norm: tuple[Tensor, Tensor, float] | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """The operator of an MLP in training on a CPU, as `trained_linear`."""
    x, before, dtype = _operands(x, norm)
    return _mlp(x, *layers, *before, residual, gamma, row_scale, dtype)[0]


def _operands(
    x: Tensor, norm: tuple[Tensor, Tensor, float] | None
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, float], torch.dtype]:
    """Operands of the training operators: x, the preceding norm, and the compute dtype. A normed x stays as it is."""
    dtype = autocast_dtype(x.device) or x.dtype
    return (x.to(dtype), (None, None, 0.0), dtype) if norm is None else (x, norm, dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None) -> Tensor:
    """`gelu(x W^T + b)` with the erf form of GELU. x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    checks.linear_arguments(x, weight, bias)
    if fp8.applies(x, weight, bias):
        return _gelu_fp8(x, weight, bias, backend)
    if runs_in_int8(backend, weight, x, bias) and int8.pays("linear", x, weight):
        return int8.linear_gelu(x, weight, bias)
    weight = _floating(x, weight)
    if runs_cpu_inference(backend, x, weight, bias):
        return cpu.linear_gelu(x, weight, bias)
    chosen = resolve(backend, x, weight, bias)
    if chosen not in ("cpu", "triton"):
        return reference.linear_gelu(x, weight, bias)
    present = (x, weight) if bias is None else (x, weight, bias)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in present)
    return _linear_gelu(x, weight, bias, keep, chosen)[0]


def _gelu_fp8(x: Tensor, weight: Tensor, bias: Tensor | None, backend: Backend | None) -> Tensor:
    wide = weight.shape[0] > LARGEST_WIDTH
    if wide or not fp8.makes_fp8_rows(resolve(backend, x, weight, bias), weight, x, bias):
        return F.gelu(fp8.linear(x, weight, bias, backend))
    from .triton.gelu import bias_gelu_quantise

    product = fp8.linear(x, weight, None, backend)
    run = on_device_of_arguments(bias_gelu_quantise) if x.is_cuda else bias_gelu_quantise
    return fp8.keep(*run(product, bias))


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
    checks.linear_arguments(x, weight, bias)
    checks.branch_arguments((*x.shape[:-1], weight.shape[0]), residual, gamma, row_scale, dropout_p)
    if fp8.applies(x, weight, bias, residual, gamma):
        out = fp8.linear(x, weight, bias, backend)
        return reference.branch_end(out, residual, gamma, row_scale, dropout_p)
    plain = row_scale is None and not dropout_p
    if plain and runs_in_int8(backend, weight, x, bias, gamma) and int8.pays("linear_residual", x, weight):
        return int8.linear_residual(x, weight, bias, residual, gamma)
    weight = _floating(x, weight)
    if plain and runs_cpu_inference(backend, x, weight, bias, residual, gamma):
        return cpu.linear_residual(x, weight, bias, residual, gamma)
    if trains_on_cpu(backend, x, weight, bias):
        biases = [] if bias is None else [bias]
        if not dropout_p and not wants_gradient(row_scale):
            return trained_linear(x, [weight], biases, None, residual, gamma, row_scale)
        return _add_branch(trained_linear(x, [weight], biases), residual, gamma, row_scale, dropout_p)
    return reference.linear_residual(x, weight, bias, residual, gamma, row_scale, dropout_p)


def wants_gradient(row_scale: Tensor | None) -> bool:
    """True for learned factors, which the training operators do not support."""
    return row_scale is not None and row_scale.requires_grad


def _add_branch(
    out: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    dropout_p: float,
    *,
    in_place: bool = False,
) -> Tensor:
    """`residual + row_scale · gamma · dropout(out)`, in one pass after the dropout.

    `in_place`: overwrite `out` if it is as wide as the sum, since a second tensor would fragment memory in every
    branch.
    """
    if dropout_p:
        dropout = Dropout(dropout_p, torch.randint(1 << 62, (1,)))
        out = out * torch.mul(dropout.mask(tuple(out.shape), out.dtype), 1 / dropout.kept)
    place = out if in_place and torch.promote_types(out.dtype, residual.dtype) == out.dtype else None
    if row_scale is None and gamma is None:
        return torch.add(residual, out, out=place)
    rows = None if row_scale is None else _of_rows(row_scale, out)
    factor = gamma if rows is None else rows if gamma is None else rows * gamma
    assert factor is not None
    if factor.dtype != out.dtype:
        place = None
    return torch.addcmul(residual, out, factor, out=place)


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
    plain = row_scale is None and not dropout_p
    if plain and skips_checks(backend, x, weight_in) and cpu.is_frozen(weight_out) and residual.shape == x.shape:
        return cpu.mlp_residual(x, weight_in, bias_in, weight_out, bias_out, residual, gamma)
    checks.mlp_arguments(x, weight_in, bias_in, weight_out, bias_out)
    checks.branch_arguments((*x.shape[:-1], weight_out.shape[0]), residual, gamma, row_scale, dropout_p)
    in_int8 = plain and all(runs_in_int8(backend, w, x, bias_in, bias_out, gamma) for w in (weight_in, weight_out))
    if in_int8 and int8.pays("mlp_residual", x, weight_in):
        return int8.mlp_residual(x, weight_in, bias_in, weight_out, bias_out, residual, gamma)
    in_fp8 = fp8.concerns(weight_in) or fp8.concerns(weight_out)
    if (
        plain
        and not in_fp8
        and runs_cpu_inference(backend, x, weight_in, bias_in, weight_out, bias_out, residual, gamma)
    ):
        return cpu.mlp_residual(x, weight_in, bias_in, weight_out, bias_out, residual, gamma)
    weight_in, weight_out = _floating(x, weight_in), _floating(x, weight_out)
    trains = not in_fp8 and trains_on_cpu(backend, x, weight_in, bias_in, weight_out, bias_out)
    if trains:
        layers = (weight_in, bias_in, weight_out, bias_out)
        if not dropout_p and not wants_gradient(row_scale):
            return trained_mlp(x, layers, None, residual, gamma, row_scale)
        return _add_branch(trained_mlp(x, layers), residual, gamma, row_scale, dropout_p)
    hidden = linear_gelu(x, weight_in, bias_in, backend=backend)
    return linear_residual(
        hidden,
        weight_out,
        bias_out,
        residual,
        gamma=gamma,
        row_scale=row_scale,
        dropout_p=dropout_p,
        backend=backend,
    )


def _gelu_forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from .triton.gelu import linear_gelu_forward

        out, kept = linear_gelu_forward(x, weight, bias, keep=keep)
    else:
        kept = cpu.trained_linear(x, weight, bias) if x.dtype in _CPU_DTYPES else F.linear(x, weight, bias)
        out = F.gelu(kept)
    return out, x.new_empty(0) if kept is None or not keep else kept


def _gelu_forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep else 0)


def _gelu_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *needs, backend = rest
    if backend != "triton":
        dkept = torch.ops.aten.gelu_backward(dout.contiguous(), kept)
        return _linear_gradients(dkept, x, weight.to(x.dtype), _Needs(*needs))[:3]
    from .triton.gelu import linear_gelu_backward

    found = linear_gelu_backward(dout, x, weight, bias, kept, tuple(needs))
    dx, dweight, dbias = (x.new_empty(0) if g is None else g for g in found)
    return dx, dweight, dbias


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenated weights in the dtype of the GEMM, in scratch memory; a single weight as it is."""
    if len(parts) == 1:
        return parts[0]
    place = scratch("joined weights", (sum(len(part) for part in parts), parts[0].shape[1]), dtype)
    for rows, part in zip(place.split([len(part) for part in parts]), parts, strict=True):
        rows.copy_(part)
    return place


def _scaled(dout: Tensor, row_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a branch without its LayerScale, in the dtype of its GEMMs; possibly in scratch memory."""
    if row_scale is None:
        return _rounded("upstream", dout, dtype)
    return torch.mul(dout, _of_rows(row_scale, dout), out=scratch("upstream", tuple(dout.shape), dtype))


def _rounded(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype; converted ones are in scratch memory."""
    return x if x.dtype == dtype else scratch(name, tuple(x.shape), dtype).copy_(x)


def _wide(weights: Sequence[Tensor], dtype: torch.dtype, gamma: Tensor | None) -> torch.dtype:
    """The dtype of the gradients of weights and biases: the storage dtype, if it is wider than the GEMM's."""
    for t in (*weights, *([] if gamma is None else [gamma])):
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _of_rows(row_scale: Tensor, x: Tensor) -> Tensor:
    return row_scale.view(-1, *[1] * (x.ndim - 1))


def _gelu_backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    around = (None, None, 0.0, None, None, None, None, False)
    return _linear_backward_fake(kept, x, [weight], [], *around, *rest[:3], False, x.dtype)[:3]


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
    known = x.dtype in _CPU_DTYPES
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
            dgamma = torch.mul(dweight, weight, out=scratch("weights and gradients", tuple(weight.shape), wide)).sum(1)
            dgamma = (dgamma if bias is None else dgamma.addcmul_(bias.to(dgamma.dtype), dbias)).to(gamma.dtype)
        dweight = dweight.mul_(gamma[:, None]) if needs.weight else none
        dbias = dbias.mul_(gamma) if needs.bias else none
    if not needs.x:
        return none, dweight, dbias, dgamma
    if known:
        return cpu.input_gradient(dout, weight, gamma, place), dweight, dbias, dgamma
    weight = weight if gamma is None else weight * gamma[:, None].to(weight.dtype)
    return dout @ weight, dweight, dbias, dgamma


def _normed(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed rows in the dtype of a GEMM, possibly in scratch memory, and their statistics; empty without a norm."""
    if norm_weight is None:
        return _rounded("normed", x, dtype), x.new_empty(0), x.new_empty(0)
    normed, mean, rstd = cpu_norms.normalise(x, norm_weight, norm_bias, eps)
    return _rounded("normed", normed, dtype), mean, rstd


def _through_norm(
    dnormed: Tensor, x: Tensor, norm_weight: Tensor | None, mean: Tensor, rstd: Tensor, dout: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of the norm's parameters, plus the gradient of a residual that is x too."""
    dx, dweight, dbias = dnormed, dnormed.new_empty(0), dnormed.new_empty(0)
    if norm_weight is not None:
        dx, dweight, dbias = cpu_norms.normalise_backward(dnormed, x, norm_weight, mean, rstd)
    return dx if dout is None else dx.add_(dout), dweight, dbias


def _linear_forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *given: Any) -> tuple[Tensor, ...]:
    norm_weight, norm_bias, eps, residual, gamma, row_scale, dtype = given
    rows, mean, rstd = _normed(x, norm_weight, norm_bias, eps, dtype)
    bias = torch.cat([*biases]).to(dtype) if biases else None
    out = cpu.trained_linear(rows, _joined(weights, dtype), bias)
    out = out if residual is None else _add_branch(out, residual, gamma, row_scale, 0.0, in_place=True)
    return out, mean, rstd


def _linear_forward_fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *given: Any) -> Any:
    norm_weight, _, _, residual, _, _, dtype = given
    wide = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    out = x.new_empty(*x.shape[:-1], sum(w.shape[0] for w in weights), dtype=wide)
    return out, *_statistics_of(x, norm_weight)


def _statistics_of(x: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if norm_weight is None:
        return x.new_empty(0), x.new_empty(0)
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(math.prod(x.shape[:-1]), dtype=wide), x.new_empty(math.prod(x.shape[:-1]), dtype=wide)


def _linear_backward(
    dout: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *given: Any
) -> tuple[Tensor, ...]:
    """The gradients as tensors, empty where not needed: an operator returns tensors only."""
    norm_weight, norm_bias, eps, mean, rstd, gamma, row_scale, itself, *needs, dtype = given
    rows = _normed(x, norm_weight, norm_bias, eps, dtype)[0]
    upstream = _scaled(dout, row_scale, dtype)
    bias = torch.cat([*biases]) if biases else None
    weight = _joined(weights, dtype)
    wide = _wide(weights, dtype, gamma)
    dx, *gradients = _linear_gradients(upstream, rows, weight, _Needs(*needs), bias, gamma, wide=wide)
    of_norm = [dx.new_empty(0) for _ in range(2)]
    if needs[0]:
        dx, *of_norm = _through_norm(dx, x, norm_weight, mean, rstd, dout if itself else None)
    return dx, *gradients, *of_norm


def _linear_backward_fake(
    dout: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *given: Any
) -> tuple[Tensor, ...]:
    norm_weight, _, _, _, _, gamma, _, _, need_x, need_weight, need_bias, need_gamma, dtype = given
    outputs = sum(w.shape[0] for w in weights)
    wide = _wide(weights, dtype, gamma)

    def made(need: bool, shape: Sequence[int], kind: torch.dtype) -> Tensor:
        return x.new_empty(shape, dtype=kind) if need else x.new_empty(0, dtype=dtype)

    normed = need_x and norm_weight is not None
    return (
        made(need_x, x.shape, x.dtype if normed else dtype),
        made(need_weight, (outputs, x.shape[-1]), wide),
        made(need_bias, (outputs,), wide),
        made(need_gamma, (outputs,), dtype if gamma is None else gamma.dtype),
        *(made(normed, x.shape[-1:], dtype if norm_weight is None else norm_weight.dtype) for _ in range(2)),
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, biases, norm_weight, norm_bias, ctx.eps, residual, gamma, row_scale, ctx.dtype = inputs
    ctx.parts = len(weights), len(biases)
    ctx.itself = residual is x
    ctx.save_for_backward(x, *weights, *biases, norm_weight, norm_bias, *output[1:], gamma, row_scale)
    ctx.mark_non_differentiable(*output[1:])
    # Or else zeros are written for results that have no gradient.
    ctx.set_materialize_grads(False)


def _linear_gradient(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    number, biased = ctx.parts
    if dout is None:
        return None, [None] * number, [None] * biased, *[None] * 7
    x, *saved = ctx.saved_tensors
    weights, biases, rest = saved[:number], saved[number : number + biased], saved[number + biased :]
    norm_weight, norm_bias, mean, rstd, gamma, row_scale = rest
    need_x, need_weights, need_biases, *need_norm, _, need_residual, need_gamma, _, _ = ctx.needs_input_grad
    needs = (need_x or any(need_norm), any(need_weights), any(need_biases), need_gamma)
    norm = (norm_weight, norm_bias, ctx.eps, mean, rstd)
    found = _linear_grad(dout, x, weights, biases, *norm, gamma, row_scale, ctx.itself, *needs, ctx.dtype)
    dx, dweight, dbias, dgamma, *of_norm = found
    sizes = [w.shape[0] for w in weights]
    return (
        dx if need_x else None,
        _divided(dweight, sizes, need_weights),
        _divided(dbias, sizes[:biased], need_biases),
        *(g if need else None for g, need in zip(of_norm, need_norm, strict=True)),
        None,
        dout if need_residual and not ctx.itself else None,
        dgamma if need_gamma else None,
        None,
        None,
    )


def _divided(gradient: Tensor, sizes: list[int], needs: list[bool]) -> list[Tensor | None]:
    """The gradient of every part of a weight, or of a bias."""
    if not any(needs):
        return [None] * len(needs)
    return [g if need else None for g, need in zip(gradient.split(sizes), needs, strict=True)]


def _gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    # Or else zeros are written for the result that has no gradient.
    ctx.set_materialize_grads(False)


def _gelu_gradient(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None, None
    needs = tuple(ctx.needs_input_grad[:3])
    gradients = _linear_gelu_grad(dout, *ctx.saved_tensors, *needs, ctx.backend)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None)


def _mlp_forward(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm_weight, norm_bias, eps, residual, gamma, row_scale, dtype = given
    rows, mean, rstd = _normed(x, norm_weight, norm_bias, eps, dtype)
    bias_in, bias_out = (None if b is None else b.to(dtype) for b in (bias_in, bias_out))
    kept = cpu.trained_linear(rows, weight_in, bias_in)
    hidden = torch.ops.aten.gelu.out(kept, out=scratch("hidden", tuple(kept.shape), dtype))
    out = cpu.trained_linear(hidden, weight_out, bias_out)
    out = out if residual is None else _add_branch(out, residual, gamma, row_scale, 0.0, in_place=True)
    return out, kept, mean, rstd


def _mlp_forward_fake(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm_weight, _, _, residual, _, _, dtype = given
    wide = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    out = x.new_empty(*x.shape[:-1], weight_out.shape[0], dtype=wide)
    return out, x.new_empty(*x.shape[:-1], weight_in.shape[0], dtype=dtype), *_statistics_of(x, norm_weight)


def _mlp_backward(
    dout: Tensor,
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    kept: Tensor,
    *given: Any,
) -> tuple[Tensor, ...]:
    norm_weight, norm_bias, eps, mean, rstd, gamma, row_scale, itself, *needs, dtype = given
    need_x, need_in, need_bias_in, need_out, need_bias_out, need_gamma = needs
    upstream = _scaled(dout, row_scale, dtype)
    hidden = kept
    if need_out or need_gamma:
        hidden = torch.ops.aten.gelu.out(kept, out=scratch("hidden", tuple(kept.shape), dtype))
    outer = _Needs(True, need_out, need_bias_out, need_gamma)
    place = scratch("hidden gradient", tuple(kept.shape), dtype)
    wide = _wide([weight_out], dtype, gamma)
    dhidden, *of_outer = _linear_gradients(upstream, hidden, weight_out, outer, bias_out, gamma, wide=wide, place=place)
    dhidden = dhidden.view(kept.shape)
    dkept = torch.ops.aten.gelu_backward.grad_input(dhidden, kept, grad_input=dhidden)
    rows = _normed(x, norm_weight, norm_bias, eps, dtype)[0]
    inner = _Needs(need_x, need_in, need_bias_in)
    wide = _wide([weight_in], dtype, None)
    dx, dweight_in, dbias_in, _ = _linear_gradients(dkept, rows, weight_in, inner, wide=wide)
    of_norm = [dx.new_empty(0) for _ in range(2)]
    if need_x:
        dx, *of_norm = _through_norm(dx, x, norm_weight, mean, rstd, dout if itself else None)
    return dx, dweight_in, dbias_in, *of_outer, *of_norm


def _mlp_backward_fake(
    dout: Tensor,
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    kept: Tensor,
    *given: Any,
) -> tuple[Tensor, ...]:
    norm_weight, _, _, mean, rstd, gamma, _, _, *needs, dtype = given
    need_x, need_in, need_bias_in, need_out, need_bias_out, need_gamma = needs
    around = (norm_weight, None, 0.0, mean, rstd)
    inner = _linear_backward_fake(
        kept, x, [weight_in], [], *around, None, None, False, need_x, need_in, need_bias_in, False, dtype
    )
    outer = _linear_backward_fake(
        dout, kept, [weight_out], [], None, None, 0.0, mean, rstd, gamma, None, False, False, need_out, need_bias_out,
        need_gamma, dtype,
    )  # fmt: skip
    return *inner[:3], *outer[1:4], *inner[4:]


def _mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *layers, norm_weight, norm_bias, ctx.eps, residual, gamma, row_scale, ctx.dtype = inputs
    ctx.itself = residual is layers[0]
    # Not the hidden layer: its GELU is a hundredth of the work of the branch, and a quarter of what a block would keep.
    ctx.save_for_backward(*layers, output[1], norm_weight, norm_bias, *output[2:], gamma, row_scale)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _mlp_gradient(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 12
    *layers, norm_weight, norm_bias, mean, rstd, gamma, row_scale = ctx.saved_tensors
    need_x, *need_layers, need_norm_weight, need_norm_bias, _, need_residual, need_gamma, _, _ = ctx.needs_input_grad
    need_norm = need_norm_weight, need_norm_bias
    needs = (need_x or any(need_norm), *need_layers, need_gamma)
    norm = (norm_weight, norm_bias, ctx.eps, mean, rstd)
    found = _mlp_grad(dout, *layers, *norm, gamma, row_scale, ctx.itself, *needs, ctx.dtype)
    dx, *of_layers, dgamma, dnorm_weight, dnorm_bias = (
        g if need else None for g, need in zip(found, (need_x, *need_layers, need_gamma, *need_norm), strict=True)
    )
    of_residual = dout if need_residual and not ctx.itself else None
    return dx, *of_layers, dnorm_weight, dnorm_bias, None, of_residual, dgamma, None, None


_AROUND = "Tensor? norm_weight, Tensor? norm_bias, float eps"
_ENDS = "Tensor? gamma, Tensor? row_scale"
_linear_grad = operator(
    f"trained_linear_backward(Tensor dout, Tensor x, Tensor[] weights, Tensor[] biases, {_AROUND}, Tensor mean, "
    f"Tensor rstd, {_ENDS}, bool itself, bool need_x, bool need_weight, bool need_bias, bool need_gamma, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
    autocast=(),
)
_linear = operator(
    f"trained_linear(Tensor x, Tensor[] weights, Tensor[] biases, {_AROUND}, Tensor? residual, {_ENDS}, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _linear_forward,
    _linear_forward_fake,
    setup_context=_linear_setup,
    backward=_linear_gradient,
    autocast=(),
)
_linear_gelu_grad = operator(
    "linear_gelu_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor kept, bool need_x, "
    "bool need_weight, bool need_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _gelu_backward,
    _gelu_backward_fake,
)
_linear_gelu = operator(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, bool keep, str backend) -> (Tensor, Tensor)",
    _gelu_forward,
    _gelu_forward_fake,
    setup_context=_gelu_setup,
    backward=_gelu_gradient,
    autocast=True,
)
_mlp_grad = operator(
    "mlp_backward(Tensor dout, Tensor x, Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out, "
    f"Tensor kept, {_AROUND}, Tensor mean, Tensor rstd, {_ENDS}, bool itself, bool need_x, bool need_in, "
    "bool need_bias_in, bool need_out, bool need_bias_out, bool need_gamma, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mlp_backward,
    _mlp_backward_fake,
    autocast=(),
)
_mlp = operator(
    "mlp(Tensor x, Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out, "
    f"{_AROUND}, Tensor? residual, {_ENDS}, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _mlp_forward,
    _mlp_forward_fake,
    setup_context=_mlp_setup,
    backward=_mlp_gradient,
    autocast=(),
)
