"""The modules of a transformer layer, and the orders in which layers compute: pre-norm and post-norm.

An order composes the operations of an executor. `replace.structure.LayerCall` executes them through
`kernels.ops`, with gradients and on every device; `recording` records CPU kernels, to replay them in
later calls. Tokens are padded `[B, N, width]` or packed `[T, width]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from xfm_fast.kernels.cpu.llvm.activation import Activation

ATTENTION, MLP = 0, 1  # branches of a layer
Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of rotary positions, `[..., N, D]` or `[T, D]`, with equal halves of D."""


class Formula(NamedTuple):
    """How our kernel computes the hidden layer of an MLP."""

    activation: Activation
    halved: bool = False  # one linear layer computes the activated and the other factor of the gate
    last: bool = False  # the second half is the activated one


class LayerModules(NamedTuple):
    """The modules of a layer, and the values that they have at the time of a call."""

    norms: tuple[nn.Module, nn.Module]  # of the attention and of the MLP
    heads: int
    proj: nn.Module  # linear layer after the attention
    inner: tuple[nn.Module, ...]  # linear layers into the hidden layer of the MLP
    fc2: nn.Module  # linear layer out of it
    # linear layers to queries, keys and values, or one to all three
    projections: tuple[nn.Module, ...] = ()
    qkv: tuple[Tensor, Tensor | None] | None = None  # weight and bias in place of projections
    # biases to queries, keys and values of a single projection, stored outside of it
    qkv_biases: tuple[Tensor, Tensor | None, Tensor] | None = None
    joins: bool = True  # one GEMM for all projections
    activation: Callable[[nn.Module], Any] | None = None  # looks up the activation in a layer
    # hidden layer of (x, apply_linear), unless it is `gelu(inner(x))`
    hidden: Callable[[Tensor, Callable[[Any, Tensor], Tensor]], Tensor] | None = None
    formula: Formula | None = None  # of `hidden`, if a kernel computes it
    gammas: tuple[Tensor | None, Tensor | None] = (None, None)  # LayerScale of each branch
    # stochastic depth of each branch: `[B]`, or None
    row_scales: tuple[Callable[[Tensor], Tensor | None], ...] = ()
    attention_p: float = 0.0  # dropout of the attention weights
    hidden_p: float = 0.0  # dropout of the hidden layer
    branch_p: tuple[float, float] = (0.0, 0.0)  # dropout at the end of each branch
    # norms before proj and before fc2
    inner_norms: tuple[nn.Module | None, nn.Module | None] = (None, None)

    @property
    def applied_norms(self) -> list[nn.Module]:
        """Norms before, behind and within the branches, without identities."""
        norms = (*self.norms, *self.inner_norms)
        return [norm for norm in norms if not isinstance(norm, nn.Identity | None)]


class Executor(Protocol):
    """The operations of one layer call."""

    def operand(self, x: Tensor) -> Tensor:
        """Convert x to the compute dtype."""
        ...

    def norm(self, branch: int, x: Tensor) -> Tensor:
        """Apply the norm of a branch."""
        ...

    def attention(self, x: Tensor) -> Tensor:
        """Compute the attention's context, the input of `proj`."""
        ...

    def add_attention(self, context: Tensor, residual: Tensor, norm: int) -> tuple[Tensor, Tensor]:
        """Compute `summed = residual + proj(context)`; returns the norm of the sum, and the sum."""
        ...

    def add_mlp(self, x: Tensor, residual: Tensor) -> Tensor:
        """Compute `residual + MLP(x)`."""
        ...

    def add_mlp_norm(self, x: Tensor) -> Tensor:
        """Compute the norm of `x + MLP(x)`."""
        ...


def pre_norm(layer: Executor, x: Tensor) -> Tensor:
    """Compute `x += Attn(N₁(x)); x += MLP(N₂(x))`."""
    x = layer.operand(x)
    context = layer.attention(layer.norm(ATTENTION, x))
    normed, x = layer.add_attention(context, x, MLP)
    return layer.add_mlp(normed, x)


def post_norm(
    layer: Executor,
    x: Tensor,
    cross_attention: Callable[[Tensor], Tensor] | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Compute `x = N₁(x + Attn(x)); x = N₂(x + MLP(x))`, with cross-attention between.

    The residual keeps its dtype. `rows` `[Q]` are the packed rows of the attention's queries, if
    these are not all; then the result is `[Q, width]`.
    """
    context = layer.attention(x)
    residual = x if rows is None else x.index_select(0, rows)
    x, _ = layer.add_attention(context, residual, ATTENTION)
    if cross_attention is not None:
        x = cross_attention(x)
    return layer.add_mlp_norm(x)
