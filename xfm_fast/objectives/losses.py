"""The losses of X-FM as pure functions: contrastive, matching, masked language, masked images, boxes.

Sampling of hard negatives for matching is here too, and the process group that shares a global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.batches import IGNORED
from xfm_fast.errors import InputError
from xfm_fast.kernels import host, ops, reference
from xfm_fast.kernels.losses import race


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    image_ids: Tensor | None = None,
) -> Tensor:
    """Compute the image-text contrastive loss (ITC) of L2-normalised features `[B, E]`.

    It is averaged over both directions. Texts with equal `image_ids` `[B]` share the target probability
    of their image. For several processes see `contrastive_rows`. Raises `InputError` for mismatched
    shapes.
    """
    check_features(image_features, text_features, image_ids)
    logits = image_features @ text_features.t() / temperature
    if image_ids is None:
        targets = torch.arange(logits.shape[0], device=logits.device)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2
    same = (image_ids[:, None] == image_ids[None, :]).to(logits.dtype)
    shares = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, shares) + F.cross_entropy(logits.t(), shares)) / 2


def contrastive_rows(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    gathered: AllPairs,
    image_ids: Tensor | None = None,
) -> Tensor:
    """Compute this process's rows of `contrastive_loss` over the pairs of all processes.

    Takes two `[B, G]` GEMMs, never `[G, G]`. The mean of the result over processes is the loss of the
    global batch. Raises `InputError` for mismatched shapes.
    """
    check_features(image_features, text_features, image_ids)
    check_features(gathered.image_features, gathered.text_features, gathered.image_ids)
    rows = image_features.shape[0]
    if image_ids is None:
        targets = torch.arange(gathered.first, gathered.first + rows, device=image_features.device)
    else:
        same = gathered.same_image(image_ids, rows).to(image_features.dtype)
        targets = same / same.sum(1, keepdim=True)
    to_texts = image_features @ gathered.text_features.t() / temperature
    to_images = text_features @ gathered.image_features.t() / temperature
    return (F.cross_entropy(to_texts, targets) + F.cross_entropy(to_images, targets)) / 2


class AllPairs(NamedTuple):
    """Pairs of all processes, gathered on one of them."""

    image_features: Tensor
    """`[G, E]`, rank by rank, gathered by an operation whose gradient is summed over processes."""
    text_features: Tensor
    """`[G, E]`."""
    first: int
    """Index of this process's first pair."""
    image_ids: Tensor | None = None
    """`[G]`; None when all images differ."""

    def same_image(self, image_ids: Tensor | None, rows: int) -> Tensor:
        """Mark the pairs that share their image with each of this process's pairs: boolean `[B, G]`."""
        if image_ids is not None and self.image_ids is not None:
            return image_ids[:, None] == self.image_ids[None, :]
        columns = torch.arange(self.image_features.shape[0], device=self.image_features.device)
        return columns[None, :] == columns[self.first : self.first + rows, None]


def check_features(image_features: Tensor, text_features: Tensor, image_ids: Tensor | None) -> None:
    """Raise InputError unless the features are `[B, E]` of B pairs, with B ids."""
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise InputError(
            f"image features are {[*image_features.shape]}, text features {[*text_features.shape]}; give two [B, E]"
        )
    if image_ids is not None and image_ids.shape != image_features.shape[:1]:
        raise InputError(
            f"image_ids are {[*image_ids.shape]}; give one for each of the {image_features.shape[0]} pairs"
        )


def matching_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """Compute the image-text matching loss (ITM): mean cross-entropy of logits `[P, 2]`.

    Column 1 scores pairs that match (`matches` `[P]`).
    """
    if logits.ndim != 2 or logits.shape[1] != 2 or matches.shape != logits.shape[:1]:
        raise InputError(
            f"logits are {[*logits.shape]} and matches {[*matches.shape]}; they must be [P, 2] and [P]"
        )
    return F.cross_entropy(logits, matches.long())


class HardNegatives(NamedTuple):
    """One negative image and one negative text for every pair of a batch."""

    images: Tensor
    """`[B]` int64: the image that text b does not describe."""
    texts: Tensor
    """`[B]` int64: the text that does not describe image b."""


@torch.no_grad()
def hard_negative_weights(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    image_ids: Tensor | None = None,
    gathered: AllPairs | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute unnormalised sampling weights of negatives, `softmax + 1e-5` of the similarities.

    Returns two `[B, G]` without gradient: row b of the first weighs images for text b, row b of the
    second texts for image b. The pair itself and pairs with equal `image_ids` `[B]` have weight zero.
    `gathered` are the G pairs of all processes; by default the B pairs.
    """
    check_features(image_features, text_features, image_ids)
    if gathered is None:
        gathered = AllPairs(image_features, text_features, 0, image_ids)
    excluded = gathered.same_image(image_ids, image_features.shape[0])
    to_images = text_features @ gathered.image_features.t() / temperature
    to_texts = image_features @ gathered.text_features.t() / temperature
    return (
        reference.hard_negative_weights(to_images, excluded),
        reference.hard_negative_weights(to_texts, excluded),
    )


@torch.no_grad()
def sample_hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    image_ids: Tensor | None = None,
    *,
    gathered: AllPairs | None = None,
    generator: torch.Generator | None = None,
) -> HardNegatives:
    """Draw one negative image per text and one negative text per image, with `hard_negative_weights`.

    All rows are drawn at once by an exponential race (`argmax(weight / Exp(1))` has the distribution of
    `torch.multinomial`), without a synchronisation. `gathered` are the pairs of all processes, over which
    negatives are numbered. Raises `InputError` if a pair has no candidate (a batch of one pair, or of a
    single image); on an accelerator the second case is a device-side assertion.
    """
    image_weights, text_weights = hard_negative_weights(
        image_features, text_features, temperature, image_ids, gathered
    )
    pairs = image_weights.shape[1]
    if pairs < 2:
        raise InputError(f"{pairs} pair(s) have no negative; hard negatives need at least 2 pairs")
    if image_ids is not None:
        # The exclusion is symmetric, so a text without images is an image without texts.
        filled = (image_weights > 0).any(1)
        message = "all pairs have the same image; put at least two images into a batch"
        if filled.device.type != "cpu":
            torch._assert_async(filled.all(), message)
        elif not host.all_true(filled):
            pair = host.integer(filled.long().argmin())
            raise InputError(
                f"pair {pair} (image id {host.integer(image_ids[pair])}) has no negative: {message}"
            )
    return HardNegatives(race(image_weights, generator), race(text_weights, generator))


def masked_lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean cross-entropy of logits `[..., vocabulary]` at `targets` `[...]` other than -100.

    Zero without targets, where the official code gives NaN.
    """
    if logits.shape[:-1] != targets.shape:
        raise InputError(
            f"logits are {[*logits.shape]} and targets {[*targets.shape]}; give a target per row"
        )
    summed = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return summed / (targets != IGNORED).sum().clamp_min(1)


def masked_token_loss(
    hidden: Tensor, word_embeddings: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """Compute `masked_lm_loss` of `hidden word_embeddings^T + bias`, without storing all logits.

    `hidden` `[..., width]` is the output of the head's transform. On CPU, targets outside of the
    vocabulary raise `InputError`.
    """
    if hidden.shape[:-1] != targets.shape:
        raise InputError(
            f"hidden is {[*hidden.shape]} and targets {[*targets.shape]}; give a target per row"
        )
    try:
        loss = ops.linear_cross_entropy(
            hidden, word_embeddings, bias, targets, ignore_index=IGNORED
        )
    except IndexError as error:
        raise InputError(
            f"labels lie outside of the vocabulary of {word_embeddings.shape[0]}: {error}"
        ) from None
    return loss if targets.numel() else loss.nan_to_num()


def masked_image_loss(
    masked_embeds: Tensor, target_embeds: Tensor, patch_mask: Tensor, *, patches_only: bool = False
) -> Tensor:
    """Compute the loss of masked image modelling: the mean squared error of a masked image's encoding.

    The target, the encoding of the unmasked image, is detached: this is how vision-language training
    guides the vision encoder. Embeddings are `[B, 1 + N, D]`, `patch_mask` `[B, N]` is non-zero at hidden
    patches. The result is the mean over hidden patches (zero without any; NaN in the official code) plus
    the mean over image tokens, which `patches_only` omits; the official option for that is called
    `mim_cls_only`, the opposite of what it does.
    """
    patches, token = masked_image_terms(masked_embeds, target_embeds, patch_mask)
    return patches if patches_only else patches + token


def masked_image_terms(
    masked_embeds: Tensor, target_embeds: Tensor, patch_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the terms of `masked_image_loss`: of the hidden patches, and of the image tokens."""
    shape = masked_embeds.shape
    if len(shape) != 3 or patch_mask.shape != (shape[0], shape[1] - 1):
        raise InputError(
            f"embeddings are {[*masked_embeds.shape]}, patch_mask {[*patch_mask.shape]}; give [B, 1 + N, D] and [B, N]"
        )
    if masked_embeds.shape != target_embeds.shape:
        raise InputError(
            f"embeddings are {[*masked_embeds.shape]} and {[*target_embeds.shape]}; give two of one shape"
        )
    target = target_embeds.detach()
    # A weighted mean: boolean indexing would synchronise for the size of its result.
    hidden = patch_mask.bool()[:, :, None]
    squared = (masked_embeds[:, 1:] - target[:, 1:]).square()
    count = hidden.sum().clamp_min(1) * masked_embeds.shape[-1]
    patches = squared.masked_fill(~hidden, 0).sum() / count
    return patches, F.mse_loss(masked_embeds[:, 0], target[:, 0])


def _check_boxes(predicted: Tensor, target: Tensor, is_image: Tensor | None) -> None:
    if predicted.ndim != 2 or predicted.shape[1] != 4 or predicted.shape != target.shape:
        raise InputError(
            f"boxes are {[*predicted.shape]} and {[*target.shape]}; both must be [R, 4]: (cx, cy, w, h)"
        )
    if is_image is not None and is_image.shape != predicted.shape[:1]:
        raise InputError(
            f"is_image is {[*is_image.shape]}; give one for each of the {predicted.shape[0]} boxes"
        )


def _mean_over_boxes(loss: Tensor, is_image: Tensor | None) -> Tensor:
    """Average the loss over boxes, excluding whole images."""
    if is_image is None:
        return loss.sum() / max(loss.shape[0], 1)
    excluded = is_image.bool()
    return loss.masked_fill(excluded, 0).sum() / (~excluded).sum().clamp_min(1)


def box_l1_loss(predicted: Tensor, target: Tensor, is_image: Tensor | None = None) -> Tensor:
    """Compute the L1 distance of boxes `[R, 4]` (cx, cy, w, h), averaged over boxes.

    Captions of whole images (`is_image` `[R]` non-zero) do not count; zero if no box counts (NaN in the
    official code).
    """
    _check_boxes(predicted, target, is_image)
    return _mean_over_boxes((predicted - target).abs().sum(1), is_image)


def box_giou_loss(predicted: Tensor, target: Tensor, is_image: Tensor | None = None) -> Tensor:
    """Compute `1 - GIoU` (arXiv 1902.09630), averaged over boxes; arguments and result as `box_l1_loss`.

    Degenerate boxes count as in `generalized_iou`. The official code sets the loss of the *whole batch*
    to zero if one box has a negative side, and gives NaN for two coinciding boxes without area.
    """
    _check_boxes(predicted, target, is_image)
    return _mean_over_boxes(1 - generalized_iou(predicted, target), is_image)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the generalised IoU of boxes (cx, cy, w, h), elementwise: `[R]` in [-1, 1].

    Negative sides count as zero. Two boxes without area have IoU 0, and GIoU 0 if their hull has no area;
    gradients stay finite in all cases.
    """
    low_a, high_a, area_a = _corners(a)
    low_b, high_b, area_b = _corners(b)
    overlap = torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)
    intersection = overlap.clamp_min(0).prod(1)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(1)
    union = area_a + area_b - intersection
    return _quotient(intersection, union) - _quotient(hull - union, hull)


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the low and high corners of boxes, and their areas."""
    centre, sides = boxes[:, :2], boxes[:, 2:].clamp_min(0)
    low, high = centre - sides / 2, centre + sides / 2
    # Areas of the corners round like intersection, union and hull, so identical boxes get 1.
    return low, high, (high - low).prod(1)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, with 0 and a finite gradient where the denominator is 0."""
    empty = denominator <= 0
    return (numerator / denominator.masked_fill(empty, 1)).masked_fill(empty, 0)


@dataclass(frozen=True)
class World:
    """Processes that share a global batch; a single process sends no messages."""

    group: dist.ProcessGroup | None = None  # None for the default process group
    size: int = 1  # W processes
    rank: int = 0

    @classmethod
    def of(cls, group: dist.ProcessGroup | None = None) -> World:
        """Wrap a group, by default the default one if torch.distributed is initialised."""
        if group is None and not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(group, dist.get_world_size(group), dist.get_rank(group))

    def gather(self, rows: Tensor) -> Tensor:
        """Gather `[B, ...]` of every process as `[W * B, ...]`, rank by rank, without gradient."""
        if self.size == 1:
            return rows.detach()
        rows = rows.detach().contiguous()
        gathered = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        # Newer versions of PyTorch rename the function and warn about the old name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(gathered, rows, group=self.group)
        return gathered

    def gather_with_gradient(self, rows: Tensor) -> Tensor:
        """Gather with the true gradient: the sum of all processes' gradients of this process's rows."""
        return rows if self.size == 1 else _Gather.apply(rows, self)

    def counts(self, **local: Tensor) -> dict[str, Tensor]:
        """Gather integers of every process, each `[W]`, in one message."""
        gathered = self.gather(torch.stack([count.long() for count in local.values()])[None])
        return dict(zip(local, gathered.unbind(1), strict=True))

    def mean(self, mean: Tensor, counts: Tensor) -> Tensor:
        """Weigh a mean over this process's targets so that the mean over processes is the global mean.

        `counts` `[W]` are the targets of every process.
        """
        if self.size == 1:
            return mean
        # Integers divided by integers would be rounded to fp32.
        count = counts[self.rank].to(mean.dtype)
        return mean * (count * self.size / counts.sum().clamp_min(1))


def check_equal(counts: dict[str, Tensor]) -> None:
    """Check that every process has the same counts (each `[W]`), which determine message sizes.

    Raises `InputError`; on an accelerator it is a device-side assertion, which does not synchronise.
    """
    advice = "give every process batches of the same size and drop the last incomplete one"
    for name, by_process in counts.items():
        same = by_process == by_process[0]
        if same.device.type != "cpu":
            torch._assert_async(same.all(), f"the processes differ in {name}: {advice}")
        elif not host.all_true(same):
            listed = ", ".join(map(str, host.integers(by_process)))
            raise InputError(f"the processes differ in {name} ({listed}): {advice}")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, rows.shape[0]
        return world.gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # An all-reduce of features is small, and unlike reduce-scatter every backend has it.
        total = gradients[0].contiguous()
        if total is gradients[0]:
            total = total.clone()
        dist.all_reduce(total, group=ctx.world.group)
        return total.narrow(0, ctx.world.rank * ctx.rows, ctx.rows), None


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class HostCopy:
    """An asynchronous copy of device values to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensors = tensors
        if any(tensor.device.type != "cpu" for tensor in tensors):
            self._tensors = tuple(t.to("cpu", non_blocking=True) for t in tensors)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the copy; returns the tensors on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
