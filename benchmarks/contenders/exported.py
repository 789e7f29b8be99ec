"""Exported graphs as contenders: ONNX Runtime, OpenVINO and TensorRT, through the sessions that a server would use."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from xfm_fast.export.consumers import Consumer, DType
from xfm_fast.export.engines import export_engines
from xfm_fast.export.graphs import GraphName
from xfm_fast.export.onnx import export_onnx
from xfm_fast.export.session import Session
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


def build(model: XFM, consumer: Consumer, dtype: DType, scenario: str, scratch: Path, device: torch.device) -> Built:
    """Export the graphs of a scenario, build them where the consumer builds, and load them.

    OpenVINO computes in bf16 from an fp32 export.

    Args:
        model: in fp32 or the type of the export.
        scratch: folder for the files, which stay until it is removed.

    Raises:
        XFMError: the consumer is missing here, or refuses.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch, prefix=f"{consumer}-{dtype}-"))
    begun = time.perf_counter()
    # The export converts what it needs, and leaves the model as it is.
    graphs = GRAPHS[scenario]
    if consumer == "tensorrt" or consumer == "tensorrt-rtx":
        manifest = export_engines(model, folder, consumer, dtype=dtype, graphs=graphs)
    else:
        spelt: DType = "fp32" if consumer == "openvino" else dtype
        manifest = export_onnx(model, folder, consumer=consumer, dtype=spelt, graphs=graphs)
    build_s = time.perf_counter() - begun
    begun = time.perf_counter()
    precision = "bf16" if consumer == "openvino" and dtype == "bf16" else None
    # This run has written the files, and compares results itself.
    session = Session.load(folder, consumer, device, precision=precision, verify_files=False)
    load_s = time.perf_counter() - begun
    return Built(SessionEngine(session), build_s, load_s, sum(record.bytes for record in manifest.files))
