"""The gain of `accelerate`: models of transformers and timm as they come, against the same models accelerated."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import int8
from xfm_fast.replace import accelerate
from xfm_fast.replace.verification import LEAST_COSINE

from ..measure import Backend, Call, Case, Run, benchmark
from ..record import OURS, UNTOUCHED, Extra
from ..timing import DTYPES, one_line
from .public_models import MODELS, PublicModel, Subject

TITLE = "accelerate(model), against the model untouched"
# Vectors with the least cosine allowed of int8 GEMMs are so far apart, as a share of their length.
INT8_BAND = math.sqrt(2 - 2 * LEAST_COSINE)


@benchmark("drop-in", title=TITLE, reference=UNTOUCHED)
def run(run: Run) -> Iterator[Case]:
    """One case per model; a model that cannot be made is a failed row."""
    known, only = [model.key for model in MODELS], run.options.only
    if unknown := [key for key in only if key not in known]:
        raise InputError(f"case {', '.join(unknown)!r} is unknown; choose from {', '.join(known)}")
    chosen = [model for model in MODELS if not only or model.key in only]
    run.progress.begin(len(chosen))
    run.probe()
    for model in chosen:
        run.progress.stage(model.name)
        empty = Case(model.key, model.name, [], model.unit)
        status, reason, subject = "absent", f"{model.package} is not installed; pip install {model.package}", None
        if find_spec(model.package) is not None:
            torch.manual_seed(run.options.seed)
            try:
                subject = model.make(2 if run.options.quick else 12)
            except Exception as error:  # of another library: the rest is measured
                status, reason = "failed", one_line(error)
        if subject is None:
            lacking: Any = (status, reason)
            run.add([empty.result(Backend(OURS, dtype, dict, "accelerated", lacking=lacking)) for dtype in run.dtypes])
        else:
            yield _case(model, subject, run)


def _case(model: PublicModel, subject: Subject, run: Run) -> Case:
    module, reports = subject.model.eval(), dict[str, list[str]]()

    def untouched(dtype: str) -> Call:
        own = module if dtype == "fp32" else copy.deepcopy(module).to(DTYPES[dtype])
        return partial(subject.call, own)

    def accelerated(dtype: str) -> Call:
        if subject.adapted is not None:
            return partial(subject.adapted, DTYPES[dtype])
        fast = copy.deepcopy(module)
        wanted: Any = {"fp32": None, "int8": "int8"}.get(dtype, DTYPES.get(dtype))
        reports[dtype] = str(accelerate(fast, dtype=wanted, unpad=model.unpad)).splitlines()
        return partial(subject.call, fast)

    def count(backend: Backend, result: object) -> Extra:
        report = reports.get(backend.dtype) if backend.name == OURS else None
        return {"replaced": report} if report else {}

    backends = [Backend(OURS, dtype, partial(accelerated, dtype), "accelerated") for dtype in run.dtypes]
    missing = dict(run.absent)
    if subject.adapted is None and not subject.trains:
        if why := int8.why_not():
            missing["int8"] = why
        else:
            backends.append(Backend(OURS, "int8", partial(accelerated, "int8"), "accelerated", band=INT8_BAND))
    backends += [
        Backend(OURS, dtype, dict, "accelerated", lacking=("not offered", why)) for dtype, why in missing.items()
    ]
    backends += [Backend(UNTOUCHED, dtype, partial(untouched, dtype)) for dtype in dict.fromkeys(["fp32", *run.dtypes])]
    quick = run.options.quick
    return Case(
        model.key, model.name, backends, model.unit, subject.items, judge=UNTOUCHED,
        reference=lambda dtype: untouched(dtype)(), count=count, rounds=2 if quick else 5,
        budget_s=0.0 if quick else 20.0,
    )  # fmt: skip
