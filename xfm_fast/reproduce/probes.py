"""Linear probes: how much of an attribute can be read off frozen embeddings by a linear map.

The probe is ridge regression onto the classes, in closed form: it has no learning rate, no seed and no epochs, so two
encoders differ by their embeddings alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties, relative to the mean variance of the features, out of which the validation rows choose."""


@dataclass(frozen=True)
class LinearProbe:
    """A linear map from standardised features to class scores."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """`[N, D]` features → `[N, classes]`."""
        return (features.double() - self.mean) / self.scale @ self.weight + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """The class of every row: `[N, D]` → `[N]`."""
        return self.scores(features).argmax(1)


def fit_probe(features: Tensor, targets: Tensor, *, classes: int, strength: float) -> LinearProbe:
    """Ridge regression of one-hot targets, every class weighing the same however rare it is.

    Args:
        features: `[N, D]`.
        targets: `[N]` int64 below `classes`.
        classes: number of classes; those without a row are never predicted before others.
        strength: of the penalty, relative to the mean variance of the features.

    Returns:
        The minimiser of `Σ wₙ |onehotₙ - xₙW - b|² + strength |W|²`, with weights summing to 1, in fp64.

    Raises:
        InputError: shapes that do not belong together, no rows, or a strength that is not positive.
    """
    if features.ndim != 2 or targets.shape != features.shape[:1] or not len(features):
        raise InputError(
            f"features are {[*features.shape]} and targets {[*targets.shape]}; they must be [N, D] and [N] with N > 0"
        )
    if strength <= 0:
        raise InputError(f"strength={strength} must be positive")
    x = features.double()
    mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-8)
    x = (x - mean) / scale
    onehot = F.one_hot(targets, classes).double()
    weights = (1 / onehot.sum(0).clamp_min(1))[targets]
    weights = (weights / weights.sum())[:, None]
    # Centring with the weighted means leaves the bias out of the penalty.
    x_mean, y_mean = (weights * x).sum(0), (weights * onehot).sum(0)
    centred = x - x_mean
    gram = centred.t() @ (weights * centred) + strength * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.t() @ (weights * (onehot - y_mean)))
    return LinearProbe(mean, scale, weight, y_mean - x_mean @ weight)


def balanced_accuracy(predicted: Tensor, targets: Tensor) -> float:
    """Mean over the classes that occur of the share of their rows that is right; chance is one by their number."""
    if predicted.shape != targets.shape or not len(targets):
        raise InputError(f"{[*predicted.shape]} predictions and {[*targets.shape]} targets; one each, and some")
    right = predicted == targets
    return sum(right[targets == value].double().mean().item() for value in targets.unique()) / len(targets.unique())


@dataclass(frozen=True)
class Rows:
    """Features `[N, D]` of some rows, and what is to be read off them, by task: `[N]` classes."""

    features: Tensor
    targets: dict[str, Tensor]


def probe(
    train: Rows, validation: Rows, test: Rows, classes: dict[str, int], *, strengths: Sequence[float] = STRENGTHS
) -> dict[str, float]:
    """Balanced accuracy on the test rows for every task.

    The strength of the penalty is the one that is best on the validation rows, task by task; test rows choose nothing.
    """
    accuracies = {}
    for task, count in classes.items():
        fitted = [
            fit_probe(train.features, train.targets[task], classes=count, strength=strength) for strength in strengths
        ]
        best = max(
            fitted,
            key=lambda one: balanced_accuracy(one.predict(validation.features), validation.targets[task]),
        )
        accuracies[task] = balanced_accuracy(best.predict(test.features), test.targets[task])
    return accuracies
