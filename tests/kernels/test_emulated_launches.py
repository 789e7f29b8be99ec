"""Launches of kernels by strangers, emulated; `test_emulated.py` runs this file where Triton compiles."""

# pyright: reportArgumentType=false
# Constants of kernels are given as numbers.
from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from xfm_fast.kernels.emulation import EmulationError, HazardError, emulated

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "0", reason="Triton interprets in this process"
)


@triton.jit
def scale_kernel(x, out, n, factor, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets, mask=offsets < n) * factor, mask=offsets < n)


@triton.autotune([triton.Config({"BLOCK": block}) for block in (64, 128)], key=["n"])
@triton.jit
def tuned_kernel(x, out, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets, mask=offsets < n) + 1, mask=offsets < n)


@triton.jit
def tuple_kernel(pair, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(pair[0] + offsets) + tl.load(pair[1] + offsets))


@triton.jit
def neighbour_kernel(x, BLOCK: tl.constexpr):
    """Each program reads what the one before it has written."""
    first = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + first + BLOCK, tl.load(x + first) + 1)


@triton.jit
def endless_kernel(x, n):
    while tl.load(x) < n:
        tl.store(x + 1, n)


@triton.jit
def product_kernel(x, y, out, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(x + row * N + column), tl.load(y + row * N + column))
    tl.store(out + row * N + column, product)


def test_autotuned_kernels_run() -> None:
    x, out = torch.randn(200), torch.zeros(200)
    with emulated("sm_80"):
        tuned_kernel[lambda meta: (triton.cdiv(200, meta["BLOCK"]),)](x, out, 200)
    assert torch.equal(out, x + 1)
    assert len(tuned_kernel.configs) == 2


def test_tuples_are_arguments() -> None:
    x, y, out = torch.randn(64), torch.randn(64), torch.zeros(64)
    with emulated("sm_80"):
        tuple_kernel[(1,)]((x, y), out, BLOCK=64)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_a_product_has_no_hazard(target: str) -> None:
    x, y, out = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.zeros(64, 64)
    with emulated(target):
        product_kernel[(1,)](x, y, out, N=64)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-4, atol=1e-4)


def test_a_race_across_programs_is_a_hazard() -> None:
    with emulated("sm_80"), pytest.raises(HazardError, match="order of warps and CTAs"):
        neighbour_kernel[(8,)](torch.zeros(9 * 32), BLOCK=32)


@pytest.mark.parametrize("length", [96, 100])
def test_a_view_ends_where_it_ends(length: int) -> None:
    """A storage that goes on, and another argument behind it, are out of bounds."""
    storage = torch.zeros(256)
    x, out = storage[:96], storage[128:]
    with emulated("sm_80"):
        if length == 96:
            scale_kernel[(1,)](x, out, length, 2.0, BLOCK=128)
        else:
            with pytest.raises(EmulationError, match="outside of all tensors"):
                scale_kernel[(1,)](x, out, length, 2.0, BLOCK=128)


def test_gaps_of_a_view_are_out_of_bounds() -> None:
    rows = torch.zeros(4, 64)[:, :32]
    with emulated("sm_80"), pytest.raises(EmulationError, match="outside of all tensors"):
        scale_kernel[(1,)](rows, torch.zeros(128), 64, 2.0, BLOCK=64)


def test_a_loop_without_an_end_ends() -> None:
    with (
        emulated("sm_80", limit=1000),
        pytest.raises(EmulationError, match="more than 1000 instructions"),
    ):
        endless_kernel[(1,)](torch.zeros(2), 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [("ld.global", "ld.globol"), (".reg .b32", ".reg .b3"), ("ret;", "ret"), ("%r1,", "%q1,")],
)
def test_text_that_the_assembler_refuses_is_an_error(old: str, new: str) -> None:
    x = torch.zeros(64)
    damaged = emulated(
        "sm_80", edit=lambda name, ptx: ptx.replace(old, new).replace("\t", " ").replace(old, new)
    )
    with (
        damaged,
        pytest.raises(EmulationError, match="ptxas refuses the PTX of kernel scale_kernel"),
    ):
        scale_kernel[(1,)](x, x, 64, 2.0, BLOCK=64)
