"""The kernels of attention with a general bias, interpreted, against the definition in fp64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate, draws
from tests.kernels.triton_testing import poison
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.limits import BIAS_HEAD_DIMS, HIDDEN
from xfm_fast.kernels.triton import bias_attention
from xfm_fast.kernels.triton.launch import LaunchConfig

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
SCALE = 0.2


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    dout: Tensor
    dlse: Tensor | None = None
    key_mask: Tensor | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0


Shape = tuple[int, int, int, int, int, int]


def case(
    batch: int,
    entries: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    masked: bool = False,
    dlse: bool = False,
    **options: Any,
) -> Case:
    q, dout = torch.randn(2, batch, queries, heads, head_dim).to(dtype).unbind(0)
    k, v = torch.randn(batch, keys, 2, heads, head_dim).to(dtype).unbind(2)
    bias = torch.randn(entries, heads, queries, keys).to(dtype)
    mask = torch.rand(batch, keys) < 0.6 if masked else None
    return Case(q, k, v, bias, dout, torch.randn(batch, heads, queries) if dlse else None, mask, **options)


def run(c: Case, module: Any = bias_attention) -> tuple[Tensor, ...]:
    given = (SCALE, c.key_mask, c.dropout_p, c.seed)
    with poison():
        out, lse = module.bias_attention_forward(c.q, c.k, c.v, c.bias, *given)
        grads = module.bias_attention_backward(c.dout, c.dlse, c.q, c.k, c.v, c.bias, out, lse, *given)
    return out, lse, *grads


def kept_of(c: Case, module: Any = bias_attention) -> Tensor | None:
    """`[B, H, Nq, Nk]`: the weights that dropout keeps, read from the output for values of one 1 each."""
    if c.seed is None:
        return None
    batch, keys, heads, width = c.v.shape
    assert keys <= width
    ones = torch.eye(keys, width)[None, :, None].expand(batch, keys, heads, width).contiguous()
    given = (c.q.float(), c.k.float(), ones, torch.zeros_like(c.bias), SCALE, None, c.dropout_p, c.seed)
    return module.bias_attention_forward(*given)[0].transpose(1, 2)[..., :keys] != 0


def definition(c: Case, dtype: torch.dtype, kept: Tensor | None) -> tuple[Tensor, ...]:
    q, k, v, bias = leaves = [t.detach().to(dtype).requires_grad_() for t in c[:4]]
    if kept is None:
        out, lse = reference.bias_attention(q, k, v, bias, SCALE, c.key_mask)
    else:
        # The reference's dropout by a mask that is known.
        eye = torch.eye(k.shape[1], dtype=dtype)[None, :, None].expand(*k.shape[:3], k.shape[1])
        weights, lse = reference.bias_attention(q, k, eye, bias, SCALE, c.key_mask)
        dropped = weights.transpose(1, 2) * kept / (1 - round(c.dropout_p * 2**16) / 2**16)
        out = (dropped.to(dtype) @ v.transpose(1, 2)).transpose(1, 2)
    loss = (out * c.dout.to(dtype)).sum()
    if c.dlse is not None:
        loss = loss + (lse.masked_fill(~lse.isfinite(), 0) * c.dlse.to(lse.dtype)).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def check(c: Case, module: Any = bias_attention) -> None:
    found, kept = run(c, module), kept_of(c)
    plain, truth = draws(lambda: definition(c, c.q.dtype, kept)), definition(c, torch.float64, kept)
    for name, value, true, *same in zip(NAMES, found, truth, *plain, strict=True):
        assert value.dtype == (torch.float32 if name == "lse" else c.q.dtype)
        assert_accurate(value, same, true, name)


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
# (batch, entries of the bias, queries, keys, heads, head dimension), keys hidden, type
CASES = [
    ((2, 1, 5, 9, 2, 16), False, torch.float32),
    ((2, 1, 5, 9, 2, 16), True, torch.float16),
    ((4, 2, 17, 33, 1, 32), True, torch.float32),
    ((2, 2, 33, 64, 1, 64), False, torch.float16),
    ((1, 1, 70, 130, 1, 64), False, torch.float16),
    ((3, 1, 64, 16, 1, 80), True, torch.float32),
]


@pytest.mark.parametrize(("shape", "masked", "dtype"), CASES, ids=str)
def test_forward_and_backward(shape: Shape, masked: bool, dtype: torch.dtype) -> None:
    check(case(*shape, dtype, masked=masked, dlse=masked))


# Of one piece, of two, of a second one that is filled in part, and the widest.
@pytest.mark.parametrize(
    "head_dim", [d if d in (48, 72, 256) else pytest.param(d, marks=pytest.mark.slow) for d in BIAS_HEAD_DIMS]
)
def test_every_head_dimension(head_dim: int) -> None:
    check(case(1, 1, 5, 9, 1, head_dim, torch.float16, dlse=True))


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 197, 197, 2, 64), (8, 4, 49, 49, 2, 32), (2, 2, 130, 577, 1, 128), (2, 1, 65, 129, 1, 256)],
    ids=str,
)
def test_large_shapes(shape: Shape, dtype: torch.dtype) -> None:
    c = case(*shape, dtype, masked=True)
    # Scores spread as those of a model, whose scale is that of its heads: weights are computed again from an fp32
    # logsumexp, whose rounding grows with the largest score, and plain PyTorch keeps the weights.
    c.q.mul_(shape[-1] ** -0.5 / SCALE)
    check(c)


@pytest.mark.parametrize(("entries", "dtype"), [(1, torch.float32), (2, torch.float16)])
def test_what_sees_nothing_is_zero_and_moves_nothing(entries: int, dtype: torch.dtype) -> None:
    """A query of one head whose bias hides all, in three ways of hiding; and a batch entry whose mask does."""
    c = case(4, entries, 7, 21, 2, 16, dtype, masked=True)
    assert c.key_mask is not None
    c.bias[0, 0, 3] = -torch.inf
    c.bias[-1, 1, 5] = torch.finfo(torch.float32).min if dtype == torch.float32 else -torch.inf
    # Over the scale the least of all numbers becomes infinite, and this one does not.
    c.bias[0, 1, 2] = 1.5 * HIDDEN if dtype == torch.float32 else -torch.inf
    c.key_mask[2] = False
    check(c)
    out, lse, dq, dk, dv, dbias = run(c)
    for blind in (
        out[0, 3, 0],
        out[0, 2, 1],
        out[2],
        dq[0, 3, 0],
        dq[0, 2, 1],
        dq[2],
        dk[2],
        dv[2],
        dbias[0, 0, 3],
        dbias[-1, 1, 5],
    ):
        assert not blind.any()
    assert (lse[2] == -torch.inf).all()
    assert lse[0, 0, 3] == -torch.inf
    assert not dk.transpose(1, 2)[~c.key_mask[:, None].expand(-1, 2, -1)].any()


BIASES = {
    "keys first": lambda b: b.transpose(2, 3).contiguous().transpose(2, 3),
    "rows of whole vectors": lambda b: torch.cat([b, b], -1)[..., : b.shape[-1]],
    "heads last": lambda b: b.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "one row for all": lambda b: b[:, :1, :1].expand(*b.shape),
    "another type": lambda b: b.bfloat16().float(),
}


@pytest.mark.parametrize(("layout", "keys"), [*((layout, 21) for layout in BIASES), ("keys first", 16)])
def test_layouts_of_the_bias(layout: str, keys: int) -> None:
    c = case(2, 2, 6, keys, 2, 16, torch.float16)
    c = c._replace(bias=BIASES[layout](c.bias))
    contiguous = run(c._replace(bias=c.bias.contiguous()))
    found = run(c)
    assert found[5].dtype == c.bias.dtype
    for name, value, same in zip(NAMES, found, contiguous, strict=True):
        assert torch.equal(value, same), name


@pytest.mark.parametrize("tiles", [(32, 16), (16, 128)], ids=str)
def test_every_tile_size_gives_the_result(tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = LaunchConfig(dict(zip(("BLOCK_M", "BLOCK_N"), tiles, strict=True)))
    monkeypatch.setattr(bias_attention, "bias_config", lambda *_: config)
    check(case(2, 1, 37, 41, 1, 16, torch.float16, masked=True))


def test_the_gradient_of_a_shared_bias_is_summed_over_parts_of_the_batch() -> None:
    """Nine entries in eight parts of two: three parts are empty and must hold zeros."""
    assert bias_attention.bias_partials(9, 1) == 8
    check(case(9, 1, 2, 3, 1, 16, torch.float32))


def test_the_gradient_of_the_bias_is_left_out_where_it_is_not_wanted() -> None:
    c = case(2, 1, 6, 9, 1, 16, torch.float32)
    expected = run(c)
    given: list[Any] = [c.dout, None, *c[:4], *expected[:2], SCALE]
    found = bias_attention.bias_attention_backward(*given, bias_gradient=False)
    assert found[3].shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[2:5], strict=True))


@pytest.mark.parametrize(("entries", "tiles"), [(2, (16, 64))])
def test_dropout(entries: int, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels drop the same weights, whatever the tiles, and others in every head and batch entry."""
    c = case(4, entries, 18, 20, 2, 32, torch.float32, dlse=True, masked=True, seed=torch.tensor([9]), dropout_p=0.3)
    kept = kept_of(c)
    assert kept is not None
    assert abs(float(kept.float().mean()) - 0.7) < 0.03
    parts = [part.flatten() for entry in kept for part in entry]
    assert not any(torch.equal(a, b) for i, a in enumerate(parts) for b in parts[:i])
    config = LaunchConfig(dict(zip(("BLOCK_M", "BLOCK_N"), tiles, strict=True)))
    monkeypatch.setattr(bias_attention, "bias_config", lambda *_: config)
    again = kept_of(c)
    assert again is not None
    assert torch.equal(kept, again)
    check(c)


def test_heads_of_any_width_run_padded() -> None:
    """Asked for by name, a head dimension that the kernels lack is refused; `auto` on a GPU pads it."""
    c = case(2, 1, 6, 9, 2, 24, torch.float32)
    with pytest.raises(InputError, match="24"):
        ops.bias_attention(*c[:4], backend="triton")
