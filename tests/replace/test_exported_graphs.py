"""Exports of accelerated models and X-FM: graphs of torch.export and ONNX without our operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xfm_fast import XFM, XFMConfig, accelerate

transformers: Any = pytest.importorskip(
    "transformers", reason="the families are those of transformers"
)
pytest.importorskip("onnxscript", reason="exports to ONNX need onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="running exports needs onnxruntime")

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
_PIXELS = {"image_size": 32, "patch_size": 8}
_END = 99


def _clip() -> nn.Module:
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 100,
            "max_position_embeddings": 20,
            "eos_token_id": _END,
            **_SIZES,
        },
        vision_config={**_PIXELS, **_SIZES},
    )
    return transformers.CLIPModel(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(vocab_size=100, **_SIZES)),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(vocab_size=100, **_SIZES)
    ),
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**_PIXELS, **_SIZES)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**_PIXELS, **_SIZES)),
    "clip": _clip,
    "xfm text": lambda: XFM(XFMConfig.preset("tiny")),
    "xfm image": lambda: XFM(XFMConfig.preset("tiny")),
}


class _Called(nn.Module):
    """A model as a function of tensors."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.name, self.model = name, model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        model: Any = self.model
        if self.name == "clip":
            ids, mask, pixels = inputs
            made = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
            return made.text_embeds, made.image_embeds
        if self.name == "xfm text":
            return (model.encode_text(*inputs),)
        if self.name == "xfm image":
            return (model.encode_image(*inputs),)
        return tuple(model(*inputs).values())


def _inputs(name: str, batch: int, length: int) -> tuple[Tensor, ...]:
    pixels = torch.randn(batch, 3, 32, 32)
    lengths = (length - torch.arange(batch) * 2).clamp_min(2)
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(4, _END - 1, (batch, length)).masked_fill(mask == 0, 1)
    if name == "clip":
        return ids.scatter(1, lengths[:, None] - 1, _END), mask, pixels
    return (pixels,) if name in ("vit", "dinov2", "xfm image") else (ids, mask)


def _exported(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Any, Any]:
    """An accelerated model, inputs, their dynamic axes, and the program that torch.export makes of them."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    if not isinstance(model, XFM):
        accelerate(model, unpad=name in ("bert", "roberta", "clip"))
    called = _Called(name, model).eval()
    inputs = _inputs(name, 3, 9)
    dims = {0: torch.export.Dim.AUTO}
    axes = tuple(dims | ({1: torch.export.Dim.AUTO} if each.ndim == 2 else {}) for each in inputs)
    return called, inputs, axes, torch.export.export(called, inputs, dynamic_shapes=(axes,))


@pytest.mark.parametrize("name", ["bert", "xfm image"])
def test_a_graph_has_no_operator_of_ours(name: str) -> None:
    _, _, _, program = _exported(name)
    assert not [node for node in program.graph.nodes if "xfm_fast" in str(node.target)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_an_accelerated_model_is_exported(name: str) -> None:
    called, inputs, axes, program = _exported(name)
    for graph in (program.graph, program.run_decompositions().graph):
        assert not [node for node in graph.nodes if "xfm_fast" in str(node.target)]
    # With gradients, torch 2.13 views X-FM's transposed context where it has to copy it.
    with torch.no_grad():
        made = torch.onnx.export(called, inputs, dynamo=True, dynamic_shapes=(axes,), verbose=False)
    assert made is not None
    session = onnxruntime.InferenceSession(
        made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = _inputs(name, 2, 7)
    found = session.run(
        None,
        {spec.name: each.numpy() for spec, each in zip(session.get_inputs(), given, strict=True)},
    )
    with torch.no_grad():
        expected = called(*given)
    for mine, theirs in zip(map(torch.from_numpy, map(np.asarray, found)), expected, strict=True):
        if theirs.shape[:2] == given[-1].shape:  # states after the end of a text are arbitrary
            mine, theirs = (each * given[-1][..., None] for each in (mine, theirs))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
