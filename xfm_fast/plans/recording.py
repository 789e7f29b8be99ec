"""The operands of a planned layer, and the recorder of its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from xfm_fast.kernels.cpu import gemm, int8
from xfm_fast.kernels.cpu.workspace import HugePages, scratch, scratch_rows
from xfm_fast.kernels.flags import concatenate_biases, kind_of
from xfm_fast.plans.orders import ATTENTION, MLP, Formula, LayerModules, post_norm, pre_norm
from xfm_fast.plans.slots import SLOT, pack_of, slot_of

if TYPE_CHECKING:
    from xfm_fast.kernels.cpu.llvm.rows import Positions

# Seconds that an operation of PyTorch between two replays costs beside its work.
_STEP_S = 3e-5
Context = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k and v `[..., H, D]`: `[..., H·D]`."""


class Inputs(NamedTuple):
    """What a call gives to the segments of a plan."""

    tensors: list[Tensor]  # in place of those that were recorded
    addresses: list[int]
    context: Context


Segment = Callable[[Inputs], None]
"""A replay of kernels, or an operation of PyTorch."""


class _Linear(NamedTuple):
    """A linear layer with a dense or int8 weight; LayerScale is folded into int8."""

    weight: Tensor
    bias: Tensor | None  # in the dtype of the output
    prepared: int8.Prepared | None

    @property
    def outputs(self) -> int:
        return len(self.weight if self.prepared is None else self.prepared.panels.steps)

    def delays(self, operation: str, rows: int, dtype: torch.dtype) -> tuple[float, float]:
        """Return the seconds lost by the compiled kernel, and by a call of PyTorch, against the fastest."""
        if self.prepared is None:
            compiled = gemm.delay("llvm", operation, self.weight, rows)
            if not 0 < compiled < math.inf or self.weight.dtype != dtype:
                return compiled, math.inf
            return compiled, gemm.delay("aten", operation, self.weight, rows) + _STEP_S
        # Of several layers in one GEMM, it has the weight of the first.
        delay = int8.compiled_delay(rows, dtype, (self.weight,)) * self.outputs / len(self.weight)
        return delay, math.inf

    def compute(
        self, x: Tensor, out: Tensor, residual: Tensor | None, gamma: Tensor | None
    ) -> None:
        """Compute `out = residual + gamma · (x Wᵀ + b)` by PyTorch."""
        weight, bias = self.weight.t(), self.bias
        if gamma is not None:
            product = x @ weight if bias is None else torch.addmm(bias, x, weight)
            torch.addcmul(cast(Tensor, residual), product, gamma, out=out)
        elif residual is None and bias is None:
            torch.mm(x, weight, out=out)
        elif residual is None:
            torch.addmm(cast(Tensor, bias), x, weight, out=out)
        else:
            out.copy_(residual) if bias is None else torch.add(residual, bias, out=out)
            out.addmm_(x, weight)

    def record(
        self,
        x: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        *,
        gelu: bool = False,
    ) -> None:
        """Launch `out = residual + gamma · (x Wᵀ + b)`, or its GELU, on `[n, width]`."""
        from xfm_fast.kernels.cpu.llvm.linear import int8_linear, linear

        if self.prepared is None:
            stored = gemm.panels_of(self.weight)
            linear(x, self.weight, self.bias, residual, gamma, gelu=gelu, stored=stored, out=out)
        else:
            panels, bias = self.prepared
            int8_linear(x, panels, bias, residual, out, gelu=gelu)


class Operands:
    """What one layer computes with: in a compute dtype, and a dtype of the residual."""

    def __init__(
        self,
        modules: LayerModules,
        dtype: torch.dtype,
        residual: torch.dtype,
        memory: HugePages,
    ) -> None:
        self.modules, self.dtype, self.residual, self._memory = modules, dtype, residual, memory
        proj, fc2 = cast(Any, modules.proj), cast(Any, modules.fc2)
        self.width, self.hidden = proj.out_features, fc2.in_features
        # Queries without tokens, for choices by their type and size.
        self.query = torch.empty(0, modules.heads, self.width // modules.heads, dtype=dtype)
        self.head_size = self.query.shape[-1]
        self.copied = list[Tensor]()
        gammas = modules.gammas
        self.qkv = [*self._projections(modules)]
        self.proj = self._linear([modules.proj], residual, gammas[ATTENTION])
        self.fc2 = self._linear([modules.fc2], residual, gammas[MLP])
        # The hidden layer is rounded to int8 from fp32, which is finer.
        in_fp32 = modules.hidden is None and self.fc2.prepared is not None
        self.hidden_dtype = torch.float32 if in_fp32 else dtype
        self.inner = {
            id(layer): self._linear([layer], self.hidden_dtype) for layer in modules.inner
        }
        self.norms = [self._norm(norm) for norm in modules.norms]
        self.inner_norms = [self._norm(norm) for norm in modules.inner_norms]
        self.gammas = [
            None if gamma is None or linear.prepared is not None else self._as(gamma, residual)
            for gamma, linear in zip(gammas, (self.proj, self.fc2), strict=True)
        ]

    @property
    def linears(self) -> list[tuple[str, _Linear, torch.dtype]]:
        """All linear layers with the name of their operation and the dtype of their output."""
        inner = "linear_gelu" if self.modules.hidden is None else "linear"
        return [
            *(("linear", linear, self.dtype) for linear in self.qkv),
            *((inner, linear, self.hidden_dtype) for linear in self.inner.values()),
            *(("linear_residual", linear, self.residual) for linear in (self.proj, self.fc2)),
        ]

    def _projections(self, modules: LayerModules) -> Iterator[_Linear]:
        """Prepare the linear layers to queries, keys and values."""
        if modules.qkv is not None:
            weight, bias = modules.qkv
            yield self._affine([weight], [bias], self.dtype)
            return
        groups = projection_groups(modules)
        # One GEMM on rounded rows is faster than three.
        rounded = kind_of(groups[0][0]._parameters.get("weight")) == "int8"
        if not rounded and pack_of(groups[0]) is None:
            groups = [(projection,) for projection in modules.projections]
        for group in groups:
            if modules.qkv_biases is not None:
                yield self._linear(group, self.dtype, biases=modules.qkv_biases)
            else:
                yield from self._separate(group) or [self._linear(group, self.dtype)]

    def _as(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        if value.dtype == dtype:
            # Without the memory of a parameter that moves later.
            return value
        self.copied.append(value)
        return value.detach().to(dtype)

    def _linear(
        self,
        layers: Sequence[Any],
        out: torch.dtype,
        gamma: Tensor | None = None,
        biases: Sequence[Tensor | None] = (),
    ) -> _Linear:
        """Prepare one linear layer, or several on the same input as one; `biases` replace theirs."""
        packed = pack_of(layers)
        weights = [packed] if packed is not None else [layer.weight for layer in layers]
        return self._affine(weights, biases or [layer.bias for layer in layers], out, gamma)

    def _affine(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        out: torch.dtype,
        gamma: Tensor | None = None,
    ) -> _Linear:
        """Prepare weights on the same input as one, with the biases of equal parts of the output."""
        first = weights[0]
        rounded = kind_of(first) == "int8"
        out = torch.float32 if rounded else out
        parts = [None if bias is None else self._as(bias, out) for bias in biases]
        bias = concatenate_biases(parts, [self.width] * len(parts))
        if len(parts) > 1 or (rounded and gamma is not None):
            self.copied += [bias for bias in biases if bias is not None]
        if not rounded:
            weight = self._as(first, self.dtype)
            if weight.dtype != first.dtype:
                # A copy may as well have the order of the kernel.
                weight = gemm.frozen(weight, "panels", self._memory)
            return _Linear(weight, bias, None)
        self.copied += weights if gamma is None else [*weights, gamma]
        weight = first if len(weights) == 1 else torch.cat([*weights])
        return _Linear(first, bias, int8.Prepared.of(weight, bias, gamma))

    def _separate(self, layers: Sequence[Any]) -> list[_Linear]:
        """Prepare the layers of one packed weight each for itself, so that their biases need no copy."""
        packed, sizes = pack_of(layers), [layer.out_features for layer in layers]
        weights = [] if packed is None else gemm.split_panels(packed, sizes)
        linears = []
        for weight, layer in zip(weights, layers, strict=False):
            bias = None if layer.bias is None else self._as(layer.bias, self.dtype)
            linears.append(_Linear(weight, bias, None))
        return linears

    def _norm(self, norm: Any) -> tuple[Tensor, Tensor | None, float] | None:
        if isinstance(norm, nn.Identity | None):
            return None
        return norm.weight, norm.bias, norm.eps


PoolingKind = Literal["first", "mean", "max"]


class Pooling(NamedTuple):
    """What a call returns of each text in place of its tokens; a plan has no kernel for `max`."""

    kind: PoolingKind
    normalised: bool = False  # divided by its norm


class Layout(NamedTuple):
    """Shape of the tokens, and of the attention if a kernel runs it."""

    lead: tuple[int, ...]  # shape without the width
    sizes: tuple[int, int, int] | None = None  # texts, most queries, most keys
    packed: bool = False
    bias: tuple[int, tuple[int, int, int]] | None = None  # period and strides
    positions: Positions | None = None  # of rotary tables
    pooling: Pooling | None = None

    @property
    def rows(self) -> int:
        return torch.Size(self.lead).numel()

    def biased(self, bias: Tensor) -> tuple[Layout, Tensor]:
        """Return the layout of attention with a bias `[B or 1, H or 1, N or 1, N]`, and what the kernel adds."""
        from xfm_fast.kernels.cpu.llvm.attention import readable_bias

        bias, strides = cast(Any, readable_bias(bias))
        return self._replace(bias=(len(bias), strides)), bias

    @property
    def cuts(self) -> bool:
        """Whether the last layer computes one token: the first, of one text."""
        return self.pooling is not None and self.pooling.kind == "first"


class Added(NamedTuple):
    """Tensors that the kernels of a call read beside its tokens."""

    offsets: Tensor | None = None  # bounds of packed texts, in int64
    bias: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


class Embedded(NamedTuple):
    """Embeddings in place of tokens: words, positions and types, `[T]` in int64 and the tables."""

    indices: tuple[Tensor, Tensor, Tensor | None]
    tables: tuple[Tensor, Tensor, Tensor | None]
    norm: nn.LayerNorm


class Recorder:
    """Executor (`orders.Executor`) that records kernels, and other operations as calls."""

    def __init__(self, layout: Layout, stand_ins: Sequence[Tensor | None]) -> None:
        self._layout = layout
        *self._inputs, self._offsets, self._bias, cos, sin, self._out = stand_ins
        self._tables = cos, sin
        self._addresses = [t.data_ptr() for t in stand_ins if t is not None]

    @property
    def invalid(self) -> Tensor:
        return scratch("plan invalid", (1,), torch.int64).zero_()

    def record(
        self,
        operands: Sequence[Operands],
        orders: Sequence[bool],
        x: Tensor | Embedded,
    ) -> list[Segment]:
        """Record layers and return their segments."""
        from xfm_fast.kernels.cpu.llvm.builder import recorded
        from xfm_fast.kernels.cpu.llvm.rows import pool

        out = cast(Tensor, self._out)
        self._segments = list[Segment]()
        self._narrowed = dict[int, Tensor]()
        with recorded() as self._launches:
            self._layer, self._target, self._rows = operands[0], out, self._layout.rows
            if isinstance(x, Embedded):
                states = self._embed(x)
            else:
                states = cast(Tensor, self._inputs[0]).view(-1, x.shape[-1])
            pooling = self._layout.pooling
            # The first token alone is what the last layer computes.
            pooling = None if pooling == Pooling("first") else pooling
            for index, (layer, is_post_norm) in enumerate(zip(operands, orders, strict=True)):
                self._layer, width = layer, layer.width
                is_last = index == len(operands) - 1
                is_out = is_last and pooling is None
                self._target = out.view(-1, width) if is_out else self._buffer("states", width)
                self._cuts = is_last and self._layout.cuts
                states = (post_norm if is_post_norm else pre_norm)(self, states)
            if pooling is not None:
                offsets = None if self._layout.cuts else self._offsets
                pool(states[: self._rows], offsets, out, normalised=pooling.normalised)
            self._cut()
        return self._segments

    def _cut(self) -> None:
        """End a segment of kernels."""
        from xfm_fast.kernels.cpu.llvm.replay import Replay

        if not self._launches:
            return
        replay = Replay(self._launches, torch.get_num_threads(), self._addresses)
        self._launches.clear()
        self._segments.append(lambda inputs: replay(inputs.addresses))

    def _between(self, step: Segment) -> None:
        """Record a call that runs between two replays."""
        self._cut()
        self._segments.append(step)

    def _multiply(
        self,
        linear: _Linear,
        x: Tensor,
        out: Tensor,
        residual: Tensor | None = None,
        gamma: Tensor | None = None,
        *,
        gelu: bool = False,
    ) -> None:
        """Record `out = residual + gamma · (x Wᵀ + b)`, or its GELU, as a kernel or as a call of PyTorch."""
        from xfm_fast.kernels.cpu.llvm.builder import unrecorded

        operation = "linear_gelu" if gelu else "linear" if residual is None else "linear_residual"
        x = self._operand(x, linear)
        with unrecorded():
            # The first comparison of a size runs all candidates.
            compiled, called = linear.delays(operation, len(x), out.dtype)
        if called >= compiled or x.dtype != out.dtype:
            linear.record(x, out, residual, gamma, gelu=gelu)
            return
        now_x, now_out, now_residual = (self._current(t) for t in (x, out, residual))

        def call(inputs: Inputs) -> None:
            linear.compute(now_x(inputs), now_out(inputs), now_residual(inputs), gamma)

        self._between(call)
        if gelu:
            self._activate(Formula("gelu"), [out], out)

    def _current(self, recorded: Tensor | None) -> Callable[[Inputs], Any]:
        """Return the function that looks up a recorded tensor, or the one in its place, of a call."""
        if recorded is None or recorded.data_ptr() not in self._addresses:
            return lambda _: recorded
        index, shape = self._addresses.index(recorded.data_ptr()), recorded.shape
        return lambda inputs: inputs.tensors[index].view(-1, shape[1])[: shape[0]]

    def _buffer(self, name: str, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return scratch_rows(f"plan {name}", self._rows, width, dtype or self._layer.residual)

    def _embed(self, x: Embedded) -> Tensor:
        from xfm_fast.kernels.cpu.llvm import rows

        states = self._buffer("states", self._layer.width)
        norm = x.norm.weight, x.norm.bias, x.norm.eps
        rows.embed(self._inputs, x.tables, norm, states, self._narrow(states), self.invalid)
        return states

    def _narrow(self, x: Tensor) -> Tensor | None:
        """Return a buffer for x in the compute dtype, if it is another one and floats are multiplied."""
        layer = self._layer
        if layer.dtype == layer.residual:
            return None
        narrow = self._buffer("narrow", layer.width, layer.dtype)
        self._narrowed[x.data_ptr()] = narrow
        return narrow

    def _inner_norm(self, branch: int, x: Tensor) -> None:
        """Record the norm before the last linear layer of a branch, in place."""
        from xfm_fast.kernels.cpu.llvm.rows import layer_norm

        norm = self._layer.inner_norms[branch]
        if norm is not None:
            layer_norm(x, *norm, x)

    def operand(self, x: Tensor) -> Tensor:
        return x

    def _operand(self, x: Tensor, linear: _Linear) -> Tensor:
        """Return the input of a linear layer, which rounds to int8 by itself."""
        from xfm_fast.kernels.cpu.llvm.rows import to_bf16

        if linear.prepared is not None:
            return x
        if x.data_ptr() not in self._narrowed:
            if x.dtype != self._layer.dtype:
                to_bf16(x, cast(Tensor, self._narrow(x)))
            elif x.data_ptr() in self._addresses and gemm.collides(x):
                current, spread = self._current(x), self._buffer("spread", x.shape[1])
                self._narrowed[x.data_ptr()] = spread

                def copy(inputs: Inputs) -> None:
                    spread.copy_(current(inputs))

                self._between(copy)
        return self._narrowed.get(x.data_ptr(), x)

    def norm(self, branch: int, x: Tensor, out: Tensor | None = None) -> Tensor:
        from xfm_fast.kernels.cpu.llvm.rows import layer_norm

        norm = self._layer.norms[branch]
        if norm is None:
            assert out is None
            return x
        out = self._buffer("normed", self._layer.width) if out is None else out
        layer_norm(x, *norm, out, self._narrow(out))
        return out

    def attention(self, x: Tensor) -> Tensor:
        layer, layout = self._layer, self._layout
        heads, width = layer.modules.heads, layer.width
        qkv = self._buffer("qkv", 3 * width, layer.dtype)
        start = 0
        for linear in layer.qkv:
            only_queries = not start and linear.outputs == width
            rows = 1 if self._cuts and only_queries else len(x)
            part = qkv[:rows, start : start + linear.outputs]
            self._multiply(linear, self._operand(x, linear)[:rows], part)
            start += linear.outputs
        q, k, v = qkv.view(*layout.lead, 3, heads, -1).unbind(-3)
        lead = layout.lead
        if self._cuts:
            # From here on, all operations have one row.
            self._rows, q, lead = 1, q[:1], (1,)
        context = self._buffer("context", width, layer.dtype)

        def call(inputs: Inputs) -> None:
            context.view(*lead, width).copy_(inputs.context(q, k, v))

        if layout.sizes is None:
            self._between(call)
            return context
        if layout.positions is not None:
            from xfm_fast.kernels.cpu.llvm.rows import rotate

            rotate(qkv, 2 * heads, cast(Any, self._tables), layout.positions)
        self._attend(q, k, v, context)
        return context

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Tensor) -> None:
        from xfm_fast.kernels.cpu.llvm.attention import attend

        layout = self._layout
        assert layout.sizes is not None
        texts, longest, keys = layout.sizes
        sizes = texts, min(longest, self._rows), keys
        texts = 1 if layout.packed else texts
        q, k, v = (t.view(texts, -1, *t.shape[-2:]) for t in (q, k, v))
        out = context.view(q.shape)
        bias = None, (0, 0, 0)
        if layout.bias is not None:
            bias = self._bias, layout.bias[1]
        offsets = 0 if self._offsets is None else self._offsets.data_ptr()
        attend(q, k, v, out, q.shape[-1] ** -0.5, bias, sizes, (offsets, offsets))

    def add_attention(self, context: Tensor, residual: Tensor, norm: int) -> tuple[Tensor, Tensor]:
        layer = self._layer
        self._inner_norm(ATTENTION, context)
        summed = self._buffer("sum", layer.width)
        residual = residual[: self._rows]
        self._multiply(layer.proj, context, summed, residual, layer.gammas[ATTENTION])
        return self.norm(norm, summed), summed

    def add_mlp(self, x: Tensor, residual: Tensor, out: Tensor | None = None) -> Tensor:
        layer = self._layer
        out = self._target if out is None else out
        if layer.modules.hidden is None:
            (first,) = layer.inner.values()
            hidden = self._buffer("hidden", layer.hidden, layer.hidden_dtype)
            self._multiply(first, x, hidden, gelu=True)
        else:
            hidden = self._activated(x)
        self._inner_norm(MLP, hidden)
        self._multiply(layer.fc2, hidden, out, residual, layer.gammas[MLP])
        self._narrowed.pop(out.data_ptr(), None)
        return out

    def _activated(self, x: Tensor) -> Tensor:
        """Record the inner linear layers, and the activation, as a call if no kernel computes it."""
        layer, outputs = self._layer, dict[int, Tensor]()
        for index, module in enumerate(layer.modules.inner):
            linear = layer.inner[id(module)]
            width = cast(Any, module).out_features
            output = outputs[id(module)] = self._buffer(f"inner {index}", width, layer.dtype)
            self._multiply(linear, x, output)
        hidden = self._buffer("hidden", layer.hidden, layer.dtype)
        if (formula := layer.modules.formula) is not None:
            self._activate(formula, [*outputs.values()], hidden)
            return hidden
        compute: Any = layer.modules.hidden

        def activate(_: Inputs) -> None:
            hidden.copy_(compute(x, lambda module, _: outputs[id(module)]))

        self._between(activate)
        return hidden

    def _activate(self, formula: Formula, outputs: list[Tensor], hidden: Tensor) -> None:
        from xfm_fast.kernels.cpu.llvm.activation import activate

        first, *rest = outputs
        gate = rest[0] if rest else None
        if formula.halved:
            halves = first.chunk(2, -1)
            first, gate = reversed(halves) if formula.last else halves
        activate(formula.activation, first, gate, hidden)

    def add_mlp_norm(self, x: Tensor) -> Tensor:
        if self._layer.norms[MLP] is None:
            return self.add_mlp(x, x)
        summed = self.add_mlp(x, x, self._buffer("sum", self._layer.width))
        return self.norm(MLP, summed, self._target)


def projection_groups(modules: LayerModules) -> list[tuple[nn.Module, ...]]:
    """Return the projections, those that are packed as one or share a GEMM as one group."""
    groups, remaining = list[tuple[nn.Module, ...]](), modules.projections
    while remaining:
        size = len(remaining) if modules.joins else 1
        if SLOT in remaining[0].__dict__:
            size = len(slot_of(remaining[0]).sizes)
        groups.append(remaining[:size])
        remaining = remaining[size:]
    return groups


def _parameters_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [
        value
        for module in modules
        for name, value in module._parameters.items()
        if value is not None and not (name == "weight" and SLOT in module.__dict__)
    ]


def tensors_of(modules: LayerModules) -> list[Tensor]:
    """Return the parameters and LayerScales that a layer computes with, without packed weights."""
    linears = (*modules.projections, modules.proj, *modules.inner, modules.fc2)
    others = (*(modules.qkv or ()), *(modules.qkv_biases or ()), *modules.gammas)
    parameters = _parameters_of((*linears, *modules.applied_norms))
    return parameters + [tensor for tensor in others if tensor is not None]
