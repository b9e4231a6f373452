"""What waits to be written, until it is confirmed: records, small things, and what was asked of the database.

Decides the order, the size of a batch, and what is dropped when the database does not keep up (bodies first, then records, both counted:
contract 6). Must never know who writes, or when. Invariants: `put*` never wait and never fail; what waits, sent or not, takes at most
`PENDING_MAX_BYTES` of bodies and `RECORDS_MAX` records; of a small thing the last word is written last; what was asked is done after
everything that was put before. A draft is encoded when it is put: what it refers to is still in the processor's cache, and can go.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

from servers.drafts import Draft
from servers.store.messages import Delete, Done, Sync
from servers.store.packed import Packed

BATCH_MAX: Final = 256
"""Records of one batch."""
BATCH_MAX_BYTES: Final = 1 << 20
"""Bodies of one batch, unless one record has more."""
RECORDS_MAX: Final = 20_000
"""Records that wait; more are dropped, the newest first, so that what is kept has no holes in its past."""
PENDING_MAX_BYTES: Final = 64 << 20
"""Bodies that wait; more are dropped, and their records say so."""


Parcel: TypeAlias = Packed | Delete | Sync
"""What is sent, and kept until it is confirmed."""


class Written:
    """Counts of what became of history, for metrics and tests."""

    def __init__(self) -> None:
        self.records = 0
        self.bodies_dropped = 0
        self.records_dropped = 0
        self.failures = 0
        """Attempts to write that failed."""
        self.failing: str | None = None
        """Why nothing can be written now."""


class Outbox:
    """Of one coordinator; used by one thread."""

    def __init__(self) -> None:
        self._open = Packed()
        self._full: deque[Packed] = deque()
        """Before `_open`."""
        self._things: dict[tuple[str, str], bytes | None] = {}
        self._asked: deque[Delete | Sync] = deque()
        self._sent: dict[int, Parcel] = {}
        self._again: deque[Parcel] = deque()
        self.gather: Callable[[], None] = lambda: None
        """Has those who hold something back for a while `put` it."""
        self._numbers = 0
        self._records = 0
        self._bytes = 0
        self.written = Written()

    # ------------------------------------------------------------ put in

    def put(self, draft: Draft) -> None:
        """Keep a record."""
        if self._records >= RECORDS_MAX:
            self.written.records_dropped += 1
            return
        size = draft.size_bytes
        if size and self._bytes + size > PENDING_MAX_BYTES:
            draft.drop_bodies()
            self.written.bodies_dropped += 1
            size = 0
        batch = self._open
        if batch.drafts == BATCH_MAX or (batch.size_bytes + size > BATCH_MAX_BYTES and batch.drafts):
            self._full.append(batch)
            batch = self._open = Packed()
        batch.add(draft, size)
        self._records += 1
        self._bytes += size

    def put_thing(self, kind: str, name: str, data: bytes | None) -> None:
        """Keep a small thing, or forget it (None). The last word on it wins."""
        self._things[kind, name] = data

    def ask(self, make: Callable[[int], Delete | Sync]) -> int:
        """Have something done after what was put; returns its number."""
        self._numbers += 1
        self._asked.append(make(self._numbers))
        return self._numbers

    # ------------------------------------------------------------ taken out

    def next(self) -> Parcel | None:
        """What is to be sent now; it is kept until it is confirmed. None: nothing waits."""
        item = self._again.popleft() if self._again else self._batch() or (self._asked.popleft() if self._asked else None)
        if item is not None:
            self._sent[item.number] = item
        return item

    def _batch(self) -> Packed | None:
        self.gather()
        if self._full:
            batch = self._full.popleft()
        elif self._open.drafts or self._things:
            batch, self._open = self._open, Packed()
        else:
            return None
        things = [(kind, name, data) for (kind, name), data in self._things.items()]
        self._things.clear()
        self._numbers += 1
        batch.close(self._numbers, things)
        return batch

    def confirmed(self, done: Done) -> Parcel | None:
        """An item was done, or given up. Returns it, None when it is not known any more."""
        item = self._sent.pop(done.number, None)
        if isinstance(item, Packed):
            self._records -= item.drafts
            self._bytes -= item.size_bytes
            self.written.records += done.records
            self.written.records_dropped += done.dropped
        return item

    def again(self, numbers: Iterable[int]) -> None:
        """These were sent to somebody who is gone: they are to be sent again, before everything else, in their order."""
        items = [item for number in sorted(numbers) if (item := self._sent.pop(number, None)) is not None]
        self._again.extendleft(reversed(items))

    def give_up(self) -> None:
        """Nobody will write what waits: count it."""
        self.gather()
        items = [*self._sent.values(), *self._again, *self._full, self._open]
        self.written.records_dropped += sum(item.drafts for item in items if isinstance(item, Packed))
        self._open = Packed()
        self._full.clear()
        self._sent.clear()
        self._again.clear()
        self._records = self._bytes = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits, sent or not."""
        self.gather()
        return not (self._open.drafts or self._full or self._things or self._asked or self._sent or self._again)
