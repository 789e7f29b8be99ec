"""A model as an HTTP service for clients of Cohere, Jina, OpenAI and vLLM: rerank, embeddings, score.

FastAPI on uvicorn; `run` serves, and `Service(...).app` is an ASGI application for any other server. Names are imported
lazily: options need neither PyTorch nor the extra `serve`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xfm_fast.serve.model import ServedModel as ServedModel
    from xfm_fast.serve.model import load as load
    from xfm_fast.serve.options import ServiceOptions as ServiceOptions
    from xfm_fast.serve.options import SourceOptions as SourceOptions
    from xfm_fast.serve.server import Server as Server
    from xfm_fast.serve.server import address as address
    from xfm_fast.serve.server import bind as bind
    from xfm_fast.serve.server import run as run
    from xfm_fast.serve.service import Service as Service

_HOMES = {
    "ServedModel": "model",
    "Server": "server",
    "Service": "service",
    "ServiceOptions": "options",
    "SourceOptions": "options",
    "address": "server",
    "bind": "server",
    "load": "model",
    "run": "server",
}

__all__ = ["ServedModel", "Server", "Service", "ServiceOptions", "SourceOptions", "address", "bind", "load", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
