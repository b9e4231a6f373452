"""What history wants of one request's bytes, taken as they pass.

Decides how much is held (`limit_bytes` of each body), never what becomes of it. Invariants: bytes are referred to, not copied; nothing is
understood here; a capture that nobody collects costs what it holds and goes with its request.
"""

from typing import TYPE_CHECKING, Protocol

import msgspec

from core.events import Route
from core.history import EDGE_EMBEDDED
from core.units import RequestId

if TYPE_CHECKING:  # who writes captures to the database needs nothing of the wire
    from edge.body import Body
    from edge.wire import ClientConnection, RequestHead


class Capture(msgspec.Struct, array_like=True, gc=False):
    """One per request that is recorded; it may go to another process as it is."""

    route: Route
    path: str
    peer: str
    number: int
    """The record's place in time (`core.history.number_of`)."""
    limit_bytes: int
    """Of each body that are wanted; 0: none."""
    redact: bool
    stream: bool
    request_body: bytes | None = None
    response: list[bytes] = []
    held_bytes: int = 0
    """Of `response`."""
    is_cut: bool = False
    """A body was longer than `limit_bytes`."""
    edge: str = EDGE_EMBEDDED
    """Through which edge it came (`core.history.EDGES`)."""

    def take(self, data: bytes) -> None:
        """Some of the answer's body passes."""
        room = self.limit_bytes - self.held_bytes
        if room <= 0:
            self.is_cut = self.is_cut or (bool(data) and self.limit_bytes > 0)
            return
        if len(data) > room:
            data = data[:room]
            self.is_cut = True
        self.response.append(data)
        self.held_bytes += len(data)

    def hold_request(self, data: bytes) -> None:
        """Hold the request's body, which is `data`, as much of it as is wanted."""
        limit = self.limit_bytes
        if limit == 0:
            return
        if len(data) > limit:
            self.is_cut = True
            data = data[:limit]
        self.request_body = data

    async def take_request(self, body: "Body") -> None:
        """Hold the request's body, as much of it as is wanted."""
        if body.data is not None:
            self.hold_request(body.data)
            return
        limit = self.limit_bytes
        if limit == 0:
            return
        if body.length > limit:
            self.is_cut = True
        pieces, at = [], 0
        while at < min(limit, body.length) and (piece := await body.read_at(at)):
            pieces.append(piece)
            at += len(piece)
        self.request_body = b"".join(pieces)[:limit]


class Recorder(Protocol):
    """Who wants captures."""

    def number(self) -> int:
        """The place in history of a request that has just come."""

    def open(
        self, request_id: RequestId, conn: "ClientConnection", head: "RequestHead", route: Route, *, stream: bool, number: int
    ) -> Capture | None:
        """A capture for a request, before it is settled; None: it is not recorded. `number`: its place."""
