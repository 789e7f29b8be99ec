"""What Torch-TensorRT would make of our graphs, told without a GPU: a script, `python -m ... FOLDER GRAPH ...`.

The package is imported from FOLDER, over TensorRT for RTX, without its own libraries, which want CUDA. Programs are
lowered and divided as `torch.compile(backend="tensorrt")` does it; nothing is built.
"""

from __future__ import annotations

import json
import sys
from typing import Any, get_args

import torch


def report(names: list[str]) -> dict[str, Any]:
    """For each graph the parts that it is divided into, and the operators that no engine takes."""
    cuda: Any = torch.cuda
    # Asked for when it is imported, though nothing is run.
    cuda.get_device_capability, cuda.current_device = lambda *_: (8, 9), lambda: 0
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = object
    import torch_tensorrt  # pyright: ignore[reportMissingImports]  # noqa: F401
    from torch_tensorrt.dynamo import partitioning  # pyright: ignore[reportMissingImports]
    from torch_tensorrt.dynamo.conversion import CompilationSettings  # pyright: ignore[reportMissingImports]
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import (  # pyright: ignore[reportMissingImports]
        DYNAMO_CONVERTERS,
    )
    from torch_tensorrt.dynamo.lowering import (  # pyright: ignore[reportMissingImports]
        get_decompositions,
        post_lowering,
        pre_export_lowering,
    )

    from xfm_fast.config import XFMConfig
    from xfm_fast.export.graphs import build, frozen, tracing_call
    from xfm_fast.export.request import GraphName
    from xfm_fast.tasks.nlvr2 import NLVR2Model
    from xfm_fast.tasks.vqa import VQAModel

    config, settings = XFMConfig.preset("tiny"), CompilationSettings(min_block_size=1)
    DYNAMO_CONVERTERS.set_compilation_settings(settings)
    vqa, nlvr2 = VQAModel(config, decoder_layers=2).eval(), NLVR2Model(config).eval()
    found: dict[str, Any] = {"backends": torch._dynamo.list_backends()}
    for name in names:
        assert name in get_args(GraphName)
        graph = build(name, nlvr2 if name == "nlvr2" else vqa, "primitives")  # pyright: ignore[reportArgumentType]
        inputs, shapes = tracing_call(graph, torch.float32, {})
        with torch.no_grad(), frozen(graph):
            program = torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
            program = pre_export_lowering(program, settings).run_decompositions(get_decompositions(False))
            lowered = post_lowering(program.module(), settings)
        divided, tester = partitioning.fast_partition(lowered, min_block_size=1)
        parts = [part for part, _ in divided.named_children()]
        found[name] = {"parts": parts, "left": sorted(tester.unsupported_operators)}
    return found


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    said = report(sys.argv[2:])
    # The package prints reports of its own.
    print(f"\n{json.dumps(said)}")
