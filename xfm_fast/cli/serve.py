"""`xfm-fast serve`: a model as an HTTP service."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from xfm_fast.cli.console import note
from xfm_fast.cli.options import Flat
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.serve.options import ServiceOptions, SourceOptions

if TYPE_CHECKING:
    import socket

    from xfm_fast.serve import ServedModel


def serve(
    model: Annotated[Path | None, Parameter(name="RUN|CHECKPOINT|EXPORT")] = None,
    /,
    *,
    source: Flat[SourceOptions] = SourceOptions(),
    options: Flat[ServiceOptions] = ServiceOptions(),
) -> None:
    """Serve a model over HTTP: /v1/rerank, /v1/embeddings and /v1/score, for clients of Cohere and OpenAI.

    It listens on this machine only unless --host is given, and shuts down cleanly on SIGTERM. /docs describes the API.

    Args:
        model: A run or a folder of weights, a name on the Hugging Face Hub, an official checkpoint, or an export.
    """
    key = options.api_key if options.api_key is not None else os.environ.get("XFM_API_KEY")
    if key is not None and (not key.isascii() or not key.strip() or key != key.strip()):
        raise InputError("the API key is empty, not ASCII, or has white space around it; choose another")
    options = replace(options, api_key=key)
    try:
        from xfm_fast.serve import address, run
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"serving needs {error.name}, which is not installed; pip install 'xfm-fast[serve]'"
        ) from None

    if not options.loopback and key is None:
        note(f"WITHOUT AN API KEY, anyone who reaches {options.host} can use this service; set XFM_API_KEY")

    def loaded(model: ServedModel, sock: socket.socket) -> None:
        if model.random:
            note(f"THE WEIGHTS ARE RANDOM ({model.source}): results mean nothing. Give a trained model")
        memory = f"{options.memory_mb:,} MB for requests, {options.cache_mb:,} MB for image memories"
        print(f"serving {model.name} on {address(sock)} (see /docs), with {memory}; stop with Ctrl-C", flush=True)

    run(model, source, options, loaded=loaded)
    # Worker threads may still run, and libraries take seconds to unload.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
