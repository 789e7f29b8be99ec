"""Specialises and compiles what a model launches on a GPU, where there is none.

    python -m tests.kernels.launches CASE... --arch 90

The launchers run on tensors in main memory, and the arguments of every launch go through Triton's own binder, which
makes a constant of what is 1, finds multiples of 16 and picks types as it would on a GPU. The kernel is compiled, not
launched. A line of JSON for every compilation goes to the standard output; with `--count`, nothing is compiled and a
line says how many compilations each kernel would have taken.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import random
import re
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from xfm_fast.kernels.audit import hazards, sass
from xfm_fast.kernels.audit.task import disassemble
from xfm_fast.kernels.checks import AddNorm, Embedding, Packed
from xfm_fast.kernels.limits import BIAS_HEAD_DIMS
from xfm_fast.kernels.triton import (
    bias_attention,
    cross_entropy,
    embed_layer_norm,
    fp8,
    gelu,
    layer_norm,
    relpos_attention,
    rows,
    varlen_attention,
)

_MODULES = (
    bias_attention, cross_entropy, embed_layer_norm, gelu, layer_norm, relpos_attention, rows, varlen_attention,
)  # fmt: skip
# Those of an H100 with four programs for each multiprocessor.
_PROGRAMS = 528


class PretendedGPU:
    """The driver as Triton asks it, for a device of one architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


class Recorder:
    """Takes the place of launching: counts the compilations that launches ask for and, if told to, makes them."""

    def __init__(self, arch: int, *, compiling: bool) -> None:
        self.arch, self.compiling = arch, compiling
        self.asked: dict[str, set[str]] = {}
        self.launch = JITFunction.run
        driver.set_active(PretendedGPU(arch))  # pyright: ignore[reportArgumentType]
        for module in _MODULES:
            if hasattr(module, "architecture"):
                module.architecture = lambda device: arch  # type: ignore[attr-defined]
            if hasattr(module, "multiprocessors"):
                module.multiprocessors = lambda device: _PROGRAMS // 4  # type: ignore[attr-defined]
            if hasattr(module, "first_stage_programs"):
                module.first_stage_programs = lambda steps, device: max(1, min(steps, _PROGRAMS))  # type: ignore[attr-defined]
        recorder = self
        changed: Any = JITFunction
        changed.run = lambda kernel, *given, **named: recorder.record(kernel, given, named)
        knobs.runtime.jit_cache_hook = self.ask

    def ask(self, *, key: Any, fn: Any, **_: Any) -> bool:
        """Told by Triton what it is about to compile; True keeps it from that."""
        self.asked.setdefault(_name(fn.jit_function), set()).add(str(key))
        return not self.compiling

    def record(self, kernel: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        name = _name(kernel)
        known = len(self.asked.get(name, ()))
        named["warmup"] = True
        # From Triton 3.6 on the assembler's warnings can be had, on the standard output.
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = self.launch(kernel, *given, **named)
        if self.compiling and len(self.asked[name]) > known:
            row = {"kernel": name, "compiler": triton.__file__, **figures(compiled, log.getvalue())}
            print(json.dumps(row), flush=True)
        return compiled


def _name(kernel: Any) -> str:
    return f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"


def figures(compiled: Any, log: str) -> dict[str, Any]:
    """The part of a compilation that tests look at."""
    code = sass.parse(*disassemble(compiled.asm["cubin"]))
    loop = code.main_loop.instructions if code.main_loop else ()
    return {
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "loop_hgmma": sum(i.opcode == "HGMMA" for i in loop),
        "loop_waits": hazards.tensor_waits(code.main_loop),
        "loop_stores_to_shared": sum(i.opcode == "STS" for i in loop),
        "serialised": sorted(set(re.findall(r"C75\d\d", log))),
    }


def _noise(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def relpos(batch: int, heads: int, head_dim: int, window: tuple[int, int] = (24, 24)) -> None:
    """Forward and backward of attention with a position bias; q, k and v come out of one product."""
    tokens, entries, scale = 1 + window[0] * window[1], (2 * window[0] - 1) * (2 * window[1] - 1) + 3, head_dim**-0.5
    q, k, v = _noise(batch, tokens, 3, heads, head_dim).unbind(2)
    table = torch.zeros(entries, heads)
    bias, turned = (
        relpos_attention.materialise_bias(table, window, q.dtype, scale, turned=turned) for turned in (False, True)
    )
    out, lse = relpos_attention.relpos_attention_forward(q, k, v, bias, scale)
    relpos_attention.relpos_attention_backward(out, q, k, v, bias, entries, window, scale, out, lse, turned)


def relpos_fragments(batch: int, heads: int, head_dim: int, window: tuple[int, int] = (24, 24)) -> None:
    """The forward pass with its bias in the order of Hopper's accumulators."""
    q, k, v = _noise(batch, 1 + window[0] * window[1], 3, heads, head_dim).unbind(2)
    table, scale = torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1) + 3, heads), head_dim**-0.5
    bias = relpos_attention.materialise_bias(table, window, q.dtype, scale, fragments=True)
    relpos_attention.relpos_attention_forward(q, k, v, bias, scale)


def bias(
    batch: int, entries: int, tokens: int, head_dim: int, dropout: float = 0.0, masked: bool = False, lse: bool = False
) -> None:
    """Forward and backward of attention with a bias of any origin, which `entries` of the batch do not share."""
    q, k, v = _noise(batch, tokens, 3, 4, head_dim).unbind(2)
    added, scale = _noise(entries, 4, tokens, tokens), head_dim**-0.5
    mask = torch.ones(batch, tokens, dtype=torch.bool) if masked else None
    chance = (mask, dropout, torch.zeros(1, dtype=torch.int64) if dropout else None)
    out, found = bias_attention.bias_attention_forward(q, k, v, added, scale, *chance)
    dlse = found if lse else None
    bias_attention.bias_attention_backward(out, dlse, q, k, v, added, out, found, scale, *chance)


def varlen(
    queries: list[int], keys: list[int], heads: int, head_dim: int, dropout: float = 0.0, masked: bool = False
) -> None:
    """Forward and backward of packed attention."""
    q = _noise(sum(queries), heads, head_dim)
    k, v = _noise(sum(keys), 2, heads, head_dim).unbind(1)
    cu_q, cu_k = (torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (queries, keys))
    seed = torch.zeros(1, dtype=torch.int64) if dropout else None
    mask = torch.ones(k.shape[0], dtype=torch.bool) if masked else None
    packed = Packed(cu_q, cu_k, max(queries), max(keys), head_dim**-0.5, dropout, seed, mask)
    out, lse = varlen_attention.varlen_attention_forward(q, k, v, packed)
    varlen_attention.varlen_attention_backward(out, q, k, v, out, lse, packed)


def norms(count: int, width: int, *, gamma: bool = False, dropout: float = 0.0) -> None:
    """A residual sum with its norm, and a plain norm."""
    x, residual, weight = _noise(count, width), _noise(count, width), _noise(width)
    factor, rows_of = (weight, torch.ones(count, dtype=torch.bfloat16)) if gamma else (None, None)
    chance = (dropout, torch.zeros(1, dtype=torch.int64) if dropout else None)
    given = AddNorm(x, residual, weight, weight, 1e-5, factor, rows_of, *chance)
    made = layer_norm.add_layer_norm_forward(given)
    layer_norm.add_layer_norm_backward(x, residual, made.summed, made.mean, made.rstd, given)
    normed, mean, rstd = layer_norm.layer_norm_forward(x, weight, weight, 1e-5)
    layer_norm.layer_norm_backward(normed, x, weight, mean, rstd)


def embedding(count: int, width: int) -> None:
    """The input of a text encoder."""
    ids, word, position, row = torch.arange(count) % 7, _noise(50265, width), _noise(514, width), _noise(width)
    given = Embedding(ids, ids, word, position, row, row, row, 1e-5, 1)
    embed_layer_norm.embed_layer_norm_backward(*embed_layer_norm.embed_layer_norm_forward(*given[:8]), given)


def activation(count: int, width: int) -> None:
    """GELU with its bias."""
    y, bias = _noise(count, width), _noise(width)
    gelu.bias_gelu_forward(y, bias)
    gelu.bias_gelu_backward(y, y, bias)


def rounding(count: int, width: int) -> None:
    """Rows in fp8: by themselves, on their way out of a norm and out of GELU."""
    x, weight = _noise(count, width), _noise(width)
    fp8.quantise_rows(x)
    layer_norm.add_layer_norm_forward(AddNorm(x, x, weight, weight, 1e-5, weight), rounded=fp8.room_for(x))
    gelu.bias_gelu_quantise(x, weight)


def vocabulary(count: int, width: int, size: int) -> None:
    """Cross-entropy over a vocabulary."""
    h, w, b, target = _noise(count, width), _noise(size, width), _noise(size), torch.zeros(count, dtype=torch.int64)
    loss, statistics = cross_entropy.linear_cross_entropy_forward(h, w, b, target)
    cross_entropy.linear_cross_entropy_backward(loss, h, w, b, target, statistics)


def captions(batches: int, heads: int = 12, head_dim: int = 64) -> None:
    """Random batches of captions that look at themselves and at images, as training and re-ranking draw them."""
    draw = random.Random(0)
    for _ in range(batches):
        lengths = [draw.randint(5, 30) for _ in range(draw.randint(1, 96))]
        varlen(lengths, lengths, heads, head_dim)
        varlen([sum(lengths)], [197], heads, head_dim)
        norms(sum(lengths), 16)
        activation(sum(lengths), 16)
        embedding(sum(lengths), 16)


CASES: dict[str, Callable[[], None]] = {
    "relpos": lambda: relpos(8, 12, 64),
    "relpos, one head": lambda: relpos(1, 1, 64, (14, 14)),
    **{f"relpos, {d}": lambda d=d: relpos(2, 4, d) for d in (32, 80, 96, 128)},
    "relpos, fragments, 64": lambda: relpos_fragments(2, 4, 64),
    **{f"bias, {d}": lambda d=d: bias(8, 1, 577, d) for d in BIAS_HEAD_DIMS},
    "bias, an entry each": lambda: bias(2, 2, 577, 64, lse=True),
    "bias, windows": lambda: bias(128, 64, 49, 32),
    "bias, dropout, masked": lambda: bias(8, 1, 577, 64, dropout=0.1, masked=True),
    "varlen": lambda: varlen([3328], [577], 12, 64),
    "varlen, many waves": lambda: varlen([3328] * 3, [577] * 3, 12, 64),
    "varlen, short over many": lambda: varlen([13] * 256, [577] * 256, 12, 64),
    "varlen, short": lambda: varlen([13] * 256, [13] * 256, 12, 64),
    "varlen, one sequence": lambda: varlen([17], [17], 1, 64),
    "varlen, dropout": lambda: varlen([100, 40], [100, 40], 12, 64, dropout=0.1),
    "varlen, masked": lambda: varlen([100, 40], [100, 40], 12, 64, masked=True),
    "varlen, short, dropout": lambda: varlen([10, 20], [10, 20], 12, 64, dropout=0.1),
    "varlen, short, masked": lambda: varlen([10, 20], [10, 20], 12, 64, masked=True),
    **{f"varlen, {d}": lambda d=d: varlen([130, 70], [577, 50], 4, d) for d in (32, 80, 96, 128)},
    "norms": lambda: norms(4616, 768),
    "norms, scaled": lambda: norms(4616, 768, gamma=True, dropout=0.1),
    "embedding": lambda: embedding(3328, 768),
    "activation": lambda: activation(4616, 3072),
    "rounding": lambda: rounding(4616, 768),
    "vocabulary": lambda: vocabulary(64, 768, 8200),
    "captions": lambda: captions(200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", choices=sorted(CASES))
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--count", action="store_true")
    options = parser.parse_args()
    nvidia: Any = knobs.nvidia
    if hasattr(nvidia, "dump_ptxas_log"):
        nvidia.dump_ptxas_log = True
    recorder = Recorder(options.arch, compiling=not options.count)
    for case in options.cases:
        CASES[case]()
    if options.count:
        print(json.dumps({kernel: len(keys) for kernel, keys in sorted(recorder.asked.items())}))


if __name__ == "__main__":
    main()
