"""What can be said about a scene: captions, and expressions that mean one of its objects.

The grammar is small and deterministic, and everything it says has a truth value: an expression is a `Reference`, which
can be resolved against a scene, so one is handed out only if it means exactly one object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from xfm_fast.data.shapes.scenes import COLOURS, MARGIN, SHAPES, SIZES, TEXTURES, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_OTHER_WORDS = {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under"}
_FUNCTION_WORDS = (
    *("a", "an", "the", "of", "in", "to", "than", "under", "over", "above", "below", "left", "right", "there", "is"),
    *("are", "contain", "contains", "both", "exactly", "how", "many", "more", "what", "total", "image", "images"),
    *("picture", "object", "objects", "color", "shape", "size"),
)
VOCABULARY = tuple(sorted({*COLOURS, *SHAPES, *SIZES, *TEXTURES, *NUMBERS[1:], *_FUNCTION_WORDS}))
"""Every word of every caption, expression, question and statement."""


@dataclass(frozen=True)
class Reference:
    """Attributes, and at most one relation to another object: "small red circle left of the star"."""

    size: str | None = None
    colour: str | None = None
    texture: str | None = None
    shape: str | None = None
    relation: str | None = None
    other: Reference | None = None

    def __str__(self) -> str:
        return self.noun if self.other is None else f"{self.noun} {self.relation} the {self.other.noun}"

    @property
    def adjectives(self) -> str:
        """The attributes without the shape; may be empty."""
        return " ".join(part for part in (self.size, self.colour, self.texture) if part is not None)

    @property
    def noun(self) -> str:
        """Attributes and shape, without article and relation."""
        return " ".join((*self.adjectives.split(), self.shape or "object"))

    def fits(self, thing: Thing) -> bool:
        """Whether the attributes are those of the object; the relation is not looked at."""
        wanted = (self.size, self.colour, self.texture, self.shape)
        return all(want in (None, has) for want, has in zip(wanted, thing.looks, strict=True))

    def resolve(self, scene: Scene) -> list[int]:
        """Indices of the objects that the expression means."""
        fitting = [i for i, thing in enumerate(scene.things) if self.fits(thing)]
        if self.other is None or self.relation is None:
            return fitting
        anchors = self.other.resolve(scene)
        # "the" presupposes that there is exactly one.
        if len(anchors) != 1:
            return []
        anchor = scene.things[anchors[0]]
        return [i for i in fitting if i != anchors[0] and holds(self.relation, scene.things[i], anchor)]


def holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether a is left of, right of, above or below b: their centres differ by `MARGIN` or more that way."""
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return sign * (_doubled_centre(b, axis) - _doubled_centre(a, axis)) >= 2 * MARGIN


def main_relation(a: Thing, b: Thing) -> str:
    """The relation of a to b along the axis on which they are farther apart."""
    dx, dy = (_doubled_centre(a, axis) - _doubled_centre(b, axis) for axis in (0, 1))
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def with_article(noun: str) -> str:
    """`a circle`, `an orange circle`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def full(thing: Thing) -> Reference:
    """All that can be said of an object apart from its place."""
    size, colour, texture, shape = thing.looks
    return Reference(size, colour, texture, shape)


def captions(scene: Scene) -> list[str]:
    """Four paraphrases, the plainest first; each names every object and its relation to the next.

    The first two coincide where a scene with twins reads the same from both ends.
    """
    nouns = [with_article(full(thing).noun) for thing in scene.things]
    forward = [main_relation(a, b) for a, b in zip(scene.things, scene.things[1:], strict=False)]
    backward = [OPPOSITE[relation] for relation in reversed(forward)]
    plain, turned = _chain(nouns, forward), _chain(nouns[::-1], backward)
    verbose = _chain(nouns, [_OTHER_WORDS[relation] for relation in forward])
    if len(scene.things) == 1:
        turned = f"the image contains {plain}"
    return [plain, turned, f"there is {verbose}", f"a picture of {_chain(nouns[::-1], backward)}"]


def references(scene: Scene, index: int) -> list[Reference]:
    """Expressions that mean this object of the scene and no other.

    First the attributes, wherever a set of them suffices, the shortest first; then relations to objects that can
    themselves be named. Between twins only a relation decides, and two twins alone cannot be told apart: then the list
    is empty.
    """
    thing = scene.things[index]
    found = [reference for reference in _attribute_sets(thing) if reference.resolve(scene) == [index]]
    for other, anchor in enumerate(scene.things):
        named = next((ref for ref in _attribute_sets(anchor) if ref.shape and ref.resolve(scene) == [other]), None)
        if other == index or named is None:
            continue
        relation = main_relation(thing, anchor)
        for colour in (None, thing.colour):
            reference = Reference(None, colour, None, thing.shape, relation, named)
            if reference.resolve(scene) == [index]:
                found.append(reference)
    return found


def _attribute_sets(thing: Thing) -> Iterator[Reference]:
    """Every non-empty set of attributes, small sets first."""
    names = ("shape", "colour", "texture", "size")
    for count in range(1, len(names) + 1):
        for chosen in combinations(names, count):
            yield Reference(**{name: getattr(thing, name) for name in chosen})


def _chain(nouns: Sequence[str], relations: Sequence[str]) -> str:
    """Nouns joined by the relations of neighbours: "a circle left of a square above a star"."""
    return " ".join([nouns[0], *(f"{relation} {noun}" for relation, noun in zip(relations, nouns[1:], strict=True))])


def _doubled_centre(thing: Thing, axis: int) -> int:
    # Twice the centre is a whole number of units.
    return 2 * thing.box[axis] + thing.side
