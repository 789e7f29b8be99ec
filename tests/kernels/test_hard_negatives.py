"""Hard negatives: the rule of the official code, the distribution of the draw, and its determinism."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import load_tensors
from xfm_fast.kernels import reference
from xfm_fast.kernels.losses import race


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def diagonal(rows: int) -> Tensor:
    return torch.eye(rows, dtype=torch.bool)


def draw(similarity: Tensor, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return race(reference.hard_negative_weights(similarity, mask), generator)


def test_weights_of_the_official_code() -> None:
    vectors = load_tensors("tiny_a/outputs")
    inputs = load_tensors("tiny_a/inputs")
    temperature = load_tensors("tiny_a/weights")["temp"].double().clamp(0.001, 0.5)
    similarity = vectors["text_feat"].double() @ vectors["image_feat"].double().t() / temperature
    ids = inputs["idx"]
    for mask, suffix in ((diagonal(len(similarity)), ""), (ids[:, None] == ids[None, :], "_idx")):
        for name, values in (("t2i", similarity), ("i2t", similarity.t())):
            expected = vectors[f"hard_neg_weights_{name}{suffix}"]
            torch.testing.assert_close(
                reference.hard_negative_weights(values, mask), expected, rtol=1e-10, atol=1e-12
            )


@settings(max_examples=20)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_never_an_excluded_column(
    rows: int, columns: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(rows, columns) < 0.7
    mask[torch.arange(rows), torch.randint(columns, (rows,))] = False
    found = draw((scale * torch.randn(rows, columns)).to(dtype), mask, seeded(seed))
    assert found.shape == (rows,)
    assert found.dtype == torch.int64
    assert not mask[torch.arange(rows), found].any()
