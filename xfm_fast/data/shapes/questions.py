"""Questions about a scene with their answers, and statements about two scenes that are true or false.

Nothing mentions a combination that the split may not contain, not even to deny it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

from xfm_fast.data.shapes.language import (
    NUMBERS,
    OPPOSITE,
    Reference,
    full,
    holds,
    main_relation,
    references,
    with_article,
)
from xfm_fast.data.shapes.scenes import COLOURS, SHAPES, SIZES, TEXTURES, Scene, Split, allowed_pairs

ANSWERS = tuple(sorted({*COLOURS, *SHAPES, *SIZES, *TEXTURES, *NUMBERS[1:4], "yes", "no"}))
"""Every answer to a question."""


def questions(scene: Scene, split: Split) -> list[tuple[str, str]]:
    """Questions and their answers: number, attributes, existence, relations."""
    asked = [("how many objects are there", NUMBERS[len(scene.things)])]
    for index, thing in enumerate(scene.things):
        named = references(scene, index)
        for attribute, word in (("colour", "color"), ("shape", "shape"), ("size", "size")):
            silent = [ref for ref in named if getattr(ref, attribute) is None]
            # The shortest expression that does not give the answer away.
            if silent:
                asked.append((f"what {word} is the {silent[0]}", getattr(thing, attribute)))
    present, absent = _pairs(scene, split)
    asked += [(f"is there {with_article(f'{colour} {shape}')}", "yes") for colour, shape in present[:1]]
    if absent:
        colour, shape = absent[_choice((scene,), "absent", len(absent))]
        asked.append((f"is there {with_article(f'{colour} {shape}')}", "no"))
    asked += _relation_questions(scene)
    return asked


def statements(first: Scene, second: Scene, split: Split) -> list[tuple[str, bool]]:
    """Statements about a left image (`first`) and a right image, with their truth."""
    both = (first, second)
    made = [*_counts(both), *_contents(both, split)]
    for side, scene in (("left", first), ("right", second)):
        for a, b in zip(scene.things, scene.things[1:], strict=False):
            relation = main_relation(a, b)
            for claimed in (relation, OPPOSITE[relation]):
                x, y = (Reference(colour=thing.colour, shape=thing.shape) for thing in (a, b))
                sentence = f"in the {side} image {with_article(x.noun)} is {claimed} {with_article(y.noun)}"
                made.append((sentence, _some_related(scene, x, claimed, y)))
    return made


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


def _counts(both: tuple[Scene, Scene]) -> Iterator[tuple[str, bool]]:
    left, right = (len(scene.things) for scene in both)
    yield "the left image contains more objects than the right image", left > right
    yield "the right image contains more objects than the left image", right > left
    for total in (left + right, left + right % 3 + 1):
        yield f"there are {NUMBERS[total]} objects in total", total == left + right
    for count in sorted({left, right}):
        yield f"both images contain exactly {_objects(count)}", left == right == count


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


def _objects(count: int) -> str:
    return f"{NUMBERS[count]} {'object' if count == 1 else 'objects'}"


def _pairs(scene: Scene, split: Split) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs of a colour and a shape that the scene has, and those of the split that it lacks."""
    present = {(thing.colour, thing.shape) for thing in scene.things}
    return sorted(present), sorted(allowed_pairs(split) - present)


def _some_related(scene: Scene, x: Reference, relation: str, y: Reference) -> bool:
    return any(
        a is not b and x.fits(a) and y.fits(b) and holds(relation, a, b) for a in scene.things for b in scene.things
    )


def _pick(scenes: Sequence[Scene], purpose: str, values: Sequence[str]) -> str:
    return values[_choice(scenes, purpose, len(values))]


def _choice(scenes: Sequence[Scene], purpose: str, count: int) -> int:
    """A number below `count`, arbitrary but always the same for these scenes."""
    looks = " ".join(str(full(thing)) + str(thing.box) for scene in scenes for thing in scene.things)
    return zlib.crc32(f"{purpose}: {looks}".encode()) % count
