"""The timing machine, driven by the real clock, and the log of what became of each request.

Decides nothing: it carries events to `core.simulation.node` and its effects to whoever waits for them.
"""

import math
from collections.abc import Mapping

import msgspec
import trio

from core.simulation.node import (
    Came,
    Change,
    Finished,
    Held,
    Left,
    LoadFailed,
    ModelTiming,
    NodeEffect,
    NodeEvent,
    NodeTiming,
    Produced,
    Refused,
    Resumed,
    RunnerChanged,
    SimulatedNode,
    Timing,
    UnloadAsked,
)
from core.units import Instant

LOG_LIMIT = 100_000
"""Requests and runner changes that are remembered; the oldest go first."""


class RequestLog(msgspec.Struct, kw_only=True):
    """What became of one request. Times are Trio's."""

    request_id: str
    method: str
    route: str
    headers: list[tuple[bytes, bytes]]
    arrival: float
    model: str | None = None
    status: int = 0
    first_byte: float | None = None
    last_byte: float | None = None
    cancelled_at: float | None = None  # the client was seen to leave
    released_at: float | None = None  # the machine had stopped working for it
    load_started: float | None = None  # this request began a load
    tokens_generated: int = 0
    tokens_sent: int = 0
    tokens_after_cancel: int = 0
    fault: str | None = None
    timing: Timing | None = None
    done: bool = False


class Desk:
    """Where the effects for one request arrive."""

    __slots__ = ("_changed", "failed", "held", "log", "refused", "timing", "tokens")

    def __init__(self, log: RequestLog) -> None:
        self.log = log
        self.tokens = 0
        self.timing: Timing | None = None
        self.failed: str | None = None
        self.refused = False
        self.held = False
        self._changed = trio.Event()

    async def change(self) -> None:
        """Wait for the next effect, unless one came since the last wait."""
        await self._changed.wait()
        self._changed = trio.Event()

    def touch(self) -> None:
        """Something changed."""
        self._changed.set()


class Engine:
    """Owns the machine. `run` must be running for anything to become due."""

    def __init__(self, timing: NodeTiming, models: Mapping[str, ModelTiming]) -> None:
        self._timing = timing
        self._models = models
        self._desks: dict[str, Desk] = {}
        self._wake = trio.Event()
        self._waits_until = math.inf
        self.changes: list[RunnerChanged] = []
        self.max_in_flight = 0
        self.restart()

    def restart(self) -> None:
        """Nothing is loaded, nothing waits."""
        self._desks.clear()
        self.node = SimulatedNode(self._timing, self._models, now=Instant(0.0))

    async def run(self) -> None:
        """Keep time."""
        while True:
            due = self.node.next_deadline()
            self._waits_until = math.inf if due is None else due
            with trio.move_on_at(self._waits_until):
                await self._wake.wait()
            self._wake = trio.Event()
            self._carry(self.node.tick(now=self._now()))

    def submit(self, came: Came, desk: Desk) -> None:
        """A request for the machine."""
        self._desks[came.request_id] = desk
        self._apply(came)
        self.max_in_flight = max(self.max_in_flight, self.node.in_flight)

    def leave(self, request_id: str) -> None:
        """The request is of no interest any more; nothing happens if it is over."""
        desk = self._desks.pop(request_id, None)
        if desk is not None:
            self._apply(Left(request_id))
            desk.log.released_at = trio.current_time()

    def resume(self, request_id: str) -> None:
        """A held request goes on."""
        self._apply(Resumed(request_id))

    def unload(self, model: str) -> None:
        """The model goes when it is idle."""
        self._apply(UnloadAsked(model))

    def _now(self) -> Instant:
        return Instant(trio.current_time())

    def _apply(self, event: NodeEvent) -> None:
        self._carry(self.node.handle(event, now=self._now()))
        due = self.node.next_deadline()
        if due is not None and due < self._waits_until:
            self._wake.set()

    def _carry(self, effects: list[NodeEffect]) -> None:
        for effect in effects:
            if isinstance(effect, RunnerChanged):
                self._changed(effect)
                continue
            over = not isinstance(effect, (Produced, Held))
            desk = self._desks.pop(effect.request_id, None) if over else self._desks.get(effect.request_id)
            if desk is None:
                continue
            match effect:
                case Produced():
                    log = desk.log
                    log.tokens_generated = desk.tokens = effect.tokens
                    if log.cancelled_at is not None:
                        log.tokens_after_cancel += 1
                case Held():
                    desk.held = True
                case Finished():
                    desk.timing = desk.log.timing = effect.timing
                case LoadFailed():
                    desk.failed = effect.text
                case Refused():
                    desk.refused = True
            desk.touch()

    def _changed(self, change: RunnerChanged) -> None:
        self.changes.append(change)
        del self.changes[:-LOG_LIMIT]
        if change.change is Change.LOADING and (desk := self._desks.get(change.why)) is not None:
            desk.log.load_started = change.at
