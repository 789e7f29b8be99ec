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

from ..backends.engine import wait_for
from ..backends.official_algorithm import OfficialTwin
from ..inputs import MAX_TOKENS, Material, Texts
from ..measure import Case, Run, benchmark, compared, interleave
from ..record import OFFICIAL, OURS, Result
from ..timing import DTYPES
from .model import Scale, note_paths, prepare

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
        """Pairs that the official evaluation scores: both directions, each for itself."""
        return flops.official_pairs(self.images, self.texts, self.k)


class Passes(NamedTuple):
    """The size of one timed pass of every part, as large as the evaluation gives it to a device.

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
        """With the passes of a CPU, most time on a GPU would be launches: it would seem several times slower."""
        if device.type != "cuda":
            return cls()
        # An image has the candidates of both directions, and a pass as many of them as fit.
        each = max(1, sizes.pairs // sizes.images)
        texts = max(1, int(TOKEN_BUDGET["cuda"] / statistics.fmean(sizes.lengths)))
        images = min(64, max(1, round(texts / each)))
        return cls(64, 1024, texts, images, min(sizes.k, sizes.texts))


def receipt(config: XFMConfig, sizes: Sizes) -> dict[str, float]:
    """FLOPs of the evaluation, from the official procedure to ours, one saving after the other."""
    sample, pairs = sizes.lengths, sizes.pairs
    vision = flops.image_encoder(config, sizes.images).total
    vision += flops.contrastive_features(config, sizes.images, sizes.texts).total
    text = flops.text_encoder(config, sample).total * sizes.texts / len(sample)
    padded = flops.text_encoder(config, [MAX_TOKENS]).total * sizes.texts
    memory = flops.image_memory(config, 1).total

    def fusion(lengths: Sequence[int], *, first_only: bool = False, shared: bool = False) -> float:
        whole = flops.fusion(
            config, lengths, first_token_only=first_only, self_attended=shared
        ).total
        return whole / len(lengths) + flops.matching_head(config, 1).total

    first = flops.first_self_attention(config, sample).total * sizes.texts / len(sample)
    shared_memory = vision + sizes.images * memory
    packed = shared_memory + text
    return {
        "official procedure": vision + padded + pairs * (fusion([MAX_TOKENS]) + memory),
        "keys and values of an image once": shared_memory + padded + pairs * fusion([MAX_TOKENS]),
        "no padding": packed + pairs * fusion(sample),
        "last layer for token 0 alone": packed + pairs * fusion(sample, first_only=True),
        "first self-attention of a text once": packed
        + first
        + pairs * fusion(sample, first_only=True, shared=True),
    }


Part = tuple[float, Callable[[], object]]
"""A part of a procedure: how often it comes in the evaluation, and one pass of it."""


@benchmark("coco", title="A whole retrieval evaluation", reference=OFFICIAL)
def run(run: Run) -> Iterator[Case]:
    """Rows of whole evaluations, projected from the times of their parts."""
    scale = Scale.of("retrieve", run.options, run.device)
    run.progress.begin(3)
    material = prepare(run, scale.image_size)
    run.progress.stage("rates of all parts")
    sizes = Sizes(IMAGES, TEXTS, CANDIDATES, material.encoded(material.collection.captions).lengths)
    passes = Passes.of(run.device, sizes)
    procedures = {f"{OFFICIAL} fp32": _parts(material, scale, passes, sizes, None)}
    for dtype in run.dtypes:
        procedures[f"{OURS} {dtype}"] = _parts(material, scale, passes, sizes, dtype)

    def block(call: Callable[[], object]) -> list[float]:
        with torch.inference_mode():
            begun = time.perf_counter()
            call()
            wait_for(run.device)
            return [time.perf_counter() - begun]

    blocks = {
        f"{part}: {key}": partial(block, call)
        for key, parts in procedures.items()
        for part, (_, call) in parts.items()
    }
    samples = interleave(
        blocks, run.probes, rounds=3, budget_s=scale.budget_s, most_rounds=30, warmups=1,
        deadline=time.perf_counter() + 2 * scale.budget_s, on_step=run.progress.step,
    )  # fmt: skip
    if samples.interrupted:
        raise KeyboardInterrupt
    steps, rows = receipt(material.config(scale.image_size), sizes), list[Result]()
    for key, parts in procedures.items():
        backend, dtype = key.split(" ")
        stages = {
            part: [times * second for second in samples.seconds(f"{part}: {key}")]
            for part, (times, _) in parts.items()
        }
        failures = [why for name, why in samples.failures.items() if name.endswith(f": {key}")]
        row = Result(
            work="coco", backend=backend, label=backend, dtype=dtype, unit="evaluations", items=1,
            name=f"evaluate {IMAGES:,} images of {scale.image_size} px x {TEXTS:,} texts, k = {sizes.k}",
            status="failed" if failures else "measured",
            reason=failures[0] if failures else "projected from the times of its parts",
            seconds=[] if failures else [float(sum(one)) for one in zip(*stages.values(), strict=True)],
            contended=samples.readings.contended(dtype),
            extra={
                "stages": {part: statistics.median(seconds) for part, seconds in stages.items() if seconds},
                "flops": list(steps.values())[0 if backend == OFFICIAL else -1], "pairs": sizes.pairs,
            },
        )  # fmt: skip
        rows.append(row)
        if row.ours and row.seconds and rows[0].seconds:
            row.against = [compared(f"{OFFICIAL} fp32", dtype, rows[0].seconds, row.seconds)]
    rows[1].extra["receipt"] = steps
    run.add(rows)
    note_paths(run)
    yield from ()


def _parts(
    material: Material, scale: Scale, passes: Passes, sizes: Sizes, dtype: str | None
) -> dict[str, Part]:
    """The parts of our procedure in a dtype; without one, of the official procedure."""
    kind = torch.float32 if dtype is None else DTYPES[dtype]
    model: Any = material.subjects.model(scale.image_size, kind)
    scorer = ModelScorer(model)
    model = OfficialTwin(model) if dtype is None else model
    pixels = material.pixels(passes.photos, scale.image_size).to(kind)
    given = material.texts(max(passes.texts, passes.captions, passes.official_pairs))
    ids, mask = (tensor[: passes.captions] for tensor in given)
    of_pass = Texts(
        *(tensor[: passes.official_pairs if dtype is None else passes.texts] for tensor in given)
    )
    with torch.inference_mode():
        images, embeds = model.encode_image(pixels[: passes.images]), model.encode_text(*of_pass)
    parts: dict[str, Part] = {
        "embed images": (
            IMAGES / passes.photos,
            lambda: model.project_image(model.encode_image(pixels)),
        ),
        "embed texts": (
            TEXTS / passes.captions,
            lambda: model.project_text(model.encode_text(ids, mask)),
        ),
    }
    if dtype is None:
        return parts | {
            "fusion, keys and values included": (
                sizes.pairs / passes.official_pairs, lambda: model.rerank_image(images[0], embeds, of_pass.mask)
            )
        }  # fmt: skip
    with torch.inference_mode():
        packing = Packing.from_mask(of_pass.mask)
        tokens = packing.pack(embeds)
        sequences = Sequences.from_lengths(packing.cu_seqlens.diff().long())
        prepared, memory = scorer.prepare(tokens, sequences), scorer.memory(images)
    texts = torch.full((passes.images,), passes.texts // passes.images, device=material.device)
    texts[0] += passes.texts % passes.images
    groups = ImageGroups(offsets(texts))
    return parts | {
        "first self-attention": (TEXTS / passes.texts, lambda: scorer.prepare(tokens, sequences)),
        "image memory": (IMAGES / passes.images, lambda: scorer.memory(images)),
        "fusion and matching head": (
            sizes.pairs / passes.texts, lambda: scorer.scores(prepared, sequences, memory, groups)
        ),
    }  # fmt: skip
