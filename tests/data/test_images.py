"""Decoding of real bytes, good and bad, and the official test transform."""

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.Image import Resampling

from tests.serve.conftest import inflating_png, scans
from xfm_fast.data.images import (
    MEAN,
    STD,
    decode_image,
    decode_pixels,
    image_size,
    load_image,
    to_rgb,
)
from xfm_fast.errors import DataError


def _picture(mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def _bytes(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _png(
    width: int,
    height: int,
    pixels: bytes = b"\0",
    *,
    mode: int = 2,
    bits: int = 8,
    interlaced: int = 0,
    chunks: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """Make a PNG of this size in the header, followed by the given pixel data."""
    header = struct.pack(">IIBBBBB", width, height, bits, mode, 0, 0, interlaced)
    chunk_list = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunk_list
    )


def test_transform_is_the_official_one() -> None:
    picture = _picture()
    ours = load_image(_bytes(picture), 32)
    resized = np.asarray(picture.resize((32, 32), Resampling.BICUBIC), dtype=np.float32) / 255
    expected = torch.from_numpy(
        (resized - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    ).permute(2, 0, 1)
    assert ours.shape == (3, 32, 32)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    picture = _picture(mode)
    form = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    decoded = decode_image(_bytes(picture, form))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "WEBP"):
        _check_upright(_bytes(_picture(size=(20, 10)), form, exif=exif))
    assert decode_image(_bytes(_picture(), "JPEG", exif=b"Exif\0\0damaged")).size == (37, 23)


def _check_upright(data: bytes) -> None:
    stored = Image.open(io.BytesIO(data)).convert("RGB")
    upright = ImageOps.exif_transpose(stored)
    for official, expected in ((False, upright), (True, stored)):
        pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        assert image_size(data, official=official) == expected.size
        assert torch.equal(decode_pixels(data, official=official), pixels)
        decoded = decode_image(data, official=official)
        assert np.array_equal(np.asarray(decoded), np.asarray(expected))
    again = to_rgb(decode_image(data), "again")
    assert np.array_equal(np.asarray(again), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_are_on_white(mode: str) -> None:
    picture = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    picture.putpixel((1, 0), (10, 10, 10, 255))
    data = _bytes(picture.convert(mode), "PNG")
    for pixels in (np.asarray(decode_image(data)), decode_pixels(data).permute(1, 2, 0).numpy()):
        assert pixels[0, 1].tolist() == [10, 10, 10]
        assert (pixels[1] == 255).all()
    hidden = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(decode_image(data, official=True)), np.asarray(hidden))


def test_pipes_and_devices_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match="file"):
            decode_image(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"no image at all", "format"),
        (_bytes(_picture(size=(200, 200)), "JPEG")[:3000], "truncated"),
        (_bytes(_picture(size=(200, 200)))[:3000], "truncated"),
        (_png(20, 20), "truncated"),
        (_png(60_000, 60_000), "decompression bomb"),
        (_png(12_000, 9_000), "decompression bomb"),
        (_png(0, 5), "."),
    ],
)
def test_bad_bytes_are_one_clear_error(
    data: bytes, message: str, recwarn: pytest.WarningsRecorder
) -> None:
    for decode in (decode_image, decode_pixels):
        with pytest.raises(DataError, match=rf"photo\.jpg.*{message}"):
            decode(data, "photo.jpg")
    assert not len(recwarn)


@pytest.mark.parametrize("mode", [0, 2])
def test_rows_that_are_missing_are_not_black(mode: int) -> None:
    """PNGs of 20 rows with fewer rows of data and right checksums."""
    for decode in (decode_image, decode_pixels):
        for width in (1, 9):
            row = b"\0" + bytes([200]) * width * {0: 1, 2: 3}[mode]
            for rows in (0, 1, 19):
                with pytest.raises(DataError, match="truncated"):
                    decode(_png(width, 20, row * rows, mode=mode))
            with pytest.raises(DataError, match="truncated"):
                decode(_png(width, 20, row * 15, mode=mode, interlaced=1))
            assert decode(_png(width, 20, row * 20, mode=mode)) is not None


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_what_is_cut_off_is_refused_or_was_nothing(form: str) -> None:
    data = _bytes(_picture(size=(23, 17)).convert("P" if form == "GIF" else "RGB"), form)
    complete = decode_pixels(data)
    for length in {*range(0, len(data), 1 + len(data) // 60), *range(len(data) - 20, len(data))}:
        try:
            truncated = decode_pixels(data[:length])
        except DataError:
            continue
        assert torch.equal(truncated, complete), f"{length} of {len(data)} bytes"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pixels_are_those_of_pillow(form: str) -> None:
    for mode in (
        ("RGB", "L", "CMYK", "YCbCr") if form == "JPEG" else ("RGB", "L", "P", "RGBA", "LA", "1")
    ):
        for options in (
            ({}, {"quality": 30, "progressive": True, "subsampling": 2})
            if form == "JPEG"
            else ({},)
        ):
            data = _bytes(_picture(mode), form, **options)
            pixels = decode_pixels(data)
            assert pixels.dtype == torch.uint8
            assert torch.equal(
                pixels, torch.from_numpy(np.array(decode_image(data))).permute(2, 0, 1)
            )


@pytest.mark.parametrize(
    ("data", "words"),
    [(inflating_png(20_000), "200 bytes"), (scans(256, 100), "scans")],
    ids=["inflates", "scans"],
)
@pytest.mark.parametrize("decode", [decode_image, decode_pixels])
def test_a_file_that_costs_a_decoder_minutes_is_refused_at_once(
    decode: Callable[[bytes], object], data: bytes, words: str
) -> None:  # fmt: skip
    began = time.process_time()
    with pytest.raises(DataError, match=words):
        decode(data)
    assert time.process_time() - began < 0.5


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    decoded = decode_image(_bytes(Image.fromarray(values)))
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 1, 128, 255]
