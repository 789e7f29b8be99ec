"""What a step accepts: every batch that makes no sense gets one error that names the thing, its value and the remedy.

Shapes are always checked, contents where looking at them costs no synchronisation: on CPU.
"""

from __future__ import annotations

from torch import Tensor

from xfm_fast.batches import Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.errors import InputError
from xfm_fast.kernels import host
from xfm_fast.objectives.matching import HardNegatives

APPLICABLE: dict[type, tuple[str, ...]] = {
    PairBatch: ("itc", "itm", "imlm", "mim"),
    RegionBatch: ("itc", "itm", "imlm", "bbox_l1", "bbox_giou"),
    ImageBatch: ("mim",),
    TextBatch: ("mlm",),
}
"""The losses of each kind of batch."""


def losses_of(batch: Batch, losses: object) -> frozenset[str]:
    """Names of the losses to compute: those that apply to the batch, or the given ones among them."""
    if type(batch) not in APPLICABLE:
        kinds = ", ".join(kind.__name__ for kind in APPLICABLE)
        raise InputError(f"batch is a {type(batch).__name__}; it must be one of {kinds}")
    applicable = APPLICABLE[type(batch)]
    if losses is None:
        return frozenset(applicable)
    if isinstance(losses, str):
        raise InputError(f"losses={losses!r} is a string; give a collection of names, such as {{{losses!r}}}")
    wanted = frozenset(losses)  # pyright: ignore[reportArgumentType]
    for name in sorted(wanted, key=str):
        if name not in applicable:
            raise InputError(
                f"loss {name!r} does not apply to a {type(batch).__name__} (it has {', '.join(applicable)})"
            )
    return wanted


def check_pairs(batch: PairBatch) -> None:
    """As many images and image ids as texts."""
    texts, _ = batch.check_texts()
    if batch.image.shape[0] != texts:
        raise InputError(
            f"image holds {batch.image.shape[0]} images and input_ids {texts} texts; there must be one each"
        )
    _check_rows("image_ids", batch.image_ids, texts)


def check_regions(batch: RegionBatch) -> None:
    """One of everything for every text; region_mask and the values of image_index are checked by the model."""
    texts, _ = batch.check_texts()
    _check_rows("image_index", batch.image_index, texts)
    _check_rows("is_image", batch.is_image, texts)
    if batch.boxes.shape != (texts, 4):
        raise InputError(f"boxes are {[*batch.boxes.shape]}; {texts} texts need [{texts}, 4]: (cx, cy, w, h)")
    if batch.boxes.device.type == "cpu" and not host.all_true(batch.boxes.isfinite()):
        text = host.integer(batch.boxes.isfinite().all(1).long().argmin())
        raise InputError(f"boxes of text {text} hold NaN or infinity; check its annotation")


def check_negatives(negatives: object, rows: int, pairs: int) -> HardNegatives:
    """Two `[rows]` (or `[pairs]`) integer tensors below `pairs`."""
    if not isinstance(negatives, tuple | list) or len(negatives) != 2:
        raise InputError(
            f"hard_negatives is a {type(negatives).__name__}; it must be (image_negative_index, text_negative_index)"
        )
    for name, index in zip(("image_negative_index", "text_negative_index"), negatives, strict=True):
        if not isinstance(index, Tensor) or index.is_floating_point() or index.shape not in ((rows,), (pairs,)):
            found = f"{index.dtype} {[*index.shape]}" if isinstance(index, Tensor) else type(index).__name__
            raise InputError(f"{name} is {found}; it must hold one integer for each of the {rows} pairs")
        if index.device.type == "cpu" and index.numel():
            lowest, highest = host.integer(index.min()), host.integer(index.max())
            if lowest < 0 or highest >= pairs:
                wrong = lowest if lowest < 0 else highest
                raise InputError(f"{name} holds {wrong}; there are {pairs} pairs, numbered from 0")
    return HardNegatives(*negatives)


def _check_rows(name: str, tensor: Tensor | None, rows: int) -> None:
    if tensor is not None and tensor.shape != (rows,):
        raise InputError(f"{name} is {[*tensor.shape]}; there must be one for each of the {rows} texts")
