"""The one writer: brings what it is given into the database, item by item, in a thread of its own.

Decides when to try again after a failure, and when a chore is done. Must never know what a record or a thing means, nor who gave it.

Invariants: items are done in their order, each whole or not at all, and once however often it is tried; batches that wait together share
a transaction, which makes each cheaper; each item is told to be done exactly once; chores come between items, one slice at a time, so
that an item never waits for two.
"""

import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from core.history import HistoryRecord
from servers.store.engine import errors_of, first_line
from servers.store.messages import Delete, Done, Failed, Said, Sync, Word, Works
from servers.store.retention import delete_some
from servers.store.statements import Statements

TOGETHER_MAX: Final = 1024
"""Records of one transaction, but for what the last batch has beyond them."""
RETRY_S: Final = 1.0
"""After a failure."""
IDLE_S: Final = 60.0


class Draft(Protocol):
    """A record that is still to be finished."""

    def finished(self) -> HistoryRecord:
        """The record. Called in the writer's thread."""


class Batch(Protocol):
    """Records and small things that are written together; `servers.store.messages.Batch`."""

    @property
    def number(self) -> int: ...

    @property
    def count(self) -> int:
        """Of drafts."""

    @property
    def drafts(self) -> Sequence[Draft]:
        """Asked for once in each try: they may be made then."""

    @property
    def things(self) -> Sequence[tuple[str, str, bytes | None]]: ...


class Chore(Protocol):
    """Work on the database between items, in small slices: cleanup, partitions, an import."""

    def __call__(self, connection: Connection, statements: Statements, /) -> float:
        """Do a slice; returns how many seconds later the next is due."""


class Writer:
    """One per database of one coordinator. `start` it, `put` into it, `stop` it: then everything that can be written is.

    `tell` is told what became of items, in the writer's thread.
    """

    def __init__(
        self, engine: Engine, *, coordinator_id: str, tell: Callable[[Word], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._statements = Statements(engine.dialect.name, coordinator_id)
        self._tell = tell
        self._clock = clock
        self._items: queue.SimpleQueue[Batch | Delete | Sync | None] = queue.SimpleQueue()
        self._next: Batch | Delete | Sync | None = None
        """Taken from `_items` already."""
        self._stopping = threading.Event()
        self._chores: list[tuple[float, int, Chore]] = []
        self._errors: tuple[type[Exception], ...] = (*errors_of(engine), OSError)
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="store writer", daemon=True)

    # ------------------------------------------------------------ from other threads

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def add_chore(self, chore: Chore) -> None:
        """Before `start`: have `chore` called between items, from now on."""
        self._chores.append((self._clock(), len(self._chores), chore))

    def put(self, item: Batch | Delete | Sync) -> None:
        """Have this done."""
        self._items.put(item)

    def stop(self, *, limit_s: float) -> bool:
        """Do what was put, then end; blocks for `limit_s` at most. What fails is not tried again. Returns whether it has ended."""
        self._stopping.set()
        self._items.put(None)
        if self._thread.ident is None:  # it was never started
            return True
        self._thread.join(limit_s)
        return not self._thread.is_alive()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            item, self._next = self._next, None
            if item is None:
                try:
                    item = self._items.get(timeout=self._until_chore())
                except queue.Empty:
                    self._do_chores()
                    continue
                if item is None:
                    return
            if isinstance(item, Delete | Sync):
                self._answer(item)
            else:
                self._keep(self._with_those_behind(item))
            if not self._stopping.is_set() and not self._failing:
                self._do_chores()

    def _with_those_behind(self, batch: Batch) -> list[Batch]:
        batches, count = [batch], batch.count
        while count < TOGETHER_MAX:
            try:
                item = self._items.get_nowait()
            except queue.Empty:
                break
            if item is None or isinstance(item, Delete | Sync):
                if item is None:  # the end, once these are written
                    self._items.put(None)
                self._next = item
                break
            batches.append(item)
            count += item.count
        return batches

    def _keep(self, batches: list[Batch]) -> None:
        """One transaction; tried until it works or the writer is to stop. One batch's records at a time: they fit into the cache."""
        things = {(kind, name): data for batch in batches for kind, name, data in batch.things}
        while not (self._failing and self._stopping.is_set()):
            try:
                with Transaction(self._engine) as connection:
                    kept = [self._insert(connection, batch.drafts) for batch in batches]
                    self._statements.put_things(connection, things, now_ms=time.time_ns() // 1_000_000)
            except self._errors as error:
                self._failed(error)
            except Exception:  # what no later try can change
                self._statements.forget_ids()
                if len(batches) > 1:  # only one of them must be lost
                    for batch in batches:
                        self._keep([batch])
                    return
                self._tell(Said("error", "records of history could not be written", {"exception": traceback.format_exc()}))
                break
            else:
                self._works()
                for batch, count in zip(batches, kept, strict=True):
                    self._tell(Done(batch.number, count, batch.count - count))
                return
            self._stopping.wait(RETRY_S)
        for batch in batches:
            self._tell(Done(batch.number, 0, batch.count))

    def _insert(self, connection: Connection, drafts: Sequence[Draft]) -> int:
        """Returns how many records they made."""
        records = []
        for draft in drafts:
            try:
                records.append(draft.finished())
            except Exception:  # one record that cannot be made must not keep the others from the disk
                self._tell(Said("error", "a record of history could not be made", {"exception": traceback.format_exc()}))
        self._statements.insert(connection, records)
        return len(records)

    def _answer(self, asked: Delete | Sync) -> None:
        answer = 0
        try:
            if isinstance(asked, Delete):
                with Transaction(self._engine) as connection:
                    answer = delete_some(connection, asked.filters)
        except Exception as error:
            self._statements.forget_ids()
            self._tell(Done(asked.number, error=first_line(error)))
        else:
            self._tell(Done(asked.number, answer=answer))  # once it is in the database

    def _failed(self, error: BaseException) -> None:
        self._statements.forget_ids()
        self._failing = True
        self._tell(Failed(first_line(error)))

    def _works(self) -> None:
        if self._failing:
            self._failing = False
            self._tell(Works())

    # ------------------------------------------------------------ chores

    def _until_chore(self) -> float:
        return max(0.0, min((due for due, _, _ in self._chores), default=self._clock() + IDLE_S) - self._clock())

    def _do_chores(self) -> None:
        """The chore that is due longest, one slice of it."""
        if not self._chores:
            return
        self._chores.sort(key=lambda entry: entry[:2])
        due, number, chore = self._chores[0]
        if due > self._clock():
            return
        again_s = IDLE_S
        try:
            with Transaction(self._engine) as connection:
                again_s = chore(connection, self._statements)
        except self._errors as error:
            self._failed(error)
        except Exception:
            self._statements.forget_ids()
            self._tell(Said("error", "work on the database failed", {"exception": traceback.format_exc()}))
        else:
            self._works()
        self._chores[0] = (self._clock() + again_s, number, chore)


class Transaction:
    """A write transaction. On SQLite the write lock is taken at once: a transaction that starts to read and then writes can fail."""

    def __init__(self, engine: Engine) -> None:
        self._connection = engine.connect()

    def __enter__(self) -> Connection:
        try:
            if self._connection.dialect.name == "sqlite":
                self._connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                self._connection.begin()  # SQLAlchemy does not see what the hot insert does
        except BaseException:
            self._connection.close()
            raise
        return self._connection

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if self._connection.dialect.name == "sqlite":
                self._connection.exec_driver_sql("COMMIT" if kind is None else "ROLLBACK")
            elif kind is None:
                self._connection.commit()
        except SQLAlchemyError:
            if kind is None:
                self._connection.invalidate()
                raise
        finally:
            self._connection.close()
