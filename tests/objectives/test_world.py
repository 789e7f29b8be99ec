"""One global batch on 1, 2 and 4 processes: the same losses, and the same gradients after DDP's mean."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
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


def test_gradients_that_ddp_itself_takes(found: Found) -> None:
    _, expected = alone("pairs")
    names = set().union(*expected.values())
    totals = {n: torch.stack([of[n] for of in expected.values() if n in of]).sum(0) for n in names}
    for result in found:
        reached = {name: gradient for name, gradient in result["wrapped"].items() if name in names}
        assert_same_gradients(reached, totals, "DDP")


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
    means = {name: sum(float(result["inside"][case][0][name]) for result in found) / size for name in shared}
    for name, mean in means.items():
        assert mean == pytest.approx(losses_of_all[name].item(), rel=1e-11), name
    for rank, result in enumerate(found):
        losses, gradients = result["inside"][case]
        expected_losses, expected = world.drawn_inside(case, rank, size)
        assert losses["itm"].item() == pytest.approx(expected_losses["itm"].item(), rel=1e-11)
        assert_same_gradients(gradients["itm"], expected["itm"], f"{case} on rank {rank}")
        if case == "pairs":
            assert losses["itm"].item() != pytest.approx(result["drawn"]["itm"].item(), rel=1e-6)


def test_rows_are_all_that_a_process_computes() -> None:
    """Two products of B x G, and no tensor of G x G."""
    seen: list[tuple[int, ...]] = []

    class Shapes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                seen.append(tuple(out.shape))
            return out

    from xfm_fast.objectives import AllPairs, contrastive_rows, sample_hard_negatives

    own, gathered = torch.randn(2, 2, 5), torch.randn(2, 16, 5)
    with Shapes():
        pairs = AllPairs(gathered[0], gathered[1], 4)
        contrastive_rows(own[0], own[1], 0.1, pairs)
        sample_hard_negatives(own[0], own[1], 0.1, gathered=pairs)
    assert (2, 16) in seen
    assert (16, 16) not in seen
