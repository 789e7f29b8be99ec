"""The paper's experiments on tiny models and generated data: every task (`tasks`), and its two claims (`claims`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from xfm_fast.errors import XFMError
from xfm_fast.io import read_json, write_bytes

Progress = Callable[[dict[str, Any]], object]
"""Receives the results so far, in the form that is saved."""


def check_same_study(out: Path, overrides: tuple[str, ...]) -> None:
    """Record the overrides of a study in its folder; raise `XFMError` if it has others."""
    path = out / "pretraining.json"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_bytes({path: json.dumps(overrides).encode()})
    elif (recorded := tuple(read_json(path))) != overrides:
        raise XFMError(
            f"{out} holds a study with the pretraining overrides {' '.join(recorded) or '(none)'}, not "
            f"{' '.join(overrides) or '(none)'}; repeat these, or give another folder"
        )


def page(title: str, text: str, *tables: Iterable[Sequence[str]]) -> str:
    """Write a Markdown page; the first row of a table is its head."""
    lines = [f"# {title}", "", text, ""]
    for table in tables:
        for index, cells in enumerate(table):
            lines.append("| " + " | ".join(cells) + " |")
            if index == 0:
                lines.append("|---" * len(cells) + "|")
        lines.append("")
    return "\n".join(lines)
