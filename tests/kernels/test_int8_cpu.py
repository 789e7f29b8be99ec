"""Linear layers in int8 on CPU: their definition with rounded floats, and the marks that send a weight there."""

# Operands are one tuple, whose length no checker can know.
# pyright: reportCallIssue=false

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.agreement import deterministic_algorithms
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.cpu import int8, selection
from xfm_fast.kernels.flags import kind_of, mark, unmark

pytestmark = pytest.mark.skipif(
    int8.why_not() is not None, reason=f"no int8 products here: {int8.why_not()}"
)
as_bytes = pytest.mark.usefixtures("int8_chosen")


@pytest.fixture(params=selection.RACES["products of bytes"].candidates)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Bytes are multiplied by this one, if it has a kernel for their number."""
    for dtype in (torch.float32, torch.bfloat16):
        found = selection.Selection("products of bytes", dtype, request.param, {}, {}, "settled")
        monkeypatch.setitem(selection._selections, ("products of bytes", dtype), found)
    return request.param


def layer(
    inputs: int, outputs: int, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    nn.init.normal_(made.weight, std=0.3)
    # Channels of different sizes, of which one scale for all would leave nothing.
    made.weight.mul_(torch.logspace(-3, 3, outputs)[:, None])
    return made.to(dtype)


def tokens(shape: tuple[int, ...], width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, width)
    return (x * torch.logspace(-3, 3, x.shape[-2] if len(shape) > 1 else 1)[:, None]).to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest value of its row and channel."""
    scale = expected.float().abs()
    error = (found.float() - expected.float()).abs() / (
        scale + scale.mean(-1, keepdim=True) + 1e-30
    )
    return float(error.max()) if error.numel() else 0.0


@as_bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(72, 100), (128, 112)])
def test_gemms_are_those_of_rounded_floats(
    size: tuple[int, int], dtype: torch.dtype, library: str
) -> None:
    torch.manual_seed(0)
    inputs, outputs = size
    made, x = layer(inputs, outputs, dtype, bias=inputs == 128), tokens((2, 450), inputs, dtype)
    rounded = [reference.as_int8(x), reference.as_int8(made.weight.float())]
    rounded.append(None if made.bias is None else made.bias.float())  # type: ignore[arg-type]
    residual, gamma = torch.randn(2, 450, outputs).to(dtype), torch.rand(outputs).to(dtype)
    mark([made.weight], "int8")
    given, band = (x, made.weight, made.bias), 1e-5 if dtype == torch.float32 else 2.0**-6
    found = ops.linear(*given)
    assert found.dtype == dtype
    assert relative(found, reference.linear(*rounded)) < band
    assert relative(ops.linear_gelu(*given), reference.linear_gelu(*rounded)) < 4 * band
    for scale in (None, gamma):
        wide_scale = None if scale is None else scale.float()
        expected = reference.linear_residual(*rounded, residual.float(), wide_scale, None)
        found = ops.linear_residual(*given, residual, gamma=scale)
        assert found.dtype == dtype
        assert relative(found, expected) < band
    assert ops.linear(x[:0], *given[1:]).shape == (0, 450, outputs)


@pytest.mark.parametrize(
    ("width", "mixed"), [(72, 1), (96, 2), (64, 4), (192, 4), (384, 8), (768, 16), (1536, 16)]
)
def test_a_rotation_keeps_products_and_spreads_outliers(width: int, mixed: int) -> None:
    assert 2 ** len(reference.int8_strides(width)) == mixed
    torch.manual_seed(0)
    x, weight = torch.randn(5, width).double(), torch.randn(7, width).double()
    rotated = reference.rotate(x)
    assert torch.allclose(reference.rotate(rotated), mixed * x)
    assert torch.allclose(rotated @ reference.rotate(weight).T, mixed * x @ weight.T)
    unit = torch.zeros(width)
    unit[width // 2] = 1
    assert reference.rotate(unit).abs().sum() == mixed
    x[:, 3] *= 100
    step = x.abs().amax(1, keepdim=True) / 127
    plain = ((x / step).round() * step - x).square().mean().sqrt()
    error = (reference.as_int8(x) - x).square().mean().sqrt()
    assert error / plain == pytest.approx(mixed**-0.5, rel=0.2)


@as_bytes
@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("inputs", [64, 192, 384, 768])
def test_every_width_of_blocks(inputs: int, rows: int, library: str) -> None:
    torch.manual_seed(0)
    made, x = layer(inputs, 48), tokens((rows,), inputs)
    x[:, 5] *= 1000
    expected = reference.linear(reference.as_int8(x), reference.as_int8(made.weight), made.bias)
    mark([made.weight], "int8")
    assert relative(ops.linear(x, made.weight, made.bias), expected) < 1e-5


@as_bytes
@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, 160), (torch.bfloat16, 192)])
def test_mlp_rounds_the_hidden_layer_once(dtype: torch.dtype, wide: int, library: str) -> None:
    torch.manual_seed(0)
    first, second, x = (
        layer(64, wide, dtype),
        layer(wide, 64, dtype),
        torch.randn(3, 301, 64).to(dtype),
    )
    first.weight.copy_(torch.randn(wide, 64))
    residual, gamma = torch.randn_like(x), torch.rand(64).to(dtype)
    rounded = [reference.as_int8(part.weight.float()) for part in (first, second)]
    hidden = reference.linear_gelu(reference.as_int8(x), rounded[0], first.bias.float())
    expected = reference.linear_residual(
        reference.as_int8(hidden),
        rounded[1],
        second.bias.float(),
        residual.float(),
        gamma.float(),
        None,
    )
    mark([first.weight, second.weight], "int8")
    found = ops.mlp_residual(
        x, first.weight, first.bias, second.weight, second.bias, residual, gamma=gamma
    )
    # A hidden value on the edge between two levels may fall on either side.
    assert relative(found, expected) < (2e-3 if dtype == torch.float32 else 2.0**-6)
    vector = torch.ones(64, dtype=dtype)
    normed, summed = ops.linear_add_layer_norm(
        hidden.to(dtype), second.weight, second.bias, residual, vector, 0 * vector, 1e-5
    )
    assert torch.equal(
        summed, ops.linear_residual(hidden.to(dtype), second.weight, second.bias, residual)
    )
    assert relative(normed, torch.nn.functional.layer_norm(summed.float(), (64,))) < 2.0**-6


@as_bytes
def test_a_row_depends_on_itself_alone(library: str) -> None:
    torch.manual_seed(0)
    made, x = layer(64, 96), torch.randn(500, 64)
    mark([made.weight], "int8")
    whole = ops.linear(x, made.weight, made.bias)
    x[1:] *= 1000
    assert torch.equal(ops.linear(x, made.weight, made.bias)[0], whole[0])
    assert torch.equal(ops.linear(x[:1], made.weight, made.bias)[0], whole[0])


@as_bytes
@pytest.mark.parametrize("rows", [3, 70])
def test_a_norm_before_the_gemm(rows: int, library: str) -> None:
    torch.manual_seed(0)
    first, second, x = layer(128, 192), layer(192, 128), torch.randn(rows, 128) * 3 + 1
    first.weight.copy_(torch.randn(192, 128) / 10)
    second.weight.copy_(torch.randn(128, 192) / 10)
    norm, gamma = (torch.randn(128), torch.randn(128), 1e-5), torch.rand(128)
    mark([first.weight, second.weight], "int8")
    normed = ops.layer_norm(x, *norm)
    layers = (first.weight, first.bias, second.weight, second.bias)
    # A value on the edge between two levels may fall on either side.
    found, expected = ops.layer_norm_linear(x, *norm, *layers[:2]), ops.linear(normed, *layers[:2])
    assert relative(found, expected) < 2e-3
    found, expected = (
        ops.layer_norm_mlp(x, *norm, *layers, gamma=gamma),
        ops.mlp_residual(normed, *layers, x, gamma=gamma),
    )
    assert relative(found, expected) < 2e-3


@as_bytes
@pytest.mark.parametrize("rows", [3, 70])
def test_zeros_and_nan(rows: int, library: str) -> None:
    made = layer(64, 48)
    made.weight[3] = 0
    mark([made.weight], "int8")
    x = torch.zeros(rows, 64)
    x[1, 5], x[2] = float("nan"), 1.0
    found = ops.linear(x, made.weight, made.bias)
    assert torch.equal(found[0], made.bias)
    assert found[1].isnan().all()
    assert found[2].isfinite().all()
    assert found[2, 3] == made.bias[3]


@as_bytes
def test_marks_leave_the_parameter_as_it_was() -> None:
    made = nn.Linear(64, 96)
    weight, before = made.weight, made.weight.detach().clone()
    x = torch.randn(5, 64)
    exact = made(x).detach()
    mark([weight], "int8")
    assert made.weight is weight
    assert isinstance(weight, nn.Parameter)
    assert type(made.state_dict()["weight"]) is Tensor
    assert kind_of(copy.deepcopy(made).weight) == "int8"
    assert kind_of(pickle.loads(pickle.dumps(made)).weight) == "int8"
    # With a gradient, products are exact.
    assert torch.allclose(ops.linear(x, weight, made.bias), exact, atol=1e-5)
    ops.linear(x, weight, made.bias).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        rounded = ops.linear(x, weight, made.bias)
        assert not torch.allclose(rounded, exact, atol=1e-5)
        weight.mul_(2)
        assert torch.allclose(
            ops.linear(x, weight, None), 2 * (rounded - made.bias), rtol=1e-4, atol=1e-5
        )
        weight.copy_(before)
        unmark([weight, made.bias, None])
        assert type(weight) is nn.Parameter
        assert torch.allclose(ops.linear(x, weight, made.bias), exact, atol=1e-5)


@as_bytes
def test_other_types_than_those_of_activations() -> None:
    """A weight stored in fp32 serves bf16 activations, in int8 and with gradients; other misfits are refused."""
    made, x = layer(64, 96), torch.randn(7, 64).bfloat16()
    mark([made.weight], "int8")
    bias = made.bias.bfloat16()
    rounded = reference.linear(
        reference.as_int8(x), reference.as_int8(made.weight.float()), made.bias
    )
    assert relative(ops.linear(x, made.weight, bias), rounded) < 2.0**-6
    assert ops.linear(x.requires_grad_(), made.weight, bias).dtype == torch.bfloat16
    with pytest.raises(InputError, match="bias"):
        ops.linear(x, made.weight, made.bias)
    with pytest.raises(InputError, match="weight"):
        ops.linear(x[:, 1:], made.weight, bias)


@as_bytes
def test_sums_that_saturate_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = int8._gemm
    monkeypatch.setattr(
        int8, "_gemm", lambda *args, **options: exact(*args, **options).clamp(max=200)
    )
    int8.why_not.cache_clear()
    try:
        assert "saturate" in (int8.why_not() or "")
    finally:
        int8.why_not.cache_clear()


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("chosen", ["int8", "floats"])
def test_what_is_faster_is_taken(chosen: str, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For few rows and for many apart, and for each kind of product; without a clock, bytes."""
    torch.manual_seed(0)
    first, second, x = layer(64, 160), layer(160, 64), torch.randn(3 if few else 70, 64)

    def results() -> list[Tensor]:
        return [
            ops.linear(x, first.weight, first.bias),
            ops.linear_gelu(x, first.weight, first.bias),
            ops.linear_residual(ops.linear(x, first.weight, None), second.weight, second.bias, x),
            ops.mlp_residual(x, first.weight, first.bias, second.weight, second.bias, x),
        ]

    monkeypatch.setattr(selection, "_selections", {})
    floats = results()
    mark([first.weight, second.weight], "int8")
    with deterministic_algorithms():
        in_bytes = results()
    selection.set_choice(
        "products of bytes",
        torch.float32,
        next(iter(selection.RACES["products of bytes"].candidates)),
    )
    for name in (name for name in selection.RACES if "in 8 bits" in name):
        other = "floats" if chosen == "int8" else "int8"
        selection.set_choice(
            name, torch.float32, chosen if name.endswith("few rows") is few else other
        )
    expected = in_bytes if chosen == "int8" else floats
    assert all(map(torch.equal, results(), expected))
    assert not any(map(torch.equal, in_bytes, floats))


def test_a_layer_is_judged_by_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one product loses less than the others gain, int8 costs no time; without a clock the choice counts."""
    weights = [torch.empty(3 * 768, 768), torch.empty(768, 768)]
    weights += [torch.empty(4 * 768, 768), torch.empty(768, 4 * 768)]
    monkeypatch.setattr(int8, "_library", lambda dtype, weight: "llvm")

    def settle(*seconds: tuple[float, float] | str) -> None:
        for layer, times in zip(int8._LAYERS, seconds, strict=True):
            operation = f"{layer} in 8 bits of few rows"
            timed = dict[str, float]()
            if not isinstance(times, str):
                timed.update(int8=times[0], floats=times[1])
            choice = times if isinstance(times, str) else min(timed, key=timed.__getitem__)
            found = selection.Selection(operation, torch.float32, choice, timed, {})
            monkeypatch.setitem(selection._selections, (operation, torch.float32), found)

    settle((3.0, 4.0), (2.5, 2.0), (9.0, 12.0))
    assert int8.compiled_delay(12, torch.float32, weights) == 0
    settle((4.0, 3.0), (2.0, 2.5), (9.0, 8.0))
    assert int8.compiled_delay(12, torch.float32, weights) == pytest.approx(1.5)
    halves = [weight[: len(weight) // 2] for weight in weights]
    assert int8.compiled_delay(12, torch.float32, halves) == pytest.approx(0.75)
    assert int8.compiled_delay(32, torch.float32, weights) == pytest.approx(3.0)
    # Floats of another dtype would be converted at every call.
    assert int8.compiled_delay(12, torch.bfloat16, weights) == 0
    settle("int8", "floats", "int8")
    assert int8.compiled_delay(12, torch.float32, weights) == math.inf
    settle("int8", "int8", "int8")
    assert int8.compiled_delay(12, torch.float32, weights) == 0
    monkeypatch.setattr(int8, "_library", lambda dtype, weight: "onednn")
    assert int8.compiled_delay(12, torch.float32, weights) == math.inf
