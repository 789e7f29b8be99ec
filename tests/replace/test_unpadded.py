"""Encoders without padding where it must cost nothing: one graph of a compiler, and batches that have no padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tests.replace.text_models import assert_equal, batch, make, with_fused_copy
from xfm_fast import accelerate
from xfm_fast.packing import Packing
from xfm_fast.replace.bert_layer import plan


def real(model: Any, given: dict[str, Any]) -> Tensor:
    return model(**given).last_hidden_state[given["attention_mask"].bool()]


def padded(texts: int, length: int, *, left: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(texts)
    lengths = torch.randint(1, length + 1, (texts,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    mask = mask.flip(1) if left else mask
    ids = torch.randint(2, 111, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
def test_one_graph_for_all_shapes(name: str) -> None:
    original, fast = with_fused_copy(make(name, torch.float32), unpad=True)
    graphs: list[Any] = []

    def backend(graph: Any, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fast.eval(), fullgraph=True, dynamic=True, backend=backend)
    original.eval()
    with torch.no_grad():
        for given in (padded(5, 11), padded(3, 9), padded(7, 17, left=True)):
            wanted = real(original, given)
            assert float((real(compiled, given) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
    assert len(graphs) == 1
    packed = [node for node in graphs[0].graph.nodes if "varlen" in str(node.target)]
    assert len(packed) == 2


def test_gradients_of_one_graph() -> None:
    original, fast = with_fused_copy(make("BertModel", torch.float32), unpad=True)
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend="aot_eager")
    given = padded(4, 9)
    for model in (original, compiled):
        real(model, given).square().sum().backward()
    gradients = {name: p.grad for name, p in original.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in fast.named_parameters():
        wanted = gradients.get(name)
        if wanted is not None:
            assert parameter.grad is not None, name
            assert float((parameter.grad - wanted).abs().max()) <= 1e-5 * max(float(wanted.abs().max()), largest / 20)


@pytest.mark.slow
def test_one_graph_by_the_compiler_itself() -> None:
    original, fast = with_fused_copy(make("BertModel", torch.float32), unpad=True)
    compiled = torch.compile(fast.eval(), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for given in (padded(5, 11), padded(3, 9)):
            wanted = real(original.eval(), given)
            assert float((real(compiled, given) - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("texts", [1, 5, 9])
def test_a_batch_without_padding_moves_nothing(texts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make("BertModel")
    fast = copy.deepcopy(original)
    accelerate(fast, unpad=True)
    given = {"input_ids": batch()["input_ids"][:1].expand(texts, -1).clone()}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    found = plan(given["attention_mask"], keep_first=True)
    assert found is not None
    assert found[0].whole

    def refuse(*_: Any) -> None:
        raise AssertionError("something moved")

    monkeypatch.setattr(torch.Tensor, "index_copy", refuse)
    assert_equal(original, fast, given)


def test_a_packing_of_everything() -> None:
    mask = torch.ones(3, 4)
    found = plan(mask, keep_first=False)
    assert found is not None
    quick, slow = found[0], Packing.from_mask(mask)
    x = torch.randn(3, 4, 2)
    assert torch.equal(quick.pack(x), slow.pack(x))
    assert torch.equal(quick.unpad(quick.pack(x)), x)
    assert torch.equal(quick.cu_seqlens, slow.cu_seqlens)
    assert torch.equal(quick.positions, slow.positions)
    assert quick.longest == slow.longest
    hidden = torch.ones(3, 5)
    hidden[1, 4] = 0
    for memory_mask, whole in ((torch.ones(3, 5), True), (hidden, False)):
        found = plan(mask, memory_mask, keep_first=False)
        assert found is not None
        assert found[1] == whole
