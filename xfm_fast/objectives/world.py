"""The process group of a global batch, and its communication: features with gradients, detached texts, and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xfm_fast.errors import InputError
from xfm_fast.kernels import host


@dataclass(frozen=True)
class World:
    """The processes that share a global batch; a single process sends no messages."""

    group: dist.ProcessGroup | None = None  # None for the default process group
    size: int = 1  # W processes
    rank: int = 0

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> World:
        """Wrap the given group, or the default one if torch.distributed is initialised."""
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(group, dist.get_world_size(group), dist.get_rank(group))

    def gather(self, rows: Tensor) -> Tensor:
        """`[B, ...]` of every process → `[W * B, ...]`, rank by rank, without gradient."""
        if self.size == 1:
            return rows.detach()
        rows = rows.detach().contiguous()
        gathered = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        # Newer versions of PyTorch rename it and warn about this name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, rows, group=self.group)
        return gathered

    def gather_with_gradient(self, rows: Tensor) -> Tensor:
        """`gather` with the true gradient: the sum of all processes' gradients of this process's rows."""
        return rows if self.size == 1 else _Gather.apply(rows, self)

    def counts(self, **local: Tensor) -> dict[str, Tensor]:
        """Integers of every process, each `[W]`, in one message."""
        gathered = self.gather(torch.stack([count.long() for count in local.values()])[None])
        return dict(zip(local, gathered.unbind(1), strict=True))

    def mean(self, mean: Tensor, counts: Tensor) -> Tensor:
        """Weigh a mean over this process's targets so that the mean over processes is the mean over all `counts`."""
        if self.size == 1:
            return mean
        # Integers divided by integers would be rounded to fp32.
        return mean * (counts[self.rank].to(mean.dtype) * self.size / counts.sum().clamp_min(1))


def check_equal(counts: dict[str, Tensor]) -> None:
    """Every process has the same counts (each `[W]`), on which the sizes of messages depend.

    Raises `InputError`; on an accelerator it is a device-side assertion, which does not synchronise.
    """
    advice = "give every process batches of the same size and drop the last incomplete one"
    for name, of_all in counts.items():
        same = of_all == of_all[0]
        if same.device.type != "cpu":
            torch._assert_async(same.all(), f"the processes differ in {name}: {advice}")
        elif not host.all_true(same):
            raise InputError(f"the processes differ in {name} ({', '.join(map(str, host.integers(of_all)))}): {advice}")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, rows.shape[0]
        return world.gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # An all-reduce of features is small, and unlike reduce-scatter every backend has it.
        total = gradients[0].contiguous()
        if total is gradients[0]:
            total = total.clone()
        dist.all_reduce(total, group=ctx.world.group)
        return total.narrow(0, ctx.world.rank * ctx.rows, ctx.rows), None


class ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class HostCopy:
    """An asynchronous copy of device values to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensors = tensors
        if any(tensor.device.type != "cpu" for tensor in tensors):
            self._tensors = tuple(t.to("cpu", non_blocking=True) for t in tensors)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> tuple[Tensor, ...]:
        """The values, on CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
