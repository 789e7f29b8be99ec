"""Contenders in a type, built and compared with the official algorithm before anything is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from xfm_fast.benchmarks.contenders.engine import Built, Clock, NoStages, wait_for
from xfm_fast.benchmarks.contenders.official_algorithm import OfficialEngine
from xfm_fast.benchmarks.contenders.registry import DTYPES, OFFICIAL, Contender, Setup
from xfm_fast.benchmarks.material.subjects import Subjects
from xfm_fast.benchmarks.rounds import one_line
from xfm_fast.benchmarks.rows import Cost, Parity, finite
from xfm_fast.benchmarks.suite import FP32_BAND
from xfm_fast.benchmarks.workloads import Answer, Workload


@dataclass
class Entrant:
    """A contender in a type; `reason` says why it does not run, and then there is no engine.

    Attributes:
        status: `measured` as long as nothing is wrong with it.
        parity: of the workload that was checked last.
    """

    contender: Contender
    dtype: str
    device: torch.device
    built: Built | None = None
    cost: Cost | None = None
    parity: Parity | None = None
    status: str = "measured"
    reason: str | None = None

    @property
    def key(self) -> str:
        return f"{self.contender.name} {self.dtype}"

    @property
    def runs(self) -> bool:
        return self.status == "measured"

    def fail(self, error: BaseException) -> None:
        """It takes no further part."""
        self.status, self.reason = "failed", one_line(error)

    def answer(self, workload: Workload) -> Callable[..., Any]:
        """How it answers requests: a function of their numbers, and of a clock for the stages, that waits for results.

        Raises:
            Exception: whatever the library raises.
        """
        assert self.built is not None
        with torch.inference_mode():
            prepared: Answer = workload.prepare(self.built.engine, DTYPES[self.dtype])

        def answer(numbers: Sequence[int], clock: Clock | None = None) -> Any:
            with torch.inference_mode():
                result = prepared([number % workload.requests for number in numbers], clock or NoStages())
                wait_for(self.device)
            return result

        return answer


class EntryList:
    """Builds entrants and compares their answers.

    Args:
        dtypes: to measure; absent_dtypes: those that the processor does not offer, with the reason.
        scratch, official: see `registry.Setup`.
    """

    def __init__(
        self,
        subjects: Subjects,
        contenders: Sequence[Contender],
        dtypes: Sequence[str],
        absent_dtypes: dict[str, str],
        scratch: Path,
        official: Path | None = None,
    ) -> None:
        self._subjects, self._contenders = subjects, contenders
        self._dtypes, self._absent_dtypes = dtypes, absent_dtypes
        self._scratch, self._official = scratch, official

    def build(self, scenario: str, image_size: int, on_step: Callable[[str], None]) -> list[Entrant]:
        """Every contender in every type, those that cannot run with the reason."""
        entrants = []
        for contender in self._contenders:
            for dtype in (*self._dtypes, *self._absent_dtypes):
                entrant = Entrant(contender, dtype, self._subjects.device)
                entrants.append(entrant)
                if dtype in self._absent_dtypes:
                    entrant.status, entrant.reason = "not offered", self._absent_dtypes[dtype]
                elif dtype not in contender.dtypes:
                    entrant.status, entrant.reason = "not offered", f"{contender.label} does not run in {dtype} here"
                else:
                    on_step(f"building {entrant.key}")
                    self._build(entrant, scenario, image_size)
        return entrants

    def _build(self, entrant: Entrant, scenario: str, image_size: int) -> None:
        setup = Setup(
            self._subjects, scenario, image_size, entrant.dtype, self._subjects.device, self._scratch, self._official
        )
        try:
            entrant.built = entrant.contender.build(setup)
        except Exception as error:  # whatever a library raises becomes a row that says so
            entrant.fail(error)

    def check(
        self, entrants: Sequence[Entrant], workload: Workload, image_size: int, on_step: Callable[[str], None]
    ) -> None:
        """Answer a request or two and compare with the official algorithm in fp32; sets `parity` and `cost`."""
        numbers = workload.batch(2 if workload.scenario.startswith("embed") else 1)
        reference = _Reference(self._subjects, workload, image_size, numbers)
        for entrant in entrants:
            if not entrant.runs or entrant.built is None:
                continue
            on_step(f"comparing {entrant.key}")
            try:
                answer = entrant.answer(workload)
                begun = time.perf_counter()
                answer(numbers[:1])
                first_call_s = time.perf_counter() - begun
                result = answer(numbers)
                compared = workload.compare(numbers, result, reference.expected)
            except Exception as error:
                entrant.fail(error)
                continue
            built = entrant.built
            if entrant.cost is None:
                entrant.cost = Cost(
                    build_s=built.build_s, load_s=built.load_s, first_call_s=first_call_s,
                    artifact_bytes=built.artifact_bytes,
                )  # fmt: skip
            band = reference.band(entrant.dtype, compared.error)
            passed = compared.error <= band
            entrant.parity = Parity(
                error=finite(compared.error), band=band, passed=passed, against=f"{OFFICIAL} fp32", note=compared.note
            )
            if not passed:
                entrant.status = "parity failed"
                entrant.reason = f"error {compared.error:.1e} exceeds {band:.1e}; no speed is reported"


class _Reference:
    """The official algorithm's answer in fp32, and what other types may differ from it by."""

    def __init__(self, subjects: Subjects, workload: Workload, image_size: int, numbers: Sequence[int]) -> None:
        self._subjects, self._workload = subjects, workload
        self._image_size, self._numbers = image_size, numbers
        self.expected = self._answer(torch.float32)

    def _answer(self, dtype: torch.dtype) -> Any:
        with torch.inference_mode():
            engine = OfficialEngine(self._subjects.model(self._image_size, dtype))
            return self._workload.prepare(engine, dtype)(self._numbers, NoStages())

    def band(self, dtype: str, error: float) -> float:
        """In fp32 1e-5, or three times the official error where that is more; in other types twice that error."""
        if dtype == "fp32":
            return FP32_BAND if error <= FP32_BAND else max(FP32_BAND, 3 * self._own_fp32)
        return 2 * self._own_bf16 + torch.finfo(DTYPES[dtype]).eps

    @cached_property
    def _own_fp32(self) -> float:
        return self._workload.compare(self._numbers, self.expected, self._answer(torch.float64)).error

    @cached_property
    def _own_bf16(self) -> float:
        return self._workload.compare(self._numbers, self._answer(torch.bfloat16), self.expected).error
