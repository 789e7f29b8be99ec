"""Models of sentence-transformers behind FastAPI, as people write it: baselines of `xfm-fast bench servers`.

ONNX Runtime and OpenVINO run the graphs that PyTorch exports of the encoders; they are written once, to a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import graph

_RUNTIMES: dict[str, graph.Load] = {
    "onnxruntime": graph.onnx_runtime,
    "openvino": graph.openvino,
}


def main(embedder: str, reranker: str, mode: str, graphs: str, port: int) -> None:
    """Serve two models until the process ends."""
    import uvicorn
    from fastapi import FastAPI
    from sentence_transformers import CrossEncoder, SentenceTransformer

    encoder: Any = SentenceTransformer(embedder, device="cpu")
    ranker: Any = CrossEncoder(reranker, device="cpu")

    def embed(body: dict[str, Any]) -> dict[str, Any]:
        vectors = encoder.encode(body["input"])
        return {"data": [{"embedding": vector.tolist()} for vector in vectors]}

    def rerank(body: dict[str, Any]) -> dict[str, Any]:
        scores = ranker.predict([(body["query"], document) for document in body["documents"]])
        results = [
            {"index": index, "relevance_score": score}
            for index, score in enumerate(scores.tolist())
        ]
        return {"results": results}

    def endpoint(call: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        async def answer(body: dict[str, Any]) -> dict[str, Any]:
            return call(body)

        # OpenVINO's request is not for several threads.
        return answer if mode in ("async", "openvino") else call

    if mode in _RUNTIMES:

        def bound(model: Any, call: Callable[[], Any], file: str) -> Any:
            exported = graph.ExportedCall(model[0].auto_model, call, Path(graphs, file))
            return exported.bind(model, lambda model: model[0].auto_model, _RUNTIMES[mode])

        encoder = bound(encoder, lambda: encoder.encode(["a"]), "embedder.onnx")
        ranker = bound(ranker, lambda: ranker.predict([("a", "b")]), "reranker.onnx")
    app = FastAPI()
    app.post("/v1/embeddings")(endpoint(embed))
    app.post("/v1/rerank")(endpoint(rerank))
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    # The last option is `--port PORT`.
    main(*sys.argv[1:5], port=int(sys.argv[-1]))
