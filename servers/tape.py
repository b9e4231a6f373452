"""What the router was told lately, from a state that is known: enough to play it again exactly.

Decides how far back that goes. Two lengths of tape are kept, each with a snapshot of the router before its first step; when the newer one
is full, the older one goes. Invariant: played from its snapshot, a tape's steps have the effects that are on it.
"""

from collections.abc import Iterator
from typing import Final

from core.dump import Step, frames
from core.events import Effect, Event
from core.router import Router
from core.snapshot import Snapshot, take
from core.units import Instant

STEPS_PER_LENGTH: Final = 4096
"""Between two snapshots. One takes 2.4 to 3 ms with 100 nodes (docs/simulation.md), so 0.7 µs for each step: above the 2 ms
that a step of the loop should take, once in so many steps."""


class Tape:
    """Of one router. The owner adds each step when it is done, and turns the tape before a step when it is due.

    A length that goes is written over step by step: to let go of all its steps at once takes 4 to 8 ms.
    """

    __slots__ = ("_count", "_newer", "_older", "_older_count", "_router", "_starts", "due")

    def __init__(self, router: Router) -> None:
        self._router = router
        self._older: list[Step] = []
        self._newer: list[Step] = []
        self._older_count = self._count = 0
        """How many steps of each length count; behind them are those of a length that went."""
        self._starts: tuple[Snapshot | None, Snapshot | None] = (None, None)
        """Snapshots before the first step of each length."""
        self.due = True
        """Whether to turn before the next step."""

    def add(self, at: Instant, what: Event | str, effects: list[Effect] | None) -> None:
        """One step was done."""
        newer, at_step = self._newer, self._count
        if at_step < len(newer):
            newer[at_step] = (at, what, effects)
        else:
            newer.append((at, what, effects))
        self._count = at_step = at_step + 1
        if at_step >= STEPS_PER_LENGTH:
            self.due = True

    def turn(self) -> None:
        """Begin a new length with the router as it is."""
        self._older, self._newer = self._newer, self._older
        self._older_count, self._count = self._count, 0
        self._starts = (self._starts[1], take(self._router))
        self.due = False

    def steps(self) -> list[Step]:
        """All steps that are kept, the oldest first."""
        return self._older[: self._older_count] + self._newer[: self._count]

    def written(self, *, version: str, made_at: str) -> Iterator[bytes]:
        """The tape as it is now, as a dump's file; each piece is a short step of work."""
        if self._starts[1] is None:
            self.turn()
        older, newer = self._starts
        start = older or newer
        assert start is not None, "turned"
        return frames(start, self.steps(), version=version, made_at=made_at)
