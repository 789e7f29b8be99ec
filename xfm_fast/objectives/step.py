"""One pretraining step: the losses that apply to a batch, without redundant computation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.batches import (
    IGNORED,
    Batch,
    ImageBatch,
    PairBatch,
    RegionBatch,
    TextBatch,
    TextLayout,
)
from xfm_fast.data.masking import block_mask
from xfm_fast.errors import InputError
from xfm_fast.kernels import host
from xfm_fast.kernels.caching import uncached
from xfm_fast.models import inputs as model_inputs
from xfm_fast.models.fusion import ImageMemory, PackedMemory
from xfm_fast.models.xfm import XFM, Head
from xfm_fast.objectives.fusion_pass import Pairs, TextTable, fuse_pairs, matching_pairs
from xfm_fast.objectives.losses import (
    AllPairs,
    HardNegatives,
    ScaleGradient,
    World,
    box_giou_loss,
    box_l1_loss,
    check_equal,
    contrastive_loss,
    contrastive_rows,
    masked_image_terms,
    masked_token_loss,
    matching_loss,
    sample_hard_negatives,
)
from xfm_fast.packing import Reads

BOXES = ("bbox_l1", "bbox_giou")
APPLICABLE: dict[type, tuple[str, ...]] = {
    PairBatch: ("itc", "itm", "imlm", "mim"),
    RegionBatch: ("itc", "itm", "imlm", "bbox_l1", "bbox_giou"),
    ImageBatch: ("mim",),
    TextBatch: ("mlm",),
}
"""The losses of each kind of batch."""


_HEADS: dict[str, Head] = {
    "itc": "contrastive",
    "itm": "matching",
    "imlm": "imlm",
    "bbox_l1": "boxes",
    "bbox_giou": "boxes",
}


def pretraining_losses(
    model: XFM,
    batch: Batch,
    *,
    hard_negatives: tuple[Tensor, Tensor] | None = None,
    patch_mask: Tensor | None = None,
    losses: Iterable[str] | None = None,
    generator: torch.Generator | None = None,
    group: dist.ProcessGroup | None = None,
    official_itc_gradient: bool = False,
    official_itm_negatives: bool = False,
    stop_gradient: bool = True,
    mim_target: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the losses of X-FM (arXiv 2301.05065) on one batch.

    An image passes the vision encoder once (once more with hidden patches for `mim`), and its keys and
    values are projected once per fusion layer; true pairs, negatives, masked captions and boxes share one
    pass of the fusion encoder. ITM, IMLM and boxes read detached text embeddings (except IMLM with
    `detach_text_for_mlm=False` in the configuration). On multimodal batches the temperature is first
    clamped, in place, to its range.

    A step never synchronises an accelerator if the batch was prepared on the host (`batch.to(device)`
    does that). Negative texts then occupy as many tokens as the longest text of the batch; with several
    processes, the draw is copied to the host during the next encoder pass.

    In a process group every process passes its share of the global batch, equally large on all. ITC and
    ITM range over all pairs, and every value is this process's share, whose mean over processes is the
    loss of the global batch, so that DDP's mean of gradients is the true gradient. Text embeddings are
    exchanged, image embeddings never: a pair is matched on the process of its image.

    Args:
        model: with the heads that the losses need.
        batch: `PairBatch` (itc, itm, imlm, mim), `RegionBatch` (itc, itm, imlm, bbox_l1, bbox_giou),
            `ImageBatch` (mim) or `TextBatch` (mlm).
        hard_negatives: (`[B]` negative image of each text, `[B]` negative text of each image) for `itm`,
            numbered over all processes. Drawn by `sample_hard_negatives` when None.
        patch_mask: `[B, N]`, non-zero for patches that `mim` hides; by default the mask of the batch, or a
            new one.
        losses: names of the losses to compute; by default all that apply.
        generator: random generator of the negatives, on the device of the batch.
        group: process group that shares a global batch; by default all processes, if torch.distributed is
            initialised.
        official_itc_gradient: scale the gradient of the contrastive features by 1 / (number of processes),
            as the official gathering does.
        official_itm_negatives: draw the negatives among the pairs of this process only, as the official
            code does; no text is exchanged then. Without effect on `hard_negatives`.
        stop_gradient: False passes the gradients of ITM, IMLM and the box losses to the language encoder:
            for ablations of the method, not fine-tuning.
        mim_target: function of pixels `[B, 3, R, R]` that replaces the target of `mim`: codes `[B, N]` of
            an image tokenizer, for the head `codes` (the official `use_vision_tokenizer`), or embeddings
            `[B, 1 + N, vision_width]` of another encoder.

    Returns:
        Scalars by name.

    Raises:
        InputError: a batch of another type, tensors that do not fit together, labels, ids or indices out
            of range, no candidate for a negative, or processes with batches of different sizes.
        UnavailableError: the model lacks a head.
    """
    names = select_losses(batch, losses)
    world = World.of(group)
    options = Options(
        hard_negatives,
        patch_mask,
        generator,
        official_itc_gradient,
        official_itm_negatives,
        stop_gradient,
        mim_target,
    )
    if isinstance(batch, ImageBatch):
        return {"mim": _image_loss(model, batch, None, world, options)} if names else {}
    if isinstance(batch, PairBatch):
        check_pairs(batch)
        step = Step(model, batch.prepare(), names, world, options)
        packed = step.encode_texts()
        # Without other losses the target of `mim` needs no gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and names != {"mim"}):
            image = model.encode_image(batch.image)
        results, texts = step.contrast(packed, image, batch.image_ids)
        masks_last = image.device.type == "cpu" and step.fuses
        if "mim" in names and not masks_last:
            # Between draw and fusion, while the draw is copied to the host.
            results["mim"] = _image_loss(model, batch, image, world, options)
        if not step.fuses:
            return results
        fused = step.fuse(texts, model.image_memory(image))
        if "mim" in names and masks_last:
            # A CPU has the draw at once. The backward pass frees the activations of the last encoder
            # first, before the gradients of the others exist; together they are the peak memory.
            results["mim"] = _image_loss(model, batch, image, world, options)
        return results | fused
    if isinstance(batch, RegionBatch):
        check_regions(batch)
        batch = batch.prepare()
        step = Step(model, batch, names, world, options)
        packed = step.encode_texts()
        regions, images = model.encode_region_tokens(
            batch.image, batch.image_index, batch.region_mask
        )
        results, texts = step.contrast(packed, regions, None)
        if step.fuses:
            memory = region_memory(model, batch, regions, images, boxes=step.boxes)
            results |= step.fuse(texts, memory)
        return results
    return {"mlm": _text_loss(model, batch.prepare(), world)} if names else {}


def _text_loss(model: XFM, batch: TextBatch, world: World) -> Tensor:
    """Compute `mlm`; the last layer runs only on the masked positions."""
    model.require_head("mlm")
    layout, encoder = batch.layout, model.text_encoder
    assert layout is not None
    model_inputs.check_tokens(batch.masked_input_ids, batch.attention_mask, model.config)
    starts = torch.repeat_interleave(
        layout.starts, layout.target_counts, output_size=layout.labels.shape[0]
    )
    reads = Reads(
        cu_seqlens=layout.cu_targets, max_seqlen=layout.most_targets, rows=starts + layout.targets
    )
    hidden = encoder.lm_head.transform(encoder(batch.masked_input_ids, layout.packing, reads=reads))
    loss = masked_token_loss(hidden, encoder.word_embeddings, encoder.lm_head.bias, layout.labels)
    return world.mean(loss, world.counts(targets=(layout.labels != IGNORED).sum())["targets"])


def _image_loss(
    model: XFM, batch: PairBatch | ImageBatch, target: Tensor | None, world: World, options: Options
) -> Tensor:
    """Compute `mim` with `options.mim_target`, or the embeddings `target` of unmasked images."""
    config = model.config
    mask = batch.patch_mask if options.patch_mask is None else options.patch_mask
    if mask is None:
        # The host draws from its own generator, without a synchronisation.
        rng = np.random.default_rng(host.integer(torch.randint(1 << 62, ())))
        drawn = [
            block_mask(config.grid, config.num_masking_patches, config.min_num_patches, rng)
            for _ in range(len(batch.image))
        ]
        mask = torch.from_numpy(np.stack(drawn)).to(batch.image.device, non_blocking=True)
    if options.mim_target is not None or target is None:
        compute_target = options.mim_target or model.encode_image
        with torch.no_grad():
            target = compute_target(batch.image)
    embeds = model.encode_image(batch.image, mask)
    counts = world.counts(
        hidden=mask.bool().sum(), images=torch.full((), len(embeds), device=embeds.device)
    )
    if not target.is_floating_point():
        model.require_head("codes")
        if target.shape != mask.shape:
            raise InputError(
                f"mim_target returned codes {[*target.shape]}; return one per patch, {[*mask.shape]}"
            )
        codes = target.long().masked_fill(~mask.bool(), IGNORED)
        head = model.lm_head
        loss = masked_token_loss(embeds[:, 1:], head.weight, head.bias, codes)
        return world.mean(loss, counts["hidden"])
    patches, token = masked_image_terms(embeds, target, mask)
    loss = world.mean(patches, counts["hidden"])
    return loss if config.mim_patches_only else loss + world.mean(token, counts["images"])


@dataclass(frozen=True)
class Options:
    """Arguments of `pretraining_losses` that change the computation."""

    hard_negatives: tuple[Tensor, Tensor] | None
    patch_mask: Tensor | None
    generator: torch.Generator | None
    official_itc_gradient: bool
    official_itm_negatives: bool
    stop_gradient: bool
    mim_target: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Texts:
    """Unmasked texts, encoded."""

    tokens: Tensor  # [T, width] packed, as the fusion encoder sees them
    table: TextTable | None = None  # the texts of all processes, for matching
    matching: Callable[[], Pairs] | None = None  # builds the pairs to match


class Step:
    """The multimodal losses of one batch: `encode_texts`, the images, `contrast`, then `fuse`.

    Text b belongs to group b of the memory, its image or region; groups of whole images, for boxes, follow.
    """

    def __init__(
        self,
        model: XFM,
        batch: PairBatch | RegionBatch,
        names: frozenset[str],
        world: World,
        options: Options,
    ) -> None:
        assert batch.layout is not None
        self.model, self.batch, self.names = model, batch, names
        self.world, self.options = world, options
        self.layout: TextLayout = batch.layout
        self.texts = batch.input_ids.shape[0]
        self.boxes = not names.isdisjoint(BOXES)
        self.fuses = self.boxes or not names.isdisjoint({"itm", "imlm"})
        self.needs_all_tokens = self.boxes or "itm" in names
        self.draws = "itm" in names and options.hard_negatives is None
        # Pairs whose texts may become negatives here.
        self.matched = World() if self.draws and options.official_itm_negatives else world
        for name, head in _HEADS.items():
            if name in names:
                model.require_head(head)
        if self.draws:
            model.require_head("contrastive")
        # Counts that determine message sizes must be equal on all processes.
        has_ids = isinstance(batch, PairBatch) and batch.image_ids is not None
        sizes = {
            "texts": self.texts,
            "tokens per padded text": batch.input_ids.shape[1],
            "lists of image ids": int(has_ids),
        }
        targets = (self.layout.labels != IGNORED).sum()
        boxes = torch.zeros_like(targets)
        if isinstance(batch, RegionBatch):
            boxes = (~batch.is_image.bool()).sum()
        local = {name: torch.full((), size, device=targets.device) for name, size in sizes.items()}
        self.counts = world.counts(**local, targets=targets, boxes=boxes)
        if not names.isdisjoint({"itc", "itm"}):
            check_equal({name: self.counts[name] for name in sizes})
        if hasattr(model, "temp"):
            with torch.no_grad():
                model.temp.clamp_(model.config.min_temperature, model.config.max_temperature)

    def encode_texts(self) -> Tensor | None:
        """Encode the unmasked texts `[T, width]`, or their first tokens `[B, width]`, if a loss needs them.

        They run before the images, so that the backward pass ends with them: their gradients are large
        relative to their activations, and the activations of the images are free by then.
        """
        if self.names.isdisjoint({"itc", "itm", *BOXES}):
            return None
        graph = "itc" in self.names or not self.options.stop_gradient
        first_only = not self.needs_all_tokens
        return self._encode(self.batch.input_ids, graph=graph, first_only=first_only)

    def contrast(
        self, packed: Tensor | None, image_tokens: Tensor, image_ids: Tensor | None
    ) -> tuple[dict[str, Tensor], Texts | None]:
        """Compute `itc` and draw the negatives of `itm`; returns the losses, and the texts if `fuse` needs them.

        `image_tokens` are `[B, >= 1, vision_width]`, token 0 for the image or region; `image_ids` `[B]` are
        equal for texts of one image.
        """
        if packed is None:
            return {}, None
        losses, negatives = {}, None
        if "itc" in self.names or self.draws:
            first = packed
            if self.needs_all_tokens:
                first = packed.index_select(0, self.layout.starts)
            image = self.model.project_image(image_tokens)
            text = self.model.project_text(first[:, None])
            if self.options.official_itc_gradient and self.world.size > 1:
                image = ScaleGradient.apply(image, 1 / self.world.size)
                text = ScaleGradient.apply(text, 1 / self.world.size)
            # A later step clamps the temperature in place; a pending backward pass needs a copy.
            pairs = (image, text, self.model.temp.clone())
            gathered = None
            if self.world.size > 1 and ("itc" in self.names or self.matched.size > 1):
                features = self.world.gather_with_gradient(torch.cat([image, text], dim=1))
                images, texts = features.chunk(2, dim=1)
                ids = None if image_ids is None else self.world.gather(image_ids)
                gathered = AllPairs(images, texts, self.world.rank * self.texts, ids)
            if "itc" in self.names and gathered is None:
                losses["itc"] = contrastive_loss(*pairs, image_ids)
            elif "itc" in self.names and gathered is not None:
                losses["itc"] = contrastive_rows(*pairs, gathered, image_ids)
            if self.draws:
                negatives = sample_hard_negatives(
                    *pairs,
                    image_ids,
                    gathered=gathered if self.matched.size > 1 else None,
                    generator=self.options.generator,
                )
        tokens = packed.detach() if self.options.stop_gradient else packed
        if "itm" not in self.names:
            return losses, Texts(tokens) if self.needs_all_tokens else None
        if negatives is None:
            negatives = check_negatives(
                self.options.hard_negatives, self.texts, self.texts * self.world.size
            )
        table = TextTable.of(tokens, self.layout, self.matched)
        matching = matching_pairs(self.layout, table, negatives, self.matched)
        return losses, Texts(tokens, table, matching)

    def _encode(self, ids: Tensor, *, graph: bool, first_only: bool = False) -> Tensor:
        packing = self.layout.packing
        model_inputs.check_tokens(ids, self.batch.attention_mask, self.model.config)
        reads = Reads.first_tokens(packing) if first_only else None
        # Concatenated weights of a pass without a graph would occupy memory until the next update.
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()), uncached():
            return self.model.text_encoder(ids, packing, reads=reads)

    def fuse(self, texts: Texts | None, memory: ImageMemory | PackedMemory) -> dict[str, Tensor]:
        """Compute `itm`, `imlm` and the box losses, from one pass of the fusion encoder."""
        pairs: list[Pairs] = []
        tables: list[Tensor] = []
        positions = torch.zeros(1, dtype=torch.long, device=self.batch.input_ids.device)
        if texts is not None:
            tables.append(texts.tokens if texts.table is None else texts.table.tokens)
            if texts.matching is not None:
                pairs.append(texts.matching())
            if self.boxes:
                pairs.append(self._box_pairs(texts.table))
        if "imlm" in self.names:
            # Masked texts follow the unmasked ones and attend to the same images.
            offset = sum(table.shape[0] for table in tables)
            layout = self.layout
            pairs.append(
                Pairs(
                    starts=layout.starts + offset,
                    lengths=layout.lengths,
                    groups=torch.arange(self.texts, device=layout.lengths.device),
                    read_starts=layout.cu_targets[:-1].long() + 1,
                    read_counts=layout.target_counts,
                    tokens=layout.tokens,
                    reads=layout.labels.shape[0],
                    longest=layout.packing.longest,
                    most_reads=layout.most_targets,
                )
            )
            detach = self.options.stop_gradient and self.model.config.detach_text_for_mlm
            tables.append(self._encode(self.batch.masked_input_ids, graph=not detach))
            positions = torch.cat([positions, self.layout.targets])
        # With several processes most texts of the table have no pair here.
        layout = self.layout.packing.repeated(len(tables)) if self.matched.size == 1 else None
        encoder, table = self.model.fusion_encoder, torch.cat(tables)
        read = fuse_pairs(encoder, table, Pairs.joined(pairs), positions, memory, layout)
        fused = iter(read.split([batch.reads for batch in pairs]))
        losses = {}
        if "itm" in self.names:
            logits = self.model.match_logits(next(fused)[:, None])
            matches = torch.arange(logits.shape[0], device=logits.device) < self.texts
            if self.matched.size == 1:
                losses["itm"] = matching_loss(logits, matches)
            else:
                # 3B pairs per process on average; the number here depends on the drawn images.
                summed = F.cross_entropy(logits, matches.long(), reduction="sum")
                losses["itm"] = summed / (3 * self.texts)
        if self.boxes:
            assert isinstance(self.batch, RegionBatch)
            assert self.batch.regions is not None
            predicted = self.model.predict_boxes(next(fused)[:, None])
            boxed = self.batch.regions.boxed
            boxes = self.batch.boxes[boxed].to(predicted.dtype)
            is_image = self.batch.is_image[boxed]
            for name, box_loss in (("bbox_l1", box_l1_loss), ("bbox_giou", box_giou_loss)):
                if name in self.names:
                    loss = box_loss(predicted, boxes, is_image)
                    losses[name] = self.world.mean(loss, self.counts["boxes"])
        if "imlm" in self.names:
            hidden, head = encoder.lm_head.transform(next(fused)), encoder.lm_head
            labels = self.layout.labels
            loss = masked_token_loss(hidden, encoder.word_embeddings, head.bias, labels)
            losses["imlm"] = self.world.mean(loss, self.counts["targets"])
        return losses

    def _box_pairs(self, table: TextTable | None) -> Pairs:
        """Pair region captions with the whole image."""
        layout, batch = self.layout, self.batch
        assert isinstance(batch, RegionBatch)
        assert batch.regions is not None
        boxed = batch.regions.boxed
        starts, lengths = layout.starts, layout.lengths
        if table is not None:
            starts, lengths = table.local(self.texts)
        images = batch.image_index.long()[boxed] + self.texts
        longest, tokens = layout.packing.longest, batch.regions.boxed_tokens
        return Pairs.first_token(
            starts[boxed], lengths[boxed], images, tokens=tokens, longest=longest
        )


def region_memory(
    model: XFM, batch: RegionBatch, regions: Tensor, images: Tensor, *, boxes: bool
) -> PackedMemory:
    """Build a memory group of visible tokens for every region, then with `boxes` one for every image.

    `regions` and `images` are the results of `encode_region_tokens`.
    """
    assert batch.regions is not None
    visible = batch.regions.visible
    count, tokens = images.shape[:2]
    cu_keys, longest = visible.cu_seqlens, visible.longest
    image_rows = count * tokens
    if regions.shape[1] == 1:
        region, token = visible.positions // tokens, visible.positions % tokens
        shared = batch.image_index.long()[region] * tokens + token
        rows = torch.where(token == 0, region + image_rows, shared)
        table = torch.cat([images.flatten(0, 1), regions[:, 0]])
    else:
        region_tokens = regions.flatten(0, 1).index_select(0, visible.positions)
        rows = torch.arange(len(region_tokens), device=region_tokens.device) + image_rows
        table = torch.cat([images.flatten(0, 1), region_tokens])
    if boxes:
        rows = torch.cat([rows, torch.arange(image_rows, device=rows.device)])
        ends = torch.arange(1, count + 1, device=rows.device, dtype=cu_keys.dtype) * tokens
        cu_keys = torch.cat([cu_keys, cu_keys[-1] + ends])
        longest = max(longest, tokens)
    return model.packed_memory(table, cu_keys, longest, rows)


def select_losses(batch: Batch, losses: Any) -> frozenset[str]:
    """Check the names of losses for a batch; by default select all that apply."""
    if type(batch) not in APPLICABLE:
        types = ", ".join(batch_type.__name__ for batch_type in APPLICABLE)
        raise InputError(f"batch is a {type(batch).__name__}; it must be one of {types}")
    applicable = APPLICABLE[type(batch)]
    if losses is None:
        return frozenset(applicable)
    if isinstance(losses, str):
        raise InputError(f"losses={losses!r} is a string; give a collection, {{{losses!r}}}")
    names = frozenset(losses)
    for name in sorted(names, key=str):
        if name not in applicable:
            raise InputError(
                f"loss {name!r} does not apply to a {type(batch).__name__} (it has {', '.join(applicable)})"
            )
    return names


def check_pairs(batch: PairBatch) -> None:
    """Check that there are as many images and image ids as texts."""
    texts, _ = batch.check_texts()
    if batch.image.shape[0] != texts:
        raise InputError(
            f"image holds {batch.image.shape[0]} images and input_ids {texts} texts; give one each"
        )
    _check_rows("image_ids", batch.image_ids, texts)


def check_regions(batch: RegionBatch) -> None:
    """Check sizes and boxes; the model checks region_mask and the values of image_index."""
    texts, _ = batch.check_texts()
    _check_rows("image_index", batch.image_index, texts)
    _check_rows("is_image", batch.is_image, texts)
    if batch.boxes.shape != (texts, 4):
        raise InputError(
            f"boxes are {[*batch.boxes.shape]}; {texts} texts need [{texts}, 4]: (cx, cy, w, h)"
        )
    if batch.boxes.device.type == "cpu" and not host.all_true(batch.boxes.isfinite()):
        text = host.integer(batch.boxes.isfinite().all(1).long().argmin())
        raise InputError(f"boxes of text {text} contain NaN or infinity; check its annotation")


def check_negatives(negatives: object, rows: int, pairs: int) -> HardNegatives:
    """Check two `[rows]` (or `[pairs]`) integer tensors below `pairs`."""
    if not isinstance(negatives, tuple | list) or len(negatives) != 2:
        raise InputError(
            f"hard_negatives is a {type(negatives).__name__}; give (image_negative_index, text_negative_index)"
        )
    for name, index in zip(("image_negative_index", "text_negative_index"), negatives, strict=True):
        if not isinstance(index, Tensor):
            raise InputError(
                f"{name} is {type(index).__name__}; give one integer for each of the {rows} pairs"
            )
        if index.is_floating_point() or index.shape not in ((rows,), (pairs,)):
            raise InputError(
                f"{name} is {index.dtype} {[*index.shape]}; give one integer for each of the {rows} pairs"
            )
        wrong = model_inputs.out_of_range(index, pairs)
        if wrong is not None:
            raise InputError(
                f"{name} contains {wrong}; give numbers from 0 below the {pairs} pairs"
            )
    return HardNegatives(*negatives)


def _check_rows(name: str, tensor: Tensor | None, rows: int) -> None:
    if tensor is not None and tensor.shape != (rows,):
        raise InputError(f"{name} is {[*tensor.shape]}; give one for each of the {rows} texts")
