"""The one writer: takes what is to be kept from the loop, and brings it into the database in batches, in a thread of its own.

Decides when to write, what is dropped when the database does not keep up (bodies first, then records, both counted: contract 6), and when
to try again after a failure. Must never know what a record or a thing means.

Invariants: `put*` never wait and never fail; what was put more than `FLUSH_S` ago is in the database unless that fails; a batch is in it
whole or not at all, and once however often it is tried; everything that waits here takes at most `PENDING_MAX_BYTES`; a failure is
logged once until it is over.
"""

import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import psycopg
import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from core.history import BODY_DROPPED, HistoryRecord
from servers.store.engine import first_line
from servers.store.statements import Statements

FLUSH_S: Final = 0.1
"""Longest time that something waits before it is written; contract 6 allows a crash to lose 250 ms."""
BATCH_MAX: Final = 500
"""Records of one transaction."""
FINISHED_AT_ONCE: Final = 4
"""Records made in a row: some 0.1 ms, and 0.5 ms where long streams are put together."""
RETRY_S: Final = 1.0
"""After a failure."""
RECORDS_MAX: Final = 20_000
"""Records that wait; more are dropped, the newest first, so that what is kept has no holes in its past."""
PENDING_MAX_BYTES: Final = 64 << 20
"""Bodies that wait; more are dropped, and their records say so."""

DATABASE_ERRORS: Final = (SQLAlchemyError, sqlite3.Error, psycopg.Error)
"""The drivers' own come from the hot insert, where SQLAlchemy does not stand between."""
WRITE_ERRORS: Final = (*DATABASE_ERRORS, OSError)


class Draft(Protocol):
    """A record that is still to be finished: what costs time is done by the writer, not by the loop."""

    size_bytes: int
    """Of the bodies it holds."""

    def drop_bodies(self) -> None:
        """The writer has no time for them."""

    def finished(self) -> HistoryRecord:
        """The record. Called once, in the writer's thread."""


class Chore(Protocol):
    """Work on the database between batches, in small slices: cleanup, partitions, a mirror."""

    def __call__(self, connection: Connection, statements: Statements, /) -> float:
        """Do a slice; returns how many seconds later the next is due."""


class Written:
    """Counts of a writer, for metrics and tests."""

    def __init__(self) -> None:
        self.records = 0
        self.bodies_dropped = 0
        self.records_dropped = 0
        self.failures = 0
        """Attempts to write that failed."""
        self.failing: str | None = None
        """Why nothing can be written now."""


class Writer:
    """One per database of one coordinator. `start` it, `put` into it, `stop` it: then everything that can be written is."""

    def __init__(self, engine: Engine, *, coordinator_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._statements = Statements(engine.dialect.name, coordinator_id)
        self._clock = clock
        self._lock = threading.Lock()
        self._drafts: deque[Draft] = deque()
        self._waiting_bytes = 0
        self._things: dict[tuple[str, str], bytes | None] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._chores: list[tuple[float, int, Chore]] = []
        self._thread = threading.Thread(target=self._run, name="store writer", daemon=True)
        self._asks: list[tuple[Callable[[Connection], Any], _Answer]] = []
        self._log = structlog.get_logger()
        self.written = Written()

    # ------------------------------------------------------------ from the loop

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def add_chore(self, chore: Chore) -> None:
        """Before `start`: have `chore` called between batches, from now on."""
        self._chores.append((self._clock(), len(self._chores), chore))

    def put(self, draft: Draft) -> None:
        """Keep a record."""
        with self._lock:
            if len(self._drafts) >= RECORDS_MAX:
                self.written.records_dropped += 1
                return
            if self._waiting_bytes + draft.size_bytes > PENDING_MAX_BYTES:
                draft.drop_bodies()
                self.written.bodies_dropped += 1
            self._drafts.append(draft)
            self._waiting_bytes += draft.size_bytes

    def put_thing(self, kind: str, name: str, data: bytes | None) -> None:
        """Keep a small thing, or forget it (None). The last word on it wins."""
        with self._lock:
            self._things[kind, name] = data

    def ask(self, work: Callable[[Connection], Any]) -> Any:
        """Do `work` in the writer's thread between two batches and return what it returns; blocks, so not from the loop.

        Raises what it raises.
        """
        answer = _Answer()
        with self._lock:
            self._asks.append((work, answer))
        self._wake.set()
        return answer.get()

    def stop(self, *, limit_s: float) -> None:
        """Write what waits, then end; blocks for `limit_s` at most."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join(limit_s)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while True:
            stopping = self._stopping
            began = self._clock()
            ok = self._flush()
            if stopping:
                self._answer_asks()
                return
            if ok:
                self._answer_asks()
                self._do_chores()
            pause = FLUSH_S - (self._clock() - began) if ok else RETRY_S
            if len(self._drafts) < BATCH_MAX and pause > 0:
                self._wake.wait(pause)
                self._wake.clear()

    def _flush(self) -> bool:
        """Write everything that waits. False: it did not work; what waits still waits."""
        while True:
            with self._lock:
                batch = [self._drafts.popleft() for _ in range(min(len(self._drafts), BATCH_MAX))]
                things, self._things = self._things, {}
            if not batch and not things:
                return True
            records = self._finished(batch)
            if not self._write(records, things):
                return False
            with self._lock:
                self._waiting_bytes -= sum(draft.size_bytes for draft in batch)

    def _finished(self, batch: Sequence[Draft]) -> list[HistoryRecord]:
        records = []
        for number, draft in enumerate(batch):
            if number % FINISHED_AT_ONCE == 0:
                time.sleep(0)  # the loop wants the interpreter's lock
            try:
                records.append(draft.finished())
            except Exception as error:  # one record that cannot be made must not keep the others from the disk
                self.written.records_dropped += 1
                self._log.error("a record of history could not be made", exc_info=error)
        return records

    def _write(self, records: list[HistoryRecord], things: dict[tuple[str, str], bytes | None]) -> bool:
        """One transaction; tried until it works, the program stops, or too much waits behind it."""
        while True:
            try:
                with self._transaction() as connection:
                    self._statements.insert(connection, records)
                    self._statements.put_things(connection, things, now_ms=time.time_ns() // 1_000_000)
            except WRITE_ERRORS as error:
                self._statements.forget_ids()
                self._failed(error)
            else:
                self.written.records += len(records)
                self._works()
                return True
            if self._stopping:
                self.written.records_dropped += len(records)
                return False
            self._shed(records)
            self._wake.wait(RETRY_S)
            self._wake.clear()

    def _shed(self, records: list[HistoryRecord]) -> None:
        """While nothing can be written, the bodies of what waits here go once others need the room."""
        with self._lock:
            crowded = self._waiting_bytes >= PENDING_MAX_BYTES // 2 or len(self._drafts) >= RECORDS_MAX // 2
        if crowded:
            for record in records:
                if record.request_body is not None or record.response_body is not None:
                    record.request_body = record.response_body = None
                    record.bodies = BODY_DROPPED
                    self.written.bodies_dropped += 1

    def _transaction(self) -> "Transaction":
        return Transaction(self._engine)

    def _failed(self, error: BaseException) -> None:
        self.written.failures += 1
        why = first_line(error)
        if self.written.failing is None:
            self._log.error(
                "history cannot be written: requests go on, what they leave is kept in memory as long as there is room", why=why
            )
        self.written.failing = why

    def _works(self) -> None:
        if self.written.failing is not None:
            self._log.info("history is written again", records_dropped=self.written.records_dropped)
            self.written.failing = None

    def _do_chores(self) -> None:
        """The chore that is due longest, one slice of it, so that a batch never waits for two."""
        if not self._chores:
            return
        self._chores.sort()
        due, number, chore = self._chores[0]
        if due > self._clock():
            return
        again_s = 60.0
        try:
            with self._transaction() as connection:
                again_s = chore(connection, self._statements)
        except WRITE_ERRORS as error:
            self._statements.forget_ids()
            self._failed(error)
        self._chores[0] = (self._clock() + again_s, number, chore)

    def _answer_asks(self) -> None:
        with self._lock:
            asks, self._asks = self._asks, []
        for work, answer in asks:
            try:
                with self._transaction() as connection:
                    value = work(connection)
            except Exception as error:
                answer.fail(error)
            else:
                answer.put(value)  # once it is in the database


class _Answer:
    def __init__(self) -> None:
        self._done = threading.Event()
        self._value: Any = None
        self._error: Exception | None = None

    def put(self, value: Any) -> None:
        self._value = value
        self._done.set()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._done.set()

    def get(self) -> Any:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value


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
