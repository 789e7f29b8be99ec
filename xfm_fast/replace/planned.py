"""Plans of third-party layers: the layout of their attention, and the conditions of their settings."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xfm_fast.kernels import host
from xfm_fast.kernels.caching import cached
from xfm_fast.kernels.cpu import llvm
from xfm_fast.kernels.ops import relpos_bias
from xfm_fast.plans.orders import Rotary
from xfm_fast.plans.plan import DTYPES, Layers, Plan, infers, plan_of
from xfm_fast.plans.recording import Added, Embedded, Layout, Pooling
from xfm_fast.replace.attention import Attend, Dense, Packed, Padded, PositionTable, Unpacked
from xfm_fast.replace.structure import apply_rotary
from xfm_fast.replace.swap import Settings

if TYPE_CHECKING:
    from xfm_fast.kernels.cpu.llvm.rows import Positions

# Length of texts above which the kernel reads a mask for longer than the calls take that a plan saves.
_MOST_MASKED = 128


def run_planned(
    owner: nn.Module,
    layers: Layers,
    x: Tensor | Embedded,
    attend: Attend,
    settings: Settings,
    rotary: Rotary | None = None,
    plan: Plan | None = None,
    pooling: Pooling | None = None,
) -> Tensor | None:
    """Run layers whose `intact()` was checked on `[..., width]` or embeddings; None for the general path.

    `plan` is that of the owner, if it and the call (`infers`) were just checked. With `pooling`, for
    attention within texts, the result is `[texts, width]`.
    """
    example = x.tables[0] if isinstance(x, Embedded) else x
    inputs = x.indices[:1] if isinstance(x, Embedded) else ()
    dtype = settings.dtype or example.dtype
    if dtype not in DTYPES or example.dtype not in DTYPES:
        return None
    if plan is None and not infers(settings.backend, example, *inputs):
        return None
    if isinstance(x, Tensor) and not all(layers.orders):
        # Only post-norm layers keep a wider residual.
        example = x = x.to(dtype)
    residual = example.dtype
    if residual != dtype and not (residual == torch.float32 and all(layers.orders)):
        return None
    if plan is None or plan.dtypes != (dtype, residual):
        rows = len(x.indices[0]) if isinstance(x, Embedded) else x.shape[:-1].numel()
        plan = plan_of(owner, layers, dtype, residual, rows, mixed=settings.dtype is not None)
        if plan is None:
            return None
    lead = tuple(x.indices[0].shape if isinstance(x, Embedded) else x.shape[:-1])
    layout, added = layout_of(attend, lead, plan.operands[0].head_size, rotary)
    layout = layout._replace(pooling=pooling)
    return plan.run(x, partial(_attended, attend, settings, rotary), layout, added)


def _attended(
    attend: Attend, settings: Settings, rotary: Rotary | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    if rotary is not None:
        q, k = (apply_rotary(t, rotary) for t in (q, k))
    return attend(q, k, v, 0.0, settings)


def layout_of(
    attend: Attend, lead: tuple[int, ...], size: int, rotary: Rotary | None
) -> tuple[Layout, Added]:
    """Return the layout of a call and what its kernels read; `size` is the width of a head."""
    offsets, bias = None, None
    if isinstance(attend, Packed):
        sizes = None
        if attend.key_mask is None and attend.memory is None and attend.cu_q is attend.cu_k:
            offsets = attend.cu_q.to(torch.int64)
            sizes = (len(offsets) - 1, attend.longest_q, attend.longest_k)
    else:
        sizes, bias = _sizes_and_bias(attend, lead, size)
    if sizes is None:
        return Layout(lead), Added()
    positions, tables = None, (None, None)
    if rotary is not None:
        positions, tables = _positions(rotary, lead, size), rotary
        if positions is None:
            return Layout(lead), Added()
    layout = Layout(lead, sizes, offsets is not None, positions=positions)
    if bias is None:
        return layout, Added(offsets, None, *tables)
    layout, bias = layout.biased(bias)
    return layout, Added(None, bias, *tables)


def _sizes_and_bias(
    attend: Attend, lead: tuple[int, ...], size: int
) -> tuple[tuple[int, int, int] | None, Tensor | None]:
    """Return the sizes of attention in texts of one length and what it adds to scores; None without a kernel."""
    if isinstance(attend, Unpacked):
        texts, length = attend.packing.shape
        mask, bias, window = None, attend.bias, attend.window
        covered = attend.packing.whole
    elif isinstance(attend, Dense | Padded):
        texts, length = lead
        mask, bias, window = attend.mask, getattr(attend, "bias", None), None
        covered = getattr(attend, "scale", None) in (None, size**-0.5)
        if isinstance(bias, Tensor) and bias.dtype == torch.bool:
            mask, bias = bias, mask
    else:
        return None, None
    sizes = (texts, length, length)
    if not covered:
        return None, None
    if isinstance(bias, PositionTable):
        dtype = bias.table.dtype
        bias = relpos_bias(*bias, dtype=dtype, scale=size**-0.5)
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
        entries, _, rows, keys = bias.shape
        if entries not in (1, texts) or rows not in (1, length) or keys != length:
            return None, None
    if mask is None and window is None and not attend.causal:
        return sizes, bias
    if bias is not None or length > _MOST_MASKED:
        return None, None
    if mask is None:
        return sizes, _hidden(length, window, attend.causal)
    mask = mask[:, None, None].bool() if mask.ndim == 2 else mask
    batches, rows = (1, texts), (1, length)
    if mask.ndim != 4 or mask.shape[0] not in batches or mask.shape[2] not in rows:
        return None, None
    if mask.shape[1] != 1 or mask.shape[3] != length:
        return None, None
    # All layers of a model get the same mask.
    added = cached("added mask", (mask,), partial(_added, mask))
    return (None if added is None else sizes), added


@lru_cache(maxsize=64)
def _hidden(length: int, window: int | None, causal: bool) -> Tensor:
    """Return what hides tokens beyond the window, or later ones: `[1, 1, N, N]`."""
    with torch.inference_mode(False):
        positions = torch.arange(length)
        distance = positions[:, None] - positions
        hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
        if window is not None:
            hidden |= distance.abs() > window
        return torch.zeros(1, 1, length, length).masked_fill(hidden, -torch.inf)


def _added(mask: Tensor) -> Tensor | None:
    """Return a mask as an addend of the scores; None if a query sees no key."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    if not mask.is_floating_point():
        return None
    return mask if host.all_true(mask.amax(-1) > -torch.inf) else None


def _positions(rotary: Rotary, lead: tuple[int, ...], size: int) -> Positions | None:
    """Return where rotary tables apply to tokens of this shape, if the kernel takes them."""
    from xfm_fast.kernels.cpu.llvm.rows import Positions

    cos, sin = rotary
    texts, period = (1, *lead)[-2:]
    if cos.dtype not in (torch.float32, torch.bfloat16) or cos.dtype != sin.dtype:
        return None
    if cos.shape != sin.shape or cos.shape[-1] != size:
        return None
    if not (cos.is_contiguous() and sin.is_contiguous()):
        return None
    if not llvm.fills_vectors(size // 2, torch.float32) or size % 2:
        return None
    rows, count = cos.shape[-2], cos.shape[:-2].numel()
    if rows > period or count not in (1, texts):
        return None
    return Positions(period, period - rows, rows if count > 1 else 0, cos.dtype == torch.bfloat16)
