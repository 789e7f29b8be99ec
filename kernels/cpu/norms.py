"""LayerNorm on CPU, with a residual, LayerScale, DropPath and dropout before it, or the text embeddings.

PyTorch's LayerNorm does the work; added are fp32 statistics in every precision, a sum in one pass, and a backward that
returns all gradients at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..checks import AddNorm, Embedding
from .workspace import Dropout, even_slices, in_dtype

# Half-precision elements that a thread widens at once.
_TILE = 1 << 18


class AddLayerNorm(NamedTuple):
    """The forward: `normed` in the dtype of x or of the sum, `summed` as wide as its terms, statistics `[rows]`."""

    normed: Tensor
    summed: Tensor
    mean: Tensor
    rstd: Tensor


class AddLayerNormGradients(NamedTuple):
    """Results of a backward; `dx` and `dresidual` are one tensor if the branch has no scale and their dtypes agree."""

    dx: Tensor
    dresidual: Tensor
    dweight: Tensor
    dbias: Tensor
    dgamma: Tensor | None


def add_layer_norm_forward(a: AddNorm) -> AddLayerNorm:
    """Compute `summed = residual + row_scale · gamma · dropout(x)` and its LayerNorm."""
    assert a.residual is not None
    mask = _dropout_factors(a.x, a.x.dtype, a.dropout_p, a.seed)
    summed = add_branch(a.x if mask is None else a.x * mask, a.residual, a.gamma, a.row_scale)
    normed, mean, rstd = layer_norm_forward(summed, a.weight, a.bias, a.eps)
    return AddLayerNorm(normed if a.wide else normed.to(a.x.dtype), summed, mean, rstd)


def add_layer_norm_backward(
    dnormed: Tensor, dsummed: Tensor | None, summed: Tensor, mean: Tensor, rstd: Tensor, a: AddNorm
) -> AddLayerNormGradients:
    """Compute the gradients of all floating-point inputs; `dsummed` None means zero. Without gamma, only x's dtype
    is read.
    """
    x, gamma, row_scale = a.x, a.gamma, a.row_scale
    ds, dweight, dbias = layer_norm_backward(dnormed, summed, a.weight, mean, rstd)
    if dsummed is not None:
        ds = ds + dsummed
    mask, dgamma = _dropout_factors(summed, x.dtype, a.dropout_p, a.seed), None
    if gamma is not None:
        products = ds.to(_wide(summed)) * (x if mask is None else x * mask)
        if row_scale is None:
            dgamma = products.flatten(0, -2).sum(0)
        else:
            entries, width = row_scale.shape[0], summed.shape[-1]
            rows = summed.numel() // max(1, entries * width)
            dgamma = (row_scale[:, None] * products.view(entries, rows, width).sum(1)).sum(0)
        dgamma = dgamma.to(gamma.dtype)
    factor = _factor(gamma, row_scale, summed)
    dbranch = ds if factor is None else ds * factor
    if mask is not None:
        dbranch = dbranch * mask
    return AddLayerNormGradients(dbranch.to(x.dtype), ds, dweight, dbias, dgamma)


def embedding_norm_forward(a: Embedding) -> tuple[Tensor, Tensor, Tensor]:
    """Return the LayerNorm `[..., M]` of `word[tokens] + position[positions] + type_row`, mean and rstd `[rows]`.

    IndexError for a token or position outside its table.
    """
    return layer_norm_forward(_embed(a), a.weight, a.bias, a.eps)


def embedding_norm_backward(
    dnormed: Tensor, mean: Tensor, rstd: Tensor, a: Embedding
) -> tuple[Tensor, ...]:
    """Compute the gradients of the tables, the type row and the norm; row `padding_idx` receives none."""
    embedded = _embed(a)
    ds, dweight, dbias = layer_norm_backward(dnormed, embedded, a.weight, mean, rstd)
    padding = -1 if a.padding_idx is None else a.padding_idx
    rows = ds.reshape(-1, ds.shape[-1]).to(_wide(ds))
    tables = []
    for ids, table in ((a.tokens, a.word), (a.positions, a.position)):
        count = table.shape[0]
        gradient = torch.ops.aten.embedding_dense_backward(
            rows, ids.reshape(-1), count, padding, False
        )
        tables.append(gradient.to(table.dtype))
    return *tables, rows.sum(0).to(a.type_row.dtype), dweight, dbias


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def of_rows(row_scale: Tensor, x: Tensor) -> Tensor:
    """Return the factors `[B]` of the entries of x as `[B, 1, ..., 1]`."""
    return row_scale.view(-1, *[1] * (x.ndim - 1))


def _factor(gamma: Tensor | None, row_scale: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the factor of a branch: `[M]`, `[B, 1, ..., M]` or `[B, 1, ..., 1]`."""
    if row_scale is None:
        return gamma
    rows = of_rows(row_scale, x)
    return rows if gamma is None else rows * gamma


def _dropout_factors(
    x: Tensor, dtype: torch.dtype, dropout_p: float, seed: Tensor | None
) -> Tensor | None:
    """Return the dropout factor of each element of x, reproducible by the seed: 0 or 1/(1-p)."""
    if not dropout_p:
        return None
    dropout = Dropout(dropout_p, checks.seed_of(dropout_p, seed))
    return dropout.mask(tuple(x.shape), dtype).mul_(1 / dropout.kept)


def add_branch(
    branch: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    *,
    in_place: bool = False,
) -> Tensor:
    """Return `residual + row_scale · gamma · branch`, as wide as its two terms, in one pass over memory.

    `in_place`: overwrite `branch` if it is as wide as the sum, since a second tensor would fragment memory.
    """
    dtype = torch.promote_types(branch.dtype, residual.dtype)
    factor = _factor(gamma, row_scale, branch)
    out = branch if in_place and branch.dtype == dtype else None
    if factor is None:
        return torch.add(residual, branch, out=out)
    out = out if factor.dtype == branch.dtype else None
    return torch.addcmul(residual, branch, factor, out=out).to(dtype)


def layer_norm_forward(
    summed: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the LayerNorm of `[..., M]` in its dtype, and mean and rstd `[rows]`, at least fp32."""
    # PyTorch returns the statistics in the dtype of the parameters.
    wide = _wide(summed)
    bias = None if bias is None else bias.to(wide)
    normed, mean, rstd = torch.native_layer_norm(
        summed, (summed.shape[-1],), weight.to(wide), bias, eps
    )
    return normed, mean.flatten(), rstd.flatten()


def layer_norm_backward(
    dnormed: Tensor, summed: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the sum, in its dtype, and of weight and bias."""
    rows, upstream = (t.reshape(-1, summed.shape[-1]) for t in (summed, dnormed))
    width, wide = rows.shape[1], _wide(summed)
    factors = weight.to(wide)

    def gradients(
        rows: Tensor, upstream: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        statistics = (mean[:, None], rstd[:, None])
        return torch.ops.aten.native_layer_norm_backward(
            upstream, rows, (width,), *statistics, factors, factors, [True, True, True]
        )

    if rows.dtype == upstream.dtype == wide:
        ds, dweight, dbias = gradients(rows, upstream, mean, rstd)
    else:
        # PyTorch adds rows in the dtype of the upstream gradient: half precision loses what they have in common.
        ds = torch.empty(rows.shape, dtype=rows.dtype)
        dweight, dbias = torch.zeros(2, width, dtype=wide)
        for tile in even_slices(len(rows), max(1, torch.get_num_threads() * _TILE // width)):
            ds[tile], tile_dweight, tile_dbias = gradients(
                in_dtype("summed", rows[tile], wide),
                in_dtype("normed gradient", upstream[tile], wide),
                mean[tile],
                rstd[tile],
            )
            dweight += tile_dweight
            dbias += tile_dbias
    return ds.view(summed.shape), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _embed(a: Embedding) -> Tensor:
    words = F.embedding(a.tokens, a.word)
    return words.add_(a.type_row).add_(F.embedding(a.positions, a.position))
