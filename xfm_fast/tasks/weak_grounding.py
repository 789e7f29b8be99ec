"""Weakly supervised grounding: heat maps of a retrieval model select among detector boxes.

Training is that of retrieval on images and expressions. A heat map is gradient times attention
(Grad-CAM, arXiv 1610.02391; on cross-attention in ALBEF, arXiv 2107.07651) of one fusion layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from xfm_fast.tasks.models import TaskModel
from xfm_fast.tasks.retrieval import PairOptions, PairTask
from xfm_fast.tasks.task import Item, Rng, register, unique_images


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

    Detections name an image by path, file name or COCO id. Training images are whole, because a
    crop may remove the referred object.
    """

    Options, Session = WeakGroundingOptions, None
    truth = "bbox"
    metrics = GroundingTask.metrics
    metrics_of: Any = GroundingTask.metrics_of
    score: Any = GroundingTask.score
    takes_weights_of = ("retrieval",)
    groups_by_image = True
    crop = None

    def rows(
        self, paths: Sequence[Path], split: str | None = None
    ) -> Sequence[AnnotationRows[Any]]:
        return [expressions_of(rows, training=split is None) for rows in grounding_rows(paths)]

    def records(self, paths: Sequence[Path], split: str) -> list[DetectedRecord]:
        detections: dict[str, Tensor] = {}
        files = []
        for path in paths:
            boxes = _try_detections(path)
            if boxes is None:
                files.append(path)
            else:
                detections |= boxes
        if len(files) == len(paths):
            raise DataError(
                f"data.splits.{split} lists no detections; add the JSON of boxes by image, such as MAttNet's dets.json"
            )
        expressions = [record for rows in self.rows(files, split) for record in rows.records()]
        check_images(expressions, self.images)
        check_boxes(expressions, self.images, official=self.official_pictures)
        records = []
        for record in expressions:
            boxes = boxes_of(record.image, detections).tolist()
            records.append(
                DetectedRecord.model_validate({**record.model_dump(), "detected": boxes})
            )
        return records

    def item(self, record: GroundingRecord, rng: Rng) -> Item:
        # Expressions of one image describe the same image, and must not be negatives of each other.
        pair = RetrievalRecord(image=record.image, caption=record.text, image_id=record.image)
        return super().item(pair, rng)

    def predict(self, model: TaskModel, records: Sequence[DetectedRecord]) -> list[Row]:
        """Predict rows of `bbox`: the selected detection, (x, y, w, h) in pixels."""
        images, indices = unique_images(records)
        texts = [self.caption_ids(record.text, self.options.max_words) for record in records]
        ids, mask = self.padded(texts, model.device)
        heatmaps = cross_attention_heatmap(
            model,
            self.pixels_of(images, model),
            ids,
            mask,
            layer=self.options.layer,
            # With `<s>` and `</s>`, as in the official code.
            tokens=mask,
            image_index=torch.tensor(indices, device=model.device),
        ).cpu()
        official = self.official_pictures
        sizes = [image_size(self.images / image, official=official) for image in images]
        rows: list[Row] = []
        for heatmap, record, image in zip(heatmaps, records, indices, strict=True):
            selected = best_box(heatmap, record.detected, sizes[image])
            rows.append({"bbox": list(record.detected[selected])})
        return rows

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[DetectedRecord]:
        raise InputError(
            "this model chooses among detections: xfm-fast predict RUN FILE TEXT --heatmap OUT.png --detections JSON"
        )


def _try_detections(path: Path) -> dict[str, Tensor] | None:
    """Read a file of detections; return None for any other file."""
    if path.suffix != ".json":
        return None
    try:
        return read_detections(path)
    except DataError:
        return None


def boxes_of(image: str, detections: Mapping[str, Tensor]) -> Tensor:
    """Look up the detections `[N, 4]` of an image; none raise `DataError` with the names tried."""
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
    """Compute heat maps `[P, grid, grid]` of P texts: non-negative, detached.

    With the matching head: positive gradient of the match logit times attention probability,
    averaged over heads and text tokens. A `GroundingModel` uses the gradient magnitude summed over
    the four box coordinates instead. `layer` defaults to the last of the first half (as in ALBEF);
    `tokens` `[P, L]` defaults to all but the first and last token; `image_index` `[P]` maps texts
    to images. Dropout is disabled; the model and its gradients are unchanged.
    """
    config = model.config
    if "boxes" not in model.heads:
        model.require_head("matching")
    # The caller may be in inference mode, where tensors have no gradients.
    with torch.inference_mode(False), evaluating(model):
        mask = inputs.check_tokens(input_ids, attention_mask, config)
        memory = model.image_memory(model.encode_image(pixels))
        text = model.encode_text(input_ids, mask)
        if layer is None:
            layer = max(0, config.fusion_layers // 2 - 1)
        selected = _select_tokens(mask, tokens, layer, config.fusion_layers)
        with torch.enable_grad(), _explicit_cross_attention(model, layer) as recorded:
            fused = model.fuse(text, mask, memory, image_index)
            # Not `first_token_only`: if `layer` is the last one, all its tokens are needed.
            rows = torch.arange(len(fused), device=fused.device)
            fused = fused[rows, mask.long().argmax(1), None]
            (probabilities,) = recorded
            if "matching" in model.heads:
                logit = model.match_logits(fused)[:, 1].sum()
                (gradient,) = torch.autograd.grad(logit, probabilities)
                weight = gradient.clamp_min(0)
            else:
                # The magnitude of every coordinate needs a backward pass of its own.
                gradients = []
                for coordinate in model.predict_boxes(fused).sum(0):
                    gradients += torch.autograd.grad(coordinate, probabilities, retain_graph=True)
                weight = torch.stack([gradient.abs() for gradient in gradients]).sum(0)
        heat = (weight * probabilities.detach()).mean(0)
        # The fusion encoder has the texts in the order of their images.
        order = None
        if image_index is not None:
            order = ImageGroups.from_index(image_index, memory.images).order
        per_token = Packing.from_mask(mask, order=order).unpad(heat)
        mean = (per_token * selected[..., None]).sum(1) / selected.sum(1, keepdim=True)
        return mean[:, 1:].unflatten(1, (config.grid, config.grid))


@contextmanager
def _explicit_cross_attention(model: XFM, layer: int) -> Iterator[list[Tensor]]:
    """Run a fusion layer's cross-attention unfused; yield a list that records its probabilities.

    Each pass appends `[H, T, M]`: heads, packed text tokens in image order, image tokens. The
    probabilities are leaves of the graph.
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
        """Replace `TransformerLayer.cross_attention`, image by image."""
        x, attention = x.detach(), block.crossattention
        q = attention.self.project_query(x)
        k, v = keys_values.detach().unbind(-3)
        spans = list(zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True))
        softmaxed = []
        for (a, b), (c, d) in spans:
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * q.shape[-1] ** -0.5
            softmaxed.append(scores.softmax(-1))
        probabilities = torch.cat(softmaxed, dim=1).detach().requires_grad_()
        recorded.append(probabilities)
        context = [
            torch.einsum("hqk,khd->qhd", probabilities[:, a:b], v[c:d]) for (a, b), (c, d) in spans
        ]
        return attention.output(torch.cat(context).flatten(-2), x)

    attributes = vars(block)
    previous = attributes.get("cross_attention")
    attributes["cross_attention"] = cross_attention
    try:
        yield recorded
    finally:
        if previous is None:
            del attributes["cross_attention"]
        else:
            attributes["cross_attention"] = previous


def _select_tokens(mask: Tensor, tokens: Tensor | None, layer: int, layers: int) -> Tensor:
    """Return the mask `[P, L]` of the text tokens to average over."""
    length = mask.shape[1]
    first = mask.long().argmax(1)
    if tokens is None:
        last = length - 1 - mask.flip(1).long().argmax(1)
        positions = torch.arange(length, device=mask.device)
        selected = mask & (positions != first[:, None]) & (positions != last[:, None])
        reason = "is nothing but <s> and </s>"
    elif tokens.shape != mask.shape:
        raise InputError(f"tokens is {[*tokens.shape]}; the texts are {[*mask.shape]}")
    else:
        selected = mask & tokens.bool()
        reason = "has no token among those of `tokens`"
    empty = ~selected.any(1)
    if bool(empty.any()):
        raise InputError(
            f"text {int(empty.long().argmax())} {reason}; choose at least one real token of it"
        )
    if layer == layers - 1 and not bool(selected.gather(1, first[:, None]).all()):
        raise InputError(
            f"layer={layer} is the last, where the heads read only token 0; "
            "choose an earlier layer, or tokens that include the first of every text"
        )
    return selected


def overlay(picture: Image.Image, heatmap: Tensor) -> Image.Image:
    """Blend a heat map `[h, w]` over its picture at full size; black is cold, white is hot."""
    width, height = picture.size
    heat = heatmap.float()[None, None]
    heat = F.interpolate(heat, size=(height, width), mode="bilinear")[0, 0].clamp_min(0)
    heat = 255 * heat / heat.max().clamp_min(torch.finfo(heat.dtype).tiny)
    levels = Image.fromarray(heat.round().to(torch.uint8).numpy())
    colours = ImageOps.colorize(levels, black="black", mid="darkorange", white="white")
    return Image.blend(picture.convert("RGB"), colours, 0.5)


def best_box(
    heatmap: Tensor, boxes: Tensor | Sequence[Sequence[float]], size: tuple[int, int]
) -> int:
    """Return the index of the (x, y, w, h) box with the most heat per square root of its area.

    As in ALBEF's RefCOCO+ evaluation: the map is upsampled bicubically to `size` (width, height);
    box corners are floored.
    """
    candidates = torch.as_tensor(boxes, dtype=torch.float64).cpu()
    width, height = size
    if heatmap.ndim != 2 or min(width, height) < 1:
        raise InputError(
            f"heatmap is {[*heatmap.shape]} and size {size}; they must be [h, w], and (width, height) in pixels"
        )
    valid = candidates.ndim == 2 and len(candidates) > 0 and candidates.shape[1] == 4
    if not valid or not bool((candidates[:, 2:] > 0).all()):
        raise InputError(
            f"boxes are {[*candidates.shape]}; they must be [N, 4], at least one, (x, y, w, h) with w and h > 0"
        )
    heat = heatmap.detach().double().cpu()[None, None]
    dense = F.interpolate(heat, size=(height, width), mode="bicubic")[0, 0]
    # Integral image: four of its values give the sum of any box.
    corner = F.pad(dense.cumsum(0).cumsum(1), (1, 0, 1, 0))
    bound = torch.tensor([width, height])
    low = candidates[:, :2].trunc().long().clamp_min(0).minimum(bound)
    high = (candidates[:, :2] + candidates[:, 2:]).trunc().long().clamp_min(0).minimum(bound)
    (x0, y0), (x1, y1) = low.t(), high.t()
    inside = corner[y1, x1] - corner[y0, x1] - corner[y1, x0] + corner[y0, x0]
    return int((inside / candidates[:, 2:].prod(1).sqrt()).argmax())


def read_detections(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read detector boxes `[N, 4]` float64 (x, y, w, h in pixels) by image id or path.

    Formats: MAttNet's list of `{"image_id" or "image": …, "box": [x, y, w, h]}`, or ALBEF's object `{image: [[x, y, w,
    h], …]}`; further numbers are ignored.
    """
    path = Path(path)
    try:
        content = read_json(path)
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); write it again") from None
    # (description for messages, image, box) of each detection.
    detections: list[tuple[str, Any, Any]] = []
    if isinstance(content, list):
        for index, element in enumerate(content):
            fields = element if isinstance(element, dict) else {}
            image = fields.get("image_id", fields.get("image"))
            detections.append((f"element {index} counting from 0", image, fields.get("box")))
    elif isinstance(content, dict):
        for image, boxes in content.items():
            for index, box in enumerate(boxes if isinstance(boxes, list) else [boxes]):
                detections.append((f"image {image}, box {index}", image, box))
    if not detections:
        raise DataError(
            f"{path} holds no detections; expected a list of them, or an object of lists by image"
        )
    boxes_by_image: dict[str, list[list[float]]] = {}
    for where, image, box in detections:
        values = box[:4] if isinstance(box, list) else []
        # JSON's true is an int in Python.
        numbers = [float(value) for value in values if type(value) in (int, float)]
        if len(numbers) < 4 or not np.isfinite(numbers).all() or min(numbers[2:]) <= 0:
            raise DataError(
                f"{path}, {where}: box {box!r} is invalid; expected [x, y, w, h] in pixels, w and h above 0"
            )
        if not isinstance(image, str | int):
            raise DataError(
                f"{path}, {where} has image_id={image!r}; expected the image's id or path"
            )
        boxes_by_image.setdefault(str(image), []).append(numbers)
    return {
        image: torch.tensor(boxes, dtype=torch.float64) for image, boxes in boxes_by_image.items()
    }
