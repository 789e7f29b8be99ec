"""A graph of an export as a model on Triton's Python backend: tensors in, tensors out, without copies of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
from torch import Tensor

from xfm_fast.errors import XFMError
from xfm_fast.export.session import Session


class TritonPythonModel:
    """Runs one graph in a `Session`; the parameters of `config.pbtxt` name graph, folder and device."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the export and compare it with its manifest; a model that does not match is not loaded."""
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        folder = Path(args["model_repository"], args["model_version"], given["export_folder"])
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        try:
            self.session = Session.load(folder, given["runtime"], None if given["device"] == "auto" else device)
            self.graph = self.session.require(given["graph"])
        except XFMError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None
        record = self.session.manifest.graph(self.graph)
        self.inputs = [tensor.name for tensor in record.inputs]
        self.outputs = [tensor.name for tensor in record.outputs]
        self.batched = config["max_batch_size"] > 0

    def execute(self, requests: list[Any]) -> list[Any]:
        """Requests of the same sizes run as one batch; what is wrong with one is its own error."""
        responses: list[Any] = [None] * len(requests)
        alike: dict[Any, list[int]] = {}
        given: list[dict[str, Tensor]] = []
        for place, request in enumerate(requests):
            tensors = {
                name: torch.from_dlpack(pb_utils.get_input_tensor_by_name(request, name).to_dlpack())
                for name in self.inputs
            }
            given.append(tensors)
            shapes = tuple(value.shape[1:] for value in tensors.values())
            alike.setdefault(shapes if self.batched else place, []).append(place)
        for places in alike.values():
            for place, response in zip(places, self._answers([given[place] for place in places]), strict=True):
                responses[place] = response
        return responses

    def _answers(self, given: list[dict[str, Tensor]]) -> list[Any]:
        joined = given[0]
        if len(given) > 1:
            joined = {name: torch.cat([tensors[name] for tensors in given]) for name in self.inputs}
        try:
            made = self.session.run(self.graph, joined)
        except Exception as error:  # the model outlives whatever a request does to it
            if len(given) > 1:
                return [response for each in given for response in self._answers([each])]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{self.graph}: {error}"))]
        rows = [next(iter(tensors.values())).shape[0] for tensors in given]
        parts = {name: made[name].split(rows) for name in self.outputs}
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor.from_dlpack(name, parts[name][number].contiguous()) for name in self.outputs]
            )
            for number in range(len(given))
        ]
