"""Retrieval as a task: evaluation on any number of processes, ranking rules, tables and folders of
images.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.cli.runner import invoke
from tests.finetuning.conftest import Make
from tests.search.conftest import write_picture
from tests.training.small_runs import in_processes, join_group
from xfm_fast.checkpoint import to_official
from xfm_fast.data.annotations import RetrievalRecord, RetrievalTestRecord
from xfm_fast.data.fingerprints import trained_on
from xfm_fast.encoders import XFMEncoder
from xfm_fast.errors import ConfigError, InputError
from xfm_fast.finetuning.prediction import load, request_of
from xfm_fast.finetuning.recipe import FinetuneRecipe, load_finetune_recipe, open_task
from xfm_fast.finetuning.run import evaluate, finetune, recipe_of
from xfm_fast.memory import PeakMemory
from xfm_fast.models.xfm import XFM
from xfm_fast.search import build_index, open_encoder, open_index
from xfm_fast.serve.model import RankWork, XFMModel
from xfm_fast.serve.options import SourceOptions
from xfm_fast.tasks import reranking, retrieval
from xfm_fast.tasks.evaluation import Evaluation, Journal, fingerprint
from xfm_fast.tasks.models import TaskModel
from xfm_fast.tasks.retrieval import RetrievalOptions, RetrievalTask, Retriever

RESULTS = ("metrics.json", "receipt.json", "scores.safetensors")


@pytest.fixture
def small(recipe: Make) -> FinetuneRecipe:
    return recipe(
        "retrieval",
        "retrieval_{}.json",
        task={"k": 5, "augment": False, "max_tokens": 32},
        epochs=1,
    )


@pytest.fixture
def task(small: FinetuneRecipe) -> RetrievalTask:
    made = open_task(small)
    assert isinstance(made, RetrievalTask)
    return made


@pytest.fixture
def model(pretrained: Path) -> TaskModel:
    return TaskModel.from_pretrained(pretrained)


def test_evaluation_re_ranks_all(
    task: RetrievalTask, model: TaskModel, world: Path, tmp_path: Path
) -> None:
    """Journals of other weights are ignored and deleted."""
    records = task.records([world / "retrieval_test.json"], "test")
    for name, identity in (("rows-00000", "other work"), ("rows-00001", "")):
        with Journal(tmp_path / f"{name}.jsonl", identity) as journal:
            journal.append([0, [1e6, 1e6, 1e6]])
    (tmp_path / "images-00007.bin").write_bytes(b"left")
    metrics = Evaluation(tmp_path, batch_size=4).run(task, model, records)

    retriever = Retriever(model)
    images = retriever.embed_images(
        [torch.stack([task.pixels(record.image) for record in records])]
    )
    captions = [caption for record in records for caption in record.caption]
    texts = retriever.embed_texts([task.padded([task.ids(caption) for caption in captions])])
    expected = retriever.rerank(images, texts, k=5)
    results = load_file(tmp_path / "scores.safetensors")
    assert torch.equal(results["text"].long(), expected.candidates.texts)
    assert torch.equal(results["image"].long(), expected.candidates.images)
    torch.testing.assert_close(results["score"], expected.scores, rtol=1e-5, atol=1e-5)
    images_of_texts = torch.arange(len(records))
    similarity = images.features @ texts.features.t()
    unscored = expected.score_i2t == reranking.UNSCORED, expected.score_t2i == reranking.UNSCORED
    for rank, i2t, t2i in (
        ("match", expected.score_i2t, expected.score_t2i),
        ("similarity", similarity, similarity.t()),
        ("sum", expected.score_i2t + similarity, expected.score_t2i + similarity.t()),
    ):
        true = reranking.recall(
            i2t.masked_fill(unscored[0], -torch.inf),
            t2i.masked_fill(unscored[1], -torch.inf),
            images_of_texts,
        )
        assert {
            name.removeprefix(f"{rank}/"): metrics[name]
            for name in metrics
            if name.startswith(rank)
        } == true
    assert {name: metrics[name] for name in metrics if "/" not in name} == expected.recall(
        images_of_texts
    )
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["flops"] == expected.receipt.flops
    assert receipt["pairs_scored"] == len(results["score"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(RESULTS)
    # In half precision scores do not tie, and work of another precision does not resume.
    digest = fingerprint(task, model, records, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert fingerprint(task, model, records, 4) != digest
    half = Evaluation(
        tmp_path, batch_size=4, autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    half.run(task, model, records)
    scores = load_file(tmp_path / "scores.safetensors")["score"]
    assert bool((scores != scores.bfloat16()).any())


def test_ranking_by_an_untrained_matching_head(
    small: FinetuneRecipe,
    pretrained: Path,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Check that evaluation warns; `auto` ranks by features, and the run records it for `search`,
    `predict` and `evaluate`.
    """
    blank = TaskModel.from_pretrained(pretrained)
    with torch.no_grad():
        [*blank.get_submodule("itm_head").parameters()][-2].zero_()
    blank.save_pretrained(tmp_path / "blank")
    shutil.copy(pretrained / "tokenizer.json", tmp_path / "blank")
    results = evaluate(small, tmp_path / "blank", "test", tmp_path / "match")
    assert results["r_mean"] == results["match/r_mean"] < results["similarity/r_mean"]
    assert "task.rank=similarity" in capsys.readouterr().err

    values = small.model_dump() | {
        "task": small.task.model_dump() | {"rank": "auto"}, "init": {"checkpoint": str(tmp_path / "blank")},
        "choose": {"by": "r_mean"}, "steps": 2, "optimizer": {"lr": 1e-30},
    }  # fmt: skip
    result = finetune(FinetuneRecipe(**values))
    assert result.metrics["test"]["r_mean"] == result.metrics["test"]["similarity/r_mean"]
    run = Path(small.checkpoint.folder)
    encoder = open_encoder(run)
    assert isinstance(encoder, XFMEncoder)
    assert encoder.rank == "similarity"
    again = recipe_of(run, ["choose=null", "task.rank=match"])
    assert (
        evaluate(again, run, "test", tmp_path / "again")["r_mean"]
        == result.metrics["test"]["match/r_mean"]
    )
    (row,) = load(run).predict([world / "images/test/000000.png"], ["a red circle", "a blue star"])
    assert [text["score"] for text in row["texts"]] == [text["cosine"] for text in row["texts"]]


def process_of_an_evaluation(
    rank: int,
    world_size: int,
    meeting_point: Path,
    recipe: FinetuneRecipe,
    folder: Path,
    kill_at: int,
) -> None:
    """Evaluates, and dies after `kill_at` scored blocks."""
    join_group(rank, world_size, meeting_point)
    done = 0

    def scored(*given: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done == 1 + kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return reranking.score_candidates(*given, **options)

    retrieval.score_candidates = scored
    assert recipe.init.checkpoint is not None
    evaluate(recipe, recipe.init.checkpoint, "test", folder)


@pytest.mark.slow
def test_same_on_any_number_of_processes_and_after_a_kill(
    small: FinetuneRecipe, tmp_path: Path
) -> None:
    def run(name: str, world_size: int, kill_at: int = -1) -> list[int]:
        return in_processes(
            process_of_an_evaluation, world_size, tmp_path / f"{name}-{world_size}-{kill_at}", small, tmp_path / name,
            kill_at,
        )  # fmt: skip

    def results(name: str) -> list[bytes]:
        return [(tmp_path / name / element).read_bytes() for element in RESULTS]

    for world_size in (1, 2, 4):
        assert run(str(world_size), world_size) == [0] * world_size
    assert results("2") == results("1")
    assert results("4") == results("1")
    assert run("killed", 1, kill_at=2) == [-signal.SIGKILL]
    assert not (tmp_path / "killed" / "metrics.json").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "again")
    # Two of three blocks are done.
    assert run("again", 1, kill_at=2) == [0]
    assert run("killed", 2) == [0, 0]
    assert results("killed") == results("again") == results("1")


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_images(tmp_path: Path, task: RetrievalTask) -> None:
    """The embeddings of the larger set take 135 MB, those of a block 2 MB."""
    cfg = task.config.replace(image_size=128, patch_size=8, vision_width=64, vision_depth=1)
    large = RetrievalTask(RetrievalOptions(k=2), cfg, task.tokenizer)
    large.pixels = lambda image: torch.randn(3, 128, 128)
    model = large.build()

    def peak(images: int) -> int:
        records = [
            RetrievalTestRecord(image=f"{n}.png", caption=("a red circle",)) for n in range(images)
        ]
        with PeakMemory() as memory:
            Evaluation(tmp_path, batch_size=32).run(large, model, records)
        return memory.peak - memory.start

    peak(64)
    assert peak(2048) - peak(256) < 25e6


def test_a_pretrained_model_is_evaluated_without_training_files(
    small: FinetuneRecipe, pretrained: Path, tmp_path: Path
) -> None:
    data = small.data.model_copy(update={"train": ("not_here.json",)})
    results = evaluate(
        small.model_copy(update={"data": data}), pretrained, "test", tmp_path / "zero"
    )
    assert "r_mean" in results
    # The same weights as an official file, which does not record its sizes.
    model = XFM.from_pretrained(pretrained)
    torch.save({"model": to_official(model.state_dict(), model.config)}, tmp_path / "xfm.th")
    recipe = small.model_copy(update={"tokenizer": str(pretrained / "tokenizer.json")})
    assert evaluate(recipe, tmp_path / "xfm.th", "test", tmp_path / "official") == results


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Write a table of 5 pictures with other column names and commas in its captions."""
    for index in range(5):
        write_picture(tmp_path / f"own/{index}.png", index)
    rows = "".join(f'{index}.png,"a red circle, {index}"\n' for index in range(5))
    (tmp_path / "own/train.csv").write_text("File_Name,Text\n" + rows)
    return tmp_path / "own/train.csv"


def test_own_pictures_are_one_command_each(
    table: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(
        [
            "pretrain",
            "pretrain_csv",
            "data=own/train.csv",
            f"init.checkpoint={pretrained}",
            "steps=4",
        ]
    )
    assert done.exit_code == 0, done.output
    given = ["data.train=own/train.csv", "init.checkpoint=runs/pretrain_csv"]
    recipe = load_finetune_recipe("retrieval_csv", given)
    assert done.stdout.splitlines()[-1].endswith(
        f"xfm-fast finetune retrieval_csv {' '.join(given)}"
    )
    assert (recipe.batch_size, recipe.epochs) == (2, 20)
    assert recipe.choose is not None
    assert recipe.choose.every == 50
    assert recipe.optimizer.lr == pytest.approx(2e-5 * 24**1.5 * (2 / 64) ** 0.5, rel=0.01)
    done = invoke(["finetune", "retrieval_csv", *given, "epochs=2"])
    assert done.exit_code == 0, done.output
    run = Path("runs/retrieval_csv")
    recipe = recipe_of(run)
    assert recipe.steps == 2 * 2
    task = open_task(recipe)
    held = {record.image for record in task.records(recipe.paths_of("val"), "val")}
    (rows,) = task.training_rows(recipe.paths_of("train"))
    trained = {rows.read(row).image for row in range(len(rows))}
    assert (len(held), len(trained), held & trained) == (1, 4, set())
    results = json.loads(invoke(["evaluate", run, "--json"]).stdout)["val"]
    assert results == json.loads((run / "evaluation/val/metrics.json").read_text())["metrics"]


def test_pretraining_leaves_out_what_retrieval_holds_out(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the documented pair of commands, and check what both say if pretraining saw the split."""
    monkeypatch.chdir(tmp_path)
    names = [f"{index}.png" for index in range(24)]
    for index, name in enumerate(names):
        write_picture(tmp_path / name, index)
    Path("train.csv").write_text(
        "image,caption\n" + "".join(f"{name},a red circle\n" for name in names)
    )
    told = "was trained on"

    def run(*command: str) -> str:
        done = invoke([*command, "workers=0"] if command[0] != "evaluate" else [*command])
        assert done.exit_code == 0, done.output
        return done.output

    run("pretrain", "pretrain_csv", "data=train.csv", f"init.checkpoint={pretrained}", "steps=8")
    pairs = ("data.train=train.csv", "init.checkpoint=runs/pretrain_csv", "epochs=1")
    assert told not in run("finetune", "retrieval_csv", *pairs)
    assert told not in run("evaluate", "runs/retrieval_csv")
    recipe = recipe_of(Path("runs/retrieval_csv"))
    held = {record.image for record in open_task(recipe).records(recipe.paths_of("val"), "val")}
    assert len(held) >= 2
    for weights in (
        "runs/pretrain_csv/model",
        "runs/retrieval_csv/best",
        "runs/retrieval_csv/model",
    ):
        assert {*trained_on(Path(weights), names, tmp_path)} == {*names} - held, weights

    leaking = ("streams.pairs.hold_out=0", "checkpoint.folder=runs/leaking", "steps=8")
    run("pretrain", "pretrain_csv", "data=train.csv", f"init.checkpoint={pretrained}", *leaking)
    pairs = (
        "data.train=train.csv",
        "init.checkpoint=runs/leaking",
        "checkpoint.folder=runs/leaked",
        "epochs=1",
    )
    message = f"leaking/model was trained on {len(held)} of the {len(held)} images of the split val"
    assert message in run("finetune", "retrieval_csv", *pairs)
    assert f"leaked/best was trained on {len(held)} of" in run("evaluate", "runs/leaked")


def test_tables_folders_and_requests(
    small: FinetuneRecipe, task: RetrievalTask, world: Path, tmp_path: Path
) -> None:
    elements = json.loads((world / "retrieval_train.json").read_text())[:8]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["file", "said"], *([element["image"], element["caption"]] for element in elements)]
        )
    options = RetrievalOptions(columns={"image": "file", "caption": "said"}, augment=False)
    made = RetrievalTask(options, small.model, task.tokenizer, images=world)
    (rows,) = made.rows([tmp_path / "pairs.csv"])
    first, second, third = (
        made.item(rows.read(row), np.random.default_rng(0)) for row in (0, 1, 4)
    )
    assert first.target == second.target != third.target
    assert [len(record.caption) for record in made.records([tmp_path / "pairs.csv"], "test")] == [
        4,
        4,
    ]

    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(world / elements[0]["image"], folder / "a.png")
    (folder / "a.txt").write_text("a red circle\na circle\n")
    (record,) = made.records([folder], "test")
    assert record.caption == ("a red circle", "a circle")
    with pytest.raises(InputError, match="empty"):
        task.requests([Path("a.png")], ["..."])
    with pytest.raises(InputError, match="line"):
        request_of(task, {"images": ["a.png", "b.png"], "text": "a dog"})
    request = request_of(task, {"image": "a.png", "text": ["a dog", "a cat"]})
    assert request.caption == ("a dog", "a cat")
    with pytest.raises(ConfigError, match=r"task\.max_tokens=900"):
        RetrievalTask(RetrievalOptions(max_tokens=900), small.model, task.tokenizer)


def test_every_entry_sees_the_same_picture(pretrained: Path, tmp_path: Path) -> None:
    """Check that a turned, transparent picture is seen upright and on white."""
    given, seen = tmp_path / "given/a.png", tmp_path / "seen.png"
    given.parent.mkdir()
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (48, 64, 4), dtype=np.uint8)
    )
    picture.putalpha(
        Image.fromarray(np.where(np.arange(64) < 30, 0, 255)[None].repeat(48, 0).astype(np.uint8))
    )
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture)
    white.save(seen)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(given, exif=exif)
    model = XFM.from_pretrained(pretrained).eval()
    expected = model.encode(seen)

    def of_pixels(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return model.project_image(model.encode_image(pixels[None]))[0]

    def task(**options: Any) -> RetrievalTask:
        return RetrievalTask(
            RetrievalOptions(augment=False), model.config, model.tokenizer, **options
        )

    build_index(given.parent, open_encoder(pretrained))
    record = RetrievalRecord(image=str(given), caption="a dog", image_id=0)
    served = XFMModel(SourceOptions(str(pretrained), device="cpu"), 1 << 20)
    (answer,) = served.answer([RankWork((served.ranker.picture(given.read_bytes(), "a.png"),))])
    assert isinstance(answer, Tensor)
    with open_index(given.parent).store.read() as index:
        assert len(index.features) == 1
    ways = {
        "encode": model.encode(given),
        "index": torch.from_numpy(index.features[0].copy()),
        "finetune": of_pixels(task().item(record, np.random.default_rng(0)).image),
        "predict": of_pixels(task().pixels(given)),
        "serve": answer[0],
    }
    for name, results in ways.items():
        torch.testing.assert_close(results, expected, atol=1e-6, rtol=0, msg=name)
    official = of_pixels(task(official_pictures=True).pixels(given))
    assert (official - expected).abs().max() > 1e-4
