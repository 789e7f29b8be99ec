"""Arguments of the operations, one named tuple each, and their validation.

Shapes, dtypes and devices are always checked. Contents (offsets, labels, ids) are checked on CPU; on a GPU the check
would synchronise every call, so it is enabled to find a fault:

    with ops.check_contents():
        model(batch)
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xfm_fast.errors import InputError

from . import host
from .marked import kind_of

BIAS_TILE = 128
"""Columns of a materialised position bias are padded to a multiple of this: the widest tile of any kernel."""
FRAGMENT_TILE = 128, 64
"""Queries and keys of the tiles that a position bias is cut in where threads read it in fragments."""


class _Switch(threading.local):
    on: bool = False


_switch = _Switch()


@contextmanager
def check_contents() -> Iterator[None]:
    """Within the block, check offsets, labels and ids on GPUs too. Every operation then waits for the device."""
    outside, _switch.on = _switch.on, True
    try:
        yield
    finally:
        _switch.on = outside


def should_check_values(tensor: Tensor) -> bool:
    """True if the contents of a tensor are to be checked."""
    return _switch.on or tensor.device.type == "cpu"


class Linear(NamedTuple):
    """A linear layer: x `[..., K]`, weight `[M, K]`, bias `[M]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def check(self) -> None:
        """Raise InputError for arguments that do not fit, as every `check` below."""
        x, weight, bias = self
        if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
            raise InputError(f"x is {[*x.shape]} and weight {[*weight.shape]}; they must be [..., K] and [M, K]")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise InputError(f"bias is {[*bias.shape]}; it must be [{weight.shape[0]}]")
        _one_type(x=x, weight=_typed(weight), bias=bias)


class LinearResidual(NamedTuple):
    """A linear layer at the end of a branch, and the residual that the branch is added to."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor
    gamma: Tensor | None = None
    row_scale: Tensor | None = None
    dropout_p: float = 0.0

    def check(self) -> None:
        Linear(self.x, self.weight, self.bias).check()
        _branch((*self.x.shape[:-1], self.weight.shape[0]), self)


class MLP(NamedTuple):
    """Two linear layers with a GELU between them, and the residual that they are added to."""

    x: Tensor
    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None
    residual: Tensor
    gamma: Tensor | None = None
    row_scale: Tensor | None = None
    dropout_p: float = 0.0

    def check(self) -> None:
        x, weight_in, bias_in, weight_out, bias_out, *_ = self
        Linear(x, weight_in, bias_in).check()
        if weight_out.ndim != 2 or weight_out.shape[1] != weight_in.shape[0]:
            raise InputError(
                f"weight_in is {[*weight_in.shape]} and weight_out {[*weight_out.shape]}; "
                "they must be [F, M] and [M, F]"
            )
        if bias_out is not None and bias_out.shape != weight_out.shape[:1]:
            raise InputError(f"bias_out is {[*bias_out.shape]}; it must be [{weight_out.shape[0]}]")
        _one_type(x=x, weight_out=_typed(weight_out), bias_out=bias_out)
        _branch((*x.shape[:-1], weight_out.shape[0]), self)


class LinearGELU(NamedTuple):
    """A linear layer and a GELU; `keep` saves what the GELU had for the gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    keep: bool = False

    def check(self) -> None:
        Linear(*self[:3]).check()


class Norm(NamedTuple):
    """LayerNorm over the last dimension of x `[..., M]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def check(self) -> None:
        x, weight, bias, eps = self
        if x.shape[-1:] != weight.shape or weight.shape != bias.shape:
            raise InputError(
                f"x is {[*x.shape]}, weight {[*weight.shape]}, bias {[*bias.shape]}; the last must be [M], x [..., M]"
            )
        if not all(t.is_floating_point() for t in (x, weight, bias)):
            raise InputError(f"x, weight, bias are {x.dtype}, {weight.dtype}, {bias.dtype}; they must be floating")
        if not 0 <= eps < math.inf:
            raise InputError(f"eps={eps}; it must be finite and not negative")


class AddNorm(NamedTuple):
    """A residual sum and its LayerNorm; residual and bias may be absent within the package."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float
    gamma: Tensor | None = None
    row_scale: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    wide: bool = False

    def check(self) -> None:
        assert self.residual is not None
        assert self.bias is not None
        Norm(self.x, self.weight, self.bias, self.eps).check()
        _branch(self.x.shape, self)
        dropout(self.dropout_p, self.seed)


class Embedding(NamedTuple):
    """The sum of word, position and type embeddings, and its LayerNorm."""

    tokens: Tensor
    positions: Tensor
    word: Tensor
    position: Tensor
    type_row: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    padding_idx: int | None = None

    def check(self) -> None:
        tokens, positions, word, position, type_row, weight, bias, eps, padding_idx = self
        if (
            tokens.shape != positions.shape
            or word.ndim != 2
            or position.ndim != 2
            or word.shape[1:] != position.shape[1:]
        ):
            raise InputError(
                f"tokens {[*tokens.shape]}, positions {[*positions.shape]}, word {[*word.shape]} and position "
                f"{[*position.shape]} do not fit; they must be [...], [...], [V, M] and [P, M]"
            )
        if type_row.shape != word.shape[1:]:
            raise InputError(f"type_row is {[*type_row.shape]}; it must be [{word.shape[1]}]")
        for name, ids in (("tokens", tokens), ("positions", positions)):
            if ids.dtype not in (torch.int32, torch.int64):
                raise InputError(f"{name} is {ids.dtype}; ids must be int32 or int64")
        smaller = min(word.shape[0], position.shape[0])
        if padding_idx is not None and not 0 <= padding_idx < smaller:
            raise InputError(f"padding_idx={padding_idx} is no row of both tables; the smaller one has {smaller}")
        Norm(word, weight, bias, eps).check()


class Vocabulary(NamedTuple):
    """Logits `h w^T + b` of a vocabulary, and the target of each row. The last field is set by the operation."""

    h: Tensor
    w: Tensor
    b: Tensor | None
    target: Tensor
    ignore_index: int = -100
    label_smoothing: float = 0.0
    needs: tuple[bool, ...] = (True, True, True)

    def check(self) -> None:
        h, w, b, target, _, label_smoothing, _ = self
        if w.ndim != 2 or h.shape[-1:] != w.shape[1:] or h.shape[:-1] != target.shape or 0 in w.shape:
            raise InputError(
                f"h is {[*h.shape]}, w {[*w.shape]} and target {[*target.shape]}; they must be [..., K], [V, K], [...]"
            )
        if b is not None and b.shape != w.shape[:1]:
            raise InputError(f"b is {[*b.shape]}; it must be [{w.shape[0]}]")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise InputError(f"target is {target.dtype}; labels are integers")
        if not h.is_floating_point():
            raise InputError(f"h is {h.dtype}; it must be floating point")
        _one_type(h=h, w=w, b=b)
        if not 0 <= label_smoothing <= 1:
            raise InputError(f"label_smoothing={label_smoothing} lies outside [0, 1]")


class RelPos(NamedTuple):
    """Self-attention `[B, N, H, D]` with a relative position bias; `bias` and `turned` are the materialised table."""

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    window: tuple[int, int]
    scale: float = 1.0
    key_mask: Tensor | None = None
    bias: Tensor | None = None
    turned: Tensor | None = None

    def check(self) -> None:
        q, table, window, key_mask = self.q, self.table, self.window, self.key_mask
        self_attention(q, self.k, self.v)
        if not isinstance(window, tuple | list) or len(window) != 2 or min(window) < 1:
            raise InputError(f"window is {window}; it must be two positive numbers of patches, (height, width)")
        height, width = window
        if q.shape[1] != 1 + height * width:
            raise InputError(
                f"q has {q.shape[1]} tokens; a {height}x{width} window with a class token has {1 + height * width}"
            )
        rows = (2 * height - 1) * (2 * width - 1) + 3
        if table.shape != (rows, q.shape[2]) or not table.is_floating_point():
            raise InputError(
                f"table is {table.dtype} {[*table.shape]}; a {height}x{width} window with {q.shape[2]} heads needs "
                f"floating point [{rows}, {q.shape[2]}]: interpolate it when the resolution changes"
            )
        _key_mask(key_mask, q.shape[:2])


class Biased(NamedTuple):
    """Attention with a bias `[G, H, Nq, Nk]`; see `ops.bias_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor
    key_mask: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    scale: float = 1.0
    return_lse: bool = False

    def check(self) -> None:
        q, k, v, bias, key_mask, dropout_p, seed, *_ = self
        fit = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape
        if not fit or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
            raise InputError(
                f"q must be [B, Nq, H, D] and k, v [B, Nk, H, D]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
            )
        _one_attention_type(q, k, v)
        (batch, queries, heads, _), keys = q.shape, k.shape[1]
        sizes = (heads, queries, keys)
        if bias.ndim != 4 or any(size not in (1, full) for size, full in zip(bias.shape[1:], sizes, strict=True)):
            raise InputError(
                f"bias is {[*bias.shape]} and does not broadcast: it must be [B or 1, {heads}, {queries}, {keys}] or"
                " have 1 where it is the same for all"
            )
        if bias.shape[0] != batch and (not bias.shape[0] or batch % bias.shape[0]):
            raise InputError(
                f"bias has {bias.shape[0]} entries for a batch of {batch}; it must have 1, or a divisor of it"
            )
        if not bias.is_floating_point() or (bias.dtype == torch.float64) != (q.dtype == torch.float64):
            raise InputError(
                f"bias is {bias.dtype} and q {q.dtype}; convert the bias: floating point, float64 only with float64"
                " (of a boolean mask, zeros and -inf)"
            )
        _key_mask(key_mask, torch.Size((batch, keys)))
        dropout(dropout_p, seed)


class Packed(NamedTuple):
    """The arguments of `varlen_attention` besides q, k and v, in the order of its operator."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int
    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    key_mask: Tensor | None = None

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """All but the contents of the offsets, for the operands that they describe."""
        if not q.ndim == k.ndim == v.ndim == 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
            raise InputError(f"q must be [Tq, H, D] and k, v [Tk, H, D]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
        _one_attention_type(q, k, v)
        for name, offsets in (("cu_seqlens_q", self.cu_seqlens_q), ("cu_seqlens_k", self.cu_seqlens_k)):
            if offsets.ndim != 1 or offsets.numel() < 1 or offsets.dtype not in (torch.int32, torch.int64):
                raise InputError(f"{name} is {offsets.dtype} {[*offsets.shape]}; it must be int32 or int64 [S + 1]")
        sizes = self.cu_seqlens_q.numel(), self.cu_seqlens_k.numel()
        if sizes[0] != sizes[1]:
            raise InputError(f"cu_seqlens_q has {sizes[0]} offsets and cu_seqlens_k {sizes[1]}; both need S + 1")
        _key_mask(self.key_mask, k.shape[:1])
        dropout(self.dropout_p, self.seed)

    def bounds(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The offsets as numbers, which describe q and k or are refused."""
        found = offsets_of(self.cu_seqlens_q, q, self.max_q, "q")
        if self.cu_seqlens_k is self.cu_seqlens_q and self.max_k == self.max_q and k.shape[0] == q.shape[0]:
            return found, found
        return found, offsets_of(self.cu_seqlens_k, k, self.max_k, "k")


class Varlen(NamedTuple):
    """All arguments of `varlen_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_q: int
    max_k: int
    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    key_mask: Tensor | None = None

    @property
    def packed(self) -> Packed:
        """Those besides q, k and v."""
        return Packed(*self[3:])

    def check(self) -> None:
        self.packed.check(*self[:3])


def self_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Operands of attention within one sequence."""
    if not q.ndim == k.ndim == v.ndim == 4 or not q.shape == k.shape == v.shape:
        raise InputError(f"q, k, v must all be [B, N, H, D]; got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}")
    _one_attention_type(q, k, v)


def bias_shape(tokens: int, heads: int, *, fragments: bool = False) -> tuple[int, ...]:
    """The shape of a padded position bias from `triton.relpos_table.materialise_bias`."""
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
        raise InputError(
            f"bias is {bias.dtype} {[*bias.shape]} on {bias.device}; here relpos_bias makes [{heads}, {tokens}, "
            f"{shapes[0][-1]}] on {q.device}: give what it returned for the same table, window and device"
        )
    if bias.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "bias requires a gradient, which relpos_attention has for its table only; detach it or use bias_attention"
        )


def dropout(dropout_p: float, seed: Tensor | None) -> None:
    """A probability, and what decides which elements it concerns."""
    if not 0 <= dropout_p < 1:
        raise InputError(f"dropout_p={dropout_p} is no probability below 1")
    if seed is not None and (not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1):
        shown = f"{seed.dtype} {[*seed.shape]}" if isinstance(seed, Tensor) else repr(seed)
        raise InputError(f"seed is {shown}; it must be one int64 on the device of the other tensors")


def seed_of(dropout_p: float, seed: Tensor | None) -> Tensor:
    """The seed, without which a backward pass could not drop what the forward pass dropped."""
    if seed is None:
        raise InputError(f"dropout_p={dropout_p} needs a seed: the backward must drop what the forward dropped")
    return seed


def drawn_seed(dropout_p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed of a call, drawn from PyTorch's generator if there is none; None without dropout."""
    if not dropout_p:
        return None
    return torch.randint(1 << 62, (1,), device=device) if seed is None else seed


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor of the scores q kᵀ: 1/sqrt(D) by default."""
    if not q.ndim or not q.shape[-1]:
        raise InputError(f"q is {[*q.shape]}; its heads need at least one dimension")
    return float(q.shape[-1] ** -0.5) if scale is None else positive_scale(scale)


def positive_scale(scale: float) -> float:
    """The scale, if an online softmax can divide by it and take maxima before it is applied."""
    # A comparison, which compilers can trace, and not isfinite, which they cannot.
    if not 0 < scale < math.inf:
        raise InputError(f"scale={scale}; it must be positive and finite")
    return scale


def offsets_of(offsets: Tensor, packed: Tensor, longest: int, name: str) -> tuple[int, ...]:
    """The values of `cu_seqlens_<name>`, which describe a packed tensor `[T, ...]` of sequences up to `longest`."""
    bounds = tuple(host.integers(offsets))
    if bounds[0] != 0 or bounds[-1] != packed.shape[0]:
        raise InputError(
            f"cu_seqlens_{name} runs from {bounds[0]} to {bounds[-1]}; it must run from 0 to {packed.shape[0]}"
        )
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if min(lengths, default=0) < 0:
        raise InputError(f"cu_seqlens_{name} decreases; offsets must not")
    if max(lengths, default=0) > longest:
        raise InputError(f"max_{name}={longest} is smaller than the longest sequence, {max(lengths)}")
    return bounds


def check_ids(ids: Tensor, rows: int, name: str) -> None:
    """Raise IndexError, as PyTorch does, for ids outside a table of `rows` rows."""
    outside = ((ids < 0) | (ids >= rows)).reshape(-1)
    if host.any_true(outside):
        first = host.integer(ids.reshape(-1)[host.true_places(outside)[0]])
        raise IndexError(f"{name} hold {first}, outside a table of {rows} rows: compare the tokenizer with the model")


def check_targets(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise IndexError, as PyTorch does, for labels outside the vocabulary."""
    outside = host.true_places(((target < 0) | (target >= vocabulary)) & (target != ignore_index))
    if outside.numel():
        raise IndexError(
            f"target {host.integer(target.reshape(-1)[outside[0]])} is outside the vocabulary of {vocabulary} entries "
            f"(and is not ignore_index, {ignore_index})"
        )


def _branch(out: tuple[int, ...], branch: Any) -> None:
    """The factors of a branch of shape `[..., M]`, and the residual that it is added to."""
    residual, gamma, row_scale = branch.residual, branch.gamma, branch.row_scale
    if residual.shape != out:
        raise InputError(f"the branch is {[*out]} and residual {[*residual.shape]}; they must agree")
    if gamma is not None and (gamma.shape != out[-1:] or not gamma.is_floating_point()):
        raise InputError(f"gamma is {gamma.dtype} {[*gamma.shape]}; it must be floating point [{out[-1]}]")
    if row_scale is not None and (len(out) < 2 or row_scale.shape != out[:1] or not row_scale.is_floating_point()):
        raise InputError(
            f"row_scale is {row_scale.dtype} {[*row_scale.shape]}; a branch {[*out]} needs one factor per entry of its "
            f"first dimension: floating point {[*out[:1]]}"
        )
    dropout(branch.dropout_p, None)


def _key_mask(mask: Tensor | None, shape: torch.Size) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise InputError(f"key_mask is {mask.dtype} {[*mask.shape]}; it must be bool {[*shape]}")


def _typed(weight: Tensor) -> Tensor | None:
    """The weight, if its dtype has to be that of the activations."""
    return weight if kind_of(weight) is None else None


def _one_attention_type(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise InputError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one floating-point type")


def _one_type(**tensors: Tensor | None) -> None:
    """Raise for operands of several dtypes, unless autocast converts them."""
    present = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(present.values()))
    if all(t.dtype == first.dtype for t in present.values()):
        return
    # Here, so that checks can be had without the operators, which register themselves once a process.
    from .library import autocast_dtype

    if autocast_dtype(first.device) is None:
        names, types = ", ".join(present), ", ".join(str(t.dtype) for t in present.values())
        raise InputError(f"{names} are {types}; convert them to one type, or run them under torch.autocast")
