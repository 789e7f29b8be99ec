"""Attention of projected queries, keys and values: padded or packed, masked, biased, causal, or in windows.

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

# Attention of q, k, v `[..., H, D]` with a dropout probability: `[..., H·D]`. The optional
# attribute `memory` holds the keys and values of cross-attention, `windows` splits an image before
# the attention and merges it after.
Attend = Callable[[Tensor, Tensor, Tensor, float, Settings], Tensor]
NAME = "xfm_fast"  # of our attention in transformers
FEW = 64  # tokens up to which attention is bound by call overhead


class PositionTable(NamedTuple):
    """BEiT's relative position bias (arXiv 2106.08254): `[(2h-1)(2w-1)+3, H]`, and its window (h, w)."""

    table: Tensor
    window: tuple[int, int]

    def fits(self, tokens: int) -> bool:
        """Return whether sequences are one class token and this window of patches."""
        height, width = self.window
        distances = (2 * height - 1) * (2 * width - 1)
        return tokens == 1 + height * width and self.table.shape[0] == distances + 3


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
    """Compute attention of `[B, N, H, D]`: `[B, N, H·D]`.

    Args:
        bias: Position table, additive tensor that broadcasts to `[B, H, N, N]`, boolean one (False
            hides), or None.
        causal: Hide later tokens; only without a bias.
    """
    backend = settings.backend
    if isinstance(bias, PositionTable):
        if not dropout_p:
            table, window = settings.parameter(bias.table), bias.window
            out = ops.relpos_attention(q, k, v, table, window, scale=scale, backend=backend)
            return out.flatten(2)
        bias = reference.position_bias(bias.table, bias.window)
    exporting = torch.compiler.is_exporting() or traced()
    on_kernel = not exporting and (q.device.type == "cpu" or backend is not None)
    if bias is None and not causal and on_kernel:
        # The varlen op chooses the fastest of several implementations, also for equal lengths.
        batch, tokens = q.shape[:2]
        offsets = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        layout = (offsets, offsets, tokens, tokens)
        out = ops.varlen_attention(
            q, k, v, *layout, dropout_p=dropout_p, scale=scale, backend=backend
        )
        return out.view(batch, tokens, -1)
    if isinstance(bias, Tensor) and not dropout_p and _fits_cpu_kernel(q, k, v, bias):
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
    """Compute PyTorch's attention of `[B, N, H, D]`: `[B, N, H·D]`."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if torch.onnx.is_in_onnx_export() and not causal:
        # TensorRT fuses primitives, and has no kernel for every attention of opset 23.
        scores = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.transpose(-1, -2)
        scores = scores if mask is None else add_mask(scores, mask, q.dtype)
        out = scores.softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _fits_cpu_kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
    """Return whether the CPU kernel for a bias shared by the batch applies; it has no gradient."""
    if q.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if not readable(q, k, v, bias):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, bias)):
        return False
    return bias.is_floating_point() and (bias.ndim == 3 or (bias.ndim == 4 and bias.shape[0] == 1))


@dataclass
class Memory:
    """Encoder states that cross-attention attends to."""

    states: Tensor  # `[..., width]`, or keys and values `[..., 2, H, D]` if projected
    attend: Attend
    shared: bool = False  # one memory for the whole padded batch, whose queries form one sequence
    projected: bool = False  # `states` are keys and values


@dataclass
class Padded:
    """Attention of a padded batch `[B, L, H, D]` with a mask."""

    mask: Tensor | None = None  # as for `scaled_dot_product_attention`, or key padding `[B, L]`
    causal: bool = False  # only without a mask
    memory: Memory | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings
    ) -> Tensor:
        mask = self.mask
        if mask is not None and mask.ndim == 2:
            return attention_to_real_keys(q, k, v, mask, dropout_p, settings=settings).flatten(-2)
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
    """Attention of packed sequences `[T, H, D]`; fields as in `ops.varlen_attention`."""

    cu_q: Tensor
    cu_k: Tensor
    longest_q: int
    longest_k: int
    key_mask: Tensor | None = None
    memory: Memory | None = None

    @classmethod
    def within(cls, packing: Packing, memory: Memory | None = None) -> Packed:
        """Attend within each packed text."""
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


def is_small(packing: Packing, settings: Settings) -> bool:
    """Return whether call overhead bounds the attention of a batch: few tokens, no padding."""
    return packing.whole and packing.positions.shape[0] <= FEW and settings.backend is None


def attention_within_texts(packing: Packing, settings: Settings) -> Attend:
    """Return the self-attention of packed texts."""
    return Unpacked(packing) if is_small(packing, settings) else Packed.within(packing)


def attention_to_real_keys(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dropout_p: float,
    scale: float | None = None,
    settings: Settings | None = None,
) -> Tensor:
    """Attend from padded queries `[B, L, H, D]` to keys `[B, N, H, D]` with non-zero `mask` `[B, N]`."""
    if torch.compiler.is_exporting() or traced():
        out = sdpa(q, k, v, mask.bool()[:, None, None, :], dropout_p, scale=scale)
        return out.unflatten(-1, v.shape[-2:])
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
class Dense:
    """Attention of `[B, N, H, D]` with a mask, a bias, or both."""

    # additive, boolean (False hides) `[B, 1 or H, 1 or N, N]`, or key padding `[B, N]`
    mask: Tensor | None = None
    # added to the scaled scores, `[1 or B, H, N, N]`; or a position table, without a mask
    bias: Bias = None
    causal: bool = False  # only without mask and bias
    scale: float | None = None

    @classmethod
    def of(cls, mask: Any, bias: Any, implementation: str | None) -> Dense | None:
        """Return the attention of a call in transformers; None if only the original computes it."""
        if bias is not None and not (isinstance(bias, Tensor) and bias.ndim == 4):
            return None
        if not covers_mask(implementation, mask):
            return None
        if mask is not None and mask.ndim == 2 and bias is not None:
            mask = mask[:, None, None].bool()
        return cls(mask, bias)

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
                # All layers of a model get the same bias and mask.
                summed = partial(add_mask, bias, mask, dtype)
                bias = cached(f"with mask {dtype}", (bias, mask), summed)
        scale = self.scale or q.shape[-1] ** -0.5
        return attention(q, k, v, scale, bias, settings, dropout_p=dropout_p, causal=self.causal)


@dataclass
class Unpacked:
    """Attention of packed tokens `[T, H, D]`, computed on the padded batch.

    For biases and windows, which depend on positions; for causal attention, in which no token sees
    the padding behind it; and for batches without padding.
    """

    packing: Packing
    mask: Tensor | None = None  # `[P, L]`, True for real tokens; required by bias and window
    bias: Tensor | None = None  # `[1 or P, H, L, L]`, added to the scaled scores
    window: int | None = None  # maximum distance
    causal: bool = False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings
    ) -> Tensor:
        packing = self.packing
        if packing.whole:
            q, k, v = packing.unpad(q), packing.unpad(k), packing.unpad(v)
        else:
            q, k, v = packing.unpad(torch.stack((q, k, v), 1)).unbind(2)
        if self.mask is None:
            out = sdpa(q, k, v, None, dropout_p, self.causal)
        else:
            out = self._masked(q, k, v, self.mask, dropout_p, settings)
        return packing.pack(out)

    def _masked(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_p: float, settings: Settings
    ) -> Tensor:
        window, bias = self.window, self.bias
        if window is not None and q.shape[1] > 3 * window:
            return window_attention(q, k, v, window, mask, dropout_p)
        if window is None and bias is not None and not is_small(self.packing, settings):
            # Without a mask the op can choose a kernel that hides no keys.
            keys, bias = None if self.packing.whole else mask, bias.to(q.dtype)
            out = ops.bias_attention(q, k, v, bias, keys, dropout_p, backend=settings.backend)
            return out.flatten(-2)
        visible = None if self.packing.whole else mask[:, None, None]
        if window is not None:
            positions = torch.arange(mask.shape[1], device=q.device)
            distance = (positions[:, None] - positions).abs()
            # Every query sees itself, so that no row is empty.
            visible = (mask[:, None, None] & (distance <= window)) | (distance == 0)
        return Dense(visible, bias)(q, k, v, dropout_p, settings)


def covers_mask(implementation: str | None, mask: Any) -> bool:
    """Return whether we interpret a mask as this attention implementation of transformers does."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor):
        return False
    if mask.ndim == 2:
        return implementation == NAME
    # Eager attention adds a boolean mask as ones and zeros; only the original does that.
    adds_boolean = not mask.is_floating_point() and implementation in ("eager", None)
    return mask.ndim == 4 and not adds_boolean


def add_mask(bias: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Add a mask to a bias."""
    bias, lowest = bias.to(dtype), torch.finfo(dtype).min
    if mask.is_floating_point():
        return bias + mask.clamp(min=lowest).to(dtype)
    return bias.masked_fill(~mask, lowest)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, mask: Tensor, dropout_p: float = 0.0
) -> Tensor:
    """Compute attention `[B, N, H, D]` within a window, linear in N: `[B, N, H·D]`.

    Each block of `window` queries sees three blocks of keys. `mask` `[B, N]` is True for real keys.
    """
    batch, tokens, heads, width = q.shape
    blocks = -(-tokens // window)
    span, missing = 3 * window, blocks * window - tokens

    def blocks_of_keys(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, 0, window, missing + window)).unfold(1, span, window)
        return t.permute(0, 1, 4, 2, 3).reshape(batch * blocks, span, heads, width)

    q = F.pad(q, (0, 0, 0, 0, 0, missing)).view(batch * blocks, window, heads, width)
    real = F.pad(mask, (window, missing + window)).unfold(1, span, window)
    positions = torch.arange(span, device=q.device) - window
    distance = (positions[:window, None] + window - positions).abs()
    visible = real.reshape(batch * blocks, 1, span) & (distance <= window)
    # Every query sees itself, so that no row is empty.
    visible = (visible | (distance == 0))[:, None]
    out = sdpa(q, blocks_of_keys(k), blocks_of_keys(v), visible, dropout_p)
    return out.reshape(batch, blocks * window, heads * width)[:, :tokens]


@dataclass(frozen=True)
class Windows:
    """Gather indices of an image's windows, with shift and padding."""

    index: Tensor  # `[windows · area]` patch indices, row by row; `patches` is padding
    inverse: Tensor  # `[patches]` positions of the patches in the windows
    count: int  # windows per image
    area: int  # patches per window
    filled: bool  # windows exceed the image

    def split(self, x: Tensor) -> Tensor:
        """Gather windows, zeros at padding: `[B, patches, width]` → `[B · windows, area, width]`."""
        x = F.pad(x, (0, 0, 0, 1)) if self.filled else x
        return x.index_select(1, self.index).view(-1, self.area, x.shape[-1])

    def merge(self, x: Tensor) -> Tensor:
        """Invert `split`."""
        return x.view(-1, self.count * self.area, x.shape[-1]).index_select(1, self.inverse)


def windows_of(
    size: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    x: Tensor,
    *,
    fill_first: bool,
) -> Windows:
    """Return the windows of an image, cached.

    Args:
        size: Height and width in patches.
        window: Height and width of a window.
        shift: Shift of the windows.
        x: Tensor on the device of the indices.
        fill_first: Pad before the shift (transformers), not after it (timm).
    """
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
    patches = torch.arange(height * width, device=device).view(height, width)
    filling = (0, -width % window[1], 0, -height % window[0])
    if fill_first:
        patches = F.pad(patches, filling, value=height * width)
    if any(shift):
        patches = patches.roll((-shift[0], -shift[1]), (0, 1))
    if not fill_first:
        patches = F.pad(patches, filling, value=height * width)
    tiles = patches.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0]))
    index = tiles.transpose(1, 2).flatten()
    inverse = index.argsort()[: height * width]
    area = window[0] * window[1]
    return Windows(index, inverse, index.shape[0] // area, area, index.shape[0] > height * width)


_cached_windows = lru_cache(maxsize=64)(_build_windows)


@dataclass(frozen=True)
class WindowAttention:
    """Swin's attention (arXiv 2103.14030): windows `[B · windows, area, H, D]` with a position bias."""

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
        # Batch entry b uses the bias of window b mod windows.
        bias, backend = (
            self.bias().to(torch.promote_types(q.dtype, torch.float32)),
            settings.backend,
        )
        out = ops.bias_attention(q, k, v, bias, None, dropout_p, scale=scale, backend=backend)
        return out.flatten(2)


def cached_bias(
    name: str,
    module: nn.Module,
    sources: Iterable[Tensor],
    make_bias: Callable[[], Tensor],
    mask: Callable[[], Tensor | None],
) -> Tensor:
    """Compute a position bias `[1, H, N, N]` plus the mask of shifted windows; cached without gradients.

    Args:
        name: Cache key of the geometry.
        module: Module that computes the bias; with hooks, it is called every time.
        sources: Parameters of the bias.
        make_bias: Computes the bias.
        mask: Computes the mask `[windows, N, N]`.
    """

    def masked_bias() -> Tensor:
        bias, window_mask = make_bias(), mask()
        return bias if window_mask is None else bias + window_mask.to(bias.dtype)[:, None]

    sources = tuple(sources)
    takes_gradients = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    if takes_gradients or not sources or any(map(observed, module.modules())):
        return masked_bias()
    return cached(f"window bias {name}", sources, masked_bias)


def continuous_bias(
    name: str, attn: Any, mlp: nn.Module, mask: Callable[[], Tensor | None]
) -> Callable[[], Tensor]:
    """Return a function for Swin V2's position bias `[1, H, N, N]`: an MLP of distance, from 0 to 16."""

    def make() -> Tensor:
        index = attn.relative_position_index
        table = mlp(attn.relative_coords_table).flatten(0, -2)
        bias = table[index.view(-1)].view(*index.shape[:2], -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias).contiguous()[None]

    return partial(cached_bias, name, mlp, mlp.parameters(), make, mask)


# Vision models of transformers 4 select an attention class by implementation name; ours is that of
# PyTorch.
_TABLES = {
    "transformers.models.beit.modeling_beit": "BEIT_SELF_ATTENTION_CLASSES",
    "transformers.models.data2vec.modeling_data2vec_vision": "DATA2VEC_VISION_SELF_ATTENTION_CLASSES",
}


def register_attention(name: str = NAME) -> str:
    """Register our attention with transformers. Idempotent.

    Padding masks stay `[B, N]` and padded keys are skipped; a kernel with a gradient adds position
    biases and float masks to the scores; all other calls, such as causal masks and grouped heads,
    run as in `"sdpa"`. A query without visible keys gets zeros.

    Args:
        name: Name to register.

    Returns:
        The name, for `attn_implementation`.

    Raises:
        UnavailableError: transformers is missing or older than 4.53.
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
    """Keep a plain padding mask as `[B, N]`; otherwise make that of sdpa or eager attention."""
    from transformers.masking_utils import bidirectional_mask_function, eager_mask, sdpa_mask

    mask = kwargs.get("attention_mask")
    bidirectional = kwargs.get("mask_function") is bidirectional_mask_function
    skips = bidirectional and kwargs.get("allow_is_bidirectional_skip", True)
    if mask is None and skips and torch.compiler.is_exporting():
        return None  # transformers makes one of ones within a trace
    config = kwargs.get("config")
    biases = ("use_relative_position_bias", "use_shared_relative_position_bias")
    if any(getattr(config, name, False) for name in biases):
        return eager_mask(*args, **kwargs)
    if mask is None or mask.ndim != 2 or not bidirectional or kwargs.get("kv_offset"):
        return sdpa_mask(*args, **kwargs)
    return mask if mask.shape[1] == kwargs.get("kv_length") else sdpa_mask(*args, **kwargs)


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
    """Compute attention `[B, H, L, D]` → `[B, L, H, D]`, with the signature of transformers."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    padding = attention_mask is not None and attention_mask.ndim == 2
    equal_heads = query.shape[1] == key.shape[1] and value.shape == key.shape
    if equal_heads and kwargs.get("softcap") is None:
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        position = kwargs.get("position_bias")
        if attention_mask is not None and padding and position is None:
            return attention_to_real_keys(q, k, v, attention_mask, dropout, scaling), None
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
