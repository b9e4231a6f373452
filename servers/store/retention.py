"""What goes when it is too old or too much, in slices that never hold up the writer.

Decides how much goes at a time. Invariants: the oldest goes first; a slice deletes at most `SLICE` records; a day of PostgreSQL that is
too old as a whole is dropped as a whole.
"""

import sqlite3
from collections.abc import Callable
from typing import Final, cast

from sqlalchemy import Connection, text

from core.history import NUMBER_SHIFT, first_number, oldest_kept
from core.units import UnixMs
from servers.store import queries, tables
from servers.store.filters import Filters
from servers.store.statements import RECORD_BYTES, Statements

SLICE: Final = 500
"""Records of one slice: some milliseconds."""
MEASURED_AT_ONCE: Final = 10_000
"""Records whose sizes are added up in one slice."""
BUSY_S: Final = 0.02
"""Between two slices when more is to go."""
IDLE_S: Final = 30.0
"""Between two looks when there is nothing to do."""
VACUUM_PAGES: Final = 200
"""Pages that SQLite gives back to the system in one slice."""


def delete_some(connection: Connection, filters: Filters) -> int:
    """Delete the oldest `SLICE` records that are meant; returns how many there were."""
    numbers = queries.numbers_of(connection, filters, limit=SLICE)
    if numbers:
        connection.execute(tables.bodies.delete().where(tables.bodies.c.number.in_(numbers)))
        connection.execute(tables.requests.delete().where(tables.requests.c.number.in_(numbers)))
    return len(numbers)


class Retention:
    """The chore. `clock` tells the calendar's milliseconds."""

    def __init__(self, *, days: int, max_bytes: int, clock: Callable[[], UnixMs]) -> None:
        self._days = days
        self._max_bytes = max_bytes
        self._clock = clock
        self._kept: int | None = None
        """Bytes that records took when `_seen` of them had been inserted: measured in the first slices, then kept count of."""
        self._measured: tuple[int, int] | None = None
        """Below which number it is still to be measured, and what was found above."""
        self._seen = 0
        self.deleted = 0
        self.deleted_bytes = 0
        """Of records and bodies; of whole days, what they took in the database."""

    def __call__(self, connection: Connection, statements: Statements, /) -> float:
        """One slice."""
        below = oldest_kept(self._clock(), self._days)
        if statements.dialect == "postgresql" and (dropped := statements.drop_days_before(connection, below)):
            self._kept = self._measured = None
            self.deleted_bytes += dropped
            return BUSY_S
        gone = self._delete(connection, below)
        if not gone:
            if self._kept is None:
                self._kept = self._measure(connection, statements)
                if self._kept is None:
                    return BUSY_S
            else:
                self._kept += statements.inserted_bytes - self._seen
                self._seen = statements.inserted_bytes
            if self._kept > self._max_bytes:
                gone = self._delete(connection, first_number(self._clock()) + (1 << NUMBER_SHIFT))
        if gone:
            return BUSY_S
        if statements.dialect == "sqlite" and self._vacuum(connection):
            return BUSY_S
        return IDLE_S

    def _measure(self, connection: Connection, statements: Statements) -> int | None:
        """Add up some more of what there is, newest first; returns the sum once that was all of it."""
        if self._measured is None:
            self._measured = (queries.BEYOND, 0)
            self._seen = statements.inserted_bytes  # what is inserted from now on is newer than all that is still to be measured
        below, kept = self._measured
        some = "SELECT number, kept_bytes FROM requests WHERE number < :below ORDER BY number DESC LIMIT :some"
        rows, size_bytes, least = connection.execute(
            text(f"SELECT COUNT(*), COALESCE(SUM(kept_bytes), 0), MIN(number) FROM ({some}) AS some_of_them"),
            {"below": below, "some": MEASURED_AT_ONCE},
        ).one()
        kept += int(size_bytes) + int(rows) * RECORD_BYTES
        if rows == MEASURED_AT_ONCE:
            self._measured = (least, kept)
            return None
        self._measured = None
        return kept

    def _delete(self, connection: Connection, below: int) -> int:
        """Delete the oldest `SLICE` records below a number; returns how many."""
        rows = connection.execute(
            text("SELECT number, kept_bytes FROM requests WHERE number < :below ORDER BY number LIMIT :some"),
            {"below": below, "some": SLICE},
        ).all()
        if not rows:
            return 0
        last = {"last": rows[-1][0]}
        connection.execute(text("DELETE FROM bodies WHERE number <= :last"), last)
        connection.execute(text("DELETE FROM requests WHERE number <= :last"), last)
        gone_bytes = sum(row[1] for row in rows) + len(rows) * RECORD_BYTES
        if self._kept is not None:
            self._kept -= gone_bytes
        self.deleted_bytes += gone_bytes
        self.deleted += len(rows)
        return len(rows)

    def _vacuum(self, connection: Connection) -> bool:
        """Give some free pages back to the system; False when there are few."""
        free: int = connection.execute(text("PRAGMA freelist_count")).scalar_one()
        if free < 10 * VACUUM_PAGES:
            return False
        driver = cast("sqlite3.Connection", connection.connection.driver_connection)
        for _ in range(VACUUM_PAGES):
            driver.execute("PRAGMA incremental_vacuum(1)")  # Python takes one step of it, which frees one page
        return True
