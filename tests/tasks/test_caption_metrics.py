"""Metrics of captions: against numbers of the COCO caption evaluation, and against it where it is
installed.
"""

from __future__ import annotations

import pytest

from xfm_fast.tasks.captioning import caption_metrics, words

REFERENCES = {
    1: ["A dog isn't on the red bench.", "the dog sits beside a bench (red)"],
    2: [
        "two men ride horses on a beach",
        "Men on horses, by the sea; at 7:30.",
        "riders at the beach",
    ],
    3: ["a woman's red t-shirt"],
    4: ["a plate of pizza with 50% cheese", "pizza on a plate"],
    5: ["a cat"],
}
CANDIDATES = {
    1: "a dog on a red bench",
    2: "men ride horses on the beach the beach the beach",
    3: "a red bus",
    4: "pizza on a plate",
    5: "",
}
# pycocoevalcap 1.2 with its own tokeniser.
WANTED = {
    "BLEU-1": 0.6211430213470861,
    "BLEU-2": 0.4972508357917712,
    "BLEU-3": 0.381238512953999,
    "BLEU-4": 0.30333640401441786,
    "ROUGE-L": 0.5564696251256056,
    "CIDEr-D": 1.859578208764272,
}


def test_equal_to_the_coco_evaluation() -> None:
    assert caption_metrics(CANDIDATES, REFERENCES) == pytest.approx(WANTED, rel=1e-12)
    assert caption_metrics(
        {str(i): c for i, c in CANDIDATES.items()}, {str(i): r for i, r in REFERENCES.items()}
    ) == (caption_metrics(CANDIDATES, REFERENCES))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog isn't on the bench.", "a dog is n't on the bench"),
        ("women's t-shirts, 50% off!", "women 's t-shirts 50 % off"),
        ("Mr. X at 7:30 -- in the U.S.", "mr. x at 7:30 in the u.s."),
        ("a (red) sign: “STOP”", "a -lrb- red -rrb- sign stop"),
        ("they’re here…", "they 're here"),
        ("...", ""),
        # As the Java tokeniser of pycocoevalcap 1.2 has them.
        (
            "He cannot stop; gonna gimme 1,000 for -5 or .5?",
            "he can not stop gon na gim me 1,000 for -5 or .5",
        ),
        ("wow!! really?! yes!", "wow !! really ?! yes"),
        ("a 5'2 man & a 6'4\" one, in the '80s", "a 5 2 man & a 6 4 one in the '80s"),
        ("AT&T ads w/ 9 apples etc. on 5th ave.", "at & t ads w / 9 apples etc. on 5th ave."),
        ("No. 9 of the U.S.A; no. mr.x", "no. 9 of the u.s.a no mr.x"),
        ("a cat...and a dog, 25° and ½ £", "a cat and a dog 25 ° and 1/2 #"),
        (
            "@home #1 #fun <b> http://x.com a@b.com a_b",
            "@home # 1 #fun <b> http://x.com a@b.com a_b",
        ),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert words(text) == expected.split()
