"""The writer: order, each record once, the last word on a thing, failures and recovery, chores; and what is asked of it."""

import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Connection, Engine, func, select, text

from core.history import HistoryRecord
from servers.store import retention
from servers.store import writer as module
from servers.store.engine import database_url, open_engine
from servers.store.filters import Filters
from servers.store.messages import Delete, Done, Failed, Said, Sync, Word, Works
from servers.store.statements import Statements
from servers.store.tables import bodies, requests, things
from servers.store.writer import Writer
from tests.servers.store.databases import NOW, Databases, Ready, record

LIMIT_S = 20.0
_numbers = count(1)


class Loose(NamedTuple):
    """A batch that was never packed."""

    number: int
    count: int
    drafts: tuple[Any, ...]
    things: tuple[tuple[str, str, bytes | None], ...]


class Hearing:
    """A writer, and what it tells."""

    def __init__(self, engine: Engine) -> None:
        self.told: list[Word] = []
        self.writer = Writer(engine, coordinator_id="c", tell=self.told.append)
        self.start, self.add_chore = self.writer.start, self.writer.add_chore

    def put(self, *drafts: Any, things: tuple[tuple[str, str, bytes | None], ...] = ()) -> int:
        number = next(_numbers)
        self.writer.put(Loose(number, len(drafts), drafts, things))
        return number

    def ask(self, asked: type[Sync] | type[Delete], *more: Any) -> Done:
        number = next(_numbers)
        self.writer.put(asked(number, *more))
        until(lambda: self.done(number) is not None)
        found = self.done(number)
        assert found is not None
        return found

    def stop(self) -> None:
        assert self.writer.stop(limit_s=LIMIT_S)

    def done(self, number: int) -> Done | None:
        return next((word for word in list(self.told) if isinstance(word, Done) and word.number == number), None)

    def all_of(self, kind: type[Any]) -> list[Any]:
        return [word for word in list(self.told) if isinstance(word, kind)]


@pytest.fixture
def writer(engine: Engine) -> Iterator[Hearing]:
    found = Hearing(engine)
    yield found
    found.stop()


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


def test_what_was_put_is_there_in_order_and_after_a_stop_all_of_it(engine: Engine, writer: Hearing) -> None:
    made = [record(NOW + number) for number in range(507)]
    writer.start()
    numbers = [writer.put(*map(Ready, made[at : at + 100])) for at in range(0, len(made), 100)]
    writer.stop()
    assert ids(engine) == [one.request_id for one in made]
    assert writer.told == [Done(number, 100 if number != numbers[-1] else 7) for number in numbers]


def test_it_is_written_without_being_asked(engine: Engine, writer: Hearing) -> None:
    writer.start()
    one = record()
    writer.put(Ready(one))
    until(lambda: ids(engine) == [one.request_id])


def test_the_same_record_again_changes_nothing(engine: Engine, writer: Hearing) -> None:
    one = record()
    writer.put(Ready(one))
    writer.put(Ready(one))
    writer.start()
    writer.stop()
    assert ids(engine) == [one.request_id]


def test_odd_texts_and_great_numbers_are_kept(engine: Engine, writer: Hearing) -> None:
    odd = record(model="a\0b\ud800" + "x" * 500, client="\udcff", message="é\n" * 5000, prompt_tokens=2**40, path="/" + "p" * 2000)
    writer.put(Ready(odd))
    writer.put(Ready(record(model=None, agent_id=None, agent_name=None, request_body=None, response_body=None, ttft_ms=None)))
    writer.start()
    writer.stop()
    assert [done.records for done in writer.all_of(Done)] == [1, 1]
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(bodies)).scalar_one() == 1


def test_the_last_word_on_a_thing_wins(engine: Engine, writer: Hearing) -> None:
    writer.put(things=(("key", "1", b"old"),))
    writer.put(things=(("key", "1", b"new"), ("key", "2", b"gone")))
    writer.start()
    until(lambda: len(_things(engine)) == 2)
    writer.put(things=(("key", "2", None), ("key", "3", None)))
    writer.stop()
    assert _things(engine) == {("key", "1"): b"new"}


def _things(engine: Engine) -> dict[tuple[str, str], bytes]:
    with engine.connect() as connection:
        return {(kind, name): bytes(data) for kind, name, data in connection.execute(select(things.c.kind, things.c.name, things.c.data))}


class Broken(Ready):
    def finished(self) -> HistoryRecord:
        raise ValueError("a bug")


def test_one_bad_record_does_not_keep_the_others_from_the_disk(engine: Engine, writer: Hearing) -> None:
    good = record()
    number = writer.put(Broken(record()), Ready(good))
    writer.start()
    writer.stop()
    assert ids(engine) == [good.request_id]
    assert writer.done(number) == Done(number, 1, 1)
    (said,) = writer.all_of(Said)
    assert "a bug" in said.fields["exception"]


def test_what_no_try_can_change_is_dropped_and_told(engine: Engine, writer: Hearing, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = record()
    bad.status = "no such status"
    first, good = writer.put(Ready(bad)), record()
    second = writer.put(Ready(good))
    writer.start()
    writer.stop()
    assert ids(engine) == [good.request_id]
    assert (writer.done(first), writer.done(second)) == (Done(first, 0, 1), Done(second, 1))


def test_a_failure_is_survived_and_nothing_is_lost(engine: Engine, writer: Hearing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE models RENAME TO elsewhere"))
    one = record()
    writer.put(Ready(one))
    writer.start()
    until(lambda: len(writer.all_of(Failed)) >= 3)
    assert "\n" not in writer.all_of(Failed)[0].why
    assert not writer.all_of(Done)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE elsewhere RENAME TO models"))
    until(lambda: writer.all_of(Works) == [Works()] and ids(engine) == [one.request_id])


def test_a_stop_while_nothing_can_be_written_ends_and_tells_what_is_lost(engine: Engine, writer: Hearing) -> None:
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE models"))
    numbers = [writer.put(Ready(record())), writer.put(Ready(record()))]
    writer.start()
    until(lambda: len(writer.all_of(Failed)) >= 1)
    writer.stop()
    assert [writer.done(number) for number in numbers] == [Done(number, 0, 1) for number in numbers]


def test_postgresql_may_go_away_and_come_back(databases: Databases, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    engine = open_engine(database_url(databases.setting("postgresql"), tmp_path))
    writer = Hearing(engine)
    writer.start()
    first, second = record(NOW), record(NOW + 1)
    writer.put(Ready(first))
    until(lambda: ids(engine) == [first.request_id])
    databases.postgres.stop("immediate")
    try:
        writer.put(Ready(second))
        until(lambda: bool(writer.all_of(Failed)))
    finally:
        databases.postgres.start()
    until(lambda: bool(writer.all_of(Works)))
    assert ids(engine) == [first.request_id, second.request_id]
    writer.stop()
    engine.dispose()


def test_what_is_asked_is_done_after_what_was_put_before(engine: Engine, writer: Hearing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "SLICE", 3)
    made = [record(NOW + number, status=("success", "error")[number > 0]) for number in range(6)]
    writer.put(*map(Ready, made))
    writer.start()
    assert writer.ask(Delete, Filters(status="error")).answer == 3
    assert writer.ask(Delete, Filters(status="error")).answer == 2
    assert writer.ask(Sync).answer == 0
    assert ids(engine) == [made[0].request_id]


def test_what_is_asked_in_vain_is_told(engine: Engine, writer: Hearing) -> None:
    writer.put(Ready(record()))
    writer.start()
    writer.ask(Sync)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE bodies RENAME TO elsewhere"))
    assert "bodies" in str(writer.ask(Delete, Filters(status="success")).error)


def test_chores_are_done_between_items(engine: Engine, writer: Hearing) -> None:
    done: list[str] = []

    def chore(connection: Connection, statements: Statements) -> float:
        done.append(statements.dialect)
        return 0.0 if len(done) < 3 else 1000.0

    writer.add_chore(chore)
    writer.start()
    until(lambda: len(done) == 3)
    writer.ask(Sync)
    assert done == [engine.dialect.name] * 3


def test_a_chore_that_fails_does_not_end_the_writer(engine: Engine, writer: Hearing) -> None:
    def chore(connection: Connection, _: Statements) -> float:
        connection.execute(text("SELECT * FROM nowhere"))
        return 0.0

    def worse(connection: Connection, _: Statements) -> float:
        raise ValueError("a bug")

    writer.add_chore(chore)
    writer.add_chore(worse)
    writer.start()
    until(lambda: len(writer.all_of(Failed)) == 1 and len(writer.all_of(Said)) == 1)
    one = record(at_ms=NOW)
    writer.put(Ready(one))
    until(lambda: ids(engine) == [one.request_id])
