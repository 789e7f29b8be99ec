"""Images from the web come from public addresses only, and never through a redirect."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from xfm_fast.serve.images import WebFetcher, image_content, is_public
from xfm_fast.serve.options import ServiceOptions
from xfm_fast.serve.schema import Problem
from xfm_fast.serve.work import Budget, Memory

PUBLIC = "93.184.215.14 2606:2800:21f:cb07:6820:80da:af6b:8b2c 3fff:1000::1"
NOT_PUBLIC = """
127.0.0.1 127.8.8.8 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1 255.255.255.255
192.88.99.1 :: ::1 fe80::1%eth0 fc00::1 fec0::1 ff02::1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 2002:7f00:1::
2002:c058:6301:: 64:ff9b::7f00:1 64:ff9b::5db8:d70e 3fff::1 5f00::1
"""


def test_public_addresses() -> None:
    assert all(map(is_public, PUBLIC.split()))
    assert [address for address in NOT_PUBLIC.split() if is_public(address)] == []


class Site(BaseHTTPRequestHandler):
    """A site of the web."""

    def do_GET(self) -> None:
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("location", "http://169.254.169.254/")
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/slow":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            # A byte at a time, so that no single read takes long.
            for _ in range(100):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
                time.sleep(0.05)
        else:
            content = bytes(2000 if self.path == "/large" else 10)
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    site = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    site.daemon_threads = True
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield site.server_port
    finally:
        site.shutdown()
        site.server_close()
        thread.join(10)


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Names lead to these addresses; returns the names that are asked for, in time."""
    asked = []

    def found(host: str, port: int, *how: Any, **more: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    return asked


def test_a_file_comes_from_the_address_that_was_looked_at(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolving(monkeypatch, "127.0.0.1")
    fetcher = WebFetcher(1000, ports=None, permitted=lambda address: address == "127.0.0.1")
    assert fetcher.fetch(f"http://photos.example:{port}/a.jpg?x=1") == bytes(10)
    # The name is resolved once: a second answer could be another address. The connection names an address.
    assert asked.count("photos.example") == 1


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/redirect", 422, "status 302"),
        ("/missing", 422, "status 404"),
        ("/large", 413, "1,000 bytes"),
        ("/slow", 422, "0.5 s"),
        ("/a b", 422, "percent-encode"),
        ("/a\r\nx: y", 422, "URL"),
    ],
)
def test_what_a_site_may_do(port: int, path: str, status: int, message: str) -> None:
    fetcher = WebFetcher(1000, 0.5, ports=None, permitted=lambda address: True)
    with pytest.raises(Problem, match=re.escape(message)) as raised:
        fetcher.fetch(f"http://127.0.0.1:{port}{path}")
    assert raised.value.status_code == status


def test_limits_are_those_of_all_files_of_a_request(port: int) -> None:
    fetcher = WebFetcher(25, ports=None, permitted=lambda address: True)
    for _ in range(2):
        assert len(fetcher.fetch(f"http://127.0.0.1:{port}/a")) == 10
    with pytest.raises(Problem, match="25 bytes") as raised:
        fetcher.fetch(f"http://127.0.0.1:{port}/a")
    assert raised.value.status_code == 413
    budget = Budget(Memory(1 << 20), ServiceOptions(timeout=0.3))
    late = WebFetcher(1000, budget=budget, ports=None, permitted=lambda address: True)
    with pytest.raises(Problem, match="took more than"):
        late.fetch(f"http://127.0.0.1:{port}/slow")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1/a", "not public"),
        ("http://[::1]/a", "not public"),
        ("http://[::ffff:127.0.0.1]/a", "not public"),
        ("http://2130706433/a", "not public"),
        ("http://localhost/a", "not public"),
        ("https://127.0.0.1:8443/a", "names port 8443"),
        ("http://user:word@example.com/a", "not of the form"),
        ("http://", "not of the form"),
        ("http://[::1/a", "malformed"),
        ("http://example.com:99999/", "malformed"),
        ("ftp://example.com/a", "not of the form"),
    ],
)
def test_where_a_url_may_not_lead(url: str, message: str) -> None:
    with pytest.raises(Problem, match=message) as raised:
        WebFetcher(1000, 1.0).fetch(url)
    assert raised.value.status_code == 422


def test_a_name_with_a_private_address_among_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "93.184.215.14", "192.168.1.1")
    with pytest.raises(Problem, match="not public"):
        WebFetcher(1000, 1.0).fetch("http://photos.example/a.jpg")


def test_a_slow_lookup_ends_with_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *how, **more: released.wait(20) and [])
    began = time.monotonic()
    with pytest.raises(Problem, match=r"took more than 0\.[12]"):
        WebFetcher(1000, budget=Budget(Memory(1 << 20), ServiceOptions(timeout=0.2))).fetch("http://slow.example/a")
    released.set()
    assert time.monotonic() - began < 10


def test_a_service_that_allows_urls_refuses_private_ones() -> None:
    budget = Budget(Memory(1 << 20), ServiceOptions())
    with pytest.raises(Problem, match="not public"):
        image_content("http://169.254.169.254/latest", "query", WebFetcher(1000, 1.0), 1000, budget)


def test_a_download_after_the_end_of_its_request_takes_no_memory(port: int) -> None:
    memory = Memory(1 << 20)
    budget = Budget(memory, ServiceOptions())
    budget.take(100)
    budget.close()
    with pytest.raises(Problem):
        WebFetcher(1000, budget=budget, ports=None, permitted=lambda address: True).fetch(f"http://127.0.0.1:{port}/a")
    assert memory.used == 0
