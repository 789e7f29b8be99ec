"""Clock and temperature of a GPU, read with a library of the test's own."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xfm_fast.benchmarks.machine import gpu_counters


def test_nvml_finds_the_gpu_by_its_identifier(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml: Any = SimpleNamespace(
        NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda identifier: identifier,
        nvmlDeviceGetClockInfo=lambda handle, clock: 1980 if handle == "GPU-abc" else 0,
        nvmlDeviceGetTemperature=lambda handle, sensor: 55,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    assert gpu_counters(torch.device("cuda", 0))() == (1980, 55)
