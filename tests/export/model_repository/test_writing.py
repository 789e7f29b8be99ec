"""Model repositories: their configurations, and their models against the eager model."""

import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.runner import invoke
from tests.export.model_repository.fake_triton import FakeServer, TritonError, read_config
from xfm_fast.data.images import load_image
from xfm_fast.errors import ExportError, InputError, StorageError, XFMError
from xfm_fast.export.manifest import EngineTarget, Manifest
from xfm_fast.export.model_repository import (
    RepositoryOptions,
    plan_models,
    render,
    write_model_repository,
)
from xfm_fast.export.slots import DEFAULT_PROFILES, Slot, graph_profiles, parse_profiles
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

CAPTIONS = [
    "a cat sits on the mat",
    "Two dogs, playing in the snow!",
    "red",
    "a long story about a bus that drives through the town and meets a cat and two dogs and then turns back " * 3,
]  # fmt: skip


def photo(seed: int, *, width: int = 48, height: int = 37) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.fixture(scope="module")
def tokenizer(small_model: XFM) -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts(
        [pre_caption(text) for text in CAPTIONS], small_model.config.vocab_size
    )


@pytest.fixture(scope="module")
def repository(
    exported_fp32: Path, tokenizer: CaptionTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    pytest.importorskip("onnxruntime", reason="the fake server runs graphs by ONNX Runtime")
    out = tmp_path_factory.mktemp("repository") / "models"
    write_model_repository(exported_fp32, out, RepositoryOptions(device="cpu"), tokenizer=tokenizer)
    return out


@torch.no_grad()
def eager_scores(
    model: XFM, tokenizer: CaptionTokenizer, images: list[bytes], captions: list[str]
) -> np.ndarray:
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


def test_models_of_a_repository(repository: Path, exported_fp32: Path) -> None:
    paths = repository.glob("*/config.pbtxt")
    configs = {path.parent.name: read_config(iter(path.read_text().splitlines())) for path in paths}
    assert set(configs) == {
        f"xfm_{name}" for name in ("vision", "text", "image_memory", "fusion", "rank")
    }
    size = Manifest.load(exported_fp32).xfm_config.image_size
    vision = configs["xfm_vision"]
    assert vision["input"] == [
        {"name": "pixels", "data_type": "TYPE_FP32", "dims": [3, size, size]}
    ]
    assert (vision["max_batch_size"], vision["dynamic_batching"]) == (
        32,
        {"max_queue_delay_microseconds": 500},
    )
    fusion = {tensor["name"]: tensor for tensor in configs["xfm_fusion"]["input"]}
    assert (fusion["attention_mask"]["dims"], fusion["attention_mask"]["data_type"]) == (
        [-1, -1],
        "TYPE_INT64",
    )
    for name, config in configs.items():
        assert config["name"] == name
        assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
        if (graph := name.removeprefix("xfm_")) != "rank":
            assert (config["platform"], config["default_model_filename"]) == (
                "onnxruntime_onnx",
                f"{graph}.onnx",
            )
            assert [path.name for path in (repository / name / "1").iterdir()] == [f"{graph}.onnx"]
            assert [warm["batch_size"] for warm in config["model_warmup"]] == [1]


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
    np.testing.assert_array_equal(
        answer["caption_order"], np.argsort(-answer["scores"], axis=1, kind="stable")
    )
    np.testing.assert_array_equal(
        answer["image_order"], np.argsort(-answer["scores"].T, axis=1, kind="stable")
    )
    assert answer["reused"].tolist() == [False] * 3
    assert server.calls.count("xfm_vision") == 1 + 1, "once to warm up, once for both images"
    server.calls.clear()
    (again,) = server.rank((images[:1], encoded("a cat")))
    assert isinstance(again, dict)
    assert again["reused"].tolist() == [True]
    assert not {"xfm_vision", "xfm_image_memory"} & set(server.calls)


def test_bad_requests_fail_alone(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad: list[tuple[list[bytes], list[str], str]] = [
        ([], ["a cat"], "0 images"),
        ([photo(1)] * 17, ["a cat"], "17 images"),
        ([photo(1), b"\xff\xd8\xff not a photograph"], ["a cat"], "image 1"),
        ([b"\xff\xd8\xff" + bytes(33 << 20)], ["a cat"], "33,554,432"),
        ([photo(1)], ["a cat", "?!"], "caption 1"),
        ([photo(1)], ["word " * 500], "caption 0 has 2,500"),
    ]
    good = ([photo(1)], encoded("a cat", "a dog"))
    requests = [(images, encoded(*captions)) for images, captions, _ in bad]
    server = FakeServer(repository, monkeypatch)
    before, *wrong, after = server.rank(good, *requests, good)
    # Status 400 over HTTP.
    assert server.codes == [TritonError.INVALID_ARG] * len(bad)
    for (*_, message), answer in zip(bad, wrong, strict=True):
        assert isinstance(answer, str)
        assert message in answer
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    np.testing.assert_array_equal(before["scores"], after["scores"])
    # Errors of the server are none of its clients', and an older one has no codes.
    with monkeypatch.context() as patched:
        patched.setattr(server.models["xfm_rank"].ranker, "rank", None)
        assert "not callable" in str(server.rank(good))
        assert server.codes == [1]
        patched.delattr(TritonError, "INVALID_ARG")
        assert "0 images" in str(server.rank(requests[0]))
        assert server.codes == [1]


def test_an_edited_tokenizer_is_not_loaded(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(repository, tmp_path / "models"))
    (copied / "xfm_rank" / "1" / "tokenizer.json").write_text("{}")
    with pytest.raises(Exception, match=r"xfm_rank: .*tokenizer\.json is truncated"):
        FakeServer(copied, monkeypatch, only="_rank")


def _planned(exported: Path, profiles: Sequence[Slot], **options: Any) -> dict[str, dict[str, Any]]:
    """Plan the configurations of engines of an export with these profiles."""
    manifest = Manifest.load(exported)
    graphs = [
        graph.model_copy(
            update={"file": f"{graph.name}.engine", "profiles": graph_profiles(graph, profiles)}
        )
        for graph in manifest.graphs
    ]
    target = EngineTarget(library="tensorrt", version="10.9", compute_capabilities=[90])
    engines = manifest.model_copy(update={"kind": "tensorrt", "target": target, "graphs": graphs})
    models = plan_models(engines, RepositoryOptions(pipeline="graphs", **options), None)
    return {model.name: read_config(render(model.config)) for model in models}


def test_engines_are_plans_with_a_context_for_each_profile(exported_fp32: Path) -> None:
    profiles = parse_profiles(
        [
            "latency:batch=1,texts=1..16..64,length=1..16..40",
            "bulk:batch=1..16..64,texts=1..16..32,length=1..16..40",
        ]
    )
    planned = _planned(exported_fp32, profiles)
    vision = planned["xfm_vision"]
    assert (vision["platform"], vision["default_model_filename"]) == (
        "tensorrt_plan",
        "vision.engine",
    )
    assert vision["max_batch_size"] == 64
    assert vision["instance_group"] == [{"count": 1, "kind": "KIND_GPU", "profile": ["0", "1"]}]
    # Batches of the tuned size are preferred, and both tuned shapes captured.
    assert vision["dynamic_batching"]["preferred_batch_size"] == [16]
    captured = vision["optimization"]["cuda"]
    assert captured["graphs"]
    assert [spec["batch_size"] for spec in captured["graph_spec"]] == [1, 16]
    assert [spec["graph_lower_bound"]["batch_size"] for spec in captured["graph_spec"]] == [1, 1]
    # Two requests of 64 texts would make a batch that no profile takes.
    fusion = planned["xfm_fusion"]
    assert (fusion["max_batch_size"], "dynamic_batching" in fusion) == (0, False)
    assert fusion["input"][1]["dims"] == [-1, -1, -1]
    assert [warm["inputs"][1]["value"]["dims"] for warm in fusion["model_warmup"]] == [
        [1, 16, 16],
        [16, 16, 16],
    ]
    specs = fusion["optimization"]["cuda"]["graph_spec"]
    assert [spec["input"][1] for spec in specs] == [
        {"key": "attention_mask", "value": {"dim": [*dims]}} for dims in ((1, 16, 16), (16, 16, 16))
    ]
    assert not any("batch_size" in spec or "graph_lower_bound" in spec for spec in specs)


def test_fusion_is_batched_with_the_default_profiles(exported_fp32: Path) -> None:
    assert {
        config["max_batch_size"] for config in _planned(exported_fp32, DEFAULT_PROFILES).values()
    } == {32}


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"status": "failed", "reason": "off by one"}, {}, ExportError, "off by one"),
        ({"drop": "fusion"}, {}, ExportError, "fusion"),
        ({"tokenizer_sha256": "0" * 64}, {}, InputError, "tokenizer of the export"),
        ({"kind": "tensorrt-rtx"}, {}, ExportError, "tensorrt-rtx"),
        ({"packed": True}, {}, ExportError, "--packed"),
        ({}, {"prefix": "../x"}, InputError, r"'\.\./x'"),
    ],
)
def test_unservable_exports_are_refused_first(
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
    words = options.pop("tokenizer", tokenizer)
    with pytest.raises(error, match=message):
        plan_models(manifest, RepositoryOptions(**options), words)


def test_a_repository_has_a_folder_of_its_own(
    exported_fp32: Path,
    tokenizer: CaptionTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is replaced, and a failure leaves nothing."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_bytes(b"mine")
    with pytest.raises(StorageError, match=r"^[^(]*theirs exists;"):
        write_model_repository(exported_fp32, tmp_path / "theirs", tokenizer=tokenizer)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["file"]
    with pytest.raises(InputError, match="models"):
        write_model_repository(exported_fp32, exported_fp32 / "models", tokenizer=tokenizer)
    copy: Callable[..., Any] = shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if source.name == "fusion.onnx":
            raise OSError(28, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_model_repository(exported_fp32, tmp_path / "fresh", tokenizer=tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_command(exported_fp32: Path, tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    folder = shutil.copytree(exported_fp32, tmp_path / "exported")
    tokenizer.save(folder / "tokenizer.json")
    arguments = ["export", "model-repository", str(folder), "--out", str(tmp_path / "models")]
    done = invoke(arguments)
    assert done.exit_code == 0, done.output
    assert "xfm_rank" in done.output
    assert "tritonserver --model-repository=" in done.output
    done = invoke(arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("xfm-fast: ")
