"""Swap the class of a live module for a fused one; the object stays the same.

Parameters, buffers, hooks, optimizers, wrappers and state-dict keys are unaffected. The new class derives from the
fused one and the original, so `super().forward` handles every call that the fused form does not cover. (PyTorch's
`fully_shard` swaps classes in the same way.)
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce, wraps
from types import FunctionType
from typing import Any, ClassVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_internals

from xfm_fast.kernels import flags, ops
from xfm_fast.kernels.backend import Backend, traced
from xfm_fast.kernels.caching import cached
from xfm_fast.models.frozen import packed_weight
from xfm_fast.replace import adapters

Kinds = type[nn.Module] | tuple[type[nn.Module], ...]
# Relative to the largest value of an output: summation order changes rounding.
BANDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
_SETTINGS = "_xfm_fast"
_CAPTURING = "transformers.utils.output_capturing"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


@dataclass(frozen=True)
class Settings:
    """Options of `accelerate`, as fused modules read them."""

    kernels: Backend = "auto"
    dtype: torch.dtype | None = None  # compute dtype; None follows the inputs
    unpad: bool = False  # run whole encoders without padding; outputs are zero there
    skip_logits: bool = False  # masked-language heads return no logits in training with labels
    eight_bits: flags.EightBits | None = None
    freeze: bool = False  # store weights packed

    @property
    def backend(self) -> Backend | None:
        """The backend for the ops; None leaves the choice to the device and `use_backend`."""
        return None if self.kernels == "auto" else self.kernels

    def operand(self, value: Tensor) -> Tensor:
        """An activation in the compute dtype."""
        return (
            value if self.dtype is None or not value.is_floating_point() else value.to(self.dtype)
        )

    @overload
    def parameter(self, value: Tensor) -> Tensor: ...
    @overload
    def parameter(self, value: Tensor | None) -> Tensor | None: ...
    def parameter(self, value: Tensor | None) -> Tensor | None:
        """A parameter in the compute dtype; the conversion is cached without gradients."""
        if value is None or self.dtype is None or value.dtype == self.dtype:
            return value
        if value.ndim > 1 and flags.kind_of(value) is not None:
            return value  # rounded as it is stored
        if torch.is_grad_enabled() and value.requires_grad:
            return value.to(self.dtype)
        dtype = self.dtype
        return cached(
            f"as {dtype}", (value,), lambda: flags.copy_flag(value.detach().to(dtype), value)
        )

    def affine(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
        """Weight and bias in the compute dtype."""
        return self.parameter(weight), self.parameter(bias)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + b` in the compute dtype."""
        return ops.linear(self.operand(x), *self.affine(weight, bias), backend=self.backend)

    def products(
        self, name: str, x: Tensor, *layers: Any, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Outputs `[..., M]` of linear layers on one input x `[..., K]`, adapters included.

        With one GEMM, unless a CPU would need a copy of the weights for that alone. `name` is the cache key of the
        concatenated weights. `bias` is that of a single layer, stored outside it.
        """
        x = self.operand(x)
        packed = packed_weight(layers, self.backend, x)
        if packed is not None:
            widths = [layer.out_features for layer in layers]
            shift = side_by_side([layer.bias if bias is None else bias for layer in layers], widths)
            return ops.linear(x, packed, shift, backend=self.backend).split(widths, -1)
        bases = [adapters.base_layer(layer) for layer in layers]
        weights = [base.weight for base in bases]
        biases = [base.bias if bias is None else bias for base in bases]
        later: list[list[adapters.Addition]] = []
        for place, layer in enumerate(layers):
            found = adapters.additions(layer) if layer is not bases[place] else []
            merged = adapters.added(weights[place], biases[place], found) if found else None
            if merged is not None:
                (weights[place], biases[place]), found = merged, []
            later.append(found)
        if len(layers) == 1 or self._reads_in_place(x, weights):
            pairs = zip(weights, biases, strict=True)
            made: tuple[Tensor, ...] = tuple(
                self.linear(x, weight, shift) for weight, shift in pairs
            )
        else:
            widths = [weight.shape[0] for weight in weights]
            made = self.linear(x, *_side_by_side(name, weights, biases)).split(widths, -1)
        if not any(later):
            return made
        return tuple(
            reduce(lambda y, one: one(x, y), found, y) for y, found in zip(made, later, strict=True)
        )

    def _reads_in_place(self, x: Tensor, weights: list[Tensor]) -> bool:
        """True if a CPU multiplies with these weights as they are, without gradients and conversion."""
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        records = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        return not records and all(
            flags.kind_of(weight) is None and weight.dtype == x.dtype for weight in weights
        )

    def affine_of(self, layer: Any, *operands: Tensor) -> tuple[Tensor, Any] | None:
        """Weight and bias of a layer with merged adapters; None where adapters run separately."""
        packed = packed_weight((layer,), self.backend, *operands)
        if packed is not None:
            return packed, layer.bias
        base = adapters.base_layer(layer)
        weight, bias = base.weight, base.bias
        if base is not layer and (found := adapters.additions(layer)):
            merged = adapters.added(weight, bias, found)
            if merged is None:
                return None
            weight, bias = merged
        return self.affine(weight, bias)

    def activated(self, x: Tensor, dense: Any, activation: Any) -> Tensor:
        """`activation(dense(x))`, in one pass for erf GELU; adapters included."""
        x = self.operand(x)
        affine = self.affine_of(dense, x) if is_erf_gelu(activation) else None
        if affine is not None:
            return ops.linear_gelu(x, *affine, backend=self.backend)
        return activation(self.products("", x, dense)[0])

    def rounded_mlp(self, x: Tensor, first: Any, second: Any, norm: Any) -> Tensor | None:
        """`norm(x + second(gelu(first(x))))` as one int8 op, which rounds the hidden layer finer; None if not int8."""
        layers = (first, second)
        if norm.bias is None or any(adapters.base_layer(layer) is not layer for layer in layers):
            return None
        # The property `weight` of a frozen layer would unpack it.
        weights, biases = (
            [layer._parameters.get("weight") for layer in layers],
            [layer.bias for layer in layers],
        )
        if any(flags.kind_of(weight) != "int8" for weight in weights):
            return None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return None
        rows = x
        if any(bias is not None and bias.dtype != x.dtype for bias in biases):
            rows, biases = self.operand(x), [self.parameter(bias) for bias in biases]
        summed = ops.mlp_residual(
            rows, weights[0], biases[0], weights[1], biases[1], x, backend=self.backend
        )
        scale, shift = (t.to(summed.dtype) for t in (norm.weight, norm.bias))
        return ops.layer_norm(summed, scale, shift, norm.eps, backend=self.backend)

    @contextmanager
    def own_types(self, device: torch.device) -> Iterator[Settings]:
        """Disable autocast where fused modules convert themselves, which is faster without gradients."""
        if self.dtype is None or torch.is_grad_enabled():
            yield self
            return
        with torch.autocast(device.type, enabled=False):
            yield self


def _side_by_side(
    name: str, weights: list[Tensor], biases: list[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Concatenated weights and biases of several layers; cached under the name without gradients."""

    def joined() -> tuple[Tensor, Tensor | None]:
        return flags.concatenate(weights), side_by_side(
            biases, [weight.shape[0] for weight in weights]
        )

    sources = (*weights, *(bias for bias in biases if bias is not None))
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return joined()
    return cached(name, sources, joined)


def side_by_side(biases: list[Tensor | None], widths: list[int]) -> Tensor | None:
    """Concatenated biases, zeros for a layer without one; None if no layer has one."""
    given = [bias for bias in biases if bias is not None]
    if len(biases) == 1 or not given:
        return biases[0]
    return torch.cat(
        [given[0].new_zeros(m) if b is None else b for b, m in zip(biases, widths, strict=True)]
    )


_counters: list[Counter[nn.Module]] = []


@contextmanager
def counted() -> Iterator[Counter[nn.Module]]:
    """Context manager: the calls inside that each fused module computes itself, by module."""
    counter: Counter[nn.Module] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters[:] = [other for other in _counters if other is not counter]


class Fused(nn.Module):
    """Base of fused forms. Subclasses define `forward`; they `count` a call, or decline it by `super().forward`."""

    benefit: ClassVar[str] = ""  # what the form saves, in a few words
    replaces: ClassVar[tuple[str | type[nn.Module], ...]] = ()  # classes, or their `short_name`
    # submodules that are read without being called: dotted name → expected class
    bypassed: ClassVar[Mapping[str, Kinds]] = {}
    joint: ClassVar[
        tuple[tuple[str, ...], ...]
    ] = ()  # names of linear layers on one input, computed by one GEMM
    multiplies_in_eight_bits: ClassVar[bool] = (
        True  # dtype="int8" and "fp8" apply to its linear layers
    )

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Class attributes that depend on the original class, computed once per class."""
        return {}

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        """True if the form is for a module."""
        kind = original_class(module)
        return kind in cls.replaces or short_name(kind) in cls.replaces

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        """Why a recognised module must not be replaced; None if it may."""
        return None

    @property
    def settings(self) -> Settings:
        return self.__dict__[_SETTINGS]

    def intact(self) -> bool:
        """True if no bypassed submodule was exchanged, hooked, adapted, quantised or parametrised since the swap.

        False within a trace, which records the original.
        """
        if torch.compiler.is_compiling():
            # A compiler cannot trace weak references, and consumers of exported graphs recognise the original.
            return (
                not torch.compiler.is_exporting()
                and why_not_bypassed(self, type(self).bypassed) is None
            )
        if traced():
            return False
        return _unchanged(self) or why_not_bypassed(self, type(self).bypassed) is None

    def count(self) -> None:
        """Count a call that the fused form computes, for `verify`."""
        for counter in _counters:
            counter[self] += 1

    def declines(self) -> str | None:
        """Why calls run the original now, regardless of arguments; None if they do not."""
        return why_not_bypassed(self, type(self).bypassed)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        with flags.keep_fp8_flags(self):
            return super()._apply(fn, recurse)

    def release(self) -> None:
        """Release derived state just before the original class is restored."""
        for name in type(self).bypassed:
            part = find(self, name)
            if part is not None:
                flags.unmark(part._parameters.values())

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is created at runtime and cannot be pickled by name.
        return _restored, (fused_form(self), original_class(self)), self.__dict__


class CalledByName(Fused):
    """A fused form that reads call arguments by name, positional ones included."""

    names: ClassVar[tuple[str, ...]] = ()  # positional arguments of the original forward

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        parameters = list(inspect.signature(original.forward).parameters.values())[1:]
        by_position = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
        return {"names": tuple(p.name for p in parameters if p.kind in by_position)}

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a `forward` call by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def swap(module: nn.Module, fused: type[Fused], settings: Settings) -> None:
    """Switch a module to its fused class."""
    if _own_forward_left_behind(module):
        del module.__dict__["forward"]
    module.__class__ = _combined(fused, type(module))
    module.__dict__[_SETTINGS] = settings


def restore(module: nn.Module) -> None:
    """Switch a module back to its original class."""
    if _own_forward_left_behind(module):
        del module.__dict__["forward"]
    original = original_class(module)
    if isinstance(module, Fused):
        module.release()
    object.__setattr__(module, "__class__", original)
    del module.__dict__[_SETTINGS]


@cache
def _combined(fused: type[Fused], original: type[nn.Module]) -> type[nn.Module]:
    # Error messages and reprs show the original name.
    named = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    forward = fused.forward
    if isinstance(forward, FunctionType) and forward is not nn.Module.forward:
        # Trainers read column names from the signature of forward, so every class needs its own function.
        own = FunctionType(
            forward.__code__,
            forward.__globals__,
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        own.__kwdefaults__ = forward.__kwdefaults__
        named["forward"] = wraps(original.forward)(own)
    return type(original.__name__, (fused, original), named | fused.adapted(original))


def _restored(fused: type[Fused], original: type[nn.Module]) -> nn.Module:
    made = _combined(fused, original)
    return made.__new__(made)


def why_not_bypassed(module: nn.Module, expected: Mapping[str, Kinds]) -> str | None:
    """Why submodules must be called instead of read; None if they may be read."""
    if any(getattr(module_internals, hooks) for hooks in _GLOBAL_HOOKS):
        return "global module hooks are installed"
    for name, kinds in expected.items():
        part = find(module, name)
        if part is None:
            continue
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if nn.Module not in kinds and original_class(part) not in kinds:
            if adapters.Adaptable not in kinds or not adapters.is_adapted(part):
                own = original_class(part)
                same_name = any(own.__name__ == kind.__name__ for kind in kinds)
                return f"{name} is a {f'{own.__module__}.' if same_name else ''}{own.__name__}"
            reason = adapters.why_not(part)
            if reason is None and any(observed(called) for called in adapters.parts_called(part)):
                reason = "has hooks inside"
            if reason is not None:
                return f"{name} {reason}"
        if observed(part):
            return f"{name} has hooks"
    return None


# Snapshot of the parts of each intact fused module: (parent's _modules, name, part, class, part's __dict__).
# Comparing it is much cheaper than looking up every part by name, which matters for short texts.
_seen: weakref.WeakKeyDictionary[
    nn.Module, list[tuple[dict[str, Any], str, Any, Any, dict[str, Any]]]
]
_seen = weakref.WeakKeyDictionary()


def _unchanged(module: Fused) -> bool:
    """True if a module was intact before and no part was exchanged or hooked since."""
    links = _seen.get(module)
    if links is None:
        return _remember(module)
    if any(getattr(module_internals, hooks) for hooks in _GLOBAL_HOOKS):
        return False
    for parent, name, part, kind, own in links:
        if parent.get(name) is not part:
            break
        if part is None:
            continue
        if type(part) is not kind or "forward" in own:
            break
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            break
    else:
        return True
    del _seen[module]
    return False


def links(module: nn.Module) -> Any:
    """Identity token of an intact module's parts: a new object after any part changes; None if unknown."""
    return _seen.get(module)


def _remember(module: Fused) -> bool:
    """Cache the parts of an intact module, unless adapters or hooks need a look at each call."""
    expected = type(module).bypassed
    if why_not_bypassed(module, expected) is not None:
        return False
    links = {}
    for name in expected:
        parent: Any = module
        for step in name.split("."):
            part = parent._modules.get(step)
            links[id(parent), step] = (
                parent._modules,
                step,
                part,
                type(part),
                {} if part is None else part.__dict__,
            )
            if part is None:
                break
            parent = part
    parts = [part for _, _, part, _, _ in links.values() if part is not None]
    if not any(
        adapters.is_adapted(p) or observed(p) or any(getattr(p, name) for name in _HOOKS)
        for p in parts
    ):
        _seen[module] = list(links.values())
    return True


def observed(module: nn.Module) -> bool:
    """True if a module must be called: it has hooks or a `forward` on the instance."""
    if forward_replaced(module):
        return True
    return any(not _idle(hook) for name in _HOOKS for hook in getattr(module, name).values())


def forward_replaced(module: nn.Module) -> bool:
    """True if a `forward` on the instance hides that of its class."""
    return "forward" in module.__dict__ and not _own_forward_left_behind(module)


def forward_patched(kind: type[nn.Module]) -> bool:
    """Return whether the forward of a class comes from elsewhere: assigned to the class, or wrapped around its own."""
    function: Any = kind.forward
    if function is nn.Module.forward:
        return False
    bases = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    libraries = {base.__module__.partition(".")[0] for base in bases}
    while True:
        # `functools.wraps` copies names, but not the globals; a library may decorate with functions of its own.
        module = getattr(function, "__globals__", {}).get("__name__", "builtins")
        if module.partition(".")[0] not in libraries:
            return True
        if not hasattr(function, "__wrapped__"):
            owner = (module, function.__qualname__.rpartition(".")[0])
            return owner not in [(base.__module__, base.__qualname__) for base in bases]
        function = function.__wrapped__


def _own_forward_left_behind(module: nn.Module) -> bool:
    """True if the instance stores its class's own forward, a leftover of output recording in transformers 4."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward


def _idle(hook: Any) -> bool:
    """True for hooks that transformers leaves after a call with `output_attentions`."""
    if getattr(hook, "__module__", None) != _CAPTURING:
        return False
    collected = sys.modules[_CAPTURING]._active_collector.get()
    kept = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
    return collected is None or kept["key"].cell_contents not in collected


def find(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule of a dotted name, or None."""
    found: Any = module
    for step in name.split("."):
        found = found._modules.get(step) if isinstance(found, nn.Module) else None
    return found


def probability(dropout: nn.Module) -> float:
    """The probability of a dropout module in its current mode."""
    return dropout.p if dropout.training else 0.0  # pyright: ignore[reportReturnType]


def is_fused(module: nn.Module) -> bool:
    """True if a module has its fused class."""
    return isinstance(module, Fused)


def has_other_arguments(call: Mapping[str, Any], understood: Collection[str]) -> bool:
    """True if a call sets an argument that is not in `understood`."""
    given = [name for name, value in call.items() if value is not None and value is not False]
    return not set(given).issubset(understood)


def returns_dict(model: Any, call: dict[str, Any]) -> bool:
    """True if a call returns a named output instead of a tuple."""
    asked = call.get("return_dict")
    return getattr(model.config, "return_dict", True) if asked is None else asked


def is_erf_gelu(activation: Any) -> bool:
    """True for erf GELU: PyTorch's function or module, or the wrapper of transformers."""
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    kind = type(activation)
    if kind.__module__.startswith("timm.layers."):
        return kind.__name__ == "GELU"
    # GELUActivation stores the function that it calls.
    return activation is F.gelu or (kind.__name__ == "GELUActivation" and activation.act is F.gelu)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was fused."""
    return type(module).__bases__[1] if is_fused(module) else type(module)


def short_name(kind: type[nn.Module]) -> str:
    """`package.Class` of a class of `transformers.models.package` or open_clip; empty for others."""
    package = kind.__module__.split(".")
    if package[:2] == ["transformers", "models"] and len(package) > 2:
        return f"{package[2]}.{kind.__name__}"
    return f"open_clip.{kind.__name__}" if package[0] == "open_clip" else ""


def fused_form(module: nn.Module) -> type[Fused]:
    """The fused class of a fused module."""
    assert isinstance(module, Fused)
    return type(module).__bases__[0]
