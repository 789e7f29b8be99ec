"""The `rank` model: encoded images and captions to scores and orders, on Triton's Python backend.

Inputs, with a leading batch dimension: `images` `[B, I]` file contents, `captions` `[B, C]` UTF-8.
Outputs: `scores` `[B, I, C]`, `caption_order` `[B, I, C]`, `image_order` `[B, C, I]`, `reused` `[B, I]`.
The graphs are models of the same server. `xfm_fast.tasks.ranking` batches requests and caches image memories.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
from torch import Tensor

from xfm_fast.errors import DataError, ExportError, InputError, XFMError
from xfm_fast.tasks import ranking
from xfm_fast.tasks.ranking import Query, Ranking
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

from ..manifest import GraphRecord
from ..runtimes import Runtime
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
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        limits = Limits(*(int(values[name]) for name in ("most_images", "most_captions", "tokens")))
        try:
            self.session = Session(folder, ServerRuntime(values["prefix"], torch.device(device)))
            tokenizer = CaptionTokenizer.from_files(folder / TOKENIZER_FILE)
            self.ranker = Ranker(self.session, tokenizer, limits, int(values["cache_mb"]) << 20)
        except XFMError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Rank all requests together; an invalid request gets its own error."""
        parsed = [self._queries(request) for request in requests]
        queries = [query for found in parsed if isinstance(found, list) for query in found]
        try:
            if queries and not self.session.ready:
                self.session.warm_up()
            ranked = self.ranker.rank(queries)
        except Exception as error:  # the model survives any failure of its requests
            return [_failed(found if isinstance(found, XFMError) else error) for found in parsed]
        answers = iter(ranked)
        return [
            _failed(found) if isinstance(found, XFMError) else _response([next(answers) for _ in found])
            for found in parsed
        ]

    def _queries(self, request: Any) -> list[Query] | XFMError:
        rows = [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("images", "captions")]
        try:
            if len({len(each) for each in rows}) > 1:
                raise ExportError(f"images have {len(rows[0])} rows and captions {len(rows[1])}; give as many")
            return [self.ranker.query(*map(list, pair)) for pair in zip(*rows, strict=True)]
        except XFMError as error:
            return error


class Limits(NamedTuple):
    """Limits of a request; `tokens` is the length of a caption, special tokens included."""

    images: int
    captions: int
    tokens: int


class Ranker(ranking.Ranker):
    """Validates requests and ranks them over a session with `vision`, `text`, `image_memory` and `fusion`."""

    def __init__(self, session: Session, tokenizer: CaptionTokenizer, limits: Limits, cache_bytes: int) -> None:
        super().__init__(SessionRanks(session), cache_bytes)
        self.tokenizer, self.limits = tokenizer, limits

    def query(self, images: Sequence[bytes], captions: Sequence[bytes]) -> Query:
        """The query of a request, captions cleaned and truncated as in the official evaluation."""
        for noun, items, most in zip(("images", "captions"), (images, captions), self.limits[:2], strict=True):
            if not 1 <= len(items) <= most:
                raise InputError(f"the request has {len(items)} {noun}; give 1 to {most}")
        for number, content in enumerate(images):
            if len(content) > _IMAGE_BYTES:
                raise InputError(f"image {number} has {len(content):,} bytes; give at most {_IMAGE_BYTES:,}")
        pictures = tuple(self.picture(content, f"image {number}") for number, content in enumerate(images))
        texts = [self._clean(number, caption) for number, caption in enumerate(captions)]
        return Query(pictures, tuple(map(tuple, self.tokenizer.encode_ids(texts, self.limits.tokens))))

    def _clean(self, number: int, caption: bytes) -> str:
        try:
            text = caption.decode()
            if len(text) > _CAPTION_CHARACTERS:
                raise InputError(f"caption {number} has {len(text):,} characters; give at most {_CAPTION_CHARACTERS:,}")
            return pre_caption(text)
        except UnicodeDecodeError as error:
            raise DataError(f"caption {number} is not UTF-8 ({error}); encode it in UTF-8") from None
        except DataError as error:
            raise DataError(f"caption {number}: {error}") from None


class ServerRuntime(Runtime):
    """Graphs that are the models `<prefix>_<graph>` of the server."""

    def __init__(self, prefix: str, device: torch.device) -> None:
        self.description, self.device, self._prefix = f"models {prefix}_* of the server ({device})", device, prefix

    def load(self, record: GraphRecord, path: Path) -> ServerGraph:
        return ServerGraph(f"{self._prefix}_{record.name}", [out.name for out in record.outputs], self.device)


class ServerGraph:
    """A `LoadedGraph` in the server."""

    def __init__(self, name: str, outputs: list[str], device: torch.device) -> None:
        self._name, self._outputs, self._device = name, outputs, device

    def run(self, inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        on_gpu = self._device.type == "cuda"
        memory = pb_utils.TRITONSERVER_MEMORY_GPU if on_gpu else pb_utils.TRITONSERVER_MEMORY_CPU
        response = pb_utils.InferenceRequest(
            model_name=self._name,
            requested_output_names=self._outputs,
            inputs=[pb_utils.Tensor.from_dlpack(name, value.contiguous()) for name, value in inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(memory, self._device.index or 0),
        ).exec()
        if response.has_error():
            raise ExportError(f"model {self._name!r} failed ({response.error().message()}); see the server's log")
        # A copy, because the server reuses the memory of its outputs.
        return {
            tensor.name(): torch.from_dlpack(tensor.to_dlpack()).to(self._device, copy=True)
            for tensor in response.output_tensors()
        }


def _failed(error: Exception) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))


def _response(answers: Sequence[Ranking | XFMError]) -> Any:
    for answer in answers:
        if isinstance(answer, XFMError):
            return _failed(answer)
    names = ("scores", "caption_order", "image_order", "reused")
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, torch.stack([getattr(each, name) for each in answers]).numpy()) for name in names]
    )
