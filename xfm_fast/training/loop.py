"""The training loop of every recipe."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast.batches import Batch
from xfm_fast.data.streams import BatchSource, load_batches
from xfm_fast.errors import ConfigError, InputError
from xfm_fast.io import hold
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.training import checkpoints, setup
from xfm_fast.training.checkpoints import (
    Progress,
    random_state,
    save_whole,
    seed_everything,
    set_random_state,
)
from xfm_fast.training.distributed import (
    Losses,
    ParallelModel,
    Processes,
    join_processes,
    run_layers,
    stop_on_signal,
    sum_of_losses,
)
from xfm_fast.training.metrics import Guard, Meter, ModelNorms, RunLog, Show, Work, mean_by_name
from xfm_fast.training.optimizer import AdamW, WeightAverage, optimizer_groups, schedule_factor
from xfm_fast.training.recipe import Recipe, Run, changes, position_after

# The official loss scale starts high and is capped at this.
_LARGEST_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class TrainResult:
    """Result of a run; `average` holds averaged weights, `metrics` the last log line, a signal sets `interrupted`."""

    step: int
    model: XFM
    average: WeightAverage | None
    metrics: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


def train(
    recipe: Run,
    *,
    resume: bool = True,
    sources: Mapping[str, BatchSource[Any]] | None = None,
    model: XFM | None = None,
    objective: Losses | None = None,
    explained_by: Mapping[str, bytes] | None = None,
    on_start: Callable[[], None] | None = None,
    on_step: Callable[[int, XFM, WeightAverage | None], Mapping[str, float] | None] | None = None,
    show: Show | None = None,
) -> TrainResult:
    """Run a recipe on one process or on every process that `torchrun` started.

    Writes to `recipe.checkpoint.folder`: `checkpoints/`, `log.jsonl`, and at the end `model/` and `average/` (if any),
    which `XFM.from_pretrained` reads. Recipes other than pretraining pass `sources`, `model` and `objective`.
    `explained_by` maps names of files saved with the weights to their contents. `on_start` runs on the first process
    before it writes to the folder. `on_step` runs on every process after every step, and its result is logged; it may
    change the random state if it does so deterministically. `show` receives the last losses, steps done and all steps.
    """
    folder = Path(recipe.checkpoint.folder)
    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(recipe.device))
        processes.from_first(lambda: stack.enter_context(hold(folder / ".lock", f"checkpoint.folder={folder}")))
        opening = stack.enter_context(ExitStack())
        processes.from_first(lambda: opening.enter_context(setup.rollback_on_error(folder)))
        processes.from_first(on_start or (lambda: None))
        stop = stack.enter_context(stop_on_signal())
        if isinstance(recipe, Recipe):
            if sources is None:
                sources = setup.open_sources(recipe, processes)
                explained_by = explained_by or setup.tokenizer_file(recipe)
        elif sources is None or model is None or objective is None:
            raise InputError("a run that is not of pretraining needs sources, model and objective; pass all three")
        if missing := [name for update in recipe.active_updates for name in update if name not in sources]:
            raise InputError(f"sources lack the stream {', '.join(missing)}; pass one for every stream of the recipe")

        # The same initial weights on every process, then dropout of its own on each.
        seed_everything(recipe.seed)
        if isinstance(recipe, Recipe):
            model = (setup.build_model(recipe) if model is None else model).to(processes.device)
            explained_by = setup.preprocessor_file(model) | dict(explained_by or {})
            method = recipe.method
            objective = objective or partial(
                pretraining_losses,
                stop_gradient=method.stop_gradient,
                official_itc_gradient=method.official_itc_gradient,
                official_itm_negatives=method.official_itm_negatives,
            )
        assert model is not None
        assert objective is not None
        model, losses_of = model.to(processes.device).train(), objective
        run_layers(model, activation_checkpointing=recipe.activation_checkpointing, compiled=recipe.compile)
        parallel = ParallelModel(model, losses_of, processes, recipe.parallel)
        options = recipe.optimizer
        groups = optimizer_groups(model, options, large_lr=recipe.large_lr)
        optimizer = AdamW(groups, options.lr, options.betas, options.eps, zero_grad=options.zero_grad)
        peak_lr = [group["lr"] for group in optimizer.param_groups]
        average = None if recipe.ema is None else WeightAverage(model, recipe.ema)
        scaler = torch.amp.GradScaler(
            processes.device.type, init_scale=_LARGEST_LOSS_SCALE, enabled=recipe.precision == "fp16"
        )
        precision = setup.autocast(recipe, processes)
        progress = Progress(model, optimizer, scaler, {} if average is None else average.state_dict())
        seed_everything(recipe.seed, processes.rank)
        if not resume and (found := sorted((folder / "checkpoints").glob("step-*"))):
            raise ConfigError(
                f"{folder} holds {found[-1].name} of an earlier run; resume it, set checkpoint.folder to another "
                "folder, or delete it"
            )
        notes, saved = _resume(recipe, progress, processes) if resume else ([], None)
        randomness = random_state(processes.device) if saved is None else saved

        log = stack.enter_context(
            RunLog(folder, recipe.log, processes, steps=recipe.steps, start=progress.step, show=show)
        )
        for note in notes if processes.first else []:
            print(f"xfm-fast: {note}", file=sys.stderr)
        loaders: dict[str, Iterator[Batch]] = {}
        for stream in (stream for update in recipe.active_updates for stream in update):
            start = progress.batches.setdefault(stream, 0)
            pin = processes.device.type == "cuda"
            loader = load_batches(sources[stream], start=start, workers=recipe.workers, pin_memory=pin)
            stack.callback(loader.close)  # type: ignore[attr-defined]
            if progress.step < recipe.steps:
                # Data that cannot be read on one process are an error on all of them, before the first step.
                first = processes.together(partial(next, loader))
                loaders[stream] = chain([first], loader)
        # Starting workers draws random numbers, which must not depend on how many there are.
        set_random_state(randomness, processes.device)

        norms, meter = ModelNorms(model), Meter()
        guard = Guard(model, norms.names, scaled=scaler.is_enabled())

        def rerun(stream: str, batch: Batch) -> Tensor:
            with precision:
                return sum_of_losses(losses_of(model, batch, losses=recipe.losses_of(stream)))

        # Where checking is free or happens every step anyway, bad gradients never reach the weights.
        look = processes.device.type == "cpu" or recipe.log.every == 1
        work, metrics, logged, clock = Work(processes.world_size), {}, progress.step, time.perf_counter()
        interrupted = False

        opening.close()
        while progress.step < recipe.steps and not interrupted:
            step = progress.step + 1
            log_now = step % recipe.log.every == 0 or step % recipe.checkpoint.every == 0 or step == recipe.steps
            before = norms.copy() if log_now else None
            factor = schedule_factor(
                recipe.schedule, progress.step, steps=recipe.schedule.steps or recipe.steps, lr=options.lr
            )
            for group, lr in zip(optimizer.param_groups, peak_lr, strict=True):
                group["lr"] = lr * factor

            for update in recipe.active_updates:
                optimizer.zero_grad()
                losses = [(stream, part) for part in range(recipe.accumulate) for stream in update]
                batches: dict[str, Batch] = {}
                finite = True
                for number, (stream, _) in enumerate(losses, start=1):
                    batch = processes.together(partial(next, loaders[stream]))
                    progress.batches[stream] += 1
                    work.count(batch)
                    batch = batches[stream] = batch.to(processes.device)
                    weight = recipe.weight_of(stream) / recipe.accumulate
                    with parallel.synchronised(last=number == len(losses)):
                        with precision:
                            loss, values = parallel.module(batch, recipe.losses_of(stream))
                        scaler.scale(loss * weight).backward()
                    meter.add(step, {f"loss/{stream}/{name}": value for name, value in values.items()})
                    finite = finite and (not look or math.isfinite(loss.item()))
                scaler.unscale_(optimizer)
                having, each = norms.gradients()
                total = torch.linalg.vector_norm(each)
                meter.add(step, {f"grad_norm/{'+'.join(update)}": total})
                if log_now:
                    parts = norms.by_part(each, having)
                    meter.add(step, {f"grad_norm/{'+'.join(update)}/{p}": n for p, n in parts.items() if p != "all"})
                guard.watch(step, "+".join(update), having, each)
                finite = finite and (not look or scaler.is_enabled() or math.isfinite(total.item()))
                if look and processes.any(not finite):
                    guard.check(meter.read(processes), batches, rerun)
                if options.clip_norm is not None:
                    norms.clip_(total, options.clip_norm)
                scaler.step(optimizer)
                if scaler.is_enabled():
                    scaler.update()
                    scale = scaler.scale(torch.ones((), device=processes.device)).clamp(max=_LARGEST_LOSS_SCALE)
                    scaler.update(scale)
                    meter.add(step, {"loss_scale": scale})
                parallel.stepped()
            if average is not None:
                average.update()
            progress.step = step
            checkpoints.note_kernels(progress, folder, processes)
            interrupted = processes.any(stop.is_set()) and step < recipe.steps
            log.advance(step)

            if log_now or interrupted:
                if before is not None:
                    meter.add(step, {f"param_norm/{part}": norm for part, norm in norms.values().items()})
                    meter.add(step, {f"update_norm/{part}": norm for part, norm in norms.updates(before).items()})
                values = meter.read(processes)
                guard.check(values, {})
                seconds = time.perf_counter() - clock
                metrics = mean_by_name(values) | {"lr": options.lr * factor, "steps": step - logged}
                metrics |= work.rates(step - logged, seconds)
                log.write(step, metrics)
                logged, clock = step, time.perf_counter()
            if on_step is not None and (extra := on_step(step, model, average)):
                log.write(step, extra)
            if step % recipe.checkpoint.every == 0 or step == recipe.steps or interrupted:
                log.sync()
                dump, place = recipe.model_dump(mode="json"), folder / "checkpoints"
                checkpoints.save(progress, dump, place, processes, keep=recipe.checkpoint.keep)

        if not interrupted:
            save_whole(model, folder / "model", processes, files=explained_by)
            if average is not None:
                save_whole(model, folder / "average", processes, average=average.state_dict(), files=explained_by)
        return TrainResult(progress.step, model, average, metrics, interrupted)


def _resume(recipe: Run, progress: Progress, processes: Processes) -> tuple[list[str], dict[str, Tensor] | None]:
    """Restore the newest valid checkpoint; returns messages for the user and the random state of this process."""
    found = processes.from_first(lambda: checkpoints.newest(Path(recipe.checkpoint.folder) / "checkpoints"))
    if found is None:
        checkpoints.settle_kernels(Path(recipe.checkpoint.folder), processes)
        return [], None
    notes = [*found.rejected, f"going on from {found.path}"]
    before, world = found.state["recipe"], found.state["world_size"]
    with checkpoints.reading(found.path):
        notes += changes(before, recipe, world, processes.world_size)
        checkpoints.load(found, progress)
        for stream in {name for update in recipe.active_updates for name in update} & set(progress.batches):
            progress.batches[stream] = position_after(
                progress.batches[stream], stream, before, recipe, world, processes.world_size
            )
    saved = checkpoints.random_states(found, processes)
    if saved is None:
        seed_everything(recipe.seed, processes.rank, progress.step)
    return notes, saved
