"""Encoders as a GPU runs them: every branch joined with the norm behind it, across the blocks of the vision encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.kernels import ops
from xfm_fast.models import vision
from xfm_fast.models.xfm import XFM


@pytest.fixture
def encoder() -> vision.VisionEncoder:
    config = XFMConfig.preset("tiny", vision_depth=3, drop_path_rate=0.5)
    made = vision.VisionEncoder(config).double()
    for name, parameter in made.named_parameters():
        if name.endswith(("gamma_1", "gamma_2", "bias_table", "norm1.weight", "norm2.weight")):
            torch.nn.init.normal_(parameter)
    return made


def run(encoder: vision.VisionEncoder) -> list[Tensor]:
    torch.manual_seed(1)
    size = encoder.config.image_size
    pixels = torch.randn(3, 3, size, size, dtype=torch.float64, requires_grad=True)
    out = encoder(pixels)
    return [
        out,
        *torch.autograd.grad(
            out.square().sum(), [pixels, *encoder.parameters()], allow_unused=True
        ),
    ]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "stochastic depth"])
def test_joined_norms_change_nothing(
    encoder: vision.VisionEncoder, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.train(training)
    expected = run(encoder)
    monkeypatch.setattr(vision, "_JOINING", ("cpu",))
    monkeypatch.setattr(vision.Block, "forward", None)  # not called any more
    for found, right in zip(run(encoder), expected, strict=True):
        assert (found is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(
                found, right, rtol=1e-9, atol=1e-9 * float(right.detach().abs().max())
            )


def test_joined_norms_keep_the_type_of_the_result(
    encoder: vision.VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast the sum is wider than its terms."""
    encoder.float().eval()
    pixels = torch.randn(1, 3, encoder.config.image_size, encoder.config.image_size)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = encoder(pixels)
        monkeypatch.setattr(vision, "_JOINING", ("cpu",))
        found = encoder(pixels)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_the_end_of_a_text_layer_is_the_same_in_one_pass() -> None:
    """And a device that is no CPU takes it."""
    layer = XFM(XFMConfig.preset("tiny")).double().eval().text_encoder.roberta.encoder[0]
    x = torch.randn(7, layer.output.dense.out_features, dtype=torch.float64)
    first = layer.intermediate.dense
    with torch.no_grad():
        joined = layer.output(ops.linear_gelu(x, first.weight, first.bias), x)
        torch.testing.assert_close(layer.feed_forward(x), joined, rtol=0, atol=1e-12)
    seen: list[Any] = []
    layer = layer.to("meta")
    layer.output.register_forward_hook(lambda module, given, result: seen.append(result))
    layer.feed_forward(x.to("meta"))
    assert len(seen) == 1
