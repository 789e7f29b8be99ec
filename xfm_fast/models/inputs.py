"""Checks of the model's inputs.

Shapes and dtypes are always checked, values on CPU tensors only: on accelerators that would
synchronise, and under compilation break the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.kernels import host
from xfm_fast.packing import on_host

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def _first_false(flags: Tensor) -> int:
    return host.integer(flags.long().argmin())


def _tensor(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        remedy = (
            "torch.from_numpy(...)" if type(value).__module__ == "numpy" else "torch.as_tensor(...)"
        )
        raise InputError(f"{name} is a {type(value).__name__}; give a tensor, as from {remedy}")


def _mask(mask: Tensor, name: str) -> Tensor:
    """Convert a mask to booleans; refuses additive masks, whose hidden tokens would count as real."""
    readable = mask.is_floating_point() and on_host(mask) and mask.numel()
    if readable and not host.all_true(mask >= 0):
        raise InputError(
            f"{name} contains NaN or negative numbers, like an additive mask; give 1 to attend and 0 to hide"
        )
    return mask.bool()


def check_pixels(pixels: Tensor, config: XFMConfig) -> None:
    """Check images `[B, 3, R, R]`: of the model's resolution, in finite floating point."""
    _tensor(pixels, "pixels")
    size = config.image_size
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise InputError(f"pixels are {[*pixels.shape]}; images must be [B, 3, {size}, {size}]")
    if not pixels.is_floating_point():
        raise InputError(
            f"pixels are {pixels.dtype}; scale them to [0, 1] and normalise them to floating point"
        )
    height, width = pixels.shape[2:]
    for side in (height, width):
        if side % config.patch_size:
            raise InputError(
                f"pixels are {height}x{width}; {side} is not a multiple of the patch size {config.patch_size}"
            )
    if (height, width) != (size, size):
        raise InputError(
            f"pixels are {height}x{width}, the model's {size}x{size}; resize them, or call model.set_image_size(...)"
        )
    # A finite sum has no infinite or NaN terms: one pass in place of five.
    if on_host(pixels) and not math.isfinite(host.number(pixels.detach().sum())):
        finite = torch.isfinite(pixels).flatten(1).all(1)
        if not host.all_true(finite):
            raise InputError(
                f"pixels of image {_first_false(finite)} contain NaN or infinity; check its preprocessing"
            )


def check_patch_mask(patch_mask: Tensor, pixels: Tensor, config: XFMConfig) -> Tensor:
    """Return the `[B, N]` mask of hidden patches as booleans."""
    _tensor(patch_mask, "patch_mask")
    expected = (pixels.shape[0], config.num_patches)
    if patch_mask.shape != expected:
        raise InputError(
            f"patch_mask is {[*patch_mask.shape]}; it must be {[*expected]}, True where a patch is hidden"
        )
    return _mask(patch_mask, "patch_mask")


def check_tokens(input_ids: Tensor, attention_mask: Tensor | None, config: XFMConfig) -> Tensor:
    """Return the boolean attention mask; by default everything but padding is real."""
    _tensor(input_ids, "input_ids")
    if input_ids.ndim != 2:
        raise InputError(f"input_ids are {[*input_ids.shape]}; texts must be [B, L]")
    if input_ids.dtype not in _INTEGERS:
        raise InputError(f"input_ids are {input_ids.dtype}; token ids are integers")
    if input_ids.shape[1] > config.max_text_length:
        raise InputError(
            f"input_ids have {input_ids.shape[1]} tokens; truncate them to {config.max_text_length} positions"
        )
    check_ids(input_ids, config)
    mask = input_ids.ne(config.pad_token_id) if attention_mask is None else attention_mask
    return check_attention_mask(mask, input_ids.shape)


def check_ids(ids: Tensor, config: XFMConfig, name: str = "input_ids") -> None:
    """Check that ids lie within the vocabulary."""
    _tensor(ids, name)
    wrong = out_of_range(ids, config.vocab_size)
    if wrong is not None:
        raise InputError(
            f"{name} contain {wrong}, outside the vocabulary of {config.vocab_size}; use the model's tokenizer"
        )


def out_of_range(indices: Tensor, size: int) -> int | None:
    """Return an index below 0 or from `size` on; None if there is none, or the host cannot read them."""
    if on_host(indices) and indices.numel():
        lowest, highest = host.integer(indices.min()), host.integer(indices.max())
        if lowest < 0:
            return lowest
        if highest >= size:
            return highest
    return None


def check_padding(attention_mask: Tensor) -> None:
    """Check that a mask `[..., L]` has no left padding: embeddings are read from the first token."""
    _tensor(attention_mask, "attention_mask")
    mask = torch.atleast_2d(_mask(attention_mask, "attention_mask")).flatten(0, -2)
    if on_host(mask) and mask.numel() and not host.all_true(mask[:, 0]):
        fine = mask[:, 0] | ~mask.any(1)
        if not host.all_true(fine):
            raise InputError(
                f"attention_mask of text {_first_false(fine)} hides its first token; pad on the right"
            )


def check_attention_mask(attention_mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask as booleans, after checking that the first token of every text is real."""
    _tensor(attention_mask, "attention_mask")
    if attention_mask.shape != (*shape,):
        raise InputError(f"attention_mask is {[*attention_mask.shape]}; the texts are {[*shape]}")
    mask = _mask(attention_mask, "attention_mask")
    if on_host(mask) and mask.shape[0] and not host.all_true(mask[:, :1].any(1)):
        check_padding(mask)
        filled = mask.any(1)
        if not host.all_true(filled):
            raise InputError(
                f"attention_mask of text {_first_false(filled)} is all zeros; remove the empty text"
            )
    return mask


def check_embeddings(embeds: Tensor, width: int, name: str) -> None:
    """Check embeddings `[B, tokens, width]`."""
    _tensor(embeds, name)
    if embeds.ndim != 3 or embeds.shape[-1] != width:
        raise InputError(f"{name} are {[*embeds.shape]}; they must be [B, tokens, {width}]")


def check_image_index(image_index: Tensor, images: int, rows: int, what: str) -> Tensor:
    """Return an index `[rows]` below `images` as int64."""
    _tensor(image_index, "image_index")
    if image_index.ndim != 1 or image_index.shape[0] != rows or image_index.dtype not in _INTEGERS:
        raise InputError(
            f"image_index is {image_index.dtype} {[*image_index.shape]}; give one integer for each of {rows} {what}"
        )
    wrong = out_of_range(image_index, images)
    if wrong is not None:
        raise InputError(
            f"image_index contains {wrong}; give numbers from 0 below the {images} images"
        )
    return image_index.long()


def check_token_mask(token_mask: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """Return a mask of tokens as booleans."""
    _tensor(token_mask, name)
    if token_mask.shape != shape:
        raise InputError(
            f"{name} is {[*token_mask.shape]}; it must be {[*shape]}, non-zero for visible tokens"
        )
    return _mask(token_mask, name)


def check_region_mask(region_mask: Tensor, config: XFMConfig) -> Tensor:
    """Return the `[R, 1 + N]` mask as booleans, after checking that every region covers a patch."""
    _tensor(region_mask, "region_mask")
    shape = len(region_mask), config.num_image_tokens
    mask = check_token_mask(region_mask, shape, "region_mask")
    if on_host(mask) and len(mask):
        filled = mask[:, 1:].any(1)
        if not host.all_true(filled):
            raise InputError(
                f"region_mask of region {_first_false(filled)} selects no patch; select at least one"
            )
    return mask
