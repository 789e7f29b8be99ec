"""Prepares kernels, or runs with prepared ones, for a GPU that is not there.

    python -m tests.kernels.preparing write|run FOLDER HEAD_DIM...

`run` prints a line of JSON for each head dimension: the hash of the binary that would be launched, or the refusal.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.kernels.cases import packed
from xfm_fast.kernels import prepared
from xfm_fast.kernels.audit.compiling import pretend
from xfm_fast.kernels.ops import use_backend

ARCH = 90


@torch.no_grad()
def attend(head_dim: int) -> None:
    """Attention of sequences that are long enough for the tensor cores."""
    # Some versions of Triton keep an attribute of numbers that are no multiples of 16.
    case = packed([130], [130], 2, head_dim)
    case.operation(**case.arguments(torch.bfloat16))


def run(folder: Path, head_dims: list[int]) -> None:
    from triton import knobs

    prepared.install(folder, ARCH)
    runtime: Any = knobs.runtime
    check, binaries = runtime.jit_post_compile_hook, []

    def spy(*, key: Any, fn: Any, compile: dict[str, Any], **rest: Any) -> Any:
        result = check(key=key, fn=fn, compile=compile, **rest)
        binaries.append(fn.jit_function.device_caches[0][0][key].asm["cubin"])
        return result

    runtime.jit_post_compile_hook = spy
    pretend(ARCH)
    for head_dim in head_dims:
        binaries.clear()
        refusals = []
        for _ in range(2):
            try:
                with use_backend("triton"):
                    attend(head_dim)
            except prepared.NotPreparedError as error:
                refusals.append(str(error))
        hashes = [hashlib.sha256(binary).hexdigest() for binary in binaries]
        print(json.dumps({"hashes": hashes, "refusals": refusals}), flush=True)


def main() -> None:
    action, folder, head_dims = sys.argv[1], Path(sys.argv[2]), [int(text) for text in sys.argv[3:]]
    if action == "run":
        run(folder, head_dims)
        return
    launches = prepared.record(lambda: [attend(head_dim) for head_dim in head_dims], ARCH)
    prepared.write(folder, {"attention": launches}, ARCH)


if __name__ == "__main__":
    main()
