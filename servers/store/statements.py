"""The statements that write, for both databases: the hot insert at the driver's level, small things, partitions.

Decides how a record becomes rows. Must never know why something is written. Invariants: a record that is in the database already is left
as it is, so that a batch may be tried again; names are looked up once and remembered until a transaction fails.
"""

import sqlite3
from collections.abc import Mapping, Sequence
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
COUNT_MAX: Final = 2**31 - 1
"""Of tokens and chunks: a node may tell any number."""
NAMES_REMEMBERED: Final = 20_000

RECORD_BYTES: Final = 600
"""What a record without bodies takes in the database, about."""

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
        if len(self._models) > NAMES_REMEMBERED or len(self._nodes) > NAMES_REMEMBERED:
            self.forget_ids()
        if self.dialect == "postgresql":
            for day in {record.number // _DAY_NUMBERS for record in records} - self._days:
                self._make_partitions(connection, day)
        rows: list[Any] = []
        bodies: list[Any] = []
        for record in records:
            kept_bytes = len(record.attempts)
            request_body, response_body = record.request_body, record.response_body
            if request_body is not None or response_body is not None:
                kept_bytes += len(request_body or b"") + len(response_body or b"")
                bodies += (record.number, request_body and bytearray(request_body), response_body and bytearray(response_body))
            rows += self._row(connection, record, kept_bytes)
            self.inserted_bytes += kept_bytes
        self.inserted_bytes += len(records) * RECORD_BYTES
        self._many(connection, tables.requests, rows)
        self._many(connection, tables.bodies, bodies)

    def _many(self, connection: Connection, table: Table, values: list[Any]) -> None:
        """`values`: of all rows, one after the other."""
        driver, width = connection.connection.driver_connection, len(table.columns)
        if self.dialect == "postgresql":
            with cast("psycopg.Connection[Any]", driver).cursor() as cursor:
                cursor.executemany(self._inserts[table.name, 1], [values[at : at + width] for at in range(0, len(values), width)])
            return
        execute = cast("sqlite3.Connection", driver).execute
        at = 0
        for rows in ROWS_AT_ONCE:
            some = rows * width
            while len(values) - at >= some:
                execute(self._inserts[table.name, rows], values[at : at + some])
                at += some

    def _row(self, connection: Connection, record: HistoryRecord, kept_bytes: int) -> tuple[Any, ...]:
        model, agent_id = record.model, record.agent_id
        model_id = node_id = None
        if model is not None and (model_id := self._models.get(model)) is None:
            model_id = self._model_id(connection, model)
        if agent_id is not None:
            node = agent_id, record.agent_name or ""
            if (node_id := self._nodes.get(node)) is None:
                node_id = self._node_id(connection, *node)
        prompt_tokens, output_tokens, message = record.prompt_tokens, record.output_tokens, record.message
        return (
            record.number,
            record.request_id,
            self.coordinator_id,
            record.completed_at_ms,
            record.request_type,
            _clean(record.path, PATH_MAX),
            model_id,
            node_id,
            _clean(record.client, CLIENT_MAX),
            record.key_id,
            _STATUS[record.status],
            message and _clean(message, MESSAGE_MAX),
            record.http_status,
            record.duration_ms,
            record.queue_ms,
            record.ttft_ms,
            record.predicted_start_ms,
            prompt_tokens if prompt_tokens < COUNT_MAX else COUNT_MAX,
            output_tokens if output_tokens < COUNT_MAX else COUNT_MAX,
            record.load_ms,
            bytearray(record.attempts),
            _EDGE[record.edge],
            min(record.chunks, COUNT_MAX),
            record.body_bytes,
            kept_bytes,
            _BODIES[record.bodies],
            record.observed_start_ms,
        )

    def _model_id(self, connection: Connection, name: str) -> int:
        """Of a name not seen before."""
        found = self._id_of(connection, tables.models, name=_clean(name, NAME_MAX))
        if len(name) <= NAME_MAX:  # a client may send any
            self._models[name] = found
        return found

    def _node_id(self, connection: Connection, agent_id: str, name: str) -> int:
        found = self._id_of(connection, tables.nodes, agent_id=agent_id, name=_clean(name, NAME_MAX))
        if len(name) <= NAME_MAX:
            self._nodes[agent_id, name] = found
        return found

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
