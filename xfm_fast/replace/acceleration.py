"""`accelerate(model)`: swap fused modules into a live model, verify the outputs, return a report that can revert."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError, UnavailableError, explain_types
from xfm_fast.graphs import CallGraphs, require_gpu
from xfm_fast.kernels.backend import Backend, resolve
from xfm_fast.kernels.cpu import gemm
from xfm_fast.kernels.flags import EightBits, keep_within
from xfm_fast.kernels.linear import floating_dtype
from xfm_fast.replace import adapters, timm_vision, transformers_rows
from xfm_fast.replace.heads import FusedEmbeddings, FusedMaskedLM, VocabularyHead
from xfm_fast.replace.layer import FusedLayer
from xfm_fast.replace.official import (
    OfficialEmbeddings,
    OfficialTextEncoder,
    OfficialTextLayer,
    OfficialVisionBlock,
    OfficialVocabularyHead,
)
from xfm_fast.replace.report import (
    ROW,
    Entry,
    Report,
    Unknown,
    in_graphs,
    linear_weights,
    size_of,
    unknown_layers,
)
from xfm_fast.replace.stored import FrozenLinear, quantise
from xfm_fast.replace.stored import freeze as freeze_weights
from xfm_fast.replace.swap import (
    Fused,
    Settings,
    counted,
    find,
    forward_patched,
    forward_replaced,
    fused_form,
    is_fused,
    original_class,
    restore,
    swap,
)
from xfm_fast.replace.torch_modules import (
    FusedLayerNorm,
    FusedMultiheadAttention,
    UnpaddedTransformerEncoder,
)
from xfm_fast.replace.unpadded import CutOpenClip, CutOpenClipText, CutTextModel, UnpaddedEncoder
from xfm_fast.replace.verification import (
    LEAST_COSINE,
    arguments_of,
    compare_outputs,
    least_cosine,
    mask_of,
    model_outputs,
    speedups,
)

# In order of precedence.
FORMS: tuple[type[Fused], ...] = (
    *(
        FusedEmbeddings,
        FusedMaskedLM,
        VocabularyHead,
        UnpaddedEncoder,
        CutTextModel,
        CutOpenClip,
        CutOpenClipText,
    ),
    *(FusedLayer, OfficialTextEncoder, OfficialTextLayer, OfficialVisionBlock, OfficialEmbeddings),
    *(OfficialVocabularyHead, UnpaddedTransformerEncoder, FusedMultiheadAttention, FusedLayerNorm),
)
# Forms of parts: what is around them in a layer is not replaced with them.
_PARTS = (FusedMultiheadAttention.__name__, FusedLayerNorm.__name__)
# These register their rows at import.
_ROWS = (transformers_rows, timm_vision)
Selection = str | type[nn.Module] | Sequence[str | type[nn.Module]]
# Below this it is noise.
_SLOWER = 1.05


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
        verify: a batch (keyword arguments as a mapping, positional ones as a tuple, or one tensor; for a model of
            sentence-transformers a list of texts, or of pairs). The model runs on it before and after, in evaluation
            mode; on a CPU several times in turn, to measure the speedup. The report says which fused modules ran.

    Returns:
        A report that prints as a table and can `revert()`.

    Raises:
        InputError: nothing to replace, a selection that matches nothing, parameters without values, or a `verify`
            batch with different outputs or without a fused product. The model is unchanged then.
        UnavailableError: the dtype or backend cannot run on the model's device.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"accelerate takes a torch.nn.Module, not {type(model).__name__}")
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise InputError(
            f"parameters have no values yet ({meta} is on the meta device); load the weights first"
        )
    kind, compute = (dtype, None) if isinstance(dtype, str) else (None, dtype)
    if kind is not None:
        devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
        types = {floating_dtype(kind, device) for device in devices}
        compute = types.pop() if len(types) == 1 else None
        if freeze:
            raise InputError(
                f"freeze=True cannot be combined with dtype={kind!r}; leave one of them out"
            )
    settings = Settings(kernels, compute, unpad, skip_logits, kind, freeze)
    _check_machine(model, settings)
    if cuda_graphs:
        if unpad:
            raise InputError(
                "unpad=True packs a variable number of tokens, and cuda_graphs=True needs fixed sizes; leave one out"
            )
        require_gpu(model)
    chosen = dict(model.named_modules())
    excluded = {} if exclude is None else _under(chosen, exclude, "exclude")
    if include is not None:
        chosen = _under(chosen, include, "include")
    chosen = {path: module for path, module in chosen.items() if path not in excluded}
    with _without_former(model):
        batch = None if verify is None else arguments_of(model, verify)
        before, mask = {} if batch is None else model_outputs(model, batch), mask_of(batch)
        report, forms = _plan(model, chosen, settings)
        report._frozen, report._rounded = _install(model, forms, settings)
        if freeze and not report._frozen:
            raise InputError(
                "freeze=True finds no weight to pack: it supports BERT-like layers and registered families in float32 "
                "or bfloat16, without hooks or adapters; leave freeze out"
            )
        if kind is not None and not report._rounded:
            of_size = " with sizes that are multiples of 16" if kind == "fp8" else ""
            raise InputError(
                f"dtype={kind!r} finds no linear layer to round: it supports blocks{of_size} in float32 or bfloat16, "
                "without hooks or adapters; choose another dtype"
            )
        if batch is not None:
            if kind is not None:

                def cosine() -> float:
                    return least_cosine(before, model_outputs(model, batch), mask)

                report._exempt = keep_within(cosine, report._rounded, kind, LEAST_COSINE)
            with counted() as runs:
                after = model_outputs(model, batch)
            report.runs = {
                entry.path: runs[module]
                for entry, module in zip(report.replaced, report._modules, strict=False)
            }
            _check_coverage(report, runs)
            report.differences, report.rounding = compare_outputs(
                before, after, mask, compute, kind
            )
            if all(p.is_cpu for p in model.parameters()):
                report.speedups, report.untimed = speedups(
                    model, batch, partial(_original_forward, report)
                )
        if cuda_graphs:
            model.__dict__["forward"] = CallGraphs(model.forward, model)
            report._model = model
    return report


@contextmanager
def accelerated(model: nn.Module, **options: Any) -> Iterator[Report]:
    """Context manager: `accelerate(model, **options)` on entry, `revert()` on exit."""
    report = accelerate(model, **options)
    try:
        yield report
    finally:
        report.revert()


Forms = list[tuple[nn.Module, type[Fused]]]


@contextmanager
def _without_former(model: nn.Module) -> Iterator[None]:
    """Remove an earlier acceleration, and install it again on an error."""
    graphs = model.__dict__.pop("forward") if in_graphs(model) else None
    former = [module for module in model.modules() if isinstance(module, Fused)]
    forms: dict[Settings, Forms] = {}
    for module in former:
        if not isinstance(module, FrozenLinear):
            forms.setdefault(module.settings, []).append((module, fused_form(module)))
    for module in former:
        restore(module)
    try:
        yield
    except BaseException:
        for module in model.modules():
            if is_fused(module):
                restore(module)
        for settings, alike in forms.items():
            _install(model, alike, settings)
        if graphs is not None:
            model.__dict__["forward"] = graphs
        raise


def _install(
    model: nn.Module, forms: Forms, settings: Settings
) -> tuple[list[FrozenLinear], list[list[nn.Parameter]]]:
    """Swap modules to their fused forms; returns the layers with packed weights and the flagged weights by module."""
    for module, form in forms:
        swap(module, form, settings)
    fused = [module for module, _ in forms if isinstance(module, Fused)]
    frozen = freeze_weights(model, fused, settings) if settings.freeze else []
    return frozen, [] if settings.eight_bits is None else quantise(
        model, fused, settings.eight_bits
    )


def _check_coverage(report: Report, runs: Mapping[nn.Module, int]) -> None:
    """Check that fused products ran on the verify batch: its outputs prove only the forms that computed them."""
    computing = [module for module in report._modules if linear_weights(module)] or report._modules
    if not any(runs[module] for module in computing):
        raise InputError(
            f"verify compared the original with itself: {report.coverage()}. The model was reverted; give a batch that "
            "fused forms compute (without attention weights or caches as outputs), or leave verify out"
        )


@contextmanager
def _original_forward(report: Report) -> Iterator[None]:
    """Run the original forward inside, without giving up what fused forms have prepared."""
    fused: list[nn.Module] = [*report._modules, *report._frozen]
    classes = [type(module) for module in fused]
    weights = {layer: nn.Parameter(layer.weight, requires_grad=False) for layer in report._frozen}
    for module in fused:
        object.__setattr__(module, "__class__", original_class(module))
    for layer, weight in weights.items():
        layer._parameters["weight"] = weight
    try:
        yield
    finally:
        for layer in weights:
            del layer._parameters["weight"]
        for module, kind in zip(fused, classes, strict=True):
            object.__setattr__(module, "__class__", kind)


class _InOneType(Fused):
    """Fused form of the root model under an explicit dtype: unfused parts run in autocast."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        with torch.autocast(device.type, self.settings.dtype):
            return super().forward(*args, **kwargs)


def _plan(
    model: nn.Module, chosen: dict[str, nn.Module], settings: Settings
) -> tuple[Report, Forms]:
    """Decide on every module: the report, and the modules with their fused forms."""
    entries: list[Entry] = []
    forms: Forms = []
    total = size_of(linear_weights(model)) or 1
    reported: set[nn.Module] = set()
    layers: list[str] = []
    inside: set[nn.Module] = set()
    for path, module in chosen.items():
        entry, form = (None, None) if module in inside else _decide(path, module, settings)
        if entry is None:
            continue
        weights = linear_weights(module)
        entries.append(replace(entry, share=size_of(weights) / total))
        if entry.fused not in _PARTS:
            layers.append(path)
        if form is None:
            # Norms inside unrecognised layers are recognised too.
            reported.update(module.modules() if weights else ())
        else:
            forms.append((module, form))
            # PyTorch's norms and attentions inside a fused module are read, never called.
            parts = _bypassed(module, form).values()
            inside |= {
                part for part in parts if original_class(part).__module__.startswith("torch.nn.")
            }
    modules = [module for module, _ in forms]
    computing = {module for module in modules if linear_weights(module)}
    for module, fused in forms:
        within = [*module.modules()][1:]
        # The linear layers of an unpadded encoder are in its layers, some of which may be unknown.
        reported.update(
            within if computing.isdisjoint(within) else _bypassed(module, fused).values(), [module]
        )
    unknown = unknown_layers(model, chosen, reported, layers)
    if not forms:
        raise InputError(_nothing(model, entries, unknown))
    if settings.dtype is not None and model not in modules:
        forms.append((model, _InOneType))
    share = size_of(linear_weights(*modules)) / total
    modules = [module for module, _ in forms]
    return Report(entries, unknown, share, _modules=modules, _eight_bits=settings.eight_bits), forms


def _bypassed(module: nn.Module, fused: type[Fused]) -> dict[str, nn.Module]:
    """The submodules that the fused form reads without calling, by name."""
    names = fused.adapted(original_class(module)).get("bypassed", fused.bypassed)
    return {name: part for name in names if (part := find(module, name)) is not None}


def _decide(
    path: str, module: nn.Module, settings: Settings
) -> tuple[Entry | None, type[Fused] | None]:
    """The first form that accepts a module; otherwise the entry with the first refusal."""
    left = None
    for form in FORMS:
        if not form.recognises(module):
            continue
        reason = form.refusal(module, settings)
        if reason is None and forward_replaced(module):
            reason = "its forward was replaced on the instance"
        reason = reason or _why_patched(module, form) or _why_not_values(module, form, settings)
        entry = Entry(path, original_class(module).__name__, form.__name__, form.benefit, reason)
        if reason is None:
            return entry, form
        left = left or entry
    return left, None


def _why_patched(module: nn.Module, fused: type[Fused]) -> str | None:
    """Return which class that the fused form skips got its forward from other code, or None."""
    for name, part in {"": module, **_bypassed(module, fused)}.items():
        kind = original_class(part)
        if forward_patched(kind):
            return f"{kind.__name__}.forward{f' of {name}' if name else ''} was replaced or wrapped by other code"
    return None


def _why_not_values(module: nn.Module, fused: type[Fused], settings: Settings) -> str | None:
    """Why the ops cannot read the weights of a module (quantised, sharded, mixed dtypes); None if they can."""
    types: dict[torch.dtype, str] = {}
    for name, part in _bypassed(module, fused).items():
        for parameter in () if adapters.is_adapted(part) else part._parameters.values():
            if parameter is None:
                continue
            if type(parameter.data) is not Tensor or not parameter.is_floating_point():
                kind = (
                    type(parameter.data).__name__
                    if type(parameter.data) is not Tensor
                    else parameter.dtype
                )
                return f"{name} has a weight of {kind} (quantised or sharded)"
            types.setdefault(parameter.dtype, name)
    if len(types) > 1 and settings.dtype is None:
        (first, one), (second, other) = list(types.items())[:2]
        return f"{one} is {first} and {other} {second}; model.to({first}) or dtype=… makes them one type"
    return None


def _under(
    modules: dict[str, nn.Module], selection: Selection, argument: str
) -> dict[str, nn.Module]:
    """Modules that match a selection, and their submodules."""
    found: dict[str, nn.Module] = {}
    for one in [selection] if isinstance(selection, (str, type)) else selection:
        if isinstance(one, type):
            roots = [path for path, module in modules.items() if isinstance(module, one)]
        else:
            named = {
                path: (path, original_class(module).__name__) for path, module in modules.items()
            }
            roots = [
                path
                for path, names in named.items()
                if any(fnmatchcase(name, one) for name in names)
            ]
        if not roots:
            name = one if isinstance(one, str) else one.__name__
            raise InputError(
                f"{argument}={name!r} matches no module of the model, by name or class"
            )
        for root in roots:
            inside = f"{root}." if root else ""
            found |= {
                path: module
                for path, module in modules.items()
                if path == root or path.startswith(inside)
            }
    return {path: module for path, module in modules.items() if path in found}


def _check_machine(model: nn.Module, settings: Settings) -> None:
    devices = {p.device for p in model.parameters()}
    types = {p.dtype for p in model.parameters() if p.is_floating_point()} | {settings.dtype} - {
        None
    }
    narrow = (
        torch.bfloat16 in (types if settings.dtype is None else {settings.dtype})
        and settings.eight_bits is None
    )
    for device in devices:
        try:
            resolve(settings.backend, torch.empty(0, device=device))
        except ValueError as error:
            raise UnavailableError(str(error)) from None
        if (
            device.type == "cpu"
            and torch.bfloat16 in types
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ):
            raise UnavailableError(
                "bfloat16 on this CPU is emulated and slower than float32 (it lacks AVX-512 or AMX instructions); use "
                "dtype=None with model.float()"
            )
        if device.type == "cpu" and narrow and settings.backend in (None, "cpu"):
            warn_of_slow_bfloat16()
        if device.type == "cpu" and settings.dtype is torch.float16:
            raise UnavailableError("float16 is for GPUs; on a CPU use dtype=torch.bfloat16 or None")
    if settings.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(
            f"dtype={settings.dtype} is not supported; choose float32, bfloat16 or float16"
        )


@cache
def warn_of_slow_bfloat16() -> None:
    """Warn once if bfloat16 GEMMs are slower than float32 on this processor."""
    share = gemm.seconds(torch.bfloat16) / gemm.seconds(torch.float32)
    if share > _SLOWER:
        warnings.warn(
            f"bfloat16 takes {share:.1f} times as long as float32 on this CPU; use dtype=None with model.float()",
            stacklevel=5,
        )


def _nothing(model: nn.Module, entries: Sequence[Entry], unknown: Sequence[Unknown]) -> str:
    name = original_class(model).__name__
    if original_class(model).__module__.startswith("xfm_fast."):
        return f"{name} already uses these kernels; freeze() and quantise() make it faster on a CPU"
    reasons = {entry.reason: f"{entry.path or name}: {entry.reason}" for entry in reversed(entries)}
    why = "; ".join([*reversed(reasons.values())][:5])
    foreign = f". Unknown: {'; '.join(map(str, unknown[:5]))}; {ROW}" if unknown else ""
    return (
        f"no module of {name} can be replaced{f' ({why})' if why else ''}{foreign}. docs/drop-in.md lists supported "
        "layers; xfm_fast.replace.register adds your own, and xfm_fast.kernels.ops has operations to build with"
    )
