"""`bench drop-in`: rows of models that are equal, differ, crash, or come from a package that is absent."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.cli.runner import invoke
from xfm_fast.benchmarks.backends import graph
from xfm_fast.benchmarks.options import DropInOptions
from xfm_fast.benchmarks.record import ACCELERATED, RERANKER, load
from xfm_fast.benchmarks.report.tables import gains, int8_gains
from xfm_fast.benchmarks.work import drop_in
from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import int8

MODELS = drop_in.MODELS
QUICK = DropInOptions(quick=True, dtype=("fp32",))


def layer_norms(layers: int) -> drop_in.Subject:
    model = nn.Sequential(
        *(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(layers))
    )
    x = torch.randn(3, 5, 16)
    return drop_in.Subject(model, lambda m: m(x.to(next(m.parameters()).dtype)), 3)


def crashing(layers: int) -> drop_in.Subject:
    raise RuntimeError("a foreign model")


def growing(layers: int) -> drop_in.Subject:
    """Gives another result on every call."""
    work, calls = layer_norms(layers), []

    def call(model: nn.Module) -> torch.Tensor:
        calls.append(1)
        return work.call(model) + len(calls)

    return drop_in.Subject(work.model, call, 3)


def case(key: str, make: Any, package: str = "torch") -> drop_in.PublicModel:
    return drop_in.PublicModel(
        key, f"the model {key}", "3 texts", make, unpad=False, package=package
    )


@pytest.fixture(autouse=True)
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    models = (
        case("good", layer_norms),
        case("step", lambda layers: replace(layer_norms(layers), trains=True)),
        case("absent", layer_norms, "no_such_package"),
        case("bad", crashing),
        case("different", growing),
        case("unknown", lambda layers: drop_in.Subject(nn.ReLU(), lambda m: m(torch.ones(2)), 1)),
    )
    monkeypatch.setattr(drop_in, "MODELS", models)
    # Exporting takes longer than all else here.
    monkeypatch.setattr(drop_in, "other_runtimes", lambda *_: [])


def test_every_row_has_its_status() -> None:
    document = drop_in.run(QUICK)
    rows = {row.work: row for row in document.rows if row.ours and row.dtype == "fp32"}
    assert {key: row.status for key, row in rows.items()} == {
        "good": "measured",
        "step": "measured",
        "absent": "absent",
        "bad": "failed",
        "different": "parity failed",
        "unknown": "failed",
    }
    good = rows["good"]
    untouched, against = document.reference_row(good), document.headline(good)
    assert untouched is not None
    assert against is not None
    assert (untouched.backend, untouched.status, against.dtype) == ("untouched", "measured", "fp32")
    assert against.ratio == pytest.approx((untouched.median_s or 0) / (good.median_s or 1))
    assert good.extra["replaced"]
    in_int8 = {row.work: row for row in document.rows if row.ours and row.dtype == "int8"}
    # A training step in int8 would be one in floats by another name.
    assert "step" not in in_int8
    assert in_int8["good"].status == ("measured" if int8.why_not() is None else "not offered")
    if int8.why_not() is None:
        assert in_int8["good"].parity is not None
        assert 1e-5 < (in_int8["good"].parity.error or 0) < 0.1
        assert 0.99 < (in_int8["good"].parity.cosine or 0) < 1
    for key, words in (
        ("absent", "pip install no_such_package"),
        ("bad", "a foreign model"),
        ("unknown", "ReLU"),
    ):
        assert words in str(rows[key].reason)
    assert not rows["different"].against
    assert not rows["different"].seconds
    assert not document.ok


def test_the_command_measures_what_it_names(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = ["bench", "drop-in", "--quick", "--dtype", "fp32", "--out", str(file)]
    assert invoke([*command, "--only", "good,bad"]).exit_code == 1
    document = load(file)
    assert list(dict.fromkeys(row.work for row in document.rows)) == ["good", "bad"]
    header, _, line, _, machine = gains(document).splitlines()
    assert header.startswith("| call | inputs | eager | xfm-fast |")
    assert line.startswith("| the model good | 3 texts | ")
    assert "2 threads" in machine or "1 threads" in machine
    assert len(int8_gains(document).splitlines()) == 4 + (int8.why_not() is None)
    with pytest.raises(InputError, match="'robert'"):
        drop_in.run(DropInOptions(only=("robert",)))


def test_a_reranker_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def reranked(layers: int) -> drop_in.Subject:
        subject = layer_norms(layers)
        return replace(subject, adapted=lambda dtype: subject.call(subject.model))

    monkeypatch.setattr(drop_in, "MODELS", [case("good", layer_norms), case("rerank", reranked)])
    document = drop_in.run(QUICK)
    names = {
        form: re.findall("the model (\\w+)", gains(document, form))
        for form in (ACCELERATED, RERANKER)
    }
    assert names == {ACCELERATED: ["good"], RERANKER: ["rerank"]}


def test_other_runtimes_compute_the_encoder(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    factors: list[float] = []

    def scaled(path: Path, factor: float) -> graph.Infer:
        infer = graph.onnx_runtime(path)

        def run(inputs: dict[str, Any]) -> list[Any]:
            factors.append(factor)
            return [factor * output for output in infer(inputs)]

        return run

    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    model, x = nn.Sequential(inner, nn.Tanh()), torch.randn(1, 6)
    exported = graph.ExportedCall(inner, lambda: model(x), tmp_path / "model.onnx")
    other = torch.randn(5, 6)
    for factor, equal in ((1.0, True), (1.1, False)):
        bound = exported.bind(model, lambda model: model[0], partial(scaled, factor=factor))
        assert torch.allclose(bound(other), model(other), atol=1e-6) == equal
    assert factors == [1.0, 1.1]


def test_models_are_exported_to_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Path] = []
    monkeypatch.setattr(drop_in, "MODELS", [case("one", layer_norms), case("two", layer_norms)])
    monkeypatch.setattr(
        drop_in, "other_runtimes", lambda subject, runtimes, file, backend: files.append(file) or []
    )
    drop_in.run(QUICK)
    assert len({*files}) == len(files) == 2


def test_nested_outputs_keep_their_structure(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Nested(nn.Linear):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            y = super().forward(x)
            return {"pair": (y, 2 * y), "sum": y.sum(1)}

    torch.manual_seed(0)
    model, x = Nested(3, 4), torch.randn(5, 3)
    exported = graph.ExportedCall(model, lambda: model(torch.randn(1, 3)), tmp_path / "model.onnx")
    bound = exported.bind(model, lambda model: model, graph.onnx_runtime)(x)
    torch.testing.assert_close(bound, model(x))


def test_quality_counts_texts_whose_nearest_text_stays() -> None:
    exact = torch.eye(4) + 0.1 * torch.tensor(
        [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    )
    rounded = exact.clone()
    rounded[3] = torch.tensor([0, 0.2, 0, 1.0])
    result = drop_in.quality(exact, rounded)
    assert result["nearest_kept"] == 0.75
    least = torch.cosine_similarity(exact[3], rounded[3], dim=0)
    assert result["cosine_least"] == pytest.approx(float(least))
    assert result["cosine_mean"] == pytest.approx((3 + float(least)) / 4)


@pytest.mark.slow
@pytest.mark.parametrize("public", MODELS, ids=lambda public: public.key)
def test_the_models_are_equal(public: drop_in.PublicModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(public.package)
    monkeypatch.setattr(drop_in, "MODELS", MODELS)
    row = drop_in.run(replace(QUICK, only=(public.key,))).rows[0]
    assert row.status == "measured"
