"""From a request's end to its draft: what the router says of it, and what the edge captured, put together and handed to the store.

Decides what is recorded and how much of the bodies, by the operator's settings and the request's own wish. Must never know a statement of
the database. Invariants: what costs time (joining, redacting) happens elsewhere; with bodies off no byte of a prompt or an answer is
captured; a request that never came to a node is recorded too.
"""

from collections.abc import Callable
from typing import Final

from core.events import Record, Route
from core.history import EDGE_EMBEDDED, Numbers
from core.units import RequestId, UnixMs
from edge.capture import Capture
from edge.denied import Asks, Peer
from edge.proxy import KEYED
from servers.drafts import POLICIES, Draft

HISTORY_HEADER: Final = b"x-router-history"
_KEY_AT: Final = len(KEYED)
_REDACTED: Final = POLICIES.index("redacted")
_OFF: Final = POLICIES.index("off")


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
        self._kept = self._kept_by(self._policy)

    def number(self) -> int:
        """The place of a request that has just come."""
        return self._numbers.next(self._clock())

    def open(
        self, request_id: RequestId, conn: Peer, head: Asks, route: Route, *, stream: bool, number: int, edge: str = EDGE_EMBEDDED
    ) -> Capture | None:
        """A capture for a request, before it is settled; None: it asks no model, so it is not recorded. `number`: its place. `edge`: one
        of `EDGES`."""
        if not route.runs_model:
            return None
        limit_bytes, redact = self._kept
        wish = head.fields.get(HISTORY_HEADER)
        if wish is not None:
            limit_bytes, redact = self._kept_by(max(self._policy, _policy_of(wish)))
        address = self.client_address(conn, head)
        capture = self._open[request_id] = Capture(route, head.path, address, number, limit_bytes, redact, stream, edge=edge)
        return capture

    def _kept_by(self, policy: int) -> tuple[int, bool]:
        """How much of a body is kept, and whether it is redacted."""
        return (0 if policy == _OFF else self._body_max_bytes), policy == _REDACTED

    def record(self, record: Record) -> None:
        """A request is over."""
        capture = self._open.pop(record.request_id, None)
        if capture is not None:
            key_at = _KEY_AT if record.client.startswith(KEYED) else 0
            self._put(Draft(record, capture, key_at, self._masks))


def _policy_of(wish: bytes) -> int:
    """A request's wish as an index of `POLICIES`; what is none of them means the least, for somebody wanted something kept back."""
    word = wish.strip().lower().decode("latin-1")
    return POLICIES.index(word) if word in POLICIES else 2
