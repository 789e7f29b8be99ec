"""One step of pretraining: the losses that apply to a batch, with nothing computed twice or for nobody."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from xfm_fast.batches import IGNORED, Batch, ImageBatch, PairBatch, RegionBatch, TextBatch, TextLayout
from xfm_fast.config import XFMConfig
from xfm_fast.data.masking import block_mask
from xfm_fast.kernels import host
from xfm_fast.models import inputs as model_inputs
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives.gathering import World
from xfm_fast.objectives.images import ImageCodes, masked_image_terms
from xfm_fast.objectives.inputs import check_pairs, check_regions, losses_of
from xfm_fast.objectives.language import masked_token_loss
from xfm_fast.objectives.multimodal import Options, Step, region_memory
from xfm_fast.packing import Reads


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
    stop_gradient: bool = True,
    image_codes: ImageCodes | None = None,
) -> dict[str, Tensor]:
    """The losses of X-FM (arXiv 2301.05065) on one batch.

    An image passes the vision encoder once (once more with hidden patches for `mim`) and is projected to keys and
    values once per fusion layer; true pairs, negatives, masked captions and boxes share one pass of the fusion encoder.
    ITM, IMLM and boxes see detached text embeddings (IMLM's not with `detach_text_for_mlm=False` in the configuration).
    On multimodal batches the temperature is first clamped, in place, to its range.

    A step reads no number back from an accelerator, given a batch that was prepared on the host (`batch.to(device)`
    does it). Texts drawn as negatives then take up as many tokens as the longest text of the batch; with several
    processes, the draw itself is copied to the host while the next encoder pass is under way.

    In a process group every process passes its part of the global batch, equally large for all. ITC and ITM range over
    all of it, and every value is this process's share, whose mean over processes is the loss of the global batch: the
    mean of gradients that DDP takes is then the true gradient. Text embeddings travel, image embeddings never do: a
    pair is matched where its image lies.

    Args:
        model: with the heads that the losses need.
        batch: `PairBatch` (itc, itm, imlm, mim), `RegionBatch` (itc, itm, imlm, bbox_l1, bbox_giou), `ImageBatch`
            (mim) or `TextBatch` (mlm).
        hard_negatives: (`[B]` negative image of each text, `[B]` negative text of each image) for `itm`, numbered over
            all processes. Drawn by `sample_hard_negatives` when None.
        patch_mask: `[B, N]`, non-zero for patches that `mim` hides; by default the mask of the batch, or a new one.
        losses: names, to compute only these.
        generator: source of the negatives, on the device of the batch.
        group: the processes that share a global batch; by default all, where torch.distributed is initialised.
        official_itc_gradient: scale the gradient of the contrastive features by 1 / (number of processes), as the
            official gathering does.
        stop_gradient: False lets ITM, IMLM and the box losses through to the language encoder: the ablation of the
            method, not fine-tuning.
        image_codes: what `mim` predicts instead of what the encoder makes of the whole image: MIM without guidance.

    Returns:
        Scalars by name.

    Raises:
        InputError: a batch of another kind, tensors that do not belong together, labels, ids or indices out of range,
            nothing to draw a negative from, processes with batches of different sizes.
        UnavailableError: the model lacks a head.
    """
    names = losses_of(batch, losses)
    world = World.of(group)
    options = Options(hard_negatives, generator, official_itc_gradient, stop_gradient)
    if isinstance(batch, ImageBatch):
        return _image_only(model, batch, patch_mask, world, image_codes) if names else {}
    if isinstance(batch, PairBatch):
        check_pairs(batch)
        return _pairs(Step(model, batch.prepare(), names, world, options), patch_mask, image_codes)
    if isinstance(batch, RegionBatch):
        check_regions(batch)
        return _regions(Step(model, batch.prepare(), names, world, options))
    return _text_only(model, batch.prepare(), world) if names else {}


def _text_only(model: XFM, batch: TextBatch, world: World) -> dict[str, Tensor]:
    model.require_head("mlm")
    layout = batch.layout
    assert layout is not None
    model_inputs.check_tokens(batch.masked_input_ids, batch.attention_mask, model.config)
    encoder = model.text_encoder
    hidden = encoder(batch.masked_input_ids, layout.packing, reads=_targets(layout))
    loss = masked_token_loss(
        encoder.lm_head.transform(hidden), encoder.word_embeddings, encoder.lm_head.bias, layout.labels
    )
    counts = world.counts(targets=(layout.labels != IGNORED).sum())
    return {"mlm": world.mean(loss, counts["targets"])}


def _targets(layout: TextLayout) -> Reads:
    starts = torch.repeat_interleave(layout.starts, layout.target_counts, output_size=layout.labels.shape[0])
    return Reads(cu_seqlens=layout.cu_targets, max_seqlen=layout.most_targets, rows=starts + layout.targets)


def _image_only(
    model: XFM, batch: ImageBatch, patch_mask: Tensor | None, world: World, codes: ImageCodes | None
) -> dict[str, Tensor]:
    mask = _hidden_patches(model.config, batch, patch_mask)
    if codes is not None:
        return {"mim": _code_loss(model, batch.image, mask, world, codes)}
    with torch.no_grad():
        target = model.encode_image(batch.image)
    return {"mim": _image_loss(model, batch.image, target, mask, world)}


def _code_loss(model: XFM, image: Tensor, mask: Tensor, world: World, codes: ImageCodes) -> Tensor:
    counts = world.counts(hidden=mask.bool().sum())
    return world.mean(codes(model.encode_image(image, mask), image, mask), counts["hidden"])


def _image_loss(model: XFM, image: Tensor, target: Tensor, mask: Tensor, world: World) -> Tensor:
    patches, token = masked_image_terms(model.encode_image(image, mask), target, mask)
    counts = world.counts(hidden=mask.bool().sum(), images=torch.full((), image.shape[0], device=image.device))
    loss = world.mean(patches, counts["hidden"])
    return loss if model.config.mim_patches_only else loss + world.mean(token, counts["images"])


def _hidden_patches(config: XFMConfig, batch: PairBatch | ImageBatch, given: Tensor | None) -> Tensor:
    mask = batch.patch_mask if given is None else given
    if mask is not None:
        return mask
    # The host draws, from its own generator, so that no device has to be waited for.
    rng = np.random.default_rng(host.integer(torch.randint(1 << 62, ())))
    drawn = [
        block_mask(config.grid, config.num_masking_patches, config.min_num_patches, rng)
        for _ in range(len(batch.image))
    ]
    return torch.from_numpy(np.stack(drawn)).to(batch.image.device, non_blocking=True)


def _pairs(step: Step, patch_mask: Tensor | None, codes: ImageCodes | None) -> dict[str, Tensor]:
    model, batch, names = step.model, step.batch, step.names
    assert isinstance(batch, PairBatch)
    with torch.set_grad_enabled(torch.is_grad_enabled() and names != {"mim"}):
        image = model.encode_image(batch.image)
    losses, texts = step.contrast(image, batch.image_ids)
    if "mim" in names:
        # Between draw and fusion: the host needs the draw only then.
        mask = _hidden_patches(model.config, batch, patch_mask)
        if codes is None:
            losses["mim"] = _image_loss(model, batch.image, image, mask, step.world)
        else:
            losses["mim"] = _code_loss(model, batch.image, mask, step.world, codes)
    if step.fuses:
        losses |= step.fuse(texts, model.image_memory(image))
    return losses


def _regions(step: Step) -> dict[str, Tensor]:
    model, batch = step.model, step.batch
    assert isinstance(batch, RegionBatch)
    own, images = model.encode_region_tokens(batch.image, batch.image_index, batch.region_mask)
    losses, texts = step.contrast(own, None)
    if step.fuses:
        losses |= step.fuse(texts, region_memory(model, batch, own, images, boxes=step.boxes))
    return losses
