"""`attn_implementation="xfm_fast"` in models of transformers with random weights, against their own eager attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.masking_utils", reason="this version has no attention interface")

import xfm_fast  # noqa: E402
from tests.replace.families import (  # noqa: E402
    FAMILIES,
    TRANSFORMERS,
    assert_close,
    batch,
    gradients,
    make,
    without_chance,
)
from xfm_fast.kernels import ops  # noqa: E402
from xfm_fast.replace.attention import attention_forward  # noqa: E402

# Before transformers 5 none of them calls the attention interface.
WITH_BIAS = (
    ("BEiT", "BEiT, shared bias", "BEiT, both biases", "Swin, whole windows")
    if TRANSFORMERS >= 5
    else ()
)


def pair(kind: str, **changes: Any) -> tuple[Any, Any]:
    """A model with eager attention, and one with ours and the same weights."""
    case, name = FAMILIES[kind], xfm_fast.register_attention()
    model, fast = (case.model(attention=each, **changes) for each in ("eager", name))
    fast.load_state_dict(model.state_dict())
    return model, fast


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the biases in calls of the op."""
    seen: list[tuple[int, ...]] = []
    original = ops.bias_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(bias.shape))
        return original(q, k, v, bias, *args, **kwargs)

    monkeypatch.setattr(ops, "bias_attention", counted)
    return seen


def agree(model: Any, fast: Any, given: dict[str, Tensor], keep: Any = ...) -> None:
    """Compare states and gradients; eager attention computes its softmax in fp32."""
    sides = [
        gradients(without_chance(each), lambda each=each: each(**given).last_hidden_state[keep])
        for each in (model, fast)
    ]
    assert_close(sides[0], sides[1], 1e-5)


@pytest.mark.parametrize("case", WITH_BIAS)
def test_models_with_a_position_bias(case: str, calls: list[tuple[int, ...]]) -> None:
    model, fast = pair(case)
    agree(model, fast, FAMILIES[case].inputs(torch.float64))
    assert len(calls) == (4 if "Swin" in case else 2)
    assert all(len(shape) == 4 for shape in calls)


@pytest.mark.parametrize("case", ["Data2Vec", *(["BEiT"] if TRANSFORMERS < 5 else [])])
def test_attention_classes_stay_those_of_pytorch(case: str, calls: list[tuple[int, ...]]) -> None:
    model, fast = pair(case)
    agree(model, fast, FAMILIES[case].inputs(torch.float64))
    assert not calls


@pytest.mark.parametrize(
    "form", ["padding", *(["numbers", "one for all heads"] if TRANSFORMERS >= 5 else [])]
)
def test_texts_with_masks_of_every_form(form: str, calls: list[tuple[int, ...]]) -> None:
    name = xfm_fast.register_attention()
    model = make("BertModel", attention="eager")
    fast = copy.deepcopy(model)
    fast.set_attn_implementation(name)
    given = batch("left")
    keep = given["attention_mask"].bool()
    if form != "padding":
        numbers = torch.zeros(keep.shape, dtype=torch.float64)
        numbers = numbers.masked_fill(~keep, torch.finfo(torch.float64).min)[:, None, None, :]
        given["attention_mask"] = (
            numbers if form == "numbers" else numbers.expand(-1, 1, keep.shape[1], -1)
        )
    agree(model, fast, given, keep)
    assert len(calls) == (0 if form == "padding" else 2)


@pytest.mark.skipif(
    TRANSFORMERS < 5, reason="no model hands its bias to the interface before transformers 5"
)
def test_a_bias_beside_a_mask(calls: list[tuple[int, ...]]) -> None:
    """As T5 calls it: the bias of position apart, and padding `[B, N]` or numbers."""
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind(0)
    bias = torch.randn(1, 3, 5, 5)
    module: Any = nn.Module()
    module.is_causal = False
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]])
    numbers = torch.zeros(2, 1, 1, 5).masked_fill(
        ~keep[:, None, None], torch.finfo(torch.float32).min
    )
    scores = q @ k.mT * 8**-0.5 + bias
    for mask in (None, keep, numbers):
        hidden = scores if mask is None else scores + numbers
        out, _ = attention_forward(module, q, k, v, mask, position_bias=bias)
        torch.testing.assert_close(out.transpose(1, 2), hidden.softmax(-1) @ v)
    assert len(calls) == 3
    module.is_causal = True
    out, _ = attention_forward(module, q, k, v, None, position_bias=bias)
    causal = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out.transpose(1, 2), causal.softmax(-1) @ v)
    assert len(calls) == 3


def test_dropout() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8).unbind(0)
    given: Any = (nn.Module(), q, k, v, torch.randn(1, 2, 6, 6))
    torch.manual_seed(0)
    drawn = [attention_forward(*given, dropout=0.3)[0] for _ in range(300)]
    assert not torch.allclose(drawn[0], drawn[1])
    assert (torch.stack(drawn).mean(0) - attention_forward(*given)[0]).abs().mean() < 0.1
