"""Each promise is broken once, by hand, and each time the checkers name its number; what keeps the promises passes."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from core.config import RouterConfig
from core.events import (
    Accepted,
    AttemptEnded,
    BackendAdded,
    Cut,
    Declined,
    Effect,
    Ending,
    Event,
    Failure,
    FirstByte,
    Forward,
    HeartbeatCame,
    Lease,
    NodePolled,
    Note,
    PassOn,
    Probe,
    Pulse,
    Record,
    Refuse,
    Registered,
    RequestCame,
    Route,
    Settled,
    Upstream,
    Wait,
)
from core.messages import Heartbeat
from core.simulation.checkers import Checkers, Violation
from core.units import AgentId, Instant, LeaseId, RequestId, UnixMs
from core.views import AgentView, Statistics
from tests.core.simulation.test_checkers_agents import registration
from tests.core.simulation.worlds import drawn

CONFIG = RouterConfig(queue_max=2, queue_per_client=2, queue_timeout_s=20.0, retries_budgeted=1, eject_s=1.0, eject_max_s=2.0)
AT = Upstream(host="node-0", port=1)


class Shown:
    """A router as far as checkers look at one."""

    def __init__(self) -> None:
        self.deadline: Instant | None = None
        self.again: list[Effect] = []
        self.in_flight: dict[AgentId, int] = {}
        self.waiters: list[Any] = []
        self.waits: int | None = None
        self.state = "ready"

    def next_deadline(self) -> Instant | None:
        return self.deadline

    def tick(self, *, now: Instant) -> list[Effect]:
        return self.again

    def statistics(self) -> Statistics:
        waiting = len(self.waiters) if self.waits is None else self.waits
        return Statistics(in_flight=0, waiting=waiting, agents=1, agents_ready=1, in_flight_by_agent=self.in_flight, requests_total=0)

    def waiting(self) -> list[Any]:
        return self.waiters

    def agent(self, agent_id: AgentId) -> AgentView | None:
        if self.state == "gone":
            return None
        return AgentView(
            id=agent_id, name="n", machine_name="n", ip_address="", ollama_version="", ollama_port=1, upstream=AT, status="online",
            state=self.state, registered_at=UnixMs(0), slots=1,
        )  # fmt: skip


class Stood:
    """Somebody who waits, as `waiting()` shows him."""

    def __init__(self, name: str) -> None:
        self.request_id = name


class Talk:
    """A conversation with a router, told to the checkers."""

    def __init__(self, *, agents: Sequence[str] = ("a",), every: int = 10_000, **given: Any) -> None:
        self.now = Instant(0.0)
        self.router = Shown()
        self.checkers = Checkers(CONFIG, every=every, **given)
        self.checkers.started(self.router, now=self.now)  # type: ignore[arg-type]
        for name in agents:
            agent_id = AgentId(name)
            added = BackendAdded(agent_id=agent_id, name=name, upstream=AT, now_unix=UnixMs(0))
            self.tell(added, Accepted(agent_id=agent_id), Probe(agent_id=agent_id))
            self.tell(NodePolled(agent_id=agent_id, installed=["m"], now_unix=UnixMs(0)))

    def tell(self, event: Event | None, *effects: Effect, after_s: float = 0.0) -> None:
        self.now = Instant(self.now + after_s)
        self.checkers.before(event, now=self.now)
        self.checkers.after(event, effects, now=self.now)

    def came(self, name: str = "r", *effects: Effect, client: str = "c", **fields: Any) -> None:
        self.tell(RequestCame(request_id=RequestId(name), route=Route.CHAT, model="m", client=client, **fields), *effects)

    def ended(self, *effects: Effect, failure: Failure = Failure.DIED, status: int = 0) -> None:
        self.tell(AttemptEnded(request_id=RequestId("r"), failure=failure, status=status), *effects)

    def settled(self, *effects: Effect, **fields: Any) -> None:
        self.tell(Settled(request_id=RequestId("r"), ending=Ending.SUCCESS, **fields), *effects)


def forward(name: str = "r", agent: str = "a", attempt: int = 1) -> Forward:
    lease = Lease(
        id=LeaseId(f"{name}/{attempt}"), request_id=RequestId(name), agent_id=AgentId(agent), agent_name=agent, upstream=AT, attempt=attempt
    )
    return Forward(request_id=RequestId(name), lease=lease)


def wait(name: str = "r") -> Wait:
    return Wait(request_id=RequestId(name), position=1, why="")


def refuse(name: str = "r") -> Refuse:
    return Refuse(request_id=RequestId(name), status=503, text="")


def record(name: str = "r", ending: Ending = Ending.SUCCESS) -> Record:
    return Record(
        request_id=RequestId(name), route=Route.CHAT, model=None, client="", agent_id=None, agent_name=None, ending=ending, message="",
        status=0, duration_ms=0, queue_ms=0, ttft_ms=None, predicted_start_ms=None, usage=None, attempts=(), body_bytes=0, chunks=0,
    )  # fmt: skip


def no_answer(talk: Talk) -> None:
    talk.came()


def no_answer_to_a_failure(talk: Talk) -> None:
    talk.came("r", forward())
    talk.ended()


def not_recorded(talk: Talk) -> None:
    talk.came("r", forward())
    talk.settled()


def recorded_otherwise(talk: Talk) -> None:
    talk.came("r", forward())
    talk.settled(record(ending=Ending.ERROR))


def recorded_and_unknown(talk: Talk) -> None:
    talk.tell(None, record("x"))


def given_up_too_early(talk: Talk) -> None:
    talk.came("r", forward())
    talk.tell(None, record(ending=Ending.UNKNOWN), after_s=1.0)


def over_budget(talk: Talk) -> None:
    talk.came("r", forward())
    talk.ended(forward(attempt=2))
    talk.ended(forward(attempt=3), failure=Failure.ANSWERED, status=500)


def the_same_again(talk: Talk) -> None:
    talk.tell(NodePolled(agent_id=AgentId("b"), installed=["m"], now_unix=UnixMs(0)), after_s=20.0)
    talk.came("r", forward())
    talk.ended(forward(attempt=2), failure=Failure.REFUSED)


def misnumbered(talk: Talk) -> None:
    talk.came("r", forward(attempt=2))


def again_after_the_first_byte(talk: Talk) -> None:
    talk.came("r", forward())
    talk.tell(FirstByte(request_id=RequestId("r")))
    talk.ended(forward(attempt=2))


def waits_after_the_first_byte(talk: Talk) -> None:
    talk.came("r", forward())
    talk.tell(FirstByte(request_id=RequestId("r")))
    talk.ended(wait())


def refused_after_the_first_byte(talk: Talk) -> None:
    talk.came("r", forward())
    talk.tell(FirstByte(request_id=RequestId("r")))
    talk.ended(refuse())


def to_a_stranger(talk: Talk) -> None:
    talk.came("r", forward(agent="x"))


def to_the_silent(talk: Talk) -> None:
    talk.tell(None, after_s=61.0)
    talk.came("r", forward())


def a_lease_for_ever(talk: Talk) -> None:
    talk.came("r", forward())
    talk.tell(Pulse(), after_s=30.1)


def a_line_too_long(talk: Talk) -> None:
    for name, client in (("r", "c"), ("s", "d"), ("t", "e")):
        talk.came(name, wait(name), client=client)


def a_wait_too_long(talk: Talk) -> None:
    talk.came("r", wait())
    talk.tell(Pulse(requests=(RequestId("r"),)), after_s=21.0)


def a_deadline_that_does_not_move(talk: Talk) -> None:
    talk.router.deadline = talk.now
    talk.tell(None)


def a_tick_that_never_has_enough(talk: Talk) -> None:
    talk.router.again = [Note(level="info", event="again")]
    talk.tell(None)


def a_word_to_nobody(talk: Talk) -> None:
    talk.tell(None, wait("x"))


def told_twice(talk: Talk) -> None:
    talk.came("r", refuse(), refuse())


def passed_on_from_nobody(talk: Talk) -> None:
    talk.came("r", PassOn(request_id=RequestId("r")))


def cut_without_a_lease(talk: Talk) -> None:
    talk.came("r", wait(), Cut(request_id=RequestId("r"), reason=""))


def a_probe_of_nobody(talk: Talk) -> None:
    talk.tell(None, Probe(agent_id=AgentId("x")))


def an_agent_that_nobody_made(talk: Talk) -> None:
    talk.tell(registration(), Registered(agent_id=AgentId("x"), status="registered"))


def beat(sequence: int) -> HeartbeatCame:
    message = Heartbeat(agent_id="a", cpu_usage=0, memory_usage=0, boot=1, sequence=sequence, installed_models=["m"])
    return HeartbeatCame(heartbeat=message, now_unix=UnixMs(0))


def a_heartbeat_without_an_answer(talk: Talk) -> None:
    talk.tell(beat(1))


def known(talk: Talk) -> None:
    """Agent `a` becomes one that sends heartbeats."""
    talk.checkers.book.agents[AgentId("a")].agentless = False
    talk.tell(beat(2), Accepted(agent_id=AgentId("a")))


def an_old_heartbeat_that_sends_somebody(talk: Talk) -> None:
    known(talk)
    talk.came("r", wait())
    talk.tell(beat(1), Accepted(agent_id=AgentId("a")), forward())


def an_old_heartbeat_that_changes_its_agent(talk: Talk) -> None:
    known(talk)
    talk.checkers.before(beat(1), now=talk.now)
    talk.router.state = "gone"
    talk.checkers.after(beat(1), [Accepted(agent_id=AgentId("a"))], now=talk.now)


def an_old_heartbeat_that_changes_the_numbers(talk: Talk) -> None:
    known(talk)
    talk.checkers.before(beat(1), now=talk.now)
    talk.router.in_flight = {AgentId("a"): 1}
    talk.checkers.after(beat(1), [Accepted(agent_id=AgentId("a"))], now=talk.now)


def in_flight_that_is_not_shown(talk: Talk) -> None:
    talk.came("r", forward())
    talk.checkers.look(now=talk.now)


def who_waits_and_is_not_counted(talk: Talk) -> None:
    talk.came("r", wait())
    talk.checkers.look(now=talk.now)


def who_waits_and_is_not_listed(talk: Talk) -> None:
    talk.came("r", wait())
    talk.router.waiters = [Stood("x")]
    talk.checkers.look(now=talk.now)


def waits_for_nothing(talk: Talk) -> None:
    talk.tell(NodePolled(agent_id=AgentId("a"), installed=["m"], now_unix=UnixMs(0)), after_s=20.0)
    talk.came("r", wait())
    talk.router.waiters = [Stood("r")]
    talk.checkers.look(now=talk.now)
    talk.checkers.look(now=Instant(talk.now + 2.5))


def overtaken(talk: Talk) -> None:
    del talk.checkers.book.agents[AgentId("b")]
    talk.came("q", wait("q"))
    talk.came("r", forward())


def drained_and_not_held(talk: Talk) -> None:
    talk.checkers.book.agents[AgentId("a")].out = True
    talk.checkers.look(now=talk.now)


BROKEN: list[tuple[Callable[[Talk], None], str]] = [
    (no_answer, "R1"), (no_answer_to_a_failure, "R1"), (who_waits_and_is_not_counted, "R1"), (who_waits_and_is_not_listed, "R1"),
    (not_recorded, "R2"), (recorded_otherwise, "R2"), (recorded_and_unknown, "R2"), (given_up_too_early, "R2"),
    (over_budget, "R3"), (the_same_again, "R3"), (misnumbered, "R3"),
    (again_after_the_first_byte, "R4"), (waits_after_the_first_byte, "R4"), (refused_after_the_first_byte, "R4"),
    (to_a_stranger, "R5"), (to_the_silent, "R5"),
    (an_old_heartbeat_that_sends_somebody, "R6"), (an_old_heartbeat_that_changes_its_agent, "R6"),
    (an_old_heartbeat_that_changes_the_numbers, "R6"),
    (in_flight_that_is_not_shown, "R7"), (a_lease_for_ever, "R8"),
    (a_line_too_long, "R11"), (a_wait_too_long, "R11"), (overtaken, "R11"), (waits_for_nothing, "R12"),
    (a_deadline_that_does_not_move, "R13"), (a_tick_that_never_has_enough, "R13"),
    (a_word_to_nobody, "R14"), (told_twice, "R14"), (passed_on_from_nobody, "R14"), (cut_without_a_lease, "R14"),
    (a_probe_of_nobody, "R14"), (an_agent_that_nobody_made, "R14"), (a_heartbeat_without_an_answer, "R14"), (drained_and_not_held, "R15"),
]  # fmt: skip


@pytest.mark.parametrize(("broken", "number"), BROKEN, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_a_broken_promise_is_named(broken: Callable[[Talk], None], number: str) -> None:
    with pytest.raises(Violation) as raised:
        broken(Talk(agents=("a", "b")))
    assert raised.value.invariant == number
    assert str(raised.value).startswith(f"{number}: ")


def test_a_request_that_is_tried_waits_and_ends_well_breaks_nothing() -> None:
    talk = Talk(agents=("a", "b"))
    talk.came("r", forward())
    talk.ended(forward(agent="b", attempt=2), failure=Failure.REFUSED)
    talk.ended(wait(), failure=Failure.ANSWERED, status=503)
    talk.router.waiters = [Stood("r")]
    talk.checkers.look(now=talk.now)
    talk.checkers.look(now=Instant(talk.now + 9))
    talk.tell(None, forward(attempt=3))
    talk.router.waiters = []
    talk.router.in_flight = {AgentId("a"): 1, AgentId("unknown"): 3}
    talk.checkers.look(now=talk.now)
    talk.tell(FirstByte(request_id=RequestId("r")))
    talk.settled(record(), node_fault=Failure.DIED)
    assert talk.checkers.settled == 1
    assert not talk.checkers.requests
    assert talk.checkers.last_agent == "a"


def test_who_is_refused_and_never_settled_is_given_up() -> None:
    talk = Talk()
    talk.came("r", refuse())
    talk.tell(None, record(ending=Ending.UNKNOWN), after_s=31.0)
    assert not talk.checkers.requests


def test_late_reports_are_no_news() -> None:
    talk = Talk()
    talk.tell(FirstByte(request_id=RequestId("x")))
    talk.tell(Pulse(requests=(RequestId("x"),), heard=(AgentId("x"),)))
    talk.tell(AttemptEnded(request_id=RequestId("x"), failure=Failure.DIED))
    with pytest.raises(Violation, match="R2"):
        talk.settled()


def works_on(*request_ids: str, agent: str = "a", sequence: int = 1) -> HeartbeatCame:
    message = Heartbeat(agent_id=agent, cpu_usage=0, memory_usage=0, boot=1, sequence=sequence, in_flight=list(request_ids))
    return HeartbeatCame(heartbeat=message, now_unix=UnixMs(0))


def test_a_lease_lives_on_while_its_nodes_gateway_works_on_it() -> None:
    talk = Talk(agents=("a", "b"))
    accepted = Accepted(agent_id=AgentId("a"))
    talk.came("r", forward())
    talk.tell(works_on("r", "x"), accepted, after_s=20.0)
    talk.tell(Pulse(), after_s=20.0)
    talk.tell(works_on("r", agent="b"), Accepted(agent_id=AgentId("b")), after_s=5.0)  # it is not on that one
    with pytest.raises(Violation, match="R8"):
        talk.tell(Pulse(), after_s=6.0)


def test_a_request_that_lost_its_agent_is_released() -> None:
    talk = Talk(agents=("a", "b"))
    talk.came("r", forward())
    del talk.checkers.book.agents[AgentId("a")]
    talk.ended(PassOn(request_id=RequestId("r")))
    talk.settled(record())


def test_the_inside_is_checked_every_so_often() -> None:
    def broken(router: object, *, now: Instant) -> None:
        raise AssertionError("R99: inside")

    with pytest.raises(Violation) as raised:
        Talk(every=1, invariants=broken)
    assert raised.value.invariant == "inside"
    Talk(every=1, invariants=lambda router, *, now: None)


def test_drained_ones_that_are_held_or_unknown_or_pending() -> None:
    talk = Talk()
    agent = talk.checkers.book.agents[AgentId("a")]
    agent.out = True
    talk.router.state = "held"
    talk.checkers.look(now=talk.now)
    agent.leases = 1
    talk.router.in_flight = {AgentId("a"): 1}
    talk.router.state = "draining"
    talk.checkers.look(now=talk.now)


def test_declined_answers_are_answers() -> None:
    Talk().tell(beat(1), Declined(status=404, text=""))


def test_an_old_message_at_a_deadline_is_not_judged() -> None:
    talk = Talk()
    known(talk)
    talk.router.deadline = talk.now
    talk.checkers.before(beat(1), now=talk.now)
    talk.router.state = "held"
    talk.checkers.after(beat(1), [Accepted(agent_id=AgentId("a"))], now=talk.now)


def test_others_of_the_line_are_not_overtaken() -> None:
    talk = Talk()
    talk.came("q", wait("q"), runner_options="num_ctx=1")
    talk.came("r", forward())
    talk = Talk()
    talk.came("q", wait("q"))
    talk.came("s", wait("s"), load_only=True)
    talk.tell(None, forward("q"))
    talk.tell(None, forward("s"))


@pytest.mark.parametrize("seed", range(300, 312))
def test_in_all_weathers(seed: int) -> None:
    verdict = drawn(seed, every=1).run(400)
    assert verdict.passed, verdict


def test_a_deadline_that_had_passed_comes_before_the_event() -> None:
    """What the router did about it was due, although the event ended the request."""
    talk = Talk()
    talk.came("r", wait())
    talk.router.deadline = talk.now
    talk.settled(refuse(), record())
    talk.came("r", forward())
    talk.settled(record())
    talk.came("r", forward())
    talk.ended(Cut(request_id=RequestId("r"), reason="gone"), forward(attempt=2))
    talk.router.deadline = None
    with pytest.raises(Violation, match="R14"):
        talk.settled(refuse(), record())
