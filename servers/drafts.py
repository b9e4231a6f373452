"""What the loop leaves of a request for history, and the record that is made of it, elsewhere and later.

Decides what of the bodies is in a record. Must never know a database, nor the wire: it is read and finished in the process that writes.
Invariants: leaving a draft costs no more than referring to what is there already; joining and redacting happen in `finished`.
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
from edge.capture import Capture

POLICIES: Final = ("full", "redacted", "off")
"""What may be kept of bodies; a request's own wish only lessens it."""

NS_PER_MS: Final = 1_000_000
COUNT_MAX: Final = 2**63 - 1

_encode: Final = msgspec.json.Encoder().encode


class _Tried(msgspec.Struct, gc=False):
    """One attempt, as a record tells it."""

    node: str
    outcome: str
    ms: float


class Draft(msgspec.Struct, array_like=True, gc=False):
    """A request that is over. Made by position: it is on the way of every request."""

    record: Record
    capture: Capture
    key_at: int = 0
    """Where in the client's name an API key's id begins; 0: it is no key."""
    masks: tuple[tuple[str, ...], ...] = ()
    dropped: bool = False
    """There was no room for its bodies."""

    @property
    def size_bytes(self) -> int:
        """Of the bodies it holds."""
        body = self.capture.request_body
        return self.capture.held_bytes if body is None else self.capture.held_bytes + len(body)

    def drop_bodies(self) -> None:
        """There is no room for them."""
        capture = self.capture
        capture.request_body, capture.response, capture.held_bytes = None, [], 0
        self.dropped = True

    def tidied(self) -> "Draft":
        """The same with texts and counts that any encoding takes: a client may send half a character, a node any number."""
        record, usage = self.record, self.record.usage
        if usage is not None:
            usage = msgspec.structs.replace(
                usage, **{name: min(max(count, 0), COUNT_MAX) for name, count in msgspec.structs.asdict(usage).items()}
            )
        texts = {
            name: _tidy(value)
            for name in ("model", "client", "agent_name", "message")
            if (value := getattr(record, name)) is not None
        }  # fmt: skip
        capture = msgspec.structs.replace(self.capture, path=_tidy(self.capture.path), peer=_tidy(self.capture.peer))
        return msgspec.structs.replace(self, record=msgspec.structs.replace(record, usage=usage, **texts), capture=capture)

    def finished(self) -> HistoryRecord:
        """The record."""
        record, capture, usage = self.record, self.capture, self.record.usage
        request_body, response_body, bodies = self._bodies()
        attempts = [_Tried(one.agent_name, one.outcome, int(one.duration_ms * 1000 + 0.5) / 1000) for one in record.attempts]
        number, key_at, client = capture.number, self.key_at, record.client
        at_ms = UnixMs(number >> NUMBER_SHIFT)
        return HistoryRecord(
            number,
            record.request_id,
            at_ms,
            UnixMs(at_ms + int(record.duration_ms + 0.5)),
            record.route._value_,
            capture.path,
            record.model,
            record.agent_id,
            record.agent_name,
            capture.peer if key_at else client,
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
            capture.edge,
            record.chunks,
            record.body_bytes,
            request_body,
            response_body,
            bodies,
            record.observed_start_ms,
        )

    def _bodies(self) -> tuple[bytes | None, bytes | None, str]:
        capture = self.capture
        if self.dropped:
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
            redacted(request_body, self.masks) if request_body else None,
            redacted(response_body, self.masks) if response_body else None,
            BODY_CUT if capture.is_cut else BODY_REDACTED,
        )


def _tidy(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


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
