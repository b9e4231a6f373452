"""A million records of 4 KB: how long questions take, what an export takes of memory, and what the requests of the same time feel of an
export and of a cleanup. On SQLite and on PostgreSQL.

The records are made through the store's own statements, everything else goes through the routes of a coordinator in a process of its own.
Every figure is printed (`pytest -m prove -s tests/prove/test_million.py`). `RECORDS` makes it smaller.
"""

import csv
import http.client
import io
import json
import os
import random
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

import pytest
from sqlalchemy import text

from core.history import HistoryRecord, number_of
from core.units import UnixMs
from servers.clock import rfc3339, unix_ms
from servers.store.engine import database_url, open_engine
from servers.store.statements import RECORD_BYTES, Statements
from servers.store.writer import Transaction
from tests.bench.programs import small_node
from tests.prove.steady import flow, running
from tests.prove.test_store import Coordinator
from tests.servers.store.databases import Databases

pytestmark = pytest.mark.prove

RECORDS: Final = int(os.environ.get("RECORDS", "1000000"))
BODY_BYTES: Final = 4096
"""Of request and answer together."""
SPAN_MS: Final = 5 * 86_400_000
"""Over which the records lie."""
BATCH: Final = 2000
ASKED: Final = 200
"""Questions of each kind."""

P95_MS_MAX: Final = 50.0
GROWTH_BYTES_MAX: Final = 100_000_000
ADDED_P99_MS_MAX: Final = 5.0
RATE: Final = 500
FLOW_S: Final = 10.0

ROOT: Final = "/api/dashboard/request-responses"
MODELS: Final = tuple(
    f"{family}:{size}b" for family in ("llama", "qwen", "gemma", "mistral", "phi") for size in (1, 2, 3, 4, 8, 14, 32, 70)
)
NODES: Final = 10
STATUSES: Final = ("success",) * 17 + ("error", "error", "cancelled")
RECORD_SIZE: Final = BODY_BYTES + RECORD_BYTES + len(b'[{"node":"node1","outcome":"success","ms":5.0}]')


# ---------------------------------------------------------------- the records


def request_ids() -> Iterator[str]:
    """Those of the records, the oldest first."""
    dice = random.Random(1)
    while True:
        yield str(uuid.UUID(int=dice.getrandbits(128), version=4))


def made(end_ms: int) -> Iterator[HistoryRecord]:
    """The records, the oldest first, the last at `end_ms`."""
    dice = random.Random(2)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(dice.choices(words, k=900)) for _ in range(50)]
    ids = request_ids()
    for count in range(RECORDS):
        at = UnixMs(end_ms - SPAN_MS + (count + 1) * SPAN_MS // RECORDS)
        node, model = dice.randrange(NODES), dice.choice(MODELS)
        asked, answered = dice.choice(texts), dice.choice(texts)
        begin = f'{{"model":"{model}","messages":[{{"role":"user","content":"{count} '
        request_body = (begin + asked[: 2400 - len(begin) - 4] + '"}]}').encode()
        begin = f'{{"model":"{model}","done":true,"message":{{"role":"assistant","content":"{count} '
        response_body = (begin + answered[: BODY_BYTES - 2400 - len(begin) - 3] + '"}}').encode()
        yield HistoryRecord(
            number=number_of(at, count & 1023), request_id=next(ids), at_ms=at, completed_at_ms=UnixMs(at + 900), request_type="chat",
            path="/api/chat", model=model, agent_id=f"agent-{node}", agent_name=f"node{node}", client=f"10.0.0.{dice.randrange(40)}",
            key_id=None, status=dice.choice(STATUSES), message="", http_status=200, duration_ms=dice.uniform(5, 9000), queue_ms=0.5,
            ttft_ms=dice.uniform(2, 900), predicted_start_ms=3.0, observed_start_ms=4.0, prompt_tokens=dice.randrange(2000),
            output_tokens=dice.randrange(500), load_ms=0.0, attempts=b'[{"node":"node1","outcome":"success","ms":5.0}]', edge="embedded",
            chunks=100, body_bytes=len(response_body), request_body=request_body, response_body=response_body, bodies="whole",
        )  # fmt: skip


def fill(setting: str, place: Path, end_ms: int) -> None:
    """Make the database and put the records into it."""
    engine = open_engine(database_url(setting, place))
    statements = Statements(engine.dialect.name, "prove")
    batch: list[HistoryRecord] = []
    for count, record in enumerate(made(end_ms), 1):
        batch.append(record)
        if len(batch) == BATCH or count == RECORDS:
            with Transaction(engine) as connection:
                statements.insert(connection, batch)
            batch.clear()
    if engine.dialect.name == "postgresql":  # what its autovacuum does within minutes
        with engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE"))
    engine.dispose()


@dataclass
class Filled:
    """A database with the records in it."""

    kind: str
    setting: str
    place: Path
    end_ms: int
    ids: list[str] = field(default_factory=list)
    """Some of the records."""


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest) -> Iterator[Filled]:
    place = Path(tempfile.mkdtemp(prefix="million-", dir="/tmp"))
    databases = Databases(place)
    try:
        found = Filled(request.param, databases.setting(request.param), place, unix_ms() - 60_000)
        began = time.monotonic()
        fill(found.setting, place, found.end_ms)
        found.ids = [name for name, _ in zip(request_ids(), range(RECORDS), strict=False)][:: max(1, RECORDS // ASKED)]
        say(found, f"{RECORDS:,} records of {BODY_BYTES} bytes made in {time.monotonic() - began:.0f} s")
        yield found
    finally:
        databases.close()
        shutil.rmtree(place)


def say(filled: Filled, what: str) -> None:
    print(f"\n{filled.kind}: {what}", flush=True)


# ---------------------------------------------------------------- the coordinator


def started(filled: Filled, node_port: int, **environ: str) -> AbstractContextManager[Coordinator]:
    """A coordinator on the database."""
    return running(filled.place, filled.setting, node_port, **{"HISTORY_MAX_BYTES": str(1 << 40), **environ})


@pytest.fixture
def node(tmp_path: Path) -> Iterator[int]:
    """The port of a node."""
    with small_node(tmp_path) as port:
        yield port


class Asker:
    """One kept connection to the routes."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._line = http.client.HTTPConnection("127.0.0.1", coordinator.port, timeout=60)

    def ask(self, path: str, **query: object) -> Any:
        self._line.request("GET", path + ("?" + urlencode(query) if query else ""))
        answer = self._line.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return json.loads(body)

    def opened(self, path: str) -> http.client.HTTPResponse:
        """An answer to be read as it comes."""
        self._line.request("GET", path)
        answer = self._line.getresponse()
        assert answer.status == 200, answer.read()
        return answer


def p95_ms(question: Callable[[int], Any]) -> tuple[float, float]:
    """p50 and p95 of a question, asked `ASKED` times."""
    took = []
    for number in range(ASKED):
        began = time.perf_counter()
        question(number)
        took.append((time.perf_counter() - began) * 1000)
    took.sort()
    return took[len(took) // 2], took[int(len(took) * 0.95)]


# ---------------------------------------------------------------- what it takes of memory


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:  # it has ended
                continue
    return found


def memory_bytes(pid: int) -> int:
    """What a process and its descendants hold; pages that some of them share count for each."""
    total = 0
    for member in family(pid):
        try:
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Rss:"))
    return total


def settle(coordinator: Coordinator) -> None:
    """Wait until what a coordinator and its writer do at a start is over (sizes are added up, the database's own caches fill)."""
    before, deadline = 0, time.monotonic() + 60
    while (now := memory_bytes(coordinator.process.pid)) > before + 500_000 and time.monotonic() < deadline:
        before = now
        flow_of(coordinator, 5)


class Watched:
    """The greatest memory of a coordinator and its children while a block runs."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._pid = coordinator.process.pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before = self.greatest = memory_bytes(self._pid)

    def __enter__(self) -> "Watched":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.greatest = max(self.greatest, memory_bytes(self._pid))

    @property
    def growth(self) -> int:
        return self.greatest - self.before


# ---------------------------------------------------------------- the flow beside it


def flow_of(coordinator: Coordinator, seconds: float) -> dict[str, float]:
    return flow(coordinator, "--seconds", str(seconds), rate=RATE).figures()


def added(filled: Filled, what: str, alone: list[dict[str, float]], beside: list[dict[str, float]]) -> float:
    """How much greater p99 is beside something, by the medians; told."""

    def p99_ms(rounds: list[dict[str, float]]) -> float:
        return sorted(one["p99_ms"] for one in rounds)[len(rounds) // 2]

    more = p99_ms(beside) - p99_ms(alone)
    say(
        filled,
        f"{what} beside {RATE}/s: p99 {p99_ms(beside):.2f} ms, alone {p99_ms(alone):.2f} ms, added {more:.2f} ms\n {beside}\n {alone}",
    )
    assert all(one["failed"] == 0 for one in (*alone, *beside))
    return more


# ---------------------------------------------------------------- the proofs


def test_questions_are_answered_at_once(filled: Filled, node: int) -> None:
    dice = random.Random(3)

    def filtered(asker: Asker) -> Callable[[int], Any]:
        def question(number: int) -> Any:
            start = filled.end_ms - SPAN_MS + dice.randrange(SPAN_MS // 2)
            model = dice.choice(MODELS) if number % 2 else dice.choice(("llama", "qwen", "gem"))
            status = ("success", "error", "cancelled")[number % 3]
            end = start + dice.choice((3600_000, SPAN_MS // 4))
            found = asker.ask(ROOT, model=model, status=status, start_time=rfc3339(UnixMs(start)), end_time=rfc3339(UnixMs(end)))
            assert all(model in one["model"] and one["status"] == status for one in found["records"])
            return found

        return question

    def detail(asker: Asker) -> Callable[[int], Any]:
        def question(number: int) -> Any:
            found = asker.ask(f"{ROOT}/{filled.ids[number % len(filled.ids)]}")
            assert len(json.dumps(found["request_body"])) + len(json.dumps(found["response_body"])) >= BODY_BYTES
            return found

        return question

    with started(filled, node) as coordinator:
        asker = Asker(coordinator)
        first = asker.ask(ROOT)
        assert (first["total_count"], first["total_is_floor"]) == ((100_000, True) if RECORDS > 100_000 else (first["total_count"], False))
        kinds: dict[str, Callable[[int], Any]] = {
            "the first page": lambda _: asker.ask(ROOT),
            "pages 1 to 100": lambda number: asker.ask(ROOT, page=1 + number % 100),
            "model and status and time": filtered(asker),
            "one record": detail(asker),
        }
        figures = {name: p95_ms(question) for name, question in kinds.items()}
    say(filled, "; ".join(f"{name}: p50 {p50:.1f} ms, p95 {p95:.1f} ms" for name, (p50, p95) in figures.items()))
    assert all(p95 <= P95_MS_MAX for _, p95 in figures.values())


@pytest.mark.parametrize("form", ["json", "csv"])
def test_an_export_of_everything_takes_little_memory(filled: Filled, node: int, form: str) -> None:
    with started(filled, node) as coordinator:
        for _ in range(20):
            Asker(coordinator).ask(ROOT)  # what the first questions need once
        settle(coordinator)
        began, count = time.monotonic(), 0
        with Watched(coordinator) as watched:
            answer = Asker(coordinator).opened(f"{ROOT}/export?format={form}")
            if form == "json":
                last = b""
                for count, last in enumerate(answer, 1):  # noqa: B007 - a record is a line, and the bracket that closes the list follows the last
                    pass
                assert last.endswith(b"]\n")
            else:
                count = sum(1 for _ in csv.reader(io.TextIOWrapper(answer, encoding="utf-8", newline=""))) - 1
        took = time.monotonic() - began
    say(
        filled,
        f"{form} of {count:,} records in {took:.0f} s, memory grew by {watched.growth / 1e6:.1f} MB from {watched.before / 1e6:.0f} MB",
    )
    assert count >= RECORDS
    assert watched.growth <= GROWTH_BYTES_MAX


def test_an_export_is_not_felt(filled: Filled, node: int) -> None:
    alone, beside = [], []
    with started(filled, node) as coordinator:
        flow_of(coordinator, 3)
        for _ in range(3):
            alone.append(flow_of(coordinator, FLOW_S))
            answer = Asker(coordinator).opened(f"{ROOT}/export?format=csv")
            asked = flow(coordinator, "--seconds", str(FLOW_S), rate=RATE)
            size_bytes = 0
            while asked.process.poll() is None:
                data = answer.read(1 << 20)
                size_bytes += len(data)
                if not data:  # of few records it is soon over
                    answer = Asker(coordinator).opened(f"{ROOT}/export?format=csv")
            beside.append(asked.figures())
            answer.close()
            say(filled, f"{size_bytes / 1e6:.0f} MB were exported meanwhile")
    assert added(filled, "an export", alone, beside) <= ADDED_P99_MS_MAX


def share_before(filled: Filled, moment: str) -> float:
    """Which share of the records lay before it."""
    return 1 - (filled.end_ms - datetime.fromisoformat(moment).timestamp() * 1000) / SPAN_MS


def test_a_cleanup_of_half_is_not_felt(filled: Filled, node: int) -> None:
    alone, beside = [], []
    with started(filled, node) as coordinator:
        flow_of(coordinator, 3)
        alone = [flow_of(coordinator, FLOW_S) for _ in range(3)]
    with started(filled, node, HISTORY_MAX_BYTES=str(RECORDS * RECORD_SIZE // 2)) as coordinator:
        began = time.monotonic()
        asker = Asker(coordinator)
        while True:
            told = flow_of(coordinator, FLOW_S)
            left = asker.ask(ROOT, sort="timestamp", per_page=1)["records"][0]["timestamp"]
            beside.append(told)
            gone = share_before(filled, left)
            if gone > 0.5 - 0.02 or time.monotonic() - began > 600:
                break
    say(filled, f"{gone:.0%} was deleted in {time.monotonic() - began:.0f} s")
    more = added(filled, "a cleanup", alone, beside)
    assert gone > 0.5 - 0.02
    assert more <= ADDED_P99_MS_MAX
