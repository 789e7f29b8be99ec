"""`accelerate(model, dtype="int8")` and "fp8": which weights are rounded, the error, and revert."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from tests.replace.families import assert_equal, batch, inferred, make
from xfm_fast import accelerate
from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import int8
from xfm_fast.kernels.flags import EightBits, kind_of
from xfm_fast.replace import acceleration, verification
from xfm_fast.replace.swap import is_fused

pytestmark = pytest.mark.usefixtures("int8_chosen")
needs_int8 = pytest.mark.skipif(
    int8.why_not() is not None, reason=f"no int8 products here: {int8.why_not()}"
)
either = pytest.mark.parametrize("kind", [pytest.param("int8", marks=needs_int8), "fp8"])


def model(dtype: torch.dtype = torch.float32, name: str = "BertModel", **changes: Any) -> Any:
    # Of sizes that both kinds take.
    sizes: dict[str, Any] = {"intermediate_size": 64}
    return make(name, dtype, **sizes | changes).eval()


def least_cosine(found: Tensor, wanted: Tensor) -> float:
    return float(F.cosine_similarity(found, wanted, dim=-1).min())


def marked(made: nn.Module) -> list[str]:
    return [name for name, p in made.named_parameters() if p.ndim == 2 and kind_of(p) is not None]


@pytest.mark.parametrize(("dtype", "unpad"), [(torch.float32, False), (torch.bfloat16, True)])
@either
def test_near_and_every_bit_back(kind: EightBits, dtype: torch.dtype, unpad: bool) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    made, given = model(dtype), batch()
    parameters = dict(made.named_parameters())
    before, wanted = copy.deepcopy(made.state_dict()), inferred(made, given)
    report = accelerate(made, dtype=kind, unpad=unpad, verify=given)
    found = inferred(made, given)
    assert least_cosine(found, wanted) > (0.999 if kind == "int8" else 0.995)
    exact = model(dtype)
    accelerate(exact, dtype=None if dtype == torch.bfloat16 else torch.bfloat16, unpad=unpad)
    assert not torch.equal(found, inferred(exact, given))
    assert report.rounded_weights == len(marked(made)) == 6 * made.config.num_hidden_layers
    assert f"{report.rounded_weights} weights run in {kind}" in str(report)
    # At real tokens.
    assert report.rounding["last_hidden_state"] == pytest.approx(
        least_cosine(found, wanted), abs=1e-3
    )
    after = made.state_dict()
    assert all(
        torch.equal(after[name], before[name]) and type(after[name]) is Tensor for name in before
    )
    report.revert()
    report.revert()
    assert all(
        p is parameters[name] and type(p) is nn.Parameter for name, p in made.named_parameters()
    )
    assert torch.equal(inferred(made, given), wanted)
    assert not any(is_fused(module) for module in made.modules())


@needs_int8
def test_gradients_are_those_of_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    original = model()
    fast = copy.deepcopy(original)
    accelerate(fast, dtype="int8")
    assert_equal(original, fast, batch(), 2e-5)


def test_gradients_are_refused_in_fp8() -> None:
    made, given = model(), batch()
    report = accelerate(made, dtype="fp8")
    with pytest.raises(InputError, match=r"fp8 have no gradient.*no_grad"):
        made(**given)
    report.revert()
    made(**given).last_hidden_state.sum().backward()


@needs_int8
def test_the_costliest_modules_are_exempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outlier in one layer's weights takes all levels of its rows; that layer alone stays in floating point."""
    made, given = model(num_hidden_layers=3, intermediate_size=63), batch()
    with torch.no_grad():
        weight = made.encoder.layer[1].output.dense.weight
        weight[:, 0] *= 300
    wanted = inferred(made, given)
    for module in (acceleration, verification):
        monkeypatch.setattr(module, "LEAST_COSINE", 0.9999)
    report = accelerate(made, dtype="int8", verify=given)
    assert "1 modules stay in floating point" in str(report)
    assert not any("layer.1." in name for name in marked(made))
    assert any("layer.0." in name for name in marked(made))
    assert any("layer.2." in name for name in marked(made))
    assert least_cosine(inferred(made, given), wanted) > 0.9998


@either
def test_what_no_exemption_helps_is_refused(
    kind: EightBits, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, given = model(), batch()
    wanted = inferred(made, given)
    monkeypatch.setattr(verification, "LEAST_COSINE", 1.1)
    with pytest.raises(InputError, match=f"cosine of .*{kind}"):
        accelerate(made, dtype=kind, verify=given)
    assert torch.equal(inferred(made, given), wanted)
    assert not marked(made)


@either
def test_weights_that_stay(kind: EightBits) -> None:
    """The vocabulary, shared weights and observed layers are computed as they are stored."""
    made = model(name="BertForMaskedLM")
    made.bert.encoder.layer[0].attention.self.query.weight = made.bert.encoder.layer[
        0
    ].attention.self.key.weight
    made.bert.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *given: None)
    accelerate(made, dtype=kind)
    names = marked(made)
    assert not any("embeddings" in name or "cls" in name for name in names)
    assert not any(
        "layer.0.attention.self.query" in n or "layer.0.attention.self.key" in n for n in names
    )
    assert not any("layer.1.intermediate" in name for name in names)
    assert any("layer.0.attention.self.value" in name for name in names)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        pytest.param({"dtype": "int8", "freeze": True}, "freeze", marks=needs_int8),
        ({"dtype": "int4"}, "int4"),
        ({"dtype": "fp8", "include": "embeddings"}, "fp8"),
    ],
)
def test_refusals(options: dict[str, Any], named: str) -> None:
    made = model()
    with pytest.raises(InputError, match=named):
        accelerate(made, **options)
    assert not any(is_fused(module) for module in made.modules())


@needs_int8
def test_inference_tensors_are_named() -> None:
    """They have no version, so that no copy in int8 could be kept; a copy made outside of the mode has one."""
    with torch.inference_mode():
        made = model()
    with pytest.raises(InputError, match="inference tensors"):
        accelerate(made, dtype="int8")
    assert "inference tensors" in str(accelerate(made))
    assert marked(made) == []
    fast = copy.deepcopy(made)
    assert "inference tensors" not in str(accelerate(fast, dtype="int8"))
    with torch.inference_mode():
        again = copy.deepcopy(fast)
        found = inferred(again, batch())
    assert marked(again) == marked(fast) != []
    assert not any(p.is_inference() for p in again.parameters() if kind_of(p) is not None)
    assert least_cosine(found, inferred(fast, batch())) > 0.999
