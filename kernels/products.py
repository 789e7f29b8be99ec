"""Linear layers with what follows them: inference, gradients, registration."""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError, UnavailableError

from . import checks, fp8, reference
from .backend import Backend, named, resolve
from .cpu import int8
from .cpu import products as cpu
from .cpu.workspace import Dropout
from .library import on_device_of_arguments, operator
from .limits import LARGEST_WIDTH
from .marked import EightBits, kind_of

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def runs_cpu_inference(backend: Backend | None, *tensors: Tensor | None) -> bool:
    """True where the inference-only CPU path applies: one type it knows, no graph, no trace, no autocast.

    Raises:
        InputError: it does not, and a weight is laid out for it.
    """
    if _infers_on_cpu(backend, *tensors):
        return True
    if not torch.compiler.is_compiling() and any(t is not None and t.is_mkldnn for t in tensors):
        raise InputError(
            "a weight is frozen for inference on a CPU, and here a gradient, autocast, another type or another backend "
            "is asked for; call unfreeze() on the model first"
        )
    return False


def multiplies_at_once(backend: Backend | None, x: Tensor, weight: Tensor) -> bool:
    """True for what a frozen model multiplies in inference mode.

    Its weights were looked at when they were laid out, and nothing is left to choose; for a few tokens, the checks and
    the choices of every call would take as long as the product.
    """
    return (
        not torch.compiler.is_compiling()
        and weight.is_mkldnn
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
    """The floating-point type of a model whose products run in 8 bits: bfloat16 where it is fast, else as stored.

    Raises:
        InputError: no such kind of 8 bits.
        UnavailableError: products in them are not to be had there.
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
    """True where the products of a marked weight run in int8, whatever type its values are stored in."""
    if kind_of(weight) != "int8" or torch.compiler.is_compiling():
        return False
    if weight.is_inference() or weight.device != x.device:
        return False
    return not (torch.is_grad_enabled() and weight.requires_grad) and runs_cpu_inference(backend, x, *others)


def _floating(x: Tensor, weight: Tensor) -> Tensor:
    """The weight of a product that does not run in 8 bits; a marked one may be stored in another type than x."""
    return weight if kind_of(weight) is None else weight.to(x.dtype)


def _trains_on_cpu(backend: Backend | None, *tensors: Tensor | None) -> bool:
    """True where the operator with products of its own applies, which compilers could not look into."""
    if resolve(backend, *tensors) != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    present = [t for t in tensors if t is not None]
    if torch.is_autocast_enabled("cpu"):
        types = {torch.get_autocast_dtype("cpu")}
        known = all(t.dtype in (torch.float32, torch.bfloat16) for t in present)
    else:
        types, known = {t.dtype for t in present}, True
    return known and len(types) == 1 and types <= set(_CPU_DTYPES) and any(t.requires_grad for t in present)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None) -> Tensor:
    """`x W^T + b`. x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    if multiplies_at_once(backend, x, weight):
        return cpu.linear(x, weight, bias)
    checks.linear_arguments(x, weight, bias)
    if fp8.applies(x, weight, bias):
        return fp8.linear(x, weight, bias, backend)
    if runs_in_int8(backend, weight, x, bias):
        return int8.linear(x, weight, bias)
    weight = _floating(x, weight)
    if runs_cpu_inference(backend, x, weight, bias):
        return cpu.linear(x, weight, bias)
    if _trains_on_cpu(backend, x, weight, bias):
        return _linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None) -> Tensor:
    """`gelu(x W^T + b)` with the erf form of GELU. x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    checks.linear_arguments(x, weight, bias)
    if fp8.applies(x, weight, bias):
        return _gelu_fp8(x, weight, bias, backend)
    if runs_in_int8(backend, weight, x, bias):
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
    if wide or not fp8.wanted_of(resolve(backend, x, weight, bias), weight, x, bias):
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
    if plain and runs_in_int8(backend, weight, x, bias, gamma):
        return int8.linear_residual(x, weight, bias, residual, gamma)
    weight = _floating(x, weight)
    if plain and runs_cpu_inference(backend, x, weight, bias, residual, gamma):
        return cpu.linear_residual(x, weight, bias, residual, gamma)
    if _trains_on_cpu(backend, x, weight, bias):
        return _add_branch(_linear(x, weight, bias), residual, gamma, row_scale, dropout_p)
    return reference.linear_residual(x, weight, bias, residual, gamma, row_scale, dropout_p)


def _add_branch(
    out: Tensor, residual: Tensor, gamma: Tensor | None, row_scale: Tensor | None, dropout_p: float
) -> Tensor:
    """`residual + row_scale · gamma · dropout(out)`, in one pass after the dropout."""
    if dropout_p:
        dropout = Dropout(dropout_p, torch.randint(1 << 62, (1,)))
        out = out * torch.mul(dropout.mask(tuple(out.shape), out.dtype), 1 / dropout.kept)
    if row_scale is None and gamma is None:
        return residual + out
    rows = None if row_scale is None else row_scale.view(-1, *[1] * (out.ndim - 1))
    factor = gamma if rows is None else rows if gamma is None else rows * gamma
    assert factor is not None
    return torch.addcmul(residual, out, factor)


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
    if plain and multiplies_at_once(backend, x, weight_in) and weight_out.is_mkldnn and residual.shape == x.shape:
        return cpu.linear_residual(cpu.linear_gelu(x, weight_in, bias_in), weight_out, bias_out, residual, gamma)
    checks.mlp_arguments(x, weight_in, bias_in, weight_out, bias_out)
    checks.branch_arguments((*x.shape[:-1], weight_out.shape[0]), residual, gamma, row_scale, dropout_p)
    if plain and all(runs_in_int8(backend, w, x, bias_in, bias_out, gamma) for w in (weight_in, weight_out)):
        return int8.mlp_residual(x, weight_in, bias_in, weight_out, bias_out, residual, gamma)
    in_fp8 = fp8.concerns(weight_in) or fp8.concerns(weight_out)
    if (
        plain
        and not in_fp8
        and runs_cpu_inference(backend, x, weight_in, bias_in, weight_out, bias_out, residual, gamma)
    ):
        return cpu.mlp_residual(x, weight_in, bias_in, weight_out, bias_out, residual, gamma)
    weight_in, weight_out = _floating(x, weight_in), _floating(x, weight_out)
    if not in_fp8 and _trains_on_cpu(backend, x, weight_in, bias_in, weight_out, bias_out):
        out = _mlp(x, weight_in, bias_in, weight_out, bias_out)[0]
        return _add_branch(out, residual, gamma, row_scale, dropout_p)
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
        return _linear_backward(torch.ops.aten.gelu_backward(dout.contiguous(), kept), x, weight, *needs)
    from .triton.gelu import linear_gelu_backward

    found = linear_gelu_backward(dout, x, weight, bias, kept, tuple(needs))
    dx, dweight, dbias = (x.new_empty(0) if g is None else g for g in found)
    return dx, dweight, dbias


def _linear_backward(
    dout: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """On CPU. An operator returns tensors only: an empty one says that a gradient is not needed."""
    if x.dtype in _CPU_DTYPES:
        dx = cpu.input_gradient(dout, weight) if need_x else x.new_empty(0)
        dweight = cpu.weight_gradient(dout, x) if need_weight else x.new_empty(0)
    else:
        dx = dout @ weight if need_x else x.new_empty(0)
        dweight = dout.flatten(0, -2).t() @ x.reshape(-1, x.shape[-1]) if need_weight else x.new_empty(0)
    return dx, dweight, cpu.bias_gradient(dout) if need_bias else x.new_empty(0)


def _linear_backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _linear_gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    needs = tuple(ctx.needs_input_grad[:3])
    gradients = _linear_grad(dout, *ctx.saved_tensors, *needs)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


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
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    kept = cpu.trained_linear(x, weight_in, bias_in)
    return cpu.trained_linear(F.gelu(kept), weight_out, bias_out), kept


def _mlp_forward_fake(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    return x.new_empty(*rows, weight_out.shape[0]), x.new_empty(*rows, weight_in.shape[0])


def _mlp_backward(
    dout: Tensor, x: Tensor, weight_in: Tensor, weight_out: Tensor, kept: Tensor, *needs: bool
) -> tuple[Tensor, ...]:
    need_x, need_in, need_bias_in, need_out, need_bias_out = needs
    hidden = F.gelu(kept) if need_out else kept
    dhidden, dweight_out, dbias_out = _linear_backward(dout, hidden, weight_out, True, need_out, need_bias_out)
    del hidden
    dkept = torch.ops.aten.gelu_backward(dhidden, kept)
    return *_linear_backward(dkept, x, weight_in, need_x, need_in, need_bias_in), dweight_out, dbias_out


def _mlp_backward_fake(
    dout: Tensor, x: Tensor, weight_in: Tensor, weight_out: Tensor, kept: Tensor, *needs: bool
) -> tuple[Tensor, ...]:
    first = _linear_backward_fake(kept, x, weight_in, *needs[:3])
    return *first, *_linear_backward_fake(dout, kept, weight_out, False, *needs[3:])[1:]


def _mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight_in, _, weight_out, _ = inputs
    # Not the hidden layer: its GELU is a hundredth of the work of the branch, and a quarter of what a block would keep.
    ctx.save_for_backward(x, weight_in, weight_out, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _mlp_gradient(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None, None, None
    needs = tuple(ctx.needs_input_grad)
    gradients = _mlp_grad(dout, *ctx.saved_tensors, *needs)
    return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


_linear_grad = operator(
    "linear_backward(Tensor dout, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)
_linear = operator(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu.trained_linear,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    setup_context=_linear_setup,
    backward=_linear_gradient,
    autocast=True,
)
_linear_gelu_grad = operator(
    "linear_gelu_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor kept, bool need_x, "
    "bool need_weight, bool need_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _gelu_backward,
    lambda dout, x, weight, bias, kept, *rest: _linear_backward_fake(dout, x, weight, *rest[:3]),
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
    "mlp_backward(Tensor dout, Tensor x, Tensor weight_in, Tensor weight_out, Tensor kept, bool need_x, bool need_in, "
    "bool need_bias_in, bool need_out, bool need_bias_out) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mlp_backward,
    _mlp_backward_fake,
)
_mlp = operator(
    "mlp(Tensor x, Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out) -> (Tensor, Tensor)",
    _mlp_forward,
    _mlp_forward_fake,
    setup_context=_mlp_setup,
    backward=_mlp_gradient,
    autocast=True,
)
