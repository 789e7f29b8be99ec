"""Training of linear layers on a CPU: a branch, or several layers side by side, as one operator with its gradient.

Between forward and backward, a branch saves its input, the input of its GELU and the statistics of its norm. Normalised
rows, hidden layers and concatenated weights are computed again, in scratch memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backend import autocast_dtype
from ..checks import CHANCE
from ..library import Gradients, Needs, Outputs, Upstream, differentiable
from . import gemm, norms
from .workspace import Dropout, in_dtype, scratch


@dataclass(slots=True)
class Branch:
    """A norm, a linear layer, a GELU and another layer, and a residual sum; all but the first layer may be absent.

    `train` sets the last two fields: whether x is the residual, and the dtype of the GEMMs.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 0.0
    weight_out: Tensor | None = None
    bias_out: Tensor | None = None
    residual: Tensor | None = None
    gamma: Tensor | None = None
    row_scale: Tensor | None = field(default=None, metadata=CHANCE)
    residual_is_x: bool = False
    dtype: torch.dtype = torch.float32


def train(branch: Branch, dropout_p: float = 0.0) -> Tensor:
    """Run a branch by its operator. Dropout and factors with a gradient are applied outside of it."""
    branch.dtype = autocast_dtype(branch.x.device) or branch.x.dtype
    if branch.norm_weight is None and branch.x.dtype != branch.dtype:
        branch.x = branch.x.to(branch.dtype)
    residual, gamma, row_scale = branch.residual, branch.gamma, branch.row_scale
    if residual is None or not (dropout_p or (row_scale is not None and row_scale.requires_grad)):
        branch.residual_is_x = residual is branch.x
        return _run_branch(branch, "cpu")[0]
    branch.residual = branch.gamma = branch.row_scale = None
    out = _run_branch(branch, "cpu")[0]
    if dropout_p:
        dropout = Dropout(dropout_p, torch.randint(1 << 62, (1,)))
        # Not in the scratch memory of the mask, which the backward pass reads.
        out = out * torch.mul(dropout.mask(tuple(out.shape), out.dtype), 1 / dropout.kept)
    return norms.add_branch(out, residual, gamma, row_scale)


def linear_gradients(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: tuple[bool, bool, bool],
    *,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    needs_gamma: bool = False,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias, as selected by `needs`, and gamma of `gamma · (x W^T + b)`.

    With `M = dout^T x`, the gradient of the weight but for its factor, the gradient of gamma is the sum of `W · M` over
    every row and of `b · Σ dout`: less work than a sum over all tokens, and without the output of the layer. `dtype` is
    that of the gradients of weight and bias; the gradient of x is written to `out`.
    """
    x = x.reshape(-1, x.shape[-1])
    dtype, on_our_kernels = dtype or x.dtype, x.dtype in gemm.CPU_DTYPES
    dx = dweight = dbias = dgamma = None
    if needs[2] or needs_gamma:
        dbias = torch.empty(dout.shape[-1]) if on_our_kernels else gemm.bias_gradient(dout)
    if needs[1] or needs_gamma:
        if on_our_kernels:
            dweight = gemm.weight_gradient(dout, x, dtype, dbias)
        else:
            dweight = (dout.flatten(0, -2).t() @ x).to(dtype)
    elif on_our_kernels and dbias is not None:
        dbias = gemm.bias_gradient(dout)
    dbias = None if dbias is None else dbias.to(dtype)
    if gamma is not None:
        if needs_gamma:
            assert dweight is not None
            assert dbias is not None
            memory = scratch("weights and gradients", tuple(weight.shape), dtype)
            dgamma = torch.mul(dweight, weight, out=memory).sum(1)
            if bias is not None:
                dgamma.addcmul_(bias.to(dgamma.dtype), dbias)
            dgamma = dgamma.to(gamma.dtype)
        if needs[1] and dweight is not None:
            dweight = dweight.mul_(gamma[:, None])
        if needs[2] and dbias is not None:
            dbias = dbias.mul_(gamma)
    if needs[0] and on_our_kernels:
        dx = gemm.input_gradient(dout, weight, gamma, out)
    elif needs[0]:
        dx = dout @ (weight if gamma is None else weight * gamma[:, None].to(weight.dtype))
    return dx, dweight, dbias, dgamma


def _gradient_dtype(dtype: torch.dtype, *parameters: Tensor | None) -> torch.dtype:
    """Return the dtype of the gradients of parameters: their own, if it is wider than the GEMM's."""
    for parameter in parameters:
        if parameter is not None:
            dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype


def _normed(a: Branch) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed rows in the dtype of the GEMM, and their statistics; empty without a norm."""
    rows, mean, rstd = a.x, a.x.new_empty(0), a.x.new_empty(0)
    if a.norm_weight is not None:
        rows, mean, rstd = norms.layer_norm_forward(a.x, a.norm_weight, a.norm_bias, a.eps)
    return rows if rows.dtype == a.dtype else in_dtype("normed", rows, a.dtype), mean, rstd


def _hidden(gelu_input: Tensor) -> Tensor:
    """Return the hidden layer of an MLP, in scratch memory."""
    memory = scratch("hidden", tuple(gelu_input.shape), gelu_input.dtype)
    return torch.ops.aten.gelu.out(gelu_input, out=memory)


def _forward(a: Branch, _: str) -> tuple[Tensor, ...]:
    """Return the sum, the input of the GELU, and the statistics of the norm."""
    rows, mean, rstd = _normed(a)
    bias = a.bias if a.bias is None else a.bias.to(a.dtype)
    out, gelu_input = gemm.trained_linear(rows, a.weight, bias), a.x.new_empty(0)
    if a.weight_out is not None:
        gelu_input, bias = out, None if a.bias_out is None else a.bias_out.to(a.dtype)
        out = gemm.trained_linear(_hidden(gelu_input), a.weight_out, bias)
    if a.residual is not None:
        out = norms.add_branch(out, a.residual, a.gamma, a.row_scale, in_place=True)
    return out, gelu_input, mean, rstd


def _fake(a: Branch, _: str) -> tuple[Tensor, ...]:
    dtype = a.dtype if a.residual is None else torch.promote_types(a.dtype, a.residual.dtype)
    rows, width = a.x.shape[:-1], a.weight.shape[0]
    gelu_input, mean, rstd = (a.x.new_empty(0) for _ in range(3))
    if a.weight_out is not None:
        gelu_input, width = a.x.new_empty(*rows, width, dtype=a.dtype), a.weight_out.shape[0]
    if a.norm_weight is not None:
        wide = torch.promote_types(a.x.dtype, torch.float32)
        mean, rstd = (a.x.new_empty(math.prod(rows), dtype=wide) for _ in range(2))
    return a.x.new_empty(*rows, width, dtype=dtype), gelu_input, mean, rstd


def _backward(
    upstream: Upstream, a: Branch, outputs: Outputs, needs: Needs, _: str
) -> dict[str, Tensor | None]:
    (dout,), (gelu_input, mean, rstd) = upstream, outputs[1:]
    assert dout is not None
    gradients: dict[str, Tensor | None] = {}
    # The gradient of a branch without its LayerScale, in the dtype of its GEMMs.
    if a.row_scale is not None:
        dbranch = scratch("upstream", tuple(dout.shape), a.dtype)
        torch.mul(dout, norms.of_rows(a.row_scale, dout), out=dbranch)
    else:
        dbranch = dout if dout.dtype == a.dtype else in_dtype("upstream", dout, a.dtype)
    gamma, needs_gamma = a.gamma, needs["gamma"]
    if a.weight_out is not None:
        # Not saved: its GELU is a hundredth of the work of the branch, and a quarter of what a block would keep.
        recomputed = needs["weight_out"] or needs_gamma
        dhidden, gradients["weight_out"], gradients["bias_out"], gradients["gamma"] = (
            linear_gradients(
                dbranch,
                _hidden(gelu_input) if recomputed else gelu_input,
                a.weight_out,
                (True, needs["weight_out"], needs["bias_out"]),
                bias=a.bias_out,
                gamma=gamma,
                needs_gamma=needs_gamma,
                dtype=_gradient_dtype(a.dtype, a.weight_out, gamma),
                out=scratch("hidden gradient", tuple(gelu_input.shape), a.dtype),
            )
        )
        assert dhidden is not None
        dhidden = dhidden.view(gelu_input.shape)
        dbranch = torch.ops.aten.gelu_backward.grad_input(dhidden, gelu_input, grad_input=dhidden)
        gamma, needs_gamma = None, False
    needs_x = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    dx, dweight, dbias, dgamma = linear_gradients(
        dbranch,
        _normed(a)[0],
        a.weight,
        (needs_x, needs["weight"], needs["bias"]),
        bias=a.bias,
        gamma=gamma,
        needs_gamma=needs_gamma,
        dtype=_gradient_dtype(a.dtype, a.weight, gamma),
    )
    gradients["weight"] = None if dweight is None else dweight.to(a.weight.dtype)
    gradients["bias"] = dbias if dbias is None or a.bias is None else dbias.to(a.bias.dtype)
    gradients.setdefault("gamma", dgamma)
    if dx is not None:
        if a.norm_weight is not None:
            dx, gradients["norm_weight"], gradients["norm_bias"] = norms.layer_norm_backward(
                dx, a.x, a.norm_weight, mean, rstd
            )
        gradients["x"] = dx.add_(dout) if a.residual_is_x else dx
    return gradients


def _pass_to_residual(
    call: Any, upstream: Upstream, a: Branch, outputs: Outputs, needs: Needs, backend: str
) -> Gradients:
    """Give the residual the upstream gradient, unless it is x and the operator has added it there."""
    gradients = dict(call(upstream, a, outputs, needs, backend))
    gradients["residual"] = upstream[0] if needs["residual"] and not a.residual_is_x else None
    return gradients


def _keep(a: Branch, outputs: Outputs, _: str) -> tuple[Branch, Outputs]:
    a.residual = None
    return a, (None, *outputs[1:])


_run_branch = differentiable(
    "trained_branch",
    Branch,
    _forward,
    _fake,
    _backward,
    outputs=4,
    keep=_keep,
    around=_pass_to_residual,
    autocast=(),
)


@dataclass(slots=True)
class Joined:
    """Layers side by side. (A list of tensors costs an operator tens of microseconds.)"""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    dtype: torch.dtype = torch.float32


def train_joined(joined: Joined) -> Tensor:
    """Run layers side by side by their operator."""
    joined.dtype = autocast_dtype(joined.x.device) or joined.x.dtype
    joined.x = joined.x.to(joined.dtype)
    return _run_joined(joined, "cpu")[0]


def _concatenated(a: Joined) -> Tensor:
    """Return the weights in the dtype of the GEMM, in scratch memory."""
    sizes = [len(weight) for weight in a.weights]
    memory = scratch("joined weights", (sum(sizes), a.x.shape[-1]), a.dtype)
    for rows, weight in zip(memory.split(sizes), a.weights, strict=True):
        rows.copy_(weight)
    return memory


def _joined_forward(a: Joined, _: str) -> tuple[Tensor]:
    bias = torch.cat(a.biases).to(a.dtype) if a.biases else None
    return (gemm.trained_linear(a.x, _concatenated(a), bias),)


def _joined_fake(a: Joined, _: str) -> tuple[Tensor]:
    return (a.x.new_empty(*a.x.shape[:-1], sum(w.shape[0] for w in a.weights), dtype=a.dtype),)


def _joined_backward(
    upstream: Upstream, a: Joined, outputs: Outputs, needs: Needs, _: str
) -> Gradients:
    (dout,) = upstream
    assert dout is not None
    dx, dweights, dbiases, _dgamma = linear_gradients(
        in_dtype("upstream", dout, a.dtype),
        a.x,
        _concatenated(a),
        (needs["x"], needs["weights"], needs["biases"]),
        dtype=_gradient_dtype(a.dtype, *a.weights),
    )
    for weight in a.weights:
        dweights = None if dweights is None else dweights.to(weight.dtype)
    for bias in a.biases:
        dbiases = None if dbiases is None else dbiases.to(bias.dtype)
    return {"x": dx, "weights": dweights, "biases": dbiases}


_run_joined = differentiable(
    "trained_side_by_side",
    Joined,
    _joined_forward,
    _joined_fake,
    _joined_backward,
    keep=lambda a, outputs, _: (a, (None,)),
    autocast=(),
)
