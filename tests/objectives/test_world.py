"""One global batch on 1, 2 and 4 processes: the same losses, and the same gradients after DDP's mean."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import Tensor

from tests.objectives import world

Found = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return world.run(request.param, tmp_path_factory.mktemp("world"))


@cache
def alone(case: str) -> world.Result:
    return world.alone(case)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert set(found) == set(expected), what
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        assert float((found[name] - gradient).abs().max()) <= 1e-10 * scale, f"{what}: {name}"


@pytest.mark.parametrize("case", world.CASES)
def test_losses_and_gradients(found: Found, case: str) -> None:
    expected_losses, expected = alone(case)
    for result in found:
        losses, gradients = result[case]
        assert set(losses) == set(expected_losses)
        for name, loss in expected_losses.items():
            assert losses[name].item() == pytest.approx(loss.item(), rel=1e-11), name
        for name, of_loss in expected.items():
            assert_same_gradients(gradients[name], of_loss, f"{case}: {name}")


def test_official_contrastive_gradient_is_too_small(found: Found) -> None:
    """The official gathering keeps the gradient of this process's slice, of a loss that every process has whole."""
    size = len(found)
    losses, gradients = found[0]["official"]
    expected_losses, expected = alone("pairs")
    for name, loss in expected_losses.items():
        assert losses[name].item() == pytest.approx(loss.item(), rel=1e-11)
        if name != "itc":
            assert_same_gradients(gradients[name], expected[name], name)
    # The temperature is no feature: every process has its gradient of the whole loss.
    scaled = {k: g if k == "temp" else g / size for k, g in expected["itc"].items()}
    assert_same_gradients(gradients["itc"], scaled, "itc")


def test_batches_of_different_sizes_are_refused_by_all(found: Found) -> None:
    for result in found:
        messages = result["refused"]
        assert "differ in texts (2, 3" in messages["size"]
        assert "differ in tokens per padded text (8, 9" in messages["width"]
        assert "differ in lists of image ids (1, 0" in messages["ids"]


@pytest.mark.parametrize("case", world.DRAWN)
def test_official_negatives_are_drawn_in_each_process(found: Found, case: str) -> None:
    """Matching is what a process makes of its pairs when it is alone; the contrastive loss still sees all of them."""
    size, (losses_of_all, _) = len(found), alone(case)
    shared = set(losses_of_all) - {"itm"}
    means = {
        name: sum(float(result["inside"][case][0][name]) for result in found) / size
        for name in shared
    }
    for name, mean in means.items():
        assert mean == pytest.approx(losses_of_all[name].item(), rel=1e-11), name
    for rank, result in enumerate(found):
        losses, gradients = result["inside"][case]
        expected_losses, expected = world.drawn_inside(case, rank, size)
        assert losses["itm"].item() == pytest.approx(expected_losses["itm"].item(), rel=1e-11)
        assert_same_gradients(gradients["itm"], expected["itm"], f"{case} on rank {rank}")
        if case == "pairs":
            assert losses["itm"].item() != pytest.approx(result["drawn"]["itm"].item(), rel=1e-6)
