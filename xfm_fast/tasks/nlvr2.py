"""NLVR2: is a sentence true of a pair of images?

Official recipe: 384 pixels, 8 pairs per GPU, lr 1e-5 (twice for the head), 15 epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import (
    Annotation,
    AnnotationRows,
    Text,
    as_rows,
    read_array,
)
from xfm_fast.data.files import Paths, find_files, open_file
from xfm_fast.data.tables import read_lines
from xfm_fast.errors import DataError, InputError
from xfm_fast.models import inputs
from xfm_fast.models.text import MLPHead
from xfm_fast.packing import ImageGroups, Packing
from xfm_fast.tasks.evaluation import Metrics, Row
from xfm_fast.tasks.models import TaskModel
from xfm_fast.tasks.task import (
    AugmentedOptions,
    Item,
    Losses,
    PairInput,
    Rng,
    Task,
    register,
    require_inputs,
)

RESULT_FILE = "nlvr2_result.csv"


class NLVR2Model(TaskModel):
    """X-FM with a binary head on the sentence fused with each image."""

    new_modules = ("cls_head.",)
    own_graphs = ("nlvr2",)

    def __init__(self, config: XFMConfig) -> None:
        super().__init__(config, heads=())
        self.cls_head = MLPHead(2 * config.text_width, 2, config.head_layer_norm_eps)

    def logits(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Compute logits `[B, 2]` (false, true); `pixels` `[2B, 3, R, R]` has all first images first.

        The sentence and the image-independent part of fusion run once; both images share one packed
        pass.
        """
        mask = _check_inputs(pixels, input_ids, attention_mask, self.config)
        memory = self.image_memory(self.encode_image(pixels))
        packing = Packing.from_mask(mask)
        text = self.text_encoder(input_ids, packing)
        tokens = self.fusion_encoder.first_self_attention(text, packing)
        fused = self.fusion_encoder(
            torch.cat([tokens, tokens]),
            Packing.from_mask(torch.cat([mask, mask])),
            memory,
            ImageGroups(torch.arange(len(pixels) + 1, device=pixels.device)),
            first_token_only=True,
            self_attended=True,
        )
        return self.cls_head(torch.cat(fused.split(len(input_ids)), dim=-1))

    def graph_results(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> dict[str, Tensor]:
        """Compute logits `[I, T, 2]` of every sentence on image i and the next one."""
        images, logits = len(pixels), []
        for first in range(images):
            pair = pixels[[first, (first + 1) % images]].repeat_interleave(len(input_ids), dim=0)
            logits.append(self.logits(pair.to(self.dtype), input_ids, attention_mask))
        return {"class_logits": torch.stack(logits)}

    def forward(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None, targets: Tensor
    ) -> Tensor:
        """Return the cross-entropy with `targets` `[B]`, 1 if the sentence is true."""
        return F.cross_entropy(self.logits(pixels, input_ids, attention_mask), targets.long())


class NLVR2Session:
    """Methods for `xfm_fast.export.Session`: the graph `nlvr2`."""

    def logits(
        self: Any, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Compute logits as `NLVR2Model.logits` does."""
        mask = _check_inputs(pixels, input_ids, attention_mask, self.config)
        self.require("nlvr2")
        memory = self.image_memory(self.encode_image(pixels))
        pairs, length = input_ids.shape
        tensors = {"text_embeds": self.encode_text(input_ids, mask), "attention_mask": mask}
        for name, layer in memory.layers.items():
            tensors[name] = layer.unflatten(0, (2, pairs)).transpose(0, 1)
        batch = max(self.limits.budget // max(length, 1), 1)
        with torch.inference_mode():
            return self.in_batches("nlvr2", tensors, batch)["class_logits"]


def _check_inputs(
    pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None, config: XFMConfig
) -> Tensor:
    """Check that each sentence has two images; return the mask of the sentences."""
    if len(pixels) != 2 * len(input_ids):
        raise InputError(
            f"there are {len(pixels)} images for {len(input_ids)} sentences; NLVR2 has two for each"
        )
    return inputs.check_tokens(input_ids, attention_mask, config)


class NLVR2Record(Annotation):
    """A statement about two images."""

    images: Annotated[tuple[Text, ...], Field(min_length=2, max_length=2)]
    sentence: Text
    label: bool
    identifier: str | None = Field(
        default=None, description="split-set-pair-sentence, e.g. test1-0-1-0"
    )


def nlvr2_rows(paths: Paths) -> list[AnnotationRows[NLVR2Record]]:
    """Open statements about two images: official JSON, or NLVR2's lines (`train.json`, ...).

    Images of lines are `SPLIT/STEM-img0.png` and `SPLIT/STEM-img1.png`, or `SPLIT/DIRECTORY/...`
    for lines with a `directory`; STEM is the identifier without its last number.
    """
    files = []
    for path in find_files(paths):
        with open_file(path) as file:
            is_lines = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
        if is_lines:
            rows = read_lines(path)
            rows.elements = [
                _statement(line) if isinstance(line, dict) else line for line in rows.elements
            ]
            files.append(rows)
        else:
            files.append(AnnotationRows(path, read_array(path)))
    return as_rows(files, NLVR2Record)


def _statement(line: Mapping[str, Any]) -> Mapping[str, Any] | DataError:
    """Return the element of a line; a line of the official format is one already."""
    identifier = line.get("identifier")
    if identifier is None:
        return line
    stem, dash, _ = str(identifier).rpartition("-")
    if not dash:
        return DataError(
            f"identifier {identifier!r} is not of the form split-set-pair-sentence; correct the line"
        )
    folder = stem.partition("-")[0]
    if "directory" in line:
        folder += f"/{line['directory']}"
    return {**line, "images": [f"{folder}/{stem}-img{side}.png" for side in (0, 1)]}


class NLVR2Options(AugmentedOptions):
    """NLVR2."""

    kind: Literal["nlvr2"] = "nlvr2"
    max_words: int = Field(default=30, gt=0, description="of a sentence")
    max_tokens: int | None = Field(
        default=None, ge=3, description="of a sentence in training; null: unlimited"
    )


@dataclass(frozen=True, kw_only=True)
class NLVR2Batch(PairInput):
    """`image` `[2B, 3, R, R]`: all first images, then all second ones; `targets` `[B]`."""

    targets: Tensor


@register
class NLVR2Task(Task[NLVR2Options]):
    """NLVR2."""

    Options, Session = NLVR2Options, NLVR2Session
    metrics = ("accuracy",)
    large_lr = ("cls_head",)
    check_rows = staticmethod(nlvr2_rows)

    def build(self) -> NLVR2Model:
        return NLVR2Model(self.config)

    def rows(
        self, paths: Sequence[Path], split: str | None = None
    ) -> list[AnnotationRows[NLVR2Record]]:
        return nlvr2_rows(paths)

    def item(self, record: NLVR2Record, rng: Rng) -> Item:
        ids = self.caption_ids(record.sentence, self.options.max_words, self.options.max_tokens)
        pair = torch.stack([self.augmented(image, rng) for image in record.images])
        return Item(pair, ids, record.label)

    def collate(self, items: list[Item], rng: Rng) -> NLVR2Batch:
        batch = self.pair_inputs(items)
        batch["image"] = batch["image"].transpose(0, 1).flatten(0, 1)
        targets = torch.tensor([item.target for item in items], dtype=torch.int64)
        return NLVR2Batch(**batch, targets=targets)

    def losses_of(self, model: NLVR2Model, batch: NLVR2Batch) -> Losses:
        return {"loss": model(batch.image, batch.input_ids, batch.attention_mask, batch.targets)}

    def predict(self, model: NLVR2Model, records: Sequence[NLVR2Record]) -> list[Row]:
        sentences = [
            self.caption_ids(record.sentence, self.options.max_words) for record in records
        ]
        images = [record.images[side] for side in (0, 1) for record in records]
        ids, mask = self.padded(sentences, model.device)
        logits = model.logits(self.pixels_of(images, model), ids, mask)
        probabilities = logits.double().softmax(-1)[:, 1].tolist()
        return [{"answer": value > 0.5, "probability": value} for value in probabilities]

    def score(self, rows: Sequence[Row], records: Sequence[NLVR2Record]) -> Metrics:
        hits = [row["answer"] == record.label for row, record in zip(rows, records, strict=True)]
        return {"accuracy": 100 * sum(hits) / len(hits)}

    def files(self, rows: Sequence[Row], records: Sequence[NLVR2Record]) -> dict[str, bytes]:
        """Return lines `identifier,label` for the benchmark's script; a row number without identifiers."""
        names = [record.identifier or index for index, record in enumerate(records)]
        lines = [f"{name},{row['answer']}\n" for name, row in zip(names, rows, strict=True)]
        return {RESULT_FILE: "".join(lines).encode()}

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[NLVR2Record]:
        valid = len(images) == 2 and len(texts) == 1
        require_inputs(images, texts, "two images and a sentence about both", ok=valid)
        pair = (str(images[0]), str(images[1]))
        return [NLVR2Record(images=pair, sentence=texts[0], label=False)]
