"""Every attack is repelled by a sentence; `python -m tools.attacks` prints the table."""

import re
from pathlib import Path

import pytest

from tools.attacks import attacks, end_of, public_calls

ATTACKS = attacks()
SURFACES = dict.fromkeys(attack.surface for attack in ATTACKS)
# The share of the attacks in every run of the tests: one out of so many.
_SHARE = 6


def test_the_whole_public_api_is_attacked() -> None:
    assert len({(attack.surface, attack.name) for attack in ATTACKS}) == len(ATTACKS) > 1000
    page = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
    names = {
        name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", page, flags=re.MULTILINE)
    }
    # `accelerated` takes the options of `accelerate`; ops check their own arguments; `emulated` stands without the
    # package and has errors of its own; the others take none.
    others = {"accelerated", "emulated", "errors", "ops", "register_auto_classes", "XFMOutput"}
    assert names - {call.partition(".")[0] for call in public_calls()} == others


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize(
    "first", [0, *(pytest.param(at, marks=pytest.mark.slow) for at in range(1, _SHARE))]
)
def test_attacks_are_repelled(monkeypatch: pytest.MonkeyPatch, surface: str, first: int) -> None:
    # A name that is no path may be one on a hub, which is not asked.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chosen = [attack for attack in ATTACKS if attack.surface == surface][first::_SHARE]
    ends = {attack.name: end_of(attack) for attack in chosen}
    assert not {name: end for name, end in ends.items() if end[0] != "repelled"}
