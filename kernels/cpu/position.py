"""The position bias of a window from its table, and the table's gradient, head by head."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .. import reference


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # an index made by inference serves training too
def _index(window: tuple[int, int]) -> Tensor:
    return reference.relative_position_index(window).view(-1)


def position_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """`[(2wh-1)(2ww-1)+3, H]` → `[H, N, N]`, contiguous: a head's rows of the table stay in cache."""
    tokens = 1 + window[0] * window[1]
    return table.t().contiguous().index_select(1, _index(window)).view(-1, tokens, tokens)


def table_gradient(dbias: Tensor, window: tuple[int, int], rows: int) -> Tensor:
    """`[H, N, N]` → `[rows, H]` of the same type. Every head is summed in one order, whatever the threads."""
    found = torch.zeros((dbias.shape[0], rows), dtype=dbias.dtype)
    index = _index(window).expand(dbias.shape[0], -1)
    return found.scatter_add_(1, index, dbias.flatten(1)).t().contiguous()
