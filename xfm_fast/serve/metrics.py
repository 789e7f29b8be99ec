"""Prometheus metrics of the service."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from xfm_fast import __version__
from xfm_fast.memory import resident_bytes
from xfm_fast.serve.model import ServedModel

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_PIECES = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (64, 256, 1024, 4096, 16384, 65536, 262144)


class Metrics:
    """Metrics of one service; `waiting` and `active` count its requests in the queue and in flight."""

    def __init__(self, model: ServedModel, waiting: Callable[[], int], active: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("xfm_requests", "Requests answered.", ("path", "status"), registry=registry)
        self._seconds = Histogram(
            "xfm_request_seconds", "From the request's head to its answer.", ("path",), buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._pieces = Histogram(
            "xfm_batch_requests", "Requests computed together.", buckets=_PIECES, registry=registry
        )
        self._tokens = Histogram("xfm_batch_tokens", "Tokens computed together.", buckets=_TOKENS, registry=registry)
        self._images = Counter("xfm_images", "Images of rank requests, by cache.", ("cache",), registry=registry)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "xfm_queue_requests": ("Requests that wait for the model.", waiting),
            "xfm_active_requests": ("Requests in flight, waiting ones included.", active),
            "xfm_cache_bytes": ("Bytes of cached image memories.", lambda: model.ranker.cache.nbytes),
            "xfm_cache_images": ("Images with a cached memory.", lambda: len(model.ranker.cache)),
            "xfm_process_resident_bytes": ("Memory of the process.", resident_bytes),
        }
        for name, (meaning, read) in gauges.items():
            Gauge(name, meaning, registry=registry).set_function(read)
        labels = ("version", "model", "random_weights")
        Gauge("xfm_info", "The model that is served.", labels, registry=registry).labels(
            __version__, model.name, str(model.random).lower()
        ).set(1)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, pieces: int, tokens: int) -> None:
        """Count a batch."""
        self._pieces.observe(pieces)
        self._tokens.observe(tokens)

    def images(self, reused: int, computed: int) -> None:
        """Count cache hits and misses of image memories."""
        self._images.labels("hit").inc(reused)
        self._images.labels("miss").inc(computed)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
