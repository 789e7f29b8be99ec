"""`XFM.freeze`: the same results from packed weights, and the same parameters after `unfreeze`."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xfm_fast import XFM, XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.export.graphs import build
from xfm_fast.kernels.backend import use_backend
from xfm_fast.kernels.cpu import attention, gemm, int8, llvm, selection
from xfm_fast.models import text, vision
from xfm_fast.packing import Packing
from xfm_fast.plans import plan

DTYPES = [torch.float32, torch.bfloat16]
NEEDS_INT8 = pytest.mark.skipif(
    bool(int8.why_not() or llvm.why_not(torch.int8)), reason="no compiled int8 GEMM here"
)


@pytest.fixture(params=["onednn", "panels"], autouse=True)
def layout(request: pytest.FixtureRequest, freeze_in: Callable[[gemm.Layout], None]) -> gemm.Layout:
    freeze_in(request.param)
    return request.param


@pytest.fixture
def model(request: pytest.FixtureRequest) -> XFM:
    made = XFM(XFMConfig.preset("tiny")).eval().to(getattr(request, "param", torch.float32))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("gamma_1", "gamma_2", "bias_table")):
                parameter.normal_()
    return made


def results(model: XFM) -> list[Tensor]:
    torch.manual_seed(1)
    config = model.config
    pixels = torch.randn(2, 3, config.image_size, config.image_size)
    ids = torch.randint(5, config.vocab_size, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.inference_mode():
        image, text = model.encode_image(pixels), model.encode_text(ids, mask)
        memory, of = model.image_memory(image), torch.tensor([0, 1, 1])
        first = model.fuse(text, mask, memory, of, first_token_only=True)
        few = model.encode_text(ids[:1, :2])
        return [
            image,
            text,
            few,
            model.fuse(text, mask, memory, of),
            model.match_logits(first),
            first,
        ]


@pytest.mark.usefixtures("int8_chosen")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["plain", "frozen", "frozen as it was", pytest.param("int8", marks=NEEDS_INT8)]
)
def test_few_texts(
    kind: str,
    dtype: torch.dtype,
    layout: gemm.Layout,
    freeze_in: Callable[[gemm.Layout], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a plan, by the general path, after changes, and with a hook."""
    # A plan cannot read oneDNN's blocks.
    lengths = [] if kind == "frozen" and layout == "onednn" else [7]
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    if (reason := llvm.why_not(dtype)) is not None:
        pytest.skip(f"no compiled kernels here: {reason}")
    if kind == "frozen as it was":
        freeze_in("plain")
    for each in DTYPES:
        compiled = selection.Selection("products of bytes", each, "llvm", {}, {}, "settled")
        monkeypatch.setitem(selection._selections, ("products of bytes", each), compiled)
    monkeypatch.setattr(plan, "_CALLS_S", math.inf)
    model = XFM(XFMConfig.preset("tiny")).eval().requires_grad_(False)
    for weight in model._block_weights():
        # Fresh blocks add next to nothing to their input.
        weight.normal_(std=0.1)
    model = model.to(dtype)
    planned, run_plan = list[int](), plan.Plan.run

    def observed(own: plan.Plan, x: Any, *given: Any) -> Tensor | None:
        out = run_plan(own, x, *given)
        planned.extend([len(x.indices[0])] if out is not None else [])
        return out

    monkeypatch.setattr(plan.Plan, "run", observed)
    ids = torch.randint(5, model.config.vocab_size, (2, 9))
    mask = torch.arange(9)[None] < torch.tensor([[7], [9]])

    def run(texts: int = 1) -> Tensor:
        planned.clear()
        with torch.inference_mode():
            return model.encode_text(ids[:texts], mask[:texts])

    with use_backend("reference"):
        expected = run(2)
    assert not planned
    if kind == "int8":
        expected = model.quantise().encode_text(ids, mask)
    elif kind.startswith("frozen"):
        model.freeze()
    allowed = (2e-5 if dtype == torch.float32 else 0.1) * float(expected.abs().max())
    assert float((run() - expected[:1]).abs().max()) <= allowed
    assert planned == lengths
    assert float((run(2) - expected).abs().max()) <= allowed
    assert planned == [length + 9 for length in lengths]
    for texts in (1, 2):
        planned.clear()
        with torch.inference_mode():
            packing = Packing.from_mask(mask[:texts])
            first = model.text_encoder(ids[:texts], packing, first_token_only=True)
        assert first.shape == (texts, model.config.text_width)
        assert float((first - expected[:texts, 0]).abs().max()) <= allowed
        assert planned == [length + 9 * (texts - 1) for length in lengths]
    attention: Any = model.text_encoder.roberta.encoder.layer[0].attention
    embeddings: Any = model.text_encoder.roberta.embeddings
    before = run()
    changes = [attention.self.value.bias, embeddings.word_embeddings.weight]
    if not kind.startswith("frozen"):
        changes.append(attention.self.key.weight)
    for written in changes:
        with torch.no_grad():
            written.add_(torch.randn_like(written))
        after = run()
        assert not torch.equal(after, before)
        assert planned == lengths
        before = after
    with monkeypatch.context() as patched:
        patched.setattr(text, "DTYPES", ())
        assert float((before - run()).abs().max()) <= 2 * allowed
        assert not planned
    if kind.startswith("frozen"):
        model.unfreeze()
        assert model.text_encoder.roberta not in plan._plans
        attention.self.key.weight.data.neg_()
        assert not torch.equal(run(), before)
        assert planned == [7]
        before = run()
    seen: list[Any] = []
    attention.output.register_forward_hook(lambda *given: seen.append(given))
    assert float((run() - before).abs().max()) <= 2 * allowed
    assert seen
    assert not planned


class _Encoded(nn.Module):
    """The states of a text, as a module of one method."""

    def __init__(self, model: XFM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.encode_text(ids, torch.ones_like(ids))


@pytest.mark.parametrize("trace", ["jit", "export", "functional_call"])
def test_a_plan_stays_out_of_traces_and_of_other_parameters(trace: str, model: XFM) -> None:
    encoded, first, second = _Encoded(model), *torch.randint(5, model.config.vocab_size, (2, 1, 9))
    with torch.no_grad():
        before = encoded(first)
        if trace == "functional_call":
            doubled = {name: 2 * value for name, value in encoded.named_parameters()}
            found = torch.func.functional_call(encoded, doubled, (second,))
            twin = copy.deepcopy(encoded)
            twin.load_state_dict(doubled, strict=False)
            wanted = twin(second)
        else:
            traced: Any = (
                torch.jit.trace(encoded, (first,))
                if trace == "jit"
                else torch.export.export(encoded, (first,)).module()
            )
            found, wanted = traced(second), encoded(second)
        assert torch.equal(encoded(first), before)
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


def test_models_loaded_in_inference_mode_cache_their_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    XFM(XFMConfig.preset("tiny")).save_pretrained(tmp_path)
    made: list[Any] = []
    make = attention.position_bias
    monkeypatch.setattr(
        attention, "position_bias", lambda *given: made.append(given) or make(*given)
    )
    with torch.inference_mode():
        loaded = XFM.from_pretrained(tmp_path)
        official = XFM.from_official(
            {n: t.clone() for n, t in loaded.state_dict().items()}, loaded.config
        )
        pixels = torch.randn(1, 3, loaded.config.image_size, loaded.config.image_size)
        for model in (loaded, official):
            assert not any(p.is_inference() for p in model.parameters())
            made.clear()
            assert torch.equal(model.encode_image(pixels), model.encode_image(pixels))
            assert len(made) == model.config.vision_depth


def encoder_weights(model: XFM) -> list[Tensor]:
    layers = [m for part in model.children() for m in part.modules() if isinstance(m, nn.Linear)]
    return [layer.weight for layer in layers]


@pytest.mark.parametrize("model", DTYPES, indirect=True)
def test_a_frozen_model_gives_the_same_results(model: XFM) -> None:
    expected, dtype = results(model), model.dtype
    assert model.freeze() is model
    assert sum(gemm.is_frozen(w) for w in encoder_weights(model)) > 20
    # Many layers of rounding, in another order.
    allowed = 200 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.1
    for found, right in zip(results(model), expected, strict=True):
        assert found.dtype == dtype
        assert float((found - right).abs().max()) <= allowed * float(right.abs().max())
    model.unfreeze()
    for found, right in zip(results(model), expected, strict=True):
        assert torch.equal(found, right)


def test_parameters_keep_names_and_identity_and_give_up_their_memory(
    model: XFM, tmp_path: Path
) -> None:
    before, held = (
        dict(model.named_parameters()),
        {n: t.clone() for n, t in model.state_dict().items()},
    )
    trained = {name for name, p in before.items() if p.requires_grad}
    model.freeze()
    assert [name for name, _ in model.named_parameters()] == list(before)
    assert not any(p.requires_grad for p in model.parameters())
    kept: Any = model.vision_encoder.blocks[0]
    released = before["vision_encoder.blocks.0.mlp.fc1.weight"]
    assert released.untyped_storage().nbytes() <= 8
    with pytest.raises(RuntimeError, match="memory location"), torch.no_grad():
        released.mul_(2)
    assert kept.mlp.fc1.weight.shape == (kept.mlp.fc1.out_features, kept.mlp.fc1.in_features)
    state = model.state_dict()
    assert list(state) == list(held)
    assert all(torch.equal(state[name], value) for name, value in held.items())
    model.save_pretrained(tmp_path)
    assert all(
        torch.equal(t, held[n]) for n, t in XFM.from_pretrained(tmp_path).state_dict().items()
    )
    model.freeze()
    model.unfreeze()
    model.unfreeze()
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name for name, p in after.items() if p.requires_grad} == trained
    assert all(torch.equal(t, held[n]) for n, t in model.state_dict().items())


def test_writes_to_panels_are_refused(
    model: XFM, layout: gemm.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout != "panels" or llvm.why_not():
        pytest.skip("for panels")
    block: Any = model.freeze().vision_encoder.blocks[0]
    weight = block.mlp.fc1.weight
    before = gemm.dense(weight).clone()
    for write in (
        lambda: weight.add_(1),
        lambda: weight.data.mul_(2),
        lambda: weight.data[:, 1:].mul_(2),
        lambda: weight.data.copy_(before),
        lambda: torch.add(before, 1, out=weight.data),
        lambda: nn.init.normal_(weight),
    ):
        with pytest.raises((InputError, RuntimeError)), torch.no_grad():
            write()
    assert torch.equal(gemm.dense(weight), before)
    assert repr(weight.data) == repr(before)
    # Elsewhere there may be no kernel.
    stored = pickle.dumps(weight)
    monkeypatch.setattr(gemm, "_HERE", False)
    loaded = pickle.loads(stored)
    assert gemm.panels_of(loaded) is None
    assert torch.equal(loaded, before)


def test_copies_and_conversions(model: XFM) -> None:
    held = {n: t.clone() for n, t in model.state_dict().items()}
    expected = results(model.freeze())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for found, right in zip(results(twin), expected, strict=True):
            assert torch.equal(found, right)
        twin.unfreeze()
        assert all(torch.equal(t, held[n]) for n, t in twin.state_dict().items())
    block: Any = model.to(torch.bfloat16).vision_encoder.blocks[0]
    weight = block.mlp.fc1.weight
    assert weight.layout == torch.strided
    assert torch.equal(weight, held["vision_encoder.blocks.0.mlp.fc1.weight"].bfloat16())


def test_a_frozen_model_refuses_training_loading_and_export(model: XFM) -> None:
    state = model.state_dict()
    with pytest.raises(InputError, match="eval"):
        model.train().freeze()
    model.eval().freeze()
    pixels = torch.randn(1, 3, model.config.image_size, model.config.image_size)
    for refused in (
        lambda: model.train(),
        lambda: model.load_state_dict(state),
        lambda: model.encode_image(pixels.requires_grad_()),
        lambda: build("text", model, "onnx"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(InputError, match="unfreeze"):
            refused()
    with pytest.raises(InputError, match="unfreeze"), torch.autocast("cpu", torch.bfloat16):
        model.encode_text(torch.full((1, 3), 7))
    with pytest.raises(InputError, match="float64"):
        XFM(model.config).eval().double().freeze()


@pytest.mark.usefixtures("int8_chosen")
@pytest.mark.parametrize(
    "kind", ["plain", "frozen", "frozen as it was", pytest.param("int8", marks=NEEDS_INT8)]
)
def test_blocks_of_images(
    kind: str,
    layout: gemm.Layout,
    freeze_in: Callable[[gemm.Layout], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By plans, by the general path, after edits of what no linear layer holds, and with a hook."""
    if (reason := llvm.why_not()) is not None:
        pytest.skip(f"no compiled kernels here: {reason}")
    # A plan cannot read oneDNN's blocks.
    is_covered = kind != "frozen" or layout != "onednn"
    if kind == "frozen as it was":
        freeze_in("plain")
    compiled = selection.Selection("products of bytes", torch.float32, "llvm", {}, {}, "settled")
    monkeypatch.setitem(selection._selections, ("products of bytes", torch.float32), compiled)
    monkeypatch.setattr(plan, "_CALLS_S", math.inf)
    model = XFM(XFMConfig.preset("tiny")).eval().requires_grad_(False)
    for weight in model._block_weights():
        # Fresh blocks add next to nothing to their input.
        weight.normal_(std=0.1)
    if kind == "int8":
        model.quantise()
    elif kind != "plain":
        model.freeze()
    planned, run_plan = list[torch.Size](), plan.Plan.run

    def observed(own: plan.Plan, x: Any, *given: Any) -> Tensor | None:
        out = run_plan(own, x, *given)
        planned.extend([x.shape] if out is not None else [])
        return out

    monkeypatch.setattr(plan.Plan, "run", observed)
    encoder, size = model.vision_encoder, model.config.image_size
    pixels = torch.randn(2, 3, size, size)

    def run() -> Tensor:
        planned.clear()
        with torch.inference_mode():
            return encoder(pixels)

    def agree() -> Tensor:
        encoded = run()
        assert len(planned) == is_covered * len(encoder.blocks)
        with monkeypatch.context() as patched:
            patched.setattr(vision, "DTYPES", ())
            expected = run()
        assert not planned
        allowed = (0.1 if kind == "int8" else 2e-5) * float(expected.abs().max())
        assert float((encoded - expected).abs().max()) <= allowed
        return encoded

    before = agree()
    block: Any = encoder.blocks[0]
    attn = block.attn
    for written in (attn.q_bias, attn.v_bias, attn.relative_position_bias_table, block.gamma_1):
        with torch.no_grad():
            written.add_(torch.randn_like(written))
        after = agree()
        assert not torch.equal(after, before)
        before = after
    block.mlp.fc1.register_forward_hook(lambda *_: None)
    allowed = (0.1 if kind == "int8" else 2e-5) * float(before.abs().max())
    assert float((run() - before).abs().max()) <= allowed
    assert len(planned) == is_covered * (len(encoder.blocks) - 1)
