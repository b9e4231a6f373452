"""Takes over the records of an earlier router's `request_history.json`, and mirrors the newest records to such a file (`HISTORY_JSON`).

Decides which file, when, and what of it. Both run in the process that writes. Invariants: a record is imported once, by its id, and a
file once; with bodies off none is taken over; the mirror follows what the database holds, deletions too; a file that cannot be used is
told once.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, Final

import structlog
from sqlalchemy import Connection, Engine, select

from core.history import HistoryRecord, number_of, oldest_kept
from core.units import UnixMs
from servers import history_file
from servers.store import queries
from servers.store.engine import errors_of, first_line
from servers.store.statements import Statements
from servers.store.tables import requests, things

IMPORTED: Final = "imported"
"""Kind of the things that say which files were."""
SLICE: Final = 100
"""Entries of one slice."""
BUSY_S: Final = 0.02
TRIES: Final = 3
"""Of one slice, when the database does not show all of it afterwards."""
NEVER_S: Final = 1e9

MIRRORED: Final = 1000
MIRROR_MAX_BYTES: Final = 64 << 20
"""Of bodies in the mirror; where the newest records hold more, it has fewer of them."""
LOOK_S: Final = 5.0
SOON_S: Final = 0.2
"""Between two looks whether the import is done."""


class Import:
    """A chore of the writer: the entries of files, some at a time.

    `keep` says what of a record's bodies may stay; `owned`: these files are ours from now on, so what is there later is not imported;
    `done` is called once.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        clock: Callable[[], UnixMs],
        retention_days: int,
        keep: Callable[[HistoryRecord], None],
        owned: Sequence[Path] = (),
        done: Callable[[], None] = lambda: None,
    ) -> None:
        self._paths = list(dict.fromkeys(paths))
        self._clock = clock
        self._days = retention_days
        self._keep = keep
        self._owned = owned
        self._source = 0
        self._reading: Iterator[Any] | None = None
        self._slice: list[HistoryRecord] = []
        self._tries = 0
        self._taken: dict[int, int] = {}
        """How many entries of a millisecond there were: the same file gives the same numbers again."""
        self._counts = dict.fromkeys(("imported", "known", "too_old", "unreadable"), 0)
        self._log = structlog.get_logger()
        self._done = done
        self.is_done = False

    def __call__(self, connection: Connection, statements: Statements, /) -> float:
        """One slice. What a transaction that failed did not keep is tried again."""
        if self._insert(connection, statements):
            return BUSY_S
        if self._reading is None:
            if self._source == len(self._paths):
                if not self.is_done:
                    self.is_done = True
                    self._done()
                return NEVER_S
            self._reading = self._open(connection, statements)
            return BUSY_S
        values = list(islice(self._reading, SLICE))
        if values:
            records = [record for value in values if (record := self._record(value)) is not None]
            self._slice = list({record.request_id: record for record in reversed(records)}.values())
            self._counts["known"] += len(records) - len(self._slice)
            self._counts["imported"] += len(self._slice)
            self._tries = 0
            self._insert(connection, statements, first=True)
        else:
            self._finish(connection, statements)
        return BUSY_S

    def _insert(self, connection: Connection, statements: Statements, *, first: bool = False) -> bool:
        """Whether some of the slice was not there yet, and is inserted now."""
        ids = [record.request_id for record in self._slice]
        if not ids or self._tries >= TRIES:
            return False
        known = {row[0] for row in connection.execute(select(requests.c.request_id).where(requests.c.request_id.in_(ids)))}
        if first:
            self._slice = [record for record in self._slice if record.request_id not in known]
            self._counts["known"] += len(known)
            self._counts["imported"] -= len(ids) - len(self._slice)
        missing = [record for record in self._slice if record.request_id not in known]
        self._tries += 1
        statements.insert(connection, missing)
        return bool(missing)

    def _open(self, connection: Connection, statements: Statements) -> Iterator[Any] | None:
        """The entries of the next file; None: it is not to be imported."""
        path = self._paths[self._source]
        marked = select(things.c.name).where(things.c.kind == IMPORTED, things.c.name == self._mark(statements))
        if connection.execute(marked).first() is None:
            try:
                return _entries(path)
            except FileNotFoundError:
                if path in self._owned:
                    self._set_mark(connection, statements)
            except OSError as error:
                self._log.warning("an earlier router's history cannot be read", file=str(path), why=error.strerror)
        self._source += 1
        return None

    def _record(self, value: Any) -> HistoryRecord | None:
        now = self._clock()
        record = history_file.record_of(value, now=now)
        if record is None:
            self._counts["unreadable"] += 1
            return None
        count = self._taken[record.at_ms] = self._taken.get(record.at_ms, -1) + 1
        record.number = number_of(record.at_ms, count, 1023 - self._source)
        if record.number < oldest_kept(now, self._days):
            self._counts["too_old"] += 1
            return None
        self._keep(record)
        return record

    def _finish(self, connection: Connection, statements: Statements) -> None:
        self._set_mark(connection, statements)
        self._log.info("an earlier router's history was imported", file=str(self._paths[self._source]), **self._counts)
        self._counts = dict.fromkeys(self._counts, 0)
        self._source, self._reading, self._slice = self._source + 1, None, []
        self._taken.clear()

    def _mark(self, statements: Statements) -> str:
        return f"{statements.coordinator_id}:{self._paths[self._source]}"

    def _set_mark(self, connection: Connection, statements: Statements) -> None:
        statements.put_things(connection, {(IMPORTED, self._mark(statements)): b"true"}, now_ms=self._clock())


def _entries(path: Path) -> Iterator[Any]:
    """The entries of a file that can be opened. Raises OSError."""
    file = path.open(encoding="utf-8-sig", errors="replace")

    def read() -> Iterator[Any]:
        with file:
            yield from history_file.entries(file)

    return read()


class Mirror:
    """The newest records in a file. `ready`: whether what was in the file has been imported."""

    def __init__(self, engine: Engine, path: Path, *, ready: Callable[[], bool]) -> None:
        self._engine = engine
        self._errors: tuple[type[Exception], ...] = (*errors_of(engine), OSError)
        self._path = path
        self._ready = ready
        self._shown: list[int] | None = None
        self._failing = False
        self._log = structlog.get_logger()

    def run(self, ended: Event) -> None:
        """Write it whenever something changed, until `ended`."""
        while not ended.wait(LOOK_S if self._ready() else SOON_S):
            if self._ready():
                self.look()

    def look(self) -> None:
        """Write it if the newest records are others than it shows."""
        try:
            with self._engine.connect() as connection:
                self._write(connection)
            self._failing = False
        except self._errors as error:
            if not self._failing:
                why = error.strerror if isinstance(error, OSError) else first_line(error)
                self._log.error("the mirror of history cannot be written; it is tried again", file=str(self._path), why=why)
            self._failing = True

    def _write(self, connection: Connection) -> None:
        numbers: list[int] = []
        size_bytes = 0
        for number, kept_bytes in queries.newest(connection, MIRRORED):
            size_bytes += kept_bytes
            if numbers and size_bytes > MIRROR_MAX_BYTES:
                break
            numbers.append(number)
        numbers.reverse()  # the oldest first, as the file always was
        if numbers != self._shown:
            history_file.replace(self._path, (history_file.entry_of(record) for record in queries.some(connection, numbers)))
            self._shown = numbers
