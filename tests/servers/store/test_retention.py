"""Retention: too old goes, too much goes, the oldest first, slice by slice, and no more than must."""

import pytest
from sqlalchemy import Engine, func, inspect, select

from core.history import DAY_MS
from core.units import UnixMs
from servers.store import retention as module
from servers.store.retention import BUSY_S, IDLE_S, Retention
from servers.store.statements import RECORD_BYTES, Statements
from servers.store.tables import bodies, requests
from servers.store.writer import Transaction
from tests.servers.store.databases import NOW, record

SIZE = RECORD_BYTES + len(b'{"model":"m"}{"done":true}[{"node":"node","outcome":"success","ms":5.0}]')


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE", 4)


class Kept:
    """A database with ten records an hour apart, and its retention."""

    def __init__(self, engine: Engine, *, hours: float = 1.0, **limits: int) -> None:
        self.engine = engine
        self.statements = Statements(engine.dialect.name, "c")
        self.made = [record(round(NOW + number * hours * 3600_000)) for number in range(10)]
        self.now = UnixMs(self.made[-1].at_ms)
        self.retention = Retention(**{"days": 7, "max_bytes": 10**9, **limits}, clock=lambda: self.now)
        self.insert(*self.made)

    def insert(self, *records: object) -> None:
        with Transaction(self.engine) as connection:
            self.statements.insert(connection, records)  # type: ignore[arg-type]

    def run(self) -> int:
        """Slices until there is nothing to do; returns how many did something."""
        for slices in range(100):
            with Transaction(self.engine) as connection:
                pause_s = self.retention(connection, self.statements)
            if pause_s == IDLE_S:
                return slices
            assert pause_s == BUSY_S
        raise AssertionError("there is no end to it")

    def left(self) -> list[int]:
        with self.engine.connect() as connection:
            numbers = [row[0] for row in connection.execute(select(requests.c.number).order_by(requests.c.number))]
            assert connection.execute(select(func.count()).select_from(bodies)).scalar_one() == len(numbers)
        return numbers


def test_nothing_goes_that_may_stay(engine: Engine) -> None:
    kept = Kept(engine)
    assert kept.run() == 0
    assert len(kept.left()) == 10


def test_what_is_too_old_goes(engine: Engine) -> None:
    kept = Kept(engine)
    kept.now = UnixMs(kept.made[6].at_ms + 7 * DAY_MS)
    slices = kept.run()
    assert kept.left() == [made.number for made in kept.made[6:]]
    assert slices <= 3
    assert kept.retention.deleted_bytes >= 6 * SIZE


def test_what_is_too_much_goes_the_oldest_first_and_not_at_once(engine: Engine) -> None:
    kept = Kept(engine, max_bytes=5 * SIZE)
    assert kept.run() == 2
    assert kept.left() == [made.number for made in kept.made[8:]]
    assert kept.retention.deleted_bytes == 8 * SIZE
    kept.insert(*(record(kept.now + number) for number in range(1, 4)))
    assert kept.run() == 0
    kept.insert(record(kept.now + 10))
    kept.now = UnixMs(kept.now + 20)
    assert kept.run() == 1
    assert len(kept.left()) == 2


def test_what_there_is_is_measured_a_little_at_a_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURED_AT_ONCE", 3)
    kept = Kept(engine, max_bytes=10 * SIZE)
    with Transaction(engine) as connection:
        assert kept.retention(connection, kept.statements) == BUSY_S
    kept.insert(record(kept.now + 1))  # while it is measured
    assert kept.run() == 2
    assert len(kept.left()) == 11
    kept.now = UnixMs(kept.now + 2)
    assert kept.run() == 1
    assert len(kept.left()) == 7


def test_a_day_of_postgresql_is_dropped_whole(engine: Engine) -> None:
    kept = Kept(engine, hours=12.0)
    kept.now = UnixMs(NOW + 9 * DAY_MS)
    kept.run()
    tables = inspect(engine).get_table_names()
    days = {name for name in tables if name.startswith("requests_")}
    assert kept.left() == [made.number for made in kept.made if made.at_ms >= kept.now - 7 * DAY_MS]
    if engine.dialect.name == "postgresql":
        assert len(days) == len({made.at_ms // DAY_MS for made in kept.made if made.at_ms >= (kept.now - 7 * DAY_MS) // DAY_MS * DAY_MS})
        kept.insert(record(int(NOW)))
        assert len(kept.left()) == 1 + len([made for made in kept.made if made.at_ms >= kept.now - 7 * DAY_MS])


def test_sqlite_gives_free_pages_back(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VACUUM_PAGES", 10)
    monkeypatch.setattr(module, "SLICE", 500)
    kept = Kept(engine, max_bytes=1)
    kept.insert(*(record(kept.now + number, request_body=b"x" * 5000) for number in range(1, 200)))
    kept.now = UnixMs(kept.now + 1000)
    kept.run()
    assert kept.left() == []
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA freelist_count").scalar_one() < 100
            assert connection.exec_driver_sql("PRAGMA page_count").scalar_one() < 200
