"""Readers of an exported ONNX file, and the form of attention that each of them reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from xfm_fast.errors import UnavailableError

from .graphs import AttentionForm
from .request import Consumer, DType

CONSUMERS: tuple[Consumer, ...] = get_args(Consumer)

DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

LARGEST_FILE = 2**31 - 2**20
"""Protobuf reads no message of two gigabytes; larger graphs keep their weights beside the file."""

_ATTENTION_OPSET = 23
_GELU_OPSET = 20
_BF16_OPSET = 22
_NEWEST_OPSET = 24


@dataclass(frozen=True)
class Profile:
    """Form of attention and ONNX opset of a graph."""

    form: AttentionForm
    opset: int


def profile(consumer: str, dtype: str, opset: int | None = None) -> Profile:
    """The attention form and opset for a consumer and dtype; by default the oldest opset with the operators."""
    if consumer not in CONSUMERS:
        raise UnavailableError(f"consumer {consumer!r} is unknown; choose from {', '.join(CONSUMERS)}")
    data_type(dtype)
    if opset is not None and not _GELU_OPSET <= opset <= _NEWEST_OPSET:
        raise UnavailableError(
            f"opset {opset} is not supported; choose {_GELU_OPSET} (the first with Gelu) to {_NEWEST_OPSET}, "
            f"{_ATTENTION_OPSET} being the first with Attention"
        )
    if dtype == "bf16" and consumer == "openvino":
        raise UnavailableError(
            "OpenVINO takes no bf16 tensors; export with --dtype fp32 and load the session with precision='bf16'"
        )
    if dtype == "bf16" and opset is not None and opset < _BF16_OPSET:
        raise UnavailableError(
            f"opset {opset} has no bf16 convolution; choose {_BF16_OPSET} to {_NEWEST_OPSET}, or --dtype fp16"
        )
    if dtype == "fp32" or consumer == "openvino":
        return Profile("primitives", opset or _GELU_OPSET)
    opset = opset or _ATTENTION_OPSET
    return Profile("opset23" if opset >= _ATTENTION_OPSET else "primitives", opset)


def data_type(name: str) -> DType:
    """The dtype of a name; raises `UnavailableError` for an unknown one."""
    if name not in DTYPES:
        raise UnavailableError(f"dtype {name!r} is unknown; choose from {', '.join(DTYPES)}")
    return name
