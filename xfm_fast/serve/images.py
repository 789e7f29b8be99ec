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

# IANA's special-purpose networks that some versions of the standard library lack.
_SPECIAL_NETWORKS = [
    ipaddress.ip_network(network)
    for network in (
        "192.88.99.0/24",
        "64:ff9b:1::/48",
        "100::/64",
        "2001:db8::/32",
        "3fff::/20",
        "5f00::/16",
    )
]
# Copies of a download: the arriving buffer, and the file.
_COPIES = 2
# All that percent encoding has to escape in base64 and its lines. The library decodes each escape in Python.
_ESCAPES = b"%2B %2b %2F %2f %3D %3d %0D %0d %0A %0a".split()


def is_url(value: str) -> bool:
    """Return whether the value is an HTTP URL."""
    return value[:8].lower().startswith(("http:", "https:"))


def check_image(content: bytes, name: str, account: Account) -> tuple[bytes, int]:
    """Return an image file that is safe to decode, and the peak bytes of decoding it, from its header."""
    try:
        width, height, depth = read_header(content)
        if content.startswith(b"\x89PNG"):
            content = _without_compressed_text(content)
    except (ValueError, IndexError, struct.error) as error:
        raise DataError(
            f"{name} ({len(content):,} bytes, {content[:8]!r}...) is not a JPEG, PNG or WebP ({error}); convert it"
        ) from None
    peak = width * height * depth
    account.take_image(f"{name} ({width}x{height})", width * height, peak)
    return content, peak


def decode_base64(value: str, name: str) -> bytes:
    """Decode an image in a data URL or in base64; raises `Problem` for anything else."""
    if is_url(value):
        raise Problem(
            422,
            f"{name} is a URL; send data:image/jpeg;base64,..., or start the service with --allow-urls",
        )
    if value[:5].lower() == "data:":
        head, comma, value = value.partition(",")
        media_type = head[len("data:") :].partition(";")[0].strip().lower()
        encoding = head.rpartition(";")[2].strip().lower()
        if not comma or media_type[:6] not in ("", "image/") or encoding != "base64":
            raise Problem(
                422,
                f"{name} is not an image in base64 ({head[:40]!r}); write data:image/jpeg;base64,...",
            )
    data = value.encode("utf-8", "replace")
    for escape in _ESCAPES if b"%" in data else ():
        data = data.replace(escape, unquote_to_bytes(escape))
    try:
        return binascii.a2b_base64(data.translate(None, b"\r\n"), strict_mode=True)
    except ValueError as error:
        raise Problem(
            422, f"{name} ({len(data):,} characters, {data[:16]!r}...) is not base64 ({error})"
        ) from None


def _without_compressed_text(content: bytes) -> bytes:
    """Remove a PNG's colour profile and compressed texts, which Pillow would inflate to up to 64 MB."""
    view = memoryview(content)
    chunks, at = [view[:8]], 8
    for chunk, body in png_chunks(content):
        end = at + 12 + len(body)
        compressed = chunk in (b"iCCP", b"zTXt")
        if chunk == b"iTXt":
            # A keyword, a NUL, and the compression flag.
            compressed = bytes(body[:82]).partition(b"\0")[2][:1] != b"\0"
        if not compressed:
            chunks.append(view[at:end])
        at = end
    return content if sum(map(len, chunks)) == at else b"".join(chunks)


def is_public(address: str) -> bool:
    """Return whether an address is on the internet: not of this machine, a local network or special use."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in _SPECIAL_NETWORKS):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        # The connection ends at the embedded IPv4 address.
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip.is_site_local or (inner is not None and not is_public(str(inner))):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def web_client(transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """Make the client of `fetch`: no redirects, no proxies of the environment, one connection per download."""
    return httpx.AsyncClient(
        transport=transport,
        trust_env=False,
        timeout=None,
        limits=httpx.Limits(max_connections=32, max_keepalive_connections=0),
        headers={"accept": "image/*", "accept-encoding": "identity", "user-agent": "xfm-fast"},
    )


async def fetch(
    client: httpx.AsyncClient, url: str, account: Account, seconds: float = 10.0
) -> bytes:
    """Download an image into the account; raises `Problem` if the URL is not public, or the site is
    late.

    The name is resolved once and the connection goes to the checked address, so that DNS rebinding
    cannot redirect it; TLS and the header `host` use the name.
    """
    label = f"URL {url[:100]!r}"
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise Problem(422, f"{label} is malformed ({error})") from None
    if not target.host or target.userinfo or target.port is not None:
        raise Problem(
            422,
            f"{label} is not of the form https://host/path, without a port; send the image itself",
        )
    name, content = target.raw_host.decode(), bytearray()
    try:
        async with asyncio.timeout(seconds):
            loop = asyncio.get_running_loop()
            entries = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            addresses = [str(entry[4][0]) for entry in entries]
            # A name with both public and private addresses is refused.
            if not addresses or not all(map(is_public, addresses)):
                raise Problem(
                    422, f"{label} leads to an address that is not public; send the image itself"
                )
            pinned = target.copy_with(host=addresses[0])
            headers, extensions = {"host": target.netloc.decode()}, {"sni_hostname": name}
            async with client.stream(
                "GET", pinned, headers=headers, extensions=extensions
            ) as response:
                if response.status_code != 200:
                    raise OSError(f"status {response.status_code}; redirects are not followed")
                async for chunk in response.aiter_raw():
                    account.receive(len(chunk), _COPIES)
                    content += chunk
    except (OSError, ValueError, httpx.HTTPError) as error:
        # `TimeoutError` is an `OSError` without a text.
        reason = " ".join(str(error).split())[:100] or f"it took more than {seconds:g} s"
        raise Problem(422, f"{label} cannot be fetched ({reason}); send the image itself") from None
    return bytes(content)
