"""Answers are those of the model used offline, in the shapes that published clients read."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.serve.conftest import Running, Start, data_url, image, photo, running
from xfm_fast.checkpoint.files import TASK_FILE
from xfm_fast.models.xfm import XFM
from xfm_fast.search import SearchModel, Source
from xfm_fast.search.query import match_images
from xfm_fast.serve.model import load
from xfm_fast.serve.options import ServiceOptions, SourceOptions
from xfm_fast.tasks.reranking import RANKS

CAPTIONS = ["a red circle", "Two blue squares, left of a triangle!", "green", "a yellow star above a circle"]


def pictures(folder: Path, *seeds: int) -> list[Path]:
    found = []
    for seed in seeds:
        path = folder / f"{seed}.png"
        path.write_bytes(photo(seed))
        found.append(path)
    return found


def scores(answer: Any) -> list[float]:
    """Relevance in the order of the documents."""
    return [each["relevance_score"] for each in sorted(answer["results"], key=lambda each: each["index"])]


def test_captions_of_an_image_rank_as_offline(served: Running, model: XFM, tmp_path: Path) -> None:
    (path,) = pictures(tmp_path, 1)
    expected = model.match(path, CAPTIONS).tolist()
    answer = served.post("/v1/rerank", {"query": image(1), "documents": CAPTIONS}).json
    np.testing.assert_allclose(scores(answer), expected, rtol=0, atol=1e-5)
    assert np.std(expected) > 1e-3
    assert [each["index"] for each in answer["results"]] == np.argsort(-np.array(expected), kind="stable").tolist()
    assert answer["scoring"] == "match"
    assert "document" not in answer["results"][0]
    assert "warning" not in answer


def test_images_of_a_caption_rank_as_offline(served: Running, model: XFM, tmp_path: Path) -> None:
    expected = [float(model.match(path, CAPTIONS[1])) for path in pictures(tmp_path, 1, 2, 3)]
    asked = {
        "model": "tiny-xfm", "query": CAPTIONS[1], "documents": [image(1), image(2), image(3)], "top_n": 2,
        "return_documents": True,
    }  # fmt: skip
    for _ in range(2):
        # The second time the memories are those of the first.
        answer = served.post("/v1/rerank", asked).json
        best = np.argsort(-np.array(expected), kind="stable")[:2].tolist()
        assert [each["index"] for each in answer["results"]] == best
        found = [each["relevance_score"] for each in answer["results"]]
        np.testing.assert_allclose(found, [expected[place] for place in best], rtol=0, atol=1e-5)
        assert answer["results"][0]["document"] == image(best[0] + 1)


def test_the_rule_that_ranks_is_named_or_recorded(weights: Path, model: XFM, tmp_path: Path) -> None:
    from xfm_fast.serve import Service

    paths = pictures(tmp_path, 1, 2, 3)
    opened = SearchModel(model, Source(), "")
    logits = match_images(opened, [Image.open(path).convert("RGB") for path in paths], CAPTIONS[1], 3)[:, 1]
    similarity = model.similarity(paths, CAPTIONS[1])
    expected = {"sum": (logits + similarity).tolist(), "similarity": ((1 + similarity) / 2).tolist()}
    run = shutil.copytree(weights, tmp_path / "run")
    (run / TASK_FILE).write_text('{"format": 1, "task": {"kind": "retrieval", "rank": "sum"}}')
    options = ServiceOptions(port=0, drain=5, cache_mb=64)
    documents = [image(seed) for seed in (1, 2, 3)]
    for rank in (None, *RANKS):
        scoring = rank or "sum"
        served = load(run, SourceOptions(device="cpu", rank=rank), 64 << 20)
        with running(Service(served, options)) as service:
            answer = service.post("/v1/rerank", {"query": CAPTIONS[1], "documents": documents}).json
            pairs = service.post("/v1/score", {"text_1": CAPTIONS[1], "text_2": documents}).json
        assert answer["scoring"] == pairs["scoring"] == scoring
        if scoring in expected:
            np.testing.assert_allclose(scores(answer), expected[scoring], rtol=0, atol=1e-5)
            np.testing.assert_allclose([each["score"] for each in pairs["data"]], expected[scoring], rtol=0, atol=1e-5)


def test_two_of_a_kind_are_compared_by_features(served: Running, model: XFM, tmp_path: Path) -> None:
    texts = model.encode(CAPTIONS)
    answer = served.post("/rerank", {"query": CAPTIONS[0], "documents": CAPTIONS}).json
    np.testing.assert_allclose(scores(answer), (1 + texts @ texts[0]) / 2, rtol=0, atol=1e-5)
    assert answer["scoring"] == "similarity"
    assert answer["results"][0]["index"] == 0
    images = model.encode(pictures(tmp_path, 1, 2))
    answer = served.post("/rerank", {"query": image(1), "documents": [image(1), image(2)]}).json
    np.testing.assert_allclose(scores(answer), (1 + images @ images[0]) / 2, rtol=0, atol=1e-5)


def test_embeddings_are_those_of_encode(served: Running, model: XFM, tmp_path: Path) -> None:
    texts, images = model.encode(CAPTIONS).numpy(), model.encode(pictures(tmp_path, 4, 5)).numpy()
    answer = served.post("/v1/embeddings", {"input": [CAPTIONS[0], image(4), image(5), *CAPTIONS[1:]]}).json
    rows = [each["embedding"] for each in answer["data"]]
    expected = np.concatenate([texts[:1], images, texts[1:]])
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-5)
    assert [each["index"] for each in answer["data"]] == list(range(6))
    asked = {"input": CAPTIONS[0], "encoding_format": "base64", "dimensions": model.config.embed_dim}
    encoded = served.post("/v1/embeddings", asked).json["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(encoded), "<f4"), texts[0], rtol=0, atol=1e-5)


def test_pairs_are_scored_one_with_many_and_side_by_side(served: Running, model: XFM, tmp_path: Path) -> None:
    first, second = pictures(tmp_path, 1, 2)
    answer = served.post("/v1/score", {"text_1": image(1), "text_2": CAPTIONS}).json
    found = [each["score"] for each in answer["data"]]
    np.testing.assert_allclose(found, model.match(first, CAPTIONS), rtol=0, atol=1e-5)
    asked = {"queries": CAPTIONS[:2], "documents": [image(1), image(2)]}
    found = [each["score"] for each in served.post("/score", asked).json["data"]]
    expected = [float(model.match(first, CAPTIONS[0])), float(model.match(second, CAPTIONS[1]))]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    one, other = model.encode(CAPTIONS[:2])
    answer = served.post("/v1/score", {"text_1": CAPTIONS[0], "text_2": CAPTIONS[1]}).json
    assert answer["data"][0]["score"] == pytest.approx(float((1 + one @ other) / 2), abs=1e-5)


def test_images_come_in_every_form_that_clients_send(served: Running) -> None:
    url = data_url(photo(1))
    forms = [
        {"image": url}, {"image": base64.b64encode(photo(1)).decode()}, {"image": data_url(photo(1), "")},
        {"content": [{"type": "image_url", "image_url": {"url": url}}]},
    ]  # fmt: skip
    answer = served.post("/v1/rerank", {"query": {"text": "a red circle"}, "documents": forms}).json
    assert len(set(scores(answer))) == 1
    for kind in ("JPEG", "WEBP"):
        asked = {"query": "a red circle", "documents": [{"image": data_url(photo(1, kind=kind), f"image/{kind}")}]}
        assert served.post("/v1/rerank", asked).status == 200


def test_requests_that_come_together_are_answered_as_alone(start: Start, model: XFM, tmp_path: Path) -> None:
    with start(batch_wait_ms=50.0) as service:
        asked = [
            ("/v1/rerank", {"query": image(seed), "documents": CAPTIONS[seed % 3 :]}) for seed in range(6)
        ] + [("/v1/embeddings", {"input": CAPTIONS[seed]}) for seed in range(4)]  # fmt: skip
        alone = [service.post(path, content).json for path, content in asked]
        together: list[Any] = [None] * len(asked)

        def ask(place: int) -> None:
            together[place] = service.post(*asked[place]).json

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for one, company, (path, _) in zip(alone, together, asked, strict=True):
            if path == "/v1/rerank":
                np.testing.assert_allclose(scores(company), scores(one), rtol=0, atol=1e-5)
            else:
                np.testing.assert_allclose(
                    company["data"][0]["embedding"], one["data"][0]["embedding"], rtol=0, atol=1e-5
                )


def test_probes_models_metrics_and_docs(served: Running) -> None:
    assert served.get("/health").json == {"status": "ok", "model": "tiny-xfm", "random_weights": False}
    assert served.get("/ready").json == {"status": "ready"}
    (listed,) = served.get("/v1/models").json["data"]
    assert (listed["id"], listed["heads"]) == ("tiny-xfm", ["contrastive", "matching"])
    served.post("/v1/rerank", {"query": "a red circle", "documents": [image(7)]})
    served.post("/v1/rerank", {"query": "a red circle", "documents": [image(7)]})
    text = served.get("/metrics").body.decode()
    assert 'xfm_requests_total{path="/v1/rerank",status="200"}' in text
    assert 'xfm_images_total{cache="hit"}' in text
    assert "xfm_batch_tokens_bucket" in text
    assert served.get("/docs").headers["content-type"].startswith("text/html")
    assert [served.ask("HEAD", path).status for path in ("/health", "/ready", "/v1/rerank")] == [200, 200, 405]


def test_the_description_is_whole(served: Running) -> None:
    document = served.get("/openapi.json").json
    assert served.get("/openapi.json").json == document
    schemas = document["components"]["schemas"]
    for place in json.dumps(document).split('"$ref": "')[1:]:
        assert place.partition('"')[0].removeprefix("#/components/schemas/") in schemas
    for path, (name, answer) in {
        "/v1/rerank": ("RerankRequest", "RerankAnswer"), "/v1/embeddings": ("EmbeddingsRequest", "EmbeddingsAnswer"),
        "/score": ("ScoreRequest", "ScoreAnswer"),
    }.items():  # fmt: skip
        call = document["paths"][path]["post"]
        assert call["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")
        assert call["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{answer}")
        assert call["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorAnswer")
        reply = served.post(path, schemas[name]["examples"][0])
        assert reply.status == 422, "the example is valid but for its image"
        assert "base64" in reply.message
    for path, methods in document["paths"].items():
        for method in methods:
            # Every address that is described is served, and says what is missing.
            status = served.ask(method.upper(), path).status
            assert status in (200, 415), path


def test_random_weights_warn(start: Start) -> None:
    from tests.serve.conftest import running
    from xfm_fast.serve import Service, ServiceOptions, SourceOptions, load

    model = load(None, SourceOptions(random="tiny", device="cpu"), 0)
    with running(Service(model, ServiceOptions(port=0))) as service:
        answer = service.post("/v1/embeddings", {"input": "a dog"}).json
    assert "THE WEIGHTS ARE RANDOM" in answer["warning"]
    assert torch.tensor(answer["data"][0]["embedding"]).norm() == pytest.approx(1, abs=1e-4)
