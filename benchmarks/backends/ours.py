"""xfm-fast: the model in memory, and exported."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from xfm_fast.export.expected import generated_examples
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.quantise import quantize_int8
from xfm_fast.export.request import DType, GraphName
from xfm_fast.export.runtimes import find_runtime
from xfm_fast.export.session import Session
from xfm_fast.kernels.backend import Backend, use_backend
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.retrieval import ImageIndex, Retriever
from xfm_fast.tasks.vqa_model import AnswerRanking

from .engine import AnswerList, Engine, Everything, Found, Pairs, SearchIndex


def served(model: XFM) -> XFM:
    """The model as one serves it: frozen where there is a CPU, in a copy, for others read its weights as they were."""
    if (
        model.device.type != "cpu"
        or model.dtype not in (torch.float32, torch.bfloat16)
        or model.quantised
    ):
        return model
    return copy.deepcopy(model).freeze()


class OurEngine(Engine):
    """An `XFM`, with or without a task; `backend` is that of all its operations."""

    def __init__(self, model: XFM, backend: Backend = "auto") -> None:
        # Any: a model has the methods of its task.
        self.model: Any = model
        self.backend: Backend = backend

    def embed_images(self, pixels: Tensor) -> Tensor:
        with use_backend(self.backend):
            return self.model.encode_image(pixels)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with use_backend(self.backend):
            return self.model.encode_text(input_ids, attention_mask)

    def rerank(self, pairs: Pairs) -> Tensor:
        with use_backend(self.backend):
            return rerank(self.model, pairs)

    def search(
        self, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int
    ) -> Found:
        with use_backend(self.backend):
            return retrieve(Retriever(self.model), input_ids, attention_mask, index, k)

    def evaluate(
        self, batches: Sequence[Tensor], input_ids: Tensor, attention_mask: Tensor, k: int
    ) -> Everything:
        retriever = Retriever(self.model)
        with use_backend(self.backend):
            images, texts = (
                retriever.embed_images(batches),
                retriever.embed_texts([(input_ids, attention_mask)]),
            )
            result = retriever.rerank(images, texts, k)
        return Everything(result.score_i2t, result.score_t2i)

    def statements(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        with use_backend(self.backend):
            return self.model.logits(pixels, ids, mask)

    def boxes(self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor) -> Tensor:
        with use_backend(self.backend):
            return self.model.boxes(pixels, ids, mask, image_of)

    def captions(
        self, pixels: Tensor, prompt: Tensor, longest: int, shortest: int, beams: int
    ) -> Tensor:
        with use_backend(self.backend):
            return self.model.generate(
                pixels, prompt, max_length=longest, min_length=shortest, num_beams=beams
            )

    def answers(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, answers: AnswerList
    ) -> AnswerRanking:
        with use_backend(self.backend):
            memory = self.model.encode_questions(pixels, ids, mask, image_of)
            k = answers.trie.answers if answers.whole else answers.k
            # As the official score does it.
            return self.model.rank_answers(
                memory, answers.trie, k=k, best=answers.best, count_first_token_twice=True
            )


class SessionEngine(Engine):
    """A session over exported graphs, as a server uses it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._retriever = Retriever(session) if "fusion" in session.manifest.graph_names else None

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self._session.encode_image(pixels)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._session.encode_text(input_ids, attention_mask)

    def rerank(self, pairs: Pairs) -> Tensor:
        return rerank(self._session, pairs)

    def search(
        self, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int
    ) -> Found:
        assert self._retriever is not None
        return retrieve(self._retriever, input_ids, attention_mask, index, k)


GRAPHS: dict[str, tuple[GraphName, ...]] = {
    "embed-image": ("vision",),
    "embed-text": ("text",),
    "rerank": ("image_memory", "fusion"),
    "retrieve": ("text", "image_memory", "fusion"),
}
"""The graphs of a kind of work."""


def export_engine(
    model: XFM, library: str, dtype: DType, work: str, scratch: Path, device: torch.device, *, packed: bool = False,
    int8: bool = False,
) -> SessionEngine:  # fmt: skip
    """Export the graphs of a kind of work from a model in fp32 into a new folder, build them, and load them.

    A runtime that offers bf16 as a precision computes in it from an fp32 export. `packed` puts texts in rows, `int8`
    computes GEMMs in 8 bits. Raises `XFMError` if the library is missing here, or refuses.
    """
    runtime, graphs = find_runtime(library), GRAPHS[work]
    precision = "bf16" if runtime.precisions and dtype == "bf16" else None
    folder = scratch / "-".join([library, dtype, *["int8"] * int8, *["packed"] * packed, work])
    common: dict[str, Any] = {
        "dtype": "fp32" if precision else dtype,
        "graphs": graphs,
        "packed": packed,
    }
    begun = time.perf_counter()
    if int8:
        with TemporaryDirectory(dir=scratch) as wide:
            runtime.export(model, wide, examples=generated_examples(model.config), **common)
            quantize_int8(wide, folder)
    else:
        # The export converts what it needs, and leaves the model as it is.
        runtime.export(model, folder, **common)
    built = time.perf_counter()
    # This run has written the files, and compares results itself, those that 8 bits were not held to among them.
    session = Session(folder, library, device, precision=precision, verify_files=False)
    session.warm_up()
    engine, files = SessionEngine(session), Manifest.load(folder, check_files=False).files
    engine.cost = {
        "build_s": built - begun, "load_s": time.perf_counter() - built,
        "artifact_bytes": sum(record.bytes for record in files),
    }  # fmt: skip
    return engine


def rerank(model: Any, pairs: Pairs) -> Tensor:
    """Match scores `[P]` by a model or a session."""
    memory = model.image_memory(pairs.images)
    fused = model.fuse(pairs.embeds, pairs.mask, memory, pairs.image_of, first_token_only=True)
    return model.match_logits(fused)[:, 1]


def retrieve(
    retriever: Retriever, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int
) -> Found:
    """`Retriever.search_images` for texts that come as ids."""
    texts = retriever.embed_texts([(input_ids, attention_mask)])
    return Found(*retriever.search_images(texts, ImageIndex(index.embeds, index.features), k))
