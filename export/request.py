"""Requests: every option of the export commands, as the library takes it.

This module imports no PyTorch, so `--help` is fast. Exporters validate the values before they read weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from annotated_types import Ge, Le

from xfm_fast.errors import InputError, UnavailableError

GraphName = Literal["vision", "text", "image_memory", "fusion", "match", "nlvr2", "decoder_memory", "decoder_step"]
ALL_GRAPHS: tuple[GraphName, ...] = get_args(GraphName)

DEFAULT_GRAPHS: tuple[GraphName, ...] = ("vision", "text", "image_memory", "fusion")
"""The graphs that a server composes; `match`, the whole model in one file, is opt-in."""

GRAPHS: tuple[GraphName, ...] = (*DEFAULT_GRAPHS, "match")
"""The graphs of a pretrained model; the other graphs belong to tasks."""

DType = Literal["fp32", "fp16", "bf16"]
Preset = Literal["base", "tiny"]

RuntimeName = Literal["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "aoti"]
RuntimeChoice = Literal["auto", RuntimeName]

Consumer = Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "openvino"]
Quantisation = Literal["int8", "fp8"]
HardwareCompatibility = Literal["ampere_plus", "same_compute_capability"]

BUDGET = 0.99
"""The least cosine of any output row with the model's, for exports with 8-bit GEMMs."""

BackendChoice = Literal["auto", "tensorrt", "onnxruntime", "python"]
Pipeline = Literal["rank", "graphs"]
ServedDevice = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class ModelSource:
    """The model to export, and the examples that verify its export.

    Attributes:
        checkpoint: Official .th/.pth, .safetensors, or a folder of save_pretrained.
        preset: Random weights of a model of this size, instead of a checkpoint.
        config: Official YAML or a JSON of sizes, for a checkpoint file that is not of base size.
        image_size: Interpolate position tables to this size.
        tokenizer: Folder of RoBERTa's vocab.json and merges.txt, or a tokenizer.json. [the checkpoint's]
        data: Images with captions to verify on, instead of the photographs: a folder, CSV, JSON lines or shard.
    """

    checkpoint: Path | None = None
    preset: Preset | None = None
    config: Path | None = None
    image_size: Annotated[int | None, Ge(1), Le(16384)] = None
    tokenizer: Path | None = None
    data: Path | None = None


@dataclass(frozen=True)
class ExportRequest:
    """Graphs of a model and their form.

    Attributes:
        dtype: Dtype of weights and arithmetic.
        graphs: vision, text, image_memory, fusion, match; for tasks nlvr2, decoder_memory, decoder_step; with commas.
            [all but match, or the graphs of the task]
        fixed: Axes of one size, for example batch=1,length=40. [all dynamic]
        all_tokens: fusion returns every token instead of token 0.
        packed: text and fusion take captions packed into rows, so that their cost follows the real tokens; by default
            captions are padded to the longest.
    """

    dtype: DType = "fp32"
    graphs: Sequence[str] | None = None
    fixed: Sequence[str] = ()
    all_tokens: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        # Validates both lists.
        _ = self.names, self.sizes

    @property
    def names(self) -> tuple[GraphName, ...] | None:
        """Names of the graphs; None for the default graphs of the model."""
        return None if self.graphs is None else parse_graphs(joined(self.graphs))

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the fixed axes; a program may pass a mapping."""
        given: Any = self.fixed
        return dict(given) if isinstance(given, Mapping) else parse_fixed(joined(given))


@dataclass(frozen=True)
class OnnxRequest(ExportRequest):
    """Graphs as ONNX files.

    Attributes:
        consumer: Library that reads the files.
        opset: ONNX opset, 20 to 24; by default 20 for fp32, and 23, which has attention, for 16 bits.
    """

    consumer: Consumer = "onnxruntime"
    opset: int | None = None


@dataclass(frozen=True)
class PackageRequest(ExportRequest):
    """Graphs as AOTInductor packages.

    Attributes:
        device: Device of this machine that runs the packages.
    """

    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class EngineRequest(ExportRequest):
    """Graphs as TensorRT engines.

    Attributes:
        dtype: Dtype of weights and arithmetic.
        opset: ONNX opset, 20 to 24; by default the best one for the builder.
        profile: Sizes that an engine accepts, name:axis=least..best..most, for example
            latency:batch=1,length=1..16..40; may be repeated. [latency for batches of one, bulk for up
            to 32]
        sm: Compute capabilities to build for, for example 80,89,120. [this machine's GPU]
        quantize: 8-bit GEMMs, with scales from --data or the photographs.
        budget: Least cosine of any output row with the model's. GEMMs that cost more stay in --dtype.
        level: Optimisation level of the builder; by default the builder's own.
        keep_onnx: Keep the ONNX graphs of the engines in OUT/onnx.
    """

    dtype: DType = "bf16"
    opset: int | None = None
    profile: Sequence[str] = ()
    sm: Sequence[str] = ()
    quantize: Quantisation | None = None
    budget: float = BUDGET
    level: Annotated[int | None, Ge(0), Le(5)] = None
    keep_onnx: bool = False

    @property
    def complete(self) -> TensorRTRequest:
        """The request with the options of TensorRT, at their defaults for TensorRT for RTX."""
        return self if isinstance(self, TensorRTRequest) else TensorRTRequest(**vars(self))


@dataclass(frozen=True)
class TensorRTRequest(EngineRequest):
    """Graphs as TensorRT engines, with the options that TensorRT for RTX lacks.

    Attributes:
        timing_cache: File of kernel timings, read before and written after a build: later builds are faster.
        version_compatible: Later versions of TensorRT run the engine (tensorrt_lean).
        hardware_compatible: Other GPUs run the engine too.
    """

    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility | None = None


@dataclass(frozen=True)
class RankLimits:
    """Limits of a request to the rank model of a repository."""

    images: int = 16
    captions: int = 1024
    image_bytes: int = 32 << 20  # of an encoded image
    caption_characters: int = 2000  # before the official cut to 30 words and `tokens` tokens
    tokens: int = 40  # special tokens included


@dataclass(frozen=True)
class ServedModels:
    """The models of a repository and how they run.

    Attributes:
        backend: Triton's backend for the graphs; python is a session of this package in Triton.
        pipeline: rank: a model from JPEG files and captions to scores too; graphs: none.
        prefix: Beginning of the names of the models.
        device: Device that the models run on.
        most_batch: Rows of a batch, for graphs that take any number.
        queue_delay: Microseconds that a request may wait for others.
        instances: Copies of each graph's model.
    """

    backend: BackendChoice = "auto"
    pipeline: Pipeline = "rank"
    prefix: str = "xfm"
    device: ServedDevice = "auto"
    most_batch: Annotated[int, Ge(1)] = 32
    queue_delay: Annotated[int, Ge(0)] = 500
    instances: Annotated[int, Ge(1)] = 1


@dataclass(frozen=True)
class RepositoryOptions(ServedModels):
    """A repository to make; `auto` is the first of Triton's backends that runs the export, and a GPU for engines.

    Attributes:
        cache_bytes: room for image memories that the rank model keeps between requests.
        limits: bounds of a rank request; `tokens` are cut to what the export takes.
    """

    cache_bytes: int = 1 << 30
    limits: RankLimits = field(default_factory=RankLimits)

    def check(self) -> None:
        """Compare the options with what there is.

        Raises:
            UnavailableError: a backend, pipeline or device that is not known.
            InputError: a number that is too small, or a prefix that cannot name models.
        """
        for name, value, choices in (
            ("backend", self.backend, get_args(BackendChoice)),
            ("pipeline", self.pipeline, get_args(Pipeline)),
            ("device", self.device, get_args(ServedDevice)),
        ):
            if value not in choices:
                raise UnavailableError(f"{name} {value!r} is unknown; choose from {', '.join(choices)}")
        if not re.fullmatch(r"[A-Za-z][\w-]*", self.prefix):
            raise InputError(f"prefix {self.prefix!r} cannot name models; use letters, digits, - and _")
        limits = self.limits
        for name, value, least in (
            ("most_batch", self.most_batch, 1),
            ("queue_delay", self.queue_delay, 0),
            ("instances", self.instances, 1),
            ("cache_bytes", self.cache_bytes, 0),
            ("limits.images", limits.images, 1),
            ("limits.captions", limits.captions, 1),
            ("limits.image_bytes", limits.image_bytes, 1),
            ("limits.caption_characters", limits.caption_characters, 1),
            ("limits.tokens", limits.tokens, 3),
        ):
            if value < least:
                raise InputError(f"{name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class RepositoryRequest(ServedModels):
    """A repository, in the words of a command line.

    Attributes:
        most_images: Limit of a rank request.
        most_captions: Limit of a rank request.
        cache_mb: Megabytes of image memories that the rank model keeps between requests.
    """

    most_images: Annotated[int, Ge(1)] = RankLimits.images
    most_captions: Annotated[int, Ge(1)] = RankLimits.captions
    cache_mb: Annotated[int, Ge(0)] = RepositoryOptions.cache_bytes >> 20

    def options(self) -> RepositoryOptions:
        """The options of `write_model_repository`."""
        shared = {each.name: getattr(self, each.name) for each in fields(ServedModels)}
        limits = RankLimits(images=self.most_images, captions=self.most_captions)
        return RepositoryOptions(**shared, cache_bytes=self.cache_mb << 20, limits=limits)


Request = TypeVar("Request", bound=ExportRequest)


def completed(request: Request | None, kind: type[Request], changes: Mapping[str, Any]) -> Request:
    """The request, or the default one of a kind, with changed fields."""
    return replace(request or kind(), **changes)


def parse_graphs(text: str) -> tuple[GraphName, ...]:
    """Graph names from a list with commas; raises for unknown names and an empty list."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in ALL_GRAPHS:
            raise UnavailableError(f"graph {name!r} is unknown; choose from {', '.join(ALL_GRAPHS)}")
    if not names:
        raise InputError(f"--graphs {text!r} names no graph; choose from {', '.join(ALL_GRAPHS)}, or leave it out")
    return names  # pyright: ignore[reportReturnType]


def parse_fixed(text: str) -> dict[str, int]:
    """Sizes of axes from a list such as `batch=1,length=40`; raises `InputError` for other entries."""
    fixed = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not name or not size.isdigit():
            raise InputError(f"--fixed {part!r} is not understood; write axis=size, such as batch=1,length=40")
        fixed[name] = int(size)
    return fixed


def joined(texts: Sequence[str]) -> str:
    """Several lists joined with commas."""
    return texts if isinstance(texts, str) else ",".join(texts)
