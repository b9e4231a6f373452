"""That a request may not pass, and the answer that says so.

Decides the answer's form; whoever denies decides why. Invariant: the answer is in the manners of the route that was asked.
"""

from dataclasses import dataclass

from core.events import Protocol
from edge.headers import error_response
from edge.wire_heads import Header


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied:
    """Why a request may not pass."""

    status: int
    text: str
    headers: tuple[Header, ...] = ()

    def response(self, protocol: Protocol, request_id: str, *, keep_alive: bool) -> bytes:
        """The whole answer."""
        return error_response(self.status, self.text, protocol=protocol, request_id=request_id, keep_alive=keep_alive, extra=self.headers)
