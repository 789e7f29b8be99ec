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

import torch
from torch import Tensor

from xfm_fast import flops
from xfm_fast.config import XFMConfig
from xfm_fast.packing import ImageGroups, Packing, Sequences, offsets
from xfm_fast.tasks.reranking import TOKEN_BUDGET, ModelScorer
from xfm_fast.tasks.retrieval import UNSCORED, RerankResult, Retriever

from .. import machine
from ..contenders.engine import wait_for
from ..contenders.official_algorithm import OfficialTwin
from ..material.inputs import MAX_TOKENS, Texts
from ..measure import (
    DTYPES,
    FP32_BAND,
    MODEL_ROUNDING,
    Block,
    Progress,
    interleave,
    interval,
    parity_band,
    ratio_interval,
    relative_error,
)
from ..options import CocoOptions
from ..record import OFFICIAL, OURS, Coco, Document, Evaluation, Interval, Parity, ReceiptStep, finite
from .setting import Scale, Setting, opened

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


def receipt(config: XFMConfig, sizes: Sizes, scored: int | None = None) -> list[ReceiptStep]:
    """FLOPs of the evaluation, from the official procedure to ours, one saving after the other.

    Args:
        sizes: of the collection.
        scored: pairs that are left when those of both directions are scored once, where that is known.
    """
    pairs, sample = sizes.pairs, sizes.lengths
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
    steps = [
        ("official procedure", vision + padded + pairs * (fusion([MAX_TOKENS]) + memory)),
        ("keys and values of an image once", shared_memory + padded + pairs * fusion([MAX_TOKENS])),
        ("no padding", packed + pairs * fusion(sample)),
        ("last layer for token 0 alone", packed + pairs * fusion(sample, first_only=True)),
        ("first self-attention of a text once", packed + first + pairs * last),
    ]
    if scored is not None:
        steps.append(("pairs of both directions once", packed + first + scored * last))
    before = [steps[0][1], *(count for _, count in steps)]
    return [
        ReceiptStep(saving=saving, flops=count, factor=earlier / count)
        for (saving, count), earlier in zip(steps, before, strict=False)
    ]


def run(options: CocoOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Project the evaluation, or with `options.data` run it. An interruption (Ctrl-C) leaves the document without it.

    Raises:
        XFMError: an option, the checkpoint or the data cannot be used.
    """
    device = machine.choose_device(options.device)
    scale = Scale.of("retrieve", options, device)
    progress = progress or Progress()
    progress.begin(3 if options.data is None else 4)
    with opened(options, "coco", device, progress, command) as setting:
        setting.prepare(scale.image_size, options.images)
        setting.document.coco = _Evaluations(setting, options, scale).measure()
    return setting.finish()


class _Evaluations:
    def __init__(self, setting: Setting, options: CocoOptions, scale: Scale) -> None:
        self.setting, self.material, self.scale = setting, setting.material, scale
        self.config = self.material.config(scale.image_size)
        collection, self.measured = self.material.collection, options.data is not None
        images = len(collection.names) if self.measured else IMAGES
        texts = len(collection.captions) if self.measured else TEXTS
        k = options.k or CANDIDATES
        sample = self.material.encoded(collection.captions).lengths
        self.sizes = Sizes(images, texts, min(k, images, texts) if self.measured else k, sample)
        self.passes = passes = Passes.of(self.material.device, self.sizes)
        self.given = self.material.texts(max(passes.texts, passes.captions, passes.official_pairs))
        # The count of work for each part of a procedure, by its name.
        self.counts = {
            "embed images": images / passes.photos,
            "embed texts": texts / passes.captions,
            "first self-attention": texts / passes.texts,
            "image memory": images / passes.images,
            "fusion and matching head": self.sizes.pairs / passes.texts,
            RERANKING: self.sizes.pairs / passes.official_pairs,
        }

    def measure(self) -> Coco:
        setting = self.setting
        setting.progress.stage("rates of all parts")
        blocks = {f"{part}: {OFFICIAL} fp32": block for part, block in self._official_parts().items()}
        for dtype in setting.dtypes:
            blocks |= {f"{part}: {OURS} {dtype}": block for part, block in self._our_parts(dtype).items()}
        samples = interleave(
            blocks, setting.probes, rounds=3, budget_s=self.scale.budget_s, most_rounds=30,
            deadline=time.perf_counter() + 2 * self.scale.budget_s, warmups=1, on_step=setting.progress.step,
        )  # fmt: skip
        if samples.interrupted:
            raise KeyboardInterrupt
        steps = receipt(self.config, self.sizes)
        if samples.failures:
            raise RuntimeError(": ".join(next(iter(samples.failures.items()))))
        # Seconds that each part takes in all, by round.
        parts: dict[str, dict[str, list[float]]] = {}
        for name in blocks:
            part, key = name.split(": ")
            parts.setdefault(key, {})[part] = [second * self.counts[part] for second in samples.seconds(name)]
        totals = {key: [float(sum(one)) for one in zip(*found.values(), strict=True)] for key, found in parts.items()}
        evaluations = []
        for key, found in parts.items():
            contender, dtype = key.split(" ")
            count = steps[0].flops if contender == OFFICIAL else steps[-1].flops
            evaluation = Evaluation(
                procedure="official-algorithm" if contender == OFFICIAL else "xfm-fast", dtype=dtype, kind="projected",
                pairs=self.sizes.pairs, flops=count, flops_per_s=count / statistics.median(totals[key]),
                seconds={part: statistics.median(values) for part, values in found.items()},
                total_s=interval(totals[key], 0.5),
            )  # fmt: skip
            evaluations.append(evaluation)
        # The first type that was measured is the one to compare in, as official results are in fp32.
        ours, official = totals[f"{OURS} {setting.dtypes[0]}"], totals[f"{OFFICIAL} fp32"]
        low, high = ratio_interval(official, ours)
        projected = Coco(
            origin="the sizes of COCO's 5k test split, with the lengths of the captions at hand",
            images=self.sizes.images,
            texts=self.sizes.texts,
            k=self.sizes.k,
            image_size=self.scale.image_size,
            mean_length=statistics.fmean(self.sizes.lengths),
            padded_length=MAX_TOKENS,
            evaluations=evaluations,
            receipt=steps,
            speed_up=Interval(value=statistics.median(official) / statistics.median(ours), low=low, high=high),
            note="pairs that are candidates in both directions are counted twice here; ours scores them once",
        )
        if not self.measured:
            return projected
        setting.progress.stage("the evaluation in full")
        return self._run(projected)

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

    def _run(self, projected: Coco) -> Coco:
        """The evaluation of the setting's collection: ours in full, the official one as time allows."""
        material, sizes, dtype = self.material, self.sizes, self.setting.dtypes[0]
        collection, step = material.collection, self.setting.progress.step
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
        batches = [
            collection.pixels(
                range(start, min(start + _IMAGE_BATCH, sizes.images)), self.scale.image_size
            ).to(DTYPES[dtype])
            for start in range(0, sizes.images, _IMAGE_BATCH)
        ]  # fmt: skip
        with timed("embed images"):
            images = retriever.embed_images(batches)
        with timed("embed texts"):
            texts = retriever.embed_texts(zip(ids.split(_TEXT_BATCH), mask.split(_TEXT_BATCH), strict=True))
        with timed("re-ranking"):
            result = retriever.rerank(images, texts, sizes.k)
        spent, total = result.receipt, sum(seconds.values())
        steps = receipt(self.config, replace(sizes, lengths=mask.sum(1).tolist()), spent.pairs_scored)
        ours = Evaluation(
            procedure="xfm-fast", dtype=dtype, kind="measured", pairs=spent.pairs_scored, flops=steps[-1].flops,
            flops_per_s=steps[-1].flops / total, seconds=seconds, total_s=Interval(value=total), measured_share=1.0,
        )  # fmt: skip
        step("official procedure")
        twin = OfficialTwin(material.subjects.model(self.scale.image_size, torch.float32))
        error, official_s, pairs = self._official_scores(
            twin, images.embeds.float(), ids.to(material.device), mask.to(material.device), result
        )
        share = pairs / sizes.pairs
        expected = next(e for e in projected.evaluations if e.procedure == OFFICIAL)
        parts = expected.seconds | {RERANKING: official_s / share}
        official = expected.model_copy(
            update={
                "kind": "measured in part",
                "flops": steps[0].flops,
                "flops_per_s": steps[0].flops / sum(parts.values()),
                "seconds": parts,
                "total_s": Interval(value=sum(parts.values())),
                "measured_share": share,
            }
        )
        # The scores of ours pass through encoders of this type, those of the official procedure begin with its own
        # texts.
        rounding = MODEL_ROUNDING * torch.finfo(DTYPES[dtype]).eps
        band = parity_band(DTYPES[dtype], rounding, fp32=3 * FP32_BAND)
        others = [e for e in projected.evaluations if e.procedure != OFFICIAL and e.dtype != dtype]
        return projected.model_copy(
            update={
                "origin": f"{collection.origin}, measured",
                "evaluations": [official, ours, *others],
                "receipt": steps,
                "speed_up": Interval(value=official.total_s.value / total),
                "parity": Parity(
                    error=finite(error), band=band, passed=error <= band, against=f"{OFFICIAL} fp32",
                    note=f"match scores of {pairs} pairs",
                ),
                "recall": result.recall(torch.tensor(collection.photo_of)),
                "note": f"{spent.pairs_saved} of {spent.pairs_official} pairs are candidates in both directions",
            }
        )  # fmt: skip

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
