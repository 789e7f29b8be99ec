"""Downloads of images from public addresses, with limits of bytes and time (the guard against SSRF).

A name is resolved once and the connection goes to the address that was checked, so DNS rebinding leads nowhere else.
Redirects are refused, and proxies of the environment are ignored.
"""

from __future__ import annotations

import http.client
import ipaddress
import math
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from xfm_fast.serve.budget import Budget
from xfm_fast.serve.problem import Problem

_PIECE = 1 << 16
# Special-purpose networks of IANA that not every version of the standard library knows.
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        ("192.88.99.0/24", "64:ff9b:1::/48", "100::/64", "2001:db8::/32", "3fff::/20", "5f00::/16"),
    )
)
# Concurrent DNS lookups, which cannot be interrupted.
_LOOKUPS = threading.BoundedSemaphore(64)


def is_public(address: str) -> bool:
    """Whether an address is on the internet: not this machine's, a local network's, or one of special use."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in _SPECIAL):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        # The connection ends at the embedded IPv4 address.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None and not is_public(str(inner)):
            return False
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class WebFetcher:
    """Downloads the files of one request: `most_bytes` together, each within `seconds`; thread-safe."""

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
        shown = repr(url[:100])
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise Problem(422, f"URL {shown} is malformed ({error})") from None
        if parts.scheme.lower() not in ("http", "https") or not host or parts.username is not None:
            raise Problem(422, f"URL {shown} is not of the form https://host/path")
        secure = parts.scheme.lower() == "https"
        port = port or (443 if secure else 80)
        if self.ports is not None and port not in self.ports:
            raise Problem(422, f"URL {shown} names port {port}; images are fetched from ports 80 and 443")
        # At most the time left of the request. A timeout of 0 would mean no limit to a socket.
        until = min(time.monotonic() + self.seconds, math.inf if self.budget is None else self.budget.deadline)
        address = self._address(host, port, shown, until)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or any(ord(character) <= 32 or ord(character) == 127 for character in target):
            raise Problem(422, f"URL {shown} holds characters that a URL may not; percent-encode them")
        seconds = max(0.01, until - time.monotonic())
        connection = _Pinned(host, port, address, secure, seconds)
        # A socket's timeout is per read; a server that sends a byte a second would hold a thread for days.
        alarm = threading.Timer(seconds, connection.abort)
        alarm.daemon = True
        alarm.start()
        try:
            connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "xfm-fast"})
            answer = connection.getresponse()
            if answer.status != 200:
                redirect = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
                raise Problem(422, f"URL {shown} was answered with status {answer.status}{redirect}; send the image")
            content = self._content(answer, shown)
            if connection.late:
                raise Problem(422, f"URL {shown} took more than {seconds:.3g} s; send the image itself")
            if answer.length:
                raise Problem(422, f"URL {shown} broke off; send the image itself")
            return content
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise Problem(422, f"URL {shown} cannot be fetched ({reason}); send the image itself") from None
        finally:
            alarm.cancel()
            connection.close()

    def _address(self, host: str, port: int, shown: str, until: float) -> str:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def look_up() -> None:
            try:
                answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, UnicodeError) as error:
                answers.put(error)
            finally:
                _LOOKUPS.release()

        found = None
        if _LOOKUPS.acquire(timeout=max(0.01, until - time.monotonic())):
            threading.Thread(target=look_up, daemon=True).start()
            with suppress(queue.Empty):
                found = answers.get(timeout=max(0.01, until - time.monotonic()))
        if found is None:
            raise Problem(422, f"URL {shown} names a host that is not found in time; send the image")
        if isinstance(found, Exception):
            raise Problem(422, f"URL {shown} names a host that is not found ({found})")
        addresses = [str(entry[4][0]) for entry in found]
        # A name with both public and private addresses is refused.
        if not addresses or not all(map(self.permitted, addresses)):
            raise Problem(422, f"URL {shown} leads to an address that is not public; send the image itself")
        return addresses[0]

    def _content(self, answer: http.client.HTTPResponse, shown: str) -> bytes:
        content = bytearray()
        while piece := answer.read1(_PIECE):
            content += piece
            with self._lock:
                self._fetched += len(piece)
            if self.budget is not None:
                self.budget.check()
                self.budget.take(len(piece), copies=1)
            if self._fetched > self.most_bytes:
                most = f"{self.most_bytes:,} bytes"
                raise Problem(413, f"with URL {shown} more than {most} are fetched; shrink the images, or name fewer")
        return bytes(content)


class _Pinned(http.client.HTTPConnection):
    """A connection to a resolved address, with the host's name in TLS and headers."""

    def __init__(self, host: str, port: int, address: str, secure: bool, timeout: float) -> None:
        super().__init__(host, port, timeout=timeout)
        self.default_port = 443 if secure else 80
        self._address, self._secure = address, secure
        self._opened: socket.socket | None = None
        self.late = False

    def connect(self) -> None:
        self.sock = self._opened = socket.create_connection((self._address, self.port), self.timeout)
        if self._secure:
            self.sock = self._opened = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)

    def abort(self) -> None:
        """Interrupt the download, from another thread."""
        self.late = True
        # `sock` is None as soon as the response head closes the connection.
        if self._opened is not None:
            with suppress(OSError):
                self._opened.shutdown(socket.SHUT_RDWR)
