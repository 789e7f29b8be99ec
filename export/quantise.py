"""8-bit products: quantise/dequantise nodes for engines, and int8 weights for ONNX Runtime on the CPU.

The scales of engines come from the user's own images and texts. int8 is made by ONNX Runtime's quantiser, which runs a
graph in fp16 or fp32 on the CPU to see what its products are given; fp8, and int8 of bf16 graphs, by NVIDIA's modelopt.
`quantize_int8` needs no calibration: ONNX Runtime finds the scale of every activation when it is there. What that costs
in accuracy is measured on the reference of the export.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from xfm_fast.errors import ExportError, InputError, StorageError, UnavailableError
from xfm_fast.models.xfm import XFM

from .consumers import DTYPES, DType
from .expected import Examples, Reference, graph_memory
from .manifest import GraphRecord, Manifest, package_versions
from .onnx import Rewrite, quiet
from .pipeline import fill_folder, prepare_folder
from .request import Quantisation
from .runtimes.onnx_sessions import widen
from .verification import compare_with_reference, keep_reference

QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)

_TEXTS_AT_ONCE = 16


def check_quantisation(kind: str, dtype: DType) -> Quantisation:
    """See that graphs of a type can be quantised here, before one is exported.

    Raises:
        UnavailableError: an unknown kind, or the package that it needs is not installed; says which.
    """
    if kind not in QUANTISATIONS:
        raise UnavailableError(f"quantisation {kind!r} is unknown; choose from {', '.join(QUANTISATIONS)}")
    if _by_onnxruntime(kind, dtype):
        if importlib.util.find_spec("onnxruntime") is None:
            raise UnavailableError("int8 needs onnxruntime, which is not installed; pip install 'xfm-fast[export]'")
    elif importlib.util.find_spec("modelopt") is None:
        other = " or use --quantize int8 with --dtype fp16" if kind == "fp8" else " or use --dtype fp16"
        raise UnavailableError(
            f"{kind} in {dtype} graphs needs modelopt, which is not installed; pip install 'xfm-fast[modelopt]',"
            f"{other}, which needs onnxruntime alone"
        )
    return kind


def quantising(model: XFM, examples: Examples, kind: Quantisation, dtype: DType) -> Rewrite:
    """A rewrite of graphs for `engines.export_engines`.

    Args:
        model: computes what the later graphs are given.
        examples: images and texts to calibrate on.

    Raises:
        UnavailableError: see `check_quantisation`.
    """
    check_quantisation(kind, dtype)

    def rewrite(record: GraphRecord, path: Path) -> None:
        feeds = calibration_inputs(model, record, examples, dtype)
        try:
            if _by_onnxruntime(kind, dtype):
                _with_onnxruntime(path, feeds)
            else:
                _with_modelopt(path, feeds, kind, dtype)
        except (UnavailableError, OSError):
            raise
        except Exception as error:  # of the quantiser, which has no errors of its own
            raise ExportError(
                f"graph {record.name!r} could not be quantised to {kind} ({' '.join(str(error).split())[:300]}); build "
                "it without --quantize"
            ) from error

    return rewrite


@torch.no_grad()
def calibration_inputs(
    model: XFM, record: GraphRecord, examples: Examples, dtype: DType
) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of a graph, one image at a time: every image, and with it or after it all texts.

    Yields:
        Arrays by the names of the graph's inputs, in its types; bf16 comes as fp32.
    """
    floating = torch.float32 if dtype == "bf16" else DTYPES[dtype]
    texts = [slice(first, first + _TEXTS_AT_ONCE) for first in range(0, len(examples.input_ids), _TEXTS_AT_ONCE)]

    def arrays(**tensors: torch.Tensor) -> dict[str, np.ndarray]:
        wanted = {tensor.name for tensor in record.inputs}
        assert wanted == set(tensors), (wanted, set(tensors))
        return {name: (t.to(floating) if t.is_floating_point() else t.long()).numpy() for name, t in tensors.items()}

    if record.name == "text":
        for part in texts:
            yield arrays(input_ids=examples.input_ids[part], attention_mask=examples.attention_mask[part])
        return
    for number in range(len(examples.pixels)):
        pixels = examples.pixels[number : number + 1]
        if record.name == "vision":
            yield arrays(pixels=pixels)
            continue
        if record.name == "match":
            for part in texts:
                ids, mask = examples.input_ids[part][None], examples.attention_mask[part][None]
                yield arrays(pixels=pixels, input_ids=ids, attention_mask=mask)
            continue
        embeds = model.encode_image(pixels.to(model.dtype))
        if record.name == "image_memory":
            yield arrays(image_embeds=embeds)
            continue
        memory = graph_memory(model.image_memory(embeds))
        for part in texts:
            mask = examples.attention_mask[part]
            embedded = model.encode_text(examples.input_ids[part], mask)
            yield arrays(text_embeds=embedded[None], attention_mask=mask[None], memory=memory)


def _by_onnxruntime(kind: str, dtype: DType) -> bool:
    return kind == "int8" and dtype != "bf16"


def _with_onnxruntime(path: Path, feeds: Iterator[dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantised-") as scratch, quiet():
        made = Path(scratch) / path.name
        quantize(
            str(path),
            str(made),
            _reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                # TensorRT has symmetric scales only, int32 in no dequantisation, and wants outputs left as they are.
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
            },
        )
        made.replace(path)


def _with_modelopt(path: Path, feeds: Iterator[dict[str, np.ndarray]], kind: Quantisation, dtype: DType) -> None:
    """NVIDIA's quantiser, which calibrates by ONNX Runtime on the CPU."""
    from modelopt.onnx.quantization import quantize  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantised-") as scratch, quiet():
        source, made = Path(scratch) / path.name, Path(scratch) / f"quantised-{path.name}"
        if dtype == "bf16":
            # The quantiser narrows the graph again, after it has seen what the products are given.
            widen(path, source)
        else:
            shutil.copyfile(path, source)
        quantize(
            str(source),
            quantize_mode=kind,
            calibration_data_reader=_reader(feeds),
            calibration_method="max",
            calibration_eps=["cpu"],
            op_types_to_quantize=["MatMul"],
            high_precision_dtype=dtype,
            direct_io_types=True,
            output_path=str(made),
            log_level="ERROR",
        )
        made.replace(path)


def _reader(feeds: Iterator[dict[str, np.ndarray]]) -> Any:
    """The feeds as ONNX Runtime's calibration takes them, which may ask for them more than once."""
    from onnxruntime.quantization import CalibrationDataReader

    kept = list(feeds)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rewind()

        def rewind(self) -> None:
            self._left = iter(kept)

        def get_next(self) -> Any:
            return next(self._left, None)

        def get_first(self) -> Any:
            return kept[0]

    return Reader()


def quantize_int8(folder: str | Path, out: str | Path) -> Manifest:
    """Write an int8 copy of an fp32 export into a folder of its own, and measure what it costs.

    Args:
        folder: an fp32 export to ONNX with its reference.
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
    source.require_files(Path(folder))
    arithmetic = source.options.get("arithmetic") or source.dtype
    if source.kind != "onnx" or arithmetic != "fp32":
        raise ExportError(
            f"{folder} holds an export to {source.kind} in {arithmetic}; int8 is made of fp32 ONNX files: xfm-fast "
            "export onnx --dtype fp32"
        )
    reference = Reference.load(folder)
    prepare_folder(out, sum(record.bytes for record in source.files))
    result = source.model_copy(
        update={
            "versions": source.versions | package_versions("onnxruntime"),
            "options": source.options | {"arithmetic": "int8", "quantisation": "dynamic, int8 weights by channel"},
            "status": "unverified",
            "reason": "it was not compared with the model",
            "verification": None,
        }
    )

    def compare(content: Manifest) -> None:
        keep_reference(content, out, reference)
        compare_with_reference(content, out, reference)

    return fill_folder(result, out, source.graphs, lambda record: _quantized(record, folder, out), compare)


def _quantized(record: GraphRecord, folder: Path, out: Path) -> list[str]:
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        raise UnavailableError(
            "int8 needs onnxruntime, which is not installed; pip install 'xfm-fast[export]'"
        ) from None
    external = any(name != record.file for name in record.files)
    try:
        with quiet():
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
    return [record.file, *([f"{record.file}.data"] if external else [])]
