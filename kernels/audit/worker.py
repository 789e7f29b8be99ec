"""The compiling process: reads one `Task` a line from standard input and answers with its `Figures`."""

from __future__ import annotations

import base64
import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import sass
from .compiling import Figures, Task
from .sass import row_lines

# From Hopper on the disassembler counts the driver's reserve as the kernel's.
_RESERVED_SHARED = 1024


def compile_task(task: Task) -> Figures:
    """Compiles and measures one kernel.

    Raises:
        Exception: whatever the compiler makes of a kernel that it does not like.
    """
    kernel: Any = importlib.import_module(task.module)
    for name in task.function.split("."):
        kernel = getattr(kernel, name)
    source = ASTSource(kernel, task.signature, task.constexprs, task.attrs)
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", task.arch, 32), options=dict(task.options))
    code = disassemble(compiled.asm["cubin"])
    rows = row_lines(compiled.asm["ttgir"], compiled.asm["ptx"])
    loop = code.main_loop
    inner = [i for inner_loop in code.inner_loops for i in inner_loop.instructions]
    static = max(0, code.static_shared_bytes - (_RESERVED_SHARED if task.arch >= 90 else 0))
    opcodes = sorted({i.opcode for i in code.instructions if i.tensor_core})
    return Figures(
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        shared_bytes=static + compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        warps=compiled.metadata.num_warps,
        instructions=len(code.instructions),
        tensor_core={opcode: code.count(opcode) for opcode in opcodes},
        loads=dict(sass.count_loads(code.instructions)),
        local_loads=code.count("LDL"),
        local_stores=code.count("STL"),
        loop_instructions=len(loop.instructions) if loop else 0,
        loop_tensor_core=loop.tensor_core if loop else 0,
        inner_loads=dict(sass.count_loads(inner)),
        tile_loads=dict(sass.count_loads(i for i in inner if i.line not in rows)),
    )


def disassemble(cubin: bytes) -> sass.MachineCode:
    """The machine code of a binary, and the resources that it takes, by the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools: Any = knobs.nvidia
        # -ndf leaves out an analysis of indirect branches, of which Triton makes none.
        listing = _output(tools.nvdisasm.path, "-g", "-c", "-ndf", file.name)
        return sass.parse(listing, _output(tools.cuobjdump.path, "-res-usage", file.name))


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:500]}")
    return done.stdout


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answers every line until there are no more."""
    for line in requests:
        task: Task = pickle.loads(base64.b64decode(line))
        try:
            figures = compile_task(task)
        except Exception as error:
            # The compiler's errors have many types. All mean the same here, and the audit reports every one.
            figures = Figures(error=f"{type(error).__name__}: {error}")
        answers.write(json.dumps(asdict(figures)) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Compilers print; what they print must not be taken for an answer.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, channel)
