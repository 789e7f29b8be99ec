"""The options of `xfm-fast serve`: what is served, and within which limits. Nothing heavy is imported here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from xfm_fast.export.request import RuntimeChoice


@dataclass(frozen=True)
class SourceOptions:
    """The model that is served.

    Attributes:
        tokenizer: RoBERTa's vocab.json and merges.txt (their folder), or a tokenizer.json. [that of the model's folder]
        config: Official YAML, or a JSON of sizes, of a checkpoint file that is not of base size.
        random: Instead of a model: random weights of this size, to try the service.
        device: Where the model runs.
        dtype: Number format of the weights, or products in int8 (on a CPU) or fp8 (GPU); an export has its own.
        runtime: Library that runs an export. Packages of AOTInductor are code that runs when it is loaded: they want
            aoti, for packages that you trust.
        rank: Score of a text with an image: match of the fusion encoder, similarity of features, or sum (match logit +
            similarity). [that which the run recorded, else match]
        name: The model's name in requests and answers. [that of its folder]
    """

    tokenizer: Path | None = None
    config: Path | None = None
    random: Literal["tiny", "base"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16", "fp16", "int8", "fp8"] = "fp32"
    runtime: RuntimeChoice = "auto"
    rank: Literal["match", "similarity", "sum"] | None = None
    name: str | None = None


@dataclass(frozen=True)
class ServiceOptions:
    """Where the service listens, and what it bears.

    Attributes:
        host: Address to listen on; 0.0.0.0 is every one of this machine, and then an API key is advisable.
        port: Port to listen on; 0 takes a free one and says which.
        api_key: Key that clients send as a bearer token; seen by other users of this machine, unlike that in the
            environment variable XFM_API_KEY. [none is asked for]
        allow_urls: Fetch images that requests name by URL, from public addresses alone.
        max_body_mb: Megabytes of a request.
        max_pixels: Pixels of an image.
        max_documents: Documents or inputs of a request.
        max_characters: Characters of a text, before the official cut to 30 words and 40 tokens.
        memory_mb: Megabytes that requests hold together, bodies in three copies while they are parsed; more are
            answered with 429.
        max_queue: Requests in work or waiting; more are answered with 429.
        max_connections: Connections at a time.
        batch_tokens: Tokens, of texts and of images that are not known yet, that are computed together; a single
            request may have more. [4096 on a CPU, 65536 on a GPU]
        batch_wait_ms: Milliseconds that a request waits for others that are being read, at most.
        cache_mb: Megabytes of image memories kept between requests; 0 keeps none.
        timeout: Seconds until a request that is not answered yet is given up.
        read_timeout: Seconds within which a request must have arrived, and an answer been taken.
        drain: Seconds that requests in work have to finish after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    api_key: str | None = None
    allow_urls: bool = False
    max_body_mb: Annotated[int, Ge(1), Le(4096)] = 32
    max_pixels: Annotated[int, Ge(1)] = 1 << 24
    max_documents: Annotated[int, Ge(1)] = 256
    max_characters: Annotated[int, Ge(1)] = 2000
    memory_mb: Annotated[int, Ge(1)] = 512
    max_queue: Annotated[int, Ge(1)] = 128
    max_connections: Annotated[int, Ge(1)] = 512
    batch_tokens: Annotated[int | None, Ge(1)] = None
    batch_wait_ms: Annotated[float, Ge(0), Le(1000)] = 5.0
    cache_mb: Annotated[int, Ge(0)] = 1024
    timeout: Annotated[float, Gt(0)] = 60.0
    read_timeout: Annotated[float, Gt(0)] = 30.0
    drain: Annotated[int, Ge(0)] = 30

    @property
    def loopback(self) -> bool:
        """True where no other machine reaches the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
