"""Where the weights of a run come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.small_runs import small_recipe
from xfm_fast.errors import XFMError
from xfm_fast.models.xfm import XFM
from xfm_fast.training.loop import build_model, train

SIZES: dict[str, Any] = {"preset": "tiny", "vision_depth": 1, "text_layers": 1, "fusion_layers": 1}


@pytest.fixture
def saved(tmp_path: Path) -> XFM:
    model = XFM(small_recipe(tmp_path).model)
    model.save_pretrained(tmp_path / "saved")
    return model


def begun(folder: Path, **sizes: Any) -> XFM:
    return build_model(
        small_recipe(folder, model=SIZES | sizes, init={"checkpoint": str(folder / "saved")})
    )


def test_a_folder_gives_the_weights_and_the_recipe_the_rest(saved: XFM, tmp_path: Path) -> None:
    """What the folder's own configuration says of dropout and the like is of the run that wrote it."""
    model = begun(tmp_path, hidden_dropout=0.3, num_masking_patches=5)
    assert (model.config.hidden_dropout, model.config.num_masking_patches) == (0.3, 5)
    for (name, ours), theirs in zip(model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("rows", "weights", "message"),
    [
        ([{"desc": "a red circle above a blue square"}] * 8, "damaged.th", r"damaged\.th"),
        (
            [{"desc": "a red circle"}, {"desc": 3}, {"words": "?"}, {"desc": None}] * 4,
            None,
            "bad_share",
        ),
    ],
    ids=["no weights", "broken rows"],
)
def test_a_refused_start_leaves_no_file(
    tmp_path: Path, rows: list[Any], weights: str | None, message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.txt").touch()
    stream = {
        "kind": "text",
        "paths": str(tmp_path / "rows.jsonl"),
        "batch_size": 4,
        "max_tokens": 20,
    }
    init = {}
    if weights is not None:
        (tmp_path / weights).write_bytes(bytes(range(64)))
        init = {"checkpoint": str(tmp_path / weights)}
    recipe = small_recipe(
        folder, streams={"text": stream}, updates=[["text"]], tokenizer="train", init=init
    )
    with pytest.raises(XFMError, match=message):
        train(recipe)
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["mine.txt"]
