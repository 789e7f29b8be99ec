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
from xfm_fast.testing import Inputs, Texts, bundled, preset_config
from xfm_fast.tokenizer import CaptionTokenizer

from ..backends.official_finetuning import OfficialFineTuningTwin
from ..measure import Backend, Case, Difference, Run, benchmark
from ..record import OFFICIAL, OURS, Data, Extra, Model
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
    OURS: "xfm-fast",
    OFFICIAL: "official procedure, eager",
    REFERENCE_OPS: "xfm-fast's schedule, plain PyTorch operations",
}
_MEMORY_STEPS = 2


class Outcome(NamedTuple):
    """Losses and gradients after a step."""

    losses: Losses
    gradients: dict[str, Tensor | None]


@dataclass
class Step:
    """A model and a batch, on which both procedures do the same step.

    Attributes:
        losses: the losses of each procedure, to be summed; negatives are drawn unless they are given.
        texts: those of the batch.
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
        """Run forward and backward pass of all losses, which leaves gradients in the parameters.

        With `given_negatives` the neighbours of each pair are its negatives, so that both procedures compute the same.
        """
        self.model.zero_grad(set_to_none=True)
        device, pairs, negatives = self.model.device, self.batch.get("batch"), None
        if given_negatives and isinstance(pairs, PairBatch):
            order = torch.arange(len(pairs.image), device=device)
            negatives = order.roll(-1), order.roll(1)
        with torch.enable_grad():
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                losses = self.losses[procedure](negatives)
                values = [loss.float() if autocast else loss for loss in losses.values()]
                total = torch.stack(values).sum()
            total.backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def outcome(self, procedure: Procedure, autocast: torch.dtype | None = None) -> Outcome:
        """Run a step with given negatives and return its gradients, which the parameters do not keep."""
        self.model.eval()
        losses = self.run(procedure, autocast, given_negatives=True)
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return Outcome(losses, gradients)

    def flops(self, procedure: Procedure) -> int:
        """Count the FLOPs of a procedure on the reference ops; every text is drawn once as a negative."""
        with use_backend("reference"), FlopCounterMode(display=False) as counter:
            self.outcome(procedure)
        return counter.get_total_flops()


def make_step(
    task: BenchTask, config: XFMConfig, seed: int, batch: Batch, device: torch.device
) -> Step:
    """Return the step of a model with random weights on a batch."""
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
        losses = model(**batch)
        if isinstance(losses, Tensor):
            return {"loss": losses}
        return dict(zip(("bbox_l1", "bbox_giou"), losses, strict=True))

    def judge(negatives: Negatives) -> Losses:
        if task.official is None:
            with use_backend("reference"):
                return ours(negatives)
        arguments = batch if pairs is None else {"batch": pairs, "hard_negatives": negatives}
        losses = getattr(twin, task.official)(**arguments)
        return {"loss": losses} if isinstance(losses, Tensor) else losses

    judge_name = REFERENCE_OPS if task.official is None else OFFICIAL
    texts = _texts(batch if pairs is None else vars(pairs))
    return Step(model, batch, {OURS: ours, judge_name: judge}, texts)


def _texts(fields: Batch) -> Texts | None:
    """Return the texts of a batch: questions, captions, or its only ones."""
    for ids, mask in (
        ("question_ids", "question_mask"),
        ("caption_ids", "caption_mask"),
        ("input_ids", "attention_mask"),
    ):
        if ids in fields:
            return Texts(fields[ids], fields[mask])
    return None


@benchmark(
    "train-step",
    title="A training step, fast against official",
    reference=OFFICIAL,
    about="a step of pretraining or of a task, forward and backward: xfm-fast bench train-step",
)
def run(run: Run) -> Iterator[Case]:
    """Yield the step of pretraining, of `options.task`, or of every task."""
    options, gpu = run.options, run.device.type == "cuda"
    if options.dtype == ("auto",) and gpu:
        # On a GPU this model is not trained in fp32.
        run.dtypes.remove("fp32")
    names = [*OFFICIAL_TASKS] if options.task == "all" else [options.task or ""]
    if names[0] and names[0] not in TASKS:
        raise UnavailableError(f"task {names[0]!r} is unknown; choose from {', '.join(TASKS)}, all")
    variants = (False,) if options.quick else (False, True)
    memory_stages = len(variants) if names == [""] and not gpu else 0
    run.progress.begin(1 + len(names) * (1 + len(variants)) + memory_stages)
    run.progress.stage("photographs and captions")
    collection, preset = bundled(), preset_config(options.preset)
    tokenizer = CaptionTokenizer.train_on_texts(collection.captions, preset.vocab_size)
    run.document.data = Data.of(collection, tokenizer)
    run.probe()
    for name in names:
        config, memory = preset, MemoryUse()
        inputs = Inputs(collection, tokenizer, config, options.seed)
        task = bench_task(name, inputs, run.scratch) if name else PRETRAINING
        count = task.counts.quick if options.quick else task.counts.cpu
        count = options.pairs or (task.counts.gpu if gpu else count)
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
        _describe_model(run, config, step.model)
        size = f"{count} {task.unit} of {config.image_size} px"
        if name == "text" and step.texts is not None:
            size = f"{count} {task.unit} of {step.texts.span} tokens"
        work, title = f"finetune-{name}", f"fine-tuning step, {task.title}, {size}"
        if task is PRETRAINING:
            work, title = "train-step", f"training step, {size}, {task.title}"
        yield from _cases(run, step, Case(work, title, [], task.unit, count), memory)


def _describe_model(run: Run, config: XFMConfig, model: XFM) -> None:
    """Enter a model into the document, unless a larger one is there."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if run.document.model is None or run.document.model.parameters < parameters:
        run.document.model = Model(
            preset=run.options.preset,
            origin=f"random weights (seed {run.options.seed})",
            trained=False,
            meaningful_recall=False,
            config=config.model_dump(),
            parameters=parameters,
        )


def _cases(run: Run, step: Step, template: Case, memory: MemoryUse) -> Iterator[Case]:
    """Yield a step without and with dropout; both procedures agree without it.

    `template` has the work, name, unit and items.
    """
    quick, gpu = run.options.quick, run.device.type == "cuda"
    # As published, the official procedure runs in fp32; on a GPU in the dtype of ours.
    official = set(run.dtypes) if gpu or not quick else set()
    if not gpu:
        official.add("fp32")
    dtypes = {OURS: run.dtypes, step.judge: [dtype for dtype in AUTOCAST if dtype in official]}
    budget_s = 0.2 if run.options.preset == "tiny" else 10.0
    rounds, warmups = (10, 3) if gpu else (3, 1)
    flops = {procedure: step.flops(procedure) for procedure in dtypes}

    def train(procedure: Procedure, dtype: str, dropout: bool) -> None:
        step.model.train(dropout)
        step.run(procedure, AUTOCAST[dtype])

    def count(backend: Backend, result: object) -> Extra:
        extra: Extra = {"needed_flops": flops[OURS], "flops": flops[backend.name]}
        if step.texts is not None:
            extra["tokens"] = extra["padded_tokens"] = sum(step.texts.lengths)
            if backend.name != OURS:
                extra["padded_tokens"] = step.texts.ids.numel()
        if gpu:
            parameters = sum(parameter.nbytes for parameter in step.model.parameters())
            extra |= {"parameter_bytes": parameters, "gradient_bytes": parameters}
        return extra

    def backends(dropout: bool) -> list[Backend]:
        result = [
            Backend(OURS, dtype, dict, LABELS[OURS], lacking=("not offered", reason))
            for dtype, reason in run.absent.items()
        ]
        for procedure, procedure_dtypes in dtypes.items():
            for dtype in procedure_dtypes:
                call = partial(train, procedure, dtype, dropout)
                result.append(
                    Backend(
                        procedure,
                        dtype,
                        lambda call=call: call,
                        LABELS[procedure],
                        check=partial(step.outcome, procedure, AUTOCAST[dtype]),
                        extra=memory.get((procedure, dtype, dropout), {}),
                    )
                )
        return result

    case = replace(
        template,
        backends=backends(dropout=False),
        judge=step.judge,
        compare=difference,
        fp32_band=FP32_GRADIENT_BAND,
        reference=lambda dtype: step.outcome(step.judge, AUTOCAST[dtype]),
        count=count,
        grad=True,
        rounds=2 if quick else rounds,
        warmups=warmups,
        budget_s=budget_s / 10 if quick else budget_s,
    )
    run.progress.stage(case.name)
    yield case
    if not quick:
        name = f"{template.name}, with dropout"
        run.progress.stage(name)
        with_dropout = replace(case, backends=backends(dropout=True))
        yield with_dropout.repeated(
            run.document.rows,
            "; compared without dropout",
            work=f"{template.work}-dropout",
            name=name,
        )


MemoryUse = dict[tuple[Procedure, str, bool], Extra]
"""Memory of a step by procedure, dtype and dropout."""


def _memory(run: Run, config: XFMConfig, batch: PairBatch, variants: tuple[bool, ...]) -> MemoryUse:
    """Measure the memory of every procedure and dtype; ours with activation checkpointing too."""
    memory: MemoryUse = {}
    official = ["fp32"] if run.options.quick else list(dict.fromkeys(["fp32", *run.dtypes]))
    for dropout in variants:
        run.progress.stage("peak memory" + ", with dropout" * dropout)
        for procedure, dtypes in ((OURS, run.dtypes), (OFFICIAL, official)):
            for dtype in dtypes:
                run.progress.step(f"{procedure} {dtype}, own process")
                arguments = procedure, config, batch, dtype, dropout, run.options.seed
                extra = memory[procedure, dtype, dropout] = memory_use(*arguments)
                if procedure == OURS:
                    checkpointed = memory_use(*arguments, checkpointed=True)
                    extra["checkpointed_bytes"] = checkpointed["peak_bytes"]
    return memory


def difference(ours: Outcome, truth: Outcome) -> Difference:
    """Return the largest relative difference of a loss, of all gradients as one vector, and of one parameter's.

    Gradients are compared by their L2 norm. NaN counts as infinite, and so does a gradient that only one of them has.
    """
    losses = max(
        _finite((ours.losses[name] / loss - 1).abs()) for name, loss in truth.losses.items()
    )
    norms = {
        name: float(gradient.double().norm())
        for name, gradient in truth.gradients.items()
        if gradient is not None
    }
    noise = _NOISE * max(norms.values())
    square, distance_square, worst, parameter = 0.0, 0.0, 0.0, ""
    for name, expected in truth.gradients.items():
        gradient = ours.gradients[name]
        if expected is None or gradient is None:
            # Where a method stops a gradient, none and zero are the same.
            present = gradient if expected is None else expected
            if present is not None and bool(present.any()):
                worst, parameter = math.inf, name
            continue
        distance = _finite((gradient.double() - expected.double()).norm())
        distance_square += distance**2
        square += norms[name] ** 2
        scale = max(norms[name], noise)
        if name.endswith(_KEY_BIAS):
            scale = max(scale, norms.get(name.removesuffix("bias") + "weight", 0.0))
        if distance / scale > worst:
            worst, parameter = distance / scale, name
    gradients = (distance_square / square) ** 0.5 if square else 0.0
    note = f"losses {losses:.1e}, gradients {gradients:.1e}, worst: {parameter}"
    return Difference(max(losses, gradients, worst), note)


def _finite(value: Tensor) -> float:
    """Return a scalar, infinite for NaN."""
    return float(value) if math.isfinite(float(value)) else math.inf


def memory_use(
    procedure: Procedure,
    config: XFMConfig,
    batch: PairBatch,
    dtype: str,
    dropout: bool,
    seed: int,
    *,
    checkpointed: bool = False,
) -> Extra:
    """Run two steps of one procedure in a new process and measure how much memory it takes.

    `checkpointed` recomputes the activations of our layers. Raises `UnavailableError` if the process does not end by
    itself; it is killed where memory runs out.
    """
    arrays = {
        name: value.cpu().numpy()
        for name, value in vars(batch).items()
        if isinstance(value, Tensor)
    }
    threads = torch.get_num_threads()
    arguments = procedure, config, arrays, dtype, dropout, seed, threads, checkpointed
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_memory, *arguments).result()
        except Exception as error:
            raise UnavailableError(
                f"the process that measures the memory of a step ({procedure}, {dtype}) failed: {one_line(error)}; "
                "free memory, or take fewer --pairs or --random tiny"
            ) from error


def _measure_memory(
    procedure: Procedure,
    config: XFMConfig,
    arrays: dict[str, Any],
    dtype: str,
    dropout: bool,
    seed: int,
    threads: int,
    checkpointed: bool,
) -> Extra:
    keep_freed_memory()
    torch.set_num_threads(threads)
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    batch = {"batch": PairBatch(**tensors)}
    step = make_step(PRETRAINING, config, seed, batch, torch.device("cpu"))
    step.model.train(dropout)
    if checkpointed:
        # Imported here, since it brings modules that no other procedure needs in memory.
        from xfm_fast.training.distributed import run_layers

        run_layers(step.model, activation_checkpointing=True)
    before = resident_bytes()
    with PeakMemory() as memory:
        for _ in range(_MEMORY_STEPS):
            step.run(procedure, AUTOCAST[dtype])
    parameters = list(step.model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    return {
        "peak_bytes": memory.peak,
        "grown_bytes": max(0, memory.peak - before - gradients),
        "memory_method": memory.method,
        "before_bytes": before,
        "parameter_bytes": sum(parameter.nbytes for parameter in parameters),
        "gradient_bytes": gradients,
    }
