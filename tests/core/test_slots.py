"""Learned slots: probes where nothing was told, strikes where what was told does not hold, and what the router makes of it."""

import pytest

from core import slots
from core.agents import Agent
from core.events import BackendAdded, Ending, Forward, Route, Upstream, Usage, Wait
from core.leases import Held
from core.lifecycle import AgentState
from core.names import normalise
from core.slots import LEARNED_MAX, PAUSE_MAX_S, PAUSE_S, STRIKES, waited_s
from core.units import AgentId, Instant, LeaseId, RequestId, UnixMs
from tests.core.routing import World, answer, node_of, row, usage

M = normalise("m")
AT = Instant(1000.0)


def agent(told: int | None = None) -> Agent:
    made = Agent(AgentId("a"), Upstream(host="h", port=1), state=AgentState.READY, now_unix=UnixMs(0))
    if told is not None:
        made.told_slots(told)
    return made


def waited(seconds: float, *, total_s: float = 2.0) -> Usage:
    """The final chunk of a request that waited so long for a slot."""
    eval_s = total_s - seconds
    return Usage(output_tokens=5, total_ns=round(total_s * 1e9), eval_ns=round(eval_s * 1e9))


def probe_answers(one: Agent, beside: int, *, ended: int = 0, now: Instant) -> bool:
    """The last of so many begins to answer, when some of those before it have ended."""
    live = [Held(LeaseId(str(n)), RequestId(str(n)), one.id, M) for n in range(ended, beside)]
    other = Held(LeaseId("x"), RequestId("x"), one.id, normalise("other"))
    return slots.answered(one, M, RequestId(str(beside - 1)), beside, [other, *live], now=now)


AT_ONCE = waited(0.01)


def test_the_wait_for_a_slot_is_what_no_figure_explains() -> None:
    assert waited_s(Usage(total_ns=10_000_000_000, load_ns=1_000_000_000, prompt_ns=2_000_000_000, eval_ns=4_000_000_000)) == 3.0
    assert waited_s(Usage(total_ns=10, load_ns=10, eval_ns=5)) == 0.0
    assert waited_s(Usage(prompt_tokens=5, output_tokens=5)) is None, "OpenAI's routes tell no times"
    assert waited_s(None) is None


def test_what_is_not_known_is_tried_one_at_a_time_and_only_when_the_limit_is_reached() -> None:
    one = agent()
    assert one.slots_for(M) == 1
    for more in range(2, LEARNED_MAX + 1):
        slots.sent(one, M, more - 1, now=AT)
        assert M in one.probes
        slots.sent(one, M, more, now=AT)
        assert M not in one.probes, "one at a time"
        assert probe_answers(one, more, now=AT)
        assert one.slots_for(M) == more
    slots.sent(one, M, LEARNED_MAX, now=AT)
    assert M not in one.probes


def test_nothing_is_proven_where_one_before_it_had_ended() -> None:
    one = agent()
    slots.sent(one, M, 1, now=AT)
    slots.sent(one, M, 2, now=AT)
    assert not probe_answers(one, 2, ended=1, now=AT)
    assert one.slots_for(M) == 1


def test_a_probe_that_waited_is_followed_by_a_pause_that_grows() -> None:
    one = agent()
    now, pause_s = AT, PAUSE_S
    for _ in range(12):
        slots.sent(one, M, 1, now=now)
        assert M in one.probes
        slots.sent(one, M, 2, now=now)
        assert not slots.ended(one, M, 2, waited(1.0), now=now)
        pause_s = min(pause_s * 2, PAUSE_MAX_S)
        slots.sent(one, M, 1, now=Instant(now + pause_s - 0.1))
        assert M not in one.probes
        now = Instant(now + pause_s)
    assert pause_s == PAUSE_MAX_S
    assert one.slots_for(M) == 1


def test_what_was_told_is_never_gone_beyond() -> None:
    told = agent(2)
    for beside in (1, 2):
        slots.sent(told, M, beside, now=AT)
    assert not told.probes
    assert not probe_answers(told, 3, now=AT)


def test_a_family_that_is_forced_to_one_slot_comes_out() -> None:
    told = agent(4)
    assert not slots.ended(told, M, 2, waited(1.0), now=AT)
    assert told.slots_for(M) == 4, "once may be chance"
    assert slots.ended(told, M, 3, waited(1.5), now=AT)
    assert told.slots_for(M) == 1
    assert told.slots_for(normalise("other")) == 4
    slots.sent(told, M, 1, now=AT)
    assert M not in told.probes
    slots.sent(told, M, 1, now=Instant(AT + PAUSE_S))
    assert M in told.probes, "what was learned may be wrong, and is tried again"
    assert probe_answers(told, 2, now=Instant(AT + PAUSE_S))
    assert told.slots_for(M) == 2


def test_two_of_four_slots_are_found_too() -> None:
    told = agent(4)
    slots.ended(told, M, 4, waited(1.0), now=AT)
    slots.ended(told, M, 3, waited(1.0), now=AT)
    assert told.slots_for(M) == 2
    slots.sent(told, M, 2, now=Instant(AT + PAUSE_S))
    slots.sent(told, M, 3, now=Instant(AT + PAUSE_S))
    assert probe_answers(told, 4, now=AT), "more than one beyond the limit were there already"
    assert told.slots_for(M) == 4
    assert M not in told.probes


def test_one_that_did_not_wait_clears_the_strikes() -> None:
    told = agent(4)
    for _ in range(5 * STRIKES):
        slots.ended(told, M, 2, waited(1.0), now=AT)
        slots.ended(told, M, 2, AT_ONCE, now=AT)
    assert told.slots_for(M) == 4


@pytest.mark.parametrize(
    ("beside", "told_by", "beyond"),
    [(1, waited(1.0), 0), (2, None, 0), (2, Usage(output_tokens=9), 0), (2, waited(1.0), 1), (2, waited(0.3, total_s=60.0), 0)],
    ids=["nothing beside it", "nothing told", "no times", "others use the node", "templating of a long one"],
)
def test_what_tells_nothing_changes_nothing(beside: int, told_by: Usage | None, beyond: int) -> None:
    told = agent(4)
    told.beyond = beyond
    for _ in range(10):
        assert not slots.ended(told, M, beside, told_by, now=AT)
    assert told.slots_for(M) == 4


def test_an_answer_without_times_leaves_what_was_learned() -> None:
    told = agent(4)
    slots.ended(told, M, 2, waited(1.0), now=AT)
    assert not slots.ended(told, M, 2, Usage(output_tokens=9), now=AT)
    assert told.learned[M].strikes == 1


def test_below_what_was_told_nothing_is_tried_where_nothing_was_learned() -> None:
    told = agent(4)
    told.limits[M] = 2
    slots.sent(told, M, 2, now=AT)
    assert (told.learned, told.probes) == ({}, {})


def test_another_number_of_slots_makes_it_forget() -> None:
    told = agent(4)
    for _ in range(STRIKES):
        slots.ended(told, M, 2, waited(1.0), now=AT)
    told.told_slots(4)
    assert told.slots_for(M) == 1
    told.told_slots(8)
    assert told.slots_for(M) == 8


# ---------------------------------------------------------------- in the router


def unknown(world: World, name: str = "one") -> AgentId:
    """A node without an agent, of which nobody said how many slots it has."""
    agent_id = AgentId(name)
    world.do(BackendAdded(agent_id=agent_id, name=name, upstream=Upstream(host="127.0.0.1", port=9), now_unix=UnixMs(1)))
    world.poll(agent_id, installed=[row("m")], loaded=[row("m")])
    return agent_id


def test_streams_side_by_side_raise_the_limit_without_waiting_for_their_ends() -> None:
    world = World()
    agent_id = unknown(world)
    for number in range(4):
        world.ask(f"r{number}")
        assert node_of(world.first(f"r{number}"), "-") is None
    view = world.router.agent(agent_id)
    assert view is not None
    assert (view.slots, view.slots_learned, view.model_slots) == (1, True, {"m:latest": 4})


def test_a_probe_that_is_not_answered_is_the_only_one_that_waits_at_the_node() -> None:
    world = World()
    unknown(world)
    world.ask("r0")
    world.first("r0")
    assert isinstance(answer(world.ask("probe"), "probe"), Forward)
    assert isinstance(answer(world.ask("r2"), "r2"), Wait)
    (waiting,) = world.router.waiting()
    assert (waiting.node, waiting.slots, waiting.slots_learned) == ("one", 1, True)
    world.settle("r0", usage=usage())
    world.first("probe")  # the one before it had ended: nothing is proven
    view = world.router.agent(AgentId("one"))
    assert view is not None
    assert view.model_slots == {}


def test_other_models_beside_it_prove_nothing() -> None:
    world = World()
    agent_id = world.backend("told", "m", "n", loaded=("m", "n"), slots=4)
    for number in range(STRIKES):
        world.ask(f"n{number}", "n")
        world.ask(f"a{number}")
        world.ask(f"b{number}")
        world.first(f"b{number}")
        for name in ("n", "a", "b"):
            world.settle(f"{name}{number}", usage=waited(1.0) if name == "b" else usage())
    view = world.router.agent(agent_id)
    assert view is not None
    assert (view.slots, view.slots_learned, view.model_slots) == (4, False, {"m:latest": 1})
    world.ask("x")
    world.ask("y")
    assert isinstance(answer(world.ask("z"), "z"), Wait), "the limit holds"


def test_a_show_and_a_preload_count_for_nothing() -> None:
    world = World()
    unknown(world)
    world.ask("show", route=Route.SHOW)
    world.ask("load", load_only=True)
    world.settle("load")
    world.ask("r")
    world.first("r")
    world.settle("r", Ending.SUCCESS, usage=waited(1.0))
    view = world.router.agent(AgentId("one"))
    assert view is not None
    assert view.model_slots == {}


def test_scale_out_does_not_wait_for_the_learning() -> None:
    """A warm node of unknown slots and a cold one: whoever would be served sooner by loading goes there."""
    world = World()
    unknown(world)
    cold = world.backend("cold", "m")
    found = [node_of(world.ask(f"r{number}"), f"r{number}") for number in range(40)]
    assert cold in found
