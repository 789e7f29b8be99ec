"""`RelPosAttention` against plain PyTorch: outputs, gradients, autocast, compilation, copies."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.agreement import relative_error
from xfm_fast.errors import InputError
from xfm_fast.kernels import reference
from xfm_fast.models.vision import RelPosAttention

KEY_MASKS = {"all keys": None, "masked": torch.arange(7) < torch.tensor([7, 4])[:, None]}


def plain(module: RelPosAttention, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
    bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
    qkv = F.linear(x, module.qkv.weight, bias).unflatten(-1, (3, module.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores + reference.position_bias(module.relative_position_bias_table, module.window)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    return module.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.fixture
def module() -> RelPosAttention:
    torch.manual_seed(0)
    attention = RelPosAttention(16, 4, (2, 3))
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


@pytest.fixture(params=KEY_MASKS)
def inputs(request: pytest.FixtureRequest) -> tuple[Tensor, ...]:
    key_mask = KEY_MASKS[request.param]
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    return (x,) if key_mask is None else (x, key_mask)


def test_agrees_with_plain_pytorch(module: RelPosAttention, inputs: tuple[Tensor, ...]) -> None:
    results = []
    for run in (plain, RelPosAttention.__call__):
        module.zero_grad()
        x = inputs[0].detach().requires_grad_()
        out = run(module, x, *inputs[1:])
        out.square().sum().backward()
        gradients = [x.grad, *(parameter.grad for parameter in module.parameters())]
        results.append((out.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    for found, expected in zip(results[1], results[0], strict=True):
        assert relative_error(found, expected) < 1e-5
    module.eval()
    with torch.no_grad():
        expected = plain(module, *inputs)
        assert relative_error(module(*inputs), expected) < 1e-5
        with torch.autocast("cpu", torch.bfloat16):
            assert 1e-6 < relative_error(module(*inputs).float(), expected) < 0.05
        assert relative_error(torch.compile(module, backend="aot_eager")(*inputs), expected) < 1e-5
        twin = copy.deepcopy(module)
        module.qkv.weight.mul_(1.5)
        assert relative_error(twin(*inputs), expected) < 1e-5
        assert relative_error(module(*inputs), expected) > 1e-3


@pytest.mark.parametrize("fixed", ["q_bias", "v_bias"])
def test_one_bias_is_trained(module: RelPosAttention, fixed: str) -> None:
    """A cached concatenation would leave the other one without a gradient."""
    getattr(module, fixed).requires_grad_(False)
    x, gradients = torch.randn(2, 7, 16), []
    for run in (plain, RelPosAttention.__call__):
        module.zero_grad()
        run(module, x).square().sum().backward()
        trained = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
        gradients.append(torch.cat([gradient.flatten() for gradient in trained]))
    assert relative_error(gradients[1], gradients[0]) < 1e-5


def test_arguments_that_do_not_fit(module: RelPosAttention) -> None:
    with pytest.raises(InputError, match="heads=4"):
        RelPosAttention(10, 4, (2, 2))
    with pytest.raises(InputError, match=r"window=\(0, 3\)"):
        RelPosAttention(16, 4, (0, 3))
    with pytest.raises(InputError, match=r"\[B, 7, width\]"):
        module(torch.randn(1, 6, 16))
