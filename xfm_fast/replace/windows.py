"""Shifted window attention: Swin (arXiv 2103.14030) and Swin V2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import ops
from xfm_fast.kernels.derived import derived
from xfm_fast.replace.layer import implementation_of
from xfm_fast.replace.swap import Settings, observed


@dataclass(frozen=True)
class Windows:
    """Gather indices of an image's windows, with shift and padding."""

    index: Tensor  # `[windows · area]` patch indices, row by row; `patches` is padding
    inverse: Tensor  # `[patches]` positions of the patches in the windows
    count: int  # windows per image
    area: int  # patches per window
    filled: bool  # windows exceed the image

    def split(self, x: Tensor) -> Tensor:
        """`[B, patches, width]` → `[B · windows, area, width]`; padding is zero."""
        x = F.pad(x, (0, 0, 0, 1)) if self.filled else x
        return x.index_select(1, self.index).view(-1, self.area, x.shape[-1])

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        return x.view(-1, self.count * self.area, x.shape[-1]).index_select(1, self.inverse)


def windows_of(
    size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], x: Tensor, *, fill_first: bool
) -> Windows:
    """Cached windows of an image; `fill_first` pads before the shift (transformers) or after it (timm)."""
    if torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor):
        # Tensors made during a trace belong to its graph.
        return _build_windows(size, window, shift, fill_first, x.device)
    with torch.inference_mode(False):
        return _cached_windows(size, window, shift, fill_first, x.device)


def _build_windows(
    size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], fill_first: bool, device: torch.device
) -> Windows:
    height, width = size
    places = torch.arange(height * width, device=device).view(height, width)
    filling = (0, -width % window[1], 0, -height % window[0])
    if fill_first:
        places = F.pad(places, filling, value=height * width)
    if any(shift):
        places = places.roll((-shift[0], -shift[1]), (0, 1))
    if not fill_first:
        places = F.pad(places, filling, value=height * width)
    index = places.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2).flatten()
    inverse = index.argsort()[: height * width]
    area = window[0] * window[1]
    return Windows(index, inverse, index.shape[0] // area, area, index.shape[0] > height * width)


_cached_windows = lru_cache(maxsize=64)(_build_windows)


@dataclass(frozen=True)
class WindowAttention:
    """Attention of `[B · windows, area, H, D]` with a position bias."""

    windows: Windows
    bias: Callable[[], Tensor]  # `[1 or windows, H, area, area]`
    logit_scale: Tensor | None = None  # of scaled cosine attention (Swin V2, arXiv 2111.09883)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        scale = q.shape[-1] ** -0.5
        if self.logit_scale is not None:
            factor = self.logit_scale.clamp(max=math.log(1 / 0.01)).exp().view(-1, 1)
            q, k, scale = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), 1.0
            q, k = q.to(v.dtype), k.to(v.dtype)
        added = self.bias().to(torch.promote_types(q.dtype, torch.float32))
        # Batch entry b uses the bias of window b mod windows.
        out = ops.bias_attention(q, k, v, added, None, dropout_p, scale=scale, backend=settings.backend)
        return out.flatten(2)


def cached_bias(
    name: str,
    module: nn.Module,
    sources: Iterable[Tensor],
    make_bias: Callable[[], Tensor],
    mask: Callable[[], Tensor | None],
) -> Tensor:
    """Position bias `[1, H, N, N]` plus the mask of shifted windows `[windows, N, N]`; cached without gradients.

    `name` identifies the geometry, `sources` are the parameters of the bias; a hooked `module` is called every time.
    """

    def made() -> Tensor:
        bias, hidden = make_bias(), mask()
        return bias if hidden is None else bias + hidden.to(bias.dtype)[:, None]

    sources = tuple(sources)
    wanted = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    if wanted or not sources or any(observed(part) for part in module.modules()):
        return made()
    return derived(f"window bias {name}", sources, made)


def swin_attention(layer: Any, call: Mapping[str, Any]) -> WindowAttention | None:
    """Attention of `SwinLayer` and `Swinv2Layer` of transformers."""
    if implementation_of(layer) not in ("eager", "sdpa", None):
        return None
    x, size = call["hidden_states"], tuple(map(int, call["input_dimensions"]))
    if hasattr(layer, "set_shift_and_window_size") and not call.get("always_partition"):
        layer.set_shift_and_window_size(size)
    window, shift = (int(layer.window_size),) * 2, (int(layer.shift_size),) * 2
    windows = windows_of(size, window, shift, x, fill_first=True)
    whole = tuple(-(-side // window[0]) * window[0] for side in size)
    name, mask = f"{whole} {window} {shift}", partial(layer.get_attn_mask, *whole, dtype=x.dtype, device=x.device)
    tables = getattr(layer.attention, "relative_position_bias", None)
    if tables is not None:
        return WindowAttention(
            windows, partial(cached_bias, name, tables, (tables.relative_position_bias_table,), tables, mask)
        )
    own = layer.attention.self

    def doubled() -> Tensor | None:
        # transformers adds this mask twice.
        hidden = mask()
        return None if hidden is None else 2 * hidden

    return WindowAttention(windows, _continuous(name, own, own.continuous_position_bias_mlp, doubled), own.logit_scale)


def timm_swin_attention(block: Any, call: Mapping[str, Any]) -> WindowAttention:
    """Attention of `SwinTransformerBlock` and `SwinTransformerV2Block` of timm."""
    attn, x = block.attn, call["x"]
    size, window, shift = tuple(x.shape[1:3]), tuple(block.window_size), tuple(block.shift_size)
    whole = tuple(-(-side // part) * part for side, part in zip(size, window, strict=True))
    name, windows = f"{whole} {window} {shift}", windows_of(size, window, shift, x, fill_first=False)

    def mask() -> Tensor | None:
        moving = getattr(block, "dynamic_mask", False)
        return block.get_attn_mask(x.new_empty(1, *whole, 1)) if moving else block.attn_mask

    if hasattr(attn, "cpb_mlp"):
        return WindowAttention(windows, _continuous(name, attn, attn.cpb_mlp, mask), attn.logit_scale)
    sources = (attn.relative_position_bias_table,)
    return WindowAttention(windows, partial(cached_bias, name, nn.Identity(), sources, attn._get_rel_pos_bias, mask))


def _continuous(name: str, attn: Any, mlp: nn.Module, mask: Callable[[], Tensor | None]) -> Callable[[], Tensor]:
    """The position bias of Swin V2, `[1, H, N, N]`: an MLP of the distance, scaled to 0…16."""

    def make() -> Tensor:
        index = attn.relative_position_index
        table = mlp(attn.relative_coords_table).flatten(0, -2)
        bias = table[index.view(-1)].view(*index.shape[:2], -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias).contiguous()[None]

    return partial(cached_bias, name, mlp, mlp.parameters(), make, mask)
