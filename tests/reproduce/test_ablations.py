"""The study: what each variant changes, what is kept, what is repeated, and what the report dares to say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xfm_fast.errors import ConfigError, DataError, InputError
from xfm_fast.reproduce import ablations
from xfm_fast.reproduce.ablations import (
    RESULT_FILE,
    VARIANTS,
    Run,
    Study,
    mean_interval,
    paired_difference,
    run_ablations,
)
from xfm_fast.reproduce.evaluation import METRICS

SMALL = (
    "shapes={seed: 0, train: 60, val: 2, test: 2}",
    "steps=2",
    "streams.pairs.batch_size=4",
    "streams.regions.batch_size=4",
    "streams.regions.max_images=2",
    "streams.text.batch_size=4",
    "log.every=1",
)


def _fake_metrics(variant: str, seed: int) -> dict[str, float]:
    bonus = {"full": 5.0, "no-stop-gradient": 0.0, "no-mim-guidance": 5.0 + (seed - 1), "neither": 4.0}[variant]
    return dict.fromkeys(METRICS, 60 + 3.0 * seed + bonus)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Replaces training and evaluation; returns the runs in the order in which they were made."""
    made: list[tuple[str, int]] = []

    def pretend(variant: str, seed: int, recipe: Any) -> Run:
        made.append((variant, seed))
        run = Run(variant, seed, _fake_metrics(variant, seed), {"steps": 2.0, "seconds": 1.0, "cpu_seconds": 60.0})
        folder = Path(recipe.checkpoint.folder)
        folder.mkdir(parents=True)
        content = {"metrics": run.metrics, "cost": run.cost, "recipe": ablations._identity(recipe)}
        (folder / RESULT_FILE).write_text(json.dumps(content))
        return run

    monkeypatch.setattr(ablations, "_train", pretend)
    return made


def test_seeds_come_one_after_the_other(trained: list[tuple[str, int]], tmp_path: Path) -> None:
    study = run_ablations(tmp_path, seeds=2)
    assert trained == [(variant, seed) for seed in range(2) for variant in VARIANTS]
    assert study.missing == ()
    assert study.values("full", "grounding") == {0: 65.0, 1: 68.0}


def test_finished_runs_are_not_repeated(trained: list[tuple[str, int]], tmp_path: Path) -> None:
    first = run_ablations(tmp_path, seeds=1, variants=["full"])
    again = run_ablations(tmp_path, seeds=2, variants=["neither", "full"])
    assert trained == [("full", 0), ("neither", 0), ("full", 1), ("neither", 1)]
    assert again.runs[0] == first.runs[0]


def test_time_is_up(trained: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(ablations.time, "monotonic", lambda: float(next(clock)))
    study = run_ablations(tmp_path, seeds=3, minutes=4)
    assert trained == [("full", 0), ("no-stop-gradient", 0)]
    assert len(study.missing) == 10


def test_a_stopped_run_leaves_the_others(
    trained: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend = ablations._train
    monkeypatch.setattr(ablations, "_train", lambda v, s, r: None if v == "no-mim-guidance" else pretend(v, s, r))
    seen: list[int] = []
    study = run_ablations(tmp_path, on_change=lambda study: seen.append(len(study.runs)))
    assert [run.variant for run in study.runs] == ["full", "no-stop-gradient"]
    assert seen == [0, 1, 2]
    assert ("no-mim-guidance", 0) in study.missing
    assert any("not finished" in line and "without MIM guidance seed 0" in line for line in ablations.findings(study))


def test_runs_of_another_recipe_are_refused(trained: list[tuple[str, int]], tmp_path: Path) -> None:
    run_ablations(tmp_path, seeds=1, variants=["full"])
    with pytest.raises(DataError, match="steps"):
        run_ablations(tmp_path, seeds=1, variants=["full"], overrides=["steps=3"])
    # Where a run lies and how often it logs changes no result.
    run_ablations(tmp_path, seeds=1, variants=["full"], overrides=["log.every=7", "checkpoint.every=9"])
    assert len(trained) == 1


def test_a_damaged_result_is_named(trained: list[tuple[str, int]], tmp_path: Path) -> None:
    run_ablations(tmp_path, seeds=1, variants=["full"])
    (tmp_path / "full" / "seed-0" / RESULT_FILE).write_text("{")
    with pytest.raises(DataError, match="delete"):
        run_ablations(tmp_path, seeds=1, variants=["full"])


def test_impossible_studies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="half"):
        run_ablations(tmp_path, variants=["half"])
    with pytest.raises(ConfigError, match="seeds=0"):
        run_ablations(tmp_path, seeds=0)
    with pytest.raises(ConfigError, match="shapes"):
        run_ablations(tmp_path, recipe="pretrain_base_4m")


def test_variants_change_the_method_and_nothing_else(tmp_path: Path) -> None:
    dumps = {
        variant: ablations._recipe(tmp_path, variant, 1, ablations.RECIPE, ()).model_dump() for variant in VARIANTS
    }
    methods = {variant: dump.pop("method") for variant, dump in dumps.items()}
    for dump in dumps.values():
        dump["checkpoint"].pop("folder")
    assert all(dump == dumps["full"] for dump in dumps.values())
    switches = {variant: (method["stop_gradient"], method["mim_guidance"]) for variant, method in methods.items()}
    assert switches == {
        "full": (True, True),
        "no-stop-gradient": (False, True),
        "no-mim-guidance": (True, False),
        "neither": (False, False),
    }


def _study(seeds: int = 3, variants: tuple[str, ...] = tuple(VARIANTS)) -> Study:
    cost = {"steps": 2.0, "seconds": 1.0, "cpu_seconds": 90.0}
    runs = [Run(v, seed, _fake_metrics(v, seed), cost) for seed in range(seeds) for v in variants]
    return Study(tuple(runs), (), "some-recipe")


def test_only_differences_beyond_noise_are_claimed() -> None:
    lines = ablations.findings(_study())
    claimed = [line for line in lines if "lower than" in line or "higher than" in line]
    # Without stop-gradient every seed loses exactly 5 points; without MIM guidance the mean is the same.
    assert sum(line.startswith("without stop-gradient") for line in claimed) == len(METRICS)
    assert not any(line.startswith("without MIM guidance") for line in claimed)
    assert any(line.startswith("without MIM guidance") and "3 seeds" in line for line in lines)
    assert any("by chance alone" in line for line in lines)


def test_one_seed_claims_nothing() -> None:
    lines = ablations.findings(_study(seeds=1))
    assert not any("lower than" in line or "higher than" in line for line in lines)
    assert any("one seed" in line for line in lines)
    assert "±" not in ablations.markdown(_study(seeds=1)).split("|", 1)[1].split("\n\n")[0]


def test_targets_are_judged() -> None:
    lines = ablations.findings(_study())
    assert sum("target 60% reached" in line for line in lines) == 3
    low = Study(tuple(Run(r.variant, r.seed, dict.fromkeys(METRICS, 10.0), r.cost) for r in _study().runs), (), "x")
    assert sum("target 60% MISSED" in line for line in ablations.findings(low)) == 3


def test_the_files(tmp_path: Path) -> None:
    paths = ablations.save(_study(), tmp_path)
    assert [path.name for path in paths] == ["ablations.md", "ablations.json"]
    content = json.loads(paths[1].read_text())
    assert content["summary"]["full"]["grounding"]["mean"] == pytest.approx(68)
    assert content["minus_full"]["no-stop-gradient"]["grounding"] == {"mean": -5, "half": 0, "seeds": 3}
    assert len(content["runs"]) == 12
    page = paths[0].read_text()
    assert "| without both | 3 |" in page
    assert ablations.LIMITS in page


@pytest.mark.slow
def test_a_real_study_trains_evaluates_and_reports(tmp_path: Path) -> None:
    """Two steps of two variants, for real: files, metrics, and nothing repeated the second time."""
    study = run_ablations(tmp_path, seeds=1, variants=["full", "neither"], overrides=SMALL)
    assert [run.variant for run in study.runs] == ["full", "neither"]
    for run in study.runs:
        assert set(METRICS) <= set(run.metrics)
        assert run.cost["steps"] == 2
    ablations.save(study, tmp_path)
    before = (tmp_path / "full" / "seed-0" / RESULT_FILE).read_bytes()
    assert run_ablations(tmp_path, seeds=1, variants=["full", "neither"], overrides=SMALL).runs == study.runs
    assert (tmp_path / "full" / "seed-0" / RESULT_FILE).read_bytes() == before


def test_the_textbook_example() -> None:
    """Three values around 10 with standard deviation 1: t(0.975, 2) = 4.3027, so 10 ± 4.3027/√3."""
    interval = mean_interval([9, 10, 11])
    assert interval.mean == 10
    assert interval.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert not interval.excludes_zero or interval.low > 0


def test_intervals_hold_the_true_mean_as_often_as_they_say() -> None:
    draws = np.random.default_rng(0).normal(5, 2, size=(2000, 3))
    held = [interval.low <= 5 <= interval.high for interval in (mean_interval([*row]) for row in draws)]
    assert 0.935 < sum(held) / len(held) < 0.965


def test_one_value_says_nothing() -> None:
    interval = mean_interval([3.0])
    assert interval.half == math.inf
    assert not interval.excludes_zero


def test_pairs_cancel_what_they_share() -> None:
    shared = [10.0, 40.0, 90.0]
    a, b = [value + bonus for value, bonus in zip(shared, (5.1, 5.0, 4.9), strict=True)], shared
    assert paired_difference(a, b).excludes_zero
    assert paired_difference(b, a).mean == pytest.approx(-5)
    assert mean_interval(a).low < mean_interval(b).mean


def test_a_difference_within_noise_includes_zero() -> None:
    assert not paired_difference([1.0, 2, 3], [2.0, 2, 2]).excludes_zero


def test_impossible_intervals_are_refused() -> None:
    with pytest.raises(InputError):
        mean_interval([])
    with pytest.raises(InputError):
        mean_interval([1.0, 2.0], confidence=1)
    with pytest.raises(InputError, match=r"2 .* 1 "):
        paired_difference([1.0, 2.0], [1.0])
