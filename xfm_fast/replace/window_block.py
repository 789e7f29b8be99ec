"""Layers with shifted window attention: Swin (arXiv 2103.14030) and Swin V2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import ops
from xfm_fast.kernels.derived import derived
from xfm_fast.replace.families import FamilyLayer
from xfm_fast.replace.structure import Attend, Parts
from xfm_fast.replace.swap import Settings, has_other_arguments, observed


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


def within(parts: Parts, windows: Windows, bias: Callable[[], Tensor]) -> tuple[Parts, Attend]:
    """Parts and attention of a window layer; `bias` returns `[1 or windows, H, area, area]`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        added = bias().to(torch.promote_types(q.dtype, torch.float32))
        backend = settings.backend
        # Batch entry b uses the bias of window b mod windows.
        return ops.bias_attention(q, k, v, added, None, dropout_p, scale=parts.scale, backend=backend).flatten(2)

    return parts._replace(windows=windows), attend


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


def cosine(logit_scale: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys `[..., H, D]` for scaled cosine attention (Swin V2, arXiv 2111.09883)."""
    scale = logit_scale.clamp(max=math.log(1 / 0.01)).exp().view(-1, 1)
    return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)


def continuous_bias(mlp: nn.Module, coordinates: Tensor, index: Tensor, heads: int) -> Tensor:
    """Position bias of Swin V2, `[1, H, N, N]`: an MLP of the distance, scaled to 0…16."""
    table = mlp(coordinates).view(-1, heads)
    bias = table[index.view(-1)].view(*index.shape[:2], heads).permute(2, 0, 1)
    return 16 * torch.sigmoid(bias).contiguous()[None]


class WindowLayer(FamilyLayer):
    """`SwinLayer` and `Swinv2Layer` of transformers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        x, size = call["hidden_states"], call["input_dimensions"]
        # Attributes that `nn.Module` does not declare.
        module: Any = self
        known = ("hidden_states", "input_dimensions", "always_partition")
        implementation = getattr(getattr(module.attention, "config", None), "_attn_implementation", None)
        if has_other_arguments(call, known) or x.numel() == 0 or not self._plain(implementation) or not self.intact():
            return super(FamilyLayer, self).forward(*args, **kwargs)
        if hasattr(module, "set_shift_and_window_size") and not call.get("always_partition"):
            module.set_shift_and_window_size(size)
        window, shift = (int(module.window_size),) * 2, (int(module.shift_size),) * 2
        windows = windows_of(tuple(map(int, size)), window, shift, x, fill_first=True)
        whole = tuple(-(-int(side) // window[0]) * window[0] for side in size)
        mask = partial(module.get_attn_mask, *whole, dtype=x.dtype, device=x.device)
        with self.context(x.device) as settings:
            parts, bias = self._scores(f"{whole} {window} {shift}", mask)
            out = self.compute(*within(parts, windows, bias), x, settings)
        return (out,) if self.returns_tuple else (out, None)

    @staticmethod
    def _plain(implementation: str | None) -> bool:
        return implementation in ("eager", "sdpa", None)

    def _scores(self, name: str, mask: Callable[[], Tensor | None]) -> tuple[Parts, Callable[[], Tensor]]:
        """The layer's parts, and a function that returns its bias."""
        parts, module = self._parts(None), self
        tables: Any = getattr(module.attention, "relative_position_bias", None)
        if tables is not None:
            return parts, partial(cached_bias, name, tables, (tables.relative_position_bias_table,), tables, mask)
        attention: Any = module.get_submodule("attention.self")
        mlp = attention.continuous_position_bias_mlp
        make = partial(
            continuous_bias, mlp, attention.relative_coords_table, attention.relative_position_index, parts.heads
        )

        def doubled() -> Tensor | None:
            # transformers adds this mask twice.
            hidden = mask()
            return None if hidden is None else 2 * hidden

        cosines = parts._replace(scale=1.0, adapt=partial(cosine, attention.logit_scale))
        return cosines, partial(cached_bias, name, mlp, mlp.parameters(), make, doubled)

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        if not hasattr(module, "get_attn_mask"):
            return "this version of the library makes the mask of shifted windows elsewhere"
        if getattr(module, "chunk_size_feed_forward", 0):
            return "its feed-forward runs in chunks"
        return super().refusal(module, settings)
