"""Plans: layers in CPU inference as one call of compiled code.

For a short text, the Python between two kernels takes as long as the kernels. A plan records the
kernels of one or several layers once for a number of tokens and replays them, as a CUDA graph does
on a GPU. Operations without a kernel run between two replays.

Parameters are read in place. A plan is valid while each keeps its memory, no module is in training
mode or exchanged, and no hook or adapter was added; converted and int8 weights are copies, and
`caching.Sources` watches the parameters they were made from. What a plan writes is scratch memory
of the thread, so it is recorded anew when that moves.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_internals
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from xfm_fast.kernels import fp8
from xfm_fast.kernels.backend import Backend, resolve
from xfm_fast.kernels.caching import Sources
from xfm_fast.kernels.cpu import int8
from xfm_fast.kernels.cpu.varlen import compiled_delay
from xfm_fast.kernels.cpu.workspace import HugePages, moves
from xfm_fast.kernels.flags import kind_of
from xfm_fast.plans.orders import LayerModules
from xfm_fast.plans.recording import (
    Added,
    Context,
    Embedded,
    Inputs,
    Layout,
    Operands,
    Recorder,
    Segment,
    projection_groups,
    tensors_of,
)
from xfm_fast.plans.slots import SLOT, pack_of

DTYPES = (torch.float32, torch.bfloat16)
LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)
"""Classes of linear layers whose parameters may be read in place of a call."""
# Programs of a plan in one thread; the number of tokens of most texts is one of few.
_MOST_PROGRAMS = 64
# Seconds that the calls of a layer take without a plan: 0.6 to 0.9 ms on an Intel Xeon, 0.3 to 0.7 ms on AMD EPYCs.
_CALLS_S = 7.5e-4
# Elements of the widest rows, above which the kernels take so long that Python does not matter.
_MOST_ELEMENTS = 16 << 20
# Hooks of modules and of all modules; without gradients, only the first two of each run.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

# What must stay as it was at parameters that are read in place; of matrices also their strides.
_FACTS = (Tensor.data_ptr, attrgetter("shape"), attrgetter("dtype"))


class Watch:
    """What a plan relies on in a module, compared without a call for each part.

    Of an owner with `children`, only these are watched. Of `used` tensors those that are `copied`
    have `caching.Sources`, too.
    """

    def __init__(
        self,
        owner: nn.Module,
        used: Iterable[Tensor],
        copied: Iterable[Tensor] = (),
        children: Sequence[str] = (),
        config: Any = None,
    ) -> None:
        roots: Any = [owner._modules[name] for name in children] or [owner]
        within = [module for root in roots for module in root.modules()]
        # A reference to the owner would keep it alive.
        self._typed = list[Any](module for module in within if module is not owner)
        self._states = [module.__dict__ for module in within]
        self._hooks = [getattr(module, name) for module in within for name in HOOKS[:2]]
        self._hooks += [getattr(module_internals, name) for name in GLOBAL_HOOKS[:2]]
        read, slots = {*map(id, used)}, list[tuple[dict[str, Any], str, Any]]()
        slots += [(owner._modules, name, owner._modules[name]) for name in children]
        self._read, in_place = list[Tensor](), read.difference(map(id, copied))
        for module in within:
            slots += [(module._modules, name, value) for name, value in module._modules.items()]
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    # A bias may be added later, and a packed weight unpacked.
                    if value is None or id(value) in read or SLOT in module.__dict__:
                        slots.append((table, name, value))
                    if id(value) in read:
                        self._typed.append(value)
                    if id(value) in in_place:
                        self._read.append(cast(Tensor, value))
        self._types = [*map(type, self._typed)]
        self._owners, self._names, self._values = zip(*slots, strict=True)
        self._matrices = [tensor for tensor in self._read if tensor.ndim > 1]
        self._facts = [[*map(fact, self._read)] for fact in _FACTS]
        self._strides = [*map(Tensor.stride, self._matrices)]
        # Configurations of transformers compute their attributes.
        self._config = {} if config is None else object.__getattribute__(config, "__dict__")
        self._options = dict(self._config)

    def unchanged(self) -> bool:
        states = self._states
        return (
            not any(self._hooks)
            and not any(map(itemgetter("training"), states))
            and not any(map(dict.__contains__, states, repeat("forward")))
            and all(map(is_, map(dict.get, self._owners, self._names), self._values))
            and all(map(is_, map(type, self._typed), self._types))
            and [[*map(fact, self._read)] for fact in _FACTS] == self._facts
            and [*map(Tensor.stride, self._matrices)] == self._strides
            and self._config == self._options
        )


class _Program(NamedTuple):
    """Segments of a plan for one layout; valid until scratch memory moves."""

    segments: list[Segment]
    moves: int
    invalid: np.ndarray  # [1] int64, not 0 if an index was outside its table


class Layers(NamedTuple):
    """The layers of a plan, and what it relies on beside them."""

    layers: Sequence[nn.Module]
    look_up: Callable[[Any], LayerModules]  # returns the modules of a layer
    orders: Sequence[bool]  # whether each layer is post-norm instead of pre-norm
    # children of the owner that contain the layers or are read beside them, unless it is a layer
    children: Sequence[str] = ()
    embeddings: Any = None  # module whose tables an `Embedded` has
    config: Any = None


class Plan:
    """Layers in one compute dtype, with their programs."""

    def __init__(self, owner: nn.Module, layers: Layers, operands: Sequence[Operands]) -> None:
        self.operands, self.orders = operands, layers.orders
        self.layers = layers if layers.children else None
        used = [t for each in operands for t in tensors_of(each.modules)]
        self._norms = [norm for each in operands for norm in each.modules.applied_norms]
        embeddings, self._tables = layers.embeddings, list[nn.Module]()
        if embeddings is not None:
            used += embeddings.parameters()
            self._norms.append(embeddings.LayerNorm)
            self._tables = [embeddings.word_embeddings, embeddings.position_embeddings]
        self._copied = [t for each in operands for t in each.copied]
        self._watch = Watch(owner, used, self._copied, layers.children, layers.config)
        self._copies = Sources(self._copied, partial(_drop, weakref.ref(owner), weakref.ref(self)))
        self._eps = [*map(attrgetter("eps"), self._norms)]
        functions = list[tuple[int, Callable[[nn.Module], Any], Any]]()
        self._gelus = list[nn.Module]()
        for index, (layer, each) in enumerate(zip(layers.layers, operands, strict=True)):
            if (get := each.modules.activation) is not None:
                value = get(layer)
                if hasattr(value, "approximate"):
                    self._gelus.append(value)
                if not isinstance(value, nn.Module):
                    functions.append((index, get, value))
        self._functions = functions
        # Numbers of rows and threads for which other kernels are faster.
        self.refused = set[tuple[int, int]]()
        self._approximations = [*map(attrgetter("approximate"), self._gelus)]

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of the operands and of the residual."""
        return self.operands[0].dtype, self.operands[0].residual

    def is_valid(self, layers: Sequence[nn.Module]) -> bool:
        """Return whether nothing that the plan relies on has changed."""
        if not self._watch.unchanged() or [*map(attrgetter("eps"), self._norms)] != self._eps:
            return False
        if [*map(attrgetter("approximate"), self._gelus)] != self._approximations:
            return False
        # With a maximum, a table is written to where it is read.
        if any(map(attrgetter("max_norm"), self._tables)):
            return False
        for index, get, value in self._functions:
            if get(layers[index]) is not value:
                return False
        return not self._copied or self._copies.unchanged(self._copied)

    def run(
        self,
        x: Tensor | Embedded,
        context: Context,
        layout: Layout,
        added: Added,
    ) -> Tensor | None:
        """Compute the layers on `[..., width]`; None if a kernel is not the fastest here.

        `context` computes attention that has no kernel.
        """
        if isinstance(x, Embedded):
            indices = (None if t is None else t.long().contiguous() for t in x.indices)
            x = x._replace(indices=tuple(indices))
        else:
            x = x.contiguous()
        first = self.operands[0]
        lead = layout.lead
        if layout.pooling is not None:
            assert layout.sizes is not None
            lead = layout.sizes[:1]
        out = torch.empty(*lead, first.width, dtype=first.residual)
        moving = (*(x.indices if isinstance(x, Embedded) else (x,)), *added, out)
        flags = tuple([t is None for t in moving])
        deterministic = torch.are_deterministic_algorithms_enabled()
        key = (layout, flags, torch.get_num_threads(), deterministic)
        programs = _thread.programs.setdefault(self, OrderedDict())
        program = programs.get(key)
        if key not in programs or (program is not None and program.moves != moves()):
            program = programs[key] = self._record(x, layout, moving)
            if len(programs) > _MOST_PROGRAMS:
                programs.popitem(last=False)
        programs.move_to_end(key)
        if program is None:
            return None
        tensors = [t for t in moving if t is not None]
        inputs = Inputs(tensors, [*map(Tensor.data_ptr, tensors)], context)
        for segment in program.segments:
            segment(inputs)
        if isinstance(x, Embedded) and program.invalid[0]:
            program.invalid[0] = 0
            raise IndexError("index out of range in self")
        return out

    def _record(
        self, x: Tensor | Embedded, layout: Layout, moving: Sequence[Tensor | None]
    ) -> _Program | None:
        if torch.are_deterministic_algorithms_enabled():
            return None
        rows, sizes = layout.rows, layout.sizes
        if sizes is not None:
            delay = compiled_delay(self.operands[0].query, sizes[0], sizes[2])
            layout = layout if delay < _CALLS_S else layout._replace(sizes=None)
        for each in self.operands:
            delays = (linear.delays(name, rows, dtype) for name, linear, dtype in each.linears)
            is_large = rows * max(3 * each.width, each.hidden) > _MOST_ELEMENTS
            if is_large or sum(map(min, delays)) >= _CALLS_S:
                self.refused.add((rows, torch.get_num_threads()))
                return None
        # Their addresses are nothing else's.
        stand_ins = [None if t is None else torch.empty_like(t) for t in moving]
        recorder = Recorder(layout, stand_ins)
        while True:
            # A buffer that grows moves those that were recorded before.
            before = moves()
            segments = recorder.record(self.operands, self.orders, x)
            if moves() == before:
                return _Program(segments, before, recorder.invalid.numpy())


class _Thread(threading.local):
    def __init__(self) -> None:
        self.programs: weakref.WeakKeyDictionary[Plan, OrderedDict[Any, _Program | None]]
        self.programs = weakref.WeakKeyDictionary()


_thread = _Thread()
# A plan must not refer to its owner, which would keep both alive.
_plans: weakref.WeakKeyDictionary[nn.Module, Plan] = weakref.WeakKeyDictionary()


def valid_plan(owner: nn.Module) -> Plan | None:
    """Return the plan of a module if nothing has changed since it was made, or None.

    For calls that `infers` allows: a trace would record the plan's kernels as constants.
    """
    plan = _plans.get(owner)
    if plan is None:
        return None
    layers = [owner] if plan.layers is None else plan.layers.layers
    return plan if plan.is_valid(layers) else None


def _make(
    owner: nn.Module,
    layers: Layers,
    dtype: torch.dtype,
    residual: torch.dtype,
    rows: int,
    *,
    mixed: bool,
) -> Plan | None:
    """Make a plan, unless it cannot cover the layers; `mixed` parameters have several dtypes."""
    _plans.pop(owner, None)
    modules = list[LayerModules]()
    for layer in layers.layers:
        each = layers.look_up(layer)
        modules.append(each)
        if not _can_plan(layer, each, dtype, mixed=mixed):
            return None
        rounded = [weight for weight in tensors_of(each) if kind_of(weight) == "int8"]
        # Their copies are made for the compiled kernel.
        if rounded and int8.compiled_delay(rows, dtype, rounded) >= _CALLS_S:
            return None
    # The first caller may be in inference mode; the plan must serve all.
    with torch.inference_mode(False), torch.no_grad():
        memory = HugePages()
        operands = [Operands(each, dtype, residual, memory) for each in modules]
        plan = Plan(owner, layers, operands)
    if not plan.is_valid(layers.layers):
        return None
    _plans[owner] = plan
    return plan


def plan_of(
    owner: nn.Module,
    layers: Layers,
    dtype: torch.dtype,
    residual: torch.dtype,
    rows: int,
    *,
    mixed: bool = False,
) -> Plan | None:
    """Return the plan of a module, made anew after a change; None if it does not cover the layers or is slower.

    Args:
        dtype: Of the operands.
        residual: Dtype of the residual.
        rows: Tokens of the call.
        mixed: Parameters have several dtypes.
    """
    plan = valid_plan(owner)
    if plan is not None and plan.dtypes == (dtype, residual):
        return None if (rows, torch.get_num_threads()) in plan.refused else plan
    return _make(owner, layers, dtype, residual, rows, mixed=mixed)


def forget(owner: nn.Module) -> None:
    """Drop the plan of a module."""
    _plans.pop(owner, None)


def _drop(owner: weakref.ref[nn.Module], plan: weakref.ref[Plan], _: Any) -> None:
    """Drop a plan whose copies are of parameters that are gone."""
    module = owner()
    if module is not None and _plans.get(module) is plan():
        forget(module)


def infers(backend: Backend | None, x: Tensor, *others: Tensor) -> bool:
    """Return whether a call is plain CPU inference: no gradient, compiler, autocast or fp8."""
    if (
        fp8.on()
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    return x.device.type == "cpu" and resolve(backend, x, *others) == "cpu"


def _can_plan(layer: nn.Module, modules: LayerModules, dtype: torch.dtype, *, mixed: bool) -> bool:
    """Return whether a plan covers a layer.

    Its linear layers must be plain, packed or int8, nothing may draw, and unless `mixed` all have
    one dtype.
    """
    proj: Any = modules.proj
    if proj.in_features != proj.out_features:
        return False
    if modules.attention_p or modules.hidden_p or any(modules.branch_p):
        return False
    groups = projection_groups(modules)
    groups += [(linear,) for linear in (modules.proj, modules.fc2, *modules.inner)]
    packs = [pack_of(group) for group in groups]
    for group, packed in zip(groups, packs, strict=True):
        if packed is not None:
            if packed.dtype != dtype or packed.is_mkldnn:
                return False
            continue
        if not {*map(type, group)} <= {*LINEARS} or any(SLOT in layer.__dict__ for layer in group):
            return False
        if len({kind_of(cast(Any, linear).weight) for linear in group}) > 1:
            return False
    for norm in modules.applied_norms:
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None:
            return False
    tensors = tensors_of(modules)
    owned = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
    # Inference tensors carry no version, without which no copy can be watched.
    copies = (
        modules.qkv_biases is not None
        or any(
            len(group) > 1 and packed is not None
            for group, packed in zip(groups, packs, strict=True)
        )
        or any(tensor.dtype != dtype or kind_of(tensor) is not None for tensor in tensors)
    )
    return all(
        tensor.dtype in DTYPES
        and tensor.device.type == "cpu"
        and tensor.stride(-1) == 1
        and not (copies and tensor.is_inference())
        and kind_of(tensor) != "fp8"
        and id(tensor) in owned
        and (mixed or tensor.dtype == dtype)
        for tensor in tensors
    )
