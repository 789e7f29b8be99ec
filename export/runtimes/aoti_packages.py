"""AOTInductor packages on the CPU or an NVIDIA GPU. Loading one runs compiled code, so `auto` never picks them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast.errors import ExportError, UnavailableError

from ..aoti import check_package, local_target
from ..manifest import GraphRecord, Manifest
from ..slots import Slot
from . import Precision, failed_run, first_line


def open_runtime(
    name: str, manifest: Manifest, device: torch.device | None, precision: Precision | None
) -> AotiPackages:
    """See `runtimes.open_runtime`."""
    return AotiPackages(manifest, device)


class AotiPackages:
    """A `Runtime`; calls of one graph are serialised."""

    def __init__(self, manifest: Manifest, device: torch.device | None) -> None:
        target = manifest.package
        if target is None:
            raise ExportError("the manifest of these packages does not say what they were compiled for; export again")
        if device is not None and device.type != target.device:
            raise UnavailableError(
                f"these packages were compiled for {target.device}, not for {device.type}; build others with xfm-fast "
                f"export aoti --device {device.type}"
            )
        if target.device == "cuda" and not torch.cuda.is_available():
            raise UnavailableError(
                "these packages were compiled for an NVIDIA GPU and PyTorch finds none here; build others with "
                "xfm-fast export aoti --device cpu"
            )
        check_package(target, local_target(target.device))
        if target.device == "cpu":
            self.device = torch.device("cpu")
        else:
            index = torch.cuda.current_device() if device is None or device.index is None else device.index
            self.device = torch.device("cuda", index)
        self.enqueues = self.device.type == "cuda"
        where = torch.cuda.get_device_name(self.device) if self.enqueues else "CPU"
        self.description = f"AOTInductor of torch {torch.__version__}, {where}"

    def load(self, record: GraphRecord, path: Path) -> _Package:
        """See `Runtime.load`."""
        from torch._inductor import aoti_load_package

        try:
            package = aoti_load_package(str(path), device_index=self.device.index if self.enqueues else -1)
        except Exception as error:  # of the loader, which has no errors of its own
            raise ExportError(
                f"{self.description} does not load {path.name} ({first_line(error)}); build it on this machine with "
                "xfm-fast export aoti"
            ) from error
        return _Package(package, record, self.description)


class _Package:
    """A `LoadedGraph`."""

    def __init__(self, package: Any, record: GraphRecord, description: str) -> None:
        self._package, self._record, self._description = package, record, description

    def run(self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        try:
            results = self._package(*(inputs[tensor.name] for tensor in self._record.inputs))
        except Exception as error:
            raise failed_run(self._description, self._record.name, inputs, first_line(error)) from error
        return {tensor.name: value for tensor, value in zip(self._record.outputs, results, strict=True)}
