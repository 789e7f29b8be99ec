"""How each kernel is launched at the model's shapes: how many programs, and how often each turns its main loop.

The shapes are those of `roofline.model_shapes` and of tuning: 8 images of 384 pixels (577 tokens), 256 captions of 13
tokens, and these captions' 3,328 tokens looking at one image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..roofline import HEADS, IMAGES, LABELLED_ROWS
from ..triton.launch import LaunchConfig
from .cards import card

CAPTIONS, CAPTION_TOKENS = 256, 13
IMAGE_TOKENS = 577
_TEXT_TOKENS = CAPTIONS * CAPTION_TOKENS
_ROWS = IMAGES * IMAGE_TOKENS
_PROGRAMS_PER_PROCESSOR = 4  # of kernels that leave partial sums, as `triton.rows` cuts them
_BIAS_PROGRAMS, _BIAS_PARTS = 512, 8  # likewise `triton.bias_attention`


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        shape: for the table, such as `8 × 577`.
        programs: that have work; `grid`: those that are launched, 0 if these are all.
        turns: of the main loop in each; on average where programs differ.
        bytes: that main memory moves at least; 0 where everything that the kernel reads and writes passes once, as the
            machine code shows it.
        live: share of what the machine code reads and writes that masks leave on.
    """

    shape: str
    programs: int
    turns: float
    bytes: float = 0.0
    live: float = 1.0
    grid: int = 0


def model_launch(kernel: str, variant: Mapping[str, Any], config: LaunchConfig, arch: int) -> Launch | None:
    """The launch of a kernel at the model's shape; none if this module does not know the kernel.

    Args:
        kernel: a `KernelSpec.name`.
        variant: one of its forms.
        config: tiles on which the number of programs depends.
        arch: whose card has some number of multiprocessors, on which the number of programs of some kernels depends.
    """
    family = next((name for name in sorted(_FAMILIES, key=len, reverse=True) if kernel.startswith(name)), None)
    return None if family is None else _FAMILIES[family](kernel, variant, config.tiles, card(arch).multiprocessors)


def _biased(kernel: str, variant: Mapping[str, Any], tiles: Mapping[str, int], processors: int) -> Launch:
    """Self-attention of images with a bias that all of them share."""
    tokens = variant.get("tokens", IMAGE_TOKENS)
    rows, columns = math.ceil(tokens / tiles["BLOCK_M"]), math.ceil(tokens / tiles["BLOCK_N"])
    operand = 2 * IMAGES * tokens * HEADS * variant["head_dim"]
    bias = 2 * HEADS * tokens**2 * (variant.get("bias") is not False)
    shape = f"{IMAGES} × {tokens}"
    if kernel.endswith("_dbias"):
        programs = rows * columns * HEADS
        parts = max(1, min(IMAGES, _BIAS_PARTS, _BIAS_PROGRAMS // programs))
        return Launch(shape, programs * parts, math.ceil(IMAGES / parts), 4 * operand + bias * (1 + 2 * parts))
    if "_dkdv" in kernel:
        # The gradients of the scores, which the relpos kernel leaves; the others find them in the second-level cache.
        scores = 2 * IMAGES * HEADS * tokens**2 * kernel.startswith("relpos")
        return Launch(shape, columns * IMAGES * HEADS, _turns(tokens, tiles["BLOCK_M"]), 6 * operand + bias + scores)
    if kernel == "relpos_dq":
        return Launch(shape, rows * IMAGES * HEADS, math.ceil(tokens / tiles["BLOCK_N"]), 2 * operand)
    operands = 4 if kernel.endswith(("_forward", "_fragments")) else 5
    return Launch(shape, rows * IMAGES * HEADS, _turns(tokens, tiles["BLOCK_N"]), operands * operand + bias)


def _batch_sum(kernel: str, variant: Mapping[str, Any], tiles: Mapping[str, int], processors: int) -> Launch:
    """The gradients of the scores of all images, which the second-level cache holds, with the padding of their rows."""
    size = HEADS * IMAGE_TOKENS * math.ceil(IMAGE_TOKENS / 16) * 16
    programs = math.ceil(size / tiles["BLOCK"])
    return Launch(
        f"{IMAGES} × {IMAGE_TOKENS}",
        programs,
        math.ceil(IMAGES / tiles["ENTRIES"]),
        size * (4 if variant["first"] else 8),
    )


def _bias(kernel: str, variant: Mapping[str, Any], tiles: Mapping[str, int], processors: int) -> Launch:
    columns = math.ceil(IMAGE_TOKENS / 128)  # of 128, to which the bias is padded
    programs = math.ceil(IMAGE_TOKENS / tiles["ROWS"]) * HEADS * columns * 128 // tiles["BLOCK"]
    return Launch(f"{IMAGE_TOKENS} × {IMAGE_TOKENS}", programs, 0, 2 * HEADS * IMAGE_TOKENS * columns * 128)


def _varlen(kernel: str, variant: Mapping[str, Any], tiles: Mapping[str, int], processors: int) -> Launch:
    many = kernel.endswith("_many")
    short = "_short" in kernel or "_heads" in kernel
    sequences = CAPTIONS if short else 1
    queries, keys = (CAPTION_TOKENS, CAPTION_TOKENS) if short else (_TEXT_TOKENS, IMAGE_TOKENS)
    keys = IMAGE_TOKENS if many else keys
    width = 2 * HEADS * variant["head_dim"]
    read = 2 * sequences * (queries + keys) * width
    shape = f"{CAPTIONS} × {CAPTION_TOKENS}{f' × {keys}' if many else ''}" if short else f"{queries} × {keys}"
    live = min(1.0, CAPTION_TOKENS / max(tiles["BLOCK_M"], tiles["BLOCK_N"])) if short and not many else 1.0
    if "_dkdv" in kernel:
        own, tile, turns, traffic = keys, tiles["BLOCK_N"], _turns(queries, tiles["BLOCK_M"]), 2 * read
    else:
        own, tile = queries, tiles["BLOCK_M"]
        # Several heads have a loop masked to the last tile; a known number of keys, a short tile behind whole ones.
        masked = math.ceil(keys / tiles["BLOCK_N"]) if "_heads" in kernel else _turns(keys, tiles["BLOCK_N"])
        turns = keys // tiles["BLOCK_N"] if "keys" in variant else masked
        traffic = read * (1.5 if "_dq" in kernel else 1)
    # The bounds of the lengths are close, so that every number of a tile has work.
    programs = sequences * math.ceil(own / tile) * math.ceil(HEADS / tiles.get("HEADS", 1))
    return Launch(shape, programs, turns, traffic, live)


def _turns(length: int, tile: int) -> int:
    """Turns of a loop over tiles. Small ones are masked to the last; behind large ones stands a tail of its own."""
    return math.ceil(length / tile) if tile <= 32 else length // tile


def _statistics(kernel: str, variant: Mapping[str, Any], tiles: Mapping[str, int], processors: int) -> Launch:
    programs = math.ceil(IMAGE_TOKENS / tiles["BLOCK"]) * IMAGES * HEADS
    return Launch(f"{IMAGES} × {IMAGE_TOKENS}", programs, 0)


def _table_gradient(kernel: str, variant: Mapping[str, Any], tiles: Mapping[str, int], processors: int) -> Launch:
    side = variant["width"]
    tokens = side**2 + 1
    programs = HEADS * ((2 * side - 1) * math.ceil((2 * side - 1) / tiles["BLOCK_DX"]) + 1)
    # A vertical distance of dy leaves side - |dy| rows of queries.
    turns = side**2 / (2 * side - 1) * math.ceil(side / tiles["BLOCK_X"])
    return Launch(f"{side} × {side} window", programs, turns, 4 * HEADS * tokens**2)


def _rows(kernel: str, variant: Mapping[str, Any], tiles: Mapping[str, int], processors: int) -> Launch:
    """Kernels over rows: one step a program forward; backward, programs that stay and leave partial sums."""
    rows = _TEXT_TOKENS if kernel.startswith("embed") else _ROWS
    steps = math.ceil(rows / tiles.get("ROWS", 1))
    block = tiles["BLOCK"] + tiles.get("REST", 0)
    across = math.ceil(variant["width"] / block)
    shape = f"{rows} × {variant['width']}"
    live = variant["width"] / (across * block)
    alone = "_forward" in kernel or "quantise" in kernel
    programs = steps if alone else min(steps, _PROGRAMS_PER_PROCESSOR * processors)
    element, partials = _row_traffic(kernel, variant)
    moved = variant["width"] * (element * rows + (4 * partials * programs if programs < steps else 0))
    return Launch(shape, programs * across, 0 if alone else steps / programs, moved, live)


def _row_traffic(kernel: str, variant: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes that each element of a row is read and written with, and partial sums that each program leaves in fp32."""
    residual, gamma = variant.get("residual", False), variant.get("gamma", False)
    fp8 = variant.get("fp8", False)
    if kernel.startswith("add_layer_norm_forward"):  # x, normed; the other addend, the sum; normed again in fp8
        return 2 * (4 if residual else 2) + fp8, 0
    if kernel == "add_layer_norm_backward":  # dnormed, sum, dx; dsum; x again for gamma; dresidual where it differs
        return 2 * (3 + residual + gamma + (gamma or variant.get("dropout", False))), 2 + gamma
    if kernel == "bias_gelu_forward":
        return 2 * 2, 0
    if kernel == "bias_gelu_quantise":  # the activation in 16 bits and in fp8
        return 2 * 2 + 1, 0
    if kernel == "quantise_rows":
        return 2 + 1, 0
    if kernel == "bias_gelu_backward":
        return 2 * 3, 1
    if kernel == "embed_layer_norm_forward":  # the word's row; positions stay in the cache
        return 2 * 2, 0
    return 2 * 2 + 4, 3  # the gradient of the sum is left in fp32


def _ordered_sum(kernel: str, variant: Mapping[str, Any], tiles: Mapping[str, int], processors: int) -> Launch:
    partials = _PROGRAMS_PER_PROCESSOR * processors
    programs = math.ceil(variant["width"] / tiles["BLOCK_COLUMNS"]) * variant["outputs"]
    shape = f"{variant['outputs']} × {partials} × {variant['width']}"
    return Launch(shape, programs, math.ceil(partials / tiles["BLOCK_PARTIALS"]))


def _vocabulary(kernel: str, variant: Mapping[str, Any], tiles: Mapping[str, int], processors: int) -> Launch:
    width = variant["width"]
    moved = 2 * LABELLED_ROWS * width * (2 if kernel == "softmax_gradient" else 1)
    return Launch(f"{LABELLED_ROWS} × {width}", LABELLED_ROWS, 0, moved, width / tiles["BLOCK"])


def _segments(kernel: str, variant: Mapping[str, Any], tiles: Mapping[str, int], processors: int) -> Launch:
    across = math.ceil(variant["width"] / tiles["BLOCK_COLUMNS"])
    # Of the rows that a program could add, one is there: nearly every id occurs once.
    moved = _TEXT_TOKENS * variant["width"] * (4 + 2)
    return Launch(f"{_TEXT_TOKENS} × {variant['width']}", _TEXT_TOKENS * across, 1, moved, 1 / tiles["BLOCK_ROWS"])


# Beginning of a kernel's name → its launch; the longest that fits counts.
_FAMILIES: dict[str, Callable[[str, Mapping[str, Any], Mapping[str, int], int], Launch]] = {
    **{
        f"{family}_{part}": _biased
        for family in ("relpos", "bias_attention")
        for part in ("forward", "dkdv", "dq", "dbias")
    },
    "relpos_batch_sum": _batch_sum,
    "relpos_bias": _bias,
    "relpos_quotients": lambda *_: Launch("table of 24 × 24", 9 * HEADS, 0, 4 * HEADS * 47 * 47),
    "relpos_table_gradient": _table_gradient,
    "varlen_": _varlen,
    "attention_backward_statistics": _statistics,
    "bias_attention_statistics": _statistics,
    "add_layer_norm_": _rows,
    "bias_gelu_": _rows,
    "quantise_rows": _rows,
    "embed_layer_norm_": _rows,
    "embedding_segment_sum": _segments,
    "ordered_sum": _ordered_sum,
    "running_softmax": _vocabulary,
    "softmax_gradient": _vocabulary,
}
