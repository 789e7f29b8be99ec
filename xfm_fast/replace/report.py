"""What `accelerate` did to a model, as a table, and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

from torch import nn

from xfm_fast.replace.swapping import is_fused, restore


@dataclass(frozen=True)
class Entry:
    """One module that a rule recognised.

    Attributes:
        path: its qualified name in the model; empty for the model itself.
        class_name: its own class.
        fused: name of the fused form.
        gain: what the fused form saves.
        reason: why it was left as it was; None if it was replaced.
    """

    path: str
    class_name: str
    fused: str
    gain: str
    reason: str | None = None


@dataclass
class Report:
    """The modules of a model that were recognised: what was replaced, what was not and why. Printing it gives a table.

    Attributes:
        entries: in the order of `model.named_modules()`.
        differences: largest difference of each output that `verify` compared, relative to the output's largest value.
    """

    entries: list[Entry]
    differences: dict[str, float] = field(default_factory=dict)
    _modules: list[nn.Module] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.reason is None]

    @property
    def left(self) -> list[Entry]:
        """Recognised and not replaced."""
        return [entry for entry in self.entries if entry.reason is not None]

    def revert(self) -> None:
        """Give every replaced module its own forward back: the same objects, as they were. Twice does no harm."""
        for module in self._modules:
            if is_fused(module):
                restore(module)

    def __str__(self) -> str:
        rows = [("module", "class", "replaced by", "why, or what it saves")]
        for (_, class_name, fused, gain, reason), alike in groupby(sorted(self._grouped()), key=lambda row: row[:5]):
            paths = [row[5] for row in alike]
            place = paths[0] or "(the model)"
            if len(paths) > 1:
                place += f" and {len(paths) - 1} alike"
            rows.append((place, class_name, "left alone" if reason else fused, reason or gain))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("─" * width for width in widths))
        lines.append(f"{len(self.replaced)} modules replaced, {len(self.left)} left alone")
        lines += [f"verified: {name or 'output'} differs by {value:.1e}" for name, value in self.differences.items()]
        return "\n".join(lines)

    def _grouped(self) -> Iterator[tuple[int, str, str, str, str, str]]:
        first: dict[tuple[str, str, str | None], int] = {}
        for place, entry in enumerate(self.entries):
            order = first.setdefault((entry.class_name, entry.fused, entry.reason), place)
            yield order, entry.class_name, entry.fused, entry.gain, entry.reason or "", entry.path
