"""The `rank` model: encoded images and captions to scores and orders, on Triton's Python backend.

Inputs, with a leading batch dimension: `images` `[B, I]` file contents, `captions` `[B, C]` UTF-8.
Outputs: `scores` `[B, I, C]`, `caption_order` `[B, I, C]`, `image_order` `[B, C, I]`, `reused` `[B, I]`.
The graphs are models of the same server. `xfm_fast.tasks.ranking` batches requests and caches image memories.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
from torch import Tensor

from xfm_fast.errors import DataError, ExportError, InputError, XFMError
from xfm_fast.tasks.ranking import Query, Ranker, Ranking
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

from ..manifest import GraphRecord
from ..runtimes import LoadedGraph, RunFunction, Runtime
from ..session import Session, SessionRanks
from ..slots import Slot
from . import TOKENIZER_FILE

# Limits of an encoded image, and of a caption before the official cut to 30 words.
_IMAGE_BYTES, _CAPTION_CHARACTERS = 32 << 20, 2000


class TritonPythonModel:
    """Answers rank requests; the parameters of `config.pbtxt` hold prefix, limits and cache size."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read manifest and tokenizer; graph models may load later, so they run with the first request."""
        parameters = json.loads(args["model_config"])["parameters"]
        values = {name: value["string_value"] for name, value in parameters.items()}
        folder = Path(args["model_repository"], args["model_version"])
        device = (
            f"cuda:{args['model_instance_device_id']}"
            if args["model_instance_kind"] == "GPU"
            else "cpu"
        )
        self.limits = {
            "images": int(values["most_images"]),
            "captions": int(values["most_captions"]),
        }
        self.tokens = int(values["tokens"])
        try:
            self.session = Session(folder, ServerRuntime(values["prefix"], torch.device(device)))
            self.tokenizer = CaptionTokenizer.from_files(folder / TOKENIZER_FILE)
            self.ranker = Ranker(SessionRanks(self.session), int(values["cache_mb"]) << 20)
        except XFMError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Rank all requests together; an invalid request gets its own error."""
        parsed: list[list[Query] | XFMError] = []
        for request in requests:
            names = ("images", "captions")
            rows = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names]
            try:
                if len(rows[0]) != len(rows[1]):
                    raise InputError(
                        f"images have {len(rows[0])} rows and captions {len(rows[1])}; give as many"
                    )
                parsed.append([self.query(*map(list, pair)) for pair in zip(*rows, strict=True)])
            except XFMError as error:
                parsed.append(error)
        queries = [query for each in parsed if isinstance(each, list) for query in each]
        try:
            if queries and not self.session.ready:
                self.session.warm_up()
            ranked = iter(self.ranker.rank(queries))
        except Exception as error:  # the model survives any failure of its requests
            return [_failed(each if isinstance(each, XFMError) else error) for each in parsed]
        return [
            _failed(each) if isinstance(each, XFMError) else _response([next(ranked) for _ in each])
            for each in parsed
        ]

    def query(self, images: Sequence[bytes], captions: Sequence[bytes]) -> Query:
        """The query of a request, captions cleaned and truncated as in the official evaluation."""
        for (noun, most), items in zip(self.limits.items(), (images, captions), strict=True):
            if not 1 <= len(items) <= most:
                raise InputError(f"the request has {len(items)} {noun}; give 1 to {most}")
        for number, content in enumerate(images):
            if len(content) > _IMAGE_BYTES:
                raise InputError(
                    f"image {number} has {len(content):,} bytes; give at most {_IMAGE_BYTES:,}"
                )
        pictures = tuple(
            self.ranker.picture(content, f"image {number}") for number, content in enumerate(images)
        )
        texts = []
        for number, caption in enumerate(captions):
            try:
                text = caption.decode()
                if len(text) > _CAPTION_CHARACTERS:
                    most = f"{_CAPTION_CHARACTERS:,}"
                    raise InputError(
                        f"caption {number} has {len(text):,} characters; give at most {most}"
                    )
                texts.append(pre_caption(text))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"caption {number} is not UTF-8 ({error}); encode it in UTF-8"
                ) from None
            except DataError as error:
                raise DataError(f"caption {number}: {error}") from None
        return Query(pictures, tuple(map(tuple, self.tokenizer.encode_ids(texts, self.tokens))))


class ServerRuntime(Runtime):
    """Graphs that are the models `<prefix>_<graph>` of the server."""

    def __init__(self, prefix: str, device: torch.device) -> None:
        self.description, self.device, self._prefix = (
            f"models {prefix}_* of the server ({device})",
            device,
            prefix,
        )

    def load(self, record: GraphRecord, path: Path) -> LoadedGraph:
        """See `Runtime.load`."""
        name, outputs = f"{self._prefix}_{record.name}", [output.name for output in record.outputs]
        gpu = self.device.type == "cuda"
        memory = pb_utils.TRITONSERVER_MEMORY_GPU if gpu else pb_utils.TRITONSERVER_MEMORY_CPU

        def run(
            inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]
        ) -> dict[str, Tensor]:
            response = pb_utils.InferenceRequest(
                model_name=name,
                requested_output_names=outputs,
                inputs=[
                    pb_utils.Tensor.from_dlpack(each, value.contiguous())
                    for each, value in inputs.items()
                ],
                preferred_memory=pb_utils.PreferredMemory(memory, self.device.index or 0),
            ).exec()
            if response.has_error():
                raise ExportError(
                    f"model {name!r} failed ({response.error().message()}); see the server's log"
                )
            # A copy, because the server reuses the memory of its outputs.
            return {
                tensor.name(): torch.from_dlpack(tensor.to_dlpack()).to(self.device, copy=True)
                for tensor in response.output_tensors()
            }

        return RunFunction(run)


def _failed(error: Exception) -> Any:
    # Status 400 over HTTP instead of 500; releases before 23.09 have no codes.
    invalid = getattr(pb_utils.TritonError, "INVALID_ARG", None)
    code = () if invalid is None or not isinstance(error, DataError | InputError) else (invalid,)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), *code))


def _response(answers: Sequence[Ranking | XFMError]) -> Any:
    if errors := [answer for answer in answers if isinstance(answer, XFMError)]:
        return _failed(errors[0])
    names = ("scores", "caption_order", "image_order", "reused")
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor(name, torch.stack([getattr(each, name) for each in answers]).numpy())
            for name in names
        ]
    )
