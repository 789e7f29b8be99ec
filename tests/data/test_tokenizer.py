"""Caption cleaning against official examples, and the byte-level vocabulary."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.conftest import load_json
from xfm_fast.config import XFMConfig
from xfm_fast.errors import DataError
from xfm_fast.tokenizer import CaptionTokenizer, pre_caption, pre_question

TEXTS = ["a cat on a mat", "a dog in the fog", "the cat and the dog", "größe ☕ and naïve words"]


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train_on_texts(TEXTS, 512)


@pytest.mark.parametrize("clean", [pre_caption, pre_question])
def test_cleaning_reproduces_the_official_examples(clean: Callable[[str], str]) -> None:
    examples = load_json("metrics/metrics")[f"{clean.__name__}_max30"]
    assert examples
    assert [clean(example["raw"]) for example in examples] == [
        example["out"] for example in examples
    ]


@pytest.fixture(scope="module")
def roberta(tokenizer: CaptionTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Load the tokenizer of transformers with the same vocabulary."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer.save(folder / "tokenizer.json")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8"
    )
    return transformers.RobertaTokenizer.from_pretrained(folder)


@settings(deadline=None)
@given(*[st.text("abcdeog ñ☕", max_size=40)] * 2, st.integers(3, 12))
def test_pairs_are_encoded_as_transformers_does(
    tokenizer: CaptionTokenizer, roberta: Any, first: str, second: str, half: int
) -> None:
    """With an even length, where its own implementations agree which text keeps the odd token."""
    assume(first or second)
    (expected,) = roberta([first], [second], max_length=2 * half, truncation=True)["input_ids"]
    assert tokenizer.encode_pair(first, second, 2 * half) == expected


@pytest.mark.parametrize("prompt", ["a picture of:  ", ""])
@given(caption=st.text(st.characters(codec="utf-8"), min_size=1, max_size=30))
def test_a_prompt_begins_its_text(tokenizer: CaptionTokenizer, prompt: str, caption: str) -> None:
    try:
        caption = pre_caption(caption)
    except DataError:
        assume(False)
    prompt_ids = tokenizer.encode_prompt(prompt)
    complete, _ = tokenizer.encode([f"{prompt.strip()} {caption}".strip()], 200)
    assert complete[0, : len(prompt_ids)].tolist() == prompt_ids.tolist()
    assert tokenizer.decode(prompt_ids.tolist()) == prompt.rstrip()


def test_encoding_wraps_cuts_and_pads(tokenizer: CaptionTokenizer) -> None:
    ids, mask = tokenizer.encode(["a cat on a mat", "the dog"], 10)
    assert ids.shape == mask.shape == (2, 10)
    assert ids[:, 0].tolist() == [0, 0]
    for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        assert row[length - 1] == 2
        assert row[length:] == [1] * (10 - length)
    assert tokenizer.decode(ids[0].tolist()) == "a cat on a mat"
    short, short_mask = tokenizer.encode(["a cat on a mat"], 4)
    assert short[0].tolist() == [*ids[0, :3].tolist(), 2]
    assert short_mask.all()
    longest, _ = tokenizer.encode(["a cat on a mat", "the dog"], 10, pad_to_longest=True)
    assert longest.shape[1] == mask.sum(1).max()


@given(st.lists(st.text("abxyz'é", min_size=1), min_size=1, max_size=6))
def test_words_start_where_white_space_is(words: list[str]) -> None:
    tokenizer = CaptionTokenizer.train_on_texts(TEXTS, 300)
    (ids,) = tokenizer.encode_ids([" ".join(words)], 10_000)
    starts = tokenizer.word_starts(ids)
    assert len(starts) == len(ids)
    positions = [position for position, start in enumerate(starts) if start]
    assert positions[:2] == [0, 1]
    assert positions[-1] == len(ids) - 1
    pieces = [
        tokenizer.decode(ids[a:b]) for a, b in zip(positions[1:-1], positions[2:], strict=True)
    ]
    assert [piece.strip(" ") for piece in pieces] == words


@given(st.text(min_size=1))
def test_any_text_survives_the_round_trip(text: str) -> None:
    tokenizer = CaptionTokenizer.train_on_texts(TEXTS, 300)
    if any(special in text for special in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")):
        return
    ids, mask = tokenizer.encode([text], 10_000)
    assert tokenizer.decode(ids[0, : int(mask.sum())].tolist()) == text


@pytest.mark.parametrize(
    "change", [{"vocab": {}}, {"vocab": {"<s>": 0, "<pad>": 1, "</s>": 2**32 - 1}, "merges": []}]
)
def test_false_vocabularies_are_refused(
    tmp_path: Path, tokenizer: CaptionTokenizer, change: dict[str, Any]
) -> None:
    content = json.loads(tokenizer.to_json())
    content["model"] |= {"merges": []} | change
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"<s>|ids"):
        CaptionTokenizer.from_files(tmp_path)


def test_a_panic_of_the_library_is_an_error(tmp_path: Path, tokenizer: CaptionTokenizer) -> None:
    content = json.loads(tokenizer.to_json())
    content["model"]["continuing_subword_prefix"] = "²"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        CaptionTokenizer.from_files(tmp_path)


def test_bad_requests_are_named(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    assert pre_question(" What's this, <person>?") == " what s this  <person>"
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1
    with pytest.raises(DataError, match=r"'a \\ud800'.*surrogate"):
        tokenizer.encode(["a \ud800"])
    with pytest.raises(DataError, match="max_tokens=5"):
        tokenizer.encode_pair("a", "b", 5)
    with pytest.raises(DataError, match="entries"):
        tokenizer.check(XFMConfig.preset("tiny", vocab_size=100))
    with pytest.raises(DataError, match="tokenizer"):
        CaptionTokenizer.from_files(tmp_path)
