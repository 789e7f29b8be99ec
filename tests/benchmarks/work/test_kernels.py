"""`bench kernels`: every case is compared before it is timed, and a row shows what could not run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from xfm_fast.benchmarks import timing
from xfm_fast.benchmarks.options import KernelOptions
from xfm_fast.benchmarks.record import Document, Result
from xfm_fast.benchmarks.work import kernels
from xfm_fast.benchmarks.work.kernels import CASES, OpCase, case_names
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.cpu import int8

CPU = torch.device("cpu")
INT8 = "linear in int8"
compiles = pytest.mark.skipif(timing.why_not_compiled(CPU) is not None, reason="no C++ compiler")


def small(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> OpCase:
    return replace(CASES[name](CPU, dtype, True), **changes)


def measured(dtype: Any = "fp32", keep: Any = lambda document: None, **cases: Any) -> Document:
    makers = {
        name: (lambda *_, case=case: case) if isinstance(case, OpCase) else case
        for name, case in cases.items()
    }
    return kernels.run(
        KernelOptions(device="cpu", dtype=dtype, quick=True), cases=makers, keep=keep
    )


def rows_of(case: OpCase, dtype: str = "fp32") -> dict[tuple[str, str], Result]:
    return {(row.backend, row.mode): row for row in measured(dtype, case=case).rows}


SOME = [
    "relpos_attention at 224 px",
    "varlen_attention of captions",
    "add_layer_norm",
    "linear_cross_entropy",
]
OTHERS = [name for name in CASES if name not in (INT8, *SOME)]


@pytest.mark.parametrize(
    "names", [SOME, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_every_backend_is_right_and_timed(names: list[str]) -> None:
    cases = {name: small(name) for name in names}
    rows = measured(**cases).rows
    for case in cases.values():
        results = [row for row in rows if row.name == case.name]
        assert {row.mode for row in results} == set(case.work)
        if case.name.startswith("layer_norm "):
            # On a CPU it is PyTorch's own, which has no time under our name.
            assert {row.status for row in results} == {"absent"}
            continue
        for row in results:
            if row.backend in case.bounds:
                assert row.extra["bounds"]
                assert row.parity is None
                continue
            assert len(row.seconds) >= 5, row.reason
            assert row.parity is not None
            assert row.parity.error is not None
            assert row.parity.error < 1e-5
            assert (case.work[row.mode] is None) == ("needed_flops" not in row.extra)  # type: ignore[index]
        assert any(row.against for row in results)


def test_every_op_has_a_case() -> None:
    # A bias that is made once and has no gradient is a part of relpos_attention.
    helpers = {"Backend", "check_contents", "relpos_bias", "use_backend", "use_fp8"}
    assert {name.split()[0] for name in CASES} - {"linear"} == set(ops.__all__) - helpers - {
        "linear"
    }
    assert ("linear in int8" in case_names(CPU, torch.float32)) == (int8.why_not() is None)
    assert "linear in int8" not in case_names(CPU, torch.float16)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("name", ["relpos_attention at 224 px", "varlen_attention of captions"])
def test_flex_attention_is_right_and_has_no_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As large cases do.
    monkeypatch.setattr(kernels, "_compiled", lambda device, small, runs: runs)
    results = [
        row for row in rows_of(small(name)).values() if row.backend.startswith("FlexAttention")
    ]
    assert results
    for row in results:
        assert row.parity is not None
        assert row.parity.passed
        assert bool(row.seconds) == (row.mode == "forward"), row.reason


class MadeUpTritonError(Exception):
    """As Triton's own: of no class that PyTorch knows."""


def test_a_backend_that_is_wrong_fails_or_is_missing_costs_its_own_rows() -> None:
    def failing(*inputs: torch.Tensor) -> torch.Tensor:
        raise MadeUpTritonError("out of resource: shared memory")

    class NoGradient(torch.autograd.Function):
        """As the attention of cuDNN, which has no gradient of a bias."""

        @staticmethod
        def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
            return reference.add_layer_norm(*inputs, 1e-5)[0]  # type: ignore[call-arg]

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            raise MadeUpTritonError("no gradient of the bias")

    case = small("add_layer_norm", bounds={})
    case.baselines = {
        "wrong": lambda *a: case.ours(*a) * 1.001,
        "other shape": lambda *a: case.ours(*a)[:1],
        "failing": failing,
        "half": NoGradient.apply,
        "Liger": "not installed",
    }
    rows = rows_of(case)
    for direction in ("forward", "backward"):
        status = {backend: rows[backend, direction].status for backend in case.baselines}
        half = "measured" if direction == "forward" else "failed"
        assert status == {
            "wrong": "parity failed",
            "other shape": "parity failed",
            "failing": "failed",
            "half": half,
            "Liger": "absent",
        }
        assert (
            rows["failing", direction].reason == "MadeUpTritonError: out of resource: shared memory"
        )
        assert all(bool(row.seconds) == (row.status == "measured") for row in rows.values())
        ours = rows["xfm-fast", direction]
        assert ours.text("timed_by") == "clock"
        assert "wrong" not in {other.backend for other in ours.against}
