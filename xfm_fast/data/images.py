"""Image decoding; the structure of JPEG, PNG and WebP files is validated first."""

from __future__ import annotations

import binascii
import contextlib
import io
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from xfm_fast.data.options import ImageOptions, Record
from xfm_fast.errors import DataError, needs
from xfm_fast.io import read_bytes

# torchvision imports PyTorch's compiler, which is slow and not needed for text.
if TYPE_CHECKING:
    from torchvision.transforms import v2


# The normalisation of pretraining and of every vision-language task (CLIP's, arXiv 2103.00020).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

Source = str | os.PathLike[str] | bytes

# Functions of torchvision.io.
_FAST = {"JPEG": "decode_jpeg", "PNG": "decode_png"}
# From this EXIF orientation on, width and height are exchanged.
_TRANSPOSED = 5
# More than the uncompressed 16-bit pixels of `PIL.Image.MAX_IMAGE_PIXELS`.
_FILE_LIMIT = 1 << 30
_BOMB_REMEDY = "shrink the image, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"


def evaluation_transform(image_size: int) -> v2.Compose:
    """Make the official evaluation transform: resize to R × R (bicubic, antialiased), normalise to `[3, R, R]`."""
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


def decode_image(
    source: Source, name: str | None = None, *, official: bool = False, side: int | None = None
) -> Image.Image:
    """Decode an image to RGB: EXIF orientation applied, transparency on white, first frame, 16-bit
    grey scaled to 8.

    `official` ignores EXIF orientation and drops transparency. `name` is used in errors. With `side`, a
    JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both sides keep as many pixels. An image that
    is missing, truncated, larger than `PIL.Image.MAX_IMAGE_PIXELS` or without a defined white level
    raises `DataError`.
    """
    name, data = read_image(source, name)
    with _opened(data, name) as image:
        if side is not None:
            image.draft(None, (side, side))
        return to_rgb(image, name, official=official)


def image_size(
    source: Source, name: str | None = None, *, official: bool = False
) -> tuple[int, int]:
    """Return width and height of the decoded image, from the header."""
    name, data = read_image(source, name)
    with _opened(data, name) as image:
        return image.size if official else upright_size(image)


def decode_pixels(source: Source, name: str | None = None, *, official: bool = False) -> Tensor:
    """Decode to 8-bit pixels `[3, H, W]`, bit-identical to `decode_image` and faster for JPEG and PNG."""
    name, data = read_image(source, name)
    with _opened(data, name) as image:
        if _is_plain(image, data, official=official):
            # What torchvision refuses, Pillow explains; a build without the image libraries raises
            # too.
            with contextlib.suppress(RuntimeError, ModuleNotFoundError):
                from torchvision import io as fast

                decode = getattr(fast, _FAST[str(image.format)])
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                decoded = decode(encoded, mode=fast.ImageReadMode.RGB)
                if decoded.dtype == torch.uint8:
                    return decoded
        return torch.from_numpy(np.array(to_rgb(image, name, official=official))).permute(2, 0, 1)


def _is_plain(image: Image.Image, data: bytes, *, official: bool) -> bool:
    """Return whether torchvision decodes an image to the same pixels: upright, opaque JPEG or PNG."""
    if image.format not in _FAST or image.mode not in ("RGB", "L"):
        return False
    if official:
        return True
    if image.has_transparency_data:
        return False
    # Pillow would decode a PNG to find its EXIF.
    if image.format == "PNG" and re.search(rb"eXIf|exif|adobe\.xmp", data) is None:
        return True
    return orientation(image) == 1


def load_image(
    source: Source, image_size: int, name: str | None = None, *, official: bool = False
) -> Tensor:
    """Decode an image and apply the evaluation transform, to normalised pixels `[3, R, R]`."""
    return evaluation_transform(image_size)(decode_image(source, name, official=official))


def record_pixels(record: Record, options: ImageOptions, rng: Generator) -> Tensor:
    """Decode a record's image, or a random one of its images, to 8-bit pixels `[3, H, W]`."""
    values = image_values(record, options)
    # A single image draws no random number.
    source = image_source(values[rng.integers(len(values))], options)
    name = f"in {options.image_key!r}" if isinstance(source, bytes) else None
    return decode_pixels(source, name, official=options.official_pictures)


def image_values(record: Record, options: ImageOptions) -> list[Any]:
    """Return the image values of a record; an empty list raises `DataError`."""
    value = record.get(options.image_key)
    if value == []:
        raise DataError(f"the list in {options.image_key!r} is empty; give at least one image")
    return value if isinstance(value, list) else [value]


def image_source(value: Any, options: ImageOptions) -> Path | bytes:
    """Return the encoded bytes or the path of an image value."""
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
        raise DataError(
            f"{key!r} ({len(value)} characters) is not base64 ({error}); write the image again, or name the folder if "
            "these are paths (image_root)"
        ) from None


_observer: ContextVar[Callable[[bytes], None] | None] = ContextVar("observer", default=None)


@contextlib.contextmanager
def images_observed(observer: Callable[[bytes], None] | None) -> Iterator[None]:
    """Pass the encoded bytes of every image that the block reads to `observer`, if there is one."""
    before = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(before)


def read_image(source: Source, name: str | None = None) -> tuple[str, bytes]:
    """Read the name and the encoded bytes of an image; a missing, empty or irregular file raises `DataError`."""
    name = name or (f"{len(source)} bytes" if isinstance(source, bytes) else str(os.fspath(source)))
    try:
        data = source if isinstance(source, bytes) else read_bytes(source, _FILE_LIMIT)
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


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """Check and open an encoded image; everything that fails, in the block too, raises `DataError`."""
    with warnings.catch_warnings():
        # Pillow only warns of bombs up to twice the limit, which the check below refuses.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
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
                if image.format == "PNG":
                    check_png(data)
                elif image.format in ("JPEG", "MPO"):
                    read_header(data)
                yield image
        except (DataError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise DataError(f"image {name} is refused: {error}; {_BOMB_REMEDY}") from None
        except UnidentifiedImageError:
            raise DataError(
                f"image {name} ({len(data)} bytes, beginning with {data[:8]!r}) is in a format that Pillow does not "
                "read; convert it to JPEG or PNG"
            ) from None
        except Exception as error:  # a damaged file can make a decoder raise anything
            raise DataError(
                f"image {name} ({len(data)} bytes) is damaged or truncated ({error}); download or copy it again"
            ) from None


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 is upright."""
    # The pixels of an image with damaged EXIF are intact.
    with contextlib.suppress(Exception):
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if value in range(1, 9) else 1
    return 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height after EXIF orientation."""
    width, height = image.size
    return (width, height) if orientation(image) < _TRANSPOSED else (height, width)


def is_transparent(image: Image.Image) -> bool:
    """Return whether any pixel is not opaque."""
    if not image.has_transparency_data:
        return False
    return image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


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
# Chunks that may hold an orientation, which takes a copy.
_EXIF_CHUNKS = {b"eXIf", b"iTXt"}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
# Every scan of a progressive JPEG passes over all pixels; encoders write about ten.
_SCAN_LIMIT = 64
# Segments of JPEG and chunks of PNG, which Pillow reads one by one in Python; encoders write chunks
# of 4 KB and more.
_CHUNK_LIMIT = 1024
_CHUNK_BYTES = 512
# Compressed input and inflated output of one step.
_INPUT_STEP, _OUTPUT_STEP = 1 << 16, 1 << 20


class Header(NamedTuple):
    """Image size, and peak decoder memory in bytes per pixel."""

    width: int
    height: int
    depth: int


def read_header(data: bytes) -> Header:
    """Parse the header of a JPEG, PNG or WebP file; an invalid or abusive file raises `ValueError`."""
    if data.startswith(_PNG):
        return _read_png(data)
    if data.startswith(b"\xff\xd8\xff"):
        return _read_jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) >= 30:
        if data[12:16] == b"VP8X":
            width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
            return Header(width, height, 32 if data[20] & 0x10 else 20)
        if data[12:16] == b"VP8L" and data[20] == 0x2F:
            bits = int.from_bytes(data[21:25], "little")
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
            return Header(width, height, 32 if bits >> 28 & 1 else 20)
        if data[12:16] == b"VP8 ":
            width, height = struct.unpack("<HH", data[26:30])
            return Header(width & 0x3FFF, height & 0x3FFF, 20)
    raise ValueError("it is not a JPEG, PNG or WebP")


def _read_png(data: bytes) -> Header:
    types = set()
    width = height = bits = colour_type = 0
    for chunk, body in png_chunks(data):
        types.add(chunk)
        if chunk == b"IHDR":
            width, height, bits, colour_type = struct.unpack(">IIBB", body[:10])
    if bits == 16 and colour_type == 0:
        depth = 32
    elif b"tRNS" in types or colour_type & 4:
        depth = 20
    else:
        depth = 9 if types & _EXIF_CHUNKS else 5
    return Header(width, height, depth)


def png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield types and bodies of the chunks of a PNG file; a truncated file raises `ValueError`."""
    view, at = memoryview(data), len(_PNG)
    limit = _CHUNK_LIMIT + len(data) // _CHUNK_BYTES
    for index in range(limit):
        length, chunk = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if at + 12 + length > len(data):
            raise ValueError("it ends within a chunk")
        if (chunk == b"IHDR") != (index == 0) or (index == 0 and length != 13):
            raise ValueError("its first chunk is not a header, or another is")
        yield chunk, view[at + 8 : at + 8 + length]
        if chunk == b"IEND":
            return
        at += 12 + length
    raise ValueError(f"it has more than {limit:,} chunks")


def check_png(data: bytes) -> None:
    """Reject a PNG file with pixel data shorter or longer than its header states."""
    inflate, size, expected = zlib.decompressobj(), 0, 0
    for chunk, body in png_chunks(data):
        if chunk == b"IHDR":
            expected = _png_bytes(*struct.unpack(">IIBBBBB", body))
        for start in range(0, len(body) if chunk == b"IDAT" else 0, _INPUT_STEP):
            compressed: bytes | memoryview = body[start : start + _INPUT_STEP]
            while compressed and not inflate.eof:
                limit = min(_OUTPUT_STEP, expected - size + 1)
                size += len(inflate.decompress(compressed, limit))
                if size > expected:
                    raise ValueError(f"it holds more than the {expected} bytes of its pixels")
                compressed = inflate.unconsumed_tail
            if inflate.eof:
                break
    if size < expected:
        raise ValueError(f"it holds {size} bytes of pixels instead of {expected}")


# First column, column step, first row and row step of the seven passes of an interlaced PNG
# (Adam7).
_ADAM7 = (
    (0, 8, 0, 8),
    (4, 8, 0, 8),
    (0, 4, 4, 8),
    (2, 4, 0, 4),
    (0, 2, 2, 4),
    (1, 2, 0, 2),
    (0, 1, 1, 2),
)


def _png_bytes(
    width: int, height: int, bits: int, colour_type: int, _: int, __: int, interlaced: int
) -> int:
    """Return the inflated size of a PNG's pixels, in rows of one byte more than their pixels."""
    bits *= {2: 3, 4: 2, 6: 4}.get(colour_type, 1)
    size = 0
    for x, step_x, y, step_y in _ADAM7 if interlaced else ((0, 1, 0, 1),):
        columns, rows = len(range(x, width, step_x)), len(range(y, height, step_y))
        if columns:
            size += rows * (1 + (columns * bits + 7) // 8)
    return size


def _read_jpeg(data: bytes) -> Header:
    """Parse the segments of a JPEG, and return its largest frame."""
    at, scans, largest = 2, 0, Header(0, 0, 0)
    has_exif = b"Exif" in data[: 1 << 17]
    for _ in range(_CHUNK_LIMIT):
        match = _MARKER.search(data, at)
        if match is None or match[1] == b"\xd9":
            return largest
        marker, at = match[1][0], match.end()
        if marker in (0x01, 0xD8):
            continue
        if marker in _FRAMES and len(data) >= at + 8:
            height, width, components = struct.unpack(">HHB", data[at + 3 : at + 8])
            depth = 9 if has_exif or components > 3 else 5
            if marker in _PROGRESSIVE:
                depth += 2 * components
            largest = max(largest, Header(width, height, depth), key=math.prod)
        scans += marker == 0xDA
        if scans > _SCAN_LIMIT:
            raise ValueError(f"it has more than {_SCAN_LIMIT} scans")
        at += int.from_bytes(data[at : at + 2], "big")
    raise ValueError(f"it has more than {_CHUNK_LIMIT:,} segments")
