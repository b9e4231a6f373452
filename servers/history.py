"""From a request's end to its record: what the router says of it, and what the edge captured, put together and handed to the store.

Decides what is recorded and how much of the bodies, by the operator's settings and the request's own wish. Must never know a statement of
the database. Invariants: what costs time (joining, redacting) happens in the writer's thread; with bodies off no byte of a prompt or an
answer leaves this module; a request that never came to a node is recorded too.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec

from core.events import Record, Route
from core.history import (
    BODY_CUT,
    BODY_DROPPED,
    BODY_NOT_CAPTURED,
    BODY_OFF,
    BODY_REDACTED,
    BODY_WHOLE,
    EDGE_EMBEDDED,
    NUMBER_SHIFT,
    HistoryRecord,
    Numbers,
    redacted,
)
from core.joining import joined
from core.units import RequestId, UnixMs
from edge.capture import Capture
from edge.denied import Asks, Peer
from edge.proxy import KEYED

HISTORY_HEADER: Final = b"x-router-history"
POLICIES: Final = ("full", "redacted", "off")
"""What may be kept of bodies; a request's own wish only lessens it."""

NS_PER_MS: Final = 1_000_000

_encode: Final = msgspec.json.Encoder().encode


class Draft:
    """A record that the writer finishes. `size_bytes`: of the bodies it holds."""

    __slots__ = ("_capture", "_completed_at_ms", "_dropped", "_masks", "_record", "size_bytes")

    def __init__(self, record: Record, capture: Capture, *, completed_at_ms: UnixMs, masks: tuple[tuple[str, ...], ...]) -> None:
        self._record = record
        self._capture = capture
        self._completed_at_ms = completed_at_ms
        self._masks = masks
        self._dropped = False
        self.size_bytes = capture.held_bytes + len(capture.request_body or b"")

    def drop_bodies(self) -> None:
        """There is no time for them."""
        self._capture.request_body = None
        self._capture.response = []
        self._dropped = True
        self.size_bytes = 0

    def finished(self) -> HistoryRecord:
        """The record."""
        record, capture, usage = self._record, self._capture, self._record.usage
        request_body, response_body, bodies = self._bodies()
        is_key = record.client.startswith(KEYED)
        attempts: list[dict[str, Any]] = [
            {"node": attempt.agent_name, "outcome": attempt.outcome, "ms": round(attempt.duration_ms, 3)} for attempt in record.attempts
        ]
        return HistoryRecord(
            number=capture.number,
            request_id=record.request_id,
            at_ms=UnixMs(capture.number >> NUMBER_SHIFT),
            completed_at_ms=self._completed_at_ms,
            request_type=record.route.value,
            path=capture.path,
            model=record.model,
            agent_id=record.agent_id,
            agent_name=record.agent_name,
            client=capture.peer if is_key else record.client,
            key_id=record.client[len(KEYED) :] if is_key else None,
            status=record.ending.value,
            message=record.message,
            http_status=record.status,
            duration_ms=record.duration_ms,
            queue_ms=record.queue_ms,
            ttft_ms=record.ttft_ms,
            predicted_start_ms=record.predicted_start_ms,
            prompt_tokens=0 if usage is None else usage.prompt_tokens,
            output_tokens=0 if usage is None else usage.output_tokens,
            load_ms=0.0 if usage is None else usage.load_ns / NS_PER_MS,
            attempts=_encode(attempts),
            edge=capture.edge,
            chunks=record.chunks,
            body_bytes=record.body_bytes,
            request_body=request_body,
            response_body=response_body,
            bodies=bodies,
            observed_start_ms=record.observed_start_ms,
        )

    def _bodies(self) -> tuple[bytes | None, bytes | None, str]:
        capture = self._capture
        if self._dropped:
            return None, None, BODY_DROPPED
        if capture.limit_bytes == 0:
            return None, None, BODY_OFF
        if capture.edge != EDGE_EMBEDDED:
            return None, None, BODY_NOT_CAPTURED
        request_body, response_body = capture.request_body, b"".join(capture.response)
        if capture.stream and response_body:
            response_body = joined(capture.route.protocol, response_body) or response_body
        state = BODY_CUT if capture.is_cut else BODY_WHOLE
        if not capture.redact:
            return request_body, response_body or None, state
        return (
            redacted(request_body, self._masks) if request_body else None,
            redacted(response_body, self._masks) if response_body else None,
            BODY_CUT if capture.is_cut else BODY_REDACTED,
        )


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
        client_address: Callable[[Peer, Asks], str] = lambda conn, _: conn.peer_host,
    ) -> None:
        self._put = put
        self._policy = POLICIES.index(bodies)
        self._body_max_bytes = body_max_bytes
        self._numbers = numbers
        self._clock = clock
        self._masks = masks
        self._client_address = client_address
        self._open: dict[RequestId, Capture] = {}

    def open(
        self, request_id: RequestId, conn: Peer, head: Asks, route: Route, *, stream: bool, edge: str = EDGE_EMBEDDED
    ) -> Capture | None:
        """A capture for a request that was just read; None: it asks no model, so it is not recorded. `edge`: one of `EDGES`."""
        if not route.runs_model:
            return None
        policy = self._policy
        wish = head.fields.get(HISTORY_HEADER)
        if wish is not None:
            policy = max(policy, _policy_of(wish))
        capture = self._open[request_id] = Capture(
            route=route,
            path=head.path,
            peer=self._client_address(conn, head),
            number=self._numbers.next(self._clock()),
            limit_bytes=0 if policy == 2 else self._body_max_bytes,
            redact=policy == 1,
            stream=stream,
            edge=edge,
        )
        return capture

    def restrict(self, record: HistoryRecord) -> None:
        """Keep of a record that came from elsewhere what would be kept of a request's bodies."""
        limit, masks = self._body_max_bytes, self._masks
        bodies = [record.request_body, record.response_body]
        if self._policy == 2:
            bodies, record.bodies = [None, None], BODY_OFF
        elif self._policy == 1:
            bodies, record.bodies = [redacted(body, masks) if body else None for body in bodies], BODY_REDACTED
        else:
            record.bodies = BODY_WHOLE
        if any(len(body) > limit for body in bodies if body):
            bodies, record.bodies = [body and body[:limit] for body in bodies], BODY_CUT
        record.request_body, record.response_body = bodies

    def record(self, record: Record) -> None:
        """A request is over."""
        capture = self._open.pop(record.request_id, None)
        if capture is None:
            return
        self._put(Draft(record, capture, completed_at_ms=self._clock(), masks=self._masks))


def _policy_of(wish: bytes) -> int:
    """A request's wish as an index of `POLICIES`; what is none of them means the least, for somebody wanted something kept back."""
    word = wish.strip().lower().decode("latin-1")
    return POLICIES.index(word) if word in POLICIES else 2


def body_value(data: bytes | None) -> Any:
    """A kept body as it stands in JSON: as it is where it is an object or a list, else as text."""
    if data is None:
        return None
    data = bytes(data)
    try:
        return msgspec.Raw(data) if isinstance(msgspec.json.decode(data), (dict, list)) else data.decode("utf-8", "replace")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return data.decode("utf-8", "replace")
