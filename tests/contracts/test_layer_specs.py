"""A family of layers registered from outside the package, and all that `accelerate` offers for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.kernels.cpu import int8
from xfm_fast.replace import LayerSpec, Mlp, accelerate, register


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.qkv, self.out = 16, nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).transpose(1, 3).unbind(2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ToyLayer(nn.Module):
    """Pre-norm, with a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.mixer = nn.LayerNorm(32), nn.LayerNorm(32), Mixer()
        self.up, self.act, self.down = nn.Linear(32, 128), nn.SiLU(), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.one(x))
        first, second = self.up(self.two(x)).chunk(2, -1)
        return x + self.down(self.act(first) * second)


TOY = LayerSpec(
    layer=ToyLayer,
    order="before",
    attention="mixer",
    own=(Mixer,),
    qkv=("mixer.qkv",),
    proj="mixer.out",
    norms=("one", "two"),
    mlps=(Mlp(("up",), "act", "down", halved=True),),
    head_size="mixer.head_dim",
)


@pytest.mark.parametrize(
    "options", [{}, {"freeze": True}, {"dtype": "int8"}], ids=["plain", "freeze", "int8"]
)
def test_a_family_of_ones_own(options: dict[str, Any]) -> None:
    if "dtype" in options and int8.why_not() is not None:
        pytest.skip(f"no int8 GEMM here: {int8.why_not()}")
    register(TOY)
    torch.manual_seed(0)
    model, x = nn.Sequential(ToyLayer(), ToyLayer()), torch.randn(3, 5, 32)
    fast, state, wanted = copy.deepcopy(model), copy.deepcopy(model.state_dict()), model(x)
    report = accelerate(fast, verify=x, **options)
    assert [entry.class_name for entry in report.replaced] == ["ToyLayer", "ToyLayer"]
    assert report.unknown == []
    assert "0 and 1 more" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(
            fast(x).float(), wanted, rtol=0, atol=0.05 if "dtype" in options else 1e-5
        )
    if not options:
        for each in (model, fast):
            each(x).square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)
    report.revert()
    assert torch.equal(fast(x), wanted)
    assert all(torch.equal(value, state[name]) for name, value in fast.state_dict().items())
