"""The whole retrieval evaluation of COCO's 5k test split: what the official procedure costs here, what ours, and why.

Without data of the user's the evaluation is projected: every part of both procedures is timed on this machine, at the
shape that it has in the evaluation, and multiplied by how often it comes. With data ours is run in full; the official
procedure in part if the whole would take too long, its scores compared with ours pair by pair.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.config import XFMConfig
from xfm_fast.packing import ImageGroups, Packing, Sequences, offsets
from xfm_fast.tasks.reranking import TOKEN_BUDGET, ModelScorer
from xfm_fast.tasks.retrieval import UNSCORED, RerankResult, Retriever

from ..contenders.engine import wait_for
from ..contenders.official_algorithm import OfficialTwin
from ..material.inputs import MAX_TOKENS, Material, Texts
from ..measure import MODEL_ROUNDING, Block, Case, Run, benchmark, compared, interleave
from ..record import OFFICIAL, OURS, Parity, Result, finite
from ..timing import DTYPES, FP32_BAND, one_line, parity_band, relative_error
from .model import Scale, note_paths, prepare

# Of the test split of Karpathy and Fei-Fei, as the official evaluation reads it, and its k_test.
IMAGES, TEXTS, CANDIDATES = 5000, 25010, 256
RERANKING = "fusion, keys and values included"
_IMAGE_BATCH, _TEXT_BATCH = 8, 64


@dataclass(frozen=True)
class Passes:
    """The size of one timed pass of every part: as large as the evaluation gives it to such a device.

    Attributes:
        photos, captions: embedded together.
        texts: of a pass of re-ranking, over `images`; about the tokens that its scheduler gives a pass.
        official_pairs: of an image, which the official procedure scores together.
    """

    photos: int = 4
    captions: int = 64
    texts: int = 160
    images: int = 1
    official_pairs: int = 16

    @classmethod
    def of(cls, device: torch.device, sizes: Sizes) -> Passes:
        """A GPU that is given a CPU's passes is mostly waited for: it would seem several times slower than it is."""
        if device.type != "cuda":
            return cls()
        # An image has the candidates of both directions, and a pass as many of them as fit.
        each = max(1, sizes.pairs // sizes.images)
        texts = max(1, int(TOKEN_BUDGET["cuda"] / statistics.fmean(sizes.lengths)))
        images = min(64, max(1, round(texts / each)))
        return cls(64, 1024, texts, images, min(sizes.k, sizes.texts))


@dataclass(frozen=True)
class Sizes:
    """The size of a collection: `lengths` are those of a sample of its texts."""

    images: int
    texts: int
    k: int
    lengths: list[int]

    @property
    def pairs(self) -> int:
        """Pairs that the official evaluation scores: both directions, each for itself."""
        return flops.official_pairs(self.images, self.texts, self.k)


def receipt(config: XFMConfig, sizes: Sizes, scored: int | None = None) -> dict[str, float]:
    """FLOPs of the evaluation, from the official procedure to ours, one saving after the other.

    Args:
        sizes: of the collection.
        scored: pairs that are left when those of both directions are scored once, where that is known.
    """
    sample, pairs = sizes.lengths, sizes.pairs
    vision = flops.image_encoder(config, sizes.images).total
    vision += flops.contrastive_features(config, sizes.images, sizes.texts).total
    text = flops.text_encoder(config, sample).total * sizes.texts / len(sample)
    padded = flops.text_encoder(config, [MAX_TOKENS]).total * sizes.texts
    head = flops.matching_head(config, 1).total
    memory = flops.image_memory(config, 1).total

    def fusion(lengths: Sequence[int], *, first_only: bool = False, shared: bool = False) -> float:
        whole = flops.fusion(config, lengths, first_token_only=first_only, self_attended=shared).total
        return whole / len(lengths) + head

    first = flops.first_self_attention(config, sample).total * sizes.texts / len(sample)
    shared_memory = vision + sizes.images * memory
    packed, last = shared_memory + text, fusion(sample, first_only=True, shared=True)
    steps = {
        "official procedure": vision + padded + pairs * (fusion([MAX_TOKENS]) + memory),
        "keys and values of an image once": shared_memory + padded + pairs * fusion([MAX_TOKENS]),
        "no padding": packed + pairs * fusion(sample),
        "last layer for token 0 alone": packed + pairs * fusion(sample, first_only=True),
        "first self-attention of a text once": packed + first + pairs * last,
    }
    if scored is not None:
        steps["pairs of both directions once"] = packed + first + scored * last
    return steps


@benchmark("coco", title="A whole retrieval evaluation", reference=OFFICIAL)
def run(run: Run) -> Iterator[Case]:
    """Project the evaluation from the times of its parts, or with `options.data` run it: rows of whole evaluations."""
    options = run.options
    scale = Scale.of("retrieve", options, run.device)
    run.progress.begin(3 if options.data is None else 4)
    material = prepare(run, scale.image_size, options.images)
    evaluation = _Evaluation(run, material, scale)
    run.progress.stage("rates of all parts")
    rows = evaluation.project()
    if options.data is not None:
        run.progress.stage("the evaluation in full")
        rows = evaluation.measure(rows)
    run.add(rows)
    note_paths(run)
    yield from ()


class _Evaluation:
    def __init__(self, run: Run, material: Material, scale: Scale) -> None:
        self.run, self.material, self.scale = run, material, scale
        self.config = material.config(scale.image_size)
        collection, own = material.collection, run.options.data is not None
        images = len(collection.names) if own else IMAGES
        texts = len(collection.captions) if own else TEXTS
        k = run.options.k or CANDIDATES
        sample = material.encoded(collection.captions).lengths
        self.sizes = Sizes(images, texts, min(k, images, texts) if own else k, sample)
        self.passes = passes = Passes.of(material.device, self.sizes)
        self.given = material.texts(max(passes.texts, passes.captions, passes.official_pairs))
        # How often each part of a procedure comes.
        self.counts = {
            "embed images": images / passes.photos,
            "embed texts": texts / passes.captions,
            "first self-attention": texts / passes.texts,
            "image memory": images / passes.images,
            "fusion and matching head": self.sizes.pairs / passes.texts,
            RERANKING: self.sizes.pairs / passes.official_pairs,
        }

    def row(self, backend: str, dtype: str, seconds: list[float], parts: dict[str, float], flops: float) -> Result:
        """A whole evaluation by one procedure."""
        sizes = self.sizes
        name = f"evaluate {sizes.images:,} images of {self.scale.image_size} px x {sizes.texts:,} texts, k = {sizes.k}"
        return Result(
            work="coco", name=name, backend=backend, label=backend, dtype=dtype, status="measured", unit="evaluations",
            items=1, seconds=seconds, reason="projected from the times of its parts",
            extra={"stages": parts, "flops": round(flops), "pairs": sizes.pairs},
        )  # fmt: skip

    def project(self) -> list[Result]:
        """Rows from the times of all parts."""
        blocks = {f"{part}: {OFFICIAL} fp32": block for part, block in self._official_parts().items()}
        for dtype in self.run.dtypes:
            blocks |= {f"{part}: {OURS} {dtype}": block for part, block in self._our_parts(dtype).items()}
        samples = interleave(
            blocks, self.run.probes, rounds=3, budget_s=self.scale.budget_s, most_rounds=30, warmups=1,
            deadline=time.perf_counter() + 2 * self.scale.budget_s, on_step=self.run.progress.step,
        )  # fmt: skip
        if samples.interrupted:
            raise KeyboardInterrupt
        # Seconds that each part takes in all, by round.
        parts: dict[str, dict[str, list[float]]] = {}
        for name in blocks:
            part, key = name.split(": ")
            parts.setdefault(key, {})[part] = [second * self.counts[part] for second in samples.seconds(name)]
        steps = receipt(self.config, self.sizes)
        needed, rows = list(steps.values()), list[Result]()
        for key, found in parts.items():
            backend, dtype = key.split(" ")
            totals = [float(sum(one)) for one in zip(*found.values(), strict=True)]
            medians = {part: statistics.median(values) for part, values in found.items() if values}
            row = self.row(backend, dtype, totals, medians, needed[0] if backend == OFFICIAL else needed[-1])
            row.contended = samples.readings.contended(dtype)
            failures = [why for name, why in samples.failures.items() if name.endswith(f": {key}")]
            if failures:
                row.status, row.reason, row.seconds = "failed", one_line(RuntimeError(failures[0])), []
            rows.append(row)
        rows[1].extra["receipt"] = steps
        return self.compare(rows)

    def compare(self, rows: list[Result]) -> list[Result]:
        """The rows with the gain of ours over the official procedure."""
        official = rows[0]
        for row in rows[1:]:
            if row.seconds and official.seconds:
                row.against = [compared(f"{OFFICIAL} fp32", row.dtype, official.seconds, row.seconds)]
        return rows

    def _our_parts(self, dtype: str) -> dict[str, Block]:
        model = self.material.subjects.model(self.scale.image_size, DTYPES[dtype])
        scorer = ModelScorer(model)
        passes, device = self.passes, self.material.device
        pixels = self.material.pixels(passes.photos, self.scale.image_size).to(DTYPES[dtype])
        ids, mask = (tensor[: passes.captions] for tensor in self.given)
        of_pass = Texts(*(tensor[: passes.texts] for tensor in self.given))
        with torch.inference_mode():
            image = model.encode_image(pixels[: passes.images])
            packing = Packing.from_mask(of_pass.mask)
            tokens = packing.pack(model.encode_text(*of_pass))
            sequences = Sequences.from_lengths(packing.cu_seqlens.diff().long())
            prepared, memory = scorer.prepare(tokens, sequences), scorer.memory(image)
        texts = torch.full((passes.images,), passes.texts // passes.images, device=device)
        texts[0] += passes.texts % passes.images
        groups = ImageGroups(offsets(texts))
        return self._timed(
            {
                "embed images": lambda: model.project_image(model.encode_image(pixels)),
                "embed texts": lambda: model.project_text(model.encode_text(ids, mask)),
                "first self-attention": lambda: scorer.prepare(tokens, sequences),
                "image memory": lambda: scorer.memory(image),
                "fusion and matching head": lambda: scorer.scores(prepared, sequences, memory, groups),
            }
        )

    def _official_parts(self) -> dict[str, Block]:
        twin = OfficialTwin(self.material.subjects.model(self.scale.image_size, torch.float32))
        pixels = self.material.pixels(self.passes.photos, self.scale.image_size)
        ids, mask = (tensor[: self.passes.captions] for tensor in self.given)
        few = Texts(*(tensor[: self.passes.official_pairs] for tensor in self.given))
        with torch.inference_mode():
            image, embeds = twin.encode_image(pixels[:1])[0], twin.encode_text(*few)
        return self._timed(
            {
                "embed images": lambda: twin.project_image(twin.encode_image(pixels)),
                "embed texts": lambda: twin.project_text(twin.encode_text(ids, mask)),
                RERANKING: lambda: twin.rerank_image(image, embeds, few.mask),
            }
        )

    def _timed(self, parts: Mapping[str, Callable[[], object]]) -> dict[str, Block]:
        def block(run: Callable[[], object]) -> list[float]:
            with torch.inference_mode():
                begun = time.perf_counter()
                run()
                wait_for(self.material.device)
                return [time.perf_counter() - begun]

        return {name: lambda run=run: block(run) for name, run in parts.items()}

    def measure(self, projected: list[Result]) -> list[Result]:
        """Rows of the evaluation of the user's collection: ours in full, the official one as time allows."""
        material, sizes, dtype = self.material, self.sizes, self.run.dtypes[0]
        collection, step = material.collection, self.run.progress.step
        retriever = Retriever(material.subjects.model(self.scale.image_size, DTYPES[dtype]))
        seconds: dict[str, float] = {}

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            step(name)
            begun = time.perf_counter()
            yield
            wait_for(material.device)
            seconds[name] = time.perf_counter() - begun

        ids, mask = material.tokenizer.encode(collection.captions, MAX_TOKENS)
        # Both procedures read the same pixels, so decoding is not part of either.
        starts = range(0, sizes.images, _IMAGE_BATCH)
        batches = [
            collection.pixels(range(start, min(start + _IMAGE_BATCH, sizes.images)), self.scale.image_size)
            for start in starts
        ]
        batches = [batch.to(DTYPES[dtype]) for batch in batches]
        with timed("embed images"):
            images = retriever.embed_images(batches)
        with timed("embed texts"):
            texts = retriever.embed_texts(zip(ids.split(_TEXT_BATCH), mask.split(_TEXT_BATCH), strict=True))
        with timed("re-ranking"):
            result = retriever.rerank(images, texts, sizes.k)
        spent = result.receipt
        steps = receipt(self.config, replace(sizes, lengths=mask.sum(1).tolist()), spent.pairs_scored)
        needed = list(steps.values())
        step("official procedure")
        twin = OfficialTwin(material.subjects.model(self.scale.image_size, torch.float32))
        error, official_s, pairs = self._official_scores(
            twin, images.embeds.float(), ids.to(material.device), mask.to(material.device), result
        )
        # The scores of ours pass through encoders of this dtype, those of the official procedure begin with its own
        # texts.
        rounding = MODEL_ROUNDING * torch.finfo(DTYPES[dtype]).eps
        band = parity_band(DTYPES[dtype], rounding, fp32=3 * FP32_BAND)
        ours = self.row(OURS, dtype, [sum(seconds.values())], seconds, needed[-1])
        ours.parity = Parity(
            error=finite(error), band=band, passed=error <= band, against=f"{OFFICIAL} fp32",
            note=f"match scores of {pairs} pairs",
        )  # fmt: skip
        recall: Any = result.recall(torch.tensor(collection.photo_of))
        ours.extra |= {"receipt": steps, "recall": recall, "pairs": spent.pairs_scored}
        ours.reason = f"{spent.pairs_saved} of {spent.pairs_official} pairs are candidates in both directions"
        if not ours.parity.passed:
            ours.status, ours.seconds = "parity failed", []
        share = pairs / sizes.pairs
        parts = projected[0].parts("stages") | {RERANKING: official_s / share}
        official = self.row(OFFICIAL, "fp32", [sum(parts.values())], parts, needed[0])
        official.reason = f"projected from {share:.1%} of the pairs"
        return self.compare([official, ours, *(row for row in projected[1:] if row.dtype != dtype)])

    @torch.inference_mode()
    def _official_scores(
        self, twin: OfficialTwin, images: Tensor, ids: Tensor, mask: Tensor, result: RerankResult
    ) -> tuple[float, float, int]:
        """Re-rank image by image, then text by text, until the time is spent; at least one query of either direction.

        Returns:
            Largest error of our scores, seconds, and pairs.
        """
        encoded = zip(ids.split(_TEXT_BATCH), mask.split(_TEXT_BATCH), strict=True)
        texts = torch.cat([twin.encode_text(*part) for part in encoded])
        error, seconds, pairs = 0.0, 0.0, 0
        # Directions take turns, so that a part is a part of both; every beginning of a direction is spread over it.
        turns = [
            (turn, direction, row, scores[row])
            for direction, scores in enumerate((result.score_i2t, result.score_t2i))
            for turn, row in enumerate(sorted(range(len(scores)), key=lambda number: int(f"{number:032b}"[::-1], 2)))
        ]
        for turn, direction, row, scores in sorted(turns, key=lambda one: one[:2]):
            if turn and seconds > self.scale.budget_s:
                break
            chosen = (scores != UNSCORED).nonzero()[:, 0]
            begun = time.perf_counter()
            if direction == 0:
                theirs = twin.rerank_image(images[row], texts[chosen], mask[chosen])
            else:
                theirs = twin.rerank_text(texts[row], mask[row], images[chosen])
            wait_for(images.device)
            seconds += time.perf_counter() - begun
            pairs += len(chosen)
            error = max(error, relative_error(scores[chosen], theirs.cpu()))
        return error, seconds, pairs
