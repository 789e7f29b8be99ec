"""Triton kernels, one file a family; `launch` holds their launch configurations and compile specifications.

Nothing is imported here: where Triton is absent, the names of this package are all there is.
"""

__all__ = [
    "attention_tiles",
    "cross_entropy",
    "embed_layer_norm",
    "gelu",
    "launch",
    "layer_norm",
    "relpos_attention",
    "relpos_table",
    "rows",
    "varlen_attention",
]
