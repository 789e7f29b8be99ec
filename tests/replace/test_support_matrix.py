"""The table of docs/drop-in.md against the rows of the code, in both directions."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from xfm_fast.replace import layer, unpadded

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "drop-in.md").read_text()
ROWS = [
    line.split("|")[1:-1]
    for line in PAGE.split("## Supported models")[1].split("\n\n")[1].splitlines()[2:]
]


def test_every_row_is_on_the_page_and_every_name_in_the_code() -> None:
    known = {
        spec.name.rpartition(".")[2] for spec in layer.registered() if isinstance(spec.layer, str)
    }
    written = {name for row in ROWS for name in re.findall(r"`(\w*(?:Layer|Block))`", row[2])}
    assert written - {nn.TransformerEncoderLayer.__name__} == known


def test_encoders_without_padding() -> None:
    written = {name for row in ROWS for name in re.findall(r"`(\w+Model)`", row[3])}
    assert written == {row.model.rpartition(".")[2] for row in unpadded._encoders.values()}
