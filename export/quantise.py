"""8-bit exports: the largest set of 8-bit GEMMs that keeps every output row within a cosine budget of the model.

A GEMM here is a `MatMul` by a constant matrix; attention multiplies two activations and keeps its dtype. All GEMMs
of one tensor form a `Site`, quantised as a whole by `QuantizeLinear` and `DequantizeLinear` pairs, which all runtimes
read. Scales are fitted by trial on samples of the tensor. Large channels are first scaled down, and the weights
multiply them up (SmoothQuant, arXiv 2211.10438): by a LayerNorm that feeds only these GEMMs, or by a `Mul`, since the
sum behind a post-norm layer reads the same tensor. For CPUs large embedding tables are stored in 8 bits by row.

All GEMMs of a graph are tried in 8 bits first; while the outputs exceed the budget, the largest errors go back to the
dtype of the graph. Then the graphs together are compared with the model, and those that differ go back further. Trials
run in ONNX Runtime on the CPU, on every second image and caption of the reference; the comparison has the others.
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
from .manifest import GraphRecord, Manifest, QuantisationRecord, package_versions
from .pipeline import Progress, fill_folder, prepare_folder, sidecar_files, silent
from .request import BUDGET, DEFAULT_GRAPHS, GRAPHS, DType, GraphName, Quantisation
from .runtimes import LARGEST_FILE, first_line
from .runtimes.onnx_runtime import OnnxRuntime, session_options, widen
from .slots import graph_slots
from .verification import (
    THRESHOLDS,
    Case,
    Comparison,
    calibration_part,
    compare_with_reference,
    keep_reference,
)

Feed = Mapping[str, np.ndarray]

# Verification runs more shapes than calibration, which spends only part of the budget.
_SPENT = 0.8
# Sample rows of every tensor.
_CALIBRATION_ROWS = 512
# Clipping thresholds as shares of the largest entry, and SmoothQuant exponents, tried in turn.
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_SMOOTHINGS = (0.25, 0.5, 0.75)
# A smoothing that no LayerNorm takes costs a pass over the tensor; the error must fall to this share.
_WORTH_A_PASS = 0.8
# Entries of a table that is worth three more operators.
_LEAST_TABLE = 1 << 20
# Share of a graph's sites that stay in 8 bits after a failed comparison.
_RETREAT = 0.95
_TIMED_RUNS = 9
# Rows of fewer entries have no meaningful direction.
_LEAST_ROW = 5
_EXTREMES: dict[Quantisation, float] = {"int8": 127.0, "fp8": 448.0}


def check_quantisation(
    kind: str, dtype: DType, budget: float, graphs: Sequence[GraphName] = ()
) -> Quantisation:
    """Check kind, dtype, budget and graphs before one is exported."""
    if kind not in get_args(Quantisation):
        raise UnavailableError(
            f"quantisation {kind!r} is unknown; choose from {', '.join(get_args(Quantisation))}"
        )
    if others := [name for name in graphs if name not in GRAPHS]:
        raise UnavailableError(
            f"graph {others[0]!r} has no 8-bit form; export {', '.join(GRAPHS)}, or without 8 bits"
        )
    most = THRESHOLDS[dtype].cosine
    if not 0 < budget <= most:
        raise InputError(
            f"--budget {budget} cannot be kept, {dtype} itself is held to {most}; give {BUDGET}"
        )
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
        scale = ((weight.abs().amax(0) if columns else weight.abs().max()) / extreme).clamp(
            min=1e-12
        )
        levels = (weight / scale).clamp(-extreme, extreme)
        return levels.round().to(torch.int8) if columns else levels.to(torch.float8_e4m3fn), scale


class Site(NamedTuple):
    """A tensor and the GEMMs that read it; `norm` is the LayerNormalization that feeds only these, or ""."""

    tensor: str
    gemms: tuple[str, ...]  # names of the nodes
    layers: tuple[str, ...]  # names of their layers
    weights: tuple[Tensor, ...]  # [K, N] in fp32, each
    norm: str = ""


class Table(NamedTuple):
    """An embedding table and the nodes that gather its rows."""

    name: str
    gathers: tuple[str, ...]


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


def _readers(model: Any) -> dict[str, list[Any]]:
    """Return the nodes that read each tensor of a graph."""
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def sites(model: Any) -> list[Site]:
    """The sites of a graph, without heads (cheap, decisive for scores) and concatenated tensors (not always read)."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    returned = {value.name for value in model.graph.output}
    made_by = {name: node for node in model.graph.node for name in node.output}
    readers = _readers(model)

    def layer(gemm: Any) -> str:
        """Return the layer's name by that of its weight, or of its bias in older exports."""
        added = [
            name
            for node in readers.get(gemm.output[0], ())
            if node.op_type == "Add"
            for name in node.input
        ]
        named = [
            name
            for name in (gemm.input[1], *added)
            if name in constants and name.endswith((".weight", ".bias"))
        ]
        return named[0].rpartition(".")[0] if named else gemm.name

    found = []
    for tensor, nodes in readers.items():
        products = [node for node in nodes if node.op_type == "MatMul" and node.input[0] == tensor]
        gemms = [
            node for node in products if len(getattr(constants.get(node.input[1]), "dims", ())) == 2
        ]
        layers, made = tuple(map(layer, gemms)), made_by.get(tensor)
        operator = "" if made is None else made.op_type
        if not gemms or operator == "Concat" or any("heads." in name for name in layers):
            continue
        folds = (
            operator == "LayerNormalization" and len(gemms) == len(nodes) and tensor not in returned
        )
        norm = (
            made.name
            if folds and made and all(name in constants for name in made.input[1:])
            else ""
        )
        weights = tuple(_array(constants[node.input[1]]) for node in gemms)
        found.append(Site(tensor, tuple(node.name for node in gemms), layers, weights, norm))
    return found


def tables(model: Any) -> list[Table]:
    """Return the large tables of a graph that are read by `Gather` alone, row by row."""
    readers = _readers(model)
    matches = []
    for tensor in model.graph.initializer:
        nodes = readers.get(tensor.name, ())
        by_row = all(
            node.op_type == "Gather"
            and node.input[0] == tensor.name
            and not any(each.i for each in node.attribute)
            for node in nodes
        )
        if nodes and by_row and len(tensor.dims) == 2 and math.prod(tensor.dims) >= _LEAST_TABLE:
            matches.append(Table(tensor.name, tuple(node.name for node in nodes)))
    return matches


def _array(tensor: Any) -> Tensor:
    from onnx import numpy_helper

    # torch.from_numpy does not take NumPy's extension types, such as bfloat16.
    return torch.from_numpy(np.array(numpy_helper.to_array(tensor), np.float32))


def _token_rows(values: np.ndarray, feed: Feed) -> Tensor:
    """Return the rows `[R, K]` of a tensor; of its real tokens only, if it has a row for every token of the feed."""
    rows = torch.from_numpy(values).float()
    rows = rows.flatten(0, -2) if rows.dim() > 1 else rows.reshape(-1, 1)
    mask = next((feed[name] for name in ("attention_mask", "segments") if name in feed), None)
    return (
        rows
        if mask is None or mask.size != len(rows)
        else rows[torch.from_numpy(mask).bool().flatten()]
    )


def _session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(
        str(path), session_options(), providers=["CPUExecutionProvider"]
    )


def run_graph(model: Any, feeds: Sequence[Feed]) -> Iterator[dict[str, Any]]:
    """Yield the outputs of a graph for each feed, by ONNX Runtime on the CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        # Models beyond two gigabytes must be files.
        save(model, Path(scratch, "graph.onnx"))
        session = _session(Path(scratch, "graph.onnx"))
    names = [output.name for output in session.get_outputs()]
    for feed in feeds:
        yield dict(zip(names, session.run(names, dict(feed)), strict=True))


def observe(
    model: Any, found: Sequence[Site], feeds: Sequence[Feed]
) -> tuple[list[Seen], list[dict[str, Any]]]:
    """Run an fp32 graph on feeds; returns statistics of the sites' tensors and all outputs."""
    import onnx

    model = copy.deepcopy(model)
    outputs = [value.name for value in model.graph.output]
    known = {*outputs, *(value.name for value in model.graph.input)}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=site.tensor) for site in found if site.tensor not in known
    )
    parts: list[list[Seen]] = [[] for _ in found]
    results = []
    for feed, made in zip(feeds, run_graph(model, feeds), strict=True):
        results.append({name: made[name] for name in outputs})
        for site, part in zip(found, parts, strict=True):
            rows = _token_rows(
                feed[site.tensor] if site.tensor in feed else made[site.tensor], feed
            )
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
        return Fitted(
            site,
            smoothing,
            scale,
            zero,
            float((result - exact).norm() / exact.norm().clamp(min=1e-12)),
        )

    plain = attempt(torch.ones_like(largest))
    heaviest = weights.abs().amax(1).clamp(min=1e-8)
    smoothed = []
    for power in _SMOOTHINGS:
        smoothing = largest.clamp(min=1e-8) ** power / heaviest ** (1 - power)
        # An unused channel keeps its scale.
        smoothing = torch.where(largest > 0, smoothing / smoothing.log().mean().exp(), 1.0)
        smoothed.append(attempt(smoothing.clamp(1e-3, 1e3)))
    best = min(smoothed, key=lambda fitted: fitted.error)
    smoothing = (
        best if best.error < plain.error * (1 if site.norm else _WORTH_A_PASS) else plain
    ).smoothing
    return min((attempt(smoothing, clip) for clip in _CLIPS), key=lambda fitted: fitted.error)


def quantise_graph(
    model: Any, chosen: Sequence[Fitted], scheme: Scheme, tables: Sequence[Table] = ()
) -> Any:
    """Return a copy of an ONNX graph with some of its sites and tables in 8 bits."""
    from onnx import TensorProto, helper

    model = copy.deepcopy(model)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    eight_bits = TensorProto.FLOAT8E4M3FN if scheme.kind == "fp8" else TensorProto.INT8
    wide_types: dict[int, torch.dtype] = {
        TensorProto.FLOAT: torch.float32,
        TensorProto.FLOAT16: torch.float16,
    }

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
        tensor = site.tensor
        if not site.norm and bool((smoothing != 1).any()):
            inverse = add(f"{name}.inverse_smoothing", (1 / smoothing).to(dtype), wide)
            before.append(
                helper.make_node("Mul", [tensor, inverse], [f"{name}.smoothed"], f"{name}.smooth")
            )
            tensor = f"{name}.smoothed"
        before.append(
            helper.make_node("QuantizeLinear", [tensor, *scales], [f"{name}.q"], f"{name}.quantize")
        )
        before.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}.q", *scales], [f"{name}.dq"], f"{name}.dequantize"
            )
        )
        for gemm in site.gemms:
            weight = _array(constants[nodes[gemm].input[1]])
            values, steps = scheme.store(weight * smoothing[:, None])
            stored = [
                add(f"{gemm}.weight", values, eight_bits),
                add(f"{gemm}.weight_scale", steps.to(dtype), wide),
                add(f"{gemm}.weight_zero", torch.zeros(steps.shape, dtype=torch.uint8), eight_bits),
            ]
            axis: dict[str, Any] = {"axis": 1} if steps.dim() else {}
            read = helper.make_node(
                "DequantizeLinear", stored, [f"{gemm}.weight_dq"], f"{gemm}.dequantize", **axis
            )
            before.append(read)
            nodes[gemm].input[0], nodes[gemm].input[1] = f"{name}.dq", f"{gemm}.weight_dq"
    replaced: dict[str, list[Any]] = {}
    for name, gathers in tables:
        wide = constants[name].data_type
        rows = _array(constants[name])
        steps = (rows.abs().amax(1, keepdim=True) / _EXTREMES["int8"]).clamp(min=1e-12)
        stored = [
            add(f"{name}.int8", (rows / steps).round().to(torch.int8), TensorProto.INT8),
            add(f"{name}.steps", steps.to(wide_types.get(wide, torch.bfloat16)), wide),
        ]
        for gather in gathers:
            parts = [f"{gather}.{part}" for part in ("levels", "wide_levels", "steps")]
            index = nodes[gather].input[1]
            replaced[gather] = [
                helper.make_node("Gather", [stored[0], index], parts[:1], parts[0]),
                helper.make_node("Cast", parts[:1], parts[1:2], parts[1], to=wide),
                helper.make_node("Gather", [stored[1], index], parts[2:], parts[2]),
                helper.make_node("Mul", parts[1:], [nodes[gather].output[0]], gather),
            ]
    order = [
        each
        for node in graph.node
        for each in (*inserted.get(node.name, ()), *replaced.get(node.name, (node,)))
    ]
    names = {name for node in order for name in node.input} | {value.name for value in graph.output}
    for part, kept in (
        (graph.node, order),
        (graph.initializer, [t for t in graph.initializer if t.name in names]),
    ):
        del part[:]
        part.extend(kept)
    return model


def save(model: Any, path: Path) -> None:
    """Write a graph, with the weights of a large one in a separate file."""
    import onnx

    external = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST_FILE
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)
    onnx.save(
        model, str(path), save_as_external_data=external, location=beside.name, size_threshold=1024
    )


def calibration_inputs(
    comparison: Comparison, record: GraphRecord, *, rest: bool = False
) -> list[Feed]:
    """Return inputs as a session gives them to a graph, each image with its share of the texts, in fp32 and int64."""
    images, texts = calibration_part(comparison.reference, rest=rest)
    ranges = graph_slots(record)[0].ranges
    fixed = {axis: sizes.least for axis, sizes in ranges.items() if sizes.single}
    batch = fixed.get("batch", 1)
    count = fixed.get("texts", math.ceil(len(texts) / len(images)))
    cases = [
        Case(
            images[(torch.arange(batch) + n) % len(images)],
            texts[(torch.arange(count) + n * count) % len(texts)].expand(batch, -1),
        )
        for n in range(len(images))
    ]
    return [
        {
            name: (value.float() if value.is_floating_point() else value).numpy()
            for name, value in inputs.items()
        }
        for inputs in comparison.inputs(record.name, cases)
    ]


class _Trials:
    """The outputs of a graph in fp32 on some inputs, and how near its 8-bit forms come to them."""

    def __init__(self, feeds: Sequence[Feed], truths: Sequence[Feed]) -> None:
        self.feeds, self.truths = feeds, truths
        self.extents = {
            name: max(float(np.abs(each[name]).max(initial=0)) for each in truths)
            for name in truths[0]
        }

    def least_cosine(self, model: Any, most: int | None = None) -> float:
        """Return the least cosine of a graph over all inputs, or the first ones."""
        feeds, truths = self.feeds[:most], self.truths[:most]
        outputs = run_graph(model, feeds)
        return min(
            least_cosine(*each, self.extents) for each in zip(outputs, truths, feeds, strict=True)
        )


class GraphPlan:
    """The 8-bit form of a graph: its sites, of which the first `count` are in 8 bits, and its tables."""

    def __init__(self, path: Path, feeds: Sequence[Feed], scheme: Scheme, budget: float) -> None:
        self.path, self.feeds, self.scheme, self.budget = path, feeds, scheme, budget
        wide = self._wide()
        matches = sites(wide)
        statistics, truths = observe(wide, matches, feeds)
        self.trials = _Trials(feeds, truths)
        fitted = [fit(*each, scheme) for each in zip(matches, statistics, strict=True)]
        # The graph holds the weights.
        self.fitted = [each._replace(site=each.site._replace(weights=())) for each in fitted]
        least = 1 - _SPENT * (1 - budget)
        # GPUs gather no rows of 8 bits.
        self.tables = tables(wide) if scheme.unsigned else []
        if self.tables and self.trials.least_cosine(self._quantised(wide, ())) < least:
            self.tables = []
        self.count, excess, self.cosine = 0, len(fitted) + 1, 1.0
        trial = len(fitted)
        while excess - self.count > 1:
            cosine = self.trials.least_cosine(self._quantised(wide, self.fitted[:trial]))
            if cosine >= least:
                self.count, self.cosine = trial, cosine
            else:
                if trial == len(fitted):
                    self._rank(wide, self.trials)
                excess = trial
            trial = (self.count + excess) // 2
        self.retreated = False

    def _wide(self) -> Any:
        """Return the graph in fp32."""
        import onnx

        with tempfile.TemporaryDirectory() as scratch:
            widen(self.path, Path(scratch, self.path.name))
            return onnx.load(str(Path(scratch, self.path.name)))

    def _quantised(self, model: Any, fitted: Sequence[Fitted]) -> Any:
        return quantise_graph(model, fitted, self.scheme, self.tables)

    def _rank(self, wide: Any, trials: _Trials) -> None:
        """Sort the sites in 8 bits by what each alone costs the outputs of one input: small costs add up."""
        count = self.count or len(self.fitted)
        narrow = self.fitted[:count]
        cosines = [trials.least_cosine(self._quantised(wide, [each]), 1) for each in narrow]
        order = sorted(range(count), key=cosines.__getitem__, reverse=True)
        self.fitted[:count] = [narrow[index] for index in order]

    def retreat(self, feeds: Sequence[Feed]) -> bool:
        """Return the sites that cost most on inputs of the comparison to the graph's dtype; False without any."""
        if not self.count:
            return False
        wide = self._wide()
        if not self.retreated:
            self._rank(wide, _Trials(feeds, [*run_graph(wide, feeds)]))
            self.retreated = True
        self.count = min(self.count - 1, int(self.count * _RETREAT))
        self.cosine = self.trials.least_cosine(self._quantised(wide, self.fitted[: self.count]))
        return True

    def write(self, out: Path) -> QuantisationRecord:
        """Write the graph to `out` and return its record."""
        import onnx

        if not self.count:
            self.tables, self.cosine = [], 1.0
        narrow = self.fitted[: self.count]
        save(self._quantised(onnx.load(str(self.path)), narrow), out)
        return QuantisationRecord(
            kind=self.scheme.kind,
            budget=self.budget,
            cosine=self.cosine,
            products=sum(len(each.site.gemms) for each in self.fitted),
            smoothed=sum(bool((each.smoothing != 1).any()) for each in narrow),
            kept=[name for each in self.fitted[self.count :] for name in each.site.layers],
            tables=[table.name for table in self.tables],
        )


def quantise_graphs(
    exported: Manifest,
    comparison: Comparison,
    out: Path,
    scheme: Scheme,
    budget: float,
    progress: Progress = silent,
) -> None:
    """Write the ONNX files of an export to `out` with 8-bit GEMMs within a budget, compare them, record the choices.

    Raises:
        ExportError: ONNX Runtime does not run a graph, or budget and comparison leave no GEMM in 8 bits.
    """
    plans: dict[str, GraphPlan] = {}
    exported.options |= {
        "arithmetic": scheme.kind,
        "budget": budget,
        "calibration": f"every second image and text of {exported.examples}",
    }

    def write(record: GraphRecord) -> None:
        started = time.perf_counter()
        path = out / record.file
        try:
            if record.name not in plans:
                progress(f"choosing GEMMs of {record.name}")
                feeds = calibration_inputs(comparison, record)
                plans[record.name] = GraphPlan(
                    comparison.folder / record.file, feeds, scheme, budget
                )
            record.quantisation = plans[record.name].write(path)
        except (XFMError, OSError):
            raise
        except Exception as error:  # of ONNX Runtime, which has no errors of its own
            raise ExportError(
                f"graph {record.name!r} could not be quantised to {scheme.kind} ({first_line(error)}); export it "
                "without 8 bits"
            ) from error
        record.files = [name for name in (path.name, f"{path.name}.data") if (out / name).exists()]
        record.build_seconds += time.perf_counter() - started

    changed = exported.graphs
    while changed:
        for record in changed:
            write(record)
        if not any(plan.count for plan in plans.values()):
            raise ExportError(
                f"--budget {budget} cannot be met: no GEMM of {', '.join(exported.graph_names)} can be in {scheme.kind}"
                f"{f' ({exported.reason})' if exported.verification else ''}; give a smaller one, or serve the export "
                "without 8 bits"
            )
        progress("comparing with the model")
        compare_with_reference(exported, out, comparison.reference)
        verification = exported.verification
        checks = [] if verification is None else [*verification.checks, *verification.ranks]
        failed = {check.graph for check in checks if not check.passed}
        # Graphs that pass alone may fail together.
        failed = {*DEFAULT_GRAPHS} if failed == {"all"} else failed
        changed = [
            record
            for record in exported.graphs
            if record.name in failed
            and plans[record.name].retreat(calibration_inputs(comparison, record, rest=True))
        ]
    for record in exported.graphs if scheme.unsigned else ():
        assert record.quantisation is not None
        progress(f"timing {record.name}")
        files = comparison.folder / record.file, out / record.file
        wide, narrow = time_in_turn(files, plans[record.name].feeds[0])
        record.quantisation.wide_milliseconds, record.quantisation.milliseconds = wide, narrow


def time_in_turn(paths: Sequence[Path], feed: Feed) -> list[float]:
    """Return the median time in milliseconds of each graph on the CPU, the graphs run in turn."""
    sessions = [_session(path) for path in paths]
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(1 + _TIMED_RUNS):
        for session, runs in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.run(None, dict(feed))
            runs.append(1000 * (time.perf_counter() - started))
    # The first run of a shape allocates.
    return [round(float(np.median(runs[1:])), 3) for runs in times]


def least_cosine(output: Feed, truth: Feed, feed: Feed, extents: Mapping[str, float]) -> float:
    """Return the least cosine of a row of any floating output, padding excluded; -1 for NaN.

    The scores of an image are a row. A row too short for a direction has the cosine whose chord is its largest error,
    as a share of the output's largest entry.
    """
    cosines = [torch.ones(1, dtype=torch.double)]
    for name in truth:
        if not np.issubdtype(truth[name].dtype, np.floating):
            continue
        rows, exact = (_token_rows(values[name], feed).double() for values in (output, truth))
        if name in ("scores", "match_logits") and truth[name].shape[1] >= _LEAST_ROW:
            scores = [torch.from_numpy(values[name]).double() for values in (output, truth)]
            scores = [each[..., 1] if name == "match_logits" else each for each in scores]
            cosines.append(
                F.cosine_similarity(
                    *(each - each.mean(-1, keepdim=True) for each in scores), dim=-1
                )
            )
        if name == "scores" or exact.shape[-1] < _LEAST_ROW:
            cosines.append(1 - ((rows - exact).flatten() / (extents[name] or 1)).square() / 2)
        else:
            cosines.append(F.cosine_similarity(rows, exact, dim=-1).flatten())
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

    with (
        storing(out, "choose another folder"),
        tempfile.TemporaryDirectory(dir=out, prefix=".int8-") as scratch,
    ):
        quantise_graphs(
            changed, Comparison(source, folder, reference), Path(scratch), scheme, budget, progress
        )

        def write(record: GraphRecord) -> list[str]:
            for name in record.files:
                Path(scratch, name).replace(out / name)
            return record.files

        # The files were compared before they were moved here.
        return fill_folder(
            changed,
            out,
            changed.graphs,
            write,
            lambda content: keep_reference(content, out, reference),
            sidecar_files(folder, source),
        )
