"""The processes that share a global batch, and their messages: features with gradients, detached texts, and counts."""

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
    """The processes that share a global batch; alone, nothing is sent.

    Attributes:
        group: their process group; None for the default one.
        size: W, their number.
        rank: number of this one.
    """

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> World:
        """The given group, or the default one where processes were started."""
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(group, dist.get_world_size(group), dist.get_rank(group))

    def gather(self, rows: Tensor) -> Tensor:
        """`[B, ...]` of every process → `[W * B, ...]`, rank by rank, without gradient."""
        if self.size == 1:
            return rows.detach()
        rows = rows.detach().contiguous()
        gathered = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        # Newer versions of PyTorch have another name for it and warn of this one.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, rows, group=self.group)
        return gathered

    def gather_with_gradient(self, rows: Tensor) -> Tensor:
        """`gather` whose gradient is the true one: the sum of what all processes have for this one's rows."""
        return rows if self.size == 1 else _Gather.apply(rows, self)

    def counts(self, **local: Tensor) -> dict[str, Tensor]:
        """Integers of every process, each `[W]`, in one message."""
        gathered = self.gather(torch.stack([count.long() for count in local.values()])[None])
        return dict(zip(local, gathered.unbind(1), strict=True))

    def mean(self, mean: Tensor, counts: Tensor) -> Tensor:
        """A mean over this process's targets, weighed so that the mean over processes is the mean over all targets.

        Args:
            mean: scalar.
            counts: `[W]` targets of every process.
        """
        if self.size == 1:
            return mean
        # Integers divided by integers would be rounded to fp32.
        return mean * (counts[self.rank].to(mean.dtype) * self.size / counts.sum().clamp_min(1))


def check_equal(counts: dict[str, Tensor]) -> None:
    """Every process has the same counts (each `[W]`), on which the sizes of what they exchange depend.

    Raises:
        InputError: they differ. On an accelerator this is asserted on the device, since looking would synchronise.
    """
    advice = "give every process equally many of equal width, and drop the incomplete batch at the end of an epoch"
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
        # A sum over all processes of features alone is small, and unlike a reduce-scatter every backend has it.
        total = gradients[0].contiguous()
        if total is gradients[0]:
            total = total.clone()
        dist.all_reduce(total, group=ctx.world.group)
        return total.narrow(0, ctx.world.rank * ctx.rows, ctx.rows), None


class ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied with a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class HostCopy:
    """Values of a device on their way to the host, which goes on launching work until it needs them."""

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
