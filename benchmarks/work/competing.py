"""Processes that want the same cores at the same time: what each takes for an answer while all of them answer.

Every process is one of its own, with all threads, as services on one machine are that do not know of each other. Run
as a program this file is such a process: it reads what to do as a line of JSON, says `ready`, and then for every number
of seconds on a line answers for so long and prints the seconds of an answer.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from xfm_fast.config import XFMConfig
from xfm_fast.errors import UnavailableError
from xfm_fast.kernels.cpu.waiting import as_libgomp_waits, wait_briefly
from xfm_fast.models.xfm import XFM

from ..contenders.registry import ALL, Setup
from ..material import photographs
from ..material.inputs import HEADS, Material, Subjects, make_tokenizer
from ..measure import DTYPES, agreeing, filled, interleave, one_line
from ..record import OFFICIAL, OURS, Row
from .entrants import Entrant, blank
from .requests import Workload
from .setting import Scale, Setting

WORKS = ("embed-image", "embed-text")
SPINNING = "xfm-fast-spinning"
_LABELS = {OURS: "xfm-fast, threads that wait briefly", SPINNING: "xfm-fast, threads spinning as libgomp has them"}
# The interpreter and PyTorch, of every process.
_BARE_BYTES = 400 << 20
_WARMUPS = 3


@dataclass(frozen=True)
class Spec:
    """The work of a process: the sizes of the model, of `Scale`, and how many requests it answers together."""

    work: str
    contender: str
    dtype: str
    preset: Any
    config: dict[str, Any]
    scale: dict[str, Any]
    batch: int
    threads: int
    seed: int


class Crowd:
    """A block of some processes that answer at the same time, for `seconds`; a sample is their mean for an answer.

    Raises:
        UnavailableError: a process ended by itself.
    """

    def __init__(
        self, spec: Spec, count: int, environment: Mapping[str, str], seconds: float, stack: ExitStack
    ) -> None:
        self._seconds, self._processes = seconds, list[subprocess.Popen[str]]()
        # As many at a time as there is work and memory for: a model takes twice its own while it is built.
        room = psutil.virtual_memory().available // (2 * _bytes(spec))
        together = max(1, min(spec.threads, room))
        for first in range(0, count, together):
            started = [self._start(spec, environment, stack) for _ in range(first, min(first + together, count))]
            for process in started:
                self._hear(process)

    def _start(self, spec: Spec, environment: Mapping[str, str], stack: ExitStack) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=dict(environment), encoding="utf-8",
        )  # fmt: skip
        stack.callback(_end, process)
        self._processes.append(process)
        self._tell(process, json.dumps(asdict(spec)))
        return process

    def __call__(self) -> list[float]:
        for process in self._processes:
            self._tell(process, str(self._seconds))
        return [statistics.fmean(float(self._hear(process)) for process in self._processes)]

    def _tell(self, process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        except OSError:
            self._hear(process)

    def _hear(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise UnavailableError(
                f"a process of {len(self._processes)} ended with {process.wait()}; its words are above"
            )
        return line


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def measure(
    setting: Setting, workload: Workload, scale: Scale, count: int, entrants: list[Entrant], batch: int, *,
    rounds: int, seconds: float,
) -> None:  # fmt: skip
    """Add the rows of so many processes at a time: ours, ours with spinning threads, and the official algorithm.

    Args:
        entrants: that were compared at this workload; other contenders do not take part.
        seconds: that a sample lasts at least.
    """
    rows: dict[str, Row] = {}
    with ExitStack() as stack:
        blocks: dict[str, Crowd] = {}
        for entrant in entrants:
            if entrant.contender.name not in (OURS, OFFICIAL):
                continue
            alone = blank(entrant, workload, "offline", batch)
            name = f"{alone.name}, {count} process{'es' * (count > 1)} at a time"
            swept = {"x": float(count), "over": "processes", "items": alone.items * count}
            row = alone.model_copy(update={"name": name, "cost": None, **swept})
            names = (OURS, SPINNING) if entrant.ours else (OFFICIAL,)
            for contender in names:
                key = f"{contender} {entrant.dtype}"
                rows[key] = row.model_copy(update={"contender": contender, "label": _LABELS.get(contender, row.label)})
                if not entrant.runs:
                    continue
                spec = Spec(
                    workload.work, entrant.contender.name, entrant.dtype, setting.options.preset,
                    _lean(setting.material.subjects.config, workload.work).model_dump(), asdict(scale), batch,
                    torch.get_num_threads(), setting.options.seed,
                )  # fmt: skip
                if (wanted := count * _bytes(spec)) > psutil.virtual_memory().available:
                    reason = f"{count} processes need {wanted / 2**30:.0f} GiB of memory, more than is available"
                    rows[key] = rows[key].model_copy(update={"status": "absent", "reason": reason})
                    continue
                setting.progress.step(f"{key}, {count} processes start")
                environment = as_libgomp_waits(os.environ)
                if contender == OURS:
                    wait_briefly(environment)
                try:
                    blocks[key] = Crowd(spec, count, environment, seconds, stack)
                except UnavailableError as error:
                    rows[key] = rows[key].model_copy(update={"status": "failed", "reason": one_line(error)})
        samples = interleave(
            blocks, setting.probes, rounds=rounds, budget_s=0.0, warmups=0, on_step=setting.progress.step
        )  # fmt: skip
    made = [filled(row, key, samples) if key in blocks else row for key, row in rows.items()]
    setting.document.rows += agreeing(made)
    if samples.interrupted:
        raise KeyboardInterrupt


def _lean(config: XFMConfig, work: str) -> XFMConfig:
    """The sizes of a model whose encoders are of one layer where the work does not pass through them."""
    unused = {"embed-image": ("text_layers", "fusion_layers"), "embed-text": ("vision_depth", "fusion_layers")}[work]
    return config.replace(**dict.fromkeys(unused, 1))


def _bytes(spec: Spec) -> int:
    with torch.device("meta"):
        model = XFM(XFMConfig(**spec.config), heads=HEADS)
    return _BARE_BYTES + sum(p.numel() for p in model.parameters()) * DTYPES[spec.dtype].itemsize


def main() -> None:
    """Be one of the processes."""
    spec = Spec(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(spec.threads)
    collection, config = photographs.bundled(), XFMConfig(**spec.config)
    material = Material(
        Subjects.random(config, spec.seed), collection, make_tokenizer(spec.preset, None, collection), spec.seed
    )
    scale = Scale(**spec.scale)
    workload = scale.workload(spec.work, material)
    entrant = Entrant(next(c for c in ALL if c.name == spec.contender), spec.dtype, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="xfm-bench-") as scratch:
        setup = Setup(material.subjects, spec.work, scale.image_size, spec.dtype, entrant.device, Path(scratch))
        entrant.build(setup, {})
    if entrant.reason is not None:
        raise UnavailableError(entrant.reason)
    answer, numbers = entrant.answer(workload), workload.batch(spec.batch)
    material.subjects.forget()
    for _ in range(_WARMUPS):
        answer(numbers)
    print("ready", flush=True)
    for line in sys.stdin:
        done, begun = 0, time.perf_counter()
        while (spent := time.perf_counter() - begun) < float(line) or not done:
            answer(numbers)
            done += 1
        print(spent / done, flush=True)


if __name__ == "__main__":
    main()
