"""The public operations against their definitions: every backend and precision, odd sizes, views, masks, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.conftest import each_library
from xfm_fast.kernels import derived as derived_module
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.backend import resolve
from xfm_fast.kernels.derived import derived

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
BACKENDS: list[ops.Backend] = ["auto", "cpu"]
# Windows of 1, 4, 16, 49 patches, and two that are not square.
WINDOWS = [(1, 1), (2, 2), (4, 4), (7, 7), (3, 5), (6, 2)]

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def attention_inputs(
    window: tuple[int, int], dtype: torch.dtype, *, batch: int = 2, heads: int = 3, width: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as views of one projection, the way the model gives them, and a position table."""
    height, breadth = window
    qkv = torch.randn(batch, 1 + height * breadth, 3, heads, width).to(dtype)
    table = torch.randn((2 * height - 1) * (2 * breadth - 1) + 3, heads).to(dtype)
    q, k, v = qkv.unbind(2)
    return q, k, v, table


def scale_of(q: Tensor) -> float:
    return q.shape[-1] ** -0.5


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 5), (4, 1)])
def test_position_index_by_its_definition(window: tuple[int, int]) -> None:
    """Entry by entry: the distance of two patches, and three rows for the class token."""
    height, width = window
    index = reference.relative_position_index(window)
    rows = (2 * height - 1) * (2 * width - 1)
    assert index.shape == (1 + height * width,) * 2
    assert index[0, 0] == rows + 2
    assert (index[0, 1:] == rows).all()
    assert (index[1:, 0] == rows + 1).all()
    for q in range(height * width):
        for k in range(height * width):
            dy, dx = q // width - k // width, q % width - k % width
            assert index[1 + q, 1 + k] == (dy + height - 1) * (2 * width - 1) + dx + width - 1


@each_backend
@each_dtype
@pytest.mark.parametrize("window", WINDOWS)
@each_library("aten", "tiled", "exp2", "onednn")
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_relpos_attention(window: tuple[int, int], dtype: torch.dtype, backend: ops.Backend) -> None:
    q, k, v, table = attention_inputs(window, dtype)
    found = ops.relpos_attention(q, k, v, table, window, backend=backend)
    assert_as_accurate(found, reference.relpos_attention, q, k, v, table, window, scale_of(q))


@each_dtype
@pytest.mark.parametrize(("heads", "width"), [(1, 64), (2, 80), (5, 7)])
@each_library("aten", "tiled", "exp2", "onednn")
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_relpos_attention_of_other_heads(heads: int, width: int, dtype: torch.dtype) -> None:
    q, k, v, table = attention_inputs((3, 4), dtype, heads=heads, width=width)
    found = ops.relpos_attention(q, k, v, table, (3, 4), scale=0.3)
    assert_as_accurate(found, reference.relpos_attention, q, k, v, table, (3, 4), 0.3)


@each_backend
@each_dtype
@each_library("aten", "tiled", "exp2", "onednn")
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_relpos_attention_with_hidden_keys(dtype: torch.dtype, backend: ops.Backend) -> None:
    q, k, v, table = attention_inputs((3, 5), dtype)
    mask = torch.rand(2, 16) < 0.5
    mask[:, 0] = True
    found = ops.relpos_attention(q, k, v, table, (3, 5), key_mask=mask, backend=backend)
    assert_as_accurate(found, reference.relpos_attention, q, k, v, table, (3, 5), scale_of(q), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("offset", "factor"), [(50.0, 1.0), (-1e5, 1.0), (0.0, 1e4)])
@each_library("aten", "tiled", "exp2", "onednn", "llvm")
@pytest.mark.usefixtures("library")
def test_what_a_row_of_the_bias_has_in_common_costs_no_digits(
    offset: float, factor: float, masked: bool, dtype: torch.dtype
) -> None:
    """Entries of quarters, which no constant rounds."""
    window = (9, 16)
    q, k, v, table = attention_inputs(window, torch.float32, width=32)
    q, k, v = (t.to(dtype).requires_grad_() for t in (q, k, v))
    quarters = ((table * 4).round() / 4 * factor).requires_grad_()
    mask = torch.arange(145) % 3 != 1 if masked else None
    mask = None if mask is None else mask.expand(2, -1)

    def attend(table: Tensor) -> list[Tensor]:
        out = ops.relpos_attention(q, k, v, table, window, key_mask=mask)
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, quarters))]

    for found, expected in zip(attend(quarters + offset), attend(quarters), strict=True):
        assert torch.equal(found, expected)
    q, k, v, quarters = (t.detach() for t in (q, k, v, quarters))
    found = ops.relpos_attention(q, k, v, quarters, window, key_mask=mask)
    assert_as_accurate(found, reference.relpos_attention, q, k, v, quarters, window, scale_of(q), mask)


@each_dtype
@torch.inference_mode()
def test_relpos_attention_of_views(dtype: torch.dtype) -> None:
    """Permuted and strided inputs give what their copies give."""
    q, k, v, table = attention_inputs((2, 3), dtype)
    views = q.transpose(1, 2).contiguous().transpose(1, 2), k.flip(0).flip(0), torch.stack([v, v], -1)[..., 0]
    wide = torch.stack([table, table], -1)[..., 1]
    assert not any(t.is_contiguous() for t in (views[0], views[2], wide))
    found = ops.relpos_attention(*views, wide, (2, 3))
    assert_as_accurate(found, reference.relpos_attention, q, k, v, table, (2, 3), scale_of(q))


LENGTHS = {
    "texts": ([3, 12, 1, 7], [3, 12, 1, 7]),
    "one token each": ([1, 1, 1], [5, 5, 5]),
    "groups over images": ([0, 40, 3, 0, 17], [17, 17, 17, 17, 17]),
    "no queries": ([0, 0], [4, 2]),
    "no keys": ([2, 3, 1], [4, 0, 2]),
    "no keys at all": ([2, 1], [0, 0]),
    "nothing": ([], []),
    "one long": ([70], [130]),
    "long among short": ([2, 90, 1, 3], [5, 80, 5, 0]),
}


def ragged(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed_inputs(
    name: str, dtype: torch.dtype, *, heads: int = 3, width: int = 16
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
    queries, keys = LENGTHS[name]
    q = torch.randn(sum(queries), heads, width).to(dtype)
    k, v = torch.randn(sum(keys), 2, heads, width).to(dtype).unbind(1)
    return q, k, v, ragged(queries), ragged(keys), max(queries, default=0), max(keys, default=0)


@each_backend
@each_dtype
@pytest.mark.parametrize("name", LENGTHS)
@each_library("aten", "tiled", "exp2", "onednn")
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_varlen_attention(name: str, dtype: torch.dtype, backend: ops.Backend) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k = packed_inputs(name, dtype)
    found = ops.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, backend=backend)
    assert_as_accurate(found, reference.varlen_attention, q, k, v, cu_q, cu_k, scale_of(q))
    for i, (start, stop) in enumerate(pairwise(cu_q.tolist())):
        if not LENGTHS[name][1][i]:
            assert not found[start:stop].any()


@each_dtype
@pytest.mark.parametrize(("heads", "width"), [(1, 64), (2, 80), (5, 7)])
@each_library("aten", "tiled", "exp2", "onednn")
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_varlen_attention_of_other_heads(heads: int, width: int, dtype: torch.dtype) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k = packed_inputs("long among short", dtype, heads=heads, width=width)
    found = ops.varlen_attention(q, k, v, cu_q.long(), cu_k.long(), max_q + 3, max_k + 3, scale=0.3)
    assert_as_accurate(found, reference.varlen_attention, q, k, v, cu_q, cu_k, 0.3)


@each_dtype
@pytest.mark.parametrize("name", ["texts", "groups over images", "long among short"])
@each_library("aten", "tiled", "exp2", "onednn")
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_varlen_attention_with_hidden_keys(name: str, dtype: torch.dtype) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k = packed_inputs(name, dtype)
    mask = torch.rand(len(k)) < 0.5
    # One sequence loses all of its keys: its queries receive zeros.
    mask[cu_k[1] : cu_k[2]] = False
    found = ops.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k, key_mask=mask)
    assert_as_accurate(found, reference.varlen_attention, q, k, v, cu_q, cu_k, scale_of(q), 0.0, mask)
    assert not found[cu_q[1] : cu_q[2]].any()


@torch.inference_mode()
def test_varlen_attention_of_views() -> None:
    q, k, v, cu_q, cu_k, max_q, max_k = packed_inputs("texts", torch.float32)
    views = q.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([k, k], -1)[..., 1], v.flip(0).flip(0)
    found = ops.varlen_attention(*views, cu_q, cu_k, max_q, max_k)
    assert_as_accurate(found, reference.varlen_attention, q, k, v, cu_q, cu_k, scale_of(q))


@each_backend
@each_dtype
@pytest.mark.parametrize(
    ("shape", "outputs"), [((5, 7), 3), ((2, 3, 24), 17), ((1, 64), 128), ((0, 8), 4), ((63, 111), 50)]
)
@each_library("aten", "onednn", "onednn-packed", "onednn+gelu")
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_linear_layers(shape: tuple[int, ...], outputs: int, dtype: torch.dtype, backend: ops.Backend) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(outputs, shape[-1]).to(dtype)
    bias, residual = torch.randn(outputs).to(dtype), torch.randn(*shape[:-1], outputs).to(dtype)
    gamma = torch.rand(outputs).to(dtype)
    for b in (bias, None):
        assert_as_accurate(ops.linear(x, weight, b, backend=backend), reference.linear, x, weight, b)
        assert_as_accurate(ops.linear_gelu(x, weight, b, backend=backend), reference.linear_gelu, x, weight, b)
        for scale in (gamma, None):
            found = ops.linear_residual(x, weight, b, residual, gamma=scale, backend=backend)
            assert_as_accurate(found, reference.linear_residual, x, weight, b, residual, scale, None)


@each_dtype
@each_library("aten", "onednn", "onednn-packed", "onednn+gelu")
@pytest.mark.usefixtures("library")
@torch.inference_mode()
def test_linear_layers_of_views(dtype: torch.dtype) -> None:
    x, weight = torch.randn(24, 2, 5).to(dtype).permute(1, 2, 0), torch.randn(24, 9).to(dtype).t()
    bias, residual = torch.randn(18).to(dtype)[::2], torch.randn(9, 2, 5).to(dtype).permute(1, 2, 0)
    assert_as_accurate(ops.linear(x, weight, bias), reference.linear, x, weight, bias)
    assert_as_accurate(ops.linear_gelu(x, weight, bias), reference.linear_gelu, x, weight, bias)
    found = ops.linear_residual(x, weight, bias, residual)
    assert_as_accurate(found, reference.linear_residual, x, weight, bias, residual, None, None)


@torch.inference_mode()
def test_no_operation_writes_to_its_inputs() -> None:
    x, weight, bias, residual = torch.randn(4, 8), torch.randn(8, 8), torch.randn(8), torch.randn(4, 8)
    q, k, v, table = attention_inputs((2, 2), torch.float32)
    given = (x, weight, bias, residual, q, k, v, table)
    before = [t.clone() for t in given]
    ops.linear(x, weight, bias)
    ops.linear_gelu(x, weight, bias)
    ops.linear_residual(x, weight, bias, residual, gamma=bias)
    ops.relpos_attention(q, k, v, table, (2, 2))
    cu_seqlens = ragged([5, 5])
    ops.varlen_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, cu_seqlens, 5, 5)
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now, then)


def test_stochastic_depth_and_dropout() -> None:
    x, weight, residual = torch.randn(3, 4, 8), torch.randn(8, 8), torch.randn(3, 4, 8)
    rows = torch.tensor([0.0, 2.0, 1.0])
    found = ops.linear_residual(x, weight, None, residual, row_scale=rows)
    assert torch.equal(found[0], residual[0])
    assert torch.allclose(found[1], residual[1] + 2 * (x[1] @ weight.t()), atol=1e-5)
    branch = ops.linear_residual(x, weight, None, residual, dropout_p=0.5) - residual
    dropped = branch == 0
    assert 0 < dropped.float().mean() < 1
    assert torch.allclose(branch[~dropped], 2 * (x @ weight.t())[~dropped], rtol=1e-4, atol=1e-4)


def gradients(function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> list[Tensor]:
    leaves = [
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    ]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(5)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    found = [leaf.grad for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


CASES: dict[str, Callable[[torch.dtype], tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...]]]] = {
    "relpos": lambda dtype: (
        lambda q, k, v, t: ops.relpos_attention(q, k, v, t, (3, 2)),
        lambda q, k, v, t: reference.relpos_attention(q, k, v, t, (3, 2), 0.25),
        attention_inputs((3, 2), dtype),
    ),
    "relpos with hidden keys": lambda dtype: (
        lambda q, k, v, t: ops.relpos_attention(q, k, v, t, (3, 2), key_mask=HIDDEN),
        lambda q, k, v, t: reference.relpos_attention(q, k, v, t, (3, 2), 0.25, HIDDEN),
        attention_inputs((3, 2), dtype),
    ),
    "varlen": lambda dtype: (
        lambda q, k, v, a, b: ops.varlen_attention(q, k, v, a, b, 90, 80),
        lambda q, k, v, a, b: reference.varlen_attention(q, k, v, a, b, 0.25),
        packed_inputs("long among short", dtype)[:5],
    ),
    "linear residual": lambda dtype: (
        lambda x, w, b, r, g: ops.linear_residual(x, w, b, r, gamma=g),
        lambda x, w, b, r, g: reference.linear_residual(x, w, b, r, g, None),
        tuple(torch.randn(s).to(dtype) for s in ((5, 7), (9, 7), (9,), (5, 9), (9,))),
    ),
    "linear gelu": lambda dtype: (
        ops.linear_gelu,
        reference.linear_gelu,
        tuple(torch.randn(s).to(dtype) for s in ((5, 7), (9, 7), (9,))),
    ),
}
HIDDEN = torch.tensor([[True, True, False, True, False, True, True], [True, False, False, True, True, True, False]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
@each_library("aten", "onednn", "tiled", "transposed")
@pytest.mark.usefixtures("library")
def test_gradients_of_the_trainable_path(name: str, dtype: torch.dtype) -> None:
    fast, definition, arguments = CASES[name](dtype)
    found = gradients(fast, arguments)
    for i, gradient in enumerate(found):
        assert_as_accurate(gradient, lambda *given, i=i: gradients(definition, given)[i], *arguments)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    fast, _, arguments = CASES[name](torch.float64)
    if name == "varlen":
        arguments = (
            *packed_inputs("no keys", torch.float64, heads=1, width=3)[:3],
            ragged([2, 3, 1]),
            ragged([4, 0, 2]),
        )
    leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in arguments]
    assert torch.autograd.gradcheck(fast, leaves)


def test_inference_first_does_not_hinder_training() -> None:
    """What inference mode leaves in the caches (plans, indices, concatenated weights) must serve a backward pass."""
    derived_module.clear()
    for name in ("relpos", "varlen"):
        fast, _, arguments = CASES[name](torch.float64)
        with torch.inference_mode():
            fast(*arguments)
        assert all(bool(g.isfinite().all()) for g in gradients(fast, arguments))
    frozen = nn.Parameter(torch.randn(4, 3), requires_grad=False)
    with torch.inference_mode():
        derived("doubled", (frozen,), lambda: frozen * 2)
    x = torch.randn(2, 3, requires_grad=True)
    (x @ derived("doubled", (frozen,), lambda: frozen * 2).t()).sum().backward()
    assert x.grad is not None


def changed_by_optimizer(layer: nn.Linear) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.1).step()
    layer.weight.grad = None


def changed_by_load_state_dict(layer: nn.Linear) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def changed_by_assignment(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2


def changed_by_conversion(layer: nn.Linear) -> None:
    layer.double()


def changed_in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(3)


@pytest.mark.parametrize(
    "change",
    [changed_by_optimizer, changed_by_load_state_dict, changed_by_assignment, changed_by_conversion, changed_in_place],
)
def test_derived_tensors_follow_their_parameters(change: Callable[[nn.Linear], None]) -> None:
    layer = nn.Linear(3, 4)

    def doubled() -> Tensor:
        return derived("doubled", (layer.weight, layer.bias), lambda: layer.weight.detach() * 2)

    kept = doubled()
    assert doubled() is kept
    change(layer)
    assert torch.equal(doubled(), layer.weight.detach() * 2)
    assert doubled() is doubled()


def test_nothing_derived_within_a_graph_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph fills its own memory, and goes on reading what it was captured with."""
    weight = nn.Parameter(torch.ones(2))
    kept = derived("twice", (weight,), lambda: weight.detach() * 2)
    monkeypatch.setattr(derived_module, "_capturing", lambda source: source is weight)
    captured = derived("twice", (weight,), lambda: weight.detach() * 2)
    assert captured is not kept
    with derived_module.held():
        assert derived("twice", (weight,), lambda: weight.detach() * 2) is kept
    monkeypatch.undo()
    assert derived("twice", (weight,), lambda: weight.detach() * 2) is kept


def test_another_stream_waits_for_what_is_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Stream:
        def record_event(self) -> str:
            return "filled"

        def wait_event(self, event: str) -> None:
            said.append(event)

    class Value(torch.Tensor):
        def record_stream(self, stream: Any) -> None:
            said.append("recorded")

    streams = [Stream(), Stream()]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[0])
    filled = derived_module._Filled(torch.device("cuda:1"))
    value = torch.zeros(1).as_subclass(Value)
    filled.wait(value)
    assert said == []
    streams.reverse()
    filled.wait((value, 3))
    assert said == ["filled", "recorded"]


def test_derived_tensors_die_with_their_parameter() -> None:
    derived_module.clear()
    layer = nn.Linear(2, 2)
    derived("ones", (layer.weight,), lambda: torch.ones(2))
    assert len(derived_module._entries) == 1
    del layer
    assert len(derived_module._entries) == 0


@pytest.mark.parametrize("change", [changed_by_optimizer, changed_by_load_state_dict, changed_by_assignment])
@each_library("aten", "onednn", "onednn-packed")
@pytest.mark.usefixtures("library")
@torch.no_grad()
def test_packed_weights_follow_their_parameters(change: Callable[[nn.Linear], None]) -> None:
    """The same through an operation: whichever implementation is chosen, no stale weight is multiplied."""
    layer, x = nn.Linear(32, 16), torch.randn(5, 32)
    ops.linear(x, layer.weight, layer.bias)
    ops.linear_residual(x, layer.weight, layer.bias, torch.zeros(5, 16), gamma=torch.ones(16))
    change(layer)
    assert_as_accurate(ops.linear(x, layer.weight, layer.bias), reference.linear, x, layer.weight, layer.bias)
    twin = copy.deepcopy(layer)
    assert torch.equal(ops.linear(x, layer.weight, layer.bias), ops.linear(x, twin.weight, twin.bias))


MUTATIONS: dict[str, Callable[[], tuple[Tensor, Callable[..., Tensor], tuple[Any, ...]]]] = {}


def mutation(function: Callable[[], tuple[Tensor, Callable[..., Tensor], tuple[Any, ...]]]) -> None:
    MUTATIONS[function.__name__] = function


@mutation
def wrong_scale() -> tuple[Tensor, Callable[..., Tensor], tuple[Any, ...]]:
    q, k, v, table = attention_inputs((4, 4), torch.float32)
    wrong = ops.relpos_attention(q, k, v, table, (4, 4), scale=scale_of(q) * (1 + 1e-4))
    return wrong, reference.relpos_attention, (q, k, v, table, (4, 4), scale_of(q))


@mutation
def transposed_bias() -> tuple[Tensor, Callable[..., Tensor], tuple[Any, ...]]:
    q, k, v, table = attention_inputs((2, 2), torch.float32)
    bias = reference.position_bias(table, (2, 2)).transpose(1, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale_of(q) + bias
    wrong = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return wrong, reference.relpos_attention, (q, k, v, table, (2, 2), scale_of(q))


@mutation
def class_rows_exchanged() -> tuple[Tensor, Callable[..., Tensor], tuple[Any, ...]]:
    q, k, v, table = attention_inputs((2, 2), torch.float32)
    exchanged = table[[*range(9), 10, 9, 11]]
    wrong = ops.relpos_attention(q, k, v, exchanged, (2, 2))
    return wrong, reference.relpos_attention, (q, k, v, table, (2, 2), scale_of(q))


@mutation
def offsets_off_by_one() -> tuple[Tensor, Callable[..., Tensor], tuple[Any, ...]]:
    q, k, v, cu_q, cu_k, max_q, max_k = packed_inputs("texts", torch.float32)
    shifted = cu_k.clone()
    shifted[2] -= 1
    wrong = ops.varlen_attention(q, k, v, cu_q, shifted, max_q, max_k + 1)
    return wrong, reference.varlen_attention, (q, k, v, cu_q, cu_k, scale_of(q))


@mutation
def tanh_gelu() -> tuple[Tensor, Callable[..., Tensor], tuple[Any, ...]]:
    x, weight, bias = torch.randn(5, 7), torch.randn(9, 7), torch.randn(9)
    wrong = nn.functional.gelu(nn.functional.linear(x, weight, bias), approximate="tanh")
    return wrong, reference.linear_gelu, (x, weight, bias)


@mutation
def gamma_on_the_residual() -> tuple[Tensor, Callable[..., Tensor], tuple[Any, ...]]:
    x, weight, residual, gamma = torch.randn(5, 7), torch.randn(9, 7), torch.randn(5, 9), torch.rand(9)
    wrong = gamma * (residual + nn.functional.linear(x, weight))
    return wrong, reference.linear_residual, (x, weight, None, residual, gamma, None)


@mutation
def a_row_left_unwritten() -> tuple[Tensor, Callable[..., Tensor], tuple[Any, ...]]:
    q, k, v, cu_q, cu_k, max_q, max_k = packed_inputs("texts", torch.float32)
    wrong = ops.varlen_attention(q, k, v, cu_q, cu_k, max_q, max_k)
    wrong[-1] = torch.nan
    return wrong, reference.varlen_attention, (q, k, v, cu_q, cu_k, scale_of(q))


@pytest.mark.parametrize("name", MUTATIONS)
@torch.no_grad()
def test_the_criterion_catches(name: str) -> None:
    wrong, definition, arguments = MUTATIONS[name]()
    with pytest.raises(AssertionError, match="exceeds"):
        assert_as_accurate(wrong, definition, *arguments)


def test_backend_of_a_block() -> None:
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match="fast"), ops.use_backend("fast"):  # type: ignore[arg-type]
        pass
    with ops.use_backend("reference"):
        assert resolve(None, x, weight) == "reference"
        with ops.use_backend("cpu"):
            assert resolve(None, x, weight) == "cpu"
        assert resolve(None, x, weight) == "reference"
        assert resolve("auto", x, weight) == "cpu"
    assert resolve(None, x, weight) == "cpu"


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_dropped_path_adds_nothing_with_or_without_dropout(dropout_p: float) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 5, 8), torch.randn(3, 5, 4), torch.randn(4, 8)
    out = ops.linear_residual(x, weight, None, residual, row_scale=torch.tensor([0.0, 2.0, 0.0]), dropout_p=dropout_p)
    assert torch.equal(out[0], residual[0])
    assert torch.equal(out[2], residual[2])
    assert not torch.equal(out[1], residual[1])


def test_dropout_of_the_definitions_follows_from_its_seed() -> None:
    ones = torch.ones(100_000)
    drop = [reference._dropout(0.3, torch.tensor([seed]), ones.device)(ones) for seed in (5, 5, 6)]
    assert torch.equal(drop[0], drop[1])
    assert not torch.equal(drop[0], drop[2])
    kept = drop[0] != 0
    torch.testing.assert_close(drop[0][kept], torch.full_like(drop[0][kept], 1 / 0.7))
    # Five standard deviations.
    assert abs(kept.float().mean() - 0.7) < 5 * (0.3 * 0.7 / len(ones)) ** 0.5
