"""The driver with a virtual clock and a router that does as it is told."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import trio
import trio.testing

from core.errors import LocalError
from core.events import (
    Accepted,
    Count,
    Cut,
    Declined,
    Effect,
    Ending,
    Event,
    FirstByte,
    Note,
    Probe,
    Pulse,
    Record,
    Refuse,
    Registered,
    Route,
    Wait,
)
from core.leases import Wake
from core.router import Router
from core.units import AgentId, Instant, RequestId
from servers.driver import Driver
from servers.tape import STEPS_PER_LENGTH

REQUEST = RequestId("r")
AGENT = AgentId("a")
SOMETHING = FirstByte(request_id=REQUEST)
RECORD = Record(
    request_id=REQUEST, route=Route.CHAT, model="m", client="c", agent_id=AGENT, agent_name="n", ending=Ending.SUCCESS, message="",
    status=200, duration_ms=1.0, queue_ms=0.0, ttft_ms=None, predicted_start_ms=None, usage=None, attempts=(), body_bytes=1, chunks=1,
)  # fmt: skip


class ScriptedRouter:
    """Answers each event with the next effects; has whatever deadline it was given; remembers when it was called."""

    def __init__(self) -> None:
        self.answers: list[list[Effect]] = []
        self.deadline: float | None = None
        self.handled: list[tuple[float, Event]] = []
        self.ticks: list[float] = []
        self.on_tick: Callable[[float], list[Effect]] = lambda _: []

    def handle(self, event: Event, now: Instant) -> list[Effect]:
        self.handled.append((now, event))
        return self.answers.pop(0) if self.answers else []

    def tick(self, *, now: Instant) -> list[Effect]:
        self.ticks.append(now)
        self.deadline = None
        return self.on_tick(now)

    @property
    def wake(self) -> Wake:
        found = Wake()
        if self.deadline is not None:
            found.at = Instant(self.deadline)
        return found


class Heard:
    """Sinks that remember."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def note(self, level: str, event: str, fields: dict[str, Any]) -> None:
        self.said.append((level, event, fields))

    def count(self, name: str, labels: dict[str, str], by: int) -> None:
        self.said.append((name, labels, by))

    def record(self, record: Record) -> None:
        self.said.append(record)

    def probe(self, agent_id: AgentId) -> None:
        self.said.append(agent_id)


def driver_of(router: ScriptedRouter, sinks: Heard, clock: Callable[[], float] = trio.current_time) -> Driver:
    return Driver(cast(Router, router), sinks, clock=clock)


async def test_each_effect_goes_where_it_belongs() -> None:
    router, sinks = ScriptedRouter(), Heard()
    driver = driver_of(router, sinks)
    desk = driver.open_desk(REQUEST)
    refuse = Refuse(request_id=REQUEST, status=503, text="no")
    answers: list[Effect] = [Registered(agent_id=AGENT, status="registered"), Accepted(agent_id=AGENT), Declined(status=404, text="no")]
    router.answers = [
        [
            Note(level="info", event="said", fields={"x": 1}),
            Count(name="things_total", labels={"a": "b"}, by=2),
            RECORD,
            Probe(agent_id=AGENT),
            refuse,
            *answers,
        ]
    ]
    assert driver.apply(SOMETHING) == answers
    assert sinks.said == [("info", "said", {"x": 1}), ("things_total", {"a": "b"}, 2), RECORD, AGENT]
    assert desk.take_nowait() is refuse


async def test_effects_for_a_request_that_is_gone_are_dropped() -> None:
    router = ScriptedRouter()
    driver = driver_of(router, Heard())
    driver.open_desk(REQUEST)
    driver.close_desk(REQUEST)
    router.answers = [[Wait(request_id=REQUEST, position=1, why="x"), Cut(request_id=REQUEST, reason="x")]]
    assert driver.apply(SOMETHING) == []


async def test_a_cut_reaches_the_attempt_that_runs() -> None:
    why: list[str] = []

    class Attempt:
        def give_up(self, reason: str, unload: tuple[str, ...]) -> None:
            why.append(reason)

    router = ScriptedRouter()
    driver = driver_of(router, Heard())
    driver.open_desk(REQUEST).begin(Attempt())
    router.answers = [[Cut(request_id=REQUEST, reason="gone")]]
    driver.apply(SOMETHING)
    assert why == ["gone"]


async def test_the_routers_time_never_goes_back() -> None:
    router = ScriptedRouter()
    times = iter([5.0, 7.0, 6.0, 8.0])
    driver = driver_of(router, Heard(), clock=lambda: next(times))
    for _ in range(3):
        driver.apply(SOMETHING)
    assert [now for now, _ in router.handled] == [7.0, 7.0, 8.0]


async def test_ticks_come_at_deadlines_and_never_early(autojump_clock: trio.testing.MockClock) -> None:
    router = ScriptedRouter()
    driver = driver_of(router, Heard())
    start = trio.current_time()
    router.deadline = start + 10
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: driver.run(Pulse, pulse_s=1000))
        await trio.sleep(9)
        assert router.ticks == []
        await trio.sleep(2)
        assert router.ticks == [start + 10]
        router.deadline = start + 15
        driver.apply(SOMETHING)
        await trio.sleep(3)
        router.deadline = start + 14.5
        driver.apply(SOMETHING)
        await trio.sleep(10)
        assert router.ticks == [start + 10, start + 14.5]
        nursery.cancel_scope.cancel()


async def test_a_deadline_that_moved_back_costs_one_tick_and_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    router = ScriptedRouter()
    driver = driver_of(router, Heard())
    start = trio.current_time()

    def later(_: float) -> list[Effect]:
        router.deadline = start + 20 if trio.current_time() < start + 20 else None
        return []

    router.on_tick = later
    router.deadline = start + 10
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: driver.run(Pulse, pulse_s=1000))
        await trio.sleep(1)
        router.deadline = start + 20
        driver.apply(SOMETHING)
        await trio.sleep(30)
        assert router.ticks == [start + 10, start + 20]
        nursery.cancel_scope.cancel()


async def test_a_deadline_that_does_not_move_does_not_take_the_loop(autojump_clock: trio.testing.MockClock) -> None:
    router = ScriptedRouter()
    driver = driver_of(router, Heard())
    stuck = trio.current_time()

    def stay(_: float) -> list[Effect]:
        router.deadline = stuck
        return []

    router.on_tick = stay
    router.deadline = stuck
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: driver.run(Pulse, pulse_s=1000))
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert 50 <= len(router.ticks) <= 110


async def test_effects_of_ticks_are_carried_out(autojump_clock: trio.testing.MockClock) -> None:
    router, sinks = ScriptedRouter(), Heard()
    driver = driver_of(router, sinks)
    router.on_tick = lambda _: [Probe(agent_id=AGENT)]
    router.deadline = trio.current_time() + 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: driver.run(Pulse, pulse_s=1000))
        await trio.sleep(2)
        nursery.cancel_scope.cancel()
    assert sinks.said == [AGENT]


async def test_a_pulse_comes_every_pulse(autojump_clock: trio.testing.MockClock) -> None:
    router = ScriptedRouter()
    driver = driver_of(router, Heard())
    pulse = Pulse(requests=(REQUEST,), heard=(AGENT,))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: driver.run(lambda: pulse, pulse_s=5))
        await trio.sleep(16)
        nursery.cancel_scope.cancel()
    assert [event for _, event in router.handled] == [pulse] * 3


async def test_the_last_events_are_remembered() -> None:
    driver = driver_of(ScriptedRouter(), Heard())
    for number in range(2 * STEPS_PER_LENGTH + 10):
        driver.apply(FirstByte(request_id=RequestId(str(number))))
    events = driver.recent_events()
    assert len(events) == STEPS_PER_LENGTH + 10
    assert events[-1][1] == FirstByte(request_id=RequestId(str(2 * STEPS_PER_LENGTH + 9)))
    assert events[0][0] <= events[-1][0]


async def test_what_the_router_forbids_is_raised_to_who_did_it() -> None:
    router = ScriptedRouter()

    def forbid(event: Event, now: Instant) -> list[Effect]:
        raise LocalError("twice")

    router.handle = forbid  # type: ignore[method-assign]
    with pytest.raises(LocalError):
        driver_of(router, Heard()).apply(SOMETHING)
