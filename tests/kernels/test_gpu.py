"""What only a whole GPU shows: the model in bf16 against fp64, equal bits, other devices than the current one.

What needs no GPU to run is run on the CPU too, so that these tests are known to be right before a GPU meets them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import assert_accurate
from tests.kernels.cases import CASES, converted, run
from xfm_fast.kernels import ops

if TYPE_CHECKING:
    from xfm_fast import XFM

on_gpu = pytest.mark.gpu
REPEATS = 20


def model_of(device: str, dtype: torch.dtype, layers: int = 2, image_size: int = 64) -> XFM:
    """Few layers of each encoder, with heads of 64 as in the real models, on the same weights everywhere."""
    from xfm_fast import XFM, XFMConfig

    torch.manual_seed(0)
    depths = {"vision_depth": layers, "text_layers": layers, "fusion_layers": layers}
    config = XFMConfig.preset("tiny", **depths, vocab_size=64, image_size=image_size)
    config = config.replace(vision_width=128, vision_heads=2, text_width=128, text_heads=2)
    model = XFM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_(std=0.2)
        # The truth starts from what 16 bits hold.
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.to(device, dtype)


def results(model: XFM, backend: ops.Backend = "auto") -> dict[str, Tensor]:
    """Embeddings, scores and gradients of a few pairs, on the CPU."""
    draw = torch.Generator().manual_seed(1)
    size = model.config.image_size
    pixels = torch.randn(3, 3, size, size, generator=draw).bfloat16().to(model.device, model.dtype)
    ids = torch.tensor(
        [[0, 9, 33, 7, 2], [0, 7, 2, 1, 1], [0, 50, 41, 2, 1], [0, 5, 6, 2, 1]], device=model.device
    )
    mask, of = ids != 1, torch.tensor([1, 0, 2, 1], device=model.device)
    model.zero_grad()
    with ops.use_backend(backend):
        images = model.encode_image(pixels)
        texts = model.encode_text(ids, mask)
        fused = model.fuse(texts, mask, model.image_memory(images), of)
        logits = model.match_logits(fused)
        logits.float().logsumexp(1).sum().backward()
    found = {"images": images, "texts": texts[mask], "fused": fused[mask], "logits": logits}
    last = model.config.vision_depth - 1
    table = model.get_parameter(
        f"vision_encoder.blocks.{last}.attn.relative_position_bias_table"
    ).grad
    weight = model.get_parameter(
        f"fusion_encoder.roberta.encoder.layer.{last}.attention.self.query.weight"
    ).grad
    assert table is not None
    assert weight is not None
    found |= {"gradient of a table": table, "gradient of a weight": weight}
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.float32),
        pytest.param("cuda", torch.bfloat16, marks=on_gpu),
        pytest.param("cuda", torch.float16, marks=on_gpu),
        pytest.param("cuda", torch.float32, marks=on_gpu),
    ],
)
def test_the_whole_model_against_fp64(device: str, dtype: torch.dtype) -> None:
    truth = results(model_of("cpu", torch.float64), "reference")
    plain = results(model_of(device, dtype), "reference")
    found = results(model_of(device, dtype))
    for name, value in found.items():
        assert_accurate(value, [plain[name]], truth[name], name)


# An operation of each kind, and dropout.
OPERATIONS: dict[str, dict[str, Any]] = {
    **{
        name: {}
        for name in (
            "relpos",
            "bias",
            "varlen",
            "add_layer_norm",
            "linear_gelu",
            "linear_cross_entropy",
        )
    },
    "varlen, masked": {"dropout_p": 0.2},
}
each_operation = pytest.mark.parametrize("name", OPERATIONS)


def once(name: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    options = OPERATIONS[name]
    if options:
        options = options | {"seed": torch.tensor([7], device=device)}
    return run(
        CASES[name], converted(CASES[name].arguments(grad=True, n=40), dtype, device) | options
    )


@each_operation
@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=on_gpu)],
)
def test_equal_bits_every_time(name: str, device: str, dtype: torch.dtype) -> None:
    first = once(name, device, dtype)
    for _ in range(REPEATS - 1 if device == "cuda" else 1):
        assert all(map(torch.equal, once(name, device, dtype), first))


@on_gpu
@each_operation
def test_tensors_of_another_gpu_than_the_current_one(name: str) -> None:
    """As `device_map="auto"` lays models out: the launch must be on the GPU that has the tensors."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = once(name, "cuda:0", torch.bfloat16)
    with torch.cuda.device(0):
        found = once(name, "cuda:1", torch.bfloat16)
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in found)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, expected, strict=True))
