"""Caption cleaning and tokenization: RoBERTa's byte-level BPE, or BERT's WordPiece for X²-VLM."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import DataError, explain_types

BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
# The same tokens in BERT, in this order.
_OF_BERT = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")

_TO_SPACE = str.maketrans(dict.fromkeys(",.'!?\"()*#:;~-/", " "))
_SPACES = re.compile(r"\s{2,}")
_BYTES = 256
# Byte-level BPE's symbols of white space at the start of a token; the last is XLM-R's.
_WHITE = frozenset("ĠĉĊčċČ▁")


def clean_caption(caption: str, max_words: int = 30) -> str:
    """Clean a caption as `pre_caption` does. May return ""."""
    cleaned = caption.lower().translate(_TO_SPACE).replace("<person>", "person")
    words = _SPACES.sub(" ", cleaned).strip().split(" ")
    return " ".join(words[:max_words])


def pre_caption(caption: str, max_words: int = 30) -> str:
    """Clean a caption as the official code does: lower case, punctuation to spaces, the first `max_words` words.

    Raises `DataError` for a caption that is empty after cleaning; readers skip, count and list it.
    """
    cleaned = clean_caption(caption, max_words)
    if not cleaned:
        raise DataError(f"caption {caption!r} is empty after cleaning; write words or remove it")
    return cleaned


def pre_question(question: str, max_words: int = 30) -> str:
    """Clean a question as the official code does: like captions, but inner and leading spaces stay. May return "".

    A run of spaces counts as words. The official `max_words` is 30 in training and 50 in testing.
    """
    cleaned = question.lower().translate(_TO_SPACE).rstrip(" ")
    return " ".join(cleaned.split(" ")[:max_words])


class CaptionTokenizer:
    """Byte-level BPE as in RoBERTa, `<s> tokens </s>`, or BERT's WordPiece, `[CLS] pieces [SEP]`.

    Attributes:
        origin: path of the vocabulary, for reports.
    """

    def __init__(self, tokenizer: Tokenizer, origin: str) -> None:
        self.origin = origin
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        vocabulary = tokenizer.get_vocab()
        is_bert = BOS not in vocabulary and _OF_BERT[0] in vocabulary
        self._special = _OF_BERT if is_bert else (BOS, PAD, EOS, UNK, MASK)
        bos, pad, eos, _, _ = self._special
        missing = [token for token in (bos, pad, eos) if token not in vocabulary]
        if missing:
            raise DataError(
                f"the vocabulary in {origin} lacks {', '.join(missing)}; give RoBERTa's vocab.json and merges.txt"
            )
        self.bos_token_id = vocabulary[bos]
        self.pad_token_id = vocabulary[pad]
        self.eos_token_id = vocabulary[eos]
        size, last = tokenizer.get_vocab_size(), max(vocabulary.values(), default=-1)
        if last >= size:
            raise DataError(
                f"the vocabulary in {origin} has {size} entries but an id {last}; number ids from 0 without gaps"
            )
        self._starts_word = [False] * size
        for token, index in vocabulary.items():
            starts = not token.startswith("##") if is_bert else token[:1] in _WHITE
            self._starts_word[index] = token in self._special or starts

    @classmethod
    @explain_types
    def from_files(cls, path: str | os.PathLike[str]) -> CaptionTokenizer:
        """Read a `tokenizer.json`, or a folder with one, or a vocabulary.

        A vocabulary is `vocab.json` and `merges.txt`, or BERT's `vocab.txt`.

        Raises:
            DataError: files are missing or damaged, or the vocabulary lacks the special tokens of
                RoBERTa and of BERT.
        """
        path = Path(path)
        single = path / "tokenizer.json" if path.is_dir() else path
        vocabulary, merges = path / "vocab.json", path / "merges.txt"
        if single.is_file():
            return cls(_parse(single, lambda: Tokenizer.from_file(str(single))), str(single))
        word_pieces = path / "vocab.txt"
        if word_pieces.is_file() and not vocabulary.is_file():
            return cls(_parse(path, lambda: _word_pieces(word_pieces)), str(path))
        if not (vocabulary.is_file() and merges.is_file()):
            raise DataError(
                f"{path} has no tokenizer; give a tokenizer.json, or a folder with vocab.json and merges.txt"
            )
        model = _parse(
            path, lambda: models.BPE.from_file(str(vocabulary), str(merges), unk_token=UNK)
        )
        return cls(_byte_level(model), str(path))

    @classmethod
    def train_on_texts(cls, texts: Iterable[str], vocab_size: int) -> CaptionTokenizer:
        """Train a vocabulary, for use with random weights only. The same texts give the same vocabulary.

        Trained weights need the vocabulary that they were trained with.

        Args:
            texts: cleaned captions.
            vocab_size: upper bound, special tokens included.
        """
        minimum = _BYTES + 5
        if vocab_size < minimum:
            raise DataError(
                f"vocab_size={vocab_size} is too small for bytes and special tokens; use at least {minimum}"
            )
        tokenizer = _byte_level(models.BPE(unk_token=UNK))
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            special_tokens=[BOS, PAD, EOS, UNK],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        texts = list(texts)
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens([MASK])  # the last entry, as in RoBERTa
        return cls(tokenizer, f"a vocabulary trained on {len(texts)} captions")

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def mask_token_id(self) -> int:
        """Id of `<mask>`.

        Raises:
            DataError: the vocabulary has no mask token.
        """
        mask = self._special[-1]
        index = self._tokenizer.token_to_id(mask)
        if index is None:
            raise DataError(
                f"the vocabulary in {self.origin} lacks {mask}; give RoBERTa's vocabulary, which has it"
            )
        return index

    def check(self, config: XFMConfig) -> None:
        """Raise `DataError` unless the ids fit a model of this configuration."""
        if self.vocab_size > config.vocab_size:
            raise DataError(
                f"the vocabulary in {self.origin} has {self.vocab_size} entries, the model {config.vocab_size}; "
                "give the model's vocabulary"
            )
        for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
            if getattr(self, name) != getattr(config, name):
                raise DataError(
                    f"{name} is {getattr(self, name)} in {self.origin} and {getattr(config, name)} in the model; "
                    "give the model's vocabulary"
                )

    def encode(
        self, texts: Sequence[str], max_tokens: int = 40, *, pad_to_longest: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Encode as `<s> tokens </s>`, truncated and padded to `max_tokens`.

        Args:
            texts: cleaned captions, as `pre_caption` returns them.
            max_tokens: special tokens included.
            pad_to_longest: pad only to the longest of these texts.

        Returns:
            input_ids and attention_mask, int64 `[B, L]`; the mask is 1 for real tokens.
        """
        rows = self.encode_ids(texts, max_tokens)
        return self.pad(rows, None if pad_to_longest else max_tokens)

    def pad(self, rows: Sequence[Sequence[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
        """Pad lists of ids to `width`, or to the longest: ids and attention mask `[B, L]`."""
        width = max(map(len, rows), default=0) if width is None else width
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        return ids, mask

    def encode_ids(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Encode as `<s> tokens </s>`, truncated to `max_tokens` and not padded, as pretraining masks them.

        Raises:
            DataError: a text has no tokens, or `max_tokens` leaves no room for any.
        """
        if max_tokens < 3:
            raise DataError(
                f"max_tokens={max_tokens} leaves no room between <s> and </s>; use at least 3"
            )
        rows = []
        for index, encoding in enumerate(self._encode_batch(list(texts))):
            if not encoding.ids:
                raise DataError(
                    f"text {index} ({texts[index]!r}) has no tokens; write words or remove it"
                )
            rows.append([self.bos_token_id, *encoding.ids[: max_tokens - 2], self.eos_token_id])
        return rows

    def encode_pair(self, first: str, second: str, max_tokens: int = 128) -> list[int]:
        """Encode as `<s> first </s></s> second </s>`, RoBERTa's form of two texts, not padded.

        Pairs longer than `max_tokens` lose the last token of the longer text until they fit, of the
        second text if both are equally long. One of the texts may be empty.

        Raises:
            DataError: both texts are empty, or `max_tokens` has no room for a token of each.
        """
        if max_tokens < 6:
            raise DataError(
                f"max_tokens={max_tokens} leaves no room for two texts and their <s> and </s>; use at least 6"
            )
        if self._special is _OF_BERT:
            raise DataError(
                f"the vocabulary in {self.origin} is BERT's, whose token types XFM lacks; give RoBERTa's for pairs"
            )
        a, b = (encoding.ids for encoding in self._encode_batch([first, second]))
        if not (a or b):
            raise DataError(
                f"neither {first!r} nor {second!r} has tokens; write words or remove the pair"
            )
        budget = max_tokens - 4
        first_tokens = min(len(a), max(budget - len(b), budget - budget // 2))
        a, b, end = a[:first_tokens], b[: budget - first_tokens], self.eos_token_id
        return [self.bos_token_id, *a, end, end, *b, end]

    def encode_prompt(self, prompt: str) -> Tensor:
        """Encode a prompt as `<s> tokens`: `[S]` int64, the first ids of the caption that continues it.

        Trailing white space is dropped. Byte-level tokens include the space before them, so a trailing
        space would be a token that never occurs before a word in training.
        """
        ids = self._encode_batch([prompt.rstrip()])[0].ids
        return torch.tensor([self.bos_token_id, *ids])

    def _encode_batch(self, texts: list[str]) -> list[Any]:
        try:
            return self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except (TypeError, UnicodeError):
            # The library does not name the text.
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    raise DataError(
                        f"text {index} is a {type(text).__name__}; give strings"
                    ) from None
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise DataError(
                        f"text {index} ({text!a}) contains half of a surrogate pair; remove it"
                    ) from None
            raise

    def word_starts(self, ids: Sequence[int]) -> list[bool]:
        """Mark the ids that begin a word, for whole-word masking of `<s> tokens </s>` from `encode_ids`.

        Byte-level tokens that begin with white space begin a word; so do special tokens and the first
        token of a text.
        """
        return [position < 2 or self._starts_word[index] for position, index in enumerate(ids)]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids to text, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def sha256(self) -> str:
        """Hash of the vocabulary and its settings."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def fast_options(self) -> dict[str, Any]:
        """Return the arguments with which transformers' `PreTrainedTokenizerFast` takes the vocabulary."""
        names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
        vocabulary = self._tokenizer.get_vocab()
        tokens = zip(names, self._special, strict=True)
        known = {name: token for name, token in tokens if token in vocabulary}
        return {"tokenizer_object": self._tokenizer, **known}

    def to_json(self) -> str:
        """Serialise to a `tokenizer.json` that `from_files` reads."""
        return self._tokenizer.to_str(pretty=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `tokenizer.json` that `from_files` reads."""
        self._tokenizer.save(str(path))


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    # Cleaned captions begin without a space, and so does their first token.
    setattr(tokenizer, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))  # noqa: B010
    setattr(tokenizer, "decoder", decoders.ByteLevel())  # noqa: B010
    tokenizer.add_special_tokens(
        [token for token in (BOS, PAD, EOS, UNK, MASK) if tokenizer.token_to_id(token) is not None]
    )
    return tokenizer


def _word_pieces(vocabulary: Path) -> Tokenizer:
    """BERT's uncased tokenizer, as X²-VLM uses it."""
    tokenizer = Tokenizer(models.WordPiece.from_file(str(vocabulary), unk_token=_OF_BERT[3]))
    setattr(tokenizer, "normalizer", normalizers.BertNormalizer(lowercase=True))  # noqa: B010
    setattr(tokenizer, "pre_tokenizer", pre_tokenizers.BertPreTokenizer())  # noqa: B010
    setattr(tokenizer, "decoder", decoders.WordPiece())  # noqa: B010
    tokenizer.add_special_tokens(
        [token for token in _OF_BERT if tokenizer.token_to_id(token) is not None]
    )
    return tokenizer


def _parse(path: Path, read: Any) -> Any:
    try:
        return read()
    except BaseException as error:
        # The library raises bare exceptions, and panics of its Rust code, which are not `Exception`s.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"{path} is not a readable tokenizer ({error}); download or copy it again"
        ) from None
