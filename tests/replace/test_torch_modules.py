"""PyTorch's own modules, fused: equal outputs and gradients in every arrangement that they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.agreement import relative_error
from tests.replace.families import assert_close, gradients
from xfm_fast import accelerate
from xfm_fast.errors import InputError
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
    """Shapes of what was multiplied by the fused forms."""
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


def _assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert_close(wanted, found, CLOSE)


MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"key_padding_mask": PADDING},
    "float padding": {"key_padding_mask": torch.randn(3, 7)},
    "causal": {"attn_mask": torch.ones(7, 7).triu(1).bool()},
    "per head": {"attn_mask": torch.randn(3 * 4, 7, 7)},
    "both": {"attn_mask": torch.ones(7, 7).triu(1).bool(), "key_padding_mask": PADDING},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention(batch_first: bool, mask: str, products: list[tuple[int, ...]]) -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=False, **MASKS[mask])[0]

    x = (torch.randn(3, 7, 16) if batch_first else torch.randn(7, 3, 16),)
    wanted = _run(attention, call, x)
    accelerate(attention)
    _assert_same(_run(attention, call, x), wanted)
    assert len(products) == 2


@pytest.mark.parametrize("kind", ["shared", "apart", "widths", "without bias"])
def test_cross_attention(kind: str, products: list[tuple[int, ...]]) -> None:
    widths: dict[str, Any] = {"kdim": 12, "vdim": 10} if kind == "widths" else {}
    attention = nn.MultiheadAttention(16, 4, batch_first=True, bias=kind != "without bias", **widths)
    key, value = torch.randn(2, 5, 12 if widths else 16), torch.randn(2, 5, 10 if widths else 16)

    def call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return module(query, key, key if kind == "shared" else value, need_weights=False)[0] + 0 * value.sum()

    inputs = (torch.randn(2, 3, 16), key, value)
    wanted = _run(attention, call, inputs)
    accelerate(attention)
    _assert_same(_run(attention, call, inputs), wanted)
    assert len(products) == (3 if kind == "shared" else 4)


def test_calls_for_weights_run_the_original(products: list[tuple[int, ...]]) -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    x = torch.randn(2, 3, 16)
    wanted = attention(x, x, x), attention(x[0], x[0], x[0], need_weights=False)
    accelerate(attention)
    found = attention(x, x, x), attention(x[0], x[0], x[0], need_weights=False)
    assert torch.equal(found[0][0], wanted[0][0])
    assert torch.equal(found[0][1], wanted[0][1])
    assert torch.equal(found[1][0], wanted[1][0])
    assert not products


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_weights_in_another_type(batch_first: bool, average: bool, products: list[tuple[int, ...]]) -> None:
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


@pytest.mark.parametrize("extra", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_added_keys_are_left_alone(extra: dict[str, bool]) -> None:
    with pytest.raises(InputError, match="appends a key and a value"):
        accelerate(nn.MultiheadAttention(16, 4, **extra))


def _layer(
    norm_first: bool, activation: Any = "gelu", batch_first: bool = True, dropout: float = 0.0
) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        16, 4, 32, dropout=dropout, activation=activation, norm_first=norm_first, batch_first=batch_first
    )


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(("activation", "batch_first"), [("gelu", True), ("relu", False), (torch.tanh, True)])
def test_encoder_layers(norm_first: bool, activation: Any, batch_first: bool, products: list[tuple[int, ...]]) -> None:
    layer = _layer(norm_first, activation, batch_first)
    x = (torch.randn(3, 7, 16) if batch_first else torch.randn(7, 3, 16),)
    for masks in ({}, {"src_key_padding_mask": PADDING}, {"src_mask": torch.ones(7, 7).triu(1).bool()}):

        def call(module: nn.Module, x: Tensor, masks: dict[str, Tensor] = masks) -> Tensor:
            return module(x, **masks)

        wanted = _run(layer, call, x)
        report = accelerate(layer)
        _assert_same(_run(layer, call, x), wanted)
        report.revert()
    assert len(products) >= 2 * 3
    assert [entry.fused for entry in report.entries] == ["FusedLayer"]


@pytest.mark.parametrize(("training", "norm", "batch_first"), [(True, True, True), (False, False, False)])
def test_unpadded_encoders(training: bool, norm: bool, batch_first: bool, products: list[tuple[int, ...]]) -> None:
    final = nn.LayerNorm(16) if norm else None
    encoder = nn.TransformerEncoder(_layer(False, batch_first=batch_first), 2, final, enable_nested_tensor=False)
    encoder.train(training)

    def call(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x, src_key_padding_mask=PADDING)
        return (out if batch_first else out.transpose(0, 1))[~PADDING]

    x = (torch.randn(3, 7, 16) if batch_first else torch.randn(7, 3, 16),)
    wanted = _run(encoder, call, x)
    accelerate(encoder, unpad=True)
    _assert_same(_run(encoder, call, x), wanted)
    assert {shape[-2] for shape in products} == {int(LENGTHS.sum())}
    out = encoder(*x, src_key_padding_mask=PADDING)
    assert not (out if batch_first else out.transpose(0, 1))[PADDING].any()


def test_nested_tensors_go_pytorchs_way() -> None:
    encoder = nn.TransformerEncoder(_layer(False), 2).eval()
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        wanted = encoder(x, src_key_padding_mask=PADDING)
        report = accelerate(encoder)
        assert torch.equal(encoder(x, src_key_padding_mask=PADDING), wanted)
    assert any("unpad=True" in entry.reason for entry in report.left if entry.reason)


def test_hooks_on_a_layer_keep_the_padding() -> None:
    encoder = nn.TransformerEncoder(_layer(False), 2, enable_nested_tensor=False)
    accelerate(encoder, unpad=True)
    seen: list[torch.Size] = []
    encoder.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    encoder(torch.randn(3, 7, 16), src_key_padding_mask=PADDING)
    assert seen == [torch.Size([3, 7, 16])]


def test_layer_norm_by_a_kernel() -> None:
    """Where the rule takes it, which here it would not."""
    norm = nn.LayerNorm(16)
    nn.init.normal_(norm.weight)
    x = (torch.randn(3, 16),)
    wanted = _run(norm, lambda module, x: module(x), x)
    swap(norm, FusedLayerNorm, Settings())
    _assert_same(_run(norm, lambda module, x: module(x), x), wanted)
    restore(norm)
    swap(norm, FusedLayerNorm, Settings(dtype=torch.bfloat16))
    with torch.no_grad():
        found = norm(*x)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), wanted["output"]) < 0.02
