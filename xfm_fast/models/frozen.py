"""Weights stored in the CPU's fastest GEMM layout, in place of the parameters: `XFM.freeze`.

oneDNN multiplies fastest in a blocked layout: a single caption, which is bound by reading weights, takes half the time.
The layout replaces the parameter, because a copy would double the memory. Our LLVM-compiled kernels read weights as
they are, and get them so where they are as fast. Code that reads weights without `ops`, such as exports and trainers,
needs `unfreeze` first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels import derived
from xfm_fast.kernels.cpu import products
from xfm_fast.models.text import AttentionProjections, TransformerLayer
from xfm_fast.models.vision import Block

_KEPT = "_xfm_fast_parameter"
_TRAINED = "_xfm_fast_trained"
_HOOKS = "_xfm_fast_frozen_hooks"


def is_frozen(model: nn.Module) -> bool:
    """Return True between `freeze` and `unfreeze`."""
    return _HOOKS in model.__dict__


def freeze(model: nn.Module) -> None:
    """Convert the weights of all blocks and layers, in place; state dicts stay the same to the bit.

    Parameters take no gradients until `unfreeze`. Weights shared by modules, layers with hooks or of another class, and
    layers where PyTorch's own GEMMs are faster, stay. Raises `InputError` unless the model is on a CPU, in float32 or
    bfloat16, and in evaluation mode.
    """
    if is_frozen(model):
        return
    if model.training:
        raise InputError("freeze() is for inference and the model is in training mode; call eval() first")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.bfloat16):
            raise InputError(
                f"freeze() needs float32 or bfloat16 on a CPU, and {name} is {parameter.dtype} on {parameter.device}; "
                "convert the model"
            )
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    model.__dict__[_TRAINED] = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    for group, of_texts in _groups(model):
        weights = [layer.weight for layer in group]
        separable = all(_plain(layer) and owners[id(layer.weight)] == 1 for layer in group)
        if not separable:
            continue
        # A batch may be one short text; an image has some hundred rows.
        blocked = products.prefers_onednn(weights[0].dtype, few_rows=of_texts)
        if not blocked and not products.reads_as_quickly(weights[0].dtype, few_rows=of_texts):
            continue
        packed = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        packed = products.laid_out(packed) if blocked else packed
        for layer, weight in zip(group, weights, strict=True):
            # Optimizers keep their parameter object, without its memory.
            layer.__dict__[_KEPT] = weight
            derived.forget(weight)
            weight.data = weight.data.new_empty(0)
        group[0]._parameters["weight"] = products.Frozen(packed, requires_grad=False)
    model.__dict__[_HOOKS] = (
        model.register_state_dict_post_hook(_dense_state),
        model.register_load_state_dict_pre_hook(_refuse_state),
    )


def unfreeze(model: nn.Module) -> None:
    """Restore the weights to the bit; does nothing to a model that is not frozen."""
    if not is_frozen(model):
        return
    for group, _ in _groups(model):
        if _KEPT not in group[0].__dict__:
            continue
        for layer, weight in zip(group, _dense(group), strict=True):
            parameter = layer.__dict__.pop(_KEPT)
            parameter.data = weight
            layer._parameters["weight"] = parameter
    for hook in model.__dict__.pop(_HOOKS):
        hook.remove()
    for parameter in model.__dict__.pop(_TRAINED):
        parameter.requires_grad_(True)


def _groups(model: nn.Module) -> Iterator[tuple[list[nn.Linear], bool]]:
    """Yield linear layers that only `ops` multiplies with, keys and values as one group, and whether they read text."""
    for part in model.modules():
        if not isinstance(part, Block | TransformerLayer):
            continue
        together = [[m.key, m.value] for m in part.modules() if isinstance(m, AttentionProjections)]
        within = {id(layer) for group in together for layer in group}
        singles = [[m] for m in part.modules() if isinstance(m, nn.Linear) and id(m) not in within]
        for group in together + singles:
            yield group, isinstance(part, TransformerLayer)


def _plain(layer: nn.Linear) -> bool:
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def _dense(group: list[nn.Linear]) -> list[Tensor]:
    """The weights of a group, each in its own memory."""
    parts = group[0].weight.data.to_dense().split([layer.out_features for layer in group])
    return list(parts) if len(parts) == 1 else [part.clone() for part in parts]


def _dense_state(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    for group, _ in _groups(model):
        if _KEPT in group[0].__dict__:
            for layer, weight in zip(group, _dense(group), strict=True):
                state[f"{prefix}{names[id(layer)]}.weight"] = weight


def _refuse_state(model: nn.Module, *_: Any) -> NoReturn:
    raise InputError("the model is frozen for inference; call unfreeze() before loading weights")
