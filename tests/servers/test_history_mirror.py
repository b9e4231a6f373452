"""An earlier router's history is taken over once, whatever fails in between; the mirror shows what the database holds."""

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select
from structlog.testing import capture_logs

from core.history import DAY_MS, HistoryRecord
from core.units import UnixMs
from servers import clock
from servers import history_mirror as module
from servers.history_mirror import Import, Mirror
from servers.store.filters import Filters
from servers.store.retention import delete_some
from servers.store.statements import Statements
from servers.store.tables import bodies, requests
from servers.store.writer import Transaction
from tests.servers.store.databases import NOW, Databases, insert, record
from tests.servers.test_history_file import ENTRY


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    found = Databases(tmp_path_factory.mktemp("databases"))
    yield found
    found.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, databases: Databases) -> Iterator[Engine]:
    with databases.engine(request.param) as found:
        yield found


def entry(number: int, age_ms: int = 60_000) -> dict[str, Any]:
    return {**ENTRY, "id": f"id-{number}", "timestamp": clock.rfc3339(UnixMs(NOW - age_ms))}


class Importing:
    """An import into a database, slice by slice."""

    def __init__(self, engine: Engine, *paths: Path, **more: Any) -> None:
        self.engine = engine
        self.statements = Statements(engine.dialect.name, "c")
        self.done = 0
        self.chore = Import(paths, clock=lambda: NOW, retention_days=7, keep=more.pop("keep", _all), done=self._finish, **more)

    def step(self) -> None:
        with Transaction(self.engine) as connection:
            self.chore(connection, self.statements)

    def _finish(self) -> None:
        self.done += 1

    def run(self) -> list[str]:
        """Returns the ids that are there then, the newest first."""
        for _ in range(100):
            self.step()
            if self.chore.is_done:
                break
        self.step()
        assert (self.chore.is_done, self.done) == (True, 1)
        with self.engine.connect() as connection:
            return [row[0] for row in connection.execute(select(requests.c.request_id).order_by(requests.c.number.desc()))]


def _all(record: HistoryRecord) -> None:
    record.bodies = "whole"


def test_entries_are_imported_once_and_bad_ones_counted_in_one_line(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "request_history.json"
    made = [entry(1, 5000), entry(2, 5000), {"id": "bad"}, entry(3, 8 * DAY_MS), 7, entry(4, 1000), entry(4, 1000)]
    path.write_text(json.dumps(made))
    with capture_logs() as logs:
        assert Importing(engine, path, path, tmp_path / "none.json").run() == ["id-4", "id-2", "id-1"]
    (said,) = logs
    assert {name: said[name] for name in ("imported", "known", "too_old", "unreadable")} == {
        "imported": 3, "known": 1, "too_old": 1, "unreadable": 2,
    }  # fmt: skip
    path.write_text(json.dumps([entry(5)]))
    assert Importing(engine, path).run() == ["id-4", "id-2", "id-1"]
    path.rename(tmp_path / "other.json")
    assert Importing(engine, tmp_path / "other.json").run() == ["id-4", "id-2", "id-1", "id-5"]


def test_what_a_failed_transaction_lost_is_imported_again(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE", 2)
    path = tmp_path / "request_history.json"
    path.write_text(json.dumps([entry(number) for number in range(5)]))
    importing = Importing(engine, path)
    importing.step()
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError), Transaction(engine) as connection:
            importing.chore(connection, importing.statements)
            raise sqlite3.OperationalError("disk full")
        importing.statements.forget_ids()
    assert len(importing.run()) == 5


def test_a_start_after_a_crash_goes_on_where_it_was(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE", 2)
    path = tmp_path / "request_history.json"
    path.write_text(json.dumps([entry(number) for number in range(6)]))
    first = Importing(engine, path)
    for _ in range(3):
        first.step()
    found = Importing(engine, path).run()
    assert sorted(found) == [f"id-{number}" for number in range(6)]


def test_with_bodies_off_none_is_taken_over(engine: Engine, tmp_path: Path) -> None:
    def nothing(record: HistoryRecord) -> None:
        record.request_body = record.response_body = None

    path = tmp_path / "request_history.json"
    path.write_text(json.dumps([entry(1)]))
    assert Importing(engine, path, keep=nothing).run() == ["id-1"]
    with engine.connect() as connection:
        assert connection.execute(select(bodies.c.number)).all() == []


def test_a_file_that_cannot_be_read_is_told_and_passed_over(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with capture_logs() as logs:
        assert Importing(engine, tmp_path / "directory").run() == []
    assert [said["why"] for said in logs] == ["Is a directory"]


def test_the_mirrors_own_file_is_never_imported(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "request_history.json"
    assert Importing(engine, path, owned=[path]).run() == []
    path.write_text(json.dumps([entry(1)]))
    assert Importing(engine, path, owned=[path]).run() == []


# ---------------------------------------------------------------- the mirror


def test_the_newest_records_are_mirrored_and_deletions_too(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIRRORED", 30)
    path = tmp_path / "request_history.json"
    mirror = Mirror(engine, path, ready=lambda: True)
    mirror.look()
    assert read(path) == []
    made = [record(NOW + number, status="error" if number == 35 else "success") for number in range(40)]
    insert(engine, *made)
    mirror.look()
    assert [one["id"] for one in read(path)] == [one.request_id for one in made[10:]]
    assert read(path)[0]["request_body"] == {"model": "m"}
    with Transaction(engine) as connection:
        delete_some(connection, Filters(status="error"))
    mirror.look()
    assert [one["id"] for one in read(path)] == [one.request_id for one in (*made[9:35], *made[36:])]
    before = inode(path)
    mirror.look()
    assert inode(path) == before
    monkeypatch.setattr(module, "MIRROR_MAX_BYTES", 400)
    insert(engine, record(NOW + 100, request_body=b"x" * 200))
    mirror.look()
    assert len(read(path)) == 2


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def inode(path: Path) -> int:
    return os.stat(path).st_ino


def test_a_mirror_that_cannot_be_written_says_so_once_and_comes_back(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "later" / "request_history.json"
    mirror = Mirror(engine, path, ready=lambda: True)
    with capture_logs() as logs:
        mirror.look()
        mirror.look()
    assert [said["why"] for said in logs] == ["No such file or directory"]
    path.parent.mkdir()
    mirror.look()
    assert read(path) == []


def test_it_waits_for_the_import_and_looks_now_and_then(engine: Engine, tmp_path: Path) -> None:
    waited: list[float] = []
    looked: list[int] = []

    class Clock(threading.Event):
        """Ends when it was waited for five times."""

        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waited.append(timeout)
            return len(waited) == 5

    class Looking(Mirror):
        def look(self) -> None:
            looked.append(len(waited))

    Looking(engine, tmp_path / "x", ready=lambda: len(waited) >= 2).run(Clock())
    assert waited == [module.SOON_S, module.SOON_S, module.LOOK_S, module.LOOK_S, module.LOOK_S]
    assert looked == [2, 3, 4]
