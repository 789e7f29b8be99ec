"""Ablations of stop-gradient and MIM guidance, over seeds.

Every run has its own folder with `result.json`, so that an interrupted or extended study trains only missing runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfm_fast.checkpoint.files import write_bytes
from xfm_fast.documents import read_json
from xfm_fast.errors import ConfigError, DataError
from xfm_fast.models.hub import TOKENIZER_FILE
from xfm_fast.reproduce.evaluation import HeldOut, evaluate
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.loop import train
from xfm_fast.training.recipe import Recipe, load_recipe

RECIPE = "pretrain_tiny_shapes"
RESULT_FILE = "result.json"
VARIANTS: dict[str, tuple[str, ...]] = {
    "full": (),
    "no-stop-gradient": ("method.stop_gradient=false",),
    "no-mim-guidance": ("method.mim_guidance=false",),
    "neither": ("method.stop_gradient=false", "method.mim_guidance=false"),
}
"""The changes of each variant to the recipe."""
TITLES = {
    "full": "full method",
    "no-stop-gradient": "without stop-gradient",
    "no-mim-guidance": "without MIM guidance",
    "neither": "without both",
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        variant: key of `VARIANTS`.
        seed: of the initial weights and the data order.
        metrics: percent, see `evaluation.evaluate`.
        cost: `steps`; `seconds` and `cpu_seconds` since the start or last resumption, evaluation included.
    """

    variant: str
    seed: int
    metrics: dict[str, float]
    cost: dict[str, float]


@dataclass(frozen=True)
class Study:
    """Finished and missing runs."""

    runs: tuple[Run, ...]
    missing: tuple[tuple[str, int], ...]
    recipe: str

    def values(self, variant: str, metric: str) -> dict[int, float]:
        """A metric of a variant by seed."""
        return {run.seed: run.metrics[metric] for run in self.runs if run.variant == variant}

    @property
    def variants(self) -> list[str]:
        """Variants with a finished run, in the order of `VARIANTS`."""
        return [variant for variant in VARIANTS if any(run.variant == variant for run in self.runs)]


def run_ablations(
    out: Path,
    *,
    seeds: int = 3,
    variants: Sequence[str] = tuple(VARIANTS),
    minutes: float | None = None,
    recipe: str | Path = RECIPE,
    overrides: Iterable[str] = (),
    on_change: Callable[[Study], None] | None = None,
) -> Study:
    """Train and evaluate every variant with every seed, seed by seed.

    `minutes` limits when the last run starts; `on_change` receives the study at the start and after every run. Folders
    of another recipe raise `DataError`.
    """
    if seeds < 1 or not variants:
        raise ConfigError(f"seeds={seeds} of {len(variants)} variants; at least one of each is needed")
    if unknown := [variant for variant in variants if variant not in VARIANTS]:
        raise ConfigError(f"variant {', '.join(unknown)} is unknown; choose from {', '.join(VARIANTS)}")
    chosen = [variant for variant in VARIANTS if variant in variants]
    plan = {
        (variant, seed): _recipe(out, variant, seed, recipe, tuple(overrides))
        for seed in range(seeds)
        for variant in chosen
    }
    finished = {key: run for key, one in plan.items() if (run := _read(*key, one)) is not None}
    begun = time.monotonic()

    def study() -> Study:
        missing = tuple(key for key in plan if key not in finished)
        return Study(tuple(finished[key] for key in plan if key in finished), missing, str(recipe))

    if on_change is not None:
        on_change(study())
    for key, one in plan.items():
        if key in finished:
            continue
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            break
        run = _train(*key, one)
        if run is None:
            break
        finished[key] = run
        if on_change is not None:
            on_change(study())
    return study()


def _recipe(out: Path, variant: str, seed: int, recipe: str | Path, overrides: tuple[str, ...]) -> Recipe:
    # A seed gives all its variants the same initial weights and the same batches; the world is that of all runs.
    own = (f"seed={seed}", f"data={out / 'world'}", f"checkpoint.folder={out / variant / f'seed-{seed}'}")
    made = load_recipe(recipe, (*overrides, *VARIANTS[variant], *own))
    if made.shapes is None:
        raise ConfigError(f"recipe {recipe} has no shapes world; the ablations are evaluated on its held-out scenes")
    return made


def _train(variant: str, seed: int, recipe: Recipe) -> Run | None:
    """Train and evaluate a run, from its newest checkpoint; None if a signal stopped it."""
    assert recipe.shapes is not None
    clocks = time.perf_counter(), time.process_time()
    trained = train(recipe)
    if trained.interrupted:
        return None
    folder = Path(recipe.checkpoint.folder)
    tokenizer = CaptionTokenizer.from_files(
        folder / TOKENIZER_FILE if recipe.tokenizer == "train" else Path(recipe.tokenizer)
    )
    held_out = HeldOut(recipe.shapes.seed, recipe.shapes.resolution)
    metrics = evaluate(trained.model, tokenizer, held_out)
    cost = {
        "steps": float(trained.step),
        "seconds": time.perf_counter() - clocks[0],
        "cpu_seconds": time.process_time() - clocks[1],
    }
    run = Run(variant, seed, metrics, cost)
    content = {"variant": variant, "seed": seed, "metrics": metrics, "cost": cost, "recipe": _identity(recipe)}
    data = (json.dumps(content, indent=1) + "\n").encode()
    write_bytes({folder / RESULT_FILE: data})
    return run


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Recipe fields that a result depends on: no paths, logging or loading."""
    described = recipe.model_dump(mode="json")
    return {name: value for name, value in described.items() if name not in ("data", "checkpoint", "log", "workers")}


def _read(variant: str, seed: int, recipe: Recipe) -> Run | None:
    path = Path(recipe.checkpoint.folder) / RESULT_FILE
    try:
        content = read_json(path)
        run = Run(variant, seed, dict(content["metrics"]), dict(content["cost"]))
        described = content["recipe"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it, and the run is evaluated again") from None
    wanted = _identity(recipe)
    if described != wanted:
        differing = sorted(name for name in wanted if described.get(name) != wanted[name])
        raise DataError(
            f"{path} comes from a recipe with other {', '.join(differing)}; choose another folder for this study, or "
            "delete the run"
        )
    return run
