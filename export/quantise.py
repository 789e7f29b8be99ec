"""8-bit exports: the largest set of 8-bit GEMMs that keeps every output row within a cosine budget of the model.

A GEMM here is a `MatMul` by a constant matrix; those of attention have two activations and keep their dtype. All GEMMs
of one tensor form a `Site`, quantised as a whole by `QuantizeLinear` and `DequantizeLinear` pairs, which ONNX Runtime
and all the readers of the exports take.

Scales are fitted by trial on samples of the tensor. Large channels are first scaled down, and the weights that multiply
them up (SmoothQuant, arXiv 2211.10438): free where a LayerNorm feeds only these GEMMs. The error of `fusion` is then a
fifth of that of `onnxruntime.quantization`. All GEMMs of a graph are tried in 8 bits first; while the outputs exceed
the budget, those with the largest errors go back to the dtype of the graph. Trials run in ONNX Runtime on the CPU.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import ExportError, InputError, StorageError, UnavailableError
from xfm_fast.models.xfm import XFM

from .expected import Examples, Reference, make_reference
from .graphs import is_memory
from .manifest import GraphRecord, Manifest, QuantisationRecord, package_versions
from .pipeline import Progress, fill_folder, prepare_folder, sidecar_files, silent
from .request import BUDGET, GRAPHS, DType, GraphName, Quantisation
from .runtimes import LARGEST_FILE
from .runtimes.onnx_runtime import session_options, widen
from .session import Session
from .slots import graph_slots
from .verification import (
    DIRECTIONS,
    THRESHOLDS,
    Case,
    Comparison,
    chunks,
    compare_with_reference,
    keep_reference,
)

Feed = Mapping[str, np.ndarray]

# Captions of a calibration input: without images, and with each image.
_TEXTS_AT_ONCE, _TEXTS_WITH_AN_IMAGE = 16, 8
# Inputs that a choice is tried on, and runs that are timed.
_TRIED, _TIMED = 6, 3
# Fewer scores have no meaningful cosine.
_FEWEST_RANKED = 4
# Verification uses other images, so calibration spends only part of the budget.
_SPENT = 0.8
# Sample rows of every tensor.
_CALIBRATION_ROWS = 512
# Clipping thresholds as shares of the largest entry, and SmoothQuant exponents, tried in turn.
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_SMOOTHINGS = (0.25, 0.5, 0.75)
# Without a LayerNorm to fold into, smoothing costs a pass over the tensor, so it must reduce the error this much.
_WORTH_A_PASS = 0.5
_EXTREMES: dict[Quantisation, float] = {"int8": 127.0, "fp8": 448.0}


def check_quantisation(
    kind: str, dtype: DType, budget: float = BUDGET, graphs: Sequence[GraphName] = ()
) -> Quantisation:
    """Check kind, dtype, budget and graphs before one is exported."""
    if kind not in get_args(Quantisation):
        raise UnavailableError(f"quantisation {kind!r} is unknown; choose from {', '.join(get_args(Quantisation))}")
    if others := [name for name in graphs if name not in GRAPHS]:
        raise UnavailableError(
            f"graph {others[0]!r} has no form in 8 bits; export {', '.join(GRAPHS)}, or export without 8 bits"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise UnavailableError(f"{kind} needs onnxruntime, which is not installed; pip install 'xfm-fast[export]'")
    most = THRESHOLDS[dtype].cosine
    if not 0 < budget <= most:
        raise InputError(
            f"--budget {budget} is no cosine that can be kept: {dtype} itself is held to {most}; give a number between "
            f"0 and that, such as {BUDGET}"
        )
    return kind  # pyright: ignore[reportReturnType]


class Scheme(NamedTuple):
    """The 8-bit type; `unsigned` activations have a zero point (fast on CPUs, unsupported on GPUs)."""

    kind: Quantisation
    unsigned: bool = False


@dataclass(frozen=True)
class Site:
    """A tensor and the GEMMs that read it; `norm` is the LayerNormalization that feeds only these, or ""."""

    tensor: str
    gemms: tuple[str, ...]  # names of the nodes
    layers: tuple[str, ...]  # names of their layers
    weights: tuple[Tensor, ...]  # [K, N] in fp32, each
    norm: str = ""


@dataclass
class Seen:
    """Statistics of a site's tensor over the calibration."""

    largest: Tensor  # [K] maximum magnitude of every channel
    low: float = 0.0
    high: float = 0.0
    samples: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Fitted:
    """A site with its scales."""

    site: Site
    smoothing: Tensor | None  # [K] divides the tensor and multiplies the weights
    scale: float
    zero: int
    error: float  # of the GEMMs on the samples, relative to their norm


def sites(model: Any) -> list[Site]:
    """The sites of a graph, without heads (cheap, decisive for scores) and concatenated tensors (not always read)."""
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    returned = {value.name for value in graph.output}
    readers: dict[str, list[Any]] = {}
    gemms: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        if node.op_type == "MatMul" and node.input[1] in constants and len(constants[node.input[1]].dims) == 2:
            gemms.setdefault(node.input[0], []).append(node)
    made_by = {name: node for node in graph.node for name in node.output}

    def label(gemm: Any) -> str:
        """The layer by the name of its bias; transposed weights lost their names."""
        added = [name for node in readers.get(gemm.output[0], ()) if node.op_type == "Add" for name in node.input]
        biases = [name for name in added if name in constants and name.endswith(".bias")]
        return biases[0].removesuffix(".bias") if biases else gemm.name

    def norm(tensor: str) -> str:
        made = made_by.get(tensor)
        if made is None or made.op_type != "LayerNormalization" or tensor in returned:
            return ""
        folds = len(readers[tensor]) == len(gemms[tensor]) and all(name in constants for name in made.input[1:])
        return made.name if folds else ""

    found = []
    for tensor, nodes in gemms.items():
        layers = tuple(map(label, nodes))
        concatenated = tensor in made_by and made_by[tensor].op_type == "Concat"
        if not concatenated and not any("heads." in layer for layer in layers):
            weights = tuple(_array(constants[node.input[1]]) for node in nodes)
            found.append(Site(tensor, tuple(node.name for node in nodes), layers, weights, norm(tensor)))
    return found


def _array(tensor: Any) -> Tensor:
    from onnx import numpy_helper

    # torch.from_numpy does not take NumPy's extension types, such as bfloat16.
    return torch.from_numpy(np.array(numpy_helper.to_array(tensor), np.float32))


def _real_tokens(feed: Feed, rows: int) -> Tensor:
    """Mask of the real tokens of a tensor with as many rows as the feed has tokens; all rows of others."""
    hidden = next((feed[name] for name in ("attention_mask", "segments") if name in feed), None)
    if hidden is None or hidden.size != rows:
        return torch.ones(rows, dtype=torch.bool)
    return torch.from_numpy(hidden).bool().flatten()


def observe(
    model: Any, found: Sequence[Site], feeds: Sequence[Feed]
) -> tuple[dict[str, Seen], list[dict[str, np.ndarray]]]:
    """Run an fp32 graph on feeds; returns statistics of the sites' tensors (padding excluded) and all outputs."""
    import onnx

    model = copy.deepcopy(model)
    outputs = [value.name for value in model.graph.output]
    tensors = [site.tensor for site in found]
    given = {value.name for value in model.graph.input}
    watched = [name for name in tensors if name not in given and name not in outputs]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in watched)
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, Seen] = {}
    results = []
    each = math.ceil(_CALIBRATION_ROWS / max(len(feeds), 1))
    run = runner(model)
    for feed in feeds:
        values = run(feed, [*outputs, *watched])
        results.append({name: values[name] for name in outputs})
        for name in tensors:
            value = torch.from_numpy(np.asarray(feed[name] if name in given else values[name])).float().flatten(0, -2)
            value = value[_real_tokens(feed, len(value))]
            known = seen.setdefault(name, Seen(torch.zeros(value.shape[1])))
            known.largest = known.largest.maximum(value.abs().amax(0))
            known.low, known.high = min(known.low, float(value.min())), max(known.high, float(value.max()))
            known.samples.append(value[torch.randperm(len(value), generator=generator)[:each]].clone())
    return seen, results


def runner(model: Any) -> Callable[..., dict[str, np.ndarray]]:
    """A function from inputs (and output names) to outputs: ONNX Runtime on the CPU."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        # Models beyond two gigabytes must be files.
        path = Path(scratch, "graph.onnx")
        save(model, path)
        session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])

    def run(feed: Feed, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        names = [output.name for output in session.get_outputs()] if names is None else names
        results: Any = session.run([*names], dict(feed))
        return dict(zip(names, results, strict=True))

    return run


def fit(site: Site, seen: Seen, scheme: Scheme) -> Fitted:
    """The scales of a site with the smallest error of its GEMMs on the samples."""
    rows, weights = torch.cat(seen.samples), torch.cat(site.weights, 1)
    exact = rows @ weights
    length = float(exact.norm()) or 1.0

    def attempt(smoothing: Tensor | None, clip: float) -> Fitted:
        given, changed, low, high = rows, weights, seen.low, seen.high
        if smoothing is not None:
            given, changed = rows / smoothing, weights * smoothing[:, None]
            high = float((seen.largest / smoothing).max())
            low = max(-high, float(given.min()) * 1.1)
        scale, zero = fit_scale(low * clip, high * clip, scheme)
        parts = changed.split([weight.shape[1] for weight in site.weights], 1)
        rounded = torch.cat([_quantise_weight(part, scheme)[0] for part in parts], 1)
        result = _round_activations(given, scale, zero, scheme) @ rounded
        return Fitted(site, smoothing, scale, zero, float((result - exact).norm()) / length)

    best = plain = attempt(None, 1.0)
    heaviest = weights.abs().amax(1).clamp(min=1e-8)
    largest = seen.largest.clamp(min=1e-8)
    for power in _SMOOTHINGS:
        smoothing = largest**power / heaviest ** (1 - power)
        # An unused channel keeps its scale.
        smoothing = torch.where(seen.largest > 0, smoothing / smoothing.log().mean().exp(), 1.0).clamp(1e-3, 1e3)
        best = min(best, attempt(smoothing, 1.0), key=lambda each: each.error)
    if not site.norm and best.error > _WORTH_A_PASS * plain.error:
        best = plain
    return min((attempt(best.smoothing, clip) for clip in _CLIPS), key=lambda each: each.error)


def fit_scale(low: float, high: float, scheme: Scheme) -> tuple[float, int]:
    """The scale and the zero point of values between two."""
    if scheme.unsigned:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255 or 1.0
        return scale, min(max(round(-low / scale), 0), 255)
    return max(-low, high) / _EXTREMES[scheme.kind] or 1.0, 0


def _round_activations(x: Tensor, scale: float, zero: int, scheme: Scheme) -> Tensor:
    """Activations rounded to the scheme's grid."""
    if scheme.kind == "fp8":
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    least, most = (0, 255) if scheme.unsigned else (-128, 127)
    return ((x / scale).round() + zero).clamp(least, most).sub(zero) * scale


def _quantise_weight(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """A weight `[K, N]` in 8 bits: its rounded values, the stored tensor, and scales `[N]` or `[]`."""
    extreme = _EXTREMES[scheme.kind]
    if scheme.kind == "fp8":
        scale = (weight.abs().max() / extreme).clamp(min=1e-12)
        stored = (weight / scale).clamp(-extreme, extreme).to(torch.float8_e4m3fn)
        return stored.float() * scale, stored.view(torch.uint8), scale
    scale = (weight.abs().amax(0) / extreme).clamp(min=1e-12)
    stored = (weight / scale).round().clamp(-127, 127)
    return stored * scale, stored.to(torch.int8), scale


def quantise_graph(model: Any, chosen: Iterable[Fitted], scheme: Scheme) -> Any:
    """A copy of an ONNX graph with some of its sites in 8 bits."""
    from onnx import TensorProto, helper

    model = copy.deepcopy(model)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    stored = TensorProto.FLOAT8E4M3FN if scheme.kind == "fp8" else TensorProto.INT8
    types: dict[int, torch.dtype] = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16}
    types[TensorProto.BFLOAT16] = torch.bfloat16

    def add(name: str, value: Tensor, kind: int) -> str:
        content = value.to(types.get(kind, value.dtype)).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        graph.initializer.append(helper.make_tensor(name, kind, [*value.shape], content, raw=True))
        return name

    def site_nodes(fitted: Fitted) -> Iterator[Any]:
        site, name, given = fitted.site, f"{fitted.site.tensor}.{scheme.kind}", fitted.site.tensor
        # Scales have the dtype of the graph.
        wide = constants[nodes[site.gemms[0]].input[1]].data_type
        if fitted.smoothing is not None and site.norm:
            norm = nodes[site.norm]
            for place in range(1, len(norm.input)):
                value = _array(constants[norm.input[place]])
                norm.input[place] = add(f"{name}.norm_{place}", value / fitted.smoothing, wide)
        elif fitted.smoothing is not None:
            factor, given = add(f"{name}.smoothing", 1 / fitted.smoothing, wide), f"{name}.smooth"
            yield helper.make_node("Mul", [site.tensor, factor], [given], f"{name}.smoothing")
        scale = add(f"{name}.scale", torch.tensor(fitted.scale), wide)
        zero_type = TensorProto.UINT8 if scheme.unsigned else stored
        zero = add(f"{name}.zero", torch.tensor(fitted.zero, dtype=torch.uint8), zero_type)
        yield helper.make_node("QuantizeLinear", [given, scale, zero], [f"{name}.q"], f"{name}.quantize")
        yield helper.make_node("DequantizeLinear", [f"{name}.q", scale, zero], [f"{name}.dq"], f"{name}.dequantize")
        for gemm, weight in zip(site.gemms, site.weights, strict=True):
            changed = weight if fitted.smoothing is None else weight * fitted.smoothing[:, None]
            _, values, scales = _quantise_weight(changed, scheme)
            parts = [
                add(f"{gemm}.weight", values, stored),
                add(f"{gemm}.weight_scale", scales, wide),
                add(f"{gemm}.weight_zero", torch.zeros(scales.shape, dtype=torch.uint8), stored),
            ]
            axis: dict[str, Any] = {"axis": 1} if scales.dim() else {}
            yield helper.make_node("DequantizeLinear", parts, [f"{gemm}.weight_dq"], f"{gemm}.dequantize", **axis)
            nodes[gemm].input[0], nodes[gemm].input[1] = f"{name}.dq", f"{gemm}.weight_dq"

    before: dict[str, list[Any]] = {}
    for fitted in chosen:
        before.setdefault(fitted.site.gemms[0], []).extend(site_nodes(fitted))
    order = [each for node in graph.node for each in (*before.get(node.name, ()), node)]
    read = {name for node in order for name in node.input} | {value.name for value in graph.output}
    for part, kept in ((graph.node, order), (graph.initializer, [t for t in graph.initializer if t.name in read])):
        del part[:]
        part.extend(kept)
    return model


def save(model: Any, path: Path, *, largest_file: int = LARGEST_FILE) -> None:
    """Write a graph, weights beyond `largest_file` bytes to a separate file."""
    import onnx

    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > largest_file
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)
    onnx.save(model, str(path), save_as_external_data=external, location=beside.name, size_threshold=1024)


@dataclass(frozen=True)
class Calibration:
    """Inputs of the graphs of an export, as a session gives them to the graphs."""

    comparison: Comparison
    origin: str

    @classmethod
    def of_model(cls, model: XFM, examples: Examples, folder: Path, manifest: Manifest) -> Self:
        """Calibration with embeddings computed by the model, for its ONNX export in `folder`."""
        images, texts = _needed(manifest)
        graphs: list[GraphName] = [*(["image_memory"] if images else []), *(["text"] if texts else [])]
        return cls(Comparison(manifest, folder, make_reference(model, examples, graphs, "fp32")), examples.origin)

    @classmethod
    def of_export(cls, folder: Path, manifest: Manifest, examples: Examples) -> Self:
        """Calibration with embeddings computed by an fp32 export; raises `ExportError` where it lacks a graph."""
        images, texts = _needed(manifest)
        graphs = {*(("vision",) if images else ()), *(("text", "image_memory") if texts else ())}
        if lacking := sorted(graphs - {*manifest.graph_names}):
            raise ExportError(
                f"{folder} lacks {' and '.join(lacking)}, which compute the inputs of its other graphs; export them "
                "too, or leave out --data"
            )
        session = Session.load(folder, "onnxruntime", "cpu", verify_files=False)
        tensors = {name: getattr(examples, name) for name in ("pixels", "input_ids", "attention_mask")}
        if images:
            tensors["image_embeds"] = session.encode_image(examples.pixels)
        if texts:
            tensors["text_embeds"] = session.encode_text(examples.input_ids, examples.attention_mask)
        return cls(Comparison(manifest, folder, Reference(tensors, {})), examples.origin)

    def inputs(self, record: GraphRecord) -> list[Feed]:
        """Inputs of a graph by name, an image with 8 captions (or 16 captions) each, in fp32 and int64."""
        reference = self.comparison.reference
        ranges = graph_slots(record)[0].ranges
        fixed = {axis: sizes.least for axis, sizes in ranges.items() if sizes.single}
        batch, count = fixed.get("batch", 1), fixed.get("texts", _TEXTS_WITH_AN_IMAGE)
        if record.name == "text":
            size = min(fixed.get("batch", _TEXTS_AT_ONCE), reference.texts)
            cases = [Case(torch.zeros_like(rows), rows[:, None]) for rows in chunks(reference.texts, size)]
        else:
            cases = [
                Case(
                    (torch.arange(batch) + n) % reference.images,
                    ((torch.arange(count) + n * count) % reference.texts).expand(batch, -1),
                )
                for n in range(reference.images)
            ]
        return [
            {
                name: (value.float() if value.is_floating_point() else value).contiguous().numpy()
                for name, value in given.items()
            }
            for given in self.comparison.inputs(record.name, cases)
        ]


def _needed(manifest: Manifest) -> tuple[bool, bool]:
    """Whether graphs of an export take image embeddings or memories, and text embeddings."""
    return not {"image_memory", "fusion"}.isdisjoint(manifest.graph_names), "fusion" in manifest.graph_names


def quantise_graphs(
    exported: Manifest,
    folder: Path,
    calibration: Calibration,
    kind: Quantisation,
    *,
    budget: float = BUDGET,
    unsigned: bool = False,
    progress: Progress = silent,
) -> None:
    """Rewrite the ONNX files of an export in `folder` to 8-bit GEMMs within a budget, and record the choices.

    Raises:
        ExportError: ONNX Runtime does not run a graph, or the budget leaves no GEMM in 8 bits.
    """
    scheme = Scheme(kind, unsigned=unsigned and kind == "int8")
    for record in exported.graphs:
        started = time.perf_counter()
        progress(f"choosing GEMMs of {record.name}")
        try:
            record.quantisation = _Search(folder / record.file, calibration.inputs(record), scheme, budget).run()
        except (ExportError, OSError):
            raise
        except Exception as error:  # of ONNX Runtime, which has no errors of its own
            raise ExportError(
                f"graph {record.name!r} could not be quantised to {kind} ({' '.join(str(error).split())[:300]}); "
                "export it without 8 bits"
            ) from error
        record.files = [name for name in record.files if (folder / name).exists()]
        record.build_seconds += time.perf_counter() - started
    made = [record.quantisation for record in exported.graphs if record.quantisation is not None]
    if made and all(len(each.kept) == each.products for each in made):
        raise ExportError(
            f"--budget {budget} cannot be met: no GEMM of {', '.join(exported.graph_names)} can be in {kind}; give a "
            "smaller one, or serve the export without 8 bits"
        )
    exported.options |= {"arithmetic": kind, "budget": budget, "calibration": calibration.origin}


class _Search:
    """The choice of the GEMMs of one graph."""

    def __init__(self, path: Path, feeds: Sequence[Feed], scheme: Scheme, budget: float) -> None:
        import onnx

        self.path, self.scheme, self.budget, self.feeds = path, scheme, budget, feeds
        # Evenly spaced over the feeds.
        self.tried = [*range(0, len(feeds), max(len(feeds) // _TRIED, 1))][:_TRIED]
        with tempfile.TemporaryDirectory() as scratch:
            wide = Path(scratch, path.name)
            widen(path, wide)
            self.wide: Any = onnx.load(str(wide))
        found = sites(self.wide)
        seen, self.truths = observe(self.wide, found, feeds)
        # Smallest error first.
        self.order = sorted((fit(site, seen[site.tensor], scheme) for site in found), key=lambda each: each.error)

    def run(self) -> QuantisationRecord:
        """Choose, and write the graph."""
        import onnx

        count, cosine = self._most()
        chosen = self.order[:count]
        milliseconds = [self._milliseconds(each) for each in ([], chosen)]
        del self.wide
        if chosen:
            model = onnx.load(str(self.path))
            save(quantise_graph(model, chosen, self.scheme), self.path)
        return QuantisationRecord(
            kind=self.scheme.kind,
            budget=self.budget,
            cosine=cosine,
            products=sum(len(fitted.site.gemms) for fitted in self.order),
            smoothed=sum(fitted.smoothing is not None for fitted in chosen),
            kept=[name for fitted in self.order[count:] for name in fitted.site.layers],
            wide_milliseconds=milliseconds[0],
            milliseconds=milliseconds[1],
        )

    def _most(self) -> tuple[int, float]:
        """The number of sites within the budget, in order of their error, and the resulting cosine."""
        allowed = 1 - _SPENT * (1 - self.budget)
        low, best, high = 0, 1.0, len(self.order) + 1
        # All, then one: a budget that fails needs two trials.
        count = len(self.order)
        while high - low > 1:
            if (cosine := self._cosine(self.order[:count])) >= allowed:
                low, best = count, cosine
            else:
                high = count
            count = 1 if not low and high == len(self.order) else (low + high) // 2
        return low, best

    def _cosine(self, chosen: Sequence[Fitted]) -> float:
        """The least cosine of any output row with some of the sites in 8 bits."""
        run = runner(quantise_graph(self.wide, chosen, self.scheme))
        cosines = [least_cosine(run(self.feeds[n]), self.truths[n], self.feeds[n]) for n in self.tried]
        # min() may lose NaN.
        return float(torch.tensor(cosines).min())

    def _milliseconds(self, chosen: Sequence[Fitted]) -> float:
        run, feed = runner(quantise_graph(self.wide, chosen, self.scheme)), self.feeds[0]
        run(feed)
        times = []
        for _ in range(_TIMED):
            started = time.perf_counter()
            run(feed)
            times.append(time.perf_counter() - started)
        return round(min(times) * 1e3, 3)


def least_cosine(found: Feed, truth: Feed, feed: Feed) -> float:
    """The least cosine of a row of any output: of real tokens, or of the scores of an image's captions."""
    cosines = [1.0]
    for name in truth:
        both = [torch.from_numpy(values[name]).double() for values in (found, truth)]
        if name in DIRECTIONS or is_memory(name):
            rows = [values.flatten(0, -2) for values in both]
            rows = [values[_real_tokens(feed, len(values))] for values in rows]
        elif name in ("scores", "match_logits") and both[0].shape[1] > _FEWEST_RANKED:
            scores = [values[..., 1] if name == "match_logits" else values for values in both]
            rows = [values - values.mean(-1, keepdim=True) for values in scores]
        else:
            continue
        cosines.append(float(F.cosine_similarity(*rows, dim=-1).min()))
    return float(torch.tensor(cosines).min())


def quantize_int8(
    folder: str | Path,
    out: str | Path,
    *,
    budget: float = BUDGET,
    examples: Examples | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Write an int8 copy of an fp32 ONNX export to another folder, verified against the fp32 reference."""
    folder, out = Path(folder), Path(out)
    if folder.resolve() == out.resolve():
        raise InputError(f"{out} holds the fp32 export; name another folder for the int8 one")
    check_quantisation("int8", "fp32", budget)
    source = Manifest.load(folder)
    check_quantisation("int8", "fp32", budget, source.graph_names)
    source.require_files(folder)
    arithmetic = source.options.get("arithmetic") or source.dtype
    if source.kind != "onnx" or arithmetic != "fp32":
        raise ExportError(
            f"{folder} holds an export to {source.kind} in {arithmetic}; int8 is made of fp32 ONNX files: xfm-fast "
            "export --dtype fp32"
        )
    reference = Reference.load(folder)
    if examples is None:
        origin = f"{source.examples}, which it is compared on too"
        calibration = Calibration(Comparison(source, folder, reference), origin)
    else:
        calibration = Calibration.of_export(folder, source, examples)
    # Room for a copy of the old graphs and for the new ones.
    prepare_folder(out, 2 * sum(record.bytes for record in source.files))
    changed = source.unverified(
        versions=source.versions | package_versions("onnxruntime"),
        options=dict(source.options),
        graphs=[record.model_copy(update={"build_seconds": 0.0}) for record in source.graphs],
    )

    def compare(content: Manifest) -> None:
        progress("comparing with the model")
        keep_reference(content, out, reference)
        compare_with_reference(content, out, reference)

    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".int8-") as scratch:
            for name in (name for record in source.graphs for name in record.files):
                shutil.copyfile(folder / name, Path(scratch, name))
            # CPUs multiply uint8 by int8, GPUs int8 by int8.
            unsigned = not source.consumer.startswith("tensorrt")
            quantise_graphs(
                changed, Path(scratch), calibration, "int8", budget=budget, unsigned=unsigned, progress=progress
            )

            def write(record: GraphRecord) -> list[str]:
                for name in record.files:
                    Path(scratch, name).replace(out / name)
                return record.files

            return fill_folder(changed, out, changed.graphs, write, compare, sidecar_files(folder, source))
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror or error}); choose another folder") from error
