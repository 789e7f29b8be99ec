"""The average of the weights: its rule, its swapping in, its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xfm_fast.errors import CheckpointError, InputError
from xfm_fast.training.ema import WeightAverage


def test_average_follows_the_weights() -> None:
    model = nn.Linear(2, 1, bias=False)
    history = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, -2.0]]), torch.tensor([[0.0, 5.0]])]
    with torch.no_grad():
        model.weight.copy_(history[0])
        average = WeightAverage(model, 0.75)
        expected = history[0].clone()
        for weights in history[1:]:
            model.weight.copy_(weights)
            average.update()
            expected = 0.75 * expected + 0.25 * weights
    torch.testing.assert_close(average.state_dict()["weight"], expected)
    own = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), expected)
        assert model.weight.requires_grad
    assert torch.equal(model.weight, own)


def test_own_weights_return_after_an_error_too() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    own = model.weight.detach().clone()

    def evaluate() -> None:
        with average.applied():
            assert not torch.equal(model.weight, own)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        evaluate()
    assert torch.equal(model.weight, own)


def test_low_precision_weights_are_averaged_in_fp32() -> None:
    """In bfloat16, 1 + 0.001 is 1, and the average would never leave its place."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1)
        average = WeightAverage(model, 0.999)
        model.weight.fill_(2)
        for _ in range(10):
            average.update()
    assert average.state_dict()["weight"].item() == pytest.approx(2 - 0.999**10, abs=1e-5)


def test_state_resumes_and_refuses_another_model() -> None:
    model = nn.Linear(2, 2)
    average, other = WeightAverage(model, 0.9), WeightAverage(nn.Linear(2, 2), 0.9)
    other.load_state_dict(average.state_dict())
    for name, value in average.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
        assert other.state_dict()[name] is not value
    with pytest.raises(CheckpointError, match="1 of another shape, such as weight"):
        other.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.ones(2)})
    with pytest.raises(CheckpointError, match="1 parameters are absent, 1 foreign"):
        other.load_state_dict({"weight": torch.ones(2, 2), "scale": torch.ones(2)})
    assert torch.equal(other.state_dict()["bias"], average.state_dict()["bias"])


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5])
def test_decay_out_of_range(decay: float) -> None:
    with pytest.raises(InputError, match=f"decay={decay}"):
        WeightAverage(nn.Linear(1, 1), decay)
