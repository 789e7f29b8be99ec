"""Dropout masks on CPU: reproducible, of the right share, independent of each other; and freed memory that is kept."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from xfm_fast.kernels import ops
from xfm_fast.kernels.cpu.workspace import Dropout

SHAPE = (3, 333, 1001)


def _mask(probability: float, seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return Dropout(probability, torch.tensor([seed])).mask(shape, torch.float32).clone()


@pytest.mark.parametrize("probability", [0.0, 1e-3, 0.1, 0.5, 0.9])
def test_share(probability: float) -> None:
    mask = _mask(probability, 1)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    spread = (probability * (1 - probability) / mask.numel()) ** 0.5
    assert abs(float(1 - mask.mean()) - probability) <= 5 * spread + 2**-17
    assert abs(1 - Dropout(probability, torch.tensor([1])).kept - probability) <= 2**-17


def test_nearly_everything_may_be_dropped() -> None:
    dropout = Dropout(1 - 1e-9, torch.tensor([1]))
    assert dropout.kept == 2**-16
    assert 0 < float(dropout.mask((1000, 1000), torch.float32).sum()) < 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [0, 5, -1, 2**62])
def test_the_same_seed_gives_the_same_masks(seed: int, dtype: torch.dtype) -> None:
    first, second = (Dropout(0.3, torch.tensor([seed])) for _ in range(2))
    for shape in ((7, 5), (1,), (2, 3, 111)):
        a = first.mask(shape, dtype).clone()
        assert torch.equal(a, second.mask(shape, dtype))
        # Whatever the type, the same elements are dropped.
    assert torch.equal(_mask(0.3, seed, (7, 5)).to(dtype), Dropout(0.3, torch.tensor([seed])).mask((7, 5), dtype))


def test_masks_do_not_follow_from_each_other() -> None:
    """Neighbours in a row, rows, calls and seeds: what they drop together is what chance drops together."""
    dropout = Dropout(0.5, torch.tensor([3]))
    first, second = (dropout.mask(SHAPE, torch.float32).clone() for _ in range(2))
    pairs = [(first[..., :-k], first[..., k:]) for k in (1, 2, 3, 4, 8)]
    pairs += [(first[:, :-1], first[:, 1:]), (first, second), (first, _mask(0.5, 4))]
    for a, b in pairs:
        assert abs(float(((a - 0.5) * (b - 0.5)).mean()) * 4) <= 5 / a.numel() ** 0.5


def test_a_branch_in_training_keeps_its_mean() -> None:
    x, weight = torch.ones(4000, 1), torch.ones(50, 1, requires_grad=True)
    torch.manual_seed(0)
    out = ops.linear_residual(x, weight, None, torch.zeros(4000, 50), dropout_p=0.25)
    kept = out.detach() != 0
    assert abs(float(kept.float().mean()) - 0.75) < 5 * (0.25 * 0.75 / out.numel()) ** 0.5
    torch.testing.assert_close(out.detach()[kept], torch.full_like(out.detach()[kept], 4 / 3))
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    # 4,000 terms of one size, in whatever order.
    torch.testing.assert_close(gradient[:, 0], kept.sum(0) * (4 / 3), rtol=1e-4, atol=0)
    torch.manual_seed(0)
    again = ops.linear_residual(x, weight, None, torch.zeros(4000, 50), dropout_p=0.25)
    assert torch.equal(again, out)


_SCRIPT = """
import resource, sys
import torch
from xfm_fast.kernels.cpu.workspace import keep_freed_memory

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
