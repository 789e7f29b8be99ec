"""The loop: updates, accumulation, precision, what it leaves behind; and the official trajectory, run by it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.agreement import with_weights
from tests.conftest import CASES, config, load_json
from tests.objectives.steps import image_batch, negatives_of, pair_batch, region_batch, text_batch
from tests.training.small_runs import Joined, Noise, numbers, run, small_recipe, without_dropout
from xfm_fast.batches import Batch, PairBatch, RegionBatch
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.training import loop
from xfm_fast.training.checkpoints import newest
from xfm_fast.training.optimizer import schedule_factor
from xfm_fast.training.recipe import Recipe

OFFICIAL_NAME = {
    "itc": "loss_itc", "itm": "loss_itm", "imlm": "loss_mlm", "mim": "loss_mim", "mlm": "loss_mlm",
    "bbox_l1": "loss_bbox", "bbox_giou": "loss_giou",
}  # fmt: skip


def official_losses(case: str, model: XFM, batch: Batch, **options: Any) -> dict[str, Tensor]:
    """The losses of a golden batch with the negatives that the official code drew."""
    negatives = negatives_of(case, batch) if isinstance(batch, PairBatch | RegionBatch) else None
    return pretraining_losses(model, batch, hard_negatives=negatives, **options)


class Same(list[Any]):
    """The same batch for ever."""

    def batch(self, number: int) -> Any:
        return self[0]


@pytest.mark.parametrize("zero_grad", ["none", "zeros"])
@pytest.mark.parametrize("case", CASES)
def test_the_loop_runs_the_official_trajectory(
    case: str, zero_grad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of three updates on an official tiny model in fp64: losses, gradient norms, final weights."""
    golden = load_json(f"{case}/train_trajectory")
    official = golden["zero_grad_set_to_none" if zero_grad == "none" else "zero_grad_to_zeros"]
    still = config(case, hidden_dropout=0.0, attention_dropout=0.0, drop_path_rate=0.0)
    model = with_weights(XFM(still), case, torch.float64)
    sources = {
        "text": Same([text_batch(case)]),
        "regions": Same([region_batch(case)]),
        "images": Same([image_batch(case)]),
        "pairs": Same([pair_batch(case)]),
    }
    monkeypatch.setattr(
        loop,
        "pretraining_losses",
        lambda *given, **options: official_losses(case, *given, **options),
    )
    # The official run began with the second learning rate, for the first is 0.
    monkeypatch.setattr(
        loop,
        "schedule_factor",
        lambda schedule, step, *, steps, lr: schedule_factor(schedule, step + 1, steps=8, lr=lr),
    )
    recipe = small_recipe(
        tmp_path,
        model=still,
        steps=2,
        optimizer={"lr": 1e-3, "zero_grad": zero_grad},
        schedule={"warmup": 2},
    )
    run(recipe, sources=sources, model=model)

    expected = iter(official["steps"])
    for line in numbers(tmp_path):
        for streams in (["text"], ["regions", "images"], ["pairs"]):
            step = next(expected)
            assert line["lr"] == pytest.approx(step["lr"], rel=1e-12)
            assert line[f"grad_norm/{'+'.join(streams)}"] == pytest.approx(
                step["grad_norm_before_clip"], rel=1e-8
            )
            for stream in streams:
                losses = step["losses"].get(
                    {"regions": "region", "images": "imagenet"}.get(stream), step["losses"]
                )
                for name, value in line.items():
                    if name.startswith(f"loss/{stream}/"):
                        assert value == pytest.approx(
                            losses[OFFICIAL_NAME[name.split("/")[2]]], rel=1e-8
                        ), name
    assert next(expected, None) is None
    for name, parameter in model.named_parameters():
        assert parameter.detach().norm().item() == pytest.approx(
            official["param_norm_after"][name], rel=1e-8
        ), name


def means_only(folder: Path, **changes: Any) -> Recipe:
    """Losses that are means over the items of a batch: the mean over micro-batches is that of the whole batch."""
    recipe = small_recipe(folder, model=without_dropout())
    streams = {name: stream.model_dump() for name, stream in recipe.streams.items()}
    del streams["regions"]
    streams["pairs"]["losses"] = ["imlm", "mim"]
    settings: dict[str, Any] = {
        "streams": streams,
        "updates": [["text"], ["images", "pairs"]],
        "steps": 3,
    }
    return small_recipe(folder, **({"model": without_dropout()} | settings | changes))


def test_accumulation_is_exact(tmp_path: Path) -> None:
    """Two micro-batches give the step that one batch of both gives."""
    split = means_only(tmp_path / "split", accumulate=2)
    whole = means_only(tmp_path / "whole")
    models = {}
    for name, recipe in (("split", split), ("whole", whole)):
        torch.manual_seed(0)
        models[name] = XFM(recipe.model).double()
    halves = {
        name: Noise(s.kind, split.model, s.batch_size // 2) for name, s in split.streams.items()
    }

    run(
        split,
        model=models["split"],
        sources={name: Wide(source) for name, source in halves.items()},
    )
    run(
        whole,
        model=models["whole"],
        sources={name: Wide(Joined([half], per=2)) for name, half in halves.items()},
    )
    for (name, a), b in zip(
        models["split"].named_parameters(), models["whole"].parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = numbers(tmp_path / "split"), numbers(tmp_path / "whole")
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


class Wide:
    """Batches in double precision."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, number: int) -> Any:
        batch = self.source.batch(number)
        values = {f.name: getattr(batch, f.name) for f in fields(batch)}
        wide = {
            n: v.double()
            for n, v in values.items()
            if isinstance(v, Tensor) and v.is_floating_point()
        }
        return replace(batch, **wide)


def steps_of(folder: Path) -> dict[str, int]:
    """How often the optimizer has moved one parameter of each part."""
    from safetensors.torch import load_file

    state = load_file(newest(folder / "checkpoints").path / "training.safetensors")
    names = {
        "text": "text_encoder.roberta.embeddings.LayerNorm.weight",
        "vision": "vision_encoder.fc_norm.weight",
        "temp": "temp",
        "mlm head": "text_encoder.lm_head.dense.weight",
    }
    return {part: int(state[f"optimizer/{name}/step"]) for part, name in names.items()}


def test_updates_move_what_they_reach(tmp_path: Path) -> None:
    """Three updates a step: text alone; regions and images together; pairs."""
    run(small_recipe(tmp_path / "none", steps=2))
    assert steps_of(tmp_path / "none") == {"text": 6, "vision": 4, "temp": 4, "mlm head": 2}
    run(small_recipe(tmp_path / "zeros", steps=2, optimizer={"lr": 1e-3, "zero_grad": "zeros"}))
    # Once there was a gradient, every update moves a parameter; in the first step text comes before vision.
    assert steps_of(tmp_path / "zeros") == {"text": 6, "vision": 5, "temp": 5, "mlm head": 6}


def test_weights_of_streams_multiply_their_losses(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "one", model=without_dropout(), steps=1)
    streams = {name: stream.model_dump() for name, stream in recipe.streams.items()}
    streams["text"]["weight"] = 0.25
    run(recipe)
    run(small_recipe(tmp_path / "quarter", model=without_dropout(), steps=1, streams=streams))
    (whole,), (quarter,) = numbers(tmp_path / "one"), numbers(tmp_path / "quarter")
    assert quarter["grad_norm/text"] == pytest.approx(whole["grad_norm/text"] / 4, rel=1e-5)
    assert quarter["loss/text/mlm"] == whole["loss/text/mlm"]


def test_a_stream_is_drawn_as_often_as_the_recipe_says(tmp_path: Path) -> None:
    """One update of text to four of pairs, where the run is cut too; no batch is left out or read twice."""
    streams = {name: stream.model_dump() for name, stream in small_recipe(tmp_path).streams.items()}
    for name, every in (("text", 4), ("regions", 3), ("images", 2), ("pairs", 1)):
        streams[name]["every"] = every
    drawn: dict[str, list[int]] = {name: [] for name in streams}

    class Recorded(Noise):
        def batch(self, number: int) -> Any:
            drawn[self.kind].append(number)
            return super().batch(number)

    for steps in (5, 8):
        recipe = small_recipe(tmp_path, streams=streams, steps=steps, schedule={"steps": 8})
        sources = {
            name: Recorded(s.kind, recipe.model, s.batch_size) for name, s in recipe.streams.items()
        }
        run(recipe, sources=sources)
    lines = numbers(tmp_path)
    having = {
        name: [line["step"] for line in lines if f"loss/{name}/" in " ".join(line)]
        for name in streams
    }
    assert having == {
        "text": [4, 8],
        "regions": [3, 6],
        "images": [2, 4, 6, 8],
        "pairs": [*range(1, 9)],
    }
    # The first of each is read before the first step of a run, in which not every stream is drawn.
    expected = {"text": 2, "regions": 2, "images": 4, "pairs": 8}
    assert {name: sorted({*read}) for name, read in drawn.items()} == {
        n: [*range(k)] for n, k in expected.items()
    }
    assert newest(tmp_path / "checkpoints").state["batches"] == expected
    norms = {key for key in lines[5] if key.startswith("grad_norm/") and key.count("/") == 1}
    assert norms == {"grad_norm/regions+images", "grad_norm/pairs"}


def test_the_method_reaches_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def losses(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        seen.append(options)
        return pretraining_losses(*arguments, **options)

    monkeypatch.setattr(loop, "pretraining_losses", losses)
    switched = {
        "stop_gradient": False,
        "official_itc_gradient": True,
        "official_itm_negatives": True,
    }
    run(small_recipe(tmp_path, steps=1, method=switched))
    assert all(options | switched == options for options in seen)
    assert len(seen) == 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> XFM:
    """The model of a run of 4 steps."""
    return run(small_recipe(tmp_path_factory.mktemp("plain"), steps=4)).model


@pytest.mark.parametrize(
    "change",
    [{"activation_checkpointing": True}, {"workers": 1}, {"log": {"every": 4}}],
    ids=lambda c: next(iter(c)),
)
def test_how_a_run_is_run_changes_no_number(
    tmp_path: Path, plain: XFM, change: dict[str, Any]
) -> None:
    other = run(small_recipe(tmp_path, steps=4, **change))
    for a, b in zip(plain.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fp16_leaves_out_what_overflows_and_resumes_its_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a scale that is far too large: it is halved until gradients fit, and weights rest meanwhile."""
    monkeypatch.setattr(loop, "_LARGEST_LOSS_SCALE", 2.0**22)
    updates = [["text", "regions", "images", "pairs"]]
    # Recipes refuse fp16 without a GPU, but the CPU can do it.
    whole, parts = (
        small_recipe(tmp_path / name, updates=updates, steps=16).model_copy(
            update={"precision": "fp16"}
        )
        for name in ("whole", "parts")
    )
    run(whole)
    lines = numbers(tmp_path / "whole")
    scales = [2.0**22, *(line["loss_scale"] for line in lines)]
    rested = [after < before for before, after in zip(scales, scales[1:], strict=False)]
    assert rested[0]
    assert not rested[-1]
    assert [line["update_norm/all"] == 0 for line in lines] == rested
    assert all(
        after in (before, before / 2) for before, after in zip(scales, scales[1:], strict=False)
    )
    # Losses are those of whole numbers: only their gradients were scaled.
    assert lines[0]["loss/text/mlm"] == pytest.approx(lines[-1]["loss/text/mlm"], rel=0.1)

    def stop(step: int, *_: object) -> None:
        if step == 6:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(parts, on_step=stop)
    run(parts)
    assert numbers(tmp_path / "parts") == lines


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_fp32_weights(tmp_path: Path, precision: str) -> None:
    recipe = small_recipe(tmp_path / "half", steps=3, model=without_dropout())
    result = run(recipe.model_copy(update={"precision": precision}))
    run(small_recipe(tmp_path / "fp32", steps=3, model=without_dropout()))
    assert all(parameter.dtype == torch.float32 for parameter in result.model.parameters())
    low, full = numbers(tmp_path / "half"), numbers(tmp_path / "fp32")
    assert low[0]["loss/text/mlm"] != full[0]["loss/text/mlm"]
    for name in ("loss/text/mlm", "loss/pairs/imlm", "loss/images/mim", "grad_norm/text"):
        assert low[-1][name] == pytest.approx(full[-1][name], rel=3e-2)


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    seen = []
    result = run(
        small_recipe(tmp_path, steps=5, ema=0.9),
        on_step=lambda step, model, _: seen.append((step, model.training)),
    )
    assert seen == [(step, True) for step in range(1, 6)]
    assert (result.step, result.interrupted) == (5, False)
    assert result.metrics["loss/pairs/itc"] == numbers(tmp_path)[-1]["loss/pairs/itc"]
    saved = XFM.from_pretrained(tmp_path / "model")
    for (name, parameter), own in zip(
        saved.named_parameters(), result.model.parameters(), strict=True
    ):
        assert torch.equal(parameter, own), name
    average = XFM.from_pretrained(tmp_path / "average")
    assert not torch.equal(average.vision_proj.weight, saved.vision_proj.weight)
    # A finished run has nothing more to do.
    assert run(small_recipe(tmp_path, steps=5, ema=0.9)).step == 5
