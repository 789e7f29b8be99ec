"""Modules of the official X-FM and X²-VLM code, and of ALBEF, X-VLM and BLIP.

They come from no package, so they are matched by the names of submodules and forward arguments. Where names are not
enough (activation of a head, position counting), the fused form is compared with the original on an example.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from xfm_fast.kernels import host, reference
from xfm_fast.nn import qkv_bias
from xfm_fast.packing import Packing, on_host
from xfm_fast.replace.adapters import Adaptable, is_adapted
from xfm_fast.replace.bert_layer import (
    LAYER_PARTS,
    BertLayer,
    FusedEmbeddings,
    Memory,
    Packed,
    Padded,
    VocabularyHead,
    drops_paths,
    has_cross_attention,
    is_layer,
    packed_memory,
    padded_memory,
    plan,
    run_layer,
    why_not_plain,
)
from xfm_fast.replace.structure import Parts
from xfm_fast.replace.swap import (
    BANDS,
    CalledByName,
    Fused,
    Kinds,
    Rule,
    Settings,
    find,
    has_other_arguments,
    observed,
    original_class,
    probability,
    restore,
    swap,
    why_not_bypassed,
)
from xfm_fast.replace.vit_block import Bias, PositionTable, PreNormBlock, lacks_parameters, row_scale

_LAYER_ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "head_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_value",
    "output_attentions",
}
_ENCODER_ARGUMENTS = _LAYER_ARGUMENTS - {"past_key_value"} | {"past_key_values", "use_cache", "output_hidden_states"}
_TENSORS = {"hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"}
# Modes in which a layer uses its cross-attention.
_LOOKING = ("multi_modal", "multimodal", "fusion")
# The code masks by -10000, newer libraries by the dtype's minimum: exp underflows to 0 for both.
_HIDDEN = -1000.0
_BLOCK_ARGUMENTS = ("x", "rel_pos_bias", "return_attention", "return_qkv", "image_atts")
_BLOCK_PARTS: dict[str, Kinds] = {
    "norm1": nn.LayerNorm,
    "attn": nn.Module,
    "attn.qkv": (nn.Linear, Adaptable),
    "attn.attn_drop": nn.Dropout,
    "attn.proj": (nn.Linear, Adaptable),
    "attn.proj_drop": nn.Dropout,
    "drop_path": nn.Module,
    "norm2": nn.LayerNorm,
    "mlp": nn.Module,
    "mlp.fc1": (nn.Linear, Adaptable),
    "mlp.fc2": (nn.Linear, Adaptable),
    "mlp.drop": nn.Dropout,
}
# Attributes of the attention.
_BLOCK_ATTENTION = ("num_heads", "scale", "q_bias", "v_bias", "window_size", "relative_position_bias_table")
_EMBEDDINGS = {"word_embeddings", "position_embeddings", "LayerNorm", "dropout"}
_ROBERTA_HEAD, _BERT_HEAD = {"dense", "layer_norm", "decoder"}, {"transform", "decoder"}
_TRANSFORM = {"dense", "LayerNorm"}
_TRIED_TOKENS = 5


def _foreign(module: nn.Module) -> bool:
    """True unless the module's library has its own rules."""
    return original_class(module).__module__.partition(".")[0] not in ("transformers", "timm", "xfm_fast")


@dataclass(frozen=True)
class _PackedTexts:
    """Attention of packed texts, passed to the layers in place of the attention mask."""

    packing: Packing
    memory: Memory | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        cu, longest = self.packing.cu_seqlens, self.packing.longest
        return Packed(cu, cu, longest, longest, self.packing.key_mask)(q, k, v, dropout_p, settings)


class _RecordKeysValues:
    """Attention that records keys and values, which a layer returns for generation."""

    def __init__(self, attend: Padded) -> None:
        self._attend = attend
        self.kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        self.kept = (k.transpose(1, 2), v.transpose(1, 2))
        return self._attend(q, k, v, dropout_p, settings)


class OfficialTextLayer(BertLayer):
    """A layer of the text or fusion encoder."""

    bypassed: ClassVar[Mapping[str, Kinds]] = LAYER_PARTS

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        # Layers of transformers have `is_decoder` and return keys and values only as decoders.
        if not _foreign(module) or hasattr(module, "is_decoder") or not is_layer(module):
            return False
        return set(_argument_names(module)) >= _LAYER_ARGUMENTS

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return why_not_plain(module) or why_not_bypassed(module, LAYER_PARTS)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        x, mask = call["hidden_states"], call.get("attention_mask")
        if isinstance(mask, _PackedTexts):
            return run_layer(self, x[0], mask, self.settings, mask.memory if self._looks(call) else None)[None], None
        if not self._covers(call) or not self.intact():
            return super().forward(*args, **kwargs)
        attend = _RecordKeysValues(Padded(mask))
        with self.settings.own_types(x.device):
            memory = None
            if self._looks(call):
                memory = padded_memory(call["encoder_hidden_states"], call.get("encoder_attention_mask"))
            out = run_layer(self, x, attend, self.settings, memory)
        return out, attend.kept

    def _looks(self, call: dict[str, Any]) -> bool:
        return has_cross_attention(self) and call.get("encoder_hidden_states") is not None

    def _covers(self, call: dict[str, Any]) -> bool:
        if has_other_arguments(call, _TENSORS | {"mode"}) or drops_paths(self):
            return False
        states, masks = call.get("encoder_hidden_states"), (call.get("attention_mask"),)
        if has_cross_attention(self):
            # Without an image the original raises or skips the layer.
            if not isinstance(states, Tensor) or ("mode" in self.names and call.get("mode") not in _LOOKING):
                return False
            if getattr(find(self, "crossattention.self"), "save_attention", False):
                return False
            masks = (*masks, call.get("encoder_attention_mask"))
        return all(m is None or (isinstance(m, Tensor) and m.ndim == 4 and m.is_floating_point()) for m in masks)


class OfficialTextEncoder(CalledByName):
    """The layers of a text or fusion encoder on packed tokens."""

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        layers = find(module, "layer")
        if (
            not isinstance(layers, nn.ModuleList)
            or not len(layers)
            or not all(OfficialTextLayer.recognises(layer) for layer in layers)
        ):
            return False
        return set(_argument_names(module)) >= _ENCODER_ARGUMENTS

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return None if settings.unpad else "it computes padding; unpad=True skips it"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        texts = self._packed(call)
        if texts is None:
            return super().forward(*args, **kwargs)
        x = call["hidden_states"]
        with self.settings.own_types(x.device):
            packed = texts.packing.pack(x)[None]
            out = super().forward(**(call | {"hidden_states": packed, "attention_mask": texts}))
        if isinstance(out, tuple):
            return texts.packing.unpad(out[0][0]), *out[1:]
        out.last_hidden_state = texts.packing.unpad(out.last_hidden_state[0])
        return out

    def _packed(self, call: dict[str, Any]) -> _PackedTexts | None:
        """The packed texts of a call; None for calls that keep padding."""
        # A list of head masks may contain only None.
        head_masks = any(mask is not None for mask in call.get("head_mask") or ())
        if (
            torch.compiler.is_compiling()
            or head_masks
            or has_other_arguments(call, _TENSORS | {"mode", "return_dict", "head_mask"})
        ):
            return None
        states = call.get("encoder_hidden_states")
        if states is not None and not isinstance(states, Tensor):
            return None
        kept, seen = _visible(call.get("attention_mask")), call.get("encoder_attention_mask")
        if kept is None or kept.shape != call["hidden_states"].shape[:2] or not self._plain_layers():
            return None
        if states is not None and seen is not None:
            seen = _visible(seen)
            if seen is None or seen.shape != states.shape[:2]:
                return None
        planned = plan(kept, None if states is None else seen, keep_first=True)
        if planned is None:
            return None
        packing, all_seen = planned
        memory = None if states is None else packed_memory(states, None if all_seen else seen, packing)
        return _PackedTexts(packing, memory)

    def _plain_layers(self) -> bool:
        layers = find(self, "layer")
        assert layers is not None
        return all(
            isinstance(layer, OfficialTextLayer)
            and layer.intact()
            and not observed(layer)
            and not drops_paths(layer)
            and not getattr(find(layer, "crossattention.self"), "save_attention", False)
            for layer in layers.children()
        )


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(original_class(module).forward).parameters)[1:]


def _visible(mask: Any) -> Tensor | None:
    """An additive key mask `[P, 1, 1, L]` as booleans `[P, L]`; None for other masks."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1:3] != (1, 1) or not mask.is_floating_point():
        return None
    flat = mask[:, 0, 0]
    visible = flat == 0
    clean = (visible | (flat <= _HIDDEN)).all()
    return visible if (host.all_true(clean) if on_host(clean) else bool(clean)) else None


class OfficialVisionBlock(PreNormBlock):
    """Pre-norm block with query and value biases, position table, LayerScale and stochastic depth."""

    bypassed: ClassVar[Mapping[str, Kinds]] = _BLOCK_PARTS

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        if (
            not _foreign(module)
            or any(find(module, name) is None for name in _BLOCK_PARTS)
            or not hasattr(module, "gamma_1")
        ):
            return False
        attention, drop_path = find(module, "attn"), find(module, "drop_path")
        named = all(hasattr(attention, name) for name in _BLOCK_ATTENTION)
        names = _argument_names(module)
        return (
            named
            and names == _BLOCK_ARGUMENTS
            and (isinstance(drop_path, nn.Identity) or hasattr(drop_path, "drop_prob"))
        )

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        reason = lacks_parameters(module, ("norm1", "norm2")) or why_not_bypassed(module, _BLOCK_PARTS)
        attention = cast(Any, find(module, "attn"))
        if reason is None and attention.relative_position_bias_table is not None:
            window = tuple(attention.window_size)
            index = attention.relative_position_index
            if not torch.equal(index.cpu(), reference.relative_position_index(window)):
                return "its relative positions are not numbered like BEiT's"
        return reason

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
        # Dropout placement in the MLP depends on the code version.
        drops_hidden = probability(cast(Any, self.mlp).drop)
        covered = not return_attention and not return_qkv and self.takes(x) and not drops_hidden
        if not covered or (isinstance(bias, PositionTable) and not bias.fits(x.shape[1])):
            return super().forward(x, rel_pos_bias, return_attention, return_qkv, image_atts)
        added = [given for given in (rel_pos_bias, image_atts) if given is not None]
        if added:
            if isinstance(bias, PositionTable):
                bias = reference.position_bias(bias.table, bias.window)
            bias = cast(Tensor, sum(added, start=0 if bias is None else bias))
        return self.compute(self.parts(), x, bias)

    def parts(self) -> Parts:
        block = cast(Any, self)
        attention, mlp = block.attn, block.mlp
        bias = None if attention.q_bias is None else qkv_bias(attention.q_bias, attention.v_bias)
        read = is_adapted(attention.qkv)
        return Parts(
            norms=(block.norm1, block.norm2),
            # The official code reads the weight and does not call the layer, so adapters have no effect.
            qkv=((attention.qkv.weight, bias),) if read else (),
            projections=() if read else (attention.qkv,),
            qkv_bias=bias,
            heads=attention.num_heads,
            scale=attention.scale,
            proj=attention.proj,
            fc1=mlp.fc1,
            fc2=mlp.fc2,
            hidden=None if self.is_erf_gelu("mlp.act") else lambda normed, linear: mlp.act(linear(mlp.fc1, normed)),
            gammas=(block.gamma_1, block.gamma_2),
            row_scales=(partial(row_scale, block.drop_path),) * 2,
            attention_p=probability(attention.attn_drop),
            branch_p=(probability(attention.proj_drop), 0.0),
        )


class OfficialEmbeddings(FusedEmbeddings):
    """Embeddings matched by names and tested on an example."""

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        parts = set(module._modules) - {"token_type_embeddings"}
        counts = hasattr(module, "padding_idx") or "position_ids" in module._buffers
        return _foreign(module) and parts == _EMBEDDINGS and counts

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        reason = why_not_bypassed(module, cls.bypassed)
        if reason is not None:
            return reason
        words, places = find(module, "word_embeddings"), find(module, "position_embeddings")
        assert isinstance(words, nn.Embedding)
        assert isinstance(places, nn.Embedding)
        # Include padding ids: RoBERTa's positions skip them.
        count = min(_TRIED_TOKENS, words.num_embeddings, places.num_embeddings // 2)
        ids = torch.arange(count, device=words.weight.device)[None].flip(1)
        return _why_not_equal(module, cls, settings, words.weight, ids)


class OfficialVocabularyHead(VocabularyHead):
    """Vocabulary head matched by names and tested on an example."""

    @staticmethod
    def recognises(module: nn.Module) -> bool:
        parts = set(module._modules)
        transform = find(module, "transform")
        named = parts == _ROBERTA_HEAD or (
            parts == _BERT_HEAD and transform is not None and set(transform._modules) >= _TRANSFORM
        )
        return _foreign(module) and named

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        transform = find(module, "transform")
        reason = why_not_bypassed(module, cls.bypassed)
        if reason is None and transform is not None and observed(transform):
            reason = "transform has hooks"
        if reason is not None:
            return reason
        dense: Any = find(module, "dense") if transform is None else find(module, "transform.dense")
        weight = dense.weight
        generator = torch.Generator().manual_seed(0)
        # Wide enough to expose another activation or GELU variant.
        features = 3 * torch.randn(2, dense.in_features, generator=generator)
        return _why_not_equal(module, cls, settings, weight, features.to(weight.device, weight.dtype))


def _why_not_equal(
    module: nn.Module, fused: type[Fused], settings: Settings, weight: Tensor, example: Tensor
) -> str | None:
    """Why a fused form cannot replace a module: its output on an example differs. None if it matches."""
    if weight.device.type == "meta":
        return "its parameters have no values yet, so it cannot be tested"
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            wanted = module.forward(example)
            swap(module, fused, Settings(settings.kernels))
            try:
                found = module.forward(example)
            finally:
                restore(module)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        return f"it failed on an example ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    finally:
        for part, training in modes.items():
            part.training = training
    if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
        return "its output shape does not match its parts"
    error = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30))
    band = BANDS.get(wanted.dtype, BANDS[torch.float32])
    return None if error <= band else f"its output does not match its parts (by {error:.0e})"


RULES: tuple[Rule, ...] = (
    Rule("OfficialTextEncoder", OfficialTextEncoder.recognises, OfficialTextEncoder, "padding left out of all layers"),
    Rule(
        "OfficialTextLayer",
        OfficialTextLayer.recognises,
        OfficialTextLayer,
        "one product for q, k, v; GELU, residual and norm fused",
    ),
    Rule(
        "OfficialVisionBlock",
        OfficialVisionBlock.recognises,
        OfficialVisionBlock,
        "position table expanded once, GELU, residual, LayerScale and norm fused",
    ),
    Rule(
        "OfficialEmbeddings",
        OfficialEmbeddings.recognises,
        OfficialEmbeddings,
        "three tables and LayerNorm in one pass",
    ),
    Rule(
        "OfficialVocabularyHead",
        OfficialVocabularyHead.recognises,
        OfficialVocabularyHead,
        "GELU fused; faster product with the vocabulary",
    ),
)
