"""Triton kernels executed without a GPU: the PTX that Triton compiles runs in NumPy, and every access is checked.

    with emulated("sm_90") as launches:
        kernel[grid](x, y, n, BLOCK=128)        # on CPU tensors
    print(launches[0].hazards)

It depends on NumPy, PyTorch and Triton only: the folder can be copied. It proves what a kernel computes and that its
accesses are ordered, in bounds and aligned; not the assembler, nor time.
"""

from .hazards import LATE_WAIT, EmulationError, Hazard, HazardError
from .launch import Launch, emulated

__all__ = ["LATE_WAIT", "EmulationError", "Hazard", "HazardError", "Launch", "emulated"]
