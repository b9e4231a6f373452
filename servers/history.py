"""From a request's end to its draft: what the router says of it, and what the edge captured, put together and handed to the store.

Decides what is recorded and how much of the bodies, by the operator's settings and the request's own wish. Must never know a statement of
the database. Invariants: what costs time (joining, redacting) happens elsewhere, and what else is to be done of a whole answer when
nobody waits for it (`gather`, at the latest before the store sends); with bodies off no byte of a prompt or an answer is captured; a
request that never came to a node is recorded too.
"""

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from core.events import Record, Route
from core.history import EDGE_EMBEDDED, Numbers
from core.units import RequestId, UnixMs
from edge.capture import Capture
from edge.denied import Asks, Peer
from edge.proxy import KEYED
from servers.drafts import POLICIES, Draft

HISTORY_HEADER: Final = b"x-router-history"
TOGETHER: Final = 32
"""Requests whose drafts are made at once. Made one by one they would hold up a client that was just answered and shares a core with us."""
LARGE_BYTES: Final = 1 << 16
"""Of bodies: a request that has more has its draft made at once, with those before it, so that no step of the loop copies much."""

_KEY_AT: Final = len(KEYED)
_REDACTED: Final = POLICIES.index("redacted")
_OFF: Final = POLICIES.index("off")


_Left: TypeAlias = tuple[Record, str, str, int, int, bool, bool, bytes, bytes]
"""What was told of a request, what its capture is made of, and both bodies, empty where none is kept."""


class History:
    """One per coordinator. Implements `edge.capture.Recorder`."""

    def __init__(
        self,
        *,
        put: Callable[[Draft], None],
        bodies: str,
        body_max_bytes: int,
        numbers: Numbers,
        clock: Callable[[], UnixMs],
        masks: tuple[tuple[str, ...], ...] = (),
    ) -> None:
        """`clock` tells the calendar's milliseconds."""
        self._put = put
        self._policy = POLICIES.index(bodies)
        self._body_max_bytes = body_max_bytes
        self._numbers = numbers
        self._clock = clock
        self._masks = masks
        self.client_address: Callable[[Peer, Asks], str] = lambda conn, _: conn.peer_host
        """The real client's, as far as it can be told."""
        self._open: dict[RequestId, Capture] = {}
        self._told: Record | None = None
        """Of the last request that had no capture."""
        self._left: list[_Left] = []
        """Requests whose drafts are still to be made."""
        # What the last request's headers and its connection's address meant: most clients send the same again, and then it is one object.
        self._fields: Mapping[bytes, bytes] | None = None
        self._host = ""
        self._address = ""
        self._limit_bytes, self._redact = 0, False

    def number(self) -> int:
        """The place of a request that has just come."""
        return self._numbers.next(self._clock())

    def open(
        self, request_id: RequestId, conn: Peer, head: Asks, route: Route, stream: bool, number: int, edge: str = EDGE_EMBEDDED
    ) -> Capture | None:
        """A capture for a request, before it is settled; None: it asks no model, so it is not recorded. `number`: its place. `edge`: one
        of `EDGES`."""
        if not route.runs_model:
            return None
        self._read(conn, head)
        capture = Capture(head.path, self._address, number, self._limit_bytes, self._redact, stream, edge)
        self._open[request_id] = capture
        return capture

    def _read(self, conn: Peer, head: Asks) -> None:
        """What a request's headers and its connection mean: whose it is, and how much of its bodies is kept."""
        fields, host = head.fields, conn.peer_host
        if fields is self._fields and host == self._host:
            return
        self._address = self.client_address(conn, head)
        wish = fields.get(HISTORY_HEADER)
        policy = self._policy if wish is None else max(self._policy, _policy_of(wish))
        self._limit_bytes, self._redact = (0 if policy == _OFF else self._body_max_bytes), policy == _REDACTED
        self._fields, self._host = fields, host

    def record(self, record: Record) -> None:
        """A request is over."""
        capture = self._open.pop(record.request_id, None)
        if capture is None:
            self._told = record
        else:
            self._draft(record, capture)

    def leave(
        self, request_id: RequestId, conn: Peer, head: Asks, route: Route, stream: bool, number: int, body: bytes, answer: bytes
    ) -> None:
        """What `open` and `record` are for others, of a request that was settled just now and had no capture."""
        record, self._told = self._told, None
        if record is None or record.request_id != request_id or not route.runs_model:
            return
        self._read(conn, head)
        limit_bytes = self._limit_bytes
        if limit_bytes == 0:
            body = answer = b""
        self._left.append((record, head.path, self._address, number, limit_bytes, self._redact, stream, body, answer))
        if len(self._left) >= TOGETHER or len(body) + len(answer) > LARGE_BYTES:
            self.gather()

    def gather(self) -> None:
        """Make the drafts of what was left, and hand them over."""
        left, self._left = self._left, []
        for record, path, address, number, limit_bytes, redact, stream, body, answer in left:
            capture = Capture(path, address, number, limit_bytes, redact, stream)
            capture.hold_request(body)
            capture.take(answer)
            self._draft(record, capture)

    def _draft(self, record: Record, capture: Capture) -> None:
        key_at = _KEY_AT if record.client.startswith(KEYED) else 0
        self._put(Draft(record, capture, key_at, self._masks))


def _policy_of(wish: bytes) -> int:
    """A request's wish as an index of `POLICIES`; what is none of them means the least, for somebody wanted something kept back."""
    word = wish.strip().lower().decode("latin-1")
    return POLICIES.index(word) if word in POLICIES else 2
