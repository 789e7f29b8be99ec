"""Profiles of engines: their text, what they say about a graph, and which requests they admit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfm_fast.errors import InputError
from xfm_fast.export.engines.profiles import (
    DEFAULT_PROFILES,
    AxisRange,
    ShapeProfile,
    graph_profiles,
    parse_profile,
    parse_profiles,
)
from xfm_fast.export.manifest import AxisRecord, GraphRecord, TensorRecord

TEXT = GraphRecord(
    name="text",
    file="text.engine",
    files=["text.engine"],
    inputs=[
        TensorRecord(name="input_ids", dtype="int64", dims=["batch", "length"]),
        TensorRecord(name="attention_mask", dtype="int64", dims=["batch", "length"]),
    ],
    outputs=[TensorRecord(name="text_feature", dtype="float16", dims=["batch", 32])],
    axes={"batch": AxisRecord(least=1, most=None), "length": AxisRecord(least=1, most=64)},
    build_seconds=0,
)


def shapes(*shape: int) -> dict[str, tuple[int, ...]]:
    return {"input_ids": shape, "attention_mask": shape}


def test_the_text_of_a_profile() -> None:
    profile = parse_profile("latency:batch=1, texts=1..8..64,length=1..40")
    assert profile.name == "latency"
    assert profile.axes == {
        "batch": AxisRange(1, 1, 1),
        "texts": AxisRange(1, 8, 64),
        "length": AxisRange(1, 40, 40),  # two numbers: tuned for the greatest
    }


sizes = st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(sorted).map(lambda three: AxisRange(*three))


@given(st.dictionaries(st.sampled_from(["batch", "texts", "length"]), sizes, min_size=1))
def test_text_and_profile_say_the_same(axes: dict[str, AxisRange]) -> None:
    profile = ShapeProfile("bulk", axes)
    assert parse_profile(str(profile)) == profile


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch=1", "no name"),
        (":batch=1", "no name"),
        ("a:", "names no axis"),
        ("a:height=1", "axis 'height'; the axes are batch, texts, length"),
        ("a:batch=1,batch=2", "twice"),
        ("a:batch=", "'' is no range"),
        ("a:batch", "'' is no range"),
        ("a:batch=1..2..3..4", "no range"),
        ("a:batch=1-8", "no range"),
        ("a:batch=-1", "no range"),
        ("a:batch=0..8", "begins at 0"),
        ("a:batch=9..8", "empty"),
        ("a:batch=2..1..8", "tuned for 1, which lies outside 2 to 8"),
        ("a:batch=1..9..8", "tuned for 9, which lies outside 1 to 8"),
    ],
)
def test_what_is_no_profile_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_profile(text)


def test_profiles_have_names_of_their_own() -> None:
    assert parse_profiles([]) == DEFAULT_PROFILES
    packed = parse_profiles([], packed=True)
    assert [profile.name for profile in packed] == [profile.name for profile in DEFAULT_PROFILES]
    assert all(profile.axes["rows"].least == 1 for profile in packed)
    assert parse_profiles(["a:rows=1..2..4"], packed=True)[0].axes == {"rows": AxisRange(1, 2, 4)}
    with pytest.raises(InputError, match="'a'"):
        parse_profiles(["a:batch=1", "a:batch=2"])


def test_shapes_of_a_graph() -> None:
    latency, bulk = graph_profiles(
        TEXT, parse_profiles(["latency:batch=1,length=1..16..40", "bulk:batch=1..8..64,length=2..40"])
    )
    assert latency.least == {"input_ids": [1, 1], "attention_mask": [1, 1]}
    assert latency.best["input_ids"] == [1, 16]
    assert latency.most["input_ids"] == [1, 40]
    assert (bulk.least["input_ids"], bulk.best["input_ids"], bulk.most["input_ids"]) == ([1, 2], [8, 40], [64, 40])


def test_profiles_that_are_alike_for_a_graph_are_one() -> None:
    texts = ["few:batch=1,texts=1..8,length=1..40", "many:batch=1,texts=1..64,length=1..40"]
    assert [profile.name for profile in graph_profiles(TEXT, parse_profiles(texts))] == ["few"]


def test_a_graph_of_fixed_shapes_has_no_profiles() -> None:
    assert graph_profiles(TEXT.model_copy(update={"axes": {}}), DEFAULT_PROFILES) == []


def test_a_profile_must_fit_its_graph() -> None:
    with pytest.raises(InputError, match="'length'"):
        graph_profiles(TEXT, [parse_profile("a:batch=1")])
    with pytest.raises(InputError, match=r"length=1\.\.65\.\.65"):
        graph_profiles(TEXT, [parse_profile("a:batch=1,length=1..65")])
