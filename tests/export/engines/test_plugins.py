"""Plugins without TensorRT: numbers of the kernels in the interpreter, their PTX, their launches, and their graphs."""

# Triton's stubs do not know that a constant is passed as a plain number.
# pyright: reportArgumentType=false

from __future__ import annotations

import inspect
import json
import operator
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xfm_fast.errors import ExportError, UnavailableError
from xfm_fast.export.engines import plugin_graphs, plugins
from xfm_fast.export.engines.library import load_library
from xfm_fast.models.xfm import XFM

triton = pytest.importorskip("triton")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run in the interpreter, TRITON_INTERPRET=1"
)


@interpreted
@pytest.mark.parametrize(("tokens", "batch"), [(17, 3), (70, 1)])
def test_relpos_kernel_of_the_plugin(tokens: int, batch: int) -> None:
    from xfm_fast.export.engines import plugin_kernels

    heads, width, block = 2, 32, 32
    q, k, v = (torch.randn(batch, heads, tokens, width, dtype=torch.float16) for _ in range(3))
    bias = torch.randn(heads, tokens, tokens)
    scale = width**-0.5
    padded = plugin_graphs.padded_bias(bias, scale)
    out = torch.full_like(q, float("nan"))
    lse = torch.full((batch, heads, tokens), float("nan"))
    kernel = SimpleNamespace(tiles={"BLOCK_M": block})
    grid = (plugin_kernels.relpos_programs(kernel, batch, heads, tokens),)
    plugin_kernels.relpos_plugin_kernel[grid](
        q, k, v, padded, batch, out, lse, TOKENS=tokens, HEADS=heads, COLUMNS=padded.shape[-1], SCALE=scale, D_A=32,
        D_B=0, PRECISION="tf32", BLOCK_M=block, BLOCK_N=32, TAIL=32 if tokens % 32 else 0,
    )  # fmt: skip
    scores = q.double() @ k.double().transpose(-1, -2) * scale + bias.double()
    expected, plain = scores.softmax(-1) @ v.double(), F.scaled_dot_product_attention(q, k, v, bias.half()[None])
    # fp16 holds the bias too: the error is compared with that of the same precision in PyTorch, plus one rounding.
    allowed = 2 * (plain.double() - expected).abs().max() + 2**-10 * expected.abs().max()
    assert (out.double() - expected).abs().max() <= allowed
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-2, rtol=1e-3)


@interpreted
@pytest.mark.parametrize("masked", [False, True])
def test_varlen_kernel_of_the_plugin(masked: bool) -> None:
    from xfm_fast.export.engines import plugin_kernels

    sequences, queries, keys, heads, width, block = 3, 5, 21, 2, 32, 32
    q = torch.randn(sequences, queries, heads, width, dtype=torch.float16)
    k, v = (torch.randn(sequences, keys, heads, width, dtype=torch.float16) for _ in range(2))
    real = torch.arange(keys) < torch.tensor([21, 4, 1])[:, None]
    cu_q, cu_k = (torch.arange(sequences + 1, dtype=torch.int32) * length for length in (queries, keys))
    out, lse = torch.full_like(q, float("nan")), torch.full((heads, sequences * queries), float("nan"))
    kernel = SimpleNamespace(tiles={"BLOCK_M": block})
    tiles = plugin_kernels.varlen_tiles(kernel, sequences * queries, sequences)
    plugin_kernels.varlen_plugin_kernel[(tiles * heads,)](
        q, k, v, cu_q, cu_k, real.int().flatten(), sequences, tiles, sequences * queries, out, lse, HEADS=heads,
        SCALE=width**-0.5, D_A=32, D_B=0, PRECISION="tf32", HAS_MASK=masked, BLOCK_M=block, BLOCK_N=16,
    )  # fmt: skip
    mask = real[:, None, None] if masked else None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask).transpose(1, 2)
    plain = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    allowed = 2 * (plain.double() - expected).abs().max() + 2**-10 * expected.abs().max()
    assert (out.double() - expected).abs().max() <= allowed
    assert lse.isfinite().all()


def test_ptx_signature_and_launch() -> None:
    """What the engine would hold, for three architectures: it assembles, and its arguments are those of the launch."""
    if sys.platform != "linux":
        pytest.skip("Triton compiles on Linux")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("plugin_ptx.py")
    done = subprocess.run(
        [sys.executable, str(script), "[80, 90, 120]"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 6
    for one in found:
        assert one["assembled"], one["said"]
        assert "0 bytes spill stores" in one["said"]
        assert one["name"] == one["entry"]
        assert one["parameters"] == ["u64" if kind == "pointer" else "u32" for kind in one["arguments"].values()]
        assert one["threads"] == one["required"]
        assert 0 < one["shared"] <= 48 * 1024
        assert not one["paths"]
        # Inputs, then integers, then outputs: the order in which TensorRT passes them.
        expected = {
            "relpos": [*"qkv", "bias", "batch", "out", "lse"],
            "varlen": [*"qkv", "cu_q", "cu_k", "mask", "sequences", "tiles", "queries", "out", "lse"],
        }[one["form"]]
        assert [name.removesuffix("_ptr") for name in one["arguments"]] == expected
        interface = plugins.INTERFACES[f"{one['form']}_attention"]
        assert list(one["arguments"].values()).index("int32") == len(interface.tensors)


PTX = """.version 8.7
.visible .entry f(
\t.param .u64 .ptr .global .align 1 f_param_0,
\t.param .u32 f_param_1,
\t.param .u64 .ptr .global .align 1 f_param_2,
\t.param .u64 .ptr .global .align 1 f_param_3
)
.reqntid 128
{
\tld.param.b64 %rd1, [f_param_0];
}
"""


def test_parameters_of_tritons_launcher_are_taken_away() -> None:
    from xfm_fast.export.engines.plugin_kernels import launch_arguments_only

    short = launch_arguments_only(PTX, {"x": "pointer", "n": "int32"})
    assert "f_param_1" in short
    assert "f_param_2" not in short
    assert "f_param_3" not in short
    assert short.count("{") == 1
    assert ",\n)" not in short
    with pytest.raises(ExportError, match=r"scratch memory \(f_param_3\)"):
        launch_arguments_only(PTX.replace("[f_param_0]", "[f_param_3]"), {"x": "pointer", "n": "int32"})
    with pytest.raises(ExportError, match="in another form"):
        launch_arguments_only(PTX, {"n": "int32", "x": "pointer"})
    with pytest.raises(ExportError, match="in another form"):
        launch_arguments_only(
            PTX.replace(".u64 .ptr .global .align 1 f_param_3", ".u32 f_param_3"), {"x": "pointer", "n": "int32"}
        )
    with pytest.raises(ExportError, match="no entry"):
        launch_arguments_only("", {})


class Symbol(int):
    """A symbolic integer: like the real one it knows `+ - * //` with a number on its right alone, and its results are
    no `SymInt32`, so that a kernel's argument must be wrapped anew."""


for _name in ("add", "sub", "mul", "floordiv"):
    _of_two = getattr(operator, _name)
    setattr(Symbol, f"__{_name}__", lambda self, other, of_two=_of_two: Symbol(of_two(int(self), int(other))))
    setattr(Symbol, f"__r{_name}__", None)


class SymInt32(Symbol):
    pass


class Tensor:
    def __init__(self, shape_expr: tuple[int, ...], dtype: str) -> None:
        self.shape_expr, self.dtype = tuple(map(SymInt32, shape_expr)), dtype

    def like(self) -> Tensor:
        return Tensor(self.shape_expr, self.dtype)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As much of `tensorrt.plugin` as our plugins use; that the real one takes them, `real_tensorrt` shows.

    `registered` and `implemented` hold their functions by their ids.
    """
    plugin: Any = SimpleNamespace(
        registered={}, implemented={}, TensorDesc=Tensor, from_shape_expr=Tensor, SymInt32=SymInt32
    )
    plugin.register = lambda name: partial(plugin.registered.__setitem__, name)
    plugin.aot_impl = lambda name: partial(plugin.implemented.__setitem__, name)
    plugin.KernelLaunchParams, plugin.SymIntExprs = SimpleNamespace, SimpleNamespace(from_tuple=tuple)
    types = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT"}
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0", **types))
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    monkeypatch.setattr(plugins, "_registered", {})
    return plugin


def compiled(name: str, arguments: dict[str, str], tiles: dict[str, int], calls: list[Any]) -> Callable[..., Any]:
    def compile_it(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return SimpleNamespace(name=name, ptx="ptx", arguments=arguments, threads=256, shared_bytes=40960, tiles=tiles)

    return compile_it


def test_relpos_plugin_as_tensorrt_sees_it(tensorrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from xfm_fast.export.engines import plugin_kernels

    plugins.register(load_library("tensorrt"), 90)
    calls: list[Any] = []
    arguments = dict.fromkeys(("q", "k", "v", "bias"), "pointer") | {
        "batch": "int32",
        "out": "pointer",
        "lse": "pointer",
    }
    monkeypatch.setattr(plugin_kernels, "compile_relpos", compiled("f", arguments, {"BLOCK_M": 128}, calls))
    q = tensorrt.TensorDesc((8, 12, 197, 64), "BF16")
    attributes = {"heads": 12, "head_dim": 64, "tokens": 197, "columns": 256, "scale": 0.125}
    out, lse = tensorrt.registered["xfm::relpos_attention"](q, q, q, q, **attributes)
    assert out.shape_expr == (8, 12, 197, 64)
    assert (lse.shape_expr, lse.dtype) == ((8, 12, 197), "FLOAT")
    # TensorRT passes everything by position.
    name, ptx, launch, integers = tensorrt.implemented["xfm::relpos_attention"](
        q, q, q, q, *attributes.values(), (out, lse), None
    )
    assert (name, ptx) == (b"f", b"ptx")
    assert (launch.grid_x, launch.block_x, launch.shared_mem) == (2 * 8 * 12, 256, 40960)
    assert integers == (8,)
    assert isinstance(integers[0], SymInt32)
    assert calls == [(("bf16", 90), attributes)]


def test_varlen_plugin_as_tensorrt_sees_it(tensorrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from xfm_fast.export.engines import plugin_kernels

    plugins.register(load_library("tensorrt"), 80)
    calls: list[Any] = []
    arguments: dict[str, str] = dict.fromkeys(("sequences", "tiles", "queries"), "int32")
    monkeypatch.setattr(plugin_kernels, "compile_varlen", compiled("f", arguments, {"BLOCK_M": 64}, calls))
    q, k = (tensorrt.TensorDesc((6, length, 12, 64), "HALF") for length in (40, 577))
    attributes = {"heads": 12, "head_dim": 64, "masked": 1, "small_tiles": 0, "scale": 0.125}
    out, lse = tensorrt.registered["xfm::varlen_attention"](q, k, k, q, q, q, **attributes)
    assert lse.shape_expr == (12, 6, 40)
    *_, launch, integers = tensorrt.implemented["xfm::varlen_attention"](
        q, k, k, q, q, q, *attributes.values(), (out, lse), None
    )
    tiles = 240 // 64 + 6
    assert launch.grid_x == tiles * 12
    assert integers == (6, tiles, 240)
    assert all(isinstance(value, SymInt32) for value in integers)
    assert calls[0][1]["masked"] is True
    single = tensorrt.TensorDesc((6, 40, 12, 64), "FLOAT")
    with pytest.raises(ExportError, match="bf16 and fp16"):
        tensorrt.implemented["xfm::varlen_attention"](single, k, k, q, q, q, *attributes.values(), (out, lse), None)


def test_plugins_are_registered_once_for_one_architecture(tensorrt: Any) -> None:
    library = load_library("tensorrt")
    plugins.register(library, 90)
    plugins.register(library, 90)
    assert {*tensorrt.registered} == {*tensorrt.implemented} == {"xfm::relpos_attention", "xfm::varlen_attention"}
    for name, interface in plugins.INTERFACES.items():
        described, implemented = (
            [*inspect.signature(known[f"xfm::{name}"]).parameters]
            for known in (tensorrt.registered, tensorrt.implemented)
        )
        assert described == [*interface.tensors, *interface.attributes]
        assert implemented == [*described, "outputs", "tactic"]
    with pytest.raises(ExportError, match="for SM90; build for SM80 in another process"):
        plugins.register(library, 80)


def test_libraries_without_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.1.0"))
    monkeypatch.setattr(plugins.metadata, "version", lambda name: "2.4.1")
    with pytest.raises(
        UnavailableError, match=r"TensorRT 11\.1\.0 do not work with NumPy 2\.4\.1; pip install 'numpy<2\.4'"
    ):
        plugins.check_plugins(load_library("tensorrt"))
    monkeypatch.setattr(plugins.metadata, "version", lambda name: "2.3.5")
    plugins.check_plugins(load_library("tensorrt"))
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UnavailableError, match="leave out --plugins"):
        plugins.check_plugins(load_library("tensorrt-rtx"))


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def reference_plugins() -> list[Any]:
    """Both plugins in NumPy, for ONNX's reference evaluator."""
    from onnx.reference.op_run import OpRun

    class relpos_attention(OpRun):
        op_domain = "xfm"

        def _run(self, q, k, v, bias, *, scale, tokens, columns, heads, head_dim, **_):
            assert q.shape[1:] == (heads, tokens, head_dim)
            assert bias.shape == (heads, tokens, columns)
            assert np.isneginf(bias[:, :, tokens:]).all()
            scores = (q.astype(np.float64) @ k.swapaxes(-1, -2) + bias[:, :, :tokens]) * scale
            return (_softmax(scores) @ v).astype(q.dtype), scores.max(-1).astype(np.float32)

    class varlen_attention(OpRun):
        op_domain = "xfm"

        def _run(self, q, k, v, cu_q, cu_k, mask, *, scale, heads, head_dim, masked, small_tiles=0, **_):
            assert q.shape[2:] == k.shape[2:] == (heads, head_dim)
            assert cu_q.dtype == cu_k.dtype == mask.dtype == np.int32
            rows, keys, values = (t.reshape(-1, heads, head_dim).astype(np.float64) for t in (q, k, v))
            out = np.full(rows.shape, np.nan)
            for s in range(len(cu_q) - 1):
                of_q, of_k = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
                scores = np.einsum("qhd,khd->hqk", rows[of_q], keys[of_k]) * scale
                if masked:
                    scores = np.where(mask[of_k] != 0, scores, -np.inf)
                out[of_q] = np.einsum("hqk,khd->qhd", _softmax(scores), values[of_k])
            return out.reshape(q.shape).astype(q.dtype), np.zeros(1, np.float32)

    return [relpos_attention, varlen_attention]


@pytest.fixture(scope="module")
def graphs(make_model: Callable[..., XFM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs for TensorRT of a model whose heads are as wide as the kernels want them, fp16."""
    pytest.importorskip("onnxscript")
    from xfm_fast.export.onnx import export_onnx

    folder = tmp_path_factory.mktemp("plugins")
    model = make_model(vision_heads=2, text_heads=2)
    export_onnx(model, folder, consumer="tensorrt", dtype="fp16", graphs=("vision", "text", "fusion"))
    return folder


@pytest.mark.parametrize(("name", "count"), [("vision", 2), ("text", 2), ("fusion", 4)])
def test_graphs_with_plugins_compute_the_same(graphs: Path, tmp_path: Path, name: str, count: int) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    ort = pytest.importorskip("onnxruntime")
    path = tmp_path / f"{name}.onnx"
    shutil.copy(graphs / path.name, path)
    assert plugin_graphs.carry_attention(path, longest={"batch": 4, "texts": 4, "length": 40}) == count
    model = onnx.load(path)
    carried = [node for node in model.graph.node if node.domain == "xfm"]
    assert len(carried) == count
    for node in carried:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes.pop("plugin_namespace") == b"xfm"
        assert attributes.pop("aot") == 1
        assert attributes.pop("plugin_version") == b"1"
        interface = plugins.INTERFACES[node.op_type]
        assert set(attributes) == set(interface.attributes)
        assert len(node.input) == len(interface.tensors)
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "texts": 3, "length": 7}
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        shape = [sizes.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
        if value.name == "attention_mask":
            real = np.arange(np.prod(shape[:-1])) % 7 + 1
            feeds[value.name] = (np.arange(7) < real[:, None]).reshape(shape).astype(np.int64)
        elif value.name == "input_ids":
            feeds[value.name] = rng.integers(4, 200, shape)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(np.float16)
    if "input_ids" in feeds:
        feeds["input_ids"] = np.where(feeds["attention_mask"] == 1, feeds["input_ids"], 1)
    expected = ort.InferenceSession(graphs / path.name, providers=["CPUExecutionProvider"]).run(None, feeds)
    found: Any = ReferenceEvaluator(model, new_ops=reference_plugins()).run(None, feeds)
    for output, ours, theirs in zip(model.graph.output, found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.03, rtol=0.03, err_msg=output.name)


def test_heads_that_the_kernels_lack_stay(exported_fp16: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    shutil.copy(exported_fp16 / "text.onnx", path)
    before = path.read_bytes()
    assert plugin_graphs.carry_attention(path, longest={}) == 0
    assert path.read_bytes() == before
