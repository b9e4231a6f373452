"""History over HTTP: pages, filters and their bad values, one record, exports that reopen, deletion, sums."""

import csv
import io
import json
from typing import Any

import pytest
import trio

from servers import clock
from servers.settings import Settings
from servers.store import queries
from servers.store.export import COLUMNS
from tests.servers.house import House
from tests.servers.store.databases import insert, record

ROOT = "/api/dashboard/request-responses"


@pytest.fixture
async def house(nursery: trio.Nursery) -> House:
    """With six records of the last minutes."""
    house = House(Settings())
    now = clock.unix_ms()
    made = [
        record(
            now - 60_000 * number, request_id=f"r{number}", model=("llama3", "=cmd|'/c calc'")[number % 2],
            status=("success", "error", "cancelled")[number % 3], client=f"10.0.0.{number}", message="@evil",
            response_body=b"+no json", duration_ms=float(number),
        )
        for number in range(6)
    ]  # fmt: skip
    insert(house.memory.store.engine, *made)
    house.memory.start()
    nursery.start_soon(house.memory.store.run)
    return house


async def ids(house: House, query: str) -> list[str]:
    answer = await house.ask("GET", f"{ROOT}?{query}")
    assert answer.status == 200, answer.body
    return [one["id"] for one in answer.json["records"]]


async def test_a_page_is_newest_first_and_without_bodies(house: House) -> None:
    page = (await house.ask("GET", f"{ROOT}?per_page=4")).json
    assert {name: page[name] for name in ("total_count", "total_is_floor", "page", "per_page")} == {
        "total_count": 6, "total_is_floor": False, "page": 1, "per_page": 4,
    }  # fmt: skip
    assert [one["id"] for one in page["records"]] == ["r0", "r1", "r2", "r3"]
    assert set(page["records"][0]) == set(COLUMNS) - {"request_body", "response_body"}
    assert await ids(house, "per_page=4&page=2") == ["r4", "r5"]
    assert await ids(house, "page=3") == []


async def test_filters(house: House) -> None:
    now = clock.unix_ms()
    assert await ids(house, "model=LLAMA") == ["r0", "r2", "r4"]
    assert await ids(house, "status=error&model=cmd") == ["r1"]
    assert await ids(house, "agent_id=a&client=10.0.0.3") == ["r3"]
    assert await ids(house, "agent_id=nobody") == []
    assert await ids(house, "q=no+json&sort=duration_ms&per_page=2") == ["r0", "r1"]
    start, end = clock.rfc3339(now - 150_000), clock.rfc3339(now - 30_000)
    assert await ids(house, f"start_time={start}&end_time={end}") == ["r1", "r2"]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("page=0", "page"), ("page=x", "page"), ("page=-1", "page"), ("per_page=501", "per_page"), ("per_page=", "per_page"),
        ("status=good", "status"), ("start_time=yesterday", "start_time"), ("end_time=2026-01-01T00:00:00", "end_time"),
        ("start_time=2026-01-02T00:00:00Z&end_time=2026-01-01T00:00:00Z", "end_time"), ("sort=name", "sort"), ("model=", "model"),
        ("q=" + "x" * 201, "q"), ("client=%00", "client"), ("modle=x", "modle"),
        ("page=1000001", "page"), ("page=1.5", "page"), ("page=%D9%A1", "page"), ("per_page=0", "per_page"), ("per_page=1e2", "per_page"),
        ("status=", "status"), ("status=SUCCESS", "status"), ("start_time=", "start_time"),
        ("start_time=2026-13-01T00:00:00Z", "start_time"),
        ("start_time=1700000000", "start_time"), ("end_time=x", "end_time"), ("sort=", "sort"), ("sort=--timestamp", "sort"),
        ("agent_id=", "agent_id"), ("agent_id=" + "x" * 201, "agent_id"), ("agent_id=a%00", "agent_id"), ("model=" + "x" * 201, "model"),
        ("client=", "client"), ("q=", "q"), ("q=%00", "q"),
    ],
)  # fmt: skip
async def test_a_bad_filter_is_named(house: House, query: str, named: str) -> None:
    answer = await house.ask("GET", f"{ROOT}?{query}")
    assert answer.status == 400
    assert answer.json["error"].startswith(named)
    if named not in ("page", "per_page", "sort"):  # these are no parameters of the others at all
        for method, path in (("GET", f"{ROOT}/export"), ("DELETE", ROOT)):
            other = await house.ask(method, f"{path}?{query}")
            assert (other.status, other.json["error"].split()[0]) == (400, answer.json["error"].split()[0])
    assert len(await ids(house, "")) == 6


async def test_sorts(house: House) -> None:
    assert await ids(house, "sort=timestamp&per_page=2") == ["r5", "r4"]
    assert await ids(house, "sort=duration_ms&per_page=2") == ["r0", "r1"]
    assert await ids(house, "sort=-duration_ms&per_page=2&page=2") == ["r3", "r2"]
    for name in ("ttft_ms", "queue_ms", "prompt_tokens", "-output_tokens"):
        assert len(await ids(house, f"sort={name}")) == 6


async def test_a_count_that_is_a_floor_says_so_page_by_page(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "COUNT_MAX", 2)
    for query in ("", "&page=2", "&page=2&status=success", "&status=error"):
        page = (await house.ask("GET", f"{ROOT}?per_page=1{query}")).json
        assert (page["total_count"], page["total_is_floor"], len(page["records"])) == (2, "status" not in query, 1)


async def test_one_record_has_its_bodies(house: House) -> None:
    found = (await house.ask("GET", f"{ROOT}/r2")).json
    assert found["request_body"] == {"model": "m"}
    assert found["response_body"] == "+no json"
    assert found["attempts"] == [{"node": "node", "outcome": "success", "ms": 5.0}]
    assert found["timestamp"].endswith("Z")
    assert (await house.ask("GET", f"{ROOT}/nothing")).status == 404


async def test_a_json_export_reopens(house: House) -> None:
    answer = await house.ask("GET", f"{ROOT}/export?status=error")
    assert answer.headers["Content-Disposition"].startswith('attachment; filename="history-20')
    assert [one["id"] for one in json.loads(answer.body)] == ["r1", "r4"]
    assert json.loads((await house.ask("GET", f"{ROOT}/export?format=json&model=nothing")).body) == []
    assert (await house.ask("GET", f"{ROOT}/export?format=xml")).status == 400


async def test_a_csv_export_reopens_and_holds_no_formula(house: House) -> None:
    answer = await house.ask("GET", f"{ROOT}/export?format=csv")
    rows = list(csv.DictReader(io.StringIO(answer.body.decode(), newline="")))
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(6)]
    assert {row["message"] for row in rows} == {"'@evil"}
    assert {row["model"] for row in rows} == {"llama3", "'=cmd|'/c calc'"}
    assert all(value[:1] not in ("=", "@", "+") for row in rows for value in row.values())
    assert json.loads(rows[0]["request_body"]) == {"model": "m"}
    empty = (await house.ask("GET", f"{ROOT}/export?format=csv&model=nothing")).body.decode()
    assert empty.strip() == ",".join(COLUMNS)


BEGINNINGS = ("=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\r=x", "\n=x")


async def test_no_cell_of_an_export_begins_as_a_formula_whoever_wrote_it(house: House) -> None:
    now = clock.unix_ms()
    made = [
        record(now + number, model=begin, message=begin, client=begin, agent_name=begin, path=begin, request_body=begin.encode())
        for number, begin in enumerate(BEGINNINGS)
    ]
    insert(house.memory.store.engine, *made)
    body = (await house.ask("GET", f"{ROOT}/export?format=csv&status=success")).body.decode()
    rows = list(csv.DictReader(io.StringIO(body, newline="")))
    assert not [value for row in rows for value in row.values() if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))]
    for name in ("model", "message", "client", "agent_name", "path", "request_body"):
        assert {row[name][1:] for row in rows} >= set(BEGINNINGS), name
    shown = json.loads((await house.ask("GET", f"{ROOT}/export?format=json&status=success")).body)
    assert {one["model"] for one in shown} >= set(BEGINNINGS), "JSON says what was said"


async def test_deletion_needs_a_filter_and_keeps_to_it(house: House) -> None:
    assert (await house.ask("DELETE", ROOT)).status == 400
    assert (await house.ask("DELETE", f"{ROOT}?page=1")).status == 400
    assert (await house.ask("DELETE", f"{ROOT}?status=error")).json == {"deleted": 2}
    assert await ids(house, "") == ["r0", "r2", "r3", "r5"]
    assert (await house.ask("GET", f"{ROOT}/r1")).status == 404


async def test_sixty_minutes_and_sums(house: House) -> None:
    points: list[Any] = (await house.ask("GET", "/api/dashboard/request-history")).json
    assert len(points) == 60
    assert (sum(point["success"] for point in points), sum(point["error"] for point in points)) == (2, 4)
    sums = (await house.ask("GET", "/api/dashboard/request-sums?by=model&hours=1")).json
    assert {group["name"]: group["requests"] for group in sums["groups"]} == {"llama3": 3, "=cmd|'/c calc'": 3}
    assert sums["percentiles"]["duration_ms"]["p50"] == 2.0
    assert (await house.ask("GET", "/api/dashboard/request-sums?by=colour")).status == 400
