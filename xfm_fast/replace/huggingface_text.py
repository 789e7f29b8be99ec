"""BERT, RoBERTa and their relatives in transformers: layers, encoders, masked-language heads."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from xfm_fast.kernels import host, ops
from xfm_fast.kernels.derived import derived
from xfm_fast.packing import on_host
from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.bert_layer import (
    BertLayer,
    FusedEmbeddings,
    Padded,
    VocabularyHead,
    padded_memory,
    run_layer,
)
from xfm_fast.replace.cached_plan import forget
from xfm_fast.replace.encoder import IGNORE_MEMORY_MASK, Encoder, UnpaddedEncoder, register_encoder
from xfm_fast.replace.swap import (
    CalledByName,
    Rule,
    Settings,
    has_other_arguments,
    is_fused,
    observed,
    original_class,
    returns_dict,
    why_not_bypassed,
)

# Classes with BERT's layer forward, and with BERT's or RoBERTa's encoder forward, by package of transformers.
_LAYERS = {
    "align": "AlignTextLayer",
    "altclip": "AltRobertaLayer",
    "bert": "BertLayer",
    "bert_generation": "BertGenerationLayer",
    "blip": "BlipTextLayer",
    "camembert": "CamembertLayer",
    "chinese_clip": "ChineseCLIPTextLayer",
    "clap": "ClapTextLayer",
    "data2vec": "Data2VecTextLayer",
    "electra": "ElectraLayer",
    "ernie": "ErnieLayer",
    "layoutlm": "LayoutLMLayer",
    "rembert": "RemBertLayer",
    "roberta": "RobertaLayer",
    "roc_bert": "RoCBertLayer",
    "xlm_roberta": "XLMRobertaLayer",
}
_MODELS = (
    *("bert.BertModel", "blip.BlipTextModel", "camembert.CamembertModel", "data2vec.Data2VecTextModel"),
    *("roberta.RobertaModel", "xlm_roberta.XLMRobertaModel"),
)
_EMBEDDINGS = {
    "albert": "AlbertEmbeddings",
    "bert": "BertEmbeddings",
    "blip": "BlipTextEmbeddings",
    "camembert": "CamembertEmbeddings",
    "data2vec": "Data2VecTextEmbeddings Data2VecTextForTextEmbeddings",
    "distilbert": "Embeddings",
    "electra": "ElectraEmbeddings",
    "mpnet": "MPNetEmbeddings",
    "roberta": "RobertaEmbeddings",
    "xlm_roberta": "XLMRobertaEmbeddings",
}
_MASKED_LM = {
    "bert": "BertForMaskedLM",
    "camembert": "CamembertForMaskedLM",
    "data2vec": "Data2VecTextForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "xlm_roberta": "XLMRobertaForMaskedLM",
}
_HEADS = {
    "bert": "BertLMPredictionHead",
    "blip": "BlipTextLMPredictionHead",
    "camembert": "CamembertLMHead",
    "data2vec": "Data2VecTextLMHead",
    "mpnet": "MPNetLMHead",
    "roberta": "RobertaLMHead",
    "xlm_roberta": "XLMRobertaLMHead",
}
# Attention implementations that compute the plain function.
_PLAIN_ATTENTION = ("eager", "sdpa", "xfm_fast", None)
# Arguments without effect on the fused forms.
_WITHOUT_EFFECT = {"position_ids", "use_cache", "return_dict", "cache_position", "num_items_in_batch"}
_IGNORED = -100


def is_of(table: dict[str, str], module: nn.Module) -> bool:
    """True if the table names the module's class; names of several versions are separated by spaces."""
    kind = original_class(module)
    package = kind.__module__.split(".")
    known = package[:2] == ["transformers", "models"] and len(package) > 2
    return known and kind.__name__ in table.get(package[2], "").split()


class FusedLayer(BertLayer):
    """A BERT layer: one GEMM for query, key and value; linear, residual and norm in one pass."""

    returns_tuple: ClassVar[bool] = False
    _understood: ClassVar[set[str]] = {
        "hidden_states",
        "attention_mask",
        "encoder_hidden_states",
        "encoder_attention_mask",
    }

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        family = vars(sys.modules[original.__module__])
        prefix = original.__name__.removesuffix("Layer")

        def kinds(*names: str) -> tuple[type[nn.Module], ...]:
            return tuple(family[prefix + name] for name in names if prefix + name in family)

        expected: dict[str, tuple[type[nn.Module], ...]] = {"intermediate": kinds("Intermediate")}
        for branch in ("attention", "crossattention"):
            expected[branch] = kinds("Attention")
            expected[f"{branch}.self"] = kinds("SelfAttention", "SdpaSelfAttention", "CrossAttention")
            expected[f"{branch}.output"] = kinds("SelfOutput")
            expected[f"{branch}.self.dropout"] = (nn.Dropout,)
            for name in ("query", "key", "value"):
                expected[f"{branch}.self.{name}"] = (nn.Linear, Adaptable)
        expected["output"] = kinds("Output")
        expected["intermediate.dense"] = (nn.Linear, Adaptable)
        for end in ("attention.output", "crossattention.output", "output"):
            expected |= {f"{end}.dense": (nn.Linear, Adaptable), f"{end}.LayerNorm": (nn.LayerNorm,)}
            expected[f"{end}.dropout"] = (nn.Dropout,)
        named = super().adapted(original)
        return {**named, "bypassed": expected, "returns_tuple": "output_attentions" in named["names"]}

    def release(self) -> None:
        forget(self)
        super().release()

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        layer: Any = module
        attention = layer.attention.self
        positions = getattr(attention, "position_embedding_type", "absolute")
        if positions not in ("absolute", None):
            return f"its attention has {positions} positions"
        if layer.chunk_size_feed_forward:
            return f"its feed-forward runs in chunks of {layer.chunk_size_feed_forward}"
        implementation = _implementation(attention)
        if implementation not in _PLAIN_ATTENTION:
            return f"its attention implementation is {implementation}"
        adapted = cls.adapted(original_class(module))
        if "past_key_value" in adapted["names"] and getattr(layer, "is_decoder", True):
            return "in this version of transformers a decoder's layer returns keys and values"
        return why_not_bypassed(module, adapted["bypassed"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        if (
            has_other_arguments(call, self._understood | _WITHOUT_EFFECT | {"output_hidden_states"})
            or not self.intact()
        ):
            return super().forward(*args, **kwargs)
        x, mask = call["hidden_states"], call.get("attention_mask")
        states, their_mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if not getattr(self, "is_decoder", True):
            states = None
        unmasked = original_class(self).__name__ in IGNORE_MEMORY_MASK
        if unmasked and _hides_nothing(their_mask):
            their_mask = None
        attention = cast(Any, self).attention.self
        covered = _implementation(attention) in _PLAIN_ATTENTION and x.ndim == 3 and _covers_mask(attention, mask)
        if states is not None:
            covered &= hasattr(self, "crossattention") and _covers_mask(attention, their_mask)
            covered &= not unmasked or their_mask is None
        if not covered:
            return super().forward(*args, **kwargs)
        causal = mask is None and x.shape[1] > 1 and _hides_later_keys(attention)
        with self.settings.own_types(x.device):
            memory = None if states is None else padded_memory(states, their_mask)
            out = run_layer(self, x, Padded(mask, causal), self.settings, memory, intact=True)
        return (out,) if self.returns_tuple else out


def _covers_mask(attention: Any, mask: Any) -> bool:
    """True if the fused form interprets a mask as the attention implementation does."""
    implementation = _implementation(attention)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return implementation == "xfm_fast"
    # Eager attention adds a boolean mask as ones and zeros; leave that to the original.
    boolean = implementation not in ("eager", None)
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 4 and (mask.is_floating_point() or boolean))


def _hides_nothing(mask: Any) -> bool:
    """True if an additive mask is all zeros; transformers 4 passes one to BLIP by default."""
    if not isinstance(mask, Tensor) or not mask.is_floating_point() or torch.compiler.is_compiling():
        return False
    # All layers get the same mask, and reading it syncs an accelerator.
    return derived("hides nothing", (mask,), lambda: not mask.any())


def _implementation(attention: Any) -> str | None:
    """Name of a module's attention implementation in transformers."""
    return getattr(getattr(attention, "config", None), "_attn_implementation", None)


def _hides_later_keys(attention: Any) -> bool:
    """True if attention without a mask is causal, the default of SDPA in transformers."""
    if "SdpaSelfAttention" in original_class(attention).__name__:
        return bool(attention.is_decoder)
    return _implementation(attention) in ("sdpa", "xfm_fast") and bool(getattr(attention, "is_causal", True))


class FusedMaskedLM(CalledByName):
    """Encoder and masked-language head: only labelled positions reach the loss, and no padding the vocabulary."""

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return why_not_bypassed(_head_of(module), VocabularyHead.bypassed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        made = self._outputs(call) if self._covered(call) else None
        return super().forward(*args, **kwargs) if made is None else made

    def _covered(self, call: dict[str, Any]) -> bool:
        """True if the labels can be read and the head has no hooks."""
        module: Any = self
        head = _head_of(self)
        watched = [head, *([module.cls] if hasattr(module, "cls") else [])]
        if any(observed(part) for part in watched) or not is_fused(head) or not head.intact():
            return False
        labels = call.get("labels")
        if labels is None:
            return self.settings.unpad
        tokens = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
        if tokens is None or not isinstance(labels, Tensor) or labels.shape != tokens.shape[:2]:
            return False
        # Without any label the mean is undefined: run the original.
        return labels.device == tokens.device and _any(labels.ne(_IGNORED))

    def _outputs(self, call: dict[str, Any]) -> Any:
        from transformers.modeling_outputs import MaskedLMOutput

        labels, head = call.get("labels"), _head_of(self)
        inputs = {name: value for name, value in call.items() if name not in ("labels", "return_dict")}
        module: Any = self
        base = getattr(module, module.base_model_prefix)
        run, states, packing, recorded = base, None, None, {}
        if isinstance(base, UnpaddedEncoder) and not observed(base):
            packed, mask = None, call.get("attention_mask")
            alike = labels is not None and isinstance(mask, Tensor) and mask.shape == labels.shape
            # Labels at padding count in the loss.
            if alike and _any(cast(Tensor, labels).ne(_IGNORED) & cast(Tensor, mask).eq(0)):
                run = base.padded
            else:
                packed = base.packed(inputs)
            if packed is not None:
                states, packing = packed
        if states is None:
            if labels is None:
                return None
            outputs = run(**inputs, return_dict=True)
            states = outputs.last_hidden_state.flatten(0, 1)
            recorded = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        labelled = None
        if labels is not None:
            flat = labels.flatten() if packing is None else packing.pack(labels)
            counted = flat.ne(_IGNORED)
            rows = host.true_places(counted) if on_host(counted) else counted.nonzero().flatten()
            labelled = rows, flat.index_select(0, rows)
        with self.settings.own_types(states.device):
            loss, logits = self._loss_and_logits(head, states, labelled)
        if logits is not None:
            padded: Any = logits
            shape = None if labels is None else labels.shape
            logits = packing.unpad(padded) if packing is not None else padded.unflatten(0, shape)
        out = MaskedLMOutput(loss=loss, logits=logits, **recorded)
        return out if returns_dict(self, call) else out.to_tuple()

    def _loss_and_logits(
        self, head: Any, states: Tensor, labelled: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss and logits of states `[T, width]`; `labelled` holds rows and labels."""
        skip = self.settings.skip_logits and self.training and labelled is not None
        transformed = None if skip else head.transformed(states)
        logits = None if transformed is None else head.logits(transformed)
        if labelled is None:
            return None, logits
        rows, targets = labelled
        chosen = states.index_select(0, rows) if transformed is None else transformed.index_select(0, rows)
        chosen = head.transformed(chosen) if transformed is None else chosen
        weight, bias = head.vocabulary()
        loss = ops.linear_cross_entropy(chosen, weight, bias, targets, backend=self.settings.backend)
        return loss.to(states.dtype if states.dtype == torch.float64 else loss.dtype), logits


def _head_of(model: Any) -> Any:
    return model.cls.predictions if hasattr(model, "cls") else model.lm_head


def _any(mask: Tensor) -> bool:
    return host.any_true(mask) if on_host(mask) else bool(mask.any())


register_encoder(
    *(
        Encoder(
            model=model,
            layers="encoder.layer",
            takes=("input_ids", "inputs_embeds", "position_ids", "token_type_ids"),
            pooler="pooler",
            output="BaseModelOutputWithPoolingAndCrossAttentions",
            memory=True,
        )
        for model in _MODELS
    )
)

RULES: tuple[Rule, ...] = (
    Rule("FusedLayer", partial(is_of, _LAYERS), FusedLayer, "one product for q, k, v; GELU, residual and norm fused"),
    Rule("FusedEmbeddings", partial(is_of, _EMBEDDINGS), FusedEmbeddings, "three tables and LayerNorm in one pass"),
    Rule(
        "FusedMaskedLM",
        partial(is_of, _MASKED_LM),
        FusedMaskedLM,
        "loss over labelled positions only, without their logits in full",
    ),
    Rule("VocabularyHead", partial(is_of, _HEADS), VocabularyHead, "GELU fused; faster product with the vocabulary"),
)
