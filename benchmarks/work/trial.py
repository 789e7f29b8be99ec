"""The gain of `accelerate` for one's own model: opened, accelerated in each way, verified, timed in rounds."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import int8
from xfm_fast.replace import accelerate

from ..measure import Backend, Call, Case, Progress, Run, benchmark
from ..options import TryOptions
from ..record import UNTOUCHED, Document, Extra, Result
from ..timing import DTYPES
from .drop_in import INT8_BAND, TITLE
from .trial_models import Batch, Opened, example_texts, image_batch, open_model, read_texts, text_batch

# A gain within what chance makes of two runs of one thing is none.
_WORTH = 1.03
# Calls of `accelerate` as source code, with their options.
_TEXTS: dict[str, dict[str, Any]] = {
    "accelerate(model)": {},
    "accelerate(model, unpad=True)": {"unpad": True},
    "accelerate(model, unpad=True, freeze=True)": {"unpad": True, "freeze": True},
    'accelerate(model, unpad=True, dtype="int8")': {"unpad": True, "dtype": "int8"},
}
_IMAGES: dict[str, dict[str, Any]] = {
    "accelerate(model)": {}, 'accelerate(model, dtype="int8")': {"dtype": "int8"}
}  # fmt: skip


@dataclass
class Trial:
    """The result of trying a model.

    Attributes:
        document: every result.
        line: Python to paste: the fastest call in fp32 or bf16; None where the untouched model is as fast.
        notes: sentences for the reader, the int8 call among them.
    """

    document: Document
    line: str | None
    notes: list[str]


def run(name: str, options: TryOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Trial:
    """Try a model by its name, as `open_model` takes it. Ctrl-C ends the measuring early and keeps what was measured.

    Raises:
        InputError: nothing of the model is recognised, or the inputs do not fit it.
        CheckpointError: it cannot be opened.
        DataError: texts or images cannot be read.
        UnavailableError: a package is not installed, or a dtype unknown.
    """
    opened = open_model(name)
    batch = _batch(opened, options)
    # What is not recognised is reported before anything is timed; the copy shares the weights, and is thrown away.
    report = accelerate(_shared_copy(opened.model))
    document = _trial(options, progress, command, model=name, opened=opened, batch=batch)
    begins = (f"{len(report.replaced)} modules replaced", "unknown: ")
    notes = [*opened.notes, *batch.notes, *(line for line in str(report).splitlines() if line.startswith(begins))]
    return Trial(document, *advice(document, batch.words, notes))


@benchmark("try", title=TITLE, reference=UNTOUCHED)
def _trial(run: Run, model: str, opened: Opened, batch: Batch) -> Iterator[Case]:
    run.progress.begin(2)
    run.probe()
    quick = run.options.quick
    rounded = run.options.dtype in ((), ("auto",)) and int8.why_not() is None
    calls = _TEXTS if batch.unit == "texts" else _IMAGES
    calls = {call: options for call, options in calls.items() if rounded or options.get("dtype") != "int8"}
    for one in (batch, batch.first()):
        run.progress.stage(one.words)
        backends, reports = _backends(opened, one, calls, run.dtypes)

        def count(backend: Backend, result: object, reports: dict[str, list[str]] = reports) -> Extra:
            return {"replaced": reports[backend.name]} if backend.name in reports else {}

        yield Case(
            "try", one.words, backends, one.unit, one.items, judge=UNTOUCHED,
            reference=lambda dtype, one=one: _output(one, copy.deepcopy(opened.model).to(DTYPES[dtype])),
            count=count, rounds=2 if quick else 5, budget_s=0.0 if quick else 15.0,
        )  # fmt: skip
        row = next((row for row in run.document.rows if (row.backend, row.name) == (UNTOUCHED, one.words)), None)
        if row is not None and row.status == "failed":
            raise InputError(f"{opened.name} does not run on {one.words} as it is ({row.reason}); give another batch")


def _backends(
    opened: Opened, batch: Batch, calls: dict[str, dict[str, Any]], dtypes: Sequence[str]
) -> tuple[list[Backend], dict[str, list[str]]]:
    """Backends of every call in every dtype and of the untouched model; the reports of calls, filled in when built."""
    models: dict[str, nn.Module] = {"fp32": opened.model}
    reports: dict[str, list[str]] = {}

    def untouched(dtype: str) -> nn.Module:
        if dtype not in models:
            models[dtype] = copy.deepcopy(opened.model).to(DTYPES[dtype])
        return models[dtype]

    def accelerated(call: str, options: dict[str, Any], dtype: str) -> Call:
        changes_weights = options.get("freeze") or options.get("dtype") == "int8"
        fast = copy.deepcopy(untouched(dtype)) if changes_weights else _shared_copy(untouched(dtype))
        reports[call] = str(accelerate(fast, **options)).splitlines()
        return partial(_output, batch, fast)

    found = []
    for dtype in dtypes:
        for call, options in calls.items():
            build = partial(accelerated, call, options, dtype)
            if options.get("dtype") != "int8":
                found.append(Backend(call, dtype, build))
            elif dtype == dtypes[0]:
                found.append(Backend(call, "int8", build, band=INT8_BAND, optional=True))
    for dtype in dtypes:
        found.append(Backend(UNTOUCHED, dtype, lambda dtype=dtype: partial(_output, batch, untouched(dtype))))
    return found, reports


def advice(document: Document, words: str, notes: list[str]) -> tuple[str | None, list[str]]:
    """The line to paste and the sentences, by the times of the whole batch in every dtype."""

    def fastest(*, ours: bool, rounded: bool = False) -> Result | None:
        rows = (row for row in document.rows if row.measured and row.name == words and row.ours == ours)
        return max((row for row in rows if (row.dtype == "int8") == rounded), key=lambda r: r.rate or 0, default=None)

    untouched, exact, rounded = fastest(ours=False), fastest(ours=True), fastest(ours=True, rounded=True)
    if untouched is None:
        return None, [*notes, "the model was not measured; give a smaller batch"]
    line, best, notes = None, untouched.rate or 0.0, [*notes]
    if exact is not None and (exact.rate or 0) >= _WORTH * best:
        convert = "" if exact.dtype == "fp32" else "import torch; model.to(torch.bfloat16); "
        line = f"{convert}import xfm_fast; xfm_fast.{exact.backend}"
        notes.append(
            f"{(exact.rate or 0) / best:.2f}× the speed of the untouched model ({exact.dtype} against "
            f"{untouched.dtype}, the fastest dtype of each)"
        )
        best = exact.rate or 0.0
    else:
        notes.append("no gain here; leave the model as it is")
    if rounded is not None and rounded.parity is not None and (rounded.rate or 0) >= _WORTH * best:
        notes.append(
            f"int8 is {(rounded.rate or 0) / best:.2f}× as fast as that; outputs differ by up to "
            f"{rounded.parity.error:.1%} of the largest: xfm_fast.{rounded.backend}"
        )
    return line, notes


def _batch(opened: Opened, options: TryOptions) -> Batch:
    """The inputs of the options, or examples of what the model takes; for both towers of CLIP texts and images."""
    inputs, kind = options.inputs, f"{opened.name} ({type(opened.model).__name__})"
    if not (opened.takes_texts or opened.takes_images):
        raise InputError(
            f"{kind} takes neither input_ids nor pixel_values, so no batch can be made for it; call "
            "xfm_fast.accelerate(model, verify=batch) with one of yours"
        )
    images = inputs if inputs is not None and inputs.is_dir() else None
    texts = inputs if images is None else None
    if images is not None and not opened.takes_images:
        raise InputError(f"--inputs {inputs} is a folder of images, and {kind} takes none; give a file of texts")
    if texts is not None and not opened.takes_texts:
        raise InputError(f"--inputs {inputs} is no folder of images, and {kind} takes no texts; give one")
    if not opened.takes_texts:
        return image_batch(opened, images)
    lines = example_texts() if texts is None else read_texts(texts)
    batch = text_batch(opened, lines[:4] if options.quick else lines)
    if opened.takes_images:
        pixels = image_batch(opened, images)
        batch.arguments |= pixels.arguments
        batch.words += f" and {pixels.words}"
        batch.notes += pixels.notes
    return batch


def _shared_copy(model: nn.Module) -> nn.Module:
    """The same model in other modules, with the same parameters and buffers."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _output(batch: Batch, model: nn.Module) -> Tensor:
    """All floating-point outputs in one vector, without those of padding, which have no meaning."""
    output, mask = batch.run(model), batch.arguments.get("attention_mask")
    leaves = output.to_tuple() if hasattr(output, "to_tuple") else output
    parts = []
    for leaf in pytree.tree_leaves(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            part = leaf[mask.bool()] if mask is not None and leaf.shape[:2] == mask.shape else leaf
            # Each output is compared with its own largest value.
            largest = part.detach().abs().max().clamp(min=torch.finfo(part.dtype).tiny)
            parts.append((part / largest).flatten())
    if not parts:
        raise InputError(f"{type(model).__name__} returned no numbers that could be compared")
    return torch.cat(parts)
