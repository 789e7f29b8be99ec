"""A run that goes on with another recipe or another number of processes: what that changes, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xfm_fast.errors import ConfigError
from xfm_fast.training.recipe import Recipe

# With these changed, the weights and the state of the optimizer would mean something else.
_FIXED = ("model.", "optimizer.zero_grad")
# These change how a run is run or watched, not what it computes.
_HARMLESS = ("checkpoint.", "log.", "workers", "data")


def changes(before: Mapping[str, Any], recipe: Recipe, world_before: int, world_now: int) -> list[str]:
    """What differs from the run that a checkpoint belongs to.

    Args:
        before: the recipe of the checkpoint, as `model_dump(mode="json")` gives it.
        recipe: of now.
        world_before, world_now: processes.

    Raises:
        ConfigError: the model is another one; names its fields and both values.
    """
    old, new = dict(_flat(before)), dict(_flat(recipe.model_dump(mode="json")))
    differing = [name for name in dict.fromkeys([*old, *new]) if old.get(name) != new.get(name)]
    said = {name: f"{name}: {old.get(name)} → {new.get(name)}" for name in differing}
    if fixed := [said[name] for name in differing if name.startswith(_FIXED)]:
        raise ConfigError(
            f"the checkpoint in checkpoint.folder={recipe.checkpoint.folder} is of another run ({'; '.join(fixed)}); "
            "set these as they were, or set checkpoint.folder to a new folder"
        )
    notes = []
    if told := [said[name] for name in differing if not name.startswith(_HARMLESS)]:
        notes.append(f"the recipe has changed since the checkpoint: {'; '.join(told)}")
    if world_before != world_now:
        notes.append(
            f"the checkpoint is of {world_before} processes and this run has {world_now}: an update now sees "
            f"{world_now} instead of {world_before} times streams.*.batch_size, every stream goes on behind the items "
            "already seen (to within a batch) in the same order, and dropout and negatives are drawn anew from seed, "
            "rank and step"
        )
    return notes


def position_after(
    batches: int, stream: str, before: Mapping[str, Any], recipe: Recipe, world_before: int, world_now: int
) -> int:
    """The batch at which a stream goes on so that no item is seen twice and less than a batch is seen never.

    Args:
        batches: that each of `world_before` processes took with the recipe `before`.
        stream: its name.
        before, recipe: old and new recipe.
        world_before, world_now: processes.
    """
    size = before["streams"][stream]["batch_size"] // before["accumulate"] * world_before
    return -(-batches * size // (recipe.micro_batch_size(stream) * world_now))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
