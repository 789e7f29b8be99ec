"""The studies in miniature: plan, reuse of finished runs, and the probe of the claims."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cli.runner import invoke
from tests.objectives.test_step_twin import pair_batch
from xfm_fast.batches import IGNORED, ImageBatch, TextBatch
from xfm_fast.errors import ConfigError, XFMError
from xfm_fast.io import write_bytes
from xfm_fast.models.xfm import ALL_HEADS, XFM
from xfm_fast.objectives import masked_image_loss, pretraining_losses
from xfm_fast.reproduce import claims, tasks
from xfm_fast.reproduce.claims import PARTS, dose, run_claims
from xfm_fast.tasks.task import TASKS
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.recipe import Recipe, load_recipe


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Replaces the commands by the files that they leave; returns the arguments of each."""
    made: list[dict[str, str]] = []

    def pretend(command: Sequence[str]) -> None:
        arguments = dict(each.split("=", 1) for each in command[2:])
        made.append({"command": f"{command[0]} {command[1]}"} | arguments)
        folder = Path(arguments["checkpoint.folder"])
        if command[0] == "pretrain":
            (folder / "model").mkdir(parents=True)
            return
        names = TASKS[command[1].removesuffix("_tiny_shapes")].metrics
        for split, value in {"known": 80.0, "test": 60.0}.items():
            (folder / "evaluation" / split).mkdir(parents=True)
            metrics = dict.fromkeys(names, value + int(arguments["seed"]))
            # Whole, as the command writes it, because another thread reads the results so far.
            write_bytes(
                {
                    folder / "evaluation" / split / "metrics.json": json.dumps(
                        {"metrics": metrics}
                    ).encode()
                }
            )

    monkeypatch.setattr(tasks, "_run", pretend)
    return made


def test_tasks_are_evaluated_on_both_splits_once(
    calls: list[dict[str, str]], tmp_path: Path
) -> None:
    command = [
        "reproduce",
        "downstream",
        "--seeds",
        "2",
        "--out",
        str(tmp_path),
        "model.patch_size=4",
    ]
    assert invoke(command).exit_code == 0
    plan = [f"finetune {recipe}" for recipe in tasks.RECIPES]
    assert sorted(call["command"] for call in calls) == sorted(
        ["pretrain pretrain_tiny_shapes", *plan, *plan]
    )
    for call in calls[1:]:
        assert "model.patch_size" not in call
        assert call["init.checkpoint"] == str(tmp_path / "pretrain_tiny_shapes")
        assert "_known." in call["data.splits.known"]
    results = json.loads((tmp_path / "downstream-tiny-shapes.json").read_text())
    assert results["missing"] == []
    by_seed = {"known": {"0": 80.0, "1": 81.0}, "test": {"0": 60.0, "1": 61.0}}
    assert [row["by_seed"] for row in results["rows"]] == [by_seed] * len(plan)
    page = (tmp_path / "downstream-tiny-shapes.md").read_text()
    assert "| `vqa_tiny_shapes` | exact_match | 80.0, 81.0 | 60.0, 61.0 |" in page

    assert invoke(command).exit_code == 0
    assert len(calls) == 1 + 2 * len(plan)
    with pytest.raises(XFMError, match=r"model\.patch_size=4"):
        tasks.run_tasks(tmp_path, overrides=())
    with pytest.raises(ConfigError, match="model"):
        tasks.run_tasks(tmp_path / "new", overrides=["model.patch=4"])
    assert not (tmp_path / "new").exists()


def test_failures_are_quoted() -> None:
    with pytest.raises(XFMError, match="no-such-command"):
        tasks._run(["no-such-command"])


SMALL = (
    "shapes={seed: 7, train: 60, val: 2, test: 60, known: 60, resolution: 32}",
    "steps=2",
    "log.every=1",
    "model.vision_depth=1",
    "model.text_layers=1",
    "model.fusion_layers=1",
)


def recipe_of(name: str, *overrides: str) -> Recipe:
    own = ("streams.regions=null", *PARTS[name].overrides, "model.vocab_size=400", *overrides)
    return load_recipe(claims.RECIPE, own)


def test_doses_are_what_their_names_say() -> None:
    """Updates of text per update of pairs, the losses of pairs, and nothing else that differs."""
    recipes = {name: recipe_of(name) for name, part in PARTS.items() if part.start == "language"}
    assert len(recipes) == 18
    for share, every in claims.SHARES.items():
        for weight in claims.WEIGHTS:
            pair = [recipes[dose(share, weight, stop=stop)] for stop in (True, False)]
            assert [each.method.stop_gradient for each in pair] == [True, False]
            assert pair[1].model_copy(update={"method": pair[0].method}) == pair[0]
            assert PARTS[dose(share, weight, stop=True)].itc == weight
            drawn = Counter(
                stream
                for step in range(1, 57)
                for update in pair[0].updates_in(step)
                for stream in update
            )
            assert drawn["pairs"] == 56
            assert drawn["text"] / drawn.total() == float(Fraction(share))
            assert pair[0].losses_of("pairs") == ("itc", "itm", "imlm")
            assert every == 0 or "text" in pair[0].streams


def test_images_of_mim_have_no_captions() -> None:
    recipes = {name: recipe_of(name) for name, part in PARTS.items() if part.start == "vision"}
    assert {name: PARTS[name].target for name in recipes if name != "no MIM"} == {
        name: name for name in ("codes", "guided", "frozen")
    }
    without = recipes.pop("no MIM")
    assert len({each.model_dump_json() for each in recipes.values()}) == 1
    assert "images" not in without.streams
    assert without.streams["pairs"] == recipes["guided"].streams["pairs"]
    streams = recipes["guided"].streams
    assert "mim" not in recipes["guided"].losses_of("pairs")
    # Other scenes, with combinations of colour and shape that no caption names.
    assert (streams["pairs"].paths, streams["images"].paths) == (
        ("pairs_train.jsonl",),
        ("images_test.jsonl",),
    )


def small_model(recipe: Recipe) -> XFM:
    torch.manual_seed(0)
    return XFM(recipe.model, heads=(*ALL_HEADS, "codes")).double().train()


def language_gradient(name: str, losses: Sequence[str], seed: int = 0) -> Tensor:
    """Gradient of the language encoder in one update on pairs; zeros where there is none."""
    recipe = recipe_of(name, *SMALL[3:])
    model = small_model(recipe)
    batch = pair_batch(8, model.config, seed, ids=False)
    torch.manual_seed(1)
    values = claims.losses_for(PARTS[name], recipe, model)(model, batch, losses=losses)
    sum(values.values(), torch.zeros(())).backward()
    parts = [
        torch.zeros_like(p) if p.grad is None else p.grad for p in model.text_encoder.parameters()
    ]
    return torch.cat([part.flatten() for part in parts])


def test_stop_gradient_blocks_the_fusion_losses_and_the_dose_scales_itc() -> None:
    every, itc = ("itc", "itm", "imlm"), ("itc",)
    stopped, through = ([dose("0", w, stop=s) for w in claims.WEIGHTS] for s in (True, False))
    assert language_gradient(stopped[0], every).count_nonzero() == 0
    assert language_gradient(through[0], every).norm() > 1e-3
    strong = language_gradient(stopped[2], every)
    torch.testing.assert_close(strong, language_gradient(stopped[2], itc))
    torch.testing.assert_close(language_gradient(stopped[1], every), strong / 10)
    fusion = language_gradient(through[0], every)
    torch.testing.assert_close(language_gradient(through[1], every), strong / 10 + fusion)


def test_targets_of_mim() -> None:
    """Guided and frozen begin alike; then one target moves with the encoder. Codes are of the images themselves."""
    recipe = recipe_of("guided", "model.vision_depth=1")
    model = small_model(recipe).float()
    generator = torch.Generator().manual_seed(0)
    images = claims._images(range(6), 32)
    batch = ImageBatch(image=images, patch_mask=torch.rand(6, 64, generator=generator) < 0.4)
    losses = {
        name: claims.losses_for(PARTS[name], recipe, model)
        for name in ("guided", "frozen", "codes")
    }

    def value(name: str) -> float:
        return losses[name](model, batch, losses=["mim"])["mim"].item()

    assert value("guided") == pytest.approx(value("frozen"), rel=1e-4)
    assert value("codes") == pytest.approx(math.log(claims._CODES), rel=0.3)
    before = model.encode_image(images).detach()
    with torch.no_grad():
        for parameter in model.vision_encoder.parameters():
            parameter.mul_(1.5)
    assert batch.patch_mask is not None
    masked = model.encode_image(images, batch.patch_mask)
    assert value("frozen") == pytest.approx(
        masked_image_loss(masked, before, batch.patch_mask).item(), rel=1e-4
    )
    assert value("guided") == pytest.approx(
        pretraining_losses(model, batch)["mim"].item(), rel=1e-4
    )
    assert value("guided") != pytest.approx(value("frozen"), rel=0.01)


def test_codes_are_nearest_centres() -> None:
    centres = claims.codebook(32, 4)
    assert centres.shape == (claims._CODES, 48)
    images = claims._images(range(3), 32)
    codes = claims.nearest_codes(centres, images)
    assert codes.shape == (3, 64)
    assert codes.unique().numel() > 5
    for image, row, column in ((0, 0, 0), (1, 3, 5), (2, 7, 2)):
        patch = images[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
        nearest = int((centres - patch).square().sum(1).argmin())
        assert codes[image, 8 * row + column] == nearest
    patches = claims._patches(claims._images(range(500), 32), 4).flatten(0, 1).unique(dim=0)
    lost = torch.cdist(patches, centres).square().min(1).values.mean()
    assert lost < 0.5 * (patches - patches.mean(0)).square().sum(1).mean()


def test_a_bigram_costs_what_counting_says() -> None:
    learnt, held_out = [[0, 1, 2, 1, 3], [0, 1, 1, 3], [0, 4, 3]], [[0, 1, 3], [0, 4, 4, 3]]
    following: dict[int, Counter[int]] = {token: Counter() for token in range(5)}
    for first, second in (pair for row in learnt for pair in pairwise(row)):
        following[first][second] += 1
    after = sum(following.values(), Counter[int]())
    costs = []
    for first, second in (pair for row in held_out for pair in pairwise(row)):
        seen, kinds = following[first], max(len(following[first]), 1)
        frequency = (after[second] + 1) / (after.total() + 5)
        costs.append(-math.log((seen[second] + kinds * frequency) / (seen.total() + kinds)))
    assert claims.bigram_cost(learnt, held_out, 5) == pytest.approx(sum(costs) / len(costs))


def test_documents_are_what_apt_and_python_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_PACKAGE_LISTS", tmp_path / "nowhere")
    fallback = [*claims.documents()]
    assert {source for source, _, _ in fallback} == {"Python's documentation"}
    assert len(fallback) > 1000
    names = {name for _, name, _ in fallback}
    assert 0.02 < sum(map(claims.is_held_out, names)) / len(names) < 0.12
    reader = tmp_path / "reader"
    reader.write_text('#!/bin/sh\ntest "$1" = cat-file && cat "$2"\n')
    reader.chmod(0o755)
    (tmp_path / "mirror_main_i18n_Translation-en").write_text(
        "Package: libshape-dev\nDescription-md5: 1\nDescription-en: draws shapes\n It draws\n circles.\n .\n More.\n"
        + "".join(f"\nPackage: other\nDescription-en: tool {n}\n A tool.\n" for n in range(1, 9))
    )
    monkeypatch.setattr(claims, "_PACKAGE_LISTS", tmp_path)
    monkeypatch.setattr(claims, "_LIST_READER", str(reader))
    first, second, third = [*claims.documents()][:3]
    assert first == (
        "Debian's package descriptions",
        "shape",
        "draws shapes\n\n It draws\n circles.\n .\n More.",
    )
    # Every eighth.
    assert second[1:] == ("other", "tool 8\n\n A tool.\n")
    assert third[0] == "Python's documentation"


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts(
        [f"sentence {n} of a text about shapes" for n in range(50)], 300
    )


def test_held_out_loss_hides_every_target(tokenizer: CaptionTokenizer) -> None:
    """Tokens that masking left or replaced are hidden too; unused positions are not."""
    model = small_model(recipe_of("language", *SMALL[3:])).eval()
    ids, mask = tokenizer.encode(
        ["sentence 3 of a text", "about shapes 12", "a text"], pad_to_longest=True
    )
    positions = torch.tensor([[1, 3], [2, 0], [1, 0]])
    labels = torch.where(
        torch.tensor([[1, 1], [1, 0], [1, 0]]) > 0, ids.gather(1, positions), IGNORED
    )
    names = ("input_ids", "attention_mask", "masked_input_ids", "masked_positions", "masked_labels")

    def batch(inputs: Tensor) -> TextBatch:
        return TextBatch(**dict(zip(names, (ids, mask, inputs, positions, labels), strict=True)))

    class Epoch:
        def __len__(self) -> int:
            return 2

        def batch(self, number: int) -> TextBatch:
            # What masking left, and what it replaced.
            return batch(ids if number == 0 else ids + 1)

    hidden, other = ids.clone(), ids + 1
    for row, column in ((0, 1), (0, 3), (1, 2), (2, 1)):
        hidden[row, column] = other[row, column] = 399
    expected = [
        pretraining_losses(model, batch(inputs))["mlm"].item() for inputs in (hidden, other)
    ]
    epoch: Any = Epoch()
    assert claims.hidden_token_loss(model, epoch, "mlm", 399) == pytest.approx(
        sum(expected) / 2, rel=1e-9
    )


def test_order_of_words_is_read_from_features(
    tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certain for an encoder that sees it, chance for one that does not."""
    monkeypatch.setattr(claims, "_FITTED", 200)
    sentences = [f"a text about {n} shapes of a sentence" for n in range(400)]
    original = {
        tuple(tokenizer.encode([text], pad_to_longest=True)[0][0].tolist()) for text in sentences
    }

    class Encoder:
        def __init__(self, feature: Callable[[tuple[int, ...]], float]) -> None:
            self.feature = feature

        def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
            rows = [tuple(row[real.bool()].tolist()) for row, real in zip(ids, mask, strict=True)]
            return (torch.tensor([self.feature(row) for row in rows])[:, None] * mask)[..., None]

    def area(feature: Callable[[tuple[int, ...]], float]) -> float:
        model: Any = Encoder(feature)
        return claims.order_probe(model, tokenizer, sentences)

    assert area(lambda row: float(row in original)) == 100
    assert area(lambda row: float(sum(row) % 7)) == pytest.approx(50, abs=10)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A study of some parts, in seconds; returns their names."""
    doses = [dose("1/8", 0.1, stop=True), dose("1/8", 0.1, stop=False)]
    names = ["language", *doses, "vision", "codes", "guided", "frozen", "no MIM"]
    documents = [
        ("some text", f"document {n}", f"Sentence {n} of a text about {n % 7} shapes.")
        for n in range(800)
    ]
    for name, value in {
        "PARTS": {name: PARTS[name] for name in names},
        "documents": lambda: iter(documents),
        "_VOCABULARY": 400,
        "COMPARED": tuple(each for each in claims.COMPARED if {*each} <= {*names}),
        "_MEASURED": 10,
        "_FITTED": 20,
        "_TESTED": 10,
        "is_held_out": lambda name: int(name.split()[1]) % 16 == 0,
    }.items():
        monkeypatch.setattr(claims, name, value)
    return names


@pytest.mark.slow
def test_claims_are_trained_measured_and_not_repeated(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of every part; one that fails leaves the others' results, which are then read."""
    run, done = claims._run, []

    def fail_once(out: Path, seed: int, name: str, overrides: Sequence[str]) -> bool:
        if name == "guided" and not done:
            done.append(name)
            return False
        return run(out, seed, name, overrides)

    monkeypatch.setattr(claims, "_run", fail_once)
    partial = run_claims(tmp_path, seeds=1, overrides=SMALL)
    assert partial["missing"] == [[name, 0] for name in ("guided", "frozen", "no MIM")]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed-0/*.json")}
    assert len(before) == 5

    finished = invoke(["reproduce", "claims", *SMALL, "--seeds", "1", "--out", str(tmp_path)])
    assert finished.exit_code == 0, finished.output
    content = json.loads((tmp_path / "claims-tiny-shapes.json").read_text())
    assert content["missing"] == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads(json.dumps(run_claims(tmp_path, seeds=1, overrides=SMALL))) == content
    # Only the first stages keep their models, from which more seeds would start.
    kept = {path.parent.name for path in tmp_path.glob("seed-0/*/model")}
    assert (
        kept
        == {"language", "vision"}
        == {path.name for path in tmp_path.glob("seed-0/*") if path.is_dir()}
    )

    metrics = {name: by_seed["0"] for name, by_seed in content["parts"].items()}
    assert [*metrics] == small
    assert all(math.isfinite(value) for each in metrics.values() for value in each.values())
    assert len({metrics[name]["nats"] for name in small[:3]}) == 3
    differences = {(row["part"], row["minus"]): row["metrics"] for row in content["differences"]}
    assert [*differences] == [
        (small[2], small[1]),
        ("guided", "no MIM"),
        ("guided", "codes"),
        ("guided", "frozen"),
        ("codes", "no MIM"),
    ]
    nats = metrics[small[2]]["nats"] - metrics[small[1]]["nats"]
    assert differences[small[2], small[1]]["nats"] == [pytest.approx(nats), None]
    assert content["text"]["sentences"] == {"some text": 800}
    assert content["text"]["held_out"] == 50
    page = (tmp_path / "claims-tiny-shapes.md").read_text()
    assert "| no MIM | 1 |" in page
    assert f"| {small[2]} − {small[1]} | 1 |" in page
    with pytest.raises(XFMError, match="steps=2"):
        run_claims(tmp_path, seeds=1)


def test_probe_ranks_by_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_FITTED", 80)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 6, generator=generator) * torch.tensor([1.0, 10, 0.1, 1, 1, 1]) + 3
    noise = torch.randn(120, generator=generator)
    targets = torch.stack(
        [features[:, 1] / 10 + features[:, 3] > 4.5, features[:, 0] + noise > 3], 1
    )
    areas = []
    columns = torch.cat([features, torch.ones(120, 1)], 1).double()
    for target in targets.unbind(1):
        fitted, y = columns[:80], target[:80].double()
        scores = columns[80:] @ torch.linalg.solve(fitted.T @ fitted, fitted.T @ y)
        pairs = [
            float(a > b)
            for a, yes in zip(scores, target[80:], strict=True)
            if yes
            for b, other in zip(scores, target[80:], strict=True)
            if not other
        ]
        areas.append(sum(pairs) / len(pairs))
    assert areas[0] > 0.9 > areas[1] > 0.6
    assert claims.probe(features, targets) == pytest.approx(50 * sum(areas))
    # Features that say nothing, or the same twice, are no error.
    assert claims.probe(torch.ones(120, 2), targets) == 50
