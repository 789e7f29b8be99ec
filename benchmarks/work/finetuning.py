"""One step of fine-tuning of each task, forward and backward: ours against the official procedure, in one process.

Both run on the same parameters and the same batch, and leave the same losses and gradients, which is checked before
anything is timed. Images are photographs, texts their captions; questions and answers, and the texts of
classification, are random tokens. Items in a batch are few on a CPU; on a GPU they are the official batch sizes. How
much the official procedure loses to padding and copies depends on the lengths, and on how many answers a question has:

- captions have 10 to 15 tokens, so that padding costs next to nothing; questions have the lengths of VQA v2;
- questions have 1, 3, 2, 5, 1, 2, 4, 2 distinct answers in turn, 2.5 on average;
- texts have 128, 16, 64, 32, 96, 24, 48, 40 tokens in turn, so that more than half of a padded batch is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.data.items import collate_pairs
from xfm_fast.data.texts import EncodedText
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.tasks.classification import ClassificationModel
from xfm_fast.tasks.task_model import TaskModel
from xfm_fast.tokenizer import CaptionTokenizer

from ..contenders.official_finetuning import OfficialFineTuningTwin
from ..material import photographs
from ..material.inputs import MAX_TOKENS, TASK_MODELS, decoder_layers, described, preset_config, random_state
from ..material.photographs import Collection
from ..material.questions import answer_list, questions
from ..measure import Case, Run, benchmark
from ..options import FINE_TUNING, FineTuned
from ..record import OFFICIAL, OURS
from .finetuning_cost import Shape, step_costs
from .training import Procedure, StepSubject, describe_model, pretraining, step_cases

Batch = dict[str, Any]
"""Arguments of a task's loss by name."""
Losses = dict[str, Tensor]
Negatives = tuple[Tensor, Tensor] | None

_PROMPT = "a picture of "
_CLASSES = {"text": 3, "image": 1000}
_ANSWERS = (1, 3, 2, 5, 1, 2, 4, 2)
_TEXT_LENGTHS = (128, 16, 64, 32, 96, 24, 48, 40)


@dataclass(frozen=True)
class Material:
    """What batches are made of: photographs with captions, their tokenizer, and a model's sizes."""

    collection: Collection
    tokenizer: CaptionTokenizer
    config: XFMConfig
    seed: int

    def pixels(self, count: int) -> Tensor:
        """`[count, 3, R, R]`; photographs come again where they are too few."""
        photos = len(self.collection.names)
        return self.collection.pixels((number % photos for number in range(count)), self.config.image_size)

    def captions(self, count: int) -> tuple[Tensor, Tensor]:
        """Ids and mask, `[count, L]`, padded to the longest."""
        return self.tokenizer.encode(self.collection.texts(count), MAX_TOKENS, pad_to_longest=True)

    def random(self) -> torch.Generator:
        """The same every time."""
        return torch.Generator().manual_seed(self.seed)


def _retrieval(material: Material, count: int) -> Batch:
    ids = material.tokenizer.encode_ids(material.collection.texts(count), MAX_TOKENS)
    photos = len(material.collection.names)
    return {
        "batch": collate_pairs(
            list(material.pixels(count)), [EncodedText(row, row, [], []) for row in ids],
            pad_token_id=material.config.pad_token_id, image_ids=[number % photos for number in range(count)],
        )
    }  # fmt: skip


def _vqa(material: Material, count: int) -> Batch:
    asked = questions(material.config, count, material.seed)
    each = torch.tensor([_ANSWERS[number % len(_ANSWERS)] for number in range(count)])
    known = answer_list(material.config, material.seed)
    given = torch.arange(int(each.sum())) % len(known.ids)
    mask = known.mask[given]
    longest = int(mask.sum(1).max())
    return {
        "pixels": material.pixels(count),
        "question_ids": asked.ids,
        "question_mask": asked.mask,
        "answer_ids": known.ids[given, :longest],
        "answer_mask": mask[:, :longest],
        "answers_per_question": each,
        "answer_weights": torch.repeat_interleave(1 / each, each),
    }


def _nlvr2(material: Material, count: int) -> Batch:
    ids, mask = material.captions(count)
    # With as many false ones the gradient of the last bias would cancel but for rounding, and bound nothing.
    targets = torch.ones(count, dtype=torch.long)
    return {"pixels": material.pixels(2 * count), "input_ids": ids, "attention_mask": mask, "targets": targets}


def _grounding(material: Material, count: int) -> Batch:
    ids, mask = material.captions(count)
    # Centres and sides: every box lies inside its image.
    boxes = 0.35 + 0.3 * torch.rand(count, 4, generator=material.random())
    return {"pixels": material.pixels(count), "input_ids": ids, "attention_mask": mask, "target": boxes}


def _captioning(material: Material, count: int) -> Batch:
    tokenizer = material.tokenizer
    texts = [_PROMPT + caption for caption in material.collection.texts(count)]
    ids, mask = tokenizer.encode(texts, MAX_TOKENS, pad_to_longest=True)
    return {
        "pixels": material.pixels(count), "caption_ids": ids, "caption_mask": mask,
        "prompt_length": len(tokenizer.encode_prompt(_PROMPT)), "label_smoothing": 0.1,
    }  # fmt: skip


def _text(material: Material, count: int) -> Batch:
    config, generator = material.config, material.random()
    lengths = torch.tensor([_TEXT_LENGTHS[number % len(_TEXT_LENGTHS)] for number in range(count)])
    lengths = lengths.clamp(max=config.max_text_length)
    first = max(config.pad_token_id, config.bos_token_id, config.eos_token_id) + 1
    ids = torch.randint(first, config.vocab_size, (count, int(lengths.max())), generator=generator)
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    ids[:, 0], ids[torch.arange(count), lengths - 1] = config.bos_token_id, config.eos_token_id
    ids = ids.masked_fill(mask == 0, config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask, "targets": torch.arange(count) % _CLASSES["text"]}


def _image(material: Material, count: int) -> Batch:
    # What Mixup makes of two classes.
    targets = torch.zeros(count, _CLASSES["image"])
    targets[:, 0], targets[torch.arange(count), 1 + torch.arange(count) % (_CLASSES["image"] - 1)] = 0.3, 0.7
    return {"pixels": material.pixels(count), "targets": targets}


def _ours_retrieval(model: XFM, batch: Batch, negatives: Negatives) -> Losses:
    return pretraining_losses(
        model, batch["batch"], losses=("itc", "itm"), stop_gradient=False, hard_negatives=negatives
    )


def _ours(model: XFM, batch: Batch, negatives: Negatives) -> Losses:
    found: Tensor | tuple[Tensor, Tensor] = model(**batch)
    return {"loss": found} if isinstance(found, Tensor) else dict(zip(("bbox_l1", "bbox_giou"), found, strict=True))


def _official(name: str, twin: OfficialFineTuningTwin, batch: Batch, negatives: Negatives) -> Losses:
    found: Tensor | Losses = getattr(twin, name)(**batch)
    return {"loss": found} if isinstance(found, Tensor) else found


@dataclass(frozen=True)
class _Task:
    """What the step of a task consists of.

    Attributes:
        says: the task, for readers.
        unit: what `counts` counts: items of a batch on a CPU, of a quick run on it, and on a GPU.
        image_size: the official one; None where there is no image.
        official: the method of the twin.
    """

    says: str
    unit: str
    counts: tuple[int, int, int]
    image_size: int | None
    build: Callable[[XFMConfig], XFM]
    batch: Callable[[Material, int], Batch]
    official: Callable[[OfficialFineTuningTwin, Batch, Negatives], Losses]
    ours: Callable[[XFM, Batch, Negatives], Losses] = _ours


TASKS: Mapping[FineTuned, _Task] = {
    "retrieval": _Task(
        "retrieval (ITC + ITM)", "pairs", (4, 2, 32), 384,
        lambda config: TaskModel(config, heads=("contrastive", "matching")), _retrieval,
        lambda twin, batch, negatives: twin.retrieval(batch["batch"], negatives), _ours_retrieval,
    ),
    "vqa": _Task(
        "VQA", "questions", (4, 2, 24), 480, TASK_MODELS["vqa"], _vqa, partial(_official, "answers")
    ),
    "nlvr2": _Task(
        "NLVR2", "statements", (4, 2, 8), 384, TASK_MODELS["nlvr2"], _nlvr2, partial(_official, "statements")
    ),
    "grounding": _Task(
        "grounding", "expressions", (4, 2, 20), 384, TASK_MODELS["grounding"], _grounding,
        partial(_official, "grounding"),
    ),
    "captioning": _Task(
        "captioning", "captions", (4, 2, 32), 384, TASK_MODELS["captioning"], _captioning,
        partial(_official, "captions"),
    ),
    "text": _Task(
        "text classification", "texts", (8, 2, 32), None,
        lambda config: ClassificationModel(config, _CLASSES["text"], modality="text"), _text,
        partial(_official, "texts"),
    ),
    "image": _Task(
        "image classification", "images", (8, 2, 128), 224,
        lambda config: ClassificationModel(config, _CLASSES["image"], modality="image", head="official_image"), _image,
        partial(_official, "images"),
    ),
}  # fmt: skip


@benchmark("train-step", title="A training step, fast against official", reference=OFFICIAL)
def run(run: Run) -> Iterator[Case]:
    """The step of pretraining, or of `options.task`, or of every task."""
    options = run.options
    if options.dtype == ("auto",) and run.device.type == "cuda":
        # On a GPU this model is not trained in fp32.
        run.dtypes.remove("fp32")
    if options.task is None:
        yield from pretraining(run)
        return
    names: tuple[FineTuned, ...] = FINE_TUNING if options.task == "all" else (options.task,)
    run.progress.begin(1 + len(names) * (2 if options.quick else 3))
    run.progress.stage("photographs and captions")
    collection, config = photographs.bundled(), preset_config(options.preset)
    tokenizer = CaptionTokenizer.train_on_texts(collection.captions, config.vocab_size)
    run.document.data = described(collection, tokenizer)
    run.probe()
    for name in names:
        task = TASKS[name]
        count = options.pairs or task.counts[2 if run.device.type == "cuda" else options.quick]
        run.progress.stage(f"model, {task.says}")
        sized = config
        if options.preset != "tiny" and task.image_size is not None:
            sized = config.replace(image_size=task.image_size)
        subject = FineTuningSubject(name, Material(collection, tokenizer, sized, options.seed), count, run.device)
        describe_model(run, subject.model)
        shape = subject.shape
        lengths, costs = shape.lengths, step_costs(name, sized, shape)
        size = f" of {sized.image_size} px" if task.image_size is not None else ""
        if task.image_size is None:
            size = f" of {min(lengths)}-{max(lengths)} tokens"
        yield from step_cases(
            run, subject, f"finetune-{name}", f"fine-tuning step, {task.says}, {count} {task.unit}{size}", task.unit,
            items=count, flops={OURS: costs.needed, OFFICIAL: costs.official}, memory={},
            tokens={OURS: sum(lengths), OFFICIAL: len(lengths) * shape.padded} if lengths else {},
        )  # fmt: skip


class FineTuningSubject(StepSubject):
    """The model of a task with random weights, its official twin on the same parameters, and a batch.

    Args:
        count: items of the batch.
    """

    def __init__(self, name: FineTuned, material: Material, count: int, device: torch.device) -> None:
        self.name, self.task, self.device, self._count = name, TASKS[name], device, count
        with torch.random.fork_rng(devices=[]):
            # What pretraining does not have keeps its own initialisation.
            torch.manual_seed(material.seed)
            model = self.task.build(material.config)
        model.load_state_dict(random_state(material.config, model.heads, material.seed), strict=False)
        self.model = model.to(device).eval()
        self.official = OfficialFineTuningTwin(self.model)
        batch = self.task.batch(material, count)
        self.batch: Batch = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}

    @property
    def items(self) -> int:
        return self._count

    @property
    def text_mask(self) -> Tensor | None:
        """`[T, L]` of the texts that the encoder, or of captions the decoder, reads; None where there are none."""
        pairs = self.batch.get("batch")
        if pairs is not None:
            return pairs.attention_mask
        names = ("question_mask", "attention_mask", "caption_mask")
        return next((self.batch[name] for name in names if name in self.batch), None)

    @property
    def shape(self) -> Shape:
        """The sizes of the batch."""
        mask, answers, given = self.text_mask, self.batch.get("answer_mask"), self.batch.get("prompt_length", 1)
        lengths: list[int] = [] if mask is None else mask.sum(1).tolist()
        each = [] if answers is None else answers.sum(1).split(self.batch["answers_per_question"].tolist())
        return Shape(
            items=self.items, lengths=lengths, padded=0 if mask is None else mask.shape[1],
            answers=[part.tolist() for part in each], padded_answer=0 if answers is None else answers.shape[1],
            given=given, decoder_layers=decoder_layers(self.model.config), classes=_CLASSES.get(self.name, 0),
        )  # fmt: skip

    def losses(self, procedure: Procedure, hard_negatives: Negatives) -> Losses:
        if procedure == OURS:
            return self.task.ours(self.model, self.batch, hard_negatives)
        return self.task.official(self.official, self.batch, hard_negatives)
