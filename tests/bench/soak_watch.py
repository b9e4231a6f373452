"""What grows in the soak: samples of memory, descriptors and leases, as a table, and what they mean.

Decides what counts as growth. Memory is compared while clients ask, between the second and the last fifth of that time. Descriptors are
compared while nobody asks: under load they are mostly kept connections, whose number follows the load of the last minute, and a leak
would hide in that. Knows no program. Invariant: a process that was started anew counts from then on only where nobody judges it.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf
from pathlib import Path
from statistics import median

from edge.pool import IDLE_S

JUDGED_FROM_S = 1000.0
"""In a shorter run the most that was ever in flight still rises, and with it what the allocators keep: growth of memory is shown, not
judged."""
MEMORY_SHARE_MAX, MEMORY_BYTES_MAX = 0.05, 8_000_000
REST_S = IDLE_S + 10.0
"""So long nobody asks, from the end of the last request on. Who opened a connection keeps it idle for a minute: the router's programs by
`IDLE_S`, nginx by `keepalive_timeout`; watches and clocks are a second or two late."""
COUNTED = 5
"""Samples at the end of a rest. What each of them has is held; an agent's heartbeat comes and goes."""
HELD_MORE_MAX = 6
"""Descriptors from the first rest to the last: two calls of agents that meet a third, each with three descriptors for a minute. A leak of
one for each fault of the rarest kind, a dozen in half an hour between the rests, or for each few thousand requests, is more."""


@dataclass(frozen=True)
class Sample:
    """One moment. `values` by column; what was not there is None. `at_rest`: no request was under way."""

    at_s: float
    values: Mapping[str, float | None]
    at_rest: bool = False


@dataclass(frozen=True)
class Rest:
    """A time without requests.

    `held`: descriptors that did not go away, by column. `leases`: the most that was in flight or waited; None: nobody could say.
    """

    lasted_s: float
    held: Mapping[str, float]
    leases: float | None

    @property
    def is_whole(self) -> bool:
        """Whether kept connections had time to end."""
        return self.lasted_s >= REST_S


@dataclass(frozen=True)
class Growth:
    """One column, earlier and later. `allowed`: how much more it may be."""

    column: str
    earlier: float
    later: float
    allowed: float

    @property
    def too_much(self) -> bool:
        return self.later - self.earlier > self.allowed


def growths(samples: Sequence[Sample]) -> list[Growth]:
    """While clients asked: medians of the second and the last fifth of every column that has values in both. Only memory is limited."""
    under_load = [sample for sample in samples if not sample.at_rest]
    count = len(under_load)
    fifths = under_load[count // 5 : 2 * count // 5], under_load[4 * count // 5 :]
    found = []
    for column in samples[0].values if samples else ():
        earlier, later = ([value for sample in fifth if (value := sample.values.get(column)) is not None] for fifth in fifths)
        if earlier and later:
            before = median(earlier)
            allowed = max(MEMORY_BYTES_MAX, before * MEMORY_SHARE_MAX) if column.endswith("_bytes") else inf
            found.append(Growth(column, before, median(later), allowed))
    return found


def rests(samples: Sequence[Sample]) -> list[Rest]:
    """The times without requests, in order."""
    return [_rest(list(stretch)) for at_rest, stretch in groupby(samples, key=lambda sample: sample.at_rest) if at_rest]


def _rest(stretch: Sequence[Sample]) -> Rest:
    held = {
        column: min(values)
        for column in stretch[0].values
        if column.endswith("_files") and (values := [value for one in stretch[-COUNTED:] if (value := one.values[column]) is not None])
    }
    in_flight = [
        value + waiting
        for one in stretch
        if (value := one.values.get("leases")) is not None and (waiting := one.values.get("waiting")) is not None
    ]
    return Rest(stretch[-1].at_s - stretch[0].at_s, held, max(in_flight, default=None))


def growths_at_rest(samples: Sequence[Sample]) -> list[Growth]:
    """Descriptors from the first rest to the last, if there are two whole ones."""
    whole = [rest for rest in rests(samples) if rest.is_whole]
    if len(whole) < 2:
        return []
    first, last = whole[0].held, whole[-1].held
    return [Growth(column, held, last[column], HELD_MORE_MAX) for column, held in first.items() if column in last]


def ended(samples: Sequence[Sample]) -> list[str]:
    """The columns of programs that were not there in the end."""
    last = samples[-1].values
    return [column for column in last if column.endswith("_files") and last[column] is None]


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seconds", "at_rest", *samples[0].values])
        for sample in samples:
            values = ("" if value is None else f"{value:.0f}" for value in sample.values.values())
            writer.writerow([f"{sample.at_s:.1f}", int(sample.at_rest), *values])


def table(samples: Sequence[Sample], rows: int = 20) -> str:
    """Some of the samples, evenly over the run, as text."""
    columns = list(samples[0].values)
    step = max(1, len(samples) // rows)
    lines = ["  ".join(["seconds".rjust(8), *(column.rjust(max(10, len(column))) for column in columns)])]
    for sample in samples[::step]:
        cells = [_cell(column, sample.values.get(column)).rjust(max(10, len(column))) for column in columns]
        lines.append("  ".join([f"{sample.at_s:8.0f}", *cells, *(["at rest"] if sample.at_rest else [])]))
    return "\n".join(lines)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1e6:.1f}M" if column.endswith("_bytes") else f"{value:.0f}"
