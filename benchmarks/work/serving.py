"""`xfm-fast bench serve`: the HTTP service under load, against the same service that takes one request at a time.

Every backend is a process of its own that listens on this machine. Clients send requests and wait, each over its own
connection; the backends take turns, a window of requests each. A soak then lets clients send all kinds of requests,
invalid ones among them, for minutes, and watches the memory of the process.
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
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from PIL import Image

from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM

from ..inputs import Collection, preset_config
from ..measure import Backend, Block, Call, Case, Run, benchmark, percentile
from ..record import ONE_AT_A_TIME, OURS, Extra, Status
from ..timing import DTYPES
from .model import prepare

_STARTING_SECONDS = 300
_ANSWER_SECONDS = 600
# Photographs of a shop's catalogue are about so large.
_SIDE = 256
_CATALOGUE = 64
# Documents of a request.
_DOCUMENTS = 16
# Backend -> label and options of the service.
_SERVICES: dict[str, tuple[str, tuple[str, ...]]] = {
    OURS: ("xfm-fast serve", ()),
    ONE_AT_A_TIME: ("one request at a time, nothing kept", ("--batch-tokens", "1", "--cache-mb", "0")),
    "one-at-a-time-cached": ("one request at a time, memories kept", ("--batch-tokens", "1")),
}
# An allocator's noise in the memory of a process.
_ALLOWED_SHARE, _ALLOWED_BYTES = 0.03, 24 << 20


@benchmark(
    "serve", title="The HTTP service under load, against one request at a time", reference=ONE_AT_A_TIME
)  # fmt: skip
def run(run: Run) -> Iterator[Case]:
    """Two kinds of requests by several numbers of clients, and a soak."""
    options, chance = run.options, random.Random(run.options.seed)
    run.progress.begin(3 + 2 * len(options.clients) + bool(options.soak))
    loaded = prepare(run, preset_config(options.preset).image_size)
    size = options.image_size or loaded.subjects.config.image_size
    models = {dtype: loaded.subjects.model(size, DTYPES[dtype]) for dtype in {"fp32", options.dtype}}
    models["fp32"].tokenizer = models[options.dtype].tokenizer = loaded.tokenizer
    folder = run.scratch / "served"
    models["fp32"].save_pretrained(folder)
    material = Material.of(loaded.collection, options.seed)
    compared = [material.known(4, chance), material.new(4, chance)]
    expected = {
        dtype: torch.tensor([score for request in compared for score in offline(model, request)])
        for dtype, model in models.items()
    }
    # The generator of the load keeps no model while it measures.
    del loaded, models
    with ExitStack() as stack:
        run.progress.stage("starting the services")
        # A slow backend is measured, not given up.
        patient = ("--max-queue", str(2 * max(options.clients)), "--timeout", str(_ANSWER_SECONDS))
        shared = ("--dtype", options.dtype, "--device", run.device.type, *patient)
        names = [name for name in _SERVICES if not options.quick or name in (OURS, ONE_AT_A_TIME)]
        running = {name: stack.enter_context(service(folder, *shared, *_SERVICES[name][1])) for name in names}
        documents = _DOCUMENTS
        known = f"a caption and {documents} images of a catalogue of {_CATALOGUE} that was asked for before"
        for work, words, make in (
            ("serve-known", known, material.known),
            ("serve-new", f"an image never seen and {documents} captions", material.new),
        ):
            if work == "serve-known":
                # Every image once, of every service.
                parts = [material.catalogue[start : start + documents] for start in range(0, _CATALOGUE, documents)]
                requests = [Request.rerank("a dog", [{"image": url} for url in part]) for part in parts]
                for one in running.values():
                    drive(one.port, requests, 1)
            for clients in options.clients:
                run.progress.stage(f"{words}, {clients} clients")
                count = max(options.requests, clients)
                backends = [
                    _backend(name, options.dtype, one, clients, count, partial(make, documents, chance), compared)
                    for name, one in running.items()
                ]
                yield Case(
                    work, f"re-rank over HTTP: {words}, {clients} clients", backends, "requests", count,
                    judge="XFM.match", reference=expected.__getitem__, rounds=options.rounds, warmups=0,
                    block=_window_block,
                )  # fmt: skip
        if options.soak:
            run.progress.stage(f"a soak of {options.soak:g} s")
            parity = next((row.parity for row in run.document.rows if row.backend == OURS), None)
            done = soak(running[OURS], material, documents, max(options.clients), options.soak, options.seed)
            backend = Backend(OURS, options.dtype, dict, _SERVICES[OURS][0], parity=parity, lacking=done.verdict)
            name = f"all kinds of requests for {done.window.seconds / 60:.1f} minutes"
            row = Case("serve-soak", name, [], "requests", len(done.window.latencies)).result(backend)
            row.seconds = [done.window.seconds]
            row.extra = done.window.extra(max(options.clients)) | {
                "peak_bytes": max(done.memory), "grown_bytes": done.grown,
                "memory_method": "resident, sampled; growth from the third fifth of the time to the last",
            }  # fmt: skip
            run.add([row])


def _window_block(call: Call) -> Block:
    def block() -> list[float]:
        window: Window = call()
        if window.failures:
            raise UnavailableError(f"{len(window.failures)} requests failed, such as: {window.failures[0]}")
        return [window.seconds]

    return block


def _backend(
    name: str, dtype: str, running: Running, clients: int, count: int, request: Callable[[], Request],
    compared: list[Request],
) -> Backend:  # fmt: skip
    windows, busy = list[Window](), list[float]()

    def window() -> Window:
        requests = [request() for _ in range(count)]
        before = sum(running.process.cpu_times()[:2])
        windows.append(drive(running.port, requests, clients))
        busy.append((sum(running.process.cpu_times()[:2]) - before) / count)
        return windows[-1]

    def detail(median_s: float) -> Extra:
        every = Window(0.0, [second for window in windows for second in window.latencies], [])
        return every.extra(clients) | {"cpu_s": statistics.median(busy)}

    def scores() -> torch.Tensor:
        found: list[float] = []
        with closing(HTTPConnection("127.0.0.1", running.port, timeout=_ANSWER_SECONDS)) as connection:
            for request in compared:
                results = json.loads(send(connection, request)[1])["results"]
                found += [each["relevance_score"] for each in sorted(results, key=lambda each: each["index"])]
        return torch.tensor(found)

    return Backend(name, dtype, lambda: window, _SERVICES[name][0], check=scores, detail=detail)


class Request(NamedTuple):
    """A request: its path, its body, and the expected status of the response."""

    path: str
    body: bytes
    status: int = 200

    @classmethod
    def rerank(cls, query: Any, documents: list[Any], status: int = 200) -> Request:
        return cls("/v1/rerank", json.dumps({"query": query, "documents": documents}).encode(), status)


class Window(NamedTuple):
    """Requests of some clients: seconds from the first to the last response, latencies, unexpected responses."""

    seconds: float
    latencies: list[float]
    failures: list[str]

    def extra(self, clients: int) -> Extra:
        """The clients' side of a result."""
        return {
            "clients": clients, "requests": len(self.latencies), "failures": len(self.failures),
            "clients_p50_s": statistics.median(self.latencies), "clients_p99_s": percentile(self.latencies, 0.99),
        }  # fmt: skip


def send(connection: HTTPConnection, request: Request) -> tuple[int, bytes]:
    """Send a request; returns the status and the content of the response."""
    connection.request("POST", request.path, request.body, {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def drive(port: int, requests: Sequence[Request], clients: int) -> Window:
    """Send each request once, by so many clients at a time, each over a connection of its own."""
    local, connections = threading.local(), list[HTTPConnection]()

    def connect() -> None:
        local.connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
        connections.append(local.connection)

    def measure(request: Request) -> tuple[float, str | None]:
        failure, started = None, time.perf_counter()
        try:
            status, content = send(local.connection, request)
            if status != request.status:
                failure = f"status {status} for {request.path}: {content[:200].decode(errors='replace')}"
        except OSError as error:
            local.connection.close()
            failure = f"{type(error).__name__} for {request.path}: {error}"
        return time.perf_counter() - started, failure

    with ThreadPoolExecutor(clients, initializer=connect) as threads:
        started = time.perf_counter()
        done = list(threads.map(measure, requests))
        seconds = time.perf_counter() - started
    for connection in connections:
        connection.close()
    return Window(seconds, [second for second, _ in done], [failure for _, failure in done if failure is not None])


@dataclass(frozen=True)
class Material:
    """Encoded photographs as data URLs, and captions."""

    catalogue: list[str]
    captions: list[str]
    images: list[Image.Image]

    @classmethod
    def of(cls, collection: Collection, seed: int) -> Material:
        """A catalogue of crops of the photographs."""
        chance = random.Random(seed)
        photos = collection.images
        catalogue = [_crop_url(photos[number % len(photos)], chance) for number in range(_CATALOGUE)]
        return cls(catalogue, collection.captions, photos)

    def known(self, documents: int, chance: random.Random) -> Request:
        """A caption and images of the catalogue."""
        chosen = chance.sample(self.catalogue, documents)
        return Request.rerank(chance.choice(self.captions), [{"image": url} for url in chosen])

    def new(self, documents: int, chance: random.Random) -> Request:
        """A new image, and captions."""
        url = _crop_url(chance.choice(self.images), chance)
        return Request.rerank({"image": url}, [chance.choice(self.captions) for _ in range(documents)])

    def invalid(self, chance: random.Random) -> Request:
        """A request that gets a 4xx."""
        broken = "data:image/png;base64," + base64.b64encode(chance.randbytes(2000)).decode()
        return chance.choice(
            [
                Request.rerank("a dog", [{"image": broken}], 422),
                Request.rerank("a dog", [], 422),
                Request("/v1/rerank", b"{" + chance.randbytes(100), 400),
                Request("/v1/embeddings", json.dumps({"input": "?!"}).encode(), 422),
            ]
        )

    def embedding(self, chance: random.Random) -> Request:
        """Captions and an image to be embedded."""
        items: list[Any] = [chance.choice(self.captions) for _ in range(4)]
        items.append({"image": chance.choice(self.catalogue)})
        return Request("/v1/embeddings", json.dumps({"input": items}).encode())


def _crop_url(image: Image.Image, chance: random.Random) -> str:
    share = chance.uniform(0.5, 1.0)
    width, height = int(image.width * share), int(image.height * share)
    left, top = chance.randint(0, image.width - width), chance.randint(0, image.height - height)
    stream = io.BytesIO()
    image.crop((left, top, left + width, top + height)).resize((_SIDE, _SIDE)).save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


class Running(NamedTuple):
    """A service in a process of its own."""

    port: int
    process: psutil.Process


@contextmanager
def service(folder: Path, *arguments: str) -> Iterator[Running]:
    """Serve a model for the time of a block; raises `UnavailableError` if the service does not start."""
    command = [sys.executable, "-m", "xfm_fast.cli", "serve", str(folder), "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as begun:
        alarm = threading.Timer(_STARTING_SECONDS, begun.kill)
        alarm.start()
        try:
            assert begun.stdout is not None
            assert begun.stderr is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)", begun.stdout.readline())
            if found is None:
                begun.kill()
                output = " ".join(begun.stderr.read().split())[:500] or f"none within {_STARTING_SECONDS} s"
                raise UnavailableError(f"the service does not start; its output: {output}")
            alarm.cancel()
            yield Running(int(found[1]), psutil.Process(begun.pid))
        finally:
            alarm.cancel()
            begun.terminate()
            try:
                begun.wait(30)
            except subprocess.TimeoutExpired:
                begun.kill()


class Soak(NamedTuple):
    """Requests of a soak, and samples of the resident memory of the service in bytes."""

    window: Window
    memory: list[int]

    @property
    def grown(self) -> int:
        """Growth of memory: the median of the last fifth over that of the third one. The first ones fill caches."""
        fifth = max(1, len(self.memory) // 5)
        middle = self.memory[2 * fifth : 3 * fifth] or self.memory[:1]
        return int(statistics.median(self.memory[-fifth:]) - statistics.median(middle))

    @property
    def verdict(self) -> tuple[Status, str | None]:
        """Status and reason of the result."""
        if failures := self.window.failures:
            return "failed", f"{len(failures)} failures, such as: {failures[0]}"
        steady = self.grown <= max(_ALLOWED_BYTES, _ALLOWED_SHARE * self.memory[-1])
        return ("measured", None) if steady else ("failed", f"memory grew by {self.grown:,} bytes")


def soak(
    running: Running, material: Material, documents: int, clients: int, seconds: float, seed: int
) -> Soak:  # fmt: skip
    """Send requests of all kinds for some time, one in eight invalid."""
    known, new = partial(material.known, documents), partial(material.new, documents)
    turns = cycle([known, new, material.embedding, known, new, material.embedding, known, material.invalid])
    chance, memory = random.Random(seed), [running.process.memory_info().rss]
    latencies, failures, started = list[float](), list[str](), time.perf_counter()
    while time.perf_counter() - started < seconds:
        window = drive(running.port, [next(turns)(chance) for _ in range(8 * clients)], clients)
        latencies += window.latencies
        failures += window.failures
        memory.append(running.process.memory_info().rss)
    return Soak(Window(time.perf_counter() - started, latencies, failures), memory)


def offline(model: XFM, request: Request) -> list[float]:
    """Scores of a request by `XFM.match` in this process."""
    content = json.loads(request.body)

    def decode(item: dict[str, str]) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(item["image"].partition(",")[2])))

    if isinstance(content["query"], dict):
        return model.match(decode(content["query"]), content["documents"]).tolist()
    return [float(model.match(decode(item), content["query"])) for item in content["documents"]]
