"""Checksums of how a prompt begins, by which the core knows a conversation again without knowing a word of it.

Decides nothing. A few microseconds for a prompt of 64 KiB, and nothing beyond. Never keeps text.
"""

import zlib
from collections.abc import Iterable
from typing import Final

from core.affinity import FIRST_BYTES

PREFIX_MAX_BYTES: Final = 64 << 10
"""Of a prompt's beginning that is looked at."""


def prefix_keys(text: bytes, before: Iterable[bytes] = ()) -> tuple[int, ...]:
    """Of the first `FIRST_BYTES` of `text`, of twice as many, and so on, as far as it goes. `before`: what a model reads before it; all of
    that must be the same."""
    view = memoryview(text)
    last = min(len(view), PREFIX_MAX_BYTES)
    if last < FIRST_BYTES:
        return ()
    found: list[int] = []
    checksum = 0
    for part in before:
        checksum = zlib.crc32(part, checksum)
    at, until = 0, FIRST_BYTES
    while until <= last:
        checksum = zlib.crc32(view[at:until], checksum)
        found.append(checksum)
        at, until = until, until * 2
    return tuple(found)
