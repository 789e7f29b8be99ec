"""Triton kernels, one file a family; launch configurations and compile specifications lie beside them."""
