"""The bounded fair queue: who waits, in which order they are looked at, until when.

Decides the order and the limits only; never whether somebody may go. Each waiting request has a fixed place: a start tag after the work
that its client already has waiting, as in start-time fair queueing. That is the order in which a deficit round robin over the
clients would serve, but every place is known at once: it can be shown, and walked without taking anybody out.
So much of what a client has waiting is not held against it: among equal clients turns alone would make those wait longest who chanced to
come several times, and nobody would gain (docs/routing.md, eight equal nodes).

Invariants: at most `queue_max` are admitted in all, and `queue_per_client` of one client; within one client nobody stands before one that
came earlier; who comes back (a node did not take it) stands first; a client with much waiting never moves the first one of another
client back by more than its burst and one request.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import takewhile

from core.config import RouterConfig
from core.errors import LocalError
from core.leases import Wake
from core.parts import Part
from core.structs import Fact, Ordered
from core.units import NEVER, Instant, Micros, RequestId


class Place(Ordered, frozen=True):
    """Where a request stands: by tag, then by arrival."""

    tag: int
    number: int


class Waiter(Fact, frozen=True):
    """One waiting request."""

    request_id: RequestId
    client: str
    place: Place
    deadline: Instant


class FairQueue(Part):
    """All waiting requests."""

    __slots__ = ("_clients", "_deadlines", "_last_tag", "_max", "_order", "_per_client", "earliest", "waiters", "wake")

    def __init__(self, config: RouterConfig) -> None:
        self._max = config.queue_max
        self._per_client = config.queue_per_client
        self.wake = Wake()
        """Lowered by each new deadline."""
        self.waiters: dict[RequestId, Waiter] = {}
        """Who waits. The queue's own: read it."""
        self._order: list[tuple[Place, RequestId]] = []
        self._deadlines: list[tuple[Instant, RequestId]] = []
        self.earliest = NEVER
        """When the next one has waited long enough."""
        self._clients: dict[str, int] = {}
        self._last_tag: dict[str, tuple[int, int, int]] = {}
        """Of each client's last request: where turns alone would have put it, its cost, where it stands."""

    def __len__(self) -> int:
        return len(self.waiters)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self.waiters

    @property
    def full(self) -> bool:
        """Whether nobody new is admitted."""
        return len(self.waiters) >= self._max

    def client_full(self, client: str) -> bool:
        """Whether nobody new of this client is admitted."""
        return self._clients.get(client, 0) >= self._per_client

    def new_place(self, client: str, *, cost: Micros, number: int, burst: int = 0) -> Place:
        """After what the client has waiting beyond `burst` (µs of node time, as `cost`); a new client stands beside the first in line.
        `number` grows with each request that comes."""
        head = tag = least = self._head()
        last = self._last_tag.get(client)
        if last is not None:
            tag, least = max(head, last[0] + last[1]), max(head, last[2])
        place = max(tag - burst, least)
        self._last_tag[client] = (tag, max(cost, 1), place)
        return Place(place, number)

    def first_place(self, number: int) -> Place:
        """At the front, for one that was under way already and comes back."""
        return Place(self._head(), number)

    def push(self, request_id: RequestId, client: str, place: Place, *, deadline: Instant) -> None:
        """Let the request wait until `deadline`. Whether somebody new is admitted is asked before (`full`, `client_full`): who comes back
        always is.

        Raises:
            LocalError: it waits already.
        """
        if request_id in self.waiters:
            raise LocalError(f"request {request_id} waits already")
        if client not in self._last_tag:
            self._last_tag[client] = (place.tag, 1, place.tag)
        self.waiters[request_id] = Waiter(request_id, client, place, deadline)
        self._clients[client] = self._clients.get(client, 0) + 1
        insort(self._order, (place, request_id))
        insort(self._deadlines, (deadline, request_id))
        self.earliest = self._deadlines[0][0]
        self.wake.at = min(self.wake.at, deadline)

    def remove(self, request_id: RequestId) -> Waiter | None:
        """Take the request out; None when it does not wait."""
        waiter = self.waiters.pop(request_id, None)
        if waiter is None:
            return None
        del self._order[bisect_left(self._order, (waiter.place, request_id))]
        del self._deadlines[bisect_left(self._deadlines, (waiter.deadline, request_id))]
        self.earliest = self._deadlines[0][0] if self._deadlines else NEVER
        left = self._clients[waiter.client] - 1
        if left:
            self._clients[waiter.client] = left
        else:
            del self._clients[waiter.client]
            self._last_tag.pop(waiter.client, None)
        return waiter

    def in_order(self) -> Iterator[RequestId]:
        """Who waits now, the next to be looked at first. The queue may be changed meanwhile."""
        for _, request_id in self._order[:]:
            yield request_id

    def position(self, request_id: RequestId) -> int:
        """From 1. The request must be waiting."""
        return bisect_left(self._order, (self.waiters[request_id].place, request_id)) + 1

    def due(self, *, now: Instant) -> list[RequestId]:
        """Whose deadline has come, the earliest first. They stay until they are removed."""
        return [request_id for _, request_id in takewhile(lambda entry: entry[0] <= now, self._deadlines)]

    def next_deadline(self) -> Instant | None:
        """When the next one has waited long enough."""
        return self._deadlines[0][0] if self._deadlines else None

    def check(self) -> None:
        """Recompute what is kept for speed (R11).

        Raises:
            AssertionError: it differs.
        """
        waiters = self.waiters.values()
        assert self._order == sorted((waiter.place, waiter.request_id) for waiter in waiters), "R11: the order is not that of the places"
        assert self._deadlines == sorted((waiter.deadline, waiter.request_id) for waiter in waiters), (
            "R11: the deadlines are not the waiters'"
        )
        clients: dict[str, int] = {}
        for waiter in waiters:
            clients[waiter.client] = clients.get(waiter.client, 0) + 1
        assert clients == self._clients, "R11: the numbers per client are not the waiters'"
        assert self._last_tag.keys() == clients.keys(), "R11: a client that does not wait is remembered"

    def _head(self) -> int:
        return self._order[0][0].tag if self._order else 0
