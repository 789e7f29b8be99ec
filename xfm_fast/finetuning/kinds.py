"""Registry of tasks, and task metadata in weight folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from xfm_fast.checkpoint.files import TASK_FILE, TOKENIZER_FILE, model_folder
from xfm_fast.config import XFMConfig
from xfm_fast.documents import read_json
from xfm_fast.errors import CheckpointError
from xfm_fast.finetuning.captioning import CaptioningOptions, CaptioningTask
from xfm_fast.finetuning.grounding import GroundingOptions, GroundingTask
from xfm_fast.finetuning.image import ImageTask, ImageTaskOptions
from xfm_fast.finetuning.nlvr2 import NLVR2Options, NLVR2Task
from xfm_fast.finetuning.retrieval import RetrievalOptions, RetrievalTask
from xfm_fast.finetuning.task import Task, TaskOptions
from xfm_fast.finetuning.text import TextTask, TextTaskOptions
from xfm_fast.finetuning.vqa import VQAOptions, VQATask
from xfm_fast.finetuning.weak_grounding import WeakGroundingOptions, WeakGroundingTask
from xfm_fast.tasks.reranking import Rank
from xfm_fast.tokenizer import CaptionTokenizer

FORMAT_VERSION = 1

TASKS: dict[str, type[Task[Any, Any, Any, Any]]] = {
    "captioning": CaptioningTask,
    "grounding": GroundingTask,
    "image": ImageTask,
    "nlvr2": NLVR2Task,
    "retrieval": RetrievalTask,
    "text": TextTask,
    "vqa": VQATask,
    "weak_grounding": WeakGroundingTask,
}
AnyTask = Annotated[
    CaptioningOptions
    | GroundingOptions
    | ImageTaskOptions
    | NLVR2Options
    | RetrievalOptions
    | TextTaskOptions
    | VQAOptions
    | WeakGroundingOptions,
    Field(discriminator="kind"),
]
"""The section `task` of a recipe, discriminated by `kind`."""


def explanation(task: Task[Any, Any, Any, Any], options: TaskOptions | None = None) -> dict[str, bytes]:
    """Metadata files to save with the weights, optionally with other options."""
    document = {"format": FORMAT_VERSION, "task": (options or task.options).model_dump(mode="json")}
    files = {TASK_FILE: (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()}
    return files | ({TOKENIZER_FILE: task.tokenizer.to_json().encode()} if task.reads_text else {})


def task_of(folder: Path) -> TaskOptions | None:
    """Task of a folder of weights; None for a pretrained model."""
    path = folder / TASK_FILE
    try:
        content = read_json(path)
        if not isinstance(content, Mapping) or content.get("format") != FORMAT_VERSION:
            version = content.get("format") if isinstance(content, Mapping) else None
            raise CheckpointError(f"{path} has format {version!r}; this version reads {FORMAT_VERSION}")
        return TypeAdapter(AnyTask).validate_python(content.get("task"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} does not describe a task ({reason}); copy the folder again") from None


def rank_of(path: Path) -> Rank:
    """Ranking rule of a run, weight folder or export; `match` if not recorded."""
    options = task_of(model_folder(path) or path)
    return options.resolved_rank if isinstance(options, RetrievalOptions) else "match"


def make_task(
    options: TaskOptions,
    config: XFMConfig,
    tokenizer: CaptionTokenizer | None,
    images: Path = Path(),
    *,
    official_pictures: bool = False,
) -> Task[Any, Any, Any, Any]:
    """Create the task of completed options."""
    return TASKS[options.kind](options, config, tokenizer, images=images, official_pictures=official_pictures)
