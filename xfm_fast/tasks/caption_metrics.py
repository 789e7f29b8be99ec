"""Caption metrics of the COCO evaluation: BLEU (ACL 2002), ROUGE-L (WAS 2004) and CIDEr-D (arXiv 1411.5726).

METEOR and SPICE are missing: they need WordNet and a scene-graph parser. Tokenisation follows the Java tokeniser of the
COCO evaluation for typical captions; it knows more abbreviations and dialect.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from xfm_fast.errors import InputError

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


def caption_metrics(candidates: Mapping[T, str], references: Mapping[T, Sequence[str]]) -> dict[str, float]:
    """Corpus scores of one caption per image id against its references.

    `BLEU-1` … `BLEU-4` and `ROUGE-L` are in [0, 1], `CIDEr-D` in [0, 10] (it weights n-grams by their rarity in the
    corpus).
    """
    found, known = dict(candidates), dict(references)
    if not found:
        raise InputError("there are no captions to score; give one for every image")
    if missing := [image for image in known if image not in found]:
        raise InputError(f"image {missing[0]} has references but no caption ({len(missing)} such images)")
    if missing := [image for image in found if not known.get(image)]:
        raise InputError(f"image {missing[0]} has a caption but no reference ({len(missing)} such images)")
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
        vector = {gram: count * (images - math.log(max(images_with[gram], 1))) for gram, count in grams.items()}
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
            cosines = (s / (a * b) for s, a, b in zip(shared, our_norms, their_norms, strict=True) if a and b)
            # The evaluation counts bigrams for a length.
            difference = max(len(said) - 1, 0) - max(len(text) - 1, 0)
            of_this += sum(cosines) / _ORDER * math.exp(-(difference**2) / (2 * _SIGMA**2))
        total += 10 * of_this / len(meant)
    return total / len(candidates)


def _ngrams(text: Words) -> NGrams:
    return NGrams(tuple(text[i : i + n]) for n in range(1, _ORDER + 1) for i in range(len(text) - n + 1))


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
