"""Exported graphs as contenders, through the sessions that a server would use, and by their libraries alone.

A library alone is what a session may not be slower than: the same files with the same threads, called as its own manual
has it, whole batches padded to the longest text, and memory that is bound once for every shape.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from xfm_fast.errors import ExportError
from xfm_fast.export.aoti import export_packages
from xfm_fast.export.consumers import Consumer, DType, profile
from xfm_fast.export.engines import export_engines
from xfm_fast.export.expected import generated_examples
from xfm_fast.export.graphs import GraphName
from xfm_fast.export.manifest import GraphRecord, Manifest
from xfm_fast.export.onnx import export_onnx
from xfm_fast.export.pipeline import build_graphs, weights_sha256
from xfm_fast.export.quantise import quantize_int8
from xfm_fast.export.runtimes import empty_outputs
from xfm_fast.export.session import Session
from xfm_fast.export.slots import output_shapes, request_sizes
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.retrieval import Retriever

from .engine import Built, Clock, Found, Pairs, SearchIndex
from .ours import retrieve

# What a scenario's requests pass through.
GRAPHS: dict[str, tuple[GraphName, ...]] = {
    "embed-image": ("vision",),
    "embed-text": ("text",),
    "rerank": ("image_memory", "fusion"),
    "retrieve": ("text", "image_memory", "fusion"),
}

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Form:
    """What is exported, and who runs it.

    Attributes:
        int8: products in 8 bits, the rest in the type.
        packed: texts in rows.
        alone: by the library itself, without a session.
    """

    library: Consumer | Literal["aoti"]
    int8: bool = False
    packed: bool = False
    alone: bool = False


class SessionEngine:
    """A session over exported graphs."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._retriever = Retriever(session) if "fusion" in session.manifest.graph_names else None

    def embed_images(self, pixels: Tensor, clock: Clock) -> Tensor:
        return self._session.encode_image(pixels)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor, clock: Clock) -> Tensor:
        return self._session.encode_text(input_ids, attention_mask)

    def rerank(self, pairs: Pairs, clock: Clock) -> Tensor:
        session = self._session
        with clock("image memory"):
            memory = session.image_memory(pairs.images)
        with clock("fusion and matching head"):
            fused = session.fuse(pairs.embeds, pairs.mask, memory, pairs.image_of, first_token_only=True)
        return session.match_logits(fused)[:, 1]

    def search(self, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int, clock: Clock) -> Found:
        assert self._retriever is not None
        return retrieve(self._retriever, input_ids, attention_mask, index, k, clock)


class LibraryEngine:
    """The graphs of an export, each a function from inputs to outputs by name."""

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self._runs = runs

    def embed_images(self, pixels: Tensor, clock: Clock) -> Tensor:
        return self._runs["vision"]({"pixels": pixels})["image_embeds"]

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor, clock: Clock) -> Tensor:
        longest = int(attention_mask.sum(1).max())
        given = (value[:, :longest].contiguous() for value in (input_ids, attention_mask))
        embeds = self._runs["text"](dict(zip(("input_ids", "attention_mask"), given, strict=True)))["text_embeds"]
        return torch.nn.functional.pad(embeds, (0, 0, 0, input_ids.shape[1] - longest))

    def rerank(self, pairs: Pairs, clock: Clock) -> Tensor:
        images, longest = len(pairs.images), int(pairs.mask.sum(1).max())
        with clock("image memory"):
            memory = self._runs["image_memory"]({"image_embeds": pairs.images})
        with clock("fusion and matching head"):
            # Every image has as many texts.
            embeds, mask = (
                value[:, :longest].unflatten(0, (images, -1)).contiguous() for value in (pairs.embeds, pairs.mask)
            )
            logits = self._runs["fusion"]({"text_embeds": embeds, "attention_mask": mask, **memory})["match_logits"]
        return logits.flatten(0, 1)[:, 1]


def build(model: XFM, form: Form, dtype: DType, scenario: str, scratch: Path, device: torch.device) -> Built:
    """Export the graphs of a scenario, build them where the library builds, and load them.

    OpenVINO computes in bf16 from an fp32 export.

    Args:
        model: in fp32.
        scratch: folder for the files, which stay until it is removed. Those of the same weights in the same form that
            lie there already, of this run or of an earlier one, are used again.

    Raises:
        XFMError: the library is missing here, or refuses.
    """
    spelt: DType = "fp32" if form.library == "openvino" else dtype
    begun = time.perf_counter()
    folder = _exported(model, form, spelt, GRAPHS[scenario], scratch)
    build_s = time.perf_counter() - begun
    begun = time.perf_counter()
    # This run has written the files, and compares results itself, those that 8 bits were not held to among them.
    manifest = Manifest.load(folder, check_files=False)
    precision = "bf16" if form.library == "openvino" and dtype == "bf16" else None
    if form.alone:
        load = {"onnxruntime": _onnxruntime, "openvino": _openvino, "aoti": _aoti}[form.library]
        runs = {record.name: load(record, folder / record.file, dtype) for record in manifest.graphs}
        engine: Any = LibraryEngine(runs)
    else:
        session = Session(folder, form.library, device, precision=precision, verify_files=False)
        session.warm_up()
        engine = SessionEngine(session)
    load_s = time.perf_counter() - begun
    return Built(engine, build_s, load_s, sum(record.bytes for record in manifest.files))


def _exported(model: XFM, form: Form, dtype: DType, graphs: tuple[GraphName, ...], scratch: Path) -> Path:
    """The folder of an export, made where it is not there yet."""
    marks = [form.library, dtype, *(["int8"] if form.int8 else []), *(["packed"] if form.packed else []), *graphs]
    folder = scratch / "-".join([*marks, str(model.config.image_size)])
    with contextlib.suppress(ExportError):
        known = Manifest.load(folder, check_files=False).weights_sha256
        if known == weights_sha256(model, build_graphs(model, profile("onnxruntime", "fp32"), graphs).values()):
            return folder
    common: dict[str, Any] = {"dtype": dtype, "graphs": graphs}
    if form.library in ("tensorrt", "tensorrt-rtx"):
        export_engines(model, folder, form.library, **common)
    elif form.library == "aoti":
        export_packages(model, folder, **common)
    elif form.int8:
        with tempfile.TemporaryDirectory(dir=scratch) as wide:
            examples = generated_examples(model.config)
            export_onnx(model, wide, consumer=form.library, packed=form.packed, examples=examples, **common)
            quantize_int8(wide, folder)
    else:
        # The export converts what it needs, and leaves the model as it is.
        export_onnx(model, folder, consumer=form.library, packed=form.packed, **common)
    return folder


def _onnxruntime(record: GraphRecord, path: Path, dtype: DType) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kept: dict[tuple[tuple[str, int], ...], dict[str, Tensor]] = {}

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sizes = request_sizes(record, inputs)
        key = tuple(sizes.items())
        if key not in kept:
            kept[key] = empty_outputs(record, output_shapes(record, sizes), torch.device("cpu"))
        outputs = kept[key]
        binding = session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, value in tensors.items():
                element = np.int64 if value.dtype == torch.int64 else np.float32
                bind(name, "cpu", 0, element, [*value.shape], value.data_ptr())
        session.run_with_iobinding(binding)
        return outputs

    return run


def _openvino(record: GraphRecord, path: Path, dtype: DType) -> Run:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # NumPy has no bf16, and the graphs are fp32.
        given = {
            name: (value.float() if value.is_floating_point() else value).numpy() for name, value in inputs.items()
        }
        found = request.infer(given, share_inputs=True, share_outputs=True)
        return {tensor.name: torch.from_numpy(found[tensor.name]) for tensor in record.outputs}

    return run


def _aoti(record: GraphRecord, path: Path, dtype: DType) -> Run:
    from torch._inductor import aoti_load_package

    package = aoti_load_package(str(path))

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        results = package(*(inputs[tensor.name] for tensor in record.inputs))
        return {tensor.name: value for tensor, value in zip(record.outputs, results, strict=True)}

    return run
