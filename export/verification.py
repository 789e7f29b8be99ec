"""Verification: an export compared with the reference of its model over the range of shapes.

Sessions run the graphs, each on inputs of the reference. A `Threshold` per dtype judges errors, cosines and ranks, and
the result goes into the manifest; a failed export keeps its files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM

from .expected import Examples, Reference, keep_results
from .findings import (
    Comparison,
    Feed,
    Findings,
    calibration_part,
    chunks,
    rank_check,
    threshold_of,
)
from .graphs import SessionMemory, is_memory, memory_names
from .manifest import Check, GraphRecord, Manifest, RankCheck, VerificationRecord
from .request import DEFAULT_GRAPHS, PAIR_GRAPH
from .runtimes import Runtime
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
        comparison = open_comparison(manifest, folder, reference, runtime)
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
        runtime=comparison.description,
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


class Case(NamedTuple):
    """Inputs of a graph: images `[B]` and captions `[B, T]` by index."""

    images: Tensor
    texts: Tensor


def open_comparison(
    manifest: Manifest, folder: Path, reference: Reference, runtime: Runtime | str = "auto"
) -> Comparison:
    """Open the comparison of an export with its model's results."""
    if manifest.use is None:
        return XFMComparison(manifest, folder, reference, runtime)
    from .library import LibraryComparison

    return LibraryComparison(manifest, folder, reference, runtime)


class XFMComparison(Comparison):
    """An export of an X-FM compared."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        manifest, reference = self.manifest, self.reference
        self.lengths = self.tensors["attention_mask"].sum(1)
        self.images, self.texts = torch.arange(reference.images), torch.arange(reference.texts)
        if manifest.options.get("arithmetic"):
            self.images, self.texts = calibration_part(reference, judging=True)
        self._session: TaskSession | None = None

    def session(self, graph: str, idle: str = "") -> TaskSession:
        """Open a session: of ONNX files with one graph, and the memory that it reads, to save memory; else with all."""
        if self._session is not None:
            return self._session
        manifest = self.manifest
        if manifest.kind == "onnx":
            names = {graph, "image_memory"} if graph in ("fusion", PAIR_GRAPH) else {graph}
            records = [record for record in manifest.graphs if record.name in names]
            manifest = manifest.model_copy(update={"graphs": records})
        session = TaskSession(self.folder, self.open_runtime(manifest), manifest=manifest)
        session.runtime = self.recorder = Recorder(session.runtime, idle)
        self.description = self.recorder.description
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

    def feeds(self, record: GraphRecord, *, judging: bool = False) -> list[Feed]:
        """Return inputs as a session passes them to a graph, each image with its share of the texts."""
        images, texts = calibration_part(self.reference, judging=judging)
        ranges = graph_slots(record)[0].ranges
        fixed = {axis: sizes.least for axis, sizes in ranges.items() if sizes.single}
        batch = fixed.get("batch", 1)
        count = fixed.get("texts", math.ceil(len(texts) / len(images)))
        cases = []
        for n in range(len(images)):
            rows = (torch.arange(batch) + n) % len(images)
            columns = (torch.arange(count) + n * count) % len(texts)
            cases.append(Case(images[rows], texts[columns].expand(batch, -1)))
        feeds = []
        for inputs in self.inputs(record.name, cases):
            wide = {
                name: value.float() if value.is_floating_point() else value
                for name, value in inputs.items()
            }
            feeds.append({name: value.numpy() for name, value in wide.items()})
        return feeds

    def run(self) -> tuple[list[Check], list[RankCheck]]:
        """See `Comparison.run`."""
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
            ranks += rank_check(graph, findings.scores, threshold, reference)
        if chained:
            findings = Findings("fusion")
            with torch.inference_mode():
                *_, case = self.cases(self.manifest.graph("fusion"))
                outputs = self.outputs(self.session("fusion"), "fusion", case, computed)
                self._compare("fusion", case, outputs, findings)
            ranks += rank_check("all", findings.scores, threshold, reference)
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
