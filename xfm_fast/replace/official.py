"""The modules of the official X-FM and X²-VLM code, and of their ancestors ALBEF, X-VLM and BLIP.

Nobody publishes these as a package, so they are known by structure: the names of their submodules and of the arguments
of their forward, never the names of classes or files.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xfm_fast.kernels import host
from xfm_fast.packing import Packing, on_host
from xfm_fast.replace import official_vision
from xfm_fast.replace.bert_structure import (
    LAYER_PARTS,
    drops_paths,
    has_cross_attention,
    is_layer,
    why_not_plain,
)
from xfm_fast.replace.packed_layers import (
    Memory,
    Packed,
    Padded,
    packed_memory,
    padded_memory,
    plan,
    run_layer,
)
from xfm_fast.replace.rules import Rule
from xfm_fast.replace.settings import Settings
from xfm_fast.replace.swapping import CalledByName, Kinds, find, observed, original_class, why_not_bypassed

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
# Modes in which a layer that can look at an image does.
_LOOKING = ("multi_modal", "multimodal", "fusion")
# The code masks by adding -10000, newer libraries the lowest number of the type: e to the power of either is 0.
_HIDDEN = -1000.0


@dataclass(frozen=True)
class _PackedTexts:
    """What the packed texts of an encoder attend to; it travels where the layers get their attention mask."""

    packing: Packing
    memory: Memory | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        cu, longest = self.packing.cu_seqlens, self.packing.longest
        return Packed(cu, cu, longest, longest, self.packing.key_mask)(q, k, v, dropout_p, settings)


class _Keeping:
    """Attention that keeps keys and values, which a layer returns for whoever generates."""

    def __init__(self, attend: Padded) -> None:
        self._attend = attend
        self.kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
        self.kept = (k.transpose(1, 2), v.transpose(1, 2))
        return self._attend(q, k, v, dropout_p, settings)


class OfficialTextLayer(CalledByName):
    """A layer of the text or fusion encoder: fused products, attention and norms."""

    bypassed: ClassVar[Mapping[str, Kinds]] = LAYER_PARTS

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        x, mask = call["hidden_states"], call.get("attention_mask")
        if isinstance(mask, _PackedTexts):
            return run_layer(self, x[0], mask, self.settings, mask.memory if self._looks(call) else None)[None], None
        if not self._covers(call) or not self.intact():
            return super().forward(*args, **kwargs)
        attend = _Keeping(Padded(mask))
        with self.settings.own_types(x.device):
            memory = None
            if self._looks(call):
                memory = padded_memory(call["encoder_hidden_states"], call.get("encoder_attention_mask"))
            out = run_layer(self, x, attend, self.settings, memory)
        return out, attend.kept

    def _looks(self, call: dict[str, Any]) -> bool:
        return has_cross_attention(self) and call.get("encoder_hidden_states") is not None

    def _covers(self, call: dict[str, Any]) -> bool:
        understood = ("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "mode")
        if any(value is not None and value is not False for name, value in call.items() if name not in understood):
            return False
        if drops_paths(self):
            return False
        states, masks = call.get("encoder_hidden_states"), (call.get("attention_mask"),)
        if has_cross_attention(self):
            # Whether a layer without an image is an error or runs alone is for the original to say.
            if not isinstance(states, Tensor) or ("mode" in self.names and call.get("mode") not in _LOOKING):
                return False
            if getattr(find(self, "crossattention.self"), "save_attention", False):
                return False
            masks = (*masks, call.get("encoder_attention_mask"))
        return all(m is None or (isinstance(m, Tensor) and m.ndim == 4 and m.is_floating_point()) for m in masks)


class OfficialTextEncoder(CalledByName):
    """The layers of a text or fusion encoder on packed tokens: padding is taken out before and put back behind."""

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
        """How to pack the texts of a call; None for calls that keep their padding."""
        if torch.compiler.is_compiling() or self._asks_beyond(call):
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

    @staticmethod
    def _asks_beyond(call: dict[str, Any]) -> bool:
        understood = {"hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"}
        understood |= {"mode", "return_dict", "head_mask"}
        masks = call.get("head_mask")
        if masks is not None and any(mask is not None for mask in masks):
            return True
        return any(value is not None and value is not False for name, value in call.items() if name not in understood)

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


def _argument_names(original: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(original.forward).parameters)[1:]


def _visible(mask: Any) -> Tensor | None:
    """The additive mask `[P, 1, 1, L]` of keys as booleans `[P, L]`; None if it is another kind of mask."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[1:3] != (1, 1) or not mask.is_floating_point():
        return None
    flat = mask[:, 0, 0]
    visible = flat == 0
    clean = (visible | (flat <= _HIDDEN)).all()
    return visible if (host.all_true(clean) if on_host(clean) else bool(clean)) else None


def _foreign(module: nn.Module) -> bool:
    """Libraries with rules of their own call their layers differently."""
    return original_class(module).__module__.partition(".")[0] not in ("transformers", "timm", "xfm_fast")


def _is_text_layer(module: nn.Module) -> bool:
    # Layers of transformers' kind know whether they decode, and return keys and values only then.
    if not _foreign(module) or hasattr(module, "is_decoder") or not is_layer(module):
        return False
    return set(_argument_names(original_class(module))) >= _LAYER_ARGUMENTS


def _is_text_encoder(module: nn.Module) -> bool:
    layers = find(module, "layer")
    if not isinstance(layers, nn.ModuleList) or not len(layers) or not all(_is_text_layer(layer) for layer in layers):
        return False
    return set(_argument_names(original_class(module))) >= _ENCODER_ARGUMENTS


def _layer_refusal(module: nn.Module, settings: Settings) -> str | None:
    return why_not_plain(module) or why_not_bypassed(module, LAYER_PARTS)


def _encoder_refusal(module: nn.Module, settings: Settings) -> str | None:
    return None if settings.unpad else "its padding is computed; unpad=True leaves it out"


RULES: tuple[Rule, ...] = (
    Rule(
        "OfficialTextEncoder",
        _is_text_encoder,
        OfficialTextEncoder,
        "padding left out of all layers",
        _encoder_refusal,
    ),
    Rule(
        "OfficialTextLayer",
        _is_text_layer,
        OfficialTextLayer,
        "one product for q, k, v; GELU, residual and norm fused",
        _layer_refusal,
    ),
    Rule(
        "OfficialVisionBlock",
        official_vision.recognises,
        official_vision.OfficialVisionBlock,
        "position table expanded once, GELU, residual, LayerScale and norm fused",
        official_vision.refusal,
    ),
)
