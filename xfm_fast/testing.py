"""Inputs for tests, benchmarks and export checks: photographs, captions, random texts, models that share weights."""

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
from xfm_fast.batches import PairBatch
from xfm_fast.config import PresetName, XFMConfig
from xfm_fast.data.collection import open_collection
from xfm_fast.data.images import decode_image, evaluation_transform
from xfm_fast.errors import DataError, UnavailableError
from xfm_fast.loading import Source, open_model
from xfm_fast.models.xfm import XFM, Head
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

HEADS: tuple[Head, ...] = ("contrastive", "matching")
MAX_PHOTOS = 64
MAX_TOKENS = 40
"""Length to which the official evaluation pads captions."""
_POSITION_TABLE = ".relative_position_bias_table"
# Of VQA v2: 6 words and a question mark on average.
_QUESTION_LENGTHS = (9, 8, 12, 9, 10)
ANSWERS = 3129
# The trie of VQA v2's answers, by depth below `<s>`: all prefixes, inner prefixes, and answers of this length.
_ANSWER_TRIE = (
    (1276, 731, 823),
    (1917, 497, 1519),
    (770, 87, 695),
    (91, 20, 72),
    (20, 1, 19),
    (1, 0, 1),
)
# The r-th inner prefix has 1 / r to this power of the children of the first.
_SKEW = 0.7


@dataclass
class Collection:
    """Decoded photographs with cleaned captions.

    Attributes:
        photo_of: the photograph of every caption.
        skipped: names of unusable inputs, each with the reason.
        left_unread: photographs beyond the limit.
    """

    origin: str
    names: list[str] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    photo_of: list[int] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    left_unread: int = 0

    def pixels(self, indices: Iterable[int], image_size: int) -> Tensor:
        """Apply the official test transform to some photographs: `[B, 3, R, R]`."""
        transform = evaluation_transform(image_size)
        return torch.stack([transform(self.images[index]) for index in indices])

    def captions_of(self, photo: int) -> list[str]:
        """Return the captions of a photograph."""
        pairs = zip(self.captions, self.photo_of, strict=True)
        return [caption for caption, owner in pairs if owner == photo]

    def texts(self, count: int) -> list[str]:
        """Return `count` captions: the first of every photograph, then the second, cycling if there are too few."""
        ranks = [self.photo_of[:index].count(owner) for index, owner in enumerate(self.photo_of)]
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        return [self.captions[index] for index in islice(cycle(order), count)]

    def add(self, name: str, load: Callable[[], tuple[Image.Image, Sequence[str]]]) -> None:
        """Add a photograph, or list it as skipped."""
        try:
            image, captions = load()
        except DataError as error:
            self.skipped.append((name, str(error)))
            return
        cleaned = []
        for caption in captions:
            try:
                cleaned.append(pre_caption(caption))
            except DataError as error:
                self.skipped.append((name, str(error)))
        if not cleaned:
            self.skipped.append((name, "has no usable caption"))
            return
        self.photo_of += [len(self.names)] * len(cleaned)
        self.captions += cleaned
        self.names.append(name)
        self.images.append(image)


def captions_table() -> Any:
    """Return the photographs of scikit-image and scikit-learn with their captions, as stored."""
    return json.loads(Path(__file__).with_name("captions.json").read_text(encoding="utf-8"))


def bundled() -> Collection:
    """Load the photographs of scikit-image and scikit-learn; raises `DataError` if neither is installed."""
    table = captions_table()
    origin = "the photographs of scikit-image and scikit-learn, captions written for xfm-fast"
    collection, missing = Collection(origin), set[str]()
    for photo in table["photos"]:
        package = photo["package"]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            missing.add(package)
            continue
        path = Path(spec.origin).parent / table["folders"][package] / photo["file"]
        collection.add(
            f"{package}/{photo['file']}",
            lambda path=path, photo=photo: (decode_image(path), photo["captions"]),
        )
    if not collection.names:
        raise DataError(
            'no photographs: scikit-image and scikit-learn are not installed; pip install ".[bench]", or name '
            "your own with --data"
        )
    collection.skipped += [(package, f"{package} is not installed") for package in sorted(missing)]
    return collection


def from_files(path: str | Path, limit: int = MAX_PHOTOS) -> Collection:
    """Load at most `limit` photographs with captions, in any form of `xfm_fast.data.collection`.

    Raises `DataError` if the folder or file cannot be read, or nothing in it can be used.
    """
    pictures = open_collection(path)
    entries, faults = pictures.listing()
    collection = Collection(str(path), skipped=list(faults.items()))
    for index, entry in enumerate(entries):
        if len(collection.names) == limit:
            collection.left_unread = len(entries) - index
            break
        collection.add(entry.name, partial(pictures.load, entry))
    if not collection.names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in collection.skipped[:3])
        raise DataError(
            f"nothing in {path} can be used ({reasons}); give images with captions: a folder with captions.csv or with "
            "name.txt next to each image, a CSV of image and caption, or a WebDataset shard"
        )
    return collection


class Texts(NamedTuple):
    """Padded texts: ids and mask, both `[T, L]`."""

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
        """Return `[count, 3, R, R]`, cycling through the photographs."""
        indices = islice(cycle(range(len(self.collection.names))), count)
        return self.collection.pixels(indices, image_size or self.sizes.image_size).to(self.device)

    def encoded(self, captions: list[str]) -> Texts:
        """Encode captions, padded to 40 tokens as in the official evaluation."""
        ids, mask = self.tokenizer.encode(captions, MAX_TOKENS)
        return Texts(ids.to(self.device), mask.to(self.device))

    def texts(self, count: int) -> Texts:
        """Encode `count` captions."""
        return self.encoded(self.collection.texts(count))

    def random_texts(self, lengths: Sequence[int]) -> Texts:
        """Draw texts of random tokens between `<s>` and `</s>`, padded to the longest."""
        config, generator = self.sizes, torch.Generator().manual_seed(self.seed)
        low, high = _first_word(config), config.vocab_size
        ids = torch.full((len(lengths), max(lengths)), config.pad_token_id)
        for row, length in zip(ids, lengths, strict=True):
            row[:length] = torch.randint(low, high, (length,), generator=generator)
            row[0], row[length - 1] = config.bos_token_id, config.eos_token_id
        ids = ids.to(self.device)
        return Texts(ids, ids.ne(config.pad_token_id).long())

    def questions(self, count: int) -> Texts:
        """Draw random questions of the lengths of VQA v2, padded to the longest."""
        return self.random_texts([*islice(cycle(_QUESTION_LENGTHS), count)])

    def answers(self) -> Texts:
        """Draw 3,129 answers of random tokens, `<s> ... </s>`, padded to the longest: 8 tokens.

        Their trie has the shape of the usual answers of VQA v2 in RoBERTa's tokens: as many answers, prefixes and
        inner prefixes of each length, and children that are spread as unevenly over their parents: of the 1,276 first
        tokens, one has some 55 continuations.
        """
        config, generator = self.sizes, torch.Generator().manual_seed(self.seed)
        first_word = _first_word(config)
        parents, answers = [[config.bos_token_id]], list[list[int]]()
        for prefix_count, inner_count, answer_count in _ANSWER_TRIE:
            # Each parent has one child; the parents of the others are drawn.
            weights = torch.arange(1, len(parents) + 1).double() ** -_SKEW
            drawn = torch.multinomial(weights, prefix_count, replacement=True, generator=generator)
            further = torch.bincount(drawn[len(parents) :], minlength=len(parents)).tolist()
            prefixes = []
            for parent, count in zip(parents, further, strict=True):
                words = torch.randperm(config.vocab_size - first_word, generator=generator)
                prefixes += [[*parent, first_word + word] for word in words[: 1 + count].tolist()]
            order = torch.randperm(len(prefixes), generator=generator).tolist()
            parents = [prefixes[index] for index in order[:inner_count]]
            # Answers end at leaves, and some at inner prefixes.
            ends = order[::-1][:answer_count]
            answers += [[*prefixes[index], config.eos_token_id] for index in ends]
        order = torch.randperm(len(answers), generator=generator).tolist()
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(answers[index]) for index in order],
            batch_first=True,
            padding_value=config.pad_token_id,
        ).to(self.device)
        return Texts(ids, ids.ne(config.pad_token_id).long())


def _first_word(config: XFMConfig) -> int:
    """Return the first id after the special ones."""
    return max(config.pad_token_id, config.bos_token_id, config.eos_token_id) + 1


Builders = Mapping[str, Callable[[XFMConfig], XFM]]


class SharedWeights:
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
    def open(cls, source: Source, builders: Builders) -> SharedWeights:
        """Open the weights of a model, or draw random ones; raises the errors of `open_model`."""
        source.check()
        if source.model is None:
            config = preset_config(source.random or "base")
            state = random_state(config, HEADS, 0)
            return cls(config, state, "random weights (seed 0)", builders, trained=False)
        opened = open_model(source, needs=HEADS, device="cpu")
        if missing := {*HEADS} - {*opened.model.heads}:
            raise UnavailableError(
                f"{source.model} has no {' or '.join(missing)} head; give a pretrained model"
            )
        state = checkpoint.select_heads(opened.model.state_dict(), HEADS)
        weights = cls(opened.model.config, state, opened.origin, builders, trained=True)
        weights.tokenizer = opened.model.tokenizer
        return weights

    def model(self, image_size: int, dtype: torch.dtype, work: str = "") -> XFM:
        """Return the model for a resolution, a dtype and a kind of work, in evaluation mode."""
        task = work.partition("-")[0]
        task = task if task in self.builders else ""
        key = (task, image_size, dtype)
        if key in self._models:
            return self._models[key]
        if task:
            self._models = {old: m for old, m in self._models.items() if old[0] in ("", task)}
        config = self.config.replace(image_size=image_size)
        with torch.device("meta"):
            model = self.builders[task](config) if task else XFM(config, heads=HEADS)
        names = model.state_dict()
        tensors: dict[str, Tensor] = dict(self._converted(dtype))
        for name, tensor in self._state.items():
            if name.endswith(_POSITION_TABLE):
                table = checkpoint.interpolate_table(tensor, (config.grid, config.grid))
                tensors[name] = table.to(self.device, dtype)
        new = {name: tensor for name, tensor in names.items() if name not in self._state}
        for name, tensor in checkpoint.random_tensors(new, 0).items():
            tensors[name] = tensor.to(self.device, dtype)
        model.load_state_dict({name: tensors[name] for name in names}, assign=True)
        self._models[key] = model.eval().requires_grad_(False)
        return model

    def _converted(self, dtype: torch.dtype) -> dict[str, nn.Parameter]:
        """Return the tensors that all resolutions share in a dtype."""
        if dtype not in self._shared:
            self._shared[dtype] = {
                name: nn.Parameter(tensor.to(self.device, dtype), requires_grad=False)
                for name, tensor in self._state.items()
                if not name.endswith(_POSITION_TABLE)
            }
        return self._shared[dtype]


def preset_config(preset: PresetName) -> XFMConfig:
    """Return a preset with a vocabulary that gives captions their usual length."""
    return XFMConfig.preset(preset, **({"vocab_size": 2048} if preset == "tiny" else {}))


def random_state(config: XFMConfig, heads: Iterable[Head], seed: int) -> dict[str, Tensor]:
    """Draw weights without zeros, unlike those of a fresh model, so that comparisons cover every term."""
    with torch.device("meta"):
        return checkpoint.random_tensors(XFM(config, heads=heads).state_dict(), seed)


def make_tokenizer(
    config: XFMConfig, files: Path | None, collection: Collection
) -> CaptionTokenizer:
    """Open RoBERTa's tokenizer, or train one of the model's vocabulary size on the captions."""
    if files is not None:
        return CaptionTokenizer.from_files(files)
    return CaptionTokenizer.train_on_texts(collection.captions, config.vocab_size)


def random_pairs(config: XFMConfig, lengths: Tensor) -> PairBatch:
    """Draw a batch of random pixels and captions of these lengths, three tokens of each masked."""
    generator = torch.Generator().manual_seed(0)
    pairs, low = len(lengths), _first_word(config)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(low, config.vocab_size, mask.shape, generator=generator)
    ids = ids.masked_fill(~mask, config.pad_token_id)
    positions = torch.stack(
        [
            1 + torch.randperm(int(length) - 2, generator=generator)[:3].sort().values
            for length in lengths
        ]
    )
    patches = torch.rand(pairs, config.num_patches, generator=generator).argsort(1)
    return PairBatch(
        input_ids=ids,
        attention_mask=mask.long(),
        masked_input_ids=ids.scatter(1, positions, config.vocab_size - 1),
        masked_positions=positions,
        masked_labels=ids.gather(1, positions),
        patch_mask=patches < config.num_masking_patches,
        image=torch.randn(pairs, 3, config.image_size, config.image_size, generator=generator),
    )
