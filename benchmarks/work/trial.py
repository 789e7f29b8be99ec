"""The worth of `accelerate` for one's own model, here: opened, accelerated in each way, verified, timed in turns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError, XFMError
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

_ROUNDS, _BUDGET_S = 5, 15.0
# A gain within what chance makes of two runs of one thing is none.
_WORTH = 1.03


@dataclass
class Trial:
    """The result of trying a model.

    Attributes:
        document: every row.
        line: of Python to paste, with what is worth it here; None where nothing is.
        told: sentences for the reader.
    """

    document: Document
    line: str | None
    told: list[str]


@dataclass(frozen=True)
class _Way:
    """One call of `accelerate`, as it would be written, and its options."""

    call: str
    options: dict[str, Any]


_PLAIN = _Way("accelerate(model)", {})
_UNPAD = _Way("accelerate(model, unpad=True)", {"unpad": True})
_FROZEN = _Way("accelerate(model, unpad=True, freeze=True)", {"unpad": True, "freeze": True})


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
        for one in (batch, batch.first()):
            progress.stage(one.words)
            document.rows += _measured(opened, one, ways, names, options, probes, progress)
    except KeyboardInterrupt:
        document.interrupted = True
    best = _best(document, batch.words)
    begins = (f"{len(report.replaced)} modules replaced", "not known: ")
    told += [line for line in str(report).splitlines() if line.startswith(begins)]
    if best is None:
        return Trial(document, None, [*told, "nothing is gained here; leave the model as it is"])
    gain, way, dtype = best
    convert = "" if dtype == "fp32" else "model.to(torch.bfloat16); "
    told.append(f"worth it here: {gain:.1f} times as fast as the untouched model in {dtype}")
    return Trial(document, f"import xfm_fast; {convert}xfm_fast.{way}", told)


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
            fast = copy.deepcopy(own) if way.options.get("freeze") else _shared_copy(own)
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
            title = f"{batch.words}, {way.call}"
            common: dict[str, Any] = {
                "work": way.call, "name": title, "dtype": name, "unit": batch.unit, "items": batch.items,
                "point": Point(batch=batch.items),
            }  # fmt: skip
            ours = Row(contender=OURS, label="accelerated", status="measured", **common)
            if key in refused:
                rows.append(ours.model_copy(update={"status": "not offered", "reason": refused[key]}))
                continue
            ours.replaced = reports[key]
            row = filled(ours, key, samples, watched[key].memory)
            if row.measured:
                row.against = [other for other in row.against if other.contender == UNTOUCHED]
                own = 0.0 if name == "fp32" else relative_error(watched[untouched].output, expected)
                error, band = relative_error(watched[key].output, expected), parity_band(DTYPES[name], own)
                row.parity = Parity(error=finite(error), band=band, passed=error <= band, against=f"{UNTOUCHED} fp32")
                if not row.parity.passed:
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


def _best(document: Document, words: str) -> tuple[float, str, str] | None:
    """Gain, call and type of the row of the whole batch that gains most over the untouched model in its own type."""
    found = []
    for row in document.rows:
        like = document.like_for_like(row) if row.ours and row.measured else None
        if like is not None and row.name.startswith(f"{words}, ") and math.isfinite(like.ratio):
            found.append((like.ratio, row.work, row.dtype))
    best = max(found, default=None)
    return best if best is not None and best[0] >= _WORTH else None
