"""The whole retrieval evaluation of COCO's 5k test split: its cost by the official procedure and by ours, and why.

It is projected: every part of both procedures is timed on this machine, at the shape that it has in the evaluation, and
multiplied by how often it comes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from xfm_fast import flops
from xfm_fast.config import XFMConfig
from xfm_fast.packing import ImageGroups, Packing, Sequences, offsets
from xfm_fast.tasks.reranking import TOKEN_BUDGET, ModelScorer
from xfm_fast.testing import MAX_TOKENS, Texts

from ..backends import wait_for
from ..backends.official_algorithm import OfficialTwin
from ..measure import Case, Run, benchmark
from ..record import OFFICIAL, OURS, Result
from ..rounds import Samples, compared, interleave
from ..timing import DTYPES
from .model import Scale, note_paths, prepare
from .requests import Material

# Of the test split of Karpathy and Fei-Fei, as the official evaluation reads it, and its k_test.
IMAGES, TEXTS, CANDIDATES = 5000, 25010, 256


class Sizes(NamedTuple):
    """The size of a collection: `lengths` are of a sample of its texts."""

    images: int
    texts: int
    k: int
    lengths: list[int]

    @property
    def pairs(self) -> int:
        """Pairs that the official evaluation scores, the two directions separately."""
        return flops.official_pairs(self.images, self.texts, self.k)


class Passes(NamedTuple):
    """The size of one timed pass of every stage, as large as the evaluation gives it to a device.

    `photos` and `captions` are embedded together; re-ranking takes `texts` over `images`, about the tokens that its
    scheduler gives a pass, and officially `official_pairs` of an image.
    """

    photos: int = 4
    captions: int = 64
    texts: int = 160
    images: int = 1
    official_pairs: int = 16

    @classmethod
    def of(cls, device: torch.device, sizes: Sizes) -> Passes:
        """Return the passes of a device.

        With the passes of a CPU, most time on a GPU would be launches: it would seem several times slower.
        """
        if device.type != "cuda":
            return cls()
        # An image has the candidates of both directions, and a pass as many of them as fit.
        candidates = max(1, sizes.pairs // sizes.images)
        texts = max(1, int(TOKEN_BUDGET["cuda"] / statistics.fmean(sizes.lengths)))
        images = min(64, max(1, round(texts / candidates)))
        return cls(64, 1024, texts, images, min(sizes.k, sizes.texts))


def receipt(config: XFMConfig, sizes: Sizes) -> dict[str, float]:
    """Return the FLOPs of the evaluation, from the official procedure to ours, one saving after the other."""
    sample, pairs = sizes.lengths, sizes.pairs
    vision = flops.image_encoder(config, sizes.images).total
    vision += flops.contrastive_features(config, sizes.images, sizes.texts).total
    text = flops.text_encoder(config, sample).total * sizes.texts / len(sample)
    padded_text = flops.text_encoder(config, [MAX_TOKENS]).total * sizes.texts
    memory = flops.image_memory(config, 1).total

    def pair(
        lengths: Sequence[int], *, first_token_only: bool = False, self_attended: bool = False
    ) -> float:
        """Return the FLOPs of fusing and scoring one pair."""
        fusion = flops.fusion(
            config, lengths, first_token_only=first_token_only, self_attended=self_attended
        )
        return fusion.total / len(lengths) + flops.matching_head(config, 1).total

    first = flops.first_self_attention(config, sample).total * sizes.texts / len(sample)
    padded_pair = pair([MAX_TOKENS])
    shared_memory = vision + sizes.images * memory
    packed = shared_memory + text
    last_layer = pair(sample, first_token_only=True)
    first_layer = pair(sample, first_token_only=True, self_attended=True)
    return {
        "official procedure": vision + padded_text + pairs * (padded_pair + memory),
        "keys and values of an image once": shared_memory + padded_text + pairs * padded_pair,
        "no padding": packed + pairs * pair(sample),
        "last layer for token 0 alone": packed + pairs * last_layer,
        "first self-attention of a text once": packed + first + pairs * first_layer,
    }


class Stage(NamedTuple):
    """A stage of a procedure: how often it comes in the evaluation, and one pass of it."""

    repeats: float
    run: Callable[[], object]


@benchmark(
    "coco",
    title="A whole retrieval evaluation",
    reference=OFFICIAL,
    about="cost of COCO's 5k retrieval evaluation, official and xfm-fast, projected from the times of its parts",
)
def run(run: Run) -> Iterator[Case]:
    """Add the rows of whole evaluations, projected from the times of their stages."""
    scale = Scale.of("retrieve", run.options, run.device)
    run.progress.begin(3)
    material = prepare(run, scale.image_size)
    run.progress.stage("rates of all parts")
    sizes = Sizes(IMAGES, TEXTS, CANDIDATES, material.encoded(material.collection.captions).lengths)
    passes = Passes.of(run.device, sizes)
    procedures = {f"{OFFICIAL} fp32": _stages(material, scale, passes, sizes, None)}
    for dtype in run.dtypes:
        procedures[f"{OURS} {dtype}"] = _stages(material, scale, passes, sizes, dtype)

    def block(call: Callable[[], object]) -> list[float]:
        with torch.inference_mode():
            start = time.perf_counter()
            call()
            wait_for(run.device)
            return [time.perf_counter() - start]

    samples = interleave(
        {
            f"{name}: {key}": partial(block, stage.run)
            for key, stages in procedures.items()
            for name, stage in stages.items()
        },
        run.probes,
        rounds=3,
        budget_s=scale.budget_s,
        max_rounds=30,
        warmups=1,
        deadline=time.perf_counter() + 2 * scale.budget_s,
        on_step=run.progress.step,
    )
    if samples.interrupted:
        raise KeyboardInterrupt
    costs = receipt(material.config(scale.image_size), sizes)
    rows: list[Result] = []
    for key, stages in procedures.items():
        row = _row(key, stages, samples, scale.image_size, sizes)
        row.extra["flops"] = list(costs.values())[0 if row.backend == OFFICIAL else -1]
        rows.append(row)
        if row.ours and row.seconds and rows[0].seconds:
            row.against = [compared(f"{OFFICIAL} fp32", row.dtype, rows[0].seconds, row.seconds)]
    rows[1].extra["receipt"] = costs
    run.add(rows)
    note_paths(run)
    yield from ()


def _row(
    key: str, stages: dict[str, Stage], samples: Samples, image_size: int, sizes: Sizes
) -> Result:
    """Return the result of a procedure, by its backend and dtype."""
    backend, dtype = key.split(" ")
    seconds = {
        name: [stage.repeats * second for second in samples.seconds(f"{name}: {key}")]
        for name, stage in stages.items()
    }
    failures = [why for name, why in samples.failures.items() if name.endswith(f": {key}")]
    row = Result(
        work="coco",
        name=f"evaluate {IMAGES:,} images of {image_size} px x {TEXTS:,} texts, k = {sizes.k}",
        backend=backend,
        label=backend,
        dtype=dtype,
        status="measured",
        reason="projected from the times of its parts",
        unit="evaluations",
        items=1,
        contended=samples.readings.contended(dtype),
    )
    if failures:
        row.status, row.reason = "failed", failures[0]
    else:
        row.seconds = [float(sum(times)) for times in zip(*seconds.values(), strict=True)]
    row.extra = {
        "stages": {name: statistics.median(times) for name, times in seconds.items() if times},
        "pairs": sizes.pairs,
    }
    return row


def _stages(
    material: Material, scale: Scale, passes: Passes, sizes: Sizes, dtype: str | None
) -> dict[str, Stage]:
    """Return the stages of our procedure in a dtype; without one, of the official procedure."""
    torch_dtype = torch.float32 if dtype is None else DTYPES[dtype]
    model: Any = material.weights.model(scale.image_size, torch_dtype)
    scorer = ModelScorer(model)
    model = OfficialTwin(model) if dtype is None else model
    pixels = material.pixels(passes.photos, scale.image_size).to(torch_dtype)
    texts = material.texts(max(passes.texts, passes.captions, passes.official_pairs))
    captions = Texts(*(tensor[: passes.captions] for tensor in texts))
    candidates = passes.official_pairs if dtype is None else passes.texts
    texts = Texts(*(tensor[:candidates] for tensor in texts))
    with torch.inference_mode():
        images, embeds = model.encode_image(pixels[: passes.images]), model.encode_text(*texts)
    stages = {
        "embed images": Stage(
            IMAGES / passes.photos, lambda: model.project_image(model.encode_image(pixels))
        ),
        "embed texts": Stage(
            TEXTS / passes.captions, lambda: model.project_text(model.encode_text(*captions))
        ),
    }
    if dtype is None:
        stages["fusion, keys and values included"] = Stage(
            sizes.pairs / passes.official_pairs,
            lambda: model.rerank_image(images[0], embeds, texts.mask),
        )
        return stages
    with torch.inference_mode():
        packing = Packing.from_mask(texts.mask)
        tokens = packing.pack(embeds)
        sequences = Sequences.from_lengths(packing.cu_seqlens.diff().long())
        prepared, memory = scorer.prepare(tokens, sequences), scorer.memory(images)
    per_image = torch.full((passes.images,), candidates // passes.images, device=material.device)
    per_image[0] += candidates % passes.images
    groups = ImageGroups(offsets(per_image))
    stages["first self-attention"] = Stage(
        TEXTS / passes.texts, lambda: scorer.prepare(tokens, sequences)
    )
    stages["image memory"] = Stage(IMAGES / passes.images, lambda: scorer.memory(images))
    stages["fusion and matching head"] = Stage(
        sizes.pairs / passes.texts, lambda: scorer.scores(prepared, sequences, memory, groups)
    )
    return stages
