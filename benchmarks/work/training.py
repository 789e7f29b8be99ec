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
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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

from ..contenders.official_algorithm import OfficialTrainingTwin
from ..material import photographs
from ..material.inputs import described, preset_config, random_state
from ..material.photographs import Collection
from ..measure import Backend, Case, Difference, Run
from ..record import OFFICIAL, OURS, Extra, Model, Parity

Procedure = str
"""`OURS` or `OFFICIAL`."""
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


def step_cases(
    run: Run, subject: StepSubject, work: str, name: str, unit: str, *, items: int, flops: Mapping[str, int],
    tokens: Mapping[str, int], memory: Mapping[tuple[str, str, bool], Extra],
) -> Iterator[Case]:  # fmt: skip
    """A step without and, but for a quick run, with dropout; both procedures agree without it.

    Args:
        flops, tokens: of each procedure, by its name.
        memory: where it was measured, by procedure, dtype and dropout.
    """
    quick, gpu = run.options.quick, run.device.type == "cuda"
    # As published, the official procedure runs in fp32; on a GPU in the dtype of ours.
    official = {dtype if gpu else "fp32" for dtype in run.dtypes} | (set() if quick else set(run.dtypes))
    dtypes: dict[Procedure, list[str]] = {OURS: run.dtypes, OFFICIAL: [name for name in AUTOCAST if name in official]}
    variants = [(procedure, dtype) for procedure in dtypes for dtype in dtypes[procedure]]
    budget_s = 0.2 if run.options.preset == "tiny" else 10.0
    rounds, warmups = (10, 3) if gpu else (3, 1)

    def step(procedure: Procedure, dtype: str, dropout: bool) -> None:
        subject.model.train(dropout)
        subject.step(procedure, AUTOCAST[dtype])

    def count(backend: Backend, result: object) -> Extra:
        extra: Extra = {"needed_flops": flops[OURS], "flops": flops[backend.name]}
        if tokens:
            extra |= {"tokens": tokens[OURS], "padded_tokens": tokens[backend.name]}
        if gpu:
            parameters = sum(parameter.nbytes for parameter in subject.model.parameters())
            extra |= {"parameter_bytes": parameters, "gradient_bytes": parameters}
        return extra

    def compare(ours: Outcome, truth: Outcome) -> Difference:
        found = difference(ours, truth)
        return Difference(found.error, found.note)

    parity: dict[tuple[str, str], Parity | None] = {}
    for dropout in (False,) if quick else (False, True):
        run.progress.stage(name + ", with dropout" * dropout)
        backends = [
            Backend(OURS, dtype, dict, LABELS[OURS], lacking=("not offered", why)) for dtype, why in run.absent.items()
        ]
        for procedure, dtype in variants:
            known = parity.get((procedure, dtype))
            backend = Backend(
                procedure, dtype, lambda procedure=procedure, dtype=dtype, dropout=dropout: partial(
                    step, procedure, dtype, dropout
                ),
                LABELS[procedure], partial(subject.outcome, procedure, AUTOCAST[dtype]), parity=known,
                extra=memory.get((procedure, dtype, dropout), {}),
            )  # fmt: skip
            if known is not None and not known.passed:
                backend.lacking = "parity failed", "its gradients differ without dropout"
            backends.append(backend)
        yield Case(
            work + "-dropout" * dropout, name + ", with dropout" * dropout, backends, unit, items, judge=OFFICIAL,
            reference=None if dropout else lambda dtype: subject.outcome(OFFICIAL, AUTOCAST[dtype]), compare=compare,
            fp32_band=FP32_GRADIENT_BAND, count=count, grad=True, rounds=2 if quick else rounds, warmups=warmups,
            budget_s=budget_s / 10 if quick else budget_s,
        )  # fmt: skip
        parity = {
            (row.backend, row.dtype): row.parity
            and row.parity.model_copy(update={"note": f"{row.parity.note}; compared without dropout"})
            for row in run.document.rows
            if row.work == work
        }


def pretraining(run: Run) -> Iterator[Case]:
    """The step of ITC, ITM, IMLM and MIM."""
    options, on_cpu = run.options, run.device.type == "cpu"
    pairs = _PAIRS[run.device.type][options.quick] if options.pairs is None else options.pairs
    if pairs < 2:
        raise UnavailableError(f"a step of {pairs} pair has no hard negatives; use --pairs 2 or more")
    steps = (False,) if options.quick else (False, True)
    run.progress.begin(2 + len(steps) * (1 + on_cpu))
    run.progress.stage("photographs and captions")
    config, collection = preset_config(options.preset), photographs.bundled()
    tokenizer = CaptionTokenizer.train_on_texts(collection.captions, config.vocab_size)
    batch = pair_batch(collection, tokenizer, config, pairs, options.seed)
    run.document.data = described(collection, tokenizer)
    lengths, masked = batch.attention_mask.sum(1).tolist(), (batch.masked_labels != -100).sum(1).tolist()
    padded, slots = batch.input_ids.shape[1], batch.masked_labels.shape[1]
    memory: dict[tuple[str, str, bool], Extra] = {}
    for dropout in steps if on_cpu else ():
        run.progress.stage("peak memory" + ", with dropout" * dropout)
        official = ["fp32"] if options.quick else list(dict.fromkeys(["fp32", *run.dtypes]))
        dtypes: dict[Procedure, list[str]] = {OURS: run.dtypes, OFFICIAL: official}
        for procedure, dtype in ((one, dtype) for one in dtypes for dtype in dtypes[one]):
            run.progress.step(f"{procedure} {dtype}, own process")
            measured = partial(
                memory_use, procedure, config, batch, dtype, training=dropout, seed=options.seed,
                threads=torch.get_num_threads(),
            )  # fmt: skip
            memory[procedure, dtype, dropout] = measured()
            if procedure == OURS:
                memory[procedure, dtype, dropout]["checkpointed_bytes"] = measured(checkpointed=True)["peak_bytes"]
    run.progress.stage("model")
    subject = TrainingSubject(config, batch, seed=options.seed, device=run.device)
    describe_model(run, subject.model)
    run.probe()
    yield from step_cases(
        run, subject, "train-step", f"training step, {pairs} pairs of {config.image_size} px, ITC + ITM + IMLM + MIM",
        "pairs", items=pairs, memory=memory, tokens={OURS: sum(lengths), OFFICIAL: pairs * padded},
        flops={
            OURS: flops.pretraining_step(config, lengths, masked).total,
            OFFICIAL: flops.official_pretraining_step(config, pairs, padded, slots).total,
        },
    )  # fmt: skip


def describe_model(run: Run, model: XFM) -> None:
    """Note a model with random weights; of several the largest."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if run.document.model is None or run.document.model.parameters < parameters:
        run.document.model = Model(
            preset=run.options.preset, origin=f"random weights (seed {run.options.seed})", trained=False,
            meaningful_recall=False, config=model.config.model_dump(), parameters=parameters,
        )  # fmt: skip


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


class Gradients(NamedTuple):
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
        self.model.eval()
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
        return self.official.losses(self.batch, hard_negatives=hard_negatives)


def difference(ours: Outcome, truth: Outcome) -> Gradients:
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
    return Gradients(losses, (distances / squares) ** 0.5 if squares else 0.0, *worst)


def _finite(value: Tensor) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf


def memory_use(
    procedure: Procedure, config: XFMConfig, batch: PairBatch, dtype: str, *, training: bool, seed: int, threads: int,
    checkpointed: bool = False,
) -> Extra:  # fmt: skip
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
    return json.loads(done.stdout.splitlines()[-1])


def _measured_memory(folder: Path) -> Extra:
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
    parameters = list(subject.model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    return {
        "peak_bytes": memory.peak, "grown_bytes": max(0, memory.peak - before - gradients),
        "memory_method": memory.method, "before_bytes": before,
        "parameter_bytes": sum(parameter.nbytes for parameter in parameters), "gradient_bytes": gradients,
    }  # fmt: skip


if __name__ == "__main__":
    keep_freed_memory()
    print(json.dumps(_measured_memory(Path(sys.argv[1]))))
