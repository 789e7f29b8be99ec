"""Text encoders that skip padding: on packed tokens, or cut at the end-of-text (CLIP)."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from functools import cache, lru_cache, partial
from operator import attrgetter
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import host
from xfm_fast.kernels.backend import traced
from xfm_fast.packing import Packing, offsets, on_host
from xfm_fast.plans.orders import post_norm
from xfm_fast.plans.plan import Layers, Plan, forget, infers, valid_plan
from xfm_fast.plans.recording import Embedded, Pooling
from xfm_fast.replace.attention import (
    Attend,
    Memory,
    Packed,
    Padded,
    Unpacked,
    attention_within_texts,
)
from xfm_fast.replace.heads import FusedEmbeddings, default_positions
from xfm_fast.replace.layer import PLAIN_ATTENTION, WITHOUT_EFFECT, can_run_packed, run_packed
from xfm_fast.replace.planned import run_planned
from xfm_fast.replace.swap import (
    CalledByName,
    Fused,
    Settings,
    counting,
    find,
    has_other_arguments,
    observed,
    original_class,
    returns_dict,
    short_name,
)

_RECORDED = ("output_attentions", "output_hidden_states")
_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_MEMORY = ("encoder_hidden_states", "encoder_attention_mask")
# transformers drops BLIP's image mask; calls with one run the original.
IGNORE_MEMORY_MASK = ("BlipTextLayer", "BlipTextModel")
# Tokens of a batch below which a shorter last layer saves less than it costs.
_FEW_TOKENS = 128
_FULL_LENGTH = "it computes texts at full length; unpad=True cuts them at the longest end-of-text"
# Share of real tokens in the cut batch above which packing does not pay off.
_MAX_DENSITY = 0.95
# CLIP configs that predate transformers' eos_token_id contain 2, and pool at the highest id.
_LEGACY_END = 2


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The modules of a model around its layers, as dotted names relative to the model."""

    model: str  # class name, in the form of `LayerSpec.layer`
    takes: tuple[str, ...]  # arguments of the embeddings with one entry per token
    layers: str = "encoder.layer"
    embeddings: str = "embeddings"  # ids or word embeddings → states
    project: str = ""  # linear layer after the embeddings
    norm: str = ""  # after the last layer
    pooler: str = "pooler"  # pools the states `[P, L, width]`, or token 0 if pooled_by is set
    pooled_by: str = ""  # function after the pooler
    bias: str = ""  # method that returns the position bias for states `[P, L, width]`
    # module that returns cos and sin for states, positions and, if layer_type is set, its value
    rotary: str = ""
    # layer attribute; "sliding_attention" limits attention to the config's sliding_window
    layer_type: str = ""
    # layers in execution order, for models that run a layer several times
    sequence: Callable[[Any, str], Iterable[nn.Module]] = nn.Module.get_submodule  # pyright: ignore[reportAssignmentType]
    output: str = "BaseModelOutputWithPooling"  # class of the output in transformers
    memory: bool = False  # supports cross-attention


_encoders: dict[str, Encoder] = {}
_reads: ContextVar[Pooling | None] = ContextVar("reads", default=None)


@contextmanager
def reading_first_tokens() -> Iterator[None]:
    """Let unpadded encoders inside return the state of the first token only, `[P, 1, width]`."""
    token = _reads.set(Pooling("first"))
    try:
        yield
    finally:
        _reads.reset(token)


def register_encoder(*encoders: Encoder) -> None:
    """Register models for `accelerate(..., unpad=True)`."""
    _encoders.update({encoder.model: encoder for encoder in encoders})
    encoder_of.cache_clear()


@cache
def encoder_of(model_class: type[nn.Module]) -> Encoder | None:
    """Return the registered encoder of a model class, or None."""
    full_name = f"{model_class.__module__}.{model_class.__qualname__}"
    return _encoders.get(full_name) or _encoders.get(short_name(model_class))


class UnpaddedEncoder(CalledByName):
    """A whole encoder on packed tokens; states at padding are zero."""

    benefit: ClassVar[str] = "padding left out of all layers"
    encoder_spec: ClassVar[Encoder]
    understood: ClassVar[frozenset[str]]  # arguments of calls that are packed

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return encoder_of(original_class(module)) is not None

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        spec = cast(Encoder, encoder_of(original))
        understood = (*spec.takes, "attention_mask", "position_ids", *WITHOUT_EFFECT)
        if spec.memory:
            understood += _MEMORY
        more = {"encoder_spec": spec, "understood": frozenset(understood)}
        return super().adapted(original) | more

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        if not settings.unpad:
            return "it computes padding; unpad=True skips it"
        is_blip = original_class(module).__name__ == "BlipTextModel"
        if getattr(module.config, "is_decoder", False) and not is_blip:
            return "a causal decoder keeps its padding"
        return None

    def declines(self) -> str | None:
        for layer in self._layers():
            reason = layer.declines() if isinstance(layer, Fused) else "the original runs"
            if reason is not None:
                return f"it computes padding: in a layer, {reason}"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call, spec = self.arguments(args, kwargs), self.encoder_spec
        packed = self.packed(call)
        if packed is None:
            return self.padded(*args, **kwargs)
        x, packing = packed
        states: Any = packing.unpad(x)
        outputs = {"last_hidden_state": states}
        if spec.output != "BaseModelOutput":
            pooler: Any = self._pooler()
            if pooler is not None and spec.pooled_by:
                outputs["pooler_output"] = attrgetter(spec.pooled_by)(self)(pooler(states[:, 0]))
            elif pooler is not None:
                outputs["pooler_output"] = pooler(states)
        if not returns_dict(self, call):
            return tuple(outputs.values())
        return _output(spec.output, outputs)

    def release(self) -> None:
        forget(self)
        super().release()

    def padded(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward, with padding."""
        return super().forward(*args, **kwargs)

    def packed(self, call: dict[str, Any]) -> tuple[Tensor, Packing] | None:
        """Compute final states `[T, width]` and their packing; None for calls that keep padding."""
        # A compiler cannot trace a context variable.
        run = self._packed(call, None if torch.compiler.is_compiling() else _reads.get())
        return None if run is None else run[:2]

    def pooled(self, call: dict[str, Any], pooling: Pooling) -> Tensor | None:
        """Compute the pooled states `[P, width]`; None for calls that keep padding."""
        run = self._packed(call, pooling)
        if run is None:
            return None
        x, packing, done = run
        if done == pooling:
            return x
        x = x if done is not None else _POOLING[pooling.kind](x, packing)
        return F.normalize(x, dim=1) if pooling.normalised else x

    def _packed(
        self, call: dict[str, Any], pooling: Pooling | None
    ) -> tuple[Tensor, Packing, Pooling | None] | None:
        """Compute final states, their packing, and how they are pooled already."""
        mask = call.get("attention_mask")
        memory_mask = call.get("encoder_attention_mask")
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        if has_other_arguments(call, self.understood) or (ids is None) == (embeds is None):
            return None
        states, memory = call.get("encoder_hidden_states"), None
        cut = pooling is not None and pooling.kind == "first" and self._can_cut(call)
        made = None
        if (
            states is None
            and isinstance(ids, Tensor)
            and not cut
            and infers(self.settings.backend, ids)
        ):
            made = valid_plan(self)
        planned = None if made is None else made.layers
        layers: Any = self._layers() if planned is None else planned.layers
        if made is None and not self._ready(call, layers):
            return None
        last = layers.pop() if cut else None
        tokens: Any = embeds if ids is None else ids
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != tokens.shape[:2]:
            return None
        if not isinstance(memory_mask, Tensor | None):
            return None
        if memory_mask is not None and memory_mask.ndim != 2:
            return None
        packed = plan(mask, memory_mask, keep_first=cut or self._pooler() is not None)
        if packed is None:
            return None
        packing, memory_visible = packed
        if not memory_visible:
            # BLIP ignores the memory mask, and in transformers 4 so do all models but decoders.
            version = int(sys.modules["transformers"].__version__.split(".")[0])
            if version < 5 or original_class(self).__name__ in IGNORE_MEMORY_MASK:
                return None
        if states is not None and hasattr(layers[0], "crossattention"):
            memory = packed_memory(states, None if memory_visible else memory_mask, packing)
        self.count()
        with self.settings.without_autocast(mask.device):
            if memory is None and embeds is None and not cut and not torch.is_grad_enabled():
                planned = self._planned(layers) if planned is None else planned
                if pooling is not None and not self._can_pool(planned, packing, pooling):
                    pooling = None
                states = self._run_planned(call, planned, made, packing, pooling)
                if states is not None:
                    packing = packing if pooling is None else _whole(packing.shape[0], 1)
                    return states, packing, pooling
            x = self._run(call, layers, packing, mask, memory)
            if not cut:
                return x, packing, None
            first = _of_one_token(packing)
            return _run_for_first(last, x, packing, first), first, Pooling("first")

    def _can_pool(self, layers: Layers | None, packing: Packing, pooling: Pooling) -> bool:
        """Return whether a plan pools the states of these texts."""
        if layers is None or self.encoder_spec.norm:
            return False
        if pooling.kind == "first":
            is_text = packing.whole and packing.shape[0] == 1
            return is_text and all(layers.orders) and self._pools_first()
        return pooling.kind == "mean" and packing.key_mask is None

    def _layers(self) -> list[Any]:
        return list(self.encoder_spec.sequence(self, self.encoder_spec.layers))

    def _can_cut(self, call: dict[str, Any]) -> bool:
        """Return whether the last layer needs to compute the first token of each text only."""
        spec, mask = self.encoder_spec, call.get("attention_mask")
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        if spec.bias or spec.rotary or not isinstance(mask, Tensor):
            return False
        if mask.numel() < _FEW_TOKENS or call.get("encoder_hidden_states") is not None:
            return False
        if not self._pools_first():
            return False
        *others, last = self._layers()
        return bool(others) and getattr(last, "layer_order", "") == "behind sums"

    def _pools_first(self) -> bool:
        """Return whether the pooler reads the first token alone: one of another library, or a hook, may not."""
        pooler = None if self.encoder_spec.pooled_by else self._pooler()
        if pooler is None:
            return True
        return type(pooler).__module__.startswith("transformers.") and not observed(pooler)

    def _pooler(self) -> nn.Module | None:
        return find(self, self.encoder_spec.pooler) if self.encoder_spec.pooler else None

    def _planned(self, layers: list[Any]) -> Layers | None:
        """Return the layers and embeddings for one plan; None if the layers have plans of their own."""
        spec = self.encoder_spec
        embeddings: Any = find(self, spec.embeddings)
        if spec.project or spec.rotary or spec.layer_type:
            return None
        if not isinstance(embeddings, FusedEmbeddings):
            return None
        orders = [getattr(layer, "layer_order", None) for layer in layers]
        if not {*orders} <= {"before", "behind sums"}:
            return None
        children = [name.partition(".")[0] for name in (spec.layers, spec.embeddings)]
        look_up = layers[0].layer_spec.modules
        is_post_norm = [order == "behind sums" for order in orders]
        return Layers(layers, look_up, is_post_norm, children, embeddings, self.config)

    def _run_planned(
        self,
        call: dict[str, Any],
        layers: Layers | None,
        made: Plan | None,
        packing: Packing,
        pooling: Pooling | None,
    ) -> Tensor | None:
        """Compute final states by one plan, embeddings included; None if the layers run one by one."""
        spec, bias = self.encoder_spec, None
        # A plan has a kernel for the bias of texts of one length.
        if layers is None or (spec.bias and not packing.whole):
            return None
        modules = layers.embeddings._modules
        words, positions, types = [modules.get(name) for name in _TABLES]
        if spec.bias:
            bias = self._position_bias(words.weight, packing)
        kinds = None if types is None else call.get("token_type_ids")
        x = Embedded(
            (
                packing.pack(call["input_ids"]),
                self._positions(call, packing, layers.embeddings),
                None if kinds is None else packing.pack(kinds),
            ),
            (
                words._parameters["weight"],
                positions._parameters["weight"],
                None if types is None else types._parameters["weight"],
            ),
            modules["LayerNorm"],
        )
        attend = self._attend("", packing, call["attention_mask"], bias)
        states = run_planned(self, layers, x, attend, self.settings, plan=made, pooling=pooling)
        if states is None:
            return None
        if counting():
            for module in cast(Any, (layers.embeddings, *layers.layers)):
                module.count()
        norm: Any = find(self, spec.norm) if spec.norm else None
        return states if norm is None else norm(states)

    def _position_bias(self, example: Tensor, packing: Packing) -> Tensor:
        # The method reads only the shape of its argument.
        shape = example.new_empty(1, packing.shape[1], 1)
        return attrgetter(self.encoder_spec.bias)(self)(shape)

    def _ready(self, call: dict[str, Any], layers: list[Any]) -> bool:
        """Return whether no bypassed module has hooks and every layer can run on packed tokens."""
        spec, config = self.encoder_spec, self.config
        if any(getattr(config, name, False) for name in _RECORDED):
            return False
        if getattr(config, "_attn_implementation", None) not in PLAIN_ATTENTION:
            return False
        # Only a decoder's layer reads the memory.
        reads_memory = getattr(layers[0], "is_decoder", True)
        has_memory = call.get("encoder_hidden_states") is not None
        if has_memory and reads_memory and not hasattr(layers[0], "crossattention"):
            return False
        for name in (self._holder, spec.embeddings, spec.project):
            module = find(self, name) if name else None
            if module is not None and observed(module):
                return False
        embeddings: Any = find(self, spec.embeddings)
        if isinstance(embeddings, FusedEmbeddings):
            if not embeddings.intact():
                return False
        elif spec.memory:
            # BERT's original cuts its buffer of token types, which may be shorter than the packed
            # texts.
            return False
        return can_run_packed(layers)

    @property
    def _holder(self) -> str:
        """Name of the module around the layers."""
        return self.encoder_spec.layers.rpartition(".")[0]

    def _run(
        self,
        call: dict[str, Any],
        layers: list[Any],
        packing: Packing,
        mask: Tensor,
        memory: Memory | None,
    ) -> Tensor:
        spec = self.encoder_spec
        x, positions = self._embed(call, packing)
        bias = self._position_bias(x, packing) if spec.bias else None
        attention: dict[str, tuple[Attend, Any]] = {}
        with layers[0].context(x.device) as settings:
            for layer in layers:
                layer_type = getattr(layer, spec.layer_type) if spec.layer_type else ""
                if layer_type not in attention:
                    attend = self._attend(layer_type, packing, mask, bias)
                    rotary = None
                    if spec.rotary:
                        types = (layer_type,) if spec.layer_type else ()
                        cos, sin = attrgetter(spec.rotary)(self)(x, positions[None], *types)
                        rotary = cos[0], sin[0]
                    attention[layer_type] = attend, rotary
                attend, rotary = attention[layer_type]
                run = partial(
                    layer.run, attend=attend, settings=settings, rotary=rotary, memory=memory
                )
                if torch.is_grad_enabled():
                    run = self._checkpointed(run, layer)
                x = run(x)
        norm = find(self, spec.norm) if spec.norm else None
        return x if norm is None else norm(x)

    def _attend(
        self, layer_type: str, packing: Packing, mask: Tensor, bias: Tensor | None
    ) -> Attend:
        """Return the attention of the layers of one type."""
        window = None
        if layer_type == "sliding_attention":
            window = getattr(self.config, "sliding_window", None)
        # Texts no longer than the window attend to all of their tokens.
        if window is not None and packing.shape[1] <= window + 1:
            window = None
        if bias is None and window is None:
            return attention_within_texts(packing, self.settings)
        return Unpacked(packing, mask.bool(), bias, window)

    def _checkpointed(
        self, run: Callable[[Tensor], Tensor], layer: Any
    ) -> Callable[[Tensor], Tensor]:
        """Return the call of a layer under gradient checkpointing, if it is on."""
        # transformers 5 checkpoints layer by layer, transformers 4 in the encoder.
        holder: Any = find(self, self._holder)
        for owner in (layer, holder):
            if getattr(owner, "gradient_checkpointing", False) and owner.training:
                return partial(owner._gradient_checkpointing_func, run)
        return run

    def _positions(self, call: dict[str, Any], packing: Packing, embeddings: Any) -> Tensor:
        """Return packed position ids `[T]`."""
        positions, tokens = call.get("position_ids"), call.get("input_ids")
        if positions is None:
            if hasattr(embeddings, "padding_idx") or hasattr(embeddings, "position_ids"):
                if tokens is None:
                    # Without ids, RoBERTa treats every token as real.
                    tokens = call["attention_mask"].new_full(packing.shape, -1)
                positions = default_positions(embeddings, tokens)
            else:
                positions = torch.arange(packing.shape[1], device=packing.positions.device)[None]
        return packing.pack(positions.expand(packing.shape))

    def _embed(self, call: dict[str, Any], packing: Packing) -> tuple[Tensor, Tensor]:
        """Compute embeddings `[T, width]` and position ids; unfused embeddings see one long text."""
        spec = self.encoder_spec
        embeddings: Any = attrgetter(spec.embeddings)(self)
        positions = self._positions(call, packing, embeddings)
        inputs: dict[str, Any] = {"input_ids": None}
        for name in spec.takes:
            if name != "position_ids" and call.get(name) is not None:
                inputs[name] = packing.pack(call[name])
        if isinstance(embeddings, FusedEmbeddings):
            types, embeds = inputs.get("token_type_ids"), inputs.get("inputs_embeds")
            x = embeddings.embed(inputs["input_ids"], positions, types, embeds)
        else:
            if "position_ids" in spec.takes:
                inputs["position_ids"] = positions
            for name, value in inputs.items():
                inputs[name] = None if value is None else value[None]
            x = embeddings(**inputs)[0]
        project: Any = find(self, spec.project) if spec.project else None
        return x if project is None else project(x), positions


def _run_for_first(layer: Any, x: Tensor, packing: Packing, first: Packing) -> Tensor:
    """Run a post-norm layer for the first token of each text: `[P, width]`."""
    starts = packing.cu_seqlens
    attend = Packed(first.cu_seqlens, starts, 1, packing.longest, packing.key_mask)
    with layer.context(x.device) as settings:
        rows = starts[:-1]
        x = post_norm(replace(layer.executor(attend, settings, None), rows=rows), x, rows=rows)
    layer.count()
    return x


def _of_one_token(packing: Packing) -> Packing:
    """Return the packing of the same number of texts of one token."""
    texts, starts = packing.shape[0], packing.cu_seqlens
    bounds = torch.arange(texts + 1, dtype=starts.dtype, device=starts.device)
    return Packing(
        positions=bounds[:-1].long(), cu_seqlens=bounds, shape=(texts, 1), max_seqlen=1, whole=True
    )


def _mean(states: Tensor, packing: Packing) -> Tensor:
    """Average the packed states of each text, in fp32 if they are narrower."""
    rows = torch.arange(states.shape[0], device=states.device)
    starts = packing.cu_seqlens[:-1].long()
    wide = states if states.dtype == torch.float64 else states.float()
    return F.embedding_bag(rows, wide, starts, mode="mean").to(states.dtype)


def _first(states: Tensor, packing: Packing) -> Tensor:
    return states.index_select(0, packing.cu_seqlens[:-1])


def _largest(states: Tensor, packing: Packing) -> Tensor:
    lengths = host.integers(packing.cu_seqlens.diff())
    return torch.stack([chunk.amax(0) for chunk in states.split(lengths)])


_POOLING: dict[str, Callable[[Tensor, Packing], Tensor]] = {
    "first": _first,
    "mean": _mean,
    "max": _largest,
}


@cache
def _fields(output_class: type[Any]) -> dict[str, None]:
    return dict.fromkeys(field.name for field in fields(output_class))


def _output(name: str, values: dict[str, Any]) -> Any:
    """Return an output of transformers, made without the ninety calls of its constructor."""
    from transformers import modeling_outputs

    output_class = getattr(modeling_outputs, name)
    if torch.compiler.is_compiling():
        # It traces the constructor, and nothing in its place.
        return output_class(**values)
    output = output_class.__new__(output_class)
    output.__dict__.update(_fields(output_class) | values)
    for key, value in values.items():
        OrderedDict.__setitem__(output, key, value)
    return output


def is_expanded(states: Tensor) -> bool:
    """Return whether states `[B, N, width]` are one memory, expanded over the batch."""
    return states.shape[0] > 1 and states.stride(0) == 0


def plan(
    mask: Tensor, memory_mask: Tensor | None = None, *, keep_first: bool
) -> tuple[Packing, bool] | None:
    """Plan the packing of a batch, with one device sync.

    Args:
        mask: `[P, L]`, non-zero for real tokens.
        memory_mask: `[P, N]`, non-zero for visible tokens of the memory.
        keep_first: Keep token 0 of every text as a query even if it is padding, because poolers
            read it.

    Returns:
        The packing, and whether `memory_mask` hides nothing; None if a text has no token at all.
    """
    if torch.compiler.is_compiling():
        mask = mask.bool()
        # Without control flow on values: padding at token 0 attends to real tokens.
        queries = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1) if keep_first else mask
        positions = queries.flatten().nonzero().flatten()
        packing = Packing(
            positions=positions,
            cu_seqlens=offsets(queries.sum(1)),
            shape=(mask.shape[0], mask.shape[1]),
            key_mask=mask.flatten().index_select(0, positions) if keep_first else None,
            max_seqlen=mask.shape[1],
        )
        return packing, memory_mask is None
    if not mask.numel():
        return None
    # NumPy reads the integers of tokenizers as they are.
    mask = mask if mask.dtype == torch.int64 else mask.bool()
    if mask.device.type == "cpu" and host.all_true(mask):
        packing = _whole(*mask.shape)
        return packing, memory_mask is None or host.all_true(memory_mask.bool())
    mask = mask.bool()
    queries = mask.clone() if keep_first else mask
    if keep_first:
        queries[:, 0] = True
    lengths = queries.sum(1)
    visible = mask.new_ones(()) if memory_mask is None else memory_mask.bool().all()
    truths = (mask.any(1).all(), mask[:, 0].all(), visible)
    facts = torch.stack([lengths.max(), lengths.sum(), *(truth.long() for truth in truths)])
    values = host.integers(facts) if on_host(facts) else facts.tolist()
    longest, total, none_empty, first_real, memory_visible = values
    if not none_empty:
        return None
    flat = queries.flatten()
    if on_host(flat):
        order = host.true_places(flat)
    else:
        # A stable sort moves real tokens to the front, in order, without the device sync of
        # `nonzero`.
        order = flat.logical_not().to(torch.uint8).argsort(stable=True)
    positions = order[:total]
    key_mask = None if first_real or not keep_first else mask.flatten()[positions]
    shape = (mask.shape[0], mask.shape[1])
    packing = Packing(
        positions=positions,
        cu_seqlens=offsets(lengths),
        shape=shape,
        key_mask=key_mask,
        max_seqlen=int(longest),
    )
    return packing, bool(memory_visible)


@lru_cache(maxsize=64)
def _whole(texts: int, length: int) -> Packing:
    """Return the packing of texts of one length on a CPU, which calls share."""
    with torch.inference_mode(False):
        return Packing(
            positions=torch.arange(texts * length),
            cu_seqlens=torch.arange(0, texts * length + 1, length, dtype=torch.int32),
            shape=(texts, length),
            max_seqlen=length,
            whole=True,
        )


def packed_memory(states: Tensor, mask: Tensor | None, packing: Packing) -> Memory:
    """Return the memory of packed texts from states `[P, N, width]` and their mask `[P, N]`."""
    texts, length = states.shape[:2]
    cu, device = packing.cu_seqlens, states.device
    if mask is None and is_expanded(states):
        tokens = packing.positions.shape[0]
        queries = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        keys = torch.tensor([0, length], dtype=torch.int32, device=device)
        return Memory(states[0], Packed(queries, keys, tokens, length))
    keys = torch.arange(0, texts * length + 1, length, dtype=torch.int32, device=device)
    key_mask = None if mask is None else mask.bool().flatten()
    return Memory(states.flatten(0, 1), Packed(cu, keys, packing.longest, length, key_mask))


def padded_memory(states: Tensor, mask: Tensor | None) -> Memory:
    """Return the memory `[B, N, width]` of a padded batch."""
    if mask is None and is_expanded(states):
        return Memory(states[:1], Padded(), shared=True)
    return Memory(states, Padded(mask))


def _ends(ids: Tensor, end: int | None) -> Tensor:
    """Find the first `end` in ids `[B, L]`, -1 if absent; without `end`, the highest id."""
    if end is None:
        return ids.argmax(-1)
    matches = ids == end
    return torch.where(matches.any(-1), matches.int().argmax(-1), -1)


def _lengths(ids: Tensor, end: int | None, mask: Tensor | None) -> list[int] | None:
    """Return lengths of texts `[B, L]`, end included; None if one has no end or fills L."""
    last, length = _ends(ids, end), ids.shape[1]
    if mask is not None:
        positions = torch.arange(length, device=ids.device)
        last = torch.where(last < 0, last, torch.maximum(last, (positions * mask.bool()).amax(1)))
    lengths = [end + 1 for end in (host.integers(last) if on_host(last) else last.tolist())]
    return lengths if min(lengths) > 0 and max(lengths) < length else None


def _cut_packing(
    lengths: list[int], holder: Any, layers: Any, device: torch.device
) -> Packing | None:
    """Pack the cut batch; None if it saves too little, or a module must be called."""
    longest = max(lengths)
    if sum(lengths) > _MAX_DENSITY * longest * len(lengths):
        return None
    if observed(holder) or not can_run_packed([*layers]):
        return None
    visible = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    return Packing.from_mask(visible, lengths=lengths)


class CutTextModel(CalledByName):
    """CLIP text tower of transformers (arXiv 2103.00020), cut at the end-of-text; states after the cut are zero.

    The tower is causal and its feature is read at the end-of-text, so later tokens cannot change
    it. The batch is cut after its longest text; if the texts differ in length and all layers are
    fused, they are packed.
    """

    benefit: ClassVar[str] = "stops at the end-of-text"
    # In transformers 4 the model contains the tower, in 5 it is the tower.
    replaces: ClassVar[Any] = ("clip.CLIPTextModel", "clip.CLIPTextTransformer")
    _understood: ClassVar[set[str]] = {"input_ids", "attention_mask", "position_ids", "return_dict"}

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        is_tower = find(module, "encoder") is not None and hasattr(module, "eos_token_id")
        return super().recognises(module) and is_tower

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return None if settings.unpad else _FULL_LENGTH

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call, tower = self.arguments(args, kwargs), cast(Any, self)
        end = None if tower.eos_token_id == _LEGACY_END else tower.eos_token_id
        lengths = self._lengths(call, end)
        if lengths is None:
            return super().forward(*args, **kwargs)
        self.count()
        ids, longest, cut = call["input_ids"], max(lengths), dict(call)
        for name in ("input_ids", "attention_mask", "position_ids"):
            if call.get(name) is not None:
                cut[name] = call[name][:, :longest]
        padding = (0, 0, 0, ids.shape[1] - longest)
        packing = self._packing(cut, lengths)
        if packing is None:
            out = super().forward(**cut)
            if isinstance(out, tuple):
                return (F.pad(out[0], padding), *out[1:])
            out["last_hidden_state"] = F.pad(out["last_hidden_state"], padding)
            return out
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        # Embed the padded texts: a packed text may be longer than the position table.
        embeds = tower.embeddings(input_ids=cut["input_ids"], position_ids=cut.get("position_ids"))
        x = packing.pack(embeds)
        x = tower.final_layer_norm(
            run_packed([*tower.encoder.layers], x, Unpacked(packing, causal=True))
        )
        pooled = x.index_select(0, packing.cu_seqlens[:-1] + _ends(ids, end))
        out = BaseModelOutputWithPooling(
            last_hidden_state=F.pad(packing.unpad(x), padding), pooler_output=pooled
        )
        return out if returns_dict(self, call) else out.to_tuple()

    def _lengths(self, call: dict[str, Any], end: int | None) -> list[int] | None:
        """Return the lengths of the texts of a call; None if it must not be cut."""
        ids, mask, config = (
            call.get("input_ids"),
            call.get("attention_mask"),
            cast(Any, self).config,
        )
        if torch.compiler.is_compiling() or traced() or has_other_arguments(call, self._understood):
            return None
        if any(getattr(config, name, False) for name in _RECORDED):
            return None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
            return None
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            return None
        return _lengths(ids, end, mask)

    def _packing(self, cut: dict[str, Any], lengths: list[int]) -> Packing | None:
        """Pack a cut call; None if checkpointing or a masked token needs the padded batch."""
        tower, mask = cast(Any, self), cut.get("attention_mask")
        modules = (tower, tower.encoder, *tower.encoder.layers) if torch.is_grad_enabled() else ()
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in modules)
        if checkpointed or tower.config._attn_implementation not in ("eager", "sdpa", None):
            return None
        packing = _cut_packing(
            lengths, tower.encoder, tower.encoder.layers, cut["input_ids"].device
        )
        if packing is None or mask is None:
            return packing
        real = packing.pack(mask.bool())
        all_real = host.all_true(real) if on_host(real) else bool(real.all())
        return packing if all_real else None


class _CutOpenClip(Fused):
    """Text tower of open_clip, cut at the end-of-text."""

    benefit: ClassVar[str] = CutTextModel.benefit

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        pool = getattr(module, "pool_type", getattr(module, "text_pool_type", "argmax"))
        if getattr(module, "cls_emb", None) is not None:
            return "its feature is read at a class token after the text"
        if getattr(module, "output_tokens", False):
            return "the states of its padding are part of its output"
        if pool not in ("argmax", "eos"):
            return f"its feature is pooled by {pool!r}, which reads more than the end-of-text"
        if getattr(module, "attn_mask", None) is None:
            return "its attention is bidirectional, so that tokens after the end-of-text matter"
        return None if settings.unpad else _FULL_LENGTH

    def feature(self, text: Tensor, pool: str, end: int | None) -> Tensor | None:
        """Encode ids `[B, L]` to `[B, E]` up to the end-of-text; None if a text has no end."""
        if torch.compiler.is_compiling() or traced() or text.ndim != 2 or not text.numel():
            return None
        end = end if pool == "eos" else None
        lengths = _lengths(text, end, None)
        if lengths is None:
            return None
        self.count()
        tower, longest = cast(Any, self), max(lengths)
        transformer, text = tower.transformer, text[:, :longest]
        read = _ends(text, end)
        dtype, positions = transformer.get_cast_dtype(), tower.positional_embedding[:longest]
        packing = None
        if not (transformer.grad_checkpointing and torch.is_grad_enabled()):
            packing = _cut_packing(lengths, transformer, transformer.resblocks, text.device)
        if packing is None:
            x = tower.token_embedding(text).to(dtype) + positions.to(dtype)
            x = tower.ln_final(transformer(x, attn_mask=tower.attn_mask[:longest, :longest]))
            x = x[torch.arange(x.shape[0], device=x.device), read]
        else:
            positions = positions.index_select(0, packing.positions % longest)
            x = tower.token_embedding(packing.pack(text)).to(dtype) + positions.to(dtype)
            x = run_packed([*transformer.resblocks], x, Unpacked(packing, causal=True)).to(dtype)
            x = tower.ln_final(x.index_select(0, packing.cu_seqlens[:-1] + read))
        projection = tower.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


class CutOpenClip(_CutOpenClip):
    """`open_clip.CLIP`, which contains its text tower."""

    replaces: ClassVar[Any] = ("open_clip.CLIP",)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Encode ids `[B, L]` to `[B, E]`."""
        x = self.feature(text, cast(Any, self).text_pool_type, getattr(self, "text_eos_id", None))
        if x is None:
            return super().encode_text(text, normalize)  # pyright: ignore[reportAttributeAccessIssue]
        return F.normalize(x, dim=-1) if normalize else x


class CutOpenClipText(_CutOpenClip):
    """`open_clip.TextTransformer`, a separate text tower."""

    replaces: ClassVar[Any] = ("open_clip.TextTransformer",)

    def forward(self, text: Tensor) -> Any:
        x = self.feature(text, cast(Any, self).pool_type, getattr(self, "eos_id", None))
        return super().forward(text) if x is None else x
