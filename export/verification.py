"""Verification: an export compared with the reference of its model over the range of shapes.

Any object with `run` can execute the export. Errors, cosines and ranks are judged by a `Threshold` per dtype, and the
result goes into the manifest; a failed export keeps its files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.models.xfm import XFM

from .expected import DECODER_GRAPHS, LONGEST, REFERENCE_FILE, Examples, Reference, generated_examples, make_reference
from .graphs import DTYPES, is_memory
from .manifest import Check, GraphRecord, Manifest, RankCheck, VerificationRecord, record_files
from .request import BUDGET, DType, GraphName
from .slots import Layout, graph_slots, largest, pack_rows


class Runner(Protocol):
    """A program that runs the graphs of an export."""

    @property
    def description(self) -> str:
        """Library, version and device, for the manifest."""
        ...

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One graph: inputs by name in its dtypes, outputs by name."""
        ...


def verify_export(
    folder: str | Path, model: XFM, examples: Examples | None = None, runner: Runner | str = "auto"
) -> Manifest:
    """Write the reference of `model` into the folder of an export, and compare the export with it."""
    folder = Path(folder)
    manifest = Manifest.load(folder, check_files=False)
    try:
        compare_with_reference(manifest, folder, keep_results(manifest, folder, model, examples), runner)
    finally:
        manifest.save(folder)
    return manifest


def keep_results(manifest: Manifest, folder: Path, model: XFM, examples: Examples | None = None) -> Reference:
    """Write the reference of the model into the folder of an export."""
    longest = manifest.fixed.get("length", LONGEST)
    examples = generated_examples(model.config, longest=longest) if examples is None else examples
    reference = make_reference(model, examples, manifest.graph_names, manifest.dtype, all_tokens=manifest.all_tokens)
    manifest.examples = examples.origin
    keep_reference(manifest, folder, reference)
    return reference


def keep_reference(manifest: Manifest, folder: Path, reference: Reference) -> None:
    """Write the reference into the folder of an export and its list of files."""
    reference.save(folder)
    others = [record for record in manifest.files if record.name != REFERENCE_FILE]
    manifest.files = [*others, *record_files(folder, [REFERENCE_FILE])]


def verify(folder: str | Path, runner: Runner | str = "auto", *, check_files: bool = True) -> Manifest:
    """Compare an export with its reference and save the result in the manifest; packages run with `aoti` only."""
    folder = Path(folder)
    manifest = Manifest.load(folder, check_files=check_files)
    compare_with_reference(manifest, folder, Reference.load(folder), runner)
    manifest.save(folder)
    return manifest


def compare_with_reference(
    manifest: Manifest, folder: Path, reference: Reference, runner: Runner | str = "auto"
) -> None:
    """Compare the files of an export with a reference and set status and reason in its manifest."""
    started = time.perf_counter()
    try:
        runner = default_runner(folder, manifest, runner) if isinstance(runner, str) else runner
        checks, ranks = Comparison(manifest, reference, runner).run()
    except UnavailableError as error:
        manifest.verification, graphs = None, manifest.graphs_verification
        if graphs is None:
            manifest.status, manifest.reason = "unverified", str(error)
        elif graphs.differing:
            differing = ", ".join(graphs.differing)
            manifest.status, manifest.reason = "failed", f"its graphs differ from the model: {differing}"
        else:
            manifest.status, manifest.reason = "graphs verified", f"engine not run here: {error}"
        return
    record = VerificationRecord(
        runtime=runner.description,
        examples=manifest.examples,
        seconds=round(time.perf_counter() - started, 3),
        checks=checks,
        ranks=ranks,
    )
    bad = record.differing
    manifest.verification = record
    manifest.status = "failed" if bad else "verified"
    manifest.reason = f"differs from the model: {', '.join(bad)}" if bad else ""


def default_runner(folder: Path, manifest: Manifest, runtime: str = "auto") -> Runner:
    """A session of a runtime, as in `Session.load`; `auto` runs ONNX files on the CPU, bf16 graphs in fp32."""
    from .runtimes.onnx_runtime import OnnxRuntime
    from .session import Session

    def opened(part: Manifest) -> Runner:
        on_cpu = manifest.kind == "onnx" and runtime in ("auto", "onnxruntime")
        kind = OnnxRuntime(part, torch.device("cpu"), compares=True) if on_cpu else runtime
        session = Session(folder, kind, manifest=part)
        session.warm_up()
        return session

    return _OneGraphAtATime(manifest, opened) if manifest.kind == "onnx" else opened(manifest)


class _OneGraphAtATime:
    """A `Runner` that keeps one graph loaded at a time, plus `image_memory`, to limit memory."""

    def __init__(self, manifest: Manifest, opened: Callable[[Manifest], Runner]) -> None:
        self._manifest, self._opened = manifest, opened
        self._loaded: dict[str, Runner] = {}

    @property
    def description(self) -> str:
        """See `Runner`."""
        return self._runner(next(iter(self._loaded), self._manifest.graphs[0].name)).description

    def run(self, graph: str, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Runner`."""
        return self._runner(graph).run(graph, inputs)

    def _runner(self, graph: str) -> Runner:
        if graph not in self._loaded:
            for other in self._loaded.keys() - {"image_memory"}:
                del self._loaded[other]
            part = self._manifest.model_copy(update={"graphs": [self._manifest.graph(graph)]})
            self._loaded[graph] = self._opened(part)
        return self._loaded[graph]


class Case(NamedTuple):
    """One run of a graph: images `[B]` and captions `[B, T]` by number, and the padded length."""

    images: Tensor
    texts: Tensor
    length: int


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """0 to count - 1 in chunks of one size; the last chunk wraps around."""
    for start in range(0, count, size):
        yield torch.arange(start, start + size) % count


class Comparison:
    """The graphs of an export on the inputs of a reference, and their outputs compared with its results."""

    def __init__(self, manifest: Manifest, reference: Reference, runner: Runner) -> None:
        self.manifest, self.reference, self.runner = manifest, reference, runner
        self.known, self.dtype = reference.tensors, DTYPES[manifest.dtype]
        self.padding: int = manifest.xfm_config.pad_token_id
        # `image_memory` computes the memory of every image; the reference holds only that of image 0.
        self.has_memories = "image_memory" in manifest.graph_names

    def run(self) -> tuple[list[Check], list[RankCheck]]:
        """Run every graph over the range of its shapes and compare all outputs with the reference."""
        threshold, reference = threshold_of(self.manifest), self.reference
        checks: list[Check] = []
        ranks: list[RankCheck] = []
        for record in self.manifest.graphs:
            found = Findings(record.name)
            if record.name in DECODER_GRAPHS:
                self._decode(record, found)
            else:
                for case in self.cases(record):
                    self._run(record, case, found)
            checks += [found.check(output, threshold, reference, self.manifest.dtype) for output in found.outputs]
            ranks += _rank_check(record.name, found.scores, threshold, reference)
        composed = {"vision", "text", "image_memory", "fusion"} <= {*self.manifest.graph_names}
        if self.manifest.options.get("arithmetic") and composed:
            # 8-bit errors accumulate from graph to graph, which the ranks of a single graph do not show.
            ranks += _rank_check("all", self._reranked(), threshold, reference)
        return checks, ranks

    def _reranked(self) -> Tensor | None:
        """The scores `[I, T]` of the chained graphs, each fed with the computed results of the previous one."""
        computed = dict(self.known)
        for graph, output in (("vision", "image_embeds"), ("text", "text_embeds")):
            record = self.manifest.graph(graph)
            values = computed[output] = computed[output].clone()
            for case in self._largest_cases(record):
                rows = case.images if graph == "vision" else case.texts[:, 0]
                outputs = self.runner.run(graph, self.inputs(record, case))
                if output in outputs:
                    made = outputs[output].float().cpu()
                else:
                    made = self._out_of_rows(record, case, outputs["packed_embeds"].float().cpu())
                values[rows[:, None], torch.arange(made.shape[1])] = made
        record, found = self.manifest.graph("fusion"), Findings("fusion")
        chained = Comparison(self.manifest, Reference(computed, self.reference.rounding), self.runner)
        for case in self._largest_cases(record):
            chained._run(record, case, found)
        return found.scores

    def _largest_cases(self, record: GraphRecord) -> list[Case]:
        """The cases of the largest shape, which cover every image, caption or pair."""
        found = [*self.cases(record)]
        return [case for case in found if case.texts.shape == found[-1].texts.shape]

    def cases(self, record: GraphRecord) -> Iterator[Case]:
        """Shapes from smallest to largest within the profiles, each image with each caption; fixed axes stay."""
        images, fixed, slots = self.reference.images, self.manifest.fixed, graph_slots(record)
        if record.name in ("fusion", "nlvr2") and not self.has_memories:
            images = 1
        lengths = self.known["attention_mask"].sum(1)
        longest = largest(slots, "length") if "length" in slots[0].ranges else None
        # The texts that fit, by number.
        usable = (lengths <= (longest or lengths.max())).nonzero().flatten()
        texts = len(usable)

        def case(image_rows: Tensor, text_rows: Tensor) -> Case:
            return Case(image_rows, text_rows, fixed.get("length", int(lengths[text_rows].max())))

        if record.name not in ("fusion", "match"):
            count = images if record.name in ("vision", "image_memory") else texts
            few = 3 if record.name == "text" else 2
            for size in _sizes(fixed.get("batch"), (1, few, count), largest(slots, "batch") or count):
                for rows in chunks(count, size):
                    yield case(rows % images, usable[rows % texts][:, None])
            return
        bounded: list[tuple[int, int]] = []
        for batch, count in ((1, 1), (1, texts), (images, 1), (images, texts)):
            # The memories that a profile takes, and the texts on each that it takes with them.
            batch, count = fixed.get("batch", batch), fixed.get("texts", count)
            batch = min(batch, largest(slots, "batch") or batch)
            together = [slot for slot in slots if slot.padded({"batch": batch}) is not None]
            bounded.append((batch, min(count, largest(together, "texts") or count)))
        for batch, count in dict.fromkeys(bounded):
            for image_rows in chunks(images, batch):
                if count == 1 and fixed.get("texts") is None:
                    # A memory for each text: image b with a text of its own.
                    rows = torch.arange(batch)[:, None] + int(image_rows[0])
                    yield case(image_rows, usable[rows % texts])
                    continue
                for text_rows in chunks(texts, count):
                    yield case(image_rows, usable[text_rows].expand(batch, -1))

    def inputs(self, record: GraphRecord, case: Case) -> dict[str, Tensor]:
        """Inputs of a graph from the reference; memories come from `image_memory` where it is exported."""
        known, names = self.known, [tensor.name for tensor in record.inputs]
        rows = case.texts if record.name in ("fusion", "match") else case.texts[:, 0]
        inputs: dict[str, Tensor] = {}
        for name in names:
            if name in ("pixels", "image_embeds"):
                inputs[name] = known[name][case.images].to(self.dtype)
            elif name in ("input_ids", "attention_mask"):
                inputs[name] = _cut(known[name], rows, case.length, self.padding if name == "input_ids" else 0)
            elif name == "text_embeds":
                inputs[name] = _cut(known[name], rows, case.length, 0).to(self.dtype)
        inputs |= self._memory([name for name in names if is_memory(name)], case, pairs=record.name == "nlvr2")
        if "segments" in names:
            inputs |= self._rows(record, case)
        return inputs

    def _memory(self, names: list[str], case: Case, *, pairs: bool) -> dict[str, Tensor]:
        if not names:
            return {}
        # Of a pair the image and the one behind it.
        images = case.images
        if pairs:
            images = torch.stack([images, (images + 1) % self.reference.images], 1).flatten()
        if self.has_memories:
            most = largest(graph_slots(self.manifest.graph("image_memory")), "batch") or len(images)
            embeds = (self.known["image_embeds"][rows].to(self.dtype) for rows in images.split(most))
            made = [self.runner.run("image_memory", {"image_embeds": each}) for each in embeds]
            layers = {name: torch.cat([each[name] for each in made]) for name in names}
        else:
            layers = {
                name: self.known[name].to(self.dtype).expand(len(images), -1, -1, -1).contiguous() for name in names
            }
        return {name: layer.unflatten(0, (-1, 2)) if pairs else layer for name, layer in layers.items()}

    def _layout(self, record: GraphRecord, case: Case) -> tuple[Layout, Tensor]:
        """Rows of the captions of a case (all for `text`, of each image for `fusion`), and their mask `[P, L]`."""
        texts, slots = case.texts.flatten(), graph_slots(record)
        lengths = self.known["attention_mask"].sum(1)[texts].tolist()
        numbers = torch.arange(len(lengths)).view(1 if record.name == "text" else len(case.texts), -1).tolist()
        most, longest = largest(slots, "rows"), largest(slots, "length")
        width = self.manifest.config["text_width"]
        found = [pack_rows(each, lengths, width, most_rows=most, most_length=longest) for each in numbers]
        made = [rows for rows in found if rows is not None]
        if len(made) < len(found):
            raise InputError(f"graph {record.name!r}: {len(numbers[0])} texts do not fit; export with more rows")
        # As many rows of each image as the one has that needs most of them.
        count = max(len(each.texts) for each in made)
        images = [(*each.texts, *((),) * (count - len(each.texts))) for each in made]
        layout = Layout.of(images, lengths, max(each.length for each in made))
        return layout, _cut(self.known["attention_mask"], texts, case.length, 0).bool()

    def _rows(self, record: GraphRecord, case: Case) -> dict[str, Tensor]:
        """The inputs of a packed graph."""
        known, texts = self.known, case.texts.flatten()
        layout, real = self._layout(record, case)

        def spread(values: Tensor, padding: int = 0) -> Tensor:
            return layout.spread(_cut(values, texts, case.length, padding)[real], padding)

        given = {"segments": layout.segments, "firsts": layout.firsts}
        if record.name != "text":
            return given | {"packed_embeds": spread(known["text_embeds"]).to(self.dtype)}
        padding = self.padding
        given |= {
            "packed_ids": spread(known["input_ids"], padding),
            "positions": spread(known["attention_mask"].cumsum(1) + padding, padding),
        }
        return {name: value[0] for name, value in given.items()}

    def _out_of_rows(self, record: GraphRecord, case: Case, value: Tensor) -> Tensor:
        """`[..., R, L, width]` of a packed graph → `[P, L, width]` of the captions of a case, zero-padded."""
        layout, real = self._layout(record, case)
        tokens = value.new_empty(len(layout.source), value.shape[-1])
        tokens[layout.source] = value.flatten(0, -2)[layout.place]
        out = value.new_zeros(*real.shape, value.shape[-1])
        out[real] = tokens
        return out

    def _run(self, record: GraphRecord, case: Case, found: Findings) -> None:
        known, (image_rows, texts, length) = self.known, case
        rows = texts if record.name in ("fusion", "match") else texts[:, 0]
        inputs = self.inputs(record, case)
        outputs = self.runner.run(record.name, inputs)
        shape = [*inputs[record.inputs[0].name].shape]
        images = image_rows[:, None].expand_as(texts)
        # Rows of the reference: images, captions, or pairs.
        rows_of: dict[str, Any] = {"vision": image_rows, "text": rows, "nlvr2": (image_rows, rows)}
        index = rows_of.get(record.name, (images, texts))
        for tensor in record.outputs:
            name, value = tensor.name, outputs[tensor.name].float().cpu()
            if is_memory(name):
                # The reference holds the memory of image 0.
                mine = value[image_rows == 0]
                found.add("memory", shape, mine, known[name].expand_as(mine))
            elif name == "text_embeds":
                # Padded positions hold arbitrary values.
                real = inputs["attention_mask"].bool()
                found.add(name, shape, value[real], _cut(known[name], rows, length, 0)[real])
            elif name in ("packed_embeds", "fused_tokens"):
                name, real = name.replace("packed", "text"), self._layout(record, case)[1]
                # The reference of fused tokens covers image 0 only.
                real = real & (images.flatten() == 0)[:, None] if name == "fused_tokens" else real
                truth = _cut(known[name] if name == "text_embeds" else known[name][0], texts.flatten(), length, 0)
                found.add(name, shape, self._out_of_rows(record, case, value)[real], truth[real])
            elif name == "fused" and self.manifest.all_tokens and not self.manifest.packed:
                found.add(name, shape, value[:, :, 0], known["fused"][images, texts])
                real = (image_rows == 0)[:, None, None] & inputs["attention_mask"].bool()
                truth = _cut(known["fused_tokens"][0], texts, length, 0)
                found.add("fused_tokens", shape, value[real], truth[real])
            else:
                found.add(name, shape, value, known[name][index])
            if name in ("match_logits", "scores"):
                scores = value[..., 1] if name == "match_logits" else value
                found.add_scores(images, texts, scores, self.reference)

    def _decode(self, record: GraphRecord, found: Findings) -> None:
        """A decoder's graphs: projected states, or teacher-forced steps from them."""
        known, slots, fixed = self.known, graph_slots(record), self.manifest.fixed
        least = slots[0].ranges["length"].least
        states, texts = len(known["states"]), len(known["tokens"])
        for batch in _sizes(fixed.get("batch"), (1, states), largest(slots, "batch") or states):
            for rows in chunks(states, batch):
                if record.name == "decoder_memory":
                    self._project(record, rows, least, found)
                    continue
                for count in _sizes(fixed.get("texts"), (1, texts), largest(slots, "texts") or texts):
                    for chosen in chunks(texts, count):
                        self._write(record, rows, chosen, least, found)

    def _of_states(self, name: str, rows: Tensor, least: int) -> Tensor:
        """A tensor of some states, padded where the graph has a fixed length."""
        value = self.known[name][rows]
        axis = 2 if name.startswith("decoder_") else 1
        lacking = max(least - value.shape[axis], 0)
        padded = F.pad(value.movedim(axis, -1), (0, lacking)).movedim(-1, axis).contiguous()
        return padded.to(self.dtype) if value.is_floating_point() else padded

    def _project(self, record: GraphRecord, rows: Tensor, least: int, found: Findings) -> None:
        states = self._of_states("states", rows, least)
        outputs = self.runner.run("decoder_memory", {"states": states})
        # Padded positions are not read.
        real = self._of_states("memory_mask", rows, least).bool()
        for tensor in record.outputs:
            both = outputs[tensor.name].float().cpu(), self._of_states(tensor.name, rows, least).float()
            found.add("memory", [*states.shape], *(value.transpose(1, 2)[real] for value in both))

    def _write(self, record: GraphRecord, rows: Tensor, chosen: Tensor, least: int, found: Findings) -> None:
        """The same tokens from every state, each step fed with the results of the previous ones."""
        tokens = self.known["tokens"][chosen].expand(len(rows), -1, -1)
        present = self.known["present"][rows[:, None], chosen]
        names = [tensor.name for tensor in record.inputs]
        inputs = {
            name: self._of_states(name, rows, least)
            for name in names
            if name.startswith("decoder_") or name == "memory_mask"
        }
        past = torch.zeros_like(present[:, :, :1], dtype=self.dtype)
        most = largest(graph_slots(record), "past") or tokens.shape[2]
        for step in range(min(tokens.shape[2], most + 1)):
            real = torch.ones(*tokens.shape[:2], max(step, 1), dtype=torch.long) * bool(step)
            inputs |= {"token_ids": tokens[:, :, step], "past": past.movedim(2, -2).contiguous(), "past_mask": real}
            made = self.runner.run("decoder_step", inputs)
            shape, logits = [*tokens.shape[:2], step], self.known["step_logits"][rows[:, None], chosen, step]
            found.add("logits", shape, made["logits"].float().cpu(), logits)
            found.add("present", shape, made["present"].float().cpu(), present[:, :, step])
            new = made["present"].cpu()[:, :, None]
            past = torch.cat([past, new], 2) if step else new


def _sizes(fixed: int | None, free: tuple[int, ...], most: int) -> tuple[int, ...]:
    return (fixed,) if fixed is not None else tuple(dict.fromkeys(min(size, most) for size in free))


def _cut(values: Tensor, rows: Tensor, length: int, padding: int) -> Tensor:
    """Captions by number, `[T, L, ...]` → `[*rows.shape, length, ...]`, cut or padded."""
    chosen = values[rows][..., :length, :] if values.dim() > 2 else values[rows][..., :length]
    lacking = length - chosen.shape[rows.dim()]
    if not lacking:
        return chosen.contiguous()
    after = (0, 0) if values.dim() > 2 else ()
    return F.pad(chosen, (*after, 0, lacking), value=padding)


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
        own = max(error for stored, error in reference.rounding.items() if _check_name(stored) == name)
        return self.rounding * own + 2 * unit

    def ties(self, reference: Reference) -> float:
        """The largest difference of two scores that may swap ranks."""
        extent = float(reference.tensors["scores"].abs().max()) if self.relative_tie else 0.0
        return max(self.tie, 2 * reference.rounding["scores"] if self.rounding else 0.0, self.relative_tie * extent)


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
        absolute=0, rounding=0, cosine=budget, tie=1e-5, ranks=0.95, relative=turned, relative_tie=2 * unit
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
    shapes: list[list[int]] = field(default_factory=list)
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

    def add(self, name: str, shape: list[int], value: Tensor, truth: Tensor) -> None:
        errors = self.outputs.setdefault(name, _Errors())
        if value.shape != truth.shape:
            raise ValueError(f"{self.graph} returned {name} of shape {[*value.shape]}, expected {[*truth.shape]}")
        if shape not in errors.shapes:
            errors.shapes.append(shape)
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

    def add_scores(self, images: Tensor, texts: Tensor, scores: Tensor, reference: Reference) -> None:
        if self.scores is None:
            self.scores = torch.full((reference.images, reference.texts), torch.nan)
        self.scores[images, texts] = scores

    def check(self, output: str, threshold: Threshold, reference: Reference, dtype: DType) -> Check:
        errors = self.outputs[output]
        allowed = threshold.allowed(output, errors.extent, reference, dtype)
        directed = output in DIRECTIONS
        # Comparisons with NaN are false: NaN fails.
        passed = errors.largest <= allowed and (not directed or errors.cosine >= threshold.cosine)
        return Check(
            graph=self.graph,
            output=output,
            shapes=errors.shapes,
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
    graph: GraphName | Literal["all"], scores: Tensor | None, threshold: Threshold, reference: Reference
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


class RankAgreement(NamedTuple):
    """Two orders of the same candidates compared; `agreeing` counts ties as equal, `identical` does not."""

    candidates: int
    agreeing: float
    identical: float


def rank_agreement(found: Tensor, truth: Tensor, tie: float) -> RankAgreement | None:
    """Compare the order of scores `[I, T]` (NaN: not scored) with the model's; None without two candidates."""
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
    if not candidates:
        return None
    return RankAgreement(candidates, agreeing / candidates, identical / candidates)
