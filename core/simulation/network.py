"""The network between the coordinator and its nodes: when a message arrives, if it does.

Decides arrival times; never looks into a message. Two kinds of passage: `datagram`, an exchange that may be lost, doubled or overtaken
(a heartbeat through proxies and retries), and `stream`, bytes of a connection that arrive in order, late rather than never.
Each link has dice of its own, so that one more message to one node does not change what happens to another's.
"""

from typing import Final

from core.simulation.options import Options
from core.simulation.prng import Prng

UP: Final = 0
"""From a node to the coordinator."""
DOWN: Final = 1
"""From the coordinator to a node."""

CLOG_S: Final = 3.0
"""Longest extra delay on a clogged link."""
REORDER_S: Final = 2.0
"""Longest extra delay of a message that others overtake."""
ECHO_S: Final = 20.0
"""Longest time between a message and its double."""


class _Link:
    __slots__ = ("clogged_until", "cut_until", "prng")

    def __init__(self, prng: Prng) -> None:
        self.prng = prng
        self.cut_until = [0.0, 0.0]
        self.clogged_until = 0.0


class Network:
    """One link per node."""

    def __init__(self, options: Options, prng: Prng) -> None:
        self._options = options
        self._links = [_Link(prng.split(f"link-{index}")) for index in range(options.nodes)]
        self._healed = False

    def datagram(self, node: int, way: int, *, now: float) -> list[float]:
        """When copies of a message sent now arrive: none, one or two instants."""
        link, options = self._links[node], self._options
        if now < link.cut_until[way]:
            return []
        if self._healed:
            return [now + self._delay_s(link, now)]
        if link.prng.chance(options.loss):
            return []
        at = now + self._delay_s(link, now)
        if link.prng.chance(options.reorder):
            at += link.prng.uniform_s(0.0, REORDER_S)
        if link.prng.chance(options.duplicate):
            return [at, at + link.prng.uniform_s(0.0, ECHO_S)]
        return [at]

    def stream(self, node: int, way: int, *, now: float, after: float) -> float:
        """When bytes sent now arrive on a connection whose earlier bytes arrive at `after`. A cut link delivers when it is whole again."""
        link = self._links[node]
        return max(after, max(now, link.cut_until[way]) + self._delay_s(link, now))

    def reachable(self, node: int, *, now: float) -> bool:
        """Whether both ways are open."""
        cut = self._links[node].cut_until
        return cut[UP] <= now and cut[DOWN] <= now

    def cut(self, node: int, *, up: bool, down: bool, until: float) -> None:
        """Nothing passes until then, one way or both."""
        link = self._links[node]
        if up:
            link.cut_until[UP] = until
        if down:
            link.cut_until[DOWN] = until

    def clog(self, node: int, *, until: float) -> None:
        """Everything is slow until then."""
        self._links[node].clogged_until = until

    def heal(self, *, now: float) -> None:
        """No more faults, for ever."""
        self._healed = True
        for link in self._links:
            link.cut_until = [now, now]
            link.clogged_until = now

    def _delay_s(self, link: _Link, now: float) -> float:
        delay_s = link.prng.exponential_s(self._options.delay_s)
        return delay_s + link.prng.uniform_s(0.0, CLOG_S) if now < link.clogged_until else delay_s
