"""A model as one uses it: strings and image files in, features, probabilities and boxes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from xfm_fast.config import XFMConfig
from xfm_fast.data.images import load_image
from xfm_fast.data.shapes import render, scene
from xfm_fast.errors import CheckpointError, ConfigError, DataError, InputError, UnavailableError
from xfm_fast.models.xfm import XFM, XFMOutput
from xfm_fast.tasks.grounding import GroundingModel, pixel_boxes
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption
from xfm_fast.training.distributed import end_groups

TEXTS = ["a red circle", "A blue square, on the left!", "two dogs"]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts([pre_caption(text) for text in TEXTS], 300)


@pytest.fixture(scope="module")
def model(tokenizer: CaptionTokenizer) -> XFM:
    torch.manual_seed(0)
    model = XFM(XFMConfig.preset("tiny", vocab_size=tokenizer.vocab_size)).eval()
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        Image.fromarray(render(scene(0, index, "train"), 64)).resize((96, 48)).save(path)
    return paths


def test_a_model_in_training_stays_so_and_encodes_without_dropout(model: XFM) -> None:
    expected = model.encode(TEXTS)
    model.train()
    found, training = model.encode(TEXTS), model.training
    model.eval()
    torch.testing.assert_close(found, expected)
    assert training
    assert found.grad_fn is None


def test_texts_are_cleaned_and_encoded_in_any_batches(
    model: XFM, tokenizer: CaptionTokenizer
) -> None:
    input_ids, mask = tokenizer.encode([pre_caption(text) for text in TEXTS])
    with torch.no_grad():
        expected = model.project_text(model.encode_text(input_ids, mask))
    for batch_size in (1, 2, 32):
        torch.testing.assert_close(model.encode(TEXTS, batch_size=batch_size), expected)
    torch.testing.assert_close(model.encode(TEXTS[1]), expected[1])
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))


def test_files_and_pictures_are_encoded_alike(model: XFM, files: list[Path]) -> None:
    pixels = torch.stack([load_image(path, model.config.image_size) for path in files])
    with torch.no_grad():
        expected = model.project_image(model.encode_image(pixels))
    torch.testing.assert_close(model.encode(files), expected)
    torch.testing.assert_close(
        model.encode([Image.open(files[0]), files[1]], batch_size=1), expected[:2]
    )
    torch.testing.assert_close(model.encode(files[2]), expected[2])


def test_similarity_and_match(model: XFM, files: list[Path]) -> None:
    found = model.similarity(files, TEXTS)
    torch.testing.assert_close(found, model.encode(files) @ model.encode(TEXTS).T)
    torch.testing.assert_close(model.similarity(str(files[1]), TEXTS), found[1])
    torch.testing.assert_close(model.similarity(files, TEXTS[2]), found[:, 2])
    assert model.similarity(files[0], TEXTS[0]).shape == ()
    input_ids, mask = model.tokenizer.encode([pre_caption(text) for text in TEXTS])
    with torch.no_grad():
        memory = model.image_memory(
            model.encode_image(load_image(files[0], model.config.image_size)[None])
        )
        fused = model.fuse(
            model.encode_text(input_ids, mask), mask, memory, torch.zeros(3, dtype=torch.long)
        )
        expected = model.match_logits(fused).softmax(1)[:, 1]
    for batch_size in (2, 256):
        torch.testing.assert_close(
            model.match(str(files[0]), TEXTS, batch_size=batch_size), expected
        )
    torch.testing.assert_close(model.match(files[0], TEXTS[1]), expected[1])


def test_boxes_are_pixels_of_the_image(tmp_path: Path, model: XFM, files: list[Path]) -> None:
    boxes = model.ground(files[0], TEXTS)
    output = model(
        load_image(files[0], model.config.image_size)[None].expand(3, -1, -1, -1), *_tokens(model)
    )
    expected = pixel_boxes(output.boxes.detach(), torch.tensor([[96.0, 48.0]]))
    torch.testing.assert_close(boxes, expected)
    torch.testing.assert_close(model.ground(files[0], TEXTS[0]), expected[0])
    # A task model takes the tokenizer over.
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        GroundingModel.from_pretrained(tmp_path).ground(files[0], TEXTS), boxes
    )


def _tokens(model: XFM) -> tuple[torch.Tensor, torch.Tensor]:
    assert model.tokenizer is not None
    return model.tokenizer.encode([pre_caption(text) for text in TEXTS])


def test_a_folder_keeps_its_tokenizer(
    tmp_path: Path, model: XFM, tokenizer: CaptionTokenizer
) -> None:
    model.save_pretrained(tmp_path / "run" / "model")
    loaded = XFM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(loaded.encode(TEXTS), model.encode(TEXTS))
    # Runs of before keep the vocabulary beside the folder of their weights.
    (tmp_path / "run" / "model" / "tokenizer.json").rename(tmp_path / "run" / "tokenizer.json")
    torch.testing.assert_close(
        XFM.from_pretrained(tmp_path / "run" / "model").encode(TEXTS), model.encode(TEXTS)
    )
    (tmp_path / "run" / "tokenizer.json").rename(tmp_path / "other.json")
    bare = XFM.from_pretrained(tmp_path / "run" / "model")
    with pytest.raises(UnavailableError, match="tokenizer="):
        bare.encode(TEXTS)
    given = XFM.from_pretrained(tmp_path / "run" / "model", tokenizer=tmp_path / "other.json")
    torch.testing.assert_close(given.encode(TEXTS), model.encode(TEXTS))
    assert (
        XFM.from_official(model.state_dict(), model.config, tokenizer=tokenizer).tokenizer
        is tokenizer
    )


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, model: XFM) -> None:
    larger = CaptionTokenizer.train_on_texts(
        ["some other words", "of quite another vocabulary and more of them"], 400
    )
    assert larger.vocab_size > model.config.vocab_size
    model.save_pretrained(tmp_path)
    larger.save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="vocabulary"):
        XFM.from_pretrained(tmp_path)


def test_a_config_says_its_type(tmp_path: Path, model: XFM) -> None:
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    assert '"model_type": "xfm"' in path.read_text()
    path.write_text(path.read_text().replace('"xfm"', '"bert"'))
    with pytest.raises(ConfigError, match=r"model_type.*'bert'"):
        XFM.from_pretrained(tmp_path)


@pytest.mark.parametrize("given", [("pixels",), ("input_ids",), ("pixels", "input_ids")])
def test_forward_says_what_it_was_given(
    model: XFM, files: list[Path], given: tuple[str, ...]
) -> None:
    pixels = torch.stack([load_image(path, model.config.image_size) for path in files])
    input_ids, mask = _tokens(model)
    values = {
        name: value
        for name, value in {"pixels": pixels, "input_ids": input_ids}.items()
        if name in given
    }
    output = model(**values)
    assert isinstance(output, XFMOutput)
    assert (output.image_features is not None) == ("pixels" in given)
    assert (output.text_features is not None) == ("input_ids" in given)
    assert (output.match_logits is not None) == (len(given) == 2)
    if len(given) == 2:
        torch.testing.assert_close(
            output.match_logits.softmax(1)[0, 1], model.match(files[0], TEXTS[0])
        )
        torch.testing.assert_close(model(pixels, input_ids, mask).fused, output.fused)
    with pytest.raises(InputError, match="neither pixels nor input_ids"):
        model()


def test_data_parallel(model: XFM, files: list[Path], tmp_path: Path) -> None:
    pixels = torch.stack([load_image(path, model.config.image_size) for path in files])
    expected = model(pixels, *_tokens(model))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        output = wrapped(pixels, *_tokens(model))
        torch.testing.assert_close(output.match_logits, expected.match_logits)
        output.match_logits.sum().backward()
        assert model.itm_head[0].weight.grad is not None
    finally:
        model.zero_grad()
        end_groups()


def test_files_that_are_no_images_and_a_model_without_weights(
    model: XFM, files: list[Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(files[0].read_bytes()[:200])
    with pytest.raises(DataError, match=r"cut\.png"):
        model.encode(Image.open(cut))
    with pytest.raises(InputError, match=r"Path\("):
        model.encode(str(files[0]))
    with torch.device("meta"):
        empty = XFM(model.config)
    empty.tokenizer = model.tokenizer
    for call in (
        lambda: empty.encode("a dog"),
        lambda: empty.encode(files),
        lambda: empty.match(files[0], "a dog"),
    ):
        with pytest.raises(InputError, match="XFM is on the meta device"):
            call()
    with pytest.raises(CheckpointError, match="meta device"):
        empty.save_pretrained(tmp_path / "model")
    assert not [*(tmp_path / "model").iterdir()]
