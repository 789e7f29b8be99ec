"""What every public operation promises, on every backend that runs without a GPU: one parametrised test a promise."""

# Operations take the arguments of their case by name, which no checker can know.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from torch.export import export
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.accuracy import assert_accurate, assert_below_ceiling, draws
from tests.kernels.cases import CASES, Arguments, converted, leaves, results, run
from tests.kernels.conftest import each_library
from tests.kernels.triton_testing import HAS_TRITON
from xfm_fast.errors import InputError
from xfm_fast.kernels import backend as backends
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.backend import resolve
from xfm_fast.kernels.cpu import losses
from xfm_fast.kernels.cpu.varlen import plan_of

NAN = math.nan
BACKENDS: tuple[ops.Backend, ...] = ("auto", "reference", *(("triton",) if HAS_TRITON else ()))


def quick(names: Iterable[str]) -> pytest.MarkDecorator:
    """Every case, of which these are in the quick suite."""
    return pytest.mark.parametrize(
        "name",
        [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
    )


each_operation = quick([name for name in CASES if "," not in name])
# Operators of each kind: with lists, options, several results, and symbolic sizes.
each_compiled = quick(
    [
        "relpos",
        "varlen",
        "add_layer_norm",
        "joined_linear",
        "layer_norm_mlp",
        "linear_cross_entropy",
    ]
)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def runnable(name: str, backend: ops.Backend) -> None:
    if backend == "triton" and "triton" not in CASES[name].forms:
        pytest.skip("there is no Triton kernel for these arguments")


# Every library trains in fp32 and infers in bf16; the plain one and our kernels, whose code differs, train in bf16 too.
WAYS = [
    pytest.param(
        name,
        library,
        grad,
        dtype,
        id=f"{name}-{library}-{'training' if grad else 'inference'}-{str(dtype)[6:]}",
    )
    for name, case in CASES.items()
    for library in case.libraries
    for grad, dtype in ((True, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16))
    if not (grad and dtype == torch.bfloat16) or library in ("aten", "llvm", "eager")
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


@pytest.mark.parametrize("n", [316, pytest.param(2522, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", [name for name in CASES if re.search("norm|linear,|linear$|gelu|residual", name)]
)
def test_gradients_of_many_rows_keep_what_these_have_in_common(
    name: str, dtype: torch.dtype, n: int
) -> None:
    """Sums over 1,580 and 12,610 rows of one sign, which stand still in half precision."""
    arguments = CASES[name].arguments(dtype, grad=True, n=n)

    def gradients(arguments: Arguments, backend: ops.Backend) -> tuple[Tensor, ...]:
        found = results(CASES[name].operation(**arguments, backend=backend))
        return torch.autograd.grad(
            found, leaves(arguments), [torch.full_like(t, 1 / 64) for t in found]
        )

    truth = gradients(converted(arguments, torch.float64), "reference")
    for i, (ours, right) in enumerate(zip(gradients(arguments, "auto"), truth, strict=True)):
        assert_below_ceiling(ours, right, f"gradient {i}")


@each_operation
@each_backend
def test_no_rows(name: str, backend: ops.Backend) -> None:
    runnable(name, backend)
    found = run(CASES[name], CASES[name].arguments(grad=True, n=0), backend)
    loss, *gradients = found
    if name.startswith("linear_cross_entropy"):
        # A mean over no rows is PyTorch's.
        assert loss.isnan()
    else:
        assert loss.isfinite().all()
    assert all(t.isfinite().all() for t in gradients)


@each_backend
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if "row_scale" in case.shapes(1)]
)
def test_factors_of_branches_have_a_gradient(name: str, backend: ops.Backend) -> None:
    arguments = CASES[name].arguments(grad=True)
    arguments["row_scale"] = torch.tensor([0.0, 1.25, 2.0], requires_grad=True)
    found = run(CASES[name], arguments, backend)
    truth = run(CASES[name], converted(arguments, torch.float64), "reference")
    for ours, right in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4)


@each_backend
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("present", [(), (False, False), (True, False), (False, True)])
def test_joined_layers_need_no_biases(
    present: tuple[bool, ...], grad: bool, backend: ops.Backend
) -> None:
    x, first, second, *biases = (
        torch.randn(shape, requires_grad=grad) for shape in ((5, 8), (6, 8), (3, 8), 6, 3)
    )
    weights, given = (
        [first, second],
        [b if there else None for b, there in zip(biases, present, strict=False)],
    )
    apart = [reference.linear(x, w, b) for w, b in zip(weights, given or [None, None], strict=True)]
    found, expected = ops.joined_linear(x, weights, given, backend=backend), torch.cat(apart, 1)
    torch.testing.assert_close(found, expected)
    if grad:
        wanted = [x, first, second, *(b for b in given if b is not None)]
        pairs = zip(
            *(torch.autograd.grad(t.square().sum(), wanted) for t in (found, expected)), strict=True
        )
        for ours, right in pairs:
            torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_joined_layers_that_do_not_fit_are_named(autocast: bool, grad: bool) -> None:
    """Before a concatenation could hide that one of them is of integers."""
    x, weight, whole = (
        torch.randn(5, 8, requires_grad=grad),
        torch.randn(6, 8),
        torch.ones(6, 8, dtype=torch.long),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for weights, biases, message in (
            ([weight, whole], [], r"weight \[6, 8\] int64"),
            ([weight, weight], [weight[:, 0], whole[:, 0]], r"bias \[6\] int64"),
            ([weight, weight[:, 1:]], [], r"weight \[6, 7\]"),
            ([weight, weight], [None], "2 weights and 1 biases"),
            ([], [], "0 weights"),
        ):
            with pytest.raises(InputError, match=message):
                ops.joined_linear(x, weights, biases)


@each_operation
def test_gradients_of_one_argument_are_those_of_all(name: str) -> None:
    arguments = CASES[name].arguments(grad=True)
    every = run(CASES[name], arguments)
    grads = every[len(every) - len(leaves(arguments)) :]
    for leaf, grad in zip(leaves(arguments), grads, strict=True):
        alone = {
            key: t.detach() if isinstance(t, Tensor) and t is not leaf else t
            for key, t in arguments.items()
        }
        torch.testing.assert_close(run(CASES[name], alone)[-1], grad, rtol=1e-4, atol=1e-4)


def _strided(value: Any) -> Any:
    """The same values, every other element of memory; what lies between must not be read."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    wide = torch.full((*value.shape, 2), NAN if value.is_floating_point() else 1).to(value.dtype)
    wide[..., 0] = value.detach()
    return wide[..., 0].requires_grad_(value.requires_grad)


@each_operation
@each_backend
def test_no_argument_need_be_contiguous(name: str, backend: ops.Backend) -> None:
    runnable(name, backend)
    arguments = CASES[name].arguments(grad=True)
    views = {key: _strided(value) for key, value in arguments.items()}
    before = [t.detach().clone() for t in leaves(views)]
    for found, right in zip(
        run(CASES[name], views, backend), run(CASES[name], arguments, backend), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert all(map(torch.equal, leaves(views), before)), "an operation wrote to its arguments"


@each_operation
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_waits_for_a_device(
    name: str, backend: ops.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stops an accelerator is not called on CPU either, so a training step can be watched for it."""
    arguments = CASES[name].arguments(grad=True)
    plan_of.cache_clear()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the value of a tensor was read")

    for method in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, method, refuse)
    found = results(CASES[name].operation(**arguments, backend=backend))
    torch.autograd.grad(found, leaves(arguments), [torch.ones_like(t) for t in found])


@each_compiled
def test_one_compilation_serves_every_number_of_rows(name: str) -> None:
    made: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        made.append(graph)
        return make_boxed_func(graph)

    def call(arguments: Arguments) -> tuple[Tensor, ...]:
        return results(CASES[name].operation(**arguments))

    torch._dynamo.reset()
    compiled = torch.compile(
        call, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=count)
    )
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
    wide = "residual" in arguments or "mlp" in name
    assert found[0].dtype == (torch.float32 if wide else CASES[name].autocast), "set Case.autocast"
    for ours, right in zip(found, exact, strict=True):
        assert float((ours.float() - right).norm()) <= 0.03 * float(right.norm())
    assert all(g.dtype == torch.float32 for g in found[-len(leaves(arguments)) :])


@each_operation
@each_backend
def test_second_derivatives_are_refused(name: str, backend: ops.Backend) -> None:
    """And first ones that are asked for with a graph stay what they are."""
    runnable(name, backend)
    arguments = CASES[name].arguments(grad=True)
    wanted = leaves(arguments)
    loss = sum(
        t.square().sum() for t in results(CASES[name].operation(**arguments, backend=backend))
    )
    assert isinstance(loss, Tensor)
    plain = torch.autograd.grad(loss, wanted, retain_graph=True)
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    assert all(map(torch.equal, first, plain))
    # PyTorch's own LayerNorm, attention and GEMMs on a GPU have second derivatives.
    own = backend == "reference" or (backend == "auto" and name in ("layer_norm", "relpos, masked"))
    own = own or (
        backend == "triton" and "transposed" in CASES[name].libraries and name != "linear_gelu"
    )
    for gradient in first if not own else ():
        with pytest.raises(InputError, match="reference"):
            torch.autograd.grad(
                gradient.square().sum(), wanted, allow_unused=True, retain_graph=True
            )


class Calls(TorchDispatchMode):
    """Within the block, calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("xfm_fast::"):
            self.calls[func.name()] = func, args
        return func(*args, **(kwargs or {}))


@each_compiled
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
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().clone().requires_grad_(grad and value.requires_grad)

        opcheck(operator, tuple(map(fresh, given)))


def test_every_operator_is_called_by_a_case() -> None:
    called: set[str] = set()
    for case in CASES.values():
        with Calls() as seen:
            run(case, case.arguments(grad=True))
        called |= {*seen.calls}
    registered = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("xfm_fast::")
    }
    # A CPU has PyTorch's own norm, makes no padded bias, and knows the gradients of a loss with the loss.
    only = {"layer_norm", "layer_norm_backward", "relpos_bias", "linear_cross_entropy_backward"}
    uncalled = {name.removeprefix("xfm_fast::") for name in registered - called}
    assert {name for name in uncalled if not name.startswith("toy")} == only


@each_operation
def test_transforms_see_the_reference(name: str) -> None:
    case = CASES[name]
    given, directions = (case.arguments(torch.float64, grad=True) for _ in range(2))
    names = [
        key for key, value in given.items() if isinstance(value, Tensor) and value.requires_grad
    ]

    def loss(*tensors: Tensor) -> Tensor:
        return sum(
            t.square().sum()
            for t in results(case.operation(**given | dict(zip(names, tensors, strict=True))))
        )  # type: ignore[return-value]

    wanted = [given[key] for key in names]
    expected = torch.autograd.grad(loss(*wanted), wanted)
    plain = tuple(t.detach() for t in wanted)
    ways = tuple(directions[key].detach() for key in names)
    for ours, right in zip(
        torch.func.grad(loss, tuple(range(len(names))))(*plain), expected, strict=True
    ):
        torch.testing.assert_close(ours, right)
    slope = sum((g * d).sum() for g, d in zip(expected, ways, strict=True))
    torch.testing.assert_close(torch.func.jvp(loss, plain, ways)[1], slope)


# Arguments that do not fit: operations, changed arguments, and what the error names.


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


REFUSED: list[tuple[str, Arguments, str]] = [
    ("relpos", {"q": _random(16, 2, 32)}, r"q.*\[16, 2, 32\]"),
    ("relpos", dict.fromkeys("qkv", _random(3, 16, 2, 0)), "heads"),
    ("relpos|bias", {"k": _random(3, 16, 2, 32).half()}, r"float16|\[3, 16, 2, 32\]"),
    *(("relpos", {"window": window}, "window") for window in ((-3, -5), 2)),
    ("relpos", {"table": _random(47, 2)}, r"table.*\[47, 2\].*\[48, 2\]"),
    *(("relpos|bias|varlen", {"scale": scale}, f"scale={scale}") for scale in (NAN, 0.0)),
    ("relpos|bias", {"key_mask": torch.ones(3, 9)}, "key_mask.*float32"),
    ("bias", {"k": _random(3, 9, 3, 32)}, r"k.*\[3, 9, 3, 32\]"),
    ("bias", {"bias": _random(2, 2, 5, 9)}, r"bias \[2, .*divisor of 3"),
    ("bias", {"bias": torch.ones(1, 2, 5, 9, dtype=torch.bool)}, "bias.*bool"),
    ("bias|varlen", {"seed": 3, "dropout_p": 0.1}, "seed=3"),
    ("varlen", {"k": _random(20, 2, 64), "v": _random(20, 2, 64)}, r"k.*\[20, 2, 64\]"),
    ("varlen", {"cu_seqlens_q": torch.tensor([0, 18, 4, 5, 17])}, "cu_seqlens_q"),
    ("varlen", {"cu_seqlens_k": torch.tensor([0, 6, 9, 9, 99]), "max_k": 95}, "cu_seqlens_k.* 99"),
    ("varlen", {"cu_seqlens_q": torch.tensor([1, 4, 4, 5, 17])}, "cu_seqlens_q.* 1 .*17"),
    ("varlen", {"cu_seqlens_k": torch.tensor([0, 20])}, r"cu_seqlens_k \[2\]"),
    ("varlen", {"max_q": 3}, "max_q=3.* 12"),
    (
        "varlen|bias|add_layer_norm|linear_residual|mlp_residual",
        {"dropout_p": NAN},
        "dropout_p=nan",
    ),
    ("add_layer_norm", {"residual": _random(5, 32)}, r"residual \[5, 32\]"),
    ("add_layer_norm|linear_residual|mlp_residual", {"gamma": _random(1)}, r"gamma.*\[1\]"),
    (
        "add_layer_norm|linear_residual|mlp_residual",
        {"row_scale": _random(2)},
        r"row_scale.*\[2\].*\[3\]",
    ),
    ("layer_norm|add_layer_norm", {"weight": _random(15)}, r"weight \[15\]"),
    ("layer_norm|add_layer_norm|embed_layer_norm", {"eps": -1.0}, "eps=-1.0"),
    ("embed_layer_norm", {"tokens": torch.zeros(3, 3)}, "tokens.*float32"),
    ("embed_layer_norm", {"type_row": _random(1, 32)}, r"type_row.*\[1, 32\]"),
    ("embed_layer_norm", {"padding_idx": 7}, "padding_idx=7"),
    ("linear|linear_gelu|linear_residual", {"weight": _random(64, 7)}, r"weight \[64, 7\]"),
    ("linear|linear_gelu|linear_residual", {"bias": _random(1)}, r"bias.*\[1\].*\[64\]"),
    (
        "linear|linear_gelu|linear_residual",
        {"x": _random(3, 5, 32).bfloat16()},
        "x.*bfloat16.*float32",
    ),
    ("mlp_residual", {"weight_out": _random(32, 11)}, r"weight_out \[32, 11\]"),
    ("linear_cross_entropy|token_log_likelihood", {"w": _random(50, 7)}, r"w \[50, 7\]"),
    ("linear_cross_entropy|token_log_likelihood", {"b": _random(50).double()}, "b.*float64"),
    (
        "linear_cross_entropy|token_log_likelihood",
        {"target": torch.zeros(4, dtype=torch.long)},
        r"target \[4\]",
    ),
    ("linear_cross_entropy|token_log_likelihood", {"target": torch.zeros(9)}, "target.*float32"),
    ("linear_cross_entropy", {"label_smoothing": NAN}, "label_smoothing=nan"),
]
OUTSIDE: list[tuple[str, Arguments, str]] = [
    ("embed_layer_norm", {"tokens": torch.full((3, 3), 11)}, "11"),
    ("embed_layer_norm", {"positions": torch.full((3, 3), -1)}, "-1"),
    ("linear_cross_entropy", {"target": torch.full((9,), 50)}, "50"),
    ("token_log_likelihood", {"target": torch.full((9,), -1)}, "-1"),
]


def test_arguments_that_do_not_fit_are_named() -> None:
    for names, changes, message in REFUSED:
        for name in names.split("|"):
            # `varlen` checks its offsets where they are read.
            for backend in BACKENDS if "varlen" in name else ("auto",):
                with pytest.raises(InputError, match=message):
                    CASES[name].operation(**CASES[name].arguments() | changes, backend=backend)


UNREADABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "jagged": lambda t: torch.nested.nested_tensor([t[0], t[0]], layout=torch.jagged),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[0]]),
    "coo": Tensor.to_sparse,
    "csr": Tensor.to_sparse_csr,
    "csc": Tensor.to_sparse_csc,
    "bsr": lambda t: t.to_sparse_bsr((1, 1)),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("layout", UNREADABLE)
@pytest.mark.parametrize("inference", [False, True])
def test_tensors_without_dense_memory_are_refused(layout: str, inference: bool) -> None:
    """In every argument of every operation, before anything reads their shapes."""
    tried = 0
    for case in CASES.values():
        arguments = case.arguments()
        if layout == "quantised" and "row_scale" in arguments:
            # Cases convert it to the dtype of x.
            continue
        for name, value in arguments.items():
            if not isinstance(value, Tensor):
                continue
            try:
                changed = UNREADABLE[layout](value)
            except (RuntimeError, TypeError, IndexError):
                # Not of this type or number of dimensions.
                continue
            tried += 1
            with (
                torch.inference_mode(inference),
                pytest.raises(InputError, match="nested, sparse or quantised"),
            ):
                case.operation(**arguments | {name: changed})
    assert tried > 20
    with pytest.raises(InputError, match="nested, sparse or quantised"):
        ops.relpos_bias(UNREADABLE[layout](_random(12, 2)), (2, 2), dtype=torch.float32, scale=0.25)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_a_mean_over_no_rows_is_pytorchs(backend: ops.Backend, grad: bool) -> None:
    h, w, b = (_random(*shape).requires_grad_(grad) for shape in ((0, 16), (50, 16), (50,)))
    target = torch.empty(0, dtype=torch.long)
    loss = ops.linear_cross_entropy(h, w, b, target, backend=backend)
    wanted = torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, w, b), target)
    torch.testing.assert_close(loss, wanted, equal_nan=True)
    if grad:
        found = torch.autograd.grad(loss, (h, w, b))
        torch.testing.assert_close(found, torch.autograd.grad(wanted, (h, w, b)))


@each_backend
def test_ids_outside_a_table(backend: ops.Backend) -> None:
    for name, changes, value in OUTSIDE:
        with pytest.raises(IndexError, match=value if backend != "reference" else None):
            CASES[name].operation(**CASES[name].arguments() | changes, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.empty(48, 2, device="meta")}, "cpu.*meta"),
        ({"key_mask": torch.ones(3, 16, dtype=torch.bool, device="meta")}, "cpu.*meta"),
        ({"backend": "flash_attn"}, "flash_attn|bias"),
        ({"backend": "triton"}, "triton"),
        ({"backend": "fast"}, "fast"),
    ],
    ids=str,
)
def test_a_backend_that_cannot_run_is_refused(
    change: Arguments, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=message):
        CASES["relpos"].operation(**CASES["relpos"].arguments() | change)


@each_backend
@pytest.mark.parametrize("name", ["varlen", "bias", "add_layer_norm"])
def test_dropout_follows_from_its_seed(name: str, backend: ops.Backend) -> None:
    """The gradient of a result that is linear in an argument drops what the result dropped."""
    linear = "x" if name == "add_layer_norm" else "v"
    arguments = converted(
        CASES[name].arguments(grad=True), torch.float32 if backend == "triton" else torch.float64
    )

    def once(seed: int) -> Tensor:
        found = CASES[name].operation(
            **arguments, dropout_p=0.4, seed=torch.tensor([seed]), backend=backend
        )
        return found[1] - arguments["residual"] if name == "add_layer_norm" else found

    assert torch.equal(once(3), once(3))
    assert not torch.equal(once(3), once(4))
    out = once(3)
    (gradient,) = torch.autograd.grad(out.sum(), arguments[linear])
    torch.testing.assert_close(
        (gradient * arguments[linear]).sum(), out.sum(), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("name", ["varlen, masked", "bias, by entry", "add_layer_norm"])
def test_dropped_gradients_by_finite_differences(name: str) -> None:
    arguments = CASES[name].arguments(torch.float64, grad=True, n=1)
    if name.startswith("varlen"):
        arguments = {k: v[..., :1, :3] if k in ("q", "k", "v") else v for k, v in arguments.items()}
    names = [
        key for key, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad
    ]

    def dropped(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = arguments | dict(zip(names, tensors, strict=True))
        return results(CASES[name].operation(**given, dropout_p=0.3, seed=torch.tensor([4])))

    tensors = [arguments[key].detach().requires_grad_() for key in names]
    assert torch.autograd.gradcheck(dropped, tensors, atol=1e-6, fast_mode=True)


def test_dropout_of_a_branch() -> None:
    given = CASES["linear_residual"].arguments() | {"gamma": None}
    branch = CASES["linear_residual"].operation(**given, dropout_p=0.5) - given["residual"]
    kept = branch.abs() > 1e-6
    assert 0.3 < kept.float().mean() < 0.7
    whole = reference.linear(given["x"], given["weight"], given["bias"])
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
def test_a_query_that_sees_nothing_is_zero_and_moves_nothing(
    name: str, backend: ops.Backend
) -> None:
    arguments = CASES[name].arguments(grad=True)
    rows, keys = (
        (slice(0, 4), slice(0, 6)) if name.startswith("varlen") else (slice(1, 2), slice(1, 2))
    )
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
    assert not any(
        t.any() for t in run(case, arguments | {"target": torch.full((9,), -100)}, backend)
    )
    with torch.no_grad():
        arguments["h"] *= 3000
    found = run(case, arguments, backend)
    truth = run(case, converted(arguments, torch.float64), "reference")
    assert truth[0] > 1e3
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=0)
    assert all(t.isfinite().all() for t in found)


@each_library("eager", "aten")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["linear_cross_entropy", "token_log_likelihood"])
def test_losses_in_bf16_run_what_measured_faster(
    name: str, autocast: bool, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits at once where they are no more than a block, or slices; labels and skipped rows are treated alike."""
    case, arguments = (
        CASES[name],
        CASES[name].arguments(torch.float32 if autocast else torch.bfloat16, grad=True),
    )

    def operators() -> set[str]:
        # The race that a first call runs has calls of its own.
        case.operation(**arguments)
        with Calls() as seen:
            case.operation(**arguments)
        return {*seen.calls}

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert bool(operators()) == (library != "eager")
        with torch.no_grad():
            assert bool(operators()) == (library != "eager")
        with pytest.raises(IndexError, match="50 is outside the vocabulary"):
            case.operation(**arguments | {"target": torch.full((9,), 50)})
        if name == "linear_cross_entropy":
            arguments["h"].data[2::4] = NAN
            assert all(t.isfinite().all() for t in run(case, arguments))
        monkeypatch.setattr(losses, "_BLOCK_BYTES", 9 * 50 * 2 - 1)
        assert operators()


@each_backend
def test_labels_of_another_integer_type(backend: ops.Backend) -> None:
    given = CASES["token_log_likelihood"].arguments() | {"target": torch.arange(9)}
    narrow = given | {"target": torch.arange(9).to(torch.uint8)}
    found = [ops.token_log_likelihood(**each, backend=backend) for each in (given, narrow)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_row_of_the_bias_has_in_common_costs_no_digits(dtype: torch.dtype) -> None:
    """Entries of quarters, which no constant rounds."""
    q, k, v = (t.to(dtype).requires_grad_() for t in torch.randn(2, 145, 3, 3, 32).unbind(2))
    quarters = ((torch.randn(530, 3) * 4).round() / 4).requires_grad_()

    def attend(table: Tensor) -> list[Tensor]:
        out = ops.relpos_attention(q, k, v, table, (9, 16))
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, quarters))]

    for ours, right in zip(attend(quarters - 1e5), attend(quarters), strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=0)


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
def test_training_keeps_the_input_of_a_branch_alone(
    name: str, extra: list[tuple[int, ...]]
) -> None:
    arguments = CASES[name].arguments(grad=True)
    own = {t.data_ptr() for t in arguments.values() if isinstance(t, Tensor)}
    kept = _kept(lambda: CASES[name].operation(**arguments))
    assert [tuple(t.shape) for t in kept if t.numel() and t.data_ptr() not in own] == extra


def test_autocast_keeps_parameters_and_not_their_copies() -> None:
    arguments = CASES["layer_norm_mlp"].arguments(grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        kept = _kept(lambda: CASES["layer_norm_mlp"].operation(**arguments))
    assert {arguments[name].data_ptr() for name in ("weight_in", "weight_out")} <= {
        t.data_ptr() for t in kept
    }


def test_cross_entropy_of_few_rows_keeps_no_gradient_of_the_vocabulary() -> None:
    h, w = (torch.randn(n, 64, requires_grad=True) for n in (3, 1000))
    kept = _kept(lambda: ops.linear_cross_entropy(h, w, None, torch.arange(3)))
    assert 0 < sum(t.nbytes for t in kept) < w.nbytes / 4


# Devices and blocks.


def test_a_position_bias_of_another_table_is_refused() -> None:
    given = CASES["relpos"].arguments()
    q, table = given["q"], given["table"]
    bias = ops.relpos_bias(table, (3, 5), dtype=q.dtype, scale=1.0)
    torch.testing.assert_close(
        CASES["relpos"].operation(**given, bias=bias), CASES["relpos"].operation(**given)
    )
    for wrong, message in (
        (bias[:, 1:], "relpos_bias"),
        (bias.clone().requires_grad_(), "bias_attention"),
    ):
        with pytest.raises(InputError, match=message):
            CASES["relpos"].operation(**given, bias=wrong)
    with pytest.raises(InputError, match="table"):
        ops.relpos_bias(table[1:], (3, 5), dtype=q.dtype, scale=1.0)


def test_a_block_has_its_backend() -> None:
    x = torch.randn(2, 4)
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


def test_attention_on_hopper_and_blackwell_needs_a_compiler_without_faults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other operations and other GPUs keep their kernels."""
    assert backends.hopper_fault("3.7.1", "13.3") is None
    assert "Triton 3.6.0" in str(backends.hopper_fault("3.6.0", "13.4"))
    assert "ptxas 12.8" in str(backends.hopper_fault("3.9.0+git1", "12.8"))
    monkeypatch.setattr(backends, "_why_not", lambda name, device, index: None)
    monkeypatch.setattr(backends, "compiler_versions", lambda arch=90: ("3.6.0", "13.4"))
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    monkeypatch.setattr(backends, "plain", lambda *tensors: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    backends._warn.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"Triton 3\.6\.0"):
        assert resolve("auto", x, has_flash=True) == "reference"
    with pytest.raises(InputError, match=r"Triton 3\.6\.0"):
        resolve("triton", x, has_flash=True)
    assert resolve("auto", x) == "triton"
    for capability, backend in (((8, 0), "triton"), ((10, 0), "reference"), ((12, 0), "triton")):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda index=None, found=capability: found
        )
        assert resolve("auto", x, has_flash=True) == backend
    assert backends.blackwell_fault("3.9.0+git1") is None


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
