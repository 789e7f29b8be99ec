"""The kernels of packed attention, interpreted, against the definition in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws
from tests.kernels.triton_testing import poison
from xfm_fast.kernels import reference
from xfm_fast.kernels.checks import Packed
from xfm_fast.kernels.triton import varlen_attention
from xfm_fast.kernels.triton.launch import LaunchConfig

NAMES = ("out", "dq", "dk", "dv")


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    longest: tuple[int, int]
    dout: Tensor
    key_mask: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None


def case(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    offsets: torch.dtype = torch.int32,
    **options: Any,
) -> Case:
    """Queries of their own and keys and values of one projection, as in cross-attention."""
    q, dout = torch.randn(2, sum(lengths_q), heads, head_dim).to(dtype).unbind(0)
    k, v = torch.randn(sum(lengths_k), 2, heads, head_dim).to(dtype).unbind(1)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(offsets) for n in (lengths_q, lengths_k))
    return Case(q, k, v, cu_q, cu_k, (max(lengths_q, default=0), max(lengths_k, default=0)), dout, **options)


def run(c: Case, module: Any = varlen_attention, scale: float | None = None) -> tuple[Tensor, ...]:
    scale = float(c.q.shape[-1] ** -0.5) if scale is None else scale
    packed = Packed(c.cu_q, c.cu_k, *c.longest, scale, c.dropout_p, c.seed, c.key_mask)
    with poison():
        out, lse = module.varlen_attention_forward(c.q, c.k, c.v, packed)
        return out, *module.varlen_attention_backward(c.dout, c.q, c.k, c.v, out, lse, packed), lse


def kept_share(p: float) -> float:
    """What dropout leaves of weights on average: the probability is a multiple of 2⁻¹⁶."""
    return 1 - round(p * 2**16) / 2**16


def philox_keep(seed: int, head: int, origin: int, queries: int, keys: int, p: float) -> Tensor:
    """`[queries, keys]`: Philox 4x32 with 7 rounds, written down a second time, in NumPy.

    Eight elements share a call: word j and half i of it are for key 8j and query 8i beyond the first of them.
    """
    low = np.uint64(0xFFFFFFFF)
    q, k = np.arange(queries, dtype=np.uint64)[:, None], np.arange(keys, dtype=np.uint64)[None, :]
    first_key = k // np.uint64(32) * np.uint64(32) + k % np.uint64(8)
    first_query = q // np.uint64(16) * np.uint64(16) + q % np.uint64(8)
    counter = (first_key, first_query, np.uint64(head), np.uint64(origin))
    c0, c1, c2, c3 = (np.broadcast_to(c, (queries, keys)) for c in counter)
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(7):
        product0, product2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (
            (product2 >> np.uint64(32)) ^ c1 ^ np.uint64(key0),
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(key1),
        )
        c1, c3 = product2 & low, product0 & low
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    word = np.broadcast_to(k // np.uint64(8) % np.uint64(4), (queries, keys)).astype(np.int64)
    words = np.take_along_axis(np.stack([c0, c1, c2, c3]), word[None], 0)[0]
    halves = words >> (q // np.uint64(8) % np.uint64(2) * np.uint64(16)) & np.uint64(0xFFFF)
    return torch.from_numpy(halves >= np.uint64(round(p * 2**16)))


def definition(c: Case, dtype: torch.dtype, *, late: bool = False) -> tuple[Tensor, ...]:
    """`reference.varlen_attention` and its gradients; with dropout, the same formula with the weights that are kept.

    Args:
        late: normalise behind the product with v, as the kernels do: the gradient of the scores is then a difference of
            sums in another order, which PyTorch's own finds to be exactly 0 where there is a single key.
    """
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (c.q, c.k, c.v))
    scale = q.shape[-1] ** -0.5
    if not c.dropout_p and not late:
        out = reference.varlen_attention(q, k, v, c.cu_q, c.cu_k, scale, 0.0, c.key_mask)
    else:
        pieces = []
        for (a, b), (d, e) in zip(c.cu_q.unfold(0, 2, 1).tolist(), c.cu_k.unfold(0, 2, 1).tolist(), strict=True):
            scores = torch.einsum("qhd,khd->hqk", q[a:b] * scale, k[d:e])
            if late:
                if c.key_mask is not None:
                    scores = scores.masked_fill(~c.key_mask[d:e], -torch.inf)
                # Without a key left, all weights are zeros.
                weights = (scores - scores.detach().logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
                sums = weights.sum(-1).t()[..., None]
                sums = sums + (sums == 0)
                pieces.append(torch.einsum("hqk,khd->qhd", weights, v[d:e]) / sums)
                continue
            assert c.seed is not None
            given = (a, b - a, e - d, c.dropout_p)
            keep = torch.stack([philox_keep(int(c.seed), h, *given) for h in range(q.shape[1])])
            weights = scores.softmax(-1) * keep / kept_share(c.dropout_p)
            pieces.append(torch.einsum("hqk,khd->qhd", weights, v[d:e]))
        out = torch.cat(pieces)
    out.backward(c.dout.to(dtype))
    return out.detach(), *(t.grad if t.grad is not None else torch.zeros_like(t) for t in (q, k, v))


def check(c: Case, module: Any = varlen_attention) -> None:
    actual = run(c, module)
    plain, truth = draws(lambda: definition(c, c.q.dtype)), definition(c, torch.float64)
    if not c.dropout_p:
        plain += draws(lambda: definition(c, c.q.dtype, late=True))
    for name, value, true_value, *same in zip(NAMES, actual, truth, *plain, strict=False):
        assert_accurate(value, same, true_value, name)


SMALL = {"BLOCK_M": 16, "BLOCK_N": 16}
RAGGED = {
    "self-attention": ([13, 0, 1, 32, 7], [13, 0, 1, 32, 7]),
    "zeros on both sides": ([5, 0, 1, 17, 0, 3], [5, 7, 0, 17, 0, 1]),
    "texts over images": ([66, 0, 33], [50, 50, 65]),
    "many single tokens": ([1] * 8, [1, 2] * 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_ragged_batches(lengths: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    check(case(*lengths, 2, 64, dtype))


def test_sequences_that_are_short_on_average_have_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The captions of images as queries: their bound is the number of all tokens. Few keys each, or many."""
    taken: list[str] = []

    def config_for(kernel: str, *rest: Any) -> LaunchConfig:
        taken.append(kernel)
        return LaunchConfig({"HEADS": 2, **SMALL} if "_heads" in kernel else SMALL)

    monkeypatch.setattr(varlen_attention, "config_for", config_for)
    c = case([13, 9, 0, 40], [90, 5, 30, 30], 1, 32, torch.float16)
    check(c._replace(longest=(62, 155)))
    assert taken == ["varlen_forward_heads_many", "varlen_dkdv", "varlen_dq_short"]
    taken.clear()
    check(c._replace(longest=(62, 155), dropout_p=0.2, seed=torch.tensor([5])))
    assert taken == ["varlen_forward_short", "varlen_dkdv_dropout", "varlen_dq_short"]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("searched", [False, True], ids=["an equal share of tiles", "searched tiles"])
def test_several_heads_a_program(heads: int, searched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that do not fill the last program, sequences of more tiles than one, and some without queries or keys."""
    monkeypatch.setattr(varlen_attention, "_WORTH", 0.0 if searched else 100.0)
    check(case([13, 0, 33, 1, 16, 2], [13, 4, 20, 0, 16, 40], heads, 32, torch.float16))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_several_heads_a_program_of_every_head_dimension(head_dim: int) -> None:
    mask = torch.rand(26) > 0.4
    mask[20:] = False
    check(case([13, 3, 5], [17, 3, 6], 2, head_dim, torch.float16, key_mask=mask))


@pytest.mark.parametrize("keys", [65, 80, 64, 81], ids=lambda n: f"{n} keys")
def test_images_of_one_size_end_in_a_short_tile(keys: int) -> None:
    c = case([70, 3], [keys, keys], 1, 64, torch.float32)
    packed = Packed(c.cu_q, c.cu_k, *c.longest, 0.125)
    config = LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64})
    assert varlen_attention._tail(c.k, packed, config) == (16 if keys in (65, 80) else 0)
    assert varlen_attention._tail(c.k, packed._replace(max_k=keys + 1), config) == 0
    check(c)


@pytest.mark.parametrize("keys", [(33, 33), (64, 64), (70, 5)], ids=str)
def test_tiles_of_half_as_many_keys(keys: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys are known to fill whole tiles and a few more, sums are kept apart until the end."""
    monkeypatch.setattr(varlen_attention, "_narrower", lambda *_: True)
    check(case([70, 40], keys, 2, 64, torch.float32))


def test_tiles_are_narrower_where_that_saves_a_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.empty(1, 12, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(varlen_attention, "multiprocessors", lambda _: 132)
    assert not varlen_attention._narrower(624, q)  # not on Hopper
    monkeypatch.setattr(varlen_attention, "architecture", lambda _: 90)
    programs = (132, 528, 529, 660, 661, 1056, 1320, 1321, 10_000)
    found = [varlen_attention._narrower(count, q) for count in programs]
    assert found == [False, False, True, True, False, False, True, False, False]
    assert not varlen_attention._narrower(624, q.float())
    monkeypatch.setattr(varlen_attention, "tuned_config", lambda *_: LaunchConfig(SMALL))
    assert not varlen_attention._narrower(624, q)


@pytest.mark.parametrize(
    ("lengths", "forms"),
    [
        (([13] * 4, [13] * 4), ("heads", "heads")),
        (([13] * 4, [577] * 4), ("heads_many", "heads_many")),
        (([20] * 4, [577] * 4), ("heads_many", "")),
        (([60] * 4, [577] * 4), ("", "")),
    ],
    ids=["captions", "a caption an image", "longer ones", "several captions an image"],
)  # fmt: skip
def test_forms_by_the_lengths(
    lengths: tuple[list[int], list[int]], forms: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The captions of an image come with the number of all tokens as their bound."""
    c = case(*lengths, 1, 64, torch.float16)
    packed = Packed(c.cu_q, c.cu_k, len(c.q), max(lengths[1]), 0.125)
    for arch, form in zip((80, 90), forms, strict=True):
        monkeypatch.setattr(varlen_attention, "architecture", lambda _, arch=arch: arch)
        assert varlen_attention._forward_form(c.q, c.k, packed).removeprefix("varlen_forward").strip("_") == form


def test_tiles_are_shared_out_where_the_bound_of_the_lengths_is_close() -> None:
    assert varlen_attention._tiles(256 * 13, 13, 256, 16) == (256, False)
    assert varlen_attention._tiles(3328, 3328, 1, 64) == (52, False)
    assert varlen_attention._tiles(256 * 13, 30, 256, 16) == (512, False)  # 464 with a search
    assert varlen_attention._tiles(3328, 3328, 64, 64) == (52 + 64, True)
    assert varlen_attention._tiles(0, 0, 5, 64) == (5, True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_long_sequences(head_dim: int, dtype: torch.dtype) -> None:
    check(case([197, 63, 0, 320], [577, 111, 197, 0], 2, head_dim, dtype))


@pytest.mark.parametrize("tiles", [(16, 16), (64, 32)], ids=str)
def test_every_tile_size_gives_the_result(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout and the mask of keys included."""
    config = LaunchConfig(dict(zip(("BLOCK_M", "BLOCK_N"), tiles, strict=True)))
    heads = LaunchConfig({"HEADS": 2, **config.tiles})
    monkeypatch.setattr(varlen_attention, "config_for", lambda name, *_: heads if "_heads" in name else config)
    lengths = ([20, 0, 1, 40], [33, 5, 40, 32])
    check(case(*lengths, 1, 32, torch.float32, dropout_p=0.3, seed=torch.tensor([(7 << 40) + 11])))
    check(case(*lengths, 1, 32, torch.float32, key_mask=torch.rand(sum(lengths[1])) > 0.5))


def test_more_sequences_than_one_read_of_the_offsets_covers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "_CHUNK", 4)
    check(case([1, 0, 40, 3, 0, 0, 0, 2, 5], [3, 2, 1, 0, 0, 4, 0, 2, 9], 1, 32, torch.float16))


def test_memory_layouts_and_wide_offsets() -> None:
    lengths = [9, 0, 21]
    qkv = torch.randn(30, 3, 2, 32).half()
    c = case(lengths, lengths, 2, 32, torch.float16, offsets=torch.int64)
    fused = qkv.unbind(1)
    heads_first = torch.randn(3, 2, 30, 32).half().transpose(1, 2).unbind(0)
    strided = torch.randn(3, 30, 32, 2).half().transpose(2, 3).unbind(0)
    expanded = torch.randn(1, 1, 1).half().expand(30, 2, 32)
    for (q, k, v), dout in ((fused, c.dout), (heads_first, expanded), (strided, strided[0])):
        check(c._replace(q=q, k=k, v=v, dout=dout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_masked_keys(dtype: torch.dtype) -> None:
    """The second sequence has no key left, the third one, the fourth loses the whole first tile."""
    mask = torch.rand(5 + 40 + 7 + 100) > 0.5
    mask[5:52] = False
    mask[47] = True
    mask[52:120] = False
    mask[130] = True
    c = case([20, 3, 2, 70], [5, 40, 7, 100], 2, 64, dtype, key_mask=mask)
    check(c)
    out, dq, dk, _, lse = run(c)
    assert not out[20:23].any()
    assert not dq[20:23].any()
    assert (lse[:, 20:23] == -torch.inf).all()
    assert not dk[~mask].any()


def test_masked_keys_with_enormous_scores_leave_no_trace() -> None:
    c = case([4], [6], 1, 32, torch.float32, key_mask=torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool))
    c.k[1] = 1e4
    c.v[4] = 1e30
    check(c)


def kept_weights(seed: int, p: float, queries: int = 64, keys: int = 64, heads: int = 2) -> Tensor:
    """The kernel's own mask `[queries, heads, keys]`: equal weights and an identity for values make it visible."""
    q, k = torch.zeros(queries, heads, 64), torch.zeros(keys, heads, 64)
    v = torch.eye(64)[:keys, None, :].expand(keys, heads, 64)
    cu_q, cu_k = torch.tensor([0, queries]), torch.tensor([0, keys])
    packed = Packed(cu_q, cu_k, queries, keys, 1.0, p, torch.tensor([seed]))
    out, _ = varlen_attention.varlen_attention_forward(q, k, v, packed)
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (keys * kept_share(p))))
    return out != 0


def test_dropout_keeps_what_philox_says() -> None:
    seed = -(3 << 45) + 12345
    kept = kept_weights(seed, 0.25)
    for head in range(2):
        assert torch.equal(kept[:, head], philox_keep(seed, head, 0, 64, 64, 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_dropout_forward_and_backward(dtype: torch.dtype) -> None:
    check(case([20, 1, 70], [33, 5, 70], 2, 64, dtype, dropout_p=0.2, seed=torch.tensor([99])))
