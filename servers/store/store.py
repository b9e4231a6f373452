"""The store put together: the database opened, the writer started, questions answered in worker threads.

Decides the order of starting and stopping. Must never know what is kept. Invariants: `put*` never wait; a question never runs in the
loop; when `close` returns, everything that could be written is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import trio
from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from core.errors import RemoteError
from core.history import default_max_bytes
from core.units import UnixMs
from servers.store import queries, tables
from servers.store.engine import READERS_MAX, database_url, first_line, open_engine
from servers.store.retention import Retention
from servers.store.writer import Draft, Writer

CLOSE_LIMIT_S: Final = 10.0
"""What an orderly stop gives the writer."""

DELETE_SLICE: Final = 500

T = TypeVar("T")


class Store:
    """One database of one coordinator."""

    def __init__(self, engine: Engine, *, coordinator_id: str, retention_days: int, max_bytes: int, clock: Callable[[], UnixMs]) -> None:
        self._engine = engine
        self._readers = trio.CapacityLimiter(READERS_MAX - 2)
        self.writer = Writer(engine, coordinator_id=coordinator_id)
        self.retention = Retention(days=retention_days, max_bytes=max_bytes, clock=clock)
        self.writer.add_chore(self.retention)

    @classmethod
    def open(
        cls,
        setting: str,
        data_dir: Path,
        *,
        coordinator_id: str,
        retention_days: int,
        max_bytes: int | None,
        free_disk_bytes: Callable[[Path], int],
        clock: Callable[[], UnixMs],
    ) -> "Store":
        """The store that DATABASE_URL names. `max_bytes`: None for contract 2's default.

        Raises:
            ConfigError: it cannot be used.
        """
        url = database_url(setting, data_dir)
        engine = open_engine(url)
        if max_bytes is None:
            max_bytes = default_max_bytes(free_disk_bytes(data_dir))
        return cls(engine, coordinator_id=coordinator_id, retention_days=retention_days, max_bytes=max_bytes, clock=clock)

    def start(self) -> None:
        """Begin to write."""
        self.writer.start()

    def close(self) -> None:
        """Write what waits, and let go of the database. Blocks, `CLOSE_LIMIT_S` at most."""
        self.writer.stop(limit_s=CLOSE_LIMIT_S)
        self._engine.dispose()

    # ------------------------------------------------------------ writing

    def put(self, draft: Draft) -> None:
        """Keep a record of history."""
        self.writer.put(draft)

    def put_thing(self, kind: str, name: str, data: bytes | None) -> None:
        """Keep a small thing, or forget it (None)."""
        self.writer.put_thing(kind, name, data)

    async def delete(self, filters: queries.Filters) -> int:
        """Delete the records that are meant, slice by slice; returns how many. Raises RemoteError."""
        gone = 0
        while True:
            slice_: int = await self._in_thread(lambda: self.writer.ask(lambda connection: _delete_some(connection, filters)))
            gone += slice_
            if slice_ < DELETE_SLICE:
                return gone

    # ------------------------------------------------------------ reading

    async def read(self, question: Callable[[Connection], T]) -> T:
        """The answer to `question`, which is asked in a worker thread with a connection of its own. Raises RemoteError."""
        return await self._in_thread(lambda: self.read_now(question))

    def read_now(self, question: Callable[[Connection], T]) -> T:
        """`read`, in this thread: at the start, and in worker threads."""
        with self._engine.connect() as connection:
            return question(connection)

    def things(self, kind: str) -> dict[str, bytes]:
        """All things of a kind by name, as they are in the database; at the start."""
        table = tables.things.c
        return self.read_now(lambda connection: {
            name: bytes(data) for name, data in connection.execute(select(table.name, table.data).where(table.kind == kind))
        })  # fmt: skip

    def last_number(self) -> int:
        """The greatest number that a record has, 0 without any."""
        return self.read_now(lambda connection: int(connection.execute(select(func.max(tables.requests.c.number))).scalar() or 0))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await trio.to_thread.run_sync(work, limiter=self._readers)
        except OperationalError as error:
            raise RemoteError(f"the database does not answer: {first_line(error)}", status=503) from None
        except SQLAlchemyError as error:
            raise RemoteError(f"the database refuses the question: {first_line(error)}", status=500) from None


def _delete_some(connection: Connection, filters: queries.Filters) -> int:
    numbers = queries.numbers_of(connection, filters, limit=DELETE_SLICE)
    if numbers:
        connection.execute(tables.bodies.delete().where(tables.bodies.c.number.in_(numbers)))
        connection.execute(tables.requests.delete().where(tables.requests.c.number.in_(numbers)))
    return len(numbers)
