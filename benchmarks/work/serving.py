"""`xfm-fast bench serve`: the HTTP service under load, against the same service that takes one request at a time.

Both are processes of their own that listen on this machine. Clients send requests and wait, each over its own
connection; the services take turns, a window of requests each.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM

from ..inputs import preset_config
from ..measure import Backend, Case, Run, benchmark, percentile
from ..record import ONE_AT_A_TIME, OURS, Extra
from ..timing import DTYPES
from .model import prepare

_ANSWER_SECONDS = 600
# Photographs of a shop's catalogue are about so large.
_SIDE = 256
_CATALOGUE = 64
# Documents of a request.
_DOCUMENTS = 16
# Backend -> label and options of the service.
_SERVICES: dict[str, tuple[str, tuple[str, ...]]] = {
    OURS: ("xfm-fast serve", ()),
    ONE_AT_A_TIME: (
        "one request at a time, nothing kept",
        ("--batch-tokens", "1", "--cache-mb", "0"),
    ),
}

Request = dict[str, Any]
"""The body of a rerank request."""


@benchmark(
    "serve",
    title="The HTTP service under load, against one request at a time",
    reference=ONE_AT_A_TIME,
)
def run(run: Run) -> Iterator[Case]:
    """Two kinds of requests by several numbers of clients."""
    options, chance, dtype = run.options, random.Random(run.options.seed), run.dtypes[0]
    run.progress.begin(3 + 2 * len(options.clients))
    loaded = prepare(run, preset_config(options.preset).image_size)
    size = options.image_size or loaded.subjects.config.image_size
    models = {name: loaded.subjects.model(size, DTYPES[name]) for name in {"fp32", dtype}}
    models["fp32"].tokenizer = models[dtype].tokenizer = loaded.tokenizer
    folder = run.scratch / "served"
    models["fp32"].save_pretrained(folder)
    captions, photos = loaded.collection.captions, loaded.collection.images
    catalogue = [crop_url(photos[number % len(photos)], chance) for number in range(_CATALOGUE)]
    checked = [known(chance, captions, catalogue, 4), new(chance, captions, photos, 4)]
    expected = {
        name: torch.tensor([score for request in checked for score in offline(model, request)])
        for name, model in models.items()
    }
    # The generator of the load keeps no model while it measures.
    del loaded, models
    with ExitStack() as stack:
        run.progress.stage("starting the services")
        # A slow backend is measured, not given up.
        patient = ("--max-queue", str(2 * max(options.clients)), "--timeout", str(_ANSWER_SECONDS))
        shared = ("--dtype", dtype, "--device", run.device.type, *patient)
        services = {
            name: stack.enter_context(service(folder, *shared, *arguments))
            for name, (_, arguments) in _SERVICES.items()
        }
        for work, words, make in (
            (
                "serve-known",
                f"a caption and {_DOCUMENTS} images of a catalogue of {_CATALOGUE} that was asked for before",
                partial(known, chance, captions, catalogue),
            ),
            (
                "serve-new", f"an image never seen and {_DOCUMENTS} captions",
                partial(new, chance, captions, photos),
            ),
        ):  # fmt: skip
            for port, _ in services.values() if work == "serve-known" else ():
                drive(
                    port,
                    [{"query": "a dog", "documents": [{"image": url}]} for url in catalogue],
                    1,
                )
            for clients in options.clients:
                run.progress.stage(f"{words}, {clients} clients")
                count = max(options.requests, clients)
                backends = [
                    _backend(name, dtype, *each, clients, count, make, checked)
                    for name, each in services.items()
                ]
                yield Case(
                    work, f"re-rank over HTTP: {words}, {clients} clients", backends, "requests", count,
                    judge="XFM.match", reference=expected.__getitem__, rounds=3 if options.quick else 5, warmups=0,
                    block=lambda call: lambda: [call()],
                )  # fmt: skip


def _backend(
    name: str, dtype: str, port: int, process: psutil.Process, clients: int, count: int, make: Callable[[], Request],
    checked: list[Request],
) -> Backend:  # fmt: skip
    latencies, busy = list[float](), list[float]()

    def window() -> float:
        """Seconds from the first request to the last response."""
        requests = [make() for _ in range(count)]
        before, started = sum(process.cpu_times()[:2]), time.perf_counter()
        latencies.extend(drive(port, requests, clients))
        seconds = time.perf_counter() - started
        busy.append((sum(process.cpu_times()[:2]) - before) / count)
        return seconds

    def detail(median_s: float) -> Extra:
        return {
            "clients": clients, "requests": len(latencies), "clients_p50_s": statistics.median(latencies),
            "clients_p99_s": percentile(latencies, 0.99), "cpu_s": statistics.median(busy),
        }  # fmt: skip

    def scores() -> torch.Tensor:
        with closing(HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)) as connection:
            results = [send(connection, request)["results"] for request in checked]
        ordered = [sorted(each, key=lambda result: result["index"]) for each in results]
        return torch.tensor([result["relevance_score"] for each in ordered for result in each])

    return Backend(name, dtype, lambda: window, _SERVICES[name][0], check=scores, detail=detail)


def send(connection: HTTPConnection, request: Request) -> Any:
    """The response to a request; raises `UnavailableError` unless its status is 200."""
    connection.request(
        "POST", "/v1/rerank", json.dumps(request), {"content-type": "application/json"}
    )
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
        raise UnavailableError(
            f"status {answer.status} for /v1/rerank: {content[:200].decode(errors='replace')}"
        )
    return json.loads(content)


def drive(port: int, requests: Sequence[Request], clients: int) -> list[float]:
    """Send each request once, by so many clients at a time, each over its own connection; returns the latencies."""
    local, connections = threading.local(), list[HTTPConnection]()

    def connect() -> None:
        local.connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
        connections.append(local.connection)

    def measure(request: Request) -> float:
        started = time.perf_counter()
        send(local.connection, request)
        return time.perf_counter() - started

    with ThreadPoolExecutor(clients, initializer=connect) as threads:
        latencies = list(threads.map(measure, requests))
    for connection in connections:
        connection.close()
    return latencies


def known(
    chance: random.Random, captions: list[str], catalogue: list[str], documents: int = _DOCUMENTS
) -> Request:
    """A caption and images of a catalogue."""
    images = chance.sample(catalogue, documents)
    return {"query": chance.choice(captions), "documents": [{"image": url} for url in images]}


def new(
    chance: random.Random, captions: list[str], photos: list[Image.Image], documents: int = _DOCUMENTS
) -> Request:  # fmt: skip
    """A new image, and captions."""
    query = {"image": crop_url(chance.choice(photos), chance)}
    return {"query": query, "documents": [chance.choice(captions) for _ in range(documents)]}


def crop_url(image: Image.Image, chance: random.Random) -> str:
    """A data URL of a part of a photograph."""
    share = chance.uniform(0.5, 1.0)
    width, height = int(image.width * share), int(image.height * share)
    left, top = chance.randint(0, image.width - width), chance.randint(0, image.height - height)
    stream = io.BytesIO()
    image.crop((left, top, left + width, top + height)).resize((_SIDE, _SIDE)).save(
        stream, "JPEG", quality=85
    )
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


@contextmanager
def service(folder: Path, *arguments: str) -> Iterator[tuple[int, psutil.Process]]:
    """Serve a model in a process: its port and the process. Raises `UnavailableError` if it does not start."""
    command = [
        sys.executable,
        "-m",
        "xfm_fast.cli",
        "serve",
        str(folder),
        "--port",
        "0",
        *arguments,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as begun:
        try:
            assert begun.stdout is not None
            assert begun.stderr is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)", begun.stdout.readline())
            if found is None:
                output = " ".join(begun.stderr.read().split())[:500]
                raise UnavailableError(f"the service does not start; its output: {output}")
            yield int(found[1]), psutil.Process(begun.pid)
        finally:
            begun.kill()


def offline(model: XFM, request: Request) -> list[float]:
    """Scores of a request by `XFM.match` in this process."""

    def decode(item: dict[str, str]) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(item["image"].partition(",")[2])))

    if isinstance(request["query"], dict):
        return model.match(decode(request["query"]), request["documents"]).tolist()
    return [float(model.match(decode(item), request["query"])) for item in request["documents"]]
