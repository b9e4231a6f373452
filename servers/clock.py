"""The only place of the coordinator that reads a clock or makes an id.

Decides nothing. Two clocks: `now` orders what happens (it is Trio's, so a test can turn it by hand), `unix_ms` is the calendar's and
goes into messages and history only. Invariant: an id made here is a UUID v4.
"""

import hashlib
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


def new_request_id() -> RequestId:
    """An id for a request of a client."""
    return RequestId(str(uuid.uuid4()))


def new_agent_id() -> AgentId:
    """An id for a node nobody has seen before."""
    return AgentId(str(uuid.uuid4()))


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
