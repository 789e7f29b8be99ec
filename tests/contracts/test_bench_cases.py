"""A benchmark from outside the package: registered, compared with its reference, timed, reported and compared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cli.runner import invoke
from xfm_fast.benchmarks import record, report
from xfm_fast.benchmarks.measure import BENCHMARKS, Backend, Case, Run, benchmark
from xfm_fast.benchmarks.record import OURS

ROWS = torch.linspace(-4, 4, 512).view(16, 32)


@benchmark("toy-softmax", title="A softmax of one's own", reference="torch")
def softmax(run: Run, rows: int) -> Iterator[Case]:
    """A softmax in three ways, one of them wrong."""
    x = ROWS[:rows]

    def shifted() -> torch.Tensor:
        powers = (x - x.amax(1, keepdim=True)).exp()
        return powers / powers.sum(1, keepdim=True)

    yield Case(
        "softmax",
        f"softmax of {rows} rows",
        [
            Backend(OURS, "fp32", lambda: shifted),
            Backend("torch", "fp32", lambda: lambda: x.softmax(1)),
            Backend("sigmoid", "fp32", lambda: x.sigmoid),
            Backend("int8", "int8", dict, lacking=("not offered", "nobody wrote it")),
        ],
        "rows", rows, judge="torch", reference=lambda dtype: x.softmax(1),
        count=lambda backend, result: {"needed_flops": 4 * x.numel()}, rounds=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("results")
    paths = []
    for name in ("before", "after"):
        document = BENCHMARKS["toy-softmax"](SimpleNamespace(), rows=16)
        assert document.ok
        record.save_as(document, folder / f"{name}.json")
        paths.append(folder / f"{name}.json")
    return paths


def test_only_what_agrees_is_timed(results: list[Path]) -> None:
    document = record.load(results[0])
    status = {row.backend: row.status for row in document.rows}
    assert status == {
        OURS: "measured",
        "torch": "measured",
        "sigmoid": "parity failed",
        "int8": "not offered",
    }
    ours = document.rows[0]
    assert len(ours.seconds) == 4
    assert ours.rate == pytest.approx(16 / (ours.median_s or 0))
    assert [(other.backend, other.like_for_like) for other in ours.against] == [("torch", True)]
    assert document.headline(ours) == ours.against[0]


def test_it_is_reported_and_compared_as_every_other(results: list[Path]) -> None:
    document = record.load(results[0])
    assert "A softmax of one&#39;s own" in report.html(document)
    assert (
        report.markdown(document)
        .splitlines()[2]
        .startswith("| softmax of 16 rows, rows/s | fp32 | ")
    )
    shown = invoke(["bench", "report", str(results[0])])
    assert "sigmoid, fp32" in shown.stdout
    assert "nobody wrote it" in shown.stdout
    compared = invoke(["bench", "compare", *map(str, results)])
    assert compared.exit_code in (0, 1)
    assert "softmax of 16 rows" in compared.stdout
