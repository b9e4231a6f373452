"""The questions: every filter against a plain scan in Python, paging, sorts, bodies, sums."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine

from core.history import STATUSES, HistoryRecord
from core.units import UnixMs
from servers.store import queries
from servers.store.queries import BEYOND, Filters, next_piece, numbers_of, one, page
from servers.store.statements import Statements
from servers.store.writer import Transaction
from tests.servers.store.databases import NOW, Databases, record

MODELS = ("llama3:8b", "llama3:70b", "Qwen_3", "100%", None)


def some_records() -> list[HistoryRecord]:
    dice = random.Random(1)
    made = []
    for number in range(120):
        node = dice.choice((None, 1, 2))
        made.append(
            record(
                NOW + number * 1000, model=dice.choice(MODELS), status=dice.choice(STATUSES), client=f"10.0.0.{dice.randrange(3)}",
                agent_id=None if node is None else f"a{node}", agent_name=None if node is None else f"node{node}",
                duration_ms=float(dice.randrange(1000)), ttft_ms=dice.choice((None, 5.0, 6.0)), output_tokens=number,
                request_body=f'{{"prompt":"Grüße {number}"}}'.encode() if number % 2 else b'{"prompt":"Gr\\u00fc\\u00dfe \\ud83d\\ude00"}',
            )
        )  # fmt: skip
    return made


MADE = some_records()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def full(request: pytest.FixtureRequest, databases: Databases) -> Iterator[Engine]:
    """A database that holds `MADE`; only read here."""
    with databases.engine(request.param) as engine:
        with Transaction(engine) as connection:
            Statements(engine.dialect.name, "c").insert(connection, MADE)
        yield engine


def meant(filters: Filters) -> list[str]:
    """What the filters mean, newest first, by a scan."""

    def fits(made: HistoryRecord) -> bool:
        return (
            (filters.model is None or (made.model is not None and filters.model.lower() in made.model.lower()))
            and (filters.agent_id is None or made.agent_id == filters.agent_id)
            and (filters.status is None or made.status == filters.status)
            and (filters.start is None or made.at_ms >= filters.start)
            and (filters.end is None or made.at_ms < filters.end)
            and (filters.client is None or made.client == filters.client)
        )

    return [made.request_id for made in reversed(MADE) if fits(made)]


CHOICES: dict[str, tuple[Any, ...]] = {
    "model": (None, "llama3", "LLAMA3:8B", "n_", "%", "nothing"),
    "agent_id": (None, "a1", "a9"),
    "status": (None, "error"),
    "start": (None, UnixMs(NOW + 30_000)),
    "end": (None, UnixMs(NOW + 90_000)),
    "client": (None, "10.0.0.1"),
}


@pytest.mark.parametrize("lanes_max", [1, 12])
def test_every_combination_of_filters_means_what_a_scan_finds(full: Engine, monkeypatch: pytest.MonkeyPatch, lanes_max: int) -> None:
    monkeypatch.setattr(queries, "LANES_MAX", lanes_max)
    with full.connect() as connection:
        for values in itertools.product(*CHOICES.values()):
            filters = Filters(**dict(zip(CHOICES, values, strict=True)))
            expected = meant(filters)
            found = page(connection, filters, offset=0, limit=500)
            assert [row["id"] for row in found.records] == expected, filters
            assert (found.total_count, found.is_floor) == (len(expected), False)
            assert len(numbers_of(connection, filters, limit=7)) == min(7, len(expected))


def test_pages_follow_each_other(full: Engine) -> None:
    filters = Filters(model="llama3")
    expected = meant(filters)
    with full.connect() as connection:
        found = [row["id"] for at in range(0, 120, 7) for row in page(connection, filters, offset=at, limit=7).records]
    assert found == expected


@pytest.mark.parametrize("column", queries.SORTS)
def test_sorts(full: Engine, column: str) -> None:
    with full.connect() as connection:
        for falling in (False, True):
            rows = page(connection, Filters(), offset=0, limit=500, sort=("-" if falling else "") + column).records
            values = [row["at_ms" if column == "timestamp" else column] for row in rows]
            known = [value for value in values if value is not None]
            assert known == sorted(known, reverse=falling)
            assert values[: len(known)] == known, "what is not known comes last"
            assert len(values) == len(MADE)


@pytest.mark.parametrize(("text", "count"), [("Grüße", 120), ("Grüße 7", 6), ("😀", 60), ("nowhere", 0), ('"prompt', 0), ("done", 120)])
def test_text_in_bodies_is_found_however_json_spells_it(full: Engine, text: str, count: int) -> None:
    with full.connect() as connection:
        found = page(connection, Filters(q=text), offset=0, limit=500)
    assert len(found.records) == count


def test_a_count_stops_at_its_limit(full: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "COUNT_MAX", 10)
    with full.connect() as connection:
        found = page(connection, Filters(model="llama3"), offset=0, limit=3)
    assert (found.total_count, found.is_floor, len(found.records)) == (10, True, 3)


def test_what_is_known_to_be_much_is_not_counted_again(full: Engine) -> None:
    with full.connect() as connection:
        found = page(connection, Filters(status="error"), offset=0, limit=3, many=True)
    assert (found.total_count, found.is_floor, len(found.records)) == (queries.COUNT_MAX, True, 3)


@pytest.mark.parametrize("lanes_max", [1, 12, 100])
def test_an_export_walks_along_every_kind_of_filter(full: Engine, monkeypatch: pytest.MonkeyPatch, lanes_max: int) -> None:
    monkeypatch.setattr(queries, "LANES_MAX", lanes_max)
    monkeypatch.setattr(queries, "PIECE", 5)
    for filters in (
        Filters(model="llama3"),
        Filters(agent_id="a1", status="error"),
        Filters(model="llama3", agent_id="a2", client="10.0.0.1"),
    ):
        found: list[str] = []
        below: int | None = BEYOND
        with full.connect() as connection:
            while below is not None:
                rows, below = next_piece(connection, filters, below)
                found += [row["id"] for row in rows]
        assert found == meant(filters)


def test_one_record_with_its_bodies(full: Engine) -> None:
    with full.connect() as connection:
        found = one(connection, MADE[5].request_id)
        assert found is not None
        assert (bytes(found["request_body"]), found["attempts"][0]["node"]) == (MADE[5].request_body, "node")
        assert one(connection, "nothing") is None


def test_an_export_walks_all_of_it_in_bounded_pieces(full: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "PIECE", 9)
    monkeypatch.setattr(queries, "PIECE_MAX_BYTES", 300)
    found: list[str] = []
    below: int | None = BEYOND
    with full.connect() as connection:
        while below is not None:
            rows, below = next_piece(connection, Filters(status="success"), below)
            assert 0 < len(rows) <= 9
            found += [row["id"] for row in rows]
        assert next_piece(connection, Filters(model="nothing"), BEYOND) == ([], None)
    assert found == meant(Filters(status="success"))


def test_sums(full: Engine) -> None:
    with full.connect() as connection:
        per_minute = queries.minutes(connection, UnixMs(0))
        assert sum(count for _, _, count in per_minute) == len(MADE)
        assert {minute for minute, _, _ in per_minute} == {made.at_ms // 60_000 for made in MADE}
        for by in queries.GROUPS:
            groups = queries.sums(connection, UnixMs(0), by)
            assert sum(group["requests"] for group in groups) == len(MADE)
            assert sum(group["not_successful"] for group in groups) == sum(made.status != "success" for made in MADE)
            assert sum(group["output_tokens"] for group in groups) == sum(made.output_tokens for made in MADE)
        durations = sorted(made.duration_ms for made in MADE)
        assert queries.percentiles(connection, UnixMs(0), "duration_ms") == {
            "p50": durations[59],
            "p95": durations[113],
            "p99": durations[118],
        }
        assert queries.percentiles(connection, UnixMs(NOW * 2), "ttft_ms") == {"p50": None, "p95": None, "p99": None}
