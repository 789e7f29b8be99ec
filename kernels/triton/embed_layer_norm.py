"""Word + position + type embedding with the LayerNorm behind them (the text input of RoBERTa, arXiv 1907.11692).

The sum of the embeddings is never stored: the backward gathers it again. The gradients of the tables are summed in the
order of the tokens: these are sorted, and one program adds all rows of one entry of a table, so equal inputs give equal
bits without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import Embedding
from .launch import KernelSpec, LaunchConfig
from .layer_norm import backward_config, forward_config, normalise, normalise_backward, width_of
from .rows import contiguous_rows, dense, first_stage_programs, launch_options, ordered_sum

_SEGMENTS = LaunchConfig({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128}, num_warps=4, num_stages=1)


@triton.jit
def embedding_sum(
    tokens_ptr, positions_ptr, word_ptr, position_ptr, type_ptr, rows, columns, there, across,
    words, places, WIDTH: tl.constexpr,
):  # fmt: skip
    """`[ROWS, BLOCK]` sums of embeddings, zero outside the tile; NaN for an id outside its table."""
    token = tl.load(tokens_ptr + rows, mask=there, other=0).to(tl.int64)
    place = tl.load(positions_ptr + rows, mask=there, other=0).to(tl.int64)
    known = (token >= 0) & (token < words) & (place >= 0) & (place < places)
    inside = (there & known)[:, None] & across[None, :]
    total = tl.load(word_ptr + token[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    total += tl.load(position_ptr + place[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    row = tl.load(type_ptr + columns, mask=across, other=0.0).to(tl.float32)
    total = tl.where(there[:, None], total + row[None, :], 0.0)
    return tl.where((there & ~known)[:, None] & across[None, :], float("nan"), total)


@triton.jit(do_not_specialize=["count", "words", "places"])
def embed_layer_norm_forward_kernel(
    tokens_ptr,
    positions_ptr,
    word_ptr,
    position_ptr,
    type_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    count,
    words,
    places,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program for ROWS tokens."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    there, across = rows < count, columns < WIDTH
    inside = there[:, None] & across[None, :]
    values = embedding_sum(
        tokens_ptr, positions_ptr, word_ptr, position_ptr, type_ptr, rows, columns, there, across, words, places, WIDTH
    )
    centred, mean, rstd = normalise(values, inside, eps, WIDTH)
    weight = tl.load(weight_ptr + columns, mask=across, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + columns, mask=across, other=0.0).to(tl.float32)[None, :]
    addresses = normed_ptr + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(addresses, centred * rstd[:, None] * weight + bias, mask=inside)
    tl.store(mean_ptr + rows, mean, mask=there)
    tl.store(rstd_ptr + rows, rstd, mask=there)


@triton.jit(do_not_specialize=["count", "words", "places"])
def embed_layer_norm_backward_kernel(
    dnormed_ptr,
    tokens_ptr,
    positions_ptr,
    word_ptr,
    position_ptr,
    type_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    ds_ptr,
    partials_ptr,
    stride_dnormed,
    count,
    words,
    places,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient of the sum of embeddings, fp32; partials of (weight, bias, type row) are `[3, programs, WIDTH]`."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    across = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=across, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    dtype_row = tl.zeros([BLOCK], tl.float32)
    for step in range(program, tl.cdiv(count, ROWS), programs):
        rows = step * ROWS + tl.arange(0, ROWS)
        there = rows < count
        inside = there[:, None] & across[None, :]
        far = rows.to(tl.int64)[:, None]
        dnormed = tl.load(dnormed_ptr + far * stride_dnormed + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        values = embedding_sum(
            tokens_ptr, positions_ptr, word_ptr, position_ptr, type_ptr, rows, columns, there, across, words, places,
            WIDTH,
        )  # fmt: skip
        mean = tl.load(mean_ptr + rows, mask=there, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=there, other=0.0)
        normalised = tl.where(inside, (values - mean[:, None]) * rstd[:, None], 0.0)
        ds = normalise_backward(dnormed, normalised, weight, rstd, WIDTH)
        tl.store(ds_ptr + far * WIDTH + columns[None, :], ds, mask=inside)
        dweight += tl.sum(dnormed * normalised, 0)
        dbias += tl.sum(dnormed, 0)
        dtype_row += tl.sum(ds, 0)
    place = partials_ptr + program * WIDTH + columns
    tl.store(place, dweight, mask=across)
    tl.store(place + programs * WIDTH, dbias, mask=across)
    tl.store(place + 2 * programs * WIDTH, dtype_row, mask=across)


@triton.jit(do_not_specialize=["count", "entries", "skipped"])
def segment_sum_kernel(
    ids_ptr,
    order_ptr,
    rows_ptr,
    table_ptr,
    count,
    entries,
    skipped,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The program at the first of a run of equal sorted ids adds the rows of the run; all other programs are done."""
    first = tl.program_id(0)
    entry = tl.load(ids_ptr + first)
    before = tl.load(ids_ptr + tl.maximum(first - 1, 0))
    if ((first == 0) | (before != entry)) & (entry != skipped) & (entry >= 0) & (entry < entries):
        columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        across = columns < WIDTH
        steps = tl.arange(0, BLOCK_ROWS)
        sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        start = first
        members = BLOCK_ROWS
        while members == BLOCK_ROWS:
            there = start + steps < count
            there = there & (tl.load(ids_ptr + start + steps, mask=there, other=-1) == entry)
            source = tl.load(order_ptr + start + steps, mask=there, other=0)
            addresses = rows_ptr + source[:, None] * WIDTH + columns[None, :]
            sums += tl.load(addresses, mask=there[:, None] & across[None, :], other=0.0)
            members = tl.sum(there.to(tl.int32), 0)
            start += BLOCK_ROWS
        tl.store(table_ptr + entry * WIDTH + columns, tl.sum(sums, 0), mask=across)


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
    """LayerNorm `[..., M]` of `word[tokens] + position[positions] + type_row`, and mean and rstd `[rows]` in fp32.

    An id outside its table makes its row NaN.
    """
    width, count = width_of(word), tokens.numel()
    normed = torch.empty(*tokens.shape, width, dtype=word.dtype, device=word.device)
    mean, rstd = (torch.empty(count, dtype=torch.float32, device=word.device) for _ in range(2))
    config = forward_config(width)
    if count:
        embed_layer_norm_forward_kernel[(triton.cdiv(count, config.tiles["ROWS"]),)](
            *_ids(tokens, positions),
            word.contiguous(),
            position.contiguous(),
            dense(type_row),
            dense(weight),
            dense(bias),
            normed,
            mean,
            rstd,
            count,
            word.shape[0],
            position.shape[0],
            eps,
            **launch_options(config, WIDTH=width),
        )
    return normed, mean, rstd


def embed_layer_norm_backward(dnormed: Tensor, mean: Tensor, rstd: Tensor, a: Embedding) -> tuple[Tensor, ...]:
    """Gradients of tables, type row and norm; zero in row `padding_idx` of both tables, as in RoBERTa."""
    word, position, weight = a.word, a.position, a.weight
    width, count = width_of(word), a.tokens.numel()
    upstream = contiguous_rows(dnormed)
    token_rows, position_rows = _ids(a.tokens, a.positions)
    ds = torch.empty(count, width, dtype=torch.float32, device=word.device)
    config = backward_config(width)
    programs = first_stage_programs(triton.cdiv(count, config.tiles["ROWS"]), word.device)
    partials = torch.empty(3, programs, width, dtype=torch.float32, device=word.device)
    embed_layer_norm_backward_kernel[(programs,)](
        upstream,
        token_rows,
        position_rows,
        word.contiguous(),
        position.contiguous(),
        dense(a.type_row),
        dense(weight),
        mean,
        rstd,
        ds,
        partials,
        upstream.stride(0),
        count,
        word.shape[0],
        position.shape[0],
        **launch_options(config, WIDTH=width),
    )
    dweight, dbias, dtype_row = ordered_sum(partials, weight, weight, a.type_row)
    dword, dposition = (
        embedding_gradient(ids, ds, table, a.padding_idx)
        for ids, table in ((token_rows, word), (position_rows, position))
    )
    return dword, dposition, dtype_row, dweight, dbias


def embedding_gradient(ids: Tensor, rows: Tensor, table: Tensor, padding_idx: int | None) -> Tensor:
    """The gradient of `table` `[V, M]`: every row `[T, M]` fp32 added to the entry of its id `[T]`, in their order."""
    gradient = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    count, width = rows.shape
    if count:
        ordered, order = torch.sort(ids.long(), stable=True)
        segment_sum_kernel[(count, triton.cdiv(width, _SEGMENTS.tiles["BLOCK_COLUMNS"]))](
            ordered,
            order,
            rows,
            gradient,
            count,
            table.shape[0],
            -1 if padding_idx is None else padding_idx,
            **launch_options(_SEGMENTS, WIDTH=width),
        )
    return gradient


def _ids(tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return tokens.reshape(-1).contiguous(), positions.reshape(-1).contiguous()


def _types(pointers: tuple[str, ...], scalars: tuple[str, ...]) -> Any:
    wide = {"mean_ptr", "rstd_ptr", "ds_ptr", "partials_ptr"}

    def types(variant: Any, dtype: str) -> dict[str, str]:
        ids = dict.fromkeys(("tokens_ptr", "positions_ptr"), "*i64")
        kinds = {p: "*fp32" if p in wide else f"*{dtype}" for p in pointers}
        return ids | kinds | dict.fromkeys(scalars, "i32") | ({"eps": "fp32"} if "normed_ptr" in pointers else {})

    return types


def _constants(variant: Any, dtype: str, config: LaunchConfig) -> dict[str, Any]:
    return {"WIDTH": variant["width"], **config.tiles}


_TABLES = ("word_ptr", "position_ptr", "type_ptr", "weight_ptr")

KERNELS: list[KernelSpec] = [
    KernelSpec(
        name="embed_layer_norm_forward",
        kernel=embed_layer_norm_forward_kernel,
        variants=({"width": 768},),
        types=_types((*_TABLES, "bias_ptr", "normed_ptr", "mean_ptr", "rstd_ptr"), ("count", "words", "places")),
        constants=_constants,
        config=lambda variant, dtype, arch: forward_config(variant["width"]),
        tensor_core=False,
    ),
    KernelSpec(
        name="embed_layer_norm_backward",
        kernel=embed_layer_norm_backward_kernel,
        variants=({"width": 768},),
        types=_types(
            (*_TABLES, "dnormed_ptr", "mean_ptr", "rstd_ptr", "ds_ptr", "partials_ptr"),
            ("stride_dnormed", "count", "words", "places"),
        ),
        constants=_constants,
        config=lambda variant, dtype, arch: backward_config(variant["width"]),
        tensor_core=False,
    ),
    KernelSpec(
        name="embedding_segment_sum",
        kernel=segment_sum_kernel,
        variants=({"width": 768},),
        types=lambda variant, dtype: (
            {"ids_ptr": "*i64", "order_ptr": "*i64", "rows_ptr": "*fp32", "table_ptr": f"*{dtype}"}
            | dict.fromkeys(("count", "entries", "skipped"), "i32")
        ),
        constants=_constants,
        config=lambda variant, dtype, arch: _SEGMENTS,
        tensor_core=False,
    ),
]
