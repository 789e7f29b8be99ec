"""How an export is judged: thresholds by dtype, and the errors, cosines and ranks of its outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .expected import Reference
from .graphs import DTYPES, is_memory
from .manifest import Check, GraphRecord, Manifest, RankCheck
from .request import BUDGET, DType, GraphName
from .runtimes import Runtime
from .runtimes.onnx_runtime import OnnxRuntime

Feed = Mapping[str, np.ndarray]
"""Inputs of a graph in fp32 and int64."""


class Comparison(ABC):
    """The graphs of an export run on the inputs of a reference, and their outputs compared with its results."""

    description: str
    """Library, version and device that ran them."""

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

    @abstractmethod
    def run(self) -> tuple[list[Check], list[RankCheck]]:
        """Run every graph over the range of its shapes and compare all outputs with the reference."""

    @abstractmethod
    def feeds(self, record: GraphRecord, *, judging: bool = False) -> list[Feed]:
        """Return the inputs that 8-bit scales of a graph are fitted on, or those that judge them."""

    def open_runtime(self, manifest: Manifest) -> Runtime | str:
        """Return the runtime of a session: of ONNX files on the CPU, where bf16 graphs are computed in fp32."""
        if manifest.kind == "onnx" and self.runtime in ("auto", OnnxRuntime.name):
            return OnnxRuntime(manifest, torch.device("cpu"), compares=True)
        return self.runtime


def calibration_part(reference: Reference, *, judging: bool = False) -> tuple[Tensor, Tensor]:
    """Return the images and texts, by index, that 8-bit scales are fitted on, or the others, which judge them.

    A single one is in both. The reference has the memory of image 0, which judges; text 0 is the shortest, whose
    entries are extreme.
    """
    images = torch.arange(0 if judging or reference.images == 1 else 1, reference.images, 2)
    texts = torch.arange(1 if judging and reference.texts > 1 else 0, reference.texts, 2)
    return images, texts


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """Yield 0 to count - 1 in chunks of one size; the last chunk wraps around."""
    for start in range(0, count, size):
        yield torch.arange(start, start + size) % count


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
    pooled: bool = True  # whether tokens are judged that the graph pools too

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
    candidates keep their rank. Tokens that the graph pools too have no limit.
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
        pooled=False,
    )


def pooled_tokens(outputs: Collection[str]) -> set[str]:
    """Return the outputs of a graph that another output of it pools."""
    return {"last_hidden_state"} & {*outputs} if "sentence_embedding" in outputs else set()


def _check_name(name: str) -> str:
    """Return the name of the check that covers a reference tensor; keys and values of all layers share one."""
    if is_memory(name) or name.startswith("decoder_"):
        return "memory"
    return "logits" if name == "step_logits" else name


# Outputs with enough entries for a cosine to be meaningful.
_DIRECTIONS = ("image_embeds", "image_feature", "text_embeds", "packed_embeds", "text_feature")
_ENCODED = ("last_hidden_state", "pooler_output", "sentence_embedding")
DIRECTIONS = frozenset((*_DIRECTIONS, *_ENCODED, "fused", "fused_tokens", "memory"))


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
        reported = set() if threshold.pooled else pooled_tokens(self.outputs)
        for output, errors in self.outputs.items():
            allowed, least_cosine = inf, -1.0
            if output not in reported:
                allowed = threshold.allowed(output, errors.extent, reference, dtype)
                least_cosine = threshold.cosine
            directed = output in DIRECTIONS
            # Comparisons with NaN are false: NaN fails.
            aligned = not directed or errors.cosine >= least_cosine
            checks.append(
                Check(
                    graph=self.graph,
                    output=output,
                    shapes=[[*shape] for shape in shapes],
                    max_error=_finite(errors.largest),
                    mean_error=_finite(errors.total / max(errors.count, 1)),
                    allowed=_finite(allowed),
                    cosine=_finite(errors.cosine) if directed else None,
                    least_cosine=least_cosine if directed else None,
                    passed=errors.largest <= allowed and aligned,
                )
            )
        return checks


def _finite(value: float) -> float | None:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return value if isfinite(value) else None


def rank_check(
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
    return judge_agreement(graph, agreement, tie, threshold)


def judge_agreement(
    graph: GraphName | Literal["all"],
    agreement: tuple[int, float, float] | None,
    tie: float,
    threshold: Threshold,
) -> list[RankCheck]:
    """Judge the candidates, and the shares that agree with ties and without, of a comparison; None has no check."""
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
