"""`xfm-fast pretrain`, from recipe to model: output, files, exit codes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest

from tests.cli.runner import invoke
from tests.training.small_runs import ROOT
from xfm_fast.cli.options import UNFINISHED
from xfm_fast.models.xfm import XFM
from xfm_fast.training.metrics import read_log

RECIPE = """
model: {preset: tiny, vision_depth: 1, text_layers: 1, fusion_layers: 1, vocab_size: 320}
data: %s
shapes: {train: 24, val: 2, test: 2}
streams:
  text: {kind: text, paths: texts_train.jsonl, batch_size: 4, max_tokens: 24}
  regions: {kind: regions, paths: regions_train.jsonl, batch_size: 4, max_images: 3, max_tokens: 24}
  images: {kind: images, paths: images_train.jsonl, batch_size: 4}
  pairs: {kind: pairs, paths: pairs_train.jsonl, batch_size: 4, max_tokens: 24}
updates: [[text], [regions, images], [pairs]]
steps: 3
device: cpu
checkpoint: {folder: %s, every: 2}
log: {every: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE % (tmp_path / "world", tmp_path / "run"))
    return path


def test_pretrain_makes_the_world_the_vocabulary_and_the_model(
    recipe: Path, tmp_path: Path
) -> None:
    result = invoke(["pretrain", str(recipe)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "world/world.json").is_file()
    assert (tmp_path / "run/tokenizer.json").is_file()
    assert [line["step"] for line in read_log(tmp_path / "run/log.jsonl")] == [1, 2, 3]
    # What a terminal still shows when the bar is gone.
    losses, saved = result.stdout.splitlines()
    assert losses.startswith("step 3  text/mlm ")
    assert "pairs/itc" in losses
    run = tmp_path / "run"
    assert (
        saved == f"saved: {run}/model; fine-tune it: xfm-fast finetune RECIPE init.checkpoint={run}"
    )
    before = XFM.from_pretrained(tmp_path / "run/model")
    assert before.encode("a red circle").ndim == 1
    files = {path.name for path in (run / "model").iterdir()}
    assert {"README.md", "modules.json", "preprocessor_config.json", "tokenizer.json"} <= files

    again = invoke(["pretrain", str(recipe), "steps=4", "optimizer.lr=1e-3"])
    assert again.exit_code == 0
    assert "steps: 3 → 4" in again.output
    assert [line["step"] for line in read_log(tmp_path / "run/log.jsonl")] == [1, 2, 3, 4]
    after = XFM.from_pretrained(tmp_path / "run/model")
    assert not before.vision_proj.weight.equal(after.vision_proj.weight)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}


def test_an_official_file_is_answered_with_the_recipe_of_the_same_run(tmp_path: Path) -> None:
    official = tmp_path / "Pretrain.yaml"
    official.write_text(
        "train_file: [a.json]\nimage_res: 224\nschedular: {sched: linear, epochs: 100}\n"
    )
    result = invoke(["pretrain", official])
    assert result.exit_code == 2
    for named in (
        "Pretrain.yaml has no streams",
        "pretrain pretrain_base_4m data=",
        "xfm-fast finetune",
    ):
        assert named in result.stderr
    assert "init.checkpoint" not in result.stderr


def test_mistakes_are_one_line(recipe: Path) -> None:
    result = invoke(["pretrain", recipe, "optimiser.lr=1"])
    assert result.exit_code == 2
    assert "did you mean optimizer" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_signal_ends_a_run_with_a_code_of_its_own(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "run/log.jsonl"

    def interrupt() -> None:
        while not (log.exists() and read_log(log)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    Thread(target=interrupt, daemon=True).start()
    done = invoke(["pretrain", recipe, "steps=100000"])
    assert done.exit_code == UNFINISHED == 75
    assert "stopped after step" in done.stderr


def torchrun(*arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", "-m", "xfm_fast.cli", "pretrain", *arguments,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_end_when_all_is_written(recipe: Path, tmp_path: Path, parallel: str) -> None:
    for number in range(4):
        folder = tmp_path / f"{parallel}{number}"
        command = torchrun(
            str(recipe), "steps=1", f"parallel={parallel}", f"checkpoint.folder={folder}"
        )
        subprocess.run(command, env=environment(), cwd=ROOT, timeout=180, check=True)
        assert (folder / "model/model.safetensors").is_file()


# Says on its way out whether handlers have run, and whether the interpreter is taken down.
WITNESSED = """
import atexit, os, runpy, sys
class Witness:
    def __del__(self, write=os.write):
        write(1, b"taken down")
sys.witness = Witness()
atexit.register(print, "handlers ran")
sys.argv = ["xfm-fast", *%r]
%s
runpy.run_module("xfm_fast.cli", run_name="__main__")
"""
FAULTY = "import xfm_fast.training.recipe as recipe; recipe.load_recipe = lambda *_: [][0]"


@pytest.mark.parametrize(
    ("arguments", "before", "code", "world_size"),
    [(["pretrain", "nowhere"], "", 2, "1"), (["pretrain", "any"], FAULTY, 70, "2")],
)
def test_exit_codes(arguments: list[str], before: str, code: int, world_size: str) -> None:
    """One process leaves as ever; one of several does not wait for its threads."""
    ended = subprocess.run(
        [sys.executable, "-c", WITNESSED % (arguments, before)], env=environment() | {"WORLD_SIZE": world_size},
        cwd=ROOT, timeout=180, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == code, ended.stderr
    assert "handlers ran" in ended.stdout
    assert ("taken down" in ended.stdout) == (world_size == "1")
    assert ("IndexError" in ended.stderr) == bool(before)


@pytest.mark.slow
def test_torchrun_and_a_signal(recipe: Path, tmp_path: Path) -> None:
    """Two processes under torchrun; SIGTERM ends them with a checkpoint, and one process goes on from there."""
    command = torchrun(str(recipe), "steps=100000")
    process = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run/log.jsonl"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not (log.exists() and len(read_log(log)) >= 3):
        time.sleep(0.5)
    # torchrun passes the signal on to its workers.
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    steps = read_log(log)[-1]["step"]
    assert steps >= 3, told
    assert (tmp_path / f"run/checkpoints/step-{int(steps):08d}").is_dir(), told
    alone = subprocess.run(
        [sys.executable, "-m", "xfm_fast.cli", "pretrain", str(recipe), f"steps={int(steps) + 2}"],
        capture_output=True, text=True, env=environment(), cwd=ROOT, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert "the checkpoint is of 2 processes and this run has 1" in alone.stderr
    assert read_log(log)[-1]["step"] == steps + 2


FOREIGN_VALUES = [
    ("optimizer.lr=.inf", "optimizer.lr=inf: use a finite number"),
    ("optimizer.lr=.nan", "optimizer.lr=nan"),
    ("streams.pairs.weight=.inf", "streams.pairs.weight=inf: use a finite number"),
    (
        "streams.pairs.batch_size=1000000000000",
        "streams.pairs.batch_size=1000000000000: use at most 1048576",
    ),
    (
        "streams.regions.max_images=1000000000000",
        "streams.regions.max_images=1000000000000: use at most",
    ),
    ("shapes.train=1000000000000", "shapes.train=1000000000000: use at most"),
    ('checkpoint.folder="a\\0b"', "checkpoint.folder='a\\x00b': it holds a NUL"),
    ('data="a\\0b"', "data='a\\x00b': it holds a NUL"),
    ('streams.pairs.paths=["a\\0b"]', "streams.pairs.paths=['a\\x00b']: it holds a NUL"),
]


@pytest.mark.parametrize(("override", "message"), FOREIGN_VALUES)
def test_values_that_no_run_can_have(
    recipe: Path, tmp_path: Path, override: str, message: str
) -> None:
    done = invoke(["pretrain", recipe, override])
    assert done.exit_code == 2
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=1000000000000", "batch_size=1000000000000: use at most 1048576"),
        ("eval_batch_size=1000000000000", "eval_batch_size=1000000000000: use at most 1048576"),
        ("steps=1000000000000", "steps=1000000000000: use less than"),
        ("optimizer.lr=.inf", "optimizer.lr=inf: use a finite number"),
        ('data.splits={val: "a\\0b"}', "data.splits.val='a\\x00b': it holds a NUL"),
    ],
)
def test_values_that_no_fine_tuning_can_have(tmp_path: Path, override: str, message: str) -> None:
    sizes = [
        "model={preset: tiny}",
        f"checkpoint.folder={tmp_path / 'run'}",
        "batch_size=4",
        "tokenizer=x",
    ]
    done = invoke(["finetune", "vqa2", *sizes, override])
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    "name", ["run/log.jsonl", "world/.pairs_train.jsonl.index", "run/quarantine/pairs.jsonl"]
)
def test_a_pipe_among_the_files_of_a_run_hangs_nothing(
    recipe: Path, tmp_path: Path, name: str
) -> None:
    invoke(["pretrain", recipe, "steps=1"])
    for path in (tmp_path / "run").glob("checkpoints"):
        shutil.rmtree(path)
    pipe = tmp_path / name
    pipe.unlink(missing_ok=True)
    pipe.parent.mkdir(exist_ok=True)
    os.mkfifo(pipe)
    done = invoke(["pretrain", recipe, "steps=1"])
    if name == "run/log.jsonl":
        assert done.exit_code == 2
        assert f"{pipe} cannot be written (it is a folder or a device, not a file)" in done.stderr
    else:
        assert done.exit_code == 0, done.stderr
    assert pipe.is_fifo()
