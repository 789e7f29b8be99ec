"""What a record says: which text is taken, how it is cut, and what of it is hidden."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from xfm_fast.data.masking import MaskingOptions
from xfm_fast.data.options import TextOptions, TextStreamOptions
from xfm_fast.data.texts import PREFIXES, choose_text, encode_pair_text, encode_text
from xfm_fast.errors import DataError
from xfm_fast.tokenizer import CaptionTokenizer

CAPTIONS, TEXTS = TextOptions(), TextStreamOptions()
SENTENCES = ["a cat on a mat", "the dog and the cat", "a picture of two dogs"]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts(SENTENCES, 400)


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_official_options() -> None:
    masking = MaskingOptions(0.5, 15, 0.2, 3, False)
    assert (
        TextOptions(max_tokens=30, max_words=30, masking=masking, language=None, tokenized=False)
        == CAPTIONS
    )
    masking = MaskingOptions(0.15, 20, 0.2, 3, False)
    assert (
        TextStreamOptions(
            max_tokens=128, max_words=None, masking=masking, language=None, tokenized=False
        )
        == TEXTS
    )


@pytest.mark.parametrize(
    ("value", "language", "expected"),
    [
        ("a", None, {"a"}),
        (["a", "b"], None, {"a", "b"}),
        ({"en": "a", "de": "b"}, None, {"a", "b"}),
        ({"en": "a", "de": "b"}, "de", {"b"}),
        ([{"en": "a", "de": "b"}, "c"], "en", {"a", "c"}),
    ],
)
def test_any_of_the_given_texts_is_taken(
    value: Any, language: str | None, expected: set[str]
) -> None:
    drawn = Counter(choose_text(value, _rng(seed), language=language) for seed in range(100))
    assert set(drawn) == expected
    assert min(drawn.values()) > 100 / len(expected) / 2


@pytest.mark.parametrize("value", ["", {}, [3]])
def test_what_is_no_text_is_named(value: Any) -> None:
    with pytest.raises(DataError, match="caption"):
        choose_text(value, _rng())


def test_captions_are_cleaned_cut_and_masked(tokenizer: CaptionTokenizer) -> None:
    options = TextOptions(max_tokens=6, max_words=3, masking=MaskingOptions(0.5, 15))
    encoded = encode_text("A cat, on a mat!", tokenizer, options, _rng())
    assert encoded.ids == tokenizer.encode(["a cat on"], 6, pad_to_longest=True)[0][0].tolist()
    assert len(encoded.positions) == options.masking.count(len(encoded.ids))
    assert [encoded.ids[position] for position in encoded.positions] == encoded.labels
    unmasked = set(range(len(encoded.ids))) - set(encoded.positions)
    assert all(encoded.ids[position] == encoded.masked_ids[position] for position in unmasked)


def test_text_alone_is_not_cleaned(tokenizer: CaptionTokenizer) -> None:
    encoded = encode_text("  A cat, on a mat!  ", tokenizer, TEXTS, _rng())
    assert tokenizer.decode(encoded.ids) == "A cat, on a mat!"
    tokenized = TextOptions(max_tokens=128, max_words=None, tokenized=True)
    assert (
        tokenizer.decode(encode_text("skate ##board", tokenizer, tokenized, _rng()).ids)
        == "skateboard"
    )
    with pytest.raises(DataError, match="empty"):
        encode_text("  ", tokenizer, TEXTS, _rng())


def test_captions_of_several_images_say_so(tokenizer: CaptionTokenizer) -> None:
    seen = Counter()
    for seed in range(80):
        encoded = encode_pair_text(["two dogs"], tokenizer, CAPTIONS, _rng(seed), one_of_many=True)
        seen[tokenizer.decode(encoded.ids)] += 1
    assert set(seen) == {prefix.lower() + "two dogs" for prefix in PREFIXES}
    assert min(seen.values()) >= 8
    plain = encode_pair_text(["two dogs"], tokenizer, CAPTIONS, _rng())
    assert tokenizer.decode(plain.ids) == "two dogs"
