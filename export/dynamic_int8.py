"""8-bit products for the CPU: an fp32 export whose weights are int8 and whose activations are quantised as they come.

No calibration is needed, since ONNX Runtime finds the scale of every activation when it is there. What it costs in
accuracy is measured on the reference of the export and written into the manifest of the new one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xfm_fast.errors import ExportError, InputError, StorageError, UnavailableError
from xfm_fast.export import manifest as manifests
from xfm_fast.export.exporting import prepare_folder
from xfm_fast.export.manifest import MANIFEST_FILE, GraphRecord, Manifest
from xfm_fast.export.reference import REFERENCE_FILE, Reference
from xfm_fast.export.verification import verify


def quantize_int8(folder: str | Path, out: str | Path) -> Manifest:
    """Write an int8 copy of an fp32 export into a folder of its own, and measure what it costs.

    Args:
        folder: of an fp32 export to ONNX with its reference.
        out: the new folder; not the old one.

    Returns:
        The new manifest. Its checks hold errors, cosines and rank agreement against the fp32 model; `verified` says
        that they are within `agreement.EIGHT_BIT`.

    Raises:
        UnavailableError: `onnxruntime` is not installed.
        ExportError: the export is of another kind or type, is damaged or has no reference, or cannot be quantised.
        InputError: both folders are the same.
        StorageError: the new folder cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if folder.resolve() == out.resolve():
        raise InputError(f"{out} holds the fp32 export; name another folder for the int8 one")
    source = Manifest.load(folder)
    arithmetic = source.options.get("arithmetic") or source.dtype
    if source.kind != "onnx" or arithmetic != "fp32":
        raise ExportError(
            f"{folder} holds an export to {source.kind} in {arithmetic}; int8 is made of fp32 ONNX files: xfm-fast "
            "export onnx --dtype fp32"
        )
    Reference.load(folder)
    prepare_folder(out, sum(record.bytes for record in source.files))
    # From here on the files change, and an earlier manifest no longer describes them.
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    graphs = [_quantized(record, folder, out) for record in source.graphs]
    try:
        shutil.copyfile(folder / REFERENCE_FILE, out / REFERENCE_FILE)
    except OSError as error:
        raise StorageError(f"{out / REFERENCE_FILE} cannot be written ({error.strerror or error})") from error
    names = [REFERENCE_FILE, *(name for graph in graphs for name in graph.files)]
    result = source.model_copy(
        update={
            "graphs": graphs,
            "files": manifests.record_files(out, names),
            "versions": source.versions | manifests.package_versions("onnxruntime"),
            "options": source.options | {"arithmetic": "int8", "quantisation": "dynamic, int8 weights by channel"},
            "status": "unverified",
            "reason": "it was not compared with the model",
            "verification": None,
        }
    )
    result.save(out)
    return verify(out, check_files=False)


def _quantized(record: GraphRecord, folder: Path, out: Path) -> GraphRecord:
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        raise UnavailableError(
            "int8 needs onnxruntime, which is not installed; pip install 'xfm-fast[export]'"
        ) from None
    external = any(name != record.file for name in record.files)
    try:
        with _quiet():
            quantize_dynamic(
                folder / record.file,
                out / record.file,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                use_external_data_format=external,
                # The products of attention have two activations, and nothing is gained by quantising one of them.
                extra_options={"MatMulConstBOnly": True},
            )
    except OSError as error:
        raise StorageError(f"{out / record.file} cannot be written ({error.strerror or error})") from error
    except Exception as error:  # of the quantiser, which has no errors of its own
        raise ExportError(
            f"ONNX Runtime cannot quantise graph {record.name!r} ({' '.join(str(error).split())[:300]}); "
            "serve it in fp32"
        ) from error
    written = [record.file, *([f"{record.file}.data"] if external else [])]
    return record.model_copy(update={"files": written})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice to preprocess graphs, which were optimised when they were exported."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
