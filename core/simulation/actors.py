"""What the actors of the world have in common: the stage they act on, a clock that may run wrong, and a connection between two of them.

Decides nothing. Knows neither the router nor Ollama. Invariant: a clock's local time never goes back.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from core.events import Failure, RequestCame, Usage
from core.simulation.network import Network
from core.simulation.options import Options
from core.simulation.script import Ask
from core.units import Instant


class Stage(Protocol):
    """What the world offers its actors."""

    now: Instant
    options: Options
    network: Network
    healed: bool

    def at(self, when: float, deed: Callable[..., None], *given: Any) -> None:
        """Do `deed(*given)` at `when`, or now if that has passed; in the order asked where instants are equal."""

    def idle(self) -> None:
        """What was due was no longer wanted: no event of the world."""


class Clock:
    """Local time of an actor: true time, faster, slower or standing still."""

    __slots__ = ("_local", "_turned_at", "rate")

    def __init__(self, *, now: float) -> None:
        self._turned_at = now
        self._local = now
        self.rate = 1.0

    def local(self, *, now: float) -> Instant:
        """What it shows at true time `now`."""
        return Instant(self._local + (now - self._turned_at) * self.rate)

    def turn(self, rate: float, *, now: float) -> None:
        """From `now` on it runs at `rate`; 0 stands still."""
        self._local = self.local(now=now)
        self._turned_at = now
        self.rate = rate

    def when(self, local: float) -> float:
        """The true time at which it will show `local`; infinite while it stands still."""
        return self._turned_at + (local - self._local) / self.rate if self.rate else math.inf


class Alarm:
    """One timer of an actor; set anew at every turn, it rings at the instant set last."""

    __slots__ = ("_deed", "_ring_at", "_stage")

    def __init__(self, stage: Stage, deed: Callable[[float], None]) -> None:
        self._stage = stage
        self._deed = deed
        self._ring_at = math.inf

    def set(self, when: float) -> None:
        """Ring at `when` and at no other time; infinite: not at all."""
        if when != self._ring_at:
            self._ring_at = when
            if when != math.inf:
                self._stage.at(when, self._ring, when)

    def _ring(self, when: float) -> None:
        if when != self._ring_at:
            self._stage.idle()
            return
        self._ring_at = math.inf
        self._deed(when)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a node says on a connection: its first byte, its proper end, or a failure in place of either."""

    first: bool = False
    end: bool = False
    failure: Failure | None = None
    status: int = 0
    text: str = ""
    usage: Usage | None = None


class Connection:
    """One attempt of a request, as both ends see it."""

    __slots__ = ("arrives_down", "arrives_up", "ask", "came", "client_closed", "key", "node", "via_gateway")

    def __init__(self, key: str, node: int, ask: Ask, came: RequestCame, *, via_gateway: bool) -> None:
        self.key = key
        """The attempt's lease id."""
        self.node = node
        self.ask = ask
        self.came = came
        self.via_gateway = via_gateway
        self.client_closed = False
        self.arrives_up = self.arrives_down = 0.0
        """When the last bytes sent each way arrive."""
