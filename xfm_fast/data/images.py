"""Image decoding with strict validation: the structure of JPEG, PNG and WebP files is checked before it."""

from __future__ import annotations

import binascii
import contextlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from xfm_fast.data.options import ImageOptions
from xfm_fast.errors import DataError, needs
from xfm_fast.io import read_bytes

# torchvision imports PyTorch's compiler, which is slow and not needed for text.
if TYPE_CHECKING:
    from torchvision.transforms import v2


# The normalisation of pretraining and of every vision-language task (CLIP's, arXiv 2103.00020).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Source = str | os.PathLike[str] | bytes
Decoded = TypeVar("Decoded")

# Functions of torchvision.io.
_FAST = {"JPEG": "decode_jpeg", "PNG": "decode_png"}
# From this EXIF orientation on, width and height are exchanged.
_TURNED = 5
# More than the pixels that `PIL.Image.MAX_IMAGE_PIXELS` allows take without compression, at 16 bits.
_MOST_BYTES = 1 << 30
_BOMB_REMEDY = "shrink the image, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"


def evaluation_transform(image_size: int) -> v2.Compose:
    """Official evaluation transform: resize to R × R (bicubic, antialiased), normalise to `[3, R, R]`."""
    with needs("vision"):
        from torchvision.transforms import InterpolationMode, v2

    return v2.Compose(
        [
            v2.Resize(
                (image_size, image_size), interpolation=InterpolationMode.BICUBIC, antialias=True
            ),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def decode_image(source: Source, name: str | None = None, *, official: bool = False) -> Image.Image:
    """Decode an image to RGB: EXIF orientation applied, transparency on white, first frame, 16-bit grey scaled to 8.

    `official` ignores EXIF orientation and drops transparency. `name` is the name in errors. An image that is missing,
    truncated, larger than `PIL.Image.MAX_IMAGE_PIXELS` or without a defined white level raises `DataError`.
    """
    name, data = read_image(source, name)
    return _decoded(data, name, lambda opened: to_rgb(opened, name, official=official))


def image_size(
    source: Source, name: str | None = None, *, official: bool = False
) -> tuple[int, int]:
    """Width and height of the decoded image, from the header."""
    name, data = read_image(source, name)
    return _decoded(data, name, lambda opened: opened.size if official else upright_size(opened))


def decode_pixels(source: Source, name: str | None = None, *, official: bool = False) -> Tensor:
    """`decode_image` as 8-bit pixels `[3, H, W]`, bit-identical and faster for JPEG and PNG."""
    name, data = read_image(source, name)

    def pixels(opened: Image.Image) -> Tensor:
        decodable = opened.format in _FAST and opened.mode in ("RGB", "L")
        if decodable and not official:
            # Pillow would decode a PNG to find its EXIF.
            may_turn = (
                opened.format != "PNG" or re.search(rb"eXIf|exif|adobe\.xmp", data) is not None
            )
            decodable = not (
                opened.has_transparency_data or (may_turn and orientation(opened) != 1)
            )
        if decodable:
            # What torchvision refuses, Pillow explains; a build without the image libraries raises too.
            with contextlib.suppress(RuntimeError, ModuleNotFoundError):
                from torchvision import io as fast

                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                found = getattr(fast, _FAST[str(opened.format)])(
                    encoded, mode=fast.ImageReadMode.RGB
                )
                if found.dtype == torch.uint8:
                    return found
        return torch.from_numpy(np.array(to_rgb(opened, name, official=official))).permute(2, 0, 1)

    return _decoded(data, name, pixels)


def load_image(
    source: Source, image_size: int, name: str | None = None, *, official: bool = False
) -> Tensor:
    """Decode an image and apply the evaluation transform: normalised pixels `[3, R, R]`."""
    return evaluation_transform(image_size)(decode_image(source, name, official=official))


def record_pixels(
    record: Mapping[str, Any], options: ImageOptions, rng: np.random.Generator
) -> Tensor:
    """8-bit pixels `[3, H, W]` of a record's image, or of a random one of its images."""
    values = image_values(record, options)
    # A single option draws no random number.
    source = image_source(values[rng.integers(len(values))], options)
    name = f"in {options.image_key!r}" if isinstance(source, bytes) else None
    return decode_pixels(source, name, official=options.official_pictures)


def image_values(record: Mapping[str, Any], options: ImageOptions) -> list[Any]:
    """Image values of a record; an empty list raises `DataError`."""
    value = record.get(options.image_key)
    if value == []:
        raise DataError(f"the list in {options.image_key!r} is empty; give at least one image")
    return value if isinstance(value, list) else [value]


def image_source(value: Any, options: ImageOptions) -> Path | bytes:
    """Encoded bytes or path of an image value."""
    key = options.image_key
    if isinstance(value, (bytes, Path)):
        return value
    if value is None:
        raise DataError(f"the record has no field {key!r}; name the field that holds the image")
    if not isinstance(value, str):
        raise DataError(f"{key!r} holds a {type(value).__name__}; base64 text or a path is needed")
    if options.image_root is not None:
        return options.image_root / value
    try:
        return binascii.a2b_base64(value)
    except ValueError as error:
        remedy = "write the image anew, or name the folder if these are paths (image_root)"
        raise DataError(
            f"{key!r} ({len(value)} characters) is no base64 ({error}); {remedy}"
        ) from None


_observer: ContextVar[Callable[[bytes], None] | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def images_observed(observer: Callable[[bytes], None] | None) -> Iterator[None]:
    """Pass the encoded bytes of every image that is read in the block to `observer`, if there is one."""
    before = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(before)


def read_image(source: Source, name: str | None = None) -> tuple[str, bytes]:
    """Name and encoded bytes of an image; one that is missing, empty or no regular file raises `DataError`."""
    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(os.fspath(source)))
    try:
        data = source if isinstance(source, bytes) else read_bytes(source, _MOST_BYTES)
    except FileNotFoundError:
        raise DataError(f"image {name} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"image {name} cannot be read ({reason}); check that it is a readable file"
        ) from None
    if not data:
        raise DataError(f"image {name} is empty (0 bytes); download or copy it again")
    if (observe := _observer.get()) is not None:
        observe(data)
    return name, data


def _decoded(data: bytes, name: str, decode: Callable[[Image.Image], Decoded]) -> Decoded:
    with warnings.catch_warnings():
        # Pillow only warns of a bomb up to twice the limit; the check below is the rule.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as opened:
                width, height = opened.size
                if not width or not height:
                    raise DataError(
                        f"image {name} is {width}x{height} and has no pixels; replace it"
                    )
                limit = Image.MAX_IMAGE_PIXELS
                if limit is not None and width * height > limit:
                    raise DataError(
                        f"image {name} is {width}x{height} = {width * height:,} pixels, over the limit of {limit:,} "
                        f"that guards against decompression bombs; {_BOMB_REMEDY}"
                    )
                if opened.format == "PNG":
                    check_png(data)
                elif opened.format in ("JPEG", "MPO"):
                    read_header(data)
                return decode(opened)
        except (DataError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise DataError(f"image {name} is refused: {error}; {_BOMB_REMEDY}") from None
        except UnidentifiedImageError:
            raise DataError(
                f"image {name} ({len(data)} bytes, beginning with {data[:8]!r}) is in no format that Pillow reads; "
                "convert it to JPEG or PNG"
            ) from None
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise DataError(
                f"image {name} ({len(data)} bytes) is damaged or truncated ({error}); download or copy it again"
            ) from None


def orientation(image: Image.Image) -> int:
    """EXIF orientation; 1 is upright."""
    # A camera that writes damaged EXIF takes whole pictures.
    with contextlib.suppress(Exception):
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return found if found in range(1, 9) else 1
    return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF orientation."""
    width, height = image.size
    return (width, height) if orientation(image) < _TURNED else (height, width)


def is_transparent(image: Image.Image) -> bool:
    """True if any pixel is not opaque."""
    return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (
        255,
        255,
    )


def to_rgb(image: Image.Image, name: str, *, official: bool = False) -> Image.Image:
    """Convert a decoded image to RGB; 16-bit grey is scaled to 8 bits."""
    if not official and orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise DataError(
            f"image {name} holds floating-point values without a defined white; convert it to 8 bits"
        )
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        # Pillow gives 16-bit files as `I;16` or, in some formats, as 32-bit `I`.
        deep = image.mode != "I" or int(grey.max(initial=0)) > 255
        eight = np.clip(grey // 257 if deep else grey, 0, 255).astype(np.uint8)
        return Image.fromarray(eight).convert("RGB")
    if not official and image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if image.mode == "RGB":
        # A conversion would copy the pixels.
        image.load()
        return image
    return image.convert("RGB")


_PNG = b"\x89PNG\r\n\x1a\n"
# Markers of JPEG; stuffed zeros, restarts and fill bytes are none.
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
# Chunks that may say that an image is turned, which takes a copy.
_TURNING = {b"eXIf", b"iTXt"}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
# Every scan of a progressive JPEG passes over all pixels; encoders write about ten.
_MOST_SCANS = 64
# Segments of JPEG and chunks of PNG, which Pillow reads one by one in Python; encoders write chunks of 4 KB and more.
_MOST_PARTS = 1024
_PART_BYTES = 512
# Compressed input and inflated output of one step.
_PIECE, _INFLATED = 1 << 16, 1 << 20


class Header(NamedTuple):
    """Image size, and peak decoder memory in bytes per pixel."""

    width: int
    height: int
    depth: int


def read_header(data: bytes) -> Header:
    """Parse the header of a JPEG, PNG or WebP file; an invalid or abusive file raises `ValueError`."""
    if data.startswith(_PNG):
        kinds = set()
        width = height = bits = colours = 0
        for kind, body in png_chunks(data):
            kinds.add(kind)
            if kind == b"IHDR":
                width, height, bits, colours = struct.unpack(">IIBB", body[:10])
        if bits == 16 and colours == 0:
            return Header(width, height, 32)
        return Header(
            width, height, 20 if b"tRNS" in kinds or colours & 4 else 9 if kinds & _TURNING else 5
        )
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        if data[12:16] == b"VP8X":
            return Header(
                _number(data, 24, 3) + 1, _number(data, 27, 3) + 1, 32 if data[20] & 0x10 else 20
            )
        if data[12:16] == b"VP8L" and data[20] == 0x2F:
            sizes = _number(data, 21, 4)
            return Header(
                (sizes & 0x3FFF) + 1, (sizes >> 14 & 0x3FFF) + 1, 32 if sizes >> 28 & 1 else 20
            )
        if data[12:16] == b"VP8 ":
            return Header(_number(data, 26, 2) & 0x3FFF, _number(data, 28, 2) & 0x3FFF, 20)
    raise ValueError("it is no JPEG, PNG or WebP")


def png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Types and bodies of the chunks of a PNG file; a truncated file raises `ValueError`."""
    view, at = memoryview(data), len(_PNG)
    most = _MOST_PARTS + len(data) // _PART_BYTES
    for number in range(most):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if at + 12 + length > len(data):
            raise ValueError("it ends within a chunk")
        if (kind == b"IHDR") != (number == 0) or (number == 0 and length != 13):
            raise ValueError("its first chunk is no header, or another is")
        yield kind, view[at + 8 : at + 8 + length]
        if kind == b"IEND":
            return
        at += 12 + length
    raise ValueError(f"it has more than {most:,} chunks")


def check_png(data: bytes) -> None:
    """Reject a PNG file with pixel data shorter or longer than its header states."""
    inflate, found, expected = zlib.decompressobj(), 0, 0
    for kind, body in png_chunks(data):
        if kind == b"IHDR":
            expected = _png_bytes(*struct.unpack(">IIBBBBB", body))
        for start in range(0, len(body) if kind == b"IDAT" else 0, _PIECE):
            rest: bytes | memoryview = body[start : start + _PIECE]
            while rest and not inflate.eof:
                found += len(inflate.decompress(rest, min(_INFLATED, expected - found + 1)))
                if found > expected:
                    raise ValueError(f"it holds more than the {expected} bytes of its pixels")
                rest = inflate.unconsumed_tail
            if inflate.eof:
                break
    if found < expected:
        raise ValueError(f"it holds {found} bytes of pixels instead of {expected}")


def _png_bytes(
    width: int, height: int, bits: int, colours: int, _: int, __: int, interlaced: int
) -> int:
    bits *= {2: 3, 4: 2, 6: 4}.get(colours, 1)
    # Rows of one byte more than their pixels; seven small images where it is interlaced (Adam7).
    passes = (
        (0, 8, 0, 8),
        (4, 8, 0, 8),
        (0, 4, 4, 8),
        (2, 4, 0, 4),
        (0, 2, 2, 4),
        (1, 2, 0, 2),
        (0, 1, 1, 2),
    )
    expected = 0
    for x, step_x, y, step_y in passes if interlaced else ((0, 1, 0, 1),):
        columns, rows = len(range(x, width, step_x)), len(range(y, height, step_y))
        expected += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return expected


def _jpeg(data: bytes) -> Header:
    at, scans, largest = 2, 0, Header(0, 0, 0)
    turned = b"Exif" in data[: 1 << 17]
    for _ in range(_MOST_PARTS):
        found = _MARKER.search(data, at)
        if found is None or found[1] == b"\xd9":
            return largest
        kind, at = found[1][0], found.end()
        if kind in (0x01, 0xD8):
            continue
        if kind in _FRAMES and len(data) >= at + 8:
            height, width, parts = struct.unpack(">HHB", data[at + 3 : at + 8])
            depth = (9 if turned or parts > 3 else 5) + (2 * parts if kind in _PROGRESSIVE else 0)
            largest = max(
                largest,
                Header(width, height, depth),
                key=lambda each: each.width * each.height * each.depth,
            )
        scans += kind == 0xDA
        if scans > _MOST_SCANS:
            raise ValueError(f"it has more than {_MOST_SCANS} scans")
        at += int.from_bytes(data[at : at + 2], "big")
    raise ValueError(f"it has more than {_MOST_PARTS:,} segments")


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")
