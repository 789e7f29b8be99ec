"""Replayed kernels compute what launched ones do, on one thread and on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.kernels.cpu import llvm

if llvm.why_not() is not None:
    pytest.skip("no compiled kernels here", allow_module_level=True)

from xfm_fast.kernels.cpu.llvm import activation, rows
from xfm_fast.kernels.cpu.llvm.builder import recorded
from xfm_fast.kernels.cpu.llvm.linear import linear
from xfm_fast.kernels.cpu.llvm.replay import Replay
from xfm_fast.replace.structure import apply_rotary

BF16 = torch.bfloat16
HALF = pytest.mark.skipif(llvm.why_not(BF16) is not None, reason="no bf16 kernels here")


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def operands(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("count", [1, 12, 200])
def test_replay(threads: int, count: int) -> None:
    """Every launch reads what the one before it wrote."""
    x, weight, bias, scale = operands((count, 64), (64, 64), (64,), (64,))
    buffers = [torch.empty(count, 64) for _ in range(8)]
    with recorded() as launches:
        source = x
        for normed, out in zip(buffers[::2], buffers[1::2], strict=True):
            rows.layer_norm(source, scale, bias, 1e-5, normed)
            linear(normed, weight, bias, source, gelu=False, out=out)
            source = out
    assert len(launches) == 8
    replay = Replay(launches, threads, [x.data_ptr()])
    for repeat in range(20):
        (other,) = operands((count, 64))
        other += repeat
        wanted = other
        for _ in range(4):
            normed = F.layer_norm(wanted, (64,), scale, bias, 1e-5)
            wanted = wanted + F.linear(normed, weight, bias)
        replay([other.data_ptr()])
        torch.testing.assert_close(buffers[-1], wanted, rtol=1e-4, atol=1e-3)


def test_nothing_runs_while_it_is_recorded() -> None:
    x, weight, out = torch.ones(3, 32), torch.eye(32), torch.zeros(3, 32)
    with recorded() as launches:
        linear(x, weight, None, out=out)
    assert len(launches) == 1
    assert not out.any()
    linear(x, weight, None, out=out)
    assert torch.equal(out, x)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(BF16, marks=HALF)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm(dtype: torch.dtype, has_bias: bool) -> None:
    x, weight, bias = operands((7, 96), (96,), (96,))
    x, shift = (5 * x + 3).to(dtype), bias if has_bias else None
    out, narrow = torch.empty_like(x), torch.empty(7, 96, dtype=BF16)
    has_narrow = llvm.why_not(BF16) is None
    rows.layer_norm(x, weight, shift, 1e-3, out, narrow if has_narrow else None)
    wanted = F.layer_norm(x.float(), (96,), weight, shift, 1e-3)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), wanted, rtol=2 * unit, atol=8 * unit)
    if has_narrow:
        torch.testing.assert_close(narrow.float(), wanted, rtol=2.0**-7, atol=1e-5)


@HALF
def test_conversion() -> None:
    (x,) = operands((5, 64))
    narrow = torch.empty(5, 64, dtype=BF16)
    rows.to_bf16(x, narrow)
    assert torch.equal(narrow, x.to(BF16))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(BF16, marks=HALF)])
@pytest.mark.parametrize("has_types", [True, False])
def test_embeddings(dtype: torch.dtype, has_types: bool) -> None:
    words, positions, types, weight, bias = operands(
        (50, 32), (20, 32), (2, 32), (32,), (32,), dtype=dtype
    )
    ids, places = torch.tensor([49, 0, 3]), torch.tensor([0, 1, 19])
    kinds = torch.tensor([0, 1, 1]) if has_types else None
    out, invalid = torch.empty(3, 32, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    tables = (words, positions, types if has_types else None)
    norm = (weight, bias, 1e-5)
    rows.embed((ids, places, kinds), tables, norm, out, None, invalid)
    summed = words[ids].float() + positions[places].float()
    if has_types:
        summed += types[kinds].float()
    wanted = F.layer_norm(summed, (32,), weight.float(), bias.float(), 1e-5)
    band = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(out.float(), wanted, rtol=0, atol=band)
    assert not invalid.any()


@pytest.mark.parametrize("wrong", [-1, 50, 2**40])
def test_an_index_outside_its_table_is_reported(wrong: int) -> None:
    words, weight = operands((50, 32), (32,))
    ids, places = torch.tensor([3, wrong]), torch.tensor([0, 1])
    out, invalid = torch.empty(2, 32), torch.zeros(1, dtype=torch.int64)
    rows.embed((ids, places, None), (words, words, None), (weight, None, 0.1), out, None, invalid)
    assert invalid.item() == 1
    assert out.isfinite().all()


ACTIVATIONS: dict[activation.Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh_gelu": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
}
INFINITY = float("inf")


@pytest.mark.parametrize("level", llvm.levels(), ids=[level.name for level in llvm.levels()])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(BF16, marks=HALF)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(
    name: activation.Activation,
    dtype: torch.dtype,
    level: llvm.Level,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of numbers of all sizes, and of those that are none, with a gate in the other half of the rows."""
    if dtype == BF16 and not level.bf16:
        pytest.skip("no bf16 kernels at this level")
    monkeypatch.setattr(activation, "levels", lambda: (level,))
    x = torch.cat([torch.linspace(-20, 20, 800), 10.0 ** torch.linspace(-30, 38, 152)])
    x = torch.cat(
        [x, torch.tensor([0.0, -0.0, INFINITY, -INFINITY, float("nan"), -1e38, -90.0, 90.0])]
    )
    (gates,) = operands((30, 32))
    joined = torch.cat([x.view(30, 32), gates], 1).to(dtype)
    halves, out = joined.chunk(2, -1), torch.empty(30, 32, dtype=dtype)
    wanted = ACTIVATIONS[name](halves[0].double())
    band = 2e-6 if dtype == torch.float32 else 2.0**-8
    activation.activate(name, halves[0], None, out)
    torch.testing.assert_close(out.double(), wanted, rtol=band, atol=band, equal_nan=True)
    activation.activate(name, halves[0], halves[1], out)
    gated = wanted * halves[1].double()
    torch.testing.assert_close(out.double(), gated, rtol=2 * band, atol=8 * band, equal_nan=True)


@pytest.mark.parametrize("tables", [torch.float32, pytest.param(BF16, marks=HALF)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(BF16, marks=HALF)])
@pytest.mark.parametrize("shared", [True, False])
def test_rotary_positions(shared: bool, dtype: torch.dtype, tables: torch.dtype) -> None:
    """Of queries and keys behind a prefix; values and the prefix keep their bits."""
    texts, period, prefix, heads, size = 3, 7, 2, 2, 64
    (x,) = operands((texts, period, 3, heads, size), dtype=dtype)
    (angles,) = operands((1 if shared else texts, period - prefix, size // 2))
    cos, sin = (f(angles).repeat(1, 1, 2).to(tables) for f in (torch.cos, torch.sin))
    wanted = x.clone()
    for n in range(2):
        wanted[:, :, n] = apply_rotary(x[:, :, n], (cos, sin))
    step = 0 if shared else period - prefix
    positions = rows.Positions(period, prefix, step, tables == BF16)
    rows.rotate(x.view(texts * period, -1), 2 * heads, (cos, sin), positions)
    torch.testing.assert_close(x, wanted, rtol=1e-5 if dtype != BF16 else 2.0**-7, atol=1e-6)
    assert torch.equal(x[:, :, 2], wanted[:, :, 2])
    assert torch.equal(x[:, :prefix], wanted[:, :prefix])


@pytest.mark.parametrize("level", llvm.levels(), ids=[level.name for level in llvm.levels()])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(BF16, marks=HALF)])
@pytest.mark.parametrize("bounds", [(0, 1, 6, 12), None])
@pytest.mark.parametrize("normalised", [False, True])
def test_means_of_texts(
    normalised: bool,
    bounds: tuple[int, ...] | None,
    dtype: torch.dtype,
    level: llvm.Level,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of packed texts and of texts of one length, one of them zero, whose norm is not divided by."""
    if dtype == BF16 and not level.bf16:
        pytest.skip("no bf16 kernels at this level")
    monkeypatch.setattr(rows, "levels", lambda: (level,))
    (x,) = operands((12, 64), dtype=dtype)
    limits = [0, 4, 8, 12] if bounds is None else [*bounds]
    x[limits[1] : limits[2]] = 0
    wanted = torch.stack(
        [x[start:stop].double().mean(0) for start, stop in zip(limits, limits[1:], strict=False)]
    )
    wanted = F.normalize(wanted) if normalised else wanted
    out = torch.full((3, 64), torch.nan, dtype=dtype)
    offsets = None if bounds is None else torch.tensor(bounds)
    rows.pool(x, offsets, out, normalised=normalised)
    band = 1e-6 if dtype != BF16 else 2.0**-7
    torch.testing.assert_close(out.double(), wanted, rtol=band, atol=band)
