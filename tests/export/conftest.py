"""Models to export, and exports of them that tests of this folder share: made once in a test process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.data.shapes import VOCABULARY, Scene, captions, render, scene
from xfm_fast.export.expected import Examples, pad_texts
from xfm_fast.export.graphs import DTYPES, Graph, in_dtype
from xfm_fast.export.manifest import Manifest, new_manifest, record_files
from xfm_fast.export.pipeline import build_graphs, graph_records
from xfm_fast.export.request import DEFAULT_GRAPHS, GRAPHS, DType, ExportRequest, GraphName
from xfm_fast.export.runtimes import Runtime, Spelling
from xfm_fast.export.slots import Slot
from xfm_fast.export.verification import verify_export
from xfm_fast.models.xfm import XFM
from xfm_fast.tokenizer import CaptionTokenizer

# Two layers of everything, so that what is special about the last one shows.
_SIZES = {"vision_depth": 2, "text_layers": 2, "fusion_layers": 2}

_STEPS = 160


def build_model(**changes: Any) -> XFM:
    """Build a small model in which nothing is zero or one, so that every term takes part in comparisons."""
    # The same weights for whoever calls it: what tests say of their errors is of these.
    torch.manual_seed(0)
    config = XFMConfig.preset("tiny", **{**_SIZES, **changes})
    return _stirred(XFM(config, heads=("contrastive", "matching", "boxes")))


def _stirred(model: XFM) -> XFM:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def texts_of(count: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and masks of texts of 1 to `width` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (count, 1), generator=generator)
    mask = (torch.arange(width) < lengths).long()
    ids = torch.randint(4, 200, (count, width), generator=generator)
    return ids.masked_fill(mask == 0, 1), mask


def pixels_of(model: XFM, count: int) -> Tensor:
    size = model.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


Spoil = Callable[[str, dict[str, Tensor]], None]


class Eager(Runtime):
    """Runs graphs in PyTorch, and lets `spoil` change what they return; `shapes` are those of first inputs."""

    description, device = "PyTorch", torch.device("cpu")

    def __init__(
        self, built: Mapping[Any, Graph], spoil: Spoil = lambda graph, outputs: None
    ) -> None:
        self.built, self.spoil = built, spoil
        self.shapes: dict[str, set[tuple[int, ...]]] = {}

    def load(self, record: Any, path: Path) -> Any:
        def run(
            inputs: Mapping[str, Tensor], slot: Slot, sizes: Mapping[str, int]
        ) -> dict[str, Tensor]:
            values = [inputs[tensor.name] for tensor in record.inputs]
            self.shapes.setdefault(record.name, set()).add(tuple(values[0].shape))
            results = self.built[record.name](*values)
            outputs = {
                tensor.name: value for tensor, value in zip(record.outputs, results, strict=True)
            }
            self.spoil(record.name, outputs)
            return outputs

        return run


_SPELLING = Spelling("opset23", 23)


def write_export(
    folder: Path,
    model: XFM,
    dtype: DType = "fp32",
    graphs: tuple[GraphName, ...] = GRAPHS,
    *,
    fixed: dict[str, int] | None = None,
    all_tokens: bool = False,
    packed: bool = False,
) -> Path:
    """Write a folder with a manifest but without graphs, for `eager`."""
    fixed = fixed or {}
    request = ExportRequest(dtype, graphs, fixed, all_tokens, packed)  # pyright: ignore[reportArgumentType]
    records = graph_records(build_graphs(model, _SPELLING, request), dtype, fixed, ".onnx")
    new_manifest(
        source="a small model", weights_sha256="", tokenizer_sha256=None, config=model.config.model_dump(), dtype=dtype,
        consumer="onnxruntime", opset=23, attention="opset23", all_tokens=all_tokens, packed=packed, fixed=fixed,
        versions={}, graphs=records, files=[],
    ).save(folder)  # fmt: skip
    return folder


def eager(
    model: XFM,
    dtype: DType = "fp32",
    graphs: tuple[GraphName, ...] = GRAPHS,
    *,
    all_tokens: bool = False,
    packed: bool = False,
    **spoil: Any,
) -> Eager:
    """Run the graphs of a model by PyTorch."""
    built = build_graphs(
        model, _SPELLING, ExportRequest(graphs=graphs, all_tokens=all_tokens, packed=packed)
    )
    return Eager({name: in_dtype(graph, DTYPES[dtype]) for name, graph in built.items()}, **spoil)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., XFM]:
    """`build_model`, which takes changes of the configuration."""
    return build_model


@pytest.fixture(scope="session")
def small_model() -> XFM:
    """Build the model behind the shared exports; not to be changed."""
    return build_model()


def scenes_examples(model: XFM, first: int, images: int) -> Examples:
    """Held-out scenes of one thing, from a number on, and captions of those and others."""
    plain = [
        drawn
        for drawn in (scene(0, first + n, "val") for n in range(200))
        if len(drawn.things) == 1
    ]
    texts = sorted({captions(drawn)[0] for drawn in plain})[:24]
    assert model.tokenizer is not None
    rows = model.tokenizer.encode_ids(texts, 16)
    return Examples(
        _pixels(plain[:images], model),
        *pad_texts(rows, model.config.pad_token_id),
        f"{images} scenes of shapes",
    )


def _pixels(scenes: list[Scene], model: XFM) -> Tensor:
    images = torch.stack(
        [torch.from_numpy(render(drawn, model.config.image_size)) for drawn in scenes]
    )
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Fill a folder once for all processes of a test run; copy it before changing it."""
    root = factory.getbasetemp()
    # Each process of pytest-xdist has a folder of its own in that of the run.
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / f"{name}.lock"):
        if not (root / name).exists():
            make(root / f"{name}.part")
            (root / f"{name}.part").rename(root / name)
    return root / name


@pytest.fixture(scope="session")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> XFM:
    """Train a model for a few seconds to rank captions of shapes: random weights have no ranks to lose."""
    return XFM.from_pretrained(
        once(tmp_path_factory, "trained", lambda folder: _trained().save_pretrained(folder))
    )


def _trained() -> XFM:
    tokenizer = CaptionTokenizer.train_on_texts([" ".join(VOCABULARY)], 500)
    still = {
        "drop_path_rate": 0.0,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "layer_scale_init": 1.0,
    }
    torch.manual_seed(0)
    model = XFM(XFMConfig.preset("tiny", vocab_size=tokenizer.vocab_size, **_SIZES, **still))
    model.tokenizer = tokenizer
    scenes = [scene(0, index) for index in range(1500)]
    scenes = [drawn for drawn in scenes if len(drawn.things) == 1]
    texts = [captions(drawn)[0] for drawn in scenes]
    pixels, (ids, mask) = _pixels(scenes, model), pad_texts(tokenizer.encode_ids(texts, 16), 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(_STEPS):
        rows = torch.randint(len(scenes), (32,))
        same = torch.tensor([[texts[a] == texts[b] for b in rows] for a in rows]).float()
        images, words = model.encode_image(pixels[rows]), model.encode_text(ids[rows], mask[rows])
        alike = model.project_image(images) @ model.project_text(words).T / 0.07
        targets = same / same.sum(1, keepdim=True)
        wrong = torch.multinomial(1 - same, 1).squeeze(1)
        fused = model.fuse(
            torch.cat([words, words[wrong]]), torch.cat([mask[rows], mask[rows[wrong]]]), model.image_memory(images),
            torch.arange(32).repeat(2), first_token_only=True,
        )  # fmt: skip
        loss = F.cross_entropy(model.match_logits(fused), (torch.arange(64) < 32).long())
        loss = loss + (F.cross_entropy(alike, targets) + F.cross_entropy(alike.T, targets.T)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _exported(
    factory: pytest.TempPathFactory,
    model: XFM,
    name: str,
    dtype: str,
    graphs: Sequence[str],
    **form: Any,
) -> Path:
    pytest.importorskip("onnx", reason="exports to ONNX need onnx")
    pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
    from xfm_fast.export.onnx import export_onnx

    def make(folder: Path) -> None:
        export_onnx(model, folder, dtype=dtype, graphs=graphs, source="a small model", **form)
        verify_export(folder, model)

    return once(factory, name, make)


@pytest.fixture(scope="session")
def exported_fp32(small_model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the four graphs that a server composes, in fp32, with a reference; copy it before changing it."""
    return _exported(tmp_path_factory, small_model, "fp32", "fp32", DEFAULT_GRAPHS)


@pytest.fixture(scope="session")
def exported_packed(
    exported_fp32: Path, small_model: XFM, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Export the graphs of `exported_fp32` with texts in rows; those of images are the same."""
    texts = _exported(
        tmp_path_factory, small_model, "packed_texts", "fp32", ("text", "fusion"), packed=True
    )

    def make(folder: Path) -> None:
        shutil.copytree(exported_fp32, folder)
        shutil.copytree(texts, folder, dirs_exist_ok=True)
        manifest, images = Manifest.load(texts), Manifest.load(exported_fp32)
        manifest.graphs = [
            *(images.graph(name) for name in ("vision", "image_memory")),
            *manifest.graphs,
        ]
        manifest.files = record_files(folder, [record.name for record in images.files])
        manifest.save(folder)
        verify_export(folder, small_model)

    return once(tmp_path_factory, "packed", make)


@pytest.fixture(scope="session")
def exported_fp16(small_model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the graph `vision` in fp16."""
    return _exported(tmp_path_factory, small_model, "fp16", "fp16", ("vision",))


TARGETS = (80, 120)
"""The GPUs of `bf16_engines`."""


@pytest.fixture(scope="session")
def bf16_engines(small_model: XFM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of TensorRT for RTX of the four graphs that a server composes, the graphs beside them."""
    pytest.importorskip("tensorrt_rtx", reason="builds engines with tensorrt-rtx")
    from xfm_fast.export.engines import export_engines

    def make(folder: Path) -> None:
        export_engines(
            small_model, folder, "tensorrt-rtx", dtype="bf16", sm=",".join(map(str, TARGETS)), keep_onnx=True,
            source="a small model",
        )  # fmt: skip

    return once(tmp_path_factory, "bf16_engines", make)
