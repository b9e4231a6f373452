"""The only place of the coordinator that reads a clock or makes an id.

Decides nothing. Two clocks: `now` orders what happens (it is Trio's, so a test can turn it by hand), `unix_ms` is the calendar's and
goes into messages, history and ids only. Invariant: an id made here has the form of a UUID v4, and 74 random bits or more.
"""

import hashlib
import os
import secrets
import time
import uuid
from datetime import UTC, datetime
from typing import Any, Final, cast

import trio

from core.units import AgentId, Instant, RequestId, UnixMs

_time_s: Final = time.time
_CODE_LETTERS: Final = "ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Without I and O, which are read as digits."""


def now() -> Instant:
    """Monotonic seconds; only inside a Trio run."""
    return Instant(trio.current_time())


def unix_ms() -> UnixMs:
    """Milliseconds since 1970 UTC."""
    now: Any = int(_time_s() * 1000)  # else it took a call to say that it is one
    return now  # type: ignore[no-any-return]


_VERSION: Final = bytes(0x40 | octet & 0x0F for octet in range(256))
_VARIANT: Final = bytes(0x80 | octet & 0x3F for octet in range(256))
_RANDOM_BYTES: Final = 10
"""Of an id; the 6 before them tell the millisecond."""


class _Ids:
    """UUIDs v4, with randomness fetched for many at once: one system call per request would be a third of a decision's time.

    They begin with the time: history's index of ids grows at its end then. Each id that is nothing but random is a page of it written
    anew, which took a third of what a record costs.
    """

    AT_ONCE: Final = 64

    def __init__(self) -> None:
        self._made: list[RequestId] = []

    def new(self) -> RequestId:
        """An id for a request of a client."""
        if not self._made:
            octets = bytearray(os.urandom(_RANDOM_BYTES * self.AT_ONCE))
            octets[0::_RANDOM_BYTES] = octets[0::_RANDOM_BYTES].translate(_VERSION)
            octets[2::_RANDOM_BYTES] = octets[2::_RANDOM_BYTES].translate(_VARIANT)
            pairs = octets.hex("-", -2)  # 25 characters each, its last a dash
            now = f"{unix_ms():012x}"
            head = f"{now[:8]}-{now[8:]}-"
            made = [f"{head}{pairs[at : at + 14]}{pairs[at + 15 : at + 19]}{pairs[at + 20 : at + 24]}" for at in range(0, len(pairs), 25)]
            self._made = cast(list[RequestId], made)
        return self._made.pop()


_ids: Final = _Ids()

new_request_id: Final = _ids.new


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
