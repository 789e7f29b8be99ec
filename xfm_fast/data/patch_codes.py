"""A codebook of patches: the simplest tokenizer of images, learnt from them in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.checkpoint import read_state_dict, write_files, write_safetensors
from xfm_fast.errors import DataError

_ROUNDS = 20
_PATCHES_OF_AN_IMAGE = 32
_CENTRES = "centres"


@dataclass(frozen=True)
class PatchCodebook:
    """The code of a patch is the number of the centre that its pixels are nearest to.

    Attributes:
        centres: `[V, 3 * P * P]` normalised pixels, channel by channel and row by row.
    """

    centres: Tensor

    @property
    def patch_size(self) -> int:
        return round((self.centres.shape[1] / 3) ** 0.5)

    def __call__(self, image: Tensor) -> Tensor:
        """The codes of `[B, 3, R, R]` normalised pixels: `[B, N]` int64."""
        patches = patches_of(image.to(self.centres.dtype), self.patch_size)
        with torch.autocast(image.device.type, enabled=False):
            return self._nearest(patches)

    def _nearest(self, patches: Tensor) -> Tensor:
        """Numbers of the centres that `[..., 3 * P * P]` are nearest to."""
        # The squares of the pixels are the same for all centres.
        return (self.centres.square().sum(1) - 2 * patches @ self.centres.t()).argmin(-1)

    def to(self, device: torch.device) -> Self:
        """The codebook on another device."""
        return type(self)(self.centres.to(device))

    @classmethod
    def learn(cls, images: Iterable[Tensor], patch_size: int, codes: int, *, seed: int) -> Self:
        """k-means of some patches of every image (Lloyd's algorithm), from distinct ones drawn by `seed`.

        Args:
            images: `[3, R, R]` normalised pixels each.

        Raises:
            DataError: the images show fewer distinct patches than there are to be codes.
        """
        draw = torch.Generator().manual_seed(seed)
        drawn = []
        for image in images:
            patches = patches_of(image[None], patch_size)[0]
            drawn.append(patches[torch.randperm(len(patches), generator=draw)[:_PATCHES_OF_AN_IMAGE]])
        points = torch.cat(drawn) if drawn else torch.zeros(0, 3 * patch_size**2)
        distinct = points.unique(dim=0)
        if len(distinct) < codes:
            raise DataError(
                f"the images show {len(distinct)} distinct patches, too few for {codes} codes; lower "
                "method.image_codes.codes or use more images"
            )
        book = cls(distinct[torch.randperm(len(distinct), generator=draw)[:codes]])
        for _ in range(_ROUNDS):
            nearest = book._nearest(points)
            counts = torch.bincount(nearest, minlength=codes)[:, None]
            sums = torch.zeros_like(book.centres).index_add_(0, nearest, points)
            # A centre that nothing is nearest to stays where it is.
            book = cls(torch.where(counts > 0, sums / counts.clamp_min(1), book.centres))
        return book

    def save(self, path: Path) -> None:
        """Write a safetensors file; raises `StorageError` where that fails."""
        write_files({path: lambda file: write_safetensors(file, {_CENTRES: self.centres})})

    @classmethod
    def load(cls, path: str | Path, patch_size: int) -> Self:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file cannot be read.
            DataError: it holds no codebook of patches of this size.
        """
        state = read_state_dict(path)
        centres = state.get(_CENTRES)
        if centres is None or centres.ndim != 2 or len(centres) < 2 or centres.shape[1] != 3 * patch_size**2:
            held = "no " + _CENTRES if centres is None else f"{_CENTRES} {[*centres.shape]}"
            raise DataError(
                f"{path} holds {held}; a codebook for patches of {patch_size} pixels has {_CENTRES} "
                f"[codes, {3 * patch_size**2}]"
            )
        return cls(centres.float())


def patches_of(image: Tensor, size: int) -> Tensor:
    """`[B, 3, R, R]` → `[B, N, 3 * size * size]`."""
    return F.unfold(image, size, stride=size).transpose(1, 2)
