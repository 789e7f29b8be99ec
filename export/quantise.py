"""8-bit exports: the largest set of 8-bit GEMMs that keeps every output row within a cosine budget of the model.

A GEMM here is a `MatMul` by a constant matrix; attention multiplies two activations and keeps its dtype. The scales of
a `Site` are fitted by trial on samples of its tensor.

All GEMMs of a graph are tried in 8 bits first; while the outputs exceed the budget, the largest errors go back to the
dtype of the graph. Then the graphs together are compared with the model, and those that differ go back further. Trials
run in ONNX Runtime on the CPU, on every second image and caption of the reference; the comparison takes the others.
"""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import ExportError, InputError, UnavailableError, XFMError
from xfm_fast.io import staged, storing

from .expected import Reference, keep_reference
from .findings import THRESHOLDS, Comparison, Feed, pooled_tokens
from .manifest import GraphRecord, Manifest, QuantisationRecord, package_versions
from .pipeline import Progress, fill_folder, prepare_folder, sidecar_files, silent, write_companions
from .qdq import Fitted, Scheme, Site, find_sites, find_tables, quantise_graph
from .request import BUDGET, DEFAULT_GRAPHS, GRAPHS, DType, GraphName, Quantisation
from .runtimes import first_line
from .runtimes.onnx_runtime import OnnxRuntime, run_graph, save, time_in_turn, widen
from .verification import compare_with_reference, open_comparison

# Verification runs more shapes than calibration, which spends only part of the budget.
_SPENT = 0.8
# Sample rows of every tensor.
_CALIBRATION_ROWS = 512
# Clipping thresholds as shares of the largest entry, and SmoothQuant exponents, tried in turn.
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
_SMOOTHINGS = (0.25, 0.5, 0.75)
# A smoothing that no LayerNorm takes costs a pass over the tensor; the error must fall to this share.
_WORTH_A_PASS = 0.8
# Share of a graph's sites that stay in 8 bits after a failed comparison.
_RETREAT = 0.95
# Rows of fewer entries have no meaningful direction.
_LEAST_ROW = 5


def check_quantisation(
    name: str, dtype: DType, budget: float, graphs: Sequence[GraphName] = ()
) -> Quantisation:
    """Check an 8-bit type, with dtype, budget and graphs, before a graph is exported."""
    if name not in get_args(Quantisation):
        raise UnavailableError(
            f"quantisation {name!r} is unknown; choose from {', '.join(get_args(Quantisation))}"
        )
    if unsupported := [graph for graph in graphs if graph not in (*GRAPHS, "encoder")]:
        raise UnavailableError(
            f"graph {unsupported[0]!r} has no 8-bit form; export {', '.join(GRAPHS)}, or without 8 bits"
        )
    limit = THRESHOLDS[dtype].cosine
    if not 0 < budget <= limit:
        raise InputError(
            f"--budget {budget} cannot be kept, {dtype} itself is held to {limit}; give {BUDGET}"
        )
    OnnxRuntime.import_library()
    return name  # pyright: ignore[reportReturnType]


class Statistics(NamedTuple):
    """Extremes `[K]` of every channel of a site's tensor over the calibration, and a sample of its rows `[R, K]`."""

    low: Tensor
    high: Tensor
    rows: Tensor


def _token_rows(values: np.ndarray, feed: Feed) -> Tensor:
    """Return the rows `[R, K]` of a tensor, without padding if it has a row for every token of the feed."""
    rows = torch.from_numpy(values).float()
    rows = rows.flatten(0, -2) if rows.dim() > 1 else rows.reshape(-1, 1)
    mask = feed.get("attention_mask", feed.get("segments"))
    if mask is None or mask.size != len(rows):
        return rows
    return rows[torch.from_numpy(mask).bool().flatten()]


def observe(
    model: Any, sites: Sequence[Site], feeds: Sequence[Feed]
) -> tuple[list[Statistics], list[dict[str, Any]]]:
    """Run an fp32 graph on feeds; returns statistics of the sites' tensors and all outputs."""
    import onnx

    model = copy.deepcopy(model)
    names = [value.name for value in model.graph.output]
    available = {*names, *(value.name for value in model.graph.input)}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=site.tensor) for site in sites if site.tensor not in available
    )
    by_feed: list[list[Statistics]] = [[] for _ in sites]
    results = []
    for feed, outputs in zip(feeds, run_graph(model, feeds), strict=True):
        results.append({name: outputs[name] for name in names})
        for site, statistics in zip(sites, by_feed, strict=True):
            rows = _token_rows({**outputs, **feed}[site.tensor], feed)
            step = math.ceil(len(rows) * len(feeds) / _CALIBRATION_ROWS)
            statistics.append(Statistics(rows.amin(0), rows.amax(0), rows[::step].clone()))
    merged = []
    for statistics in by_feed:
        lows, highs, samples = zip(*statistics, strict=True)
        low, high = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
        merged.append(Statistics(low, high, torch.cat(samples)))
    return merged, results


def fit(site: Site, statistics: Statistics, scheme: Scheme) -> Fitted:
    """Find the scales of a site with the smallest error of its GEMMs on the samples."""
    low, high, rows = statistics
    weights = torch.cat(site.weights, 1)
    exact = rows @ weights
    largest = torch.maximum(-low, high)

    def attempt(smoothing: Tensor, clip: float = 1.0) -> Fitted:
        bounds = float((low / smoothing).min()), float((high / smoothing).max())
        scale, zero = scheme.scale(bounds[0] * clip, bounds[1] * clip)
        stored = [scheme.store(weight * smoothing[:, None]) for weight in site.weights]
        rounded = torch.cat([values.float() * scales for values, scales in stored], 1)
        result = scheme.round(rows / smoothing, scale, zero) @ rounded
        error = float((result - exact).norm() / exact.norm().clamp(min=1e-12))
        return Fitted(site, smoothing, scale, zero, error)

    plain = attempt(torch.ones_like(largest))
    heaviest = weights.abs().amax(1).clamp(min=1e-8)
    smoothed = []
    for power in _SMOOTHINGS:
        smoothing = largest.clamp(min=1e-8) ** power / heaviest ** (1 - power)
        # An unused channel keeps its scale.
        smoothing = torch.where(largest > 0, smoothing / smoothing.log().mean().exp(), 1.0)
        smoothed.append(attempt(smoothing.clamp(1e-3, 1e3)))
    best = min(smoothed, key=lambda fitted: fitted.error)
    if best.error >= plain.error * (1 if site.norm else _WORTH_A_PASS):
        best = plain
    return min((attempt(best.smoothing, clip) for clip in _CLIPS), key=lambda fitted: fitted.error)


class _Trials:
    """The outputs of a graph in fp32 on some inputs, with which its 8-bit forms are compared."""

    def __init__(self, feeds: Sequence[Feed], truths: Sequence[Feed]) -> None:
        self.feeds, self.truths = feeds, truths
        self.extents = {
            name: max(float(np.abs(truth[name]).max(initial=0)) for truth in truths)
            for name in truths[0]
        }

    def least_cosine(self, model: Any, count: int | None = None) -> float:
        """Return the least cosine of a graph over all inputs, or the first ones."""
        feeds, truths = self.feeds[:count], self.truths[:count]
        runs = zip(run_graph(model, feeds), truths, feeds, strict=True)
        return min(least_cosine(*run, self.extents) for run in runs)


class GraphPlan:
    """The 8-bit form of a graph: its sites, of which the first `count` are in 8 bits, and its tables."""

    def __init__(self, path: Path, feeds: Sequence[Feed], scheme: Scheme, budget: float) -> None:
        self.path, self.feeds, self.scheme, self.budget = path, feeds, scheme, budget
        wide = self._wide()
        sites = find_sites(wide)
        statistics, truths = observe(wide, sites, feeds)
        self.trials = _Trials(feeds, truths)
        self.fitted: list[Fitted] = []
        for site, site_statistics in zip(sites, statistics, strict=True):
            fitted = fit(site, site_statistics, scheme)
            # The graph holds the weights.
            self.fitted.append(fitted._replace(site=site._replace(weights=())))
        least = 1 - _SPENT * (1 - budget)
        # GPUs do not gather rows of 8 bits.
        self.tables = find_tables(wide) if scheme.unsigned else {}
        if self.tables and self.trials.least_cosine(self._quantised(wide, ())) < least:
            self.tables = {}
        # A binary search for the largest count within the budget.
        total = len(self.fitted)
        self.count, excess, self.cosine = 0, total + 1, 1.0
        trial = total
        while excess - self.count > 1:
            cosine = self.trials.least_cosine(self._quantised(wide, self.fitted[:trial]))
            if cosine >= least:
                self.count, self.cosine = trial, cosine
            else:
                if trial == total:
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
        cosines = [trials.least_cosine(self._quantised(wide, [fitted]), 1) for fitted in narrow]
        order = sorted(range(count), key=cosines.__getitem__, reverse=True)
        self.fitted[:count] = [narrow[index] for index in order]

    def retreat(self, feeds: Sequence[Feed]) -> bool:
        """Take the costliest sites, on inputs of the comparison, back to the graph's dtype; False if there are none."""
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
            self.tables, self.cosine = {}, 1.0
        narrow = self.fitted[: self.count]
        save(self._quantised(onnx.load(str(self.path)), narrow), out)
        return QuantisationRecord(
            kind=self.scheme.kind,
            budget=self.budget,
            cosine=self.cosine,
            products=sum(len(fitted.site.gemms) for fitted in self.fitted),
            smoothed=sum(bool((fitted.smoothing != 1).any()) for fitted in narrow),
            kept=[name for fitted in self.fitted[self.count :] for name in fitted.site.layers],
            tables=[*self.tables],
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
        path.parent.mkdir(exist_ok=True)
        try:
            if record.name not in plans:
                progress(f"choosing GEMMs of {record.name}")
                feeds = comparison.feeds(record)
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
        files = (record.file, f"{record.file}.data")
        record.files = [name for name in files if (out / name).exists()]
        record.build_seconds += time.perf_counter() - started

    # A comparison may open the export as its users do.
    write_companions(out, sidecar_files(comparison.folder, exported))
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
            and plans[record.name].retreat(comparison.feeds(record, judging=True))
        ]
    for record in exported.graphs if scheme.unsigned else ():
        assert record.quantisation is not None
        progress(f"timing {record.name}")
        files = comparison.folder / record.file, out / record.file
        wide, narrow = time_in_turn(files, plans[record.name].feeds[0])
        record.quantisation.wide_milliseconds, record.quantisation.milliseconds = wide, narrow


def least_cosine(output: Feed, truth: Feed, feed: Feed, extents: Mapping[str, float]) -> float:
    """Return the least cosine of a row of any floating output, padding and pooled tokens excluded; -1 for NaN.

    The scores of an image are a row. A row too short for a direction has the cosine whose chord is its largest error,
    as a share of the output's largest entry.
    """
    cosines = [torch.ones(1, dtype=torch.double)]
    for name in truth.keys() - pooled_tokens(truth):
        if not np.issubdtype(truth[name].dtype, np.floating):
            continue
        rows, exact = (_token_rows(values[name], feed).double() for values in (output, truth))
        if name in ("scores", "match_logits") and truth[name].shape[1] >= _LEAST_ROW:
            scores = torch.stack([torch.from_numpy(values[name]) for values in (output, truth)])
            scores = (scores[..., 1] if name == "match_logits" else scores).double()
            scores = scores - scores.mean(-1, keepdim=True)
            cosines.append(F.cosine_similarity(scores[0], scores[1], dim=-1))
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
    changed = source.unverified(
        versions=source.versions | package_versions("onnxruntime"),
        options=dict(source.options),
        graphs=[record.model_copy(update={"build_seconds": 0.0}) for record in source.graphs],
    )
    # CPUs multiply uint8 by int8, GPUs int8 by int8.
    scheme = Scheme("int8", unsigned=not source.consumer.startswith("tensorrt"))

    with storing(out, "choose another folder"), staged(out) as scratch:
        prepare_folder(scratch, sum(record.bytes for record in source.files))
        comparison = open_comparison(source, folder, reference)
        quantise_graphs(changed, comparison, scratch, scheme, budget, progress)
        return fill_folder(
            changed,
            scratch,
            changed.graphs,
            lambda record: record.files,
            lambda content: keep_reference(content, scratch, reference),
            sidecar_files(folder, source),
        )
