"""Drafts as the loop leaves them."""

from typing import Any

import msgspec

from core.events import Attempt, Ending, Record, Route, Usage
from core.history import number_of
from core.units import AgentId, RequestId, UnixMs
from edge.capture import Capture
from servers.drafts import Draft
from servers.records import Left

NOW = UnixMs(1_700_000_000_000)


def draft(number: int = 0, *, body: bytes = b"{}", **fields: Any) -> Draft:
    """Of a good chat."""
    made: dict[str, Any] = {
        "request_id": RequestId(f"id-{number}"), "route": Route.CHAT, "model": "m", "client": "10.0.0.1", "agent_id": AgentId("a"),
        "agent_name": "node", "ending": Ending.SUCCESS, "message": "", "status": 200, "duration_ms": 5.0, "queue_ms": 0.5, "ttft_ms": 2.0,
        "predicted_start_ms": None, "usage": Usage(prompt_tokens=3, output_tokens=4, load_ns=2_000_000),
        "attempts": (Attempt(agent_id=AgentId("a"), agent_name="node", outcome="success", duration_ms=5.0),), "body_bytes": 10, "chunks": 1,
    }  # fmt: skip
    capture = Capture("/api/chat", "10.0.0.2", number_of(NOW, number), 1 << 20, False, False)
    capture.hold_request(body)
    capture.take(b'{"done":true}')
    return Draft(Record(**{**made, **fields}), capture)


def read(made: Draft) -> Left:
    """As who writes it reads it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(made.row()), type=Left)
