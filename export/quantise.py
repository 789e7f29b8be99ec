"""8-bit exports: the largest set of 8-bit GEMMs that keeps every output row within a cosine budget of the model.

Calibration inputs come from the model, an fp32 export or its reference. All GEMMs of a graph are tried in 8 bits first;
while the outputs exceed the budget, GEMMs with the largest errors go back to the dtype of the graph. Each trial runs
the graph in ONNX Runtime on the CPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F

from xfm_fast.errors import ExportError, InputError, StorageError, UnavailableError
from xfm_fast.models.xfm import XFM

from .consumers import DType
from .expected import Examples, Reference, make_reference
from .graphs import GraphName, is_memory
from .manifest import GraphRecord, Manifest, QuantisationRecord, package_versions
from .onnx import Rewrite
from .pipeline import Progress, companions_of, fill_folder, prepare_folder, silent
from .qdq import Fitted, Scheme, fit, observe, quantise_graph, real_tokens, runner, save, sites
from .request import BUDGET, GRAPHS, Quantisation
from .runtimes.onnx_sessions import widen
from .session import Session
from .slots import graph_slots
from .verification import (
    DIRECTIONS,
    THRESHOLDS,
    Case,
    Runner,
    case_inputs,
    chunks,
    compare_with_reference,
    default_runner,
    keep_reference,
)

QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)

_TEXTS_AT_ONCE = 16
_TEXTS_WITH_AN_IMAGE = 8
_TRIED = 6
_TIMED = 3
# Fewer scores have no meaningful cosine.
_FEWEST_RANKED = 4

# Verification uses other images, so calibration spends only part of the budget.
_SPENT = 0.8


def check_quantisation(
    kind: str, dtype: DType, budget: float = BUDGET, graphs: Sequence[GraphName] = ()
) -> Quantisation:
    """Check kind, dtype, budget and graphs before one is exported."""
    if kind not in QUANTISATIONS:
        raise UnavailableError(f"quantisation {kind!r} is unknown; choose from {', '.join(QUANTISATIONS)}")
    if others := [name for name in graphs if name not in GRAPHS]:
        raise UnavailableError(
            f"graph {others[0]!r} has no form in 8 bits; products are chosen for {', '.join(GRAPHS)}: export these, or "
            "export without 8 bits"
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise UnavailableError(f"{kind} needs onnxruntime, which is not installed; pip install 'xfm-fast[export]'")
    if not 0 < budget < 1:
        raise InputError(f"--budget {budget} is no cosine to be kept; give a number between 0 and 1, such as {BUDGET}")
    most = THRESHOLDS[dtype].cosine
    if budget > most:
        raise InputError(
            f"--budget {budget} cannot be met: {dtype} itself is only held to a cosine of {most}; give at most "
            "that, or export without 8 bits"
        )
    return kind


@dataclass(frozen=True)
class Calibration:
    """Inputs of the graphs of an export: results of the model on examples, and a runner that computes memories."""

    manifest: Manifest
    reference: Reference
    runner: Runner
    origin: str

    @classmethod
    def of_model(cls, model: XFM, examples: Examples, folder: Path, manifest: Manifest) -> Self:
        """Calibration with embeddings computed by the model, for its ONNX export in `folder`."""
        images, texts = _needed(manifest)
        graphs: list[GraphName] = []
        if images:
            graphs.append("image_memory")
        if texts:
            graphs.append("text")
        reference = make_reference(model, examples, graphs, "fp32")
        return cls(manifest, reference, default_runner(folder, manifest), examples.origin)

    @classmethod
    def of_export(cls, folder: Path, manifest: Manifest, examples: Examples) -> Self:
        """Calibration with embeddings computed by an fp32 export; raises `ExportError` where it lacks a graph."""
        images, texts = _needed(manifest)
        wanted = {"vision"} if images else set()
        wanted |= {"text", "image_memory"} if texts else set()
        if lacking := sorted(wanted - {*manifest.graph_names}):
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
        return cls(manifest, Reference(tensors, {}), session, examples.origin)

    @classmethod
    def of_reference(cls, folder: Path, manifest: Manifest, reference: Reference) -> Self:
        """Calibration with the examples of the verification."""
        origin = f"{manifest.examples}, which it is compared on too"
        return cls(manifest, reference, default_runner(folder, manifest), origin)

    def inputs(self, record: GraphRecord) -> Iterator[dict[str, np.ndarray]]:
        """Inputs of a graph by name, an image with 8 captions (or 16 captions) each, in fp32 and int64."""
        reference, wide = self.reference, self.manifest.model_copy(update={"dtype": "fp32"})
        lengths = reference.tensors["attention_mask"].sum(1)
        fixed = {axis: sizes.least for axis, sizes in graph_slots(record)[0].ranges.items() if sizes.single}
        if record.name == "text":
            size = fixed.get("batch", min(_TEXTS_AT_ONCE, reference.texts))
            pairs = [(torch.zeros_like(rows), rows[:, None]) for rows in chunks(reference.texts, size)]
        else:
            images, texts = torch.arange(fixed.get("batch", 1)), torch.arange(fixed.get("texts", _TEXTS_WITH_AN_IMAGE))
            pairs = [
                ((images + n) % reference.images, ((texts + n * len(texts)) % reference.texts).expand(len(images), -1))
                for n in range(reference.images)
            ]
        for images, texts in pairs:
            case = Case(images, texts, fixed.get("length", int(lengths[texts].max())))
            tensors = case_inputs(record, case, wide, reference, self.runner)
            yield {
                name: (value.float() if value.is_floating_point() else value.long()).contiguous().numpy()
                for name, value in tensors.items()
            }


def _needed(manifest: Manifest) -> tuple[bool, bool]:
    """Whether graphs of an export take image embeddings or memories, and text embeddings."""
    return not {"image_memory", "fusion"}.isdisjoint(manifest.graph_names), "fusion" in manifest.graph_names


def make_rewrite(
    calibration: Calibration,
    kind: Quantisation,
    dtype: DType,
    *,
    budget: float = BUDGET,
    unsigned: bool = False,
    progress: Progress = silent,
) -> Rewrite:
    """A rewrite of graphs to 8-bit GEMMs within a budget, which records the choice and its cost."""
    check_quantisation(kind, dtype, budget)
    scheme = Scheme(kind, unsigned=unsigned and kind == "int8")

    def rewrite(record: GraphRecord, path: Path) -> None:
        with _naming(record, kind):
            progress(f"choosing products of {record.name}")
            record.quantisation = _Search(path, [*calibration.inputs(record)], scheme, budget).run()

    return rewrite


@contextmanager
def _naming(record: GraphRecord, kind: Quantisation) -> Iterator[None]:
    """Raise errors of ONNX Runtime as `ExportError` with the graph's name."""
    try:
        yield
    except (ExportError, OSError):
        raise
    except Exception as error:  # of ONNX Runtime, which has no errors of its own
        raise ExportError(
            f"graph {record.name!r} could not be quantised to {kind} ({' '.join(str(error).split())[:300]}); "
            "export it without 8 bits"
        ) from error


class _Search:
    """The choice of the GEMMs of one graph."""

    def __init__(self, path: Path, feeds: Sequence[Mapping[str, np.ndarray]], scheme: Scheme, budget: float) -> None:
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
            products=sum(len(fitted.site.products) for fitted in self.order),
            smoothed=sum(fitted.smoothing is not None for fitted in chosen),
            kept=[name for fitted in self.order[count:] for name in fitted.site.layers],
            wide_milliseconds=milliseconds[0],
            milliseconds=milliseconds[1],
        )

    def _most(self) -> tuple[int, float]:
        """The number of sites within the budget, in order of their error, and the resulting cosine."""
        allowed = 1 - _SPENT * (1 - self.budget)
        low, best = 0, 1.0
        high = len(self.order)
        # All, then one: a budget that fails needs two trials.
        for count in (high, 1):
            if (cosine := self._cosine(self.order[:count])) >= allowed:
                if count == high:
                    return count, cosine
                low, best = count, cosine
            else:
                high = count
        while high - low > 1:
            count = (low + high) // 2
            if (cosine := self._cosine(self.order[:count])) >= allowed:
                low, best = count, cosine
            else:
                high = count
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


def least_cosine(
    found: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], feed: Mapping[str, np.ndarray]
) -> float:
    """The least cosine of a row of any output: of real tokens, or of the scores of an image's captions."""
    cosines, real = [1.0], real_tokens(feed)
    for name in truth:
        both = [torch.from_numpy(values[name]).double() for values in (found, truth)]
        if name in DIRECTIONS or is_memory(name):
            rows = [values.flatten(0, -2) for values in both]
            if real is not None and len(real) == len(rows[0]):
                rows = [values[real] for values in rows]
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
    source.require_files(Path(folder))
    arithmetic = source.options.get("arithmetic") or source.dtype
    if source.kind != "onnx" or arithmetic != "fp32":
        raise ExportError(
            f"{folder} holds an export to {source.kind} in {arithmetic}; int8 is made of fp32 ONNX files: xfm-fast "
            "export onnx --dtype fp32"
        )
    reference = Reference.load(folder)
    if examples is None:
        calibration = Calibration.of_reference(folder, source, reference)
    else:
        calibration = Calibration.of_export(folder, source, examples)
    # Room for a copy of the old graphs and for the new ones.
    prepare_folder(out, 2 * sum(record.bytes for record in source.files))
    # CPUs multiply uint8 by int8, GPUs int8 by int8.
    unsigned = source.consumer in ("onnxruntime", "openvino")
    rewrite = make_rewrite(calibration, "int8", "fp32", budget=budget, unsigned=unsigned, progress=progress)
    result = source.model_copy(
        update={
            "versions": source.versions | package_versions("onnxruntime"),
            "options": source.options | eight_bit_options("int8", budget, calibration),
            "status": "unverified",
            "reason": "it was not compared with the model",
            "verification": None,
        }
    )

    def compare(content: Manifest) -> None:
        progress("comparing with the model")
        keep_reference(content, out, reference)
        compare_with_reference(content, out, reference)

    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".int8-") as scratch:
            made = Path(scratch)
            records = []
            for record in source.graphs:
                started = time.perf_counter()
                for name in record.files:
                    shutil.copyfile(folder / name, made / name)
                changed = record.model_copy()
                rewrite(changed, made / record.file)
                changed.build_seconds = time.perf_counter() - started
                records.append(changed)
            require_eight_bits(records, budget)

            def write(record: GraphRecord) -> list[str]:
                names = [name for name in record.files if (made / name).exists()]
                for name in names:
                    (made / name).replace(out / name)
                return names

            return fill_folder(result, out, records, write, compare, companions_of(folder, source))
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror or error}); choose another folder") from error


def eight_bit_options(kind: Quantisation, budget: float, calibration: Calibration) -> dict[str, Any]:
    """Manifest options of an 8-bit export."""
    return {"arithmetic": kind, "budget": budget, "calibration": calibration.origin}


def require_eight_bits(graphs: Sequence[GraphRecord], budget: float) -> None:
    """Raise `ExportError` where the budget leaves no GEMM in 8 bits."""
    made = [record.quantisation for record in graphs if record.quantisation is not None]
    if made and all(len(record.kept) == record.products for record in made):
        raise ExportError(
            f"--budget {budget} cannot be met: no product of {', '.join(record.name for record in graphs)} can be in "
            f"{made[0].kind}; give a smaller one, or serve the export without 8 bits"
        )
