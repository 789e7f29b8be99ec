"""Text towers of CLIP (arXiv 2103.00020): computed as far as the longest end-of-text of a batch, and no further.

Such a tower is causal and its feature is read at the end-of-text, so nothing behind that can change it; yet tokenizers
fill every text up to 77 tokens, of which a caption has a dozen. Cutting the batch is exact and leaves all else to the
tower's own code, or to the fused forms of its layers.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels import host
from xfm_fast.packing import on_host
from xfm_fast.replace.swap import CalledByName, Fused, Rule, Settings, asks_beyond, find, original_class

_GAIN = "nothing computed behind the longest end-of-text"
_NOT_ASKED = "its texts are computed at full length; unpad=True cuts them behind the longest end-of-text"
# CLIP models from before transformers knew their end-of-text say 2, and read the feature at the highest id.
_LEGACY_END = 2


def _longest(ends: Tensor, marked: Tensor | None, length: int) -> int | None:
    """The tokens that a batch needs; None if it needs all.

    Args:
        ends: `[B]` the place where each feature is read, -1 in a text without an end.
        marked: `[B, L]`, non-zero for tokens that the caller calls real.
        length: L.
    """
    lowest, last = ends.min(), ends.max()
    if marked is not None:
        places = torch.arange(length, device=marked.device)
        last = torch.maximum(last, (places * marked.bool()).max())
    facts = torch.stack([lowest, last])
    low, high = host.integers(facts) if on_host(facts) else facts.tolist()
    return None if low < 0 or high + 1 >= length else high + 1


def _ends(ids: Tensor, end: int | None) -> Tensor:
    """`[B, L]` ids → `[B]` place of the first `end`, -1 where there is none; of the highest id if `end` is None."""
    if end is None:
        return ids.argmax(-1)
    found = ids == end
    return torch.where(found.any(-1), found.int().argmax(-1), -1)


class CutTextModel(CalledByName):
    """The text tower of transformers' CLIP. Its states behind the cut are zero, where they have no meaning."""

    _understood: ClassVar[set[str]] = {"input_ids", "attention_mask", "position_ids", "return_dict"}

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return None if settings.unpad else _NOT_ASKED

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.arguments(args, kwargs)
        longest = self._needed(call)
        if longest is None:
            return super().forward(*args, **kwargs)
        whole = call["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "position_ids"):
            if call.get(name) is not None:
                call[name] = call[name][:, :longest]
        out = super().forward(**call)
        if isinstance(out, tuple):
            return (F.pad(out[0], (0, 0, 0, whole - longest)), *out[1:])
        out["last_hidden_state"] = F.pad(out["last_hidden_state"], (0, 0, 0, whole - longest))
        return out

    def _needed(self, call: dict[str, Any]) -> int | None:
        ids, mask, config = call.get("input_ids"), call.get("attention_mask"), cast(Any, self).config
        if torch.compiler.is_compiling() or asks_beyond(call, self._understood):
            return None
        if any(getattr(config, name, False) for name in ("output_attentions", "output_hidden_states")):
            return None
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
            return None
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
            return None
        end = cast(Any, self).eos_token_id
        return _longest(_ends(ids, None if end == _LEGACY_END else end), mask, ids.shape[1])


class CutOpenClip(Fused):
    """`open_clip.CLIP`, which holds its text tower itself."""

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return _why_not_open_clip(module, settings, getattr(module, "text_pool_type", "argmax"))

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """`[B, L]` ids → `[B, E]`."""
        tower: Any = self
        kind, end = tower.text_pool_type, getattr(tower, "text_eos_id", None)
        longest = _needed_ids(text, kind, end)
        if longest is None:
            return super().encode_text(text, normalize)  # pyright: ignore[reportAttributeAccessIssue]
        text = text[:, :longest]
        dtype = tower.transformer.get_cast_dtype()
        x = tower.token_embedding(text).to(dtype) + tower.positional_embedding[:longest].to(dtype)
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:longest, :longest]))
        read = _ends(text, end if kind == "eos" else None)
        x = x[torch.arange(x.shape[0], device=x.device), read]
        projection = tower.text_projection
        if projection is not None:
            x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
        return F.normalize(x, dim=-1) if normalize else x


class CutOpenClipText(Fused):
    """`open_clip.TextTransformer`, the tower of models that keep it apart."""

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        tower: Any = module
        if getattr(tower, "cls_emb", None) is not None:
            return "its feature is read at a class token behind the text"
        if getattr(tower, "output_tokens", False):
            return "the states of its padding are part of its output"
        if not hasattr(tower, "_embeds"):
            return "this version of open_clip makes its mask elsewhere"
        return _why_not_open_clip(module, settings, tower.pool_type)

    def forward(self, text: Tensor) -> Any:
        tower: Any = self
        longest = _needed_ids(text, tower.pool_type, getattr(tower, "eos_id", None))
        return super().forward(text if longest is None else text[:, :longest])

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)  # pyright: ignore[reportAttributeAccessIssue]
        return x, None if mask is None else mask[..., : x.shape[1], : x.shape[1]]


def _why_not_open_clip(module: Any, settings: Settings, pool: str) -> str | None:
    if pool not in ("argmax", "eos"):
        return f"its feature is pooled by {pool!r}, which reads more than the end-of-text"
    if getattr(module, "attn_mask", None) is None:
        return "its texts attend in both directions, so that what is behind the end-of-text counts"
    return None if settings.unpad else _NOT_ASKED


def _needed_ids(text: Tensor, pool: str, end: int | None) -> int | None:
    if torch.compiler.is_compiling() or text.ndim != 2 or not text.numel():
        return None
    return _longest(_ends(text, end if pool == "eos" else None), None, text.shape[1])


def _is(library: str, *names: str) -> Any:
    def recognises(module: nn.Module) -> bool:
        kind = original_class(module)
        return kind.__module__.startswith(library) and kind.__name__ in names

    return recognises


def _is_tower(module: nn.Module) -> bool:
    # In transformers 4 the model holds the tower, in 5 it is the tower.
    named = _is("transformers.models.clip.", "CLIPTextModel", "CLIPTextTransformer")(module)
    return named and find(module, "encoder") is not None and hasattr(module, "eos_token_id")


RULES: tuple[Rule, ...] = (
    Rule("CutTextModel", _is_tower, CutTextModel, _GAIN),
    Rule("CutOpenClip", _is("open_clip.", "CLIP"), CutOpenClip, _GAIN),
    Rule("CutOpenClipText", _is("open_clip.", "TextTransformer"), CutOpenClipText, _GAIN),
)
