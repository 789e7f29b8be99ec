"""The packed step against the official procedure: separate passes, padded, an image memory for every pair."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.objectives.steps import gradients, total
from xfm_fast.batches import IGNORED, Batch, PairBatch, RegionBatch, TextBatch
from xfm_fast.benchmarks.backends.official_algorithm import OfficialTrainingTwin
from xfm_fast.benchmarks.record import OFFICIAL, OURS
from xfm_fast.benchmarks.tasks import PRETRAINING
from xfm_fast.benchmarks.work.training import difference, make_step
from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses

LENGTH, SLOTS = 9, 4


@cache
def model_with(local_attn_depth: int = -1, *, detach: bool = True, layers: int = 2) -> XFM:
    torch.manual_seed(1)
    config = XFMConfig.preset(
        "tiny",
        text_layers=layers,
        fusion_layers=layers,
        vision_depth=2,
        local_attn_depth=local_attn_depth,
        detach_text_for_mlm=detach,
    )
    model = XFM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def texts(count: int, config: XFMConfig, draw: torch.Generator) -> dict[str, Tensor]:
    """Texts of any length, some with holes, some with nothing to predict."""

    def integers(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    mask = torch.arange(LENGTH) < integers(LENGTH + 1, count, 1, low=1)
    holes = torch.rand(count, LENGTH, generator=draw) < 0.1
    holes[:, 0] = False
    mask &= ~holes
    ids = integers(config.vocab_size, count, LENGTH, low=4).masked_fill(~mask, config.pad_token_id)
    # Any order, any number of targets up to the slots; the places are those of real tokens.
    keys = torch.rand(count, LENGTH, generator=draw).masked_fill(~mask, 2)
    positions = keys.argsort(1)[:, :SLOTS]
    wanted = torch.arange(SLOTS) < torch.minimum(
        integers(SLOTS + 1, count, 1), mask.sum(1, keepdim=True)
    )
    labels = ids.gather(1, positions).masked_fill(~wanted, IGNORED)
    masked = ids.scatter(1, positions, config.mask_token_id).where(mask, ids)
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "masked_input_ids": masked,
        "masked_positions": positions.masked_fill(~wanted, 0),
        "masked_labels": labels,
    }


def pixels(count: int, config: XFMConfig, draw: torch.Generator) -> Tensor:
    return torch.randn(
        count, 3, config.image_size, config.image_size, generator=draw, dtype=torch.float64
    )


def pair_batch(count: int, config: XFMConfig, seed: int, *, ids: bool) -> PairBatch:
    draw = torch.Generator().manual_seed(seed)
    return PairBatch(
        **texts(count, config, draw),  # pyright: ignore[reportArgumentType]
        image=pixels(count, config, draw),
        image_ids=torch.randint(3, (count,), generator=draw) if ids else None,
        patch_mask=torch.rand(count, config.num_patches, generator=draw) < 0.4,
    )


def region_batch(count: int, images: int, config: XFMConfig, seed: int) -> RegionBatch:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(count, config.num_image_tokens, generator=draw) < 0.4
    mask[:, :2] = True
    whole = torch.rand(count, generator=draw) < 0.3
    return RegionBatch(
        **texts(count, config, draw),  # pyright: ignore[reportArgumentType]
        image=pixels(images, config, draw),
        image_index=torch.randint(images, (count,), generator=draw),
        region_mask=(mask | whole[:, None]).long(),
        boxes=torch.rand(count, 4, generator=draw, dtype=torch.float64),
        is_image=whole.long(),
    )


def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Any pairs, none of them true ones."""
    draw = torch.Generator().manual_seed(seed + 1)
    other = torch.randint(1, count, (2, count), generator=draw)
    images, texts = (torch.arange(count) + other) % count
    return images, texts


def assert_same(model: XFM, batch: Batch, negatives: tuple[Tensor, Tensor] | None) -> None:
    fast = pretraining_losses(model, batch, hard_negatives=negatives)
    slow = OfficialTrainingTwin(model).losses(batch, hard_negatives=negatives)
    assert set(fast) == set(slow)
    compared = {}
    for name, value in fast.items():
        # Without anything to average the official loss is NaN.
        if not slow[name].isfinite():
            assert value.item() == 0, name
            continue
        assert value.item() == pytest.approx(slow[name].item(), rel=1e-10, abs=1e-12), name
        compared[name] = slow[name]
    found = gradients(model, total({name: fast[name] for name in compared}))
    expected = gradients(model, total(compared))
    for name, gradient in found.items():
        other = expected[name]
        if other is None:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            assert torch.allclose(gradient, other, rtol=1e-8, atol=1e-11), name


@settings(max_examples=12)
@given(st.integers(2, 6), st.integers(0, 10**6), st.booleans())
def test_pairs(count: int, seed: int, ids: bool) -> None:
    model = model_with()
    assert_same(model, pair_batch(count, model.config, seed, ids=ids), drawn(count, seed))


@settings(max_examples=12)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 10**6), st.sampled_from([-1, 1, 2]))
def test_regions(count: int, images: int, seed: int, local_attn_depth: int) -> None:
    model = model_with(local_attn_depth)
    assert_same(model, region_batch(count, images, model.config, seed), drawn(count, seed))


@settings(max_examples=8)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_texts(count: int, seed: int) -> None:
    model = model_with()
    generator = torch.Generator().manual_seed(seed)
    batch = TextBatch(**texts(count, model.config, generator))  # pyright: ignore[reportArgumentType]
    assert_same(model, batch, None)


def test_one_fusion_layer_and_texts_that_keep_their_graph() -> None:
    model = model_with(detach=False, layers=1)
    assert_same(model, pair_batch(4, model.config, 5, ids=False), drawn(4, 5))


@settings(max_examples=10)
@given(st.integers(2, 5), st.integers(0, 10**6), st.booleans())
def test_a_fixed_capacity_for_negatives_changes_nothing(
    count: int, seed: int, regions: bool
) -> None:
    """What a step does on an accelerator, where no size may depend on the draw."""
    model = model_with()
    batch = (
        region_batch(count, 2, model.config, seed)
        if regions
        else pair_batch(count, model.config, seed, ids=False)
    )
    with pytest.MonkeyPatch.context() as context:
        context.setattr("xfm_fast.objectives.fusion_pass.fixed_capacity", lambda *_: True)
        assert_same(model, batch, drawn(count, seed))


def test_what_is_packed_beyond_a_text_may_hold_anything() -> None:
    """Slots of a fixed capacity hold neighbouring tokens. Neither their values nor gradients reach a result."""
    model = model_with()
    batch = pair_batch(3, model.config, 3, ids=False)
    with pytest.MonkeyPatch.context() as context:
        context.setattr("xfm_fast.objectives.fusion_pass.fixed_capacity", lambda *_: True)
        alone = pretraining_losses(model, batch, hard_negatives=drawn(3, 3), losses={"itm"})["itm"]
        beside = pretraining_losses(
            model, batch, hard_negatives=drawn(3, 3), losses={"itm", "imlm"}
        )["itm"]
    assert alone.item() == pytest.approx(beside.item(), rel=1e-12)


CPU = torch.device("cpu")


def test_gradients_of_a_deep_model() -> None:
    """Depth is what shows it: a post-norm residual stream that every branch rounds loses a little each time.

    The errors are norms over all gradients, which another order of summation hardly moves.
    """
    config = XFMConfig.preset("tiny", text_layers=24, fusion_layers=24)
    batch = pair_batch(8, config, 0, ids=False)
    step, exact = (
        make_step(
            PRETRAINING, config, 0, {"batch": replace(batch, image=batch.image.to(dtype))}, CPU
        )
        for dtype in (torch.float32, torch.float64)
    )
    exact.model.double()
    truth = exact.outcome(OFFICIAL)
    plain = difference(step.outcome(OFFICIAL, torch.bfloat16), truth)
    found = difference(step.outcome(OURS, torch.bfloat16), truth)
    assert set(truth.losses) == {"itc", "itm", "imlm", "mim"}
    assert found.error <= 2 * plain.error + torch.finfo(torch.bfloat16).eps, (found, plain)
