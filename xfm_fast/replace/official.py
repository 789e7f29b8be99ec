"""Modules of the official X-FM and X²-VLM code, and of ALBEF, X-VLM and BLIP.

They come from no package, so they are matched by the names of submodules and forward arguments.
Where names are not enough (activation of a head, position counting), the fused form is compared
with the original on an example.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from xfm_fast.kernels import host, reference
from xfm_fast.models.vision import qkv_bias
from xfm_fast.packing import Packing, on_host
from xfm_fast.plans.orders import LayerModules
from xfm_fast.replace.adapters import is_adapted
from xfm_fast.replace.attention import Bias, Dense, Packed, Padded, PositionTable
from xfm_fast.replace.heads import FusedEmbeddings, VocabularyHead
from xfm_fast.replace.layer import FusedLayer, LayerSpec, Mlp, can_run_packed
from xfm_fast.replace.swap import (
    BANDS,
    CalledByName,
    Fused,
    Settings,
    counted,
    find,
    has_other_arguments,
    observed,
    original_class,
    restore,
    swap,
    why_not_bypassed,
)
from xfm_fast.replace.transformers_rows import BERT, build_spec
from xfm_fast.replace.unpadded import packed_memory, padded_memory, plan
from xfm_fast.replace.verification import model_outputs, relative_error

_LAYER_ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "head_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_value",
    "output_attentions",
}
_ENCODER_ARGUMENTS = _LAYER_ARGUMENTS - {"past_key_value"} | {
    "past_key_values",
    "use_cache",
    "output_hidden_states",
}
_TENSORS = {"hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask"}
_CROSS_ATTENTION_MODES = ("multi_modal", "multimodal", "fusion")
# The code masks by -10000, newer libraries by the dtype's minimum: exp underflows to 0 for both.
_HIDDEN = -1000.0
_BLOCK_ARGUMENTS = ("x", "rel_pos_bias", "return_attention", "return_qkv", "image_atts")
# Attributes of the attention.
_BLOCK_ATTENTION = (
    "num_heads",
    "scale",
    "q_bias",
    "v_bias",
    "window_size",
    "relative_position_bias_table",
)
_EMBEDDINGS = {"word_embeddings", "position_embeddings", "LayerNorm", "dropout"}
_ROBERTA_HEAD, _BERT_HEAD = {"dense", "layer_norm", "decoder"}, {"transform", "decoder"}
_TRANSFORM = {"dense", "LayerNorm"}
_TRIED_TOKENS = 5


def _is_unpackaged(module: nn.Module) -> bool:
    """Return whether a module is from none of the packages that have specs of their own."""
    package = original_class(module).__module__.partition(".")[0]
    return package not in ("transformers", "timm", "xfm_fast")


# BERT's layer, in the code of ALBEF, X-VLM, X²-VLM, BLIP and X-FM.
TEXT_LAYER = build_spec(
    "",
    BERT,
    own=(nn.Module,),
    head_size="",
    heads="attention.self.num_attention_heads",
    # X²-VLM adds stochastic depth, and draws it per position across all texts.
    drop_paths=("attention.output.drop_path", "output.drop_path"),
    chunks="",
    cross="crossattention",
    refuses=lambda layer: why_unsupported(layer),
)


def is_layer(module: nn.Module) -> bool:
    """Return whether a module has the submodules of a BERT layer."""
    spec = TEXT_LAYER
    if spec.missing(module) is not None:
        return False
    names = (*spec.qkv, spec.proj, spec.norms[0], spec.weights_p, spec.branch_p[0])
    return not has_cross_attention(module) or all(
        find(module, spec.cross_name(name)) is not None for name in names
    )


def has_cross_attention(layer: nn.Module) -> bool:
    """Return whether a layer has cross-attention."""
    return find(layer, TEXT_LAYER.cross) is not None


def drops_paths(layer: nn.Module) -> bool:
    """Return whether stochastic depth is active."""
    first, last = TEXT_LAYER.drop_paths
    modules = (find(layer, name) for name in (first, TEXT_LAYER.cross_name(first), last))
    return any(
        module is not None and module.training and getattr(module, "drop_prob", None)
        for module in modules
    )


def why_unsupported(layer: nn.Module) -> str | None:
    """Return how the attention of a layer differs from BERT's, or None."""
    for name in ("attention.self", "crossattention.self"):
        positions = getattr(find(layer, name), "position_embedding_type", None)
        if positions not in ("absolute", None):
            return f"its attention has {positions} positions"
    if hasattr(layer, "intermediate_query"):
        return "it attends with query tokens in addition to the text"
    return None


class OfficialTextLayer(FusedLayer):
    """Layer of the text or fusion encoder; it returns its keys and values too, for generation."""

    layer_spec = TEXT_LAYER

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        # Layers of transformers have `is_decoder` and return keys and values only as decoders.
        if not _is_unpackaged(module) or hasattr(module, "is_decoder") or not is_layer(module):
            return False
        return set(_argument_names(module)) >= _LAYER_ARGUMENTS

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        x, attend = call["hidden_states"], call.get("attention_mask")
        if isinstance(attend, Packed):
            memory = attend.memory if self._uses_memory(call) else None
            return self.run(x[0], attend, self.settings, memory=memory)[None], None
        padded = self._attend(call) if self.intact() else None
        if padded is None:
            return super(FusedLayer, self).forward(*args, **kwargs)
        keys_values: list[tuple[Tensor, Tensor]] = []

        def record(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, settings: Settings) -> Tensor:
            keys_values.append((k.transpose(1, 2), v.transpose(1, 2)))
            return padded(q, k, v, dropout_p, settings)

        with self.settings.without_autocast(x.device) as settings:
            out = self.run(x, record, settings, memory=padded.memory)
        return out, keys_values[0]

    def _uses_memory(self, call: dict[str, Any]) -> bool:
        return has_cross_attention(self) and call.get("encoder_hidden_states") is not None

    def _attend(self, call: dict[str, Any]) -> Padded | None:
        """Return the attention of a call; None to run the original."""
        if has_other_arguments(call, _TENSORS | {"mode"}) or drops_paths(self):
            return None
        states, masks = call.get("encoder_hidden_states"), (call.get("attention_mask"),)
        if has_cross_attention(self):
            # Without an image the original raises or skips the layer.
            if not isinstance(states, Tensor):
                return None
            if "mode" in self.names and call.get("mode") not in _CROSS_ATTENTION_MODES:
                return None
            if getattr(find(self, "crossattention.self"), "save_attention", False):
                return None
            masks = (*masks, call.get("encoder_attention_mask"))
        for mask in masks:
            additive = isinstance(mask, Tensor) and mask.ndim == 4 and mask.is_floating_point()
            if mask is not None and not additive:
                return None
        memory = None
        if isinstance(states, Tensor) and self._uses_memory(call):
            memory = padded_memory(states, masks[-1])
        return Padded(masks[0], memory=memory)


class OfficialTextEncoder(CalledByName):
    """Layers of a text or fusion encoder on packed tokens."""

    benefit: ClassVar[str] = "padding left out of all layers"

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        layers = find(module, "layer")
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return False
        if not all(OfficialTextLayer.recognises(layer) for layer in layers):
            return False
        return set(_argument_names(module)) >= _ENCODER_ARGUMENTS

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return None if settings.unpad else "it computes padding; unpad=True skips it"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        packed = self._packed(call)
        if packed is None:
            return super().forward(*args, **kwargs)
        self.count()
        (packing, attend), x = packed, call["hidden_states"]
        # The layers take the attention in place of the mask.
        call |= {"hidden_states": packing.pack(x)[None], "attention_mask": attend}
        with self.settings.without_autocast(x.device):
            out = super().forward(**call)
        if isinstance(out, tuple):
            return packing.unpad(out[0][0]), *out[1:]
        out.last_hidden_state = packing.unpad(out.last_hidden_state[0])
        return out

    def _packed(self, call: dict[str, Any]) -> tuple[Packing, Packed] | None:
        """Return the packing of a call and its attention; None for calls that keep padding."""
        # A list of head masks may contain only None.
        head_masks = any(mask is not None for mask in call.get("head_mask") or ())
        unknown = has_other_arguments(call, _TENSORS | {"mode", "return_dict", "head_mask"})
        states, seen = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if torch.compiler.is_compiling() or head_masks or unknown:
            return None
        if not isinstance(states, Tensor | None):
            return None
        layers: list[Any] = list(cast(Any, self).layer)
        for layer in layers:
            if getattr(find(layer, "crossattention.self"), "save_attention", False):
                return None
        if any(map(drops_paths, layers)) or not can_run_packed(layers):
            return None
        visible = _visible(call.get("attention_mask"))
        if visible is None or visible.shape != call["hidden_states"].shape[:2]:
            return None
        if states is not None and seen is not None:
            seen = _visible(seen)
            if seen is None or seen.shape != states.shape[:2]:
                return None
        planned = plan(visible, None if states is None else seen, keep_first=True)
        if planned is None:
            return None
        packing, memory_visible = planned
        memory = None
        if states is not None:
            memory = packed_memory(states, None if memory_visible else seen, packing)
        return packing, Packed.within(packing, memory)


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(original_class(module).forward).parameters)[1:]


def _visible(mask: Any) -> Tensor | None:
    """Convert an additive key mask `[P, 1, 1, L]` to booleans `[P, L]`; None for other masks."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        return None
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return None
    flat = mask[:, 0, 0]
    visible = flat == 0
    clean = (visible | (flat <= _HIDDEN)).all()
    return visible if (host.all_true(clean) if on_host(clean) else bool(clean)) else None


def _vision_attention(block: Any, call: Mapping[str, Any]) -> Dense | None:
    """Return BEiT's attention: a position table, added biases, or both."""
    attention, x = block.attn, call["x"]
    table = attention.relative_position_bias_table
    bias: Bias = None if table is None else PositionTable(table, tuple(attention.window_size))
    # Dropout placement in the MLP depends on the code version.
    dropout = block.mlp.drop
    if dropout.training and dropout.p:
        return None
    if isinstance(bias, PositionTable) and not bias.fits(x.shape[1]):
        return None
    for added in (call.get("rel_pos_bias"), call.get("image_atts")):
        if added is None:
            continue
        if isinstance(bias, PositionTable):
            bias = reference.position_bias(bias.table, bias.window)
        bias = added if bias is None else cast(Tensor, bias) + added
    return Dense(bias=bias, scale=attention.scale)


def _vision_biases(block: Any, modules: LayerModules) -> LayerModules:
    attention = block.attn
    biases = attention.q_bias, None, attention.v_bias
    if is_adapted(attention.qkv):
        # The official code reads the weight and does not call the layer, so adapters have no
        # effect.
        bias = None if attention.q_bias is None else qkv_bias(*biases)
        return modules._replace(projections=(), qkv=(attention.qkv.weight, bias))
    return modules if attention.q_bias is None else modules._replace(qkv_biases=biases)


def _vision_refusal(block: Any) -> str | None:
    if block.attn.relative_position_bias_table is None:
        return None
    index = reference.relative_position_index(tuple(block.attn.window_size))
    if torch.equal(block.attn.relative_position_index.cpu(), index):
        return None
    return "its relative positions are not numbered like BEiT's"


VISION_BLOCK = LayerSpec(
    order="before",
    attention="attn",
    own=(nn.Module,),
    qkv=("attn.qkv",),
    proj="attn.proj",
    norms=("norm1", "norm2"),
    mlps=(Mlp(("mlp.fc1",), "mlp.act", "mlp.fc2", dropout="mlp.drop"),),
    heads="attn.num_heads",
    weights_p="attn.attn_drop",
    branch_p=("attn.proj_drop", ""),
    scales=("gamma_1", "gamma_2"),
    drop_paths=("drop_path", "drop_path"),
    scores=_vision_attention,
    also_takes=("rel_pos_bias", "image_atts"),
    adjust=_vision_biases,
    refuses=_vision_refusal,
)


class OfficialVisionBlock(FusedLayer):
    """Pre-norm block with position table, LayerScale and stochastic depth."""

    layer_spec = VISION_BLOCK

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        spec, attention, drop_path = VISION_BLOCK, find(module, "attn"), find(module, "drop_path")
        if not _is_unpackaged(module) or spec.missing(module) is not None:
            return False
        if not isinstance(drop_path, nn.Identity) and not hasattr(drop_path, "drop_prob"):
            return False
        if not all(hasattr(attention, name) for name in _BLOCK_ATTENTION):
            return False
        return hasattr(module, "gamma_1") and _argument_names(module) == _BLOCK_ARGUMENTS


class OfficialEmbeddings(FusedEmbeddings):
    """Embeddings matched by names and tested on an example."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        names = set(module._modules) - {"token_type_embeddings"}
        counts = hasattr(module, "padding_idx") or "position_ids" in module._buffers
        return _is_unpackaged(module) and names == _EMBEDDINGS and counts

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        reason = why_not_bypassed(module, cls.bypassed)
        if reason is not None:
            return reason
        words, positions = find(module, "word_embeddings"), find(module, "position_embeddings")
        assert isinstance(words, nn.Embedding)
        assert isinstance(positions, nn.Embedding)
        # Include padding ids: RoBERTa's positions skip them.
        count = min(_TRIED_TOKENS, words.num_embeddings, positions.num_embeddings // 2)
        ids = torch.arange(count, device=words.weight.device)[None].flip(1)
        return _why_not_equal(module, cls, settings, words.weight, ids)


class OfficialVocabularyHead(VocabularyHead):
    """Vocabulary head matched by names and tested on an example."""

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        names = set(module._modules)
        transform = find(module, "transform")
        matches = names == _ROBERTA_HEAD or (
            names == _BERT_HEAD and transform is not None and set(transform._modules) >= _TRANSFORM
        )
        return _is_unpackaged(module) and matches

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
        features = features.to(weight.device, weight.dtype)
        return _why_not_equal(module, cls, settings, weight, features)


def _why_not_equal(
    module: nn.Module, fused: type[Fused], settings: Settings, weight: Tensor, example: Tensor
) -> str | None:
    """Compare a fused form with its module on an example; returns why it is unfit, or None."""
    if weight.device.type == "meta":
        return "its parameters have no values yet, so it cannot be tested"
    try:
        before = model_outputs(module, example, hooks=False).get("")
        swap(module, fused, Settings(settings.kernels))
        try:
            with counted() as runs:
                after = model_outputs(module, example, hooks=False).get("")
        finally:
            restore(module)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        message = str(error).partition("\n")[0]
        return f"it failed on an example ({type(error).__name__}: {message})"
    if not runs[module]:
        return "its fused form does not cover its submodules"
    if before is None or after is None or before.shape != after.shape:
        return "its output on an example has another shape than its submodules compute"
    error = relative_error(before, after)
    if error <= BANDS.get(before.dtype, BANDS[torch.float32]):
        return None
    return f"its output on an example differs from what its submodules compute (by {error:.0e})"
