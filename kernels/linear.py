"""Linear layers with what precedes and follows them: arguments, implementations and public functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError, UnavailableError

from . import checks, fp8, reference
from .backend import Backend
from .checks import CHANCE, FACTOR, LARGEST_WIDTH, RESIDUAL, WEIGHT
from .cpu import gemm, int8
from .cpu.training import Branch, Joined, linear_gradients, train, train_joined
from .flags import EightBits
from .ladder import Call, Op
from .library import Gradients, Needs, Outputs, Upstream, differentiable, on_device_of_arguments
from .norms import add_layer_norm, layer_norm


def floating_dtype(dtype: str, device: torch.device) -> torch.dtype | None:
    """Return the floating-point dtype for a model with 8-bit GEMMs: bfloat16 where it is fast, else None.

    InputError for an unknown 8-bit format, UnavailableError where the device lacks it.
    """
    if dtype not in get_args(EightBits):
        raise InputError(f"dtype={dtype!r} is unknown; give a torch.dtype, 'int8' or 'fp8'")
    if dtype == "fp8":
        fp8.require(device)
    elif device.type != "cpu":
        raise UnavailableError(
            f"int8 is for CPUs, and the model is on {device}; move it with model.to('cpu')"
        )
    else:
        int8.require()
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else None


@dataclass(slots=True)
class LinearArgs:
    """A linear layer."""

    x: Tensor
    weight: Tensor = field(metadata=WEIGHT)
    bias: Tensor | None

    def check(self) -> None:
        checks.linear(self.x, self.weight, self.bias)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None
) -> Tensor:
    """Return `x W^T + b`: x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    return LINEAR(LinearArgs(x, weight, bias), backend)


def _infer(a: LinearArgs, _: Call) -> Tensor:
    return gemm.linear(a.x, a.weight, a.bias)


LINEAR = Op(
    "linear",
    LinearArgs,
    {
        "frozen": _infer,
        "fp8": lambda a, call: fp8.linear(a.x, a.weight, a.bias, call.requested),
        "int8": lambda a, _: int8.linear(a.x, a.weight, a.bias),
        "inference": _infer,
        "training": lambda a, _: train(Branch(a.x, a.weight, a.bias)),
    },
    reference=lambda a: reference.linear(a.x, a.weight, a.bias),
    int8_race="linear",
)


@dataclass(slots=True)
class JoinedLinearArgs:
    """Linear layers of one input."""

    x: Tensor
    weights: list[Tensor] = field(metadata=WEIGHT)
    biases: list[Tensor]  # none, or one for each weight

    def check(self) -> None:
        biases = self.biases or [None] * len(self.weights)
        for weight, bias in zip(self.weights, biases, strict=True):
            checks.linear(self.x, weight, bias)


def joined_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return `linear` of several layers by one GEMM: x `[..., K]`, weights `[M_i, K]`, biases `[M_i]` → `[..., Σ M_i]`.

    Any bias may be None, or there is none. Training on a CPU does not save the concatenated weights, which for query,
    key and value would be a copy.
    """
    if not weights or len(biases) not in (0, len(weights)):
        raise InputError(
            f"{len(weights)} weights and {len(biases)} biases: give a bias, or None, for each of the weights"
        )
    present: list[Tensor] = []
    if any(bias is not None for bias in biases):
        for weight, bias in zip(weights, biases, strict=True):
            present.append(weight.new_zeros(len(weight)) if bias is None else bias)
    return JOINED_LINEAR(JoinedLinearArgs(x, [*weights], present), backend)


def _concatenate(a: JoinedLinearArgs, call: Call) -> Tensor:
    bias = torch.cat(a.biases) if a.biases else None
    return linear(a.x, torch.cat(a.weights), bias, backend=call.requested)


JOINED_LINEAR = Op(
    "joined_linear",
    JoinedLinearArgs,
    {
        "fp8": _concatenate,
        "training": lambda a, _: train_joined(Joined(a.x, a.weights, a.biases)),
        "reference": _concatenate,
    },
)


@dataclass(slots=True)
class LinearGELUArgs:
    """A linear layer with a GELU."""

    x: Tensor
    weight: Tensor = field(metadata=WEIGHT)
    bias: Tensor | None
    keep: bool = False  # save the input of the GELU for the gradient

    def check(self) -> None:
        checks.linear(self.x, self.weight, self.bias)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: Backend | None = None
) -> Tensor:
    """Return `gelu(x W^T + b)`, erf form: x `[..., K]`, weight `[M, K]`, bias `[M]` → `[..., M]`."""
    return LINEAR_GELU(LinearGELUArgs(x, weight, bias), backend)


def _gelu_in_fp8(a: LinearGELUArgs, call: Call) -> Tensor:
    wide = a.weight.shape[0] > LARGEST_WIDTH
    if wide or not fp8.makes_fp8_rows(call.backend, a.weight, a.x, a.bias):
        return F.gelu(fp8.linear(a.x, a.weight, a.bias, call.requested))
    from .triton.rows import bias_gelu_quantise

    product = fp8.linear(a.x, a.weight, None, call.requested)
    run = on_device_of_arguments(bias_gelu_quantise) if a.x.is_cuda else bias_gelu_quantise
    return fp8.keep(*run(product, a.bias))


def _gelu_kernel(a: LinearGELUArgs, call: Call) -> Tensor:
    if torch.is_grad_enabled():
        biased = a.bias is not None and a.bias.requires_grad
        a.keep = a.x.requires_grad or a.weight.requires_grad or biased
    return _gelu_operator(a, call.backend)[0]


def _gelu_forward(a: LinearGELUArgs, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from .triton.rows import linear_gelu_forward

        out, gelu_input = linear_gelu_forward(a.x, a.weight, a.bias, keep=a.keep)
    else:
        run = gemm.trained_linear if a.x.dtype in gemm.CPU_DTYPES else F.linear
        gelu_input = run(a.x, a.weight, a.bias)
        out = F.gelu(gelu_input)
    return out, a.x.new_empty(0) if gelu_input is None or not a.keep else gelu_input


def _gelu_fake(a: LinearGELUArgs, _: str) -> tuple[Tensor, Tensor]:
    shape = (*a.x.shape[:-1], a.weight.shape[0])
    return a.x.new_empty(shape), a.x.new_empty(shape if a.keep else 0)


def _gelu_backward(
    upstream: Upstream, a: LinearGELUArgs, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    (dout,), gelu_input = upstream, outputs[1]
    assert dout is not None
    needed = needs["x"], needs["weight"], needs["bias"]
    if backend == "triton":
        from .triton.rows import linear_gelu_backward

        gradients = linear_gelu_backward(dout, a.x, a.weight, a.bias, gelu_input, needed)
    else:
        dinput = torch.ops.aten.gelu_backward(dout.contiguous(), gelu_input)
        gradients = linear_gradients(dinput, a.x, a.weight.to(a.x.dtype), needed)
    return {"x": gradients[0], "weight": gradients[1], "bias": gradients[2]}


_gelu_operator = differentiable(
    "linear_gelu",
    LinearGELUArgs,
    _gelu_forward,
    _gelu_fake,
    _gelu_backward,
    outputs=2,
    keep=lambda a, outputs, _: (a, (None, outputs[1])),
    autocast=True,
)
LINEAR_GELU = Op(
    "linear_gelu",
    LinearGELUArgs,
    {
        "fp8": _gelu_in_fp8,
        "int8": lambda a, _: int8.linear_gelu(a.x, a.weight, a.bias),
        "inference": lambda a, _: gemm.linear_gelu(a.x, a.weight, a.bias),
        "kernel": _gelu_kernel,
    },
    reference=lambda a: reference.linear_gelu(a.x, a.weight, a.bias),
    int8_race="linear",
)


@dataclass(slots=True)
class LinearResidualArgs:
    """A linear layer at the end of a branch."""

    x: Tensor
    weight: Tensor = field(metadata=WEIGHT)
    bias: Tensor | None
    residual: Tensor = field(metadata=RESIDUAL)
    gamma: Tensor | None = field(default=None, metadata=FACTOR)
    row_scale: Tensor | None = field(default=None, metadata=CHANCE)
    dropout_p: float = field(default=0.0, metadata=CHANCE)

    def check(self) -> None:
        checks.linear(self.x, self.weight, self.bias)
        shape = (*self.x.shape[:-1], self.weight.shape[0])
        checks.branch(shape, self.residual, self.gamma, self.row_scale, self.dropout_p)


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
    """Return `residual + row_scale · gamma · dropout(x W^T + b)`: the end of a transformer branch.

    Args:
        x: `[..., K]`; weight: `[M, K]`; bias: `[M]`; residual: `[..., M]`.
        gamma: LayerScale `[M]` (arXiv 2103.17239).
        row_scale: `[B]`, one factor per entry of the first dimension: stochastic depth.
        dropout_p: probability of zeroing an element of the branch.
    """
    args = LinearResidualArgs(x, weight, bias, residual, gamma, row_scale, dropout_p)
    return LINEAR_RESIDUAL(args, backend)


def _infer_residual(a: LinearResidualArgs, _: Call) -> Tensor:
    return gemm.linear_residual(a.x, a.weight, a.bias, a.residual, a.gamma)


def _residual_in_fp8(a: LinearResidualArgs, call: Call) -> Tensor:
    out = fp8.linear(a.x, a.weight, a.bias, call.requested)
    return reference.branch_end(out, a.residual, a.gamma, a.row_scale, a.dropout_p)


def _train_residual(a: LinearResidualArgs, _: Call) -> Tensor:
    branch = Branch(
        x=a.x,
        weight=a.weight,
        bias=a.bias,
        residual=a.residual,
        gamma=a.gamma,
        row_scale=a.row_scale,
    )
    return train(branch, a.dropout_p)


LINEAR_RESIDUAL = Op(
    "linear_residual",
    LinearResidualArgs,
    {
        "frozen": _infer_residual,
        "fp8": _residual_in_fp8,
        "int8": lambda a, _: int8.linear_residual(a.x, a.weight, a.bias, a.residual, a.gamma),
        "inference": _infer_residual,
        "training": _train_residual,
    },
    reference=lambda a: reference.linear_residual(
        a.x, a.weight, a.bias, a.residual, a.gamma, a.row_scale, a.dropout_p
    ),
    int8_race="linear_residual",
)


@dataclass(slots=True)
class LayerNormLinearArgs:
    """A norm and a linear layer."""

    x: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    weight: Tensor = field(metadata=WEIGHT)
    bias: Tensor | None

    def check(self) -> None:
        checks.norm(self.x, self.norm_weight, self.norm_bias, self.eps)
        checks.linear(self.x, self.weight, self.bias)


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
    """Return `linear` of `layer_norm` of x. Training on a CPU recomputes the normalised rows instead of saving them.

    Args:
        x: `[..., K]`; norm_weight, norm_bias, eps: of the norm; weight: `[M, K]`; bias: `[M]`.
    """
    args = LayerNormLinearArgs(x, norm_weight, norm_bias, eps, weight, bias)
    return LAYER_NORM_LINEAR(args, backend)


def _norm_then_linear(a: LayerNormLinearArgs, call: Call) -> Tensor:
    normed = layer_norm(a.x, a.norm_weight, a.norm_bias, a.eps, backend=call.requested)
    return linear(normed, a.weight, a.bias, backend=call.requested)


def _norm_linear_in_int8(a: LayerNormLinearArgs, _: Call) -> Tensor:
    return int8.linear(a.x, a.weight, a.bias, norm=(a.norm_weight, a.norm_bias, a.eps))


def _train_norm_linear(a: LayerNormLinearArgs, _: Call) -> Tensor:
    norm: Any = {"norm_weight": a.norm_weight, "norm_bias": a.norm_bias, "eps": a.eps}
    return train(Branch(a.x, a.weight, a.bias, **norm))


LAYER_NORM_LINEAR = Op(
    "layer_norm_linear",
    LayerNormLinearArgs,
    {
        "fp8": _norm_then_linear,
        "int8": _norm_linear_in_int8,
        "training": _train_norm_linear,
        "reference": _norm_then_linear,
    },
    int8_race="linear",
)


@dataclass(slots=True)
class LinearAddNormArgs:
    """A linear layer at the end of a branch, and the next norm."""

    x: Tensor
    weight: Tensor = field(metadata=WEIGHT)
    bias: Tensor | None
    residual: Tensor = field(metadata=RESIDUAL)
    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    gamma: Tensor | None = field(default=None, metadata=FACTOR)
    row_scale: Tensor | None = field(default=None, metadata=CHANCE)
    dropout_p: float = field(default=0.0, metadata=CHANCE)
    wide: bool = False

    def check(self) -> None:
        checks.linear(self.x, self.weight, self.bias)
        shape = (*self.x.shape[:-1], self.weight.shape[0])
        checks.branch(shape, self.residual, self.gamma, self.row_scale, self.dropout_p)


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
    """Return the end of a branch and the next norm: `add_layer_norm` of `x W^T + b`.

    A CPU adds the residual inside the GEMM and normalises afterwards; a GPU adds it in the norm.

    Args:
        x: `[..., K]`; weight: `[M, K]`; bias: `[M]`; residual: `[..., M]`.
        norm_weight, norm_bias, eps, gamma, row_scale, dropout_p, wide: as in `add_layer_norm`.

    Returns:
        (normed, summed), both `[..., M]`.
    """
    norm, factors = (norm_weight, norm_bias, eps), (gamma, row_scale, dropout_p)
    args = LinearAddNormArgs(x, weight, bias, residual, *norm, *factors, wide)
    return LINEAR_ADD_LAYER_NORM(args, backend)


def _infer_add_norm(a: LinearAddNormArgs, _: Call) -> tuple[Tensor, Tensor]:
    summed = gemm.linear_residual(a.x, a.weight, a.bias, a.residual, a.gamma)
    return reference.layer_norm(summed, a.norm_weight, a.norm_bias, a.eps), summed


def _add_norm_in_int8(a: LinearAddNormArgs, _: Call) -> tuple[Tensor, Tensor]:
    summed = int8.linear_residual(a.x, a.weight, a.bias, a.residual, a.gamma)
    return reference.layer_norm(summed, a.norm_weight, a.norm_bias, a.eps), summed


def _linear_then_add_norm(a: LinearAddNormArgs, call: Call) -> tuple[Tensor, Tensor]:
    return add_layer_norm(
        linear(a.x, a.weight, a.bias, backend=call.requested),
        a.residual,
        a.norm_weight,
        a.norm_bias,
        a.eps,
        gamma=a.gamma,
        row_scale=a.row_scale,
        dropout_p=a.dropout_p,
        wide=a.wide,
        backend=call.requested,
    )


LINEAR_ADD_LAYER_NORM = Op(
    "linear_add_layer_norm",
    LinearAddNormArgs,
    {
        "frozen": _infer_add_norm,
        "fp8": _linear_then_add_norm,
        "int8": _add_norm_in_int8,
        "inference": _infer_add_norm,
        "reference": _linear_then_add_norm,
    },
    int8_race="linear_residual",
)
