"""Strings, image files and PIL images as the tensors that a model takes, resized as the official evaluation does."""

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

from xfm_fast.checkpoint.files import CONFIG_FILE, TOKENIZER_FILE, write_bytes
from xfm_fast.config import XFMConfig
from xfm_fast.data.images import MEAN, STD, decode_image, evaluation_transform, to_rgb
from xfm_fast.errors import DataError, InputError, UnavailableError
from xfm_fast.models.hub import PREPROCESSOR_FILE, local_folder
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

T = TypeVar("T")
Picture = str | os.PathLike[str] | Image.Image
"""An image file, or an image that is open."""

# As Pillow and transformers number bicubic interpolation.
_BICUBIC = 3
# Of captions in the official retrieval.
_MAX_WORDS, _MAX_TOKENS = 30, 40


class XFMProcessor:
    """The tensors of `XFM.forward` from strings and images: `model(**processor(images=[...], text=[...]))`.

    Args:
        config: of the model.
        tokenizer: of its texts; without one it prepares images alone.
    """

    model_input_names = ("pixels", "input_ids", "attention_mask")

    def __init__(self, config: XFMConfig, tokenizer: CaptionTokenizer | None = None) -> None:
        self.config, self.tokenizer = config, tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Self:
        """Read what `XFM.save_pretrained` wrote.

        Args:
            folder: as for `XFM.from_pretrained`.
            options: `tokenizer`, and those of the Hub, as for `XFM.from_pretrained`.

        Raises:
            CheckpointError: there is no such folder.
            ConfigError: it describes no model.
            DataError: its tokenizer cannot be read, or belongs to another model.
        """
        given = options.pop("tokenizer", None)
        place = local_folder(folder, **options)
        config = XFMConfig.load(place / CONFIG_FILE)
        return cls(config, find_tokenizer(place, config) if given is None else read_tokenizer(given, config))

    def __call__(
        self, images: Picture | Sequence[Picture] | None = None, text: str | Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Prepare images, texts, or both, side by side.

        Args:
            images: image files, as strings or paths, or PIL images; one or a list.
            text: one or a list.

        Returns:
            `pixels` `[B, 3, R, R]`; `input_ids` and `attention_mask` `[T, L]`, L as long as the longest text needs.

        Raises:
            InputError: there is neither, or an empty list.
            UnavailableError: there is text, and no tokenizer.
            DataError: an image is broken, a text empty after cleaning.
        """
        found: dict[str, Tensor] = {}
        if images is not None:
            every = [images] if isinstance(images, str) or is_picture(images) else [*images]  # type: ignore[list-item, misc]
            if not every:
                raise InputError("the list of images is empty; give at least one")
            found["pixels"] = image_pixels(every, self.config)
        if text is not None:
            texts = listed(text)
            if not texts:
                raise InputError("the list of texts is empty; give at least one")
            found["input_ids"], found["attention_mask"] = text_tokens(texts, self.tokenizer, self.config)
        if not found:
            raise InputError("neither images nor text were given; pass one or both")
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json` and, where there is a tokenizer, `tokenizer.json` into a folder of a model.

        Raises:
            StorageError: the folder cannot be written.
        """
        write_bytes({Path(folder) / name: content for name, content in self.files().items()})

    def files(self) -> dict[str, bytes]:
        """The content of the files that describe it, by their names."""
        found = {PREPROCESSOR_FILE: preprocessor_json(self.config)}
        return found if self.tokenizer is None else found | {TOKENIZER_FILE: self.tokenizer.to_json().encode()}


def preprocessor_json(config: XFMConfig) -> bytes:
    """The content of `preprocessor_config.json`, from which other libraries prepare the same pixels.

    XFM itself needs `config.json` alone.
    """
    side = config.image_size
    said = {
        "processor_class": XFMProcessor.__name__, "image_processor_type": "ViTImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"height": side, "width": side}, "resample": _BICUBIC, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
        "max_words": _MAX_WORDS, "max_tokens": min(_MAX_TOKENS, config.max_text_length),
    }  # fmt: skip
    return (json.dumps(said, indent=2) + "\n").encode()


def find_tokenizer(folder: Path, config: XFMConfig) -> CaptionTokenizer | None:
    """The tokenizer that lies with the weights in `folder`; None where there is none.

    Raises:
        DataError: it is damaged, or belongs to another model.
    """
    places = [folder]
    if folder.name in ("model", "average"):
        # A run keeps the vocabulary that it learnt beside the folders of its weights.
        places.append(folder.parent)
    path = next((each / TOKENIZER_FILE for each in places if (each / TOKENIZER_FILE).is_file()), None)
    return None if path is None else read_tokenizer(path, config)


def read_tokenizer(source: CaptionTokenizer | str | os.PathLike[str], config: XFMConfig) -> CaptionTokenizer:
    """A tokenizer, or that of a `tokenizer.json` or a folder with `vocab.json` and `merges.txt`, for a model.

    Raises:
        DataError: there is none, it is damaged, or belongs to another model.
    """
    tokenizer = source if isinstance(source, CaptionTokenizer) else CaptionTokenizer.from_files(source)
    tokenizer.check(config)
    return tokenizer


def text_tokens(
    texts: Sequence[str], tokenizer: CaptionTokenizer | None, config: XFMConfig, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and mask of texts, `[T, L]` each, L as long as the longest of them needs.

    Texts are cleaned as captions are: lower case, no punctuation, the first 30 words; then cut to 40 tokens.

    Raises:
        UnavailableError: there is no tokenizer.
        DataError: a text is empty after cleaning.
    """
    if tokenizer is None:
        raise UnavailableError(
            "this model has no tokenizer to read texts with; load it with tokenizer='FOLDER', which holds RoBERTa's "
            "vocab.json and merges.txt or a tokenizer.json, or set model.tokenizer"
        )
    longest = min(_MAX_TOKENS, config.max_text_length)
    cleaned = [pre_caption(text, _MAX_WORDS) for text in texts]
    input_ids, mask = tokenizer.encode(cleaned, longest, pad_to_longest=True)
    return input_ids.to(device), mask.to(device)


def image_pixels(images: Sequence[Picture], config: XFMConfig, device: torch.device | None = None) -> Tensor:
    """Normalised pixels `[B, 3, R, R]` of images, each resized whole to the model's square.

    Raises:
        DataError: a file is no image, or a broken one.
    """
    transform = evaluation_transform(config.image_size)
    return torch.stack([transform(open_image(image)) for image in images]).to(device)


def open_image(image: Picture) -> Image.Image:
    """An image as RGB, upright and on white.

    Raises:
        InputError: it is something else.
        DataError: the file is no image, or a broken one.
    """
    if not isinstance(image, Image.Image):
        if not isinstance(image, (str, os.PathLike)):
            raise InputError(
                f"an image is a path or a PIL image, not {type(image).__name__} (Image.fromarray makes one)"
            )
        return decode_image(image)
    name = str(getattr(image, "filename", "") or f"{image.width}x{image.height} {image.mode}")
    try:
        return to_rgb(image, name)
    except (OSError, ValueError, SyntaxError) as error:
        # Pillow reads the file of an image when its pixels are asked for.
        if isinstance(error, DataError):
            raise
        raise DataError(f"image {name} cannot be read ({error}); open it again") from None


def listed(items: object) -> list[Any]:
    """A list of what was given, which may be one text or image.

    Raises:
        InputError: it is neither one of them nor several.
    """
    if isinstance(items, str) or is_picture(items):
        return [items]
    if not isinstance(items, Iterable) or isinstance(items, (bytes, Mapping, Tensor)):
        raise InputError(
            f"{type(items).__name__} is no text or image, nor a list of such; give strings, or paths and PIL images "
            "(tensors of pixels and ids go to encode_image and encode_text)"
        )
    return list(items)


def are_texts(items: Sequence[object]) -> TypeGuard[Sequence[str]]:
    """True for strings, false for images.

    Raises:
        InputError: both are there, or something else, or a string that names a file.
    """
    if not items:
        raise InputError("the list is empty; give at least one text or image")
    kinds = {str if isinstance(item, str) else Path if is_picture(item) else type(item) for item in items}
    if kinds == {Path}:
        return False
    if kinds != {str}:
        if kinds <= {str, Path}:
            raise InputError("the list holds texts and images; encode them in two calls")
        other = next(kind.__name__ for kind in kinds if kind not in (str, Path))
        raise InputError(
            f"{other} is no type of texts or images; give strings, or paths and PIL images (tensors of pixels and ids "
            "go to encode_image and encode_text)"
        )
    for item in items:
        # What it names is meant, more often than its name; "a dog" rarely is a file.
        if isinstance(item, str) and Path(item).suffix and os.path.isfile(item):
            raise InputError(f"{item!r} is a file, and strings are texts here; write Path({item!r}) for the image")
    return True


def is_picture(item: object) -> TypeGuard[Picture]:
    """True for a path or a PIL image; a string is a text."""
    return isinstance(item, (os.PathLike, Image.Image))


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of a sequence.

    Raises:
        InputError: the size is not positive.
    """
    if size < 1:
        raise InputError(f"batch_size={size}; it must be at least 1")
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients inside the block; afterwards every part trains again that did.

    Raises:
        InputError: the model is on the meta device.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            f"{type(model).__name__} is on the meta device, where weights have no values; load them with "
            "from_pretrained, or give them memory with model.to_empty(device='cpu')"
        )
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def pixel_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (cx, cy, w, h) relative to an image `[P, 4]` and sizes (width, height) in pixels `[P, 2]` → (x, y, w, h)
    in pixels of the original image, whose aspect the square input did not keep: `[P, 4]`.
    """
    centre, sides = boxes[:, :2] * sizes, boxes[:, 2:] * sizes
    return torch.cat([centre - sides / 2, sides], dim=1)
