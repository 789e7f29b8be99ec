"""Golden token ids as texts of made-up words, so that records can stand for golden inputs."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from xfm_fast.tokenizer import BOS, EOS, PAD, CaptionTokenizer


def word_tokenizer(vocab_size: int) -> CaptionTokenizer:
    """Word `w7` is token 7."""
    words = {BOS: 0, PAD: 1, EOS: 2} | {f"w{number}": number for number in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=PAD))
    setattr(tokenizer, "pre_tokenizer", pre_tokenizers.WhitespaceSplit())  # noqa: B010
    return CaptionTokenizer(tokenizer, "made-up words")


def words(ids: Sequence[int] | Tensor) -> str:
    """The text of ids `<s> ... </s>`, padded or not."""
    return " ".join(f"w{number}" for number in map(int, ids) if number > 2)
