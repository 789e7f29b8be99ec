"""Attention by Triton: tiles, dropout, hidden keys, layouts, the position bias, and which kernel a launch takes."""

# Operations take the arguments of their case by name, which no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws
from tests.kernels.cases import biased, converted, leaves, offsets, packed, run, window
from tests.kernels.test_triton_contract import KERNELS
from tests.kernels.triton_testing import (
    assert_triton_is_accurate,
    configured,
    interpreted_only,
    philox,
    poison,
)
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.checks import Packed
from xfm_fast.kernels.reference import HIDDEN
from xfm_fast.kernels.triton import launch, relpos_attention, relpos_table, varlen_attention
from xfm_fast.kernels.triton.launch import LaunchConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        ("relpos, 17 tokens", (16, 128)),
        ("bias, windows", (64, 16)),
        ("varlen, masked", (64, 16)),
        ("varlen, odd heads", (16, 128)),
    ],
)
def test_every_tile_size_gives_the_result(name: str, tiles: tuple[int, int]) -> None:
    sizes = dict(zip(("BLOCK_M", "BLOCK_N"), tiles, strict=True))
    with configured(
        lambda kernel: LaunchConfig({"HEADS": 2, **sizes} if "_heads" in kernel else sizes)
    ):
        assert_triton_is_accurate(KERNELS[name], KERNELS[name].arguments(torch.float16, grad=True))


def philox_keep(seed: int, head: int, origin: int, queries: int, keys: int, p: float) -> Tensor:
    """`[queries, keys]`: Philox with 7 rounds.

    Eight elements share a call: word j and half i of it are for key 8j and query 8i beyond the first of them.
    """
    q, k = np.arange(queries, dtype=np.uint64)[:, None], np.arange(keys, dtype=np.uint64)[None, :]
    first_key = k // np.uint64(32) * np.uint64(32) + k % np.uint64(8)
    first_query = q // np.uint64(16) * np.uint64(16) + q % np.uint64(8)
    words = np.stack(philox(seed, (first_key, first_query, np.uint64(head), np.uint64(origin)), 7))
    word = np.broadcast_to(k // np.uint64(8) % np.uint64(4), (queries, keys)).astype(np.int64)
    halves = np.take_along_axis(words, word[None], 0)[0] >> (
        q // np.uint64(8) % np.uint64(2) * np.uint64(16)
    )
    return torch.from_numpy(halves & np.uint64(0xFFFF) >= np.uint64(round(p * 2**16)))


def dropped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    origin: int,
    seed: int,
    p: float,
) -> Tensor:
    """Attention of one sequence `[N, H, D]` with the weights that dropout keeps, by a probability in units of 2⁻¹⁶."""
    scores = torch.einsum("qhd,khd->hqk", q * q.shape[-1] ** -0.5, k)
    scores = scores if bias is None else scores + bias
    scores = scores if key_mask is None else scores.masked_fill(~key_mask, -torch.inf)
    keep = torch.stack(
        [philox_keep(seed, head, origin, len(q), len(k), p) for head in range(q.shape[1])]
    )
    weights = scores.softmax(-1).nan_to_num() * keep / (1 - round(p * 2**16) / 2**16)
    return torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v)


def dropped_batch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_mask: Tensor, dropout_p: float, seed: Tensor
) -> Tensor:
    """`ops.bias_attention`."""
    biases = bias.repeat(len(q) // len(bias), 1, 1, 1)
    entries = zip(q, k, v, biases, key_mask, strict=True)
    return torch.stack(
        [dropped(*entry, origin, int(seed), dropout_p) for origin, entry in enumerate(entries)]
    )


def dropped_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float,
    seed: Tensor,
    **_: Any,
) -> Tensor:
    """`ops.varlen_attention`."""
    bounds = zip(
        cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist(), strict=True
    )
    return torch.cat(
        [
            dropped(q[a:b], k[c:d], v[c:d], None, None, a, int(seed), dropout_p)
            for (a, b), (c, d) in bounds
        ]
    )


DROPOUT = {
    "bias, shared": (dropped_batch, biased(4, 2, 18, 20, 2, 32, masked=True), 0.3),
    "varlen, tails": (dropped_sequences, packed([20, 1, 70], [33, 5, 70], 2, 64), 0.2),
    "varlen, short": (dropped_sequences, packed([20, 0, 1, 32], [30, 5, 4, 32], 1, 32), 0.25),
}


@pytest.mark.parametrize("dtype", [torch.float32], ids=["fp32"])
@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_keeps_what_philox_says(name: str, dtype: torch.dtype) -> None:
    """Forward and backward, in every head and sequence."""
    definition, case, p = DROPOUT[name]
    given = case.arguments(dtype, grad=True) | {
        "dropout_p": p,
        "seed": torch.tensor([-(3 << 45) + 12345]),
    }
    operation = ops.bias_attention if "bias" in given else ops.varlen_attention

    def compute(call: Any, dtype: torch.dtype) -> list[Tensor]:
        values = converted(given, dtype)
        out = call(**values)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves(values), upstream)]

    with poison():
        found = compute(partial(operation, backend="triton"), dtype)
    plain, truth = draws(lambda: compute(definition, dtype)), compute(definition, torch.float64)
    for i, (value, true) in enumerate(zip(found, truth, strict=True)):
        assert_accurate(value, [each[i] for each in plain], true, f"result {i}")


# The longest queries and keys, their lengths; the forward kernel on Ampere and Hopper, and those of dk, dv and dq.
FORMS = {
    "captions": ([13] * 4, [13] * 4, ("heads", "heads"), ("short", "short")),
    "a caption an image": ([13] * 4, [577] * 4, ("heads_many", "heads_many"), ("", "short")),
    "longer captions": ([20] * 4, [577] * 4, ("heads_many", ""), ("", "short")),
    "several captions an image": ([60] * 4, [577] * 4, ("", ""), ("", "")),
}


@pytest.mark.parametrize("name", FORMS)
def test_kernels_by_the_lengths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The captions of an image come with the number of all tokens as their bound."""
    queries, keys, forward, backward = FORMS[name]
    q, k = torch.empty(sum(queries), 1, 64).half(), torch.empty(sum(keys), 1, 64).half()
    given = Packed(offsets(*queries), offsets(*keys), len(q), max(keys), 0.125)
    for arch, form in zip((80, 90), forward, strict=True):
        monkeypatch.setattr(varlen_attention, "architecture", lambda _, arch=arch: arch)
        taken: list[str] = []

        def config(kernel: str, taken: list[str] = taken) -> LaunchConfig:
            taken.append(kernel.removeprefix("varlen_"))
            raise InterruptedError

        with configured(config), pytest.raises(InterruptedError):
            varlen_attention.varlen_attention_forward(q, k, k, given)
        assert taken == [f"forward_{form}".rstrip("_")]
    for kernel, owned, longest, form in (
        ("dkdv", k, max(keys), backward[0]),
        ("dq", q, len(q), backward[1]),
    ):
        assert varlen_attention._form(kernel, owned, longest, given) == f"{kernel}_{form}".rstrip(
            "_"
        )


@interpreted_only
@pytest.mark.parametrize(
    ("name", "worth"), [("varlen, odd heads", 0.0), ("varlen, texts over images", 100.0)]
)
def test_tiles_are_found(name: str, worth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a search, or in equal shares; also with more sequences than one read of the offsets covers."""
    monkeypatch.setattr(varlen_attention, "_MORE_TILES", worth)
    monkeypatch.setattr(varlen_attention, "_CHUNK", 4)
    assert_triton_is_accurate(KERNELS[name], KERNELS[name].arguments(torch.float16, grad=True))


def test_tiles_of_half_as_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys are known to fill whole tiles and a few more, sums are separate until the end."""
    monkeypatch.setattr(varlen_attention, "_prefers_narrow_tiles", lambda *_: True)
    case = packed([70, 40], [33, 33], 2, 64)
    assert_triton_is_accurate(case, case.arguments(torch.float32, grad=True))


def test_masked_keys_with_enormous_scores_leave_no_trace() -> None:
    mask = torch.tensor([True, False, True, True, False, True])
    case = packed([4], [6], 1, 32, mask)
    given = case.arguments(grad=True)
    with torch.no_grad():
        given["k"][1], given["v"][4] = 1e4, 1e30
    assert_triton_is_accurate(case, given)
    assert not run(case, given, "triton")[1][~mask].any()


@pytest.mark.parametrize(("entries", "dtype"), [(1, torch.float32), (2, torch.float16)])
def test_what_sees_nothing_is_zero_and_moves_nothing(entries: int, dtype: torch.dtype) -> None:
    """A query of one head whose bias hides all, in three ways of hiding; and a batch entry whose mask does."""
    case = biased(4, entries, 7, 21, 2, 16, masked=True)
    given = case.arguments(dtype, grad=True)
    with torch.no_grad():
        bias = given["bias"]
        bias[0, 0, 3] = -torch.inf
        bias[-1, 1, 5] = torch.finfo(torch.float32).min if dtype == torch.float32 else -torch.inf
        # Over the scale the least of all numbers becomes infinite, and this one does not.
        bias[0, 1, 2] = 1.5 * HIDDEN if dtype == torch.float32 else -torch.inf
    given["key_mask"][2] = False
    assert_triton_is_accurate(case, given)
    out, lse, dk, dv, dq, dbias = run(case, given, "triton")
    blind = (
        out[0, 3, 0],
        out[0, 2, 1],
        out[2],
        dq[0, 3, 0],
        dq[0, 2, 1],
        dq[2],
        dk[2],
        dv[2],
        dbias[0, 0, 3],
    )
    assert not any(value.any() for value in (*blind, dbias[-1, 1, 5]))
    assert (lse[2] == -99).all()
    assert lse[0, 0, 3] == -99


BIASES = {
    "keys first": lambda b: b.transpose(2, 3).contiguous().transpose(2, 3),
    "heads last": lambda b: b.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "one row for all": lambda b: b[:, :1, :1].expand(*b.shape),
}


@pytest.mark.parametrize("layout", BIASES)
def test_layouts_of_the_bias(layout: str) -> None:
    case = biased(2, 2, 6, 21, 2, 16)
    given = case.arguments(torch.float16, grad=True)
    laid_out = BIASES[layout](given["bias"].detach())
    views, dense = (
        {**given, "bias": bias.requires_grad_()}
        for bias in (laid_out, laid_out.contiguous().clone())
    )
    for value, same in zip(run(case, views, "triton"), run(case, dense, "triton"), strict=True):
        torch.testing.assert_close(value, same, rtol=0, atol=0)


def test_scale_and_large_scores() -> None:
    case = window(3, 3, 1, 2, 64)
    given = case.arguments(torch.float16, grad=True)
    with torch.no_grad():
        for name, factor in (("q", 3), ("k", 3), ("table", 10)):
            given[name].mul_(factor)
    assert_triton_is_accurate(case._replace(operation=partial(case.operation, scale=0.3)), given)


def test_large_batches_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven entries with room for three: parts of three, three and one, whose bias gradients meet in one sum."""
    entry = 2 * 2 * 13 * 16  # bytes of the gradients of the scores of two heads
    monkeypatch.setattr(relpos_attention, "_SCORES_BYTES", 3 * entry + entry // 2)
    assert [relpos_attention.entries_at_once(batch, entry) for batch in (7, 8, 4)] == [3, 3, 2]
    assert relpos_attention.entries_at_once(1, 5 * entry) == 1
    case = window(3, 4, 7, 2, 32)
    assert_triton_is_accurate(case, case.arguments(torch.float16, grad=True))


def table_of(height: int, width: int, heads: int = 2) -> Tensor:
    return torch.randn((2 * height - 1) * (2 * width - 1) + 3, heads)


def turn(bias: Tensor) -> Tensor:
    """`[H, queries, keys]`, padded → `[H, keys, queries]`."""
    turned, tokens = torch.full_like(bias, -torch.inf), bias.shape[1]
    turned[..., :tokens] = bias[..., :tokens].transpose(1, 2)
    return turned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(3, 4), (2, 70)], ids=str)
def test_bias_is_the_table_entry_over_the_scale_and_infinite_beyond(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    table, tokens = table_of(*size), 1 + size[0] * size[1]
    with poison():
        bias = relpos_table.materialise_bias(table, size, dtype, 0.3)
        turned = relpos_table.materialise_bias(table, size, dtype, 0.3, turned=True)
    assert bias.is_contiguous()
    entries = reference.position_bias(table, size)
    divided = ((entries - entries.amax(-1, keepdim=True)) * (1 / 0.3)).to(bias.dtype)
    torch.testing.assert_close(bias[..., :tokens], divided, rtol=0, atol=0)
    assert (bias[..., tokens:] == -torch.inf).all()
    assert torch.equal(turned, turn(bias))


def folded(plain: Tensor) -> Tensor:
    """The first `[N, N_pad]` rows and columns of a bias in fragments, by the definition of Hopper's accumulators."""
    heads, row_tiles, column_tiles = plain.shape[:3]
    # [half, columns // 32, warp, lane // 4, lane % 4, eight of columns, column of two]
    parts = plain.view(heads, row_tiles, column_tiles, 2, 2, 8, 8, 4, 4, 2)
    return parts.permute(0, 1, 5, 3, 6, 2, 4, 8, 7, 9).reshape(
        heads, row_tiles * 128, column_tiles * 64
    )


# 131 and 13 tokens: a tail behind whole tiles, and one of its own.
@pytest.mark.parametrize(("size", "head_dim"), [((1, 130), 32), ((3, 4), 64)], ids=str)
def test_fragments_hold_the_bias_in_the_order_of_the_accumulators(
    size: tuple[int, int], head_dim: int
) -> None:
    case, scale = window(*size, 2, 2, head_dim), head_dim**-0.5
    given = case.arguments(torch.float16, grad=True)
    with poison():
        fragments = relpos_table.materialise_bias(
            given["table"], size, torch.float16, scale, fragments=True
        )
        plain = relpos_table.materialise_bias(given["table"], size, torch.float16, scale)
    found = folded(fragments)
    assert torch.equal(found[:, : plain.shape[1]], plain)
    assert not found.isnan().any()
    assert_triton_is_accurate(case, given, bias=fragments)


@pytest.mark.parametrize("layout", ["heads first", "not at a vector"])
def test_keys_that_no_descriptor_can_have_are_copied(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor's rows begin at multiples of 16 bytes, heads lie side by side, and strides contain each other."""
    shape, case = (2, 73, 2, 32), window(8, 9, 2, 2, 32)
    given = case.arguments(torch.float16)
    k = given["k"]
    if layout == "heads first":
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        k = torch.randn(math.prod(shape) + 1).half()[1:].view(shape)
    bias = relpos_table.materialise_bias(
        given["table"], (8, 9), torch.float16, 32**-0.5, fragments=True
    )
    monkeypatch.setattr(relpos_attention, "_LARGEST_GRID", 1)  # an entry of the batch a launch
    assert_triton_is_accurate(case, given | {"k": k, "v": k}, bias=bias)


@interpreted_only
def test_fragments_are_for_hopper_whatever_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not relpos_table.takes_fragments(64, torch.bfloat16, CPU)
    # PyTorch's compute capability of gfx942 is 9.4.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch.architecture(torch.device("cuda")) == 0
    assert not relpos_table.takes_fragments(64, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.version, "hip", None)
    tuned = {
        "relpos_forward": {
            "bf16/64": {"tiles": {"BLOCK_M": 64, "BLOCK_N": 64}, "num_warps": 4, "num_stages": 3}
        }
    }
    monkeypatch.setattr(launch, "_tuned", lambda _: tuned)
    shapes = ((64, torch.bfloat16), (64, torch.float32), (80, torch.bfloat16), (0, torch.bfloat16))
    assert [relpos_table.takes_fragments(*shape, torch.device("cuda")) for shape in shapes] == [
        True,
        *[False] * 3,
    ]


@pytest.mark.parametrize("entry", [1e6, -torch.inf])
@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.bfloat16, 60000.0), (torch.float32, 1e30)], ids=["bf16", "fp32"]
)
def test_bias_beyond_the_range_stays_finite(
    entry: float, dtype: torch.dtype, largest: float
) -> None:
    bias = relpos_table.materialise_bias(
        torch.tensor([[0.0], [0.0], [entry], [entry]]), (1, 1), dtype, 0.125
    )
    least = max(-largest, -abs(entry) / 0.125)
    expected = torch.tensor([[least, 0] if entry < 0 else [0, least]] * 2, dtype=bias.dtype)
    assert torch.equal(bias[0, :, :2], expected)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["fp16"])
def test_what_a_row_of_the_bias_has_in_common_costs_no_digits(dtype: torch.dtype) -> None:
    """Entries of quarters, which no constant rounds."""
    case = window(3, 5, 2, 2, 32)
    given = case.arguments(dtype, grad=True)
    given["table"] = ((table_of(3, 5) * 4).round() / 4).requires_grad_()
    moved = given | {"table": (given["table"].detach() - 1e5).requires_grad_()}
    for found, expected in zip(run(case, moved, "triton"), run(case, given, "triton"), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("size", [(4, 7), (2, 40)], ids=str)
def test_table_gradient_is_the_transpose_of_the_lookup(size: tuple[int, int]) -> None:
    """Also where a row of the window is wider than a tile."""
    tokens = 1 + size[0] * size[1]
    dbias = torch.full((2, 3, tokens, 128), torch.nan)
    dbias[..., :tokens] = torch.randn(2, 3, tokens, tokens)
    with poison():
        actual = relpos_table.table_gradient(dbias, size)
        turned = relpos_table.table_gradient(torch.stack([*map(turn, dbias)]), size, turned=True)
    results = []
    for dtype in (torch.float32, torch.float64):
        table = torch.zeros_like(table_of(*size, 3), dtype=dtype).requires_grad_()
        reference.position_bias(table, size).backward(dbias[..., :tokens].to(dtype).sum(0))
        results.append(table.grad)
    for found in (actual, turned):
        assert_accurate(found, results[:1], results[1], "dtable")
