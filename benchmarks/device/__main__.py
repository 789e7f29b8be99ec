"""Command line of the program; see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .schedule import Plan, run
from .stages import STAGES


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m xfm_fast.benchmarks.device",
        description="Measure a bare GPU machine within a budget. Each row is kept in DIR/rows.jsonl as soon as it is "
        "there; a table and a document for xfm-fast bench report end it.",
    )
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="for everything [540]")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="receives rows, log, table and document")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses the program [cuda]")
    parser.add_argument("--small", action="store_true", help="shapes of milliseconds, to see that everything runs")
    parser.add_argument(
        "--stages", default="", metavar="NAMES", help=f"only these, with commas: {', '.join(s.name for s in STAGES)}"
    )
    parser.add_argument("--commit", default=None, help="of the source, where git is not at hand [$XFM_COMMIT]")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    """Run the program; 0 if every stage ended by itself, 1 if one failed or ran out of time, 2 for bad arguments."""
    options = _arguments(given)
    names = [name.strip() for name in options.stages.split(",") if name.strip()]
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in names if name not in known]:
        print(f"--stages {', '.join(unknown)} is unknown; choose from {', '.join(known)}", file=sys.stderr)
        return 2
    if not options.budget > 0:
        print(f"--budget {options.budget:g} leaves no time; give seconds, such as 540", file=sys.stderr)
        return 2
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out {options.out} cannot be made ({error.strerror}); name another folder", file=sys.stderr)
        return 2
    stages = tuple(stage for stage in STAGES if not names or stage.name in names)
    command = ["python3", "-m", "xfm_fast.benchmarks.device", *(sys.argv[1:] if given is None else given)]
    return run(Plan(stages, options.out, options.budget, options.device, options.small, options.commit, command))


if __name__ == "__main__":
    sys.exit(main())
