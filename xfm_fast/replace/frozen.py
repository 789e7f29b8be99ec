"""Third-party linear layers with packed weights: `accelerate(model, freeze=True)`, undone bit for bit by `revert`.

Unlike the layers of `XFM.freeze`, these may be called or asked for `weight` by code that knows nothing of packing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import gemm
from xfm_fast.models.frozen import dense_weight, owner_counts, pack, slot_of, state_weight, stop_gradients, unpack
from xfm_fast.replace import adapters
from xfm_fast.replace.swap import Fused, Settings, find, observed, restore, swap

_TRAINED = "_xfm_fast_trained"


class FrozenLinear(Fused):
    """`torch.nn.Linear` with a packed weight, which is no parameter; state dicts contain it.

    Moved to another dtype or device, the layer becomes an ordinary one again.
    """

    @property
    def weight(self) -> Tensor:
        """`[M, K]`, read-only: a copy if blocked."""
        return dense_weight(self)

    def forward(self, input: Tensor) -> Tensor:
        return self.settings.products("", input, self)[0]

    def release(self) -> None:
        rest = dict(self._parameters)
        self._parameters.clear()
        self._parameters |= {"weight": unpack(self), **rest}
        for other in self.__dict__.pop(_TRAINED, ()):
            other.requires_grad_(True)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = state_weight(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any, **named: Any) -> NoReturn:
        raise InputError(f"{prefix}weight is frozen for inference; call report.revert(), load, and accelerate again")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        probe = torch.empty(0, dtype=slot_of(self).packed.dtype)
        moved = fn(probe)
        if (moved.dtype, moved.device) == (probe.dtype, probe.device):
            return super()._apply(fn, recurse)
        restore(self)
        return self._apply(fn, recurse)


def check(model: nn.Module, settings: Settings) -> None:
    """Raise InputError unless all parameters are on the CPU and in the compute dtype."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise InputError(
                f"freeze=True is for a CPU, and {name} is on {parameter.device}; move the model or leave freeze out"
            )
        if settings.dtype is not None and parameter.is_floating_point() and parameter.dtype != settings.dtype:
            raise InputError(
                f"freeze=True stores one dtype, {name} is {parameter.dtype}, and dtype={settings.dtype}; convert the "
                f"model first: model.to({settings.dtype})"
            )


def freeze(model: nn.Module, fused: Iterable[Fused], settings: Settings) -> list[FrozenLinear]:
    """Pack the linear weights of the fused forms in place and return their layers; no parameter takes gradients.

    Skips adapted, hooked and parametrised layers, and shared weights.
    """
    owners = owner_counts(model)
    done: list[FrozenLinear] = []
    for form in fused:
        joint = [name for group in type(form).joint for name in group]
        singles = [
            (name,)
            for name, kinds in type(form).bypassed.items()
            if name not in joint and isinstance(kinds, tuple) and adapters.Adaptable in kinds
        ]
        for group in (*type(form).joint, *singles):
            layers = [find(form, name) for name in group]
            if any(layer is None or not _freezable(layer, owners) for layer in layers):
                continue
            linears = cast(list[nn.Linear], layers)
            if len({(layer.weight.dtype, layer.in_features) for layer in linears}) > 1:
                continue
            pack(linears, blocked=gemm.prefers_onednn(linears[0].weight.dtype))
            for layer in linears:
                del layer._parameters["weight"]
                swap(layer, FrozenLinear, settings)
                done.append(cast(FrozenLinear, layer))
    if done:
        done[0].__dict__[_TRAINED] = stop_gradients(model)
    return done


def _freezable(layer: nn.Module, owners: Mapping[int, int]) -> bool:
    if type(layer) is not nn.Linear or observed(layer):
        return False
    weight = layer._parameters.get("weight")
    return type(weight) is nn.Parameter and owners[id(weight)] == 1 and weight.dtype in (torch.float32, torch.bfloat16)
