"""Text towers of CLIP, cut at the longest end-of-text: the features of the whole texts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xfm_fast import accelerate
from xfm_fast.replace import unpadded

END, LENGTH = 98, 20
LENGTHS = (7, 3, 11, 5)


def ids(end: int = END, pad: int = END, length: int = LENGTH) -> Tensor:
    """Texts whose last token is the end-of-text, filled up."""
    made = torch.randint(3, 90, (len(LENGTHS), length), generator=torch.Generator().manual_seed(0))
    for row, size in enumerate(LENGTHS):
        made[row, size - 1], made[row, size:] = end, pad
    return made


def widths(model: nn.Module, name: str) -> list[int]:
    """Lengths of the sequences in the calls of a part."""
    seen: list[int] = []
    model.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(next(iter([*args, *kwargs.values()])).shape[1]),
        with_kwargs=True,
    )
    return seen


def towers(**changes: Any) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    given = {
        "vocab_size": 99,
        "max_position_embeddings": LENGTH,
        "eos_token_id": END,
        **sizes,
        **changes,
    }
    model = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**given, projection_dim=12)
    )
    # The causal masks of transformers 4 overflow in float64.
    model = model if transformers.__version__.startswith("4.") else model.double()
    return model.eval(), copy.deepcopy(model)


def assert_near(found: Tensor, wanted: Tensor) -> None:
    band = 1e-12 if wanted.dtype == torch.float64 else 1e-5
    assert float((found - wanted).detach().abs().max()) <= band * float(wanted.detach().abs().max())


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that the layers of packed texts computed."""
    seen: list[int] = []
    run = unpadded.run_packed
    monkeypatch.setattr(
        unpadded,
        "run_packed",
        lambda layers, x, attend: seen.append(len(x)) or run(layers, x, attend),
    )
    return seen


def trained(model: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The output of a tower, and the gradients of its parameters."""
    out = model(**given)
    out.text_embeds.square().sum().backward()
    return out, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("end", "masked"), [(END, True), (2, False)])
def test_packed_texts(end: int, masked: bool, packed: list[int]) -> None:
    original, fast = towers(eos_token_id=end)
    accelerate(fast, unpad=True)
    given: dict[str, Any] = {"input_ids": ids(pad=END if end == END else 0)}
    real = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    if masked:
        given["attention_mask"] = real.long()
    (wanted, gradients), (found, others) = trained(original, given), trained(fast, given)
    assert packed == [sum(LENGTHS)]
    assert_near(found.text_embeds, wanted.text_embeds)
    assert_near(found.last_hidden_state[real], wanted.last_hidden_state[real])
    assert not found.last_hidden_state[~real].any()
    for name, gradient in gradients.items():
        if "k_proj.bias" not in name:
            assert_near(others[name], gradient)
    with torch.no_grad():
        alike = {"input_ids": given["input_ids"][1:2]}
        assert_near(fast(**alike).text_embeds, original(**alike).text_embeds)
        holes = given | {"attention_mask": real.long()}
        holes["attention_mask"][0, 2] = 0
        assert_near(fast(**holes).text_embeds, original(**holes).text_embeds)
    assert packed == [sum(LENGTHS)]
    # A hook on a layer has it called, with padding and behind the longest end-of-text no further.
    seen = widths(fast, "text_model.encoder" if hasattr(fast, "text_model") else "encoder")
    with torch.no_grad():
        assert_near(fast(**given).text_embeds, original(**given).text_embeds)
        assert_near(fast(**given, return_dict=False)[0], original(**given, return_dict=False)[0])
    assert seen == [max(LENGTHS)] * 2


def test_calls_that_are_not_cut() -> None:
    original, fast = towers()
    report = accelerate(fast)
    assert any("unpad=True" in (entry.reason or "") for entry in report.left)
    report = accelerate(fast, unpad=True)
    seen = widths(fast, "text_model.encoder")
    endless = ids()
    endless[1, 2:] = 5
    beyond = torch.ones_like(endless)
    for given in (
        {"input_ids": endless},
        {"input_ids": ids(), "attention_mask": beyond},
        {"input_ids": ids(), "output_hidden_states": True},
    ):
        with torch.no_grad():
            wanted, found = original(**given), fast(**given)
        assert_near(found.last_hidden_state, wanted.last_hidden_state)
    assert seen == [LENGTH] * 3
    report.revert()
    with torch.no_grad():
        assert torch.equal(fast(ids()).last_hidden_state, original(ids()).last_hidden_state)


@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize("apart", [False, True])
def test_open_clip(pool: str, apart: bool, packed: list[int]) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    text = {
        "context_length": LENGTH, "vocab_size": 99, "width": 24, "heads": 2, "layers": 2, "pool_type": pool,
        "eos_id": END,
    }  # fmt: skip
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    kind = open_clip.model.CustomTextCLIP if apart else open_clip.model.CLIP
    original = kind(embed_dim=12, vision_cfg=vision, text_cfg=text).double().eval()
    fast = copy.deepcopy(original)
    report = accelerate(fast, unpad=True)
    assert any(
        entry.fused == ("CutOpenClipText" if apart else "CutOpenClip") for entry in report.replaced
    )
    given = ids(pad=0)
    with torch.no_grad():
        assert_near(
            fast.encode_text(given, normalize=True), original.encode_text(given, normalize=True)
        )
        pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        for found, wanted in zip(fast(pixels, given)[:2], original(pixels, given)[:2], strict=True):
            assert_near(found, wanted)
    assert packed == [sum(LENGTHS)] * 2
    endless = given.clone()
    endless[1, 2:] = 0 if pool == "eos" else 5
    with torch.no_grad():
        assert_near(fast.encode_text(endless), original.encode_text(endless))
    # A hook on a layer has it called, with padding and behind the longest end-of-text no further.
    seen = widths(fast, "text.transformer" if apart else "transformer")
    (fast.text if apart else fast).transformer.resblocks[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert_near(fast.encode_text(given), original.encode_text(given))
    assert seen == [max(LENGTHS)]
    report.revert()
    assert type(fast) is kind
