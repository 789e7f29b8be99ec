"""What the official text encoders have at both ends: embeddings, and the head that predicts masked tokens.

They are known by the names of their parts, which do not say everything (the activation, the way positions are counted).
So a module that looks like one is tried out: its fused form has to give what its own forward gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.replace.rules import Rule
from xfm_fast.replace.settings import Settings
from xfm_fast.replace.swapping import Fused, find, observed, original_class, restore, swap, why_not_bypassed
from xfm_fast.replace.text_embeddings import FusedEmbeddings
from xfm_fast.replace.verification import BANDS
from xfm_fast.replace.vocabulary_head import VocabularyHead

_EMBEDDINGS = {"word_embeddings", "position_embeddings", "LayerNorm", "dropout"}
_ROBERTA_HEAD, _BERT_HEAD = {"dense", "layer_norm", "decoder"}, {"transform", "decoder"}
_TRANSFORM = {"dense", "LayerNorm"}
_TRIED_TOKENS = 5


def _looks_like_embeddings(module: nn.Module) -> bool:
    parts = set(module._modules) - {"token_type_embeddings"}
    counts = hasattr(module, "padding_idx") or "position_ids" in module._buffers
    return _foreign(module) and parts == _EMBEDDINGS and counts


def _looks_like_head(module: nn.Module) -> bool:
    parts = set(module._modules)
    transform = find(module, "transform")
    named = parts == _ROBERTA_HEAD or (
        parts == _BERT_HEAD and transform is not None and set(transform._modules) >= _TRANSFORM
    )
    return _foreign(module) and named


def _foreign(module: nn.Module) -> bool:
    return original_class(module).__module__.partition(".")[0] not in ("transformers", "timm", "xfm_fast")


def _embeddings_refusal(module: nn.Module, settings: Settings) -> str | None:
    reason = why_not_bypassed(module, FusedEmbeddings.bypassed)
    if reason is not None:
        return reason
    words, places = find(module, "word_embeddings"), find(module, "position_embeddings")
    assert isinstance(words, nn.Embedding)
    assert isinstance(places, nn.Embedding)
    # Paddings among them: RoBERTa counts positions without them.
    count = min(_TRIED_TOKENS, words.num_embeddings, places.num_embeddings // 2)
    ids = torch.arange(count, device=words.weight.device)[None].flip(1)
    return _tried(module, FusedEmbeddings, settings, words.weight, ids)


def _head_refusal(module: nn.Module, settings: Settings) -> str | None:
    transform = find(module, "transform")
    reason = why_not_bypassed(module, VocabularyHead.bypassed)
    if reason is None and transform is not None and observed(transform):
        reason = "transform has hooks"
    if reason is not None:
        return reason
    dense: Any = find(module, "dense") if transform is None else find(module, "transform.dense")
    weight = dense.weight
    generator = torch.Generator().manual_seed(0)
    # Wide enough that another activation, or another form of GELU, shows.
    features = 3 * torch.randn(2, dense.in_features, generator=generator)
    return _tried(module, VocabularyHead, settings, weight, features.to(weight.device, weight.dtype))


def _tried(module: nn.Module, fused: type[Fused], settings: Settings, weight: Tensor, example: Tensor) -> str | None:
    """Why a fused form may not stand for a module: it computes something else from an example."""
    if weight.device.type == "meta":
        return "its parameters have no values yet, so it cannot be tried out"
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            wanted = module.forward(example)
            swap(module, fused, Settings(settings.kernels))
            try:
                found = module.forward(example)
            finally:
                restore(module)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        return f"it could not be tried out ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    finally:
        for part, training in modes.items():
            part.training = training
    if not isinstance(wanted, Tensor) or wanted.shape != found.shape:
        return "it returns something else than its parts suggest"
    error = float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-30))
    band = BANDS.get(wanted.dtype, BANDS[torch.float32])
    return None if error <= band else f"it computes something else than its parts suggest (by {error:.0e} in a trial)"


RULES: tuple[Rule, ...] = (
    Rule(
        "OfficialEmbeddings",
        _looks_like_embeddings,
        FusedEmbeddings,
        "three tables and LayerNorm in one pass",
        _embeddings_refusal,
    ),
    Rule(
        "OfficialVocabularyHead",
        _looks_like_head,
        VocabularyHead,
        "GELU fused; faster product with the vocabulary",
        _head_refusal,
    ),
)
