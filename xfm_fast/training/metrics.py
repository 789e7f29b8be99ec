"""What a run tells: values kept on the device until a log step, then JSON lines, boards and a terminal."""

from __future__ import annotations

import json
import math
import secrets
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from xfm_fast.checkpoint import write_bytes
from xfm_fast.errors import StorageError, UnavailableError
from xfm_fast.training.distributed import Place
from xfm_fast.training.recipe_fields import LogRecipe

LOG_FILE = "log.jsonl"


class Value(NamedTuple):
    """A number of a step."""

    step: int
    name: str
    number: float


class Meter:
    """Numbers of the steps since the last log line, left on the device so that no step waits for it."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, str]] = []
        self._tensors: list[Tensor] = []

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take scalars without a graph; the same name may come several times in a step."""
        for name, tensor in values.items():
            self._keys.append((step, name))
            self._tensors.append(tensor)

    def read(self, place: Place) -> list[Value]:
        """All numbers, each averaged over processes, with one transfer; they are then forgotten."""
        if not self._tensors:
            return []
        numbers = torch.stack([tensor.double() for tensor in self._tensors])
        read = place.mean_(numbers).tolist()
        values = [Value(step, name, number) for (step, name), number in zip(self._keys, read, strict=True)]
        self._keys, self._tensors = [], []
        return values


def mean_by_name(values: list[Value]) -> dict[str, float]:
    """The mean of the numbers of each name, names in the order of their first value.

    Gradients of a scaled loss that overflowed belong to updates that were left out, and so do not count.
    """
    grouped: dict[str, list[float]] = {}
    for value in values:
        if math.isfinite(value.number):
            grouped.setdefault(value.name, []).append(value.number)
    return {name: sum(numbers) / len(numbers) for name, numbers in grouped.items()}


class RunLog:
    """Log lines of a run: `log.jsonl`, TensorBoard and Weights & Biases where wanted, and a progress bar.

    Only the first process writes; to the others every method is empty. A run that goes on from an earlier step first
    drops the lines behind that step, so that the file never tells a step twice.

    Args:
        folder: of the run.
        recipe: what is wanted.
        place: of this process.
        steps: length of the run.
        start: steps that are complete.
        title: of the run on boards.

    Raises:
        UnavailableError: a board is wanted whose package is missing.
        StorageError: the file cannot be written.
    """

    def __init__(self, folder: Path, recipe: LogRecipe, place: Place, *, steps: int, start: int, title: str) -> None:
        self.path = folder / LOG_FILE
        self._writes = place.first
        self._board: Any = None
        self._wandb: Any = None
        self._bar: Progress | None = None
        for wanted, package in ((recipe.tensorboard, "tensorboard"), (recipe.wandb, "wandb")):
            if wanted and find_spec(package) is None:
                raise UnavailableError(
                    f"log.{package}={wanted}, but the package {package} is not installed: pip install {package}, or "
                    f"leave log.{package} out"
                )
        if not self._writes:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _keep_until(self.path, start)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written ({error.strerror or error}); set checkpoint.folder to another folder"
            ) from error
        if recipe.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        if recipe.wandb:
            import wandb

            self._wandb = wandb.init(project=recipe.wandb, name=title, id=_identity(folder), resume="allow", dir=folder)
        # Into a file or a pipe, a line at every log step says more than a bar that redraws itself.
        self._console = Console(stderr=True)
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(title, total=steps, completed=start)

    def say(self, message: str) -> None:
        """A sentence to whoever watches."""
        if self._writes:
            self._console.print(f"xfm-fast: {message}", soft_wrap=True, highlight=False, markup=False)

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; it is in the file when this returns."""
        if not self._writes:
            return
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written ({error.strerror or error}); free space") from error
        if self._board is not None:
            for name, number in values.items():
                self._board.add_scalar(name, number, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        losses = {name.split("/", 1)[1]: number for name, number in values.items() if name.startswith("loss/")}
        shown = "  ".join(f"{name} {number:.4g}" for name, number in losses.items())
        if self._bar is not None:
            self._bar.update(self._task, description=shown)
        else:
            print(f"step {step}  {shown}", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if not self._writes:
            return
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
        self._file.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a `log.jsonl`; a last line that a killed process left unfinished is passed over."""
    lines: list[dict[str, float]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _identity(folder: Path) -> str:
    """What Weights & Biases knows the run in this folder by: of one that goes on the same, of any other another one."""
    path = folder / "wandb_id"
    if not path.exists():
        write_bytes({path: secrets.token_hex(8).encode()})
    return path.read_text()


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in read_log(path) if line["step"] <= step]
    content = "".join(json.dumps(line) + "\n" for line in kept).encode()
    write_bytes({path: content})
