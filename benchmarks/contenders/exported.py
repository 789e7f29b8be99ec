"""Exported graphs as backends, through the sessions that a server uses."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xfm_fast.errors import ExportError
from xfm_fast.export.expected import generated_examples
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.pipeline import build_graphs, weights_sha256
from xfm_fast.export.quantise import quantize_int8
from xfm_fast.export.request import DType, ExportRequest, GraphName
from xfm_fast.export.runtimes import Spelling, find_runtime
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


@dataclass(frozen=True)
class Form:
    """What is exported, and who runs it.

    Attributes:
        int8: products in 8 bits, the rest in the type.
        packed: texts in rows.
    """

    library: str
    int8: bool = False
    packed: bool = False


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


def build(model: XFM, form: Form, dtype: DType, scenario: str, scratch: Path, device: torch.device) -> Built:
    """Export the graphs of a scenario, build them where the library builds, and load them.

    A runtime that offers bf16 as a precision computes in it from an fp32 export.

    Args:
        model: in fp32.
        scratch: folder for the files, which stay until it is removed. Those of the same weights in the same form that
            lie there already are used again.

    Raises:
        XFMError: the library is missing here, or refuses.
    """
    offers = find_runtime(form.library).precisions
    spelt: DType = "fp32" if offers else dtype
    begun = time.perf_counter()
    folder = _exported(model, form, spelt, GRAPHS[scenario], scratch)
    build_s = time.perf_counter() - begun
    begun = time.perf_counter()
    # This run has written the files, and compares results itself, those that 8 bits were not held to among them.
    manifest = Manifest.load(folder, check_files=False)
    precision = "bf16" if offers and dtype == "bf16" else None
    session = Session(folder, form.library, device, precision=precision, verify_files=False)
    session.warm_up()
    load_s = time.perf_counter() - begun
    return Built(SessionEngine(session), build_s, load_s, sum(record.bytes for record in manifest.files))


def _exported(model: XFM, form: Form, dtype: DType, graphs: tuple[GraphName, ...], scratch: Path) -> Path:
    """The folder of an export, made where it is not there yet."""
    marks = [form.library, dtype, *(["int8"] if form.int8 else []), *(["packed"] if form.packed else []), *graphs]
    folder = scratch / "-".join([*marks, str(model.config.image_size)])
    with contextlib.suppress(ExportError):
        known = Manifest.load(folder, check_files=False).weights_sha256
        built = build_graphs(model, Spelling("primitives", 20), ExportRequest(graphs=graphs))
        if known == weights_sha256(model, built.values()):
            return folder
    common: dict[str, Any] = {"dtype": dtype, "graphs": graphs}
    runtime = find_runtime(form.library)
    if form.int8:
        with tempfile.TemporaryDirectory(dir=scratch) as wide:
            examples = generated_examples(model.config)
            runtime.export(model, wide, packed=form.packed, examples=examples, **common)
            quantize_int8(wide, folder)
    else:
        # The export converts what it needs, and leaves the model as it is.
        runtime.export(model, folder, packed=form.packed, **common)
    return folder
