"""Other people's clients against a service in a process of its own; answers equal those of the library in this one."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import parse_headers
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.library_models import write_clip, write_embedder, write_reranker, write_sparse
from tests.serve.conftest import SECONDS, data_url, photo, process, raw

TEXTS = [
    "a red circle",
    "Two blue squares, left of a triangle!",
    "grün, 緑, 🟢 and a new\nline",
    "a yellow star above a circle. " * 30,
]
QUERY = "a circle and a star"
KEY = "sk-no-secret"
EMBEDDER, RERANKER, CLIP, SPLADE = "embedder", "reranker", "clip", "splade"


@dataclass(frozen=True)
class Served:
    """A service of four models in a process, and the models themselves."""

    url: str
    embedder: Any
    reranker: Any
    clip: Any
    splade: Any

    def vectors(self, texts: list[str] = TEXTS, role: str | None = None) -> np.ndarray:
        prompt = {"query": "query: "}.get(role or "", "")
        return self.embedder.encode(texts, prompt=prompt)

    def scores(self, documents: list[str] = TEXTS, query: str = QUERY) -> list[float]:
        return self.reranker.predict([(query, document) for document in documents]).tolist()


@contextmanager
def serving(folders: dict[str, Path], *options: str) -> Iterator[str]:
    names = [argument for name in folders for argument in ("--name", name)]
    with process(*folders.values(), *names, *options) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve a model of each use; a key is asked for, since every client sends one."""
    st = pytest.importorskip("sentence_transformers")
    root = tmp_path_factory.mktemp("clients")
    folders = {
        EMBEDDER: write_embedder(root),
        RERANKER: write_reranker(root / RERANKER),
        CLIP: write_clip(root / CLIP),
        SPLADE: write_sparse(root / SPLADE),
    }
    embedder, clip = (
        st.SentenceTransformer(str(folders[name]), device="cpu") for name in (EMBEDDER, CLIP)
    )
    reranker = st.CrossEncoder(str(folders[RERANKER]), device="cpu")
    splade = st.SparseEncoder(str(folders[SPLADE]), device="cpu")
    with serving(folders, "--api-key", KEY) as url:
        yield Served(url, embedder, reranker, clip, splade)


def close(values: Any, expected: Any) -> bool:
    return np.shape(values) == np.shape(expected) and np.allclose(values, expected, atol=2e-5)


def ranked(results: Any, scores: list[float], limit: int | None = None) -> bool:
    """Return whether (index, score) pairs are those of the scores, best first."""
    order = np.argsort(-np.array(scores), kind="stable").tolist()[:limit]
    indices, values = zip(*results, strict=True)
    return [*indices] == order and close(values, [scores[index] for index in order])


def openai_client(served: Served, **options: Any) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(
        **{"base_url": f"{served.url}/v1", "api_key": KEY, "max_retries": 0, **options}
    )


def test_openai_embeds(served: Served) -> None:
    client = openai_client(served)
    # The client asks for base64 and decodes it.
    answer = client.embeddings.create(model=EMBEDDER, input=TEXTS)
    assert close([item.embedding for item in answer.data], served.vectors())
    assert [item.index for item in answer.data] == [0, 1, 2, 3]
    assert answer.model == EMBEDDER
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    assert answer.truncated == ["input[3]"]
    for settings in ({"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model=EMBEDDER, input=TEXTS[0], **settings)
        vector = answer.data[0].embedding
        if isinstance(vector, str):
            vector = np.frombuffer(base64.b64decode(vector), "<f4")
        assert close([vector], served.vectors(TEXTS[:1]))
    answer = client.embeddings.create(model=EMBEDDER, input=TEXTS, dimensions=8)
    short = served.vectors()[:, :8]
    short /= np.linalg.norm(short, axis=1, keepdims=True)
    assert close([item.embedding for item in answer.data], short)
    answer = client.embeddings.create(
        model=EMBEDDER, input=TEXTS, extra_body={"prompt_name": "query"}
    )
    assert close([item.embedding for item in answer.data], served.vectors(role="query"))
    assert {model.id for model in client.models.list()} >= {EMBEDDER, RERANKER, CLIP, SPLADE}


def test_openai_embeds_2048_texts_and_images(served: Served) -> None:
    client = openai_client(served)
    texts = [f"{index} red circles" for index in range(2048)]
    answer = client.embeddings.create(model=EMBEDDER, input=texts)
    assert close([item.embedding for item in answer.data], served.vectors(texts))
    images = [photo(seed) for seed in (1, 2)]
    answer = client.embeddings.create(
        model=CLIP,
        input=[{"image": data_url(image)} for image in images],
        encoding_format="float",
    )
    expected = served.clip.encode(
        [Image.open(io.BytesIO(image)) for image in images], normalize_embeddings=True
    )
    assert close([item.embedding for item in answer.data], expected)


def test_openai_raises_its_exceptions(served: Served) -> None:
    import openai

    client = openai_client(served)
    for error, model, texts, options in (
        (openai.NotFoundError, "gpt-5", "a", {}),
        (openai.UnprocessableEntityError, EMBEDDER, [], {}),
        (openai.UnprocessableEntityError, EMBEDDER, [""] * 2049, {}),
        (openai.UnprocessableEntityError, EMBEDDER, [[1, 2, 3]], {}),
        (openai.UnprocessableEntityError, EMBEDDER, "a", {"dimensions": 4096}),
        (openai.UnprocessableEntityError, RERANKER, "a", {}),
    ):
        with pytest.raises(error) as raised:
            client.embeddings.create(model=model, input=texts, **options)
        assert raised.value.message
    with pytest.raises(openai.AuthenticationError):
        openai_client(served, api_key="another").embeddings.create(model=EMBEDDER, input="a")


def test_openai_times_out_and_cancels_and_the_service_goes_on(served: Served) -> None:
    openai = pytest.importorskip("openai")
    texts = [TEXTS[1] for _ in range(512)]
    with pytest.raises(openai.APITimeoutError):
        openai_client(served, timeout=0.005).embeddings.create(model=EMBEDDER, input=texts)

    async def cancel() -> Any:
        options: Any = {"base_url": f"{served.url}/v1", "api_key": KEY}
        async with openai.AsyncOpenAI(**options) as client:
            create = client.embeddings.create
            calls = [
                asyncio.create_task(create(model=EMBEDDER, input=[*texts, str(index)]))
                for index in range(16)
            ]
            await asyncio.sleep(0.05)
            for call in calls[1:]:
                call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results[1:])
            return results[0]

    answer = asyncio.run(cancel())
    expected = served.vectors([TEXTS[1], "0"])
    assert close([answer.data[0].embedding, answer.data[-1].embedding], expected)


def test_connections_carry_pipelined_and_streamed_requests(served: Served) -> None:
    key = f"authorization: Bearer {KEY}"
    bodies = [json.dumps({"input": f"{index} red circles"}).encode() for index in range(20)]
    port = int(served.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as sock:
        sock.sendall(b"".join(raw("/v1/embeddings", body, key) for body in bodies))
        answers, file = [], sock.makefile("rb")
        for _ in bodies:
            assert b" 200 " in file.readline()
            length = parse_headers(file)["content-length"]
            answers.append(json.loads(file.read(int(length))))
    vectors = [answer["data"][0]["embedding"] for answer in answers]
    assert close(vectors, served.vectors([f"{index} red circles" for index in range(20)]))

    def stream() -> Iterator[bytes]:
        for byte in bodies[0]:
            yield bytes([byte])

    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/embeddings", content=stream(), headers=headers)
    assert close(answer.json()["data"][0]["embedding"], vectors[0])


@pytest.mark.slow
def test_clients_retry_until_a_full_service_answers(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    st = pytest.importorskip("sentence_transformers")
    folder = write_embedder(tmp_path)
    texts = [[f"{client} red circles, {index}" for index in range(64)] for client in range(16)]
    with serving({EMBEDDER: folder}, "--max-queue", "2") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=30)

        def embed(inputs: list[str]) -> list[list[float]]:
            answer = client.embeddings.create(model=EMBEDDER, input=inputs)
            return [item.embedding for item in answer.data]

        with ThreadPoolExecutor(len(texts)) as threads:
            answers = [*threads.map(embed, texts)]
        assert 'status="429"' in httpx.get(f"{url}/metrics").text
    model = st.SentenceTransformer(str(folder), device="cpu")
    for inputs, answer in zip(texts, answers, strict=True):
        assert close(answer, model.encode(inputs))


@pytest.mark.parametrize("version", [1, 2])
def test_cohere_embeds_and_reranks(served: Served, version: int) -> None:
    cohere = pytest.importorskip("cohere")
    client = (cohere.Client if version == 1 else cohere.ClientV2)(api_key=KEY, base_url=served.url)
    answer = client.rerank(model=RERANKER, query=QUERY, documents=TEXTS, top_n=3)
    results = [(result.index, result.relevance_score) for result in answer.results]
    assert ranked(results, served.scores(), 3)
    for role, input_type in (("document", "search_document"), ("query", "search_query")):
        answer = client.embed(
            model=EMBEDDER, texts=TEXTS, input_type=input_type, embedding_types=["float", "int8"]
        )
        vectors = served.vectors(role=role)
        assert close(answer.embeddings.float_, vectors)
        assert np.abs(np.array(answer.embeddings.int8) - vectors * 127).max() <= 0.51
    if version == 1:
        answer = client.embed(model=EMBEDDER, texts=TEXTS, input_type="search_document")
        assert close(answer.embeddings, served.vectors())
        with pytest.raises(cohere.errors.NotFoundError):
            client.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS)
        return
    answer = client.embed(
        model=CLIP, images=[data_url(photo(1))], input_type="image", embedding_types=["float"]
    )
    expected = served.clip.encode([Image.open(io.BytesIO(photo(1)))], normalize_embeddings=True)
    assert close(answer.embeddings.float_, expected)
    answer = client.embed(
        model=EMBEDDER,
        inputs=[{"content": [{"type": "text", "text": text}]} for text in TEXTS],
        input_type="search_document",
        embedding_types=["float"],
        output_dimension=16,
    )
    short = served.vectors()[:, :16]
    assert close(answer.embeddings.float_, short / np.linalg.norm(short, axis=1, keepdims=True))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client of Hugging Face reach this machine where it may reach no other."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def hub_client(served: Served, route: str = "") -> Any:
    hub = pytest.importorskip("huggingface_hub")
    return hub.InferenceClient(model=served.url + route, token=KEY)


def test_hugging_face_extracts_features_and_compares(served: Served, online: None) -> None:
    for route in ("", "/embed"):
        client = hub_client(served, route)
        assert close(client.feature_extraction(TEXTS[0]), served.vectors(TEXTS[:1]))
        many = client.feature_extraction(TEXTS, truncate=True, normalize=True)
        assert close(many, served.vectors())
        named = client.feature_extraction(TEXTS[0], prompt_name="query")
        assert close(named, served.vectors(TEXTS[:1], "query"))
    similarities = hub_client(served, "/similarity").sentence_similarity(QUERY, TEXTS)
    expected = served.vectors([QUERY]) @ served.vectors().T
    assert close(similarities, expected[0])


def test_tei_answers_plain_http(served: Served) -> None:
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {KEY}"}) as client:
        body = {"query": QUERY, "texts": TEXTS, "raw_scores": False, "return_text": True}
        rows = client.post("/rerank", json=body).raise_for_status().json()
        assert ranked([(row["index"], row["score"]) for row in rows], served.scores())
        assert [row["text"] for row in rows] == [TEXTS[row["index"]] for row in rows]
        rows = client.post("/embed_sparse", json={"inputs": TEXTS}).raise_for_status().json()
        expected = served.splade.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
        for row, dense in zip(rows, expected, strict=True):
            indices = [entry["index"] for entry in row]
            assert indices == dense.nonzero()[0].tolist()
            assert close([entry["value"] for entry in row], dense[indices])
        rows = client.post("/tokenize", json={"inputs": TEXTS[:2]}).raise_for_status().json()
        ids = served.embedder.tokenizer(TEXTS[:2])["input_ids"]
        assert [[token["id"] for token in row] for row in rows] == ids
        info = client.get("/info").raise_for_status().json()
        assert info["model_id"] == EMBEDDER
        assert info["max_input_length"] == served.embedder.max_seq_length
        assert client.get("/health").status_code == 200
        refused = client.post("/embed", json={"inputs": TEXTS, "truncate": False})
        assert refused.status_code == 413
        assert {"error", "error_type"} <= refused.json().keys()


@pytest.mark.slow
def test_langchain_openai(served: Served) -> None:
    langchain = pytest.importorskip("langchain_openai")
    options: Any = {"model": EMBEDDER, "base_url": f"{served.url}/v1", "api_key": KEY}
    embeddings = langchain.OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    assert close(embeddings.embed_documents(TEXTS), served.vectors())
    assert close(asyncio.run(embeddings.aembed_query(TEXTS[0])), served.vectors()[0])


@pytest.mark.slow
def test_langchain_sends_ids_of_another_vocabulary_by_default(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    langchain = pytest.importorskip("langchain_openai")
    openai = pytest.importorskip("openai")

    class Encoding:
        def encode_ordinary(self, text: str) -> list[int]:
            return [*text.encode()]

    monkeypatch.setattr("tiktoken.get_encoding", lambda name: Encoding())
    embeddings = langchain.OpenAIEmbeddings(
        model=EMBEDDER, base_url=f"{served.url}/v1", api_key=KEY
    )
    with pytest.raises(openai.UnprocessableEntityError, match="check_embedding_ctx_length=False"):
        embeddings.embed_documents(TEXTS)


@pytest.mark.slow
def test_langchain_huggingface(served: Served, online: None) -> None:
    langchain = pytest.importorskip("langchain_huggingface")
    embeddings = langchain.HuggingFaceEndpointEmbeddings(model=EMBEDDER)
    # It refuses a URL in place of a name; its client does not.
    embeddings.client = hub_client(served)
    texts = [text.replace("\n", " ") for text in TEXTS]
    assert close(embeddings.embed_documents(TEXTS), served.vectors(texts))
    assert close(embeddings.embed_query(TEXTS[0]), served.vectors()[0])


@pytest.mark.slow
def test_langchain_cohere(served: Served) -> None:
    langchain = pytest.importorskip("langchain_cohere")
    documents = pytest.importorskip("langchain_core.documents")
    options: Any = {"base_url": served.url, "cohere_api_key": KEY}
    embeddings = langchain.CohereEmbeddings(model=EMBEDDER, **options)
    assert close(embeddings.embed_documents(TEXTS), served.vectors())
    assert close(embeddings.embed_query(TEXTS[0]), served.vectors(TEXTS[:1], "query")[0])
    reranker = langchain.CohereRerank(model=RERANKER, top_n=3, **options)
    results = reranker.rerank(TEXTS, QUERY)
    pairs = [(result["index"], result["relevance_score"]) for result in results]
    assert ranked(pairs, served.scores(), 3)
    pages = [documents.Document(page_content=text) for text in TEXTS]
    first = reranker.compress_documents(pages, QUERY)[0]
    assert first.page_content == TEXTS[pairs[0][0]]


@pytest.mark.slow
def test_llama_index(served: Served) -> None:
    openai = pytest.importorskip("llama_index.embeddings.openai")
    embedding = openai.OpenAIEmbedding(
        model_name=EMBEDDER, api_base=f"{served.url}/v1", api_key=KEY, embed_batch_size=3
    )
    texts = [text.replace("\n", " ") for text in TEXTS]
    assert close(embedding.get_text_embedding_batch(texts), served.vectors(texts))
    assert close(embedding.get_query_embedding(TEXTS[0]), served.vectors()[0])
    tei = pytest.importorskip("llama_index.embeddings.text_embeddings_inference")
    inference = tei.TextEmbeddingsInference(EMBEDDER, served.url, auth_token=KEY)
    # It strips white space.
    assert close(inference.get_text_embedding_batch(TEXTS), served.vectors())
    assert close(asyncio.run(inference.aget_query_embedding(TEXTS[0])), served.vectors()[0])


@pytest.mark.slow
def test_llama_index_reranks(served: Served) -> None:
    core = pytest.importorskip("llama_index.core.schema")
    tei = pytest.importorskip("llama_index.postprocessor.tei_rerank")
    cohere = pytest.importorskip("llama_index.postprocessor.cohere_rerank")
    for reranker in (
        tei.TextEmbeddingInference(top_n=3, base_url=served.url, auth_token=f"Bearer {KEY}"),
        cohere.CohereRerank(top_n=3, model=RERANKER, api_key=KEY, base_url=served.url),
    ):
        nodes = [
            core.NodeWithScore(node=core.TextNode(text=text, id_=str(index)), score=0.0)
            for index, text in enumerate(TEXTS)
        ]
        results = reranker.postprocess_nodes(nodes, query_str=QUERY)
        pairs = [(int(result.node.node_id), result.score) for result in results]
        assert ranked(pairs, served.scores(), 3)


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return pytest.importorskip("litellm")


# The route that a provider's base names.
LITELLM_EMBEDDINGS = {
    "openai": "/v1",
    "hosted_vllm": "/v1",
    "infinity": "",
    "jina_ai": "/v1/embeddings",
    "cohere": "/v2/embed",
    "huggingface": "/embed",
}


@pytest.mark.slow
@pytest.mark.parametrize("provider", LITELLM_EMBEDDINGS)
def test_litellm_embeds(served: Served, litellm: Any, provider: str) -> None:
    options = {"cohere": {"input_type": "search_document"}, "huggingface": {"input_type": "embed"}}
    answer = litellm.embedding(
        model=f"{provider}/{EMBEDDER}",
        input=TEXTS,
        api_base=served.url + LITELLM_EMBEDDINGS[provider],
        api_key=KEY,
        **options.get(provider, {}),
    )
    assert close([item["embedding"] for item in answer.data], served.vectors())


@pytest.mark.slow
@pytest.mark.parametrize(
    "provider", ["cohere", "jina_ai", "hosted_vllm", "infinity", "huggingface"]
)
def test_litellm_reranks(served: Served, litellm: Any, provider: str) -> None:
    answer = litellm.rerank(
        model=f"{provider}/{RERANKER}",
        query=QUERY,
        documents=TEXTS,
        top_n=3,
        api_base=served.url,
        api_key=KEY,
        # Infinity's form of a document is another one than Cohere's and Jina's.
        return_documents=provider != "infinity",
    )
    results = [(result["index"], result["relevance_score"]) for result in answer.results]
    # TEI, the form of Hugging Face, has no `top_n`.
    assert ranked(results[:3], served.scores(), 3)
