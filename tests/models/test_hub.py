"""Models by the name that they have on the Hugging Face Hub, with the Hub played by a folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, StorageError, UnavailableError
from xfm_fast.models.auto import register_auto_classes
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def model() -> XFM:
    tokenizer = CaptionTokenizer.train_on_texts(["a dog"], 300)
    made = XFM(XFMConfig.preset("tiny", vocab_size=tokenizer.vocab_size)).eval()
    made.tokenizer = tokenizer
    return made


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the models of the Hub lie."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            if name.startswith("closed/"):
                raise OSError("403 Forbidden\nwith a long page")
            (root / name).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return f"hub://{repo_id}"

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if not (root / name).is_dir():
            raise OSError(f"404 {name}")
        assert "model.safetensors" in allow_patterns
        return str(root / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return root


def test_pushed_and_fetched(hub: Path, model: XFM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert model.push_to_hub("someone/xfm-tiny") == "hub://someone/xfm-tiny"
    assert {path.name for path in (hub / "someone/xfm-tiny").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    fetched = XFM.from_pretrained("someone/xfm-tiny")
    torch.testing.assert_close(fetched.encode("a dog"), model.encode("a dog"))


def test_a_folder_comes_before_a_name(hub: Path, model: XFM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("runs/model")
    assert XFM.from_pretrained("runs/model").config == model.config


def test_errors_name_the_remedy(hub: Path, model: XFM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"someone/nothing is no folder here, and cannot be fetched.*404"):
        XFM.from_pretrained("someone/nothing")
    with pytest.raises(CheckpointError, match="is no folder"):
        XFM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(StorageError, match=r"closed/xfm could not be pushed .*403 Forbidden\)"):
        model.push_to_hub("closed/xfm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="install huggingface_hub"):
        XFM.from_pretrained("someone/xfm-tiny")
    with pytest.raises(UnavailableError, match="pip install huggingface_hub"):
        model.push_to_hub("someone/xfm-tiny")


def test_auto_model(model: XFM, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    register_auto_classes()
    register_auto_classes()
    assert transformers.AutoConfig.from_pretrained(tmp_path).embed_dim == model.config.embed_dim
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, XFM)
    torch.testing.assert_close(loaded.encode("a dog"), model.encode("a dog"))
    assert transformers.AutoModel.from_pretrained(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="device_map"):
        transformers.AutoModel.from_pretrained(tmp_path, device_map="auto")
