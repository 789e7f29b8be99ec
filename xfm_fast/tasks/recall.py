"""R@1/5/10, the metric of image-text retrieval."""

from __future__ import annotations

import torch
from torch import Tensor

from xfm_fast.errors import InputError


def recall(score_i2t: Tensor, score_t2i: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """The official retrieval metric, in percent.

    Ties count against the true answer, so that a pair that was never scored is never a hit; the official code leaves
    their order to an unstable sort.

    Args:
        score_i2t: `[I, T]`; score_t2i: `[T, I]`.
        image_of_text: `[T]` the image that each text describes.

    Returns:
        `txt_r1/5/10` (image to text: the best rank of an image's texts), `img_r1/5/10` (text to image), their means
        `txt_r_mean`, `img_r_mean`, and `r_mean`, the mean of both.
    """
    images, texts = score_i2t.shape
    if score_t2i.shape != (texts, images) or image_of_text.shape != (texts,):
        raise InputError(
            f"score_i2t {[*score_i2t.shape]}, score_t2i {[*score_t2i.shape]} and image_of_text "
            f"{[*image_of_text.shape]} do not belong together; they must be [I, T], [T, I] and [T]"
        )
    if texts and not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < images:
        raise InputError(f"image_of_text names image {int(image_of_text.max())}; there are {images}, numbered from 0")
    positive = image_of_text[None, :] == torch.arange(images)[:, None]
    unmatched = ~positive.any(1)
    if bool(unmatched.any()):
        raise InputError(f"image {int(unmatched.long().argmax())} has no text in image_of_text; leave it out")
    best = score_i2t.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    text_rank = ((score_i2t >= best) & ~positive).sum(1)
    true = score_t2i.gather(1, image_of_text[:, None])
    image_rank = (score_t2i >= true).sum(1) - 1
    result: dict[str, float] = {}
    for name, ranks in (("txt", text_rank), ("img", image_rank)):
        for depth in (1, 5, 10):
            result[f"{name}_r{depth}"] = 100.0 * int((ranks < depth).sum()) / len(ranks)
        result[f"{name}_r_mean"] = sum(result[f"{name}_r{depth}"] for depth in (1, 5, 10)) / 3
    result["r_mean"] = (result["txt_r_mean"] + result["img_r_mean"]) / 2
    return result
