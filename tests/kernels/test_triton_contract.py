"""Every Triton kernel through its operation, interpreted or compiled: results and gradients against fp64; wiring."""

# Operations take the arguments of their case by name, which no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from tests.kernels.cases import (
    CASES,
    Arguments,
    Case,
    activation,
    biased,
    converted,
    embedding,
    last_key_masked,
    leaves,
    norm,
    packed,
    vocabulary,
    window,
)
from tests.kernels.triton_testing import EMULATED, assert_triton_is_accurate
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops, relpos_attention, varlen_attention
from xfm_fast.kernels.caching import forget
from xfm_fast.kernels.checks import BIAS_HEAD_DIMS, Varlen
from xfm_fast.kernels.triton import cross_entropy, relpos_table

KERNELS: dict[str, Case] = {
    "relpos, 2 tokens": window(1, 1, 3, 4, 64),
    "relpos, 17 tokens": window(4, 4, 1, 3, 80),
    "relpos, a tail": window(2, 31, 1, 2, 64),
    "relpos, whole tiles": window(3, 21, 1, 1, 128),
    "relpos, 48": window(2, 3, 2, 2, 48),
    "bias, shared": biased(2, 1, 5, 9, 2, 16),
    "bias, masked": biased(2, 1, 5, 9, 2, 16, masked=True),
    "bias, windows": biased(4, 2, 17, 33, 1, 32, masked=True),
    "bias, more keys than a tile": biased(2, 2, 70, 130, 1, 64),
    "bias, in parts of the batch": biased(9, 1, 2, 3, 1, 16),
    **{f"bias, {head_dim}": biased(1, 1, 5, 9, 1, head_dim) for head_dim in (72, 256)},
    "varlen, short": packed([13, 0, 1, 32, 7], [13, 0, 1, 32, 7], 2, 64),
    "varlen, zeros on both sides": packed([5, 0, 1, 17, 0, 3], [5, 7, 0, 17, 0, 1], 2, 64),
    "varlen, texts over images": packed([66, 0, 33], [50, 50, 65], 2, 64),
    "varlen, images of one size": packed([70, 3], [65, 65], 1, 64),
    "varlen, odd heads": packed([13, 0, 33, 1, 16, 2], [13, 4, 20, 0, 16, 40], 3, 32),
    "varlen, masked": packed(
        [20, 3, 2, 70], [5, 40, 7, 100], 2, 64, last_key_masked(5, 40, 7, 100)
    ),
    "varlen, short, 80": packed([13, 3, 5], [17, 3, 6], 2, 80, last_key_masked(17, 3, 6)),
    "varlen, 48": packed([13, 0, 33], [13, 4, 20], 2, 48),
    "varlen, 160": packed([13, 0, 5, 2], [13, 4, 0, 20], 2, 160),
    "varlen, 192, masked": packed([7, 3, 2], [5, 4, 7], 1, 192, last_key_masked(5, 4, 7)),
    "norm, a row": norm(1, 32),
    "norm, odd": norm(37, 63),
    "norm, scaled": norm(5, 3, 63, scaled=True),
    "norm, wide": norm(3, 2047, scaled=True),
    "layer norm": Case(
        partial(ops.layer_norm, eps=1e-5), lambda _: {"x": (7, 45), "weight": (45,), "bias": (45,)}
    ),
    "embedding": embedding(29, 63, 1),
    "embedding, no padding": embedding(70, 130, None),
    "gelu": activation(37, 1100),
    "gelu, no bias": activation(5, 45, bias=False),
    "loss": vocabulary(ops.linear_cross_entropy, 37, 111, 300, label_smoothing=0.1),
    "loss, one slice": vocabulary(ops.linear_cross_entropy, 5, 63, 40),
    "log-likelihood": vocabulary(ops.token_log_likelihood, 21, 40, 211, 7),
}
LARGE = {
    "norm, 8192": norm(3, 8192, scaled=True),
    **{
        f"relpos, {w}, {d}": window(*w, 2, 2, d)
        for w, d in (((14, 14), 64), ((14, 14), 80), ((24, 24), 64))
    },
    **{f"bias, {head_dim}": biased(1, 1, 5, 9, 1, head_dim) for head_dim in BIAS_HEAD_DIMS},
    "bias, 197": biased(2, 1, 197, 197, 2, 64, masked=True),
    "bias, windows": biased(8, 4, 49, 49, 2, 32, masked=True),
    "bias, 577": biased(2, 2, 130, 577, 1, 128, masked=True),
    **{f"varlen, {d}": packed([197, 63, 0, 320], [577, 111, 197, 0], 2, d) for d in (64, 80)},
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Kernels of each family in half precision in the quick suite; bf16 needs a GPU.
HALF = (
    "relpos, a tail",
    "bias, windows",
    "varlen, zeros on both sides",
    "norm, scaled",
    "embedding",
    "gelu",
    "loss",
)


def each_dtype(names: Iterable[str]) -> pytest.MarkDecorator:
    """Cases by name in every dtype."""

    def marks(name: str, dtype: str) -> tuple[pytest.MarkDecorator, ...]:
        if dtype == "bf16" and not EMULATED:
            return (pytest.mark.gpu,)
        return () if dtype == "fp32" or name in HALF else (pytest.mark.slow,)

    pairs = [
        pytest.param(n, DTYPES[d], marks=marks(n, d), id=f"{n}-{d}") for n in names for d in DTYPES
    ]
    return pytest.mark.parametrize(("name", "dtype"), pairs)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 64 columns and blocks of 8 (fp32) or 16 (fp16) rows, so that small inputs are cut like large ones."""
    monkeypatch.setattr(cross_entropy, "_SLICE", 64)
    monkeypatch.setattr(cross_entropy, "_BUFFER_BYTES", 64 * 4 * 8)


@each_dtype(KERNELS)
@pytest.mark.usefixtures("small_blocks")
def test_results_and_gradients(name: str, dtype: torch.dtype) -> None:
    assert_triton_is_accurate(KERNELS[name], KERNELS[name].arguments(dtype, grad=True))


@pytest.mark.slow
@each_dtype(LARGE)
def test_large_shapes(name: str, dtype: torch.dtype) -> None:
    assert_triton_is_accurate(LARGE[name], LARGE[name].arguments(dtype, grad=True))


def relpos(arguments: Arguments, **options: Any) -> Tensor:
    return CASES["relpos"].operation(**arguments, backend="triton", **options)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one, `turned` or not, whenever a position bias is made."""
    seen: list[bool] = []
    original = relpos_table.materialise_bias

    def materialise(*given: Any, turned: bool = False, fragments: bool = False) -> Tensor:
        seen.append(turned)
        return original(*given, turned=turned, fragments=fragments)

    monkeypatch.setattr(relpos_table, "materialise_bias", materialise)
    return seen


def test_autocast_leaves_the_position_table_alone(made: list[bool]) -> None:
    """The bias is made of the parameter itself, once, and its gradient is not rounded to half precision."""
    given = CASES["relpos"].arguments(grad=True)
    with torch.autocast("cpu", torch.float16):
        first, second = (relpos(given) for _ in range(2))
    assert made == [False]
    assert first.dtype == torch.float16
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.float().sum(), given["table"])
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.half().float())


def test_a_position_bias_may_be_made_beforehand(made: list[bool]) -> None:
    given = CASES["relpos"].arguments(grad=True)
    expected = relpos(given)
    bias = ops.relpos_bias(
        given["table"], (3, 5), dtype=torch.float32, scale=32**-0.5, backend="triton"
    )
    made.clear()
    found = relpos(given, bias=bias)
    gradients = [
        torch.autograd.grad(out.square().sum(), leaves(given)) for out in (found, expected)
    ]
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert made == [True, True], "only the backward pass makes one, with keys as rows"


def test_a_position_bias_in_fragments_changes_nothing_but_its_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What Hopper's forward kernel reads: the backward pass makes the plain bias for itself."""
    given = converted(CASES["relpos"].arguments(grad=True), torch.float16)
    table = given["table"]

    def attend(**options: Any) -> list[Tensor]:
        out = relpos(given, **options)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves(given))]

    expected = attend()
    monkeypatch.setattr(
        relpos_attention,
        "_in_fragments",
        lambda head_dim, *_, turned: head_dim == 32 and not turned,
    )
    forget(table)
    options = {"dtype": torch.float16, "scale": 32**-0.5, "head_dim": 32}
    bias = ops.relpos_bias(table, (3, 5), **options, backend="triton")
    assert bias.shape == (table.shape[1], 1, 2, 256, 32)
    for found in (attend(), attend(bias=bias)):
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(
                ours, right, rtol=5e-3, atol=5e-3 * float(right.detach().abs().max())
            )


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
def test_any_scale_leaves_the_bias_its_digits(scale: float) -> None:
    """In half precision it is stored as a quotient by the scale; made beforehand or by the call."""
    given = converted(CASES["relpos"].arguments(grad=True), torch.float16)
    arguments = given | {
        "q": given["q"].detach().div(max(scale, 1.0)).requires_grad_(),
        "scale": scale,
    }
    assert_triton_is_accurate(CASES["relpos"], arguments)
    bias = ops.relpos_bias(
        given["table"], (3, 5), dtype=torch.float16, scale=scale, backend="triton"
    )
    assert torch.equal(relpos(arguments, bias=bias), relpos(arguments))


@pytest.mark.parametrize("name", ["varlen", "relpos", "bias"])
def test_heads_wider_than_any_kernel_are_refused(name: str) -> None:
    given = CASES[name].arguments()
    wide = {
        key: t.repeat(*[1] * (t.ndim - 1), 9) if key in ("q", "k", "v") else t
        for key, t in given.items()
    }
    with pytest.raises(InputError, match="heads of 288"):
        CASES[name].operation(**wide, backend="triton")


@pytest.mark.parametrize("head_dim", [8, 16, 48, 72, 112, 160, 192, 256])
def test_packed_heads_of_any_width_run_on_kernels_by_default(head_dim: int) -> None:
    """And not on the definition, a loop over the sequences."""
    given = packed([2], [2], 1, head_dim).arguments()
    assert varlen_attention.VARLEN_ATTENTION.fits["triton"](
        Varlen(**given, scale=1.0, dropout_p=0.0, seed=None)
    )


def test_a_graph_holds_what_fills_the_bias() -> None:
    """Or else a captured graph would read a bias that nothing in it writes."""
    given = CASES["relpos"].arguments()
    seen: list[str] = []

    def look(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(relpos, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(given), relpos(given))
    names = [name for name in seen if "relpos" in name]
    assert names == ["xfm_fast.relpos_bias.default", "xfm_fast.relpos_attention.default"]


def test_a_whole_model_on_triton_kernels() -> None:
    """Vision, text and fusion encoders, forward and backward, on the kernels that a GPU would run."""
    from tests.kernels.test_gpu import model_of, results

    model = model_of("cpu", torch.float32, layers=1, image_size=32)
    found, expected = (results(model, backend) for backend in ("triton", "reference"))
    for name, value in found.items():
        assert (value - expected[name]).abs().max() <= 1e-4 * max(
            1e-3, float(expected[name].abs().max())
        ), name
