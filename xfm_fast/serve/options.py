"""Options of `xfm-fast serve`: the model and the limits. Imports no heavy module."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from xfm_fast.export.request import RuntimeChoice
from xfm_fast.loading import EncoderSource


@dataclass(frozen=True)
class SourceOptions(EncoderSource):
    """The served model.

    Attributes:
        runtime: Library that runs an export. Packages run code when they load: name their runtime,
            for packages that you trust.
        rank: Score of a text with an image: match of the fusion encoder, similarity of features, or
            sum (match logit + similarity). [the run's own, else match]
        name: The model's name in requests and responses; once for each of several models, in order; or
            several names of one model. [that of its folder]
    """

    runtime: RuntimeChoice = "auto"
    rank: Literal["match", "similarity", "sum"] | None = None
    name: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServiceOptions:
    """Address and limits of the service.

    Attributes:
        index: What /search and its page search: a folder or file that the model, or the first that embeds,
            has indexed; or the folder of an index. [no /search]
        images: The indexed pictures, where --index is a file of their paths or the folder of an index.
        host: Address to listen on; 0.0.0.0 is every address of this machine, for which an API key
            is advisable.
        port: Port to listen on; 0 chooses a free one and prints it.
        api_key: Key that clients send as a bearer token. Other users of this machine can see it on
            the command line, unlike the environment variable XFM_API_KEY. [no key]
        allow_urls: Download images that requests name by URL, from public addresses only.
        memory_mb: Megabytes that all requests hold together, each until its answer is read: a body
            in four copies, and 256 bytes for each of its JSON values; 429 beyond it. A body with
            its downloads may have a sixteenth.
        max_inputs: Texts and images of a list; 422 beyond it.
        max_characters: Characters of a text; 422 beyond it. The answer names texts of which the model
            reads less.
        max_tokens: Tokens and image patches of a request, as the model reads them; 422 beyond it.
        max_queue: Requests that have arrived and are not answered, waiting ones included; 429
            beyond it.
        batch_tokens: Tokens of a batch, of texts and of images that are not cached; a single
            request may have more. [4096 on a CPU, 65536 on a GPU]
        cache_mb: Megabytes of image memories cached between requests; 0 disables the cache.
        timeout: Seconds until a request is answered with 504, and for a client to read its answer;
            after SIGTERM too, the process ends no later.
    """

    index: Path | None = None
    images: Path | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    api_key: str | None = None
    allow_urls: bool = False
    memory_mb: Annotated[int, Ge(1)] = 512
    max_inputs: Annotated[int, Ge(1)] = 2048
    max_characters: Annotated[int, Ge(1)] = 32768
    max_tokens: Annotated[int, Ge(1)] = 300_000
    max_queue: Annotated[int, Ge(1)] = 128
    batch_tokens: Annotated[int | None, Ge(1)] = None
    cache_mb: Annotated[int, Ge(0)] = 1024
    timeout: Annotated[float, Gt(0), Le(86400)] = 60.0

    @property
    def max_body_bytes(self) -> int:
        """Bytes of a request, downloaded images included."""
        return (self.memory_mb << 20) // 16

    @property
    def loopback(self) -> bool:
        """The service listens on this machine only."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
