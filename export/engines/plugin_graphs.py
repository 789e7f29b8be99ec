"""Puts our attention plugins into an ONNX graph in place of its attention nodes.

Attention with a constant bias, as the vision encoder has it, becomes `relpos_attention`; all other attention becomes
`varlen_attention` over sequences of one length, whose padded keys are masked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xfm_fast.errors import ExportError
from xfm_fast.kernels.limits import HEAD_DIMS

from ..consumers import LARGEST_FILE
from ..graphs import OPERATOR
from ..manifest import GraphRecord
from ..onnx import Rewrite
from .library import Library
from .plugins import NAMESPACE, RELPOS, VARLEN, register
from .profiles import ShapeProfile

_TILE = 128
"""The padded bias holds whole tiles of keys: those of every launch configuration divide this."""

_LARGEST = 60000.0
_SMALL = 32
_MIDDLE_SWAPPED = [0, 2, 1, 3]


def carry_attention(path: Path, *, longest: Mapping[str, int]) -> int:
    """Rewrite an ONNX file in place.

    Args:
        path: a graph whose attention is spelt as `xfm::Attention` or `Attention` nodes.
        longest: the greatest size of each axis, which chooses between small and large tiles.

    Returns:
        How many nodes became plugins. Attention whose head dimension the kernels do not have stays.
    """
    import onnx

    model = onnx.load(str(path))
    # Shape inference does not read the weights, and its messages have a limit: a copy without them.
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if len(tensor.raw_data) > 1 << 16:
            tensor.raw_data = b""
    shaped = onnx.shape_inference.infer_shapes(light).graph
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*shaped.input, *shaped.value_info, *shaped.output)
    }
    changed = _Rewriting(model, dims, dict(longest)).run()
    if changed:
        external = model.ByteSize() > LARGEST_FILE
        onnx.save(model, str(path), save_as_external_data=external, location=f"{path.name}.data")
    return changed


@dataclass
class _Rewriting:
    model: Any
    dims: dict[str, list[int | str]]
    longest: dict[str, int]

    def run(self) -> int:
        from onnx import helper

        graph = self.model.graph
        self.producers = {output: node for node in graph.node for output in node.output}
        self.constants = _constant_values(self.model)
        nodes, changed = [], 0
        for node in graph.node:
            made = self._plugin(node) if node.op_type == OPERATOR else None
            changed += made is not None
            nodes.extend([node] if made is None else made)
        del graph.node[:]
        graph.node.extend(nodes)
        if changed and all(known.domain != NAMESPACE for known in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(NAMESPACE, 1))
        return changed

    def _plugin(self, node: Any) -> list[Any] | None:
        q: list[Any] = list(self.dims.get(node.input[0], []))
        if len(q) != 4 or not isinstance(q[1], int) or q[3] not in HEAD_DIMS:
            return None
        bias = node.input[3] if len(node.input) > 3 else ""
        if bias not in self.constants or not isinstance(q[2], int):
            return self._varlen(node, q, bias)
        _, heads, tokens, head_dim = q
        scale = _scale(node, head_dim)
        values = torch.from_numpy(self.constants[bias].astype(np.float32))
        padded = padded_bias(values.view(heads, tokens, tokens), scale)
        name = f"{node.name}_bias"
        self._constant(name, padded.numpy())
        attributes = {
            "heads": heads, "head_dim": head_dim, "tokens": tokens, "columns": padded.shape[-1], "scale": scale,
        }  # fmt: skip
        return [_plugin_node(RELPOS, node, [*node.input[:3], name], node.output[0], attributes)]

    def _varlen(self, node: Any, q: list[Any], bias: str) -> list[Any]:
        """As attention over sequences of one length; see the head of this module."""
        from onnx import TensorProto, helper

        own = node.name
        _, heads, queries, head_dim = q
        made: list[Any] = []

        def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
            made.append(helper.make_node(operator, inputs, [f"{own}_{output}"], name=f"{own}_{output}", **attributes))
            return f"{own}_{output}"

        def offsets(tensor: str, which: str) -> str:
            """`cu_seqlens` of sequences that all have the length of `tensor` `[P, L, H, D]`: 0, L, 2L, …, PL."""
            count = add("Shape", [tensor], f"count_{which}", start=0, end=1)
            length = add("Shape", [tensor], f"length_{which}", start=1, end=2)
            ends = add("Mul", [add("Add", [count, one], f"ends_{which}"), length], f"stop_{which}")
            scalars = [add("Squeeze", [t], f"{t}_scalar") for t in (ends, length)]
            places = add("Range", [zero, *scalars], f"places_{which}")
            return add("Cast", [places], f"cu_{which}", to=TensorProto.INT32)

        zero = self._constant(f"{own}_zero", np.array(0, np.int64))
        one = self._constant(f"{own}_one", np.array([1], np.int64))
        flat = self._constant(f"{own}_flat", np.array([-1], np.int64))
        packed = [self._packed(name, add, which) for name, which in zip(node.input[:3], "qkv", strict=True)]
        cu_q, cu_k = offsets(packed[0], "q"), offsets(packed[1], "k")
        mask = cu_k  # without a bias it is not read
        if bias:
            # An additive mask, of 0 and a large negative number, as int32 of 1 and 0: one number a key.
            producer = self.producers.get(bias)
            single = producer.input[0] if producer is not None and producer.op_type == "Expand" else bias
            # Any type compares as fp32; the limit lies between what shows a key and what hides it.
            single = add("Cast", [single], "mask_single", to=TensorProto.FLOAT)
            limit = self._constant("mask_limit", np.array(-1, np.float32))
            real = add("Cast", [add("Greater", [single, limit], "mask_real")], "mask", to=TensorProto.INT32)
            mask = add("Reshape", [real, flat], "mask_flat")
        small = self.longest.get(queries, _SMALL + 1) if isinstance(queries, str) else queries
        attributes = {
            "heads": heads, "head_dim": head_dim, "masked": int(bool(bias)), "small_tiles": int(small <= _SMALL),
            "scale": _scale(node, head_dim),
        }  # fmt: skip
        out = f"{own}_packed"
        made.append(_plugin_node(VARLEN, node, [*packed, cu_q, cu_k, mask], out, attributes))
        made.append(helper.make_node("Transpose", [out], [node.output[0]], name=f"{own}_out", perm=_MIDDLE_SWAPPED))
        return made

    def _packed(self, name: str, add: Any, which: str) -> str:
        """`[P, H, L, D]` as `[P, L, H, D]`: where it came from, if it came from there."""
        producer = self.producers.get(name)
        if producer is not None and producer.op_type == "Transpose":
            order = next((list(attribute.ints) for attribute in producer.attribute if attribute.name == "perm"), [])
            if order == _MIDDLE_SWAPPED:
                return producer.input[0]
        return add("Transpose", [name], f"{which}_packed", perm=_MIDDLE_SWAPPED)

    def _constant(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        if all(known.name != name for known in self.model.graph.initializer):
            self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name


def _plugin_node(plugin: str, node: Any, inputs: list[str], output: str, attributes: dict[str, Any]) -> Any:
    from onnx import helper

    # The parser reads where to look for the plugin, and that its compiled form is meant, from attributes.
    found = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
    return helper.make_node(
        plugin, inputs, [output, f"{node.name}_lse"], name=node.name, domain=NAMESPACE, **found, **attributes
    )


def padded_bias(bias: torch.Tensor, scale: float) -> torch.Tensor:
    """The bias as the kernel reads it; see `kernels.triton.relpos_table.materialise_bias`, which begins at the table.

    Args:
        bias: `[H, N, N]` fp32.
        scale: factor of the products.

    Returns:
        `[H, N, N_pad]` fp16, divided by the scale, with -inf in the columns beyond N.
    """
    heads, tokens, _ = bias.shape
    columns = -(-tokens // _TILE) * _TILE
    padded = torch.full((heads, tokens, columns), -torch.inf, dtype=torch.float16)
    padded[:, :, :tokens] = (bias / scale).clamp(-_LARGEST, _LARGEST).half()
    return padded


def _scale(node: Any, head_dim: int) -> float:
    return next((float(a.f) for a in node.attribute if a.name == "scale"), head_dim**-0.5)


def _constant_values(model: Any) -> dict[str, np.ndarray]:
    """Values of the biases that depend on no input of the graph."""
    import onnx
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    fixed = set(initializers)
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and all(not name or name in fixed for name in node.input)):
            fixed.update(node.output)
    producers = {output: node for node in graph.node for output in node.output}
    found: dict[str, np.ndarray] = {}
    for bias in {n.input[3] for n in graph.node if n.op_type == OPERATOR and len(n.input) > 3} & fixed:
        if bias in initializers:
            found[bias] = numpy_helper.to_array(initializers[bias])
            continue
        needed: dict[int, Any] = {}
        used, pending = set(), [bias]
        while pending:
            name = pending.pop()
            node = producers.get(name)
            if node is None:
                used.add(name)
            elif id(node) not in needed:
                needed[id(node)] = node
                pending.extend(node.input)
        nodes = [node for node in graph.node if id(node) in needed]
        part = helper.make_graph(
            nodes, "bias", [], [onnx.ValueInfoProto(name=bias)], [initializers[n] for n in used if n in initializers]
        )
        whole = helper.make_model(part, opset_imports=list(model.opset_import), ir_version=model.ir_version)
        found[bias] = np.asarray(next(iter(ReferenceEvaluator(whole).run(None, {}))))
    return found


def with_plugins(library: Library, arch: int, profiles: Sequence[ShapeProfile]) -> Rewrite:
    """Register the plugins and make a rewrite that puts them into graphs.

    The longest texts of the profiles choose between small and large tiles.

    Raises:
        UnavailableError, ExportError: see `plugins.register`.
    """
    register(library, arch)
    longest: dict[str, int] = {}
    for profile in profiles:
        for axis, sizes in profile.axes.items():
            longest[axis] = max(longest.get(axis, 0), sizes.most)

    def rewrite(record: GraphRecord, path: Path) -> None:
        # The image memory is products alone.
        if record.name != "image_memory" and not carry_attention(path, longest=longest):
            raise ExportError(
                f"no attention of graph {record.name!r} has a head dimension that the plugins support; leave out "
                "--plugins"
            )

    return rewrite
