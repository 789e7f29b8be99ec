"""Products in fp8: what rounding does, that kernels round as the definition does, and what is refused."""

# Operands are one tuple, whose length no checker can know.
# pyright: reportCallIssue=false

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.triton_testing import INTERPRETED, poison
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels import flags, fp8, ops, reference
from xfm_fast.kernels.checks import AddNorm
from xfm_fast.kernels.triton import layers as triton_layers
from xfm_fast.kernels.triton import rows as triton_rows


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _rounding_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter loses the carry of what it rounds up to the next power of two: PyTorch rounds for it."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(given: Any, of: Any, to: Any, rounding: Any) -> Any:
        if to.name != "fp8e4nv":
            return own(given, of, to, rounding)
        return torch.from_numpy(given.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def rows_like_activations(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of unlike size, one of zeros among them, one of next to nothing, and outliers."""
    x = torch.randn(count, width) * torch.logspace(-3, 3, count)[:, None]
    x[:, 3] *= 30
    x[1], x[2] = 0, 1e-35
    return x.to(dtype)


def test_rounding_errs_by_a_sixteenth_of_an_entry_or_a_step_of_the_least() -> None:
    x = rows_like_activations(9, 111)
    rows, scales = reference.quantise_rows(x)
    assert rows.dtype == torch.float8_e4m3fn
    assert scales.shape == (9, 1)
    error = (reference.rounded_rows(x) - x).abs()
    # Three bits of mantissa; below 2⁻⁶ the numbers of e4m3 are multiples of 2⁻⁹.
    assert (error <= torch.maximum(x.abs() * 2**-4, scales * 2**-10) * 1.001).all()
    assert torch.equal(reference.rounded_rows(x).abs().amax(1)[3:], x.abs().amax(1)[3:])
    assert not reference.rounded_rows(x)[1].any()


def same_bits(found: tuple[Tensor, Tensor], x: Tensor) -> None:
    rows, scales = reference.quantise_rows(x.reshape(-1, x.shape[-1]))
    assert torch.equal(found[0].view(torch.uint8), rows.view(torch.uint8))
    assert torch.equal(found[1], scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_kernel_rounds_as_the_reference(dtype: torch.dtype) -> None:
    for x in (rows_like_activations(6, 222, dtype)[:, ::2], rows_like_activations(6, 16, dtype)):
        with poison():
            same_bits(triton_rows.quantise_rows(x.view(2, 3, x.shape[1])), x)


def test_a_norm_and_gelu_round_what_they_store() -> None:
    x, vector = torch.randn(6, 48).half(), torch.randn(48).half()
    given = AddNorm(x, x, vector, vector, 1e-5, vector)
    with poison():
        room = triton_rows.room_for(x)
        made = triton_layers.add_layer_norm_forward(given, rounded=room)
    assert torch.equal(made.normed, triton_layers.add_layer_norm_forward(given).normed)
    same_bits(room, made.normed)
    for bias in (vector, None):
        with poison():
            out, *found = triton_rows.bias_gelu_quantise(x.clone(), bias)
        assert torch.equal(out, triton_rows.bias_gelu_forward(x, bias))
        same_bits((found[0], found[1]), out)


@pytest.mark.parametrize(("biased", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_gemms_in_the_block_are_the_reference(biased: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 5, 32).to(dtype), torch.randn(48, 32).to(dtype)
    bias, residual = torch.randn(48).to(dtype) if biased else None, torch.randn(2, 5, 48).to(dtype)
    exact = [t.float() if t is not None else None for t in (x, weight, bias)]
    product = reference.linear_fp8(*exact)  # pyright: ignore[reportArgumentType]
    with ops.use_fp8():
        found = ops.linear(x, weight, bias)
        activated = ops.linear_gelu(x, weight, bias)
        summed = ops.linear_residual(x, weight, bias, residual)
    assert found.dtype == activated.dtype == summed.dtype == dtype
    for made, wanted in ((found, product), (summed, product + residual.float())):
        torch.testing.assert_close(
            made, wanted.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0.02
        )
    torch.testing.assert_close(activated.float(), nn.functional.gelu(product), rtol=0.02, atol=0.02)
    assert not torch.equal(found, ops.linear(x, weight, bias))


Layers = tuple[Tensor, ...]


@pytest.fixture
def layers() -> Layers:
    """An MLP of width 32: weights and biases of its two layers, and of a norm."""
    weights = torch.randn(128, 32) / 8, torch.randn(128), torch.randn(32, 128) / 8, torch.randn(32)
    return *weights, torch.randn(32), torch.randn(32)


def test_a_branch_and_its_norm(layers: Layers) -> None:
    """Every operation with a product in it: the composition of products, whichever path it takes outside."""
    x, residual, gamma, (w1, b1, w2, b2, *norm) = (
        torch.randn(3, 32),
        torch.randn(3, 32),
        torch.randn(32),
        layers,
    )
    hidden = nn.functional.gelu(reference.linear_fp8(x, w1, b1))
    summed = residual + gamma * reference.linear_fp8(hidden, w2, b2)
    with ops.use_fp8():
        branch = ops.mlp_residual(x, w1, b1, w2, b2, residual, gamma=gamma)
        normed, joined = ops.linear_add_layer_norm(
            hidden, w2, b2, residual, *norm, 1e-5, gamma=gamma
        )
    torch.testing.assert_close(branch, summed)
    torch.testing.assert_close(joined, summed)
    torch.testing.assert_close(normed, reference.layer_norm(summed, *norm, 1e-5))


def test_interpreted_kernels_give_the_same_and_round_once(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, residual, (w1, b1, w2, b2, *norm) = torch.randn(3, 32), torch.randn(3, 32), layers
    passes: list[int] = []
    own = triton_rows.quantise_rows
    monkeypatch.setattr(
        triton_rows, "quantise_rows", lambda x: (passes.append(x.numel()), own(x))[1]
    )
    with ops.use_fp8():
        plain = ops.mlp_residual(ops.layer_norm(x, *norm, 1e-5), w1, b1, w2, b2, residual)
        with ops.use_backend("triton"):
            normed = ops.layer_norm(x, *norm, 1e-5)
            found = ops.mlp_residual(normed, w1, b1, w2, b2, residual)
            assert not passes
            normed += 1
            ops.linear(normed, w1, b1)
            ops.linear(torch.randn(3, 32), w1, b1)
            assert len(passes) == 2
            assert len(fp8.block.rounded) == 1
            del normed
            assert not fp8.block.rounded
            with torch.inference_mode():
                ops.layer_norm(x, *norm, 1e-5)
                assert not fp8.block.rounded, (
                    "tensors without versions, whose changes cannot be seen"
                )
    torch.testing.assert_close(found, plain, rtol=0, atol=0.05)


def test_gradients_and_devices_without_fp8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 32), torch.randn(16, 32, requires_grad=True)
    with torch.enable_grad(), ops.use_fp8():
        with pytest.raises(InputError, match="fp8"):
            ops.linear(x, weight, None)
        ops.linear(x, weight.detach(), None)
    with ops.use_fp8(), pytest.raises(UnavailableError, match="meta"):
        ops.linear(x.to("meta"), weight.to("meta"), None, backend="reference")
    for capability, usable in (((8, 0), False), ((9, 0), True)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda index=None, given=capability: given
        )
        assert (fp8._why_not("cuda", 0) is None) == usable


def test_a_marked_weight_is_multiplied_as_within_the_block(layers: Layers) -> None:
    x, residual, (w1, b1, w2, b2, *norm) = torch.randn(3, 32), torch.randn(3, 32), layers

    def run() -> tuple[Tensor, ...]:
        branch = ops.mlp_residual(x, w1, b1, w2, b2, residual)
        return (
            ops.linear(x, w1, b1),
            branch,
            *ops.linear_add_layer_norm(branch, w1[:32], b2, residual, *norm, 1e-5),
        )

    with ops.use_fp8():
        expected = run()[:2]
    weights = w1, w2 = nn.Parameter(w1), nn.Parameter(w2)
    exact = run()
    flags.mark(weights, "fp8")
    found = run()
    assert all(map(torch.equal, found, expected))
    assert not torch.equal(found[1], exact[1])
    with torch.enable_grad(), pytest.raises(InputError, match="fp8"):
        ops.linear(x, w1, b1)
    flags.unmark(weights)
    assert all(map(torch.equal, run(), exact))


def test_marks_go_with_what_is_made_of_the_weights() -> None:
    first, second = nn.Linear(32, 16), nn.Linear(32, 16)
    flags.mark([first.weight], "fp8")
    assert flags.kind_of(flags.concatenate((first.weight, second.weight))) is None
    flags.mark([second.weight], "int8")
    assert flags.kind_of(flags.concatenate((first.weight, second.weight))) is None
    flags.mark([second.weight], "fp8")
    assert flags.kind_of(flags.concatenate((first.weight, second.weight))) == "fp8"
    assert flags.kind_of(copy.deepcopy(first).weight) == "fp8"
    assert flags.kind_of(pickle.loads(pickle.dumps(first)).weight) == "fp8"
    assert type(first.state_dict()["weight"]) is Tensor


def test_compilers_take_marked_weights_and_exports_their_floats() -> None:
    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return ops.linear(x, self.weight, self.bias)

    x, layer = torch.randn(3, 32), Layer(32, 16)
    exact = layer(x)
    flags.mark([layer.weight], "fp8")
    rounded = layer(x)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x), rounded
    )
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), exact)


def test_levels_of_int8_reach_from_end_to_end() -> None:
    """127 levels on both sides of zero, of rotated rows."""
    largest = torch.tensor([127.0, 0.0, 254.0])
    assert reference.int8_steps(largest, torch.float32).tolist() == pytest.approx(
        [1, 1e-30 / 127, 2]
    )
    # As a number of 16 bits it is not rounded down, which would leave the largest value without a level.
    largest = torch.linspace(1, 2, 999)
    assert (
        reference.int8_steps(largest, torch.bfloat16).float() * 127 >= largest * (1 - 1e-6)
    ).all()
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    rotated = [reference.rotate(x) for x in (reference.as_int8(rows), rows)]
    levels = rotated[0] * 127 / rotated[1].abs().amax(-1, keepdim=True)
    assert ((levels - levels.round()).abs() < 1e-3).all()
    assert levels.abs().amax(-1).tolist() == pytest.approx([127] * 5)
