"""What is tried after a failure, and which nodes are passed over: those that were tried, are busy, or are sick."""

import pytest

from core.events import Cut, Ending, Failure, Forward, PassOn, Refuse, Wait
from tests.core.routing import World, answer, node_of, of, one, three

# ---------------------------------------------------------------- what is tried next


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


def test_a_busy_node_comes_back_into_view_when_the_other_one_is_gone() -> None:
    world = World(busy_pause_s=1)
    one_id, two = world.backend("one", "m", loaded=("m",)), world.backend("two", "m", loaded=("m",))
    world.ask("r1")
    world.ask("r2")
    assert isinstance(answer(world.busy("r1"), "r1"), Wait)
    world.silent(two)
    assert world.router.waiting()[0].why == "waits for a node that is not too busy"
    assert node_of(world.wait(1), "r1") == one_id


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


def test_a_model_that_is_being_unloaded_gets_nobody_and_the_others_of_its_node_go_on() -> None:
    world = World()
    node = world.backend("one", "m", "other", loaded=("m", "other"), slots=2)
    world.router._leaks.silence_s = 1.0
    world.ask("left")
    world.serve("left", ending=Ending.CANCELLED)
    world.ask("hangs")
    assert one(world.wait(9.0), Cut).unload == ("m:latest",)
    effects = world.ask("r")
    assert isinstance(answer(effects, "r"), Wait), "it would be cut with the runner, or keep it alive"
    assert node_of(world.ask("elsewhere", "other"), "elsewhere") == node
    went: list[Forward] = []
    world.watch = lambda effects: went.extend(of(effects, Forward))
    other = world.backend("two", "m", loaded=("m",))
    assert [(forward.request_id, forward.lease.agent_id) for forward in went] == [("r", other)]
