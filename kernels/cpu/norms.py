"""LayerNorm on CPU with its inputs: residual, LayerScale, DropPath and dropout, or the text embeddings.

PyTorch's LayerNorm does the work; added are fp32 statistics in every precision, a sum in one pass, and a backward that
returns every gradient at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .workspace import Dropout, scratch


class AddLayerNorm(NamedTuple):
    """The forward: `normed` in the dtype of x or of the sum, `summed` as wide as its terms, statistics `[rows]`."""

    normed: Tensor
    summed: Tensor
    mean: Tensor
    rstd: Tensor


class AddLayerNormGradients(NamedTuple):
    """Results of a backward; None for absent inputs."""

    dx: Tensor
    dresidual: Tensor | None
    dweight: Tensor
    dbias: Tensor | None
    dgamma: Tensor | None


class EmbedGradients(NamedTuple):
    """Gradients of the tables, of the row of the token type, and of the norm."""

    dword: Tensor
    dposition: Tensor
    dtype_row: Tensor
    dweight: Tensor
    dbias: Tensor


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    wide: bool = False,
) -> AddLayerNorm:
    """`summed = residual + row_scale · gamma · dropout(x)` and its LayerNorm.

    x, residual `[..., M]`, possibly of two precisions; weight, bias, gamma `[M]`; row_scale `[B]`; seed `[1]` int64,
    required for dropout. `normed` has the dtype of x, or of the sum with `wide`.
    """
    summed = _sum(x, residual, gamma, row_scale, dropout_p, seed)
    normed, mean, rstd = normalise(summed, weight, bias, eps)
    return AddLayerNorm(normed if wide else normed.to(x.dtype), summed, mean, rstd)


def add_layer_norm_backward(
    dnormed: Tensor,
    dsummed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    has_residual: bool = True,
    has_bias: bool = True,
) -> AddLayerNormGradients:
    """Gradients of every floating-point input; `dsummed` None means zero. Without gamma, only the dtype of x matters.

    `dx` and `dresidual` are one tensor if the branch has no scale and their dtypes agree.
    """
    ds, dweight, dbias = normalise_backward(dnormed, summed, weight, mean, rstd)
    if dsummed is not None:
        ds = ds + dsummed
    kept, dgamma = _kept(summed, x.dtype, dropout_p, seed), None
    if gamma is not None:
        products = ds.to(_wide(summed)) * (x if kept is None else x * kept)
        if row_scale is None:
            dgamma = products.flatten(0, -2).sum(0).to(gamma.dtype)
        else:
            sums = products.view(row_scale.shape[0], -1, summed.shape[-1]).sum(1)
            dgamma = (row_scale[:, None] * sums).sum(0).to(gamma.dtype)
    factor = _factor(gamma, row_scale, summed)
    branch = ds if factor is None else ds * factor
    if kept is not None:
        branch = branch * kept
    dbias = dbias if has_bias else None
    return AddLayerNormGradients(branch.to(x.dtype), ds if has_residual else None, dweight, dbias, dgamma)


def embed_layer_norm_forward(
    tokens: Tensor,
    positions: Tensor,
    word: Tensor,
    position: Tensor,
    type_row: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm `[..., M]` of `word[tokens] + position[positions] + type_row`, and mean and rstd `[rows]`.

    IndexError for a token or position outside its table.
    """
    return normalise(_embed(tokens, positions, word, position, type_row), weight, bias, eps)


def embed_layer_norm_backward(
    dnormed: Tensor,
    tokens: Tensor,
    positions: Tensor,
    word: Tensor,
    position: Tensor,
    type_row: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int | None = None,
) -> EmbedGradients:
    """Gradients of the five floating-point inputs, from recomputed sums; row `padding_idx` receives none."""
    embedded = _embed(tokens, positions, word, position, type_row)
    ds, dweight, dbias = normalise_backward(dnormed, embedded, weight, mean, rstd)
    skipped = -1 if padding_idx is None else padding_idx
    rows = ds.reshape(-1, ds.shape[-1]).to(_wide(ds))
    dword, dposition = (
        torch.ops.aten.embedding_dense_backward(rows, ids.reshape(-1), table.shape[0], skipped, False).to(table.dtype)
        for ids, table in ((tokens, word), (positions, position))
    )
    return EmbedGradients(dword, dposition, rows.sum(0).to(type_row.dtype), dweight, dbias)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _factor(gamma: Tensor | None, row_scale: Tensor | None, x: Tensor) -> Tensor | None:
    """The factor of the branch: `[M]`, `[B, 1, ..., M]` or `[B, 1, ..., 1]`."""
    if row_scale is None:
        return gamma
    rows = row_scale.view(-1, *[1] * (x.ndim - 1))
    return rows if gamma is None else rows * gamma


def _kept(x: Tensor, dtype: torch.dtype, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    """The dropout factor of every element of x, reproducible by the seed: 0 or 1/(1-p)."""
    if not dropout_p:
        return None
    seed = checks.seed_of(dropout_p, seed)
    if dropout_p >= 1:
        return torch.zeros_like(x, dtype=dtype)
    dropout = Dropout(dropout_p, seed)
    return dropout.mask(tuple(x.shape), dtype).mul_(1 / dropout.kept)


def _sum(
    x: Tensor,
    residual: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    kept, factor = _kept(x, x.dtype, dropout_p, seed), _factor(gamma, row_scale, x)
    branch = x if kept is None else x * kept
    if residual is None:
        return branch if factor is None else (branch * factor).to(x.dtype)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    # `addcmul` reads and writes once where a product and a sum would twice.
    return (residual + branch if factor is None else torch.addcmul(residual, branch, factor)).to(dtype)


def normalise(summed: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of `[..., M]` in its dtype, and mean and rstd `[rows]`, at least fp32."""
    # PyTorch keeps the statistics in the type of the parameters, so these are what has to be wide.
    wide = _wide(summed)
    bias = None if bias is None else bias.to(wide)
    normed, mean, rstd = torch.native_layer_norm(summed, (summed.shape[-1],), weight.to(wide), bias, eps)
    return normed, mean.flatten(), rstd.flatten()


def normalise_backward(
    dnormed: Tensor, summed: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, in its dtype, and of weight and bias."""
    rows = summed.reshape(-1, summed.shape[-1])
    wide = weight.to(_wide(summed))
    upstream = dnormed.reshape(rows.shape)
    if upstream.dtype != rows.dtype:
        upstream = scratch("normed gradient", tuple(rows.shape), rows.dtype).copy_(upstream)
    ds, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        upstream,
        rows,
        (rows.shape[1],),
        mean[:, None],
        rstd[:, None],
        wide,
        torch.empty_like(wide),
        [True, True, True],
    )
    return ds.view(summed.shape), dweight.to(weight.dtype), dbias.to(weight.dtype)


def _embed(tokens: Tensor, positions: Tensor, word: Tensor, position: Tensor, type_row: Tensor) -> Tensor:
    return F.embedding(tokens, word).add_(type_row).add_(F.embedding(positions, position))
