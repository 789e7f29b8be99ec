"""Verification: an export compared with the reference of its model over the range of shapes.

Sessions run the graphs, each on the reference's inputs. Errors, cosines and ranks are judged by a `Threshold` per
dtype, and the result goes into the manifest; a failed export keeps its files.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM

from .expected import (
    DECODER_GRAPHS,
    LONGEST,
    REFERENCE_FILE,
    Examples,
    Reference,
    generated_examples,
    make_reference,
)
from .graphs import DTYPES, is_memory, memory_names
from .manifest import Check, GraphRecord, Manifest, RankCheck, VerificationRecord, record_files
from .request import BUDGET, DEFAULT_GRAPHS, PAIR_GRAPH, DType, GraphName
from .runtimes import LoadedGraph, RunFunction, Runtime
from .runtimes.onnx_runtime import OnnxRuntime
from .session import SessionMemory
from .session.tasks import TaskSession
from .slots import Slot, empty_tensors, graph_slots, largest

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
        compare_with_reference(
            manifest, folder, keep_results(manifest, folder, model, examples), runtime
        )
    finally:
        manifest.save(folder)
    return manifest


def keep_results(
    manifest: Manifest, folder: Path, model: XFM, examples: Examples | None = None
) -> Reference:
    """Write the reference of the model into the folder of an export."""
    longest = manifest.fixed.get("length", LONGEST)
    examples = generated_examples(model.config, longest=longest) if examples is None else examples
    reference = make_reference(
        model, examples, manifest.graph_names, manifest.dtype, all_tokens=manifest.all_tokens
    )
    manifest.examples = examples.origin
    keep_reference(manifest, folder, reference)
    return reference


def keep_reference(manifest: Manifest, folder: Path, reference: Reference) -> None:
    """Write the reference into the folder of an export and its list of files."""
    reference.save(folder)
    others = [record for record in manifest.files if record.name != REFERENCE_FILE]
    manifest.files = [*others, *record_files(folder, [REFERENCE_FILE])]


def verify(
    folder: str | Path, runtime: Runtime | str = "auto", *, check_files: bool = True
) -> Manifest:
    """Compare an export with its reference and save the result in the manifest; packages run with `aoti` only."""
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
            differing = ", ".join(graphs.differing)
            manifest.status, manifest.reason = (
                "failed",
                f"its graphs differ from the model: {differing}",
            )
        else:
            manifest.status, manifest.reason = "graphs verified", f"engine not run here: {error}"
        return
    record = VerificationRecord(
        runtime=comparison.description,
        examples=("the other half of " if manifest.options.get("arithmetic") else "")
        + manifest.examples,
        seconds=round(time.perf_counter() - started, 3),
        checks=checks,
        ranks=ranks,
    )
    bad = record.differing
    manifest.verification = record
    manifest.status = "failed" if bad else "verified"
    manifest.reason = f"differs from the model: {', '.join(bad)}" if bad else ""


class Recorder(Runtime):
    """A runtime that records the shapes of every run, and the inputs of the graph `idle`, which returns zeros."""

    def __init__(self, runtime: Runtime, idle: str) -> None:
        self.runtime, self.idle, self.device, self.description = (
            runtime,
            idle,
            runtime.device,
            runtime.description,
        )
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.inputs: list[Mapping[str, Tensor]] = []

    def load(self, record: GraphRecord, path: Path) -> LoadedGraph:
        """See `Runtime.load`."""
        graph = None if record.name == self.idle else self.runtime.load(record, path)

        def run(
            inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]
        ) -> dict[str, Tensor]:
            shape, shapes = (
                tuple(inputs[record.inputs[0].name].shape),
                self.shapes.setdefault(record.name, []),
            )
            if shape not in shapes:
                shapes.append(shape)
            if graph is not None:
                return graph.run(inputs, slot, sizes)
            self.inputs.append(inputs)
            outputs = empty_tensors(record.outputs, sizes, self.device)
            return {name: value.zero_() for name, value in outputs.items()}

        return RunFunction(run)


def calibration_part(reference: Reference, *, rest: bool = False) -> tuple[Tensor, Tensor]:
    """Return the images and texts, by index, that 8-bit scales are fitted on, or the rest, which judges them.

    A single one is in both. The reference has the memory of image 0, which judges; text 0 is the shortest, whose
    entries are extreme.
    """
    images = torch.arange(0 if rest or reference.images == 1 else 1, reference.images, 2)
    texts = torch.arange(1 if rest and reference.texts > 1 else 0, reference.texts, 2)
    return images, texts


class Case(NamedTuple):
    """Inputs of a graph: images `[B]` and captions `[B, T]` by number."""

    images: Tensor
    texts: Tensor


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """0 to count - 1 in chunks of one size; the last chunk wraps around."""
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
        self.manifest, self.folder, self.reference, self.runtime = (
            manifest,
            folder,
            reference,
            runtime,
        )
        self.known = reference.tensors
        self.lengths = self.known["attention_mask"].sum(1)
        self.images, self.texts = torch.arange(reference.images), torch.arange(reference.texts)
        if manifest.options.get("arithmetic"):
            self.images, self.texts = calibration_part(reference, rest=True)
        self.description = ""
        self._whole: TaskSession | None = None

    def session(self, graph: str, idle: str = "") -> TaskSession:
        """A session with one graph of ONNX files, and `image_memory`, to limit memory; else with all graphs."""
        if self._whole is not None:
            return self._whole
        part = self.manifest
        if self.manifest.kind == "onnx":
            loaded = {graph, "image_memory"} if graph in ("fusion", PAIR_GRAPH) else {graph}
            part = part.model_copy(
                update={"graphs": [each for each in part.graphs if each.name in loaded]}
            )
        runtime = self.runtime
        if part.kind == "onnx" and runtime in ("auto", OnnxRuntime.name):
            # On the CPU, where bf16 graphs are computed in fp32.
            runtime = OnnxRuntime(part, torch.device("cpu"), compares=True)
        session = TaskSession(self.folder, runtime, manifest=part)
        session.runtime = self.recorder = Recorder(session.runtime, idle)
        session.limits = replace(session.limits, budget=_ONE_PASS, pass_tokens=_ONE_PASS)
        session.warm_up()
        self.recorder.shapes.clear()
        self.recorder.inputs.clear()
        self.description = session.description
        self._whole = None if part.kind == "onnx" else session
        return session

    def inputs(self, graph: str, cases: Iterable[Case]) -> list[Mapping[str, Tensor]]:
        """The inputs that a session gives to a graph, which is not run."""
        session = self.session(graph, idle=graph)
        with torch.inference_mode():
            for case in cases:
                self.outputs(session, graph, case, self.known)
        return self.recorder.inputs

    def run(self) -> tuple[list[Check], list[RankCheck]]:
        """Run every graph over the range of its shapes and compare all outputs with the reference."""
        threshold, reference, dtype = (
            threshold_of(self.manifest),
            self.reference,
            self.manifest.dtype,
        )
        checks: list[Check] = []
        ranks: list[RankCheck] = []
        computed = dict(self.known)
        # 8-bit errors accumulate from graph to graph, which the ranks of a single graph do not show.
        chained = self.manifest.options.get("arithmetic") and {*DEFAULT_GRAPHS} <= {
            *self.manifest.graph_names
        }
        for record in self.manifest.graphs:
            session, found = self.session(record.name), Findings(record.name)
            with torch.inference_mode():
                if record.name == "decoder_step":
                    self._write_tokens(session, found)
                elif record.name == "decoder_memory":
                    self._project_states(session, found)
                for case in () if record.name in DECODER_GRAPHS else self.cases(record):
                    outputs = self.outputs(session, record.name, case, self.known)
                    self._compare(record.name, case, outputs, found)
                    # Cases end with one that covers all images and captions.
                    for name in {"image_embeds", "text_embeds"} & {*outputs} if chained else ():
                        rows = case.images if name == "image_embeds" else case.texts[:, 0]
                        value = outputs[name].float().cpu()
                        computed[name] = computed[name].index_put(
                            (rows[:, None], torch.arange(value.shape[1])), value
                        )
            del session  # before the next graph is loaded
            shapes = self.recorder.shapes[record.name]
            checks += [
                found.check(output, shapes, threshold, reference, dtype) for output in found.outputs
            ]
            ranks += _rank_check(record.name, found.scores, threshold, reference)
        if chained:
            record, found = self.manifest.graph("fusion"), Findings("fusion")
            with torch.inference_mode():
                *_, case = self.cases(record)
                self._compare(
                    "fusion",
                    case,
                    self.outputs(self.session("fusion"), "fusion", case, computed),
                    found,
                )
            ranks += _rank_check("all", found.scores, threshold, reference)
        return checks, ranks

    def cases(self, record: GraphRecord) -> Iterator[Case]:
        """From one image or caption to all, each image with each caption, of captions that the graph takes."""
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
        self, session: TaskSession, graph: str, case: Case, known: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Outputs of a graph for images, captions or pairs."""
        images, rows = case.images, case.texts.flatten()
        if graph == "vision":
            return session.in_batches("vision", {"pixels": known["pixels"][images]})
        if graph == "image_memory":
            return session.image_memory(known["image_embeds"][images]).layers
        mask = known["attention_mask"][rows, : int(self.lengths[rows].max())]
        ids = known["input_ids"][rows, : mask.shape[1]]
        if graph == "text":
            return session.text_outputs(ids, mask)
        if graph == "match":
            return {"scores": _match(session, known["pixels"][images], ids, mask)}
        embeds = known["text_embeds"][rows, : mask.shape[1]].to(session.device, session.dtype)
        if graph == PAIR_GRAPH:
            # An image and the next one.
            pairs = torch.stack([images, (images + 1) % self.reference.images], 1).flatten()
            layers = self._memory(session, pairs, known).layers.items()
            memory = {name: layer.unflatten(0, (-1, 2)) for name, layer in layers}
            return session.in_batches(
                PAIR_GRAPH, {"text_embeds": embeds, "attention_mask": mask, **memory}
            )
        image_of = torch.arange(len(images)).repeat_interleave(case.texts.shape[1]).tolist()
        tokens, memory = embeds[mask.bool().to(embeds.device)], self._memory(session, images, known)
        return session.fuse_packed(tokens, mask.sum(1), memory, image_of)

    def _memory(
        self, session: TaskSession, images: Tensor, known: Mapping[str, Tensor]
    ) -> SessionMemory:
        if "image_memory" in session.manifest.graph_names:
            return session.image_memory(known["image_embeds"][images])
        layers = {name: known[name] for name in memory_names(session.config.fusion_layers)}
        return SessionMemory(
            {name: layer.to(session.device, session.dtype).expand(len(images), -1, -1, -1)
             for name, layer in layers.items()}
        )  # fmt: skip

    def _compare(
        self, graph: str, case: Case, outputs: Mapping[str, Tensor], found: Findings
    ) -> None:
        known, rows = self.known, case.texts.flatten()
        images = case.images if graph in ("vision", "image_memory") else case.images.repeat_interleave(
            case.texts.shape[1]
        )  # fmt: skip
        index: Any = {"vision": images, "text": rows}.get(graph, (images, rows))
        for name, output in outputs.items():
            value = output.float().cpu()
            if is_memory(name):
                mine = value[images == 0]
                found.add("memory", mine, known[name].expand_as(mine))
            elif name in ("text_embeds", "fused_tokens"):
                real = known["attention_mask"][rows, : int(self.lengths[rows].max())].bool()
                truth = (known[name] if name == "text_embeds" else known[name][0])[
                    rows, : real.shape[1]
                ][real]
                # The reference of fused tokens covers image 0 only.
                ours = (
                    images.repeat_interleave(real.sum(1)) == 0
                    if name == "fused_tokens"
                    else slice(None)
                )
                found.add(
                    name, (value[real] if name == "text_embeds" else value)[ours], truth[ours]
                )
            else:
                found.add(name, value, known[name][index])
            if name in ("match_logits", "scores"):
                found.add_scores(
                    images, rows, value[:, 1] if name == "match_logits" else value, self.reference
                )

    def _project_states(self, session: TaskSession, found: Findings) -> None:
        known = self.known
        for size in dict.fromkeys((1, len(known["states"]))):
            for rows in chunks(len(known["states"]), size):
                # Padded positions are not read.
                real = known["memory_mask"][rows].bool()
                for name, value in session.states(known["states"][rows]).layers.items():
                    both = value.float().cpu(), known[name][rows]
                    found.add("memory", *(each.transpose(1, 2)[real] for each in both))

    def _write_tokens(self, session: TaskSession, found: Findings) -> None:
        """The same tokens from every state, each step fed with the results of the previous ones."""
        known = self.known
        names = [each.name for each in session.manifest.graph("decoder_step").inputs]
        layers = {name: known[name] for name in names if name.startswith("decoder_")}
        memory = SessionMemory(layers, known["memory_mask"] if "memory_mask" in names else None)
        for states, texts in dict.fromkeys(((1, 1), (len(known["states"]), len(known["tokens"])))):
            for rows in chunks(len(known["states"]), states):
                for chosen in chunks(len(known["tokens"]), texts):
                    tokens = known["tokens"][chosen].expand(states, -1, -1)
                    past = session.unwritten(states, texts, 0)
                    for step in range(min(tokens.shape[2], session.positions)):
                        logits, present = session.next_tokens(
                            tokens[:, :, step], past, memory.select(rows)
                        )
                        at = rows[:, None], chosen, step
                        found.add("logits", logits.float().cpu(), known["step_logits"][at])
                        found.add("present", present.float().cpu(), known["present"][at])
                        past = torch.cat([past, present[:, :, None]], 2)


def _match(session: TaskSession, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Scores `[P]` of the graph `match` for the same number of captions on every image."""
    texts = len(ids) // len(pixels)
    scores = torch.empty(len(pixels), texts)
    for rows in session.pieces("match", "batch", len(pixels)):
        batch = rows.stop - rows.start
        for columns in session.pieces("match", "texts", texts, batch=batch):
            part = {
                "pixels": pixels[rows],
                "input_ids": ids.unflatten(0, (-1, texts))[rows, columns],
                "attention_mask": mask.unflatten(0, (-1, texts))[rows, columns],
            }
            scores[rows, columns] = session.call("match", part)["scores"].float().cpu()
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
        """The largest error of an output with largest entry `extent`."""
        if not self.rounding:
            return self.absolute + self.relative * extent
        unit = torch.finfo(DTYPES[dtype]).eps * extent
        own = max(
            error for stored, error in reference.rounding.items() if _check_name(stored) == name
        )
        return self.rounding * own + 2 * unit

    def ties(self, reference: Reference) -> float:
        """The largest difference of two scores that may swap ranks."""
        extent = float(reference.tensors["scores"].abs().max()) if self.relative_tie else 0.0
        return max(
            self.tie,
            2 * reference.rounding["scores"] if self.rounding else 0.0,
            self.relative_tie * extent,
        )


THRESHOLDS: dict[DType, Threshold] = {
    "fp32": Threshold(absolute=1e-4, rounding=0, cosine=0.99999, tie=1e-5, ranks=0.99),
    "fp16": Threshold(absolute=0, rounding=2, cosine=0.9999, tie=0, ranks=0.99),
    "bf16": Threshold(absolute=0, rounding=2, cosine=0.998, tie=0, ranks=0.99),
}


def threshold_of(manifest: Manifest) -> Threshold:
    """The threshold of an export.

    With 8-bit GEMMs: cosine ≥ budget, other outputs may err by √(2 - 2 cos) of the largest entry, and 95% of the
    candidates keep their rank.
    """
    if not manifest.options.get("arithmetic"):
        return THRESHOLDS[manifest.dtype]
    budget = manifest.options.get("budget", BUDGET)
    turned, unit = (2 - 2 * budget) ** 0.5, torch.finfo(torch.bfloat16).eps
    return Threshold(
        absolute=0,
        rounding=0,
        cosine=budget,
        tie=1e-5,
        ranks=0.95,
        relative=turned,
        relative_tie=2 * unit,
    )


def _check_name(name: str) -> str:
    """The name of the check that covers a reference tensor; keys and values of all layers share one."""
    if is_memory(name) or name.startswith("decoder_"):
        return "memory"
    return "logits" if name == "step_logits" else name


# Outputs with enough entries for a cosine to be meaningful.
DIRECTIONS = frozenset(
    (
        *("image_embeds", "image_feature", "text_embeds", "packed_embeds", "text_feature"),
        *("fused", "fused_tokens", "memory"),
    )
)


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
        if self.scores is None:
            self.scores = torch.full((reference.images, reference.texts), torch.nan)
        self.scores[images, texts] = scores

    def check(
        self,
        output: str,
        shapes: Sequence[Sequence[int]],
        threshold: Threshold,
        reference: Reference,
        dtype: DType,
    ) -> Check:
        errors = self.outputs[output]
        allowed = threshold.allowed(output, errors.extent, reference, dtype)
        directed = output in DIRECTIONS
        # Comparisons with NaN are false: NaN fails.
        passed = errors.largest <= allowed and (not directed or errors.cosine >= threshold.cosine)
        return Check(
            graph=self.graph,
            output=output,
            shapes=[[*shape] for shape in shapes],
            max_error=_finite(errors.largest),
            mean_error=_finite(errors.total / max(errors.count, 1)),
            allowed=allowed,
            cosine=_finite(errors.cosine) if directed else None,
            least_cosine=threshold.cosine if directed else None,
            passed=passed,
        )


def _finite(value: float) -> float | None:
    """JSON has no NaN; null stands for it."""
    return value if value == value and abs(value) != float("inf") else None


def _rank_check(
    graph: GraphName | Literal["all"],
    scores: Tensor | None,
    threshold: Threshold,
    reference: Reference,
) -> list[RankCheck]:
    """The order of scores compared with the model's; none without two candidates of an image."""
    if scores is None:
        return []
    tie = threshold.ties(reference)
    agreement = rank_agreement(scores, reference.tensors["scores"], tie)
    if agreement is None:
        return []
    candidates, agreeing, identical = agreement
    passed = agreeing >= threshold.ranks
    return [
        RankCheck(
            graph=graph, candidates=candidates, agreement=agreeing, identical=identical, tie=tie,
            least=threshold.ranks, passed=passed,
        )
    ]  # fmt: skip


def rank_agreement(found: Tensor, truth: Tensor, tie: float) -> tuple[int, float, float] | None:
    """Compare the order of scores `[I, T]` (NaN: not scored) with the model's; None without two candidates.

    Returns the number of candidates, and the shares that keep their rank, with ties counted as equal and without.
    """
    candidates = agreeing = identical = 0
    for mine, theirs in zip(found.double(), truth.double(), strict=True):
        scored = ~mine.isnan()
        mine, theirs = mine[scored], theirs[scored]
        if len(mine) < 2:
            continue
        above = theirs[:, None] - theirs[None, :] > tie
        swapped = above & ~(mine[:, None] > mine[None, :])
        agreeing += int((~(swapped.any(0) | swapped.any(1))).sum())
        identical += int((mine.argsort(descending=True) == theirs.argsort(descending=True)).sum())
        candidates += len(mine)
    return (candidates, agreeing / candidates, identical / candidates) if candidates else None
