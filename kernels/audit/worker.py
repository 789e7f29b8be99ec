"""The compiling process: reads one `Task` a line from standard input and answers with its `Figures`."""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from .compiling import Binary, Figures, Task, ptxas_version, read_binary, write_binary
from .hazards import register_operands, unfenced_copies
from .sass import row_lines

_WARNING = re.compile(r"\((C\d{4})\)")


def compile_task(task: Task) -> Binary:
    """Compiles one kernel.

    Raises:
        Exception: whatever the compiler makes of a kernel that it does not like.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel: Any = importlib.import_module(task.module)
    for name in task.function.split("."):
        kernel = getattr(kernel, name)
    source = ASTSource(kernel, task.signature, task.constexprs, task.attrs)
    # The environment asks Triton to print what the assembler says.
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compiled: Any = triton.compile(source, target=GPUTarget("cuda", task.arch, 32), options=dict(task.options))
    listing, resources = disassemble(compiled.asm["cubin"])
    return Binary(
        listing=listing,
        resources=resources,
        row_lines=sorted(row_lines(compiled.asm["ttgir"], compiled.asm["ptx"])),
        warnings=sorted(set(_WARNING.findall(said.getvalue()))),
        shared_bytes=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        warps=compiled.metadata.num_warps,
        unfenced_copies=unfenced_copies(compiled.asm["ptx"]),
        unsafe_operands=register_operands(compiled.asm["ptx"]) if ptxas_version(task.arch) < (13, 3) else 0,
    )


def disassemble(cubin: bytes) -> tuple[str, str]:
    """The listing of a binary, and the resources that it takes, by the tools that come with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools: Any = knobs.nvidia
        # -ndf leaves out an analysis of indirect branches, of which Triton makes none.
        listing = _output(tools.nvdisasm.path, "-g", "-c", "-ndf", file.name)
        return listing, _output(tools.cuobjdump.path, "-res-usage", file.name)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:500]}")
    return done.stdout


def serve(requests: IO[str], answers: IO[str], folder: Path) -> None:
    """Answers every line until there are no more; binaries come from the cache in the folder, or go there."""
    from .figures import measure

    for line in requests:
        task: Task = pickle.loads(base64.b64decode(line))
        try:
            binary = read_binary(folder, task.key)
            if binary is None:
                binary = compile_task(task)
                write_binary(folder, task.key, binary)
            figures = measure(binary, task.arch)
        except Exception as error:
            # The compiler's errors have many types. All mean the same here, and the audit reports every one.
            figures = Figures(error=f"{type(error).__name__}: {error}")
        answers.write(json.dumps(asdict(figures)) + "\n")
        answers.flush()


if __name__ == "__main__":
    # Compilers print; what they print must not be taken for an answer.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, channel, Path(sys.argv[1]))
