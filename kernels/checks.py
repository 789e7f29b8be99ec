"""Arguments of the operations, one named tuple each, and their validation.

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
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from xfm_fast.errors import InputError

from . import host
from .flags import kind_of

HEAD_DIMS = (32, 64, 80, 96, 128)
"""Head dimensions that the Triton kernels of attention are compiled for."""

LARGEST_WIDTH = 8192
"""Elements of the widest row that one program of a Triton LayerNorm holds in registers."""

BIAS_HEAD_DIMS = (16, 32, 48, 64, 72, 80, 96, 112, 128, 160, 192, 256)
"""Head dimensions that the Triton kernels of attention with a general bias are compiled for."""

BIAS_TILE = 128
"""Columns of a materialised position bias are padded to a multiple of this: the widest tile of any kernel."""
FRAGMENT_TILE = 128, 64
"""Queries and keys of the tiles that a position bias is cut in where threads read it in fragments."""
_INTEGERS = (torch.int32, torch.int64)
Needs = Sequence[bool]
"""Which gradients are computed."""


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


def refuse(must: str, **given: Any) -> NoReturn:
    """Raise InputError with shapes, dtypes and values of arguments, and what they must be."""
    shown = (
        f"{name} {[*value.shape]} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else f"{name}={value!r}"
        for name, value in given.items()
        if value is not None
    )
    raise InputError(f"{', '.join(shown)}: must be {must}")


class Branch(NamedTuple):
    """A norm, a linear layer, a GELU and another layer, and a residual sum; all but the first layer may be absent.

    The last two fields are set by the operator of CPU training: the dtype of its GEMMs, and whether x is the residual.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 0.0
    weight_out: Tensor | None = None
    bias_out: Tensor | None = None
    residual: Tensor | None = None
    gamma: Tensor | None = None
    row_scale: Tensor | None = None
    dropout_p: float = 0.0
    residual_is_x: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def weights(self) -> list[Tensor]:
        """The first layer's, in a list."""
        return [self.weight]

    @property
    def biases(self) -> list[Tensor]:
        """The first layer's, in a list."""
        return [] if self.bias is None else [self.bias]

    def check(self) -> None:
        """Raise InputError for arguments that do not fit, as every `check` below."""
        x, weight, weight_out = self.x, self.weight, self.weight_out
        if self.norm_weight is not None and self.norm_bias is not None:
            Norm(x, self.norm_weight, self.norm_bias, self.eps).check()
        _linear(x, weight, self.bias)
        if weight_out is not None:
            if weight_out.ndim != 2 or weight_out.shape[1] != weight.shape[0]:
                refuse(
                    "weight_in [F, M], weight_out [M, F]", weight_in=weight, weight_out=weight_out
                )
            _linear(x, weight_out, self.bias_out, "_out")
        if self.residual is not None:
            _branch((*x.shape[:-1], (weight if weight_out is None else weight_out).shape[0]), self)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str = "") -> None:
    if not name and (weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]):
        refuse("x [..., K], weight [M, K]", x=x, weight=weight)
    if bias is not None and bias.shape != weight.shape[:1]:
        refuse(f"[{weight.shape[0]}]", **{f"bias{name}": bias})
    # 8-bit GEMMs read weights of any dtype.
    typed = weight.dtype == x.dtype or kind_of(weight) is not None
    if not typed or (bias is not None and bias.dtype != x.dtype):
        _one_type(x=x, **{f"weight{name}": x if typed else weight, f"bias{name}": bias})


class LinearGELU(NamedTuple):
    """A linear layer and a GELU; `keep` saves what the GELU had for the gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    keep: bool = False

    def check(self) -> None:
        _linear(*self[:3])


class Norm(NamedTuple):
    """LayerNorm over the last dimension of x `[..., M]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    def check(self) -> None:
        x, weight, bias, eps = self
        fit = x.shape[-1:] == weight.shape == bias.shape
        if not fit or not (
            x.is_floating_point() and weight.is_floating_point() and bias.is_floating_point()
        ):
            refuse(
                "x [..., M], weight [M], bias [M], all floating point",
                x=x,
                weight=weight,
                bias=bias,
            )
        if not 0 <= eps < math.inf:
            refuse("finite and not negative", eps=eps)


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
        tables = (
            word.ndim == position.ndim == 2
            and word.shape[1:] == position.shape[1:] == type_row.shape
        )
        if not tables or tokens.shape != positions.shape:
            must = "tokens and positions [...], word [V, M], position [P, M], type_row [M]"
            refuse(
                must,
                tokens=tokens,
                positions=positions,
                word=word,
                position=position,
                type_row=type_row,
            )
        if tokens.dtype not in _INTEGERS or positions.dtype not in _INTEGERS:
            refuse("int32 or int64", tokens=tokens, positions=positions)
        if padding_idx is not None and not 0 <= padding_idx < min(word.shape[0], position.shape[0]):
            refuse("a row of both tables", padding_idx=padding_idx, word=word, position=position)
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
        fit = (
            w.ndim == 2
            and h.shape[-1:] == w.shape[1:]
            and h.shape[:-1] == target.shape
            and 0 not in w.shape
        )
        if not fit or (b is not None and b.shape != w.shape[:1]):
            refuse("h [..., K], w [V, K], b [V], target [...]", h=h, w=w, b=b, target=target)
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            refuse("integers", target=target)
        if not h.is_floating_point():
            refuse("floating point", h=h)
        _one_type(h=h, w=w, b=b)
        if not 0 <= label_smoothing <= 1:
            refuse("in [0, 1]", label_smoothing=label_smoothing)


class RowStatistics(NamedTuple):
    """The normaliser of a row's softmax in two parts `[rows]`, which keeps its digits where logits are large."""

    maximum: Tensor
    log_sum: Tensor  # log Σ exp(logit - maximum)


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
            refuse("q [B, Nq, H, D], k and v [B, Nk, H, D]", q=q, k=k, v=v)
        _one_attention_type(q, k, v)
        (batch, queries, heads, _), keys = q.shape, k.shape[1]
        sizes = (heads, queries, keys)
        fit = bias.ndim == 4 and all(
            size in (1, full) for size, full in zip(bias.shape[1:], sizes, strict=True)
        )
        if not fit or (bias.shape[0] != batch and (not bias.shape[0] or batch % bias.shape[0])):
            refuse(
                f"[G, {heads}, {queries}, {keys}] or 1 where all share it, G a divisor of {batch}",
                bias=bias,
            )
        if not bias.is_floating_point() or (bias.dtype == torch.float64) != (
            q.dtype == torch.float64
        ):
            refuse(
                "floating point, float64 only with float64; of a boolean mask, zeros and -inf",
                bias=bias,
                q=q,
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
            refuse("q [Tq, H, D], k and v [Tk, H, D]", q=q, k=k, v=v)
        _one_attention_type(q, k, v)
        bounds = self[:2]
        if any(
            t.ndim != 1 or t.shape != bounds[0].shape or not t.numel() or t.dtype not in _INTEGERS
            for t in bounds
        ):
            refuse("both int32 or int64 [S + 1]", cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1])
        _key_mask(self.key_mask, k.shape[:1])
        dropout(self.dropout_p, self.seed)

    def bounds(self, q: Tensor, k: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The offsets as numbers, which describe q and k or are refused."""
        found = offsets_of(self.cu_seqlens_q, q, self.max_q, "q")
        if (
            self.cu_seqlens_k is self.cu_seqlens_q
            and self.max_k == self.max_q
            and k.shape[0] == q.shape[0]
        ):
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
        refuse("all [B, N, H, D]", q=q, k=k, v=v)
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
        must = f"{[*shapes[0]]} on {q.device}, what relpos_bias returned for the same table, window and device"
        refuse(must, bias=bias)
    if bias.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "bias requires a gradient, which relpos_attention has for its table only; detach it or use bias_attention"
        )


def dropout(dropout_p: float, seed: Tensor | None) -> None:
    """A probability, and what decides which elements it concerns."""
    if not 0 <= dropout_p < 1:
        refuse("a probability below 1", dropout_p=dropout_p)
    if seed is not None and (
        not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1
    ):
        refuse("one int64 on the device of the other tensors", seed=seed)


def seed_of(dropout_p: float, seed: Tensor | None) -> Tensor:
    """The seed, without which a backward pass could not drop what the forward pass dropped."""
    if seed is None:
        raise InputError(
            f"dropout_p={dropout_p} needs a seed: the backward must drop what the forward dropped"
        )
    return seed


def drawn_seed(dropout_p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed of a call, drawn from PyTorch's generator if there is none; None without dropout."""
    if not dropout_p:
        return None
    return torch.randint(1 << 62, (1,), device=device) if seed is None else seed


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor of the scores q kᵀ: 1/sqrt(D) by default."""
    if not q.ndim or not q.shape[-1]:
        refuse("of heads with at least one dimension", q=q)
    return float(q.shape[-1] ** -0.5) if scale is None else positive_scale(scale)


def positive_scale(scale: float) -> float:
    """The scale, if an online softmax can divide by it and take maxima before it is applied."""
    # A comparison, which compilers can trace, and not isfinite, which they cannot.
    if not 0 < scale < math.inf:
        refuse("positive and finite", scale=scale)
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


def _branch(out: tuple[int, ...], branch: Any) -> None:
    """The factors of a branch of shape `[..., M]`, and the residual that it is added to."""
    residual, gamma, row_scale = branch.residual, branch.gamma, branch.row_scale
    if residual.shape != out:
        refuse(f"{[*out]}, the shape of the branch", residual=residual)
    if gamma is not None and (gamma.shape != out[-1:] or not gamma.is_floating_point()):
        refuse(f"floating point [{out[-1]}]", gamma=gamma)
    if row_scale is not None and (
        len(out) < 2 or row_scale.shape != out[:1] or not row_scale.is_floating_point()
    ):
        refuse(
            f"floating point {[*out[:1]]}, a factor per entry of a branch {[*out]}",
            row_scale=row_scale,
        )
    dropout(branch.dropout_p, None)


def _key_mask(mask: Tensor | None, shape: torch.Size) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        refuse(f"bool {[*shape]}", key_mask=mask)


def _one_attention_type(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        refuse("of one floating-point type", q=q, k=k, v=v)


def _one_type(**tensors: Tensor | None) -> None:
    """Raise for operands of several dtypes, unless autocast converts them."""
    present = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(present.values()))
    if all(t.dtype == first.dtype for t in present.values()):
        return
    # Here, so that checks can be had without the operators, which register themselves once a process.
    from .library import autocast_dtype

    if not all(t.is_floating_point() for t in present.values()):
        refuse("floating point, or of one type", **present)
    if autocast_dtype(first.device) is None:
        refuse("of one type, or run under torch.autocast", **present)
