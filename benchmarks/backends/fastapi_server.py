"""A model of sentence-transformers behind FastAPI, as people write it: baselines of `xfm-fast bench servers`.

ONNX Runtime and OpenVINO run the graph that PyTorch exports of the model's encoder; it is written once, to GRAPH.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from . import graph

_RUNTIMES: dict[str, graph.Load] = {
    "onnxruntime": graph.onnx_runtime,
    "openvino": graph.openvino,
}


class Embeddings(BaseModel):
    """Texts to embed."""

    input: list[str]


class Rerank(BaseModel):
    """Documents to order by their relevance to a query."""

    query: str
    documents: list[str]


def main(folder: str, mode: str, path: Path, port: int) -> None:
    """Serve a model until the process ends."""
    import uvicorn
    from fastapi import FastAPI
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from transformers import AutoConfig

    ranks = "SequenceClassification" in str(AutoConfig.from_pretrained(folder).architectures)
    model: Any = (CrossEncoder if ranks else SentenceTransformer)(folder, device="cpu")

    def embed(request: Embeddings) -> dict[str, Any]:
        vectors = model.encode(request.input)
        return {"data": [{"embedding": vector.tolist()} for vector in vectors]}

    def rerank(request: Rerank) -> dict[str, Any]:
        scores = model.predict([(request.query, document) for document in request.documents])
        return {
            "results": [
                {"index": index, "relevance_score": float(score)}
                for index, score in enumerate(scores)
            ]
        }

    async def embed_async(request: Embeddings) -> dict[str, Any]:
        return embed(request)

    async def rerank_async(request: Rerank) -> dict[str, Any]:
        return rerank(request)

    if mode in _RUNTIMES:

        def example() -> Any:
            return model.predict([("a", "b")]) if ranks else model.encode(["a"])

        exported = graph.ExportedCall(model[0].auto_model, example, path)
        model = exported.bind(model, lambda model: model[0].auto_model, _RUNTIMES[mode])
    app = FastAPI()
    # OpenVINO's request is not for several threads.
    threads = mode not in ("async", "openvino")
    app.post("/v1/embeddings")(embed if threads else embed_async)
    app.post("/v1/rerank")(rerank if threads else rerank_async)
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("mode", choices=["def", "async", *_RUNTIMES])
    parser.add_argument("graph", type=Path)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.mode, arguments.graph, arguments.port)
