"""From encoded images and captions to scores and orders, on Triton's Python backend; graphs are the server's models.

Inputs, with a leading batch dimension: `images` `[B, I]` contents of files, `captions` `[B, C]` UTF-8.
Outputs: `scores` `[B, I, C]`, `caption_order` `[B, I, C]`, `image_order` `[B, C, I]`, `reused` `[B, I]`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils  # pyright: ignore[reportMissingImports]
from torch import Tensor

from xfm_fast.errors import ExportError, XFMError
from xfm_fast.export.model_repository.ranking import Ranker, ServedRuntime
from xfm_fast.export.request import RankLimits
from xfm_fast.export.session import Session
from xfm_fast.tasks.ranking import Query, Ranking
from xfm_fast.tokenizer import CaptionTokenizer


class TritonPythonModel:
    """Answers rank requests; the parameters of `config.pbtxt` hold folder, names of models and limits."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read manifest and tokenizer. Models of graphs are asked when a request comes; none may be loaded yet."""
        parameters = json.loads(args["model_config"])["parameters"]
        given = {name: value["string_value"] for name, value in parameters.items()}
        folder = Path(args["model_repository"], args["model_version"], given["export_folder"])
        device = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        self.device = torch.device(device)
        limits = RankLimits(
            images=int(given["most_images"]),
            captions=int(given["most_captions"]),
            image_bytes=int(given["most_image_bytes"]),
            caption_characters=int(given["most_caption_characters"]),
            tokens=int(given["most_tokens"]),
        )
        try:
            self.session = Session(folder, ServedRuntime(self._infer, given["prefix"], self.device))
            tokenizer = CaptionTokenizer.from_files(folder / given["tokenizer"])
            self.ranker = Ranker(self.session, tokenizer, limits, int(given["cache_bytes"]))
        except XFMError as error:
            raise pb_utils.TritonModelException(f"{args['model_name']}: {error}") from None
        self.metrics = _Metrics({"model": args["model_name"], "version": args["model_version"]})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Requests are answered together; what is wrong with one is its own error."""
        parsed = [self._queries(request) for request in requests]
        queries = [query for found in parsed if isinstance(found, list) for query in found]
        try:
            if queries and not self.session.ready:
                self.session.warm_up()
            ranked = self.ranker.rank(queries)
            self.metrics.count(ranked, self.ranker.cache.nbytes)
            answers = iter(ranked)
        except Exception as error:  # the model outlives whatever happens to its requests
            return [_failed(found if isinstance(found, XFMError) else error) for found in parsed]
        return [
            _failed(found) if isinstance(found, XFMError) else _response([next(answers) for _ in found])
            for found in parsed
        ]

    def _queries(self, request: Any) -> list[Query] | XFMError:
        images, captions = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in _INPUTS)
        try:
            if len(images) != len(captions):
                raise ExportError(
                    f"the request has {len(images)} rows of images and {len(captions)} of captions; give as many"
                )
            return [self.ranker.query(*map(list, pair)) for pair in zip(images, captions, strict=True)]
        except XFMError as error:
            return error

    def _infer(self, model: str, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> dict[str, Tensor]:
        on_gpu = self.device.type == "cuda"
        memory = pb_utils.TRITONSERVER_MEMORY_GPU if on_gpu else pb_utils.TRITONSERVER_MEMORY_CPU
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=list(outputs),
            inputs=[pb_utils.Tensor.from_dlpack(name, value.contiguous()) for name, value in inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(memory, self.device.index or 0),
        )
        response = request.exec()
        if response.has_error():
            raise ExportError(f"model {model!r} failed ({response.error().message()}); see the log of the server")
        # What comes back lies in memory that the server lends; it is wanted back soon, and memories are kept for long.
        return {
            tensor.name(): torch.from_dlpack(tensor.to_dlpack()).to(self.device, copy=True)
            for tensor in response.output_tensors()
        }


class _Metrics:
    """What the server tells at its /metrics beside its own numbers."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        def metric(name: str, description: str, kind: str = "COUNTER") -> Any:
            family = pb_utils.MetricFamily
            made = family(name=f"xfm_rank_{name}", description=description, kind=getattr(family, kind))
            return made, made.Metric(labels=dict(labels))

        # A metric lives as long as its family.
        self._images = metric("images_total", "Images of answered rank requests")
        self._reused = metric("images_reused_total", "Images whose memory was there from an earlier request")
        self._captions = metric("captions_total", "Captions of answered rank requests")
        self._kept = metric("memory_bytes", "Bytes of image memories that are kept between requests", "GAUGE")

    def count(self, answers: Sequence[Ranking | XFMError], kept: int) -> None:
        """Count what was answered, and tell how much is kept."""
        rankings = [answer for answer in answers if isinstance(answer, Ranking)]
        self._images[1].increment(sum(len(ranking.reused) for ranking in rankings))
        self._reused[1].increment(sum(int(ranking.reused.sum()) for ranking in rankings))
        self._captions[1].increment(sum(ranking.scores.shape[1] for ranking in rankings))
        self._kept[1].set(kept)


_INPUTS = ("images", "captions")


def _failed(error: Exception) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))


def _response(answers: Sequence[Ranking | XFMError]) -> Any:
    rankings = [answer for answer in answers if isinstance(answer, Ranking)]
    if len(rankings) < len(answers):
        return _failed(next(answer for answer in answers if isinstance(answer, XFMError)))
    made = {
        "scores": [ranking.scores for ranking in rankings],
        "caption_order": [ranking.caption_order for ranking in rankings],
        "image_order": [ranking.image_order for ranking in rankings],
        "reused": [ranking.reused for ranking in rankings],
    }
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, torch.stack(values).numpy()) for name, values in made.items()]
    )
