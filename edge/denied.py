"""That a request may not pass, and the answer that says so.

Decides the answer's form; whoever denies decides why. Invariant: the answer is in the manners of the route that was asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol as Interface

from core.events import Protocol
from edge.headers import error_response
from edge.wire_heads import Header


class Peer(Interface):
    """Who is at the other end of a client's connection, as far as the rules of access ask."""

    @property
    def peer_host(self) -> str: ...

    @property
    def peer_port(self) -> int: ...


class Asks(Interface):
    """What is asked for: a path in its plain spelling, and the header fields by lower-case name."""

    @property
    def path(self) -> str: ...

    @property
    def fields(self) -> Mapping[bytes, bytes]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """Why a request may not pass."""

    status: int
    text: str
    headers: tuple[Header, ...] = ()

    def response(self, protocol: Protocol, request_id: str, *, keep_alive: bool) -> bytes:
        """The whole answer."""
        return error_response(self.status, self.text, protocol=protocol, request_id=request_id, keep_alive=keep_alive, extra=self.headers)
