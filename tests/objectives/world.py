"""One process of several that share a global batch; `run` starts them and returns what each found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.objectives.steps import gradients, rows, total
from tests.objectives.test_step_twin import (
    drawn,
    model_with,
    pair_batch,
    pixels,
    region_batch,
    texts,
)
from tests.training.small_runs import in_processes
from xfm_fast.batches import Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.errors import InputError
from xfm_fast.models.xfm import XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.training.distributed import end_groups

PAIRS, IMAGES = 8, 4
CASES = (
    "pairs",
    "pairs with ids",
    "pairs without stop-gradient",
    "regions",
    "local regions",
    "texts",
    "images",
)
DRAWN = ("pairs", "pairs with ids", "regions")
Result = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]


def model_for(case: str) -> XFM:
    return model_with(1 if case == "local regions" else -1)


def whole(case: str) -> tuple[Batch, tuple[Tensor, Tensor] | None]:
    """The global batch, and negatives that come from anywhere in it."""
    config, draw = model_for(case).config, torch.Generator().manual_seed(11)
    if case.startswith("pairs"):
        batch = pair_batch(PAIRS, config, 11, ids=case == "pairs with ids")
        if batch.image_ids is not None:
            # Images are shared within processes and between them, and each of four still has two to choose from.
            batch = replace(batch, image_ids=torch.tensor([0, 1, 0, 2, 0, 3, 4, 2]))
        return batch, drawn(PAIRS, 11)
    if "regions" in case:
        batch = region_batch(PAIRS, IMAGES, config, 11)
        # Neighbouring texts are of the same image, so that a process has its images to itself.
        return replace(batch, image_index=torch.arange(PAIRS) * IMAGES // PAIRS), drawn(PAIRS, 11)
    if case == "texts":
        return TextBatch(**texts(PAIRS, config, draw)), None  # pyright: ignore[reportArgumentType]
    mask = torch.rand(PAIRS, config.num_patches, generator=draw) < torch.rand(
        PAIRS, 1, generator=draw
    )
    return ImageBatch(image=pixels(PAIRS, config, draw), patch_mask=mask), None


def part(batch: Batch, negatives: Any, rank: int, world: int) -> tuple[Batch, Any]:
    """What one process has of it."""
    texts = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    images = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    fields = rows(batch, text=texts, image=images if isinstance(batch, RegionBatch) else None)
    if isinstance(batch, RegionBatch):
        fields["image_index"] = fields["image_index"] - images.start
    return type(batch)(**fields), None if negatives is None else tuple(
        index[texts] for index in negatives
    )


def method(case: str) -> dict[str, Any]:
    """Without the stop-gradient, gradients travel back to the texts of other processes."""
    return {"stop_gradient": False} if case.endswith("without stop-gradient") else {}


def scalars(case: str, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is backpropagated: each loss of pairs, and the sums of the others."""
    return losses if case == "pairs" else {"sum": total(losses)}


def alone(case: str) -> Result:
    """Losses of the global batch in one process, and their gradients."""
    model, (batch, negatives) = model_for(case), whole(case)
    losses = pretraining_losses(model, batch, hard_negatives=negatives, **method(case))
    found = {name: gradients(model, loss) for name, loss in scalars(case, losses).items()}
    return losses, {
        name: {k: g for k, g in of.items() if g is not None} for name, of in found.items()
    }


def together(case: str, rank: int, world: int, **options: Any) -> Result:
    """Means over processes of the same, as DDP takes them."""
    model = model_for(case)
    batch, negatives = part(*whole(case), rank, world)
    losses = pretraining_losses(model, batch, hard_negatives=negatives, **method(case), **options)
    means = {name: loss.detach().clone() for name, loss in losses.items()}
    averaged: dict[str, dict[str, Tensor]] = {}
    for name, loss in scalars(case, losses).items():
        found = gradients(model, loss)
        averaged[name] = {
            parameter: gradient for parameter, gradient in found.items() if gradient is not None
        }
    for tensor in (
        *means.values(),
        *(gradient for of in averaged.values() for gradient in of.values()),
    ):
        dist.all_reduce(tensor)
        tensor /= world
    return means, averaged


def refused(rank: int) -> dict[str, str]:
    """Batches that do not fit those of the other processes: every process raises the same error."""
    model = model_for("pairs")
    shorter = pair_batch(3, model.config, 1, ids=False)
    if rank == 0:
        narrow = replace(
            shorter,
            input_ids=shorter.input_ids[:, :8],
            attention_mask=shorter.attention_mask[:, :8],
        )
        narrow = replace(
            narrow,
            masked_input_ids=shorter.masked_input_ids[:, :8],
            masked_labels=shorter.masked_labels * 0 - 100,
        )
        one_less = PairBatch(**rows(shorter, text=slice(2)))
        with_ids = replace(shorter, image_ids=torch.arange(3))
    else:
        narrow = one_less = with_ids = shorter
    messages = {}
    for name, batch in (("size", one_less), ("width", narrow), ("ids", with_ids)):
        try:
            pretraining_losses(model, batch)
        except InputError as error:
            messages[name] = str(error)
    return messages


def drawn_inside(case: str, rank: int, world: int) -> Result:
    """Losses of one process's part whose negatives come out of it, and the gradients of matching.

    Here they are those of a run alone; within a process group `official_itm_negatives` makes them so.
    """
    model, (batch, _) = model_for(case), whole(case)
    local, _ = part(batch, None, rank, world)
    generator = torch.Generator().manual_seed(rank)
    losses = pretraining_losses(model, local, generator=generator, official_itm_negatives=True)
    found = {name: g for name, g in gradients(model, losses["itm"]).items() if g is not None}
    return {name: loss.detach() for name, loss in losses.items()}, {"itm": found}


def _work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    try:
        found: dict[str, Any] = {case: together(case, rank, world) for case in CASES}
        found["official"] = together("pairs", rank, world, official_itc_gradient=True)
        found["refused"] = refused(rank)
        local, _ = part(whole("pairs")[0], None, rank, world)
        losses = pretraining_losses(
            model_for("pairs"), local, generator=torch.Generator().manual_seed(rank)
        )
        found["drawn"] = {name: loss.detach() for name, loss in losses.items()}
        found["inside"] = {case: drawn_inside(case, rank, world) for case in DRAWN}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        end_groups()


def run(world: int, folder: Path) -> list[dict[str, Any]]:
    """What each of `world` processes found."""
    assert in_processes(_work, world, str(folder)) == [0] * world
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
