"""`accelerate(model, dtype="int8")`: what is rounded, what it may cost, and that all of it can be undone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from tests.replace.text_models import batch, make
from xfm_fast import accelerate
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels.cpu import int8
from xfm_fast.replace import quantised
from xfm_fast.replace.swap import is_fused

pytestmark = pytest.mark.skipif(int8.why_not() is not None, reason=f"no int8 products here: {int8.why_not()}")


def model(dtype: torch.dtype = torch.float32, kind: str = "BertModel", **changes: Any) -> Any:
    return make(kind, dtype, **changes).eval()


def outputs(made: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return made(**given).last_hidden_state[given["attention_mask"].bool()].float()


def least_cosine(found: Tensor, wanted: Tensor) -> float:
    return float(F.cosine_similarity(found, wanted, dim=-1).min())


def marked(made: nn.Module) -> list[str]:
    return [name for name, parameter in made.named_parameters() if int8.is_marked(parameter)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unpad", [False, True])
def test_near_and_every_bit_back(dtype: torch.dtype, unpad: bool) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    made, given = model(dtype), batch()
    names, parameters = zip(*made.named_parameters(), strict=True)
    before, wanted = copy.deepcopy(made.state_dict()), outputs(made, given)
    report = accelerate(made, dtype="int8", unpad=unpad, verify=given)
    found = outputs(made, given)
    assert least_cosine(found, wanted) > 0.999
    exact = model(dtype)
    accelerate(exact, dtype=None if dtype == torch.bfloat16 else torch.bfloat16, unpad=unpad)
    assert not torch.equal(found, outputs(exact, given))
    per_layer = 6
    assert report.int8_weights == len(marked(made)) == per_layer * made.config.num_hidden_layers
    assert f"{report.int8_weights} weights run in int8" in str(report)
    assert report.differences
    after = made.state_dict()
    assert all(torch.equal(after[name], before[name]) and type(after[name]) is Tensor for name in before)
    report.revert()
    report.revert()
    assert [*made.named_parameters()] == [*zip(names, parameters, strict=True)]
    assert all(p is q and type(q) is nn.Parameter for p, q in zip(made.parameters(), parameters, strict=True))
    assert torch.equal(outputs(made, given), wanted)
    assert not any(is_fused(module) for module in made.modules())


def test_training_is_exact() -> None:
    made, given = model(), batch()
    wanted = made(**given).last_hidden_state[given["attention_mask"].bool()]
    accelerate(made, dtype="int8")
    found = made(**given).last_hidden_state[given["attention_mask"].bool()]
    rounding = 2.0**-5 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 1e-5
    assert float((found - wanted).detach().abs().max()) < rounding * float(wanted.detach().abs().max())
    found.float().square().mean().backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if "encoder" in name)


def test_again_in_another_type() -> None:
    made, given = model(), batch()
    wanted = outputs(made, given)
    accelerate(made, dtype="int8")
    assert marked(made)
    accelerate(made, dtype="int8", unpad=True)
    assert marked(made)
    accelerate(made)
    assert not marked(made)
    assert torch.allclose(outputs(made, given), wanted, atol=1e-5 * float(wanted.abs().max()))


def test_a_failed_change_leaves_int8_in_force() -> None:
    made, given = model(), batch()
    accelerate(made, dtype="int8")
    before, names = outputs(made, given), marked(made)
    with pytest.raises(InputError, match="matches no module"):
        accelerate(made, include="nothing like this")
    with pytest.raises(InputError, match="nothing"):
        accelerate(made, include="pooler")
    assert marked(made) == names
    assert torch.equal(outputs(made, given), before)


def test_copies_keep_it() -> None:
    made, given = model(), batch()
    accelerate(made, dtype="int8")
    assert torch.equal(outputs(copy.deepcopy(made), given), outputs(made, given))


def test_the_costliest_modules_are_exempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An outlier in one layer's weights takes all levels of its rows; that layer alone stays in floating point."""
    made, given = model(num_hidden_layers=3), batch()
    with torch.no_grad():
        weight = made.encoder.layer[1].output.dense.weight
        weight[:, 0] *= 300
    wanted = outputs(made, given)
    monkeypatch.setattr(quantised, "LEAST_COSINE", 0.9999)
    report = accelerate(made, dtype="int8", verify=given)
    assert "1 modules stay in floating point" in str(report)
    assert not any("layer.1." in name for name in marked(made))
    assert any("layer.0." in name for name in marked(made))
    assert any("layer.2." in name for name in marked(made))
    assert least_cosine(outputs(made, given), wanted) > 0.9998


def test_what_no_exemption_helps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made, given = model(), batch()
    wanted = outputs(made, given)
    monkeypatch.setattr(quantised, "LEAST_COSINE", 1.1)
    with pytest.raises(InputError, match=r"cosine of .* asked of int8"):
        accelerate(made, dtype="int8", verify=given)
    assert torch.equal(outputs(made, given), wanted)
    assert not marked(made)


def test_weights_that_stay() -> None:
    """The vocabulary, shared weights and observed layers are computed as they are stored."""
    made = model(kind="BertForMaskedLM")
    made.bert.encoder.layer[0].attention.self.query.weight = made.bert.encoder.layer[0].attention.self.key.weight
    made.bert.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *given: None)
    accelerate(made, dtype="int8")
    names = marked(made)
    assert not any("embeddings" in name or "cls" in name for name in names)
    assert not any("layer.0.attention.self.query" in n or "layer.0.attention.self.key" in n for n in names)
    assert not any("layer.1.intermediate" in name for name in names)
    assert any("layer.0.attention.self.value" in name for name in names)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int8", "freeze": True}, InputError, "leave freeze out"),
        ({"dtype": "int4"}, InputError, "dtype='int4' is unknown"),
        ({"dtype": "int8", "include": "embeddings"}, InputError, "no linear layer to round"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    made, given = model(), batch()
    wanted = outputs(made, given)
    with pytest.raises(error, match=message):
        accelerate(made, **options)
    assert torch.equal(outputs(made, given), wanted)
    assert not any(is_fused(module) for module in made.modules())


def test_a_processor_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "why_not", lambda: "of a test")
    with pytest.raises(UnavailableError, match="not offered here: of a test"):
        accelerate(model(), dtype="int8")
