"""OpenVINO on the CPU; its tensors are views of torch tensors."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xfm_fast.errors import ExportError, UnavailableError

from . import Runtime, Spelling, check_dtype, failed_run, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..manifest import GraphRecord, Manifest
    from ..request import Precision
    from ..slots import Slot
    from . import RunGraph

_FIRST_WITH_ATTENTION = (2026, 4)
"""The oldest version that reads the operator `Attention` of opset 23, by our tests."""


@cache
def core() -> Any:
    """Return the one `Core` of the process, which is never freed.

    With AMX each sets a signal stack of its own. Freed in the order of their creation they leave one in place that is
    gone, and the next signal that Python handles ends the process (OpenVINO 2026.4).
    """
    import openvino

    return openvino.Core()


@register
class OpenVINO(Runtime):
    """Calls of the same graph are serialised. bf16 is a precision of the arithmetic; tensors stay fp32."""

    name = "openvino"
    title = "OpenVINO"
    package = "openvino"
    extra = "openvino"
    precisions = ("fp32", "bf16")

    def __init__(
        self,
        manifest: Manifest,
        device: torch.device | None = None,
        *,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(manifest, device)
        self.spelling(manifest.dtype)
        version: str = self.library.__version__
        release = tuple(map(int, version.split("-")[0].split(".")[:2]))
        if manifest.attention == "opset23" and release < _FIRST_WITH_ATTENTION:
            raise ExportError(
                f"this export spells attention as {manifest.attention}, which OpenVINO {version} does not read; export "
                "it with --for openvino"
            )
        self._core = core()
        if precision == "bf16" and "BF16" not in self._core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise UnavailableError(
                "this processor has no bf16 arithmetic; leave out precision='bf16'"
            )
        self._precision: Precision = precision
        self.description = f"openvino {version.split('-')[0]}, CPU, {precision}"

    @classmethod
    def spelling(cls, dtype: str, opset: int | None = None) -> Spelling:
        """See `Runtime.spelling`; all versions read primitives."""
        if check_dtype(dtype) == "bf16":
            raise UnavailableError(
                "OpenVINO takes no bf16 tensors; export with --dtype fp32 and load the session with precision='bf16'"
            )
        return super().spelling("fp32", opset)

    def load(self, record: GraphRecord, path: Path) -> RunGraph:
        """See `Runtime.load`."""
        import torch

        from ..slots import empty_tensors

        options = {
            # The default is the fastest dtype, which is bf16 on some processors.
            "INFERENCE_PRECISION_HINT": "bf16" if self._precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            compiled = self._core.compile_model(str(path), "CPU", options)
        except Exception as error:
            raise ExportError(
                f"{self.description} does not load {path.name} ({_reason(error)}); export it again with --for openvino"
            ) from error
        request, lock = compiled.create_infer_request(), threading.Lock()

        def run(
            inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]
        ) -> dict[str, Tensor]:
            outputs = empty_tensors(record.outputs, sizes, self.device)
            with lock:
                for name, value in {**inputs, **outputs}.items():
                    request.set_tensor(name, self.library.Tensor(value.numpy(), shared_memory=True))
                try:
                    request.infer()
                except Exception as error:
                    raise failed_run(
                        self.description, record.name, inputs, _reason(error)
                    ) from error
            return outputs

        return run


def _reason(error: Exception) -> str:
    """Return the message of an error without the positions in the library's source."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(
        line for line in lines if line and not line.startswith(("Exception from", "Check '"))
    )[:300]
