"""`xfm-fast pretrain` and `reproduce`: training, and the paper's experiments."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from xfm_fast.cli.console import first_process, named_progress, note
from xfm_fast.cli.options import UNFINISHED


def pretrain(recipe: str, /, *overrides: str) -> int:
    """Train a model from a recipe; an interrupted run resumes from its newest complete checkpoint.

    On several GPUs: torchrun --nproc-per-node=8 -m xfm_fast.cli pretrain RECIPE. SIGTERM or Ctrl-C
    ends the run after the current step, with a checkpoint and exit code 75.

    Args:
        recipe: Name of a packaged recipe, or path of a YAML file.
        overrides: key=value, such as steps=100 streams.pairs.batch_size=32.
    """
    from xfm_fast.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from xfm_fast.kernels.cpu.workspace import keep_freed_memory
    from xfm_fast.training.loop import train

    keep_freed_memory()
    with named_progress() as show:
        result = train(loaded, show=show)
    if result.interrupted:
        note(f"stopped after step {result.step}; the same command resumes")
        return UNFINISHED
    if first_process():
        losses = [
            f"{name.removeprefix('loss/')} {value:.4g}"
            for name, value in result.metrics.items()
            if name.startswith("loss/")
        ]
        if losses:
            print(f"step {result.step}", *losses, sep="  ")
        folder, recipe = shlex.quote(loaded.checkpoint.folder), "RECIPE"
        if Path(loaded.data).is_file():
            recipe = f"retrieval_csv data.train={shlex.quote(loaded.data)}"
        command = f"xfm-fast finetune {recipe} init.checkpoint={folder}"
        print(f"saved: {folder}/model; fine-tune it: {command}")
    return 0


def reproduce(
    study: Literal["downstream", "claims"],
    /,
    *overrides: str,
    seeds: Annotated[int | None, Ge(1)] = None,
    out: Path | None = None,
) -> int:
    """Reproduce the paper's experiments in miniature, on generated scenes; writes a page and a JSON.

    An interrupted study resumes, and finished runs are not repeated.

    Args:
        study: downstream fine-tunes a tiny model for every task; claims trains with and without
            stop-gradient and MIM guidance, and measures what the language encoder forgets and what
            image features contain.
        overrides: key=value for the pretraining recipe.
        seeds: Runs of each experiment. [downstream 1, claims 5]
        out: Folder of the study; finished runs in it are reused. [runs/STUDY]
    """
    from xfm_fast.io import write_bytes
    from xfm_fast.reproduce import claims, tasks

    out = out or Path("runs", study)
    module: Any = claims if study == "claims" else tasks

    page, document = out / f"{module.STEM}.md", out / f"{module.STEM}.json"

    def keep(results: dict[str, Any]) -> None:
        note(f"{len(results['missing'])} runs to go")
        content = json.dumps(results, indent=1) + "\n"
        write_bytes({page: module.markdown(results).encode(), document: content.encode()})

    if study == "claims":
        results = claims.run_claims(out, seeds=seeds or 5, overrides=overrides, on_change=keep)
    else:
        overrides = overrides or tasks.OVERRIDES
        results = tasks.run_tasks(out, seeds=seeds or 1, overrides=overrides, on_change=keep)
    print(module.markdown(results))
    keep(results)
    print(f"saved: {page}, {document}")
    return UNFINISHED if results["missing"] else 0
