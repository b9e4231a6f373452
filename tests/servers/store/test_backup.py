"""A backup comes back whole, into either database; what is no whole backup changes nothing."""

import gzip
import io
import json
from typing import Any

import pytest
from sqlalchemy import Engine, select

from core.errors import ConfigError
from core.history import HistoryRecord
from servers.store import backup as module
from servers.store.backup import Counts, restore, write
from servers.store.queries import BEYOND, Filters, next_piece
from servers.store.statements import Statements
from servers.store.tables import models, things
from servers.store.writer import Transaction
from tests.servers.store.databases import NOW, Databases, record

BROKEN = "no backup, or not all"


def fill(engine: Engine, *made: HistoryRecord, by: str = "c", **kept: bytes) -> None:
    with Transaction(engine) as connection:
        statements = Statements(engine.dialect.name, by)
        statements.insert(connection, made)
        statements.put_things(connection, {("key", name): data for name, data in kept.items()}, now_ms=5)


def held(engine: Engine) -> tuple[list[dict[str, Any]], set[tuple[Any, ...]]]:
    with engine.connect() as connection:
        records, rest = next_piece(connection, Filters(), BEYOND)
        assert rest is None
        rows = connection.execute(select(things)).all()
    return records, {(row.kind, row.name, row.coordinator_id, bytes(row.data), row.updated_at_ms) for row in rows}


@pytest.fixture(params=["sqlite", "postgresql"])
def other(databases: Databases, request: pytest.FixtureRequest) -> Any:
    with databases.engine(request.param) as found:
        yield found


def saved(engine: Engine) -> io.BytesIO:
    out = io.BytesIO()
    write(engine, out)
    return out


def test_everything_comes_back_in_either_database(engine: Engine, other: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 3)
    odd = record(NOW + 1, model=None, agent_id=None, agent_name=None, request_body=None, response_body=None, ttft_ms=None, bodies="off")
    fill(
        engine,
        *(record(NOW + 10 + number, request_body=b"\xff\0" * number, observed_start_ms=float(number)) for number in range(7)),
        odd,
        one=b"\0\xff",
        two=b"{}",
    )
    fill(engine, record(NOW + 2), by="another", three=b"3")
    told: list[int] = []
    out = io.BytesIO()
    assert write(engine, out, advance=told.append) == Counts(things=3, records=9)
    assert len(gzip.decompress(out.getvalue())) == sum(told)
    fill(other, *(record(NOW + 99, model="first of its ids"),), one=b"older")
    before, _ = held(other)
    assert restore(other, out) == restore(other, out) == Counts(things=3, records=9)
    records, kept = held(other)
    assert records == before + held(engine)[0]
    assert kept == held(engine)[1]
    assert {one["coordinator_id"] for one in records} == {"c", "another"}
    with other.connect() as connection:
        assert {row.name for row in connection.execute(select(models))} == {"m", "first of its ids"}


def test_an_empty_database(engine: Engine) -> None:
    assert restore(engine, saved(engine)) == Counts()


def test_what_is_no_whole_backup_changes_nothing(engine: Engine, databases: Databases) -> None:
    fill(engine, *(record(NOW + number) for number in range(5)), one=b"1")
    whole = saved(engine).getvalue()
    lines = gzip.decompress(whole).splitlines(keepends=True)
    broken = [
        b"",
        b"{}",
        whole[:-30],
        whole[: len(whole) // 2],
        *(gzip.compress(b"".join(part)) for part in (lines[:-1], lines[:3] + lines[4:], [b"{}\n"])),
    ]
    with databases.engine(engine.dialect.name) as empty:
        for data in broken:
            with pytest.raises(ConfigError, match=BROKEN):
                restore(empty, io.BytesIO(data))
        assert held(empty) == ([], set())


def test_a_backup_of_the_first_tables_comes_back(engine: Engine, databases: Databases) -> None:
    fill(engine, record(NOW, observed_start_ms=7.0), record(NOW + 1), one=b"1")
    lines = [json.loads(one) for one in gzip.decompress(saved(engine).getvalue()).splitlines()]
    assert {one["record"].pop("observed_start_ms") for one in lines if "record" in one} == {7.0, None}
    lines[0]["tables"] = "0001"
    older = io.BytesIO(gzip.compress(b"".join(json.dumps(one).encode() + b"\n" for one in lines)))
    with databases.engine(engine.dialect.name) as empty:
        assert restore(empty, older) == Counts(things=1, records=2)
        assert held(empty)[0] == [{**one, "observed_start_ms": None} for one in held(engine)[0]]


def test_other_versions_are_refused_with_a_sentence(engine: Engine) -> None:
    for head, says in (
        (b'{"format":"ollama-router backup 1","tables":"0999"}', "is of tables 0999, this program's are 0002"),
        (b'{"format":"ollama-router backup 2","tables":"0001"}', "a newer version of this program made this backup"),
    ):
        with pytest.raises(ConfigError, match=says):
            restore(engine, io.BytesIO(gzip.compress(head + b"\n")))
