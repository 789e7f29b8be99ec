"""Distributed training: process group, DDP and FSDP wrapping, activation checkpointing, signals."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from types import FrameType
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from xfm_fast.batches import Batch
from xfm_fast.errors import UnavailableError, XFMError
from xfm_fast.kernels import caching
from xfm_fast.models.text import AttentionProjections, TransformerLayer
from xfm_fast.models.vision import Block
from xfm_fast.models.xfm import XFM

T = TypeVar("T")

Losses = Callable[..., dict[str, Tensor]]
"""`losses(model, batch, losses=names)`, e.g. `pretraining_losses`."""

_GROUPS = count()
# Methods that the model calls in place of `forward`; wrappers must wrap them.
_METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    Block: ("forward",),
    TransformerLayer: ("self_attention", "cross_attention", "feed_forward"),
    AttentionProjections: ("project_query", "project_memory"),
}


@dataclass(frozen=True)
class Processes:
    """Process group as seen by one rank; `control` is the CPU group for small objects (None: default)."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; collective."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def gather(self, value: T) -> list[T]:
        """Gather the value of every rank, in rank order; collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank and raise on all ranks if it fails on any; collective."""
        if self.world_size == 1:
            return action()
        failure: Exception | None = None
        try:
            value = action()
        except Exception as error:
            failure, value = error, None
        if self.any(failure is not None):
            message = None if failure is None else str(failure) or type(failure).__name__
            reasons = self.gather(message)
            rank = next(rank for rank, reason in enumerate(reasons) if reason is not None)
            raise failure or XFMError(
                f"process {rank} of {self.world_size} has failed: {reasons[rank]}"
            )
        return cast("T", value)

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average over ranks, in place; collective."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def from_first(self, action: Callable[[], T]) -> T:
        """Run `action` on the first rank; its result is returned, or its error raised, on every rank."""
        outcome: Any = (None, None)
        if self.first:
            try:
                outcome = (action(), None)
            except Exception as error:
                if self.world_size == 1:
                    raise
                outcome = (None, error)
        value, failure = self.gather(outcome)[0]
        if failure is not None:
            raise failure
        return value


@contextmanager
def join_processes(device: Literal["auto", "cpu", "cuda"]) -> Iterator[Processes]:
    """Join the processes of this run; a group initialised by the caller is reused and left open."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if not local_rank.isdecimal():
        raise UnavailableError(
            f"LOCAL_RANK={local_rank!r} is not a number; start processes with torchrun, or unset LOCAL_RANK"
        )
    target = torch.device("cpu")
    if device == "cuda":
        if int(local_rank) >= torch.cuda.device_count():
            raise UnavailableError(
                f"process {local_rank} of this machine has no GPU: PyTorch finds {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs, or choose device=cpu"
            )
        target = torch.device("cuda", int(local_rank))
        torch.cuda.set_device(target)
    started = not dist.is_initialized() and os.environ.get("WORLD_SIZE", "1") != "1"
    if started:
        try:
            store, rank, world_size = _rendezvous()
        except ValueError as error:
            raise UnavailableError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but this process cannot join the others ({error}); start them "
                "with torchrun, or unset WORLD_SIZE"
            ) from None
        # Under a prefix, since a second group must not read the addresses of the first one.
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore(f"group {next(_GROUPS)}", store),
            rank=rank,
            world_size=world_size,
            device_id=target if device == "cuda" else None,
        )
    try:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            yield Processes(device=target)
            return
        control = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        assert not isinstance(control, int)
        yield Processes(dist.get_rank(), dist.get_world_size(), target, control)
    finally:
        if started:
            end_groups()


@cache
def _rendezvous() -> tuple[dist.Store, int, int]:
    """Return store, rank and world size of the launched processes."""
    return next(iter(rendezvous("env://")))


def end_groups() -> None:
    """Destroy all process groups, leaking gloo groups on purpose.

    The destructor of a gloo group joins its threads while it holds the GIL, and can deadlock with a
    thread that releases tensors (PyTorch 2.13). A leaked reference keeps the destructor from running.
    """
    for group, (backend, _) in dist.distributed_c10d._world.pg_map.items():
        if "gloo" in str(backend):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    dist.destroy_process_group()


def run_layers(
    model: XFM, *, activation_checkpointing: bool = False, compiled: bool = False
) -> None:
    """Enable activation checkpointing and `torch.compile` on all encoder layers, in place."""
    if not (activation_checkpointing or compiled):
        return
    for module in model.modules():
        if isinstance(module, (Block, TransformerLayer)):
            for name in _methods(module):
                method = getattr(module, name)
                if compiled:
                    method = torch.compile(method)
                if activation_checkpointing:
                    method = partial(checkpoint, method, use_reentrant=False)
                setattr(module, name, method)


def _methods(module: nn.Module) -> list[str]:
    """Return the methods of a layer to wrap."""
    names = next(names for layer, names in _METHODS.items() if isinstance(module, layer))
    crosses = hasattr(module, "crossattention")
    return [name for name in names if crosses or name != "cross_attention"]


def sum_of_losses(losses: Mapping[str, Tensor]) -> Tensor:
    """Sum the losses to the scalar to backpropagate."""
    return torch.stack([*losses.values()]).sum()


class _LossSum(nn.Module):
    """Wraps the losses of a batch in one forward pass, which DDP and FSDP hook."""

    def __init__(self, model: XFM, losses: Losses) -> None:
        super().__init__()
        self.model = model
        self._losses = losses

    def forward(self, batch: Batch, names: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        losses = self._losses(self.model, batch, losses=names)
        return sum_of_losses(losses), {name: loss.detach() for name, loss in losses.items()}


class ParallelModel:
    """A model under DDP, FSDP2 or a single process.

    `module(batch, names)` returns the sum of losses, and the detached losses. Gradients are averaged
    only in the last backward pass of an update. FSDP2 gathers vision blocks when they run; layers of the
    other encoders stay gathered until the backward pass.
    """

    def __init__(
        self, model: XFM, losses: Losses, processes: Processes, method: Literal["ddp", "fsdp"]
    ) -> None:
        self.model = model
        self.sharded = method == "fsdp" and processes.world_size > 1
        self._processes = processes
        # FSDP cannot shard a 0-dim tensor like the temperature.
        self._scalars = [p for p in model.parameters() if self.sharded and p.ndim == 0]
        module = _LossSum(model, losses)
        if self.sharded:
            _shard(module, processes, set(self._scalars))
        elif processes.world_size > 1:
            # A batch of text leaves two encoders out, so unused parameters differ between updates.
            module = DistributedDataParallel(module, find_unused_parameters=True)
        self.module: nn.Module = module

    @contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Run one forward and backward pass; only the `last` one of an update averages gradients."""
        context = nullcontext()
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        elif isinstance(self.module, DistributedDataParallel) and not last:
            context = self.module.no_sync()
        with context:
            yield
        if last:
            for scalar in self._scalars:
                if scalar.grad is not None:
                    self._processes.mean_(scalar.grad)

    def stepped(self) -> None:
        """Clear the cache after an optimizer step, where it cannot notice the change."""
        if self.sharded:
            # FSDP writes gathered parameters without advancing the versions that the cache watches.
            caching.clear()


def _shard(module: _LossSum, processes: Processes, replicated: set[nn.Parameter]) -> None:
    # It warns of writes into the outputs of a layer, which no layer here makes.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    blocks = [layer for layer in module.modules() if isinstance(layer, Block)]
    layers = [layer for layer in module.modules() if isinstance(layer, TransformerLayer)]
    # A fusion layer's keys and values are computed long before the layer runs.
    early = [layer.crossattention.self for layer in layers if hasattr(layer, "crossattention")]
    for layer in [*early, *layers, *blocks]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=isinstance(layer, Block))
        for name in _methods(layer):
            if name != "forward":
                register_fsdp_forward_method(layer, name)
    fully_shard(module, mesh=mesh, reshard_after_forward=False, ignored_params=replicated)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that the first SIGTERM, SIGINT or SIGHUP sets; a second signal acts as usual."""
    request = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {code: signal.getsignal(code) for code in (signal.SIGTERM, signal.SIGINT)}
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        handlers[hangup] = signal.getsignal(hangup)

    def stop(code: int, _: FrameType | None) -> None:
        request.set()
        signal.signal(code, handlers[signal.Signals(code)])

    for code in handlers:
        signal.signal(code, stop)
    try:
        yield request
    finally:
        for code, handler in handlers.items():
            signal.signal(code, handler)
