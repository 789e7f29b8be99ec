"""One step of pretraining, forward and backward: ours against the official procedure, in one process.

Both run on the same parameters and the same batch of photographs with captions, and leave the same gradients; that is
checked before anything is timed. On a CPU the peak memory of each procedure is measured in a process of its own, which
has done nothing else, with the heap that `pretrain` has: within one process the second would find the heap as the first
one left it, and the high-water mark would belong to the one that needs more. Run as a program, this file is that
process: it reads a folder with the configuration and the batch, and prints one line of JSON.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, assert_never

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xfm_fast import flops
from xfm_fast.batches import PairBatch
from xfm_fast.config import XFMConfig
from xfm_fast.data.items import collate_pairs
from xfm_fast.data.masking import block_mask
from xfm_fast.data.options import TextOptions
from xfm_fast.data.texts import encode_pair_text
from xfm_fast.errors import UnavailableError
from xfm_fast.kernels.cpu.workspace import keep_freed_memory
from xfm_fast.memory import PeakMemory, resident_bytes
from xfm_fast.models.xfm import ALL_HEADS, XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.tokenizer import CaptionTokenizer

from .. import machine
from ..contenders.official_algorithm import OfficialTrainingTwin
from ..material import photographs
from ..material.inputs import described, preset_config, random_state
from ..material.photographs import Collection
from ..measure import MachineProbes, Progress, Samples, Watched, differing, filled, interleave, parity_band
from ..options import StepOptions
from ..record import OFFICIAL, OURS, Document, Efficiency, Memory, Model, Parity, Point, Row, Tokens, finite

Procedure = Literal["xfm-fast", "official-algorithm"]
# What a user trains with: parameters in fp32, products in bf16 where that is asked for.
AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}
# In the worst of its parameters the official step of the base model misses fp64 by 1e-5 in fp32 (relative L2 norm of
# the gradient). Three times that is allowed, as everywhere in this project.
FP32_GRADIENT_BAND = 3e-5
# A gradient whose norm is below this share of the largest one is compared on that scale instead of its own.
_NOISE = 1e-4
# The bias of keys moves all scores of a query alike, which their softmax takes out again: its gradient is zero but for
# rounding, and no two orders of summation round alike. It is compared on the scale of the weights' beside it.
_KEY_BIAS = "key.bias"
# By type of device: pairs of the full and of the quick measurement.
_PAIRS = {"cpu": (8, 2), "cuda": (96, 16)}
LABELS = {OURS: "xfm-fast", OFFICIAL: "official procedure, eager"}
_MEMORY_STEPS = 2
_BATCH, _TASK = "batch.safetensors", "task.json"


@dataclass(frozen=True)
class StepPlan:
    """The options with everything decided."""

    device: torch.device
    dtypes: list[str]
    pairs: int
    dropout: tuple[bool, ...]
    rounds: int
    warmups: int
    budget_s: float

    def official_dtype(self, dtype: str) -> str:
        """The official procedure's type in any case: on a GPU the same, on a CPU fp32, as it was published."""
        return dtype if self.device.type == "cuda" else "fp32"


def run(options: StepOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure a training step on this machine.

    An interruption (Ctrl-C) ends the run early and keeps the rows measured so far.

    Raises:
        XFMError: an option cannot be used, or the step does not fit into memory.
    """
    started = time.perf_counter()
    torch.set_num_threads(options.threads or machine.default_threads())
    torch.manual_seed(options.seed)
    plan, absent = _plan(options)
    document = Document.begun("train-step", vars(options), command, plan.device.type)
    try:
        StepRun(options, plan, progress or Progress(), document).measure(absent)
    except KeyboardInterrupt:
        document.interrupted = True
    except torch.OutOfMemoryError:
        raise UnavailableError(
            f"a step of {plan.pairs} pairs does not fit into the memory of this GPU; lower --pairs"
        ) from None
    document.duration_s = time.perf_counter() - started
    return document


def _plan(options: StepOptions) -> tuple[StepPlan, dict[str, str]]:
    device = machine.choose_device(options.device)
    names, absent = chosen_dtypes(options, device)
    pairs = _PAIRS[device.type][options.quick] if options.pairs is None else options.pairs
    if pairs < 2:
        raise UnavailableError(f"a step of {pairs} pair has no hard negatives; use --pairs 2 or more")
    return StepPlan(device, names, pairs, *repetitions(options, device)), absent


def chosen_dtypes(options: StepOptions, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The types to measure, and why others that were asked for are absent."""
    # On a GPU this model is not trained in fp32.
    asked = ("bf16",) if device.type == "cuda" and options.dtype == ("auto",) else options.dtype
    return machine.choose_dtypes(asked, device)


class Repetitions(NamedTuple):
    """How often a step is timed: without and with dropout, rounds, warm-ups, and seconds for more rounds."""

    dropout: tuple[bool, ...]
    rounds: int
    warmups: int
    budget_s: float


def repetitions(options: StepOptions, device: torch.device) -> Repetitions:
    """What suits the device and the haste."""
    rounds, warmups = (10, 3) if device.type == "cuda" else (3, 1)
    budget_s = 0.2 if options.preset == "tiny" else 10.0
    if options.quick:
        return Repetitions((False,), 2, warmups, budget_s / 10)
    return Repetitions((False, True), rounds, warmups, budget_s)


class StepRun:
    """Compares and times the two procedures of one step, and fills the document; by itself that of pretraining."""

    says = "training step"
    """What is done, in names of stages."""

    def __init__(self, options: StepOptions, plan: StepPlan, progress: Progress, document: Document) -> None:
        self.options, self.plan, self.progress, self.document = options, plan, progress, document
        self.config = preset_config(options.preset)
        self.dtypes = list(plan.dtypes)
        self.parity: dict[str, Parity] = {}
        self.memory: dict[tuple[Procedure, str, bool], Memory] = {}
        # Rows leave out what is not known here.
        self.tokens: dict[str, int] = {}
        self.flops: dict[str, int] = {}
        self.subject: StepSubject
        self.gpu = machine.data_sheet(plan.device)

    def measure(self, absent: dict[str, str]) -> None:
        plan, document = self.plan, self.document
        on_cpu = plan.device.type == "cpu"
        self.progress.begin(3 + len(plan.dropout) * (1 + on_cpu))
        self.progress.stage("photographs and captions")
        collection = photographs.bundled()
        tokenizer = CaptionTokenizer.train_on_texts(collection.captions, self.config.vocab_size)
        batch = pair_batch(collection, tokenizer, self.config, plan.pairs, self.options.seed)
        document.data = described(collection, tokenizer)
        lengths = batch.attention_mask.sum(1).tolist()
        masked = (batch.masked_labels != -100).sum(1).tolist()
        padded, slots = batch.input_ids.shape[1], batch.masked_labels.shape[1]
        self.tokens = {OURS: sum(lengths), OFFICIAL: plan.pairs * padded}
        self.flops = {
            OURS: flops.pretraining_step(self.config, lengths, masked).total,
            OFFICIAL: flops.official_pretraining_step(self.config, plan.pairs, padded, slots).total,
        }
        for dropout in plan.dropout if on_cpu else ():
            self.progress.stage("peak memory" + ", with dropout" * dropout)
            for procedure, dtype in self._variants():
                self.progress.step(f"{procedure} {dtype}, own process")
                measured = partial(
                    memory_use, procedure, self.config, batch, dtype, training=dropout, seed=self.options.seed,
                    threads=torch.get_num_threads(),
                )  # fmt: skip
                least = measured(checkpointed=True).peak_bytes if procedure == OURS else None
                use = measured().model_copy(update={"checkpointed_bytes": least})
                self.memory[procedure, dtype, dropout] = use
        self.progress.stage("model")
        self.subject = TrainingSubject(self.config, batch, seed=self.options.seed, device=plan.device)
        document.model = Model(
            preset=self.options.preset, origin=f"random weights (seed {self.options.seed})", trained=False,
            meaningful_recall=False, config=self.config.model_dump(),
            parameters=sum(parameter.numel() for parameter in self.subject.model.parameters()),
        )  # fmt: skip
        self.check()
        probes = MachineProbes(self.dtypes, plan.device)
        document.probes = probes.describe()
        self.time(probes, absent)

    def check(self) -> None:
        """Compare losses and gradients on the batch that will be timed, negatives being given."""
        self.progress.stage("checking that both leave the same gradients")
        self.progress.step(f"{OFFICIAL} fp32")
        truth = self.subject.outcome(OFFICIAL)
        for name in self.plan.dtypes:
            autocast, own = AUTOCAST[name], 0.0
            if autocast is not None:
                self.progress.step(f"{OFFICIAL} {name}")
                own = difference(self.subject.outcome(OFFICIAL, autocast), truth).error
            band = parity_band(autocast or torch.float32, own, fp32=FP32_GRADIENT_BAND)
            self.progress.step(f"{OURS} {name}")
            found = difference(self.subject.outcome(OURS, autocast), truth)
            self.parity[name] = Parity(
                error=finite(found.error), band=band, passed=found.error <= band, against=f"{OFFICIAL} fp32",
                note=found.note,
            )  # fmt: skip
            if not self.parity[name].passed:
                self.dtypes.remove(name)

    def time(self, probes: MachineProbes, absent: Mapping[str, str]) -> None:
        """Add the rows of both procedures; `absent` are types that this machine does not offer, and why."""
        for dropout in self.plan.dropout:
            for dtype in self.plan.dtypes:
                parity = self.parity[dtype]
                if not parity.passed:
                    row = self._row(OURS, dtype, dropout)
                    error = math.inf if parity.error is None else parity.error
                    self.document.rows.append(row.model_copy(update=differing(row, error, parity.band or 0.0)))
            if self.dtypes:
                self._time(dropout, probes)
            self.document.rows += [
                self._row(OURS, dtype, dropout).model_copy(update={"status": "not offered", "reason": reason})
                for dtype, reason in absent.items()
            ]

    def _variants(self) -> list[tuple[Procedure, str]]:
        """Procedures and types that are run; the official one in the types of ours too where there is time for it."""
        official = {self.plan.official_dtype(name) for name in self.dtypes}
        official |= set() if self.options.quick else set(self.dtypes)
        ours: list[tuple[Procedure, str]] = [(OURS, name) for name in self.dtypes]
        return [*ours, *((OFFICIAL, name) for name in AUTOCAST if name in official)]

    def _time(self, dropout: bool, probes: MachineProbes) -> None:
        plan = self.plan
        self.progress.stage(self.says + ", with dropout" * dropout)
        watched = {
            f"{procedure} {dtype}": Watched(partial(self.subject.step, procedure, AUTOCAST[dtype]), plan.device)
            for procedure, dtype in self._variants()
        }
        self.subject.model.train(dropout)
        try:
            samples = interleave(
                watched, probes, warmups=plan.warmups, rounds=plan.rounds, budget_s=plan.budget_s,
                on_step=self.progress.step,
            )  # fmt: skip
        finally:
            self.subject.model.eval()
        self.document.rows += self._rows(samples, watched, dropout)
        if samples.interrupted:
            raise KeyboardInterrupt

    def _rows(self, samples: Samples, watched: Mapping[str, Watched], dropout: bool) -> list[Row]:
        rows = []
        for procedure, dtype in self._variants():
            key, memory = f"{procedure} {dtype}", self.memory.get((procedure, dtype, dropout))
            seen = watched[key].memory
            if self.plan.device.type == "cuda" and seen is not None:
                memory = cuda_memory_use(seen.peak_bytes, self.subject.model)
            row = filled(self._row(procedure, dtype, dropout), key, samples, memory)
            if row.median_s is not None and self.tokens:
                useful, computed = self.tokens[OURS], self.tokens[procedure]
                row.tokens = Tokens(
                    useful=useful, padded=computed, useful_per_s=useful / row.median_s,
                    padded_per_s=computed / row.median_s,
                )  # fmt: skip
            if row.median_s is not None and self.flops:
                needed, own = self.flops[OURS], self.flops[procedure]
                # The sheet's rate is that of 16-bit products.
                sheet = None if self.gpu is None or dtype == "fp32" else needed / row.median_s / self.gpu.flops_per_s
                row.efficiency = Efficiency(
                    flops=own, needed_flops=needed, mfu=samples.share_of_rate(key, needed), mfu_data_sheet=sheet,
                    utilisation=samples.share_of_rate(key, own),
                )  # fmt: skip
            rows.append(row)
        return rows

    def _row(self, procedure: Procedure, dtype: str, dropout: bool) -> Row:
        size = f"{self.plan.pairs} pairs of {self.config.image_size} px"
        return Row(
            work="train-step-dropout" if dropout else "train-step",
            name=f"training step, {size}, ITC + ITM + IMLM + MIM" + ", with dropout" * dropout,
            point=Point(batch=self.plan.pairs, image_size=self.config.image_size, dropout=dropout),
            contender=procedure, label=LABELS[procedure], dtype=dtype, status="measured", unit="pairs",
            items=self.plan.pairs, parity=self._parity(procedure, dtype, dropout),
        )  # fmt: skip

    def _parity(self, procedure: Procedure, dtype: str, dropout: bool) -> Parity | None:
        parity = self.parity.get(dtype) if procedure == OURS else None
        if not dropout or parity is None:
            return parity
        return parity.model_copy(update={"note": f"{parity.note}; compared without dropout"})


def pair_batch(
    collection: Collection, tokenizer: CaptionTokenizer, config: XFMConfig, pairs: int, seed: int
) -> PairBatch:
    """Photographs with a caption each, masked and padded as the official loader does; repeated where they are few."""
    rng = np.random.default_rng(seed)
    photos = [number % len(collection.names) for number in range(pairs)]
    texts = []
    for number, photo in enumerate(photos):
        captions = collection.captions_of(photo)
        turn = number // len(collection.names) % len(captions)
        texts.append(encode_pair_text(captions[turn], tokenizer, TextOptions(), rng))
    hidden, least = config.num_masking_patches, config.min_num_patches
    return collate_pairs(
        list(collection.pixels(photos, config.image_size)), texts, pad_token_id=config.pad_token_id,
        patch_masks=[block_mask(config.grid, hidden, least, rng) for _ in photos], width=TextOptions().max_tokens,
        most=TextOptions().masking.most,
    )  # fmt: skip


class Outcome(NamedTuple):
    """Losses and gradients that a step leaves behind."""

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


class Difference(NamedTuple):
    """How far two outcomes are apart.

    Attributes:
        losses: largest relative difference of a loss.
        gradients: relative L2 distance of all gradients, taken as one vector.
        worst: largest relative L2 distance of the gradients of one parameter, which `parameter` names.
    """

    losses: float
    gradients: float
    worst: float
    parameter: str

    @property
    def error(self) -> float:
        """The largest of them."""
        return max(self.losses, self.gradients, self.worst)

    @property
    def note(self) -> str:
        """All of them, for a report."""
        return f"losses {self.losses:.1e}, gradients {self.gradients:.1e}, worst: {self.parameter}"


class StepSubject(ABC):
    """A model and a batch, on which both procedures do the same step.

    Attributes:
        model: whose parameters both read, and which receive the gradients.
        device: of model and batch.
    """

    model: XFM
    device: torch.device

    @abstractmethod
    def losses(self, procedure: Procedure, hard_negatives: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        """The losses whose sum the step minimises; negatives are drawn where none are given."""

    @property
    @abstractmethod
    def items(self) -> int:
        """Pairs, or whatever else the batch holds."""

    def step(
        self, procedure: Procedure, autocast: torch.dtype | None = None, *, given_negatives: bool = False
    ) -> dict[str, Tensor]:
        """Forward and backward pass of all losses, from no gradients to gradients in the parameters.

        Args:
            given_negatives: take the neighbours of each pair as its negatives instead of drawing, so that both
                procedures compute the same.

        Returns:
            The detached losses.
        """
        self.model.zero_grad(set_to_none=True)
        own = torch.arange(self.items, device=self.device)
        negatives = (own.roll(-1), own.roll(1)) if given_negatives else None
        with torch.enable_grad():
            with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
                losses = self.losses(procedure, negatives)
                total = torch.stack([loss.float() if autocast else loss for loss in losses.values()]).sum()
            total.backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def outcome(self, procedure: Procedure, autocast: torch.dtype | None = None) -> Outcome:
        """A step with given negatives, and its gradients, which the parameters give away."""
        losses = self.step(procedure, autocast, given_negatives=True)
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return Outcome(losses, gradients)


class TrainingSubject(StepSubject):
    """A model with all heads and random weights, its official twin on the same parameters, and a batch of pairs."""

    def __init__(
        self, config: XFMConfig, batch: PairBatch, *, seed: int, device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        with torch.device("meta"):
            model = XFM(config, heads=ALL_HEADS)
        state = random_state(config, ALL_HEADS, seed)
        model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in state.items()}, assign=True)
        self.model = model.eval()
        self.official = OfficialTrainingTwin(self.model)
        self.device = device
        self.batch = replace(batch, image=batch.image.to(dtype)).to(device)

    @property
    def items(self) -> int:
        return len(self.batch.image)

    def losses(self, procedure: Procedure, hard_negatives: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
        if procedure == OURS:
            return pretraining_losses(self.model, self.batch, hard_negatives=hard_negatives)
        if procedure == OFFICIAL:
            return self.official.losses(self.batch, hard_negatives=hard_negatives)
        assert_never(procedure)


def difference(ours: Outcome, truth: Outcome) -> Difference:
    """Compare two outcomes; NaN counts as infinite, and so does a gradient that only one of them has."""
    losses = max(_finite((ours.losses[name] / loss - 1).abs()) for name, loss in truth.losses.items())
    scale = max(float(gradient.double().norm()) for gradient in truth.gradients.values() if gradient is not None)
    squares, distances, worst = 0.0, 0.0, (0.0, "")
    for name, expected in truth.gradients.items():
        found = ours.gradients[name]
        if expected is None or found is None:
            # Where a method stops a gradient, none and zero are the same.
            present = found if expected is None else expected
            if present is not None and bool(present.any()):
                worst = max(worst, (math.inf, name))
            continue
        distance = _finite((found.double() - expected.double()).norm())
        own = float(expected.double().norm())
        distances, squares = distances + distance**2, squares + own**2
        least = _NOISE * scale
        if name.endswith(_KEY_BIAS):
            beside = truth.gradients.get(name.removesuffix("bias") + "weight")
            least = max(least, 0.0 if beside is None else float(beside.double().norm()))
        worst = max(worst, (distance / max(own, least), name))
    return Difference(losses, (distances / squares) ** 0.5 if squares else 0.0, *worst)


def _finite(value: Tensor) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf


def memory_use(
    procedure: Procedure, config: XFMConfig, batch: PairBatch, dtype: str, *, training: bool, seed: int, threads: int,
    checkpointed: bool = False,
) -> Memory:  # fmt: skip
    """Run two steps of one procedure in a new process and see how much memory it takes.

    Args:
        dtype: a key of `AUTOCAST`.
        training: with dropout and stochastic depth.
        checkpointed: with activation checkpointing of our layers.

    Raises:
        UnavailableError: the process ended otherwise than planned; it is killed where memory runs out.
    """
    task = {
        "procedure": procedure, "config": config.model_dump(), "dtype": dtype, "training": training, "seed": seed,
        "threads": threads, "checkpointed": checkpointed,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="xfm-step-") as folder:
        tensors = {name: tensor for name, tensor in vars(batch).items() if isinstance(tensor, Tensor)}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, Path(folder) / _BATCH)
        (Path(folder) / _TASK).write_text(json.dumps(task))
        done = subprocess.run([sys.executable, "-m", __name__, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise UnavailableError(
            f"the process that measures the memory of a step ({procedure}, {dtype}) failed: {why[0]}; free memory, or "
            "take fewer --pairs or --preset tiny"
        )
    return Memory.model_validate_json(done.stdout.splitlines()[-1])


def cuda_memory_use(peak_bytes: int, model: nn.Module) -> Memory:
    """The same from what CUDA's allocator counted during a step of `model`, whose gradients are still there."""
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return _step_memory(peak_bytes, parameters, model, "CUDA allocator")


def _step_memory(peak_bytes: int, before_bytes: int, model: nn.Module, method: str) -> Memory:
    parameters = list(model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    return Memory(
        peak_bytes=peak_bytes, grown_bytes=max(0, peak_bytes - before_bytes - gradients), method=method,
        before_bytes=before_bytes, parameter_bytes=sum(parameter.nbytes for parameter in parameters),
        gradient_bytes=gradients,
    )  # fmt: skip


def _measured_memory(folder: Path) -> Memory:
    task = json.loads((folder / _TASK).read_text())
    torch.set_num_threads(task["threads"])
    tensors: dict[str, Any] = load_file(folder / _BATCH)
    config, device = XFMConfig(**task["config"]), torch.device("cpu")
    subject = TrainingSubject(config, PairBatch(**tensors), seed=task["seed"], device=device)
    subject.model.train(task["training"])
    if task["checkpointed"]:
        # Here, for it brings modules along that no other procedure needs in memory.
        from xfm_fast.training.distributed import run_layers

        run_layers(subject.model, activation_checkpointing=True)
    before = resident_bytes()
    with PeakMemory() as memory:
        for _ in range(_MEMORY_STEPS):
            subject.step(task["procedure"], AUTOCAST[task["dtype"]])
    return _step_memory(memory.peak, before, subject.model, memory.method)


if __name__ == "__main__":
    keep_freed_memory()
    print(_measured_memory(Path(sys.argv[1])).model_dump_json())
