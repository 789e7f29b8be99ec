"""A benchmark from outside the package: registered, then run, listed, reported and compared by the commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.runner import invoke
from xfm_fast.benchmarks import record, report
from xfm_fast.benchmarks.measure import Backend, Case, Run, benchmark
from xfm_fast.benchmarks.record import OURS

ROWS = torch.linspace(-4, 4, 512).view(16, 32)


@benchmark("toy-softmax", title="A toy's softmax", reference="torch", about="a softmax in 3 ways")
def softmax(run: Run) -> Iterator[Case]:
    """Compute a softmax in three ways, one of them wrong."""

    def shifted() -> torch.Tensor:
        powers = (ROWS - ROWS.amax(1, keepdim=True)).exp()
        return powers / powers.sum(1, keepdim=True)

    yield Case(
        "softmax",
        f"softmax of {len(ROWS)} rows",
        [
            Backend(OURS, "fp32", lambda: shifted),
            Backend("torch", "fp32", lambda: lambda: ROWS.softmax(1)),
            Backend("sigmoid", "fp32", lambda: ROWS.sigmoid),
            Backend("int8", "int8", dict, lacking=("not offered", "nobody wrote it")),
        ],
        "rows",
        len(ROWS),
        judge="torch",
        reference=lambda dtype: ROWS.softmax(1),
        count=lambda backend, result: {"needed_flops": 4 * ROWS.numel()},
        rounds=4,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two results of the command."""
    folder, threads = tmp_path_factory.mktemp("results"), torch.get_num_threads()
    paths = [folder / f"{name}.json" for name in ("before", "after")]
    for path in paths:
        done = invoke(["bench", "toy-softmax", "--device", "cpu", "--out", path])
        assert done.exit_code == 0, done.output
    torch.set_num_threads(threads)
    return paths


def test_the_command_times_what_agrees(results: list[Path]) -> None:
    document = record.load(results[0])
    assert (document.benchmark, document.title) == ("toy-softmax", "A toy's softmax")
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


def test_it_is_listed_reported_and_compared_as_every_other(results: list[Path]) -> None:
    listed = invoke(["bench", "list"]).stdout
    for line in ("toy-softmax", "a softmax in 3 ways", "drop-in", "rerank"):
        assert line in listed
    document = record.load(results[0])
    assert "A toy&#39;s softmax" in report.html(document)
    row = report.markdown(document).splitlines()[2]
    assert row.startswith("| softmax of 16 rows, rows/s | fp32 | ")
    printed = invoke(["bench", "report", results[0]])
    assert "sigmoid, fp32" in printed.stdout
    assert "nobody wrote it" in printed.stdout
    compared = invoke(["bench", "compare", *results])
    assert compared.exit_code in (0, 1)
    assert "softmax of 16 rows" in compared.stdout
