"""The registered operators: schema, gradients, compiler, export, autocast, checkpointing, functional calls, DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from tests.kernels.accuracy import assert_accurate
from xfm_fast.kernels import ops, reference

WINDOW = (3, 5)
OFFSETS_Q = torch.tensor([0, 4, 4, 5, 17], dtype=torch.int32)
OFFSETS_K = torch.tensor([0, 6, 9, 9, 20], dtype=torch.int32)
LONG_Q = torch.tensor([0, 90, 93, 170], dtype=torch.int32)
LONG_K = torch.tensor([0, 70, 80, 150], dtype=torch.int32)


def relpos_inputs(dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(2, 16, 3, 4, 8, generator=generator, dtype=torch.float64)
    table = torch.randn(5 * 9 + 3, 4, generator=generator, dtype=torch.float64)
    return [t.to(dtype).detach().requires_grad_(grad) for t in (*qkv.unbind(2), table)]


def varlen_inputs(
    dtype: torch.dtype = torch.float32, grad: bool = True, *, queries: int = 17, keys: int = 20
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(queries, 3, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(keys, 2, 3, 8, generator=generator, dtype=torch.float64).unbind(1)
    return [t.to(dtype).detach().requires_grad_(grad) for t in (q, k, v)]


def relpos(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return ops.relpos_attention(q, k, v, table, WINDOW)


def varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return ops.varlen_attention(q, k, v, OFFSETS_Q, OFFSETS_K, 12, 11, **options)


def long_varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return ops.varlen_attention(q, k, v, LONG_Q, LONG_K, 90, 80, **options)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., list[Tensor]]]] = {
    "relpos": (relpos, relpos_inputs),
    "varlen": (varlen, varlen_inputs),
    "varlen, long": (long_varlen, lambda *a, **k: varlen_inputs(*a, queries=170, keys=150, **k)),
    "varlen, masked": (lambda q, k, v: varlen(q, k, v, key_mask=torch.arange(20) % 3 != 0), varlen_inputs),
}
each_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_varlen(dropout_p: float, masked: bool) -> None:
    seed = torch.tensor([11]) if dropout_p else None
    mask = torch.arange(20) % 2 == 0 if masked else None
    q, k, v = varlen_inputs()
    permuted = k.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    arguments = (OFFSETS_Q, OFFSETS_K, 12, 11, 0.3, dropout_p, seed, mask, "cpu")
    opcheck(torch.ops.xfm_fast.varlen_attention.default, (q, permuted, v, *arguments))


def test_opcheck_relpos() -> None:
    q, k, v, table = relpos_inputs()
    qkv = torch.randn(16, 4, 3, 2, 8).permute(3, 0, 2, 1, 4)
    views = [t.detach().requires_grad_() for t in qkv.unbind(2)]
    opcheck(torch.ops.xfm_fast.relpos_attention.default, (q, k, v, table, 3, 5, 0.3, "cpu"))
    opcheck(torch.ops.xfm_fast.relpos_attention.default, (*views, table, 3, 5, 0.3, "cpu"))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_against_the_definition(case: str, dtype: torch.dtype) -> None:
    function, inputs = CASES[case]

    def gradients(dtype: torch.dtype, backend: ops.Backend) -> list[Tensor]:
        # The truth starts from the rounded values.
        arguments = [t.detach().to(dtype).requires_grad_() for t in inputs(rounded)]
        with ops.use_backend(backend):
            out = function(*arguments)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(rounded).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, arguments, weight)]

    rounded = dtype
    for name, ours, same, truth in zip(
        ("out", "dq", "dk", "dv", "dtable"),
        gradients(dtype, "cpu"),
        gradients(dtype, "reference"),
        gradients(torch.float64, "reference"),
        strict=False,
    ):
        assert_accurate(ours, same, truth, name)


@each_case
def test_gradcheck(case: str) -> None:
    function, inputs = CASES[case]
    if case == "varlen, long":
        pytest.skip("its shapes make finite differences slow; the test against the definition covers it")
    assert torch.autograd.gradcheck(function, inputs(torch.float64), atol=1e-6)


@each_case
def test_the_same_bits_twice(case: str) -> None:
    function, inputs = CASES[case]

    def run() -> list[Tensor]:
        arguments = inputs()
        out = function(*arguments)
        return [out, *torch.autograd.grad(out.square().sum(), arguments)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@each_case
def test_compiled_equals_eager(case: str) -> None:
    function, inputs = CASES[case]
    compiled = torch.compile(lambda *a: function(*a).sin(), fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, lambda *a: function(*a).sin()):
        arguments = inputs()
        out = run(*arguments)
        results.append([out, *torch.autograd.grad(out.square().sum(), arguments)])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@each_case
def test_exports_as_one_node(case: str) -> None:
    function, inputs = CASES[case]

    class Module(nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return function(*arguments)

    arguments = tuple(inputs(grad=False))
    program = torch.export.export(Module(), arguments)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum(target.startswith("xfm_fast.") for target in targets) == 1
    torch.testing.assert_close(program.module()(*arguments), function(*arguments))


@each_case
def test_autocast(case: str) -> None:
    function, inputs = CASES[case]
    arguments = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(*arguments)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), arguments)
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(out.float(), function(*arguments), atol=0.05, rtol=0.05)


@each_case
def test_activation_checkpointing(case: str) -> None:
    function, inputs = CASES[case]
    plain, again = inputs(), inputs()
    function(*plain).square().sum().backward()
    checkpoint(function, *again, use_reentrant=False).square().sum().backward()
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.grad, b.grad)


class Layer(nn.Module):
    """A module around the operator, with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(relpos_inputs()[3].detach())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.relpos_attention(q, k, v, self.table, WINDOW)


def test_functional_call_with_other_parameters() -> None:
    q, k, v, table = relpos_inputs()
    layer = Layer()
    layer(q, k, v)
    other = (table.detach() * 2).requires_grad_()
    out = torch.func.functional_call(layer, {"table": other}, (q, k, v))
    torch.testing.assert_close(out, relpos(q, k, v, other))
    assert torch.autograd.grad(out.sum(), other)[0].abs().sum() > 0


def test_distributed_data_parallel(tmp_path) -> None:
    q, k, v, _ = relpos_inputs(grad=False)
    alone, wrapped = Layer(), Layer()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(wrapped)(q, k, v).square().sum().backward()
    finally:
        dist.destroy_process_group()
    alone(q, k, v).square().sum().backward()
    assert torch.equal(alone.table.grad, wrapped.table.grad)


@pytest.mark.parametrize("function", [varlen, long_varlen])
def test_dropout_follows_from_its_seed(function: Callable[..., Tensor]) -> None:
    sizes = {} if function is varlen else {"queries": 170, "keys": 150}
    q, k, v = varlen_inputs(torch.float64, **sizes)
    runs = [function(q, k, v, dropout_p=0.3, seed=torch.tensor([s])) for s in (7, 7, 8)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    # The output is linear in v for a fixed mask: the gradient replays the same mask.
    gradient = torch.autograd.grad(runs[0].sum(), v)[0]
    torch.testing.assert_close((gradient * v).sum(), runs[0].sum())
    torch.manual_seed(0)
    mean = torch.stack([function(q, k, v, dropout_p=0.3) for _ in range(300)]).mean(0)
    assert (mean - function(q, k, v)).abs().mean() < 0.1


def test_dropout_gradients_by_finite_differences() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen(q, k, v, dropout_p=0.3, seed=torch.tensor([4]), key_mask=torch.arange(20) != 2)

    assert torch.autograd.gradcheck(dropped, varlen_inputs(torch.float64), atol=1e-6)


def test_an_unused_output_costs_no_gradient() -> None:
    q, k, v, table = relpos_inputs()
    _, lse = torch.ops.xfm_fast.relpos_attention(q, k, v, table, 3, 5, 0.3, "cpu")
    assert not lse.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v, t: ops.relpos_attention(q, k.double(), v, t, WINDOW), "must share one floating-point type"),
        (lambda q, k, v, t: ops.relpos_attention(q, k, v, t.to("meta"), WINDOW), "tensors live on cpu and meta"),
        (
            lambda q, k, v, t: ops.relpos_attention(q, k, v, t, WINDOW, backend="flash_attn"),
            "asked for by name, but the package flash_attn is not installed|has no position bias",
        ),
        (
            lambda q, k, v, t: ops.relpos_attention(q, k, v, t, WINDOW, backend="triton"),
            "backend 'triton' was asked for by name, but",
        ),
        (lambda q, k, v, t: varlen(q[0], k[0], v[0], dropout_p=1.0), "dropout_p=1.0 is no probability below 1"),
        (
            lambda q, k, v, t: ops.varlen_attention(q[0], k[0], v[0], OFFSETS_Q[1:], OFFSETS_K, 12, 11),
            "cu_seqlens_q has 4 offsets and cu_seqlens_k 5",
        ),
        (
            lambda q, k, v, t: ops.varlen_attention(q[0], k[0], v[0], OFFSETS_Q.float(), OFFSETS_K, 12, 11),
            r"cu_seqlens_q is torch.float32 \[5\]; it must be int32 or int64",
        ),
    ],
)
def test_refused(call: Callable[..., Tensor], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        call(*relpos_inputs(grad=False))


def test_definitions_are_what_they_say() -> None:
    """The definition of varlen attention is attention of each sequence alone."""
    q, k, v = varlen_inputs(torch.float64, grad=False)
    out = reference.varlen_attention(q, k, v, OFFSETS_Q, OFFSETS_K, 0.5)
    for i in range(4):
        qs, ks = slice(*OFFSETS_Q[i : i + 2].tolist()), slice(*OFFSETS_K[i : i + 2].tolist())
        part = torch.einsum("qhd,khd->hqk", q[qs] * 0.5, k[ks])
        torch.testing.assert_close(out[qs], torch.einsum("hqk,khd->qhd", part.softmax(-1), v[ks]))
