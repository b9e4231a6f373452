"""A batch of drafts as a frame that grows draft by draft.

Decides the form of such a frame (`servers.store.messages.Batch` reads it). Must never know who sends it, or when. Invariant: of a batch
nothing lives but its frame, and each draft is encoded while all of it is at hand.
"""

import struct
from typing import Final

import msgspec

from servers.drafts import Draft
from servers.store.messages import LENGTH_BYTES, Batch, item_of

_encode_into: Final = msgspec.msgpack.Encoder().encode_into

_PACKED_HEAD: Final = struct.Struct(">IBBBQBIBIBI")
"""What comes before the drafts of a batch's frame: its length, a list of five, the tag, the number, how many, so many bytes (else who reads
the rest would have to read the drafts too), a list of so many."""
_LIST_BYTES: Final = 5
"""Of those, what belongs to the bytes."""
_END: Final = -1


class Packed:
    """A `Batch` as a frame that grows draft by draft: each is encoded while all of it is at hand, and nothing of it is kept for that."""

    __slots__ = ("drafts", "frame", "number", "size_bytes")

    def __init__(self) -> None:
        self.number = 0
        self.drafts = 0
        """How many there are."""
        self.size_bytes = 0
        """Of their bodies."""
        self.frame = bytearray(_PACKED_HEAD.size)

    def add(self, draft: Draft, size_bytes: int) -> None:
        """One draft more, whatever texts and numbers are in it. `size_bytes`: of its bodies."""
        frame = self.frame
        end = len(frame)
        try:
            _encode_into(draft.row(), frame, _END)
        except (UnicodeEncodeError, OverflowError):
            del frame[end:]
            _encode_into(draft.tidied(), frame, _END)
        self.drafts += 1
        self.size_bytes += size_bytes

    def close(self, number: int, things: list[tuple[str, str, bytes | None]]) -> None:
        """It is to be sent, as it is."""
        self.number = number
        frame, count = self.frame, self.drafts
        packed_bytes = len(frame) - _PACKED_HEAD.size + _LIST_BYTES
        _encode_into(things, frame, _END)
        length = len(frame) - LENGTH_BYTES
        _PACKED_HEAD.pack_into(frame, 0, length, 0x95, 0, 0xCF, number, 0xCE, count, 0xC6, packed_bytes, 0xDD, count)

    def batch(self) -> Batch:
        """What the process that writes makes of it."""
        found = item_of(bytes(memoryview(self.frame)[LENGTH_BYTES:]))
        assert isinstance(found, Batch)
        return found
