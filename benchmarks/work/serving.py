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
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM
from xfm_fast.testing import preset_config

from ..measure import Backend, Case, Run, benchmark
from ..record import ONE_AT_A_TIME, OURS, Extra
from ..timing import DTYPES, percentile
from .model import prepare

_TIMEOUT_S = 600
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
    about="the HTTP service under load of re-ranking clients, against the same service with one request at a time",
)
def run(run: Run) -> Iterator[Case]:
    """Yield two kinds of requests by several numbers of clients."""
    options, draw, dtype = run.options, random.Random(run.options.seed), run.dtypes[0]
    run.progress.begin(3 + 2 * len(options.clients))
    material = prepare(run, preset_config(options.preset).image_size)
    size = options.image_size or material.sizes.image_size
    models = {name: material.weights.model(size, DTYPES[name]) for name in {"fp32", dtype}}
    models["fp32"].tokenizer = models[dtype].tokenizer = material.tokenizer
    folder = run.scratch / "served"
    models["fp32"].save_pretrained(folder)
    captions, photos = material.collection.captions, material.collection.images
    catalogue = [crop_url(photo, draw) for photo in islice(cycle(photos), _CATALOGUE)]
    checked = [
        caption_request(draw, captions, catalogue, 4),
        image_request(draw, captions, photos, 4),
    ]
    expected = {name: offline(model, checked) for name, model in models.items()}
    # The generator of the load keeps no model while it measures.
    del material, models
    workloads: list[tuple[str, str, Callable[[], Request]]] = [
        (
            "serve-known",
            f"a caption and {_DOCUMENTS} images of a catalogue of {_CATALOGUE} that was asked for before",
            partial(caption_request, draw, captions, catalogue),
        ),
        (
            "serve-new",
            f"an image never seen and {_DOCUMENTS} captions",
            partial(image_request, draw, captions, photos),
        ),
    ]
    with ExitStack() as stack:
        run.progress.stage("starting the services")
        # A slow backend is measured, not given up.
        queue = str(2 * max(options.clients))
        shared = ("--max-queue", queue, "--timeout", str(_TIMEOUT_S), "--device", run.device.type)
        services = {
            name: stack.enter_context(service(folder, "--dtype", dtype, *shared, *arguments))
            for name, (_, arguments) in _SERVICES.items()
        }
        for work, title, make in workloads:
            if work == "serve-known":
                images = [{"query": "a dog", "documents": [{"image": url}]} for url in catalogue]
                for port, _ in services.values():
                    drive(port, images, 1)
            for clients in options.clients:
                run.progress.stage(f"{title}, {clients} clients")
                count = max(options.requests, clients)
                load = partial(_backend, make=make, checked=checked, clients=clients, count=count)
                yield Case(
                    work,
                    f"re-rank over HTTP: {title}, {clients} clients",
                    [load(name, dtype, *address) for name, address in services.items()],
                    "requests",
                    count,
                    judge="XFM.match",
                    reference=expected.__getitem__,
                    rounds=3 if options.quick else 5,
                    warmups=0,
                    block=lambda call: lambda: [call()],
                )


def _backend(
    name: str,
    dtype: str,
    port: int,
    process: psutil.Process,
    make: Callable[[], Request],
    checked: list[Request],
    clients: int,
    count: int,
) -> Backend:
    """Return a service under the load of some clients, compared at the requests `checked`."""
    latencies, cpu_seconds = list[float](), list[float]()

    def window() -> float:
        """Return the seconds from the first request to the last response."""
        requests = [make() for _ in range(count)]
        before, start = sum(process.cpu_times()[:2]), time.perf_counter()
        latencies.extend(drive(port, requests, clients))
        seconds = time.perf_counter() - start
        cpu_seconds.append((sum(process.cpu_times()[:2]) - before) / count)
        return seconds

    def detail(median_s: float) -> Extra:
        return {
            "clients": clients,
            "requests": len(latencies),
            "clients_p50_s": statistics.median(latencies),
            "clients_p99_s": percentile(latencies, 0.99),
            "cpu_s": statistics.median(cpu_seconds),
        }

    def scores() -> torch.Tensor:
        values = []
        with closing(HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)) as connection:
            for request in checked:
                results = send(connection, request)["results"]
                results.sort(key=lambda result: result["index"])
                values += [result["relevance_score"] for result in results]
        return torch.tensor(values)

    return Backend(name, dtype, lambda: window, _SERVICES[name][0], check=scores, detail=detail)


def send(connection: HTTPConnection, request: Request) -> Any:
    """Return the response to a request; raises `UnavailableError` unless its status is 200."""
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
    """Send each request once, from `clients` at a time, each over its own connection; return the latencies."""
    local, connections = threading.local(), list[HTTPConnection]()

    def connect() -> None:
        local.connection = HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
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


def caption_request(
    draw: random.Random, captions: list[str], catalogue: list[str], documents: int = _DOCUMENTS
) -> Request:
    """Draw a caption and images of a catalogue."""
    images = draw.sample(catalogue, documents)
    return {"query": draw.choice(captions), "documents": [{"image": url} for url in images]}


def image_request(
    draw: random.Random,
    captions: list[str],
    photos: list[Image.Image],
    documents: int = _DOCUMENTS,
) -> Request:
    """Draw a new image, and captions."""
    query = {"image": crop_url(draw.choice(photos), draw)}
    return {"query": query, "documents": [draw.choice(captions) for _ in range(documents)]}


def crop_url(image: Image.Image, draw: random.Random) -> str:
    """Return the data URL of a random crop of a photograph."""
    share = draw.uniform(0.5, 1.0)
    width, height = int(image.width * share), int(image.height * share)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    crop = image.crop((left, top, left + width, top + height)).resize((_SIDE, _SIDE))
    stream = io.BytesIO()
    crop.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


@contextmanager
def service(folder: Path, *arguments: str) -> Iterator[tuple[int, psutil.Process]]:
    """Serve a model in a process; yields port and process, raises `UnavailableError` if it does not start."""
    command = [sys.executable, "-m", "xfm_fast.cli", "serve", str(folder), "--port=0", *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            address = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
            if address is None:
                output = " ".join(process.stderr.read().split())[:500]
                raise UnavailableError(f"the service does not start; its output: {output}")
            yield int(address[1]), psutil.Process(process.pid)
        finally:
            process.kill()


def offline(model: XFM, requests: Sequence[Request]) -> torch.Tensor:
    """Score requests by `XFM.match` in this process."""

    def decode(item: dict[str, str]) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(item["image"].partition(",")[2])))

    scores: list[float] = []
    for request in requests:
        query, documents = request["query"], request["documents"]
        if isinstance(query, dict):
            scores += model.match(decode(query), documents).tolist()
        else:
            scores += [float(model.match(decode(item), query)) for item in documents]
    return torch.tensor(scores)
