"""Fast modules to build models with: thin `torch.nn.Module`s over the operations of `xfm_fast.kernels`.

They hold ordinary parameters, choose the implementation by device, and work in training, under autocast and
`torch.compile`. `xfm_fast.kernels.ops.use_backend` picks a backend by name for a block of code.

Example, a post-norm text layer on packed tokens:

    >>> attention = PackedSelfAttention(768, heads=12, dropout=0.1)
    >>> close = AddLayerNorm(768, dropout=0.1)
    >>> x, _ = close(attention(x, cu_seqlens, longest), x)
"""

from xfm_fast.nn.attention import GroupedCrossAttention, PackedSelfAttention, RelPosAttention
from xfm_fast.nn.pointwise import AddLayerNorm, GeluMLP, VocabularyLoss
from xfm_fast.nn.windows import (
    CosineWindowAttention,
    WindowAttention,
    merge_windows,
    partition_windows,
    shifted_window_mask,
)

__all__ = [
    "AddLayerNorm",
    "CosineWindowAttention",
    "GeluMLP",
    "GroupedCrossAttention",
    "PackedSelfAttention",
    "RelPosAttention",
    "VocabularyLoss",
    "WindowAttention",
    "merge_windows",
    "partition_windows",
    "shifted_window_mask",
]
