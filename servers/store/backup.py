"""A backup of the whole database as one file, the same from SQLite and PostgreSQL: gzip over lines of JSON.

Decides the file's form: a head that names the version of the tables, a line for each small thing, one for each record with its bodies, and
an end that counts them. Must never know who asks. Invariants: it is written and read a piece at a time, beside a coordinator that goes
on; a file that is not whole or of other tables changes nothing; what is in the database already is left alone, so that it may be repeated.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Final

import msgspec
from sqlalchemy import Connection, Engine, select

from core.errors import ConfigError
from core.history import HistoryRecord
from servers.store import queries, tables
from servers.store.engine import revision
from servers.store.statements import Statements
from servers.store.writer import Transaction

FORMAT: Final = "ollama-router backup 1"
OLDER_TABLES: Final = ("0001",)
"""Of earlier versions of this program: what their records do not say has a default."""
BATCH: Final = 200
_BROKEN: Final = (OSError, EOFError, zlib.error, msgspec.MsgspecError)


class _Thing(msgspec.Struct):
    kind: str
    name: str
    data: bytes
    updated_at_ms: int


class Counts(msgspec.Struct):
    """What a backup holds."""

    things: int = 0
    records: int = 0


class _Line(msgspec.Struct, omit_defaults=True):
    """One of them, and the id of the coordinator that it belongs to."""

    by: str = ""
    thing: _Thing | None = None
    record: HistoryRecord | None = None
    end: Counts | None = None


class _Head(msgspec.Struct):
    format: str
    tables: str


_encode: Final = msgspec.json.Encoder().encode
_line: Final = msgspec.json.Decoder(_Line).decode


# ---------------------------------------------------------------- written


def write(engine: Engine, out: IO[bytes], *, advance: Callable[[int], object] = lambda count: None) -> Counts:
    """Everything into `out`. `advance` is told bytes before they are packed."""
    counts = Counts()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as packed:

        def put(line: object) -> None:
            advance(packed.write(_encode(line) + b"\n"))

        put(_Head(FORMAT, revision(engine)))
        with engine.connect() as connection:
            for row in connection.execute(select(tables.things)).all():
                put(_Line(by=row.coordinator_id, thing=_Thing(row.kind, row.name, bytes(row.data), row.updated_at_ms)))
                counts.things += 1
        for line in _records(engine):
            put(line)
            counts.records += 1
        put(_Line(end=counts))
    return counts


def _records(engine: Engine) -> Iterator[_Line]:
    """Each piece is a question of its own, so that no transaction stays open as long as the disk writes."""
    below: int | None = queries.BEYOND
    while below is not None:
        with engine.connect() as connection:
            found, below = queries.next_piece(connection, queries.Filters(), below)
        for shown in found:
            shown["request_id"], shown["attempts"] = shown.pop("id"), _encode(shown["attempts"])
            by = shown.pop("coordinator_id")
            for name in ("request_body", "response_body"):
                shown[name] = None if shown[name] is None else bytes(shown[name])
            yield _Line(by=by, record=HistoryRecord(**shown))


# ---------------------------------------------------------------- read


def restore(engine: Engine, source: IO[bytes], *, advance: Callable[[int], object] = lambda count: None) -> Counts:
    """Put what a backup holds into a database that has this program's tables. The backup's word on a small thing wins.

    Returns what the backup holds. Raises ConfigError when it is no whole backup of these tables; then nothing has changed.
    """
    for _ in _lines(engine, source, advance):
        pass
    statements: dict[str, Statements] = {}
    counts = Counts()
    batch: list[_Line] = []
    for line in _lines(engine, source, advance):
        batch.append(line)
        if len(batch) == BATCH or line.end is not None:
            with Transaction(engine) as connection:
                _put(connection, engine.dialect.name, statements, batch)
            batch.clear()
        counts = line.end or counts
    return counts


def _put(connection: Connection, dialect: str, statements: dict[str, Statements], batch: list[_Line]) -> None:
    for line in batch:
        if line.by not in statements:
            statements[line.by] = Statements(dialect, line.by)
        if line.thing is not None:
            thing = line.thing
            statements[line.by].put_things(connection, {(thing.kind, thing.name): thing.data}, now_ms=thing.updated_at_ms)
    for by in {line.by: None for line in batch}:
        statements[by].insert(connection, [line.record for line in batch if line.record is not None and line.by == by])


def _lines(engine: Engine, source: IO[bytes], advance: Callable[[int], object]) -> Iterator[_Line]:
    """From the beginning to the end, which is the last. Raises ConfigError."""
    source.seek(0)
    counts = Counts()
    try:
        with gzip.GzipFile(fileobj=source, mode="rb") as packed:
            _check(engine, packed.readline(1000))
            while True:
                data = packed.readline()
                line = _line(data)
                counts.things += line.thing is not None
                counts.records += line.record is not None
                if line.end is not None and line.end != counts:
                    raise EOFError
                advance(len(data))
                yield line
                if line.end is not None:
                    return
    except _BROKEN:
        raise ConfigError("this is no backup, or not all of one") from None


def _check(engine: Engine, first: bytes) -> None:
    head = msgspec.json.decode(first, type=_Head)
    if head.format != FORMAT:
        raise ConfigError("a newer version of this program made this backup: restore it with that version")
    ours = revision(engine)
    if head.tables != ours and head.tables not in OLDER_TABLES:
        raise ConfigError(
            f"this backup is of tables {head.tables}, this program's are {ours}: restore it with the version that made it, "
            "then start this one, which brings the tables up to date"
        )
