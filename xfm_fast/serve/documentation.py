"""The service described: as OpenAPI, derived from the models of its requests and answers, and as a page to read.

The page needs nothing from elsewhere, so that it shows on a machine without the web.
"""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from xfm_fast import __version__
from xfm_fast.serve.schema import (
    EmbeddingsAnswer,
    EmbeddingsRequest,
    ErrorAnswer,
    RerankAnswer,
    RerankRequest,
    ScoreAnswer,
    ScoreRequest,
)

_SCHEMAS = "#/components/schemas/"
_POSTS: dict[str, tuple[str, type[BaseModel], type[BaseModel]]] = {
    "/v1/rerank": ("Order documents by their relevance to a query", RerankRequest, RerankAnswer),
    "/v2/rerank": ("The same, for clients of Cohere's second version", RerankRequest, RerankAnswer),
    "/rerank": ("The same", RerankRequest, RerankAnswer),
    "/v1/embeddings": ("Embed texts and images", EmbeddingsRequest, EmbeddingsAnswer),
    "/v1/score": ("Score pairs", ScoreRequest, ScoreAnswer),
    "/score": ("The same", ScoreRequest, ScoreAnswer),
}
_GETS = {
    "/health": ("The process lives", "application/json"),
    "/ready": ("It takes requests; 503 while it ends", "application/json"),
    "/v1/models": ("The model that is served", "application/json"),
    "/metrics": ("Counters for Prometheus", "text/plain"),
}
_FAULTS = {
    "400": "the body is no JSON",
    "401": "the API key is missing or wrong",
    "404": "another model is asked for",
    "408": "the body came too slowly",
    "413": "the body, or an image, is too large",
    "415": "the body is no application/json",
    "422": "the request cannot be answered as it is",
    "429": "too many requests are in work; see Retry-After",
    "503": "the service is about to end",
    "504": "there was no answer in time",
}
_EXAMPLES = {
    "RerankRequest": {"query": "a dog on a beach", "documents": [{"image": "data:image/jpeg;base64,..."}], "top_n": 3},
    "EmbeddingsRequest": {"input": ["a dog", {"image": "data:image/jpeg;base64,..."}]},
    "ScoreRequest": {"text_1": "a dog", "text_2": {"image": "data:image/jpeg;base64,..."}},
}


def openapi(*, secured: bool) -> dict[str, Any]:
    """The description of the service.

    Args:
        secured: whether it asks for a key.
    """
    kinds = dict.fromkeys(kind for _, *pair in _POSTS.values() for kind in pair)
    _, made = models_json_schema(
        [*((kind, "validation") for kind in kinds), (ErrorAnswer, "validation")], ref_template=f"{_SCHEMAS}{{model}}"
    )
    fault = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}ErrorAnswer"}}}
    faults = {status: {"description": what, "content": fault} for status, what in _FAULTS.items()}
    paths: dict[str, Any] = {}
    for path, (summary, asked, answered) in _POSTS.items():
        body = {"schema": {"$ref": f"{_SCHEMAS}{asked.__name__}"}, "example": _EXAMPLES[asked.__name__]}
        answer = {"application/json": {"schema": {"$ref": f"{_SCHEMAS}{answered.__name__}"}}}
        paths[path] = {
            "post": {
                "summary": summary,
                "operationId": path.strip("/").replace("/", "_"),
                "requestBody": {"required": True, "content": {"application/json": body}},
                "responses": {"200": {"description": "the answer", "content": answer}} | faults,
            }
        }
    for path, (summary, kind) in _GETS.items():
        answer = {"200": {"description": "the answer", "content": {kind: {"schema": {}}}}}
        name = path.strip("/").replace("/", "_")
        paths[path] = {"get": {"summary": summary, "operationId": name, "responses": answer}}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "xfm-fast", "version": __version__, "description": "X-FM ranks and embeds texts and images."},
        "paths": paths,
        "components": {"schemas": made["$defs"]},
    }
    if secured:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def page(document: dict[str, Any], model: str) -> str:
    """The description as HTML."""
    environment = Environment(loader=PackageLoader("xfm_fast.serve"), autoescape=select_autoescape())
    schemas = document["components"]["schemas"]
    calls = []
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            content = call.get("requestBody", {}).get("content", {}).get("application/json")
            asked = schemas[content["schema"]["$ref"].removeprefix(_SCHEMAS)] if content else None
            calls.append({"path": path, "method": method.upper(), "call": call, "asked": asked, "content": content})
    return environment.get_template("docs.html").render(calls=calls, model=model, info=document["info"])
