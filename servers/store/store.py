"""The store put together: the database opened, the process that writes started, questions answered in worker threads.

Decides the order of starting and stopping. Must never know what is kept. Invariants: `put*` never wait; a question never runs in the
loop; when `close` returns, everything that could be written is.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import trio
from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from core.errors import RemoteError
from core.history import default_max_bytes
from servers.drafts import Draft
from servers.store import tables
from servers.store.engine import READERS_MAX, database_url, first_line, open_engine
from servers.store.feed import Feed
from servers.store.filters import Filters
from servers.store.messages import Config, Delete, Sync
from servers.store.outbox import Written
from servers.store.retention import SLICE

CLOSE_LIMIT_S: Final = 10.0
"""What an orderly stop gives to writing."""

T = TypeVar("T")


class Store:
    """One database of one coordinator. `run` it as long as it is used."""

    def __init__(
        self,
        engine: Engine,
        *,
        coordinator_id: str,
        retention_days: int,
        max_bytes: int,
        bodies: str = "full",
        body_max_bytes: int = 1 << 20,
        masks: tuple[tuple[str, ...], ...] = (),
        imported: Sequence[Path] = (),
        mirror: Path | None = None,
    ) -> None:
        """`bodies`, `body_max_bytes`, `masks`: what may be kept of records that are `imported` from files."""
        self._engine = engine
        self._readers = trio.CapacityLimiter(READERS_MAX - 2)
        self._feed = Feed(
            engine,
            Config(
                url=self.url,
                coordinator_id=coordinator_id,
                retention_days=retention_days,
                max_bytes=max_bytes,
                bodies=bodies,
                body_max_bytes=body_max_bytes,
                masks=masks,
                imported=tuple(map(str, imported)),
                mirror=None if mirror is None else str(mirror),
            ),
        )
        self.put: Callable[[Draft], None] = self._feed.outbox.put
        """Keep a record of history."""
        self.put_thing: Callable[[str, str, bytes | None], None] = self._feed.outbox.put_thing
        """Keep a small thing, or forget it (None)."""

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
        bodies: str,
        body_max_bytes: int,
        masks: tuple[tuple[str, ...], ...],
        imported: Sequence[Path],
        mirror: Path | None,
    ) -> "Store":
        """The store that DATABASE_URL names. `max_bytes`: None for contract 2's default.

        Raises:
            ConfigError: it cannot be used.
        """
        url = database_url(setting, data_dir)
        engine = open_engine(url)
        if max_bytes is None:
            max_bytes = default_max_bytes(free_disk_bytes(data_dir))
        return cls(
            engine, coordinator_id=coordinator_id, retention_days=retention_days, max_bytes=max_bytes, bodies=bodies,
            body_max_bytes=body_max_bytes, masks=masks, imported=imported, mirror=mirror,
        )  # fmt: skip

    def gather_from(self, gather: Callable[[], None]) -> None:
        """Before anything is written, `gather` puts what is held back."""
        self._feed.outbox.gather = gather

    def start(self) -> None:
        """Start the process that writes."""
        self._feed.start()

    async def run(self) -> None:
        """Have written what is put, until cancelled."""
        await self._feed.run()

    def close(self) -> None:
        """Write what waits, and let go of the database. Blocks, `CLOSE_LIMIT_S` and a little at most."""
        self._feed.close(limit_s=CLOSE_LIMIT_S)
        self._engine.dispose()

    @property
    def url(self) -> str:
        """Of the database, with its password."""
        return self._engine.url.render_as_string(hide_password=False)

    @property
    def engine(self) -> Engine:
        """The database."""
        return self._engine

    @property
    def written(self) -> Written:
        """What became of what was put."""
        return self._feed.outbox.written

    @property
    def deleted_bytes(self) -> int:
        """What went by age and size."""
        return self._feed.deleted_bytes

    @property
    def imported(self) -> bool:
        """Whether the files of earlier routers are done with."""
        return self._feed.imported

    # ------------------------------------------------------------ writing

    async def delete(self, filters: Filters) -> int:
        """Delete the records that are meant, slice by slice; returns how many. Raises RemoteError."""
        gone = 0
        while True:
            slice_ = await self._feed.ask(partial(Delete, filters=filters))
            gone += slice_
            if slice_ < SLICE:
                return gone

    async def flush(self) -> None:
        """Return once everything that was put is in the database. Raises RemoteError."""
        await self._feed.ask(Sync)

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
