"""Image-text retrieval: embed, rank by feature similarity, re-rank with the fusion encoder.

The official evaluation re-projects image keys and values for every caption, pads captions, and scores both directions
separately. Here the union of both directions' pairs is scored once in image-major order: one memory per image, packed
captions. Scores are identical.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from xfm_fast.batches import PairBatch
from xfm_fast.checkpoint.files import model_folder
from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import AnnotationRows, RetrievalRecord, RetrievalTestRecord
from xfm_fast.data.collection import retrieval_rows, retrieval_test_rows
from xfm_fast.data.masking import EncodedText
from xfm_fast.errors import DataError, InputError, explain_types
from xfm_fast.io import make_folder
from xfm_fast.memory import create_mapped, open_mapped
from xfm_fast.models import inputs
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.packing import Packing, Sequences
from xfm_fast.tasks.evaluation import Evaluation, Metrics, Row, checksum, delete, fingerprint
from xfm_fast.tasks.reranking import (
    RANKS,
    Candidates,
    ImageIndex,
    ModelScorer,
    PairScorer,
    Progress,
    Rank,
    Receipt,
    RerankResult,
    TextIndex,
    best_rank,
    candidate_recall,
    pair_similarity,
    rank_score,
    score_candidates,
    top_candidates,
)
from xfm_fast.tasks.task import (
    Item,
    Task,
    TaskModel,
    TaskOptions,
    register,
    require_inputs,
    task_of,
)


class RetrievalModel(Protocol):
    """Model interface of retrieval for models other than `XFM`, e.g. export sessions."""

    @property
    def config(self) -> XFMConfig: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def encode_image(self, pixels: Tensor) -> Tensor: ...
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor: ...
    def project_image(self, image_embeds: Tensor) -> Tensor: ...
    def project_text(self, text_embeds: Tensor) -> Tensor: ...
    def pair_scorer(self) -> PairScorer: ...


class Retriever:
    """Embeds collections and searches them.

    Args:
        model: an `XFM` with the contrastive and matching heads, switched to evaluation mode, or an exported one
            (`xfm_fast.export.session.Session`).
        token_budget: caption tokens per pass of the fusion encoder; chosen for the device by default.
    """

    @explain_types
    def __init__(self, model: XFM | RetrievalModel, *, token_budget: int | None = None) -> None:
        if token_budget is not None and (not isinstance(token_budget, int) or token_budget < 1):
            raise InputError(
                f"token_budget={token_budget}; a pass takes at least 1 token: raise it, or leave it out"
            )
        self.model = model
        if isinstance(model, XFM):
            model.eval()
        self.scorer: PairScorer = (
            ModelScorer(model) if isinstance(model, XFM) else model.pair_scorer()
        )
        self.token_budget = token_budget

    @torch.inference_mode()
    @explain_types
    def embed_images(
        self, batches: Iterable[Tensor], *, path: str | Path | None = None, count: int | None = None
    ) -> ImageIndex:
        """Embed batches of pixels `[B, 3, R, R]`.

        Args:
            batches: in the order of the collection.
            path: output file for embeddings that exceed memory.
            count: number of images, required with `path`.
        """
        config, stored = self.model.config, None
        if path is not None:
            if count is None:
                raise InputError(
                    "count=None: the number of images is needed to lay out the file at path; pass count"
                )
            stored = create_mapped(
                path, (count, config.num_image_tokens, config.vision_width), self.model.dtype
            )
        embeds: list[Tensor] = []
        features: list[Tensor] = []
        done = 0
        for pixels in batches:
            embedded = self.model.encode_image(pixels.to(self.model.device))
            features.append(self.model.project_image(embedded))
            if stored is None:
                embeds.append(embedded)
            else:
                if done + len(embedded) > len(stored):
                    raise InputError(
                        f"more than count={count} images were given; pass their true number"
                    )
                stored[done : done + len(embedded)] = embedded.cpu()
            done += len(embedded)
        if not features:
            raise InputError("no images were given")
        if stored is not None and done != len(stored):
            raise InputError(f"{done} images were given but count={count}; pass their true number")
        return ImageIndex(torch.cat(embeds) if stored is None else stored, torch.cat(features))

    @torch.inference_mode()
    @explain_types
    def embed_texts(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> TextIndex:
        """Embed batches of (input_ids, attention_mask), both `[B, L]`."""
        tokens: list[Tensor] = []
        lengths: list[Tensor] = []
        features: list[Tensor] = []
        for input_ids, attention_mask in batches:
            if attention_mask is None:
                attention_mask = input_ids.ne(self.model.config.pad_token_id)
            input_ids, attention_mask = (
                input_ids.to(self.model.device),
                attention_mask.to(self.model.device),
            )
            embedded = self.model.encode_text(input_ids, attention_mask)
            packing = Packing.from_mask(attention_mask)
            tokens.append(packing.pack(embedded))
            lengths.append(packing.cu_seqlens.diff().long())
            features.append(self.model.project_text(embedded))
        if not features:
            raise InputError("no texts were given")
        return TextIndex(torch.cat(tokens), torch.cat(lengths), torch.cat(features))

    def rerank(
        self,
        images: ImageIndex,
        texts: TextIndex,
        k: int = 256,
        *,
        resume: str | Path | None = None,
        progress: Progress | None = None,
    ) -> RerankResult:
        """Score the k best candidates of every image and of every text; see the function `rerank`."""
        candidates = top_candidates(images.features, texts.features, _positive(k), k)
        return score_candidates(
            self.scorer, images, texts, candidates, self.token_budget, resume, progress
        )

    def search_images(
        self, texts: TextIndex, images: ImageIndex, k: int = 16
    ) -> tuple[Tensor, Tensor]:
        """The k best images of every text, best first: indices and match scores, `[T, k]` each."""
        candidates = top_candidates(images.features, texts.features, 0, _positive(k))
        result = score_candidates(
            self.scorer, images, texts, candidates, self.token_budget, None, None
        )
        return _best(result.score_t2i, k)

    def search_texts(
        self, images: ImageIndex, texts: TextIndex, k: int = 16
    ) -> tuple[Tensor, Tensor]:
        """The k best texts of every image, best first: indices and match scores, `[I, k]` each."""
        candidates = top_candidates(images.features, texts.features, _positive(k), 0)
        result = score_candidates(
            self.scorer, images, texts, candidates, self.token_budget, None, None
        )
        return _best(result.score_i2t, k)


@explain_types
def rerank(
    image_embeds: Tensor,
    text_embeds: Tensor,
    attention_mask: Tensor,
    *,
    model: XFM,
    k: int = 256,
    image_features: Tensor | None = None,
    text_features: Tensor | None = None,
    token_budget: int | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> RerankResult:
    """Re-rank the union of both directions' top-k pairs, each pair once, image by image.

    `image_embeds` `[I, 1 + N, vision_width]` may be memory-mapped; `text_embeds` is `[T, L, text_width]`; `k` is the
    official `k_test`. `resume` is a folder with the scores of finished images, from which an identical call continues.
    `progress` receives (pairs done, total).
    """
    model.eval()
    with torch.inference_mode():
        if image_features is None:
            # Token 0 is all that features need of embeddings that may lie in a file.
            tokens = (part[:, :1].to(model.device) for part in image_embeds.split(64))
            image_features = torch.cat([model.project_image(part) for part in tokens])
        if text_features is None:
            text_features = model.project_text(text_embeds)
        mask = inputs.check_attention_mask(attention_mask, [*text_embeds.shape[:2]])
        packing = Packing.from_mask(mask)
        texts = TextIndex(
            packing.pack(text_embeds), packing.cu_seqlens.diff().long(), text_features
        )
    retriever = Retriever(model, token_budget=token_budget)
    return retriever.rerank(
        ImageIndex(image_embeds, image_features), texts, k, resume=resume, progress=progress
    )


def _positive(k: int) -> int:
    if k < 1:
        raise InputError(f"k={k}; at least one candidate per query is needed")
    return k


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = scores.topk(min(k, scores.shape[1]), dim=1)
    return indices, values


T = TypeVar("T")

RECEIPT_FILE, SCORES_FILE = "receipt.json", "scores.safetensors"
_RECALLS = (
    *(f"{side}_{x}" for side in ("txt", "img") for x in ("r1", "r5", "r10", "r_mean")),
    "r_mean",
)


class PairOptions(TaskOptions):
    """Training on pairs of an image and a text."""

    augment: bool = Field(
        default=True, description="random crop, flip and RandAugment; false only resizes"
    )
    max_words: int = Field(default=30, gt=0, description="of a text")
    max_tokens: int = Field(default=40, ge=3, description="including `<s>` and `</s>`")
    official_itm_negatives: bool = Field(
        default=False, description="draw hard negatives within one rank"
    )
    official_itc_gradient: bool = Field(
        default=False, description="scale the contrastive gradient by 1 / world size"
    )


PairOptionsT = TypeVar("PairOptionsT", bound=PairOptions)


class PairTask(Task[PairOptionsT, Any, Item, PairBatch]):
    """Training with ITC and ITM losses on images and captions."""

    losses = ("itc", "itm")

    def prepare(self) -> None:
        self.check_length(self.options.max_tokens)

    def build(self) -> TaskModel:
        return TaskModel(self.config, heads=("contrastive", "matching"))

    def ids(self, text: str) -> list[int]:
        """Truncated ids of a text, in training too (the official code does not truncate there)."""
        return self.caption_ids(text, self.options.max_words, self.options.max_tokens)

    def item(self, record: Any, rng: np.random.Generator) -> Item:
        ids = self.ids(record.caption)
        # A digest is the same on every rank.
        digest = hashlib.blake2b(json.dumps(record.image_id).encode(), digest_size=8).digest()
        return Item(
            self.augmented(record.image, rng), ids, int.from_bytes(digest, "big", signed=True)
        )

    def collate(self, items: list[Item], rng: np.random.Generator) -> PairBatch:
        from xfm_fast.data.items import collate_pairs

        texts = [EncodedText([*item.ids], [*item.ids], [], []) for item in items]
        # Ranks exchange texts, which then must be equally wide. Padding is left out of all computations.
        return collate_pairs(
            [item.image for item in items], texts, pad_token_id=self.tokenizer.pad_token_id,
            image_ids=[item.target for item in items], width=self.options.max_tokens,
        )  # fmt: skip

    def losses_of(self, model: XFM, batch: PairBatch) -> dict[str, Tensor]:
        # Unlike pretraining, the official fine-tuning lets the matching loss through to the language encoder.
        return pretraining_losses(
            model, batch, losses=self.losses, stop_gradient=False,
            official_itm_negatives=self.options.official_itm_negatives,
            official_itc_gradient=self.options.official_itc_gradient,
        )  # fmt: skip


class RetrievalOptions(PairOptions):
    """Retrieval."""

    kind: Literal["retrieval"] = "retrieval"
    free = ("k", "columns", "rank")
    k: int = Field(
        default=256,
        gt=0,
        description="candidate texts per image and images per text for re-ranking",
    )
    rank: Rank | Literal["auto"] = Field(
        default="match",
        description="ranking score: match (logit, official), similarity (of features), sum (match + similarity, "
        "as in BLIP), or auto (the best on the split of `choose`)",
    )
    columns: dict[Literal["image", "caption"], str] = Field(
        default={}, description="renamed table columns"
    )

    @property
    def resolved_rank(self) -> Rank:
        """`rank`, or `sum` if `auto` was not resolved by validation."""
        return "sum" if self.rank == "auto" else self.rank


@register
class RetrievalTask(PairTask[RetrievalOptions]):
    """Fine-tuning with ITC and ITM losses, evaluation by re-ranking (see `xfm_fast.tasks.retrieval`).

    Evaluation reports recall by the rule `rank`, and for every rule of `xfm_fast.tasks.reranking.rank_score` as
    `RULE/METRIC`: `similarity/r_mean` is the first stage.
    """

    Options = RetrievalOptions
    metrics = tuple(
        f"{stage}{name}" for stage in ("", *(f"{rank}/" for rank in RANKS)) for name in _RECALLS
    )
    check_rows = staticmethod(partial(retrieval_rows, split="all"))
    test_record = RetrievalTestRecord

    def rows(self, paths: Sequence[Path]) -> list[AnnotationRows[RetrievalRecord]]:
        return retrieval_rows(paths, split="train", columns=self._columns)

    def test_rows(
        self, paths: Sequence[Path], split: str
    ) -> list[AnnotationRows[RetrievalTestRecord]]:
        return retrieval_test_rows(paths, split=split, columns=self._columns)

    @property
    def _columns(self) -> dict[str, str]:
        return {str(field): column for field, column in self.options.columns.items()}

    def predict(self, model: XFM, records: Sequence[RetrievalTestRecord]) -> list[Row]:
        """Per image and text: match probability, feature cosine and the score by `rank`."""
        pairs = [(number, text) for number, record in enumerate(records) for text in record.caption]
        place = {
            text: number for number, text in enumerate(dict.fromkeys(text for _, text in pairs))
        }
        ids, mask = self.padded([self.ids(text) for text in place], model.device)
        images, texts = (
            model.encode_image(self.pixels_of([r.image for r in records], model)),
            model.encode_text(ids, mask),
        )
        of_image, of_text = torch.tensor(
            [(n, place[text]) for n, text in pairs], device=model.device
        ).unbind(1)
        cosine = (
            (model.project_image(images)[of_image] * model.project_text(texts)[of_text])
            .double()
            .sum(-1)
        )
        memory = model.image_memory(images)
        fused = model.fuse(texts[of_text], mask[of_text], memory, of_image, first_token_only=True)
        logits = model.match_logits(fused).double()
        score = rank_score(self.options.resolved_rank, logits[:, 1], cosine)
        rows: list[Row] = [{"image": record.image, "texts": []} for record in records]
        columns = (column.tolist() for column in (logits.softmax(-1)[:, 1], cosine, score))
        for (number, text), probability, similarity, value in zip(pairs, *columns, strict=True):
            row = {"text": text, "probability": probability, "cosine": similarity, "score": value}
            rows[number]["texts"].append(row)
        return rows

    def settled(self, metrics: Metrics) -> RetrievalOptions:
        rank = self.options.rank
        return self.options.model_copy(
            update={"rank": best_rank(metrics) if rank == "auto" else rank}
        )

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[RetrievalTestRecord]:
        require_inputs(
            images, texts, "an image and a text, or several of each", ok=bool(images and texts)
        )
        for text in texts:
            try:
                self.ids(text)
            except DataError as error:
                raise InputError(str(error)) from None
        return [RetrievalTestRecord(image=str(image), caption=tuple(texts)) for image in images]

    def evaluate(
        self, model: XFM, records: Sequence[RetrievalTestRecord], work: Evaluation
    ) -> tuple[Metrics, dict[str, bytes]]:
        """Re-rank a split with its images distributed in blocks.

        One process embeds and scores a block, and stores its embeddings in a file. Blocks are independent of the number
        of processes, so scores are bit-identical. Texts are embedded once and shared by all processes.
        """
        processes, size, config, k = work.processes, work.batch_size, model.config, self.options.k
        retriever = Retriever(model)
        blocks = [
            (start, min(start + size, len(records))) for start in range(0, len(records), size)
        ]
        files = [work.folder / f"images-{block:05d}.bin" for block in range(len(blocks))]
        own = range(processes.rank, len(blocks), processes.world_size)
        ids = [self.ids(caption) for record in records for caption in record.caption]

        def make_room() -> None:
            make_folder(work.folder)
            for left in work.folder.glob("images-*.bin"):
                delete(left)

        def in_order(compute: Callable[[], dict[int, T]]) -> list[T]:
            """Values that all processes compute, ordered by their keys."""
            parts = processes.gather(processes.together(compute))
            found = {number: value for part in parts for number, value in part.items()}
            return [found[number] for number in sorted(found)]

        def embed_images() -> dict[int, Tensor]:
            features: dict[int, Tensor] = {}
            for block in own:
                start, stop = blocks[block]
                pixels = self.pixels_of([record.image for record in records[start:stop]], model)
                # A mapping for each block: what of one file was touched would all count as memory of the process.
                index = retriever.embed_images([pixels], path=files[block], count=stop - start)
                features[block] = index.features.cpu()
            return features

        @torch.inference_mode()
        def embed_texts() -> dict[int, tuple[Tensor, ...]]:
            made: dict[int, tuple[Tensor, ...]] = {}
            for start in range(processes.rank * size, len(ids), processes.world_size * size):
                index = retriever.embed_texts([self.padded(ids[start : start + size])])
                tokens = retriever.scorer.prepare(
                    index.tokens, Sequences.from_lengths(index.lengths)
                )
                made[start] = tuple(part.cpu() for part in (tokens, index.lengths, index.features))
            return made

        def scores_of(block: int) -> list[float]:
            start, stop = blocks[block]
            embeds = open_mapped(
                files[block],
                (stop - start, config.num_image_tokens, config.vision_width),
                model.dtype,
            )
            images, pairs = (
                ImageIndex(embeds, features[start:stop]),
                candidates.of_images(start, stop),
            )
            result = score_candidates(
                retriever.scorer, images, texts, pairs, None, None, None, prepared=True
            )
            delete(files[block])
            return result.scores.tolist()

        identity = fingerprint(self, model, records, size)
        processes.from_first(make_room)
        try:
            texts = TextIndex(
                *(
                    torch.cat(each).to(model.device)
                    for each in zip(*in_order(embed_texts), strict=True)
                )
            )
            features = torch.cat(in_order(embed_images))
            candidates = processes.from_first(
                lambda: top_candidates(features, texts.features.cpu(), k, k)
            )
            # Features that another machine computed may differ in the last bit, and then other pairs may be meant.
            identity += f" {checksum(candidates.texts):08x} {checksum(candidates.cu_pairs):08x}"
            found = work.compute(identity, [stop - start for start, stop in blocks], scores_of)
        finally:
            for block in own:
                with suppress(OSError):
                    files[block].unlink(missing_ok=True)
        if not processes.first:
            return {}, {}
        similarity = pair_similarity(candidates, features, texts.features.cpu())
        scores = [score for _, of_block in sorted(found.items()) for score in of_block]
        match = torch.tensor(scores, dtype=torch.promote_types(model.dtype, torch.float32))
        receipt = Receipt.of(config, candidates, texts.lengths.cpu(), config.num_image_tokens)
        # How much of it an evaluation found that had been killed is no part of the result.
        costs = {
            name: value for name, value in receipt._asdict().items() if name != "pairs_resumed"
        }
        costs |= {"pairs_saved": receipt.pairs_saved, "flops_ratio": receipt.flops_ratio}
        pairs = {"image": candidates.images.int(), "text": candidates.texts.int(), "score": match}
        pairs |= {
            "similarity": similarity,
            "for_image": candidates.for_image,
            "for_text": candidates.for_text,
        }
        return self._recalls(candidates, match, similarity, records), {
            RECEIPT_FILE: (json.dumps(costs, indent=1) + "\n").encode(),
            SCORES_FILE: save(pairs),
        }

    def _recalls(
        self,
        candidates: Candidates,
        match: Tensor,
        similarity: Tensor,
        records: Sequence[RetrievalTestRecord],
    ) -> Metrics:
        """Metrics of the selected rule, then of every rule; warns if the first stage ranks better."""
        captions = torch.tensor([len(record.caption) for record in records])
        image_of_text = torch.arange(len(captions)).repeat_interleave(captions)
        metrics: Metrics = {}
        for rank in RANKS:
            of_rank = candidate_recall(
                candidates, rank_score(rank, match, similarity), image_of_text
            )
            metrics |= {f"{rank}/{name}": value for name, value in of_rank.items()}
        best = best_rank(metrics)
        rank = best if self.options.rank == "auto" else self.options.rank
        ours, features = metrics[f"{rank}/r_mean"], metrics["similarity/r_mean"]
        if ours < features:
            print(
                f"re-ranking lowers recall: r_mean {ours:.1f} by task.rank={rank}, {features:.1f} by features alone; "
                f"set task.rank={best} (r_mean {metrics[f'{best}/r_mean']:.1f}), or train the matching head longer",
                file=sys.stderr,
            )
        return {name: metrics[f"{rank}/{name}"] for name in _RECALLS} | metrics


def rank_of(path: Path) -> Rank:
    """Ranking rule of a run, weight folder or export; `match` if not recorded."""
    options = task_of(model_folder(path) or path)
    return options.resolved_rank if isinstance(options, RetrievalOptions) else "match"
