"""Embeddings, vocabulary heads and masked-language models of BERT's relatives in fused ops."""

from __future__ import annotations

from bisect import bisect
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import host, ops
from xfm_fast.kernels.checks import Embedding
from xfm_fast.kernels.cpu.norms import embedding_norm_forward
from xfm_fast.packing import on_host
from xfm_fast.plans.plan import infers
from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.swap import (
    CalledByName,
    Settings,
    is_fused,
    observed,
    returns_dict,
    why_not_bypassed,
)

_IGNORED = -100
_FEW_TOKENS = 128  # whose logits fit the cache


class FusedEmbeddings(CalledByName):
    """Word, position and type embeddings with LayerNorm in one pass."""

    benefit: ClassVar[str] = "three tables and LayerNorm in one pass"
    replaces: ClassVar[Any] = (
        "albert.AlbertEmbeddings",
        "bert.BertEmbeddings",
        "blip.BlipTextEmbeddings",
        "camembert.CamembertEmbeddings",
        "data2vec.Data2VecTextEmbeddings",
        "data2vec.Data2VecTextForTextEmbeddings",
        "distilbert.Embeddings",
        "electra.ElectraEmbeddings",
        "mpnet.MPNetEmbeddings",
        "roberta.RobertaEmbeddings",
        "xlm_roberta.XLMRobertaEmbeddings",
    )
    bypassed: ClassVar[Any] = {
        "word_embeddings": nn.Embedding,
        "position_embeddings": nn.Embedding,
        "token_type_embeddings": nn.Embedding,
        "LayerNorm": nn.LayerNorm,
        "dropout": nn.Dropout,
    }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        tokens = call.get("input_ids")
        if tokens is None or not self._covers(call) or not self.intact():
            return super().forward(*args, **kwargs)
        positions = call.get("position_ids")
        if positions is None:
            positions = default_positions(self, tokens)
        with self.settings.without_autocast(tokens.device):
            return self.embed(tokens, positions.expand(tokens.shape))

    def _covers(self, call: dict[str, Any]) -> bool:
        """Return whether the fused op computes a call: ids of token type 0, without a cache."""
        past = call.get("cache_length", call.get("past_key_values_length", 0))
        if call.get("inputs_embeds") is not None or not isinstance(past, int) or past:
            return False
        types = call.get("token_type_ids")
        # On an accelerator the check would sync.
        if types is not None and (not on_host(types) or host.any_true(types.ne(0))):
            return False
        return self._has_exact_gradient()

    def _has_exact_gradient(self) -> bool:
        """Return whether the op's gradient is `nn.Embedding`'s: no max_norm, sparse, or two padding_idx."""
        module: Any = self
        words, positions = module.word_embeddings, module.position_embeddings
        for table in (words, positions):
            if table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
                return False
        return not torch.is_grad_enabled() or words.padding_idx == positions.padding_idx

    def embed(
        self,
        tokens: Tensor | None,
        positions: Tensor,
        types: Tensor | None = None,
        embeds: Tensor | None = None,
    ) -> Tensor:
        """Embed token ids, or word embeddings: `[..., width]` after LayerNorm and dropout."""
        self.count()
        module: Any = self
        table, norm = getattr(module, "token_type_embeddings", None), module.LayerNorm
        word, position = module.word_embeddings, module.position_embeddings
        if embeds is None and types is None and self._has_exact_gradient():
            assert tokens is not None
            type_0 = torch.zeros_like(norm.weight) if table is None else table.weight[0]
            tables = (word.weight, position.weight, type_0)
            args = (tokens, positions, *tables, norm.weight, norm.bias, norm.eps)
            if (
                infers(self.settings.backend, word.weight)
                and word.weight.dtype == norm.weight.dtype
            ):
                normed = embedding_norm_forward(Embedding(*args))[0]
            else:
                backend = self.settings.backend
                normed = ops.embed_layer_norm(*args, padding_idx=word.padding_idx, backend=backend)
        else:
            summed = word(tokens) if embeds is None else embeds
            if table is not None:
                summed = summed + (table.weight[0] if types is None else table(types))
            summed = summed + position(positions)
            normed = F.layer_norm(summed, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return module.dropout(normed)


def default_positions(embeddings: Any, tokens: Tensor) -> Tensor:
    """Return position ids `[P, L]` or `[1, L]`: BERT counts all tokens, RoBERTa skips padding."""
    pad = getattr(embeddings, "padding_idx", None)
    if pad is None:
        return embeddings.position_ids[:, : tokens.shape[1]]
    real = tokens.ne(pad)
    return real.cumsum(1) * real + pad


class VocabularyHead(CalledByName):
    """Masked-language head: dense, GELU, LayerNorm and vocabulary projection."""

    benefit: ClassVar[str] = "GELU fused; faster vocabulary projection"
    replaces: ClassVar[Any] = (
        "bert.BertLMPredictionHead",
        "blip.BlipTextLMPredictionHead",
        "camembert.CamembertLMHead",
        "data2vec.Data2VecTextLMHead",
        "mpnet.MPNetLMHead",
        "roberta.RobertaLMHead",
        "xlm_roberta.XLMRobertaLMHead",
    )
    multiplies_in_eight_bits: ClassVar[bool] = False
    bypassed: ClassVar[Any] = {
        "dense": (nn.Linear, Adaptable),
        "layer_norm": nn.LayerNorm,
        "transform.dense": (nn.Linear, Adaptable),
        "transform.LayerNorm": nn.LayerNorm,
        "decoder": nn.Linear,
    }

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        features = self.arguments(args, kwargs).get(self.names[0])
        if features is None or not self.intact():
            return super().forward(*args, **kwargs)
        with self.settings.without_autocast(features.device):
            return self.logits(self.transformed(features))

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return why_not_bypassed(module, cls.bypassed)

    def intact(self) -> bool:
        transform = self._modules.get("transform")
        return super().intact() and (transform is None or not observed(transform))

    def transformed(self, features: Tensor) -> Tensor:
        """Compute the input of the vocabulary projection from `[..., width]`."""
        self.count()
        module, settings = cast(Any, self), self.settings
        if "transform" in self._modules:
            transform = module.transform
            dense, norm = transform.dense, transform.LayerNorm
            activation = transform.transform_act_fn
        else:
            # RoBERTa's head calls F.gelu, BERT's has a module.
            dense, norm, activation = module.dense, module.layer_norm, F.gelu
        x = settings.activated(features, dense, activation)
        scale, shift = settings.affine(norm.weight, norm.bias)
        scale, shift = scale.to(x.dtype), shift.to(x.dtype)
        return ops.layer_norm(x, scale, shift, norm.eps, backend=settings.backend)

    def vocabulary(self) -> tuple[Tensor, Tensor | None]:
        """Return weight `[V, width]` and bias `[V]` in the compute dtype."""
        module: Any = self
        return self.settings.affine(module.decoder.weight, module.decoder.bias)

    def logits(self, transformed: Tensor) -> Tensor:
        """Project `[..., width]` to the vocabulary: `[..., V]`."""
        weight, bias = self.vocabulary()
        return ops.linear(transformed, weight, bias, backend=self.settings.backend)


class FusedMaskedLM(CalledByName):
    """Encoder and masked-language head: only labelled positions reach the loss."""

    benefit: ClassVar[str] = "loss over labelled positions only, without their logits in full"
    replaces: ClassVar[Any] = (
        "bert.BertForMaskedLM",
        "camembert.CamembertForMaskedLM",
        "data2vec.Data2VecTextForMaskedLM",
        "roberta.RobertaForMaskedLM",
        "xlm_roberta.XLMRobertaForMaskedLM",
    )

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return why_not_bypassed(_head_of(module), VocabularyHead.bypassed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        outputs = self._outputs(call) if self._covered(call) else None
        return super().forward(*args, **kwargs) if outputs is None else outputs

    def _covered(self, call: dict[str, Any]) -> bool:
        """Return whether the labels can be read and the head has no hooks."""
        head = _head_of(self)
        if observed(head) or not is_fused(head) or not head.intact():
            return False
        if hasattr(self, "cls") and observed(cast(Any, self).cls):
            return False
        labels = call.get("labels")
        if labels is None:
            return self.settings.unpad
        tokens = call.get("inputs_embeds")
        if tokens is None:
            tokens = call.get("input_ids")
        if tokens is None or not isinstance(labels, Tensor) or labels.shape != tokens.shape[:2]:
            return False
        # Without any label the mean is undefined: run the original.
        return labels.device == tokens.device and _any(labels.ne(_IGNORED))

    def _outputs(self, call: dict[str, Any]) -> Any:
        from transformers.modeling_outputs import MaskedLMOutput

        module: Any = self
        labels, head = call.get("labels"), _head_of(self)
        inputs = dict(call)
        inputs.pop("labels", None)
        inputs.pop("return_dict", None)
        base = getattr(module, module.base_model_prefix)
        states, packing, recorded = None, None, {}
        run = base
        if is_fused(base) and hasattr(base, "packed") and not observed(base):
            mask = call.get("attention_mask")
            # Labels at padding count in the loss.
            if labels is not None and isinstance(mask, Tensor) and mask.shape == labels.shape:
                run = base.padded if _any(labels.ne(_IGNORED) & mask.eq(0)) else base
            if run is base:
                states, packing = base.packed(inputs) or (None, None)
        if states is None:
            if labels is None:
                return None
            outputs = run(**inputs, return_dict=True)
            states = outputs.last_hidden_state.flatten(0, 1)
            recorded = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        labelled = None
        if labels is not None:
            flat = labels.flatten() if packing is None else packing.pack(labels)
            mask = flat.ne(_IGNORED)
            rows = host.true_places(mask) if on_host(mask) else mask.nonzero().flatten()
            labelled = rows, flat.index_select(0, rows)
        with self.settings.without_autocast(states.device):
            loss, logits = self._loss_and_logits(head, states, labelled)
        if logits is not None:
            if packing is not None:
                logits = packing.unpad(logits)
            elif labels is not None:
                logits = logits.unflatten(0, labels.shape)
        out = MaskedLMOutput(loss=loss, logits=logits, **recorded)
        return out if returns_dict(self, call) else out.to_tuple()

    def largest_logits(self, call: dict[str, Any]) -> Tensor | None:
        """Return the largest logits of each text, `[P, V]`; None if the original must run.

        Few tokens at a time: their logits fit the cache, those of a batch hardly fit the memory.
        """
        module, head = cast(Any, self), _head_of(self)
        base = getattr(module, module.base_model_prefix)
        if not hasattr(base, "packed") or observed(base) or not self._covered(call):
            return None
        packed = base.packed(call)
        if packed is None:
            return None
        states, packing = packed
        self.count()
        bounds, start, largest = host.integers(packing.cu_seqlens), 0, list[Tensor]()
        with self.settings.without_autocast(states.device):
            states = head.transformed(states)
            while start < packing.shape[0]:
                stop = max(start + 1, bisect(bounds, bounds[start] + _FEW_TOKENS) - 1)
                logits = head.logits(states[bounds[start] : bounds[stop]])
                lengths = [b - a for a, b in pairwise(bounds[start : stop + 1])]
                largest += [chunk.amax(0) for chunk in logits.split(lengths)]
                start = stop
        return torch.stack(largest)

    def _loss_and_logits(
        self, head: Any, states: Tensor, labelled: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute loss and logits of states `[T, width]`; `labelled` holds rows and labels."""
        self.count()
        if labelled is None:
            return None, head.logits(head.transformed(states))
        rows, targets = labelled
        logits = None
        if self.settings.skip_logits and self.training:
            transformed = head.transformed(states.index_select(0, rows))
        else:
            transformed = head.transformed(states)
            logits = head.logits(transformed)
            transformed = transformed.index_select(0, rows)
        backend = self.settings.backend
        weight, bias = head.vocabulary()
        loss = ops.linear_cross_entropy(transformed, weight, bias, targets, backend=backend)
        return loss.to(states.dtype) if states.dtype == torch.float64 else loss, logits


def _head_of(model: Any) -> Any:
    return model.cls.predictions if hasattr(model, "cls") else model.lm_head


def _any(mask: Tensor) -> bool:
    return host.any_true(mask) if on_host(mask) else bool(mask.any())
