"""Hard negatives: the rule of the official code, its distribution, determinism, and rows that have nothing to draw."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import load_tensors
from xfm_fast.kernels import reference
from xfm_fast.kernels.losses import sample_hard_negatives


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def diagonal(rows: int) -> Tensor:
    return torch.eye(rows, dtype=torch.bool)


def test_weights_of_the_official_code() -> None:
    vectors = load_tensors("tiny_a/outputs")
    inputs = load_tensors("tiny_a/inputs")
    temperature = load_tensors("tiny_a/weights")["temp"].double().clamp(0.001, 0.5)
    similarity = vectors["text_feat"].double() @ vectors["image_feat"].double().t() / temperature
    ids = inputs["idx"]
    for mask, suffix in ((diagonal(len(similarity)), ""), (ids[:, None] == ids[None, :], "_idx")):
        for name, values in (("t2i", similarity), ("i2t", similarity.t())):
            expected = vectors[f"hard_neg_weights_{name}{suffix}"]
            torch.testing.assert_close(reference.hard_negative_weights(values, mask), expected, rtol=1e-10, atol=1e-12)


def test_distribution() -> None:
    """Frequencies of 60,000 draws are within five deviations of the weights, the floor of 1e-5 included."""
    similarity = torch.tensor([3.0, 1.0, -40.0, 2.0, 0.0, 8.0])
    mask = torch.tensor([False, False, False, False, False, True])
    draws = 60_000
    found = sample_hard_negatives(similarity.expand(draws, 6), mask.expand(draws, 6), seeded(1))
    share = torch.bincount(found, minlength=6) / draws
    weights = reference.hard_negative_weights(similarity[None], mask[None])[0].double()
    expected = weights / weights.sum()
    assert (share - expected).abs().le(5 * (expected * (1 - expected) / draws).sqrt() + 1 / draws).all()
    assert share[5] == 0


def test_even_the_easiest_negative_can_be_drawn() -> None:
    similarity = torch.tensor([[0.0, 100.0, -100.0]]).expand(400_000, 3)
    mask = torch.tensor([[False, True, False]]).expand(400_000, 3)
    found = sample_hard_negatives(similarity, mask, seeded(0))
    assert 0.45 < float((found == 2).float().mean()) < 0.55


def test_rows_are_drawn_independently() -> None:
    found = sample_hard_negatives(torch.zeros(2, 50_000, 4)[0], torch.zeros(50_000, 4, dtype=torch.bool), seeded(3))
    pairs = torch.bincount(found[:-1] * 4 + found[1:], minlength=16) / (len(found) - 1)
    assert (pairs - 1 / 16).abs().max() < 0.006


def test_the_generator_decides() -> None:
    similarity, mask = torch.randn(64, 64), diagonal(64)
    first, second = (sample_hard_negatives(similarity, mask, seeded(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample_hard_negatives(similarity, mask, seeded(6)))
    generator = seeded(5)
    assert torch.equal(first, sample_hard_negatives(similarity, mask, generator))
    assert not torch.equal(first, sample_hard_negatives(similarity, mask, generator))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_never_an_excluded_column(rows: int, columns: int, scale: float, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(rows, columns) < 0.7
    mask[torch.arange(rows), torch.randint(columns, (rows,))] = False
    found = sample_hard_negatives((scale * torch.randn(rows, columns)).to(dtype), mask, seeded(seed))
    assert found.shape == (rows,)
    assert found.dtype == torch.int64
    assert not mask[torch.arange(rows), found].any()


def test_no_gradient_and_no_rows() -> None:
    found = sample_hard_negatives(torch.randn(3, 3, requires_grad=True), diagonal(3))
    assert not found.requires_grad
    assert sample_hard_negatives(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.bool)).shape == (0,)
    assert sample_hard_negatives(torch.empty(0, 0), torch.empty(0, 0, dtype=torch.bool)).shape == (0,)


def test_a_row_with_nothing_left() -> None:
    mask = diagonal(3)
    mask[1] = True
    with pytest.raises(
        ValueError, match=r"1 of 3 rows exclude every column \(the first is row 1\).*more than one image"
    ):
        sample_hard_negatives(torch.randn(3, 3), mask)
    with pytest.raises(ValueError, match="1 of 1 rows"):
        sample_hard_negatives(torch.randn(1, 1), diagonal(1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_have_no_softmax(value: float) -> None:
    similarity = torch.randn(3, 3)
    similarity[2, 0] = value
    with pytest.raises(ValueError, match="row 2 holds NaN or infinity"):
        sample_hard_negatives(similarity, diagonal(3))


@pytest.mark.parametrize(
    ("similarity", "mask", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.bool), r"\[B, C\]"),
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.bool), "int64"),
        (torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.bool), r"\[3, 2\].*\[2, 3\]"),
        (torch.zeros(2, 2), torch.zeros(2, 2), "float32"),
        (torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), "no column"),
    ],
)
def test_arguments_that_do_not_fit(similarity: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_hard_negatives(similarity, mask)


def test_compiles_as_one_graph() -> None:
    """Nothing in the way of a draw asks the host for a value."""
    compiled = torch.compile(lambda s, m: sample_hard_negatives(s, m), fullgraph=True, backend="eager")
    mask = diagonal(6)
    found = compiled(torch.randn(6, 6), mask)
    assert not mask[torch.arange(6), found].any()
