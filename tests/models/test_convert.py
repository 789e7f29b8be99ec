"""Official checkpoint to our folder and back: the identity, and clear refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import config, load_tensors
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError
from xfm_fast.models.convert import to_official_file, to_xfm_folder
from xfm_fast.models.xfm import XFM


@pytest.fixture
def official() -> dict[str, Tensor]:
    return load_tensors("tiny_b/weights")


@pytest.fixture
def cfg() -> XFMConfig:
    return config("tiny_b")


@pytest.fixture
def source(official: dict[str, Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "official.th"
    torch.save({"model": official, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("suffix", [".th", ".safetensors"])
def test_there_and_back_is_the_identity(
    source: Path, official: dict[str, Tensor], cfg: XFMConfig, tmp_path: Path, suffix: str
) -> None:
    report = to_xfm_folder(source, tmp_path / "ours", cfg)
    assert any(line.startswith("dead weights:") for line in report)
    back = tmp_path / f"back{suffix}"
    to_official_file(tmp_path / "ours", back)
    read = (
        load_file(back)
        if suffix == ".safetensors"
        else torch.load(back, weights_only=True)["model"]
    )
    assert read.keys() == official.keys()
    for name, value in official.items():
        assert torch.equal(read[name], value), name
        assert read[name].dtype == value.dtype


def test_fine_tuned_names_come_back(
    official: dict[str, Tensor], cfg: XFMConfig, tmp_path: Path
) -> None:
    tuned = {
        name.replace("text_encoder.roberta.", "text_encoder."): value
        for name, value in official.items()
        if not name.startswith(("text_encoder.lm_", "bbox_head"))
    }
    tuned["cls_head.0.weight"] = torch.ones(3, 3)
    torch.save(tuned, tmp_path / "tuned.pth")
    report = to_xfm_folder(tmp_path / "tuned.pth", tmp_path / "ours", cfg)
    assert any("task head" in line and "cls_head.0.weight" in line for line in report)
    to_official_file(tmp_path / "ours", tmp_path / "back.pth")
    read = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert read.keys() == tuned.keys()
    assert all(torch.equal(read[name], tuned[name]) for name in tuned)


def test_dropping_unused_weights(source: Path, cfg: XFMConfig, tmp_path: Path) -> None:
    report = to_xfm_folder(source, tmp_path / "ours", cfg, keep_unused=False)
    assert any(line.startswith("dropped:") for line in report)
    assert not (tmp_path / "ours" / "unused.safetensors").exists()
    report = to_official_file(tmp_path / "ours", tmp_path / "back.th")
    assert any(line.startswith("dead weights omitted") for line in report)


def test_another_image_size(source: Path, cfg: XFMConfig, tmp_path: Path) -> None:
    report = to_xfm_folder(source, tmp_path / "ours", cfg, image_size=56)
    assert any("from 5x5 to 7x7" in line for line in report)
    assert XFM.from_pretrained(tmp_path / "ours").config.image_size == 56
    report = to_xfm_folder(tmp_path / "ours", tmp_path / "smaller", cfg, image_size=16)
    assert any("from 7x7 to 2x2" in line for line in report)
    assert XFM.from_pretrained(tmp_path / "smaller").config.num_masking_patches == 4


def test_wrong_sizes_and_foreign_files_write_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vision_width=48"):
        to_xfm_folder(source, tmp_path / "ours", XFMConfig.preset("base"))
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"foreign.pt"):
        to_xfm_folder(tmp_path / "foreign.pt", tmp_path / "ours", XFMConfig.preset("base"))
    assert not (tmp_path / "ours").exists()
