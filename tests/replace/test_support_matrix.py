"""The table of docs/drop-in.md against the tables of the code, in both directions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("timm")

from xfm_fast.replace import encoder, families, huggingface_text, swap, timm_vision

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "drop-in.md").read_text()
ROWS = [line.split("|")[1:-1] for line in PAGE.split("## What is recognised")[1].split("\n\n")[1].splitlines()[2:]]
# Recognised by classes that are no row of a table.
ELSEWHERE = {
    *("Block", "EvaBlock", "RelPosBlock", "ResPostRelPosBlock", "SwinTransformerBlock", "SwinTransformerV2Block"),
    "ResidualAttentionBlock",
}


def test_every_row_is_on_the_page_and_every_name_in_the_code() -> None:
    swap.rules()
    known = {family.name.rpartition(".")[2] for family in families.registered() if isinstance(family.layer, str)}
    known |= set(huggingface_text._LAYERS.values())
    written = {name for row in ROWS for name in re.findall(r"`(\w*(?:Layer|Block))`", row[2])}
    assert written == known | ELSEWHERE


def test_encoders_without_padding() -> None:
    swap.rules()
    written = {name for row in ROWS for name in re.findall(r"`(\w+Model)`", row[3])}
    assert written == {row.model.rpartition(".")[2] for row in encoder._encoders.values()}


def test_what_is_written_by_hand_is_recognised() -> None:
    sources = Path(timm_vision.__file__ or "").read_text()
    sources += (Path(swap.__file__).parent / "open_clip_towers.py").read_text()
    assert [name for name in ELSEWHERE if not re.search(rf"\b{name}\b", sources)] == []
