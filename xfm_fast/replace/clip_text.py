"""CLIP text towers (arXiv 2103.00020) cut at the end-of-text token.

The tower is causal and its feature is read at the end-of-text, so later tokens cannot change it. The batch is cut after
its longest text; if the texts differ in length and all layers are fused, they are packed.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import host
from xfm_fast.packing import Packing, on_host
from xfm_fast.replace.attention import Causal
from xfm_fast.replace.layer import can_run_packed
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

_GAIN = "stops at the end-of-text"
_FULL_LENGTH = "it computes texts at full length; unpad=True cuts them after the longest end-of-text"
# Share of tokens left after the cut above which packing does not pay off.
_FULL = 0.95
# CLIP configs that predate transformers' eos_token_id contain 2, and pool at the highest id.
_LEGACY_END = 2
_PLAIN = ("eager", "sdpa", None)


def _lengths(ends: Tensor, marked: Tensor | None, length: int) -> list[int] | None:
    """Length of each text from its end `[B]` (-1: none) and mask `[B, L]`; None if a text has no end or fills L."""
    last = ends
    if marked is not None:
        places = torch.arange(length, device=marked.device)
        last = torch.where(ends < 0, ends, torch.maximum(ends, (places * marked.bool()).amax(1)))
    lengths = [end + 1 for end in (host.integers(last) if on_host(last) else last.tolist())]
    return lengths if min(lengths) > 0 and max(lengths) < length else None


def _packing(lengths: list[int], device: torch.device) -> Packing | None:
    """Packing of the cut batch; None if it would save too little."""
    longest = max(lengths)
    if sum(lengths) > _FULL * longest * len(lengths):
        return None
    kept = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    return Packing.from_mask(kept, lengths=lengths)


def _run(layers: nn.Module, x: Tensor, packing: Packing) -> Tensor:
    """Run layers on packed tokens `[T, width]`."""
    found: Any = list(layers.children())
    attend = Causal(packing)
    with found[0].context(x.device) as settings:
        for layer in found:
            x = layer.run(x, attend, settings)
    return x


def _packable(holder: nn.Module | None, layers: nn.Module | None) -> bool:
    """True if all layers can run on packed tokens now and neither they nor their holder have hooks."""
    return holder is not None and layers is not None and not observed(holder) and can_run_packed([*layers.children()])


def _ends(ids: Tensor, end: int | None) -> Tensor:
    """`[B, L]` ids → `[B]` position of the first `end`, -1 if absent; of the highest id if `end` is None."""
    if end is None:
        return ids.argmax(-1)
    found = ids == end
    return torch.where(found.any(-1), found.int().argmax(-1), -1)


class CutTextModel(CalledByName):
    """CLIP text tower of transformers. States after the end-of-text (or after the cut) are zero."""

    _understood: ClassVar[set[str]] = {"input_ids", "attention_mask", "position_ids", "return_dict"}

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return None if settings.unpad else _FULL_LENGTH

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        lengths = self._needed(call)
        if lengths is None:
            return super().forward(*args, **kwargs)
        whole, longest = call["input_ids"].shape[1], max(lengths)
        packing = _packing(lengths, call["input_ids"].device) if self._can_pack() else None
        if packing is not None and self._marks_whole_texts(call, packing):
            return self._packed(call, packing, whole)
        for name in ("input_ids", "attention_mask", "position_ids"):
            if call.get(name) is not None:
                call[name] = call[name][:, :longest]
        out = super().forward(**call)
        if isinstance(out, tuple):
            return (F.pad(out[0], (0, 0, 0, whole - longest)), *out[1:])
        out["last_hidden_state"] = F.pad(out["last_hidden_state"], (0, 0, 0, whole - longest))
        return out

    def _can_pack(self) -> bool:
        tower: Any = self
        encoder = tower.encoder
        # Gradient checkpointing works per module call.
        kept_out = torch.is_grad_enabled() and any(
            getattr(part, "gradient_checkpointing", False) for part in (tower, encoder, *encoder.layers)
        )
        return not kept_out and tower.config._attn_implementation in _PLAIN and _packable(encoder, encoder.layers)

    def _marks_whole_texts(self, call: dict[str, Any], packing: Packing) -> bool:
        """True if the mask hides no token before an end-of-text."""
        mask = call.get("attention_mask")
        if mask is None:
            return True
        marked = packing.pack(mask[:, : packing.shape[1]].bool())
        return host.all_true(marked) if on_host(marked) else bool(marked.all())

    def _packed(self, call: dict[str, Any], packing: Packing, whole: int) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        tower: Any = self
        longest, positions = packing.shape[1], call.get("position_ids")
        # Embed the padded texts: a packed text may be longer than the position table.
        embedded = tower.embeddings(
            input_ids=call["input_ids"][:, :longest], position_ids=None if positions is None else positions[:, :longest]
        )
        x = packing.pack(embedded)
        x = tower.final_layer_norm(_run(tower.encoder.layers, x, packing))
        ends = _ends(call["input_ids"], self._end())
        pooled = x.index_select(0, packing.cu_seqlens[:-1] + ends)
        states = F.pad(packing.unpad(x), (0, 0, 0, whole - packing.shape[1]))
        out = BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)
        return out if returns_dict(self, call) else out.to_tuple()

    def _end(self) -> int | None:
        end = cast(Any, self).eos_token_id
        return None if end == _LEGACY_END else end

    def _needed(self, call: dict[str, Any]) -> list[int] | None:
        ids, mask, config = call.get("input_ids"), call.get("attention_mask"), cast(Any, self).config
        if torch.compiler.is_compiling() or has_other_arguments(call, self._understood):
            return None
        if any(getattr(config, name, False) for name in ("output_attentions", "output_hidden_states")):
            return None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
            return None
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            return None
        return _lengths(_ends(ids, self._end()), mask, ids.shape[1])


class CutOpenClip(Fused):
    """`open_clip.CLIP`, which contains its text tower."""

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return _why_not_open_clip(module, settings, getattr(module, "text_pool_type", "argmax"))

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """`[B, L]` ids → `[B, E]`."""
        tower: Any = self
        x = _open_clip_feature(tower, text, tower.text_pool_type, getattr(tower, "text_eos_id", None))
        if x is None:
            return super().encode_text(text, normalize)  # pyright: ignore[reportAttributeAccessIssue]
        return F.normalize(x, dim=-1) if normalize else x


class CutOpenClipText(Fused):
    """`open_clip.TextTransformer`, a separate text tower."""

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        tower: Any = module
        if getattr(tower, "cls_emb", None) is not None:
            return "its feature is read at a class token after the text"
        if getattr(tower, "output_tokens", False):
            return "the states of its padding are part of its output"
        return _why_not_open_clip(module, settings, tower.pool_type)

    def forward(self, text: Tensor) -> Any:
        tower: Any = self
        x = _open_clip_feature(tower, text, tower.pool_type, getattr(tower, "eos_id", None))
        return super().forward(text) if x is None else x


def _open_clip_feature(tower: Any, text: Tensor, pool: str, end: int | None) -> Tensor | None:
    """`[B, L]` ids → `[B, E]` without computing past the end-of-text; None if a text has no end."""
    if torch.compiler.is_compiling() or text.ndim != 2 or not text.numel():
        return None
    end = end if pool == "eos" else None
    lengths = _lengths(_ends(text, end), None, text.shape[1])
    if lengths is None:
        return None
    longest, transformer = max(lengths), tower.transformer
    text = text[:, :longest]
    read = _ends(text, end)
    dtype, positions = transformer.get_cast_dtype(), tower.positional_embedding[:longest]
    kept_out = transformer.grad_checkpointing and torch.is_grad_enabled()
    packable = not kept_out and _packable(transformer, transformer.resblocks)
    packing = _packing(lengths, text.device) if packable else None
    if packing is None:
        x = tower.token_embedding(text).to(dtype) + positions.to(dtype)
        x = tower.ln_final(transformer(x, attn_mask=tower.attn_mask[:longest, :longest]))
        x = x[torch.arange(x.shape[0], device=x.device), read]
    else:
        places = packing.positions % longest
        x = tower.token_embedding(packing.pack(text)).to(dtype) + positions.index_select(0, places).to(dtype)
        x = _run(transformer.resblocks, x, packing).to(dtype)
        x = tower.ln_final(x.index_select(0, packing.cu_seqlens[:-1] + read))
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _why_not_open_clip(module: Any, settings: Settings, pool: str) -> str | None:
    if pool not in ("argmax", "eos"):
        return f"its feature is pooled by {pool!r}, which reads more than the end-of-text"
    if getattr(module, "attn_mask", None) is None:
        return "its attention is bidirectional, so that tokens after the end-of-text matter"
    return None if settings.unpad else _FULL_LENGTH


def _is(library: str, *names: str) -> Any:
    def recognises(module: nn.Module) -> bool:
        kind = original_class(module)
        return kind.__module__.startswith(library) and kind.__name__ in names

    return recognises


def _is_tower(module: nn.Module) -> bool:
    # In transformers 4 the model contains the tower, in 5 it is the tower.
    named = _is("transformers.models.clip.", "CLIPTextModel", "CLIPTextTransformer")(module)
    return named and find(module, "encoder") is not None and hasattr(module, "eos_token_id")


RULES: tuple[Rule, ...] = (
    Rule("CutTextModel", _is_tower, CutTextModel, _GAIN),
    Rule("CutOpenClip", _is("open_clip.", "CLIP"), CutOpenClip, _GAIN),
    Rule("CutOpenClipText", _is("open_clip.", "TextTransformer"), CutOpenClipText, _GAIN),
)
