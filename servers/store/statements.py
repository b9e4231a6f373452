"""The statements that write, for both databases: the hot insert at the driver's level, small things, partitions.

Decides how a record becomes rows. Must never know why something is written. Invariants: a record that is in the database already is left
as it is, so that a batch may be tried again; names are looked up once and remembered until a transaction fails.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import Connection, Table, text

from core.history import BODY_STATES, DAY_MS, EDGES, NUMBER_SHIFT, STATUSES, HistoryRecord
from servers.store import tables

if TYPE_CHECKING:
    import psycopg

NAME_MAX: Final = 256
"""Characters of a model's name that are kept: a client may send any."""
MESSAGE_MAX: Final = 2000
CLIENT_MAX: Final = 256
PATH_MAX: Final = 512
NAMES_REMEMBERED: Final = 20_000

RECORD_BYTES: Final = 600
"""What a record without bodies takes in the database, about."""

_KEPT_BYTES: Final = [column.name for column in tables.requests.columns].index("kept_bytes")
_STATUS: Final = {name: number for number, name in enumerate(STATUSES)}
_EDGE: Final = {name: number for number, name in enumerate(EDGES)}
_BODIES: Final = {name: number for number, name in enumerate(BODY_STATES)}
_DAY_NUMBERS: Final = DAY_MS << NUMBER_SHIFT


ROWS_AT_ONCE: Final = (64, 16, 4, 1)
"""Rows of one statement on SQLite. Its driver gives the interpreter's lock away at each statement, and getting it back from a busy loop
costs more than the row."""


def _insert(table: Table, dialect: str, rows: int = 1) -> str:
    names = [column.name for column in table.columns]
    row = f"({', '.join('?' if dialect == 'sqlite' else '%s' for _ in names)})"
    return f"INSERT INTO {table.name} ({', '.join(names)}) VALUES {', '.join([row] * rows)} ON CONFLICT DO NOTHING"


class Statements:
    """For one dialect (`sqlite` or `postgresql`) and one coordinator; used by one thread."""

    def __init__(self, dialect: str, coordinator_id: str) -> None:
        self.dialect = dialect
        self.coordinator_id = coordinator_id
        self._inserts = {
            (table.name, rows): _insert(table, dialect, rows) for table in (tables.requests, tables.bodies) for rows in ROWS_AT_ONCE
        }
        self._models: dict[str, int] = {}
        self._nodes: dict[tuple[str, str], int] = {}
        self._days: set[int] = set()
        self.inserted_bytes = 0
        """What the records inserted here take, about."""

    def forget_ids(self) -> None:
        """A transaction failed: what it inserted is not there."""
        self._models.clear()
        self._nodes.clear()
        self._days.clear()

    # ------------------------------------------------------------ records

    def insert(self, connection: Connection, records: Sequence[HistoryRecord]) -> None:
        """Insert `records`; those that are there already are left alone."""
        if not records:
            return
        self._learn(connection, records)
        rows = [self._row(record) for record in records]
        kept = [
            (record.number, record.request_body, record.response_body)
            for record in records
            if record.request_body is not None or record.response_body is not None
        ]
        self._many(connection, "requests", rows)
        self.inserted_bytes += sum(row[_KEPT_BYTES] for row in rows) + len(rows) * RECORD_BYTES
        if kept:
            self._many(connection, "bodies", kept)

    def _many(self, connection: Connection, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        driver = connection.connection.driver_connection
        if self.dialect == "postgresql":
            with cast("psycopg.Connection[Any]", driver).cursor() as cursor:
                cursor.executemany(self._inserts[table, 1], rows)
            return
        execute = cast("sqlite3.Connection", driver).execute
        at = 0
        for size in ROWS_AT_ONCE:
            while len(rows) - at >= size:
                execute(self._inserts[table, size], tuple(chain.from_iterable(rows[at : at + size])))
                at += size

    def _row(self, record: HistoryRecord) -> tuple[Any, ...]:
        kept_bytes = len(record.request_body or b"") + len(record.response_body or b"") + len(record.attempts)
        return (
            record.number,
            record.request_id,
            self.coordinator_id,
            record.completed_at_ms,
            record.request_type,
            _clean(record.path, PATH_MAX),
            None if record.model is None else self._models[_clean(record.model, NAME_MAX)],
            None if record.agent_id is None else self._nodes[record.agent_id, _clean(record.agent_name or "", NAME_MAX)],
            _clean(record.client, CLIENT_MAX),
            record.key_id,
            _STATUS[record.status],
            _clean(record.message, MESSAGE_MAX),
            record.http_status,
            record.duration_ms,
            record.queue_ms,
            record.ttft_ms,
            record.predicted_start_ms,
            min(record.prompt_tokens, 2**31 - 1),
            min(record.output_tokens, 2**31 - 1),
            record.load_ms,
            record.attempts,
            _EDGE[record.edge],
            min(record.chunks, 2**31 - 1),
            record.body_bytes,
            kept_bytes,
            _BODIES[record.bodies],
            record.observed_start_ms,
        )

    def _learn(self, connection: Connection, records: Sequence[HistoryRecord]) -> None:
        """Ids of names not seen before; on PostgreSQL the partitions of days not seen before."""
        if len(self._models) > NAMES_REMEMBERED or len(self._nodes) > NAMES_REMEMBERED:
            self.forget_ids()
        for record in records:
            if record.model is not None and (name := _clean(record.model, NAME_MAX)) not in self._models:
                self._models[name] = self._id_of(connection, tables.models, name=name)
            if record.agent_id is not None:
                node = (record.agent_id, _clean(record.agent_name or "", NAME_MAX))
                if node not in self._nodes:
                    self._nodes[node] = self._id_of(connection, tables.nodes, agent_id=node[0], name=node[1])
            if self.dialect == "postgresql" and (day := record.number // _DAY_NUMBERS) not in self._days:
                self._make_partitions(connection, day)

    def _id_of(self, connection: Connection, table: Table, **values: str) -> int:
        names = ", ".join(values)
        holders = ", ".join(f":{name}" for name in values)
        where = " AND ".join(f"{name} = :{name}" for name in values)
        connection.execute(text(f"INSERT INTO {table.name} ({names}) VALUES ({holders}) ON CONFLICT DO NOTHING"), values)
        found: int = connection.execute(text(f"SELECT id FROM {table.name} WHERE {where}"), values).scalar_one()
        return found

    # ------------------------------------------------------------ partitions (PostgreSQL)

    def _make_partitions(self, connection: Connection, day: int) -> None:
        for name in ("requests", "bodies"):
            connection.execute(
                text(
                    f"CREATE TABLE IF NOT EXISTS {partition(name, day)} PARTITION OF {name} "
                    f"FOR VALUES FROM ({day * _DAY_NUMBERS}) TO ({(day + 1) * _DAY_NUMBERS})"
                )
            )
        self._days.add(day)

    def drop_days_before(self, connection: Connection, number: int) -> int:
        """Drop partitions whose every number is below `number`, the oldest first; returns the bytes that they took, 0 without any."""
        rows = connection.execute(
            text("SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid WHERE i.inhparent = 'requests'::regclass")
        )
        days = sorted(int(name.rpartition("_")[2]) for (name,) in rows)
        gone = [day for day in days if (day + 1) * _DAY_NUMBERS <= number]
        size_bytes = 0
        for day in gone:
            for name in (partition("bodies", day), partition("requests", day)):
                size = connection.execute(text("SELECT COALESCE(pg_total_relation_size(to_regclass(:name)), 0)"), {"name": name})
                size_bytes += size.scalar_one()
                connection.execute(text(f"DROP TABLE IF EXISTS {name}"))
            self._days.discard(day)
        return size_bytes

    # ------------------------------------------------------------ things

    def put_things(self, connection: Connection, things: Mapping[tuple[str, str], bytes | None], *, now_ms: int) -> None:
        """Keep or forget small things."""
        for (kind, name), data in things.items():
            if data is None:
                connection.execute(text("DELETE FROM things WHERE kind = :kind AND name = :name"), {"kind": kind, "name": name})
                continue
            connection.execute(
                text(
                    "INSERT INTO things (kind, name, coordinator_id, data, updated_at_ms) VALUES (:kind, :name, :by, :data, :now) "
                    "ON CONFLICT (kind, name) DO UPDATE SET coordinator_id = :by, data = :data, updated_at_ms = :now"
                ),
                {"kind": kind, "name": name, "by": self.coordinator_id, "data": data, "now": now_ms},
            )


def partition(table: str, day: int) -> str:
    """The name of a day's partition."""
    return f"{table}_{day}"


def _clean(value: str, limit: int) -> str:
    """`value` as both databases take it: PostgreSQL has no NUL in texts, neither has lone surrogates."""
    value = value[:limit]
    return value if value.isprintable() else value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
