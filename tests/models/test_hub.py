"""Models by the name that they have on the Hugging Face Hub, played by a folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, DataError, InputError, StorageError, UnavailableError
from xfm_fast.models.processor import XFMProcessor
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
        def __init__(self, token: str | None = None) -> None:
            assert token in (None, "secret")

        def file_exists(self, name: str, file: str) -> bool:
            return (root / name / file).exists()

        def create_repo(self, name: str, **options: Any) -> None:
            if name.startswith("closed/"):
                raise OSError("403 Forbidden\nwith a long page")
            (root / name).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> str:
            assert options.keys() == {"commit_message", "revision", "create_pr"}
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return f"hub://{repo_id}"

    def snapshot(name: str, *, allow_patterns: list[str], revision: str | None = None) -> str:
        if not (root / name).is_dir():
            raise OSError(f"404 {name}")
        assert "model.safetensors" in allow_patterns
        return str(root / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return root


def test_pushed_and_fetched(
    hub: Path, model: XFM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert model.push_to_hub("someone/xfm-tiny") == "hub://someone/xfm-tiny"
    assert {path.name for path in (hub / "someone/xfm-tiny").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "modules.json", "preprocessor_config.json",
        "sentence_bert_config.json", "tokenizer.json"
    }  # fmt: skip
    card = (hub / "someone/xfm-tiny/README.md").read_text()
    assert 'XFM.from_pretrained("someone/xfm-tiny")' in card
    # A card that somebody wrote stays.
    (hub / "someone/xfm-tiny/README.md").write_text("mine")
    model.push_to_hub("someone/xfm-tiny", token="secret", branch="main", create_pr=True)
    assert (hub / "someone/xfm-tiny/README.md").read_text() == "mine"
    fetched = XFM.from_pretrained("someone/xfm-tiny")
    torch.testing.assert_close(fetched.encode("a dog"), model.encode("a dog"))
    pytest.importorskip("transformers")
    from xfm_fast.models import auto_classes

    loaded = auto_classes.XFMModel.from_pretrained("someone/xfm-tiny", local_files_only=False)
    processor = auto_classes.XFMAutoProcessor.from_pretrained("someone/xfm-tiny", subfolder="")
    with torch.no_grad():
        features = loaded(**processor(text=["a dog"], return_tensors="pt")).text_embeds
    torch.testing.assert_close(features[0], model.encode("a dog"))


def test_errors_name_the_remedy(
    hub: Path, model: XFM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"someone/nothing .*404"):
        XFM.from_pretrained("someone/nothing")
    with pytest.raises(StorageError, match=r"closed/xfm .*403"):
        model.push_to_hub("closed/xfm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="install huggingface_hub"):
        XFM.from_pretrained("someone/xfm-tiny")
    with pytest.raises(UnavailableError, match="pip install huggingface_hub"):
        model.push_to_hub("someone/xfm-tiny")


def test_processor(model: XFM, tmp_path: Path) -> None:
    model.tokenizer, kept = None, model.tokenizer
    model.save_pretrained(tmp_path)
    processor = XFMProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer is None
    with pytest.raises(UnavailableError, match="no tokenizer"):
        processor(text="a dog")
    XFMProcessor(model.config, kept).save_pretrained(tmp_path)
    again = XFMProcessor.from_pretrained(tmp_path)
    assert {*again(text="a dog")} == {"input_ids", "attention_mask"}
    for given in ({}, {"images": []}, {"text": []}):
        with pytest.raises(InputError):
            again(**given)
    (tmp_path / "note.png").write_text("a text file")
    with pytest.raises(DataError, match=r"note\.png"):
        again(images=tmp_path / "note.png")
