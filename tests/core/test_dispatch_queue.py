"""The queue as the dispatcher uses it: its order, its limits, and who goes when those who wait are looked at."""

import pytest

from core.dispatch import BURST_S
from core.events import Count, Ending, Failure, Forward, PassOn, Refuse, Wait
from core.requests import BUSY_TEXT
from core.units import AgentId
from tests.core.routing import Fleet, World, answer, node_of, of, one

# ---------------------------------------------------------------- its order


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


@pytest.mark.parametrize("much", [10, 40])
def test_a_client_with_much_does_not_starve_one_with_little(much: int) -> None:
    fleet = Fleet(queue_max=100, queue_per_client=100)
    fleet.warm("only")
    for number in range(much):
        fleet.ask(f"a{number}", client="a")
    fleet.ask("b0", client="b")
    why = fleet.router.why("a1")  # type: ignore[arg-type]
    assert why is not None
    work_us = why.decisions[0].candidates[0].parts["work"]
    fleet.run()
    before = [request_id for request_id, _, _ in fleet.started].index("b0") - 1  # the first one of all was served at once
    assert before == 1 + int(BURST_S * 1e6 / work_us), "one request, and as many as its burst holds, however much it has waiting"


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


# ---------------------------------------------------------------- its limits


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


# ---------------------------------------------------------------- who goes when they are looked at


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


def test_who_waits_for_a_load_goes_as_soon_as_somebody_else_has_the_model_loaded() -> None:
    world = World()
    world.backend("node", "m", "other", slots=4)
    one(world.ask("first", "other"), Forward)
    assert "loading another model" in one(world.ask("second"), Wait).why
    sent = [effect.request_id for effect in of(world.ask("load", load_only=True), Forward)]
    assert sent == ["load", "second"]


def test_those_who_wait_for_a_load_begin_it_in_the_order_in_which_they_came() -> None:
    world = World(busy_pause_s=1)
    world.backend("one", "m", "other", slots=2)
    world.ask("busy")
    world.busy("busy")
    world.settle("busy", Ending.CANCELLED)
    for number in range(4):
        world.ask(f"r{number}")
    world.ask("preload", client="another", load_only=True)
    world.ask("preload too", client="another", load_only=True)
    world.ask("loads", "other")
    went = [forward.request_id for forward in of(world.wait(1), Forward)]
    assert went == ["preload", "r0", "preload too"], "the preload makes the node load their model too: the first of them goes with it"
