"""Images of requests: data URLs, base64 and, where allowed, downloads from public addresses (SSRF guard)."""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import socket
import struct
from urllib.parse import unquote_to_bytes

import httpx

from xfm_fast.data.images import png_chunks, read_header
from xfm_fast.errors import DataError
from xfm_fast.serve.schema import Problem
from xfm_fast.serve.work import Account

# Special-purpose networks of IANA that not every version of the standard library knows.
_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        ("192.88.99.0/24", "64:ff9b:1::/48", "100::/64", "2001:db8::/32", "3fff::/20", "5f00::/16"),
    )
)


# Copies of a download: what arrives, and the file.
_COPIES = 2


def is_url(value: str) -> bool:
    """Whether the value is a URL of HTTP."""
    return value[:8].lower().startswith(("http:", "https:"))


def check_image(content: bytes, name: str, account: Account) -> tuple[bytes, int]:
    """The file of an image as it may be decoded, and the bytes that decoding it takes; only its header is read."""
    try:
        width, height, depth = read_header(content)
        if content.startswith(b"\x89PNG"):
            content = _without_compressed_text(content)
    except (ValueError, IndexError, struct.error) as error:
        raise DataError(
            f"{name} ({len(content):,} bytes, {content[:8]!r}...) is no JPEG, PNG or WebP ({error}); convert it"
        ) from None
    peak = width * height * depth
    account.take_image(f"{name} ({width}x{height})", width * height, peak)
    return content, peak


def decode_base64(value: str, name: str) -> bytes:
    """The file of an image that a request gives as a data URL or as base64; raises `Problem` for anything else."""
    if is_url(value):
        raise Problem(
            422,
            f"{name} is a URL; send data:image/jpeg;base64,..., or start the service with --allow-urls",
        )
    if value[:5].lower() == "data:":
        head, comma, text = value.partition(",")
        kind, coding = head[len("data:") :].partition(";")[0], head.rpartition(";")[2]
        if (
            not comma
            or kind.strip().lower()[:6] not in ("", "image/")
            or coding.strip().lower() != "base64"
        ):
            raise Problem(
                422,
                f"{name} is no image in base64 ({value[:40]!r}); write data:image/jpeg;base64,...",
            )
        data = unquote_to_bytes(text)
    else:
        data = value.encode("utf-8", "replace")
    try:
        return binascii.a2b_base64(data.translate(None, b"\r\n"), strict_mode=True)
    except ValueError as error:
        raise Problem(
            422, f"{name} ({len(data):,} characters, {data[:16]!r}...) is not base64 ({error})"
        ) from None


def _without_compressed_text(content: bytes) -> bytes:
    """A PNG without colour profile and compressed texts, which Pillow would inflate to up to 64 MB."""
    view = memoryview(content)
    chunks, at, removed = [view[:8]], 8, False
    for kind, body in png_chunks(content):
        end = at + 12 + len(body)
        if kind in (b"iCCP", b"zTXt") or (
            kind == b"iTXt" and bytes(body[:82]).partition(b"\0")[2][:1] != b"\0"
        ):
            removed = True
        else:
            chunks.append(view[at:end])
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


def web_client(transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """A client for `fetch`: no redirects, no proxies of the environment, and a connection for each download."""
    return httpx.AsyncClient(
        transport=transport, trust_env=False, timeout=None,
        limits=httpx.Limits(max_connections=32, max_keepalive_connections=0),
        headers={"accept": "image/*", "accept-encoding": "identity", "user-agent": "xfm-fast"},
    )  # fmt: skip


async def fetch(
    client: httpx.AsyncClient, url: str, account: Account, seconds: float = 10.0
) -> bytes:
    """Download an image into the account; raises `Problem` where the URL is not public, or the site is late.

    The name is resolved once and the connection goes to the address that was checked, so DNS rebinding leads nowhere
    else; TLS and the header `host` have the name.
    """
    shown = f"URL {url[:100]!r}"
    try:
        place = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise Problem(422, f"{shown} is malformed ({error})") from None
    if not place.host or place.userinfo or place.port is not None:
        raise Problem(
            422,
            f"{shown} is not of the form https://host/path, without a port; send the image itself",
        )
    name, content = place.raw_host.decode(), bytearray()
    try:
        async with asyncio.timeout(seconds):
            found = await asyncio.get_running_loop().getaddrinfo(
                name, None, type=socket.SOCK_STREAM
            )
            addresses = [str(entry[4][0]) for entry in found]
            # A name with both public and private addresses is refused.
            if not addresses or not all(map(is_public, addresses)):
                raise Problem(
                    422, f"{shown} leads to an address that is not public; send the image itself"
                )
            pinned = place.copy_with(host=addresses[0])
            headers, extensions = {"host": place.netloc.decode()}, {"sni_hostname": name}
            async with client.stream(
                "GET", pinned, headers=headers, extensions=extensions
            ) as answer:
                if answer.status_code != 200:
                    raise OSError(f"status {answer.status_code}; redirects are not followed")
                async for piece in answer.aiter_raw():
                    account.receive(len(piece), _COPIES)
                    content += piece
    except (OSError, ValueError, httpx.HTTPError) as error:
        # `TimeoutError` is an `OSError` without words.
        reason = " ".join(str(error).split())[:100] or f"it took more than {seconds:g} s"
        raise Problem(422, f"{shown} cannot be fetched ({reason}); send the image itself") from None
    return bytes(content)
