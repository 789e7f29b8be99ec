"""The cards that the model of time knows, and its constants, in `cards.json` with their date and source."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ..files import write_whole

CARDS = Path(__file__).with_name("cards.json")

# Pipes whose occupation by one instruction of a warp the file gives, and events whose latency it gives.
CYCLES = ("fma", "imad", "alu", "special", "shuffle", "shared", "global", "uniform", "hmma")
LATENCIES = ("hmma", "special", "shuffle", "shared", "load", "copy", "constant", "barrier", "other")


@dataclass(frozen=True)
class Card:
    """One card of an architecture.

    Attributes:
        date, source: when and from what the constants were taken; `fitted from …` where counters of a card were read.
        multiprocessors, clock_ghz, memory_bytes_per_s: of the whole card.
        overhead_us: of a launch, beyond what its programs take.
        cycles: for how long an instruction of one warp keeps a pipe of its partition (a quarter of a multiprocessor);
            `hmma` is that of m16n8k16.
        latency: cycles from the issue of an instruction to its result.
        wgmma_products, tcgen05_products: multiplications with additions a cycle, of half precision, by Hopper's tensor
            core of a partition and Blackwell's of a multiprocessor; 0 where there is none.
        shared_bytes: that shared memory moves a cycle in one multiprocessor.
        l2_bytes: that the second-level cache gives one multiprocessor a cycle while all of them read.
    """

    card: str
    date: str
    source: str
    multiprocessors: int
    clock_ghz: float
    memory_bytes_per_s: float
    overhead_us: float
    cycles: Mapping[str, float]
    latency: Mapping[str, float]
    wgmma_products: float
    tcgen05_products: float
    shared_bytes: float
    l2_bytes: float

    @property
    def fitted(self) -> bool:
        """True if the constants were fitted to measurements."""
        return self.source.startswith("fitted")


def read(path: Path = CARDS) -> dict[int, Card]:
    """Architecture → card.

    Raises:
        ValueError: the file is damaged, or lacks a constant.
    """
    try:
        cards = {int(arch): Card(**fields) for arch, fields in json.loads(path.read_text()).items()}
        for card in cards.values():
            numbers = [card.multiprocessors, card.clock_ghz, card.memory_bytes_per_s, card.shared_bytes, card.l2_bytes]
            numbers += [card.cycles[name] for name in CYCLES] + [card.latency[name] for name in LATENCIES]
            if not all(math.isfinite(number) and number > 0 for number in numbers):
                raise ValueError(f"a constant of {card.card} is not a positive number")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no file of cards ({error!r}); restore it from the project's repository") from error
    return cards


@cache
def _shipped() -> dict[int, Card]:
    return read()


def card(arch: int) -> Card:
    """The card that stands for an architecture: its own, or that of the nearest older one that has one."""
    known = _shipped()
    return known[max((a for a in known if a <= arch), default=min(known))]


def write(cards: Mapping[int, Card], path: Path = CARDS) -> None:
    """Writes the file anew, whole or not at all."""
    entries = []
    for arch, entry in sorted(cards.items()):
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in asdict(entry).items())
        entries.append(f' "{arch}": {{\n{lines}\n }}')
    write_whole(path, ("{\n" + ",\n".join(entries) + "\n}\n").encode())
