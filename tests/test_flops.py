"""Counts against PyTorch's own counter, against hand counts, and against the figures that the project quotes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.objectives.steps import total
from xfm_fast import flops
from xfm_fast.batches import PairBatch
from xfm_fast.benchmarks.backends.official_algorithm import OfficialTwin
from xfm_fast.config import XFMConfig
from xfm_fast.kernels import ops
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.packing import ImageGroups, Packing

CONFIGS = [
    XFMConfig.preset("tiny"),
    XFMConfig.preset(
        "tiny", image_size=40, vision_width=48, vision_heads=3, text_width=32, text_intermediate=80
    ),
]
LENGTHS = [7, 12, 3, 9]
PADDED = 12
MASK = (torch.arange(PADDED) < torch.tensor(LENGTHS)[:, None]).long()
each_config = pytest.mark.parametrize("cfg", CONFIGS)


def _measured(run: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, and its operations by PyTorch's own counter."""
    with FlopCounterMode(display=False) as counter:
        return run(), counter.get_total_flops()


def _ids(cfg: XFMConfig) -> Tensor:
    return torch.randint(4, cfg.vocab_size, (len(LENGTHS), PADDED)).masked_fill(
        MASK == 0, cfg.pad_token_id
    )


@each_config
def test_official_counts_are_those_of_the_twin(cfg: XFMConfig) -> None:
    twin = OfficialTwin(XFM(cfg).eval())
    pixels = torch.randn(3, 3, cfg.image_size, cfg.image_size)
    padded = [PADDED] * len(LENGTHS)
    with torch.no_grad():
        images, count = _measured(lambda: twin.encode_image(pixels))
        assert count == flops.image_encoder(cfg, 3).total
        texts, count = _measured(lambda: twin.encode_text(_ids(cfg), MASK))
        assert count == flops.text_encoder(cfg, padded).total
        _, count = _measured(lambda: twin.rerank_image(images[0], texts, MASK))
        assert count == flops.official_fusion(cfg, len(LENGTHS), PADDED).total
        _, count = _measured(lambda: (twin.project_image(images), twin.project_text(texts)))
        assert count == flops.contrastive_features(cfg, 3, len(LENGTHS)).total


@each_config
@pytest.mark.parametrize(
    ("first_token_only", "self_attended", "layers"), [(False, True, 1), (True, False, 3)]
)
def test_packed_counts_are_those_of_the_model(
    cfg: XFMConfig, first_token_only: bool, self_attended: bool, layers: int
) -> None:
    cfg = cfg.replace(fusion_layers=layers)
    model = XFM(cfg).eval()
    images = torch.randn(2, cfg.num_image_tokens, cfg.vision_width)
    packing = Packing.from_mask(MASK)
    groups = ImageGroups.from_index(torch.tensor([0, 0, 0, 1]), 2)
    with torch.no_grad(), ops.use_backend("reference"):
        texts, count = _measured(lambda: model.encode_text(_ids(cfg), MASK))
        assert count == flops.text_encoder(cfg, LENGTHS).total
        _, count = _measured(lambda: model.text_encoder(_ids(cfg), packing, first_token_only=True))
        assert count == flops.text_encoder(cfg, LENGTHS, first_token_only=True).total
        memory, count = _measured(lambda: model.image_memory(images))
        assert count == flops.image_memory(cfg, 2).total
        assert sum(layer.numel() for layer in memory.layers) == 2 * flops.image_memory_values(cfg)
        tokens = packing.pack(texts)
        attended, count = _measured(
            lambda: model.fusion_encoder.first_self_attention(tokens, packing)
        )
        assert count == flops.first_self_attention(cfg, torch.tensor(LENGTHS)).total
        options: dict[str, Any] = {
            "first_token_only": first_token_only,
            "self_attended": self_attended,
        }
        start = attended if self_attended else tokens
        fused, count = _measured(
            lambda: model.fusion_encoder(start, packing, memory, groups, **options)
        )
        assert count == flops.fusion(cfg, LENGTHS, **options).total
        _, count = _measured(lambda: model.match_logits(fused[: len(LENGTHS), None]))
        assert count == flops.matching_head(cfg, len(LENGTHS)).total


def _pairs(cfg: XFMConfig, masked: list[int]) -> PairBatch:
    """Four captions of LENGTHS, the first tokens of which are masked."""
    slots = torch.arange(4).expand(len(LENGTHS), -1)
    used = slots < torch.tensor(masked)[:, None]
    ids = _ids(cfg)
    return PairBatch(
        image=torch.randn(len(LENGTHS), 3, cfg.image_size, cfg.image_size),
        input_ids=ids,
        attention_mask=MASK,
        masked_input_ids=ids,
        masked_positions=slots.masked_fill(~used, 0),
        masked_labels=ids[:, :4].masked_fill(~used, -100),
        patch_mask=torch.arange(cfg.num_patches).expand(len(LENGTHS), -1) < cfg.num_masking_patches,
    )


@each_config
def test_training_steps_are_those_of_the_model(cfg: XFMConfig) -> None:
    """Forward and backward run no GEMM that the count leaves out."""
    masked = [3, 2, 1, 4]
    model, batch, own = XFM(cfg).eval(), _pairs(cfg, masked), torch.arange(len(LENGTHS))
    # Every caption is drawn once.
    drawn = own.roll(-1), own.roll(1)
    with ops.use_backend("reference"):
        _, count = _measured(
            lambda: total(pretraining_losses(model, batch, hard_negatives=drawn)).backward()
        )
    assert count == flops.pretraining_step(cfg, LENGTHS, masked).total


def test_hand_counts() -> None:
    cfg = XFMConfig.preset("tiny")
    # Tiny: 16 patches of 3·8·8 values, 17 tokens of width 64, MLP 256, 3 blocks.
    patches = 2 * 16 * 192 * 64
    block = 2 * 17 * 64 * (3 * 64 + 64 + 256 + 256) + 2 * 17 * 17 * 64 * 2
    assert flops.image_encoder(cfg, 2).total == 2 * (patches + 3 * block)
    # Tiny text: width 64, MLP 128, 3 layers; lengths 2 and 5.
    layer = 2 * 7 * 64 * (4 * 64 + 2 * 128) + 2 * 2 * (4 + 25) * 64
    assert flops.text_encoder(cfg, [2, 5]).total == 3 * layer
    assert flops.text_encoder(cfg, [2, 5]).attention == 3 * 4 * 29 * 64


def test_figures_of_the_official_evaluation() -> None:
    cfg = XFMConfig.preset("base", image_size=384)
    pair = flops.official_fusion(cfg, 1, 40)
    assert pair.total == pytest.approx(25.2e9, rel=0.005)
    assert flops.image_memory(cfg, 1).total / pair.total == pytest.approx(0.65, abs=0.01)
    pairs = flops.official_pairs(5000, 25010, 256)
    assert pairs == (5000 + 25010) * 256
    assert pairs * pair.total == pytest.approx(193e15, rel=0.01)
