"""The registered operators: schema, gradients, compiler, export, every shape, autocast, checkpointing, DDP."""

# Operators take the inputs of their case as one list, whose length no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.accuracy import assert_accurate, draws
from tests.kernels.conftest import each_library
from xfm_fast.errors import InputError
from xfm_fast.kernels import library, ops, products, reference
from xfm_fast.kernels.cpu import selection
from xfm_fast.kernels.cpu.varlen import plan_of

WINDOW = (3, 5)
OFFSETS_Q = torch.tensor([0, 4, 4, 5, 17], dtype=torch.int32)
OFFSETS_K = torch.tensor([0, 6, 9, 9, 20], dtype=torch.int32)
LONG_Q = torch.tensor([0, 90, 93, 170], dtype=torch.int32)
LONG_K = torch.tensor([0, 70, 80, 150], dtype=torch.int32)


def relpos_inputs(dtype: torch.dtype = torch.float32, grad: bool = True, *, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(2, 16, 3, 4, width, generator=generator, dtype=torch.float64)
    table = torch.randn(5 * 9 + 3, 4, generator=generator, dtype=torch.float64)
    return [t.to(dtype).detach().requires_grad_(grad) for t in (*qkv.unbind(2), table)]


def varlen_inputs(
    dtype: torch.dtype = torch.float32, grad: bool = True, *, queries: int = 17, keys: int = 20, width: int = 8
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(queries, 3, width, generator=generator, dtype=torch.float64)
    k, v = torch.randn(keys, 2, 3, width, generator=generator, dtype=torch.float64).unbind(1)
    return [t.to(dtype).detach().requires_grad_(grad) for t in (q, k, v)]


def bias_inputs(
    dtype: torch.dtype = torch.float32, grad: bool = True, *, entries: int = 1, width: int = 8
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = ((4, 5, 2, width), (4, 9, 2, width), (4, 9, 2, width), (entries, 2, 5, 9))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).detach().requires_grad_(grad) for t in made]


def relpos(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return ops.relpos_attention(q, k, v, table, WINDOW)


def varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return ops.varlen_attention(q, k, v, OFFSETS_Q, OFFSETS_K, 12, 11, **options)


def long_varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return ops.varlen_attention(q, k, v, LONG_Q, LONG_K, 90, 80, **options)


def shaped(*shapes: int | tuple[int, ...]) -> Callable[..., list[Tensor]]:
    """Inputs of the given shapes."""

    def inputs(dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
        generator = torch.Generator().manual_seed(9)
        made = [torch.randn(s if isinstance(s, tuple) else (s,), generator=generator).double() for s in shapes]
        return [t.to(dtype).detach().requires_grad_(grad) for t in made]

    return inputs


def joined(results: tuple[Tensor, Tensor]) -> Tensor:
    """Both results in one, so that both gradients flow."""
    return torch.cat(results, -1)


# A batch entry without keys, and one with all.
KEY_MASK = torch.tensor([[True] * 9, [False] * 9, [True] * 4 + [False] * 5, [False, True, True] * 3])


def bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return ops.bias_attention(q, k, v, bias, **options)


def bias_with_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Both results in one; of a query that sees nothing, the logsumexp is held at a number."""
    out, lse = ops.bias_attention(q, k, v, bias, KEY_MASK, return_lse=True)
    return torch.cat([out.flatten(2), lse.clamp_min(-9).transpose(1, 2).to(out.dtype)], -1)


ROW_SCALE = torch.tensor([0.0, 1.25, 1.25])
TOKENS = torch.tensor([[3, 1, 10], [3, 0, 1]])
TARGETS = torch.tensor([4, 49, -100, 0, 7, 7, -100, 12, 1])
MLP = shaped((3, 5, 16), (64, 16), 64, (16, 64), 16)
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., list[Tensor]]]] = {
    "relpos": (relpos, relpos_inputs),
    "bias": (bias, bias_inputs),
    "bias, by entry": (lambda *a: bias(*a, key_mask=KEY_MASK), lambda *a, **k: bias_inputs(*a, entries=4, **k)),
    "bias, by window": (bias_with_lse, lambda *a, **k: bias_inputs(*a, entries=2, **k)),
    "varlen": (varlen, varlen_inputs),
    "varlen, long": (long_varlen, lambda *a, **k: varlen_inputs(*a, queries=170, keys=150, **k)),
    "varlen, masked": (lambda q, k, v: varlen(q, k, v, key_mask=torch.arange(20) % 3 != 0), varlen_inputs),
    "post-norm": (
        lambda x, r, w, b: joined(ops.add_layer_norm(x, r, w, b, 1e-5)),
        shaped((3, 5, 16), (3, 5, 16), 16, 16),
    ),
    "pre-norm": (
        lambda x, r, w, b, g: joined(ops.add_layer_norm(x, r, w, b, 1e-6, gamma=g, row_scale=ROW_SCALE.to(x.dtype))),
        shaped((3, 5, 16), (3, 5, 16), 16, 16, 16),
    ),
    "embeddings": (
        lambda *tables: ops.embed_layer_norm(TOKENS, TOKENS % 7, *tables, 1e-5),
        shaped((11, 16), (7, 16), 16, 16, 16),
    ),
    "linear_gelu": (ops.linear_gelu, shaped((3, 5, 16), (24, 16), 24)),
    "linear_gelu, no bias": (lambda x, w: ops.linear_gelu(x, w, None), shaped((7, 16), (24, 16))),
    "cross-entropy": (
        lambda h, w, b: ops.linear_cross_entropy(h, w, b, TARGETS, label_smoothing=0.1),
        shaped((9, 16), (50, 16), 50),
    ),
    "log-likelihood": (lambda h, w, b: ops.token_log_likelihood(h, w, b, TARGETS), shaped((9, 16), (50, 16), 50)),
}
# What autocast converts to its own type; norms keep the types that they are given.
CAST = [name for name in CASES if "norm" not in name and name != "embeddings"]
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


@pytest.mark.parametrize(("entries", "dropout_p", "with_lse"), [(1, 0.0, False), (2, 0.25, True)])
def test_opcheck_bias(entries: int, dropout_p: float, with_lse: bool) -> None:
    q, k, v, bias = bias_inputs(entries=entries)
    permuted = k.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    turned = bias.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    seed = torch.tensor([11]) if dropout_p else None
    mask = torch.arange(9).expand(4, 9) != 3 if dropout_p else None
    arguments = (q, permuted, v, turned, mask, dropout_p, seed, 0.3, with_lse, "cpu")
    opcheck(torch.ops.xfm_fast.bias_attention.default, arguments)


def test_a_dropped_bias_follows_from_its_seed() -> None:
    q, k, v, added = bias_inputs(torch.float64, entries=2)
    options: dict[str, Any] = {"key_mask": torch.arange(9).expand(4, 9) != 2, "dropout_p": 0.3}
    runs = [bias(q, k, v, added, seed=torch.tensor([s]), **options) for s in (7, 7, 8)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    # The output is linear in v for a fixed mask: the gradient replays the same mask.
    gradient = torch.autograd.grad(runs[0].sum(), v)[0]
    torch.testing.assert_close((gradient * v).sum(), runs[0].sum())
    small = [t[:, :3, :1].detach().requires_grad_() for t in (q, k, v)] + [added[:1, :1, :3, :3].detach()]
    small[3].requires_grad_()

    def dropped(*given: Tensor) -> Tensor:
        return bias(*given, dropout_p=0.3, seed=torch.tensor([4]))

    assert torch.autograd.gradcheck(dropped, small, atol=1e-6)


def test_a_bias_without_gradient_costs_none() -> None:
    q, k, v, added = bias_inputs()
    frozen = torch.autograd.grad(bias(q, k, v, added.detach()).sum(), (q, k, v))
    learned = torch.autograd.grad(bias(q, k, v, added).sum(), (q, k, v, added))
    assert all(torch.equal(a, b) for a, b in zip(frozen, learned, strict=False))
    wide = torch.zeros(1, 1, 5, 9, requires_grad=True)
    # What is the same for all heads is summed over them.
    (shared,) = torch.autograd.grad(bias(q, k, v, added.detach() + wide).square().sum(), wide)
    (whole,) = torch.autograd.grad(bias(q, k, v, added).square().sum(), added)
    torch.testing.assert_close(shared, whole.sum(1, keepdim=True))


def test_opcheck_relpos() -> None:
    q, k, v, table = relpos_inputs()
    qkv = torch.randn(16, 4, 3, 2, 8).permute(3, 0, 2, 1, 4)
    views = [t.detach().requires_grad_() for t in qkv.unbind(2)]
    opcheck(torch.ops.xfm_fast.relpos_attention.default, (q, k, v, table, 3, 5, 0.3, "cpu"))
    opcheck(torch.ops.xfm_fast.relpos_attention.default, (*views, table, 3, 5, 0.3, "cpu"))


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_library("aten", "onednn", "tiled", "transposed", "llvm")
def test_gradients_against_the_definition(case: str, dtype: torch.dtype, library: str) -> None:
    function, inputs = CASES[case]
    if library == "llvm" and case.startswith(("relpos", "bias", "varlen")):
        # Compiled kernels read whole vectors.
        inputs = partial(inputs, width=32)

    def gradients(dtype: torch.dtype, backend: ops.Backend) -> list[Tensor]:
        # The truth starts from the rounded values.
        arguments = [t.detach().to(dtype).requires_grad_() for t in inputs(rounded)]
        with ops.use_backend(backend):
            out = function(*arguments)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(rounded).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, arguments, weight)]

    rounded = dtype
    plain = draws(lambda: gradients(dtype, "reference"))
    truth = gradients(torch.float64, "reference")
    for i, (ours, true) in enumerate(zip(gradients(dtype, "cpu"), truth, strict=True)):
        assert ours.dtype == plain[0][i].dtype
        assert_accurate(ours, [p[i] for p in plain], true, f"result {i}")


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
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_waits_for_a_device(case: str, backend: ops.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops an accelerator is not called on CPU either, so a training step can be watched for it."""
    function, inputs = CASES[case]
    selection._selections.clear()
    plan_of.cache_clear()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor's value was asked for")

    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, refuse)
    arguments = inputs()
    with ops.use_backend(backend):
        out = function(*arguments)
    torch.autograd.grad(out, arguments, torch.ones_like(out))


@each_case
def test_compiled_equals_eager(case: str) -> None:
    function, inputs = CASES[case]
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: function(*a).sin(), fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, lambda *a: function(*a).sin()):
        arguments = inputs()
        out = run(*arguments)
        results.append([out, *torch.autograd.grad(out.square().sum(), arguments)])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@each_case
def test_exports_without_operators_of_its_own(case: str) -> None:
    function, inputs = CASES[case]
    if case.startswith("varlen"):
        pytest.skip("texts of several lengths depend on values; whole batches of them are tested below")

    class Module(nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return function(*arguments)

    arguments = tuple(inputs(grad=False))
    program = torch.export.export(Module(), arguments)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if target.startswith("xfm_fast.")]
    torch.testing.assert_close(program.module()(*arguments), function(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_texts_of_one_length_are_exported(masked: bool) -> None:
    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (texts, length), keys = q.shape[:2], k.shape[1]
            offsets = [torch.arange(0, texts * n + 1, n, dtype=torch.int32) for n in (length, keys)]
            mask = torch.arange(keys).repeat(texts) != 1 if masked else None
            packed = (each.flatten(0, 1) for each in (q, k, v))
            return ops.varlen_attention(*packed, *offsets, length, keys, key_mask=mask)

    q, k, v = torch.randn(2, 5, 3, 16), torch.randn(2, 7, 3, 16), torch.randn(2, 7, 3, 16)
    program = torch.export.export(Module(), (q, k, v)).run_decompositions()
    assert not [node for node in program.graph.nodes if "xfm_fast" in str(node.target)]
    torch.testing.assert_close(program.module()(q, k, v), Module()(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CAST)
def test_autocast(case: str) -> None:
    function, inputs = CASES[case]
    arguments = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(*arguments)
    # Losses are at least fp32.
    assert out.dtype == (torch.float32 if case in ("cross-entropy", "log-likelihood") else torch.bfloat16)
    gradients = torch.autograd.grad(out.float().sum(), arguments)
    assert all(g.dtype == torch.float32 for g in gradients)
    exact = function(*arguments)
    assert (out.float() - exact).abs().max() <= 0.03 * exact.abs().max()


@each_case
def test_activation_checkpointing(case: str) -> None:
    function, inputs = CASES[case]
    plain, again = inputs(), inputs()
    function(*plain).square().sum().backward()
    checkpoint(function, *again, use_reentrant=False).square().sum().backward()
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a.grad, b.grad)


DIFFERENTIATED = {
    **CASES,
    "linear": (ops.linear, shaped((3, 5, 16), (24, 16), 24)),
    "mlp": (
        lambda x, *layers: ops.mlp_residual(x, *layers, x, row_scale=ROW_SCALE.to(x.dtype)),
        shaped((3, 5, 16), (64, 16), 64, (16, 64), 16),
    ),
}


@pytest.mark.parametrize("case", DIFFERENTIATED)
@pytest.mark.parametrize("upstream", ["constant", "learned"])
def test_second_derivatives_are_refused(case: str, upstream: str) -> None:
    function, inputs = DIFFERENTIATED[case]
    leaves = inputs()
    out = function(*leaves)
    loss = out.square().sum() if upstream == "learned" else out.sum()
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    for ours, expected in zip(first, plain, strict=True):
        assert torch.equal(ours, expected)
    for gradient in first:
        with pytest.raises(InputError, match="reference"):
            torch.autograd.grad(gradient.square().sum(), leaves, allow_unused=True, retain_graph=True)


def test_every_operator_with_a_gradient_was_asked_for_a_second() -> None:
    called: set[str] = set()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func.name())
            return func(*args, **(kwargs or {}))

    for function, inputs in DIFFERENTIATED.values():
        with Calls():
            function(*inputs())
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("xfm_fast::")]
    differentiable = {n for n in registered if torch._C._dispatch_has_kernel_for_dispatch_key(n, "Autograd")}
    # The norm without a residual is PyTorch's own on a CPU.
    assert differentiable - called == {"xfm_fast::layer_norm"}


@pytest.mark.parametrize("case", DIFFERENTIATED)
def test_transforms_and_forward_mode_see_the_definition(case: str) -> None:
    function, inputs = DIFFERENTIATED[case]
    given, directions = inputs(torch.float64, grad=False), inputs(torch.float64, grad=False)

    def loss(*given: Tensor) -> Tensor:
        return function(*given).square().sum()

    leaves = [t.clone().requires_grad_() for t in given]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    places = tuple(range(len(given)))
    for ours, right in zip(torch.func.grad(loss, places)(*given), expected, strict=True):
        torch.testing.assert_close(ours, right)
    slope = sum((g * d).sum() for g, d in zip(expected, directions, strict=True))
    torch.testing.assert_close(torch.func.jvp(loss, tuple(given), tuple(directions))[1], slope)
    with forward_ad.dual_level():
        dual = loss(*(forward_ad.make_dual(t, d) for t, d in zip(given, directions, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)
        if not case.startswith("linear") and case != "mlp":
            with pytest.raises(InputError), ops.use_backend("cpu"):
                loss(*given)
    with ops.use_backend("reference"):
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    slope = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    twice = torch.func.jvp(torch.func.grad(loss, places), tuple(given), tuple(directions))[1]
    for ours, right in zip(twice, torch.autograd.grad(slope, leaves), strict=True):
        torch.testing.assert_close(ours, right)


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


def test_an_implementation_runs_on_the_device_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched on the current device, which is not that of the arguments where a model is spread."""
    entered: list[torch.device] = []

    @contextmanager
    def device(of: torch.device) -> Iterator[None]:
        entered.append(of)
        yield
        entered.append(torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        second = torch.empty(2, device="cuda:1")
        run = library.on_device_of_arguments(lambda *given: len(entered))
        assert run(3, torch.empty(2), None, second) == 1
    assert entered == [torch.device("cuda:1"), torch.device("cpu")]


def test_a_position_bias_of_another_table_is_refused() -> None:
    q, k, v, table = relpos_inputs(grad=False)
    bias = ops.relpos_bias(table, WINDOW, dtype=q.dtype, scale=1.0)
    torch.testing.assert_close(ops.relpos_attention(q, k, v, table, WINDOW, bias=bias), relpos(q, k, v, table))
    with pytest.raises(InputError, match=r"bias.*\[4, 15, 16\].*relpos_bias"):
        ops.relpos_attention(q, k, v, table, WINDOW, bias=bias[:, 1:])
    with pytest.raises(InputError, match=r"bias.*bias_attention"):
        ops.relpos_attention(q, k, v, table, WINDOW, bias=bias.clone().requires_grad_())
    with pytest.raises(InputError, match="table"):
        ops.relpos_bias(table[1:], WINDOW, dtype=q.dtype, scale=1.0)


def test_distributed_data_parallel(tmp_path) -> None:
    # Training needs the models' configurations, and the cases of this file run on machines without their pydantic.
    from xfm_fast.training.distributed import end_groups

    q, k, v, _ = relpos_inputs(grad=False)
    alone, wrapped = Layer(), Layer()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        nn.parallel.DistributedDataParallel(wrapped)(q, k, v).square().sum().backward()
    finally:
        end_groups()
    alone(q, k, v).square().sum().backward()
    assert torch.equal(alone.table.grad, wrapped.table.grad)


def test_autocast_keeps_parameters_and_not_their_copies() -> None:
    """What is converted is converted again for the gradient; nothing else changes."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 48)
    weights = [nn.Parameter(torch.randn(shape) / 7) for shape in ((80, 48), (80,), (48, 80), (48,), (16, 48), (16,))]

    def step(given: list[Tensor]) -> tuple[list[Tensor], set[int]]:
        kept: set[int] = set()
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t),
            torch.autocast("cpu", torch.bfloat16),
        ):
            made = ops.linear(ops.mlp_residual(x, *given[:4], x), *given[4:])
        assert made.dtype == torch.bfloat16
        return [made.detach(), *torch.autograd.grad(made.float().square().sum(), weights)], kept

    found, kept = step(weights)
    wanted, copied = step([weight * 1 for weight in weights])
    for mine, other in zip(found, wanted, strict=True):
        assert torch.equal(mine, other)
    matrices = {weight.data_ptr() for weight in weights if weight.ndim == 2}
    assert matrices <= kept
    assert not matrices & copied


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


def test_opcheck_of_the_others() -> None:
    x, residual, weight, bias, gamma = CASES["pre-norm"][1]()
    tables = CASES["embeddings"][1]()
    h, w, b = CASES["cross-entropy"][1]()
    operators = torch.ops.xfm_fast
    seed = torch.tensor([3])
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for arguments in (
        (x, residual, weight, bias, 1e-5, None, None, 0.0, None, False, "cpu"),
        (strided, residual, weight, bias, 1e-5, gamma, ROW_SCALE, 0.0, None, False, "cpu"),
        (x, residual, weight, bias, 1e-5, gamma, None, 0.3, seed, False, "cpu"),
        (x.detach().bfloat16().requires_grad_(), residual, weight, bias, 1e-5, None, None, 0.0, None, False, "cpu"),
        (x.detach().bfloat16().requires_grad_(), residual, weight, bias, 1e-5, None, None, 0.0, None, True, "cpu"),
    ):
        opcheck(operators.add_layer_norm.default, arguments)
    opcheck(operators.embed_layer_norm.default, (TOKENS, TOKENS % 7, *tables, 1e-5, 1, "cpu"))
    opcheck(operators.linear_gelu.default, (*CASES["linear_gelu"][1](), True, "cpu"))
    opcheck(operators.linear_cross_entropy.default, (h, w, b, TARGETS, -100, 0.1, True, True, True, "cpu"))
    opcheck(operators.token_log_likelihood.default, (h, w, b, TARGETS, -100, "cpu"))


def test_dropout_before_a_norm_follows_from_its_seed() -> None:
    x, residual, weight, bias = CASES["post-norm"][1](torch.float64)

    def dropped(*arguments: Tensor) -> Tensor:
        return joined(ops.add_layer_norm(*arguments, 1e-5, dropout_p=0.4, seed=torch.tensor([2])))

    assert torch.equal(dropped(x, residual, weight, bias), dropped(x, residual, weight, bias))
    assert torch.autograd.gradcheck(dropped, (x, residual, weight, bias), atol=1e-6)


def test_padding_rows_of_the_tables_receive_no_gradient() -> None:
    tables = CASES["embeddings"][1]()
    gradients = {}
    for backend in ("cpu", "reference"):
        out = ops.embed_layer_norm(TOKENS, TOKENS % 7, *tables, 1e-5, padding_idx=1, backend=backend)
        gradients[backend] = torch.autograd.grad(out.square().sum(), tables[:2])
    for ours, expected in zip(gradients["cpu"], gradients["reference"], strict=True):
        assert not ours[1].any()
        assert ours[3].any()
        torch.testing.assert_close(ours, expected)


def test_cross_entropy_without_anything_to_predict() -> None:
    h, w, b = CASES["cross-entropy"][1]()
    loss = ops.linear_cross_entropy(h, w, b, torch.full((9,), -100))
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (h, w, b)))


def test_cross_entropy_of_huge_logits() -> None:
    h, w, b = CASES["cross-entropy"][1]()
    loss = ops.linear_cross_entropy(h * 3000, w, b, TARGETS)
    expected = torch.nn.functional.cross_entropy((h * 3000).double() @ w.double().t() + b, TARGETS)
    assert expected > 1e3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (h, w, b)))


@pytest.mark.parametrize("autocast", [False, True])
def test_cross_entropy_of_few_rows_keeps_no_gradient_of_the_vocabulary(autocast: bool) -> None:
    h, w = (torch.randn(n, 64, requires_grad=True) for n in (3, 1000))
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = ops.linear_cross_entropy(h, w, None, torch.arange(3))
    assert 0 < kept < w.nbytes / 4
    truth = torch.nn.functional.cross_entropy(h @ w.t(), torch.arange(3))
    tolerance = 2e-2 if autocast else 1e-5
    for ours, expected in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(truth, (h, w)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_only_the_gradients_that_are_wanted() -> None:
    h, w, b = CASES["cross-entropy"][1]()
    frozen = w.detach()
    loss = ops.linear_cross_entropy(h, frozen, b, TARGETS)
    truth = torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, frozen, b), TARGETS)
    for ours, expected in zip(
        torch.autograd.grad(loss * 2, (h, b)), torch.autograd.grad(truth * 2, (h, b)), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_an_unused_output_costs_no_gradient() -> None:
    q, k, v, table = relpos_inputs()
    _, lse = torch.ops.xfm_fast.relpos_attention(q, k, v, table, 3, 5, 0.3, "cpu")
    assert not lse.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v, t: ops.relpos_attention(q, k, v, t.to("meta"), WINDOW), "cpu.*meta"),
        (lambda q, k, v, t: ops.relpos_attention(q, k, v, t, WINDOW, backend="flash_attn"), "flash_attn|bias"),
        (lambda q, k, v, t: ops.relpos_attention(q, k, v, t, WINDOW, backend="triton"), "triton"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(
    call: Callable[..., Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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


LINEAR = shaped((3, 5, 16), (24, 16), 24)


def in_training(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.linear(x, weight, bias)


NO_NORM = (None, None, 0.0)


@pytest.mark.parametrize(
    "needed", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_opcheck_linear(needed: tuple[bool, ...]) -> None:
    x, weight, bias = (t.detach().requires_grad_(n) for t, n in zip(LINEAR(), needed, strict=True))
    plain = (*NO_NORM, None, None, None, torch.float32)
    opcheck(torch.ops.xfm_fast.trained_linear.default, (x, [weight], [bias], *plain))
    opcheck(torch.ops.xfm_fast.trained_linear.default, (x.transpose(0, 1), [weight], [], *plain))
    norm = [torch.rand(16, requires_grad=needed[1]) for _ in range(2)]
    ends = (torch.randn(3, 5, 32, requires_grad=needed[0]), torch.rand(32, requires_grad=needed[2]), ROW_SCALE)
    parts = ([weight, weight[:8].detach()], [bias, bias[:8].detach()])
    for dtype in (torch.float32, torch.bfloat16):
        opcheck(torch.ops.xfm_fast.trained_linear.default, (x, *parts, *norm, 1e-5, *ends, dtype))


@pytest.mark.parametrize("needed", [(True,) * 5, (True, *[False] * 4), (False, True, False, True, False)])
def test_opcheck_mlp(needed: tuple[bool, ...]) -> None:
    x, *layers = (t.detach().requires_grad_(n) for t, n in zip(MLP(), needed, strict=True))
    norm = [torch.rand(16, requires_grad=needed[1]) for _ in range(2)]
    gamma = torch.rand(16, requires_grad=needed[2])
    opcheck(torch.ops.xfm_fast.mlp.default, (x, *layers, *NO_NORM, None, None, None, torch.float32))
    for dtype in (torch.float32, torch.bfloat16):
        opcheck(torch.ops.xfm_fast.mlp.default, (x, *layers, *norm, 1e-5, x, gamma, ROW_SCALE, dtype))


# What training on a CPU does in one operator, by the leaves that it is made of.
BRANCHES: dict[str, Callable[..., Tensor]] = {
    "behind a norm": lambda given, **o: ops.layer_norm_linear(
        given["x"], *given["norm"], 1e-5, *given["inner"], backend=o["backend"]
    ),
    "pre-norm MLP": lambda given, **o: ops.layer_norm_mlp(
        given["x"], *given["norm"], 1e-5, *given["inner"], *given["outer"], **o
    ),
    "MLP": lambda given, **o: ops.mlp_residual(given["x"], *given["inner"], *given["outer"], given["x"], **o),
    "projection": lambda given, **o: ops.linear_residual(given["x"].tanh(), *given["square"], given["x"], **o),
    "side by side": lambda given, **o: ops.joined_linear(
        given["x"],
        [given["square"][0], given["inner"][0]],
        [given["square"][1], given["inner"][1]],
        backend=o["backend"],
    ),
}


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("name", BRANCHES)
@each_library("aten", "onednn", "transposed", "llvm")
@pytest.mark.usefixtures("library")
def test_branches_in_training_against_their_definition(name: str, mixed: bool, scaled: bool) -> None:
    """Results and every gradient, in fp32 and under autocast, with LayerScale and stochastic depth and without."""
    # Whole vectors in either type, as kernels of ours need them.
    made = shaped((3, 5, 32), 32, 32, (64, 32), 64, (32, 64), 32, (32, 32), 32, 32)

    def results(backend: ops.Backend, dtype: torch.dtype, *, mixed: bool) -> list[Tensor]:
        x, *rest, gamma = made(dtype)
        pairs = dict(zip(("norm", "inner", "outer", "square"), zip(rest[::2], rest[1::2], strict=True), strict=True))
        branch = {"gamma": gamma, "row_scale": ROW_SCALE.to(dtype)} if scaled else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = BRANCHES[name]({"x": x, **pairs}, backend=backend, **branch)
        gradients = torch.autograd.grad(out.to(dtype).sin().sum(), [x, *rest, gamma], allow_unused=True)
        return [out.detach(), *(g for g in gradients if g is not None)]

    truth = results("reference", torch.float64, mixed=False)
    plain = results("reference", torch.float32, mixed=mixed)
    found = results("cpu", torch.float32, mixed=mixed)
    for i, (ours, theirs, true) in enumerate(zip(found, plain, truth, strict=True)):
        assert ours.dtype == theirs.dtype
        errors = [float((each.double() - true).norm() / true.norm()) for each in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + (4e-3 if mixed else 4e-6), f"result {i}: {errors}"


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("name", ["MLP", "projection"])
def test_the_sum_of_a_branch_lies_where_its_product_was(
    name: str, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 it is wider, since the residual is fp32."""
    x, *rest, gamma = shaped((3, 5, 16), (64, 16), 64, (16, 64), 16, (16, 16), 16, 16)()
    pairs = dict(zip(("inner", "outer", "square"), zip(rest[::2], rest[1::2], strict=True), strict=True))
    made: list[Tensor] = []
    multiply = products.cpu.trained_linear
    monkeypatch.setattr(products.cpu, "trained_linear", lambda *given: made.append(multiply(*given)) or made[-1])
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = BRANCHES[name]({"x": x, **pairs}, backend="cpu", gamma=gamma)
    assert out.dtype == torch.float32
    assert (out.data_ptr() == made[-1].data_ptr()) is not mixed


def test_a_branch_in_training_keeps_its_input_alone() -> None:
    """Neither the normalised rows, nor the hidden layer, nor the branch before its LayerScale, nor weights."""
    x, *layers = MLP()
    norm, gamma = [torch.rand(16, requires_grad=True) for _ in range(2)], torch.rand(16, requires_grad=True)
    leaves = [x, *layers, *norm, gamma]
    wider = torch.rand(48, 16, requires_grad=True)

    def kept(run: Callable[[], Tensor]) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def note(t: Tensor) -> Tensor:
            if not any(t is leaf or t.data_ptr() == leaf.data_ptr() for leaf in (*leaves, wider)):
                shapes.append(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            run()
        return sorted(shape for shape in shapes if math.prod(shape))

    statistics = [(15,), (15,)]
    assert kept(lambda: ops.layer_norm_mlp(x, *norm, 1e-5, *layers, gamma=gamma)) == [(3, 5, 64), *statistics]
    assert kept(lambda: ops.layer_norm_linear(x, *norm, 1e-5, *layers[:2])) == statistics
    assert kept(lambda: ops.linear_residual(x, layers[2][:, :16], layers[3], x, gamma=gamma)) == []
    assert kept(lambda: ops.joined_linear(x, [layers[0], wider], [layers[1], layers[1][:48]])) == []
    with torch.autocast("cpu", torch.bfloat16):
        # The rows in the type of the product are the one thing that is not there already.
        assert kept(lambda: ops.joined_linear(x, [layers[0], wider], [layers[1], layers[1][:48]])) == [(3, 5, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@each_library("aten", "onednn", "transposed")
@pytest.mark.usefixtures("library")
def test_linear_in_training_against_its_definition(biased: bool, dtype: torch.dtype) -> None:
    def results(backend: ops.Backend, dtype: torch.dtype) -> list[Tensor]:
        arguments = [t.detach().to(rounded).to(dtype).requires_grad_() for t in LINEAR()[: 2 + biased]]
        with ops.use_backend(backend):
            out = in_training(*arguments)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(rounded).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, arguments, weight)]

    rounded = dtype
    plain, truth = draws(lambda: results("reference", dtype)), results("cpu", torch.float64)
    names = ("out", "dx", "dweight", "dbias")
    for name, found, true, *same in zip(names, results("cpu", dtype), truth, *plain, strict=False):
        assert found.dtype == same[0].dtype
        assert_accurate(found, same, true, name)


def test_linear_takes_its_operator_where_a_gradient_is_wanted() -> None:
    """And only there: compilers, exports and fp64 see PyTorch's own."""
    arguments = LINEAR()
    assert "xfm_fast" in str(in_training(*arguments).grad_fn)
    assert "xfm_fast" not in str(in_training(*LINEAR(torch.float64)).grad_fn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = in_training(*arguments)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), arguments))
    with torch.autocast("cpu", dtype=torch.float16):
        assert in_training(*arguments).dtype == torch.float16
    torch._dynamo.reset()
    compiled = torch.compile(in_training, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), in_training(*arguments))
    with torch.no_grad():
        assert in_training(*arguments).grad_fn is None


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dropped", [True, False])
@each_library("aten", "onednn", "transposed")
@pytest.mark.usefixtures("library")
def test_a_branch_in_training_against_its_definition(scaled: bool, dropped: bool) -> None:
    """The residual sum behind a trained linear layer: one pass for what the definition does in four."""
    x, weight, bias, residual, gamma = shaped((3, 5, 16), (24, 16), 24, (3, 5, 24), 24)()
    rows = torch.tensor([0.0, 1.25, 1.25]) if dropped else None
    arguments = [x, weight, bias, residual, *([gamma] if scaled else [])]

    def results(backend: ops.Backend) -> list[Tensor]:
        options = {"gamma": gamma if scaled else None, "row_scale": rows}
        out = ops.linear_residual(x, weight, bias, residual, backend=backend, **options)
        return [out, *torch.autograd.grad(out.sin().sum(), arguments)]

    for ours, definition in zip(results("cpu"), results("reference"), strict=True):
        torch.testing.assert_close(ours, definition)


WIDTH, HIDDEN, VOCABULARY = 16, 24, 40
NORM = (torch.rand(WIDTH), torch.rand(WIDTH))
INNER = (torch.randn(HIDDEN, WIDTH), torch.randn(HIDDEN))
OUTER = (torch.randn(WIDTH, HIDDEN), torch.randn(WIDTH))
WORDS = (torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY))
TABLES = (WORDS[0], torch.randn(50, WIDTH), torch.randn(WIDTH), *NORM)
POSITIONS = torch.randn(12, 2)
PLACES = torch.randn(1, 2, 5, 5)


def _rows(n: int) -> Tensor:
    return torch.randn(n, 3, WIDTH)


def _ids(n: int) -> Tensor:
    return torch.arange(3 * n).view(n, 3) % VOCABULARY


def _packed(n: int) -> tuple[Any, ...]:
    return torch.randn(2 * n, 2, 32), torch.tensor([0, n, 2 * n], dtype=torch.int32), n


# An operation, and its arguments for a number.
DYNAMIC: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Any, ...]]]] = {
    "norm": (lambda x: ops.layer_norm(x, *NORM, 1e-5), lambda n: (_rows(n),)),
    "add norm": (lambda x, r: ops.add_layer_norm(x, r, *NORM, 1e-5)[0], lambda n: (_rows(n), _rows(n))),
    "add norm, scaled": (
        lambda x, r, s: ops.add_layer_norm(x, r, *NORM, 1e-5, row_scale=s)[0],
        lambda n: (_rows(n), _rows(n), torch.rand(n)),
    ),
    "embedding": (lambda t, p: ops.embed_layer_norm(t, p, *TABLES, 1e-5), lambda n: (_ids(n), _ids(n))),
    "gelu": (lambda x: ops.linear_gelu(x, *INNER), lambda n: (_rows(n),)),
    "branch": (lambda x: ops.mlp_residual(x, *INNER, *OUTER, x), lambda n: (_rows(n),)),
    "loss": (lambda x, t: ops.linear_cross_entropy(x, *WORDS, t), lambda n: (_rows(n), _ids(n))),
    "likelihood": (lambda x, t: ops.token_log_likelihood(x, *WORDS, t), lambda n: (_rows(n), _ids(n))),
    "varlen": (lambda q, o, m: ops.varlen_attention(q, q, q, o, o, m, m), _packed),
    "relpos": (lambda q: ops.relpos_attention(q, q, q, POSITIONS, (2, 2)), lambda n: (torch.randn(n, 5, 2, 32),)),
    "bias": (lambda q: ops.bias_attention(q, q, q, PLACES), lambda n: (torch.randn(n, 5, 2, 32),)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", DYNAMIC)
def test_one_compilation_serves_every_number_of_tokens(name: str, training: bool) -> None:
    operation, make = DYNAMIC[name]
    made: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        made.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(operation, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=count))
    expected_graphs = None
    for n in (4, 6, 7, 9):
        arguments = make(n)
        floating = [a for a in arguments if isinstance(a, Tensor) and a.is_floating_point() and a.ndim > 1]
        for leaf in floating:
            leaf.requires_grad_(training)
        found, expected = compiled(*arguments), operation(*arguments)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if training and floating:
            pairs = (torch.autograd.grad(out.square().sum(), floating) for out in (found, expected))
            for a, b in zip(*pairs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        expected_graphs = len(made) if expected_graphs is None else expected_graphs
        assert len(made) == expected_graphs


class _Layer(torch.nn.Module):
    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        out = ops.mlp_residual(x, *INNER, *OUTER, x)
        normed, _ = ops.add_layer_norm(out, x, *NORM, 1e-5)
        return ops.token_log_likelihood(normed, *WORDS, target)


def test_an_export_takes_batches_of_every_shape() -> None:
    axes = {0: Dim("entries", min=1, max=64), 1: Dim("tokens", min=1, max=64)}
    exported = export(
        _Layer(), (torch.randn(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.long)), dynamic_shapes=(axes, axes)
    )
    for shape in ((3, 7), (1, 1)):
        x, target = torch.randn(*shape, WIDTH), torch.arange(math.prod(shape)).view(shape)
        torch.testing.assert_close(exported.module()(x, target), _Layer()(x, target), rtol=1e-5, atol=1e-5)


@each_library()
def test_an_mlp_in_training_keeps_no_hidden_layer(library: str) -> None:
    """Its GELU is computed again from what is kept, to the same gradients."""
    inputs = MLP()
    kept: list[Tensor] = []
    row_scale, gamma = torch.tensor([0.0, 1.5, 2.0]), torch.rand(16)
    branch = {"gamma": gamma, "row_scale": row_scale}
    residual = torch.randn(3, 5, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = ops.mlp_residual(*inputs, residual, **branch)
    wide = [t for t in kept if t.shape == (3, 5, 64)]
    assert len({t.data_ptr() for t in wide}) == 1
    hidden = reference.linear_gelu(*inputs[:3])
    wanted = reference.linear_residual(hidden, *inputs[3:], residual, gamma, row_scale)
    torch.testing.assert_close(found, wanted)
    dout = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, dout), torch.autograd.grad(wanted, inputs, dout), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
