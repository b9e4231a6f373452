"""The only place of the coordinator that reads a clock or makes an id.

Decides nothing. Two clocks: `now` orders what happens (it is Trio's, so a test can turn it by hand), `unix_ms` is the calendar's and
goes into messages and history only. Invariant: an id made here is a UUID v4.
"""

import hashlib
import os
import secrets
import time
import uuid
from datetime import UTC, datetime
from typing import Final

import trio

from core.units import AgentId, Instant, RequestId, UnixMs

_CODE_LETTERS: Final = "ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Without I and O, which are read as digits."""


def now() -> Instant:
    """Monotonic seconds; only inside a Trio run."""
    return Instant(trio.current_time())


def unix_ms() -> UnixMs:
    """Milliseconds since 1970 UTC."""
    return UnixMs(time.time_ns() // 1_000_000)


_VARIANT: Final = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


class _Ids:
    """UUIDs v4, with randomness fetched for many at once: one system call per request would be a third of a decision's time."""

    AT_ONCE: Final = 64

    def __init__(self) -> None:
        self._made: list[str] = []

    def new(self) -> str:
        if not self._made:
            digits = os.urandom(16 * self.AT_ONCE).hex()
            self._made = [_uuid4(digits[at : at + 32]) for at in range(0, len(digits), 32)]
        return self._made.pop()


def _uuid4(digits: str) -> str:
    """32 random digits as an id: the version takes the place of one, of another only the two bits that the variant leaves are used."""
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{_VARIANT[digits[16]]}{digits[17:20]}-{digits[20:]}"


_ids: Final = _Ids()


def new_request_id() -> RequestId:
    """An id for a request of a client."""
    return RequestId(_ids.new())


def new_agent_id() -> AgentId:
    """An id for a node nobody has seen before."""
    return AgentId(_ids.new())


def stable_agent_id(what: str) -> AgentId:
    """The id of a node that is known by its address alone: the same after every start."""
    digest = hashlib.sha256(what.encode()).digest()
    return AgentId(str(uuid.UUID(bytes=digest[:16], version=4)))


def new_code() -> str:
    """A code such as `ABCD-1234`, for a person to compare and type."""
    letters = "".join(secrets.choice(_CODE_LETTERS) for _ in range(4))
    return f"{letters}-{secrets.randbelow(10_000):04d}"


def new_secret() -> str:
    """A token of 256 bits that can stand in a header, a URL and a shell command."""
    return secrets.token_urlsafe(32)


def rfc3339(moment: UnixMs) -> str:
    """`moment` as RFC 3339 in UTC, milliseconds only where there are any: `2026-01-02T03:04:05Z`."""
    seconds, millis = divmod(moment, 1000)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{millis:03d}Z" if millis else f"{text}Z"
