"""Pretraining and the fine-tuning tasks in benchmarks: model, batch of a step, and the official procedure of each.

Images are photographs, texts their captions; questions, answers and the texts of classification are random tokens. How
much the official procedure loses to padding and copies depends on the lengths, and on the answers of a question:

- captions have 10 to 15 tokens, so that padding costs next to nothing; questions have the lengths of VQA v2;
- questions have 1, 3, 2, 5, 1, 2, 4, 2 distinct answers in turn, 2.5 on average;
- texts have 128, 16, 64, 32, 96, 24, 48, 40 tokens in turn, so that more than half of a padded batch is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.data.items import collate_pairs
from xfm_fast.data.masking import EncodedText, block_mask
from xfm_fast.data.options import TextOptions
from xfm_fast.data.texts import encode_pair_text
from xfm_fast.models.xfm import ALL_HEADS, XFM
from xfm_fast.tasks.captioning import CaptioningModel
from xfm_fast.tasks.grounding import GroundingModel
from xfm_fast.tasks.models import ClassificationModel, TaskModel
from xfm_fast.tasks.nlvr2 import NLVR2Model
from xfm_fast.tasks.task import TASKS
from xfm_fast.tasks.vqa_model import VQAModel
from xfm_fast.testing import MAX_TOKENS, Inputs

Batch = dict[str, Any]
"""Arguments of a task's loss by name; pairs for contrastive losses are a `PairBatch` named `batch`."""
PROMPT = "a picture of "
# The official decoder has 12 layers; that of a small model has as many as its fusion encoder.
_DECODER_LAYERS = 12
_TEXT_CLASSES, _IMAGE_CLASSES = 3, 1000
_ANSWERS_PER_QUESTION = (1, 3, 2, 5, 1, 2, 4, 2)
_TEXT_LENGTHS = (128, 16, 64, 32, 96, 24, 48, 40)


def decoder_layers(config: XFMConfig) -> int:
    """Return the layers of the decoder that a task adds to a model of these sizes."""
    return min(_DECODER_LAYERS, config.fusion_layers)


class Counts(NamedTuple):
    """Items of a batch on a CPU, of a quick run on one, and on a GPU."""

    cpu: int
    quick: int
    gpu: int


@dataclass(frozen=True)
class BenchTask:
    """A task and its training step.

    Attributes:
        counts: default size of a batch, in `unit`s.
        image_size: the official one, None without images.
        build: makes the model.
        batch: makes a batch of a number of items.
        official: the judge, a method of `OfficialFineTuningTwin`; None: the same losses on the reference ops.
        losses: options of `pretraining_losses`.
        losses_of: gives the losses of a model that does not return them itself.
    """

    title: str
    unit: str
    counts: Counts
    image_size: int | None
    build: Callable[[XFMConfig], XFM]
    batch: Callable[[Inputs, int], Batch]
    official: str | None = None
    losses: Mapping[str, Any] = field(default_factory=dict)
    losses_of: Callable[[Any, Any], dict[str, Tensor]] | None = None


def _pretraining(inputs: Inputs, count: int) -> Batch:
    """Pair photographs with captions, masked and padded as the official loader does, cycling through both."""
    rng, collection, config = np.random.default_rng(inputs.seed), inputs.collection, inputs.sizes
    photos, texts = len(collection.names), []
    for index in range(count):
        captions = collection.captions_of(index % photos)
        caption = captions[index // photos % len(captions)]
        texts.append(encode_pair_text(caption, inputs.tokenizer, TextOptions(), rng))
    batch = collate_pairs(
        list(inputs.pixels(count)),
        texts,
        pad_token_id=config.pad_token_id,
        patch_masks=[
            block_mask(config.grid, config.num_masking_patches, config.min_num_patches, rng)
            for _ in texts
        ],
        width=TextOptions().max_tokens,
        masked=TextOptions().masking.most,
    )
    return {"batch": batch}


def _retrieval(inputs: Inputs, count: int) -> Batch:
    photos = len(inputs.collection.names)
    ids = inputs.tokenizer.encode_ids(inputs.collection.texts(count), MAX_TOKENS)
    batch = collate_pairs(
        list(inputs.pixels(count)),
        [EncodedText(row, row, [], []) for row in ids],
        pad_token_id=inputs.sizes.pad_token_id,
        image_ids=[index % photos for index in range(count)],
    )
    return {"batch": batch}


def _vqa(inputs: Inputs, count: int) -> Batch:
    questions, answers = inputs.questions(count), inputs.answers()
    counts = torch.tensor([*islice(cycle(_ANSWERS_PER_QUESTION), count)])
    rows = torch.arange(int(counts.sum())) % len(answers.ids)
    mask = answers.mask[rows]
    longest = int(mask.sum(1).max())
    return {
        "pixels": inputs.pixels(count),
        "question_ids": questions.ids,
        "question_mask": questions.mask,
        "answer_ids": answers.ids[rows, :longest],
        "answer_mask": mask[:, :longest],
        "answers_per_question": counts,
        "answer_weights": torch.repeat_interleave(1 / counts, counts),
    }


def _captions(inputs: Inputs, count: int, images: int = 1) -> Batch:
    captions = inputs.collection.texts(count)
    ids, mask = inputs.tokenizer.encode(captions, MAX_TOKENS, pad_to_longest=True)
    return {"pixels": inputs.pixels(images * count), "input_ids": ids, "attention_mask": mask}


def _nlvr2(inputs: Inputs, count: int) -> Batch:
    # With as many false ones the gradient of the last bias would cancel but for rounding, and bound nothing.
    return _captions(inputs, count, images=2) | {"targets": torch.ones(count, dtype=torch.long)}


def _grounding(inputs: Inputs, count: int) -> Batch:
    # Centres and sides: every box lies inside its image.
    boxes = 0.35 + 0.3 * torch.rand(count, 4, generator=torch.Generator().manual_seed(inputs.seed))
    return _captions(inputs, count) | {"target": boxes}


def _captioning(inputs: Inputs, count: int) -> Batch:
    captions = [PROMPT + caption for caption in inputs.collection.texts(count)]
    ids, mask = inputs.tokenizer.encode(captions, MAX_TOKENS, pad_to_longest=True)
    return {
        "pixels": inputs.pixels(count),
        "caption_ids": ids,
        "caption_mask": mask,
        "prompt_length": len(inputs.tokenizer.encode_prompt(PROMPT)),
        "label_smoothing": 0.1,
    }


def _text(inputs: Inputs, count: int) -> Batch:
    longest = inputs.sizes.max_text_length
    lengths = [min(length, longest) for length in islice(cycle(_TEXT_LENGTHS), count)]
    ids, mask = inputs.random_texts(lengths)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "targets": torch.arange(count) % _TEXT_CLASSES,
    }


def _image(inputs: Inputs, count: int) -> Batch:
    # Mixup of class 0 with another one.
    images = torch.arange(count)
    targets = torch.zeros(count, _IMAGE_CLASSES)
    targets[:, 0] = 0.3
    targets[images, 1 + images % (_IMAGE_CLASSES - 1)] = 0.7
    return {"pixels": inputs.pixels(count), "targets": targets}


def _build_retrieval(config: XFMConfig) -> XFM:
    return TaskModel(config, heads=("contrastive", "matching"))


def _build_image(config: XFMConfig) -> XFM:
    return ClassificationModel(config, _IMAGE_CLASSES, modality="image", head="official_image")


PRETRAINING = BenchTask(
    "ITC + ITM + IMLM + MIM",
    "pairs",
    Counts(8, 2, 96),
    224,
    lambda config: XFM(config, heads=ALL_HEADS),
    _pretraining,
    "losses",
)
OFFICIAL_TASKS: Mapping[str, BenchTask] = {
    "retrieval": BenchTask(
        "retrieval (ITC + ITM)",
        "pairs",
        Counts(4, 2, 32),
        384,
        _build_retrieval,
        _retrieval,
        "retrieval",
        {"losses": ("itc", "itm"), "stop_gradient": False},
    ),
    "vqa": BenchTask(
        "VQA",
        "questions",
        Counts(4, 2, 24),
        480,
        lambda config: VQAModel(config, decoder_layers=decoder_layers(config)),
        _vqa,
        "answers",
    ),
    "nlvr2": BenchTask(
        "NLVR2", "statements", Counts(4, 2, 8), 384, NLVR2Model, _nlvr2, "statements"
    ),
    "grounding": BenchTask(
        "grounding", "expressions", Counts(4, 2, 20), 384, GroundingModel, _grounding, "grounding"
    ),
    "captioning": BenchTask(
        "captioning",
        "captions",
        Counts(4, 2, 32),
        384,
        lambda config: CaptioningModel(config, decoder_layers=decoder_layers(config)),
        _captioning,
        "captions",
    ),
    "text": BenchTask(
        "text classification",
        "texts",
        Counts(8, 2, 32),
        None,
        lambda config: ClassificationModel(config, _TEXT_CLASSES, modality="text"),
        _text,
        "texts",
    ),
    "image": BenchTask(
        "image classification", "images", Counts(8, 2, 128), 224, _build_image, _image, "images"
    ),
}
"""The tasks with an official procedure."""
BUILDERS = {name: task.build for name, task in OFFICIAL_TASKS.items()}


def bench_task(name: str, inputs: Inputs, folder: Path) -> BenchTask:
    """Return the row of a task, or derive one from its class; the `folder` receives the photographs as files."""
    if name in OFFICIAL_TASKS:
        return OFFICIAL_TASKS[name]
    options: Any = TASKS[name].Options
    task = TASKS[name](options(), inputs.sizes, inputs.tokenizer, images=folder)

    def batch(inputs: Inputs, count: int) -> Batch:
        for index, image in enumerate(inputs.collection.images[:count]):
            image.save(folder / f"{index}.png")
        photos, rng = len(inputs.collection.images), np.random.default_rng(inputs.seed)
        items = []
        for index, caption in enumerate(inputs.collection.texts(count)):
            image = Path(f"{index % photos}.png")
            (record,) = task.requests([image], [caption])
            items.append(task.item(record, rng))
        return {"batch": task.collate(items, rng)}

    return BenchTask(
        name,
        "items",
        Counts(4, 2, 32),
        None,
        lambda config: task.build(),
        batch,
        losses_of=task.losses_of,
    )
