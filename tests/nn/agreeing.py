"""What every module is held to: its twin's outputs and gradients, and life after copying and saving."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.agreement import relative_error

CLOSE = 1e-5


def offsets(lengths: Sequence[int]) -> Tensor:
    """`[S + 1]` int32 offsets of sequences."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def assert_same_gradients(module: nn.Module, plain: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    """`plain(module, *inputs)` says what the module is to compute."""
    results = []
    for run in (plain, lambda module, *inputs: module(*inputs)):
        module.zero_grad()
        inputs = tuple(t.detach().requires_grad_() if _is_learned(t) else t for t in inputs)
        made = run(module, *inputs)
        made = made if isinstance(made, tuple) else (made,)
        torch.manual_seed(1)
        torch.stack([(out * torch.randn(out.shape)).sum() for out in made]).sum().backward()
        leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        results.append((made, [t.grad for t in (*leaves, *module.parameters())]))
    (wanted, gradients), (found, found_gradients) = results
    for out, truth in zip(found, wanted, strict=True):
        assert relative_error(out.detach(), truth.detach()) < CLOSE
    scale = max(float(g.abs().max()) for g in gradients)
    for gradient, truth in zip(found_gradients, gradients, strict=True):
        assert float((gradient - truth).abs().max()) < CLOSE * scale


def assert_survives_copies(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A deep copy and a module with the loaded state give the same result, and stand on their own."""
    module.eval()
    with torch.no_grad():
        wanted = _first(module(*inputs))
        twin = copy.deepcopy(module)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        loaded = copy.deepcopy(module)
        for parameter in loaded.parameters():
            parameter.fill_(0.25)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        for parameter in module.parameters():
            parameter.mul_(1.5)
        for other in (twin, loaded):
            assert torch.equal(_first(other(*inputs)), wanted)
        assert relative_error(_first(module(*inputs)), wanted) > 1e-3


def _is_learned(value: Any) -> bool:
    """Vectors are factors and offsets."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


def _first(made: Any) -> Tensor:
    return made[0] if isinstance(made, tuple) else made
