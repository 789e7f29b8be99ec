"""Arguments that an operation shares with its kernels, the roles of their fields, and common checks.

Shapes, dtypes and devices are always checked. Contents (offsets, labels, ids) are checked on CPU; on a GPU the check
would synchronise every call, so it is enabled to find a fault:

    with ops.check_contents():
        model(batch)
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from xfm_fast.errors import InputError

from . import host
from .backend import autocast_dtype
from .flags import kind_of

# Metadata of fields: what a tensor is to an operation. A field without metadata is an operand with a gradient.
WEIGHT = {"role": "weight"}
"""The weight of a GEMM: it may be frozen, flagged for 8 bits, or of another dtype than the other operands."""
RESIDUAL = {"role": "residual"}
"""Added to the result, in any dtype."""
FACTOR = {"role": "factor"}
"""Multiplies the result, in any dtype."""
CHANCE = {"role": "chance"}
"""Stochastic depth or dropout: None, or a probability of 0, in inference. Without a gradient."""
CONSTANT = {"role": "constant"}
"""Without a gradient: ids, offsets, masks, seeds."""

HEAD_DIMS = (32, 64, 80, 96, 128)
"""Head dimensions that the Triton kernels of attention are compiled for."""

LARGEST_WIDTH = 8192
"""Elements of the widest row that one program of a Triton LayerNorm holds in registers."""

BIAS_HEAD_DIMS = (16, 32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256)
"""Head dimensions that the Triton kernels of attention with a general bias are compiled for."""

BIAS_TILE = 128
"""Columns of a materialised position bias are padded to a multiple of this: the widest tile of any kernel."""
FRAGMENT_TILE = 128, 64
"""Queries and keys of the tiles of a position bias whose threads read it in fragments."""
_INTEGERS = (torch.int32, torch.int64)
Needs = Sequence[bool]
"""Which gradients are computed."""


class _Switch(threading.local):
    on: bool = False


_switch = _Switch()


@contextmanager
def check_contents() -> Iterator[None]:
    """Check offsets, labels and ids on GPUs too within the block. Every operation then waits for the device."""
    outside, _switch.on = _switch.on, True
    try:
        yield
    finally:
        _switch.on = outside


def should_check_values(tensor: Tensor) -> bool:
    """Return whether the contents of a tensor are to be checked."""
    return _switch.on or tensor.device.type == "cpu"


def refuse(must: str, **values: Any) -> NoReturn:
    """Raise InputError that shows these arguments and says what they must be."""
    shown = []
    for name, value in values.items():
        if isinstance(value, Tensor):
            shown.append(f"{name} {[*value.shape]} {str(value.dtype).removeprefix('torch.')}")
        elif value is not None:
            shown.append(f"{name}={value!r}")
    raise InputError(f"{', '.join(shown)}: must be {must}")


@dataclass(slots=True)
class Norm:
    """LayerNorm over the last dimension of x `[..., M]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def check(self) -> None:
        norm(self.x, self.weight, self.bias, self.eps)


@dataclass(slots=True)
class AddNorm:
    """A residual sum and its LayerNorm; residual and bias may be absent within the package."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float
    gamma: Tensor | None = None
    row_scale: Tensor | None = field(default=None, metadata=CHANCE)
    dropout_p: float = field(default=0.0, metadata=CHANCE)
    seed: Tensor | None = field(default=None, metadata=CONSTANT)
    wide: bool = False

    def check(self) -> None:
        assert self.residual is not None
        assert self.bias is not None
        norm(self.x, self.weight, self.bias, self.eps)
        branch(self.x.shape, self.residual, self.gamma, self.row_scale, self.dropout_p)
        dropout(self.dropout_p, self.seed)


@dataclass(slots=True)
class Embedding:
    """The sum of word, position and type embeddings, and its LayerNorm."""

    tokens: Tensor = field(metadata=CONSTANT)
    positions: Tensor = field(metadata=CONSTANT)
    word: Tensor
    position: Tensor
    type_row: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    padding_idx: int | None = None

    def check(self) -> None:
        tokens, positions, word, position = self.tokens, self.positions, self.word, self.position
        width = word.shape[1:]
        tables = word.ndim == position.ndim == 2 and position.shape[1:] == width
        if not tables or self.type_row.shape != width or tokens.shape != positions.shape:
            refuse(
                "tokens and positions [...], word [V, M], position [P, M], type_row [M]",
                tokens=tokens,
                positions=positions,
                word=word,
                position=position,
                type_row=self.type_row,
            )
        if tokens.dtype not in _INTEGERS or positions.dtype not in _INTEGERS:
            refuse("int32 or int64", tokens=tokens, positions=positions)
        row = self.padding_idx
        if row is not None and not 0 <= row < min(word.shape[0], position.shape[0]):
            refuse("a row of both tables", padding_idx=row, word=word, position=position)
        norm(word, self.weight, self.bias, self.eps)


@dataclass(slots=True)
class Vocabulary:
    """Logits `h w^T + b` of a vocabulary, and the target of each row. The operation sets `needs`."""

    h: Tensor
    w: Tensor
    b: Tensor | None
    target: Tensor = field(metadata=CONSTANT)
    ignore_index: int = -100
    label_smoothing: float = 0.0
    needs: tuple[bool, ...] = (True, True, True)

    def check(self) -> None:
        h, w, b, target = self.h, self.w, self.b, self.target
        fit = w.ndim == 2 and h.shape[-1:] == w.shape[1:] and 0 not in w.shape
        if not fit or h.shape[:-1] != target.shape or (b is not None and b.shape != w.shape[:1]):
            refuse("h [..., K], w [V, K], b [V], target [...]", h=h, w=w, b=b, target=target)
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            refuse("integers", target=target)
        if not h.is_floating_point():
            refuse("floating point", h=h)
        one_dtype(h=h, w=w, b=b)
        if not 0 <= self.label_smoothing <= 1:
            refuse("in [0, 1]", label_smoothing=self.label_smoothing)


class RowStatistics(NamedTuple):
    """The normaliser of a row's softmax in two terms `[rows]`, which keep its digits where logits are large."""

    maximum: Tensor
    log_sum: Tensor  # log Σ exp(logit - maximum)


@dataclass(slots=True)
class RelPos:
    """Self-attention `[B, N, H, D]` with a relative position bias; `bias` and `turned` are the materialised table."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    window: tuple[int, int]
    scale: float = 1.0
    key_mask: Tensor | None = field(default=None, metadata=CONSTANT)
    bias: Tensor | None = field(default=None, metadata=CONSTANT)
    turned: Tensor | None = field(default=None, metadata=CONSTANT)

    def check(self) -> None:
        q, table, window = self.q, self.table, self.window
        self_attention(q, self.k, self.v)
        if not isinstance(window, tuple | list) or len(window) != 2 or min(window) < 1:
            refuse("two positive numbers of patches, (height, width)", window=window)
        height, width = window
        if q.shape[1] != 1 + height * width:
            refuse(f"q [B, {1 + height * width}, H, D], with a class token", window=window, q=q)
        shape = ((2 * height - 1) * (2 * width - 1) + 3, q.shape[2])
        if table.shape != shape or not table.is_floating_point():
            refuse(
                f"{[*shape]} floating point; interpolate it when the resolution changes",
                window=window,
                table=table,
            )
        _key_mask(self.key_mask, q.shape[:2])


@dataclass(slots=True)
class Biased:
    """Attention with a bias `[G, H, Nq, Nk]`; see `ops.bias_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    key_mask: Tensor | None = field(default=None, metadata=CONSTANT)
    dropout_p: float = field(default=0.0, metadata=CHANCE)
    seed: Tensor | None = field(default=None, metadata=CONSTANT)
    scale: float = 1.0
    return_lse: bool = False

    def check(self) -> None:
        q, k, v, bias = self.q, self.k, self.v, self.bias
        fit = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape
        if not fit or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
            refuse("q [B, Nq, H, D], k and v [B, Nk, H, D]", q=q, k=k, v=v)
        _one_attention_dtype(q, k, v)
        (batch, queries, heads, _), keys = q.shape, k.shape[1]
        fit = bias.ndim == 4
        for size, full in zip(bias.shape[1:], (heads, queries, keys), strict=False):
            fit = fit and size in (1, full)
        if not fit or (bias.shape[0] != batch and (not bias.shape[0] or batch % bias.shape[0])):
            refuse(
                f"[G, {heads}, {queries}, {keys}] or 1 where all share it, G a divisor of {batch}",
                bias=bias,
            )
        double = bias.dtype == torch.float64
        if not bias.is_floating_point() or double != (q.dtype == torch.float64):
            refuse(
                "floating point, float64 only with float64; of a boolean mask, zeros and -inf",
                bias=bias,
                q=q,
            )
        _key_mask(self.key_mask, torch.Size((batch, keys)))
        dropout(self.dropout_p, self.seed)


@dataclass(slots=True)
class Packed:
    """The arguments of `varlen_attention` besides q, k and v."""

    cu_seqlens_q: Tensor = field(metadata=CONSTANT)
    cu_seqlens_k: Tensor = field(metadata=CONSTANT)
    max_q: int
    max_k: int
    scale: float
    dropout_p: float = field(metadata=CHANCE)
    seed: Tensor | None = field(metadata=CONSTANT)
    key_mask: Tensor | None = field(metadata=CONSTANT)

    def bounds(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the offsets as integers; InputError unless they describe q and k."""
        bounds_q = offsets_of(self.cu_seqlens_q, q, self.max_q, "q")
        same = self.cu_seqlens_k is self.cu_seqlens_q and self.max_k == self.max_q
        if same and k.shape[0] == q.shape[0]:
            return bounds_q, bounds_q
        return bounds_q, offsets_of(self.cu_seqlens_k, k, self.max_k, "k")


@dataclass(slots=True)
class Varlen(Packed):
    """All arguments of `varlen_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor

    def check(self) -> None:
        """Check all but the contents of the offsets, which the implementations read."""
        q, k, v = self.q, self.k, self.v
        if not q.ndim == k.ndim == v.ndim == 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
            refuse("q [Tq, H, D], k and v [Tk, H, D]", q=q, k=k, v=v)
        _one_attention_dtype(q, k, v)
        cu_q, cu_k = self.cu_seqlens_q, self.cu_seqlens_k
        fit = cu_q.ndim == 1 and cu_q.numel() > 0 and cu_q.shape == cu_k.shape
        if not fit or cu_q.dtype not in _INTEGERS or cu_k.dtype not in _INTEGERS:
            refuse("both int32 or int64 [S + 1]", cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        _key_mask(self.key_mask, k.shape[:1])
        dropout(self.dropout_p, self.seed)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Check the arguments of a LayerNorm."""
    fit = x.shape[-1:] == weight.shape == bias.shape
    floating = x.is_floating_point() and weight.is_floating_point() and bias.is_floating_point()
    if not fit or not floating:
        must = "x [..., M], weight [M], bias [M], all floating point"
        refuse(must, x=x, weight=weight, bias=bias)
    if not 0 <= eps < math.inf:
        refuse("finite and not negative", eps=eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Check the operands of a linear layer."""
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        refuse("x [..., K], weight [M, K]", x=x, weight=weight)
    layer(x, weight, bias)


def layer(x: Tensor, weight: Tensor, bias: Tensor | None, suffix: str = "") -> None:
    """Check the bias and the dtypes of a layer; `suffix` ends the names of weight and bias."""
    if bias is not None and bias.shape != weight.shape[:1]:
        refuse(f"[{weight.shape[0]}]", **{f"bias{suffix}": bias})
    # 8-bit GEMMs read weights of any dtype.
    typed = weight.dtype == x.dtype or kind_of(weight) is not None
    if not typed or (bias is not None and bias.dtype != x.dtype):
        one_dtype(x=x, **{f"weight{suffix}": x if typed else weight, f"bias{suffix}": bias})


def branch(
    shape: Sequence[int],
    residual: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    dropout_p: float,
) -> None:
    """Check the factors of a branch of this shape `[..., M]`, and the residual that it is added to."""
    if residual.shape != shape:
        refuse(f"{[*shape]}, the shape of the branch", residual=residual)
    width, batch = shape[-1:], shape[:1]
    if gamma is not None and (gamma.shape != width or not gamma.is_floating_point()):
        refuse(f"floating point {[*width]}", gamma=gamma)
    if row_scale is not None:
        fit = len(shape) >= 2 and row_scale.shape == batch and row_scale.is_floating_point()
        if not fit:
            must = f"floating point {[*batch]}, a factor per entry of a branch {[*shape]}"
            refuse(must, row_scale=row_scale)
    dropout(dropout_p, None)


def self_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the operands of attention within one sequence."""
    if not q.ndim == k.ndim == v.ndim == 4 or not q.shape == k.shape == v.shape:
        refuse("all [B, N, H, D]", q=q, k=k, v=v)
    _one_attention_dtype(q, k, v)


def bias_shape(tokens: int, heads: int, *, fragments: bool = False) -> tuple[int, ...]:
    """Return the shape of a padded position bias from `triton.relpos_table.materialise_bias`."""
    padded = -(-tokens // BIAS_TILE) * BIAS_TILE
    if not fragments:
        return heads, tokens, padded
    rows, columns = FRAGMENT_TILE
    return heads, padded // rows, padded // columns, 2 * rows, columns // 2


def position_bias(bias: Tensor, q: Tensor, *, padded: bool) -> None:
    """Check a bias from `relpos_bias` for operands `[B, N, H, D]`, with its columns padded or not."""
    tokens, heads = q.shape[1:3]
    shapes = [(heads, tokens, tokens)]
    if padded:
        shapes = [bias_shape(tokens, heads, fragments=fragments) for fragments in (False, True)]
    if bias.shape not in shapes or not bias.is_floating_point() or bias.device != q.device:
        must = f"{[*shapes[0]]} on {q.device}, what relpos_bias returned for the same table, window and device"
        refuse(must, bias=bias)
    if bias.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "bias requires a gradient, which relpos_attention has for its table only; detach it or use bias_attention"
        )


def dropout(dropout_p: float, seed: Tensor | None) -> None:
    """Check a dropout probability and its seed."""
    if not 0 <= dropout_p < 1:
        refuse("a probability below 1", dropout_p=dropout_p)
    if seed is not None and (
        not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1
    ):
        refuse("one int64 on the device of the other tensors", seed=seed)


def seed_of(dropout_p: float, seed: Tensor | None) -> Tensor:
    """Return the seed; InputError without one, since the backward pass could not repeat the mask."""
    if seed is None:
        raise InputError(
            f"dropout_p={dropout_p} needs a seed: the backward must drop what the forward dropped"
        )
    return seed


def drawn_seed(dropout_p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """Return the seed, drawn from PyTorch's generator by default; None without dropout."""
    if not dropout_p:
        return None
    return torch.randint(1 << 62, (1,), device=device) if seed is None else seed


def scale_of(q: Tensor, scale: float | None) -> float:
    """Return the factor of the scores q kᵀ: 1/sqrt(D) by default."""
    if not q.ndim or not q.size(-1):
        refuse("of heads with at least one dimension", q=q)
    return float(q.size(-1) ** -0.5) if scale is None else positive_scale(scale)


def positive_scale(scale: float) -> float:
    """Return the scale; InputError unless an online softmax can divide by it and take maxima before it."""
    # A comparison, which compilers can trace, and not isfinite, which they cannot.
    if not 0 < scale < math.inf:
        refuse("positive and finite", scale=scale)
    return scale


def offsets_of(offsets: Tensor, packed: Tensor, longest: int, name: str) -> tuple[int, ...]:
    """Return the offsets `cu_seqlens_<name>`; InputError unless they cut a packed tensor `[T, ...]` into sequences of
    at most `longest` rows.
    """
    bounds = tuple(host.integers(offsets))
    if bounds[0] != 0 or bounds[-1] != packed.shape[0]:
        raise InputError(
            f"cu_seqlens_{name} runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to {packed.shape[0]}"
        )
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if min(lengths, default=0) < 0:
        raise InputError(f"cu_seqlens_{name} decreases; offsets must not")
    if max(lengths, default=0) > longest:
        raise InputError(
            f"max_{name}={longest} is smaller than the longest sequence, {max(lengths)}"
        )
    return bounds


def check_ids(ids: Tensor, rows: int, name: str) -> None:
    """Raise IndexError, as PyTorch does, for ids outside a table of `rows` rows."""
    outside = ((ids < 0) | (ids >= rows)).reshape(-1)
    if host.any_true(outside):
        first = host.integer(ids.reshape(-1)[host.true_places(outside)[0]])
        raise IndexError(
            f"{name} hold {first}, outside a table of {rows} rows: compare the tokenizer with the model"
        )


def check_targets(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise IndexError, as PyTorch does, for labels outside the vocabulary."""
    outside = host.true_places(((target < 0) | (target >= vocabulary)) & (target != ignore_index))
    if outside.numel():
        raise IndexError(
            f"target {host.integer(target.reshape(-1)[outside[0]])} is outside the vocabulary of {vocabulary} entries "
            f"(and is not ignore_index, {ignore_index})"
        )


def _key_mask(mask: Tensor | None, shape: torch.Size) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        refuse(f"bool {[*shape]}", key_mask=mask)


def _one_attention_dtype(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        refuse("of one floating-point type", q=q, k=k, v=v)


def one_dtype(**tensors: Tensor | None) -> None:
    """Check that all tensors have one dtype, unless autocast converts them."""
    present = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(present.values()))
    if all(t.dtype == first.dtype for t in present.values()):
        return
    if not all(t.is_floating_point() for t in present.values()):
        refuse("floating point, or of one dtype", **present)
    if autocast_dtype(first.device) is None:
        refuse("of one dtype, or run under torch.autocast", **present)
