"""The vision block of X-FM, X-VLM and X²-VLM: BEiT's, known by the names of its parts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from xfm_fast.kernels import reference
from xfm_fast.kernels.derived import derived
from xfm_fast.replace.settings import Settings
from xfm_fast.replace.swapping import Kinds, find, original_class, probability, why_not_bypassed
from xfm_fast.replace.vision_attention import Bias, PositionTable
from xfm_fast.replace.vision_block import Parts, PreNormBlock, lacks_parameters

_ARGUMENTS = ("x", "rel_pos_bias", "return_attention", "return_qkv", "image_atts")
_PARTS: dict[str, Kinds] = {
    "norm1": nn.LayerNorm,
    "attn": nn.Module,
    "attn.qkv": nn.Linear,
    "attn.attn_drop": nn.Dropout,
    "attn.proj": nn.Linear,
    "attn.proj_drop": nn.Dropout,
    "drop_path": nn.Module,
    "norm2": nn.LayerNorm,
    "mlp": nn.Module,
    "mlp.fc1": nn.Linear,
    "mlp.fc2": nn.Linear,
    "mlp.drop": nn.Dropout,
}
# Of the attention, beside its submodules.
_ATTENTION = ("num_heads", "scale", "q_bias", "v_bias", "window_size", "relative_position_bias_table")


class OfficialVisionBlock(PreNormBlock):
    """A pre-norm block with a bias on queries and values, a position table, LayerScale and stochastic depth."""

    bypassed: ClassVar[Mapping[str, Kinds]] = _PARTS

    def forward(
        self,
        x: Tensor,
        rel_pos_bias: Tensor | None = None,
        return_attention: bool = False,
        return_qkv: bool = False,
        image_atts: Tensor | None = None,
    ) -> Any:
        attention = cast(Any, self.attn)
        table = attention.relative_position_bias_table
        bias: Bias = None if table is None else PositionTable(table, tuple(attention.window_size))
        covered = not return_attention and not return_qkv and self.takes(x) and not self._drops_hidden()
        if not covered or (isinstance(bias, PositionTable) and not bias.fits(x.shape[1])):
            return super().forward(x, rel_pos_bias, return_attention, return_qkv, image_atts)
        added = [given for given in (rel_pos_bias, image_atts) if given is not None]
        if added:
            if isinstance(bias, PositionTable):
                bias = reference.position_bias(bias.table, bias.window)
            bias = cast(Tensor, sum(added, start=0 if bias is None else bias))
        return self.compute(self._parts(), x, bias)

    def _parts(self) -> Parts:
        block = cast(Any, self)
        attention, mlp = block.attn, block.mlp
        return Parts(
            norms=(block.norm1, block.norm2),
            qkv=((attention.qkv.weight, _qkv_bias(attention)),),
            heads=attention.num_heads,
            scale=attention.scale,
            proj=attention.proj,
            fc1=mlp.fc1,
            fc2=mlp.fc2,
            hidden=None if self.is_erf_gelu("mlp.act") else lambda normed, linear: mlp.act(linear(mlp.fc1, normed)),
            gammas=(block.gamma_1, block.gamma_2),
            row_scales=(partial(_row_scale, block.drop_path),) * 2,
            attention_p=probability(attention.attn_drop),
            branch_p=(probability(attention.proj_drop), 0.0),
        )

    def _drops_hidden(self) -> bool:
        """Where the MLP drops out depends on the version of the code."""
        return bool(probability(cast(Any, self.mlp).drop))


def recognises(module: nn.Module) -> bool:
    """Whether a module is such a block."""
    if original_class(module).__module__.partition(".")[0] in ("transformers", "timm", "xfm_fast"):
        return False
    if any(find(module, name) is None for name in _PARTS) or not hasattr(module, "gamma_1"):
        return False
    attention, drop_path = find(module, "attn"), find(module, "drop_path")
    named = all(hasattr(attention, name) for name in _ATTENTION)
    names = tuple(inspect.signature(original_class(module).forward).parameters)[1:]
    return named and names == _ARGUMENTS and (isinstance(drop_path, nn.Identity) or hasattr(drop_path, "drop_prob"))


def refusal(module: nn.Module, settings: Settings) -> str | None:
    """Why a block must stay as it is."""
    reason = lacks_parameters(module, ("norm1", "norm2")) or why_not_bypassed(module, _PARTS)
    attention = cast(Any, find(module, "attn"))
    if reason is None and attention.relative_position_bias_table is not None:
        window = tuple(attention.window_size)
        index = attention.relative_position_index
        if not torch.equal(index.cpu(), reference.relative_position_index(window)):
            return "its positions are not numbered as BEiT numbers them"
    return reason


def _qkv_bias(attention: Any) -> Tensor | None:
    """Keys have no bias: a constant added to every score of a query changes nothing."""
    q_bias, v_bias = attention.q_bias, attention.v_bias
    if q_bias is None:
        return None

    def compute() -> Tensor:
        return torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])

    if torch.is_grad_enabled() and q_bias.requires_grad:
        return compute()
    return derived("qkv bias", (q_bias, v_bias), compute)


def _row_scale(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """Stochastic depth as one factor per entry: `[B]`."""
    dropped = getattr(drop_path, "drop_prob", None)
    if not drop_path.training or not dropped:
        return None
    kept = 1 - dropped
    return x.new_empty(x.shape[0]).bernoulli_(kept).div_(kept)
