"""`xfm-fast bench` and `bench list` as a user meets them, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.runner import invoke

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
TINY = ["--random", "tiny", "--quick", "--baselines", "xfm-fast", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_scenario_is_printed_and_saved(tmp_path: Path) -> None:
    command = ["bench", "embed-text", "--mode", "offline", *TINY, "--out", str(tmp_path)]
    done = invoke(command)
    assert done.exit_code == 0, done.output
    assert "saved: " in done.output
    latest = json.loads((tmp_path / "latest.json").read_text())
    assert (latest["schema_version"], latest["benchmark"]) == (4, "scenario")
    assert [row["backend"] for row in latest["rows"]] == ["xfm-fast", "official-algorithm"]
    assert (tmp_path / "latest.html").stat().st_size > 1000


def test_the_list_has_all_scenarios_and_baselines() -> None:
    done = invoke(["bench", "list"])
    assert done.exit_code == 0, done.output
    for name in (
        "embed-image",
        "embed-text",
        "rerank",
        "retrieve",
        "vqa-best",
        "captioning",
        "train-step",
        "kernels",
    ):
        assert name in done.output
    for name in (
        "official-algorithm",
        "official-code",
        "huggingface",
        "timm",
        "onnxruntime",
        "openvino",
        "tensorrt-rtx",
    ):
        assert name in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption"], "did you mean captioning?"),
        (["xyz"], "embed-image, embed-text"),
        (["rerank", "--random", "huge"], 'Choose from: "tiny", "base"'),
        (["rerank", "--dtype", "fp8"], 'Choose from: "auto", "fp32", "bf16"'),
        (["rerank", "--model", "m", "--random", "tiny", "--quick"], "--model m and --random tiny"),
        (["--official", "folder"], "--official"),
        (["coco", "--random", "tiny", "--p99-ms", "3"], "--p99-ms"),
        (["serve", "--baselines", "timm"], "--baselines"),
        (["rerank", "--clients", "3"], "--clients"),
    ],
)
def test_what_is_unknown_is_named(words: list[str], message: str) -> None:
    done = invoke(["bench", *words])
    assert done.exit_code == 2
    assert message in done.stderr
