"""The worth of `accelerate` for one's own model, here: opened, accelerated in each way, verified, timed in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError, XFMError
from xfm_fast.kernels.cpu import int8
from xfm_fast.replace import accelerate

from .. import machine
from ..material.models import Batch, Opened, example_texts, image_batch, open_model, read_texts, text_batch
from ..measure import (
    DTYPES,
    MachineProbes,
    Progress,
    Watched,
    agreeing,
    differing,
    filled,
    interleave,
    one_line,
    parity_band,
    relative_error,
)
from ..options import TryOptions
from ..record import OURS, UNTOUCHED, Document, Parity, Point, Row, finite
from .drop_in import INT8_BAND

_ROUNDS, _BUDGET_S = 5, 15.0
# A gain within what chance makes of two runs of one thing is none.
_WORTH = 1.03


@dataclass
class Trial:
    """The result of trying a model.

    Attributes:
        document: every row.
        line: Python to paste: the fastest call in fp32 or bf16; None where the untouched model is as fast.
        told: sentences for the reader, the int8 call among them.
    """

    document: Document
    line: str | None
    told: list[str]


@dataclass(frozen=True)
class _Way:
    """One call of `accelerate` as source code, with its options."""

    call: str
    options: dict[str, Any]

    @property
    def int8(self) -> bool:
        """Whether linear layers are rounded to 8 bits."""
        return self.options.get("dtype") == "int8"


_PLAIN = _Way("accelerate(model)", {})
_UNPAD = _Way("accelerate(model, unpad=True)", {"unpad": True})
_FROZEN = _Way("accelerate(model, unpad=True, freeze=True)", {"unpad": True, "freeze": True})
_INT8 = _Way('accelerate(model, dtype="int8")', {"dtype": "int8"})
_INT8_UNPAD = _Way('accelerate(model, unpad=True, dtype="int8")', {"unpad": True, "dtype": "int8"})


def run(name: str, options: TryOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Trial:
    """Try a model by its name, as `open_model` takes it. Ctrl-C ends the measuring early and keeps what was measured.

    Raises:
        InputError: nothing of the model is recognised, or what was given does not fit it.
        CheckpointError: it cannot be opened.
        DataError: texts or images cannot be read.
        UnavailableError: a package is not installed, or a type unknown.
    """
    progress = progress or Progress()
    torch.set_num_threads(options.threads or machine.default_threads())
    names, _ = machine.choose_dtypes(options.dtype)
    progress.begin(3)
    progress.stage(f"opening {name}")
    opened = open_model(name)
    batch = _batch(opened, options)
    fast = _shared_copy(opened.model)
    # What is not recognised is told before anything is timed; the copy shares the weights, and is thrown away.
    report = accelerate(fast)
    told = [*opened.notes, *batch.notes]
    document = Document.begun("drop-in", {"model": name, **vars(options)}, command, "cpu")
    try:
        probes = MachineProbes(names, torch.device("cpu"))
        document.probes = probes.describe()
        ways = [_PLAIN, *([_UNPAD, _FROZEN] if batch.unit == "texts" else [])]
        if options.dtype in ((), ("auto",)) and int8.why_not() is None:
            ways.append(_INT8_UNPAD if batch.unit == "texts" else _INT8)
        for one in (batch, batch.first()):
            progress.stage(one.words)
            document.rows += _measured(opened, one, ways, names, options, probes, progress)
    except KeyboardInterrupt:
        document.interrupted = True
    begins = (f"{len(report.replaced)} modules replaced", "not known: ")
    told += [line for line in str(report).splitlines() if line.startswith(begins)]
    return Trial(document, *_advice(document, batch.words, told))


def _advice(document: Document, words: str, told: list[str]) -> tuple[str | None, list[str]]:
    """The line to paste and the sentences, by the times of the whole batch in every dtype."""
    rows = [row for row in document.rows if row.measured and row.name.startswith(f"{words}, ")]
    untouched = max((row for row in rows if not row.ours), key=_rate, default=None)
    exact = max((row for row in rows if row.ours and row.dtype != "int8"), key=_rate, default=None)
    rounded = max((row for row in rows if row.ours and row.dtype == "int8"), key=_rate, default=None)
    if untouched is None:
        return None, [*told, "the model was not measured; raise --threads or give a smaller batch"]
    line, best = None, _rate(untouched)
    if exact is not None and _rate(exact) >= _WORTH * best:
        convert = "" if exact.dtype == "fp32" else "import torch; model.to(torch.bfloat16); "
        line = f"{convert}import xfm_fast; xfm_fast.{exact.work}"
        told.append(
            f"{_rate(exact) / best:.2f}× the speed of the untouched model ({exact.dtype} against {untouched.dtype}, "
            "the fastest dtype of each)"
        )
        best = _rate(exact)
    else:
        told.append("no gain here; leave the model as it is")
    if rounded is not None and rounded.parity is not None and _rate(rounded) >= _WORTH * best:
        told.append(
            f"int8 is {_rate(rounded) / best:.2f}× as fast as that; outputs differ by up to "
            f"{rounded.parity.error:.1%} of the largest: xfm_fast.{rounded.work}"
        )
    return line, told


def _rate(row: Row) -> float:
    """Items per second."""
    return row.throughput.value if row.throughput is not None else 0.0


def _batch(opened: Opened, options: TryOptions) -> Batch:
    if options.texts is not None and not opened.takes_texts:
        raise InputError(f"--texts: {opened.name} ({type(opened.model).__name__}) takes no texts; give --images")
    if options.images is not None and not opened.takes_images:
        raise InputError(f"--images: {opened.name} ({type(opened.model).__name__}) takes no images; give --texts")
    if not (opened.takes_texts or opened.takes_images):
        raise InputError(
            f"{opened.name} ({type(opened.model).__name__}) takes neither input_ids nor pixel_values, so no batch can "
            "be made for it; call xfm_fast.accelerate(model, verify=batch) with one of yours"
        )
    if not opened.takes_texts:
        return image_batch(opened, options.images)
    texts = example_texts() if options.texts is None else read_texts(options.texts)
    made = text_batch(opened, texts[:4] if options.quick else texts)
    if opened.takes_images:
        # Both towers of a model such as CLIP: as many texts as images, for a matrix of both.
        seen = image_batch(opened, options.images)
        made.arguments |= seen.arguments
        made.words += f" and {seen.words}"
        made.notes += seen.notes
    return made


def _shared_copy(model: nn.Module) -> nn.Module:
    """The same model in other modules, with the same parameters and buffers."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _measured(
    opened: Opened, batch: Batch, ways: Sequence[_Way], names: Sequence[str], options: TryOptions,
    probes: MachineProbes, progress: Progress,
) -> list[Row]:  # fmt: skip
    """Rows of one batch: the untouched model in each type, and every way beside it."""
    cpu, runs, refused = torch.device("cpu"), dict[str, Callable[[], Tensor]](), dict[str, str]()
    reports: dict[str, list[str]] = {}
    for name in names:
        dtype = DTYPES[name]
        own = opened.model if name == "fp32" else copy.deepcopy(opened.model).to(dtype)
        runs[f"{UNTOUCHED} {name}"] = partial(_output, batch, own)
        for way in ways:
            if way.int8 and name != names[0]:
                continue
            fast = copy.deepcopy(own) if way.options.get("freeze") or way.int8 else _shared_copy(own)
            try:
                reports[f"{way.call} {name}"] = str(accelerate(fast, **way.options)).splitlines()
            except XFMError as error:
                refused[f"{way.call} {name}"] = one_line(error)
                continue
            runs[f"{way.call} {name}"] = partial(_output, batch, fast)
    expected = None
    if "fp32" not in names:
        with torch.no_grad():
            expected = _output(batch, opened.model.float())
    watched = {key: Watched(call, cpu) for key, call in runs.items()}
    samples = interleave(
        watched, probes, warmups=1, rounds=2 if options.quick else _ROUNDS, budget_s=0 if options.quick else _BUDGET_S,
        on_step=progress.step,
    )  # fmt: skip
    if samples.interrupted:
        raise KeyboardInterrupt
    if expected is None:
        expected = watched[f"{UNTOUCHED} fp32"].output
    if failed := samples.failures.get(f"{UNTOUCHED} {names[0]}"):
        raise InputError(f"{opened.name} does not run on {batch.words} as it is ({failed}); the batch does not fit it")
    rows: list[Row] = []
    for name in names:
        untouched = f"{UNTOUCHED} {name}"
        for way in ways:
            key = f"{way.call} {name}"
            if key not in runs and key not in refused:
                continue
            title = f"{batch.words}, {way.call}"
            common: dict[str, Any] = {
                "work": way.call, "name": title, "dtype": name, "unit": batch.unit, "items": batch.items,
                "point": Point(batch=batch.items),
            }  # fmt: skip
            ours = Row(contender=OURS, label="accelerated", status="measured", **common)
            if way.int8:
                ours.dtype = "int8"
            if key in refused:
                rows.append(ours.model_copy(update={"status": "not offered", "reason": refused[key]}))
                continue
            ours.replaced = reports[key]
            row = filled(ours, key, samples, watched[key].memory)
            if row.measured:
                row.against = [other for other in row.against if other.contender == UNTOUCHED]
                own = 0.0 if name == "fp32" else relative_error(watched[untouched].output, expected)
                error = relative_error(watched[key].output, expected)
                band = INT8_BAND if way.int8 else parity_band(DTYPES[name], own)
                row.parity = Parity(error=finite(error), band=band, passed=error <= band, against=f"{UNTOUCHED} fp32")
                if way.int8 and not row.parity.passed:
                    why = f"int8 changes the outputs by {error:.1e}, more than {band:.1e}"
                    row = ours.model_copy(update={"status": "not offered", "reason": why, "parity": None})
                elif not row.parity.passed:
                    row = row.model_copy(update={**differing(row, error, band), "against": []})
            plain = Row(contender=UNTOUCHED, label="untouched", status="measured", **common)
            rows += agreeing([row, filled(plain, untouched, samples, watched[untouched].memory)])
    return rows


def _output(batch: Batch, model: nn.Module) -> Tensor:
    """All floating-point outputs side by side, without those of padding, which have no meaning."""
    made = batch.run(model)
    mask = batch.arguments.get("attention_mask")
    leaves = made.to_tuple() if hasattr(made, "to_tuple") else pytree.tree_leaves(made)
    kept = []
    for leaf in pytree.tree_leaves(list(leaves)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            real = mask is not None and leaf.shape[:2] == mask.shape
            kept.append((leaf[mask.bool()] if real and mask is not None else leaf).flatten())
    if not kept:
        raise InputError(f"{type(model).__name__} returned no numbers that could be compared")
    # Outputs of several sizes count alike: each is compared with its own largest value.
    return torch.cat([part / part.detach().abs().max().clamp(min=torch.finfo(part.dtype).tiny) for part in kept])
