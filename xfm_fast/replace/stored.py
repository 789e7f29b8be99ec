"""Weights of fused blocks, packed for a CPU (`freeze=True`) or flagged to run in 8 bits (`dtype="int8"`).

Packed weights are not parameters, and `revert` restores them bit for bit. Unlike the layers of
`XFM.freeze`, these may be called or read by code that does not know of packing. 8-bit weights stay
parameters, with a flag (`kernels.flags`). Embeddings, unfused modules, and in 8 bits vocabulary
heads keep their weights.
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
from xfm_fast.kernels.cpu.workspace import HugePages
from xfm_fast.kernels.flags import EightBits
from xfm_fast.models.frozen import own_weights, owner_counts, stop_gradients
from xfm_fast.plans.slots import dense_weight, pack, slot_of, unpack
from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.swap import Fused, Settings, find, original_class, restore, swap
from xfm_fast.replace.unpadded import encoder_of

_TRAINED = "_xfm_fast_trained"
_PACKED = (torch.float32, torch.bfloat16)
# Functions that set an attribute, or hand out the memory of a copy.
_MEMORY = ("__set__", "__setitem__", "storage", "untyped_storage", "data_ptr", "__dlpack__")


def _refuse(*_: Any) -> NoReturn:
    raise InputError(
        "the weight of this layer is frozen for inference, and a change would be lost; call report.revert() before it, "
        "and accelerate again after it"
    )


class _Weight(Tensor):
    """A copy of a frozen weight; it and its views raise InputError at a write."""

    itself: Any  # a weak reference: `torch.utils.swap_tensors` refuses tensors that have one
    set_: Any = _refuse  # PyTorch does not dispatch it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        in_place = name.endswith("_") and not name.endswith("__")
        in_place = in_place and args and isinstance(args[0], cls)
        if name in _MEMORY or (in_place and (name, *args[1:]) != ("requires_grad_", False)):
            _refuse()
        with torch._C.DisableTorchFunctionSubclass():
            weights = [
                tensor for tensor in pytree.tree_leaves((args, kwargs)) if isinstance(tensor, cls)
            ]
            memory = {tensor.untyped_storage().data_ptr() for tensor in weights}
            versions = [tensor._version for tensor in weights]
            args, kwargs = pytree.tree_map_only(
                cls, lambda tensor: tensor.as_subclass(Tensor), (args, kwargs or {})
            )
            result = func(*args, **kwargs)
            # The counter sees other writes (`out=`, lists of tensors). A gradient would be lost
            # too.
            if [tensor._version for tensor in weights] != versions:
                _refuse()
            if any(tensor.requires_grad for tensor in weights):
                _refuse()
            if isinstance(result, np.ndarray):
                result.flags.writeable = False

            def guard_view(tensor: Tensor) -> Tensor:
                if tensor.layout != torch.strided:
                    return tensor
                is_view = tensor.untyped_storage().data_ptr() in memory
                return tensor.as_subclass(cls) if is_view else tensor

            return pytree.tree_map_only(Tensor, guard_view, result)


class _Parameters(dict[str, Any]):
    """Parameters of a frozen layer; refuses to delete its weight, as `weight_norm` does."""

    def __delitem__(self, name: str) -> None:
        if name not in self:
            _refuse()
        super().__delitem__(name)


class FrozenLinear(Fused):
    """`torch.nn.Linear` with a packed weight, which is not a parameter; state dicts contain it.

    Moved to another dtype or device, the layer becomes an ordinary one again.
    """

    @property
    def weight(self) -> Tensor:
        """Copy `[M, K]` that refuses writes."""
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
        # Pruning and weight normalisation register parameters such as `weight_orig`.
        if name.startswith("weight"):
            _refuse()
        super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        if traced() or torch.compiler.is_exporting():
            with untraced():
                weight = dense_weight(self).clone()
            return F.linear(input, weight, cast(Any, self).bias)
        return self.settings.linears("", input, self)[0]

    def release(self) -> None:
        self.__dict__["_parameters"] = {"weight": unpack(self), **self._parameters}
        for parameter in self.__dict__.pop(_TRAINED, ()):
            parameter.requires_grad_(True)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = dense_weight(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
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
    """Pack the linear weights of fused forms in place; the whole model stops taking gradients.

    Skips adapted, hooked and parametrised layers, and shared weights.

    Returns:
        The layers whose weights are packed.

    Raises:
        InputError: A parameter is not on the CPU, or not in the compute dtype.
    """
    for name, parameter in model.named_parameters():
        converts = parameter.is_floating_point() and settings.dtype not in (None, parameter.dtype)
        if converts or parameter.device.type != "cpu":
            raise InputError(
                f"freeze=True stores weights of one dtype on a CPU, and {name} is {parameter.dtype} on "
                f"{parameter.device}; convert the model first: model.to('cpu', {settings.dtype or parameter.dtype})"
            )
    owners, frozen, memory = owner_counts(model), list[FrozenLinear](), HugePages()
    texts = set[nn.Module]()
    for part in model.modules():
        if encoder_of(original_class(part)) is not None:
            texts.update(part.modules())
    for module in fused:
        groups = list(type(module).joint)
        joint = {name for group in groups for name in group}
        for name, classes in type(module).bypassed.items():
            if name not in joint and isinstance(classes, tuple) and Adaptable in classes:
                groups.append((name,))
        for group in groups:
            layers: list[Any] = [find(module, name) for name in group]
            weights = own_weights(layers, owners)
            if weights is None:
                continue
            dtype = weights[0].dtype
            alike = len({(weight.dtype, weight.shape[1]) for weight in weights}) == 1
            if not alike or dtype not in _PACKED:
                continue
            # A text may be single and short; an image has hundreds of rows.
            layout = gemm.layout_of(weights[0], few_rows=module in texts)
            pack(layers, weights, layout, memory)
            for layer in layers:
                del layer._parameters["weight"]
                swap(layer, FrozenLinear, settings)
                layer.__dict__["_parameters"] = _Parameters(layer._parameters)
                frozen.append(layer)
    if frozen:
        frozen[0].__dict__[_TRAINED] = stop_gradients(model)
    return frozen


def quantise(
    model: nn.Module, fused: Iterable[Fused], eight_bits: EightBits
) -> list[list[nn.Parameter]]:
    """Flag the linear weights of fused blocks to run in 8 bits.

    Skips adapted, hooked, quantised and parametrised layers, shared weights, and for fp8 sizes that
    are not multiples of 16.

    Returns:
        The flagged weights of each block.

    Raises:
        InputError: A weight is an inference tensor.
    """
    owners = owner_counts(model)
    dtypes = _PACKED if eight_bits == "int8" else (*_PACKED, torch.float16)
    flagged: list[list[nn.Parameter]] = []
    for module in fused:
        if not module.multiplies_in_eight_bits:
            continue
        layers = [find(module, name) for name in type(module).bypassed]
        weights = []
        for layer in layers:
            for weight in own_weights([layer], owners) or ():
                if weight.dtype in dtypes and (eight_bits == "int8" or fp8.fits(weight)):
                    weights.append(weight)
        if any(weight.is_inference() for weight in weights):
            raise InputError(
                f"dtype={eight_bits!r} cannot follow changes of these weights: they are inference tensors, which carry "
                "no version; load the model outside torch.inference_mode(), or pass a copy.deepcopy made outside it"
            )
        if not weights:
            continue
        flagged.append(weights)
        flags.mark(weights, eight_bits)
        if eight_bits == "fp8":
            norms = (
                layer._parameters.get("weight") for layer in layers if type(layer) is nn.LayerNorm
            )
            flags.mark((scale for scale in norms if type(scale) is nn.Parameter), eight_bits)
    return flagged
