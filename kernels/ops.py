"""The public operations: argument checks, then the implementation for the device and the call.

Every operation has a definition in plain PyTorch, in its file or in `reference.py`. The backend
`auto` runs the fastest implementation for the device; others
are selected by name, for a call (`backend=`) or for a block (`with use_backend(...)`), and a named backend never falls
back silently.

Shapes, dtypes and devices are always checked; offsets, labels and ids on a GPU only within `with check_contents():`,
which makes every operation wait for the device.
"""

from __future__ import annotations

from .backend import Backend, use_backend
from .bias_attention import bias_attention
from .checks import check_contents
from .fp8 import use_fp8
from .linear import (
    joined_linear,
    layer_norm_linear,
    linear,
    linear_add_layer_norm,
    linear_gelu,
    linear_residual,
)
from .losses import linear_cross_entropy, token_log_likelihood
from .mlp import layer_norm_mlp, mlp_residual
from .norms import add_layer_norm, embed_layer_norm, layer_norm
from .relpos_attention import relpos_attention, relpos_bias
from .varlen_attention import varlen_attention

__all__ = [
    "Backend",
    "add_layer_norm",
    "bias_attention",
    "check_contents",
    "embed_layer_norm",
    "joined_linear",
    "layer_norm",
    "layer_norm_linear",
    "layer_norm_mlp",
    "linear",
    "linear_add_layer_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "linear_residual",
    "mlp_residual",
    "relpos_attention",
    "relpos_bias",
    "token_log_likelihood",
    "use_backend",
    "use_fp8",
    "varlen_attention",
]
