"""Profiles of engines: their text, the shapes of a graph, and refused ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xfm_fast.errors import InputError
from xfm_fast.export.manifest import AxisRecord, GraphRecord, TensorRecord
from xfm_fast.export.slots import (
    DEFAULT_PROFILES,
    PACKED_PROFILES,
    AxisRange,
    ShapeProfile,
    graph_profiles,
    parse_profile,
    parse_profiles,
)

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

ranges = st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(sorted).map(lambda three: AxisRange(*three))


@given(st.dictionaries(st.sampled_from(["batch", "texts", "length"]), ranges, min_size=1))
def test_text_and_profile_agree(axes: dict[str, AxisRange]) -> None:
    profile = ShapeProfile("bulk", axes)
    assert parse_profile(str(profile)) == profile


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("batch=1", "no name"),
        ("a:", "no axis"),
        ("a:height=1", "'height'"),
        ("a:batch=1,batch=2", "twice"),
        ("a:batch", "''"),
        ("a:batch=1-8", "1-8"),
        ("a:batch=0..8", r"0\.\.8"),
        ("a:batch=9..8", r"9\.\.8"),
        ("a:batch=1..9..8", r"1\.\.9\.\.8"),
    ],
)
def test_bad_profiles_are_refused(text: str, named: str) -> None:
    with pytest.raises(InputError, match=named):
        parse_profile(text)


def test_shapes_of_a_graph() -> None:
    texts = ["latency:batch=1, length=1..16..40", "bulk:batch=1..8..64,length=2..40", "again:batch=1,length=1..16..40"]
    latency, bulk = graph_profiles(TEXT, parse_profiles(texts))
    assert latency.least == {"input_ids": [1, 1], "attention_mask": [1, 1]}
    assert (latency.best["input_ids"], latency.most["input_ids"]) == ([1, 16], [1, 40])
    # Two numbers: tuned for the greatest.
    assert (bulk.least["input_ids"], bulk.best["input_ids"], bulk.most["input_ids"]) == ([1, 2], [8, 40], [64, 40])
    assert graph_profiles(TEXT.model_copy(update={"axes": {}}), DEFAULT_PROFILES) == []
    assert parse_profiles([]) == DEFAULT_PROFILES
    assert parse_profiles([], packed=True) == PACKED_PROFILES
    for profile, named in (("a:batch=1", "'length'"), ("a:batch=1,length=1..65", r"length=1\.\.65\.\.65")):
        with pytest.raises(InputError, match=named):
            graph_profiles(TEXT, [parse_profile(profile)])
    with pytest.raises(InputError, match="'a'"):
        parse_profiles(["a:batch=1", "a:batch=2"])
