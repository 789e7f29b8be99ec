"""The `rank` model on Triton's Python backend: from encoded images and captions to scores and orders.

Inputs, with a leading batch dimension: `images` `[B, I]` file contents, `captions` `[B, C]` UTF-8.
Outputs: `scores` `[B, I, C]`, `caption_order` `[B, I, C]`, `image_order` `[B, C, I]`, `reused` `[B, I]`.
The graphs are models of the same server. `xfm_fast.tasks.ranking` batches requests and caches image memories.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
from torch import Tensor

from xfm_fast.errors import DataError, ExportError, InputError, XFMError
from xfm_fast.tasks.ranking import Query, Ranker, Ranking
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

from ..manifest import GraphRecord
from ..runtimes import Runtime
from ..session import Session
from ..session.tasks import SessionRanks
from ..slots import Slot
from . import TOKENIZER_FILE

if TYPE_CHECKING:
    from ..runtimes import RunGraph

# Limits of an encoded image, and of a caption before the official cut to 30 words.
_IMAGE_BYTES, _CAPTION_CHARACTERS = 32 << 20, 2000


class TritonPythonModel:
    """Answers rank requests; the parameters of `config.pbtxt` hold prefix, limits and cache size."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read manifest and tokenizer; graph models may load later, so they run with the first request."""
        parameters = json.loads(args["model_config"])["parameters"]
        values = {name: value["string_value"] for name, value in parameters.items()}
        folder = Path(args["model_repository"], args["model_version"])
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
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
        """Rank all requests together; an invalid request is answered by its error."""
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
        queries = [query for rows in parsed if isinstance(rows, list) for query in rows]
        try:
            if queries and not self.session.ready:
                self.session.warm_up()
            ranked = iter(self.ranker.rank(queries))
        except Exception as error:  # the model survives any failure of its requests
            return [_failed(rows if isinstance(rows, XFMError) else error) for rows in parsed]
        responses = []
        for rows in parsed:
            if isinstance(rows, XFMError):
                responses.append(_failed(rows))
            else:
                responses.append(_response([next(ranked) for _ in rows]))
        return responses

    def query(self, images: Sequence[bytes], captions: Sequence[bytes]) -> Query:
        """Build the query of a request, captions cleaned and cut as in the official evaluation."""
        for (noun, limit), items in zip(self.limits.items(), (images, captions), strict=True):
            if not 1 <= len(items) <= limit:
                raise InputError(f"the request has {len(items)} {noun}; give 1 to {limit}")
        for index, content in enumerate(images):
            if len(content) > _IMAGE_BYTES:
                raise InputError(
                    f"image {index} has {len(content):,} bytes; give at most {_IMAGE_BYTES:,}"
                )
        pictures = tuple(
            self.ranker.picture(content, f"image {index}") for index, content in enumerate(images)
        )
        texts = []
        for index, caption in enumerate(captions):
            try:
                text = caption.decode()
                if len(text) > _CAPTION_CHARACTERS:
                    limit = f"{_CAPTION_CHARACTERS:,}"
                    raise InputError(
                        f"caption {index} has {len(text):,} characters; give at most {limit}"
                    )
                texts.append(pre_caption(text))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"caption {index} is not UTF-8 ({error}); encode it in UTF-8"
                ) from None
            except DataError as error:
                raise DataError(f"caption {index}: {error}") from None
        return Query(pictures, tuple(map(tuple, self.tokenizer.encode_ids(texts, self.tokens))))


class ServerRuntime(Runtime):
    """Graphs that are the models `<prefix>_<graph>` of the server."""

    def __init__(self, prefix: str, device: torch.device) -> None:
        self.description = f"models {prefix}_* of the server ({device})"
        self.device, self._prefix = device, prefix

    def load(self, record: GraphRecord, path: Path) -> RunGraph:
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
                    pb_utils.Tensor.from_dlpack(tensor, value.contiguous())
                    for tensor, value in inputs.items()
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

        return run


def _failed(error: Exception) -> Any:
    """Return the response of a request that failed."""
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
            pb_utils.Tensor(name, torch.stack([getattr(row, name) for row in answers]).numpy())
            for name in names
        ]
    )
