"""The training loop of all recipes, and its setup: initial weights, vocabulary and data streams."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast.batches import Batch
from xfm_fast.checkpoint import heads_in, initialise, load_pretrained_files
from xfm_fast.checkpoint.files import MODEL_FILE, TOKENIZER_FILE, model_folder
from xfm_fast.data.fingerprints import SeenImages, fingerprint_of
from xfm_fast.data.records import open_records
from xfm_fast.data.streams import BatchSource, Quarantine, Stream, load_batches
from xfm_fast.errors import ConfigError, DataError, InputError, XFMError
from xfm_fast.io import hold, make_folder, write_bytes
from xfm_fast.models.hub import PREPROCESSOR_FILE
from xfm_fast.models.processor import preprocessor_json
from xfm_fast.models.xfm import PRECISIONS, XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption
from xfm_fast.training import checkpoints
from xfm_fast.training.checkpoints import (
    Progress,
    random_state,
    save_model,
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
from xfm_fast.training.recipe import Recipe, Run, flatten
from xfm_fast.training.recipe_fields import ImageStream, RegionStream, TextStream

# The official loss scale starts high and is capped at this.
_LARGEST_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        average: averaged weights.
        metrics: values of the last line of the log.
        interrupted: whether a signal ended the run.
    """

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

    Writes to `recipe.checkpoint.folder`: `checkpoints/`, `log.jsonl`, and at the end `model/` and
    `average/` (if any), which `XFM.from_pretrained` reads. Recipes other than pretraining pass `sources`,
    `model` and `objective`. `explained_by` maps names of files saved with the weights to their contents.
    `on_start` runs on the first process before it writes to the folder. `on_step` runs on every process
    after every step, and its result is logged; it may change the random state if it does so
    deterministically. `show` receives the last losses, the step and the number of steps.
    """
    folder = Path(recipe.checkpoint.folder)
    with ExitStack() as stack:
        processes = stack.enter_context(join_processes(recipe.device))
        processes.from_first(
            lambda: stack.enter_context(hold(folder / ".lock", f"checkpoint.folder={folder}"))
        )
        opening = stack.enter_context(ExitStack())
        processes.from_first(lambda: opening.enter_context(rollback_on_error(folder)))
        processes.from_first(on_start or (lambda: None))
        stop = stack.enter_context(stop_on_signal())
        if isinstance(recipe, Recipe):
            if sources is None:
                sources = open_sources(recipe, processes)
                if not explained_by:
                    explained_by = {TOKENIZER_FILE: _tokenizer(recipe).to_json().encode()}
        elif sources is None or model is None or objective is None:
            raise InputError(
                "a run other than pretraining needs sources, model and objective; pass all three"
            )
        streams = [name for update in recipe.active_updates for name in update]
        if missing := [name for name in streams if name not in sources]:
            raise InputError(
                f"sources lack the stream {', '.join(missing)}; pass one for every stream of the recipe"
            )

        # Initial weights are the same on every process, dropout differs.
        seed_everything(recipe.seed)
        if isinstance(recipe, Recipe):
            model = (build_model(recipe) if model is None else model).to(processes.device)
            preprocessor = {PREPROCESSOR_FILE: preprocessor_json(model.config)}
            explained_by = preprocessor | dict(explained_by or {})
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
        run_layers(
            model, activation_checkpointing=recipe.activation_checkpointing, compiled=recipe.compile
        )
        parallel = ParallelModel(model, losses_of, processes, recipe.parallel)
        options = recipe.optimizer
        groups = optimizer_groups(model, options, large_lr=recipe.large_lr)
        optimizer = AdamW(
            groups,
            options.lr,
            options.betas,
            options.eps,
            kind=options.kind,
            zero_grad=options.zero_grad,
        )
        peak_lr = [group["lr"] for group in optimizer.param_groups]
        average = None if recipe.ema is None else WeightAverage(model, recipe.ema)
        scaler = torch.amp.GradScaler(
            processes.device.type,
            init_scale=_LARGEST_LOSS_SCALE,
            enabled=recipe.precision == "fp16",
        )
        precision = autocast(recipe, processes)
        progress = Progress(
            model, optimizer, scaler, {} if average is None else average.state_dict()
        )
        seed_everything(recipe.seed, processes.rank)
        notes, randomness = [], None
        if resume:
            notes, randomness = _resume(recipe, progress, processes)
        elif steps := sorted((folder / "checkpoints").glob("step-*")):
            raise ConfigError(
                f"{folder} holds {steps[-1].name} of an earlier run; resume it, set checkpoint.folder to another "
                "folder, or delete it"
            )
        if randomness is None:
            randomness = random_state(processes.device)

        log = RunLog(
            folder, recipe.log, processes, steps=recipe.steps, start=progress.step, show=show
        )
        stack.enter_context(log)
        if processes.first:
            for note in notes:
                print(f"xfm-fast: {note}", file=sys.stderr)
        loaders: dict[str, Iterator[Batch]] = {}
        for stream in streams:
            start = progress.batches.setdefault(stream, 0)
            pin = processes.device.type == "cuda"
            loader = load_batches(
                sources[stream], start=start, workers=recipe.workers, pin_memory=pin
            )
            stack.callback(loader.close)  # type: ignore[attr-defined]
            if progress.step < recipe.steps:
                # Unreadable data on one process are an error on all, before the first step.
                first = processes.together(partial(next, loader))
                loaders[stream] = chain([first], loader)
        # Starting workers draws random numbers, and results must not depend on their number.
        set_random_state(randomness, processes.device)

        norms, meter = ModelNorms(model), Meter()
        guard = Guard(model, norms.names, scaled=scaler.is_enabled())

        def rerun(stream: str, batch: Batch) -> Tensor:
            with precision:
                return sum_of_losses(losses_of(model, batch, losses=recipe.losses_of(stream)))

        # Where checks are free or made every step anyway, bad gradients never reach the weights.
        checks = processes.device.type == "cpu" or recipe.log.every == 1
        work, metrics, interrupted = Work(processes.world_size), {}, False
        logged, clock = progress.step, time.perf_counter()

        opening.close()
        while progress.step < recipe.steps and not interrupted:
            step = progress.step + 1
            save_now = step % recipe.checkpoint.every == 0 or step == recipe.steps
            log_now = save_now or step % recipe.log.every == 0
            before = norms.copy() if log_now else None
            schedule_steps = recipe.schedule.steps or recipe.steps
            factor = schedule_factor(
                recipe.schedule, progress.step, steps=schedule_steps, lr=options.lr
            )
            for group, lr in zip(optimizer.param_groups, peak_lr, strict=True):
                group["lr"] = lr * factor

            for update in recipe.updates_in(step):
                name = "+".join(update)
                optimizer.zero_grad()
                micro_batches = update * recipe.accumulate
                batches: dict[str, Batch] = {}
                finite = True
                for count, stream in enumerate(micro_batches, start=1):
                    batch = processes.together(partial(next, loaders[stream]))
                    progress.batches[stream] += 1
                    work.count(batch)
                    batch = batches[stream] = batch.to(processes.device)
                    weight = recipe.weight_of(stream) / recipe.accumulate
                    with parallel.synchronised(last=count == len(micro_batches)):
                        with precision:
                            loss, values = parallel.module(batch, recipe.losses_of(stream))
                        scaler.scale(loss * weight).backward()
                    meter.add(step, f"loss/{stream}/", values)
                    finite = finite and (not checks or math.isfinite(loss.item()))
                scaler.unscale_(optimizer)
                indices, gradient_norms = norms.gradients()
                total = torch.linalg.vector_norm(gradient_norms)
                meter.add(step, "grad_norm/", {name: total})
                if log_now:
                    encoders = norms.by_encoder(gradient_norms, indices)
                    del encoders["all"]
                    meter.add(step, f"grad_norm/{name}/", encoders)
                guard.watch(name, indices, gradient_norms)
                if checks:
                    finite = finite and (scaler.is_enabled() or math.isfinite(total.item()))
                    if processes.any(not finite):
                        guard.check(meter.read(processes), batches, rerun)
                if options.clip_norm is not None:
                    norms.clip_(total, options.clip_norm)
                scaler.step(optimizer)
                if scaler.is_enabled():
                    scaler.update()
                    scale = scaler.scale(torch.ones((), device=processes.device)).clamp(
                        max=_LARGEST_LOSS_SCALE
                    )
                    scaler.update(scale)
                    meter.add(step, "", {"loss_scale": scale})
                parallel.stepped()
            if average is not None:
                average.update()
            progress.step = step
            checkpoints.record_kernels(progress, folder, processes)
            interrupted = processes.any(stop.is_set()) and step < recipe.steps
            log.advance(step)

            if log_now or interrupted:
                if before is not None:
                    meter.add(step, "param_norm/", norms.values())
                    meter.add(step, "update_norm/", norms.updates(before))
                values = meter.read(processes)
                guard.check(values, {})
                seconds = time.perf_counter() - clock
                metrics = mean_by_name(values) | {"lr": options.lr * factor, "steps": step - logged}
                metrics |= work.rates(step - logged, seconds)
                log.write(step, metrics)
                logged, clock = step, time.perf_counter()
            if on_step is not None and (extra := on_step(step, model, average)):
                log.write(step, extra)
            if save_now or interrupted:
                log.sync()
                checkpoints.save(
                    progress,
                    recipe.model_dump(mode="json"),
                    folder / "checkpoints",
                    processes,
                    keep=recipe.checkpoint.keep,
                )

        if not interrupted:
            seen = processes.from_first(lambda: fingerprint_of(folder, recipe.initial_folder))
            files = dict(explained_by or {}) | seen
            save_model(model, folder / "model", processes, files=files)
            if average is not None:
                weights = average.state_dict()
                save_model(model, folder / "average", processes, average=weights, files=files)
        return TrainResult(progress.step, model, average, metrics, interrupted)


def _resume(
    recipe: Run, progress: Progress, processes: Processes
) -> tuple[list[str], dict[str, Tensor] | None]:
    """Restore the newest valid checkpoint; returns notes for the user and this process's random state."""
    folder = Path(recipe.checkpoint.folder)
    checkpoint = processes.from_first(lambda: checkpoints.newest(folder / "checkpoints"))
    if checkpoint is None:
        checkpoints.restore_kernels(folder, processes)
        return [], None
    notes = [*checkpoint.rejected, f"resuming from {checkpoint.path}"]
    before, world = checkpoint.state["recipe"], checkpoint.state["world_size"]
    with checkpoints.reading(checkpoint.path):
        notes += recipe_changes(before, recipe, world, processes.world_size)
        checkpoints.load(checkpoint, progress)
        for stream in {name for update in recipe.active_updates for name in update}:
            if stream in progress.batches:
                progress.batches[stream] = position_after(
                    progress.batches[stream], stream, before, recipe, world, processes.world_size
                )
    randomness = checkpoints.random_states(checkpoint, processes)
    if randomness is None:
        seed_everything(recipe.seed, processes.rank, progress.step)
    return notes, randomness


# Changing these would invalidate the weights or the state of the optimizer.
_FIXED = ("model.", "optimizer.zero_grad")
# These change the execution of a run, not its results.
_HARMLESS = ("checkpoint.", "log.", "workers", "data")


def recipe_changes(
    before: Mapping[str, Any], recipe: Run, world_before: int, world_now: int
) -> list[str]:
    """Describe how `recipe` differs from the checkpoint's; raises `ConfigError` for a different model."""
    old, new = dict(flatten(before)), dict(flatten(recipe.model_dump(mode="json")))
    fixed, changed = [], []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            change = f"{key}: {old.get(key)} → {new.get(key)}"
            if key.startswith(_FIXED):
                fixed.append(change)
            elif not key.startswith(_HARMLESS):
                changed.append(change)
    if fixed:
        raise ConfigError(
            f"the checkpoint in checkpoint.folder={recipe.checkpoint.folder} is of another run ({'; '.join(fixed)}); "
            "reset these, or set checkpoint.folder to a new folder"
        )
    notes = []
    if changed:
        notes.append(f"the recipe has changed since the checkpoint: {'; '.join(changed)}")
    if world_before != world_now:
        notes.append(
            f"the checkpoint is of {world_before} processes and this run has {world_now}: an update now reads "
            f"{world_now} instead of {world_before} times streams.*.batch_size, every stream continues after the items "
            "already read (to within a batch) in the same order, and dropout and negatives are drawn anew from seed, "
            "rank and step"
        )
    return notes


def position_after(
    batches: int,
    stream: str,
    before: Mapping[str, Any],
    recipe: Run,
    world_before: int,
    world_now: int,
) -> int:
    """Return the batch index to resume a stream at; it repeats no item and skips less than one batch."""
    batch = before["streams"][stream] if "streams" in before else before
    size = batch["batch_size"] // before["accumulate"] * world_before
    return -(-batches * size // (recipe.micro_batch_size(stream) * world_now))


# More texts do not change a vocabulary of a few thousand entries.
_MAX_VOCABULARY_TEXTS = 100_000


def autocast(recipe: Run, processes: Processes) -> torch.autocast:
    """Return a reusable autocast context with the run's precision."""
    enabled = recipe.precision != "fp32"
    dtype = PRECISIONS[recipe.precision]
    assert isinstance(dtype, torch.dtype)
    return torch.autocast(processes.device.type, dtype=dtype, enabled=enabled)


def build_model(recipe: Recipe) -> XFM:
    """Build the model, initialised from the sources in `init` and at random elsewhere."""
    init = recipe.init
    if init.checkpoint is not None:
        folder = model_folder(Path(init.checkpoint))
        if folder is None:
            return XFM.from_official(init.checkpoint, recipe.model)
        # Our names are the official ones. Sizes are those of the recipe, which also determine data and
        # masks; resolution, dropout and temperature bounds may differ from the checkpoint.
        heads = heads_in(load_pretrained_files(folder).state)
        return XFM.from_official(folder / MODEL_FILE, recipe.model, heads=heads)
    model = XFM(recipe.model)
    if init.roberta or init.beit2:
        initialise(model, roberta=init.roberta, beit2=init.beit2)
    return model


def open_sources(recipe: Recipe, processes: Processes) -> dict[str, BatchSource[Any]]:
    """Open the streams of this process; the first writes the shapes dataset and trains the tokenizer."""
    processes.from_first(recipe.make_world)
    recipe.check_machine(world_size=processes.world_size)
    folder = Path(recipe.checkpoint.folder)
    if recipe.tokenizer == "train":
        processes.from_first(lambda: _train_tokenizer(recipe, folder / TOKENIZER_FILE))
    tokenizer = _tokenizer(recipe)
    sources: dict[str, BatchSource[Any]] = {}
    # Numbered by the recipe, so that an ablation without a stream leaves the batches of the rest unchanged.
    for index, name in enumerate(recipe.streams):
        if recipe.losses_of(name):
            options = recipe.options_of(name)
            quarantine = Quarantine(
                folder / "quarantine" / f"{name}.jsonl",
                tolerate_bad=options.bad_share,
                setting=f"streams.{name}.bad_share",
            )
            sources[name] = Stream(
                recipe.paths_of(name),
                options,
                config=recipe.model,
                tokenizer=tokenizer,
                batch_size=recipe.micro_batch_size(name),
                seed=recipe.seed,
                rank=processes.rank,
                world_size=processes.world_size,
                index=index,
                quarantine=quarantine,
                observer=seen_images(folder, name, processes),
            )
    return sources


def seen_images(folder: Path, stream: str, processes: Processes) -> SeenImages:
    """Return the record of the images that this process reads from a stream."""
    return SeenImages(folder / f"seen-{stream}-{processes.rank}.bin")


def _train_tokenizer(recipe: Recipe, file: Path) -> None:
    """Train a tokenizer on the streams, unless an earlier run did."""
    if file.exists():
        return
    texts = list(islice(_texts(recipe), _MAX_VOCABULARY_TEXTS))
    if not texts:
        raise DataError(
            "tokenizer=train, but no stream holds text to learn a vocabulary from; name a tokenizer"
        )
    vocabulary = CaptionTokenizer.train_on_texts(texts, recipe.model.vocab_size)
    make_folder(file.parent)
    write_bytes({file: vocabulary.to_json().encode()})


def _tokenizer(recipe: Recipe) -> CaptionTokenizer:
    """Load the tokenizer of a run; call after `open_sources`, which may train it."""
    trained = Path(recipe.checkpoint.folder) / TOKENIZER_FILE
    return CaptionTokenizer.from_files(trained if recipe.tokenizer == "train" else recipe.tokenizer)


@contextmanager
def rollback_on_error(folder: Path) -> Iterator[None]:
    """Delete files that the block created in `folder` if it raises an XFMError; its folders stay."""
    before = set(folder.iterdir())
    try:
        yield
    except XFMError:
        with suppress(OSError):
            for path in folder.iterdir():
                if path not in before and path.is_file():
                    path.unlink()
        raise


def _texts(recipe: Recipe) -> Iterator[str]:
    for name, options in recipe.streams.items():
        if isinstance(options, ImageStream):
            continue
        is_text = isinstance(options, TextStream)
        key = "desc" if isinstance(options, RegionStream) else options.caption_key
        for rows in open_records(recipe.paths_of(name), **options.record_keys).files:
            for row in range(len(rows)):
                try:
                    record = rows.read(row)
                except DataError:
                    # The stream decides how many broken rows are tolerable.
                    continue
                values = [record.get(key), record.get("caption")]
                values += [element.get("caption") for element in record.get("elems") or []]
                for value in values:
                    for text in value if isinstance(value, list) else [value]:
                        if not isinstance(text, str) or not text.strip():
                            continue
                        if options.tokenized:
                            text = text.replace(" ##", "")
                        yield text.strip() if is_text else pre_caption(text)
