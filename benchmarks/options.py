"""The options of all benchmarks: arguments of their functions, and options of the commands `xfm-fast bench ...`.

Nothing heavy is imported here, so that help and errors of the command line are fast.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Predicate

from xfm_fast.errors import InputError
from xfm_fast.loading import Source, Weights

Preset = Literal["tiny", "base"]
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "fp32", "bf16"]
Count = Annotated[int, Ge(1), Le(1_000_000)]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every benchmark of models.

    Attributes:
        quick: Less work and fewer samples.
        dtype: fp32, bf16, or both with a comma (serve takes the first); auto leaves out what the processor lacks.
    """

    # Of random weights and inputs.
    seed: ClassVar[int] = 0

    quick: bool = False
    dtype: tuple[DType, ...] = ("auto",)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(RunOptions, Weights):
    """The X-FM to measure.

    Attributes:
        random: Random weights of this size instead of a model. [base]
        image_size: Pixels along a side, in the suite of the larger images. [384; vqa 480; tiny 48; serve the model's]
        tokenizer: RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json. [one of the captions]
        data: Images with captions, instead of the photographs: a folder, CSV, JSON lines or shard.
        device: Device to measure. [a GPU if there is one; the suite: the CPU]
    """

    data: Path | None = None
    device: Device = "auto"

    @property
    def preset(self) -> Preset:
        """The size that input sizes follow."""
        return "tiny" if "tiny" in (self.random, self.config) else "base"

    @property
    def source(self) -> Source:
        """The model, without an image size: benchmarks interpolate to several."""
        random = self.random if self.model is not None else self.random or "base"
        return Source(self.model, random, self.config, tokenizer=self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class ScenarioOptions(ModelOptions):
    """Options of the suite and of every scenario; `check_scenario` knows which scenario has which.

    Attributes:
        official: Clone of the official repository, measured as one more baseline.
        baselines: Names with commas, see xfm-fast bench list. [all that are installed]
        batch: Requests of an offline run, and the most that a server answers together.
        mode: single-stream, offline or server; may be repeated. [all three]
        p99_ms: Bound of the server on the 99th percentile. [4 times one request of the official algorithm]
        clients: serve, servers: clients at a time, with commas.
        requests: serve, servers: requests of a window, at least as many as clients.
    """

    official: Path | None = None
    baselines: tuple[str, ...] = ()
    batch: Count | None = None
    mode: tuple[Literal["single-stream", "offline", "server"], ...] = ()
    p99_ms: Annotated[float | None, Gt(0), Predicate(isfinite)] = None
    clients: tuple[Annotated[int, Ge(1), Le(1024)], ...] = (1, 8, 32)
    requests: Annotated[int, Ge(1)] = 32

    def check_scenario(self, scenario: str) -> None:
        """Raise `InputError` for an option that a scenario does not have."""
        accepted = _ACCEPTED.get(scenario, ("official", "baselines", "batch", "mode", "p99_ms"))
        for field in fields(ScenarioOptions):
            shared = field.name in ModelOptions.__dataclass_fields__
            if shared or field.name in accepted or getattr(self, field.name) == field.default:
                continue
            option = field.name.replace("_", "-")
            raise InputError(f"bench {scenario} has no --{option}; leave it out")


_ACCEPTED = {
    "suite": (),
    "coco": (),
    "serve": ("clients", "requests"),
    "servers": ("clients", "requests"),
}


@dataclass(frozen=True, kw_only=True)
class StepOptions(RunOptions):
    """Options of the training step; quick leaves out the rows with dropout.

    Attributes:
        random: Size of the model.
        task: A step of this task of fine-tuning, or all, one after another. [a step of pretraining]
        device: Device to measure. [a GPU if there is one]
        pairs: Image-text pairs, or items of the task, in the batch. [8 on a CPU, 96 on a GPU; of a task 4 or 8 on a
            CPU, the official batch on a GPU]
    """

    random: Preset = "base"
    task: str | None = None
    device: Device = "auto"
    pairs: Annotated[int | None, Ge(2), Le(1_000_000)] = None

    @property
    def preset(self) -> Preset:
        """The size that input sizes follow."""
        return self.random


@dataclass(frozen=True, kw_only=True)
class DropInOptions(RunOptions):
    """Options of public models; quick takes two layers and two samples, to see that everything runs.

    Attributes:
        only: encode, encode-one, predict, predict-one, minilm, bge-small, bge-small-one, mpnet, mpnet-one,
            roberta, xlm-r, distilbert, modernbert, bert-rerank, blip-rerank, vit-one, beit, siglip, dinov2, swin,
            clip, minilm-step, minilm-lora-step, memory-rerank, or several with commas. [all]
    """

    only: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """Options of the operations.

    Attributes:
        dtype: The type of the tensors. [bf16 on a GPU, fp32 on a CPU]
        device: Device to measure. [a GPU if there is one]
        quick: Shapes of milliseconds, to see that everything runs.
    """

    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    device: Device = "auto"
    quick: bool = False


@dataclass(frozen=True, kw_only=True)
class TryOptions(RunOptions):
    """Options of trying one's own model.

    Attributes:
        inputs: UTF-8 file with a text a line, or a folder of images. [captions of mixed length, or the photographs]
        against: compile, onnxruntime, openvino, torchao, or several with commas: measured beside it.
    """

    inputs: Path | None = None
    against: tuple[str, ...] = ()
