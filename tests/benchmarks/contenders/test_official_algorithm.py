"""The twin against the model and against golden vectors of the official code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xfm_fast.benchmarks.contenders.official_algorithm import OfficialTwin
from xfm_fast.checkpoint import load_into, to_ours
from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM

TINY = XFMConfig.preset("tiny")
TWO_WIDTHS = XFMConfig.preset(
    "tiny", image_size=40, vision_width=48, vision_heads=3, text_width=32, text_intermediate=80
)


def _random(cfg: XFMConfig, dtype: torch.dtype = torch.float64) -> tuple[XFM, OfficialTwin]:
    """A model with no parameter at its initial zero or one, which would hide mistakes."""
    model = XFM(cfg).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, OfficialTwin(model)


def _texts(cfg: XFMConfig, lengths: list[int], padded: int) -> tuple[Tensor, Tensor]:
    mask = torch.arange(padded) < torch.tensor(lengths)[:, None]
    ids = torch.randint(4, cfg.vocab_size, (len(lengths), padded))
    return ids.masked_fill(~mask, cfg.pad_token_id), mask.long()


def _close(ours: Tensor, theirs: Tensor) -> None:
    eps = torch.finfo(ours.dtype).eps
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1000 * eps, f"relative error {error:.1e}"


@pytest.mark.parametrize("cfg", [TINY, TWO_WIDTHS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_the_model_at_real_positions(cfg: XFMConfig, dtype: torch.dtype) -> None:
    model, twin = _random(cfg, dtype)
    pixels = torch.randn(3, 3, cfg.image_size, cfg.image_size, dtype=dtype)
    ids, mask = _texts(cfg, [7, 12, 3], 12)
    with torch.no_grad():
        images, theirs = model.encode_image(pixels), twin.encode_image(pixels)
        _close(images, theirs)
        texts, their_texts = model.encode_text(ids, mask), twin.encode_text(ids, mask)
        real = mask.bool()
        _close(texts[real], their_texts[real])
        fused = model.fuse(texts, mask, model.image_memory(images))
        their_fused = twin.fuse_pairs(their_texts, mask, theirs)
        _close(fused[real], their_fused[real])
        _close(model.match_logits(fused), twin.match_logits(their_fused))
        _close(model.project_image(images), twin.project_image(theirs))
        _close(model.project_text(texts), twin.project_text(their_texts))


def test_reranking_repeats_the_image_for_every_text() -> None:
    model, twin = _random(TWO_WIDTHS)
    cfg = model.config
    ids, mask = _texts(cfg, [5, 9, 2, 9], 10)
    with torch.no_grad():
        image = model.encode_image(torch.randn(1, 3, cfg.image_size, cfg.image_size, dtype=torch.float64))
        texts = model.encode_text(ids, mask)
        scores = twin.rerank_image(image[0], texts, mask)
        fused = model.fuse(
            texts, mask, model.image_memory(image), torch.zeros(4, dtype=torch.long), first_token_only=True
        )
        _close(model.match_logits(fused)[:, 1], scores)
        for number in range(4):
            alone = twin.rerank_text(texts[number], mask[number], image)
            _close(alone[0], scores[number])


def test_retrieval_scores_the_best_candidates_only() -> None:
    model, twin = _random(TINY)
    cfg = model.config
    ids, mask = _texts(cfg, [5, 9, 4, 6, 3, 8], 10)
    with torch.no_grad():
        images = twin.encode_image(torch.randn(4, 3, cfg.image_size, cfg.image_size, dtype=torch.float64))
        texts = twin.encode_text(ids, mask)
        i2t, t2i = twin.retrieve(images, texts, mask, k=2)
    assert i2t.shape == (4, 6)
    assert t2i.shape == (6, 4)
    assert (i2t != -100).sum(1).tolist() == [2] * 4
    assert (t2i != -100).sum(1).tolist() == [2] * 6
    both = (i2t != -100) & (t2i.t() != -100)
    _close(i2t[both], t2i.t()[both])


def test_local_attention_returns_the_class_token() -> None:
    model, twin = _random(TINY.replace(local_attn_depth=1))
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size, dtype=torch.float64)
    with torch.no_grad():
        _close(model.encode_image(pixels), twin.encode_image(pixels))


def test_holds_no_copies() -> None:
    model, twin = _random(TINY)
    ids, mask = _texts(model.config, [4], 6)
    with torch.no_grad():
        before = twin.encode_text(ids, mask)
        model.text_encoder.roberta.encoder[0].attention.self.query.weight.mul_(2)
        assert not torch.equal(before, twin.encode_text(ids, mask))


def _official(case: str, cfg: XFMConfig, weights: dict[str, Tensor]) -> OfficialTwin:
    model = XFM(cfg).double().eval()
    state, _ = to_ours(weights, cfg)
    load_into(model, state, what=case)
    return OfficialTwin(model)


@pytest.mark.parametrize("case", ["tiny_a", "tiny_b"])
def test_reproduces_the_official_outputs(
    case: str, config: Callable[..., XFMConfig], load_tensors: Callable[[str], dict[str, Tensor]]
) -> None:
    twin = _official(case, config(case), load_tensors(f"{case}/weights"))
    given, expected = load_tensors(f"{case}/inputs"), load_tensors(f"{case}/outputs")
    mask = given["text_atts"]
    with torch.no_grad():
        images = twin.encode_image(given["image"].double())
        texts = twin.encode_text(given["text_ids"], mask)
        fused = twin.fuse_pairs(texts, mask, images)
    _close(images, expected["image_embeds"])
    _close(texts, expected["text_embeds"])
    _close(fused, expected["cross_embeds"])
    _close(twin.project_image(images), expected["image_feat"])
    _close(twin.project_text(texts), expected["text_feat"])
    _close(twin.match_logits(fused), expected["itm_logits"][: len(fused)])


def test_reproduces_the_official_retrieval(
    config: Callable[..., XFMConfig],
    load_tensors: Callable[[str], dict[str, Tensor]],
    load_json: Callable[[str], dict[str, Any]],
) -> None:
    facts = load_json("tiny_b/config")
    cfg = config("tiny_b", image_size=facts["ft_res"])
    twin = _official("tiny_b", cfg, load_tensors("tiny_b/weights"))
    given, expected = load_tensors("tiny_b/ft_inputs"), load_tensors("tiny_b/ft_outputs")
    mask = given["retrieval_eval/text_atts"]
    with torch.no_grad():
        images = twin.encode_image(given["retrieval_eval/image"].double())
        texts = twin.encode_text(given["retrieval_eval/text_ids"], mask)
        i2t, t2i = twin.retrieve(images, texts, mask, facts["finetune"]["retrieval_eval"]["k_test"])
    _close(i2t, expected["retrieval_eval/score_i2t"])
    _close(t2i, expected["retrieval_eval/score_t2i"])
