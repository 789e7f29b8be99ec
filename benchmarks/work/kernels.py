"""`xfm-fast bench kernels`: every public op at the model's shapes, against alternatives that compute the same.

Each case is compared with its reference in fp64 first, then timed in interleaved rounds, on a GPU by graph replay.
"""

# Backends take the inputs of their case as one tuple, of a length that no checker knows.
# pyright: reportCallIssue=false

from __future__ import annotations

import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels import flash, ops, reference, roofline
from xfm_fast.kernels.backend import emulating
from xfm_fast.kernels.cpu import int8
from xfm_fast.kernels.flags import mark
from xfm_fast.kernels.roofline import HEAD_DIM, HEADS, HIDDEN, VOCABULARY, WIDTH

from ..measure import Backend, Case, Run, benchmark
from ..record import OURS, Direction, Extra
from ..timing import Clocked, one_line, parity_band, relative_error, why_not_compiled

if TYPE_CHECKING:
    from xfm_fast.kernels.emulation import Launch

Call = Callable[..., Tensor]
EAGER = "eager"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ROUNDS = 7
_SDPA = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# The CPU template of FlexAttention compiles neither dynamic sizes nor parts of a graph.
_ON_CPU: dict[str, Any] = {"dynamic": False, "fullgraph": True}


@dataclass
class OpCase:
    """One op at one shape.

    Attributes:
        work: the directions that are timed, with FLOPs and traffic where they are known.
        baselines: alternatives, or the reason why one is missing here.
        bounds: compute a part of the work, or similar work, and have no parity.
        rounded: the reference in 8 bits, for cases with larger errors than those of floats.
    """

    name: str
    inputs: tuple[Tensor, ...]
    ours: Call
    reference: Call
    work: dict[Direction, roofline.Work | None]
    baselines: dict[str, Call | str] = field(default_factory=dict)
    bounds: dict[str, Call] = field(default_factory=dict)
    rounded: Call | None = None

    def backends(self, dtype: str, direction: Direction, band: float) -> list[Backend]:
        """Return the op and its alternatives, compared in the forward pass."""
        backends = []
        for name, call in {OURS: self.ours, **self.baselines, **self.bounds}.items():
            if isinstance(call, str):
                backends.append(Backend(name, dtype, dict, lacking=("absent", call)))
                continue
            check = step(call, self.inputs, "forward")
            build = partial(self._prepare, call, direction)
            backends.append(
                Backend(name, dtype, build, check=check, band=band, bound=name in self.bounds)
            )
        return backends

    def _prepare(self, call: Call, direction: Direction) -> Callable[[], Callable[[], object]]:
        if direction != "forward":
            # Some attentions have no gradient of a bias.
            step(call, self.inputs, "forward and backward")()
        return partial(step, call, self.inputs, direction)

    def band(self, exact: Tensor) -> float:
        """Return the relative error that rounding explains."""
        dtype = self.inputs[0].dtype
        reference_error = relative_error(self.reference(*self.inputs), exact)
        band = parity_band(dtype, reference_error, fp32=16 * torch.finfo(dtype).eps)
        if self.rounded is not None:
            # Libraries choose their own levels, and none is exact.
            band += 2 * relative_error(self.rounded(*(t.double() for t in self.inputs)), exact)
        return band


def step(run: Call, inputs: tuple[Tensor, ...], direction: Direction) -> Callable[[], object]:
    """Return the call that is timed: a pass in one direction, or both."""
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return run(*inputs)

        return forward
    leaves = tuple(t.detach().clone().requires_grad_() for t in inputs)

    def output() -> Tensor:
        with torch.enable_grad():
            out = run(*leaves)
        if not out.requires_grad:
            raise UnavailableError("it has no gradient")
        return out

    def both() -> tuple[Tensor, ...]:
        out = output()
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    if direction == "forward and backward":
        return both
    out = output()
    upstream = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True, allow_unused=True)


def directions(op: OpCase, dtype: str, run: Run, deadline: float = math.inf) -> Iterator[Case]:
    """Yield the case of each direction: all backends are compared in the first, and timed in interleaved rounds.

    After the `deadline` no round begins but the first.
    """
    # torch.compile keeps few versions of a function and then runs it eagerly: forget those of other cases.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    first, *further = op.work
    case = Case(
        op.name.split()[0],
        op.name,
        [],
        mode=first,
        judge="the definition in fp64",
        rounds=_ROUNDS,
        max_rounds=_ROUNDS,
        deadline=deadline,
        watched=True,
        block=lambda prepare: Clocked(prepare, run.device),
        count=partial(_work, op.work[first]),
    )
    try:
        exact = op.reference(*(t.double() for t in op.inputs))
        band = op.band(exact)
    except Exception as error:  # there is nothing to compare with
        run.add([case.result(Backend(OURS, dtype, dict, lacking=("failed", one_line(error))))])
        return
    case.reference, case.backends = lambda _: exact, op.backends(dtype, first, band)
    yield case
    for direction in further:
        repeat = replace(case, backends=op.backends(dtype, direction, band))
        count = partial(_work, op.work[direction])
        yield repeat.repeated(run.document.rows, mode=direction, count=count)


def _work(work: roofline.Work | None, backend: Backend, result: object) -> Extra:
    return {} if work is None else {"needed_flops": round(work.flops), "bytes": round(work.bytes)}


Cases = Mapping[str, Callable[[torch.device, torch.dtype, bool], OpCase]]


class Executed(NamedTuple):
    """A case on the emulated backend `triton`, forward and backward."""

    name: str
    dtype: str
    checks: int  # results and gradients compared with fp64
    wrong: tuple[str, ...]  # errors beyond what rounding explains
    launches: tuple[Launch, ...]


def execute(target: str, dtypes: Sequence[str] = ("bf16", "fp16", "fp32")) -> Iterator[Executed]:
    """Run the Triton kernels of every op at small shapes, compiled for an NVIDIA GPU and emulated."""
    from xfm_fast.kernels.emulation import EmulationError

    for name in _EXECUTED:
        for dtype in dtypes:
            torch_dtype = DTYPES[dtype]
            with emulating(target, strict=False) as launches:
                try:
                    with ops.use_backend("triton"):
                        op = CASES[name](torch.device("cpu"), torch_dtype, True)
                        results = _results(op.ours, op.inputs)
                except EmulationError as error:
                    yield Executed(name, dtype, 0, (str(error),), tuple(launches))
                    continue
                references = _results(op.reference, op.inputs)
                truths = _results(op.reference, tuple(t.double() for t in op.inputs))
            wrong, checks = [], 0
            for index, truth in enumerate(truths):
                if truth is None:
                    continue
                checks += 1
                error = relative_error(results[index], truth)
                band = parity_band(torch_dtype, relative_error(references[index], truth))
                if error > band:
                    tensor = f"gradient {index}" if index else "result"
                    wrong.append(f"{tensor}: error {error:.1e} > {band:.1e}")
            yield Executed(name, dtype, checks, tuple(wrong), tuple(launches))


def _results(call: Call, inputs: tuple[Tensor, ...]) -> list[Any]:
    """Return the output of a call, then the gradients of its inputs."""
    output: Any = step(call, inputs, "forward")()
    gradients: Any = step(call, inputs, "forward and backward")()
    return [output, *gradients]


_EXECUTED = (
    "relpos_attention at 224 px",
    "varlen_attention of captions",
    "varlen_attention to an image",
    "bias_attention",
    "add_layer_norm",
    "layer_norm",
    "embed_layer_norm",
    "linear_gelu",
    "linear_cross_entropy",
    "token_log_likelihood",
)


@benchmark(
    "kernels",
    title="Operations, against their alternatives",
    reference=EAGER,
    about="every operation against its alternatives: xfm-fast bench kernels",
)
def run(run: Run, cases: Cases | None = None, deadline: float = math.inf) -> Iterator[Case]:
    """Yield every case on the GPU, or on the CPU without one; raises `InputError` for an unknown dtype."""
    device, options = run.device, run.options
    dtype = options.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    cases = cases or {name: CASES[name] for name in case_names(device, DTYPES[dtype])}
    run.progress.begin(len(cases))
    for name, make in cases.items():
        run.progress.stage(name)
        if time.perf_counter() > deadline:
            late: Any = "absent", "no time was left for it in this stage"
            case = Case(name.split()[0], name, [])
            run.add([case.result(Backend(OURS, dtype, dict, lacking=late))])
        else:
            yield from directions(make(device, DTYPES[dtype], options.quick), dtype, run, deadline)


def _both(
    work: Callable[..., roofline.Work], inputs: tuple[Tensor, ...]
) -> dict[Direction, roofline.Work | None]:
    """Return the work of forward and backward pass, timed separately."""
    element = inputs[0].element_size()
    return {"forward": work(element=element), "backward": work(backward=True, element=element)}


def _tensors(
    device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def available(package: str) -> bool:
    """Return whether an optional package, or a module of one, can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def _compiled(device: torch.device, small: bool, runs: dict[str, Call]) -> dict[str, Call | str]:
    """Return alternatives that torch.compile makes, or the reason why it cannot.

    A CPU takes up to a minute for each, so small cases are without them.
    """
    why = why_not_compiled(device)
    if why is not None:
        return dict.fromkeys(runs, why)
    return {} if small and device.type == "cpu" else dict(runs)


def _relpos(side: int, device: torch.device, dtype: torch.dtype, small: bool) -> OpCase:
    side, batch = (side // 4, 2) if small else (side, 8)
    tokens, window = side**2 + 1, (side, side)
    q, k, v = _tensors(device, dtype, *[(batch, tokens, HEADS, HEAD_DIM)] * 3)
    (table,) = _tensors(device, dtype, ((2 * side - 1) ** 2 + 3, HEADS))
    index = reference.relative_position_index(window, device)
    bias = reference.position_bias(table, window)[None].contiguous()

    def bias_of(table: Tensor) -> Tensor:
        """Return the bias as this model is usually written: computed once for inference, every time in training."""
        if not torch.is_grad_enabled():
            return bias
        return table[index.view(-1)].view(1, tokens, tokens, HEADS).permute(0, 3, 1, 2)

    def eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = (q * HEAD_DIM**-0.5) @ k.transpose(-1, -2) + bias_of(table)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    def sdpa(backend: SDPBackend | None, *, biased: bool = True) -> Call:
        def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
            mask = bias_of(table).contiguous() if biased else None
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        return run

    def gathered(table: Tensor) -> Call:
        return lambda head, query, key: table[index[query, key], head]

    def read(table: Tensor) -> Call:
        values = bias_of(table)[0].contiguous()
        return lambda head, query, key: values[head, query, key]

    baselines: dict[str, Call | str] = {EAGER: eager}
    options = _ON_CPU if device.type == "cpu" else {}
    flex = {
        "FlexAttention, table gathered": _flex(gathered, **options),
        "FlexAttention, bias read": _flex(read, **options),
    }
    if device.type == "cpu":
        baselines["SDPA + bias"] = sdpa(None)
        baselines |= _compiled(device, small, flex)
        bounds = {"SDPA without bias": sdpa(None, biased=False)}
    else:
        baselines |= {f"SDPA {name} + bias": sdpa(backend) for name, backend in _SDPA.items()}
        baselines |= _compiled(device, small, flex)
        baselines["flash-attn 4, bias by score_mod"] = "flash-attn-4 is not installed"
        if available("flash_attn.cute"):
            score_mod = _flex(read, kernel_options={"BACKEND": "FLASH"})
            baselines["flash-attn 4, bias by score_mod"] = score_mod
        bounds = {"flash without bias": sdpa(SDPBackend.FLASH_ATTENTION, biased=False)}
    # Inference computes the bias once, before the graphs that read it are captured.
    ready = ops.relpos_bias(table, window, dtype=dtype, scale=HEAD_DIM**-0.5, head_dim=HEAD_DIM)
    inputs = q, k, v, table
    return OpCase(
        f"relpos_attention {batch} × {tokens}",
        inputs,
        lambda *a: ops.relpos_attention(
            *a, window, bias=None if torch.is_grad_enabled() else ready
        ),
        lambda *a: reference.relpos_attention(*a, window, HEAD_DIM**-0.5),
        _both(partial(roofline.relpos_attention, batch, tokens), inputs),
        baselines,
        bounds,
    )


def _flex(
    bias_from: Callable[[Tensor], Call],
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> Call:
    """Return FlexAttention with a bias of head, query and key that is made from the table."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=dynamic, fullgraph=fullgraph)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        _refuse_gradient(q, k, v, table)
        bias = bias_from(table)

        def biased(
            score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor
        ) -> Tensor:
            return score + bias(head, query, key)

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out: Any = compiled(q, k, v, score_mod=biased, **options)
        return out.transpose(1, 2)

    return run


def _refuse_gradient(*inputs: Tensor) -> None:
    """Raise an error that names the cause, which the compiler's own does not."""
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if inputs[0].device.type == "cpu" and needs_gradient:
        raise UnavailableError("FlexAttention has no gradient on a CPU")


def _varlen(captions: bool, device: torch.device, dtype: torch.dtype, small: bool) -> OpCase:
    """Return self-attention of packed captions, or cross-attention of all captions of an image to its tokens."""
    if captions:
        sequences, queries, keys = 8 if small else 256, 13, 13
        size, name = f"{sequences} × {queries}", f"{sequences} texts × {queries}"
    else:
        sequences, queries, keys = 1, 64 if small else 3328, 577
        size, name = f"{queries} × {keys}", f"{queries} queries × {keys} keys"
    sequence = torch.arange(sequences + 1, dtype=torch.int32, device=device)
    of_queries, of_keys = sequence * queries, sequence * keys
    rows, columns, longest = sequences * queries, sequences * keys, [queries, keys]
    inputs = _tensors(device, dtype, *((n, HEADS, HEAD_DIM) for n in (rows, columns, columns)))

    def plain(*qkv: Tensor) -> Tensor:
        return reference.varlen_attention(*qkv, of_queries, of_keys, HEAD_DIM**-0.5)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(0, (sequences, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)

    def torch_varlen(*qkv: Tensor) -> Tensor:
        # Older PyTorch lacks it: the row then shows the ImportError.
        from torch.nn.attention.varlen import varlen_attn

        out: Any = varlen_attn(*qkv, of_queries, of_keys, *longest)
        return out

    def ours(*qkv: Tensor, **options: Any) -> Tensor:
        return ops.varlen_attention(*qkv, of_queries, of_keys, *longest, **options)

    baselines: dict[str, Call | str] = {"eager, a sequence at a time": plain, "SDPA": padded}
    if device.type == "cuda":
        baselines["torch varlen_attn"] = torch_varlen
        baselines |= _flash_attention(ours, device)
    else:
        documents = {"FlexAttention, document mask": _documents(of_queries, of_keys)}
        baselines |= _compiled(device, small, documents)
    work = partial(roofline.varlen_attention, rows * keys, rows, columns, size)
    return OpCase(f"varlen_attention {name}", inputs, ours, plain, _both(work, inputs), baselines)


def _flash_attention(run: Call, device: torch.device) -> dict[str, Call | str]:
    """Return attention by the fastest flash-attn here, under its version, or the reason why there is none."""
    try:
        version, _ = flash.fastest(torch.cuda.get_device_capability(device)[0])
    except InputError as error:
        return {"flash-attn": str(error)}
    return {f"flash-attn {version}": partial(run, backend="flash_attn")}


def _documents(of_queries: Tensor, of_keys: Tensor) -> Call:
    """Return FlexAttention of packed sequences with a document mask, whose blocks are computed once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, **_ON_CPU)
    queries, keys = (
        torch.arange(len(o) - 1).repeat_interleave(o.diff()) for o in (of_queries, of_keys)
    )

    @cache
    def mask() -> Any:
        def same(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return queries[query] == keys[key]

        return create_block_mask(same, None, None, len(queries), len(keys), device="cpu")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _refuse_gradient(q, k, v)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out: Any = compiled(q, k, v, block_mask=mask())
        return out[0].transpose(0, 1)

    return run


def _add_layer_norm(device: torch.device, dtype: torch.dtype, small: bool) -> OpCase:
    rows = 64 if small else 8 * 577
    inputs = _tensors(device, dtype, (rows, WIDTH), (rows, WIDTH), (WIDTH,), (WIDTH,))

    def eager(*a: Tensor) -> Tensor:
        return reference.add_layer_norm(*a, 1e-5)[0]

    @torch.no_grad()
    def copy(x: Tensor, residual: Tensor, *_: Tensor) -> Tensor:
        residual.clone()
        return x.clone()

    work = _both(partial(roofline.add_layer_norm, rows), inputs)
    ours = partial(_first, ops.add_layer_norm)
    name = f"add_layer_norm {rows} × {WIDTH}"
    return OpCase(name, inputs, ours, eager, work, {EAGER: eager}, {"copy of the same bytes": copy})


def _first(op: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> Tensor:
    """Return the first result of an op with a norm."""
    return op(*inputs, 1e-5)[0]


def _linear_gelu(device: torch.device, dtype: torch.dtype, small: bool) -> OpCase:
    rows = 64 if small else 8 * 577
    x, weight, bias = _tensors(device, dtype, (rows, WIDTH), (HIDDEN, WIDTH), (HIDDEN,))
    inputs = x, weight / WIDTH**0.5, bias
    return OpCase(
        f"linear_gelu {rows} × {WIDTH} → {HIDDEN}",
        inputs,
        ops.linear_gelu,
        reference.linear_gelu,
        _both(partial(roofline.linear_gelu, rows), inputs),
        {EAGER: reference.linear_gelu},
        {"the product alone": F.linear},
    )


def _vocabulary(device: torch.device, dtype: torch.dtype, small: bool) -> OpCase:
    rows, entries = (32, 512) if small else (1440, VOCABULARY)
    h, w, b = _tensors(device, dtype, (rows, WIDTH), (entries, WIDTH), (entries,))
    target = torch.randint(entries, (rows,), generator=torch.Generator().manual_seed(1)).to(device)

    def liger(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        # Imported where it runs: a failing import is a row.
        from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearCrossEntropyFunction as Liger,
        )

        return Liger.apply(h, w, target, b)[0]

    baselines: dict[str, Call | str] = {
        EAGER: lambda *a: F.cross_entropy(F.linear(*a).float(), target)
    }
    if available("liger_kernel"):
        baselines["Liger"] = liger
    elif h.is_cuda:
        baselines["Liger"] = "liger-kernel is not installed"
    work = roofline.linear_cross_entropy(rows, entries, element=h.element_size())
    return OpCase(
        f"linear_cross_entropy {rows} × {WIDTH} → {entries}",
        (h, w / WIDTH**0.5, b),
        lambda *a: ops.linear_cross_entropy(*a, target),
        lambda *a: reference.linear_cross_entropy(*a, target),
        {"forward and backward": work},
        baselines,
        {"the product alone": F.linear},
    )


def _int8_linear(device: torch.device, dtype: torch.dtype, small: bool) -> OpCase:
    """Return a linear layer on a CPU with a weight rounded to int8 once, and inputs rounded at every call."""
    rows = 64 if small else 8 * 577
    x, weight, bias = _tensors(device, dtype, (rows, WIDTH), (HIDDEN, WIDTH), (HIDDEN,))
    weight /= WIDTH**0.5
    marked = torch.nn.Parameter(weight.clone(), requires_grad=False)
    mark([marked], "int8")
    eager, compiled = "torchao", "torchao, torch.compile"
    baselines: dict[str, Call | str] = {}
    if available("torchao"):
        baselines[eager] = _torchao(weight, bias)
        baselines |= _compiled(device, small, {compiled: _torchao(weight, bias, **_ON_CPU)})
    else:
        missing = "torchao is not installed; pip install torchao"
        baselines |= {eager: missing, compiled: missing}
    element, size = x.element_size(), f"{rows} × {WIDTH} → {HIDDEN}"
    traffic = rows * (WIDTH + HIDDEN) * element + WIDTH * HIDDEN
    return OpCase(
        f"linear in int8 {size}",
        (x,),
        lambda x: int8.linear(x, marked, bias),
        lambda x: reference.linear(x, weight.to(x.dtype), bias.to(x.dtype)),
        {"forward": roofline.Work("linear", size, 2 * rows * WIDTH * HIDDEN, traffic)},
        baselines,
        {"the product in floats": lambda x: F.linear(x, weight, bias)},
        rounded=lambda x: reference.linear(
            reference.as_int8(x), reference.as_int8(weight.float()).to(x.dtype), bias.to(x.dtype)
        ),
    )


def _torchao(weight: Tensor, bias: Tensor, **compiled: Any) -> Call:
    """Return the dynamic int8 of torchao: weights per channel, activations per token."""

    @cache
    def layer() -> Callable[[Tensor], Tensor]:
        # Imported where it runs: a failing import is a row.
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )

        inner = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        inner.load_state_dict({"weight": weight, "bias": bias})
        module = torch.nn.Sequential(inner).eval().requires_grad_(False)
        quantize_(module, Int8DynamicActivationInt8WeightConfig())
        return torch.compile(module, **compiled) if compiled else module

    return lambda x: layer()(x)


# Ops that are timed against the backend `reference` alone: a call, and its inputs by the names in `_simple`.
_SIMPLE: dict[str, tuple[Call, str]] = {
    "bias_attention": (ops.bias_attention, "heads heads heads scores"),
    "embed_layer_norm": (
        lambda *a: ops.embed_layer_norm(_ids(a[0]), _ids(a[0]), *a, 1e-5),
        "x x row norm",
    ),
    "joined_linear": (
        lambda x, *layers: ops.joined_linear(x, layers[::2], layers[1::2]),
        "x up square",
    ),
    "layer_norm": (lambda *a: ops.layer_norm(*a, 1e-5), "x norm"),
    "layer_norm_linear": (
        lambda x, w, b, *layer: ops.layer_norm_linear(x, w, b, 1e-5, *layer),
        "x norm up",
    ),
    "layer_norm_mlp": (
        lambda x, w, b, *layers: ops.layer_norm_mlp(x, w, b, 1e-5, *layers),
        "x norm up down",
    ),
    "linear": (ops.linear, "x up"),
    "linear_add_layer_norm": (partial(_first, ops.linear_add_layer_norm), "wide down x norm"),
    "linear_residual": (ops.linear_residual, "wide down x"),
    "mlp_residual": (ops.mlp_residual, "x up down x"),
    "token_log_likelihood": (lambda h, w, b: ops.token_log_likelihood(h, w, b, _ids(h)), "x up"),
}


def _ids(table: Tensor) -> Tensor:
    return torch.arange(len(table), device=table.device)


def _simple(op: str, device: torch.device, dtype: torch.dtype, small: bool) -> OpCase:
    rows = 32 if small else 2 * 197
    shapes = {
        "x": [(rows, WIDTH)],
        "wide": [(rows, HIDDEN)],
        "row": [(WIDTH,)],
        "norm": [(WIDTH,), (WIDTH,)],
        "up": [(HIDDEN, WIDTH), (HIDDEN,)],
        "down": [(WIDTH, HIDDEN), (WIDTH,)],
        "square": [(WIDTH, WIDTH), (WIDTH,)],
        "heads": [(1, rows, HEADS, HEAD_DIM)],
        "scores": [(1, HEADS, rows, rows)],
    }
    call, names = _SIMPLE[op]
    inputs = _tensors(device, dtype, *(shape for name in names.split() for shape in shapes[name]))
    for tensor in inputs:
        if tensor.ndim == 2 and len(tensor) != rows:
            tensor /= tensor.shape[1] ** 0.5  # a weight, so that outputs are near one

    def plain(*a: Tensor) -> Tensor:
        with ops.use_backend("reference"):
            return call(*a)

    name = f"{op} {' × '.join(map(str, inputs[0].shape))}"
    return OpCase(name, inputs, call, plain, {"forward": None, "backward": None}, {EAGER: plain})


_INT8 = "linear in int8"
CASES: dict[str, Callable[[torch.device, torch.dtype, bool], OpCase]] = {
    "relpos_attention at 224 px": partial(_relpos, 14),
    "relpos_attention at 384 px": partial(_relpos, 24),
    "relpos_attention at 480 px": partial(_relpos, 30),
    "varlen_attention of captions": partial(_varlen, True),
    "varlen_attention to an image": partial(_varlen, False),
    "add_layer_norm": _add_layer_norm,
    "linear_gelu": _linear_gelu,
    "linear_cross_entropy": _vocabulary,
    _INT8: _int8_linear,
    **{op: partial(_simple, op) for op in _SIMPLE},
}
"""Makes a case for a device and a dtype; small ones take milliseconds."""


def case_names(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the cases that a device has: int8 needs a CPU with instructions for it."""
    names = list(CASES)
    from_floats = dtype in (torch.float32, torch.bfloat16)
    if device.type != "cpu" or not from_floats or int8.why_not() is not None:
        names.remove(_INT8)
    return names
