"""AOTInductor packages: each graph compiled to machine code by PyTorch's own compiler, without ONNX or TensorRT.

Linear layers stay the operator of this project on a CPU, which takes the faster of two libraries for its products;
everything else is decomposed, so that the compiler fuses it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from xfm_fast.errors import ExportError, StorageError
from xfm_fast.export import manifest as manifests
from xfm_fast.export.consumers import DTYPES, DType, Profile
from xfm_fast.export.exporting import (
    Progress,
    build_graphs,
    graph_bytes,
    graph_interface,
    in_dtype,
    prepare_folder,
    weights_sha256,
)
from xfm_fast.export.graphs import Graph, GraphName
from xfm_fast.export.manifest import MANIFEST_FILE, GraphRecord, Manifest
from xfm_fast.export.package_target import check_compiling, local_target
from xfm_fast.export.reference import reference_bytes
from xfm_fast.export.tracing import frozen, tracing_call
from xfm_fast.kernels import ops  # noqa: F401, which registers the operators
from xfm_fast.models.xfm import XFM

# While one is compiled its weights lie in a library, in an object file and in the package.
_COPIES = 3
# Attention is decomposed by PyTorch here and not by the graphs.
_SPELLING = Profile("primitives", 0)
# What depends on weights alone (the joined projections of the image memory, position biases from their tables) is
# computed when a package is loaded, and not at every call.
_COMPILER = {"aot_inductor.use_runtime_constant_folding": True}


def export_packages(
    model: XFM,
    folder: str | Path,
    *,
    dtype: DType = "fp32",
    device: str = "cpu",
    graphs: Sequence[GraphName] | None = None,
    fixed: Mapping[str, int] | None = None,
    all_tokens: bool = False,
    source: str = "a model in memory",
    tokenizer_sha256: str | None = None,
    progress: Progress = lambda message: None,
) -> Manifest:
    """Compile graphs of a model to `<graph>.pt2`, and write `manifest.json` beside them.

    The manifest says `unverified`; `verification.verify_export` compares the packages with the model.

    Args:
        model: is left as it is.
        folder: made if it is not there. Packages of the same name in it are replaced.
        device: `cpu` or `cuda`, of this machine: packages are bound to the processor and GPU that compiled them.
        dtype, graphs, fixed, all_tokens, source, tokenizer_sha256, progress: as in `exporting.export_onnx`.

    Raises:
        UnavailableError: a device, type or graph that is unknown or that this machine or model does not offer.
        InputError: a fixed axis or size that no graph can have.
        StorageError: the folder cannot be written, or has no room for the files.
        ExportError: there is no C++ compiler, or a graph cannot be compiled.
    """
    folder, fixed = Path(folder), dict(fixed or {})
    check_compiling(device, dtype)
    built = build_graphs(model, _SPELLING, graphs, fixed=fixed, all_tokens=all_tokens)
    sizes = [graph_bytes(graph, model, dtype) for graph in built.values()]
    prepare_folder(folder, sum(sizes) + _COPIES * max(sizes) + reference_bytes(model.config))
    content = manifests.new_manifest(
        kind="aoti",
        source=source,
        weights_sha256=weights_sha256(model, built.values()),
        tokenizer_sha256=tokenizer_sha256,
        config=model.config.model_dump(),
        dtype=dtype,
        consumer="aoti",
        opset=None,
        attention=_SPELLING.form,
        all_tokens=all_tokens,
        fixed=fixed,
        versions=manifests.package_versions("torch", "triton"),
        graphs=[],
        files=[],
        package=local_target(device),
        reason="it was not compared with the model",
    )
    # From here on the files change, and an earlier manifest no longer describes them.
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for name, graph in built.items():
        progress(f"compiling {name}")
        started = time.perf_counter()
        axes = {axis.name for spec in graph.inputs for axis in spec.axes.values()}
        constant = {axis: size for axis, size in fixed.items() if axis in axes}
        path = folder / f"{name}.pt2"
        write_package(in_dtype(graph, dtype), path, dtype, device, fixed=constant)
        content.graphs.append(
            GraphRecord(
                name=name,
                file=path.name,
                files=[path.name],
                build_seconds=round(time.perf_counter() - started, 3),
                **graph_interface(graph, dtype, model, constant),
            )
        )
    content.files = manifests.record_files(folder, [record.file for record in content.graphs])
    content.save(folder)
    return content


def write_package(
    graph: Graph, path: Path, dtype: DType, device: str, *, fixed: Mapping[str, int] | None = None
) -> None:
    """Compile a graph to `path`, in an existing folder; nothing half-written stays.

    Args:
        graph: from `graphs.build`, its parameters in `dtype`.
        fixed: axes that get a constant size; the others stay dynamic.

    Raises:
        ExportError: PyTorch cannot trace or compile it.
        StorageError: the package cannot be written.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.utils import fresh_cache

    try:
        # Whatever the compiler writes goes where room was found, and is gone afterwards.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch, _quiet(), frozen(graph):
            program = traced(graph, dtype, device, fixed or {})
            made = Path(scratch) / path.name
            with fresh_cache(dir=scratch):
                aoti_compile_and_package(program, package_path=str(made), inductor_configs=_COMPILER)
            made.replace(path)
    except OSError as error:
        raise _not_written(path, error.strerror or str(error)) from error
    except Exception as error:  # the compiler's own classes, which share no public base
        full = os.strerror(errno.ENOSPC)
        if full in str(error):
            # The C++ compiler's last words, somewhere in its output.
            raise _not_written(path, full) from error
        raise ExportError(
            f"PyTorch {torch.__version__} does not compile {path.stem} for {device} in {dtype} ({_first_line(error)}); "
            "export it to ONNX, or upgrade PyTorch"
        ) from error


def _not_written(path: Path, reason: str) -> StorageError:
    return StorageError(f"{path} could not be written ({reason}); free space or choose another folder")


def traced(graph: Graph, dtype: DType, device: str, fixed: Mapping[str, int]) -> torch.export.ExportedProgram:
    """The graph as a program on a device, with the operators that packages keep.

    Args:
        graph: its parameters in `dtype`.
        fixed: axes that get a constant size.
    """
    inputs, shapes = tracing_call(graph, DTYPES[dtype], fixed)
    with torch.no_grad(), frozen(graph):
        program = torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)
    if device == "cuda":
        from torch.export.passes import move_to_device_pass

        return move_to_device_pass(program, device)
    keep_operators(program)
    return program


def keep_operators(program: torch.export.ExportedProgram) -> None:
    """Give linear layers to this project's operator, in place."""
    for node in program.graph_module.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            x, weight, bias = (*node.args, None)[:3]
            node.target, node.args = torch.ops.xfm_fast.linear.default, (x, weight, bias)
    program.graph_module.recompile()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings about the compiler's own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
