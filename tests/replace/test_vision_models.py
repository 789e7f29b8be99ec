"""Vision models: other sizes, calls and parts than those of the contract, and the towers of open_clip."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.replace.families import (
    FAMILIES,
    IMAGE,
    TRANSFORMERS,
    assert_close,
    gradients,
    pixels,
    randomised,
    states,
    with_fused_copy,
    without_chance,
)
from xfm_fast import accelerate
from xfm_fast.errors import InputError

WIDTH = 48


def assert_same(model: Any, fast: Any, *args: Any, **given: Any) -> None:
    outs = [each(*args, **given) for each in (model, fast)]
    wanted, found = (
        (out if isinstance(out, Tensor) else out.last_hidden_state).detach() for out in outs
    )
    assert_close({"output": wanted}, {"output": found}, 1e-12)


@pytest.mark.parametrize("kind", ["BEiT", "BEiT, shared bias"])
def test_other_resolutions(kind: str) -> None:
    model, fast = with_fused_copy(FAMILIES[kind].model())
    for height, width in ((48, 48), (32, 48)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        for options in ({}, {"interpolate_pos_encoding": True}):
            assert_same(model, fast, x, **options)


@pytest.mark.skipif(TRANSFORMERS < 5, reason="the row names the parts as transformers 5 does")
def test_images_of_other_sizes_have_other_windows() -> None:
    model, fast = with_fused_copy(FAMILIES["Swin"].model())
    with torch.no_grad():
        for size in (IMAGE, 40, IMAGE):
            assert_same(model, fast, pixels(size=size), interpolate_pos_encoding=True)


def test_another_input_size_of_timm() -> None:
    model, fast = with_fused_copy(FAMILIES["timm's BEiT-v2"].model())
    for each in (model, fast):
        each.set_input_size((48, 40))
    assert_same(model, fast, pixels(size=48)[..., :40])


def test_norms_without_bias() -> None:
    case = FAMILIES["timm's ViT"]
    model, fast = with_fused_copy(case.model(norm_layer=partial(nn.LayerNorm, bias=False)))
    wanted, found = (
        gradients(each, partial(states, each, case.inputs(torch.float64))) for each in (model, fast)
    )
    assert_close(wanted, found, 1e-11)


def _gate(model: Any) -> None:
    for block in model.blocks:
        block.attn.gate = nn.Linear(WIDTH, WIDTH)


def _add_parameter(model: Any) -> None:
    for part in [part for part in model.modules() if type(part).__name__ == "ViTMSNLayer"]:
        part.register_parameter("shift", nn.Parameter(torch.zeros(WIDTH)))


@pytest.mark.parametrize(
    ("kind", "options", "change", "named"),
    [
        ("timm's ViT", {"norm_layer": "rmsnorm"}, None, "RmsNorm"),
        ("timm's EVA", {}, _gate, "gate"),
        ("ViT-MSN", {}, _add_parameter, "shift"),
    ],
)
def test_other_layers_are_refused(
    kind: str, options: dict[str, Any], change: Any, named: str
) -> None:
    model = FAMILIES[kind].model(**options)
    if change is not None:
        change(model)
    with pytest.raises(InputError, match=named):
        accelerate(model, include=["blocks.*"] if "timm" in kind else ["*ayer*"])


def test_towers_of_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    vision = {
        "image_size": IMAGE,
        "patch_size": 8,
        "width": 48,
        "layers": 2,
        "head_width": 16,
        "ls_init_value": 0.1,
    }
    text = {"context_length": 9, "vocab_size": 99, "width": 48, "heads": 3, "layers": 2}
    model: Any = randomised(open_clip.model.CLIP(32, vision, text))
    fast, tokens = (
        copy.deepcopy(model),
        torch.randint(1, 99, (3, 9), generator=torch.Generator().manual_seed(1)),
    )
    report = accelerate(fast)
    assert [entry.class_name for entry in report.replaced].count("ResidualAttentionBlock") == 4
    for run in (lambda m: m.encode_image(pixels()), lambda m: m.encode_text(tokens)):
        wanted, found = (
            gradients(without_chance(each), partial(run, each)) for each in (model, fast)
        )
        assert_close(wanted, found, 1e-12)
    report.revert()
    assert torch.equal(fast.encode_text(tokens), model.encode_text(tokens))
    model = model.float()
    fast = copy.deepcopy(model)
    accelerate(fast, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, found = (each.encode_image(pixels(torch.float32)).float() for each in (model, fast))
    assert_close({"output": wanted}, {"output": found}, 2.0**-4)
