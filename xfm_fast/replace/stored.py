"""Weights of fused blocks in another form: packed for a CPU (`freeze=True`), or computed in 8 bits (`dtype="int8"`).

Packed weights are no parameters, and `revert` restores them bit for bit. Unlike the layers of `XFM.freeze`, these may
be called or read by code that does not know of packing. 8-bit weights are flagged (see `kernels.flags`) and stay
parameters. Vocabulary heads (in 8 bits), embeddings and unfused modules keep theirs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NoReturn, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError
from xfm_fast.kernels import flags, fp8
from xfm_fast.kernels.backend import traced, untraced
from xfm_fast.kernels.cpu import gemm
from xfm_fast.kernels.flags import EightBits
from xfm_fast.models.frozen import (
    dense_weight,
    own_weights,
    owner_counts,
    pack,
    slot_of,
    stop_gradients,
    unpack,
)
from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.swap import Fused, Settings, find, restore, swap

_TRAINED = "_xfm_fast_trained"
_PACKED = (torch.float32, torch.bfloat16)
# What sets an attribute, or gives away the memory of a copy.
_MEMORY = ("__set__", "__setitem__", "storage", "untyped_storage", "data_ptr", "__dlpack__")


def _refuse(*_: Any) -> NoReturn:
    raise InputError(
        "the weight of this layer is frozen for inference, and a change would be lost; call report.revert() before it, "
        "and accelerate again after it"
    )


class _Weight(Tensor):
    """A copy of a frozen weight: results are ordinary tensors, views are as it is, and a write raises InputError."""

    itself: Any  # a weak reference: `torch.utils.swap_tensors` refuses tensors that have one
    set_: Any = _refuse  # PyTorch does not dispatch it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        in_place = (
            name.endswith("_") and not name.endswith("__") and args and isinstance(args[0], cls)
        )
        if name in _MEMORY or (in_place and (name, *args[1:]) != ("requires_grad_", False)):
            _refuse()
        with torch._C.DisableTorchFunctionSubclass():
            given = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, cls)]
            memory = {one.untyped_storage().data_ptr() for one in given}
            versions = [one._version for one in given]
            args, kwargs = pytree.tree_map_only(
                cls, lambda one: one.as_subclass(Tensor), (args, kwargs or {})
            )
            result = func(*args, **kwargs)
            # The counter knows of other writes (`out=`, lists of tensors). A gradient would be lost too.
            if [one._version for one in given] != versions or any(
                one.requires_grad for one in given
            ):
                _refuse()
            if isinstance(result, np.ndarray):
                result.flags.writeable = False

            def guarded(one: Tensor) -> Tensor:
                dense = one.layout == torch.strided
                return (
                    one.as_subclass(cls)
                    if dense and one.untyped_storage().data_ptr() in memory
                    else one
                )

            return pytree.tree_map_only(Tensor, guarded, result)


class _Parameters(dict[str, Any]):
    """The other parameters of a frozen layer: who takes its weight out, as `weight_norm`, would find none."""

    def __delitem__(self, name: str) -> None:
        if name not in self:
            _refuse()
        super().__delitem__(name)


class FrozenLinear(Fused):
    """`torch.nn.Linear` with a packed weight, which is no parameter; state dicts contain it.

    Moved to another dtype or device, the layer becomes an ordinary one again.
    """

    @property
    def weight(self) -> Tensor:
        """A copy `[M, K]`, which refuses writes."""
        # Only tensors of other modes count their writes.
        with torch.inference_mode(False), torch.no_grad():
            weight = dense_weight(self).clone().as_subclass(_Weight)
        weight.itself = weakref.ref(weight)
        return weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            _refuse()
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # What prunes or normalises a weight registers its parts.
        if name.startswith("weight"):
            _refuse()
        super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        if traced() or torch.compiler.is_exporting():
            with untraced():
                weight = dense_weight(self).clone()
            return F.linear(input, weight, cast(Any, self).bias)
        return self.settings.products("", input, self)[0]

    def release(self) -> None:
        self.__dict__["_parameters"] = {"weight": unpack(self), **self._parameters}
        for other in self.__dict__.pop(_TRAINED, ()):
            other.requires_grad_(True)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = dense_weight(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *rest: Any, **named: Any
    ) -> NoReturn:
        raise InputError(
            f"{prefix}weight is frozen for inference; call report.revert(), load, and accelerate again"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = torch.empty(0, dtype=slot_of(self).packed.dtype)
        moved = fn(probe)
        if (moved.dtype, moved.device) == (probe.dtype, probe.device):
            return super()._apply(fn, recurse)
        restore(self)
        return self._apply(fn, recurse)


def freeze(model: nn.Module, fused: Iterable[Fused], settings: Settings) -> list[FrozenLinear]:
    """Pack the linear weights of the fused forms in place and return their layers; no parameter takes gradients.

    Skips adapted, hooked and parametrised layers, and shared weights. Raises InputError unless all parameters are on
    the CPU and in the compute dtype.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or (
            parameter.is_floating_point() and settings.dtype not in (None, parameter.dtype)
        ):
            raise InputError(
                f"freeze=True stores weights of one dtype on a CPU, and {name} is {parameter.dtype} on "
                f"{parameter.device}; convert the model first: model.to('cpu', {settings.dtype or parameter.dtype})"
            )
    owners, done = owner_counts(model), list[FrozenLinear]()
    for form in fused:
        joint = {name for group in type(form).joint for name in group}
        singles = [
            (name,)
            for name, kinds in type(form).bypassed.items()
            if name not in joint and isinstance(kinds, tuple) and Adaptable in kinds
        ]
        for group in (*type(form).joint, *singles):
            layers = [find(form, name) for name in group]
            weights = own_weights(layers, owners)
            alike = (
                weights is not None
                and len({(weight.dtype, weight.shape[1]) for weight in weights}) == 1
            )
            if weights is None or not alike or weights[0].dtype not in _PACKED:
                continue
            pack(
                cast(list[nn.Module], layers),
                weights,
                blocked=gemm.prefers_onednn(weights[0].dtype),
            )
            for layer in cast(list[nn.Module], layers):
                del layer._parameters["weight"]
                swap(layer, FrozenLinear, settings)
                layer.__dict__["_parameters"] = _Parameters(layer._parameters)
                done.append(cast(FrozenLinear, layer))
    if done:
        done[0].__dict__[_TRAINED] = stop_gradients(model)
    return done


def quantise(model: nn.Module, fused: Iterable[Fused], kind: EightBits) -> list[list[nn.Parameter]]:
    """Flag the linear weights of the fused blocks; returns the weights of each block.

    Skips adapted, hooked, quantised and parametrised layers, shared weights, and for fp8 sizes that are no multiple
    of 16. InputError for inference tensors.
    """
    owners = owner_counts(model)
    types = _PACKED if kind == "int8" else (*_PACKED, torch.float16)
    done: list[list[nn.Parameter]] = []
    for form in fused:
        layers = (
            [find(form, name) for name in type(form).bypassed]
            if form.multiplies_in_eight_bits
            else []
        )
        own = [weight for layer in layers for weight in own_weights([layer], owners) or ()]
        weights = [
            weight
            for weight in own
            if weight.dtype in types and (kind == "int8" or fp8.fits(weight))
        ]
        if any(weight.is_inference() for weight in weights):
            raise InputError(
                f"dtype={kind!r} cannot follow changes of these weights: they are inference tensors, which carry no "
                "version; load the model outside torch.inference_mode(), or pass copy.deepcopy(model), made outside it"
            )
        if not weights:
            continue
        done.append(weights)
        flags.mark(weights, kind)
        if kind == "fp8":
            norms = (
                layer._parameters.get("weight") for layer in layers if type(layer) is nn.LayerNorm
            )
            flags.mark((scale for scale in norms if type(scale) is nn.Parameter), kind)
    return done
