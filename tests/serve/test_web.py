"""Images from the web come from public addresses only, and never through a redirect."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

pytest.importorskip("httpx", reason="the extra 'serve'")
import httpx

from tests.serve.conftest import until
from xfm_fast.serve import service as service_module
from xfm_fast.serve.images import fetch, is_public, web_client
from xfm_fast.serve.schema import Problem
from xfm_fast.serve.work import Account, Ledger

PUBLIC = "93.184.215.14 2606:2800:21f:cb07:6820:80da:af6b:8b2c 3fff:1000::1"
NOT_PUBLIC = """
127.0.0.1 127.8.8.8 0.0.0.0 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1 255.255.255.255
192.88.99.1 :: ::1 fe80::1%eth0 fc00::1 fec0::1 ff02::1 ::ffff:127.0.0.1 ::ffff:169.254.169.254 2002:7f00:1::
2002:c058:6301:: 64:ff9b::7f00:1 64:ff9b::5db8:d70e 3fff::1 5f00::1
"""


def test_public_addresses() -> None:
    assert all(map(is_public, PUBLIC.split()))
    assert [address for address in NOT_PUBLIC.split() if is_public(address)] == []


class Trickle(httpx.AsyncByteStream):
    """A byte at a time, so that no single read takes long."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.02)


class Site:
    """A site at one public address; records the requests."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def __call__(self, request: Any) -> Any:
        self.requests.append(request)
        answers = {
            "/redirect": httpx.Response(302, headers={"location": "http://169.254.169.254/"}),
            "/missing": httpx.Response(404),
            "/large": httpx.Response(200, stream=httpx.ByteStream(bytes(2 << 20))),
            "/slow": httpx.Response(200, stream=Trickle()),
        }
        return answers.get(
            request.url.path, httpx.Response(200, stream=httpx.ByteStream(bytes(10)))
        )


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Names lead to these addresses; returns the names that are resolved, in time."""
    names: list[str] = []

    def answer(host: str, port: int, *how: Any, **more: Any) -> list[Any]:
        names.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return names


def download(url: str, site: Site | None = None, budget: Account | None = None) -> bytes:
    async def scenario() -> bytes:
        budgeted = budget or Account(Ledger(1 << 30), limit=1 << 20, seconds=60)
        async with web_client(httpx.MockTransport(site or Site())) as client:
            return await fetch(client, url, budgeted, seconds=0.3)

    return asyncio.run(scenario())


def test_a_file_comes_from_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    names, site = resolve(monkeypatch, "93.184.215.14"), Site()
    assert download("https://photos.example/a.jpg?x=1", site) == bytes(10)
    # The name is resolved once: a second answer could be another address. The connection names an address.
    assert names == ["photos.example"]
    (request,) = site.requests
    assert str(request.url) == "https://93.184.215.14/a.jpg?x=1"
    assert (request.headers["host"], request.extensions["sni_hostname"]) == (
        "photos.example",
        "photos.example",
    )


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/redirect", 422, "302"),
        ("/missing", 422, "404"),
        ("/large", 413, "1,048,576"),
        ("/slow", 422, "0.3 s"),
    ],
)
def test_what_a_site_may_do(
    monkeypatch: pytest.MonkeyPatch, path: str, status: int, message: str
) -> None:
    resolve(monkeypatch, "93.184.215.14")
    site = Site()
    with pytest.raises(Problem) as raised:
        download(f"http://photos.example{path}", site)
    assert raised.value.status_code == status
    assert message in raised.value.detail
    assert len(site.requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a", "http://[::1]/a", "http://[::ffff:127.0.0.1]/a", "http://2130706433/a",
        "http://localhost/a", "https://127.0.0.1:8443/a", "http://user:word@example.com/a", "http://", "http://[::1/a",
        "http://example.com:99999/", "http://127.0.0.1/a\r\nx: y",
    ],
)  # fmt: skip
def test_where_a_url_may_not_lead(url: str) -> None:
    site = Site()
    with pytest.raises(Problem) as raised:
        download(url, site)
    assert raised.value.status_code == 422
    assert site.requests == []


def test_a_name_with_a_private_address_among_others_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve(monkeypatch, "93.184.215.14", "192.168.1.1")
    with pytest.raises(Problem, match="not public"):
        download("http://photos.example/a.jpg")


def test_a_download_after_the_end_of_its_request_takes_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve(monkeypatch, "93.184.215.14")
    memory = Ledger(1 << 20)
    budget = Account(memory, limit=1 << 20, seconds=60)
    budget.receive(100, 1)
    budget.close()
    with pytest.raises(Problem):
        download("http://photos.example/a", budget=budget)
    assert memory.used == 0


def test_a_service_that_allows_urls_refuses_private_ones(start: Any) -> None:
    with start(allow_urls=True) as service:
        for url, status in (
            ("http://169.254.169.254/latest", 422),
            ("data:image/png;base64,aGk=", 422),
        ):
            body = {"query": "a", "documents": [{"image": url}]}
            assert service.post("/v1/rerank", body).status_code == status


def test_an_error_of_one_image_ends_the_other_downloads(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    async def wait(client: Any, url: str, budget: Account) -> bytes:
        if url.endswith("bad"):
            await asyncio.sleep(0.05)
            raise Problem(422, url)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(url)
        return b""

    monkeypatch.setattr(service_module, "fetch", wait)
    with start(allow_urls=True) as service:
        documents = [{"image": f"http://photos.example/{name}"} for name in ("slow", "bad", "late")]
        assert service.post("/v1/rerank", {"query": "a", "documents": documents}).status_code == 422
        assert until(lambda: len(ended) == 2)
