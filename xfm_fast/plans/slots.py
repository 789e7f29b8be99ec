"""Packed weights of linear layers, in place of the memory of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import caching
from xfm_fast.kernels.cpu import gemm
from xfm_fast.kernels.cpu.workspace import HugePages

SLOT = "_xfm_fast_weight"


class Slot(NamedTuple):
    """Location of a layer's packed weight, and its parameter, whose memory is released."""

    packed: gemm.Frozen  # `[ΣM, K]`, of one or more layers on the same input
    sizes: tuple[int, ...]  # M of each layer
    position: int  # of the layer
    parameter: nn.Parameter


def pack(
    layers: Sequence[nn.Module],
    weights: Sequence[nn.Parameter],
    layout: gemm.Layout,
    memory: HugePages,
) -> gemm.Frozen:
    """Move the weights of layers on one input into one packed weight."""
    joined = torch.cat([*weights]).detach() if len(weights) > 1 else weights[0].detach()
    packed = gemm.frozen(joined, layout, memory)
    sizes = tuple(weight.shape[0] for weight in weights)
    for index, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        caching.forget(weight)
        layer.__dict__[SLOT] = Slot(packed, sizes, index, weight)
        # Keep the shape without memory; it refuses writes, which would be lost.
        weight.data = weight.data.new_full((), torch.nan).expand(weight.shape)
    return packed


def unpack(layer: nn.Module) -> nn.Parameter:
    """Remove the packed weight of a layer; returns its parameter with the values restored."""
    parameter = slot_of(layer).parameter
    parameter.data = dense_weight(layer)
    del layer.__dict__[SLOT]
    return parameter


def slot_of(layer: nn.Module) -> Slot:
    """Return the slot of a packed layer."""
    return layer.__dict__[SLOT]


def dense_weight(layer: nn.Module) -> Tensor:
    """Return the weight `[M, K]` of a packed layer, without the storage of its neighbours."""
    slot = slot_of(layer)
    weight = gemm.dense(slot.packed).data.split(slot.sizes)[slot.position]
    return weight if len(slot.sizes) == 1 else weight.clone()


def pack_of(layers: Sequence[nn.Module]) -> gemm.Frozen | None:
    """Return the packed weight of exactly these layers, in order, or None."""
    if SLOT not in layers[0].__dict__:
        return None
    first = slot_of(layers[0])
    if layers[0].training and torch.is_grad_enabled():
        raise InputError(
            "the model is frozen for inference and in training mode; call model.eval(), or report.revert() to train it"
        )
    if len(layers) != len(first.sizes):
        return None
    for index, layer in enumerate(layers):
        slot = layer.__dict__.get(SLOT)
        if slot is None or slot.packed is not first.packed or slot.position != index:
            return None
    return first.packed
