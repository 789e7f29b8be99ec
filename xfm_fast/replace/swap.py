"""Swap the class of a live module for a fused one; the object stays the same.

Parameters, buffers, hooks, optimizers, wrappers and state-dict keys are unaffected. The new class
derives from the fused one and the original, so `super().forward` handles every call that the fused
form does not cover. (PyTorch's `fully_shard` swaps classes in the same way.)
"""

from __future__ import annotations

import inspect
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_internals

from xfm_fast.kernels import flags, ops
from xfm_fast.kernels.backend import Backend, traced
from xfm_fast.kernels.caching import cached
from xfm_fast.models.frozen import packed_weight
from xfm_fast.plans.plan import GLOBAL_HOOKS, HOOKS
from xfm_fast.replace import adapters

if TYPE_CHECKING:
    from xfm_fast.kernels.cpu.llvm.activation import Activation

ModuleClasses = type[nn.Module] | tuple[type[nn.Module], ...]
# Accepted differences by dtype, relative to the largest value of an output: summation order changes
# rounding.
BANDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}
_LIBRARIES = ("open_clip", "sentence_transformers")
# Activations of these modules that our kernel computes, by class.
_ACTIVATIONS = ("transformers.activations", "timm.layers.activations", "open_clip.transformer")
_KERNELS: dict[str, Activation] = {
    "GELUTanh": "tanh_gelu",
    "NewGELUActivation": "tanh_gelu",
    "FastGELUActivation": "tanh_gelu",
    "QuickGELUActivation": "quick_gelu",
    "QuickGELU": "quick_gelu",
    "SiLUActivation": "silu",
}
_SETTINGS = "_xfm_fast"
_CAPTURING = "transformers.utils.output_capturing"


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
        """Backend of the ops; None leaves the choice to the device and `use_backend`."""
        return None if self.kernels == "auto" else self.kernels

    def operand(self, value: Tensor) -> Tensor:
        """Convert an activation to the compute dtype."""
        if self.dtype is None or not value.is_floating_point():
            return value
        return value.to(self.dtype)

    @overload
    def parameter(self, value: Tensor) -> Tensor: ...
    @overload
    def parameter(self, value: Tensor | None) -> Tensor | None: ...
    def parameter(self, value: Tensor | None) -> Tensor | None:
        """Convert a parameter to the compute dtype; without gradients, the result is cached."""
        if value is None or self.dtype is None or value.dtype == self.dtype:
            return value
        if value.ndim > 1 and flags.kind_of(value) is not None:
            return value  # the ops round it from its storage dtype
        if torch.is_grad_enabled() and value.requires_grad:
            return value.to(self.dtype)
        dtype = self.dtype
        return cached(
            f"as {dtype}", (value,), lambda: flags.copy_flag(value.detach().to(dtype), value)
        )

    def affine(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
        """Convert weight and bias to the compute dtype."""
        return self.parameter(weight), self.parameter(bias)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute `x Wᵀ + b` in the compute dtype."""
        return ops.linear(self.operand(x), *self.affine(weight, bias), backend=self.backend)

    def linears(
        self, name: str, x: Tensor, *layers: Any, bias: Tensor | None = None
    ) -> Sequence[Tensor]:
        """Apply linear layers and their adapters to one input x `[..., K]`: `[..., M]` each.

        They run as one GEMM, unless a CPU would need a copy of the weights for that alone.

        Args:
            name: Cache key of the concatenated weights.
            bias: Bias of a single layer, stored outside it.
        """
        x = self.operand(x)
        packed = packed_weight(layers, self.backend, x)
        if packed is not None:
            widths = [layer.out_features for layer in layers]
            biases = [layer.bias if bias is None else bias for layer in layers]
            shift = flags.concatenate_biases(biases, widths)
            return ops.linear(x, packed, shift, backend=self.backend).split(widths, -1)
        weights, biases = [], []
        unmerged: list[tuple[int, adapters.Addition]] = []
        for index, layer in enumerate(layers):
            base = adapters.base_layer(layer)
            affine = base.weight, base.bias if bias is None else bias
            additions = adapters.additions(layer) if layer is not base else []
            if additions:
                merged = adapters.merge(*affine, additions)
                if merged is None:
                    unmerged += ((index, addition) for addition in additions)
                affine = merged or affine
            weights.append(affine[0])
            biases.append(affine[1])
        if len(layers) == 1 or self._reads_in_place(x, weights):
            outputs = [self.linear(x, *affine) for affine in zip(weights, biases, strict=True)]
        else:
            widths = [weight.shape[0] for weight in weights]
            outputs = self.linear(x, *_concatenate(name, weights, biases)).split(widths, -1)
        if unmerged:
            outputs = [*outputs]
            for index, addition in unmerged:
                outputs[index] = addition(x, outputs[index])
        return outputs

    def _reads_in_place(self, x: Tensor, weights: list[Tensor]) -> bool:
        """Return whether a CPU reads these weights in place, without gradients and conversion."""
        if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return False
        return all(flags.kind_of(weight) is None and weight.dtype == x.dtype for weight in weights)

    def affine_of(self, layer: Any, *operands: Tensor) -> tuple[Tensor, Any] | None:
        """Return weight and bias with merged adapters; None if adapters run separately."""
        packed = packed_weight((layer,), self.backend, *operands)
        if packed is not None:
            return packed, layer.bias
        base = adapters.base_layer(layer)
        affine = base.weight, base.bias
        if base is not layer and (additions := adapters.additions(layer)):
            affine = adapters.merge(*affine, additions)
        return None if affine is None else self.affine(*affine)

    def activated(self, x: Tensor, dense: Any, activation: Any) -> Tensor:
        """Compute `activation(dense(x))`, in one pass for erf GELU; adapters included."""
        x = self.operand(x)
        affine = self.affine_of(dense, x) if is_erf_gelu(activation) else None
        if affine is not None:
            return ops.linear_gelu(x, *affine, backend=self.backend)
        return activation(self.linears("", x, dense)[0])

    def int8_mlp_norm(self, x: Tensor, fc1: Any, fc2: Any, norm: Any) -> Tensor | None:
        """Compute `norm(x + fc2(gelu(fc1(x))))` by the int8 op that rounds the hidden layer more finely.

        None if the layers do not run in int8, or take gradients or adapters.
        """
        layers = (fc1, fc2)
        if norm.bias is None or any(adapters.base_layer(layer) is not layer for layer in layers):
            return None
        # The property `weight` of a frozen layer would unpack it.
        weights = [layer._parameters.get("weight") for layer in layers]
        biases = [layer.bias for layer in layers]
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
        scale, shift = norm.weight.to(summed.dtype), norm.bias.to(summed.dtype)
        return ops.layer_norm(summed, scale, shift, norm.eps, backend=self.backend)

    @contextmanager
    def without_autocast(self, device: torch.device) -> Iterator[Settings]:
        """Disable autocast where fused modules convert faster themselves: without gradients."""
        if self.dtype is None or torch.is_grad_enabled():
            yield self
            return
        with torch.autocast(device.type, enabled=False):
            yield self


def _concatenate(
    name: str, weights: list[Tensor], biases: list[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Concatenate the weights and biases of layers; cached under a name without gradients."""

    def concatenate() -> tuple[Tensor, Tensor | None]:
        widths = [weight.shape[0] for weight in weights]
        return flags.concatenate(weights), flags.concatenate_biases(biases, widths)

    sources = (*weights, *(bias for bias in biases if bias is not None))
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return concatenate()
    return cached(name, sources, concatenate)


_counters: list[Counter[nn.Module]] = []


@contextmanager
def counted() -> Iterator[Counter[nn.Module]]:
    """Count the calls inside that each fused module computes itself."""
    counter: Counter[nn.Module] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        # By identity: equal counters compare equal.
        _counters[:] = [active for active in _counters if active is not counter]


def counting() -> bool:
    """Return whether calls are counted."""
    return bool(_counters)


class Fused(nn.Module):
    """Base of fused forms, whose `forward` must `count` a call or return `super().forward`."""

    benefit: ClassVar[str] = ""  # for the report: what the form saves
    replaces: ClassVar[tuple[str | type[nn.Module], ...]] = ()  # classes, or their `short_name`
    # submodules that are read without being called: dotted name → expected class
    bypassed: ClassVar[Mapping[str, ModuleClasses]] = {}
    # names of linear layers on one input, computed by one GEMM
    joint: ClassVar[tuple[tuple[str, ...], ...]] = ()
    # its linear layers are computed by it, and not only by fused forms inside
    computes: ClassVar[bool] = True
    # dtype="int8" and "fp8" apply to its linear layers
    multiplies_in_eight_bits: ClassVar[bool] = True

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Return the class attributes that depend on the original class; called once per class."""
        return {}

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Return whether the form is for a module."""
        original = original_class(module)
        return original in cls.replaces or short_name(original) in cls.replaces

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        """Return why a recognised module must not be replaced, or None."""
        return None

    @property
    def settings(self) -> Settings:
        return self.__dict__[_SETTINGS]

    def intact(self) -> bool:
        """Return whether all bypassed submodules are as at the swap: not exchanged, hooked, quantised or parametrised.

        False within a trace, which records the original.
        """
        if torch.compiler.is_compiling():
            # A compiler cannot trace weak references, and consumers of exported graphs recognise
            # the original.
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
        """Return why all calls run the original now, whatever their arguments, or None."""
        return why_not_bypassed(self, type(self).bypassed)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        with flags.keep_fp8_flags(self):
            return super()._apply(fn, recurse)

    def release(self) -> None:
        """Release derived state just before the original class is restored."""
        for name in type(self).bypassed:
            submodule = find(self, name)
            if submodule is not None:
                flags.unmark(submodule._parameters.values())

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is created at runtime and cannot be pickled by name.
        return _unpickle, (fused_form(self), original_class(self)), self.__dict__


class CalledByName(Fused):
    """Fused form that reads call arguments by name, positional ones included."""

    names: ClassVar[tuple[str, ...]] = ()  # positional arguments of the original forward

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        parameters = list(inspect.signature(original.forward).parameters.values())[1:]
        by_position = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
        return {"names": tuple(p.name for p in parameters if p.kind in by_position)}

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a `forward` call by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def swap(module: nn.Module, fused: type[Fused], settings: Settings) -> None:
    """Switch a module to its fused class."""
    if _stores_class_forward(module):
        del module.__dict__["forward"]
    module.__class__ = _combined(fused, type(module))
    module.__dict__[_SETTINGS] = settings


def restore(module: nn.Module) -> None:
    """Switch a module back to its original class."""
    if _stores_class_forward(module):
        del module.__dict__["forward"]
    original = original_class(module)
    if isinstance(module, Fused):
        module.release()
    object.__setattr__(module, "__class__", original)
    del module.__dict__[_SETTINGS]


@cache
def _combined(fused: type[Fused], original: type[nn.Module]) -> type[nn.Module]:
    """Create the class of a swapped module, which derives from both."""
    # Error messages and reprs show the original name.
    attributes = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    forward = fused.forward
    if isinstance(forward, FunctionType) and forward is not nn.Module.forward:
        # Trainers read column names from the signature of forward, so every class needs its own
        # function.
        copy = FunctionType(
            forward.__code__,
            forward.__globals__,
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        copy.__kwdefaults__ = forward.__kwdefaults__
        attributes["forward"] = wraps(original.forward)(copy)
    return type(original.__name__, (fused, original), attributes | fused.adapted(original))


def _unpickle(fused: type[Fused], original: type[nn.Module]) -> nn.Module:
    combined = _combined(fused, original)
    return combined.__new__(combined)


def why_not_bypassed(module: nn.Module, expected: Mapping[str, ModuleClasses]) -> str | None:
    """Return why submodules must be called instead of read, or None."""
    if any(getattr(module_internals, hooks) for hooks in GLOBAL_HOOKS):
        return "global module hooks are installed"
    for name, classes in expected.items():
        submodule = find(module, name)
        if submodule is None:
            continue
        classes = classes if isinstance(classes, tuple) else (classes,)
        original = original_class(submodule)
        if nn.Module not in classes and original not in classes:
            if adapters.Adaptable not in classes or not adapters.is_adapted(submodule):
                is_namesake = any(original.__name__ == expected.__name__ for expected in classes)
                package = f"{original.__module__}." if is_namesake else ""
                return f"{name} is a {package}{original.__name__}"
            reason = adapters.why_not(submodule)
            if reason is None and any(map(observed, adapters.called_modules(submodule))):
                reason = "has hooks inside"
            if reason is not None:
                return f"{name} {reason}"
        if observed(submodule):
            return f"{name} has hooks"
    return None


# Snapshots of the submodules of intact fused modules: (parent's _modules, name, submodule, class,
# submodule's __dict__). Comparing one is much cheaper than looking up every submodule by name,
# which matters for short texts.
_Links = list[tuple[dict[str, Any], str, Any, Any, dict[str, Any]]]
_links: weakref.WeakKeyDictionary[nn.Module, _Links] = weakref.WeakKeyDictionary()


def _unchanged(module: Fused) -> bool:
    """Return whether a module was intact before, and no submodule was exchanged or hooked since."""
    links = _links.get(module)
    if links is None:
        return _remember(module)
    if any(getattr(module_internals, hooks) for hooks in GLOBAL_HOOKS):
        return False
    for siblings, name, submodule, expected, state in links:
        if siblings.get(name) is not submodule:
            break
        if submodule is None:
            continue
        if type(submodule) is not expected or "forward" in state:
            break
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ):
            break
    else:
        return True
    del _links[module]
    return False


def links(module: nn.Module) -> Any:
    """Return an identity token of an intact module's submodules, new after any change, or None."""
    return _links.get(module)


def _remember(module: Fused) -> bool:
    """Return whether a module is intact; store its submodules unless they may change their hooks."""
    expected = type(module).bypassed
    if why_not_bypassed(module, expected) is not None:
        return False
    links = {}
    for name in expected:
        parent: Any = module
        for step in name.split("."):
            child = parent._modules.get(step)
            state = {} if child is None else child.__dict__
            links[id(parent), step] = parent._modules, step, child, type(child), state
            if child is None:
                break
            if adapters.is_adapted(child) or observed(child):
                return True
            if any(getattr(child, hooks) for hooks in HOOKS):
                return True
            parent = child
    _links[module] = list(links.values())
    return True


def observed(module: nn.Module) -> bool:
    """Return whether a module must be called: it has hooks, or a `forward` on the instance."""
    if forward_replaced(module):
        return True
    return any(not _is_idle(hook) for name in HOOKS for hook in getattr(module, name).values())


def forward_replaced(module: nn.Module) -> bool:
    """Return whether a `forward` on the instance hides that of its class."""
    return "forward" in module.__dict__ and not _stores_class_forward(module)


def forward_patched(original: type[nn.Module]) -> bool:
    """Return whether other code replaced or wrapped the forward of a class after the class was made."""
    function: Any = original.forward
    if function is nn.Module.forward:
        return False
    bases = [base for base in original.__mro__ if base not in (nn.Module, object)]
    wrappers = set()
    while hasattr(function, "__wrapped__"):
        wrappers.add(_package(function))
        function = function.__wrapped__
    module, owner = _module(function), function.__qualname__.rpartition(".")[0]
    if (module, owner) not in [(base.__module__, base.__qualname__) for base in bases]:
        return True
    libraries = {_package(base) for base in bases}
    return not all(
        package in libraries
        or any(_requires(library, package) for library in libraries)
        or any(package in _decorators(part) for part in (function, *bases))
        for package in wrappers
    )


def _module(function: Any) -> str:
    # `functools.wraps` copies names, but not the globals.
    names = getattr(function, "__globals__", {})
    return names.get("__name__") or function.__module__ or "builtins"


def _package(function: Any) -> str:
    return _module(function).partition(".")[0]


_providers = cache(packages_distributions)


@cache
def _requires(library: str, package: str) -> bool:
    """Return whether the distribution of a library cannot do without that of a package."""
    if _canonical(package) in _requirements(library):
        return True
    # Reading the names of all packages takes a third of a second.
    needed = set().union(*map(_requirements, _providers().get(library, ())))
    return not needed.isdisjoint(map(_canonical, _providers().get(package, ())))


def _requirements(distribution: str) -> set[str]:
    try:
        lines = [line for line in requires(distribution) or () if "extra ==" not in line]
    except PackageNotFoundError:
        return set()
    return {_canonical(re.split(r"[^\w.-]", line)[0]) for line in lines}


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@cache
def _decorators(part: Any) -> set[str]:
    """Return the packages of the decorators in the source of a class or function."""
    try:
        source = re.split(r"\b(?:class|def) ", inspect.getsource(part))[0]
    except (OSError, TypeError):
        return set()
    names = vars(sys.modules[_module(part)])
    found = [names.get(name) for name in re.findall(r"^\s*@(\w+)", source, re.MULTILINE)]
    modules = (getattr(each, "__module__", None) or getattr(each, "__name__", "") for each in found)
    return {module.partition(".")[0] for module in modules}


def _stores_class_forward(module: nn.Module) -> bool:
    """Return whether an instance stores its class's forward, as transformers 4 leaves it."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward


def _is_idle(hook: Any) -> bool:
    """Return whether transformers left a hook after a call with `output_attentions`."""
    if getattr(hook, "__module__", None) != _CAPTURING:
        return False
    collected = sys.modules[_CAPTURING]._active_collector.get()
    closure = dict(zip(hook.__code__.co_freevars, hook.__closure__, strict=True))
    return collected is None or closure["key"].cell_contents not in collected


def find(module: nn.Module, name: str) -> nn.Module | None:
    """Return the submodule of a dotted name, or None."""
    submodule: Any = module
    for step in name.split("."):
        if not isinstance(submodule, nn.Module):
            return None
        submodule = submodule._modules.get(step)
    return submodule


def is_fused(module: nn.Module) -> bool:
    """Return whether a module has its fused class."""
    return isinstance(module, Fused)


def has_other_arguments(call: Mapping[str, Any], understood: Collection[str]) -> bool:
    """Return whether a call sets an argument that is not in `understood`."""
    # A generator would be entered once for each argument.
    others = [name for name in call if name not in understood]
    return bool(others) and any(
        call[name] is not None and call[name] is not False for name in others
    )


def returns_dict(model: Any, call: dict[str, Any]) -> bool:
    """Return whether a call returns a named output instead of a tuple."""
    argument = call.get("return_dict")
    return getattr(model.config, "return_dict", True) if argument is None else argument


def is_erf_gelu(activation: Any) -> bool:
    """Return whether an activation is the erf GELU of PyTorch, transformers or timm."""
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    name = type(activation).__name__
    if type(activation).__module__.startswith("timm.layers."):
        return name == "GELU"
    # GELUActivation stores the function that it calls.
    return activation is F.gelu or (name == "GELUActivation" and activation.act is F.gelu)


def kernel_of(activation: Any) -> Activation | None:
    """Return the name of an activation of PyTorch, transformers or timm that our kernel computes, or None."""
    if is_erf_gelu(activation):
        return "gelu"
    if isinstance(activation, nn.GELU):
        return "tanh_gelu" if activation.approximate == "tanh" else None
    if activation in (F.silu, F.relu):
        return "silu" if activation is F.silu else "relu"
    if type(activation) in (nn.SiLU, nn.ReLU):
        return "silu" if type(activation) is nn.SiLU else "relu"
    kind = type(activation)
    return _KERNELS.get(kind.__name__) if kind.__module__ in _ACTIVATIONS else None


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module before it was fused."""
    return type(module).__bases__[1] if is_fused(module) else type(module)


def short_name(module_class: type[nn.Module]) -> str:
    """Return `package.Class` for a class of transformers or of the other libraries, "" for others."""
    name, package = module_class.__name__, module_class.__module__.split(".")
    if package[:2] == ["transformers", "models"] and len(package) > 2:
        return f"{package[2]}.{name}"
    return f"{package[0]}.{name}" if package[0] in _LIBRARIES else ""


def fused_form(module: nn.Module) -> type[Fused]:
    """Return the fused class of a fused module."""
    assert isinstance(module, Fused)
    return type(module).__bases__[0]
