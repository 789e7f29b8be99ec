"""The LayerNorm kernels, interpreted: gradients against fp64, odd widths, dropout, and bugs that must be noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, assert_as_accurate, widened
from tests.kernels.triton_testing import interpreted_kernels, poison

interpreted_kernels()

from xfm_fast.kernels import reference  # noqa: E402
from xfm_fast.kernels.checks import AddNorm, Embedding  # noqa: E402
from xfm_fast.kernels.triton import embed_layer_norm, layer_norm, rows  # noqa: E402

EPS = 1e-5
WIDTHS = [32, 63, 768]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])

Inputs = dict[str, Tensor | None]


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    residual: bool = True,
    bias: bool = True,
    gamma: bool = False,
    row_scale: bool = False,
    residual_dtype: torch.dtype | None = None,
) -> Inputs:
    width = shape[-1]
    return {
        "x": (torch.randn(shape) + 0.5).to(dtype),
        "residual": torch.randn(shape).to(residual_dtype or dtype) if residual else None,
        "weight": (1 + 0.3 * torch.randn(width)).to(dtype),
        "bias": torch.randn(width).to(dtype) if bias else None,
        "gamma": torch.randn(width).to(dtype) if gamma else None,
        "row_scale": (torch.rand(shape[0]) > 0.3).to(dtype) * 1.25 if row_scale else None,
    }


def upstream(shape: tuple[int, ...], dtype: torch.dtype, summed_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(summed_dtype)


def by_definition(
    inputs: Inputs,
    dnormed: Tensor,
    dsummed: Tensor | None,
    kept: Tensor | None = None,
    eps: float = EPS,
    as_sum: bool = False,
) -> dict[str, Tensor]:
    leaves = {k: None if t is None else t.detach().clone().requires_grad_(k != "row_scale") for k, t in inputs.items()}
    x = leaves["x"]
    assert x is not None
    branch = x if kept is None else x * kept.to(x.dtype)
    normed, summed = reference.add_layer_norm(
        branch, leaves["residual"], leaves["weight"], leaves["bias"], eps, leaves["gamma"],  # pyright: ignore[reportArgumentType]
        leaves["row_scale"], wide=as_sum,
    )  # fmt: skip
    outputs, gradients = [normed], [dnormed.to(normed.dtype)]
    if dsummed is not None:
        outputs.append(summed)
        gradients.append(dsummed.to(summed.dtype))
    wanted = {k: t for k, t in leaves.items() if t is not None and t.requires_grad}
    found = torch.autograd.grad(outputs, list(wanted.values()), gradients)
    return {"normed": normed.detach(), "summed": summed.detach()} | {
        f"d{k}": g for k, g in zip(wanted, found, strict=True)
    }


def by_kernel(
    inputs: Inputs,
    dnormed: Tensor,
    dsummed: Tensor | None,
    module: Any = layer_norm,
    *,
    as_sum: bool = False,
    **dropout: Any,
) -> dict[str, Tensor]:
    with poison():
        given = AddNorm(eps=EPS, wide=as_sum, **inputs, **dropout)
        forward = module.add_layer_norm_forward(given)
        found = module.add_layer_norm_backward(dnormed, dsummed, forward.summed, forward.mean, forward.rstd, given)
    gradients = {name: value for name, value in found._asdict().items() if inputs[name[1:]] is not None}
    return {"normed": forward.normed, "summed": forward.summed} | gradients


def wide(inputs: Inputs) -> Inputs:
    return {k: None if t is None else t.double() for k, t in inputs.items()}


def check(
    inputs: Inputs, dnormed: Tensor, dsummed: Tensor | None, module: Any = layer_norm, *, as_sum: bool = False
) -> None:
    found = by_kernel(inputs, dnormed, dsummed, module, as_sum=as_sum)
    plain = by_definition(inputs, dnormed, dsummed, as_sum=as_sum)
    truth = by_definition(wide(inputs), dnormed, dsummed)
    assert found.keys() == plain.keys()
    for name, value in found.items():
        assert value.dtype == plain[name].dtype, name
        assert_accurate(value, [plain[name]], truth[name], name)


@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 5, 37])
def test_residual_and_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    inputs = make((rows, width), dtype)
    check(inputs, *upstream((rows, width), dtype, dtype))


@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_scaled_branch(width: int, dtype: torch.dtype) -> None:
    """LayerScale and DropPath over images of several tokens, as in the vision encoder."""
    shape = (5, 3, width)
    inputs = make(shape, dtype, gamma=True, row_scale=True)
    check(inputs, *upstream(shape, dtype, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "present",
    [
        {"residual": False},
        {"residual": False, "bias": False},
        {"residual": False, "gamma": True},
        {"bias": False, "row_scale": True},
        {"gamma": True},
    ],
    ids=lambda p: "-".join(f"{'' if v else 'no '}{k}" for k, v in p.items()),
)
def test_optional_arguments(present: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = make((7, 45), dtype, **present)
    dnormed, dsummed = upstream((7, 45), dtype, dtype)
    check(inputs, dnormed, dsummed)
    check(inputs, dnormed, None)


def test_a_residual_stream_in_fp32() -> None:
    """The sum keeps the precision of the residual; the norm, which the next product reads, that of the branch."""
    inputs = make((5, 111), torch.float16, gamma=True, residual_dtype=torch.float32)
    dnormed, dsummed = upstream((5, 111), torch.float16, torch.float32)
    check(inputs, dnormed, dsummed)
    found = by_kernel(inputs, dnormed, dsummed)
    assert found["summed"].dtype == found["dresidual"].dtype == torch.float32
    assert found["normed"].dtype == found["dx"].dtype == torch.float16


@pytest.mark.parametrize("width", [1, 2047, 8192])
def test_narrow_and_wide_rows(width: int) -> None:
    inputs = make((3, width), torch.float32, gamma=True)
    check(inputs, *upstream((3, width), torch.float32, torch.float32))


def test_constant_rows_far_from_zero() -> None:
    """The variance is computed from differences to the mean: rows near 1e4 keep their digits."""
    inputs = make((5, 768), torch.float32, residual=False)
    x = inputs["x"]
    assert x is not None
    inputs["x"] = x + 1e4
    check(inputs, *upstream((5, 768), torch.float32, torch.float32))
    inputs["x"] = torch.full((5, 768), 3.0)
    found = by_kernel(inputs, torch.zeros(5, 768), None)
    bias = inputs["bias"]
    assert bias is not None
    assert torch.equal(found["normed"], bias.expand(5, 768))


def test_rows_too_wide() -> None:
    with pytest.raises(ValueError, match=r"\[2, 8193\].*8192"):
        layer_norm.add_layer_norm_forward(AddNorm(torch.ones(2, 8193), None, torch.ones(8193), None, EPS))


def factors(rows: int, width: int, dropout_p: float, seed: int) -> Tensor:
    """What dropout multiplies with, seen through a branch of ones without a residual."""
    x, weight = torch.ones(rows, width), torch.ones(width)
    given = AddNorm(x, None, weight, None, EPS, dropout_p=dropout_p, seed=torch.tensor([seed]))
    return layer_norm.add_layer_norm_forward(given).summed


def philox(key: int, counters: np.ndarray, rounds: int = 10) -> np.ndarray:
    """Philox4x32 (Salmon et al., SC 2011): `[n]` 64-bit counters → `[n, 4]` 32-bit numbers."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [counters & low, counters >> high, np.zeros_like(counters), np.zeros_like(counters)]
    k = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32)]
    for _ in range(rounds):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> high) ^ c[1] ^ k[0], b & low, (a >> high) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, 1)


@pytest.mark.parametrize(("rows", "width"), [(3, 32), (2, 111)])
def test_dropout_is_philox_of_seed_row_and_column(rows: int, width: int) -> None:
    seed, dropout_p = 0x1234567890, 0.25
    quads = -(-width // 4)
    numbers = philox(seed, np.arange(rows * quads, dtype=np.uint64)).reshape(rows, quads * 4)[:, :width]
    expected = torch.from_numpy((numbers >> np.uint64(8)).astype(np.int64) >= round(dropout_p * 2**24)).float() / 0.75
    torch.testing.assert_close(factors(rows, width, dropout_p, seed), expected)


@pytest.mark.parametrize("width", [63, 768])
def test_dropout_of_forward_and_backward_agree(width: int) -> None:
    shape = (6, width)
    inputs = make(shape, torch.float32, gamma=True, row_scale=True)
    dnormed, dsummed = upstream(shape, torch.float32, torch.float32)
    found = by_kernel(inputs, dnormed, dsummed, dropout_p=0.4, seed=torch.tensor([7]))
    kept = factors(*shape, 0.4, 7)
    plain, truth = by_definition(inputs, dnormed, dsummed, kept), by_definition(wide(inputs), dnormed, dsummed, kept)
    for name, value in found.items():
        assert_accurate(value, [plain[name]], truth[name], name)


def embedding_inputs(dtype: torch.dtype, width: int = 63, count: int = 29) -> tuple[Tensor, ...]:
    tokens, positions = torch.randint(0, 9, (count,)), torch.randint(0, 5, (count,))
    tables = (torch.randn(n, width).to(dtype) for n in (12, 6))
    return tokens, positions, *tables, *(torch.randn(width).to(dtype) for _ in range(3))


def embedding_by_definition(arguments: tuple[Tensor, ...], dnormed: Tensor, padding: int | None) -> list[Tensor]:
    tokens, positions, *leaves = arguments
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    normed = reference.embed_layer_norm(tokens, positions, *leaves, EPS, padding)
    return [normed.detach(), *torch.autograd.grad(normed, leaves, dnormed.to(normed.dtype))]


def embedding_by_kernel(
    arguments: tuple[Tensor, ...], dnormed: Tensor, padding: int | None, module: Any = embed_layer_norm
) -> list[Tensor]:
    tokens, positions, word, position, type_row, weight, bias = arguments
    with poison():
        normed, mean, rstd = module.embed_layer_norm_forward(
            tokens, positions, word, position, type_row, weight, bias, EPS
        )
        gradients = module.embed_layer_norm_backward(
            dnormed,
            mean,
            rstd,
            Embedding(*arguments, EPS, padding),  # type: ignore[call-arg]
        )
    return [normed, *gradients]


def check_embedding(
    arguments: tuple[Tensor, ...], dnormed: Tensor, padding: int | None, module: Any = embed_layer_norm
) -> None:
    found = embedding_by_kernel(arguments, dnormed, padding, module)
    plain = embedding_by_definition(arguments, dnormed, padding)
    truth = embedding_by_definition(widened(arguments), dnormed, padding)
    names = ("normed", "dword", "dposition", "dtype_row", "dweight", "dbias")
    for name, value, reference_value, true_value in zip(names, found, plain, truth, strict=True):
        assert value.dtype == reference_value.dtype, name
        assert_accurate(value, [reference_value], true_value, name)


@each_dtype
@pytest.mark.parametrize(("width", "padding"), [(63, 1), (32, None)])
def test_embeddings(width: int, padding: int | None, dtype: torch.dtype) -> None:
    """More tokens than entries, so that every entry meets many of them; long runs and entries nobody uses included."""
    arguments = embedding_inputs(dtype, width)
    check_embedding(arguments, torch.randn(29, width).to(dtype), padding)


def test_embeddings_of_runs_longer_than_a_tile() -> None:
    arguments = embedding_inputs(torch.float32, 130, count=70)
    arguments[0][:48] = 3
    arguments[1][:] = 2
    check_embedding(arguments, torch.randn(70, 130), None)


def test_more_partial_sums_than_a_tile_holds() -> None:
    partials = torch.randn(2, 3 * rows.CONFIG.tiles["BLOCK_PARTIALS"] + 5, 40)
    for found, parts in zip(rows.ordered_sum(partials, partials, partials), partials, strict=True):
        assert_as_accurate(found, lambda part: part.sum(0), parts)


def test_an_id_outside_its_table_is_never_garbage() -> None:
    arguments = embedding_inputs(torch.float32)
    arguments[0][3], arguments[0][5], arguments[1][7] = 12, -1, 6
    normed, *_ = embed_layer_norm.embed_layer_norm_forward(*arguments, EPS)  # pyright: ignore[reportCallIssue]
    bad = normed.isnan().all(1)
    assert bad.nonzero().flatten().tolist() == [3, 5, 7]
    assert not normed[~bad].isnan().any()


@settings(max_examples=10)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 140),
    half=st.booleans(),
    present=st.fixed_dictionaries({k: st.booleans() for k in ("residual", "bias", "gamma", "row_scale")}),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows: int, width: int, half: bool, present: dict[str, Any], transposed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    dtype = torch.float16 if half else torch.float32
    inputs = make((rows, width), dtype, **present)
    if transposed:
        inputs["x"] = torch.randn(width, rows).to(dtype).t()
    check(inputs, *upstream((rows, width), dtype, dtype))
