"""Window attention against plain PyTorch, and with transformers' weights against Swin and Swin V2 themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.agreement import assert_same_gradients, assert_survives_copies, relative_error
from xfm_fast.errors import InputError
from xfm_fast.nn import (
    CosineWindowAttention,
    WindowAttention,
    merge_windows,
    partition_windows,
    shifted_window_mask,
)

WIDTH, HEADS = 24, 3
GRID, WINDOW, SHIFT = (8, 12), (4, 4), (2, 2)


def windows_of(images: int = 2) -> Tensor:
    return torch.randn(images * 6, 16, WIDTH)


def made(kind: type[nn.Module], **options: Any) -> Any:
    module = kind(WIDTH, HEADS, WINDOW, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def plain(module: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    if isinstance(module, WindowAttention):
        q, k, v = module.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * (WIDTH // HEADS) ** -0.5
    else:
        bias = torch.cat([module.q_bias, torch.zeros(WIDTH), module.v_bias])
        q, k, v = nn.functional.linear(x, module.qkv.weight, bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        cosines = nn.functional.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1, eps=1e-12)
        scores = cosines * module.logit_scale.clamp(max=torch.tensor(100.0).log().item()).exp()[None, :, None]
    scores = scores + module.position_bias()
    if mask is not None:
        scores = (scores.unflatten(0, (-1, len(mask))) + mask[None, :, None]).flatten(0, 1)
    return module.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


each_kind = pytest.mark.parametrize("kind", [WindowAttention, CosineWindowAttention])


@each_kind
@pytest.mark.parametrize("shifted", [False, True])
def test_agrees_with_plain_pytorch(kind: type[nn.Module], shifted: bool) -> None:
    module, x = made(kind), windows_of()
    mask = shifted_window_mask(GRID, WINDOW, SHIFT) if shifted else None
    assert_same_gradients(module, plain, (x,) if mask is None else (x, mask))
    with torch.no_grad():
        # What is kept for inference follows the weights.
        before = module(x, mask)
        for parameter in module.parameters():
            parameter.mul_(1.1)
        assert relative_error(module(x, mask), plain(module, x, mask)) < 1e-5
        assert relative_error(module(x, mask), before) > 1e-3


@each_kind
def test_survives_copies_and_compilers(kind: type[nn.Module]) -> None:
    module, x = made(kind), windows_of(1)
    mask = shifted_window_mask(GRID, WINDOW, SHIFT)
    assert_survives_copies(module, (x, mask))
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), module(x, mask))


def test_dropout_in_training_only() -> None:
    module, x = made(WindowAttention, dropout=0.5), windows_of()
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize("shift", [(0, 0), (2, 1), (3, 3)])
def test_a_shifted_grid_is_attended_by_region(shift: tuple[int, int]) -> None:
    """By its definition: patches that were neighbours before the roll, in the same window after it."""
    mask = shifted_window_mask(GRID, WINDOW, shift)
    places = torch.stack(torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij"), -1)[None]
    rolled = places.roll((-shift[0], -shift[1]), (1, 2))
    parts = partition_windows(rolled, WINDOW)
    together = (parts[:, :, None] - parts[:, None, :]).abs().lt(torch.tensor(WINDOW)).all(-1)
    assert torch.equal(mask == 0, together)
    assert (mask[~together] == -torch.inf).all()
    assert torch.equal(merge_windows(parts, GRID, WINDOW), rolled)


def test_partition_and_merge_keep_images_together() -> None:
    x = torch.randn(3, *GRID, 5)
    parts = partition_windows(x, WINDOW)
    assert parts.shape == (18, 16, 5)
    assert torch.equal(parts[6 + 1], x[1, :4, 4:8].flatten(0, 1))
    assert torch.equal(merge_windows(parts, GRID, WINDOW), x)


def _copied(ours: Any, q: nn.Linear, k: nn.Linear, v: nn.Linear) -> None:
    ours.qkv.weight.data.copy_(torch.cat([q.weight, k.weight, v.weight]))
    if ours.qkv.bias is not None:
        ours.qkv.bias.data.copy_(torch.cat([q.bias, k.bias, v.bias]))
    else:
        ours.q_bias.data.copy_(q.bias)
        ours.v_bias.data.copy_(v.bias)


def _agrees_with(
    ours: Any, theirs: nn.Module, given: Tensor | None, pairs: dict[str, str], mask: Tensor | None
) -> None:
    """Outputs, the gradient of the input, and those of the parameters that have one place in both."""
    x = windows_of().requires_grad_()
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    found, wanted = ours(x, mask), theirs(x, given)[0]
    assert relative_error(found, wanted.detach()) < 1e-5
    weight = torch.randn_like(found)
    gradients = torch.autograd.grad(found, [x, *(own[name] for name in pairs)], weight)
    expected = torch.autograd.grad(wanted, [x, *(other[name] for name in pairs.values())], weight)
    for name, gradient, truth in zip(("x", *pairs), gradients, expected, strict=True):
        assert relative_error(gradient.view(truth.shape), truth) < 1e-4, name


@pytest.mark.parametrize("shifted", [False, True])
def test_swin_of_transformers(shifted: bool) -> None:
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = transformers.SwinConfig(embed_dim=WIDTH, num_heads=[HEADS], depths=[1], attn_implementation="eager")
    theirs = module.SwinAttention(config, WIDTH, HEADS, WINDOW[0])
    if not hasattr(theirs, "q_proj"):
        pytest.skip("this version of transformers names the parts of Swin's attention otherwise")
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = WindowAttention(WIDTH, HEADS, WINDOW)
    _copied(ours, theirs.q_proj, theirs.k_proj, theirs.v_proj)
    ours.proj.load_state_dict(theirs.o_proj.state_dict())
    ours.relative_position_bias_table.data.copy_(theirs.relative_position_bias.relative_position_bias_table)
    mask = shifted_window_mask(GRID, WINDOW, SHIFT) if shifted else None
    # Theirs hides by -100, which leaves e⁻¹⁰⁰ of a weight.
    pairs = {
        "proj.weight": "o_proj.weight",
        "relative_position_bias_table": "relative_position_bias.relative_position_bias_table",
    }
    given = None if mask is None else mask.clamp_min(-100)
    _agrees_with(ours, theirs, given, pairs, mask)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("pretrained", [None, (6, 6)])
def test_swin_v2_of_transformers(pretrained: tuple[int, int] | None, shifted: bool) -> None:
    transformers = pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.swinv2.modeling_swinv2")
    config = transformers.Swinv2Config(embed_dim=WIDTH, num_heads=[HEADS], depths=[1])
    theirs = module.Swinv2SelfAttention(config, WIDTH, HEADS, WINDOW[0], list(pretrained or (0, 0)))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        # One head at the upper bound, one below.
        theirs.logit_scale.copy_(torch.tensor([5.0, 1.0, 2.0]).view(-1, 1, 1))
    ours = CosineWindowAttention(WIDTH, HEADS, WINDOW, pretrained_window=pretrained)
    _copied(ours, theirs.query, theirs.key, theirs.value)
    ours.proj.weight.data.copy_(torch.eye(WIDTH))
    ours.proj.bias.data.zero_()
    ours.logit_scale.data.copy_(theirs.logit_scale.view(-1, 1))
    ours.position_mlp.load_state_dict(theirs.continuous_position_bias_mlp.state_dict())
    mask = shifted_window_mask(GRID, WINDOW, SHIFT) if shifted else None
    pairs = {
        "q_bias": "query.bias",
        "logit_scale": "logit_scale",
        "position_mlp.0.weight": "continuous_position_bias_mlp.0.weight",
    }
    given = None if mask is None else mask.clamp_min(-100)
    _agrees_with(ours, theirs, given, pairs, mask)


def test_what_does_not_fit_is_refused() -> None:
    module = WindowAttention(WIDTH, HEADS, WINDOW)
    with pytest.raises(InputError, match=r"need \[B·W, 16, width\]"):
        module(torch.randn(2, 15, WIDTH))
    with pytest.raises(InputError, match="mask is"):
        module(torch.randn(4, 16, WIDTH), torch.zeros(3, 16, 16))
    with pytest.raises(InputError, match="do not tile a grid"):
        shifted_window_mask((9, 8), WINDOW, SHIFT)
    with pytest.raises(InputError, match="do not tile a grid"):
        shifted_window_mask((8, 8), WINDOW, (4, 0))
    with pytest.raises(InputError, match="multiples of theirs"):
        partition_windows(torch.randn(1, 9, 8, 3), WINDOW)
    with pytest.raises(InputError, match="do not fill grids"):
        merge_windows(torch.randn(5, 16, 3), (8, 8), WINDOW)
    with pytest.raises(InputError, match="heads=5"):
        CosineWindowAttention(WIDTH, 5, WINDOW)
    with pytest.raises(InputError, match="holds no patch"):
        CosineWindowAttention(WIDTH, HEADS, (0, 4))
