"""The whole retrieval evaluation of COCO's 5k test split: what the official procedure costs here, what ours, and why.

Without data of the user's the evaluation is projected: every part of both procedures is timed on this machine, at the
shape that it has in the evaluation, and multiplied by how often it comes. With data ours is run in full; the official
procedure in part if the whole would take too long, its scores compared with ours pair by pair.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from xfm_fast.benchmarks.coco_measured import measured_evaluation
from xfm_fast.benchmarks.contenders.engine import wait_for
from xfm_fast.benchmarks.contenders.registry import DTYPES, OFFICIAL, OURS
from xfm_fast.benchmarks.measuring import ratio_interval
from xfm_fast.benchmarks.receipts import Sizes, receipt
from xfm_fast.benchmarks.rounds import Block, Samples, run_rounds
from xfm_fast.benchmarks.row_making import interval
from xfm_fast.benchmarks.rows import Coco, Document, Evaluation, Interval, ReceiptStep
from xfm_fast.benchmarks.scenario_setting import ScenarioOptions, Setting, opened
from xfm_fast.benchmarks.scenarios import MAX_TOKENS, Texts
from xfm_fast.benchmarks.suite import Progress
from xfm_fast.packing import ImageGroups, Packing, Sequences, offsets
from xfm_fast.tasks.reranking import ModelScorer

# Of the test split of Karpathy and Fei-Fei, as the official evaluation reads it, and its k_test.
IMAGES, TEXTS, CANDIDATES = 5000, 25010, 256
# Texts of one pass over an image, about the tokens that the scheduler of re-ranking gives it.
_PASS_TEXTS = 160
_OFFICIAL_PAIRS = 16
_PHOTOS, _CAPTIONS = 4, 64


def run(options: ScenarioOptions, *, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Project the evaluation, or with `options.data` run it. An interruption (Ctrl-C) leaves the document without it.

    Raises:
        XFMError: an option, the checkpoint or the data cannot be used.
    """
    # No other contender takes part: their rates at the parts are rows of the scenarios.
    options = replace(options, scenario="retrieve", baselines=options.baselines or (OURS,))
    with opened(options, "coco", progress, command) as setting:
        setting.document.coco = _Evaluations(setting).measure()
    return setting.finish()


class _Evaluations:
    def __init__(self, setting: Setting) -> None:
        self.setting, self.material = setting, setting.material
        self.image_size = setting.scale.image_size
        self.config = self.material.config(self.image_size)
        self.given = self.material.texts(_PASS_TEXTS)
        collection = self.material.collection
        measured = setting.options.data is not None
        images = len(collection.names) if measured else IMAGES
        texts = len(collection.captions) if measured else TEXTS
        k = setting.options.k or CANDIDATES
        sample = self.material.tokenizer.encode(collection.captions, MAX_TOKENS)[1].sum(1).tolist()
        self.sizes = Sizes(images, texts, min(k, images, texts) if measured else k, sample)
        # The count of work for each part of a procedure, by its name.
        self.counts = {
            "embed images": self.sizes.images / _PHOTOS,
            "embed texts": self.sizes.texts / _CAPTIONS,
            "first self-attention": self.sizes.texts / _PASS_TEXTS,
            "image memory": float(self.sizes.images),
            "fusion and matching head": self.sizes.pairs / _PASS_TEXTS,
            "fusion, keys and values included": self.sizes.pairs / _OFFICIAL_PAIRS,
        }

    def measure(self) -> Coco:
        setting, measured = self.setting, self.setting.options.data is not None
        setting.progress.begin(4 if measured else 3)
        setting.progress.stage("rates of all parts")
        blocks = {f"{OFFICIAL} fp32|{part}": block for part, block in self._official_parts().items()}
        for dtype in setting.dtypes:
            blocks |= {f"{OURS} {dtype}|{part}": block for part, block in self._our_parts(dtype).items()}
        samples = run_rounds(
            blocks, setting.probes, setting.meter, rounds=3, budget_s=setting.scale.budget_s, most_rounds=30,
            on_step=setting.progress.step,
        )  # fmt: skip
        if samples.interrupted:
            raise KeyboardInterrupt
        steps = receipt(self.config, self.sizes)
        totals = {key: self._totals(key, samples) for key in dict.fromkeys(name.split("|")[0] for name in blocks)}
        evaluations = [self._projected(key, samples, totals[key], steps) for key in totals]
        # The first type that was measured is the one to compare in, as official results are in fp32.
        ours = f"{OURS} {setting.dtypes[0]}"
        official = f"{OFFICIAL} fp32"
        enough = len(totals[official]) >= 3
        low, high = ratio_interval(totals[official], totals[ours]) if enough else (None, None)
        speed_up = statistics.median(totals[official]) / statistics.median(totals[ours])
        projected = Coco(
            origin="the sizes of COCO's 5k test split, with the lengths of the captions at hand",
            images=self.sizes.images,
            texts=self.sizes.texts,
            k=self.sizes.k,
            image_size=self.image_size,
            mean_length=statistics.fmean(self.sizes.lengths),
            padded_length=MAX_TOKENS,
            evaluations=evaluations,
            receipt=steps,
            speed_up=Interval(value=speed_up, low=low, high=high),
            note="pairs that are candidates in both directions are counted twice here; ours scores them once",
        )
        if not measured:
            return projected
        setting.progress.stage("the evaluation in full")
        return measured_evaluation(setting, projected, self.sizes)

    def _our_parts(self, dtype: str) -> dict[str, Block]:
        model = self.material.subjects.model(self.image_size, DTYPES[dtype])
        scorer = ModelScorer(model)
        pixels = self.material.pixels(_PHOTOS, self.image_size).to(DTYPES[dtype])
        ids, mask = (tensor[:_CAPTIONS] for tensor in self.given)
        with torch.inference_mode():
            image = model.encode_image(pixels[:1])
            packing = Packing.from_mask(self.given.mask)
            tokens = packing.pack(model.encode_text(*self.given))
            sequences = Sequences.from_lengths(packing.cu_seqlens.diff().long())
            prepared, memory = scorer.prepare(tokens, sequences), scorer.memory(image)
        groups = ImageGroups(offsets(torch.tensor([len(self.given.ids)], device=self.material.device)))
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
        twin = self.material.subjects.twin(self.image_size, torch.float32)
        pixels = self.material.pixels(_PHOTOS, self.image_size)
        ids, mask = (tensor[:_CAPTIONS] for tensor in self.given)
        few = Texts(*(tensor[:_OFFICIAL_PAIRS] for tensor in self.given))
        with torch.inference_mode():
            image, embeds = twin.encode_image(pixels[:1])[0], twin.encode_text(*few)
        return self._timed(
            {
                "embed images": lambda: twin.project_image(twin.encode_image(pixels)),
                "embed texts": lambda: twin.project_text(twin.encode_text(ids, mask)),
                "fusion, keys and values included": lambda: twin.rerank_image(image, embeds, few.mask),
            }
        )

    def _timed(self, parts: Mapping[str, Callable[[], object]]) -> dict[str, Block]:
        def block(run: Callable[[], object]) -> list[float]:
            with torch.inference_mode():
                begun = time.perf_counter()
                run()
                wait_for(self.material.device)
                return [time.perf_counter() - begun]

        for run in parts.values():
            block(run)
        return {name: lambda run=run: block(run) for name, run in parts.items()}

    def _parts(self, key: str, samples: Samples) -> dict[str, list[float]]:
        """Seconds that each part takes in all, by round."""
        return {
            (part := name.split("|")[1]): [second * self.counts[part] for second in seconds]
            for name, seconds in samples.seconds.items()
            if name.split("|")[0] == key
        }

    def _totals(self, key: str, samples: Samples) -> list[float]:
        return [sum(parts) for parts in zip(*self._parts(key, samples).values(), strict=True)]

    def _projected(
        self, key: str, samples: Samples, totals: list[float], steps: list[ReceiptStep]
    ) -> Evaluation:  # fmt: skip
        contender, dtype = key.split(" ")
        count = steps[0].flops if contender == OFFICIAL else steps[-1].flops
        return Evaluation(
            procedure="official-algorithm" if contender == OFFICIAL else "xfm-fast",
            dtype=dtype,
            kind="projected",
            pairs=self.sizes.pairs,
            flops=count,
            flops_per_s=count / statistics.median(totals),
            seconds={part: statistics.median(values) for part, values in self._parts(key, samples).items()},
            total_s=interval(totals, 0.5),
        )
