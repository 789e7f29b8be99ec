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
from xfm_fast.benchmarks.files import load
from xfm_fast.benchmarks.options import DropInOptions
from xfm_fast.benchmarks.report.table import gains, int8_gains
from xfm_fast.benchmarks.work import drop_in
from xfm_fast.benchmarks.work.public_models import MODELS, PublicModel, Subject
from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import int8


def encoder(layers: int) -> Subject:
    model = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(layers)))
    x = torch.randn(3, 5, 16)
    return Subject(model, lambda m: m(x.to(next(m.parameters()).dtype)), 3)


def crashing(layers: int) -> Subject:
    raise RuntimeError("somebody else's model")


def growing(layers: int) -> Subject:
    """Gives another result on every call."""
    work, calls = encoder(layers), []

    def call(model: nn.Module) -> torch.Tensor:
        calls.append(1)
        return work.call(model) + len(calls)

    return replace(work, call=call)


def interrupted(layers: int) -> Subject:
    raise KeyboardInterrupt


def case(key: str, make: Any, package: str = "torch") -> PublicModel:
    return PublicModel(key, f"the model {key}", "texts", make, unpad=False, package=package)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        case("good", encoder), case("absent", encoder, "no_such_package"), case("bad", crashing),
        case("different", growing), case("unknown", lambda layers: Subject(nn.ReLU(), lambda m: m(torch.ones(2)), 1)),
        case("step", lambda layers: replace(encoder(layers), trains=True)), case("late", interrupted),
    )  # fmt: skip
    monkeypatch.setattr(drop_in, "MODELS", made)


@pytest.mark.usefixtures("cases")
def test_every_row_shows_what_became_of_it() -> None:
    document = drop_in.run(DropInOptions(quick=True, dtype=("fp32",), threads=torch.get_num_threads()))
    rows = {row.work: row for row in document.rows if row.ours and row.dtype == "fp32"}
    assert {key: row.status for key, row in rows.items()} == {
        "good": "measured", "absent": "absent", "bad": "failed", "different": "parity failed", "unknown": "failed",
        "step": "measured",
    }  # fmt: skip
    assert document.interrupted
    good = rows["good"]
    assert good.parity is not None
    assert (good.parity.error or 0) <= 1e-5
    untouched, against = document.reference_row(good), document.headline(good)
    assert untouched is not None
    assert against is not None
    assert (untouched.contender, untouched.status, against.dtype) == ("untouched", "measured", "fp32")
    assert against.ratio == pytest.approx((untouched.median_s or 0) / (good.median_s or 1))
    assert "replaced" in good.replaced[-1]
    # A training step in int8 would be one in floats.
    in_int8 = {row.work: row for row in document.rows if row.ours and row.dtype == "int8"}
    if int8.why_not() is None:
        assert "step" not in in_int8
        assert in_int8["good"].parity is not None
        assert 1e-5 < (in_int8["good"].parity.error or 0) < 0.1
        assert 0.99 < (in_int8["good"].parity.cosine or 0) < 1
    else:
        assert in_int8["good"].status == "not offered"
    assert "no_such_package" in str(rows["absent"].reason)
    assert "somebody else's model" in str(rows["bad"].reason)
    assert not rows["different"].against
    assert not rows["different"].seconds
    assert "ReLU" in str(rows["unknown"].reason)
    assert not document.ok


def test_an_unknown_case() -> None:
    with pytest.raises(InputError, match="'robert'"):
        drop_in.run(DropInOptions(only=("robert",)))


@pytest.mark.usefixtures("cases")
def test_the_command_prints_and_saves(tmp_path: Path) -> None:
    file, threads = tmp_path / "rows.json", torch.get_num_threads()
    arguments = ["bench", "drop-in", "--quick", "--only", "good,bad", "--dtype", "fp32", "--json", str(file)]
    result = invoke([*arguments, "--threads", str(threads)])
    assert result.exit_code == 1
    assert "the model good" in result.stdout
    assert "failed: RuntimeError" in result.stdout
    saved = json.loads(file.read_text())
    assert saved["benchmark"] == "drop-in"
    assert list(dict.fromkeys(row["work"] for row in saved["rows"])) == ["good", "bad"]
    shown = invoke(["bench", "report", str(file)])
    assert "the model good" in shown.stdout
    assert "failed: RuntimeError" in shown.stdout
    written = invoke(["bench", "report", str(file), "--markdown"]).stdout.splitlines()
    kinds = ["fp32"] if int8.why_not() else ["fp32", "int8"]
    assert len(written) == 2 + len(kinds)
    for line, kind in zip(written[2:], kinds, strict=True):
        assert line.startswith(f"| the model good, texts/s | {kind} | ")
    gained = invoke(["bench", "report", str(file), "--gains"]).stdout.splitlines()
    assert gained[0] == "| model | fp32 |"
    assert re.fullmatch(r"\| the model good \| [\d.]+× \|", gained[2])
    assert gained[3] == "| the model bad |  |"
    document = load(file)
    cpu, date = document.machine["cpu"], document.date[:10]
    assert f"{cpu}, {date}".replace("(R)", "").split()[0] in gains(document, document).splitlines()[0]
    assert len(int8_gains(document).splitlines()) == 1 + len(kinds)
    compared = invoke(["bench", "compare", str(file), str(file)])
    assert compared.exit_code == 0, compared.output
    assert "untouched" in compared.stdout
    page = tmp_path / "page.html"
    assert invoke(["bench", "report", str(file), "--html", str(page)]).exit_code == 0
    text = page.read_text()
    for said in ("the model good", "failed: RuntimeError", "without an interval", "What was replaced"):
        assert said in text
    assert '<svg role="img" aria-label="the model good' in text
    assert "the model bad, " not in text


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.key)
def test_the_models_are_equal(model: PublicModel) -> None:
    pytest.importorskip(model.package)
    options = DropInOptions(only=(model.key,), quick=True, dtype=("fp32",), threads=torch.get_num_threads())
    assert drop_in.run(options).rows[0].status == "measured"


def test_real_sizes() -> None:
    """Every model is there once, and MiniLM has the width of the real one."""
    keys = [model.key for model in MODELS]
    assert len(keys) == len(set(keys)) == 23
    pytest.importorskip("transformers")
    subject = next(model for model in MODELS if model.key == "minilm").make(1)
    assert sum(p.numel() for p in subject.model.parameters() if p.ndim == 2) == 13_834_752
    with torch.no_grad():
        assert subject.call(subject.model.eval()).shape[1] == 384
