"""How pairs of texts and images are laid out in passes of the fusion graph, which takes T texts on each of B memories.

The texts of an image run together, so that its memory is read once for all of them. Images whose texts look alike (the
same number, lengths that pad to the same) share a pass, so that a batch of single pairs is not one pass a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xfm_fast.export.shape_slots import Slot, choose_slot, largest
from xfm_fast.export.token_batches import token_batches


@dataclass(frozen=True)
class FusionPass:
    """One run of the graph.

    Attributes:
        images: `[B]` memories.
        texts: `[B][T]` texts of each.
        length: tokens that each text is padded to.
    """

    images: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]
    length: int

    @property
    def tokens(self) -> int:
        """Padded tokens of the pass."""
        return len(self.images) * len(self.texts[0]) * self.length


@dataclass(frozen=True)
class PassLimits:
    """What decides the size of passes.

    Attributes:
        budget: padded tokens of a pass, at most, but for a single text.
        pass_tokens: what a pass costs beside its tokens, in tokens.
        step: lengths are padded to its multiples, so that few shapes occur.
    """

    budget: int
    pass_tokens: int
    step: int = 1

    def padded(self, length: int, slots: Sequence[Slot]) -> int:
        """The length that texts of a length are padded to: the next step, and what the closest slot takes."""
        stepped = -(-length // self.step) * self.step
        taken = []
        for allowed in (slot.ranges["length"] for slot in slots):
            if allowed.most is None or length <= allowed.most:
                taken.append(max(stepped if allowed.most is None else min(stepped, allowed.most), allowed.least))
        return min(taken, default=length)


def plan_passes(
    image_of: Sequence[int], lengths: Sequence[int], slots: Sequence[Slot], limits: PassLimits
) -> list[FusionPass]:
    """Passes that hold every pair once.

    Args:
        image_of: memory of each text.
        lengths: tokens of each text.
        slots: of the fusion graph.
        limits: of the passes.

    Raises:
        InputError: a text is longer than any slot takes.
    """
    for length in sorted(set(lengths))[-1:]:
        choose_slot("fusion", slots, {"length": length})
    # Where rows of texts that are not there are computed too, the fewest passes are the cheapest.
    full = min(slot.ranges["texts"].least for slot in slots) > 1
    price = limits.budget if full else limits.pass_tokens
    most_texts = largest(slots, "texts")

    groups: dict[int, list[int]] = {}
    for text, image in enumerate(image_of):
        groups.setdefault(image, []).append(text)
    units: list[tuple[int, tuple[int, ...], int]] = []
    for image, texts in groups.items():
        sizes = [lengths[text] for text in texts]
        for batch in token_batches(
            sizes,
            limits.budget,
            pass_tokens=price,
            most=most_texts,
            padded=lambda length: limits.padded(length, slots),
        ):
            units.append((image, tuple(texts[row] for row in batch.rows), batch.length))
    return _stacked(units, slots, limits)


def _stacked(
    units: Sequence[tuple[int, tuple[int, ...], int]],
    slots: Sequence[Slot],
    limits: PassLimits,
) -> list[FusionPass]:
    """Units of one image each, those with the same number of texts put into common passes."""
    by_count: dict[int, list[tuple[int, tuple[int, ...], int]]] = {}
    for unit in units:
        by_count.setdefault(len(unit[1]), []).append(unit)
    passes: list[FusionPass] = []
    for count, alike in by_count.items():
        # Every unit is a row of `count` texts; padding counts for all of them.
        rows = token_batches(
            [length * count for *_, length in alike],
            limits.budget,
            pass_tokens=limits.pass_tokens,
            # A profile may take many memories or many texts of each, but not both.
            most=largest([slot for slot in slots if slot.padded({"texts": count}) is not None], "batch"),
        )
        for batch in rows:
            # In the order of the images, so that neighbouring memories need no copy.
            chosen = sorted((alike[row] for row in batch.rows), key=lambda unit: unit[0])
            images, texts, sizes = zip(*chosen, strict=True)
            passes.append(FusionPass(images, texts, max(sizes)))
    return passes
