"""NaN and infinity: which tensor was the first that is not finite, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xfm_fast.batches import Batch
from xfm_fast.errors import NonFiniteError
from xfm_fast.training.metrics import Value
from xfm_fast.training.norms import local

# What they return holds whatever was in memory.
_UNINITIALISED = ("aten.empty", "aten.new_empty", "aten.resize", "aten.set_")


class Guard:
    """Remembers the gradient norms of every parameter since the last check, to name the first that was not finite.

    Args:
        model: that is trained.
        names: of the parameters, in the order in which norms number them.
        scaled: gradients come from a scaled loss. One that overflows is then no fault: the loss scale is lowered and
            the update left out; a scale that has fallen below 1 is.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, scaled: bool = False) -> None:
        self._model = model
        self._names = names
        self._scaled = scaled
        self._gradients: list[tuple[int, str, list[int], Tensor]] = []

    def watch(self, step: int, update: str, having: list[int], norms: Tensor) -> None:
        """Take the norms `[n]` of the gradients of an update, without looking at them."""
        self._gradients.append((step, update, having, norms))

    def check(
        self, values: Iterable[Value], batches: Mapping[str, Batch], rerun: Callable[[str, Batch], Tensor] | None = None
    ) -> None:
        """Look at everything since the last check.

        Args:
            values: losses (`loss/<stream>/<name>`) and norms, in the order in which they arose.
            batches: the last batch of each stream of the last update, for the explanation.
            rerun: gives the loss of a stream's batch once more, for the explanation.

        Raises:
            NonFiniteError: one of them is NaN or infinite; names it and the first tensor that was not finite.
        """
        watched, self._gradients = self._gradients, []
        bad = next((value for value in values if self._is_bad(value)), None)
        if bad is None:
            return
        is_loss = bad.name.startswith("loss/")
        found = [*_bad_parameters(self._model), *_bad_inputs(batches), *self._bad_operations(batches, rerun)]
        causes = found if is_loss else [*self._bad_gradients(watched), *found]
        why = f": {causes[0]}" if causes else ", though every tensor of the last batch is finite when it runs again"
        more = f" (and {'; '.join(causes[1:3])})" if len(causes) > 1 else ""
        raise NonFiniteError(
            f"step {bad.step}: {bad.name.replace('/', ' ', 1)} is {bad.number}{why}{more}. The run has stopped, and "
            "the last checkpoint is as it was: lower optimizer.lr, lengthen schedule.warmup, or look at that batch"
        )

    def _is_bad(self, value: Value) -> bool:
        if value.name == "loss_scale":
            return value.number < 1
        return not math.isfinite(value.number) and not (self._scaled and value.name.startswith("grad_norm/"))

    def _bad_gradients(self, watched: list[tuple[int, str, list[int], Tensor]]) -> Iterator[str]:
        for _, update, having, norms in watched:
            for index, norm in zip(having, norms.tolist(), strict=True):
                if not math.isfinite(norm):
                    yield f"the gradient of {self._names[index]} in update {update} has norm {norm}"
                    return

    def _bad_operations(
        self, batches: Mapping[str, Batch], rerun: Callable[[str, Batch], Tensor] | None
    ) -> Iterator[str]:
        if rerun is None:
            return
        parameters = {id(parameter): name for name, parameter in self._model.named_parameters()}
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for stream, batch in batches.items():
            with torch.enable_grad(), _FirstNonFinite(parameters) as search:
                loss = rerun(stream, batch)
                if search.found is None and loss.requires_grad:
                    search.direction = "backward"
                    torch.autograd.grad(loss, trained, allow_unused=True)
            if search.found is not None:
                yield f"stream {stream}: {search.found}"
                return


class _FirstNonFinite(TorchDispatchMode):
    """Finds the first operation whose result is not finite though what it was given is.

    Negative infinity does not count: attention masks are made of it.
    """

    def __init__(self, parameters: Mapping[int, str]) -> None:
        super().__init__()
        self._parameters = parameters
        self._last_parameter = ""
        self.direction = "forward"
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            self._last_parameter = self._parameters.get(id(tensor), self._last_parameter)
        sound = self.found is None and not any(_is_bad(tensor) for tensor in given)
        result = func(*args, **(kwargs or {}))
        if sound and not str(func).startswith(_UNINITIALISED) and any(map(_is_bad, tree_leaves(result))):
            where = self._last_parameter.rpartition(".")[0] or "the loss"
            self.found = f"the {self.direction} operation {func} at {where} is the first whose result is not finite"
        return result


def _is_bad(value: object) -> bool:
    # A weight packed for oneDNN cannot be looked into; the parameter that it comes from can.
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        return False
    return bool((value.isnan() | value.isposinf()).any())


def _bad_parameters(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if not bool(local(parameter).isfinite().all()):
            yield f"parameter {name} is not finite"
            return


def _bad_inputs(batches: Mapping[str, Batch]) -> Iterator[str]:
    for stream, batch in batches.items():
        for field in fields(batch):
            value = getattr(batch, field.name)
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                yield f"{field.name} of the batch of stream {stream} is not finite"
                return
