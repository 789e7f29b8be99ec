"""Layers whose products run in int8 on a CPU: `accelerate(model, dtype="int8")`.

The weights of fused blocks are marked (see `kernels.cpu.int8`) and stay the parameters that they were. Heads over a
vocabulary, embeddings and whatever no fused form covers keep the floating-point type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn

from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels.cpu import int8
from xfm_fast.replace.swap import Fused, find, observed

LEAST_COSINE = 0.99
"""Between every output before and after, entry by entry of a batch: what int8 may cost where it is verified."""


def check(model: nn.Module, freeze: bool) -> None:
    """Refuse what cannot run in int8.

    Raises:
        UnavailableError: the model is not on a CPU, or the processor has no fast products of bytes.
        InputError: it is to be frozen as well.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if device is not None:
        raise UnavailableError(f"dtype='int8' is for CPUs, and the model is on {device}; move it with model.to('cpu')")
    if freeze:
        raise InputError(
            "freeze=True keeps weights in the type that they are stored in, and rounded to int8 they could not be "
            "restored; leave freeze out of dtype='int8'"
        )
    int8.require()


def quantise(model: nn.Module, fused: Iterable[Fused]) -> list[list[nn.Parameter]]:
    """Mark the weights that the fused forms of blocks multiply with; returns those of each form.

    Left as they are: adapted, observed, quantised and parametrised layers, and weights that another module shares.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    done: list[list[nn.Parameter]] = []
    for form in fused:
        if not form.multiplies_in_int8:
            continue
        layers = (find(form, name) for name in type(form).bypassed)
        weights = [
            weight
            for layer in layers
            if type(layer) is nn.Linear and not observed(layer)
            if type(weight := layer._parameters.get("weight")) is nn.Parameter and owners[id(weight)] == 1
            if weight.dtype in (torch.float32, torch.bfloat16)
        ]
        int8.mark(weights)
        if weights:
            done.append(weights)
    return done
