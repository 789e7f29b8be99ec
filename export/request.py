"""Requests: the options of the export commands, as the library takes them; runtimes may subclass them.

This module imports no PyTorch, so `--help` is fast. Exporters validate the values before they read weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from annotated_types import Ge, Le

from xfm_fast.errors import InputError, UnavailableError

GraphName = Literal[
    "vision",
    "text",
    "image_memory",
    "fusion",
    "match",
    "nlvr2",
    "decoder_memory",
    "decoder_step",
    "encoder",
    "image_encoder",
]
ALL_GRAPHS: tuple[GraphName, ...] = get_args(GraphName)

PAIR_GRAPH: GraphName = "nlvr2"
"""The fusion encoder over a pair of images, with the head of its task."""

DEFAULT_GRAPHS: tuple[GraphName, ...] = ("vision", "text", "image_memory", "fusion")
"""The graphs that a server composes; `match`, the whole model in one file, is opt-in."""

GRAPHS: tuple[GraphName, ...] = (*DEFAULT_GRAPHS, "match")
"""The graphs of a pretrained model; the other graphs belong to tasks."""

DType = Literal["fp32", "fp16", "bf16"]

AttentionForm = Literal["opset23", "primitives"]
Precision = Literal["fp32", "bf16"]
Quantisation = Literal["int8", "fp8"]

RuntimeChoice = str
"""The name of a runtime (`export.runtimes`), or `auto`."""

Use = Literal["embedding", "sparse", "ranking"]
"""What a model of sentence-transformers computes: vectors, sparse vectors, or scores of pairs."""

USES: dict[str, Use] = {
    "SentenceTransformer": "embedding",
    "SparseEncoder": "sparse",
    "CrossEncoder": "ranking",
}
"""Uses by the class of the library."""

BUDGET = 0.99
"""Default minimum cosine of any output row with the model's, for exports with 8-bit GEMMs."""

Pipeline = Literal["rank", "graphs"]
ServedDevice = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class ExportRequest:
    """Graphs of a model and their form.

    Attributes:
        dtype: Dtype of weights and arithmetic.
        graphs: Names of vision,text,image_memory,fusion,match. [all but match, or the task's]
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
        if self.graphs is None:
            return None
        names = _split(self.graphs)
        for name in names:
            if name not in ALL_GRAPHS:
                raise UnavailableError(
                    f"graph {name!r} is unknown; choose from {', '.join(ALL_GRAPHS)}"
                )
        if not names:
            raise InputError(
                f"--graphs {self.graphs!r} names no graph; choose from {', '.join(ALL_GRAPHS)}, or omit it"
            )
        return names  # pyright: ignore[reportReturnType]

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the fixed axes; a program may pass a mapping."""
        fixed: Any = self.fixed
        if isinstance(fixed, Mapping):
            return dict(fixed)
        sizes = {}
        for assignment in _split(fixed):
            name, _, size = (word.strip() for word in assignment.partition("="))
            if not name or not size.isdigit():
                raise InputError(
                    f"--fixed {assignment!r} is not understood; write axis=size, such as batch=1,length=40"
                )
            sizes[name] = int(size)
        return sizes


@dataclass(frozen=True)
class OnnxRequest(ExportRequest):
    """Graphs as ONNX files.

    Attributes:
        consumer: Runtime that reads the files, for example onnxruntime.
        opset: ONNX opset, 20 to 24; by default 20 for fp32, and 23, which has attention, for 16 bits.
    """

    consumer: str = "onnxruntime"
    opset: int | None = None


@dataclass(frozen=True)
class RepositoryOptions:
    """The models of a repository and how they run.

    Attributes:
        pipeline: rank adds a model from image files and captions to scores; graphs adds none.
        prefix: Prefix of the models' names.
        device: Device of the models; engines always run on a GPU.
        most_batch: Rows of a batch, for graphs that take any number.
    """

    pipeline: Pipeline = "rank"
    prefix: str = "xfm"
    device: ServedDevice = "auto"
    most_batch: Annotated[int, Ge(1)] = 32

    def check(self) -> None:
        """Raise `UnavailableError` for unknown choices, and `InputError` for values that models cannot have."""
        for name, choices in (("pipeline", get_args(Pipeline)), ("device", get_args(ServedDevice))):
            if (value := getattr(self, name)) not in choices:
                raise UnavailableError(
                    f"{name} {value!r} is unknown; choose from {', '.join(choices)}"
                )
        if not re.fullmatch(r"[A-Za-z][\w-]*", self.prefix, re.ASCII):
            raise InputError(
                f"prefix {self.prefix!r} cannot name models; use letters, digits, - and _"
            )
        if self.most_batch < 1:
            raise InputError(f"most_batch is {self.most_batch}; it must be at least 1")


Request = TypeVar("Request", bound=ExportRequest)


def joined(texts: Sequence[str]) -> str:
    """Join lists with commas; a single string is a list already."""
    return texts if isinstance(texts, str) else ",".join(texts)


def _split(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, joined(texts).split(","))))


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


@dataclass(frozen=True)
class TensorRTRequest(EngineRequest):
    """Graphs as engines of TensorRT, with options that TensorRT for RTX lacks.

    Attributes:
        timing_cache: File of kernel timings, read before and written after a build: later builds are faster.
        version_compatible: Later versions of TensorRT run the engine (tensorrt_lean).
        hardware_compatible: Other GPUs run the engine too.
    """

    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: Literal["ampere_plus", "same_compute_capability"] | None = None
