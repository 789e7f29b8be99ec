"""Training metrics, kept on the device until a log step, and a guard that reports NaN and infinity."""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xfm_fast.batches import Batch, TensorBatch
from xfm_fast.errors import NonFiniteError, UnavailableError
from xfm_fast.io import open_data, open_to_append, parse_json, read_bytes, storing, write_bytes
from xfm_fast.training.distributed import Processes
from xfm_fast.training.optimizer import local
from xfm_fast.training.recipe_fields import LogRecipe

Show = Callable[[str, int, int], None]
"""Progress callback (text, done, total)."""

LOG_FILE = "log.jsonl"
_MOST_LINE_BYTES = 1 << 20
ENCODERS = ("vision_encoder", "text_encoder", "fusion_encoder")
# These ops return uninitialised memory.
_UNINITIALISED = ("aten.empty", "aten.new_empty", "aten.resize", "aten.set_")


class Value(NamedTuple):
    """A named scalar of one step."""

    step: int
    name: str
    scalar: float


class Meter:
    """Accumulates device scalars between log steps without synchronising."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, str]] = []
        self._tensors: list[Tensor] = []

    def add(self, step: int, prefix: str, values: Mapping[str, Tensor]) -> None:
        """Add detached scalars under prefixed names, which may repeat within a step."""
        for name, tensor in values.items():
            self._keys.append((step, prefix + name))
            self._tensors.append(tensor)

    def read(self, processes: Processes) -> list[Value]:
        """Return all scalars averaged over processes, in one transfer, and reset."""
        if not self._tensors:
            return []
        stacked = torch.stack([tensor.double() for tensor in self._tensors])
        scalars = processes.mean_(stacked).tolist()
        values = [
            Value(step, name, scalar)
            for (step, name), scalar in zip(self._keys, scalars, strict=True)
        ]
        self._keys, self._tensors = [], []
        return values


def mean_by_name(values: list[Value]) -> dict[str, float]:
    """Average values by name, in order of appearance; skips gradient norms of updates that overflowed."""
    scalars: dict[str, list[float]] = {}
    for value in values:
        if math.isfinite(value.scalar):
            scalars.setdefault(value.name, []).append(value.scalar)
    return {name: sum(column) / len(column) for name, column in scalars.items()}


class RunLog:
    """Log of the first process: `log.jsonl`, TensorBoard, W&B and progress.

    Lines of steps after `start` are dropped. `show(losses, step, steps)` draws progress on a terminal;
    without it every line is printed.
    """

    def __init__(
        self,
        folder: Path,
        recipe: LogRecipe,
        processes: Processes,
        *,
        steps: int,
        start: int,
        show: Show | None = None,
    ) -> None:
        self.path = folder / LOG_FILE
        self._writes, self._steps, self._summary = processes.first, steps, ""
        self._show = show if sys.stderr.isatty() else None
        self._board: Any = None
        self._wandb: Any = None
        for option, package in ((recipe.tensorboard, "tensorboard"), (recipe.wandb, "wandb")):
            if option and find_spec(package) is None:
                raise UnavailableError(
                    f"log.{package}={option}, but the package {package} is not installed: pip install {package}, or "
                    f"leave log.{package} out"
                )
        if not self._writes:
            return
        with storing(self.path, "set checkpoint.folder to another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                lines = [line for line in read_log(self.path) if line["step"] <= start]
                text = "".join(json.dumps(line) + "\n" for line in lines)
                write_bytes({self.path: text.encode()})
            self._file = open_to_append(self.path)
        if recipe.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        if recipe.wandb:
            import wandb

            # A resumed run keeps its identity at Weights & Biases; other folders have others.
            identity = folder / "wandb_id"
            if not identity.exists():
                write_bytes({identity: secrets.token_hex(8).encode()})
            name = read_bytes(identity, 100).decode()
            self._wandb = wandb.init(
                project=recipe.wandb, name=folder.name, id=name, resume="allow", dir=folder
            )

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self._show is not None:
            self._show(self._summary, step, self._steps)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and flush it."""
        if not self._writes:
            return
        with storing(self.path):
            self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
            self._file.flush()
        if self._board is not None:
            for name, scalar in values.items():
                self._board.add_scalar(name, scalar, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        losses = {
            name.removeprefix("loss/"): scalar
            for name, scalar in values.items()
            if name.startswith("loss/")
        }
        # Retrieval metrics of every ranking rule are summarised by their mean.
        self._summary = "  ".join(
            f"{name} {scalar:.4g}"
            for name, scalar in (losses or values).items()
            if name.count("/") < 2 or name.endswith("/r_mean")
        )
        if self._show is None:
            print(f"step {step}  {self._summary}", file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Flush the log to disk, so that it is as durable as a checkpoint."""
        if self._writes:
            with storing(self.path):
                os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._writes:
            return
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error_type is None else 1)
        self._file.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """Read a `log.jsonl`, skipping incomplete lines."""
    lines: list[dict[str, float]] = []
    with open_data(path) as file:
        while text := file.readline(_MOST_LINE_BYTES):
            with suppress(ValueError):
                line = parse_json(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


class ModelNorms:
    """Parameter, gradient and update norms without device synchronisation; sums squares over FSDP shards."""

    def __init__(self, model: nn.Module) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = [*trained], [*trained.values()]
        sharded = [isinstance(parameter, DTensor) for parameter in self.parameters]
        self.sharded = any(sharded)
        # Replicated parameters are equal on every process and count once.
        counts_replicas = not self.sharded or dist.get_rank() == 0
        self._counted = torch.tensor([is_shard or counts_replicas for is_shard in sharded])
        self._groups = {"all": torch.arange(len(trained))}
        for encoder in ENCODERS:
            indices = [i for i, name in enumerate(trained) if name.split(".")[0] == encoder]
            if indices:
                self._groups[encoder] = torch.tensor(indices)

    def gradients(self) -> tuple[list[int], Tensor]:
        """Return the indices of the parameters with gradients, and their norms."""
        indices, gradients = [], []
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                indices.append(index)
                gradients.append(local(parameter.grad))
        return indices, self._norms(gradients, indices)

    def clip_(self, norm: Tensor, limit: float) -> None:
        """Scale all gradients by `limit / norm` if it is below one."""
        factor = (limit / (norm + 1e-6)).clamp_(max=1.0)
        if norm.device.type == "cpu" and factor == 1:
            return
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def copy(self) -> list[Tensor]:
        """Copy the parameters, for `updates`."""
        return [local(parameter).detach().clone() for parameter in self.parameters]

    def by_encoder(self, norms: Tensor, indices: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return the norm over `all` parameters and over each encoder.

        `norms` are those of the parameters `indices`, by default of all.
        """
        if indices is not None and len(indices) < len(self.parameters):
            full = norms.new_zeros(len(self.parameters))
            full[torch.tensor(indices, device=norms.device, dtype=torch.long)] = norms
            norms = full
        return {name: norms[index.to(norms.device)].norm() for name, index in self._groups.items()}

    def values(self) -> dict[str, Tensor]:
        """Return parameter norms by encoder."""
        return self.by_encoder(self._norms([local(p).detach() for p in self.parameters]))

    def updates(self, before: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return norms of the change since `copy`, by encoder."""
        now = [local(p).detach() for p in self.parameters]
        return self.by_encoder(self._norms([*torch._foreach_sub(now, list(before))]))

    def _norms(self, tensors: list[Tensor], indices: Sequence[int] | None = None) -> Tensor:
        if not tensors:
            return torch.zeros(0)
        norms = torch.stack(torch._foreach_norm(tensors))
        if self.sharded:
            counted = self._counted if indices is None else self._counted[indices]
            squares = norms.square() * counted.to(norms)
            dist.all_reduce(squares)
            norms = squares.sqrt_()
        return norms


class Work:
    """Counts images and unpadded tokens of a run, assuming that every process does the same amount."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._images = self._tokens = 0

    def count(self, batch: TensorBatch) -> None:
        """Count a CPU batch."""
        image, mask = getattr(batch, "image", None), getattr(batch, "attention_mask", None)
        self._images += 0 if image is None else len(image)
        self._tokens += 0 if mask is None else int(mask.count_nonzero())

    def rates(self, steps: int, seconds: float) -> dict[str, float]:
        """Return global rates since the last call: `seconds` per step, `images_per_s`, `tokens_per_s`."""
        rates = {
            "seconds": seconds / steps,
            "images_per_s": self._images * self._world_size / seconds,
            "tokens_per_s": self._tokens * self._world_size / seconds,
        }
        self._images = self._tokens = 0
        return rates


class Guard:
    """Records gradient norms since the last check, to report the first parameter that was not finite.

    `names` are in the order of the norms. With `scaled` losses an overflow lowers the loss scale and
    skips the update; it is an error only when the scale falls below 1.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, scaled: bool = False) -> None:
        self._model = model
        self._names = names
        self._scaled = scaled
        self._gradients: list[tuple[str, list[int], Tensor]] = []

    def watch(self, update: str, indices: list[int], norms: Tensor) -> None:
        """Record gradient norms `[n]` of an update without synchronising."""
        self._gradients.append((update, indices, norms))

    def check(
        self,
        values: Iterable[Value],
        batches: Mapping[str, Batch],
        rerun: Callable[[str, Batch], Tensor] | None = None,
    ) -> None:
        """Raise `NonFiniteError` naming the first non-finite value since the last check; `rerun` locates the op."""
        watched, self._gradients = self._gradients, []
        bad = next((value for value in values if self._is_bad(value)), None)
        if bad is None:
            return
        # The first cause of each source; a loss comes before the gradients.
        sources = [self._bad_parameters(), self._bad_inputs(batches)]
        sources.append(self._bad_operations(batches, rerun))
        if not bad.name.startswith("loss/"):
            sources.insert(0, self._bad_gradients(watched))
        causes = [cause for source in sources if (cause := next(source, None)) is not None]
        why = ", though every tensor of the last batch is finite when it runs again"
        if causes:
            why = f": {causes[0]}"
        if len(causes) > 1:
            why += f" (and {'; '.join(causes[1:3])})"
        raise NonFiniteError(
            f"step {bad.step}: {bad.name.replace('/', ' ', 1)} is {bad.scalar}{why}. The run has stopped, and the last "
            "checkpoint is unchanged: lower optimizer.lr, lengthen schedule.warmup, or look at that batch"
        )

    def _is_bad(self, value: Value) -> bool:
        if value.name == "loss_scale":
            return value.scalar < 1
        skipped = self._scaled and value.name.startswith("grad_norm/")
        return not math.isfinite(value.scalar) and not skipped

    def _bad_gradients(self, watched: list[tuple[str, list[int], Tensor]]) -> Iterator[str]:
        for update, indices, norms in watched:
            for index, norm in zip(indices, norms.tolist(), strict=True):
                if not math.isfinite(norm):
                    yield f"the gradient of {self._names[index]} in update {update} has norm {norm}"

    def _bad_parameters(self) -> Iterator[str]:
        for name, parameter in self._model.named_parameters():
            if not bool(local(parameter).isfinite().all()):
                yield f"parameter {name} is not finite"

    def _bad_inputs(self, batches: Mapping[str, Batch]) -> Iterator[str]:
        for stream, batch in batches.items():
            for field in fields(batch):
                value = getattr(batch, field.name)
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    continue
                if not bool(value.isfinite().all()):
                    yield f"{field.name} of the batch of stream {stream} is not finite"

    def _bad_operations(
        self, batches: Mapping[str, Batch], rerun: Callable[[str, Batch], Tensor] | None
    ) -> Iterator[str]:
        if rerun is None:
            return
        parameters = {id(parameter): name for name, parameter in self._model.named_parameters()}
        trained = [p for p in self._model.parameters() if p.requires_grad]
        for stream, batch in batches.items():
            with torch.enable_grad(), _FirstNonFinite(parameters) as search:
                loss = rerun(stream, batch)
                if search.cause is None and loss.requires_grad:
                    search.direction = "backward"
                    torch.autograd.grad(loss, trained, allow_unused=True)
            if search.cause is not None:
                yield f"stream {stream}: {search.cause}"


class _FirstNonFinite(TorchDispatchMode):
    """Finds the first op with finite inputs and a non-finite output; attention masks may hold −inf."""

    def __init__(self, parameters: Mapping[int, str]) -> None:
        super().__init__()
        self._parameters = parameters
        self._last_parameter = ""
        self.direction = "forward"
        self.cause: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._last_parameter = self._parameters.get(id(tensor), self._last_parameter)
        searched = self.cause is None and not str(func).startswith(_UNINITIALISED)
        searched = searched and not any(map(_is_bad, inputs))
        result = func(*args, **(kwargs or {}))
        if searched and any(map(_is_bad, tree_leaves(result))):
            module = self._last_parameter.rpartition(".")[0] or "the loss"
            self.cause = f"the {self.direction} operation {func} at {module} is the first whose result is not finite"
        return result


def _is_bad(value: object) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    # A weight packed for oneDNN cannot be read; its parameter is checked.
    if value.layout != torch.strided:
        return False
    return bool((value.isnan() | value.isposinf()).any())
