"""Triton kernels, one file per family; `launch` holds their launch configurations and compile specifications.

Importing this package imports no submodule, so that it works without Triton.
"""
