"""What the end of an attempt means for its node: lists asked anew, ejections, leaked slots, what was learned."""

from core.events import (
    Command,
    Count,
    Cut,
    Effect,
    Ending,
    Failure,
    Note,
    PassOn,
    Probe,
    Record,
    Refuse,
    Route,
)
from core.names import normalise
from tests.core.routing import World, answer, node_of, of, one, registration, row, usage

M = normalise("m")


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
    assert world.inventory(node).resident == {}


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


def test_what_was_unloaded_is_cold() -> None:
    world = World()
    node = world.backend("one", "m", loaded=("m",))
    world.ask("unload", load_only=True, unload=True)
    world.serve("unload")
    assert M not in world.inventory(node).resident
    effects = world.ask("again")
    assert of(effects, Count) == [Count(name="loads_total", labels={"agent": "one"})]


def test_a_model_gone_from_one_node_is_found_on_another() -> None:
    world = World()
    gone = world.agent_with("gone", "m")
    good = world.backend("good", "m")
    first = node_of(world.ask("r"), "r")
    effects = world.fail("r", Failure.ANSWERED, 404, "model 'm' not found")
    assert {first, node_of(effects, "r")} == {gone, good}
