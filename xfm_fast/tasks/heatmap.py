"""Heat maps: which patches of an image a model's answer about a text rests on; and boxes chosen by them.

Gradient times attention (Grad-CAM, arXiv 1610.02391, on cross-attention as in ALBEF, arXiv 2107.07651): of one layer of
the fusion encoder, the attention of every text token to every patch, times what more of it would add to the output.
Given the boxes of a detector, the one with most heat grounds a text without the model ever having seen a box.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from xfm_fast.data.files import unreadable
from xfm_fast.documents import read_json
from xfm_fast.errors import DataError, InputError
from xfm_fast.models import inputs
from xfm_fast.models.processor import evaluating
from xfm_fast.models.text import TransformerLayer
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Packing
from xfm_fast.tasks.grounding import pixel_iou


def cross_attention_heatmap(
    model: XFM,
    pixels: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layer: int | None = None,
    tokens: Tensor | None = None,
    image_index: Tensor | None = None,
) -> Tensor:
    """The heat of every patch, for P texts.

    With the matching head, it is the positive gradient of the logit of "text describes image" times the attention
    probability, mean over heads and text tokens. A `GroundingModel` has no such head, and a box coordinate has no
    direction that speaks for the text (more of cx is further right), so there it is the sum over the four coordinates
    of the gradient's magnitude, times the probability: the patches that the box depends on.

    The chosen layer's attention is computed by its definition, since the fused one never has the probabilities; dropout
    is off meanwhile. The model, its gradients included, is left as it was.

    Args:
        model: with the matching head, or else the box head.
        pixels: `[B, 3, R, R]`.
        input_ids: `[P, L]`.
        attention_mask: `[P, L]`, non-zero for real tokens; by default everything but padding.
        layer: of the fusion encoder, from 0; by default the last of its first half, as in ALBEF. Of the last layer the
            heads read token 0 alone.
        tokens: `[P, L]`, non-zero for the text tokens that count; by default all but the first and last of each text,
            which are `<s>` and `</s>`.
        image_index: `[P]` image of each text; by default text b belongs to image b.

    Returns:
        `[P, grid, grid]` not negative, without gradient: rows from the top, columns from the left.

    Raises:
        InputError: a layer that does not exist, or texts without a token that counts.
        UnavailableError: a model without fusion layers, or with neither head.
    """
    config = model.config
    if "boxes" not in model.heads:
        model.require_head("matching")
    # The caller may be in inference mode, whose tensors take part in no gradient.
    with torch.inference_mode(False), evaluating(model):
        mask = inputs.check_tokens(input_ids, attention_mask, config)
        memory = model.image_memory(model.encode_image(pixels))
        text = model.encode_text(input_ids, mask)
        number = max(0, config.fusion_layers // 2 - 1) if layer is None else layer
        chosen = _chosen(mask, tokens, number, config.fusion_layers)
        with torch.enable_grad(), explicit_cross_attention(model, number) as recorded:
            fused = model.fuse(text, mask, memory, image_index)
            # Not `first_token_only`: of a last layer that is the chosen one, the other tokens are wanted as well.
            fused = fused[torch.arange(len(fused), device=fused.device), mask.long().argmax(1), None]
            (probabilities,) = recorded
            if "matching" in model.heads:
                (gradient,) = torch.autograd.grad(model.match_logits(fused)[:, 1].sum(), probabilities)
                weight = gradient.clamp_min(0)
            else:
                sums = model.predict_boxes(fused).sum(0)
                # A magnitude for every coordinate takes a pass for every coordinate.
                gradients = [torch.autograd.grad(each, probabilities, retain_graph=True)[0] for each in sums]
                weight = torch.stack([gradient.abs() for gradient in gradients]).sum(0)
        heat = (weight * probabilities.detach()).mean(0)
        # The fusion encoder has the texts in the order of their images.
        order = None if image_index is None else ImageGroups.from_index(image_index, memory.images).order
        per_token = Packing.from_mask(mask, order=order).unpad(heat)
        mean = (per_token * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)
        return mean[:, 1:].unflatten(1, (config.grid, config.grid))


@contextmanager
def explicit_cross_attention(model: XFM, layer: int) -> Iterator[list[Tensor]]:
    """Run the cross-attention of one fusion layer by its plain definition, and record its probabilities.

    Gradients end at the probabilities, which are a leaf: what comes before them is not part of the graph.

    Yields:
        A list that every pass of the fusion encoder appends to: `[H, T, M]` probabilities of H heads, T packed text
        tokens in the order of their images, and the M tokens of the image that each one sees.

    Raises:
        InputError: a layer that does not exist.
    """
    layers = model.config.fusion_layers
    if not 0 <= layer < layers:
        raise InputError(f"layer={layer}: the fusion encoder has layers 0 to {layers - 1}")
    block = model.fusion_encoder.roberta.encoder[layer]
    recorded: list[Tensor] = []

    def cross_attention(
        x: Tensor,
        keys_values: Tensor,
        cu_queries: Tensor,
        cu_keys: Tensor,
        longest: int,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        return _attend(block, x.detach(), keys_values.detach(), cu_queries, cu_keys, key_mask, recorded)

    own = vars(block)
    former = own.get("cross_attention")
    own["cross_attention"] = cross_attention
    try:
        yield recorded
    finally:
        if former is None:
            del own["cross_attention"]
        else:
            own["cross_attention"] = former


def _attend(
    block: TransformerLayer,
    x: Tensor,
    keys_values: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    key_mask: Tensor | None,
    recorded: list[Tensor],
) -> Tensor:
    """`TransformerLayer.cross_attention`, image by image; every image has the same number of tokens."""
    attention = block.crossattention
    q = attention.self.project_query(x)
    k, v = keys_values.unbind(-3)
    spans = list(zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True))
    found: list[Tensor] = []
    for (q_start, q_stop), (k_start, k_stop) in spans:
        scores = torch.einsum("qhd,khd->hqk", q[q_start:q_stop], k[k_start:k_stop]) * q.shape[-1] ** -0.5
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[k_start:k_stop], -torch.inf)
        # A query without any key to attend to gets zeros.
        found.append(scores.softmax(-1).nan_to_num())
    probabilities = torch.cat(found, dim=1).detach().requires_grad_()
    recorded.append(probabilities)
    context = torch.cat(
        [
            torch.einsum("hqk,khd->qhd", probabilities[:, q_start:q_stop], v[k_start:k_stop])
            for (q_start, q_stop), (k_start, k_stop) in spans
        ]
    )
    return attention.output(context.flatten(-2), x)


def _chosen(mask: Tensor, tokens: Tensor | None, layer: int, layers: int) -> Tensor:
    """The text tokens that count, `[P, L]` boolean."""
    length = mask.shape[1]
    first = mask.long().argmax(1)
    if tokens is None:
        last = length - 1 - mask.flip(1).long().argmax(1)
        places = torch.arange(length, device=mask.device)
        chosen = mask & (places != first[:, None]) & (places != last[:, None])
    elif tokens.shape != mask.shape:
        raise InputError(f"tokens is {[*tokens.shape]}; the texts are {[*mask.shape]}")
    else:
        chosen = mask & tokens.bool()
    empty = ~chosen.any(1)
    if bool(empty.any()):
        where = "is nothing but <s> and </s>" if tokens is None else "has no token among those of `tokens`"
        raise InputError(f"text {int(empty.long().argmax())} {where}; choose at least one real token of it")
    if layer == layers - 1 and not bool(chosen.gather(1, first[:, None]).all()):
        raise InputError(
            f"layer={layer} is the last, of which the heads read token 0 alone: all other tokens are without heat; "
            "choose an earlier layer, or tokens that include the first of every text"
        )
    return chosen


def overlay(picture: Image.Image, heatmap: Tensor | NDArray[Any]) -> Image.Image:
    """The heat map over the picture it is of, at the picture's own size.

    Args:
        picture: of any mode and size; the whole image that the model saw, whose aspect the square input did not keep.
        heatmap: `[h, w]`, not negative; scaled to its largest value.

    Returns:
        An RGB picture, half of it the given one and half the heat's colour: black is cold, white is hottest, and
        brightness grows evenly between.

    Raises:
        InputError: no two-dimensional map, or values that are not finite.
    """
    heat = torch.as_tensor(heatmap).detach().float().cpu()
    if heat.ndim != 2 or not heat.numel() or not bool(torch.isfinite(heat).all()):
        raise InputError(f"heatmap is {[*heat.shape]}; it must be [h, w] of finite values, the map of one text")
    width, height = picture.size
    smooth = F.interpolate(heat[None, None], size=(height, width), mode="bilinear")[0, 0].clamp_min(0)
    largest = float(smooth.max())
    levels = (smooth / largest * 255).round().to(torch.uint8) if largest > 0 else smooth.to(torch.uint8)
    colours = Image.fromarray(_colours()[levels.numpy()])
    return Image.blend(picture.convert("RGB"), colours, 0.5)


@cache
def _colours() -> NDArray[np.uint8]:
    """`[256, 3]` RGB from black to white, by even steps of brightness: cubehelix (Green 2011, BASI 39, 289)."""
    level = np.linspace(0, 1, 256)
    angle = 2 * np.pi * (0.5 / 3 - 1.5 * level)
    radius = level * (1 - level) / 2
    turn = np.array([[-0.14861, 1.78277], [-0.29227, -0.90649], [1.97294, 0.0]])
    rgb = level[:, None] + radius[:, None] * (np.stack([np.cos(angle), np.sin(angle)], axis=1) @ turn.T)
    return np.rint(255 * np.clip(rgb, 0, 1)).astype(np.uint8)


def best_box(heatmap: Tensor, boxes: Tensor | Sequence[Sequence[float]], size: tuple[int, int]) -> int:
    """The detection that a text means: the box with the largest sum of heat over the square root of its area.

    This is the rule of ALBEF's RefCOCO+ evaluation: the map is scaled bicubically to the picture, and a box counts the
    pixels from its corner to its opposite corner, both rounded down.

    Args:
        heatmap: `[h, w]` of the whole picture.
        boxes: `[N, 4]` (x, y, w, h) in pixels of the picture.
        size: (width, height) of the picture in pixels.

    Returns:
        Index of the box, the first one among equals.

    Raises:
        InputError: no boxes, boxes without area, or a map or size that is none.
    """
    found = torch.as_tensor(boxes, dtype=torch.float64).cpu()
    width, height = size
    if heatmap.ndim != 2 or min(width, height) < 1:
        raise InputError(
            f"heatmap is {[*heatmap.shape]} and size {size}; they must be [h, w], and (width, height) in pixels"
        )
    if found.ndim != 2 or not found.shape[0] or found.shape[1] != 4 or not bool((found[:, 2:] > 0).all()):
        raise InputError(
            f"boxes are {[*found.shape]}; they must be [N, 4], at least one, (x, y, w, h) with w and h > 0"
        )
    heat = heatmap.detach().double().cpu()[None, None]
    dense = F.interpolate(heat, size=(height, width), mode="bicubic")[0, 0]
    # Sums of all rectangles that begin in the corner: four of them give the sum of any box.
    corner = F.pad(dense.cumsum(0).cumsum(1), (1, 0, 1, 0))
    bound = torch.tensor([width, height])
    low = found[:, :2].trunc().long().clamp_min(0).minimum(bound)
    high = (found[:, :2] + found[:, 2:]).trunc().long().clamp_min(0).minimum(bound)
    (x0, y0), (x1, y1) = low.t(), high.t()
    inside = corner[y1, x1] - corner[y0, x1] - corner[y1, x0] + corner[y0, x0]
    return int((inside / found[:, 2:].prod(1).sqrt()).argmax())


def detection_accuracy(chosen: Tensor, reference: Tensor, *, threshold: float = 0.5) -> float:
    """Share of texts whose chosen box has at least `threshold` IoU (`pixel_iou`) with the reference.

    Args:
        chosen, reference: `[P, 4]` (x, y, w, h) in pixels.

    Raises:
        InputError: shapes that differ, or no texts.
    """
    if chosen.shape != reference.shape or chosen.ndim != 2 or not chosen.shape[0]:
        raise InputError(f"chosen is {[*chosen.shape]} and reference {[*reference.shape]}; both must be [P, 4], P > 0")
    return float((pixel_iou(chosen.double(), reference.double()) >= threshold).double().mean())


def read_detections(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Boxes of a detector, by image.

    The file is JSON of one of two forms: a list of `{"image_id" or "image": …, "box": [x, y, w, h]}`, as MAttNet writes
    it for RefCOCO (category and score are not read); or an object `{image: [[x, y, w, h], …]}`, as ALBEF reads it
    (numbers behind the first four of a box are not read). Boxes are in pixels of the picture.

    Returns:
        `[N, 4]` float64 of every image, in the order of the file; the name is the id or path as text.

    Raises:
        DataError: a file that cannot be read or has neither form, or a box that is none: says which.
    """
    path = Path(path)
    try:
        content = read_json(path)
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); write it again") from None
    found: dict[str, list[list[float]]] = {}
    if isinstance(content, list):
        for number, element in enumerate(content):
            where = f"{path}, element {number} counting from 0"
            if not isinstance(element, dict):
                raise DataError(f"{where} is a {type(element).__name__}; expected an object with image_id and box")
            image = element.get("image_id", element.get("image"))
            if not isinstance(image, str | int):
                raise DataError(f"{where} has image_id={image!r}; expected the image's id or path")
            found.setdefault(str(image), []).append(_box(element.get("box"), where))
    elif isinstance(content, dict):
        for image, boxes in content.items():
            if not isinstance(boxes, list):
                raise DataError(f"{path}, image {image} holds a {type(boxes).__name__}; expected a list of boxes")
            found[image] = [_box(box, f"{path}, image {image}, box {number}") for number, box in enumerate(boxes)]
    else:
        raise DataError(f"{path} holds a JSON {type(content).__name__}; expected a list of detections, or an object")
    if not found:
        raise DataError(f"{path} holds no detections; give at least one")
    return {image: torch.tensor(boxes, dtype=torch.float64).view(-1, 4) for image, boxes in found.items()}


def _box(value: object, where: str) -> list[float]:
    if isinstance(value, list) and len(value) >= 4:
        numbers = [float(each) for each in value[:4] if isinstance(each, int | float) and not isinstance(each, bool)]
        if len(numbers) == 4 and np.isfinite(numbers).all() and min(numbers[2:]) > 0:
            return numbers
    raise DataError(f"{where}: box {value!r} is none; expected [x, y, w, h] in pixels, w and h above 0")
