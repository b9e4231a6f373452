"""The composition: the life of a request, what nodes report, the laws of time, and determinism."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import RouterConfig
from core.errors import LocalError
from core.events import (
    Accepted,
    AttemptEnded,
    Command,
    Count,
    Effect,
    Ending,
    Event,
    Failure,
    FirstByte,
    Forward,
    MetricsCame,
    NodePolled,
    Note,
    Pulse,
    Record,
    Refuse,
    Registered,
    RequestCame,
    Route,
    SettingsChanged,
    Settled,
    Wait,
)
from core.messages import AgentSettings, Metrics
from core.names import normalise
from core.router import Router
from core.units import AgentId, Instant, RequestId
from tests.core.routing import World, answer, node_of, of, one, registration, row, usage

M = normalise("m")


# ---------------------------------------------------------------- the life of a request


def test_the_usual_life() -> None:
    world = World()
    node = world.backend("one", "m", loaded=("m",))
    forward = one(world.ask("r", client="key"), Forward)
    assert (forward.lease.id, forward.lease.attempt, forward.lease.agent_name) == ("r/1", 1, "one")
    assert world.router.statistics().in_flight_by_agent == {node: 1}
    world.now += 0.5
    assert world.first("r") == []
    world.now += 0.5
    record = one(world.settle("r", status=200, usage=usage(), body_bytes=7, chunks=3), Record)
    assert (record.client, record.agent_id, record.ending, record.status) == ("key", node, Ending.SUCCESS, 200)
    assert (record.ttft_ms, record.duration_ms, record.queue_ms, record.predicted_start_ms) == (500, 1000, 0, 0)
    assert [(attempt.agent_name, attempt.outcome) for attempt in record.attempts] == [("one", "success")]
    statistics = world.router.statistics()
    assert (statistics.in_flight, statistics.requests_total, statistics.agents, statistics.agents_ready) == (0, 1, 1, 1)


def test_a_record_of_attempts_and_waiting() -> None:
    world = World()
    world.backend("one", "m", loaded=("m",))
    world.backend("two", "m", loaded=("m",))
    world.ask("a")
    world.ask("b")
    world.ask("r")
    world.now += 2
    world.settle("a")
    world.fail("r", Failure.DIED)
    world.now += 3
    world.settle("b")
    record = one(world.serve("r"), Record)
    assert record.queue_ms == 5000
    assert [(attempt.agent_name, attempt.outcome) for attempt in record.attempts] == [("one", "died"), ("two", "success")]
    why = world.router.why(RequestId("r"))
    assert why is not None
    assert [decision.outcome.split()[0] for decision in why.decisions] == ["waits", "forwarded", "waits", "forwarded"]


def test_what_a_client_was_refused_is_recorded_without_a_node() -> None:
    world = World()
    world.ask("r", "nosuch")
    record = one(world.settle("r", Ending.ERROR, status=404, message="model 'nosuch' not found"), Record)
    assert (record.agent_id, record.attempts, record.status) == (None, (), 404)


def test_a_client_that_leaves_counts_against_nobody() -> None:
    world = World(eject_after=1)
    node = world.backend("one", "m", loaded=("m",))
    for number in range(5):
        world.ask(f"r{number}")
        world.settle(f"r{number}", Ending.CANCELLED)
    assert world.router.agent(node).ejections == []  # type: ignore[union-attr]
    world.ask("runs")
    world.ask("waits")
    world.settle("waits", Ending.CANCELLED)
    assert world.router.waiting() == []
    assert node_of(world.ask("waits"), "waits") is None


def test_a_whole_answer_needs_no_first_byte() -> None:
    world = World()
    node = world.backend("one", "m")
    world.ask("r")
    record = one(world.settle("r", usage=usage()), Record)
    assert record.ttft_ms == 0
    assert M in world.inventory(node).resident


def test_late_reports_change_nothing() -> None:
    world = World()
    world.backend("one", "m")
    world.ask("r")
    world.settle("r")
    before = world.router.statistics()
    for effects, kind in (
        (world.first("r"), "first byte"),
        (world.fail("r", Failure.DIED), "attempt ended"),
        (world.settle("r"), "settled"),
    ):
        assert effects == [Count(name="late_reports_total", labels={"kind": kind})]
    world.ask("refused", "nosuch")
    assert one(world.first("refused"), Count)
    assert one(world.fail("refused", Failure.DIED), Count)
    assert world.router.statistics().in_flight == before.in_flight


def test_a_shell_that_breaks_the_order_of_events_is_told() -> None:
    world = World()
    world.backend("one", "m")
    world.ask("r")
    world.ask("waits")
    world.first("r")
    for wrong in (
        lambda: world.ask("r"),
        lambda: world.first("r"),
        lambda: world.first("waits"),
        lambda: world.fail("waits", Failure.DIED),
    ):
        with pytest.raises(LocalError):
            wrong()


def test_no_attempt_after_the_first_byte() -> None:
    world = World()
    world.backend("one", "m")
    world.backend("two", "m")
    world.ask("r")
    world.first("r")
    with pytest.raises(LocalError, match="no attempt of it can have failed"):
        world.fail("r", Failure.DIED)


def test_cloud_models_are_refused() -> None:
    world = World()
    world.backend("one", "m:cloud")
    refuse = answer(world.ask("r", "m:cloud"), "r")
    assert isinstance(refuse, Refuse)
    assert refuse.status == 403


def test_a_request_that_names_no_model_is_settled_like_any_other() -> None:
    world = World()
    world.backend("one", "m")
    world.ask("r", None)
    assert one(world.serve("r"), Record).ending is Ending.SUCCESS


# ---------------------------------------------------------------- what nodes report


def test_requests_of_others_are_what_a_node_reports_beyond_our_own() -> None:
    world = World()
    node = world.agent_with("one", "m", slots=9)
    world.ask("ours")
    world.ask("settled")
    world.settle("settled")
    world.beat(node, in_flight=["ours", "settled", "foreign"], sequence=2)
    assert world.router.agent(node).active_requests == 2  # type: ignore[union-attr]
    world.beat(node, active_requests=4, sequence=3)
    assert world.router.agent(node).active_requests == 4  # type: ignore[union-attr]
    world.beat(node, active_requests=0, sequence=4)
    assert world.router.agent(node).active_requests == 1  # type: ignore[union-attr]


def test_every_event_about_nodes_reaches_the_registry() -> None:
    world = World()
    effects = world.register(registration("box"), agent_id="box")
    assert one(effects, Registered).status == "registered"
    assert one(
        world.do(MetricsCame(agent_id=AgentId("box"), metrics=Metrics(cpu_usage=1, memory_usage=2), now_unix=world.unix())), Accepted
    )
    assert one(world.do(SettingsChanged(agent_id=AgentId("box"), settings=AgentSettings(custom_name="mine"))), Accepted)
    assert one(world.beat("box", installed_models=[row("m")]), Accepted)
    view = world.router.agent(AgentId("box"))
    assert view is not None
    assert (view.name, view.status, view.cpu_usage) == ("mine", "online", 10)
    assert world.router.agents() == [view]
    assert world.router.agent(AgentId("nobody")) is None


def test_what_is_kept_of_an_agent_makes_it_known_to_the_next_router() -> None:
    before, after = World(), World()
    before.agent_with("box", "m")
    kept = before.router.known(AgentId("box"))
    assert kept is not None
    assert before.router.known(AgentId("nobody")) is None
    after.do(kept)
    assert (after.router.agent_ids(), after.state(AgentId("box"))) == ([AgentId("box")], "offline")
    assert isinstance(answer(after.ask("r"), "r"), Wait), "it may come back"


def test_lists_come_from_approved_nodes() -> None:
    world = World()
    world.backend("one", "m", loaded=("m",))
    world.register(registration("stranger"), agent_id="stranger", trusted=False)
    (listed,) = world.router.inventories()
    assert (listed.name, listed.ready, [entry["name"] for entry in listed.installed], len(listed.loaded)) == ("one", True, ["m"], 1)


def test_a_stranger_gets_no_request_before_approval() -> None:
    world = World()
    world.register(registration("box"), agent_id="box", trusted=False)
    world.beat("box", installed_models=[row("m")])
    assert isinstance(answer(world.ask("r1"), "r1"), Refuse)
    world.order(AgentId("box"), Command.APPROVE)
    world.beat("box", installed_models=[row("m")])
    assert node_of(world.ask("r2"), "r2") == "box"


# ---------------------------------------------------------------- time


def test_deadlines_come_into_force_although_nobody_ticked() -> None:
    world = World(agent_timeout_s=60)
    world.backend("one", "m")
    world.now += 60
    effects = world.ask("r")
    assert one(of(effects, Note), Note).fields["state"] == "offline"
    assert isinstance(answer(effects, "r"), Refuse)


def test_time_does_not_go_back() -> None:
    world = World()
    world.tick()
    with pytest.raises(AssertionError, match="R13"):
        world.router.tick(now=Instant(world.now - 1))


def test_nothing_is_due_in_an_idle_router_after_its_start() -> None:
    router = Router(RouterConfig(startup_grace_s=15), now=Instant(0.0))
    assert router.next_deadline() == 15
    assert router.tick(now=Instant(15.0)) == []
    assert router.next_deadline() is None


# ---------------------------------------------------------------- determinism


STEP = st.tuples(st.sampled_from(("ask", "first", "settle", "fail", "busy", "poll", "pulse", "wait")), st.integers(0, 7), st.integers(0, 3))


def conversation(steps: list[tuple[str, int, int]], *, start: float) -> list[list[Effect]]:
    """Play the steps with a fresh router whose time begins at `start`; what each one brought about."""
    world = World()
    world.now = start
    world.router = Router(RouterConfig(), now=Instant(start))
    nodes = [world.backend(name, "m", "n", loaded=("m",), slots=2) for name in ("one", "two", "three")]
    brought = []
    for what, number, other in steps:
        request_id = RequestId(f"r{number}")
        request = world.router._requests.get(request_id)
        event: Event | None = None
        if what == "ask" and request is None:
            event = RequestCame(request_id=request_id, route=Route.CHAT, model="mn"[other % 2], client=f"c{other}")
        elif request is not None and request.phase.value == "trying":
            failed = AttemptEnded(request_id=request_id, failure=list(Failure)[other])
            busy = AttemptEnded(request_id=request_id, failure=Failure.ANSWERED, status=503)
            event = {"first": FirstByte(request_id=request_id), "fail": failed, "busy": busy}.get(what)
        if what == "settle":
            event = Settled(request_id=request_id, ending=Ending.SUCCESS, usage=usage())
        elif what == "poll":
            event = NodePolled(agent_id=nodes[other % 3], loaded=[row("n")] * (other % 2), installed=None, now_unix=world.unix())
        elif what == "pulse":
            event = Pulse(requests=(request_id,), heard=tuple(nodes))
        if event is not None:
            brought.append(world.do(event))
        elif what == "wait":
            brought.append(world.wait(2.0**other))
    return brought


@given(st.lists(STEP, max_size=40))
def test_the_same_events_bring_about_the_same_effects_at_any_time(steps: list[tuple[str, int, int]]) -> None:
    first = conversation(steps, start=128.0)
    assert conversation(steps, start=128.0) == first
    assert conversation(steps, start=65536.0) == first
