"""Downloads that the coordinator ordered, on virtual time, with an Ollama that does as each test scripts."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from agent.pulls import ALIVE_S, ORDERS_MAX, REPORT_S, Pulls, order_from
from core.messages import PullOrder, PullReport, PullReports, PullReportsAnswer
from core.transfer import Layer
from edge.model_work import Done

Script = Callable[[Callable[..., None]], Any]


class Ollama:
    """Pulls as its script says; `insecure` and names are kept."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.go = trio.Event()
        self.done = Done(rows=[{"name": "m"}])

    async def pull(self, model: str, *, insecure: bool, tell: Callable[..., None]) -> Done:
        self.asked.append((model, insecure))
        tell("pulling d", (Layer("d", 10, 4),))
        await self.go.wait()
        return self.done


class Coordinator:
    """Takes reports, unless it is away."""

    def __init__(self) -> None:
        self.reports: list[list[PullReport]] = []
        self.tries = 0
        self.away = False
        self.stop: list[str] = []

    async def post(self, reports: PullReports) -> PullReportsAnswer | None:
        self.tries += 1
        if self.away:
            return None
        self.reports.append(reports.reports)
        return PullReportsAnswer(stop=self.stop)


class Desk:
    def __init__(self) -> None:
        self.ollama = Ollama()
        self.coordinator = Coordinator()
        self.seen: list[Any] = []
        self.pulls = Pulls(self.ollama, post=self.coordinator.post, seen=self.seen.append)  # type: ignore[arg-type]

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Desk"]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.pulls.run)
            await wait_all_tasks_blocked()
            yield self
            nursery.cancel_scope.cancel()

    def last(self) -> PullReport:
        return self.coordinator.reports[-1][0]


def order(task_id: str = "t", attempt: int = 1, **more: Any) -> PullOrder:
    return PullOrder(task_id=task_id, attempt=attempt, model="m", **more)


async def test_a_download_is_reported_from_its_beginning_to_its_end(autojump_clock: MockClock) -> None:
    async with Desk().running() as desk:
        desk.pulls.take(order(insecure=True))
        await trio.sleep(1.5 * REPORT_S)
        assert desk.ollama.asked == [("m", True)]
        assert (desk.last().phase, desk.last().layers, desk.last().over) == ("pulling d", [Layer("d", 10, 4)], False)
        assert desk.pulls.working == ("t",)
        desk.ollama.go.set()
        await trio.sleep(2 * REPORT_S)
        assert (desk.last().over, desk.last().error) == (True, None)
        assert desk.seen == [[{"name": "m"}]]  # told before the end was
        count = len(desk.coordinator.reports)
        await trio.sleep(60)
        assert len(desk.coordinator.reports) == count
        assert not desk.pulls.working


async def test_an_order_that_came_before_begins_nothing(autojump_clock: MockClock) -> None:
    async with Desk().running() as desk:
        for _ in range(3):
            desk.pulls.take(order())
        await trio.sleep(REPORT_S)
        desk.ollama.go.set()
        await trio.sleep(5)
        desk.pulls.take(order())
        await trio.sleep(5)
        assert len(desk.ollama.asked) == 1


async def test_a_silent_download_is_said_to_be_alive(autojump_clock: MockClock) -> None:
    async with Desk().running() as desk:
        desk.pulls.take(order())
        await trio.sleep(60)
        assert 60 / ALIVE_S - 1 <= len(desk.coordinator.reports) <= 60 / ALIVE_S + 3


async def test_an_end_is_told_until_somebody_hears_it(autojump_clock: MockClock) -> None:
    async with Desk().running() as desk:
        desk.coordinator.away = True
        desk.ollama.done = Done(error="no", lost=True)
        desk.pulls.take(order())
        desk.ollama.go.set()
        await trio.sleep(100)
        assert 8 <= desk.coordinator.tries <= 20
        desk.coordinator.away = False
        await trio.sleep(20)
        assert (desk.last().over, desk.last().error, desk.last().lost) == (True, "no", True)
        assert desk.seen == []


async def test_a_download_stops_when_it_is_told_to_either_way(autojump_clock: MockClock) -> None:
    async with Desk().running() as desk:
        desk.pulls.take(order())
        await trio.sleep(1)
        assert desk.pulls.stop("t")
        assert not desk.pulls.stop("other")
        await trio.sleep(1)
        assert (desk.last().over, desk.last().error) == (True, "the download was stopped")
        desk.pulls.take(order("u"))
        desk.coordinator.stop = ["u"]
        await trio.sleep(2)
        assert (desk.last().task_id, desk.last().over) == ("u", True)


async def test_a_new_attempt_ends_the_old_one(autojump_clock: MockClock) -> None:
    async with Desk().running() as desk:
        desk.pulls.take(order())
        await trio.sleep(1)
        desk.pulls.take(order(attempt=2))
        await trio.sleep(1)
        assert desk.pulls.working == ("t",)
        assert {(report.attempt, report.over) for reports in desk.coordinator.reports for report in reports} >= {(1, True), (2, False)}


async def test_what_is_remembered_has_a_limit(autojump_clock: MockClock) -> None:
    async with Desk().running() as desk:
        desk.ollama.go.set()
        for number in range(ORDERS_MAX + 10):
            desk.pulls.take(order(f"t{number}"))
            await trio.sleep(2)
        assert len(desk.pulls._jobs) <= ORDERS_MAX


def test_nothing_is_begun_before_it_runs() -> None:
    async def main() -> None:
        desk = Desk()
        desk.pulls.take(order())
        assert desk.pulls.working == ()

    trio.run(main)


def test_an_order_is_read() -> None:
    assert order_from(b'{"task_id":"t","model":"m"}') == order()
    with pytest.raises(ValueError):
        order_from(b"[]")
