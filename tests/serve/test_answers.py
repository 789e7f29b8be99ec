"""Responses are those of the model used offline, in the shapes that published clients read."""

from __future__ import annotations

import asyncio
import base64
import shlex
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.serve.conftest import CAPTIONS, Running, Start, data_url, image, photo, scores
from xfm_fast.checkpoint.files import TASK_FILE
from xfm_fast.encoders import XFMEncoder
from xfm_fast.models.processor import image_pixels
from xfm_fast.models.xfm import XFM
from xfm_fast.search import Source, match_images
from xfm_fast.serve import Service, ServiceOptions, SourceOptions, load

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
CURL, *PROGRAMS = (
    next(block for block in PAGE.split("```text\n") if block.startswith("curl"))
    .split("```")[0]
    .split("\n\n")
)


def close(values: Any, expected: Any) -> None:
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    """Files of the images of seeds 0 to 5."""
    paths = [tmp_path / f"{seed}.png" for seed in range(6)]
    for seed, path in enumerate(paths):
        path.write_bytes(photo(seed))
    return paths


def test_a_rerank_is_as_offline(served: Running, model: XFM, photos: list[Path]) -> None:
    expected = model.match(photos[1], CAPTIONS).tolist()
    answer = served.post("/v1/rerank", {"query": image(1), "documents": CAPTIONS}).json()
    close(scores(answer), expected)
    assert np.std(expected) > 1e-3
    assert [item["index"] for item in answer["results"]] == np.argsort(
        -np.array(expected), kind="stable"
    ).tolist()
    assert answer["scoring"] == "match"
    assert not {"document", "warning"} & {*answer, *answer["results"][0]}
    expected = [float(model.match(path, CAPTIONS[1])) for path in photos[1:4]]
    body = {
        "model": "tiny-xfm", "query": CAPTIONS[1], "documents": [image(1), image(2), image(3)], "top_n": 2,
        "return_documents": True,
    }  # fmt: skip
    for _ in range(2):
        # The second time the memories are those of the first.
        answer = served.post("/v1/rerank", body).json()
        best = np.argsort(-np.array(expected), kind="stable")[:2].tolist()
        assert [item["index"] for item in answer["results"]] == best
        close(
            [item["relevance_score"] for item in answer["results"]],
            [expected[index] for index in best],
        )
        assert answer["results"][0]["document"] == image(best[0] + 1)


def test_the_ranking_rule_is_named_or_recorded(
    start: Start, weights: Path, model: XFM, photos: list[Path], tmp_path: Path
) -> None:
    opened, paths = XFMEncoder(model, Source(), ""), photos[1:4]
    pixels = [image_pixels([path], model.config.image_size) for path in paths]
    logits = match_images(opened, pixels, CAPTIONS[1], 3)[:, 1]
    similarity = model.similarity(paths, CAPTIONS[1])
    expected = {
        "sum": (logits + similarity).tolist(),
        "similarity": ((1 + similarity) / 2).tolist(),
    }
    run = shutil.copytree(weights, tmp_path / "run")
    (run / TASK_FILE).write_text('{"format": 1, "task": {"kind": "retrieval", "rank": "sum"}}')
    documents = [image(seed) for seed in (1, 2, 3)]
    for rank_option, rank in ((None, "sum"), ("similarity", "similarity")):
        with start(run, rank_option) as service:
            answer = service.post(
                "/v1/rerank", {"query": CAPTIONS[1], "documents": documents}
            ).json()
            pairs = service.post("/v1/score", {"text_1": CAPTIONS[1], "text_2": documents}).json()
        assert answer["scoring"] == pairs["scoring"] == rank
        close(scores(answer), expected[rank])
        close([item["score"] for item in pairs["data"]], expected[rank])


def test_two_of_a_kind_are_compared_by_features(
    served: Running, model: XFM, photos: list[Path]
) -> None:
    for features, documents in (
        (model.encode(CAPTIONS), CAPTIONS),
        (model.encode(photos[1:3]), [image(1), image(2)]),
    ):
        answer = served.post("/rerank", {"query": documents[0], "documents": documents}).json()
        close(scores(answer), (1 + features @ features[0]) / 2)
        assert (answer["scoring"], answer["results"][0]["index"]) == ("similarity", 0)


def test_embeddings_are_those_of_encode(served: Running, model: XFM, photos: list[Path]) -> None:
    texts, images = model.encode(CAPTIONS).numpy(), model.encode(photos[4:]).numpy()
    answer = served.post(
        "/v1/embeddings", {"input": [CAPTIONS[0], image(4), image(5), *CAPTIONS[1:]]}
    ).json()
    close(
        [item["embedding"] for item in answer["data"]],
        np.concatenate([texts[:1], images, texts[1:]]),
    )
    assert [item["index"] for item in answer["data"]] == list(range(6))
    body = {
        "input": CAPTIONS[0],
        "encoding_format": "base64",
        "dimensions": model.config.embed_dim,
    }
    encoded = served.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    close(np.frombuffer(base64.b64decode(encoded), "<f4"), texts[0])


def test_pairs_are_scored_one_with_many_and_one_by_one(
    served: Running, model: XFM, photos: list[Path]
) -> None:
    def scores_of(path: str, body: dict[str, Any]) -> list[float]:
        return [item["score"] for item in served.post(path, body).json()["data"]]

    close(
        scores_of("/v1/score", {"text_1": image(1), "text_2": CAPTIONS}),
        model.match(photos[1], CAPTIONS),
    )
    expected = [float(model.match(photos[index], CAPTIONS[index - 1])) for index in (1, 2)]
    close(
        scores_of("/score", {"queries": CAPTIONS[:2], "documents": [image(1), image(2)]}), expected
    )
    first, second = model.encode(CAPTIONS[:2])
    close(
        scores_of("/v1/score", {"text_1": CAPTIONS[0], "text_2": CAPTIONS[1]}),
        [float((1 + first @ second) / 2)],
    )


def test_truncated_texts_are_named(served: Running, model: XFM) -> None:
    """By the words that the model reads, and by its tokens; the answer is that of what it has read."""
    assert model.tokenizer is not None
    lengths = [
        len(*model.tokenizer.encode_ids([" ".join(["zq"] * count)], 99)) for count in range(1, 31)
    ]
    # As many words of several tokens as fit.
    count = sum(length <= 40 for length in lengths)
    assert count < 30
    texts = ["red " * 30, "red " * 31, "zq " * count, "zq " * (count + 1), "green!"]
    reply = served.post("/v1/embeddings", {"input": texts})
    answer = reply.json()
    assert reply.headers["x-truncated-inputs"] == "2"
    assert answer["truncated"] == ["input[1]", "input[3]"]
    rows = [item["embedding"] for item in answer["data"]]
    close(rows, model.encode([text.strip() for text in texts]))
    close(rows[0], rows[1])
    reply = served.post("/v1/rerank", {"query": "red " * 40, "documents": CAPTIONS})
    assert reply.json()["truncated"] == ["query[0]"]
    reply = served.post("/v1/score", {"text_1": "red", "text_2": CAPTIONS})
    assert "truncated" not in reply.json()
    assert "x-truncated-inputs" not in reply.headers


def test_every_form_of_an_image(served: Running) -> None:
    lines, url = base64.encodebytes(photo(1)).decode(), data_url(photo(1))
    forms = [
        url,
        lines,
        lines.replace("\n", "\r\n"),
        data_url(photo(1), ""),
        f"data:image/png;base64,{lines}",
    ]
    documents: list[Any] = [{"image": form} for form in forms]
    documents.append({"content": [{"type": "image_url", "image_url": {"url": url}}]})
    answer = served.post(
        "/v1/rerank", {"query": {"text": "a red circle"}, "documents": documents}
    ).json()
    assert len(set(scores(answer))) == 1
    for file_format in ("JPEG", "WEBP"):
        body = {
            "query": "a red circle",
            "documents": [
                {"image": data_url(photo(1, file_format=file_format), f"image/{file_format}")}
            ],
        }
        assert served.post("/v1/rerank", body).status_code == 200


def test_concurrent_requests_get_the_same_responses(served: Running) -> None:
    body = [{"query": image(seed), "documents": CAPTIONS[seed % 3 :]} for seed in range(6)]
    singly = [scores(served.post("/v1/rerank", content).json()) for content in body]
    with ThreadPoolExecutor(6) as threads:
        together = list(
            threads.map(lambda content: scores(served.post("/v1/rerank", content).json()), body)
        )
    for result, expected in zip(together, singly, strict=True):
        close(result, expected)


def test_a_service_is_healthy_once_its_models_have_run(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(weights, SourceOptions(device="cpu"), 0)
    begin, service = threading.Event(), Service([model], ServiceOptions(port=0))
    monkeypatch.setattr(model, "warm_up", begin.wait)

    async def probe() -> list[list[int]]:
        transport = httpx.ASGITransport(service.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            statuses = list[list[int]]()
            for _ in range(2):
                paths = ("/live", "/health", "/ready", "/info")
                statuses.append([(await client.get(path)).status_code for path in paths])
                begin.set()
                await service.warm_up()
            return statuses

    assert asyncio.run(probe()) == [[200, 503, 503, 503], [200] * 4]
    service.close()


def test_probes_models_metrics_and_docs(served: Running) -> None:
    assert served.get("/health").json() == {
        "status": "ok",
        "model": "tiny-xfm",
        "random_weights": False,
    }
    assert served.get("/ready").json() == served.get("/health").json()
    assert served.get("/live").json() == {"status": "ok"}
    (listed,) = served.get("/v1/models").json()["data"]
    assert (listed["id"], listed["abilities"]) == ("tiny-xfm", ["embed", "rank", "compare"])
    served.post("/v1/rerank", {"query": "a red circle", "documents": [image(7)]})
    text = served.get("/metrics").content.decode()
    for line in (
        'requests_total{path="/v1/rerank",status="200"}',
        "batch_tokens_bucket",
        "cache_bytes",
    ):
        assert f"xfm_{line}" in text
    for path in ("/docs", "/openapi.json", "/metrics", "/v1/nothing"):
        assert served.get(path).headers["x-content-type-options"] == "nosniff"


def test_the_request_of_the_page(served: Running) -> None:
    words = shlex.split(CURL)
    assert words[2:4] == ["-H", "content-type: application/json"]
    body = words[5].replace("data:image/jpeg;base64,...", data_url(photo(1)))
    reply = served.post(words[1].removeprefix("http://127.0.0.1:8000"), body.encode())
    assert (reply.status_code, len(reply.json()["results"])) == (200, 2)


@pytest.mark.parametrize(
    "program", PROGRAMS, ids=lambda program: program.split("= ")[1].split(".")[0]
)
def test_the_programs_of_the_page(served: Running, program: str) -> None:
    name = program.split("= ")[1].split(".")[0]
    package = pytest.importorskip(name)
    program = program.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{served.port}")
    exec(program.replace("retrieval", "tiny-xfm"), {name: package})
