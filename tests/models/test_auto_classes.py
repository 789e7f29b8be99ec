"""X-FM among the classes of transformers, and as a model of sentence-transformers, its pipelines and mteb."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers", exc_type=ImportError)

from xfm_fast import XFM, XFMConfig, accelerate  # noqa: E402
from xfm_fast.data.images import MEAN, STD  # noqa: E402
from xfm_fast.data.shapes import render, scene  # noqa: E402
from xfm_fast.errors import (  # noqa: E402
    CheckpointError,
    ConfigError,
    DataError,
    InputError,
    UnavailableError,
)
from xfm_fast.models.auto import register_auto_classes  # noqa: E402
from xfm_fast.models.auto_classes import (  # noqa: E402
    XFMAutoProcessor,
    XFMImageProcessor,
    XFMModel,
    XFMTokenizer,
)
from xfm_fast.models.frozen import is_frozen  # noqa: E402
from xfm_fast.tokenizer import CaptionTokenizer  # noqa: E402

TEXTS = [
    "A red circle, on the LEFT!",
    "two dogs",
    "a   blue square;  and <person> a dog - of the left/right",
    "red circle and " * 20,
    "naïve Ünïcode ΣΑΣ \u2003 text",
    "a",
]
NUMBERS = "the nineteenth extraordinarily unpronounceable antidisestablishmentarianism " * 9


@pytest.fixture(scope="module")
def model() -> XFM:
    torch.manual_seed(0)
    tokenizer = CaptionTokenizer.train_on_texts(["a red circle on the left", "two dogs"], 300)
    config = XFMConfig.preset("tiny", vocab_size=tokenizer.vocab_size, temperature=0.05)
    made = XFM(config).eval()
    made.tokenizer = tokenizer
    return made


@pytest.fixture(scope="module")
def folder(model: XFM, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("xfm") / "model"
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images that are upright, transparent, turned by EXIF, and 16-bit grey."""
    place = tmp_path_factory.mktemp("images")
    picture = Image.fromarray(render(scene(0, 0, "train"), 64)).resize((80, 60))
    exif = Image.Exif()
    exif[274] = 6
    picture.save(place / "plain.png")
    picture.save(place / "turned.jpg", exif=exif)
    transparent = picture.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(picture.size))
    transparent.save(place / "transparent.png")
    deep = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13
    Image.fromarray(deep).save(place / "deep.png")
    return sorted(place.iterdir())


def open_library(folder: str, **options: Any) -> Any:
    return sentence_transformers.SentenceTransformer(folder, device="cpu", **options)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_no_library() -> None:
    run("import sys, xfm_fast; assert not {'torch', 'transformers', 'pydantic'} & {*sys.modules}")


# Each first use of a class is in a fresh process: nothing else has registered X-FM there.
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        ("AutoProcessor", "XFMAutoProcessor"),
        pytest.param("AutoConfig", "XFMAutoConfig", marks=pytest.mark.slow),
        pytest.param("AutoModel", "XFMModel", marks=pytest.mark.slow),
        pytest.param("AutoModelForZeroShotImageClassification", "XFMModel", marks=pytest.mark.slow),
        pytest.param("AutoTokenizer", "XFMTokenizer", marks=pytest.mark.slow),
        pytest.param("AutoImageProcessor", "XFMImageProcessor", marks=pytest.mark.slow),
    ],
)
def test_known_after_the_import_in_any_order(
    folder: str, auto: str, expected: str, before: bool
) -> None:
    imports = ["import xfm_fast", f"from transformers import {auto}"]
    lines = imports if before else imports[::-1]
    loaded = f"print(type({auto}.from_pretrained({folder!r})).__name__)"
    assert run("\n".join([*lines, loaded])) == expected


def test_without_transformers() -> None:
    run(
        "import sys; sys.modules['transformers'] = None\n"
        "import xfm_fast.models.xfm\n"
        "from xfm_fast.errors import UnavailableError\n"
        "try: import xfm_fast.models.auto\n"
        "except UnavailableError as error: assert '[hf]' in str(error)\n"
        "else: assert False"
    )


def test_texts_and_images_equal_those_of_encode(model: XFM, folder: str, files: list[Path]) -> None:
    library = open_library(folder)
    assert library.modalities == ["text", "image"]
    assert library.max_seq_length == 40
    assert library.get_embedding_dimension() == model.config.embed_dim
    assert json.loads(Path(folder, "modules.json").read_text())[0]["type"].startswith(
        "sentence_transformers."
    )
    for texts in (TEXTS, [NUMBERS]):
        torch.testing.assert_close(
            library.encode(texts, convert_to_tensor=True), model.encode(texts), rtol=0, atol=1e-6
        )
    paths = [*map(str, files)]
    pictures = [Image.open(path) for path in files]
    expected = model.encode(files)
    for images in (paths, pictures):
        features = library.encode(images, convert_to_tensor=True)
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        library.similarity(library.encode(paths), library.encode(TEXTS)),
        model.similarity(files, TEXTS),
        atol=1e-6,
    )
    np.testing.assert_array_equal(library.encode_query("two dogs"), library.encode("Two dogs!"))
    np.testing.assert_array_equal(
        library.encode("a dog", truncate_dim=8), library.encode("a dog")[:8]
    )
    prompted = library.encode("two dogs", prompt="a photo of ")
    np.testing.assert_allclose(prompted, model.encode("a photo of two dogs"), atol=1e-6)
    # Words that cleaning removes leave the empty text, which other models accept.
    empty = library.encode(["", "?!", "two dogs"])
    np.testing.assert_array_equal(empty[0], empty[1])
    assert np.isfinite(empty).all()


def test_library_saves_what_both_read(model: XFM, folder: str, tmp_path: Path) -> None:
    library = open_library(folder)
    library.max_seq_length = 5
    short = library.encode(TEXTS)
    assert np.abs(short - model.encode(TEXTS).numpy()).max() > 1e-3
    saved = tmp_path / "saved"
    library.save_pretrained(str(saved))
    again = open_library(str(saved))
    assert again.max_seq_length == 5
    np.testing.assert_array_equal(again.encode(TEXTS), short)
    # X-FM itself reads the folder, with the same weights and vocabulary, to the byte.
    for name in ("model.safetensors", "tokenizer.json", "config.json", "preprocessor_config.json"):
        assert (saved / name).read_bytes() == Path(folder, name).read_bytes()
    torch.testing.assert_close(XFM.from_pretrained(saved).encode(TEXTS), model.encode(TEXTS))
    for damaged in ("-3", '"long"', "1e30"):
        (saved / "tokenizer_config.json").write_text(f'{{"model_max_length": {damaged}}}')
        with pytest.raises(DataError, match="model_max_length"):
            open_library(str(saved))


def test_a_card_is_written_once(model: XFM, folder: str, tmp_path: Path) -> None:
    card = Path(folder, "README.md").read_text()
    assert 'SentenceTransformer("model")' in card
    assert 'XFM.from_pretrained("model")' in card
    (tmp_path / "README.md").write_text("# Mine")
    model.save_pretrained(tmp_path)
    open_library(str(tmp_path)).save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == "# Mine"


def test_every_copy_computes_the_same(model: XFM, folder: str) -> None:
    library = open_library(folder)
    expected = library.encode(TEXTS)
    for copied in (copy.deepcopy(library), pickle.loads(pickle.dumps(library))):
        np.testing.assert_array_equal(copied.encode(TEXTS), expected)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert "XFMTokenizer" in repr(processor)
    copied = pickle.loads(pickle.dumps(processor))
    inputs: dict[str, Any] = {"text": TEXTS, "padding": True, "return_tensors": "pt"}
    torch.testing.assert_close(dict(copied(**inputs)), dict(processor(**inputs)))


def test_threads_share_a_model(model: XFM, folder: str, files: list[Path]) -> None:
    library = open_library(folder)
    expected = model.encode([*TEXTS, NUMBERS]).numpy()

    def work(start: int) -> float:
        texts = ([*TEXTS, NUMBERS] * 2)[start : start + 3]
        # Other settings of the tokenizer, which a call sets and another thread must not see.
        library.tokenizer(texts, padding="max_length", max_length=8 + start)
        rows = np.concatenate([expected, expected])[start : start + 3]
        return float(np.abs(library.encode(texts) - rows).max())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, [index % 7 for index in range(80)])) < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision(model: XFM, folder: str, tmp_path: Path, dtype: Any) -> None:
    library = open_library(folder, model_kwargs={"dtype": dtype})
    assert library.dtype is (torch.bfloat16 if dtype == "bfloat16" else dtype)
    np.testing.assert_allclose(library.encode(TEXTS), model.encode(TEXTS), atol=0.02)
    library.save_pretrained(str(tmp_path))
    # As the library does, in the dtype of the file.
    assert open_library(str(tmp_path)).dtype is library.dtype
    assert XFM.from_pretrained(tmp_path, dtype="auto").dtype is library.dtype
    assert XFM.from_pretrained(tmp_path).dtype is torch.float32
    wide = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.dtype is torch.float32


def test_a_model_that_reads_images_only(model: XFM, files: list[Path], tmp_path: Path) -> None:
    bare = copy.deepcopy(model)
    bare.tokenizer = None
    bare.save_pretrained(tmp_path)
    library = open_library(str(tmp_path))
    assert library.modalities == ["image"]
    features = library.encode([*map(str, files)], convert_to_tensor=True)
    torch.testing.assert_close(features, model.encode(files), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="text"):
        library.encode(TEXTS)
    assert isinstance(transformers.AutoProcessor.from_pretrained(tmp_path), XFMImageProcessor)
    with pytest.raises(UnavailableError, match=r"tokenizer\.json"):
        transformers.AutoTokenizer.from_pretrained(tmp_path)
    library.save_pretrained(str(tmp_path / "again"))
    assert open_library(str(tmp_path / "again")).modalities == ["image"]


def test_folders_without_the_small_files(model: XFM, folder: str, tmp_path: Path) -> None:
    """Folders of weights alone work too, with the vocabulary in the parent of a run's."""
    run_folder = tmp_path / "model"
    run_folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (run_folder / name).write_bytes(Path(folder, name).read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(Path(folder, "tokenizer.json").read_bytes())
    features = open_library(str(run_folder)).encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(features, model.encode(TEXTS), rtol=0, atol=1e-6)


def test_damage_and_missing_heads_are_named(model: XFM, folder: str, tmp_path: Path) -> None:
    without = XFM(model.config, heads=("mlm", "matching"))
    without.save_pretrained(tmp_path / "headless")
    assert not (tmp_path / "headless" / "modules.json").exists()
    with pytest.raises(UnavailableError, match=r"no 'contrastive' head .*mlm, matching"):
        open_library(str(tmp_path / "headless"))

    def damaged(name: str, content: bytes) -> str:
        place = tmp_path / f"damaged {name} {len(content)}"
        model.save_pretrained(place)
        (place / name).write_bytes(content)
        return str(place)

    weights = Path(folder, "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        open_library(damaged("model.safetensors", weights[:-100]))
    with pytest.raises(DataError, match=r"tokenizer\.json is not a readable"):
        open_library(damaged("tokenizer.json", b"{}"))
    with pytest.raises(ConfigError, match="vision_width"):
        open_library(damaged("config.json", b'{"model_type": "xfm", "vision_width": -4}'))
    note = tmp_path / "note.png"
    note.write_text("a text file")
    library = open_library(folder)
    with pytest.raises(DataError, match="note"):
        library.encode(str(note))


def test_options_that_do_not_apply(folder: str) -> None:
    with pytest.raises(TypeError, match="device_map"):
        transformers.AutoModel.from_pretrained(folder, device_map="auto")
    heads = transformers.AutoModel.from_pretrained(folder, heads=("contrastive",)).xfm.heads
    assert heads == ("contrastive",)


def test_model_under_the_interface_of_clip(model: XFM, folder: str, files: list[Path]) -> None:
    register_auto_classes()
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.projection_dim, config.hidden_size) == (32, 64)
    assert config.temperature == model.config.temperature
    loaded = transformers.AutoModel.from_pretrained(Path(folder))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    inputs = processor(images=[*map(str, files)], text=TEXTS, padding=True, return_tensors="pt")
    assert isinstance(loaded, XFMModel)
    assert isinstance(processor, XFMAutoProcessor)
    assert isinstance(processor.tokenizer, XFMTokenizer)
    assert not loaded.training
    with torch.no_grad():
        output = loaded(**inputs)
        text = loaded.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        image = loaded.get_image_features(inputs["pixel_values"])
    torch.testing.assert_close(output.text_embeds, model.encode(TEXTS), rtol=0, atol=1e-6)
    torch.testing.assert_close(output.image_embeds, model.encode(files), rtol=0, atol=1e-6)
    torch.testing.assert_close(text.pooler_output, output.text_embeds)
    torch.testing.assert_close(image.pooler_output, output.image_embeds)
    assert text.last_hidden_state.shape == (*inputs["input_ids"].shape, 64)
    logits = model.similarity(files, TEXTS) / model.config.temperature
    torch.testing.assert_close(output.logits_per_image, logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.logits_per_text, logits.T, rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="neither pixel_values nor input_ids"):
        loaded()
    fresh = transformers.AutoModel.from_config(config)
    assert fresh.state_dict().keys() == loaded.state_dict().keys()
    # All heads are kept, for the re-ranker and for saving.
    assert loaded.xfm.match(files[0], TEXTS).shape == (len(TEXTS),)


def test_image_processor_takes_any_image(model: XFM, folder: str, files: list[Path]) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    picture = Image.open(files[1])
    expected = processor(picture)["pixel_values"]
    array = np.asarray(picture)
    for image in (
        files[1],
        str(files[1]),
        [picture],
        array,
        [array.transpose(2, 0, 1)],
        torch.tensor(array),
        (array / 255).astype(np.float32),
    ):
        torch.testing.assert_close(processor(image)["pixel_values"], expected)
    assert processor.image_mean == pytest.approx([*MEAN])
    # The usual processor reads the same file; it may round a value of 0 to 255 otherwise.
    usual = transformers.ViTImageProcessor.from_pretrained(folder)
    pixels = usual(picture, return_tensors="pt")["pixel_values"]
    assert (pixels - expected).abs().max() < 1.5 / 255 / min(STD)
    with pytest.raises(ValueError, match=r"nothing\.png"):
        processor("nothing.png")


def test_image_processor_is_made_of_its_fields(
    folder: str, files: list[Path], tmp_path: Path
) -> None:
    """As those of transformers, from whichever door: a folder, a saved copy, a dictionary."""
    register_auto_classes()
    loaded: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "saved")
    expected = loaded(files)["pixel_values"]
    fields = loaded.to_dict()
    fields["size"] = {"height": 48, "width": 48}
    doors: list[Any] = [
        XFMImageProcessor.from_pretrained(folder),
        XFMImageProcessor.from_pretrained(tmp_path / "saved"),
        transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved"),
        XFMImageProcessor.from_dict(loaded.to_dict()),
        pickle.loads(pickle.dumps(loaded)),
    ]
    for again in doors:
        assert again.__class__ is XFMImageProcessor
        assert again.to_json_string() == loaded.to_json_string()
        torch.testing.assert_close(
            again(list[Any](files))["pixel_values"], expected, rtol=0, atol=0
        )
    small: Any = XFMImageProcessor.from_dict(fields)
    assert small(files)["pixel_values"].shape == (len(files), 3, 48, 48)


def test_processor_passes_the_limit_of_tokens_on(folder: str) -> None:
    processor = transformers.AutoProcessor.from_pretrained(folder, model_max_length=5)
    assert processor.tokenizer.model_max_length == 5


def test_tokenizer_is_that_of_captions(model: XFM, folder: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.tokenizer is not None
    for text in [*TEXTS, NUMBERS]:
        ids, mask = tokenizer(text).values()
        features = model.project_text(model.encode_text(torch.tensor([ids]), torch.tensor([mask])))
        torch.testing.assert_close(features[0], model.encode(text), rtol=0, atol=1e-6)
    assert tokenizer("?!")["input_ids"] == [0, 2]
    assert tokenizer.decode(tokenizer("Two DOGS!")["input_ids"], skip_special_tokens=True) == (
        "two dogs"
    )
    offsets = tokenizer(["a dog", "two"], padding=True, return_offsets_mapping=True)
    assert [len(row) for row in offsets["offset_mapping"]] == [len(offsets["input_ids"][0])] * 2


def test_vocabulary_of_bert(tmp_path: Path) -> None:
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "two", "dogs", "##s", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = CaptionTokenizer.from_files(tmp_path)
    model = XFM(XFMConfig.preset("tiny", vocab_size=8)).eval()
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path / "model")
    library = open_library(str(tmp_path / "model"))
    texts = ["Two dogs", "two"]
    np.testing.assert_allclose(library.encode(texts), model.encode(texts), atol=1e-6)


def test_pipelines_agree(model: XFM, folder: str, files: list[Path], caplog: Any) -> None:
    classify = transformers.pipeline("zero-shot-image-classification", folder, device="cpu")
    assert "not supported" not in caplog.text
    labels = ["a red circle", "two dogs", NUMBERS]
    plain = next(path for path in files if path.name == "plain.png")
    results = classify(str(plain), candidate_labels=labels, hypothesis_template="{}")
    logits = model.similarity(plain, labels) / model.config.temperature
    expected = dict(zip(labels, logits.softmax(0).tolist(), strict=True))
    assert {row["label"]: row["score"] for row in results} == pytest.approx(expected, abs=1e-5)
    extract = transformers.pipeline("feature-extraction", folder, device="cpu")
    for text, features in zip(TEXTS, extract(TEXTS), strict=True):
        np.testing.assert_allclose(features, model.encode([text]), atol=1e-6)
    extract = transformers.pipeline("image-feature-extraction", folder, device="cpu")
    np.testing.assert_allclose(extract(str(plain)), model.encode([plain]), atol=1e-6)


def test_training_through_the_library(folder: str) -> None:
    library = open_library(folder).train()
    library(library.preprocess(["two dogs", "a circle"]))["sentence_embedding"].sum().backward()
    gradient = (
        library[0].model.xfm.text_encoder.roberta.encoder.layer[0].attention.self.query.weight.grad
    )
    assert gradient.abs().sum() > 0


def test_acceleration_freezes_or_rounds(model: XFM, folder: str) -> None:
    library = open_library(folder)
    expected = library.encode(TEXTS)
    xfm = library[0].model.xfm
    report = accelerate(library, freeze=True, unpad=True, verify=TEXTS[:2])
    assert is_frozen(xfm)
    assert report.share == 1
    assert report.differences["sentence_embedding"] < 1e-5
    assert "XFM" in str(report)
    np.testing.assert_allclose(library.encode(TEXTS), expected, atol=1e-6)
    report = accelerate(library, dtype="int8", verify=TEXTS[:2])
    assert not is_frozen(xfm)
    assert xfm.quantised == "int8"
    assert 0.99 < report.rounding["sentence_embedding"] < 1 + 1e-6
    rounded = library.encode(TEXTS)
    assert 0 < np.abs(rounded - expected).max() < 0.1
    report.revert()
    assert xfm.quantised is None
    np.testing.assert_array_equal(library.encode(TEXTS), expected)
    with pytest.raises(InputError, match=r"already uses these kernels"):
        accelerate(library, dtype=torch.bfloat16)


def test_a_task_of_mteb(model: XFM, folder: str) -> None:
    mteb = pytest.importorskip("mteb")
    datasets = pytest.importorskip("datasets")
    from mteb.abstasks.sts import AbsTaskSTS  # pyright: ignore[reportMissingImports]
    from mteb.abstasks.task_metadata import TaskMetadata  # pyright: ignore[reportMissingImports]

    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[2]), (TEXTS[2], TEXTS[0])]

    class Pairs(AbsTaskSTS):
        metadata = TaskMetadata(
            name="Pairs",
            description="Three pairs of texts.",
            dataset={"path": "none", "revision": "none"},
            type="STS",
            category="t2t",
            eval_langs=["eng-Latn"],
            main_score="cosine_pearson",
        )

        def load_data(self, **options: Any) -> None:
            first, second = zip(*pairs, strict=True)
            columns = {"sentence1": first, "sentence2": second, "score": [0.0, 2.0, 5.0]}
            self.dataset = {"test": datasets.Dataset.from_dict(columns)}
            self.data_loaded = True

    results = mteb.evaluate(open_library(folder), Pairs(), cache=None, show_progress_bar=False)
    (score,) = results.task_results[0].scores["test"]
    cosines = [model.encode(a) @ model.encode(b) for a, b in pairs]
    expected = np.corrcoef(torch.stack(cosines).numpy(), [0.0, 2.0, 5.0])[0, 1]
    assert score["cosine_pearson"] == pytest.approx(expected, abs=1e-3)
