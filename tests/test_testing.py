"""The bundled photographs and folders of users, good and bad."""

import json
from pathlib import Path

import pytest
from PIL import Image

from xfm_fast.testing import bundled, from_files
from xfm_fast.tokenizer import CaptionTokenizer


def test_bundled_photographs() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    collection = bundled()
    assert not collection.skipped
    assert len(collection.names) >= 18
    assert collection.pixels([0, 1], 32).shape == (2, 3, 32, 32)
    texts = collection.texts(200)
    assert set(texts) == set(collection.captions)
    # As many tokens as the captions of COCO.
    lengths = CaptionTokenizer.train_on_texts(texts, 50265).encode(texts)[1].sum(1)
    assert (lengths.min() >= 10, lengths.max() <= 16) == (True, True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "sub/b.png"):
        Image.effect_noise((30, 20), 60).convert("RGB").save(tmp_path / name)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:400])
    records = [
        {"image": "a.jpg", "caption": "a noisy picture"},
        {"image": "sub/b.png", "caption": ["another one", "?!", "with two captions"]},
        {"image": "broken.jpg", "caption": "half a file"},
        {"image": "absent.png", "caption": "no file"},
        {"image": "a.jpg", "caption": "second caption of a"},
    ]
    (tmp_path / "captions.json").write_text(json.dumps(records))
    return tmp_path


def test_a_folder_of_photographs(folder: Path) -> None:
    """Forms of collections are tested in tests/data; here, what is used of them and what is skipped."""
    collection = from_files(folder)
    assert collection.names == ["a.jpg", "sub/b.png"]
    assert collection.captions == [
        "a noisy picture",
        "second caption of a",
        "another one",
        "with two captions",
    ]
    assert collection.photo_of == [0, 0, 1, 1]
    assert collection.texts(3) == ["a noisy picture", "another one", "second caption of a"]
    assert {name for name, _ in collection.skipped} >= {"sub/b.png", "broken.jpg", "absent.png"}


def test_an_installed_library_that_cannot_be_imported_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_broken.py").write_text("raise ImportError('of a test')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="of a test"):
        pytest.importorskip("made_up_broken", exc_type=ImportError)
    with pytest.raises(pytest.skip.Exception):
        pytest.importorskip("made_up_absent.part")
