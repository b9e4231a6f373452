"""Opening a database: spellings, the file's mode, a newer program's tables, strangers' tables, and what cannot be opened."""

import os
import stat
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Engine, create_engine, inspect, text

from core.errors import ConfigError
from core.history import DAY_MS, NUMBER_SHIFT, HistoryRecord
from servers import store
from servers.store.engine import database_url, open_engine, revision
from servers.store.queries import BEYOND, Filters, next_piece
from servers.store.statements import Statements
from servers.store.tables import metadata
from servers.store.writer import Transaction
from tests.servers.store.databases import NOW, Databases, record


@pytest.mark.parametrize(
    ("setting", "url"),
    [
        ("sqlite://coordinator.db", "sqlite:////data/coordinator.db"),
        ("sqlite://sub/x.db", "sqlite:////data/sub/x.db"),
        ("sqlite:///abs/x.db", "sqlite:////abs/x.db"),
        ("postgresql://me:secret@host:5433/name?sslmode=require", "postgresql+psycopg://me:***@host:5433/name?sslmode=require"),
        ("postgres://me@host/name", "postgresql+psycopg://me@host/name"),
    ],
)
def test_the_seeds_spelling_is_translated(setting: str, url: str) -> None:
    assert str(database_url(setting, Path("/data"))) == url


@pytest.mark.parametrize("setting", ["", "x", "mysql://a/b", "sqlite:x", "postgresql://host:port/x"])
def test_another_url_is_refused_by_its_setting(setting: str) -> None:
    with pytest.raises(ConfigError, match="DATABASE_URL must be"):
        database_url(setting, Path("/data"))


def test_the_file_is_its_owners_only_and_opens_again(tmp_path: Path) -> None:
    url = database_url("sqlite://sub/x.db", tmp_path)
    os.umask(os.umask(0))
    open_engine(url).dispose()
    path = tmp_path / "sub" / "x.db"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in path.parent.iterdir())
    open_engine(url).dispose()


def test_the_migrations_make_what_the_tables_say(engine: Engine) -> None:
    found = inspect(engine)
    assert {table.name for table in metadata.sorted_tables} <= set(found.get_table_names())
    for table in metadata.sorted_tables:
        assert [column["name"] for column in found.get_columns(table.name)] == [column.name for column in table.columns]
        assert {index["name"] for index in found.get_indexes(table.name)} >= {index.name for index in table.indexes}


def made_by_the_first_version(url: URL) -> list[HistoryRecord]:
    """A database as the first tables were, with the records in it that are returned."""
    engine = create_engine(url)
    config = Config()
    config.set_main_option("script_location", str(Path(store.__file__).with_name("migrations")))
    made = [record(NOW + number * DAY_MS) for number in range(3)]
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        assert "observed_start_ms" not in {column["name"] for column in inspect(connection).get_columns("requests")}
        connection.execute(text("INSERT INTO models (id, name) VALUES (1, 'm')"))
        connection.execute(text("INSERT INTO nodes (id, agent_id, name) VALUES (1, 'a', 'node')"))
        for one in made:
            if engine.dialect.name == "postgresql":
                Statements("postgresql", "c")._make_partitions(connection, one.number // (DAY_MS << NUMBER_SHIFT))
            values = {
                "number": one.number, "request_id": one.request_id, "coordinator_id": "c", "completed_at_ms": one.completed_at_ms,
                "request_type": "chat", "path": "/api/chat", "model_id": 1, "node_id": 1, "client": "10.0.0.1", "key_id": None,
                "status": 0, "message": "", "http_status": 200, "duration_ms": 5.0, "queue_ms": 0.5, "ttft_ms": 2.0,
                "predicted_start_ms": 3.0, "prompt_tokens": 3, "output_tokens": 4, "load_ms": 0.0, "attempts": one.attempts, "edge": 0,
                "chunks": 3, "body_bytes": 10, "kept_bytes": 60, "bodies": 0,
            }  # fmt: skip
            holders = ", ".join(f":{name}" for name in values)
            connection.execute(text(f"INSERT INTO requests ({', '.join(values)}) VALUES ({holders})"), values)
            kept = {"number": one.number, "asked": one.request_body, "answered": one.response_body}
            connection.execute(text("INSERT INTO bodies (number, request_body, response_body) VALUES (:number, :asked, :answered)"), kept)
    engine.dispose()
    return made


def test_a_database_of_the_first_version_is_brought_up_to_date_with_its_rows(databases: Databases, kind: str, tmp_path: Path) -> None:
    url = database_url(databases.setting(kind), tmp_path)
    made = made_by_the_first_version(url)
    engine = open_engine(url)
    assert revision(engine) == "0002"
    new = record(NOW + 3 * DAY_MS, predicted_start_ms=3.0, observed_start_ms=4.5)
    with Transaction(engine) as connection:
        Statements(kind, "c").insert(connection, [new, *made])
    engine.dispose()
    engine = open_engine(url)  # nothing is left to be done
    with engine.connect() as connection:
        found, rest = next_piece(connection, Filters(), BEYOND)
    engine.dispose()
    assert rest is None
    assert [(one["id"], one["predicted_start_ms"], one["observed_start_ms"]) for one in found] == [
        (new.request_id, 3.0, 4.5), *((one.request_id, 3.0, None) for one in reversed(made)),
    ]  # fmt: skip
    assert {(one["model"], one["agent_name"], bytes(one["request_body"])) for one in found} == {("m", "node", b'{"model":"m"}')}


def test_a_newer_programs_database_is_left_alone(databases: Databases, kind: str, tmp_path: Path) -> None:
    url = database_url(databases.setting(kind), tmp_path)
    open_engine(url).dispose()
    plain = create_engine(url)
    with plain.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="made by a newer version"):
        open_engine(url)
    with plain.begin() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "9999"
    plain.dispose()


def test_a_strangers_tables_are_left_alone(databases: Databases, kind: str, tmp_path: Path) -> None:
    url = database_url(databases.setting(kind), tmp_path)
    plain = create_engine(url)
    with plain.begin() as connection:
        connection.execute(text("CREATE TABLE requests (x INTEGER)"))
    plain.dispose()
    with pytest.raises(ConfigError, match="not this program's"):
        open_engine(url)


def test_what_cannot_be_opened_is_one_sentence(databases: Databases, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    (tmp_path / "other.db").write_bytes(b"this is no database at all, whatever its name says" * 50)
    for setting in ("sqlite://file/x.db", "sqlite://other.db", databases.postgres.url("not_there")):
        with pytest.raises(ConfigError, match="DATABASE_URL") as caught:
            open_engine(database_url(setting, tmp_path))
        assert "\n" not in str(caught.value)
