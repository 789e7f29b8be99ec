"""An export behind the HTTP service answers as the model does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from xfm_fast.data.images import MEAN
from xfm_fast.models.processor import XFMProcessor
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer

pytest.importorskip("fastapi", reason="the extra 'serve'")
pytest.importorskip("uvicorn", reason="the extra 'serve'")
pytest.importorskip("prometheus_client", reason="the extra 'serve'")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from tests.serve.conftest import image, photo, running
from xfm_fast.export import Session, export_onnx, write_model_repository
from xfm_fast.serve import Service, ServiceOptions, SourceOptions, load
from xfm_fast.serve.model import XFMModel

CAPTIONS = ["a red circle", "two blue squares", "a green triangle"]


@pytest.fixture(scope="module")
def words(small_model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    CaptionTokenizer.train_on_texts(CAPTIONS, small_model.config.vocab_size).save(path)
    return path


def test_an_export_is_served(
    exported_fp32: Path, small_model: XFM, words: Path, tmp_path: Path
) -> None:
    served = load(exported_fp32, SourceOptions(tokenizer=words, device="cpu"), 1 << 24, "small")
    assert isinstance(served, XFMModel)
    assert (served.name, served.random, served.heads) == (
        "small",
        False,
        ("contrastive", "matching"),
    )
    (tmp_path / "1.png").write_bytes(photo(1))
    with running(Service([served], ServiceOptions(port=0))) as service:
        request_body = {"query": image(1), "documents": CAPTIONS, "model": "small"}
        answers = [service.post("/v1/rerank", request_body).json() for _ in range(2)]
        embedded = service.post("/v1/embeddings", {"input": [*CAPTIONS, image(1)]}).json()
    model = XFM(small_model.config, heads=small_model.heads).eval()
    model.load_state_dict(small_model.state_dict())
    model.load_tokenizer(str(words), tmp_path)
    expected = model.match(tmp_path / "1.png", CAPTIONS).tolist()
    for answer in answers:
        scores_by_index = {item["index"]: item["relevance_score"] for item in answer["results"]}
        np.testing.assert_allclose(
            [scores_by_index[index] for index in range(3)], expected, rtol=0, atol=1e-4
        )
    rows = [item["embedding"] for item in embedded["data"]]
    features = [*model.encode(CAPTIONS).tolist(), model.encode(tmp_path / "1.png").tolist()]
    np.testing.assert_allclose(rows, features, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_tokenizer_and_preprocessing_travel_with_an_export(
    small_model: XFM, words: Path, tmp_path: Path
) -> None:
    model = XFM(small_model.config, heads=small_model.heads).eval()
    model.load_tokenizer(str(words), tmp_path)
    assert model.tokenizer is not None
    manifest = export_onnx(model, tmp_path / "out")
    assert {"tokenizer.json", "preprocessor_config.json", "README.md"} <= {
        record.name for record in manifest.files
    }
    import onnx

    described = onnx.load(
        str(tmp_path / "out" / "text.onnx"), load_external_data=False
    ).metadata_props
    facts = {entry.key: entry.value for entry in described}
    assert (
        facts["xfm_fast.tokenizer_sha256"] == manifest.tokenizer_sha256 == model.tokenizer.sha256()
    )
    assert json.loads(facts["xfm_fast.preprocessing"])["image_mean"] == [*MEAN]
    assert json.loads(facts["xfm_fast.special_tokens"])["eos"] == model.tokenizer.eos_token_id
    commands = re.findall(
        r"trtexec --onnx=(\w+)\.onnx .*--maxShapes=(\S+)",
        (tmp_path / "out" / "README.md").read_text(),
    )
    assert {name: shapes.count(":") for name, shapes in commands} == {
        graph.name: len(graph.inputs) for graph in manifest.graphs
    }
    served = load(tmp_path / "out", SourceOptions(device="cpu"), 0)
    assert isinstance(served, XFMModel)
    assert served.tokenizer.sha256() == model.tokenizer.sha256()
    (tmp_path / "1.png").write_bytes(photo(1))
    request_files = {"images": [tmp_path / "1.png"], "text": CAPTIONS}
    expected = XFMProcessor(model.config, model.tokenizer)(**request_files)
    scores_by_index = Session(tmp_path / "out").processor(**request_files)
    assert {name: value.tolist() for name, value in scores_by_index.items()} == {
        name: value.tolist() for name, value in expected.items()
    }
    write_model_repository(tmp_path / "out", tmp_path / "models")
    assert (tmp_path / "models" / "xfm_rank" / "1" / "tokenizer.json").exists()
