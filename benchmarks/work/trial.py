"""The gain of `accelerate` for one's own model, here: opened, accelerated in each way, verified, timed in rounds."""

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

from ..material.models import Batch, Opened, example_texts, image_batch, open_model, read_texts, text_batch
from ..measure import Backend, Call, Case, Progress, Run, benchmark
from ..options import TryOptions
from ..record import UNTOUCHED, Document, Extra, Result
from ..timing import DTYPES
from .drop_in import INT8_BAND, TITLE

# A gain within what chance makes of two runs of one thing is none.
_WORTH = 1.03
# Calls of `accelerate` as source code, with their options.
_PLAIN: dict[str, dict[str, Any]] = {"accelerate(model)": {}}
_TEXTS: dict[str, dict[str, Any]] = {
    "accelerate(model, unpad=True)": {"unpad": True},
    "accelerate(model, unpad=True, freeze=True)": {"unpad": True, "freeze": True},
}
_INT8 = {
    "images": ('accelerate(model, dtype="int8")', {"dtype": "int8"}),
    "texts": ('accelerate(model, unpad=True, dtype="int8")', {"unpad": True, "dtype": "int8"}),
}


@dataclass
class Trial:
    """The result of trying a model.

    Attributes:
        document: every result.
        line: Python to paste: the fastest call in fp32 or bf16; None where the untouched model is as fast.
        told: sentences for the reader, the int8 call among them.
    """

    document: Document
    line: str | None
    told: list[str]


def run(name: str, options: TryOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Trial:
    """Try a model by its name, as `open_model` takes it. Ctrl-C ends the measuring early and keeps what was measured.

    Raises:
        InputError: nothing of the model is recognised, or what was given does not fit it.
        CheckpointError: it cannot be opened.
        DataError: texts or images cannot be read.
        UnavailableError: a package is not installed, or a dtype unknown.
    """
    opened = open_model(name)
    batch = _batch(opened, options)
    # What is not recognised is reported before anything is timed; the copy shares the weights, and is thrown away.
    report = accelerate(_shared_copy(opened.model))
    document = _trial(options, progress, command, model=name, opened=opened, batch=batch)
    del document.options["opened"], document.options["batch"]
    begins = (f"{len(report.replaced)} modules replaced", "not known: ")
    notes = [*opened.notes, *batch.notes, *(line for line in str(report).splitlines() if line.startswith(begins))]
    return Trial(document, *_advice(document, batch.words, notes))


@benchmark("try", title=TITLE, reference=UNTOUCHED)
def _trial(run: Run, model: str, opened: Opened, batch: Batch) -> Iterator[Case]:
    run.progress.begin(2)
    run.probe()
    ways, quick = dict(_PLAIN), run.options.quick
    if batch.unit == "texts":
        ways |= _TEXTS
    if run.options.dtype in ((), ("auto",)) and int8.why_not() is None:
        ways.update([_INT8[batch.unit if batch.unit == "texts" else "images"]])
    for one in (batch, batch.first()):
        run.progress.stage(one.words)
        reports: dict[str, list[str]] = {}

        def count(backend: Backend, result: object, reports: dict[str, list[str]] = reports) -> Extra:
            return {"replaced": reports[backend.name]} if backend.name in reports else {}

        yield Case(
            "try", one.words, _backends(opened, one, ways, run.dtypes, reports), one.unit, one.items, judge=UNTOUCHED,
            reference=lambda dtype, one=one: _output(one, copy.deepcopy(opened.model).to(DTYPES[dtype])),
            count=count, rounds=2 if quick else 5, budget_s=0.0 if quick else 15.0,
        )  # fmt: skip
        row = next((row for row in run.document.rows if (row.backend, row.name) == (UNTOUCHED, one.words)), None)
        if row is not None and row.status == "failed":
            raise InputError(f"{opened.name} does not run on {one.words} as it is ({row.reason}); give another batch")


def _backends(
    opened: Opened, batch: Batch, ways: dict[str, dict[str, Any]], dtypes: Sequence[str], reports: dict[str, list[str]]
) -> list[Backend]:
    own: dict[str, nn.Module] = {}

    def untouched(dtype: str) -> nn.Module:
        if dtype not in own:
            own[dtype] = opened.model if dtype == "fp32" else copy.deepcopy(opened.model).to(DTYPES[dtype])
        return own[dtype]

    def accelerated(call: str, options: dict[str, Any], dtype: str) -> Call:
        apart = options.get("freeze") or options.get("dtype") == "int8"
        fast = copy.deepcopy(untouched(dtype)) if apart else _shared_copy(untouched(dtype))
        reports[call] = str(accelerate(fast, **options)).splitlines()
        return partial(_output, batch, fast)

    found = []
    for dtype in dtypes:
        for call, options in ways.items():
            rounds = options.get("dtype") == "int8"
            if rounds and dtype != dtypes[0]:
                continue
            backend = Backend(
                call, "int8" if rounds else dtype, partial(accelerated, call, options, dtype),
                band=INT8_BAND if rounds else None, optional=rounds,
            )  # fmt: skip
            found.append(backend)
    return found + [
        Backend(UNTOUCHED, dtype, lambda dtype=dtype: partial(_output, batch, untouched(dtype))) for dtype in dtypes
    ]


def _advice(document: Document, words: str, notes: list[str]) -> tuple[str | None, list[str]]:
    """The line to paste and the sentences, by the times of the whole batch in every dtype."""
    rows = [row for row in document.rows if row.measured and row.name == words]
    untouched = max((row for row in rows if not row.ours), key=_rate, default=None)
    exact = max((row for row in rows if row.ours and row.dtype != "int8"), key=_rate, default=None)
    rounded = max((row for row in rows if row.ours and row.dtype == "int8"), key=_rate, default=None)
    if untouched is None:
        return None, [*notes, "the model was not measured; raise --threads or give a smaller batch"]
    line, best = None, _rate(untouched)
    if exact is not None and _rate(exact) >= _WORTH * best:
        convert = "" if exact.dtype == "fp32" else "import torch; model.to(torch.bfloat16); "
        line = f"{convert}import xfm_fast; xfm_fast.{exact.backend}"
        notes.append(
            f"{_rate(exact) / best:.2f}× the speed of the untouched model ({exact.dtype} against {untouched.dtype}, "
            "the fastest dtype of each)"
        )
        best = _rate(exact)
    else:
        notes.append("no gain here; leave the model as it is")
    if rounded is not None and rounded.parity is not None and _rate(rounded) >= _WORTH * best:
        notes.append(
            f"int8 is {_rate(rounded) / best:.2f}× as fast as that; outputs differ by up to "
            f"{rounded.parity.error:.1%} of the largest: xfm_fast.{rounded.backend}"
        )
    return line, notes


def _rate(row: Result) -> float:
    """Items per second."""
    return row.rate or 0.0


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
    batch = text_batch(opened, texts[:4] if options.quick else texts)
    if opened.takes_images:
        # Both towers of a model such as CLIP: as many texts as images, for a matrix of both.
        images = image_batch(opened, options.images)
        batch.arguments |= images.arguments
        batch.words += f" and {images.words}"
        batch.notes += images.notes
    return batch


def _shared_copy(model: nn.Module) -> nn.Module:
    """The same model in other modules, with the same parameters and buffers."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _output(batch: Batch, model: nn.Module) -> Tensor:
    """All floating-point outputs in one vector, without those of padding, which have no meaning."""
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
