"""Requests that nginx carries: from the answer of `edge.selection` until they are settled, or the embedded edge goes on with them.

Decides who may go on with a request (nginx alone, by a secret), and what the router is told of a node that nginx tried in vain; never
which node is next. Where nginx got no good answer, or may not carry out what was decided, the request comes to the coordinator's own
port with `X-Ollama-Router-Takeover`, and is answered there as if it had been there all the time.

Invariants: a request is here from `add` until it is settled or claimed, and `Settled` is applied exactly once for it; a takeover is
believed with the right secret only, and claims a request once; one that nobody comes for within `TAKEN_WITHIN_S` is settled.
"""

import hmac
from collections.abc import Callable, Iterable
from typing import Final
from typing import Protocol as Interface

import trio

from core.events import AttemptEnded, Cut, Ending, Forward, RequestEffect, Route, Settled, Wait
from core.leases import Expiry
from core.units import AgentId, Instant, LeaseId, RequestId
from edge.desk import Answer, Decider, Desk
from edge.listener import Takeover
from edge.live import Live
from edge.proxy import Proxy
from edge.relay import Failed
from edge.told import told
from edge.wire import ClientConnection, RequestHead

TAKEOVER: Final = b"x-ollama-router-takeover"
"""`<secret> <request id>`."""
TRIED: Final = b"x-ollama-router-tried"
"""`<lease id> <status that the node gave, or 0>`: the node that nginx tried."""

TAKEN_WITHIN_S: Final = 10.0


class Decides(Decider, Interface):
    """What is needed of the driver."""

    def keep_desk(self, desk: Desk) -> None:
        """Leave effects for this desk's request there."""


class Holder(Interface):
    """Who holds the answer to a selection back while its request waits."""

    def decided(self, carried: "Carried", effect: Answer, /) -> None:
        """The wait is over."""


class Carried(Desk):
    """One request, and its desk. `holder` is set while its answer is held back."""

    __slots__ = (
        "agent_id",
        "connection",
        "cut",
        "direct",
        "forward",
        "freed",
        "gone",
        "handed",
        "holder",
        "lease_id",
        "route",
        "since",
        "stream",
    )  # fmt: skip

    def __init__(self, request_id: RequestId, *, route: Route, stream: bool, connection: bytes | None = None) -> None:
        super().__init__(request_id)
        self.route = route
        self.stream = stream
        self.connection = connection
        """nginx's name of its client's connection, where requests follow one another on that."""
        self.holder: Holder | None = None
        self.forward: Forward | None = None
        """What nginx carries out, or was to."""
        self.lease_id: LeaseId | None = None
        self.agent_id: AgentId | None = None
        self.since = 0.0
        """When nginx was told the node."""
        self.direct = False
        """The node has no gateway: what nginx says is all that will be known."""
        self.handed = False
        """The embedded edge is to go on with it, without nginx having tried a node."""
        self.freed = False
        """nginx said that it is over, so nobody will come for it; the gateway may still tell more."""
        self.gone = False
        """The router gave its attempt up: nothing keeps its lease alive, and it may be over already."""
        self.cut = ""
        """What nginx said of the node breaking the answer off."""

    def put(self, effect: RequestEffect) -> None:
        """Leave `effect` here; who waits for it is told at once."""
        if type(effect) is Forward and self.holder is None and self._arrived is None:  # most of all
            self._to_begin = True
            self._answers.append(effect)
            return
        if isinstance(effect, Cut):
            self.gone = True
        super().put(effect)
        if self.holder is not None and (answer := self.take_decision()) is not None:
            holder, self.holder = self.holder, None
            holder.decided(self, answer)

    def take_decision(self) -> Answer | None:
        """The decision that was left here, if there is one; a `Wait` is none."""
        from_here = self._answers
        while from_here:
            effect = from_here.pop(0)
            if not isinstance(effect, Wait):
                return effect
        return None

    def forget_attempt(self) -> None:
        """nginx's attempt is over: a Cut that came for it is about nothing that will be."""
        self._to_begin = False
        self._cut = None


class Handover:
    """All requests that nginx carries. `secret`: what nginx shows."""

    def __init__(
        self, decider: Decides, *, secret: bytes, lives: Callable[[RequestId], bool], now: Callable[[], float] = trio.current_time
    ) -> None:
        self.secret = secret
        self.now = now
        self.table: dict[str, Carried] = {}
        """By request id."""
        self.late = 0
        """Takeovers of requests that were not here any more."""
        self._decider = decider
        self._lives = lives
        self._owed: Expiry[RequestId] = Expiry(TAKEN_WITHIN_S)

    def add(self, carried: Carried) -> None:
        """A request that is about to come."""
        self.table[carried.request_id] = carried
        self._decider.keep_desk(carried)

    def hand_over(self, carried: Carried, effect: Answer) -> None:
        """The embedded edge is to carry out `effect`."""
        carried.put(effect)
        carried.handed = True
        self._owed.set(carried.request_id, now=Instant(self.now()))

    def settle(self, carried: Carried, settled: Settled) -> None:
        """It is over."""
        del self.table[carried.request_id]
        if carried.handed:
            self._owed.discard(carried.request_id)
        self._decider.apply(settled)
        self._decider.close_desk(carried.request_id)

    def forget(self, carried: Carried) -> None:
        """The router has given it up."""
        del self.table[carried.request_id]
        self._decider.close_desk(carried.request_id)

    def pulse(self) -> Iterable[RequestId]:
        """Requests whose leases are to be renewed: those that the embedded edge will go on with."""
        return [carried.request_id for carried in self.table.values() if carried.handed]

    def sweep(self, *, now: float) -> None:
        """Settle what nobody came for."""
        for request_id in self._owed.due(now=Instant(now)):
            carried = self.table[request_id]
            carried.handed = False
            self.settle(carried, _cancelled(request_id, "nginx did not come back with it"))
        for carried in [carried for carried in self.table.values() if carried.gone]:
            if not self._lives(carried.request_id):
                self.forget(carried)

    def close(self) -> None:
        """The router stops."""
        for carried in list(self.table.values()):
            text = "the router stopped"
            self.settle(carried, Settled(request_id=carried.request_id, ending=Ending.UNKNOWN, message=text))

    # ------------------------------------------------------------ taking over

    def taking_over(self, proxy: Proxy) -> Takeover:
        """For the listener in front of `proxy`."""

        async def take_over(conn: ClientConnection, head: RequestHead, route: Route) -> bool:
            claim = self.claim(head.fields[TAKEOVER], route, head)
            if claim is not None:
                await proxy.go_on(conn, head, claim)
            return claim is not None

        return take_over

    def claim(self, takeover: bytes, route: Route, head: RequestHead) -> "Claim | None":
        """The request that `takeover` (the header's value) is about; from now on the caller's. None: this is a request like any other."""
        secret, _, name = takeover.partition(b" ")
        if not hmac.compare_digest(secret, self.secret) or not name:
            return None
        carried = self.table.get(name.decode("ascii", "replace"))
        if carried is None or carried.holder is not None or carried.freed or carried.route is not route:
            self.late += 1
            return None
        if not self._lives(carried.request_id):
            self.late += 1
            self.forget(carried)
            return None
        failed = None
        if not carried.handed:
            lease, _, status = head.fields.get(TRIED, b"").partition(b" ")
            if lease.decode("ascii", "replace") != carried.lease_id:
                self.late += 1
                return None
            failed = told(route, head.fields, int(status) if status.isdigit() and len(status) == 3 else 0)
        else:
            self._owed.discard(carried.request_id)
        del self.table[carried.request_id]
        return Claim(self._decider, carried, failed)


class Claim:
    """A request that the embedded edge goes on with (`edge.proxy.Begun`). `failed`: what is known of the node that nginx tried; None:
    nothing, or it tried none."""

    __slots__ = ("_decider", "_failed", "desk")

    def __init__(self, decider: Decider, carried: Carried, failed: Failed | None) -> None:
        self._decider = decider
        self.desk = carried
        self._failed = failed

    @property
    def route(self) -> Route:
        return self.desk.route

    @property
    def stream(self) -> bool:
        return self.desk.stream

    def resume(self, one: Live) -> None:
        """Where nginx tried a node: say that it failed, or have it tried again by somebody who sees why it fails."""
        carried, failed, forward = self.desk, self._failed, self.desk.forward
        if carried.handed or forward is None:
            return
        if failed is None:
            carried.put(forward)
            return
        carried.forget_attempt()
        if failed.kept is not None:
            one.kept = (failed.kept, forward.lease.agent_name)
        one.agent_id = forward.lease.agent_id
        self._decider.apply(
            AttemptEnded(
                request_id=carried.request_id,
                failure=failed.failure,
                status=failed.status,
                text=failed.text[:4096],
                repeat_guard=failed.repeat_guard,
            )
        )


def _cancelled(request_id: RequestId, text: str) -> Settled:
    return Settled(request_id=request_id, ending=Ending.CANCELLED, status=499, message=text)
