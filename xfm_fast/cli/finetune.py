"""`xfm-fast finetune`, `evaluate` and `predict`: the paper's tasks, and custom ones."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from xfm_fast.cli.console import first_process, named_progress, note, progress, stdout, table
from xfm_fast.cli.options import UNFINISHED, Flat, Json
from xfm_fast.errors import ConfigError, InputError
from xfm_fast.export.request import RuntimeChoice

if TYPE_CHECKING:
    from xfm_fast.finetuning.prediction import Predictor

_BATCH = 32  # requests per batch


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate.

    Attributes:
        recipe: Recipe with the task, data and sizes. [the run's]
        split: One of its data.splits. [all]
        out: Folder of the results. [RUN/evaluation, or runs/evaluate_RECIPE]
    """

    recipe: str | None = None
    split: str | None = None
    out: Path | None = None


@dataclass(frozen=True)
class PredictOptions:
    """Where requests come from, and how they are answered.

    Attributes:
        lines: JSON lines to answer, each with "image" and "text", or lists of them. A FILE after it
            receives the answers, one per line, and an interrupted command resumes. [answers go to
            standard output]
        heatmap: PNG of where a FILE shows what a TEXT describes: gradient times attention of the
            fusion encoder.
        detections: JSON of boxes by image; with --heatmap, the box with most heat is the answer.
        device: Device to run on. [a GPU if there is one; for an export that of its runtime]
        dtype: Dtype of the weights; or int8 (CPU) or fp8 (GPU) for the linear layers. [fp32, or
            that of the export]
        runtime: Library that runs the graphs of an export. Packages are code that runs when it is
            loaded: name their runtime, for packages that you trust.
    """

    lines: Path | None = None
    heatmap: Path | None = None
    detections: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16", "fp16", "int8", "fp8"] | None = None
    runtime: RuntimeChoice = "auto"


def finetune(recipe: str, /, *overrides: str) -> int:
    """Fine-tune a model for a task from a recipe, and evaluate it; an interrupted run resumes.

    On several GPUs: torchrun --nproc-per-node=8 -m xfm_fast.cli finetune RECIPE. SIGTERM or Ctrl-C
    ends the run after the current step, with a checkpoint and exit code 75.

    Args:
        recipe: Name of a packaged recipe, path of a YAML file, or an official configuration.
        overrides: key=value, such as init.checkpoint=xfm_1b3.th data.root=/data batch_size=16.
    """
    from xfm_fast.finetuning.recipe import load_finetune_recipe

    loaded = load_finetune_recipe(recipe, overrides)
    from xfm_fast.finetuning.run import finetune as run
    from xfm_fast.kernels.cpu.workspace import keep_freed_memory

    keep_freed_memory()
    with named_progress() as show:
        result = run(loaded, show=show)
    if result.interrupted:
        note(f"stopped after step {result.step}; the same command resumes")
        return UNFINISHED
    _print(result.metrics)
    _say(f"saved: {result.folder}; try it: xfm-fast predict {loaded.checkpoint.folder} ...")
    return 0


def evaluate(
    model: Annotated[str, Parameter(name="MODEL")],
    /,
    *overrides: str,
    options: Flat[EvaluateOptions] = EvaluateOptions(),
    as_json: Json = False,
) -> int:
    """Evaluate a run, or a checkpoint with a recipe, and write the benchmark's own result file.

    Works under torchrun too, with the same result on any number of processes. An interrupted
    evaluation resumes.

    Args:
        model: A run, a folder of weights, a name on the Hugging Face Hub, or an official
            checkpoint.
        overrides: key=value for the recipe, such as data.root=/data.
    """
    from xfm_fast.finetuning.recipe import load_finetune_recipe
    from xfm_fast.finetuning.run import evaluate as run
    from xfm_fast.finetuning.run import recipe_of

    # No checkpoint is selected, so the validation split is optional.
    settings = [*overrides, "choose=null"]
    if options.recipe is None:
        recipe = recipe_of(Path(model), settings)
        out = options.out or Path(model) / "evaluation"
    else:
        settings.append(f"init.checkpoint={json.dumps(model)}")
        recipe = load_finetune_recipe(options.recipe, settings)
        out = options.out or Path("runs") / f"evaluate_{Path(options.recipe).stem}"
    splits = [*recipe.data.splits] if options.split is None else [options.split]
    if not splits:
        raise ConfigError("the recipe has no split to evaluate on; add data.splits.test=<file>")
    with named_progress() as show:
        metrics = {split: run(recipe, model, split, out / split, show=show) for split in splits}
    if as_json:
        _say(json.dumps(metrics))
    else:
        _print(metrics)
        _say(f"saved: {out}")
    return 0


def predict(
    model: Annotated[str, Parameter(name="MODEL")],
    /,
    *items: Annotated[str, Parameter(name="FILE|TEXT")],
    options: Flat[PredictOptions] = PredictOptions(),
) -> int:
    """Predict for image files and texts: a caption, an answer, a box, a class or a score, as JSON lines.

    Under torchrun the processes share the requests of --lines.

    Args:
        model: A run, a folder of its weights or its name on the Hugging Face Hub, or an export of
            either.
        items: Image files, folders of images, and texts: an argument that is neither a file nor a
            folder is a text.
    """
    from xfm_fast.export.manifest import MANIFEST_FILE
    from xfm_fast.finetuning.prediction import answer_lines, load, requests_in
    from xfm_fast.models.xfm import PRECISIONS
    from xfm_fast.tasks.evaluation import Evaluation
    from xfm_fast.training.distributed import join_processes

    if options.detections is not None and options.heatmap is None:
        raise InputError("--detections needs a heatmap; add --heatmap FILE")
    if len(items) > 1 if options.lines else not items:
        raise InputError(
            "give image files and texts, or --lines with files of requests and answers"
        )
    is_export = Path(model, MANIFEST_FILE).is_file()
    if is_export and options.dtype is not None:
        raise InputError(f"{model} is an export, of one dtype; leave out --dtype {options.dtype}")
    with join_processes(options.device) as processes:
        device = None if is_export and options.device == "auto" else processes.device
        dtype = PRECISIONS[options.dtype or "fp32"]
        predictor = load(model, device=device, dtype=dtype, runtime=options.runtime)
        if options.lines is None:
            # Too few requests to share.
            return _predict(predictor, items, options) if processes.first else 0
        if not items:
            if processes.first:
                _print_answers(predictor, requests_in(predictor.task, options.lines))
            return 0
        out = Path(items[0])
        with progress("answering") as advance:
            shards = out.with_name(f".{out.name}.parts")
            work = Evaluation(shards, processes, _BATCH, progress=advance)
            answer_lines(predictor, options.lines, out, work)
    _say(f"saved: {out}")
    return 0


def _predict(predictor: Predictor, items: Sequence[str], options: PredictOptions) -> int:
    from xfm_fast.data.tables import find_images

    files = [Path(item) for item in items if Path(item).exists()]
    paths = [image for file in files for image in (find_images(file) if file.is_dir() else [file])]
    texts = [item for item in items if not Path(item).exists()]
    if options.heatmap is not None:
        images = list(map(str, paths))
        return _heatmap(predictor, images, texts, options.heatmap, options.detections)
    _print_answers(predictor, predictor.task.requests(paths, texts))
    return 0


def _print_answers(predictor: Predictor, records: Sequence[Any]) -> None:
    for start in range(0, len(records), _BATCH):
        for row in predictor.answer(records[start : start + _BATCH]):
            print(json.dumps(row, ensure_ascii=False), flush=True)


def _heatmap(
    predictor: Predictor,
    images: Sequence[str],
    texts: Sequence[str],
    path: Path,
    detections: Path | None,
) -> int:
    """Draw the heatmap of one text on one image, and print the detection that it selects."""
    from xfm_fast.data.images import decode_image
    from xfm_fast.io import write_bytes
    from xfm_fast.tasks.weak_grounding import best_box, boxes_of, overlay, read_detections

    if len(images) != 1 or len(texts) != 1:
        raise InputError(
            f"--heatmap shows one text on one image; {len(images)} images and {len(texts)} texts are given"
        )
    boxes = None if detections is None else boxes_of(images[0], read_detections(detections))
    heat = predictor.heatmap(images[0], texts[0])
    picture, content = decode_image(images[0]), io.BytesIO()
    overlay(picture, heat).save(content, format="PNG")
    write_bytes({path: content.getvalue()})
    if boxes is not None:
        print(json.dumps({"bbox": boxes[best_box(heat, boxes, picture.size)].tolist()}))
    print(f"saved: {path}", file=sys.stderr)
    return 0


def _print(metrics: Mapping[str, Mapping[str, float]]) -> None:
    # The metrics `RULE/NAME` of a split get their own column.
    columns: dict[str, dict[str, float]] = {}
    for split, of_split in metrics.items():
        for name, value in of_split.items():
            rule, slash, short = name.rpartition("/")
            columns.setdefault(f"{split}{slash}{rule}", {})[short] = value
    names = [*dict.fromkeys(name for column in columns.values() for name in column)]
    if not names:
        # No data to evaluate on, or no ground truth in it.
        return
    grid = table("", "metric", *columns, right=tuple(columns))
    for name in names:
        cells = (f"{column[name]:.2f}" if name in column else "" for column in columns.values())
        grid.add_row(name, *cells)
    if first_process():
        stdout().print(grid)


def _say(message: str) -> None:
    if first_process():
        print(message)
