"""Quick tests of the harness, and the bar that holds on any machine, however busy; `make bench` and `make prove` judge the others."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.bench import gaps, gateway, idle, measure, rows
from tests.bench.children import Child, free_port, more_files, running
from tests.bench.client import Order
from tests.bench.sides import DIRECT, EDGE, EDGE_GATEWAYS, EMBEDDED, EMBEDDED_ON, NGINX, coordinator, stage
from tests.bench.soak import judge, soak
from tests.bench.soak_clients import Clients
from tests.bench.soak_watch import Sample, growths
from tests.bench.streams import MODEL, seen, streamers

KINDS = {kind.name: kind for kind in measure.KINDS}


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[dict[str, int]]:
    more_files()
    with streamers(tmp_path, 2) as ports:
        yield ports


def order(port: int, **more: object) -> Order:
    wanted = {"streams": 20, "rate": 50.0, "tokens": 30, "ramp_s": 0.1, "hold_s": 0.3, "to_the_end": True}
    return Order(port=port, models=[MODEL], **{**wanted, **more})  # type: ignore[arg-type]


@pytest.mark.prove
def test_streams_keep_pace_with_plain_nginx(tmp_path: Path) -> None:
    more_files()
    with stage(tmp_path, (NGINX, EMBEDDED)) as on:
        found = measure.compare(on, tmp_path, KINDS["stream"], seconds=2, rounds=5)
    assert list(found.rounds) == [DIRECT, NGINX, EMBEDDED]
    assert found.share(EMBEDDED) >= measure.BARS["stream", EMBEDDED], found


@pytest.mark.prove
def test_small_answers_reach_their_share_of_plain_nginx(tmp_path: Path) -> None:
    more_files()
    with stage(tmp_path, (NGINX, EMBEDDED, EMBEDDED_ON)) as on:
        found = measure.compare(on, tmp_path, KINDS["small"], seconds=3, rounds=5)
    for side in (EMBEDDED, EMBEDDED_ON):
        assert found.share(side) >= measure.BARS["small", side], found


@pytest.mark.slow
def test_sides_take_turns(tmp_path: Path) -> None:
    more_files()
    with stage(tmp_path, (NGINX, EMBEDDED_ON, EDGE_GATEWAYS)) as on:
        found = [measure.compare(on, tmp_path, KINDS["small"], seconds=1, rounds=1)]
    assert all(load.requests > 0 and load.p50_ms > 0 for compared in found for loads in compared.rounds.values() for load in loads)
    assert "| embedded, history |" in measure.section(measure.Speed(1, 1, found, {}))


@pytest.mark.slow
def test_a_gateway_alone(tmp_path: Path) -> None:
    more_files()
    figures = gateway.measure(tmp_path, seconds=1, rounds=1)
    assert [found.model for found in figures] == ["small:latest", "stream:latest"]
    assert all(found.cpu_us > 0 and found.per_s > 0 for found in figures)


@pytest.mark.slow
def test_idle_streams_are_small_and_whole(tmp_path: Path, nodes: dict[str, int]) -> None:
    with coordinator(tmp_path, "coordinator", nodes, history=True) as behind:
        idle.hold(behind, behind.port, 50, hold_s=0.5)
        held = idle.hold(behind, behind.port, 1000, hold_s=1.5, opened_per_s=500)
    assert (held.seen.whole, held.left) == (1000, 0), held
    assert held.kb <= idle.KB_MAX


@pytest.mark.slow
def test_the_client_sees_each_token_of_a_node(nodes: dict[str, int]) -> None:
    found = seen(order(nodes["node-1"]))
    assert (found.streams, found.whole, found.lost, found.reordered, found.errors) == (20, 20, 0, 0, [])
    assert found.tokens >= 200
    assert 10 < found.gap_p50_ms < 40


@pytest.mark.slow
def test_the_client_tells_a_stream_that_ends_early_from_a_whole_one(tmp_path: Path) -> None:
    port = free_port()
    cutting = Path(__file__).with_name("cutting_node.py")
    with running(Child("cutting", [sys.executable, str(cutting), str(port)], tmp_path / "log"), port=port):
        found = seen(order(port, streams=4, tokens=10))
    assert (found.lost, found.reordered, found.whole) == (2, 1, 1), found


@pytest.mark.slow
def test_gaps_are_measured_beside_an_export_and_plans(tmp_path: Path) -> None:
    found = gaps.run(tmp_path, hold_s=2.0, rounds=1, say=print, rows=2000, steps=((20, 20.0),))
    assert {side: [one.whole for one in rounds] for side, rounds in found.steps[0].seen.items()} == {
        DIRECT: [20],
        EMBEDDED: [20],
        EDGE: [20],
    }
    assert found.beside["rows"] > 2000
    assert found.beside["plans"] > 0
    assert "| 20 × 20 | 400 | embedded |" in gaps.section(found)


def samples(**columns: list[float]) -> list[Sample]:
    """One each ten seconds."""
    return [
        Sample(10.0 * at, dict(zip(columns, values, strict=True))) for at, values in enumerate(zip(*columns.values(), strict=True))
    ]  # fmt: skip


def test_growth_is_what_the_last_fifth_has_more_than_the_second() -> None:
    steady, jump, leak = [50e6] * 100, [50e6] + [90e6] * 99, [50e6 + number * 1e6 for number in range(100)]
    found = {one.column: one.too_much for one in growths(samples(a_bytes=steady, b_bytes=jump, c_bytes=leak, d_files=[30.0] * 100))}
    assert found == {"a_bytes": False, "b_bytes": False, "c_bytes": True, "d_files": False}


def test_the_soak_says_what_history_does_not_know() -> None:
    clients = Clients([1], seed=1)
    clients.account.sent, clients.account.ids = 3, {"a", "b"}
    told: dict[str, Any] = {"leases": 0.0, "faults": {}, "seconds": 600.0}
    assert judge(clients, samples(x_bytes=[1.0] * 60), ["a", "b", "c"], **told).problems == []
    assert "not in history, such as b" in judge(clients, samples(x_bytes=[1.0] * 60), ["a", "c", "d"], **told).text
    assert judge(clients, samples(x_bytes=[1.0] * 60), ["a", "b"], **told).problems == [
        "3 requests were sent (0 of them without an answer), and history has 2"
    ]
    assert "VERDICT: bad" in judge(clients, samples(x_bytes=[1.0] * 60), ["a", "b", "c"], **{**told, "leases": 1.0}).text


@pytest.mark.slow
def test_a_short_soak_ends_well(tmp_path: Path) -> None:
    more_files()
    outcome, seen_ = soak(tmp_path, minutes=0.1, seed=1, console=Console(quiet=True))
    assert outcome.problems == [], outcome.text
    assert len(seen_) >= 3


def test_made_records_are_there_for_a_coordinator(tmp_path: Path) -> None:
    rows.fill(tmp_path, 3000)
    assert (tmp_path / "coordinator.db").stat().st_mode & 0o777 == 0o600
