"""Weakly supervised grounding: heat maps of a retrieval model select among detector boxes.

Training is that of retrieval on images and expressions. A heat map is gradient times attention (Grad-CAM, arXiv
1610.02391; on cross-attention in ALBEF, arXiv 2107.07651) of one fusion layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from xfm_fast.data.annotations import AnnotationRows, RetrievalRecord, check_images
from xfm_fast.data.files import unreadable
from xfm_fast.data.images import image_size
from xfm_fast.errors import DataError, InputError
from xfm_fast.io import read_json
from xfm_fast.models import inputs
from xfm_fast.models.processor import evaluating
from xfm_fast.models.xfm import XFM
from xfm_fast.packing import ImageGroups, Packing
from xfm_fast.tasks.evaluation import Row
from xfm_fast.tasks.grounding import (
    GroundingRecord,
    GroundingTask,
    check_boxes,
    expressions_of,
    grounding_rows,
)
from xfm_fast.tasks.retrieval import PairOptions, PairTask
from xfm_fast.tasks.task import Item, TaskModel, group_by_image, register, unique_images


class WeakGroundingOptions(PairOptions):
    """Weakly supervised grounding."""

    kind: Literal["weak_grounding"] = "weak_grounding"
    free = ("layer",)
    layer: int | None = Field(
        default=None,
        ge=0,
        description="fusion layer of the heat map; default: the last of the first half",
    )


class DetectedRecord(GroundingRecord):
    """An expression with the detector boxes of its image."""

    detected: tuple[tuple[float, float, float, float], ...]


@register
class WeakGroundingTask(PairTask[WeakGroundingOptions]):
    """Splits list expression files as in grounding, plus a JSON file of detections.

    Detections name an image by path, file name or COCO id. Training images are whole, because a crop may remove the
    referred object.
    """

    Options, Session = WeakGroundingOptions, None
    truth = "bbox"
    metrics = GroundingTask.metrics
    metrics_of: Any = GroundingTask.metrics_of
    score: Any = GroundingTask.score
    takes_weights_of = ("retrieval",)
    crop = None

    def rows(self, paths: Sequence[Path]) -> Sequence[AnnotationRows[Any]]:
        return [expressions_of(rows, training=True) for rows in grounding_rows(paths)]

    def records(self, paths: Sequence[Path], split: str) -> list[DetectedRecord]:
        detections: dict[Path, dict[str, Tensor]] = {}
        for path in paths:
            with suppress(DataError):
                detections |= {path: read_detections(path)} if path.suffix == ".json" else {}
        if not detections:
            raise DataError(
                f"data.splits.{split} lists no detections; add the JSON of boxes by image, such as MAttNet's dets.json"
            )
        expressions = grounding_rows([path for path in paths if path not in detections])
        found = {image: boxes for each in detections.values() for image, boxes in each.items()}
        records = [
            record
            for rows in expressions
            for record in expressions_of(rows, training=False).records()
        ]
        check_images(records, self.images)
        check_boxes(records, self.images, official=self.official_pictures)
        return [
            DetectedRecord.model_validate(
                {**record.model_dump(), "detected": boxes_of(record.image, found).tolist()}
            )
            for record in records
        ]

    def item(self, record: GroundingRecord, rng: np.random.Generator) -> Item:
        # Expressions of one image describe it all, and are no negatives of each other.
        return super().item(
            RetrievalRecord(image=record.image, caption=record.text, image_id=record.image), rng
        )

    def groups(self, records: Sequence[DetectedRecord]) -> list[list[int]]:
        return group_by_image(records)

    def predict(self, model: TaskModel, records: Sequence[DetectedRecord]) -> list[Row]:
        """Rows of `bbox`: the selected detection, (x, y, w, h) in pixels."""
        images, places = unique_images(records)
        texts = [self.caption_ids(record.text, self.options.max_words) for record in records]
        ids, mask = self.padded(texts, model.device)
        # All tokens, `<s>` and `</s>` among them, as in the official code.
        heat = cross_attention_heatmap(
            model, self.pixels_of(images, model), ids, mask, layer=self.options.layer, tokens=mask,
            image_index=torch.tensor(places, device=model.device),
        ).cpu()  # fmt: skip
        sizes = {
            image: image_size(self.images / image, official=self.official_pictures)
            for image in images
        }
        return [
            {"bbox": list(record.detected[best_box(of_text, record.detected, sizes[record.image])])}
            for of_text, record in zip(heat, records, strict=True)
        ]

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[DetectedRecord]:
        raise InputError(
            "this model chooses among detections: xfm-fast predict RUN FILE TEXT --heatmap OUT.png --detections JSON"
        )


def boxes_of(image: str, detections: Mapping[str, Tensor]) -> Tensor:
    """Detections of an image, `[N, 4]`; none raise `DataError` with the names tried."""
    path = Path(image)
    names = (image, path.name, path.stem.rpartition("_")[2].lstrip("0") or "0")
    boxes = next((detections[name] for name in names if name in detections), None)
    if boxes is None or not len(boxes):
        raise DataError(
            f"the detections have no box for the image {' or '.join(dict.fromkeys(names))}; add some"
        )
    return boxes


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
    """Heat maps `[P, grid, grid]` of P texts: non-negative, detached.

    With the matching head: positive gradient of the match logit times attention probability, averaged over heads and
    text tokens. A `GroundingModel` uses the gradient magnitude summed over the four box coordinates instead. `layer`
    defaults to the last of the first half (as in ALBEF); `tokens` `[P, L]` defaults to all but the first and last
    token; `image_index` `[P]` maps texts to images. Dropout is disabled; the model and its gradients are unchanged.
    """
    config = model.config
    if "boxes" not in model.heads:
        model.require_head("matching")
    # The caller may be in inference mode, where tensors have no gradients.
    with torch.inference_mode(False), evaluating(model):
        mask = inputs.check_tokens(input_ids, attention_mask, config)
        memory = model.image_memory(model.encode_image(pixels))
        text = model.encode_text(input_ids, mask)
        number = max(0, config.fusion_layers // 2 - 1) if layer is None else layer
        chosen = _chosen(mask, tokens, number, config.fusion_layers)
        with torch.enable_grad(), _explicit_cross_attention(model, number) as recorded:
            fused = model.fuse(text, mask, memory, image_index)
            # Not `first_token_only`: if the last layer is chosen, all its tokens are needed.
            fused = fused[
                torch.arange(len(fused), device=fused.device), mask.long().argmax(1), None
            ]
            (probabilities,) = recorded
            if "matching" in model.heads:
                (gradient,) = torch.autograd.grad(
                    model.match_logits(fused)[:, 1].sum(), probabilities
                )
                weight = gradient.clamp_min(0)
            else:
                sums = model.predict_boxes(fused).sum(0)
                # A magnitude for every coordinate takes a pass for every coordinate.
                gradients = [
                    torch.autograd.grad(each, probabilities, retain_graph=True)[0] for each in sums
                ]
                weight = torch.stack([gradient.abs() for gradient in gradients]).sum(0)
        heat = (weight * probabilities.detach()).mean(0)
        # The fusion encoder has the texts in the order of their images.
        order = (
            None
            if image_index is None
            else ImageGroups.from_index(image_index, memory.images).order
        )
        per_token = Packing.from_mask(mask, order=order).unpad(heat)
        mean = (per_token * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True)
        return mean[:, 1:].unflatten(1, (config.grid, config.grid))


@contextmanager
def _explicit_cross_attention(model: XFM, layer: int) -> Iterator[list[Tensor]]:
    """Run one fusion layer's cross-attention unfused, and yield a list that records its probabilities.

    Each pass appends `[H, T, M]`: heads, packed text tokens in image order, image tokens. The probabilities are leaves
    of the graph.
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
        key_mask: None = None,
    ) -> Tensor:
        """`TransformerLayer.cross_attention`, image by image."""
        x, attention = x.detach(), block.crossattention
        q = attention.self.project_query(x)
        k, v = keys_values.detach().unbind(-3)
        spans = list(zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True))
        scores = [
            torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
            for (a, b), (c, d) in spans
        ]
        probabilities = (
            torch.cat([each.softmax(-1) for each in scores], dim=1).detach().requires_grad_()
        )
        recorded.append(probabilities)
        context = [
            torch.einsum("hqk,khd->qhd", probabilities[:, a:b], v[c:d]) for (a, b), (c, d) in spans
        ]
        return attention.output(torch.cat(context).flatten(-2), x)

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


def _chosen(mask: Tensor, tokens: Tensor | None, layer: int, layers: int) -> Tensor:
    """Text tokens that count, `[P, L]` boolean."""
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
        where = (
            "is nothing but <s> and </s>"
            if tokens is None
            else "has no token among those of `tokens`"
        )
        raise InputError(
            f"text {int(empty.long().argmax())} {where}; choose at least one real token of it"
        )
    if layer == layers - 1 and not bool(chosen.gather(1, first[:, None]).all()):
        raise InputError(
            f"layer={layer} is the last, where the heads read only token 0; "
            "choose an earlier layer, or tokens that include the first of every text"
        )
    return chosen


def overlay(picture: Image.Image, heatmap: Tensor) -> Image.Image:
    """Blend a heat map `[h, w]` over its picture at full size; black is cold, white is hot."""
    width, height = picture.size
    smooth = F.interpolate(heatmap.float()[None, None], size=(height, width), mode="bilinear")[
        0, 0
    ].clamp_min(0)
    levels = (
        (255 * smooth / smooth.max().clamp_min(torch.finfo(smooth.dtype).tiny))
        .round()
        .to(torch.uint8)
    )
    colours = ImageOps.colorize(
        Image.fromarray(levels.numpy()), black="black", mid="darkorange", white="white"
    )
    return Image.blend(picture.convert("RGB"), colours, 0.5)


def best_box(
    heatmap: Tensor, boxes: Tensor | Sequence[Sequence[float]], size: tuple[int, int]
) -> int:
    """Index of the (x, y, w, h) box with the largest heat sum over the square root of its area.

    As in ALBEF's RefCOCO+ evaluation: the map is upsampled bicubically to `size` (width, height); box corners are
    floored.
    """
    found = torch.as_tensor(boxes, dtype=torch.float64).cpu()
    width, height = size
    if heatmap.ndim != 2 or min(width, height) < 1:
        raise InputError(
            f"heatmap is {[*heatmap.shape]} and size {size}; they must be [h, w], and (width, height) in pixels"
        )
    if (
        found.ndim != 2
        or not found.shape[0]
        or found.shape[1] != 4
        or not bool((found[:, 2:] > 0).all())
    ):
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


def read_detections(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Detector boxes `[N, 4]` float64 (x, y, w, h in pixels) by image id or path.

    Formats: MAttNet's list of `{"image_id" or "image": …, "box": [x, y, w, h]}`, or ALBEF's object `{image: [[x, y, w,
    h], …]}`; further numbers are ignored.
    """
    path = Path(path)
    try:
        content = read_json(path)
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); write it again") from None
    if isinstance(content, list):
        named = [each if isinstance(each, dict) else {} for each in content]
        boxes = [
            (
                f"element {number} counting from 0",
                each.get("image_id", each.get("image")),
                each.get("box"),
            )
            for number, each in enumerate(named)
        ]
    else:
        lists = content.items() if isinstance(content, dict) else ()
        boxes = [
            (f"image {image}, box {number}", image, box)
            for image, of_image in lists
            for number, box in enumerate(of_image if isinstance(of_image, list) else [of_image])
        ]
    if not boxes:
        raise DataError(
            f"{path} holds no detections; expected a list of them, or an object of lists by image"
        )
    found: dict[str, list[list[float]]] = {}
    for where, image, box in boxes:
        first = box[:4] if isinstance(box, list) else []
        numbers = [
            float(each)
            for each in first
            if isinstance(each, int | float) and not isinstance(each, bool)
        ]
        if len(numbers) < 4 or not np.isfinite(numbers).all() or min(numbers[2:]) <= 0:
            raise DataError(
                f"{path}, {where}: box {box!r} is none; expected [x, y, w, h] in pixels, w and h above 0"
            )
        if not isinstance(image, str | int):
            raise DataError(
                f"{path}, {where} has image_id={image!r}; expected the image's id or path"
            )
        found.setdefault(str(image), []).append(numbers)
    return {image: torch.tensor(of_image, dtype=torch.float64) for image, of_image in found.items()}
