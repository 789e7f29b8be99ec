"""Models as an HTTP service for clients of Cohere, Jina, OpenAI, TEI and vLLM: embeddings, rerank,
score.

FastAPI on uvicorn; `run` serves, and `Service(...).app` is an ASGI application for any other
server. Names are imported lazily: options need neither PyTorch nor the extra `serve`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xfm_fast.serve.options import ServiceOptions, SourceOptions

if TYPE_CHECKING:
    from xfm_fast.serve.app import Service
    from xfm_fast.serve.model import ServedModel
    from xfm_fast.serve.server import Server, address, listen, load, open_service, run

__all__ = [
    "ServedModel",
    "Server",
    "Service",
    "ServiceOptions",
    "SourceOptions",
    "address",
    "listen",
    "load",
    "open_service",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # The last of the modules, which has all names.
    return getattr(import_module(f"{__name__}.server"), name)
