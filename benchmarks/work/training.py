"""One step of pretraining or fine-tuning, forward and backward: ours against the official procedure, in one process.

Both run on the same parameters and the same batch, and leave the same gradients; that is checked before anything is
timed. On a CPU the peak memory of each procedure of pretraining is measured in a process of its own with the heap that
`pretrain` has: within one process the second would find the heap as the first one left it, and the high-water mark
would belong to the one that needs more.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xfm_fast import checkpoint
from xfm_fast.batches import PairBatch
from xfm_fast.config import XFMConfig
from xfm_fast.errors import UnavailableError
from xfm_fast.kernels.backend import use_backend
from xfm_fast.kernels.cpu.workspace import keep_freed_memory
from xfm_fast.memory import PeakMemory, resident_bytes
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.tasks.task import TASKS
from xfm_fast.tokenizer import CaptionTokenizer

from ..backends.official_finetuning import OfficialFineTuningTwin
from ..inputs import Inputs, Texts, bundled, described, preset_config
from ..measure import Backend, Case, Difference, Run, benchmark
from ..record import OFFICIAL, OURS, Extra, Model
from ..tasks import OFFICIAL_TASKS, PRETRAINING, Batch, BenchTask, bench_task
from ..timing import one_line

Procedure = str
"""`OURS`, or the judge: `OFFICIAL`, or `REFERENCE_OPS` for a task without an official procedure."""
Negatives = tuple[Tensor, Tensor] | None
Losses = dict[str, Tensor]
# What a user trains with: parameters in fp32, GEMMs in bf16 where that is asked for.
AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
# In the worst of its parameters the official step of the base model misses fp64 by 1e-5 in fp32 (relative L2 norm of
# the gradient). Three times that is allowed, as everywhere in this project.
FP32_GRADIENT_BAND = 3e-5
# A gradient whose norm is below this share of the largest one is compared on that scale instead of its own.
_NOISE = 1e-4
# The bias of keys moves all scores of a query alike, which their softmax takes out again: its gradient is zero but for
# rounding, and no two orders of summation round alike. It is compared on the scale of the weights' beside it.
_KEY_BIAS = "key.bias"
REFERENCE_OPS = "torch-eager"
LABELS = {
    OURS: "xfm-fast", OFFICIAL: "official procedure, eager",
    REFERENCE_OPS: "xfm-fast's schedule, plain PyTorch operations",
}  # fmt: skip
_MEMORY_STEPS = 2


class Outcome(NamedTuple):
    """Losses and gradients after a step."""

    losses: Losses
    gradients: dict[str, Tensor | None]


@dataclass
class Step:
    """A model and a batch, on which both procedures do the same step.

    `losses` has the losses of each procedure, to be summed; negatives are drawn where none are given. `texts` are those
    of the batch.
    """

    model: XFM
    batch: Batch
    losses: dict[Procedure, Callable[[Negatives], Losses]]
    texts: Texts | None

    @property
    def judge(self) -> Procedure:
        """The procedure that ours is compared with."""
        return next(name for name in self.losses if name != OURS)

    def run(
        self,
        procedure: Procedure,
        autocast: torch.dtype | None = None,
        *,
        given_negatives: bool = False,
    ) -> Losses:
        """Forward and backward pass of all losses, from no gradients to gradients in the parameters.

        With `given_negatives` the neighbours of each pair are its negatives, so that both procedures compute the same.
        """
        self.model.zero_grad(set_to_none=True)
        device, pairs, negatives = self.model.device, self.batch.get("batch"), None
        if given_negatives and isinstance(pairs, PairBatch):
            own = torch.arange(len(pairs.image), device=device)
            negatives = own.roll(-1), own.roll(1)
        with torch.enable_grad():
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                losses = self.losses[procedure](negatives)
                total = torch.stack(
                    [loss.float() if autocast else loss for loss in losses.values()]
                ).sum()
            total.backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def outcome(self, procedure: Procedure, autocast: torch.dtype | None = None) -> Outcome:
        """A step with given negatives, and its gradients, which the parameters give away."""
        self.model.eval()
        losses = self.run(procedure, autocast, given_negatives=True)
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return Outcome(losses, gradients)

    def flops(self, procedure: Procedure) -> int:
        """FLOPs of a procedure, counted on the definitions of the ops; every text is drawn once as a negative."""
        with use_backend("reference"), FlopCounterMode(display=False) as counter:
            self.outcome(procedure)
        return counter.get_total_flops()


def make_step(
    task: BenchTask, config: XFMConfig, seed: int, batch: Batch, device: torch.device
) -> Step:
    """The step of a model with random weights on a batch."""
    with torch.device("meta"):
        model = task.build(config)
    state = checkpoint.random_tensors(model.state_dict(), seed)
    model.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
    twin = OfficialFineTuningTwin(model.eval())
    batch = {
        name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()
    }
    pairs = batch.get("batch")

    def ours(negatives: Negatives) -> Losses:
        if task.losses_of is not None:
            return task.losses_of(model, pairs)
        if pairs is not None:
            return pretraining_losses(model, pairs, hard_negatives=negatives, **task.losses)
        found = model(**batch)
        return (
            {"loss": found}
            if isinstance(found, Tensor)
            else dict(zip(("bbox_l1", "bbox_giou"), found, strict=True))
        )

    def judge(negatives: Negatives) -> Losses:
        if task.official is None:
            with use_backend("reference"):
                return ours(negatives)
        arguments = batch if pairs is None else {"batch": pairs, "hard_negatives": negatives}
        found = getattr(twin, task.official)(**arguments)
        return {"loss": found} if isinstance(found, Tensor) else found

    fields = batch if pairs is None else vars(pairs)
    names = (
        ("question_ids", "question_mask"),
        ("caption_ids", "caption_mask"),
        ("input_ids", "attention_mask"),
    )
    texts = next((Texts(fields[ids], fields[mask]) for ids, mask in names if ids in fields), None)
    judged_by = REFERENCE_OPS if task.official is None else OFFICIAL
    return Step(model, batch, {OURS: ours, judged_by: judge}, texts)


@benchmark("train-step", title="A training step, fast against official", reference=OFFICIAL)
def run(run: Run) -> Iterator[Case]:
    """The step of pretraining, or of `options.task`, or of every task."""
    options, gpu = run.options, run.device.type == "cuda"
    if options.dtype == ("auto",) and gpu:
        # On a GPU this model is not trained in fp32.
        run.dtypes.remove("fp32")
    names = [*OFFICIAL_TASKS] if options.task == "all" else [options.task or ""]
    if names[0] and names[0] not in TASKS:
        raise UnavailableError(f"task {names[0]!r} is unknown; choose from {', '.join(TASKS)}, all")
    variants = (False,) if options.quick else (False, True)
    run.progress.begin(
        1 + len(names) * (1 + len(variants)) + (names == [""] and not gpu) * len(variants)
    )
    run.progress.stage("photographs and captions")
    collection, preset = bundled(), preset_config(options.preset)
    tokenizer = CaptionTokenizer.train_on_texts(collection.captions, preset.vocab_size)
    run.document.data = described(collection, tokenizer)
    run.probe()
    for name in names:
        config, memory = preset, dict[tuple[str, str, bool], Extra]()
        inputs = Inputs(collection, tokenizer, config, options.seed)
        task = bench_task(name, inputs, run.scratch) if name else PRETRAINING
        count = options.pairs or task.counts[2 if gpu else options.quick]
        if count < 2:
            raise UnavailableError(
                f"a step of {count} pair has no hard negatives; use --pairs 2 or more"
            )
        if task.image_size is not None and options.preset != "tiny":
            config = inputs.sizes = config.replace(image_size=task.image_size)
        batch = task.batch(inputs, count)
        if task is PRETRAINING and not gpu:
            memory = _memory(run, config, batch["batch"], variants)
        run.progress.stage(f"model, {task.title}")
        step = make_step(task, config, options.seed, batch, run.device)
        run.document.reference = step.judge
        parameters = sum(parameter.numel() for parameter in step.model.parameters())
        if run.document.model is None or run.document.model.parameters < parameters:
            run.document.model = Model(
                preset=options.preset, origin=f"random weights (seed {options.seed})", trained=False,
                meaningful_recall=False, config=config.model_dump(), parameters=parameters,
            )  # fmt: skip
        size = f"{count} {task.unit} of {config.image_size} px"
        if name == "text" and step.texts is not None:
            size = f"{count} {task.unit} of {step.texts.span} tokens"
        work, title = f"finetune-{name}", f"fine-tuning step, {task.title}, {size}"
        if task is PRETRAINING:
            work, title = "train-step", f"training step, {size}, {task.title}"
        yield from _cases(run, step, Case(work, title, [], task.unit, count), memory)


def _cases(
    run: Run, step: Step, named: Case, memory: dict[tuple[str, str, bool], Extra]
) -> Iterator[Case]:
    """A step without and with dropout; both procedures agree without it.

    `named` has the work, name, unit and items; `memory` is by procedure, dtype and dropout.
    """
    quick, gpu = run.options.quick, run.device.type == "cuda"
    # As published, the official procedure runs in fp32; on a GPU in the dtype of ours.
    official = {dtype if gpu else "fp32" for dtype in run.dtypes} | (
        set() if quick else set(run.dtypes)
    )
    dtypes = {OURS: run.dtypes, step.judge: [name for name in AUTOCAST if name in official]}
    procedures = [(procedure, dtype) for procedure in dtypes for dtype in dtypes[procedure]]
    budget_s = 0.2 if run.options.preset == "tiny" else 10.0
    rounds, warmups = (10, 3) if gpu else (3, 1)
    flops = {procedure: step.flops(procedure) for procedure in dtypes}

    def training(procedure: Procedure, dtype: str, dropout: bool) -> None:
        step.model.train(dropout)
        step.run(procedure, AUTOCAST[dtype])

    def count(backend: Backend, result: object) -> Extra:
        extra: Extra = {"needed_flops": flops[OURS], "flops": flops[backend.name]}
        if step.texts is not None:
            tokens = sum(step.texts.lengths)
            extra |= {
                "tokens": tokens,
                "padded_tokens": tokens if backend.name == OURS else step.texts.ids.numel(),
            }
        if gpu:
            parameters = sum(parameter.nbytes for parameter in step.model.parameters())
            extra |= {"parameter_bytes": parameters, "gradient_bytes": parameters}
        return extra

    def backend(procedure: Procedure, dtype: str, dropout: bool) -> Backend:
        call, check = (
            partial(training, procedure, dtype, dropout),
            partial(step.outcome, procedure, AUTOCAST[dtype]),
        )
        extra = memory.get((procedure, dtype, dropout), {})
        return Backend(procedure, dtype, lambda: call, LABELS[procedure], check, extra=extra)

    def backends(dropout: bool) -> list[Backend]:
        lacking = [
            Backend(OURS, dtype, dict, LABELS[OURS], lacking=("not offered", why))
            for dtype, why in run.absent.items()
        ]
        return lacking + [backend(procedure, dtype, dropout) for procedure, dtype in procedures]

    case = replace(
        named, backends=backends(dropout=False), judge=step.judge, compare=difference, fp32_band=FP32_GRADIENT_BAND,
        reference=lambda dtype: step.outcome(step.judge, AUTOCAST[dtype]), count=count, grad=True,
        rounds=2 if quick else rounds, warmups=warmups, budget_s=budget_s / 10 if quick else budget_s,
    )  # fmt: skip
    run.progress.stage(case.name)
    yield case
    if not quick:
        name = f"{named.name}, with dropout"
        run.progress.stage(name)
        again = replace(case, backends=backends(dropout=True))
        yield again.repeated(
            run.document.rows, "; compared without dropout", work=f"{named.work}-dropout", name=name
        )


def _memory(
    run: Run, config: XFMConfig, batch: PairBatch, variants: tuple[bool, ...]
) -> dict[tuple[str, str, bool], Extra]:
    """Memory of every procedure and dtype, without and with dropout; ours with activation checkpointing too."""
    memory = {}
    official = ["fp32"] if run.options.quick else list(dict.fromkeys(["fp32", *run.dtypes]))
    for dropout in variants:
        run.progress.stage("peak memory" + ", with dropout" * dropout)
        for procedure, dtypes in ((OURS, run.dtypes), (OFFICIAL, official)):
            for dtype in dtypes:
                run.progress.step(f"{procedure} {dtype}, own process")
                measured = partial(
                    memory_use, procedure, config, batch, dtype, dropout, run.options.seed
                )
                memory[procedure, dtype, dropout] = measured()
                if procedure == OURS:
                    memory[procedure, dtype, dropout]["checkpointed_bytes"] = measured(
                        checkpointed=True
                    )["peak_bytes"]
    return memory


def difference(ours: Outcome, truth: Outcome) -> Difference:
    """The largest relative difference of a loss, of all gradients as one vector, and of those of one parameter.

    Gradients are compared by their L2 norm. NaN counts as infinite, and so does a gradient that only one of them has.
    """
    losses = max(
        _finite((ours.losses[name] / loss - 1).abs()) for name, loss in truth.losses.items()
    )
    scale = max(
        float(gradient.double().norm())
        for gradient in truth.gradients.values()
        if gradient is not None
    )
    squares, distances, worst, parameter = 0.0, 0.0, 0.0, ""
    for name, expected in truth.gradients.items():
        found = ours.gradients[name]
        if expected is None or found is None:
            # Where a method stops a gradient, none and zero are the same.
            present = found if expected is None else expected
            if present is not None and bool(present.any()):
                worst, parameter = math.inf, name
            continue
        distance = _finite((found.double() - expected.double()).norm())
        own = float(expected.double().norm())
        distances, squares = distances + distance**2, squares + own**2
        least = _NOISE * scale
        if name.endswith(_KEY_BIAS):
            weights = truth.gradients.get(name.removesuffix("bias") + "weight")
            least = max(least, 0.0 if weights is None else float(weights.double().norm()))
        if distance / max(own, least) > worst:
            worst, parameter = distance / max(own, least), name
    gradients = (distances / squares) ** 0.5 if squares else 0.0
    note = f"losses {losses:.1e}, gradients {gradients:.1e}, worst: {parameter}"
    return Difference(max(losses, gradients, worst), note)


def _finite(value: Tensor) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf


def memory_use(
    procedure: Procedure, config: XFMConfig, batch: PairBatch, dtype: str, dropout: bool, seed: int, *,
    checkpointed: bool = False,
) -> Extra:  # fmt: skip
    """Run two steps of one procedure in a new process and see how much memory it takes.

    `checkpointed` recomputes the activations of our layers. Raises `UnavailableError` if the process does not end by
    itself; it is killed where memory runs out.
    """
    arrays = {
        name: value.cpu().numpy()
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(
                _own_memory,
                procedure,
                config,
                arrays,
                dtype,
                dropout,
                seed,
                torch.get_num_threads(),
                checkpointed,
            ).result()
        except Exception as error:
            raise UnavailableError(
                f"the process that measures the memory of a step ({procedure}, {dtype}) failed: {one_line(error)}; "
                "free memory, or take fewer --pairs or --random tiny"
            ) from error


def _own_memory(
    procedure: Procedure, config: XFMConfig, arrays: dict[str, Any], dtype: str, dropout: bool, seed: int, threads: int,
    checkpointed: bool,
) -> Extra:  # fmt: skip
    keep_freed_memory()
    torch.set_num_threads(threads)
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    step = make_step(
        PRETRAINING, config, seed, {"batch": PairBatch(**tensors)}, torch.device("cpu")
    )
    step.model.train(dropout)
    if checkpointed:
        # Here, for it brings modules along that no other procedure needs in memory.
        from xfm_fast.training.distributed import run_layers

        run_layers(step.model, activation_checkpointing=True)
    before = resident_bytes()
    with PeakMemory() as memory:
        for _ in range(_MEMORY_STEPS):
            step.run(procedure, AUTOCAST[dtype])
    parameters = list(step.model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    return {
        "peak_bytes": memory.peak, "grown_bytes": max(0, memory.peak - before - gradients),
        "memory_method": memory.method, "before_bytes": before,
        "parameter_bytes": sum(parameter.nbytes for parameter in parameters), "gradient_bytes": gradients,
    }  # fmt: skip
