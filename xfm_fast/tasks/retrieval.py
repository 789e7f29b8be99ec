"""Image-text retrieval: embed, rank by feature similarity, re-rank with the fusion encoder.

The official evaluation re-projects image keys and values for every caption, pads captions, and
scores both directions separately. Here the union of both directions' pairs is scored once in
image-major order: one memory per image, packed captions. Scores are identical.
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

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from xfm_fast.batches import PairBatch
from xfm_fast.checkpoint.files import model_folder
from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import AnnotationRows, RetrievalTestRecord
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
from xfm_fast.tasks.models import TaskModel
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
    AugmentedOptions,
    Item,
    Losses,
    Rng,
    Task,
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
            self.scorer: PairScorer = ModelScorer(model)
        else:
            self.scorer = model.pair_scorer()
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
            shape = (count, config.num_image_tokens, config.vision_width)
            stored = create_mapped(path, shape, self.model.dtype)
        embeds: list[Tensor] = []
        features: list[Tensor] = []
        done = 0
        for pixels in batches:
            embedded = self.model.encode_image(pixels.to(self.model.device))
            features.append(self.model.project_image(embedded))
            if stored is None:
                embeds.append(embedded)
            elif done + len(embedded) > len(stored):
                raise InputError(
                    f"more than count={count} images were given; pass their true number"
                )
            else:
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
            mask = attention_mask.to(self.model.device)
            embedded = self.model.encode_text(input_ids.to(self.model.device), mask)
            packing = Packing.from_mask(mask)
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
        """Find the k best images of every text, best first: indices and match scores `[T, k]`."""
        candidates = top_candidates(images.features, texts.features, 0, _positive(k))
        result = score_candidates(self.scorer, images, texts, candidates, self.token_budget)
        return _best(result.score_t2i, k)

    def search_texts(
        self, images: ImageIndex, texts: TextIndex, k: int = 16
    ) -> tuple[Tensor, Tensor]:
        """Find the k best texts of every image, best first: indices and match scores `[I, k]`."""
        candidates = top_candidates(images.features, texts.features, _positive(k), 0)
        result = score_candidates(self.scorer, images, texts, candidates, self.token_budget)
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

    `image_embeds` `[I, 1 + N, vision_width]` may be memory-mapped; `text_embeds` is `[T, L,
    text_width]`; `k` is the official `k_test`. `resume` is a folder with the scores of finished
    images, from which an identical call continues. `progress` receives (pairs done, total).
    """
    model.eval()
    with torch.inference_mode():
        if image_features is None:
            # Features need only token 0; the embeddings may lie in a file.
            first_tokens = (chunk[:, :1].to(model.device) for chunk in image_embeds.split(64))
            image_features = torch.cat([model.project_image(token) for token in first_tokens])
        if text_features is None:
            text_features = model.project_text(text_embeds)
        mask = inputs.check_attention_mask(attention_mask, [*text_embeds.shape[:2]])
        packing = Packing.from_mask(mask)
        lengths = packing.cu_seqlens.diff().long()
        texts = TextIndex(packing.pack(text_embeds), lengths, text_features)
    images = ImageIndex(image_embeds, image_features)
    retriever = Retriever(model, token_budget=token_budget)
    return retriever.rerank(images, texts, k, resume=resume, progress=progress)


def _positive(k: int) -> int:
    if k < 1:
        raise InputError(f"k={k}; at least one candidate per query is needed")
    return k


def _best(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = scores.topk(min(k, scores.shape[1]), dim=1)
    return indices, values


RECEIPT_FILE, SCORES_FILE = "receipt.json", "scores.safetensors"
_RECALLS = (
    *("txt_r1", "txt_r5", "txt_r10", "txt_r_mean"),
    *("img_r1", "img_r5", "img_r10", "img_r_mean"),
    "r_mean",
)


class PairOptions(AugmentedOptions):
    """Training on pairs of an image and a text."""

    max_words: int = Field(default=30, gt=0, description="of a text")
    max_tokens: int = Field(default=40, ge=3, description="including `<s>` and `</s>`")
    official_itm_negatives: bool = Field(
        default=False, description="draw hard negatives within one rank"
    )
    official_itc_gradient: bool = Field(
        default=False, description="scale the contrastive gradient by 1 / world size"
    )


PairOptionsT = TypeVar("PairOptionsT", bound=PairOptions)


class PairTask(Task[PairOptionsT]):
    """Training with ITC and ITM losses on images and captions."""

    losses = ("itc", "itm")

    def prepare(self) -> None:
        self.check_length(self.options.max_tokens)

    def build(self) -> TaskModel:
        return TaskModel(self.config, heads=("contrastive", "matching"))

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, truncated (the official code does not truncate in training)."""
        return self.caption_ids(text, self.options.max_words, self.options.max_tokens)

    def item(self, record: Any, rng: Rng) -> Item:
        ids = self.ids(record.caption)
        # A digest is the same on every rank.
        digest = hashlib.blake2b(json.dumps(record.image_id).encode(), digest_size=8).digest()
        identity = int.from_bytes(digest, "big", signed=True)
        return Item(self.augmented(record.image, rng), ids, identity)

    def collate(self, items: list[Item], rng: Rng) -> PairBatch:
        from xfm_fast.data.items import collate_pairs

        return collate_pairs(
            [item.image for item in items],
            [EncodedText([*item.ids], [*item.ids], [], []) for item in items],
            pad_token_id=self.tokenizer.pad_token_id,
            image_ids=[item.target for item in items],
            # Ranks exchange texts, which then must be equally wide. Padding takes no part in the
            # computation.
            width=self.options.max_tokens,
        )

    def losses_of(self, model: XFM, batch: PairBatch) -> Losses:
        return pretraining_losses(
            model,
            batch,
            losses=self.losses,
            # Unlike pretraining, the official fine-tuning lets the matching loss through to the
            # language encoder.
            stop_gradient=False,
            official_itm_negatives=self.options.official_itm_negatives,
            official_itc_gradient=self.options.official_itc_gradient,
        )


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
        """Ranking rule; `sum` if `auto` was not resolved by validation."""
        return "sum" if self.rank == "auto" else self.rank


@register
class RetrievalTask(PairTask[RetrievalOptions]):
    """Fine-tuning with ITC and ITM losses, evaluation by re-ranking (see
    `xfm_fast.tasks.retrieval`).

    Evaluation reports recall by the rule `rank`, and for every rule of
    `xfm_fast.tasks.reranking.rank_score` as `RULE/METRIC`: `similarity/r_mean` is the first stage.
    """

    Options = RetrievalOptions
    metrics = (*_RECALLS, *(f"{rank}/{recall}" for rank in RANKS for recall in _RECALLS))
    check_rows = staticmethod(partial(retrieval_rows, split="all"))
    test_record = RetrievalTestRecord

    def rows(
        self, paths: Sequence[Path], split: str | None = None
    ) -> Sequence[AnnotationRows[Any]]:
        columns = {str(field): column for field, column in self.options.columns.items()}
        if split is None:
            return retrieval_rows(paths, split="train", columns=columns)
        return retrieval_test_rows(paths, split=split, columns=columns)

    def predict(self, model: XFM, records: Sequence[RetrievalTestRecord]) -> list[Row]:
        """Predict per image and text: match probability, feature cosine and the score by `rank`."""
        pairs = [(image, text) for image, record in enumerate(records) for text in record.caption]
        texts = [*dict.fromkeys(text for _, text in pairs)]
        text_index = {text: index for index, text in enumerate(texts)}
        indices = torch.tensor([(image, text_index[text]) for image, text in pairs])
        image_of, text_of = indices.to(model.device).unbind(1)

        ids, mask = self.padded([self.ids(text) for text in texts], model.device)
        images = model.encode_image(self.pixels_of([record.image for record in records], model))
        embeds = model.encode_text(ids, mask)
        features = model.project_image(images)[image_of] * model.project_text(embeds)[text_of]
        cosine = features.double().sum(-1)
        memory = model.image_memory(images)
        fused = model.fuse(embeds[text_of], mask[text_of], memory, image_of, first_token_only=True)
        logits = model.match_logits(fused).double()
        score = rank_score(self.options.resolved_rank, logits[:, 1], cosine)

        rows: list[Row] = [{"image": record.image, "texts": []} for record in records]
        values = torch.stack([logits.softmax(-1)[:, 1], cosine, score], dim=1).tolist()
        for (image, text), (probability, similarity, value) in zip(pairs, values, strict=True):
            row = {"text": text, "probability": probability, "cosine": similarity, "score": value}
            rows[image]["texts"].append(row)
        return rows

    def settled(self, metrics: Metrics) -> RetrievalOptions:
        if self.options.rank != "auto":
            return self.options
        return self.options.model_copy(update={"rank": best_rank(metrics)})

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[RetrievalTestRecord]:
        valid = bool(images and texts)
        require_inputs(images, texts, "an image and a text, or several of each", ok=valid)
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

        One process embeds and scores a block, and stores its embeddings in a file. Blocks are
        independent of the number of processes, so scores are bit-identical. Texts are embedded once
        and shared by all processes.
        """
        processes, size, config = work.processes, work.batch_size, model.config
        retriever = Retriever(model)
        blocks = [
            (start, min(start + size, len(records))) for start in range(0, len(records), size)
        ]
        files = [work.folder / f"images-{block:05d}.bin" for block in range(len(blocks))]
        blocks_of_rank = range(processes.rank, len(blocks), processes.world_size)
        ids = [self.ids(caption) for record in records for caption in record.caption]

        def prepare_folder() -> None:
            make_folder(work.folder)
            for path in work.folder.glob("images-*.bin"):
                delete(path)

        def gather(compute: Callable[[], dict[int, Any]]) -> list[Any]:
            """Compute values on all processes; return them in the order of their keys."""
            results: dict[int, Any] = {}
            for result in processes.gather(processes.together(compute)):
                results |= result
            return [results[key] for key in sorted(results)]

        def embed_images() -> dict[int, Tensor]:
            features: dict[int, Tensor] = {}
            for block in blocks_of_rank:
                start, stop = blocks[block]
                pixels = self.pixels_of([record.image for record in records[start:stop]], model)
                # A mapping for each block: all touched pages of a file would count as memory of the
                # process.
                index = retriever.embed_images([pixels], path=files[block], count=stop - start)
                features[block] = index.features.cpu()
            return features

        @torch.inference_mode()
        def embed_texts() -> dict[int, tuple[Tensor, ...]]:
            texts: dict[int, tuple[Tensor, ...]] = {}
            for start in range(processes.rank * size, len(ids), processes.world_size * size):
                index = retriever.embed_texts([self.padded(ids[start : start + size])])
                sequences = Sequences.from_lengths(index.lengths)
                tokens = retriever.scorer.prepare(index.tokens, sequences)
                texts[start] = (tokens.cpu(), index.lengths.cpu(), index.features.cpu())
            return texts

        def score_block(block: int) -> list[float]:
            start, stop = blocks[block]
            shape = (stop - start, config.num_image_tokens, config.vision_width)
            embeds = open_mapped(files[block], shape, model.dtype)
            images = ImageIndex(embeds, features[start:stop])
            pairs = candidates.of_images(start, stop)
            result = score_candidates(retriever.scorer, images, texts, pairs, prepared=True)
            delete(files[block])
            return result.scores.tolist()

        def select() -> Candidates:
            k = self.options.k
            return top_candidates(features, texts.features.cpu(), k, k)

        identity = fingerprint(self, model, records, size)
        processes.from_first(prepare_folder)
        try:
            tokens, lengths, text_features = (
                torch.cat(tensors).to(model.device)
                for tensors in zip(*gather(embed_texts), strict=True)
            )
            texts = TextIndex(tokens, lengths, text_features)
            features = torch.cat(gather(embed_images))
            candidates = processes.from_first(select)
            # Features that another machine computed may differ in the last bit, and select other
            # pairs.
            identity += f" {checksum(candidates.texts):08x} {checksum(candidates.cu_pairs):08x}"
            results = work.compute(identity, [stop - start for start, stop in blocks], score_block)
        finally:
            for block in blocks_of_rank:
                with suppress(OSError):
                    files[block].unlink(missing_ok=True)
        if not processes.first:
            return {}, {}
        similarity = pair_similarity(candidates, features, texts.features.cpu())
        scores = [score for _, block_scores in sorted(results.items()) for score in block_scores]
        match = torch.tensor(scores, dtype=torch.promote_types(model.dtype, torch.float32))
        pairs = {
            "image": candidates.images.int(),
            "text": candidates.texts.int(),
            "score": match,
            "similarity": similarity,
            "for_image": candidates.for_image,
            "for_text": candidates.for_text,
        }
        receipt = Receipt.of(config, candidates, texts.lengths.cpu(), config.num_image_tokens)
        costs = receipt._asdict()
        # The result does not depend on how much of it a killed evaluation had computed.
        del costs["pairs_resumed"]
        costs |= {"pairs_saved": receipt.pairs_saved, "flops_ratio": receipt.flops_ratio}
        receipt_json = json.dumps(costs, indent=1) + "\n"
        metrics = self._recalls(candidates, match, similarity, records)
        return metrics, {RECEIPT_FILE: receipt_json.encode(), SCORES_FILE: save(pairs)}

    def _recalls(
        self,
        candidates: Candidates,
        match: Tensor,
        similarity: Tensor,
        records: Sequence[RetrievalTestRecord],
    ) -> Metrics:
        """Compute recall by the selected rule, then by every rule; warn if features rank better."""
        captions = torch.tensor([len(record.caption) for record in records])
        image_of_text = torch.arange(len(captions)).repeat_interleave(captions)
        metrics: Metrics = {}
        for rank in RANKS:
            scores = rank_score(rank, match, similarity)
            recalls = candidate_recall(candidates, scores, image_of_text)
            metrics |= {f"{rank}/{name}": value for name, value in recalls.items()}
        best = best_rank(metrics)
        rank = best if self.options.rank == "auto" else self.options.rank
        reranked, features = metrics[f"{rank}/r_mean"], metrics["similarity/r_mean"]
        if reranked < features:
            print(
                f"re-ranking lowers recall: r_mean {reranked:.1f} by task.rank={rank}, {features:.1f} by features "
                f"alone; set task.rank={best} (r_mean {metrics[f'{best}/r_mean']:.1f}), or train the matching head "
                "longer",
                file=sys.stderr,
            )
        return {name: metrics[f"{rank}/{name}"] for name in _RECALLS} | metrics


def rank_of(path: Path) -> Rank:
    """Return the ranking rule of a run, weight folder or export; `match` if not recorded."""
    options = task_of(model_folder(path) or path)
    return options.resolved_rank if isinstance(options, RetrievalOptions) else "match"
