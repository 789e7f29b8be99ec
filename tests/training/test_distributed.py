"""Two processes train as one does on the batches of both, and tell each other gradients once per update."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.agreement import deterministic_algorithms
from tests.training.small_runs import (
    Joined,
    Noise,
    in_processes,
    join_group,
    noise,
    numbers,
    process_of_a_run,
    run,
    small_recipe,
    without_dropout,
)
from xfm_fast.errors import DataError, XFMError
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.training.checkpoints import newest
from xfm_fast.training.distributed import ParallelModel, join_processes, run_layers
from xfm_fast.training.loop import train
from xfm_fast.training.metrics import ModelNorms
from xfm_fast.training.optimizer import local


def drawless(folder: Path, **changes: Any) -> Any:
    """A recipe in which nothing is drawn: no dropout, no hard negatives."""
    recipe = small_recipe(folder, model=without_dropout())
    streams = {name: stream.model_dump() for name, stream in recipe.streams.items()}
    streams["pairs"]["losses"] = ["itc", "imlm", "mim"]
    streams["regions"]["losses"] = ["itc", "imlm", "bbox_l1", "bbox_giou"]
    if batch_size := changes.pop("batch_size", None):
        for stream in streams.values():
            stream["batch_size"] = batch_size
    settings = {
        "streams": streams,
        "model": without_dropout(),
        "steps": 3,
        "optimizer": {"lr": 1e-3, "clip_norm": 0.5},
    }
    return small_recipe(folder, **(settings | changes))


def on_all_batches(recipe: Any, world_size: int) -> dict[str, Any]:
    """For one process, the batches of several, joined."""
    return {
        name: Joined(
            [
                Noise(stream.kind, recipe.model, stream.batch_size // world_size, rank)
                for rank in range(world_size)
            ]
        )
        for name, stream in recipe.streams.items()
    }


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def parameters(folder: Path) -> dict[str, Tensor]:
    model = XFM.from_pretrained(folder / "model")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process on batches of 8."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = drawless(folder, batch_size=8)
    with deterministic_algorithms():
        run(recipe, sources=on_all_batches(recipe, 2))
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path: Path, alone: Path, parallel: str) -> None:
    recipe = drawless(
        tmp_path / "run",
        parallel=parallel,
        checkpoint={"folder": str(tmp_path / "run"), "every": 2},
    )
    assert in_processes(process_of_a_run, 2, tmp_path / "meet", recipe, {}) == [0, 0]
    # Adam divides small gradients by small numbers, rounding and all; a wrong gradient shows as 1e-3 a step.
    assert_close(parameters(tmp_path / "run"), parameters(alone), 2e-5)
    for ours, theirs in zip(numbers(tmp_path / "run"), numbers(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), name
    # One process reads the checkpoint, which has the same files for both.
    found = newest(tmp_path / "run/checkpoints")
    assert found is not None
    assert {path.name for path in found.path.iterdir()} == {
        "manifest.json", "model", "state.json", "training.safetensors"
    }  # fmt: skip
    assert_close(parameters(found.path), parameters(tmp_path / "run"), 0)


@pytest.mark.parametrize(("before", "after"), [("fsdp", "ddp"), ("ddp", "fsdp")])
@pytest.mark.slow
def test_checkpoints_of_shards_and_of_wholes_serve_both(
    tmp_path: Path, before: str, after: str
) -> None:
    folder = tmp_path / "run"
    settings: dict[str, Any] = {
        "steps": 6,
        "ema": 0.5,
        "checkpoint": {"folder": str(folder), "every": 3, "keep": 1},
    }
    whole = {**settings, "checkpoint": {"folder": str(tmp_path / "whole"), "every": 3}}
    assert in_processes(
        process_of_a_run, 2, tmp_path / "a", drawless(tmp_path / "whole", **whole), {}
    ) == [0, 0]
    recipe = drawless(folder, parallel=before, **settings)
    assert in_processes(process_of_a_run, 2, tmp_path / "b", recipe, {"kill_at": 4}) == [-9, -9]
    recipe = drawless(folder, parallel=after, **settings)
    assert in_processes(process_of_a_run, 2, tmp_path / "c", recipe, {}) == [0, 0]
    assert_close(parameters(folder), parameters(tmp_path / "whole"), 5e-5)


def gradients_travel_once_per_update(rank: int, folder: Path) -> None:
    """One reduction of every bucket in every update, however many losses it has."""
    recipe = drawless(folder)
    with join_processes("cpu") as processes:
        torch.manual_seed(0)
        parallel = ParallelModel(XFM(recipe.model), pretraining_losses, processes, "ddp")
        reductions = []

        def counted(state, bucket):  # DDP refuses other annotations than its own
            reductions.append(bucket.index())
            return allreduce_hook(state, bucket)

        parallel.module.register_comm_hook(None, counted)  # type: ignore[operator]
        sources = noise(recipe, rank)
        per_update = []
        for update in (["text"], ["pairs", "regions", "images", "pairs"], ["text"]):
            parallel.model.zero_grad()
            reductions.clear()
            for number, stream in enumerate(update, start=1):
                with parallel.synchronised(last=number == len(update)):
                    loss, _ = parallel.module(
                        sources[stream].batch(number), recipe.losses_of(stream)
                    )
                    loss.backward()
                same = processes.gather(float(ModelNorms(parallel.model).gradients()[1].norm()))
                assert (same[0] == same[1]) == (number == len(update))
            per_update.append(len(reductions))
            reached = {
                name.split(".")[0]
                for name, p in parallel.model.named_parameters()
                if p.grad is not None
            }
            assert ("vision_encoder" in reached) == (update != ["text"])
        assert per_update[0] > 0
        assert len(set(per_update)) == 1, per_update


def every_process_keeps_its_part(rank: int, folder: Path) -> None:
    with join_processes("cpu") as processes:
        model = XFM(drawless(folder).model)
        whole = sum(parameter.numel() for parameter in model.parameters())
        parallel = ParallelModel(model, pretraining_losses, processes, "fsdp")
        assert isinstance(parallel.module, FSDPModule)
        kept = sum(local(parameter).numel() for parameter in model.parameters())
        assert kept < 0.52 * whole
        assert [name for name, p in model.named_parameters() if not isinstance(p, DTensor)] == [
            "temp"
        ]


def processes_agree(rank: int, folder: Path) -> None:
    with join_processes("auto") as processes:
        assert (processes.rank, processes.world_size, processes.first) == (rank, 2, rank == 0)
        assert processes.gather(rank) == [0, 1]
        assert processes.any(rank == 1)
        assert not processes.any(False)
        assert processes.from_first(lambda: f"from {rank}") == "from 0"
        assert processes.mean_(torch.tensor([float(rank)])).item() == 0.5
        with pytest.raises(ZeroDivisionError):
            processes.from_first(lambda: 1 // 0)
    assert dist.is_initialized()


class Ending:
    """Batches of noise, up to one that cannot be made."""

    def __init__(self, batches: Noise, last: int) -> None:
        self.batches, self.last = batches, last

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, number: int) -> Any:
        if number > self.last:
            raise DataError("4 of 300 rows are broken")
        return self.batches.batch(number)


def data_that_break_on_one_process_stop_all(rank: int, folder: Path) -> None:
    """At the start or later: nobody waits in an exchange for the one that has stopped, and all say why."""
    for last in (-1, 4):
        recipe = small_recipe(folder / f"until{last}")
        sources = noise(recipe, rank)
        if rank == 1:
            sources["pairs"] = Ending(sources["pairs"], last)
        with pytest.raises(XFMError, match="4 of 300 rows") as error:
            train(recipe, sources=sources)
        assert isinstance(error.value, DataError) == (rank == 1)
        assert ("process 1 of 2" in str(error.value)) == (rank == 0)


def work_in_a_group(rank: int, world_size: int, meeting_point: Path, folder: Path) -> None:
    join_group(rank, world_size, meeting_point)
    for check in (
        processes_agree, gradients_travel_once_per_update, every_process_keeps_its_part,
        data_that_break_on_one_process_stop_all,
    ):  # fmt: skip
        check(rank, folder)


def test_two_processes_work_in_a_group(tmp_path: Path) -> None:
    """The functions above."""
    assert in_processes(work_in_a_group, 2, tmp_path / "meet", tmp_path) == [0, 0]
    assert [path.name for path in tmp_path.glob("until*/checkpoints/*")] == ["step-00000004"]


def begin_and_end(rank: int, world_size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
    }  # fmt: skip
    # A thread that waits for the interpreter gets it when this one rests and not before.
    sys.setswitchinterval(1000)
    for number in range(20):
        with join_processes("cpu") as processes:
            assert processes.gather((number, rank)) == [(number, 0), (number, 1)]
        assert not dist.is_initialized()


def test_groups_end_and_begin_again() -> None:
    """A thread of gloo that waits to let go of tensors stops nobody from ending."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    assert in_processes(begin_and_end, 2, port, timeout=60) == [0, 0]


def gradients(model: XFM, recipe: Any, stream: str) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    losses = pretraining_losses(
        model, noise(recipe)[stream].batch(0), losses=recipe.losses_of(stream)
    )
    loss = torch.stack([*losses.values()]).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.detach(), [gradient for gradient in found if gradient is not None]


def test_activation_checkpointing_keeps_less(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    kept = []
    for checkpointed in (False, True):
        model = XFM(recipe.model).train()
        run_layers(model, activation_checkpointing=checkpointed)
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = pretraining_losses(model, noise(recipe)["images"].batch(0))["mim"]
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept.append(sum(size for pointer, size in saved.items() if pointer not in weights))
        loss.backward()
    assert kept[1] < kept[0] / 2


@pytest.mark.slow
def test_compiled_layers_agree(tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    recipe = drawless(tmp_path)
    model = XFM(recipe.model).train()
    plain = {stream: gradients(model, recipe, stream) for stream in ("text", "images")}
    run_layers(model, compiled=True, activation_checkpointing=True)
    for stream, (loss, expected) in plain.items():
        again, found = gradients(model, recipe, stream)
        torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
