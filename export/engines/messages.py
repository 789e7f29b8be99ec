"""Error messages of TensorRT mapped to the failing layer and a remedy.

Some messages name layers, some tensors, and some neither; then the operator type of the rule leads to the nodes.
Where no message helps, `first_failing_layer` bisects the network.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """A known message: its pattern, the meaning as a clause, the remedy as an imperative, and the operators."""

    pattern: str
    meaning: str
    remedy: str
    operators: tuple[str, ...] = ()
    everywhere: bool = False


RULES = (
    Rule(
        r"Attention operation was not supported by a dedicated kernel|is_decomposable",
        "there is no kernel for attention of this type and shape",
        "use --dtype bf16 or fp16, or spell attention as primitives with --opset 22",
        ("Attention",),
    ),
    Rule(
        r"HW-specific datatypes: b16",
        "a target has no bf16",
        "use --dtype fp16, or leave out targets below SM80",
        everywhere=True,
    ),
    Rule(
        r"HW-specific datatypes: (fp?8|f8|e4m3)",
        "a target has no fp8",
        "use --quantize int8, or leave out targets below SM89",
        everywhere=True,
    ),
    Rule(
        r"element type \(\w+\) differs from input 1's element type|must have (the )?same input types",
        "its operands have different types, and a strongly typed engine converts nothing by itself",
        "export the whole graph in one type: --dtype bf16 or --dtype fp16",
    ),
    Rule(
        r"libnvinfer_lean",
        "version compatibility needs the lean runtime, libnvinfer_lean, which is not installed",
        "leave out --version-compatible, or install tensorrt_lean",
        everywhere=True,
    ),
    Rule(
        r"Plugin not found",
        "this version of TensorRT knows neither the operator nor a plugin of that name",
        "export again for this consumer",
    ),
    Rule(
        r"no optimization profile has been defined|Invalid optimization profiles|profile->isValid",
        "the optimisation profile does not describe every dynamic input",
        "give --profile name:axis=least..best..most for every axis",
        everywhere=True,
    ),
    Rule(
        r"out of memory|MEM_ALLOC|OutOfMemory|cudaErrorMemoryAllocation|bad_alloc",
        "the builder ran out of memory",
        "narrow the profiles, or build on a machine with more memory",
        everywhere=True,
    ),
    Rule(
        r"insufficient for CUDA runtime version|CUDA initialization failure|no CUDA-capable device",
        "there is no usable GPU on this machine",
        "name the targets with --sm (TensorRT for RTX), or build on a machine with a GPU and a current driver",
        everywhere=True,
    ),
    Rule(
        r"Could not find any implementation for node",
        "no kernel of this version of TensorRT fits it",
        "try the other of --dtype bf16 and fp16, or a newer TensorRT",
    ),
    Rule(
        r"No importer registered|unsupported operator|UNSUPPORTED_NODE|Unsupported operator",
        "this version of TensorRT does not know the operator in this form",
        "export with a lower --opset, or use a newer TensorRT",
    ),
)

# Follows every message on a machine without a driver and is unrelated to the network.
_NOISE = re.compile(r"^\[?checkMacros\.cpp::catchCudaError.*cudaError 35", re.DOTALL)
_OTHERWISE = "build with --verbose for the builder's own messages, or try the other of --dtype bf16 and fp16"


@dataclass(frozen=True)
class Explanation:
    """A failure in a user's terms; `layers` are names of ONNX nodes, most likely first."""

    layers: tuple[str, ...]
    meaning: str
    remedy: str
    everywhere: bool
    said: str


def parser_errors(parser: Any) -> list[str]:
    """The errors of an `OnnxParser`, each with its node."""
    found = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        name, operator = error.node_name(), error.node_operator()
        where = f"node {name} ({operator}): " if name or operator else ""
        found.append(where + error.desc())
    return found


def explain(messages: Sequence[str], nodes: Sequence[tuple[str, str, Sequence[str]]]) -> Explanation:
    """The failure behind messages; `nodes` are (name, operator, tensor names) of the ONNX graph."""
    telling = [message for message in messages if not _NOISE.match(message)] or list(messages)
    for rule in RULES:
        for message in telling:
            if re.search(rule.pattern, message):
                layers: tuple[str, ...] = ()
                if not rule.everywhere:
                    alike = (name for name, operator, _ in nodes if operator in rule.operators)
                    layers = _layers(message, nodes) or tuple(alike)
                return Explanation(layers, rule.meaning, rule.remedy, rule.everywhere, _one_line(message))
    said = telling[0] if telling else ""
    meaning = f"TensorRT says {_one_line(said)!r}" if said else "TensorRT gives no reason"
    return Explanation(_layers(said, nodes), meaning, _OTHERWISE, False, _one_line(said))


def describe_layers(layers: Sequence[str], most: int = 3) -> str:
    """`node_a, node_b and 10 more`."""
    shown = ", ".join(layers[:most])
    return shown + (f" and {len(layers) - most} more" if len(layers) > most else "")


def _layers(message: str, nodes: Sequence[tuple[str, str, Sequence[str]]]) -> tuple[str, ...]:
    """Nodes named in the message, else nodes that read or write a tensor named in it."""
    words = set(re.findall(r"[\w./:-]+", message))
    # The compiler numbers copies of a tensor: bias.1 is bias.
    words |= {word.rstrip(".:") for word in words} | {re.sub(r"\.\d+$", "", word) for word in words}
    named = tuple(name for name, _, _ in nodes if name in words)
    if named:
        return named
    return tuple(name for name, _, tensors in nodes if any(tensor in words for tensor in tensors))


def _one_line(message: str, most: int = 300) -> str:
    text = " ".join(message.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def first_failing_layer(network: Any, builds: Callable[[Any], bool]) -> str:
    """The first layer that does not build with all layers before it, by bisection; empty where all parts build."""
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
    """The ONNX node of a layer, or the layer's own name where the parser added it."""
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
