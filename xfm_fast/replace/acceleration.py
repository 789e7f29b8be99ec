"""`accelerate(model)`: fused modules swapped into a live model, verified, with a report to revert."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError, UnavailableError, explain_types
from xfm_fast.graphs import CallGraphs, require_gpu
from xfm_fast.kernels.backend import Backend, resolve
from xfm_fast.kernels.cpu import gemm
from xfm_fast.kernels.flags import EightBits, keep_within
from xfm_fast.kernels.linear import floating_dtype
from xfm_fast.models.precision import PrecisionMixin
from xfm_fast.replace import adapters, timm_vision, transformers_rows
from xfm_fast.replace.calls import (
    Autocast,
    FirstTokenClassifier,
    WholeEncode,
    WholePredict,
    WholeSparse,
)
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
    REGISTER,
    Entry,
    Report,
    Trial,
    Unknown,
    bypassed,
    computed,
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
    WholeEncode,
    WholePredict,
    WholeSparse,
    FirstTokenClassifier,
    FusedEmbeddings,
    FusedMaskedLM,
    VocabularyHead,
    UnpaddedEncoder,
    CutTextModel,
    CutOpenClip,
    CutOpenClipText,
    FusedLayer,
    OfficialTextEncoder,
    OfficialTextLayer,
    OfficialVisionBlock,
    OfficialEmbeddings,
    OfficialVocabularyHead,
    UnpaddedTransformerEncoder,
    FusedMultiheadAttention,
    FusedLayerNorm,
)
# Forms that replace less than a layer.
_SUBLAYERS = (FusedMultiheadAttention.__name__, FusedLayerNorm.__name__)
# These modules register their specs at import.
_SPECS = (transformers_rows, timm_vision)
Selection = str | type[nn.Module] | Sequence[str | type[nn.Module]]
_SLOWER = 1.05  # smaller ratios of times are noise


@explain_types
def accelerate(
    model: nn.Module,
    *,
    kernels: Backend = "auto",
    dtype: torch.dtype | EightBits | Literal["auto"] | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    unpad: bool = False,
    skip_logits: bool = False,
    freeze: bool = False,
    cuda_graphs: bool = False,
    verify: Any = None,
    min_cosine: float = LEAST_COSINE,
) -> Report:
    """Replace the modules of a live model with fused forms, in place and on this instance only.

    Supported are the transformers of Hugging Face and timm, the official X-FM and X²-VLM code, and
    PyTorch's layers. An `XFM`, alone or within a model, runs these kernels as it is: `freeze` and 8-bit
    dtypes apply to it. Modules stay the same objects with the same parameters, so state-dict keys,
    optimizers, hooks and wrappers are unaffected. Calls that the fused form does not cover
    (attention weights as output, caches, adapters inside) run the original code.

    The swap changes classes and is not atomic over a model: no other thread may call, train or copy
    the model while `accelerate` or `revert` runs. Before and after, the model is as thread-safe as
    the original.

    Args:
        model: Any module.
        kernels: Backend of the ops; an explicit backend never falls back.
        dtype: Compute dtype; parameters keep their storage dtype. None follows the inputs. "int8",
            on a CPU, rounds the linear layers of blocks, weights per output channel and activations
            per token, where no gradient is needed. "fp8" does the same on a GPU of compute
            capability 8.9 or newer and refuses gradients; a CPU emulates it, slowly, to show the
            loss of accuracy. All other layers run in bfloat16 where that is fast. With `verify`,
            the blocks with the largest error stay in floating point until the cosine of every
            output is at least `min_cosine`. "auto", on a CPU, times the `verify` batch in the
            dtype of the parameters, bfloat16 and "int8", and keeps the fastest of those that reach
            `min_cosine`; the report lists them.
        include: Replace only modules under these: qualified names or class names (with * and ?), or
            classes.
        exclude: Skip these modules and their submodules.
        unpad: Run whole encoders without padding. Outputs of real tokens are unchanged; padding
            gets zeros, where the original leaves arbitrary values.
        skip_logits: Masked-language heads in training mode return `logits=None` when labels are
            passed, so that only labelled positions reach the vocabulary. By default logits are
            returned.
        freeze: For inference on a CPU: pack the weights of layers in the layout of the library that
            is fastest here, in place of the parameters. The model stops taking gradients; state
            dicts are unchanged, and `revert` restores the weights bit for bit.
        cuda_graphs: Replay calls without gradients, in evaluation mode, as CUDA graphs; each shape
            is captured at its first call. For models whose sizes do not depend on values; other
            models raise at their first call.
        verify: A batch: keyword arguments as a mapping, positional ones as a tuple, or one tensor;
            for a model of sentence-transformers a list of texts, or of pairs. The model runs on it
            before and after, in evaluation mode; on a CPU several times in turn, to measure the
            speedup. The report says which fused modules ran.
        min_cosine: Smallest cosine to the original that an output may have in 8 bits, or in a dtype
            that "auto" chooses.

    Returns:
        A report that prints as a table and can `revert()`.

    Raises:
        InputError: Nothing can be replaced, a selection matches nothing, parameters have no values,
            the outputs on the `verify` batch differ, or no fused linear layer ran on it. The model
            is unchanged.
        UnavailableError: The dtype or backend cannot run on the model's device.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"accelerate takes a torch.nn.Module, not {type(model).__name__}")
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise InputError(
            f"parameters have no values yet ({meta} is on the meta device); load the weights first"
        )
    native = {
        path: module for path, module in model.named_modules() if isinstance(module, PrecisionMixin)
    }
    if dtype == "auto":
        attempt = partial(
            accelerate,
            model,
            kernels=kernels,
            include=include,
            exclude=exclude,
            unpad=unpad,
            skip_logits=skip_logits,
            freeze=freeze,
            cuda_graphs=cuda_graphs,
            verify=verify,
            min_cosine=min_cosine,
        )
        return _in_fastest_dtype(attempt, model, [*native.values()], verify, min_cosine)
    if native and not (isinstance(dtype, torch.dtype) or cuda_graphs or kernels != "auto"):
        return _tune_native(model, native, dtype, freeze, verify, min_cosine)
    if cuda_graphs and unpad:
        raise InputError(
            "unpad=True packs a variable number of tokens, and cuda_graphs=True needs fixed sizes; leave one out"
        )
    settings = _settings(model, kernels, dtype, unpad, skip_logits, freeze)
    _check_machine(model, settings)
    if cuda_graphs:
        require_gpu(model)
    selected = _select(dict(model.named_modules()), include, exclude)
    with _without_former(model):
        batch = None if verify is None else arguments_of(model, verify)
        before = {} if batch is None else model_outputs(model, batch)
        report, forms = _plan(model, selected, settings)
        report._frozen, report._rounded = _install(model, forms, settings)
        if freeze and not report._frozen:
            raise InputError(
                "freeze=True finds no weight to pack: it supports BERT-like layers and registered families in float32 "
                "or bfloat16, without hooks or adapters; leave freeze out"
            )
        if settings.eight_bits is not None and not report._rounded:
            sizes = " with sizes that are multiples of 16" if settings.eight_bits == "fp8" else ""
            raise InputError(
                f"dtype={settings.eight_bits!r} finds no linear layer to round: it supports blocks{sizes} in float32 "
                "or bfloat16, without hooks or adapters; choose another dtype"
            )
        if batch is not None:
            _verify(model, batch, before, report, settings, min_cosine)
        if cuda_graphs:
            model.__dict__["forward"] = CallGraphs(model.forward, model)
            report._model = model
    return report


def _in_fastest_dtype(
    attempt: Callable[..., Report],
    model: nn.Module,
    native: Sequence[nn.Module],
    verify: Any,
    min_cosine: float,
) -> Report:
    """Accelerate in the fastest dtype whose outputs keep a cosine of `min_cosine`."""
    if verify is None:
        raise InputError(
            'dtype="auto" compares dtypes on a batch; give verify=, such as a list of your texts'
        )
    if native:
        raise InputError(
            f'dtype="auto" compares fused forms, and {type(native[0]).__name__} runs these kernels as it is; choose '
            'dtype="int8", or convert the model'
        )
    if not all(p.is_cpu for p in model.parameters()):
        raise UnavailableError(
            'dtype="auto" times calls on a CPU; on a GPU choose a dtype, such as torch.bfloat16'
        )
    stored = {f"{p.dtype}".removeprefix("torch.") for p in model.parameters()}
    names = {None: " and ".join(sorted(stored)), torch.bfloat16: "bfloat16", "int8": "int8"}
    if stored == {"bfloat16"}:
        del names[torch.bfloat16]
    trials, fastest, dtype, report = dict[Any, Trial](), None, None, Report([])
    for dtype, name in names.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                report = attempt(dtype=dtype)
        except (InputError, UnavailableError) as error:
            if dtype is None:
                raise
            trials[dtype] = Trial(name, reason=str(error))
            continue
        cosine = min(report.rounding.values(), default=1.0)
        reason = "" if cosine >= min_cosine or dtype is None else f"below {min_cosine}"
        trials[dtype] = trial = Trial(name, report.speedup or 0.0, cosine, reason)
        # Smaller gains are noise, and the dtypes before it round less.
        if not reason and trial.speedup > _SLOWER * trials[fastest].speedup:
            fastest = dtype
    if dtype != fastest:
        report = attempt(dtype=fastest)
    report.trials = [trials.pop(fastest), *trials.values()]
    return report


def _tune_native(
    model: nn.Module,
    native: Mapping[str, PrecisionMixin],
    dtype: EightBits | None,
    freeze: bool,
    verify: Any,
    min_cosine: float,
) -> Report:
    """Freeze or quantise the X-FMs within a model, which run these kernels as they are."""
    report = Report([], _native=[*native.values()], _eight_bits=dtype)
    report.revert()
    batch = None if verify is None else arguments_of(model, verify)
    mask = mask_of(batch)
    before = {} if batch is None else model_outputs(model, batch)

    def cosine() -> float:
        return least_cosine(before, model_outputs(model, batch), mask)

    for path, module in native.items():
        share = size_of(linear_weights(module)) / (size_of(linear_weights(model)) or 1)
        if dtype is not None:
            module.quantise(dtype, cosine if before else None, least=min_cosine)
        elif freeze:
            module.freeze()
        name = type(module).__name__
        report.entries.append(Entry(path, name, name, "runs these kernels as it is", share=share))
        report.share += share
    try:
        after = {} if batch is None else model_outputs(model, batch)
        report.differences, report.rounding = compare_outputs(
            before, after, mask, None, dtype, min_cosine
        )
    except InputError:
        report.revert()
        raise
    return report


def _settings(
    model: nn.Module,
    kernels: Backend,
    dtype: torch.dtype | EightBits | None,
    unpad: bool,
    skip_logits: bool,
    freeze: bool,
) -> Settings:
    """Resolve the compute dtype of 8-bit modes."""
    if not isinstance(dtype, str):
        return Settings(kernels, dtype, unpad, skip_logits, None, freeze)
    if freeze:
        raise InputError(
            f"freeze=True cannot be combined with dtype={dtype!r}; leave one of them out"
        )
    devices = {p.device for p in model.parameters()} or {torch.device("cpu")}
    dtypes = {floating_dtype(dtype, device) for device in devices}
    compute = dtypes.pop() if len(dtypes) == 1 else None
    return Settings(kernels, compute, unpad, skip_logits, dtype)


def _verify(
    model: nn.Module,
    batch: Any,
    before: dict[str, Tensor],
    report: Report,
    settings: Settings,
    min_cosine: float,
) -> None:
    """Run the verify batch on the fused model, compare its outputs, and time it on a CPU."""
    mask, eight_bits = mask_of(batch), settings.eight_bits
    if eight_bits is not None:

        def cosine() -> float:
            return least_cosine(before, model_outputs(model, batch), mask)

        report._exempt = keep_within(cosine, report._rounded, eight_bits, min_cosine)
    with counted() as runs:
        after = model_outputs(model, batch)
    for entry, module in zip(report.replaced, report._modules, strict=False):
        report.runs[entry.path] = runs[module]
    # The outputs prove only the forms that computed them.
    computing = [module for module in report._modules if fused_form(module).computes]
    computing = [each for each in computing if computed(each, fused_form(each))] or computing
    if not any(runs[module] for module in computing):
        raise InputError(
            f"verify compared the original with itself: {report.coverage()}. The model was reverted; give a batch that "
            "fused forms compute (without attention weights or caches as outputs), or leave verify out"
        )
    report.differences, report.rounding = compare_outputs(
        before, after, mask, settings.dtype, eight_bits, min_cosine
    )
    if all(p.is_cpu for p in model.parameters()):
        original = partial(_original_forward, report)
        report.speedups = speedups(model, batch, original)


@contextmanager
def accelerated(model: nn.Module, **options: Any) -> Iterator[Report]:
    """Run `accelerate(model, **options)` on entry and `revert()` on exit of a `with` block.

    Args:
        model: Any module.
        options: Arguments of `accelerate`.
    """
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
        for settings, modules in forms.items():
            _install(model, modules, settings)
        if graphs is not None:
            model.__dict__["forward"] = graphs
        raise


def _install(
    model: nn.Module, forms: Forms, settings: Settings
) -> tuple[list[FrozenLinear], list[list[nn.Parameter]]]:
    """Swap modules to fused forms; returns the packed layers, and the flagged weights by module."""
    for module, form in forms:
        swap(module, form, settings)
    fused = [module for module, _ in forms if isinstance(module, Fused)]
    frozen, flagged = [], []
    if settings.freeze:
        frozen = freeze_weights(model, fused, settings)
    if settings.eight_bits is not None:
        flagged = quantise(model, fused, settings.eight_bits)
    return frozen, flagged


@contextmanager
def _original_forward(report: Report) -> Iterator[None]:
    """Run the original forward inside, and keep the prepared weights of the fused forms."""
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
        for module, fused_class in zip(fused, classes, strict=True):
            object.__setattr__(module, "__class__", fused_class)


def _plan(
    model: nn.Module, selected: dict[str, nn.Module], settings: Settings
) -> tuple[Report, Forms]:
    """Decide on every module; returns the report, and the modules with their fused forms."""
    entries: list[Entry] = []
    forms: Forms = []
    total = size_of(linear_weights(model)) or 1
    reported: set[nn.Module] = set()
    layers: list[str] = []
    never_called: set[nn.Module] = set()
    products: set[nn.Parameter] = set()
    for path, module in selected.items():
        if module in never_called:
            continue
        entry, form = decide(path, module, settings, FORMS)
        if entry is None:
            continue
        weights = computed(module, next(each for each in FORMS if each.__name__ == entry.fused))
        products |= weights if form else set()
        entries.append(replace(entry, share=size_of(weights) / total))
        if entry.fused not in _SUBLAYERS:
            layers.append(path)
        if form is not None:
            forms.append((module, form))
            # Fused modules read the norms and attentions of PyTorch inside them.
            for submodule in bypassed(module, form).values():
                if original_class(submodule).__module__.startswith("torch.nn."):
                    never_called.add(submodule)
        elif weights:
            # Norms inside unrecognised layers are recognised too.
            reported.update(module.modules())
    modules = [module for module, form in forms if form.computes]
    computing = {module for module, form in forms if computed(module, form)}
    for module, form in forms:
        if not form.computes:
            continue
        within = [*module.modules()][1:]
        if module in computing and computing.isdisjoint(within):
            reported.update(within)
        reported.update({module, *bypassed(module, form).values()})
    unknown = unknown_layers(model, selected, reported, layers)
    if not modules:
        raise InputError(_why_nothing_fits(model, entries, unknown))
    share = size_of(products) / total
    if settings.dtype is not None and all(module is not model for module, _ in forms):
        forms.append((model, Autocast))
    modules = [module for module, _ in forms]
    return Report(entries, unknown, share, _modules=modules, _eight_bits=settings.eight_bits), forms


def decide(
    path: str, module: nn.Module, settings: Settings, forms: Sequence[type[Fused]]
) -> tuple[Entry | None, type[Fused] | None]:
    """Return the first form that accepts a module with its entry; else the first refusal's entry."""
    refused = None
    for form in forms:
        if not form.recognises(module):
            continue
        reason = form.refusal(module, settings)
        if reason is None and forward_replaced(module):
            reason = "its forward was replaced on the instance"
        reason = reason or _why_patched(module, form) or _why_not_values(module, form, settings)
        entry = Entry(path, original_class(module).__name__, form.__name__, form.benefit, reason)
        if reason is None:
            return entry, form
        refused = refused or entry
    return refused, None


def _why_patched(module: nn.Module, fused: type[Fused]) -> str | None:
    """Return which class that the fused form bypasses has a forward from other code, or None."""
    for name, submodule in {"": module, **bypassed(module, fused)}.items():
        original = original_class(submodule)
        if forward_patched(original):
            owner = f" of {name}" if name else ""
            return f"{original.__name__}.forward{owner} was replaced or wrapped by other code"
    return None


def _why_not_values(module: nn.Module, fused: type[Fused], settings: Settings) -> str | None:
    """Return why the ops cannot read a module's weights (quantised, sharded, mixed dtypes), or None."""
    dtypes: dict[torch.dtype, str] = {}
    for name, submodule in bypassed(module, fused).items():
        if adapters.is_adapted(submodule):
            continue
        for parameter in submodule._parameters.values():
            if parameter is None:
                continue
            if type(parameter.data) is not Tensor:
                return (
                    f"{name} has a weight of {type(parameter.data).__name__} (quantised or sharded)"
                )
            if not parameter.is_floating_point():
                return f"{name} has a weight of {parameter.dtype} (quantised or sharded)"
            dtypes.setdefault(parameter.dtype, name)
    if len(dtypes) > 1 and settings.dtype is None:
        (first_dtype, first), (second_dtype, second), *_ = dtypes.items()
        return (
            f"{first} is {first_dtype} and {second} {second_dtype}; model.to({first_dtype}) or dtype=… makes them one "
            "type"
        )
    return None


def _select(
    modules: dict[str, nn.Module], include: Selection | None, exclude: Selection | None
) -> dict[str, nn.Module]:
    excluded = {} if exclude is None else _under(modules, exclude, "exclude")
    if include is not None:
        modules = _under(modules, include, "include")
    return {path: module for path, module in modules.items() if path not in excluded}


def _under(
    modules: dict[str, nn.Module], selection: Selection, argument: str
) -> dict[str, nn.Module]:
    """Return the modules that match a selection, and their submodules."""
    selected: set[str] = set()
    for pattern in [selection] if isinstance(selection, (str, type)) else selection:
        roots = [path for path, module in modules.items() if _matches(path, module, pattern)]
        if not roots:
            name = pattern if isinstance(pattern, str) else pattern.__name__
            raise InputError(
                f"{argument}={name!r} matches no module of the model, by name or class"
            )
        for root in roots:
            prefix = f"{root}." if root else ""
            selected.update(path for path in modules if path == root or path.startswith(prefix))
    return {path: module for path, module in modules.items() if path in selected}


def _matches(path: str, module: nn.Module, pattern: str | type[nn.Module]) -> bool:
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    return fnmatchcase(path, pattern) or fnmatchcase(original_class(module).__name__, pattern)


def _check_machine(model: nn.Module, settings: Settings) -> None:
    """Check that the model's devices run its dtypes; raises UnavailableError or InputError."""
    devices = {p.device for p in model.parameters()}
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    compute_dtypes = dtypes if settings.dtype is None else {settings.dtype}
    bfloat16 = torch.bfloat16 in dtypes | compute_dtypes
    may_be_slow = torch.bfloat16 in compute_dtypes and settings.eight_bits is None
    for device in devices:
        try:
            resolve(settings.backend, torch.empty(0, device=device))
        except ValueError as error:
            raise UnavailableError(str(error)) from None
        if device.type != "cpu":
            continue
        if bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            raise UnavailableError(
                "bfloat16 on this CPU is emulated and slower than float32 (it lacks AVX-512 or AMX instructions); use "
                "dtype=None with model.float()"
            )
        if may_be_slow and settings.backend in (None, "cpu"):
            warn_of_slow_bfloat16()
        if settings.dtype is torch.float16:
            raise UnavailableError("float16 is for GPUs; on a CPU use dtype=torch.bfloat16 or None")
    if settings.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise InputError(
            f"dtype={settings.dtype} is not supported; choose float32, bfloat16 or float16"
        )


@cache
def warn_of_slow_bfloat16() -> None:
    """Warn once if bfloat16 GEMMs are slower than float32 on this processor."""
    ratio = gemm.seconds(torch.bfloat16) / gemm.seconds(torch.float32)
    if ratio > _SLOWER:
        warnings.warn(
            f"bfloat16 takes {ratio:.1f} times as long as float32 on this CPU; use dtype=None with model.float()",
            stacklevel=5,
        )


def _why_nothing_fits(
    model: nn.Module, entries: Sequence[Entry], unknown: Sequence[Unknown]
) -> str:
    name = original_class(model).__name__
    if any(isinstance(module, PrecisionMixin) for module in model.modules()):
        return f"{name} already uses these kernels; freeze() and quantise() make it faster on a CPU"
    reasons: dict[str | None, str] = {}
    for entry in entries:
        reasons.setdefault(entry.reason, f"{entry.path or name}: {entry.reason}")
    message = f"no module of {name} can be replaced"
    if reasons:
        message += f" ({'; '.join([*reasons.values()][:5])})"
    if unknown:
        message += f". Unknown: {'; '.join(map(str, unknown[:5]))}; {REGISTER}"
    return (
        f"{message}. docs/drop-in.md lists supported layers; xfm_fast.replace.register adds your own, and "
        "xfm_fast.kernels.ops has operations to build with"
    )
