"""An `XFM` whose blocks compute in 8 bits: accuracy, saving, and (int8) training."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast import XFM, XFMConfig
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels import fp8, ops, reference
from xfm_fast.kernels.cpu import int8, llvm, selection
from xfm_fast.kernels.flags import EightBits, kind_of

pytestmark = pytest.mark.usefixtures("int8_chosen")
needs_int8 = pytest.mark.skipif(
    int8.why_not() is not None, reason=f"no int8 products here: {int8.why_not()}"
)
either = pytest.mark.parametrize("kind", [pytest.param("int8", marks=needs_int8), "fp8"])


@pytest.fixture
def model() -> XFM:
    torch.manual_seed(0)
    made = XFM(XFMConfig.preset("tiny")).eval().requires_grad_(False)
    # Of fresh weights, blocks add next to nothing to their input.
    for weight in made._block_weights():
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
    return min(
        float(F.cosine_similarity(found[name], wanted[name], dim=-1).min()) for name in wanted
    )


@either
def test_near_the_model_and_back(kind: EightBits, model: XFM) -> None:
    given = inputs(model.config)
    wanted, state = results(model, *given), copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="agreement"):
        model.quantise(kind, lambda: 0.5)
    assert model.quantised is None
    assert model.quantise(kind) is model
    assert model.quantised == kind
    assert 0.98 < least_cosine(results(model, *given), wanted) < 1 - 1e-6
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(
        results(copy.deepcopy(model), *given)["fused"], results(model, *given)["fused"]
    )
    assert model.dequantise().dequantise() is model
    assert not model.quantised
    assert all(torch.equal(value, wanted[name]) for name, value in results(model, *given).items())


@either
def test_the_blocks_with_the_largest_error_stay_in_floats(kind: EightBits, model: XFM) -> None:
    given, calls = inputs(model.config), []
    wanted = results(model, *given)

    def agreement() -> float:
        calls.append(least_cosine(results(model, *given), wanted))
        return calls[-1]

    model.quantise(kind, agreement, least=0.9)
    assert len(calls) == 1
    assert {kind_of(weight) for weight in model._block_weights()} == {kind}
    model.dequantise()
    least = 1 - (1 - calls[0]) / 3
    model.quantise(kind, agreement, least=least)
    assert calls[-1] >= least > calls[0]
    marks = [{kind_of(weight) for weight in block} for block in model._weights_by_block()]
    assert {frozenset(block) for block in marks} == {frozenset({kind}), frozenset({None})}
    assert len(calls) <= 3 + 2 * len(marks)
    assert model.quantised == kind
    # A copy has the flags too.
    assert torch.equal(
        results(copy.deepcopy(model), *given)["fused"], results(model, *given)["fused"]
    )


@needs_int8
def test_it_is_the_model_of_rounded_floats(model: XFM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model in floats whose GEMMs have operands rounded to int8; the text by itself runs `ShortParts`."""
    if llvm.why_not(torch.int8) is None:
        compiled = selection.Selection(
            "products of bytes", torch.float32, "llvm", {}, {}, "settled"
        )
        monkeypatch.setitem(selection._selections, ("products of bytes", torch.float32), compiled)
    pixels, ids = inputs(model.config)

    def computed() -> dict[str, Tensor]:
        with torch.inference_mode():
            return results(model, pixels, ids) | {"alone": model.encode_text(ids[:1])}

    def linear(
        x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False, norm: Any = None
    ) -> Tensor:
        x = x if norm is None else reference.layer_norm(x, *norm)
        return reference.linear(reference.as_int8(x), reference.as_int8(weight), bias)

    def linear_residual(
        x: Tensor, w: Tensor, b: Tensor | None, residual: Tensor, gamma: Any, **rest: Any
    ) -> Tensor:
        y = linear(x, w, b, **rest)
        return residual + (y if gamma is None else gamma * y)

    def mlp_residual(
        x: Tensor, w: Any, b: Any, v: Any, c: Any, residual: Any, gamma: Any, norm: Any = None
    ) -> Tensor:
        return linear_residual(F.gelu(linear(x, w, b, norm=norm)), v, c, residual, gamma, gelu=True)

    floats = computed()
    model.quantise()
    found = computed()
    for name, twin in (
        ("linear", linear),
        ("linear_residual", linear_residual),
        ("mlp_residual", mlp_residual),
    ):
        monkeypatch.setattr(int8, name, twin)
    monkeypatch.setattr(int8, "linear_gelu", lambda *given: F.gelu(linear(*given)))
    monkeypatch.setattr(int8, "compiled_delay", lambda *_: math.inf)
    # A value on the edge between two levels may fall on either side, and later layers see it.
    for name, twin in computed().items():
        assert float((twin - found[name]).norm()) < 0.5 * float((floats[name] - found[name]).norm())


@either
def test_loaded_and_saved(kind: EightBits, model: XFM, tmp_path: Path) -> None:
    given = inputs(model.config)
    model.save_pretrained(tmp_path / "floats")
    loaded = XFM.from_pretrained(tmp_path / "floats", dtype=kind)
    assert loaded.quantised == kind
    assert loaded.dtype in (torch.bfloat16, torch.float32)
    assert least_cosine(results(loaded, *given), results(model, *given)) > 0.98
    loaded.save_pretrained(tmp_path / "again")
    again = XFM.from_pretrained(tmp_path / "again", dtype=loaded.dtype)
    assert not again.quantised
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in loaded.state_dict().items()
    )


@needs_int8
def test_training_is_exact(model: XFM) -> None:
    pixels, ids = inputs(model.config)
    model.requires_grad_(True)
    wanted = model.encode_image(pixels)
    model.quantise()
    assert torch.equal(model.encode_image(pixels), wanted)
    model.encode_text(ids).sum().backward()
    query = model.text_encoder.roberta.encoder[0].attention.self.query.weight
    assert query.grad is not None


def test_fp8_excludes_embeddings_and_heads_and_moves_with_the_model(model: XFM) -> None:
    given = inputs(model.config)
    with ops.use_fp8():
        wanted = results(model, *given)
    found = results(model.quantise("fp8"), *given)
    # The context also rounds the patches, which a quantised model does not.
    assert torch.equal(found["texts"], wanted["texts"])
    assert not torch.equal(found["images"], wanted["images"])
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model._apply(torch.clone)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model.quantised == "fp8"
    assert all(torch.equal(value, found[name]) for name, value in results(model, *given).items())
    with pytest.raises(InputError, match="no gradient"):
        model.requires_grad_(True).encode_text(given[1])


@either
def test_refusals(
    kind: EightBits, model: XFM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="float64"):
        copy.deepcopy(model).double().quantise(kind)
    with pytest.raises(InputError, match=kind):
        copy.deepcopy(model).quantise(kind).quantise(kind)
    with pytest.raises(InputError, match="int4"):
        XFM.from_pretrained(tmp_path, dtype="int4")  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(int8, "why_not", lambda: "of a test")
    monkeypatch.setattr(fp8, "_why_not", lambda device, index: "of a test")
    for refused in (
        lambda: XFM.from_pretrained(tmp_path, dtype=kind),
        lambda: model.quantise(kind),
    ):
        with pytest.raises(UnavailableError, match="of a test"):
            refused()
    assert model.quantised is None
