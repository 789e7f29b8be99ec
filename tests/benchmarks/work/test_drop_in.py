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
from xfm_fast.benchmarks.work import drop_in, public_models
from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import int8


def layer_norms(layers: int) -> public_models.Subject:
    model = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(layers)))
    x = torch.randn(3, 5, 16)
    return public_models.Subject(model, lambda m: m(x.to(next(m.parameters()).dtype)), 3)


def crashing(layers: int) -> public_models.Subject:
    raise RuntimeError("somebody else's model")


def growing(layers: int) -> public_models.Subject:
    """Gives another result on every call."""
    work, calls = layer_norms(layers), []

    def call(model: nn.Module) -> torch.Tensor:
        calls.append(1)
        return work.call(model) + len(calls)

    return public_models.Subject(work.model, call, 3)


def case(key: str, make: Any, package: str = "torch") -> public_models.PublicModel:
    return public_models.PublicModel(key, f"the model {key}", package, "texts", {}, make)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        case("good", layer_norms),
        case("absent", layer_norms, "no_such_package"),
        case("bad", crashing),
        case("different", growing),
        case("unknown", lambda layers: public_models.Subject(nn.ReLU(), lambda m: m(torch.ones(2)), 1)),
    )
    monkeypatch.setattr(drop_in, "MODELS", made)


@pytest.mark.usefixtures("cases")
def test_every_row_says_what_became_of_it() -> None:
    threads = torch.get_num_threads()
    document = drop_in.run(DropInOptions(quick=True, dtype=("fp32",), threads=1))
    torch.set_num_threads(threads)
    rows = {row.work: row for row in document.rows if row.ours and row.dtype == "fp32"}
    assert {key: row.status for key, row in rows.items()} == {
        "good": "measured",
        "absent": "absent",
        "bad": "failed",
        "different": "parity failed",
        "unknown": "failed",
    }
    good = rows["good"]
    assert good.parity is not None
    assert (good.parity.error or 0) <= 1e-5
    untouched, against = document.reference_row(good), document.headline(good)
    assert untouched is not None
    assert against is not None
    assert (untouched.contender, untouched.status, against.dtype) == ("untouched", "measured", "fp32")
    assert against.ratio == pytest.approx((untouched.median_s or 0) / (good.median_s or 1))
    assert "replaced" in good.replaced[-1]
    in_int8 = {row.work: row for row in document.rows if row.ours and row.dtype == "int8"}
    assert in_int8["good"].status == ("measured" if int8.why_not() is None else "not offered")
    if int8.why_not() is None:
        assert in_int8["good"].parity is not None
        assert 1e-5 < (in_int8["good"].parity.error or 0) < 0.1
        assert 0.99 < (in_int8["good"].parity.cosine or 0) < 1
    assert "pip install no_such_package" in str(rows["absent"].reason)
    assert "somebody else's model" in str(rows["bad"].reason)
    assert not rows["different"].against
    assert not rows["different"].seconds
    assert "ReLU" in str(rows["unknown"].reason)
    assert not document.ok


def test_a_training_step_has_no_row_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be one in floats by another name."""
    step = case("step", lambda layers: replace(layer_norms(layers), trains=True))
    monkeypatch.setattr(drop_in, "MODELS", (case("good", layer_norms), step))
    monkeypatch.setattr(drop_in.int8, "why_not", lambda: None)
    document = drop_in.run(DropInOptions(quick=True, dtype=("fp32",), threads=torch.get_num_threads()))
    assert {row.work for row in document.rows if row.dtype == "int8"} == {"good"}


def test_an_interruption_keeps_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(layers: int) -> public_models.Subject:
        raise KeyboardInterrupt

    monkeypatch.setattr(drop_in, "MODELS", (case("good", layer_norms), case("late", interrupted)))
    document = drop_in.run(DropInOptions(quick=True, dtype=("fp32",), threads=torch.get_num_threads()))
    assert document.interrupted
    assert {row.work for row in document.rows} == {"good"}


def test_an_unknown_case() -> None:
    with pytest.raises(InputError, match="'robert' is unknown; choose from roberta"):
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
@pytest.mark.parametrize("made", drop_in.MODELS, ids=lambda made: made.key)
def test_the_models_are_equal(made: public_models.PublicModel) -> None:
    pytest.importorskip(made.package)
    row = drop_in.run(
        DropInOptions(only=(made.key,), quick=True, dtype=("fp32",), threads=torch.get_num_threads())
    ).rows[0]
    assert row.status == "measured"


def test_real_sizes_and_names() -> None:
    """Each of the models is there once, and MiniLM has the width of the real one."""
    keys = [model.key for model in public_models.MODELS]
    assert len(keys) == len(set(keys))
    assert {"minilm", "mpnet", "bge-small", "xlm-r", "distilbert", "cross-encoder", "modernbert", "clip"} < set(keys)
    assert {"siglip", "dinov2", "swin", "encode", "predict"} < set(keys)
    pytest.importorskip("transformers")
    made = next(model for model in public_models.MODELS if model.key == "minilm").make(1)
    assert sum(p.numel() for p in made.model.parameters() if p.ndim == 2) == 13_834_752
    with torch.no_grad():
        assert made.call(made.model.eval()).shape[1] == 384
