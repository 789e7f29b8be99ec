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
    caption_facts,
    captions,
    entailments,
    questions,
    references,
    scene,
    statements,
    true_shares,
)
from xfm_fast.data.shapes.scenes import COLOURS, SHAPES
from xfm_fast.errors import DataError
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
        yield from (sentence for index in range(3) for _, sentence, _ in entailments(made, before, index))
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
def test_entailments_follow_or_are_false(split: Split) -> None:
    kinds: dict[str, int] = {}
    for index, (made, other) in enumerate(zip(SCENES[split], SCENES[split][1:], strict=False)):
        pairs = entailments(made, other, index)
        assert [truth for _, _, truth in pairs] in ([], [True, False])
        for caption, statement, truth in pairs:
            described = made if caption in captions(made) else other
            assert caption in captions(described)
            kind, holds = _follows(statement, described)
            kinds[kind] = kinds.get(kind, 0) + 1
            assert truth == holds, (caption, statement)
    assert min(kinds[kind] for kind in ("number", "relation", "object")) > 20


def _follows(statement: str, made: Scene) -> tuple[str, bool]:
    if match := re.fullmatch("there (?:is|are) exactly (.*) objects?", statement):
        return "number", len(made.things) == NUMBERS.index(match[1])
    if match := re.fullmatch("(.*) is (left of|right of|above|below) (.*)", statement):
        first, relation, second = match.groups()
        pairs = [(a, b) for a in made.things for b in made.things if a is not b and _is(a, first) and _is(b, second)]
        return "relation", any(_stands(a, relation, b) for a, b in pairs)
    return "object", bool(_meant(made, statement.removeprefix("there is ")))


def test_a_statement_alone_does_not_say_if_it_follows() -> None:
    truths: dict[str, list[bool]] = {}
    for index in range(3000):
        for _, statement, truth in entailments(scene(2, index), scene(2, index + 1), index):
            truths.setdefault(re.sub("right|above", "left", statement.replace("below", "left")), []).append(truth)
    assert all(2 * sum(found) == len(found) for found in truths.values())


@each_split
def test_all_facts_of_the_captions_are_true(split: Split) -> None:
    texts, scenes = zip(*((text, made) for made in SCENES[split] for text in captions(made)), strict=True)
    for text, made in zip(texts, scenes, strict=True):
        found = caption_facts(text, made)
        assert found.understood, text
        assert len(found.facts) == 5 * len(made.things) - 1
        assert found.all_true, text
    assert set(true_shares(texts, scenes).values()) == {1}


@each_split
def test_a_false_word_is_found(split: Split) -> None:
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above", "over": "under", "under": "over"}
    found = {"colour": 0, "shape": 0, "relation": 0}
    for made in SCENES[split]:
        text = captions(made)[len(found) % 4]
        for kind, words in (("colour", COLOURS), ("shape", SHAPES)):
            present = {getattr(thing, kind) for thing in made.things}
            wrong = next(word for word in words if word not in present)
            spoilt = re.sub("|".join(present), wrong, text, count=1)
            false = [(fact.kind, fact.claim) for fact in caption_facts(spoilt, made).facts if not fact.true]
            assert false == [(kind, wrong)], spoilt
            found[kind] += 1
        if len({thing.looks for thing in made.things}) == len(made.things) > 1:
            spoilt = " ".join(opposite.get(word, word) for word in text.split())
            false = [fact.kind for fact in caption_facts(spoilt, made).facts if not fact.true]
            assert false == ["relation"] * (len(made.things) - 1), spoilt
            found["relation"] += 1
    assert min(found.values()) > 50


def test_facts_of_captions_that_the_world_does_not_write() -> None:
    left, right = (Thing("circle", "red", "small", "plain", x, 20, 16) for x in (2, 44))
    made = Scene((left, right, Thing("star", "blue", "large", "plain", 20, 30, 24)), 200)

    def judged(text: str) -> list[bool] | None:
        found = caption_facts(text, made)
        return [fact.true for fact in found.facts] if found.understood else None

    assert judged("A star.") == [True]
    assert judged("the red circle to the right of a star") == [True, True, True, True]
    # Two circles are there, so either reading of the relation is true; a third one is not there.
    assert judged("a circle right of a circle") == judged("a circle left of a circle") == [True] * 3
    assert judged("a circle left of a circle left of a circle") != [True] * 5
    crowd = caption_facts("a star left of a star left of a star left of a star", made).facts
    assert sorted(fact.true for fact in crowd if fact.kind == "shape") == [False, False, False, True]
    for text in ("", "a", "a red", "circle", "a circle left of", "a red blue circle", "a plain red circle", "a dog"):
        assert judged(text) is None
    assert judged("there is an object") == []
    assert not caption_facts("there is an object", made).all_true
    shares = true_shares(["a star", "a dog", "an object", "a red star"], [made] * 4)
    assert shares["true_captions"] == 0.25
    assert (shares["true_shapes"], shares["true_colours"], shares["true_relations"]) == (0.5, 1, 0)
    with pytest.raises(DataError):
        true_shares(["a star"], [])


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
