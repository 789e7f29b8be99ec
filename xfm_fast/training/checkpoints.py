"""Exact-resume checkpoints.

A checkpoint is a folder `step-00001000`, written under a temporary name, flushed and renamed:

* `state.json`: step, position in every stream, loss scale, optimizer hyper-parameters, recipe;
* `model/`: a `save_pretrained` folder;
* `training.safetensors`: optimizer state, weight average, random state of every process;
* `manifest.json`: size and SHA-256 of the other files.

The first process gathers FSDP shards, so DDP and FSDP write the same files. Loader workers have no state: a batch is a
function of its index. Loading executes nothing from the folder. The manifest detects damage, not tampering.
"""

from __future__ import annotations

import hashlib
import json
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
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
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
    """Mutable state of a run except random states; `batches` counts micro-batches read per process and stream."""

    model: XFM
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    average: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    batches: dict[str, int] = field(default_factory=dict)


_Kernels = list[list[tuple[str, Literal["float64", "float32", "bfloat16", "float16"], str]]]


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
    kernels = processes.gather(_chosen_kernels())
    groups = _group_names(progress.model, progress.optimizer)
    names = [name for group in groups for name in group]
    # Optimizer state by the name of its parameter; what is no tensor goes into `state.json`.
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in progress.optimizer.state_dict()["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else numbers)[
                f"optimizer/{names[index]}/{key}"
            ] = value
    tensors |= {f"average/{name}": tensor for name, tensor in progress.average.items()}
    tensors, whole = (
        _gather_shards(tensors, processes),
        _gather_shards(progress.model.state_dict(), processes),
    )
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
        write_files(
            {
                temporary / TENSORS: lambda file: write_safetensors(file, tensors),
                temporary / STATE: lambda file: file.write(json.dumps(state, indent=1).encode()),
            }
        )
        save_pretrained(whole, progress.model.config, temporary / MODEL)
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
            "are as they were: free space or set checkpoint.folder, then start the run again"
        ) from error
    if processes.first:
        for path in [*_steps(folder)][keep:]:
            # A deletion that is interrupted must not look like a damaged checkpoint.
            with suppress(OSError):
                path.rename(folder / f".{path.name}.old")
        for old in folder.glob(f".{_PREFIX}*.old"):
            shutil.rmtree(old, ignore_errors=True)
    return final


def note_kernels(progress: Progress, folder: Path, processes: Processes) -> None:
    """Record CPU kernels chosen by timing, so that a run killed early repeats exactly; collective."""
    if progress.step != 1:
        return
    kernels = processes.gather(_chosen_kernels())
    if processes.first and any(kernels):
        write_bytes({folder / KERNELS: json.dumps(kernels).encode()})


def settle_kernels(folder: Path, processes: Processes) -> None:
    """Use the kernels recorded by `note_kernels`, if for as many processes."""
    try:
        noted = TypeAdapter(_Kernels).validate_python(read_json(folder / KERNELS))
    except (OSError, ValueError):
        # Ignore damaged choices and time the kernels again.
        return
    if len(noted) == processes.world_size:
        _settle(noted[processes.rank])


def _chosen_kernels() -> list[list[str]]:
    return [
        [each.operation, str(each.dtype).removeprefix("torch."), each.chosen]
        for each in selections()
    ]


def _settle(kernels: Iterable[Sequence[str]]) -> None:
    for operation, dtype, chosen in kernels:
        set_choice(operation, getattr(torch, dtype), chosen)


def newest(folder: Path) -> Checkpoint | None:
    """Newest valid checkpoint; None if there are none, `CheckpointError` if all are damaged."""
    rejected: list[str] = []
    for path in _steps(folder):
        fault = _fault(path)
        if fault is None:
            try:
                return Checkpoint(path, read_state(path), tuple(rejected))
            except _Later:
                raise
            except CheckpointError as error:
                fault = str(error)
        rejected.append(f"{path} is damaged: {fault}")
    if rejected:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole ({'; '.join(rejected)}); delete the folder to start over"
        )
    return None


class _Later(CheckpointError):
    """Checkpoint of another version."""


def read_state(path: Path) -> dict[str, Any]:
    """Read and validate `state.json`."""
    try:
        state = read_json(path / STATE)
        if (
            isinstance(state, dict)
            and isinstance(written := state.get("format"), int)
            and written > FORMAT_VERSION
        ):
            raise _Later(
                f"{path} has format {written}, this version of xfm-fast reads up to {FORMAT_VERSION}; upgrade xfm-fast"
            )
        if isinstance(state, dict) and state.get("sharded"):
            raise _Later(
                f"{path} holds shards of FSDP, which this version cannot read; set another checkpoint.folder"
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
        f"{path / STATE} is no state of a run ({reason}); take another checkpoint"
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
            f"the parts of {path} do not fit each other ({type(error).__name__}: {error}); delete it to go on from an "
            "earlier one, or set checkpoint.folder to a new folder"
        ) from error


def load(checkpoint: Checkpoint, progress: Progress) -> None:
    """Restore `progress`, sharded or not, for any number of processes; random states are restored separately."""
    model, path = progress.model, checkpoint.path
    own = dict(model.state_dict())
    wanted = {f"model/{name}": tensor for name, tensor in own.items()}
    wanted |= {f"average/{name}": tensor for name, tensor in progress.average.items()}
    weights = read_state_dict(path / MODEL / MODEL_FILE)
    read = read_state_dict(path / TENSORS) | {
        f"model/{name}": tensor for name, tensor in weights.items()
    }
    if not any(name.startswith("average/") for name in read):
        # An average that the run did not have before begins now.
        read |= {
            f"average/{name}": read[f"model/{name}"]
            for name in progress.average
            if f"model/{name}" in read
        }
    if missing := [
        name for name in wanted if name not in read or read[name].shape != wanted[name].shape
    ]:
        raise CheckpointError(
            f"{path} does not fit this run: {', '.join(sorted(missing)[:5])} is missing or has another shape; set "
            "checkpoint.folder to a new folder"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(_like(read[name], tensor))
    with reading(path):
        _load_optimizer(progress, checkpoint, read)
        progress.scaler.load_state_dict(checkpoint.state["scaler"])
    progress.step = checkpoint.state["step"]
    progress.batches = dict(checkpoint.state["batches"])


def random_states(checkpoint: Checkpoint, processes: Processes) -> dict[str, Tensor] | None:
    """Random state of this process, with its CPU kernel choices; None if the number of processes changed."""
    if checkpoint.state["world_size"] != processes.world_size:
        return None
    prefix = f"random/{processes.rank}/"
    read = read_state_dict(checkpoint.path / TENSORS)
    state = {
        name.removeprefix(prefix): tensor
        for name, tensor in read.items()
        if name.startswith(prefix)
    }
    with reading(checkpoint.path):
        # Validate here, where a bad state is distinguishable from an error of the run.
        set_random_state(state, processes.device)
        _settle(checkpoint.state["cpu_kernels"][processes.rank])
    return state


def _group_names(model: XFM, optimizer: Optimizer) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups
    ]


def _load_optimizer(progress: Progress, checkpoint: Checkpoint, read: Mapping[str, Tensor]) -> None:
    groups = _group_names(progress.model, progress.optimizer)
    if groups != checkpoint.state["optimizer"]["groups"]:
        raise CheckpointError(
            f"{checkpoint.path} has other optimizer groups than this run; set checkpoint.folder to a new folder"
        )
    names = [name for group in groups for name in group]
    parameters = dict(progress.model.named_parameters())
    entries: dict[int, dict[str, Any]] = {}
    for source in (read, checkpoint.state["optimizer"]["numbers"]):
        for name, value in source.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                parameter, _, key = rest.rpartition("/")
                if isinstance(value, Tensor) and value.shape == parameters[parameter].shape:
                    value = _like(value, parameters[parameter])
                # The tensors of a file are views of it, and the optimizer writes into its own.
                entries.setdefault(names.index(parameter), {})[key] = (
                    value.clone() if isinstance(value, Tensor) else value
                )
    # Learning rates and the like come from the recipe, which the user may have changed on purpose.
    progress.optimizer.load_state_dict(
        {"state": entries, "param_groups": progress.optimizer.state_dict()["param_groups"]}
    )


def _gather_shards(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Full tensors on the first process in host memory; collective."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.first:
            found[name] = whole.cpu() if isinstance(tensor, DTensor) else whole
    return found


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
    """Describe the damage; None if valid."""
    try:
        files = read_json(path / MANIFEST)["files"]
        if foreign := [name for name in files if not all(map(is_plain_name, name.split("/")))]:
            return f"{MANIFEST} lists {foreign[0]!r}, which is no file of this folder"
        held = {
            each.relative_to(path).as_posix() for each in path.rglob("*") if not each.is_dir()
        } - {MANIFEST}
        # A file that nobody vouches for would be read unseen, were it one of ours.
        if unlisted := sorted(held - set(files)):
            return f"{MANIFEST} does not list {unlisted[0]}"
        if absent := {STATE, TENSORS} - set(files):
            return f"{MANIFEST} does not list {min(absent)}"
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
    """Checkpoint folders, newest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if _step(path) is not None]
    yield from sorted(found, key=lambda path: -(_step(path) or 0))


def _step(path: Path) -> int | None:
    # `isdigit` accepts superscripts.
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def _digest(path: Path) -> str:
    with open_data(path) as file:
        digest = hashlib.file_digest(file, "sha256")
        os.fsync(file.fileno())
    return digest.hexdigest()


def seed_everything(seed: int, *parts: int) -> None:
    """Seed all generators from `seed` and e.g. rank and step."""
    words = np.random.SeedSequence([seed, *parts]).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1] >> np.uint64(32)))
    torch.manual_seed(int(words[2] >> np.uint64(1)))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Random state of the CPU and `device`."""
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


def whole_state(model: XFM, average: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Full weights or their average, FSDP shards gathered; collective."""
    state = model.state_dict() | dict(average or {})
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in state.items()
    }


def save_whole(
    model: XFM,
    folder: Path,
    processes: Processes,
    *,
    average: Mapping[str, Tensor] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """`save_pretrained` of a training model by the first process; collective."""
    state = whole_state(model, average)
    processes.from_first(lambda: save_pretrained(state, model.config, folder, files=files))
