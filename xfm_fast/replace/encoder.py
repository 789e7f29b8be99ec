"""Text encoders without padding: embeddings, layers of a registered family and final norm on packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from xfm_fast.packing import Packing
from xfm_fast.replace.bert_layer import default_positions, plan, run_layer, to_own_tokens
from xfm_fast.replace.families import FamilyLayer, run_packed, short_name
from xfm_fast.replace.huggingface_text import FusedLayer
from xfm_fast.replace.masks import Spread
from xfm_fast.replace.structure import Attend
from xfm_fast.replace.swap import CalledByName, Settings, asks_beyond, find, observed, original_class, wants_named

_PLAIN = ("eager", "sdpa", "xfm_fast", None)
_WITHOUT_EFFECT = ("use_cache", "return_dict", "num_items_in_batch")


def _listed(model: Any, path: str) -> Iterable[nn.Module]:
    return attrgetter(path)(model)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Where a model keeps the modules around its layers: dotted names relative to the model."""

    model: str  # class name, in the form of `Family.layer`
    layers: str
    takes: tuple[str, ...]  # arguments of the embeddings with one entry per token
    embeddings: str = "embeddings"  # ids or given embeddings → states
    project: str = ""  # linear layer after the embeddings
    norm: str = ""  # after the last layer
    pooler: str = ""  # pools the states `[P, L, width]`, or token 0 if pooled_by is set
    pooled_by: str = ""  # function after the pooler
    bias: str = ""  # method that returns the position bias for states `[P, L, width]`
    rotary: str = ""  # module that returns cos and sin for states, positions and, if kind is set, the kind of layer
    kind: str = ""  # layer attribute; "sliding_attention" limits attention to the config's sliding_window
    # layers in execution order, for models that run a layer several times
    sequence: Callable[[Any, str], Iterable[nn.Module]] = _listed
    has_pooled: bool = True  # the output has a field for the pooled state


_encoders: dict[str, Encoder] = {}


def register_encoder(*encoders: Encoder) -> None:
    """Register models for `accelerate(..., unpad=True)`."""
    _encoders.update({encoder.model: encoder for encoder in encoders})
    encoder_of.cache_clear()


@cache
def encoder_of(kind: type[nn.Module]) -> Encoder | None:
    """The row of a model class, or None."""
    return _encoders.get(f"{kind.__module__}.{kind.__qualname__}") or _encoders.get(short_name(kind))


class UnpaddedEncoder(CalledByName):
    """A whole encoder on packed tokens; states at padding are zero."""

    encoder_row: ClassVar[Encoder]

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        return {**super().adapted(original), "encoder_row": encoder_of(original)}

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        if not settings.unpad:
            return "it computes padding; unpad=True skips it"
        if getattr(module.config, "is_decoder", False):
            return "a causal decoder keeps its padding"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        planned = self._planned(call)
        if planned is None:
            return super().forward(*args, **kwargs)
        from transformers import modeling_outputs

        packing, mask = planned
        with self.settings.own_types(mask.device):
            states: Any = packing.unpad(self._run(call, packing, mask))
        if self.encoder_row.has_pooled:
            pooled = self._pooled(states)
            out = modeling_outputs.BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)
        else:
            out = modeling_outputs.BaseModelOutput(last_hidden_state=states)
        return out if wants_named(self, call) else out.to_tuple()

    def _planned(self, call: dict[str, Any]) -> tuple[Packing, Tensor] | None:
        """Packing and mask of a call; None for calls that keep padding."""
        row, config, mask = self.encoder_row, self.config, cast(Any, call.get("attention_mask"))
        given = [call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None]
        if asks_beyond(call, (*row.takes, "attention_mask", "position_ids", *_WITHOUT_EFFECT)) or len(given) != 1:
            return None
        recorded: Any = any(getattr(config, name, False) for name in ("output_attentions", "output_hidden_states"))
        if recorded or getattr(config, "_attn_implementation", None) not in _PLAIN:
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != given[0].shape[:2]:
            return None
        if not self._ready():
            return None
        planned = plan(mask, keep_first=self._has_pooler())
        return None if planned is None else (planned[0], mask.bool())

    def _ready(self) -> bool:
        """True if no bypassed part has hooks and every layer can run on packed tokens."""
        row = self.encoder_row
        around = {row.layers.rpartition(".")[0], row.embeddings, row.project} - {""}
        parts = [find(self, name) for name in around]
        layers = list(row.sequence(self, row.layers))
        if any(part is not None and observed(part) for part in (*parts, *layers)):
            return False
        return all(isinstance(layer, (FamilyLayer, FusedLayer)) and layer.intact() for layer in layers)

    def _has_pooler(self) -> bool:
        return bool(self.encoder_row.pooler) and find(self, self.encoder_row.pooler) is not None

    def _pooled(self, states: Tensor) -> Tensor | None:
        row = self.encoder_row
        if not self._has_pooler():
            return None
        pooler = attrgetter(row.pooler)(self)
        return attrgetter(row.pooled_by)(self)(pooler(states[:, 0])) if row.pooled_by else pooler(states)

    def _run(self, call: dict[str, Any], packing: Packing, mask: Tensor) -> Tensor:
        row, module = self.encoder_row, self
        positions = self._positions(call, packing)
        x = self._embedded(call, packing, positions)
        own = to_own_tokens(packing, self.settings)
        bias = None
        if row.bias:
            # The method reads only the shape of its argument.
            bias = attrgetter(row.bias)(module)(x.new_empty(1, packing.shape[1], 1))
        attends: dict[str, tuple[Attend, Any]] = {}
        for layer in row.sequence(module, row.layers):
            kind = getattr(layer, row.kind) if row.kind else ""
            if kind not in attends:
                window = getattr(module.config, "sliding_window", None) if kind == "sliding_attention" else None
                # Texts no longer than the window attend to all of their tokens.
                local = window is not None and packing.shape[1] > window + 1
                attend = own
                if bias is not None or local:
                    attend = Spread(packing, mask, bias, window if local else None)
                rotary = None
                if row.rotary:
                    named = (kind,) if row.kind else ()
                    cos, sin = attrgetter(row.rotary)(module)(x, positions[None], *named)
                    rotary = cos[0], sin[0]
                attends[kind] = attend, rotary
            x = self._layer(layer, x, *attends[kind])
        norm = find(module, row.norm) if row.norm else None
        return x if norm is None else norm(x)

    def _layer(self, layer: Any, x: Tensor, attend: Attend, rotary: Any) -> Tensor:
        if isinstance(layer, FusedLayer):
            run: Any = partial(run_layer, layer, attend=attend, settings=self.settings, intact=True)
        else:
            run = partial(run_packed, layer, attend, rotary)
        # transformers 5 keeps activations out of memory layer by layer.
        whole: Any = layer
        checkpointed = getattr(whole, "gradient_checkpointing", False) and whole.training and torch.is_grad_enabled()
        return whole._gradient_checkpointing_func(run, x) if checkpointed else run(x)

    def _positions(self, call: dict[str, Any], packing: Packing) -> Tensor:
        """Position ids of the packed tokens."""
        positions, embeddings = call.get("position_ids"), attrgetter(self.encoder_row.embeddings)(self)
        if positions is None:
            tokens = call.get("input_ids")
            if tokens is None:
                # Without ids, RoBERTa treats every token as real.
                tokens = call["attention_mask"].new_full(packing.shape, -1)
            if hasattr(embeddings, "padding_idx") or hasattr(embeddings, "position_ids"):
                positions = default_positions(embeddings, tokens)
            else:
                positions = torch.arange(packing.shape[1], device=tokens.device)[None]
        return packing.pack(positions.expand(packing.shape))

    def _embedded(self, call: dict[str, Any], packing: Packing, positions: Tensor) -> Tensor:
        """Embeddings `[T, width]`; the embedding module sees one long text."""
        row = self.encoder_row
        inputs: dict[str, Any] = {
            name: packing.pack(call[name])[None] for name in row.takes if call.get(name) is not None
        }
        embeddings: Any = find(self, row.embeddings)
        if "position_ids" in row.takes:
            inputs["position_ids"] = positions[None]
        if "input_ids" not in inputs:
            inputs["input_ids"] = None
        x = embeddings(**inputs)
        project = find(self, row.project) if row.project else None
        return (x if project is None else project(x))[0]


def is_encoder(module: nn.Module) -> bool:
    """True if the model has a registered `Encoder` row."""
    return encoder_of(original_class(module)) is not None
