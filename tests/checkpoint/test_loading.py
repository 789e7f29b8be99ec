"""What a module accepts of a state dict, and how the rest is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.conftest import assert_same
from tests.conftest import config
from xfm_fast.checkpoint import load_into, select_heads, to_official
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError
from xfm_fast.models.xfm import ALL_HEADS, XFM, Head


def test_load_into(tiny: tuple[XFMConfig, dict[str, Tensor]]) -> None:
    cfg, state = tiny
    model = XFM(cfg)
    result = load_into(model, state, what="tiny_b")
    assert not result.fresh
    assert not result.surplus
    assert_same(dict(model.state_dict()), state)


def test_everything_that_does_not_fit_is_in_one_error(
    tiny: tuple[XFMConfig, dict[str, Tensor]],
) -> None:
    cfg, state = tiny
    model = XFM(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    broken = dict(state)
    del broken["itm_head.0.weight"]
    broken["cls_head.0.weight"] = torch.zeros(2, 2)
    broken["bbox_head.0.weight"] = torch.zeros(5, 5)
    broken["bbox_head.0.bias"] = torch.zeros(64, dtype=torch.int64)
    broken["vision_proj.bias"] = torch.full((24,), float("nan"))
    broken["text_proj.bias"] = torch.full((24,), float("-inf"))
    with pytest.raises(CheckpointError) as error:
        load_into(model, broken, what="checkpoint broken.th")
    text = str(error.value)
    for line in (
        "checkpoint broken.th does not fit",
        "missing (1):\n    itm_head.0.weight",
        "unexpected (1):\n    cls_head.0.weight",
        "bbox_head.0.weight: [5, 5], the model has [64, 32]",
        "bbox_head.0.bias: int64, the model has float32",
        "NaN or infinite (2):",
        "diverged",
    ):
        assert line in text
    assert_same(dict(model.state_dict()), before)


@pytest.mark.parametrize("head", ["contrastive"])
def test_heads_that_one_side_lacks(tiny: tuple[XFMConfig, dict[str, Tensor]], head: Head) -> None:
    cfg, state = tiny
    heads: list[Head] = [name for name in ALL_HEADS if name != head]
    with pytest.raises(CheckpointError, match=f"no '{head}' head .*heads="):
        load_into(XFM(cfg), select_heads(state, heads), what="partial")
    with pytest.raises(CheckpointError, match=f"'{head}' head"):
        load_into(XFM(cfg, heads=heads), state, what="full")
    assert load_into(XFM(cfg, heads=heads), select_heads(state, heads), what="partial").fresh == []


def test_weights_of_a_file_are_mapped_and_never_written_to(tmp_path: Path) -> None:
    cfg = config("tiny_b")
    XFM(cfg).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    before = file.read_bytes()
    model, second = XFM.from_pretrained(tmp_path), XFM.from_pretrained(tmp_path)
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before
    name, changed = next(iter(model.state_dict().items()))
    assert torch.equal(changed, second.state_dict()[name] + 1)
    # A save into the same folder puts another file in its place.
    model.save_pretrained(tmp_path)
    assert torch.equal(
        second.state_dict()[name] + 1, XFM.from_pretrained(tmp_path).state_dict()[name]
    )


def test_state_dicts_of_the_caller_are_copied() -> None:
    cfg = config("tiny_b")
    state = to_official(XFM(cfg).state_dict(), cfg)
    before = {name: value.clone() for name, value in state.items()}
    model = XFM.from_official(state, cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(value, state[name]) for name, value in before.items())


def test_values_of_a_file_are_looked_at(tmp_path: Path) -> None:
    model = XFM(config("tiny_b"))
    with torch.no_grad():
        model.text_encoder.roberta.embeddings.word_embeddings.weight[3, 2] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        XFM.from_pretrained(tmp_path)
