"""Transforms: the official parameters, the same pixels as PIL, and no randomness but the generator's."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from xfm_fast.data.images import MEAN, STD
from xfm_fast.data.transforms import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPERATIONS,
    RandAugment,
    RandomErasing,
    RegionTransform,
    TrainingTransform,
    finetuning_transform,
    imagenet_evaluation_transform,
    imagenet_training_transform,
    mentions_side,
    pretraining_transform,
    probe_evaluation_transform,
    probe_training_transform,
    random_crop_box,
    resize_crop,
)
from xfm_fast.errors import ConfigError


def _picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def _normalised(
    image: Image.Image, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Tensor:
    """ToTensor and Normalize, as they are told."""
    scaled = np.asarray(image, dtype=np.float64) / 255
    return torch.from_numpy((scaled - np.array(mean)) / np.array(std)).permute(2, 0, 1)


def _region(picture: Any, rng: np.random.Generator) -> Tensor:
    return RegionTransform(32)(picture, (5, 6, 60, 50), True, rng)


def _global_states() -> tuple[object, ...]:
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state(legacy=False)["state"]["pos"],
        random.getstate(),
    )


ALL: dict[str, Callable[[Any, np.random.Generator], Tensor]] = {
    "pretraining": pretraining_transform(32),
    "finetuning": finetuning_transform(32),
    "region": _region,
    "imagenet": imagenet_training_transform(32),
    "probe": probe_training_transform(32, "food101"),
    "probe mnist": probe_training_transform(32, "mnist"),
}


@pytest.mark.parametrize("name", ALL)
def test_an_item_is_a_function_of_image_and_generator(name: str) -> None:
    picture, transform = _picture(), ALL[name]
    before = _global_states()
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    once = [transform(picture, np.random.default_rng(seed)) for seed in range(6)]
    again = [transform(pixels, np.random.default_rng(seed)) for seed in range(6)]
    assert all(map(torch.equal, once, again))
    assert len({item[0, :, 0].sum().item() for item in once}) > 1
    assert _global_states() == before, "a global generator was used"
    for item in once:
        assert item.shape == (3, 32, 32)
        assert item.dtype == torch.float32
        assert item.is_contiguous()
        assert item.isfinite().all()


def test_the_official_parameters() -> None:
    pretraining, finetuning = pretraining_transform(224), finetuning_transform(384)
    assert (pretraining.scale, pretraining.flip, pretraining.size) == ((0.2, 1.0), 0.5, 224)
    assert (finetuning.scale, finetuning.flip, finetuning.size) == ((0.5, 1.0), 0.5, 384)
    for transform in (pretraining, finetuning):
        assert transform.augment == RandAugment(
            "all", draws=2, probability=0.5, level=7, deviation=0
        )
        assert (transform.mean, transform.std) == (MEAN, STD)
    assert list(OPERATIONS["all"]) == [
        *("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness"),
        *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    ]
    assert RegionTransform(224).augment == RandAugment("colour", draws=2, probability=0.5, level=7)
    imagenet = imagenet_training_transform(224)
    assert (imagenet.view.scale, imagenet.view.mean, imagenet.view.std) == (
        (0.08, 1.0),
        IMAGENET_MEAN,
        IMAGENET_STD,
    )
    assert imagenet.view.augment == RandAugment(
        "imagenet", draws=2, probability=0.5, level=9, deviation=0.5
    )
    assert imagenet.erase == RandomErasing(0.25, (0.02, 1 / 3), 0.3)
    probe = probe_training_transform(224, "caltech101")
    assert (probe.scale, probe.flip, probe.augment, probe.grey) == ((0.08, 1.0), 0.5, None, True)
    assert probe_training_transform(224, "fer2013").scale is None
    assert not probe_training_transform(224, "cifar10").grey
    assert probe.mean == probe.std == HALF


def _same_distribution(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's p-value."""
    result: Any = stats.ks_2samp(a, b)
    return result.pvalue


def test_crops_are_distributed_as_those_of_torchvision() -> None:
    width, height, scale, draws = 500, 375, (0.2, 1.0), 3000
    rng = np.random.default_rng(0)
    ours = np.array([random_crop_box(width, height, scale, rng) for _ in range(draws)], dtype=float)
    torch.manual_seed(0)
    crop, image = v2.RandomResizedCrop(32, scale=scale), torch.zeros(3, height, width)
    parameters = [crop.make_params([image]) for _ in range(draws)]
    official = np.array(
        [[m["left"], m["top"], m["left"] + m["width"], m["top"] + m["height"]] for m in parameters]
    )
    for quantity in (
        lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]),
        lambda box: (box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1]),
        lambda box: box[:, 0],
        lambda box: box[:, 3],
    ):
        assert _same_distribution(quantity(ours), quantity(official)) > 0.01
    pixels = np.array(
        [random_crop_box(width, height, (0.25, 1.0), rng) for _ in range(draws)], dtype=float
    )
    area = [(box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) for box in (pixels, official)]
    assert _same_distribution(*area) < 1e-3, "the comparison would not notice another scale"


@pytest.mark.parametrize("size", [16, 32, 160])
def test_crop_and_resize_give_the_pixels_of_pil(size: int) -> None:
    picture, box = _picture(), (7, 3, 80, 61)
    expected = np.asarray(picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)).astype(
        int
    )
    for flip in (False, True):
        pixels = resize_crop(picture, box, size, flip=flip)
        assert pixels.dtype == torch.uint8
        ours = pixels.permute(1, 2, 0).numpy()
        difference = np.abs((ours[:, ::-1] if flip else ours) - expected)
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.02


def test_the_order_of_the_steps() -> None:
    """Crop, resize, flip, augmentation, normalisation, by PIL and with the same draws."""
    picture, transform = _picture(), pretraining_transform(48)
    flips = 0
    for seed in range(20):
        rng, plain = np.random.default_rng(seed), np.random.default_rng(seed)
        box = random_crop_box(90, 70, (0.2, 1.0), plain)
        flip = plain.random() < 0.5
        flips += flip
        image = picture.crop(box).resize((48, 48), Image.Resampling.BICUBIC)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = _normalised(RandAugment()(image, plain))
        ours = transform(picture, rng).double()
        # Two levels of the resize, which equalisation may spread: nearly all pixels agree.
        assert ((ours - expected).abs() > 3 / 255 / min(STD)).double().mean() < 0.01
    assert 3 < flips < 17


@pytest.mark.parametrize(("size", "side"), [(224, 256), (192, 219), (384, 384)])
def test_imagenet_evaluation(size: int, side: int) -> None:
    picture = _picture(500, 375)
    width = int(side * 500 / 375)
    resized = picture.resize((width, side), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((side - size) / 2)
    expected = _normalised(
        resized.crop((left, top, left + size, top + size)), IMAGENET_MEAN, IMAGENET_STD
    )
    torch.testing.assert_close(
        imagenet_evaluation_transform(size)(picture).double(), expected, rtol=0, atol=1e-6
    )


def test_probe_evaluation() -> None:
    picture = _picture(400, 300)
    resized = picture.resize((384, 288), Image.Resampling.BICUBIC)
    expected = _normalised(resized.crop((80, 32, 304, 256)), HALF, HALF)
    torch.testing.assert_close(
        probe_evaluation_transform(224, "dtd")(picture).double(), expected, rtol=0, atol=1e-6
    )
    digit = _picture(28, 28)
    grey = digit.resize((224, 224), Image.Resampling.BICUBIC).convert("L").convert("RGB")
    ours = probe_evaluation_transform(224, "mnist")(digit).double()
    torch.testing.assert_close(ours, _normalised(grey, HALF, HALF), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="288"):
        probe_evaluation_transform(384, "dtd")


def test_erasing_follows_its_definition() -> None:
    image, rng, draws = torch.full((3, 40, 50), 7.0), np.random.default_rng(0), 1000
    areas, aspects = [], []
    for _ in range(draws):
        out = RandomErasing()(image, rng)
        changed = (out != 7).any(0)
        if not changed.any():
            assert out is image
            continue
        rows, columns = (
            torch.nonzero(changed.any(1)).flatten(),
            torch.nonzero(changed.any(0)).flatten(),
        )
        height, width = len(rows), len(columns)
        assert (
            changed.sum()
            == height * width
            == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        )
        areas.append(height * width / 2000)
        aspects.append(abs(math.log(height / width)))
    assert (image == 7).all(), "the input was changed"
    assert abs(len(areas) / draws - 0.25) < 4 * math.sqrt(0.25 * 0.75 / draws)
    assert 0.01 < min(areas) < 0.04
    assert 0.28 < max(areas) < 0.35
    assert max(aspects) < math.log(1 / 0.3) + 0.2


def test_what_must_not_be_flipped_is_not() -> None:
    assert mentions_side("what is left of the dog", ["cat", "on the Right"])
    assert not mentions_side("what is it", ["cat"])
    picture = Image.fromarray(
        np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    )
    transform, flipped = TrainingTransform(16, None), 0
    for seed in range(100):
        assert (
            transform(picture, np.random.default_rng(seed), may_flip=False).diff(dim=2) >= 0
        ).all()
        flipped += bool((transform(picture, np.random.default_rng(seed)).diff(dim=2) <= 0).all())
    assert abs(flipped - 50) < 4 * math.sqrt(25)
    # What comes after the flip does not depend on whether it was allowed.
    full = pretraining_transform(16)
    pairs = [
        [full(picture, np.random.default_rng(seed), may_flip=may) for may in (True, False)]
        for seed in range(40)
    ]
    assert sum(torch.equal(a, b) for a, b in pairs) >= 10
