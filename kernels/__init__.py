"""The fast operations: public functions (`ops`), their plain definitions (`reference`), CPU and Triton implementations.

Importing this package imports nothing of it: `kernels.reference` is for machines without Triton, and `kernels.triton`
decides on import whether its kernels are compiled or interpreted.
"""
