"""The mapping between official parameter names and ours: tied tensors, dead weights, and the
conversion both ways.

Our names are the official pretraining names. Everything else in an official checkpoint is a second
name of a tied tensor, an integer buffer that the configuration determines, or a weight that no
output depends on.

A relative-position table of the vision encoder has `(2w - 1)^2 + 3` rows for a window of `w` x `w`
patches: one row per offset, row-major, then class query, class key, and class to class. It is
interpolated to another window.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from xfm_fast.checkpoint.files import StateDict
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, InputError, needs
from xfm_fast.kernels import reference

Naming = Literal["pretraining", "fine-tuning"]
Head = Literal["mlm", "imlm", "contrastive", "matching", "boxes", "codes"]

logger = logging.getLogger(__name__)

TABLE = ".attn.relative_position_bias_table"
INDEX = ".attn.relative_position_index"
_BUFFERS = (".position_ids", ".relative_position_index")
_LANGUAGE_MODELS = ("text_encoder", "fusion_encoder", "text_decoder")

# Second name of a tied tensor -> its first name.
TIED: dict[str, str] = {}
# The same for dead weights, which may differ in a checkpoint.
_TIED_DEAD: dict[str, str] = {}
for _model in _LANGUAGE_MODELS:
    _embeddings = f"{_model}.roberta.embeddings.word_embeddings.weight"
    TIED[f"{_model}.lm_head.decoder.bias"] = f"{_model}.lm_head.bias"
    TIED[f"{_model}.lm_head.decoder.weight"] = _embeddings
    _TIED_DEAD[f"{_model}.lm_cap_head.decoder.bias"] = f"{_model}.lm_cap_head.bias"

_CAPTION_HEAD = (
    "bias",
    "dense.weight",
    "dense.bias",
    "layer_norm.weight",
    "layer_norm.bias",
    "decoder.weight",
)
_FUSION_EMBEDDINGS = tuple(
    f"fusion_encoder.roberta.embeddings.{name}"
    for name in (
        "position_embeddings.weight",
        "token_type_embeddings.weight",
        "LayerNorm.weight",
        "LayerNorm.bias",
    )
)
_DEAD = (
    "text_encoder.lm_cap_head.",
    "fusion_encoder.lm_cap_head.",
    "fusion_encoder.roberta.embeddings.position_embeddings.",
    "fusion_encoder.roberta.embeddings.token_type_embeddings.",
    "fusion_encoder.roberta.embeddings.LayerNorm.",
    "fusion_proj.",
    "vqkd.",
)

HEAD_PREFIXES: dict[Head, tuple[str, ...]] = {
    "mlm": ("text_encoder.lm_head.",),
    "imlm": ("fusion_encoder.lm_head.", "fusion_encoder.roberta.embeddings.word_embeddings."),
    "contrastive": ("vision_proj.", "text_proj.", "temp"),
    "matching": ("itm_head.",),
    "boxes": ("bbox_head.",),
    "codes": ("lm_head.",),
}


@dataclass
class LoadReport:
    """The changes of `to_ours` to an official state dict."""

    naming: Naming = "pretraining"
    """The naming of the checkpoint's text encoder; pass it to `to_official` to convert back."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Name in the checkpoint -> our name."""
    interpolated: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Table -> (window in the checkpoint, window of the configuration), in patches per side."""
    duplicates: dict[str, str] = field(default_factory=dict)
    """Dropped name of a tied tensor -> its remaining name."""
    buffers: list[str] = field(default_factory=list)
    """Dropped integer buffers, which the configuration determines."""
    unused: dict[str, Tensor] = field(default_factory=dict)
    """Dead weights: no output of the model depends on them. `to_official` takes them back."""

    @property
    def unused_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.unused.values())

    def __str__(self) -> str:
        lines = [f"{self.naming} checkpoint"]
        if self.unused:
            lines.append(
                f"{len(self.unused)} dead weights left out ({self.unused_parameters:,} parameters)"
            )
        if self.interpolated:
            source, target = next(iter(self.interpolated.values()))
            lines.append(
                f"{len(self.interpolated)} relative-position tables interpolated "
                f"from {source}x{source} to {target}x{target}"
            )
        if self.renamed:
            lines.append(f"{len(self.renamed)} names changed")
        return "; ".join(lines)


def is_dead(name: str) -> bool:
    """Return whether no output of the model depends on the weight of this (pretraining) name."""
    return name.startswith(_DEAD)


def head_of(name: str) -> Head | None:
    """Return the removable head of a parameter, or None."""
    for head, prefixes in HEAD_PREFIXES.items():
        if name.startswith(prefixes):
            return head
    return None


def heads_in(state: Iterable[str]) -> tuple[Head, ...]:
    """List the heads with at least one parameter in a state dict, in the order of `HEAD_PREFIXES`."""
    present = {head_of(name) for name in state}
    return tuple(head for head in HEAD_PREFIXES if head in present)


def select_heads(state: StateDict, heads: Iterable[str]) -> dict[str, Tensor]:
    """Drop the parameters of all heads but `heads`."""
    keep = {None, *heads}
    return {name: value for name, value in state.items() if head_of(name) in keep}


def our_name(name: str) -> str:
    """Return the pretraining name of a parameter in a pretraining or fine-tuning checkpoint."""
    name = re.sub(r"^visual_encoder\.", "vision_encoder.", name)
    return re.sub(r"^text_encoder\.(embeddings|encoder)\.", r"text_encoder.roberta.\1.", name)


def to_ours(official: StateDict, cfg: XFMConfig) -> tuple[dict[str, Tensor], LoadReport]:
    """Convert the state dict of an official model to our names.

    Fine-tuning names become pretraining names; duplicates of tied tensors, integer buffers and dead
    weights are dropped; relative-position tables are interpolated to the window of `cfg`. Other
    names, such as a task head, pass through. Only interpolated tables are copied. Raises
    `CheckpointError` if two names of one tensor disagree or a table fits no window.
    """
    state: dict[str, Tensor] = {}
    report = LoadReport()
    for name, value in official.items():
        ours = our_name(name)
        if ours.endswith(_BUFFERS):
            report.buffers.append(name)
            continue
        if ours != name:
            if ours in official:
                raise CheckpointError(
                    f"the checkpoint has both {name!r} and {ours!r}, two names of one tensor; remove one of them"
                )
            report.renamed[name] = ours
            if name.startswith("text_encoder."):
                report.naming = "fine-tuning"
        if is_dead(ours):
            report.unused[ours] = value
        elif ours.endswith(TABLE):
            state[ours] = fit_table(ours, value, cfg.grid, report.interpolated)
        else:
            state[ours] = value
    report.duplicates = merge_tied(state)
    report.duplicates |= merge_tied(report.unused, _TIED_DEAD, strict=False)
    return state, report


def fit_table(
    name: str, table: Tensor, grid: int, interpolated: dict[str, tuple[int, int]] | None = None
) -> Tensor:
    """Interpolate a checkpoint's table: errors name it, and `interpolated` records a change of window."""
    try:
        fitted = interpolate_table(table, (grid, grid))
    except InputError as error:
        raise CheckpointError(f"{name}: {error}") from None
    if fitted is not table and interpolated is not None:
        interpolated[name] = (window_of(table), grid)
    return fitted


def config_of(state: StateDict, sizes: XFMConfig, image_size: int | None = None) -> XFMConfig:
    """Resize a configuration to `image_size`, or to the resolution of a checkpoint's first position table."""
    table = next((value for name, value in state.items() if name.endswith(TABLE)), None)
    if image_size is None and table is not None:
        try:
            image_size = window_of(table) * sizes.patch_size
        except InputError as error:
            raise CheckpointError(str(error)) from None
    return sizes.resized(image_size)


def merge_tied(
    state: dict[str, Tensor], ties: Mapping[str, str] = TIED, *, strict: bool = True
) -> dict[str, str]:
    """Keep one name of each tied tensor, in place; returns dropped name → remaining name.

    Two names with different values raise `CheckpointError`; both stay if not `strict`.
    """
    merged = {}
    for second, first in ties.items():
        if second not in state:
            continue
        if first in state and not _same(state[second], state[first]):
            if not strict:
                continue
            raise CheckpointError(
                f"{second!r} ({_describe(state[second])}) and {first!r} ({_describe(state[first])}) differ; X-FM ties "
                "them: use a checkpoint with tied embeddings"
            )
        state.setdefault(first, state[second])
        del state[second]
        merged[second] = first
    return merged


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_meta or b.is_meta or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()):
        return True
    # NaN differs from itself; the loader reports NaN, not this check.
    return torch.equal(a, b) or torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def to_official(
    state: StateDict,
    cfg: XFMConfig,
    *,
    unused: StateDict | None = None,
    naming: Naming = "pretraining",
) -> dict[str, Tensor]:
    """Convert one of our state dicts to that of the official model; the inverse of `to_ours`.

    `unused` are the dead weights from `LoadReport.unused`; without them the result lacks what
    `underivable` lists, which is logged, and the official code loads it with `strict=False`.
    `naming` is the official class: the text encoder is `text_encoder.roberta.*` in pretraining and
    `text_encoder.*` in fine-tuning. Tied names and equal buffers share one tensor, which
    `torch.save` preserves. Raises `CheckpointError` if `unused` holds a weight that is not dead.
    """
    out = dict(state)
    for name, value in (unused or {}).items():
        if not is_dead(name):
            raise CheckpointError(
                f"unused contains {name!r}, not a dead weight of X-FM; pass LoadReport.unused"
            )
        out[name] = value
    for second, first in (TIED | _TIED_DEAD).items():
        head_bias = re.sub(r"\.decoder\.(weight|bias)$", ".bias", second)
        if head_bias in out and first in out:
            out.setdefault(second, out[first])
    positions = torch.arange(cfg.max_positions)[None]
    for module in _LANGUAGE_MODELS:
        if any(name.startswith(f"{module}.") for name in out):
            out[f"{module}.roberta.embeddings.position_ids"] = positions
    index: dict[int, Tensor] = {}
    for name, value in list(out.items()):
        if name.endswith(TABLE):
            window = window_of(value)
            if window not in index:
                index[window] = relative_position_index(window)
            out[name.removesuffix(TABLE) + INDEX] = index[window]
    missing = underivable(out, cfg)
    if missing:
        logger.warning(
            "%d official weights cannot be derived from the model and are left out (%s%s); pass unused= to keep them",
            len(missing),
            ", ".join(missing[:3]),
            ", ..." if len(missing) > 3 else "",
        )
    if naming == "fine-tuning":
        out = {
            re.sub(r"^text_encoder\.roberta\.", "text_encoder.", name): value
            for name, value in out.items()
        }
    return out


def underivable(state: Iterable[str], cfg: XFMConfig) -> list[str]:
    """List the dead weights of the official model that `state` (pretraining names) lacks."""
    present = set(state)
    expected: list[str] = []
    if "text_encoder.lm_head.bias" in present:
        expected += [
            f"text_encoder.lm_cap_head.{name}" for name in (*_CAPTION_HEAD, "decoder.bias")
        ]
    if any(name.startswith("fusion_encoder.") for name in present):
        expected += _FUSION_EMBEDDINGS
        expected += [
            f"fusion_encoder.lm_cap_head.{name}" for name in (*_CAPTION_HEAD, "decoder.bias")
        ]
        if cfg.vision_width != cfg.text_width:
            expected += ["fusion_proj.weight", "fusion_proj.bias"]
    return [name for name in expected if name not in present]


CLASS_ROWS = 3
# A cubic spline needs four points per axis, and a window of w has 2w - 1.
_SMALLEST_SOURCE = 3


def table_rows(window: int) -> int:
    """Return the rows of the table for a `window` x `window` grid of patches."""
    return (2 * window - 1) ** 2 + CLASS_ROWS


def window_of(table: Tensor) -> int:
    """Return the window of a table `[(2w - 1)^2 + 3, heads]`; raises `InputError` if its shape fits none."""
    if table.dim() != 2:
        raise InputError(
            f"a relative-position table has shape {list(table.shape)}; give [(2w-1)^2+3, heads]"
        )
    side = math.isqrt(max(table.shape[0] - CLASS_ROWS, 0))
    window = (side + 1) // 2
    if window < 1 or table_rows(window) != table.shape[0]:
        raise InputError(
            f"a relative-position table has {table.shape[0]} rows; a square window w has (2w-1)^2+3, such as 4 or 12"
        )
    return window


def relative_position_index(window: int) -> Tensor:
    """Return the table's row for query i and key j, `int64 [w*w + 1, w*w + 1]`; token 0 is the class token."""
    return reference.relative_position_index((window, window))


def interpolate_table(table: Tensor, target_window: tuple[int, int]) -> Tensor:
    """Resample a relative-position table to a square window `(rows, columns)`, as the official
    loaders do.

    The source offsets lie on a grid whose spacing grows geometrically from the centre, so that the
    outermost source offset meets the outermost target offset; a bicubic spline through them is
    evaluated at the integers. The three class rows are copied. Returns `table` itself if the window
    is the same, otherwise a new float32 table (float64 for float64) on the same device, computed in
    float64. Raises `InputError` for a table or window that is not square, or cannot be reached.
    """
    rows, columns = target_window
    if rows != columns:
        raise InputError(
            f"target_window={tuple(target_window)} is not square; pad or crop the image to a square"
        )
    if rows < 1:
        raise InputError(
            f"target_window={tuple(target_window)} has no patches; use at least (1, 1)"
        )
    if not table.is_floating_point():
        raise InputError(
            f"a relative-position table has dtype {table.dtype}; give a floating-point table"
        )
    source = window_of(table)
    if source == rows:
        return table
    if source < _SMALLEST_SOURCE:
        raise InputError(
            f"a {source}x{source} window is too small to interpolate; start from {_SMALLEST_SOURCE}x{_SMALLEST_SOURCE}"
        )

    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    side_from, side_to = 2 * source - 1, 2 * rows - 1
    matrix = torch.from_numpy(_spline_matrix(side_from, side_to))
    offsets = table[:-CLASS_ROWS].detach().to("cpu", torch.float64).view(side_from, side_from, -1)
    # A bicubic tensor-product spline is the same linear map along either axis, for all heads at
    # once.
    resampled = torch.einsum("yu,xv,uvh->yxh", matrix, matrix, offsets).reshape(side_to**2, -1)
    return torch.cat([resampled.to(table.device, dtype), table[-CLASS_ROWS:].detach().to(dtype)])


def source_positions(side_from: int, side_to: int) -> np.ndarray:
    """Return the `side_from` source offsets on the axis of the target offsets `-(side_to // 2) ...`, float64."""
    steps, reach = side_from // 2, side_to // 2
    low, high = 1.01, 1.5
    ratio = low
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**steps) / (1 - ratio) > reach:
            high = ratio
        else:
            low = ratio
    positive = np.cumsum([ratio**step for step in range(steps)])
    return np.concatenate([-positive[::-1], [0.0], positive])


@lru_cache(maxsize=16)
def _spline_matrix(side_from: int, side_to: int) -> np.ndarray:
    """Return the matrix `[side_to, side_from]` that interpolates from the source offsets to the integers, float64."""
    # scipy costs more to import than the rest of this package, and most runs never interpolate.
    with needs("vision"):
        from scipy.interpolate import make_interp_spline

    x = source_positions(side_from, side_to)
    # The bisection stops short of the outermost target by up to 1e-4; the official spline then
    # repeats its border.
    targets = np.clip(np.arange(side_to) - float(side_to // 2), x[0], x[-1])
    return np.ascontiguousarray(make_interp_spline(x, np.eye(side_from), k=3)(targets))
