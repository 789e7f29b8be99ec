"""A stand-in for Triton's Python backend: loads the models of a repository and runs requests in this process.

`FakeServer(repository)` reads every `config.pbtxt`, checks inputs and outputs against it as Triton does, gives each
`model.py` the module `triton_python_backend_utils`, and runs ONNX files by ONNX Runtime.
"""

import importlib.util
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils.dlpack import to_dlpack

# Fields of Triton's model_config.proto that are repeated, and the others that a configuration may have.
_REPEATED = {
    *(
        "input",
        "output",
        "dims",
        "instance_group",
        "profile",
        "model_warmup",
        "inputs",
        "parameters",
    ),
    *("preferred_batch_size", "graph_spec", "dim"),
}
_SINGLE = {
    *(
        "name",
        "platform",
        "backend",
        "default_model_filename",
        "max_batch_size",
        "data_type",
        "allow_ragged_batch",
    ),
    *(
        "dynamic_batching",
        "max_queue_delay_microseconds",
        "count",
        "kind",
        "batch_size",
        "key",
        "value",
        "zero_data",
    ),
    *("string_value", "optimization", "cuda", "graphs", "graph_lower_bound"),
}
_NUMPY = {
    "TYPE_FP32": np.float32,
    "TYPE_FP16": np.float16,
    "TYPE_INT64": np.int64,
    "TYPE_BOOL": np.bool_,
}


def read_config(lines: Iterator[str]) -> dict[str, Any]:
    """Parse a `config.pbtxt`; an unknown field, or a singular one that is given twice, is an error."""
    message: dict[str, Any] = {}
    for line in lines:
        if line.strip() == "}":
            break
        field = re.fullmatch(r"\s*(\w+)(?: \{|: (.*))", line)
        assert field is not None, line
        name, text = field.groups()
        value = (
            read_config(lines)
            if text is None
            else text
            if re.fullmatch(r"[A-Z]\w+", text)
            else json.loads(text)
        )
        assert name in _REPEATED or (name in _SINGLE and name not in message), line
        message[name] = [*message.get(name, []), value] if name in _REPEATED else value
    return message


class Tensor:
    def __init__(self, name: str, values: np.ndarray | torch.Tensor) -> None:
        self._name, self._values = name, values

    @classmethod
    def from_dlpack(cls, name: str, values: torch.Tensor) -> "Tensor":
        assert values.is_contiguous(), name
        return cls(name, values)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._values if isinstance(self._values, np.ndarray) else self._values.numpy()

    def to_dlpack(self) -> Any:
        return to_dlpack(torch.as_tensor(self._values))


class TritonError:
    INVALID_ARG = 3

    def __init__(self, text: str, code: int = 1) -> None:
        self.message, self.code = lambda: text, lambda: code


class TritonModelException(Exception):
    pass


class InferenceResponse:
    def __init__(
        self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None
    ) -> None:
        self.has_error, self.error = lambda: error is not None, lambda: error
        self.output_tensors = lambda: output_tensors or []


class OnnxModel:
    """The platform `onnxruntime_onnx`."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[InferenceResponse]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> InferenceResponse:
        feed = {tensor.name(): tensor.as_numpy() for tensor in request.inputs}
        try:
            results: Any = self.session.run(None, feed)
        except Exception as error:
            return InferenceResponse(error=TritonError(str(error)))
        outputs = zip(self.session.get_outputs(), results, strict=True)
        return InferenceResponse([Tensor(output.name, value) for output, value in outputs])


class FakeServer:
    """The models of a repository, loaded; `calls` are the names of the models that were run,
    in order, `codes` those of the latest errors."""

    def __init__(self, repository: Path, monkeypatch: pytest.MonkeyPatch, only: str = "") -> None:
        self.calls: list[str] = []
        self.models: dict[str, Any] = {}
        self.codes: list[int] = []
        self.configs: dict[str, dict[str, Any]] = {}
        module: Any = types.ModuleType("triton_python_backend_utils")
        server = self

        class InferenceRequest:
            def __init__(
                self,
                model_name: str,
                requested_output_names: list[str],
                inputs: list[Tensor],
                **_: Any,
            ):
                self.model, self.inputs = model_name, inputs

            def exec(self) -> InferenceResponse:
                return server.run(self.model, [self])[0]

        self.request = module.InferenceRequest = InferenceRequest
        module.Tensor, module.TritonError, module.InferenceResponse = (
            Tensor,
            TritonError,
            InferenceResponse,
        )
        module.TritonModelException, module.PreferredMemory = (
            TritonModelException,
            lambda memory, device: None,
        )
        module.TRITONSERVER_MEMORY_CPU, module.TRITONSERVER_MEMORY_GPU = range(2)
        module.get_input_tensor_by_name = lambda request, name: next(
            t for t in request.inputs if t.name() == name
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
        # Imported once more by each server, with this module.
        monkeypatch.delitem(sys.modules, "xfm_fast.export.model_repository.rank", raising=False)
        for folder in sorted(
            path for path in repository.iterdir() if path.is_dir() and path.name.endswith(only)
        ):
            self._load(folder)

    def _load(self, folder: Path) -> None:
        text = (folder / "config.pbtxt").read_text(encoding="ascii")
        config = self.configs[folder.name] = read_config(iter(text.splitlines()))
        if not (script := folder / "1" / "model.py").exists():
            self.models[folder.name] = OnnxModel(folder / "1" / config["default_model_filename"])
            return
        spec = importlib.util.spec_from_file_location(f"served_{folder.name}", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = self.models[folder.name] = module.TritonPythonModel()
        sent = config | {
            "parameters": {entry["key"]: entry["value"] for entry in config["parameters"]}
        }
        model.initialize(
            {
                "model_config": json.dumps(sent), "model_repository": str(folder), "model_version": "1",
                "model_name": folder.name, "model_instance_kind": "CPU", "model_instance_device_id": "0",
            }
        )  # fmt: skip

    def run(self, name: str, requests: list[Any]) -> list[InferenceResponse]:
        self.calls.append(name)
        for request in requests:
            self._check(name, "input", request.inputs)
        responses = self.models[name].execute(requests)
        assert len(responses) == len(requests)
        for response in responses:
            if not response.has_error():
                self._check(name, "output", response.output_tensors())
        return responses

    def _check(self, name: str, side: str, tensors: list[Tensor]) -> None:
        config = self.configs[name]
        limit = config["max_batch_size"]
        expected = {tensor["name"]: tensor for tensor in config[side]}
        assert {tensor.name() for tensor in tensors} == set(expected)
        for tensor in tensors:
            spec, shape = expected[tensor.name()], tensor.as_numpy().shape
            dims = shape[1:] if limit else shape
            assert len(dims) == len(spec["dims"]), (name, tensor.name(), shape)
            assert all(size in (-1, dim) for size, dim in zip(spec["dims"], dims, strict=True)), (
                tensor.name()
            )
            assert not limit or 1 <= shape[0] <= limit
            if spec["data_type"] in _NUMPY:
                assert tensor.as_numpy().dtype == _NUMPY[spec["data_type"]], tensor.name()

    def rank(self, *queries: tuple[list[bytes], list[bytes]]) -> list[dict[str, np.ndarray] | str]:
        """Requests to the rank model that come together; results by name without the batch, or the error."""
        requests = [
            self.request(
                "",
                [],
                [Tensor(name, np.array([[*values, None]], dtype=object)[:, :-1])
                 for name, values in zip(("images", "captions"), pair, strict=True)],
            )
            for pair in queries
        ]  # fmt: skip
        name = next(name for name in self.models if name.endswith("_rank"))
        responses = self.run(name, requests)
        self.codes = [
            error.code() for response in responses if (error := response.error()) is not None
        ]
        return [
            {tensor.name(): tensor.as_numpy()[0] for tensor in response.output_tensors()}
            if (error := response.error()) is None
            else error.message()
            for response in responses
        ]
