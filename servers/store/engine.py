"""Opens the database: the URL's spelling, the file and its mode, the dialect's settings, the migrations.

Decides whether this program may use this database. Invariants: a SQLite file is 0600 before anything is in it; a database that a newer
program made is never touched; whatever cannot be opened is one sentence that names DATABASE_URL.
"""

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import QueuePool

from core.errors import ConfigError

BUSY_LIMIT_S: Final = 10.0
"""How long SQLite waits for another process, such as a backup, that holds the database."""
CONNECT_LIMIT_S: Final = 5
READERS_MAX: Final = 8
_MIGRATION_LOCK: Final = 0x6F6C6C616D61
"""Of PostgreSQL's advisory locks: one coordinator migrates at a time."""

sqlite3.register_adapter(bytes, memoryview)
sqlite3.register_adapter(type(None), cast("Callable[[None], None]", {}.get))
"""As they are. Without an adapter the driver looks for one at each value, and for each fails with an exception that nobody sees: a tenth of
what a record takes."""

_MIGRATIONS: Final = Path(__file__).with_name("migrations")


def database_url(setting: str, data_dir: Path) -> URL:
    """The setting as SQLAlchemy spells it: `sqlite://FILE` lies in the data directory when relative, `postgresql://` means psycopg 3.

    Raises:
        ConfigError: it is neither.
    """
    scheme, mark, rest = setting.partition("://")
    if mark and scheme in ("sqlite", "sqlite3"):
        name = rest.partition("?")[0]
        # sqlite:///abs as users of SQLAlchemy write it is the absolute path /abs
        return URL.create("sqlite", database=str((data_dir / name).absolute()))
    if mark and scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        try:
            return make_url(f"postgresql+psycopg://{rest}")
        except (SQLAlchemyError, ValueError):
            pass
    raise ConfigError("DATABASE_URL must be sqlite://FILE or postgresql://USER:PASSWORD@HOST/NAME")


def open_engine(url: URL) -> Engine:
    """An engine for `url` with this program's tables in it.

    Raises:
        ConfigError: the database cannot be opened, or a newer program made it.
    """
    if url.drivername == "sqlite":
        _make_private(Path(str(url.database)))
    engine = known_engine(url)
    try:
        with engine.begin() as connection:
            _migrate(connection)
    except SQLAlchemyError as error:
        engine.dispose()
        raise ConfigError(f"DATABASE_URL: the database cannot be used: {first_line(error)}") from None
    except ConfigError:
        engine.dispose()
        raise
    return engine


def known_engine(url: URL) -> Engine:
    """An engine for a database that has this program's tables; nothing is opened yet."""
    if url.drivername == "sqlite":
        engine = create_engine(url, poolclass=QueuePool, pool_size=READERS_MAX, connect_args={"check_same_thread": False})
        event.listen(engine, "connect", _prepare_sqlite)
        return engine
    options = {"connect_timeout": CONNECT_LIMIT_S, "application_name": "ollama-router"}
    return create_engine(url, pool_size=READERS_MAX, pool_pre_ping=True, connect_args=options)


def errors_of(engine: Engine) -> tuple[type[Exception], ...]:
    """What statements may raise: the driver's own errors come from the hot insert, where SQLAlchemy does not stand between."""
    driver: type[Exception] = engine.dialect.loaded_dbapi.Error
    return (SQLAlchemyError, driver)


def revision(engine: Engine) -> str:
    """Which of the migrations this database's tables are of."""
    from alembic.runtime.migration import MigrationContext

    with engine.connect() as connection:
        return str(MigrationContext.configure(connection).get_current_revision())


def first_line(error: BaseException) -> str:
    """The driver's own first sentence: no statement, no parameters (they may be prompts)."""
    origin = getattr(error, "orig", None) or error
    lines = str(origin).strip().splitlines() or [type(origin).__name__]
    return lines[0][:300]


def _make_private(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        os.chmod(path, 0o600)
    except OSError as error:
        raise ConfigError(f"DATABASE_URL: the file {path} cannot be made or written: {error.strerror}") from None


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun below, so that DDL is part of them
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout = {round(BUSY_LIMIT_S * 1000)}",
        "auto_vacuum = INCREMENTAL",
        "journal_mode = WAL",
        "synchronous = NORMAL",  # in WAL a crash of the process loses nothing, one of the machine the last moments
        "journal_size_limit = 67108864",
        "cache_size = -32768",
        "temp_store = MEMORY",
        "foreign_keys = ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _migrate(connection: Connection) -> None:
    from alembic import command  # a quarter of the time that the process that writes would take to start, which never migrates
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
    else:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = ScriptDirectory.from_config(config)
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None and inspect(connection).has_table("requests"):
        raise ConfigError("DATABASE_URL: the database has a table 'requests' that is not this program's: name an empty one")
    if found is not None and found not in {script.revision for script in known.walk_revisions()}:
        raise ConfigError(
            f"DATABASE_URL: the database was made by a newer version of this program (its tables are of {found}): "
            "use that version, or name another database"
        )
    if found != known.get_current_head():
        command.upgrade(config, "head")
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("COMMIT")
