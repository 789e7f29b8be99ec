"""`xfm-fast serve` and `convert`: a model as an HTTP service, and in another format."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from xfm_fast.cli.console import note
from xfm_fast.cli.options import Flat, named
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.loading import Weights
from xfm_fast.serve.options import ServiceOptions, SourceOptions

if TYPE_CHECKING:
    import socket

    from xfm_fast.serve import Service


def serve(
    *models: Annotated[
        str,
        Parameter(
            name="MODEL",
            help="Models of sentence-transformers or transformers, or X-FM: folders, names on the Hugging Face Hub, "
            "runs, official checkpoint files or exports; a single one is the same as --model.",
        ),
    ],
    source: Flat[SourceOptions] = SourceOptions(),
    options: Flat[ServiceOptions] = ServiceOptions(),
) -> None:
    """Serve models over HTTP: embed, rerank, score and classify, for clients of OpenAI, Cohere, Jina and TEI.

    It listens on this machine only unless --host is given, and shuts down cleanly on SIGTERM. /docs
    describes the API.
    """
    # Threads of OpenMP that wait for work would use as much of a core as those that have it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    key = options.api_key if options.api_key is not None else os.environ.get("XFM_API_KEY")
    if key is not None and (not key.isascii() or not key.strip() or key != key.strip()):
        raise InputError(
            "the API key is empty, not ASCII, or has white space around it; choose another"
        )
    options = replace(options, api_key=key)
    try:
        import torch

        from xfm_fast.benchmarks.machine import allowed_cores
        from xfm_fast.serve import address, run
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"serving needs {error.name}, which is not installed; pip install '.[serve]'"
        ) from None

    if not options.loopback and key is None:
        note(
            f"WITHOUT AN API KEY, anyone who reaches {options.host} can use this service; set XFM_API_KEY"
        )

    if len(models) < 2:
        source = named(models[0] if models else None, source)
        models = ()
    elif source.model is not None:
        raise InputError(f"{', '.join(models)} and --model {source.model}; leave out --model")

    def loaded(service: Service, sock: socket.socket) -> None:
        for name, model in service.names.items():
            if model.random:
                note(
                    f"THE WEIGHTS ARE RANDOM ({model.source}): results mean nothing. Give a trained model"
                )
            print(f"{name}: {', '.join(model.abilities)} ({model.source})")
        if any(model.device.type == "cpu" for model in service.models):
            cores, threads = allowed_cores(), torch.get_num_threads()
            print(
                f"computing with {threads} of {cores} cores (OMP_NUM_THREADS). For the most requests a second start "
                f"{cores} processes with OMP_NUM_THREADS=1 on ports of their own; for short answers a single one"
            )
        if options.index is not None:
            print(f"searching {options.index} at {address(sock)}/")
        memory = (
            f"{options.memory_mb:,} MB for requests, {options.cache_mb:,} MB for image memories"
        )
        print(
            f"serving {', '.join(service.names)} on {address(sock)} (see /docs), with {memory}; stop with Ctrl-C",
            flush=True,
        )

    run(source, options, loaded, models)
    # Worker threads may still run, and libraries take seconds to unload.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def convert(
    model: Annotated[str, Parameter(name="MODEL")],
    destination: Path,
    /,
    *,
    source: Flat[Weights] = Weights(),
    keep_unused: Annotated[
        bool, Parameter(negative="--drop-unused", help="Keep weights that no output depends on.")
    ] = True,
) -> None:
    """Convert a checkpoint between the official format and ours, without loss.

    Args:
        model: Official checkpoint file, one of X²-VLM, a folder written by xfm-fast, or a name on
            the Hub.
        destination: Folder for our format, or .safetensors/.th/.pth file for the official one.
    """
    from xfm_fast.loading import official_sizes
    from xfm_fast.models.convert import SUFFIXES, to_official_file, to_xfm_folder
    from xfm_fast.models.hub import resolve

    named(model, source)
    path, sizes = resolve(model), official_sizes(source.config)
    settings: Any = {"image_size": source.image_size, "keep_unused": keep_unused}
    if destination.suffix in SUFFIXES and not destination.is_dir():
        report = to_official_file(path, destination, **settings)
    else:
        report = to_xfm_folder(path, destination, sizes, tokenizer=source.tokenizer, **settings)
    for line in report:
        print(line)
