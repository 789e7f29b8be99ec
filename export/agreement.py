"""How close an export is to its model: errors, angles and ranks, and how close is close enough in each type."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.export.consumers import DTYPES, DType
from xfm_fast.export.graphs import GraphName
from xfm_fast.export.manifest import Check
from xfm_fast.export.reference import Reference


@dataclass(frozen=True)
class Threshold:
    """What an export in some type must reach.

    An error is allowed up to `absolute`, or, where rounding decides (`rounding` times), up to so many times the error
    that the model itself has in that type, plus two units in the last place of the largest entry: the rule by which
    the kernels are judged.

    Attributes:
        absolute: of embeddings, features, logits, boxes and scores.
        rounding: multiple of the model's own error.
        cosine: least, of any row of an embedding or feature.
        tie: scores closer than this to each other may swap their ranks; where rounding decides, twice the model's own
            error, which is as far as it can move two scores against each other.
        ranks: least share of candidates that keep their rank but for ties.
        relative: allowed beside `absolute`, as a share of the largest entry.
    """

    absolute: float
    rounding: float
    cosine: float
    tie: float
    ranks: float
    relative: float = 0.0

    def allowed(self, name: str, extent: float, reference: Reference, dtype: DType) -> float:
        """The largest error that an output may have whose largest entry is `extent`."""
        if not self.rounding:
            return self.absolute + self.relative * extent
        unit = torch.finfo(DTYPES[dtype]).eps * extent
        return self.rounding * reference.rounding[name] + 2 * unit

    def ties(self, reference: Reference) -> float:
        """The largest difference of two scores that may swap."""
        return max(self.tie, 2 * reference.rounding["scores"] if self.rounding else 0.0)


THRESHOLDS: dict[DType, Threshold] = {
    "fp32": Threshold(absolute=1e-4, rounding=0, cosine=0.99999, tie=1e-5, ranks=0.99),
    "fp16": Threshold(absolute=0, rounding=2, cosine=0.9999, tie=0, ranks=0.99),
    "bf16": Threshold(absolute=0, rounding=2, cosine=0.998, tie=0, ranks=0.99),
}

EIGHT_BIT = Threshold(absolute=0, rounding=0, cosine=0.9, tie=1e-5, ranks=0.0, relative=0.5)
"""Of exports whose products are int8 or fp8, in whatever type the rest is. It tells an export that lost the model from
one that costs accuracy; how much of it, the errors and ranks in the manifest say."""

# Everything else has too few entries for an angle to say anything.
_DIRECTIONS = ("image_embeds", "image_feature", "text_embeds", "text_feature", "fused", "fused_tokens", "memory")


@dataclass
class Findings:
    """The errors of a graph's outputs, gathered case by case."""

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
        # max() of a tensor keeps NaN, that of Python may lose it.
        errors.largest = float(torch.tensor([errors.largest, float(error.max())]).max())
        errors.total += float(error.sum())
        errors.count += error.numel()
        errors.extent = max(errors.extent, float(truth.abs().max()))
        if name in _DIRECTIONS:
            cosine = F.cosine_similarity(value.double(), truth.double(), dim=-1)
            errors.cosine = float(torch.tensor([errors.cosine, float(cosine.min())]).min())

    def add_scores(self, images: Tensor, texts: Tensor, scores: Tensor, reference: Reference) -> None:
        if self.scores is None:
            self.scores = torch.full((reference.images, reference.texts), torch.nan)
        self.scores[images, texts] = scores

    def check(self, output: str, threshold: Threshold, reference: Reference, dtype: DType) -> Check:
        errors = self.outputs[output]
        allowed = threshold.allowed(output, errors.extent, reference, dtype)
        directed = output in _DIRECTIONS
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


@dataclass
class _Errors:
    shapes: list[list[int]] = field(default_factory=list)
    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    extent: float = 0.0
    cosine: float = 1.0


@dataclass(frozen=True)
class RankAgreement:
    """How the order of candidates compares.

    Attributes:
        candidates: pairs of an image and a text that were ranked.
        agreeing: share of the candidates that stand right: none that the model scores higher by more than a tie is
            below them, and none that it scores lower by more than a tie is above.
        identical: share of the candidates whose place is the same number, ties or not.
    """

    candidates: int
    agreeing: float
    identical: float


def rank_agreement(found: Tensor, truth: Tensor, tie: float) -> RankAgreement | None:
    """Compare the order of the texts of every image.

    Args:
        found: `[I, T]` scores of the export, NaN where a pair was not scored.
        truth: `[I, T]` scores of the model.
        tie: differences of the model's scores that may swap.

    Returns:
        None where no image has two candidates.
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
    if not candidates:
        return None
    return RankAgreement(candidates, agreeing / candidates, identical / candidates)


def _finite(value: float) -> float | None:
    """JSON has no NaN; null stands for it."""
    return value if value == value and abs(value) != float("inf") else None
