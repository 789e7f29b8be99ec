"""PyTorch's modules, fused: equal outputs and gradients with every mask and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.agreement import relative_error
from tests.replace.families import assert_close, gradients
from xfm_fast import accelerate
from xfm_fast.kernels import ops
from xfm_fast.replace.swap import Settings, restore, swap
from xfm_fast.replace.torch_modules import FusedLayerNorm

CLOSE = 1e-5
LENGTHS = torch.tensor([7, 1, 4])
PADDING = torch.arange(7) >= LENGTHS[:, None]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs of GEMMs in the fused forms."""
    shapes: list[tuple[int, ...]] = []
    for name in ("linear", "linear_gelu", "linear_add_layer_norm", "linear_residual"):
        original = getattr(ops, name)

        def seen(x: Tensor, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            shapes.append((*x.shape,))
            return _original(x, *args, **kwargs)

        monkeypatch.setattr(ops, name, seen)
    return shapes


def _run(model: nn.Module, call: Any, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output, gradients of the inputs and of the parameters."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    found = gradients(model, lambda: call(model, *inputs))
    return found | {str(number): t.grad for number, t in enumerate(inputs) if t.grad is not None}


@pytest.mark.parametrize(
    ("batch_first", "masks"),
    [
        (True, {}),
        (False, {"key_padding_mask": PADDING}),
        (False, {"attn_mask": torch.randn(3 * 4, 7, 7)}),
        (True, {"attn_mask": torch.ones(7, 7).triu(1).bool(), "key_padding_mask": PADDING}),
    ],
    ids=["none", "padding", "per head", "causal padding"],
)
def test_self_attention(
    batch_first: bool, masks: dict[str, Tensor], products: list[tuple[int, ...]]
) -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=False, **masks)[0]

    x = (torch.randn(3, 7, 16) if batch_first else torch.randn(7, 3, 16),)
    wanted = _run(attention, call, x)
    accelerate(attention)
    assert_close(wanted, _run(attention, call, x), CLOSE)
    assert len(products) == 2


@pytest.mark.parametrize("kind", ["shared", "widths", "without bias"])
def test_cross_attention(kind: str, products: list[tuple[int, ...]]) -> None:
    widths: dict[str, Any] = {"kdim": 12, "vdim": 10} if kind == "widths" else {}
    attention = nn.MultiheadAttention(
        16, 4, batch_first=True, bias=kind != "without bias", **widths
    )
    key, value = torch.randn(2, 5, 12 if widths else 16), torch.randn(2, 5, 10 if widths else 16)

    def call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (
            module(query, key, key if kind == "shared" else value, need_weights=False)[0]
            + 0 * value.sum()
        )

    inputs = (torch.randn(2, 3, 16), key, value)
    wanted = _run(attention, call, inputs)
    accelerate(attention)
    assert_close(wanted, _run(attention, call, inputs), CLOSE)
    assert len(products) == (3 if kind == "shared" else 4)


def test_calls_for_weights_run_the_original(products: list[tuple[int, ...]]) -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    wanted = *attention(x, x, x), attention(x[0], x[0], x[0], need_weights=False)[0]
    accelerate(attention)
    found = *attention(x, x, x), attention(x[0], x[0], x[0], need_weights=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not products


@pytest.mark.parametrize(("batch_first", "average"), [(True, False), (False, True)])
def test_weights_in_another_type(
    batch_first: bool, average: bool, products: list[tuple[int, ...]]
) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    probe, x = torch.randn(2, 2, 16), torch.randn(2, 7, 16)
    if not batch_first:
        probe, x = probe.transpose(0, 1), x.transpose(0, 1)
    padding = torch.arange(7) >= torch.tensor([[5], [7]])

    def call() -> Any:
        with torch.no_grad():
            return attention(probe, x, x, key_padding_mask=padding, average_attn_weights=average)

    wanted = call()
    accelerate(attention, dtype=torch.bfloat16)
    for found, other in zip(call(), wanted, strict=True):
        assert found.shape == other.shape
        assert float((found.float() - other).abs().max()) <= 2.0**-5 * float(other.abs().max())
    assert len(products) == 3
    assert not call()[1][0, ..., 5:].any()


def _layer(
    norm_first: bool, activation: Any = "gelu", batch_first: bool = True
) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        16,
        4,
        32,
        dropout=0.0,
        activation=activation,
        norm_first=norm_first,
        batch_first=batch_first,
    )


@pytest.mark.parametrize(
    ("norm_first", "activation", "batch_first"), [(True, "relu", False), (False, torch.tanh, True)]
)
def test_encoder_layers(norm_first: bool, activation: Any, batch_first: bool) -> None:
    layer = _layer(norm_first, activation, batch_first)
    x = (torch.randn(3, 7, 16) if batch_first else torch.randn(7, 3, 16),)
    for masks in (
        {},
        {"src_key_padding_mask": PADDING},
        {"src_mask": torch.ones(7, 7).triu(1).bool()},
    ):

        def call(module: nn.Module, x: Tensor, masks: dict[str, Tensor] = masks) -> Tensor:
            return module(x, **masks)

        wanted = _run(layer, call, x)
        report = accelerate(layer)
        assert [entry.fused for entry in report.entries] == ["FusedLayer"]
        assert_close(wanted, _run(layer, call, x), CLOSE)
        report.revert()


@pytest.mark.parametrize(
    ("training", "norm", "batch_first"), [(True, True, True), (False, False, False)]
)
def test_unpadded_encoders(
    training: bool, norm: bool, batch_first: bool, products: list[tuple[int, ...]]
) -> None:
    final = nn.LayerNorm(16) if norm else None
    encoder = nn.TransformerEncoder(
        _layer(False, batch_first=batch_first), 2, final, enable_nested_tensor=False
    )
    encoder.train(training)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x, src_key_padding_mask=PADDING)
        return (out if batch_first else out.transpose(0, 1))[~PADDING]

    x = (torch.randn(3, 7, 16) if batch_first else torch.randn(7, 3, 16),)
    wanted = _run(encoder, call, x)
    accelerate(encoder, unpad=True)
    assert_close(wanted, _run(encoder, call, x), CLOSE)
    assert {shape[-2] for shape in products} == {int(LENGTHS.sum())}
    out = encoder(*x, src_key_padding_mask=PADDING)
    assert not (out if batch_first else out.transpose(0, 1))[PADDING].any()
    seen: list[torch.Size] = []
    encoder.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    encoder(*x, src_key_padding_mask=PADDING)
    assert seen == [x[0].shape]


def test_layer_norm_by_a_kernel() -> None:
    norm = nn.LayerNorm(16)
    nn.init.normal_(norm.weight)
    x = (torch.randn(3, 16),)
    wanted = _run(norm, lambda module, x: module(x), x)
    swap(norm, FusedLayerNorm, Settings())
    assert_close(wanted, _run(norm, lambda module, x: module(x), x), CLOSE)
    restore(norm)
    swap(norm, FusedLayerNorm, Settings(dtype=torch.bfloat16))
    with torch.no_grad():
        found = norm(*x)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), wanted["output"]) < 0.02
