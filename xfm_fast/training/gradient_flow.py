"""The gradient-flow report: which loss reaches which encoder, measured on a batch and held to the method."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xfm_fast.batches import Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.checkpoint.storage import CONFIG_FILE
from xfm_fast.errors import CheckpointError, ConfigError, InputError
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import ImageCodes, pretraining_losses
from xfm_fast.training.checkpoints import MODEL, STATE, is_sharded, load_weights
from xfm_fast.training.recipe import Recipe, load_recipe
from xfm_fast.training.recipe_fields import LOSSES_OF_KIND, LossName
from xfm_fast.training.starting_point import build_model
from xfm_fast.training.synthetic_batches import synthetic_batch

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
        """For a terminal; what the method does not have is red."""
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
    image_codes: ImageCodes | None = None,
) -> GradientFlow:
    """Backpropagate every loss of every batch, one after the other, and measure what arrives.

    The model is put into evaluation mode meanwhile; its gradients and mode stay as they were.

    Args:
        model: with all heads that the losses need.
        batches: usually one of each kind; of several of a kind the last counts.
        stop_gradient: as for `pretraining_losses`; False shows the ablation.
        losses: kind of batch → its losses; by default all.
        image_codes: as for `pretraining_losses`.

    Raises:
        InputError: there is no batch, or none of them gives a loss.
    """
    members = _members(model)
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
            # All at once, as a step of training has them, so that what they share is looked at too.
            found = pretraining_losses(
                model, batch, losses=chosen, generator=draw, stop_gradient=stop_gradient, image_codes=image_codes
            )
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


def _members(model: nn.Module) -> dict[str, list[Tensor]]:
    members: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        members[_part_of(name)].append(parameter)
    return {part: parameters for part, parameters in members.items() if parameters}


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
    """Where gradients flow otherwise than the method of X-FM has it, a sentence each; empty when all is well."""
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
    found = _model_in(folder)
    if is_sharded(found):
        recipe = _recipe_of(found)
        model = XFM(recipe.model)
        load_weights(found, model)
        return _of_recipe(model, recipe, size=size, seed=seed)
    model = XFM.from_pretrained(found)
    if (found.parent / STATE).is_file():
        return _of_recipe(model, _recipe_of(found.parent), size=size, seed=seed)
    batches = [synthetic_batch(kind, model.config, size=size, seed=seed) for kind in LOSSES_OF_KIND]
    return gradient_flow(model, batches)


def _model_in(folder: Path) -> Path:
    """The folder of `save_pretrained`, or a sharded checkpoint: itself, in a checkpoint, or in the newest of a run."""
    steps = sorted(folder.glob("checkpoints/step-*"), reverse=True)
    for place in (folder, *(part for step in steps for part in (step / MODEL, step)), folder / MODEL):
        if (place / CONFIG_FILE).is_file() or is_sharded(place):
            return place
    raise CheckpointError(f"{folder} holds no model; give a recipe, a folder of save_pretrained, or a run")


def _recipe_of(checkpoint: Path) -> Recipe:
    return Recipe(**json.loads((checkpoint / STATE).read_text())["recipe"])


def _of_recipe(model: XFM, recipe: Recipe, *, size: int, seed: int) -> GradientFlow:
    losses: dict[str, tuple[LossName, ...]] = {}
    for name, stream in recipe.streams.items():
        losses[stream.kind] = tuple(dict.fromkeys((*losses.get(stream.kind, ()), *recipe.losses_of(name))))
    batches = [synthetic_batch(kind, recipe.model, size=size, seed=seed) for kind in losses]
    codes = None
    if recipe.method.image_codes is not None:
        # Which code a patch has decides nothing here.
        patches, width = recipe.model.num_patches, recipe.model.vision_width
        codes = ImageCodes(lambda image: torch.zeros(len(image), patches, dtype=torch.long), width=width, codes=2)
    return gradient_flow(model, batches, stop_gradient=recipe.method.stop_gradient, losses=losses, image_codes=codes)
