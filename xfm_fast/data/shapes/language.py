"""Texts about scenes: captions, referring expressions, questions, and true or false statements.

`caption_facts` parses captions and checks their claims. Questions and statements never mention a combination that is
held out from the split.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations, product
from typing import Literal

from xfm_fast.data.shapes.scenes import COLOURS, MARGIN, SHAPES, SIZES, TEXTURES, Scene, Split, Thing, allowed_pairs
from xfm_fast.errors import DataError

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_OTHER_WORDS = {"left of": "to the left of", "right of": "to the right of", "above": "over", "below": "under"}
_FUNCTION_WORDS = (
    *("a", "an", "the", "of", "in", "to", "than", "under", "over", "above", "below", "left", "right", "there", "is"),
    *("are", "contain", "contains", "both", "exactly", "how", "many", "more", "what", "total", "image", "images"),
    *("picture", "object", "objects", "color", "shape", "size"),
)
VOCABULARY = tuple(sorted({*COLOURS, *SHAPES, *SIZES, *TEXTURES, *NUMBERS[1:], *_FUNCTION_WORDS}))
"""Vocabulary of all texts."""
ANSWERS = tuple(sorted({*COLOURS, *SHAPES, *SIZES, *TEXTURES, *NUMBERS[1:4], "yes", "no"}))
"""All answers."""
Attribute = Literal["size", "colour", "texture", "shape"]
ATTRIBUTES: tuple[Attribute, ...] = ("size", "colour", "texture", "shape")
"""Attributes of an object in noun-phrase order."""

_CANONICAL = {other: relation for relation, other in _OTHER_WORDS.items()}
_ADJECTIVES = "".join(f"(?:({'|'.join(words)}) )?" for words in (SIZES, COLOURS, TEXTURES))
_NOUN = re.compile(rf"(?:an?|the) {_ADJECTIVES}({'|'.join(SHAPES)}|object)")
_RELATION = re.compile(f" ({'|'.join((*OPPOSITE, *_OTHER_WORDS.values()))}) ")
_OPENING = re.compile("(?:there is |the image contains |a picture of )?")


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
        return self.noun if self.other is None else f"{self.noun} {self.relation} the {self.other.noun}"

    @property
    def adjectives(self) -> str:
        """Attributes without the shape; may be empty."""
        return " ".join(part for part in (self.size, self.colour, self.texture) if part is not None)

    @property
    def noun(self) -> str:
        """Attributes and shape, without article and relation."""
        return " ".join((*self.adjectives.split(), self.shape or "object"))

    def fits(self, thing: Thing) -> bool:
        """True if the attributes match the object; ignores the relation."""
        wanted = (self.size, self.colour, self.texture, self.shape)
        return all(want in (None, has) for want, has in zip(wanted, thing.looks, strict=True))

    def resolve(self, scene: Scene) -> list[int]:
        """Indices of matching objects."""
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
    """True if a is left of, right of, above or below b: centres differ by at least `MARGIN`."""
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return sign * (_doubled_centre(b, axis) - _doubled_centre(a, axis)) >= 2 * MARGIN


def main_relation(a: Thing, b: Thing) -> str:
    """Relation of a to b along the axis of larger distance."""
    dx, dy = (_doubled_centre(a, axis) - _doubled_centre(b, axis) for axis in (0, 1))
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def with_article(noun: str) -> str:
    """`a circle`, `an orange circle`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def full(thing: Thing) -> Reference:
    """All attributes of an object."""
    size, colour, texture, shape = thing.looks
    return Reference(size, colour, texture, shape)


def captions(scene: Scene) -> list[str]:
    """Four paraphrases, the plainest first; each names every object and its relation to the next."""
    nouns = [with_article(full(thing).noun) for thing in scene.things]
    forward = [main_relation(a, b) for a, b in zip(scene.things, scene.things[1:], strict=False)]
    backward = [OPPOSITE[relation] for relation in reversed(forward)]
    plain, turned = _chain(nouns, forward), _chain(nouns[::-1], backward)
    verbose = _chain(nouns, [_OTHER_WORDS[relation] for relation in forward])
    if len(scene.things) == 1:
        turned = f"the image contains {plain}"
    return [plain, turned, f"there is {verbose}", f"a picture of {_chain(nouns[::-1], backward)}"]


def references(scene: Scene, index: int) -> list[Reference]:
    """Referring expressions that match this object only: shortest attributes first, then relations; may be empty."""
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
    """Non-empty attribute sets, small sets first."""
    names = ("shape", "colour", "texture", "size")
    for count in range(1, len(names) + 1):
        for chosen in combinations(names, count):
            yield Reference(**{name: getattr(thing, name) for name in chosen})


def _chain(nouns: Sequence[str], relations: Sequence[str]) -> str:
    """Nouns joined by relations: "a circle left of a square above a star"."""
    return " ".join([nouns[0], *(f"{relation} {noun}" for relation, noun in zip(relations, nouns[1:], strict=True))])


def _doubled_centre(thing: Thing, axis: int) -> int:
    # Twice the centre is a whole number of units.
    return 2 * thing.box[axis] + thing.side


def questions(scene: Scene, split: Split) -> list[tuple[str, str]]:
    """Question-answer pairs: count, attributes, existence, relations."""
    pairs = [("how many objects are there", NUMBERS[len(scene.things)])]
    for index, thing in enumerate(scene.things):
        named = references(scene, index)
        for attribute, word in (("colour", "color"), ("shape", "shape"), ("size", "size")):
            silent = [ref for ref in named if getattr(ref, attribute) is None]
            # The shortest expression that does not give the answer away.
            if silent:
                pairs.append((f"what {word} is the {silent[0]}", getattr(thing, attribute)))
    present, absent = _pairs(scene, split)
    pairs += [(f"is there {with_article(f'{colour} {shape}')}", "yes") for colour, shape in present[:1]]
    if absent:
        colour, shape = absent[_choice((scene,), "absent", len(absent))]
        pairs.append((f"is there {with_article(f'{colour} {shape}')}", "no"))
    pairs += _relation_questions(scene)
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
        made.append((f"both images contain exactly {NUMBERS[count]} {noun}", left == right == count))
    made += _contents(both, split)
    for side, scene in (("left", first), ("right", second)):
        for a, b in zip(scene.things, scene.things[1:], strict=False):
            relation = main_relation(a, b)
            for claimed in (relation, OPPOSITE[relation]):
                x, y = (Reference(colour=thing.colour, shape=thing.shape) for thing in (a, b))
                sentence = f"in the {side} image {with_article(x.noun)} is {claimed} {with_article(y.noun)}"
                made.append((sentence, _related(scene, x, claimed, y)))
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


@dataclass(frozen=True)
class Fact:
    """One claim of a caption: an attribute of an object ("red") or a relation ("left of")."""

    kind: Attribute | Literal["relation"]
    claim: str
    true: bool


@dataclass(frozen=True)
class CaptionFacts:
    """Claims of a caption in order; empty if it cannot be parsed."""

    understood: bool
    facts: tuple[Fact, ...] = ()

    @property
    def all_true(self) -> bool:
        """True if the caption makes at least one claim and all are true."""
        return bool(self.facts) and all(fact.true for fact in self.facts)


def caption_facts(text: str, scene: Scene) -> CaptionFacts:
    """Parse a caption and check its claims against a scene.

    Accepts chains as produced by `captions`, with any subset of attributes. Nouns are assigned to distinct objects to
    maximise true attributes, then true relations; all claims about an unassigned noun are false.
    """
    words = " ".join(text.lower().split()).removesuffix(".").rstrip()
    parts = _RELATION.split(_OPENING.sub("", words, count=1))
    nouns = [_NOUN.fullmatch(part) for part in parts[::2]]
    if None in nouns:
        return CaptionFacts(understood=False)
    parsed = [dict(zip(ATTRIBUTES, noun.groups(), strict=True)) for noun in nouns if noun is not None]
    relations = [_CANONICAL.get(relation, relation) for relation in parts[1::2]]
    readings = (_judge(parsed, relations, meant) for meant in _assignments(scene.things, len(parsed)))
    return CaptionFacts(understood=True, facts=max(readings, key=_likeness))


def _assignments(things: Sequence[Thing], nouns: int) -> Iterator[tuple[Thing | None, ...]]:
    """Injective assignments of nouns to objects (or of objects to nouns if there are more nouns)."""
    if nouns <= len(things):
        yield from permutations(things, nouns)
        return
    for places in permutations(range(nouns), len(things)):
        taken = dict(zip(places, things, strict=True))
        yield tuple(taken.get(place) for place in range(nouns))


def _judge(
    parsed: Sequence[Mapping[Attribute, str | None]], relations: Sequence[str], meant: Sequence[Thing | None]
) -> tuple[Fact, ...]:
    facts: list[Fact] = []
    for place, (attributes, thing) in enumerate(zip(parsed, meant, strict=True)):
        if place:
            before, relation = meant[place - 1], relations[place - 1]
            true = before is not None and thing is not None and holds(relation, before, thing)
            facts.append(Fact("relation", relation, true))
        for kind in ATTRIBUTES:
            claim = attributes[kind]
            if claim is not None and claim != "object":
                facts.append(Fact(kind, claim, thing is not None and getattr(thing, kind) == claim))
    return tuple(facts)


def _likeness(facts: Sequence[Fact]) -> tuple[int, int]:
    """Sort key of an assignment: true attributes, then true claims."""
    return sum(fact.true for fact in facts if fact.kind != "relation"), sum(fact.true for fact in facts)


def true_shares(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """Fractions of true claims over captions.

    `true_captions`: captions with at least one claim and no false one; `true_colours`, `true_relations`, ...: claims by
    kind.
    """
    if not texts or len(texts) != len(scenes):
        raise DataError(
            f"{len(texts)} captions and {len(scenes)} scenes: give one scene for each caption, at least one"
        )
    results = [caption_facts(text, made) for text, made in zip(texts, scenes, strict=True)]
    claims = [fact for each in results for fact in each.facts]
    shares = {"true_captions": sum(each.all_true for each in results) / len(results)}
    for kind in (*ATTRIBUTES, "relation"):
        of_kind = [fact.true for fact in claims if fact.kind == kind]
        shares[f"true_{kind}s"] = sum(of_kind) / max(1, len(of_kind))
    return shares


def _related(scene: Scene, x: Reference, relation: str, y: Reference) -> bool:
    """True if an object matching x has the relation to one matching y."""
    fitting = product(filter(x.fits, scene.things), filter(y.fits, scene.things))
    return any(one is not other and holds(relation, one, other) for one, other in fitting)


def _relation_questions(scene: Scene) -> Iterator[tuple[str, str]]:
    names = [next((ref for ref in references(scene, i) if ref.other is None and ref.shape), None)
             for i in range(len(scene.things))]  # fmt: skip
    for i, (thing, name) in enumerate(zip(scene.things, names, strict=True)):
        for j, (anchor, other) in enumerate(zip(scene.things, names, strict=True)):
            if i == j or name is None or other is None:
                continue
            relation = main_relation(thing, anchor)
            claimed = relation if _choice((scene,), f"{i} {j}", 2) else OPPOSITE[relation]
            yield f"is the {name} {claimed} the {other}", "yes" if claimed == relation else "no"
            if [k for k, one in enumerate(scene.things) if k != j and holds(relation, one, anchor)] == [i]:
                yield f"what shape is {relation} the {other}", thing.shape


def _contents(both: tuple[Scene, Scene], split: Split) -> Iterator[tuple[str, bool]]:
    shapes = [{thing.shape for thing in scene.things} for scene in both]
    colours = [{thing.colour for thing in scene.things} for scene in both]
    for shape in (_pick(both, "shape", sorted(shapes[0] | shapes[1])), _pick(both, "any shape", SHAPES)):
        yield f"both images contain {with_article(shape)}", all(shape in has for has in shapes)
        yield f"exactly one image contains {with_article(shape)}", sum(shape in has for has in shapes) == 1
    for colour in (_pick(both, "colour", sorted(colours[0] | colours[1])), _pick(both, "any colour", COLOURS)):
        noun = with_article(f"{colour} object")
        yield f"both images contain {noun}", all(colour in has for has in colours)
        yield f"exactly one image contains {noun}", sum(colour in has for has in colours) == 1
    for side, scene in zip(("left", "right"), both, strict=True):
        present, absent = _pairs(scene, split)
        for pairs, truth in ((present, True), (absent, False)):
            if pairs:
                colour, shape = pairs[_choice(both, f"{side} {truth}", len(pairs))]
                yield f"the {side} image contains {with_article(f'{colour} {shape}')}", truth


def _pairs(scene: Scene, split: Split) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Colour-shape pairs in the scene, and pairs of the split that it lacks."""
    present = {(thing.colour, thing.shape) for thing in scene.things}
    return sorted(present), sorted(allowed_pairs(split) - present)


def _pick(scenes: Sequence[Scene], purpose: str, values: Sequence[str]) -> str:
    return values[_choice(scenes, purpose, len(values))]


def _choice(scenes: Sequence[Scene], purpose: str, count: int) -> int:
    """Deterministic pseudo-random number below `count` for these scenes."""
    looks = " ".join(str(full(thing)) + str(thing.box) for scene in scenes for thing in scene.things)
    return zlib.crc32(f"{purpose}: {looks}".encode()) % count
