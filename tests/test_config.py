"""XFMConfig reads the official files, refuses impossible models, and says what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import golden
from xfm_fast import XFMConfig
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
    assert XFMConfig.from_official(TRAINING, image_size=384) == XFMConfig.preset(
        "base", image_size=384
    )
    codes = XFMConfig.from_official(
        TRAINING | {"use_vision_tokenizer": True, "codebook_size": 1024}
    )
    assert codes == XFMConfig.preset("base", codebook_size=1024)


def test_the_roberta_config_beside_the_yaml_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "roberta-small"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {"hidden_size": 96, "num_attention_heads": 6, "vocab_size": 99, "layer_norm_eps": 1e-07}
        )
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


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 225},
        {"image_size": 7},
        {"vision_heads": 5},
        {"text_heads": 7},
        {"local_attn_depth": 13},
        {"temperature": 0.9},
        {"num_masking_patches": 500},
        {"max_positions": 2},
        {"eos_token_id": 10**6},
        {"widht": 3},
        {"text_layers": 10**9},
        {"vocab_size": 2**31 - 1},
    ],
)
def test_impossible_models(changes: dict[str, Any]) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ConfigError) as caught:
        XFMConfig.preset("base", **changes)
    assert name in str(caught.value)
    assert name == "widht" or repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_beit_v2": False},
        {"use_swin": True},
        {"vision_config": "config_beit2_huge.json"},
        {"text_encoder": "bert-base-uncased"},
        {"text_fusion_start_at": 6},
        {"fusion_fusion_start_at": 3},
    ],
)
def test_other_models_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        XFMConfig.from_official(TRAINING | changes)


def test_missing_entries_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_res"):
        XFMConfig.from_official({k: v for k, v in TRAINING.items() if k != "image_res"})
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        XFMConfig.from_official(tmp_path / "nowhere.yaml")
    for name, content in (
        ("a.yaml", b"a: [1"),
        ("b.json", b"{"),
        ("c.yaml", b"- 1\n"),
        ("d.yaml", b"\xff\xfe\x00"),
        ("e.yaml", b"1: 2"),
        ("f.yaml", yaml.safe_dump(TRAINING | {"temp": "warm"}).encode()),
        ("g.yaml", yaml.safe_dump(TRAINING | {"text_fusion_start_at": [1]}).encode()),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError):
            XFMConfig.from_official(tmp_path / name)
    with pytest.raises(ConfigError, match="'huge'"):
        XFMConfig.preset("huge")  # pyright: ignore[reportArgumentType]
