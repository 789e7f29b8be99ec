"""Linear layers whose weights lie packed in place of their parameters, for inference: `accelerate(model, freeze=True)`.

oneDNN multiplies a weight fastest in a layout of its own. Kept beside the parameter it is a second copy of the model;
here it takes the parameter's place, and the parameter's memory is given up until `revert`, which restores every bit.

`XFM.freeze` (`models.frozen`) does with less: its layers are multiplied by `ops` alone, which take a laid-out weight as
they take any. Layers of other people are called as they are too, and asked for `weight`: their class answers both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import derived
from xfm_fast.replace import adapters
from xfm_fast.replace.packed_weight import PackedWeight, displace, place, place_of
from xfm_fast.replace.swap import Fused, Settings, find, observed, restore, swap

_KEPT = "_xfm_fast_parameter"
_TRAINED = "_xfm_fast_trained"


class FrozenLinear(Fused):
    """`torch.nn.Linear` whose weight is in a pack, alone or with those of its neighbours.

    `weight` and state dicts give it as it was, made anew at each time; `parameters()` is without it. Moved to another
    type or device, the layer is an ordinary one again.
    """

    @property
    def weight(self) -> Tensor:
        """`[M, K]`: of a blocked pack a copy, to be read."""
        packed, number = place_of(self)
        return packed.dense()[number]

    def forward(self, input: Tensor) -> Tensor:
        (out,) = self.settings.products("", input, self)
        return out

    def release(self) -> None:
        parameter = self.__dict__.pop(_KEPT)
        parameter.data = self.weight.clone()
        displace(self)
        rest = dict(self._parameters)
        self._parameters.clear()
        self._parameters |= {"weight": parameter, **rest}
        for other in self.__dict__.pop(_TRAINED, ()):
            other.requires_grad_(True)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        weight = self.weight
        # A part of a larger storage would keep all of that alive, and not every format writes it.
        destination[f"{prefix}weight"] = weight if len(place_of(self)[0].sizes) == 1 else weight.clone()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **named: Any) -> NoReturn:
        raise InputError(
            f"{prefix}weight is frozen for inference and takes no other values; call report.revert(), load, and "
            "accelerate again"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        packed, _ = place_of(self)
        probe = torch.empty(0, dtype=packed.tensor.dtype)
        moved = fn(probe)
        if (moved.dtype, moved.device) == (probe.dtype, probe.device):
            return super()._apply(fn, recurse)
        # Another type or device: the weight is a parameter again, and goes there with all the others.
        restore(self)
        return self._apply(fn, recurse)


def check(model: nn.Module, settings: Settings) -> None:
    """Refuse what cannot be frozen.

    Raises:
        InputError: parameters elsewhere than on the CPU, or stored in another type than is computed in.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise InputError(
                f"freeze=True lays weights out for a CPU, and {name} is on {parameter.device}; move the model to the "
                "CPU or leave freeze out"
            )
        if settings.dtype is not None and parameter.is_floating_point() and parameter.dtype != settings.dtype:
            raise InputError(
                f"freeze=True keeps weights in one type alone, {name} is {parameter.dtype}, and dtype={settings.dtype} "
                f"needs another; convert the model first: model.to({settings.dtype})"
            )


def freeze(model: nn.Module, fused: Iterable[Fused], settings: Settings) -> list[FrozenLinear]:
    """Pack the weights that the fused forms multiply with, in place; returns the layers that have them.

    No parameter of the model takes gradients until they are released.

    Left as they are: adapted, observed and parametrised layers, and weights that another module shares.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    done: list[FrozenLinear] = []
    for form in fused:
        multiplied = [name for name, kinds in type(form).bypassed.items() if adapters.Adaptable in _tuple(kinds)]
        joint = [name for group in type(form).joint for name in group]
        groups = [*type(form).joint, *((name,) for name in multiplied if name not in joint)]
        for group in groups:
            layers = [find(form, name) for name in group]
            if any(layer is None or not _freezable(layer, owners) for layer in layers):
                continue
            linears = cast(list[nn.Linear], layers)
            if len({(layer.weight.dtype, layer.in_features) for layer in linears}) > 1:
                continue
            packed = PackedWeight([layer.weight for layer in linears])
            for number, layer in enumerate(linears):
                parameter = layer._parameters.pop("weight")
                assert parameter is not None
                derived.forget(parameter)
                place(layer, packed, number)
                layer.__dict__[_KEPT] = parameter
                parameter.data = parameter.data.new_empty(0)
                swap(layer, FrozenLinear, settings)
                done.append(cast(FrozenLinear, layer))
    if done:
        done[0].__dict__[_TRAINED] = trained = [p for p in model.parameters() if p.requires_grad]
        for other in trained:
            other.requires_grad_(False)
    return done


def _tuple(kinds: Any) -> tuple[Any, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _freezable(layer: nn.Module, owners: Mapping[int, int]) -> bool:
    if type(layer) is not nn.Linear or observed(layer):
        return False
    weight = layer._parameters.get("weight")
    return type(weight) is nn.Parameter and owners[id(weight)] == 1 and weight.dtype in (torch.float32, torch.bfloat16)
