"""What the loop leaves of a request for history.

Decides what goes to the process that writes (`servers.records` reads it there). Must never know a database, nor the wire. Invariants:
leaving a draft costs no more than referring to what is there already; joining and redacting happen elsewhere and later.
"""

from typing import Final, TypeAlias

import msgspec

from core.events import Record, Usage
from core.structs import mypyc_attr
from edge.capture import Capture

POLICIES: Final = ("full", "redacted", "off")
"""What may be kept of bodies; a request's own wish only lessens it."""

COUNT_MAX: Final = 2**63 - 1
_TEXTS: Final = ("model", "client", "agent_name", "message")

Row: TypeAlias = tuple[Record, str, str, int, int, bool, bool, str, bytes | None, list[bytes], bool, int, tuple[tuple[str, ...], ...], bool]
"""A draft as it is encoded, in the order of the fields of `servers.records.Left`."""


@mypyc_attr(acyclic=True)
class Draft:
    """A request that is over."""

    __slots__ = ("capture", "dropped", "key_at", "masks", "record")

    def __init__(self, record: Record, capture: Capture, key_at: int = 0, masks: tuple[tuple[str, ...], ...] = ()) -> None:
        self.record = record
        self.capture = capture
        self.key_at = key_at
        """Where in the client's name an API key's id begins; 0: it is no key."""
        self.masks = masks
        self.dropped = False
        """There was no room for its bodies."""

    @property
    def size_bytes(self) -> int:
        """Of the bodies it holds."""
        capture = self.capture
        body = capture.request_body
        return capture.held_bytes if body is None else capture.held_bytes + len(body)

    def drop_bodies(self) -> None:
        """There is no room for them."""
        self.capture.drop()
        self.dropped = True

    def row(self) -> Row:
        """What is encoded."""
        capture = self.capture
        return (
            self.record, capture.path, capture.peer, capture.number, capture.limit_bytes, capture.redact, capture.stream, capture.edge,
            capture.request_body, capture.response, capture.is_cut, self.key_at, self.masks, self.dropped,
        )  # fmt: skip

    def tidied(self) -> Row:
        """The same with texts and counts that any encoding takes: a client may send half a character, a node any number."""
        row = self.row()
        record, path, peer = row[:3]
        usage = record.usage
        texts = {name: _tidy(value) for name in _TEXTS if (value := getattr(record, name)) is not None}
        record = msgspec.structs.replace(record, usage=None if usage is None else _bounded(usage), **texts)
        return (record, _tidy(path), _tidy(peer), *row[3:])


def _bounded(usage: Usage) -> Usage:
    counts = {name: min(max(count, 0), COUNT_MAX) for name, count in msgspec.structs.asdict(usage).items()}
    return msgspec.structs.replace(usage, **counts)


def _tidy(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
