"""Blocks of timm's vision transformers: ViT and DeiT, relative positions, BEiT and BEiT-v2, EVA, Swin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, LayerNorm
from timm.layers.activations import GELU
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import beit, eva, swin_transformer, swin_transformer_v2, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn

from xfm_fast.models.text import concatenated
from xfm_fast.replace.adapters import Adaptable, is_adapted
from xfm_fast.replace.structure import Parts, branch_types, norm_behind, pre_norm, run_module
from xfm_fast.replace.swap import (
    Kinds,
    Rule,
    Settings,
    find,
    has_other_arguments,
    original_class,
    probability,
    why_not_bypassed,
)
from xfm_fast.replace.vit_block import Bias, PositionTable, PreNormBlock, lacks_parameters, row_scale
from xfm_fast.replace.window_block import cached_bias, continuous_bias, cosine, windows_of, within

_NORMS = (nn.LayerNorm, LayerNorm)
_MAYBE_DROP_PATH = (nn.Identity, DropPath)
_BYPASSED: dict[str, Any] = {
    "norm1": _NORMS,
    "norm2": _NORMS,
    "attn.qkv": (nn.Linear, Adaptable),
    "attn.q_proj": (nn.Linear, Adaptable),
    "attn.k_proj": (nn.Linear, Adaptable),
    "attn.v_proj": (nn.Linear, Adaptable),
    "attn.attn_drop": nn.Dropout,
    "attn.proj": (nn.Linear, Adaptable),
    "attn.proj_drop": nn.Dropout,
    "drop_path1": _MAYBE_DROP_PATH,
    "drop_path2": _MAYBE_DROP_PATH,
    "mlp": (Mlp, GluMlp, SwiGLU),
    "mlp.fc1": (nn.Linear, Adaptable),
    "mlp.fc1_g": (nn.Linear, Adaptable),
    "mlp.fc1_x": (nn.Linear, Adaptable),
    "mlp.fc2": (nn.Linear, Adaptable),
    "mlp.drop1": nn.Dropout,
    "mlp.drop2": nn.Dropout,
}


class _TimmBlock(PreNormBlock):
    """Base of timm's blocks: the names of their parts."""

    erf_gelus = (nn.GELU, GELU)

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        block: Any = module
        reason = why_not_bypassed(module, cls.bypassed) or lacks_parameters(module, ("norm1", "norm2"))
        if reason is None and find(module, "attn.gate") is not None:
            reason = "attn has a gate on its output"
        if reason is None and getattr(block.attn, "num_kv_groups", 1) > 1:
            reason = "attn shares keys and values among query heads"
        return reason

    def parts(self, gammas: tuple[Tensor | None, Tensor | None], rope: Tensor | None = None) -> Parts:
        block: Any = self
        attn, mlp = block.attn, block.mlp
        apart, bias, read = attn.qkv is None, None, ()
        if not apart and getattr(attn, "q_bias", None) is not None:
            bias = concatenated("qkv bias", attn.q_bias, attn.k_bias, attn.v_bias)
            if is_adapted(attn.qkv) and not attn.qkv_bias_separate:
                # timm reads the weight here and does not call the layer, so adapters have no effect.
                read = ((attn.qkv.weight, bias),)
        return Parts(
            norms=(block.norm1, block.norm2),
            qkv=read,
            projections=(attn.q_proj, attn.k_proj, attn.v_proj) if apart else () if read else (attn.qkv,),
            qkv_bias=bias,
            joins=not apart,
            heads=attn.num_heads,
            scale=getattr(attn, "scale", 1.0),
            proj=attn.proj,
            fc1=getattr(mlp, "fc1", None),
            fc2=mlp.fc2,
            hidden=self._hidden(mlp),
            gammas=gammas,
            row_scales=(partial(row_scale, block.drop_path1), partial(row_scale, block.drop_path2)),
            attention_p=probability(attn.attn_drop),
            hidden_p=probability(mlp.drop1),
            branch_p=(probability(attn.proj_drop), probability(mlp.drop2)),
            adapt=_adaptation(attn, rope),
            inner_norms=(_norm_of(attn), _norm_of(mlp)),
        )

    def _hidden(self, mlp: Any) -> Callable[..., Tensor] | None:
        """The hidden layer, unless it is `gelu(fc1(x))`."""
        kind = original_class(mlp)
        if kind is SwiGLU:
            return lambda x, linear: mlp.act(linear(mlp.fc1_g, x)) * linear(mlp.fc1_x, x)
        if kind is GluMlp:

            def gated(x: Tensor, linear: Callable[[Any, Tensor], Tensor]) -> Tensor:
                first, second = linear(mlp.fc1, x).chunk(2, dim=mlp.chunk_dim)
                return first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second

            return gated
        if self.is_erf_gelu("mlp.act"):
            return None
        return lambda x, linear: mlp.act(linear(mlp.fc1, x))


class ViTBlock(_TimmBlock):
    """`timm.models.vision_transformer.Block`."""

    bypassed: ClassVar[Mapping[str, Kinds]] = _BYPASSED | {
        "attn": vision_transformer.Attention,
        "ls1": (nn.Identity, vision_transformer.LayerScale),
        "ls2": (nn.Identity, vision_transformer.LayerScale),
    }

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or has_other_arguments(kwargs, ()) or not self.takes(x):
            return super().forward(x, *args, **kwargs)
        block: Any = self
        gammas = (getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None))
        return self.compute(self.parts(gammas), x)


class BeitBlock(_TimmBlock):
    """`timm.models.beit.Block`: the position bias is the layer's own or shared."""

    bypassed: ClassVar[Mapping[str, Kinds]] = _BYPASSED | {"attn": beit.Attention}

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        block: Any = self
        table = block.attn.relative_position_bias_table
        own = None if table is None else PositionTable(table, tuple(block.attn.window_size))
        if has_other_arguments(kwargs, ()) or (own is not None and not own.fits(x.shape[1])) or not self.takes(x):
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias, **kwargs)
        bias: Bias = own or shared_rel_pos_bias
        if own is not None and shared_rel_pos_bias is not None:
            bias = block.attn._get_rel_pos_bias() + shared_rel_pos_bias
        return self.compute(self.parts((block.gamma_1, block.gamma_2)), x, bias)


class EvaBlock(_TimmBlock):
    """`timm.models.eva.EvaBlock`, with optional rotary positions."""

    bypassed: ClassVar[Mapping[str, Kinds]] = _BYPASSED | {"attn": (eva.EvaAttention, eva.AttentionRope)}

    def forward(self, x: Tensor, rope: Tensor | None = None, **kwargs: Any) -> Tensor:
        if has_other_arguments(kwargs, ()) or not self.takes(x):
            return super().forward(x, rope=rope, **kwargs)
        block: Any = self
        return self.compute(self.parts((block.gamma_1, block.gamma_2), rope), x)


class RelPosBlock(_TimmBlock):
    """`RelPosBlock` and `ResPostRelPosBlock` (norms after the branches) of timm's `vit_relpos`."""

    bypassed: ClassVar[Mapping[str, Kinds]] = _BYPASSED | {
        "attn": vision_transformer_relpos.RelPosAttention,
        "ls1": (nn.Identity, vision_transformer_relpos.LayerScale),
        "ls2": (nn.Identity, vision_transformer_relpos.LayerScale),
    }

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        if not self.takes(x):
            return super().forward(x, shared_rel_pos=shared_rel_pos)
        block: Any = self
        positions = block.attn.rel_pos
        bias: Bias = shared_rel_pos
        if positions is not None:
            bias = cached_bias("relative", positions, positions.parameters(), positions.get_bias, lambda: None)
        gammas = (getattr(find(self, "ls1"), "gamma", None), getattr(find(self, "ls2"), "gamma", None))
        behind = original_class(self) is vision_transformer_relpos.ResPostRelPosBlock
        return self.compute(self.parts(gammas), x, bias, order=norm_behind if behind else pre_norm)


class WindowBlock(_TimmBlock):
    """`SwinTransformerBlock`, and `SwinTransformerV2Block` with norms after the branches."""

    bypassed: ClassVar[Mapping[str, Kinds]] = _BYPASSED | {
        "attn": (swin_transformer.WindowAttention, swin_transformer_v2.WindowAttention)
    }

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or not x.numel() or not self.intact():
            return super().forward(x)
        block: Any = self
        attn, second = block.attn, original_class(self) is swin_transformer_v2.SwinTransformerV2Block
        size, window, shift = tuple(x.shape[1:3]), tuple(block.window_size), tuple(block.shift_size)
        whole = tuple(-(-side // part) * part for side, part in zip(size, window, strict=True))

        def mask() -> Tensor | None:
            moving = getattr(block, "dynamic_mask", False)
            return block.get_attn_mask(x.new_empty(1, *whole, 1)) if moving else block.attn_mask

        parts = self.parts((None, None))
        if second:
            parts = parts._replace(adapt=partial(cosine, attn.logit_scale))
            source, sources = attn.cpb_mlp, attn.cpb_mlp.parameters
            make = partial(
                continuous_bias, source, attn.relative_coords_table, attn.relative_position_index, parts.heads
            )
        else:
            source, sources, make = nn.Identity(), lambda: (attn.relative_position_bias_table,), attn._get_rel_pos_bias
        name = f"{whole} {window} {shift}"
        windowed, attend = within(
            parts,
            windows_of(size, window, shift, x, fill_first=False),
            lambda: cached_bias(name, source, sources(), make, mask),
        )
        with branch_types(self.settings, x.device) as settings:
            order = norm_behind if second else pre_norm
            return order(windowed, x.flatten(1, 2), attend, settings).unflatten(1, size)


def _norm_of(part: nn.Module) -> nn.Module | None:
    norm = find(part, "norm")
    return None if norm is None or isinstance(norm, nn.Identity) else norm


def _adaptation(attn: Any, rope: Tensor | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Norms and rotation of queries and keys; None without them."""
    norms = [norm for norm in (find(attn, "q_norm"), find(attn, "k_norm")) if not isinstance(norm, nn.Identity | None)]
    if not norms and rope is None:
        return None
    prefix, half = getattr(attn, "num_prefix_tokens", 0), getattr(attn, "rotate_half", False)

    def rotate(x: Tensor, rope: Tensor) -> Tensor:
        tokens = apply_rot_embed_cat(x[:, prefix:].transpose(1, 2), rope, half=half).transpose(1, 2)
        return torch.cat([x[:, :prefix], tokens.to(x.dtype)], dim=1)

    def adapt(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if norms:
            q, k = run_module(norms[0], q), run_module(norms[1], k)
        return (q, k) if rope is None else (rotate(q, rope), rotate(k, rope))

    return adapt


def _rule(form: type[_TimmBlock], original: type[nn.Module], gain: str) -> Rule:
    return Rule(form.__name__, lambda module: original_class(module) is original, form, gain)


_WINDOWS = "windows in one gather, bias and mask kept; products fused"
RULES: tuple[Rule, ...] = (
    _rule(
        BeitBlock, beit.Block, "position bias expanded once; norms, GELU, LayerScale, DropPath and sums in the products"
    ),
    _rule(ViTBlock, vision_transformer.Block, "norms, GELU, LayerScale, DropPath and sums in the products"),
    _rule(
        RelPosBlock, vision_transformer_relpos.RelPosBlock, "position bias kept; norms, GELU and sums in the products"
    ),
    _rule(RelPosBlock, vision_transformer_relpos.ResPostRelPosBlock, "position bias kept; products and GELU fused"),
    _rule(WindowBlock, swin_transformer.SwinTransformerBlock, _WINDOWS),
    _rule(WindowBlock, swin_transformer_v2.SwinTransformerV2Block, _WINDOWS),
    _rule(EvaBlock, eva.EvaBlock, "norms, GELU, LayerScale, DropPath and sums in the products"),
)
