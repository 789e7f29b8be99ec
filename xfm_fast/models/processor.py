"""Preprocessing of strings, image files and PIL images to model inputs, as in the official evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeGuard, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from xfm_fast.checkpoint.files import CONFIG_FILE, TOKENIZER_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.data.images import MEAN, STD, decode_image, evaluation_transform, to_rgb
from xfm_fast.errors import DataError, InputError, UnavailableError, explain_types
from xfm_fast.io import make_folder, write_bytes
from xfm_fast.models.hub import PREPROCESSOR_FILE, local_folder
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

T = TypeVar("T")
Picture = str | os.PathLike[str] | Image.Image
"""An image file, or an open image."""

# Bicubic interpolation in Pillow and transformers.
_BICUBIC = 3
# Caption limits of the official retrieval.
MAX_WORDS, _MAX_TOKENS = 30, 40


class XFMProcessor:
    """The inputs of `XFM.forward` from strings and images: `model(**processor(images=[...], text=[...]))`.

    Args:
        config: configuration of the model.
        tokenizer: tokenizer of the model; without one only images can be processed.
    """

    model_input_names = ("pixels", "input_ids", "attention_mask")

    def __init__(self, config: XFMConfig, tokenizer: CaptionTokenizer | None = None) -> None:
        if not isinstance(config, XFMConfig):
            raise InputError(f"config is a {type(config).__name__}; give an XFMConfig")
        if not isinstance(tokenizer, CaptionTokenizer | None):
            raise InputError(
                f"tokenizer is a {type(tokenizer).__name__}; give a CaptionTokenizer, or None for images"
            )
        self.config, self.tokenizer = config, tokenizer

    @classmethod
    @explain_types
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """Load from a folder written by `XFM.save_pretrained`, or from the Hub.

        Args:
            folder: as for `XFM.from_pretrained`.
            options: `tokenizer` and the Hub's options, as for `XFM.from_pretrained`.

        Raises:
            CheckpointError: the folder does not exist.
            ConfigError: its `config.json` is not a valid model configuration.
            DataError: its tokenizer cannot be read, or belongs to another model.
        """
        source = options.pop("tokenizer", None)
        path = local_folder(folder, **options)
        config = XFMConfig.load(path / CONFIG_FILE)
        if source is None:
            return cls(config, find_tokenizer(path, config))
        return cls(config, read_tokenizer(source, config))

    @explain_types
    def __call__(
        self,
        images: Picture | Sequence[Picture] | None = None,
        text: str | Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Prepare images, texts, or both.

        Args:
            images: one or a list of image files (strings or paths) or PIL images.
            text: one or a list of texts.

        Returns:
            `pixels` `[B, 3, R, R]`; `input_ids` and `attention_mask` `[T, L]`, L the length of the longest text.

        Raises:
            InputError: both are missing, or a list is empty.
            UnavailableError: there is text, and no tokenizer.
            DataError: an image is broken, or a text is empty after cleaning.
        """
        if images is None and text is None:
            raise InputError("neither images nor text were given; pass one or both")
        inputs: dict[str, Tensor] = {}
        if images is not None:
            pictures = as_list(images)
            if not pictures:
                raise InputError("the list of images is empty; give at least one")
            inputs["pixels"] = image_pixels(pictures, self.config.image_size)
        if text is not None:
            texts = as_list(text)
            if not texts:
                raise InputError("the list of texts is empty; give at least one")
            tokens = text_tokens(texts, self.tokenizer, self.config)
            inputs["input_ids"], inputs["attention_mask"] = tokens
        return inputs

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json` and, if there is a tokenizer, `tokenizer.json` to a folder.

        Raises:
            StorageError: the folder cannot be written.
        """
        make_folder(Path(folder))
        write_bytes({Path(folder) / name: content for name, content in self.files().items()})

    def files(self) -> dict[str, bytes]:
        """Return the contents of the files that `save_pretrained` writes, by name."""
        files = {PREPROCESSOR_FILE: preprocessor_json(self.config)}
        if self.tokenizer is not None:
            files[TOKENIZER_FILE] = self.tokenizer.to_json().encode()
        return files


def preprocessor_json(config: XFMConfig) -> bytes:
    """Write `preprocessor_config.json`, for other libraries; XFM reads only `config.json`."""
    return (json.dumps(preprocessor_settings(config), indent=2) + "\n").encode()


def preprocessor_settings(config: XFMConfig) -> dict[str, Any]:
    """Return the preprocessing under the names of transformers."""
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "max_words": MAX_WORDS,
        "max_tokens": token_limit(config),
    }


def token_limit(config: XFMConfig) -> int:
    """Return the number of tokens that the model reads of a text, special ones included."""
    return min(_MAX_TOKENS, config.max_text_length)


def find_tokenizer(folder: Path, config: XFMConfig) -> CaptionTokenizer | None:
    """Load the tokenizer stored with the weights in `folder`, or None; raises `DataError` if it does not fit."""
    paths = [folder / TOKENIZER_FILE]
    if folder.name in ("model", "average"):
        # A run stores its trained vocabulary in the parent of the weight folders.
        paths.append(folder.parent / TOKENIZER_FILE)
    for path in paths:
        if path.is_file():
            return read_tokenizer(path, config)
    return None


def read_tokenizer(
    source: CaptionTokenizer | str | os.PathLike[str], config: XFMConfig
) -> CaptionTokenizer:
    """Load a tokenizer from a `tokenizer.json` or vocabulary folder; raises `DataError` if it does not fit."""
    if not isinstance(source, CaptionTokenizer):
        source = CaptionTokenizer.from_files(source)
    source.check(config)
    return source


def text_tokens(
    texts: Sequence[str],
    tokenizer: CaptionTokenizer | None,
    config: XFMConfig,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode texts as ids and mask, `[T, L]` each, L the length of the longest text.

    Texts are cleaned as captions: lower case, no punctuation, the first 30 words, at most 40 tokens.
    Raises `UnavailableError` without a tokenizer, and `DataError` for a text that is empty after
    cleaning.
    """
    if tokenizer is None:
        raise UnavailableError(
            "this model has no tokenizer; load it with tokenizer='FOLDER' of vocab.json and merges.txt"
        )
    captions = [pre_caption(text, MAX_WORDS) for text in texts]
    input_ids, mask = tokenizer.encode(captions, token_limit(config), pad_to_longest=True)
    return input_ids.to(device), mask.to(device)


def image_pixels(
    images: Sequence[Picture], size: int, device: torch.device | None = None
) -> Tensor:
    """Normalise images, each resized whole to a square: `[B, 3, size, size]`; raises `DataError`."""
    transform = evaluation_transform(size)
    return torch.stack([transform(open_image(image)) for image in images]).to(device)


def open_image(image: Picture) -> Image.Image:
    """Open an image as RGB, upright and on white.

    Raises `InputError` for another type, and `DataError` for a bad file.
    """
    if not isinstance(image, Image.Image):
        if not isinstance(image, (str, os.PathLike)):
            raise InputError(
                f"image is a {type(image).__name__}; give a path or a PIL image (Image.fromarray makes one)"
            )
        return decode_image(image)
    name = str(getattr(image, "filename", "") or f"{image.width}x{image.height} {image.mode}")
    try:
        return to_rgb(image, name)
    except (OSError, ValueError, SyntaxError) as error:
        # Pillow reads image files lazily.
        if isinstance(error, DataError):
            raise
        raise DataError(f"image {name} cannot be read ({error}); open it again") from None


def as_list(items: object) -> list[Any]:
    """Return a list from one text or image, or from several; raises `InputError` for other types."""
    if isinstance(items, str) or is_picture(items):
        return [items]
    if not isinstance(items, Iterable) or isinstance(items, (bytes, Mapping, Tensor)):
        raise InputError(
            f"{type(items).__name__} is not a text or image, or a list of them; give strings, paths or PIL images"
        )
    return list(items)


def are_texts(items: Sequence[object]) -> TypeGuard[Sequence[str]]:
    """Return whether all items are strings, rather than images.

    Raises `InputError` for mixed lists, other types, and strings that name a file.
    """
    if not items:
        raise InputError("the list is empty; give at least one text or image")
    texts = 0
    for item in items:
        if isinstance(item, str):
            texts += 1
        elif not is_picture(item):
            raise InputError(
                f"{type(item).__name__} is not a text or image; give strings, paths or PIL images"
            )
    if not texts:
        return False
    if texts < len(items):
        raise InputError("the list mixes texts and images; encode them in two calls")
    for item in items:
        # The name of an existing file more likely means the image than a caption.
        if isinstance(item, str) and Path(item).suffix and os.path.isfile(item):
            raise InputError(
                f"{item!r} is a file, and strings are texts here; write Path({item!r}) for the image"
            )
    return True


def is_picture(item: object) -> TypeGuard[Picture]:
    """Return whether the item is a path or a PIL image; a string is a text."""
    return isinstance(item, (os.PathLike, Image.Image))


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slice a sequence; raises `InputError` for a size below 1."""
    if size < 1:
        raise InputError(f"batch_size={size}; it must be at least 1")
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Disable dropout and gradients within the block; raises `InputError` for a model on the meta device."""
    for parameter in model.parameters():
        if parameter.is_meta:
            raise InputError(
                f"{type(model).__name__} is on the meta device; load weights with from_pretrained, or call to_empty()"
            )
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def pixel_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Convert boxes (cx, cy, w, h) relative to an image to (x, y, w, h) in its pixels: `[P, 4]`.

    `sizes` `[P, 2]` or `[1, 2]` are the width and height of the original images, whose aspect ratio
    the square input did not preserve.
    """
    centre, sides = boxes[:, :2] * sizes, boxes[:, 2:] * sizes
    return torch.cat([centre - sides / 2, sides], dim=1)
