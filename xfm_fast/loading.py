"""`open_model`: an X-FM from every source that the tools accept, and the options that name it.

PyTorch is imported when a model is opened, so that `--help` is fast.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from xfm_fast.errors import InputError, UnavailableError

if TYPE_CHECKING:
    import torch

    from xfm_fast.config import XFMConfig
    from xfm_fast.models.xfm import XFM
    from xfm_fast.tasks.reranking import Rank
    from xfm_fast.tasks.task import Task

MANIFEST_FILE = "manifest.json"


def local_path(name: str) -> Path:
    """Return the path of a name, with `~` expanded."""
    return Path(os.path.expanduser(name))


@dataclass(frozen=True)
class Weights:
    """The weights of a model.

    Attributes:
        model: A run, a folder of save_pretrained, a name on the Hugging Face Hub, an official checkpoint
            file, or an export.
        random: Random weights of this size instead of a model, for a trial.
        config: Sizes of an official checkpoint file: the official YAML, a JSON, or base or tiny. [base]
        image_size: Interpolate position tables to this size. [the model's]
        tokenizer: RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json. [the model's]
    """

    model: str | None = None
    random: Literal["tiny", "base"] | None = None
    config: str | None = None
    image_size: Annotated[int | None, Ge(1), Le(16384)] = None
    tokenizer: Path | None = None

    def __str__(self) -> str:
        return self.model or f"a random {self.random} model"

    @property
    def label(self) -> str:
        """Name of the model without its path; the whole name on the Hub."""
        if self.model is None:
            return f"random-{self.random}"
        path = local_path(self.model)
        if path.is_dir():
            return path.resolve().name
        return path.stem if path.is_file() else self.model

    @property
    def is_export(self) -> bool:
        """Whether the model is a folder written by `xfm-fast export`."""
        return self.model is not None and (local_path(self.model) / MANIFEST_FILE).is_file()

    def check(self) -> None:
        """Raise `InputError` unless the options name one model and apply to it."""
        if self.model is not None and self.random is not None:
            raise InputError(
                f"--model {self.model} and --random {self.random}; give either --model or --random"
            )
        if self.model is None and self.random is None:
            raise InputError("no model; give either --model or --random")
        if self.config is not None and (self.model is None or not local_path(self.model).is_file()):
            raise InputError(
                f"--config {self.config} gives the sizes of an official checkpoint file; leave it out"
            )
        if self.is_export and self.image_size is not None:
            raise InputError(f"{self.model} is an export, of one size; leave out --image-size")


@dataclass(frozen=True)
class Source(Weights):
    """A model and the device it runs on.

    Attributes:
        device: Device to run on. [a GPU if there is one]
        dtype: Dtype of the weights; or int8 (CPU) or fp8 (GPU) for the linear layers. [fp32]
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16", "fp16", "int8", "fp8"] | None = None

    def check(self) -> None:
        super().check()
        if self.is_export and self.dtype is not None:
            raise InputError(f"{self.model} is an export, of one dtype; leave out --dtype")

    def choose_device(self) -> torch.device:
        """Return the device of the options; raises `UnavailableError` for a missing GPU."""
        import torch

        has_gpu = torch.cuda.is_available()
        if self.device == "cuda" and not has_gpu:
            raise UnavailableError("--device cuda, but PyTorch finds no GPU here; use cpu or auto")
        return torch.device("cuda" if has_gpu and self.device != "cpu" else "cpu")


@dataclass(frozen=True)
class EncoderSource(Source):
    """A model that embeds or ranks.

    Attributes:
        plain: The library's own layers, which are slower, in place of fused ones.
    """

    plain: bool = False


@dataclass(frozen=True)
class Opened:
    """A model in evaluation mode.

    Attributes:
        model: The model; `Session` for an export.
        name: `Source.label`.
        origin: Origin of the weights without local paths, for reports.
        task: The task that it is fine-tuned for.
        rank: Ranking rule that its run recorded.
    """

    model: Any
    name: str
    origin: str
    task: Task[Any] | None = None
    rank: Rank = "match"


def open_model(
    source: Source,
    *,
    needs: Collection[str] = (),
    tasks: Collection[str] | None = None,
    device: str | torch.device | None = None,
) -> Opened:
    """Load or initialise an X-FM from any source but an export.

    Args:
        source: The options.
        needs: Heads of which the model must have one.
        tasks: Tasks that a fine-tuned model may have; all by default.
        device: Replaces the device of the options.

    Raises:
        InputError: The options name no model or two, or do not apply to it.
        CheckpointError: The source cannot be read.
        UnavailableError: It is for another task or lacks the heads; or the device or dtype is missing here.
    """
    import torch

    from xfm_fast.models.xfm import PRECISIONS

    source.check()
    if source.is_export:
        raise InputError(
            f"{source.model} is an export; predict, serve, index and search run it: name the run it is of"
        )
    target = source.choose_device() if device is None else torch.device(device)
    if source.model is None:
        opened = _open_random(source)
    elif local_path(source.model).is_file():
        opened = _open_official(source, local_path(source.model))
    else:
        opened = _open_folder(source, tasks)
    model: XFM = opened.model
    if needs and not {*needs} & {*model.heads}:
        raise UnavailableError(
            f"{opened.name} has no {' or '.join(needs)} head (it has: {', '.join(model.heads) or 'none'}); "
            "use a pretrained model or one of retrieval"
        )
    model.to(target).cast(PRECISIONS[source.dtype or "fp32"]).requires_grad_(False).eval()
    return opened


def _open_random(source: Source) -> Opened:
    from xfm_fast.checkpoint import random_tensors, without_values
    from xfm_fast.config import XFMConfig
    from xfm_fast.data.shapes import VOCABULARY
    from xfm_fast.models.processor import read_tokenizer
    from xfm_fast.models.xfm import XFM
    from xfm_fast.tokenizer import CaptionTokenizer

    tokenizer = CaptionTokenizer.train_on_texts([" ".join(VOCABULARY)], 1000)
    config = XFMConfig.preset(source.random or "tiny")
    vocab_size = max(config.vocab_size, tokenizer.vocab_size)
    config = config.replace(vocab_size=vocab_size).resized(source.image_size)
    with without_values():
        model = XFM(config)
    model.load_state_dict(random_tensors(model.state_dict()), assign=True)
    model.tokenizer = read_tokenizer(source.tokenizer or tokenizer, config)
    return Opened(model, source.label, f"random weights of preset {source.random}")


def _open_official(source: Source, file: Path) -> Opened:
    from xfm_fast import checkpoint
    from xfm_fast.checkpoint.names import our_name
    from xfm_fast.models.xfm import XFM

    state = checkpoint.read_state_dict(file)
    if checkpoint.relative_of(state) is not None:
        model = XFM.from_x2vlm(state, image_size=source.image_size, tokenizer=source.tokenizer)
    else:
        config = checkpoint.config_of(state, official_sizes(source.config), source.image_size)
        heads = checkpoint.heads_in(map(our_name, state))
        model = XFM.from_official(state, config, heads=heads, tokenizer=source.tokenizer)
    return Opened(model, source.label, f"checkpoint {file.name}")


def _open_folder(source: Source, tasks: Collection[str] | None) -> Opened:
    from xfm_fast.finetuning.prediction import load
    from xfm_fast.models.hub import resolve
    from xfm_fast.models.xfm import XFM
    from xfm_fast.tasks.retrieval import rank_of
    from xfm_fast.tasks.task import make_task, task_of

    assert source.model is not None
    folder = resolve(source.model)
    options, task = task_of(folder), None
    if options is None:
        model = XFM.from_pretrained(folder, tokenizer=source.tokenizer)
        origin = f"checkpoint {source.label}"
    elif tasks is not None and options.kind not in tasks:
        raise UnavailableError(
            f"{source.model} is fine-tuned for {options.kind}; give one of {', '.join(tasks)}"
        )
    elif source.tokenizer is not None:
        raise InputError(f"{source.model} has its vocabulary; leave out --tokenizer")
    else:
        predictor = load(folder)
        model, task = predictor.model, predictor.task
        origin = f"run {source.label} of the task {options.kind}"
        assert isinstance(model, XFM)
    if source.image_size not in (None, model.config.image_size):
        model.set_image_size(source.image_size)
        if task is not None:
            task = make_task(task.options, model.config, model.tokenizer)
    return Opened(model, source.label, origin, task, rank_of(folder))


def official_sizes(config: str | None) -> XFMConfig:
    """Return the configuration that `--config` names: a preset, or an official YAML or JSON file."""
    from xfm_fast.config import XFMConfig

    if config in (None, "base", "tiny"):
        return XFMConfig.preset(config or "base")
    return XFMConfig.from_official(config)


def open_session(source: Source, runtime: str = "auto") -> Opened:
    """Load an export; raises `ExportError` if it is damaged or cannot run here."""
    from xfm_fast.errors import ExportError
    from xfm_fast.export.session import Session
    from xfm_fast.models.processor import read_tokenizer
    from xfm_fast.tasks.retrieval import rank_of

    source.check()
    folder = local_path(source.model or "")
    if not source.is_export:
        raise ExportError(
            f"{folder} is not an export: it lacks {MANIFEST_FILE}; give the folder of one"
        )
    session = Session.load(folder, runtime, None if source.device == "auto" else source.device)
    if source.tokenizer is not None:
        session.processor.tokenizer = read_tokenizer(source.tokenizer, session.config)
    tokenizer, exported = session.processor.tokenizer, session.manifest.tokenizer_sha256
    if tokenizer is not None and exported not in (None, tokenizer.sha256()):
        raise InputError(
            f"the vocabulary in {tokenizer.origin} has sha256 {tokenizer.sha256()[:16]}… and that of the export "
            f"{exported[:16]}…; give the one that the model was trained with"
        )
    return Opened(session, source.label, session.manifest.source, rank=rank_of(folder))
