"""Text encoders without padding: embeddings, layers and final norm on packed tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xfm_fast.kernels import host
from xfm_fast.packing import Packing, offsets, on_host
from xfm_fast.replace.attention import Attend, Memory, Packed, Padded, Spread, to_own_tokens
from xfm_fast.replace.heads import FusedEmbeddings, default_positions
from xfm_fast.replace.layer import PLAIN_ATTENTION, can_run_packed, short_name
from xfm_fast.replace.swap import (
    CalledByName,
    Fused,
    Rule,
    Settings,
    find,
    has_other_arguments,
    observed,
    original_class,
    returns_dict,
)

_WITHOUT_EFFECT = ("use_cache", "return_dict", "cache_position", "num_items_in_batch")
_MEMORY = ("encoder_hidden_states", "encoder_attention_mask")
# transformers drops BLIP's image mask; calls with one run the original.
IGNORE_MEMORY_MASK = ("BlipTextLayer", "BlipTextModel")


def _listed(model: Any, path: str) -> Iterable[nn.Module]:
    return attrgetter(path)(model)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Where a model keeps the modules around its layers: dotted names relative to the model."""

    model: str  # class name, in the form of `LayerSpec.layer`
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
    output: str = "BaseModelOutputWithPooling"  # class of the output in transformers
    memory: bool = False  # supports cross-attention


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
        if getattr(module.config, "is_decoder", False) and original_class(module).__name__ != "BlipTextModel":
            return "a causal decoder keeps its padding"
        return None

    def declines(self) -> str | None:
        layers = [layer for layer in self._layers() if isinstance(layer, Fused)]
        reasons = [reason for layer in layers if (reason := layer.declines()) is not None]
        return f"it computes padding: in a layer, {reasons[0]}" if reasons else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        packed = self.packed(call)
        if packed is None:
            return self.padded(*args, **kwargs)
        from transformers import modeling_outputs

        x, packing = packed
        states: Any = packing.unpad(x)
        made = {"last_hidden_state": states}
        if self.encoder_row.output != "BaseModelOutput":
            made["pooler_output"] = self._pooled(states)
        out = getattr(modeling_outputs, self.encoder_row.output)(**made)
        return out if returns_dict(self, call) else out.to_tuple()

    def padded(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with padding."""
        return super().forward(*args, **kwargs)

    def packed(self, call: dict[str, Any]) -> tuple[Tensor, Packing] | None:
        """Final states `[T, width]` and their packing; None for calls that keep padding."""
        row, mask, memory_mask = self.encoder_row, call.get("attention_mask"), call.get("encoder_attention_mask")
        given = [call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None]
        understood = (*row.takes, "attention_mask", "position_ids", *_WITHOUT_EFFECT, *(_MEMORY if row.memory else ()))
        if has_other_arguments(call, understood) or len(given) != 1 or not self._ready(call):
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != given[0].shape[:2]:
            return None
        if memory_mask is not None and (not isinstance(memory_mask, Tensor) or memory_mask.ndim != 2):
            return None
        planned = plan(mask, memory_mask, keep_first=self._has_pooler())
        if planned is None:
            return None
        packing, whole_memory = planned
        if not whole_memory:
            # BLIP ignores the memory mask, and in transformers 4 so does every model that is no decoder.
            version = int(sys.modules["transformers"].__version__.split(".")[0])
            if version < 5 or original_class(self).__name__ in IGNORE_MEMORY_MASK:
                return None
        states, memory = call.get("encoder_hidden_states"), None
        if states is not None and hasattr(self._layers()[0], "crossattention"):
            memory = packed_memory(states, None if whole_memory else memory_mask, packing)
        with self.settings.own_types(mask.device):
            return self._run(call, packing, mask.bool(), memory), packing

    def _layers(self) -> list[Any]:
        return list(self.encoder_row.sequence(self, self.encoder_row.layers))

    def _ready(self, call: dict[str, Any]) -> bool:
        """True if no bypassed part has hooks and every layer can run on packed tokens."""
        row, config, layers = self.encoder_row, self.config, self._layers()
        recorded: Any = any(getattr(config, name, False) for name in ("output_attentions", "output_hidden_states"))
        if recorded or getattr(config, "_attn_implementation", None) not in PLAIN_ATTENTION:
            return False
        if call.get("encoder_hidden_states") is not None:
            crosses = hasattr(layers[0], "crossattention") or not getattr(layers[0], "is_decoder", True)
            if not crosses:
                return False
        parts = [find(self, name) for name in {self._holder, row.embeddings, row.project} - {""}]
        if any(part is not None and observed(part) for part in parts):
            return False
        embeddings: Any = find(self, row.embeddings)
        if isinstance(embeddings, FusedEmbeddings):
            if not embeddings.intact():
                return False
        elif row.memory:
            # BERT's original cuts its buffer of token types, which may be shorter than the packed texts.
            return False
        return can_run_packed(layers)

    @property
    def _holder(self) -> str:
        """Name of the module around the layers."""
        return self.encoder_row.layers.rpartition(".")[0]

    def _has_pooler(self) -> bool:
        return bool(self.encoder_row.pooler) and find(self, self.encoder_row.pooler) is not None

    def _pooled(self, states: Tensor) -> Tensor | None:
        row = self.encoder_row
        if not self._has_pooler():
            return None
        pooler = attrgetter(row.pooler)(self)
        return attrgetter(row.pooled_by)(self)(pooler(states[:, 0])) if row.pooled_by else pooler(states)

    def _run(self, call: dict[str, Any], packing: Packing, mask: Tensor, memory: Memory | None) -> Tensor:
        row, module = self.encoder_row, self
        positions = self._positions(call, packing)
        x = self._embedded(call, packing, positions)
        own = to_own_tokens(packing, self.settings)
        bias = None
        if row.bias:
            # The method reads only the shape of its argument.
            bias = attrgetter(row.bias)(module)(x.new_empty(1, packing.shape[1], 1))
        attends: dict[str, tuple[Attend, Any]] = {}
        layers = self._layers()
        with layers[0].context(x.device) as settings:
            for layer in layers:
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
                x = self._layer(layer, x, *attends[kind], memory, settings)
        norm = find(module, row.norm) if row.norm else None
        return x if norm is None else norm(x)

    def _layer(
        self, layer: Any, x: Tensor, attend: Attend, rotary: Any, memory: Memory | None, settings: Settings
    ) -> Tensor:
        run = partial(layer.run, attend=attend, settings=settings, rotary=rotary, memory=memory)
        # transformers 5 checkpoints layer by layer, transformers 4 in the encoder.
        owners: list[Any] = [layer, find(self, self._holder)] if torch.is_grad_enabled() else []
        for owner in owners:
            if getattr(owner, "gradient_checkpointing", False) and owner.training:
                return owner._gradient_checkpointing_func(run, x)
        return run(x)

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
        """Embeddings `[T, width]`; a module that is not fused sees one long text."""
        row = self.encoder_row
        inputs: dict[str, Any] = {
            name: packing.pack(call[name])
            for name in row.takes
            if name != "position_ids" and call.get(name) is not None
        }
        embeddings: Any = find(self, row.embeddings)
        if isinstance(embeddings, FusedEmbeddings):
            tokens, types, embeds = (inputs.get(name) for name in ("input_ids", "token_type_ids", "inputs_embeds"))
            x = embeddings.embed(tokens, positions, types, embeds)
        else:
            if "position_ids" in row.takes:
                inputs["position_ids"] = positions
            x = embeddings(**{"input_ids": None, **{name: value[None] for name, value in inputs.items()}})[0]
        project: Any = find(self, row.project) if row.project else None
        return x if project is None else project(x)


def is_expanded(states: Tensor) -> bool:
    """True if `[B, N, width]` states were expanded from one memory, so that projecting it once suffices."""
    return states.shape[0] > 1 and states.stride(0) == 0


def plan(mask: Tensor, memory_mask: Tensor | None = None, *, keep_first: bool) -> tuple[Packing, bool] | None:
    """Packing of a mask `[P, L]`, with one device sync, and whether `memory_mask` `[P, N]` hides nothing.

    With `keep_first`, token 0 of every text stays a query even if it is padding, because poolers read it. None if a
    text has no token at all.
    """
    mask = mask.bool()
    if torch.compiler.is_compiling():
        return _traced_plan(mask, keep_first), memory_mask is None
    if not mask.numel():
        return None
    if on_host(mask) and host.all_true(mask):
        texts, length = mask.shape
        places, ends = torch.arange(texts * length), torch.arange(0, texts * length + 1, length, dtype=torch.int32)
        whole = memory_mask is None or host.all_true(memory_mask.bool())
        packing = Packing(positions=places, cu_seqlens=ends, shape=(texts, length), max_seqlen=length, whole=True)
        return packing, whole
    kept = mask.clone() if keep_first else mask
    if keep_first:
        kept[:, 0] = True
    lengths = kept.sum(1)
    whole = mask.new_ones(()) if memory_mask is None else memory_mask.bool().all()
    truths = (mask.any(1).all(), mask[:, 0].all(), whole)
    facts = torch.stack([lengths.max(), lengths.sum(), *(truth.long() for truth in truths)])
    longest, total, none_empty, first_real, whole_memory = host.integers(facts) if on_host(facts) else facts.tolist()
    if not none_empty:
        return None
    flat = kept.flatten()
    # A stable sort moves real tokens to the front, in order, without the device sync of `nonzero`.
    order = host.true_places(flat) if on_host(flat) else flat.logical_not().to(torch.uint8).argsort(stable=True)
    places = order[:total]
    key_mask = None if first_real or not keep_first else mask.flatten()[places]
    shape = (mask.shape[0], mask.shape[1])
    packing = Packing(
        positions=places, cu_seqlens=offsets(lengths), shape=shape, key_mask=key_mask, max_seqlen=int(longest)
    )
    return packing, bool(whole_memory)


def _traced_plan(mask: Tensor, keep_first: bool) -> Packing:
    """`plan` in a traced graph, without control flow on values: padding at token 0 attends to real tokens."""
    kept = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1) if keep_first else mask
    places = kept.flatten().nonzero().flatten()
    return Packing(
        positions=places,
        cu_seqlens=offsets(kept.sum(1)),
        shape=(mask.shape[0], mask.shape[1]),
        key_mask=mask.flatten().index_select(0, places) if keep_first else None,
        max_seqlen=mask.shape[1],
    )


def packed_memory(states: Tensor, mask: Tensor | None, packing: Packing) -> Memory:
    """The memory `[P, N, width]` of packed texts; `mask` `[P, N]` is non-zero for visible tokens."""
    texts, length = states.shape[:2]
    cu, device = packing.cu_seqlens, states.device
    if mask is None and is_expanded(states):
        tokens = packing.positions.shape[0]
        queries, keys = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (tokens, length))
        return Memory(states[0], Packed(queries, keys, tokens, length))
    keys = torch.arange(0, texts * length + 1, length, dtype=torch.int32, device=device)
    key_mask = None if mask is None else mask.bool().flatten()
    return Memory(states.flatten(0, 1), Packed(cu, keys, packing.longest, length, key_mask))


def padded_memory(states: Tensor, mask: Tensor | None) -> Memory:
    """The memory `[B, N, width]` of a padded batch."""
    if mask is None and is_expanded(states):
        return Memory(states[:1], Padded(), shared=True)
    return Memory(states, Padded(mask))


def _is_encoder(module: nn.Module) -> bool:
    return encoder_of(original_class(module)) is not None


RULES: tuple[Rule, ...] = (Rule("UnpaddedEncoder", _is_encoder, UnpaddedEncoder, "padding left out of all layers"),)
