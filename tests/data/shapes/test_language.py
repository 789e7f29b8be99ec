"""What the shapes world says is true. A second implementation reads the sentences and looks for itself."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from xfm_fast.data.shapes import (
    ANSWERS,
    HELD_OUT,
    SPLITS,
    VOCABULARY,
    Scene,
    Split,
    Thing,
    captions,
    questions,
    references,
    scene,
    statements,
)
from xfm_fast.data.shapes.scenes import COLOURS, SHAPES
from xfm_fast.tokenizer import pre_caption

SCENES = {split: [scene(11, index, split) for index in range(150)] for split in SPLITS}
NUMBERS = ["no", "one", "two", "three", "four", "five", "six"]
CANON = {"to the left of": "left of", "to the right of": "right of", "over": "above", "under": "below"}
RELATION = re.compile(r" ((?:to the )?(?:left|right) of|above|over|below|under) ")
each_split = pytest.mark.parametrize("split", SPLITS)


def _is(thing: Thing, noun: str) -> bool:
    """Whether every word of "small red circle" is true of the object; "object" is true of all."""
    words = [word for word in noun.split() if word not in ("a", "an", "the", "object")]
    return all(word in (thing.size, thing.colour, thing.texture, thing.shape) for word in words)


def _stands(a: Thing, relation: str, b: Thing) -> bool:
    (ax, ay), (bx, by) = ((thing.x + thing.side / 2, thing.y + thing.side / 2) for thing in (a, b))
    distance = {"left of": bx - ax, "right of": ax - bx, "above": by - ay, "below": ay - by}[
        CANON.get(relation, relation)
    ]
    return distance >= 8


def _meant(made: Scene, expression: str) -> list[Thing]:
    noun, *rest = RELATION.split(expression, maxsplit=1)
    things = [thing for thing in made.things if _is(thing, noun)]
    if not rest:
        return things
    relation, anchor = rest
    anchors = _meant(made, anchor)
    assert len(anchors) == 1, expression
    return [thing for thing in things if thing is not anchors[0] and _stands(thing, relation, anchors[0])]


def _all_texts(split: Split) -> Iterator[str]:
    before = scene(11, 999, split)
    for made in SCENES[split]:
        yield from captions(made)
        for index in range(len(made.things)):
            yield from map(str, references(made, index))
        yield from (question for question, _ in questions(made, split))
        yield from (sentence for sentence, _ in statements(before, made, split))
        before = made


@each_split
def test_captions_name_all_objects_in_their_relations(split: Split) -> None:
    for made in SCENES[split]:
        said = captions(made)
        assert len(said) == 4
        # A palindrome reads the same from both ends.
        assert len(set(said)) >= 3
        for caption in said:
            body = re.sub("^(the image contains|there is|a picture of) ", "", caption)
            parts = RELATION.split(body)
            nouns, relations = parts[::2], parts[1::2]
            # Between twins the names alone do not say which end the caption starts from.
            assert any(_describes(things, nouns, relations) for things in (made.things, made.things[::-1])), caption


def _describes(things: tuple[Thing, ...], nouns: list[str], relations: list[str]) -> bool:
    return _names(things, nouns) and all(
        _stands(a, relation, b) for a, relation, b in zip(things, relations, things[1:], strict=False)
    )


def _names(things: tuple[Thing, ...], nouns: list[str]) -> bool:
    complete = [(f"{t.size} {t.colour} {t.texture} {t.shape}", noun) for t, noun in zip(things, nouns, strict=True)]
    return all(noun in (f"a {text}", f"an {text}") for text, noun in complete)


@each_split
def test_captions_survive_the_official_cleaning(split: Split) -> None:
    for made in SCENES[split]:
        assert [pre_caption(caption) for caption in captions(made)] == captions(made)


@each_split
def test_references_mean_one_object(split: Split) -> None:
    relational = 0
    for made in SCENES[split]:
        for index, thing in enumerate(made.things):
            named = [str(reference) for reference in references(made, index)]
            assert len(named) == len(set(named))
            for expression in named:
                assert _meant(made, expression) == [thing], expression
                relational += bool(RELATION.search(expression))
    assert relational > 100


def test_only_twins_without_a_third_object_have_no_name() -> None:
    for made in SCENES["train"]:
        for index, thing in enumerate(made.things):
            twins = [other for other in made.things if other is not thing and other.looks == thing.looks]
            if not references(made, index):
                assert twins
            if len(made.things) == 2 and twins:
                assert not references(made, index)


def test_twins_are_told_apart_by_a_third_object() -> None:
    left, right = (Thing("circle", "red", "small", "plain", x, 20, 14) for x in (2, 46))
    made = Scene((left, Thing("star", "blue", "small", "plain", 24, 20, 14), right), 200)
    assert [str(reference) for reference in references(made, 0)] == [
        "circle left of the star",
        "red circle left of the star",
    ]


@each_split
def test_answers_are_right(split: Split) -> None:
    kinds: dict[str, set[str]] = {}
    for made in SCENES[split]:
        for question, answer in questions(made, split):
            assert answer in ANSWERS
            kinds.setdefault(" ".join(question.split()[:2]), set()).add(answer)
            assert answer == _answer(made, question), question
    assert kinds["is there"] == kinds["is the"] == {"yes", "no"}
    assert kinds["how many"] == {"one", "two", "three"}
    assert kinds["what shape"] == set(SHAPES)


def _answer(made: Scene, question: str) -> str:
    if question == "how many objects are there":
        return NUMBERS[len(made.things)]
    if match := re.fullmatch("is there (?:a|an) (.*)", question):
        return "yes" if _meant(made, match[1]) else "no"
    if match := re.fullmatch("what (color|size|shape) is the (.*)", question):
        (thing,) = _meant(made, match[2])
        return {"color": thing.colour, "size": thing.size, "shape": thing.shape}[match[1]]
    if match := re.fullmatch("what shape is (left of|right of|above|below) the (.*)", question):
        (anchor,) = _meant(made, match[2])
        (thing,) = [one for one in made.things if one is not anchor and _stands(one, match[1], anchor)]
        return thing.shape
    match = re.fullmatch("is the (.*) (left of|right of|above|below) the (.*)", question)
    assert match, question
    (a,), (b,) = _meant(made, match[1]), _meant(made, match[3])
    return "yes" if _stands(a, match[2], b) else "no"


@each_split
def test_statements_are_as_true_as_they_claim(split: Split) -> None:
    labels = []
    for left, right in zip(SCENES[split], SCENES[split][1:], strict=False):
        made = statements(left, right, split)
        for sentence, truth in made:
            assert truth == _true(sentence, left, right), sentence
        labels += [truth for _, truth in made]
        assert {truth for _, truth in made} == {True, False}
    assert 0.25 < sum(labels) / len(labels) < 0.75


def _true(sentence: str, left: Scene, right: Scene) -> bool:
    sides = {"left": left, "right": right}
    if match := re.fullmatch("the (left|right) image contains more objects than the (left|right) image", sentence):
        return len(sides[match[1]].things) > len(sides[match[2]].things)
    if match := re.fullmatch("there are (.*) objects in total", sentence):
        return len(left.things) + len(right.things) == NUMBERS.index(match[1])
    if match := re.fullmatch("both images contain exactly (.*) objects?", sentence):
        return len(left.things) == len(right.things) == NUMBERS.index(match[1])
    if match := re.fullmatch("in the (left|right) image (.*) is (left of|right of|above|below) (.*)", sentence):
        things = sides[match[1]].things
        return any(
            a is not b and _is(a, match[2]) and _is(b, match[4]) and _stands(a, match[3], b)
            for a in things
            for b in things
        )
    quantities = "both images contain|exactly one image contains|the (left|right) image contains"
    match = re.fullmatch(f"({quantities}) (.*)", sentence)
    assert match, sentence
    has = {side: any(_is(thing, match[3]) for thing in made.things) for side, made in sides.items()}
    if match[2]:
        return has[match[2]]
    return all(has.values()) if match[1].startswith("both") else sum(has.values()) == 1


@each_split
def test_no_text_mentions_a_combination_of_another_split(split: Split) -> None:
    foreign = set().union(*(HELD_OUT[other] for other in SPLITS if other != split))
    # A colour and the shape of one noun are at most a texture apart.
    noun = re.compile(rf"({'|'.join(COLOURS)})(?: (?:plain|striped|dotted))? ({'|'.join(SHAPES)})")
    mentioned = {pair for text in _all_texts(split) for pair in noun.findall(text)}
    assert len(mentioned) > 25
    assert not mentioned & foreign


def test_the_vocabulary_is_exactly_what_is_said() -> None:
    words = {word for split in SPLITS for text in _all_texts(split) for word in text.split()}
    assert words == set(VOCABULARY)
