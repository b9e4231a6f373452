"""Leaked slots: who is suspected, who never is, and what becomes of the request that hung."""

from typing import Any

import pytest

from core.events import Count, Cut, Ending, Failure, Forward, Note, Refuse, Route, Wait
from core.leaks import LEAKS_MAX, SILENCE_S
from core.units import AgentId
from tests.core.routing import World, answer, node_of, of, one, row, usage

LIMIT_S = SILENCE_S + 1.0
"""With these short prompts."""


class Fleet(World):
    """Nodes that stay heard, and requests that stay alive, while time passes."""

    def node(self, name: str, *, slots: int = 1) -> AgentId:
        return self.backend(name, "m", "other", loaded=("m",), slots=slots)

    def pass_s(self, seconds: float) -> list[Any]:
        """Time passes; shells and nodes say that they live."""
        effects: list[Any] = []
        for _ in range(round(seconds)):
            effects += self.wait(1.0)
            effects += self.pulse(*list(self.router._requests), heard=tuple(view.id for view in self.router.agents()))
        return effects

    def close_one(self, request_id: str = "left", **fields: Any) -> None:
        """A client leaves a stream in mid-answer."""
        self.ask(request_id, **fields)
        self.first(request_id)
        self.settle(request_id, Ending.CANCELLED)

    @property
    def flagged(self) -> bool:
        return bool(self.router._leaks.flagged)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_a_silent_stream_is_taken_off_a_runner_that_may_have_leaked(fleet: Fleet) -> None:
    fleet.node("one")
    fleet.close_one()
    fleet.ask("hangs")
    assert of(fleet.pass_s(SILENCE_S), Cut) == []
    effects = fleet.pass_s(2.0)
    cut = one(effects, Cut)
    assert (cut.request_id, cut.unload) == ("hangs", ("m:latest",))
    assert Count(name="slot_leaks_total", labels={"agent": "one"}) in effects
    assert any(note.event == "leaked slot suspected" for note in of(effects, Note))


def test_nobody_else_is_sent_there_until_it_is_unloaded_and_then_it_is_loaded_anew(fleet: Fleet) -> None:
    fleet.node("one", slots=2)
    fleet.close_one()
    fleet.ask("hangs")
    fleet.pass_s(LIMIT_S)
    assert isinstance(answer(fleet.ask("other"), "other"), Wait)
    assert isinstance(answer(fleet.ask("unreadable", None), "unreadable"), Forward), "it names no model"
    effects = fleet.fail("hangs", Failure.VANISHED)
    assert (node_of(effects, "hangs"), node_of(effects, "other")) == ("id of one", "id of one")
    assert Count(name="loads_total", labels={"agent": "one"}) in effects, "its runner is another one"
    fleet.first("hangs")
    fleet.settle("hangs", usage=usage(load_s=2.0))
    assert not fleet.flagged


def test_it_is_tried_elsewhere_where_somebody_else_has_the_model(fleet: Fleet) -> None:
    fleet.node("one")
    fleet.close_one()
    fleet.ask("hangs")
    fleet.node("two")
    cut = one(fleet.pass_s(LIMIT_S), Cut)
    assert cut.unload == ("m:latest",)
    assert node_of(fleet.fail("hangs", Failure.VANISHED), "hangs") == "id of two"
    assert node_of(fleet.ask("next"), "next") != "id of two" or fleet.router.waiting()


@pytest.mark.parametrize(
    "fields",
    [{"constrained": True}, {"stream": False}, {"load_only": True}, {"route": Route.SHOW}],
    ids=["tools or a format", "not streamed", "only loads", "runs no model"],
)
def test_whoever_may_be_silent_is_never_suspected(fleet: Fleet, fields: dict[str, Any]) -> None:
    fleet.node("one")
    fleet.close_one()
    fleet.ask("silent", **fields)
    assert of(fleet.pass_s(600.0), Cut) == []


def test_without_a_stream_that_was_closed_in_mid_answer_nobody_is_suspected(fleet: Fleet) -> None:
    fleet.node("one")
    fleet.ask("served")
    fleet.serve("served", usage=usage())
    fleet.ask("cancelled before its first byte")
    fleet.settle("cancelled before its first byte", Ending.CANCELLED)
    fleet.ask("not streamed", stream=False)
    fleet.first("not streamed")
    fleet.settle("not streamed", Ending.CANCELLED)
    fleet.ask("asked only", route=Route.SHOW)
    fleet.first("asked only")
    fleet.settle("asked only", Ending.CANCELLED)
    assert not fleet.flagged
    fleet.ask("silent")
    assert of(fleet.pass_s(600.0), Cut) == []


def test_while_something_else_of_ours_runs_there_nobody_is_suspected(fleet: Fleet) -> None:
    fleet.node("one", slots=2)
    fleet.close_one()
    fleet.ask("runs", "other")
    fleet.first("runs")
    fleet.ask("silent")
    assert of(fleet.pass_s(100.0), Cut) == []
    fleet.settle("runs", usage=usage())
    assert of(fleet.pass_s(SILENCE_S - 1), Cut) == [], "the other one had the machine"
    assert one(fleet.pass_s(60.0), Cut).request_id == "silent"


def test_while_it_works_for_others_nobody_is_suspected(fleet: Fleet) -> None:
    agent_id = fleet.node("one")
    fleet.close_one()
    fleet.ask("silent")
    agent = fleet.router._registry.get(agent_id)
    assert agent is not None
    agent.beyond = 1
    assert of(fleet.pass_s(100.0), Cut) == []
    agent.beyond = 0
    assert of(fleet.pass_s(100.0), Cut) != []


def test_a_load_may_take_as_long_as_it_likes(fleet: Fleet) -> None:
    agent_id = fleet.node("one")
    fleet.close_one()
    fleet.ask("silent")
    fleet.poll(agent_id, loaded=[], asked_at=fleet.now + 1)
    assert of(fleet.pass_s(200.0), Cut) == []


def test_one_that_hangs_since_another_left_is_suspected_too(fleet: Fleet) -> None:
    fleet.node("one", slots=2)
    fleet.ask("left")
    fleet.first("left")
    fleet.ask("hangs")
    fleet.pass_s(5.0)
    fleet.settle("left", Ending.CANCELLED)
    assert of(fleet.pass_s(SILENCE_S - 1), Cut) == []
    assert one(fleet.pass_s(3.0), Cut).request_id == "hangs"


def test_all_that_hang_on_one_runner_are_taken_off_and_one_of_them_unloads_it(fleet: Fleet) -> None:
    fleet.node("one", slots=2)
    fleet.close_one()
    fleet.ask("a")
    fleet.ask("b")
    cuts = of(fleet.pass_s(2 * LIMIT_S), Cut)
    assert [(cut.request_id, cut.unload) for cut in cuts] == [("a", ("m:latest",)), ("b", ())]
    assert isinstance(answer(fleet.fail("b", Failure.VANISHED), "b"), Wait), "the unload is under way"
    effects = fleet.fail("a", Failure.VANISHED)
    assert (node_of(effects, "a"), node_of(effects, "b")) == ("id of one", "id of one")


def test_the_silence_of_those_who_gave_up_counts_too(fleet: Fleet) -> None:
    fleet.node("one")
    fleet.close_one()
    for number in range(2):
        fleet.ask(f"r{number}")
        assert of(fleet.pass_s(12.0), Cut) == []
        fleet.settle(f"r{number}", Ending.CANCELLED)
        fleet.pass_s(60.0)
    fleet.ask("r2")
    assert one(fleet.pass_s(SILENCE_S - 24.0 + 2.0), Cut).request_id == "r2"


def test_a_byte_from_the_runner_clears_it(fleet: Fleet) -> None:
    fleet.node("one")
    fleet.close_one()
    fleet.ask("slow")
    fleet.pass_s(20.0)
    fleet.first("slow")
    assert of(fleet.pass_s(600.0), Cut) == []
    fleet.settle("slow", usage=usage())
    fleet.ask("next")
    assert of(fleet.pass_s(SILENCE_S - 5), Cut) == []


def test_a_new_runner_is_free_of_suspicion(fleet: Fleet) -> None:
    agent_id = fleet.node("one")
    fleet.close_one()
    fleet.now += 1.0
    fleet.poll(agent_id, loaded=[], asked_at=fleet.now)
    fleet.ask("loads")
    assert not fleet.flagged
    assert of(fleet.pass_s(600.0), Cut) == []


def test_an_unload_that_did_not_help_is_found_out(fleet: Fleet) -> None:
    agent_id = fleet.node("one")
    fleet.close_one()
    fleet.ask("hangs")
    fleet.pass_s(LIMIT_S)
    fleet.fail("hangs", Failure.VANISHED)
    fleet.now += 1.0
    fleet.poll(agent_id, loaded=[row("m")], asked_at=fleet.now)
    assert of(fleet.pass_s(2 * LIMIT_S), Cut) != []
    for _ in range(LEAKS_MAX):
        told = fleet.fail("hangs", Failure.VANISHED)
        if not isinstance(answer(told, "hangs"), Forward):
            break
        fleet.now += 1.0
        fleet.poll(agent_id, loaded=[row("m")], asked_at=fleet.now)
        fleet.pass_s(2 * LIMIT_S)
    assert not isinstance(answer(told, "hangs"), Forward), "it does not go round for ever"


def test_a_client_that_leaves_meanwhile_ends_the_quarantine(fleet: Fleet) -> None:
    fleet.node("one")
    fleet.close_one()
    fleet.ask("hangs")
    fleet.pass_s(LIMIT_S)
    fleet.settle("hangs", Ending.CANCELLED)
    assert isinstance(answer(fleet.ask("next"), "next"), Forward)


def test_other_models_and_nodes_are_not_concerned(fleet: Fleet) -> None:
    fleet.node("one", slots=2)
    two = fleet.backend("two", "third", loaded=("third",))
    fleet.close_one()
    fleet.ask("elsewhere", "third")
    fleet.ask("other", "other")
    assert of(fleet.pass_s(300.0), Cut) == []
    fleet.first("elsewhere")
    fleet.settle("elsewhere", usage=usage())
    fleet.settle("other", usage=usage())
    assert fleet.router._leaks.flagged.keys() == {"id of one"}
    assert two not in fleet.router._leaks.flagged


def test_an_edge_that_died_in_mid_answer_left_its_stream_too(fleet: Fleet) -> None:
    agent_id = fleet.node("one")
    fleet.ask("r")
    fleet.first("r")
    for _ in range(4):
        fleet.pulse(heard=(agent_id,))
        fleet.wait(10.0)
    assert fleet.flagged
    fleet.router._leaks.forget(agent_id)
    assert not fleet.flagged


def test_who_is_watched_on_a_runner_that_is_gone_is_watched_no_more(fleet: Fleet) -> None:
    agent_id = fleet.node("one", slots=2)
    fleet.close_one()
    fleet.close_one("left too", model="other")
    fleet.ask("silent")
    fleet.now += 1.0
    fleet.poll(agent_id, loaded=[row("other")], asked_at=fleet.now)
    fleet.ask("loads")
    assert list(fleet.router._leaks.flagged[agent_id]) == ["registry.ollama.ai/library/other:latest"]
    assert of(fleet.pass_s(300.0), Cut) == []


def test_an_attempt_that_ends_during_a_quarantine_elsewhere_is_like_any_other(fleet: Fleet) -> None:
    fleet.node("one")
    fleet.backend("two", "third", loaded=("third",))
    fleet.close_one()
    fleet.ask("hangs")
    fleet.pass_s(LIMIT_S)
    fleet.ask("elsewhere", "third")
    refused = answer(fleet.fail("elsewhere", Failure.VANISHED), "elsewhere")
    assert isinstance(refused, Refuse)
    assert refused.status == 503
