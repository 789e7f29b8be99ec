"""Image captioning: a decoder over vision features continues a prompt, e.g. "a picture of".

Official recipe: 384 pixels, 32 images per GPU, lr 1e-5, 5 epochs, label smoothing 0.1, captions of 5 to 20 tokens, 3
beams. The official model class cannot be constructed (its decoder lacks label smoothing); this is its intended
behaviour, verified by parts.

Metrics of the COCO evaluation: BLEU (ACL 2002), ROUGE-L (WAS 2004) and CIDEr-D (arXiv 1411.5726). METEOR and
SPICE are missing: they need WordNet and a scene-graph parser. Tokenisation follows the Java tokeniser of the COCO
evaluation for typical captions; it knows more abbreviations and dialect.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import (
    Annotation,
    AnnotationRows,
    CaptioningRecord,
    CaptioningTestRecord,
)
from xfm_fast.data.collection import captioning_rows, captioning_test_rows, is_dataset_folder
from xfm_fast.data.files import find_files, read_json
from xfm_fast.data.images import record_pixels
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.records import Rows, open_records
from xfm_fast.data.texts import choose_text
from xfm_fast.errors import ConfigError, DataError, InputError
from xfm_fast.models import inputs
from xfm_fast.models.decoder import TextDecoder, generate
from xfm_fast.packing import ImageGroups
from xfm_fast.tasks.evaluation import Metrics, Row
from xfm_fast.tasks.task import (
    DecoderModel,
    Item,
    PairInput,
    Task,
    TaskOptions,
    json_file,
    register,
    require_inputs,
)
from xfm_fast.tokenizer import pre_caption


class CaptionsByDecoder:
    """Generation of captions by a model or a session."""

    def decoder_memory(self: Any, pixels: Tensor) -> Any:
        """Keys and values of images `[B, 3, R, R]`, projected once for all steps and beams."""
        return self.states(self.encode_image(pixels))

    def generate(
        self: Any,
        pixels: Tensor,
        prompt_ids: Tensor,
        *,
        max_length: int = 20,
        min_length: int = 5,
        num_beams: int = 3,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> Tensor:
        """Generate captions `[B, length]` from prompt ids `[S]` or `[B, S]`; lengths include the prompt."""
        if prompt_ids.ndim == 1:
            prompt_ids = prompt_ids.expand(pixels.shape[0], -1)
        inputs.check_tokens(prompt_ids, None, self.config)
        with torch.no_grad():
            memory = self.decoder_memory(pixels)
        return generate(
            self.writer, memory, prompt_ids, max_length=max_length, min_length=min_length, num_beams=num_beams,
            length_penalty=length_penalty, early_stopping=early_stopping,
            pad_token_id=self.config.pad_token_id, eos_token_id=self.config.eos_token_id,
        )  # fmt: skip


class CaptioningModel(CaptionsByDecoder, DecoderModel):
    """Vision encoder with a text decoder; the language and fusion encoders are not built.

    The decoder starts from the fusion encoder (officially from the text encoder, which leaves cross-attention random);
    `decoder_layers` defaults to its depth.
    """

    decoder_reads = "image"

    def __init__(self, config: XFMConfig, *, decoder_layers: int | None = None) -> None:
        super().__init__(config, heads=(), encoders=("vision",))
        layers = config.fusion_layers if decoder_layers is None else decoder_layers
        self.text_decoder = TextDecoder(config, layers, config.vision_width)

    def token_losses(
        self,
        pixels: Tensor,
        caption_ids: Tensor,
        caption_mask: Tensor | None = None,
        *,
        prompt_length: int,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Cross-entropy per caption token `[B, L - 1]`, zero for the prompt (`prompt_length` tokens) and padding."""
        mask = inputs.check_tokens(caption_ids, caption_mask, self.config)
        images, length = caption_ids.shape
        if pixels.shape[0] != images:
            raise InputError(f"there are {pixels.shape[0]} images for {images} captions")
        if not 1 <= prompt_length < length:
            raise InputError(
                f"prompt_length={prompt_length}; captions of {length} tokens need 1 to {length - 1}"
            )
        if mask.device.type == "cpu" and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise InputError("caption_mask has gaps; the real tokens of a caption come first")
        groups = ImageGroups(torch.arange(images + 1, device=mask.device))
        return self.text_decoder.token_losses(
            caption_ids,
            mask,
            self.decoder_memory(pixels),
            groups,
            prompt_tokens=prompt_length,
            label_smoothing=label_smoothing,
        )

    def forward(
        self,
        pixels: Tensor,
        caption_ids: Tensor,
        caption_mask: Tensor | None = None,
        *,
        prompt_length: int,
        label_smoothing: float = 0.1,
    ) -> Tensor:
        """Mean of `token_losses` over predicted tokens."""
        mask = inputs.check_tokens(caption_ids, caption_mask, self.config)
        losses = self.token_losses(
            pixels, caption_ids, mask, prompt_length=prompt_length, label_smoothing=label_smoothing
        )
        return losses.sum() / mask[:, prompt_length:].sum().clamp_min(1)


class CaptionedImages(ImageOptions):
    """Image-caption pairs in pretraining formats (line JSON, shards), instead of captioning files."""

    caption_key: str = Field(
        default="desc",
        description="field of the caption: a string, or a list or mapping to draw from",
    )
    language: str | None = Field(
        default=None, description="language to select from multilingual captions; null draws one"
    )


class CaptioningOptions(TaskOptions):
    """Captioning."""

    kind: Literal["captioning"] = "captioning"
    augment: bool = Field(
        default=True, description="random crop, flip and RandAugment; false only resizes"
    )
    prompt: str = Field(
        default="a picture of ", description="prefix of captions, excluded from the loss"
    )
    max_words: int = Field(default=40, gt=0, description="of a training caption")
    max_tokens: int = Field(
        default=40, ge=3, description="of a training caption, including `<s>`, prompt and `</s>`"
    )
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    max_length: int = Field(
        default=20, gt=0, description="maximum tokens of a generated caption, as in max_tokens"
    )
    min_length: int = Field(
        default=5, ge=0, description="minimum tokens before `</s>`, including the prompt"
    )
    num_beams: int = Field(default=3, gt=0, description="1 is greedy decoding")
    pairs: CaptionedImages | None = Field(
        default=None,
        description="train on pretraining pairs; splits still list captioning files",
    )


@register
class CaptioningTask(Task[CaptioningOptions, CaptioningTestRecord, Item, PairInput]):
    """Captioning: `image` `[B, 3, R, R]` and one prompted caption per image, `input_ids` `[B, L]`.

    Splits list images with all captions, or images plus a COCO captions file with the images' ids. A folder of images
    without captions is captioned without metrics.
    """

    Options, Session = CaptioningOptions, CaptionsByDecoder
    metrics = ("CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L")
    check_rows = staticmethod(partial(captioning_rows, split="all"))
    test_record = CaptioningTestRecord
    truth = "caption"

    def prepare(self) -> None:
        options, config = self.options, self.config
        self.prompt = self.tokenizer.encode_prompt(options.prompt)
        least, longest = len(self.prompt) + 2, config.max_text_length
        for name, value in (("max_tokens", options.max_tokens), ("max_length", options.max_length)):
            if not least <= value <= longest:
                raise ConfigError(
                    f"task.{name}={value}; the prompt {options.prompt!r} and a word need {least}, and the model has "
                    f"{longest} positions"
                )

    def build(self) -> CaptioningModel:
        return CaptioningModel(self.config)

    def rows(self, paths: Sequence[Path]) -> Sequence[Rows]:
        if (pairs := self.options.pairs) is not None:
            return open_records(
                paths, image_key=pairs.image_key, caption_key=pairs.caption_key
            ).files
        return captioning_rows(paths, split="train")

    def test_rows(
        self, paths: Sequence[Path], split: str
    ) -> list[AnnotationRows[CaptioningTestRecord]]:
        return captioning_test_rows(paths, split=split)

    def records(self, paths: Sequence[Path], split: str) -> list[CaptioningTestRecord]:
        files = find_files(paths, is_dataset_folder)
        truth = {path: captions for path in files if (captions := _coco_captions(path)) is not None}
        images = [path for path in files if path not in truth]
        # Without images, a COCO captions file names them itself.
        records = super().records(images or files, split)
        captions_of = (
            {identity: texts for each in truth.values() for identity, texts in each.items()}
            if images
            else {}
        )
        first: dict[int | str, str] = {}
        for number, record in enumerate(records):
            if record.caption is None and record.identity in captions_of:
                records[number] = record.model_copy(
                    update={"caption": tuple(captions_of[record.identity])}
                )
            if (other := first.setdefault(record.identity, record.image)) != record.image:
                raise DataError(
                    f"images {other} and {record.image} both have the id {record.identity}, by which captions are "
                    "scored; give each an image_id of its own"
                )
        return records

    def item(self, record: Annotation | Mapping[str, Any], rng: np.random.Generator) -> Item:
        from xfm_fast.data.transforms import pretraining_transform, whole_image

        pairs, size = self.options.pairs, self.config.image_size
        if isinstance(record, CaptioningRecord):
            if record.caption is None:
                raise DataError(
                    f"image {record.image} has no caption to learn; add one, or remove the element"
                )
            return Item(self.augmented(record.image, rng), self._ids(record.caption))
        assert pairs is not None
        assert isinstance(record, Mapping)
        if pairs.caption_key not in record:
            raise DataError(
                f"the record has no field {pairs.caption_key!r}; name the field of the caption"
            )
        # The text first: where it is broken the image need not be decoded.
        ids = self._ids(choose_text(record[pairs.caption_key], rng, language=pairs.language))
        root = None if pairs.image_root is None else self.images / pairs.image_root
        official = pairs.official_pictures or self.official_pictures
        options = pairs.model_copy(update={"image_root": root, "official_pictures": official})
        picture = record_pixels(record, options, rng)
        view = (
            pretraining_transform(size)(picture, rng)
            if pairs.augment
            else whole_image(picture, size)
        )
        return Item(view, ids)

    def collate(self, items: list[Item], rng: np.random.Generator) -> PairInput:
        return PairInput(**self.pair_inputs(items))

    def losses_of(self, model: CaptioningModel, batch: PairInput) -> dict[str, Tensor]:
        loss = model(
            batch.image, batch.input_ids, batch.attention_mask, prompt_length=len(self.prompt),
            label_smoothing=self.options.label_smoothing,
        )  # fmt: skip
        return {"loss": loss}

    def predict(self, model: CaptioningModel, records: Sequence[CaptioningTestRecord]) -> list[Row]:
        """Rows of `image` (path) and `caption` (without the prompt)."""
        options = self.options
        written = model.generate(
            self.pixels_of([record.image for record in records], model), self.prompt.to(model.device),
            max_length=options.max_length, min_length=options.min_length, num_beams=options.num_beams,
        )  # fmt: skip
        texts = [self.tokenizer.decode(ids) for ids in written[:, len(self.prompt) :].tolist()]
        # The first token includes the space after the prompt.
        return [
            {"image": record.image, "caption": " ".join(text.split())}
            for record, text in zip(records, texts, strict=True)
        ]

    def score(self, rows: Sequence[Row], records: Sequence[CaptioningTestRecord]) -> Metrics:
        """`BLEU-1` … `BLEU-4`, `ROUGE-L` and `CIDEr-D` times 100."""
        candidates = {
            record.identity: row["caption"] for row, record in zip(rows, records, strict=True)
        }
        found = caption_metrics(
            candidates, {record.identity: record.caption or () for record in records}
        )
        return {name: 100 * value for name, value in found.items()}

    def files(
        self, rows: Sequence[Row], records: Sequence[CaptioningTestRecord]
    ) -> dict[str, bytes]:
        """`captions.json` for the COCO evaluation."""
        pairs = zip(rows, records, strict=True)
        found = [{"image_id": record.identity, "caption": row["caption"]} for row, record in pairs]
        return json_file("captions.json", found)

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[CaptioningTestRecord]:
        require_inputs(
            images, texts, "one image or several, and no text", ok=len(images) > 0 and not texts
        )
        return [CaptioningTestRecord(image=str(image)) for image in images]

    def _ids(self, caption: str) -> list[int]:
        text = pre_caption(caption, self.options.max_words)
        if prompt := self.options.prompt.rstrip():
            text = f"{prompt} {text}"
        return self.tokenizer.encode_ids([text], self.options.max_tokens)[0]


def _coco_captions(path: Path) -> dict[int | str, list[str]] | None:
    """Captions by image id of a COCO ground-truth file; None for any other file."""
    if path.suffix.lower() != ".json":
        return None
    content = read_json(path, "one JSON array of objects, or COCO captions")
    if not isinstance(content, dict) or "annotations" not in content:
        return None
    found: dict[int | str, list[str]] = {}
    for number, annotation in enumerate(content["annotations"]):
        try:
            identity, caption = annotation["image_id"], annotation["caption"]
            found.setdefault(identity, []).append(caption.strip())
        except (TypeError, KeyError, AttributeError):
            raise DataError(
                f"{path}, annotation {number} lacks image_id or caption; correct or remove it"
            ) from None
    return found


T = TypeVar("T", bound=Hashable)
Words = list[str]
NGrams = Counter[tuple[str, ...]]

# The longest n-gram that BLEU and CIDEr-D count.
_ORDER = 4
# Standard deviation of CIDEr-D's penalty on a difference in length, in words.
_SIGMA = 6.0
# Weight of recall against precision in ROUGE-L.
_BETA = 1.2
# Keep a BLEU without matches or words finite; the COCO evaluation uses the same.
_SMALL, _TINY = 1e-9, 1e-15

# Where one word is two: contractions, and what is spelt as one and spoken as two.
_SEAM = re.compile(
    r"""(?<=\w)(?=(?:n't | '(?:s|m|d|re|ve|ll))\b)
    | (?<=\bcan)(?=not\b) | (?<=\bgon)(?=na\b) | (?<=\bwan)(?=na\b) | (?<=\bgot)(?=ta\b) | (?<=\b[gl][ie]m)(?=me\b)""",
    re.VERBOSE,
)
_WORD = re.compile(
    r"""n't | '(?:s|m|d|re|ve|ll)\b   # from contractions
    | (?<!\w)'(?:em|\d\ds)\b
    | https?://\S*\w | [\w.+-]+@[\w-]+(?:\.[\w-]+)+ | (?<!\S)[@\#][a-z_]\w* | </?[a-z]+>
    | (?<!\w)(?:[a-z]\.)+(?!\w)   # abbreviations keep their point
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|blvd|mt|ft|inc|co|corp|ltd|ph\.d|jan|feb|aug|sept?|oct|nov|dec)\.(?!\w)
    | no\.(?=\s*\d)
    | (?<!\S)[+-]?(?:\d+(?:[:,.]\d+)+ | \.\d+) | (?<!\S)[+-]\d+ | \d+(?:[:,.]\d+)+
    | [^\W_](?:(?:[\w/-] | \.(?!\.) | (?<!\d)'(?!'))*[^\W_])?
    | [!?]{2,} | [$%&@\#+=*<>()\[\]{}/^|~\\_°™£€½¼¾]""",
    re.VERBOSE,
)
# The evaluation means to drop brackets, but its list has them in capitals: lower-case ones stay, and count.
_WRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "½": "1/2", "¼": "1/4", "¾": "3/4",
}  # fmt: skip


def words(text: str) -> Words:
    """Tokens of a caption: lower case, `isn't` as `is n't`, `dog's` as `dog 's`, no punctuation."""
    found: Words = _WORD.findall(_SEAM.sub(" ", text.lower().replace("’", "'")))
    return [_WRITTEN.get(word, word) for word in found]


def caption_metrics(
    candidates: Mapping[T, str], references: Mapping[T, Sequence[str]]
) -> dict[str, float]:
    """Corpus scores of one caption per image id against its references.

    `BLEU-1` … `BLEU-4` and `ROUGE-L` are in [0, 1], `CIDEr-D` in [0, 10] (it weights n-grams by their rarity in the
    corpus).
    """
    found, known = dict(candidates), dict(references)
    if not found:
        raise InputError("there are no captions to score; give one for every image")
    if missing := [image for image in known if image not in found]:
        raise InputError(
            f"image {missing[0]} has references but no caption ({len(missing)} such images)"
        )
    if missing := [image for image in found if not known.get(image)]:
        raise InputError(
            f"image {missing[0]} has a caption but no reference ({len(missing)} such images)"
        )
    said = [words(found[image]) for image in known]
    meant = [[words(text) for text in known[image]] for image in known]
    return bleu(said, meant) | {"ROUGE-L": rouge_l(said, meant), "CIDEr-D": cider_d(said, meant)}


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """Corpus BLEU-1 to BLEU-4, with the closest reference length (the shorter on a tie)."""
    right, all_of = [0] * _ORDER, [0] * _ORDER
    length = nearest = 0
    for said, meant in zip(candidates, references, strict=True):
        length += len(said)
        nearest += min((abs(len(text) - len(said)), len(text)) for text in meant)[1]
        counted = [_ngrams(text) for text in meant]
        most = NGrams()
        for grams in counted:
            most |= grams
        for gram, count in _ngrams(said).items():
            right[len(gram) - 1] += min(count, most[gram])
        for n in range(_ORDER):
            all_of[n] += max(len(said) - n, 0)
    ratio = (length + _TINY) / (nearest + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = {}, 1.0
    for n in range(_ORDER):
        product *= (right[n] + _TINY) / (all_of[n] + _SMALL)
        scores[f"BLEU-{n + 1}"] = product ** (1 / (n + 1)) * brevity
    return scores


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Mean ROUGE-L F-measure, with the best reference for precision and for recall."""
    total = 0.0
    for said, meant in zip(candidates, references, strict=True):
        common = [_common_subsequence(said, text) for text in meant]
        precision = max(shared / max(len(said), 1) for shared in common)
        recall = max(shared / max(len(text), 1) for shared, text in zip(common, meant, strict=True))
        if precision and recall:
            total += (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return total / len(candidates)


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Mean CIDEr-D: clipped TF-IDF n-gram similarity to all references with a length penalty."""
    counted = [[_ngrams(text) for text in meant] for meant in references]
    images_with = Counter(gram for of_image in counted for gram in set().union(*of_image))
    images = math.log(max(len(references), 1))

    def weighted(grams: NGrams) -> tuple[dict[tuple[str, ...], float], list[float]]:
        vector = {
            gram: count * (images - math.log(max(images_with[gram], 1)))
            for gram, count in grams.items()
        }
        squares = [0.0] * _ORDER
        for gram, weight in vector.items():
            squares[len(gram) - 1] += weight**2
        return vector, [math.sqrt(square) for square in squares]

    total = 0.0
    for said, meant, of_image in zip(candidates, references, counted, strict=True):
        ours, our_norms = weighted(_ngrams(said))
        of_this = 0.0
        for text, grams in zip(meant, of_image, strict=True):
            theirs, their_norms = weighted(grams)
            shared = [0.0] * _ORDER
            for gram, weight in ours.items():
                if gram in theirs:
                    shared[len(gram) - 1] += min(weight, theirs[gram]) * theirs[gram]
            cosines = (
                s / (a * b)
                for s, a, b in zip(shared, our_norms, their_norms, strict=True)
                if a and b
            )
            # The evaluation counts bigrams for a length.
            difference = max(len(said) - 1, 0) - max(len(text) - 1, 0)
            of_this += sum(cosines) / _ORDER * math.exp(-(difference**2) / (2 * _SIGMA**2))
        total += 10 * of_this / len(meant)
    return total / len(candidates)


def _ngrams(text: Words) -> NGrams:
    return NGrams(
        tuple(text[i : i + n]) for n in range(1, _ORDER + 1) for i in range(len(text) - n + 1)
    )


def _common_subsequence(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for i, other in enumerate(b, start=1):
            above = row[i]
            row[i] = diagonal + 1 if word == other else max(above, row[i - 1])
            diagonal = above
    return row[-1]
