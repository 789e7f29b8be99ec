"""The public operations: arguments checked, then sent to the implementation that fits the device and the moment.

Every operation has a definition in `reference.py`. The backend `auto` takes the fastest implementation for the device;
the others are asked for by name, for a call (`backend=`) or for a block (`with use_backend(...)`), and a backend asked
for by name never falls back silently.
"""

from __future__ import annotations

from .attention import relpos_attention, varlen_attention
from .backend import Backend, use_backend
from .normalisation import layer_norm
from .products import linear, linear_gelu, linear_residual, mlp_residual

__all__ = [
    "Backend",
    "layer_norm",
    "linear",
    "linear_gelu",
    "linear_residual",
    "mlp_residual",
    "relpos_attention",
    "use_backend",
    "varlen_attention",
]
