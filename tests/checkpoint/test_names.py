"""Official names there and back, and the rule that stands in for the base model's weights."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch

from tests.checkpoint.conftest import assert_same, assert_same_shapes, meta
from tests.conftest import (
    CASES,
    base_inputs,
    base_shapes,
    base_state,
    config,
    load_json,
    load_tensors,
    official_keys,
)
from xfm_fast.checkpoint import (
    HEAD_PREFIXES,
    heads_in,
    load_into,
    select_heads,
    to_official,
    to_ours,
    underivable,
)
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError
from xfm_fast.models.xfm import ALL_HEADS, XFM, Head

TABLE = "vision_encoder.blocks.0.attn.relative_position_bias_table"
FINE_TUNING = [
    "XFMForRetrieval",
    "XFMForVQA",
    "XFMForNLVR",
    "XFMForGrounding",
    "XFMForGroundingDomainPretrain",
    "XFMForClassification_imagenet",
    "XFMForClassification_glue_mrpc",
]


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str) -> None:
    official, cfg = load_tensors(f"{case}/weights"), config(case)
    state, report = to_ours(official, cfg)
    assert_same(to_official(state, cfg, unused=report.unused), official)
    assert report.naming == "pretraining"
    assert not report.renamed
    assert not report.interpolated
    assert state.keys().isdisjoint(report.unused)
    assert set(report.duplicates) == {
        f"{module}_encoder.{head}.decoder.{parameter}"
        for module in ("text", "fusion")
        for head, parameter in (("lm_head", "weight"), ("lm_head", "bias"), ("lm_cap_head", "bias"))
    }
    assert ("fusion_proj.weight" in report.unused) == (cfg.vision_width != cfg.text_width)
    assert f"{report.unused_parameters:,} parameters" in str(report)


@pytest.mark.parametrize("case", CASES)
def test_fine_tuning_names_there_and_back(case: str) -> None:
    pretraining, cfg = load_tensors(f"{case}/weights"), config(case)
    official = {
        name.replace("text_encoder.roberta.", "text_encoder."): value
        for name, value in pretraining.items()
        if not name.startswith(("text_encoder.lm_", "bbox_head."))
    } | {"cls_head.0.weight": torch.randn(3, 2)}
    state, report = to_ours(official, cfg)
    assert report.naming == "fine-tuning"
    assert "names changed" in str(report)
    assert_same(to_official(state, cfg, unused=report.unused, naming=report.naming), official)


def test_text_decoder_there_and_back() -> None:
    cfg = config("tiny_b")
    extra = {
        name.removeprefix("vqa/"): value
        for name, value in load_tensors("tiny_b/ft_extra_weights").items()
        if name.startswith("vqa/")
    }
    module = "text_decoder"
    extra[f"{module}.lm_head.decoder.weight"] = extra[
        f"{module}.roberta.embeddings.word_embeddings.weight"
    ]
    extra[f"{module}.lm_head.decoder.bias"] = extra[f"{module}.lm_head.bias"]
    extra[f"{module}.roberta.embeddings.position_ids"] = torch.arange(cfg.max_positions)[None]
    state, report = to_ours(extra, cfg)
    assert len(state) == len(extra) - 3
    assert not report.unused
    assert_same(to_official(state, cfg), extra)


@pytest.mark.parametrize("case", CASES)
def test_ours_is_what_the_model_has(case: str) -> None:
    cfg = config(case)
    state, _ = to_ours(load_tensors(f"{case}/weights"), cfg)
    model = XFM(cfg)
    assert_same_shapes(state, model.state_dict())
    assert heads_in(state) == ALL_HEADS
    assert tuple(HEAD_PREFIXES) == (*ALL_HEADS, "codes") == get_args(Head)
    choices: list[tuple[Head, ...]] = [(), ("contrastive",), ("mlm", "boxes"), ("imlm", "matching")]
    for heads in choices:
        assert_same_shapes(select_heads(state, heads), XFM(cfg, heads=heads).state_dict())


def test_the_head_of_an_image_tokenizer() -> None:
    """Load the head of the official `use_vision_tokenizer` if requested, its tokenizer never."""
    cfg = config("tiny_b").replace(codebook_size=7)
    head = {"lm_head.weight": torch.randn(7, cfg.vision_width), "lm_head.bias": torch.randn(7)}
    official = (
        load_tensors("tiny_b/weights") | head | {"vqkd.quantize.embedding.weight": torch.ones(7, 2)}
    )
    plain = XFM.from_official(official, cfg)
    assert heads_in(plain.state_dict()) == ALL_HEADS
    model = XFM.from_official(official, cfg, heads=(*ALL_HEADS, "codes"))
    assert_same({name: model.state_dict()[name] for name in head}, head)
    assert model.load_report is not None
    assert "vqkd.quantize.embedding.weight" in model.load_report.unused
    assert heads_in(model.state_dict()) == (*ALL_HEADS, "codes")


def test_without_dead_weights_the_rest_is_derived(caplog: pytest.LogCaptureFixture) -> None:
    official, cfg = load_tensors("tiny_b/weights"), config("tiny_b")
    state, report = to_ours(official, cfg)
    back = to_official(state, cfg)
    lost = underivable(state, cfg)
    assert set(back) == set(official) - set(lost)
    assert set(lost) == set(report.unused) | {
        f"{module}_encoder.lm_cap_head.decoder.bias" for module in ("text", "fusion")
    }
    assert f"{len(lost)} official weights" in caplog.text
    assert_same(back, {name: official[name] for name in back})
    assert set(to_official(state, cfg, unused=report.unused)) == set(official)


def test_base_keys() -> None:
    official, cfg = meta(official_keys()), XFMConfig.preset("base")
    state, report = to_ours(official, cfg)
    counted = load_json("official_keys_base")["parameter_counts"]["_all"]["total"]
    assert counted - report.unused_parameters == sum(value.numel() for value in state.values())
    with torch.device("meta"):
        model = XFM(cfg)
    assert_same_shapes(state, model.state_dict())
    assert_same_shapes(to_official(state, cfg, unused=report.unused), official)


@pytest.mark.parametrize("model", FINE_TUNING)
def test_fine_tuning_keys(model: str) -> None:
    keys = official_keys(model)
    change = load_json(f"official_keys_{model}")
    assert len(keys) == change["n_keys"]
    cfg = XFMConfig.preset(
        "base",
        image_size=change["config"]["image_res"],
        text_layers=change["config"]["text_num_hidden_layers"],
        fusion_layers=change["config"]["fusion_num_hidden_layers"],
    )
    official = meta(keys)
    state, report = to_ours(official, cfg)
    assert report.naming == "fine-tuning"
    assert_same_shapes(
        to_official(state, cfg, unused=report.unused, naming=report.naming), official
    )
    with torch.device("meta"):
        target = XFM(cfg, heads=heads_in(state)).state_dict()
    added = {name for name in state if name.startswith(("cls_head.", "text_decoder."))}
    assert set(state) - added == set(target)


def test_tables_are_interpolated_to_the_configuration() -> None:
    official = load_tensors("tiny_b/weights")
    cfg = config("tiny_b", image_size=56)
    state, report = to_ours(official, cfg)
    assert set(report.interpolated.values()) == {(5, 7)}
    assert len(report.interpolated) == cfg.vision_depth
    assert "from 5x5 to 7x7" in str(report)
    expected = load_tensors("tiny_b/ft_outputs")["retrieval/interpolated_table_block0"]
    torch.testing.assert_close(state[TABLE].double(), expected, rtol=0, atol=1e-6)
    load_into(XFM(cfg), state, what="interpolated")
    assert to_official(state, cfg)[
        "vision_encoder.blocks.1.attn.relative_position_index"
    ].shape == (50, 50)


def test_tied_names_that_disagree() -> None:
    official, cfg = load_tensors("tiny_b/weights"), config("tiny_b")
    second = "fusion_encoder.lm_head.decoder.weight"
    official[second] = official[second] + 1
    with pytest.raises(CheckpointError, match=r"fusion_encoder\.lm_head\.decoder\.weight") as error:
        to_ours(official, cfg)
    assert "fusion_encoder.roberta.embeddings.word_embeddings.weight" in str(error.value)


def test_base_inputs_follow_the_rule() -> None:
    inputs = base_inputs()
    for name, value in load_tensors("base/inputs").items():
        tensor = inputs[name.split("[")[0]]
        assert torch.equal(tensor[:, :, :4, :4] if "[" in name else tensor, value), name


def test_base_weights_follow_the_rule() -> None:
    shapes, check = base_shapes(), load_json("base/weights_check")
    small = {
        name: entry
        for name, entry in check.items()
        if json.dumps(entry["shape"]).count("50265") == 0
    }
    state = base_state({name: shapes[name] for name in small})
    for name, entry in small.items():
        assert list(state[name].shape) == entry["shape"]
        assert state[name].reshape(-1)[:4].tolist() == entry["first4"][: state[name].numel()]
        assert state[name].double().sum().item() == pytest.approx(entry["sum"], abs=1e-3)
