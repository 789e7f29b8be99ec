"""Clients that others publish talk to the service, unchanged."""

from __future__ import annotations

import base64
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.serve.conftest import Running, Start, data_url, image, photo
from xfm_fast.models.xfm import XFM

CAPTIONS = ["a red circle", "two blue squares", "a green triangle"]


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
CURL, *PROGRAMS = (
    next(block for block in PAGE.split("```text\n") if block.startswith("curl")).split("```")[0].split("\n\n")
)


def test_the_request_of_the_page(served: Running) -> None:
    words = shlex.split(CURL)
    assert words[1].startswith("http://127.0.0.1:8000/")
    assert words[2:4] == ["-H", "content-type: application/json"]
    body = words[5].replace("data:image/jpeg;base64,...", data_url(photo(1)))
    reply = served.post(words[1].removeprefix("http://127.0.0.1:8000"), body.encode())
    assert reply.status == 200
    assert len(reply.json["results"]) == 2


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.split("= ")[1].split(".")[0])
def test_the_programs_of_the_page(served: Running, program: str) -> None:
    name = program.split("= ")[1].split(".")[0]
    package = pytest.importorskip(name)
    program = program.replace("http://127.0.0.1:8000", served.url).replace("retrieval", "tiny-xfm")
    exec(program, {name: package})


def test_openai_embeds(served: Running, model: XFM) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        expected = model.encode(CAPTIONS).numpy()
        # Its default is base64, which it decodes.
        for settings in ({}, {"encoding_format": "float"}):
            found = client.embeddings.create(model="tiny-xfm", input=CAPTIONS, **settings)
            np.testing.assert_allclose([each.embedding for each in found.data], expected, rtol=0, atol=1e-5)
        assert found.usage.total_tokens > 0
        assert [each.id for each in client.models.list()] == ["tiny-xfm"]
        with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here"):
            client.embeddings.create(model="gpt-4", input="a")
        with pytest.raises(openai.UnprocessableEntityError, match="dimensions=3"):
            client.embeddings.create(model="tiny-xfm", input="a", dimensions=3)


def test_openai_hears_of_a_wrong_key(start: Start) -> None:
    openai = pytest.importorskip("openai")
    with start(api_key="of-gold") as service:
        for key, wrong in (("of-gold", False), ("of-silver", True)):
            with openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0) as client:
                if wrong:
                    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                        client.embeddings.create(model="tiny-xfm", input="a dog")
                else:
                    assert client.embeddings.create(model="tiny-xfm", input="a dog").data


@pytest.mark.parametrize("name", ["Client", "ClientV2"])
def test_cohere_ranks(served: Running, model: XFM, tmp_path: Path, name: str) -> None:
    cohere = pytest.importorskip("cohere")
    client = getattr(cohere, name)(api_key="none", base_url=served.url)
    found = client.rerank(model="tiny-xfm", query=CAPTIONS[0], documents=CAPTIONS, top_n=2)
    features = model.encode(CAPTIONS)
    expected = (1 + features @ features[0]) / 2
    assert [each.index for each in found.results] == expected.argsort(descending=True)[:2].tolist()
    for each in found.results:
        assert each.relevance_score == pytest.approx(float(expected[each.index]), abs=1e-5)
    with pytest.raises(cohere.core.api_error.ApiError, match="is not served here"):
        client.rerank(model="rerank-v3.5", query="a", documents=["b"])


def test_httpx_sends_what_jina_and_vllm_document(served: Running, model: XFM, tmp_path: Path) -> None:
    httpx = pytest.importorskip("httpx")
    paths = []
    for seed in (1, 2):
        paths.append(tmp_path / f"{seed}.png")
        paths[-1].write_bytes(photo(seed))
    expected = [float(model.match(path, "a red circle")) for path in paths]
    with httpx.Client(base_url=served.url, timeout=20) as client:
        # Jina's m0: images as URLs or base64, answers with index and relevance_score.
        raw = [{"image": base64.b64encode(photo(seed)).decode()} for seed in (1, 2)]
        asked = {"model": "tiny-xfm", "query": "a red circle", "documents": raw, "return_documents": False}
        jina = client.post("/v1/rerank", json=asked).raise_for_status().json()
        # vLLM's: parts of a message, unknown fields such as truncate_prompt_tokens.
        parts = [
            {"content": [{"type": "image_url", "image_url": {"url": data_url(photo(seed))}}]} for seed in (1, 2)
        ]  # fmt: skip
        asked = {"model": "tiny-xfm", "text_1": "a red circle", "text_2": parts, "truncate_prompt_tokens": 10}
        vllm = client.post("/score", json=asked).raise_for_status().json()
    by_index = {each["index"]: each["relevance_score"] for each in jina["results"]}
    np.testing.assert_allclose([by_index[0], by_index[1]], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose([each["score"] for each in vllm["data"]], expected, rtol=0, atol=1e-5)
    assert {"id", "model", "usage", "results"} <= jina.keys()
    assert {"id", "object", "created", "model", "data", "usage"} <= vllm.keys()


def test_an_image_as_openai_clients_write_it(served: Running, model: XFM, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        found = client.embeddings.create(model="tiny-xfm", input=[image(1)], encoding_format="float")
    (tmp_path / "1.png").write_bytes(photo(1))
    expected = model.encode(tmp_path / "1.png")
    np.testing.assert_allclose(found.data[0].embedding, expected, rtol=0, atol=1e-5)
