"""Training metrics: losses, norms and rates stay on the device until a log step; a guard reports NaN and infinity."""

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
    number: float


class Meter:
    """Accumulates device scalars between log steps without synchronising."""

    def __init__(self) -> None:
        self._keys: list[tuple[int, str]] = []
        self._tensors: list[Tensor] = []

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Add detached scalars; a name may repeat within a step."""
        for name, tensor in values.items():
            self._keys.append((step, name))
            self._tensors.append(tensor)

    def read(self, processes: Processes) -> list[Value]:
        """Return all scalars averaged over processes, in one transfer, and reset."""
        if not self._tensors:
            return []
        numbers = torch.stack([tensor.double() for tensor in self._tensors])
        read = processes.mean_(numbers).tolist()
        values = [
            Value(step, name, number) for (step, name), number in zip(self._keys, read, strict=True)
        ]
        self._keys, self._tensors = [], []
        return values


def mean_by_name(values: list[Value]) -> dict[str, float]:
    """Mean per name, in first-seen order; skips gradient norms of updates that overflowed."""
    grouped: dict[str, list[float]] = {}
    for value in values:
        if math.isfinite(value.number):
            grouped.setdefault(value.name, []).append(value.number)
    return {name: sum(numbers) / len(numbers) for name, numbers in grouped.items()}


class RunLog:
    """Log of the first process: `log.jsonl`, TensorBoard, W&B, and progress. Drops lines of steps after `start`.

    `show(losses, step, steps)` draws progress on a terminal; without it every line is printed.
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
        self._writes, self._steps, self._shown = processes.first, steps, ""
        self._show = show if sys.stderr.isatty() else None
        self._board: Any = None
        self._wandb: Any = None
        for wanted, package in ((recipe.tensorboard, "tensorboard"), (recipe.wandb, "wandb")):
            if wanted and find_spec(package) is None:
                raise UnavailableError(
                    f"log.{package}={wanted}, but the package {package} is not installed: pip install {package}, or "
                    f"leave log.{package} out"
                )
        if not self._writes:
            return
        with storing(self.path, "set checkpoint.folder to another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                kept = [line for line in read_log(self.path) if line["step"] <= start]
                write_bytes({self.path: "".join(json.dumps(line) + "\n" for line in kept).encode()})
            self._file = open_to_append(self.path)
        if recipe.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        if recipe.wandb:
            import wandb

            # A run that goes on is the same one to Weights & Biases, and any other folder another one.
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
            self._show(self._shown, step, self._steps)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line and flush it."""
        if not self._writes:
            return
        with storing(self.path):
            self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
            self._file.flush()
        if self._board is not None:
            for name, number in values.items():
                self._board.add_scalar(name, number, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        losses = {
            name.split("/", 1)[1]: number
            for name, number in values.items()
            if name.startswith("loss/")
        }
        # Of the metrics by every rule that ranks, the mean.
        short = {
            n: v for n, v in (losses or values).items() if n.count("/") < 2 or n.endswith("/r_mean")
        }
        self._shown = "  ".join(f"{name} {number:.4g}" for name, number in short.items())
        if self._show is None:
            print(f"step {step}  {self._shown}", file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Flush the log to disk, so that it is as durable as a checkpoint."""
        if self._writes:
            with storing(self.path):
                os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if not self._writes:
            return
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)
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
        named = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters)
        # What is not sharded is the same on every process and counts once.
        self._counted = torch.tensor(
            [
                isinstance(p, DTensor) or not self.sharded or dist.get_rank() == 0
                for p in self.parameters
            ]
        )
        first = [name.split(".")[0] for name in self.names]
        self._parts = {"all": torch.arange(len(first))} | {
            encoder: torch.tensor([i for i, part in enumerate(first) if part == encoder])
            for encoder in ENCODERS
            if encoder in first
        }

    def gradients(self) -> tuple[list[int], Tensor]:
        """Indices of the parameters with gradients, and the norm of each."""
        having = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        return having, self._each(
            [local(p.grad) for p in self.parameters if p.grad is not None], having
        )

    def clip_(self, norm: Tensor, limit: float) -> None:
        """Scale all gradients by `limit / norm` if it is below one."""
        factor = (limit / (norm + 1e-6)).clamp_(max=1.0)
        if norm.device.type == "cpu" and factor == 1:
            return
        gradients = [
            local(parameter.grad) for parameter in self.parameters if parameter.grad is not None
        ]
        if gradients:
            torch._foreach_mul_(gradients, factor)

    def copy(self) -> list[Tensor]:
        """Copy the parameters, for `updates`."""
        return [local(parameter).detach().clone() for parameter in self.parameters]

    def by_part(self, norms: Tensor, having: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Norm over `all` and over each encoder of the parameters in `having` (default: every parameter)."""
        full = norms
        if having is not None and len(having) < len(self.parameters):
            full = norms.new_zeros(len(self.parameters))
            full[torch.tensor(having, device=norms.device, dtype=torch.long)] = norms
        return {part: full[index.to(full.device)].norm() for part, index in self._parts.items()}

    def values(self) -> dict[str, Tensor]:
        """Parameter norms by part."""
        return self.by_part(
            self._each([local(parameter).detach() for parameter in self.parameters])
        )

    def updates(self, before: Sequence[Tensor]) -> dict[str, Tensor]:
        """Norms of the change since `copy`, by part."""
        now = [local(parameter).detach() for parameter in self.parameters]
        return self.by_part(self._each([*torch._foreach_sub(now, list(before))]))

    def _each(self, tensors: list[Tensor], having: Sequence[int] | None = None) -> Tensor:
        if not tensors:
            return torch.zeros(0)
        norms = torch.stack(torch._foreach_norm(tensors))
        if self.sharded:
            parts = norms.square() * (
                self._counted if having is None else self._counted[having]
            ).to(norms)
            dist.all_reduce(parts)
            norms = parts.sqrt_()
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
        """Global rates since the last call: `seconds` per step, `images_per_s`, `tokens_per_s`."""
        images, tokens = (
            count * self._world_size / seconds for count in (self._images, self._tokens)
        )
        self._images = self._tokens = 0
        return {"seconds": seconds / steps, "images_per_s": images, "tokens_per_s": tokens}


class Guard:
    """Records gradient norms since the last check, to report the first parameter that was not finite.

    `names` are in the order of the norms. With `scaled` losses an overflow lowers the loss scale and skips the update;
    it is an error only when the scale falls below 1.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], *, scaled: bool = False) -> None:
        self._model = model
        self._names = names
        self._scaled = scaled
        self._gradients: list[tuple[int, str, list[int], Tensor]] = []

    def watch(self, step: int, update: str, having: list[int], norms: Tensor) -> None:
        """Record gradient norms `[n]` of an update without synchronising."""
        self._gradients.append((step, update, having, norms))

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
        is_loss = bad.name.startswith("loss/")
        named = self._model.named_parameters()
        parameters = (
            f"parameter {name} is not finite"
            for name, p in named
            if not bool(local(p).isfinite().all())
        )
        tensors = (
            (f"{field.name} of the batch of stream {stream}", getattr(batch, field.name))
            for stream, batch in batches.items()
            for field in fields(batch)
        )
        inputs = (
            f"{name} is not finite"
            for name, value in tensors
            if isinstance(value, Tensor)
            and value.is_floating_point()
            and not bool(value.isfinite().all())
        )
        gradients = (
            f"the gradient of {self._names[index]} in update {update} has norm {norm}"
            for _, update, having, norms in watched
            for index, norm in zip(having, norms.tolist(), strict=True)
            if not math.isfinite(norm)
        )
        # The first of each kind; a loss comes before the gradients.
        searched = [] if is_loss else [gradients]
        searched += [parameters, inputs, self._bad_operations(batches, rerun)]
        causes = [cause for kind in searched if (cause := next(kind, None)) is not None]
        why = (
            f": {causes[0]}"
            if causes
            else ", though every tensor of the last batch is finite when it runs again"
        )
        more = f" (and {'; '.join(causes[1:3])})" if len(causes) > 1 else ""
        raise NonFiniteError(
            f"step {bad.step}: {bad.name.replace('/', ' ', 1)} is {bad.number}{why}{more}. The run has stopped, and "
            "the last checkpoint is as it was: lower optimizer.lr, lengthen schedule.warmup, or look at that batch"
        )

    def _is_bad(self, value: Value) -> bool:
        if value.name == "loss_scale":
            return value.number < 1
        return not math.isfinite(value.number) and not (
            self._scaled and value.name.startswith("grad_norm/")
        )

    def _bad_operations(
        self, batches: Mapping[str, Batch], rerun: Callable[[str, Batch], Tensor] | None
    ) -> Iterator[str]:
        if rerun is None:
            return
        parameters = {id(parameter): name for name, parameter in self._model.named_parameters()}
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for stream, batch in batches.items():
            with torch.enable_grad(), _FirstNonFinite(parameters) as search:
                loss = rerun(stream, batch)
                if search.found is None and loss.requires_grad:
                    search.direction = "backward"
                    torch.autograd.grad(loss, trained, allow_unused=True)
            if search.found is not None:
                yield f"stream {stream}: {search.found}"
                return


class _FirstNonFinite(TorchDispatchMode):
    """Finds the first op with finite inputs and a non-finite output; −inf is allowed because attention masks use it."""

    def __init__(self, parameters: Mapping[int, str]) -> None:
        super().__init__()
        self._parameters = parameters
        self._last_parameter = ""
        self.direction = "forward"
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            self._last_parameter = self._parameters.get(id(tensor), self._last_parameter)
        sound = self.found is None and not any(_is_bad(tensor) for tensor in given)
        result = func(*args, **(kwargs or {}))
        if (
            sound
            and not str(func).startswith(_UNINITIALISED)
            and any(map(_is_bad, tree_leaves(result)))
        ):
            where = self._last_parameter.rpartition(".")[0] or "the loss"
            self.found = f"the {self.direction} operation {func} at {where} is the first whose result is not finite"
        return result


def _is_bad(value: object) -> bool:
    # A weight packed for oneDNN cannot be looked into; the parameter that it comes from can.
    if (
        not isinstance(value, Tensor)
        or not value.is_floating_point()
        or value.layout != torch.strided
    ):
        return False
    return bool((value.isnan() | value.isposinf()).any())
