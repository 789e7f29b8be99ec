"""Load a state dict into a module: everything is compared first, then all is written, or nothing.

`initialise` starts a model from RoBERTa and BEiT-v2.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from xfm_fast.checkpoint.files import read_state_dict
from xfm_fast.checkpoint.names import (
    HEAD_PREFIXES,
    TABLE,
    TIED,
    fit_table,
    head_of,
    is_dead,
    merge_tied,
    our_name,
    window_of,
)
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, InputError

_SHOWN = 8


@dataclass
class LoadResult:
    """Names that `load_into` was allowed to skip."""

    fresh: list[str] = field(default_factory=list)
    """Parameters of the module that the state dict lacks; unchanged."""
    surplus: list[str] = field(default_factory=list)
    """Entries of the state dict that the module lacks; ignored."""


_IN_PLACE = ("__iadd__", "__imul__", "__isub__", "__itruediv__")


class _Uninitialised(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        writes = name in _IN_PLACE or (
            name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        )
        kwargs = kwargs or {}
        # Initialisers are looked up in torch.nn.init by name.
        target = args[0] if args else kwargs.get("tensor")
        if writes and isinstance(target, Tensor) and target.is_meta:
            return target
        return func(*args, **kwargs)


@contextmanager
def without_values() -> Iterator[None]:
    """Context in which modules are built on the meta device and initialisers are skipped.

    PyTorch would run them there without effect, and import its compiler and sympy for it.
    """
    with torch.device("meta"), _Uninitialised():
        yield


def random_tensors(wanted: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Random weights by name, the same in every model. No weight is zero, so that every term shows in comparisons."""
    state = {}
    for name, tensor in wanted.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        mean, spread = 0.0, 0.02
        if name.endswith(TABLE):
            spread = 0.2
        elif name == "temp":
            mean, spread = 0.07, 0.0
        elif ".gamma_" in name:
            mean, spread = 0.1, 0.01
        elif tensor.ndim == 1 and name.endswith("weight"):
            mean, spread = 1.0, 0.05
        state[name] = torch.empty(tensor.shape, device="cpu").normal_(
            mean, spread, generator=generator
        )
    return state


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    what: str,
    fresh: Collection[str] = (),
    surplus: Collection[str] = (),
) -> LoadResult:
    """Copy `state` into `module`, or write nothing and raise one `CheckpointError` that lists every mismatch.

    Values are converted to the dtype and device of the module. Missing, unexpected, mis-shaped, non-floating, NaN and
    infinite entries are refused. `what` names the source in the error; `fresh` are prefixes of parameters that `state`
    may lack (`("",)` for all), `surplus` of entries that `module` may lack.
    """
    own = module.state_dict()
    on_meta = [name for name, tensor in own.items() if tensor.is_meta]
    if on_meta:
        raise CheckpointError(
            f"{what} cannot be loaded: {on_meta[0]!r} is on the meta device; call model.to_empty(device=...) first"
        )
    result = compare(module, state, what=what, fresh=fresh, surplus=surplus)
    with torch.no_grad():
        for name in own:
            if name in state:
                own[name].copy_(state[name])
    return result


def assign_into(module: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Use the tensors of `state`, which nothing else may own, as the parameters of a module on the meta device.

    Memory-mapped tensors stay mapped: pages are read on first use. A different dtype is converted. Raises as
    `load_into`.
    """
    own = module.state_dict()
    compare(module, state, what=what, finite=True)
    values: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, parameter in own.items():
        value = state[name].detach().to(parameter.dtype).contiguous()
        # Two names of one tensor would become one parameter, and training would tie them.
        values[name] = value.clone() if value.data_ptr() in taken else value
        taken.add(value.data_ptr())
    module.load_state_dict(values, assign=True)


def compare(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    what: str,
    fresh: Collection[str] = (),
    surplus: Collection[str] = (),
    finite: bool = False,
) -> LoadResult:
    """The comparison of `load_into`, without changes; the module may be on the meta device.

    Values are checked where the module has memory for them, or all of them with `finite`.
    """
    own = module.state_dict()
    absent = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    result = LoadResult(
        fresh=[name for name in absent if name.startswith(tuple(fresh))],
        surplus=[name for name in extra if name.startswith(tuple(surplus))],
    )
    missing = [name for name in absent if not name.startswith(tuple(fresh))]
    unexpected = [name for name in extra if not name.startswith(tuple(surplus))]
    common = [name for name in own if name in state]
    shapes = [name for name in common if state[name].shape != own[name].shape]
    dtypes = [name for name in common if not _convertible(state[name], own[name])]
    bad_values = [
        n
        for n in common
        if n not in dtypes and (finite or not own[n].is_meta) and not _finite(state[n])
    ]

    groups = [
        ("missing", missing),
        ("unexpected", unexpected),
        (
            "wrong shape",
            [
                f"{name}: {list(state[name].shape)}, the model has {list(own[name].shape)}"
                for name in shapes
            ],
        ),
        (
            "wrong type",
            [f"{name}: {_type(state[name])}, the model has {_type(own[name])}" for name in dtypes],
        ),
        ("NaN or infinite", bad_values),
    ]
    problems = []
    for title, entries in groups:
        if entries:
            problems += [
                f"  {title} ({len(entries)}):",
                *(f"    {entry}" for entry in entries[:_SHOWN]),
            ]
        if len(entries) > _SHOWN:
            problems.append(f"    ... and {len(entries) - _SHOWN} more")
    if problems:
        remedies = _remedies(own, state, missing, unexpected, bad_values)
        raise CheckpointError(
            "\n".join(
                [
                    f"{what} does not fit the model; nothing was loaded",
                    *problems,
                    *(f"-> {r}" for r in remedies),
                ]
            )
        )
    return result


def require_depth(config: XFMConfig, state: Mapping[str, Tensor], *, what: str) -> None:
    """Refuse a configuration with more layers than the checkpoint, before building any; raises `CheckpointError`."""
    found = {name: _depth(state, prefix) for prefix, name in _STACKS}
    if not any(0 < depth < getattr(config, name) for name, depth in found.items()):
        return
    for name, dimension, setting in _SIZES:
        if name in state and state[name].dim() > dimension:
            found[setting] = state[name].shape[dimension]
    differing = [
        f"{name}={value}"
        for name, value in found.items()
        if value and value != getattr(config, name)
    ]
    raise CheckpointError(
        f"{what} does not fit the model; nothing was loaded\n-> the checkpoint belongs to a model with "
        f"{', '.join(differing)}: set that in the configuration"
    )


def _convertible(value: Tensor, target: Tensor) -> bool:
    if value.is_meta or value.layout != torch.strided:
        return False
    return value.is_floating_point() if target.is_floating_point() else value.dtype == target.dtype


def _finite(value: Tensor) -> bool:
    if value.numel() == 0 or not value.is_floating_point():
        return True
    # One pass without a temporary as large as the tensor, which isfinite would need; NaN survives min and max.
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _type(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta tensor without values"
    name = str(tensor.dtype).removeprefix("torch.")
    return (
        name
        if tensor.layout == torch.strided
        else f"{str(tensor.layout).removeprefix('torch.')} {name}"
    )


# (parameter, dimension, field of XFMConfig that sets its size)
_SIZES = (
    ("vision_encoder.cls_token", 2, "vision_width"),
    ("vision_encoder.patch_embed.proj.weight", 3, "patch_size"),
    (f"vision_encoder.blocks.0{TABLE}", 1, "vision_heads"),
    ("text_encoder.roberta.embeddings.word_embeddings.weight", 0, "vocab_size"),
    ("text_encoder.roberta.embeddings.word_embeddings.weight", 1, "text_width"),
    ("text_encoder.roberta.embeddings.position_embeddings.weight", 0, "max_positions"),
    ("text_encoder.roberta.embeddings.token_type_embeddings.weight", 0, "type_vocab_size"),
    ("text_encoder.roberta.encoder.layer.0.intermediate.dense.weight", 0, "text_intermediate"),
    ("fusion_encoder.roberta.encoder.layer.0.intermediate.dense.weight", 0, "text_intermediate"),
    ("vision_proj.weight", 0, "embed_dim"),
)
_STACKS = (
    ("vision_encoder.blocks.", "vision_depth"),
    ("text_encoder.roberta.encoder.layer.", "text_layers"),
    ("fusion_encoder.roberta.encoder.layer.", "fusion_layers"),
)


def _remedies(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    bad_values: list[str],
) -> list[str]:
    official = [
        name for name in unexpected if our_name(name) != name or name in TIED or is_dead(name)
    ]
    if official:
        return [
            f"{official[0]!r} is a name of official checkpoints: convert it with to_ours, or load it with from_official"
        ]
    remedies = []
    settings = _settings(own, state)
    if settings:
        remedies.append(
            "the checkpoint belongs to a model with "
            + ", ".join(settings)
            + ": set that in the configuration"
        )
    for head in HEAD_PREFIXES:
        lacking = {name for name in own if head_of(name) == head}
        if lacking and lacking <= set(missing):
            prefixes = ", ".join(f"{prefix}*" for prefix in HEAD_PREFIXES[head])
            remedies.append(
                f"the checkpoint has no {head!r} head ({prefixes}): leave it out of heads=... when building the model, "
                "or allow fresh weights for it"
            )
        if not lacking and any(head_of(name) == head for name in unexpected):
            remedies.append(
                f"the model was built without the {head!r} head: include it in heads=..., or drop it with select_heads"
            )
    if bad_values:
        remedies.append(
            "NaN or infinite weights come from a diverged run or a damaged file: use an earlier checkpoint"
        )
    return remedies or [
        "check that the checkpoint and the model are of the same kind and configuration"
    ]


def _settings(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Where the shapes of the checkpoint imply another configuration than the model's: `field=value`."""
    found: dict[str, int] = {}
    for name, dimension, setting in _SIZES:
        ours, theirs = own.get(name), state.get(name)
        if ours is None or theirs is None or ours.dim() != theirs.dim():
            continue
        if ours.shape[dimension] != theirs.shape[dimension]:
            found[setting] = theirs.shape[dimension]
    window = _window(state)
    patch = state.get("vision_encoder.patch_embed.proj.weight")
    if window and patch is not None and window != _window(own):
        found["image_size"] = window * patch.shape[-1]
    for prefix, setting in _STACKS:
        depth = _depth(state, prefix)
        if depth and depth != _depth(own, prefix):
            found[setting] = depth
    settings = [f"{setting}={value}" for setting, value in found.items()]
    if (
        "vision_proj.weight" in own
        and "vision_proj.weight" in state
        and ("temp" in own) != ("temp" in state)
    ):
        settings.append(f"learnable_temperature={'temp' in state}")
    return settings


def _window(state: Mapping[str, Tensor]) -> int | None:
    table = state.get(f"vision_encoder.blocks.0{TABLE}")
    try:
        return None if table is None else window_of(table)
    except InputError:
        return None


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    found = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


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
        ours = re.sub(
            r"^(?:roberta\.)?(embeddings|encoder|pooler)\.", r"text_encoder.roberta.\1.", name
        )
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
        out[f"vision_encoder.{name}"] = (
            fit_table(name, value, grid) if name.endswith(TABLE) else value
        )
    if foreign or not out:
        raise CheckpointError(
            f"{_first_names(foreign) if foreign else 'an empty state dict'}: not X-FM's BEiT-v2 encoder; "
            "give a BEiT-v2 checkpoint without absolute positions"
        )
    if _SHARED_TABLE in state:
        shared = fit_table(_SHARED_TABLE, state[_SHARED_TABLE], grid)
        out |= {f"vision_encoder.blocks.{block}{TABLE}": shared for block in range(depth)}
    return out


def initialise(
    module: nn.Module, roberta: Source | None = None, beit2: Source | None = None
) -> InitialisationReport:
    """Load pretrained encoders into an `XFM`, in place, and report which parameters were filled.

    `roberta` and `beit2` are files or state dicts for `roberta_state` and `beit2_state`. Raises `CheckpointError` for a
    source that cannot be read or does not fit; the module is then unchanged.
    """
    own = module.state_dict()
    state: dict[str, Tensor] = {}
    if roberta is not None:
        state |= roberta_state(_open_state(roberta))
    if beit2 is not None:
        tables = [
            name for name in own if name.startswith("vision_encoder.") and name.endswith(TABLE)
        ]
        if not tables:
            raise CheckpointError(
                "the model has no vision encoder with relative positions; leave beit2 out"
            )
        state |= _beit2(_open_state(beit2), depth=len(tables), grid=window_of(own[tables[0]]))
    # A model without the masked-language head accepts RoBERTa too.
    result = load_into(
        module,
        state,
        what="the pretrained encoder",
        fresh=("",),
        surplus=("text_encoder.lm_head.",),
    )
    return InitialisationReport(
        [name for name in own if name in state], result.fresh, result.surplus
    )


def _open_state(source: Source) -> Mapping[str, Tensor]:
    return source if isinstance(source, Mapping) else read_state_dict(source)


def _first_names(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
