"""Where the router's effects for one live request are left for the task that serves it.

Decides nothing. `put` is sync, so that a decision made on behalf of another request never waits for this one; the order of effects
is kept. A `Cut` is not queued: it ends the attempt that is running, and says why; one that comes before its attempt has begun is kept
until then.
"""

from typing import Protocol

import trio

from core.errors import LocalError
from core.events import Cut, Effect, Event, Forward, PassOn, Refuse, RequestEffect, Wait
from core.units import RequestId
from edge.wire import ClientConnection
from edge.wire_heads import RequestHead

Answer = Forward | Wait | Refuse | PassOn


class Attempt(Protocol):
    """An attempt that a Cut can end."""

    def give_up(self, why: str, unload: tuple[str, ...]) -> None:
        """The router wants no more of it; `why` is a sentence for the client and the record. `unload`: models that its node is to unload
        once the connection is closed."""


class Desk:
    """One per live request."""

    __slots__ = ("_answers", "_arrived", "_attempt", "_cut", "_to_begin", "request_id")

    def __init__(self, request_id: RequestId) -> None:
        self.request_id = request_id
        self._answers: list[Answer] = []
        self._arrived: trio.Event | None = None
        self._attempt: Attempt | None = None
        self._to_begin = False
        """Whether an attempt was ordered that has not begun."""
        self._cut: Cut | None = None
        """What ends that attempt as soon as it begins."""

    def put(self, effect: RequestEffect) -> None:
        """Leave `effect` here; called by the driver."""
        if type(effect) is Forward:  # most of all; to be none of a class takes longer to find out
            self._to_begin = True
        elif isinstance(effect, Cut):
            if self._attempt is not None:
                self._attempt.give_up(effect.reason, effect.unload)
            elif self._to_begin:
                self._cut = effect
            return
        self._answers.append(effect)
        if self._arrived is not None:
            self._arrived.set()

    @property
    def first(self) -> Answer | None:
        """What `take_nowait` would take."""
        return self._answers[0] if self._answers else None

    def take_nowait(self) -> Answer | None:
        """The oldest effect not yet taken, or None."""
        return self._answers.pop(0) if self._answers else None

    async def take(self) -> Answer:
        """The oldest effect not yet taken; waits for one."""
        while not self._answers:
            if self._arrived is not None:
                raise LocalError("two tasks wait at one desk")
            self._arrived = trio.Event()
            try:
                await self._arrived.wait()
            finally:
                self._arrived = None
        return self._answers.pop(0)

    def begin(self, attempt: Attempt) -> None:
        """From now on a Cut ends `attempt`; one that came since it was ordered does so now."""
        self._attempt = attempt
        self._to_begin = False
        if self._cut is not None:
            cut, self._cut = self._cut, None
            attempt.give_up(cut.reason, cut.unload)

    def end(self) -> None:
        """The attempt is over; a Cut that comes now is about something already known."""
        self._attempt = None


class Decider(Protocol):
    """What the edge needs of the driver above it."""

    def apply(self, event: Event) -> list[Effect]:
        """Tell the router; carry out what it wants, leave request effects at their desks, return the rest."""

    def open_desk(self, request_id: RequestId) -> Desk:
        """A desk for a request that is about to come."""

    def close_desk(self, request_id: RequestId) -> None:
        """The request is settled; effects that still come for it are dropped."""


class Explainer(Protocol):
    """Tells those who may know why a request went to its node."""

    async def is_for(self, conn: ClientConnection, head: RequestHead, /) -> bool:
        """Whether this client may be told."""

    def line(self, request_id: RequestId, /) -> str:
        """Why, in one short line, as far as is known now."""
