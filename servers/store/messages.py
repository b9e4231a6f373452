"""What the coordinator and the process that writes say to each other: frames of MessagePack with their length before them.

Decides the form. Must never know who sends when. Invariants: items are numbered in the order in which they must be done, and each is
confirmed by its number; an item may come twice, which changes nothing.
"""

from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import msgspec

from servers.records import Left
from servers.store.filters import Filters

LENGTH_BYTES: Final = 4


class Config(msgspec.Struct, kw_only=True):
    """The first frame: what the process has to know."""

    url: str
    """The database's, with its password: never on a command line."""
    coordinator_id: str
    retention_days: int
    max_bytes: int
    bodies: str
    """What an import may keep of them (`servers.drafts.POLICIES`)."""
    body_max_bytes: int
    masks: tuple[tuple[str, ...], ...] = ()
    imported: tuple[str, ...] = ()
    """Files of an earlier router."""
    mirror: str | None = None
    """The file that the newest records are mirrored to."""


class Batch(msgspec.Struct, array_like=True, tag=0):
    """Records and small things to keep; `None`: forget the thing. Made by `servers.store.packed`."""

    number: int
    count: int
    """Of drafts."""
    packed: memoryview
    things: list[tuple[str, str, bytes | None]]

    @property
    def drafts(self) -> list[Left]:
        """Made anew each time that it is asked for: only who writes them now needs room for them."""
        return _drafts_of(self.packed)


class Delete(msgspec.Struct, array_like=True, tag=1):
    """Delete some of the records that are meant; answered with how many."""

    number: int
    filters: Filters


class Sync(msgspec.Struct, array_like=True, tag=2):
    """Answered once everything before it is done."""

    number: int


Item: TypeAlias = Batch | Delete | Sync
"""As the process that writes takes it."""


class Ready(msgspec.Struct, tag=True):
    """The process takes items."""


class Done(msgspec.Struct, tag=True):
    """An item was done: a batch is in the database, but for those records that were dropped."""

    number: int
    records: int = 0
    dropped: int = 0
    answer: int = 0
    error: str | None = None
    """Of what was asked: why it cannot be."""


class Failed(msgspec.Struct, tag=True):
    """An attempt to write failed; it is made again."""

    why: str


class Works(msgspec.Struct, tag=True):
    """After failures: it is written again."""


class Said(msgspec.Struct, tag=True):
    """A line for the coordinator's log."""

    level: str
    event: str
    fields: dict[str, Any] = {}


class Deleted(msgspec.Struct, tag=True):
    """So many bytes went by age and size since this was told last."""

    size_bytes: int


class Imported(msgspec.Struct, tag=True):
    """Earlier routers' files are done with."""


Word: TypeAlias = Ready | Done | Failed | Works | Said | Deleted | Imported

_encoder: Final = msgspec.msgpack.Encoder()
_drafts_of: Final = msgspec.msgpack.Decoder(list[Left]).decode
item_of: Final = msgspec.msgpack.Decoder(Item).decode
config_of: Final = msgspec.msgpack.Decoder(Config).decode
word_of: Final = msgspec.msgpack.Decoder(Word).decode


def framed(message: Config | Delete | Sync | Word) -> bytearray:
    """A message as a frame. Raises UnicodeEncodeError or OverflowError where a text or a number in it cannot be encoded."""
    frame = bytearray(LENGTH_BYTES)
    _encoder.encode_into(message, frame, LENGTH_BYTES)
    _put_length(frame)
    return frame


def _put_length(frame: bytearray) -> None:
    frame[:LENGTH_BYTES] = (len(frame) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "big")


class Frames:
    """Frames out of the pieces in which they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def take(self, data: bytes) -> Iterator[bytes]:
        """The frames that are whole with `data`."""
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= LENGTH_BYTES:
            end = at + LENGTH_BYTES + int.from_bytes(buffer[at : at + LENGTH_BYTES], "big")
            if len(buffer) < end:
                break
            with memoryview(buffer) as view:
                frame = bytes(view[at + LENGTH_BYTES : end])
            yield frame
            at = end
        del buffer[:at]
