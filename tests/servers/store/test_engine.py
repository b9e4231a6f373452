"""Opening a database: spellings, the file's mode, a newer program's tables, strangers' tables, and what cannot be opened."""

import os
import stat
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, inspect, text

from core.errors import ConfigError
from servers.store.engine import database_url, open_engine
from servers.store.tables import metadata
from tests.servers.store.databases import Databases


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
