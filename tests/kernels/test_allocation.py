"""Keeping freed memory: what the C library then returns to the system, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys
import torch
from xfm_fast.kernels.cpu.allocation import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    raise SystemExit(3)
for _ in range(3):
    del_me = [torch.ones(1 << 20) for _ in range(4)]
    del del_me
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    del_me = [torch.ones(1 << 20) for _ in range(4)]
    del del_me
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, check=False, timeout=120
    )
    if run.returncode == 3:
        pytest.skip("the C library of this system has no such options")
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_kept_memory_is_not_faulted_in_again() -> None:
    """80 MB in pieces of 4 MB are 20,480 pages of 4 KB where they are returned and taken again.

    What other allocations leave between them can cost a piece or two anew.
    """
    assert _faults("keep") < 20_480 // 5
