"""When endings are told, on virtual time, to a coordinator that does as each test scripts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from agent.endings import GATHER_MAX_S, GATHER_S, KEPT_MAX, PAUSE_MAX_S, Endings, Unheard
from core.messages import ENDINGS_MAX, EndingReport, EndingReports, EndingReportsAnswer


class Coordinator:
    """Keeps what it is sent, and when. `says` is its answer; `busy` holds it back."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, EndingReports]] = []
        self.began = 0.0
        self.says: EndingReportsAnswer | Unheard = EndingReportsAnswer()
        self.busy: trio.Event | None = None

    async def post(self, reports: EndingReports) -> EndingReportsAnswer | Unheard:
        self.heard.append((round(trio.current_time() - self.began, 3), reports))
        if self.busy is not None:
            await self.busy.wait()
        return self.says

    def ids(self) -> list[list[str]]:
        return [[report.request_id for report in reports.reports] for _, reports in self.heard]

    def times(self) -> list[float]:
        return [at for at, _ in self.heard]


@asynccontextmanager
async def telling(kept_max: int = KEPT_MAX) -> AsyncIterator[tuple[Endings, Coordinator]]:
    coordinator = Coordinator()
    coordinator.began = trio.current_time()
    endings = Endings(coordinator.post, kept_max=kept_max)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endings.run)
        await wait_all_tasks_blocked()
        yield endings, coordinator
        nursery.cancel_scope.cancel()


def add(endings: Endings, *names: str) -> None:
    for name in names:
        endings.add(EndingReport(request_id=name, ending="success"))


async def test_the_first_is_told_at_once_and_what_follows_is_gathered(autojump_clock: MockClock) -> None:
    async with telling() as (endings, coordinator):
        add(endings, "a")
        await wait_all_tasks_blocked()
        assert coordinator.ids() == [["a"]]
        add(endings, "b")
        await trio.sleep(GATHER_S / 2)
        add(endings, "c", "d")
        await trio.sleep(1)
        assert coordinator.ids() == [["a"], ["b", "c", "d"]]
        assert coordinator.times() == [0, GATHER_S]
        add(endings, "e")
        await wait_all_tasks_blocked()
        assert coordinator.ids()[2:] == [["e"]]
        await trio.sleep(1)
        assert (len(endings), len(coordinator.heard), endings.dropped_total) == (0, 3, 0)


async def test_what_ends_while_a_batch_is_under_way_is_in_the_next(autojump_clock: MockClock) -> None:
    async with telling() as (endings, coordinator):
        coordinator.busy = trio.Event()
        add(endings, "a")
        await trio.sleep(3)
        add(endings, "b")
        await trio.sleep(3)
        assert coordinator.ids() == [["a"]]
        coordinator.busy.set()
        await wait_all_tasks_blocked()
        assert coordinator.ids() == [["a"], ["b"]]


async def test_a_batch_is_repeated_until_it_is_confirmed(autojump_clock: MockClock) -> None:
    async with telling() as (endings, coordinator):
        coordinator.says = Unheard.AGAIN
        add(endings, "a")
        await trio.sleep(1)
        add(endings, "b")
        await trio.sleep(60)
        gaps = [after - before for before, after in zip(coordinator.times(), coordinator.times()[1:], strict=False)]
        assert gaps[:4] == [0.5, 1.0, 2.0, 4.0]
        assert set(gaps[4:]) == {PAUSE_MAX_S}
        assert coordinator.ids()[0] == ["a"]
        assert coordinator.ids()[-1] == ["a", "b"]
        coordinator.says = EndingReportsAnswer(taken=2)
        await trio.sleep(PAUSE_MAX_S)
        assert len(endings) == 0
        add(endings, "c")
        await trio.sleep(1)
        assert coordinator.ids()[-1] == ["c"]


async def test_a_batch_that_is_refused_for_good_is_given_up_and_counted(autojump_clock: MockClock) -> None:
    async with telling() as (endings, coordinator):
        coordinator.says = Unheard.NEVER
        add(endings, "a", "b")
        await wait_all_tasks_blocked()
        assert (len(endings), endings.dropped_total) == (0, 2)
        coordinator.says = EndingReportsAnswer()
        add(endings, "c")
        await trio.sleep(1)
        add(endings, "d")
        await trio.sleep(1)
        assert [(ids, reports.dropped) for ids, (_, reports) in zip(coordinator.ids(), coordinator.heard, strict=True)] == [
            (["a", "b"], 0),
            (["c"], 2),
            (["d"], 0),
        ]


async def test_the_oldest_of_too_many_are_given_up_also_those_under_way(autojump_clock: MockClock) -> None:
    async with telling(kept_max=3) as (endings, coordinator):
        coordinator.busy = trio.Event()
        add(endings, "a", "b")
        await wait_all_tasks_blocked()
        add(endings, "c", "d", "e")
        assert (len(endings), endings.dropped_total) == (3, 2)
        coordinator.busy.set()
        await trio.sleep(1)
        assert coordinator.ids() == [["a", "b"], ["c", "d", "e"]]
        assert coordinator.heard[1][1].dropped == 2
        coordinator.busy = trio.Event()
        add(endings, "f", "g")
        await wait_all_tasks_blocked()
        add(endings, "h", "i")
        coordinator.busy.set()
        await trio.sleep(1)
        assert coordinator.ids()[2:] == [["f", "g"], ["h", "i"]]
        assert (len(endings), endings.dropped_total) == (0, 3)


async def test_a_full_message_does_not_wait(autojump_clock: MockClock) -> None:
    async with telling() as (endings, coordinator):
        add(endings, "first")
        await wait_all_tasks_blocked()
        add(endings, *(f"r{number}" for number in range(2 * ENDINGS_MAX + 1)))
        await wait_all_tasks_blocked()
        assert [len(ids) for ids in coordinator.ids()] == [1, ENDINGS_MAX, ENDINGS_MAX]
        await trio.sleep(1)
        assert [name for ids in coordinator.ids()[1:] for name in ids] == [f"r{number}" for number in range(2 * ENDINGS_MAX + 1)]


@pytest.mark.parametrize(("asked", "kept_to"), [(0.7, 0.7), (0.0, GATHER_S), (60.0, GATHER_MAX_S)])
async def test_the_coordinator_may_ask_for_fewer_messages(autojump_clock: MockClock, asked: float, kept_to: float) -> None:
    async with telling() as (endings, coordinator):
        coordinator.says = EndingReportsAnswer(gather_s=asked)
        add(endings, "a")
        await wait_all_tasks_blocked()
        add(endings, "b")
        await trio.sleep(2)
        assert coordinator.times() == [0, kept_to]


async def test_a_flush_waits_for_nothing_but_the_coordinator(autojump_clock: MockClock) -> None:
    async with telling() as (endings, coordinator):
        await endings.flush()
        add(endings, "a")
        await wait_all_tasks_blocked()
        add(endings, "b", "c")
        await endings.flush()
        assert (coordinator.ids(), coordinator.times()) == ([["a"], ["b", "c"]], [0, 0])
        coordinator.says = Unheard.AGAIN
        add(endings, "d")
        with trio.move_on_after(0.9):
            await endings.flush()
        assert coordinator.times()[2:] == [0, GATHER_S, 2 * GATHER_S, 3 * GATHER_S]
        coordinator.says = EndingReportsAnswer()
        await endings.flush()
        assert len(endings) == 0


async def test_a_flush_cuts_a_long_pause_short(autojump_clock: MockClock) -> None:
    async with telling() as (endings, coordinator):
        coordinator.says = Unheard.AGAIN
        add(endings, "a")
        await trio.sleep(30)
        coordinator.says = EndingReportsAnswer()
        before = trio.current_time()
        await endings.flush()
        assert trio.current_time() == before
