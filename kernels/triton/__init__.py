"""Triton kernels, one file a family; `launch` holds their launch configurations and compile specifications.

Nothing is imported here, so that the package may be looked at where Triton is absent.
"""
