"""Linear probes read off what is linear in the features and nothing else."""

from __future__ import annotations

import pytest
import torch

from xfm_fast.errors import InputError
from xfm_fast.reproduce.probes import Rows, balanced_accuracy, fit_probe, probe


def _rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 6, generator=generator) * torch.tensor([1.0, 10, 0.1, 1, 1, 1])
    targets = (features[:, 1] / 10 + features[:, 2] * 10 > 0).long() + (features[:, 3] > 1).long()
    return features, targets


def test_the_closed_form_is_where_gradient_descent_ends() -> None:
    features, targets = _rows(80, 0)
    fitted = fit_probe(features, targets, classes=3, strength=0.1)
    x = ((features - features.mean(0)) / features.std(0, correction=0)).double()
    onehot = torch.nn.functional.one_hot(targets, 3).double()
    weights = torch.stack([1 / (3 * (targets == target).sum()) for target in targets]).double()
    weight = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weights[:, None] * (onehot - x @ weight - bias) ** 2).sum() + 0.1 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(fitted.weight, weight.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fitted.bias, bias.detach(), atol=1e-6, rtol=1e-5)


def test_what_is_linear_is_read_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(600, 8, generator=generator)
    made = {
        "linear": (features[:, 0] + features[:, 1] > 0).long(),
        "product": (features[:, 0] * features[:, 1] > 0).long(),
        "noise": torch.randint(2, (600,), generator=generator),
    }
    parts = [
        Rows(features[part], {task: targets[part] for task, targets in made.items()})
        for part in (slice(0, 300), slice(300, 400), slice(400, 600))
    ]
    found = probe(parts[0], parts[1], parts[2], dict.fromkeys(made, 2))
    assert found["linear"] > 0.95
    assert abs(found["product"] - 0.5) < 0.15
    assert abs(found["noise"] - 0.5) < 0.15


def test_rare_classes_weigh_as_much_as_common_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    targets = (torch.arange(400) % 20 == 0).long()
    features = torch.randn(400, 4, generator=generator)
    features[:, 0] += 3 * targets
    predicted = fit_probe(features, targets, classes=2, strength=0.01).predict(features)
    assert balanced_accuracy(predicted, targets) > 0.85


def test_scale_and_offset_of_features_do_not_matter() -> None:
    features, targets = _rows(60, 3)
    plain = fit_probe(features, targets, classes=3, strength=0.1).scores(features)
    moved = features * 50 - 7
    torch.testing.assert_close(
        fit_probe(moved, targets, classes=3, strength=0.1).scores(moved), plain, atol=1e-4, rtol=0
    )


def test_constant_features_predict_something() -> None:
    fitted = fit_probe(torch.ones(5, 2), torch.tensor([0, 1, 1, 0, 1]), classes=2, strength=0.1)
    assert fitted.scores(torch.ones(3, 2)).isfinite().all()


def test_validation_rows_choose_the_strength() -> None:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(60, 50, generator=generator)
    targets = (features[:, 0] + 0.8 * torch.randn(60, generator=generator) > 0).long()
    parts = [Rows(features[i::3], {"task": targets[i::3]}) for i in range(3)]
    both = probe(parts[0], parts[1], parts[2], {"task": 2}, strengths=(1e-6, 1.0))["task"]
    alone = [
        probe(parts[0], parts[1], parts[2], {"task": 2}, strengths=(strength,))["task"] for strength in (1e-6, 1.0)
    ]
    on_validation = [
        balanced_accuracy(
            fit_probe(parts[0].features, parts[0].targets["task"], classes=2, strength=strength).predict(
                parts[1].features
            ),
            parts[1].targets["task"],
        )
        for strength in (1e-6, 1.0)
    ]
    assert on_validation[0] != on_validation[1]
    assert both == alone[on_validation.index(max(on_validation))]


def test_balanced_accuracy_is_the_mean_over_classes() -> None:
    targets = torch.tensor([0, 0, 0, 0, 2])
    assert balanced_accuracy(torch.tensor([0, 0, 0, 1, 1]), targets) == (0.75 + 0) / 2
    assert balanced_accuracy(targets, targets) == 1


@pytest.mark.parametrize(
    ("features", "targets", "strength"),
    [
        (torch.ones(3, 2), torch.zeros(2).long(), 0.1),
        (torch.ones(3), torch.zeros(3).long(), 0.1),
        (torch.ones(0, 2), torch.zeros(0).long(), 0.1),
        (torch.ones(3, 2), torch.zeros(3).long(), 0.0),
    ],
)
def test_impossible_probes_are_refused(features: torch.Tensor, targets: torch.Tensor, strength: float) -> None:
    with pytest.raises(InputError):
        fit_probe(features, targets, classes=2, strength=strength)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(InputError):
        balanced_accuracy(torch.zeros(0), torch.zeros(0))
