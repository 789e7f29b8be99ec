"""Exact-resume checkpoints.

A checkpoint is a folder `step-00001000`, written under a temporary name, flushed and renamed:

* `state.json`: step, position in every stream, loss scale, optimizer hyper-parameters, recipe;
* `model/`: a `save_pretrained` folder;
* `training.safetensors`: optimizer state, weight average, random state of every process;
* `manifest.json`: size and SHA-256 of these files.

The first process gathers FSDP shards, so DDP and FSDP write the same files. Loader workers have no
state: a batch is a function of its index. Loading executes nothing from the folder. The manifest
detects damage, not tampering.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, TypeAdapter, ValidationError
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from xfm_fast.checkpoint import read_state_dict, save_pretrained, write_safetensors
from xfm_fast.checkpoint.files import MODEL_FILE
from xfm_fast.errors import CheckpointError, StorageError, XFMError
from xfm_fast.io import (
    advice,
    is_plain_name,
    open_data,
    read_json,
    sync_folder,
    write_bytes,
    write_files,
)
from xfm_fast.kernels.cpu.selection import selections, set_choice
from xfm_fast.models.xfm import XFM
from xfm_fast.training.distributed import Processes

FORMAT_VERSION = 1
MANIFEST, STATE, TENSORS, MODEL = "manifest.json", "state.json", "training.safetensors", "model"
KERNELS = "cpu_kernels.json"
_PREFIX = "step-"


@dataclass
class Progress:
    """Mutable state of a run without random states; `batches` counts micro-batches per process and stream."""

    model: XFM
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    average: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    batches: dict[str, int] = field(default_factory=dict)


_DType = Literal["float64", "float32", "bfloat16", "float16"]
# Operation, dtype and choice of each process, and seconds by candidate, which older checkpoints lack.
_Kernels = list[list[tuple[str, _DType, str, dict[str, PositiveFloat]] | tuple[str, _DType, str]]]


class _Groups(BaseModel):
    groups: list[list[str]]
    numbers: dict[str, Any]


class _State(BaseModel):
    """Keys of `state.json` required to resume."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: Literal[1]
    step: int = Field(ge=0)
    batches: dict[str, Annotated[int, Field(ge=0)]]
    world_size: int = Field(gt=0)
    scaler: dict[str, Any]
    optimizer: _Groups
    cpu_kernels: _Kernels
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint on disk; `rejected` describes newer damaged ones."""

    path: Path
    state: dict[str, Any]
    rejected: tuple[str, ...] = ()


def save(
    progress: Progress, recipe: Mapping[str, Any], folder: Path, processes: Processes, *, keep: int
) -> Path:
    """Write the checkpoint of this step, then delete all but the newest `keep`; collective."""
    final = folder / f"{_PREFIX}{progress.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    random_states = processes.gather(random_state(processes.device))
    kernels = processes.gather(_selected_kernels())
    groups = _group_names(progress.model, progress.optimizer)
    names = [name for group in groups for name in group]
    # Optimizer state by the name of its parameter; numbers go into `state.json`.
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in progress.optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            values = tensors if isinstance(value, Tensor) else numbers
            values[f"optimizer/{names[index]}/{key}"] = value
    tensors |= {f"average/{name}": tensor for name, tensor in progress.average.items()}
    tensors = _gather_shards(tensors, processes)
    weights = _gather_shards(progress.model.state_dict(), processes)
    for rank, state in enumerate(random_states):
        tensors |= {f"random/{rank}/{name}": tensor for name, tensor in state.items()}
    state = {
        "format": FORMAT_VERSION,
        "step": progress.step,
        "batches": progress.batches,
        "world_size": processes.world_size,
        "scaler": progress.scaler.state_dict(),
        "optimizer": {"groups": groups, "numbers": numbers},
        "cpu_kernels": kernels,
        "recipe": recipe,
    }

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f".{_PREFIX}*"):
            shutil.rmtree(stale)
        temporary.mkdir()
        content = json.dumps(state, indent=1).encode()
        write_files(
            {
                temporary / TENSORS: lambda file: write_safetensors(file, tensors),
                temporary / STATE: lambda file: file.write(content),
            }
        )
        save_pretrained(weights, progress.model.config, temporary / MODEL)
        _seal(temporary)
        if final.exists():
            final.rename(folder / f".{final.name}.old")
        temporary.rename(final)
        sync_folder(folder)

    try:
        processes.from_first(write)
    except OSError as error:
        if processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"the checkpoint of step {progress.step} could not be written to {folder} ({reason}); earlier checkpoints "
            "are unchanged: free space or set checkpoint.folder, then start the run again"
        ) from error
    if processes.first:
        for path in [*_steps(folder)][keep:]:
            # An interrupted deletion must not look like a damaged checkpoint.
            with suppress(OSError):
                path.rename(folder / f".{path.name}.old")
        for old in folder.glob(f".{_PREFIX}*.old"):
            shutil.rmtree(old, ignore_errors=True)
    return final


def record_kernels(progress: Progress, folder: Path, processes: Processes) -> None:
    """Record the CPU kernels chosen by timing, so that a run killed early repeats exactly; collective."""
    if progress.step != 1:
        return
    kernels = processes.gather(_selected_kernels())
    if processes.first and any(kernels):
        write_bytes({folder / KERNELS: json.dumps(kernels).encode()})


def restore_kernels(folder: Path, processes: Processes) -> None:
    """Select the kernels of `record_kernels`, if it recorded as many processes."""
    try:
        kernels = TypeAdapter(_Kernels).validate_python(read_json(folder / KERNELS))
    except (OSError, ValueError):
        # Ignore damaged choices and time the kernels again.
        return
    if len(kernels) == processes.world_size:
        _select_kernels(kernels[processes.rank])


def _selected_kernels() -> list[list[Any]]:
    kernels = list[list[Any]]()
    for selection in selections():
        dtype = str(selection.dtype).removeprefix("torch.")
        times = selection.seconds.items()
        # Between the row counts of two races, times decide.
        seconds = {name: time for name, time in times if not math.isnan(time)}
        kernels.append([selection.operation, dtype, selection.chosen, seconds])
    return kernels


def _select_kernels(kernels: Iterable[Sequence[Any]]) -> None:
    for operation, dtype, kernel, *seconds in kernels:
        set_choice(operation, getattr(torch, dtype), kernel, *seconds)


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest valid checkpoint, or None; raises `CheckpointError` if all are damaged."""
    rejected: list[str] = []
    for path in _steps(folder):
        fault = _fault(path)
        if fault is None:
            try:
                return Checkpoint(path, read_state(path), tuple(rejected))
            except _OtherVersion:
                raise
            except CheckpointError as error:
                fault = str(error)
        rejected.append(f"{path} is damaged: {fault}")
    if rejected:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged ({'; '.join(rejected)}); delete the folder to start over"
        )
    return None


class _OtherVersion(CheckpointError):
    """Checkpoint of another version."""


def read_state(path: Path) -> dict[str, Any]:
    """Read and validate `state.json`."""
    try:
        state = read_json(path / STATE)
        version = state.get("format") if isinstance(state, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise _OtherVersion(
                f"{path} has format {version}, this version of xfm-fast reads up to {FORMAT_VERSION}; upgrade xfm-fast"
            )
        _State.model_validate_json(json.dumps(state))
        if path.name.startswith(_PREFIX) and state["step"] != _step(path):
            raise ValueError(f"it is of step {state['step']}")
        return state
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {advice(first)}"
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error)
    raise CheckpointError(
        f"{path / STATE} is not the state of a run ({reason}); take another checkpoint"
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert errors caused by inconsistent checkpoint contents to `CheckpointError`."""
    try:
        yield
    except XFMError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"the files of {path} do not fit each other ({type(error).__name__}: {error}); delete it to resume from an "
            "earlier one, or set checkpoint.folder to a new folder"
        ) from error


def load(checkpoint: Checkpoint, progress: Progress) -> None:
    """Restore `progress`, sharded or not, for any number of processes; random states are restored separately."""
    path = checkpoint.path
    saved = read_state_dict(path / TENSORS)
    for name, tensor in read_state_dict(path / MODEL / MODEL_FILE).items():
        saved[f"model/{name}"] = tensor
    if not any(name.startswith("average/") for name in saved):
        # An average that the run did not have before starts now.
        for name in progress.average:
            if f"model/{name}" in saved:
                saved[f"average/{name}"] = saved[f"model/{name}"]
    targets = {f"model/{name}": tensor for name, tensor in progress.model.state_dict().items()}
    targets |= {f"average/{name}": tensor for name, tensor in progress.average.items()}
    misfits = [
        name
        for name, tensor in targets.items()
        if name not in saved or saved[name].shape != tensor.shape
    ]
    if misfits:
        raise CheckpointError(
            f"{path} does not fit this run: {', '.join(sorted(misfits)[:5])} is missing or has another shape; set "
            "checkpoint.folder to a new folder"
        )
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(_like(saved[name], tensor))
    with reading(path):
        _load_optimizer(progress, checkpoint, saved)
        progress.scaler.load_state_dict(checkpoint.state["scaler"])
    progress.step = checkpoint.state["step"]
    progress.batches = dict(checkpoint.state["batches"])


def random_states(checkpoint: Checkpoint, processes: Processes) -> dict[str, Tensor] | None:
    """Return the random state of this process and select its CPU kernels; None if their number changed."""
    if checkpoint.state["world_size"] != processes.world_size:
        return None
    prefix = f"random/{processes.rank}/"
    state = {}
    for name, tensor in read_state_dict(checkpoint.path / TENSORS).items():
        if name.startswith(prefix):
            state[name.removeprefix(prefix)] = tensor
    with reading(checkpoint.path):
        # Validate here, where a bad state is distinguishable from an error of the run.
        set_random_state(state, processes.device)
        _select_kernels(checkpoint.state["cpu_kernels"][processes.rank])
    return state


def _group_names(model: XFM, optimizer: Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups
    ]


def _load_optimizer(
    progress: Progress, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]
) -> None:
    groups = _group_names(progress.model, progress.optimizer)
    if groups != checkpoint.state["optimizer"]["groups"]:
        raise CheckpointError(
            f"{checkpoint.path} has other optimizer groups than this run; set checkpoint.folder to a new folder"
        )
    names = [name for group in groups for name in group]
    parameters = dict(progress.model.named_parameters())
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*tensors.items(), *checkpoint.state["optimizer"]["numbers"].items()):
        if name.startswith("optimizer/"):
            parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
            if isinstance(value, Tensor):
                if value.shape == parameters[parameter].shape:
                    value = _like(value, parameters[parameter])
                # Tensors of a file are views of it, and the optimizer writes into its state.
                value = value.clone()
            state.setdefault(names.index(parameter), {})[key] = value
    # Learning rates and the like come from the recipe, which the user may have changed on purpose.
    groups = progress.optimizer.state_dict()["param_groups"]
    progress.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _gather_shards(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Gather full tensors on the first process, shards in host memory; collective."""
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.first:
            gathered[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return gathered


def _like(value: Tensor, target: Tensor) -> Tensor:
    """Shard `value` like `target`."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    return value


def _seal(folder: Path) -> None:
    """Write the manifest and flush the folder to disk."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": _digest(path),
            }
        else:
            sync_folder(path)
    content = json.dumps({"format": FORMAT_VERSION, "files": files}, indent=1).encode()
    write_bytes({folder / MANIFEST: content})
    sync_folder(folder)


def _fault(path: Path) -> str | None:
    """Describe the damage of a checkpoint; None if it is valid."""
    try:
        files = read_json(path / MANIFEST)["files"]
        for name in files:
            if not all(map(is_plain_name, name.split("/"))):
                return f"{MANIFEST} lists {name!r}, which is not a file of this folder"
        # Unlisted files would be read unchecked.
        present = {
            file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()
        }
        unlisted = ((present | {STATE, TENSORS}) - {MANIFEST}) - set(files)
        if unlisted:
            return f"{MANIFEST} does not list {min(unlisted)}"
        for name, entry in files.items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
        for name, entry in files.items():
            if _digest(path / name) != entry["sha256"]:
                return f"the content of {name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def _steps(folder: Path) -> Iterator[Path]:
    """Yield checkpoint folders, newest first."""
    paths = [path for path in folder.glob(f"{_PREFIX}*") if _step(path) is not None]
    yield from sorted(paths, key=lambda path: -(_step(path) or 0))


def _step(path: Path) -> int | None:
    # `isdigit` accepts superscripts.
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def _digest(path: Path) -> str:
    with open_data(path) as file:
        digest = hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())
    return digest.hexdigest()


def seed_everything(seed: int, *counters: int) -> None:
    """Seed all generators from `seed` and counters such as rank and step."""
    words = np.random.SeedSequence([seed, *counters]).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1] >> np.uint64(32)))
    torch.manual_seed(int(words[2] >> np.uint64(1)))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the random state of the CPU and `device`."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor([version, *numbers]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore a `random_state`."""
    version, *numbers = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(numbers), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy_gauss"])))
    torch.set_rng_state(state["torch"].clone())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].clone(), device)


def full_state(model: XFM, average: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the weights or their average, FSDP shards gathered; collective."""
    state = model.state_dict() | dict(average or {})
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in state.items()
    }


def save_model(
    model: XFM,
    folder: Path,
    processes: Processes,
    *,
    average: Mapping[str, Tensor] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Save the weights of a training model, or their average, as `save_pretrained`; collective."""
    state = full_state(model, average)
    processes.from_first(lambda: save_pretrained(state, model.config, folder, files=files))
