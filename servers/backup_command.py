"""`ollama-router backup` and `restore`: everything that lasts, as one file, while the coordinator runs.

Decides how a person is talked to. It opens the database itself, by the coordinator's own settings. Invariants: the file is its owner's
alone, for it holds prompts and hashes of tokens; a backup that did not come whole leaves no file.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from core.errors import ConfigError
from servers import settings
from servers.history_command import moving_bar, whole_file

if TYPE_CHECKING:  # loaded where a database is opened: all commands load this module
    from sqlalchemy import Engine

_FILE = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


@click.command()
@_FILE
def backup(file: Path) -> None:
    """Write history, nodes, keys, tasks and the policy to FILE.

    Run it where the coordinator runs, with its DATABASE_URL and ROUTER_DATA_DIR; the coordinator goes on meanwhile. What lies beside the
    database in the data directory (admin token, the fleet's secret) is not in it.
    """
    from servers.store import backup as form

    with _database(must_exist=True) as engine, whole_file(file) as out, moving_bar(file.name) as advance:
        counts = form.write(engine, out, advance=advance)
    click.echo(f"{counts.records} records and {counts.things} other things are in {file}.")


@click.command()
@_FILE
def restore(file: Path) -> None:
    """Bring back what 'ollama-router backup' wrote to FILE, into a new database or one that is in use.

    Records that are there already stay as they are. A coordinator that runs shows the records at once; it takes up nodes, keys, tasks and
    the policy at its next start.
    """
    from servers.store import backup as form

    try:
        with file.open("rb") as source, _database(must_exist=False) as engine, moving_bar(file.name) as advance:
            counts = form.restore(engine, source, advance=advance)
    except OSError as error:
        raise click.ClickException(f"{file} cannot be read: {error.strerror}") from None
    click.echo(f"{counts.records} records and {counts.things} other things were restored. Start the coordinator again.")


@contextmanager
def _database(*, must_exist: bool) -> "Iterator[Engine]":
    import psycopg
    from sqlalchemy.exc import SQLAlchemyError

    from servers.store.engine import database_url, first_line, open_engine

    try:
        chosen = settings.load(os.environ)
        url = database_url(chosen.database_url, chosen.data_dir)
        if must_exist and url.drivername == "sqlite" and not Path(str(url.database)).exists():
            raise ConfigError(f"there is no database at {url.database}: set ROUTER_DATA_DIR or DATABASE_URL as for the coordinator")
        engine = open_engine(url)
        try:
            yield engine
        finally:
            engine.dispose()
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    except (SQLAlchemyError, sqlite3.Error, psycopg.Error) as error:
        raise click.ClickException(f"the database does not answer: {first_line(error)}") from None
