"""Golden vectors of the official code, and what every test shares: few threads, fixed seeds."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import lzma
import os
import random
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from xfm_fast.config import XFMConfig
    from xfm_fast.kernels.cpu.gemm import Layout

# Whoever imports Triton first decides for the whole process whether kernels are compiled or interpreted, and parts of
# PyTorch import it: without a GPU, tests interpret. Those that compile start a process of their own.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

# What a user may have set would decide instead of the tests.
for _name in ("XFM_API_KEY", "XFM_CPU_CHOICES", "XFM_DEBUG"):
    os.environ.pop(_name, None)

CASES = ["tiny_a", "tiny_b"]
PACKED = Path(__file__).parent / "golden"

# Tensors this small gain nothing from a second thread, and wait long for it on a busy machine.
torch.set_num_threads(1)
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("reproducible")
_import_or_skip = pytest.importorskip


def _import_installed_or_skip(name: str, *args: Any, **options: Any) -> Any:
    """Import a module, or skip where it is not installed; one that is there and cannot be imported fails."""
    words = name.split(".")
    for count in range(1, len(words) + 1):
        part = ".".join(words[:count])
        if importlib.util.find_spec(part) is None:
            break
        importlib.import_module(part)
    return _import_or_skip(name, *args, **options)


pytest.importorskip = _import_installed_or_skip


def _missing_instructions(error: BaseException) -> str | None:
    """Return what this processor lacks if an error says so, and the processor too."""
    if "dtype='int8' is not offered here" in str(error):
        from xfm_fast.kernels.cpu import int8

        return int8.why_not()
    asked = "bfloat16 on this CPU" in str(error) or "bf16 path needs the cpu support" in str(error)
    if asked and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no bfloat16 instructions"
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Skip a test that asked for instructions that the processor lacks."""
    try:
        return (yield)
    except (ValueError, RuntimeError) as error:
        reason = _missing_instructions(error)
        if reason is None:
            raise
        pytest.skip(reason)


_unpacked = tempfile.TemporaryDirectory(prefix="xfm-golden-")


def golden(relative_path: str) -> Path:
    """The file with these golden vectors; skips the test where there is none.

    The folder named by `XFM_GOLDEN` (a complete set) comes first, then the part kept in `tests/golden`, where
    large files are xz-compressed.
    """
    complete = os.environ.get("XFM_GOLDEN")
    if complete and (Path(complete) / relative_path).is_file():
        return Path(complete) / relative_path
    if (PACKED / relative_path).is_file():
        return PACKED / relative_path
    if (PACKED / f"{relative_path}.xz").is_file():
        return _unpack(relative_path)
    hint = (
        f"nor in XFM_GOLDEN={complete}"
        if complete
        else "and XFM_GOLDEN, the folder of a complete set, is not set"
    )
    pytest.skip(
        f"golden vectors {relative_path} are not in tests/golden {hint}", allow_module_level=True
    )


@cache
def _unpack(relative_path: str) -> Path:
    path = Path(_unpacked.name) / relative_path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.decompress((PACKED / f"{relative_path}.xz").read_bytes()))
    return path


def load_tensors(name: str) -> dict[str, Tensor]:
    """All tensors of `<name>.safetensors`, such as `load_tensors("tiny_b/weights")`."""
    return load_file(golden(f"{name}.safetensors"))


def load_json(name: str) -> Any:
    """The content of `<name>.json`, such as `load_json("tiny_b/config")`."""
    return json.loads(golden(f"{name}.json").read_text())


def config(case: str, **overrides: Any) -> XFMConfig:
    """The configuration of `tiny_a`, `tiny_b` or `base`."""
    # The tests of kernels run where nothing is installed that configurations need.
    from xfm_fast.config import XFMConfig

    if case == "base":
        return XFMConfig.preset("base", **overrides)
    return XFMConfig.from_official(load_json(f"{case}/config"), **overrides)


@cache
def official_keys(model: str = "base") -> dict[str, dict[str, Any]]:
    """Every state-dict entry of an official base-size class: name -> `{"shape", "dtype", "kind", ...}`.

    Args:
        model: `base` for the pretraining model, or a fine-tuning class such as `XFMForVQA`, in its own naming.
    """
    keys: dict[str, dict[str, Any]] = load_json("official_keys_base")["keys"]
    if model == "base":
        return keys
    change = load_json(f"official_keys_{model}")
    lacking = set(change["pretrain_keys_not_in_this_model"])
    shapes = {
        name: both["this"] for name, both in change["shape_differs_from_pretrain_224"].items()
    }
    out = {}
    for name, entry in keys.items():
        if name not in lacking:
            fine_tuned = re.sub(r"^text_encoder\.roberta\.", "text_encoder.", name)
            out[fine_tuned] = entry | {"shape": shapes.get(fine_tuned, entry["shape"])}
    return out | change["keys_not_in_pretrain"]


def base_shapes() -> dict[str, list[int]]:
    """Name -> shape of every floating-point entry of the official base model."""
    return {
        name: entry["shape"]
        for name, entry in official_keys().items()
        if entry["dtype"] == "float32"
    }


def base_tensor(name: str, shape: Iterable[int]) -> Tensor:
    """The weight that the base-size vectors were computed with: normal noise seeded by the name, scaled by kind."""
    shape = tuple(shape)
    if name == "temp":
        return torch.full(shape, 0.07)
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    noise = generator.standard_normal(shape).astype(np.float32)
    single = np.float32
    if "relative_position_bias_table" in name:
        value = single(0.2) * noise
    elif ".gamma_" in name:
        value = single(0.1) + single(0.01) * noise
    elif len(shape) == 1 and name.endswith("weight"):
        value = single(1) + single(0.1) * noise
    elif len(shape) > 1 and re.search(r"\.(query|key|qkv)\.", name):
        value = single(0.04) * noise
    else:
        value = single(0.02) * noise
    return torch.from_numpy(np.asarray(value))


def base_state(shapes: Mapping[str, Iterable[int]] | None = None) -> dict[str, Tensor]:
    """Official base-size weights, for all floating-point entries (1.8 GB) or those in `shapes`; tied names share."""
    ties = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
        "lm_cap_head.decoder.bias": "lm_cap_head.bias",
    }
    made: dict[str, Tensor] = {}
    out = {}
    for name, shape in (base_shapes() if shapes is None else shapes).items():
        part, _, rest = name.partition(".")
        origin = (
            f"{part}.{ties[rest]}"
            if part in ("text_encoder", "fusion_encoder") and rest in ties
            else name
        )
        if origin not in made:
            made[origin] = base_tensor(origin, shape)
        out[name] = made[origin]
    return out


def base_inputs() -> dict[str, Tensor]:
    """The inputs of the base-size vectors; `base/inputs` holds the integers and image corners to check them by."""
    # One generator feeds everything, so the order of the draws is part of the rule.
    draw = np.random.Generator(np.random.PCG64(20230105))
    out: dict[str, np.ndarray] = {}
    for size in (224, 384):
        out[f"image_{size}"] = draw.standard_normal((2, 3, size, size)).astype(np.float32)
    for length, real in ((30, (30, 17)), (40, (13, 40))):
        ids = draw.integers(4, 50264, size=(2, length))
        mask = np.arange(length) < np.array(real)[:, None]
        ids[:, 0] = 0
        ids[range(2), [count - 1 for count in real]] = 2
        ids[~mask] = 1
        out[f"text_{length}_ids"], out[f"text_{length}_atts"] = ids, mask.astype(np.int64)
    masked = out["text_30_ids"].copy()
    positions, labels = np.zeros((2, 15), np.int64), np.full((2, 15), -100, np.int64)
    for row, (length, count) in enumerate(((30, 15), (17, 8))):
        chosen = draw.permutation(np.arange(1, length))[:count]
        positions[row, :count] = chosen
        labels[row, :count] = masked[row, chosen]
        masked[row, chosen] = 50264
    out |= {"text_30_ids_masked": masked, "masked_pos": positions, "masked_ids": labels}
    patches = np.zeros((2, 196), np.uint8)
    for row in patches:
        row[draw.permutation(196)[:75]] = 1
    out["image_mask_224"] = patches
    return {name: torch.from_numpy(value) for name, value in out.items()}


def pytest_collection_finish() -> None:
    """Tests and what they import stay to the end, near a million objects: the collector need not go through them each
    time, which would take half a second of every export."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests of a GPU are collected everywhere, so that a machine without one can count them, and skipped there."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that PyTorch can use")


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The code of a layer is compiled eight times in a process at most; a later test would fail, or run uncompiled and
    say nothing."""
    if (compiler := sys.modules.get("torch._dynamo")) is not None:
        compiler.reset()
    # A resumed run repeats the choices of its file for the rest of the process.
    if nextitem is not None and nextitem.path == item.path:
        return
    if (selection := sys.modules.get("xfm_fast.kernels.cpu.selection")) is not None:
        for key, settled in [*selection._selections.items()]:
            if settled.source == "settled":
                del selection._selections[key]


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    _seed(0)


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """What outlives a test is made before that test's seed is set, and would be drawn from where the last test ended,
    which is chance where tests run side by side: it has a seed of its own."""
    if fixturedef.scope != "function":
        _seed(zlib.crc32(fixturedef.argname.encode()))


def _seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@pytest.fixture
def freeze_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Layout], None]:
    """Weights are frozen in one layout, whichever is fastest here; in panels where a kernel takes them."""
    from xfm_fast.kernels.cpu import gemm

    def choose(layout: Layout) -> None:
        def layout_of(weight: Tensor, **_: Any) -> Layout:
            return layout if layout != "panels" or gemm._fits(weight) else "plain"

        monkeypatch.setattr(gemm, "layout_of", layout_of)

    return choose


@pytest.fixture
def int8_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights marked for int8 are multiplied in it, whether or not that is faster here."""
    from xfm_fast.kernels.cpu import int8, selection

    for layer in int8._LAYERS:
        for operation in (f"{layer} in 8 bits", f"{layer} in 8 bits of few rows"):
            for dtype in (torch.float32, torch.bfloat16):
                choice = selection.Selection(operation, dtype, "int8", {}, {}, "settled")
                monkeypatch.setitem(selection._selections, (operation, dtype), choice)
