"""What history wants of one request's bytes, taken as they pass.

Decides how much is held (`limit_bytes` of each body), never what becomes of it. Invariants: bytes are referred to, not copied; nothing is
understood here; a capture that nobody collects costs what it holds and goes with its request.
"""

from typing import Protocol

from core.events import Route
from core.history import EDGE_EMBEDDED
from core.units import RequestId
from edge.body import PIECE_BYTES, Body
from edge.wire import ClientConnection, RequestHead


class Capture:
    """One per request that is recorded. `limit_bytes`: of each body; 0: bodies are not wanted."""

    __slots__ = (
        "edge", "held_bytes", "is_cut", "limit_bytes", "number", "path", "peer", "redact", "request_body", "response", "route", "stream",
    )  # fmt: skip

    def __init__(
        self, *, route: Route, path: str, peer: str, number: int, limit_bytes: int, redact: bool, stream: bool, edge: str = EDGE_EMBEDDED
    ) -> None:
        self.edge = edge
        """Through which edge it came (`core.history.EDGES`)."""
        self.route = route
        self.path = path
        self.peer = peer
        self.number = number
        """The record's place in time (`core.history.number_of`)."""
        self.limit_bytes = limit_bytes
        self.redact = redact
        self.stream = stream
        self.request_body: bytes | None = None
        self.response: list[bytes] = []
        self.held_bytes = 0
        """Of `response`."""
        self.is_cut = False
        """A body was longer than `limit_bytes`."""

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

    async def take_request(self, body: Body) -> None:
        """Hold the request's body, as much of it as is wanted."""
        limit = self.limit_bytes
        if limit == 0:
            return
        if body.length > limit:
            self.is_cut = True
        if body.data is not None:
            self.request_body = body.data if body.length <= limit else body.data[:limit]
            return
        pieces = [await body.read_at(at) for at in range(0, min(limit, body.length), PIECE_BYTES)]
        self.request_body = b"".join(pieces)[:limit]


class Recorder(Protocol):
    """Who wants captures."""

    def open(self, request_id: RequestId, conn: ClientConnection, head: RequestHead, route: Route, *, stream: bool) -> Capture | None:
        """A capture for a request that was just read; None: it is not recorded."""
