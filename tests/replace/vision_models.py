"""What the tests of foreign vision transformers have in common: weights that matter, and comparisons."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xfm_fast import accelerate
from xfm_fast.replace.swap import original_class

WIDTH, IMAGE = 48, 32


def randomised(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with parameters that all leave a trace in its output: libraries start many of them at 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim <= 1 or "table" in name else parameter.shape[-1] ** -0.5
            centre = 1.0 if parameter.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(centre, spread, generator=generator)
    return model.to(dtype).eval()


def fused_copy(model: Any, **options: Any) -> Any:
    fast = copy.deepcopy(model)
    accelerate(fast, **options)
    return fast


def pixels(dtype: torch.dtype = torch.float64, size: int = IMAGE, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def without_chance(model: nn.Module) -> nn.Module:
    """Training mode in which nothing is drawn."""
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout) or hasattr(part, "drop_prob"):
            part.eval()
    return model


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The output, and what every parameter gets of a loss that weighs all of it differently."""
    model.zero_grad()
    out = run()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    found = {name: torch.zeros(()) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"output": out.detach()} | found


def assert_close(wanted: dict[str, Tensor], found: dict[str, Tensor], band: float) -> None:
    """Every tensor to `band` of its largest value. A softmax takes no notice of the keys' biases, nor of what is added
    to all scores of a head: nothing but rounding is in their gradients, and they are measured by the largest one.
    """
    assert wanted.keys() == found.keys()
    largest = max(float(value.detach().abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        error = float((found[name].detach().double() - value.detach().double()).abs().max())
        rounding_only = name.endswith(("k_proj.bias", "key.bias", "k_norm.bias", "rel_pos.mlp.fc2.bias"))
        assert error <= band * (largest if rounding_only else float(value.detach().abs().max())), name


def only_fused(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *kinds: str) -> None:
    """Let the original forwards of these classes raise from now on."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the original forward ran")

    for kind in {original_class(part) for part in model.modules()}:
        if kind.__name__ in kinds:
            monkeypatch.setattr(kind, "forward", refuse)
