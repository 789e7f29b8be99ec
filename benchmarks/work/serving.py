"""`xfm-fast bench serve`: the HTTP service under load, against the same service that takes one request at a time.

Every contender is a process of its own that listens on this machine. Clients ask and wait, each over its own
connection; the contenders take turns, a window of requests each, so that what else the machine does meets all of them.
A soak then lets clients of all kinds, careless ones among them, ask for minutes, and watches the memory of the process.
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
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

from ..machine import choose_device
from ..material import photographs
from ..material.inputs import described, make_tokenizer, preset_config, random_state
from ..measure import MachineProbes, Progress, agreeing, filled, interleave, interval, parity_band, relative_error
from ..options import ServeOptions
from ..record import ONE_AT_A_TIME, OURS, Clients, Document, Memory, Model, Parity, Point, Row

_STARTING_SECONDS = 300
_ANSWER_SECONDS = 600
# Photographs of a shop's catalogue are about so large.
_SIDE = 256
_CATALOGUE = 64
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_LABELS = {
    OURS: "xfm-fast serve",
    ONE_AT_A_TIME: "one request at a time, nothing kept",
    "one-at-a-time-cached": "one request at a time, memories kept",
}
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    OURS: (),
    ONE_AT_A_TIME: ("--batch-tokens", "1", "--cache-mb", "0"),
    "one-at-a-time-cached": ("--batch-tokens", "1"),
}
# Memory of a process that was soaked may move by this, which is what an allocator does.
_ALLOWED_SHARE, _ALLOWED_BYTES = 0.03, 24 << 20


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


class Asked(NamedTuple):
    """A request: its address, its body, and the status of its answer."""

    path: str
    body: bytes
    status: int = 200


def drive(port: int, requests: Sequence[Asked], clients: int) -> Window:
    """Have some clients ask in turn until all requests are answered.

    Args:
        port: of a service on this machine.
        requests: what is asked, each once.
        clients: that ask at a time, each over a connection of its own.
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
                asked = next(waiting, None)
            if asked is None:
                break
            started = time.perf_counter()
            failure = _asked(connection, asked)
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


def _asked(connection: HTTPConnection, asked: Asked) -> str | None:
    """Ask once; says what went wrong, if anything did."""
    try:
        connection.request("POST", asked.path, asked.body, {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status == asked.status:
            return None
        return f"status {answer.status} for {asked.path}: {content[:200].decode(errors='replace')}"
    except OSError as error:
        connection.close()
        return f"{type(error).__name__} for {asked.path}: {error}"


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

    def known(self, documents: int, chance: random.Random) -> Asked:
        """A caption and images of the catalogue, all of which were asked for before."""
        chosen = chance.sample(self.catalogue, documents)
        return _rerank(chance.choice(self.captions), [{"image": url} for url in chosen])

    def new(self, documents: int, chance: random.Random) -> Asked:
        """An image that was never asked for, and captions."""
        url = _data_url(_crop(chance.choice(self.images), chance))
        captions = [chance.choice(self.captions) for _ in range(documents)]
        return _rerank({"image": url}, captions)

    def careless(self, chance: random.Random) -> Asked:
        """A request that is answered with a 4xx."""
        broken = "data:image/png;base64," + base64.b64encode(chance.randbytes(2000)).decode()
        return chance.choice(
            [
                _rerank("a dog", [{"image": broken}], 422),
                _rerank("a dog", [], 422),
                Asked("/v1/rerank", b"{" + chance.randbytes(100), 400),
                Asked("/v1/embeddings", json.dumps({"input": "?!"}).encode(), 422),
            ]
        )

    def embedding(self, chance: random.Random) -> Asked:
        """Captions and an image to be embedded."""
        items: list[Any] = [chance.choice(self.captions) for _ in range(4)]
        items.append({"image": chance.choice(self.catalogue)})
        return Asked("/v1/embeddings", json.dumps({"input": items}).encode())


def _rerank(query: Any, documents: list[Any], status: int = 200) -> Asked:
    return Asked("/v1/rerank", json.dumps({"query": query, "documents": documents}).encode(), status)


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
        UnavailableError: it does not start, with what it said.
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
                said = " ".join(begun.stderr.read().split())[:500] or f"nothing within {_STARTING_SECONDS} s"
                raise UnavailableError(f"the service does not start; it said: {said}")
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
        """True where memory did not grow by more than an allocator's moods."""
        return self.grown <= max(_ALLOWED_BYTES, _ALLOWED_SHARE * self.memory[-1])


def soak(
    running: Running, material: Material, documents: int, clients: int, seconds: float, seed: int
) -> Soak:  # fmt: skip
    """Have clients of all kinds ask for some time, one in eight requests being careless."""
    kinds: list[Callable[[random.Random], Asked]] = [
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


def run(options: ServeOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure the service; see `ServeOptions`.

    Raises:
        UnavailableError: the service does not start, or the extra `serve` is missing.
        DataError: there are no photographs.
    """
    started, device = time.perf_counter(), choose_device(options.device)
    progress = progress or Progress()
    document = Document.begun("serve", vars(options), command, device.type)
    names = [name for name in _ARGUMENTS if not options.quick or name in (OURS, ONE_AT_A_TIME)]
    progress.begin(2 + 2 * len(options.clients) + bool(options.soak))
    progress.stage("photographs, captions and weights")
    collection = photographs.bundled() if options.data is None else photographs.from_files(options.data)
    tokenizer = make_tokenizer(options.preset, options.tokenizer, collection)
    document.data = described(collection, tokenizer)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        place, model = Path(folder) / "served", _model(options)
        model.tokenizer = tokenizer
        model.save_pretrained(place)
        random_weights = options.checkpoint is None
        document.model = Model(
            preset=options.preset,
            origin=f"random weights (seed {options.seed})" if random_weights else str(options.checkpoint),
            trained=not random_weights, meaningful_recall=False, config=model.config.model_dump(),
            parameters=sum(p.numel() for p in model.parameters()),
        )  # fmt: skip
        material = Material.of(collection, options.seed)
        progress.stage("starting the services")
        # A slow contender is measured, not given up.
        patient = ("--max-queue", str(2 * max(options.clients)), "--timeout", str(_ANSWER_SECONDS))
        shared = ("--dtype", options.dtype, "--device", device.type, *patient)
        running = {name: stack.enter_context(service(place, *shared, *_ARGUMENTS[name])) for name in names}
        load = _Load(options, document, progress, running, material, device)
        progress.step("comparing answers with those of the model itself")
        load.check(model)
        # The generator of the load is all that this process does from here on.
        del model
        try:
            load.measure()
        except KeyboardInterrupt:
            document.interrupted = True
    document.duration_s = time.perf_counter() - started
    return document


def _model(options: ServeOptions) -> XFM:
    if options.checkpoint is not None:
        return XFM.from_pretrained(options.checkpoint)
    config = preset_config(options.preset)
    heads: tuple[Head, ...] = ("contrastive", "matching")
    with torch.device("meta"):
        model = XFM(config, heads=heads)
    model.load_state_dict(random_state(config, heads, options.seed), assign=True)
    return model.eval()


class _Load:
    """The measurements of one document."""

    def __init__(
        self, options: ServeOptions, document: Document, progress: Progress, running: dict[str, Running],
        material: Material, device: torch.device,
    ) -> None:  # fmt: skip
        self.options, self.document, self.progress = options, document, progress
        self.running, self.material, self.device = running, material, device
        self.chance = random.Random(options.seed)
        self.parity: dict[str, Parity] = {}
        dtype = options.dtype
        self.probes = MachineProbes([dtype], device)
        document.probes = self.probes.describe()

    def check(self, model: XFM) -> None:
        """Scores of some requests of both kinds against `XFM.match` in fp32."""
        requests = [self.material.known(4, self.chance), self.material.new(4, self.chance)]
        expected = [score for asked in requests for score in offline(model, asked)]
        own, dtype = 0.0, _DTYPES[self.options.dtype]
        if dtype != torch.float32:
            # What the type alone changes, without a service.
            narrow = copy.deepcopy(model).to(dtype)
            found = [score for asked in requests for score in offline(narrow, asked)]
            own = relative_error(torch.tensor(found), torch.tensor(expected))
        band = parity_band(dtype, own)
        for name, running in self.running.items():
            found = [score for asked in requests for score in served(running.port, asked)]
            error = relative_error(torch.tensor(found), torch.tensor(expected))
            self.parity[name] = Parity(
                error=error, band=band, passed=error <= band, against="XFM.match fp32, in this process"
            )  # fmt: skip

    def measure(self) -> None:
        documents = self.options.documents
        known = f"a caption and {documents} images of a catalogue of {_CATALOGUE} that was asked for before"
        new = f"an image never seen and {documents} captions"
        for work, name, make in (
            ("serve-known", known, self.material.known), ("serve-new", new, self.material.new)
        ):  # fmt: skip
            if work == "serve-known":
                # What was asked for before: every image once, of every service.
                urls = self.material.catalogue
                for running in self.running.values():
                    parts = [urls[start : start + documents] for start in range(0, len(urls), documents)]
                    drive(running.port, [_rerank("a dog", [{"image": url} for url in part]) for part in parts], 1)
            for clients in self.options.clients:
                self.progress.stage(f"{name}, {clients} clients")
                self._window(work, f"re-rank over HTTP: {name}", clients, make)
        if self.options.soak:
            self.progress.stage(f"a soak of {self.options.soak:g} s")
            self._soak()

    def _window(
        self, work: str, name: str, clients: int, make: Callable[[int, random.Random], Asked]
    ) -> None:  # fmt: skip
        count, latencies, lost = max(self.options.requests, clients), dict[str, list[float]](), dict[str, list[str]]()
        busy = dict[str, list[float]]()

        def block(contender: str) -> list[float]:
            requests = [make(self.options.documents, self.chance) for _ in range(count)]
            process = self.running[contender].process
            before = sum(process.cpu_times()[:2])
            window = drive(self.running[contender].port, requests, clients)
            busy.setdefault(contender, []).append((sum(process.cpu_times()[:2]) - before) / count)
            latencies.setdefault(contender, []).extend(window.latencies)
            lost.setdefault(contender, []).extend(window.failures)
            if window.failures:
                raise UnavailableError(f"{len(window.failures)} requests failed, such as: {window.failures[0]}")
            return [window.seconds]

        dtype = self.options.dtype
        blocks = {
            f"{contender} {dtype}": (lambda contender=contender: block(contender)) for contender in self.running
        }  # fmt: skip
        samples = interleave(
            blocks, self.probes, rounds=self.options.rounds, budget_s=0, warmups=0, on_step=self.progress.step
        )
        rows = []
        for contender in self.running:
            row = self._row(work, f"{name}, {clients} clients", contender, clients, count)
            row = filled(row, f"{contender} {dtype}", samples)
            if row.measured:
                row.clients = told(clients, latencies[contender], lost[contender], busy[contender])
            rows.append(row)
        self.document.rows += agreeing(rows)
        if samples.interrupted:
            raise KeyboardInterrupt

    def _soak(self) -> None:
        options, clients = self.options, max(self.options.clients)
        done = soak(self.running[OURS], self.material, options.documents, clients, options.soak, options.seed)
        minutes = f"{done.seconds / 60:.1f} minutes"
        row = self._row("serve-soak", f"all kinds of requests for {minutes}", OURS, clients, done.requests)
        row.seconds, row.clients = [done.seconds], told(clients, done.latencies, done.failures)
        row.throughput = interval([done.requests / done.seconds], 0.5)
        row.memory = Memory(
            peak_bytes=max(done.memory), grown_bytes=done.grown,
            method="resident, sampled; growth from the third fifth of the time to the last",
        )  # fmt: skip
        if done.failures:
            row.status, row.reason = "failed", f"{len(done.failures)} failures, such as: {done.failures[0]}"
        elif not done.steady:
            row.status, row.reason = "failed", f"memory grew by {done.grown:,} bytes"
        self.document.rows.append(row)

    def _row(self, work: str, name: str, contender: str, clients: int, items: int) -> Row:
        config = self.document.model.config if self.document.model else {}
        return Row(
            work=work, name=name, contender=contender, label=_LABELS[contender], dtype=self.options.dtype,
            point=Point(image_size=config.get("image_size"), texts=self.options.documents, clients=clients),
            status="measured", unit="requests", items=items, parity=self.parity.get(contender),
        )  # fmt: skip


def told(clients: int, latencies: Sequence[float], failures: Sequence[str], busy: Sequence[float] = ()) -> Clients:
    """The clients' side of a row; `busy` are seconds of the service's processor for a request, of every window."""
    p50, p99 = (interval(latencies, share) for share in (0.5, 0.99))
    cpu = interval(busy, 0.5) if busy else None
    return Clients(clients=clients, requests=len(latencies), p50=p50, p99=p99, failures=len(failures), cpu_s=cpu)


def served(port: int, asked: Asked) -> list[float]:
    """Relevance of the documents of a request, in their order, as a service has it."""
    connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
    try:
        connection.request("POST", asked.path, asked.body, {"content-type": "application/json"})
        results = json.loads(connection.getresponse().read())["results"]
    finally:
        connection.close()
    return [each["relevance_score"] for each in sorted(results, key=lambda each: each["index"])]


def offline(model: XFM, asked: Asked) -> list[float]:
    """The same by the model in this process."""
    request = json.loads(asked.body)

    def opened(item: dict[str, str]) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(item["image"].partition(",")[2])))

    if isinstance(request["query"], dict):
        return model.match(opened(request["query"]), request["documents"]).tolist()
    return [float(model.match(opened(item), request["query"])) for item in request["documents"]]
