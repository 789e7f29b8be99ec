"""8-bit GEMMs in ONNX graphs: find the GEMMs to quantise, and insert QuantizeLinear and DequantizeLinear pairs (QDQ).

All GEMMs of one tensor form a `Site`, quantised as a whole. Large channels are scaled down first, and the weights
multiply them up (SmoothQuant, arXiv 2211.10438): by a LayerNorm that feeds only these GEMMs, or by a `Mul`, since the
sum behind a post-norm layer reads the same tensor. For CPUs large embedding tables are stored in 8 bits by row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .request import Quantisation

# Entries of a table that is worth three more operators.
_LEAST_TABLE = 1 << 20
_EXTREMES: dict[Quantisation, float] = {"int8": 127.0, "fp8": 448.0}


class Scheme(NamedTuple):
    """The 8-bit type; `unsigned` activations have a zero point (fast on CPUs, unsupported on GPUs)."""

    kind: Quantisation
    unsigned: bool = False

    def scale(self, low: float, high: float) -> tuple[float, int]:
        """Return scale and zero point of activations between two values."""
        if self.unsigned:
            low, high = min(low, 0.0), max(high, 0.0)
            scale = (high - low) / 255 or 1.0
            return scale, min(max(round(-low / scale), 0), 255)
        return max(-low, high) / _EXTREMES[self.kind] or 1.0, 0

    def round(self, x: Tensor, scale: float, zero: int) -> Tensor:
        """Round activations to 8 bits."""
        if self.kind == "fp8":
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        lowest = 0 if self.unsigned else -128
        return ((x / scale).round() + zero).clamp(lowest, lowest + 255).sub(zero) * scale

    def store(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Convert a weight `[K, N]` to 8 bits; returns it and its scales, `[N]` in int8 and `[]` in fp8."""
        extreme = _EXTREMES[self.kind]
        largest = weight.abs().amax(0) if self.kind == "int8" else weight.abs().max()
        scale = (largest / extreme).clamp(min=1e-12)
        levels = (weight / scale).clamp(-extreme, extreme)
        if self.kind == "int8":
            return levels.round().to(torch.int8), scale
        return levels.to(torch.float8_e4m3fn), scale


class Site(NamedTuple):
    """A tensor and the GEMMs that read it; `norm` is the LayerNormalization that feeds only these, or ""."""

    tensor: str
    gemms: tuple[str, ...]  # names of the nodes
    layers: tuple[str, ...]  # names of their layers
    weights: tuple[Tensor, ...]  # of shape [K, N], in fp32
    norm: str = ""


class Fitted(NamedTuple):
    """A site with its scales."""

    site: Site
    smoothing: Tensor  # [K] divides the tensor and multiplies the weights
    scale: float
    zero: int
    error: float  # of the GEMMs on the samples, relative to their norm


def _readers(model: Any) -> dict[str, list[Any]]:
    """Return the nodes that read each tensor of a graph."""
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def find_sites(model: Any) -> list[Site]:
    """Find the sites of a graph, without heads (cheap, decisive for scores) and concatenated tensors (read in part)."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    returned = {value.name for value in model.graph.output}
    producers = {name: node for node in model.graph.node for name in node.output}
    readers = _readers(model)
    sites = []
    for tensor, nodes in readers.items():
        gemms = []
        for node in nodes:
            if node.op_type == "MatMul" and node.input[0] == tensor:
                matrix = constants.get(node.input[1])
                if matrix is not None and len(matrix.dims) == 2:
                    gemms.append(node)
        layers = tuple(map(_layer_name, gemms))
        producer = producers.get(tensor)
        operator = "" if producer is None else producer.op_type
        if not gemms or operator == "Concat" or any("heads." in name for name in layers):
            continue
        norm = ""
        if producer is not None and operator == "LayerNormalization" and tensor not in returned:
            constant = all(name in constants for name in producer.input[1:])
            norm = producer.name if constant and len(gemms) == len(nodes) else ""
        names = tuple(gemm.name for gemm in gemms)
        weights = tuple(_array(constants[gemm.input[1]]) for gemm in gemms)
        sites.append(Site(tensor, names, layers, weights, norm))
    return sites


def _layer_name(gemm: Any) -> str:
    """Return the name of a GEMM's layer by that of its weight."""
    layer, _, parameter = gemm.input[1].rpartition(".")
    return layer if parameter == "weight" else gemm.name


def find_tables(model: Any) -> dict[str, list[str]]:
    """Find large tables that are read row by row: their names, and the names of the `Gather` nodes that read them."""
    readers = _readers(model)
    tables = {}
    for tensor in model.graph.initializer:
        nodes = readers.get(tensor.name, [])
        by_row = all(
            node.op_type == "Gather"
            and node.input[0] == tensor.name
            and not any(attribute.i for attribute in node.attribute)
            for node in nodes
        )
        if nodes and by_row and len(tensor.dims) == 2 and math.prod(tensor.dims) >= _LEAST_TABLE:
            tables[tensor.name] = [node.name for node in nodes]
    return tables


def _array(tensor: Any) -> Tensor:
    """Read a constant as fp32."""
    from onnx import numpy_helper

    # torch.from_numpy does not take NumPy's extension types, such as bfloat16.
    return torch.from_numpy(np.array(numpy_helper.to_array(tensor), np.float32))


def quantise_graph(
    model: Any,
    fitted: Sequence[Fitted],
    scheme: Scheme,
    tables: Mapping[str, Sequence[str]] = {},
) -> Any:
    """Return a copy of an ONNX graph with some of its sites and tables in 8 bits."""
    from onnx import TensorProto, helper

    model = copy.deepcopy(model)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    inserted: dict[str, list[Any]] = {name: [] for name in nodes}
    narrow = TensorProto.FLOAT8E4M3FN if scheme.kind == "fp8" else TensorProto.INT8
    zero_type = TensorProto.UINT8 if scheme.unsigned else narrow
    # Scales have the dtype of the graph.
    dtypes: dict[int, torch.dtype] = {
        TensorProto.FLOAT: torch.float32,
        TensorProto.FLOAT16: torch.float16,
        TensorProto.BFLOAT16: torch.bfloat16,
    }

    def constant(name: str, value: Tensor, data_type: int) -> str:
        if data_type in dtypes:
            value = value.to(dtypes[data_type])
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        tensor = helper.make_tensor(name, data_type, [*value.shape], content, raw=True)
        graph.initializer.append(tensor)
        return name

    def insert(
        before: str, operator: str, inputs: Sequence[str], output: str, name: str, **axis: Any
    ) -> str:
        inserted[before].append(helper.make_node(operator, inputs, [output], name, **axis))
        return output

    for site, smoothing, scale, zero, _ in fitted:
        name, first, tensor = f"{site.tensor}.{scheme.kind}", site.gemms[0], site.tensor
        wide = constants[nodes[first].input[1]].data_type
        if site.norm:
            norm = nodes[site.norm]
            for index in range(1, len(norm.input)):
                value = _array(constants[norm.input[index]]) / smoothing
                norm.input[index] = constant(f"{name}.norm_{index}", value, wide)
        elif bool((smoothing != 1).any()):
            inverse = constant(f"{name}.inverse_smoothing", 1 / smoothing, wide)
            operands = [tensor, inverse]
            tensor = insert(first, "Mul", operands, f"{name}.smoothed", f"{name}.smooth")
        scales = [
            constant(f"{name}.scale", torch.tensor(scale), wide),
            constant(f"{name}.zero", torch.tensor(zero, dtype=torch.uint8), zero_type),
        ]
        levels = insert(first, "QuantizeLinear", [tensor, *scales], f"{name}.q", f"{name}.quantize")
        operand = insert(
            first, "DequantizeLinear", [levels, *scales], f"{name}.dq", f"{name}.dequantize"
        )
        for gemm in site.gemms:
            weight = _array(constants[nodes[gemm].input[1]])
            values, steps = scheme.store(weight * smoothing[:, None])
            zeros = torch.zeros(steps.shape, dtype=torch.uint8)
            stored = [
                constant(f"{gemm}.weight", values, narrow),
                constant(f"{gemm}.weight_scale", steps, wide),
                constant(f"{gemm}.weight_zero", zeros, narrow),
            ]
            output, axis = f"{gemm}.weight_dq", {"axis": 1} if steps.dim() else {}
            nodes[gemm].input[0] = operand
            nodes[gemm].input[1] = insert(
                first, "DequantizeLinear", stored, output, f"{gemm}.dequantize", **axis
            )
    gathers: set[str] = set()
    for name, readers in tables.items():
        wide, rows = constants[name].data_type, _array(constants[name])
        steps = (rows.abs().amax(1, keepdim=True) / _EXTREMES["int8"]).clamp(min=1e-12)
        levels = constant(f"{name}.int8", (rows / steps).round().to(torch.int8), TensorProto.INT8)
        scales = constant(f"{name}.steps", steps, wide)
        for gather in readers:
            _, index = nodes[gather].input
            narrow_rows, wide_rows, row_steps = (
                f"{gather}.{tensor}" for tensor in ("levels", "wide_levels", "steps")
            )
            inserted[gather] = [
                helper.make_node("Gather", [levels, index], [narrow_rows], narrow_rows),
                helper.make_node("Cast", [narrow_rows], [wide_rows], wide_rows, to=wide),
                helper.make_node("Gather", [scales, index], [row_steps], row_steps),
                helper.make_node("Mul", [wide_rows, row_steps], nodes[gather].output, gather),
            ]
        gathers.update(readers)
    order = []
    for node in graph.node:
        order += inserted[node.name]
        if node.name not in gathers:
            order.append(node)
    read = {name for node in order for name in node.input} | {value.name for value in graph.output}
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    for field, messages in ((graph.node, order), (graph.initializer, initializers)):
        del field[:]
        field.extend(messages)
    return model
