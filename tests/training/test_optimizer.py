"""The official optimizer: its groups, name by name, and its rule against a plain loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import load_json
from xfm_fast.config import XFMConfig
from xfm_fast.errors import ConfigError
from xfm_fast.models.xfm import XFM
from xfm_fast.training.optimizer import (
    AdamW,
    Moments,
    WeightAverage,
    adam_in_one_pass,
    adam_in_passes,
    optimizer_groups,
    schedule_factor,
)
from xfm_fast.training.recipe import Recipe
from xfm_fast.training.recipe_fields import OptimizerRecipe, ScheduleRecipe


def test_groups_are_the_official_ones() -> None:
    with torch.device("meta"):
        model = XFM(XFMConfig.preset("base"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer_groups(
        model, OptimizerRecipe(lr=1e-4, weight_decay=0.01, lr_mult=2), large_lr=Recipe.large_lr
    )
    official = load_json("optimizer_groups_base")["groups"]
    assert len(groups) == len(official) == 4
    dead = set()
    for ours, theirs in zip(groups, official, strict=True):
        assert (ours["lr"], ours["weight_decay"]) == (theirs["lr"], theirs["weight_decay"])
        found = {names.pop(id(parameter)) for parameter in ours["params"]}
        assert found <= set(theirs["names"])
        dead |= set(theirs["names"]) - found
    assert not names
    # The official model carries a captioning head in two encoders that no loss reads, and embeddings of the fusion
    # encoder that no input passes through; only the word matrix there has a use, as the output matrix of its head.
    unread = {
        f"fusion_encoder.roberta.embeddings.{name}"
        for name in ("LayerNorm.bias", "LayerNorm.weight")
    }
    unread |= {
        f"fusion_encoder.roberta.embeddings.{name}_embeddings.weight"
        for name in ("position", "token_type")
    }
    assert {name for name in dead if ".lm_cap_head." not in name} == unread
    assert len(dead) == 16


def test_groups_leave_out_what_is_frozen_and_take_other_heads() -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "cls_head": nn.Linear(2, 2)})
    recipe = OptimizerRecipe(lr=1.0, weight_decay=0.5, lr_mult=3)
    model["body"].requires_grad_(False)
    groups = optimizer_groups(model, recipe, large_lr=("cls_head",))
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (3, 0.5, 1),
        (3, 0, 1),
    ]
    (group,) = optimizer_groups(
        model, recipe.model_copy(update={"decay_all": True}), large_lr=("cls_head",)
    )
    assert (group["weight_decay"], len(group["params"])) == (0.5, 2)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen"):
        optimizer_groups(model, recipe, large_lr=())


def test_position_tables_may_learn_faster_than_the_rest() -> None:
    model = XFM(XFMConfig.preset("tiny"))
    recipe = OptimizerRecipe(lr=1.0, weight_decay=0.5, lr_mult=3, table_lr_mult=10)
    *others, tables = optimizer_groups(model, recipe, large_lr=Recipe.large_lr)
    wanted = [
        p for name, p in model.named_parameters() if name.endswith("relative_position_bias_table")
    ]
    assert len(wanted) == 3
    assert (tables["lr"], tables["weight_decay"]) == (10, 0)
    assert {id(p) for p in tables["params"]} == {id(p) for p in wanted}
    assert [(group["lr"], group["weight_decay"]) for group in others] == [
        (1, 0.5),
        (1, 0),
        (3, 0.5),
        (3, 0),
    ]
    grouped = [id(p) for group in (*others, tables) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


LR, BETAS, EPS, DECAY = 0.03, (0.9, 0.98), 1e-3, 0.1


class PlainAdamW:
    """The rule in scalars of Python, one element at a time."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.step = values.tolist(), 0
        self.first, self.second = [0.0] * len(self.values), [0.0] * len(self.values)

    def update(self, gradient: list[float]) -> None:
        self.step += 1
        for i, g in enumerate(gradient):
            self.first[i] = BETAS[0] * self.first[i] + (1 - BETAS[0]) * g
            self.second[i] = BETAS[1] * self.second[i] + (1 - BETAS[1]) * g * g
            size = LR * math.sqrt(1 - BETAS[1] ** self.step) / (1 - BETAS[0] ** self.step)
            moved = self.values[i] - size * self.first[i] / (math.sqrt(self.second[i]) + EPS)
            self.values[i] = moved - LR * DECAY * moved


@pytest.mark.parametrize("zero_grad", ["none", "zeros"])
def test_rule_and_what_happens_without_a_gradient(zero_grad: str) -> None:
    parameters = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (3, 5, 4)]
    plain = [PlainAdamW(parameter.detach()) for parameter in parameters]
    optimizer = AdamW(parameters, LR, BETAS, EPS, DECAY, zero_grad=zero_grad)  # pyright: ignore[reportArgumentType]
    # The third never has a gradient, the second sometimes.
    for reached in ({0}, {0, 1}, {0}, {1}, {0, 1}):
        for number in reached:
            gradient = torch.randn_like(parameters[number])
            held = parameters[number].grad
            parameters[number].grad = gradient if held is None else held + gradient
        for parameter, twin in zip(parameters, plain, strict=True):
            if parameter.grad is not None:
                twin.update(parameter.grad.tolist())
        optimizer.step()
        optimizer.zero_grad()
    steps = [twin.step for twin in plain]
    assert steps == ([4, 3, 0] if zero_grad == "none" else [5, 4, 0])
    for parameter, twin in zip(parameters, plain, strict=True):
        expected = torch.tensor(twin.values, dtype=torch.float64)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("move", [adam_in_passes, adam_in_one_pass])
def test_torch_rule_is_that_of_torch(
    move: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients near eps, where it matters when eps is added; parameters of other ages."""
    monkeypatch.setattr("xfm_fast.training.optimizer.adam_in_one_pass", move)
    torch.manual_seed(5)
    start = [torch.randn(4, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    ways: list[list[nn.Parameter]] = [
        [nn.Parameter(value.clone()) for value in start] for _ in range(3)
    ]
    made = [
        AdamW(ways[0], LR, BETAS, EPS, 0.1, kind="torch"),
        torch.optim.AdamW(ways[1], LR, BETAS, EPS, 0.1),
        AdamW(ways[2], LR, BETAS, EPS, 0.1),
    ]
    for step in range(7):
        gradients = [torch.randn_like(value) * EPS for value in start[: 1 + step % 2]]
        for parameters, optimizer in zip(ways, made, strict=True):
            optimizer.zero_grad()
            for parameter, gradient in zip(parameters, gradients, strict=False):
                parameter.grad = gradient.clone()
            optimizer.step()
    for ours, theirs, other in zip(*ways, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert (other - theirs).abs().max() > 1e-3 * (theirs - start[len(theirs) == 5]).abs().max()


@pytest.mark.parametrize("move", [adam_in_passes, adam_in_one_pass])
def test_error_is_that_of_rounding(move: Callable[..., None]) -> None:
    """In fp32, for parameters of different ages, against the same numbers in fp64."""
    torch.manual_seed(3)
    shapes, ages = [(63, 111), (5,), (), (2, 3, 4)], [0.0, 7.0, 7.0, 400.0]
    exact = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    columns = [
        [torch.randn(shape, dtype=torch.float64).mul(0.1).float() for shape in shapes]
        for _ in range(3)
    ]
    gradients, first, second = columns[0], columns[1], [each.square() for each in columns[2]]
    values = [value.float() for value in exact]
    exact = [value.double() for value in values]
    steps, exact_steps = ([torch.tensor(age) for age in ages] for _ in range(2))
    g, m, v = ([each.double() for each in column] for column in (gradients, first, second))
    adam_in_passes(exact, Moments(g, m, v, exact_steps), LR, BETAS, EPS)
    versions = [each._version for each in (*values, *first, *second)]
    move(values, Moments(gradients, first, second, steps), LR, BETAS, EPS)
    assert [step.item() for step in steps] == [age + 1 for age in ages]
    for found, expected in zip((*values, *first, *second), (*exact, *m, *v), strict=True):
        assert (found.double() - expected).abs().max() <= 2 * torch.finfo(
            torch.float32
        ).eps * expected.abs().max()
    # By their versions cached tensors notice that a parameter was moved.
    assert all(t._version > v for t, v in zip((*values, *first, *second), versions, strict=True))


@pytest.mark.parametrize("zero_grad", ["none", "zeros"])
def test_state_resumes_to_the_bit(zero_grad: str) -> None:
    torch.manual_seed(1)
    gradients = torch.randn(6, 2, 4)

    def make(values: list[Tensor]) -> tuple[list[nn.Parameter], AdamW]:
        parameters = [nn.Parameter(value.clone()) for value in values]
        return parameters, AdamW(parameters, LR, weight_decay=DECAY, zero_grad=zero_grad)  # pyright: ignore[reportArgumentType]

    def run(parameters: list[nn.Parameter], optimizer: AdamW, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            for number, parameter in enumerate(parameters):
                if (step + number) % 2:
                    parameter.grad = gradients[step, number].clone()
            optimizer.step()

    start = [torch.ones(4), torch.zeros(4)]
    whole, optimizer = make(start)
    run(whole, optimizer, range(6))
    parameters, optimizer = make(start)
    run(parameters, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, optimizer = make([parameter.detach() for parameter in parameters])
    optimizer.load_state_dict(saved)
    run(resumed, optimizer, range(3, 6))
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        assert func is not torch.ops.aten._local_scalar_dense.default, (
            "a tensor was read on the host"
        )
        return func(*args, **(kwargs or {}))  # pyright: ignore[reportCallIssue]


def test_step_reads_no_tensor_on_the_host() -> None:
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = AdamW(parameters, weight_decay=DECAY)
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    moments = Moments([torch.ones(3)], [torch.ones(3)], [torch.ones(3)], [torch.tensor(1.0)])
    with _NoWaiting():
        optimizer.step()
        adam_in_passes([torch.ones(3)], moments, LR, BETAS, EPS, corrected=True)
    with _NoWaiting(), pytest.raises(AssertionError, match="host"):
        parameters[0].sum().item()


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


def factors(steps: int, lr: float = 1.0, **fields: object) -> list[float]:
    schedule = ScheduleRecipe.model_validate(fields)
    return [schedule_factor(schedule, step, steps=steps, lr=lr) for step in range(steps + 2)]


def test_linear_is_the_official_one() -> None:
    """0 at step 0, up over 2 steps, down to 0 at the last and staying there."""
    expected = [0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0]
    assert factors(8, warmup=2) == pytest.approx(expected)
    assert factors(8, warmup=0.25) == pytest.approx(expected)
    assert factors(2) == [1, 0.5, 0, 0]


def test_cosine() -> None:
    found = factors(12, kind="cosine", warmup=4, min_lr=0.2)
    assert found[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert found[6] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert found[8] == pytest.approx(0.6)
    assert found[12] == found[13] == pytest.approx(0.2)
