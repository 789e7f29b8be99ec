"""`xfm-fast bench kernels`: every operation at the model's shapes against its alternatives. Correctness, then time."""

# Contenders take the inputs of their case as one tuple, whose length no checker can know.
# pyright: reportCallIssue=false

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xfm_fast.errors import InputError
from xfm_fast.kernels import ops, reference, roofline

from .. import machine
from ..measure import DTYPES, Block, Progress, filled, interleave, parity_band, relative_error, timed
from ..options import KernelOptions
from ..record import EAGER, OURS, Direction, Document, Efficiency, Parity, Row, finite

Run = Callable[..., Tensor]

_ROUNDS = 7
_TYPES = DTYPES | {"fp16": torch.float16}
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
    """

    name: str
    work: roofline.Work
    backward_work: roofline.Work | None
    inputs: tuple[Tensor, ...]
    ours: Run
    truth: Run
    others: dict[str, Run] = field(default_factory=dict)
    bounds: dict[str, Run] = field(default_factory=dict)
    """Work that the operation contains or resembles: a bound of its time, with another result."""


def run(options: KernelOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure every case on the GPU, or on the CPU without one. Ctrl-C keeps the cases that are complete.

    Raises:
        InputError: an unknown type.
    """
    progress, device = progress or Progress(), machine.choose_device(None)
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if dtype not in _TYPES:
        raise InputError(f"--dtype {dtype!r} is unknown; choose one of {', '.join(_TYPES)}")
    document = Document.begun("kernels", vars(options), command, device.type)
    made = cases(device, _TYPES[dtype], small=options.small)
    progress.begin(len(made))
    try:
        for case in made:
            progress.stage(case.name)
            document.rows += measure(case, device, machine.data_sheet(device), dtype, progress)
    except KeyboardInterrupt:
        document.interrupted = True
    return document


def measure(
    case: Case, device: torch.device, gpu: roofline.GPU | None, dtype: str = "fp32", progress: Progress | None = None
) -> list[Row]:
    """Rows of both directions of one case, all contenders interleaved."""
    contenders: dict[str, Run] = {OURS: case.ours, **case.others, **case.bounds}
    truth = case.truth(*(t.double() for t in case.inputs))
    kind = case.inputs[0].dtype
    band = parity_band(kind, relative_error(case.truth(*case.inputs), truth), fp32=4 * torch.finfo(kind).eps)
    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    parity: dict[str, Parity | None] = dict.fromkeys(contenders)
    updates: dict[str, dict[str, Any]] = {}
    for name, run in contenders.items():
        try:
            out = run(*case.inputs)
            if name not in case.bounds:
                error = relative_error(out, truth)
                parity[name] = Parity(
                    error=finite(error), band=band, passed=error <= band, against="the definition in fp64"
                )
                if not error <= band:
                    reason = f"wrong: error {error:.1e} exceeds {band:.1e}"
                    updates[name] = {"status": "parity failed", "reason": reason}
                    continue
            forward[name] = lambda run=run: run(*case.inputs)
            differentiated = _backward(run, case.inputs)
            if differentiated is not None:
                backward[name] = differentiated
        except (RuntimeError, ValueError, TypeError, ImportError) as failure:
            updates[name] = {"status": "failed", "reason": str(failure).strip().splitlines()[0]}
    # The loss of a vocabulary is counted with its gradients: one row for both.
    directions: list[tuple[Direction, dict[str, Callable[[], object]], roofline.Work | None]]
    directions = [("forward", forward, case.work), ("backward", backward, case.backward_work)]
    if case.backward_work is None:
        directions = [("forward and backward", {n: _both(contenders[n], case.inputs) for n in backward}, case.work)]
    rows = []
    for direction, runs, work in directions:
        assert work is not None
        samples = interleave(
            {f"{name} {dtype}": _block(run, device) for name, run in runs.items()}, rounds=_ROUNDS, budget_s=0,
            warmups=1, on_step=(progress or Progress()).step, grad=direction != "forward",
        )  # fmt: skip
        for name in contenders:
            row = Row(
                work=case.name.split()[0], name=case.name, direction=direction, contender=name, label=name, dtype=dtype,
                status="measured", unit="calls", items=1, parity=parity[name], bounds=name in case.bounds,
            )  # fmt: skip
            if name not in runs:
                found = updates.get(name, {"status": "absent", "reason": "not measured"})
                rows.append(row.model_copy(update=found))
                continue
            row = filled(row, f"{name} {dtype}", samples)
            if row.median_s:
                row.efficiency = Efficiency(
                    needed_flops=round(work.flops), bytes=round(work.bytes), intensity=work.flops / work.bytes,
                    share_of_floor=None if gpu is None else work.floor(gpu) / row.median_s,
                )  # fmt: skip
            rows.append(row)
    return rows


def _block(run: Callable[[], object], device: torch.device) -> Block:
    """Triton's `do_bench` flushes the second-level cache between its own repetitions and reports milliseconds."""

    def on_gpu() -> list[float]:
        from triton.testing import do_bench

        milliseconds: Any = do_bench(run, warmup=5, rep=20)
        return [float(milliseconds) / 1e3]

    return on_gpu if device.type == "cuda" else lambda: [timed(run, device)[1]]


def _leaves(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in inputs)


def _backward(run: Run, inputs: tuple[Tensor, ...]) -> Callable[[], object] | None:
    """None for what has no gradient, such as a copy."""
    leaves = _leaves(inputs)
    with torch.enable_grad():
        out = run(*leaves)
    if not out.requires_grad:
        return None
    upstream = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True, allow_unused=True)


def _both(run: Run, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = _leaves(inputs)

    def step() -> object:
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    return step


def cases(device: torch.device, dtype: torch.dtype, *, small: bool = False) -> list[Case]:
    """Every case; `small` shrinks them for a machine without a GPU, and for tests."""
    made = [_relpos(window, 2 if small else 8, device, dtype) for window in ((4,) if small else (14, 24, 30))]
    texts, length, heads = 8 if small else 256, 13, (roofline.HEADS, roofline.HEAD_DIM)
    tokens, packed = texts * length, torch.arange(texts + 1, dtype=torch.int32, device=device) * length
    queries, keys = 64 if small else 3328, 577
    ends = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (queries, keys)]
    grouped = _varlen(
        f"varlen_attention {queries} queries × {keys} keys",
        partial(roofline.varlen_attention, queries * keys, queries, keys, f"{queries} × {keys}"),
        (ends[0], ends[1]), _tensors(device, dtype, *((n, *heads) for n in (queries, keys, keys))),
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
            (packed, packed), _tensors(device, dtype, *[(tokens, *heads)] * 3),
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


def _relpos(window: int, batch: int, device: torch.device, dtype: torch.dtype) -> Case:
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
    if device.type == "cuda":
        others |= {f"SDPA {name} + bias": fused(backend, True) for name, backend in _SDPA.items()}
        others["FlexAttention + bias"] = _flex(index.view(tokens, tokens))
        bounds["flash without bias"] = fused(SDPBackend.FLASH_ATTENTION, False)
    else:
        others["SDPA + bias"] = fused(None, True)
        bounds["SDPA without bias"] = fused(None, False)
    return _case(
        f"relpos_attention {batch} × {tokens}", partial(roofline.relpos_attention, batch, tokens), (q, k, v, table),
        lambda *a: ops.relpos_attention(*a, shape), lambda *a: reference.relpos_attention(*a, shape, width**-0.5),
        others, bounds,
    )  # fmt: skip


def _flex(index: Tensor) -> Run:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score + table[index[query, key], head]

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out: Any = compiled(q, k, v, score_mod=biased)
        return out.transpose(1, 2)

    return run


def _varlen(
    name: str, work: Callable[..., roofline.Work], offsets: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]
) -> Case:
    q = inputs[0]
    longest = tuple(int(o.diff().max()) for o in offsets)
    scale = q.shape[-1] ** -0.5
    others: dict[str, Run] = {"eager, a sequence at a time": lambda *a: reference.varlen_attention(*a, *offsets, scale)}
    if bool((offsets[0].diff() == longest[0]).all()) and bool((offsets[1].diff() == longest[1]).all()):
        others["SDPA"] = lambda q, k, v: _padded_sdpa(q, k, v, offsets[0].numel() - 1)
    if q.is_cuda:
        others["torch varlen_attn"] = lambda *a: _torch_varlen(*a, *offsets, *longest)
    if q.is_cuda and available("flash_attn"):
        others["flash-attn"] = lambda *a: ops.varlen_attention(*a, *offsets, *longest, backend="flash_attn")
    return _case(
        name, work, inputs, lambda *a: ops.varlen_attention(*a, *offsets, *longest),
        lambda *a: reference.varlen_attention(*a, *offsets, scale), others,
    )  # fmt: skip


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, *lengths: Any) -> Tensor:
    # Not in every PyTorch: the row then says so.
    from torch.nn.attention.varlen import varlen_attn

    out: Any = varlen_attn(q, k, v, *lengths)
    return out


def _padded_sdpa(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Tensor:
    q, k, v = (t.unflatten(0, (sequences, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def available(package: str) -> bool:
    """True where an optional package can be imported."""
    return importlib.util.find_spec(package) is not None


def _vocabulary(rows: int, entries: int, device: torch.device, dtype: torch.dtype) -> Case:
    width = roofline.WIDTH
    h, w, b = _tensors(device, dtype, (rows, width), (entries, width), (entries,))
    target = torch.randint(entries, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    others: dict[str, Run] = {EAGER: lambda *a: F.cross_entropy(F.linear(*a).float(), target)}
    if available("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyFunction as Liger,
        )

        others["Liger"] = lambda h, w, b: Liger.apply(h, w, target, b)[0]
    return Case(
        f"linear_cross_entropy {rows} × {width} → {entries}",
        roofline.linear_cross_entropy(rows, entries, element=h.element_size()),
        None,
        (h, w / width**0.5, b),
        lambda *a: ops.linear_cross_entropy(*a, target),
        lambda *a: reference.linear_cross_entropy(*a, target),
        others,
        {"the product alone": F.linear},
    )
