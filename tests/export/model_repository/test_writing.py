"""Model repositories: their configurations, their models against the eager model, and the real server."""

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.runner import invoke
from tests.export.model_repository import pbtxt, triton_client, triton_server
from tests.export.model_repository.fake_triton import FakeServer
from xfm_fast.data.images import load_image
from xfm_fast.errors import ExportError, InputError, StorageError, UnavailableError, XFMError
from xfm_fast.export import manifest as manifests
from xfm_fast.export import model_repository as writing
from xfm_fast.export.manifest import EngineTarget, Manifest, PackageTarget, ProfileRecord
from xfm_fast.export.model_repository import (
    RECEIPT_FILE,
    Receipt,
    RepositoryOptions,
    plan_models,
    render,
    write_model_repository,
)
from xfm_fast.export.slots import DEFAULT_PROFILES
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

CAPTIONS = [
    "a cat sits on the mat",
    "Two dogs, playing in the snow!",
    "red",
    "a long story about a bus that drives through the town and meets a cat and two dogs and then turns back " * 3,
]  # fmt: skip

_PACKAGE = PackageTarget(torch="2.9.0", device="cpu", architecture="x86_64")


def photo(seed: int, *, width: int = 48, height: int = 37) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.fixture(scope="module")
def tokenizer(small_model: XFM) -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts([pre_caption(text) for text in CAPTIONS], small_model.config.vocab_size)


@pytest.fixture(scope="module")
def repository(exported_fp32: Path, tokenizer: CaptionTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime", reason="the fake server runs graphs by ONNX Runtime")
    out = tmp_path_factory.mktemp("repository") / "models"
    options = RepositoryOptions(device="cpu", most_images=4, most_captions=20)
    write_model_repository(exported_fp32, out, options, tokenizer=tokenizer)
    return out


@torch.no_grad()
def eager_scores(model: XFM, tokenizer: CaptionTokenizer, images: list[bytes], captions: list[str]) -> np.ndarray:
    pixels = torch.stack([load_image(image, model.config.image_size) for image in images])
    ids, mask = tokenizer.encode([pre_caption(text) for text in captions], 40)
    memory = model.image_memory(model.encode_image(pixels))
    rows = []
    for image in range(len(images)):
        index = torch.full((len(captions),), image)
        fused = model.fuse(model.encode_text(ids, mask), mask, memory, index, first_token_only=True)
        rows.append(model.match_logits(fused)[:, 1])
    return torch.stack(rows).numpy()


def encoded(*captions: str) -> list[bytes]:
    return [caption.encode() for caption in captions]


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: pbtxt.read(path.read_text()) for path in folder.glob("*/config.pbtxt")}


def test_models_of_a_repository(repository: Path, exported_fp32: Path) -> None:
    found = configs(repository)
    assert set(found) == {f"xfm_{name}" for name in ("vision", "text", "image_memory", "fusion", "match", "rank")}
    manifest = Manifest.load(exported_fp32)
    size = manifest.xfm_config.image_size
    vision = found["xfm_vision"]
    assert vision["input"] == [{"name": "pixels", "data_type": "TYPE_FP32", "dims": [3, size, size]}]
    assert vision["dynamic_batching"] == {
        "preferred_batch_size": [4, 8, 16, 32], "max_queue_delay_microseconds": 500,
    }  # fmt: skip
    fusion = {tensor["name"]: tensor for tensor in found["xfm_fusion"]["input"]}
    assert fusion["attention_mask"]["dims"] == [-1, -1]
    assert fusion["attention_mask"]["data_type"] == "TYPE_INT64"
    for name, config in found.items():
        assert config["name"] == name
        assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
        if name != "xfm_rank":
            graph = name.removeprefix("xfm_")
            assert (config["platform"], config["default_model_filename"]) == ("onnxruntime_onnx", f"{graph}.onnx")
            assert [path.name for path in (repository / name / "1").iterdir()] == [f"{graph}.onnx"]
            assert [warm["batch_size"] for warm in config["model_warmup"]] == [1, 4]


def test_receipt_names_every_file(repository: Path) -> None:
    receipt = Receipt.load(repository)
    there = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
    assert {file.name for file in receipt.files} | {RECEIPT_FILE} == there
    for file in receipt.files:
        assert manifests.sha256(repository / file.name) == file.sha256
        assert (repository / file.name).stat().st_size == file.bytes
    assert str(repository.parent) not in (repository / RECEIPT_FILE).read_text()


def test_scores_and_orders_are_those_of_the_model(
    repository: Path, small_model: XFM, tokenizer: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer(repository, monkeypatch)
    images = [photo(1), photo(2, width=9), photo(1)]
    captions = [*CAPTIONS, CAPTIONS[0]]
    (answer,) = server.rank((images, encoded(*captions)))
    assert isinstance(answer, dict), answer
    expected = eager_scores(small_model, tokenizer, images, captions)
    np.testing.assert_allclose(answer["scores"], expected, rtol=0, atol=1e-4)
    assert answer["scores"].std() > 0.01
    np.testing.assert_array_equal(answer["caption_order"], np.argsort(-answer["scores"], axis=1, kind="stable"))
    np.testing.assert_array_equal(answer["image_order"], np.argsort(-answer["scores"].T, axis=1, kind="stable"))
    assert answer["reused"].tolist() == [False] * 3
    assert server.calls.count("xfm_vision") == 1 + 1, "once to warm up, once for both images"


def test_images_are_encoded_once(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer(repository, monkeypatch)
    (first,) = server.rank(([photo(1)], encoded("a cat")))
    server.calls.clear()
    (second,) = server.rank(([photo(1), photo(3)], encoded("a cat", "a dog")))
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert second["reused"].tolist() == [True, False]
    np.testing.assert_allclose(second["scores"][0, 0], first["scores"][0, 0], atol=1e-5)
    server.calls.clear()
    server.rank(([photo(3)], encoded("a cat")))
    assert not {"xfm_vision", "xfm_image_memory"} & set(server.calls)


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        ([], ["a cat"], "0 images"),
        ([photo(1)], [], "0 captions"),
        ([photo(1)] * 5, ["a cat"], "5 images"),
        ([photo(1)], ["a cat"] * 21, "21 captions"),
        ([photo(1), b"\xff\xd8\xff not a photograph"], ["a cat"], "image 1"),
        ([photo(1)[:200]], ["a cat"], "image 0"),
        ([b"%!PS-Adobe-3.0"], ["a cat"], "image 0 (14 bytes"),
        ([b""], ["a cat"], "image 0 (0 bytes"),
        ([b"\xff\xd8\xff" + bytes(33 << 20)], ["a cat"], "33,554,432"),
        ([photo(1)], ["a cat", "?!"], "caption 1"),
        ([photo(1)], ["word " * 500], "caption 0 has 2,500"),
    ],
)
def test_bad_requests_fail_alone(
    repository: Path, monkeypatch: pytest.MonkeyPatch, images: list[bytes], captions: list[str], message: str
) -> None:
    server = FakeServer(repository, monkeypatch, only="xfm_rank")
    for name in ("vision", "text", "image_memory", "fusion"):
        server._load(repository / f"xfm_{name}")
    good = ([photo(1)], encoded("a cat", "a dog"))
    before, wrong, after = server.rank(good, (images, encoded(*captions)), good)
    assert isinstance(wrong, str)
    assert message in wrong
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    np.testing.assert_array_equal(before["scores"], after["scores"])


def test_an_edited_tokenizer_is_not_loaded(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = Path(shutil.copytree(repository, tmp_path / "models"))
    (copied / "xfm_rank" / "1" / "tokenizer.json").write_text("{}")
    with pytest.raises(Exception, match=r"xfm_rank: .*tokenizer\.json is truncated"):
        FakeServer(copied, monkeypatch, only="xfm_rank")


def _engines(exported: Path, profiles: dict[str, dict[str, tuple[int, int, int]]], kind: Any = "tensorrt") -> Manifest:
    """The manifest of an export as that of engines with these profiles."""
    manifest = Manifest.load(exported)
    graphs = []
    for graph in manifest.graphs:
        records = []
        for name, axes in profiles.items():
            shapes = [
                {t.name: [axes[d][place] if isinstance(d, str) else d for d in t.dims] for t in graph.inputs}
                for place in range(3)
            ]
            records.append(ProfileRecord(name=name, least=shapes[0], best=shapes[1], most=shapes[2]))
        graphs.append(graph.model_copy(update={"file": f"{graph.name}.engine", "profiles": records}))
    target = EngineTarget(library=kind, version="10.9", compute_capabilities=[90])
    return manifest.model_copy(update={"kind": kind, "target": target, "graphs": graphs})


def test_engines_are_plans_with_a_context_for_each_profile(exported_fp32: Path, tokenizer: CaptionTokenizer) -> None:
    profiles = {
        "latency": {"batch": (1, 1, 1), "texts": (1, 16, 64), "length": (1, 16, 40)},
        "bulk": {"batch": (1, 16, 64), "texts": (1, 16, 32), "length": (1, 16, 40)},
    }
    planned = {
        model.name: model for model in plan_models(_engines(exported_fp32, profiles), RepositoryOptions(), tokenizer)
    }
    for model in planned.values():
        pbtxt.read(render(model.config))
    vision = planned["xfm_vision"].config
    assert vision["platform"] == "tensorrt_plan"
    assert vision["default_model_filename"] == "vision.engine"
    assert vision["max_batch_size"] == 64
    assert vision["instance_group"] == [{"count": 1, "kind": "KIND_GPU", "profile": ["0", "1"]}]
    assert vision["dynamic_batching"]["preferred_batch_size"] == [16]
    assert [warm["name"] for warm in vision["model_warmup"]] == ["latency: batch=1", "bulk: batch=16"]
    # Two requests of 64 texts would make a batch that no profile takes.
    fusion = planned["xfm_fusion"].config
    assert (fusion["max_batch_size"], "dynamic_batching" in fusion) == (0, False)
    assert fusion["input"][1]["dims"] == [-1, -1, -1]
    assert [warm["inputs"][1]["value"]["dims"] for warm in fusion["model_warmup"]] == [[1, 16, 16], [16, 16, 16]]
    assert planned["xfm_rank"].config["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    # A CUDA graph of the best shape of each profile, which serves smaller batches and nothing shorter.
    latency, bulk = planned["xfm_text"].config["optimization"]["cuda"]["graph_spec"]
    assert (latency["batch_size"], bulk["batch_size"]) == (1, 16)
    assert bulk["graph_lower_bound"] == {"batch_size": 1, "input": bulk["input"]}
    assert [each["value"]["dim"] for each in bulk["input"]] == [[16], [16]]
    (first, _) = fusion["optimization"]["cuda"]["graph_spec"]
    assert (sorted(first), first["input"][1]["value"]["dim"]) == (["input"], [1, 16, 16])


def test_fusion_is_batched_with_the_default_profiles(exported_fp32: Path) -> None:
    profiles = {
        profile.name: {axis: (sizes.least, sizes.best, sizes.most) for axis, sizes in profile.axes.items()}
        for profile in DEFAULT_PROFILES
    }
    for model in plan_models(_engines(exported_fp32, profiles), RepositoryOptions(pipeline="graphs"), None):
        assert model.config["max_batch_size"] == 32
        assert model.config["dynamic_batching"]["preferred_batch_size"] == [16]


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"status": "failed", "reason": "off by one"}, {}, ExportError, "off by one"),
        ({"drop": "fusion"}, {}, ExportError, "fusion"),
        ({}, {"tokenizer": None}, InputError, "--tokenizer"),
        ({"tokenizer_sha256": "0" * 64}, {}, InputError, "tokenizer of the export"),
        ({"kind": "tensorrt-rtx"}, {}, ExportError, "tensorrt-rtx"),
        ({"kind": "aoti", "package": _PACKAGE}, {}, ExportError, "aoti"),
        ({"kind": "tensorrt"}, {"device": "cpu"}, ExportError, "device cpu"),
        ({"packed": True}, {}, ExportError, "--packed"),
        ({}, {"device": "tpu"}, UnavailableError, "device 'tpu'"),
        ({}, {"prefix": "../x"}, InputError, r"'\.\./x'"),
        ({}, {"most_images": 0}, InputError, "most_images is 0"),
    ],
)
def test_what_cannot_be_served_is_said_first(
    exported_fp32: Path,
    tokenizer: CaptionTokenizer,
    changes: dict[str, Any],
    options: dict[str, Any],
    error: type[XFMError],
    message: str,
) -> None:
    manifest = Manifest.load(exported_fp32)
    dropped = changes.pop("drop", None)
    graphs = [graph for graph in manifest.graphs if graph.name != dropped]
    manifest = manifest.model_copy(update={**changes, "graphs": graphs})
    given = options.pop("tokenizer", tokenizer)
    with pytest.raises(error, match=message):
        plan_models(manifest, RepositoryOptions(**options), given)


def test_what_is_there_is_not_replaced_unasked(
    exported_fp32: Path, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "models"
    out.mkdir()
    write_model_repository(exported_fp32, out, tokenizer=tokenizer)
    with pytest.raises(StorageError, match="--overwrite"):
        write_model_repository(exported_fp32, out, tokenizer=tokenizer)
    write_model_repository(exported_fp32, out, RepositoryOptions(prefix="new"), tokenizer=tokenizer, overwrite=True)
    assert {path.name[:3] for path in out.iterdir() if path.is_dir()} == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    (out / RECEIPT_FILE).unlink()
    with pytest.raises(StorageError, match=r"has no repository\.json"):
        write_model_repository(exported_fp32, out, tokenizer=tokenizer, overwrite=True)
    with pytest.raises(InputError, match="contain each other"):
        write_model_repository(exported_fp32, exported_fp32 / "models", tokenizer=tokenizer)


def test_foreign_files_are_not_replaced(exported_fp32: Path, tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    out = tmp_path / "models"
    receipt = write_model_repository(exported_fp32, out, tokenizer=tokenizer)
    foreign = [out / "theirs/1/model.plan", out / receipt.models[0].name / "notes.md"]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
        with pytest.raises(StorageError, match=path.name):
            write_model_repository(exported_fp32, out, tokenizer=tokenizer, overwrite=True)
        assert path.read_bytes() == b"mine"
        path.unlink()
    write_model_repository(exported_fp32, out, RepositoryOptions(prefix="new"), tokenizer=tokenizer, overwrite=True)


def test_a_failure_leaves_what_was_there(
    exported_fp32: Path, tokenizer: CaptionTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "models"
    write_model_repository(exported_fp32, out, tokenizer=tokenizer)
    before = (out / RECEIPT_FILE).read_bytes()
    copy: Callable[..., Any] = shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if source.name == "fusion.onnx":
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(writing.shutil, "copyfile", full)
    for folder, overwrite in ((out, True), (tmp_path / "fresh", False)):
        with pytest.raises(StorageError, match="No space left on device"):
            write_model_repository(exported_fp32, folder, tokenizer=tokenizer, overwrite=overwrite)
    assert (out / RECEIPT_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_command(exported_fp32: Path, tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    arguments = ["export", "model-repository", str(exported_fp32), "--out", str(tmp_path / "models")]
    done = invoke([*arguments, "--tokenizer", str(tmp_path), "--prefix", "a"])
    assert done.exit_code == 0, done.output
    assert "a_rank" in done.output
    assert "tritonserver --model-repository=" in done.output
    assert Receipt.load(tmp_path / "models").tokenizer_sha256 == tokenizer.sha256()
    done = invoke([*arguments, "--overwrite"])
    assert done.exit_code == 2
    assert done.stderr.startswith("xfm-fast: ")
    assert Receipt.load(tmp_path / "models").models[0].name.startswith("a_")


@pytest.mark.slow
def test_the_real_server(
    repository: Path, exported_fp32: Path, small_model: XFM, tokenizer: CaptionTokenizer, tmp_path: Path
) -> None:
    """Start `tritonserver`, ask it over HTTP, ask it wrongly, ask it again: scores are those of the eager model."""
    environment = triton_server.environment()
    write_model_repository(exported_fp32, tmp_path / "onnx", RepositoryOptions(prefix="onnx"), tokenizer=tokenizer)
    served = Path(shutil.copytree(repository, tmp_path / "served"))
    for path in served.glob("*/1/*.onnx"):
        # The wheel has no backend but that of Python.
        shutil.copy(Path(triton_server.__file__).with_name("onnx_model.py"), path.with_name("model.py"))
        config = path.parents[1] / "config.pbtxt"
        lines = config.read_text().replace('platform: "onnxruntime_onnx"', 'backend: "python"').splitlines(True)
        config.write_text("".join(line for line in lines if "default_model_filename" not in line))
    good: tuple[list[bytes], list[str]] = ([photo(1), photo(2)], CAPTIONS)
    other = ([photo(2)], CAPTIONS[:2])
    bad: list[tuple[list[bytes], list[str]]] = [
        ([photo(1)[:200]], ["a cat"]),
        ([b"%!PS-Adobe-3.0"], ["a cat"]),
        ([photo(1)], ["?!"]),
        ([photo(1)] * 5, ["a cat"]),
        ([photo(1)], ["a cat"] * 21),
        ([photo(1)], ["word " * 500]),
        ([photo(1)], []),
    ]

    def request(images: list[bytes], captions: list[str]) -> dict[str, list[str]]:
        return {
            "images": [base64.b64encode(image).decode() for image in images],
            "captions": [base64.b64encode(caption.encode()).decode() for caption in captions],
        }

    configured = [*repository.glob("*/config.pbtxt"), *(tmp_path / "onnx").glob("*/config.pbtxt")]
    with triton_server.serving(served, environment, tmp_path) as address:
        job = {
            "url": address,
            "model": "xfm_rank",
            "parse": [str(path) for path in configured],
            "requests": [
                [request(*good)],
                [request(*query) for query in (*bad, good, other)],
                [request(*good)],
            ],
        }  # fmt: skip
        done = subprocess.run(
            [environment / "bin" / "python", triton_client.__file__],
            input=json.dumps(job), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parsed"] == [path.parent.name for path in configured]
    (first,), mixed, (last,) = found["answers"]
    expected = eager_scores(small_model, tokenizer, *good)
    for answer in (first, mixed[-2], last):
        np.testing.assert_allclose(answer["scores"], expected, rtol=0, atol=1e-4)
        assert answer["caption_order"] == np.argsort(-np.array(answer["scores"]), kind="stable").tolist()
    np.testing.assert_allclose(mixed[-1]["scores"], expected[1:, :2], rtol=0, atol=1e-4)
    assert (first["reused"], last["reused"]) == ([False, False], [True, True])
    for answer, message in zip(
        mixed,
        ("is damaged or truncated", "JPEG", "caption 0", "5 images", "21 captions", "2,500", "0 captions"),
        strict=False,
    ):  # fmt: skip
        assert message in answer["error"]
