"""The stages in their order, with the seconds that each is worth of a whole budget."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of the program, which runs in a process of its own.

    Attributes:
        name: also that of its rows, as `work` or before a colon.
        seconds: of a budget of 540; what a stage leaves over goes to those behind it.
        program: `module:function` beside this file, or of any other package; the function takes a `Context`.
        needs: packages without which it is not begun.
        tool: a program of the system without which it is not begun.
        gpu: it has nothing to do without a GPU.
    """

    name: str
    seconds: float
    program: str
    needs: tuple[str, ...] = ("torch",)
    tool: str | None = None
    gpu: bool = False


# What must be known before a time is worth anything comes first; what is dearest and needs the rest, last.
STAGES = (
    Stage("machine", 30, "facts:describe", ("torch", "psutil")),
    Stage("ceilings", 20, "ceilings:measure"),
    Stage("precompile", 50, "compilation:compile_launches", ("torch", "triton")),
    Stage("tests", 150, "proofs:run_tests", ("torch", "triton", "pytest")),
    Stage("sanitizer", 25, "proofs:run_sanitizer", ("torch", "triton"), "compute-sanitizer", True),
    Stage("operations", 75, "operations:measure"),
    Stage("counters", 20, "counters:profile", ("torch", "triton"), "ncu", True),
    Stage("encoder", 50, "encoder:measure", ("torch", "pydantic")),
    Stage("step", 30, "model:training_step", ("torch", "pydantic")),
    Stage("coco", 50, "model:rerank_coco", ("torch", "pydantic")),
    Stage("tune", 40, "compilation:tune_kernels", ("torch", "triton"), None, True),
)
