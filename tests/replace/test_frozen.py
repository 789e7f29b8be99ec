"""Weights packed in place of parameters: the same numbers, no second copy, and every bit back."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

pytest.importorskip("transformers")

from tests.replace.families import batch, inferred, make
from xfm_fast import accelerate
from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import gemm
from xfm_fast.plans.slots import slot_of
from xfm_fast.replace.swap import is_fused


@pytest.fixture(params=get_args(gemm.Layout), autouse=True)
def layout(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    freeze_in: Callable[[gemm.Layout], None],
) -> gemm.Layout:
    """Every layout; weights stay plain where no product prefers oneDNN."""
    freeze_in(request.param)
    if request.param == "plain":
        monkeypatch.setattr(gemm, "_choose", lambda operation, rows, dtype: "aten")
    return request.param


def is_in(layout: gemm.Layout, packed: Tensor) -> bool:
    return (packed.is_mkldnn, gemm.panels_of(packed) is not None) == (
        layout == "onednn",
        layout == "panels",
    )


def model(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return make("BertModel", dtype, **changes).eval()


def pack_of(layer: nn.Module) -> Tensor:
    return slot_of(layer).packed


def assert_near(found: Tensor, wanted: Tensor, band: float) -> None:
    assert float((found - wanted).abs().max()) <= band * float(wanted.abs().max())


def live_bytes() -> int:
    """Bytes of all tensors that exist."""
    gc.collect()
    dense, packed = {}, 0
    for found in gc.get_objects():
        # Those of a compiler have no memory.
        if not issubclass(type(found), Tensor) or isinstance(found, FakeTensor | FunctionalTensor):
            continue
        if gemm.panels_of(found) is not None:
            continue
        if found.is_mkldnn:
            packed += found.numel() * found.element_size()
        else:
            dense[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return packed + sum(dense.values())


@pytest.mark.parametrize(("dtype", "band"), [(torch.float32, 1e-5), (torch.bfloat16, 2.0**-5)])
def test_outputs_and_every_bit_back(dtype: torch.dtype, band: float, layout: gemm.Layout) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    made, given = model(dtype), batch()
    parameters = dict(made.named_parameters())
    made.embeddings.LayerNorm.weight.requires_grad_(False)
    wanted = inferred(made, given)
    report = accelerate(made, unpad=dtype == torch.float32, freeze=True, verify=given)
    assert_near(inferred(made, given), wanted, band)
    packed = pack_of(made.encoder.layer[0].attention.output.dense)
    # 48 channels are no whole number of vectors of pairs.
    is_odd = layout == "panels" and dtype == torch.bfloat16
    assert is_in("plain" if is_odd else layout, packed)
    assert "MB of weights packed in place" in str(report)
    frozen = inferred(made, given)
    with pytest.raises(InputError):
        accelerate(made, include="pooler")
    assert torch.equal(inferred(made, given), frozen)
    report.revert()
    report.revert()
    assert {name: id(p) for name, p in made.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert [p.requires_grad for p in parameters.values()].count(False) == 1
    assert torch.equal(inferred(made, given), wanted)
    assert not any(is_fused(m) or "_xfm_fast" in str(vars(m).keys()) for m in made.modules())


def test_memory_is_that_of_the_model_alone() -> None:
    """In bytes of all tensors: after many calls there is one copy of every weight."""
    # Buffers for activations and cached masks have a fixed size, small here.
    made = model(num_hidden_layers=3, hidden_size=192, intermediate_size=768)
    given, weights = batch(), sum(p.nbytes for p in made.encoder.parameters() if p.ndim == 2)
    # The operands of autotuning stay, and are made once.
    other = copy.deepcopy(made)
    accelerate(other, unpad=True)
    inferred(other, given)
    del other
    untouched, slack = live_bytes(), weights // 10
    # The cached weights of an earlier acceleration are released.
    accelerate(made, unpad=True)
    inferred(made, given)
    report = accelerate(made, unpad=True, freeze=True)
    assert report.frozen_bytes == weights
    frozen = live_bytes()
    for _ in range(2):
        inferred(made, given)
    assert abs(frozen - untouched) < slack
    assert live_bytes() - untouched < slack
    report.revert()
    assert abs(live_bytes() - untouched) < slack


def test_state_dicts_and_copies(layout: gemm.Layout) -> None:
    made, given = model(), batch()
    before, wanted = copy.deepcopy(made.state_dict()), inferred(made, given)
    accelerate(made, freeze=True)
    frozen = made.state_dict()
    assert [*frozen] == [*before]
    assert all(torch.equal(frozen[name], before[name]) for name in before)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        attention = copied.encoder.layer[0].attention.self
        assert pack_of(attention.query) is pack_of(attention.key)
        assert is_in(layout, pack_of(attention.query))
        assert_near(inferred(copied, given), wanted, 1e-5)


def test_loading_training_and_moving() -> None:
    made, given = model(), batch()
    state, wanted = copy.deepcopy(made.state_dict()), inferred(copy.deepcopy(made).double(), given)
    report = accelerate(made, freeze=True)
    made.to("cpu")
    made.float()
    assert report.frozen_bytes
    with pytest.raises(InputError, match=r"query\.weight"):
        made.load_state_dict(state)
    with pytest.raises(InputError, match="revert"):
        made.train()(**given)
    made.eval().double()
    assert report.frozen_bytes == 0
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    assert_near(inferred(made, given), wanted, 1e-6)
    report.revert()
    made.float().load_state_dict(state)
    made.train()(**given).last_hidden_state.sum().backward()
    assert all(p.requires_grad for p in made.parameters())


def test_layers_that_stay() -> None:
    made, given = model(), batch()
    seen: list[int] = []
    first, second = made.encoder.layer
    first.attention.self.key.register_forward_hook(lambda *_: seen.append(1))
    second.output.dense.weight = made.encoder.layer[0].output.dense.weight
    wanted = inferred(made, given)
    seen.clear()
    accelerate(made, freeze=True)
    assert_near(inferred(made, given), wanted, 1e-5)
    assert seen == [1]
    assert "weight" in first.attention.self.query._parameters
    assert "weight" in second.output.dense._parameters
    assert "weight" not in second.attention.self.query._parameters
    with pytest.raises(InputError, match="freeze"):
        accelerate(made, include="embeddings", freeze=True)
    with pytest.raises(InputError, match=r"torch\.bfloat16"):
        accelerate(model(), freeze=True, dtype=torch.bfloat16)
