"""What a gateway tells of an answer that is not good to an edge that will not see it: nginx hands such requests to the coordinator.

nginx drops the body of an answer of 400 and more, so the headers say all that the coordinator needs to judge it as if it had asked
itself: which failure it was, or what Ollama answered. Decides nothing about it; must never know nodes or policy. Invariants: what
`telling` wrote `told` reads back as it was; where an answer does not fit into headers nothing is said, and the coordinator asks again;
`told` believes nothing that contradicts itself.
"""

from base64 import b64decode, b64encode
from http import HTTPStatus
from typing import Final

import msgspec

from core.events import Failure, Route
from edge.headers import safe_value
from edge.relay import FAILURE_HEADER, FAILURES, Failed, Kept
from edge.verdicts import error_text, whole_fault
from edge.wire import ResponseHead
from edge.wire_heads import Header

EDGE_KEY: Final = b"x-ollama-router-edge"
NGINX: Final = b"nginx"
"""`EDGE_KEY`'s value on requests that nginx brings to a gateway."""

ANSWER_HEADER: Final = b"X-Ollama-Router-Answer"
"""An answer's body in base64: Ollama's, or `{"error": ...}` in the gateway's own words."""
ANSWER_TYPE_HEADER: Final = b"X-Ollama-Router-Answer-Type"
"""Its content type, when it is Ollama's."""
ANSWER_MAX_BYTES: Final = 3 << 10
"""A body that is longer does not fit: nginx wants a whole head in one buffer."""
TEXT_MAX_CHARS: Final = 400
"""Of the gateway's own words."""

_FAILURE_KEY: Final = FAILURE_HEADER.lower()
_ANSWER_KEY: Final = ANSWER_HEADER.lower()
_TYPE_KEY: Final = ANSWER_TYPE_HEADER.lower()
_JSON: Final = b"application/json; charset=utf-8"


class Telling(msgspec.Struct, frozen=True):
    """An answer for nginx."""

    status: int
    body: bytes
    content_type: str
    headers: list[Header]


def telling(failed: Failed) -> Telling:
    """The answer that says that, and why, there is no good one."""
    failure, kept = failed.failure, failed.kept
    status = failed.status if failure is Failure.ANSWERED else 502
    if kept is not None:
        kind = kept.head.fields.get(b"content-type", b"")
        headers: list[Header] = []
        if len(kept.body) <= ANSWER_MAX_BYTES:
            headers = [(ANSWER_HEADER, b64encode(kept.body)), (ANSWER_TYPE_HEADER, kind)]
            if failure is Failure.INCOMPLETE:
                headers.append((FAILURE_HEADER, failure._value_.encode()))
        return Telling(status, kept.body, safe_value(kind.decode("latin-1")).decode("ascii"), headers)
    body = msgspec.json.encode({"error": failed.text[:TEXT_MAX_CHARS] or "Ollama failed before it answered"})
    told_as = [] if failure is Failure.ANSWERED else [(FAILURE_HEADER, failure._value_.encode()), (ANSWER_HEADER, b64encode(body))]
    return Telling(status, body, _JSON.decode(), told_as)


def told(route: Route, fields: dict[bytes, bytes], status: int) -> Failed | None:
    """What these headers, which nginx took from a gateway's answer of this status (0: it had none), tell; None: nothing to rely on."""
    body = _decoded(fields.get(_ANSWER_KEY))
    failure = FAILURES.get(fields.get(_FAILURE_KEY, b""))
    if failure is Failure.INCOMPLETE:
        fault = None if body is None else whole_fault(route, body)
        if body is None or fault is None or fault.failure is not Failure.INCOMPLETE:
            return None
        kept = _kept(200, body, fields, fault.text)
        return Failed(failure=failure, status=200, text=fault.text, repeat_guard=fault.repeat_guard, kept=kept)
    if failure is not None and failure is not Failure.ANSWERED:
        return Failed(failure=failure, text=error_text(body) if body is not None else "the node failed before it answered")
    if body is None or not 400 <= status <= 599:
        return None
    text = error_text(body)
    return Failed(failure=Failure.ANSWERED, status=status, text=text, kept=_kept(status, body, fields, text))


def _kept(status: int, body: bytes, fields: dict[bytes, bytes], text: str) -> Kept:
    kind = fields.get(_TYPE_KEY) or _JSON
    try:
        reason = HTTPStatus(status).phrase.encode("ascii")
    except ValueError:
        reason = b"Status"
    head = ResponseHead(status, reason, [(b"Content-Type", kind)], {b"content-type": kind}, "length", len(body), keeps=True)
    return Kept(head=head, body=body, text=text)


def _decoded(value: bytes | None) -> bytes | None:
    if value is None:
        return None
    try:
        return b64decode(value, validate=True)
    except ValueError:
        return None
