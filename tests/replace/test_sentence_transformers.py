"""SentenceTransformer and CrossEncoder of sentence-transformers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers", exc_type=ImportError)

from xfm_fast import accelerate, accelerated  # noqa: E402

WORDS = [
    "a",
    "the",
    "dog",
    "cat",
    "sees",
    "red",
    "car",
    "on",
    "blue",
    "sea",
    "two",
    "men",
    "ride",
    "bikes",
]
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
    (place / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    )
    tokenizer = transformers.BertTokenizerFast(
        vocab_file=str(place / "vocab.txt"), vocab=str(place / "vocab.txt")
    )
    tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=1)
    transformers.BertForSequenceClassification(config).save_pretrained(place)
    return place


@pytest.mark.parametrize("unpad", [False, True])
def test_embeddings_and_scores(folder: Path, unpad: bool) -> None:
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    wanted = model.encode(TEXTS, batch_size=3)
    with accelerated(model, unpad=unpad) as report:
        assert {"FusedLayer", "FusedEmbeddings"} <= {entry.fused for entry in report.replaced}
        found = model.encode(TEXTS, batch_size=3)
        copied = pickle.loads(pickle.dumps(model)).encode(TEXTS, batch_size=3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(np.abs(wanted).max()))
    np.testing.assert_array_equal(copied, found)
    np.testing.assert_array_equal(model.encode(TEXTS, batch_size=3), wanted)
    scorer, pairs = (
        sentence_transformers.CrossEncoder(str(folder), device="cpu"),
        [(TEXTS[0], text) for text in TEXTS],
    )
    wanted = scorer.predict(pairs)
    accelerate(scorer, unpad=unpad)
    np.testing.assert_allclose(scorer.predict(pairs), wanted, rtol=0, atol=1e-5)
