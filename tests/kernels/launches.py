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
import io
import json
import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from tests.kernels.cases import (
    Case,
    activation,
    biased,
    embedding,
    leaves,
    norm,
    packed,
    results,
    vocabulary,
    window,
)
from xfm_fast.kernels import ops
from xfm_fast.kernels.audit import machine_code
from xfm_fast.kernels.audit.compiling import disassemble, pretend
from xfm_fast.kernels.checks import BIAS_HEAD_DIMS
from xfm_fast.kernels.triton.relpos_table import materialise_bias


class Recorder:
    """Takes the place of launching: counts the compilations that launches ask for and, if `compiling`, makes them."""

    def __init__(self, arch: int, *, compiling: bool) -> None:
        self.compiling = compiling
        self.asked: dict[str, set[str]] = {}
        self.launch = pretend(arch, self.ask)
        changed, recorder = JITFunction, self
        changed.run = lambda kernel, *given, **named: recorder.record(kernel, given, named)  # type: ignore[method-assign]

    def ask(self, *, key: Any, fn: Any, **_: Any) -> bool:
        """Called by Triton before it compiles; True keeps it from that."""
        self.asked.setdefault(_name(fn.jit_function), set()).add(str(key))
        return not self.compiling

    def record(self, kernel: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        name = _name(kernel)
        known = len(self.asked.get(name, ()))
        # From Triton 3.6 on the assembler's warnings can be had, on the standard output.
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = self.launch(kernel, *given, **named)
        if self.compiling and len(self.asked[name]) > known:
            row = {"kernel": name, **figures(compiled, log.getvalue())}
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
        "integer_products": sorted(
            set(re.findall(r"arith\.muli .* : (?:tensor<\w*?)?(i\d+)", compiled.asm["ttir"]))
        ),
    }


def step(case: Case) -> None:
    """An operation and its gradients in bf16."""
    arguments = case.arguments(torch.bfloat16, grad=True)
    found = results(case.operation(**arguments, backend="triton"))
    wanted = [t for t in found if t.requires_grad]
    torch.autograd.grad(
        wanted, leaves(arguments), [torch.zeros_like(t) for t in wanted], materialize_grads=True
    )


def fragments() -> None:
    """Attention with a position bias that Hopper's forward kernel reads in fragments."""
    case, table = window(24, 24, 2, 4, 64), torch.zeros(47 * 47 + 3, 4)
    bias = materialise_bias(table, (24, 24), torch.bfloat16, 0.125, fragments=True)
    step(case._replace(operation=partial(case.operation, bias=bias)))


@torch.no_grad()
def rounding(count: int, width: int) -> None:
    """Rows in fp8: on their way out of a norm and out of GELU, and by themselves."""
    x, vector, weight = (
        torch.zeros(shape, dtype=torch.bfloat16)
        for shape in ((count, width), width, (width, width))
    )
    call = partial(ops.linear, weight=weight, bias=None, backend="triton")
    with ops.use_fp8():
        normed, _ = ops.add_layer_norm(x, x, vector, vector, 1e-5, gamma=vector, backend="triton")
        call(ops.linear_gelu(normed, weight, vector, backend="triton"))
        call(x)


def captions(batches: int) -> None:
    """Random batches of captions that attend to themselves and to images, as training and re-ranking draw them."""
    draw = random.Random(0)
    for _ in range(batches):
        lengths = [draw.randint(5, 30) for _ in range(draw.randint(1, 96))]
        tokens = sum(lengths)
        for case in (
            packed(lengths, lengths, 12, 64),
            packed([tokens], [197], 12, 64),
            norm(tokens, 16),
        ):
            step(case)
        step(activation(tokens, 16))
        step(embedding(tokens, 16, 1))


def dropped(case: Case) -> Case:
    """The case with dropout."""
    return case._replace(operation=partial(case.operation, dropout_p=0.1))


_SMALL = (32, 80, 96, 128)
_MASK = torch.ones(140, dtype=torch.bool)
# Of the model, and of what else the operations offer.
_STEPS: dict[str, Case] = {
    "relpos": window(24, 24, 8, 12, 64),
    "relpos, one head": window(14, 14, 1, 1, 64),
    **{f"relpos, {d}": window(24, 24, 2, 4, d) for d in _SMALL},
    **{
        f"bias, {d}": biased(8, 1, 577, 577, 4, d)._replace(operation=ops.bias_attention)
        for d in BIAS_HEAD_DIMS
    },
    "bias, an entry each": biased(2, 2, 577, 577, 4, 64),
    "bias, windows": biased(128, 64, 49, 49, 4, 32),
    "bias, dropout, masked": dropped(biased(8, 1, 577, 577, 4, 64, masked=True)),
    "varlen": packed([3328], [577], 12, 64),
    "varlen, many waves": packed([3328] * 3, [577] * 3, 12, 64),
    "varlen, short over many": packed([13] * 256, [577] * 256, 12, 64),
    "varlen, short": packed([13] * 256, [13] * 256, 12, 64),
    "varlen, dropout": dropped(packed([100, 40], [100, 40], 12, 64)),
    "varlen, masked": packed([100, 40], [100, 40], 12, 64, _MASK),
    **{f"varlen, {d}": packed([130, 70], [577, 50], 4, d) for d in _SMALL},
    "norms": norm(4616, 768),
    "norms, scaled": dropped(norm(4616, 768, scaled=True)),
    "embedding": embedding(3328, 768, 1),
    "activation": activation(4616, 3072),
    "vocabulary": vocabulary(ops.linear_cross_entropy, 64, 768, 8200),
}
CASES: dict[str, Callable[[], None]] = {name: partial(step, case) for name, case in _STEPS.items()}
CASES |= {
    "relpos, fragments, 64": fragments,
    "rounding": partial(rounding, 64, 768),
    "captions": partial(captions, 50),
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
