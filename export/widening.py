"""bf16 graphs in fp32: ONNX Runtime has no bf16 kernels for the CPU, and can look at such a graph in no other way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from xfm_fast.export.onnx_files import LARGEST_FILE


def widen(path: Path, out: Path) -> None:
    """Write a copy of a bf16 graph whose inputs, outputs and arithmetic are fp32. Weights keep their value.

    Args:
        path: of the graph; weights that lie beside it are read too.
        out: in an existing folder; weights of more than two gigabytes go into a file beside it.
    """
    import onnx
    from onnx import numpy_helper

    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    model = onnx.load(str(path))
    graph = model.graph

    def widened(tensor: Any) -> None:
        if tensor.data_type == narrow:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    for tensor in graph.initializer:
        widened(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                widened(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == narrow:
                attribute.i = wide
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    size = sum(len(tensor.raw_data) for tensor in graph.initializer)
    onnx.save(model, str(out), save_as_external_data=size > LARGEST_FILE, location=f"{out.name}.data")
