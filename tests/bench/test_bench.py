"""Quick tests of the harness, and the bar that holds on any machine, however busy; `make bench` and `make prove` judge the others."""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.bench import gaps, gateway, idle, measure, rows
from tests.bench import soak as soaking
from tests.bench.children import Child, free_port, more_files, running
from tests.bench.client import Order
from tests.bench.sides import DIRECT, EDGE, EDGE_GATEWAYS, EMBEDDED, EMBEDDED_ON, NGINX, coordinator, stage
from tests.bench.soak import judge, soak
from tests.bench.soak_clients import Clients
from tests.bench.soak_watch import COUNTED, Sample, growths, rests
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


def resting(at_s: float, *, leases: float | None = 0.0, **values: float) -> list[Sample]:
    """A whole rest, one sample each ten seconds: kept connections, thirty more descriptors, end after a minute."""
    kept = {name: [value + 30] * 7 + [value] * COUNTED for name, value in values.items()}
    return [
        Sample(at_s + 10 * at, {**{name: numbers[at] for name, numbers in kept.items()}, "leases": leases, "waiting": 0.0}, at_rest=True)
        for at in range(7 + COUNTED)
    ]


def made_up(files: Callable[[float], float], *, memory: Callable[[float], float] = lambda _: 50e6, seconds: int = 1800) -> list[Sample]:
    """The samples of a soak with one program. `files` and `memory`: what it holds that no connection explains, after so many seconds."""
    dice = random.Random(1)
    shifts = [range(0, int(seconds * 0.3), 3), range(int(seconds * 0.3), seconds, 3)]
    found: list[Sample] = []
    for number, shift in enumerate(shifts):
        for at in shift:
            kept = dice.randrange(10) + 50 * at / seconds  # the load of the last minute, which happens to rise
            values = {"x_bytes": memory(at), "x_files": files(at) + kept, "leases": 20.0, "waiting": 0.0}
            found.append(Sample(at + 120.0 * number, values))
        found += [
            Sample(one.at_s, {"x_bytes": memory(shift.stop), **one.values}, at_rest=True)
            for one in resting(shift.stop + 120.0 * number, x_files=files(shift.stop))
        ]
    return found


def judged(seen_: list[Sample], *, seconds: float = 1800.0) -> list[str]:
    """The problems of a soak in which nothing was forgotten."""
    clients = Clients([1], seed=1)
    clients.account.sent, clients.account.ids = 3, {"a", "b"}
    return judge(clients, seen_, ["a", "b", "c"], faults={}, seconds=seconds).problems


def test_memory_grows_when_the_last_fifth_has_more_than_the_second() -> None:
    steady, jump, leak = [50e6] * 100, [50e6] + [90e6] * 99, [50e6 + number * 1e6 for number in range(100)]
    seen_ = samples(a_bytes=steady, b_bytes=jump, c_bytes=leak)
    found = {one.column: one.too_much for one in growths(seen_ + resting(1000.0, a_bytes=900e6))}
    assert found == {"a_bytes": False, "b_bytes": False, "c_bytes": True}


def test_connections_that_are_kept_are_no_growth() -> None:
    seen_ = made_up(lambda _: 12)
    (files,) = [one for one in growths(seen_) if one.column == "x_files"]
    assert files.later > files.earlier + 16
    assert judged(seen_) == []


@pytest.mark.parametrize("seconds", [1800, 300])
def test_descriptors_that_leak_are_growth(seconds: int) -> None:
    each_s = seconds // 20  # one for each agent killed, say
    leaking = made_up(lambda at_s: 12 + at_s // each_s, seconds=seconds)
    assert judged(leaking, seconds=seconds) == ["x_files grew from 18 to 32"]
    assert judged(made_up(lambda at_s: 12 + 6 * (at_s > seconds / 2), seconds=seconds), seconds=seconds) == []


def test_memory_that_leaks_is_growth() -> None:
    def memory(at_s: float) -> float:
        return 50e6 + at_s * 20e3

    (problem,) = judged(made_up(lambda _: 12, memory=memory))
    assert problem.startswith("x_bytes grew from 60,")
    assert judged(made_up(lambda _: 12, memory=memory, seconds=900), seconds=900) == []


def test_half_an_hour_is_judged_only_by_whole_rests() -> None:
    whole = made_up(lambda _: 12)
    short = [sample for sample in whole if not sample.at_rest or sample.at_s < 1990]
    assert judged(short) == ["there were no two rests of 70 s, so descriptors cannot be judged"]
    gone = [*whole, Sample(2100.0, {**whole[-1].values, "x_files": None}, at_rest=True)]
    assert judged(gone) == ["nothing is left of what x_files counts"]


@pytest.mark.parametrize(
    ("leases", "problem"),
    [(1.0, "1 requests are still in flight after everything has ended"), (None, "the coordinator did not say what is in flight")],
)
def test_leases_that_stay_are_told(leases: float | None, problem: str) -> None:
    (found,) = judged([*made_up(lambda _: 12), Sample(2050.0, {}), *resting(2100.0, leases=leases, x_files=12)])
    assert found.startswith(problem)


def test_the_soak_says_what_history_does_not_know() -> None:
    clients = Clients([1], seed=1)
    clients.account.sent, clients.account.ids = 3, {"a", "b"}
    seen_ = resting(0.0, x_files=12)
    told: dict[str, Any] = {"faults": {}, "seconds": 600.0}
    assert judge(clients, seen_, ["a", "b", "c"], **told).problems == []
    assert "not in history, such as b" in judge(clients, seen_, ["a", "c", "d"], **told).text
    assert judge(clients, seen_, ["a", "b"], **told).problems == ["3 requests were sent (0 of them without an answer), and history has 2"]


@pytest.mark.slow
def test_a_short_soak_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soaking, "FILL_REQUESTS", 1000)  # full tables are for who judges growth, which takes longer
    more_files()
    outcome, seen_ = soak(tmp_path, minutes=0.1, seed=1, console=Console(quiet=True), rest_s=1.0)
    assert outcome.problems == [], outcome.text
    assert [one.leases for one in rests(seen_)] == [0, 0]
    assert len([one for one in seen_ if not one.at_rest]) >= 3


def test_made_records_are_there_for_a_coordinator(tmp_path: Path) -> None:
    rows.fill(tmp_path, 3000)
    assert (tmp_path / "coordinator.db").stat().st_mode & 0o777 == 0o600
