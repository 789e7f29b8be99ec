"""Checkpoints: official names there and back, what a module accepts, damaged files, and saves that fail."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
    beit2_state,
    heads_in,
    initialise,
    interpolate_table,
    load_into,
    load_pretrained_files,
    read_state_dict,
    roberta_state,
    save_pretrained,
    select_heads,
    storage,
    to_official,
    to_ours,
    underivable,
    write_files,
)
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, StorageError
from xfm_fast.models.xfm import ALL_HEADS, XFM, Head

TABLE = "vision_encoder.blocks.0.attn.relative_position_bias_table"
WORDS = "text_encoder.roberta.embeddings.word_embeddings.weight"
FINE_TUNING = [
    "XFMForRetrieval",
    "XFMForVQA",
    "XFMForNLVR",
    "XFMForGrounding",
    "XFMForGroundingDomainPretrain",
    "XFMForClassification_imagenet",
    "XFMForClassification_glue_mrpc",
]


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert value.shape == right[name].shape, name
        assert value.is_meta or torch.equal(value, right[name]), name


def meta(keys: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Tensors with the listed shapes and dtypes and no memory; tied names are one object."""
    made: dict[str, Tensor] = {}
    for name, entry in keys.items():
        twin = next((made[tied] for tied in entry.get("tied_with", []) if tied in made), None)
        made[name] = (
            twin
            if twin is not None
            else torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        )
    return made


def assert_same_shapes(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    describe = {name: (tuple(value.shape), value.dtype) for name, value in left.items()}
    assert describe == {name: (tuple(value.shape), value.dtype) for name, value in right.items()}


@pytest.fixture(scope="module")
def tiny() -> tuple[XFMConfig, dict[str, Tensor]]:
    cfg = config("tiny_b")
    return cfg, to_ours(load_tensors("tiny_b/weights"), cfg)[0]


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
        f"{part}_encoder.{head}.decoder.{kind}"
        for part in ("text", "fusion")
        for head, kind in (("lm_head", "weight"), ("lm_head", "bias"), ("lm_cap_head", "bias"))
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
    part = "text_decoder"
    extra[f"{part}.lm_head.decoder.weight"] = extra[f"{part}.roberta.embeddings.word_embeddings.weight"]
    extra[f"{part}.lm_head.decoder.bias"] = extra[f"{part}.lm_head.bias"]
    extra[f"{part}.roberta.embeddings.position_ids"] = torch.arange(cfg.max_positions)[None]
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
    assert heads_in(state) == ALL_HEADS == tuple(HEAD_PREFIXES)
    choices: list[tuple[Head, ...]] = [(), ("contrastive",), ("mlm", "boxes"), ("imlm", "matching")]
    for heads in choices:
        assert_same_shapes(select_heads(state, heads), XFM(cfg, heads=heads).state_dict())


def test_without_dead_weights_the_rest_is_derived(caplog: pytest.LogCaptureFixture) -> None:
    official, cfg = load_tensors("tiny_b/weights"), config("tiny_b")
    state, report = to_ours(official, cfg)
    back = to_official(state, cfg)
    lost = underivable(state, cfg)
    assert set(back) == set(official) - set(lost)
    assert set(lost) == set(report.unused) | {f"{part}_encoder.lm_cap_head.decoder.bias" for part in ("text", "fusion")}
    assert f"{len(lost)} official weights" in caplog.text
    assert_same(back, {name: official[name] for name in back})
    floating = to_official(state, cfg, unused=report.unused, integer_buffers=False)
    assert set(floating) == {name for name, value in official.items() if value.is_floating_point()}


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
    assert_same_shapes(to_official(state, cfg, unused=report.unused, naming=report.naming), official)
    with torch.device("meta"):
        own = XFM(cfg, heads=heads_in(state)).state_dict()
    added = {name for name in state if name.startswith(("cls_head.", "text_decoder."))}
    assert set(state) - added == set(own)


def test_tables_are_interpolated_to_the_configuration() -> None:
    official = load_tensors("tiny_b/weights")
    cfg = config("tiny_b", image_size=56)
    state, report = to_ours(official, cfg)
    assert set(report.interpolated.values()) == {(5, 7)}
    assert len(report.interpolated) == cfg.vision_depth
    assert "from 5x5 to 7x7" in str(report)
    wanted = load_tensors("tiny_b/ft_outputs")["retrieval/interpolated_table_block0"]
    torch.testing.assert_close(state[TABLE].double(), wanted, rtol=0, atol=1e-6)
    load_into(XFM(cfg), state, what="interpolated")
    assert to_official(state, cfg)["vision_encoder.blocks.1.attn.relative_position_index"].shape == (50, 50)


def test_tied_names_that_disagree() -> None:
    official, cfg = load_tensors("tiny_b/weights"), config("tiny_b")
    other = "fusion_encoder.lm_head.decoder.weight"
    official[other] = official[other] + 1
    with pytest.raises(CheckpointError, match=r"fusion_encoder\.lm_head\.decoder\.weight") as error:
        to_ours(official, cfg)
    assert "fusion_encoder.roberta.embeddings.word_embeddings.weight" in str(error.value)


def test_dead_tied_names_may_disagree() -> None:
    official, cfg = load_tensors("tiny_b/weights"), config("tiny_b")
    official["text_encoder.lm_cap_head.decoder.bias"] = torch.ones(cfg.vocab_size)
    state, report = to_ours(official, cfg)
    assert_same(to_official(state, cfg, unused=report.unused), official)


def test_only_the_second_name_of_a_tied_tensor() -> None:
    official, cfg = load_tensors("tiny_b/weights"), config("tiny_b")
    value = official.pop(WORDS)
    state, _ = to_ours(official, cfg)
    assert torch.equal(state[WORDS], value)


def test_a_name_in_both_forms() -> None:
    official, cfg = load_tensors("tiny_b/weights"), config("tiny_b")
    official["text_encoder.embeddings.word_embeddings.weight"] = official[WORDS]
    with pytest.raises(CheckpointError, match="two names of one tensor"):
        to_ours(official, cfg)


def test_a_table_that_fits_no_window() -> None:
    official, cfg = load_tensors("tiny_b/weights"), config("tiny_b")
    official[TABLE] = torch.zeros(85, 3)
    with pytest.raises(CheckpointError, match=r"blocks\.0.*85 rows"):
        to_ours(official, cfg)


def test_unused_must_be_dead() -> None:
    cfg = config("tiny_b")
    with pytest.raises(CheckpointError, match=r"itm_head\.0\.weight"):
        to_official({}, cfg, unused={"itm_head.0.weight": torch.zeros(1)})


def test_conversion_copies_nothing() -> None:
    official, cfg = load_tensors("tiny_b/weights"), config("tiny_b")
    state, report = to_ours(official, cfg)
    back = to_official(state, cfg, unused=report.unused)
    assert all(value is official[name] for name, value in state.items())
    assert back["text_encoder.lm_head.decoder.weight"] is back[WORDS]


@given(st.data())
def test_any_part_of_a_checkpoint_comes_back(data: st.DataObject) -> None:
    """Whatever is left out, nothing that was there changes."""
    official, cfg = load_tensors("tiny_b/weights"), config("tiny_b")
    names = sorted(official)
    part = {name: official[name] for name in data.draw(st.lists(st.sampled_from(names), unique=True, max_size=60))}
    state, report = to_ours(part, cfg)
    back = to_official(state, cfg, unused=report.unused)
    dropped = {name for name in part if name not in back}
    assert all(not official[name].is_floating_point() or "decoder" in name for name in dropped)
    assert all(torch.equal(back[name], value) for name, value in part.items() if name in back)


def test_load_into(tiny: tuple[XFMConfig, dict[str, Tensor]]) -> None:
    cfg, state = tiny
    model = XFM(cfg)
    result = load_into(model, state, what="tiny_b")
    assert not result.fresh
    assert not result.surplus
    assert_same(dict(model.state_dict()), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_take_the_dtype_of_the_module(dtype: torch.dtype) -> None:
    layer = nn.Linear(3, 2)
    state = {name: value.detach().to(dtype) for name, value in nn.Linear(3, 2).state_dict().items()}
    load_into(layer, state, what="cast")
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight.detach(), state["weight"].float())


def test_everything_that_does_not_fit_is_in_one_error(tiny: tuple[XFMConfig, dict[str, Tensor]]) -> None:
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
    for part in (
        "checkpoint broken.th does not fit",
        "missing (1):\n    itm_head.0.weight",
        "unexpected (1):\n    cls_head.0.weight",
        "bbox_head.0.weight: [5, 5], the model has [64, 32]",
        "bbox_head.0.bias: int64, the model has float32",
        "NaN or infinite (2):",
        "diverged",
    ):
        assert part in text
    assert_same(dict(model.state_dict()), before)


def test_long_lists_are_capped(tiny: tuple[XFMConfig, dict[str, Tensor]]) -> None:
    cfg, _ = tiny
    with pytest.raises(CheckpointError, match=r"\.\.\. and \d{3} more") as error:
        load_into(XFM(cfg), {}, what="nothing")
    assert len(str(error.value).splitlines()) < 20


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"image_size": 56}, "image_size=40"),
        ({"image_size": 20, "patch_size": 4, "num_masking_patches": 9}, "patch_size=8"),
        ({"vision_width": 96}, "vision_width=48"),
        ({"vision_heads": 6}, "vision_heads=3"),
        ({"text_width": 64}, "text_width=32"),
        ({"text_intermediate": 96}, "text_intermediate=80"),
        ({"vocab_size": 200}, "vocab_size=173"),
        ({"max_positions": 40}, "max_positions=31"),
        ({"embed_dim": 16}, "embed_dim=24"),
        ({"text_layers": 3}, "text_layers=4"),
        ({"text_layers": 5}, "text_layers=4"),
        ({"vision_depth": 1}, "vision_depth=2"),
        ({"fusion_layers": 1}, "fusion_layers=2"),
        ({"learnable_temperature": False}, "learnable_temperature=True"),
    ],
)
def test_the_remedy_names_the_field(
    tiny: tuple[XFMConfig, dict[str, Tensor]], change: dict[str, Any], advice: str
) -> None:
    cfg, state = tiny
    with pytest.raises(CheckpointError) as error:
        load_into(XFM(cfg.replace(**change)), state, what="tiny_b")
    assert advice in str(error.value)


@pytest.mark.parametrize("head", ALL_HEADS)
def test_heads_that_one_side_lacks(tiny: tuple[XFMConfig, dict[str, Tensor]], head: Head) -> None:
    cfg, state = tiny
    others: list[Head] = [name for name in ALL_HEADS if name != head]
    with pytest.raises(CheckpointError, match=f"no '{head}' head .*heads="):
        load_into(XFM(cfg), select_heads(state, others), what="partial")
    with pytest.raises(CheckpointError, match=f"without the '{head}' head"):
        load_into(XFM(cfg, heads=others), state, what="full")
    assert load_into(XFM(cfg, heads=others), select_heads(state, others), what="partial").fresh == []


def test_fresh_and_surplus_are_reported(tiny: tuple[XFMConfig, dict[str, Tensor]]) -> None:
    cfg, state = tiny
    model = XFM(cfg, heads=("contrastive",))
    state = {name: value for name, value in state.items() if name != "temp"}
    others = [prefix for head in ("mlm", "imlm", "matching", "boxes") for prefix in HEAD_PREFIXES[head]]
    result = load_into(model, state, what="x", fresh=("temp",), surplus=others)
    assert result.fresh == ["temp"]
    assert set(result.surplus) == set(state) - set(model.state_dict())


def test_an_official_state_dict_is_recognised() -> None:
    with pytest.raises(CheckpointError, match="from_official"):
        load_into(XFM(config("tiny_b")), load_tensors("tiny_b/weights"), what="raw")


def test_a_module_without_memory() -> None:
    with torch.device("meta"):
        layer = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="to_empty"):
        load_into(layer, nn.Linear(2, 2).state_dict(), what="x")


def test_tensors_without_plain_values() -> None:
    state = {"weight": torch.eye(2).to_sparse(), "bias": torch.empty(2, device="meta")}
    with pytest.raises(CheckpointError, match="wrong type") as error:
        load_into(nn.Linear(2, 2), state, what="x")
    assert "sparse_coo" in str(error.value)
    assert "without values" in str(error.value)


STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(2.5), "ids": torch.arange(4)}


@pytest.mark.parametrize("suffix", [".th", ".pth", ".bin", ".pt"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nesting", [(), ("model",), ("module",), ("state_dict",), ("module", "model")])
def test_torch_files(tmp_path: Path, suffix: str, zipped: bool, nesting: tuple[str, ...]) -> None:
    content: Any = STATE
    for name in nesting:
        content = {name: content, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_same(read_state_dict(path), STATE)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    torch.save({"model": {prefix + name: value for name, value in STATE.items()}}, tmp_path / "x.th")
    assert_same(read_state_dict(tmp_path / "x.th"), STATE)
    mixed = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(mixed, tmp_path / "y.th")
    assert_same(read_state_dict(tmp_path / "y.th"), mixed)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_safetensors_files(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    assert_same(read_state_dict(str(tmp_path / name)), STATE)


def test_parameters_become_plain_tensors(tmp_path: Path) -> None:
    torch.save({"w": nn.Parameter(torch.ones(2))}, tmp_path / "x.th")
    assert type(read_state_dict(tmp_path / "x.th")["w"]) is Tensor


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.th", b"", "is empty"),
        ("x.safetensors", b"", "is empty"),
        ("x.safetensors", b"\x10\x00", "truncated safetensors"),
        ("x.safetensors", b"\xff" * 8 + b"{}", "truncated safetensors"),
        ("x.th", b"\xff\xd8\xff\xe0\x00\x10JFIF", "JPEG"),
        ("x.th", b"\x89PNG\r\n", "PNG"),
        ("x.th", b'{"a": 1, "b": [2]}', "JSON"),
        ("x.json", b"[1, 2, 3, 4, 5, 6]", "JSON"),
        ("x.json", b'{"abcd":{"e": 1}}', "JSON"),
        ("x.safetensors", b"\x08" + b"\0" * 7 + b"{}      ", "no tensors"),
        ("x.th", b"<!DOCTYPE html><html>", "HTML"),
        ("x.th", b"hello, this is no checkpoint\n", "text file"),
        ("x.th", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("x.th", b"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09", "unknown kind"),
        ("x.th", b"\x80\x02", "truncated"),
        ("x.th", pickle.dumps([1, 2, 3], protocol=2), "not a PyTorch checkpoint"),
        ("x.th", b"PK\x03\x04 and then nothing", "truncated PyTorch checkpoint"),
    ],
)
def test_foreign_and_empty_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_state_dict(written(tmp_path / name, data))
    assert name in str(error.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_state_dict(tmp_path / "nowhere.th")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.th")
    state = {f"layer.{i}.weight": torch.randn(40, 40) for i in range(4)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    with pytest.raises(CheckpointError, match="truncated"):
        read_state_dict(written(path, data[: int(len(data) * share)]))


def test_a_zip_archive_of_something_else(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.th", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
        read_state_dict(tmp_path / "x.th")


class Payload:
    """Unpickling this makes the folder that it names."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, kind: str) -> None:
    trap, path = tmp_path / "trap", tmp_path / "x.th"
    content = {"model": {"a": torch.zeros(1)}, "extra": Payload(trap)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir|nt\.mkdir") as error:
        read_state_dict(path)
    assert "nothing was run" in str(error.value)
    assert not trap.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_state_dict(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(1), "epoch": 3}, "int under 'epoch'"),
        ({"model": {"a": torch.zeros(1), "b": None}}, r"\['model'\] holds a NoneType under 'b'"),
        ({1: torch.zeros(1)}, "under 1"),
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(1), "holds a Tensor"),
        ({}, "no tensors"),
        ({"model": {}}, "no tensors"),
    ],
)
def test_content_that_is_no_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.th")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "x.th")


@given(
    data=st.binary(min_size=0, max_size=200),
    start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x08" + b"\0" * 7 + b"{"]),
)
def test_arbitrary_bytes_give_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes
) -> None:
    path = written(tmp_path_factory.getbasetemp() / "arbitrary.th", start + data)
    with pytest.raises(CheckpointError):
        read_state_dict(path)


@pytest.mark.parametrize("case", CASES)
def test_save_and_load(tmp_path: Path, case: str) -> None:
    official, cfg = load_tensors(f"{case}/weights"), config(case)
    state, report = to_ours(official, cfg)
    save_pretrained(state, cfg, tmp_path / "new" / "model", unused=report.unused)
    loaded = load_pretrained_files(tmp_path / "new" / "model")
    assert loaded.config == cfg
    assert_same(loaded.state, state)
    assert loaded.unused is not None
    assert_same(to_official(loaded.state, loaded.config, unused=loaded.unused), official)
    assert sorted(path.name for path in (tmp_path / "new" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "unused.safetensors",
    ]


def test_a_save_without_dead_weights_removes_old_ones(tmp_path: Path) -> None:
    cfg = config("tiny_b")
    save_pretrained(STATE, cfg, tmp_path, unused={"fusion_proj.bias": torch.zeros(1)})
    save_pretrained(STATE, cfg, tmp_path)
    assert load_pretrained_files(tmp_path).unused is None


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    state = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "strided": torch.arange(12.0).view(3, 4).t(),
        "expanded": torch.ones(1, 3).expand(2, 3),
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(3, dtype=torch.bfloat16),
        "double": torch.randn(3, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "long": torch.arange(3),
        "odd name \N{SNOWMAN}": nn.Parameter(torch.ones(2)),
    }
    save_pretrained(state, XFMConfig.preset("tiny"), tmp_path)
    path = tmp_path / "model.safetensors"
    assert_same(load_file(path), {name: value.detach() for name, value in state.items()})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"xfm_fast_format": "1", "xfm_fast": storage._package_version()}


def test_dtypes_that_safetensors_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complex64"):
        save_pretrained({"w": torch.zeros(2, dtype=torch.complex64)}, XFMConfig.preset("tiny"), tmp_path)
    with pytest.raises(CheckpointError, match="sparse"):
        save_pretrained({"w": torch.eye(2).to_sparse()}, XFMConfig.preset("tiny"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_dead_weights_make_no_file(tmp_path: Path) -> None:
    save_pretrained(STATE, XFMConfig.preset("tiny"), tmp_path, unused={})
    assert load_pretrained_files(tmp_path).unused is None


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        load_pretrained_files(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_pretrained_files(tmp_path)
    (tmp_path / "config.json").write_text(XFMConfig.preset("tiny").to_json())
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_pretrained_files(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors", metadata={"xfm_fast_format": "2"})
    with pytest.raises(CheckpointError, match="upgrade xfm-fast"):
        load_pretrained_files(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")
    assert_same(load_pretrained_files(tmp_path).state, STATE)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    save_pretrained(STATE, XFMConfig.preset("tiny"), folder)
    return folder


def assert_untouched(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_pretrained_files(folder)
    assert loaded.config == XFMConfig.preset("tiny")
    assert_same(loaded.state, STATE)


BIGGER = {"w": torch.randn(600, 600)}


@pytest.mark.parametrize(
    ("call", "successes"), [("fsync", 0), ("fsync", 1), ("write", 0), ("write", 1), ("write", 2), ("replace", 0)]
)
def test_full_disk(saved: Path, monkeypatch: pytest.MonkeyPatch, call: str, successes: int) -> None:
    where = storage if call == "write" else os
    name = "_write" if call == "write" else call
    real, calls = getattr(where, name), 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > successes:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(where, name, failing)
    with pytest.raises(StorageError, match="No space left") as error:
        save_pretrained(BIGGER, XFMConfig.preset("base"), saved)
    monkeypatch.undo()
    assert str(saved) in str(error.value)
    assert "free space" in str(error.value)
    assert_untouched(saved)


def test_a_rename_that_fails_after_another_is_told(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def failing(source: Path, target: Path) -> None:
        if target.name == "config.json":
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(
        StorageError, match=r"config\.json could not be written .* model\.safetensors is already the new one"
    ):
        save_pretrained(BIGGER, XFMConfig.preset("base"), saved)
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_file_size_limit(saved: Path) -> None:
    """The system itself refuses to write on, half-way through the weights."""
    resource = pytest.importorskip("resource", reason="limits on file size need a POSIX system")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match=r"model\.safetensors could not be written"):
            save_pretrained(BIGGER, XFMConfig.preset("base"), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_untouched(saved)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    folder = small_disk / "saved"
    save_pretrained(STATE, XFMConfig.preset("tiny"), folder)
    with pytest.raises(StorageError, match="No space left"):
        save_pretrained(BIGGER, XFMConfig.preset("base"), folder)
    assert_untouched(folder)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL needs a POSIX system")
@pytest.mark.parametrize("moment", [1, 2])
def test_a_killed_process_leaves_the_earlier_save(saved: Path, moment: int) -> None:
    program = f"""
        import os, signal, torch
        from xfm_fast.checkpoint import save_pretrained
        from xfm_fast.config import XFMConfig
        real, calls = os.fsync, 0
        def fsync(handle):
            global calls
            calls += 1
            if calls == {moment}:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)
        os.fsync = fsync
        save_pretrained({{"w": torch.randn(600, 600)}}, XFMConfig.preset("base"), {str(saved)!r})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    for leftover in saved.glob(".*.tmp"):
        leftover.unlink()
    assert_untouched(saved)


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    written(tmp_path / "file", b"x")
    with pytest.raises(StorageError, match="cannot be made"):
        save_pretrained(STATE, XFMConfig.preset("tiny"), tmp_path / "file")


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files({tmp_path / "a": interrupted})
    assert list(tmp_path.iterdir()) == []


def test_saving_over_the_file_that_is_being_read(tmp_path: Path) -> None:
    save_pretrained(STATE, XFMConfig.preset("tiny"), tmp_path)
    loaded = load_pretrained_files(tmp_path)
    save_pretrained(loaded.state, loaded.config, tmp_path)
    assert_same(load_pretrained_files(tmp_path).state, STATE)


def hugging_face(cfg: XFMConfig, kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="compares with the Hugging Face RoBERTa")
    torch.manual_seed(3)
    made = transformers.RobertaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.text_width,
        num_hidden_layers=cfg.text_layers,
        num_attention_heads=cfg.text_heads,
        intermediate_size=cfg.text_intermediate,
        max_position_embeddings=cfg.max_positions,
        type_vocab_size=cfg.type_vocab_size,
        layer_norm_eps=cfg.text_layer_norm_eps,
    )
    return getattr(transformers, kind)(made).eval()


def text_batch(cfg: XFMConfig) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, cfg.vocab_size - 1, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    return ids.masked_fill(~mask, cfg.pad_token_id), mask.long()


@pytest.mark.parametrize("kind", ["RobertaModel", "RobertaForMaskedLM"])
def test_hugging_face_roberta(kind: str) -> None:
    cfg = config("tiny_b")
    theirs = hugging_face(cfg, kind)
    model = XFM(cfg).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialise(model, roberta=theirs.state_dict())
    after = model.state_dict()
    head = {name for name in after if name.startswith("text_encoder.lm_head.")}
    fresh = {name for name in after if not name.startswith("text_encoder.")} | (
        head if kind == "RobertaModel" else set()
    )
    assert set(report.fresh) == fresh
    assert set(report.loaded) == set(after) - fresh
    assert report.ignored == []
    assert all(torch.equal(after[name], before[name]) for name in fresh)
    assert "vision_encoder" in str(report)

    ids, mask = text_batch(cfg)
    with torch.no_grad():
        out = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        ours = model.encode_text(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], out[real], rtol=1e-4, atol=1e-5)


def test_roberta_into_a_model_without_language_head() -> None:
    cfg = config("tiny_b")
    report = initialise(XFM(cfg, heads=()), roberta=hugging_face(cfg, "RobertaForMaskedLM").state_dict())
    assert set(report.ignored) == {
        f"text_encoder.lm_head.{name}"
        for name in ("bias", "dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias")
    }


def test_roberta_from_a_file(tmp_path: Path) -> None:
    cfg = config("tiny_b")
    theirs = hugging_face(cfg, "RobertaForMaskedLM").state_dict()
    theirs["roberta.embeddings.position_ids"] = torch.arange(cfg.max_positions)[None]
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    model = XFM(cfg)
    initialise(model, roberta=tmp_path / "pytorch_model.bin")
    assert torch.equal(model.state_dict()[WORDS], theirs["roberta.embeddings.word_embeddings.weight"])


def test_roberta_faults() -> None:
    cfg = config("tiny_b")
    state = dict(hugging_face(cfg, "RobertaForMaskedLM").state_dict())
    with pytest.raises(CheckpointError, match=r"bert\.embeddings"):
        roberta_state({"bert.embeddings.word_embeddings.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="empty"):
        roberta_state({})
    with pytest.raises(CheckpointError, match="max_positions=31"):
        initialise(XFM(cfg.replace(max_positions=20)), roberta=state)
    state["lm_head.decoder.weight"] = state["lm_head.decoder.weight"] + 1
    with pytest.raises(CheckpointError, match="one tensor"):
        roberta_state(state)


def beit2(cfg: XFMConfig, *, shared: bool, pretrained: bool) -> dict[str, Tensor]:
    """A state dict with the names of BEiT-v2, with other values than tiny_b."""
    ours = to_ours(load_tensors("tiny_b/weights"), cfg)[0]
    state = {
        name.removeprefix("vision_encoder."): value + 0.5
        for name, value in ours.items()
        if name.startswith("vision_encoder.")
    }
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    index = torch.zeros(26, 26, dtype=torch.int64)
    if shared:
        state["rel_pos_bias.relative_position_bias_table"] = state[tables[0]]
        state["rel_pos_bias.relative_position_index"] = index
        for name in tables:
            del state[name]
    else:
        state |= {f"blocks.{block}.attn.relative_position_index": index for block in range(cfg.vision_depth)}
    if pretrained:
        del state["fc_norm.weight"], state["fc_norm.bias"]
        state |= {"norm.weight": torch.ones(48), "norm.bias": torch.ones(48)}
        state |= {"lm_head.weight": torch.ones(9, 48), "cls_pt_layers.0.gamma_1": torch.ones(48)}
    else:
        del state["mask_token"]
        state |= {"head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)}
    return state


@pytest.mark.parametrize("nesting", [None, "model", "module"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("size", [40, 56])
def test_beit2(nesting: str | None, shared: bool, pretrained: bool, size: int) -> None:
    cfg = config("tiny_b", image_size=size)
    source = beit2(config("tiny_b"), shared=shared, pretrained=pretrained)
    state = beit2_state({nesting: source} if nesting else source, cfg)
    absent = {"fc_norm.weight", "fc_norm.bias"} if pretrained else {"mask_token"}
    wanted = {name for name in XFM(cfg).state_dict() if name.startswith("vision_encoder.")}
    assert set(state) == wanted - {f"vision_encoder.{name}" for name in absent}
    for block in range(cfg.vision_depth):
        key = f"blocks.{block}.attn.relative_position_bias_table"
        table = source["rel_pos_bias.relative_position_bias_table" if shared else key]
        assert torch.equal(state[f"vision_encoder.{key}"], interpolate_table(table, (cfg.grid, cfg.grid)))
    assert torch.equal(state["vision_encoder.blocks.1.gamma_2"], source["blocks.1.gamma_2"])


def test_initialise_both(tmp_path: Path) -> None:
    cfg = config("tiny_b", image_size=56)
    source = beit2(config("tiny_b"), shared=True, pretrained=True)
    torch.save({"model": source}, tmp_path / "beit.pth")
    model = XFM(cfg)
    fusion = model.state_dict()["fusion_encoder.roberta.encoder.layer.0.output.dense.weight"].clone()
    report = initialise(
        model, roberta=hugging_face(cfg, "RobertaForMaskedLM").state_dict(), beit2=tmp_path / "beit.pth"
    )
    assert {name for name in report.fresh if name.startswith(("vision_encoder.", "text_encoder."))} == {
        "vision_encoder.fc_norm.weight",
        "vision_encoder.fc_norm.bias",
    }
    assert set(report.fresh) | set(report.loaded) == set(model.state_dict())
    assert torch.equal(model.state_dict()["fusion_encoder.roberta.encoder.layer.0.output.dense.weight"], fusion)
    assert torch.equal(model.state_dict()["vision_encoder.cls_token"], source["cls_token"])


def test_beit2_faults() -> None:
    cfg = config("tiny_b")
    source = beit2(cfg, shared=False, pretrained=True)
    with pytest.raises(CheckpointError, match="pos_embed"):
        beit2_state(source | {"pos_embed": torch.zeros(1, 26, 48)}, cfg)
    with pytest.raises(CheckpointError, match="empty"):
        beit2_state({}, cfg)
    with pytest.raises(CheckpointError, match="vision_depth=2"):
        initialise(XFM(cfg.replace(vision_depth=1)), beit2=source)
    with pytest.raises(CheckpointError, match="no vision encoder"):
        initialise(nn.Linear(2, 2), beit2=source)


def test_base_inputs_follow_the_rule() -> None:
    inputs = base_inputs()
    for name, value in load_tensors("base/inputs").items():
        made = inputs[name.split("[")[0]]
        assert torch.equal(made[:, :, :4, :4] if "[" in name else made, value), name


def test_base_weights_follow_the_rule() -> None:
    shapes, check = base_shapes(), load_json("base/weights_check")
    small = {name: entry for name, entry in check.items() if json.dumps(entry["shape"]).count("50265") == 0}
    state = base_state({name: shapes[name] for name in small})
    for name, entry in small.items():
        assert list(state[name].shape) == entry["shape"]
        assert state[name].reshape(-1)[:4].tolist() == entry["first4"][: state[name].numel()]
        assert state[name].double().sum().item() == pytest.approx(entry["sum"], abs=1e-3)
