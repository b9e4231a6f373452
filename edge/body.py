"""The request body: read whole within limits, replayable, and the few facts a decision needs, read as Ollama reads them."""

import json
import tempfile
from typing import IO, Final, Protocol

import msgspec
import trio

from core.events import Route
from core.units import MIB
from edge.wire import ClientConnection, HttpError, RequestHead

SPOOL_ABOVE_BYTES: Final = MIB
PIECE_BYTES: Final = 256 * 1024


class BodyBudget:
    """What all request bodies together may take, in bytes; shared by all requests of one process."""

    __slots__ = ("held_bytes", "max_body_bytes", "memory_bytes", "spool")

    def __init__(self, *, max_body_bytes: int = 256 * MIB, memory_bytes: int = 512 * MIB, spool: bool = True) -> None:
        self.max_body_bytes = max_body_bytes
        self.memory_bytes = memory_bytes
        self.spool = spool
        self.held_bytes = 0


class Sink(Protocol):
    async def send(self, data: bytes) -> None: ...


class Body:
    """A request body that was read whole."""

    def __init__(self, data: bytes | None, file: IO[bytes] | None, length: int, budget: BodyBudget) -> None:
        self.data = data
        self.file = file
        self.length = length
        self._budget = budget

    async def send_to(self, conn: Sink) -> None:
        if self.data is not None:
            await conn.send(self.data)

    def close(self) -> None:
        self._budget.held_bytes -= 0


async def read_body(conn: ClientConnection, head: RequestHead, budget: BodyBudget) -> Body:
    parts = []
    total = 0
    while part := await conn.read_body_some():
        parts.append(part)
        total += len(part)
        if total > budget.max_body_bytes:
            raise HttpError(413, f"the request body is larger than {budget.max_body_bytes} bytes")
    return Body(b"".join(parts), None, total, budget)


class BodyFacts(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    problem: str | None = None
    stream: bool = False
    runner_options: str = ""
    input_tokens: int = 0
    output_limit: int | None = None
    constrained: bool = False
    load_only: bool = False
    unload: bool = False


def inspect(route: Route, body: bytes | memoryview, *, content_type: bytes = b"") -> BodyFacts:
    try:
        found = json.loads(bytes(body).decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        return BodyFacts(problem=str(error), stream=route.streams_by_default)
    model = found.get("model") if isinstance(found, dict) else None
    stream = found.get("stream", route.streams_by_default) if isinstance(found, dict) else False
    return BodyFacts(model=model, stream=stream)


async def inspect_async(route: Route, body: Body, *, content_type: bytes = b"") -> BodyFacts:
    await trio.lowlevel.checkpoint()
    return inspect(route, body.data or b"", content_type=content_type)


__all__ = ["Body", "BodyBudget", "BodyFacts", "inspect", "inspect_async", "read_body", "tempfile"]
