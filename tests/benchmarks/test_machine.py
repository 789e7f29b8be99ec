"""Energy and clock counters, on files and a library of the test's own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xfm_fast.benchmarks.machine import EnergyMeter, Nvml

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def _package(root: Path, name: str, energy: object) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "max_energy_range_uj").write_text("1000000\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    return folder / "energy_uj"


def test_rapl_adds_packages_and_goes_on_where_a_counter_starts_again(tmp_path: Path) -> None:
    first = _package(tmp_path, "intel-rapl:0", 100_000)
    second = _package(tmp_path, "intel-rapl:1", 900_000)
    _package(tmp_path, "intel-rapl:0:0", 5)
    meter = EnergyMeter(CPU, tmp_path)
    assert (meter.reason, meter.joules()) == (None, 0)
    first.write_text("350000")
    second.write_text("100000")
    assert meter.joules() == pytest.approx(0.25 + 0.2)
    second.write_text("150000")
    assert meter.joules() == pytest.approx(0.5)


def test_without_a_counter_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no RAPL package" in str(EnergyMeter(CPU, tmp_path / "none").reason)
    _package(tmp_path, "intel-rapl:0", "not a number")
    assert "cannot be read" in str(EnergyMeter(CPU, tmp_path).reason)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml" in str(EnergyMeter(GPU).reason)


def test_nvml_counts_the_gpu_by_its_identifier(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"energy": 5000}
    nvml: Any = SimpleNamespace(
        NVML_CLOCK_SM=1, NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda identifier: identifier,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: state["energy"],
        nvmlDeviceGetClockInfo=lambda handle, clock: 1980 if handle == "GPU-abc" else 0,
        nvmlDeviceGetTemperature=lambda handle, sensor: 55,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    meter = EnergyMeter(GPU)
    before = meter.joules()
    state["energy"] = 7500
    assert meter.joules() - before == pytest.approx(2.5)
    assert Nvml(GPU).state() == (1980, 55)
