"""Graphs of fine-tuned models compute what the models compute, and their exports answer as the models do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import xfm_fast
from tests.cli.runner import invoke
from tests.export.conftest import Eager
from xfm_fast import checkpoint
from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import VOCABULARY
from xfm_fast.errors import CheckpointError, ExportError, InputError
from xfm_fast.export.expected import generated_examples, graph_memory
from xfm_fast.export.graphs import GraphName, build, default_graphs, needs_all_tokens
from xfm_fast.export.manifest import AxisRecord, Manifest, new_manifest
from xfm_fast.export.pipeline import build_graphs, graph_records
from xfm_fast.export.request import ExportRequest
from xfm_fast.export.runtimes import Spelling
from xfm_fast.export.session import Session
from xfm_fast.export.session import tasks as sessions
from xfm_fast.finetuning.prediction import Predictor
from xfm_fast.models.decoder import DecoderCache
from xfm_fast.packing import ImageGroups, Packing
from xfm_fast.tasks.captioning import CaptioningOptions
from xfm_fast.tasks.grounding import GroundingOptions
from xfm_fast.tasks.image import ImageTaskOptions
from xfm_fast.tasks.models import ClassificationModel
from xfm_fast.tasks.nlvr2 import NLVR2Options
from xfm_fast.tasks.retrieval import RetrievalOptions
from xfm_fast.tasks.task import TaskOptions, explanation, make_task
from xfm_fast.tasks.text import TextTaskOptions
from xfm_fast.tasks.vqa import VQAOptions
from xfm_fast.tasks.weak_grounding import WeakGroundingOptions
from xfm_fast.tokenizer import CaptionTokenizer

SMALL: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "vision_width": 32, "vision_depth": 2, "vision_heads": 2, "text_width": 32,
    "text_heads": 2, "text_layers": 2, "text_intermediate": 64, "fusion_layers": 2, "embed_dim": 16,
    "num_masking_patches": 6, "min_num_patches": 2,
}  # fmt: skip
ANSWERS = ("red", "blue", "a red circle", "a red star", "yes", "no")
OPTIONS: dict[str, TaskOptions] = {
    "captioning": CaptioningOptions(),
    "vqa": VQAOptions(answers=ANSWERS, k="all", decoder_layers=2),
    "vqa_written": VQAOptions(generate=True, decoder_layers=2),
    "nlvr2": NLVR2Options(),
    "grounding": GroundingOptions(),
    "image": ImageTaskOptions(labels=("circle", "star", "square"), head="official_image"),
    "text": TextTaskOptions(labels=("circle", "star", "square"), max_tokens=20),
    "regression": TextTaskOptions(regression=True, max_tokens=20),
    "retrieval": RetrievalOptions(),
    "weak_grounding": WeakGroundingOptions(),
}
QUESTIONS = ["what colour is the red circle?", "is there a star?"]
ASKED: dict[str, tuple[int, list[str]]] = {
    "captioning": (3, []),
    "vqa": (1, QUESTIONS),
    "vqa_written": (1, QUESTIONS),
    "nlvr2": (2, ["there is a red circle"]),
    "grounding": (1, ["a red circle", "the blue star on the left"]),
    "image": (3, []),
    "text": (0, ["red circle", "a blue star and more of them"]),
    "regression": (0, ["red circle"]),
    "retrieval": (2, ["a red circle", "a blue star"]),
}

Tuned = Callable[[str], Path]
Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write three files of noise, none of them square."""
    folder, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(3)]
    for path in paths:
        Image.fromarray(noise.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Folders of weights of a task as runs leave them, random ones in which nothing is zero or one."""
    tokenizer = CaptionTokenizer.train_on_texts([" ".join(VOCABULARY)], 500)
    config, exported = (
        XFMConfig.preset("tiny", vocab_size=tokenizer.vocab_size, **SMALL),
        tmp_path_factory.mktemp("tuned"),
    )

    def make(name: str) -> Path:
        folder = exported / name
        if not folder.exists():
            task = make_task(OPTIONS[name], config, tokenizer)
            torch.manual_seed(0)
            model = task.build()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            checkpoint.save_pretrained(model.state_dict(), config, folder, files=explanation(task))
        return folder

    return make


@pytest.fixture(scope="module")
def exported(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Their exports to ONNX in fp32, for ONNX Runtime or another consumer."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="exports to ONNX are run")
    from xfm_fast.export import export_onnx

    exported = tmp_path_factory.mktemp("exported")

    def make(name: str, consumer: Any = "onnxruntime") -> Path:
        folder = exported / f"{name}-{consumer}"
        if not folder.exists():
            predictor = xfm_fast.load(tuned(name))
            assert isinstance(predictor.model, xfm_fast.XFM)
            export_onnx(
                predictor.model, folder, consumer=consumer, companions=explanation(predictor.task),
                examples=generated_examples(predictor.model.config, images=2, texts=9),
            )  # fmt: skip
        return folder

    return make


def _alike(value: Any, expected: Any) -> None:
    """Compare rows but for the last digits of numbers."""
    if isinstance(expected, float):
        assert math.isclose(value, expected, rel_tol=1e-3, abs_tol=1e-4), (value, expected)
    elif isinstance(expected, dict):
        assert [*value] == [*expected]
        for key in expected:
            _alike(value[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(value) == len(expected)
        for pair in zip(value, expected, strict=True):
            _alike(*pair)
    else:
        assert value == expected


def _graph(tuned: Tuned, task: str, name: GraphName) -> tuple[Any, Any]:
    model: Any = xfm_fast.load(tuned(task)).model
    model = model.double()
    return model, build(name, model, "opset23")


def _close(value: Tensor, expected: Tensor) -> None:
    tolerance = 1e-12 if value.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_classes_of_pairs_are_an_output_of_fusion(tuned: Tuned) -> None:
    config = xfm_fast.load(tuned("image")).model.config
    ids, mask = torch.randint(4, 100, (2, 6)), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    ids, pixels = ids.masked_fill(mask == 0, 1), torch.randn(2, 3, 32, 32)
    model = ClassificationModel(config, 3, modality="pair", head="mlp").eval()
    assert default_graphs(model) == ("vision", "text", "image_memory", "fusion")
    memory = graph_memory(model.image_memory(model.encode_image(pixels))).values()
    value = build("fusion", model, "opset23")(
        model.encode_text(ids, mask)[:, None], mask[:, None], *memory
    )[-1]
    _close(value[:, 0], model.logits(pixels, ids, mask))


@torch.no_grad()
@pytest.mark.parametrize("task", ["vqa", "captioning"])
def test_steps_of_a_decoder(tuned: Tuned, task: str) -> None:
    """Token by token, three texts on each of two states, what all tokens at once compute."""
    model, project = _graph(tuned, task, "decoder_memory")
    step, decoder = build("decoder_step", model, "opset23"), model.text_decoder
    tokens, width = (5, 32) if task == "vqa" else (model.config.num_image_tokens, 32)
    states = torch.randn(2, tokens, width, dtype=torch.float64)
    mask = torch.ones(2, tokens, dtype=torch.long)
    if task == "vqa":
        mask[1, 3:] = 0
    memory, arguments = (
        decoder.memory(states, mask.bool()),
        [*project(states)] + [mask] * (task == "vqa"),
    )
    ids = torch.randint(4, 100, (2, 3, 4))
    every = ids.flatten(0, 1)
    past = DecoderCache(4)
    groups, packing = (
        ImageGroups(torch.tensor([0, 3, 6])),
        Packing.from_mask(torch.ones_like(every)),
    )
    expected = decoder.logits(decoder(every, packing, memory, groups, past=past)).view(2, 3, 4, -1)
    behind = torch.zeros(2, 3, 2, 2, 2, 1, 16, dtype=torch.float64)
    for index in range(4):
        real = torch.full((2, 3, max(index, 1)), int(index > 0))
        logits, present = step(ids[:, :, index], behind, real, *arguments)
        _close(logits, expected[:, :, index])
        for layer in range(2):
            cached = torch.stack(past.known(layer, torch.arange(6)), 2)
            _close(present[:, :, layer].flatten(0, 1), cached[:, index])
        # Past tokens that are hidden are none: one is put in front that would spoil everything.
        new = present[..., None, :]
        behind = new if index == 0 else torch.cat([behind, new], -2)
    spoilt = torch.cat([torch.full_like(behind[..., :1, :], 9.0), behind[..., :3, :]], -2)
    hidden = torch.tensor([0, 1, 1, 1]).expand(2, 3, 4)
    _close(step(ids[:, :, 3], spoilt, hidden, *arguments)[0], expected[:, :, 3])


@pytest.mark.parametrize("task", ASKED)
@pytest.mark.parametrize("narrow", [False, True], ids=["any size", "few at a time"])
def test_sessions_answer_as_the_model(
    tuned: Tuned, images: list[str], task: str, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over graphs that take any size, and over some that take two rows of a batch and a past of three tokens."""
    predictor = xfm_fast.load(tuned(task))
    model = predictor.model
    assert isinstance(model, xfm_fast.XFM)
    built = build_graphs(model, Spelling("primitives", 20), ExportRequest())
    records = graph_records(built, "fp32", {})
    if narrow:
        monkeypatch.setattr(sessions, "_LOGIT_ROWS", 3)
        bounds = {
            "batch": AxisRecord(least=2, most=2), "texts": AxisRecord(least=1, most=2),
            "past": AxisRecord(least=3, most=40), "length": AxisRecord(least=4, most=40),
        }  # fmt: skip
        records = [
            record.model_copy(update={"axes": {axis: bounds[axis] for axis in record.axes}})
            for record in records
        ]
    manifest = new_manifest(
        source="", weights_sha256="", tokenizer_sha256=None, config=model.config.model_dump(), dtype="fp32",
        consumer="onnxruntime", opset=20, attention="primitives", all_tokens=needs_all_tokens(model, False), fixed={},
        versions={}, graphs=records, files=[],
    )  # fmt: skip
    runtime = Eager(built)
    exported = sessions.task_session(predictor.task.options.kind)
    assert exported is not None
    session = exported(Path(), runtime, manifest=manifest)
    session.warm_up()
    count, texts = ASKED[task]
    _alike(
        Predictor(session, predictor.task).predict(images[:count], texts),
        predictor.predict(images[:count], texts),
    )
    assert {*runtime.shapes} == {*built}, "every graph has its part in the answer"


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("task", ASKED)
def test_an_export_answers_as_its_run(
    tuned: Tuned, exported: Exported, images: list[str], task: str, runtime: Any
) -> None:
    pytest.importorskip(runtime, reason="exports are run by it")
    folder = exported(task, runtime)
    manifest = Manifest.load(folder)
    assert (manifest.status, manifest.reason) == ("verified", "")
    count, texts = ASKED[task]
    expected = xfm_fast.load(tuned(task)).predict(images[:count], texts)
    assert expected
    _alike(xfm_fast.load(folder, runtime=runtime).predict(images[:count], texts), expected)


def test_the_commands(tuned: Tuned, images: list[str], tmp_path: Path, exported_fp32: Path) -> None:
    """Export a run; the export predicts as the run."""
    pytest.importorskip("onnxruntime", reason="exports are run by it")
    out, pairs = tmp_path / "out", tmp_path / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"image": image, "caption": "a red circle"}) + "\n" for image in images)
    )
    done = invoke(["export", tuned("image"), "--out", out, "--data", pairs])
    assert done.exit_code == 0, done.output
    assert "run image of the task image" in done.stdout
    assert {"task.json"} <= {record.name for record in Manifest.load(out).files}
    expected = xfm_fast.load(tuned("image")).predict(images)
    done = invoke(["predict", out, *images])
    assert done.exit_code == 0, done.stderr
    _alike(
        [json.loads(line) for line in done.stdout.splitlines()],
        [json.loads(json.dumps(row)) for row in expected],
    )
    lines, answers = tmp_path / "lines.jsonl", tmp_path / "answers.jsonl"
    lines.write_text("".join(json.dumps({"image": image}) + "\n" for image in images))
    assert invoke(["predict", out, "--lines", lines, answers]).exit_code == 0
    assert len(answers.read_text().splitlines()) == len(images)
    assert invoke(["predict", out, images[0], "x", "--heatmap", tmp_path / "h.png"]).exit_code == 2
    session = Session.load(out)
    _alike(session.predict(images), expected)
    assert xfm_fast.load(session).task is session.task, "the vocabulary is read once"
    with pytest.raises(InputError, match="texts"):
        session.predict(texts=["a dog"])
    with pytest.raises(InputError, match="image"):
        Session(out).predict(images)
    (out / "task.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"task\.json"):
        Session.load(out, verify_files=False).predict(images)
    for answer in (xfm_fast.load, lambda folder: Session.load(folder).predict(texts=["a dog"])):
        with pytest.raises(ExportError, match="without a task"):
            answer(exported_fp32)
