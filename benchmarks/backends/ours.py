"""xfm-fast: the model in memory, and exported."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from xfm_fast.export.expected import generated_examples
from xfm_fast.export.manifest import Manifest
from xfm_fast.export.onnx import export_for
from xfm_fast.export.quantise import quantize_int8
from xfm_fast.export.request import DType, GraphName
from xfm_fast.export.runtimes import find_runtime
from xfm_fast.export.session import Session
from xfm_fast.kernels.backend import Backend, use_backend
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.retrieval import ImageIndex, Retriever
from xfm_fast.tasks.vqa_model import AnswerRanking

from . import AnswerList, Engine, Pairs, ScoreMatrices, SearchIndex, SearchResult

GRAPHS: dict[str, tuple[GraphName, ...]] = {
    "embed-image": ("vision",),
    "embed-text": ("text",),
    "rerank": ("image_memory", "fusion"),
    "retrieve": ("text", "image_memory", "fusion"),
}
"""The graphs of a kind of work."""


def served(model: XFM) -> XFM:
    """Return the model as it is served: on a CPU a frozen copy, since other backends read the same weights."""
    freezable = model.dtype in (torch.float32, torch.bfloat16) and not model.quantised
    return copy.deepcopy(model).freeze() if model.device.type == "cpu" and freezable else model


def our_engine(model: Any, backend: Backend = "auto") -> Engine:
    """Return the engine of an `XFM`, with or without a task; `backend` is that of all its operations."""
    on_backend = use_backend(backend)

    def evaluate(
        batches: Sequence[Tensor], input_ids: Tensor, attention_mask: Tensor, k: int
    ) -> ScoreMatrices:
        retriever = Retriever(model)
        images = retriever.embed_images(batches)
        texts = retriever.embed_texts([(input_ids, attention_mask)])
        result = retriever.rerank(images, texts, k)
        return ScoreMatrices(result.score_i2t, result.score_t2i)

    def captions(pixels: Tensor, prompt: Tensor, longest: int, shortest: int, beams: int) -> Tensor:
        return model.generate(
            pixels, prompt, max_length=longest, min_length=shortest, num_beams=beams
        )

    def answers(
        pixels: Tensor, ids: Tensor, mask: Tensor, image_of: Tensor, answers: AnswerList
    ) -> AnswerRanking:
        memory = model.encode_questions(pixels, ids, mask, image_of)
        k = answers.trie.answers if answers.rank_all else answers.k
        # The official score counts the first token twice.
        return model.rank_answers(
            memory, answers.trie, k=k, best=answers.best, count_first_token_twice=True
        )

    return Engine(
        embed_images=on_backend(model.encode_image),
        embed_texts=on_backend(model.encode_text),
        rerank=on_backend(partial(rerank, model)),
        search=on_backend(lambda *inputs: search(Retriever(model), *inputs)),
        evaluate=on_backend(evaluate),
        # A model has the methods of its task alone.
        statements=on_backend(lambda *inputs: model.logits(*inputs)),
        boxes=on_backend(lambda *inputs: model.boxes(*inputs)),
        captions=on_backend(captions),
        answers=on_backend(answers),
    )


def export_engine(
    model: XFM,
    library: str,
    dtype: DType,
    work: str,
    scratch: Path,
    device: torch.device,
    *,
    packed: bool = False,
    int8: bool = False,
) -> Engine:
    """Export the graphs of a kind of work from a model in fp32 into a new folder, build them, and load them.

    A runtime that offers bf16 as a precision computes in it from an fp32 export. `packed` puts texts in rows, `int8`
    computes GEMMs in 8 bits. Raises `XFMError` if the library is missing here, or refuses.
    """
    runtime = find_runtime(library)
    precision = "bf16" if runtime.precisions and dtype == "bf16" else None
    suffixes = [name for name, used in (("int8", int8), ("packed", packed)) if used]
    folder = scratch / "-".join([library, dtype, *suffixes, work])
    request: dict[str, Any] = {
        "dtype": "fp32" if precision else dtype,
        "graphs": GRAPHS[work],
        "packed": packed,
    }
    start = time.perf_counter()
    if int8:
        with TemporaryDirectory(dir=scratch) as floats:
            examples = generated_examples(model.config)
            export_for(runtime, model, floats, examples=examples, **request)
            quantize_int8(floats, folder)
    else:
        # The export converts copies of tensors, and leaves the model as it is.
        export_for(runtime, model, folder, **request)
    built = time.perf_counter()
    # The benchmark compares results itself, also those that the export was not verified on (8 bits).
    session = Session(folder, library, device, precision=precision, verify_files=False)
    session.warm_up()
    files = Manifest.load(folder, check_files=False).files
    engine = Engine(
        embed_images=session.encode_image,
        embed_texts=session.encode_text,
        rerank=partial(rerank, session),
        cost={
            "build_s": built - start,
            "load_s": time.perf_counter() - built,
            "artifact_bytes": sum(record.bytes for record in files),
        },
    )
    if work == "retrieve":
        engine.search = partial(search, Retriever(session))
    return engine


def rerank(model: Any, pairs: Pairs) -> Tensor:
    """Return match scores `[P]` by a model or a session."""
    memory = model.image_memory(pairs.images)
    fused = model.fuse(pairs.embeds, pairs.mask, memory, pairs.image_of, first_token_only=True)
    return model.match_logits(fused)[:, 1]


def search(
    retriever: Retriever, input_ids: Tensor, attention_mask: Tensor, index: SearchIndex, k: int
) -> SearchResult:
    """Search by `Retriever.search_images` for texts that come as ids."""
    texts = retriever.embed_texts([(input_ids, attention_mask)])
    images = ImageIndex(index.embeds, index.features)
    return SearchResult(*retriever.search_images(texts, images, k))
