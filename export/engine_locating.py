"""Which layer of a network a builder cannot build, where its messages do not say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def first_failing_layer(network: Any, builds: Callable[[Any], bool]) -> str:
    """The ONNX node whose layer is the first that cannot be built along with all layers before it.

    The network is cut behind a layer by marking every tensor as an output that is made before the cut and not used
    before it. Halving finds the layer in about log2(layers) builds, each shorter than the failed one.

    Args:
        network: an `INetworkDefinition` that does not build; its outputs are changed.
        builds: whether the network, as it then is, can be built.

    Returns:
        A name; empty when every part of the network builds, so that the failure comes from the whole.
    """
    low, high = 0, network.num_layers - 1
    _cut(network, high)
    if builds(network):
        return ""
    while low < high:
        middle = (low + high) // 2
        _cut(network, middle)
        if builds(network):
            low = middle + 1
        else:
            high = middle
    return node_name(network.get_layer(low))


def node_name(layer: Any) -> str:
    """The ONNX node that a layer was made from; of layers that the parser added by itself, their own name."""
    match = re.search(r"\[ONNX Layer: ([^\]|]+?)\s*[\]|]", layer.metadata or "")
    return match[1] if match else layer.name


def _cut(network: Any, last: int) -> None:
    for output in [network.get_output(number) for number in range(network.num_outputs)]:
        network.unmark_output(output)
    made: dict[str, Any] = {}
    for number in range(last + 1):
        layer = network.get_layer(number)
        for place in range(layer.num_inputs):
            tensor = layer.get_input(place)
            if tensor is not None:
                made.pop(tensor.name, None)
        for place in range(layer.num_outputs):
            tensor = layer.get_output(place)
            made[tensor.name] = tensor
    for tensor in made.values():
        network.mark_output(tensor)
