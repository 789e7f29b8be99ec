"""Re-ranking with third-party cross-encoders: equal to running every pair through the untouched model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.agreement import relative_error
from tests.replace import official_replicas as replicas
from xfm_fast import accelerate
from xfm_fast.errors import InputError
from xfm_fast.replace import Reranker

CLOSE = 1e-5
WIDTH, IMAGE_WIDTH = 32, 24
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "bos_token_id": 1,
}


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    options = {"is_decoder": True, "add_cross_attention": True, "attn_implementation": "eager"}
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=3, **SIZES, **options))
    # Built with cross-attention, used in both directions.
    model.config.is_decoder = False
    return model


def _blip() -> nn.Module:
    blip = pytest.importorskip("transformers.models.blip.modeling_blip_text")
    options = {"encoder_hidden_size": IMAGE_WIDTH, "sep_token_id": 2}
    return blip.BlipTextModel(blip.BlipTextConfig(num_hidden_layers=2, **SIZES, **options))


def _albef() -> nn.Module:
    return replicas.TextModel(replicas.TextConfig(fusion_layer=1))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "bert": (_bert, WIDTH),
    "blip": (_blip, IMAGE_WIDTH),
    "albef": (_albef, IMAGE_WIDTH),
}


def _made(name: str, images: int = 3) -> tuple[Any, nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    make, image_width = MODELS[name]
    model, head = make().eval(), nn.Linear(WIDTH, 2)
    real = torch.arange(9) < torch.tensor([9, 4, 1, 5, 6])[:, None]
    given = {
        "image_embeds": torch.randn(images, 7, image_width),
        "input_ids": torch.randint(3, 61, (5, 9)),
        "attention_mask": real.long(),
        "image_index": torch.tensor([2, 0, 0, 2, 1]) % images,
    }
    return model, head, given


def _pair_by_pair(
    model: nn.Module, head: nn.Module, given: dict[str, Tensor], token_mask: Tensor | None = None
) -> Tensor:
    index = given["image_index"]
    seen = None if token_mask is None else token_mask[index]
    out = model(
        given["input_ids"],
        attention_mask=given["attention_mask"],
        encoder_hidden_states=given["image_embeds"][index],
        encoder_attention_mask=seen,
    )
    return head(out.last_hidden_state[:, 0])[:, 1]


def _scores(
    reranker: Reranker, given: dict[str, Tensor], token_mask: Tensor | None = None
) -> Tensor:
    memory = reranker.image_memory(given["image_embeds"], token_mask)
    return reranker.scores(
        memory, given["input_ids"], given["attention_mask"], given["image_index"]
    )


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_equal_those_of_single_pairs(name: str) -> None:
    model, head, given = _made(name)
    parts, results = nn.ModuleList([model, head]), []
    given["image_embeds"].requires_grad_()
    for run in (
        lambda: _pair_by_pair(model, head, given),
        lambda: _scores(Reranker(model, head), given),
    ):
        parts.zero_grad()
        given["image_embeds"].grad = None
        scores = run()
        (scores * torch.arange(1.0, 6.0)).sum().backward()
        gradients = [
            given["image_embeds"].grad,
            *(p.grad for p in parts.parameters() if p.grad is not None),
        ]
        results.append((scores.detach(), gradients))
    (scores, wanted), (others, found) = results
    assert relative_error(others, scores) < CLOSE
    scale = max(float(g.abs().max()) for g in wanted)
    assert (
        max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) < CLOSE * scale
    )
    # BLIP of transformers 5 receives a mask of the image tokens and does not apply it; BERT of 4 does in decoders only.
    if name != "blip" and not (
        name == "bert" and pytest.importorskip("transformers").__version__.startswith("4.")
    ):
        token_mask = (torch.rand(3, 7) < 0.5).long().index_fill(1, torch.tensor([3]), 1)
        with torch.no_grad():
            masked = _pair_by_pair(model, head, given, token_mask)
            assert relative_error(masked, scores) > 1e-3
            assert relative_error(_scores(Reranker(model, head), given, token_mask), masked) < CLOSE


def test_texts_may_come_embedded() -> None:
    model, head, given = _made("albef")
    reranker = Reranker(model, head)
    with torch.no_grad():
        memory = reranker.image_memory(given["image_embeds"])
        wanted = _scores(reranker, given)
        texts = {"attention_mask": given["attention_mask"], "image_index": given["image_index"]}
        own = model(
            given["input_ids"], attention_mask=given["attention_mask"], mode="text"
        ).last_hidden_state
        for embeds in (own, reranker.text_embeds(given["input_ids"], given["attention_mask"])):
            assert (
                relative_error(reranker.scores(memory, text_embeds=embeds, **texts), wanted) < CLOSE
            )


def test_a_separate_fusion_encoder() -> None:
    """X-FM's takes the embeddings of a text encoder, and every layer attends to the image."""
    torch.manual_seed(0)
    fusion, head = (
        replicas.TextModel(replicas.TextConfig(fusion_layer=0)).eval(),
        nn.Linear(WIDTH, 2),
    )
    texts, images, mask = torch.randn(2, 5, WIDTH), torch.randn(1, 7, IMAGE_WIDTH), torch.ones(2, 5)
    with torch.no_grad():
        out = fusion(
            encoder_embeds=texts,
            attention_mask=mask,
            encoder_hidden_states=images.expand(2, -1, -1),
        )
        reranker = Reranker(fusion, head)
        found = reranker.scores(reranker.image_memory(images), text_embeds=texts)
    assert relative_error(found, head(out.last_hidden_state[:, 0])[:, 1]) < CLOSE


def test_after_accelerate_around_the_encoder_and_in_bfloat16() -> None:
    model, head, given = _made("albef")
    whole = nn.ModuleDict({"text_encoder": model, "itm_head": head})
    with torch.no_grad():
        wanted = _pair_by_pair(model, head, given)
        accelerate(whole, unpad=True)
        assert relative_error(_scores(Reranker(whole, head), given), wanted) < CLOSE
        rounded = _scores(Reranker(model, head, dtype=torch.bfloat16), given)
    assert 1e-6 < relative_error(rounded, wanted) < 0.05
    assert rounded.dtype == torch.float32


def test_other_encoders_are_refused() -> None:
    albef, head, given = _made("albef")
    without = replicas.TextModel(replicas.TextConfig(fusion_layer=9))
    for encoder in (nn.ModuleList([albef, copy.deepcopy(albef)]), nn.Linear(3, 3), without):
        with pytest.raises(InputError, match=type(encoder).__name__):
            Reranker(encoder, head)
    for change, named in (
        (
            lambda layer: setattr(layer.attention.self, "position_embedding_type", "relative_key"),
            "relative_key",
        ),
        (lambda layer: layer.output.dense.register_forward_hook(lambda *_: None), "output.dense"),
    ):
        model = copy.deepcopy(albef)
        change(model.encoder.layer[1])
        with pytest.raises(InputError, match=rf"layer\.1.*{named}"):
            Reranker(model)
    dropping = replicas.TextModel(replicas.TextConfig(drop_path=0.1), replicas.TextLayerWithoutMode)
    with pytest.raises(InputError, match="eval"):
        _scores(Reranker(dropping, head), given)
    _scores(Reranker(dropping.eval(), head), given)
