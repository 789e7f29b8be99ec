"""Every attack is repelled by a sentence; `python -m tests.reliability.attacks` prints the table."""

import pytest

from tests.reliability.attacks import Attack, attacks, end_of

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


@pytest.mark.parametrize(
    "attack",
    [pytest.param(attack, marks=[pytest.mark.slow] if at % _EACH else []) for at, attack in enumerate(ATTACKS)],
    ids=lambda attack: f"{attack.surface}: {attack.name!a}",
)
def test_it_is_repelled(attack: Attack) -> None:
    end, said = end_of(attack)
    assert end == "repelled", said
