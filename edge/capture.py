"""What history wants of one request's bytes, taken as they pass.

Decides how much is held (`limit_bytes` of each body), never what becomes of it. Invariants: bytes are referred to, not copied; nothing is
understood here; a capture that nobody collects costs what it holds and goes with its request.
"""

from typing import Protocol

from core.events import Route
from core.history import EDGE_EMBEDDED
from core.structs import mypyc_attr
from core.units import RequestId
from edge.body import Body
from edge.wire import ClientConnection, RequestHead


@mypyc_attr(acyclic=True)
class Capture:
    """One per request that is recorded."""

    __slots__ = ("edge", "held_bytes", "is_cut", "limit_bytes", "number", "path", "peer", "redact", "request_body", "response", "stream")

    def __init__(self, path: str, peer: str, number: int, limit_bytes: int, redact: bool, stream: bool, edge: str = EDGE_EMBEDDED) -> None:
        self.path = path
        self.peer = peer
        self.number = number
        """The record's place in time (`core.history.number_of`)."""
        self.limit_bytes = limit_bytes
        """Of each body that are wanted; 0: none."""
        self.redact = redact
        self.stream = stream
        self.edge = edge
        """Through which edge it came (`core.history.EDGES`)."""
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

    def hold_request(self, data: bytes) -> None:
        """Hold the request's body, which is `data`, as much of it as is wanted."""
        limit = self.limit_bytes
        if limit == 0:
            return
        if len(data) > limit:
            self.is_cut = True
            data = data[:limit]
        self.request_body = data

    def drop(self) -> None:
        """Hold nothing any more."""
        self.request_body, self.response, self.held_bytes = None, [], 0

    async def take_request(self, body: Body) -> None:
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
        self, request_id: RequestId, conn: ClientConnection, head: RequestHead, route: Route, stream: bool, number: int
    ) -> Capture | None:
        """A capture for a request, before it is settled; None: it is not recorded. `number`: its place."""

    def leave(
        self,
        request_id: RequestId,
        conn: ClientConnection,
        head: RequestHead,
        route: Route,
        stream: bool,
        number: int,
        body: bytes,
        answer: bytes,
    ) -> None:
        """A request was settled of which no capture was opened; both bodies are here, whole. Nobody waits for what this leads to."""
