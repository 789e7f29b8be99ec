"""Images of requests: data URLs, base64 and, where allowed, downloads from public addresses (SSRF guard)."""

from __future__ import annotations

import binascii
import http.client
import ipaddress
import math
import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import unquote_to_bytes, urlsplit

from xfm_fast.data.headers import png_chunks, read_header
from xfm_fast.errors import DataError
from xfm_fast.serve.schema import Problem
from xfm_fast.serve.work import Budget

_PIECE = 1 << 16
# Special-purpose networks of IANA that not every version of the standard library knows.
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        ("192.88.99.0/24", "64:ff9b:1::/48", "100::/64", "2001:db8::/32", "3fff::/20", "5f00::/16"),
    )
)
# Concurrent downloads; DNS lookups cannot be interrupted.
_DOWNLOADS = threading.BoundedSemaphore(64)


def is_url(value: str) -> bool:
    """Whether the value is a URL of HTTP."""
    return value[:8].lower().startswith(("http:", "https:"))


def image_content(
    value: str, name: str, fetcher: WebFetcher | None, most_pixels: int, budget: Budget
) -> tuple[bytes, int]:
    """File of an image that a request gives as data URL, base64 or URL, and the bytes that decoding it takes."""
    if is_url(value):
        if fetcher is None:
            raise Problem(
                422, f"{name} is a URL; send data:image/jpeg;base64,..., or start the service with --allow-urls"
            )
        content = fetcher.fetch(value)
    else:
        content = _decode_base64(value, name)
    try:
        width, height, depth = read_header(content)
        if content.startswith(b"\x89PNG"):
            content = _without_compressed_text(content)
    except (ValueError, IndexError, struct.error) as error:
        raise DataError(
            f"{name} ({len(content):,} bytes, {content[:8]!r}...) is no JPEG, PNG or WebP ({error}); convert it"
        ) from None
    pixels = width * height
    if pixels > most_pixels:
        raise Problem(
            413, f"{name} is {width}x{height} = {pixels:,} pixels, over the limit of {most_pixels:,}; shrink it"
        )
    budget.take_image(name, pixels, pixels * depth)
    return content, pixels * depth


def _decode_base64(value: str, name: str) -> bytes:
    if value[:5].lower() == "data:":
        head, comma, text = value.partition(",")
        kind, coding = head[len("data:") :].partition(";")[0], head.rpartition(";")[2]
        if not comma or kind.strip().lower()[:6] not in ("", "image/") or coding.strip().lower() != "base64":
            raise Problem(422, f"{name} is no image in base64 ({value[:40]!r}); write data:image/jpeg;base64,...")
        data = unquote_to_bytes(text)
    else:
        data = value.encode("utf-8", "replace")
    try:
        content = binascii.a2b_base64(data.translate(None, b"\r\n"), strict_mode=True)
    except ValueError as error:
        raise Problem(422, f"{name} ({len(data):,} characters, {data[:16]!r}...) is not base64 ({error})") from None
    if not content:
        raise Problem(422, f"{name} is empty; send the file of an image")
    return content


def _without_compressed_text(content: bytes) -> bytes:
    """A PNG without colour profile and compressed texts, which Pillow inflates to up to 64 MB and nothing reads."""
    chunks, at, removed = [content[:8]], 8, False
    for kind, body in png_chunks(content):
        end = at + 12 + len(body)
        if kind in (b"iCCP", b"zTXt") or (kind == b"iTXt" and bytes(body[:82]).partition(b"\0")[2][:1] != b"\0"):
            removed = True
        else:
            chunks.append(content[at:end])
        at = end
    return b"".join(chunks) if removed else content


def is_public(address: str) -> bool:
    """Whether an address is on the internet: not this machine's, a local network's, or one of special use."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in _SPECIAL):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        # The connection ends at the embedded IPv4 address.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip.is_site_local or (inner is not None and not is_public(str(inner))):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class WebFetcher:
    """Downloads the images of one request: `most_bytes` together, each within `seconds`; thread-safe.

    A name is resolved once and the connection goes to the address that was checked, so DNS rebinding leads nowhere
    else. Redirects are refused, and proxies of the environment are ignored.
    """

    def __init__(
        self,
        most_bytes: int,
        seconds: float = 10.0,
        *,
        budget: Budget | None = None,
        ports: frozenset[int] | None = frozenset((80, 443)),
        permitted: Callable[[str], bool] = is_public,
    ) -> None:
        self.most_bytes, self.seconds, self.budget = most_bytes, seconds, budget
        self.ports, self.permitted = ports, permitted
        self._fetched, self._lock = 0, threading.Lock()

    def fetch(self, url: str) -> bytes:
        """The content of a URL; raises `Problem` where it is malformed, not public, late or too large."""
        shown = f"URL {url[:100]!r}"
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise Problem(422, f"{shown} is malformed ({error})") from None
        if parts.scheme.lower() not in ("http", "https") or not host or parts.username is not None:
            raise Problem(422, f"{shown} is not of the form https://host/path")
        secure = parts.scheme.lower() == "https"
        port = port or (443 if secure else 80)
        if self.ports is not None and port not in self.ports:
            raise Problem(422, f"{shown} names port {port}; images are fetched from ports 80 and 443")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or any(ord(character) <= 32 or ord(character) == 127 for character in target):
            raise Problem(422, f"{shown} holds characters that a URL may not; percent-encode them")
        # At most the time left of the request.
        started = time.monotonic()
        until = min(started + self.seconds, math.inf if self.budget is None else self.budget.deadline)
        connection = _Pinned(host, port, secure, self.permitted, self.seconds)
        results: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

        def download() -> None:
            try:
                results.put(self._download(connection, target))
            except Exception as error:  # raised in the caller's thread, or named as a reason
                results.put(error)
            finally:
                connection.close()
                _DOWNLOADS.release()

        result: bytes | Exception = TimeoutError(f"it took more than {until - started:.3g} s")
        # A socket's timeout is per read; a server that sends a byte a second would hold a thread for days.
        if _DOWNLOADS.acquire(timeout=max(0.01, until - time.monotonic())):
            threading.Thread(target=download, daemon=True).start()
            with suppress(queue.Empty):
                result = results.get(timeout=max(0.01, until - time.monotonic()))
        if isinstance(result, bytes):
            return result
        connection.abort()
        if isinstance(result, Problem):
            raise Problem(result.status_code, f"{shown}: {result.detail}", result.headers) from None
        if not isinstance(result, OSError | http.client.HTTPException | ValueError):
            raise result
        reason = " ".join(str(result).split())[:100] or type(result).__name__
        raise Problem(422, f"{shown} cannot be fetched ({reason}); send the image itself") from None

    def _download(self, connection: _Pinned, target: str) -> bytes:
        connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "xfm-fast"})
        answer = connection.getresponse()
        if answer.status != 200:
            redirect = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
            raise http.client.HTTPException(f"status {answer.status}{redirect}")
        content = bytearray()
        while piece := answer.read1(_PIECE):
            content += piece
            with self._lock:
                self._fetched += len(piece)
            if self._fetched > self.most_bytes:
                raise Problem(413, f"images of more than {self.most_bytes:,} bytes are fetched; shrink them")
            if self.budget is not None:
                self.budget.take(len(piece), copies=1)
        if answer.length:
            raise http.client.HTTPException("it broke off")
        return bytes(content)


class _Pinned(http.client.HTTPConnection):
    """A connection to an address that is resolved once and permitted, with the host's name in TLS and headers."""

    def __init__(self, host: str, port: int, secure: bool, permitted: Callable[[str], bool], timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self.default_port = 443 if secure else 80
        self._secure, self._permitted = secure, permitted
        self._opened: socket.socket | None = None
        self._aborted = False

    def connect(self) -> None:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        # A name with both public and private addresses is refused.
        if not addresses or not all(map(self._permitted, addresses)):
            raise Problem(422, "it leads to an address that is not public; send the image itself")
        if self._aborted:
            raise TimeoutError
        self.sock = self._opened = socket.create_connection((addresses[0], self.port), self.timeout)
        if self._secure:
            self.sock = self._opened = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        # An end in the meantime found no socket to close.
        if self._aborted:
            raise TimeoutError

    def abort(self) -> None:
        """Interrupt the download, from another thread."""
        self._aborted = True
        # `sock` is None as soon as the response head closes the connection.
        if self._opened is not None:
            with suppress(OSError):
                self._opened.shutdown(socket.SHUT_RDWR)
