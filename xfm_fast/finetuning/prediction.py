"""A model with all that it needs to take files and strings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast.checkpoint.files import CONFIG_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.errors import CheckpointError, DataError, InputError, StorageError
from xfm_fast.finetuning.kinds import TOKENIZER_FILE, make_task, model_folder, task_of
from xfm_fast.finetuning.run import load_weights
from xfm_fast.finetuning.task import Row, Task
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.heatmap import cross_attention_heatmap
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption


@dataclass(frozen=True)
class Predictor:
    """A model of a task that answers for files and strings.

    Attributes:
        model: of the right class, in evaluation mode.
        task: its tokenizer, transforms and options among the rest.
    """

    model: XFM
    task: Task[Any, Any, Any, Any]

    def predict(self, images: Sequence[str | Path] = (), texts: Sequence[str] = ()) -> list[Row]:
        """The results for some image files and some texts, as the task pairs them: `predict(["a.jpg"], ["a dog"])`.

        Raises:
            InputError: they are not what the task needs.
            DataError: an image cannot be read.
        """
        return self.answer(self.task.requests([Path(image) for image in images], list(texts)))

    def heatmap(self, image: str | Path, text: str) -> Tensor:
        """The patches of an image that a text is about, `[grid, grid]`; see `xfm_fast.tasks.heatmap`.

        Raises:
            InputError: the model has neither the matching head nor the box head.
            DataError: the image cannot be read, or the text is empty.
        """
        device = self.model.device
        pixels = self.task.pixels(image)[None].to(device)
        ids, mask = self.task.tokenizer.encode(
            [pre_caption(text)], self.model.config.max_text_length, pad_to_longest=True
        )
        return cross_attention_heatmap(self.model, pixels, ids.to(device), mask.to(device))[0].cpu()

    @torch.no_grad()
    def answer(self, records: Sequence[Any]) -> list[Row]:
        """The results of records of the task."""
        return self.task.predict(self.model, records)


def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Predictor:
    """A fine-tuned model with its tokenizer and its transforms.

    Args:
        folder: a run, or a folder of weights with `task.json`, which runs write.
        device, dtype: of the model.

    Raises:
        CheckpointError: the folder holds no such model, or a damaged one.
    """
    place = model_folder(Path(folder))
    if place is None:
        raise CheckpointError(
            f"{folder} is neither a run nor a folder of weights: there is no {CONFIG_FILE} in it, in best/ or in model/"
        )
    options = task_of(place)
    if options is None:
        raise CheckpointError(
            f"{place} holds a pretrained model, which has no task yet; read it by XFM.from_pretrained, or fine-tune it"
        )
    vocabulary = place / TOKENIZER_FILE
    tokenizer = CaptionTokenizer.from_files(vocabulary) if vocabulary.is_file() else None
    task = make_task(options, XFMConfig.load(place / CONFIG_FILE), tokenizer)
    model = task.build()
    load_weights(model, task, place)
    model.tokenizer = tokenizer
    return Predictor(model.to(device=device, dtype=dtype).eval(), task)


def answer_lines(
    predictor: Predictor, lines: Path, out: Path | None, batch_size: int, progress: Callable[[int, int], None]
) -> Iterator[Row]:
    """Answer a file of requests, a line of JSON each, in its order.

    Args:
        predictor: the model.
        lines: the requests; see `Task.request`.
        out: receives the answers, a line each; those that are there already are not made again. None yields them.
        batch_size: requests that are answered together.
        progress: called with requests done and in all.

    Yields:
        The answers, where there is no `out`.

    Raises:
        DataError: a line is no request, by its number; checked before the first one is answered.
        StorageError: `out` cannot be written, or holds something else.
    """
    records = _requests(predictor.task, lines)
    try:
        done = 0 if out is None or not out.exists() else _whole_lines(out)
        file = None if out is None else out.open("a", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{out} cannot be written ({error.strerror or error}); choose another file") from error
    if done > len(records):
        raise StorageError(f"{out} has {done} answers and {lines} {len(records)} requests; choose another file")
    for start in range(done, len(records), batch_size):
        rows = predictor.answer(records[start : start + batch_size])
        if file is None:
            yield from rows
        else:
            try:
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                file.flush()
            except OSError as error:
                raise StorageError(f"{out} cannot be written ({error.strerror or error}); free space") from error
        progress(start + len(rows), len(records))
    if file is not None:
        file.close()


def _requests(task: Task[Any, Any, Any, Any], path: Path) -> list[Any]:
    try:
        # Not splitlines, which also ends lines within a JSON string.
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give a file of JSON lines") from None
    records = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if not isinstance(line, Mapping):
                raise InputError('a request is an object such as {"image": "photo.jpg", "text": "a dog"}')
            records.append(task.request(line))
        except (ValueError, RecursionError, InputError) as error:
            raise DataError(f"{path}:{number}: {error}") from None
    return records


def _whole_lines(path: Path) -> int:
    """The number of whole lines of a file, of which half a line that a killed process left is cut off."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return content.count(b"\n")
