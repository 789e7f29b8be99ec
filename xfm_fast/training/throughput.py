"""How fast a run is: images, tokens, and the share of the machine's peak that the needed operations make up."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache

import torch

from xfm_fast import flops
from xfm_fast.batches import IGNORED, Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.config import XFMConfig
from xfm_fast.training.distributed import Place
from xfm_fast.training.recipe import Recipe

# Dense bf16 or fp16 on the tensor cores; NVIDIA's data sheets, SXM boards.
_GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
_PROBE = 1024
_BOXES = {"bbox_l1", "bbox_giou"}


class Work:
    """Counts what a run does.

    Args:
        recipe: of the run.
        place: of this process; the others are taken to do as much.
    """

    def __init__(self, recipe: Recipe, place: Place) -> None:
        self._recipe = recipe
        self._place = place
        self._begin()

    def _begin(self) -> None:
        self._images = self._tokens = self._flops = 0

    def count(self, stream: str, batch: Batch, *, in_detail: bool) -> None:
        """Take a batch on the CPU, with its operations if they are to be counted."""
        images, tokens = size_of(batch)
        self._images += images
        self._tokens += tokens
        if in_detail:
            recipe = self._recipe
            self._flops += training_flops(
                recipe.model,
                batch,
                recipe.losses_of(stream),
                stop_gradient=recipe.method.stop_gradient,
                guided=recipe.method.image_codes is None,
            )

    def rates(self, steps: int, seconds: float) -> dict[str, float]:
        """Rates over the steps since the last call, of all processes; begins anew.

        Returns:
            `seconds` of a step, `images_per_s`, `tokens_per_s`, and, where the peak of the device is known, `mfu`: the
            operations of the step that was counted in detail, over what the device could do in the time of a step.
        """
        rates = {
            "seconds": seconds / steps,
            "images_per_s": self._images * self._place.world_size / seconds,
            "tokens_per_s": self._tokens * self._place.world_size / seconds,
        }
        peak = peak_flops_per_s(self._place.device, self._recipe.precision)
        if peak is not None and self._flops:
            rates["mfu"] = self._flops * steps / seconds / peak
        self._begin()
        return rates


def size_of(batch: Batch) -> tuple[int, int]:
    """Images and real tokens of a batch on the CPU."""
    images = len(batch.image) if isinstance(batch, (PairBatch, RegionBatch, ImageBatch)) else 0
    tokens = int(batch.attention_mask.count_nonzero()) if isinstance(batch, TextBatch) else 0
    return images, tokens


def training_flops(
    config: XFMConfig, batch: Batch, losses: Iterable[str], *, stop_gradient: bool = True, guided: bool = True
) -> int:
    """Operations that the losses of a batch on the CPU and their gradients need.

    A backward pass counts as two forward passes. Text passes whose result is detached have none, and neither has the
    unmasked pass of images that nothing but MIM reads; MIM that predicts codes needs none (`guided=False`; making them,
    and their head, are not counted). Of the fusion encoder, the first self-attention is needed once
    for each text, and the last layer where a head reads.
    """
    wanted = set(losses)
    forward, trained = flops.Count(), flops.Count()
    if isinstance(batch, (PairBatch, RegionBatch, ImageBatch)):
        images = len(batch.image)
        seen = flops.image_encoder(config, images)
        if wanted - {"mim"}:
            trained += seen
        elif guided:
            forward += seen
        if "mim" in wanted:
            trained += seen
    if isinstance(batch, TextBatch):
        lengths = batch.attention_mask.ne(0).sum(1).tolist()
        masked = batch.masked_labels.ne(IGNORED).sum(1).tolist()
        text, vocabulary = flops.text_encoder(config, lengths), flops.lm_head(config, sum(masked))
        if "mlm" in wanted:
            trained += text + vocabulary
        if wanted & {"itc", "itm", *_BOXES}:
            if "itc" in wanted or not stop_gradient:
                trained += text
            else:
                forward += text
        if "imlm" in wanted:
            if stop_gradient:
                forward += text
            else:
                trained += text
            trained += flops.first_self_attention(config, lengths) + vocabulary
            trained += flops.fusion(config, lengths, reads=masked, self_attended=True)
        if isinstance(batch, (PairBatch, RegionBatch)):
            images, texts = len(batch.image), len(lengths)
            if wanted & {"itm", "imlm", *_BOXES}:
                trained += flops.image_memory(config, images)
            if "itc" in wanted:
                trained += flops.contrastive_features(config, images, texts)
            # A positive and two negatives of every pair; a box of every region.
            passes = 3 * ("itm" in wanted) + (not wanted.isdisjoint(_BOXES))
            if passes:
                trained += flops.first_self_attention(config, lengths)
                trained += passes * flops.matching_head(config, texts)
                trained += passes * flops.fusion(config, lengths, first_token_only=True, self_attended=True)
    return (forward + 3 * trained).total


@cache
def peak_flops_per_s(device: torch.device, precision: str) -> float | None:
    """The peak rate of matrix products: of a GPU that is known, or of this CPU, probed once; None otherwise."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for gpu, peak in _GPU_PEAKS.items() if gpu in name]
        return known[0] if known and precision in ("bf16", "fp16") else None
    a = torch.ones(_PROBE, _PROBE, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begun)
    return 2 * _PROBE**3 / best
