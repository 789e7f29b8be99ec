"""The fast operations: public functions (`ops`), their plain-PyTorch `reference`, CPU and Triton implementations.

Importing this package imports no submodule: `kernels.reference` is for machines without Triton, and `kernels.triton`
decides on import whether its kernels are compiled or interpreted.
"""
