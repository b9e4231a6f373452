"""The placement policy: what is missing where, what may go, the default rule."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import RemoteError
from core.keeping import GB, REST_S, RULES_MAX, Keeper, Policy, Rule, Site, Wish, checked, default_model, sites_for
from core.names import normalise
from core.units import AgentId, Instant, ModelKey

NOW = Instant(100.0)
X, Y = normalise("x"), normalise("y")


def site(name: str, *holds: str, **fields: Any) -> Site:
    return Site(agent_id=AgentId(f"id-{name}"), name=name, holds=[normalise(model) for model in holds], **{"ready": True, **fields})


def wishes(keeper: Keeper, *sites: Site, now: float = NOW, **more: Any) -> list[tuple[str, str, bool]]:
    found = keeper.wishes(sites, **{"busy": (), "sizes": {}, **more}, now=Instant(now))
    return [(wish.agent_id.removeprefix("id-"), wish.model, wish.delete) for wish in found]


def keeper(*rules: Rule, default_rule: bool = False) -> Keeper:
    made = Keeper(default_rule=default_rule)
    made.adopt(Policy(models=rules))
    return made


# ---------------------------------------------------------------- what a policy may say


@pytest.mark.parametrize(
    ("rules", "status", "words"),
    [
        ([Rule(model="a b")], 400, "invalid model name"),
        ([Rule(model="x:cloud")], 400, "cloud"),
        ([Rule(model="x"), Rule(model="X:latest")], 400, "x:latest twice"),
        ([Rule(model="x", count=0)], 400, "count"),
        ([Rule(model="x", nodes=())], 400, "nodes"),
        ([Rule(model="x", nodes=("b", "a")), Rule(model="y", nodes=("c", "b"))], 404, "b, c"),
        ([Rule(model=f"m{number}") for number in range(RULES_MAX + 1)], 400, "entries"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(rules: list[Rule], status: int, words: str) -> None:
    with pytest.raises(RemoteError, match=words) as refused:
        checked(Policy(models=tuple(rules)), [site("a")])
    assert refused.value.status == status


def test_nodes_may_be_named_by_name_or_id() -> None:
    policy = Policy(models=(Rule(model="x", nodes=("a", "id-b")),))
    assert checked(policy, [site("a"), site("b")]) is policy
    assert [found.name for found in sites_for(policy.models[0], [site("a"), site("b"), site("c")])] == ["a", "b"]


def test_a_count_prefers_holders_also_sleeping_ones_then_readiness_and_memory() -> None:
    nodes = [
        site("small", memory_bytes=1),
        site("big", memory_bytes=9),
        site("off", memory_bytes=99, ready=False),
        site("has", "x", ready=False),
    ]
    order = [found.name for found in sites_for(Rule(model="x", count=9), nodes)]
    assert order == ["has", "big", "small", "off"]
    assert [found.name for found in sites_for(Rule(model="x", count=2), nodes)] == ["has", "big"]


def test_a_tag_chooses() -> None:
    assert [found.name for found in sites_for(Rule(model="x", tag="gpu"), [site("a", tags=["gpu"]), site("b")])] == ["a"]


# ---------------------------------------------------------------- downloads


def test_what_is_missing_is_wished_where_it_can_be_done() -> None:
    held = keeper(Rule(model="x"))
    nodes = site("a", "X:latest"), site("b"), site("c", ready=False), site("d", disk_free_bytes=5)
    assert wishes(held, *nodes) == [("b", "x", False), ("d", "x", False)]
    assert wishes(held, *nodes, sizes={X: 6}) == [("b", "x", False)]
    assert wishes(held, *nodes, busy={(AgentId("id-b"), X)}, sizes={X: 6}) == []


def test_a_wish_that_failed_rests() -> None:
    held = keeper(Rule(model="x"))
    held.over(Wish(agent_id=AgentId("id-a"), model="x"), succeeded=False, now=NOW)
    assert wishes(held, site("a")) == []
    assert wishes(held, site("a"), now=NOW + REST_S) == [("a", "x", False)]
    held.over(Wish(agent_id=AgentId("id-a"), model="x"), succeeded=False, now=NOW)
    held.adopt(held.policy)
    assert wishes(held, site("a")) == [("a", "x", False)]


# ---------------------------------------------------------------- deletions


def test_only_what_it_placed_goes_and_only_when_no_rule_wants_it() -> None:
    held = keeper(Rule(model="x"))
    held.over(Wish(agent_id=AgentId("id-a"), model="x"), succeeded=True, now=NOW)
    assert held.wants(X)
    assert wishes(held, site("a", "x"), site("b", "x")) == []
    held.adopt(Policy())
    assert not held.wants(X)
    assert wishes(held, site("a", "x"), site("b", "x")) == [("a", "x:latest", True)]
    assert wishes(held, site("a", "x", ready=False)) == []
    assert wishes(held, site("a"), site("b", "x")) == []
    assert wishes(held) == []
    held.over(Wish(agent_id=AgentId("id-a"), model="x:latest", delete=True), succeeded=True, now=NOW)
    assert held.placed == {}


# ---------------------------------------------------------------- the default rule


@pytest.mark.parametrize(
    ("memory", "model"),
    [
        (24 * GB, "gpt-oss:20b"),
        (16 * GB, "gpt-oss:20b"),
        (12 * GB, "qwen3:8b"),
        (5 * GB, "llama3.2:3b"),
        (GB, "llama3.2:1b"),
        (None, "llama3.2:1b"),
    ],
)
def test_the_default_model_is_by_memory(memory: int | None, model: str) -> None:
    assert default_model(memory) == model


SIZES = {normalise("qwen3:8b"): 5 * GB}
EMPTY: dict[str, Any] = {"managed": True, "memory_bytes": 10 * GB, "disk_free_bytes": 10 * GB}


def test_a_node_whose_ollama_the_agent_installed_gets_a_model_when_it_has_none() -> None:
    held = keeper(default_rule=True)
    assert wishes(held, site("a", **EMPTY), sizes=SIZES) == [("a", "qwen3:8b", False)]
    assert held.wishes([site("a", **EMPTY)], busy=(), sizes=SIZES, now=NOW)[0].origin == "default rule"


@pytest.mark.parametrize(
    ("held", "changes", "more"),
    [
        ((), {"managed": False}, {}),  # a user's own Ollama receives nothing that nobody asked for
        (("y",), {}, {}),
        ((), {"ready": False}, {}),
        ((), {"disk_free_bytes": 10 * GB - 1}, {}),
        ((), {"disk_free_bytes": None}, {}),
        ((), {}, {"sizes": {}}),
        ((), {}, {"busy": {(AgentId("id-a"), Y)}}),
    ],
)
def test_the_default_rule_holds_back(held: tuple[str, ...], changes: dict[str, Any], more: dict[str, Any]) -> None:
    assert wishes(keeper(default_rule=True), site("a", *held, **{**EMPTY, **changes}), **{"sizes": SIZES, **more}) == []


def test_the_default_rule_can_be_turned_off_and_gives_way_to_a_rule() -> None:
    assert wishes(keeper(), site("a", **EMPTY), sizes=SIZES) == []
    assert wishes(keeper(Rule(model="x"), default_rule=True), site("a", **EMPTY), sizes=SIZES) == [("a", "x", False)]


def test_what_the_default_rule_placed_stays() -> None:
    held = keeper(default_rule=True)
    held.over(Wish(agent_id=AgentId("id-a"), model="qwen3:8b", origin="default rule"), succeeded=True, now=NOW)
    assert wishes(held, site("a", "qwen3:8b", **EMPTY)) == []


# ---------------------------------------------------------------- any fleet

NAMES = st.sampled_from("abcd")
SITES = st.lists(
    st.builds(site, NAMES, st.sampled_from(["x", "y"]), ready=st.booleans(), tags=st.sampled_from([(), ("t",)])),
    max_size=4,
    unique_by=lambda found: found.name,
)
RULES = st.lists(
    st.builds(Rule, model=st.sampled_from(["x", "y", "z"]), tag=st.sampled_from([None, "t"]), count=st.sampled_from([None, 1, 2])),
    max_size=3,
    unique_by=lambda rule: rule.model,
)


@given(RULES, RULES, SITES)
def test_carrying_out_the_wishes_ends_them_and_touches_nothing_else(first: list[Rule], then: list[Rule], sites: list[Site]) -> None:
    held = Keeper(default_rule=False)
    state: dict[AgentId, set[ModelKey]] = {found.agent_id: set(found.holds) for found in sites}
    before = {agent_id: set(keys) for agent_id, keys in state.items()}

    def current() -> list[Site]:
        return [Site(agent_id=s.agent_id, name=s.name, ready=s.ready, tags=s.tags, holds=tuple(state[s.agent_id])) for s in sites]

    for rules in (first, then):
        held.adopt(Policy(models=tuple(rules)))
        for _ in range(3):
            for wish in held.wishes(current(), busy=(), sizes={}, now=NOW):
                key = normalise(wish.model)
                if wish.delete:
                    assert key not in before[wish.agent_id]
                    state[wish.agent_id].remove(key)
                else:
                    state[wish.agent_id].add(key)
                held.over(wish, succeeded=True, now=NOW)
        assert held.wishes(current(), busy=(), sizes={}, now=NOW) == []
    assert all(before[agent_id] <= state[agent_id] for agent_id in state)
