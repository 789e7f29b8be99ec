"""ONNX Runtime on the CPU or with its CUDA provider; inputs and outputs are bound to the memory of torch tensors."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xfm_fast.errors import ExportError, StorageError, UnavailableError

from . import LARGEST_FILE, Runtime, failed_run, first_line, register

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from ..manifest import GraphRecord, Manifest, TensorRecord
    from ..slots import Slot
    from . import RunGraph

# Element types of ONNX, which has one more than NumPy: bfloat16.
_ELEMENT_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}


@register
class OnnxRuntime(Runtime):
    """Thread-safe on a CPU.

    `compares` is for graphs that run a few times: it trades time for memory, and computes bf16 graphs in fp32 on a CPU,
    which has no bf16 kernels. Results then have the rounding of weights, inputs and outputs only.
    """

    name = "onnxruntime"
    title = "ONNX Runtime"
    package = "onnxruntime"
    extra = "export"
    dtypes = ("fp32",)
    devices = ("cpu", "cuda")
    preferred = True

    def __init__(
        self, manifest: Manifest, device: torch.device | None = None, *, compares: bool = False
    ) -> None:
        self.library: Any = self.import_library()
        self.device = self._device(device)
        self.description = f"onnxruntime {self.library.__version__}, {self.device.type.upper()}"
        narrow = manifest.dtype == "bf16" and self.device.type == "cpu"
        if narrow and not compares:
            raise UnavailableError(
                "ONNX Runtime has no bf16 kernels for the CPU; export with --dtype fp32, or load on device='cuda'"
            )
        self._compares, self._widens = compares, narrow
        if narrow:
            self.description += ", bf16 graphs computed in fp32"

    def _device(self, device: torch.device | None) -> torch.device:
        import torch

        provided = "CUDAExecutionProvider" in self.library.get_available_providers()
        if device is None:
            return torch.device("cuda:0" if provided and torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            return device
        if device.type != "cuda":
            raise UnavailableError(f"ONNX Runtime is used on cpu or cuda here, not on {device}")
        if not provided or not torch.cuda.is_available():
            lacking = (
                "PyTorch finds no GPU" if provided else "this onnxruntime has no CUDA provider"
            )
            raise UnavailableError(
                f"device {device} cannot be used: {lacking}; pip install onnxruntime-gpu, or use cpu"
            )
        return torch.device("cuda", device.index or 0)

    def load(self, record: GraphRecord, path: Path) -> RunGraph:
        """See `Runtime.load`."""
        if not self._widens:
            return self._load(record, path)
        wide = {"inputs": _in_fp32(record.inputs), "outputs": _in_fp32(record.outputs)}
        try:
            with tempfile.TemporaryDirectory() as scratch:
                widen(path, Path(scratch, path.name))
                return self._load(record.model_copy(update=wide), Path(scratch, path.name))
        except OSError as error:
            raise StorageError(
                f"{path.name} could not be copied in fp32 to {tempfile.gettempdir()} ({error.strerror or error}); free "
                "space there, or set TMPDIR to another folder"
            ) from error

    def _load(self, record: GraphRecord, path: Path) -> RunGraph:
        import torch

        from ..slots import empty_tensors

        providers: list[Any] = ["CPUExecutionProvider"]
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            # By default fp32 operands are rounded to TF32, an error a hundred times that of fp32.
            options = {
                "device_id": self.device.index,
                "use_tf32": 0,
                "user_compute_stream": str(stream.cuda_stream),
            }
            providers.insert(0, ("CUDAExecutionProvider", options))
        try:
            session = self.library.InferenceSession(
                str(path), self._options(record), providers=providers
            )
        except Exception as error:  # the library's own classes, which share no public base
            raise ExportError(
                f"{self.description} does not load {path.name} ({first_line(error)}); export it with --for "
                f"{self.name}, or upgrade onnxruntime"
            ) from error
        types = {
            tensor.name: _ELEMENT_TYPES[tensor.dtype]
            for tensor in (*record.inputs, *record.outputs)
        }
        address = self.device.type, self.device.index or 0
        # On a GPU calls of a graph follow each other, on the one stream that its session computes on.
        turn = contextlib.nullcontext() if stream is None else threading.Lock()

        def run(
            inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]
        ) -> dict[str, Tensor]:
            if self._widens:
                inputs = {
                    name: value.float() if value.is_floating_point() else value
                    for name, value in inputs.items()
                }
            outputs = empty_tensors(record.outputs, sizes, self.device)
            binding = session.io_binding()
            for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
                for name, value in tensors.items():
                    bind(name, *address, types[name], [*value.shape], value.data_ptr())
            with turn:
                if stream is not None:
                    # The GPU, not the host, waits for pending PyTorch work.
                    stream.wait_stream(torch.cuda.current_stream(self.device))
                try:
                    session.run_with_iobinding(binding)
                except Exception as error:
                    raise failed_run(
                        self.description, record.name, inputs, first_line(error)
                    ) from error
            if not self._widens:
                return outputs
            return {name: value.bfloat16() for name, value in outputs.items()}

        return run

    def _options(self, record: GraphRecord) -> Any:
        options = session_options(self.device.type)
        # Every graph has threads of its own. They may spin between the operators of a run, but not after it, when the
        # next graph needs the cores.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # ONNX Runtime stores a memory plan per combination of input shapes: too many with dynamic axes.
        options.enable_mem_pattern = not record.axes
        if self._compares:
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options


def _in_fp32(tensors: Sequence[TensorRecord]) -> list[TensorRecord]:
    return [
        tensor.model_copy(update={"dtype": "float32"}) if tensor.dtype == "bfloat16" else tensor
        for tensor in tensors
    ]


def session_options(device: str = "cpu") -> Any:
    """Return the options of every ONNX Runtime session of this project."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # As many threads as PyTorch, which knows of containers and OMP_NUM_THREADS.
    options.intra_op_num_threads = torch.get_num_threads()
    if device == "cpu":
        # On a CPU the fused kernel is slower than the sum and the norm that it replaces.
        options.add_session_config_entry(
            "optimization.disable_specified_optimizers", "SkipLayerNormFusion"
        )
    if not getattr(torch.cpu, "_is_vnni_supported", bool)():
        # Without VNNI two int8 products are summed in 16 bits, which overflows unless this is set. With VNNI the option
        # would triple the time.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def widen(path: Path, out: Path) -> None:
    """Write an fp32 copy of a bf16 or fp16 graph with the same weight values; its weights go to `out` + `.data`."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    narrow, wide = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16), onnx.TensorProto.FLOAT
    model = onnx.load(str(path))
    graph = model.graph
    attributes = [(node, attribute) for node in graph.node for attribute in node.attribute]
    constants = [
        attribute.t for _, attribute in attributes if attribute.type == onnx.AttributeProto.TENSOR
    ]
    for tensor in (*graph.initializer, *constants):
        if tensor.data_type in narrow:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node, attribute in attributes:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow:
            attribute.i = wide
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in narrow:
            value.type.tensor_type.elem_type = wide
    onnx.save(model, str(out), save_as_external_data=True, location=f"{out.name}.data")


def save(model: Any, path: Path) -> None:
    """Write an ONNX graph, with the weights of a large one in a separate file."""
    import onnx

    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST_FILE
    weights = path.with_name(f"{path.name}.data")
    weights.unlink(missing_ok=True)
    onnx.save(
        model,
        str(path),
        save_as_external_data=external,
        location=weights.name,
        size_threshold=1024,
    )


def run_graph(model: Any, feeds: Sequence[Mapping[str, np.ndarray]]) -> Iterator[dict[str, Any]]:
    """Yield the outputs of an ONNX graph on the CPU for each feed."""
    with tempfile.TemporaryDirectory() as scratch:
        # Models beyond two gigabytes must be files.
        save(model, Path(scratch, "graph.onnx"))
        session = _cpu_session(Path(scratch, "graph.onnx"))
    names = [output.name for output in session.get_outputs()]
    for feed in feeds:
        yield dict(zip(names, session.run(names, dict(feed)), strict=True))


def time_in_turn(
    paths: Sequence[Path], feed: Mapping[str, np.ndarray], runs: int = 9
) -> list[float]:
    """Return the median time in milliseconds of each graph on the CPU, the graphs run in turn."""
    import numpy as np

    sessions = [_cpu_session(path) for path in paths]
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(1 + runs):
        for session, durations in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.run(None, dict(feed))
            durations.append(1000 * (time.perf_counter() - started))
    # The first run of a shape allocates.
    return [round(float(np.median(durations[1:])), 3) for durations in times]


def _cpu_session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(
        str(path), session_options(), providers=["CPUExecutionProvider"]
    )
