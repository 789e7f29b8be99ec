"""Blocks of open_clip's image and text towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from open_clip import transformer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.structure import Attend, Parts
from xfm_fast.replace.swap import (
    CalledByName,
    Kinds,
    Rule,
    Settings,
    find,
    has_other_arguments,
    original_class,
    why_not_bypassed,
)
from xfm_fast.replace.vit_block import PreNormBlock, lacks_parameters

_NORMS = (nn.LayerNorm, transformer.LayerNorm)
_SCALES = (nn.Identity, transformer.LayerScale)


class OpenClipBlock(PreNormBlock, CalledByName):
    """`open_clip.transformer.ResidualAttentionBlock` as self-attention, with or without a mask."""

    bypassed: ClassVar[Mapping[str, Kinds]] = {
        "ln_1": _NORMS,
        "ln_2": _NORMS,
        "attn": nn.MultiheadAttention,
        "attn.out_proj": NonDynamicallyQuantizableLinear,
        "ls_1": _SCALES,
        "ls_2": _SCALES,
        "mlp": nn.Sequential,
        "mlp.c_fc": (nn.Linear, Adaptable),
        "mlp.c_proj": (nn.Linear, Adaptable),
    }

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        attn: Any = find(module, "attn")
        if find(module, "ln_1_kv") is not None:
            return "it attends to another sequence (ln_1_kv); only its attention is fused"
        reason = why_not_bypassed(module, cls.bypassed) or lacks_parameters(module, ("ln_1", "ln_2"))
        if reason is None and (attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn):
            reason = "attn has separate projections, or extra keys"
        if reason is None and not attn.batch_first:
            reason = "attn is sequence-first; batch_first=True is required"
        return reason

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        x, mask = call["q_x"], call.get("attn_mask")
        if has_other_arguments(call, ("q_x", "attn_mask")) or not (_is_additive(mask) and self.takes(x)):
            return super().forward(*args, **kwargs)
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, cast(Any, self).attn.num_heads))
        # After the last block the tower multiplies by a parameter in its storage dtype.
        return self.compute(self._parts(), x, mask).to(x.dtype)

    def run(self, x: Tensor, attend: Attend) -> Tensor:
        """The block on packed tokens `[T, width]`."""
        return self.compute(self._parts(), x, packed=attend).to(x.dtype)

    def _parts(self) -> Parts:
        block: Any = self
        attn, mlp = block.attn, block.mlp
        return Parts(
            norms=(block.ln_1, block.ln_2),
            qkv=((attn.in_proj_weight, attn.in_proj_bias),),
            heads=attn.num_heads,
            scale=attn.head_dim**-0.5,
            proj=attn.out_proj,
            fc1=mlp.c_fc,
            fc2=mlp.c_proj,
            hidden=None if self.is_erf_gelu("mlp.gelu") else lambda x, linear: mlp.gelu(linear(mlp.c_fc, x)),
            gammas=(getattr(block.ls_1, "gamma", None), getattr(block.ls_2, "gamma", None)),
            attention_p=attn.dropout if attn.training else 0.0,
        )


def _is_additive(mask: Any) -> bool:
    """True for no mask, or an additive one."""
    return mask is None or (isinstance(mask, Tensor) and mask.is_floating_point() and mask.ndim in (2, 3))


def _is_block(module: nn.Module) -> bool:
    return original_class(module) is transformer.ResidualAttentionBlock


RULES: tuple[Rule, ...] = (Rule("OpenClipBlock", _is_block, OpenClipBlock, "norms, GELU and sums in the products"),)
