"""Encoders from Hugging Face RoBERTa and BEiT-v2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import config, load_tensors
from xfm_fast.checkpoint import beit2_state, initialise, interpolate_table, to_ours
from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM


def hugging_face(cfg: XFMConfig, architecture: str) -> nn.Module:
    transformers = pytest.importorskip(
        "transformers", reason="compares with the Hugging Face RoBERTa"
    )
    torch.manual_seed(3)
    config = transformers.RobertaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.text_width,
        num_hidden_layers=cfg.text_layers,
        num_attention_heads=cfg.text_heads,
        intermediate_size=cfg.text_intermediate,
        max_position_embeddings=cfg.max_positions,
        type_vocab_size=cfg.type_vocab_size,
        layer_norm_eps=cfg.text_layer_norm_eps,
    )
    return getattr(transformers, architecture)(config).eval()


def text_batch(cfg: XFMConfig) -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, cfg.vocab_size - 1, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    return ids.masked_fill(~mask, cfg.pad_token_id), mask.long()


@pytest.mark.parametrize("architecture", ["RobertaModel", "RobertaForMaskedLM"])
def test_hugging_face_roberta(architecture: str) -> None:
    cfg = config("tiny_b")
    roberta = hugging_face(cfg, architecture)
    model = XFM(cfg).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialise(model, roberta=roberta.state_dict())
    after = model.state_dict()
    head = {name for name in after if name.startswith("text_encoder.lm_head.")}
    fresh = {name for name in after if not name.startswith("text_encoder.")} | (
        head if architecture == "RobertaModel" else set()
    )
    assert set(report.fresh) == fresh
    assert set(report.loaded) == set(after) - fresh
    assert report.ignored == []
    assert all(torch.equal(after[name], before[name]) for name in fresh)
    assert "vision_encoder" in str(report)

    ids, mask = text_batch(cfg)
    with torch.no_grad():
        out = roberta(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[
            -1
        ]
        ours = model.encode_text(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], out[real], rtol=1e-4, atol=1e-5)


def beit2(cfg: XFMConfig, *, shared: bool, pretrained: bool) -> dict[str, Tensor]:
    """Make a state dict with the names of BEiT-v2, with other values than tiny_b."""
    ours = to_ours(load_tensors("tiny_b/weights"), cfg)[0]
    state = {
        name.removeprefix("vision_encoder."): value + 0.5
        for name, value in ours.items()
        if name.startswith("vision_encoder.")
    }
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    index = torch.zeros(26, 26, dtype=torch.int64)
    if shared:
        state["rel_pos_bias.relative_position_bias_table"] = state[tables[0]]
        state["rel_pos_bias.relative_position_index"] = index
        for name in tables:
            del state[name]
    else:
        state |= {
            f"blocks.{block}.attn.relative_position_index": index
            for block in range(cfg.vision_depth)
        }
    if pretrained:
        del state["fc_norm.weight"], state["fc_norm.bias"]
        state |= {"norm.weight": torch.ones(48), "norm.bias": torch.ones(48)}
        state |= {"lm_head.weight": torch.ones(9, 48), "cls_pt_layers.0.gamma_1": torch.ones(48)}
    else:
        del state["mask_token"]
        state |= {"head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)}
    return state


@pytest.mark.parametrize(("nesting", "shared"), [(None, False), ("module", True)])
@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("size", [40, 56])
def test_beit2(nesting: str | None, shared: bool, pretrained: bool, size: int) -> None:
    cfg = config("tiny_b", image_size=size)
    source = beit2(config("tiny_b"), shared=shared, pretrained=pretrained)
    state = beit2_state({nesting: source} if nesting else source, cfg)
    absent = {"fc_norm.weight", "fc_norm.bias"} if pretrained else {"mask_token"}
    names = {name for name in XFM(cfg).state_dict() if name.startswith("vision_encoder.")}
    assert set(state) == names - {f"vision_encoder.{name}" for name in absent}
    for block in range(cfg.vision_depth):
        key = f"blocks.{block}.attn.relative_position_bias_table"
        table = source["rel_pos_bias.relative_position_bias_table" if shared else key]
        assert torch.equal(
            state[f"vision_encoder.{key}"], interpolate_table(table, (cfg.grid, cfg.grid))
        )
    assert torch.equal(state["vision_encoder.blocks.1.gamma_2"], source["blocks.1.gamma_2"])


def test_initialise_both(tmp_path: Path) -> None:
    cfg = config("tiny_b", image_size=56)
    source = beit2(config("tiny_b"), shared=True, pretrained=True)
    torch.save({"model": source}, tmp_path / "beit.pth")
    model = XFM(cfg)
    fusion = model.state_dict()[
        "fusion_encoder.roberta.encoder.layer.0.output.dense.weight"
    ].clone()
    report = initialise(
        model,
        roberta=hugging_face(cfg, "RobertaForMaskedLM").state_dict(),
        beit2=tmp_path / "beit.pth",
    )
    assert {
        name for name in report.fresh if name.startswith(("vision_encoder.", "text_encoder."))
    } == {
        "vision_encoder.fc_norm.weight",
        "vision_encoder.fc_norm.bias",
    }
    assert set(report.fresh) | set(report.loaded) == set(model.state_dict())
    assert torch.equal(
        model.state_dict()["fusion_encoder.roberta.encoder.layer.0.output.dense.weight"], fusion
    )
    assert torch.equal(model.state_dict()["vision_encoder.cls_token"], source["cls_token"])
