"""The cache of tensors computed from parameters: what it notices, what it does not keep, and who waits for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.accuracy import assert_as_accurate
from tests.kernels.cases import CASES, run
from tests.kernels.conftest import each_library
from xfm_fast.kernels import caching, ops, reference
from xfm_fast.kernels.caching import cached


def test_inference_first_does_not_hinder_training() -> None:
    """What inference mode leaves in the caches (plans, indices, concatenated weights) must serve a backward pass."""
    caching.clear()
    for name in ("relpos", "varlen", "linear_residual"):
        with torch.inference_mode():
            run(CASES[name], CASES[name].arguments())
        assert all(t.isfinite().all() for t in run(CASES[name], CASES[name].arguments(grad=True)))
    frozen = nn.Parameter(torch.randn(4, 3), requires_grad=False)
    with torch.inference_mode():
        cached("doubled", (frozen,), lambda: frozen * 2)
    x = torch.randn(2, 3, requires_grad=True)
    (x @ cached("doubled", (frozen,), lambda: frozen * 2).t()).sum().backward()
    assert x.grad is not None


def changed_by_optimizer(layer: nn.Linear) -> None:
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.1).step()


def changed_by_load_state_dict(layer: nn.Linear) -> None:
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def changed_by_assignment(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data * 2


CHANGES = [changed_by_optimizer, changed_by_load_state_dict, changed_by_assignment]


@pytest.mark.parametrize("change", [*CHANGES, nn.Linear.double])
def test_caching_tensors_follow_their_parameters(change: Callable[[nn.Linear], None]) -> None:
    layer = nn.Linear(3, 4)

    def doubled() -> Tensor:
        return cached("doubled", (layer.weight, layer.bias), lambda: layer.weight.detach() * 2)

    kept = doubled()
    assert doubled() is kept
    change(layer)
    assert torch.equal(doubled(), layer.weight.detach() * 2)
    assert doubled() is doubled()


def test_nothing_derived_within_a_graph_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph fills its own memory, and goes on reading what it was captured with."""
    weight = nn.Parameter(torch.ones(2))
    kept = cached("twice", (weight,), lambda: weight.detach() * 2)
    monkeypatch.setattr(caching, "_capturing", lambda source: source is weight)
    captured = cached("twice", (weight,), lambda: weight.detach() * 2)
    assert captured is not kept
    with caching.graphs_read_cache():
        assert cached("twice", (weight,), lambda: weight.detach() * 2) is kept
    monkeypatch.undo()
    assert cached("twice", (weight,), lambda: weight.detach() * 2) is kept


def test_another_stream_waits_for_a_cached_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Stream:
        def record_event(self) -> str:
            return "filled"

        def wait_event(self, event: str) -> None:
            calls.append(event)

    streams = [Stream(), Stream()]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[0])
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: calls.append(stream))
    filled = caching._Filled(torch.device("cuda:1"))
    filled.wait(torch.zeros(1))
    assert calls == []
    streams.reverse()
    filled.wait((torch.zeros(1), 3))
    assert calls == ["filled", streams[0]]


def test_caching_tensors_die_with_their_parameter() -> None:
    caching.clear()
    layer = nn.Linear(2, 2)
    cached("ones", (layer.weight,), lambda: torch.ones(2))
    assert len(caching._entries) == 1
    del layer
    assert len(caching._entries) == 0


@pytest.mark.parametrize("change", CHANGES)
@each_library("onednn-packed")
@pytest.mark.usefixtures("library")
@torch.no_grad()
def test_packed_weights_follow_their_parameters(change: Callable[[nn.Linear], None]) -> None:
    """The same through an operation: whichever implementation is chosen, no stale weight is multiplied."""
    layer, x = nn.Linear(32, 16), torch.randn(5, 32)
    ops.linear(x, layer.weight, layer.bias)
    ops.linear_residual(x, layer.weight, layer.bias, torch.zeros(5, 16), gamma=torch.ones(16))
    change(layer)
    assert_as_accurate(
        ops.linear(x, layer.weight, layer.bias), reference.linear, x, layer.weight, layer.bias
    )
    twin = copy.deepcopy(layer)
    assert torch.equal(
        ops.linear(x, layer.weight, layer.bias), ops.linear(x, twin.weight, twin.bias)
    )


def test_an_entry_dies_with_any_of_its_sources_and_has_one_value() -> None:
    caching.clear()
    weight, factors = nn.Parameter(torch.randn(3, 3)), [nn.Parameter(torch.randn(3, 3))]
    calls: list[float] = []

    def scaled(scale: float) -> Tensor:
        calls.append(scale)
        return weight.detach() * scale

    for scale in (2.0, 2.0, 3.0, 2.0):
        made = cached("scaled", (weight, *factors), partial(scaled, scale), scale)
        assert torch.equal(made, weight.detach() * scale)
    assert calls == [2.0, 3.0, 2.0]
    assert len(caching.cached_tensors([weight])) == 1
    factors.clear()
    assert caching.cached_tensors([weight]) == []


def test_parameters_can_be_swapped() -> None:
    """A weak reference to a parameter would forbid it, as `model.to` does under PyTorch's swap of parameters."""
    layer = nn.Linear(3, 4)
    cached("doubled", (layer.weight,), lambda: layer.weight.detach() * 2)
    torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.ones(4, 3)))
    assert torch.equal(
        cached("doubled", (layer.weight,), lambda: layer.weight.detach() * 2),
        torch.full((4, 3), 2.0),
    )


def test_values_that_are_no_numbers_are_equal_to_themselves() -> None:
    weight = nn.Parameter(torch.full((3, 3), torch.nan))
    first = cached("copy", (weight,), weight.detach().clone)
    assert cached("copy", (weight,), weight.detach().clone) is first


def test_views_of_one_storage_are_apart() -> None:
    whole = torch.randn(6, 3)
    parts = whole.split(2)
    made = [cached("copy", (part,), part.clone) for part in parts]
    assert all(torch.equal(copied, part) for copied, part in zip(made, parts, strict=True))
    assert all(
        cached("copy", (part,), part.clone) is copied
        for copied, part in zip(made, parts, strict=True)
    )


@pytest.mark.parametrize("elements", [5, 1 << 16])
def test_every_element_of_integers_is_compared(elements: int) -> None:
    """Masks come in memory that a program fills anew."""
    mask = torch.zeros(elements, dtype=torch.int64)
    for place in (0, elements // 2 + 1, elements - 1):
        before = cached("copy", (mask,), mask.clone)
        mask.numpy()[place] = place + 1
        assert not torch.equal(before, mask)
        assert torch.equal(cached("copy", (mask,), mask.clone), mask)


@pytest.mark.parametrize(
    "shape", [(), (0,), (0, 5), (1,), (3, 1), (5000, 1), (1, 5000), (2, 3, 900)]
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.complex64]
)
def test_the_last_element_of_any_shape_is_seen(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for tensor in (torch.zeros(shape, dtype=dtype), torch.zeros(7, dtype=dtype)[6:]):
        seen = caching.Sources([tensor])
        assert seen.unchanged([tensor])
        if tensor.numel() and tensor.numel() != 5400:
            tensor.data.view(-1)[-1] = 1
            assert not seen.unchanged([tensor])
