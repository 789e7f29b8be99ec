"""Kernels for AMX: compared with their definition by tiles in memory, and counted in the code that LLVM writes.

Where a processor has AMX, the tests of numbers run on it too.
"""

from __future__ import annotations

import ctypes
import re
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.cases import plain_attention
from tests.kernels.test_llvm import linear
from xfm_fast.kernels import reference
from xfm_fast.kernels.cpu import gemm, int8, llvm, workspace

if (reason := llvm.why_not(torch.bfloat16)) is not None:
    pytest.skip(reason, allow_module_level=True)

import llvmlite.binding

from xfm_fast.kernels.cpu.llvm import attention as attention_module
from xfm_fast.kernels.cpu.llvm import builder
from xfm_fast.kernels.cpu.llvm import linear as linear_module
from xfm_fast.kernels.cpu.llvm.attention import attention
from xfm_fast.kernels.cpu.llvm.linear import Panels, in_panels, int8_linear, int8_panels
from xfm_fast.kernels.cpu.llvm.linear import linear as compiled
from xfm_fast.kernels.cpu.llvm.quantise import Quantisation

SIMULATED = llvm.AMX._replace(name="simulated", processor="cooperlake", tiles="memory")
VECTORS = llvm._AVX512_BF16
LEVELS = [SIMULATED, *(level for level in llvm.levels() if level == llvm.AMX)]
each_level = pytest.mark.parametrize("level", LEVELS, ids=[level.name for level in LEVELS])


@pytest.fixture(autouse=True)
def stale_scratch() -> None:
    """Scratch memory begins with NaN in every dtype."""
    torch.manual_seed(0)
    for buffer in getattr(workspace._local, "buffers", {}).values():
        buffer.view(torch.uint8).fill_(255)


# (rows, inputs, outputs): one tile and less; two blocks of rows, the second of one row; several blocks of units, the
# last one partial, with columns of an odd number of vectors; more panels than a task has.
PRODUCTS = [(13, 32, 16), (33, 96, 48), (70, 1632, 80), (97, 64, 1072)]


@each_level
@pytest.mark.parametrize("shape", PRODUCTS)
@torch.inference_mode()
def test_linear(level: llvm.Level, shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    x = torch.randn(rows, inputs + 2)[:, :inputs].bfloat16()
    weight = torch.randn(outputs, inputs).bfloat16()
    bias, gamma, residual = (torch.randn(*size, outputs).bfloat16() for size in ((), (), (rows,)))
    out = torch.zeros(rows, 2 * outputs, dtype=torch.bfloat16)[:, :outputs]
    for gelu, *addends in (
        (False, None, None, None),
        (True, bias, None, None),
        (False, bias, residual, gamma),
    ):
        result = compiled(x, weight, *addends, gelu=gelu, few=False, level=level)
        assert_as_accurate(result, partial(linear, gelu=gelu), x, weight, *addends)
        compiled(x, weight, *addends, gelu=gelu, out=out, few=False, level=level)
        assert torch.equal(out, result)


@each_level
def test_every_entry_of_a_product_of_small_integers(level: llvm.Level) -> None:
    """Whose sums are exact in any order, so that one wrong address shows."""
    for rows, inputs, outputs in PRODUCTS:
        x = torch.randint(-3, 4, (rows, inputs)).bfloat16()
        weight = torch.randint(-1, 2, (outputs, inputs)).bfloat16()
        truth = (x.double() @ weight.double().t()).bfloat16()
        assert torch.equal(compiled(x, weight, None, few=False, level=level), truth)


@each_level
def test_turned_wide_and_stored_weights(level: llvm.Level) -> None:
    rows, inputs, outputs = 70, 544, 80
    x, factors = torch.randn(rows, inputs).bfloat16(), torch.randn(inputs)
    weight = torch.randn(outputs, inputs + 3)[:, :inputs]
    turned = torch.randn(inputs, outputs + 3)[:, :outputs]
    expected = compiled(x, weight.bfloat16().contiguous(), None, level=level)
    assert torch.equal(compiled(x, weight, None, level=level), expected)
    stored = in_panels(weight.bfloat16().contiguous().view(torch.int32), level)
    assert torch.equal(compiled(x, weight, None, stored=stored, level=level), expected)
    narrow = (turned * factors[:, None]).bfloat16().contiguous()
    expected = compiled(x, narrow, None, turned=True, level=level)
    assert_as_accurate(expected, torch.mm, x, narrow)
    wide = compiled(x, turned, None, turned=True, factors=factors, level=level)
    assert torch.equal(wide, expected)


def panels(outputs: int, inputs: int) -> tuple[Tensor, Panels]:
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    steps = torch.rand(outputs) / 100
    # The kernels rotate rows.
    return reference.rotate(weight * steps[:, None]), int8_panels(weight, steps)


# (rows, inputs, outputs): rows of one tile, of two and more that every thread quantises, and of blocks that one kernel
# does; two blocks of units, an odd number of vectors of columns, more panels than a task has.
BYTES = [(5, 64, 16), (40, 768, 48), (130, 576, 304)]


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", BYTES)
def test_int8(level: llvm.Level, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """To the bit as vectors do, whose sums of integers are exact, and as the definition does."""
    rows, inputs, outputs = shape
    x, residual = (torch.randn(rows, size).to(dtype) for size in (inputs, outputs))
    bias = torch.randn(outputs)
    weight, packed = panels(outputs, inputs)
    norm = (torch.rand(inputs).to(dtype), torch.rand(inputs).to(dtype), 1e-5)
    cases: list[tuple[Tensor | None, Tensor | None, dict[str, Any]]] = [
        (None, None, {}),
        (bias, None, {"gelu": True}),
        (bias, residual, {}),
        (bias, residual, {"norm": norm}),
    ]
    for addend, sums, options in cases:
        results = [
            int8_linear(x, packed, addend, sums, torch.empty_like(residual), level=each, **options)
            for each in (level, VECTORS)
        ]
        assert torch.equal(*results)
    result = int8_linear(x, packed, bias, None, torch.empty_like(residual), level=level)
    truth = reference.linear(reference.as_int8(x), weight, bias)
    band = 1e-5 if dtype == torch.float32 else 2.0**-6
    torch.testing.assert_close(result.float(), truth.float(), rtol=band, atol=band * 4)


# (batch, queries, keys, heads, width): keys of one vector, of one and a half panels and of more than the smaller
# capacity; queries of a tile, of both and of one more; the narrowest heads and wide ones.
ATTENTION = [(2, 13, 13, 3, 64), (1, 33, 1041, 1, 32), (1, 100, 45, 2, 128), (1, 5, 1040, 1, 64)]


@each_level
@pytest.mark.parametrize("shape", ATTENTION)
def test_attention(level: llvm.Level, shape: tuple[int, ...]) -> None:
    batch, queries, keys, heads, width = shape
    q = torch.randn(batch, heads, queries, width).bfloat16().transpose(1, 2)
    k, v = torch.randn(batch, keys, 2, heads, width).bfloat16().unbind(2)
    for bias in (None, torch.randn(1, heads, queries, keys).bfloat16()):
        result = attention(q, k, v, 0.3, bias, level=level)
        assert_as_accurate(result, plain_attention, q, k, v, 0.3, bias)


@each_level
def test_attention_of_packed_sequences_with_hidden_keys_and_nan(level: llvm.Level) -> None:
    bounds = (0, 5, 5, 24, 27, 60), (0, 17, 26, 26, 27, 90)
    q = torch.randn(1, 60, 2, 64).bfloat16()
    k, v = torch.randn(1, 90, 2, 2, 64).bfloat16().unbind(2)
    packed = attention(q, k, v, 0.3, bounds=bounds, level=level)
    for i in (0, 3, 4):
        rows, keys = (slice(*starts[i : i + 2]) for starts in bounds)
        assert_as_accurate(
            packed[:, rows], plain_attention, q[:, rows], k[:, keys], v[:, keys], 0.3, None
        )
    assert not packed[:, 5:24].any()
    hidden = torch.zeros(1, 1, 60, 90)
    hidden[..., 6:] = -torch.inf
    q[0, 3, 1, 5] = torch.nan
    result = attention(q, k, v, 0.3, hidden, level=level)
    assert result[0, 3, 1].isnan().all()
    assert result.isnan().sum() == 64
    seen = attention(q, k[:, :6], v[:, :6], 0.3, hidden[..., :6], level=level)
    torch.testing.assert_close(result, seen, equal_nan=True)


@each_level
def test_threads_change_no_bit(level: llvm.Level) -> None:
    x, weight = torch.randn(300, 96).bfloat16(), torch.randn(304, 96).bfloat16()
    q, k, v = torch.randn(3, 2, 70, 3, 64).bfloat16()
    _, packed = panels(304, 64)
    rows = torch.randn(300, 64)

    def run() -> list[Tensor]:
        return [
            compiled(x, weight, None, gelu=True, level=level),
            attention(q, k, v, 0.3, level=level),
            *(
                int8_linear(part, packed, None, None, torch.empty(len(part), 304), level=level)
                for part in (rows, rows[:40])
            ),
        ]

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def assembly(emitter: Any, *options: Any) -> str:
    """The code that LLVM writes for Sapphire Rapids."""
    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    emitted = emitter(*options, llvm.AMX)
    module = llvmlite.binding.parse_assembly(str(emitted.b.module))
    builder._compile(emitted.b, llvm.AMX)
    machine = builder._machine(llvm.AMX)
    tuning = llvmlite.binding.create_pipeline_tuning_options(speed_level=1)
    passes = llvmlite.binding.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_assembly(module)


LETTERS = {
    "tilezero": "Z",
    "tileloadd": "L",
    "tileloaddt1": "L",
    "tdpbf16ps": "P",
    "tdpbusd": "P",
    "tilestored": "S",
}


def blocks(code: str) -> list[str]:
    """The instructions on tiles of each block of code with products, a letter each, from label to label."""
    names = [
        re.findall(rf"^\s+({'|'.join(LETTERS)})\b", block, flags=re.MULTILINE)
        for block in re.split(r"^\.L\w+:|# %bb\.\d+:", code, flags=re.MULTILINE)
    ]
    letters = ["".join(LETTERS[name] for name in block) for block in names]
    return [block for block in letters if "P" in block]


FP32_ROWS, BF16_ROWS = (Quantisation(half, (16, 32)) for half in (False, True))
EMITTED = [
    (linear_module._LinearOfTiles, ("bf16", True, False, None, False, False), {2}),
    (linear_module._LinearOfTiles, ("bf16", True, False, None, True, False), {2}),
    (linear_module._LinearOfTiles, ("bf16", True, True, None, False, False), {2}),
    (linear_module._LinearOfTiles, ("bf16", True, False, None, False, True), {1, 2}),
    (linear_module._LinearOfTiles, ("int8", False, False, None, False, True), {1, 2}),
    (linear_module._LinearOfTiles, ("int8", False, False, FP32_ROWS, False, True), {1, 2}),
    (linear_module._LinearOfTiles, ("int8", True, False, BF16_ROWS, False, True), {1, 2}),
    (attention_module._Attention, (True, 64, 1040, False), {1, 2}),
    (attention_module._Attention, (True, 32, 4112, True), {1, 2}),
]


@pytest.mark.parametrize(("emitter", "options", "heights"), EMITTED)
def test_instructions(emitter: Any, options: tuple[Any, ...], heights: set[int]) -> None:
    """Per unit two loads of columns, one a tile of rows, two products each; no sum leaves its tile between them."""
    code = assembly(emitter, *options)
    instruction, other = "tdpbf16ps", "tdpbusd"
    if options[0] == "int8":
        instruction, other = other, instruction
    assert other not in code
    # Products per load of one tile of rows; of two; of the second one, which the epilogue parts from the first.
    ratios = [block.count("P") / block.count("L") for block in blocks(code)]
    alone, both, second = (ratios.count(ratio) for ratio in (2 / 3, 4 / 4, 2 / 1))
    assert alone + both + second == len(ratios)
    emitted = {1: alone > second, 2: both + second > 0}
    assert {rows for rows, present in emitted.items() if present} == heights
    for block in blocks(code):
        assert not re.search(r"S[^Z]*P", block), block
    # Independent sums in turn hide the latency of a product.
    sums = re.findall(rf"\b{instruction}\b.*%tmm(\d)$", code, flags=re.MULTILINE)
    assert {*sums} == {"0", "1", "2", "3"}
    assert all(first != second for first, second in pairwise(sums))
    # The products of a tile of rows begin and end with as many sums; LLVM may share the code of two loops.
    for name in ("tilestored", "tilezero"):
        assert len(re.findall(rf"\b{name}\b", code)) >= 2 * max(heights)
    assert (code.count("ldtilecfg"), code.count("tilerelease")) == (1, 1)


def test_kernels_run_on_tiles_where_the_best_level_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that the comparison of implementations calls `llvm`."""
    launched = []

    def spy(emitter: Any, *options: Any) -> Any:
        launched.append(emitter.name)
        return builder.kernel(emitter, *options)

    for module in (linear_module, attention_module):
        monkeypatch.setattr(module, "levels", lambda: (SIMULATED, *llvm.levels()))
        monkeypatch.setattr(module, "kernel", spy)
    x, weight = torch.randn(70, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    assert_as_accurate(gemm._LINEAR["llvm"](x, weight, None), torch.nn.functional.linear, x, weight)
    int8._LIBRARIES["llvm"](x, weight, None)
    q, k, v = torch.randn(3, 1, 9, 2, 64).bfloat16()
    attention(q, k, v, 0.3)
    assert launched == ["linear_of_tiles", "linear_of_tiles", "attention"]
    # Rows of less than a tile in bf16, and fp32, run on vectors.
    for rows in (16, 15):
        compiled(x[:rows], weight, None)
    compiled(x.float(), weight.float(), None)
    assert launched[3:] == ["linear_of_tiles", "linear_of_few_rows", "linear"]


class Linux:
    """Answers requests for AMX with an error number, or with the features that it granted."""

    def __init__(self, error: int, granted: int) -> None:
        self.error, self.granted, self.requests = error, granted, []

    def syscall(self, number: int, function: int, argument: Any) -> int:
        self.requests.append((number, function))
        if function == 0x1022:
            argument._obj.value = self.granted
            return 0
        assert argument == 18
        ctypes.set_errno(self.error)
        return -1 if self.error else 0


ALL = {"amx_tile", "amx_bf16", "amx_int8"}


@pytest.mark.parametrize(
    ("flags", "error", "granted", "message"),
    [
        (set(), 0, 0, "no AMX"),
        (ALL - {"amx_int8"}, 0, 0, "no AMX"),
        (ALL, 95, 0, "Linux refuses AMX to this process: Operation not supported"),
        (ALL, 0, 0x20007, "sandbox"),
        (ALL, 0, 0x60007, None),
    ],
)
def test_permission(
    flags: set[str], error: int, granted: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the vectors of AVX-512 are the best level, and their kernels run."""
    linux = Linux(error, granted)
    monkeypatch.setattr(llvm, "_processor_flags", lambda: flags)
    monkeypatch.setattr(llvm.ctypes, "CDLL", lambda *args, **options: linux)
    found = llvm.why_no_tiles.__wrapped__()
    assert (found is None) if message is None else message in (found or "")
    assert len(linux.requests) == (0 if not flags >= ALL else 1 if error else 2)
    monkeypatch.setattr(llvm, "why_no_tiles", lambda: found)
    monkeypatch.setattr(llvm, "_may_execute", lambda: True)
    monkeypatch.setattr(llvm, "why_not", lambda *args: None)
    levels = llvm.levels.__wrapped__()
    assert levels[0] == (llvm.AMX if message is None else VECTORS)
    assert VECTORS in levels


def test_the_permission_of_this_machine() -> None:
    """Whatever it is, no request ends the process, and the best level follows it."""
    flags = llvm._processor_flags()
    assert "avx512f" in flags
    assert (llvm.why_no_tiles() is None) == (llvm.levels()[0] == llvm.AMX)
    if "amx_tile" not in flags:
        assert "no AMX" in (llvm.why_no_tiles() or "")
