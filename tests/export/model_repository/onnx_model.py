"""A Python model of Triton that runs the ONNX file of its version folder, as the platform `onnxruntime_onnx` does."""

from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        (path,) = Path(args["model_repository"], args["model_version"]).glob("*.onnx")
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        names = [tensor.name for tensor in self.session.get_inputs()]
        feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names}
        try:
            results: Any = self.session.run(None, feed)
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        outputs = zip(self.session.get_outputs(), results, strict=True)
        return pb_utils.InferenceResponse([pb_utils.Tensor(output.name, value) for output, value in outputs])
