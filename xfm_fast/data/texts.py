"""Caption selection, cleaning, tokenisation, truncation and masking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.random import Generator

from xfm_fast.data.masking import EncodedText, mask_tokens
from xfm_fast.data.options import Record, TextOptions
from xfm_fast.errors import DataError
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption

PREFIXES = ("A image of ", "The image contains ", "We can see ", "A picture of ")
"""Official prefixes (and spelling) of captions shared by a list of images."""

IDS_KEY = "input_ids"
"""Record field with pre-tokenised text."""


def text_of(record: Record, key: str, tokenizer: CaptionTokenizer) -> Any:
    """Return the token ids of a pre-tokenised record (without `<s>` and `</s>`), or its field `key`."""
    ids = record.get(IDS_KEY)
    if ids is None:
        if key not in record:
            raise DataError(
                f"the record has neither {key!r} nor {IDS_KEY!r}; name the field that holds the text"
            )
        return record[key]
    if not isinstance(ids, list) or not all(
        type(id) is int and 0 <= id < tokenizer.vocab_size for id in ids
    ):
        raise DataError(
            f"{IDS_KEY!r} must be a list of ids from 0 to {tokenizer.vocab_size - 1}; tokenise the text again"
        )
    if ids[:1] == [tokenizer.bos_token_id]:
        ids = ids[1:]
    if ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]
    return tuple(ids)


def choose_text(value: Any, rng: Generator, *, language: str | None = None) -> str:
    """Draw the text of a caption field: a string, an element of a list, or a language of a mapping."""
    if isinstance(value, list) and value:
        # A single element draws no random number.
        value = value[rng.integers(len(value))]
    texts = _translations(value, language)
    return _require_text(texts[rng.integers(len(texts))])


def every_text(value: Any, *, language: str | None = None) -> list[str]:
    """Return all texts that `choose_text` can draw; any broken one raises `DataError`."""
    elements = value if isinstance(value, list) and value else [value]
    return [
        _require_text(text) for element in elements for text in _translations(element, language)
    ]


def _translations(value: Any, language: str | None) -> list[Any]:
    """Return the texts of an element of a caption field, in `language` or in all."""
    if not isinstance(value, Mapping) or not value:
        return [value]
    if language is None:
        return list(value.values())
    if language not in value:
        raise DataError(
            f"caption has no text in {language!r} (languages: {', '.join(value)}); choose one of them"
        )
    return [value[language]]


def _require_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(
            f"caption {value!r} is not text; a string, a list of strings or a mapping to strings is needed"
        )
    return value


def clean_text(text: str, options: TextOptions) -> str:
    """Clean a text for the tokenizer; an empty result raises `DataError`."""
    if options.tokenized:
        text = text.replace(" ##", "")
    if options.max_words is not None:
        return pre_caption(text, options.max_words)
    text = text.strip()
    if not text:
        raise DataError("text is empty; write words or remove it")
    return text


def encode_text(
    text: str | Sequence[int],
    tokenizer: CaptionTokenizer,
    options: TextOptions,
    rng: Generator,
    *,
    cleaned: bool = False,
) -> EncodedText:
    """Clean (unless `cleaned`), tokenise, truncate and mask a text; ids are only truncated and masked."""
    if isinstance(text, str):
        (ids,) = tokenizer.encode_ids(
            [text if cleaned else clean_text(text, options)], options.max_tokens
        )
    else:
        if not len(text):
            raise DataError("a text has 0 token ids; remove it")
        ids = [
            tokenizer.bos_token_id,
            *map(int, text[: options.max_tokens - 2]),
            tokenizer.eos_token_id,
        ]
    return mask_tokens(
        ids,
        options.masking,
        rng,
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        word_starts=tokenizer.word_starts(ids) if options.masking.whole_word else None,
    )


def encode_pair_text(
    caption: Any,
    tokenizer: CaptionTokenizer,
    options: TextOptions,
    rng: Generator,
    *,
    one_of_many: bool = False,
) -> EncodedText:
    """Encode a caption; with `one_of_many` a random prefix marks it as shared by several images."""
    if isinstance(caption, tuple):
        return encode_text(caption, tokenizer, options, rng)
    text = choose_text(caption, rng, language=options.language)
    if one_of_many:
        text = PREFIXES[rng.integers(len(PREFIXES))] + text
    return encode_text(text, tokenizer, options, rng)
