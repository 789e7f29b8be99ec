"""8-bit exports: the largest set of 8-bit GEMMs that keeps every output row within a cosine budget of the model.

A GEMM here is a `MatMul` by a constant matrix; attention multiplies two activations and keeps its dtype. All GEMMs
of one tensor form a `Site`, quantised as a whole by `QuantizeLinear` and `DequantizeLinear` pairs, which all runtimes
read. Scales are fitted by trial on samples of the tensor; a LayerNorm that feeds only these GEMMs first scales large
channels down, and the weights multiply them up (SmoothQuant, arXiv 2211.10438). All GEMMs of a graph are tried in 8
bits first; while the outputs exceed the budget, the largest errors go back to the dtype of the graph. Trials run in
ONNX Runtime on the CPU, on the images and captions that the export is compared on.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import ExportError, InputError, UnavailableError, XFMError
from xfm_fast.io import storing

from .expected import Reference
from .graphs import is_memory
from .manifest import GraphRecord, Manifest, QuantisationRecord, package_versions
from .pipeline import Progress, fill_folder, prepare_folder, sidecar_files, silent
from .request import BUDGET, GRAPHS, DType, GraphName, Quantisation
from .runtimes import LARGEST_FILE, first_line
from .runtimes.onnx_runtime import OnnxRuntime, session_options, widen
from .slots import graph_slots
from .verification import DIRECTIONS, THRESHOLDS, Case, Comparison, compare_with_reference, keep_reference

Feed = Mapping[str, np.ndarray]

# Verification runs more shapes than calibration, which spends only part of the budget.
_SPENT = 0.8
# Sample rows of every tensor.
_CALIBRATION_ROWS = 512
# Clipping thresholds as shares of the largest entry, and SmoothQuant exponents, tried in turn.
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_SMOOTHINGS = (0.25, 0.5, 0.75)
_EXTREMES: dict[Quantisation, float] = {"int8": 127.0, "fp8": 448.0}


def check_quantisation(kind: str, dtype: DType, budget: float, graphs: Sequence[GraphName] = ()) -> Quantisation:
    """Check kind, dtype, budget and graphs before one is exported."""
    if kind not in get_args(Quantisation):
        raise UnavailableError(f"quantisation {kind!r} is unknown; choose from {', '.join(get_args(Quantisation))}")
    if others := [name for name in graphs if name not in GRAPHS]:
        raise UnavailableError(f"graph {others[0]!r} has no 8-bit form; export {', '.join(GRAPHS)}, or without 8 bits")
    most = THRESHOLDS[dtype].cosine
    if not 0 < budget <= most:
        raise InputError(f"--budget {budget} cannot be kept, {dtype} itself is held to {most}; give {BUDGET}")
    OnnxRuntime.import_library()
    return kind  # pyright: ignore[reportReturnType]


class Scheme(NamedTuple):
    """The 8-bit type; `unsigned` activations have a zero point (fast on CPUs, unsupported on GPUs)."""

    kind: Quantisation
    unsigned: bool = False

    def scale(self, low: float, high: float) -> tuple[float, int]:
        """Scale and zero point of activations between two values."""
        if self.unsigned:
            low, high = min(low, 0.0), max(high, 0.0)
            scale = (high - low) / 255 or 1.0
            return scale, min(max(round(-low / scale), 0), 255)
        return max(-low, high) / _EXTREMES[self.kind] or 1.0, 0

    def round(self, x: Tensor, scale: float, zero: int) -> Tensor:
        """Activations rounded to 8 bits."""
        if self.kind == "fp8":
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        least, most = (0, 255) if self.unsigned else (-128, 127)
        return ((x / scale).round() + zero).clamp(least, most).sub(zero) * scale

    def store(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A weight `[K, N]` in 8 bits, and its scales `[N]`, or `[]` in fp8."""
        extreme, columns = _EXTREMES[self.kind], self.kind == "int8"
        scale = ((weight.abs().amax(0) if columns else weight.abs().max()) / extreme).clamp(min=1e-12)
        levels = (weight / scale).clamp(-extreme, extreme)
        return levels.round().to(torch.int8) if columns else levels.to(torch.float8_e4m3fn), scale


class Site(NamedTuple):
    """A tensor and the GEMMs that read it; `norm` is the LayerNormalization that feeds only these, or ""."""

    tensor: str
    gemms: tuple[str, ...]  # names of the nodes
    layers: tuple[str, ...]  # names of their layers
    weights: tuple[Tensor, ...]  # [K, N] in fp32, each
    norm: str = ""


class Seen(NamedTuple):
    """Extremes `[K]` of every channel of a site's tensor over the calibration, and a sample of its rows `[R, K]`."""

    low: Tensor
    high: Tensor
    rows: Tensor


class Fitted(NamedTuple):
    """A site with its scales."""

    site: Site
    smoothing: Tensor  # [K] divides the tensor and multiplies the weights
    scale: float
    zero: int
    error: float  # of the GEMMs on the samples, relative to their norm


def sites(model: Any) -> list[Site]:
    """The sites of a graph, without heads (cheap, decisive for scores) and concatenated tensors (not always read)."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    returned = {value.name for value in model.graph.output}
    made_by = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def layer(gemm: Any) -> str:
        """The layer by the name of its bias; transposed weights lost their names."""
        added = [name for node in readers.get(gemm.output[0], ()) if node.op_type == "Add" for name in node.input]
        biases = [name for name in added if name in constants and name.endswith(".bias")]
        return biases[0].removesuffix(".bias") if biases else gemm.name

    found = []
    for tensor, nodes in readers.items():
        products = [node for node in nodes if node.op_type == "MatMul" and node.input[0] == tensor]
        gemms = [node for node in products if len(getattr(constants.get(node.input[1]), "dims", ())) == 2]
        layers, made = tuple(map(layer, gemms)), made_by.get(tensor)
        operator = "" if made is None else made.op_type
        if not gemms or operator == "Concat" or any("heads." in name for name in layers):
            continue
        folds = operator == "LayerNormalization" and len(gemms) == len(nodes) and tensor not in returned
        norm = made.name if folds and made and all(name in constants for name in made.input[1:]) else ""
        weights = tuple(_array(constants[node.input[1]]) for node in gemms)
        found.append(Site(tensor, tuple(node.name for node in gemms), layers, weights, norm))
    return found


def _array(tensor: Any) -> Tensor:
    from onnx import numpy_helper

    # torch.from_numpy does not take NumPy's extension types, such as bfloat16.
    return torch.from_numpy(np.array(numpy_helper.to_array(tensor), np.float32))


def _token_rows(values: np.ndarray, feed: Feed) -> Tensor:
    """The rows `[R, K]` of a tensor; of its real tokens only, if it has a row for every token of the feed."""
    rows = torch.from_numpy(values).float().flatten(0, -2)
    mask = next((feed[name] for name in ("attention_mask", "segments") if name in feed), None)
    return rows if mask is None or mask.size != len(rows) else rows[torch.from_numpy(mask).bool().flatten()]


def run_graph(model: Any, feeds: Sequence[Feed]) -> Iterator[dict[str, Any]]:
    """The outputs of a graph for each feed, by ONNX Runtime on the CPU."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        # Models beyond two gigabytes must be files.
        save(model, Path(scratch, "graph.onnx"))
        session = onnxruntime.InferenceSession(
            str(Path(scratch, "graph.onnx")), session_options(), providers=["CPUExecutionProvider"]
        )
    names = [output.name for output in session.get_outputs()]
    for feed in feeds:
        yield dict(zip(names, session.run(names, dict(feed)), strict=True))


def observe(model: Any, found: Sequence[Site], feeds: Sequence[Feed]) -> tuple[list[Seen], list[dict[str, Any]]]:
    """Run an fp32 graph on feeds; returns statistics of the sites' tensors and all outputs."""
    import onnx

    model = copy.deepcopy(model)
    outputs = [value.name for value in model.graph.output]
    known = {*outputs, *(value.name for value in model.graph.input)}
    model.graph.output.extend(onnx.ValueInfoProto(name=site.tensor) for site in found if site.tensor not in known)
    parts: list[list[Seen]] = [[] for _ in found]
    results = []
    for feed, made in zip(feeds, run_graph(model, feeds), strict=True):
        results.append({name: made[name] for name in outputs})
        for site, part in zip(found, parts, strict=True):
            rows = _token_rows(feed[site.tensor] if site.tensor in feed else made[site.tensor], feed)
            step = math.ceil(len(rows) * len(feeds) / _CALIBRATION_ROWS)
            part.append(Seen(rows.amin(0), rows.amax(0), rows[::step].clone()))
    seen = []
    for part in parts:
        lows, highs, samples = zip(*part, strict=True)
        seen.append(Seen(torch.stack(lows).amin(0), torch.stack(highs).amax(0), torch.cat(samples)))
    return seen, results


def fit(site: Site, seen: Seen, scheme: Scheme) -> Fitted:
    """The scales of a site with the smallest error of its GEMMs on the samples."""
    weights = torch.cat(site.weights, 1)
    exact = seen.rows @ weights
    largest = torch.maximum(-seen.low, seen.high)

    def attempt(smoothing: Tensor, clip: float = 1.0) -> Fitted:
        low, high = float((seen.low / smoothing).min()), float((seen.high / smoothing).max())
        scale, zero = scheme.scale(low * clip, high * clip)
        stored = [scheme.store(weight * smoothing[:, None]) for weight in site.weights]
        rounded = torch.cat([values.float() * scales for values, scales in stored], 1)
        result = scheme.round(seen.rows / smoothing, scale, zero) @ rounded
        return Fitted(site, smoothing, scale, zero, float((result - exact).norm() / exact.norm().clamp(min=1e-12)))

    tried = [attempt(torch.ones_like(largest))]
    heaviest = weights.abs().amax(1).clamp(min=1e-8)
    for power in _SMOOTHINGS if site.norm else ():
        smoothing = largest.clamp(min=1e-8) ** power / heaviest ** (1 - power)
        # An unused channel keeps its scale.
        smoothing = torch.where(largest > 0, smoothing / smoothing.log().mean().exp(), 1.0)
        tried.append(attempt(smoothing.clamp(1e-3, 1e3)))
    smoothing = min(tried, key=lambda fitted: fitted.error).smoothing
    return min((attempt(smoothing, clip) for clip in _CLIPS), key=lambda fitted: fitted.error)


def quantise_graph(model: Any, chosen: Sequence[Fitted], scheme: Scheme) -> Any:
    """A copy of an ONNX graph with some of its sites in 8 bits."""
    from onnx import TensorProto, helper

    model = copy.deepcopy(model)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    eight_bits = TensorProto.FLOAT8E4M3FN if scheme.kind == "fp8" else TensorProto.INT8
    wide_types: dict[int, torch.dtype] = {TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16}

    def add(name: str, value: Tensor, kind: int) -> str:
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        graph.initializer.append(helper.make_tensor(name, kind, [*value.shape], content, raw=True))
        return name

    inserted: dict[str, list[Any]] = {}
    for site, smoothing, scale, zero, _ in chosen:
        name, before = f"{site.tensor}.{scheme.kind}", inserted.setdefault(site.gemms[0], [])
        # Scales have the dtype of the graph.
        wide: int = constants[nodes[site.gemms[0]].input[1]].data_type
        dtype = wide_types.get(wide, torch.bfloat16)
        for place in range(1, len(nodes[site.norm].input)) if site.norm else ():
            value = _array(constants[nodes[site.norm].input[place]]) / smoothing
            nodes[site.norm].input[place] = add(f"{name}.norm_{place}", value.to(dtype), wide)
        scales = [
            add(f"{name}.scale", torch.tensor(scale, dtype=dtype), wide),
            add(
                f"{name}.zero",
                torch.tensor(zero, dtype=torch.uint8),
                TensorProto.UINT8 if scheme.unsigned else eight_bits,
            ),
        ]
        before.append(helper.make_node("QuantizeLinear", [site.tensor, *scales], [f"{name}.q"], f"{name}.quantize"))
        before.append(
            helper.make_node("DequantizeLinear", [f"{name}.q", *scales], [f"{name}.dq"], f"{name}.dequantize")
        )
        for gemm, weight in zip(site.gemms, site.weights, strict=True):
            values, steps = scheme.store(weight * smoothing[:, None])
            stored = [
                add(f"{gemm}.weight", values, eight_bits),
                add(f"{gemm}.weight_scale", steps.to(dtype), wide),
                add(f"{gemm}.weight_zero", torch.zeros(steps.shape, dtype=torch.uint8), eight_bits),
            ]
            axis: dict[str, Any] = {"axis": 1} if steps.dim() else {}
            read = helper.make_node("DequantizeLinear", stored, [f"{gemm}.weight_dq"], f"{gemm}.dequantize", **axis)
            before.append(read)
            nodes[gemm].input[0], nodes[gemm].input[1] = f"{name}.dq", f"{gemm}.weight_dq"
    order = [each for node in graph.node for each in (*inserted.get(node.name, ()), node)]
    names = {name for node in order for name in node.input} | {value.name for value in graph.output}
    for part, kept in ((graph.node, order), (graph.initializer, [t for t in graph.initializer if t.name in names])):
        del part[:]
        part.extend(kept)
    return model


def save(model: Any, path: Path) -> None:
    """Write a graph, with the weights of a large one in a separate file."""
    import onnx

    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST_FILE
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)
    onnx.save(model, str(path), save_as_external_data=external, location=beside.name, size_threshold=1024)


def calibration_inputs(comparison: Comparison, record: GraphRecord) -> list[Feed]:
    """Inputs of a graph as a session gives them, each image with its share of the captions, in fp32 and int64."""
    reference, ranges = comparison.reference, graph_slots(record)[0].ranges
    fixed = {axis: sizes.least for axis, sizes in ranges.items() if sizes.single}
    batch = fixed.get("batch", 1)
    count = fixed.get("texts", math.ceil(reference.texts / reference.images))
    cases = [
        Case(
            (torch.arange(batch) + n) % reference.images,
            ((torch.arange(count) + n * count) % reference.texts).expand(batch, -1),
        )
        for n in range(reference.images)
    ]
    return [
        {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in inputs.items()}
        for inputs in comparison.inputs(record.name, cases)
    ]


def quantise_graphs(
    exported: Manifest, comparison: Comparison, out: Path, scheme: Scheme, budget: float, progress: Progress = silent
) -> None:
    """Write the ONNX files of an export to `out` with 8-bit GEMMs within a budget, and record the choices.

    Raises:
        ExportError: ONNX Runtime does not run a graph, or the budget leaves no GEMM in 8 bits.
    """
    made = []
    for record in exported.graphs:
        started = time.perf_counter()
        progress(f"choosing GEMMs of {record.name}")
        path = out / record.file
        try:
            feeds = calibration_inputs(comparison, record)
            record.quantisation = quantise_file(comparison.folder / record.file, path, feeds, scheme, budget)
        except (XFMError, OSError):
            raise
        except Exception as error:  # of ONNX Runtime, which has no errors of its own
            raise ExportError(
                f"graph {record.name!r} could not be quantised to {scheme.kind} ({first_line(error)}); export it "
                "without 8 bits"
            ) from error
        made.append(record.quantisation)
        record.files = [name for name in (path.name, f"{path.name}.data") if (out / name).exists()]
        record.build_seconds += time.perf_counter() - started
    if all(len(each.kept) == each.products for each in made):
        raise ExportError(
            f"--budget {budget} cannot be met: no GEMM of {', '.join(exported.graph_names)} can be in {scheme.kind}; "
            "give a smaller one, or serve the export without 8 bits"
        )
    exported.options |= {"arithmetic": scheme.kind, "budget": budget, "calibration": exported.examples}


def quantise_file(path: Path, out: Path, feeds: Sequence[Feed], scheme: Scheme, budget: float) -> QuantisationRecord:
    """Choose the GEMMs of one graph and write it to `out`."""
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        widen(path, Path(scratch, path.name))
        wide: Any = onnx.load(str(Path(scratch, path.name)))
    found = sites(wide)
    seen, truths = observe(wide, found, feeds)
    # Smallest error first.
    order = sorted((fit(*each, scheme) for each in zip(found, seen, strict=True)), key=lambda fitted: fitted.error)
    count, cosine, excess, attempt = 0, 1.0, len(order) + 1, len(order)
    while excess - count > 1:
        results = run_graph(quantise_graph(wide, order[:attempt], scheme), feeds)
        least = min(map(least_cosine, results, truths, feeds))
        if least >= 1 - _SPENT * (1 - budget):
            count, cosine = attempt, least
        else:
            excess = attempt
        attempt = (count + excess) // 2
    del wide
    save(quantise_graph(onnx.load(str(path)), order[:count], scheme), out)
    return QuantisationRecord(
        kind=scheme.kind,
        budget=budget,
        cosine=cosine,
        products=sum(len(fitted.site.gemms) for fitted in order),
        smoothed=sum(bool((fitted.smoothing != 1).any()) for fitted in order[:count]),
        kept=[name for fitted in order[count:] for name in fitted.site.layers],
    )


def least_cosine(found: Feed, truth: Feed, feed: Feed) -> float:
    """The least cosine of a row of any output: of real tokens, or of the scores of an image; -1 for NaN."""
    cosines = [torch.ones(1)]
    for name in truth:
        if name in DIRECTIONS or is_memory(name):
            rows = [_token_rows(values[name], feed).double() for values in (found, truth)]
        # Fewer scores have no meaningful cosine.
        elif name in ("scores", "match_logits") and truth[name].shape[1] > 4:
            scores = [torch.from_numpy(values[name]).double() for values in (found, truth)]
            scores = [each[..., 1] if name == "match_logits" else each for each in scores]
            rows = [each - each.mean(-1, keepdim=True) for each in scores]
        else:
            continue
        cosines.append(F.cosine_similarity(*rows, dim=-1).flatten())
    return float(torch.cat(cosines).nan_to_num(-1).min())


def quantize_int8(
    folder: str | Path, out: str | Path, *, budget: float = BUDGET, progress: Progress = silent
) -> Manifest:
    """Write an int8 copy of an fp32 ONNX export to another folder, verified against the fp32 reference."""
    folder, out = Path(folder), Path(out)
    if folder.resolve() == out.resolve():
        raise InputError(f"{out} holds the fp32 export; name another folder for the int8 one")
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
    prepare_folder(out, sum(record.bytes for record in source.files))
    changed = source.unverified(
        versions=source.versions | package_versions("onnxruntime"),
        options=dict(source.options),
        graphs=[record.model_copy(update={"build_seconds": 0.0}) for record in source.graphs],
    )
    # CPUs multiply uint8 by int8, GPUs int8 by int8.
    scheme = Scheme("int8", unsigned=not source.consumer.startswith("tensorrt"))

    def compare(content: Manifest) -> None:
        progress("comparing with the model")
        keep_reference(content, out, reference)
        compare_with_reference(content, out, reference)

    with (
        storing(out, "choose another folder"),
        tempfile.TemporaryDirectory(dir=out, prefix=".int8-") as scratch,
    ):
        quantise_graphs(changed, Comparison(source, folder, reference), Path(scratch), scheme, budget, progress)

        def write(record: GraphRecord) -> list[str]:
            for name in record.files:
                Path(scratch, name).replace(out / name)
            return record.files

        return fill_folder(changed, out, changed.graphs, write, compare, sidecar_files(folder, source))
