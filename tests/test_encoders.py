"""`open_encoder` opens every model of sentence-transformers, and computes what the library computes."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.library_models import write_clip, write_embedder, write_reranker, write_sparse
from tests.search.conftest import write_model, write_picture
from xfm_fast.encoders import (
    Encoder,
    EncoderSource,
    LibraryEncoder,
    XFMEncoder,
    is_library_model,
    open_encoder,
)
from xfm_fast.errors import CheckpointError, InputError
from xfm_fast.loading import Source
from xfm_fast.models.xfm import XFM

sentence_transformers = pytest.importorskip("sentence_transformers")
TEXTS = ["a red circle", "", "two blue squares left of a green circle, " * 9, "a cross"]
PAIRS = [("a red circle", "a circle"), ("a cross", "two blue squares left of a green circle")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Path:
    return write_embedder(folder / "texts")


def opened(path: Path, **options: object) -> LibraryEncoder:
    encoder = open_encoder(EncoderSource(str(path), device="cpu", **options))  # pyright: ignore[reportArgumentType]
    assert isinstance(encoder, LibraryEncoder)
    return encoder


def assert_close(features: Tensor, expected: object, tolerance: float = 2e-6) -> None:
    reference = torch.as_tensor(expected)
    torch.testing.assert_close(
        features, reference, atol=tolerance * float(reference.abs().max()), rtol=0
    )


def test_texts_are_embedded_as_by_the_library(embedder: Path) -> None:
    plain, fast = sentence_transformers.SentenceTransformer(str(embedder)), opened(embedder)
    assert (fast.use, fast.width, fast.modalities) == ("embedding", 64, ("text",))
    # The pooler, which no text is read from, is never called.
    assert "94% accelerated in fp32" in fast.origin
    assert_close(fast.run(fast.prepare(TEXTS)), plain.encode(TEXTS))
    assert_close(fast.run(fast.prepare(TEXTS, "query")), plain.encode_query(TEXTS))
    assert_close(fast.run(fast.prepare(TEXTS, "document")), plain.encode_document(TEXTS))
    assert abs(plain.encode_query(TEXTS) - plain.encode(TEXTS)).max() > 1e-3


def test_prompts_are_chosen_by_name_and_role(embedder: Path) -> None:
    encoder = opened(embedder)
    assert encoder.prompts == {"query": "query: "}
    assert encoder.prompt() is None
    assert encoder.prompt("query") == encoder.prompt(name="query") == "query: "
    assert encoder.prompt("query", "document") is None
    with pytest.raises(InputError, match=r"has no prompt 'question'; give one of query, document"):
        encoder.prompt(name="question")


def test_shortened_features_have_their_width(embedder: Path, tmp_path: Path) -> None:
    plain = sentence_transformers.SentenceTransformer(str(embedder), truncate_dim=24)
    plain.save_pretrained(str(tmp_path / "short"))
    fast = opened(tmp_path / "short")
    assert fast.width == 24
    assert_close(fast.run(fast.prepare(TEXTS)), plain.encode(TEXTS))
    normalised = fast.run(fast.prepare(TEXTS), normalise=True)
    assert_close(normalised, plain.encode(TEXTS, normalize_embeddings=True))


def test_pairs_are_scored_as_by_the_library(folder: Path) -> None:
    path = write_reranker(folder / "pairs")
    plain, fast = sentence_transformers.CrossEncoder(str(path)), opened(path)
    assert (fast.use, fast.width) == ("ranking", 1)
    assert_close(torch.from_numpy(fast.model.predict(PAIRS)), plain.predict(PAIRS))
    raw = plain.predict(PAIRS, activation_fn=torch.nn.Identity())
    assert_close(fast.run(fast.prepare(PAIRS))[:, 0], raw)


def test_sparse_features_are_those_of_the_library(folder: Path) -> None:
    path = write_sparse(folder / "sparse")
    plain, fast = sentence_transformers.SparseEncoder(str(path)), opened(path)
    expected = plain.encode(TEXTS, convert_to_sparse_tensor=False)
    assert (fast.use, fast.width) == ("sparse", expected.shape[1])
    assert_close(fast.run(fast.prepare(TEXTS)), expected)


def test_clip_embeds_texts_and_images(folder: Path, tmp_path: Path) -> None:
    path = write_clip(folder / "clip")
    plain, fast = sentence_transformers.SentenceTransformer(str(path)), opened(path)
    images = [Image.open(write_picture(tmp_path / f"{index}.png", index)) for index in range(3)]
    assert (fast.modalities, fast.width) == (("text", "image"), 32)
    assert_close(fast.run(fast.prepare(images)), plain.encode(images))
    assert_close(fast.run(fast.prepare(TEXTS)), plain.encode(TEXTS))


def test_an_xfm_is_an_encoder_too(folder: Path, tmp_path: Path) -> None:
    path = write_model(folder / "xfm", seed=0)
    encoder, model = open_encoder(path), XFM.from_pretrained(path)
    assert isinstance(encoder, XFMEncoder)
    assert (encoder.modalities, encoder.width) == (("text", "image"), model.config.embed_dim)
    pictures = [write_picture(tmp_path / f"{index}.png", index) for index in range(2)]
    texts = ["a red circle", "a cross"]
    assert torch.equal(encoder.run(encoder.prepare(texts)), model.encode(texts))
    assert torch.equal(encoder.run(encoder.prepare(pictures)), model.encode(pictures))


def test_a_fingerprint_is_of_the_weights_and_not_of_how_they_run(
    embedder: Path, tmp_path: Path
) -> None:
    fingerprint = opened(embedder).fingerprint
    for options in {"plain": True}, {"dtype": "bf16"}, {"dtype": "int8"}:
        assert opened(embedder, **options).fingerprint == fingerprint
    edited = shutil.copytree(embedder, tmp_path / "edited")
    settings = json.loads((edited / "config_sentence_transformers.json").read_text())
    settings["prompts"]["document"] = "passage: "
    (edited / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert opened(edited).fingerprint != fingerprint


def test_threads_share_a_tokenizer(embedder: Path) -> None:
    """A tokenizer whose settings one thread changes while another encodes panics: "Already borrowed"."""
    encoder = opened(embedder)
    texts = [" ".join(TEXTS)] * 64
    expected, errors = encoder.token_ids(texts), list[BaseException]()
    assert len(expected[0]) > (encoder.max_tokens or 0)

    def repeat(call: Callable[[], object]) -> None:
        try:
            for _ in range(20):
                call()
        except BaseException as error:  # a panic of Rust is no Exception
            errors.append(error)

    def count() -> None:
        assert encoder.token_ids(texts) == expected

    calls = [count, count, lambda: encoder.prepare(texts), lambda: encoder.prepare(TEXTS)]
    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "modules.json"])
def test_a_damaged_model_is_named(embedder: Path, tmp_path: Path, name: str) -> None:
    broken = shutil.copytree(embedder, tmp_path / "broken")
    (broken / name).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=r"broken cannot be opened by sentence-transformers"):
        opened(broken)


def test_options_of_xfm_do_not_apply(embedder: Path) -> None:
    with pytest.raises(InputError, match=r"--image-size applies to X-FM"):
        opened(embedder, image_size=64)


def test_what_is_a_model_of_the_library(embedder: Path, folder: Path, tmp_path: Path) -> None:
    xfm = write_model(tmp_path / "xfm", seed=1)
    sources: dict[str, bool] = {str(embedder): True, str(xfm): False, str(tmp_path): True}
    for name, is_library in sources.items():
        assert is_library_model(Source(name)) is is_library
    assert not is_library_model(Source(random="tiny"))
    encoders: list[Encoder] = [open_encoder(embedder), open_encoder(xfm)]
    assert [type(encoder) for encoder in encoders] == [LibraryEncoder, XFMEncoder]
