"""Codebooks of patches: nearest centres, k-means, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from xfm_fast.data.patch_codes import PatchCodebook, patches_of
from xfm_fast.errors import CheckpointError, DataError


def test_patches_are_those_of_the_model() -> None:
    image = torch.randn(2, 3, 15, 15)
    found = patches_of(image, 5)
    assert found.shape == (2, 9, 75)
    for row in range(3):
        for column in range(3):
            patch = image[:, :, 5 * row : 5 * row + 5, 5 * column : 5 * column + 5]
            assert torch.equal(found[:, 3 * row + column], patch.flatten(1))


def test_codes_are_nearest_centres() -> None:
    torch.manual_seed(0)
    book, image = PatchCodebook(torch.randn(7, 75)), torch.randn(3, 3, 15, 15)
    distances = torch.cdist(patches_of(image.double(), 5), book.centres.double())
    assert torch.equal(book(image), distances.argmin(-1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book(image.bfloat16()), book(image.bfloat16().float()))


def kinds(generator: torch.Generator) -> list[Tensor]:
    """Images of 2 x 2 patches of four colours, with a little noise."""
    colours = torch.tensor([-2.0, -0.5, 0.5, 2.0])
    images = []
    for _ in range(40):
        chosen = colours[torch.randint(4, (2, 2), generator=generator)]
        image = chosen.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(3, 8, 8)
        images.append(image + 0.01 * torch.randn(3, 8, 8, generator=generator))
    return images


def test_clusters_are_found() -> None:
    images = kinds(torch.Generator().manual_seed(0))
    book = PatchCodebook.learn(images, 4, 16, seed=1)
    assert torch.equal(book.centres, PatchCodebook.learn(images, 4, 16, seed=1).centres)
    assert not torch.equal(book.centres, PatchCodebook.learn(images, 4, 16, seed=2).centres)
    levels = book.centres.mean(1)
    # Every centre is a mean of patches of one colour, and every colour has one.
    assert {round(level, 1) for level in levels.tolist()} == {-2.0, -0.5, 0.5, 2.0}
    points = patches_of(torch.stack(images), 4)
    error = (points - book.centres[book(torch.stack(images))]).square().sum(-1).mean()
    assert error < 0.02 * 48 * 0.01
    with pytest.raises(DataError, match="show 160 distinct patches, too few for 161 codes"):
        PatchCodebook.learn(images, 4, 161, seed=1)


def test_files(tmp_path: Path) -> None:
    book = PatchCodebook(torch.randn(5, 48))
    book.save(tmp_path / "book.safetensors")
    assert torch.equal(PatchCodebook.load(tmp_path / "book.safetensors", 4).centres, book.centres)
    with pytest.raises(DataError, match=r"centres \[5, 48\]; a codebook for patches of 8 pixels has .* \[codes, 192\]"):
        PatchCodebook.load(tmp_path / "book.safetensors", 8)
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="holds no centres"):
        PatchCodebook.load(tmp_path / "other.safetensors", 8)
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "book.safetensors").read_bytes()[:100])
    with pytest.raises(CheckpointError):
        PatchCodebook.load(tmp_path / "torn.safetensors", 4)
