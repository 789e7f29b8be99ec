"""Linear layers on CPU in fp32 and bf16: fused inference, training with gradients, and 16-bit GEMMs in slices of rows.

oneDNN or a kernel compiled by LLVM runs where it is faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from xfm_fast.errors import InputError

from ..backend import PACKED, PLAIN, untraced
from ..caching import cached
from . import llvm
from .selection import RACES, Race, compare, operands, register, select
from .workspace import HugePages, collide, scratch, scratch_rows

CPU_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of the CPU paths."""
Gemm = Callable[..., Tensor]
"""From x `[n, K]`, weight `[M, K]`, bias `[M]` or None, and further tensors of n rows: `[n, M]`."""

# Shapes of the timed GEMMs: packed caption tokens through a layer of the base width, a single caption, and a short
# text, with which layouts are compared too.
_ROWS, _FEW_ROWS, _TEXT_ROWS, _WIDTH, _WIDE = 224, 13, 24, 768, 3072
# Inputs from which on layers have races of their own.
_WIDTHS = (2048, 1024)
# Fewer rows are autotuned separately: MKL's fp32 GEMMs of 13 rows take up to 1.7 times as long as of 16.
_FEW = 16
_HIDDEN_BYTES = 6 << 20
# Rows of a hidden layer between compiled GEMMs: enough that packing their weights costs little.
_COMPILED_ROWS = 2048
# Rows of the timed GEMMs of training: two images through a layer of a base-size encoder, and all tokens of a step, over
# which the gradient of a weight sums.
_TRAINED_ROWS, _SUMMED = 394, 1576
# Rows that collide in cache are copied before a GEMM of at least so many.
_COPIED_ROWS = 64
# Rows that are transposed at once. The columns of wider blocks collide in cache.
_BLOCK = 64
# Rows of a slice for each thread: enough to keep it busy, and always well divided.
_SLICE_ROWS = 208
# Row counts this close share an answer; slices are cut to whole AMX tiles.
_BUCKET, _AMX_TILE = 64, 16
_ROUNDS = 4
_SLICES_MARGIN = 0.85
# Layouts as fast as this are equal. With many rows a layout may lose so much to what few rows gain.
_LAYOUT_MARGIN, _LAYOUT_LOSS = 1.02, 1.35
# Seconds of calls that a plan saves for each timed GEMM. It cannot read oneDNN's blocks, and plain weights only where
# that is fastest.
_CALLS_S = 1.7e-4
_slices_win: dict[tuple[Gemm, torch.Size, torch.dtype, int, int], bool] = {}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` for x `[..., K]`, weight `[M, K]`, plain or frozen."""
    rows = x.reshape(-1, x.shape[-1])
    name = _choose("linear", weight, rows.shape[0])
    return multiply(_LINEAR[name], rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `gelu(x W^T + b)`, erf form."""
    rows = x.reshape(-1, x.shape[-1])
    name = _choose("linear_gelu", weight, rows.shape[0])
    return multiply(_GELU[name], rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


Layout = Literal["plain", "onednn", "panels"]
"""How a frozen weight is stored: as it was, in oneDNN's blocks, or in the panels of the compiled kernel."""


class Frozen(nn.Parameter):
    """The weight of a frozen model, plain or in oneDNN's layout.

    oneDNN's layout has no storage to copy or write: both operations go through its values.
    """

    layout_name: Layout = "plain"

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return memo.setdefault(id(self), Frozen(self.data.clone(), requires_grad=False))

    def __reduce_ex__(self, protocol: Any) -> Any:
        layout = "onednn" if self.is_mkldnn else self.layout_name
        return frozen, (dense(self).data, layout)


_ATEN = torch.ops.aten
# Operations that return a part, which could be written to.
_PARTS = (_ATEN.slice, _ATEN.select, _ATEN.split, _ATEN.unbind, _ATEN.diagonal, _ATEN.as_strided)


class FrozenPanels(Frozen):
    """A frozen weight `[M, K]` in panels; operations other than our kernels take its dense values.

    Those would take a write too, and lose it: InputError.
    """

    layout_name = "panels"
    panels: Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, panels: Tensor, shape: torch.Size, dtype: torch.dtype) -> FrozenPanels:
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        weight.panels = panels
        return weight

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN.detach.default:
            return cls.of(args[0].panels, args[0].shape, args[0].dtype)
        if func._schema.is_mutable or func.overloadpacket in _PARTS:
            raise InputError(
                "this weight is frozen for inference, and a change of it or of a part is lost; call unfreeze() on "
                "the model, or report.revert(), before it"
            )
        args, kwargs = pytree.tree_map_only(cls, cls.values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(self.values())

    def values(self) -> Tensor:
        """Return the dense values in memory of their own."""
        units = self.panels.transpose(1, 2).reshape(-1, self.panels.shape[1])
        return units[: self.shape[0]].view(self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return memo.setdefault(
            id(self), FrozenPanels.of(self.panels.clone(), self.shape, self.dtype)
        )


PLAIN.update((Frozen, FrozenPanels))
PACKED.add(FrozenPanels)


def frozen(weight: Tensor, layout: Layout, memory: HugePages | None = None) -> Frozen:
    """Store a weight `[M, K]` in a layout, panels in memory of many weights if it is given; plain without a kernel."""
    weight = weight.detach()
    if layout == "panels" and _HERE and _fits(weight):
        units = weight.contiguous().view(torch.int32)
        panels = _linear_kernel().in_panels(units, memory=memory)
        return FrozenPanels.of(panels, weight.shape, weight.dtype)
    return Frozen(laid_out(weight) if layout == "onednn" else weight, requires_grad=False)


def split_panels(weight: Frozen, sizes: Sequence[int]) -> list[FrozenPanels]:
    """Return the weights of `sizes` rows that were frozen as one, if each has panels of its own."""
    if not isinstance(weight, FrozenPanels):
        return []
    counts = [size // weight.panels.shape[2] for size in sizes]
    if sum(counts) != len(weight.panels):
        return []
    shapes = (torch.Size((size, weight.shape[1])) for size in sizes)
    parts = zip(weight.panels.split(counts), shapes, strict=True)
    return [FrozenPanels.of(panels, shape, weight.dtype) for panels, shape in parts]


def layout_of(weight: Tensor, *, few_rows: bool = False) -> Layout:
    """Return the fastest layout of a weight; `few_rows` if it multiplies few rows as often as many.

    With few rows the time goes into reading the weight. What they gain may cost many rows some of theirs; without them,
    panels have to be faster.
    """
    names: list[Layout] = (
        ["panels", "onednn", "plain"] if few_rows else ["onednn", "plain", "panels"]
    )
    times = dict.fromkeys(names, 1.0)
    if weight.dtype not in CPU_DTYPES or torch.are_deterministic_algorithms_enabled():
        return "plain"
    for race in ("layout", "layout for few rows")[: 1 + few_rows]:
        seconds = dict(compare(_race(race, weight.shape[1]), weight.dtype).seconds)
        panels = seconds.pop("llvm-packed", math.inf) if _fits(weight) else math.inf
        packed = seconds.pop("onednn-packed", math.inf)
        plain = min(seconds.values(), default=math.nan)
        if math.isnan(plain):
            # Of a single candidate nothing was timed.
            return "plain"
        calls = 0.0 if race == "layout" else _CALLS_S
        taken: dict[Layout, float] = {
            "panels": panels,
            "onednn": packed + calls,
            "plain": plain + calls,
        }
        for layout in names:
            ratio = taken[layout] / min(taken.values())
            times[layout] *= ratio if race != "layout" or ratio < _LAYOUT_LOSS else math.inf
    limit = _LAYOUT_MARGIN * min(times.values())
    return next(layout for layout in names if times[layout] <= limit)


def dense(weight: Tensor) -> Tensor:
    """Return the dense values of a weight that may be frozen, as a constant of a trace."""
    if not is_laid_out(weight):
        return weight
    with untraced():
        return weight.values() if isinstance(weight, FrozenPanels) else weight.detach().to_dense()


def is_laid_out(weight: Tensor) -> bool:
    """Return whether a weight has another layout than PyTorch's."""
    return weight.is_mkldnn or type(weight) is FrozenPanels


def is_frozen(weight: Tensor) -> bool:
    """Return whether a weight is of a frozen model, or packed."""
    return weight.is_mkldnn or isinstance(weight, Frozen)


def linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor | None
) -> Tensor:
    """Return `residual + gamma · (x W^T + b)`. LayerScale is folded into the weight where the sum is fused."""
    rows, sums = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1])
    name = _choose("linear_residual", weight, rows.shape[0])
    if gamma is None:
        out = multiply(_RESIDUAL[name], rows, weight, bias, sums)
    elif name == "llvm":
        out = compiled(rows, weight, bias, sums, gamma)
    elif name == "aten" or weight.is_mkldnn:
        # A weight in oneDNN's layout has no second, scaled copy.
        branch = multiply(F.linear if name == "aten" else onednn_linear, rows, weight, bias)
        out = torch.addcmul(sums, branch, gamma, out=branch)
    else:
        scaled = cached("layer-scaled weight", (weight, gamma), lambda: weight * gamma[:, None])
        if bias is not None:
            unscaled = bias
            bias = cached("layer-scaled bias", (bias, gamma), lambda: unscaled * gamma)
        out = multiply(_RESIDUAL[name], rows, scaled, bias, sums)
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
    """Return `residual + gamma · (gelu(x W1^T + b1) W2^T + b2)`, in slices of rows whose hidden layer stays in cache.

    The whole hidden layer would be a buffer that the allocator returns to the system and faults in again in every
    layer. oneDNN's GEMMs cannot write to a given buffer, so they run on all rows.
    """
    rows, sums = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1])
    count, width = rows.shape[0], weight_in.shape[0]
    first = _choose("linear_gelu", weight_in, count)
    second = _choose("linear_residual", weight_out, count)
    on_aten = first == second == "aten" and bias_in is not None and bias_out is not None
    if not on_aten and not first == second == "llvm":
        hidden = linear_gelu(rows, weight_in, bias_in)
        return linear_residual(hidden, weight_out, bias_out, residual, gamma)
    step = max(1, _HIDDEN_BYTES // (width * x.element_size())) if on_aten else _COMPILED_ROWS
    memory = scratch_rows("hidden", min(step, count), width, x.dtype)
    out = torch.empty_like(sums)
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        hidden = memory[: rows[chunk].shape[0]]
        if not on_aten:
            compiled(rows[chunk], weight_in, bias_in, gelu=True, out=hidden)
            compiled(hidden, weight_out, bias_out, sums[chunk], gamma, out=out[chunk])
            continue
        assert bias_in is not None
        assert bias_out is not None
        torch.ops.aten.gelu_(torch.addmm(bias_in, rows[chunk], weight_in.t(), out=hidden))
        if gamma is None:
            torch.add(sums[chunk], bias_out, out=out[chunk]).addmm_(hidden, weight_out.t())
        else:
            branch = torch.addmm(bias_out, hidden, weight_out.t(), out=out[chunk])
            torch.addcmul(sums[chunk], branch, gamma, out=branch)
    return out.view(residual.shape)


def trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` for x `[..., K]`, weight `[M, K]`, in the dtype of x; no copy of the weight is kept."""
    name = _select("trained linear", weight, x.dtype)
    # Our kernel rounds a weight where it packs it, others need a copy.
    weight = weight if name == "llvm" else weight.to(x.dtype)
    out = _TRAINED[name](x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def input_gradient(
    dout: Tensor, weight: Tensor, factors: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return `dout (f · W)`: `[..., M]`, `[M, K]` → `[..., K]` in the dtype of dout, with factors `[M]`.

    Some implementations write it to `out`.
    """
    name = _select("input gradient", weight, dout.dtype, turned=True)
    rows, dx = dout.reshape(-1, dout.shape[-1]), None
    if name == "llvm":
        # The kernel rounds and scales the weight where it packs it.
        scales = None if factors is None else factors.float().contiguous()
        out = None if out is None else out.view(-1, weight.shape[1])
        dx = _compiled(rows, weight, None, turned=True, factors=scales, out=out)
    if dx is None:
        weight = weight.to(dout.dtype)
        if factors is not None:
            weight = weight * factors[:, None].to(weight.dtype)
        dx = _INPUT[name](rows, weight)
    return dx.view(*dout.shape[:-1], weight.shape[1])


def weight_gradient(
    dout: Tensor, x: Tensor, dtype: torch.dtype | None = None, sums: Tensor | None = None
) -> Tensor:
    """Return `dout^T x` over all rows: `[..., M]`, `[..., K]` → `[M, K]`, and the bias gradient in `sums` `[M]`."""
    dtype, dout, x = dtype or x.dtype, dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
    # Some libraries refuse a sum over no rows.
    name = select(_race("weight gradient", x.shape[1]), dout.dtype) if len(x) else "aten"
    if name == "llvm":
        # The GEMM sums in fp32: no second pass widens the result or reads dout again for the bias.
        return _compiled_weight(dout, x, wide=dtype == torch.float32, sums=sums)
    if sums is not None:
        sums.copy_(bias_gradient(dout))
    return _WEIGHT[name](dout, x).to(dtype)


def bias_gradient(dout: Tensor) -> Tensor:
    """Return the sum over all rows: `[..., M]` → `[M]`, in fp32 or wider."""
    wide = torch.promote_types(dout.dtype, torch.float32)
    return dout.reshape(-1, dout.shape[-1]).sum(0, dtype=wide)


def delay(name: str, operation: str, weight: Tensor, rows: int) -> float:
    """Return the seconds that a candidate loses against the fastest, by their race; infinite if it cannot run."""
    if weight.is_mkldnn or (name != "llvm" and type(weight) is FrozenPanels):
        return math.inf
    if _choose(operation, weight, rows) == name:
        return 0.0
    if torch.are_deterministic_algorithms_enabled() or (name == "llvm" and not _fits(weight)):
        return math.inf
    seconds = _estimate(operation, weight, rows)
    lost = seconds.get(name, math.inf) - min(seconds.values(), default=0.0)
    return lost * 2 * _ROWS * weight.numel() / RACES[_race(operation, weight.shape[1])].flops


def _race(operation: str, inputs: int) -> str:
    """Return the name of the race of an operation for layers with so many inputs."""
    width = next((width for width in _WIDTHS if inputs >= width), _WIDTH)
    return operation if width == _WIDTH else f"{operation} of {width} inputs"


def _estimate(operation: str, weight: Tensor, rows: int) -> dict[str, float]:
    """Return the seconds of candidates for a weight of a race's size, between the races of few rows and of many."""
    names = (_race(name, weight.shape[1]) for name in (f"{operation} of few rows", operation))
    few, many = (compare(name, weight.dtype).seconds for name in names)
    timed = min(max(rows, _FEW_ROWS), _ROWS)
    share = (timed - _FEW_ROWS) / (_ROWS - _FEW_ROWS)
    return {
        name: (few[name] * (1 - share) + many[name] * share) * rows / timed
        for name in few.keys() & many.keys()
    }


def _choose(operation: str, weight: Tensor, rows: int) -> str:
    """Return the name of the implementation for a weight and a number of rows."""
    if type(weight) is FrozenPanels:
        return "llvm"
    if weight.is_mkldnn:
        if operation != "linear_gelu":
            return "onednn"
        # Whether to fuse the GELU was measured with weights that are packed at every call; it is the same GELU.
        return "onednn+gelu" if _select(operation, weight) == "onednn+gelu" else "onednn"
    few_rows = f"{operation} of few rows"
    if rows < _FEW and _HERE and _select(few_rows, weight) == "llvm":
        # Without the comparison for many rows, which would delay a first caption.
        return "llvm"
    name = _select(operation, weight)
    if "packed" in name and type(weight) is Frozen:
        # The same GEMM without a copy; a frozen weight has no storage to copy.
        name = "onednn"
    if rows >= _ROWS or "packed" in name:
        return name
    choice = _select(few_rows, weight)
    if rows < _FEW or choice == name:
        return choice
    seconds = _estimate(operation, weight, rows)
    return min((choice, name), key=lambda each: seconds.get(each, math.inf))


def _select(
    operation: str, weight: Tensor, dtype: torch.dtype | None = None, *, turned: bool = False
) -> str:
    """Return the choice for a weight `[M, K]`, or `[K, M]` if `turned`, in a dtype, by default that of the weight."""
    dtype, operation = dtype or weight.dtype, _race(operation, weight.shape[1])
    return select(operation, dtype, fits=_fits(weight, dtype, turned=turned))


def _fits(weight: Tensor, dtype: torch.dtype | None = None, *, turned: bool = False) -> bool:
    """Return whether there is a kernel for a weight."""
    inputs, outputs = weight.shape if turned else weight.shape[::-1]
    return llvm.fits(outputs, inputs, dtype or weight.dtype)


def multiply(
    gemm: Gemm, x: Tensor, weight: Tensor, bias: Tensor | None, *residual: Tensor
) -> Tensor:
    """Return `gemm(x, weight, bias, *residual)` on all rows or in slices, whichever is faster by measurement.

    With AMX, oneDNN divides a GEMM among the threads by a model of the caches, which at some sizes picks a single
    thread. This depends on all sizes and on the threads, so each combination is timed once by the wall clock, in
    several rounds of which the best counts; slices have to win clearly. Under deterministic algorithms all rows run at
    once.
    """
    rows = x.shape[0]
    if x.element_size() != 2 or rows <= _SLICE_ROWS or gemm in _UNDIVIDED:
        return gemm(x, weight, bias, *residual)
    threads = torch.get_num_threads()
    limit = _SLICE_ROWS * threads
    if threads == 1 or rows <= limit or torch.are_deterministic_algorithms_enabled():
        return gemm(x, weight, bias, *residual)
    # Slices of one size, in complete tiles.
    step = -(-rows // (-(-rows // limit) * _AMX_TILE)) * _AMX_TILE

    def sliced(x: Tensor, weight: Tensor, bias: Tensor | None, *residual: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        for start in range(0, x.shape[0], step):
            chunk = slice(start, start + step)
            out[chunk] = gemm(x[chunk], weight, bias, *(tensor[chunk] for tensor in residual))
        return out

    key = (gemm, weight.shape, x.dtype, rows // _BUCKET, threads)
    if key not in _slices_win:
        undivided, in_slices = _best_seconds((gemm, sliced), (x, weight, bias, *residual))
        _slices_win[key] = in_slices < _SLICES_MARGIN * undivided
    return (sliced if _slices_win[key] else gemm)(x, weight, bias, *residual)


def _best_seconds(gemms: Sequence[Gemm], arguments: tuple[Any, ...]) -> list[float]:
    """Time each GEMM in interleaved rounds; return the best times."""
    best = [float("inf")] * len(gemms)
    for _ in range(_ROUNDS):
        for index, gemm in enumerate(gemms):
            start = time.perf_counter()
            gemm(*arguments)
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def _packed(weight: Tensor, rows: int) -> Tensor:
    """Return a weight in oneDNN's blocked layout, cached: plain ones are reordered at every call."""
    if weight.is_inference():
        # Without a version it would be packed again and again.
        return weight
    reorder = torch.ops.mkldnn._reorder_linear_weight
    return cached("onednn-packed", (weight,), lambda: reorder(weight.detach(), rows))


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """Return `x W^T + b` by oneDNN, or its GELU: x `[n, K]`, weight `[M, K]`, any strides."""
    after = ("gelu", [], "none") if gelu else ("none", [], "")
    # oneDNN ignores the stride of a bias.
    return torch.ops.mkldnn._linear_pointwise(
        x, weight, None if bias is None else bias.contiguous(), *after
    )


def onednn_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Return `residual + x W^T + b` by oneDNN: x `[n, K]`, weight `[M, K]`, residual `[n, M]`."""
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
    """Return `residual + gamma · (x W^T + b)`, or its GELU, by a kernel that LLVM compiles; in `out`, if present.

    Sizes without a kernel run on PyTorch's operations.
    """
    result = _compiled(x, weight, bias, residual, gamma, gelu=gelu, out=out)
    if result is not None:
        return result
    result = F.linear(x, weight.to(x.dtype), bias)
    if gelu:
        torch.ops.aten.gelu_(result)
    if gamma is not None:
        result.mul_(gamma)
    if residual is not None:
        result = result + residual
    return result if out is None else out.copy_(result)


_compiled_gelu = partial(compiled, gelu=True)


def _compiled(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    turned: bool = False,
    **options: Any,
) -> Tensor | None:
    """Run the compiled kernel; return None for unsupported sizes."""
    if (reason := llvm.why_not(x.dtype)) is not None:
        raise NotImplementedError(reason)
    kernel = _linear_kernel()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    gamma = None if gamma is None else gamma.contiguous()
    stored = panels_of(weight)
    if stored is not None and (turned or x.dtype != weight.dtype):
        # Panels are of one dtype, and their columns those of a forward pass.
        weight, stored = dense(weight), None
    if not kernel.takes(x, weight, bias, residual, gamma, turned=turned):
        return None
    if collides(x):
        x = scratch_rows("rows", len(x), x.shape[1], x.dtype).copy_(x)
    return kernel.linear(x, weight, bias, residual, gamma, turned=turned, stored=stored, **options)


def collides(x: Tensor) -> bool:
    """Return whether rows `[n, K]` collide in cache and are so many that a GEMM is faster on a copy."""
    return _WIDE_VECTORS and len(x) >= _COPIED_ROWS and collide(x.stride(0), x.dtype)


def panels_of(weight: Tensor) -> Tensor | None:
    """Return the panels of a weight that is frozen in them."""
    return weight.panels if type(weight) is FrozenPanels else None


@cache
def _linear_kernel():
    """Import the kernel where it first runs, because its compiler takes long to load."""
    from .llvm import linear

    return linear


_UNDIVIDED = (compiled, _compiled_gelu)
_HERE = llvm.why_not() is None
# With the narrow vectors of AVX2 many rows gain no time over MKL, which sums as eager PyTorch does, and a set of the
# cache has a line for every row of a tile.
_WIDE_VECTORS = _HERE and llvm.levels()[0].lanes > 8
# Processors differ in which is faster, so these are compared where they run. The first is the reference.
_LINEAR: dict[str, Gemm] = {
    "aten": F.linear,
    "onednn": onednn_linear,
    "onednn-packed": lambda x, w, b: onednn_linear(x, _packed(w, x.shape[0]), b),
    **({"llvm": compiled} if _HERE else {}),
}
_GELU: dict[str, Gemm] = {
    "aten": lambda x, w, b: torch.ops.aten.gelu_(F.linear(x, w, b)),
    "onednn+gelu": lambda x, w, b: torch.ops.aten.gelu_(onednn_linear(x, w, b)),
    "onednn": partial(onednn_linear, gelu=True),
    "onednn-packed": lambda x, w, b: onednn_linear(x, _packed(w, x.shape[0]), b, gelu=True),
    **({"llvm": _compiled_gelu} if _HERE else {}),
}
_RESIDUAL: dict[str, Gemm] = {
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


def _transpose(x: Tensor, out: Tensor) -> Tensor:
    """Write the transpose of `[n, m]` to a contiguous `[m, n]`."""
    for start in range(0, x.shape[0], _BLOCK):
        out[:, start : start + _BLOCK] = x[start : start + _BLOCK].t()
    return out


def _onednn_input(dout: Tensor, weight: Tensor) -> Tensor:
    return onednn_linear(dout, weight.t(), None)


def _transposed_weight(
    dout: Tensor, x: Tensor, gemm: Callable[[Tensor, Tensor], Tensor] = torch.mm
) -> Tensor:
    """Transpose the narrower factor first: libraries are slower at it inside a half-precision GEMM."""
    narrow, wide = (dout, x) if dout.shape[1] <= x.shape[1] else (x, dout)
    memory = scratch("transposed", (narrow.shape[1], narrow.shape[0]), x.dtype)
    dweight = gemm(_transpose(narrow, memory), wide)
    if narrow is dout:
        return dweight
    return _transpose(dweight, dweight.new_empty(dweight.shape[1], dweight.shape[0]))


def _compiled_input(dout: Tensor, weight: Tensor) -> Tensor:
    dx = _compiled(dout, weight, None, turned=True)
    return torch.mm(dout, weight) if dx is None else dx


def _compiled_weight(dout: Tensor, x: Tensor, **options: Any) -> Tensor:
    """Return `dout^T x` of any sizes by the compiled kernel, with its options."""
    if (reason := llvm.why_not(x.dtype)) is not None:
        raise NotImplementedError(reason)
    from .llvm.weight_gradient import weight_gradient

    return weight_gradient(dout, x, **options)


_TRAINED: dict[str, Gemm] = {
    "aten": F.linear,
    "onednn": onednn_linear,
    **({"llvm": compiled} if _WIDE_VECTORS else {}),
}
_INPUT: dict[str, Gemm] = {
    "aten": torch.mm,
    "onednn": _onednn_input,
    **({"llvm": _compiled_input} if _WIDE_VECTORS else {}),
}
_WEIGHT: dict[str, Gemm] = {
    "aten": lambda dout, x: dout.t() @ x,
    "transposed": _transposed_weight,
    "onednn": lambda dout, x: _transposed_weight(dout, x, _onednn_input),
    **({"llvm": _compiled_weight} if _WIDE_VECTORS else {}),
}


def _example(
    dtype: torch.dtype,
    rows: int,
    inputs: int,
    outputs: int,
    names: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """Return operands of a layer by name."""
    shapes = {
        "x": (rows, inputs),
        "weight": (outputs, inputs),
        "bias": (outputs,),
        "residual": (rows, outputs),
    }
    tensors = dict(zip(shapes, operands(dtype, *shapes.values()), strict=True))
    tensors["weight"] /= inputs**0.5
    # A parameter is read from memory in a timing, as in a model.
    tensors["weight"] = nn.Parameter(tensors["weight"], requires_grad=False)
    return tuple(tensors[name] for name in names)


def _register(
    operation: str, candidates: dict[str, Gemm], rows: int, *names: str, outputs: int = _WIDTH
) -> None:
    names = names or ("x", "weight", "bias")
    # The compiled kernel of weight gradients takes any sizes.
    any_size = operation in ("weight gradient", "layout", "layout for few rows")
    for width in (_WIDTH, *_WIDTHS):
        example = partial(_example, rows=rows, inputs=width, outputs=outputs, names=names)
        race = Race(candidates, example, 2 * rows * width * outputs)
        register(_race(operation, width), race, any_size=any_size)


for _name, _candidates in CANDIDATES.items():
    _names = ("x", "weight", "bias", "residual") if _name == "linear_residual" else ()
    _register(_name, _candidates, _ROWS, *_names)
    # With few rows, a second copy of all weights saves too little.
    _plain = {name: gemm for name, gemm in _candidates.items() if "packed" not in name}
    _register(f"{_name} of few rows", _plain, _FEW_ROWS, *_names)
_register("trained linear", _TRAINED, _TRAINED_ROWS)
_register("input gradient", _INPUT, _TRAINED_ROWS, "residual", "weight")
_register("weight gradient", _WEIGHT, _SUMMED, "residual", "x")
_layouts = {name: gemm for name, gemm in _LINEAR.items() if name != "onednn"}


def _from_panels(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by a weight of a race, which keeps its panels: a search in the cache would be timed too."""
    kept = vars(weight)
    if "panels" not in kept:
        kept["panels"] = frozen(weight, "panels", HugePages())
    return compiled(x, kept["panels"], bias)


if _HERE:
    _layouts["llvm-packed"] = _from_panels
_register("layout", _layouts, _ROWS, outputs=_WIDE)
_register("layout for few rows", _layouts, _TEXT_ROWS, outputs=_WIDE)


def seconds(dtype: torch.dtype) -> float:
    """Return the time of the fastest GEMMs of many rows together; NaN where they are not timed."""
    if torch.are_deterministic_algorithms_enabled():
        return float("nan")
    total = 0.0
    for operation in CANDIDATES:
        selection = compare(operation, dtype)
        total += selection.seconds.get(selection.chosen, float("nan"))
    return total


def laid_out(weight: Tensor) -> Tensor:
    """Return a weight `[M, K]` in oneDNN's blocked layout; `to_dense()` returns the same bits."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS)
