"""The gradient-flow report: which loss reaches which encoder, measured on batches of noise and held to the method."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xfm_fast.batches import Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.checkpoint.files import CONFIG_FILE
from xfm_fast.config import XFMConfig
from xfm_fast.documents import read_json
from xfm_fast.errors import CheckpointError, ConfigError, InputError
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.training.checkpoints import MODEL, STATE
from xfm_fast.training.recipe import Recipe, load_recipe
from xfm_fast.training.recipe_fields import LOSSES_OF_KIND, LossName
from xfm_fast.training.setup import build_model

if TYPE_CHECKING:
    from rich.table import Table

PARTS = ("language", "vision", "fusion", "heads", "temperature")
"""The columns: three encoders, what stands on top of them, and the temperature of the contrastive loss."""

REACHES: dict[LossName, frozenset[str]] = {
    "mlm": frozenset({"language", "heads"}),
    "itc": frozenset({"language", "vision", "heads", "temperature"}),
    "itm": frozenset({"vision", "fusion", "heads"}),
    "imlm": frozenset({"vision", "fusion", "heads"}),
    "bbox_l1": frozenset({"vision", "fusion", "heads"}),
    "bbox_giou": frozenset({"vision", "fusion", "heads"}),
    "mim": frozenset({"vision"}),
}
"""The parts that a loss trains in the method of X-FM (arXiv 2301.05065); gradients stop before all others."""

_WEIGHT_FILES = (".th", ".pth", ".pt", ".bin", ".safetensors")

_KINDS: dict[type, str] = {PairBatch: "pairs", RegionBatch: "regions", ImageBatch: "images", TextBatch: "text"}


@dataclass(frozen=True)
class GradientFlow:
    """Gradient norms, loss by part.

    Attributes:
        norms: (kind of batch, loss) → part → L2 norm of the gradient; None where no parameter is in the graph.
        parts: the parts that the model has.
    """

    norms: Mapping[tuple[str, LossName], Mapping[str, float | None]]
    parts: tuple[str, ...]

    def to_json(self) -> str:
        """Rows with kind, loss, norms, the parts that the method trains, and the violations."""
        rows = [
            {"batch": kind, "loss": loss, "norms": dict(norms), "reaches": sorted(REACHES[loss])}
            for (kind, loss), norms in self.norms.items()
        ]
        return json.dumps({"rows": rows, "violations": check(self)}, indent=2) + "\n"

    def table(self) -> Table:
        """For a terminal; gradients that the method does not have, and those that are missing, are red."""
        from rich.table import Table

        table = Table(title="Gradient norms: loss × what it trains")
        table.add_column("loss")
        for part in self.parts:
            table.add_column(part, justify="right")
        for (kind, loss), norms in self.norms.items():
            cells = []
            for part in self.parts:
                norm = norms[part]
                text = "0" if norm is None else f"{norm:.3g}"
                cells.append(f"[red]{text}[/]" if _wrong(loss, part, norm) else text)
            table.add_row(f"{loss} ({kind})", *cells)
        table.caption = "0: the method stops gradients there, and no parameter is in the graph"
        return table


def gradient_flow(
    model: XFM,
    batches: Iterable[Batch],
    *,
    stop_gradient: bool = True,
    losses: Mapping[str, Iterable[LossName]] | None = None,
) -> GradientFlow:
    """Backpropagate every loss of every batch, one after the other, and measure what arrives.

    The model is put into evaluation mode meanwhile; its gradients and mode stay as they were.

    Args:
        model: with all heads that the losses need.
        batches: usually one of each kind; of several of a kind the last counts.
        stop_gradient: as for `pretraining_losses`; False shows the ablation.
        losses: kind of batch → its losses; by default all.

    Raises:
        InputError: there is no batch, or none of them gives a loss.
    """
    members: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        members[_part_of(name)].append(parameter)
    members = {part: of_part for part, of_part in members.items() if of_part}
    parameters = [parameter for of_part in members.values() for parameter in of_part if parameter.requires_grad]
    norms: dict[tuple[str, LossName], dict[str, float | None]] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            kind = _KINDS[type(batch)]
            chosen = LOSSES_OF_KIND[kind] if losses is None else tuple(losses.get(kind, ()))
            # A generator of its own, so that a report neither depends on nor moves the random state of a run.
            draw = torch.Generator(device=model.device).manual_seed(0)
            # All at once, as a step of training has them, so that the passes that they share are looked at too.
            found = pretraining_losses(model, batch, losses=chosen, generator=draw, stop_gradient=stop_gradient)
            for loss in chosen:
                norms[kind, loss] = _norms(found[loss], parameters, members)
    finally:
        model.train(was_training)
    if not norms:
        raise InputError("no batch gives a loss to follow; pass batches of text, pairs, regions or images")
    return GradientFlow(norms, tuple(members))


def _norms(loss: Tensor, parameters: list[Tensor], members: Mapping[str, list[Tensor]]) -> dict[str, float | None]:
    if not parameters or not loss.requires_grad:
        return dict.fromkeys(members)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    gradients = dict(zip(map(id, parameters), found, strict=True))
    norms: dict[str, float | None] = {}
    for part, of_part in members.items():
        arrived = [g for p in of_part if (g := gradients.get(id(p))) is not None]
        norms[part] = float(torch.stack([g.double().norm() for g in arrived]).norm()) if arrived else None
    return norms


def _part_of(name: str) -> str:
    if name.startswith("vision_encoder."):
        return "vision"
    if name.startswith("text_encoder.roberta."):
        return "language"
    # The word matrix of the fusion encoder is the output matrix of its head; no input passes through it.
    if name.startswith("fusion_encoder.roberta.encoder."):
        return "fusion"
    return "temperature" if name == "temp" else "heads"


def _wrong(loss: LossName, part: str, norm: float | None) -> bool:
    if part in REACHES[loss]:
        return norm is None or not math.isfinite(norm) or norm == 0
    return norm is not None and norm != 0


def check(report: GradientFlow) -> list[str]:
    """A sentence for every gradient that flows otherwise than in the method of X-FM; empty when all is well."""
    violations = []
    for (kind, loss), norms in report.norms.items():
        for part in report.parts:
            norm = norms[part]
            if not _wrong(loss, part, norm):
                continue
            if part not in REACHES[loss]:
                violations.append(
                    f"{loss} on {kind} reaches {part} with a gradient of norm {norm:.3g}, where the method stops it"
                )
            elif norm is not None and not math.isfinite(norm):
                violations.append(f"{loss} on {kind} gives {part} a gradient of norm {norm}")
            else:
                violations.append(f"{loss} on {kind} gives {part} no gradient, and the method trains it by this loss")
        for part in sorted(REACHES[loss] - set(report.parts) - {"temperature"}):
            violations.append(f"{loss} on {kind} should train {part}, which the model does not have")
    return violations


def gradient_flow_of(
    recipe_or_checkpoint: str | Path, overrides: Iterable[str] = (), *, size: int = 3, seed: int = 0
) -> GradientFlow:
    """The report for a recipe, with random weights and its `method`, or for the weights of a checkpoint.

    Where gradients flow depends on the graph and not on what the batch shows, so batches of noise will do. A recipe is
    followed through the kinds of stream and the losses that it has, and so is a checkpoint of training, which holds its
    recipe; a model alone is held to the whole method, and an official file to that of the official pretraining.

    Args:
        recipe_or_checkpoint: name or path of a recipe; the folder of a run, of one of its checkpoints, or of
            `save_pretrained`; an official checkpoint file.
        overrides: `key=value` for a recipe; of an official file, for `pretrain_base_4m` begun from it.
        size: texts or images of a batch.
        seed: of the weights and batches.

    Raises:
        ConfigError: there is no such recipe, or an override is wrong or has nothing to change.
        CheckpointError: the folder holds no model, or one that cannot be read.
    """
    folder, overrides = Path(recipe_or_checkpoint), tuple(overrides)
    if folder.suffix in _WEIGHT_FILES and folder.is_file():
        recipe = load_recipe("pretrain_base_4m", (*overrides, f"init={{checkpoint: {json.dumps(str(folder))}}}"))
        return _of_recipe(build_model(recipe), recipe, size=size, seed=seed)
    if not folder.is_dir():
        recipe = load_recipe(recipe_or_checkpoint, overrides)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = XFM(recipe.model)
        return _of_recipe(model, recipe, size=size, seed=seed)
    if overrides:
        raise ConfigError(
            f"{' '.join(overrides)} would change a recipe, but {folder} holds weights that were made by one; leave "
            "overrides out, or give the recipe"
        )
    # The folder of `save_pretrained`: itself, in a checkpoint, or in the newest of a run.
    steps = sorted(folder.glob("checkpoints/step-*"), reverse=True)
    candidates = (folder, *(step / MODEL for step in steps), folder / MODEL)
    found = next((each for each in candidates if (each / CONFIG_FILE).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no model; give a recipe, a folder of save_pretrained, or a run")
    model = XFM.from_pretrained(found)
    if (found.parent / STATE).is_file():
        return _of_recipe(model, _recipe_of(found.parent), size=size, seed=seed)
    batches = [synthetic_batch(kind, model.config, size=size, seed=seed) for kind in LOSSES_OF_KIND]
    return gradient_flow(model, batches)


def _recipe_of(checkpoint: Path) -> Recipe:
    try:
        return Recipe(**read_json(checkpoint / STATE)["recipe"])
    except ConfigError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE} holds no recipe ({error}); take another checkpoint") from None


def _of_recipe(model: XFM, recipe: Recipe, *, size: int, seed: int) -> GradientFlow:
    losses: dict[str, tuple[LossName, ...]] = {}
    for name, stream in recipe.streams.items():
        losses[stream.kind] = tuple(dict.fromkeys((*losses.get(stream.kind, ()), *recipe.losses_of(name))))
    batches = [synthetic_batch(kind, recipe.model, size=size, seed=seed) for kind in losses]
    return gradient_flow(model, batches, stop_gradient=recipe.method.stop_gradient, losses=losses)


def synthetic_batch(
    kind: str, config: XFMConfig, *, size: int = 3, length: int = 12, masked: int = 2, seed: int = 0
) -> Batch:
    """A batch of noise with texts of different lengths; the same for the same arguments.

    Args:
        kind: `text`, `pairs`, `regions` or `images`.
        config: sizes of the model.
        size: texts or images. Of regions, two belong to each image and the first describes the whole of it.
        length: tokens of the longest text.
        masked: predicted tokens of a text.

    Raises:
        InputError: an unknown kind, or texts too short to predict so many tokens of them.
    """
    draw = torch.Generator().manual_seed(seed)
    images = -(-size // 2) if kind == "regions" else size
    pixels = torch.randn(images, 3, config.image_size, config.image_size, generator=draw)
    if kind == "images":
        return ImageBatch(image=pixels, patch_mask=_patch_mask(images, config, draw))
    length = min(length, config.max_text_length)
    if length - 3 < masked:
        raise InputError(f"texts of length={length} tokens have too few to predict masked={masked}; lengthen them")
    texts = _texts(size, length, masked, config, draw)
    if kind == "text":
        return TextBatch(**texts)
    if kind == "pairs":
        return PairBatch(**texts, image=pixels, patch_mask=_patch_mask(images, config, draw))
    if kind == "regions":
        return RegionBatch(**texts, image=pixels, **_regions(size, config, draw))
    raise InputError(f"kind {kind!r} of batch is unknown; choose from text, pairs, regions, images")


def _texts(size: int, length: int, masked: int, config: XFMConfig, draw: torch.Generator) -> dict[str, Any]:
    lengths = length - torch.arange(size) % 3
    columns = torch.arange(length)
    attention_mask = (columns < lengths[:, None]).long()
    special = max(config.bos_token_id, config.eos_token_id, config.pad_token_id) + 1
    input_ids = torch.randint(special, config.mask_token_id, (size, length), generator=draw)
    input_ids[:, 0] = config.bos_token_id
    input_ids[torch.arange(size), lengths - 1] = config.eos_token_id
    input_ids = torch.where(attention_mask.bool(), input_ids, config.pad_token_id)
    # All texts have their first length - 3 tokens, so these positions are real in each.
    order = torch.rand(size, length - 3, generator=draw).argsort(1)
    positions = 1 + order[:, :masked]
    labels = input_ids.gather(1, positions)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "masked_input_ids": input_ids.scatter(1, positions, config.mask_token_id),
        "masked_positions": positions,
        "masked_labels": labels,
    }


def _patch_mask(images: int, config: XFMConfig, draw: torch.Generator) -> Tensor:
    order = torch.rand(images, config.num_patches, generator=draw).argsort(1)
    return order < config.num_masking_patches


def _regions(size: int, config: XFMConfig, draw: torch.Generator) -> dict[str, Any]:
    corners = torch.rand(size, 2, 2, generator=draw).sort(dim=1).values
    low, high = corners[:, 0] * 0.8, corners[:, 1] * 0.8 + 0.2
    is_image = (torch.arange(size) % 2 == 0).long() if size > 1 else torch.zeros(size, dtype=torch.long)
    whole = is_image.bool()
    low[whole], high[whole] = 0.0, 1.0
    centres = (torch.arange(config.grid) + 0.5) / config.grid
    # A patch belongs to a box when the box reaches its middle, or is nearest to it.
    reach = 0.5 / config.grid
    x, y = ((centres > low[:, axis, None] - reach) & (centres < high[:, axis, None] + reach) for axis in (0, 1))
    patches = (y[:, :, None] & x[:, None, :]).flatten(1)
    token = torch.ones(size, 1, dtype=torch.bool)
    return {
        "image_index": torch.arange(size) // 2,
        "region_mask": torch.cat([token, patches], dim=1).long(),
        "boxes": torch.cat([(low + high) / 2, high - low], dim=1),
        "is_image": is_image,
    }
