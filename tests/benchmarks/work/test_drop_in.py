"""`bench drop-in`: rows of models that are equal, differ, crash, or come from a package that is absent."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.cli.runner import invoke
from xfm_fast.benchmarks.options import DropInOptions
from xfm_fast.benchmarks.record import load
from xfm_fast.benchmarks.report.tables import gains, int8_gains
from xfm_fast.benchmarks.work import drop_in, public_models
from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import int8

QUICK = DropInOptions(quick=True, dtype=("fp32",))


def layer_norms(layers: int) -> public_models.Subject:
    model = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(layers)))
    x = torch.randn(3, 5, 16)
    return public_models.Subject(model, lambda m: m(x.to(next(m.parameters()).dtype)), 3)


def crashing(layers: int) -> public_models.Subject:
    raise RuntimeError("a foreign model")


def growing(layers: int) -> public_models.Subject:
    """Gives another result on every call."""
    work, calls = layer_norms(layers), []

    def call(model: nn.Module) -> torch.Tensor:
        calls.append(1)
        return work.call(model) + len(calls)

    return public_models.Subject(work.model, call, 3)


def case(key: str, make: Any, package: str = "torch") -> public_models.PublicModel:
    return public_models.PublicModel(key, f"the model {key}", "texts", make, unpad=False, package=package)


@pytest.fixture(autouse=True)
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        case("good", layer_norms),
        case("step", lambda layers: replace(layer_norms(layers), trains=True)),
        case("absent", layer_norms, "no_such_package"),
        case("bad", crashing),
        case("different", growing),
        case("unknown", lambda layers: public_models.Subject(nn.ReLU(), lambda m: m(torch.ones(2)), 1)),
    )
    monkeypatch.setattr(drop_in, "MODELS", made)


def test_every_row_has_its_status() -> None:
    document = drop_in.run(QUICK)
    rows = {row.work: row for row in document.rows if row.ours and row.dtype == "fp32"}
    assert {key: row.status for key, row in rows.items()} == {
        "good": "measured", "step": "measured", "absent": "absent", "bad": "failed", "different": "parity failed",
        "unknown": "failed",
    }  # fmt: skip
    good = rows["good"]
    untouched, against = document.reference_row(good), document.headline(good)
    assert untouched is not None
    assert against is not None
    assert (untouched.backend, untouched.status, against.dtype) == ("untouched", "measured", "fp32")
    assert against.ratio == pytest.approx((untouched.median_s or 0) / (good.median_s or 1))
    report = good.extra["replaced"]
    assert isinstance(report, list)
    assert "replaced" in report[-1]
    in_int8 = {row.work: row for row in document.rows if row.ours and row.dtype == "int8"}
    # A training step in int8 would be one in floats by another name.
    assert "step" not in in_int8
    assert in_int8["good"].status == ("measured" if int8.why_not() is None else "not offered")
    if int8.why_not() is None:
        assert in_int8["good"].parity is not None
        assert 1e-5 < (in_int8["good"].parity.error or 0) < 0.1
        assert 0.99 < (in_int8["good"].parity.cosine or 0) < 1
    for key, words in (("absent", "pip install no_such_package"), ("bad", "a foreign model"), ("unknown", "ReLU")):
        assert words in str(rows[key].reason)
    assert not rows["different"].against
    assert not rows["different"].seconds
    assert not document.ok


def test_an_interruption_keeps_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(layers: int) -> public_models.Subject:
        raise KeyboardInterrupt

    monkeypatch.setattr(drop_in, "MODELS", (case("good", layer_norms), case("late", interrupted)))
    document = drop_in.run(QUICK)
    assert document.interrupted
    assert {row.work for row in document.rows} == {"good"}
    with pytest.raises(InputError, match="'robert'"):
        drop_in.run(DropInOptions(only=("robert",)))


def test_the_command_prints_and_saves(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["bench", "drop-in", "--quick", "--only", "good,bad", "--dtype", "fp32", "--out", str(file)]
    result = invoke(arguments)
    assert result.exit_code == 1
    assert "failed: RuntimeError" in result.stdout
    saved = json.loads(file.read_text())
    assert saved["benchmark"] == "drop-in"
    assert list(dict.fromkeys(row["work"] for row in saved["rows"])) == ["good", "bad"]
    written = invoke(["bench", "report", str(file), "--markdown"]).stdout.splitlines()
    kinds = ["fp32"] if int8.why_not() else ["fp32", "int8"]
    assert [line.split(" | ")[:2] for line in written[2:]] == [["| the model good, texts/s", kind] for kind in kinds]
    document = load(file)
    gained = gains(document).splitlines()
    assert re.fullmatch(r"\| the model good \| [\d.]+× \|", gained[2])
    assert gained[3] == "| the model bad |  |"
    assert document.date[:10] in gains(document, document).splitlines()[0]
    assert len(int8_gains(document).splitlines()) == 1 + len(kinds)
    compared = invoke(["bench", "compare", str(file), str(file)])
    assert compared.exit_code == 0, compared.output
    page = tmp_path / "page.html"
    assert invoke(["bench", "report", str(file), "--html", str(page)]).exit_code == 0
    for words in ("failed: RuntimeError", "without an interval", "What was replaced", 'aria-label="the model good'):
        assert words in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("made", public_models.MODELS, ids=lambda made: made.key)
def test_the_models_are_equal(made: public_models.PublicModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(made.package)
    monkeypatch.setattr(drop_in, "MODELS", public_models.MODELS)
    row = drop_in.run(replace(QUICK, only=(made.key,))).rows[0]
    assert row.status == "measured"


def test_real_sizes_and_names() -> None:
    """Each of the models is there once, and MiniLM has the width of the real one."""
    keys = [model.key for model in public_models.MODELS]
    assert len(keys) == len(set(keys))
    pytest.importorskip("transformers")
    made = next(model for model in public_models.MODELS if model.key == "minilm").make(1)
    assert sum(p.numel() for p in made.model.parameters() if p.ndim == 2) == 13_834_752
    with torch.no_grad():
        assert made.call(made.model.eval()).shape[1] == 384
