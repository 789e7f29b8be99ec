"""Models of sentence-transformers behind the service answer what the library computes, on the routes of all APIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.library_models import write_clip, write_embedder, write_reranker, write_sparse
from tests.serve.conftest import Running, data_url, photo, running, scores

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = [
    "a red circle",
    "",
    "two blue squares left of a green circle, " * 9,
    "a cross",
    "\u00e9t\u00e9 \u6f22",
]
QUERY, DOCUMENTS = "a red circle", ["a circle", "two blue squares", "a cross, " * 20]
WRITERS = {
    "embedder": write_embedder,
    "reranker": write_reranker,
    "sparse": write_sparse,
    "clip": write_clip,
    "classifier": lambda folder: write_reranker(folder, labels=3),
}


def close(values: Any, expected: Any, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(values, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def several(folders: dict[str, Path]) -> Iterator[Running]:
    """Serve all models on one port."""
    from xfm_fast.serve import ServiceOptions, SourceOptions, open_service

    source = SourceOptions(device="cpu", name=tuple(folders))
    paths = [str(path) for path in folders.values()]
    with running(open_service(source, ServiceOptions(port=0, timeout=20), paths)) as service:
        yield service


@pytest.fixture(scope="module")
def embedder(folders: dict[str, Path]) -> Any:
    return sentence_transformers.SentenceTransformer(str(folders["embedder"]), device="cpu")


@pytest.fixture(scope="module")
def reranker(folders: dict[str, Path]) -> Any:
    return sentence_transformers.CrossEncoder(str(folders["reranker"]), device="cpu")


def ask(service: Running, path: str, **body: Any) -> Any:
    reply = service.post(path, body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_openai_embeddings(several: Running, embedder: Any) -> None:
    expected = embedder.encode(TEXTS)
    reply = several.post("/v1/embeddings", {"input": TEXTS, "model": "embedder", "user": "me"})
    answer = reply.json()
    close([row["embedding"] for row in answer["data"]], expected)
    assert [row["index"] for row in answer["data"]] == [0, 1, 2, 3, 4]
    counts = embedder.preprocess(TEXTS)["attention_mask"].sum().item()
    assert answer["usage"] == {"prompt_tokens": counts, "total_tokens": counts}
    assert (answer["truncated"], reply.headers["x-truncated-inputs"]) == (["input[2]"], "1")
    (row,) = ask(several, "/v1/embeddings", input=TEXTS[0], encoding_format="base64")["data"]
    close(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), expected[0])
    (row,) = ask(several, "/v1/embeddings", input=TEXTS[0], dimensions=8)["data"]
    close(row["embedding"], expected[0, :8] / np.linalg.norm(expected[0, :8]))
    reply = several.post("/v1/embeddings", {"input": TEXTS, "truncate": False})
    assert reply.status_code == 422
    assert "input[2] has 92 tokens, and the model reads 48" in reply.json()["message"]


def test_roles_and_prompts(several: Running, embedder: Any) -> None:
    query = embedder.encode_query(TEXTS)
    assert np.abs(query - embedder.encode(TEXTS)).max() > 1e-3
    for body in ({"prompt_name": "query"}, {"task": "retrieval.query"}):
        answer = ask(several, "/v1/embeddings", input=TEXTS, **body)
        close([row["embedding"] for row in answer["data"]], query)
    close(ask(several, "/embed", inputs=TEXTS, prompt_name="query"), query)
    close(ask(several, "/v1/embed", texts=TEXTS, input_type="search_query")["embeddings"], query)
    reply = several.post("/embed", {"inputs": "a", "prompt_name": "question"})
    assert (reply.status_code, reply.json()["error_type"]) == (422, "Validation")
    assert "no prompt 'question'; give one of query, document" in reply.json()["error"]


def test_cohere_embed(several: Running, embedder: Any) -> None:
    expected = embedder.encode(TEXTS)
    types = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    answer = ask(
        several, "/v2/embed", texts=TEXTS, input_type="search_document", embedding_types=types
    )
    embeddings = answer["embeddings"]
    close(embeddings["float"], expected)
    close(np.array(embeddings["int8"]) / 127, expected, 0.51 / 127)
    close(np.array(embeddings["uint8"]) - 128, embeddings["int8"])
    for name in ("binary", "ubinary"):
        assert (
            embeddings[name]
            == sentence_transformers.util.quantize_embeddings(expected, name).tolist()
        )
    assert answer["response_type"] == "embeddings_by_type"
    assert (answer["texts"], answer["meta"]["api_version"]) == (TEXTS, {"version": "2"})
    answer = ask(several, "/v1/embed", texts=TEXTS)
    assert answer["response_type"] == "embeddings_floats"
    close(answer["embeddings"], expected)
    (short,) = ask(several, "/v2/embed", texts=TEXTS[:1], output_dimension=8)["embeddings"]["float"]
    close(short, expected[0, :8] / np.linalg.norm(expected[0, :8]))
    assert several.post("/v2/embed", {"texts": TEXTS, "truncate": "NONE"}).status_code == 422
    words = TEXTS[2].split()
    left = ask(several, "/v2/embed", texts=["a cross " * 9 + TEXTS[2]], truncate="START")
    # 46 of the text's own tokens, the last.
    tail = ask(several, "/tokenize", inputs=TEXTS[2], add_special_tokens=False)[0][-46:]
    close(left["embeddings"]["float"][0], embedder.encode(TEXTS[2][tail[0]["start"] :]))
    assert len(words) > 40
    assert several.post("/v2/embed", {"texts": ["a"], "images": ["b"]}).status_code == 422


def test_tei_embed(several: Running, embedder: Any) -> None:
    expected = embedder.encode(TEXTS)
    for path in ("/embed", "/"):
        reply = several.post(path, {"inputs": TEXTS})
        close(reply.json(), expected)
        assert reply.headers["x-truncated-inputs"] == "1"
    close(
        ask(several, "/embed", inputs=TEXTS[0], dimensions=8, normalize=False)[0], expected[0, :8]
    )
    compared = ask(several, "/similarity", inputs={"source_sentence": TEXTS[0], "sentences": TEXTS})
    close(compared, expected @ expected[0])
    reply = several.post("/embed", {"inputs": TEXTS, "truncate": False})
    assert (reply.status_code, reply.json()["error_type"]) == (413, "Validation")
    assert "inputs[2] has 92 tokens" in reply.json()["error"]


def test_rerank_and_score(several: Running, reranker: Any) -> None:
    pairs = [(QUERY, text) for text in DOCUMENTS]
    logits = reranker.predict(pairs, activation_fn=torch.nn.Identity())
    expected = 1 / (1 + np.exp(-logits))
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        answer = ask(several, path, query=QUERY, documents=DOCUMENTS, return_documents=True)
        close(scores(answer), expected)
        order = [result["index"] for result in answer["results"]]
        assert order == np.argsort(-expected, kind="stable").tolist()
        assert answer["results"][0]["document"] == {"text": DOCUMENTS[order[0]]}
        assert (answer["truncated"], answer["scoring"]) == (["documents[2]"], "probability")
    ranks = ask(several, "/rerank", query=QUERY, texts=DOCUMENTS, raw_scores=True, return_text=True)
    assert [rank["text"] for rank in ranks] == [DOCUMENTS[index] for index in order]
    close([rank["score"] for rank in ranks], logits[order], 2e-6 * float(np.abs(logits).max()))
    assert "score" in ask(several, "/rerank", query=QUERY, texts=DOCUMENTS)[0]
    answer = ask(several, "/v1/score", text_1=QUERY, text_2=DOCUMENTS)
    close([row["score"] for row in answer["data"]], reranker.predict(pairs))
    answer = ask(several, "/score", text_1=DOCUMENTS[:2], text_2=DOCUMENTS[1:])
    close(
        [row["score"] for row in answer["data"]],
        reranker.predict([*zip(DOCUMENTS[:2], DOCUMENTS[1:], strict=True)]),
    )
    reply = several.post("/rerank", {"query": QUERY, "texts": DOCUMENTS, "truncate": False})
    assert (reply.status_code, reply.json()["error_type"]) == (413, "Validation")
    assert (
        several.post("/rerank", {"query": QUERY, "texts": []}).json()["error_type"] == "Validation"
    )


def test_an_embedder_ranks_by_similarity(several: Running, embedder: Any) -> None:
    answer = ask(several, "/v1/rerank", model="embedder", query=QUERY, documents=DOCUMENTS)
    features = embedder.encode_document(DOCUMENTS)
    close(scores(answer), (1 + features @ embedder.encode_query(QUERY)) / 2)
    assert answer["scoring"] == "similarity"


def test_labels(several: Running, folders: dict[str, Path]) -> None:
    plain = sentence_transformers.CrossEncoder(str(folders["classifier"]), device="cpu")
    expected = plain.predict([("a red circle", "a circle")], apply_softmax=True)[0]
    rows = ask(several, "/predict", inputs=["a red circle", "a circle"], model="classifier")
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    close([row["score"] for row in rows], np.sort(expected)[::-1])
    assert rows[0]["label"] == f"LABEL_{expected.argmax()}"
    batch = ask(
        several,
        "/predict",
        inputs=[["a red circle", "a circle"], ["a"]],
        model="classifier",
        raw_scores=True,
    )
    assert len(batch) == 2
    single = plain.model(**plain.tokenizer("a", return_tensors="pt")).logits[0]
    close(sorted(row["score"] for row in batch[1]), single.sort().values.detach(), 1e-4)
    assert several.post("/predict", {"inputs": [["a", "b", "c"]]}).status_code == 422
    assert (
        several.post(
            "/v1/rerank", {"model": "classifier", "query": "a", "documents": ["b"]}
        ).status_code
        == 422
    )


def test_sparse_features(several: Running, folders: dict[str, Path]) -> None:
    plain = sentence_transformers.SparseEncoder(str(folders["sparse"]), device="cpu")
    expected = plain.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    dense = np.zeros_like(expected)
    for row, entries in zip(dense, ask(several, "/embed_sparse", inputs=TEXTS), strict=True):
        row[[entry["index"] for entry in entries]] = [entry["value"] for entry in entries]
    close(dense, expected, 2e-6 * expected.max())
    assert several.post("/v1/embeddings", {"input": "a", "model": "sparse"}).status_code == 422


def test_images_and_texts_of_clip(several: Running, folders: dict[str, Path]) -> None:
    plain = sentence_transformers.SentenceTransformer(str(folders["clip"]), device="cpu")
    images = [Image.open(io.BytesIO(photo(seed))).convert("RGB") for seed in range(3)]
    expected = plain.encode(images, normalize_embeddings=True)
    texts = plain.encode(TEXTS[:1], normalize_embeddings=True)
    urls = [data_url(photo(seed)) for seed in range(3)]
    items = [{"image": url} for url in urls]
    answer = ask(several, "/v1/embeddings", input=[*items, TEXTS[0]], model="clip")
    close([row["embedding"] for row in answer["data"]], np.concatenate([expected, texts]))
    answer = ask(several, "/v2/embed", images=urls, model="clip", embedding_types=["float"])
    close(answer["embeddings"]["float"], expected)
    answer = ask(several, "/v1/rerank", query=TEXTS[0], documents=items, model="clip")
    close(scores(answer), (1 + expected @ texts[0]) / 2)
    damaged = {"image": data_url(photo(1)[:200])}
    reply = several.post("/v1/embeddings", {"input": [damaged], "model": "clip"})
    assert (reply.status_code, "input[0]" in reply.json()["message"]) == (422, True)
    reply = several.post("/v1/embeddings", {"input": [items[0]], "model": "embedder"})
    assert "input[0] is image, and embedder reads text" in reply.json()["message"]


def test_names_choose_models(several: Running) -> None:
    assert [model["id"] for model in several.get("/v1/models").json()["data"]] == [*WRITERS]
    reply = several.post("/v1/embeddings", {"input": "a", "model": "gpt"})
    assert reply.status_code == 404
    assert "'embedder', 'reranker', 'sparse', 'clip', 'classifier'" in reply.json()["message"]
    assert ask(several, "/v1/rerank", query="a", documents=["b"])["model"] == "reranker"
    info = several.get("/info?model=reranker").json()
    assert info["model_type"] == {
        "reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    }
    assert several.get("/info").json()["max_input_length"] == 48
    several.post("/v1/embeddings", {"input": "a"})
    assert 'xfm_batch_requests_count{model="embedder"}' in several.get("/metrics").text


def test_tokens(several: Running, embedder: Any) -> None:
    text = "a red circle"
    (tokens,) = ask(several, "/tokenize", inputs=text)
    assert [token["id"] for token in tokens] == embedder.tokenizer(text)["input_ids"]
    assert [text[token["start"] : token["stop"]] for token in tokens[1:-1]] == text.split()
    assert (tokens[0]["special"], tokens[0]["start"]) == (True, None)
    assert several.post("/tokenize", {"inputs": ["a" * 40_000]}).status_code == 422


def test_many_threads_share_the_tokenizer(several: Running, embedder: Any) -> None:
    """Long texts are read in threads, short ones in the event loop, all at once."""
    batches = [
        [f"{text} {index}" * (1 + 40 * (index % 2)) for text in TEXTS] for index in range(24)
    ]
    expected = [embedder.encode(batch) for batch in batches]

    def embed(batch: list[str]) -> Any:
        return ask(several, "/embed", inputs=batch + ["a"] * 100)

    with ThreadPoolExecutor(12) as threads:
        for rows, features in zip(threads.map(embed, batches), expected, strict=True):
            close(rows[: len(features)], features, 5e-6)


def test_without_a_fast_tokenizer_the_answers_are_the_same(
    folders: dict[str, Path], several: Running
) -> None:
    """The fast path and its slow twin."""
    from xfm_fast.encoders import EncoderSource, open_encoder
    from xfm_fast.serve.library import LibraryModel
    from xfm_fast.serve.model import Reading

    contents: Any = [*TEXTS]
    names = [f"input[{index}]" for index in range(len(contents))]
    for name, pairs in (("embedder", ()), ("reranker", ((0, 3), (2, 0), (1, 1)))):
        encoder: Any = open_encoder(EncoderSource(str(folders[name]), device="cpu"))
        model = LibraryModel(encoder)
        assert model.tokenizer is not None
        reading = Reading("query", pairs=pairs, scoring="logit")
        works, results = [], []
        for _ in range(2):
            work = model.read(contents, names, reading, lambda: None)
            works.append((work.tokens, work.truncated))
            results += model.answer([work])
            model.tokenizer = None
        close(results[0], results[1], 2e-6 * float(np.abs(results[1]).max()))
        assert works[0] == works[1] or name == "reranker"


def test_a_request_is_limited_in_tokens(folders: dict[str, Path]) -> None:
    from xfm_fast.serve import ServiceOptions, SourceOptions, open_service

    source = SourceOptions(str(folders["embedder"]), device="cpu")
    with running(open_service(source, ServiceOptions(port=0, max_tokens=10))) as service:
        assert service.post("/embed", {"inputs": ["a"] * 3}).status_code == 200
        reply = service.post("/embed", {"inputs": ["a"] * 4})
        assert (reply.status_code, "12 tokens, over the limit of 10" in reply.text) == (422, True)


def test_work_of_an_ended_request_stops_between_passes(folders: dict[str, Path]) -> None:
    from dataclasses import replace

    from xfm_fast.encoders import EncoderSource, open_encoder
    from xfm_fast.serve.library import LibraryModel
    from xfm_fast.serve.model import Reading

    encoder: Any = open_encoder(EncoderSource(str(folders["embedder"]), device="cpu"))
    model, passes = LibraryModel(encoder), []
    texts: Any = ["a b c d e f g " * 9] * 400
    work = model.read(texts, [""] * 400, Reading(), lambda: None)
    run = encoder.run
    encoder.run = lambda inputs: passes.append(1) or run(inputs)
    (result,) = model.answer([replace(work, needed=lambda: len(passes) < 2)])
    assert "ended" in str(result)
    assert len(passes) == 2
