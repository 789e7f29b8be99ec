"""Relative-position tables: the official interpolation to the last bit of float32, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import load_json, load_tensors
from xfm_fast.checkpoint import interpolate_table, relative_position_index
from xfm_fast.checkpoint.names import source_positions, table_rows
from xfm_fast.errors import InputError


@pytest.fixture(scope="module")
def vectors() -> dict[str, torch.Tensor]:
    return load_tensors("relpos/relpos")


@pytest.mark.parametrize("dtype", ["random", "smooth"])
@pytest.mark.parametrize("window", [24, 7])
def test_official_interpolation(vectors: dict[str, torch.Tensor], dtype: str, window: int) -> None:
    table = vectors["table_14x14" if dtype == "random" else "table_smooth_14x14"]
    expected = vectors[f"{dtype}_14to{window}"]
    result = interpolate_table(table, (window, window))
    assert result.dtype == torch.float32
    # Two spline routines of scipy already differ by 5.7e-8 here.
    torch.testing.assert_close(result, expected, rtol=0, atol=1.2e-7)
    assert torch.equal(result[-3:], table[-3:])


@pytest.mark.parametrize("window", [24, 30, 16, 7])
def test_source_positions(window: int) -> None:
    expected = load_json("relpos/positions")[f"14to{window}"]
    positions = source_positions(27, 2 * window - 1)
    torch.testing.assert_close(
        torch.tensor(positions),
        torch.tensor(expected["source_positions"]).double(),
        rtol=1e-7,
        atol=0,
    )
    assert expected["target_positions"] == list(range(-window + 1, window))


@pytest.mark.parametrize("window", [2, 4, 14])
def test_official_index(vectors: dict[str, torch.Tensor], window: int) -> None:
    index = relative_position_index(window)
    assert index.dtype == torch.int64
    assert torch.equal(index, vectors[f"relative_position_index_{window}x{window}"].long())


@given(source=st.integers(3, 12), target=st.integers(1, 20), heads=st.integers(1, 4))
def test_a_constant_stays_constant(source: int, target: int, heads: int) -> None:
    table = torch.arange(1.0, heads + 1).repeat(table_rows(source), 1)
    result = interpolate_table(table, (target, target))
    assert result.shape == (table_rows(target), heads)
    torch.testing.assert_close(result, table[:1].expand_as(result), rtol=1e-6, atol=0)


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
