"""Every contender gives the official results from the same weights, at all work that it takes part in."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws
from xfm_fast import flops
from xfm_fast.benchmarks.contenders import engine, registry
from xfm_fast.benchmarks.contenders.engine import Clock, NoStages, Stages
from xfm_fast.benchmarks.contenders.registry import ALL, TASK_WORK, Contender, Setup, choose
from xfm_fast.benchmarks.material import photographs
from xfm_fast.benchmarks.material.inputs import Material, Subjects, make_tokenizer
from xfm_fast.benchmarks.record import OFFICIAL, OFFICIAL_CODE, OURS
from xfm_fast.benchmarks.timing import DTYPES, FP32_BAND
from xfm_fast.benchmarks.work.model import kind_of, operation_shares
from xfm_fast.benchmarks.work.requests import EmbedImage, EmbedText, Rerank, Retrieval, Retrieve, Workload, padded
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.loading import Source
from xfm_fast.tasks.reranking import UNSCORED

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
CPU = torch.device("cpu")
SIZE = 32
NAMES = {contender.name: contender for contender in ALL}
# Compiling and exporting take longer than all the rest together.
SLOW = ("torch-compile", "onnxruntime", "openvino", "aoti")
PAIRS = [
    pytest.param(c.name, s, marks=[pytest.mark.slow] if c.name.startswith(SLOW) else [])
    for c in ALL
    for s in c.works
    if c.name not in (OFFICIAL, OFFICIAL_CODE) and s not in TASK_WORK
]


@pytest.fixture(scope="module")
def material() -> Material:
    collection = photographs.bundled()
    return Material(Subjects.open(Source(random="tiny")), collection, make_tokenizer("tiny", None, collection))


@pytest.fixture(scope="module")
def workloads(material: Material) -> dict[str, Workload]:
    made = [
        EmbedImage(material, SIZE, 3), EmbedText(material, 5), Rerank(material, SIZE, 7, 3),
        Retrieve(material, SIZE, 6, 3, 4), Retrieval(material, SIZE, 4, 2, 3, batch=2),
    ]  # fmt: skip
    return {workload.work: workload for workload in made}


def _answer(
    contender: Contender, workload: Workload, material: Material, scratch: Path, numbers: list[int],
    dtype: str = "fp32", clock: Clock | None = None,
) -> Any:  # fmt: skip
    built = contender.build(Setup(material.subjects, workload.work, SIZE, dtype, CPU, scratch))
    with torch.inference_mode():
        return workload.prepare(built.engine, DTYPES[dtype])(numbers, clock or NoStages())


@pytest.mark.parametrize(("name", "scenario"), PAIRS)
def test_results_are_the_official_ones(
    name: str, scenario: str, material: Material, workloads: dict[str, Workload], tmp_path: Path
) -> None:
    contender, workload = NAMES[name], workloads[scenario]
    why = contender.why_absent(CPU)
    if why is not None:
        pytest.skip(why)
    for dtype in contender.dtypes:
        if name.startswith(("openvino", "aoti")) and dtype == "bf16":
            continue  # only on processors that have it
        for numbers in ([1], [2, 0]):
            expected = _answer(NAMES[OFFICIAL], workload, material, tmp_path, numbers)
            found = _answer(contender, workload, material, tmp_path, numbers, dtype)
            compared = workload.compare(numbers, found, expected)
            if dtype == "fp32":
                assert compared.error <= (contender.band or FP32_BAND)
                assert compared.note == ""
            else:
                plain = draws(
                    lambda numbers=numbers, dtype=dtype: _answer(
                        NAMES[OFFICIAL], workload, material, tmp_path, numbers, dtype
                    )
                )
                truth, ours, *others = (_values(workload, numbers, a) for a in (expected, found, *plain))
                # Near ties may make candidates differ.
                common = (torch.stack([truth, ours, *others]) != torch.inf).all(0)
                assert common.any()
                ours, *others = (values[common].to(DTYPES[dtype]) for values in (ours, *others))
                assert_accurate(ours, others, truth[common], f"{scenario} in {dtype}")


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


@pytest.mark.parametrize("scenario", ["embed-image", "embed-text", "rerank", "retrieve"])
def test_a_difference_is_seen(
    scenario: str, material: Material, workloads: dict[str, Workload], tmp_path: Path
) -> None:
    workload = workloads[scenario]
    one = _answer(NAMES[OURS], workload, material, tmp_path, [0])
    other = _answer(NAMES[OURS], workload, material, tmp_path, [1])
    assert workload.compare([0], one, one).error == 0
    if one[0].shape == other[0].shape and scenario != "retrieve":
        assert workload.compare([0], one, other).error > 1e-3
    if scenario == "retrieve":
        wrong = one._replace(scores=one.scores * 1.01)
        assert workload.compare([0], wrong, one).error == pytest.approx(0.01, rel=1e-3)


def test_stages_share_a_run_and_are_not_counted_twice(
    material: Material, workloads: dict[str, Workload], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Stages(CPU)
    _answer(NAMES[OURS], workloads["retrieve"], material, tmp_path, [0], clock=clock)
    assert list(clock.seconds) == [
        "text encoder", "first self-attention", "image memory", "fusion and matching head", "candidates"
    ]  # fmt: skip
    nested, readings = Stages(CPU), iter([0.0, 1.0, 11.0, 12.0, 22.0, 23.0])
    monkeypatch.setattr(engine.time, "perf_counter", lambda: next(readings))
    with nested("outer"):
        for _ in range(2):
            with nested("inner"):
                pass
    assert nested.seconds == {"outer": 3.0, "inner": 20.0}


@pytest.mark.parametrize("scenario", ["embed-image", "embed-text"])
@pytest.mark.parametrize("name", [OURS, OFFICIAL])
def test_encoders_are_split_into_their_parts(
    name: str, scenario: str, material: Material, workloads: dict[str, Workload], tmp_path: Path
) -> None:
    clock, workload = Stages(CPU), workloads[scenario]
    with torch.inference_mode():
        engine = NAMES[name].build(Setup(material.subjects, scenario, SIZE, "fp32", CPU, tmp_path)).engine
        answer = workload.prepare(engine, torch.float32)
        before, timed, after = answer([0, 1], NoStages()), answer([0, 1], clock), answer([0, 1], NoStages())
    assert torch.equal(before, timed)
    assert torch.equal(before, after)
    expected = {
        "embed-image": ["patch embedding", "attention", "norms", "final norm and pooling"],
        "embed-text": ["self-attention", "MLP", "packing" if name == OURS else "embeddings"],
    }
    assert all(any(part in stage for stage in clock.seconds) for part in expected[scenario])
    assert len(clock.seconds) == (3 if (name, scenario) == (OFFICIAL, "embed-text") else 4)
    # Nothing stays wrapped.
    model = material.subjects.model(SIZE, torch.float32)
    assert not any({"forward", "self_attention", "feed_forward"} & vars(part).keys() for part in model.modules())


def test_requests_of_one_shape_count_once(workloads: dict[str, Workload]) -> None:
    assert workloads["embed-image"].distinct() == workloads["rerank"].distinct() == [0]
    text = workloads["embed-text"]
    assert len(text.distinct()) == len({text.lengths([number])[0] for number in range(text.requests)}) > 1


def test_operations_of_a_run_add_up(material: Material, workloads: dict[str, Workload], tmp_path: Path) -> None:
    found = operation_shares(lambda: _answer(NAMES[OFFICIAL], workloads["embed-text"], material, tmp_path, [0]), CPU)
    assert {"matrix products", "norms", "attention"} <= set(found)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    kinds = {
        "xfm_fast::linear_add_layer_norm": "matrix products", "aten::_softmax": "attention", "aten::bmm": "attention",
        "xfm_fast::varlen_attention": "attention", "aten::native_layer_norm": "norms", "aten::gelu": "GELU",
        "aten::copy_": "copies and lookups", "aten::add": "everything else",
    }  # fmt: skip
    assert {name: kind_of(name) for name in kinds} == kinds


def test_operations_of_other_threads_count() -> None:
    """xfm-fast computes a batch in shares, each in a thread of its own."""
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
    assert padded([3, 5], "ours", 40) == [3, 5]
    pairs, search = workloads["rerank"], workloads["retrieve"]
    assert pairs.flops([0, 1], "official", None) == flops.official_fusion(config, 14, 40).total
    answer = _answer(NAMES[OURS], search, material, tmp_path, [0])
    whole, kept = (search.flops([0], schedule, answer) for schedule in ("ours", "kept memories"))
    assert whole is not None
    assert kept is not None
    assert whole - kept == flops.image_memory(config, 3).total


def test_a_whole_retrieval_scores_a_pair_once(
    material: Material, workloads: dict[str, Workload], tmp_path: Path
) -> None:
    work = workloads["retrieval"]
    answers = [_answer(NAMES[name], work, material, tmp_path, [0]) for name in (OURS, OFFICIAL)]
    assert [tuple(matrix.shape) for matrix in answers[0]] == [(4, 8), (8, 4)]
    ours, official = (work.flops([0], schedule, answers[0]) for schedule in ("ours", "official"))
    assert ours is not None
    assert official is not None
    assert ours == work.flops([0], "ours", answers[1]) < official
    assert work.recall(answers[0]) == work.recall(answers[1])
    assert (
        work.lengths([0])
        == material.encoded(
            [caption for photo in range(4) for caption in material.collection.captions_of(photo)[:2]]
        ).lengths
    )


def test_synthetic_lengths(material: Material) -> None:
    assert set(material.texts(9, "fixed-16").lengths) == {16}
    uniform = material.texts(14, "uniform-16").lengths
    assert (min(uniform), max(uniform), sum(uniform) / 14) == (4, 28, 16)
    assert sorted(set(material.texts(4, "bimodal-16").lengths)) == [4, 28]
    mixed = material.texts(32, "mixed-12").lengths
    assert (min(mixed), max(mixed), round(sum(mixed) / 32)) == (3, 40, 12)
    assert set(material.texts(5, "mixed-40").lengths) == {40}
    for wrong, message in (
        ("zipf-3", "choose captions"), ("fixed", "choose captions"), ("fixed-65", "takes 64"),
        ("mixed-3", "have no such mean; ask for 4 to 40"), ("mixed-41", "have no such mean"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            material.texts(2, wrong)


def test_who_takes_part() -> None:
    present, absent = choose((), "embed-image", CPU, quick=True)
    names = [contender.name for contender in present]
    assert names[:2] == [OURS, OFFICIAL]
    assert "torch-compile" not in names
    assert "quick" in absent["torch-compile"]
    assert "GPU" in absent["tensorrt-rtx"] or "not installed" in absent["tensorrt-rtx"]
    assert absent["flash-attn"] == "has no embed-image"
    assert "--official" in absent[OFFICIAL_CODE]
    present, absent = choose(("timm",), "embed-image", CPU, quick=True)
    timm = "timm" in [contender.name for contender in present]
    assert timm == (importlib.util.find_spec("timm") is not None)
    assert absent["torch-eager"] == "was not asked for"
    _, absent = choose((), "embed-text", CPU, quick=False)
    assert "--baselines" in absent["onnxruntime-packed"] or "not installed" in absent["onnxruntime-packed"]
    with pytest.raises(UnavailableError, match="choose from xfm-fast"):
        choose(("tensorflow",), "rerank", CPU, quick=True)


def test_torch_tensorrt_is_told_from_its_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are the module `torch_tensorrt`; the distribution that is not there is named, and so is the GPU."""
    installed = {"torch-tensorrt-rtx"}

    def version(name: str) -> str:
        if name not in installed:
            raise registry.PackageNotFoundError
        return "2.14.0"

    monkeypatch.setattr(registry, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert NAMES["torch-tensorrt"].why_absent(CPU) == "torch-tensorrt is not installed"
    assert NAMES["torch-tensorrt-rtx"].why_absent(CPU) == "needs an NVIDIA GPU, and this run is on cpu"
    assert NAMES["torch-tensorrt-rtx"].why_absent(torch.device("cuda")) is None
    assert (NAMES["torch-tensorrt"].version, NAMES["torch-tensorrt-rtx"].version) == (None, "2.14.0")
