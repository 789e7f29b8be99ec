"""Consumers: the readers of an exported ONNX file, and how attention is spelt for them."""

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
    """The spelling of graphs: the form of attention and the ONNX opset."""

    form: AttentionForm
    opset: int


def profile(consumer: str, dtype: str, opset: int | None = None) -> Profile:
    """The spelling of graphs of a type.

    In fp32 attention is primitives of opset 20, which every consumer reads and fuses by itself; neither TensorRT has an
    fp32 kernel for the operator. In 16 bits it is the operator of opset 23, which TensorRT has kernels for.

    Args:
        opset: ONNX opset, by default the oldest that has what the graphs hold; below 23 attention is primitives.

    Raises:
        UnavailableError: a consumer or type that is not known, an opset outside 20 to 24, or a type that the consumer
            or opset does not have.
    """
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
    """A type by its name.

    Raises:
        UnavailableError: it is unknown.
    """
    if name not in DTYPES:
        raise UnavailableError(f"dtype {name!r} is unknown; choose from {', '.join(DTYPES)}")
    return name
