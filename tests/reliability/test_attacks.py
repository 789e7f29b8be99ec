"""Every attack is repelled by a sentence; `python -m tests.reliability.attacks` prints the table."""

import re
from pathlib import Path

import pytest

from tests.reliability.attacks import Attack, attacks, end_of, public_calls

ATTACKS = attacks()
# A third of them for every run of the tests, from all surfaces.
_EACH = 3


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is no path may be one on a hub, which is not asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_they_are_many() -> None:
    assert len(ATTACKS) // _EACH >= 300
    assert len({(attack.surface, attack.name) for attack in ATTACKS}) == len(ATTACKS)


def test_the_whole_public_api_is_attacked() -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
    names = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", page, flags=re.MULTILINE)}
    # `accelerated` takes the options of `accelerate`; ops check their own arguments; the others take none.
    others = {"accelerated", "errors", "ops", "register_auto_classes", "XFMOutput"}
    assert names - {call.partition(".")[0] for call in public_calls()} == others


@pytest.mark.parametrize(
    "attack",
    [pytest.param(attack, marks=[pytest.mark.slow] if at % _EACH else []) for at, attack in enumerate(ATTACKS)],
    ids=lambda attack: f"{attack.surface}: {attack.name!a}",
)
def test_it_is_repelled(attack: Attack) -> None:
    end, said = end_of(attack)
    assert end == "repelled", said
