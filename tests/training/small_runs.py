"""Runs of a tiny model on noise, in this process or in others that may be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.training.synthetic import synthetic_batch
from xfm_fast.config import XFMConfig
from xfm_fast.training import checkpoints
from xfm_fast.training.loop import TrainResult, train
from xfm_fast.training.metrics import read_log
from xfm_fast.training.recipe import Recipe

RATES = {"seconds", "images_per_s", "tokens_per_s"}
ROOT = Path(__file__).resolve().parents[2]
_KINDS = ("text", "regions", "images", "pairs")


class Noise:
    """Batch n of a rank is noise seeded by the kind, the rank and n."""

    def __init__(self, kind: str, config: XFMConfig, size: int, rank: int = 0) -> None:
        self.kind, self.config, self.size, self.rank = kind, config, size, rank

    def __len__(self) -> int:
        return 10

    def batch(self, number: int) -> Any:
        seed = 10_000 * _KINDS.index(self.kind) + 1_000 * self.rank + number
        return synthetic_batch(self.kind, self.config, size=self.size, seed=seed)


class Joined:
    """Batches of several sources as one, `per` numbers of each."""

    def __init__(self, parts: list[Noise], per: int = 1) -> None:
        self.parts, self.per = parts, per

    def __len__(self) -> int:
        return len(self.parts[0])

    def batch(self, number: int) -> Any:
        return joined(
            [part.batch(number * self.per + i) for i in range(self.per) for part in self.parts]
        )


def joined(batches: list[Any]) -> Any:
    """One batch with the items of several, which all have texts of the same width."""
    values: dict[str, Any] = {}
    for field in fields(batches[0]):
        found = [getattr(batch, field.name) for batch in batches]
        if field.name == "image_index":
            before = [sum(len(batch.image) for batch in batches[:i]) for i in range(len(batches))]
            found = [index + offset for index, offset in zip(found, before, strict=True)]
        values[field.name] = torch.cat(found) if isinstance(found[0], Tensor) else None
    return type(batches[0])(**values)


def small_recipe(folder: Path, **changes: Any) -> Recipe:
    """All four kinds of stream on a tiny model with dropout; a checkpoint every 4 steps, a line every step."""
    stream = {"paths": "nowhere", "batch_size": 4}
    text = {**stream, "max_tokens": 20}
    values: dict[str, Any] = {
        "model": {"preset": "tiny", "vision_depth": 1, "text_layers": 1, "fusion_layers": 1},
        "streams": {
            "text": {**text, "kind": "text"},
            "regions": {**text, "kind": "regions"},
            "images": {**stream, "kind": "images"},
            "pairs": {**text, "kind": "pairs"},
        },
        "updates": [["text"], ["regions", "images"], ["pairs"]],
        "steps": 8,
        "optimizer": {"lr": 1e-3},
        "device": "cpu",
        "checkpoint": {"folder": str(folder), "every": 4, "keep": 2},
        "log": {"every": 1},
    }
    return Recipe(**(values | changes))


def without_dropout() -> dict[str, Any]:
    """Model fields of a run whose numbers do not depend on random states."""
    return {
        "preset": "tiny", "vision_depth": 1, "text_layers": 1, "fusion_layers": 1,
        "hidden_dropout": 0.0, "attention_dropout": 0.0, "drop_path_rate": 0.0,
    }  # fmt: skip


def noise(recipe: Recipe, rank: int = 0) -> dict[str, Any]:
    """A source for every stream."""
    return {
        name: Noise(stream.kind, recipe.model, recipe.micro_batch_size(name), rank)
        for name, stream in recipe.streams.items()
    }


def run(recipe: Recipe, **options: Any) -> TrainResult:
    """Train in this process."""
    return train(recipe, sources=options.pop("sources", None) or noise(recipe), **options)


def numbers(folder: Path, after: int = 0) -> list[dict[str, float]]:
    """The log lines behind a step, without what depends on the clock."""
    lines = [line for line in read_log(folder / "log.jsonl") if line["step"] > after]
    return [{name: value for name, value in line.items() if name not in RATES} for line in lines]


def kill_at(step: int) -> Callable[[int, Any, Any], None]:
    def kill(done: int, *_: object) -> None:
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def in_processes(
    target: Callable[..., None],
    world_size: int,
    *arguments: Any,
    timeout: float = 600,
    kill_after: float | None = None,
) -> list[int]:
    """Run `target(rank, world_size, *arguments)` in new processes; their exit codes.

    When one of them is killed, so are the others, as torchrun has it; and all of them `kill_after` so many seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        # The server that imports PyTorch once for all processes does not take over sys.path (Python < 3.13).
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        forkserver.ensure_running()
    processes = [
        context.Process(target=target, args=(rank, world_size, *arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    ends = time.monotonic() + (timeout if kill_after is None else kill_after)
    while alive := [process for process in processes if process.is_alive()]:
        killed = any(process.exitcode == -signal.SIGKILL for process in processes)
        if killed or time.monotonic() > ends:
            for process in alive:
                process.kill()
                process.join()
        else:
            connection.wait(
                [process.sentinel for process in alive], max(0.0, ends - time.monotonic())
            )
    return [process.exitcode or 0 for process in processes]


def join_group(rank: int, world_size: int, meeting_point: Path) -> None:
    """Become one of the processes of a gloo group."""
    torch.set_num_threads(1)
    # A process of the server would start loader workers in its own way, which imports PyTorch in each.
    multiprocessing.set_start_method("fork", force=True)
    torch.use_deterministic_algorithms(True)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=world_size,
            timeout=timedelta(seconds=600),
        )  # fmt: skip


def process_of_a_run(
    rank: int, world_size: int, meeting_point: Path, recipe: Recipe, options: Mapping[str, Any]
) -> None:
    """What `in_processes` calls: one process of a run, which may kill itself.

    Options: `kill_at` a step, `kill_in_checkpoint` of a step, before its manifest is written.
    """
    join_group(rank, world_size, meeting_point)
    if at := options.get("kill_in_checkpoint"):
        seal = checkpoints._seal

        def die(folder: Path) -> None:
            if folder.name.endswith(f"{at:08d}.tmp"):
                os.kill(os.getpid(), signal.SIGKILL)
            seal(folder)

        checkpoints._seal = die
    train(recipe, sources=noise(recipe, rank), on_step=kill_at(options.get("kill_at", -1)))


def batch_of(recipe: Recipe, stream: str, number: int = 0) -> Any:
    """A batch of noise for a stream."""
    return noise(recipe)[stream].batch(number)
