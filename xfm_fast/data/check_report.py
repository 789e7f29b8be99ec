"""What a check of data files found, in numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Problem:
    """A broken row."""

    file: str
    row: int | str
    reason: str


@dataclass
class FileCount:
    """Rows of a file, and how many of them are broken."""

    file: str
    rows: int = 0
    broken: int = 0


@dataclass
class Report:
    """What `check` found.

    Attributes:
        task: what the files were checked for.
        files: counts of each.
        problems: the first broken rows.
        duplicates: rows that repeat an earlier one to the byte.
        texts: how many texts there are.
        words: histogram of their words after cleaning, before cutting.
        tokens: histogram of their ids with `<s>` and `</s>`, where there was a tokenizer; before cutting.
        cut: texts that are longer than the task reads.
        images: how many images were decoded.
        sizes: histogram of (width, height).
        formats: histogram of their formats.
        regions: histogram of regions in an image.
        unusable_regions: regions that would be skipped.
        batch_bytes: memory of one batch in float32.
        batch_size: rows of that batch.
        seconds_per_item: of one worker, measured on some of the rows.
        tolerate_bad: the limit that `ok` is judged by.
    """

    task: str
    files: list[FileCount] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    duplicates: int = 0
    texts: int = 0
    words: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    cut: int = 0
    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    regions: Counter[int] = field(default_factory=Counter)
    unusable_regions: int = 0
    batch_bytes: int = 0
    batch_size: int = 0
    seconds_per_item: float | None = None
    tolerate_bad: float = 0.01

    @property
    def rows(self) -> int:
        return sum(each.rows for each in self.files)

    @property
    def broken(self) -> int:
        return sum(each.broken for each in self.files)

    @property
    def over_limit(self) -> list[FileCount]:
        """Files that would stop a run: as in `Quarantine`, one broken row alone does not."""
        return [each for each in self.files if each.broken > max(1, self.tolerate_bad * each.rows)]

    @property
    def ok(self) -> bool:
        """Whether training on these files would run through."""
        return not self.over_limit and self.broken < self.rows

    @property
    def hours_per_epoch(self) -> float | None:
        """Of one worker."""
        return None if self.seconds_per_item is None else self.seconds_per_item * (self.rows - self.broken) / 3600

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        widths = [width for (width, _), times in self.sizes.items() for _ in range(times)]
        heights = [height for (_, height), times in self.sizes.items() for _ in range(times)]
        return {
            "task": self.task,
            "ok": self.ok,
            "rows": self.rows,
            "broken": self.broken,
            "duplicates": self.duplicates,
            "tolerate_bad": self.tolerate_bad,
            "files": [vars(each) for each in self.files],
            "problems": [vars(each) for each in self.problems],
            "texts": {
                "count": self.texts,
                "cut": self.cut,
                "words": dict(sorted(self.words.items())),
                "tokens": dict(sorted(self.tokens.items())),
            },
            "images": {
                "count": self.images,
                "formats": dict(self.formats),
                "width": _spread(widths),
                "height": _spread(heights),
            },
            "regions": {"per_image": dict(sorted(self.regions.items())), "unusable": self.unusable_regions},
            "estimates": {
                "batch_size": self.batch_size,
                "batch_bytes": self.batch_bytes,
                "items_per_second_and_worker": None if not self.seconds_per_item else 1 / self.seconds_per_item,
                "hours_per_epoch_and_worker": self.hours_per_epoch,
            },
        }


def _spread(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    low, middle, high = np.percentile(values, [0, 50, 100]).tolist()
    return {"least": low, "median": middle, "most": high}
