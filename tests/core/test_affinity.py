"""Which node knows how a prompt begins; what that is worth, and what it is not."""

import pytest

from core.affinity import HOMES_MAX, Affinity
from core.agents import Agent
from core.events import Forward, Upstream, Usage
from core.lifecycle import AgentState
from core.names import normalise
from core.units import AgentId, Instant, RequestId, UnixMs
from tests.core.routing import World, one

M = normalise("m")
PROMPT = (11, 12, 13)
"""Its first KiB, 2 and 4."""


class Nodes:
    """Two of them, with the model in memory since 10."""

    def __init__(self) -> None:
        self.agents = {
            AgentId(name): Agent(AgentId(name), Upstream(host="h", port=1), state=AgentState.READY, now_unix=UnixMs(0)) for name in "ab"
        }
        for agent in self.agents.values():
            agent.inventory.report_installed([{"name": "m"}])
            agent.inventory.saw_loaded(M, "", now=Instant(10.0))
        self.affinity = Affinity(self.agents.get)

    def known(self, *prefixes: int, tokens: int = 5000) -> dict[AgentId, int]:
        return dict(self.affinity.known(M, prefixes, tokens))


def test_the_longest_beginning_counts_for_each_node() -> None:
    nodes = Nodes()
    nodes.affinity.read(AgentId("a"), M, PROMPT, now=Instant(20.0))
    nodes.affinity.read(AgentId("b"), M, (11, 99), now=Instant(21.0))
    assert nodes.known(*PROMPT, 14) == {"a": 1024, "b": 256}
    assert nodes.known(11, 99) == {"b": 512}
    assert nodes.known(11, tokens=100) == {"b": 99}, "never the whole prompt"
    assert nodes.known(77) == nodes.known() == {}
    assert nodes.affinity.known(normalise("other"), PROMPT, 5000) == {}


def test_it_is_gone_with_the_runner() -> None:
    nodes = Nodes()
    a, b = AgentId("a"), AgentId("b")
    for agent_id in (a, b):
        nodes.affinity.read(agent_id, M, (int(agent_id == b), 5), now=Instant(20.0))
    nodes.agents[a].inventory.saw_unloaded(M, now=Instant(30.0))
    assert nodes.known(0) == {}
    nodes.agents[a].inventory.saw_loaded(M, "", now=Instant(40.0))
    assert nodes.known(0) == {}
    nodes.affinity.read(a, M, (0,), now=Instant(40.0))
    assert nodes.known(0) == {"a": 256}
    del nodes.agents[b]
    assert nodes.known(1) == {}


def test_the_longest_unused_is_forgotten() -> None:
    nodes = Nodes()
    nodes.affinity.read(AgentId("a"), M, PROMPT, now=Instant(20.0))
    nodes.affinity.read(AgentId("a"), M, tuple(range(100, 100 + HOMES_MAX - 3)), now=Instant(20.0))
    nodes.affinity.read(AgentId("a"), M, (11,), now=Instant(20.0))
    nodes.affinity.read(AgentId("a"), M, (1, 2), now=Instant(20.0))
    assert [bool(nodes.known(prefix)) for prefix in PROMPT] == [True, False, False]


def ask(world: World, request_id: str, prefixes: tuple[int, ...] = (), tokens: int = 4000) -> AgentId:
    """Where it goes."""
    return one(world.ask(request_id, input_tokens=tokens, prefixes=prefixes), Forward).lease.agent_id


def talking() -> tuple[World, AgentId, AgentId]:
    """Two equal nodes; where the conversation's last turn was, and the other one."""
    world = World()
    nodes = {world.backend(name, "m", loaded=("m",), slots=4) for name in ("one", "two")}
    home = ask(world, "turn", PROMPT)
    world.serve("turn")
    (other,) = nodes - {home}
    return world, home, other


def test_a_conversation_goes_back_to_its_node() -> None:
    world, home, other = talking()
    assert ask(world, "stranger") == other
    world.serve("stranger")
    assert ask(world, "third") == home
    world.serve("third")
    assert ask(world, "next", (*PROMPT, 14)) == home


def test_it_never_overrides_load() -> None:
    world, home, other = talking()
    went = [ask(world, str(number), PROMPT) for number in range(6)]
    assert went[0] == home
    assert {home: went.count(home), other: went.count(other)} == {home: 3, other: 3}


def test_what_was_known_teaches_no_speed() -> None:
    world, home, _ = talking()
    before = world.router._speeds.rates(home, M, size_bytes=0, slots=4).prefill_ns
    for number in range(5):
        assert ask(world, str(number), PROMPT) == home
        world.serve(str(number), usage=Usage(prompt_tokens=4000, output_tokens=1, total_ns=10**9, prompt_ns=10**6, eval_ns=10**7))
    assert world.router._speeds.rates(home, M, size_bytes=0, slots=4).prefill_ns == before
    where = ask(world, "stranger")
    world.serve("stranger", usage=Usage(prompt_tokens=4000, output_tokens=1, total_ns=3 * 10**9, prompt_ns=3 * 10**9, eval_ns=10**7))
    assert world.router._speeds.rates(where, M, size_bytes=0, slots=4).prefill_ns != before


def full() -> tuple[World, list[AgentId]]:
    """Two nodes whose slots are taken; the conversations 1 and 2 were on the one and the other."""
    world = World(queue_per_client=100)
    for name in ("one", "two"):
        world.backend(name, "m", loaded=("m",), slots=2)
    homes = [ask(world, f"turn{number}", (number, number + 10, number + 20)) for number in (1, 2)]
    for number in (1, 2):
        world.serve(
            f"turn{number}", usage=Usage(prompt_tokens=4000, output_tokens=50, total_ns=10**9, prompt_ns=5 * 10**8, eval_ns=5 * 10**8)
        )
    for number in range(4):
        ask(world, f"busy{number}")
    return world, homes


def waiting_for(world: World) -> dict[str, AgentId | None]:
    return {request_id: world.router._requests[request_id].plan for request_id in world.router._dispatcher.queue.in_order()}


def test_who_waits_waits_for_the_node_that_knows_its_prompt() -> None:
    world, homes = full()
    assert len(set(homes)) == 2
    for number in (1, 2):
        world.ask(f"next{number}", input_tokens=4000, prefixes=(number, number + 10, number + 20))
    assert list(waiting_for(world).values()) == homes
    world.tick()
    assert list(waiting_for(world).values()) == homes
    kinds = world.router._dispatcher._kinds
    assert len(kinds) == 2
    effects = world.settle("busy0")
    assert one(effects, Forward).lease.agent_id in homes
    assert len(kinds) == 1


def test_in_a_large_fleet_who_waits_is_like_everybody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.dispatch.MANY", 1)
    world, _ = full()
    world.ask("next", input_tokens=4000, prefixes=(1,))
    assert world.router._requests[RequestId("next")].cached == {}
