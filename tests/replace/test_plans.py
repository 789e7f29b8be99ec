"""Plans for CPU inference match the general path, and every change of a layer invalidates them."""

from __future__ import annotations

import copy
import gc
import math
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import xfm_fast
from tests.replace.families import FAMILIES, TRANSFORMERS, batch, make, randomised
from xfm_fast import accelerate
from xfm_fast.kernels import ops, reference
from xfm_fast.kernels.cpu import int8, llvm, selection
from xfm_fast.kernels.flags import unmark
from xfm_fast.plans import plan as plans
from xfm_fast.plans import recording
from xfm_fast.plans.plan import Plan
from xfm_fast.replace import planned, unpadded
from xfm_fast.replace.attention import Dense

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
    # Sizes with kernels on every processor.
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    if kind == "DistilBERT":
        sizes |= {"dim": 64, "n_heads": 2, "hidden_dim": 128}
    return FAMILIES[kind].model(torch.float32, **sizes)


def states(made: Any, given: dict[str, Any] | None = None) -> Tensor:
    given = batch() if given is None else given
    with torch.no_grad():
        return made(**given).last_hidden_state[given["attention_mask"].bool()]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[plans.Operands]:
    """The layers that plans ran."""
    if llvm.why_not() is not None:
        pytest.skip("no compiled kernels here")
    seen: list[plans.Operands] = []
    run = Plan.run

    def observed(plan: Plan, *given: Any) -> Tensor | None:
        out = run(plan, *given)
        if out is not None:
            seen.extend(plan.operands)
        return out

    monkeypatch.setattr(Plan, "run", observed)
    return seen


def without_plans(
    made: Any, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any] | None = None
) -> Tensor:
    with monkeypatch.context() as patched:
        patched.setattr(plans, "DTYPES", ())
        return states(made, given)


@pytest.mark.parametrize(("dtype", "unpad"), [(None, False), (None, True), (torch.bfloat16, True)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in FAMILIES])
def test_plans_match_the_general_path(
    kind: str, dtype: Any, unpad: bool, ran: list[plans.Operands], monkeypatch: pytest.MonkeyPatch
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
    assert len(ran) == 2 * made.config.num_hidden_layers


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations without a kernel that plans ran, where kernels are chosen whatever they lose."""
    monkeypatch.setattr(plans, "_CALLS_S", math.inf)
    steps, record = list[str](), recording.Recorder._between

    def observed(recorder: Any, step: Callable[..., None]) -> None:
        steps.append(step.__qualname__)
        record(recorder, step)

    monkeypatch.setattr(recording.Recorder, "_between", observed)
    return steps


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("BERT, another activation", {}),
        ("NomicBERT", {}),
        ("CLIP's images", {}),
        ("CLIP's images", {"hidden_act": "gelu_pytorch_tanh"}),
        ("CLIP's images", {"hidden_act": "relu"}),
        ("timm's ViT of CLIP", {"embed_dim": 64, "num_heads": 2}),
    ],
)
def test_a_layer_is_one_call_of_compiled_code(
    kind: str,
    sizes: dict[str, Any],
    ran: list[plans.Operands],
    between: list[str],
) -> None:
    """Activations, gates and rotary positions run between the GEMMs of one replay."""
    if kind not in FAMILIES:
        pytest.skip("this version of the library has no such model")
    family = FAMILIES[kind]
    if "embed_dim" not in sizes:
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128} | sizes
    made, inputs = family.model(torch.float32, **sizes), family.inputs(torch.float32)
    accelerate(made, unpad=family.unpads)
    with torch.no_grad():
        made(**inputs)
    assert ran
    assert not between


@pytest.mark.parametrize(
    "kind",
    [
        "BERT",
        "MPNet",
        "ModernBERT",
        "NomicBERT",
        "CLIP's images",
        "DINOv2",
        "BEiT",
        "ViT without biases",
    ],
)
def test_gemms_of_pytorch_between_kernels(
    kind: str, ran: list[plans.Operands], between: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PyTorch multiplies faster, a plan calls it: with LayerScale, a residual, the call's input and output."""
    if kind not in FAMILIES:
        pytest.skip("this version of the library has no such model")
    family = FAMILIES[kind]
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    made, given = family.model(torch.float32, **sizes), family.inputs(torch.float32)
    accelerate(made, unpad=family.unpads)
    from xfm_fast.kernels.cpu.llvm import builder

    def delay(name: str, *_: Any) -> float:
        # A comparison launches kernels of its own, which must not be recorded.
        assert builder._thread.launches is None
        return 1.0 if name == "llvm" else 0.0

    with torch.no_grad():
        wanted = made(**given).last_hidden_state
        between.clear()
        monkeypatch.setattr(recording.gemm, "delay", delay)
        plans._plans.clear()
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                outputs = made(**given).last_hidden_state
            assert float((outputs - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())
    layers = made.config.num_hidden_layers
    assert len(ran) == 4 * layers
    # At least the projections, `proj` and the two linear layers of the MLP.
    assert between.count("Recorder._multiply.<locals>.call") >= 4 * layers


def _images(kind: str) -> tuple[Any, tuple[Any, ...]]:
    if kind == "torch":
        layer = nn.TransformerEncoderLayer(64, 2, 128, activation="gelu", batch_first=True)
        return randomised(layer, torch.float32).eval(), (torch.randn(2, 9, 64),)
    family = FAMILIES[kind]
    sizes: dict[str, Any] = {"embed_dim": 64, "num_heads": 2, "depth": 2, "mlp_ratio": 2}
    inputs = family.inputs(torch.float32)
    return family.model(torch.float32, **sizes).eval(), tuple(inputs.values())


@pytest.mark.parametrize(
    ("kind", "written"),
    [
        ("torch", "in_proj_bias"),
        ("timm's BEiT-v2", "q_bias"),
        ("timm's BEiT-v2", "relative_position_bias_table"),
        ("timm's BEiT, both biases", "v_bias"),
        ("timm's EVA", "v_bias"),
        ("timm's EVA-02", "mlp.norm.weight"),
        ("timm's BEiT-3", "attn.norm.bias"),
    ],
)
def test_biases_and_norms_within_the_branches(
    kind: str, written: str, ran: list[plans.Operands], between: list[str]
) -> None:
    """Biases that no linear layer holds, position tables and inner norms, before and after an edit."""
    if kind != "torch" and kind not in FAMILIES:
        pytest.skip("this version of the library has no such model")
    original, given = _images(kind)
    fast = copy.deepcopy(original)
    accelerate(fast)
    for _ in range(2):
        with torch.no_grad():
            ran.clear()
            _near_floats(fast(*given), original(*given))
            assert ran
            for each in (original, fast):
                torch.manual_seed(3)
                for name, parameter in each.named_parameters():
                    if name.endswith(written):
                        parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize(
    "shape", [(9, 9), (2, 9, 9), (1, 1, 1, 9), (1, 2, 9, 9), (4, 2, 9, 9), (4, 1, 1, 9)]
)
def test_biases_of_any_shape(
    shape: tuple[int, ...], ran: list[plans.Operands], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing axes broadcast, as those of size 1 do."""
    made = model()
    accelerate(made)
    layer, x, bias = made.encoder.layer[0], torch.randn(4, 9, 64), torch.randn(shape)
    with torch.no_grad():
        outputs = layer.run(x, Dense(bias=bias), layer.settings)
        assert len(ran) == 1
        with monkeypatch.context() as patched:
            patched.setattr(plans, "DTYPES", ())
            patched.setattr(planned, "DTYPES", ())
            wanted = layer.run(x, Dense(bias=bias), layer.settings)
    assert len(ran) == 1
    _near_floats(outputs, wanted)


def _masked(name: str) -> tuple[Any, dict[str, Any], bool]:
    """A model, inputs whose attention hides tokens, and whether padding is skipped."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    if name == "causal":
        family = FAMILIES["CLIP's texts"]
        return family.model(torch.float32, **sizes), family.inputs(torch.float32), False
    if name == "window":
        made = model("ModernBERT")
        made.config.sliding_window = 4
        return made, {key: value[:1] for key, value in batch().items()}, True
    return model(), batch(), False


@pytest.mark.parametrize("name", ["padding", "causal", "window"])
def test_attention_that_hides_tokens_is_in_the_plan(
    name: str, ran: list[plans.Operands], between: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "window" and "ModernBERT" not in FAMILIES:
        pytest.skip("this version of the library has no such model")
    made, given, unpad = _masked(name)
    accelerate(made, unpad=unpad)
    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(plans, "DTYPES", ())
            wanted = made(**given).last_hidden_state
        assert not ran
        _near_floats(made(**given).last_hidden_state, wanted)
        if name == "padding":
            assert not between
            # A text without tokens: its queries see no key.
            given["attention_mask"][1] = 0
            outputs = made(**given).last_hidden_state
            with monkeypatch.context() as patched:
                patched.setattr(plans, "DTYPES", ())
                _near_floats(outputs.nan_to_num(), made(**given).last_hidden_state.nan_to_num())
            assert between
        else:
            assert not between
    assert ran


@pytest.mark.parametrize("shape", [(5, 1, 1, 11), (1, 1, 11, 11), (5, 2, 11, 11), (11, 11)])
def test_masks_of_a_layer(
    shape: tuple[int, ...], ran: list[plans.Operands], between: list[str]
) -> None:
    """A mask for each head, or of all texts, is PyTorch's."""
    layer = model().encoder.layer[0]
    fast = copy.deepcopy(layer)
    accelerate(nn.ModuleList([fast]))
    x = torch.randn(5, 11, 64)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.7
    if shape[0] == 11:
        mask = mask[None, None]
    mask[..., 0] = True
    for each in (mask, torch.where(mask, 0.0, torch.finfo().min)):
        with torch.no_grad():
            _near_floats(fast(x, each), layer(x, each))
    assert ran
    assert bool(between) == (shape[1] == 2)
    with torch.no_grad(), pytest.raises(RuntimeError):
        fast(x, mask[..., :7])


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_pooled_texts_with_a_wide_residual(
    pooling: Any, ran: list[plans.Operands], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    made, given = model(), batch(lengths=(9,))
    accelerate(made, unpad=True, dtype=torch.bfloat16)
    rows = without_plans(made, monkeypatch, given)
    wanted = rows[:1] if pooling == "first" else rows.mean(0, keepdim=True)
    with torch.no_grad():
        outputs = made.pooled(given, recording.Pooling(pooling))
    assert float((outputs - wanted).abs().max()) <= 2.0**-5 * float(wanted.abs().max())
    assert ran[0].residual == torch.float32


POOLED = {"one text": (9,), "equal": (6, 6, 6), "ragged": (11, 3, 6, 1, 8)}


@pytest.mark.parametrize("kind", ["BERT", "MPNet"])
@pytest.mark.parametrize("texts", POOLED)
@pytest.mark.parametrize("pooling", ["first", "mean", "max"])
@pytest.mark.parametrize("normalised", [False, True])
def test_pooled_texts(
    kind: str,
    texts: str,
    pooling: Any,
    normalised: bool,
    ran: list[plans.Operands],
    between: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, given = model(kind), batch(lengths=POOLED[texts])
    accelerate(made, unpad=True)
    rows = without_plans(made, monkeypatch, given).split([*POOLED[texts]])
    wanted = torch.stack(
        [{"first": x[0], "mean": x.mean(0), "max": x.amax(0)}[pooling] for x in rows]
    )
    wanted = nn.functional.normalize(wanted) if normalised else wanted
    ragged_bias = kind == "MPNet" and texts == "ragged"
    if (pooling == "mean" and not ragged_bias) or (pooling == "first" and texts == "one text"):
        monkeypatch.setattr(unpadded, "_POOLING", {})
    with torch.no_grad():
        for _ in range(2):
            outputs = made.pooled(given, recording.Pooling(pooling, normalised))
            _near_floats(outputs, wanted)
    assert ran
    if not ragged_bias:
        assert not between


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
    assert float((found.float() - wide).norm()) <= 0.01 * float(wide.norm())


@pytest.mark.usefixtures("compiled_int8")
@pytest.mark.parametrize(("dtype", "unpad"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("name", _IN_INT8)
def test_int8_plans(
    name: str,
    dtype: torch.dtype,
    unpad: bool,
    ran: list[plans.Operands],
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
    assert all(linear.prepared is not None for layer in ran for _, linear, _ in layer.linears)
    _near(found, wanted)
    _near(alone, wanted_alone)


def _rounded(layer: nn.Module, given: tuple[Tensor]) -> Tensor:
    return reference.as_int8(given[0])


@pytest.mark.usefixtures("compiled_int8")
def test_int8_plans_are_the_model_of_rounded_floats(
    ran: list[plans.Operands], monkeypatch: pytest.MonkeyPatch
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
def test_flags_decide_at_every_call(ran: list[plans.Operands]) -> None:
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
    assert not any(linear.prepared for _, linear, _ in ran[-2].linears)
    assert not torch.equal(floats, after)
    assert torch.cosine_similarity(floats.float(), after.float(), dim=-1).min() > 0.999


def _linear() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(64, 64).eval()


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
def test_a_change_invalidates_the_plan(change: str, ran: list[plans.Operands]) -> None:
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


def test_modes(ran: list[plans.Operands]) -> None:
    made = make("BertModel", torch.float32, hidden_dropout_prob=0.3, intermediate_size=64)
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
    made = model()
    report = accelerate(made)
    states(made)
    layers = [weakref.ref(layer) for layer in made.encoder.layer]
    assert all(layer() in plans._plans for layer in layers)
    report.revert()
    assert not any(layer() in plans._plans for layer in layers)
    accelerate(made)
    states(made)
    del made, report
    gc.collect()
    assert not any(layer() for layer in layers)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_plan_keeps_the_memory_of_moved_parameters(
    dtype: Any, ran: list[plans.Operands]
) -> None:
    """Neither what it reads in place, nor its copies of what is gone."""
    if dtype is not None and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("bfloat16 is emulated on this processor")
    made = model()
    accelerate(made, unpad=True, dtype=dtype)
    states(made)
    assert ran
    kept = weakref.ref(plans._plans[made])
    ran.clear()
    sources = [weakref.ref(weight.untyped_storage()) for weight in made.encoder.parameters()]
    made.double()
    gc.collect()
    assert not any(source() for source in sources)
    assert dtype is None or kept() is None


def _texts(*lengths: int) -> dict[str, Tensor]:
    """Ids of texts, padded to the longest."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 50, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


def _bert(**options: Any) -> Any:
    sizes: Any = _WIDE | {"vocab_size": 60, "max_position_embeddings": 256} | options
    return make("BertModel", torch.float32, **sizes).eval()


def _near_floats(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("threads", [1, 2])
def test_texts_of_many_lengths(threads: int, ran: list[plans.Operands]) -> None:
    """Buffers grow and programs are dropped in between; no result shows it."""
    original = _bert()
    fast = copy.deepcopy(original)
    accelerate(fast, unpad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for lengths in [(5,), (200,), (5,), (3, 9, 1), (31,), (8, 8), (200, 3)]:
            given = _texts(*lengths)
            _near_floats(states(fast, given), states(original, given))
        assert len(ran) == 7 * 2
        for length in range(1, 2 * plans._MOST_PROGRAMS):
            states(fast, _texts(length))
        programs = plans._thread.programs[plans._plans[fast]]
        assert len(programs) == plans._MOST_PROGRAMS
        _near_floats(states(fast, _texts(5)), states(original, _texts(5)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lengths", [(5,), (60, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
def test_no_rows_of_a_plan_collide_in_cache(
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    whole: bool,
    ran: list[plans.Operands],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their strides are no multiple of 4 KB, whether the tokens are embedded in the plan or come from outside."""
    from xfm_fast.kernels.cpu.llvm import linear

    if llvm.why_not(dtype) is not None:
        pytest.skip("bfloat16 is emulated on this processor")
    strides, run = list[tuple[int, int]](), linear.linear

    def observed(x: Tensor, *args: Any, **options: Any) -> Tensor:
        strides.append((len(x), x.stride(0) * x.itemsize))
        return run(x, *args, **options)

    monkeypatch.setattr(linear, "linear", observed)
    monkeypatch.setattr(recording.gemm, "_WIDE_VECTORS", True)
    monkeypatch.setattr(plans, "_CALLS_S", math.inf)
    monkeypatch.setattr(recording, "_STEP_S", math.inf)
    width = 4096 // dtype.itemsize
    original = _bert(hidden_size=width, num_attention_heads=8, intermediate_size=width).to(dtype)
    fast, given = copy.deepcopy(original), _texts(*lengths)
    accelerate(fast, unpad=True)
    band = 2e-5 if dtype == torch.float32 else 2.0**-4
    with torch.no_grad():
        if whole:
            found, wanted = states(fast, given), states(original, given)
        else:
            tokens = torch.randn(1, sum(lengths), width).to(dtype)
            layers = (made.encoder.layer[0] for made in (fast, original))
            found, wanted = (layer(tokens) for layer in layers)
            found, wanted = (t[0] if isinstance(t, tuple) else t for t in (found, wanted))
    assert ran
    assert float((found - wanted).abs().max()) <= band * float(wanted.abs().max())
    assert strides
    for rows, stride in strides:
        assert stride % 4096 or (rows < 64 and not whole)


def test_threads_have_programs_of_their_own(ran: list[plans.Operands]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    original = _bert()
    fast = copy.deepcopy(original)
    accelerate(fast, unpad=True)
    batches = [_texts(length) for length in range(1, 30)] * 3
    wanted = [states(original, given) for given in batches]
    with ThreadPoolExecutor(4) as pool:
        results = [*pool.map(partial(states, fast), batches)]
    for result, value in zip(results, wanted, strict=True):
        _near_floats(result, value)
    assert len(ran) == 2 * len(batches)


@pytest.mark.parametrize("name", ["input_ids", "position_ids", "token_type_ids"])
def test_an_id_outside_its_table(name: str, ran: list[plans.Operands]) -> None:
    fast = _bert()
    accelerate(fast, unpad=True)
    given = _texts(6)
    wanted = states(fast, given)
    ids = {"position_ids": torch.arange(6)[None], "token_type_ids": torch.zeros(1, 6).long()}
    wrong = {**ids, **given}
    wrong[name] = wrong[name] + 300
    with pytest.raises(IndexError, match="out of range"):
        states(fast, wrong)
    assert torch.equal(states(fast, given), wanted)
    assert len(ran) == 2 * 2


def test_token_types(ran: list[plans.Operands]) -> None:
    original = _bert()
    fast = copy.deepcopy(original)
    accelerate(fast, unpad=True)
    given = _texts(9, 4)
    given["token_type_ids"] = (torch.arange(9) > 4).long().expand(2, 9)
    _near_floats(states(fast, given), states(original, given))
    assert len(ran) == 2


def _scaled(module: nn.Module) -> nn.Module:
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    return other


EMBEDDING_CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": torch.no_grad()(lambda model: model.embeddings.word_embeddings.weight.mul_(2)),
    "other storage": lambda model: setattr(
        model.embeddings.position_embeddings.weight,
        "data",
        model.embeddings.position_embeddings.weight.data * 2,
    ),
    "resized": lambda model: model.resize_token_embeddings(80),
    "other eps": lambda model: setattr(model.embeddings.LayerNorm, "eps", 0.5),
    "hook on the embeddings": lambda model: model.embeddings.register_forward_hook(
        lambda module, given, out: 2 * out
    ),
    "hook on the layers": lambda model: model.encoder.register_forward_hook(
        lambda module, given, out: type(out)(last_hidden_state=2 * out.last_hidden_state)
    ),
    "hook on a layer": lambda model: model.encoder.layer[1].register_forward_pre_hook(
        lambda module, given: (2 * given[0], *given[1:])
    ),
    "other layers": lambda model: setattr(model, "encoder", _scaled(model.encoder)),
    "other embeddings": lambda model: setattr(model, "embeddings", _scaled(model.embeddings)),
    "largest norm": lambda model: setattr(model.embeddings.word_embeddings, "max_norm", 0.1),
    "fewer layers": lambda model: model.encoder.layer.__delitem__(1),
}


@pytest.mark.parametrize("change", EMBEDDING_CHANGES)
def test_a_change_around_the_layers(change: str, ran: list[plans.Operands]) -> None:
    original = _bert()
    fast = copy.deepcopy(original)
    accelerate(fast, unpad=True)
    given = _texts(9, 4)
    before = states(fast, given)
    assert len(ran) == 2
    for each in (original, fast):
        torch.manual_seed(5)
        EMBEDDING_CHANGES[change](each)
    wanted = states(original, given)
    if change != "resized":
        assert not torch.allclose(wanted, before, rtol=1e-2)
    _near_floats(states(fast, given), wanted)


def test_one_text_is_few_calls() -> None:
    """A query costs the kernels and little Python beside them."""
    if llvm.why_not() is not None:
        pytest.skip("no compiled kernels here")
    fast = _bert(num_hidden_layers=6)
    accelerate(fast, unpad=True)
    given, code, calls = _texts(12), str(Path(xfm_fast.__file__).resolve().parent), [0]

    def count(frame: Any, event: str, value: Any) -> None:
        calls[0] += event == "call" and frame.f_code.co_filename.startswith(code)

    with torch.inference_mode():
        fast(**given)
        sys.setprofile(count)
        try:
            fast(**given)
        finally:
            sys.setprofile(None)
    # PyTorch and transformers make about as many.
    assert 0 < calls[0] <= 60


class _States(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


TRACES: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Any]] = {
    "jit": lambda model, given: torch.jit.trace(model, given, check_trace=False),
    "export": lambda model, given: torch.export.export(model, given).module(),
    "compile": lambda model, given: torch.compile(model, backend="eager", fullgraph=True),
}


@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_does_not_record_the_plan_of_an_earlier_call(
    trace: str, ran: list[plans.Operands]
) -> None:
    """The texts that are traced would decide which tokens later ones leave out."""
    original = _bert()
    fast = copy.deepcopy(original)
    accelerate(fast, unpad=True)
    short, full = _texts(9, 4), _texts(9, 9)
    with torch.no_grad():
        fast(**short)
        assert len(ran) == 2
        recorded = TRACES[trace](_States(fast), tuple(short.values()))
        found = recorded(*full.values())
        assert len(ran) == 2
        _near_floats(found, original(**full).last_hidden_state)


def test_deterministic_algorithms_leave_the_kernels(ran: list[plans.Operands]) -> None:
    fast = _bert()
    accelerate(fast, unpad=True)
    given = _texts(5)
    states(fast, given)
    assert len(ran) == 2
    torch.use_deterministic_algorithms(True)
    try:
        states(fast, given)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(ran) == 2
