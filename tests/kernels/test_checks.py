"""Arguments that do not fit are refused by name, on every backend that runs without a GPU, and never become garbage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_testing import HAS_TRITON
from xfm_fast.errors import InputError
from xfm_fast.kernels import backend as backends
from xfm_fast.kernels import ops
from xfm_fast.kernels.backend import resolve

NAN = float("nan")
Arguments = dict[str, Any]


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _relpos() -> Arguments:
    q = _random(2, 5, 2, 32)
    return {"q": q, "k": q + 1, "v": q - 1, "table": _random(12, 2), "window": (2, 2)}


def _varlen() -> Arguments:
    return {
        "q": _random(7, 2, 32),
        "k": _random(9, 2, 32),
        "v": _random(9, 2, 32),
        "cu_seqlens_q": _offsets(0, 3, 7),
        "cu_seqlens_k": _offsets(0, 4, 9),
        "max_q": 4,
        "max_k": 5,
    }


def _bias() -> Arguments:
    return {
        "q": _random(4, 3, 2, 32),
        "k": _random(4, 5, 2, 32),
        "v": _random(4, 5, 2, 32),
        "bias": _random(1, 2, 3, 5),
    }


def _norm() -> Arguments:
    return {"x": _random(3, 4, 16), "residual": _random(3, 4, 16), "weight": _random(16), "bias": _random(16), "eps": 0}


def _plain_norm() -> Arguments:
    return {name: value for name, value in _norm().items() if name != "residual"}


def _embedding() -> Arguments:
    tables = {"word": _random(4, 16), "position": _random(3, 16), "type_row": _random(16)}
    ids = {"tokens": torch.tensor([[1, 2], [3, 0]]), "positions": torch.tensor([[0, 1], [2, 1]])}
    return ids | tables | {"weight": _random(16), "bias": _random(16), "eps": 1e-5}


def _linear() -> Arguments:
    return {"x": _random(3, 8), "weight": _random(6, 8), "bias": _random(6)}


def _branch() -> Arguments:
    return _linear() | {"residual": _random(3, 6)}


def _mlp() -> Arguments:
    x = _random(3, 8)
    inner = {"weight_in": _random(12, 8), "bias_in": _random(12)}
    return {"x": x, "residual": x} | inner | {"weight_out": _random(8, 12), "bias_out": _random(8)}


def _vocabulary() -> Arguments:
    labels = torch.tensor([0, 3, 10, -100, 2])
    return {"h": _random(5, 8), "w": _random(11, 8), "b": _random(11), "target": labels}


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "relpos": (ops.relpos_attention, _relpos),
    "varlen": (ops.varlen_attention, _varlen),
    "bias": (ops.bias_attention, _bias),
    "add norm": (ops.add_layer_norm, _norm),
    "norm": (ops.layer_norm, _plain_norm),
    "embedding": (ops.embed_layer_norm, _embedding),
    "linear": (ops.linear, _linear),
    "gelu": (ops.linear_gelu, _linear),
    "branch": (ops.linear_residual, _branch),
    "mlp": (ops.mlp_residual, _mlp),
    "loss": (ops.linear_cross_entropy, _vocabulary),
    "likelihood": (ops.token_log_likelihood, _vocabulary),
}

# (operations, changed arguments, the name and value in the message)
REFUSED: list[tuple[str, Arguments, str]] = [
    ("relpos", {"q": _random(5, 2, 32)}, r"q.*\[5, 2, 32\]"),
    ("relpos", dict.fromkeys("qkv", _random(2, 5, 2, 0)), "heads"),
    ("relpos", dict.fromkeys("qkv", torch.ones(2, 5, 2, 32, dtype=torch.long)), "int64"),
    ("relpos", {"k": _random(2, 5, 2, 32).half()}, "float16"),
    ("relpos", {"window": (3, 2)}, "5 .*3x2 window.* 7"),
    ("relpos", {"window": (2, 2, 2)}, r"window.*\(2, 2, 2\)"),
    ("relpos", {"window": (-2, -2)}, r"window.*\(-2, -2\)"),
    ("relpos", {"window": 2}, "window.* 2"),
    ("relpos", {"table": _random(11, 2)}, r"table.*\[11, 2\].*\[12, 2\]"),
    ("relpos", {"table": torch.ones(12, 2, dtype=torch.long)}, "table.*int64"),
    *(("relpos|bias|varlen", {"scale": scale}, f"scale={scale}") for scale in (NAN, math.inf, 0.0, -0.5)),
    ("relpos", {"key_mask": torch.ones(2, 5)}, "key_mask.*float32"),
    ("bias", {"k": _random(4, 5, 3, 32)}, r"k.*\[4, 5, 3, 32\]"),
    ("bias", {"v": _random(4, 6, 2, 32)}, r"\[4, 6, 2, 32\]"),
    ("bias", {"k": _random(4, 5, 2, 32).half()}, "float16"),
    ("bias", {"bias": _random(2, 3, 5)}, r"bias.*\[2, 3, 5\]"),
    ("bias", {"bias": _random(1, 2, 5, 3)}, r"bias.*\[1, 2, 5, 3\]"),
    ("bias", {"bias": _random(3, 2, 3, 5)}, "bias.* 3 .* 4"),
    ("bias", {"bias": torch.ones(1, 2, 3, 5, dtype=torch.bool)}, "bias.*bool"),
    ("bias", {"bias": _random(1, 2, 3, 5).double()}, "bias.*float64.*float32"),
    ("bias", {"key_mask": torch.ones(4, 5)}, "key_mask.*float32"),
    ("bias", {"seed": 3, "dropout_p": 0.1}, "seed.* 3"),
    ("varlen", {"q": _random(1, 7, 2, 32)}, r"q.*\[1, 7, 2, 32\]"),
    ("varlen", {"k": _random(9, 2, 64), "v": _random(9, 2, 64)}, r"k.*\[9, 2, 64\]"),
    ("varlen", {"v": _random(8, 2, 32)}, r"\[8, 2, 32\]"),
    ("varlen", {"cu_seqlens_q": _offsets(0, 8, 7), "max_q": 8}, "cu_seqlens_q"),
    ("varlen", {"cu_seqlens_k": _offsets(0, 10, 9), "max_k": 10}, "cu_seqlens_k"),
    ("varlen", {"cu_seqlens_q": _offsets(0, 3, 6)}, "cu_seqlens_q.* 6.* 7"),
    ("varlen", {"cu_seqlens_q": _offsets(1, 3, 7)}, "cu_seqlens_q.* 1 .*7"),
    ("varlen", {"cu_seqlens_k": _offsets(0, 4, 99), "max_k": 95}, "cu_seqlens_k.* 99"),
    ("varlen", {"cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int16)}, "cu_seqlens_q.*int16"),
    ("varlen", {"cu_seqlens_k": _offsets(0, 9)}, "3 .*cu_seqlens_k 2"),
    ("varlen", {"cu_seqlens_q": _offsets()}, r"cu_seqlens_q.*\[0\]"),
    ("varlen", {"max_q": 3}, "max_q=3.* 4"),
    ("varlen", {"max_k": 4}, "max_k=4.* 5"),
    ("varlen", {"key_mask": torch.ones(7, dtype=torch.bool)}, r"key_mask.*\[7\].*\[9\]"),
    ("varlen", {"seed": torch.tensor([1, 2]), "dropout_p": 0.1}, r"seed.*\[2\]"),
    ("varlen", {"seed": torch.tensor([1.5]), "dropout_p": 0.1}, "seed.*float32"),
    ("varlen", {"seed": 3, "dropout_p": 0.1}, "seed.* 3"),
    ("varlen|bias|add norm|branch|mlp", {"dropout_p": 1.0}, "dropout_p=1.0"),
    ("varlen|bias|add norm|branch|mlp", {"dropout_p": NAN}, "dropout_p=nan"),
    ("add norm", {"residual": _random(4, 16)}, r"residual \[4, 16\]"),
    ("branch", {"residual": _random(1, 6)}, r"residual \[1, 6\]"),
    ("mlp", {"residual": _random(1, 8)}, r"residual \[1, 8\]"),
    ("add norm|branch|mlp", {"gamma": _random(1)}, r"gamma.*\[1\]"),
    ("add norm|branch|mlp", {"row_scale": _random(2)}, r"row_scale.*\[2\].*\[3\]"),
    ("add norm|norm", {"weight": _random(15)}, r"weight \[15\]"),
    ("add norm|norm|embedding", {"eps": -1.0}, "eps=-1.0"),
    ("add norm|norm|embedding", {"eps": math.inf}, "eps=inf"),
    ("norm", {"x": torch.ones(3, 16, dtype=torch.long)}, "x.*int64"),
    ("embedding", {"tokens": torch.zeros(2, 3, dtype=torch.long)}, r"tokens \[2, 3\]"),
    ("embedding", {"tokens": torch.zeros(2, 2)}, "tokens.*float32"),
    ("embedding", {"type_row": _random(1, 16)}, r"type_row.*\[1, 16\]"),
    ("embedding", {"padding_idx": 3}, "padding_idx=3"),
    ("linear|gelu|branch", {"weight": _random(6, 7)}, r"weight \[6, 7\]"),
    ("linear|gelu|branch", {"weight": _random(2, 6, 8)}, r"weight \[2, 6, 8\]"),
    ("linear|gelu|branch", {"weight": _random(8)}, r"weight \[8\]"),
    ("linear|gelu|branch", {"bias": _random(1)}, r"bias.*\[1\].*\[6\]"),
    ("linear|gelu|branch", {"x": _random(3, 8).bfloat16()}, "x.*bfloat16.*float32"),
    ("mlp", {"weight_out": _random(8, 11)}, r"weight_out \[8, 11\]"),
    ("mlp", {"bias_out": _random(12)}, r"bias_out.*\[12\].*\[8\]"),
    ("loss|likelihood", {"w": _random(11, 7)}, r"w \[11, 7\]"),
    ("loss|likelihood", {"w": _random(0, 8), "b": None}, r"w \[0, 8\]"),
    ("loss|likelihood", {"b": _random(4)}, r"b.*\[4\].*\[11\]"),
    ("loss|likelihood", {"b": _random(11).double()}, "b.*float64"),
    ("loss|likelihood", {"target": torch.zeros(4, dtype=torch.long)}, r"target \[4\]"),
    ("loss|likelihood", {"target": torch.zeros(5)}, "target.*float32"),
    ("loss", {"label_smoothing": NAN}, "label_smoothing=nan"),
]
CALLS = [(name, changes, message) for names, changes, message in REFUSED for name in names.split("|")]
OUTSIDE: list[tuple[str, Arguments, str]] = [
    ("embedding", {"tokens": torch.full((2, 2), 4)}, "4"),
    ("embedding", {"tokens": torch.full((2, 2), -1)}, "-1"),
    ("embedding", {"positions": torch.full((2, 2), 3)}, "3"),
    ("loss", {"target": torch.full((5,), 11)}, "11"),
    ("likelihood", {"target": torch.full((5,), -1)}, "-1"),
]

BACKENDS: tuple[ops.Backend, ...] = ("auto", "reference", *(("triton",) if HAS_TRITON else ()))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _call(name: str, changes: Arguments, backend: ops.Backend) -> Any:
    operation, arguments = OPERATIONS[name]
    return operation(**(arguments() | changes), backend=backend)


@each_backend
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_unchanged_arguments_fit(name: str, backend: ops.Backend) -> None:
    found = _call(name, {}, backend)
    assert all(t.isfinite().all() for t in (found if isinstance(found, tuple) else (found,)))


@pytest.mark.parametrize(("name", "changes", "message"), CALLS)
def test_refused(name: str, changes: Arguments, message: str) -> None:
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=message):
            _call(name, changes, backend)


@each_backend
def test_a_nan_in_a_bias_reaches_its_query_alone(backend: ops.Backend) -> None:
    _, arguments = OPERATIONS["bias"]
    bias = arguments()["bias"].clone()
    bias[:, 0, 1, 2] = NAN
    unknown = torch.zeros(4, 3, 2, dtype=torch.bool)
    unknown[:, 1, 0] = True
    found = _call("bias", {"bias": bias}, backend)
    assert torch.equal(found.isnan(), unknown[..., None].expand(found.shape))


@pytest.mark.parametrize(("name", "changes", "value"), OUTSIDE)
def test_ids_outside_a_table(name: str, changes: Arguments, value: str) -> None:
    for backend in BACKENDS:
        with pytest.raises(IndexError, match=value if backend != "reference" else None):
            _call(name, changes, backend)


@each_backend
@pytest.mark.parametrize("tensor", ["cu_seqlens_k", "key_mask", "seed"])
def test_tensors_on_several_devices(tensor: str, backend: ops.Backend) -> None:
    elsewhere = {
        "cu_seqlens_k": _offsets(0, 4, 9).to("meta"),
        "key_mask": torch.ones(9, dtype=torch.bool, device="meta"),
        "seed": torch.zeros(1, dtype=torch.long, device="meta"),
    }
    with pytest.raises(ValueError, match=r"cpu.*meta"):
        _call("varlen", {tensor: elsewhere[tensor], "dropout_p": 0.1}, backend)


def test_autocast_converts_what_would_be_refused() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _call("gelu", {"x": _random(3, 8).bfloat16()}, "auto").dtype == torch.bfloat16


@each_backend
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_every_integer_type(kind: torch.dtype, backend: ops.Backend) -> None:
    labels = torch.tensor([0, 3, 10, 1, 2])
    expected = _call("likelihood", {"target": labels}, backend)
    torch.testing.assert_close(_call("likelihood", {"target": labels.to(kind)}, backend), expected, rtol=0, atol=0)


def _columns(value: Any) -> Any:
    """The same values, every other element of memory whose rest is NaN or out of range."""
    if not isinstance(value, Tensor) or value.ndim != 1:
        return value
    wide = torch.full((len(value), 2), NAN if value.is_floating_point() else 99).to(value.dtype)
    wide[:, 0] = value
    return wide[:, 0]


@each_backend
@pytest.mark.parametrize("name", OPERATIONS)
def test_vectors_need_not_be_contiguous(name: str, backend: ops.Backend) -> None:
    """Parameters, offsets and labels may be columns of a matrix; what lies between must not be read."""
    operation, make = OPERATIONS[name]
    scales = {"gamma": _random(16), "row_scale": _random(3)} if name == "add norm" else {}

    def gradients(arguments: Arguments) -> list[Tensor]:
        # Factors of stochastic depth have no gradient.
        leaves = [
            t.requires_grad_()
            for n, t in arguments.items()
            if isinstance(t, Tensor) and t.is_floating_point() and n != "row_scale"
        ]
        found = operation(**arguments, backend=backend)
        out = found[0] if isinstance(found, tuple) else found
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    plain = {n: t.clone() if isinstance(t, Tensor) else t for n, t in (make() | scales).items()}
    strided = {n: _columns(t) for n, t in plain.items()}
    expected = gradients({n: t.clone() if isinstance(t, Tensor) else t for n, t in plain.items()})
    for found, right in zip(gradients(strided), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPERATIONS)
def test_checks_are_no_obstacle_to_a_compiler(name: str) -> None:
    """Whose sizes and factors are symbols."""
    operation, make = OPERATIONS[name]
    options = {"relpos": {"scale": 0.3}, "varlen": {"scale": 0.3}, "loss": {"label_smoothing": 0.1}}
    arguments = make() | options.get(name, {})
    compiled = torch.compile(operation, fullgraph=True, dynamic=True, backend="eager")
    found, expected = compiled(**arguments), operation(**arguments)
    if isinstance(expected, tuple):
        found, expected = found[0], expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_contents_on_a_gpu_are_looked_at_within_a_block_only() -> None:
    """Told by tensors without contents: looking at them is an error."""
    from xfm_fast.kernels import checks

    elsewhere = torch.zeros(3, device="meta")
    assert not checks.should_check_values(elsewhere)
    with ops.check_contents():
        assert checks.should_check_values(elsewhere)
        with ops.check_contents():
            pass
        assert checks.should_check_values(elsewhere)
    assert not checks.should_check_values(elsewhere)


def test_float64_is_not_for_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` must not compute it in fp32 on a GPU."""
    monkeypatch.setattr(backends, "_why_not", lambda name, device, index: None)
    x = torch.zeros(2, device="meta")
    assert resolve("auto", x) == "triton"
    assert resolve("auto", x, x.double()) == "reference"
    with pytest.raises(ValueError, match="float64"):
        resolve("triton", x.double())


def test_rows_wider_than_a_tile_are_not_for_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_why_not", lambda name, device, index: None)
    x, weight = torch.zeros(1, 8193, device="meta"), torch.zeros(8193, device="meta")
    assert ops.layer_norm(x, weight, weight, 1e-5).shape == x.shape
    assert ops.add_layer_norm(x, x, weight, weight, 1e-5)[0].shape == x.shape


def test_a_block_of_flash_attention_leaves_the_other_operations_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.use_backend("flash_attn"):
        assert _call("gelu", {}, None).shape == (3, 6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="flash_attn"):
        _call("gelu", {}, "flash_attn")


@each_backend
@pytest.mark.parametrize("name", ["varlen", "add norm"])
def test_dropout_follows_from_its_seed(name: str, backend: ops.Backend) -> None:
    def run(seed: int) -> Tensor:
        found = _call(name, {"dropout_p": 0.5, "seed": torch.tensor([seed])}, backend)
        return found[1] if isinstance(found, tuple) else found

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))
    assert not torch.equal(run(3), _call(name, {}, backend)[1 if name == "add norm" else slice(None)])


def test_flash_attention_takes_no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_why_not", lambda name, device, index: None)
    with pytest.raises(ValueError, match="seed"):
        _call("varlen", {"dropout_p": 0.5, "seed": torch.tensor([3])}, "flash_attn")


def test_refusals_are_errors_that_a_user_can_mend() -> None:
    with pytest.raises(InputError):
        _call("linear", {"bias": _random(1)}, "auto")


@pytest.mark.parametrize("backend", ["reference", "auto", "cpu"])
@pytest.mark.parametrize("kind", ["window", "packed"])
def test_a_mask_that_hides_all_gives_zeros_and_no_gradient(backend: Any, kind: str) -> None:
    """By definition, in every backend: the first of two sequences has no key to attend to."""
    shape = (2, 5, 2, 16)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[False] * 5, [True, False, True, True, True]])
    if kind == "window":
        table = torch.randn(12, 2, requires_grad=True)
        out = ops.relpos_attention(q, k, v, table, (2, 2), key_mask=mask, backend=backend)
    else:
        bounds = torch.tensor([0, 5, 10], dtype=torch.int32)
        flat: Any = [*(x.flatten(0, 1) for x in (q, k, v)), bounds, bounds, 5, 5]
        out = ops.varlen_attention(*flat, key_mask=mask.flatten(), backend=backend).view(shape)
    out.sum().backward()
    for tensor in (out, q.grad, k.grad, v.grad):
        assert tensor is not None
        assert torch.isfinite(tensor).all()
        assert not tensor[0].any()
    assert out[1].any()


def test_two_types_are_refused_on_a_device_that_has_no_autocast() -> None:
    x, weight = torch.empty(2, 8, device="meta"), torch.empty(6, 8, device="meta", dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"weight.*bfloat16"):
        ops.linear(x, weight, None, backend="reference")


@pytest.mark.parametrize(
    ("triton", "ptxas", "fault"),
    [
        ("3.9.0", "13.4", None),
        ("3.7.1", "13.3", None),
        ("3.6.0", "13.4", "Triton 3.6.0"),
        ("3.7.1", "12.9", "ptxas 12.9"),
        ("3.9.0+git1", "12.8", "ptxas 12.8"),
    ],
)
def test_attention_on_hopper_needs_a_compiler_without_faults(
    triton: str, ptxas: str, fault: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other operations and other GPUs keep their kernels."""
    monkeypatch.setattr(backends, "_why_not", lambda name, device, index: None)
    monkeypatch.setattr(backends, "compiler_versions", lambda arch=90: (triton, ptxas))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    backends._warn.cache_clear()
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, device="cuda")
    if fault is None:
        assert resolve("auto", x, has_flash=True) == resolve("triton", x, has_flash=True) == "triton"
    else:
        with pytest.warns(RuntimeWarning, match=fault):
            assert resolve("auto", x, has_flash=True) == "reference"
        with pytest.raises(InputError, match=fault):
            resolve("triton", x, has_flash=True)
    assert resolve("auto", x) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    assert resolve("auto", x, has_flash=True) == "triton"
