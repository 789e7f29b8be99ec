"""Initialise a model from published encoders, as X-FM's pretraining does: RoBERTa and BEiT-v2."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from xfm_fast.checkpoint.files import read_state_dict
from xfm_fast.checkpoint.loading import load_into
from xfm_fast.checkpoint.names import TABLE, fit_table, merge_tied
from xfm_fast.checkpoint.position_table import window_of
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError

Source = str | os.PathLike[str] | Mapping[str, Tensor]

_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
# Heads and final norms of BEiT-v2; X-FM pools normalised patches with fc_norm.
_BEIT_DROPPED = ("head.", "lm_head.", "cls_pt_layers.", "norm.", _SHARED_TABLE)
_BEIT_KEPT = ("cls_token", "mask_token", "patch_embed.proj.", "blocks.", "fc_norm.")
_ROBERTA_DROPPED = (".pooler.", ".position_ids", ".token_type_ids")


@dataclass
class InitialisationReport:
    """Parameters that `initialise` filled, and parameters that it did not."""

    loaded: list[str] = field(default_factory=list)
    """Parameters that received pretrained values."""
    fresh: list[str] = field(default_factory=list)
    """Parameters that keep their random initialisation."""
    ignored: list[str] = field(default_factory=list)
    """Pretrained entries, under our names, that the model lacks."""

    def __str__(self) -> str:
        text = f"{len(self.loaded)} parameters pretrained, {len(self.fresh)} at their random initialisation"
        parts = sorted({name.split(".")[0] for name in self.fresh})
        return f"{text} (in {', '.join(parts)})" if parts else text


def roberta_state(hf_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a Hugging Face `RobertaForMaskedLM` or `RobertaModel` state dict to our `text_encoder.*` names.

    The `roberta.` prefix is optional; the pooler and `position_ids` are dropped, a language-model head is included.
    Raises `CheckpointError` for an entry that RoBERTa does not have, or untied input and output embeddings.
    """
    state: dict[str, Tensor] = {}
    foreign = []
    for name, value in hf_state.items():
        ours = re.sub(r"^(?:roberta\.)?(embeddings|encoder|pooler)\.", r"text_encoder.roberta.\1.", name)
        ours = re.sub(r"^lm_head\.", "text_encoder.lm_head.", ours)
        if ours == name:
            foreign.append(name)
        elif not any(part in ours for part in _ROBERTA_DROPPED):
            state[ours] = value
    if foreign or not state:
        raise CheckpointError(
            f"{_first_names(foreign) if foreign else 'an empty state dict'}: not a RoBERTa encoder; "
            "give the state dict of transformers.RobertaModel or RobertaForMaskedLM"
        )
    merge_tied(state)
    return state


def beit2_state(state: Mapping[str, Any], cfg: XFMConfig) -> dict[str, Tensor]:
    """Convert a BEiT-v2 state dict, also inside `{"model": ...}` or `{"module": ...}`, to our `vision_encoder.*` names.

    A shared table is copied to each block, tables are interpolated to the window of `cfg`, index buffers, heads and a
    final `norm` are dropped, as in the official loader: X-FM normalises pooled patches with `fc_norm`, which fine-tuned
    BEiT-v2 checkpoints have and pretrained ones lack, so `fc_norm` then stays at its initialisation. Raises
    `CheckpointError` for an entry that BEiT-v2 does not have, such as absolute positions, or a table that fits no
    window.
    """
    return _beit2(state, depth=cfg.vision_depth, grid=cfg.grid)


def _beit2(state: Mapping[str, Any], *, depth: int, grid: int) -> dict[str, Tensor]:
    for nesting in ("model", "module"):
        inner = state.get(nesting)
        if isinstance(inner, Mapping):
            state = inner
            break
    out: dict[str, Tensor] = {}
    foreign = []
    for name, value in state.items():
        if name.endswith("relative_position_index") or name.startswith(_BEIT_DROPPED):
            continue
        if not name.startswith(_BEIT_KEPT):
            foreign.append(name)
            continue
        out[f"vision_encoder.{name}"] = fit_table(name, value, grid) if name.endswith(TABLE) else value
    if foreign or not out:
        raise CheckpointError(
            f"{_first_names(foreign) if foreign else 'an empty state dict'}: not X-FM's BEiT-v2 encoder; "
            "give a BEiT-v2 checkpoint without absolute positions"
        )
    if _SHARED_TABLE in state:
        shared = fit_table(_SHARED_TABLE, state[_SHARED_TABLE], grid)
        out |= {f"vision_encoder.blocks.{block}{TABLE}": shared for block in range(depth)}
    return out


def initialise(module: nn.Module, roberta: Source | None = None, beit2: Source | None = None) -> InitialisationReport:
    """Load pretrained encoders into an `XFM`, in place, and report which parameters were filled.

    `roberta` and `beit2` are files or state dicts for `roberta_state` and `beit2_state`. Raises `CheckpointError` for a
    source that cannot be read or does not fit; the module is then unchanged.
    """
    own = module.state_dict()
    state: dict[str, Tensor] = {}
    if roberta is not None:
        state |= roberta_state(_open_state(roberta))
    if beit2 is not None:
        tables = [name for name in own if name.startswith("vision_encoder.") and name.endswith(TABLE)]
        if not tables:
            raise CheckpointError("the model has no vision encoder with relative positions; leave beit2 out")
        state |= _beit2(_open_state(beit2), depth=len(tables), grid=window_of(own[tables[0]]))
    # A model without the masked-language head accepts RoBERTa too.
    result = load_into(module, state, what="the pretrained encoder", fresh=("",), surplus=("text_encoder.lm_head.",))
    return InitialisationReport([name for name in own if name in state], result.fresh, result.surplus)


def _open_state(source: Source) -> Mapping[str, Tensor]:
    return source if isinstance(source, Mapping) else read_state_dict(source)


def _first_names(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
