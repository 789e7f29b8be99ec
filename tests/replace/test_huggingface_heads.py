"""Masked-language heads of transformers: losses, logits and gradients against the untouched models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from tests.replace.text_models import CAUSAL_BOUND, CAUSAL_DTYPE, assert_equal, batch, copies, forbid, make, real  # noqa: E402
from xfm_fast import accelerate  # noqa: E402
from xfm_fast.kernels import ops  # noqa: E402
from xfm_fast.replace.swapping import original_class  # noqa: E402

MODELS = [
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "XLMRobertaForMaskedLM",
    "CamembertForMaskedLM",
    "Data2VecTextForMaskedLM",
]


def only_loss(model: nn.Module, given: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    loss = model(**given).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_logits(name: str, unpad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = copies(make(name))
    accelerate(fast, unpad=unpad)
    assert_equal(model, fast, batch(labels=True), only_real=True)
    assert_equal(model, fast, batch(), only_real=True)
    kind = original_class(fast)
    monkeypatch.setattr(kind, "forward", forbid(kind))
    fast(**batch(labels=True))


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_without_logits(name: str, unpad: bool) -> None:
    model, fast = copies(make(name))
    accelerate(fast, unpad=unpad, skip_logits=True)
    given = batch(labels=True)
    assert fast(**given).logits is None
    (wanted, gradients), (found, others) = only_loss(model, given), only_loss(fast, given)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    for parameter, gradient in gradients.items():
        other = others[parameter]
        assert (gradient is None) == (other is None), parameter
        if gradient is not None and other is not None:
            torch.testing.assert_close(other, gradient, rtol=0, atol=1e-13, msg=parameter)
    assert fast(**batch()).logits is not None
    assert fast.eval()(**given).logits is not None


def test_only_labelled_rows_meet_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("RobertaForMaskedLM")
    accelerate(model, skip_logits=True)
    given, rows = batch(labels=True), []
    original = ops.linear_cross_entropy

    def counted(h: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        rows.append(h.shape[0])
        return original(h, *rest, **options)

    monkeypatch.setattr(ops, "linear_cross_entropy", counted)
    model(**given)
    assert rows == [int((given["labels"] != -100).sum())]


@pytest.mark.parametrize("unpad", [False, True])
def test_labels_that_the_original_must_judge(unpad: bool) -> None:
    model, fast = copies(make("BertForMaskedLM"))
    accelerate(fast, unpad=unpad)
    given = batch(labels=True)
    none = given | {"labels": torch.full_like(given["labels"], -100)}
    assert torch.isnan(model(**none).loss)
    assert torch.isnan(fast(**none).loss)
    # Labels at padding count in the loss, whatever they are good for.
    everywhere = given | {"labels": given["input_ids"]}
    torch.testing.assert_close(fast(**everywhere).loss, model(**everywhere).loss, rtol=1e-12, atol=0)
    wrong = given["labels"].clone()
    wrong[0, 0] = 111
    with pytest.raises(IndexError):
        fast(**given | {"labels": wrong})


def test_recorded_outputs_and_tuples() -> None:
    model, fast = copies(make("BertForMaskedLM"))
    accelerate(fast, unpad=True)
    given = batch(labels=True) | {"output_hidden_states": True}
    wanted, found = model(**given), fast(**given)
    for one, other in zip(wanted.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    given = batch(labels=True) | {"return_dict": False}
    wanted, found = model(**given), fast(**given)
    assert len(wanted) == len(found) == 2
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("part", ["cls", "cls.predictions", "cls.predictions.transform", "cls.predictions.decoder"])
@pytest.mark.parametrize("labels", [False, True])
def test_hooks_on_the_head_fire(part: str, labels: bool) -> None:
    model, fast = copies(make("BertForMaskedLM"))
    accelerate(fast, unpad=True)
    seen: list[int] = []
    fast.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    assert_equal(model, fast, batch(labels=labels), only_real=True)
    assert seen == [1]


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertLMHeadModel", "BlipTextLMHeadModel"])
def test_heads_of_other_models(name: str) -> None:
    blip = {"encoder_hidden_size": 27, "attention": "eager"} if name.startswith("Blip") else {}
    dtype, bound = (CAUSAL_DTYPE, CAUSAL_BOUND) if name == "BertLMHeadModel" else (torch.float64, 1e-12)
    model = make(name, dtype, is_decoder="LMHead" in name, **blip)
    fast = copy.deepcopy(model)
    report = accelerate(fast)
    assert any(entry.fused == "VocabularyHead" for entry in report.replaced)
    assert_equal(model, fast, batch(), bound)


def test_tied_weights_stay_tied() -> None:
    model = make("RobertaForMaskedLM")
    report = accelerate(model, unpad=True)
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    model.resize_token_embeddings(120)
    assert model(**batch(labels=True)).logits.shape[-1] == 120
    report.revert()
    assert model(**batch(labels=True)).logits.shape[-1] == 120


@pytest.mark.parametrize("unpad", [False, True])
def test_bf16(unpad: bool) -> None:
    model, fast = copies(make("RobertaForMaskedLM", torch.float32))
    accelerate(fast, unpad=unpad, dtype=torch.bfloat16, skip_logits=True)
    wanted, gradients = only_loss(model, batch(labels=True))
    found, others = only_loss(fast, batch(labels=True))
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)
    for name, gradient in gradients.items():
        other = others[name]
        if gradient is not None and other is not None and gradient.abs().max() > 1e-2:
            assert (other - gradient).norm() < 0.05 * gradient.norm(), name
    with torch.no_grad():
        logits = fast.eval()(**batch()).logits
    mask = batch()["attention_mask"]
    torch.testing.assert_close(real(logits.float(), mask), real(model(**batch()).logits, mask), rtol=0.05, atol=0.1)
