"""Zero-shot evaluation and linear probes of a model trained on the shapes dataset, on held-out combinations.

Retrieval and grounding follow the official procedures. Probes are closed-form ridge regressions, without learning rate,
seed or epochs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from xfm_fast.data.images import evaluation_transform
from xfm_fast.data.shapes import CANVAS, Scene, Split, allowed_pairs, captions, render, scene
from xfm_fast.data.shapes.language import main_relation
from xfm_fast.data.shapes.scenes import COLOURS, SHAPES
from xfm_fast.data.shapes.world import region_elements
from xfm_fast.errors import InputError
from xfm_fast.models.xfm import XFM
from xfm_fast.tasks.grounding import grounding_accuracy
from xfm_fast.tasks.reranking import recall
from xfm_fast.tasks.retrieval import Retriever
from xfm_fast.tokenizer import CaptionTokenizer

RELATIONS = ("left of", "right of", "above", "below")
METRICS = {
    "text_probe": "text probe",
    "image_probe": "image probe",
    "image_to_text_r1": "image → text R@1",
    "text_to_image_r1": "text → image R@1",
    "grounding": "box IoU > 0.5",
}
"""Metrics of the ablations, in percent."""
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties, relative to the mean feature variance, selected on validation rows."""

_BATCH = 64
# Scenes of the training split that no run trains on; worlds are smaller than this.
_UNSEEN = 10_000_000
_OBJECT_STRENGTH = 1e-2
_PROBE_SCENES: dict[Split, int] = {"train": 1000, "val": 300, "test": 400}


@dataclass(frozen=True)
class HeldOut:
    """Evaluation scenes: dataset `seed`, image `resolution`, and number of `scenes` for retrieval and grounding."""

    seed: int
    resolution: int
    scenes: int = 100

    @cached_property
    def retrieval(self) -> list[Scene]:
        """Test scenes with distinct descriptions."""
        found: dict[str, Scene] = {}
        index = 0
        while len(found) < self.scenes:
            made = scene(self.seed, index, "test")
            found.setdefault(captions(made)[0], made)
            index += 1
        return list(found.values())


def evaluate(model: XFM, tokenizer: CaptionTokenizer, held_out: HeldOut) -> dict[str, float]:
    """All metrics in percent: `METRICS`, and their parts after a slash.

    Only linear probes are trained, on frozen embeddings of unseen scenes. Retrieval scores all pairs with the matching
    head.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return (
                _retrieval(model, tokenizer, held_out)
                | _grounding(model, tokenizer, held_out)
                | _text_probe(model, tokenizer, held_out)
                | _image_probe(model, held_out)
            )
    finally:
        model.train(training)


def _pixels(model: XFM, scenes: Sequence[Scene], resolution: int) -> Iterator[Tensor]:
    """Batches `[B, 3, R, R]` with the evaluation transform."""
    transform = evaluation_transform(model.config.image_size)
    for start in range(0, len(scenes), _BATCH):
        images = [Image.fromarray(render(made, resolution)) for made in scenes[start : start + _BATCH]]
        yield torch.stack([transform(image) for image in images]).to(model.device)


def _tokens(model: XFM, tokenizer: CaptionTokenizer, texts: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
    longest = model.config.max_text_length
    for start in range(0, len(texts), _BATCH):
        ids, mask = tokenizer.encode(texts[start : start + _BATCH], longest, pad_to_longest=True)
        yield ids.to(model.device), mask.to(model.device)


def _retrieval(model: XFM, tokenizer: CaptionTokenizer, held_out: HeldOut) -> dict[str, float]:
    scenes = held_out.retrieval
    retriever = Retriever(model)
    images = retriever.embed_images(_pixels(model, scenes, held_out.resolution))
    texts = retriever.embed_texts(_tokens(model, tokenizer, [captions(made)[0] for made in scenes]))
    ranked = retriever.rerank(images, texts, k=len(scenes))
    own = torch.arange(len(scenes))
    similarity = (images.features @ texts.features.t()).cpu()
    matched = recall(ranked.score_i2t.cpu(), ranked.score_t2i.cpu(), own)
    contrastive = recall(similarity, similarity.t(), own)
    return {
        "image_to_text_r1": matched["txt_r1"],
        "text_to_image_r1": matched["img_r1"],
        "image_to_text_r1/contrastive": contrastive["txt_r1"],
        "text_to_image_r1/contrastive": contrastive["img_r1"],
    }


def _grounding(model: XFM, tokenizer: CaptionTokenizer, held_out: HeldOut) -> dict[str, float]:
    texts: list[str] = []
    boxes: list[list[int]] = []
    kinds: list[str] = []
    owners: list[int] = []
    for index, made in enumerate(held_out.retrieval):
        for element in region_elements(made, held_out.resolution):
            caption = element["caption"]
            by_looks = "attributes" in element
            texts.append(f"{element['attributes']} {caption}" if by_looks else caption[0])
            boxes.append(element["bb"])
            kinds.append("attributes" if by_looks else "relations")
            owners.append(index)
    embeds = torch.cat([model.encode_image(p) for p in _pixels(model, held_out.retrieval, held_out.resolution)])
    owner = torch.tensor(owners, device=model.device)
    predicted, start = [], 0
    for ids, mask in _tokens(model, tokenizer, texts):
        images, index = owner[start : start + len(ids)].unique(return_inverse=True)
        memory = model.image_memory(embeds[images])
        fused = model.fuse(model.encode_text(ids, mask), mask, memory, index, first_token_only=True)
        predicted.append(model.predict_boxes(fused).float().cpu())
        start += len(ids)
    sizes = torch.full((len(texts), 2), float(held_out.resolution))
    found, reference = torch.cat(predicted), torch.tensor(boxes, dtype=torch.float32)
    parts = grounding_accuracy(found, sizes, reference, kinds)
    return {
        "grounding": 100 * grounding_accuracy(found, sizes, reference)["all"],
        **{f"grounding/{kind}": 100 * share for kind, share in parts.items()},
    }


def _probe_scenes(held_out: HeldOut, split: Split) -> list[Scene]:
    first = _UNSEEN if split == "train" else 0
    return [scene(held_out.seed, first + index, split) for index in range(_PROBE_SCENES[split])]


def _text_probe(model: XFM, tokenizer: CaptionTokenizer, held_out: HeldOut) -> dict[str, float]:
    """Probes of text token 0 for the order and attributes of the objects."""
    rows: dict[str, Rows] = {}
    for split in _PROBE_SCENES:
        scenes = [made for made in _probe_scenes(held_out, split) if len(made.things) > 1]
        # The first and the third paraphrase name the objects in the order of the scene.
        texts = [captions(made)[index % 2 * 2] for index, made in enumerate(scenes)]
        features = [model.encode_text(ids, mask)[:, 0] for ids, mask in _tokens(model, tokenizer, texts)]
        targets = {
            "relation": [RELATIONS.index(main_relation(*made.things[:2])) for made in scenes],
            "first colour": [COLOURS.index(made.things[0].colour) for made in scenes],
            "first shape": [SHAPES.index(made.things[0].shape) for made in scenes],
        }
        rows[split] = _rows(features, targets)
    classes = {"relation": len(RELATIONS), "first colour": len(COLOURS), "first shape": len(SHAPES)}
    return _probed("text_probe", probe(rows["train"], rows["val"], rows["test"], classes), list(classes))


def _image_probe(model: XFM, held_out: HeldOut) -> dict[str, float]:
    """Probes of the image token for the number, colours and shapes of objects."""
    rows: dict[str, Rows] = {}
    for split in _PROBE_SCENES:
        scenes = _probe_scenes(held_out, split)
        features = [model.encode_image(pixels)[:, 0] for pixels in _pixels(model, scenes, held_out.resolution)]
        targets = {"count": [len(made.things) - 1 for made in scenes]}
        for colour in COLOURS:
            targets[f"colour {colour}"] = [any(t.colour == colour for t in made.things) for made in scenes]
        for shape in SHAPES:
            targets[f"shape {shape}"] = [any(t.shape == shape for t in made.things) for made in scenes]
        rows[split] = _rows(features, targets)
    classes = {task: 3 if task == "count" else 2 for task in rows["train"].targets}
    return _probed(
        "image_probe", probe(rows["train"], rows["val"], rows["test"], classes), ["count", "colour", "shape"]
    )


def shape_probe(model: XFM, held_out: HeldOut) -> dict[str, float]:
    """Balanced accuracy in percent of linear probes for an object's shape, on the image tokens that cover it.

    The probe `training` is fitted on training scenes, where colours predict shapes; `all_pairs` on scenes with random
    shapes. Returns `training/held_out`, `training/common`, `all_pairs/held_out`, `all_pairs/common` (fitted on / tested
    on) and `chance`. `all_pairs` has seen the held-out combinations: it explains a model and does not rank it.
    """
    rng = np.random.default_rng(held_out.seed)

    def redrawn(made: Scene) -> Scene:
        drawn = (SHAPES[rng.integers(len(SHAPES))] for _ in made.things)
        return replace(made, things=tuple(replace(t, shape=s) for t, s in zip(made.things, drawn, strict=True)))

    parts = _PROBE_SCENES["train"], _PROBE_SCENES["train"], _PROBE_SCENES["test"]
    starts = [_UNSEEN + sum(parts[:number]) for number in range(len(parts))]
    drawn = [
        [scene(held_out.seed, first + index, "train") for index in range(count)]
        for first, count in zip(starts, parts, strict=True)
    ]
    with torch.inference_mode():
        training, all_pairs, test = (
            _object_tokens(model, held_out, scenes)
            for scenes in (drawn[0], *([redrawn(made) for made in part] for part in drawn[1:]))
        )
    found = {"chance": 100 / len(SHAPES)}
    held = test.targets["held out"].bool()
    for name, rows in (("training", training), ("all_pairs", all_pairs)):
        fitted = fit_probe(rows.features, rows.targets["shape"], classes=len(SHAPES), strength=_OBJECT_STRENGTH)
        predicted, truth = fitted.predict(test.features), test.targets["shape"]
        found[f"{name}/held_out"] = 100 * balanced_accuracy(predicted[held], truth[held])
        found[f"{name}/common"] = 100 * balanced_accuracy(predicted[~held], truth[~held])
    return found


def _object_tokens(model: XFM, held_out: HeldOut, scenes: Sequence[Scene]) -> Rows:
    """Mean of the image tokens on or near each object."""
    side = model.config.image_size // model.config.patch_size
    centres = (torch.arange(side) + 0.5) * CANVAS / side
    near, seen = CANVAS / side / 4, allowed_pairs("train")
    features: list[Tensor] = []
    targets: dict[str, list[int]] = {"shape": [], "held out": []}
    objects = iter(scenes)
    for pixels in _pixels(model, scenes, held_out.resolution):
        for tokens in model.encode_image(pixels)[:, 1:].unflatten(1, (side, side)).cpu():
            for thing in next(objects).things:
                across, down = (
                    (centres > first - near) & (centres < first + thing.side + near) for first in (thing.x, thing.y)
                )
                features.append(tokens[down][:, across].mean((0, 1))[None])
                targets["shape"].append(SHAPES.index(thing.shape))
                targets["held out"].append((thing.colour, thing.shape) not in seen)
    return _rows(features, targets)


def _rows(features: Sequence[Tensor], targets: dict[str, list[int]]) -> Rows:
    return Rows(
        torch.cat([*features]).float().cpu(), {task: torch.tensor(values).long() for task, values in targets.items()}
    )


def _probed(name: str, accuracies: dict[str, float], groups: Sequence[str]) -> dict[str, float]:
    """Percent per task group, and the mean over groups."""
    parts = {}
    for group in groups:
        members = [accuracy for task, accuracy in accuracies.items() if task == group or task.startswith(f"{group} ")]
        parts[f"{name}/{group}"] = 100 * sum(members) / len(members)
    return {name: sum(parts.values()) / len(parts), **parts}


@dataclass(frozen=True)
class LinearProbe:
    """Linear map from standardised features to class scores."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def scores(self, features: Tensor) -> Tensor:
        """`[N, D]` features → `[N, classes]`."""
        return (features.double() - self.mean) / self.scale @ self.weight + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """Class per row: `[N, D]` → `[N]`."""
        return self.scores(features).argmax(1)


def fit_probe(features: Tensor, targets: Tensor, *, classes: int, strength: float) -> LinearProbe:
    """Class-balanced ridge regression of one-hot targets `[N]` on features `[N, D]`, in fp64.

    Minimises `Σ wₙ |onehotₙ - xₙW - b|² + strength |W|²`; `strength` is relative to the mean feature variance.
    """
    if features.ndim != 2 or targets.shape != features.shape[:1] or not len(features):
        raise InputError(
            f"features are {[*features.shape]} and targets {[*targets.shape]}; they must be [N, D] and [N] with N > 0"
        )
    if strength <= 0:
        raise InputError(f"strength={strength} must be positive")
    x = features.double()
    mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-8)
    x = (x - mean) / scale
    onehot = F.one_hot(targets, classes).double()
    weights = (1 / onehot.sum(0).clamp_min(1))[targets]
    weights = (weights / weights.sum())[:, None]
    # Centring with the weighted means leaves the bias out of the penalty.
    x_mean, y_mean = (weights * x).sum(0), (weights * onehot).sum(0)
    centred = x - x_mean
    gram = centred.t() @ (weights * centred) + strength * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.t() @ (weights * (onehot - y_mean)))
    return LinearProbe(mean, scale, weight, y_mean - x_mean @ weight)


def balanced_accuracy(predicted: Tensor, targets: Tensor) -> float:
    """Mean recall over the classes that occur."""
    if predicted.shape != targets.shape or not len(targets):
        raise InputError(f"{[*predicted.shape]} predictions and {[*targets.shape]} targets; one each, and some")
    right = predicted == targets
    return sum(right[targets == value].double().mean().item() for value in targets.unique()) / len(targets.unique())


@dataclass(frozen=True)
class Rows:
    """Features `[N, D]`, and target classes `[N]` by task."""

    features: Tensor
    targets: dict[str, Tensor]


def probe(
    train: Rows, validation: Rows, test: Rows, classes: dict[str, int], *, strengths: Sequence[float] = STRENGTHS
) -> dict[str, float]:
    """Balanced test accuracy per task, with the ridge strength chosen on the validation rows."""
    accuracies = {}
    for task, count in classes.items():
        fitted = [
            fit_probe(train.features, train.targets[task], classes=count, strength=strength) for strength in strengths
        ]
        best = max(
            fitted,
            key=lambda one: balanced_accuracy(one.predict(validation.features), validation.targets[task]),
        )
        accuracies[task] = balanced_accuracy(best.predict(test.features), test.targets[task])
    return accuracies
