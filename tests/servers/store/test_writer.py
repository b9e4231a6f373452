"""The writer: batches, the last word on a thing, what is dropped first, failures and recovery, each record once."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, func, select, text

from core.history import HistoryRecord
from servers.store import writer as module
from servers.store.engine import database_url, open_engine
from servers.store.statements import Statements
from servers.store.tables import bodies, requests, things
from servers.store.writer import Writer
from tests.servers.store.databases import NOW, Databases, Ready, record

LIMIT_S = 20.0


@pytest.fixture
def writer(engine: Engine) -> Iterator[Writer]:
    found = Writer(engine, coordinator_id="c")
    yield found
    found.stop(limit_s=LIMIT_S)


def ids(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return [row[0] for row in connection.execute(select(requests.c.request_id).order_by(requests.c.number))]


def until(condition: Callable[[], bool]) -> None:
    """Wait for the writer's thread; looks every few milliseconds."""
    pause = threading.Event()
    for _ in range(int(LIMIT_S / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("the writer did not get there")


def test_what_was_put_is_there_in_order_and_after_a_stop_all_of_it(engine: Engine, writer: Writer) -> None:
    made = [record(NOW + number) for number in range(module.BATCH_MAX + 7)]
    writer.start()
    for one in made:
        writer.put(Ready(one))
    writer.stop(limit_s=LIMIT_S)
    assert ids(engine) == [one.request_id for one in made]
    assert writer.written.records == len(made)


def test_it_is_written_without_being_asked(engine: Engine, writer: Writer) -> None:
    writer.start()
    one = record()
    writer.put(Ready(one))
    until(lambda: ids(engine) == [one.request_id])


def test_the_same_record_again_changes_nothing(engine: Engine, writer: Writer) -> None:
    one = record()
    writer.put(Ready(one))
    writer.put(Ready(one))
    writer.start()
    writer.stop(limit_s=LIMIT_S)
    assert ids(engine) == [one.request_id]


def test_odd_texts_and_great_numbers_are_kept(engine: Engine, writer: Writer) -> None:
    odd = record(model="a\0b\ud800" + "x" * 500, client="\udcff", message="é\n" * 5000, prompt_tokens=2**40, path="/" + "p" * 2000)
    writer.put(Ready(odd))
    writer.put(Ready(record(model=None, agent_id=None, agent_name=None, request_body=None, response_body=None, ttft_ms=None)))
    writer.start()
    writer.stop(limit_s=LIMIT_S)
    assert writer.written.records == 2
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(bodies)).scalar_one() == 1


def test_the_last_word_on_a_thing_wins(engine: Engine, writer: Writer) -> None:
    writer.put_thing("key", "1", b"old")
    writer.put_thing("key", "1", b"new")
    writer.put_thing("key", "2", b"gone")
    writer.start()
    until(lambda: len(_things(engine)) == 2)
    writer.put_thing("key", "2", None)
    writer.put_thing("key", "3", None)
    writer.stop(limit_s=LIMIT_S)
    assert _things(engine) == {("key", "1"): b"new"}


def _things(engine: Engine) -> dict[tuple[str, str], bytes]:
    with engine.connect() as connection:
        return {(kind, name): bytes(data) for kind, name, data in connection.execute(select(things.c.kind, things.c.name, things.c.data))}


def test_bodies_are_dropped_first_then_records_and_both_are_counted(
    engine: Engine, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECORDS_MAX", 3)
    monkeypatch.setattr(module, "PENDING_MAX_BYTES", 30)
    made = [record(NOW + number) for number in range(5)]
    for one in made:
        writer.put(Ready(one))
    assert (writer.written.bodies_dropped, writer.written.records_dropped) == (2, 2)
    writer.start()
    writer.stop(limit_s=LIMIT_S)
    assert ids(engine) == [one.request_id for one in made[:3]]
    assert [one.bodies for one in made[:3]] == ["whole", "dropped", "dropped"]


class Broken(Ready):
    def finished(self) -> HistoryRecord:
        raise ValueError("a bug")


def test_one_bad_record_does_not_keep_the_others_from_the_disk(engine: Engine, writer: Writer) -> None:
    good = record()
    writer.put(Broken(record()))
    writer.put(Ready(good))
    writer.start()
    writer.stop(limit_s=LIMIT_S)
    assert ids(engine) == [good.request_id]
    assert writer.written.records_dropped == 1


def test_a_failure_is_survived_and_nothing_is_lost(engine: Engine, writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE models RENAME TO elsewhere"))
    one = record()
    writer.put(Ready(one))
    writer.start()
    until(lambda: writer.written.failures >= 3)
    assert writer.written.failing is not None
    assert "\n" not in writer.written.failing
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE elsewhere RENAME TO models"))
    until(lambda: writer.written.failing is None and ids(engine) == [one.request_id])


def test_a_stop_while_nothing_can_be_written_ends(engine: Engine, writer: Writer) -> None:
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE models"))
    writer.put(Ready(record()))
    writer.start()
    until(lambda: writer.written.failures >= 1)
    writer.stop(limit_s=LIMIT_S)
    assert writer.written.records_dropped == 1


def test_postgresql_may_go_away_and_come_back(databases: Databases, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    engine = open_engine(database_url(databases.setting("postgresql"), tmp_path))
    writer = Writer(engine, coordinator_id="c")
    writer.start()
    first, second = record(NOW), record(NOW + 1)
    writer.put(Ready(first))
    until(lambda: ids(engine) == [first.request_id])
    databases.postgres.stop("immediate")
    try:
        writer.put(Ready(second))
        until(lambda: writer.written.failures > 0)
    finally:
        databases.postgres.start()
    until(lambda: writer.written.failing is None)
    assert ids(engine) == [first.request_id, second.request_id]
    writer.stop(limit_s=LIMIT_S)
    engine.dispose()


def test_chores_are_done_between_batches_and_questions_answered(engine: Engine, writer: Writer) -> None:
    done: list[str] = []

    def chore(connection: Connection, statements: Statements) -> float:
        done.append(statements.dialect)
        return 0.0 if len(done) < 3 else 1000.0

    writer.add_chore(chore)
    writer.start()
    until(lambda: len(done) == 3)
    assert writer.ask(lambda connection: connection.execute(text("SELECT 1")).scalar_one()) == 1
    with pytest.raises(ValueError, match="asked"):
        writer.ask(_refuse)
    assert done == [engine.dialect.name] * 3


def _refuse(_: Connection) -> None:
    raise ValueError("asked in vain")


def test_a_chore_that_fails_does_not_end_the_writer(engine: Engine, writer: Writer) -> None:
    def chore(connection: Connection, _: Statements) -> float:
        connection.execute(text("SELECT * FROM nowhere"))
        return 0.0

    writer.add_chore(chore)
    writer.start()
    until(lambda: writer.written.failures == 1)
    one = record(at_ms=NOW)
    writer.put(Ready(one))
    until(lambda: ids(engine) == [one.request_id])
