"""Prediction from files and strings with a fine-tuned model or export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast.checkpoint.files import CONFIG_FILE, TOKENIZER_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.data.files import read_text
from xfm_fast.errors import CheckpointError, DataError, ExportError, InputError, explain_types
from xfm_fast.export.manifest import MANIFEST_FILE
from xfm_fast.export.request import RuntimeChoice
from xfm_fast.export.session import Session
from xfm_fast.export.session.tasks import task_session
from xfm_fast.finetuning.run import load_weights
from xfm_fast.io import make_folder, parse_json, write_bytes
from xfm_fast.kernels.files import is_stream
from xfm_fast.models.hub import resolve
from xfm_fast.models.xfm import XFM, Precision
from xfm_fast.tasks.evaluation import Evaluation, Row
from xfm_fast.tasks.task import Task, make_task, task_of
from xfm_fast.tasks.weak_grounding import cross_attention_heatmap
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption


@dataclass(frozen=True)
class Predictor:
    """A task model or the session of an export, which predicts from files and strings."""

    model: XFM | Session
    task: Task[Any]

    def predict(self, images: Sequence[str | Path] = (), texts: Sequence[str] = ()) -> list[Row]:
        """Predict from image files and texts, paired by the task: `predict(["a.jpg"], ["a dog"])`."""
        records = self.task.requests([Path(image) for image in images], list(texts))
        return self.answer(records)

    def heatmap(self, image: str | Path, text: str) -> Tensor:
        """Compute the relevance `[grid, grid]` of an image's patches to a text.

        See `xfm_fast.tasks.weak_grounding`.
        """
        if isinstance(self.model, Session):
            raise InputError(
                "a heat map needs gradients, which no export computes; name the run that was exported"
            )
        device = self.model.device
        pixels = self.task.pixels(image)[None].to(device)
        ids, mask = self.task.tokenizer.encode(
            [pre_caption(text)], self.model.config.max_text_length, pad_to_longest=True
        )
        return cross_attention_heatmap(self.model, pixels, ids.to(device), mask.to(device))[0].cpu()

    @torch.no_grad()
    def answer(self, records: Sequence[Any]) -> list[Row]:
        """Predict result rows of task records."""
        return self.task.predict(self.model, records)


@explain_types
def load(
    folder: str | Path | Session,
    *,
    device: str | torch.device | None = None,
    dtype: Precision = torch.float32,
    runtime: RuntimeChoice = "auto",
) -> Predictor:
    """Load a fine-tuned model, or an export of one, with its tokenizer and transforms.

    Args:
        folder: a run, a folder of weights with `task.json` or its Hub name, an export of either, or an open session.
        device: of the model; default: CPU, for exports the runtime's preference.
        dtype: of the model, or "int8" or "fp8" (see `XFM.quantise`); an export has a fixed dtype.
        runtime: of an export, see `Session.load`.

    Raises:
        CheckpointError: the folder holds no task model, or a damaged one.
        ExportError: the export is damaged, has no task, or cannot be run here.
        InputError: another dtype for an export, or a runtime for a model.
    """
    if isinstance(folder, Session):
        if device is not None or runtime != "auto":
            raise InputError(
                f"the session of {folder.folder} is open; leave out its device and runtime"
            )
        return _use_session(folder, dtype)
    if Path(folder, MANIFEST_FILE).is_file():
        return _use_session(Session.load(folder, runtime, device), dtype)
    if runtime != "auto":
        raise InputError(
            f"{folder} is a model of PyTorch and no export; leave out the runtime {runtime!r}"
        )
    path = resolve(folder)
    if not (path / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder} is neither a run nor a folder of weights: there is no {CONFIG_FILE} in it, in best/ or in model/"
        )
    options = task_of(path)
    if options is None:
        raise CheckpointError(
            f"{path} holds a pretrained model, which has no task yet; read it by XFM.from_pretrained, or fine-tune it"
        )
    task = make_task(options, XFMConfig.load(path / CONFIG_FILE), _read_tokenizer(path))
    model = task.build()
    load_weights(model, task, path)
    model.tokenizer = task.tokenizer if task.reads_text else None
    return Predictor(model.to(device or "cpu").cast(dtype).eval(), task)


def _read_tokenizer(folder: Path) -> CaptionTokenizer | None:
    vocabulary = folder / TOKENIZER_FILE
    return CaptionTokenizer.from_files(vocabulary) if vocabulary.is_file() else None


def _use_session(session: Session, dtype: Precision) -> Predictor:
    """Predict by the open session of an export."""
    folder = session.folder
    options = task_of(folder)
    if options is None:
        raise ExportError(
            f"{folder} is an export of a model without a task; open it by xfm_fast.export.Session.load for "
            "embeddings and scores, or export a run of xfm-fast finetune"
        )
    session_type = task_session(options.kind)
    if session_type is None:
        raise ExportError(
            f"exports do not answer for the task {options.kind}; name the run that {folder} was made of"
        )
    if not isinstance(session, session_type):
        raise InputError(
            f"the session of {folder} does not answer for the task {options.kind}; use Session.load"
        )
    if dtype not in (torch.float32, session.dtype):
        raise InputError(
            f"{folder} computes in {session.manifest.dtype}; leave the type out, or export in another one"
        )
    if session.task is None:
        session.task = make_task(options, session.config, _read_tokenizer(folder))
    return Predictor(session, session.task)


def answer_lines(predictor: Predictor, lines: Path, out: Path, work: Evaluation) -> int:
    """Answer a JSON-lines file of requests in order; collective, returns the number of answers.

    `out` is written when all answers are complete. The folder of `work` stores progress, so that a
    killed command resumes, and is removed at the end. All lines are validated before the first
    prediction.
    """
    if is_stream(out):
        raise InputError(
            f"{out} is not a regular file; name one, or leave it out to print the answers"
        )
    records = work.processes.from_first(lambda: requests_in(predictor.task, lines))
    with torch.no_grad():
        rows = work.rows(predictor.task, predictor.model, records)

    def save() -> None:
        make_folder(out.parent)
        write_bytes(
            {out: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()}
        )
        shutil.rmtree(work.folder, ignore_errors=True)

    work.processes.from_first(save)
    return len(records)


def requests_in(task: Task[Any], path: Path) -> list[Any]:
    """Read the records of a JSON-lines request file."""
    # splitlines would also split at separators within a JSON string.
    lines = read_text(path).split("\n")
    records = []
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(request_of(task, parse_json(line)))
        except ValueError as error:
            raise DataError(f"{path}:{line_number}: {error}") from None
    if not records:
        raise DataError(f"{path} holds no requests; write one a line")
    return records


def request_of(task: Task[Any], line: Any) -> Any:
    """Make the record of a request: `image` (or `images`) and `text`, each a string or a list."""
    if not isinstance(line, Mapping):
        raise InputError('a request is an object such as {"image": "photo.jpg", "text": "a dog"}')
    images = _as_list(line.get("images", line.get("image")))
    texts = _as_list(line.get("text"))
    if not all(isinstance(value, str) for value in [*images, *texts]):
        raise InputError('"image" and "text" of a request are strings, or lists of strings')
    records = task.requests([Path(image) for image in images], texts)
    if len(records) != 1:
        raise InputError(
            f"a request is answered by one result and this one needs {len(records)}; give a line each"
        )
    return records[0]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
