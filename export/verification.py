"""Verification: an export compared with the reference of its model over the range of shapes.

Sessions run the graphs, each on inputs of the reference. A `Threshold` per dtype judges errors, cosines and ranks, and
the result goes into the manifest; a failed export keeps its files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM

from .expected import Examples, Reference, keep_results
from .graphs import DTYPES, SessionMemory, is_memory, memory_names
from .manifest import Check, GraphRecord, Manifest, RankCheck, VerificationRecord
from .request import BUDGET, DEFAULT_GRAPHS, PAIR_GRAPH, DType, GraphName
from .runtimes import Runtime
from .runtimes.onnx_runtime import OnnxRuntime
from .session.tasks import TaskSession
from .slots import Slot, empty_tensors, graph_slots, largest

if TYPE_CHECKING:
    from .runtimes import RunGraph

# A session with these limits makes one pass of what it is given.
_ONE_PASS = 1 << 30


def verify_export(
    folder: str | Path,
    model: XFM,
    examples: Examples | None = None,
    runtime: Runtime | str = "auto",
) -> Manifest:
    """Write the reference of `model` into the folder of an export, and compare the export with it."""
    folder = Path(folder)
    manifest = Manifest.load(folder, check_files=False)
    try:
        reference = keep_results(manifest, folder, model, examples)
        compare_with_reference(manifest, folder, reference, runtime)
    finally:
        manifest.save(folder)
    return manifest


def verify(
    folder: str | Path, runtime: Runtime | str = "auto", *, check_files: bool = True
) -> Manifest:
    """Compare an export with its reference and save the result in the manifest; see `Session.load` for `runtime`."""
    folder = Path(folder)
    manifest = Manifest.load(folder, check_files=check_files)
    compare_with_reference(manifest, folder, Reference.load(folder), runtime)
    manifest.save(folder)
    return manifest


def compare_with_reference(
    manifest: Manifest, folder: Path, reference: Reference, runtime: Runtime | str = "auto"
) -> None:
    """Compare the files of an export with a reference and set status and reason in its manifest."""
    started = time.perf_counter()
    try:
        comparison = Comparison(manifest, folder, reference, runtime)
        checks, ranks = comparison.run()
    except UnavailableError as error:
        manifest.verification, graphs = None, manifest.graphs_verification
        if graphs is None:
            manifest.status, manifest.reason = "unverified", str(error)
        elif graphs.differing:
            manifest.status = "failed"
            manifest.reason = f"its graphs differ from the model: {', '.join(graphs.differing)}"
        else:
            manifest.status, manifest.reason = "graphs verified", f"engine not run here: {error}"
        return
    half = "the other half of " if manifest.options.get("arithmetic") else ""
    record = VerificationRecord(
        runtime=comparison.recorder.description,
        examples=half + manifest.examples,
        seconds=round(time.perf_counter() - started, 3),
        checks=checks,
        ranks=ranks,
    )
    differing = record.differing
    manifest.verification = record
    manifest.status = "failed" if differing else "verified"
    manifest.reason = f"differs from the model: {', '.join(differing)}" if differing else ""


class Recorder(Runtime):
    """A runtime that records the shapes of every run, and the inputs of the graph `idle`, which returns zeros."""

    def __init__(self, runtime: Runtime, idle: str) -> None:
        self.runtime, self.idle = runtime, idle
        self.device, self.description = runtime.device, runtime.description
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.inputs: list[Mapping[str, Tensor]] = []

    def load(self, record: GraphRecord, path: Path) -> RunGraph:
        """See `Runtime.load`."""
        graph = None if record.name == self.idle else self.runtime.load(record, path)

        def run(
            inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]
        ) -> dict[str, Tensor]:
            shape = tuple(inputs[record.inputs[0].name].shape)
            shapes = self.shapes.setdefault(record.name, [])
            if shape not in shapes:
                shapes.append(shape)
            if graph is not None:
                return graph(inputs, slot, sizes)
            self.inputs.append(inputs)
            outputs = empty_tensors(record.outputs, sizes, self.device)
            return {name: value.zero_() for name, value in outputs.items()}

        return run


def calibration_part(reference: Reference, *, judging: bool = False) -> tuple[Tensor, Tensor]:
    """Return the images and texts, by index, that 8-bit scales are fitted on, or the others, which judge them.

    A single one is in both. The reference has the memory of image 0, which judges; text 0 is the shortest, whose
    entries are extreme.
    """
    images = torch.arange(0 if judging or reference.images == 1 else 1, reference.images, 2)
    texts = torch.arange(1 if judging and reference.texts > 1 else 0, reference.texts, 2)
    return images, texts


class Case(NamedTuple):
    """Inputs of a graph: images `[B]` and captions `[B, T]` by index."""

    images: Tensor
    texts: Tensor


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """Yield 0 to count - 1 in chunks of one size; the last chunk wraps around."""
    for start in range(0, count, size):
        yield torch.arange(start, start + size) % count


class Comparison:
    """The graphs of an export run on the inputs of a reference, and their outputs compared with its results."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        reference: Reference,
        runtime: Runtime | str = "auto",
    ) -> None:
        self.manifest, self.folder = manifest, folder
        self.reference, self.runtime = reference, runtime
        self.tensors = reference.tensors
        self.lengths = self.tensors["attention_mask"].sum(1)
        self.images, self.texts = torch.arange(reference.images), torch.arange(reference.texts)
        if manifest.options.get("arithmetic"):
            self.images, self.texts = calibration_part(reference, judging=True)
        self._session: TaskSession | None = None

    def session(self, graph: str, idle: str = "") -> TaskSession:
        """Open a session: of ONNX files with one graph, and the memory that it reads, to save memory; else with all."""
        if self._session is not None:
            return self._session
        manifest, runtime = self.manifest, self.runtime
        if manifest.kind == "onnx":
            names = {graph, "image_memory"} if graph in ("fusion", PAIR_GRAPH) else {graph}
            records = [record for record in manifest.graphs if record.name in names]
            manifest = manifest.model_copy(update={"graphs": records})
            if runtime in ("auto", OnnxRuntime.name):
                # On the CPU, where bf16 graphs are computed in fp32.
                runtime = OnnxRuntime(manifest, torch.device("cpu"), compares=True)
        session = TaskSession(self.folder, runtime, manifest=manifest)
        session.runtime = self.recorder = Recorder(session.runtime, idle)
        session.limits = replace(session.limits, budget=_ONE_PASS, pass_tokens=_ONE_PASS)
        session.warm_up()
        self.recorder.shapes.clear()
        self.recorder.inputs.clear()
        if manifest.kind != "onnx":
            self._session = session
        return session

    def inputs(self, graph: str, cases: Iterable[Case]) -> list[Mapping[str, Tensor]]:
        """Return the inputs that a session passes to a graph; the graph is not run."""
        session = self.session(graph, idle=graph)
        with torch.inference_mode():
            for case in cases:
                self.outputs(session, graph, case, self.tensors)
        return self.recorder.inputs

    def run(self) -> tuple[list[Check], list[RankCheck]]:
        """Run every graph over the range of its shapes and compare all outputs with the reference."""
        threshold, reference = threshold_of(self.manifest), self.reference
        checks: list[Check] = []
        ranks: list[RankCheck] = []
        computed = dict(self.tensors)
        # 8-bit errors accumulate from graph to graph, which the ranks of a single graph do not show.
        has_defaults = {*DEFAULT_GRAPHS} <= {*self.manifest.graph_names}
        chained = has_defaults and self.manifest.options.get("arithmetic")
        for record in self.manifest.graphs:
            graph, session = record.name, self.session(record.name)
            findings = Findings(graph)
            with torch.inference_mode():
                if graph == "decoder_step":
                    self._write_tokens(session, findings)
                elif graph == "decoder_memory":
                    self._project_states(session, findings)
                else:
                    for case in self.cases(record):
                        outputs = self.outputs(session, graph, case, self.tensors)
                        self._compare(graph, case, outputs, findings)
                        if chained:
                            # Cases end with one that covers all images and captions.
                            _replace_embeds(computed, case, outputs)
            del session  # before the next graph is loaded
            shapes = self.recorder.shapes[graph]
            checks += findings.checks(shapes, threshold, reference, self.manifest.dtype)
            ranks += _rank_check(graph, findings.scores, threshold, reference)
        if chained:
            findings = Findings("fusion")
            with torch.inference_mode():
                *_, case = self.cases(self.manifest.graph("fusion"))
                outputs = self.outputs(self.session("fusion"), "fusion", case, computed)
                self._compare("fusion", case, outputs, findings)
            ranks += _rank_check("all", findings.scores, threshold, reference)
        return checks, ranks

    def cases(self, record: GraphRecord) -> Iterator[Case]:
        """Yield cases from one image or caption to all, each image with each caption that the graph takes."""
        graph, slots, images = record.name, graph_slots(record), self.images
        if graph in ("fusion", PAIR_GRAPH) and "image_memory" not in self.manifest.graph_names:
            # The reference holds the memory of image 0.
            images = images[:1]
        longest = largest(slots, "length") if "length" in slots[0].ranges else None
        usable = self.texts[self.lengths[self.texts] <= (longest or self.lengths.max())]
        texts = len(usable)
        if graph not in ("fusion", "match"):
            count = len(images) if graph in ("vision", "image_memory") else texts
            for size in dict.fromkeys((1, min(2, count), count)):
                for rows in chunks(count, size):
                    yield Case(images[rows % len(images)], usable[rows % texts][:, None])
            return
        paired = usable[torch.arange(len(images)) % texts]
        for image, text in zip(images, paired, strict=True):
            yield Case(image[None], text[None, None])
        yield Case(images, paired[:, None])
        for image in images:
            yield Case(image[None], usable[None])
        yield Case(images, usable.expand(len(images), -1))

    def outputs(
        self, session: TaskSession, graph: str, case: Case, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Run a graph on images, captions or pairs of the tensors of a reference."""
        images, rows = case.images, case.texts.flatten()
        if graph == "vision":
            return session.in_batches("vision", {"pixels": tensors["pixels"][images]})
        if graph == "image_memory":
            return session.image_memory(tensors["image_embeds"][images]).layers
        mask = tensors["attention_mask"][rows, : int(self.lengths[rows].max())]
        ids = tensors["input_ids"][rows, : mask.shape[1]]
        if graph == "text":
            return session.text_outputs(ids, mask)
        if graph == "match":
            return {"scores": _match(session, tensors["pixels"][images], ids, mask)}
        embeds = tensors["text_embeds"][rows, : mask.shape[1]].to(session.device, session.dtype)
        if graph == PAIR_GRAPH:
            # An image and the next one.
            pairs = torch.stack([images, (images + 1) % self.reference.images], 1).flatten()
            layers = self._memory(session, pairs, tensors).layers.items()
            inputs = {name: layer.unflatten(0, (-1, 2)) for name, layer in layers}
            inputs |= {"text_embeds": embeds, "attention_mask": mask}
            return session.in_batches(PAIR_GRAPH, inputs)
        image_of = torch.arange(len(images)).repeat_interleave(case.texts.shape[1]).tolist()
        tokens = embeds[mask.bool().to(embeds.device)]
        memory = self._memory(session, images, tensors)
        return session.fuse_packed(tokens, mask.sum(1), memory, image_of)

    def _memory(
        self, session: TaskSession, images: Tensor, tensors: Mapping[str, Tensor]
    ) -> SessionMemory:
        """Return the memory of images by the export's graph, or that of image 0 in the reference."""
        if "image_memory" in session.manifest.graph_names:
            return session.image_memory(tensors["image_embeds"][images])
        layers = {}
        for name in memory_names(session.config.fusion_layers):
            layer = tensors[name].to(session.device, session.dtype)
            layers[name] = layer.expand(len(images), -1, -1, -1)
        return SessionMemory(layers)

    def _compare(
        self, graph: str, case: Case, outputs: Mapping[str, Tensor], findings: Findings
    ) -> None:
        """Compare the outputs of a graph with the reference."""
        tensors, images, rows = self.tensors, case.images, case.texts.flatten()
        if graph not in ("vision", "image_memory"):
            images = images.repeat_interleave(case.texts.shape[1])
        index: Any = {"vision": images, "text": rows}.get(graph, (images, rows))
        for name, output in outputs.items():
            value = output.float().cpu()
            if is_memory(name):
                # The reference has the memory and the fused tokens of image 0 only.
                value = value[images == 0]
                findings.add("memory", value, tensors[name].expand_as(value))
            elif name in ("text_embeds", "fused_tokens"):
                real = tensors["attention_mask"][rows, : int(self.lengths[rows].max())].bool()
                if name == "text_embeds":
                    findings.add(name, value[real], tensors[name][rows, : real.shape[1]][real])
                else:
                    first = images.repeat_interleave(real.sum(1)) == 0
                    truth = tensors[name][0, rows, : real.shape[1]][real]
                    findings.add(name, value[first], truth[first])
            else:
                findings.add(name, value, tensors[name][index])
            if name == "match_logits":
                findings.add_scores(images, rows, value[:, 1], self.reference)
            elif name == "scores":
                findings.add_scores(images, rows, value, self.reference)

    def _project_states(self, session: TaskSession, findings: Findings) -> None:
        """Compare the keys and values of decoder states."""
        tensors, states = self.tensors, self.tensors["states"]
        for size in dict.fromkeys((1, len(states))):
            for rows in chunks(len(states), size):
                # Padded positions are not read.
                real = tensors["memory_mask"][rows].bool()
                for name, output in session.states(states[rows]).layers.items():
                    value, truth = output.float().cpu(), tensors[name][rows]
                    findings.add("memory", value.transpose(1, 2)[real], truth.transpose(1, 2)[real])

    def _write_tokens(self, session: TaskSession, findings: Findings) -> None:
        """Write the same tokens from every state, each step fed with the results of the previous ones."""
        tensors = self.tensors
        count, captions = len(tensors["states"]), len(tensors["tokens"])
        names = [tensor.name for tensor in session.manifest.graph("decoder_step").inputs]
        layers = {name: tensors[name] for name in names if name.startswith("decoder_")}
        memory = SessionMemory(layers, tensors["memory_mask"] if "memory_mask" in names else None)
        for states, texts in dict.fromkeys(((1, 1), (count, captions))):
            for rows, columns in product(chunks(count, states), chunks(captions, texts)):
                tokens = tensors["tokens"][columns].expand(states, -1, -1)
                past = session.unwritten(states, texts, 0)
                for step in range(min(tokens.shape[2], session.positions)):
                    logits, present = session.next_tokens(
                        tokens[:, :, step], past, memory.select(rows)
                    )
                    at = rows[:, None], columns, step
                    findings.add("logits", logits.float().cpu(), tensors["step_logits"][at])
                    findings.add("present", present.float().cpu(), tensors["present"][at])
                    past = torch.cat([past, present[:, :, None]], 2)


def _replace_embeds(tensors: dict[str, Tensor], case: Case, outputs: Mapping[str, Tensor]) -> None:
    """Replace embeddings in the tensors of a reference by those of the export."""
    for name, rows in (("image_embeds", case.images), ("text_embeds", case.texts[:, 0])):
        if name in outputs:
            value = outputs[name].float().cpu()
            index = rows[:, None], torch.arange(value.shape[1])
            tensors[name] = tensors[name].index_put(index, value)


def _match(session: TaskSession, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return scores `[P]` of the graph `match` for the same number of captions on every image."""
    ids, mask = ids.unflatten(0, (len(pixels), -1)), mask.unflatten(0, (len(pixels), -1))
    scores = torch.empty(ids.shape[:2])
    for rows in session.pieces("match", "batch", len(pixels)):
        batch = rows.stop - rows.start
        for columns in session.pieces("match", "texts", ids.shape[1], batch=batch):
            inputs = {
                "pixels": pixels[rows],
                "input_ids": ids[rows, columns],
                "attention_mask": mask[rows, columns],
            }
            scores[rows, columns] = session.call("match", inputs)["scores"].float().cpu()
    return scores.flatten()


@dataclass(frozen=True)
class Threshold:
    """Limits of an export in some dtype: absolute, or `rounding` times the model's own error plus two ulps."""

    absolute: float
    rounding: float  # multiple of the model's own error
    cosine: float  # least, of any row of an embedding or feature
    tie: float  # scores closer than this may swap ranks; at least twice the model's own error
    ranks: float  # least share of candidates that keep their rank, ties excepted
    relative: float = 0.0  # added to `absolute`, as a share of the largest entry
    relative_tie: float = 0.0

    def allowed(self, name: str, extent: float, reference: Reference, dtype: DType) -> float:
        """Return the largest allowed error of an output with largest entry `extent`."""
        if not self.rounding:
            return self.absolute + self.relative * extent
        unit = torch.finfo(DTYPES[dtype]).eps * extent
        errors = reference.rounding.items()
        model_error = max(error for stored, error in errors if _check_name(stored) == name)
        return self.rounding * model_error + 2 * unit

    def ties(self, reference: Reference) -> float:
        """Return the largest difference of two scores that may swap ranks."""
        tie = self.tie
        if self.rounding:
            tie = max(tie, 2 * reference.rounding["scores"])
        if self.relative_tie:
            extent = float(reference.tensors["scores"].abs().max())
            tie = max(tie, self.relative_tie * extent)
        return tie


THRESHOLDS: dict[DType, Threshold] = {
    "fp32": Threshold(absolute=1e-4, rounding=0, cosine=0.99999, tie=1e-5, ranks=0.99),
    "fp16": Threshold(absolute=0, rounding=2, cosine=0.9999, tie=0, ranks=0.99),
    "bf16": Threshold(absolute=0, rounding=2, cosine=0.998, tie=0, ranks=0.99),
}


def threshold_of(manifest: Manifest) -> Threshold:
    """Return the threshold of an export.

    With 8-bit GEMMs: cosine ≥ budget, other outputs may err by √(2 - 2 cos) of the largest entry, and 95% of the
    candidates keep their rank.
    """
    if not manifest.options.get("arithmetic"):
        return THRESHOLDS[manifest.dtype]
    budget = manifest.options.get("budget", BUDGET)
    return Threshold(
        absolute=0,
        rounding=0,
        cosine=budget,
        tie=1e-5,
        ranks=0.95,
        relative=(2 - 2 * budget) ** 0.5,
        relative_tie=2 * torch.finfo(torch.bfloat16).eps,
    )


def _check_name(name: str) -> str:
    """Return the name of the check that covers a reference tensor; keys and values of all layers share one."""
    if is_memory(name) or name.startswith("decoder_"):
        return "memory"
    return "logits" if name == "step_logits" else name


# Outputs with enough entries for a cosine to be meaningful.
_DIRECTIONS = ("image_embeds", "image_feature", "text_embeds", "packed_embeds", "text_feature")
DIRECTIONS = frozenset((*_DIRECTIONS, "fused", "fused_tokens", "memory"))


@dataclass
class _Errors:
    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    extent: float = 0.0
    cosine: float = 1.0


@dataclass
class Findings:
    """The errors of a graph's outputs, accumulated over cases."""

    graph: GraphName
    outputs: dict[str, _Errors] = field(default_factory=dict)
    scores: Tensor | None = None

    def add(self, name: str, value: Tensor, truth: Tensor) -> None:
        """Add the errors of an output in one case."""
        errors = self.outputs.setdefault(name, _Errors())
        if value.shape != truth.shape:
            raise ValueError(
                f"{self.graph} returned {name} of shape {[*value.shape]}, expected {[*truth.shape]}"
            )
        if not truth.numel():
            return
        error = (value.double() - truth.double()).abs()
        # Tensor.max propagates NaN, max() may lose it.
        errors.largest = float(torch.tensor([errors.largest, float(error.max())]).max())
        errors.total += float(error.sum())
        errors.count += error.numel()
        errors.extent = max(errors.extent, float(truth.abs().max()))
        if name in DIRECTIONS:
            cosine = F.cosine_similarity(value.double(), truth.double(), dim=-1)
            errors.cosine = float(torch.tensor([errors.cosine, float(cosine.min())]).min())

    def add_scores(
        self, images: Tensor, texts: Tensor, scores: Tensor, reference: Reference
    ) -> None:
        """Store the match scores of one case, for the comparison of ranks."""
        if self.scores is None:
            self.scores = torch.full((reference.images, reference.texts), torch.nan)
        self.scores[images, texts] = scores

    def checks(
        self,
        shapes: Sequence[Sequence[int]],
        threshold: Threshold,
        reference: Reference,
        dtype: DType,
    ) -> list[Check]:
        """Judge the errors of every output over all cases."""
        checks = []
        for output, errors in self.outputs.items():
            allowed = threshold.allowed(output, errors.extent, reference, dtype)
            directed = output in DIRECTIONS
            # Comparisons with NaN are false: NaN fails.
            aligned = not directed or errors.cosine >= threshold.cosine
            checks.append(
                Check(
                    graph=self.graph,
                    output=output,
                    shapes=[[*shape] for shape in shapes],
                    max_error=_finite(errors.largest),
                    mean_error=_finite(errors.total / max(errors.count, 1)),
                    allowed=allowed,
                    cosine=_finite(errors.cosine) if directed else None,
                    least_cosine=threshold.cosine if directed else None,
                    passed=errors.largest <= allowed and aligned,
                )
            )
        return checks


def _finite(value: float) -> float | None:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return value if isfinite(value) else None


def _rank_check(
    graph: GraphName | Literal["all"],
    scores: Tensor | None,
    threshold: Threshold,
    reference: Reference,
) -> list[RankCheck]:
    """Compare the order of scores with the model's; without two candidates of an image there is no check."""
    if scores is None:
        return []
    tie = threshold.ties(reference)
    agreement = rank_agreement(scores, reference.tensors["scores"], tie)
    if agreement is None:
        return []
    candidates, agreeing, identical = agreement
    return [
        RankCheck(
            graph=graph,
            candidates=candidates,
            agreement=agreeing,
            identical=identical,
            tie=tie,
            least=threshold.ranks,
            passed=agreeing >= threshold.ranks,
        )
    ]


def rank_agreement(scores: Tensor, truth: Tensor, tie: float) -> tuple[int, float, float] | None:
    """Compare the order of scores `[I, T]` (NaN: not scored) with the model's; None without two candidates.

    Returns the number of candidates, and the shares that keep their rank, with ties counted as equal and without.
    """
    candidates = agreeing = identical = 0
    for row, expected in zip(scores.double(), truth.double(), strict=True):
        scored = ~row.isnan()
        row, expected = row[scored], expected[scored]
        if len(row) < 2:
            continue
        above = expected[:, None] - expected[None, :] > tie
        swapped = above & ~(row[:, None] > row[None, :])
        agreeing += int((~(swapped.any(0) | swapped.any(1))).sum())
        identical += int((row.argsort(descending=True) == expected.argsort(descending=True)).sum())
        candidates += len(row)
    return (candidates, agreeing / candidates, identical / candidates) if candidates else None
