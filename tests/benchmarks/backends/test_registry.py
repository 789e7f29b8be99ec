"""Every backend gives the official results from the same weights, at all work that it takes part in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws
from xfm_fast import flops
from xfm_fast.benchmarks.backends.engine import Clock, NoStages, Stages
from xfm_fast.benchmarks.backends.registry import BACKENDS, MODEL_WORK, ModelBackend, Setup, choose
from xfm_fast.benchmarks.inputs import Material, Subjects, bundled, make_tokenizer
from xfm_fast.benchmarks.record import OFFICIAL, OFFICIAL_CODE, OURS
from xfm_fast.benchmarks.tasks import BUILDERS
from xfm_fast.benchmarks.timing import DTYPES, FP32_BAND
from xfm_fast.benchmarks.work.model import operation_shares
from xfm_fast.benchmarks.work.requests import EmbedImage, EmbedText, Rerank, Retrieval, Retrieve, Workload, padded
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.loading import Source
from xfm_fast.tasks.reranking import UNSCORED

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
    subjects = Subjects.open(Source(random="tiny"), BUILDERS)
    return Material(subjects, collection, make_tokenizer(subjects.config, None, collection))


@pytest.fixture(scope="module")
def workloads(material: Material) -> dict[str, Workload]:
    made = [
        EmbedImage(material, SIZE, 3), EmbedText(material, 5), Rerank(material, SIZE, 7, 3),
        Retrieve(material, SIZE, 6, 3, 4), Retrieval(material, SIZE, 4, 2, 3, batch=2),
    ]  # fmt: skip
    return {workload.work: workload for workload in made}


def _answer_of(
    backend: ModelBackend, workload: Workload, material: Material, scratch: Path, dtype: str = "fp32"
) -> Callable[..., Any]:
    engine, _ = backend.load(Setup(material.subjects, workload.work, SIZE, dtype, CPU, scratch))
    answer = workload.prepare(engine, DTYPES[dtype])

    def run(numbers: list[int], clock: Clock | None = None) -> Any:
        with torch.inference_mode():
            return answer(numbers, clock or NoStages())

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
        for numbers in ([1], [2, 0]):
            expected, found = expected_of(numbers), answer(numbers)
            if dtype == "fp32":
                compared = workload.compare(numbers, found, expected)
                assert compared.error <= (backend.band or FP32_BAND)
                assert compared.note == ""
                continue
            official = _answer_of(NAMES[OFFICIAL], workload, material, tmp_path, dtype)
            plain = draws(lambda official=official, numbers=numbers: official(numbers))
            truth, ours, *others = (_values(workload, numbers, a) for a in (expected, found, *plain))
            # Near ties may make candidates differ.
            common = (torch.stack([truth, ours, *others]) != torch.inf).all(0)
            assert common.any()
            ours, *others = (values[common].to(DTYPES[dtype]) for values in (ours, *others))
            assert_accurate(ours, others, truth[common], f"{work} in {dtype}")


def _values(workload: Workload, numbers: list[int], answer: Any) -> Tensor:
    """The numbers of an answer in an order that all answers to these requests share, infinity where it has no score."""
    if isinstance(workload, EmbedText):
        return answer[workload._given.mask[torch.tensor(numbers)].bool()].double()
    if isinstance(workload, Retrieve):
        scores = torch.full((len(answer.scores), workload._index), torch.inf, dtype=torch.float64)
        return scores.scatter(1, answer.indices, answer.scores.double())
    if isinstance(workload, Retrieval):
        return torch.cat([matrix.double().masked_fill(matrix == UNSCORED, torch.inf).flatten() for matrix in answer])
    return answer.double()


@pytest.mark.parametrize("work", MODEL_WORK)
def test_a_difference_is_seen(work: str, material: Material, workloads: dict[str, Workload], tmp_path: Path) -> None:
    workload = workloads[work]
    answer = _answer_of(NAMES[OURS], workload, material, tmp_path)
    one, other = answer([0]), answer([1])
    assert workload.compare([0], one, one).error == 0
    if work == "retrieve":
        assert workload.compare([0], one._replace(scores=one.scores * 1.01), one).error == pytest.approx(0.01, rel=1e-3)
    elif one[0].shape == other[0].shape:
        assert workload.compare([0], one, other).error > 1e-3


def test_stages_share_a_run_and_are_not_counted_twice(
    material: Material, workloads: dict[str, Workload], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Stages(CPU)
    _answer_of(NAMES[OURS], workloads["retrieve"], material, tmp_path)([0], clock)
    assert list(clock.seconds) == [
        "text encoder", "first self-attention", "image memory", "fusion and matching head", "candidates"
    ]  # fmt: skip
    nested, readings = Stages(CPU), iter([0.0, 1.0, 11.0, 12.0, 22.0, 23.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(readings))
    with nested("outer"):
        for _ in range(2):
            with nested("inner"):
                pass
    monkeypatch.undo()
    assert nested.seconds == {"outer": 3.0, "inner": 20.0}


@pytest.mark.parametrize("name", [OURS, OFFICIAL])
def test_an_encoder_is_split_into_its_parts(
    name: str, material: Material, workloads: dict[str, Workload], tmp_path: Path
) -> None:
    clock, answer = Stages(CPU), _answer_of(NAMES[name], workloads["embed-image"], material, tmp_path)
    torch.testing.assert_close(answer([0, 1], clock), answer([0, 1]))
    stages = {**clock.seconds}
    assert len(stages) == 4
    assert {"patch embedding", "final norm and pooling"} <= stages.keys()
    # Nothing stays wrapped.
    answer([0, 1])
    assert clock.seconds == stages


def test_operations_of_all_threads_count(material: Material, workloads: dict[str, Workload], tmp_path: Path) -> None:
    answer = _answer_of(NAMES[OFFICIAL], workloads["embed-text"], material, tmp_path)
    found = operation_shares(lambda: answer([0]), CPU)
    assert {"matrix products", "norms", "attention"} <= set(found)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    square = torch.ones(256, 256)
    with ThreadPoolExecutor(1) as pool:
        found = operation_shares(lambda: pool.submit(torch.mm, square, square).result(), CPU)
    assert next(iter(found)) == "matrix products"


def test_flops_are_those_of_the_schedule(material: Material, workloads: dict[str, Workload], tmp_path: Path) -> None:
    config, text = material.config(SIZE), EmbedText(material, 3, "uniform-16")
    lengths = text.lengths([0, 1, 2])
    assert len(set(lengths)) > 1
    assert text.flops([0, 1, 2], "ours", None) == flops.text_encoder(config, lengths).total
    assert text.flops([0, 1, 2], "padded", None) == flops.text_encoder(config, [max(lengths)] * 3).total
    assert text.flops([0, 1, 2], "official", None) == flops.text_encoder(config, [40] * 3).total
    assert text.flops([0], "own", None) is None
    assert text.tokens([0, 1, 2], "padded") == (sum(lengths), 3 * max(lengths))
    assert text.tokens([0, 1, 2], "own") is None
    assert len(text.distinct()) == len(set(lengths))
    assert padded([3, 5], "ours", 40) == [3, 5]
    pairs, search = workloads["rerank"], workloads["retrieve"]
    assert pairs.flops([0, 1], "official", None) == flops.official_fusion(config, 14, 40).total
    answer = _answer_of(NAMES[OURS], search, material, tmp_path)([0])
    whole, kept = (search.flops([0], schedule, answer) for schedule in ("ours", "kept memories"))
    assert whole is not None
    assert kept is not None
    assert whole - kept == flops.image_memory(config, 3).total


def test_a_whole_retrieval_scores_a_pair_once(
    material: Material, workloads: dict[str, Workload], tmp_path: Path
) -> None:
    work = workloads["retrieval"]
    ours, official = (_answer_of(NAMES[name], work, material, tmp_path)([0]) for name in (OURS, OFFICIAL))
    assert [tuple(matrix.shape) for matrix in ours] == [(4, 8), (8, 4)]
    needed, spent = (work.flops([0], schedule, ours) for schedule in ("ours", "official"))
    assert needed == work.flops([0], "ours", official) < (spent or 0)
    assert work.recall(ours) == work.recall(official)


def test_synthetic_lengths(material: Material) -> None:
    assert set(material.texts(9, "fixed-16").lengths) == {16}
    uniform = material.texts(14, "uniform-16").lengths
    assert (min(uniform), max(uniform), sum(uniform) / 14) == (4, 28, 16)
    assert sorted(set(material.texts(4, "bimodal-16").lengths)) == [4, 28]
    mixed = material.texts(32, "mixed-12").lengths
    assert (min(mixed), max(mixed), round(sum(mixed) / 32)) == (3, 40, 12)
    for wrong in ("zipf-3", "fixed", "fixed-65", "mixed-3", "mixed-41"):
        with pytest.raises(InputError, match=wrong):
            material.texts(2, wrong)


def test_who_takes_part(tmp_path: Path) -> None:
    present, absent = choose((), "embed-image", CPU, quick=True)
    names = [backend.name for backend in present]
    assert names[:2] == [OURS, OFFICIAL]
    assert "quick" in absent["torch-compile"]
    assert "GPU" in absent["tensorrt-rtx"] or "not installed" in absent["tensorrt-rtx"]
    assert absent["flash-attn"] == "has no embed-image"
    assert "--official" in absent[OFFICIAL_CODE]
    present, absent = choose(("timm",), "embed-image", CPU, quick=True)
    timm = "timm" in [backend.name for backend in present]
    assert timm == (importlib.util.find_spec("timm") is not None)
    assert absent["torch-eager"] == "was not asked for"
    _, absent = choose((), "embed-text", CPU, quick=False)
    assert "--baselines" in absent["onnxruntime-packed"] or "not installed" in absent["onnxruntime-packed"]
    with pytest.raises(UnavailableError, match="tensorflow"):
        choose(("tensorflow",), "rerank", CPU, quick=True)
    with pytest.raises(UnavailableError, match=str(tmp_path)):
        choose((), "rerank", CPU, quick=True, official=tmp_path)
