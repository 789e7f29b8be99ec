"""The registered operators reach the Triton kernels, launched as tuned, and agree with the definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_testing import interpreted_kernels, poison

interpreted_kernels()

from torch._dynamo.backends.common import aot_autograd  # noqa: E402

from tests.kernels.test_operators import CASES, WINDOW, shaped  # noqa: E402
from xfm_fast.errors import InputError  # noqa: E402
from xfm_fast.kernels import attention, ops, tune  # noqa: E402
from xfm_fast.kernels.derived import forget  # noqa: E402
from xfm_fast.kernels.triton import gelu, layer_norm, relpos_table  # noqa: E402
from xfm_fast.kernels.triton.launch import LaunchConfig  # noqa: E402


def _run(case: str, backend: ops.Backend) -> list[Tensor]:
    function, inputs = CASES[case]
    # The Triton kernels have the head dimensions of real models.
    arguments = inputs(width=32) if case.startswith(("relpos", "varlen", "bias")) else inputs()
    with ops.use_backend(backend), poison():
        out = function(*arguments)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    with poison():
        return [out.detach(), *torch.autograd.grad(out, arguments, weight)]


@pytest.mark.parametrize("case", [case for case in CASES if case != "varlen, long"])
def test_agrees_with_the_definition(case: str) -> None:
    for ours, expected in zip(_run(case, "triton"), _run(case, "reference"), strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("case", [*(case for case in CASES if case != "varlen, long"), "norm"])
def test_second_derivatives_are_refused(case: str) -> None:
    function, inputs = (CASES | {"norm": (lambda x, w, b: ops.layer_norm(x, w, b, 1e-5), shaped((5, 16), 16, 16))})[
        case
    ]
    arguments = inputs(width=32) if case.startswith(("relpos", "varlen", "bias")) else inputs()
    with ops.use_backend("triton"):
        first = torch.autograd.grad(function(*arguments).square().sum(), arguments, create_graph=True)
    for gradient in first:
        with pytest.raises(InputError):
            torch.autograd.grad(gradient.square().sum(), arguments, allow_unused=True, retain_graph=True)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows by one, `turned` or not, whenever a position bias is made."""
    made: list[bool] = []
    original = relpos_table.materialise_bias

    def materialise(*given: Any, turned: bool = False, fragments: bool = False) -> Tensor:
        made.append(turned)
        return original(*given, turned=turned, fragments=fragments)

    monkeypatch.setattr(relpos_table, "materialise_bias", materialise)
    return made


def test_autocast_leaves_the_position_table_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias is made of the parameter itself, once, and its gradient is not rounded to half precision."""
    q, k, v, table = CASES["relpos"][1](width=32)
    made = counting(monkeypatch)
    with ops.use_backend("triton"), torch.autocast("cpu", torch.float16):
        first, second = (ops.relpos_attention(q, k, v, table, WINDOW) for _ in range(2))
    assert made == [False]
    assert first.dtype == torch.float16
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.float().sum(), table)
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.half().float())


def test_a_position_bias_may_be_made_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, table = CASES["relpos"][1](width=32)
    with ops.use_backend("triton"):
        expected = ops.relpos_attention(q, k, v, table, WINDOW)
        bias = ops.relpos_bias(table, WINDOW, dtype=q.dtype, scale=32**-0.5)
        made = counting(monkeypatch)
        found = ops.relpos_attention(q, k, v, table, WINDOW, bias=bias)
        gradients = [torch.autograd.grad(out.square().sum(), (q, k, v, table)) for out in (found, expected)]
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert made == [True, True], "only the backward pass makes one, with keys as rows"


def test_a_position_bias_in_fragments_changes_nothing_but_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hopper's forward kernel reads: the backward pass makes the plain bias for itself."""
    q, k, v, table = (t.detach().half().requires_grad_() for t in CASES["relpos"][1](width=32))

    def attend(**options: Any) -> list[Tensor]:
        out = ops.relpos_attention(q, k, v, table, WINDOW, **options)
        return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, table))]

    with ops.use_backend("triton"):
        expected = attend()
        monkeypatch.setattr(attention, "_in_fragments", lambda head_dim, *_, turned: head_dim == 32 and not turned)
        forget(table)
        bias = ops.relpos_bias(table, WINDOW, dtype=q.dtype, scale=32**-0.5, head_dim=32)
        assert bias.shape == (table.shape[1], 1, 2, 256, 32)
        for found in (attend(), attend(bias=bias)):
            for ours, right in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, right, rtol=5e-3, atol=5e-3 * float(right.detach().abs().max()))


def test_a_graph_holds_what_fills_the_bias() -> None:
    """Or else a captured graph would read a bias that nothing in it writes."""
    q, k, v, table = CASES["relpos"][1](grad=False, width=32)
    seen: list[str] = []

    def look(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return ops.relpos_attention(q, k, v, table, WINDOW, backend="triton")

    compiled = torch.compile(attend, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v, table), attend(q, k, v, table))
    assert [name for name in seen if "relpos" in name] == [
        "xfm_fast.relpos_bias.default",
        "xfm_fast.relpos_attention.default",
    ]


def test_dropout_replays_its_mask_in_the_gradient() -> None:
    q, k, v = CASES["varlen"][1](width=32)
    offsets = torch.tensor([0, 4, 17], dtype=torch.int32), torch.tensor([0, 9, 20], dtype=torch.int32)
    with ops.use_backend("triton"):
        out = ops.varlen_attention(q, k, v, *offsets, 13, 11, dropout_p=0.3, seed=torch.tensor([5]))
    gradient = torch.autograd.grad(out.sum(), v)[0]
    # The output is linear in v for a fixed mask.
    torch.testing.assert_close((gradient * v).sum(), out.sum(), rtol=1e-4, atol=1e-4)


def test_a_whole_model_on_triton_kernels() -> None:
    """Vision, text and fusion encoders, forward and backward, on the kernels that a GPU would run."""
    from xfm_fast import XFM, XFMConfig

    torch.manual_seed(0)
    config = XFMConfig.preset("tiny", vision_depth=1, text_layers=1, fusion_layers=2, vocab_size=64)
    config = config.replace(vision_width=64, vision_heads=2, text_width=64, text_heads=2)
    model = XFM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            torch.nn.init.normal_(parameter, std=0.2)
    pixels, ids = torch.randn(2, 3, 32, 32), torch.tensor([[0, 9, 33, 2], [0, 7, 2, 1], [0, 50, 2, 1]])
    results = {}
    backends: tuple[ops.Backend, ...] = ("triton", "reference")
    for backend in backends:
        model.zero_grad()
        with ops.use_backend(backend):
            images, mask = model.encode_image(pixels), ids != 1
            fused = model.fuse(model.encode_text(ids, mask), mask, model.image_memory(images), torch.tensor([1, 0, 1]))
            logits = model.match_logits(fused)
        logits.logsumexp(1).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results[backend] = (logits.detach(), gradients)
    torch.testing.assert_close(results["triton"][0], results["reference"][0], rtol=1e-4, atol=1e-4)
    assert results["triton"][1].keys() == results["reference"][1].keys()
    for name, gradient in results["triton"][1].items():
        expected = results["reference"][1][name]
        assert (gradient - expected).abs().max() <= 1e-4 * max(1e-3, float(expected.abs().max())), name


WIDTH = 63
# The interpreter takes the configurations of the oldest architecture.
ARCH = 80


def _tensors(found: Any) -> list[Tensor]:
    return [t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, Tensor)]


@pytest.mark.parametrize("kernel", tune._WIDTHS)
def test_row_kernels_are_launched_as_tuned(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_ROWS", 11)
    seen: list[LaunchConfig] = []
    for module in (gelu, layer_norm):
        options = module.launch_options
        monkeypatch.setattr(
            module,
            "launch_options",
            lambda config, options=options, **k: (seen.append(config), options(config, **k))[1],
        )
    call = tune.model_workload(kernel, WIDTH, "fp32", device="cpu")
    expected = _tensors(call())
    in_use = seen[-1]
    block = in_use.tiles["BLOCK"] if "norm" in kernel else 32
    tuned = LaunchConfig({"BLOCK": block, "ROWS": 2 * in_use.tiles["ROWS"]}, 2, 1)
    with tune.using(kernel, WIDTH, "fp32", ARCH, tuned), poison():
        found = _tensors(call())
    assert seen[-1] == tuned != in_use
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    call()
    assert seen[-1] == in_use


def test_an_unknown_kernel_has_no_workload() -> None:
    with pytest.raises(ValueError, match="ordered_sum"):
        tune.model_workload("ordered_sum", 768, "bf16", device="cpu")
