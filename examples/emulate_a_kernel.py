"""Run a Triton kernel on CPU tensors as the GPU code that Triton compiles, with every access checked."""

import os

os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported

import torch
import triton
import triton.language as tl

from xfm_fast.kernels.emulation import EmulationError, emulated


@triton.jit
def scale_kernel(x, out, n, factor, BLOCK: tl.constexpr):
    """`out = factor * x` of n elements."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + places, tl.load(x + places, mask=places < n) * factor, mask=places < n)


x = torch.randn(1000, dtype=torch.bfloat16)
out = torch.empty_like(x)
for target in ("sm_80", "sm_90", "sm_100", "sm_120"):
    with emulated(target) as launches:
        scale_kernel[(8,)](x, out, len(x), 2.0, BLOCK=128)
    count, hazards = launches[0].instructions, len(launches[0].hazards)
    print(f"{target}: {count} instructions, {hazards} hazards, right: {torch.equal(out, 2 * x)}")

with emulated("sm_90"):
    try:
        scale_kernel[(8,)](x, out, 1001, 2.0, BLOCK=128)
    except EmulationError as error:
        print(error)
