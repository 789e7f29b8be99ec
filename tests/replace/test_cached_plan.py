"""Cached plans for CPU inference match the general path, and every change of a layer invalidates them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from tests.replace.families import FAMILIES, TRANSFORMERS, batch, make
from xfm_fast import accelerate
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.cpu import int8, llvm, selection
from xfm_fast.kernels.flags import unmark
from xfm_fast.replace import cached_plan
from xfm_fast.replace.cached_plan import CachedPlan

KINDS = (
    "BERT",
    "BERT, another activation",
    "MPNet",
    "DistilBERT",
    "ALBERT",
    "ModernBERT",
    "NomicBERT",
)


def model(kind: str = "BERT") -> Any:
    return FAMILIES[kind].model(torch.float32)


def states(made: Any, given: dict[str, Any] | None = None) -> Tensor:
    given = batch() if given is None else given
    with torch.no_grad():
        return made(**given).last_hidden_state[given["attention_mask"].bool()]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[CachedPlan]:
    """The plans that ran."""
    seen: list[CachedPlan] = []
    run = CachedPlan.run
    monkeypatch.setattr(
        CachedPlan, "run", lambda layer, *given: seen.append(layer) or run(layer, *given)
    )
    return seen


def without_plans(
    made: Any, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any] | None = None
) -> Tensor:
    with monkeypatch.context() as patched:
        patched.setattr(cached_plan, "_DTYPES", ())
        return states(made, given)


@pytest.mark.parametrize(("dtype", "unpad"), [(None, False), (None, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in FAMILIES])
def test_plans_match_the_general_path(
    kind: str, dtype: Any, unpad: bool, ran: list[CachedPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype is not None and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    made = model(kind)
    accelerate(made, unpad=unpad, dtype=dtype)
    wanted = without_plans(made, monkeypatch)
    assert not ran
    for _ in range(2):
        found = states(made)
        band = 2e-5 if dtype is None else 2.0**-5
        assert float((found - wanted).abs().max()) <= band * float(wanted.abs().max())
    assert len(ran) % made.config.num_hidden_layers == 0
    assert len(ran) >= 4
    assert len(set(map(id, ran))) <= made.config.num_hidden_layers


@pytest.fixture
def compiled_int8(int8_chosen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force the compiled int8 kernel, whether or not it is fastest here."""
    why = int8.why_not() or llvm.why_not(torch.int8)
    if why is not None:
        pytest.skip(f"no compiled int8 GEMM here: {why}")
    for dtype in (torch.float32, torch.bfloat16):
        found = selection.Selection("products of bytes", dtype, "llvm", {}, {}, "settled")
        monkeypatch.setitem(selection._selections, ("products of bytes", dtype), found)


# Widths that the compiled kernel takes on every processor.
_WIDE: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 192}
_IN_INT8: dict[str, dict[str, Any]] = {
    "BertModel": _WIDE,
    "XLMRobertaModel": _WIDE | {"hidden_act": "gelu_new"},
}
if TRANSFORMERS >= 5:
    _IN_INT8["ModernBertModel"] = _WIDE | {"bos_token_id": 0}


def _near(found: Tensor, wanted: Tensor) -> None:
    """Within another int8 rounding."""
    wide = wanted.float()
    assert float((found.float() - wide).abs().max()) <= 2.0**-6 * float(wide.abs().max())
    assert float((found.float() - wide).norm()) <= 2.0**-7 * float(wide.norm())


@pytest.mark.usefixtures("compiled_int8")
@pytest.mark.parametrize(("dtype", "unpad"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("name", _IN_INT8)
def test_int8_plans(
    name: str,
    dtype: torch.dtype,
    unpad: bool,
    ran: list[CachedPlan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    made = make(name, dtype, **_IN_INT8[name]).eval()
    one = {key: value[:1] for key, value in batch().items()}
    accelerate(made, unpad=unpad, dtype="int8")
    wanted, wanted_alone = without_plans(made, monkeypatch), without_plans(made, monkeypatch, one)
    assert not ran
    found, alone = states(made), states(made, one)
    assert len(ran) == 2 * made.config.num_hidden_layers
    assert all(len(layer.rounded) == (4 if name == "ModernBertModel" else 6) for layer in ran)
    _near(found, wanted)
    _near(alone, wanted_alone)


def _rounded(layer: nn.Module, given: tuple[Tensor]) -> Tensor:
    return reference.as_int8(given[0])


@pytest.mark.usefixtures("compiled_int8")
def test_int8_plans_are_the_model_of_rounded_floats(
    ran: list[CachedPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the code of transformers whose linear layers have operands rounded to int8."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    original = make("BertModel", torch.float32, **_WIDE).eval()
    floats, fast = states(original), copy.deepcopy(original)
    accelerate(fast, dtype="int8")
    found = states(fast)
    assert len(ran) == 2
    for layer in original.encoder.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = reference.as_int8(layer.weight.data)
            layer.register_forward_pre_hook(_rounded)
    assert float((states(original) - found).norm()) < 0.5 * float((floats - found).norm())


@pytest.mark.usefixtures("compiled_int8")
def test_flags_decide_at_every_call(ran: list[CachedPlan]) -> None:
    made = make("BertModel", torch.float32, **_WIDE).eval()
    accelerate(made, dtype="int8")
    before = states(made)
    assert len(ran) == 2
    first = made.encoder.layer[0]
    first.output.dense.weight.data.mul_(2)
    after = states(made)
    assert len(ran) == 4
    assert not torch.allclose(before, after, rtol=1e-2)
    unmark([p for p in first.parameters() if p.ndim == 2])
    floats = states(made)
    assert len(ran) == 6
    assert ran[-2].rounded == ()
    assert not torch.equal(floats, after)
    assert torch.cosine_similarity(floats.float(), after.float(), dim=-1).min() > 0.999


def _linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(48, 48).eval()


def _other_storage(layer: Any) -> None:
    layer.output.dense.weight.data = layer.output.dense.weight.data * 1.5


def _other_parameter(layer: Any) -> None:
    layer.output.LayerNorm.weight = nn.Parameter(layer.output.LayerNorm.weight.detach() * 1.5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": torch.no_grad()(lambda layer: layer.attention.self.query.weight.add_(0.1)),
    "past the version counter": lambda layer: layer.attention.self.query.weight.data.add_(0.1),
    "other storage": _other_storage,
    "other parameter": _other_parameter,
    "other layer": lambda layer: setattr(layer.attention.self, "value", _linear()),
    "other activation": lambda layer: setattr(
        layer.intermediate, "intermediate_act_fn", nn.ReLU().eval()
    ),
    "hook": lambda layer: layer.output.dense.register_forward_hook(
        lambda module, given, out: out * 1.5
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_invalidates_the_plan(change: str, ran: list[CachedPlan]) -> None:
    original = model()
    fast = copy.deepcopy(original)
    accelerate(fast, unpad=True)
    before = states(fast)
    assert len(ran) == 2
    for each in (original, fast):
        CHANGES[change](each.encoder.layer[0])
    wanted, found = states(original), states(fast)
    assert not torch.allclose(wanted, before, rtol=1e-2)
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
    ran.clear()
    states(fast)
    # The plan is rebuilt, unless a part must be called.
    assert len(ran) == 2 - (change == "hook")


def test_modes(ran: list[CachedPlan]) -> None:
    made = make("BertModel", torch.float32, hidden_dropout_prob=0.3)
    accelerate(made)
    states(made)
    made.eval()
    made(**batch()).last_hidden_state.sum().backward()
    assert not ran
    kept = states(made)
    assert len(ran) == 2
    made.encoder.layer[0].output.dropout.train()
    torch.manual_seed(0)
    assert not torch.allclose(states(made), kept)
    made.eval()
    with ops.use_backend("reference"):
        count = len(ran)
        states(made)
        assert len(ran) == count
    with torch.autocast("cpu", torch.bfloat16):
        states(made)
    assert len(ran) == count
    assert torch.equal(states(made), kept)


def test_nothing_outlives_its_layer() -> None:
    import gc
    import weakref

    made = model()
    report = accelerate(made)
    states(made)
    layers = [weakref.ref(layer) for layer in made.encoder.layer]
    assert all(layer() in cached_plan._plans for layer in layers)
    report.revert()
    assert not any(layer() in cached_plan._plans for layer in layers)
    accelerate(made)
    states(made)
    del made, report
    gc.collect()
    assert not any(layer() for layer in layers)
