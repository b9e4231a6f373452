"""The record that is made of what the loop left of a request, and what of bodies may be in it.

Decides how a draft becomes a record: joined, redacted, counted. Must never know a database, nor the wire: it is read and finished in the
process that writes. Invariant: what came from elsewhere keeps no more of bodies than what is captured here would.
"""

from typing import Any, Final

import msgspec

from core.events import Record
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
    redacted,
)
from core.joining import joined
from core.units import UnixMs

NS_PER_MS: Final = 1_000_000

_encode: Final = msgspec.json.Encoder().encode


class _Tried(msgspec.Struct, gc=False):
    """One attempt, as a record tells it."""

    node: str
    outcome: str
    ms: float


class Left(msgspec.Struct, array_like=True, gc=False):
    """A request that is over, as `servers.drafts.Draft.row` left it."""

    record: Record
    path: str
    peer: str
    number: int
    limit_bytes: int
    redact: bool
    stream: bool
    edge: str
    request_body: bytes | None
    response: list[bytes]
    is_cut: bool
    key_at: int
    masks: tuple[tuple[str, ...], ...]
    dropped: bool

    def finished(self) -> HistoryRecord:
        """The record."""
        record, usage = self.record, self.record.usage
        request_body, response_body, bodies = self._bodies()
        attempts = [_Tried(one.agent_name, one.outcome, int(one.duration_ms * 1000 + 0.5) / 1000) for one in record.attempts]
        number, key_at, client = self.number, self.key_at, record.client
        at_ms = UnixMs(number >> NUMBER_SHIFT)
        return HistoryRecord(
            number,
            record.request_id,
            at_ms,
            UnixMs(at_ms + int(record.duration_ms + 0.5)),
            record.route._value_,
            self.path,
            record.model,
            record.agent_id,
            record.agent_name,
            self.peer if key_at else client,
            client[key_at:] if key_at else None,
            record.ending._value_,
            record.message,
            record.status,
            record.duration_ms,
            record.queue_ms,
            record.ttft_ms,
            record.predicted_start_ms,
            0 if usage is None else usage.prompt_tokens,
            0 if usage is None else usage.output_tokens,
            0.0 if usage is None else usage.load_ns / NS_PER_MS,
            _encode(attempts),
            self.edge,
            record.chunks,
            record.body_bytes,
            request_body,
            response_body,
            bodies,
            record.observed_start_ms,
        )

    def _bodies(self) -> tuple[bytes | None, bytes | None, str]:
        if self.dropped:
            return None, None, BODY_DROPPED
        if self.limit_bytes == 0:
            return None, None, BODY_OFF
        if self.edge != EDGE_EMBEDDED:
            return None, None, BODY_NOT_CAPTURED
        request_body, response_body = self.request_body, b"".join(self.response)
        if self.stream and response_body:
            response_body = joined(self.record.route.protocol, response_body) or response_body
        state = BODY_CUT if self.is_cut else BODY_WHOLE
        if not self.redact:
            return request_body, response_body or None, state
        return (
            redacted(request_body, self.masks) if request_body else None,
            redacted(response_body, self.masks) if response_body else None,
            BODY_CUT if self.is_cut else BODY_REDACTED,
        )


def restrict(record: HistoryRecord, policy: str, *, limit_bytes: int, masks: tuple[tuple[str, ...], ...]) -> None:
    """Keep of a record that came from elsewhere what would be kept of a request's bodies. `policy`: one of `POLICIES`."""
    bodies = [record.request_body, record.response_body]
    if policy == "off":
        bodies, record.bodies = [None, None], BODY_OFF
    elif policy == "redacted":
        bodies, record.bodies = [redacted(body, masks) if body else None for body in bodies], BODY_REDACTED
    else:
        record.bodies = BODY_WHOLE
    if any(len(body) > limit_bytes for body in bodies if body):
        bodies, record.bodies = [body and body[:limit_bytes] for body in bodies], BODY_CUT
    record.request_body, record.response_body = bodies


def body_value(data: bytes | None) -> Any:
    """A kept body as it stands in JSON: as it is where it is an object or a list, else as text."""
    if data is None:
        return None
    data = bytes(data)
    try:
        return msgspec.Raw(data) if isinstance(msgspec.json.decode(data), (dict, list)) else data.decode("utf-8", "replace")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return data.decode("utf-8", "replace")
