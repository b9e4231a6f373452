"""What waits to be written, until it is confirmed: records, small things, and what was asked of the database.

Decides the order, the size of a batch, and what is dropped when the database does not keep up (bodies first, then records, both counted:
contract 6). Must never know who writes, or when. Invariants: `put*` never wait and never fail; what waits, sent or not, takes at most
`PENDING_MAX_BYTES` of bodies and `RECORDS_MAX` records; of a small thing the last word is written last; what was asked is done after
everything that was put before.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from servers.drafts import Draft
from servers.store.messages import Batch, Delete, Done, Item, Sync

BATCH_MAX: Final = 256
"""Records of one batch: they are encoded in half a millisecond."""
BATCH_MAX_BYTES: Final = 1 << 20
"""Bodies of one batch, unless one record has more."""
RECORDS_MAX: Final = 20_000
"""Records that wait; more are dropped, the newest first, so that what is kept has no holes in its past."""
PENDING_MAX_BYTES: Final = 64 << 20
"""Bodies that wait; more are dropped, and their records say so."""


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
        self._drafts: deque[Draft] = deque()
        self._things: dict[tuple[str, str], bytes | None] = {}
        self._asked: deque[Delete | Sync] = deque()
        self._sent: dict[int, Item] = {}
        self._again: deque[Item] = deque()
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
        self._records += 1
        self._bytes += size
        self._drafts.append(draft)

    def put_thing(self, kind: str, name: str, data: bytes | None) -> None:
        """Keep a small thing, or forget it (None). The last word on it wins."""
        self._things[kind, name] = data

    def ask(self, make: Callable[[int], Delete | Sync]) -> int:
        """Have something done after what was put; returns its number."""
        self._numbers += 1
        self._asked.append(make(self._numbers))
        return self._numbers

    # ------------------------------------------------------------ taken out

    def next(self) -> Item | None:
        """What is to be sent now; it is kept until it is confirmed. None: nothing waits."""
        item = self._again.popleft() if self._again else self._batch() or (self._asked.popleft() if self._asked else None)
        if item is not None:
            self._sent[item.number] = item
        return item

    def _batch(self) -> Batch | None:
        drafts: list[Draft] = []
        size = 0
        waiting = self._drafts
        while waiting and len(drafts) < BATCH_MAX:
            draft = waiting.popleft()
            size += draft.size_bytes
            if size > BATCH_MAX_BYTES and drafts:
                size -= draft.size_bytes
                waiting.appendleft(draft)
                break
            drafts.append(draft)
        if not drafts and not self._things:
            return None
        things = [(kind, name, data) for (kind, name), data in self._things.items()]
        self._things.clear()
        self._numbers += 1
        return Batch(self._numbers, drafts, things, size)

    def confirmed(self, done: Done) -> Item | None:
        """An item was done, or given up. Returns it, None when it is not known any more."""
        item = self._sent.pop(done.number, None)
        if isinstance(item, Batch):
            self._records -= len(item.drafts)
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
        items = [*self._sent.values(), *self._again]
        self.written.records_dropped += len(self._drafts) + sum(len(item.drafts) for item in items if isinstance(item, Batch))
        self._drafts.clear()
        self._sent.clear()
        self._again.clear()
        self._records = self._bytes = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits, sent or not."""
        return not (self._drafts or self._things or self._asked or self._sent or self._again)
