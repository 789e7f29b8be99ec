"""The fine-tuning benchmark on the tiny model: both procedures agree in every task, and rows say what was done."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xfm_fast.benchmarks.contenders.official_finetuning import OfficialFineTuningTwin
from xfm_fast.benchmarks.material import photographs
from xfm_fast.benchmarks.material.inputs import preset_config
from xfm_fast.benchmarks.material.questions import Texts, answer_list
from xfm_fast.benchmarks.options import FINE_TUNING, FineTuned, StepOptions
from xfm_fast.benchmarks.record import OFFICIAL, OURS, Document
from xfm_fast.benchmarks.timing import parity_band
from xfm_fast.benchmarks.work import finetuning
from xfm_fast.benchmarks.work.finetuning import TASKS, FineTuningSubject, Material
from xfm_fast.benchmarks.work.finetuning_cost import step_costs
from xfm_fast.benchmarks.work.training import AUTOCAST, FP32_GRADIENT_BAND, difference
from xfm_fast.errors import InputError
from xfm_fast.tokenizer import CaptionTokenizer

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
CPU = torch.device("cpu")
CONFIG = preset_config("tiny")
each_task = pytest.mark.parametrize("name", FINE_TUNING)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        few = slice(0, 40)
        patch.setattr(
            finetuning, "answer_list", lambda config, seed: Texts(*(t[few] for t in answer_list(config, seed)))
        )
        yield


@pytest.fixture(scope="module")
def material() -> Material:
    collection = photographs.bundled()
    tokenizer = CaptionTokenizer.train_on_texts(collection.captions, CONFIG.vocab_size)
    return Material(collection, tokenizer, CONFIG, seed=0)


def _run(task: FineTuned | Literal["all"], **changes: Any) -> Document:
    settings: dict[str, Any] = {"random": "tiny", "quick": True, "device": "cpu", "dtype": ("fp32",)}
    return finetuning.run(StepOptions(task=task, **settings | changes))


@each_task
def test_both_procedures_leave_the_same_gradients(name: FineTuned, material: Material) -> None:
    subject = FineTuningSubject(name, material, 3, CPU)
    truth = subject.outcome(OFFICIAL)
    assert any(gradient is not None and bool(gradient.any()) for gradient in truth.gradients.values())
    found = difference(subject.outcome(OURS), truth)
    assert found.error < FP32_GRADIENT_BAND, found
    own = difference(subject.outcome(OFFICIAL, AUTOCAST["bf16"]), truth)
    half = difference(subject.outcome(OURS, AUTOCAST["bf16"]), truth)
    assert half.error < parity_band(torch.bfloat16, own.error), half


@each_task
def test_all_that_the_loss_reads_receives_a_gradient(name: FineTuned, material: Material) -> None:
    """A twin that forgot a part would agree with a model that forgot it too."""
    subject = FineTuningSubject(name, material, 2, CPU)
    reached = {part.split(".")[0] for part, found in subject.outcome(OFFICIAL).gradients.items() if found is not None}
    wanted = {
        "retrieval": {"vision_encoder", "text_encoder", "fusion_encoder", "vision_proj", "text_proj", "temp"},
        "vqa": {"vision_encoder", "text_encoder", "fusion_encoder", "text_decoder"},
        "nlvr2": {"vision_encoder", "text_encoder", "fusion_encoder", "cls_head"},
        "grounding": {"vision_encoder", "text_encoder", "fusion_encoder", "bbox_head"},
        "captioning": {"vision_encoder", "text_decoder"},
        "text": {"text_encoder", "cls_head"},
        "image": {"vision_encoder", "cls_head"},
    }
    assert reached == wanted[name] | ({"itm_head"} if name == "retrieval" else set())


def test_the_gradients_of_statements_do_not_cancel(material: Material) -> None:
    """Those of as many true as false ones would, but for rounding, of which an error then would be a share."""
    gradients = FineTuningSubject("nlvr2", material, 4, CPU).outcome(OFFICIAL).gradients
    bias = gradients["cls_head.3.bias"]
    assert bias is not None
    assert bias.abs().min() > 0.1


@each_task
def test_operations_of_the_official_step_are_counted_right(name: FineTuned, material: Material) -> None:
    subject = FineTuningSubject(name, material, 3, CPU)
    costs = step_costs(name, CONFIG, subject.shape)
    with FlopCounterMode(display=False) as counter:
        subject.step(OFFICIAL, given_negatives=True)
    assert costs.official == counter.get_total_flops()
    assert 0 < costs.needed <= costs.official


def test_a_question_has_several_answers_and_texts_are_ragged(material: Material) -> None:
    batch = TASKS["vqa"].batch(material, 4)
    assert batch["answers_per_question"].tolist() == [1, 3, 2, 5]
    assert batch["answer_weights"].sum() == pytest.approx(4)
    assert batch["answer_mask"].sum(1).max() == batch["answer_ids"].shape[1]
    texts = TASKS["text"].batch(material, 4)
    assert texts["attention_mask"].sum(1).tolist() == [CONFIG.max_text_length, 16, CONFIG.max_text_length, 32]
    assert texts["input_ids"].ne(CONFIG.pad_token_id).long().equal(texts["attention_mask"])


def test_rows_of_a_task() -> None:
    document = _run("vqa", quick=False)
    assert document.ok
    assert document.benchmark == "train-step"
    works = ("finetune-vqa", "finetune-vqa-dropout")
    assert [(row.work, row.backend) for row in document.rows] == [(w, c) for w in works for c in (OURS, OFFICIAL)]
    for row in document.rows:
        assert (row.status, row.unit, row.items) == ("measured", "questions", 4)
        assert row.number("tokens") == 38
        assert row.number("padded_tokens") == (38 if row.ours else 4 * 12)
        assert not row.ours or document.headline(row) is not None


@pytest.mark.slow
def test_every_task_has_a_row() -> None:
    document = _run("all")
    assert document.ok
    assert [row.work for row in document.rows if row.ours] == [f"finetune-{name}" for name in FINE_TUNING]


def test_no_speed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OfficialFineTuningTwin.texts

    def wrong(twin: OfficialFineTuningTwin, **batch: Tensor) -> Tensor:
        return right(twin, **batch) * 1.001

    monkeypatch.setattr(OfficialFineTuningTwin, "texts", wrong)
    document = _run("text")
    assert not document.ok
    assert not document.measured


def test_a_twin_needs_the_model_of_its_task(material: Material) -> None:
    text = FineTuningSubject("text", material, 2, CPU)
    with pytest.raises(InputError, match="needs a NLVR2Model"):
        text.official.statements(torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0))
