"""Attention of a layer's queries, keys and values: padded, packed, masked, biased, causal, in bands or windows.

`register_attention` offers it to any model of transformers as `attn_implementation="xfm_fast"`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.errors import UnavailableError
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.backend import readable, traced
from xfm_fast.kernels.caching import cached
from xfm_fast.kernels.cpu.attention import biased_attention
from xfm_fast.packing import Packing
from xfm_fast.replace.swap import Settings, observed

# Attention of q, k, v `[..., H, D]` with a dropout probability: `[..., H·D]`. An attribute `memory` is what
# cross-attention attends to, `windows` splits an image before the attention and merges it after.
Attend = Callable[[Tensor, Tensor, Tensor, float, Settings], Tensor]
FEW = 64  # tokens up to which attention is bound by call overhead


class PositionTable(NamedTuple):
    """A relative position bias table (BEiT, arXiv 2106.08254), `[(2wh-1)(2ww-1)+3, H]`, and its window (wh, ww)."""

    table: Tensor
    window: tuple[int, int]

    def fits(self, tokens: int) -> bool:
        """True if a sequence is one class token and this window of patches."""
        height, width = self.window
        return (
            tokens == 1 + height * width
            and self.table.shape[0] == (2 * height - 1) * (2 * width - 1) + 3
        )


Bias = PositionTable | Tensor | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Bias,
    settings: Settings,
    *,
    dropout_p: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Attention of `[B, N, H, D]` → `[B, N, H·D]`.

    The bias is a position table, an additive tensor that broadcasts to `[B, H, N, N]`, a boolean one (False hides),
    or None. `causal` hides later tokens, without a bias only.
    """
    backend = settings.backend
    if isinstance(bias, PositionTable):
        if not dropout_p:
            table = settings.parameter(bias.table)
            return ops.relpos_attention(
                q, k, v, table, bias.window, scale=scale, backend=backend
            ).flatten(2)
        bias = reference.position_bias(bias.table, bias.window)
    if bias is None and not causal and (q.device.type == "cpu" or backend is not None):
        # The varlen op chooses the fastest of several implementations, also for equal lengths.
        batch, tokens = q.shape[:2]
        offsets = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        layout = (offsets, offsets, tokens, tokens)
        out = ops.varlen_attention(
            q, k, v, *layout, dropout_p=dropout_p, scale=scale, backend=backend
        )
        return out.view(batch, tokens, -1)
    if isinstance(bias, Tensor) and not dropout_p and _shared_on_cpu(q, k, v, bias):
        _, tokens, heads, _ = q.shape
        shared = bias.to(q.dtype).expand(1, heads, tokens, tokens)
        return biased_attention(q, k, v, scale, shared).flatten(2)
    if isinstance(bias, Tensor) and bias.is_floating_point():
        bias = bias.to(q.dtype)
    return sdpa(q, k, v, bias, dropout_p, causal, scale)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """PyTorch's attention of `[B, N, H, D]` → `[B, N, H·D]`."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return (
        F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, scale=scale)
        .transpose(1, 2)
        .flatten(2)
    )


def _shared_on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
    """True if the CPU kernel for a bias shared by the batch applies; it has no gradient."""
    if q.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not readable(q, k, v, bias):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, bias)):
        return False
    return bias.is_floating_point() and (bias.ndim == 3 or (bias.ndim == 4 and bias.shape[0] == 1))


@dataclass
class Memory:
    """What cross-attention attends to."""

    states: Tensor  # `[..., width]`, or keys and values `[..., 2, H, D]` if projected
    attend: Attend
    shared: bool = False  # one memory for the whole padded batch, whose queries form one sequence
    projected: bool = False  # states are the keys and values of the layer that runs


@dataclass
class Padded:
    """Attention of a padded batch, `[B, L, H, D]`."""

    mask: Tensor | None = (
        None  # as for `scaled_dot_product_attention`, or a key padding mask `[B, L]`
    )
    causal: bool = False  # only without a mask
    memory: Memory | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings
    ) -> Tensor:
        mask = self.mask
        if mask is not None and mask.ndim == 2:
            return attend_to_real_keys(q, k, v, mask, dropout_p, settings=settings).flatten(-2)
        if mask is not None and mask.is_floating_point() and mask.dtype != q.dtype:
            # The lowest value of a wide dtype would overflow to -inf in a narrow one.
            mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
        if mask is None or not mask.is_floating_point() or not torch.is_grad_enabled():
            return sdpa(q, k, v, mask, dropout_p, self.causal)
        # For a query without visible keys the fused kernels have different gradients.
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask).softmax(-1)
        return (F.dropout(weights, dropout_p) @ v).transpose(1, 2).flatten(-2)


@dataclass
class Packed:
    """Attention of packed sequences `[T, H, D]` over own keys or other ones; fields as in `ops.varlen_attention`."""

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    key_mask: Tensor | None = None
    memory: Memory | None = None

    @classmethod
    def within(cls, packing: Packing, memory: Memory | None = None) -> Packed:
        """Self-attention of packed texts."""
        cu, longest = packing.cu_seqlens, packing.longest
        return cls(cu, cu, longest, longest, packing.key_mask, memory)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings
    ) -> Tensor:
        layout = (self.cu_q, self.cu_k, self.longest_q, self.longest_k)
        out = ops.varlen_attention(
            q, k, v, *layout, dropout_p=dropout_p, key_mask=self.key_mask, backend=settings.backend
        )
        return out.flatten(-2)


@dataclass
class EqualLengths:
    """Attention of a few packed sequences of equal length `[T, H, D]`, run as a padded batch."""

    texts: int

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings
    ) -> Tensor:
        shape = (self.texts, -1)
        return sdpa(
            q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape), None, dropout_p
        ).flatten(0, 1)


def is_small(packing: Packing, settings: Settings) -> bool:
    """True if there is no padding and so few tokens that attention is bound by call overhead."""
    return packing.whole and packing.positions.shape[0] <= FEW and settings.backend is None


def to_own_tokens(packing: Packing, settings: Settings) -> Attend:
    """Self-attention of packed texts."""
    if is_small(packing, settings):
        return EqualLengths(packing.shape[0])
    return Packed.within(packing)


def attend_to_real_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dropout_p: float,
    scale: float | None = None,
    settings: Settings | None = None,
) -> Tensor:
    """Attention of padded queries `[B, L, H, D]` over the keys `[B, N, H, D]` whose `mask` `[B, N]` is non-zero."""
    if torch.compiler.is_exporting() or traced():
        return sdpa(q, k, v, mask.bool()[:, None, None, :], dropout_p, scale=scale).unflatten(
            -1, v.shape[-2:]
        )
    # All layers of a model get the same mask.
    keys = cached("packed keys", (mask,), lambda: Packing.from_mask(mask))
    texts, length = q.shape[:2]
    out = ops.varlen_attention(
        q.flatten(0, 1),
        keys.pack(k),
        keys.pack(v),
        torch.arange(0, texts * length + 1, length, dtype=torch.int32, device=q.device),
        keys.cu_seqlens,
        length,
        keys.longest,
        dropout_p=dropout_p,
        scale=scale,
        backend=None if settings is None else settings.backend,
    )
    return out.unflatten(0, (texts, length))


@dataclass
class Causal:
    """Causal attention of packed texts `[T, H, D]` on the padded batch: padding comes last, so no token sees it."""

    packing: Packing

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings
    ) -> Tensor:
        q, k, v = self.packing.unpad(torch.stack((q, k, v), 1)).unbind(2)
        return self.packing.pack(sdpa(q, k, v, None, dropout_p, causal=True))


@dataclass
class Dense:
    """Attention of `[B, N, H, D]`."""

    mask: Tensor | None = (
        None  # additive, boolean (False hides) `[B, 1 or H, 1 or N, N]`, or key padding `[B, N]`
    )
    bias: Bias = (
        None  # added to the scaled scores, `[1 or B, H, N, N]`; or a position table, without a mask
    )
    causal: bool = False  # only without mask and bias
    scale: float | None = None

    @classmethod
    def of(cls, mask: Any, bias: Any, implementation: str | None) -> Dense | None:
        """The attention of a call in transformers; None for masks that the original must interpret."""
        if bias is not None and not (isinstance(bias, Tensor) and bias.ndim == 4):
            return None
        if mask is None:
            return cls(None, bias)
        if not isinstance(mask, Tensor):
            return None
        if mask.ndim == 2:
            if implementation != "xfm_fast":
                return None
            return cls(mask[:, None, None].bool(), bias) if bias is not None else cls(mask)
        # Eager attention adds a boolean mask as ones and zeros.
        boolean = not mask.is_floating_point()
        return (
            None
            if mask.ndim != 4 or (boolean and implementation in ("eager", None))
            else cls(mask, bias)
        )

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings
    ) -> Tensor:
        if self.mask is not None and self.bias is None:
            return Padded(self.mask)(q, k, v, dropout_p, settings)
        mask, bias, dtype = self.mask, self.bias, q.dtype
        if mask is not None and isinstance(bias, Tensor):
            if bias.requires_grad and torch.is_grad_enabled():
                bias = add_mask(bias, mask, dtype)
            else:
                # All layers of a model get the same two.
                bias = cached(
                    f"with mask {dtype}", (bias, mask), partial(add_mask, bias, mask, dtype)
                )
        scale = self.scale or q.shape[-1] ** -0.5
        return attention(q, k, v, scale, bias, settings, dropout_p=dropout_p, causal=self.causal)


@dataclass
class Spread:
    """Attention of packed tokens `[T, H, D]` on the padded batch, for biases and windows that depend on positions."""

    packing: Packing
    mask: Tensor  # `[P, L]`, True for real tokens
    bias: Tensor | None = None  # `[1 or P, H, L, L]`, added to the scaled scores
    window: int | None = None  # maximum distance

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings
    ) -> Tensor:
        if self.packing.whole:
            q, k, v = map(self.packing.unpad, (q, k, v))
        else:
            q, k, v = self.packing.unpad(torch.stack((q, k, v), 1)).unbind(2)
        if self.window is not None and q.shape[1] > 3 * self.window:
            out = window_attention(q, k, v, self.window, self.mask, dropout_p)
        elif self.window is None and self.bias is not None and not is_small(self.packing, settings):
            # Without a mask the op can choose a kernel that hides no keys.
            keys, backend = None if self.packing.whole else self.mask, settings.backend
            out = ops.bias_attention(
                q, k, v, self.bias.to(q.dtype), keys, dropout_p, backend=backend
            )
        else:
            seen = None if self.packing.whole else self.mask[:, None, None]
            if self.window is not None:
                places = torch.arange(self.mask.shape[1], device=q.device)
                distance = (places[:, None] - places).abs()
                # Every query sees itself, so that no row is empty.
                seen = (self.mask[:, None, None] & (distance <= self.window)) | (distance == 0)
            out = Dense(seen, self.bias)(q, k, v, dropout_p, settings).unflatten(-1, q.shape[-2:])
        return self.packing.pack(out).flatten(-2)


def add_mask(bias: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias with the mask added."""
    bias, lowest = bias.to(dtype), torch.finfo(dtype).min
    if mask.is_floating_point():
        return bias + mask.clamp(min=lowest).to(dtype)
    return bias.masked_fill(~mask, lowest)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """Attention `[B, N, H, D]` within a window, linear in N: blocks of `window` queries see three blocks of keys."""
    batch, tokens, heads, width = q.shape
    blocks = -(-tokens // window)
    rest = blocks * window - tokens
    q = F.pad(q, (0, 0, 0, 0, 0, rest)).view(batch * blocks, window, heads, width)
    k, v = (
        F.pad(t, (0, 0, 0, 0, window, rest + window)).unfold(1, 3 * window, window) for t in (k, v)
    )
    k, v = (
        t.permute(0, 1, 4, 2, 3).reshape(batch * blocks, 3 * window, heads, width) for t in (k, v)
    )
    keys = (
        F.pad(mask, (window, rest + window))
        .unfold(1, 3 * window, window)
        .reshape(batch * blocks, 1, 3 * window)
    )
    places = torch.arange(3 * window, device=q.device) - window
    distance = (places[:window, None] + window - places).abs()
    seen = (keys & (distance <= window)) | (distance == 0)
    return sdpa(q, k, v, seen[:, None], dropout_p).reshape(batch, blocks * window, heads, width)[
        :, :tokens
    ]


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
    size: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    x: Tensor,
    *,
    fill_first: bool,
) -> Windows:
    """Cached windows of an image; `fill_first` pads before the shift (transformers) or after it (timm)."""
    if torch.compiler.is_compiling() or not readable(x):
        # Tensors made during a trace belong to its graph.
        return _build_windows(size, window, shift, fill_first, x.device)
    with torch.inference_mode(False):
        return _cached_windows(size, window, shift, fill_first, x.device)


def _build_windows(
    size: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    fill_first: bool,
    device: torch.device,
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
    index = (
        places.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2).flatten()
    )
    inverse = index.argsort()[: height * width]
    area = window[0] * window[1]
    return Windows(index, inverse, index.shape[0] // area, area, index.shape[0] > height * width)


_cached_windows = lru_cache(maxsize=64)(_build_windows)


@dataclass(frozen=True)
class WindowAttention:
    """Attention of shifted windows `[B · windows, area, H, D]` with a position bias (Swin, arXiv 2103.14030)."""

    windows: Windows
    bias: Callable[[], Tensor]  # `[1 or windows, H, area, area]`
    logit_scale: Tensor | None = None  # of scaled cosine attention (Swin V2, arXiv 2111.09883)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5
        if self.logit_scale is not None:
            factor = self.logit_scale.clamp(max=math.log(1 / 0.01)).exp().view(-1, 1)
            q, k, scale = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1), 1.0
            q, k = q.to(v.dtype), k.to(v.dtype)
        added = self.bias().to(torch.promote_types(q.dtype, torch.float32))
        # Batch entry b uses the bias of window b mod windows.
        out = ops.bias_attention(
            q, k, v, added, None, dropout_p, scale=scale, backend=settings.backend
        )
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
    return cached(f"window bias {name}", sources, made)


def continuous_bias(
    name: str, attn: Any, mlp: nn.Module, mask: Callable[[], Tensor | None]
) -> Callable[[], Tensor]:
    """The position bias of Swin V2, `[1, H, N, N]`: an MLP of the distance, scaled to 0…16."""

    def make() -> Tensor:
        index = attn.relative_position_index
        table = mlp(attn.relative_coords_table).flatten(0, -2)
        bias = table[index.view(-1)].view(*index.shape[:2], -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias).contiguous()[None]

    return partial(cached_bias, name, mlp, mlp.parameters(), make, mask)


NAME = "xfm_fast"
# Vision models of transformers 4 that select an attention class by implementation name: it stays that of PyTorch.
_TABLES = {
    "transformers.models.beit.modeling_beit": "BEIT_SELF_ATTENTION_CLASSES",
    "transformers.models.data2vec.modeling_data2vec_vision": "DATA2VEC_VISION_SELF_ATTENTION_CLASSES",
}


def register_attention(name: str = NAME) -> str:
    """Register our attention with transformers and return its name for `attn_implementation`. Idempotent.

    Padding masks stay `[B, N]` and padded keys are skipped; position biases and float masks are added to the scores
    by a kernel with a gradient; causal masks, grouped heads and the rest run as in `"sdpa"`. A query without visible
    keys gets zeros. Raises UnavailableError without transformers ≥ 4.53.
    """
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise UnavailableError(
            f"transformers with an attention interface is needed ({error}); pip install 'transformers>=4.53'"
        ) from None
    ALL_ATTENTION_FUNCTIONS.register(name, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, padding_mask)
    for family, table in _TABLES.items():
        try:
            classes = getattr(import_module(family), table, None)
        except ImportError:
            continue
        if classes is not None:
            classes[name] = classes["sdpa"]
    return name


def padding_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Mask callback of transformers: `[B, N]` for plain padding, otherwise the mask of `"sdpa"` or eager attention."""
    from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

    config = kwargs.get("config")
    if any(getattr(config, f"use_{kind}relative_position_bias", False) for kind in ("", "shared_")):
        return eager_mask(*args, **kwargs)
    mask = kwargs.get("attention_mask")
    plain = kwargs.get("mask_function") is bidirectional_mask_function and not kwargs.get(
        "kv_offset"
    )
    if plain and mask is not None and mask.ndim == 2 and mask.shape[1] == kwargs.get("kv_length"):
        return mask
    return sdpa_mask(*args, **kwargs)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention `[B, H, L, D]` → `[B, L, H, D]`, with the signature of transformers."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    padding = attention_mask is not None and attention_mask.ndim == 2
    special = (
        query.shape[1] != key.shape[1]
        or value.shape != key.shape
        or kwargs.get("softcap") is not None
    )
    if not special:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        position = kwargs.get("position_bias")
        if attention_mask is not None and padding and position is None:
            return attend_to_real_keys(q, k, v, attention_mask, dropout, scaling), None
        bias, causal = position, kwargs.get("is_causal")
        if attention_mask is None:
            causal = getattr(module, "is_causal", True) if causal is None else causal
            bias = None if causal else position
        elif attention_mask.ndim == 4 and attention_mask.is_floating_point():
            bias = attention_mask if position is None else position + attention_mask
        elif not padding:
            bias = None
        if bias is not None and bias.ndim == 4 and query.shape[0] % bias.shape[0] == 0:
            keys = attention_mask.bool() if attention_mask is not None and padding else None
            bias = bias.to(query.dtype) if torch.float64 in (bias.dtype, query.dtype) else bias
            return ops.bias_attention(q, k, v, bias, keys, dropout, scale=scaling), None
    if attention_mask is not None and padding:
        attention_mask = attention_mask.bool()[:, None, None, :]
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, **kwargs
    )
