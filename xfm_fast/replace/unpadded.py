"""Text encoders without padding: on packed tokens, or cut at the end-of-text (CLIP)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import host
from xfm_fast.kernels.backend import traced
from xfm_fast.packing import Packing, offsets, on_host
from xfm_fast.replace.attention import Attend, Causal, Memory, Packed, Padded, Spread, to_own_tokens
from xfm_fast.replace.heads import FusedEmbeddings, default_positions
from xfm_fast.replace.layer import PLAIN_ATTENTION, can_run_packed, run_packed
from xfm_fast.replace.swap import (
    CalledByName,
    Fused,
    Settings,
    find,
    has_other_arguments,
    observed,
    original_class,
    returns_dict,
    short_name,
)

_WITHOUT_EFFECT = ("use_cache", "return_dict", "cache_position", "num_items_in_batch")
_RECORDED = ("output_attentions", "output_hidden_states")
_MEMORY = ("encoder_hidden_states", "encoder_attention_mask")
# transformers drops BLIP's image mask; calls with one run the original.
IGNORE_MEMORY_MASK = ("BlipTextLayer", "BlipTextModel")
_FULL_LENGTH = (
    "it computes texts at full length; unpad=True cuts them after the longest end-of-text"
)
# Share of tokens left after the cut above which packing does not pay off.
_FULL = 0.95
# CLIP configs that predate transformers' eos_token_id contain 2, and pool at the highest id.
_LEGACY_END = 2


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Where a model keeps the modules around its layers: dotted names relative to the model."""

    model: str  # class name, in the form of `LayerSpec.layer`
    takes: tuple[str, ...]  # arguments of the embeddings with one entry per token
    layers: str = "encoder.layer"
    embeddings: str = "embeddings"  # ids or given embeddings → states
    project: str = ""  # linear layer after the embeddings
    norm: str = ""  # after the last layer
    pooler: str = "pooler"  # pools the states `[P, L, width]`, or token 0 if pooled_by is set
    pooled_by: str = ""  # function after the pooler
    bias: str = ""  # method that returns the position bias for states `[P, L, width]`
    rotary: str = ""  # module that returns cos and sin for states, positions and, if kind is set, the kind of layer
    kind: str = (
        ""  # layer attribute; "sliding_attention" limits attention to the config's sliding_window
    )
    # layers in execution order, for models that run a layer several times
    sequence: Callable[[Any, str], Iterable[nn.Module]] = nn.Module.get_submodule  # pyright: ignore[reportAssignmentType]
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
    return _encoders.get(f"{kind.__module__}.{kind.__qualname__}") or _encoders.get(
        short_name(kind)
    )


class UnpaddedEncoder(CalledByName):
    """A whole encoder on packed tokens; states at padding are zero."""

    benefit: ClassVar[str] = "padding left out of all layers"
    encoder_row: ClassVar[Encoder]

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return encoder_of(original_class(module)) is not None

    @classmethod
    def adapted(cls, original: type[nn.Module]) -> dict[str, Any]:
        return {**super().adapted(original), "encoder_row": encoder_of(original)}

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        if not settings.unpad:
            return "it computes padding; unpad=True skips it"
        if (
            getattr(module.config, "is_decoder", False)
            and original_class(module).__name__ != "BlipTextModel"
        ):
            return "a causal decoder keeps its padding"
        return None

    def declines(self) -> str | None:
        layers = [layer for layer in self._layers() if isinstance(layer, Fused)]
        reasons = [reason for layer in layers if (reason := layer.declines()) is not None]
        return f"it computes padding: in a layer, {reasons[0]}" if reasons else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call, row = self.arguments(args, kwargs), self.encoder_row
        packed = self.packed(call)
        if packed is None:
            return self.padded(*args, **kwargs)
        from transformers import modeling_outputs

        x, packing = packed
        states: Any = packing.unpad(x)
        outputs = {"last_hidden_state": states}
        if row.output != "BaseModelOutput":
            pooler: Any = self._pooler()
            if pooler is not None:
                pooled = pooler(states[:, 0]) if row.pooled_by else pooler(states)
                outputs["pooler_output"] = (
                    attrgetter(row.pooled_by)(self)(pooled) if row.pooled_by else pooled
                )
        out = getattr(modeling_outputs, row.output)(**outputs)
        return out if returns_dict(self, call) else out.to_tuple()

    def padded(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with padding."""
        return super().forward(*args, **kwargs)

    def packed(self, call: dict[str, Any]) -> tuple[Tensor, Packing] | None:
        """Final states `[T, width]` and their packing; None for calls that keep padding."""
        row, mask, memory_mask = (
            self.encoder_row,
            call.get("attention_mask"),
            call.get("encoder_attention_mask"),
        )
        given = [
            call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None
        ]
        understood = (
            *row.takes,
            "attention_mask",
            "position_ids",
            *_WITHOUT_EFFECT,
            *(_MEMORY if row.memory else ()),
        )
        layers = self._layers()
        if (
            has_other_arguments(call, understood)
            or len(given) != 1
            or not self._ready(call, layers)
        ):
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != given[0].shape[:2]:
            return None
        if memory_mask is not None and (
            not isinstance(memory_mask, Tensor) or memory_mask.ndim != 2
        ):
            return None
        planned = plan(mask, memory_mask, keep_first=self._pooler() is not None)
        if planned is None:
            return None
        packing, whole_memory = planned
        if not whole_memory:
            # BLIP ignores the memory mask, and in transformers 4 so does every model that is no decoder.
            version = int(sys.modules["transformers"].__version__.split(".")[0])
            if version < 5 or original_class(self).__name__ in IGNORE_MEMORY_MASK:
                return None
        states, memory = call.get("encoder_hidden_states"), None
        if states is not None and hasattr(layers[0], "crossattention"):
            memory = packed_memory(states, None if whole_memory else memory_mask, packing)
        self.count()
        with self.settings.own_types(mask.device):
            return self._run(call, layers, packing, mask.bool(), memory), packing

    def _layers(self) -> list[Any]:
        return list(self.encoder_row.sequence(self, self.encoder_row.layers))

    def _pooler(self) -> nn.Module | None:
        return find(self, self.encoder_row.pooler) if self.encoder_row.pooler else None

    def _ready(self, call: dict[str, Any], layers: list[Any]) -> bool:
        """True if no bypassed part has hooks and every layer can run on packed tokens."""
        row, config = self.encoder_row, self.config
        recorded: Any = any(getattr(config, name, False) for name in _RECORDED)
        if recorded or getattr(config, "_attn_implementation", None) not in PLAIN_ATTENTION:
            return False
        # A layer that is no decoder ignores the memory.
        accepts = call.get("encoder_hidden_states") is None or hasattr(layers[0], "crossattention")
        if not accepts and getattr(layers[0], "is_decoder", True):
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

    def _run(
        self,
        call: dict[str, Any],
        layers: list[Any],
        packing: Packing,
        mask: Tensor,
        memory: Memory | None,
    ) -> Tensor:
        row, module = self.encoder_row, self
        x, positions = self._embedded(call, packing)
        own = to_own_tokens(packing, self.settings)
        bias = None
        if row.bias:
            # The method reads only the shape of its argument.
            bias = attrgetter(row.bias)(module)(x.new_empty(1, packing.shape[1], 1))
        attends: dict[str, tuple[Attend, Any]] = {}
        with layers[0].context(x.device) as settings:
            for layer in layers:
                kind = getattr(layer, row.kind) if row.kind else ""
                if kind not in attends:
                    window = (
                        getattr(module.config, "sliding_window", None)
                        if kind == "sliding_attention"
                        else None
                    )
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
                attend, rotary = attends[kind]
                run = partial(
                    layer.run, attend=attend, settings=settings, rotary=rotary, memory=memory
                )
                # transformers 5 checkpoints layer by layer, transformers 4 in the encoder.
                owners: list[Any] = (
                    [layer, find(self, self._holder)] if torch.is_grad_enabled() else []
                )
                for owner in owners:
                    if getattr(owner, "gradient_checkpointing", False) and owner.training:
                        run = partial(owner._gradient_checkpointing_func, run)
                        break
                x = run(x)
        norm = find(module, row.norm) if row.norm else None
        return x if norm is None else norm(x)

    def _embedded(self, call: dict[str, Any], packing: Packing) -> tuple[Tensor, Tensor]:
        """Embeddings `[T, width]` and position ids `[T]`; a module that is not fused sees one long text."""
        row, positions, tokens = self.encoder_row, call.get("position_ids"), call.get("input_ids")
        embeddings: Any = attrgetter(row.embeddings)(self)
        if positions is None and (
            hasattr(embeddings, "padding_idx") or hasattr(embeddings, "position_ids")
        ):
            # Without ids, RoBERTa treats every token as real.
            tokens = (
                call["attention_mask"].new_full(packing.shape, -1) if tokens is None else tokens
            )
            positions = default_positions(embeddings, tokens)
        elif positions is None:
            positions = torch.arange(packing.shape[1], device=packing.positions.device)[None]
        positions = packing.pack(positions.expand(packing.shape))
        names = (
            name for name in row.takes if name != "position_ids" and call.get(name) is not None
        )
        inputs: dict[str, Any] = {name: packing.pack(call[name]) for name in names}
        if isinstance(embeddings, FusedEmbeddings):
            ids, types, embeds = (
                inputs.get(name) for name in ("input_ids", "token_type_ids", "inputs_embeds")
            )
            x = embeddings.embed(ids, positions, types, embeds)
        else:
            if "position_ids" in row.takes:
                inputs["position_ids"] = positions
            x = embeddings(
                **{"input_ids": None, **{name: value[None] for name, value in inputs.items()}}
            )[0]
        project: Any = find(self, row.project) if row.project else None
        return x if project is None else project(x), positions


def is_expanded(states: Tensor) -> bool:
    """True if `[B, N, width]` states were expanded from one memory, so that projecting it once suffices."""
    return states.shape[0] > 1 and states.stride(0) == 0


def plan(
    mask: Tensor, memory_mask: Tensor | None = None, *, keep_first: bool
) -> tuple[Packing, bool] | None:
    """Packing of a mask `[P, L]`, with one device sync, and whether `memory_mask` `[P, N]` hides nothing.

    With `keep_first`, token 0 of every text stays a query even if it is padding, because poolers read it. None if a
    text has no token at all.
    """
    mask = mask.bool()
    if torch.compiler.is_compiling():
        # Without control flow on values: padding at token 0 attends to real tokens.
        kept = torch.cat([torch.ones_like(mask[:, :1]), mask[:, 1:]], 1) if keep_first else mask
        places = kept.flatten().nonzero().flatten()
        packing = Packing(
            positions=places,
            cu_seqlens=offsets(kept.sum(1)),
            shape=(mask.shape[0], mask.shape[1]),
            key_mask=mask.flatten().index_select(0, places) if keep_first else None,
            max_seqlen=mask.shape[1],
        )
        return packing, memory_mask is None
    if not mask.numel():
        return None
    if on_host(mask) and host.all_true(mask):
        texts, length = mask.shape
        places, ends = (
            torch.arange(texts * length),
            torch.arange(0, texts * length + 1, length, dtype=torch.int32),
        )
        whole = memory_mask is None or host.all_true(memory_mask.bool())
        packing = Packing(
            positions=places, cu_seqlens=ends, shape=(texts, length), max_seqlen=length, whole=True
        )
        return packing, whole
    kept = mask.clone() if keep_first else mask
    if keep_first:
        kept[:, 0] = True
    lengths = kept.sum(1)
    whole = mask.new_ones(()) if memory_mask is None else memory_mask.bool().all()
    truths = (mask.any(1).all(), mask[:, 0].all(), whole)
    facts = torch.stack([lengths.max(), lengths.sum(), *(truth.long() for truth in truths)])
    longest, total, none_empty, first_real, whole_memory = (
        host.integers(facts) if on_host(facts) else facts.tolist()
    )
    if not none_empty:
        return None
    flat = kept.flatten()
    # A stable sort moves real tokens to the front, in order, without the device sync of `nonzero`.
    order = (
        host.true_places(flat)
        if on_host(flat)
        else flat.logical_not().to(torch.uint8).argsort(stable=True)
    )
    places = order[:total]
    key_mask = None if first_real or not keep_first else mask.flatten()[places]
    shape = (mask.shape[0], mask.shape[1])
    packing = Packing(
        positions=places,
        cu_seqlens=offsets(lengths),
        shape=shape,
        key_mask=key_mask,
        max_seqlen=int(longest),
    )
    return packing, bool(whole_memory)


def packed_memory(states: Tensor, mask: Tensor | None, packing: Packing) -> Memory:
    """The memory `[P, N, width]` of packed texts; `mask` `[P, N]` is non-zero for visible tokens."""
    texts, length = states.shape[:2]
    cu, device = packing.cu_seqlens, states.device
    if mask is None and is_expanded(states):
        tokens = packing.positions.shape[0]
        queries, keys = (
            torch.tensor([0, n], dtype=torch.int32, device=device) for n in (tokens, length)
        )
        return Memory(states[0], Packed(queries, keys, tokens, length))
    keys = torch.arange(0, texts * length + 1, length, dtype=torch.int32, device=device)
    key_mask = None if mask is None else mask.bool().flatten()
    return Memory(states.flatten(0, 1), Packed(cu, keys, packing.longest, length, key_mask))


def padded_memory(states: Tensor, mask: Tensor | None) -> Memory:
    """The memory `[B, N, width]` of a padded batch."""
    if mask is None and is_expanded(states):
        return Memory(states[:1], Padded(), shared=True)
    return Memory(states, Padded(mask))


def _ends(ids: Tensor, end: int | None) -> Tensor:
    """`[B, L]` ids → `[B]` position of the first `end`, -1 if absent; of the highest id if `end` is None."""
    if end is None:
        return ids.argmax(-1)
    found = ids == end
    return torch.where(found.any(-1), found.int().argmax(-1), -1)


def _lengths(ids: Tensor, end: int | None, mask: Tensor | None) -> list[int] | None:
    """Length of each text `[B, L]` up to its end or last unmasked token; None if a text has no end or fills L."""
    last, length = _ends(ids, end), ids.shape[1]
    if mask is not None:
        places = torch.arange(length, device=ids.device)
        last = torch.where(last < 0, last, torch.maximum(last, (places * mask.bool()).amax(1)))
    lengths = [end + 1 for end in (host.integers(last) if on_host(last) else last.tolist())]
    return lengths if min(lengths) > 0 and max(lengths) < length else None


def _cut_packing(
    lengths: list[int], holder: Any, layers: Any, device: torch.device
) -> Packing | None:
    """Packing of the cut batch; None if it would save too little or a layer or its holder must be called."""
    longest = max(lengths)
    if (
        observed(holder)
        or not can_run_packed([*layers])
        or sum(lengths) > _FULL * longest * len(lengths)
    ):
        return None
    kept = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    return Packing.from_mask(kept, lengths=lengths)


class CutTextModel(CalledByName):
    """CLIP text tower of transformers (arXiv 2103.00020), cut at the end-of-text; states after the cut are zero.

    The tower is causal and its feature is read at the end-of-text, so later tokens cannot change it. The batch is cut
    after its longest text; if the texts differ in length and all layers are fused, they are packed.
    """

    benefit: ClassVar[str] = "stops at the end-of-text"
    # In transformers 4 the model contains the tower, in 5 it is the tower.
    replaces: ClassVar[Any] = ("clip.CLIPTextModel", "clip.CLIPTextTransformer")
    _understood: ClassVar[set[str]] = {"input_ids", "attention_mask", "position_ids", "return_dict"}

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return (
            super().recognises(module)
            and find(module, "encoder") is not None
            and hasattr(module, "eos_token_id")
        )

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
        ids, longest = call["input_ids"], max(lengths)
        names = [
            name
            for name in ("input_ids", "attention_mask", "position_ids")
            if call.get(name) is not None
        ]
        cut = call | {name: call[name][:, :longest] for name in names}
        rest = (0, 0, 0, ids.shape[1] - longest)
        packing = self._packing(cut, lengths)
        if packing is None:
            out = super().forward(**cut)
            if isinstance(out, tuple):
                return (F.pad(out[0], rest), *out[1:])
            out["last_hidden_state"] = F.pad(out["last_hidden_state"], rest)
            return out
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        # Embed the padded texts: a packed text may be longer than the position table.
        x = packing.pack(
            tower.embeddings(input_ids=cut["input_ids"], position_ids=cut.get("position_ids"))
        )
        x = tower.final_layer_norm(run_packed([*tower.encoder.layers], x, Causal(packing)))
        pooled = x.index_select(0, packing.cu_seqlens[:-1] + _ends(ids, end))
        out = BaseModelOutputWithPooling(
            last_hidden_state=F.pad(packing.unpad(x), rest), pooler_output=pooled
        )
        return out if returns_dict(self, call) else out.to_tuple()

    def _lengths(self, call: dict[str, Any], end: int | None) -> list[int] | None:
        """Lengths of the texts of a call; None if it must not be cut."""
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
        """The packing of a cut call, if no gradient checkpoint and no masked token needs the padded batch."""
        tower, mask = cast(Any, self), cut.get("attention_mask")
        parts = (tower, tower.encoder, *tower.encoder.layers) if torch.is_grad_enabled() else ()
        checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in parts)
        if checkpointed or tower.config._attn_implementation not in ("eager", "sdpa", None):
            return None
        packing = _cut_packing(
            lengths, tower.encoder, tower.encoder.layers, cut["input_ids"].device
        )
        if packing is None or mask is None:
            return packing
        seen = packing.pack(mask.bool())
        return packing if (host.all_true(seen) if on_host(seen) else bool(seen.all())) else None


class _CutOpenClip(Fused):
    """A text tower of open_clip, cut at the end-of-text."""

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
        """`[B, L]` ids → `[B, E]` without computing past the end-of-text; None if a text has no end."""
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
            places = packing.positions % longest
            x = tower.token_embedding(packing.pack(text)).to(dtype) + positions.index_select(
                0, places
            ).to(dtype)
            x = run_packed([*transformer.resblocks], x, Causal(packing)).to(dtype)
            x = tower.ln_final(x.index_select(0, packing.cu_seqlens[:-1] + read))
        projection = tower.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


class CutOpenClip(_CutOpenClip):
    """`open_clip.CLIP`, which contains its text tower."""

    replaces: ClassVar[Any] = ("open_clip.CLIP",)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """`[B, L]` ids → `[B, E]`."""
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
