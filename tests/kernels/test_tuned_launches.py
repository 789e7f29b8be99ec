"""What `tune` finds is what kernels are launched with, at every size, and gives the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_testing import interpreted_kernels, poison

interpreted_kernels()

from xfm_fast.kernels import tune  # noqa: E402
from xfm_fast.kernels.triton import gelu, layer_norm  # noqa: E402
from xfm_fast.kernels.triton.launch import LaunchConfig  # noqa: E402

WIDTH = 63
# The interpreter takes the configurations of the oldest architecture.
ARCH = 80


def _tensors(found: Any) -> list[Tensor]:
    return [t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, Tensor)]


@pytest.mark.parametrize("kernel", tune._WIDTHS)
def test_row_kernels_are_launched_as_tuned(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_ROWS", 11)
    seen: list[LaunchConfig] = []
    for module in (gelu, layer_norm):
        options = module.launch_options
        monkeypatch.setattr(
            module,
            "launch_options",
            lambda config, options=options, **k: (seen.append(config), options(config, **k))[1],
        )
    call = tune.model_workload(kernel, WIDTH, "fp32", device="cpu")
    expected = _tensors(call())
    in_use = seen[-1]
    block = in_use.tiles["BLOCK"] if "norm" in kernel else 32
    tuned = LaunchConfig({"BLOCK": block, "ROWS": 2 * in_use.tiles["ROWS"]}, 2, 1)
    with tune.using(kernel, WIDTH, "fp32", ARCH, tuned), poison():
        found = _tensors(call())
    assert seen[-1] == tuned != in_use
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    call()
    assert seen[-1] == in_use


def test_an_unknown_kernel_has_no_workload() -> None:
    with pytest.raises(ValueError, match="no shape is known at which to time kernel ordered_sum"):
        tune.model_workload("ordered_sum", 768, "bf16", device="cpu")
