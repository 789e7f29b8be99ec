"""Traces and tensors without memory of their own: accelerated models give what untouched ones give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

pytest.importorskip("transformers")

from tests.replace.families import FAMILIES
from xfm_fast import accelerate
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.kernels.backend import plain, traced
from xfm_fast.kernels.cpu import gemm, int8
from xfm_fast.kernels.cpu.workspace import scratch

_NAMES = (
    "ViT",
    "CLIP's images",
    "BERT",
    "DINOv2",
    "PyTorch, pre-norm",
    "BEiT",
    "timm's ViT",
    "MPNet",
    "Swin",
)
NAMES = [name for name in _NAMES if name in FAMILIES]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "frozen": {"freeze": True},
    "in panels": {"freeze": True},
    "int8": {"dtype": "int8"},
}


class _Called(nn.Module):
    """A model as a function of tensors, which gives its states."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Any = self.model(**dict(zip(self.names, inputs, strict=True)))
        return out if isinstance(out, Tensor) else out.last_hidden_state


def _case(name: str, options: dict[str, Any]) -> tuple[_Called, _Called, tuple[Tensor, ...]]:
    """Untouched and accelerated, which has run, and inputs."""
    case = FAMILIES[name]
    model, given = case.model(torch.float32), case.inputs(torch.float32)
    fast = copy.deepcopy(model)
    accelerate(fast, **options)
    inputs, names = tuple(given.values()), tuple(given)
    untouched, called = _Called(model, names).eval(), _Called(fast, names).eval()
    with torch.no_grad():
        called(*inputs)
    return untouched, called, inputs


def _fx(called: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return make_fx(called)(*inputs)


def _fx_of_fakes(called: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return make_fx(called, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)


def _fx_before_dispatch(called: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return make_fx(called, pre_dispatch=True)(*inputs)


def _jit(called: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.jit.trace(called, inputs, check_trace=False)


def _export(called: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    return torch.export.export(called, inputs).module()


TRACERS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Any]] = {
    "make_fx": _fx,
    "make_fx of fakes": _fx_of_fakes,
    "make_fx before dispatch": _fx_before_dispatch,
    "jit": _jit,
    "export": _export,
}


@pytest.fixture(params=OPTIONS)
def options(
    request: pytest.FixtureRequest,
    int8_chosen: None,
    freeze_in: Callable[[gemm.Layout], None],
) -> dict[str, Any]:
    if request.param == "int8" and int8.why_not() is not None:
        pytest.skip(f"no int8 products here: {int8.why_not()}")
    freeze_in("panels" if request.param == "in panels" else "onednn")
    return OPTIONS[request.param]


_MANY = [
    pytest.param(
        name, tracer, marks=[] if name == NAMES[0] or tracer == "make_fx" else pytest.mark.slow
    )
    for name in NAMES
    for tracer in TRACERS
]


@pytest.mark.parametrize(("name", "tracer"), _MANY)
def test_a_trace_is_that_of_the_untouched_model(
    name: str, tracer: str, options: dict[str, Any]
) -> None:
    if options.get("freeze") and not FAMILIES[name].whole:
        pytest.skip("nothing of it can be packed")
    if options.get("dtype") and tracer.startswith("make_fx"):
        pytest.skip(
            "make_fx of PyTorch refuses every class of parameters but its own, as the flagged ones"
        )
    # Beside int8, which a trace does not contain, the model runs in bfloat16 where that is fast.
    bound = 0.05 if options.get("dtype") else 2e-5
    untouched, called, inputs = _case(name, options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            TRACERS[tracer](untouched, inputs)
        except Exception as error:
            pytest.skip(f"the untouched model cannot be traced: {type(error).__name__}")
        made = TRACERS[tracer](called, inputs)
        # Other numbers than those of the trace.
        given = tuple(t.flip(0) for t in inputs)
        wanted, found = untouched(*given), made(*given)
    assert float((found - wanted).abs().max()) <= bound * float(wanted.abs().max())
    assert not traced()


@pytest.mark.parametrize("name", NAMES[:3])
def test_torchscript_of_onnx(name: str, options: dict[str, Any], tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if options.get("dtype"):
        pytest.skip("the exporter does not know the bfloat16 beside int8")
    untouched, called, inputs = _case(name, options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(called, inputs, tmp_path / "model.onnx", dynamo=False)
        wanted = untouched(*inputs)
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    given = {spec.name: t.numpy() for spec, t in zip(session.get_inputs(), inputs, strict=True)}
    found = torch.from_numpy(session.run(None, given)[0])
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def test_a_model_of_fakes_has_shapes() -> None:
    for name in NAMES:
        _, called, inputs = _case(name, {})
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            found = called(*(mode.from_tensor(t) for t in inputs))
        with torch.no_grad():
            assert found.shape == called(*inputs).shape


class Two(Tensor):
    """A wrapper of two tensors, without memory of its own: what is computed with it is computed with both."""

    a: Tensor
    b: Tensor

    @staticmethod
    def __new__(cls, a: Tensor, b: Tensor) -> Two:
        made = Tensor._make_wrapper_subclass(
            cls, a.shape, dtype=a.dtype, device=a.device, strides=a.stride()
        )
        made.a, made.b = a, b
        return made

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = []
        for side in ("a", "b"):
            given = pytree.tree_map_only(
                cls, lambda two, side=side: getattr(two, side), (args, kwargs or {})
            )
            made.append(func(*given[0], **given[1]))
        return pytree.tree_map(lambda a, b: cls(a, b) if isinstance(a, Tensor) else a, *made)


def _calls() -> dict[str, Callable[[Tensor], Any]]:
    """Operations of x `[6, 64]`, by name."""
    torch.manual_seed(0)
    weight, bias = torch.randn(64, 64) / 8, torch.randn(64)
    scale, shift = torch.randn(64), torch.randn(64)
    offsets = torch.tensor([0, 2, 6])

    def thrice(x: Tensor, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        return x.reshape(shape), x.reshape(shape), x.reshape(shape)

    frozen, panels = gemm.frozen(weight, "onednn"), gemm.frozen(weight, "panels")
    return {
        "linear": lambda x: ops.linear(x, weight, bias),
        "frozen linear": lambda x: ops.linear(x, frozen, bias),
        "linear in panels": lambda x: ops.linear(x, panels, bias),
        "linear_gelu": lambda x: ops.linear_gelu(x, weight, bias),
        "linear_residual": lambda x: ops.linear_residual(x, weight, bias, x),
        "frozen linear_residual": lambda x: ops.linear_residual(x, frozen, bias, x),
        "mlp_residual in panels": lambda x: ops.mlp_residual(x, panels, bias, panels, bias, x),
        "mlp_residual": lambda x: ops.mlp_residual(x, weight, bias, weight, bias, x),
        "joined_linear": lambda x: ops.joined_linear(x, [weight, weight], [bias, bias]),
        "layer_norm_mlp": lambda x: ops.layer_norm_mlp(
            x, scale, shift, 1e-5, weight, bias, weight, bias
        ),
        "linear_add_layer_norm": lambda x: ops.linear_add_layer_norm(
            x, weight, bias, x, scale, shift, 1e-5
        )[0],
        "layer_norm": lambda x: ops.layer_norm(x, scale, shift, 1e-5),
        "add_layer_norm": lambda x: ops.add_layer_norm(x, x, scale, shift, 1e-5)[0],
        "varlen_attention": lambda x: ops.varlen_attention(
            *thrice(x, 6, 2, 32), offsets, offsets, 4, 4
        ),
        "bias_attention": lambda x: ops.bias_attention(
            *thrice(x, 1, 6, 2, 32), torch.zeros(1, 2, 6, 6)
        ),
        "relpos_attention": lambda x: ops.relpos_attention(
            *thrice(x[:5], 1, 5, 2, 32), torch.ones(12, 2), (2, 2)
        ),
    }


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", _calls())
def test_a_wrapper_subclass_is_computed_by_its_own_means(name: str, mode: Any) -> None:
    call, x, y = _calls()[name], torch.randn(6, 64), torch.randn(6, 64)
    assert plain(x)
    assert not plain(Two(x, y))
    with torch.no_grad():
        wanted = call(x), call(y)
    with mode():
        found = call(Two(x, y))
    assert isinstance(found, Two)
    for one, other in zip((found.a, found.b), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", _calls())
def test_a_fake_leaves_nothing_behind(name: str, mode: Any) -> None:
    call, x = _calls()[name], torch.randn(6, 64)
    if "frozen" not in name:
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes, mode():
            assert call(fakes.from_tensor(x)).shape == call(fakes.from_tensor(x)).shape
    with mode():
        found = call(x)
    assert type(found) is Tensor
    assert type(scratch("hidden", (3,), torch.float32)) is Tensor


@pytest.mark.parametrize("name", _calls())
def test_a_lazy_conjugate_is_resolved(name: str) -> None:
    call, x = _calls()[name], torch.randn(6, 64)
    lazy = torch._neg_view(x.neg())
    assert lazy.is_neg()
    with torch.inference_mode():
        wanted = call(x)
        torch.testing.assert_close(
            call(lazy), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max())
        )


@pytest.mark.parametrize("layout", ["onednn", "panels"])
def test_a_frozen_layer_takes_a_wrapper_subclass(
    layout: gemm.Layout, freeze_in: Callable[[gemm.Layout], None]
) -> None:
    freeze_in(layout)
    _, called, _ = _case("BERT", {"freeze": True})
    model: Any = called.model
    layer = model.encoder.layer[0].attention.output.dense
    x, y = torch.randn(2, 3, 48), torch.randn(2, 3, 48)
    with torch.inference_mode():
        found = layer(Two(x, y))
        wanted = F.linear(y, layer.weight, layer.bias)
    torch.testing.assert_close(found.b, wanted, rtol=0, atol=2e-5)


def test_a_named_backend_is_refused() -> None:
    x = torch.randn(6, 64)
    with pytest.raises(InputError, match="subclass"):
        ops.linear(Two(x, x), torch.randn(64, 64), None, backend="cpu")
