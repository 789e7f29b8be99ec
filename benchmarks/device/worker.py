"""A stage in its own process: `python -m xfm_fast.benchmarks.device.worker NAME --program MODULE:FUNCTION ...`."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from .journal import Journal, row


@dataclass(frozen=True)
class Context:
    """What a stage is told, and where its rows go.

    Attributes:
        deadline: `time.monotonic()` at which the stage should have ended by itself.
        out: folder for files that belong to the results.
    """

    stage: str
    device: str
    small: bool
    out: Path
    deadline: float
    journal: Journal = field(repr=False)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, work: str, name: str, contender: str, **fields: Any) -> None:
        """Keep a row; see `journal.row`."""
        self.journal.add(self.stage, row=row(work, name, contender, **fields))

    def add_machine(self, facts: dict[str, Any]) -> None:
        """Keep facts about the machine."""
        self.journal.add(self.stage, machine=facts)

    def out_of_time(self, work: str, name: str, contender: str, **fields: Any) -> None:
        """Keep a row of what there was no time for."""
        fields |= {"status": "absent", "reason": "no time was left for it in this stage"}
        self.add(work, name, contender, **fields)


def main(given: list[str] | None = None) -> int:
    """Run one stage; the exit code is that of the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--program", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(given)
    deadline = time.monotonic() + options.seconds
    module, _, function = options.program.partition(":")
    # Stages of this program lie beside this file; those of tests have a name of their own.
    beside = "." not in module and (Path(__file__).parent / f"{module}.py").is_file()
    journal = Journal(options.out / "rows.jsonl")
    context = Context(options.name, options.device, options.small, options.out, deadline, journal)
    program = getattr(import_module(f"{__package__}.{module}" if beside else module), function)
    program(context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
