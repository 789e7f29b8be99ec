"""An `XFM` whose blocks multiply in int8: near the model in floats, saved and trained as ever."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast import XFM, XFMConfig
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels import reference
from xfm_fast.kernels.cpu import int8

pytestmark = pytest.mark.skipif(int8.why_not() is not None, reason=f"no int8 products here: {int8.why_not()}")


@pytest.fixture
def model() -> XFM:
    torch.manual_seed(0)
    made = XFM(XFMConfig.preset("tiny")).eval().requires_grad_(False)
    # Of fresh weights, blocks add next to nothing to their input.
    for block in made._block_weights():
        for weight in block:
            weight.normal_(std=0.1)
    return made


def inputs(config: XFMConfig) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, config.vocab_size, (5, 9))
    ids[1:, 6:] = config.pad_token_id
    return torch.randn(3, 3, config.image_size, config.image_size), ids


@torch.no_grad()
def results(model: XFM, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    images, texts = model.encode_image(pixels.to(model.dtype)), model.encode_text(ids)
    memory, mask = model.image_memory(images), ids.ne(model.config.pad_token_id)
    fused = model.fuse(texts, mask, memory, torch.tensor([0, 0, 1, 2, 2]))
    return {"images": images.float(), "texts": texts.float()[mask], "fused": fused.float()[mask]}


def least_cosine(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return min(float(F.cosine_similarity(found[name], wanted[name], dim=-1).min()) for name in wanted)


def test_near_the_model_and_back(model: XFM) -> None:
    given = inputs(model.config)
    wanted, state = results(model, *given), copy.deepcopy(model.state_dict())
    assert model.quantise() is model
    assert model.quantised
    assert 0.99 < least_cosine(results(model, *given), wanted) < 1 - 1e-6
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(results(copy.deepcopy(model), *given)["fused"], results(model, *given)["fused"])
    assert model.dequantise().dequantise() is model
    assert not model.quantised
    assert all(torch.equal(value, wanted[name]) for name, value in results(model, *given).items())


def test_the_blocks_that_cost_most_stay_in_floats(model: XFM) -> None:
    given = inputs(model.config)
    wanted = results(model, *given)
    calls, agreement = 0, lambda: least_cosine(results(model, *given), wanted)

    def counted() -> float:
        nonlocal calls
        calls += 1
        return agreement()

    whole = model.quantise(counted, least=0.9)
    assert calls == 1
    assert all(int8.is_marked(weight) for block in whole._block_weights() for weight in block)
    reached = agreement()
    model.dequantise()
    least = 1 - (1 - reached) / 3
    model.quantise(counted, least=least)
    assert agreement() >= least > reached
    marked = [{int8.is_marked(weight) for weight in block} for block in model._block_weights()]
    assert {frozenset(block) for block in marked} == {frozenset({True}), frozenset({False})}
    assert calls <= 2 + 2 * len(marked)
    assert model.quantised
    # The marks of what stays are there in a copy too.
    assert torch.equal(results(copy.deepcopy(model), *given)["fused"], results(model, *given)["fused"])


def test_no_block_is_left_in_int8_where_none_agrees(model: XFM) -> None:
    with pytest.raises(InputError, match=r"no block can run in int8 with an agreement\(\) of 0\.97"):
        model.quantise(lambda: 0.5)
    assert not model.quantised


def test_it_is_the_model_of_rounded_floats(model: XFM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model against its plain twin, in which the same products are of floats that were rounded before."""
    given = inputs(model.config)
    floats = results(model, *given)
    found = results(model.quantise(), *given)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
        return reference.linear(reference.as_int8(x, gelu=gelu), reference.as_int8(weight), bias)

    gelu: Callable[..., Tensor] = lambda *given: F.gelu(linear(*given))  # noqa: E731
    monkeypatch.setattr(int8, "linear", linear)
    monkeypatch.setattr(int8, "linear_gelu", gelu)
    scaled: Callable[..., Tensor] = lambda y, gamma: y if gamma is None else gamma * y  # noqa: E731
    monkeypatch.setattr(int8, "linear_residual", lambda x, w, b, r, gamma: r + scaled(linear(x, w, b), gamma))
    monkeypatch.setattr(
        int8, "mlp_residual", lambda x, w, b, v, c, r, gamma: r + scaled(linear(gelu(x, w, b), v, c, gelu=True), gamma)
    )
    twin = results(model, *given)
    # A value on the edge between two levels may fall on either side, and later layers see it.
    for name, value in found.items():
        assert float((twin[name] - value).norm()) < 0.5 * float((floats[name] - value).norm())


def test_loaded_and_saved(model: XFM, tmp_path: Path) -> None:
    given = inputs(model.config)
    model.save_pretrained(tmp_path / "floats")
    loaded = XFM.from_pretrained(tmp_path / "floats", dtype="int8")
    assert loaded.quantised
    assert loaded.dtype in (torch.bfloat16, torch.float32)
    assert least_cosine(results(loaded, *given), results(model, *given)) > 0.98
    loaded.save_pretrained(tmp_path / "again")
    again = XFM.from_pretrained(tmp_path / "again", dtype=loaded.dtype)
    assert not again.quantised
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_training_is_exact(model: XFM) -> None:
    pixels, ids = inputs(model.config)
    model.requires_grad_(True)
    wanted = model.encode_image(pixels)
    model.quantise()
    assert torch.equal(model.encode_image(pixels), wanted)
    model.encode_text(ids).sum().backward()
    query = model.text_encoder.roberta.encoder[0].attention.self.query.weight
    assert query.grad is not None


def test_refusals(model: XFM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model.quantise()
    with pytest.raises(InputError, match="in int8 already"):
        model.quantise()
    model.dequantise()
    with pytest.raises(InputError, match="float64"):
        copy.deepcopy(model).double().quantise()
    with pytest.raises(UnavailableError, match="for CPUs"):
        copy.deepcopy(model).to("meta").quantise()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="'int4' is unknown"):
        XFM.from_pretrained(tmp_path, dtype="int4")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(int8, "why_not", lambda: "of a test")
    with pytest.raises(UnavailableError, match="not offered here: of a test"):
        XFM.from_pretrained(tmp_path, dtype="int8")
    with pytest.raises(UnavailableError, match="of a test"):
        model.quantise()
