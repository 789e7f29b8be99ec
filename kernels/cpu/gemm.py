"""Linear layers on CPU in fp32 and bf16: fused inference, training with gradients, and 16-bit GEMMs in slices of rows.

oneDNN or a kernel compiled by LLVM runs where it is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backend import PLAIN, untraced
from ..caching import cached
from . import llvm
from .selection import Race, Selection, compare, operands, register, select
from .workspace import scratch

CPU_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of the CPU paths."""
Product = Callable[..., Tensor]
"""From x `[n, K]`, weight `[M, K]`, bias `[M]` or None, and further tensors of n rows: `[n, M]`."""

# Shape of the products that decide: packed caption tokens through a layer of the base width, and a single caption.
_ROWS, _FEW_ROWS, _WIDTH, _WIDE = 224, 13, 768, 3072
# Fewer rows are autotuned separately: MKL's fp32 GEMMs of 13 rows take up to 1.7 times as long as of 16.
_FEW = 16
_HIDDEN_BYTES = 6 << 20
# Rows of a hidden layer between compiled GEMMs: enough that packing their weights costs little.
_COMPILED_ROWS = 2048
# Shapes of the products that decide: two images through a layer of a base-size encoder, and as many as a weight's
# gradient sums over in one step of it.
_TRAINED_ROWS, _SUMMED = 394, 1576
# Rows that are transposed at once. The columns of wider blocks collide in cache.
_BLOCK = 64
# Rows of a slice for each thread: enough to keep it busy, and always divided well.
_SLICE_ROWS = 208
# Row counts this close share an answer; slices are cut to whole AMX tiles.
_BUCKET, _AMX_TILE = 64, 16
_ROUNDS = 4
_SLICES_MARGIN = 0.85
# A layout that costs no memory may take this much of PyTorch's time; of many rows, where few gain more than many lose.
_LAYOUT_MARGIN, _FEW_MARGIN = 1.02, 1.1
_slices_win: dict[tuple[Product, torch.Size, torch.dtype, int, int], bool] = {}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` for x `[..., K]`, weight `[M, K]`, as it is or `laid_out`."""
    rows = x.reshape(-1, x.shape[-1])
    name = _choose("linear", weight, rows.shape[0])
    return multiply(_LINEAR[name], rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`gelu(x W^T + b)`, erf form."""
    rows = x.reshape(-1, x.shape[-1])
    product = _GELU[_choose("linear_gelu", weight, rows.shape[0])]
    return multiply(product, rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


class Frozen(nn.Parameter):
    """The weight of a frozen model: in oneDNN's layout, or as it is where the compiled kernel is as fast.

    oneDNN's layout has no storage to copy or write: both operations go through its values.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return memo.setdefault(id(self), Frozen(self.data.clone(), requires_grad=False))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.data.to_dense(), self.is_mkldnn)


PLAIN.add(Frozen)


def dense(weight: Tensor) -> Tensor:
    """The values of a weight that may be frozen, as a constant of whatever is traced."""
    if not weight.is_mkldnn:
        return weight
    with untraced():
        return weight.detach().to_dense()


def _unpickled(weight: Tensor, blocked: bool) -> Frozen:
    return Frozen(laid_out(weight) if blocked else weight, requires_grad=False)


def is_frozen(weight: Tensor) -> bool:
    """True for the weight of a frozen model, and for any packed weight."""
    return weight.is_mkldnn or type(weight) is Frozen


class Chosen(NamedTuple):
    """The selected implementation for a number of rows and similar weights, called without further checks."""

    linear: Product
    gelu: Product
    residual: Product


def chosen(weight: Tensor, rows: int) -> Chosen:
    """The selected implementation for a number of rows with all frozen weights of this shape."""
    linear, gelu, residual = (_choose(operation, weight, rows) for operation in CANDIDATES)
    return Chosen(_LINEAR[linear], _GELU[gelu], _RESIDUAL[residual])


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None
) -> Tensor:
    """`residual + gamma · (x W^T + b)`. LayerScale is folded into the weight where the addition is fused."""
    rows, sums = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1])
    name = _choose("linear_residual", weight, rows.shape[0])
    if gamma is None:
        out = multiply(_RESIDUAL[name], rows, weight, bias, sums)
    elif name == "llvm":
        out = compiled(rows, weight, bias, sums, gamma)
    elif name == "aten" or weight.is_mkldnn:
        # A weight that is laid out is there once, as it is.
        product = multiply(F.linear if name == "aten" else onednn_linear, rows, weight, bias)
        out = torch.addcmul(sums, product, gamma, out=product)
    else:
        scaled_weight = cached(
            "layer-scaled weight", (weight, gamma), lambda: weight * gamma[:, None]
        )
        scaled_bias = (
            None
            if bias is None
            else cached("layer-scaled bias", (bias, gamma), lambda: bias * gamma)
        )
        out = multiply(_RESIDUAL[name], rows, scaled_weight, scaled_bias, sums)
    return out.view(residual.shape)


def mlp_residual(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None,
) -> Tensor:
    """`residual + gamma · (gelu(x W1^T + b1) W2^T + b2)`, in slices of rows: their hidden layer stays in cache.

    The whole hidden layer would be a buffer that the allocator returns to the system and faults in again in every
    layer. oneDNN's GEMMs cannot write to a given buffer, so they run on all rows.
    """
    rows, sums = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1])
    weights = {"linear_gelu": weight_in, "linear_residual": weight_out}
    first, second = (
        _choose(operation, weight, rows.shape[0]) for operation, weight in weights.items()
    )
    if first == second == "llvm":
        hidden = scratch(
            "hidden", (min(_COMPILED_ROWS, rows.shape[0]), weight_in.shape[0]), x.dtype
        )
        parts = [
            slice(start, start + _COMPILED_ROWS)
            for start in range(0, rows.shape[0], _COMPILED_ROWS)
        ]
        out = torch.empty_like(sums)
        for part in parts:
            middle = compiled(
                rows[part], weight_in, bias_in, gelu=True, out=hidden[: rows[part].shape[0]]
            )
            compiled(middle, weight_out, bias_out, sums[part], gamma, out=out[part])
        return out.view(residual.shape)
    if first != "aten" or second != "aten" or bias_in is None or bias_out is None:
        return linear_residual(
            linear_gelu(rows, weight_in, bias_in), weight_out, bias_out, residual, gamma
        )
    step = max(1, _HIDDEN_BYTES // (weight_in.shape[0] * x.element_size()))
    hidden = scratch("hidden", (min(step, rows.shape[0]), weight_in.shape[0]), x.dtype)
    out = torch.empty_like(sums)
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        middle = hidden[: rows[part].shape[0]]
        torch.ops.aten.gelu_(torch.addmm(bias_in, rows[part], weight_in.t(), out=middle))
        if gamma is None:
            torch.add(sums[part], bias_out, out=out[part]).addmm_(middle, weight_out.t())
        else:
            product = torch.addmm(bias_out, middle, weight_out.t(), out=out[part])
            torch.addcmul(sums[part], product, gamma, out=product)
    return out.view(residual.shape)


def trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` for x `[..., K]`, weight `[M, K]`, in the dtype of x; no copy of the weight survives."""
    name = _select("trained linear", weight, x.dtype)
    # Our kernel rounds a weight where it lays it out, others are given a copy.
    weight = weight if name == "llvm" else weight.to(x.dtype)
    return _TRAINED[name](x.reshape(-1, x.shape[-1]), weight, bias).view(
        *x.shape[:-1], weight.shape[0]
    )


def input_gradient(
    dout: Tensor, weight: Tensor, factors: Tensor | None = None, place: Tensor | None = None
) -> Tensor:
    """`dout (f · W)`: `[..., M]`, `[M, K]` → `[..., K]` in the dtype of dout, with factors `[M]`."""
    name = _select("input gradient", weight, dout.dtype, turned=True)
    rows, found = dout.reshape(-1, dout.shape[-1]), None
    if name == "llvm":
        # The kernel rounds and scales the weight where it lays it out.
        scales = None if factors is None else factors.float().contiguous()
        place = None if place is None else place.view(-1, weight.shape[1])
        found = _compiled(rows, weight, None, turned=True, factors=scales, out=place)
    if found is None:
        weight = weight.to(dout.dtype)
        found = _INPUT[name](
            rows, weight if factors is None else weight * factors[:, None].to(weight.dtype)
        )
    return found.view(*dout.shape[:-1], weight.shape[1])


def weight_gradient(
    dout: Tensor, x: Tensor, dtype: torch.dtype | None = None, sums: Tensor | None = None
) -> Tensor:
    """`dout^T x` over all rows: `[..., M]`, `[..., K]` → `[M, K]`; `sums` `[M]` in fp32 receives the bias gradient."""
    dtype, dout, x = dtype or x.dtype, dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
    # Some libraries refuse a product over no rows.
    name = select("weight gradient", dout.dtype) if len(x) else "aten"
    if name == "llvm":
        # The GEMM sums in fp32: no second pass widens the result or reads dout again for the bias.
        return _compiled_weight(dout, x, wide=dtype == torch.float32, sums=sums)
    if sums is not None:
        sums.copy_(bias_gradient(dout))
    return _WEIGHT[name](dout, x).to(dtype)


def bias_gradient(dout: Tensor) -> Tensor:
    """`[..., M]` → `[M]`, in fp32 or wider."""
    return dout.reshape(-1, dout.shape[-1]).sum(
        0, dtype=torch.promote_types(dout.dtype, torch.float32)
    )


def _choose(operation: str, weight: Tensor, rows: int) -> str:
    if weight.is_mkldnn and operation != "linear_gelu":
        return "onednn"
    of_few_rows = f"{operation} of few rows"
    if rows < _FEW and not weight.is_mkldnn and _HERE and _select(of_few_rows, weight) == "llvm":
        # Whatever is best for many rows; before a first caption nobody waits for that comparison.
        return "llvm"
    name = _select(operation, weight)
    if weight.is_mkldnn:
        # Whether the GELU is fused was found for weights that are packed at every call; it is the same GELU.
        return "onednn+gelu" if name == "onednn+gelu" else "onednn"
    if "packed" in name and type(weight) is Frozen:
        # The same GEMM without a copy; a frozen weight has no storage to copy.
        name = "onednn"
    return _select(of_few_rows, weight) if rows < _FEW and "packed" not in name else name


def _select(
    operation: str, weight: Tensor, dtype: torch.dtype | None = None, *, turned: bool = False
) -> str:
    """The choice for a weight `[M, K]`, or `[K, M]` if `turned`, in a dtype, by default its own."""
    inputs, outputs = weight.shape if turned else weight.shape[::-1]
    dtype = dtype or weight.dtype
    return select(operation, dtype, whole=llvm.fits(outputs, inputs, dtype))


def multiply(
    product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor
) -> Tensor:
    """`product(x, weight, bias, *others)` on all rows or in slices, whichever is faster by measurement.

    With AMX, oneDNN divides a GEMM among the threads by a model of the caches, which at some sizes picks a single
    thread. This depends on all sizes and on the threads, so each combination is timed once by the wall clock, in
    several rounds of which the best counts; slices have to win clearly. Under deterministic algorithms all rows run at
    once.
    """
    rows = x.shape[0]
    if x.element_size() != 2 or rows <= _SLICE_ROWS or product in _UNDIVIDED:
        return product(x, weight, bias, *others)
    threads = torch.get_num_threads()
    most = _SLICE_ROWS * threads
    if threads == 1 or rows <= most or torch.are_deterministic_algorithms_enabled():
        return product(x, weight, bias, *others)
    # Slices of one size, whole tiles each.
    step = -(-rows // (-(-rows // most) * _AMX_TILE)) * _AMX_TILE

    def sliced(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        for start in range(0, x.shape[0], step):
            part = slice(start, start + step)
            out[part] = product(x[part], weight, bias, *(other[part] for other in others))
        return out

    key = (product, weight.shape, x.dtype, rows // _BUCKET, threads)
    if key not in _slices_win:
        whole_seconds, sliced_seconds = _best_seconds((product, sliced), (x, weight, bias, *others))
        _slices_win[key] = sliced_seconds < _SLICES_MARGIN * whole_seconds
    return (sliced if _slices_win[key] else product)(x, weight, bias, *others)


def _best_seconds(products: Sequence[Product], arguments: tuple[Any, ...]) -> list[float]:
    """The best time of each, in interleaved rounds."""
    best = [float("inf")] * len(products)
    for _ in range(_ROUNDS):
        for i, product in enumerate(products):
            start = time.perf_counter()
            product(*arguments)
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def _packed(weight: Tensor, rows: int) -> Tensor:
    """A weight in the blocked layout that oneDNN multiplies without reordering it at every call."""
    if weight.is_inference():
        # Without a version it would be packed again and again.
        return weight
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return cached("onednn-packed", (weight,), lambda: reorder(weight.detach(), rows))


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """`x W^T + b` by oneDNN, or its GELU: x `[n, K]`, weight `[M, K]`, any strides."""
    after = ("gelu", [], "none") if gelu else ("none", [], "")
    # oneDNN ignores the stride of a bias.
    return torch.ops.mkldnn._linear_pointwise(
        x, weight, None if bias is None else bias.contiguous(), *after
    )


def onednn_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`residual + x W^T + b` by oneDNN: x `[n, K]`, weight `[M, K]`, residual `[n, M]`."""
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


def compiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    gelu: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`residual + gamma · (x W^T + b)`, or its GELU, by a kernel that LLVM compiles; written to `out`, if given.

    Sizes without a kernel run on PyTorch's operations.
    """
    found = _compiled(x, weight, bias, residual, gamma, gelu=gelu, out=out)
    if found is not None:
        return found
    found = F.linear(x, weight.to(x.dtype), bias)
    if gelu:
        torch.ops.aten.gelu_(found)
    found = found if gamma is None else found.mul_(gamma)
    found = found if residual is None else found + residual
    return found if out is None else out.copy_(found)


_compiled_gelu = partial(compiled, gelu=True)


def _compiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *others: Tensor | None,
    turned: bool = False,
    **options: Any,
) -> Tensor | None:
    """The result of the compiled kernel; None for unsupported sizes."""
    if (reason := llvm.why_not(x.dtype)) is not None:
        raise NotImplementedError(reason)
    # Imported where it runs, because its compiler takes long to load.
    from .llvm.linear import linear, takes

    given = [None if t is None else t.contiguous() for t in (bias, *others)]
    return (
        linear(x, weight, *given, turned=turned, **options)
        if takes(x, weight, *given, turned=turned)
        else None
    )


_UNDIVIDED = (compiled, _compiled_gelu)
_HERE = llvm.why_not() is None
# With the narrow vectors of AVX2 many rows gain no time over MKL, which sums as eager PyTorch does.
_TRAINS = _HERE and llvm.levels()[0].lanes > 8
# Which is faster differs from processor to processor, so these are compared where they run. The first is trusted.
_LINEAR: dict[str, Product] = {
    "aten": F.linear,
    "onednn": onednn_linear,
    "onednn-packed": lambda x, w, b: onednn_linear(x, _packed(w, x.shape[0]), b),
    **({"llvm": compiled} if _HERE else {}),
}
_GELU: dict[str, Product] = {
    "aten": lambda x, w, b: torch.ops.aten.gelu_(F.linear(x, w, b)),
    "onednn+gelu": lambda x, w, b: torch.ops.aten.gelu_(onednn_linear(x, w, b)),
    "onednn": partial(onednn_linear, gelu=True),
    "onednn-packed": lambda x, w, b: onednn_linear(x, _packed(w, x.shape[0]), b, gelu=True),
    **({"llvm": _compiled_gelu} if _HERE else {}),
}
_RESIDUAL: dict[str, Product] = {
    # The GEMM accumulates into the sum: one pass less than a linear layer followed by an addition.
    "aten": lambda x, w, b, residual: (residual.clone() if b is None else residual + b).addmm_(
        x, w.t()
    ),
    "onednn": onednn_residual,
    "onednn-packed": lambda x, w, b, residual: onednn_residual(
        x, _packed(w, x.shape[0]), b, residual
    ),
    **({"llvm": compiled} if _HERE else {}),
}


CANDIDATES = {"linear": _LINEAR, "linear_gelu": _GELU, "linear_residual": _RESIDUAL}


def _transpose(x: Tensor, place: Tensor) -> Tensor:
    """`[n, m]` into a contiguous `[m, n]`."""
    for start in range(0, x.shape[0], _BLOCK):
        place[:, start : start + _BLOCK] = x[start : start + _BLOCK].t()
    return place


def _onednn_input(dout: Tensor, weight: Tensor) -> Tensor:
    return onednn_linear(dout, weight.t(), None)


def _transposed_weight(
    dout: Tensor, x: Tensor, product: Callable[[Tensor, Tensor], Tensor] = torch.mm
) -> Tensor:
    """Transpose the narrower factor first: libraries are slower at it inside a half-precision GEMM."""
    narrow, wide = (dout, x) if dout.shape[1] <= x.shape[1] else (x, dout)
    found = product(
        _transpose(narrow, scratch("transposed", (narrow.shape[1], narrow.shape[0]), x.dtype)), wide
    )
    return (
        found
        if narrow is dout
        else _transpose(found, found.new_empty(found.shape[1], found.shape[0]))
    )


def _compiled_input(dout: Tensor, weight: Tensor) -> Tensor:
    found = _compiled(dout, weight, None, turned=True)
    return torch.mm(dout, weight) if found is None else found


def _compiled_weight(dout: Tensor, x: Tensor, **options: Any) -> Tensor:
    """`dout^T x` of any sizes by the compiled kernel, with its options."""
    if (reason := llvm.why_not(x.dtype)) is not None:
        raise NotImplementedError(reason)
    from .llvm.weight_gradient import weight_gradient

    return weight_gradient(dout, x, **options)


_TRAINED: dict[str, Product] = {
    "aten": F.linear,
    "onednn": onednn_linear,
    **({"llvm": compiled} if _TRAINS else {}),
}
_INPUT: dict[str, Product] = {
    "aten": torch.mm,
    "onednn": _onednn_input,
    **({"llvm": _compiled_input} if _TRAINS else {}),
}
_WEIGHT: dict[str, Product] = {
    "aten": lambda dout, x: dout.t() @ x,
    "transposed": _transposed_weight,
    "onednn": lambda dout, x: _transposed_weight(dout, x, _onednn_input),
    **({"llvm": _compiled_weight} if _TRAINS else {}),
}


def _example(
    dtype: torch.dtype,
    rows: int,
    outputs: int = _WIDTH,
    names: tuple[str, ...] = ("x", "weight", "bias"),
) -> tuple[Tensor, ...]:
    """Operands of a layer of the base width, by name."""
    shapes = {
        "x": (rows, _WIDTH),
        "weight": (outputs, _WIDTH),
        "bias": (outputs,),
        "residual": (rows, outputs),
    }
    found = dict(zip(shapes, operands(dtype, *shapes.values()), strict=True))
    found["weight"] /= _WIDTH**0.5
    # Read from memory in a timing, as in a model; of few rows it would take all candidates equally long.
    if rows > _FEW_ROWS:
        found["weight"] = nn.Parameter(found["weight"], requires_grad=False)
    return tuple(found[name] for name in names)


def _register(
    operation: str, candidates: dict[str, Product], rows: int, *names: str, outputs: int = _WIDTH
) -> None:
    example = partial(_example, rows=rows, outputs=outputs, names=names or ("x", "weight", "bias"))
    # Our own kernel of weight gradients takes any sizes.
    any_size = operation in ("weight gradient", "layout for few rows")
    register(operation, Race(candidates, example, 2 * rows * _WIDTH * outputs), any_size=any_size)


for _name, _candidates in CANDIDATES.items():
    _names = ("x", "weight", "bias", "residual") if _name == "linear_residual" else ()
    _register(_name, _candidates, _ROWS, *_names)
    # A second copy of all weights is too much for the little that it saves of few rows.
    _light = {name: product for name, product in _candidates.items() if "packed" not in name}
    _register(f"{_name} of few rows", _light, _FEW_ROWS, *_names)
_register("trained linear", _TRAINED, _TRAINED_ROWS)
_register("input gradient", _INPUT, _TRAINED_ROWS, "residual", "weight")
_register("weight gradient", _WEIGHT, _SUMMED, "residual", "x")
# What a layout gains for few rows.
_layouts = {name: product for name, product in _LINEAR.items() if name != "onednn"}
_register("layout for few rows", _layouts, _FEW_ROWS, outputs=_WIDE)


def seconds(dtype: torch.dtype) -> float:
    """What the chosen products of many rows together take; NaN where they are not timed."""
    if torch.are_deterministic_algorithms_enabled():
        return float("nan")
    return sum(each.seconds.get(each.chosen, float("nan")) for each in _of_many_rows(dtype))


def prefers_onednn(dtype: torch.dtype, *, few_rows: bool = False) -> bool:
    """True where weights in oneDNN's layout are no slower than plain ones, or the operation needs the layout.

    The comparison is for many rows. With few rows the time goes into reading the weight, where oneDNN's layout is up to
    twice as fast; `few_rows` (few rows as often as many) weighs that gain against the loss for many.
    """
    if dtype not in (torch.float32, torch.bfloat16) or torch.are_deterministic_algorithms_enabled():
        return False
    found = _of_many_rows(dtype)
    names = [each.chosen for each in found]
    if any("packed" in name for name in names):
        # Beside a weight as it is, that product would keep a copy.
        return True
    many = _layout_share(*found)
    if many is None:
        return names[0] not in ("aten", "llvm")
    # The compiled kernel is as quick of many rows as laid out weights are, and may be of few ones.
    compiled = all(name == "llvm" for name in names)
    if not few_rows or (many < _LAYOUT_MARGIN and not compiled):
        return many < _LAYOUT_MARGIN and not compiled
    few = _layout_share(compare("layout for few rows", dtype))
    return few is not None and many < _FEW_MARGIN and few * many < 1


def reads_as_quickly(dtype: torch.dtype, *, few_rows: bool = False) -> bool:
    """True where the compiled kernel, which reads weights as they are, multiplies many rows, or few, as well as any."""
    if few_rows:
        return all(select(f"{operation} of few rows", dtype) == "llvm" for operation in CANDIDATES)
    return not torch.are_deterministic_algorithms_enabled() and all(
        each.chosen == "llvm" for each in _of_many_rows(dtype)
    )


def _of_many_rows(dtype: torch.dtype) -> list[Selection]:
    return [compare(operation, dtype) for operation in CANDIDATES]


def _layout_share(*found: Selection) -> float | None:
    """The time of weights in oneDNN's layout relative to plain ones, over several GEMMs, since one is too noisy."""
    every = [each.seconds for each in found if "onednn-packed" in each.seconds]
    as_they_are = [
        min(time for name, time in seconds.items() if "packed" not in name) for seconds in every
    ]
    return sum(seconds["onednn-packed"] for seconds in every) / sum(as_they_are) if every else None


def laid_out(weight: Tensor) -> Tensor:
    """A weight `[M, K]` in oneDNN's blocked layout; `to_dense()` returns the same bits."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
