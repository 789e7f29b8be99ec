"""Every CPU implementation by itself, chosen here or not; the choice between them; dropout masks and kept memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.agreement import deterministic_algorithms
from tests.kernels.accuracy import assert_accurate, assert_as_accurate, draws, widened
from tests.kernels.conftest import LIBRARIES, compared, each_library
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.cpu import attention, int8, llvm, products, selection, workspace
from xfm_fast.kernels.cpu.races import PATHS, SIZES, compare_all, races
from xfm_fast.kernels.cpu.workspace import Dropout

DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def rejection(operation: str, dtype: torch.dtype) -> dict[str, str]:
    """Why this processor, or this PyTorch, cannot run an implementation."""
    candidates, example = {
        "attention": (attention._ALL, attention._plain_example),
        "medium attention": (attention._ALL, attention._medium_example),
        "short attention": (attention._SHORT, attention._short_example),
        "biased attention": (attention._ALL, attention._biased_example),
        "short biased attention": (attention._SHORT, attention._windows_example),
        **{name: race for name, race in attention.RACES.items() if name.endswith("backward")},
        "linear": (products._LINEAR, products._example),
        "linear_gelu": (products._GELU, products._example),
        "linear_residual": (products._RESIDUAL, products._residual_example),
        "trained linear": (products._TRAINED, products._trained_example),
        "input gradient": (products._INPUT, products._input_example),
        "weight gradient": (products._WEIGHT, products._weight_example),
    }[operation]
    return compared(operation, candidates, example, dtype).rejected


def usable(operation: str, name: str, dtype: torch.dtype) -> None:
    reason = rejection(operation, dtype).get(name)
    if reason is not None:
        pytest.skip(f"{name} in {dtype} is rejected on this machine: {reason}")


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * scale) @ k.transpose(-1, -2)
    return ((scores if bias is None else scores + bias).softmax(-1) @ v).transpose(1, 2)


# (batch, queries, keys, heads, width): one token, odd sizes, more rows than a tile holds, one head, wide heads.
SHAPES = [(1, 1, 1, 1, 8), (2, 2, 5, 3, 16), (1, 17, 50, 12, 64), (2, 50, 17, 2, 80), (1, 1100, 600, 3, 8)]
# One query and more rows than a tile holds, both with heads as wide as whole vectors.
SHAPES += [(2, 1, 33, 3, 16), (1, 1100, 600, 3, 16)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", attention._ALL)
@torch.inference_mode()
def test_attention(name: str, biased: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    usable("biased attention" if biased else "attention", name, dtype)
    batch, queries, keys, heads, width = shape
    q = torch.randn(batch, heads, queries, width).to(dtype).transpose(1, 2)
    k, v = torch.randn(batch, keys, 2, heads, width).to(dtype).unbind(2)
    bias = torch.randn(1, heads, queries, keys).to(dtype) if biased else None
    candidate = attention._ALL[name]
    found = candidate(q, k, v, 0.3, bias)
    assert found.is_contiguous()
    assert_as_accurate(found, plain_attention, q, k, v, 0.3, bias)


@each_dtype
@pytest.mark.parametrize("name", [name for name in attention._ALL if name not in ("aten", "tiled")])
@torch.inference_mode()
def test_powers_out_of_range_are_left_to_the_softmax(name: str, dtype: torch.dtype) -> None:
    """Scores of hundreds, both ways; a query that sees no key; and inputs that are no numbers."""
    usable("attention", name, dtype)
    q, k, v = torch.randn(2, 20, 3, 2, 16).to(dtype).unbind(2)
    for scale in (100.0, -100.0):
        assert_as_accurate(attention._ALL[name](q, k, v, scale, None), plain_attention, q, k, v, scale, None)
    low = torch.full((1, 1, 1, 20), -300.0).to(dtype)
    assert_as_accurate(attention._ALL[name](q, k, v, 0.3, low), plain_attention, q, k, v, 0.3, low)
    hidden = torch.zeros(1, 1, 20, 20).to(dtype)
    hidden[..., 4, :] = -torch.inf
    found = attention._ALL[name](q, k, v, 0.3, hidden)
    assert found[:, 4].isnan().all()
    assert found[:, :4].isfinite().all()
    assert attention._ALL[name](q * torch.nan, k, v, 0.3, None).isnan().all()


@each_dtype
@pytest.mark.parametrize("name", [name for name in attention._ALL if name != "aten"])
@torch.inference_mode()
def test_masks_of_every_shape(name: str, dtype: torch.dtype) -> None:
    usable("attention", name, dtype)
    q, k, v = torch.randn(4, 40, 3, 2, 16).to(dtype).unbind(2)
    for shape in ((4, 1, 1, 40), (4, 1, 40, 40), (2, 2, 40, 40), (1, 1, 1, 40)):
        mask = torch.zeros(shape).masked_fill_(torch.rand(shape) < 0.4, -torch.inf).to(dtype)
        mask[..., 0] = 0
        whole = mask.repeat(4 // shape[0], 1, 1, 1)
        assert_as_accurate(attention._ALL[name](q, k, v, 0.3, mask), plain_attention, q, k, v, 0.3, whole)


@each_dtype
@pytest.mark.parametrize("name", attention._SHORT)
@torch.inference_mode()
def test_windows_share_their_biases(name: str, dtype: torch.dtype) -> None:
    """Batch entry b takes the bias of window b mod G, as images have them one after the other."""
    usable("short biased attention", name, dtype)
    q, k, v = torch.randn(12, 9, 3, 2, 16).to(dtype).unbind(2)
    for windows in (1, 4, 12):
        bias = torch.randn(windows, 2, 9, 9).to(dtype)
        bias[:, :, :, 5:] -= 100
        found = attention._SHORT[name](q, k, v, 0.3, bias)
        assert_as_accurate(found, plain_attention, q, k, v, 0.3, bias.repeat(12 // windows, 1, 1, 1))


@pytest.mark.parametrize(
    ("heads", "queries", "keys"),
    [(12, 197, 197), (12, 577, 577), (12, 10_000, 577), (1, 5, 5), (3, 7, 10**7), (16, 1, 1)],
)
def test_tiles_fit(heads: int, queries: int, keys: int) -> None:
    for batch in (1, 8, 300):
        entries, group, rows = attention.tile_shape(batch, heads, queries, keys, 4)
        assert 1 <= entries <= batch
        assert 1 <= group <= heads
        assert 1 <= rows <= queries
        # One row of two heads is the smallest tile, whatever its size.
        assert entries * group * rows * keys * 4 <= attention._TILE_BYTES or (entries, rows) == (1, 1)


def test_tiles_cover_every_score_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_TILE_BYTES", 4 * 5 * 40)
    for shape in ((3, 7, 4, 8), (2, 50, 3, 8), (9, 2, 2, 8), (1, 1, 1, 8)):
        counts = torch.zeros(shape[:3], dtype=torch.long)
        opened = 0
        for tile in attention.tiles(torch.empty(shape), 5):
            counts[tile.batch, tile.rows, tile.heads] += 1
            opened += tile.first
            assert opened == 1, "the rows of one tile end before those of the next begin"
            opened -= tile.last
        assert (counts == 1).all()


def attention_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, ...]:
    given = [t.detach().clone().requires_grad_() for t in (q, k, v) if t is not None]
    if bias is not None:
        given.append(bias.detach().clone().requires_grad_())
    with torch.enable_grad():
        out = plain_attention(given[0], given[1], given[2], scale, given[3] if bias is not None else None)
    return torch.autograd.grad(out, given, dout)


@each_dtype
@pytest.mark.parametrize("tile_bytes", [4 << 20, 3000, 100])
@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_gradients_of_tiles(
    biased: bool, shape: tuple[int, ...], tile_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of all heads, of one head of several entries, and of a few rows; whatever scratch memory held before."""
    monkeypatch.setattr(attention, "_TILE_BYTES", tile_bytes)
    batch, queries, keys, heads, width = shape
    q, dout = torch.randn(2, batch, heads, queries, width).to(dtype).transpose(2, 3)
    k, v = torch.randn(batch, keys, 2, heads, width).to(dtype).unbind(2)
    bias = torch.randn(1, heads, queries, keys).to(dtype) if biased else None
    for buffer in getattr(workspace._local, "buffers", {}).values():
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
    found = attention.tiled_attention_backward(dout, q, k, v, 0.3, bias, bias_gradient=biased)
    arguments = (dout, q, k, v, 0.3, bias)
    plain, truth = draws(lambda: attention_gradients(*arguments)), attention_gradients(*widened(arguments))
    for i, gradient in enumerate(found if biased else found[:3]):
        assert gradient is not None
        # The gradient of the bias is summed and returned in fp32.
        assert_accurate(gradient.to(dtype), [each[i] for each in plain], truth[i], "qkvb"[i])


@pytest.mark.skipif(llvm.why_not() is not None, reason=str(llvm.why_not()))
@pytest.mark.parametrize("chosen", ["tiled", "llvm"])
@torch.no_grad()
def test_the_chosen_gradients_of_attention_run(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they are asked for what our kernel does not know; of one length and packed, and as a run that goes on."""
    if chosen == "llvm" and (reason := llvm.why_not()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(selection, "_selections", {})
    for operation in attention.RACES:
        selection.settle(operation, torch.float32, chosen)
    ran: list[str] = []
    for name, function in (("tiled", "tiled_attention_backward"), ("llvm", "compiled_backward")):
        original = getattr(attention, function)
        monkeypatch.setattr(attention, function, lambda *a, n=name, f=original, **o: ran.append(n) or f(*a, **o))
    mask, dlse = torch.ones(2, 20, dtype=torch.bool), torch.randn(2, 2, 20)
    for tokens in (20, 70):
        q, k, v, dout = torch.randn(4, 2, tokens, 2, 16)
        bias = torch.randn(1, 2, tokens, tokens)
        attention.attention_backward(dout, q, k, v, 0.3)
        attention.attention_backward(dout, q, k, v, 0.3, bias, hiding=attention.Hiding())
        attention.attention_backward(dout, q, k, v, 0.3, bias, bias_gradient=True)
    assert ran == [chosen] * 6
    ran.clear()
    q, k, v, dout = torch.randn(4, 2, 20, 2, 16)
    attention.attention_backward(dout, q, k, v, 0.3, None, Dropout(0.5, torch.tensor(1)))
    attention.attention_backward(dout, q, k, v, 0.3, torch.zeros(1, 2, 20, 20), hiding=attention.Hiding(mask))
    attention.attention_backward(dout, q, k, v, 0.3, dlse=dlse)
    # No vectors of any processor: those of AVX2 have 8 numbers.
    attention.attention_backward(dout[..., :6], q[..., :6], k[..., :6], v[..., :6], 0.3)
    attention.attention_backward(dout.double(), q.double(), k.double(), v.double(), 0.3)
    long = torch.randn(1, 1041, 1, 16)
    attention.attention_backward(dout[:1, :, :1], q[:1, :, :1], long, long, 0.3)
    assert ran == ["tiled"] * 6


@each_dtype
@torch.no_grad()
def test_the_gradient_of_a_bias_adds_up_over_tiles_of_the_batch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, dout = torch.randn(4, 6, 5, 2, 8).to(dtype)
    bias = torch.randn(1, 2, 5, 5).to(dtype)
    whole = attention.tiled_attention_backward(dout, q, k, v, 0.3, bias, bias_gradient=True)
    monkeypatch.setattr(attention, "_TILE_BYTES", 2 * 5 * 5 * 2 * q.element_size())
    parts = attention.tiled_attention_backward(dout, q, k, v, 0.3, bias, bias_gradient=True)
    for a, b in zip(whole, parts, strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).abs().max() <= 4 * torch.finfo(dtype).eps * a.abs().max()


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 5), (14, 14)])
def test_position_bias_and_its_gradient(window: tuple[int, int]) -> None:
    rows, tokens = (2 * window[0] - 1) * (2 * window[1] - 1) + 3, 1 + window[0] * window[1]
    table = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    expected = reference.position_bias(table, window)
    # The largest of a query is subtracted, which no softmax sees.
    shifted = expected - expected.amax(-1, keepdim=True)
    assert torch.equal(attention.position_bias(table.detach(), window), shifted)
    dbias = torch.randn(3, tokens, tokens, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, table, dbias)
    torch.testing.assert_close(attention.table_gradient(dbias, window, rows), gradient)


@each_dtype
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 4), (5, 7, 3), (130, 64, 96), (65, 96, 64)])
@torch.no_grad()
def test_gradients_of_linear_layers(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, weight, dout = (torch.randn(s).to(dtype) for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    bias = torch.randn(2 * outputs).to(dtype)[::2]
    ran = 0
    cases: list[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = [
        ("trained linear", reference.linear, (x, weight, bias)),
        ("input gradient", lambda dout, weight: dout @ weight, (dout, weight)),
        ("weight gradient", lambda dout, x: dout.t() @ x, (dout, x)),
        ("weight gradient", lambda dout, x: dout.t() @ x, (dout.t().contiguous().t(), x)),
    ]
    for operation, definition, arguments in cases:
        candidates: dict[str, Callable[..., Tensor]] = {
            "trained linear": products._TRAINED,
            "input gradient": products._INPUT,
            "weight gradient": products._WEIGHT,
        }[operation]
        for name, candidate in candidates.items():
            if name not in rejection(operation, dtype):
                assert_as_accurate(candidate(*arguments), definition, *arguments)
                ran += 1
    assert ran >= 4


def test_scratch_memory_is_shared_by_name_and_kept() -> None:
    first = workspace.scratch("test", (3, 4), torch.float32)
    assert first.is_contiguous()
    assert workspace.scratch("test", (2, 2), torch.float32).data_ptr() == first.data_ptr()
    assert workspace.scratch("test", (2, 2), torch.float64).data_ptr() != first.data_ptr()
    assert workspace.scratch("other", (2, 2), torch.float32).data_ptr() != first.data_ptr()
    with torch.inference_mode():
        larger = workspace.scratch("test", (30, 40), torch.float32)
    # Outside of inference mode it can still be written to.
    workspace.scratch("test", (30, 40), torch.float32).fill_(1)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(lambda: workspace.scratch("test", (3, 4), torch.float32)).result()
    assert theirs.data_ptr() != larger.data_ptr()


@each_dtype
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 4), (5, 7, 3), (63, 111, 50), (130, 64, 256)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operation", ["linear", "linear_gelu", "linear_residual"])
@torch.inference_mode()
def test_products(operation: str, bias: bool, rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    candidates = products.CANDIDATES[operation]
    definition: Callable[..., Tensor] = {
        "linear": reference.linear,
        "linear_gelu": reference.linear_gelu,
        "linear_residual": lambda x, w, b, r: reference.linear_residual(x, w, b, r, None, None),
    }[operation]
    arguments: tuple[Any, ...] = (torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype))
    arguments += (torch.randn(outputs).to(dtype) if bias else None,)
    if operation == "linear_residual":
        arguments += (torch.randn(rows, outputs).to(dtype),)
    ran = 0
    for name, candidate in candidates.items():
        if name not in rejection(operation, dtype):
            assert_as_accurate(candidate(*arguments), definition, *arguments)
            ran += 1
    assert ran


@each_dtype
@pytest.mark.parametrize("operation", ["linear", "linear_gelu", "linear_residual"])
@pytest.mark.parametrize("name", ["aten", "onednn", "onednn-packed", "onednn+gelu"])
def test_products_that_this_machine_rejects(operation: str, name: str, dtype: torch.dtype) -> None:
    """Shows, as a skip with its reason, what the test above could not run here."""
    usable(operation, name, dtype)


@each_dtype
@each_library("aten", "onednn", "onednn-packed")
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_layer_scale(dtype: torch.dtype) -> None:
    """LayerScale is multiplied into the product or folded into the weight, depending on what was chosen."""
    x, weight, bias = torch.randn(2, 5, 24).to(dtype), torch.randn(17, 24).to(dtype), torch.randn(17).to(dtype)
    residual, gamma = torch.randn(2, 5, 17).to(dtype), torch.rand(17).to(dtype)
    for b in (bias, None):
        found = products.linear_residual(x, weight, b, residual, gamma)
        assert_as_accurate(found, reference.linear_residual, x, weight, b, residual, gamma, None)


@each_dtype
@each_library("aten", "onednn", "onednn-packed", "onednn+gelu")
@pytest.mark.parametrize("rows", [5, 50])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_mlp(biased: bool, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the libraries let it, 16 rows of the hidden layer at a time."""
    monkeypatch.setattr(products, "_HIDDEN_BYTES", 16 * 40 * torch.finfo(dtype).bits // 8)
    x, first, second, residual = (torch.randn(s).to(dtype) for s in ((rows, 24), (40, 24), (17, 40), (rows, 17)))
    biases = tuple(torch.randn(n).to(dtype) if biased else None for n in (40, 17))
    for gamma in (torch.rand(17).to(dtype), None):
        found = products.mlp_residual(x, first, biases[0], second, biases[1], residual, gamma)

        def definition(x: Tensor, first: Tensor, second: Tensor, residual: Tensor, *rest: Any) -> Tensor:
            hidden = reference.linear_gelu(x, first, rest[0])
            return reference.linear_residual(hidden, second, rest[1], residual, rest[2], None)

        assert_as_accurate(found, definition, x, first, second, residual, *biases, gamma)


def compare(candidates: dict[str, Callable[..., Tensor]], *, alike: bool = True) -> selection.Selection:
    def example(dtype: torch.dtype) -> tuple[Tensor]:
        return (torch.linspace(1, 2, 100_000, dtype=dtype),)

    return selection._compare("test", candidates, example, torch.float32, alike=alike)


def slow(x: Tensor) -> Tensor:
    for _ in range(50):
        x.exp()
    return x * 2


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("not on this processor\nwith a long explanation")


def test_the_fastest_of_those_that_are_right_is_chosen() -> None:
    found = compare(
        {
            "trusted": slow,
            "fast": lambda x: x * 2,
            "wrong": lambda x: x * 2.001,
            "nan": lambda x: x * torch.nan,
            "no": failing,
        }
    )
    assert found.chosen == "fast"
    assert set(found.seconds) == {"trusted", "fast"}
    assert found.rejected["no"] == "not on this processor"
    assert "relative error" in found.rejected["wrong"]
    assert "relative error" in found.rejected["nan"]


def test_a_damaged_library_is_left_out() -> None:
    def damaged(x: Tensor) -> Tensor:
        raise OSError

    for alike in (True, False):
        found = compare({"trusted": slow, "damaged": damaged, "half": lambda x: x / 2}, alike=alike)
        assert found.rejected["damaged"] == "OSError"
        # Candidates that need not be alike are all trusted, if they run.
        assert (found.chosen == "half") is not alike


def test_the_trusted_one_stays_unless_another_is_clearly_faster() -> None:
    assert compare({"trusted": lambda x: x * 2, "slow": slow}).chosen == "trusted"
    assert compare({"only": slow}).chosen == "only"


@pytest.mark.parametrize(
    ("name", "other", "noise", "chosen"),
    [
        ("onednn", 1.05, 0.0, "llvm"),
        ("onednn", 0.93, 0.02, "onednn"),
        ("onednn", 0.99, 0.02, "llvm"),
        ("aten", 0.93, 0.02, "aten"),
        ("onednn-packed", 0.95, 0.0, "llvm"),
        ("onednn-packed", 0.85, 0.0, "onednn-packed"),
        ("onednn-packed", 1.15, 0.0, "llvm"),
    ],
)
def test_our_own_kernel_is_taken_unless_another_is_clearly_faster(
    name: str, other: float, noise: float, chosen: str
) -> None:
    """Faster by more than the noise, or by as much as a second copy of every weight is worth."""
    seconds = {"aten": 1.2, name: other, "llvm": 1.0}
    assert selection._fastest(seconds, noise) == chosen
    found = selection.Selection("product", torch.float32, chosen, seconds, {}, noise=noise)
    assert found.reason.startswith(f"{name if other < 1 and chosen == 'llvm' else chosen} measured")


def test_the_first_stays_unless_another_is_faster_by_more_than_the_noise() -> None:
    seconds = {"aten": 1.0, "onednn": 0.977, "onednn-packed": 0.95}
    assert selection._fastest(seconds, 0.01) == "onednn"
    assert selection._fastest(seconds, 0.03) == "aten"


def test_weights_are_as_cold_as_in_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which one candidate is quick with the weight that it read last, and slow with any other."""
    now, last, seen = 0.0, None, []

    def spend(weight: Tensor, warm: float, cold: float) -> Tensor:
        nonlocal now, last
        now += warm if weight.data_ptr() == last else cold
        last = weight.data_ptr()
        seen.append(last)
        return weight * 2

    monkeypatch.setattr(selection.time, "thread_time", lambda: now)
    candidates = {
        "trusted": lambda x, w: spend(w, 5.0, 5.0),
        "in cache": lambda x, w: spend(w, 1.0, 9.0),
    }
    weight = torch.nn.Parameter(torch.ones(1024, 512), requires_grad=False)
    found = selection._compare("test", candidates, lambda dtype: (torch.ones(3), weight), torch.float32, alike=True)
    assert found.chosen == "trusted"
    assert found.seconds == {"trusted": 5.0, "in cache": 9.0}
    assert found.noise == 0.01
    assert len({*seen}) > selection._ROUNDS


def test_noise_is_how_far_the_best_rounds_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now, times = 0.0, iter([])

    def spend(x: Tensor) -> Tensor:
        nonlocal now
        now += next(times, 0.0)
        return x * 2

    monkeypatch.setattr(selection.time, "thread_time", lambda: now)
    monkeypatch.setattr(selection, "_ROUNDS", 3)
    times = iter([0, 0, 0, 1.0, 2.0, 1.04, 2.1, 1.5, 2.02])
    assert compare({"trusted": spend, "other": spend}).noise == pytest.approx((0.04 + 0.01) / 2)


@pytest.mark.skipif(llvm.why_not() is not None, reason=str(llvm.why_not()))
def test_odd_sizes_have_a_choice_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our kernels, from the comparison that was made; a run that is resumed settles both."""
    monkeypatch.setattr(selection, "_selections", {})
    seconds = {"aten": 2.0, "onednn": 1.5, "llvm": 1.0}
    names = [name for o in products.CANDIDATES for name in (o, f"{o} of few rows")]
    odd = {}
    for name in names:
        found = selection.Selection(name, torch.float32, "llvm", seconds, {})
        selection._selections[name, torch.float32] = found
    for operation in products.CANDIDATES:
        for rows in (3, 50):
            assert products._choose(operation, torch.randn(48, 64), rows) == "llvm"
            odd[operation, rows] = products._choose(operation, torch.randn(44, 64), rows)
            assert products._choose(operation, torch.randn(48, 44), rows) == "onednn"
    assert set(odd.values()) == {"onednn"}
    ran: list[str] = []
    for name in products._LINEAR:
        record = lambda *_, name=name: ran.append(name) or torch.empty(50, 44)  # noqa: E731
        monkeypatch.setitem(products._LINEAR, name, record)
    products.linear(torch.randn(50, 64), torch.randn(44, 64), None)
    noted = [(found.operation, found.chosen) for found in selection.selections()]
    selection._selections.clear()
    for operation, chosen in noted:
        selection.settle(operation, torch.float32, chosen)
    products.linear(torch.randn(50, 64), torch.randn(44, 64), None)
    assert ran == ["onednn", "onednn"]


def test_a_choice_is_made_once_per_operation_dtype_and_threads() -> None:
    calls = 0

    def example(dtype: torch.dtype) -> tuple[Tensor]:
        nonlocal calls
        calls += 1
        return (torch.ones(10, dtype=dtype),)

    candidates: dict[str, Callable[..., Tensor]] = {"a": lambda x: x * 2, "b": lambda x: x + x}
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        assert selection.select("test: once", candidates, example, dtype) in candidates
    assert calls == 2
    assert [s.dtype for s in selection.selections() if s.operation == "test: once"] == [torch.float32, torch.bfloat16]


@torch.inference_mode()
def test_a_comparison_in_inference_mode_is_on_weights_of_a_model() -> None:
    """Inference tensors are packed at every call, which would count against whoever packs."""

    def candidate(x: Tensor) -> Tensor:
        if x.is_inference():
            raise RuntimeError("an inference tensor")
        return x * 2

    found = compare({"trusted": lambda x: x * 2, "packs": candidate})
    assert not found.rejected


@torch.inference_mode()
def test_a_weight_without_a_version_is_not_packed() -> None:
    weight = torch.randn(5, 8)
    assert weight.is_inference()
    assert products._packed(weight, 3) is weight


@torch.inference_mode()
def test_few_rows_are_chosen_apart_and_without_another_copy_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}
    chosen = "aten"

    def select(operation: str, candidates: dict[str, Any], example: Callable[..., Any], dtype: torch.dtype) -> str:
        asked[operation] = list(candidates)
        assert example(dtype)[0].shape[0] == (13 if operation.endswith("few rows") else 224)
        return "onednn" if operation.endswith("few rows") else chosen

    def compared(operation: str, *_: Any) -> selection.Selection:
        seconds = {"aten": 2.0, "onednn-packed": 1.0, "onednn": 1.5, "llvm": 1.6}
        return selection.Selection(operation, torch.float32, chosen, seconds, {})

    monkeypatch.setattr(products, "select", select)
    monkeypatch.setattr(products, "compare_candidates", compared)
    for operation, candidates in products.CANDIDATES.items():
        chosen = "aten"
        assert products._choose(operation, torch.empty(64, 64), 16) == "aten"
        assert f"{operation} of few rows" not in asked
        assert products._choose(operation, torch.empty(64, 64), 15) == "onednn"
        assert asked[operation] == list(candidates)
        assert asked[f"{operation} of few rows"] == [name for name in candidates if name != "onednn-packed"]
        # Packed weights are there already.
        chosen = "onednn-packed"
        assert products._choose(operation, torch.empty(64, 64), 15) == "onednn-packed"
        # A frozen weight has no copy.
        assert products._choose(operation, products.Frozen(torch.empty(64, 64), False), 16) == "onednn"


@pytest.mark.parametrize("wanting", [None, *products.CANDIDATES])
def test_no_copy_is_kept_beside_weights_that_stay_dense(wanting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense weights are for processors where no product prefers packed ones, the plain one or another."""
    for operation in products.CANDIDATES:
        chosen = "onednn-packed" if operation == wanting else "aten"
        seconds = {"aten": 1.0, "onednn-packed": 0.5 if operation == wanting else 2.0}
        found = selection.Selection(operation, torch.float32, chosen, seconds, {})
        monkeypatch.setitem(selection._selections, (operation, torch.float32), found)
    assert products.prefers_onednn(torch.float32) == (wanting is not None)


@pytest.mark.parametrize(
    ("many", "few", "wanted"), [(1.05, 0.5, True), (1.05, 0.99, False), (1.2, 0.5, False), (1.0, 2.0, True)]
)
def test_few_rows_may_decide_the_layout(many: float, few: float, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they gain more of a product than many rows lose, and these lose little."""
    for operation, share in (*((name, many) for name in products.CANDIDATES), ("layout for few rows", few)):
        seconds = {"aten": 1.0, "onednn-packed": share}
        found = selection.Selection(operation, torch.float32, "aten", seconds, {})
        monkeypatch.setitem(selection._selections, (operation, torch.float32), found)
    assert products.prefers_onednn(torch.float32, few_rows=True) == wanted
    assert products.prefers_onednn(torch.float32) == (many == 1)


def test_one_misjudged_product_does_not_decide_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    for operation, share in zip((*products.CANDIDATES, "layout for few rows"), (1.2, 1.03, 1.04, 0.7), strict=True):
        seconds = {"aten": 1.0, "onednn-packed": share}
        found = selection.Selection(operation, torch.float32, "aten", seconds, {})
        monkeypatch.setitem(selection._selections, (operation, torch.float32), found)
    assert products.prefers_onednn(torch.float32, few_rows=True)


def test_a_few_short_sequences_take_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is quicker for many."""
    taken: list[tuple[int, int]] = []

    def tiled(q: Tensor, *_: Any) -> Tensor:
        taken.append((q.shape[0], q.shape[1]))
        return torch.zeros(q.shape)

    monkeypatch.setattr(attention, "choice", lambda *_: "tiled")
    monkeypatch.setitem(attention._ALL, "tiled", tiled)
    for batch, length in ((1, 13), (4, 64), (5, 13), (1, 65)):
        q, k, v = torch.randn(batch, length, 3, 2, 8).unbind(2)
        found = attention.plain_attention(q, k, v, 0.3)
        if (batch, length) not in taken:
            assert_as_accurate(found, plain_attention, q, k, v, 0.3, None)
    assert taken == [(5, 13), (1, 65)]


def test_deterministic_algorithms_are_the_trusted_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock said before, and without asking it."""
    monkeypatch.setattr(selection, "_selections", {})
    candidates: dict[str, Callable[..., Tensor]] = {"trusted": slow, "fast": lambda x: x * 2}

    def example(dtype: torch.dtype) -> tuple[Tensor]:
        return (torch.linspace(1, 2, 100_000, dtype=dtype),)

    assert selection.select("test", candidates, example, torch.float32) == "fast"
    with deterministic_algorithms():
        assert selection.select("test", candidates, example, torch.float32) == "trusted"
        assert selection.select("other", candidates, example, torch.float32) == "trusted"
    assert [s.operation for s in selection.selections()] == ["test"]


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes a file of choices and names it in the environment; no comparison of before is known."""
    monkeypatch.setattr(selection, "_selections", {})
    selection._read.cache_clear()

    def written(**changes: Any) -> Path:
        path = tmp_path / "choices.json"
        path.write_text(json.dumps({**selection.choices(), **changes}))
        monkeypatch.setattr(selection, "_selections", {})
        monkeypatch.setenv(selection.CHOICES, str(path))
        selection._read.cache_clear()
        return path

    yield written
    selection._read.cache_clear()


def example(dtype: torch.dtype) -> tuple[Tensor]:
    return (torch.linspace(1, 2, 100_000, dtype=dtype),)


CANDIDATES: dict[str, Callable[..., Tensor]] = {"trusted": lambda x: slow(x), "fast": lambda x: x * 2}


def test_a_file_of_choices_settles_them_in_every_mode(choices: Callable[..., Path]) -> None:
    assert selection.select("test", CANDIDATES, example, torch.float32) == "fast"
    measured = selection.selections()[0]
    choices()
    never: Any = None
    for _ in range(2):
        assert selection.select("test", CANDIDATES, never, torch.float32) == "fast"
        with deterministic_algorithms():
            assert selection.select("test", CANDIDATES, never, torch.float32) == "fast"
            assert selection.select("other", CANDIDATES, never, torch.float32) == "trusted"
    found = selection.selections()[0]
    assert (found.source, found.seconds, found.rejected) == ("file", measured.seconds, measured.rejected)
    assert "(from the file in XFM_CPU_CHOICES)" in found.reason
    # What the file does not know is compared.
    assert selection.select("test", CANDIDATES, example, torch.float64) == "fast"


def chosen(**parts: Any) -> dict[str, Any]:
    """A file with this choice."""
    known = {"operation": "test", "dtype": "float32", "chosen": "odd", "seconds": {}, "rejected": {}}
    return {"choices": [known | parts]}


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"processor": "another"}, "another"),
        ({"torch": "1.0"}, "torch.*1.0"),
        ({"schema": 7}, "schema 7"),
        ({"choices": [{"operation": "test"}]}, ""),
        (chosen(), "odd"),
        (chosen(chosen=["fast"]), "fast"),
        (chosen(dtype="float3"), ""),
        (chosen(rejected="odd"), ""),
        (chosen(seconds="odd"), ""),
        (chosen(seconds={"odd": "long"}), ""),
        (chosen(seconds={"odd": 0}), ""),
        (chosen(seconds={"trusted": 1.0, "fast": 0.5}), "odd"),
    ],
)
def test_a_file_of_choices_that_cannot_be_used(
    choices: Callable[..., Path], changes: dict[str, Any], value: str
) -> None:
    path = choices(**changes)
    with pytest.raises(InputError, match=value) as raised:
        selection.select("test", CANDIDATES, example, torch.float32)
    assert str(path) in str(raised.value)
    assert "xfm-fast tune --cpu" in str(raised.value)
    path.unlink()
    selection._read.cache_clear()
    with pytest.raises(InputError, match=path.name):
        selection.select("test", CANDIDATES, example, torch.float32)


def test_the_reason_of_a_choice() -> None:
    def reason(chosen: str, **seconds: float) -> str:
        return selection.Selection("test", torch.float32, chosen, seconds, {}, noise=0.04).reason

    assert reason("aten", aten=1.0, onednn=0.987) == (
        "onednn measured 1.3% faster than aten, below the 4% that justify it"
    )
    assert reason("onednn", aten=1.0, onednn=0.9) == "onednn measured 10.0% faster than aten"
    assert reason("onednn", aten=2.3, onednn=1.0) == "onednn measured 2.3 times faster than aten"
    assert reason("aten", aten=1.0, onednn=1.25, tiled=2.0) == "aten measured 20.0% faster than onednn"
    assert reason("onednn", aten=1.2, onednn=0.9, llvm=1.2) == (
        "onednn measured 25.0% faster than aten and 25.0% faster than llvm"
    )
    assert "9%" in reason("aten", aten=1.0, **{"onednn-packed": 0.95})
    assert reason("aten", aten=float("nan")) == "aten is the only one here"
    assert selection.Selection("test", torch.float32, "x", {}, {}, "settled").reason == (
        "not compared (settled by the program)"
    )


def test_every_implementation_has_its_turn() -> None:
    tables = [race.candidates for race in races().values() if race.alike]
    here = {*LIBRARIES} - ({"llvm"} if llvm.why_not() else set())
    assert {name for table in tables for name in table} == here
    assert {name for race in races().values() for name in race.candidates} <= {*PATHS}
    assert all(any(word in name for name in races()) or llvm.why_not() or int8.why_not() for word in SIZES)


def test_all_choices_are_made_at_once(library: str) -> None:
    """Under the names by which the operations ask for them, with whatever is chosen."""
    compared_names = {found.operation for found, _ in compare_all([torch.float32])}
    assert compared_names == set(races())
    assert all(race.flops > 0 for _, race in compare_all([torch.float32]))
    known = dict(selection._selections)
    x, weight = torch.randn(16, 64), torch.randn(64, 64)
    with torch.inference_mode():
        for rows in (x, x[:3]):
            for run in (ops.linear, ops.linear_gelu):
                run(rows, weight, None)
            ops.linear_residual(rows, weight, None, rows)
        for tokens in (10, 70, 130):
            q, k, v = torch.randn(5, tokens, 3, 2, 16).unbind(2)
            attention.plain_attention(q, k, v, 0.3)
            bias = torch.zeros(5, 2, tokens, tokens)
            attention.biased_attention(q, k, v, 0.3, bias)
            attention.attention_backward(q, q, k, v, 0.3)
            attention.attention_backward(q, q, k, v, 0.3, bias, bias_gradient=True)
    weight.requires_grad_()
    ops.linear(x, weight, None).sum().backward()
    assert selection._selections == known


SHAPE = (3, 333, 1001)


def _mask(probability: float, seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return Dropout(probability, torch.tensor([seed])).mask(shape, torch.float32).clone()


@pytest.mark.parametrize("probability", [0.0, 1e-3, 0.1, 0.5, 0.9])
def test_share(probability: float) -> None:
    mask = _mask(probability, 1)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    spread = (probability * (1 - probability) / mask.numel()) ** 0.5
    assert abs(float(1 - mask.mean()) - probability) <= 5 * spread + 2**-17
    assert abs(1 - Dropout(probability, torch.tensor([1])).kept - probability) <= 2**-17


def test_nearly_everything_may_be_dropped() -> None:
    dropout = Dropout(1 - 1e-9, torch.tensor([1]))
    assert dropout.kept == 2**-16
    assert 0 < float(dropout.mask((1000, 1000), torch.float32).sum()) < 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 5, -1, 2**62])
def test_the_same_seed_gives_the_same_masks(seed: int, dtype: torch.dtype) -> None:
    first, second = (Dropout(0.3, torch.tensor([seed])) for _ in range(2))
    for shape in ((7, 5), (1,), (2, 3, 111)):
        a = first.mask(shape, dtype).clone()
        assert torch.equal(a, second.mask(shape, dtype))
        # Whatever the type, the same elements are dropped.
    assert torch.equal(_mask(0.3, seed, (7, 5)).to(dtype), Dropout(0.3, torch.tensor([seed])).mask((7, 5), dtype))


def test_masks_do_not_follow_from_each_other() -> None:
    """Neighbours in a row, rows, calls and seeds: what they drop together is what chance drops together."""
    dropout = Dropout(0.5, torch.tensor([3]))
    first, second = (dropout.mask(SHAPE, torch.float32).clone() for _ in range(2))
    pairs = [(first[..., :-k], first[..., k:]) for k in (1, 2, 3, 4, 8)]
    pairs += [(first[:, :-1], first[:, 1:]), (first, second), (first, _mask(0.5, 4))]
    for a, b in pairs:
        assert abs(float(((a - 0.5) * (b - 0.5)).mean()) * 4) <= 5 / a.numel() ** 0.5


def test_a_branch_in_training_keeps_its_mean() -> None:
    x, weight = torch.ones(4000, 1), torch.ones(50, 1, requires_grad=True)
    torch.manual_seed(0)
    out = ops.linear_residual(x, weight, None, torch.zeros(4000, 50), dropout_p=0.25)
    kept = out.detach() != 0
    assert abs(float(kept.float().mean()) - 0.75) < 5 * (0.25 * 0.75 / out.numel()) ** 0.5
    torch.testing.assert_close(out.detach()[kept], torch.full_like(out.detach()[kept], 4 / 3))
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    # 4,000 terms of one size, in whatever order.
    torch.testing.assert_close(gradient[:, 0], kept.sum(0) * (4 / 3), rtol=1e-4, atol=0)
    torch.manual_seed(0)
    again = ops.linear_residual(x, weight, None, torch.zeros(4000, 50), dropout_p=0.25)
    assert torch.equal(again, out)


_SCRIPT = """
import resource, sys
import torch
from xfm_fast.kernels.cpu.workspace import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    raise SystemExit(3)
for _ in range(3):
    del_me = [torch.ones(1 << 20) for _ in range(4)]
    del del_me
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    del_me = [torch.ones(1 << 20) for _ in range(4)]
    del del_me
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, check=False, timeout=120
    )
    if run.returncode == 3:
        pytest.skip("the C library of this system has no such options")
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_kept_memory_is_not_faulted_in_again() -> None:
    """80 MB in pieces of 4 MB are 20,480 pages of 4 KB where they are returned and taken again.

    What other allocations leave between them can cost some pieces anew: four of the twenty were seen.
    """
    assert _faults("keep") < 20_480 // 2


_HEAP_SCRIPT = """
import re, sys
from pathlib import Path
import torch
from xfm_fast.kernels.cpu.workspace import keep_freed_memory

if not keep_freed_memory():
    raise SystemExit(3)
tensors = [torch.ones(9 << 16) for _ in range(64)]
places = sorted(tensor.data_ptr() for tensor in tensors)
parts = Path("/proc/self/smaps").read_text().split("[heap]")[1:]
asked = any("hg" in re.findall(r"VmFlags: (.*)", part)[0].split() for part in parts)
print(int(asked), places[-1] - places[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_kept_memory_asks_for_huge_pages_and_lies_without_gaps() -> None:
    """64 tensors of 2.25 MB, which begin 4 MB apart where each has huge pages of its own."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("this system gives no huge pages")
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    run = subprocess.run(
        [sys.executable, "-c", _HEAP_SCRIPT], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    if run.returncode == 3:
        pytest.skip("the C library of this system has no such options")
    assert run.returncode == 0, run.stderr
    asked, extent = map(int, run.stdout.split())
    # How many a system gives is its own affair.
    assert asked
    assert extent < 64 * 2.5 * 2**20
