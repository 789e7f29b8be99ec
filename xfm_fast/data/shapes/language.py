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
_OTHER_WORDS = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "over",
    "below": "under",
}
_FUNCTION_WORDS = (
    *(
        "a",
        "an",
        "the",
        "of",
        "in",
        "to",
        "than",
        "under",
        "over",
        "above",
        "below",
        "left",
        "right",
        "there",
        "is",
    ),
    *(
        "are",
        "contain",
        "contains",
        "both",
        "exactly",
        "how",
        "many",
        "more",
        "what",
        "total",
        "image",
        "images",
    ),
    *("picture", "object", "objects", "color", "shape", "size"),
)
VOCABULARY = tuple(sorted({*COLOURS, *SHAPES, *SIZES, *TEXTURES, *NUMBERS[1:], *_FUNCTION_WORDS}))
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
    other: Reference | None = None

    def __str__(self) -> str:
        return (
            self.noun
            if self.other is None
            else f"{self.noun} {self.relation} the {self.other.noun}"
        )

    @property
    def adjectives(self) -> str:
        """Attributes without the shape; may be empty."""
        return " ".join(filter(None, (self.size, self.colour, self.texture)))

    @property
    def noun(self) -> str:
        """Attributes and shape, without article and relation."""
        return f"{self.adjectives} {self.shape or 'object'}".lstrip()

    def fits(self, thing: Thing) -> bool:
        """True if the attributes match the object; ignores the relation."""
        mine = (self.size, self.colour, self.texture, self.shape)
        return all(value in (None, has) for value, has in zip(mine, thing.looks, strict=True))

    def resolve(self, scene: Scene) -> list[int]:
        """Indices of matching objects."""
        fitting = [i for i, thing in enumerate(scene.things) if self.fits(thing)]
        if self.other is None or self.relation is None:
            return fitting
        anchors = self.other.resolve(scene)
        # "the" presupposes exactly one.
        if len(anchors) != 1:
            return []
        anchor = scene.things[anchors[0]]
        return [
            i for i in fitting if i != anchors[0] and holds(self.relation, scene.things[i], anchor)
        ]


def _doubled_offset(a: Thing, b: Thing) -> tuple[int, int]:
    """Twice the distance from the centre of a to that of b, right and down."""
    return 2 * (b.x - a.x) + b.side - a.side, 2 * (b.y - a.y) + b.side - a.side


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """True if a is left of, right of, above or below b: centres differ by at least `MARGIN`."""
    right, down = _doubled_offset(a, b)
    return {"left of": right, "right of": -right, "above": down, "below": -down}[
        relation
    ] >= 2 * MARGIN


def main_relation(a: Thing, b: Thing) -> str:
    """Relation of a to b along the axis of larger distance."""
    right, down = _doubled_offset(a, b)
    if abs(right) >= abs(down):
        return "left of" if right > 0 else "right of"
    return "above" if down > 0 else "below"


def with_article(noun: str) -> str:
    """`a circle`, `an orange circle`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def captions(scene: Scene) -> list[str]:
    """Four paraphrases, the plainest first; each names every object and its relation to the next."""
    nouns = [with_article(Reference(*thing.looks).noun) for thing in scene.things]
    forward = [main_relation(a, b) for a, b in pairwise(scene.things)]
    backward = [OPPOSITE[relation] for relation in reversed(forward)]
    plain, reverse = _chain(nouns, forward), _chain(nouns[::-1], backward)
    verbose = _chain(nouns, [_OTHER_WORDS[relation] for relation in forward])
    second = f"the image contains {plain}" if len(scene.things) == 1 else reverse
    return [plain, second, f"there is {verbose}", f"a picture of {reverse}"]


def _chain(nouns: Sequence[str], relations: Sequence[str]) -> str:
    """Nouns joined by relations: "a circle left of a square above a star"."""
    return " ".join(
        [
            nouns[0],
            *(f"{relation} {noun}" for relation, noun in zip(relations, nouns[1:], strict=True)),
        ]
    )


def references(scene: Scene, index: int) -> list[Reference]:
    """Referring expressions that match this object only: shortest attributes first, then relations; may be empty."""
    thing = scene.things[index]
    found = [
        reference for reference in _attribute_sets(thing) if reference.resolve(scene) == [index]
    ]
    for other, anchor in enumerate(scene.things):
        name = next(
            (ref for ref in _attribute_sets(anchor) if ref.shape and ref.resolve(scene) == [other]),
            None,
        )
        if other == index or name is None:
            continue
        for colour in (None, thing.colour):
            reference = Reference(
                None, colour, None, thing.shape, main_relation(thing, anchor), name
            )
            if reference.resolve(scene) == [index]:
                found.append(reference)
    return found


def _attribute_sets(thing: Thing) -> Iterator[Reference]:
    """Non-empty attribute sets, small sets first."""
    names = ("shape", "colour", "texture", "size")
    for count in range(1, len(names) + 1):
        for chosen in combinations(names, count):
            yield Reference(**{name: getattr(thing, name) for name in chosen})


def questions(scene: Scene, split: Split) -> list[tuple[str, str]]:
    """Question-answer pairs: count, attributes, existence, relations."""
    pairs = [("how many objects are there", NUMBERS[len(scene.things)])]
    names = [references(scene, index) for index in range(len(scene.things))]
    for thing, expressions in zip(scene.things, names, strict=True):
        for attribute, word in (("colour", "color"), ("shape", "shape"), ("size", "size")):
            # The shortest expression that does not contain the answer.
            if silent := [ref for ref in expressions if getattr(ref, attribute) is None]:
                pairs.append((f"what {word} is the {silent[0]}", getattr(thing, attribute)))
    present, absent = _pairs(scene, split)
    pairs += [
        (f"is there {with_article(f'{colour} {shape}')}", "yes") for colour, shape in present[:1]
    ]
    if absent:
        colour, shape = absent[_choice((scene,), "absent", len(absent))]
        pairs.append((f"is there {with_article(f'{colour} {shape}')}", "no"))
    simple = [
        next((ref for ref in refs if ref.other is None and ref.shape), None) for refs in names
    ]
    for i, j in permutations(range(len(scene.things)), 2):
        thing, anchor = scene.things[i], scene.things[j]
        if simple[i] is None or simple[j] is None:
            continue
        relation = main_relation(thing, anchor)
        claim = relation if _choice((scene,), f"{i} {j}", 2) else OPPOSITE[relation]
        pairs.append(
            (f"is the {simple[i]} {claim} the {simple[j]}", "yes" if claim == relation else "no")
        )
        if [k for k, one in enumerate(scene.things) if k != j and holds(relation, one, anchor)] == [
            i
        ]:
            pairs.append((f"what shape is {relation} the {simple[j]}", thing.shape))
    return pairs


def statements(first: Scene, second: Scene, split: Split) -> list[tuple[str, bool]]:
    """Statements about a left image (`first`) and a right image (`second`), with their truth."""
    both = (first, second)
    left, right = len(first.things), len(second.things)
    made = [
        ("the left image contains more objects than the right image", left > right),
        ("the right image contains more objects than the left image", right > left),
    ]
    for total in (left + right, left + right % 3 + 1):
        made.append((f"there are {NUMBERS[total]} objects in total", total == left + right))
    for count in sorted({left, right}):
        noun = f"object{'s' * (count > 1)}"
        made.append(
            (f"both images contain exactly {NUMBERS[count]} {noun}", left == right == count)
        )
    for attribute, values, noun in (("shape", SHAPES, "{}"), ("colour", COLOURS, "{} object")):
        seen = [{getattr(thing, attribute) for thing in scene.things} for scene in both]
        for purpose, options in (
            (attribute, sorted(seen[0] | seen[1])),
            (f"any {attribute}", values),
        ):
            value = options[_choice(both, purpose, len(options))]
            name, count = with_article(noun.format(value)), sum(value in has for has in seen)
            made.append((f"both images contain {name}", count == 2))
            made.append((f"exactly one image contains {name}", count == 1))
    for side, scene in zip(("left", "right"), both, strict=True):
        for pairs, truth in zip(_pairs(scene, split), (True, False), strict=True):
            if pairs:
                colour, shape = pairs[_choice(both, f"{side} {truth}", len(pairs))]
                made.append(
                    (f"the {side} image contains {with_article(f'{colour} {shape}')}", truth)
                )
    for side, scene in zip(("left", "right"), both, strict=True):
        for a, b in pairwise(scene.things):
            x, y = (Reference(colour=thing.colour, shape=thing.shape) for thing in (a, b))
            for claim in (main_relation(a, b), OPPOSITE[main_relation(a, b)]):
                sentence = (
                    f"in the {side} image {with_article(x.noun)} is {claim} {with_article(y.noun)}"
                )
                made.append((sentence, _related(scene, x, claim, y)))
    return made


def entailments(first: Scene, second: Scene, index: int) -> list[tuple[str, str, bool]]:
    """Two (caption, statement, truth) triples, the true one first; empty if the scenes are indistinguishable.

    Neither half reveals the answer: the triples share a statement and have captions of different scenes, or share a
    scene and have opposite statements. `index` selects the kind of statement and the paraphrases.
    """
    # The numbers of kinds and paraphrases have no common factor, so no kind goes with a paraphrase.
    kind, paraphrase = index % 3, index % 4
    caption, other = captions(first)[paraphrase], captions(second)[(paraphrase + 1) % 4]
    if kind == 2:
        again = captions(first)[(paraphrase + 1) % 4]
        for a, b in pairwise(first.things):
            x, y = (Reference(colour=thing.colour, shape=thing.shape) for thing in (a, b))
            relation = main_relation(a, b)
            opposite = OPPOSITE[relation]
            if not _related(first, x, opposite, y):
                left, right = with_article(x.noun), with_article(y.noun)
                claims = f"{left} is {relation} {right}", f"{left} is {opposite} {right}"
                return [(caption, claims[0], True), (again, claims[1], False)]
    number = len(first.things)
    if kind == 1 and number != len(second.things):
        claim = f"there {'is' if number == 1 else 'are'} exactly {NUMBERS[number]} object{'s' * (number > 1)}"
        return [(caption, claim, True), (other, claim, False)]
    elsewhere = {(thing.colour, thing.shape) for thing in second.things}
    only = sorted({(thing.colour, thing.shape) for thing in first.things} - elsewhere)
    if not only:
        return []
    colour, shape = only[index % len(only)]
    claim = f"there is {with_article(f'{colour} {shape}')}"
    return [(caption, claim, True), (other, claim, False)]


def _related(scene: Scene, x: Reference, relation: str, y: Reference) -> bool:
    """True if an object matching x has the relation to one matching y."""
    fitting = product(filter(x.fits, scene.things), filter(y.fits, scene.things))
    return any(one is not other and holds(relation, one, other) for one, other in fitting)


def _pairs(scene: Scene, split: Split) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Colour-shape pairs in the scene, and pairs of the split that it lacks."""
    present = {(thing.colour, thing.shape) for thing in scene.things}
    return sorted(present), sorted(allowed_pairs(split) - present)


def _choice(scenes: Sequence[Scene], purpose: str, count: int) -> int:
    """Deterministic pseudo-random number below `count` for these scenes."""
    looks = " ".join(
        f"{Reference(*t.looks)}{pixel_box(t)}" for scene in scenes for t in scene.things
    )
    return zlib.crc32(f"{purpose}: {looks}".encode()) % count
