"""Decoding of real bytes, good and bad, and the official test transform."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling

from xfm_fast.data.images import MEAN, STD, decode_image, load_image
from xfm_fast.errors import DataError


def _picture(mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def _bytes(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _png(width: int, height: int) -> bytes:
    """A PNG whose header promises this size, followed by next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_transform_is_the_official_one() -> None:
    picture = _picture()
    ours = load_image(_bytes(picture), 32)
    resized = np.asarray(picture.resize((32, 32), Resampling.BICUBIC), dtype=np.float32) / 255
    expected = torch.from_numpy((resized - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).permute(2, 0, 1)
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


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    decoded = decode_image(_bytes(Image.fromarray(values)))
    assert np.asarray(decoded)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_values_have_no_white() -> None:
    data = _bytes(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    with pytest.raises(DataError, match="floating-point"):
        decode_image(data)


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_orientation_is_not_applied() -> None:
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x0112] = 6
    assert decode_image(_bytes(picture, "JPEG", exif=exif)).size == (20, 10)


def test_paths_and_bytes_agree(tmp_path: Path) -> None:
    data = _bytes(_picture())
    (tmp_path / "a.png").write_bytes(data)
    assert torch.equal(load_image(tmp_path / "a.png", 16), load_image(data, 16))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"no image at all", "in no format"),
        (_bytes(_picture(size=(200, 200)), "JPEG")[:3000], "truncated"),
        (_bytes(_picture(size=(200, 200)))[:3000], "truncated"),
        (_png(20, 20), "truncated"),
        (_png(60_000, 60_000), "decompression bomb"),
        (_png(12_000, 9_000), "decompression bomb"),
        (_png(0, 5), "."),
    ],
)
def test_bad_bytes_are_one_clear_error(data: bytes, message: str, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(DataError, match=message) as caught:
        decode_image(data, "photo.jpg")
    text = str(caught.value)
    assert "photo.jpg" in text
    assert "\n" not in text
    assert not len(recwarn)


def test_the_limit_is_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _bytes(_picture(size=(30, 30)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 899)
    with pytest.raises(DataError, match="30x30 = 900 pixels"):
        decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode_image(data).size == (30, 30)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        decode_image(tmp_path / "absent.png")
    with pytest.raises(DataError, match="cannot be read"):
        decode_image(tmp_path)
