"""The work of a step: nothing is computed twice, nothing that is not read, and no tensor is asked for a number.

On an accelerator each such question would stop the host until the device is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import CASES
from tests.objectives.steps import (
    BATCHES,
    model_of,
    negatives_of,
    pair_batch,
    region_batch,
    text_batch,
    total,
)
from xfm_fast import flops
from xfm_fast.batches import IGNORED, Batch, TextBatch
from xfm_fast.kernels import caching, ladder, ops, relpos_attention, varlen_attention
from xfm_fast.models.fusion import FusionEncoder
from xfm_fast.models.text import TextEncoder, TransformerLayer
from xfm_fast.models.vision import VisionEncoder
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses


def counted(step: Callable[[], dict[str, Tensor]]) -> int:
    """Forward and backward, on the definitions of the operations, which are all matrix products."""
    with ops.use_backend("reference"), FlopCounterMode(display=False) as counter:
        total(step()).backward()
    return counter.get_total_flops()


def sizes(batch: TextBatch) -> tuple[list[int], list[int]]:
    return batch.attention_mask.sum(1).tolist(), (batch.masked_labels != IGNORED).sum(1).tolist()


@pytest.mark.parametrize("case", CASES)
def test_a_last_layer_computes_targets_only(case: str) -> None:
    model, batch = model_of(case), text_batch(case)
    config = model.config
    lengths, masked = sizes(batch)
    found = counted(lambda: pretraining_losses(model, batch))
    model.zero_grad(set_to_none=True)
    whole = flops.text_encoder(config, lengths) + flops.lm_head(config, sum(masked))
    unread = sum(lengths) - sum(masked)
    # Query and output projection and both halves of the MLP, forward and twice backward.
    saved = (
        3
        * flops.linear(
            unread, config.text_width, 2 * config.text_width + 2 * config.text_intermediate
        ).total
    )
    scores = sum((length - read) * length for length, read in zip(lengths, masked, strict=True))
    assert found == 3 * whole.total - saved - 3 * 4 * scores * config.text_width


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    seen: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def called(self: object, *args: object, **kwargs: object) -> object:
            graph = " with a graph" if torch.is_grad_enabled() else ""
            seen[f"{owner.__name__}.{name}{graph}"] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    for encoder in (VisionEncoder, TextEncoder, FusionEncoder):
        count(encoder, "forward")
    count(FusionEncoder, "project")
    return seen


@pytest.mark.parametrize(
    ("batch", "images"), [(pair_batch, 2), (region_batch, 1)], ids=["pairs", "regions"]
)
def test_passes_of_a_step(batch: Callable[[str], Batch], images: int, calls: Counter[str]) -> None:
    pretraining_losses(model_of("tiny_a"), batch("tiny_a"))
    assert calls == {
        "VisionEncoder.forward with a graph": images,
        "TextEncoder.forward with a graph": 1,
        "TextEncoder.forward": 1,
        "FusionEncoder.project with a graph": 1,
        "FusionEncoder.forward with a graph": 1,
    }


@pytest.mark.parametrize("batch", [pair_batch, region_batch])
def test_the_backward_pass_ends_with_texts(batch: Callable[[str], Batch]) -> None:
    """Their gradients, many for few activations, come when the images' activations are gone; no joined weight stays.

    On a CPU the graph of masked images, which ends in the mask token, is gone first of all.
    """
    model, ended = model_of("tiny_a"), list[str]()
    model.zero_grad(set_to_none=True)
    caching.clear()
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: ended.append(name))
        for name, parameter in model.named_parameters()
    ]
    total(pretraining_losses(model, batch("tiny_a"))).backward()
    model.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    encoders = [
        name.split(".")[0]
        for name in ended
        if name.startswith(("text_encoder.", "vision_encoder."))
    ]
    first = encoders.index("text_encoder")
    assert set(encoders[:first]) == {"vision_encoder"}
    assert set(encoders[first:]) == {"text_encoder"}
    if batch is pair_batch:
        fusion = next(name for name in ended if name.startswith("fusion_encoder.roberta.encoder."))
        assert ended.index("vision_encoder.mask_token") < ended.index(fusion)
    weights = [
        layer.attention.self.query.weight
        for layer in model.modules()
        if isinstance(layer, TransformerLayer)
    ]
    assert not caching.cached_tensors(weights)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device without values, on which reading one is an error; kernels return shapes."""
    for module in (ladder, relpos_attention):
        monkeypatch.setattr(module, "resolve", lambda *_, **__: "triton")
    for module in (relpos_attention, varlen_attention):
        monkeypatch.setattr(module, "HEAD_DIMS", (16,))
    # Autocast does not know such a device.
    monkeypatch.setattr(XFM, "_cast", lambda _, pixels: pixels)
    return "meta"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", BATCHES)
def test_an_accelerator_is_never_waited_for(accelerator: str, kind: str, training: bool) -> None:
    """The whole path that a GPU takes, forward and backward, with negatives of a fixed capacity."""
    batch = BATCHES[kind]("tiny_a")
    with torch.device(accelerator):
        model = XFM(model_of("tiny_a").config).double().train(training)
    negatives = None
    if not training and kind not in ("images", "texts"):
        first, second = negatives_of("tiny_a", batch)
        negatives = first.to(accelerator), second.to(accelerator)
    losses = pretraining_losses(model, batch.to(accelerator), hard_negatives=negatives)
    assert all(loss.device.type == accelerator for loss in losses.values())
    total(losses).backward()
