"""Requests: what is exported and how. Every option of the export commands stands here, as the library takes it.

Nothing of PyTorch is imported, so that a command line shows its help at once. Values are the words of a user; they are
compared with what there is by the function that exports, before a weight is read.
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
"""The graphs that a server composes; `match`, the whole model in one file, is exported on request."""

GRAPHS: tuple[GraphName, ...] = (*DEFAULT_GRAPHS, "match")
"""The graphs of a pretrained model; the others are those of tasks."""

DType = Literal["fp32", "fp16", "bf16"]
Preset = Literal["base", "tiny"]

RuntimeName = Literal["onnxruntime", "openvino", "tensorrt-rtx", "tensorrt", "aoti"]
RuntimeChoice = Literal["auto", RuntimeName]

Consumer = Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "openvino"]
Quantisation = Literal["int8", "fp8"]
HardwareCompatibility = Literal["ampere_plus", "same_compute_capability"]

BUDGET = 0.99
"""The least cosine of any row of an output with that of the model, where products are in 8 bits."""

BackendChoice = Literal["auto", "tensorrt", "onnxruntime", "python"]
Pipeline = Literal["rank", "graphs"]
ServedDevice = Literal["auto", "cpu", "gpu"]


@dataclass(frozen=True)
class ModelSource:
    """The origin of a model to export, and of the examples that its export is compared on.

    Attributes:
        checkpoint: Official .th/.pth, .safetensors, or a folder that save_pretrained wrote.
        preset: Instead of a checkpoint: random weights of a model of this size.
        config: Official YAML, or a JSON of sizes, of a checkpoint file that is not of base size.
        image_size: Interpolate position tables to this size.
        tokenizer: RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json. [that of the checkpoint]
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
        dtype: Type of the weights and of the arithmetic.
        graphs: vision, text, image_memory, fusion, match; nlvr2, decoder_memory, decoder_step of tasks; with commas.
            [all but match, or those of the task]
        fixed: Axes of one size, such as batch=1,length=40. [all dynamic]
        all_tokens: fusion returns every token, not token 0.
        packed: text and fusion take texts that lie one behind the other in rows, at the cost of their tokens; padded
            to the longest otherwise.
    """

    dtype: DType = "fp32"
    graphs: Sequence[str] | None = None
    fixed: Sequence[str] = ()
    all_tokens: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        # Seen here and not later: a list that is not understood.
        _ = self.names, self.sizes

    @property
    def names(self) -> tuple[GraphName, ...] | None:
        """Names of the graphs; None for those that answer for the model."""
        return None if self.graphs is None else parse_graphs(joined(self.graphs))

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the axes that are fixed; a program may give them as a mapping."""
        given: Any = self.fixed
        return dict(given) if isinstance(given, Mapping) else parse_fixed(joined(given))


@dataclass(frozen=True)
class OnnxRequest(ExportRequest):
    """Graphs as ONNX files.

    Attributes:
        consumer: Library that reads the files.
        opset: Opset of ONNX, 20 to 24; by default 20 for fp32 and 23, which has attention, for 16 bits.
    """

    consumer: Consumer = "onnxruntime"
    opset: int | None = None


@dataclass(frozen=True)
class PackageRequest(ExportRequest):
    """Graphs as packages that PyTorch compiles.

    Attributes:
        device: Device of this machine that the packages run on.
    """

    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class EngineRequest(ExportRequest):
    """Graphs as engines.

    Attributes:
        dtype: Type of the weights and of the arithmetic.
        opset: Opset of ONNX, 20 to 24; by default what the builder profits from.
        profile: Sizes that an engine accepts, name:axis=least..best..most, such as
            latency:batch=1,length=1..16..40; may be repeated. [latency for batches of one, bulk for up
            to 32]
        sm: Compute capabilities to build for, such as 80,89,120. [this machine's GPU]
        quantize: Products in 8 bits, with scales from --data or the photographs.
        budget: Least cosine of any row of an output with that of the model. Products in 8 bits that cost more go back
            to --dtype.
        level: How long the builder may search; by default its own.
        keep_onnx: Leave the graphs that the engines are built from in OUT/onnx.
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
        """The same with what only TensorRT knows, left out where it was not asked for."""
        return self if isinstance(self, TensorRTRequest) else TensorRTRequest(**vars(self))


@dataclass(frozen=True)
class TensorRTRequest(EngineRequest):
    """Graphs as engines of TensorRT, which knows more ways to build than TensorRT for RTX.

    Attributes:
        timing_cache: File of kernel timings, read before and written after: later builds are faster.
        version_compatible: Later versions of TensorRT run the engine (tensorrt_lean).
        hardware_compatible: More GPUs than this one run the engine.
    """

    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility | None = None


@dataclass(frozen=True)
class RankLimits:
    """Limits of a request to the rank model of a repository.

    Attributes:
        images, captions: how many a request may have.
        image_bytes: size of an encoded image.
        caption_characters: length of a caption, before the official cut to 30 words and `tokens` tokens.
        tokens: length of a caption, special tokens included.
    """

    images: int = 16
    captions: int = 1024
    image_bytes: int = 32 << 20
    caption_characters: int = 2000
    tokens: int = 40


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
        """The same as `write_model_repository` takes it."""
        shared = {each.name: getattr(self, each.name) for each in fields(ServedModels)}
        limits = RankLimits(images=self.most_images, captions=self.most_captions)
        return RepositoryOptions(**shared, cache_bytes=self.cache_mb << 20, limits=limits)


Request = TypeVar("Request", bound=ExportRequest)


def completed(request: Request | None, kind: type[Request], changes: Mapping[str, Any]) -> Request:
    """The request with changes of its fields; without one, that of a kind with its defaults."""
    return replace(request or kind(), **changes)


def parse_graphs(text: str) -> tuple[GraphName, ...]:
    """Graph names from a list with commas.

    Raises:
        UnavailableError: an unknown one.
        InputError: the list names none.
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in ALL_GRAPHS:
            raise UnavailableError(f"graph {name!r} is unknown; choose from {', '.join(ALL_GRAPHS)}")
    if not names:
        raise InputError(f"--graphs {text!r} names no graph; choose from {', '.join(ALL_GRAPHS)}, or leave it out")
    return names  # pyright: ignore[reportReturnType]


def parse_fixed(text: str) -> dict[str, int]:
    """Sizes of axes from a list such as `batch=1,length=40`.

    Raises:
        InputError: an entry that is no name with a whole number.
    """
    fixed = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if not name or not size.isdigit():
            raise InputError(f"--fixed {part!r} is not understood; write axis=size, such as batch=1,length=40")
        fixed[name] = int(size)
    return fixed


def joined(texts: Sequence[str]) -> str:
    """One list with commas of several."""
    return texts if isinstance(texts, str) else ",".join(texts)
