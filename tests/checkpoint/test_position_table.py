"""Relative-position tables: the official interpolation to the last bit of float32, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import load_json, load_tensors
from xfm_fast.checkpoint import interpolate_table, relative_position_index
from xfm_fast.checkpoint.position_table import source_positions, table_rows, window_of
from xfm_fast.errors import InputError


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_tensors("relpos/relpos")


@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("window", [24, 30, 16, 7])
def test_official_interpolation(vectors: dict[str, torch.Tensor], kind: str, window: int) -> None:
    table = vectors["table_14x14" if kind == "random" else "table_smooth_14x14"]
    wanted = vectors[f"{kind}_14to{window}"]
    result = interpolate_table(table, (window, window))
    assert result.dtype == torch.float32
    # Two spline routines of scipy already differ by 5.7e-8 here.
    torch.testing.assert_close(result, wanted, rtol=0, atol=1.2e-7)
    assert torch.equal(result[-3:], table[-3:])


@pytest.mark.parametrize("window", [24, 30, 16, 7])
def test_source_positions(window: int) -> None:
    wanted = load_json("relpos/positions")[f"14to{window}"]
    positions = source_positions(27, 2 * window - 1)
    torch.testing.assert_close(
        torch.tensor(positions), torch.tensor(wanted["source_positions"]).double(), rtol=1e-7, atol=0
    )
    assert wanted["target_positions"] == list(range(-window + 1, window))


def test_interpolation_of_fine_tuning_resolution() -> None:
    table = load_tensors("tiny_b/weights")["vision_encoder.blocks.0.attn.relative_position_bias_table"]
    wanted = load_tensors("tiny_b/ft_outputs")["retrieval/interpolated_table_block0"]
    torch.testing.assert_close(interpolate_table(table, (7, 7)).double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [2, 4, 14])
def test_official_index(vectors: dict[str, torch.Tensor], window: int) -> None:
    index = relative_position_index(window)
    assert index.dtype == torch.int64
    assert torch.equal(index, vectors[f"relative_position_index_{window}x{window}"].long())


def test_same_window_is_the_same_object() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        table = torch.randn(table_rows(5), 2, dtype=dtype)
        assert interpolate_table(table, (5, 5)) is table


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_result_dtype(dtype: torch.dtype, wanted: torch.dtype) -> None:
    table = torch.randn(table_rows(4), 2).to(dtype)
    result = interpolate_table(table, (6, 6))
    assert result.dtype == wanted
    assert torch.equal(result.float(), interpolate_table(table.double(), (6, 6)).float())


def test_gradients_are_not_recorded() -> None:
    table = torch.nn.Parameter(torch.randn(table_rows(4), 2))
    assert not interpolate_table(table, (6, 6)).requires_grad


@given(source=st.integers(3, 12), target=st.integers(1, 20), heads=st.integers(1, 4))
def test_a_constant_stays_constant(source: int, target: int, heads: int) -> None:
    table = torch.arange(1.0, heads + 1).repeat(table_rows(source), 1)
    result = interpolate_table(table, (target, target))
    assert result.shape == (table_rows(target), heads)
    torch.testing.assert_close(result, table[:1].expand_as(result), rtol=1e-6, atol=0)


@given(source=st.integers(3, 10), target=st.integers(1, 12))
def test_symmetry_is_kept(source: int, target: int) -> None:
    side = 2 * source - 1
    grid = torch.randn(side, side, dtype=torch.float64)
    even = grid + grid.flip(0, 1)
    table = torch.cat([even.reshape(-1, 1), torch.zeros(3, 1, dtype=torch.float64)])
    result = interpolate_table(table, (target, target))[:-3].view(2 * target - 1, -1)
    torch.testing.assert_close(result, result.flip(0, 1), rtol=1e-9, atol=1e-9)


@given(window=st.integers(1, 60))
def test_window_of_inverts_table_rows(window: int) -> None:
    assert window_of(torch.empty(table_rows(window), 1, device="meta")) == window


@given(rows=st.integers(0, 400))
def test_other_row_counts_are_refused(rows: int) -> None:
    if rows not in {table_rows(window) for window in range(1, 12)}:
        with pytest.raises(InputError, match=f"{rows} rows"):
            window_of(torch.empty(rows, 1))


@pytest.mark.parametrize(
    ("table", "window", "message"),
    [
        (torch.zeros(52, 4), (4, 5), "not square"),
        (torch.zeros(52, 4), (0, 0), r"\(0, 0\)"),
        (torch.zeros(53, 4), (6, 6), "53 rows"),
        (torch.zeros(52), (6, 6), r"\[52\]"),
        (torch.zeros(12, 4), (6, 6), "3x3"),
        (torch.zeros(52, 4, dtype=torch.int64), (6, 6), "int64"),
    ],
)
def test_impossible_requests(table: torch.Tensor, window: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        interpolate_table(table, window)
