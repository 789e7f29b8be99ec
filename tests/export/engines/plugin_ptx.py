"""Compiles the plugins' kernels in a process of its own, because tests interpret Triton: prints JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any


def main() -> None:
    from triton import knobs

    from xfm_fast.export.engines import plugin_kernels

    found = []
    for arch in json.loads(sys.argv[1]):
        for kernel, form in (
            (
                plugin_kernels.compile_relpos(
                    "bf16", arch, heads=12, head_dim=64, tokens=197, columns=256, scale=0.125
                ),
                "relpos",
            ),
            (
                plugin_kernels.compile_varlen(
                    "fp16", arch, heads=12, head_dim=64, scale=0.125, masked=True, small_tiles=False
                ),
                "varlen",
            ),
        ):
            with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
                file.write(kernel.ptx)
                file.flush()
                target = re.findall(r"^\.target (\S+)", kernel.ptx, re.MULTILINE)[0]
                tools: Any = knobs.nvidia
                assembler = getattr(tools, "ptxas_blackwell" if arch >= 100 else "ptxas", tools.ptxas)
                done = subprocess.run(
                    [assembler.path, "-v", "-arch", target, file.name, "-o", "/dev/null"],
                    capture_output=True, text=True, check=False,
                )  # fmt: skip
            entry = re.findall(r"\.entry ([\w$]+)\((.*?)\)", kernel.ptx, re.DOTALL)
            found.append(
                {
                    "arch": arch,
                    "form": form,
                    "name": kernel.name,
                    "arguments": kernel.arguments,
                    "threads": kernel.threads,
                    "shared": kernel.shared_bytes,
                    "tiles": dict(kernel.tiles),
                    "entry": entry[0][0],
                    "parameters": re.findall(r"\.(u\d+)\b", entry[0][1]),
                    "required": int(re.findall(r"\.reqntid (\d+)", kernel.ptx)[0]),
                    "paths": "/" in "".join(re.findall(r"\.file.*", kernel.ptx)),
                    "assembled": done.returncode == 0,
                    "said": done.stderr,
                }
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
