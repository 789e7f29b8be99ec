"""The kernel benchmark measures what it says, checks before it times, and reports what could not run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.cli.runner import invoke
from xfm_fast.benchmarks import files, report, timing
from xfm_fast.benchmarks.options import KernelOptions
from xfm_fast.benchmarks.record import Row
from xfm_fast.benchmarks.timing import Clocked
from xfm_fast.benchmarks.work import kernel_cases, kernels
from xfm_fast.benchmarks.work.kernel_cases import Case, cases, int8_linear
from xfm_fast.benchmarks.work.kernels import measure
from xfm_fast.kernels import reference, roofline
from xfm_fast.kernels.cpu import int8

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
SMALL = cases(CPU, torch.float32, small=True)
IN_FLOATS = [case for case in SMALL if case.rounded is None]
compiles = pytest.mark.skipif(timing.why_not_compiled(CPU) is not None, reason="no C++ compiler")
needs_int8 = pytest.mark.skipif(int8.why_not() is not None, reason=f"no int8 products here: {int8.why_not()}")


@pytest.mark.parametrize("case", IN_FLOATS, ids=[case.name for case in IN_FLOATS])
def test_every_contender_is_right_and_timed(case: Case) -> None:
    rows = measure(case, CPU, roofline.H100)
    for row in rows:
        assert row.bounds == (row.contender in case.bounds)
        if row.bounds:
            assert row.parity is None
            continue
        assert row.median_s is not None, row.reason
        assert len(row.samples) >= 5
        assert row.efficiency is not None
        assert row.efficiency.share_of_floor is not None
        assert row.parity is not None
        assert row.parity.error is not None
        assert row.parity.error < 1e-5
    directions = {row.direction for row in rows}
    assert directions == ({"forward", "backward"} if case.backward_work else {"forward and backward"})


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xfm_fast.benchmarks.timing.shutil.which", lambda name: None)


@needs_int8
class TestInt8:
    """The linear layer in int8 beside torchao: here, absent, made up and wrong."""

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("wrong", [False, True])
    def test_torchao_is_compared_as_all_are(self, dtype: str, wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        def quantize_(module: torch.nn.Sequential, config: object) -> None:
            layer = module[0]
            assert isinstance(layer, torch.nn.Linear)
            layer.weight.copy_(reference.as_int8(layer.weight.float()))
            if wrong:
                layer.bias.add_(1)

        made = ModuleType("torchao.quantization")
        vars(made).update(quantize_=quantize_, Int8DynamicActivationInt8WeightConfig=object)
        monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
        monkeypatch.setitem(sys.modules, "torchao.quantization", made)
        monkeypatch.setattr(kernel_cases, "available", lambda package: package == "torchao")
        case = int8_linear(64, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], compiles=False)
        rows = {row.contender: row for row in measure(case, CPU, None, dtype)}
        assert {row.direction for row in rows.values()} == {"forward"}
        ours, theirs = rows["xfm-fast"], rows["torchao"]
        assert ours.status == "measured"
        assert ours.parity is not None
        # Rounding to bytes is seen, and no more than twice what it costs by its definition is explained by it.
        assert 1e-3 < float(ours.parity.error or 0) < float(ours.parity.band or 0) < 0.05
        assert theirs.status == ("parity failed" if wrong else "measured")
        assert (theirs.median_s is None) == wrong
        assert rows["the product in floats"].bounds

    def test_it_is_told_how_to_get_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernel_cases, "available", lambda package: False)
        rows = {row.contender: row for row in measure(int8_linear(64, torch.float32, compiles=True), CPU, None)}
        for name in ("torchao", "torchao, torch.compile"):
            assert (rows[name].status, rows[name].reason) == (
                "absent", "torchao is not installed; pip install torchao",
            )  # fmt: skip

    @pytest.mark.slow
    @compiles
    def test_torchao_itself(self) -> None:
        pytest.importorskip("torchao")
        rows = {row.contender: row for row in measure(int8_linear(64, torch.float32, compiles=True), CPU, None)}
        for name in ("torchao", "torchao, torch.compile"):
            assert rows[name].median_s is not None, rows[name].reason


class TestFlexAttention:
    """The CPU's template of FlexAttention, with the bias and with sequences of their own."""

    @pytest.fixture
    def offsets(self) -> torch.Tensor:
        return torch.tensor([0, 13, 20, 40], dtype=torch.int32)

    def made(self, offsets: torch.Tensor) -> list[Case]:
        inputs = kernel_cases._tensors(CPU, torch.float32, *[(40, 12, 64)] * 3)
        work = partial(roofline.varlen_attention, 618, 40, 40, "3 texts")
        return [
            kernel_cases._relpos(4, 2, CPU, torch.float32, True),
            kernel_cases._varlen("varlen_attention 3 texts", work, (offsets, offsets), inputs, True),
        ]

    @pytest.mark.slow
    @compiles
    def test_it_is_right_and_has_no_gradient(self, offsets: torch.Tensor) -> None:
        found = 0
        for case in self.made(offsets):
            for row in measure(case, CPU, None):
                if not row.contender.startswith("FlexAttention"):
                    continue
                found += 1
                assert row.parity is not None
                assert row.parity.passed
                if row.direction == "forward":
                    assert row.median_s is not None, row.reason
                else:
                    assert row.status == "failed"
                    assert "has no gradient on a CPU" in str(row.reason)
        assert found == 6

    @pytest.mark.usefixtures("no_compiler")
    def test_without_a_compiler(self, offsets: torch.Tensor) -> None:
        relative, packed = self.made(offsets)
        assert {*relative.absent} == {"FlexAttention, table gathered", "FlexAttention, bias read"}
        assert {*packed.absent} == {"FlexAttention, document mask"}
        for why in (*relative.absent.values(), *packed.absent.values()):
            assert "needs a C++ compiler" in why
        assert not any(name.startswith("FlexAttention") for case in (relative, packed) for name in case.contenders)


def test_a_wrong_contender_is_not_timed() -> None:
    case = dataclasses.replace(
        SMALL[0],
        others={
            "wrong": lambda *a: SMALL[0].ours(*a) * 1.001,
            "broken": lambda *a: torch.zeros(3) @ torch.zeros(4),
        },
    )
    rows = {(row.contender, row.direction): row for row in measure(case, CPU, None)}
    for direction in ("forward", "backward"):
        assert not rows["wrong", direction].seconds
        assert str(rows["wrong", direction].reason).startswith("wrong: error 1")
        assert not rows["broken", direction].seconds
        assert "size" in str(rows["broken", direction].reason)
        assert rows["xfm-fast", direction].seconds


class MadeUpTritonError(Exception):
    """As Triton's own: of no class that PyTorch knows."""


def test_an_error_of_any_library_costs_its_own_rows_alone() -> None:
    def failing(*inputs: torch.Tensor) -> torch.Tensor:
        raise MadeUpTritonError("out of resource: shared memory")

    kept: list[Row] = []
    case = dataclasses.replace(SMALL[0], others={"failing": failing}, bounds={}, absent={"Liger": "not installed"})
    rows = measure(case, CPU, None, add=kept.extend)
    assert kept == rows
    found = {(row.contender, row.direction): row for row in rows}
    for direction in ("forward", "backward"):
        assert found["failing", direction].status == "failed"
        assert found["failing", direction].reason == "MadeUpTritonError: out of resource: shared memory"
        assert found["xfm-fast", direction].seconds
        assert found["xfm-fast", direction].timed_by == "clock"
        assert (found["Liger", direction].status, found["Liger", direction].reason) == ("absent", "not installed")


def test_a_contender_without_gradient_keeps_its_forward_pass() -> None:
    """As cuDNN's attention, which has no gradient of a bias."""

    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            return SMALL[0].truth(*inputs)

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            raise MadeUpTritonError("no gradient of a bias")

    case = dataclasses.replace(SMALL[0], others={"half": NoGradient.apply}, bounds={})
    rows = {(row.contender, row.direction): row for row in measure(case, CPU, None)}
    assert rows["half", "forward"].seconds
    assert rows["half", "backward"].status == "failed"
    assert "no gradient of a bias" in str(rows["half", "backward"].reason)


def test_rows_are_kept_as_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A definition that fails loses its operation; what was measured before and comes after is there."""

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        raise MadeUpTritonError("no such instruction")

    few = [dataclasses.replace(SMALL[3], truth=broken), dataclasses.replace(SMALL[3], others={}, bounds={})]
    monkeypatch.setattr(kernels, "cases", lambda *_, **__: few)
    seen: list[int] = []
    document = kernels.run(KernelOptions(small=True), keep=lambda d: seen.append(len(d.rows)))
    assert seen == [1, 2, 3]
    assert [row.status for row in document.rows] == ["failed", "measured", "measured"]
    assert "no such instruction" in str(document.rows[0].reason)


class TestGraphReplay:
    """The way of a call through the clock of a GPU, with streams, events and graphs of a made-up one."""

    @pytest.fixture(autouse=True)
    def made_up_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Stream:
            def __init__(self, *_: Any) -> None: ...
            def wait_stream(self, other: Any) -> None: ...
            def synchronize(self) -> None: ...
            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...

        class Event(Stream):
            def record(self) -> None: ...
            def elapsed_time(self, other: Any) -> float:
                return 0.25

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event())
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def test_time_is_that_of_one_run_of_a_graph(self) -> None:
        calls, recorded = [0], []

        def prepare() -> Any:
            return lambda: calls.__setitem__(0, calls[0] + 1)

        def recorder(run: Any, runs: int, stream: Any) -> Any:
            recorded.append(runs)
            return lambda: [run() for _ in range(runs)]

        clocked = Clocked(prepare, torch.device("cuda"), recorder)
        assert clocked() == clocked() == [pytest.approx(0.25e-3 / 4)]
        # A run of 0.25 ms: four of them fill a graph.
        assert recorded == [4]
        assert clocked.by == "graph replay"
        assert clocked.host_s is not None
        assert clocked.host_s < 0.01
        assert clocked.reason is None

    def test_work_that_no_graph_holds_is_timed_by_events(self) -> None:
        def recorder(run: Any, runs: int, stream: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

        clocked = Clocked(lambda: lambda: None, torch.device("cuda"), recorder)
        assert clocked() == [pytest.approx(0.25e-3)]
        assert clocked.by == "events"
        assert "not permitted" in str(clocked.reason)


def test_command_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "xfm_fast.cli",
        "bench",
        "kernels",
        "--small",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "relpos_attention" in done.stdout
    document = json.loads((tmp_path / "rows.json").read_text())
    assert {"machine", "command", "date", "rows"} <= document.keys()
    assert "commit" in document["machine"]
    assert all(min(row["seconds"]) > 0 for row in document["rows"] if row["contender"] == "xfm-fast")


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cases", lambda *_, **__: SMALL[:2])


@pytest.mark.usefixtures("few_cases")
def test_results_are_shown_again_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*inputs: torch.Tensor) -> torch.Tensor:
        return SMALL[0].ours(*inputs) * 1.001

    monkeypatch.setitem(SMALL[0].others, "wrong & odd", wrong)
    # Its error is no number, which JSON cannot hold.
    monkeypatch.setitem(SMALL[0].others, "of another shape", lambda *inputs: SMALL[0].ours(*inputs)[:1])
    path = tmp_path / "rows.json"
    files.save_as(kernels.run(KernelOptions(small=True), command=["xfm-fast", "bench", "kernels"]), path)
    loaded = files.load(path)
    ours = next(row for row in loaded.rows if row.ours and row.direction == "forward")
    eager, against = loaded.reference_row(ours), loaded.headline(ours)
    assert eager is not None
    assert against is not None
    assert (eager.contender, eager.direction) == ("eager", "forward")
    assert against.ratio == (eager.median_s or 0) / (ours.median_s or 1)
    assert not eager.against
    ratio, page, table = against.ratio, report.html(loaded), report.markdown(loaded)
    for row in loaded.rows:
        assert row.name in page
    assert {row.status for row in loaded.rows if row.contender in ("wrong & odd", "of another shape")} == {
        "parity failed"
    }
    assert f"{ratio:.2f}×" in page
    assert f"{ratio:.2f}×" in table
    assert "wrong &amp; odd" in page
    shown = invoke(["bench", "report", str(path)])
    assert f"{ratio:.2f}×" in shown.output, shown.output
    compared = invoke(["bench", "compare", str(path), str(path)])
    assert compared.exit_code == 0, compared.output
    assert "no difference" in compared.output


@pytest.mark.usefixtures("few_cases")
def test_an_interrupted_run_keeps_whole_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def once(case: Case, *others: Any) -> list[Row]:
        if done:
            raise KeyboardInterrupt
        done.append(case.name)
        return measure(case, *others)

    monkeypatch.setattr(kernels, "measure", once)
    document = kernels.run(KernelOptions(small=True))
    assert document.interrupted
    assert {row.name for row in document.rows} == {SMALL[0].name}
    assert "interrupted" in report.html(document)


def test_an_unknown_dtype_is_one_line() -> None:
    command = [sys.executable, "-m", "xfm_fast.cli", "bench", "kernels", "--small", "--dtype", "int4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert 'Invalid value "int4" for --dtype. Choose from: "fp32", "fp16", "bf16"' in done.stderr
    assert "Traceback" not in done.stderr
