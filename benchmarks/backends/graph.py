"""A module of any library in ONNX Runtime, OpenVINO, torch.compile or torchao, behind the same call.

For the runtimes, one call of the untouched module is exported; a copy of the model then takes that module's forward
from the runtime. What surrounds it (tokenising, pooling, conversions) stays the same Python for every backend.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import UnavailableError, needs
from xfm_fast.export.onnx import require_onnx
from xfm_fast.export.runtimes.openvino import core as openvino_core

Infer = Callable[[dict[str, Any]], list[Any]]
Load = Callable[[Path], Infer]


class ExportedCall:
    """The graph of a module's first call by `call`, written unless it exists, and the structure of its outputs.

    Raises `UnavailableError` without the packages, and whatever PyTorch's exporter raises.
    """

    def __init__(self, module: nn.Module, call: Callable[[], Any], path: Path) -> None:
        require_onnx()
        inputs = _tensors_of_call(module, call)
        self.path, self.names = path, [*inputs]
        with torch.no_grad():
            self._structure = pytree.tree_structure(module(**inputs))
        # Batch and, of ids and masks, length are dynamic.
        shapes = {}
        for name, tensor in inputs.items():
            dynamic = min(tensor.ndim, 2 if tensor.ndim < 4 else 1)
            shapes[name] = dict.fromkeys(range(dynamic), torch.export.Dim.AUTO)
        if path.exists():
            return
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with torch.no_grad(), warnings.catch_warnings(action="ignore"), quiet[0], quiet[1]:
            torch.onnx.export(
                module,
                (),
                str(path),
                kwargs=inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=self.names,
                verbose=False,
            )

    def bind(self, model: Any, module_of: Callable[[Any], nn.Module], load: Load) -> Any:
        """Return a copy of the model in which a runtime computes the module."""
        bound = copy.deepcopy(model)
        module, infer = module_of(bound), load(self.path)
        names = _parameter_names(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = dict(zip(names, args, strict=False)) | kwargs
            arrays = infer({name: inputs[name].numpy() for name in self.names})
            return pytree.tree_unflatten(map(torch.from_numpy, arrays), self._structure)

        module.__dict__["forward"] = forward
        return bound


def onnx_runtime(path: Path) -> Infer:
    """Load a graph in ONNX Runtime with its default options and as many threads as PyTorch."""
    with needs("export"):
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda inputs: [*session.run(None, inputs)]


def onnx_runtime_int8(path: Path) -> Infer:
    """Load a graph whose linear layers ONNX Runtime rounds to int8, activations as they come."""
    with needs("export"):
        from onnxruntime.quantization import QuantType, quantize_dynamic

    rounded = path.with_suffix(".int8.onnx")
    # Its warning about a step before would come at every call.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            quantize_dynamic(str(path), str(rounded), weight_type=QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    return onnx_runtime(rounded)


def openvino(path: Path, precision: str = "f32") -> Infer:
    """Load a graph in OpenVINO, for latency, with as many threads as PyTorch; `precision` is `f32` or `bf16`."""
    with needs("openvino"):
        core = openvino_core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("OpenVINO has no bf16 arithmetic on this processor")
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(str(path), "CPU", options)
    request = compiled.create_infer_request()
    return lambda inputs: list(request.infer(inputs, share_inputs=True).values())


class Runtime(NamedTuple):
    """A library that runs exported graphs, in one dtype; `label` is for readers."""

    name: str
    dtype: str
    label: str
    load: Load


RUNTIMES = (
    Runtime("onnxruntime", "fp32", "ONNX Runtime", onnx_runtime),
    Runtime("openvino", "fp32", "OpenVINO", openvino),
    Runtime("openvino", "bf16", "OpenVINO", partial(openvino, precision="bf16")),
    Runtime("onnxruntime", "int8", "ONNX Runtime", onnx_runtime_int8),
)


def compile_module(module: nn.Module) -> None:
    """Compile a module by `torch.compile`, in place, at its first call."""
    # Not the module itself, of whose attributes its callers need more than a call.
    module.__dict__["forward"] = torch.compile(module.forward)


def quantize_module(module: nn.Module) -> None:
    """Round the linear layers of a module to int8 by torchao, in place, and compile it as torchao's guide advises."""
    with needs("torchao"):
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    compile_module(module)


def _tensors_of_call(module: nn.Module, call: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the tensors with which `call` first calls a module, by name."""
    names, original, calls = _parameter_names(module), module.forward, list[dict[str, Tensor]]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if not calls:
            # A batch of one would be a constant of the graph.
            tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
            calls.append({name: torch.cat([x, x]) for name, x in tensors.items()})
        return original(*args, **kwargs)

    # Hooks would miss callers of `forward` itself, as sentence-transformers is.
    module.__dict__["forward"] = forward
    try:
        call()
    finally:
        del module.__dict__["forward"]
    return calls[0]


def _parameter_names(module: nn.Module) -> list[str]:
    return [*inspect.signature(module.forward).parameters]
