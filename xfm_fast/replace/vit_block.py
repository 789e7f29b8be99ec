"""The pre-norm block of vision transformers and its attention in fused ops, for any library."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.cpu.attention import biased_attention
from xfm_fast.replace.structure import Attend, Order, Parts, branch_types, pre_norm
from xfm_fast.replace.swap import Fused, Settings, find, why_not_bypassed


class PositionTable(NamedTuple):
    """A relative position bias table (BEiT, arXiv 2106.08254), `[(2wh-1)(2ww-1)+3, H]`, and its window (wh, ww)."""

    table: Tensor
    window: tuple[int, int]

    def fits(self, tokens: int) -> bool:
        """True if a sequence is one class token and this window of patches."""
        height, width = self.window
        return tokens == 1 + height * width and self.table.shape[0] == (2 * height - 1) * (2 * width - 1) + 3


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
            return ops.relpos_attention(q, k, v, table, bias.window, scale=scale, backend=backend).flatten(2)
        bias = reference.position_bias(bias.table, bias.window)
    if bias is None and not causal and (q.device.type == "cpu" or backend is not None):
        # The varlen op chooses the fastest of several implementations, also for equal lengths.
        batch, tokens = q.shape[:2]
        offsets = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        layout = (offsets, offsets, tokens, tokens)
        out = ops.varlen_attention(q, k, v, *layout, dropout_p=dropout_p, scale=scale, backend=backend)
        return out.view(batch, tokens, -1)
    if isinstance(bias, Tensor) and not dropout_p and _shared_on_cpu(q, k, v, bias):
        _, tokens, heads, _ = q.shape
        shared = bias.to(q.dtype).expand(1, heads, tokens, tokens)
        return biased_attention(q, k, v, scale, shared).flatten(2)
    if isinstance(bias, Tensor) and bias.is_floating_point():
        bias = bias.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _shared_on_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
    """True if the CPU kernel for a bias shared by the batch applies; it has no gradient."""
    if q.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, bias)):
        return False
    return bias.is_floating_point() and (bias.ndim == 3 or (bias.ndim == 4 and bias.shape[0] == 1))


class PreNormBlock(Fused):
    """`x += s₁·γ₁·Attn(LN(x)); x += s₂·γ₂·MLP(LN(x))`. Subclasses provide `Parts` and decide which calls to take."""

    erf_gelus: ClassVar[tuple[type[nn.Module], ...]] = (nn.GELU,)  # the library's classes of erf GELU

    def takes(self, x: Tensor) -> bool:
        """True if the fused form applies to x now."""
        return x.ndim == 3 and x.numel() > 0 and self.intact()

    def compute(
        self,
        parts: Parts,
        x: Tensor,
        bias: Bias = None,
        *,
        causal: bool = False,
        order: Order = pre_norm,
        packed: Attend | None = None,
    ) -> Tensor:
        """Run `[B, N, width]` with bias and causal as in `attention`, or `[T, width]` with the attention `packed`."""

        def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
            return attention(q, k, v, parts.scale, bias, settings, dropout_p=dropout_p, causal=causal)

        with branch_types(self.settings, x.device) as settings:
            return order(parts, x, packed or attend, settings)

    def is_erf_gelu(self, name: str) -> bool:
        """True if a part is erf GELU and may be bypassed."""
        part = find(self, name)
        if part is None or getattr(part, "approximate", "none") != "none":
            return False
        return why_not_bypassed(self, {name: self.erf_gelus}) is None


def lacks_parameters(module: nn.Module, norms: tuple[str, ...]) -> str | None:
    """Why norms cannot be fused: they are not affine. None if they can."""
    for name in norms:
        norm = find(module, name)
        if getattr(norm, "weight", None) is None or getattr(norm, "bias", None) is None:
            return f"{name} has no weight or no bias"
    return None


def row_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """Stochastic depth as one factor per entry, `[B]`, with the random draws of timm and BEiT; None if inactive."""
    dropped: Any = getattr(drop_path, "drop_prob", None)
    if not drop_path.training or not dropped:
        return None
    factors = x.new_empty(x.shape[0]).bernoulli_(1 - dropped)
    return factors.div_(1 - dropped) if dropped < 1 and getattr(drop_path, "scale_by_keep", True) else factors
