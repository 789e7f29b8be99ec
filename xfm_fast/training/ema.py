"""An exponential moving average of the weights, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xfm_fast.errors import CheckpointError, InputError


class WeightAverage:
    """`average ← decay·average + (1−decay)·weights` after every step, of all parameters of a model.

    Averages begin at the weights they are made from, live beside them (sharded where these are) and in fp32 at least.

    Args:
        model: whose parameters are followed.
        decay: in (0, 1); the average looks back about `1 / (1 - decay)` steps.

    Raises:
        InputError: a decay out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise InputError(f"decay={decay} is no average; choose it between 0 and 1, such as 0.999")
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self._averages = {name: _precise(parameter) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights, once after every step."""
        for name, average in self._averages.items():
            average.lerp_(self._parameters[name].detach().to(average.dtype), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards, its own again, to the bit."""
        own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._put(self._averages)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by parameter name."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up averages that `state_dict` gave.

        Raises:
            CheckpointError: averages of other parameters; nothing is then changed.
        """
        absent = sorted(self._averages.keys() - state.keys())
        foreign = sorted(state.keys() - self._averages.keys())
        other = sorted(n for n in self._averages.keys() & state.keys() if self._averages[n].shape != state[n].shape)
        if absent or foreign or other:
            raise CheckpointError(
                f"the weight average belongs to another model: {len(absent)} parameters are absent, {len(foreign)} "
                f"foreign, {len(other)} of another shape, such as {(absent + foreign + other)[0]}; resume with the "
                "recipe that it was made by"
            )
        for name, average in self._averages.items():
            average.copy_(state[name])


def _precise(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)
