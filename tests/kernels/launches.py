"""Specialises and compiles what a model launches on a GPU, where there is none.

    python -m tests.kernels.launches CASE... --arch 90

The operations run on tensors in main memory, and the arguments of every launch go through Triton's own binder, which
makes a constant of what is 1, finds multiples of 16 and picks types as it would on a GPU. The kernel is compiled, not
launched. A line of JSON for every compilation goes to the standard output; with `--count`, nothing is compiled and a
line says how many compilations each kernel would have taken.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import pkgutil
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import xfm_fast.kernels.triton as family
from tests.kernels.cases import leaves, offsets, results
from xfm_fast.kernels import backend, ops
from xfm_fast.kernels.audit import machine_code
from xfm_fast.kernels.audit.compiling import disassemble
from xfm_fast.kernels.checks import BIAS_HEAD_DIMS
from xfm_fast.kernels.triton.relpos_table import materialise_bias

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
    """Takes the place of launching: counts the compilations that launches ask for and, if `compiling`, makes them."""

    def __init__(self, arch: int, *, compiling: bool) -> None:
        self.compiling = compiling
        self.asked: dict[str, set[str]] = {}
        self.launch = JITFunction.run
        driver.set_active(PretendedGPU(arch))  # pyright: ignore[reportArgumentType]
        facts = {
            "architecture": lambda device: arch,
            "multiprocessors": lambda device: _PROGRAMS // 4,
            "first_stage_programs": lambda steps, device: max(1, min(steps, _PROGRAMS)),
        }
        for name in (info.name for info in pkgutil.iter_modules(family.__path__)):
            module = importlib.import_module(f"{family.__name__}.{name}")
            for fact in facts.keys() & vars(module).keys():
                setattr(module, fact, facts[fact])
        backend._why_not = lambda name, device, index: None
        changed, recorder = JITFunction, self
        changed.run = lambda kernel, *given, **named: recorder.record(kernel, given, named)  # type: ignore[method-assign]
        knobs.runtime.jit_cache_hook = self.ask

    def ask(self, *, key: Any, fn: Any, **_: Any) -> bool:
        """Called by Triton before it compiles; True keeps it from that."""
        self.asked.setdefault(_name(fn.jit_function), set()).add(str(key))
        return not self.compiling

    def record(self, kernel: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        name = _name(kernel)
        known = len(self.asked.get(name, ()))
        # From Triton 3.6 on the assembler's warnings can be had, on the standard output.
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = self.launch(kernel, *given, **{**named, "warmup": True})
        if self.compiling and len(self.asked[name]) > known:
            row = {"kernel": name, "compiler": triton.__file__, **figures(compiled, log.getvalue())}
            print(json.dumps(row), flush=True)
        return compiled


def _name(kernel: Any) -> str:
    return f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"


def figures(compiled: Any, log: str) -> dict[str, Any]:
    """The part of a compilation that tests look at."""
    code = machine_code.parse(*disassemble(compiled.asm["cubin"]))
    loop = code.main_loop.instructions if code.main_loop else ()
    return {
        "registers": code.registers,
        "stack_bytes": code.stack_bytes,
        "loop_hgmma": sum(i.opcode == "HGMMA" for i in loop),
        "loop_waits": machine_code.tensor_waits(code.main_loop),
        "loop_stores_to_shared": sum(i.opcode == "STS" for i in loop),
        "serialised": sorted(set(re.findall(r"C75\d\d", log))),
    }


def noise(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def step(operation: Callable[..., Any], **arguments: Any) -> None:
    """An operation and its gradients; projections are leaves, so views of them are made here."""
    found = results(operation(**arguments, backend="triton"))
    wanted = [t for t in found if t.requires_grad]
    torch.autograd.grad(wanted, leaves(arguments), [torch.zeros_like(t) for t in wanted], materialize_grads=True)


def projected(*shape: int) -> dict[str, Tensor]:
    """q, k and v, as views of one product."""
    parts = torch.zeros(*shape[:-2], 3, *shape[-2:], dtype=torch.bfloat16).unbind(-3)
    return {name: part.requires_grad_() for name, part in zip("qkv", parts, strict=True)}


def relpos(batch: int, heads: int, head_dim: int, window: tuple[int, int] = (24, 24), fragments: bool = False) -> None:
    """Attention with a position bias, which Hopper's forward kernel may read in fragments."""
    tokens, entries = 1 + window[0] * window[1], (2 * window[0] - 1) * (2 * window[1] - 1) + 3
    table = torch.zeros(entries, heads, requires_grad=True)
    bias = materialise_bias(table, window, torch.bfloat16, head_dim**-0.5, fragments=True) if fragments else None
    step(ops.relpos_attention, **projected(batch, tokens, heads, head_dim), table=table, window=window, bias=bias)


def biased(
    batch: int, entries: int, tokens: int, head_dim: int, dropout: float = 0.0, masked: bool = False, lse: bool = False
) -> None:
    """Attention with a bias of any origin, which `entries` of the batch do not share."""
    mask = torch.ones(batch, tokens, dtype=torch.bool) if masked else None
    given = {"bias": noise(entries, 4, tokens, tokens), "key_mask": mask, "dropout_p": dropout, "return_lse": lse}
    step(ops.bias_attention, **projected(batch, tokens, 4, head_dim), **given)


def varlen(
    queries: list[int], keys: list[int], heads: int, head_dim: int, dropout: float = 0.0, masked: bool = False
) -> None:
    """Packed attention."""
    given = projected(sum(keys), heads, head_dim) | {"q": noise(sum(queries), heads, head_dim)}
    mask = torch.ones(sum(keys), dtype=torch.bool) if masked else None
    bounds = {"max_q": max(queries), "max_k": max(keys), "dropout_p": dropout, "key_mask": mask}
    step(ops.varlen_attention, **given, cu_seqlens_q=offsets(*queries), cu_seqlens_k=offsets(*keys), **bounds)


def norms(count: int, width: int, *, scaled: bool = False, dropout: float = 0.0) -> None:
    """A residual sum with its norm, and a plain norm."""
    given = {"x": noise(count, width), "weight": noise(width), "bias": noise(width), "eps": 1e-5}
    factors = {"gamma": noise(width), "row_scale": torch.ones(count, dtype=torch.bfloat16)} if scaled else {}
    step(ops.add_layer_norm, **given, residual=noise(count, width), **factors, dropout_p=dropout)
    step(ops.layer_norm, **given)


def embedding(count: int, width: int) -> None:
    """The input of a text encoder."""
    given = {"tokens": torch.arange(count) % 7, "positions": torch.arange(count) % 7, "word": noise(50265, width)}
    rows = {name: noise(width) for name in ("type_row", "weight", "bias")}
    step(ops.embed_layer_norm, **given, position=noise(514, width), **rows, eps=1e-5, padding_idx=1)


def activation(count: int, width: int) -> None:
    """GELU with its bias."""
    step(ops.linear_gelu, x=noise(count, 16), weight=noise(width, 16), bias=noise(width))


@torch.no_grad()
def rounding(count: int, width: int) -> None:
    """Rows in fp8: on their way out of a norm and out of GELU, and by themselves."""
    x, vector, weight = noise(count, width), noise(width), noise(width, width)
    call = partial(ops.linear, weight=weight, bias=None, backend="triton")
    with ops.use_fp8():
        normed, _ = ops.add_layer_norm(x, x, vector, vector, 1e-5, gamma=vector, backend="triton")
        call(ops.linear_gelu(normed, weight, vector, backend="triton"))
        call(x)


def vocabulary(count: int, width: int, size: int) -> None:
    """Cross-entropy over a vocabulary."""
    given = {"h": noise(count, width), "w": noise(size, width), "b": noise(size)}
    step(ops.linear_cross_entropy, **given, target=torch.zeros(count, dtype=torch.int64))


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


_SMALL = (32, 80, 96, 128)
# Of the model, and of what else the operations offer.
CASES: dict[str, Callable[[], None]] = {
    "relpos": partial(relpos, 8, 12, 64),
    "relpos, one head": partial(relpos, 1, 1, 64, (14, 14)),
    **{f"relpos, {d}": partial(relpos, 2, 4, d) for d in _SMALL},
    "relpos, fragments, 64": partial(relpos, 2, 4, 64, fragments=True),
    **{f"bias, {d}": partial(biased, 8, 1, 577, d) for d in BIAS_HEAD_DIMS},
    "bias, an entry each": partial(biased, 2, 2, 577, 64, lse=True),
    "bias, windows": partial(biased, 128, 64, 49, 32),
    "bias, dropout, masked": partial(biased, 8, 1, 577, 64, dropout=0.1, masked=True),
    "varlen": partial(varlen, [3328], [577], 12, 64),
    "varlen, many waves": partial(varlen, [3328] * 3, [577] * 3, 12, 64),
    "varlen, short over many": partial(varlen, [13] * 256, [577] * 256, 12, 64),
    "varlen, short": partial(varlen, [13] * 256, [13] * 256, 12, 64),
    "varlen, one sequence": partial(varlen, [17], [17], 1, 64),
    "varlen, dropout": partial(varlen, [100, 40], [100, 40], 12, 64, dropout=0.1),
    "varlen, masked": partial(varlen, [100, 40], [100, 40], 12, 64, masked=True),
    "varlen, short, dropout": partial(varlen, [10, 20], [10, 20], 12, 64, dropout=0.1),
    "varlen, short, masked": partial(varlen, [10, 20], [10, 20], 12, 64, masked=True),
    **{f"varlen, {d}": partial(varlen, [130, 70], [577, 50], 4, d) for d in _SMALL},
    "norms": partial(norms, 4616, 768),
    "norms, scaled": partial(norms, 4616, 768, scaled=True, dropout=0.1),
    "embedding": partial(embedding, 3328, 768),
    "activation": partial(activation, 4616, 3072),
    "rounding": partial(rounding, 64, 768),
    "vocabulary": partial(vocabulary, 64, 768, 8200),
    "captions": partial(captions, 200),
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
