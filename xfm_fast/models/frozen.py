"""Frozen weights for CPU inference: packed in the layout of the fastest library in place of their parameters.

oneDNN is fastest on blocked weights, up to twice as fast for a single caption. A packed copy beside
the parameter would double the memory of the model. `XFM.freeze` packs weights that only `ops` read;
`replace.stored` packs those of third-party layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels.backend import Backend
from xfm_fast.kernels.cpu import gemm
from xfm_fast.kernels.cpu.workspace import HugePages
from xfm_fast.kernels.ladder import runs_cpu_inference
from xfm_fast.models.shares import without_hooks
from xfm_fast.models.text import AttentionProjections, TransformerLayer
from xfm_fast.models.vision import Block
from xfm_fast.plans.plan import forget
from xfm_fast.plans.slots import SLOT, dense_weight, pack, pack_of, unpack

_TRAINED = "_xfm_fast_trained"
_HOOKS = "_xfm_fast_frozen_hooks"


def packed_weight(
    layers: Sequence[nn.Module], backend: Backend | None, x: Tensor, *operands: Tensor | None
) -> Tensor | None:
    """Return `pack_of` in a form that `ops` accept: dense with gradients, autocast or a compiler."""
    packed = pack_of(layers)
    if packed is None:
        return None
    if gemm.is_laid_out(packed) and not layers[0].training and x.dtype == packed.dtype:
        biases = [layer._parameters.get("bias") for layer in layers]
        if runs_cpu_inference(backend, x, *biases, *operands):
            return packed
    return gemm.dense(packed).data


def is_frozen(model: nn.Module) -> bool:
    """Return whether a model is frozen, between `freeze` and `unfreeze`."""
    return _HOOKS in model.__dict__


def freeze(model: nn.Module) -> None:
    """Pack the weights of all blocks of a model; no parameter takes gradients until `unfreeze`.

    Skips shared weights, and layers with hooks or of another class.
    """
    if is_frozen(model):
        return
    if model.training:
        raise InputError(
            "freeze() is for inference and the model is in training mode; call eval() first"
        )
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.bfloat16):
            raise InputError(
                f"freeze() takes float32 or bfloat16 on a CPU, and {name} is {parameter.dtype} on {parameter.device}; "
                "convert or move the model first"
            )
    owners, memory = owner_counts(model), HugePages()
    model.__dict__[_TRAINED] = stop_gradients(model)
    for block in model.modules():
        if not isinstance(block, Block | TransformerLayer):
            continue
        # Keys and values are one group.
        pairs = [(m.key, m.value) for m in block.modules() if isinstance(m, AttentionProjections)]
        paired = {layer for pair in pairs for layer in pair}
        singles = [(m,) for m in block.modules() if isinstance(m, nn.Linear) and m not in paired]
        # A text may be single and short; an image has hundreds of rows.
        few_rows = isinstance(block, TransformerLayer)
        for group in (*pairs, *singles):
            weights = own_weights(group, owners)
            if weights is None:
                continue
            layout = gemm.layout_of(weights[0], few_rows=few_rows)
            group[0]._parameters["weight"] = pack(group, weights, layout, memory)
    model.__dict__[_HOOKS] = (
        model.register_state_dict_post_hook(_dense_state),
        model.register_load_state_dict_pre_hook(_refuse_state),
    )


def unfreeze(model: nn.Module) -> None:
    """Restore the parameters bit for bit; no effect on a model that is not frozen."""
    if not is_frozen(model):
        return
    for layer in model.modules():
        # A plan keeps packed weights.
        forget(layer)
        if SLOT in layer.__dict__:
            layer._parameters["weight"] = unpack(layer)
    for hook in model.__dict__.pop(_HOOKS):
        hook.remove()
    for parameter in model.__dict__.pop(_TRAINED):
        parameter.requires_grad_(True)


def owner_counts(model: nn.Module) -> Counter[int]:
    """Count the modules that own each parameter, by identity."""
    return Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )


def own_weights(
    layers: Sequence[nn.Module | None], owners: Counter[int]
) -> list[nn.Parameter] | None:
    """Return the weights of plain linear layers without hooks that share none; otherwise None."""
    weights = []
    for layer in layers:
        if type(layer) is not nn.Linear or not without_hooks((layer,), "forward"):
            return None
        weight = layer._parameters.get("weight")
        if type(weight) is not nn.Parameter or owners[id(weight)] > 1:
            return None
        weights.append(weight)
    return weights


def stop_gradients(model: nn.Module) -> list[nn.Parameter]:
    """Disable the gradients of all parameters; returns those that had them enabled."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    return trained


def _dense_state(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, layer in model.named_modules():
        if SLOT in layer.__dict__:
            state[f"{prefix}{name}.weight"] = dense_weight(layer)


def _refuse_state(model: nn.Module, *_: Any) -> NoReturn:
    raise InputError(
        "the model is frozen for inference and takes no other weights; call unfreeze() first"
    )
