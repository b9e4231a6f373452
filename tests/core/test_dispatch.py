"""Where requests go: warm before cold, waiting as a choice, fairness, what is tried next, and what is said when nothing is."""

from typing import Any

import pytest

from core.events import Count, Ending, Failure, Forward, PassOn, Refuse, Route, Wait
from core.names import normalise
from core.requests import BUSY_TEXT
from core.units import AgentId
from tests.core import test_displacement as barriers
from tests.core.routing import Fleet, World, answer, node_of, of, one, registration, row, usage

M = normalise("m")

# The stories of the eviction barrier are this module's too.
fleet = barriers.fleet
test_a_cold_load_waits = barriers.test_a_cold_load_waits_behind_a_barrier_and_no_longer_than_what_was_in_flight
test_a_second_cold_request_waits = barriers.test_a_second_cold_request_waits_for_the_first


# ---------------------------------------------------------------- waiting as a choice


@pytest.mark.parametrize("size", [0, 500_000_000, 4_900_000_000, 40_000_000_000])
def test_two_at_once_wait_for_the_warm_node_and_forty_load_the_other_once(size: int) -> None:
    fleet = Fleet()
    warm, cold = fleet.warm("warm", size=size), fleet.backend("cold", "m", size=size)
    for number in range(2):
        fleet.ask(f"two{number}")
    fleet.run()
    assert [agent_id for _, agent_id, _ in fleet.started] == [warm, warm]
    for number in range(40):
        fleet.ask(f"forty{number}")
    fleet.run()
    assert fleet.loads == [cold]
    served = [agent_id for _, agent_id, _ in fleet.started[2:]]
    assert min(served.count(warm), served.count(cold)) >= 12
    assert fleet.router.statistics().requests_total == 42


def test_forty_at_once_before_anything_was_learned() -> None:
    fleet = Fleet()
    warm, cold = fleet.warm("warm"), fleet.backend("cold", "m")
    for number in range(40):
        fleet.ask(f"r{number}")
    fleet.run()
    assert fleet.loads == [cold]
    assert len({agent_id for _, agent_id, _ in fleet.started}) == 2
    assert fleet.started[0][1] == warm


def test_a_few_keep_waiting_for_the_warm_node_although_another_is_idle() -> None:
    fleet = Fleet()
    warm = fleet.warm("warm")
    fleet.backend("cold", "m")
    fleet.ask("teaches")
    fleet.run()
    for number in range(4):
        fleet.ask(f"r{number}")
    assert len(fleet.router.waiting()) == 3
    fleet.run()
    assert (fleet.loads, {agent_id for _, agent_id, _ in fleet.started}) == ([], {warm})


def test_what_the_first_answer_teaches_changes_the_mind_of_those_who_wait() -> None:
    fleet = Fleet(service_s=20.0, load_s=1.0, agent_timeout_s=1000)
    fleet.warm("warm", size=100_000_000)
    cold = fleet.backend("cold", "m", size=100_000_000)
    for number in range(8):
        fleet.ask(f"r{number}")
    assert (len(fleet.router.waiting()), fleet.loads) == (7, []), "a small model should answer at once"
    fleet.run()
    assert fleet.loads == [cold]
    assert [agent_id for _, agent_id, _ in fleet.started].count(cold) >= 3


def test_a_busy_node_comes_back_into_view_when_the_other_one_is_gone() -> None:
    world = World(busy_pause_s=1)
    one_id, two = world.backend("one", "m", loaded=("m",)), world.backend("two", "m", loaded=("m",))
    world.ask("r1")
    world.ask("r2")
    assert isinstance(answer(world.busy("r1"), "r1"), Wait)
    world.silent(two)
    assert world.router.waiting()[0].why == "waits for a node that is not too busy"
    assert node_of(world.wait(1), "r1") == one_id


def test_the_queue_is_served_in_order_and_shown_with_expected_starts() -> None:
    fleet = Fleet()
    fleet.warm("only")
    for number in range(4):
        fleet.ask(f"r{number}")
    views = fleet.router.waiting()
    assert [(view.request_id, view.position) for view in views] == [("r1", 1), ("r2", 2), ("r3", 3)]
    starts = [view.expected_start_ms for view in views]
    assert starts == sorted(starts, key=lambda start: start or 0.0)
    assert views[0].why == "waits for only, whose slots are taken"
    fleet.run(seconds=0.5)
    assert fleet.router.waiting()[0].waited_ms == pytest.approx(250)
    fleet.run()
    assert [request_id for request_id, _, _ in fleet.started] == ["r0", "r1", "r2", "r3"]


def test_a_client_with_much_does_not_starve_one_with_little() -> None:
    fleet = Fleet()
    fleet.warm("only")
    for number in range(10):
        fleet.ask(f"a{number}", client="a")
    fleet.ask("b0", client="b")
    fleet.run()
    assert [request_id for request_id, _, _ in fleet.started].index("b0") == 2


def test_a_request_for_another_model_does_not_wait_behind() -> None:
    world = World()
    world.backend("one", "m", loaded=("m",))
    two = world.backend("two", "n", loaded=("n",))
    world.ask("r1")
    assert isinstance(answer(world.ask("r2"), "r2"), Wait)
    assert node_of(world.ask("r3", "n"), "r3") == two
    assert isinstance(answer(world.ask("r4", "n"), "r4"), Wait)
    assert node_of(world.settle("r3"), "r4") == two


def test_more_slots_or_a_new_node_let_those_go_who_wait() -> None:
    world = World()
    world.agent_with("one", "m")
    for number in range(3):
        world.ask(f"r{number}")
    assert len(world.router.waiting()) == 2
    assert node_of(world.beat("one", slots=2, sequence=5), "r1") == "one"
    two = AgentId("id of two")
    forwards: list[Forward] = []
    world.watch = lambda effects: forwards.extend(of(effects, Forward))
    world.backend("two", "m", loaded=("m",))
    assert [(forward.request_id, forward.lease.agent_id) for forward in forwards] == [("r2", two)]


def test_other_runner_options_are_another_kind() -> None:
    world, counted = World(), []
    world.backend("one", "m", loaded=("m",))
    for number, options in enumerate(("num_ctx=1", "num_ctx=2", "num_ctx=1", "num_ctx=2")):
        counted.append([count.name for count in of(world.ask(f"r{number}", runner_options=options), Count)])
        world.serve(f"r{number}", ending=Ending.CANCELLED if number == 2 else Ending.SUCCESS, usage=usage())
        if number == 1:
            world.backend("two", "m")
    assert counted == [[], ["reloads_total", "loads_total"], ["loads_total"], ["reloads_avoided_total"]]


@pytest.mark.parametrize("strategy", ["metrics", "least-busy", "round-robin"])
def test_strategies_that_forward_at_once_do_not_wait_for_slots(strategy: str) -> None:
    world = World(strategy=strategy)
    world.backend("one", "m", loaded=("m",))
    for number in range(5):
        assert isinstance(answer(world.ask(f"r{number}"), f"r{number}"), Forward)


@pytest.mark.parametrize("strategy", ["auto", "metrics", "least-busy", "round-robin"])
def test_a_cap_on_a_node_makes_requests_wait_in_every_strategy(strategy: str) -> None:
    world = World(strategy=strategy)
    agent_id = world.agent_with("one", "m", slots=8)
    world.cap(agent_id, 1)
    world.ask("r1")
    assert isinstance(answer(world.ask("r2"), "r2"), Wait)
    assert isinstance(answer(world.ask("show", route=Route.SHOW), "show"), Forward), "this needs no slot"
    assert node_of(world.settle("r1"), "r2") is None, "the other one counts too"
    assert node_of(world.settle("show"), "r2") == agent_id


# ---------------------------------------------------------------- the queue's limits


def test_a_full_queue_says_what_a_full_ollama_says() -> None:
    world = World(queue_max=2, queue_per_client=2)
    world.backend("one", "m")
    for number, client in enumerate("abc"):
        world.ask(f"r{number}", client=client)
    refuse = answer(world.ask("late", client="d"), "late")
    assert refuse == Refuse(request_id="late", status=503, text=BUSY_TEXT, retry_after_s=8)  # type: ignore[arg-type]


def test_one_client_may_have_so_many_waiting() -> None:
    world = World(queue_per_client=1)
    world.backend("one", "m")
    world.ask("r0")
    world.ask("r1")
    effects = world.ask("r2")
    refuse = answer(effects, "r2")
    assert isinstance(refuse, Refuse)
    assert (refuse.status, refuse.retry_after_s) == (429, 8)
    assert one(effects, Count).labels == {"reason": "client full"}
    assert isinstance(answer(world.ask("other", client="other"), "other"), Wait)


def test_who_waited_too_long_is_refused_at_the_deadline() -> None:
    world = World(queue_timeout_s=20)
    agent_id = world.backend("one", "m")
    world.ask("runs")
    world.ask("waits")
    world.wait(19.5)
    world.pulse("runs", "waits", heard=(agent_id,))
    assert len(world.router.waiting()) == 1
    refuse = answer(world.wait(0.5), "waits")
    assert isinstance(refuse, Refuse)
    assert (refuse.status, refuse.text, refuse.retry_after_s) == (503, BUSY_TEXT, 8)


def test_time_spent_waiting_is_counted_over_all_waits() -> None:
    world = World(queue_timeout_s=20, busy_pause_max_s=4)
    world.backend("one", "m")
    came = world.now
    world.ask("blocks")
    world.ask("r")
    world.wait(10)
    effects = world.settle("blocks")
    while not isinstance(answer(effects, "r"), PassOn):
        effects = world.busy("r") if node_of(effects, "r") else world.wait(0.5)
    assert world.now == came + 20


# ---------------------------------------------------------------- what is tried next


def three(**config: Any) -> tuple[World, list[AgentId]]:
    world = World(**config)
    return world, [world.backend(name, "m", loaded=("m",), slots=9) for name in ("one", "two", "three")]


@pytest.mark.parametrize("failure", [Failure.REFUSED, Failure.NOT_TAKEN])
def test_what_cost_nothing_is_tried_on_every_node_once(failure: Failure) -> None:
    world = World()
    nodes = [world.backend(str(number), "m", loaded=("m",), slots=9) for number in range(6)]
    seen = [node_of(world.ask("r"), "r")]
    for _ in range(5):
        seen.append(node_of(world.fail("r", failure), "r"))
    assert sorted(map(str, seen)) == sorted(nodes)
    effects = world.fail("r", failure)
    if failure is Failure.NOT_TAKEN:  # the last one had not even taken it: once more
        assert node_of(effects, "r") == seen[-1]
        effects = world.fail("r", failure)
    refuse = answer(effects, "r")
    assert isinstance(refuse, Refuse)
    assert refuse.status == 502


@pytest.mark.parametrize("failure", [Failure.DIED, Failure.EMPTY, Failure.BLANK, Failure.GARBLED, Failure.VANISHED, Failure.TIMEOUT])
def test_what_may_have_cost_work_is_budgeted(failure: Failure) -> None:
    world = World(retries_budgeted=2)
    for number in range(6):
        world.backend(str(number), "m", loaded=("m",), slots=9)
    world.ask("r")
    assert isinstance(answer(world.fail("r", failure), "r"), Forward)
    assert isinstance(answer(world.fail("r", failure), "r"), Forward)
    assert isinstance(answer(world.fail("r", failure), "r"), Refuse)


def test_the_last_nodes_own_answer_is_passed_on() -> None:
    world, _ = three()
    world.ask("r")
    world.fail("r", Failure.DIED)
    world.fail("r", Failure.ANSWERED, 500, "model runner has unexpectedly stopped")
    assert answer(world.fail("r", Failure.ANSWERED, 500, "again"), "r") == PassOn(request_id="r")  # type: ignore[arg-type]


@pytest.mark.parametrize(("status", "text"), [(400, "model is required"), (401, ""), (501, "no embeddings"), (500, "invalid format: x")])
def test_what_is_the_requests_own_fault_is_passed_on_at_once(status: int, text: str) -> None:
    world, _ = three()
    world.ask("r")
    assert answer(world.fail("r", Failure.ANSWERED, status, text), "r") == PassOn(request_id="r")  # type: ignore[arg-type]


def test_incomplete_answers() -> None:
    world, _ = three()
    world.ask("r")
    assert isinstance(answer(world.fail("r", Failure.INCOMPLETE), "r"), Forward)
    assert isinstance(answer(world.fail("r", Failure.INCOMPLETE, repeat_guard=True), "r"), PassOn)
    alone = World()
    alone.backend("one", "m")
    alone.ask("r")
    assert isinstance(answer(alone.fail("r", Failure.INCOMPLETE), "r"), PassOn)


def test_the_least_busy_of_those_left_is_next_and_a_full_one_is_waited_for() -> None:
    world = World()
    one_id, two = world.backend("one", "m", loaded=("m",)), world.backend("two", "m", loaded=("m",))
    world.ask("r1")
    world.ask("r2")
    effects = world.fail("r1", Failure.DIED)
    assert isinstance(answer(effects, "r1"), Wait)
    assert node_of(world.ask("r3"), "r3") == one_id, "the failed node is free for others"
    assert node_of(world.settle("r2"), "r1") == two


def test_one_who_comes_back_stands_first() -> None:
    world = World()
    world.backend("one", "m", loaded=("m",))
    two = world.backend("two", "m", loaded=("m",))
    for number in range(1, 5):
        world.ask(f"r{number}")
    assert [view.request_id for view in world.router.waiting()] == ["r3", "r4"]
    world.fail("r1", Failure.DIED)
    assert [view.request_id for view in world.router.waiting()] == ["r1", "r4"], "r3 has its place on the node"
    assert node_of(world.settle("r2"), "r1") == two


# ---------------------------------------------------------------- busy nodes


def test_a_busy_node_is_passed_over_and_used_again_after_its_pause() -> None:
    world = World(strategy="round-robin", busy_pause_s=1)
    busy, good = world.backend("busy", "m", slots=9), world.backend("good", "m", slots=9)
    world.ask("r0")
    assert node_of(world.busy("r0"), "r0") == good
    for number in range(1, 5):
        assert node_of(world.ask(f"r{number}"), f"r{number}") == good
    assert world.router.agent(busy).ejections == []  # type: ignore[union-attr]
    world.wait(1)
    assert node_of(world.ask("later"), "later") == busy


def test_when_every_holder_is_busy_the_request_waits_for_the_pauses() -> None:
    world, nodes = three(busy_pause_s=1, busy_pause_max_s=2)
    world.ask("r")
    world.busy("r")
    world.busy("r")
    effects = world.busy("r")
    waits = answer(effects, "r")
    assert isinstance(waits, Wait)
    assert waits.why == "waits for a node that is not too busy"
    assert node_of(world.wait(1), "r") in nodes
    for _ in range(2):
        world.busy("r")
    assert isinstance(answer(world.busy("r"), "r"), Wait)
    assert node_of(world.wait(1), "r") is None, "the pause doubled"
    assert node_of(world.wait(1), "r") in nodes


def test_at_its_deadline_it_gets_the_nodes_own_503() -> None:
    world = World(queue_timeout_s=3, busy_pause_s=1)
    world.backend("one", "m")
    world.ask("r")
    effects = world.busy("r")
    for _ in range(8):
        if isinstance(answer(effects, "r"), PassOn):
            break
        effects = world.wait(0.5)
        if node_of(effects, "r"):
            effects = world.busy("r")
    assert answer(effects, "r") == PassOn(request_id="r", retry_after_s=8)  # type: ignore[arg-type]


def test_a_first_byte_ends_the_pause_for_those_who_wait() -> None:
    world = World(busy_pause_s=8)
    node = world.backend("one", "m", slots=2)
    world.ask("r1")
    world.ask("r2")
    assert isinstance(answer(world.busy("r2"), "r2"), Wait)
    assert node_of(world.first("r1"), "r2") == node


# ---------------------------------------------------------------- sick nodes


def test_a_model_that_keeps_failing_on_a_node_is_passed_over_and_tried_by_one() -> None:
    world = World(strategy="round-robin", eject_after=2, agent_timeout_s=1000)
    sick, good = world.backend("sick", "m", "n", slots=9), world.backend("good", "m", "n", slots=9)
    for number in range(4):
        effects = world.ask(f"r{number}")
        if node_of(effects, f"r{number}") == sick:
            world.fail(f"r{number}", Failure.DIED)
        world.settle(f"r{number}")
    (ejection,) = world.router.agent(sick).ejections  # type: ignore[union-attr]
    assert (ejection.model, ejection.until_s, ejection.why) == ("m:latest", 30, "died")
    assert [node_of(world.ask(f"s{number}"), f"s{number}") for number in range(3)] == [good] * 3
    assert sick in [node_of(world.ask(f"n{number}", "n"), f"n{number}") for number in range(2)]
    world.wait(30)
    nodes = [node_of(world.ask(f"t{number}"), f"t{number}") for number in range(4)]
    assert nodes.count(sick) == 1, "one request tries"
    world.first(f"t{nodes.index(sick)}")
    assert world.router.agent(sick).ejections == []  # type: ignore[union-attr]


def test_when_every_holder_is_out_the_least_bad_one_is_used() -> None:
    world = World(eject_after=1, retries_budgeted=9)
    nodes = [world.backend(name, "m", slots=9) for name in ("one", "two")]
    world.ask("r1")
    world.fail("r1", Failure.DIED)
    world.fail("r1", Failure.DIED)
    world.settle("r1", Ending.ERROR)
    assert all(world.router.agent(node).ejections for node in nodes)  # type: ignore[union-attr]
    assert node_of(world.ask("r2"), "r2") in nodes


def test_refusals_take_a_whole_agent_out() -> None:
    world = World(eject_after=2, strategy="round-robin")
    gone = world.agent_with("gone", "m", "n")
    good = world.backend("good", "m", "n", slots=9)
    for number, model in enumerate(("m", "n", "m", "n")):
        if node_of(world.ask(f"r{number}", model), f"r{number}") == gone:
            world.fail(f"r{number}", Failure.REFUSED)
    (ejection,) = world.router.agent(gone).ejections  # type: ignore[union-attr]
    assert ejection.model is None
    assert [node_of(world.ask(f"s{number}"), f"s{number}") for number in range(3)] == [good] * 3


# ---------------------------------------------------------------- nobody there


def test_a_model_that_nobody_ever_listed_is_unknown() -> None:
    world, _ = three()
    refuse = answer(world.ask("r", "nosuch"), "r")
    assert isinstance(refuse, Refuse)
    assert (refuse.status, refuse.text) == (404, "model 'nosuch' not found")


def test_sleeping_holders_are_named() -> None:
    world = World()
    for number in range(7):
        world.silent(world.backend(f"n{number}", "m"))
    world.backend("awake", "other")
    refuse = answer(world.ask("r"), "r")
    assert isinstance(refuse, Refuse)
    assert (refuse.status, refuse.retry_after_s) == (503, 8)
    assert "n0, n1, n2, n3, n4 and 2 more" in refuse.text


def test_a_holder_that_starts_is_waited_for() -> None:
    world = World()
    world.agent_with("one", "m")
    world.beat("one", ollama_ok=False, sequence=2)
    effects = world.ask("r")
    waits = answer(effects, "r")
    assert isinstance(waits, Wait)
    assert waits.why == "waits for one, which is starting"
    assert node_of(world.beat("one", sequence=3), "r") == "one"


def test_those_who_wait_for_a_node_that_vanishes_move_on() -> None:
    world = World()
    node = world.backend("one", "m")
    world.ask("r1")
    world.ask("r2")
    refuse = answer(world.silent(node), "r2")
    assert isinstance(refuse, Refuse)
    assert "one" in refuse.text


def test_after_a_start_known_nodes_are_waited_for() -> None:
    world = World(startup_grace_s=15)
    late = world.late_backend("late")
    assert isinstance(answer(world.ask("r1"), "r1"), Wait)
    assert isinstance(answer(world.ask("r2", None), "r2"), Wait)
    forwards: list[Forward] = []
    world.watch = lambda effects: forwards.extend(of(effects, Forward))
    world.poll(late, installed=[row("m")], loaded=[])
    assert sorted(forward.request_id for forward in forwards) == ["r1", "r2"]
    refuse = answer(world.ask("r3", "nosuch"), "r3")
    assert isinstance(refuse, Refuse), "everybody was heard"


def test_but_not_for_ever() -> None:
    world = World(startup_grace_s=15)
    world.late_backend("late")
    world.ask("r1")
    world.ask("r2", None)
    effects = world.wait(14.9)
    assert of(effects, Refuse) == []
    effects = world.wait(0.1)
    assert [(refuse.request_id, refuse.status) for refuse in of(effects, Refuse)] == [("r1", 404), ("r2", 400)]


def test_a_body_whose_model_cannot_be_read_goes_to_any_ready_node() -> None:
    world, nodes = three()
    for number, model in enumerate((None, "", "not a name!")):
        assert node_of(world.ask(f"r{number}", model), f"r{number}") in nodes
    empty = World()
    refuse = answer(empty.ask("r", None, route=Route.GENERATE), "r")
    assert isinstance(refuse, Refuse)
    assert (refuse.status, refuse.text) == (404, "model '' not found")


def test_nodes_that_an_edge_tried_already_are_left_out() -> None:
    world, nodes = three()
    assert node_of(world.ask("r", excluded=tuple(nodes[:2])), "r") == nodes[2]
    refuse = answer(world.ask("none", excluded=tuple(nodes)), "none")
    assert isinstance(refuse, Refuse)
    assert refuse.status == 502


# ---------------------------------------------------------------- loads and unloads


def test_a_load_whose_first_request_leaves_starts_again_for_the_next_one() -> None:
    world = World()
    node = world.backend("one", "m", slots=2)
    world.ask("r1")
    world.ask("r2")
    loading = world.router._registry.get(node).inventory.loading  # type: ignore[union-attr]
    since = loading[M].since
    world.wait(2)
    world.settle("r1", Ending.CANCELLED)
    assert loading[M].since == since + 2
    world.settle("r2", Ending.CANCELLED)
    assert loading == {}


def test_an_unload_goes_where_the_model_is_and_makes_it_cold() -> None:
    world = World()
    world.backend("cold", "m")
    warm = world.backend("warm", "m", loaded=("m",))
    world.ask("busy")
    assert node_of(world.ask("unload", load_only=True, unload=True), "unload") == warm, "it waits for nobody"
    world.first("unload")
    world.settle("unload")
    inventory = world.router._registry.get(warm).inventory  # type: ignore[union-attr]
    assert M not in inventory.resident
    nowhere = World()
    node = nowhere.backend("cold", "m")
    assert node_of(nowhere.ask("unload", load_only=True, unload=True), "unload") == node


# ---------------------------------------------------------------- why


def test_decisions_are_explained() -> None:
    world = World()
    world.backend("warm", "m", loaded=("m",))
    world.backend("cold", "m")
    world.silent(world.backend("gone", "m"))
    world.ask("r")
    world.fail("r", Failure.DIED)
    why = world.router.why("r")  # type: ignore[arg-type]
    assert why is not None
    assert (why.model, why.strategy) == ("m", "auto")
    first, second = why.decisions
    assert [(candidate.name, candidate.chosen) for candidate in first.candidates] == [("warm", True), ("cold", False)]
    assert first.candidates[0].parts.keys() == {"work", "ahead", "cold", "displaced"}
    assert first.out == {"gone": "is offline: refuses connections"}
    assert [candidate.name for candidate in second.candidates] == ["cold"]
    assert second.out["warm"] == "was tried for this request"
    assert world.router.why("nobody") is None  # type: ignore[arg-type]


def test_reasons_for_passing_over_are_told() -> None:
    world = World(eject_after=1, strategy="round-robin", retries_budgeted=9)
    for name in ("busy", "sick", "good"):
        world.backend(name, "m", slots=9)
    world.ask("r1")
    world.busy("r1")
    world.fail("r1", Failure.DIED)
    world.ask("r2")
    why = world.router.why("r2")  # type: ignore[arg-type]
    assert why is not None
    assert why.decisions[0].out == {"busy": "said that it is busy", "sick": "is passed over: died"}
    world.serve("r1")
    world.wait(31)
    for number in range(6):
        world.ask(f"s{number}")
        world.serve(f"s{number}")
    world.ask("clean")
    assert world.router.why("clean").decisions[0].out == {}  # type: ignore[union-attr, arg-type]


def test_explanations_are_bounded() -> None:
    world = World(explain_ring=3, strategy="round-robin", busy_pause_s=0.125, busy_pause_max_s=0.125)
    for number in range(12):
        world.backend(f"n{number}", "m", slots=99)
    for number in range(5):
        world.ask(f"r{number}")
    assert [world.router.why(f"r{number}") is not None for number in range(5)] == [False, False, True, True, True]  # type: ignore[arg-type]
    for _ in range(30):
        if world.router.waiting():
            world.wait(0.125)
        else:
            world.busy("r4")
    why = world.router.why("r4")  # type: ignore[arg-type]
    assert why is not None
    assert len(why.decisions) == 16
    assert len(why.decisions[0].candidates) == 8


def test_an_agent_that_drains_is_out_when_its_last_request_ends() -> None:
    world = World()
    world.register(registration("box"), agent_id="box")
    world.beat("box", installed_models=[row("m")])
    world.ask("r")
    world.beat("box", draining=True)
    assert world.state(AgentId("box")) == "draining"
    world.settle("r")
    assert world.state(AgentId("box")) == "held"


def test_who_waits_for_a_load_goes_as_soon_as_somebody_else_has_the_model_loaded() -> None:
    world = World()
    world.backend("node", "m", "other", slots=4)
    one(world.ask("first", "other"), Forward)
    assert "loading another model" in one(world.ask("second"), Wait).why
    sent = [effect.request_id for effect in of(world.ask("load", load_only=True), Forward)]
    assert sent == ["load", "second"]
