"""`xfm-fast pretrain` and `reproduce`: training, and the paper's experiments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from xfm_fast.cli.console import note
from xfm_fast.cli.options import TRAIN, UNFINISHED, Flat, command_group

if TYPE_CHECKING:
    from xfm_fast.reproduce.ablations import Study

reproduce = command_group("reproduce", group=TRAIN, help="Reproduce the paper's experiments in miniature.")


@dataclass(frozen=True)
class AblationOptions:
    """The size of an ablation study.

    Attributes:
        seeds: Runs of each variant; intervals need at least 2.
        variants: full, no-stop-gradient, no-mim-guidance, neither, joined by commas; or all.
        minutes: Start no run after this many minutes. [no limit]
        out: Folder of the study; finished runs in it are reused.
    """

    seeds: Annotated[int, Ge(1)] = 3
    variants: tuple[str, ...] = ("all",)
    minutes: Annotated[float | None, Ge(0)] = None
    out: Path = Path("runs/ablations")


def pretrain(recipe: str, /, *overrides: str) -> int:
    """Train a model from a recipe; an interrupted run resumes from its newest complete checkpoint.

    On several GPUs: torchrun --nproc-per-node=8 -m xfm_fast.cli pretrain RECIPE. SIGTERM or Ctrl-C ends the run after
    the current step, with a checkpoint and exit code 75.

    Args:
        recipe: Name of a packaged recipe, or path of a YAML file.
        overrides: key=value, such as steps=100 streams.pairs.batch_size=32.
    """
    from xfm_fast.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from xfm_fast.kernels.cpu.workspace import keep_freed_memory
    from xfm_fast.training.loop import train

    keep_freed_memory()
    result = train(loaded)
    if result.interrupted:
        note(f"stopped after step {result.step}; the same command resumes")
        return UNFINISHED
    return 0


@reproduce.command
def ablations(*, options: Flat[AblationOptions] = AblationOptions()) -> int:
    """Train tiny models on the shapes world with and without stop-gradient and MIM guidance, and compare them.

    Reports linear probes, zero-shot retrieval and grounding on held-out combinations, with intervals over seeds, and
    writes ablations.md and .json. An interrupted study resumes, and finished runs are not repeated.
    """
    from xfm_fast.reproduce.ablations import VARIANTS, markdown, run_ablations, save

    def keep(study: Study) -> None:
        if study.runs:
            save(study, options.out)
            note(f"{len(study.runs)} runs finished, {len(study.missing)} to go")

    variants = [*VARIANTS] if options.variants == ("all",) else options.variants
    study = run_ablations(options.out, seeds=options.seeds, variants=variants, minutes=options.minutes, on_change=keep)
    if study.runs:
        print(markdown(study))
        print("saved: " + ", ".join(str(path) for path in save(study, options.out)))
    if study.missing:
        note(f"{len(study.missing)} runs are missing; the same command resumes")
        return UNFINISHED
    return 0


@dataclass(frozen=True)
class DownstreamOptions:
    """The size of a study of the downstream tasks.

    Attributes:
        seeds: Runs of each task.
        jobs: Runs at a time. [one a core]
        out: Folder of the study; finished runs in it are reused.
    """

    seeds: Annotated[int, Ge(1)] = 1
    jobs: Annotated[int | None, Ge(1)] = None
    out: Path = Path("runs/downstream")


@reproduce.command
def downstream(*overrides: str, options: Flat[DownstreamOptions] = DownstreamOptions()) -> int:
    """Pretrain a tiny model on the shapes world and fine-tune it for every task of the paper.

    Reports the metric of each task on new scenes, with combinations of colour and shape from training and with held-out
    ones, next to a baseline without images. Finished runs are reused.

    Args:
        overrides: key=value for the pretraining recipe, in place of the study's.
    """
    from xfm_fast.reproduce.downstream import OVERRIDES, Table, markdown, run_downstream, save

    def keep(table: Table) -> None:
        save(table, options.out)
        note(f"{len(table.missing)} runs to go")

    told = overrides or OVERRIDES
    result = run_downstream(options.out, seeds=options.seeds, jobs=options.jobs, pretraining=told, on_change=keep)
    print(markdown(result))
    print("saved: " + ", ".join(str(path) for path in save(result, options.out)))
    return 0
