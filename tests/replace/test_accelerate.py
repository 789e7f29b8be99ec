"""What holds for every model: the same objects, the report, selection, revert, refusals."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from xfm_fast import accelerate
from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.replace import Fused, acceleration
from xfm_fast.replace.swap import Settings, observed


class Affine(nn.Module):
    """`scale · linear(x)`."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, features: Tensor, *, doubled: bool = False) -> Tensor:
        """The original."""
        out = self.scale * self.linear(features)
        return 2 * out if doubled else out


class Odd(Affine):
    pass


class FusedAffine(Fused):
    benefit = "a call"
    replaces = (Affine, Odd)
    bypassed: ClassVar[Any] = {"linear": nn.Linear}
    calls: ClassVar[list[Settings]] = []
    error = 0.0

    def forward(self, features: Tensor, **kwargs: Any) -> Tensor:
        if not self.intact():
            return super().forward(features, **kwargs)
        self.count()
        self.calls.append(self.settings)
        module: Any = self
        out = module.scale * nn.functional.linear(
            features, module.linear.weight, module.linear.bias
        )
        return out * (2 if kwargs.get("doubled") else 1) + self.error


class Refusing(FusedAffine):
    replaces = (Odd,)

    @classmethod
    def refusal(cls, module: nn.Module, settings: Settings) -> str | None:
        return "it is odd"


@pytest.fixture(autouse=True)
def only_our_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the forms of a toy family."""
    monkeypatch.setattr(acceleration, "FORMS", (Refusing, FusedAffine))
    monkeypatch.setattr(FusedAffine, "error", 0.0)
    FusedAffine.calls.clear()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Affine(), nn.Sequential(Affine(), nn.ReLU()), Odd())


def test_a_forward_left_on_the_instance() -> None:
    """transformers 4 records outputs by a `forward` on the instance, and leaves the class's own there afterwards."""
    made, x = model(), torch.ones(2, 5)
    wanted = made(x)
    first: Any = made[0]
    first.forward = first.forward
    found = accelerate(made)
    made(x)
    assert len(FusedAffine.calls) == 3
    first.forward = first.forward
    assert not observed(first)
    found.revert()
    assert torch.equal(made(x), wanted)
    assert len(FusedAffine.calls) == 3
    first.forward = lambda features: 2 * features
    assert observed(first)
    assert "replaced on the instance" in str(accelerate(made))


def test_the_objects_stay_the_same() -> None:
    made = model()
    modules, parameters, state = list(made.modules()), list(made.parameters()), made.state_dict()
    optimizer, signature = (
        torch.optim.SGD(made.parameters(), 0.1),
        inspect.signature(made[0].forward),
    )
    before = made(torch.ones(2, 5))
    found = accelerate(made, unpad=True)
    found = accelerate(made, skip_logits=True)
    assert [entry.path for entry in found.replaced] == ["0", "1.0", "2"]
    assert "0 and 1 more" in str(found)
    assert [*map(id, made.modules())] == [*map(id, modules)]
    assert [*map(id, made.parameters())] == [*map(id, parameters)]
    assert list(made.state_dict()) == list(state)
    assert torch.equal(made(torch.ones(2, 5)), before)
    assert FusedAffine.calls == [Settings(skip_logits=True)] * 3
    assert inspect.signature(made[0].forward) == signature
    made(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(made(torch.ones(2, 5)), before)
    assert type(modules[1]).__name__ == "Affine"
    assert isinstance(modules[1], Affine)
    assert repr(made) == repr(model())
    for _ in range(2):
        found.revert()
    for module, other in zip(made.modules(), model().modules(), strict=True):
        assert type(module) is type(other)
        assert vars(module).keys() == vars(other).keys()


def test_unknown_layers_are_listed() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(5, 20)

    made = nn.Sequential(nn.Sequential(Foreign(), Foreign()), Affine())
    found = accelerate(made)
    (unknown,) = found.unknown
    assert (unknown.class_name, unknown.paths, unknown.share) == (
        "Foreign",
        ["0.0", "0.1"],
        pytest.approx(200 / 225),
    )
    assert "Foreign (0.0 and 1 more), 89%" in str(found)
    assert accelerate(made, include="1").unknown == []
    with pytest.raises(InputError, match="Foreign"):
        accelerate(nn.Sequential(Foreign(), Foreign()))


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({"include": ["0", "Od?"]}, ["0", "2"]),
        ({"exclude": "1"}, ["0", "2"]),
        ({"include": Affine, "exclude": ["0", Odd]}, ["1.0"]),
    ],
)
def test_selection(options: dict[str, Any], paths: list[str]) -> None:
    made = model()
    assert [entry.path for entry in accelerate(made, **options).replaced] == paths
    # What is fused already is selected by the same names.
    assert [entry.path for entry in accelerate(made, **options).replaced] == paths


@pytest.mark.parametrize(
    ("made", "options", "named"),
    [
        (model, {"include": "nowhere"}, "nowhere"),
        (lambda: "model", {}, "str"),
        (Odd, {"exclude": "*"}, "Odd"),
        (model, {"dtype": torch.int32}, "dtype"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, device="meta"), {}, "meta"),
    ],
)
def test_refusals(made: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        accelerate(made(), **options)


@pytest.mark.parametrize(
    "given", [torch.ones(2, 5), (torch.ones(2, 5),), {"features": torch.ones(2, 5)}]
)
def test_verified(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Affine().train()
    found = accelerate(made, verify=given)
    assert found.differences == {"": 0.0}
    assert found.share == 1.0
    assert found.runs == {"": 1}
    assert "1 of 1 fused modules ran" in str(found)
    assert made.training
    found.revert()
    monkeypatch.setattr(FusedAffine, "error", 0.5)
    with pytest.raises(InputError, match="output"):
        accelerate(made, verify=given)
    assert type(made) is Affine


def test_observed_parts_are_called() -> None:
    made = Affine()
    accelerate(made)
    for install in (
        made.linear.register_forward_hook,
        made.linear.register_forward_pre_hook,
        made.linear.register_full_backward_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        seen: list[int] = []
        handle = install(lambda *_, seen=seen: seen.append(1))
        made(torch.ones(2, 5).requires_grad_()).sum().backward()
        handle.remove()
        assert seen, install
    assert not FusedAffine.calls
    made.linear.forward = nn.Identity().forward
    made(torch.ones(2, 5))
    del made.linear.forward
    parametrizations.weight_norm(made.linear)
    made(torch.ones(2, 5))
    assert not FusedAffine.calls


def test_mixed_and_quantised_weights_stay() -> None:
    mixed = Affine()
    mixed.linear.bias.data = mixed.linear.bias.data.bfloat16()
    (left,) = accelerate(nn.Sequential(mixed, Affine())).left
    assert "linear torch.bfloat16" in str(left.reason)
    report = accelerate(torch.ao.quantization.quantize_dynamic(Affine(), {nn.Linear}))
    assert "quantized.dynamic" in str(report.declining)


def test_a_dtype_applies_to_the_whole_model() -> None:
    made = nn.Sequential(Affine(), nn.Linear(5, 5))
    found = accelerate(made, dtype=torch.bfloat16)
    assert made(torch.ones(2, 5)).dtype == torch.bfloat16
    assert made[1].weight.dtype == torch.float32
    found.revert()
    assert type(made) is nn.Sequential
    assert made(torch.ones(2, 5)).dtype == torch.float32


def test_unavailable_dtypes_and_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"dtype": torch.float16}, "float16"),
        ({"kernels": "flash_attn"}, "flash_attn"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
    ]
    for options, named in refused:
        with pytest.raises(UnavailableError, match=named):
            accelerate(model(), **options)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16"
)
def test_slow_bfloat16_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    acceleration.warn_of_slow_bfloat16.cache_clear()
    monkeypatch.setattr(
        acceleration.gemm, "seconds", lambda dtype: 3.0 if dtype is torch.bfloat16 else 2.0
    )
    with pytest.warns(UserWarning, match=r"bfloat16.*1\.5") as caught:
        [accelerate(model(), dtype=torch.bfloat16) for _ in range(2)]
    assert [warning.filename for warning in caught] == [__file__]
    acceleration.warn_of_slow_bfloat16.cache_clear()


def test_a_failure_brings_back_parts_with_their_own_settings() -> None:
    both = nn.ModuleDict({"a": model(), "b": model()})
    accelerate(both["a"], dtype=torch.bfloat16)
    accelerate(both["b"])
    kept = {name: part.settings for name, part in both.named_modules() if isinstance(part, Fused)}
    assert len({part.dtype for part in kept.values()}) == 2
    with pytest.raises(InputError):
        accelerate(both, include="absent")
    assert {
        name: part.settings for name, part in both.named_modules() if isinstance(part, Fused)
    } == kept
