"""A live module becomes a fused one by changing its class, so it stays the very same object.

Parameters, buffers, hooks, optimizers, wrappers and state-dict keys cannot notice: nothing moves. The new class derives
from the fused one and from the original, which is therefore still there as `super().forward` for every call that the
fused computation does not cover. (PyTorch's `fully_shard` changes classes in the same way.)
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, reduce, wraps
from importlib import import_module
from types import FunctionType
from typing import Any, ClassVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_internals

from xfm_fast.kernels import marked, ops
from xfm_fast.kernels.backend import Backend
from xfm_fast.kernels.derived import derived
from xfm_fast.replace import adapters
from xfm_fast.replace.packed_weight import pack_of

Kinds = type[nn.Module] | tuple[type[nn.Module], ...]
# Relative to the largest value of an output. Rounding differs wherever a sum is taken in another order.
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
    """The wishes of the caller of `accelerate`, as every fused module reads them.

    Attributes:
        kernels: the backend of every op; "auto" chooses for the device.
        dtype: compute in this type whatever the parameters are stored in; None keeps the types of the inputs.
        unpad: leave padding out of whole encoders; their outputs are zero there.
        skip_logits: masked-language heads in training return no logits when they are given labels.
        eight_bits: in which 8 bits products of blocks run.
    """

    kernels: Backend = "auto"
    dtype: torch.dtype | None = None
    unpad: bool = False
    skip_logits: bool = False
    eight_bits: marked.EightBits | None = None

    @property
    def backend(self) -> Backend | None:
        """The backend as the ops take it: None leaves the choice to the device and to `use_backend`."""
        return None if self.kernels == "auto" else self.kernels

    def operand(self, value: Tensor) -> Tensor:
        """An activation in the type that is computed in."""
        return value if self.dtype is None or not value.is_floating_point() else value.to(self.dtype)

    @overload
    def parameter(self, value: Tensor) -> Tensor: ...
    @overload
    def parameter(self, value: Tensor | None) -> Tensor | None: ...
    def parameter(self, value: Tensor | None) -> Tensor | None:
        """A parameter in the type that is computed in; without gradients the conversion is done once and kept."""
        if value is None or self.dtype is None or value.dtype == self.dtype:
            return value
        if value.ndim > 1 and marked.kind_of(value) is not None:
            return value  # rounded as it is stored
        if torch.is_grad_enabled() and value.requires_grad:
            return value.to(self.dtype)
        dtype = self.dtype
        return derived(f"as {dtype}", (value,), lambda: marked.alike(value.detach().to(dtype), value))

    def affine(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Any]:
        """Weight and bias of a product or norm, each as `parameter` gives it; no bias stays None."""
        return self.parameter(weight), self.parameter(bias)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x Wᵀ + b` in the type that is computed in."""
        return ops.linear(self.operand(x), *self.affine(weight, bias), backend=self.backend)

    def products(self, name: str, x: Tensor, *layers: Any, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        """The products of x `[..., K]` with layers of one input, `[..., M]` each, by one product; adapters included.

        Args:
            name: of the weights side by side, which are kept under it.
            bias: of a single layer that has none, kept elsewhere.
        """
        packed = pack_of(layers)
        if packed is not None:
            biases = [layer.bias if bias is None else bias for layer in layers]
            shift = biases[0] if len(layers) == 1 else side_by_side(biases, packed.sizes)
            together = packed.linear(self.operand(x), shift)
            return (together,) if len(layers) == 1 else together.split(packed.sizes, -1)
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
        if len(layers) == 1:
            made: tuple[Tensor, ...] = (self.linear(x, weights[0], biases[0]),)
        else:
            widths = [weight.shape[0] for weight in weights]
            made = self.linear(x, *_side_by_side(name, weights, biases)).split(widths, -1)
        if not any(later):
            return made
        x = self.operand(x)
        return tuple(reduce(lambda y, one: one(x, y), found, y) for y, found in zip(made, later, strict=True))

    def affine_of(self, layer: Any) -> tuple[Tensor, Any] | None:
        """Weight and bias of a layer with its adapters added; None where these have to be computed apart."""
        base = adapters.base_layer(layer)
        weight, bias = base.weight, base.bias
        if base is not layer and (found := adapters.additions(layer)):
            merged = adapters.added(weight, bias, found)
            if merged is None:
                return None
            weight, bias = merged
        return self.affine(weight, bias)

    def activated(self, x: Tensor, dense: Any, activation: Any) -> Tensor:
        """`activation(dense(x))`, in one pass where the activation is the erf form of GELU; adapters included."""
        erf_gelu = is_erf_gelu(activation)
        packed = pack_of((dense,)) if erf_gelu else None
        if packed is not None:
            return packed.linear(self.operand(x), dense.bias, gelu=True)
        affine = self.affine_of(dense) if erf_gelu else None
        if affine is not None:
            return ops.linear_gelu(self.operand(x), *affine, backend=self.backend)
        return activation(self.products("", x, dense)[0])

    def closed(
        self, x: Tensor, dense: Any, norm: Any, residual: Tensor, *, dropout_p: float = 0.0, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The end of a branch and the norm behind it: of `residual + dropout(dense(x))`; adapters included.

        Returns:
            (normed, summed), both `[..., M]`.
        """
        packed = pack_of((dense,))
        if packed is not None and not dropout_p:
            summed = packed.residual(self.operand(x), dense.bias, residual)
            return ops.layer_norm(summed, norm.weight, norm.bias, norm.eps, backend=self.backend), summed
        affine, scale = self.affine_of(dense), (norm.weight, norm.bias, norm.eps)
        after: dict[str, Any] = {"dropout_p": dropout_p, "wide": wide, "backend": self.backend}
        if affine is None:
            return ops.add_layer_norm(self.products("", x, dense)[0], residual, *scale, **after)
        return ops.linear_add_layer_norm(self.operand(x), *affine, residual, *scale, **after)

    def rounded_mlp(self, x: Tensor, first: Any, activation: Any, second: Any, norm: Any) -> Tensor | None:
        """`norm(x + second(gelu(first(x))))` where both products run in int8; None where they do not.

        In one piece, since a hidden layer that is known to be one is rounded to finer levels.
        """
        layers = (first, second)
        if (
            norm.bias is None
            or not is_erf_gelu(activation)
            or any(adapters.base_layer(layer) is not layer for layer in layers)
        ):
            return None
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        if any(marked.kind_of(weight) != "int8" for weight in weights):
            return None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return None
        rows = x
        if any(bias is not None and bias.dtype != x.dtype for bias in biases):
            rows, biases = self.operand(x), [self.parameter(bias) for bias in biases]
        summed = ops.mlp_residual(rows, weights[0], biases[0], weights[1], biases[1], x, backend=self.backend)
        scale, shift = (t.to(summed.dtype) for t in (norm.weight, norm.bias))
        return ops.layer_norm(summed, scale, shift, norm.eps, backend=self.backend)

    @contextmanager
    def own_types(self, device: torch.device) -> Iterator[None]:
        """Fused modules choose their types themselves: without gradients that is quicker than autocast."""
        if self.dtype is None or torch.is_grad_enabled():
            yield
            return
        with torch.autocast(device.type, enabled=False):
            yield


def _side_by_side(name: str, weights: list[Tensor], biases: list[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of several layers as those of one; kept under the name where no gradient is wanted."""

    def joined() -> tuple[Tensor, Tensor | None]:
        return marked.side_by_side(weights), side_by_side(biases, [weight.shape[0] for weight in weights])

    sources = (*weights, *(bias for bias in biases if bias is not None))
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return joined()
    return derived(name, sources, joined)


def side_by_side(biases: list[Tensor | None], widths: list[int]) -> Tensor | None:
    """Biases of several layers as one, zeros for a layer without; None if none has one."""
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    return torch.cat([given[0].new_zeros(m) if b is None else b for b, m in zip(biases, widths, strict=True)])


class Fused(nn.Module):
    """Base of the fused forms of foreign modules. Subclasses define `forward`, and call `super().forward` to decline.

    Attributes:
        bypassed: submodules whose parameters the fused computation reads without calling them, by dotted name, with
            the class that it takes each for (nn.Module: any). Where one of them is missing, it is ignored.
        joint: linear layers of one input, by the same names, that are multiplied together by `Settings.products`.
        multiplies_in_eight_bits: whether dtype="int8" and "fp8" of `accelerate` concern its linear layers.
    """

    bypassed: ClassVar[Mapping[str, Kinds]] = {}
    joint: ClassVar[tuple[tuple[str, ...], ...]] = ()
    multiplies_in_eight_bits: ClassVar[bool] = True

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Class attributes that depend on the class being fused: made once for it."""
        return {}

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        """The reason why a module that a rule recognises must stay as it is; None if it need not."""
        return None

    @property
    def settings(self) -> Settings:
        return self.__dict__[_SETTINGS]

    def intact(self) -> bool:
        """True if the bypassed submodules still are what they were taken for, and nothing observes them.

        A hook, adapter, quantised layer or parametrization on one of them must go on working, so the original forward
        runs then.
        """
        if torch.compiler.is_exporting():
            # The original is what consumers of exported graphs recognise and fuse.
            return False
        # A compiler looks once, and not into weak references.
        seen = not torch.compiler.is_compiling() and _unchanged(self)
        return seen or why_not_bypassed(self, type(self).bypassed) is None

    def declines(self) -> str | None:
        """The reason why calls run the original just now, whatever they ask for; None if they need not."""
        return why_not_bypassed(self, type(self).bypassed)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        with marked.following(self):
            return super()._apply(fn, recurse)

    def release(self) -> None:
        """Give up what the module holds because it is fused, just before it has its own class again."""
        for name in type(self).bypassed:
            part = find(self, name)
            if part is not None:
                marked.unmark(part._parameters.values())

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made here and cannot be looked up by name, so it is made again.
        return _restored, (fused_form(self), original_class(self)), self.__dict__


class CalledByName(Fused):
    """A fused form that looks at the arguments of a call by name, whichever way they were given.

    Attributes:
        names: of the arguments of the original's forward that can be given by position.
    """

    names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        parameters = list(inspect.signature(original.forward).parameters.values())[1:]
        by_position = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
        return {"names": tuple(p.name for p in parameters if p.kind in by_position)}

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call to `forward` by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def swap(module: nn.Module, fused: type[Fused], settings: Settings) -> None:
    """Give a module its fused form."""
    if _own_forward_left_behind(module):
        del module.__dict__["forward"]
    module.__class__ = _combined(fused, type(module))
    module.__dict__[_SETTINGS] = settings


def restore(module: nn.Module) -> None:
    """Give a module its own class back."""
    if _own_forward_left_behind(module):
        del module.__dict__["forward"]
    original = original_class(module)
    if isinstance(module, Fused):
        module.release()
    object.__setattr__(module, "__class__", original)
    del module.__dict__[_SETTINGS]


@cache
def _combined(fused: type[Fused], original: type[nn.Module]) -> type[nn.Module]:
    # Messages and reprs should go on naming the class that people know.
    named = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    forward = fused.forward
    if isinstance(forward, FunctionType) and forward is not nn.Module.forward:
        # Trainers read the names of a batch's columns from the signature, so every class needs a function of its own.
        own = FunctionType(
            forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
        )
        own.__kwdefaults__ = forward.__kwdefaults__
        named["forward"] = wraps(original.forward)(own)
    return type(original.__name__, (fused, original), named | fused.adapted(original))


def _restored(fused: type[Fused], original: type[nn.Module]) -> nn.Module:
    made = _combined(fused, original)
    return made.__new__(made)


def why_not_bypassed(module: nn.Module, expected: Mapping[str, Kinds]) -> str | None:
    """The reason why the parts of a module must be called and cannot be computed around; None if they can."""
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
                alike = any(own.__name__ == kind.__name__ for kind in kinds)
                return f"{name} is a {f'{own.__module__}.' if alike else ''}{own.__name__}"
            reason = adapters.why_not(part)
            if reason is None and any(observed(called) for called in adapters.parts_called(part)):
                reason = "has hooks inside"
            if reason is not None:
                return f"{name} {reason}"
        if observed(part):
            return f"{name} has hooks"
    return None


# Of each fused module, as it was when last found intact: where its parts hang, what they were, their own attributes.
# To compare these takes a few percent of the time of looking at every part by its name, which a short text would feel.
_seen: weakref.WeakKeyDictionary[nn.Module, list[tuple[dict[str, Any], str, Any, Any, dict[str, Any]]]]
_seen = weakref.WeakKeyDictionary()


def _unchanged(module: Fused) -> bool:
    """True if a module was found intact before and none of its parts was exchanged or observed since."""
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
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            break
    else:
        return True
    del _seen[module]
    return False


def links(module: nn.Module) -> Any:
    """What stands for the parts of a module that was found intact, another object once one was exchanged or observed.

    None where it is not known without looking at every part.
    """
    return _seen.get(module)


def _remember(module: Fused) -> bool:
    """Note the parts of a module that is intact, if each is of a class that is known without looking inside."""
    expected = type(module).bypassed
    if why_not_bypassed(module, expected) is not None:
        return False
    links = {}
    for name in expected:
        parent: Any = module
        for step in name.split("."):
            part = parent._modules.get(step)
            links[id(parent), step] = (parent._modules, step, part, type(part), {} if part is None else part.__dict__)
            if part is None:
                break
            parent = part
    parts = [part for _, _, part, _, _ in links.values() if part is not None]
    if not any(adapters.is_adapted(p) or observed(p) or _hooks(p) for p in parts):
        _seen[module] = list(links.values())
    return True


def _hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def observed(module: nn.Module) -> bool:
    """True if something relies on this module being called: hooks, or a `forward` put on the instance."""
    if forward_replaced(module):
        return True
    return any(not _idle(hook) for name in _HOOKS for hook in getattr(module, name).values())


def forward_replaced(module: nn.Module) -> bool:
    """True if a `forward` on the instance hides that of its class."""
    return "forward" in module.__dict__ and not _own_forward_left_behind(module)


def _own_forward_left_behind(module: nn.Module) -> bool:
    """True if the instance holds its class's own forward, as transformers 4 leaves it after outputs were recorded."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward


def _idle(hook: Any) -> bool:
    """True for hooks that transformers leaves behind after `output_attentions` was asked for once."""
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
    """The probability of a dropout module in its present mode."""
    return dropout.p if dropout.training else 0.0  # pyright: ignore[reportReturnType]


def is_fused(module: nn.Module) -> bool:
    """True if a module is in its fused form."""
    return isinstance(module, Fused)


def asks_beyond(call: Mapping[str, Any], understood: Collection[str]) -> bool:
    """True if a call has an argument that says something beside those that are understood."""
    return any(value is not None and value is not False and name not in understood for name, value in call.items())


def wants_named(model: Any, call: dict[str, Any]) -> bool:
    """True if a call asks for outputs by name rather than as a tuple."""
    asked = call.get("return_dict")
    return getattr(model.config, "return_dict", True) if asked is None else asked


def is_erf_gelu(activation: Any) -> bool:
    """True for the erf form of GELU: PyTorch's function or module, or transformers' wrapper of it."""
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    # GELUActivation calls the function that it keeps here.
    return activation is F.gelu or (type(activation).__name__ == "GELUActivation" and activation.act is F.gelu)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was fused."""
    return type(module).__bases__[1] if is_fused(module) else type(module)


def fused_form(module: nn.Module) -> type[Fused]:
    """The fused form that a module has."""
    assert isinstance(module, Fused)
    return type(module).__bases__[0]


# Families in the order in which they are asked; each module has a tuple RULES. The package named second must be
# imported already for the family to be looked at: no model of it can exist otherwise.
_FAMILIES = (
    ("xfm_fast.replace.huggingface_text", "transformers"),
    ("xfm_fast.replace.huggingface_families", "transformers"),
    ("xfm_fast.replace.families", None),
    ("xfm_fast.replace.clip_text", None),
    ("xfm_fast.replace.timm_vision", "timm"),
    ("xfm_fast.replace.open_clip_towers", "open_clip"),
    ("xfm_fast.replace.official", None),
    ("xfm_fast.replace.torch_modules", None),
)


@dataclass(frozen=True)
class Rule:
    """One kind of foreign module and its fused form.

    Attributes:
        name: what the fused form is called in the report.
        recognises: whether a module is of the kind, by class or by structure.
        fused: the fused form.
        gain: what is saved, in a few words.
        refusal: why a module of the kind must stay as it is, in place of what the fused form says about that.
    """

    name: str
    recognises: Callable[[nn.Module], bool]
    fused: type[Fused]
    gain: str
    refusal: Callable[[nn.Module, Settings], str | None] | None = None

    def reason_against(self, module: nn.Module, settings: Settings) -> str | None:
        """The reason why a module of the kind must stay as it is; None if it need not."""
        return (self.refusal or self.fused.refusal)(module, settings)


def rules() -> tuple[Rule, ...]:
    """All rules whose packages are in use."""
    families = [name for name, package in _FAMILIES if package is None or package in sys.modules]
    return tuple(rule for name in families for rule in import_module(name).RULES)
