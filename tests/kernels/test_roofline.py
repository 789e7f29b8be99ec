"""FLOPs, bytes and floors against numbers worked out by hand."""

import pytest

from xfm_fast.kernels import roofline
from xfm_fast.kernels.roofline import A100, H100


def test_attention_by_hand() -> None:
    work = roofline.relpos_attention(8, 577)
    # Two products of 8 × 12 heads × 577 × 577 × 64 multiplications and additions.
    assert work.flops == 2 * 2 * 8 * 12 * 577 * 577 * 64
    operand = 8 * 577 * 768 * 2
    assert work.bytes == 4 * operand + 12 * 577 * 577 * 2 + 8 * 577 * 12 * 4
    backward = roofline.relpos_attention(8, 577, backward=True)
    assert backward.flops == 2.5 * work.flops


def test_floor_is_the_slower_of_the_two() -> None:
    loss = roofline.linear_cross_entropy(1440, 50_265)
    assert loss.flops == 3 * 2 * 1440 * 768 * 50_265
    assert loss.floor(H100) == pytest.approx(337.2e-6, rel=1e-3)
    norm = roofline.add_layer_norm(8 * 577)
    # Four tensors of 8 × 577 × 768 in bf16, and mean and deviation of each row.
    assert norm.bytes == 4 * 8 * 577 * 768 * 2 + 8 * 577 * 8
    assert norm.floor(A100) == norm.bytes / 2.04e12
