"""Both databases for a test, empty, and records to put into them."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from core.history import HistoryRecord, number_of
from core.units import UnixMs
from servers.store.engine import database_url, open_engine
from servers.store.statements import Statements
from servers.store.writer import Transaction
from tests.servers.store.postgres import Postgres

NOW = UnixMs(1_800_000_000_000)
_databases = count(1)


class Databases:
    """A place for SQLite files, and a PostgreSQL that runs once it is needed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._postgres: Postgres | None = None

    @property
    def postgres(self) -> Postgres:
        if self._postgres is None:
            self._postgres = Postgres()
            self._postgres.start()
        return self._postgres

    def setting(self, kind: str) -> str:
        """A DATABASE_URL of a new, empty database."""
        name = f"router{next(_databases)}"
        return f"sqlite://{name}.db" if kind == "sqlite" else self.postgres.create(name)

    @contextmanager
    def engine(self, kind: str) -> Iterator[Engine]:
        engine = open_engine(database_url(self.setting(kind), self._directory))
        try:
            yield engine
        finally:
            engine.dispose()

    def close(self) -> None:
        if self._postgres is not None:
            self._postgres.close()


_records = count()


def record(at_ms: int = NOW, **fields: Any) -> HistoryRecord:
    """A record of a good chat."""
    at = UnixMs(at_ms)
    number = number_of(at, next(_records) % 1024)
    made: dict[str, Any] = {
        "number": number, "request_id": f"id-{number}", "at_ms": at, "completed_at_ms": at, "request_type": "chat", "path": "/api/chat",
        "model": "m", "agent_id": "a", "agent_name": "node", "client": "10.0.0.1", "key_id": None, "status": "success", "message": "",
        "http_status": 200, "duration_ms": 5.0, "queue_ms": 0.5, "ttft_ms": 2.0, "predicted_start_ms": None, "prompt_tokens": 3,
        "output_tokens": 4, "load_ms": 0.0, "attempts": b'[{"node":"node","outcome":"success","ms":5.0}]', "edge": "embedded", "chunks": 3,
        "body_bytes": 10, "request_body": b'{"model":"m"}', "response_body": b'{"done":true}', "bodies": "whole",
    }  # fmt: skip
    return HistoryRecord(**{**made, **fields})


class Ready:
    """A draft that is finished already."""

    def __init__(self, made: HistoryRecord) -> None:
        self._made = made

    def finished(self) -> HistoryRecord:
        return self._made


def insert(engine: Engine, *made: HistoryRecord) -> None:
    """Put records into a database, without a writer."""
    with Transaction(engine) as connection:
        Statements(engine.dialect.name, "c").insert(connection, made)
