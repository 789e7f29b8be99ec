"""Every Triton kernel through its operation, interpreted or compiled: results and gradients against fp64; wiring."""

# Operations take the arguments of their case by name, which no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from tests.kernels.cases import CASES, Arguments, Case, converted, leaves, offsets
from tests.kernels.triton_testing import assert_triton_is_accurate, poison
from xfm_fast.kernels import attention, ops, tune
from xfm_fast.kernels.checks import BIAS_HEAD_DIMS
from xfm_fast.kernels.derived import forget
from xfm_fast.kernels.triton import cross_entropy, gelu, launch, layer_norm, relpos_table
from xfm_fast.kernels.triton.launch import LaunchConfig


def window(height: int, width: int, batch: int, heads: int, head_dim: int) -> Case:
    """Self-attention of a window with a class token."""
    rows = (2 * height - 1) * (2 * width - 1) + 3
    shapes = dict.fromkeys("qkv", (batch, 1 + height * width, heads, head_dim)) | {"table": (rows, heads)}
    return Case(partial(ops.relpos_attention, window=(height, width)), lambda _: shapes)


def biased(
    batch: int, entries: int, queries: int, keys: int, heads: int, head_dim: int, *, masked: bool = False
) -> Case:
    """Attention with a bias that `entries` of the batch do not share, and its logsumexp."""
    shapes: Arguments = dict.fromkeys("kv", (batch, keys, heads, head_dim))
    shapes |= {"q": (batch, queries, heads, head_dim), "bias": (entries, heads, queries, keys)}
    if masked:
        shapes["key_mask"] = torch.arange(batch * keys).view(batch, keys) % 5 < 3
    return Case(partial(ops.bias_attention, return_lse=True), lambda _: shapes)


def packed(
    queries: Sequence[int], keys: Sequence[int], heads: int, head_dim: int, key_mask: Tensor | None = None
) -> Case:
    """Attention of sequences of these lengths."""
    shapes: Arguments = dict.fromkeys("kv", (sum(keys), heads, head_dim)) | {"q": (sum(queries), heads, head_dim)}
    shapes |= {"cu_seqlens_q": offsets(*queries), "cu_seqlens_k": offsets(*keys), "key_mask": key_mask}
    return Case(ops.varlen_attention, lambda _: shapes | {"max_q": max(queries), "max_k": max(keys)})


def norm(*shape: int, scaled: bool = False) -> Case:
    """A residual sum with its norm."""
    width = shape[-1]
    shapes: Arguments = {"x": shape, "residual": shape, "weight": (width,), "bias": (width,)}
    if scaled:
        shapes |= {"gamma": (width,), "row_scale": (torch.arange(shape[0]) % 3) / 2}

    def call(row_scale: Tensor | None = None, **given: Any) -> Any:
        scale = None if row_scale is None else row_scale.to(given["x"].dtype)
        return ops.add_layer_norm(**given, eps=1e-5, row_scale=scale)

    return Case(call, lambda _: shapes)


def embedding(count: int, width: int, padding: int | None) -> Case:
    """More tokens than entries, long runs, and entries that no token has."""
    tokens = torch.arange(count) * 7 % 9
    tokens[: count // 2] = 3
    shapes = {"tokens": tokens, "positions": torch.arange(count) % 5, "word": (12, width), "position": (6, width)}
    return Case(
        partial(ops.embed_layer_norm, eps=1e-5, padding_idx=padding),
        lambda _: shapes | dict.fromkeys(("type_row", "weight", "bias"), (width,)),
    )


def vocabulary(operation: Any, rows: int, width: int, size: int, ignored: int = -100, **options: Any) -> Case:
    """A loss over a vocabulary, some of whose rows do not count."""
    target = torch.arange(rows) * 7 % size
    target[2::5] = ignored
    shapes = {"h": (rows, width), "w": (size, width), "b": (size,), "target": target}
    return Case(partial(operation, ignore_index=ignored, **options), lambda _: shapes)


def activation(rows: int, width: int, *, bias: bool = True) -> Case:
    """A linear layer with its GELU."""
    shapes = {"x": (rows, 24), "weight": (width, 24), "bias": (width,) if bias else None}
    return Case(ops.linear_gelu, lambda _: shapes)


def last_key_masked(*lengths: int) -> Tensor:
    """Of keys every third, and all of the second sequence's."""
    mask = torch.arange(sum(lengths)) % 3 != 1
    mask[lengths[0] : lengths[0] + lengths[1]] = False
    return mask


KERNELS: dict[str, Case] = {
    "relpos, 2 tokens": window(1, 1, 3, 4, 64),
    "relpos, 17 tokens": window(4, 4, 1, 3, 80),
    "relpos, a tail": window(2, 31, 1, 2, 64),
    "relpos, whole tiles": window(3, 21, 1, 1, 64),
    "relpos, 128": window(10, 11, 1, 1, 128),
    "bias, shared": biased(2, 1, 5, 9, 2, 16),
    "bias, masked": biased(2, 1, 5, 9, 2, 16, masked=True),
    "bias, windows": biased(4, 2, 17, 33, 1, 32, masked=True),
    "bias, an entry each": biased(2, 2, 33, 64, 1, 64),
    "bias, more keys than a tile": biased(1, 1, 70, 130, 1, 64),
    "bias, in parts of the batch": biased(9, 1, 2, 3, 1, 16),
    **{f"bias, {head_dim}": biased(1, 1, 5, 9, 1, head_dim) for head_dim in (48, 72, 256)},
    "varlen, short": packed([13, 0, 1, 32, 7], [13, 0, 1, 32, 7], 2, 64),
    "varlen, zeros on both sides": packed([5, 0, 1, 17, 0, 3], [5, 7, 0, 17, 0, 1], 2, 64),
    "varlen, texts over images": packed([66, 0, 33], [50, 50, 65], 2, 64),
    "varlen, images of one size": packed([70, 3], [65, 65], 1, 64),
    "varlen, odd heads": packed([13, 0, 33, 1, 16, 2], [13, 4, 20, 0, 16, 40], 3, 32),
    "varlen, masked": packed([20, 3, 2, 70], [5, 40, 7, 100], 2, 64, last_key_masked(5, 40, 7, 100)),
    **{f"varlen, short, {d}": packed([13, 3, 5], [17, 3, 6], 2, d, last_key_masked(17, 3, 6)) for d in (80, 128)},
    "norm, a row": norm(1, 32),
    "norm, odd": norm(37, 63),
    "norm, the model's": norm(5, 768),
    "norm, scaled": norm(5, 3, 63, scaled=True),
    **{f"norm, {width}": norm(3, width, scaled=True) for width in (1, 2047)},
    "layer norm": Case(partial(ops.layer_norm, eps=1e-5), lambda _: {"x": (7, 45), "weight": (45,), "bias": (45,)}),
    "embedding": embedding(29, 63, 1),
    "embedding, no padding": embedding(70, 130, None),
    "gelu": activation(37, 1100),
    "gelu, no bias": activation(5, 45, bias=False),
    "loss": vocabulary(ops.linear_cross_entropy, 37, 111, 300, label_smoothing=0.1),
    "loss, a row": vocabulary(ops.linear_cross_entropy, 1, 32, 211),
    "loss, one slice": vocabulary(ops.linear_cross_entropy, 5, 63, 40),
    "log-likelihood": vocabulary(ops.token_log_likelihood, 21, 40, 211, 7),
}
LARGE = {
    "norm, 8192": norm(3, 8192, scaled=True),
    **{f"relpos, {w}, {d}": window(*w, 2, 2, d) for w, d in (((14, 14), 64), ((14, 14), 80), ((24, 24), 64))},
    **{f"bias, {head_dim}": biased(1, 1, 5, 9, 1, head_dim) for head_dim in BIAS_HEAD_DIMS},
    "bias, 197": biased(2, 1, 197, 197, 2, 64, masked=True),
    "bias, windows": biased(8, 4, 49, 49, 2, 32, masked=True),
    "bias, 577": biased(2, 2, 130, 577, 1, 128, masked=True),
    **{f"varlen, {d}": packed([197, 63, 0, 320], [577, 111, 197, 0], 2, d) for d in (64, 80)},
}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 64 columns and blocks of 8 (fp32) or 16 (fp16) rows, so that small inputs are cut like large ones."""
    monkeypatch.setattr(cross_entropy, "_SLICE", 64)
    monkeypatch.setattr(cross_entropy, "_BUFFER_BYTES", 64 * 4 * 8)


@each_dtype
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.usefixtures("small_blocks")
def test_results_and_gradients(name: str, dtype: torch.dtype) -> None:
    assert_triton_is_accurate(KERNELS[name], KERNELS[name].arguments(dtype, grad=True))


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("name", LARGE)
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
    bias = ops.relpos_bias(given["table"], (3, 5), dtype=torch.float32, scale=32**-0.5, backend="triton")
    made.clear()
    found = relpos(given, bias=bias)
    gradients = [torch.autograd.grad(out.square().sum(), leaves(given)) for out in (found, expected)]
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert made == [True, True], "only the backward pass makes one, with keys as rows"


def test_a_position_bias_in_fragments_changes_nothing_but_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hopper's forward kernel reads: the backward pass makes the plain bias for itself."""
    given = converted(CASES["relpos"].arguments(grad=True), torch.float16)
    table = given["table"]

    def attend(**options: Any) -> list[Tensor]:
        out = relpos(given, **options)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves(given))]

    expected = attend()
    monkeypatch.setattr(attention, "_in_fragments", lambda head_dim, *_, turned: head_dim == 32 and not turned)
    forget(table)
    options = {"dtype": torch.float16, "scale": 32**-0.5, "head_dim": 32}
    bias = ops.relpos_bias(table, (3, 5), **options, backend="triton")
    assert bias.shape == (table.shape[1], 1, 2, 256, 32)
    for found in (attend(), attend(bias=bias)):
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=5e-3, atol=5e-3 * float(right.detach().abs().max()))


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
        assert (value - expected[name]).abs().max() <= 1e-4 * max(1e-3, float(expected[name].abs().max())), name


def test_heads_of_another_width_are_refused_by_name() -> None:
    case = biased(2, 1, 6, 9, 2, 24)
    with pytest.raises(ValueError, match="24"):
        case.operation(**case.arguments(), backend="triton")


# The interpreter takes the configurations of the oldest architecture.
WIDTH, ARCH = 63, 80


@pytest.mark.parametrize("kernel", tune.WIDTHS)
def test_row_kernels_are_launched_as_tuned(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_ROWS", 11)
    seen: list[LaunchConfig] = []

    def launch_options(*given: Any, **variant: Any) -> tuple[dict[str, Any], LaunchConfig]:
        options, config = launch.launch_options(*given, **variant)
        seen.append(config)
        return options, config

    for module in (gelu, layer_norm):
        monkeypatch.setattr(module, "launch_options", launch_options)
    call = tune.model_workload(kernel, WIDTH, "fp32", device="cpu")
    expected = call()
    in_use = seen[-1]
    block = in_use.tiles["BLOCK"] if "norm" in kernel else 32
    tuned = LaunchConfig({"BLOCK": block, "ROWS": 2 * in_use.tiles["ROWS"]}, 2, 1)
    with tune.using(kernel, WIDTH, "fp32", ARCH, tuned), poison():
        torch.testing.assert_close(call(), expected, rtol=1e-5, atol=1e-5)
    assert seen[-1] == tuned != in_use
    call()
    assert seen[-1] == in_use
