"""The losses that texts and images share: contrast first, then everything that passes the fusion encoder, at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.batches import IGNORED, PairBatch, RegionBatch, TextLayout
from xfm_fast.models import inputs as model_inputs
from xfm_fast.models.fusion import ImageMemory, PackedMemory
from xfm_fast.models.xfm import XFM, Head
from xfm_fast.objectives.boxes import box_giou_loss, box_l1_loss
from xfm_fast.objectives.contrastive import AllPairs, contrastive_loss, contrastive_rows
from xfm_fast.objectives.fusion_pass import Pairs, fuse_pairs
from xfm_fast.objectives.gathering import ScaleGradient, World, check_equal
from xfm_fast.objectives.inputs import check_negatives
from xfm_fast.objectives.language import masked_token_loss
from xfm_fast.objectives.matching import matching_loss, sample_hard_negatives
from xfm_fast.objectives.negatives import TextTable, matching_pairs
from xfm_fast.packing import Reads

BOXES = ("bbox_l1", "bbox_giou")
_HEADS: dict[str, Head] = {
    "itc": "contrastive",
    "itm": "matching",
    "imlm": "imlm",
    "bbox_l1": "boxes",
    "bbox_giou": "boxes",
}


@dataclass(frozen=True)
class Options:
    """How losses are computed; see `pretraining_losses`."""

    hard_negatives: tuple[Tensor, Tensor] | None = None
    generator: torch.Generator | None = None
    official_itc_gradient: bool = False
    stop_gradient: bool = True


@dataclass(frozen=True)
class Texts:
    """The unmasked texts, encoded.

    Attributes:
        tokens: `[T, width]` packed, as the fusion encoder sees them.
        table: the same of all processes, for matching.
        matching: makes the pairs to match.
    """

    tokens: Tensor
    table: TextTable | None = None
    matching: Callable[[], Pairs] | None = None


class Step:
    """The multimodal losses of one batch: `contrast`, then `fuse`.

    Text b belongs to group b of the memory, its true image or region; the groups that boxes are predicted from (whole
    images) come behind.
    """

    def __init__(
        self, model: XFM, batch: PairBatch | RegionBatch, names: frozenset[str], world: World, options: Options
    ) -> None:
        assert batch.layout is not None
        self.model, self.batch, self.names, self.world, self.options = model, batch, names, world, options
        self.layout: TextLayout = batch.layout
        self.texts = batch.input_ids.shape[0]
        self.boxes = not names.isdisjoint(BOXES)
        self.fuses = self.boxes or not names.isdisjoint({"itm", "imlm"})
        self.draws = "itm" in names and options.hard_negatives is None
        for name, head in _HEADS.items():
            if name in names:
                model.require_head(head)
        if self.draws:
            model.require_head("contrastive")
        self.counts = self._counts()
        if hasattr(model, "temp"):
            with torch.no_grad():
                model.temp.clamp_(model.config.min_temperature, model.config.max_temperature)

    def _counts(self) -> dict[str, Tensor]:
        """Of every process; those that decide the sizes of messages are equal."""
        batch, device = self.batch, self.batch.input_ids.device
        sizes = {
            "texts": self.texts,
            "tokens per padded text": batch.input_ids.shape[1],
            "lists of image ids": int(isinstance(batch, PairBatch) and batch.image_ids is not None),
        }
        targets = (self.layout.labels != IGNORED).sum()
        boxes = (~batch.is_image.bool()).sum() if isinstance(batch, RegionBatch) else torch.zeros_like(targets)
        filled = {name: torch.full((), size, device=device) for name, size in sizes.items()}
        counts = self.world.counts(**filled, targets=targets, boxes=boxes)
        if not self.names.isdisjoint({"itc", "itm"}):
            check_equal({name: counts[name] for name in sizes})
        return counts

    def contrast(self, image_tokens: Tensor, image_ids: Tensor | None) -> tuple[dict[str, Tensor], Texts | None]:
        """Encode the texts, compute `itc`, and draw the negatives of `itm`.

        Args:
            image_tokens: `[B, >= 1, vision_width]`, token 0 of which stands for the image or region.
            image_ids: `[B]`, equal for texts of the same image.

        Returns:
            The losses, and for `fuse` the texts, if any loss needs them unmasked.
        """
        if self.names.isdisjoint({"itc", "itm", *BOXES}):
            return {}, None
        whole = self.boxes or "itm" in self.names
        graph = "itc" in self.names or not self.options.stop_gradient
        packed = self._encode(self.batch.input_ids, graph=graph, first_only=not whole)
        losses, negatives = {}, None
        if "itc" in self.names or self.draws:
            first = packed.index_select(0, self.layout.starts) if whole else packed
            image, text = self.model.project_image(image_tokens), self.model.project_text(first[:, None])
            if self.options.official_itc_gradient and self.world.size > 1:
                image, text = (ScaleGradient.apply(f, 1 / self.world.size) for f in (image, text))
            # A later step clamps the temperature in place; a graph that is still waiting for its backward keeps a copy.
            pairs = (image, text, self.model.temp.clone())
            everyone = self._gathered(image, text, image_ids)
            if "itc" in self.names:
                losses["itc"] = (
                    contrastive_loss(*pairs, image_ids)
                    if everyone is None
                    else contrastive_rows(*pairs, everyone, image_ids)
                )
            if self.draws:
                generator = self.options.generator
                negatives = sample_hard_negatives(*pairs, image_ids, everyone=everyone, generator=generator)
        tokens = packed.detach() if self.options.stop_gradient else packed
        if "itm" not in self.names:
            return losses, Texts(tokens) if whole else None
        if negatives is None:
            negatives = check_negatives(self.options.hard_negatives, self.texts, self.texts * self.world.size)
        table = TextTable.of(tokens, self.layout, self.world)
        return losses, Texts(tokens, table, matching_pairs(self.layout, table, negatives, self.world))

    def _encode(self, ids: Tensor, *, graph: bool, first_only: bool = False) -> Tensor:
        packing = self.layout.packing
        model_inputs.check_tokens(ids, self.batch.attention_mask, self.model.config)
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            return self.model.text_encoder(ids, packing, reads=Reads.first_tokens(packing) if first_only else None)

    def _gathered(self, image: Tensor, text: Tensor, image_ids: Tensor | None) -> AllPairs | None:
        if self.world.size == 1:
            return None
        images, texts = self.world.gather_with_gradient(torch.cat([image, text], dim=1)).chunk(2, dim=1)
        ids = None if image_ids is None else self.world.gather(image_ids)
        return AllPairs(images, texts, self.world.rank * self.texts, ids)

    def fuse(self, texts: Texts | None, memory: ImageMemory | PackedMemory) -> dict[str, Tensor]:
        """`itm`, `imlm` and the box losses, from one pass of the fusion encoder."""
        parts: list[Pairs] = []
        tables: list[Tensor] = []
        places = torch.zeros(1, dtype=torch.long, device=self.batch.input_ids.device)
        if texts is not None:
            tables.append(texts.tokens if texts.table is None else texts.table.tokens)
            if texts.matching is not None:
                parts.append(texts.matching())
            if self.boxes:
                parts.append(self._boxed(texts.table))
        if "imlm" in self.names:
            parts.append(self._masked(sum(table.shape[0] for table in tables)))
            detach = self.options.stop_gradient and self.model.config.detach_text_for_mlm
            tables.append(self._encode(self.batch.masked_input_ids, graph=not detach))
            places = torch.cat([places, self.layout.targets])
        # With several processes a table holds the texts of all, most of which this one has no pair with.
        each_once = self.layout.packing.repeated(len(tables)) if self.world.size == 1 else None
        encoder, table = self.model.fusion_encoder, torch.cat(tables)
        read = fuse_pairs(encoder, table, Pairs.joined(parts), places, memory, each_once)
        pieces = iter(read.split([part.reads for part in parts]))
        losses = {}
        if "itm" in self.names:
            losses["itm"] = self._matching_loss(next(pieces))
        if self.boxes:
            losses |= self._box_losses(next(pieces))
        if "imlm" in self.names:
            hidden = encoder.lm_head.transform(next(pieces))
            loss = masked_token_loss(hidden, encoder.word_embeddings, encoder.lm_head.bias, self.layout.labels)
            losses["imlm"] = self.world.mean(loss, self.counts["targets"])
        return losses

    def _boxed(self, table: TextTable | None) -> Pairs:
        """Texts that describe a region, with the whole image."""
        layout, batch = self.layout, self.batch
        assert isinstance(batch, RegionBatch)
        assert batch.regions is not None
        boxed = batch.regions.boxed
        starts, lengths = (layout.starts, layout.lengths) if table is None else table.own(self.texts)
        images = batch.image_index.long()[boxed] + self.texts
        longest, tokens = layout.packing.longest, batch.regions.boxed_tokens
        return Pairs.first_token(starts[boxed], lengths[boxed], images, tokens=tokens, longest=longest)

    def _masked(self, before: int) -> Pairs:
        """Masked texts, which lie behind `before` other tokens, with their own image; read where they are masked."""
        layout = self.layout
        return Pairs(
            starts=layout.starts + before,
            lengths=layout.lengths,
            groups=torch.arange(self.texts, device=layout.lengths.device),
            read_starts=layout.cu_targets[:-1].long() + 1,
            read_counts=layout.target_counts,
            tokens=layout.tokens,
            reads=layout.labels.shape[0],
            longest=layout.packing.longest,
            most_reads=layout.most_targets,
        )

    def _matching_loss(self, fused: Tensor) -> Tensor:
        logits = self.model.match_logits(fused[:, None])
        matches = torch.arange(logits.shape[0], device=logits.device) < self.texts
        if self.world.size == 1:
            return matching_loss(logits, matches)
        # 3B pairs per process on average; how many lie here is a matter of which images were drawn.
        return F.cross_entropy(logits, matches.long(), reduction="sum") / (3 * self.texts)

    def _box_losses(self, fused: Tensor) -> dict[str, Tensor]:
        batch = self.batch
        assert isinstance(batch, RegionBatch)
        assert batch.regions is not None
        predicted, boxed = self.model.predict_boxes(fused[:, None]), batch.regions.boxed
        arguments = (predicted, batch.boxes[boxed].to(predicted.dtype), batch.is_image[boxed])
        found = {"bbox_l1": box_l1_loss, "bbox_giou": box_giou_loss}
        return {
            n: self.world.mean(loss(*arguments), self.counts["boxes"]) for n, loss in found.items() if n in self.names
        }


def region_memory(model: XFM, batch: RegionBatch, own: Tensor, images: Tensor, *, boxes: bool) -> PackedMemory:
    """A group of visible tokens for every region and, for boxes, of all tokens of every image behind them.

    Args:
        own, images: from `encode_region_tokens`.
        boxes: whether whole images are attended to.
    """
    assert batch.regions is not None
    visible = batch.regions.visible
    number, tokens = images.shape[:2]
    cu_keys, longest = visible.cu_seqlens, visible.longest
    behind = number * tokens
    if own.shape[1] == 1:
        region, token = visible.positions // tokens, visible.positions % tokens
        shared = batch.image_index.long()[region] * tokens + token
        rows = torch.where(token == 0, region + behind, shared)
        table = torch.cat([images.flatten(0, 1), own[:, 0]])
    else:
        seen = own.flatten(0, 1).index_select(0, visible.positions)
        rows = torch.arange(behind, behind + seen.shape[0], device=seen.device)
        table = torch.cat([images.flatten(0, 1), seen])
    if boxes:
        rows = torch.cat([rows, torch.arange(behind, device=rows.device)])
        ends = torch.arange(1, number + 1, device=rows.device, dtype=cu_keys.dtype) * tokens
        cu_keys = torch.cat([cu_keys, cu_keys[-1] + ends])
        longest = max(longest, tokens)
    return model.packed_memory(table, cu_keys, longest, rows)
