"""MLP branches of transformers, post-norm and pre-norm: arguments, implementations and public functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from . import checks
from .backend import Backend
from .checks import CHANCE, FACTOR, RESIDUAL, WEIGHT
from .cpu import gemm, int8
from .cpu.training import Branch, train
from .ladder import Call, Op
from .linear import LINEAR_RESIDUAL, LinearResidualArgs, linear_gelu
from .norms import layer_norm


@dataclass(slots=True)
class MLPArgs:
    """Two linear layers with a GELU between them, and the factors of a branch."""

    x: Tensor
    weight_in: Tensor = field(metadata=WEIGHT)
    bias_in: Tensor | None
    weight_out: Tensor = field(metadata=WEIGHT)
    bias_out: Tensor | None
    gamma: Tensor | None = field(default=None, metadata=FACTOR)
    row_scale: Tensor | None = field(default=None, metadata=CHANCE)
    dropout_p: float = field(default=0.0, metadata=CHANCE)

    @property
    def layers(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Weights and biases in order."""
        return self.weight_in, self.bias_in, self.weight_out, self.bias_out

    def check_branch(self, residual: Tensor) -> None:
        """Check the layers, and the residual that they are added to."""
        checks.linear(self.x, self.weight_in, self.bias_in)
        weight_in, weight_out = self.weight_in, self.weight_out
        if weight_out.ndim != 2 or weight_out.shape[1] != weight_in.shape[0]:
            must = "weight_in [F, M], weight_out [M, F]"
            checks.refuse(must, weight_in=weight_in, weight_out=weight_out)
        checks.layer(self.x, weight_out, self.bias_out, "_out")
        shape = (*self.x.shape[:-1], weight_out.shape[0])
        checks.branch(shape, residual, self.gamma, self.row_scale, self.dropout_p)


@dataclass(slots=True, kw_only=True)
class MLPResidualArgs(MLPArgs):
    """The MLP branch of a transformer."""

    residual: Tensor = field(metadata=RESIDUAL)

    def check(self) -> None:
        self.check_branch(self.residual)


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
    """Return the MLP branch of a transformer: `residual + row_scale · gamma · dropout(gelu(x W1^T + b1) W2^T + b2)`.

    Args:
        x, residual: `[..., M]`; weight_in: `[F, M]`; bias_in: `[F]`; weight_out: `[M, F]`; bias_out: `[M]`.
        gamma, row_scale, dropout_p: as in `linear_residual`.
    """
    layers, factors = (weight_in, bias_in, weight_out, bias_out), (gamma, row_scale, dropout_p)
    return MLP_RESIDUAL(MLPResidualArgs(x, *layers, *factors, residual=residual), backend)


def _infer_mlp(a: MLPResidualArgs, _: Call) -> Tensor:
    return gemm.mlp_residual(a.x, *a.layers, a.residual, a.gamma)


def _mlp_in_int8(a: MLPResidualArgs, _: Call) -> Tensor:
    return int8.mlp_residual(a.x, *a.layers, a.residual, a.gamma)


def _train_mlp(a: MLPResidualArgs, _: Call) -> Tensor:
    branch = Branch(
        x=a.x,
        weight=a.weight_in,
        bias=a.bias_in,
        weight_out=a.weight_out,
        bias_out=a.bias_out,
        residual=a.residual,
        gamma=a.gamma,
        row_scale=a.row_scale,
    )
    return train(branch, a.dropout_p)


def _mlp_by_layer(a: MLPResidualArgs, call: Call) -> Tensor:
    hidden = linear_gelu(a.x, a.weight_in, a.bias_in, backend=call.requested)
    factors = (a.gamma, a.row_scale, a.dropout_p)
    end = LinearResidualArgs(hidden, a.weight_out, a.bias_out, a.residual, *factors)
    return LINEAR_RESIDUAL(end, call.requested)


MLP_RESIDUAL = Op(
    "mlp_residual",
    MLPResidualArgs,
    {
        "frozen": _infer_mlp,
        "fp8": _mlp_by_layer,
        "int8": _mlp_in_int8,
        "inference": _infer_mlp,
        "training": _train_mlp,
        "reference": _mlp_by_layer,
    },
    int8_race="mlp_residual",
)


@dataclass(slots=True, kw_only=True)
class LayerNormMLPArgs(MLPArgs):
    """The MLP branch of a pre-norm layer."""

    norm_weight: Tensor
    norm_bias: Tensor
    eps: float

    def check(self) -> None:
        checks.norm(self.x, self.norm_weight, self.norm_bias, self.eps)
        self.check_branch(self.x)


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
    """Return the MLP branch of a pre-norm layer: `mlp_residual` of `layer_norm` of x, added to x.

    Training on a CPU saves only x and the input of the GELU.

    Args:
        x: `[..., M]`; norm_weight, norm_bias, eps: of the norm; the others as in `mlp_residual`.
    """
    norm: Any = {"norm_weight": norm_weight, "norm_bias": norm_bias, "eps": eps}
    layers = (weight_in, bias_in, weight_out, bias_out)
    return LAYER_NORM_MLP(LayerNormMLPArgs(x, *layers, gamma, row_scale, **norm), backend)


def _norm_then_mlp(a: LayerNormMLPArgs, call: Call) -> Tensor:
    normed = layer_norm(a.x, a.norm_weight, a.norm_bias, a.eps, backend=call.requested)
    args = MLPResidualArgs(normed, *a.layers, a.gamma, a.row_scale, residual=a.x)
    return MLP_RESIDUAL(args, call.requested)


def _norm_mlp_in_int8(a: LayerNormMLPArgs, _: Call) -> Tensor:
    norm = (a.norm_weight, a.norm_bias, a.eps)
    return int8.mlp_residual(a.x, *a.layers, a.x, a.gamma, norm=norm)


def _train_norm_mlp(a: LayerNormMLPArgs, _: Call) -> Tensor:
    branch = Branch(
        x=a.x,
        norm_weight=a.norm_weight,
        norm_bias=a.norm_bias,
        eps=a.eps,
        weight=a.weight_in,
        bias=a.bias_in,
        weight_out=a.weight_out,
        bias_out=a.bias_out,
        residual=a.x,
        gamma=a.gamma,
        row_scale=a.row_scale,
    )
    return train(branch)


LAYER_NORM_MLP = Op(
    "layer_norm_mlp",
    LayerNormMLPArgs,
    {
        "fp8": _norm_then_mlp,
        "int8": _norm_mlp_in_int8,
        "training": _train_norm_mlp,
        "reference": _norm_then_mlp,
    },
    int8_race="mlp_residual",
)
