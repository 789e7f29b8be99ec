"""The evaluation gives full marks to a model that knows, chance to one that does not, and uses held-out scenes only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import HELD_OUT, captions
from xfm_fast.errors import InputError
from xfm_fast.models.xfm import XFM
from xfm_fast.reproduce import evaluation
from xfm_fast.reproduce.evaluation import METRICS, HeldOut, Rows, balanced_accuracy, evaluate, fit_probe, probe
from xfm_fast.tokenizer import CaptionTokenizer

HELD = HeldOut(seed=0, resolution=64, scenes=12)


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts([text for made in HELD.retrieval for text in captions(made)], 400)


@pytest.fixture
def model() -> XFM:
    torch.manual_seed(0)
    return XFM(XFMConfig.preset("tiny", image_size=64, patch_size=16, vision_depth=1, text_layers=1, fusion_layers=1))


def test_retrieval_scenes_are_held_out_and_distinguishable() -> None:
    scenes = HeldOut(0, 64).retrieval
    assert len(scenes) == 100
    assert len({captions(made)[0] for made in scenes}) == 100
    for made in scenes:
        assert {(thing.colour, thing.shape) for thing in made.things} & HELD_OUT["test"]


def test_a_random_model_scores_chance(model: XFM, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_PROBE_SCENES", {"train": 200, "val": 60, "test": 60})
    found = evaluate(model, tokenizer, HELD)
    assert set(METRICS) <= set(found)
    assert all(0 <= value <= 100 for value in found.values())
    # A chance of 1 in 12 for each of 12 queries.
    assert found["image_to_text_r1"] < 50
    assert found["grounding"] < 50
    assert model.training
    assert evaluate(model, tokenizer, HELD) == found
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_probe_of_shapes_tells_what_is_seen_from_what_is_guessed_by_colour(
    model: XFM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_PROBE_SCENES", {"train": 150, "val": 1, "test": 100})
    found = evaluation.shape_probe(model, HELD)
    assert set(found) == {
        "chance",
        *(f"{on}/{of}" for on in ("training", "all_pairs") for of in ("held_out", "common")),
    }
    tokens = evaluation._object_tokens

    def knowing(shapes: bool) -> Any:
        """Tokens that tell colours, and shapes or not; the scenes are those that the model would see."""

        def read(model: XFM, held_out: HeldOut, scenes: Any) -> Rows:
            rows = tokens(model, held_out, scenes)
            things = [thing for made in scenes for thing in made.things]
            colours = torch.tensor([evaluation.COLOURS.index(thing.colour) for thing in things])
            told = torch.nn.functional.one_hot(colours, 8).float()
            if shapes:
                told = torch.cat([told, torch.nn.functional.one_hot(rows.targets["shape"], 6).float()], 1)
            return Rows(told, rows.targets)

        return read

    monkeypatch.setattr(evaluation, "_object_tokens", knowing(True))
    seen = evaluation.shape_probe(model, HELD)
    assert all(value == 100 for name, value in seen.items() if name != "chance")
    monkeypatch.setattr(evaluation, "_object_tokens", knowing(False))
    guessed = evaluation.shape_probe(model, HELD)
    assert guessed["training/held_out"] == 0
    assert guessed["training/common"] > guessed["chance"]


def test_right_boxes_get_full_marks(model: XFM, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in reads the answer from the text that it is given, in the order in which texts come."""
    answers: list[list[float]] = []
    for made in HELD.retrieval:
        for element in evaluation.region_elements(made, 64):
            x, y, w, h = element["bb"]
            answers.append([(x + w / 2) / 64, (y + h / 2) / 64, w / 64, h / 64])
    given = iter(answers)
    monkeypatch.setattr(
        model, "predict_boxes", lambda fused: torch.tensor([next(given) for _ in range(len(fused))]), raising=True
    )
    found = evaluation._grounding(model, tokenizer, HELD)
    assert found["grounding"] == 100
    assert {"grounding/attributes", "grounding/relations"} <= set(found)


def test_texts_meet_their_own_image(model: XFM, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of texts and their images: the index that `fuse` gets must lead to the scene that the text is about."""
    seen: list[tuple[str, torch.Tensor]] = []
    embeds = torch.cat([model.encode_image(pixels) for pixels in evaluation._pixels(model, HELD.retrieval, 64)])
    memory_of, fuse = model.image_memory, model.fuse

    def remember(image_embeds: torch.Tensor) -> Any:
        return SimpleNamespace(embeds=image_embeds, memory=memory_of(image_embeds))

    def note(text: torch.Tensor, mask: torch.Tensor, memory: Any, index: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.extend(("", memory.embeds[i]) for i in index)
        return fuse(text, mask, memory.memory, index, **options)

    monkeypatch.setattr(evaluation, "_BATCH", 5)
    monkeypatch.setattr(model, "image_memory", remember)
    monkeypatch.setattr(model, "fuse", note)
    evaluation._grounding(model, tokenizer, HELD)
    expected = [index for index, made in enumerate(HELD.retrieval) for _ in evaluation.region_elements(made, 64)]
    assert len(seen) == len(expected)
    for (_, image), index in zip(seen, expected, strict=True):
        torch.testing.assert_close(image, embeds[index], atol=1e-4, rtol=1e-4)


def test_a_model_that_sees_and_reads_passes_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins whose embeddings hold the truth: the probes must find it, on combinations they were not fitted on."""
    monkeypatch.setattr(evaluation, "_PROBE_SCENES", {"train": 300, "val": 100, "test": 100})
    scenes = {split: evaluation._probe_scenes(HELD, split) for split in ("train", "val", "test")}

    def looks(made: Any) -> torch.Tensor:
        row = torch.zeros(1, 20)
        row[0, len(made.things)] = 1
        for thing in made.things:
            row[0, 4 + evaluation.COLOURS.index(thing.colour)] = 1
            row[0, 12 + evaluation.SHAPES.index(thing.shape)] = 1
        return row

    model = SimpleNamespace(encode_image=lambda pixels: torch.stack([looks(made) for made in pixels]))
    monkeypatch.setattr(evaluation, "_pixels", lambda _, made, resolution: iter([made]))
    found = evaluation._image_probe(model, HELD)  # type: ignore[arg-type]
    assert found["image_probe"] > 99
    assert not {id(made) for made in scenes["test"]} & {id(made) for made in scenes["train"]}


def _rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 6, generator=generator) * torch.tensor([1.0, 10, 0.1, 1, 1, 1])
    targets = (features[:, 1] / 10 + features[:, 2] * 10 > 0).long() + (features[:, 3] > 1).long()
    return features, targets


def test_the_closed_form_is_where_gradient_descent_ends() -> None:
    features, targets = _rows(80, 0)
    fitted = fit_probe(features, targets, classes=3, strength=0.1)
    x = ((features - features.mean(0)) / features.std(0, correction=0)).double()
    onehot = torch.nn.functional.one_hot(targets, 3).double()
    weights = torch.stack([1 / (3 * (targets == target).sum()) for target in targets]).double()
    weight = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weights[:, None] * (onehot - x @ weight - bias) ** 2).sum() + 0.1 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(fitted.weight, weight.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fitted.bias, bias.detach(), atol=1e-6, rtol=1e-5)


def test_what_is_linear_is_read_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(600, 8, generator=generator)
    made = {
        "linear": (features[:, 0] + features[:, 1] > 0).long(),
        "product": (features[:, 0] * features[:, 1] > 0).long(),
        "noise": torch.randint(2, (600,), generator=generator),
    }
    parts = [
        Rows(features[part], {task: targets[part] for task, targets in made.items()})
        for part in (slice(0, 300), slice(300, 400), slice(400, 600))
    ]
    found = probe(parts[0], parts[1], parts[2], dict.fromkeys(made, 2))
    assert found["linear"] > 0.95
    assert abs(found["product"] - 0.5) < 0.15
    assert abs(found["noise"] - 0.5) < 0.15


def test_rare_classes_weigh_as_much_as_common_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    targets = (torch.arange(400) % 20 == 0).long()
    features = torch.randn(400, 4, generator=generator)
    features[:, 0] += 3 * targets
    predicted = fit_probe(features, targets, classes=2, strength=0.01).predict(features)
    assert balanced_accuracy(predicted, targets) > 0.85


def test_scale_and_offset_of_features_do_not_matter() -> None:
    features, targets = _rows(60, 3)
    plain = fit_probe(features, targets, classes=3, strength=0.1).scores(features)
    moved = features * 50 - 7
    torch.testing.assert_close(
        fit_probe(moved, targets, classes=3, strength=0.1).scores(moved), plain, atol=1e-4, rtol=0
    )


def test_constant_features_predict_something() -> None:
    fitted = fit_probe(torch.ones(5, 2), torch.tensor([0, 1, 1, 0, 1]), classes=2, strength=0.1)
    assert fitted.scores(torch.ones(3, 2)).isfinite().all()


def test_validation_rows_choose_the_strength() -> None:
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(60, 50, generator=generator)
    targets = (features[:, 0] + 0.8 * torch.randn(60, generator=generator) > 0).long()
    parts = [Rows(features[i::3], {"task": targets[i::3]}) for i in range(3)]
    both = probe(parts[0], parts[1], parts[2], {"task": 2}, strengths=(1e-6, 1.0))["task"]
    alone = [
        probe(parts[0], parts[1], parts[2], {"task": 2}, strengths=(strength,))["task"] for strength in (1e-6, 1.0)
    ]
    on_validation = [
        balanced_accuracy(
            fit_probe(parts[0].features, parts[0].targets["task"], classes=2, strength=strength).predict(
                parts[1].features
            ),
            parts[1].targets["task"],
        )
        for strength in (1e-6, 1.0)
    ]
    assert on_validation[0] != on_validation[1]
    assert both == alone[on_validation.index(max(on_validation))]


def test_balanced_accuracy_is_the_mean_over_classes() -> None:
    targets = torch.tensor([0, 0, 0, 0, 2])
    assert balanced_accuracy(torch.tensor([0, 0, 0, 1, 1]), targets) == (0.75 + 0) / 2
    assert balanced_accuracy(targets, targets) == 1


@pytest.mark.parametrize(
    ("features", "targets", "strength"),
    [
        (torch.ones(3, 2), torch.zeros(2).long(), 0.1),
        (torch.ones(3), torch.zeros(3).long(), 0.1),
        (torch.ones(0, 2), torch.zeros(0).long(), 0.1),
        (torch.ones(3, 2), torch.zeros(3).long(), 0.0),
    ],
)
def test_impossible_probes_are_refused(features: torch.Tensor, targets: torch.Tensor, strength: float) -> None:
    with pytest.raises(InputError):
        fit_probe(features, targets, classes=2, strength=strength)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(InputError):
        balanced_accuracy(torch.zeros(0), torch.zeros(0))
