"""LoRA of peft around the linear layers of fused forms: the results of peft, whichever came first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.replace.families import adapted, assert_equal, batch, inferred, make  # noqa: E402
from xfm_fast import accelerate  # noqa: E402
from xfm_fast.replace.layer import FusedLayer  # noqa: E402
from xfm_fast.replace.swap import is_fused  # noqa: E402

EVERYWHERE, QUERIES = ["query", "key", "value", "dense"], ["query", "value"]
BOUND = 1e-12


def assert_near(fast: nn.Module, original: nn.Module, bound: float = BOUND) -> Tensor:
    wanted, found = inferred(original, batch()), inferred(fast, batch())
    assert float((found - wanted).abs().max()) <= bound * float(wanted.abs().max())
    return wanted


def test_every_change_of_an_adapter_is_seen() -> None:
    """The sum of weight and adapters is cached."""
    original, fast = (adapted(make("BertModel"), EVERYWHERE, "one", "two").eval() for _ in range(2))
    accelerate(fast, unpad=True)
    seen: list[Tensor] = []

    def compare() -> None:
        wanted = assert_near(fast, original)
        assert not any(torch.allclose(wanted, other) for other in seen)
        seen.append(wanted)

    compare()
    for model in (original, fast):
        model.set_adapter("two")
    compare()
    for model in (original, fast):
        model.base_model.set_adapter(["one", "two"])
    compare()
    for model in (original, fast):
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.layer.Linear):
                layer.set_scale("one", 0.5)
    compare()
    for model in (original, fast):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(1.5)
    compare()
    with original.disable_adapter(), fast.disable_adapter():
        compare()
        assert "disabled" in str(accelerate(fast, unpad=True))
    for model in (original, fast):
        model.merge_adapter()
    assert_near(fast, original)
    plain = fast.merge_and_unload()
    assert all(is_fused(layer) and layer.declines() is None for layer in plain.encoder.layer)
    assert_near(plain, original)


def test_dropout_is_on_the_input_of_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dropout mask that follows from the shape of the input."""

    def dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * (torch.arange(x.shape[-1]) % 3 != 0) / (1 - p) if training and p else x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropped)
    original, fast = (
        adapted(make("BertModel"), EVERYWHERE, lora_dropout=0.25).train() for _ in range(2)
    )
    accelerate(fast)
    assert_equal(original, fast, batch(), BOUND)


def test_bias_and_mixed_types() -> None:
    original, fast = (
        adapted(make("BertModel"), EVERYWHERE, lora_bias=True).eval() for _ in range(2)
    )
    accelerate(fast)
    assert_equal(original, fast, batch(), BOUND)
    assert_near(fast, original)
    for model in (original, fast):
        model.bfloat16()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    assert_near(fast, original, 2.0**-5)


def test_other_adapters_run_the_original() -> None:
    model = make("BertModel")
    fast = copy.deepcopy(model)
    original, report = adapted(model, QUERIES, use_dora=True), accelerate(fast)
    assert not report.declining
    fast = adapted(fast, QUERIES, use_dora=True)
    assert any("attention.self.query" in reason for reason in report.declining.values())
    assert_equal(original, fast, batch(), BOUND)


def test_a_hook_inside_of_an_adapter_is_called() -> None:
    fast = adapted(make("BertModel"), QUERIES).eval()
    report = accelerate(fast)
    layer = fast.base_model.model.encoder.layer[0].attention.self.query
    seen: list[int] = []
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    assert report.declining
    inferred(fast, batch())
    assert seen == [1]
    handle.remove()
    assert not report.declining


def test_adapters_by_row_of_a_batch() -> None:
    original, fast = (adapted(make("BertModel"), QUERIES, "one", "two").eval() for _ in range(2))
    accelerate(fast, unpad=True)
    given = batch() | {"adapter_names": ["one", "two", "__base__", "one", "two"]}
    with torch.no_grad():
        wanted, found = original(**given).last_hidden_state, fast(**given).last_hidden_state
    assert torch.equal(wanted, found)


def test_frozen_weights_get_no_gradient_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training adapters does not compute the gradient of the frozen weights."""
    from xfm_fast.kernels.cpu import gemm

    fast = adapted(make("BertModel", torch.float32), QUERIES).float().train()
    accelerate(fast, unpad=True)
    made: list[torch.Size] = []
    inner = gemm.weight_gradient
    monkeypatch.setattr(
        gemm, "weight_gradient", lambda dout, *rest: made.append(dout.shape) or inner(dout, *rest)
    )
    fast(**batch()).last_hidden_state.sum().backward()
    assert made == []
    assert any(isinstance(m, FusedLayer) for m in fast.modules())
