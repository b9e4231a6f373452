"""The sole owner of the `Router`: tells it what happened and the time, and has done what it wants done.

Decides nothing. Knows no socket: effects about requests go to their desks, the rest to sinks that are passed in.
Invariants: every call of the router is sync and comes from here; `now` never goes back; the router is ticked at or after its
deadline, never before; a slow sink cannot delay a decision, since sinks are sync and bounded.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol, assert_never, cast

import trio

from core.advice import Question
from core.dump import PLACEMENT, TICK
from core.events import (
    Accepted,
    Count,
    Cut,
    Declined,
    Effect,
    Event,
    Forward,
    Note,
    PassOn,
    Probe,
    Pulse,
    Record,
    Refuse,
    Registered,
    Wait,
)
from core.router import Router
from core.units import AgentId, Instant, RequestId
from edge.desk import Desk
from servers.tape import Tape

TICK_PAUSE_S: Final = 0.001
"""Shortest time between two ticks, so that a deadline that does not move cannot take the loop."""


class Sinks(Protocol):
    """Where the router's effects that are not about one live request go. All sync, none may raise."""

    def note(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """A line for the log."""

    def count(self, name: str, labels: dict[str, str], by: int) -> None:
        """Add to a counter."""

    def record(self, record: Record) -> None:
        """A request is over."""

    def probe(self, agent_id: AgentId) -> None:
        """Ask this agentless node everything, now."""


class Driver:
    """One per coordinator. Implements `edge.desk.Decider`."""

    def __init__(self, router: Router, sinks: Sinks, *, clock: Callable[[], float] = trio.current_time) -> None:
        self.router = router
        self._sinks = sinks
        self._clock = cast("Callable[[], Instant]", clock)
        self._now = Instant(clock())
        self._desks: dict[RequestId, Desk] = {}
        self.tape = Tape(router)
        self._timer: trio.CancelScope | None = None
        self._armed_for = float("inf")

    # ------------------------------------------------------------ edge.desk.Decider

    def apply(self, event: Event) -> list[Effect]:
        """Tell the router; carry out what it wants, leave request effects at their desks, return the rest (the answers to shells)."""
        router, tape, clock = self.router, self.tape, self._clock
        now = clock()
        if now > self._now:
            self._now = now
        else:
            now = self._now
        if tape.due:
            tape.turn()
        try:
            effects = router.handle(event, now)
        except BaseException:
            tape.add(now, event, None)
            raise
        tape.add(now, event, effects)
        rest: list[Effect] = []
        for effect in effects:
            if type(effect) is Record:  # it and the next are most of all, and to be none of a class takes long to find out
                self._sinks.record(effect)
            elif type(effect) is Forward:
                if (desk := self._desks.get(effect.request_id)) is not None:
                    desk.put(effect)
            else:
                self._carry_out(effect, rest)
        if router.wake.at < self._armed_for:
            self._arm(router.wake.at)
        return rest

    def open_desk(self, request_id: RequestId) -> Desk:
        """A desk for a request that is about to come."""
        desk = self._desks[request_id] = Desk(request_id)
        return desk

    def keep_desk(self, desk: Desk) -> None:
        """`open_desk` for a desk that was made elsewhere."""
        self._desks[desk.request_id] = desk

    def close_desk(self, request_id: RequestId) -> None:
        """The request is settled; effects that still come for it are dropped."""
        del self._desks[request_id]

    # ------------------------------------------------------------ for the rest of the coordinator

    def now(self) -> Instant:
        """The router's time: the clock's, but never before the last event."""
        return self._advance()

    def recent_events(self) -> list[tuple[Instant, Event]]:
        """The last events that were applied, oldest first: as far as the tape goes back."""
        return [(at, what) for at, what, _ in self.tape.steps() if not isinstance(what, str)]

    def placement(self) -> Question:
        """The router's question for `core.placement`; asking may make it compute speeds anew, so it is on the tape."""
        self.tape.add(self._advance(), PLACEMENT, [])
        return self.router.placement()

    async def run(self, pulse: Callable[[], Pulse], *, pulse_s: float) -> None:
        """Keep the router's time until cancelled: its deadlines, and a pulse every `pulse_s` seconds."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_deadlines)
            while True:
                await trio.sleep(pulse_s)
                self.apply(pulse())

    # ------------------------------------------------------------ inside

    def _advance(self) -> Instant:
        now = Instant(self._clock())
        if now > self._now:
            self._now = now
        return self._now

    def _arm(self, deadline: float) -> None:
        self._armed_for = deadline
        if self._timer is not None:
            self._timer.deadline = deadline

    async def _keep_deadlines(self) -> None:
        """Tick the router at its deadlines. `apply` moves the armed deadline forward; one that moved back costs one idle tick."""
        self._armed_for = self.router.wake.at
        while True:
            with trio.CancelScope(deadline=self._armed_for) as self._timer:
                await trio.sleep_forever()
            self._now = max(self._advance(), Instant(self._armed_for))
            effects = self.router.tick(now=self._now)
            self.tape.add(self._now, TICK, effects)
            for effect in effects:
                self._carry_out(effect, [])
            self._armed_for = max(self.router.wake.at, self._now + TICK_PAUSE_S)

    def _carry_out(self, effect: Effect, rest: list[Effect]) -> None:
        """Do `effect`, or add it to `rest`: the answers to shells."""
        match effect:
            case Record():
                self._sinks.record(effect)
            case Forward() | Wait() | Refuse() | PassOn() | Cut():
                if (desk := self._desks.get(effect.request_id)) is not None:
                    desk.put(effect)
            case Count():
                self._sinks.count(effect.name, effect.labels, effect.by)
            case Note():
                self._sinks.note(effect.level, effect.event, effect.fields)
            case Probe():
                self._sinks.probe(effect.agent_id)
            case Registered() | Accepted() | Declined():
                rest.append(effect)
            case _:
                assert_never(effect)
