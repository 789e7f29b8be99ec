"""A stand-in for Triton's Python backend: loads the models of a repository and runs requests in this process.

`FakeServer(repository)` reads every `config.pbtxt`, checks inputs and outputs against it as Triton does, and gives
each `model.py` the module `triton_python_backend_utils`. Models without one run by `onnx_model.py`.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import to_dlpack

from tests.export.model_repository import pbtxt

_NUMPY = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT64": np.int64, "TYPE_BOOL": np.bool_}


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

    @property
    def shape(self) -> list[int]:
        return [*self._values.shape]


class TritonError:
    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class TritonModelException(Exception):
    pass


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors or [], error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors


class FakeServer:
    """The models of a repository, loaded.

    Attributes:
        calls: names of the models that were run, in order.
    """

    def __init__(self, repository: Path, monkeypatch: pytest.MonkeyPatch, only: str | None = None) -> None:
        self.calls: list[str] = []
        self.models: dict[str, Any] = {}
        self.configs: dict[str, dict[str, Any]] = {}
        module = types.ModuleType("triton_python_backend_utils")
        server = self

        class InferenceRequest:
            def __init__(self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], **_: Any):
                self.model, self.wanted, self.inputs = model_name, requested_output_names, inputs

            def exec(self) -> InferenceResponse:
                response = server.run(self.model, [self])[0]
                if not response.has_error():
                    found = {tensor.name(): tensor for tensor in response.output_tensors()}
                    return InferenceResponse([found[name] for name in self.wanted])
                return response

        self.request = InferenceRequest
        for name, value in {
            "Tensor": Tensor,
            "TritonError": TritonError,
            "TritonModelException": TritonModelException,
            "InferenceResponse": InferenceResponse,
            "InferenceRequest": InferenceRequest,
            "PreferredMemory": lambda memory, device: None,
            "TRITONSERVER_MEMORY_GPU": 1,
            "TRITONSERVER_MEMORY_CPU": 0,
            "get_input_tensor_by_name": lambda request, name: next(t for t in request.inputs if t.name() == name),
        }.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
        # Imported once more by each server, with this module.
        monkeypatch.delitem(sys.modules, "xfm_fast.export.model_repository.rank", raising=False)
        for folder in sorted(path for path in repository.iterdir() if path.is_dir()):
            if only is None or folder.name == only:
                self._load(folder)

    def _load(self, folder: Path) -> None:
        config = pbtxt.read((folder / "config.pbtxt").read_text(encoding="ascii"))
        script = folder / "1" / "model.py"
        script = script if script.exists() else Path(__file__).with_name("onnx_model.py")
        spec = importlib.util.spec_from_file_location(f"served_{folder.name}", script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        sent = config | {"parameters": {key: {"string_value": text} for key, text in pbtxt.parameters(config).items()}}
        model.initialize(
            {
                "model_config": json.dumps(sent),
                "model_repository": str(folder),
                "model_version": "1",
                "model_name": folder.name,
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
            }
        )
        self.models[folder.name], self.configs[folder.name] = model, config

    def run(self, name: str, requests: list[Any]) -> list[InferenceResponse]:
        self.calls.append(name)
        if name not in self.models:
            return [InferenceResponse(error=TritonError(f"model {name} is not ready")) for _ in requests]
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
        batched = config["max_batch_size"] > 0
        expected = {tensor["name"]: tensor for tensor in config[side]}
        assert {tensor.name() for tensor in tensors} == set(expected)
        for tensor in tensors:
            spec = expected[tensor.name()]
            dims = tensor.shape[1:] if batched else tensor.shape
            assert len(dims) == len(spec["dims"]), (name, tensor.name(), tensor.shape)
            assert all(want in (-1, size) for want, size in zip(spec["dims"], dims, strict=True)), tensor.name()
            if batched:
                assert 1 <= tensor.shape[0] <= config["max_batch_size"]
            if spec["data_type"] in _NUMPY:
                assert tensor.as_numpy().dtype == _NUMPY[spec["data_type"]], tensor.name()

    def rank(self, *asked: tuple[list[bytes], list[bytes]]) -> list[dict[str, np.ndarray] | str]:
        """Requests to the rank model that come together; results by name without the batch, or the error."""
        requests = [
            self.request(
                "",
                [],
                [Tensor(name, np.array([[*values, None]], dtype=object)[:, :-1])
                 for name, values in zip(("images", "captions"), pair, strict=True)],
            )
            for pair in asked
        ]  # fmt: skip
        name = next(name for name in self.models if name.endswith("_rank"))
        answers: list[dict[str, np.ndarray] | str] = []
        for response in self.run(name, requests):
            error = response.error()
            if error is not None:
                answers.append(error.message())
            else:
                answers.append({tensor.name(): tensor.as_numpy()[0] for tensor in response.output_tensors()})
        return answers
