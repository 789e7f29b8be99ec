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

from xfm_fast.checkpoint.files import StateDict, read_state_dict
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

# Names of each problem in an error.
_EXAMPLES = 8


@dataclass
class LoadResult:
    """Names that `load_into` was allowed to skip."""

    fresh: list[str] = field(default_factory=list)
    """Parameters of the module that the state dict lacks; unchanged."""
    surplus: list[str] = field(default_factory=list)
    """Entries of the state dict that the module lacks; ignored."""


_IN_PLACE = ("__iadd__", "__imul__", "__isub__", "__itruediv__")


class _SkipInitialisers(TorchFunctionMode):
    """Skips in-place functions of meta tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        writes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        writes = writes and name != "requires_grad_"
        kwargs = kwargs or {}
        # Initialisers are looked up in torch.nn.init by name.
        target = args[0] if args else kwargs.get("tensor")
        if writes and isinstance(target, Tensor) and target.is_meta:
            return target
        return func(*args, **kwargs)


@contextmanager
def without_values() -> Iterator[None]:
    """Build modules on the meta device, without their initialisers.

    PyTorch would run them there without effect, and import its compiler and sympy for it.
    """
    with torch.device("meta"), _SkipInitialisers():
        yield


def random_tensors(templates: StateDict, seed: int = 0) -> dict[str, Tensor]:
    """Draw weights by name, the same in every model. No weight is zero, so that comparisons cover every term."""
    state = {}
    for name, tensor in templates.items():
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
    state: StateDict,
    *,
    what: str,
    fresh: Collection[str] = (),
    surplus: Collection[str] = (),
) -> LoadResult:
    """Copy `state` into `module`, or write nothing and raise one `CheckpointError` that lists every
    mismatch.

    Values are converted to the dtype and device of the module. Missing, unexpected, mis-shaped,
    non-floating, NaN and infinite entries are refused. `what` names the source in the error;
    `fresh` are prefixes of parameters that `state` may lack (`("",)` for all), `surplus` of entries
    that `module` may lack.
    """
    target = module.state_dict()
    on_meta = [name for name, tensor in target.items() if tensor.is_meta]
    if on_meta:
        raise CheckpointError(
            f"{what} cannot be loaded: {on_meta[0]!r} is on the meta device; call model.to_empty(device=...) first"
        )
    result = compare(module, state, what=what, fresh=fresh, surplus=surplus)
    with torch.no_grad():
        for name in target:
            if name in state:
                target[name].copy_(state[name])
    return result


def assign_into(module: nn.Module, state: StateDict, *, what: str) -> None:
    """Use the tensors of `state`, which nothing else may own, as the parameters of a module on the
    meta device.

    Memory-mapped tensors stay mapped: pages are read on first use. A different dtype is converted.
    Raises as `load_into`.
    """
    compare(module, state, what=what, finite=True)
    values: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, parameter in module.state_dict().items():
        value = state[name].detach().to(parameter.dtype).contiguous()
        # Two names of one tensor would become one parameter, and training would tie them.
        values[name] = value.clone() if value.data_ptr() in addresses else value
        addresses.add(value.data_ptr())
    module.load_state_dict(values, assign=True)


def compare(
    module: nn.Module,
    state: StateDict,
    *,
    what: str,
    fresh: Collection[str] = (),
    surplus: Collection[str] = (),
    finite: bool = False,
) -> LoadResult:
    """Compare as `load_into` does, without changes; the module may be on the meta device.

    Values are checked where the module has memory for them, or all of them with `finite`.
    """
    target = module.state_dict()
    problems: dict[str, list[str]] = {
        title: [] for title in ("missing", "unexpected", "wrong shape", "wrong type", _NOT_FINITE)
    }
    result = LoadResult()
    for name in target:
        if name not in state:
            (result.fresh if name.startswith(tuple(fresh)) else problems["missing"]).append(name)
    for name in state:
        if name not in target:
            skip = name.startswith(tuple(surplus))
            (result.surplus if skip else problems["unexpected"]).append(name)
    for name, parameter in target.items():
        if name not in state:
            continue
        value = state[name]
        if value.shape != parameter.shape:
            shapes = f"{list(value.shape)}, the model has {list(parameter.shape)}"
            problems["wrong shape"].append(f"{name}: {shapes}")
        if not _convertible(value, parameter):
            types = f"{_type(value)}, the model has {_type(parameter)}"
            problems["wrong type"].append(f"{name}: {types}")
        elif (finite or not parameter.is_meta) and not _finite(value):
            problems[_NOT_FINITE].append(name)
    if any(problems.values()):
        lines = [f"{what} does not fit the model; nothing was loaded"]
        for title, entries in problems.items():
            if entries:
                lines.append(f"  {title} ({len(entries)}):")
                lines += [f"    {entry}" for entry in entries[:_EXAMPLES]]
            if len(entries) > _EXAMPLES:
                lines.append(f"    ... and {len(entries) - _EXAMPLES} more")
        lines += [f"-> {remedy}" for remedy in _remedies(target, state, problems)]
        raise CheckpointError("\n".join(lines))
    return result


def require_depth(config: XFMConfig, state: StateDict, *, what: str) -> None:
    """Refuse a configuration with more layers than the checkpoint, before building any; raises `CheckpointError`."""
    sizes = {setting: _depth(state, prefix) for prefix, setting in _STACKS}
    if not any(0 < depth < getattr(config, setting) for setting, depth in sizes.items()):
        return
    for name, dimension, setting in _SIZES:
        if name in state and state[name].dim() > dimension:
            sizes[setting] = state[name].shape[dimension]
    differing = [
        f"{setting}={size}"
        for setting, size in sizes.items()
        if size and size != getattr(config, setting)
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
    # One pass without a temporary as large as the tensor, which isfinite would need; NaN survives
    # min and max.
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _type(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta tensor without values"
    name = str(tensor.dtype)
    if tensor.layout != torch.strided:
        name = f"{tensor.layout} {name}"
    return name.replace("torch.", "")


_NOT_FINITE = "NaN or infinite"
# Parameter, dimension, and the field of XFMConfig that sets its size.
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


def _remedies(target: StateDict, state: StateDict, problems: Mapping[str, list[str]]) -> list[str]:
    for name in problems["unexpected"]:
        if our_name(name) != name or name in TIED or is_dead(name):
            return [
                f"{name!r} is a name of official checkpoints: convert it with to_ours, or load it with from_official"
            ]
    remedies = []
    if settings := _settings(target, state):
        remedies.append(
            f"the checkpoint belongs to a model with {', '.join(settings)}: set that in the configuration"
        )
    for head, head_prefixes in HEAD_PREFIXES.items():
        parameters = {name for name in target if head_of(name) == head}
        if parameters and parameters <= {*problems["missing"]}:
            prefixes = ", ".join(f"{prefix}*" for prefix in head_prefixes)
            remedies.append(
                f"the checkpoint has no {head!r} head ({prefixes}): leave it out of heads=... when building the model, "
                "or allow fresh weights for it"
            )
        if not parameters and any(head_of(name) == head for name in problems["unexpected"]):
            remedies.append(
                f"the model was built without the {head!r} head: include it in heads=..., or drop it with select_heads"
            )
    if problems[_NOT_FINITE]:
        remedies.append(
            "NaN or infinite weights come from a diverged run or a damaged file: use an earlier checkpoint"
        )
    return remedies or ["check that checkpoint and model have the same type and configuration"]


def _settings(target: StateDict, state: StateDict) -> list[str]:
    """List the fields of the configuration, `field=value`, in which the checkpoint's shapes differ from the model's."""
    values: dict[str, int] = {}
    for name, dimension, setting in _SIZES:
        model, checkpoint = target.get(name), state.get(name)
        if model is None or checkpoint is None or model.dim() != checkpoint.dim():
            continue
        if model.shape[dimension] != checkpoint.shape[dimension]:
            values[setting] = checkpoint.shape[dimension]
    window = _window(state)
    patch = state.get("vision_encoder.patch_embed.proj.weight")
    if window and patch is not None and window != _window(target):
        values["image_size"] = window * patch.shape[-1]
    for prefix, setting in _STACKS:
        depth = _depth(state, prefix)
        if depth and depth != _depth(target, prefix):
            values[setting] = depth
    settings = [f"{setting}={value}" for setting, value in values.items()]
    projected = "vision_proj.weight" in target and "vision_proj.weight" in state
    if projected and ("temp" in target) != ("temp" in state):
        settings.append(f"learnable_temperature={'temp' in state}")
    return settings


def _window(state: StateDict) -> int | None:
    table = state.get(f"vision_encoder.blocks.0{TABLE}")
    try:
        return None if table is None else window_of(table)
    except InputError:
        return None


def _depth(state: StateDict, prefix: str) -> int:
    """Count the layers of a stack."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return max((int(match[1]) + 1 for match in map(pattern.match, state) if match), default=0)


Source = str | os.PathLike[str] | StateDict

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
        modules = sorted({name.split(".")[0] for name in self.fresh})
        return f"{text} (in {', '.join(modules)})" if modules else text


def roberta_state(hf_state: StateDict) -> dict[str, Tensor]:
    """Convert a Hugging Face `RobertaForMaskedLM` or `RobertaModel` state dict to our
    `text_encoder.*` names.

    The `roberta.` prefix is optional; the pooler and `position_ids` are dropped, a language-model
    head is included. Raises `CheckpointError` for an entry that RoBERTa does not have, or untied
    input and output embeddings.
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
        elif not any(fragment in ours for fragment in _ROBERTA_DROPPED):
            state[ours] = value
    if foreign or not state:
        raise CheckpointError(
            f"{_first_names(foreign) if foreign else 'an empty state dict'}: not a RoBERTa encoder; "
            "give the state dict of transformers.RobertaModel or RobertaForMaskedLM"
        )
    merge_tied(state)
    return state


def beit2_state(state: Mapping[str, Any], cfg: XFMConfig) -> dict[str, Tensor]:
    """Convert a BEiT-v2 state dict, also inside `{"model": ...}` or `{"module": ...}`, to our
    `vision_encoder.*` names.

    A shared table is copied to each block, tables are interpolated to the window of `cfg`, index
    buffers, heads and a final `norm` are dropped, as in the official loader: X-FM normalises pooled
    patches with `fc_norm`, which fine-tuned BEiT-v2 checkpoints have and pretrained ones lack, so
    `fc_norm` then stays at its initialisation. Raises `CheckpointError` for an entry that BEiT-v2
    does not have, such as absolute positions, or a table that fits no window.
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

    `roberta` and `beit2` are files or state dicts for `roberta_state` and `beit2_state`. Raises
    `CheckpointError` for a source that cannot be read or does not fit; the module is then
    unchanged.
    """
    target = module.state_dict()
    state: dict[str, Tensor] = {}
    if roberta is not None:
        state |= roberta_state(_open_state(roberta))
    if beit2 is not None:
        vision = [name for name in target if name.startswith("vision_encoder.")]
        tables = [name for name in vision if name.endswith(TABLE)]
        if not tables:
            raise CheckpointError(
                "the model has no vision encoder with relative positions; leave beit2 out"
            )
        state |= _beit2(_open_state(beit2), depth=len(tables), grid=window_of(target[tables[0]]))
    # A model without the masked-language head accepts RoBERTa too.
    head = ("text_encoder.lm_head.",)
    result = load_into(module, state, what="the pretrained encoder", fresh=("",), surplus=head)
    loaded = [name for name in target if name in state]
    return InitialisationReport(loaded, result.fresh, result.surplus)


def _open_state(source: Source) -> StateDict:
    return source if isinstance(source, Mapping) else read_state_dict(source)


def _first_names(names: list[str]) -> str:
    text = ", ".join(map(repr, names[:3]))
    return f"{text} and {len(names) - 3} more" if len(names) > 3 else text
