"""The inputs of benchmarks: photographs with captions, random texts, models with shared weights, embeddings."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from xfm_fast import checkpoint
from xfm_fast.config import PresetName, XFMConfig
from xfm_fast.data.collection import open_collection
from xfm_fast.data.images import decode_image, evaluation_transform
from xfm_fast.errors import DataError, UnavailableError
from xfm_fast.loading import Source, open_model
from xfm_fast.models.xfm import XFM, Head
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

from .record import Data, Skip

HEADS: tuple[Head, ...] = ("contrastive", "matching")
_TABLE = ".relative_position_bias_table"
MOST_PHOTOS = 64
MAX_TOKENS = 40
"""Length to which the official evaluation pads captions."""
# Of VQA v2: 6 words and a question mark on average.
_QUESTION_LENGTHS = (9, 8, 12, 9, 10)
ANSWERS = 3129
# By tokens between `<s>` and `</s>`: distinct prefixes, inner ones, and answers that end there.
_PREFIXES = (1276, 1917, 770, 91, 20, 1)
_INNER = (731, 497, 87, 20, 1, 0)
_ENDING = (823, 1519, 695, 72, 19, 1)
# The r-th inner prefix gets 1 / r to this power of the children of the first.
_SKEW = 0.7


@dataclass
class Collection:
    """Decoded photographs with cleaned captions; `photo_of` has the photograph of every caption.

    `skipped` lists what cannot be used, and `left_unread` counts photographs beyond the limit.
    """

    origin: str
    names: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    photo_of: list[int] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    left_unread: int = 0

    def pixels(self, indices: Iterable[int], image_size: int) -> Tensor:
        """The official test transform of some photographs: `[B, 3, R, R]`."""
        transform = evaluation_transform(image_size)
        return torch.stack([transform(self.images[i]) for i in indices])

    def captions_of(self, photo: int) -> list[str]:
        """The captions of a photograph."""
        return [
            caption
            for caption, owner in zip(self.captions, self.photo_of, strict=True)
            if owner == photo
        ]

    def texts(self, count: int) -> list[str]:
        """`count` captions: the first of every photograph, then the second, and from the start if there are too few."""
        earlier = [self.photo_of[:index].count(owner) for index, owner in enumerate(self.photo_of)]
        order = sorted(range(len(earlier)), key=earlier.__getitem__)
        return [self.captions[order[i % len(order)]] for i in range(count)]

    def add(self, name: str, load: Callable[[], tuple[Image.Image, Sequence[str]]]) -> None:
        """Add a photograph, or list it as skipped."""
        try:
            image, captions = load()
        except DataError as error:
            self.skipped.append(Skip(what=name, reason=str(error)))
            return
        cleaned = []
        for caption in captions:
            try:
                cleaned.append(pre_caption(caption))
            except DataError as error:
                self.skipped.append(Skip(what=name, reason=str(error)))
        if not cleaned:
            self.skipped.append(Skip(what=name, reason="has no usable caption"))
            return
        self.photo_of += [len(self.names)] * len(cleaned)
        self.captions += cleaned
        self.names.append(name)
        self.images.append(image)


def captions_table() -> Any:
    """The photographs of scikit-image and scikit-learn with our captions."""
    return json.loads(Path(__file__).with_name("captions.json").read_text(encoding="utf-8"))


def bundled() -> Collection:
    """The photographs of scikit-image and scikit-learn, with our captions; `DataError` if neither is installed."""
    table = captions_table()
    collection = Collection(
        "the photographs of scikit-image and scikit-learn, captions written for xfm-fast"
    )
    absent: set[str] = set()
    for photo in table["photos"]:
        package = photo["package"]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            absent.add(package)
            continue
        path, captions = (
            Path(spec.origin).parent / table["folders"][package] / photo["file"],
            photo["captions"],
        )
        collection.add(
            f"{package}/{photo['file']}",
            lambda path=path, captions=captions: (decode_image(path), captions),
        )
    if not collection.names:
        raise DataError(
            'no photographs: scikit-image and scikit-learn are not installed; pip install ".[bench]", or name '
            "your own with --data"
        )
    collection.skipped += [
        Skip(what=package, reason=f"{package} is not installed") for package in sorted(absent)
    ]
    return collection


def from_files(path: str | Path, most: int = MOST_PHOTOS) -> Collection:
    """At most `most` photographs with captions, in any form of `xfm_fast.data.collection`.

    Raises `DataError` if the folder or file cannot be read, or nothing in it can be used.
    """
    pictures = open_collection(path)
    entries, faults = pictures.listing()
    collection = Collection(
        str(path), skipped=[Skip(what=name, reason=reason) for name, reason in faults.items()]
    )
    for number, entry in enumerate(entries):
        if len(collection.names) == most:
            collection.left_unread = len(entries) - number
            break
        collection.add(entry.name, partial(pictures.load, entry))
    if not collection.names:
        reasons = "; ".join(f"{skip.what}: {skip.reason}" for skip in collection.skipped[:3])
        raise DataError(
            f"nothing in {path} can be used ({reasons}); give images with captions: a folder with captions.csv or with "
            "name.txt next to each image, a CSV of image and caption, or a WebDataset shard"
        )
    return collection


class Texts(NamedTuple):
    """Texts as ids and mask `[T, L]`, padded."""

    ids: Tensor
    mask: Tensor

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()

    @property
    def span(self) -> str:
        """Shortest and longest length."""
        low, high = min(self.lengths), max(self.lengths)
        return str(low) if low == high else f"{low}-{high}"


@dataclass
class Inputs:
    """Photographs, captions and random texts for a model of some `sizes`; `seed` draws the texts."""

    collection: Collection
    tokenizer: CaptionTokenizer
    sizes: XFMConfig
    seed: int = 0
    device: torch.device | str = "cpu"

    def pixels(self, count: int, image_size: int | None = None) -> Tensor:
        """`[count, 3, R, R]`; photographs repeat if there are too few."""
        photos = len(self.collection.names)
        chosen = (number % photos for number in range(count))
        return self.collection.pixels(chosen, image_size or self.sizes.image_size).to(self.device)

    def encoded(self, captions: list[str]) -> Texts:
        """Captions padded to 40 tokens, as in the official evaluation."""
        ids, mask = self.tokenizer.encode(captions, MAX_TOKENS)
        return Texts(ids.to(self.device), mask.to(self.device))

    def texts(self, count: int) -> Texts:
        """`count` captions."""
        return self.encoded(self.collection.texts(count))

    def random_texts(self, lengths: Sequence[int]) -> Texts:
        """Texts of random tokens between `<s>` and `</s>`, padded to the longest."""
        config, generator = self.sizes, torch.Generator().manual_seed(self.seed)
        ids = torch.full((len(lengths), max(lengths)), config.pad_token_id)
        for row, length in zip(ids, lengths, strict=True):
            row[:length] = torch.randint(
                _first_word(config), config.vocab_size, (length,), generator=generator
            )
            row[0], row[length - 1] = config.bos_token_id, config.eos_token_id
        ids = ids.to(self.device)
        return Texts(ids, ids.ne(config.pad_token_id).long())

    def questions(self, count: int) -> Texts:
        """Random questions of the lengths of VQA v2, padded to the longest."""
        return self.random_texts([*islice(cycle(_QUESTION_LENGTHS), count)])

    def answers(self) -> Texts:
        """A list of 3,129 answers in random tokens, `<s> ... </s>`, padded to the longest: 8 tokens.

        They have the trie of the usual answers of VQA v2 in RoBERTa's tokens: as many answers, prefixes and inner
        prefixes of each length. The prefix that an answer extends is drawn from a skewed distribution: of the 1,276
        first tokens, one has some 55 continuations.
        """
        config, generator = self.sizes, torch.Generator().manual_seed(self.seed)
        first = _first_word(config)
        level, answers = [[config.bos_token_id]], list[list[int]]()
        for count, inner, ending in zip(_PREFIXES, _INNER, _ENDING, strict=True):
            weights = torch.arange(1, len(level) + 1).double() ** -_SKEW
            # Each has one child; the others are drawn.
            drawn = torch.multinomial(weights, count, replacement=True, generator=generator)[
                len(level) :
            ]
            below = []
            for prefix, others in zip(
                level, torch.bincount(drawn, minlength=len(level)).tolist(), strict=True
            ):
                tokens = (
                    torch.randperm(config.vocab_size - first, generator=generator)[: 1 + others]
                    + first
                )
                below += [[*prefix, token] for token in tokens.tolist()]
            order = torch.randperm(len(below), generator=generator).tolist()
            level = [below[place] for place in order[:inner]]
            # Answers end at leaves, and some at inner prefixes.
            answers += [[*below[place], config.eos_token_id] for place in order[::-1][:ending]]
        order = torch.randperm(len(answers), generator=generator).tolist()
        ids = [torch.tensor(answers[place]) for place in order]
        padded = nn.utils.rnn.pad_sequence(
            ids, batch_first=True, padding_value=config.pad_token_id
        ).to(self.device)
        return Texts(padded, padded.ne(config.pad_token_id).long())


def _first_word(config: XFMConfig) -> int:
    """The first id after the special ones."""
    return max(config.pad_token_id, config.bos_token_id, config.eos_token_id) + 1


Builders = Mapping[str, Callable[[XFMConfig], XFM]]


class Subjects:
    """Models of one set of weights, built on first use, on `device`; `origin` is for reports.

    Resolutions share all tensors but the position tables, which are interpolated; every dtype has one converted copy.
    `builders` make the model of a task; its head is random, and only the models of the last task are kept.
    """

    def __init__(
        self,
        config: XFMConfig,
        state: Mapping[str, Tensor],
        origin: str,
        builders: Builders,
        *,
        trained: bool,
    ) -> None:
        self.config, self.origin, self.builders, self.trained = config, origin, builders, trained
        self.tokenizer: CaptionTokenizer | None = None
        self.device = torch.device("cpu")
        self._state = state
        self._shared: dict[torch.dtype, dict[str, nn.Parameter]] = {}
        self._models: dict[tuple[str, int, torch.dtype], XFM] = {}

    @classmethod
    def open(cls, source: Source, builders: Builders) -> Subjects:
        """The weights of a model, or random ones; raises the errors of `open_model`."""
        source.check()
        if source.model is None:
            config = preset_config(source.random or "base")
            return cls(
                config,
                random_state(config, HEADS, 0),
                "random weights (seed 0)",
                builders,
                trained=False,
            )
        opened = open_model(source, needs=HEADS, device="cpu")
        if lacking := {*HEADS} - {*opened.model.heads}:
            raise UnavailableError(
                f"{source.model} has no {' or '.join(lacking)} head; give a pretrained model"
            )
        state = checkpoint.select_heads(opened.model.state_dict(), HEADS)
        subjects = cls(opened.model.config, state, opened.origin, builders, trained=True)
        subjects.tokenizer = opened.model.tokenizer
        return subjects

    def model(self, image_size: int, dtype: torch.dtype, work: str = "") -> XFM:
        """The model for a resolution, a dtype and a kind of work, in evaluation mode."""
        task = work.partition("-")[0]
        task = task if task in self.builders else ""
        key = (task, image_size, dtype)
        if key not in self._models:
            if task:
                self._models = {
                    known: model for known, model in self._models.items() if known[0] in ("", task)
                }
            config = self.config.replace(image_size=image_size)
            if dtype not in self._shared:
                self._shared[dtype] = {
                    name: nn.Parameter(tensor.to(self.device, dtype), requires_grad=False)
                    for name, tensor in self._state.items()
                    if not name.endswith(_TABLE)
                }
            tables = {
                name: checkpoint.interpolate_table(tensor, (config.grid, config.grid)).to(
                    self.device, dtype
                )
                for name, tensor in self._state.items()
                if name.endswith(_TABLE)
            }
            with torch.device("meta"):
                model = self.builders[task](config) if task else XFM(config, heads=HEADS)
            wanted = model.state_dict()
            own = checkpoint.random_tensors(
                {name: tensor for name, tensor in wanted.items() if name not in self._state}, 0
            )
            given = {
                **self._shared[dtype],
                **tables,
                **{n: t.to(self.device, dtype) for n, t in own.items()},
            }
            model.load_state_dict({name: given[name] for name in wanted}, assign=True)
            self._models[key] = model.eval().requires_grad_(False)
        return self._models[key]


def preset_config(preset: PresetName) -> XFMConfig:
    """A preset with a vocabulary that gives captions their usual length."""
    return XFMConfig.preset(preset, **({"vocab_size": 2048} if preset == "tiny" else {}))


def random_state(config: XFMConfig, heads: Iterable[Head], seed: int) -> dict[str, Tensor]:
    """Random weights without zeros, unlike a fresh model, so that comparisons cover every term."""
    with torch.device("meta"):
        return checkpoint.random_tensors(XFM(config, heads=heads).state_dict(), seed)


def make_tokenizer(
    config: XFMConfig, files: Path | None, collection: Collection
) -> CaptionTokenizer:
    """RoBERTa's tokenizer from its files, or one of a model's vocabulary size, trained on the captions."""
    if files is not None:
        return CaptionTokenizer.from_files(files)
    return CaptionTokenizer.train_on_texts(collection.captions, config.vocab_size)


def described(collection: Collection, tokenizer: CaptionTokenizer) -> Data:
    """The photographs, captions and tokenizer of a document."""
    return Data(
        origin=collection.origin, photos=len(collection.names), captions=len(collection.captions),
        skipped=collection.skipped, left_unread=collection.left_unread, tokenizer=tokenizer.origin,
        vocabulary=tokenizer.vocab_size,
    )  # fmt: skip


class Material(Inputs):
    """The inputs of a model under test, and its embeddings, computed once in fp32."""

    def __init__(
        self, subjects: Subjects, collection: Collection, tokenizer: CaptionTokenizer, seed: int = 0
    ) -> None:
        super().__init__(collection, tokenizer, subjects.config, seed, subjects.device)
        self.subjects = subjects
        self._images: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def config(self, image_size: int) -> XFMConfig:
        return self.sizes.replace(image_size=image_size)

    def images(self, count: int, image_size: int) -> tuple[Tensor, Tensor]:
        """Embeddings and features of photographs."""
        if (count, image_size) not in self._images:
            model = self.subjects.model(image_size, torch.float32)
            with torch.inference_mode():
                parts = [
                    model.encode_image(part) for part in self.pixels(count, image_size).split(8)
                ]
                embeds = torch.cat(parts)
                self._images[count, image_size] = embeds, model.project_image(embeds)
        return self._images[count, image_size]
