"""A session gives what the model gives, over any mix of lengths, images and texts, and says precisely what is wrong."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.export.conftest import eager, pixels_of, texts_of, write_export
from xfm_fast import XFM, Retriever
from xfm_fast.errors import ConfigError, ExportError, InputError, UnavailableError, XFMError
from xfm_fast.export.manifest import record_files
from xfm_fast.export.onnx import export_onnx
from xfm_fast.export.request import OnnxRequest
from xfm_fast.export.session import Session
from xfm_fast.export.slots import PassLimits
from xfm_fast.export.verification import verify_export
from xfm_fast.tasks.reranking import UNSCORED

pytest.importorskip("onnxruntime", reason="sessions over ONNX files need onnxruntime")


@pytest.fixture(scope="module")
def session(exported_fp32: Path) -> Session:
    return Session.load(exported_fp32, "onnxruntime", "cpu")


@pytest.fixture(scope="module", params=["padded", "packed"])
def either(request: pytest.FixtureRequest, session: Session) -> Session:
    """Sessions over graphs that take padded texts, and texts in rows."""
    if request.param == "padded":
        return session
    return Session.load(request.getfixturevalue("exported_packed"), "onnxruntime", "cpu")


def _close(value: Tensor, expected: Tensor) -> None:
    assert value.shape == expected.shape
    assert (value - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("texts", "width"), [(1, 1), (33, 40)])
def test_encoders_are_those_of_the_model(
    either: Session, small_model: XFM, texts: int, width: int
) -> None:
    (ids, mask), pixels = texts_of(texts, width), pixels_of(small_model, texts % 7)
    with torch.inference_mode():
        expected, value = small_model.encode_image(pixels), either.encode_image(pixels)
        _close(value, expected)
        _close(either.project_image(value), small_model.project_image(expected))
        expected = small_model.encode_text(ids, mask)
        for form in (mask, mask.bool(), None):
            value = either.encode_text(ids, form)
            _close(value, expected)
            assert not value[mask == 0].any()
            _close(either.project_text(value), small_model.project_text(expected))


@pytest.mark.parametrize("arrangement", ["one image", "pairs", "gaps in the mask"])
def test_fusion_is_that_of_the_model(
    either: Session, small_model: XFM, arrangement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, texts = {"one image": (1, 19), "pairs": (6, 6)}.get(arrangement, (4, 23))
    ids, mask = texts_of(texts, 17, seed=3)
    index = None if arrangement == "pairs" else torch.randint(0, images, (texts,))
    if arrangement == "gaps in the mask":
        mask[:, 0] = 1
        mask[2, :6] = torch.tensor([1, 0, 1, 1, 0, 1])
    with torch.inference_mode():
        pixels = small_model.encode_image(pixels_of(small_model, images))
        embeds = small_model.encode_text(ids, mask)
        _close(either.encode_text(ids, mask), embeds)
        expected = small_model.fuse(
            embeds, mask, small_model.image_memory(pixels), index, first_token_only=True
        )
        # A token budget changes the passes, and no result.
        for budget in (2048, 40):
            monkeypatch.setattr(either, "limits", PassLimits(budget, pass_tokens=0))
            fused = either.fuse(
                embeds, mask, either.image_memory(pixels), index, first_token_only=True
            )
            _close(fused, expected)
            _close(either.match_logits(fused), small_model.match_logits(expected))
            _close(either.predict_boxes(fused), small_model.predict_boxes(expected))


def test_retrieval_runs_on_a_session_unchanged(
    either: Session, small_model: XFM, tmp_path: Path
) -> None:
    pixels, (ids, mask) = pixels_of(small_model, 6), texts_of(31, 14)
    results = []
    for model in (small_model, either):
        retriever = Retriever(model, token_budget=64)
        images = retriever.embed_images(pixels.split(4))
        texts = retriever.embed_texts([(ids[:20], mask[:20]), (ids[20:], mask[20:])])
        results.append(retriever.rerank(images, texts, k=5))
        if model is either:
            first = retriever.rerank(images, texts, k=5, resume=tmp_path)
            again = retriever.rerank(images, texts, k=5, resume=tmp_path)
            assert (
                again.receipt.pairs_resumed
                == first.receipt.pairs_scored
                == again.receipt.pairs_scored
            )
            assert torch.equal(first.scores, again.scores)
    ours, reference = results[1], results[0]
    assert torch.equal(ours.score_i2t == UNSCORED, reference.score_i2t == UNSCORED)
    _close(ours.scores, reference.scores)


def test_nothing_is_nothing(either: Session, small_model: XFM) -> None:
    ids, mask = torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5, dtype=torch.long)
    embeds = either.encode_text(ids, mask)
    assert embeds.shape == (0, 5, either.config.text_width)
    assert either.project_text(embeds).shape == (0, either.config.embed_dim)
    images = either.encode_image(pixels_of(small_model, 1)[:0])
    assert images.shape == (0, either.config.num_image_tokens, either.config.vision_width)
    memory = either.image_memory(images)
    assert either.match_logits(either.fuse(embeds, mask, memory, first_token_only=True)).shape == (
        0,
        2,
    )


def test_a_fixed_batch_takes_any_number(small_model: XFM, tmp_path: Path) -> None:
    request = OnnxRequest(graphs=["image_memory"], fixed=["batch=2"])
    export_onnx(small_model, tmp_path / "fixed", request, compared=False)
    fixed = Session.load(tmp_path / "fixed", "onnxruntime", "cpu")
    embeds = torch.randn(3, fixed.config.num_image_tokens, fixed.config.vision_width)
    assert (fixed.image_memory(embeds).images, fixed.image_memory(embeds[:0]).images) == (3, 0)


def test_heads_answer_for_the_very_tensor_only(session: Session, small_model: XFM) -> None:
    embeds = session.encode_image(pixels_of(small_model, 2))
    with pytest.raises(InputError, match="encode_image"):
        session.project_image(embeds[:1])
    with pytest.raises(InputError, match="fuse"):
        session.match_logits(torch.zeros(1, 1, session.config.text_width))


def test_threads_share_a_session(session: Session, small_model: XFM) -> None:
    inputs = [texts_of(9, 8, seed=seed) for seed in range(6)]
    alone = [session.encode_text(*pair) for pair in inputs]
    results: list[Tensor | None] = [None] * len(inputs)

    def work(index: int) -> None:
        for _ in range(3):
            results[index] = session.encode_text(*inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, expected in zip(results, alone, strict=True):
        assert result is not None
        _close(result, expected)


def test_one_graph_pads_and_trims_by_itself(session: Session, small_model: XFM) -> None:
    ids, mask = texts_of(2, 5)
    assert (
        session.run("vision", {"pixels": pixels_of(small_model, 1)})["image_embeds"].shape[0] == 1
    )
    with pytest.raises(InputError, match="attention_mask"):
        session.run("text", {"input_ids": ids})
    with pytest.raises(InputError, match=r"attention_mask is \[2, 4\]"):
        session.run("text", {"input_ids": ids, "attention_mask": mask[:, :4]})
    left = torch.ones_like(mask)
    left[1, 0] = 0
    for run in (
        session.encode_text,
        lambda i, m: session.run("text", {"input_ids": i, "attention_mask": m}),
    ):
        with pytest.raises(InputError, match=r"text 1 .*right"):
            run(ids, left)
        with pytest.raises(InputError, match="-1"):
            run(torch.full_like(ids, -1), torch.ones_like(mask))
    with pytest.raises(InputError, match=r"pixels is \[1, 3, 8, 8\]"):
        session.run("vision", {"pixels": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(ExportError, match="graph 'decoder'"):
        session.run("decoder", {})


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_all_tokens_come_where_they_were_exported(
    small_model: XFM, session: Session, tmp_path: Path, packed: bool
) -> None:  # fmt: skip
    ids, mask = texts_of(5, 8)
    index = torch.tensor([0, 1, 0, 0, 1])
    with torch.inference_mode():
        images, embeds = (
            small_model.encode_image(pixels_of(small_model, 2)),
            small_model.encode_text(ids, mask),
        )
        with pytest.raises(UnavailableError, match="token 0"):
            session.fuse(embeds, mask, session.image_memory(images), index)
        graphs: Any = ("image_memory", "fusion")
        write_export(tmp_path, small_model, graphs=graphs, all_tokens=True, packed=packed)
        runtime = eager(small_model, graphs=graphs, all_tokens=True, packed=packed)
        assert verify_export(tmp_path, small_model, runtime=runtime).status == "verified"
        exported = Session(tmp_path, runtime)
        exported.warm_up()
        expected = small_model.fuse(embeds, mask, small_model.image_memory(images), index)
        fused = exported.fuse(embeds, mask, exported.image_memory(images), index)
        _close(fused, expected)
        assert not fused[mask == 0].any()
        _close(exported.match_logits(fused), small_model.match_logits(expected))
        first = exported.fuse(
            embeds, mask, exported.image_memory(images), index, first_token_only=True
        )
        _close(first, expected[:, :1])
    with pytest.raises(ExportError, match="graph 'vision'"):
        exported.encode_image(pixels_of(small_model, 1))


def test_runtimes_that_do_not_run_an_export(exported_fp32: Path) -> None:
    cases: list[tuple[str, Any, type[XFMError]]] = [
        ("tensorrt", None, ExportError), ("coreml", None, UnavailableError), ("onnxruntime", "bf16", UnavailableError),
    ]  # fmt: skip
    for runtime, precision, error in cases:
        with pytest.raises(error, match=precision or runtime):
            Session(exported_fp32, runtime, precision=precision, verify_files=False)


def _graph(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, dict[str, Any]], Any]:
    return lambda folder, content: change(
        next(graph for graph in content["graphs"] if graph["name"] == "text")
    )


def _unlisted_weights(folder: Path, content: dict[str, Any]) -> None:
    import onnx

    graph = content["graphs"][0]
    onnx.save(
        onnx.load(folder / graph["file"]),
        folder / graph["file"],
        save_as_external_data=True,
        location="more",
    )
    content["files"] = [
        record.model_dump()
        for record in record_files(folder, [r["name"] for r in content["files"]])
    ]


FALSE: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "no files": lambda folder, content: content.update(files=[]),
    "unlisted weights": _unlisted_weights,
    "file outside": _graph(lambda graph: graph.update(file="../text.onnx")),
    "not a graph": lambda folder, content: content["graphs"][0].update(file="manifest.json"),
    "unknown input": _graph(lambda graph: graph["inputs"][0].update(name="x")),
    "another type": _graph(lambda graph: graph["inputs"][0].update(dtype="float32")),
    "other dimensions": _graph(lambda graph: graph["inputs"][0].update(dims=["batch"])),
    "huge least": _graph(lambda graph: graph["axes"]["batch"].update(least=2**62)),
    "unknown kind": lambda folder, content: content.update(kind="nothing"),
    "impossible config": lambda folder, content: content["config"].update(vision_heads=7),
}


@pytest.mark.parametrize("change", FALSE.values(), ids=FALSE)
def test_false_manifests_are_refused(
    exported_fp32: Path, tmp_path: Path, change: Callable[[Path, dict[str, Any]], Any]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported_fp32, folder)
    content = json.loads((folder / "manifest.json").read_text())
    change(folder, content)
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(XFMError) as caught:
        Session.load(folder, "onnxruntime", "cpu")
    assert isinstance(caught.value, ExportError | ConfigError | InputError)
