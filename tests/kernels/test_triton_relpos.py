"""The kernels of attention with a position bias, interpreted, against the definition in fp64."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws
from tests.kernels.triton_testing import compiling_environment, poison
from xfm_fast.kernels import reference
from xfm_fast.kernels.triton import launch, relpos_attention, relpos_table
from xfm_fast.kernels.triton.launch import LaunchConfig

NAMES = ("out", "lse", "dq", "dk", "dv", "dtable")


def table_rows(window: tuple[int, int]) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1) + 3


def inputs(
    window: tuple[int, int], batch: int, heads: int, head_dim: int, dtype: torch.dtype, layout: str = "fused"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, table and the gradient of the output, in the memory layouts that callers have."""
    tokens = 1 + window[0] * window[1]
    table = torch.randn(table_rows(window), heads)
    if layout == "fused":
        q, k, v = torch.randn(batch, tokens, 3, heads, head_dim).to(dtype).unbind(2)
        dout = torch.randn(batch, tokens, heads, head_dim).to(dtype)
    elif layout == "heads first":
        q, k, v, dout = torch.randn(4, batch, heads, tokens, head_dim).to(dtype).transpose(2, 3).unbind(0)
    elif layout == "tokens first":
        q, k, v, dout = torch.randn(4, tokens, batch, heads, head_dim).to(dtype).transpose(1, 2).unbind(0)
    else:
        assert layout == "head dimension strided, gradient expanded"
        q, k, v = torch.randn(3, batch, tokens, head_dim, heads).to(dtype).transpose(3, 4).unbind(0)
        dout = torch.randn(1, 1, 1, 1).to(dtype).expand(batch, tokens, heads, head_dim)
    return q, k, v, table, dout


def run(module: Any, args: tuple[Tensor, ...], window: tuple[int, int], scale: float) -> tuple[Tensor, ...]:
    q, k, v, table, dout = args
    with poison():
        bias = module.materialise_bias(table, window, q.dtype, scale)
        out, lse = module.relpos_attention_forward(q, k, v, bias, scale)
        rows = table.shape[0]
        grads = module.relpos_attention_backward(dout, q, k, v, bias, rows, window, scale, out, lse)
    return out, whole(lse, table, window), *grads


def whole(lse: Tensor, table: Tensor, window: tuple[int, int]) -> Tensor:
    """The logsumexp with what was subtracted from the bias."""
    return lse + reference.position_bias(table, window).amax(-1)


def definition(
    args: tuple[Tensor, ...], window: tuple[int, int], scale: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    q, k, v, table = (t.detach().to(dtype).requires_grad_() for t in args[:4])
    scores = (q * scale).transpose(1, 2) @ k.permute(0, 2, 3, 1) + reference.position_bias(table, window)
    out = reference.relpos_attention(q, k, v, table, window, scale)
    out.backward(args[4].to(dtype))
    grads = [t.grad for t in (q, k, v, table) if t.grad is not None]
    return out.detach(), scores.detach().logsumexp(-1), *grads


def check(
    args: tuple[Tensor, ...], window: tuple[int, int], module: Any = relpos_attention, scale: float | None = None
) -> None:
    factor = args[0].shape[-1] ** -0.5 if scale is None else scale
    actual = run(module, args, window, factor)
    plain, truth = (
        draws(lambda: definition(args, window, factor, args[0].dtype)),
        definition(args, window, factor, torch.float64),
    )
    for name, value, true_value, *same in zip(NAMES, actual, truth, *plain, strict=True):
        assert_accurate(value, same, true_value, name)


SHAPES = [
    ((1, 1), 3, 4, 64),  # N = 2
    ((4, 4), 1, 3, 80),  # 17
    ((2, 31), 1, 2, 64),  # 63
    ((3, 21), 1, 1, 64),  # 64: no partial tile
    ((10, 11), 1, 1, 128),  # 111
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("window", "batch", "heads", "head_dim"), SHAPES)
def test_forward_and_backward(
    window: tuple[int, int], batch: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    check(inputs(window, batch, heads, head_dim, dtype), window)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("window", "head_dim"), [((14, 14), 64), ((14, 14), 80), ((24, 24), 64), ((3, 65), 128)])
def test_large_windows(window: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    check(inputs(window, 2, 2, head_dim, dtype), window)


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "head dimension strided, gradient expanded"])
def test_memory_layouts(layout: str) -> None:
    check(inputs((3, 5), 2, 2, 32, torch.float16, layout), (3, 5))


@pytest.mark.parametrize("tiles", [(32, 64), (16, 128)], ids=str)
def test_every_tile_size_gives_the_result(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = LaunchConfig(dict(zip(("BLOCK_M", "BLOCK_N"), tiles, strict=True)))
    monkeypatch.setattr(relpos_attention, "config_for", lambda *_: config)
    check(inputs((6, 6), 1, 1, 64, torch.float16), (6, 6))


def test_scale_and_large_scores() -> None:
    q, k, v, table, dout = inputs((3, 3), 1, 2, 64, torch.float16)
    check((3 * q, 3 * k, v, 10 * table, dout), (3, 3), scale=0.3)


def test_large_batches_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven entries with room for three: parts of three, three and one, whose bias gradients meet in one sum."""
    entry = 2 * 2 * 13 * 16  # bytes of the gradients of the scores of two heads
    monkeypatch.setattr(relpos_attention, "_SCORES_BYTES", 3 * entry + entry // 2)
    assert relpos_attention.entries_at_once(7, entry) == 3
    assert relpos_attention.entries_at_once(8, entry) == 3
    assert relpos_attention.entries_at_once(4, entry) == 2
    assert relpos_attention.entries_at_once(1, 5 * entry) == 1
    check(inputs((3, 4), 7, 2, 32, torch.float16), (3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bias_is_the_table_entry_over_the_scale_and_infinite_beyond(dtype: torch.dtype) -> None:
    table = torch.randn(table_rows((3, 4)), 2)
    with poison():
        bias = relpos_table.materialise_bias(table, (3, 4), dtype, 0.3)
    assert bias.shape == (2, 13, 128)
    assert bias.is_contiguous()
    entries = reference.position_bias(table, (3, 4))
    divided = ((entries - entries.amax(-1, keepdim=True)) * (1 / 0.3)).to(bias.dtype)
    torch.testing.assert_close(bias[..., :13], divided, rtol=0, atol=0)
    assert (bias[..., 13:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("window", [(3, 4), (2, 70)])
def test_turned_bias_has_keys_as_rows(window: tuple[int, int], dtype: torch.dtype) -> None:
    table = torch.randn(table_rows(window), 2)
    with poison():
        plain = relpos_table.materialise_bias(table, window, dtype, 0.3)
        turned = relpos_table.materialise_bias(table, window, dtype, 0.3, turned=True)
    assert torch.equal(turned, relpos_table.turn(plain))
    assert torch.equal(relpos_table.turn(turned), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_keys_that_the_table_hides_with_minus_infinity(dtype: torch.dtype) -> None:
    """Also where a tile of keys holds no other: what is hidden has no weight, and the rest is as without it."""
    window = (1, 79)
    args = inputs(window, 1, 1, 32, dtype)
    # The class token looks at no patch, and patches look at those no farther than five to their right.
    args[3][: 79 - 6], args[3][-3] = -torch.inf, -torch.inf
    check(args, window)


def folded(plain: Tensor) -> Tensor:
    """The first `[N, N_pad]` rows and columns of a bias in fragments, by the definition of Hopper's accumulators."""
    heads, row_tiles, column_tiles = plain.shape[:3]
    # [half, columns // 32, warp, lane // 4, lane % 4, eight of columns, column of two]
    parts = plain.view(heads, row_tiles, column_tiles, 2, 2, 8, 8, 4, 4, 2)
    return parts.permute(0, 1, 5, 3, 6, 2, 4, 8, 7, 9).reshape(heads, row_tiles * 128, column_tiles * 64)


@pytest.mark.parametrize("window", [(3, 4), (10, 13)], ids=str)
def test_fragments_hold_the_bias_in_the_order_of_the_accumulators(window: tuple[int, int]) -> None:
    table = torch.randn(table_rows(window), 2)
    tokens = 1 + window[0] * window[1]
    with poison():
        fragments = relpos_table.materialise_bias(table, window, torch.bfloat16, 0.3, fragments=True)
        plain = relpos_table.materialise_bias(table, window, torch.bfloat16, 0.3)
    found = folded(fragments)
    assert torch.equal(found[:, :tokens], plain)
    assert not found.isnan().any()


def fragments_check(
    module: Any, window: tuple[int, int], head_dim: int, dtype: torch.dtype, args: tuple[Tensor, ...] = ()
) -> None:
    args = args or inputs(window, 2, 2, head_dim, dtype)
    scale = head_dim**-0.5
    with poison():
        bias = module.materialise_bias(args[3], window, dtype, scale, fragments=True)
        out, lse = module.relpos_attention_forward(*args[:3], bias, scale)
    actual = out, whole(lse, args[3], window)
    plain, truth = draws(lambda: definition(args, window, scale, dtype)), definition(args, window, scale, torch.float64)
    for name, value, true_value, *same in zip(NAMES, actual, truth, *plain, strict=False):
        assert_accurate(value, same, true_value, name)


@pytest.mark.parametrize(
    ("window", "head_dim"),
    [((2, 2), 64), ((10, 13), 64), ((1, 127), 32), ((6, 19), 32)],
    ids=str,
)
def test_forward_with_a_bias_in_fragments(window: tuple[int, int], head_dim: int) -> None:
    """5, 131, 128, 115 tokens: less than a tile, tails of two sizes, whole tiles."""
    fragments_check(relpos_attention, window, head_dim, torch.float16)


@pytest.mark.parametrize("layout", ["heads first", "odd rows", "not at a vector", "one entry for all"])
def test_keys_that_no_descriptor_can_have_are_copied(layout: str) -> None:
    """A descriptor's rows begin at multiples of 16 bytes, heads lie side by side, and strides contain each other."""
    window, shape = (8, 9), (2, 73, 2, 32)
    made = inputs(window, 2, 2, 32, torch.float16, layout if layout.endswith("first") else "fused")
    q, k, v, table, dout = made
    if layout == "odd rows":
        k, v = torch.randn(2, 2, 73, 65).half()[..., :64].unflatten(3, (2, 32)).unbind(0)
    elif layout == "not at a vector":
        k, v = torch.randn(2, math.prod(shape) + 1).half()[:, 1:].unflatten(1, shape).unbind(0)
        k = k.clone()
    elif layout == "one entry for all":
        k, v = k[:1].expand(shape), v[:1].expand(shape)
    assert relpos_attention._describable(v) is not v
    fragments_check(relpos_attention, window, 32, torch.float16, (q, k, v, table, dout))


def test_batches_beyond_the_largest_grid_take_more_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relpos_attention, "_LARGEST_GRID", 1)
    fragments_check(relpos_attention, (2, 2), 32, torch.float16)


def test_fragments_are_for_hopper_whatever_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert not relpos_table.takes_fragments(64, torch.bfloat16, cpu)
    monkeypatch.setattr(relpos_table, "architecture", lambda _: 90)
    assert relpos_table.takes_fragments(64, torch.bfloat16, cpu)
    assert not relpos_table.takes_fragments(64, torch.float32, cpu)
    assert not relpos_table.takes_fragments(80, torch.bfloat16, cpu)
    assert not relpos_table.takes_fragments(0, torch.bfloat16, cpu)
    tuned = {"relpos_forward": {"bf16/64": {"tiles": {"BLOCK_M": 64, "BLOCK_N": 64}, "num_warps": 4, "num_stages": 3}}}
    monkeypatch.setattr(launch, "_tuned", lambda _: tuned)
    assert relpos_table.takes_fragments(64, torch.bfloat16, cpu)


def test_amd_is_not_taken_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's compute capability of gfx942 is 9.4."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    assert launch.architecture(torch.device("cuda")) == 0
    assert not relpos_table.takes_fragments(64, torch.bfloat16, torch.device("cuda"))
    assert not launch.heuristic_config("relpos_dkdv", 64, "bf16", 0).apart


@pytest.mark.parametrize("entry", [1e6, -1e6, -torch.inf])
@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 60000.0), (torch.float32, 1e30)], ids=["bf16", "fp32"])
def test_bias_beyond_the_range_stays_finite(entry: float, dtype: torch.dtype, largest: float) -> None:
    bias = relpos_table.materialise_bias(torch.tensor([[0.0], [0.0], [entry], [entry]]), (1, 1), dtype, 0.125)
    least = max(-largest, -abs(entry) / 0.125)
    expected = torch.tensor([[least, 0] if entry < 0 else [0, least]] * 2, dtype=bias.dtype)
    assert torch.equal(bias[0, :, :2], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("offset", "factor"), [(-1e5, 1.0), (0.0, 1e4)])
def test_what_a_row_of_the_bias_has_in_common_costs_no_digits(offset: float, factor: float, dtype: torch.dtype) -> None:
    """Entries of quarters, which no constant rounds."""
    window = (3, 5)
    q, k, v, table, dout = inputs(window, 2, 2, 32, dtype)
    quarters = (table * 4).round() / 4 * factor
    plain = run(relpos_attention, (q, k, v, quarters, dout), window, 0.2)
    moved = run(relpos_attention, (q, k, v, quarters + offset, dout), window, 0.2)
    for name, found, expected in zip(NAMES, moved, plain, strict=True):
        if name != "lse":
            assert torch.equal(found, expected), name
    check((q, k, v, quarters, dout), window, scale=0.2)


@pytest.mark.parametrize("window", [(1, 5), (4, 7), (2, 40)])
def test_table_gradient_is_the_transpose_of_the_lookup(window: tuple[int, int]) -> None:
    """Also where a row of the window is wider than a tile."""
    tokens = 1 + window[0] * window[1]
    dbias = torch.full((2, 3, tokens, 128), torch.nan)
    dbias[..., :tokens] = torch.randn(2, 3, tokens, tokens)
    with poison():
        actual = relpos_table.table_gradient(dbias, window)
        turned = relpos_table.table_gradient(
            torch.stack([relpos_table.turn(part) for part in dbias]), window, turned=True
        )
    results = []
    for dtype in (torch.float32, torch.float64):
        table = torch.zeros(table_rows(window), 3, dtype=dtype, requires_grad=True)
        reference.position_bias(table, window).backward(dbias[..., :tokens].to(dtype).sum(0))
        results.append(table.grad)
    for found in (actual, turned):
        assert_accurate(found, results[:1], results[1], "dtable")


def test_configurations_come_from_the_table_and_else_from_the_heuristic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"tiles": {"BLOCK_M": 16, "BLOCK_N": 32}, "num_warps": 1, "num_stages": 5}
    (tmp_path / "sm_90.json").write_text(json.dumps({"relpos_forward": {"bf16/64": row}}))
    monkeypatch.setattr(launch, "_TUNING", tmp_path)
    for cached in (launch.config_for, launch._tuned):
        cached.cache_clear()
    try:
        assert launch.config_for("relpos_forward", 64, "bf16", 90) == LaunchConfig(row["tiles"], 1, 5)
        for other in (
            ("relpos_dq", 64, "bf16", 90),
            ("relpos_forward", 64, "fp16", 90),
            ("relpos_forward", 64, "bf16", 80),
        ):
            assert launch.config_for(*other) == launch.heuristic_config(*other)
    finally:
        for cached in (launch.config_for, launch._tuned):
            cached.cache_clear()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xfm_fast.kernels.triton.relpos_attention import KERNELS

def compiled(spec, variant):
    request = spec.request(variant, "bf16", 90)
    source = ASTSource(request.kernel, request.signature, request.constexprs, request.attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=request.options).asm

code = compiled(KERNELS[0], {"head_dim": 64, "tokens": 577})["ptx"]
assert "wgmma.mma_async" in code
assert "cp.async.cg.shared.global" in code
# Gradients of 16 heads of 11,600 tokens are more than 32 bits count.
added = next(spec for spec in KERNELS if spec.name == "relpos_batch_sum")
products = [line for line in compiled(added, added.variants[0])["ttir"].splitlines() if "arith.muli" in line]
assert products and all(": i64" in line for line in products), products
"""


def test_a_specification_compiles_for_a_gpu_that_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=compiling_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
