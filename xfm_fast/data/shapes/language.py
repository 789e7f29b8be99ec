"""Texts about scenes: captions, referring expressions, questions, and true or false statements.

Questions and statements never mention a combination that is held out from the split.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations, product

from xfm_fast.data.shapes.scenes import (
    COLOURS,
    MARGIN,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Split,
    Thing,
    allowed_pairs,
    pixel_box,
)

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SYNONYMS = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "over",
    "below": "under",
}
_FUNCTION_WORDS = (
    "a an the of in to than under over above below left right there is are contain contains both exactly how many "
    "more what total image images picture object objects color shape size"
)
VOCABULARY = tuple(
    sorted({*COLOURS, *SHAPES, *SIZES, *TEXTURES, *NUMBERS[1:], *_FUNCTION_WORDS.split()})
)
"""Vocabulary of all texts."""
ANSWERS = tuple(sorted({*COLOURS, *SHAPES, *SIZES, *TEXTURES, *NUMBERS[1:4], "yes", "no"}))
"""All answers."""


@dataclass(frozen=True)
class Reference:
    """Attributes and at most one relation to another object: "small red circle left of the star"."""

    size: str | None = None
    colour: str | None = None
    texture: str | None = None
    shape: str | None = None
    relation: str | None = None
    anchor: Reference | None = None

    def __str__(self) -> str:
        if self.anchor is None:
            return self.noun
        return f"{self.noun} {self.relation} the {self.anchor.noun}"

    @property
    def adjectives(self) -> str:
        """Attributes without the shape; may be empty."""
        return " ".join(filter(None, (self.size, self.colour, self.texture)))

    @property
    def noun(self) -> str:
        """Attributes and shape, without article and relation."""
        return f"{self.adjectives} {self.shape or 'object'}".lstrip()

    def fits(self, thing: Thing) -> bool:
        """Return whether the attributes match the object, whatever the relation."""
        attributes = (self.size, self.colour, self.texture, self.shape)
        pairs = zip(attributes, thing.looks, strict=True)
        return all(attribute in (None, value) for attribute, value in pairs)

    def resolve(self, scene: Scene) -> list[int]:
        """Return the indices of matching objects."""
        matches = [i for i, thing in enumerate(scene.things) if self.fits(thing)]
        if self.anchor is None or self.relation is None:
            return matches
        anchors = self.anchor.resolve(scene)
        # "the" presupposes exactly one.
        if len(anchors) != 1:
            return []
        anchor = scene.things[anchors[0]]
        return [
            i
            for i in matches
            if scene.things[i] is not anchor and holds(self.relation, scene.things[i], anchor)
        ]


def _doubled_offset(a: Thing, b: Thing) -> tuple[int, int]:
    """Return twice the distance from the centre of a to that of b, right and down."""
    return 2 * (b.x - a.x) + b.side - a.side, 2 * (b.y - a.y) + b.side - a.side


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """Return whether a is left of, right of, above or below b: centres differ by at least `MARGIN`."""
    right, down = _doubled_offset(a, b)
    distances = {"left of": right, "right of": -right, "above": down, "below": -down}
    return distances[relation] >= 2 * MARGIN


def main_relation(a: Thing, b: Thing) -> str:
    """Return the relation of a to b along the axis of larger distance."""
    right, down = _doubled_offset(a, b)
    if abs(right) >= abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def with_article(noun: str) -> str:
    """Prepend the article: `a circle`, `an orange circle`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def captions(scene: Scene) -> list[str]:
    """Write four paraphrases, the plainest first; each names every object and its relation to the next."""
    nouns = [with_article(Reference(*thing.looks).noun) for thing in scene.things]
    forward = [main_relation(a, b) for a, b in pairwise(scene.things)]
    backward = [OPPOSITE[relation] for relation in reversed(forward)]
    plain, reverse = _chain(nouns, forward), _chain(nouns[::-1], backward)
    verbose = _chain(nouns, [_SYNONYMS[relation] for relation in forward])
    second = f"the image contains {plain}" if len(scene.things) == 1 else reverse
    return [plain, second, f"there is {verbose}", f"a picture of {reverse}"]


def _chain(nouns: Sequence[str], relations: Sequence[str]) -> str:
    """Join nouns by relations: "a circle left of a square above a star"."""
    text = nouns[0]
    for relation, noun in zip(relations, nouns[1:], strict=True):
        text += f" {relation} {noun}"
    return text


def references(scene: Scene, index: int) -> list[Reference]:
    """List the expressions that refer to this object only: shortest attributes first, then relations."""
    thing = scene.things[index]
    unique = [ref for ref in _attribute_sets(thing) if ref.resolve(scene) == [index]]
    for i, neighbour in enumerate(scene.things):
        names = (
            ref for ref in _attribute_sets(neighbour) if ref.shape and ref.resolve(scene) == [i]
        )
        anchor = next(names, None)
        if i == index or anchor is None:
            continue
        relation = main_relation(thing, neighbour)
        for colour in (None, thing.colour):
            reference = Reference(None, colour, None, thing.shape, relation, anchor)
            if reference.resolve(scene) == [index]:
                unique.append(reference)
    return unique


def _attribute_sets(thing: Thing) -> Iterator[Reference]:
    """Yield the non-empty attribute sets of an object, small sets first."""
    names = ("shape", "colour", "texture", "size")
    for count in range(1, len(names) + 1):
        for subset in combinations(names, count):
            yield Reference(**{name: getattr(thing, name) for name in subset})


def questions(scene: Scene, split: Split) -> list[tuple[str, str]]:
    """Write question-answer pairs: count, attributes, existence, relations."""
    things = scene.things
    pairs = [("how many objects are there", NUMBERS[len(things)])]
    names = [references(scene, index) for index in range(len(things))]
    for thing, expressions in zip(things, names, strict=True):
        for attribute, word in (("colour", "color"), ("shape", "shape"), ("size", "size")):
            # The shortest expression that does not contain the answer.
            if silent := [ref for ref in expressions if getattr(ref, attribute) is None]:
                pairs.append((f"what {word} is the {silent[0]}", getattr(thing, attribute)))
    present, absent = _pairs(scene, split)
    pairs.append((f"is there {_pair_noun(present[0])}", "yes"))
    if absent:
        pair = absent[_choice((scene,), "absent", len(absent))]
        pairs.append((f"is there {_pair_noun(pair)}", "no"))
    simple = [
        next((ref for ref in refs if ref.anchor is None and ref.shape), None) for refs in names
    ]
    for i, j in permutations(range(len(things)), 2):
        if simple[i] is None or simple[j] is None:
            continue
        relation = main_relation(things[i], things[j])
        claim = relation if _choice((scene,), f"{i} {j}", 2) else OPPOSITE[relation]
        answer = "yes" if claim == relation else "no"
        pairs.append((f"is the {simple[i]} {claim} the {simple[j]}", answer))
        related = [
            k for k in range(len(things)) if k != j and holds(relation, things[k], things[j])
        ]
        if related == [i]:
            pairs.append((f"what shape is {relation} the {simple[j]}", things[i].shape))
    return pairs


def statements(first: Scene, second: Scene, split: Split) -> list[tuple[str, bool]]:
    """Write statements about a left image (`first`) and a right image (`second`), with their truth."""
    scenes = (first, second)
    sides = list(zip(("left", "right"), scenes, strict=True))
    left, right = len(first.things), len(second.things)
    claims = [
        ("the left image contains more objects than the right image", left > right),
        ("the right image contains more objects than the left image", right > left),
    ]
    for total in (left + right, left + right % 3 + 1):
        claims.append((f"there are {NUMBERS[total]} objects in total", total == left + right))
    for count in sorted({left, right}):
        noun = f"object{'s' * (count > 1)}"
        claim = f"both images contain exactly {NUMBERS[count]} {noun}"
        claims.append((claim, left == right == count))
    for attribute, values, noun in (("shape", SHAPES, "{}"), ("colour", COLOURS, "{} object")):
        seen = [{getattr(thing, attribute) for thing in scene.things} for scene in scenes]
        for purpose, options in (
            (attribute, sorted(seen[0] | seen[1])),
            (f"any {attribute}", values),
        ):
            value = options[_choice(scenes, purpose, len(options))]
            name, count = with_article(noun.format(value)), sum(value in has for has in seen)
            claims.append((f"both images contain {name}", count == 2))
            claims.append((f"exactly one image contains {name}", count == 1))
    for side, scene in sides:
        for pairs, truth in zip(_pairs(scene, split), (True, False), strict=True):
            if pairs:
                pair = pairs[_choice(scenes, f"{side} {truth}", len(pairs))]
                claims.append((f"the {side} image contains {_pair_noun(pair)}", truth))
    for side, scene in sides:
        for a, b in pairwise(scene.things):
            x, y = (Reference(colour=thing.colour, shape=thing.shape) for thing in (a, b))
            relation = main_relation(a, b)
            for word in (relation, OPPOSITE[relation]):
                claim = (
                    f"in the {side} image {with_article(x.noun)} is {word} {with_article(y.noun)}"
                )
                claims.append((claim, _related(scene, x, word, y)))
    return claims


def entailments(first: Scene, second: Scene, index: int) -> list[tuple[str, str, bool]]:
    """Write two (caption, statement, truth) triples, the true one first; none for indistinguishable
    scenes.

    Neither half reveals the answer: the triples share a statement and have captions of different
    scenes, or share a scene and have opposite statements. `index` selects the topic of the
    statement and the paraphrases.
    """
    # 3 and 4 have no common factor, so that every topic meets every paraphrase.
    topic, paraphrase = index % 3, index % 4
    caption, foreign = captions(first)[paraphrase], captions(second)[(paraphrase + 1) % 4]
    if topic == 2:
        again = captions(first)[(paraphrase + 1) % 4]
        for a, b in pairwise(first.things):
            x, y = (Reference(colour=thing.colour, shape=thing.shape) for thing in (a, b))
            relation = main_relation(a, b)
            opposite = OPPOSITE[relation]
            if not _related(first, x, opposite, y):
                left, right = with_article(x.noun), with_article(y.noun)
                claims = f"{left} is {relation} {right}", f"{left} is {opposite} {right}"
                return [(caption, claims[0], True), (again, claims[1], False)]
    count = len(first.things)
    if topic == 1 and count != len(second.things):
        verb, ending = ("is", "") if count == 1 else ("are", "s")
        claim = f"there {verb} exactly {NUMBERS[count]} object{ending}"
        return [(caption, claim, True), (foreign, claim, False)]
    elsewhere = {(thing.colour, thing.shape) for thing in second.things}
    only = sorted({(thing.colour, thing.shape) for thing in first.things} - elsewhere)
    if not only:
        return []
    claim = f"there is {_pair_noun(only[index % len(only)])}"
    return [(caption, claim, True), (foreign, claim, False)]


def _pair_noun(pair: tuple[str, str]) -> str:
    return with_article(" ".join(pair))


def _related(scene: Scene, x: Reference, relation: str, y: Reference) -> bool:
    """Return whether an object matching x has the relation to one matching y."""
    matches = product(filter(x.fits, scene.things), filter(y.fits, scene.things))
    return any(a is not b and holds(relation, a, b) for a, b in matches)


def _pairs(scene: Scene, split: Split) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the colour-shape pairs in the scene, and pairs of the split that it lacks."""
    present = {(thing.colour, thing.shape) for thing in scene.things}
    return sorted(present), sorted(allowed_pairs(split) - present)


def _choice(scenes: Sequence[Scene], purpose: str, count: int) -> int:
    """Draw a number below `count` by a hash of these scenes."""
    looks = " ".join(
        f"{Reference(*t.looks)}{pixel_box(t)}" for scene in scenes for t in scene.things
    )
    return zlib.crc32(f"{purpose}: {looks}".encode()) % count
