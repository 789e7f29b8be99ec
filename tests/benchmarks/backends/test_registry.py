"""Every backend gives the official results from the same weights, at all work that it takes part in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast.benchmarks.backends.registry import BACKENDS, MODEL_WORK, ModelBackend, Setup
from xfm_fast.benchmarks.measure import MODEL_ROUNDING
from xfm_fast.benchmarks.record import OFFICIAL, OFFICIAL_CODE
from xfm_fast.benchmarks.tasks import BUILDERS
from xfm_fast.benchmarks.timing import DTYPES, FP32_BAND, parity_band
from xfm_fast.benchmarks.work.requests import (
    Material,
    Workload,
    embed_image,
    embed_text,
    rerank,
    retrieval,
    retrieve,
)
from xfm_fast.loading import Source
from xfm_fast.testing import SharedWeights, bundled, make_tokenizer

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
CPU = torch.device("cpu")
SIZE = 32
NAMES = {backend.name: backend for backend in BACKENDS}
# Compiling and exporting take longer than all the rest together.
SLOW = ("torch-compile", "onnxruntime", "openvino", "aoti")
PAIRS = [
    pytest.param(name, work, marks=[pytest.mark.slow] if name.startswith(SLOW) else [])
    for name, backend in NAMES.items()
    for work in backend.works or (*MODEL_WORK, "retrieval")
    if name not in (OFFICIAL, OFFICIAL_CODE)
]


@pytest.fixture(scope="module")
def material() -> Material:
    collection = bundled()
    subjects = SharedWeights.open(Source(random="tiny"), BUILDERS)
    return Material(subjects, collection, make_tokenizer(subjects.config, None, collection))


@pytest.fixture(scope="module")
def workloads(material: Material) -> dict[str, Workload]:
    workloads = [
        embed_image(material, SIZE, 3),
        embed_text(material, 5),
        rerank(material, SIZE, 7, 3),
        retrieve(material, SIZE, 6, 3, 4),
        retrieval(material, SIZE, 4, 2, 3, batch=2),
    ]
    return {workload.work: workload for workload in workloads}


def _answer_of(
    backend: ModelBackend,
    workload: Workload,
    material: Material,
    scratch: Path,
    dtype: str = "fp32",
) -> Callable[..., Any]:
    engine, _ = backend.load(Setup(material.weights, workload.work, SIZE, dtype, CPU, scratch))
    answer = workload.prepare(engine, DTYPES[dtype])

    def run(numbers: list[int]) -> Any:
        with torch.inference_mode():
            return answer(numbers)

    return run


@pytest.mark.parametrize(("name", "work"), PAIRS)
def test_results_are_the_official_ones(
    name: str, work: str, material: Material, workloads: dict[str, Workload], tmp_path: Path
) -> None:
    backend, workload = NAMES[name], workloads[work]
    why = backend.why_absent(CPU)
    if why is not None:
        pytest.skip(why)
    expected_of = _answer_of(NAMES[OFFICIAL], workload, material, tmp_path)
    for dtype in backend.dtypes:
        if name.startswith(("openvino", "aoti")) and dtype == "bf16":
            continue  # only on processors that have it
        answer = _answer_of(backend, workload, material, tmp_path, dtype)
        official = _answer_of(NAMES[OFFICIAL], workload, material, tmp_path, dtype)
        for numbers in ([0],) if work == "retrieval" else ([1], [2, 0]):
            expected, band = expected_of(numbers), FP32_BAND
            if dtype == "bf16":
                error = workload.compare(numbers, official(numbers), expected).error
                band = parity_band(
                    torch.bfloat16, max(error, MODEL_ROUNDING * torch.finfo(torch.bfloat16).eps)
                )
            compared = workload.compare(numbers, answer(numbers), expected)
            assert compared.error <= (backend.band or band)
            # Near ties may make candidates differ in bf16.
            assert compared.note == "" or dtype == "bf16"
