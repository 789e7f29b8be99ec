"""Faults seeded in the PTX of attention and norm kernels: their emulation finds them.

    python -m tests.kernels.test_ptx_faults sm_90

A fault changes one launch. It is found if emulation raises an error, reports a hazard that the kernel does not have, or
leaves other numbers. A line of JSON for each fault goes to the standard output.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

LEAST_SHARE, LEAST_FAULTS, SITES = 0.95, 30, 4
PATIENCE = 8  # times the instructions of the kernel, for a loop without an end
Edit = str | Callable[[re.Match[str]], str]


def number(change: Callable[[int], int]) -> Edit:
    """Changes the number between what the first and the third group of a pattern hold."""
    return lambda match: f"{match[1]}{change(int(match[2]))}{match[3]}"


_R = r"\s*%\w+"
_OPPOSITE = r"{ .reg .b32 opposite; neg.f32 opposite, \2; fma.rn.f32 \1, opposite, \3, \4; }"
FAULTS: dict[str, tuple[str, Edit]] = {
    "barrier removed": (r"\bbar(?:rier)?\.sync\s[^;]*;", ""),
    "wait for copies one group late": (
        r"(cp\.async\.wait_group\s+)(\d+)(;)",
        number(lambda n: n + 1),
    ),
    "wait for copies removed": (r"cp\.async\.wait_group\s+\d+;", ""),
    "wait for products one group late": (
        r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+)(;)",
        number(lambda n: n + 1),
    ),
    "proxy fences removed": (r"fence\.proxy\.async[^;]*;", ""),
    "wait for a memory barrier removed": (r"@!complete\s+bra\.uni\s+waitLoop;", ""),
    "expected bytes": (r"(mbarrier\.arrive\.expect_tx[^;]*,\s*)(\d+)(;)", number(lambda n: n + 64)),
    "wait for tensor memory removed": (r"tcgen05\.wait::st\.sync\.aligned;", ""),
    "commit of products removed": (r"@%\w+\s+tcgen05\.commit[^;]*;", ""),
    "column of tensor memory": (
        r"(tcgen05\.(?:ld|st)\.[^;[]*\[\s*%\w+ \+ )(\d+)(\])",
        number(lambda n: n + 1),
    ),
    "swizzle": (rf"(xor\.b32 {_R},{_R}, )(\d\d+)(;)", number(lambda n: n ^ 48)),
    "matrix descriptor": (rf"(or\.b64 {_R},{_R}, )(-?\d+)(;)", number(lambda n: n ^ 1 << 33)),
    "size of a copy": (rf"(selp\.b32 {_R}, )(16|8)(, 0,{_R};)", number(lambda n: n // 2)),
    "mask of a copy negated": (rf"(selp\.b32 {_R}, )(16|8), 0(,{_R};)", r"\g<1>0, \g<2>\g<3>"),
    "matrix not transposed": (r"(ldmatrix[.\w]*)\.trans", r"\1"),
    "matrix transposed": (r"(ldmatrix[.\w]*\.x[124])(?=\.shared)", r"\1.trans"),
    "distance of a shuffle": (
        rf"(shfl\.sync\.bfly\.b32 {_R},{_R}, )(\d+)(,)",
        number(lambda n: n * 2 % 31),
    ),
    "amount of a shift": (rf"(sh[lr]\.[bu]32 {_R},{_R}, )(\d)(;)", number(lambda n: n + 1)),
    "place in shared memory": (
        r"((?:ld|st)\.shared[.\w]*[^;[]*\[%\w+\+)(\d+)(\])",
        number(lambda n: n + 16),
    ),
    "mask of global memory negated": (r"@(%p\d+)(?=\s+(?:ld\.global|st\.global\.v))", r"@!\1"),
    "comparison inverted": (r"setp\.lt(?=\.s32)", "setp.ge"),
    "sign of a product": (rf"fma\.rn\.f32 ({_R}),({_R}),({_R}),({_R});", _OPPOSITE),
    "difference for a sum": (r"add\.f32(?= )", "sub.f32"),
    "operands of a product exchanged": (
        r"(mma\.sync[.\w]*\s*\{[^}]*\},\s*)\{([^,]*),([^,]*),",
        r"\1{\3,\2,",
    ),
}
EVERYWHERE = ("proxy fences removed",)  # since single ones are redundant


class Recorded(NamedTuple):
    """A launch, the lines of its PTX, and its memory before and after; what it writes holds -1 before."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    before: list[Tensor]
    after: list[Tensor]
    ptx: list[str]
    executed: list[int]  # lines
    result: Any  # the emulation's `Launch`

    def differs(self) -> bool:
        """True if a number is not as it was after the launch, by more than a rounding of the largest in bf16."""
        for memory, after in zip(memories(self.args), self.after, strict=True):
            found, expected = memory.double(), after.double()
            near = (found - expected).abs() <= 2**-8 * expected[expected.isfinite()].abs().max()
            if not (near | (found == expected) | (found.isnan() & expected.isnan())).all():
                return True
        return False


def memories(args: Sequence[Any], content: Sequence[Tensor] = ()) -> list[Tensor]:
    """The memory of each tensor and descriptor among arguments; it holds this content now, if there is any."""
    bases = [
        each for each in (getattr(each, "base", each) for each in args) if isinstance(each, Tensor)
    ]
    found = [torch.tensor([], dtype=each.dtype).set_(each.untyped_storage()) for each in bases]
    for memory, held in zip(found, content, strict=False):
        memory.copy_(held)
    return found


def workloads(target: str) -> Iterator[Callable[[], Any]]:
    """Small attentions, whose loops take several turns, and norms: whole tiles, since padding may hold anything."""
    from tests.kernels import cases
    from xfm_fast.kernels.triton import relpos_attention, relpos_table

    def fragments() -> None:
        made = cases.window(15, 17, 1, 2, 64).arguments(torch.bfloat16)
        bias = relpos_table.materialise_bias(
            made["table"], (15, 17), torch.bfloat16, 0.125, fragments=True
        )
        relpos_attention.relpos_attention_forward(made["q"], made["k"], made["v"], bias, 0.125)

    if target == "sm_90":
        yield fragments
    for case in (
        cases.window(15, 17, 2, 1, 64),
        cases.window(1, 127, 2, 1, 80),
        cases.packed([128, 64], [192, 64], 2, 64),
        cases.biased(2, 1, 128, 192, 1, 64),
        cases.norm(8, 64, scaled=True),
        cases.norm(4, 2048),
    ):
        yield lambda case=case: cases.run(case, case.arguments(torch.bfloat16, grad=True), "triton")


def recorded(target: str) -> list[Recorded]:
    """The launches of `workloads`, one of each PTX."""
    from triton.runtime.jit import JITFunction

    from xfm_fast.kernels import backend
    from xfm_fast.kernels.emulation.machine import FORMS

    found: dict[str, Recorded] = {}
    texts: list[str] = []
    executed: set[int] = set()

    def edit(name: str, ptx: str) -> str:
        texts.append(re.sub(r"(?m)^\s*\.loc.*\n", "", ptx))
        return numbered(texts[-1].splitlines())

    def traced(handler: Any, m: Any, each: Any) -> None:
        executed.add(int(each.location.rpartition(":")[2]))
        handler(m, each)

    with (
        backend.emulating(target, strict=False, edit=edit, schedule="lockstep") as launches,
        pytest.MonkeyPatch.context() as patch,
    ):
        launch = JITFunction.run

        def record(kernel: Any, *args: Any, **options: Any) -> Any:
            before = [memory.clone() for memory in memories(args)]
            launch(kernel, *args, **options)
            for held, memory in zip(before, memories(args), strict=True):
                held[held != memory] = -1
            memories(args, before)
            executed.clear()
            compiled = launch(kernel, *args, **options)
            after, lines = [memory.clone() for memory in memories(args)], texts[-1].splitlines()
            this = Recorded(
                kernel, args, options, before, after, lines, sorted(executed), launches[-1]
            )
            found.setdefault(texts[-1], this)
            return compiled

        patch.setattr(JITFunction, "run", record)
        for name, handler in FORMS.items():
            patch.setitem(FORMS, name, partial(traced, handler))
        for run in workloads(target):
            run()
    return [*found.values()]


def numbered(lines: Sequence[str]) -> str:
    """PTX in which an instruction's place in the source is its own line."""
    return "\n".join(
        re.sub(r"^(?=\s*[a-z@])", f".loc 1 {n} 0\n", line) for n, line in enumerate(lines)
    )


def sites(launches: list[Recorded]) -> Iterator[tuple[str, Recorded, int]]:
    """Faults, launches and lines: a few for every fault, at even distances among all that are executed."""
    for fault, (pattern, _) in FAULTS.items():
        found = [
            (each, n) for each in launches for n in each.executed if re.search(pattern, each.ptx[n])
        ]
        if fault in EVERYWHERE:
            found = [*{id(each): (each, n) for each, n in found}.values()]
        for i in range(count := min(SITES, len(found))):
            yield fault, *found[(2 * i + 1) * len(found) // (2 * count)]


def outcome(target: str, fault: str, this: Recorded, where: int) -> str:
    """How a fault is found: `error`, `hazard`, `numbers`; or `missed`."""
    from xfm_fast.kernels import emulation

    lines = [*this.ptx]
    for n in range(len(lines)) if fault in EVERYWHERE else [where]:
        lines[n] = re.sub(*FAULTS[fault], lines[n], count=1)
    memories(this.args, this.before)
    options: dict[str, Any] = {"schedule": "lockstep", "limit": PATIENCE * this.result.instructions}
    try:
        with emulation.emulated(
            target, strict=False, edit=lambda *_: numbered(lines), **options
        ) as launches:
            this.kernel.run(*this.args, **this.options)
    except emulation.EmulationError:
        return "error"
    except Exception as error:  # an error that emulation does not explain
        return f"missed: {error!r}"
    known, found = (
        {(each.kind, each.location) for each in run.hazards} for run in (this.result, launches[-1])
    )
    return "hazard" if found - known else "numbers" if this.differs() else "missed"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_seeded_faults_are_found(target: str) -> None:
    pytest.importorskip("triton")
    from tests.kernels.triton_testing import compiling_environment

    command = [sys.executable, "-m", "tests.kernels.test_ptx_faults", target]
    done = subprocess.run(
        command, env=compiling_environment(), capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    faults = [json.loads(row) for row in done.stdout.splitlines()]
    missed = [str(fault) for fault in faults if fault["outcome"].startswith("missed")]
    assert len(faults) >= LEAST_FAULTS
    assert len(missed) <= (1 - LEAST_SHARE) * len(faults), "\n".join(
        [f"of {len(faults)}:", *missed]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for fault, this, where in sites(recorded(sys.argv[1])):
        how = {
            "fault": fault,
            "kernel": this.kernel.fn.__name__,
            "line": where,
            "text": this.ptx[where].strip()[:100],
        }
        print(json.dumps({**how, "outcome": outcome(sys.argv[1], fault, this, where)}), flush=True)
