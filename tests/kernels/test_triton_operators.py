"""The registered operators reach the Triton kernels, launched as tuned, and agree with the definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.triton_testing import interpreted_kernels, poison

interpreted_kernels()

from torch._dynamo.backends.common import aot_autograd  # noqa: E402

from tests.kernels.cases import CASES, Arguments, converted, leaves, run  # noqa: E402
from xfm_fast.kernels import attention, ops, tune  # noqa: E402
from xfm_fast.kernels.derived import forget  # noqa: E402
from xfm_fast.kernels.triton import gelu, layer_norm, relpos_table  # noqa: E402
from xfm_fast.kernels.triton.launch import LaunchConfig  # noqa: E402


@pytest.mark.parametrize("name", [name for name in CASES if "triton" in CASES[name].forms])
def test_agrees_with_the_reference(name: str) -> None:
    arguments = CASES[name].arguments(grad=True)
    with poison():
        found = run(CASES[name], arguments, "triton")
    for ours, expected in zip(found, run(CASES[name], arguments, "reference"), strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))


def relpos(arguments: Arguments, **options: Any) -> Tensor:
    return CASES["relpos"].operation(**arguments, backend="triton", **options)


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
    given = CASES["relpos"].arguments(grad=True)
    made = counting(monkeypatch)
    with torch.autocast("cpu", torch.float16):
        first, second = (relpos(given) for _ in range(2))
    assert made == [False]
    assert first.dtype == torch.float16
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.float().sum(), given["table"])
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.half().float())


def test_a_position_bias_may_be_made_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    given = CASES["relpos"].arguments(grad=True)
    expected = relpos(given)
    bias = ops.relpos_bias(given["table"], (3, 5), dtype=torch.float32, scale=32**-0.5, backend="triton")
    made = counting(monkeypatch)
    found = relpos(given, bias=bias)
    gradients = [torch.autograd.grad(out.square().sum(), leaves(given)) for out in (found, expected)]
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert made == [True, True], "only the backward pass makes one, with keys as rows"


def test_a_position_bias_in_fragments_changes_nothing_but_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hopper's forward kernel reads: the backward pass makes the plain bias for itself."""
    given = converted(CASES["relpos"].arguments(grad=True), torch.float16)
    table = given["table"]

    def attend(**options: Any) -> list[Tensor]:
        out = relpos(given, **options)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves(given))]

    expected = attend()
    monkeypatch.setattr(attention, "_in_fragments", lambda head_dim, *_, turned: head_dim == 32 and not turned)
    forget(table)
    options = {"dtype": torch.float16, "scale": 32**-0.5, "head_dim": 32}
    bias = ops.relpos_bias(table, (3, 5), **options, backend="triton")
    assert bias.shape == (table.shape[1], 1, 2, 256, 32)
    for found in (attend(), attend(bias=bias)):
        for ours, right in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, right, rtol=5e-3, atol=5e-3 * float(right.detach().abs().max()))


def test_a_graph_holds_what_fills_the_bias() -> None:
    """Or else a captured graph would read a bias that nothing in it writes."""
    given = CASES["relpos"].arguments()
    seen: list[str] = []

    def look(module: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(relpos, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(given), relpos(given))
    assert [name for name in seen if "relpos" in name] == [
        "xfm_fast.relpos_bias.default",
        "xfm_fast.relpos_attention.default",
    ]


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
