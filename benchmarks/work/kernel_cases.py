"""The operations at the model's shapes, and the alternatives of each: inputs, definitions and bounds.

Nothing here needs the schema of results, so that a machine with PyTorch and Triton alone can run every case.
"""

# Contenders take the inputs of their case as one tuple, whose length no checker can know.
# pyright: reportCallIssue=false

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xfm_fast.errors import UnavailableError
from xfm_fast.kernels import ops, reference, roofline
from xfm_fast.kernels.cpu import int8
from xfm_fast.kernels.marked import mark

from ..timing import one_line, parity_band, relative_error, why_not_compiled

Run = Callable[..., Tensor]
Direction = Literal["forward", "backward", "forward and backward"]
Lack = Literal["failed", "parity failed", "absent"]
OURS, EAGER = "xfm-fast", "eager"
_SDPA = {"math": SDPBackend.MATH, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        work: FLOPs and bytes of the forward pass, and of the backward pass where it is counted apart.
        inputs: the tensors that it is differentiated by.
        ours: the operation.
        truth: its definition, for fp64 inputs.
        others: alternatives by name, which compute the same.
        bounds: work that the operation contains or resembles: a bound of its time, with another result.
        absent: alternatives that this machine lacks, with what is missing.
        rounded: the definition in 8 bits, where contenders compute so and differ by more than floats round.
        inference: only the forward pass is to be had.
    """

    name: str
    work: roofline.Work
    backward_work: roofline.Work | None
    inputs: tuple[Tensor, ...]
    ours: Run
    truth: Run
    others: dict[str, Run] = field(default_factory=dict)
    bounds: dict[str, Run] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    rounded: Run | None = None
    inference: bool = False

    @property
    def contenders(self) -> dict[str, Run]:
        """Everybody who takes part, by name."""
        return {OURS: self.ours, **self.others, **self.bounds}


@dataclass
class Entrant:
    """A contender at a case, before it is timed.

    Attributes:
        error, band: relative error against the definition in fp64, and what rounding explains; None of bounds.
        status, reason: why it is not timed; None of those that are.
        runs: by direction, what makes the call to be timed.
        lost: why a direction alone fails: some attentions have no gradient of a bias.
    """

    error: float | None = None
    band: float | None = None
    status: Lack | None = None
    reason: str | None = None
    runs: dict[Direction, Callable[[], Callable[[], object]]] = field(default_factory=dict)
    lost: dict[Direction, str] = field(default_factory=dict)

    def without_times(self, direction: Direction) -> tuple[Lack, str] | None:
        """Status and reason of a direction that is not timed; None of one that is."""
        if self.status is not None:
            return self.status, self.reason or "no reason is known"
        if direction in self.runs:
            return None
        return ("failed", self.lost[direction]) if direction in self.lost else ("absent", "not measured")


def entrants(case: Case, only: Collection[str] | None = None) -> dict[str, Entrant]:
    """Every contender of a case, compared with the definition. One that raises an error is alone in that.

    Args:
        only: names of those that are looked at; None for all.
    """
    truth = case.truth(*(t.double() for t in case.inputs))
    kind = case.inputs[0].dtype
    band = parity_band(kind, relative_error(case.truth(*case.inputs), truth), fp32=4 * torch.finfo(kind).eps)
    if case.rounded is not None:
        # Libraries place the levels in ways of their own, none of which is the truth.
        band += 2 * relative_error(case.rounded(*(t.double() for t in case.inputs)), truth)
    # Compilers keep few versions of a function, and quietly run it as it is beyond: those of other cases are done with.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    found = {name: Entrant(status="absent", reason=why) for name, why in case.absent.items()}
    for name, run in case.contenders.items():
        if only is not None and name not in only:
            continue
        entrant = found[name] = Entrant()
        try:
            with torch.no_grad():
                out = run(*case.inputs)
            if name not in case.bounds:
                entrant.error, entrant.band = relative_error(out, truth), band
                if not entrant.error <= band:
                    entrant.status = "parity failed"
                    entrant.reason = f"wrong: error {entrant.error:.1e} exceeds {band:.1e}"
                    continue
        except Exception as failure:  # of Triton, of a library that is not built for this card, of memory
            entrant.status, entrant.reason = "failed", one_line(failure)
            continue
        # The loss of a vocabulary is counted with its gradients: one row for both.
        last: Direction = "backward" if case.backward_work is not None else "forward and backward"
        if last == "backward" or case.inference:
            entrant.runs["forward"] = partial(_forward, run, case.inputs)
        if case.inference:
            continue
        try:
            if _differentiable(run, case.inputs):
                entrant.runs[last] = partial(_backward if last == "backward" else _both, run, case.inputs)
        except Exception as failure:
            entrant.lost[last] = one_line(failure)
    return found


def directions(case: Case) -> list[tuple[Direction, roofline.Work]]:
    """What is timed of a case, with its arithmetic."""
    if case.backward_work is None:
        return [("forward" if case.inference else "forward and backward", case.work)]
    return [("forward", case.work), ("backward", case.backward_work)]


def _leaves(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in inputs)


def _differentiable(run: Run, inputs: tuple[Tensor, ...]) -> bool:
    """True if a run has a gradient, as a copy has none; raises what its backward pass raises."""
    leaves = _leaves(inputs)
    with torch.enable_grad():
        out = run(*leaves)
    if out.requires_grad:
        torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
    return out.requires_grad


def _forward(run: Run, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    def step() -> object:
        with torch.no_grad():
            return run(*inputs)

    return step


def _backward(run: Run, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = _leaves(inputs)
    with torch.enable_grad():
        out = run(*leaves)
    upstream = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True, allow_unused=True)


def _both(run: Run, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = _leaves(inputs)

    def step() -> object:
        with torch.enable_grad():
            out = run(*leaves)
            return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return step


def json_number(value: float | None) -> float | None:
    """JSON has neither infinity nor NaN: null stands for them."""
    return value if value is not None and math.isfinite(value) else None


def cases(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> list[Case]:
    """Every case; `small` shrinks them for a machine without a GPU, and for tests.

    On a CPU, where a kernel takes a C++ compiler up to a minute, contenders that are compiled are left out of those.
    """
    compiles = device.type == "cuda" or not small
    in_bytes = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and int8.why_not() is None
    made = [_relpos(window, 2 if small else 8, device, dtype, compiles) for window in ((4,) if small else (14, 24, 30))]
    texts, length, heads = 8 if small else 256, 13, (roofline.HEADS, roofline.HEAD_DIM)
    tokens, packed = texts * length, torch.arange(texts + 1, dtype=torch.int32, device=device) * length
    queries, keys = 64 if small else 3328, 577
    ends = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (queries, keys)]
    grouped = _varlen(
        f"varlen_attention {queries} queries × {keys} keys",
        partial(roofline.varlen_attention, queries * keys, queries, keys, f"{queries} × {keys}"),
        (ends[0], ends[1]), _tensors(device, dtype, *((n, *heads) for n in (queries, keys, keys))), compiles,
    )  # fmt: skip
    grouped.others["SDPA"] = lambda q, k, v: _padded_sdpa(q, k, v, 1)
    rows, width, hidden = 64 if small else 8 * 577, roofline.WIDTH, roofline.HIDDEN
    x, weight, bias = _tensors(device, dtype, (rows, width), (hidden, width), (hidden,))

    def eager_norm(*given: Tensor) -> Tensor:
        return reference.add_layer_norm(*given, 1e-5)[0]

    @torch.no_grad()
    def copied(x: Tensor, residual: Tensor, *_: Tensor) -> Tensor:
        residual.clone()
        return x.clone()

    return [
        *made,
        _varlen(
            f"varlen_attention {texts} texts × {length}",
            partial(roofline.varlen_attention, tokens * length, tokens, tokens, f"{texts} × {length}"),
            (packed, packed), _tensors(device, dtype, *[(tokens, *heads)] * 3), compiles,
        ),
        grouped,
        _case(
            f"add_layer_norm {rows} × {width}", partial(roofline.add_layer_norm, rows),
            _tensors(device, dtype, (rows, width), (rows, width), (width,), (width,)),
            lambda *a: ops.add_layer_norm(*a, 1e-5)[0], eager_norm, {EAGER: eager_norm},
            {"copy of the same bytes": copied},
        ),
        _case(
            f"linear_gelu {rows} × {width} → {hidden}", partial(roofline.linear_gelu, rows),
            (x, weight / width**0.5, bias), ops.linear_gelu, reference.linear_gelu, {EAGER: reference.linear_gelu},
            {"the product alone": F.linear},
        ),
        _vocabulary(32 if small else 1440, 512 if small else roofline.VOCABULARY, device, dtype),
        *([int8_linear(rows, dtype, compiles)] if in_bytes else []),
    ]  # fmt: skip


def _case(
    name: str, work: Callable[..., roofline.Work], inputs: tuple[Tensor, ...], ours: Run, truth: Run,
    others: dict[str, Run], bounds: dict[str, Run] | None = None,
) -> Case:  # fmt: skip
    """A case whose directions are timed apart; `work` takes `backward` and the size of an element."""
    element = inputs[0].element_size()
    backward = work(backward=True, element=element)
    return Case(name, work(element=element), backward, inputs, ours, truth, others, bounds or {})


def _tensors(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def _relpos(window: int, batch: int, device: torch.device, dtype: torch.dtype, compiles: bool) -> Case:
    tokens, heads, width = window**2 + 1, roofline.HEADS, roofline.HEAD_DIM
    q, k, v = _tensors(device, dtype, *[(batch, tokens, heads, width)] * 3)
    (table,) = _tensors(device, dtype, ((2 * window - 1) ** 2 + 3, heads))
    shape = (window, window)
    index = reference.relative_position_index(shape, device).view(-1)
    kept = reference.position_bias(table, shape)[None].contiguous()

    def bias_of(table: Tensor) -> Tensor:
        """The bias as this model is usually written: the index is a buffer, and inference computes the bias once."""
        return table[index].view(1, tokens, tokens, heads).permute(0, 3, 1, 2) if torch.is_grad_enabled() else kept

    def eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = (q * width**-0.5) @ k.transpose(-1, -2) + bias_of(table)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def fused(backend: SDPBackend | None, biased: bool) -> Run:
        def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            bias = bias_of(table).contiguous() if biased else None
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            if backend is None:
                return F.scaled_dot_product_attention(*heads_first, attn_mask=bias).transpose(1, 2)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads_first, attn_mask=bias).transpose(1, 2)

        return run

    others: dict[str, Run] = {EAGER: eager}
    bounds: dict[str, Run] = {}
    absent: dict[str, str] = {}
    if device.type == "cuda":
        places = index.view(tokens, tokens)
        others |= {f"SDPA {name} + bias": fused(backend, True) for name, backend in _SDPA.items()}
        others["FlexAttention, table gathered"] = _flex(lambda table: lambda h, i, j: table[places[i, j], h])
        others["FlexAttention, bias read"] = _flex(lambda table: _lookup(bias_of(table)[0].contiguous()))
        bounds["flash without bias"] = fused(SDPBackend.FLASH_ATTENTION, False)
        if available("flash_attn.cute"):
            read = _flex(lambda table: _lookup(bias_of(table)[0].contiguous()), kernel_options={"BACKEND": "FLASH"})
            others["flash-attn 4, bias by score_mod"] = read
        else:
            absent["flash-attn 4, bias by score_mod"] = "flash-attn-4 is not installed"
    else:
        others["SDPA + bias"] = fused(None, True)
        bounds["SDPA without bias"] = fused(None, False)
        places, read = index.view(tokens, tokens), kept[0]
        flex = {
            "FlexAttention, table gathered": _flex(
                lambda table: lambda h, i, j: table[places[i, j], h], **_ON_CPU
            ),
            "FlexAttention, bias read": _flex(lambda table: _lookup(read), **_ON_CPU),
        }  # fmt: skip
        _add_compiled(flex, compiles, device, others, absent)
    # Inference makes the bias once, ahead of the graphs that read it.
    ready = ops.relpos_bias(table, shape, dtype=dtype, scale=width**-0.5, head_dim=width)

    def ours(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return ops.relpos_attention(q, k, v, table, shape, bias=None if torch.is_grad_enabled() else ready)

    made = _case(
        f"relpos_attention {batch} × {tokens}", partial(roofline.relpos_attention, batch, tokens), (q, k, v, table),
        ours, lambda *a: reference.relpos_attention(*a, shape, width**-0.5),
        others, bounds,
    )  # fmt: skip
    return replace(made, absent=absent)


Bias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The bias of a head, a query and a key."""


def _lookup(bias: Tensor) -> Bias:
    return lambda head, query, key: bias[head, query, key]


# The CPU's template cannot be compiled for sizes that are left open, and in parts it would not be compiled at all.
_ON_CPU: dict[str, Any] = {"dynamic": False, "fullgraph": True}


def _add_compiled(
    made: dict[str, Run], compiles: bool, device: torch.device, others: dict[str, Run], absent: dict[str, str]
) -> None:
    """Add alternatives that a C++ compiler makes here, or say why it cannot."""
    why = why_not_compiled(device)
    if why is not None:
        absent |= dict.fromkeys(made, why)
    elif compiles:
        others |= made


def _refuse_gradient(*inputs: Tensor) -> None:
    # The compiler finds that out too, and says so in words that name neither.
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise UnavailableError("FlexAttention has no gradient on a CPU")


def _flex(
    bias_from: Callable[[Tensor], Bias], *, dynamic: bool | None = None, fullgraph: bool = False, **options: Any
) -> Run:
    """FlexAttention with a bias made from the table."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=dynamic, fullgraph=fullgraph)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        if q.device.type == "cpu":
            _refuse_gradient(q, k, v, table)
        bias = bias_from(table)

        def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + bias(head, query, key)

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out: Any = compiled(q, k, v, score_mod=biased, **options)
        return out.transpose(1, 2)

    return run


def _varlen(
    name: str, work: Callable[..., roofline.Work], offsets: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...],
    compiles: bool,
) -> Case:  # fmt: skip
    q = inputs[0]
    longest = tuple(int(o.diff().max()) for o in offsets)
    scale = q.shape[-1] ** -0.5
    others: dict[str, Run] = {"eager, a sequence at a time": lambda *a: reference.varlen_attention(*a, *offsets, scale)}
    if bool((offsets[0].diff() == longest[0]).all()) and bool((offsets[1].diff() == longest[1]).all()):
        others["SDPA"] = lambda q, k, v: _padded_sdpa(q, k, v, offsets[0].numel() - 1)
    if q.is_cuda:
        others["torch varlen_attn"] = lambda *a: _torch_varlen(*a, *offsets, *longest)
    absent: dict[str, str] = {}
    if q.is_cuda and available("flash_attn.flash_attn_interface"):
        others["flash-attn"] = lambda *a: ops.varlen_attention(*a, *offsets, *longest, backend="flash_attn")
    elif q.is_cuda:
        absent["flash-attn"] = "flash-attn 2 is not installed"
    if not q.is_cuda:
        flex = {"FlexAttention, document mask": _documents(*offsets)}
        _add_compiled(flex, compiles, q.device, others, absent)
    made = _case(
        name, work, inputs, lambda *a: ops.varlen_attention(*a, *offsets, *longest),
        lambda *a: reference.varlen_attention(*a, *offsets, scale), others,
    )  # fmt: skip
    return replace(made, absent=absent)


def _documents(of_queries: Tensor, of_keys: Tensor) -> Run:
    """FlexAttention of packed sequences: a mask lets queries see the keys of their own; what it skips is found once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, **_ON_CPU)
    numbers = [torch.arange(len(o) - 1).repeat_interleave(o.diff()) for o in (of_queries.cpu(), of_keys.cpu())]
    queries, keys = numbers

    def together(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return queries[query] == keys[key]

    @cache
    def mask() -> Any:
        return create_block_mask(together, None, None, len(queries), len(keys), device="cpu")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _refuse_gradient(q, k, v)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out: Any = compiled(q, k, v, block_mask=mask())
        return out[0].transpose(0, 1)

    return run


def int8_linear(rows: int, dtype: torch.dtype, compiles: bool) -> Case:
    """A linear layer whose weight is rounded to bytes once and whose activations are at every call, on a CPU."""
    width, hidden, device = roofline.WIDTH, roofline.HIDDEN, torch.device("cpu")
    x, weight, bias = _tensors(device, dtype, (rows, width), (hidden, width), (hidden,))
    weight /= width**0.5
    marked = torch.nn.Parameter(weight.clone(), requires_grad=False)
    mark([marked], "int8")
    others: dict[str, Run] = {}
    absent: dict[str, str] = {}
    if available("torchao"):
        others["torchao"] = _torchao(weight, bias)
        _add_compiled({"torchao, torch.compile": _torchao(weight, bias, **_ON_CPU)}, compiles, device, others, absent)
    else:
        absent |= dict.fromkeys(("torchao", "torchao, torch.compile"), "torchao is not installed; pip install torchao")
    size, flops, element = f"{rows} × {width} → {hidden}", 2 * rows * width * hidden, x.element_size()
    return Case(
        f"linear in int8 {size}",
        roofline.Work("linear", size, flops, rows * (width + hidden) * element + width * hidden),
        None,
        (x,),
        lambda x: int8.linear(x, marked, bias),
        lambda x: reference.linear(x, weight.to(x.dtype), bias.to(x.dtype)),
        others,
        {"the product in floats": lambda x: F.linear(x, weight, bias)},
        absent,
        rounded=lambda x: reference.linear(
            reference.as_int8(x), reference.as_int8(weight.float()).to(x.dtype), bias.to(x.dtype)
        ),
        inference=True,
    )  # fmt: skip


def _torchao(weight: Tensor, bias: Tensor, **compiled: Any) -> Run:
    """The dynamic int8 of torchao: weights per channel, activations per token."""

    @cache
    def layer() -> Callable[[Tensor], Tensor]:
        # Imported where it runs: what fails to import is a row that says so.
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        made = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        made.load_state_dict({"weight": weight, "bias": bias})
        whole = torch.nn.Sequential(made).eval().requires_grad_(False)
        quantize_(whole, Int8DynamicActivationInt8WeightConfig())
        return torch.compile(whole, **compiled) if compiled else whole

    return lambda x: layer()(x)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, *lengths: Any) -> Tensor:
    # Not in every PyTorch: the row then says so.
    from torch.nn.attention.varlen import varlen_attn

    out: Any = varlen_attn(q, k, v, *lengths)
    return out


def _padded_sdpa(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
    q, k, v = (t.unflatten(0, (sequences, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def available(package: str) -> bool:
    """True where an optional package, or a module of one, can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def _vocabulary(rows: int, entries: int, device: torch.device, dtype: torch.dtype) -> Case:
    width = roofline.WIDTH
    h, w, b = _tensors(device, dtype, (rows, width), (entries, width), (entries,))
    target = torch.randint(entries, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    others: dict[str, Run] = {EAGER: lambda *a: F.cross_entropy(F.linear(*a).float(), target)}
    absent: dict[str, str] = {}
    if available("liger_kernel"):
        others["Liger"] = lambda h, w, b: _liger(h, w, b, target)
    elif h.is_cuda:
        absent["Liger"] = "liger-kernel is not installed"
    return Case(
        f"linear_cross_entropy {rows} × {width} → {entries}",
        roofline.linear_cross_entropy(rows, entries, element=h.element_size()),
        None,
        (h, w / width**0.5, b),
        lambda *a: ops.linear_cross_entropy(*a, target),
        lambda *a: reference.linear_cross_entropy(*a, target),
        others,
        {"the product alone": F.linear},
        absent,
    )


def _liger(h: Tensor, w: Tensor, b: Tensor, target: Tensor) -> Tensor:
    # Imported where it runs: what fails to import is a row that says so.
    from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyFunction as Liger,
    )

    return Liger.apply(h, w, target, b)[0]
