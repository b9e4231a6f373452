"""A request body sent with a few of its values replaced: which bytes those are, and all others as they came.

Decides where a value stands that Ollama will read (the last of several spellings, `null` aside, as `edge.body` reads it); never what is
to stand there. Bodies stay where they are, in memory or on disk: what is replaced is put in while they are sent.

Invariant: outside of its patches a body is sent byte for byte; patches do not overlap.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from core.events import Route
from edge.body import PIECE_BYTES, Body, Sink, scan
from edge.headers import go_json
from edge.jsonscan import Member, Scanner, fold

_NULL: Final = 0x6E
_QUOTE: Final = 0x22
_OBJECT: Final = 0x7B


class Span(msgspec.Struct, frozen=True, gc=False):
    """Bytes of a body: from `start`, up to `end`."""

    start: int
    end: int

    def becomes(self, data: bytes) -> "Patch":
        """These bytes replaced by `data`."""
        return Patch(self.start, self.end, data)


class Patch(msgspec.Struct, frozen=True, gc=False, order=True):
    """Bytes of a body, and what stands in their place."""

    start: int
    end: int
    data: bytes


class Patched:
    """A body with patches; may be sent several times, like the body itself, which must stay open as long."""

    __slots__ = ("_body", "_patches", "data", "length")

    def __init__(self, body: Body, patches: Sequence[Patch]) -> None:
        self._body = body
        self._patches = sorted(patches)
        self.length = body.length + sum(len(patch.data) - (patch.end - patch.start) for patch in patches)
        self.data = None if body.data is None else self._joined(body.data)

    def _joined(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        at = 0
        for patch in self._patches:
            parts += (data[at : patch.start], patch.data)
            at = patch.end
        return b"".join((*parts, data[at:]))

    async def send_to(self, conn: Sink) -> None:
        """Send all of it. Raises what `conn.send` raises."""
        at = 0
        for patch in self._patches:
            await self._send(conn, at, patch.start)
            if patch.data:
                await conn.send(patch.data)
            at = patch.end
        await self._send(conn, at, self._body.length)

    async def _send(self, conn: Sink, at: int, end: int) -> None:
        while at < end:
            piece = (await self._body.read_at(at))[: min(PIECE_BYTES, end - at)]
            await conn.send(piece)
            at += len(piece)


def text_value(text: str) -> bytes:
    """`text` as a JSON string."""
    return go_json(text)


class Places(msgspec.Struct, frozen=True):
    """Where the values stand that may be replaced; None: there is no such value."""

    model: Span | None = None
    num_ctx: Span | None = None


async def find_places(route: Route, body: Body) -> Places:
    """The places of a JSON body that node and router read alike. In steps, so that it never holds up the loop."""
    scanner = await scan(body, _wanted)
    scanner.close()
    return places_of(route, scanner.members)


def places_of(route: Route, members: Sequence[Member]) -> Places:
    """The places of these members, which came from the exact scanner."""
    model = _winner(members, "model")
    if route is Route.SHOW and (model is None or model.raw == b'""'):
        model = _winner(members, "name") or model
    num_ctx: Span | None = None
    for member in members:
        if member.name == "options" and member.first == _OBJECT and member.raw is not None:
            num_ctx = _inner(member, member.raw, "num_ctx") or num_ctx
        elif member.name == "options" and member.first == _NULL:
            num_ctx = None
    return Places(None if model is None or model.first != _QUOTE else _span(model), num_ctx)


def _wanted(key: str) -> str | None:
    name = fold(key)
    return name if name in ("model", "name", "options") else None


def _winner(members: Sequence[Member], name: str) -> Member | None:
    """The last one of that name that is not null: null leaves a string as it was."""
    return next((member for member in reversed(members) if member.name == name and member.first != _NULL), None)


def _span(member: Member, offset: int = 0) -> Span:
    return Span(offset + member.start, offset + member.start + member.size)


def _inner(outer: Member, raw: bytes, key: str) -> Span | None:
    """The last value of `key`, spelled just so, in the object `raw`: options are a map for Go, without folding."""
    scanner = Scanner(lambda name: name if name == key else None)
    scanner.feed(raw)
    scanner.close()
    return _span(scanner.members[-1], outer.start) if scanner.members else None
