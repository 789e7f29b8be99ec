"""From what a record says to the ids that a step of pretraining reads: one text, cleaned, cut and masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from xfm_fast.data.masking import MaskingOptions, mask_tokens
from xfm_fast.errors import DataError
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

PREFIXES = ("A image of ", "The image contains ", "We can see ", "A picture of ")
"""What the official code puts before a caption that belongs to a list of images (its spelling)."""


CAPTION_MASKING = MaskingOptions(0.5, 15)


@dataclass(frozen=True)
class TextOptions:
    """How a text becomes ids. The defaults are those of captions and regions in pretraining.

    Attributes:
        max_tokens: `<s>` and `</s>` counted in.
        max_words: captions are cleaned and cut to this many words; None leaves a text as it is.
        masking: how much of it is hidden.
        language: which text to take where there is one for each of several languages; None draws one.
        tokenized: texts hold WordPiece's ' ##', which is removed.
    """

    max_tokens: int = 30
    max_words: int | None = 30
    masking: MaskingOptions = CAPTION_MASKING
    language: str | None = None
    tokenized: bool = False


CAPTIONS = TextOptions()
"""Captions of images and regions in pretraining."""
TEXTS = TextOptions(max_tokens=128, max_words=None, masking=MaskingOptions(0.15, 20))
"""Text alone in pretraining."""


class EncodedText(NamedTuple):
    """A text as ids, and its masked copy."""

    ids: list[int]
    """`<s> tokens </s>`, not padded."""
    masked_ids: list[int]
    positions: list[int]
    """Where to predict, ascending."""
    labels: list[int]
    """The original ids there."""


def choose_text(value: Any, rng: np.random.Generator, *, language: str | None = None) -> str:
    """The text that a caption field holds, or one of its texts.

    Args:
        value: a string; a list, of which an element is drawn; or a mapping of languages to strings, of which
            `language` or else any is taken. Lists may hold mappings.

    Raises:
        DataError: it is none of these, or empty.
    """
    if isinstance(value, list) and value:
        value = value[rng.integers(len(value))]
    if isinstance(value, Mapping) and value:
        if language is not None and language not in value:
            raise DataError(f"caption has no text in {language!r} (languages: {', '.join(value)}); choose one of them")
        names = list(value)
        value = value[language if language is not None else names[rng.integers(len(names))]]
    if not isinstance(value, str) or not value:
        raise DataError(f"caption {value!r} is no text; a string, a list of strings or a mapping to strings is needed")
    return value


def clean_text(text: str, options: TextOptions) -> str:
    """What the tokenizer reads.

    Raises:
        DataError: nothing is left.
    """
    if options.tokenized:
        text = text.replace(" ##", "")
    if options.max_words is not None:
        return pre_caption(text, options.max_words)
    text = text.strip()
    if not text:
        raise DataError("text is empty; write words or remove it")
    return text


def encode_text(
    text: str | Sequence[int], tokenizer: CaptionTokenizer, options: TextOptions, rng: np.random.Generator
) -> EncodedText:
    """Clean, tokenise, cut and mask a text.

    Args:
        text: a string, or token ids without `<s>` and `</s>`, which are cut and masked alike.

    Raises:
        DataError: nothing is left of it.
    """
    if isinstance(text, str):
        (ids,) = tokenizer.encode_ids([clean_text(text, options)], options.max_tokens)
    else:
        if not len(text):
            raise DataError("a text of 0 token ids holds nothing to read; remove it")
        ids = [tokenizer.bos_token_id, *map(int, text[: options.max_tokens - 2]), tokenizer.eos_token_id]
    masked = mask_tokens(
        ids,
        options.masking,
        rng,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        word_starts=tokenizer.word_starts(ids) if options.masking.whole_word else None,
    )
    return EncodedText(ids, *masked)


def encode_pair_text(
    caption: Any,
    tokenizer: CaptionTokenizer,
    options: TextOptions,
    rng: np.random.Generator,
    *,
    one_of_many: bool = False,
) -> EncodedText:
    """The caption field of an image-text record, encoded.

    Args:
        caption: see `choose_text`.
        one_of_many: the image was drawn from a list of images, which the caption describes together; a random one of
            `PREFIXES` then begins it.
    """
    text = choose_text(caption, rng, language=options.language)
    if one_of_many:
        text = PREFIXES[rng.integers(len(PREFIXES))] + text
    return encode_text(text, tokenizer, options, rng)
