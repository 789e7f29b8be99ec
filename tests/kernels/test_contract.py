"""What every public operation promises, on every backend that runs without a GPU: one parametrised test a promise."""

# Operations take the arguments of their case by name, which no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.kernels.accuracy import assert_accurate, assert_as_accurate, draws
from tests.kernels.cases import CASES, Arguments, converted, leaves, offsets, results, run
from tests.kernels.triton_testing import HAS_TRITON
from xfm_fast.errors import InputError
from xfm_fast.kernels import backend as backends
from xfm_fast.kernels import checks, ops, reference
from xfm_fast.kernels.backend import resolve
from xfm_fast.kernels.cpu import selection
from xfm_fast.kernels.cpu.varlen import plan_of

NAN = math.nan
BACKENDS: tuple[ops.Backend, ...] = ("auto", "reference", *(("triton",) if HAS_TRITON else ()))
each_case = pytest.mark.parametrize("name", CASES)
# Compilers and transforms see one case of every operation in the quick suite.
each_operation = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "," in name else name for name in CASES]
)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def runnable(name: str, backend: ops.Backend) -> None:
    if backend == "triton" and "triton" not in CASES[name].forms:
        pytest.skip("there is no Triton kernel for these arguments")


# Every library trains in fp32 and infers in bf16; the plain one and our kernels, whose code differs, train in bf16 too.
WAYS = [
    pytest.param(
        name, library, grad, dtype, id=f"{name}-{library}-{'training' if grad else 'inference'}-{str(dtype)[6:]}"
    )
    for name, case in CASES.items()
    for library in case.libraries
    for grad, dtype in ((True, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16))
    if not (grad and dtype == torch.bfloat16) or library in ("aten", "llvm")
]


@pytest.mark.parametrize(("name", "library", "grad", "dtype"), WAYS, indirect=["library"])
def test_results_and_gradients_are_as_accurate_as_plain_pytorch(
    name: str, library: str, grad: bool, dtype: torch.dtype
) -> None:
    case = CASES[name]
    arguments = case.arguments(dtype, grad=grad)
    with torch.inference_mode(not grad):
        plain = draws(lambda: run(case, converted(arguments, dtype), "reference"))
        truth = run(case, converted(arguments, torch.float64), "reference")
        found = run(case, arguments)
    for i, (ours, true) in enumerate(zip(found, truth, strict=True)):
        assert ours.dtype == plain[0][i].dtype
        assert_accurate(ours, [each[i] for each in plain], true, f"result {i}")


@each_case
@each_backend
def test_no_rows(name: str, backend: ops.Backend) -> None:
    runnable(name, backend)
    found = run(CASES[name], CASES[name].arguments(grad=True, n=0), backend)
    assert all(t.isfinite().all() for t in found)


@each_case
def test_gradients_of_one_argument_are_those_of_all(name: str) -> None:
    arguments = CASES[name].arguments(grad=True)
    every = run(CASES[name], arguments)
    grads = every[len(every) - len(leaves(arguments)) :]
    for leaf, grad in zip(leaves(arguments), grads, strict=True):
        alone = {key: t.detach() if isinstance(t, Tensor) and t is not leaf else t for key, t in arguments.items()}
        torch.testing.assert_close(run(CASES[name], alone)[-1], grad, rtol=1e-4, atol=1e-4)


def _strided(value: Any) -> Any:
    """The same values, every other element of memory; what lies between must not be read."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    wide = torch.full((*value.shape, 2), NAN if value.is_floating_point() else 1).to(value.dtype)
    wide[..., 0] = value.detach()
    return wide[..., 0].requires_grad_(value.requires_grad)


@each_case
@each_backend
def test_no_argument_need_be_contiguous(name: str, backend: ops.Backend) -> None:
    runnable(name, backend)
    arguments = CASES[name].arguments(grad=True)
    views = {key: _strided(value) for key, value in arguments.items()}
    before = [t.detach().clone() for t in leaves(views)]
    for found, right in zip(run(CASES[name], views, backend), run(CASES[name], arguments, backend), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, leaves(views), before)), "an operation wrote to its arguments"


@each_case
def test_the_same_bits_twice(name: str) -> None:
    first, second = (run(CASES[name], CASES[name].arguments(grad=True)) for _ in range(2))
    assert all(map(torch.equal, first, second))


@each_case
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_waits_for_a_device(name: str, backend: ops.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops an accelerator is not called on CPU either, so a training step can be watched for it."""
    arguments = CASES[name].arguments(grad=True)
    selection._selections.clear()
    plan_of.cache_clear()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the value of a tensor was read")

    for method in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, method, refuse)
    found = results(CASES[name].operation(**arguments, backend=backend))
    torch.autograd.grad(found, leaves(arguments), [torch.ones_like(t) for t in found])


@each_operation
def test_one_compilation_serves_every_number_of_rows(name: str) -> None:
    made: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        made.append(graph)
        return make_boxed_func(graph)

    def call(arguments: Arguments) -> tuple[Tensor, ...]:
        return results(CASES[name].operation(**arguments))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=count))
    graphs = None
    for n in (4, 6, 7):
        arguments = CASES[name].arguments(grad=True, n=n)
        found, expected = ([*call(arguments)] for call in (compiled, call))
        for made_by in (found, expected):
            loss = sum(t.square().sum() for t in made_by)
            made_by += torch.autograd.grad(loss, leaves(arguments))
        for ours, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3)
        graphs = len(made) if graphs is None else graphs
        assert len(made) == graphs


@pytest.mark.parametrize("name", [name for name in CASES if "exported" in CASES[name].forms])
def test_exports_without_operators_of_its_own(name: str) -> None:
    arguments = CASES[name].arguments()

    class Module(nn.Module):
        def forward(self, **given: Tensor) -> tuple[Tensor, ...]:
            return results(CASES[name].operation(**given))

    program = export(Module(), (), arguments)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not [target for target in targets if target.startswith("xfm_fast.")]
    for found, expected in zip(program.module()(**arguments), Module()(**arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].autocast is not None])
def test_autocast(name: str) -> None:
    arguments = CASES[name].arguments(grad=True)
    exact = run(CASES[name], arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(CASES[name], arguments)
    # A sum is as wide as its residual.
    assert found[0].dtype == (torch.float32 if "residual" in arguments or "mlp" in name else CASES[name].autocast)
    for ours, right in zip(found, exact, strict=True):
        assert float((ours.float() - right).norm()) <= 0.03 * float(right.norm())
    assert all(g.dtype == torch.float32 for g in found[-len(leaves(arguments)) :])


@each_operation
def test_activation_checkpointing(name: str) -> None:
    gradients = []
    for call in (
        CASES[name].operation,
        lambda **given: checkpoint(CASES[name].operation, use_reentrant=False, **given),
    ):
        arguments = CASES[name].arguments(grad=True)
        sum(t.square().sum() for t in results(call(**arguments))).backward()  # type: ignore[union-attr]
        gradients.append([t.grad for t in leaves(arguments)])
    assert all(map(torch.equal, *gradients))


@each_case
@each_backend
def test_second_derivatives_are_refused(name: str, backend: ops.Backend) -> None:
    """And first ones that are asked for with a graph stay what they are."""
    runnable(name, backend)
    arguments = CASES[name].arguments(grad=True)
    wanted = leaves(arguments)
    loss = sum(t.square().sum() for t in results(CASES[name].operation(**arguments, backend=backend)))
    assert isinstance(loss, Tensor)
    plain = torch.autograd.grad(loss, wanted, retain_graph=True)
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    assert all(map(torch.equal, first, plain))
    # PyTorch's own LayerNorm, attention and GEMMs on a GPU have second derivatives.
    own = backend == "reference" or (backend == "auto" and name in ("layer_norm", "relpos, masked"))
    own = own or (backend == "triton" and "transposed" in CASES[name].libraries and name != "linear_gelu")
    for gradient in first if not own else ():
        with pytest.raises(InputError, match="reference"):
            torch.autograd.grad(gradient.square().sum(), wanted, allow_unused=True, retain_graph=True)


class Calls(TorchDispatchMode):
    """Within the block, calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("xfm_fast::"):
            self.calls[func.name()] = func, args
        return func(*args, **(kwargs or {}))


@each_operation
def test_operators_keep_the_rules_of_pytorch(name: str) -> None:
    """Schemas, fakes, gradients and compilation of all operators that an operation calls, by `opcheck`."""
    arguments = CASES[name].arguments(grad=True)
    with Calls() as seen:
        run(CASES[name], arguments)
    for operator, given in seen.calls.values():
        differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "Autograd")

        def fresh(value: Any, grad: bool = differentiable) -> Any:
            if isinstance(value, (list, tuple)):
                return [fresh(each) for each in value]
            return value.detach().clone().requires_grad_(grad and value.requires_grad) if _is_float(value) else value

        opcheck(operator, tuple(map(fresh, given)))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_every_operator_is_called_by_a_case() -> None:
    called: set[str] = set()
    for case in CASES.values():
        with Calls() as seen:
            run(case, case.arguments(grad=True))
        called |= {*seen.calls}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("xfm_fast::")}
    # A CPU has PyTorch's own norm, makes no padded bias, and knows the gradients of a loss with the loss.
    only = {"layer_norm", "layer_norm_backward", "relpos_bias", "linear_cross_entropy_backward"}
    uncalled = {name.removeprefix("xfm_fast::") for name in registered - called}
    assert {name for name in uncalled if not name.startswith("toy")} == only


@each_operation
def test_transforms_and_forward_mode_see_the_reference(name: str) -> None:
    case = CASES[name]
    given, directions = (case.arguments(torch.float64, grad=True) for _ in range(2))
    names = [key for key, value in given.items() if isinstance(value, Tensor) and value.requires_grad]

    def loss(*tensors: Tensor) -> Tensor:
        return sum(t.square().sum() for t in results(case.operation(**given | dict(zip(names, tensors, strict=True)))))  # type: ignore[return-value]

    wanted = [given[key] for key in names]
    expected = torch.autograd.grad(loss(*wanted), wanted)
    plain = tuple(t.detach() for t in wanted)
    ways = tuple(directions[key].detach() for key in names)
    for ours, right in zip(torch.func.grad(loss, tuple(range(len(names))))(*plain), expected, strict=True):
        torch.testing.assert_close(ours, right)
    slope = sum((g * d).sum() for g, d in zip(expected, ways, strict=True))
    torch.testing.assert_close(torch.func.jvp(loss, plain, ways)[1], slope)
    with forward_ad.dual_level():
        dual = loss(*map(forward_ad.make_dual, plain, ways))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, slope)
    with ops.use_backend("reference"):
        first = torch.autograd.grad(loss(*wanted), wanted, create_graph=True)
    second = torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, ways, strict=True)), wanted)
    twice = torch.func.jvp(torch.func.grad(loss, tuple(range(len(names)))), plain, ways)[1]
    for ours, right in zip(twice, second, strict=True):
        torch.testing.assert_close(ours, right)


# Arguments that do not fit: operations, changed arguments, and what the error has to name.
_F16, _F64 = torch.float16, torch.float64


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _qkv(value: Tensor) -> Arguments:
    return dict.fromkeys("qkv", value)


REFUSED: list[tuple[str, Arguments, str]] = [
    ("relpos", {"q": _random(16, 2, 32)}, r"q.*\[16, 2, 32\]"),
    ("relpos", _qkv(_random(3, 16, 2, 0)), "heads"),
    ("relpos", _qkv(torch.ones(3, 16, 2, 32, dtype=torch.long)), "int64"),
    ("relpos|bias", {"k": _random(3, 16, 2, 32).to(_F16)}, r"float16|\[3, 16, 2, 32\]"),
    *(("relpos", {"window": window}, "window") for window in ((3, 2), (-3, -5), 2)),
    ("relpos", {"table": _random(47, 2)}, r"table.*\[47, 2\].*\[48, 2\]"),
    *(("relpos|bias|varlen", {"scale": scale}, f"scale={scale}") for scale in (NAN, math.inf, 0.0, -0.5)),
    ("relpos|bias", {"key_mask": torch.ones(3, 9)}, "key_mask.*float32"),
    ("bias", {"k": _random(3, 9, 3, 32)}, r"k.*\[3, 9, 3, 32\]"),
    ("bias", {"bias": _random(1, 2, 9, 5)}, r"bias.*\[1, 2, 9, 5\]"),
    ("bias", {"bias": _random(2, 2, 5, 9)}, r"bias \[2, .*divisor of 3"),
    ("bias", {"bias": torch.ones(1, 2, 5, 9, dtype=torch.bool)}, "bias.*bool"),
    ("bias", {"bias": _random(1, 2, 5, 9).to(_F64)}, "bias.*float64.*float32"),
    ("bias|varlen", {"seed": 3, "dropout_p": 0.1}, "seed=3"),
    ("varlen", {"seed": torch.tensor([1.5]), "dropout_p": 0.1}, "seed.*float32"),
    ("varlen", {"q": _random(1, 17, 2, 32)}, r"q.*\[1, 17, 2, 32\]"),
    ("varlen", {"k": _random(20, 2, 64), "v": _random(20, 2, 64)}, r"k.*\[20, 2, 64\]"),
    ("varlen", {"cu_seqlens_q": torch.tensor([0, 18, 4, 5, 17])}, "cu_seqlens_q"),
    ("varlen", {"cu_seqlens_k": torch.tensor([0, 6, 9, 9, 99]), "max_k": 95}, "cu_seqlens_k.* 99"),
    ("varlen", {"cu_seqlens_q": torch.tensor([1, 4, 4, 5, 17])}, "cu_seqlens_q.* 1 .*17"),
    ("varlen", {"cu_seqlens_q": torch.tensor([0, 4, 4, 5, 17], dtype=torch.int16)}, "cu_seqlens_q.*int16"),
    ("varlen", {"cu_seqlens_k": torch.tensor([0, 20])}, r"cu_seqlens_k \[2\]"),
    ("varlen", {"max_q": 3}, "max_q=3.* 12"),
    ("varlen", {"key_mask": torch.ones(7, dtype=torch.bool)}, r"key_mask.*\[7\].*\[20\]"),
    *(
        ("varlen|bias|add_layer_norm|linear_residual|mlp_residual", {"dropout_p": p}, f"dropout_p={p}")
        for p in (1.0, NAN)
    ),
    ("add_layer_norm", {"residual": _random(5, 32)}, r"residual \[5, 32\]"),
    ("linear_residual|mlp_residual", {"residual": _random(1, 64)}, r"residual \[1, 64\]"),
    ("add_layer_norm|linear_residual|mlp_residual", {"gamma": _random(1)}, r"gamma.*\[1\]"),
    ("add_layer_norm|linear_residual|mlp_residual", {"row_scale": _random(2)}, r"row_scale.*\[2\].*\[3\]"),
    ("layer_norm|add_layer_norm", {"weight": _random(15)}, r"weight \[15\]"),
    ("layer_norm|add_layer_norm|embed_layer_norm", {"eps": -1.0}, "eps=-1.0"),
    ("layer_norm", {"x": torch.ones(3, 32, dtype=torch.long)}, "x.*int64"),
    ("embed_layer_norm", {"tokens": torch.zeros(2, 3, dtype=torch.long)}, r"tokens \[2, 3\]"),
    ("embed_layer_norm", {"tokens": torch.zeros(3, 3)}, "tokens.*float32"),
    ("embed_layer_norm", {"type_row": _random(1, 32)}, r"type_row.*\[1, 32\]"),
    ("embed_layer_norm", {"padding_idx": 7}, "padding_idx=7"),
    ("linear|linear_gelu|linear_residual", {"weight": _random(64, 7)}, r"weight \[64, 7\]"),
    ("linear|linear_gelu|linear_residual", {"bias": _random(1)}, r"bias.*\[1\].*\[64\]"),
    ("linear|linear_gelu|linear_residual", {"x": _random(3, 5, 32).bfloat16()}, "x.*bfloat16.*float32"),
    ("mlp_residual", {"weight_out": _random(32, 11)}, r"weight_out \[32, 11\]"),
    ("mlp_residual", {"bias_out": _random(12)}, r"bias_out.*\[12\].*\[32\]"),
    ("linear_cross_entropy|token_log_likelihood", {"w": _random(50, 7)}, r"w \[50, 7\]"),
    ("linear_cross_entropy|token_log_likelihood", {"b": _random(4)}, r"b \[4\]"),
    ("linear_cross_entropy|token_log_likelihood", {"b": _random(50).to(_F64)}, "b.*float64"),
    ("linear_cross_entropy|token_log_likelihood", {"target": torch.zeros(4, dtype=torch.long)}, r"target \[4\]"),
    ("linear_cross_entropy|token_log_likelihood", {"target": torch.zeros(9)}, "target.*float32"),
    ("linear_cross_entropy", {"label_smoothing": NAN}, "label_smoothing=nan"),
]
OUTSIDE: list[tuple[str, Arguments, str]] = [
    ("embed_layer_norm", {"tokens": torch.full((3, 3), 11)}, "11"),
    ("embed_layer_norm", {"positions": torch.full((3, 3), -1)}, "-1"),
    ("linear_cross_entropy|token_log_likelihood", {"target": torch.full((9,), 50)}, "50"),
    ("linear_cross_entropy|token_log_likelihood", {"target": torch.full((9,), -1)}, "-1"),
]


@pytest.mark.parametrize(("names", "changes", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_arguments_that_do_not_fit_are_named(names: str, changes: Arguments, message: str) -> None:
    for name in names.split("|"):
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=message) as raised:
                CASES[name].operation(**CASES[name].arguments() | changes, backend=backend)
            assert isinstance(raised.value, InputError)


@pytest.mark.parametrize(("names", "changes", "value"), OUTSIDE, ids=lambda value: str(value)[:30])
def test_ids_outside_a_table(names: str, changes: Arguments, value: str) -> None:
    for name in names.split("|"):
        for backend in BACKENDS:
            with pytest.raises(IndexError, match=value if backend != "reference" else None):
                CASES[name].operation(**CASES[name].arguments() | changes, backend=backend)


@each_backend
@pytest.mark.parametrize("tensor", ["cu_seqlens_k", "key_mask", "seed"])
def test_tensors_on_several_devices(tensor: str, backend: ops.Backend) -> None:
    given = CASES["varlen, masked"].arguments() | {"dropout_p": 0.1, "seed": torch.tensor([1])}
    given[tensor] = given[tensor].to("meta")
    with pytest.raises(InputError, match=r"cpu.*meta"):
        ops.varlen_attention(**given, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.empty(48, 2, device="meta")}, "cpu.*meta"),
        ({"backend": "flash_attn"}, "flash_attn|bias"),
        ({"backend": "triton"}, "triton"),
        ({"backend": "fast"}, "fast"),
    ],
    ids=str,
)
def test_a_backend_that_cannot_run_is_refused(change: Arguments, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=message):
        CASES["relpos"].operation(**CASES["relpos"].arguments() | change)


@each_backend
@pytest.mark.parametrize("name", ["varlen", "bias", "add_layer_norm"])
def test_dropout_follows_from_its_seed(name: str, backend: ops.Backend) -> None:
    """The gradient of a result that is linear in an argument drops what the result dropped."""
    linear = "x" if name == "add_layer_norm" else "v"
    arguments = converted(CASES[name].arguments(grad=True), torch.float32 if backend == "triton" else torch.float64)

    def once(seed: int) -> Tensor:
        found = CASES[name].operation(**arguments, dropout_p=0.4, seed=torch.tensor([seed]), backend=backend)
        return found[1] - arguments["residual"] if name == "add_layer_norm" else found

    assert torch.equal(once(3), once(3))
    assert not torch.equal(once(3), once(4))
    out = once(3)
    (gradient,) = torch.autograd.grad(out.sum(), arguments[linear])
    torch.testing.assert_close((gradient * arguments[linear]).sum(), out.sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["varlen, masked", "bias, by entry", "add_layer_norm"])
def test_dropped_gradients_by_finite_differences(name: str) -> None:
    arguments = CASES[name].arguments(torch.float64, grad=True, n=1)
    if name.startswith("varlen"):
        arguments = {k: v[..., :1, :3] if k in ("q", "k", "v") else v for k, v in arguments.items()}
    names = [key for key, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad]

    def dropped(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = arguments | dict(zip(names, tensors, strict=True))
        return results(CASES[name].operation(**given, dropout_p=0.3, seed=torch.tensor([4])))

    tensors = [arguments[key].detach().requires_grad_() for key in names]
    assert torch.autograd.gradcheck(dropped, tensors, atol=1e-6, fast_mode=True)


@each_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_dropped_path_adds_nothing(dropout_p: float, backend: ops.Backend) -> None:
    given = CASES["linear_residual, scaled"].arguments()
    out = ops.linear_residual(**given, dropout_p=dropout_p, backend=backend)
    assert torch.equal(out[0], given["residual"][0])
    assert not torch.equal(out[1], given["residual"][1])
    branch = (
        ops.linear_residual(given["x"], given["weight"], None, given["residual"], dropout_p=0.5) - given["residual"]
    )
    kept = branch.abs() > 1e-6
    assert 0.3 < kept.float().mean() < 0.7
    whole = reference.linear(given["x"], given["weight"], None)
    torch.testing.assert_close(branch[kept], 2 * whole[kept], rtol=1e-4, atol=1e-4)


@each_backend
def test_a_nan_in_a_bias_reaches_its_query_alone(backend: ops.Backend) -> None:
    given = CASES["bias"].arguments()
    given["bias"][:, 0, 1, 2] = NAN
    unknown = torch.zeros(3, 5, 2, dtype=torch.bool)
    unknown[:, 1, 0] = True
    found = ops.bias_attention(**given, backend=backend)
    assert torch.equal(found.isnan(), unknown[..., None].expand(found.shape))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["relpos, masked", "bias, by entry", "varlen, masked"])
def test_a_query_that_sees_nothing_is_zero_and_moves_nothing(name: str, backend: ops.Backend) -> None:
    arguments = CASES[name].arguments(grad=True)
    rows, keys = (slice(0, 4), slice(0, 6)) if name.startswith("varlen") else (slice(1, 2), slice(1, 2))
    arguments["key_mask"][keys] = False
    out, dq, dk, dv, *_ = run(CASES[name], arguments, backend)
    assert not any(t[part].any() for t, part in ((out, rows), (dq, rows), (dk, keys), (dv, keys)))
    assert out.any()


@each_backend
@pytest.mark.parametrize("wide", [False, True])
def test_a_residual_stream_in_fp32(wide: bool, backend: ops.Backend) -> None:
    """The sum keeps the precision of the residual, and so does the norm where it is the next residual."""
    given = converted(CASES["add_layer_norm"].arguments(grad=True), torch.float16)
    given["residual"] = given["residual"].detach().float().requires_grad_()
    found = run(CASES["add_layer_norm"], given, backend, wide=wide)
    truth = run(CASES["add_layer_norm"], converted(given, torch.float64), "reference")
    assert [t.dtype for t in found[:2]] == [torch.float32 if wide else torch.float16, torch.float32]
    for ours, right in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=4e-3, atol=2e-2)


def test_padding_rows_of_the_tables_receive_no_gradient() -> None:
    arguments = CASES["embed_layer_norm"].arguments(grad=True)
    for backend in BACKENDS:
        _, word, position, *_ = run(CASES["embed_layer_norm"], arguments, backend, padding_idx=1)
        assert not word[1].any()
        assert not position[1].any()
        assert word[3].any()


@each_backend
def test_nothing_to_predict_and_huge_logits(backend: ops.Backend) -> None:
    case = CASES["linear_cross_entropy"]
    arguments = case.arguments(grad=True)
    assert not any(t.any() for t in run(case, arguments | {"target": torch.full((9,), -100)}, backend))
    with torch.no_grad():
        arguments["h"] *= 3000
    found = run(case, arguments, backend)
    truth = run(case, converted(arguments, torch.float64), "reference")
    assert truth[0] > 1e3
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=0)
    assert all(t.isfinite().all() for t in found)


@each_backend
def test_labels_of_every_integer_type(backend: ops.Backend) -> None:
    given = CASES["token_log_likelihood"].arguments() | {"target": torch.arange(9)}
    expected = ops.token_log_likelihood(**given, backend=backend)
    for kind in (torch.uint8, torch.int16, torch.int32):
        found = ops.token_log_likelihood(**given | {"target": torch.arange(9).to(kind)}, backend=backend)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_texts_of_one_length_are_exported(masked: bool) -> None:
    class Module(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (texts, length), keys = q.shape[:2], k.shape[1]
            bounds = [torch.arange(0, texts * n + 1, n, dtype=torch.int32) for n in (length, keys)]
            mask = torch.arange(keys).repeat(texts) != 1 if masked else None
            packed = (each.flatten(0, 1) for each in (q, k, v))
            return ops.varlen_attention(*packed, *bounds, length, keys, key_mask=mask)

    given = torch.randn(2, 5, 3, 16), torch.randn(2, 7, 3, 16), torch.randn(2, 7, 3, 16)
    program = export(Module(), given).run_decompositions()
    assert not [node for node in program.graph.nodes if "xfm_fast" in str(node.target)]
    torch.testing.assert_close(program.module()(*given), Module()(*given), rtol=1e-5, atol=1e-5)


def test_an_export_takes_batches_of_every_shape() -> None:
    layers, norm = CASES["mlp_residual"].arguments(), CASES["layer_norm"].arguments()
    words = CASES["token_log_likelihood"].arguments()

    class Layer(nn.Module):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            out = ops.mlp_residual(**layers | {"x": x, "residual": x})
            normed, _ = ops.add_layer_norm(out, x, norm["weight"], norm["bias"], 1e-5)
            return ops.token_log_likelihood(normed, words["w"], words["b"], target)

    axes = {0: Dim("entries", min=1, max=64), 1: Dim("tokens", min=1, max=64)}
    given = torch.randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.long)
    exported = export(Layer(), given, dynamic_shapes=(axes, axes))
    for shape in ((3, 7), (1, 1)):
        x, target = torch.randn(*shape, 32), torch.arange(math.prod(shape)).view(shape)
        torch.testing.assert_close(exported.module()(x, target), Layer()(x, target), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("library", CASES["relpos"].libraries, indirect=True)
@pytest.mark.usefixtures("library")
def test_what_a_row_of_the_bias_has_in_common_costs_no_digits(dtype: torch.dtype) -> None:
    """Entries of quarters, which no constant rounds."""
    window = (9, 16)
    q, k, v = (t.to(dtype).requires_grad_() for t in torch.randn(2, 145, 3, 3, 32).unbind(2))
    quarters = ((torch.randn(530, 3) * 4).round() / 4).requires_grad_()
    for mask in (None, (torch.arange(145) % 3 != 1).expand(2, -1)):

        def attend(table: Tensor, mask: Tensor | None = mask) -> list[Tensor]:
            out = ops.relpos_attention(q, k, v, table, window, key_mask=mask)
            return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, quarters))]

        found = attend(quarters)
        assert all(map(torch.equal, attend(quarters - 1e5), found))
        with torch.no_grad():
            assert_as_accurate(found[0], reference.relpos_attention, q, k, v, quarters, window, 32**-0.5, mask)


# What training keeps, and where.


def _kept(call: Callable[[], Any]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return kept


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        # The input of the GELU and the statistics of the norm: no normalised rows, hidden layer, branch or weights.
        ("layer_norm_mlp", [(3, 5, 64), (15,), (15,)]),
        ("mlp_residual", [(3, 5, 64)]),
        ("layer_norm_linear", [(15,), (15,)]),
        ("linear_residual", []),
        ("joined_linear", []),
    ],
)
def test_training_keeps_the_input_of_a_branch_alone(name: str, extra: list[tuple[int, ...]]) -> None:
    arguments = CASES[name].arguments(grad=True)
    own = {t.data_ptr() for t in arguments.values() if isinstance(t, Tensor)}
    kept = _kept(lambda: CASES[name].operation(**arguments))
    assert [tuple(t.shape) for t in kept if t.numel() and t.data_ptr() not in own] == extra


def test_autocast_keeps_parameters_and_not_their_copies() -> None:
    arguments = CASES["layer_norm_mlp"].arguments(grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept = _kept(lambda: CASES["layer_norm_mlp"].operation(**arguments))
    assert {arguments[name].data_ptr() for name in ("weight_in", "weight_out")} <= {t.data_ptr() for t in kept}


def test_cross_entropy_of_few_rows_keeps_no_gradient_of_the_vocabulary() -> None:
    h, w = (torch.randn(n, 64, requires_grad=True) for n in (3, 1000))
    kept = _kept(lambda: ops.linear_cross_entropy(h, w, None, torch.arange(3)))
    assert 0 < sum(t.nbytes for t in kept) < w.nbytes / 4


def test_linear_takes_its_operator_in_training_alone() -> None:
    """Exports, fp64 and other types of autocast see PyTorch's own."""

    def operator(dtype: torch.dtype = torch.float32) -> str:
        return str(CASES["linear"].operation(**CASES["linear"].arguments(dtype, grad=True)).grad_fn)

    assert "xfm_fast" in operator()
    assert "xfm_fast" not in operator(torch.float64)
    with torch.autocast("cpu", dtype=torch.float16):
        assert "xfm_fast" not in operator()
    with torch.no_grad():
        assert operator() == "None"


# Devices and blocks.


def test_a_position_bias_of_another_table_is_refused() -> None:
    given = CASES["relpos"].arguments()
    q, table = given["q"], given["table"]
    bias = ops.relpos_bias(table, (3, 5), dtype=q.dtype, scale=1.0)
    torch.testing.assert_close(CASES["relpos"].operation(**given, bias=bias), CASES["relpos"].operation(**given))
    for wrong, message in ((bias[:, 1:], "relpos_bias"), (bias.clone().requires_grad_(), "bias_attention")):
        with pytest.raises(InputError, match=message):
            CASES["relpos"].operation(**given, bias=wrong)
    with pytest.raises(InputError, match="table"):
        ops.relpos_bias(table[1:], (3, 5), dtype=q.dtype, scale=1.0)


def test_a_block_has_its_backend() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match="fast"), ops.use_backend("fast"):
        pass
    with ops.use_backend("reference"):
        assert resolve(None, x) == "reference"
        with ops.use_backend("cpu"):
            assert resolve(None, x) == "cpu"
        assert resolve(None, x) == "reference"
        assert resolve("auto", x) == "cpu"
    assert resolve(None, x) == "cpu"
    linear = CASES["linear"].arguments()
    with ops.use_backend("flash_attn"):
        assert ops.linear(**linear).shape == (3, 5, 64)
    with pytest.raises(InputError, match="flash_attn"):
        ops.linear(**linear, backend="flash_attn")


def test_contents_on_a_gpu_are_looked_at_within_a_block_only() -> None:
    """A tensor without contents stands for one on a GPU."""
    elsewhere = torch.zeros(3, device="meta")
    assert not checks.should_check_values(elsewhere)
    with ops.check_contents():
        assert checks.should_check_values(elsewhere)
        with ops.check_contents():
            pass
        assert checks.should_check_values(elsewhere)
    assert not checks.should_check_values(elsewhere)


def test_what_triton_kernels_cannot_run_stays_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_why_not", lambda name, device, index: None)
    x = torch.zeros(2, device="meta")
    assert resolve("auto", x) == "triton"
    assert resolve("auto", x, x.double()) == "reference"
    with pytest.raises(InputError, match="float64"):
        resolve("triton", x.double())
    x, weight = torch.zeros(1, 8193, device="meta"), torch.zeros(8193, device="meta")
    assert ops.layer_norm(x, weight, weight, 1e-5).shape == x.shape
    assert ops.add_layer_norm(x, x, weight, weight, 1e-5)[0].shape == x.shape
    given = CASES["varlen"].arguments() | {"dropout_p": 0.5, "seed": torch.tensor([3])}
    with pytest.raises(InputError, match="seed"):
        ops.varlen_attention(**given, backend="flash_attn")


def test_two_types_are_refused_on_a_device_that_has_no_autocast() -> None:
    x, weight = torch.empty(2, 8, device="meta"), torch.empty(6, 8, device="meta", dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"weight.*bfloat16"):
        ops.linear(x, weight, None, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear_gelu(torch.randn(3, 8).bfloat16(), torch.randn(6, 8), None).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("triton", "ptxas", "fault"),
    [("3.7.1", "13.3", None), ("3.6.0", "13.4", "Triton 3.6.0"), ("3.9.0+git1", "12.8", "ptxas 12.8")],
)
def test_attention_on_hopper_needs_a_compiler_without_faults(
    triton: str, ptxas: str, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other operations and other GPUs keep their kernels."""
    monkeypatch.setattr(backends, "_why_not", lambda name, device, index: None)
    monkeypatch.setattr(backends, "compiler_versions", lambda arch=90: (triton, ptxas))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    backends._warn.cache_clear()
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    if fault is None:
        assert resolve("auto", x, has_flash=True) == "triton"
    else:
        with pytest.warns(RuntimeWarning, match=fault):
            assert resolve("auto", x, has_flash=True) == "reference"
        with pytest.raises(InputError, match=fault):
            resolve("triton", x, has_flash=True)
    assert resolve("auto", x) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    assert resolve("auto", x, has_flash=True) == "triton"


# References by their definitions.


def test_position_index_by_its_definition() -> None:
    """Entry by entry: the distance of two patches, and three rows for the class token."""
    height, width = 3, 5
    index = reference.relative_position_index((height, width))
    rows = (2 * height - 1) * (2 * width - 1)
    assert index[0, 0] == rows + 2
    assert (index[0, 1:] == rows).all()
    assert (index[1:, 0] == rows + 1).all()
    for q in range(height * width):
        for k in range(height * width):
            dy, dx = q // width - k // width, q % width - k % width
            assert index[1 + q, 1 + k] == (dy + height - 1) * (2 * width - 1) + dx + width - 1


def test_packed_attention_is_attention_of_each_sequence() -> None:
    given = converted(CASES["varlen"].arguments(), torch.float64)
    q, k, v = (given[name] for name in "qkv")
    bounds_q, bounds_k = offsets(4, 0, 1, 12), offsets(6, 3, 0, 11)
    out = reference.varlen_attention(q, k, v, bounds_q, bounds_k, 0.5)
    for i in range(4):
        qs, ks = slice(*bounds_q[i : i + 2].tolist()), slice(*bounds_k[i : i + 2].tolist())
        part = torch.einsum("qhd,khd->hqk", q[qs] * 0.5, k[ks])
        torch.testing.assert_close(out[qs], torch.einsum("hqk,khd->qhd", part.softmax(-1), v[ks]))


def test_dropout_of_the_references_follows_from_its_seed() -> None:
    ones = torch.ones(100_000)
    drop = [reference._dropout(0.3, torch.tensor([seed]), ones.device)(ones) for seed in (5, 5, 6)]
    assert torch.equal(drop[0], drop[1])
    assert not torch.equal(drop[0], drop[2])
    kept = drop[0] != 0
    torch.testing.assert_close(drop[0][kept], torch.full_like(drop[0][kept], 1 / 0.7))
    # Five standard deviations.
    assert abs(kept.float().mean() - 0.7) < 5 * (0.3 * 0.7 / len(ones)) ** 0.5
