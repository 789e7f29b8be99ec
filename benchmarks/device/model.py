"""The whole model: a training step of 96 pairs, and all pairs of the COCO-5k evaluation on random embeddings."""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from xfm_fast import flops
from xfm_fast.batches import PairBatch
from xfm_fast.config import XFMConfig
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.reranking import ImageIndex, ModelScorer, TextIndex, score_candidates, top_candidates

from .. import machine
from ..material.inputs import HEADS, preset_config, random_state
from ..timing import timed
from .journal import efficiency
from .worker import Context

_STEPS = 10
_LENGTHS = (11, 12, 13, 14, 15)
"""Tokens of captions, in turn: 13 as COCO's on average."""


class OutOfTime(Exception):
    """The stage's time is over, and what was done until then is told."""


def training_step(context: Context) -> None:
    """A row of pairs a second of ITC, ITM, IMLM and MIM, forward and backward, in bf16 under autocast."""
    from ..work.training import AUTOCAST, TrainingSubject

    device = machine.choose_device(context.device)
    config, pairs = preset_config("tiny" if context.small else "base"), 4 if context.small else 96
    dtype = "bf16" if device.type == "cuda" else "fp32"
    batch = random_pairs(config, pairs)
    subject = TrainingSubject(config, batch, seed=0, device=device)
    lengths = batch.attention_mask.sum(1).tolist()
    masked = (batch.masked_labels != -100).sum(1).tolist()
    seconds: list[float] = []
    for number in range(_STEPS + 2):
        _, taken = timed(lambda: subject.step("xfm-fast", AUTOCAST[dtype]), device)
        # The first two compile and lay out memory.
        if number >= 2:
            seconds.append(taken)
        if context.left < 2 * taken and seconds:
            break
    sheet, needed = machine.data_sheet(device), flops.pretraining_step(config, lengths, masked).total
    context.add(
        "train-step", f"training step, {pairs} pairs of {config.image_size} px, ITC + ITM + IMLM + MIM", "xfm-fast",
        dtype=dtype, unit="pairs", items=pairs, seconds=seconds,
        timed_by="events" if device.type == "cuda" else "clock",
        point={"batch": pairs, "image_size": config.image_size, "dropout": False},
        efficiency=efficiency(needed, None, statistics.median(seconds), None if sheet is None else sheet.flops_per_s),
    )  # fmt: skip


def random_pairs(config: XFMConfig, pairs: int) -> PairBatch:
    """Random pixels and captions of the usual lengths, a fifth of whose tokens are masked."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([_LENGTHS[n % len(_LENGTHS)] for n in range(pairs)])
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]
    first = max(config.pad_token_id, config.bos_token_id, config.eos_token_id) + 1
    ids = torch.randint(first, config.vocab_size, (pairs, width), generator=draw).masked_fill(
        ~mask, config.pad_token_id
    )
    positions = torch.stack([1 + torch.randperm(int(n) - 2, generator=draw)[:3].sort().values for n in lengths])
    labels = ids.gather(1, positions)
    hidden = torch.rand(pairs, config.num_patches, generator=draw).argsort(1) < config.num_masking_patches
    return PairBatch(
        input_ids=ids, attention_mask=mask.long(),
        masked_input_ids=ids.scatter(1, positions, config.vocab_size - 1), masked_positions=positions,
        masked_labels=labels, patch_mask=hidden,
        image=torch.randn(pairs, 3, config.image_size, config.image_size, generator=draw),
    )  # fmt: skip


def rerank_coco(context: Context) -> None:
    """A row of pairs a second over all candidates of 5,000 images and 25,010 texts, as far as the time goes."""
    device = machine.choose_device(context.device)
    images, texts, k, size = (20, 60, 8, 32) if context.small else (5000, 25_010, 256, 384)
    config = preset_config("tiny" if context.small else "base").replace(image_size=size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):
        model = XFM(config, heads=HEADS)
    model.load_state_dict({n: t.to(device, dtype) for n, t in random_state(config, HEADS, 0).items()}, assign=True)
    # Outside inference mode, whose tensors have no version: nothing could be derived from them once for all passes.
    model.eval().requires_grad_(False)
    draw = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=dtype)

    lengths = torch.tensor([_LENGTHS[n % len(_LENGTHS)] for n in range(texts)], device=device)
    of_images = ImageIndex(
        noise(images, config.num_image_tokens, config.vision_width), F.normalize(noise(images, 64).float(), dim=-1)
    )
    of_texts = TextIndex(
        noise(int(lengths.sum()), config.text_width), lengths, F.normalize(noise(texts, 64).float(), dim=-1)
    )
    candidates = top_candidates(of_images.features, of_texts.features, k, k)
    done = 0

    def progress(scored: int, of: int) -> None:
        nonlocal done
        done = scored
        if context.left < 1:
            raise OutOfTime

    # Compilation and the layout of memory are no part of the evaluation.
    score_candidates(ModelScorer(model), of_images, of_texts, candidates.of_images(0, 2), None, None, None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun, whole = time.perf_counter(), True
    try:
        score_candidates(ModelScorer(model), of_images, of_texts, candidates, None, None, progress)
    except OutOfTime:
        whole = False
    seconds = time.perf_counter() - begun
    if not done:
        context.out_of_time("rerank", f"COCO-5k re-ranking, {candidates.pairs} pairs", "xfm-fast")
        return
    of_pairs = zip(
        *(t.tolist() for t in lengths.cpu()[candidates.texts[:done]].unique(return_counts=True)), strict=True
    )
    needed = sum(
        count * flops.fusion(config, [length], first_token_only=True, self_attended=True).total
        for length, count in of_pairs
    )
    sheet = machine.data_sheet(device)
    left = "" if whole else f"; all {candidates.pairs:,} would take {seconds * candidates.pairs / done:.0f} s"
    context.add(
        "rerank", f"COCO-5k re-ranking at {size}, random embeddings, {done} of {candidates.pairs} pairs", "xfm-fast",
        dtype="bf16" if dtype == torch.bfloat16 else "fp32", unit="pairs", items=done, seconds=[seconds],
        status="measured" if whole else "partial", reason=f"{done / candidates.pairs:.0%} of the pairs{left}",
        efficiency=efficiency(needed, None, seconds, None if sheet is None else sheet.flops_per_s),
    )  # fmt: skip
