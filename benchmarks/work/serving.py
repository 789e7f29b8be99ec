"""`xfm-fast bench serve`: the HTTP service under load, against the same service that takes one request at a time.

Every backend is a process of its own that listens on this machine. Clients send requests and wait, each over its own
connection; the backends take turns, a window of requests each. A soak then lets clients of all kinds, careless ones
among them, send requests for minutes, and watches the memory of the process.
"""

from __future__ import annotations

import base64
import copy
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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from PIL import Image

from xfm_fast.checkpoint import Head
from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM

from ..material import photographs
from ..material.inputs import described, make_tokenizer, preset_config, random_state
from ..measure import Backend, Block, Call, Case, Run, benchmark, percentile
from ..record import ONE_AT_A_TIME, OURS, Extra, Model, Status
from ..timing import DTYPES

_STARTING_SECONDS = 300
_ANSWER_SECONDS = 600
# Photographs of a shop's catalogue are about so large.
_SIDE = 256
_CATALOGUE = 64
# Backend -> label and options of the service.
_SERVICES: dict[str, tuple[str, tuple[str, ...]]] = {
    OURS: ("xfm-fast serve", ()),
    ONE_AT_A_TIME: ("one request at a time, nothing kept", ("--batch-tokens", "1", "--cache-mb", "0")),
    "one-at-a-time-cached": ("one request at a time, memories kept", ("--batch-tokens", "1")),
}
# Memory of a process that was soaked may move by this, which is what an allocator does.
_ALLOWED_SHARE, _ALLOWED_BYTES = 0.03, 24 << 20


@benchmark(
    "serve", title="The HTTP service under load, against one request at a time", reference=ONE_AT_A_TIME
)  # fmt: skip
def run(run: Run) -> Iterator[Case]:
    """Two kinds of requests by several numbers of clients, and a soak."""
    options, chance = run.options, random.Random(run.options.seed)
    run.progress.begin(2 + 2 * len(options.clients) + bool(options.soak))
    run.progress.stage("photographs, captions and weights")
    collection = photographs.bundled() if options.data is None else photographs.from_files(options.data)
    tokenizer = make_tokenizer(options.preset, options.tokenizer, collection)
    run.document.data = described(collection, tokenizer)
    folder, model = run.scratch / "served", _model(run)
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    material = Material.of(collection, options.seed)
    compared = [material.known(4, chance), material.new(4, chance)]
    # The generator of the load keeps no model while it measures.
    expected = {dtype: _expected(model, dtype, compared) for dtype in {"fp32", options.dtype}}
    del model
    run.probe()
    with ExitStack() as stack:
        run.progress.stage("starting the services")
        # A slow backend is measured, not given up.
        patient = ("--max-queue", str(2 * max(options.clients)), "--timeout", str(_ANSWER_SECONDS))
        shared = ("--dtype", options.dtype, "--device", run.device.type, *patient)
        names = [name for name in _SERVICES if not options.quick or name in (OURS, ONE_AT_A_TIME)]
        running = {name: stack.enter_context(service(folder, *shared, *_SERVICES[name][1])) for name in names}
        documents = options.documents
        for work, words, make in (
            (
                "serve-known",
                f"a caption and {documents} images of a catalogue of {_CATALOGUE} that was asked for before",
                material.known,
            ),
            ("serve-new", f"an image never seen and {documents} captions", material.new),
        ):
            if work == "serve-known":
                # Every image once, of every service.
                urls = [material.catalogue[start : start + documents] for start in range(0, _CATALOGUE, documents)]
                for one in running.values():
                    drive(one.port, [_rerank("a dog", [{"image": url} for url in part]) for part in urls], 1)
            for clients in options.clients:
                run.progress.stage(f"{words}, {clients} clients")
                count = max(options.requests, clients)
                yield Case(
                    work, f"re-rank over HTTP: {words}, {clients} clients",
                    [
                        _backend(name, options, one, clients, count, partial(make, documents, chance), compared)
                        for name, one in running.items()
                    ],
                    "requests", count, judge="XFM.match", reference=expected.__getitem__, rounds=options.rounds,
                    warmups=0, block=_window_block,
                )  # fmt: skip
        if options.soak:
            run.progress.stage(f"a soak of {options.soak:g} s")
            parity = next((row.parity for row in run.document.rows if row.backend == OURS), None)
            done = soak(running[OURS], material, documents, max(options.clients), options.soak, options.seed)
            backend = Backend(OURS, options.dtype, dict, _SERVICES[OURS][0], parity=parity, lacking=done.verdict)
            name = f"all kinds of requests for {done.seconds / 60:.1f} minutes"
            row = Case("serve-soak", name, [], "requests", done.requests).result(backend)
            row.seconds, row.extra = [done.seconds], done.extra(max(options.clients))
            run.add([row])


def _window_block(call: Call) -> Block:
    def block() -> list[float]:
        window: Window = call()
        if window.failures:
            raise UnavailableError(f"{len(window.failures)} requests failed, such as: {window.failures[0]}")
        return [window.seconds]

    return block


def _backend(
    name: str, options: Any, running: Running, clients: int, count: int, request: Callable[[], Request],
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
        latencies = [second for window in windows for second in window.latencies]
        return of_clients(clients, latencies, []) | {"cpu_s": statistics.median(busy)}

    def scores() -> torch.Tensor:
        return torch.tensor([score for request in compared for score in served(running.port, request)])

    return Backend(name, options.dtype, lambda: window, _SERVICES[name][0], check=scores, detail=detail)


def of_clients(clients: int, latencies: Sequence[float], failures: Sequence[str]) -> Extra:
    """The clients' side of a result."""
    return {
        "clients": clients, "requests": len(latencies), "failures": len(failures),
        "clients_p50_s": statistics.median(latencies), "clients_p99_s": percentile(latencies, 0.99),
    }  # fmt: skip


def _model(run: Run) -> XFM:
    options, checkpoint = run.options, run.options.checkpoint
    if checkpoint is not None:
        model = XFM.from_pretrained(checkpoint)
    else:
        config = preset_config(options.preset)
        heads: tuple[Head, ...] = ("contrastive", "matching")
        with torch.device("meta"):
            model = XFM(config, heads=heads)
        model.load_state_dict(random_state(config, heads, options.seed), assign=True)
    origin = f"random weights (seed {options.seed})" if checkpoint is None else str(checkpoint)
    run.document.model = Model(
        preset=options.preset, origin=origin, trained=checkpoint is not None, meaningful_recall=False,
        config=model.config.model_dump(), parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    return model.eval()


def _expected(model: XFM, dtype: str, requests: Sequence[Request]) -> torch.Tensor:
    """Scores of requests by `XFM.match` in this process."""
    narrow = model if dtype == "fp32" else copy.deepcopy(model).to(DTYPES[dtype])
    return torch.tensor([score for request in requests for score in offline(narrow, request)])


class Window(NamedTuple):
    """Requests that some clients made of a service.

    Attributes:
        seconds: from the first to the last answer.
        latencies: of every request.
        failures: answers that were none, each with its status or error.
    """

    seconds: float
    latencies: list[float]
    failures: list[str]


class Request(NamedTuple):
    """A request: its address, its body, and the status of its answer."""

    path: str
    body: bytes
    status: int = 200


def drive(port: int, requests: Sequence[Request], clients: int) -> Window:
    """Let some clients send requests in turn until all are answered.

    Args:
        port: of a service on this machine.
        requests: each is sent once.
        clients: how many at a time, each over a connection of its own.
    """
    waiting, lock = iter(requests), threading.Lock()
    latencies: list[float] = []
    failures: list[str] = []
    begin = threading.Barrier(clients + 1)

    def client() -> None:
        connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
        begin.wait()
        while True:
            with lock:
                request = next(waiting, None)
            if request is None:
                break
            started = time.perf_counter()
            failure = _failure(connection, request)
            taken = time.perf_counter() - started
            with lock:
                latencies.append(taken)
                if failure is not None:
                    failures.append(failure)
        connection.close()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    begin.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return Window(time.perf_counter() - started, latencies, failures)


def _failure(connection: HTTPConnection, request: Request) -> str | None:
    """Send a request; returns what went wrong, if anything did."""
    try:
        connection.request("POST", request.path, request.body, {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status == request.status:
            return None
        return f"status {answer.status} for {request.path}: {content[:200].decode(errors='replace')}"
    except OSError as error:
        connection.close()
        return f"{type(error).__name__} for {request.path}: {error}"


@dataclass(frozen=True)
class Material:
    """Encoded photographs as data URLs, and captions."""

    catalogue: list[str]
    captions: list[str]
    images: list[Image.Image]

    @classmethod
    def of(cls, collection: photographs.Collection, seed: int) -> Material:
        """A catalogue of crops of the photographs."""
        chance = random.Random(seed)
        crops = [_crop(collection.images[n % len(collection.images)], chance) for n in range(_CATALOGUE)]
        return cls([_data_url(crop) for crop in crops], collection.captions, collection.images)

    def known(self, documents: int, chance: random.Random) -> Request:
        """A caption and images of the catalogue, all of which were asked for before."""
        chosen = chance.sample(self.catalogue, documents)
        return _rerank(chance.choice(self.captions), [{"image": url} for url in chosen])

    def new(self, documents: int, chance: random.Random) -> Request:
        """An image that was never asked for, and captions."""
        url = _data_url(_crop(chance.choice(self.images), chance))
        captions = [chance.choice(self.captions) for _ in range(documents)]
        return _rerank({"image": url}, captions)

    def careless(self, chance: random.Random) -> Request:
        """A request that is answered with a 4xx."""
        broken = "data:image/png;base64," + base64.b64encode(chance.randbytes(2000)).decode()
        return chance.choice(
            [
                _rerank("a dog", [{"image": broken}], 422),
                _rerank("a dog", [], 422),
                Request("/v1/rerank", b"{" + chance.randbytes(100), 400),
                Request("/v1/embeddings", json.dumps({"input": "?!"}).encode(), 422),
            ]
        )

    def embedding(self, chance: random.Random) -> Request:
        """Captions and an image to be embedded."""
        items: list[Any] = [chance.choice(self.captions) for _ in range(4)]
        items.append({"image": chance.choice(self.catalogue)})
        return Request("/v1/embeddings", json.dumps({"input": items}).encode())


def _rerank(query: Any, documents: list[Any], status: int = 200) -> Request:
    return Request("/v1/rerank", json.dumps({"query": query, "documents": documents}).encode(), status)


def _crop(image: Image.Image, chance: random.Random) -> Image.Image:
    share = chance.uniform(0.5, 1.0)
    width, height = int(image.width * share), int(image.height * share)
    left, top = chance.randint(0, image.width - width), chance.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height)).resize((_SIDE, _SIDE))


def _data_url(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


class Running(NamedTuple):
    """A service in a process of its own."""

    port: int
    process: psutil.Process


@contextmanager
def service(folder: Path, *arguments: str) -> Iterator[Running]:
    """Serve a model for the time of a block.

    Raises:
        UnavailableError: it does not start.
    """
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
    """What a service went through, and its resident memory meanwhile, in bytes, in the order of time."""

    requests: int
    seconds: float
    latencies: list[float]
    failures: list[str]
    memory: list[int]

    @property
    def grown(self) -> int:
        """Growth of memory: the median of the last fifth over that of the third one. The first ones fill caches."""
        fifth = max(1, len(self.memory) // 5)
        middle = self.memory[2 * fifth : 3 * fifth] or self.memory[:1]
        return int(statistics.median(self.memory[-fifth:]) - statistics.median(middle))

    @property
    def steady(self) -> bool:
        """True if memory grew by no more than an allocator's noise."""
        return self.grown <= max(_ALLOWED_BYTES, _ALLOWED_SHARE * self.memory[-1])

    @property
    def verdict(self) -> tuple[Status, str | None]:
        """Status and reason of the result."""
        if self.failures:
            return "failed", f"{len(self.failures)} failures, such as: {self.failures[0]}"
        return ("measured", None) if self.steady else ("failed", f"memory grew by {self.grown:,} bytes")

    def extra(self, clients: int) -> Extra:
        """Latencies and memory."""
        return of_clients(clients, self.latencies, self.failures) | {
            "peak_bytes": max(self.memory), "grown_bytes": self.grown,
            "memory_method": "resident, sampled; growth from the third fifth of the time to the last",
        }  # fmt: skip


def soak(
    running: Running, material: Material, documents: int, clients: int, seconds: float, seed: int
) -> Soak:  # fmt: skip
    """Have clients of all kinds ask for some time, one in eight requests being careless."""
    kinds: list[Callable[[random.Random], Request]] = [
        lambda chance: material.known(documents, chance),
        lambda chance: material.new(documents, chance),
        material.embedding,
        lambda chance: material.known(documents, chance),
        lambda chance: material.new(documents, chance),
        material.embedding,
        lambda chance: material.known(documents, chance),
        material.careless,
    ]
    chance = random.Random(seed)
    memory, latencies, failures = [running.process.memory_info().rss], [], []
    started, turns = time.perf_counter(), cycle(kinds)
    while time.perf_counter() - started < seconds:
        window = drive(running.port, [next(turns)(chance) for _ in range(8 * clients)], clients)
        latencies += window.latencies
        failures += window.failures
        memory.append(running.process.memory_info().rss)
    return Soak(len(latencies), time.perf_counter() - started, latencies, failures, memory)


def served(port: int, request: Request) -> list[float]:
    """Relevance of the documents of a request, in their order, as a service has it."""
    connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("POST", request.path, request.body, {"content-type": "application/json"})
        results = json.loads(connection.getresponse().read())["results"]
    finally:
        connection.close()
    return [each["relevance_score"] for each in sorted(results, key=lambda each: each["index"])]


def offline(model: XFM, request: Request) -> list[float]:
    """The same by the model in this process."""
    content = json.loads(request.body)

    def opened(item: dict[str, str]) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(item["image"].partition(",")[2])))

    if isinstance(content["query"], dict):
        return model.match(opened(content["query"]), content["documents"]).tolist()
    return [float(model.match(opened(item), content["query"])) for item in content["documents"]]
