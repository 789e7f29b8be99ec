"""XFMConfig reads the official files, refuses impossible models, and says what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import golden
from xfm_fast import XFM, XFMConfig, config
from xfm_fast.errors import ConfigError

TRAINING = {
    "use_beit_v2": True,
    "vision_config": "configs/model/config_beit2_base.json",
    "image_res": 224,
    "patch_size": 16,
    "local_attn_depth": -1,
    "text_encoder": "../data/roberta-base",
    "text_num_hidden_layers": 12,
    "text_fusion_start_at": 12,
    "fusion_num_hidden_layers": 12,
    "fusion_fusion_start_at": 0,
    "embed_dim": 256,
    "temp": 0.07,
    "num_masking_patches": 75,
    "min_num_patches": 16,
}


def test_the_official_pretraining_yaml_is_the_base_preset(tmp_path: Path) -> None:
    path = tmp_path / "pretrain.yaml"
    path.write_text(yaml.safe_dump(TRAINING))
    assert XFMConfig.from_official(path) == XFMConfig.preset("base")
    assert XFMConfig.from_official(TRAINING) == XFMConfig.preset("base")
    assert XFMConfig.from_official(TRAINING, image_size=384) == XFMConfig.preset("base", image_size=384)


def test_the_roberta_config_beside_the_yaml_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "roberta-small"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"hidden_size": 96, "num_attention_heads": 6, "vocab_size": 99, "layer_norm_eps": 1e-07})
    )
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(TRAINING | {"text_encoder": "roberta-small", "temp": "7e-2"}))
    config = XFMConfig.from_official(path)
    assert (config.text_width, config.text_heads, config.vocab_size) == (96, 6, 99)
    assert config.text_layer_norm_eps == 1e-7
    assert config.temperature == 0.07
    assert XFMConfig.from_official(TRAINING, roberta={"vocab_size": 77}).vocab_size == 77
    assert XFMConfig.from_official(TRAINING, roberta=folder).text_width == 96


def test_the_flat_form() -> None:
    config = XFMConfig.from_official(golden("tiny_b/config.json"))
    assert (config.vision_width, config.text_width, config.text_intermediate) == (48, 32, 80)
    assert (config.image_size, config.grid, config.num_image_tokens) == (40, 5, 26)
    assert (config.max_positions, config.max_text_length) == (31, 29)
    assert config.mask_token_id == 172
    assert config.head_layer_norm_eps == 1e-5


def test_large_vision_encoder() -> None:
    config = XFMConfig.from_official(TRAINING | {"vision_config": "config_beit2_large.json"})
    assert (config.vision_width, config.vision_depth, config.vision_heads) == (1024, 24, 16)


def test_there_and_back(tmp_path: Path) -> None:
    config = XFMConfig.preset("tiny", local_attn_depth=2, hidden_dropout=0.0)
    (tmp_path / "config.json").write_text(config.to_json())
    assert XFMConfig.load(tmp_path / "config.json") == config
    assert config.replace(image_size=48).grid == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 225}, "image_size=225 .*patch_size=16.* 224 or 240"),
        ({"image_size": 7}, "image_size=7 .*patch_size=16"),
        ({"vision_heads": 5}, "vision_width=768 .*vision_heads=5"),
        ({"text_heads": 7}, "text_width=768 .*text_heads=7"),
        ({"local_attn_depth": 13}, "local_attn_depth=13 .*vision_depth=12"),
        ({"temperature": 0.9}, "temperature=0.9 .*max_temperature=0.5"),
        ({"num_masking_patches": 500}, "num_masking_patches=500 .*196"),
        ({"max_positions": 3, "pad_token_id": 2}, "max_positions=3 .* 4"),
        ({"vocab_size": 10, "eos_token_id": 10}, "eos_token_id=10 .*vocab_size=10"),
        ({"embed_dim": 0}, "embed_dim=0"),
        ({"text_layers": "twelve"}, "text_layers='twelve'"),
        ({"widht": 3}, "widht .*vision_width"),
    ],
)
def test_impossible_models(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        XFMConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_beit_v2": False}, "use_beit_v2"),
        ({"use_swin": True}, "use_swin=True"),
        ({"vision_config": "config_beit2_huge.json"}, "vision_config='config_beit2_huge.json'"),
        ({"text_encoder": "bert-base-uncased"}, "text_encoder='bert-base-uncased' .*roberta="),
        ({"text_fusion_start_at": 6}, "text_fusion_start_at=6 .*12"),
        ({"fusion_fusion_start_at": 3}, "fusion_fusion_start_at=3 "),
    ],
)
def test_other_models_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        XFMConfig.from_official(TRAINING | changes)


def test_missing_entries_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lacks 'image_res'"):
        XFMConfig.from_official({k: v for k, v in TRAINING.items() if k != "image_res"})
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read"):
        XFMConfig.from_official(tmp_path / "nowhere.yaml")
    for name, content, message in (
        ("a.yaml", "a: [1", "is not valid yaml"),
        ("b.json", "{", "is not valid json"),
        ("c.yaml", "- 1\n", "c.yaml is a list"),
        ("d.yaml", b"\xff\xfe\x00", "not UTF-8"),
    ):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigError, match=message):
            XFMConfig.from_official(path)
    with pytest.raises(ConfigError, match=r"'huge'.*base, tiny"):
        XFMConfig.preset("huge")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_layers": 10**9}, "text_layers=1000000000"),
        ({"fusion_layers": 10**9, "text_width": 12}, "fusion_layers=1000000000"),
        ({"vocab_size": 2**31 - 1}, "vocab_size=2147483647"),
        ({"image_size": 8_000_000}, "image_size=8000000"),
        ({"image_size": 10**18}, "image_size=1000000000000000000 "),
        ({"vocab_size": 2**40}, "vocab_size=1099511627776 "),
        ({"local_attn_depth": -(10**30)}, "local_attn_depth=-1000000"),
        ({"vision_mlp_ratio": 1e300}, r"vision_mlp_ratio=1e\+300"),
        ({"vision_mlp_ratio": float("inf")}, "vision_mlp_ratio=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_sizes_are_bounded_by_the_memory_of_the_machine(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        XFMConfig.preset("base", **changes)


def test_the_bound_is_a_lower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        parameters = 4 * sum(parameter.numel() for parameter in XFM(XFMConfig.preset("base")).parameters())
    monkeypatch.setattr(config, "_memory", lambda: parameters)
    XFMConfig.preset("base")
    monkeypatch.setattr(config, "_memory", lambda: parameters * 8 // 10)
    with pytest.raises(ConfigError, match="GB"):
        XFMConfig.preset("base")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "1: 2"),
        ("c.yaml", yaml.safe_dump(TRAINING | {"temp": "warm"})),
        ("c.yaml", yaml.safe_dump(TRAINING | {"text_fusion_start_at": [1]})),
        ("c.yaml", yaml.safe_dump(TRAINING | {"text_num_hidden_layers": {}})),
        ("c.json", "{"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError):
        XFMConfig.from_official(tmp_path / name)
