"""Masked-language heads of transformers: the loss without the logits of positions that have no label."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.kernels import host, ops
from xfm_fast.packing import Packing, on_host
from xfm_fast.replace.huggingface_text import UnpaddedModel, is_of, wants_named
from xfm_fast.replace.rules import Rule
from xfm_fast.replace.settings import Settings
from xfm_fast.replace.swapping import CalledByName, is_fused, observed, why_not_bypassed
from xfm_fast.replace.vocabulary_head import VocabularyHead

_MODELS = {
    "bert": "BertForMaskedLM",
    "camembert": "CamembertForMaskedLM",
    "data2vec": "Data2VecTextForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "xlm_roberta": "XLMRobertaForMaskedLM",
}
_BERT_HEADS = {"bert": "BertLMPredictionHead", "blip": "BlipTextLMPredictionHead"}
_ROBERTA_HEADS = {
    "camembert": "CamembertLMHead",
    "data2vec": "Data2VecTextLMHead",
    "roberta": "RobertaLMHead",
    "xlm_roberta": "XLMRobertaLMHead",
}
_IGNORED = -100


class FusedMaskedLM(CalledByName):
    """Encoder and head together: only positions with a label reach the loss, and padding no vocabulary.

    Logits are returned as the original returns them (their gradient too, should anybody use them), unless
    `skip_logits` was asked for.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        made = self._outputs(call) if self._covered(call) else None
        return super().forward(*args, **kwargs) if made is None else made

    def _head(self) -> Any:
        module: Any = self
        return module.cls.predictions if hasattr(module, "cls") else module.lm_head

    def _covered(self, call: dict[str, Any]) -> bool:
        """Whether labels can be looked at, and nobody observes the head."""
        module: Any = self
        head = self._head()
        watched = [head, *([module.cls] if hasattr(module, "cls") else [])]
        if any(observed(part) for part in watched) or not is_fused(head) or not head.intact():
            return False
        labels = call.get("labels")
        if labels is None:
            return self.settings.unpad
        tokens = call.get("input_ids") if call.get("inputs_embeds") is None else call["inputs_embeds"]
        if tokens is None or not isinstance(labels, Tensor) or labels.shape != tokens.shape[:2]:
            return False
        # The mean of no labels at all is for the original to return.
        return labels.device == tokens.device and _any(labels.ne(_IGNORED))

    def _outputs(self, call: dict[str, Any]) -> Any:
        from transformers.modeling_outputs import MaskedLMOutput

        labels, head = call.get("labels"), self._head()
        inputs = {name: value for name, value in call.items() if name not in ("labels", "return_dict")}
        module: Any = self
        base = getattr(module, module.base_model_prefix)
        run, states, packing, recorded = base, None, None, {}
        if isinstance(base, UnpaddedModel) and not observed(base):
            packed = None
            if labels is not None and _labels_padding(labels, call.get("attention_mask")):
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
        labelled = None if labels is None else _labelled(labels, packing)
        with self.settings.own_types(states.device):
            loss, logits = self._loss_and_logits(head, states, labelled)
        if logits is not None:
            padded: Any = logits
            shape = None if labels is None else labels.shape
            logits = packing.unpad(padded) if packing is not None else padded.unflatten(0, shape)
        out = MaskedLMOutput(loss=loss, logits=logits, **recorded)
        return out if wants_named(self, call) else out.to_tuple()

    def _loss_and_logits(
        self, head: Any, states: Tensor, labelled: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """States `[T, width]`; rows that have a label, and the labels."""
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


def _any(mask: Tensor) -> bool:
    return host.any_true(mask) if on_host(mask) else bool(mask.any())


def _labels_padding(labels: Tensor, mask: Any) -> bool:
    """Whether there are labels at padding: they count in the loss, whatever they are good for."""
    return isinstance(mask, Tensor) and mask.shape == labels.shape and _any(labels.ne(_IGNORED) & mask.eq(0))


def _labelled(labels: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    """Rows with a label, in packed order where there is a packing, and their labels."""
    flat = labels.flatten() if packing is None else packing.pack(labels)
    counted = flat.ne(_IGNORED)
    rows = host.true_places(counted) if on_host(counted) else counted.nonzero().flatten()
    return rows, flat.index_select(0, rows)


def _refusal(module: nn.Module, settings: Settings) -> str | None:
    model: Any = module
    head = model.cls.predictions if hasattr(model, "cls") else model.lm_head
    return why_not_bypassed(head, VocabularyHead.bypassed)


def _head_refusal(module: nn.Module, settings: Settings) -> str | None:
    return why_not_bypassed(module, VocabularyHead.bypassed)


def _is_head(module: nn.Module) -> bool:
    return is_of(_BERT_HEADS, module) or is_of(_ROBERTA_HEADS, module)


RULES: tuple[Rule, ...] = (
    Rule(
        "FusedMaskedLM",
        partial(is_of, _MODELS),
        FusedMaskedLM,
        "loss over labelled positions only, without their logits in full",
        _refusal,
    ),
    Rule("VocabularyHead", _is_head, VocabularyHead, "GELU fused; faster product with the vocabulary", _head_refusal),
)
