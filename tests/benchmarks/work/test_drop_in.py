"""`bench drop-in`: rows of models that are equal, differ, crash, or come from a package that is absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.cli.runner import invoke
from xfm_fast.benchmarks.options import DropInOptions
from xfm_fast.benchmarks.work import drop_in
from xfm_fast.errors import InputError


def layer_norms(layers: int) -> drop_in.Subject:
    model = nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(layers)))
    x = torch.randn(3, 5, 16)
    return drop_in.Subject(model, lambda m: m(x.to(next(m.parameters()).dtype)), 3)


def crashing(layers: int) -> drop_in.Subject:
    raise RuntimeError("somebody else's model")


def growing(layers: int) -> drop_in.Subject:
    """Gives another result on every call."""
    work, calls = layer_norms(layers), []

    def call(model: nn.Module) -> torch.Tensor:
        calls.append(1)
        return work.call(model) + len(calls)

    return drop_in.Subject(work.model, call, 3)


def case(key: str, make: Any, package: str = "torch") -> drop_in.PublicModel:
    return drop_in.PublicModel(key, f"the model {key}", package, "texts", {}, make)


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (
        case("good", layer_norms),
        case("absent", layer_norms, "no_such_package"),
        case("bad", crashing),
        case("different", growing),
        case("unknown", lambda layers: drop_in.Subject(nn.ReLU(), lambda m: m(torch.ones(2)), 1)),
    )
    monkeypatch.setattr(drop_in, "MODELS", made)


@pytest.mark.usefixtures("cases")
def test_every_row_says_what_became_of_it() -> None:
    threads = torch.get_num_threads()
    document = drop_in.run(DropInOptions(quick=True, dtype=("fp32",), threads=1))
    torch.set_num_threads(threads)
    rows = {row.work: row for row in document.rows if row.ours}
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
    assert "pip install no_such_package" in str(rows["absent"].reason)
    assert "somebody else's model" in str(rows["bad"].reason)
    assert not rows["different"].against
    assert not rows["different"].seconds
    assert "nothing in ReLU" in str(rows["unknown"].reason)
    assert not document.ok


def test_an_interruption_keeps_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(layers: int) -> drop_in.Subject:
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
    assert len(written) == 3
    assert written[2].startswith("| the model good, texts/s | fp32 | ")
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
def test_the_models_are_equal(made: drop_in.PublicModel) -> None:
    pytest.importorskip(made.package)
    row = drop_in.run(
        DropInOptions(only=(made.key,), quick=True, dtype=("fp32",), threads=torch.get_num_threads())
    ).rows[0]
    assert row.status == "measured"
