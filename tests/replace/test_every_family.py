"""What holds for every family: fused forms against the untouched model."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from tests.replace.families import (
    DROPOUTS,
    FAMILIES,
    Case,
    adapted,
    assert_close,
    batch,
    gradients,
    inferred,
    only_fused,
    states,
    without_chance,
)
from xfm_fast import accelerate, accelerated
from xfm_fast.kernels.cpu import gemm, int8
from xfm_fast.kernels.flags import kind_of
from xfm_fast.replace.adapters import Adaptable
from xfm_fast.replace.swap import Fused, is_fused, original_class

# One of each kind; the slow suite takes all.
QUICK = (
    *(
        "BERT",
        "CLIP's texts",
        "MPNet",
        "ModernBERT",
        "DeBERTa-v3",
        "ALBERT",
        "BEiT",
        "DINOv3",
        "Swin V2",
    ),
    *(
        "timm's BEiT-v2",
        "timm's EVA-02 large",
        "timm's Swin",
        "PyTorch, post-norm",
        "official texts",
    ),
)
BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def of(*named: str, unpads: bool = False, whole: bool = False) -> Any:
    """Parametrised by the named families, or by all that qualify, of which one of each kind is quick."""
    if named:
        return pytest.mark.parametrize("kind", [kind for kind in named if kind in FAMILIES])
    kinds = [
        kind
        for kind, case in FAMILIES.items()
        if (case.unpads or not unpads) and (case.whole or not whole)
    ]
    marked = [
        kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds
    ]
    return pytest.mark.parametrize("kind", marked)


def outcome(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    return gradients(without_chance(model), partial(states, model, given))


def found_at(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    return {"output": inferred(model, given)}


def fused(model: nn.Module, case: Case, **options: Any) -> Any:
    fast = copy.deepcopy(model)
    report = accelerate(fast, **options)
    assert case.layer in {entry.class_name for entry in report.replaced}, str(report)
    assert case.layer not in {entry.class_name for entry in report.left}
    return fast


@pytest.mark.parametrize("kind", FAMILIES)
def test_forward_gradients_and_revert(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = FAMILIES[kind]
    dtype, bound = case.precise
    model, given = case.model(dtype), case.inputs(dtype)
    fast = copy.deepcopy(model)
    report = accelerate(fast)
    assert case.layer in {entry.class_name for entry in report.replaced}, str(report)
    assert case.layer not in {entry.class_name for entry in report.left}
    assert_close(outcome(model, given), outcome(fast, given), bound)
    wanted = found_at(model, given)
    with monkeypatch.context() as patched:
        only_fused(patched, fast, case.layer)
        for _ in range(2):
            assert_close(wanted, found_at(fast, given), bound)
    report.revert()
    assert [type(part) for part in fast.modules()] == [type(part) for part in model.modules()]
    assert torch.equal(found_at(fast, given)["output"], wanted["output"])


@of(unpads=True)
def test_padding_is_left_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = FAMILIES[kind]
    dtype, bound = case.precise
    model = case.model(dtype)
    fast = fused(model, case, unpad=True)
    plain = case.inputs is not FAMILIES["official texts"].inputs
    for padding in ("right", "left", "holes") if plain else ("right",):
        given = case.inputs(dtype) | (batch(padding) if plain else {})
        assert_close(outcome(model, given), outcome(fast, given), bound)
    given = case.inputs(dtype)
    whole = {name: value for name, value in given.items() if name != "attention_mask"}
    assert_close(found_at(model, whole), found_at(fast, whole), bound)
    only_fused(monkeypatch, fast, case.layer, type(model).__name__ if plain else "")
    assert not fast.eval()(**given).last_hidden_state[given["attention_mask"] == 0].any()


@of()
def test_half_precision_and_autocast(kind: str) -> None:
    case = FAMILIES[kind]
    model, given = case.model(torch.float32), case.inputs(torch.float32)
    fast = fused(model, case, unpad=case.unpads)
    wanted = found_at(model, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(wanted, found_at(fast, given), 2.0**-3)
    if not BF16:
        return
    accelerate(fast, unpad=case.unpads, dtype=torch.bfloat16)
    assert_close(wanted, found_at(fast, given), 2.0**-3)
    wanted, found = outcome(model, given), outcome(fast, given)
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in fast.parameters())
    sides = [
        torch.cat([value.float().flatten() for value in side.values()]) for side in (wanted, found)
    ]
    assert float(nn.functional.cosine_similarity(*sides, dim=0)) > 0.99


@of(
    "BERT",
    "MPNet",
    "ModernBERT",
    "BEiT",
    "Swin V2",
    "timm's vit_relpos",
    "timm's Swin",
    "official texts",
)
def test_dropout_keeps_mean_and_spread(kind: str) -> None:
    case, copies, moments = FAMILIES[kind], 256, []
    options: dict[str, Any] = dict.fromkeys(DROPOUTS, 0.2)
    if kind.startswith("timm"):
        options = {"proj_drop_rate": 0.2} | ({} if "relpos" in kind else {"attn_drop_rate": 0.2})
    elif kind.startswith(("PyTorch", "official", "X²")):
        options = {}
    model = case.model(torch.float32, **options)
    for part in model.modules() if not options else ():
        if isinstance(part, nn.Dropout):
            part.p = 0.2
    fast, given = fused(model, case, unpad=case.unpads), case.inputs(torch.float32)
    rows = {name: value[:1].expand(copies, *value.shape[1:]) for name, value in given.items()}
    with torch.no_grad():
        for each in (model.train(), fast.train()):
            torch.manual_seed(0)
            out: Any = each(**rows)
            drawn = out if isinstance(out, Tensor) else out.last_hidden_state
            moments.append((drawn.mean(0), drawn.std(0)))
    (mean, spread), (other, width) = moments
    error = (other - mean) / (spread * (2 / copies) ** 0.5)
    assert float(spread.min()) > 1e-4
    assert float(error.square().mean()) < 2
    assert 0.9 < float((width / spread).mean()) < 1.1


@of("BEiT", "DINOv2", "Swin", "timm's BEiT-v2", "timm's Swin")
def test_stochastic_depth_is_drawn_alike(kind: str) -> None:
    case, found = FAMILIES[kind], []
    model = case.model(drop_path_rate=0.4)
    given = {name: value.repeat(4, 1, 1, 1) for name, value in case.inputs(torch.float64).items()}
    for each in (model, fused(model, case)):
        found.append(gradients(each.train(), partial(states, each, given)))
    assert_close(found[0], found[1], 1e-11)
    assert not torch.allclose(found[0]["output"], states(model.eval(), given), rtol=1e-3)


@of("BERT", "ModernBERT", "CLIP's texts", "BEiT", "timm's BEiT-v2", "Swin V2")
def test_gradient_checkpointing(kind: str) -> None:
    case = FAMILIES[kind]
    dtype, bound = case.precise
    model, given = case.model(dtype), case.inputs(dtype)
    fast = fused(model, case, unpad=case.unpads)
    if hasattr(fast, "set_grad_checkpointing"):
        fast.set_grad_checkpointing()
    elif getattr(fast, "supports_gradient_checkpointing", False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            fast.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        pytest.skip("it has no gradient checkpointing")
    assert_close(outcome(model, given), outcome(fast, given), bound)


@of("BERT", "DeBERTa-v3", "Swin", "timm's Swin V2", "PyTorch, pre-norm", "official images")
def test_copied_and_saved(kind: str, tmp_path: Path) -> None:
    case = FAMILIES[kind]
    dtype, bound = case.precise
    model, given = case.model(dtype), case.inputs(dtype)
    parts, keys, wanted = [*model.modules()], [*model.state_dict()], found_at(model, given)
    with accelerated(model, unpad=case.unpads):
        assert [*model.state_dict()] == keys
        assert all(a is b for a, b in zip(model.modules(), parts, strict=True))
        for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert any(map(is_fused, copied.modules()))
            assert_close(wanted, found_at(copied, given), bound)
        torch.save(model.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(found_at(model, given)["output"], wanted["output"])


@of()
def test_hooks_and_requests_for_attention_weights_run_the_original(kind: str) -> None:
    case = FAMILIES[kind]
    dtype, bound = case.precise
    model, given, seen = case.model(dtype, "eager"), case.inputs(dtype), []
    fast = fused(model, case, unpad=case.unpads)
    if hasattr(model, "config") and kind not in ("RemBERT", "ViLT"):
        wanted, found = (
            each(**given, output_attentions=True).get("attentions") for each in (model, fast)
        )
        for one, other in zip(wanted or (), found or (), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    layer = next(part for part in fast.modules() if original_class(part).__name__ == case.layer)
    *_, linear = (part for part in layer.modules() if isinstance(part, nn.Linear))
    handle = linear.register_forward_hook(lambda *_: seen.append(1))
    wanted = found_at(model, given)
    assert_close(wanted, found_at(fast, given), max(bound, 1e-6))
    calls = len(seen)
    assert kind.startswith("PyTorch") or calls
    handle.remove()
    assert_close(wanted, found_at(fast, given), max(bound, 1e-6))
    assert len(seen) == calls


@of("BEiT", "Swin V2", "timm's BEiT-v2", "timm's vit_relpos", "DeBERTa-v3", "BERT")
def test_weights_that_change_are_seen(kind: str) -> None:
    case = FAMILIES[kind]
    model, given = case.model(torch.float32), case.inputs(torch.float32)
    fast = fused(model, case, unpad=case.unpads)
    before = found_at(fast, given)["output"]
    with torch.no_grad():
        for each in (model, fast):
            for parameter in each.parameters():
                parameter.mul_(1.25)
    assert_close(found_at(model, given), found_at(fast, given), 2e-5)
    assert not torch.allclose(found_at(fast, given)["output"], before, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_compiled(kind: str) -> None:
    case = FAMILIES[kind]
    model, given = case.model(torch.float32), case.inputs(torch.float32)
    fast = without_chance(fused(model, case))
    compiled: Any = torch.compile(fast, backend="aot_eager")
    wanted = outcome(model, given)
    assert_close(wanted, gradients(fast, partial(states, compiled, given)), 2e-5)


@pytest.mark.slow
@of("BERT")
def test_one_graph_without_padding(kind: str) -> None:
    case, graphs = FAMILIES[kind], []
    model = case.model(torch.float32)
    fast = fused(model, case, unpad=True)

    def backend(graph: Any, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: Any = torch.compile(fast, fullgraph=True, dynamic=True, backend=backend)
    for given in (batch(), batch(lengths=(9, 2, 7)), batch("left", lengths=(3, 17, 1, 4, 9, 2, 5))):
        assert_close(found_at(model, given), found_at(compiled, given), 2e-5)
    assert len(graphs) == 1


def multiplied(model: nn.Module) -> list[str]:
    """The linear layers that the fused forms of an accelerated model multiply with."""
    parts = dict(model.named_modules())
    found = []
    for path, module in parts.items():
        kinds_of = type(module).bypassed if isinstance(module, Fused) else {}
        names = [
            name
            for name, kinds in kinds_of.items()
            if isinstance(kinds, tuple) and Adaptable in kinds
        ]
        found += [place for name in names if (place := f"{path}.{name}".lstrip(".")) in parts]
    return found


@pytest.mark.parametrize("first", ["peft", "accelerate"])
@of(whole=True)
def test_adapters(kind: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    case = FAMILIES[kind]
    dtype, bound = case.precise
    model, given = case.model(dtype), case.inputs(dtype)
    targets = multiplied(fused(model, case))
    assert len(targets) >= 8
    original, fast = adapted(copy.deepcopy(model), targets), copy.deepcopy(model)
    fast = adapted(fast, targets) if first == "peft" else fast
    report = accelerate(fast, unpad=case.unpads)
    fast = fast if first == "peft" else adapted(fast, targets)
    assert not report.declining, str(report)
    assert "LoRA adapters on" in str(report)
    wanted, found = outcome(original, given), outcome(fast, given)
    assert_close(wanted, found, bound)
    assert any("lora_" in name and value.any() for name, value in found.items())
    plain, expected = found_at(model, given)["output"], found_at(original, given)
    monkeypatch.delattr(peft.tuners.lora.layer.Linear, "forward")
    assert_close(expected, found_at(fast, given), bound)
    assert not torch.allclose(plain, expected["output"], rtol=1e-2)


@pytest.mark.parametrize("layout", get_args(gemm.Layout))
@of(whole=True)
def test_packed_weights(
    kind: str, layout: gemm.Layout, freeze_in: Callable[[gemm.Layout], None]
) -> None:
    freeze_in(layout)
    case = FAMILIES[kind]
    model, given = case.model(torch.float32), case.inputs(torch.float32)
    before, wanted = copy.deepcopy(model.state_dict()), found_at(model, given)
    report = accelerate(model, freeze=True, unpad=case.unpads)
    names = multiplied(model)
    assert names
    assert [name for name in names if "weight" in model.get_submodule(name)._parameters] == []
    assert not report.declining, str(report)
    assert_close(wanted, found_at(model, given), 2e-5)
    report.revert()
    assert torch.equal(found_at(model, given)["output"], wanted["output"])
    after = model.state_dict()
    assert [*after] == [*before]
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.skipif(int8.why_not() is not None, reason=f"no int8 GEMM here: {int8.why_not()}")
@pytest.mark.usefixtures("int8_chosen")
@of(whole=True)
def test_eight_bits(kind: str) -> None:
    case = FAMILIES[kind]
    model, given = case.model(torch.float32), case.inputs(torch.float32)
    before, wanted = copy.deepcopy(model.state_dict()), found_at(model, given)["output"]
    report = accelerate(model, dtype="int8", unpad=case.unpads)
    assert report.rounded_weights
    assert any(kind_of(p) for p in model.parameters())
    found = found_at(model, given)["output"]
    assert float(nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0)) > 0.97
    report.revert()
    assert torch.equal(found_at(model, given)["output"], wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
