"""`accelerate(model)`: swap fused modules into a live model, verify the outputs, return a report that can revert."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError, UnavailableError, explain_types
from xfm_fast.graphs import CallGraphs, require_gpu
from xfm_fast.kernels.backend import Backend, resolve
from xfm_fast.kernels.marked import EightBits, keep_within, kind_of
from xfm_fast.models.frozen import slot_of
from xfm_fast.replace import (
    adapters,
    clip_text,
    heads,
    layer,
    official,
    quantised,
    timm_vision,
    torch_modules,
    transformers_text,
    transformers_vision,
    unpadded,
)
from xfm_fast.replace.expectation import (
    Expectation,
    Unknown,
    measured_product,
    product_parameters,
    shares,
    unknown_layers,
    warn_of_slow_bfloat16,
)
from xfm_fast.replace.frozen import FrozenLinear
from xfm_fast.replace.frozen import check as check_freezable
from xfm_fast.replace.frozen import freeze as freeze_weights
from xfm_fast.replace.swap import (
    BANDS,
    Fused,
    Rule,
    Settings,
    find,
    forward_replaced,
    fused_form,
    is_fused,
    original_class,
    restore,
    swap,
)

# In order of precedence; the modules of rows register theirs at import.
_RULES = (heads, unpadded, layer, clip_text, official, torch_modules)
_ROWS = (transformers_text, transformers_vision, timm_vision)
Selection = str | type[nn.Module] | Sequence[str | type[nn.Module]]
# Budget for timing the `verify` batch.
_TIMED_RUNS, _TIMED_SECONDS = 5, 0.5
_ROW = "register a LayerSpec to support it (xfm_fast.replace.register)"


@explain_types
def accelerate(
    model: nn.Module,
    *,
    kernels: Backend = "auto",
    dtype: torch.dtype | EightBits | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    unpad: bool = False,
    skip_logits: bool = False,
    freeze: bool = False,
    cuda_graphs: bool = False,
    verify: Any = None,
) -> Report:
    """Replace the modules of a live model with fused forms, in place and on this instance only.

    Supported are the transformers of Hugging Face and timm, the official X-FM and X²-VLM code, and PyTorch's layers.
    Modules stay the same objects with the same parameters, so state-dict keys, optimizers, hooks and wrappers are
    unaffected. Calls that the fused form does not cover (attention weights as output, caches, adapters inside) run
    the original code.

    The swap changes classes and is not atomic over a model: no other thread may call, train or copy the model
    while `accelerate` or `revert` runs. Before and after, the model is as thread-safe as the original.

    Args:
        model: any module.
        kernels: backend of the ops; an explicit backend never falls back.
        dtype: compute dtype; parameters keep their storage dtype. None follows the inputs. "int8", on a CPU, rounds
            the linear layers of blocks, weights per output channel and activations per token, where no gradient is
            needed. "fp8" does the same on a GPU of compute capability 8.9 or newer and refuses gradients; a CPU
            emulates it, slowly, to show the loss of accuracy. The rest runs in bfloat16 where that is fast. With
            `verify`, the blocks with the largest error stay in floating point until the cosine of every output is at
            least 0.99.
        include: only modules under these: qualified names or class names (with * and ?), or classes.
        exclude: skip these modules and their submodules.
        unpad: run whole encoders without padding. Outputs of real tokens are unchanged; padding gets zeros, where the
            original leaves arbitrary values.
        skip_logits: masked-language heads in training mode return `logits=None` when labels are passed, so that only
            labelled positions reach the vocabulary. By default logits are returned.
        freeze: for inference on a CPU: store the weights of layers in the layout of the library that is fastest here,
            replacing the parameters. No parameter takes gradients then, state dicts are unchanged, and `revert`
            restores the weights bit for bit.
        cuda_graphs: replay calls without gradients, in evaluation mode, as CUDA graphs; each shape is captured at its
            first call. For models whose sizes do not depend on values; other models raise at their first call.
        verify: a batch (keyword arguments as a mapping, positional ones as a tuple, or one tensor). The model runs on
            it before and after, in evaluation mode; on a CPU a few times, to measure the speedup.

    Returns:
        A report that prints as a table and can `revert()`.

    Raises:
        InputError: nothing to replace, a selection that matches nothing, parameters without values, or outputs that
            `verify` finds different. The model is unchanged then.
        UnavailableError: the dtype or backend cannot run on the model's device.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"accelerate takes a torch.nn.Module, not {type(model).__name__}")
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise InputError(f"parameters have no values yet ({meta} is on the meta device); load the weights first")
    kind = None
    if isinstance(dtype, str):
        kind, dtype = dtype, quantised.check(model, dtype, freeze)
    settings = Settings(kernels, dtype, unpad, skip_logits, kind)
    _check_machine(model, settings)
    if cuda_graphs:
        if unpad:
            raise InputError(
                "unpad=True packs a variable number of tokens, and cuda_graphs=True needs fixed sizes; leave one out"
            )
        require_gpu(model)
    graphs = model.__dict__.pop("forward") if _in_graphs(model) else None
    chosen = dict(model.named_modules())
    excluded = {} if exclude is None else _under(chosen, exclude, "exclude")
    if include is not None:
        chosen = _under(chosen, include, "include")
    chosen = {path: module for path, module in chosen.items() if path not in excluded}
    if freeze:
        check_freezable(model, settings)
    before = None if verify is None else _outputs(model, verify)
    seconds = None if verify is None else _seconds(model, verify)
    former = [module for module in model.modules() if isinstance(module, Fused)]
    undo = [(module, fused_form(module), module.settings) for module in former if not isinstance(module, FrozenLinear)]
    frozen = next((module.settings for module in former if isinstance(module, FrozenLinear)), None)
    for module in former:
        restore(module)
    try:
        report = _replace(model, chosen, settings)
        if freeze:
            report.freeze(model, settings)
        if kind is not None:
            report.quantise(model, kind)
            if (wanted := before) is not None:
                report.keep_within(lambda: quantised.least_cosine(wanted, _outputs(model, verify), _mask(verify)))
        if before is not None:
            after = _outputs(model, verify)
            report.compare(before, after, verify, dtype)
            report._useful = _useful(verify) if report._packed else 1.0
            report._measured = None if seconds is None else seconds / (_seconds(model, verify) or seconds)
        if cuda_graphs:
            model.__dict__["forward"] = CallGraphs(model.forward, model)
            report._model = model
    except BaseException:
        for module in model.modules():
            if is_fused(module):
                restore(module)
        for module, form, its_settings in undo:
            swap(module, form, its_settings)
        once: set[EightBits | None] = {its_settings.eight_bits for _, _, its_settings in undo}
        for each in once:
            if each is not None:
                quantised.quantise(model, [m for m, _, own in undo if own.eight_bits == each], each)
        if frozen is not None:
            freeze_weights(model, [module for module, _, _ in undo if isinstance(module, Fused)], frozen)
        if graphs is not None:
            model.__dict__["forward"] = graphs
        raise
    return report


@contextmanager
def accelerated(model: nn.Module, **options: Any) -> Iterator[Report]:
    """Context manager: `accelerate(model, **options)` on entry, `revert()` on exit."""
    report = accelerate(model, **options)
    try:
        yield report
    finally:
        report.revert()


@dataclass(frozen=True)
class Entry:
    """A module that a rule recognised."""

    path: str  # qualified name; empty for the model itself
    class_name: str
    fused: str  # name of the fused form
    gain: str  # what the fused form saves
    reason: str | None = None  # why the module was not replaced; None if it was
    share: float = 0.0  # share of the model's linear weights in this module


@dataclass
class Report:
    """Recognised modules: which were replaced, which were not, and why. Printing it gives a table.

    The table shows the current state: a replaced module whose parts were exchanged or hooked since (by adapters,
    quantisation, hooks) is listed with the reason why its original runs.
    """

    entries: list[Entry]
    # unrecognised layers with a relevant share of the model's linear weights
    unknown: list[Unknown] = field(default_factory=list)
    # largest difference of each verified output, relative to its largest value
    differences: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, quantised.Rounding] = field(default_factory=dict)  # error of each verified output in 8 bits
    _modules: list[nn.Module] = field(default_factory=list, repr=False)
    _frozen: list[FrozenLinear] = field(default_factory=list, repr=False)
    _eight_bits: EightBits | None = None
    _rounded: list[list[nn.Parameter]] = field(default_factory=list, repr=False)
    """Marked weights of every module that has some."""
    _exempt: int = 0
    _model: nn.Module | None = field(default=None, repr=False)
    """The model, where its calls are replayed as graphs."""
    _share: float = 0.0
    _packed: float = 0.0
    _useful: float = 1.0
    _measured: float | None = None

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.reason is None]

    @property
    def left(self) -> list[Entry]:
        """Recognised modules that were not replaced."""
        return [entry for entry in self.entries if entry.reason is not None]

    @property
    def declining(self) -> dict[str, str]:
        """Replaced modules that currently run their original forward: path → reason."""
        found = {}
        for entry, module in zip(self.replaced, self._modules, strict=False):
            reason = module.declines() if isinstance(module, Fused) else "it was reverted"
            if reason is not None:
                found[entry.path] = reason
        return found

    @property
    def expected(self) -> Expectation:
        """Expected speedup, from counted weights and the timings of this process."""
        first = next((module for module in self._modules if isinstance(module, Fused)), None)
        if first is None:
            return Expectation(0.0, None)
        # fp8 GEMMs are not autotuned.
        raced = self._eight_bits != "fp8"
        product = measured_product(first, first.settings.backend, first.settings.dtype) if raced else None
        return Expectation(self._share, product, self._useful, self._packed, self._measured)

    @property
    def expected_gains(self) -> dict[str, float]:
        """Expected speedup of the linear layers of each replaced module, by path; empty if `verify` measured less."""
        whole, found, packed = self.expected, {}, _packed_paths(self.replaced)
        if whole.overall < whole.bound:
            return {}
        for entry in self.replaced:
            useful = whole.useful if any(_within(entry.path, path) for path in packed) else 1.0
            if entry.share and (whole.product is not None or useful < 1):
                found[entry.path] = (whole.product or 1.0) / useful
        return found

    def revert(self) -> None:
        """Restore the original forward of every module. Idempotent; no other thread may use the model meanwhile."""
        if self._model is not None and _in_graphs(self._model):
            del self._model.__dict__["forward"]
        for module in (*self._modules, *self._frozen):
            if is_fused(module):
                restore(module)

    def freeze(self, model: nn.Module, settings: Settings) -> None:
        """Pack the weights of the replaced modules in place."""
        self._frozen = freeze_weights(model, [m for m in self._modules if isinstance(m, Fused)], settings)
        if not self._frozen:
            raise InputError(
                "freeze=True finds no weight to pack: it supports BERT-like layers and registered families in float32 "
                "or bfloat16, without hooks or adapters; leave freeze out"
            )

    def quantise(self, model: nn.Module, kind: EightBits) -> None:
        """Run the linear layers of the replaced modules in 8 bits."""
        self._eight_bits = kind
        self._rounded = quantised.quantise(model, [m for m in self._modules if isinstance(m, Fused)], kind)
        if not self._rounded:
            of_size = " with sizes that are multiples of 16" if kind == "fp8" else ""
            raise InputError(
                f"dtype={kind!r} finds no linear layer to round: it supports blocks{of_size} in float32 or bfloat16, "
                "without hooks or adapters; choose another dtype"
            )

    def keep_within(self, cosine: Callable[[], float]) -> None:
        """Move the modules with the largest 8-bit error back to floating point until the cosine is high enough."""
        assert self._eight_bits is not None
        self._exempt = keep_within(cosine, self._rounded, self._eight_bits, quantised.LEAST_COSINE)

    def compare(
        self, before: dict[str, Tensor], after: dict[str, Tensor], batch: Any, dtype: torch.dtype | None
    ) -> None:
        """Record the difference of every output, at real tokens only; raise InputError if it exceeds rounding."""
        kind, mask = self._eight_bits, _mask(batch)
        for name, wanted in before.items():
            found = after.get(name)
            label = f"output {name!r}" if name else "the output"
            if found is None or found.shape != wanted.shape:
                raise InputError(
                    f"{label} was {tuple(wanted.shape)} and is {None if found is None else tuple(found.shape)} after "
                    "acceleration; the model was reverted"
                )
            if kind is not None:
                self.rounding[name] = quantised.rounding(wanted, found, mask)
            wanted, found = quantised.without_padding(wanted, found, mask)
            band = BANDS.get(dtype or wanted.dtype, BANDS[torch.float32])
            scale = float(wanted.abs().max()) if wanted.numel() else 0.0
            error = float((found.double() - wanted.double()).abs().max()) if wanted.numel() else 0.0
            self.differences[name] = error / scale if scale else error
            if kind is not None:
                cosine = self.rounding[name].cosine
                if not cosine >= quantised.LEAST_COSINE:
                    raise InputError(
                        f"{label} has a cosine of {cosine:.3f} to the original, below {quantised.LEAST_COSINE} for "
                        f"{kind}; the model was reverted. Use exclude=… or dtype=torch.bfloat16"
                    )
            elif not self.differences[name] <= band:
                raise InputError(
                    f"{label} differs by {self.differences[name]:.1e} of its largest value, more than rounding in "
                    f"{dtype or wanted.dtype} ({band:.0e}); the model was reverted. Use exclude=…"
                )

    @property
    def rounded_weights(self) -> int:
        """Number of weights that run in 8 bits."""
        return sum(kind_of(weight) is not None for group in self._rounded for weight in group)

    @property
    def frozen_bytes(self) -> int:
        """Size of the weights that are packed in place of their parameters."""
        packs = {id(packed): packed for packed, *_ in map(slot_of, filter(is_fused, self._frozen))}
        return sum(packed.numel() * packed.element_size() for packed in packs.values())

    @property
    def _unfrozen_bytes(self) -> int:
        """Size of the linear weights in replaced modules that are still parameters."""
        found = {p for module in self._modules for p in product_parameters(module)}
        return sum(p.numel() * p.element_size() for p in found)

    def __str__(self) -> str:
        rows = [("module", "class", "replaced by", "products", "expected", "why, or what it saves")]
        groups: dict[tuple[str, str, str, str], list[Entry]] = {}
        declining, gains = self.declining, self.expected_gains
        for entry in self.entries:
            fate, why = entry.fused, entry.gain
            if entry.reason is not None:
                fate, why = "not replaced", entry.reason
            elif entry.path in declining:
                fate, why = "runs its original", declining[entry.path]
            gain = gains.get(entry.path) if fate == entry.fused else None
            groups.setdefault((entry.class_name, fate, f"{gain:.1f}×" if gain else "", why), []).append(entry)
        for (class_name, fate, gain, why), alike in groups.items():
            place, share = alike[0].path or "(the model)", sum(entry.share for entry in alike)
            if len(alike) > 1:
                place += f" and {len(alike) - 1} more"
            rows.append((place, class_name, fate, f"{share:.0%}" if share >= 0.005 else "", gain, why))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("─" * width for width in widths))
        lines.append(f"{len(self.replaced)} modules replaced, {len(self.left)} not replaced")
        if declining:
            lines[-1] += f"; {len(declining)} of them currently run their original"
        lines += [f"unknown: {layers}; {_ROW}" for layers in self.unknown]
        if frozen := self.frozen_bytes:
            line = f"frozen for inference: {frozen / 2**20:,.1f} MB of weights packed in place"
            if left := self._unfrozen_bytes:
                line += f"; {left / 2**20:,.1f} MB of other linear weights stay parameters"
            lines.append(line)
        if rounded := self.rounded_weights:
            exempt = f"; {self._exempt} modules stay in floating point for accuracy" if self._exempt else ""
            how = "without gradients" if self._eight_bits == "int8" else "and cannot be trained"
            lines.append(f"{rounded} weights run in {self._eight_bits} {how}{exempt}")
            if self._eight_bits == "fp8" and any(weight.is_cpu for group in self._rounded for weight in group):
                lines.append("this CPU emulates fp8, slowly: results match those of a GPU, times do not")
        lines.append(str(self.expected))
        lines += [line for line in [adapters.summary(self._modules)] if line is not None]
        found = self.rounding or {name: f"differs by {value:.1e}" for name, value in self.differences.items()}
        lines += [f"verified: {name or 'output'} {cost}" for name, cost in found.items()]
        return "\n".join(lines)


def rules() -> tuple[Rule, ...]:
    """The rules of all libraries."""
    return tuple(rule for module in _RULES for rule in module.RULES)


def _in_graphs(model: nn.Module) -> bool:
    """True if the model's calls are replayed as CUDA graphs."""
    return isinstance(model.__dict__.get("forward"), CallGraphs)


class _InOneType(Fused):
    """Fused form of the root model under an explicit dtype: unfused parts run in autocast."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        with torch.autocast(device.type, self.settings.dtype):
            return super().forward(*args, **kwargs)


def _replace(model: nn.Module, chosen: dict[str, nn.Module], settings: Settings) -> Report:
    entries, replaced, known = [], [], rules()
    reported: set[nn.Module] = set()
    inside: set[nn.Module] = set()
    for path, module in chosen.items():
        if module in inside:
            continue
        entry, rule = _decide(path, module, known, settings)
        if entry is None:
            continue
        entries.append(entry)
        if rule is None:
            # Norms inside unrecognised layers are recognised too.
            reported.update(module.modules() if product_parameters(module) else ())
        else:
            replaced.append((module, rule.fused))
            # PyTorch's norms and attentions inside a fused module are read, never called.
            parts = _bypassed(module, rule.fused)
            inside |= {part for part in parts if original_class(part).__module__.startswith("torch.nn.")}
    computing = {module for module, _ in replaced if product_parameters(module)}
    for module, fused in replaced:
        within = [*module.modules()][1:]
        # The linear layers of an unpadded encoder are in its layers, some of which may be unknown.
        reported.update(within if computing.isdisjoint(within) else _bypassed(module, fused), [module])
    unknown = unknown_layers(model, chosen, reported)
    if not replaced:
        raise InputError(_nothing(model, entries, unknown))
    for module, fused in replaced:
        swap(module, fused, settings)
    _, together = shares(model, [module for module, _ in replaced])
    parts, _ = shares(model, [chosen[entry.path] for entry in entries])
    entries = [replace(entry, share=share) for entry, share in zip(entries, parts, strict=True)]
    report = Report(entries, unknown, _modules=[module for module, _ in replaced], _share=together)
    _, report._packed = shares(model, [chosen[path] for path in _packed_paths(report.replaced)])
    if settings.dtype is not None and not is_fused(model):
        swap(model, _InOneType, settings)
        report._modules.append(model)
    return report


def _packed_paths(entries: Sequence[Entry]) -> list[str]:
    """Paths of the modules that run without padding: encoders, and masked-language heads over them."""
    encoders = [entry.path for entry in entries if "npadded" in entry.fused]
    heads = [entry.path for entry in entries if entry.fused == "FusedMaskedLM"]
    return encoders + [path for path in heads if any(_within(encoder, path) for encoder in encoders)]


def _within(path: str, other: str) -> bool:
    """True if path is other, or inside it."""
    return not other or path == other or path.startswith(f"{other}.")


def _bypassed(module: nn.Module, fused: type[Fused]) -> set[nn.Module]:
    """The submodules that the fused form reads without calling."""
    names = fused.adapted(original_class(module)).get("bypassed", fused.bypassed)
    return {part for name in names if (part := find(module, name)) is not None}


def _decide(
    path: str, module: nn.Module, known: Sequence[Rule], settings: Settings
) -> tuple[Entry | None, Rule | None]:
    """The first rule that accepts a module; otherwise the entry with the first refusal."""
    left = None
    for rule in known:
        if not rule.recognises(module):
            continue
        reason = rule.reason_against(module, settings)
        if reason is None and forward_replaced(module):
            reason = "its forward was replaced on the instance"
        reason = reason or _why_not_values(module, rule.fused, settings)
        entry = Entry(path, original_class(module).__name__, rule.name, rule.gain, reason)
        if reason is None:
            return entry, rule
        left = left or entry
    return left, None


def _why_not_values(module: nn.Module, fused: type[Fused], settings: Settings) -> str | None:
    """Why the ops cannot read the weights of a module (quantised, sharded, mixed dtypes); None if they can."""
    types: dict[torch.dtype, str] = {}
    for name in fused.adapted(original_class(module)).get("bypassed", fused.bypassed):
        part = find(module, name)
        for parameter in () if part is None or adapters.is_adapted(part) else part._parameters.values():
            if parameter is None:
                continue
            if type(parameter.data) is not Tensor or not parameter.is_floating_point():
                kind = type(parameter.data).__name__ if type(parameter.data) is not Tensor else parameter.dtype
                return f"{name} has a weight of {kind} (quantised or sharded)"
            types.setdefault(parameter.dtype, name)
    if len(types) > 1 and settings.dtype is None:
        (first, one), (second, other) = list(types.items())[:2]
        return f"{one} is {first} and {other} {second}; model.to({first}) or dtype=… makes them one type"
    return None


def _under(modules: dict[str, nn.Module], selection: Selection, argument: str) -> dict[str, nn.Module]:
    """Modules that match a selection, and their submodules."""
    found: dict[str, nn.Module] = {}
    for one in [selection] if isinstance(selection, (str, type)) else selection:
        if isinstance(one, type):
            roots = [path for path, module in modules.items() if isinstance(module, one)]
        else:
            named = {path: (path, original_class(module).__name__) for path, module in modules.items()}
            roots = [path for path, names in named.items() if any(fnmatchcase(name, one) for name in names)]
        if not roots:
            name = one if isinstance(one, str) else one.__name__
            raise InputError(f"{argument}={name!r} matches no module of the model, by name or class")
        for root in roots:
            inside = f"{root}." if root else ""
            found |= {path: module for path, module in modules.items() if path == root or path.startswith(inside)}
    return {path: module for path, module in modules.items() if path in found}


def _check_machine(model: nn.Module, settings: Settings) -> None:
    devices = {p.device for p in model.parameters()}
    types = {p.dtype for p in model.parameters() if p.is_floating_point()} | {settings.dtype} - {None}
    narrow = torch.bfloat16 in (types if settings.dtype is None else {settings.dtype}) and settings.eight_bits is None
    for device in devices:
        try:
            resolve(settings.backend, torch.empty(0, device=device))
        except ValueError as error:
            raise UnavailableError(str(error)) from None
        if device.type == "cpu" and torch.bfloat16 in types and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise UnavailableError(
                "bfloat16 on this CPU is emulated and slower than float32 (it lacks AVX-512 or AMX instructions); use "
                "dtype=None with model.float()"
            )
        if device.type == "cpu" and narrow and settings.backend in (None, "cpu"):
            warn_of_slow_bfloat16()
        if device.type == "cpu" and settings.dtype is torch.float16:
            raise UnavailableError("float16 is for GPUs; on a CPU use dtype=torch.bfloat16 or None")
    if settings.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype={settings.dtype} is not supported; choose float32, bfloat16 or float16")


def _nothing(model: nn.Module, entries: Sequence[Entry], unknown: Sequence[Unknown]) -> str:
    name = original_class(model).__name__
    if original_class(model).__module__.startswith("xfm_fast."):
        return f"{name} already uses these kernels; freeze() and quantise() make it faster on a CPU"
    paths: dict[str, list[str]] = {}
    for entry in entries:
        paths.setdefault(entry.reason or "", []).append(entry.path or name)
    reasons = [
        f"{alike[0]}{f' and {len(alike) - 1} more' if len(alike) > 1 else ''}: {reason}"
        for reason, alike in paths.items()
    ]
    why = "; ".join(reasons[:5])
    foreign = f" Unknown: {'; '.join(map(str, unknown[:5]))}; {_ROW}." if unknown else ""
    if any(entry.class_name != "LayerNorm" for entry in entries):
        return f"no module of {name} can be replaced: {why}{f'.{foreign}' if foreign else ''}"
    return (
        f"no module of {name} is supported{f' ({why})' if why else ''}.{foreign} Supported are encoders of "
        "transformers (BERT, RoBERTa, XLM-R, MPNet, DistilBERT, ELECTRA, ALBERT, ModernBERT, NomicBERT, LayoutLMv3, "
        "DeBERTa-v2, BEiT, Data2Vec, ViT, DeiT, CLIP, SigLIP, DINOv2, DINOv3, ViT-MAE, Swin, BLIP), vision "
        "transformers of timm, towers of open_clip, the official X-FM and X²-VLM modules, and "
        "torch.nn.MultiheadAttention, TransformerEncoderLayer and LayerNorm; xfm_fast.replace.register adds your own "
        "layers, and xfm_fast.kernels.ops has operations to build with"
    )


def _outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Floating-point outputs of a model by name, in evaluation mode, without gradients."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(batch, Mapping):
                made = model(**batch)
            elif isinstance(batch, (tuple, list)):
                made = model(*batch)
            else:
                made = model(batch)
    finally:
        for module, training in modes.items():
            module.training = training
    return {name: leaf for name, leaf in _leaves(made, "") if leaf.is_floating_point()}


def _seconds(model: nn.Module, batch: Any) -> float | None:
    """Best time of a few runs on a CPU; None on other devices."""
    if not all(p.is_cpu for p in model.parameters()):
        return None
    best, until = math.inf, time.perf_counter() + _TIMED_SECONDS
    for _ in range(_TIMED_RUNS):
        start = time.perf_counter()
        _outputs(model, batch)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > until:
            break
    return best


def _mask(batch: Any) -> Any:
    """The attention mask of a batch, or None."""
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None


def _useful(batch: Any) -> float:
    """Share of real tokens in a batch; 1 without a padding mask."""
    mask = _mask(batch)
    return float(mask.bool().float().mean()) if isinstance(mask, Tensor) and mask.ndim == 2 else 1.0


def _leaves(made: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested mappings, sequences and pytrees, by dotted name."""
    if isinstance(made, Tensor):
        yield name, made
    elif isinstance(made, Mapping):
        for key, value in made.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        parts = made if isinstance(made, (tuple, list)) else pytree.tree_leaves(made)
        for number, value in enumerate(parts):
            if value is not made:
                yield from _leaves(value, f"{name}.{number}" if name else str(number))
