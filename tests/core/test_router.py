"""The composition: the life of a request, leases and pulses, cuts, what nodes report, and the laws of time."""

from typing import Any

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
    Cut,
    Effect,
    Ending,
    Event,
    Failure,
    FirstByte,
    Forward,
    MetricsCame,
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


def inventory(world: World, agent_id: AgentId) -> Any:
    found = world.router._registry.get(agent_id)
    assert found is not None
    return found.inventory


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
    assert M in inventory(world, node).resident


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


# ---------------------------------------------------------------- leases, pulses, cuts


def test_pulses_keep_leases_and_what_is_not_reported_ends_unknown() -> None:
    world = World(lease_ttl_s=30, agent_timeout_s=1000)
    world.backend("one", "m", slots=2)
    world.ask("kept")
    world.ask("lost")
    world.wait(20)
    world.pulse("kept", "nobody")
    effects = world.wait(10)
    assert one(effects, Cut).request_id == "lost"
    record = one(effects, Record)
    assert (record.request_id, record.ending, [attempt.outcome for attempt in record.attempts]) == ("lost", Ending.UNKNOWN, ["unknown"])
    assert of(world.wait(19.9), Record) == []
    assert one(world.wait(0.1), Record).request_id == "kept"


def test_a_lease_that_expires_frees_its_place_for_who_waits() -> None:
    world = World(agent_timeout_s=1000)
    node = world.backend("one", "m")
    world.ask("lost")
    world.ask("waits")
    assert node_of(world.wait(30), "waits") == node
    assert inventory(world, node).loading.keys() == {M}


def test_answers_that_nobody_reports_are_forgotten_in_time() -> None:
    world = World()
    world.ask("r1", "nosuch")
    world.ask("r2", "nosuch")
    world.wait(20)
    world.pulse("r1")
    assert [record.request_id for record in of(world.wait(10), Record)] == ["r2"]
    assert [record.request_id for record in of(world.wait(20), Record)] == ["r1"]
    assert world.router._requests == {}


def test_a_node_that_falls_silent_has_its_requests_cut() -> None:
    world = World(agent_timeout_s=60)
    world.agent_with("one", "m", slots=2)
    world.ask("r1")
    world.ask("r2")
    for _ in range(5):
        world.wait(10)
        world.pulse("r1", "r2")
    effects = world.wait(10)
    assert [(cut.request_id, cut.reason) for cut in of(effects, Cut)] == [
        ("r1", "one was not heard for 60 s"),
        ("r2", "one was not heard for 60 s"),
    ]
    two = world.backend("two", "m", slots=2)
    assert node_of(world.fail("r1", Failure.VANISHED), "r1") == two


def test_bytes_keep_a_node_alive() -> None:
    world = World(agent_timeout_s=60)
    node = world.agent_with("one", "m")
    world.ask("r")
    for _ in range(20):
        world.wait(10)
        world.pulse("r", heard=(node,))
    assert world.state(node) == "ready"


@pytest.mark.parametrize("command", [Command.DISCONNECT_NOW, Command.DELETE])
def test_ordered_away_at_once_cuts(command: Command) -> None:
    world = World()
    node = world.backend("one", "m")
    world.ask("r")
    assert one(world.order(node, command), Cut).request_id == "r"
    world.fail("r", Failure.VANISHED)
    assert world.router.statistics().in_flight == 0


def test_a_drain_cuts_nothing() -> None:
    world = World()
    node = world.backend("one", "m")
    world.ask("r")
    assert of(world.order(node, Command.DRAIN), Cut) == []
    world.first("r")
    world.settle("r")
    assert world.state(node) == "held"


# ---------------------------------------------------------------- what failures mean for nodes


def test_a_refused_connection_takes_an_agentless_node_offline_and_has_it_asked() -> None:
    world = World()
    node = world.backend("one", "m")
    world.ask("r")
    effects = world.fail("r", Failure.REFUSED)
    assert world.state(node) == "offline"
    assert one(effects, Probe).agent_id == node
    assert isinstance(answer(effects, "r"), Refuse)


def test_a_node_that_lacks_what_it_listed_is_asked_again_and_passed_over() -> None:
    world = World(strategy="round-robin")
    liar, good = world.backend("liar", "m", slots=9), world.backend("good", "m", slots=9)
    world.ask("r")
    effects = world.fail("r", Failure.ANSWERED, 404, "model 'm' not found")
    assert one(effects, Probe).agent_id == liar
    assert node_of(effects, "r") == good
    assert node_of(world.ask("next"), "next") == good
    world.poll(liar, installed=[], loaded=[])
    assert world.router.agent(liar).ejections == []  # type: ignore[union-attr]


def test_out_of_memory_forgets_what_was_loaded() -> None:
    world = World()
    node = world.backend("one", "m", "n", loaded=("m", "n"))
    world.ask("r")
    world.fail("r", Failure.ANSWERED, 500, "CUDA error: out of memory")
    assert inventory(world, node).resident == {}


def test_a_node_that_says_the_model_cannot_is_at_fault_only_when_another_could() -> None:
    world = World(eject_after=1, strategy="round-robin")
    first, second = world.backend("first", "m", slots=9), world.backend("second", "m", slots=9)
    world.ask("wrong")
    world.fail("wrong", Failure.ANSWERED, 400, '"m" does not support thinking')
    assert isinstance(answer(world.fail("wrong", Failure.ANSWERED, 400, '"m" does not support thinking'), "wrong"), PassOn)
    world.settle("wrong", Ending.ERROR)
    assert world.router.agent(first).ejections == []  # type: ignore[union-attr]
    world.ask("right")
    world.fail("right", Failure.ANSWERED, 400, '"m" does not support chat')
    world.first("right")
    effects = world.settle("right")
    assert world.router.agent(first).ejections[0].why == "said that the model cannot do what another node could"  # type: ignore[union-attr]
    assert one(effects, Note).fields["agent"] == "first"
    assert world.router.agent(second).ejections == []  # type: ignore[union-attr]


def test_a_cut_after_the_first_byte_counts_and_ejections_are_told() -> None:
    world = World(eject_after=2)
    node = world.backend("one", "m")
    told: list[Effect] = []
    for number in range(2):
        world.ask(f"r{number}")
        world.first(f"r{number}")
        told = world.settle(f"r{number}", Ending.ERROR, node_fault=Failure.DIED, message="unexpected EOF")
    assert [note.event for note in of(told, Note)] == ["attempt failed", "passed over"]
    assert Count(name="ejections_total", labels={"agent": "one"}) in told
    (ejection,) = world.router.agent(node).ejections  # type: ignore[union-attr]
    assert ejection.why == "died: unexpected EOF"
    assert one(told, Record).attempts[0].outcome == "died"


def test_a_client_error_is_not_worth_a_line() -> None:
    world = World()
    world.backend("one", "m")
    world.ask("r")
    assert of(world.fail("r", Failure.ANSWERED, 400, "bad"), Note) == []


def test_a_new_run_of_an_agent_starts_with_a_clean_slate() -> None:
    world = World(eject_after=1)
    node = world.agent_with("one", "m", boot=1)
    world.ask("r")
    world.fail("r", Failure.DIED)
    assert world.router.agent(node).ejections  # type: ignore[union-attr]
    world.register(registration("one", boot=2))
    assert world.router.agent(node).ejections == []  # type: ignore[union-attr]


def test_a_request_that_hangs_on_a_leaked_slot_waits_for_the_reload() -> None:
    world = World()
    world.backend("one", "m", loaded=("m",))
    world.router._leaks.silence_s = 1.0
    world.ask("left")
    world.serve("left", ending=Ending.CANCELLED)
    world.ask("hangs")
    assert one(world.wait(9.0), Cut).unload == ("m:latest",)
    assert node_of(world.fail("hangs", Failure.VANISHED), "hangs") == "id of one"
    world.first("hangs")
    assert not world.router._leaks.active, "another runner answers"


def test_two_at_once_teach_that_there_are_two_slots() -> None:
    world = World()
    node = world.late_backend("one")
    world.poll(node, installed=[row("m")], loaded=[row("m")])
    for request_id in ("a", "b"):
        world.ask(request_id, runner_options="num_ctx=1")
        world.first(request_id)
    assert world.router.agent(node).model_slots == {"m:latest": 2}  # type: ignore[union-attr]


def test_what_ran_through_the_former_run_of_a_gateway_is_given_up_at_once() -> None:
    world = World()
    world.agent_with("one", "m", boot=1)
    world.ask("r")
    assert one(world.register(registration("one", boot=2)), Cut).reason == "the agent of one started anew"


def test_an_embedding_teaches_speed_and_a_show_teaches_nothing() -> None:
    world = World()
    node = world.backend("one", "m", loaded=("m",))
    world.ask("embed", route=Route.EMBED)
    world.serve("embed", usage=usage(prompt=20, output=0, prompt_s=0.0, eval_s=0.0))
    assert world.router._speeds._pairs.keys() == {node}
    other = World()
    other.backend("one", "m", loaded=("m",))
    for request_id, fields in (("show", {"route": Route.SHOW}), ("load", {"load_only": True})):
        other.ask(request_id, **fields)  # type: ignore[arg-type]
        other.serve(request_id)
    assert other.router._speeds._pairs == {}


def test_a_model_that_went_while_it_ran_is_survived() -> None:
    world = World()
    node = world.backend("one", "m", loaded=("m",))
    world.ask("r")
    world.poll(node, installed=[], loaded=[])
    world.serve("r", usage=usage())
    world.order(node, Command.DELETE)
    assert world.router._speeds._pairs == {}


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


def test_every_wait_is_answered_in_the_end() -> None:
    world = World(queue_timeout_s=50)
    world.backend("one", "m", loaded=("m",))
    kinds = [type(answer(world.ask(f"r{number}"), f"r{number}")) for number in range(5)]
    assert kinds == [Forward, Wait, Wait, Wait, Wait]
    effects = world.settle("r0") + world.wait(100)
    assert [(forward.request_id, forward.lease.attempt) for forward in of(effects, Forward)] == [("r1", 1), ("r2", 1)], "r1 was lost"
    assert [refuse.request_id for refuse in of(effects, Refuse)] == ["r3", "r4"]


def test_a_busy_node_is_waited_for_and_its_first_byte_lets_the_others_go() -> None:
    world = World(busy_pause_s=4)
    node = world.backend("one", "m", loaded=("m",), slots=3)
    world.ask("r1")
    world.ask("r2")
    assert isinstance(answer(world.busy("r2"), "r2"), Wait)
    (view,) = world.router.waiting()
    assert (view.request_id, view.expected_start_ms, view.waited_ms) == ("r2", None, 0)
    assert node_of(world.first("r1"), "r2") == node
    assert isinstance(answer(world.busy("r2"), "r2"), Wait)
    assert node_of(world.wait(4), "r2") == node
    assert world.router.why(RequestId("r2")) is not None
    assert world.router.why(RequestId("nobody")) is None


def test_what_was_unloaded_is_cold() -> None:
    world = World()
    node = world.backend("one", "m", loaded=("m",))
    world.ask("unload", load_only=True, unload=True)
    world.serve("unload")
    assert M not in inventory(world, node).resident
    effects = world.ask("again")
    assert of(effects, Count) == [Count(name="loads_total", labels={"agent": "one"})]


def test_a_request_that_names_no_model_is_settled_like_any_other() -> None:
    world = World()
    world.backend("one", "m")
    world.ask("r", None)
    assert one(world.serve("r"), Record).ending is Ending.SUCCESS


def test_a_model_gone_from_one_node_is_found_on_another() -> None:
    world = World()
    gone = world.agent_with("gone", "m")
    good = world.backend("good", "m")
    first = node_of(world.ask("r"), "r")
    effects = world.fail("r", Failure.ANSWERED, 404, "model 'm' not found")
    assert {first, node_of(effects, "r")} == {gone, good}


def test_a_load_that_is_through_lets_others_load_whoever_began_it() -> None:
    world = World()
    node = world.backend("one", "m", "other", slots=2)
    world.ask("began", "other")
    world.ask("joined", "other")
    assert isinstance(answer(world.ask("r"), "r"), Wait), "the node loads one model at a time"
    world.settle("began", Ending.CANCELLED)
    assert node_of(world.first("joined"), "r") == node


def test_those_who_wait_for_a_load_begin_it_in_the_order_in_which_they_came() -> None:
    world = World(busy_pause_s=1)
    world.backend("one", "m", "other", slots=2)
    world.ask("busy")
    world.busy("busy")
    world.settle("busy", Ending.CANCELLED)
    for number in range(4):
        world.ask(f"r{number}")
    world.ask("preload", client="another", load_only=True)
    world.ask("loads", "other")
    went = [forward.request_id for forward in of(world.wait(1), Forward)]
    assert went == ["preload", "r0"], "the preload makes the node load their model too: the first of them goes with it"


def test_a_request_whose_busy_node_went_away_holds_up_nobody() -> None:
    world = World(eject_after=1)
    busy, sick = world.backend("busy", "m", loaded=("m",)), world.backend("sick", "m", loaded=("m",))
    world.ask("r1")
    world.ask("r2")
    assert isinstance(answer(world.busy("r1"), "r1"), Wait)
    world.ask("r3")
    world.silent(busy)
    assert node_of(world.fail("r2", Failure.DIED), "r1") == sick, "the least bad one is used, since nobody else is left"
    assert node_of(world.serve("r1"), "r3") == sick
