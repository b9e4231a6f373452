"""What grows in the soak: samples of memory, descriptors and leases, as a table, and what they mean.

Decides what counts as growth. Knows no program. Invariant: a process that was started anew counts from then on only where nobody judges it.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

JUDGED_FROM_S = 1000.0
"""In a shorter run the most that was ever in flight still rises, and with it what the allocators keep: growth is shown, not judged."""
MEMORY_SHARE_MAX, MEMORY_BYTES_MAX = 0.05, 8_000_000
DESCRIPTORS_MAX = 16
"""What in flight differs by from sample to sample."""


@dataclass(frozen=True)
class Sample:
    """One moment. `values` by column; what was not there is None."""

    at_s: float
    values: Mapping[str, float | None]


@dataclass(frozen=True)
class Growth:
    """One column over the whole run: medians of its second and of its last fifth."""

    column: str
    second_fifth: float
    last_fifth: float

    @property
    def too_much(self) -> bool:
        more = self.last_fifth - self.second_fifth
        if self.column.endswith("_bytes"):
            return more > max(MEMORY_BYTES_MAX, self.second_fifth * MEMORY_SHARE_MAX)
        return more > max(DESCRIPTORS_MAX, self.second_fifth * MEMORY_SHARE_MAX)


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """Of every column that has values in both fifths."""
    if not samples:
        return []
    end_s = samples[-1].at_s
    found = []
    for column in samples[0].values:
        fifths = [
            [value for sample in samples if low * end_s <= sample.at_s <= high * end_s and (value := sample.values.get(column)) is not None]
            for low, high in ((0.2, 0.4), (0.8, 1.0))
        ]
        if all(fifths):
            found.append(Growth(column, median(fifths[0]), median(fifths[1])))
    return found


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seconds", *samples[0].values])
        for sample in samples:
            writer.writerow([f"{sample.at_s:.1f}", *("" if value is None else f"{value:.0f}" for value in sample.values.values())])


def table(samples: Sequence[Sample], rows: int = 20) -> str:
    """Some of the samples, evenly over the run, as text."""
    columns = list(samples[0].values)
    step = max(1, len(samples) // rows)
    lines = ["  ".join(["seconds".rjust(8), *(column.rjust(max(10, len(column))) for column in columns)])]
    for sample in samples[::step]:
        cells = [_cell(column, sample.values.get(column)).rjust(max(10, len(column))) for column in columns]
        lines.append("  ".join([f"{sample.at_s:8.0f}", *cells]))
    return "\n".join(lines)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:.1f}M" if column.endswith("_bytes") else f"{value:.0f}"
