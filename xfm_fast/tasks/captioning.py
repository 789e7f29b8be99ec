"""Image captioning: a decoder over vision features continues a prompt, e.g. "a picture of".

Official recipe: 384 pixels, 32 images per GPU, lr 1e-5, 5 epochs, label smoothing 0.1, captions of
5 to 20 tokens, 3 beams. The official model class cannot be constructed (its decoder lacks label
smoothing); this is its intended behaviour, verified by parts.

Metrics of the COCO evaluation: BLEU (ACL 2002), ROUGE-L (WAS 2004) and CIDEr-D (arXiv 1411.5726).
METEOR and SPICE are missing: they need WordNet and a scene-graph parser. Tokenisation follows the
Java tokeniser of the COCO evaluation for typical captions; it knows more abbreviations and dialect.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.data.annotations import (
    Annotation,
    CaptioningRecord,
    CaptioningTestRecord,
)
from xfm_fast.data.collection import captioning_rows, captioning_test_rows, is_dataset_folder
from xfm_fast.data.files import find_files, read_json
from xfm_fast.data.images import record_pixels
from xfm_fast.data.options import ImageOptions
from xfm_fast.data.records import open_records
from xfm_fast.data.texts import choose_text
from xfm_fast.errors import ConfigError, DataError, InputError
from xfm_fast.models import inputs
from xfm_fast.models.decoder import TextDecoder, generate
from xfm_fast.packing import ImageGroups
from xfm_fast.tasks.evaluation import Metrics, Row
from xfm_fast.tasks.models import DecoderModel
from xfm_fast.tasks.task import (
    AugmentedOptions,
    Item,
    Losses,
    PairInput,
    Rng,
    Task,
    json_file,
    register,
    require_inputs,
)
from xfm_fast.tokenizer import pre_caption


class CaptionsByDecoder:
    """Generation of captions by a model or a session."""

    def decoder_memory(self: Any, pixels: Tensor) -> Any:
        """Project images `[B, 3, R, R]` to keys and values, once for all steps and beams."""
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
        """Generate captions `[B, length]`, prompt included, from prompt ids `[S]` or `[B, S]`."""
        if prompt_ids.ndim == 1:
            prompt_ids = prompt_ids.expand(pixels.shape[0], -1)
        inputs.check_tokens(prompt_ids, None, self.config)
        with torch.no_grad():
            memory = self.decoder_memory(pixels)
        return generate(
            self.writer,
            memory,
            prompt_ids,
            max_length=max_length,
            min_length=min_length,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            pad_token_id=self.config.pad_token_id,
            eos_token_id=self.config.eos_token_id,
        )


class CaptioningModel(CaptionsByDecoder, DecoderModel):
    """Vision encoder with a text decoder; the language and fusion encoders are not built.

    The decoder starts from the fusion encoder (officially from the text encoder, which leaves
    cross-attention random); `decoder_layers` defaults to its depth.
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
        """Compute the cross-entropy per caption token `[B, L - 1]`.

        It is zero for the prompt (`prompt_length` tokens) and padding.
        """
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
        """Return the mean of `token_losses` over predicted tokens."""
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


class CaptioningOptions(AugmentedOptions):
    """Captioning."""

    kind: Literal["captioning"] = "captioning"
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
class CaptioningTask(Task[CaptioningOptions]):
    """Captioning: `image` `[B, 3, R, R]` and one prompted caption per image, `input_ids` `[B, L]`.

    Splits list images with all captions, or images plus a COCO captions file with the images' ids.
    A folder of images without captions is captioned without metrics.
    """

    Options, Session = CaptioningOptions, CaptionsByDecoder
    metrics = ("CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L")
    check_rows = staticmethod(partial(captioning_rows, split="all"))
    test_record = CaptioningTestRecord
    truth = "caption"

    def prepare(self) -> None:
        options, config = self.options, self.config
        self.prompt = self.tokenizer.encode_prompt(options.prompt)
        shortest, longest = len(self.prompt) + 2, config.max_text_length
        for name, value in (("max_tokens", options.max_tokens), ("max_length", options.max_length)):
            if not shortest <= value <= longest:
                raise ConfigError(
                    f"task.{name}={value}; the prompt {options.prompt!r} and a word need {shortest}, and the model has "
                    f"{longest} positions"
                )

    def build(self) -> CaptioningModel:
        return CaptioningModel(self.config)

    def rows(self, paths: Sequence[Path], split: str | None = None) -> Sequence[Any]:
        pairs = self.options.pairs
        if split is not None:
            return captioning_test_rows(paths, split=split)
        if pairs is None:
            return captioning_rows(paths, split="train")
        keys = {"image_key": pairs.image_key, "caption_key": pairs.caption_key}
        return open_records(paths, **keys).files

    def records(self, paths: Sequence[Path], split: str) -> list[CaptioningTestRecord]:
        files = find_files(paths, is_dataset_folder)
        captions_of: dict[int | str, list[str]] = {}
        images = []
        for path in files:
            captions = _coco_captions(path)
            if captions is None:
                images.append(path)
            else:
                captions_of |= captions
        # Without images, a COCO captions file names them itself.
        records = super().records(images or files, split)
        image_of: dict[int | str, str] = {}
        for index, record in enumerate(records):
            if images and record.caption is None and record.identity in captions_of:
                caption = tuple(captions_of[record.identity])
                records[index] = record.model_copy(update={"caption": caption})
            earlier = image_of.setdefault(record.identity, record.image)
            if earlier != record.image:
                raise DataError(
                    f"images {earlier} and {record.image} both have the id {record.identity}, by which captions are "
                    "scored; give each an image_id of its own"
                )
        return records

    def item(self, record: Annotation | Mapping[str, Any], rng: Rng) -> Item:
        from xfm_fast.data.transforms import pretraining_transform, whole_image

        if isinstance(record, CaptioningRecord):
            if record.caption is None:
                raise DataError(
                    f"image {record.image} has no caption to learn; add one, or remove the element"
                )
            return Item(self.augmented(record.image, rng), self._ids(record.caption))
        pairs, size = self.options.pairs, self.config.image_size
        assert pairs is not None
        assert isinstance(record, Mapping)
        if pairs.caption_key not in record:
            raise DataError(
                f"the record has no field {pairs.caption_key!r}; name the field of the caption"
            )
        # The text first: if it is broken, the image need not be decoded.
        ids = self._ids(choose_text(record[pairs.caption_key], rng, language=pairs.language))
        root = None if pairs.image_root is None else self.images / pairs.image_root
        official = pairs.official_pictures or self.official_pictures
        options = pairs.model_copy(update={"image_root": root, "official_pictures": official})
        picture = record_pixels(record, options, rng)
        if pairs.augment:
            return Item(pretraining_transform(size)(picture, rng), ids)
        return Item(whole_image(picture, size), ids)

    def collate(self, items: list[Item], rng: Rng) -> PairInput:
        return PairInput(**self.pair_inputs(items))

    def losses_of(self, model: CaptioningModel, batch: PairInput) -> Losses:
        loss = model(
            batch.image,
            batch.input_ids,
            batch.attention_mask,
            prompt_length=len(self.prompt),
            label_smoothing=self.options.label_smoothing,
        )
        return {"loss": loss}

    def predict(self, model: CaptioningModel, records: Sequence[CaptioningTestRecord]) -> list[Row]:
        """Generate rows of `image` (path) and `caption` (without the prompt)."""
        options = self.options
        ids = model.generate(
            self.pixels_of([record.image for record in records], model),
            self.prompt.to(model.device),
            max_length=options.max_length,
            min_length=options.min_length,
            num_beams=options.num_beams,
        )
        rows: list[Row] = []
        for record, caption_ids in zip(records, ids[:, len(self.prompt) :].tolist(), strict=True):
            # The first token includes the space after the prompt.
            caption = " ".join(self.tokenizer.decode(caption_ids).split())
            rows.append({"image": record.image, "caption": caption})
        return rows

    def score(self, rows: Sequence[Row], records: Sequence[CaptioningTestRecord]) -> Metrics:
        """Compute `BLEU-1` … `BLEU-4`, `ROUGE-L` and `CIDEr-D` times 100."""
        pairs = zip(rows, records, strict=True)
        candidates = {record.identity: row["caption"] for row, record in pairs}
        references = {record.identity: record.caption or () for record in records}
        metrics = caption_metrics(candidates, references)
        return {name: 100 * value for name, value in metrics.items()}

    def files(
        self, rows: Sequence[Row], records: Sequence[CaptioningTestRecord]
    ) -> dict[str, bytes]:
        """Return `captions.json` for the COCO evaluation."""
        captions = [
            {"image_id": record.identity, "caption": row["caption"]}
            for row, record in zip(rows, records, strict=True)
        ]
        return json_file("captions.json", captions)

    def requests(self, images: Sequence[Path], texts: Sequence[str]) -> list[CaptioningTestRecord]:
        valid = len(images) > 0 and not texts
        require_inputs(images, texts, "one image or several, and no text", ok=valid)
        return [CaptioningTestRecord(image=str(image)) for image in images]

    def _ids(self, caption: str) -> list[int]:
        text = pre_caption(caption, self.options.max_words)
        if prompt := self.options.prompt.rstrip():
            text = f"{prompt} {text}"
        return self.tokenizer.encode_ids([text], self.options.max_tokens)[0]


def _coco_captions(path: Path) -> dict[int | str, list[str]] | None:
    """Read the captions by image id of a COCO ground-truth file; return None for any other file."""
    if path.suffix.lower() != ".json":
        return None
    content = read_json(path, "one JSON array of objects, or COCO captions")
    if not isinstance(content, dict) or "annotations" not in content:
        return None
    captions: dict[int | str, list[str]] = {}
    for index, annotation in enumerate(content["annotations"]):
        try:
            identity, caption = annotation["image_id"], annotation["caption"]
            captions.setdefault(identity, []).append(caption.strip())
        except (TypeError, KeyError, AttributeError):
            raise DataError(
                f"{path}, annotation {index} lacks image_id or caption; correct or remove it"
            ) from None
    return captions


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

# Boundaries inside a word: of contractions, and of two words that are spelt as one.
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
# The evaluation intends to drop brackets, but its list has them in capitals: lower-case ones are
# kept, and count.
_SPELLINGS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "£": "#", "€": "$", "½": "1/2", "¼": "1/4", "¾": "3/4",
}  # fmt: skip


def words(text: str) -> Words:
    """Tokenise a caption: lower case, `isn't` as `is n't`, `dog's` as `dog 's`, no punctuation."""
    tokens: Words = _WORD.findall(_SEAM.sub(" ", text.lower().replace("’", "'")))
    return [_SPELLINGS.get(token, token) for token in tokens]


def caption_metrics(
    candidates: Mapping[T, str], references: Mapping[T, Sequence[str]]
) -> dict[str, float]:
    """Compute corpus scores of one caption per image id against its references.

    `BLEU-1` … `BLEU-4` and `ROUGE-L` are in [0, 1], `CIDEr-D` in [0, 10] (it weights n-grams by
    their rarity in the corpus).
    """
    if not candidates:
        raise InputError("there are no captions to score; give one for every image")
    if missing := [image for image in references if image not in candidates]:
        raise InputError(
            f"image {missing[0]} has references but no caption ({len(missing)} such images)"
        )
    if missing := [image for image in candidates if not references.get(image)]:
        raise InputError(
            f"image {missing[0]} has a caption but no reference ({len(missing)} such images)"
        )
    said = [words(candidates[image]) for image in references]
    truth = [[words(text) for text in texts] for texts in references.values()]
    return bleu(said, truth) | {"ROUGE-L": rouge_l(said, truth), "CIDEr-D": cider_d(said, truth)}


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """Compute corpus BLEU-1 to BLEU-4, with the closest reference length (the shorter on a tie)."""
    matches, totals = [0] * _ORDER, [0] * _ORDER
    length = reference_length = 0
    for candidate, texts in zip(candidates, references, strict=True):
        length += len(candidate)
        reference_length += min((abs(len(text) - len(candidate)), len(text)) for text in texts)[1]
        limits = NGrams()
        for text in texts:
            limits |= _ngrams(text)
        for gram, count in _ngrams(candidate).items():
            matches[len(gram) - 1] += min(count, limits[gram])
        for n in range(_ORDER):
            totals[n] += max(len(candidate) - n, 0)
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = {}, 1.0
    for n in range(_ORDER):
        product *= (matches[n] + _TINY) / (totals[n] + _SMALL)
        scores[f"BLEU-{n + 1}"] = product ** (1 / (n + 1)) * brevity
    return scores


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Compute the mean ROUGE-L F-measure, with the best reference for precision and for recall."""
    total = 0.0
    for candidate, texts in zip(candidates, references, strict=True):
        precision = recall = 0.0
        for text in texts:
            shared = _common_subsequence(candidate, text)
            precision = max(precision, shared / max(len(candidate), 1))
            recall = max(recall, shared / max(len(text), 1))
        if precision and recall:
            total += (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
    return total / len(candidates)


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Compute the mean CIDEr-D: clipped TF-IDF n-gram similarity with a length penalty."""
    grams_of = [[_ngrams(text) for text in texts] for texts in references]
    frequencies = Counter(gram for grams in grams_of for gram in set().union(*grams))
    log_images = math.log(max(len(references), 1))

    def weighted(grams: NGrams) -> tuple[dict[tuple[str, ...], float], list[float]]:
        """Return the TF-IDF weight of every n-gram, and the norms of the weights by n."""
        weights = {}
        squares = [0.0] * _ORDER
        for gram, count in grams.items():
            weight = count * (log_images - math.log(max(frequencies[gram], 1)))
            weights[gram] = weight
            squares[len(gram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares]

    total = 0.0
    for candidate, texts, grams_of_texts in zip(candidates, references, grams_of, strict=True):
        weights, norms = weighted(_ngrams(candidate))
        score = 0.0
        for text, grams in zip(texts, grams_of_texts, strict=True):
            text_weights, text_norms = weighted(grams)
            shared = [0.0] * _ORDER
            for gram, weight in weights.items():
                if gram in text_weights:
                    limit = text_weights[gram]
                    shared[len(gram) - 1] += min(weight, limit) * limit
            cosines = [
                shared[n] / (norms[n] * text_norms[n])
                for n in range(_ORDER)
                if norms[n] and text_norms[n]
            ]
            # The evaluation counts bigrams for a length.
            difference = max(len(candidate) - 1, 0) - max(len(text) - 1, 0)
            score += sum(cosines) / _ORDER * math.exp(-(difference**2) / (2 * _SIGMA**2))
        total += 10 * score / len(texts)
    return total / len(candidates)


def _ngrams(text: Words) -> NGrams:
    return NGrams(
        tuple(text[i : i + n]) for n in range(1, _ORDER + 1) for i in range(len(text) - n + 1)
    )


def _common_subsequence(a: Words, b: Words) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for i, right in enumerate(b, start=1):
            above = row[i]
            row[i] = diagonal + 1 if left == right else max(above, row[i - 1])
            diagonal = above
    return row[-1]
