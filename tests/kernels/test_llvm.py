"""Kernels that LLVM compiles: every level of processor that this one includes, against PyTorch in double precision."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.cases import assert_attention_gradients, plain_attention
from xfm_fast.kernels.cpu import llvm, workspace

if llvm.why_not() is not None:
    pytest.skip(str(llvm.why_not()), allow_module_level=True)

from xfm_fast.kernels.cpu.llvm import builder
from xfm_fast.kernels.cpu.llvm.attention import attention
from xfm_fast.kernels.cpu.llvm.attention_backward import attention_backward
from xfm_fast.kernels.cpu.llvm.linear import in_panels, takes
from xfm_fast.kernels.cpu.llvm.linear import linear as compiled
from xfm_fast.kernels.cpu.llvm.weight_gradient import weight_gradient

CASES = [
    (level, dtype)
    for level in llvm.levels()
    for dtype in (torch.float32, torch.bfloat16)
    if level.bf16 or dtype != torch.bfloat16
]
each_case = pytest.mark.parametrize(
    ("level", "dtype"), CASES, ids=[f"{a.name}-{str(b)[6:]}" for a, b in CASES]
)


# (batch, queries, keys, heads, width): keys of less than a vector, between one and two and of several panels, heads of
# one vector and of more than two, more keys than the smaller room, more rows than a tile.
SHAPES = [(2, 13, 13, 3, 64), (1, 7, 1041, 1, 32), (1, 100, 33, 1, 128)]


@each_case
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(level: llvm.Level, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    batch, queries, keys, heads, width = shape
    q = torch.randn(batch, heads, queries, width).to(dtype).transpose(1, 2)
    k, v = torch.randn(batch, keys, 2, heads, width).to(dtype).unbind(2)
    for bias in (None, torch.randn(1, heads, queries, keys).to(dtype)):
        found = attention(q, k, v, 0.3, bias, level=level)
        assert found.is_contiguous()
        assert_as_accurate(found, plain_attention, q, k, v, 0.3, bias)


@each_case
def test_packed_sequences(level: llvm.Level, dtype: torch.dtype) -> None:
    """Some without queries, some without keys, which receive zeros; all that lies outside of them is not read."""
    lengths_q, lengths_k = [5, 0, 14, 3, 29], [17, 9, 0, 1, 40]
    bounds_q, bounds_k = (
        [0, *torch.tensor(lengths).cumsum(0).tolist()] for lengths in (lengths_q, lengths_k)
    )
    q = torch.randn(1, sum(lengths_q), 2, 64).to(dtype)
    k, v = torch.randn(1, sum(lengths_k), 2, 2, 64).to(dtype).unbind(2)
    found = attention(q, k, v, 0.3, bounds=(tuple(bounds_q), tuple(bounds_k)), level=level)
    for i in range(len(lengths_q)):
        rows, keys = slice(bounds_q[i], bounds_q[i + 1]), slice(bounds_k[i], bounds_k[i + 1])
        if lengths_q[i] and lengths_k[i]:
            assert_as_accurate(
                found[:, rows], plain_attention, q[:, rows], k[:, keys], v[:, keys], 0.3, None
            )
        else:
            assert not found[:, rows].any()


@each_case
def test_what_is_no_number_and_what_is_hidden(level: llvm.Level, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(1, 20, 3, 2, 64).to(dtype).unbind(2)
    q[0, 3, 1, 5] = torch.nan
    hidden = torch.zeros(1, 1, 20, 20)
    hidden[..., 4, :] = -torch.inf
    hidden[..., 6:] = -torch.inf
    found = attention(q, k, v, 0.3, hidden, level=level)
    unknown = torch.zeros(20, 2, dtype=torch.bool)
    unknown[3, 1] = True
    unknown[4] = True
    assert torch.equal(found[0].isnan().all(-1), unknown)
    assert torch.equal(found[0].isnan().any(-1), unknown)
    seen = attention(q, k[:, :6], v[:, :6], 0.3, hidden[..., :6], level=level)
    torch.testing.assert_close(found, seen, equal_nan=True)


@each_case
def test_any_strides_and_shared_biases(level: llvm.Level, dtype: torch.dtype) -> None:
    """Odd strides in bf16, where pairs must lie at even places, and columns that lie apart."""
    q = torch.randn(4, 9, 2, 65).to(dtype)[..., :64]
    k = torch.randn(4, 64, 2, 9).to(dtype).permute(0, 3, 2, 1)
    v = torch.randn(2, 9, 4, 65).to(dtype).permute(2, 1, 0, 3)[..., 1:]
    for shape in ((1, 1, 1, 9), (2, 2, 9, 9)):
        bias = torch.randn(shape).transpose(-1, -2).contiguous().transpose(-1, -2)
        found = attention(q, k, v, -0.3, bias, level=level)
        assert_as_accurate(found, plain_attention, q, k, v, -0.3, bias.to(dtype))


def backward(*given: Any, **options: Any) -> tuple[Tensor, ...]:
    return tuple(t for t in attention_backward(*given, **options) if t is not None)


# Rows of less than a tile, of a block and one, keys of one vector and one; more keys than the smallest room; columns
# that no tile has.
BACKWARD = [(2, 49, 17, 2, 64), (1, 26, 209, 2, 64), (3, 5, 33, 1, 96)]


@each_case
@pytest.mark.parametrize("shape", BACKWARD)
def test_gradients_of_attention(
    level: llvm.Level, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    batch, queries, keys, heads, width = shape
    q, dout = torch.randn(2, batch, heads, queries, width).to(dtype).transpose(2, 3)
    k, v = torch.randn(batch, keys, 2, heads, width).to(dtype).unbind(2)
    for bias in (None, torch.randn(1, heads, queries, keys).to(dtype)):
        for buffer in getattr(workspace._local, "buffers", {}).values():
            buffer.fill_(255)
        found = backward(dout, q, k, v, 0.3, bias, bias_gradient=bias is not None, level=level)
        assert all(t.is_contiguous() for t in found)
        assert_attention_gradients(found, dout, q, k, v, 0.3, bias)


@each_case
def test_gradients_of_biases_that_are_shared(level: llvm.Level, dtype: torch.dtype) -> None:
    """Windows take them in turns; columns and rows that lie apart, odd strides."""
    q, dout = torch.randn(2, 12, 9, 2, 65).to(dtype)[..., :64]
    k = torch.randn(12, 64, 2, 9).to(dtype).permute(0, 3, 2, 1)
    v = torch.randn(2, 9, 12, 65).to(dtype).permute(2, 1, 0, 3)[..., 1:]
    for period in (1, 4, 12):
        bias = torch.randn(period, 2, 1, 9).to(dtype).expand(period, 2, 9, 9)
        found = backward(dout, q, k, v, -0.3, bias, bias_gradient=True, level=level)
        assert_attention_gradients(found, dout, q, k, v, -0.3, bias)
        without = backward(dout, q, k, v, -0.3, bias, level=level)
        assert len(without) == 3
        assert all(map(torch.equal, without, found))


@each_case
def test_gradients_of_hidden_keys(level: llvm.Level, dtype: torch.dtype) -> None:
    """They get none, nor does a query that sees no key; numbers that are none stay with their query."""
    q, k, v, dout = torch.randn(4, 1, 20, 2, 64).to(dtype)
    bias = torch.randn(1, 2, 20, 20)
    bias[..., 7:] = -torch.inf
    bias[:, :, 3:5], bias[:, :, 4, 2:] = -1e30, -torch.inf
    found = backward(dout, q, k, v, 0.3, bias, bias_gradient=True, level=level)
    assert not any(t[:, 7:].any() for t in found[1:3])
    assert not found[0][:, 3:5].any()
    assert not found[3][..., 7:].any()
    assert not found[3][:, :, 3:5].any()
    seen = [n for n in range(20) if n not in (3, 4)]
    bias = bias[:, :, seen, :7].to(dtype)
    parts = (found[0][:, seen], found[1][:, :7], found[2][:, :7], found[3][:, :, seen, :7])
    assert_attention_gradients(parts, dout[:, seen], q[:, seen], k[:, :7], v[:, :7], 0.3, bias)
    dout[0, 5, 1, 3] = torch.nan
    found = backward(dout, q, k, v, 0.3, level=level)
    unknown = torch.zeros(20, 2, dtype=torch.bool)
    unknown[5, 1] = True
    assert torch.equal(found[0][0].isnan().all(-1), unknown)
    assert torch.equal(found[0][0].isnan().any(-1), unknown)


@each_case
def test_gradients_of_packed_sequences(level: llvm.Level, dtype: torch.dtype) -> None:
    """Sequences without queries, without keys, and without either."""
    bounds = (0, 5, 5, 9, 9, 60), (0, 7, 10, 10, 10, 29)
    q, dout = torch.randn(2, 1, 60, 2, 64).to(dtype)
    k, v = torch.randn(2, 1, 29, 2, 64).to(dtype)
    found = backward(dout, q, k, v, 0.3, bounds=bounds, level=level)
    assert not found[0][0, 5:9].any()
    assert not any(t[0, 7:10].any() for t in found[1:])
    for (a, b), (c, d) in (((0, 5), (0, 7)), ((9, 60), (10, 29))):
        parts = (found[0][:, a:b], *(t[:, c:d] for t in found[1:]))
        assert_attention_gradients(parts, dout[:, a:b], q[:, a:b], k[:, c:d], v[:, c:d], 0.3, None)
    for some in (torch.zeros(1, 0, 2, 64, dtype=dtype), q):
        found = backward(some, some, k[:, :0], v[:, :0], 0.3, level=level)
        assert not found[0].any()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gamma: Tensor | None,
    *,
    gelu: bool,
) -> Tensor:
    out = F.linear(x, weight, bias)
    out = F.gelu(out) if gelu else out
    out = out if gamma is None else out * gamma
    return out if residual is None else residual + out


# (rows, inputs, outputs): more inputs than are multiplied at once; outputs of an odd number of vectors, of more than a
# task has.
PRODUCTS = [(13, 96, 48), (30, 1600, 32), (100, 64, 272)]


@each_case
@pytest.mark.parametrize("way", ["many", "few", "stored"])
@pytest.mark.parametrize("shape", PRODUCTS)
@torch.inference_mode()
def test_linear(
    level: llvm.Level, dtype: torch.dtype, shape: tuple[int, int, int], way: str
) -> None:
    rows, inputs, outputs = shape
    x, weight = (
        torch.randn(rows, inputs + 2)[:, :inputs].to(dtype),
        torch.randn(outputs, inputs).to(dtype),
    )
    bias, gamma, residual = (torch.randn(*size, outputs).to(dtype) for size in ((), (), (rows,)))
    place = torch.zeros(rows, 2 * outputs, dtype=dtype)[:, :outputs]
    options: dict[str, Any] = {"few": way == "few"}
    if way == "stored":
        options = {"stored": in_panels(weight.view(torch.int32), level)}
    product = partial(compiled, x, weight, level=level, **options)
    for gelu, *others in (
        (False, None, None, None),
        (True, bias, None, None),
        (False, bias, residual, gamma),
    ):
        found = product(*others, gelu=gelu)
        assert_as_accurate(found, partial(linear, gelu=gelu), x, weight, *others)
        assert product(*others, gelu=gelu, out=place) is place
        assert torch.equal(place, found)


@each_case
@pytest.mark.parametrize("shape", PRODUCTS[:2])
def test_turned_weights_and_wider_ones(
    level: llvm.Level, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """As gradients of inputs read them, and as training stores them: a copy would have given the same bits."""
    rows, inputs, outputs = shape
    x, factors = torch.randn(rows, inputs).to(dtype), torch.randn(inputs)
    weight, turned = (
        torch.randn(outputs, inputs + 3)[:, :inputs],
        torch.randn(inputs, outputs + 3)[:, :outputs],
    )
    assert takes(x, weight)
    for few in (False, True):
        right = compiled(x, weight.to(dtype).contiguous(), None, few=few, level=level)
        assert torch.equal(compiled(x, weight, None, few=few, level=level), right)
    narrow = (turned * factors[:, None]).to(dtype).contiguous()
    right = compiled(x, narrow, None, turned=True, level=level)
    assert_as_accurate(right, torch.mm, x, narrow)
    assert torch.equal(compiled(x, turned, None, turned=True, factors=factors, level=level), right)


@each_case
def test_gelu_of_every_number(level: llvm.Level, dtype: torch.dtype) -> None:
    """Large numbers of either sign too, and none."""
    identity = torch.eye(64).to(dtype)
    x = torch.cat(
        [torch.linspace(-9, 9, 64 * 40), torch.logspace(1, 30, 64), -torch.logspace(1, 30, 64)]
    )
    x = x.view(-1, 64).to(dtype)
    found = compiled(x, identity, None, gelu=True, level=level)
    right = F.gelu(x.double())
    allowed = 2e-6 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(found.double(), right, rtol=allowed, atol=allowed)
    x[3, 5] = torch.nan
    assert compiled(x, identity, None, gelu=True, level=level)[3].isnan().all()


# (rows, outputs, inputs): parts of a tile and of a vector, an odd row in bf16; more outputs than one block has and than
# one vector beside it, more rows than one piece has in either dtype, columns of an odd number of vectors.
GRADIENTS = [(7, 13, 33), (1025, 389, 48)]


@each_case
@pytest.mark.parametrize("shape", GRADIENTS)
def test_gradients_of_weights(
    level: llvm.Level, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    """Whatever lies beside them in memory, and columns that lie apart."""
    rows, outputs, inputs = shape
    dout, x = (
        torch.full((rows + 1, 2 * columns + 1), torch.nan, dtype=dtype)
        for columns in (outputs, inputs)
    )
    dout, x = dout[:rows, :outputs].normal_(), x[:rows, 1 : 1 + inputs].normal_()
    found = weight_gradient(dout, x, level=level)
    assert found.is_contiguous()
    assert_as_accurate(found, lambda dout, x: dout.t() @ x, dout, x)
    apart = dout.t().contiguous().t(), x.t().contiguous().t()
    assert torch.equal(weight_gradient(*apart, level=level), found)
    sums = torch.full((outputs,), torch.nan)
    wide = weight_gradient(dout, x, wide=True, sums=sums, level=level)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(dtype), found)
    assert_as_accurate(
        sums, lambda dout: dout.sum(0, dtype=torch.promote_types(dout.dtype, torch.float32)), dout
    )


@each_case
def test_threads_change_no_bit(level: llvm.Level, dtype: torch.dtype) -> None:
    """They share heads, or the queries of few heads; outputs, or the inputs of few outputs; windows of a bias."""
    q, k, v, dout = torch.randn(4, 4, 60, 3, 64).to(dtype)
    bias = torch.randn(2, 3, 60, 60)
    x, weight, wide = (
        torch.randn(300, 64).to(dtype),
        torch.randn(96, 64).to(dtype),
        torch.randn(300, 900).to(dtype),
    )

    def run() -> list[Tensor]:
        found = [attention(q[:1, :, :1], k[:1, :, :1], v[:1, :, :1], 0.3, level=level)]
        found.append(attention(q, k, v, 0.3, level=level))
        found += backward(dout, q, k, v, 0.3, bias, level=level)
        found += [compiled(x, weight, None, few=few, level=level) for few in (False, True)]
        return [
            *found,
            weight_gradient(x, wide, level=level),
            weight_gradient(wide, x, level=level),
        ]

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


@each_case
def test_gradients_of_no_rows_and_of_no_numbers(level: llvm.Level, dtype: torch.dtype) -> None:
    dout, x = torch.randn(9, 5).to(dtype), torch.randn(9, 40).to(dtype)
    sums = torch.full((5,), torch.nan)
    nothing = weight_gradient(dout[:0], x[:0], sums=sums, level=level)
    assert torch.equal(nothing, torch.zeros(5, 40, dtype=dtype))
    assert not sums.any()
    assert weight_gradient(dout, x[:, :0], level=level).shape == (5, 0)
    dout[8, 3], x[0, 17] = torch.inf, torch.nan
    found = weight_gradient(dout, x, level=level)
    unknown = torch.zeros(5, 40, dtype=torch.bool)
    unknown[3], unknown[:, 17] = True, True
    assert torch.equal(~found.isfinite(), unknown)
    assert torch.equal(found.isnan().any(0), torch.arange(40) == 17)


def test_compiled_code_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And read again if it is whole and no other user could write it; where nothing can be kept, all works."""
    made: list[str] = []
    compile_ = builder._compile
    monkeypatch.setattr(builder, "_OBJECTS", tmp_path / "kernels")
    monkeypatch.setattr(
        builder, "_compile", lambda written, level: made.append("") or compile_(written, level)
    )
    x, weight = torch.randn(3, 64), torch.randn(48, 64)

    def compilations() -> int:
        made.clear()
        builder.kernel.cache_clear()
        torch.testing.assert_close(compiled(x, weight, None), x @ weight.t(), rtol=1e-5, atol=1e-4)
        return len(made)

    assert (compilations(), compilations()) == (1, 0)
    (kept,) = (tmp_path / "kernels").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-1], whole[:40] + b"x" + whole[41:]):
        kept.write_bytes(damaged)
        assert compilations() == 1
        assert kept.read_bytes() == whole
    kept.chmod(0o666)
    assert compilations() == 1
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(builder, "_OBJECTS", tmp_path / "file" / "kernels")
    assert compilations() == 1
    builder.kernel.cache_clear()


def test_where_written_code_may_not_run_libraries_do_all() -> None:
    """As in services with MemoryDenyWriteExecute: a kernel's first call would end the process."""
    program = """
import ctypes
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    raise SystemExit(77)
import torch
from xfm_fast.kernels import ops
from xfm_fast.kernels.cpu import llvm
x, weight = torch.ones(3, 768), torch.ones(768, 768)
assert ops.linear(x, weight, None).eq(768).all()
print(llvm.why_not())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this Linux cannot forbid a process to run what it writes (6.3 can)")
    assert done.returncode == 0, done.stderr
    assert "may not run code that it writes" in done.stdout


def test_kernels_run_on_the_threads_of_pytorch() -> None:
    """Packages with an OpenMP library of their own, loaded before, do not give the team."""
    pytest.importorskip("sklearn")
    program = """
import ctypes, re
from pathlib import Path
import sklearn.utils
import torch
from xfm_fast.kernels.cpu.llvm import builder
paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line.split()[-1]}
address = lambda function: ctypes.cast(function, ctypes.c_void_p).value
libraries = [path for path in paths if re.search(r"/lib[gi]?omp[^/]*\\.so", path)]
entries = {address(ctypes.CDLL(path).GOMP_parallel): path for path in libraries}
assert len(entries) > 1, "one OpenMP library alone proves nothing"
assert str(Path(torch.__file__).parent) in entries[address(builder._openmp_parallel())], entries
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    if "proves nothing" in done.stderr:
        pytest.skip("PyTorch's OpenMP library is the only one here")
    assert done.returncode == 0, done.stderr
