"""Strategies: the seed's formula to the letter, and what `auto` prefers and when it waits."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.agents import Agent
from core.config import STRATEGIES, RouterConfig
from core.displacement import Displacement
from core.events import Forward, Upstream, Wait
from core.heat import Heat
from core.inventory import Loading
from core.learning import Sample, Speeds
from core.leases import Held
from core.lifecycle import AgentState
from core.names import normalise
from core.scoring import (
    MANY,
    PRICED_MAX,
    ROWS_KEPT_MAX,
    ROWS_MAX,
    Ask,
    Auto,
    Choice,
    LeastBusy,
    Load,
    RoundRobin,
    SeedMetrics,
    best_first,
    some_best,
    strategy,
)
from core.units import AgentId, Instant, LeaseId, ModelKey, RequestId, UnixMs
from tests.core.routing import World, answer, node_of

M = normalise("m")
SIZE = 4_900_000_000
NOW = Instant(1000.0)


def node(name: str, *, loaded: bool = True, slots: int = 1, size: int = SIZE, **fields: Any) -> Agent:
    """A ready node that holds the model."""
    agent = Agent(AgentId(name), Upstream(host="h", port=1), state=AgentState.READY, now_unix=UnixMs(0))
    agent.name, agent.slots = name, slots
    agent.inventory.report_installed([{"name": "m", "size": size, "digest": "d"}])
    agent.inventory.report_loaded([{"name": "m"}] if loaded else [], asked_at=NOW, now=NOW)
    for field, value in fields.items():
        setattr(agent, field, value)
    return agent


def load(counts: Mapping[str, int] | None = None, ahead: Mapping[str, int] | None = None, *, other_model: bool = False) -> Load:
    """So many leases per node, and so many who wait."""
    counts = counts or {}
    on = {
        AgentId(name): {LeaseId(f"{name}{i}"): Held(LeaseId(""), RequestId(""), AgentId(name), M) for i in range(count)}
        for name, count in counts.items()
    }
    of_model = {} if other_model else {AgentId(name): count for name, count in counts.items()}
    return Load(on, of_model, {AgentId(name): count for name, count in (ahead or {}).items()})


def ask(
    key: ModelKey | None = M, *, tokens: int = 60, prompt: int = 0, options: str = "", needs_slot: bool = True, capped: bool = True
) -> Ask:
    return Ask(key, options=options, input_tokens=prompt, output_tokens=tokens, needs_slot=needs_slot, capped=capped)


class Chooser:
    """`auto` with its speeds."""

    def __init__(self) -> None:
        self.speeds = Speeds(RouterConfig())
        self.auto = Auto(self.speeds)

    def __call__(self, nodes: list[Agent], given: Load | None = None, asked: Ask | None = None, now: Instant = NOW) -> Choice:
        return self.auto.choose(asked or ask(), nodes, given or load(), now=now)

    def learn(self, name: str, *, service_s: float, load_s: float, tokens: int = 60) -> None:
        sample = Sample(output_tokens=tokens, decode_s=service_s, load_s=load_s, cold=True)
        self.speeds.learn(AgentId(name), M, sample, size_bytes=SIZE)


# ---------------------------------------------------------------- auto


def test_a_warm_idle_node_beats_a_cold_idle_one() -> None:
    choice = Chooser()([node("cold", loaded=False), node("warm")])
    assert (choice.agent.name, choice.room, choice.start_us) == ("warm", True, 0)


def test_waiting_for_a_warm_busy_node_is_scored_against_loading() -> None:
    choose = Chooser()
    nodes = [node("warm"), node("cold", loaded=False)]
    for name in ("warm", "cold"):
        choose.learn(name, service_s=1.0, load_s=5.0)
    found = choose(nodes, load({"warm": 1}))
    assert (found.agent.name, found.room) == ("warm", False)
    assert found.start_us == pytest.approx(1e6, rel=0.1)
    assert found.patience in (3, 4)
    chosen = [choose(nodes, load({"warm": 1}, {"warm": waiting})).agent.name for waiting in range(8)]
    assert chosen in (["warm"] * 4 + ["cold"] * 4, ["warm"] * 5 + ["cold"] * 3)


def test_patience_tells_how_many_more_would_wait() -> None:
    choose = Chooser()
    nodes = [node("warm"), node("cold", loaded=False)]
    for name in ("warm", "cold"):
        choose.learn(name, service_s=0.5, load_s=8.0)
    patience = choose(nodes, load({"warm": 1})).patience
    assert patience is not None
    for more in range(patience + 1):
        assert not choose(nodes, load({"warm": 1}, {"warm": more})).room
    assert choose(nodes, load({"warm": 1}, {"warm": patience + 1})).room


def test_with_no_room_anywhere_patience_has_no_end() -> None:
    found = Chooser()([node("a"), node("b")], load({"a": 1, "b": 1}))
    assert (found.room, found.patience) == (False, None)


def test_a_node_that_is_loading_costs_what_is_left() -> None:
    choose = Chooser()
    warm, loading = node("warm"), node("loading", loaded=False)
    loading.inventory.loading[M] = Loading(NOW, 5.0)
    costs = []
    for seconds in (0, 3, 5, 50):
        found = choose([warm, loading], load({"warm": 1, "loading": 1}), now=Instant(NOW + seconds))
        costs.append(next(row[4] for row in found.rows if row[0] is loading))
    assert costs == [5_000_000, 2_000_000, 625_000, 625_000]


def test_a_cold_model_waits_for_the_load_before_it_and_a_warm_one_does_not() -> None:
    choose = Chooser()
    cold, warm = node("cold", loaded=False), node("warm")
    for each in (cold, warm):
        each.inventory.loading[ModelKey("other")] = Loading(NOW, 30.0)
    rows = {row[0].name: row for row in choose([cold, warm]).rows}
    alone = choose([node("alone", loaded=False)]).rows[0]
    assert rows["warm"][4] == 0
    assert rows["cold"][4] == alone[4] + 30_000_000


def test_other_options_cost_a_reload() -> None:
    choose = Chooser()
    same, other = node("same"), node("other")
    same.inventory.saw_loaded(M, "num_ctx=9", now=NOW)
    other.inventory.saw_loaded(M, "", now=NOW)
    found = choose([other, same], asked=ask(options="num_ctx=9"))
    assert found.agent is same
    assert min(row[4] for row in found.rows) == 0
    assert max(row[4] for row in found.rows) > 0


def test_a_load_with_other_options_is_none_of_ours() -> None:
    loading = node("loading", loaded=False)
    loading.inventory.loading[M] = Loading(NOW, 5.0, "num_ctx=9")
    (joins,) = Chooser()([loading], asked=ask(options="num_ctx=9")).rows
    (other,) = Chooser()([loading], asked=ask(options="num_ctx=5")).rows
    assert joins[4] == 5_000_000
    assert other[4] > 5_000_000, "what is left of it, and its own"


class Prices(Displacement):
    """A load displaces two seconds' worth of other models; another kind of options costs three."""

    def __init__(self) -> None:
        super().__init__(Speeds(RouterConfig()), Heat(), ready=tuple, in_flight=lambda _: {})

    def of(self, node: Agent, key: ModelKey, *, now: Instant) -> tuple[int, tuple[ModelKey, ...]]:
        return 2_000_000, ()

    def of_runner(self, node: Agent, key: ModelKey, options: str, *, now: Instant) -> int:
        assert options == "num_ctx=5"
        return 3_000_000


def test_what_a_load_displaces_is_priced() -> None:
    cold, joins, other, elsewhere = node("cold", loaded=False), node("joins", loaded=False), node("other"), node("elsewhere")
    joins.inventory.loading[M] = Loading(NOW, 5.0, "num_ctx=9")
    other.inventory.saw_loaded(M, "num_ctx=5", now=NOW)
    elsewhere.inventory.saw_loaded(M, "num_ctx=9", now=NOW)
    elsewhere.inventory.loading[ModelKey("other")] = Loading(NOW, 5.0)
    auto = Auto(Speeds(RouterConfig()), Prices())
    alone = [auto.choose(ask(options="num_ctx=9"), [one], load(), now=NOW).rows[0] for one in (cold, joins, other, elsewhere)]
    assert [row[5] for row in alone] == [2_000_000, 0, 3_000_000, 0]


def test_it_says_where_disregarding_options_would_have_cost_a_reload() -> None:
    choose = Chooser()
    same, other = node("same"), node("other")
    same.inventory.saw_loaded(M, "num_ctx=9", now=NOW)
    other.inventory.saw_loaded(M, "", now=NOW)
    asked = ask(options="num_ctx=9")
    assert choose([other, same], asked=asked).spared
    assert not choose([same], asked=asked).spared
    assert not choose([other, same], load({"other": 1}), asked).spared, "the other one is busier anyway"
    waits = choose([other, same], load({"same": 1}), asked)
    assert (waits.agent, waits.room, waits.spared) == (same, False, True)


def test_faster_nodes_and_heavier_weights_get_more() -> None:
    choose = Chooser()
    choose.learn("fast", service_s=0.5, load_s=5.0)
    choose.learn("slow", service_s=2.0, load_s=5.0)
    assert choose([node("slow"), node("fast")]).agent.name == "fast"
    assert choose([node("slow"), node("fast", slots=9)], load({"fast": 5})).agent.name == "slow"
    assert choose([node("slow", weight=100.0), node("fast")]).agent.name == "slow"


def test_requests_of_others_on_the_node_count() -> None:
    assert Chooser()([node("shared", beyond=1), node("free")]).agent.name == "free"


def test_a_cap_on_a_node_is_kept() -> None:
    nodes = [node("capped", slots=4, max_concurrent=2)]
    assert Chooser()(nodes, load({"capped": 1})).room
    assert not Chooser()(nodes, load({"capped": 2})).room
    assert Chooser()([node("other", slots=1)], load({"other": 1}, other_model=True)).room, "slots are per model"


def test_a_tie_between_waiting_and_going_is_no_reason_to_wait() -> None:
    choose = Chooser()
    full, free = node("full"), node("free", beyond=1, last_chosen=9)
    found = choose([full, free], load({"full": 1}))
    assert (found.agent, found.room) == (free, True)


def test_a_light_request_goes_where_least_is_going_on_and_never_waits() -> None:
    show = ask(None, needs_slot=False, capped=False)
    found = Chooser()([node("busy"), node("idle")], load({"busy": 3}), show)
    assert (found.agent.name, found.room) == ("idle", True)
    assert Chooser()([node("busy", max_concurrent=1)], load({"busy": 3}), show).room


@pytest.mark.parametrize("key", [None, M], ids=["no model can be read", "only loads"])
def test_what_may_run_a_model_keeps_a_cap_even_without_a_slot(key: ModelKey | None) -> None:
    light = ask(key, tokens=0, needs_slot=False)
    capped, free = node("capped", max_concurrent=1), node("free")
    assert not Chooser()([capped], load({"capped": 1}), light).room
    found = Chooser()([capped, free], load({"capped": 1, "free": 5}), light)
    assert (found.agent, found.room) == (free, True)


def test_a_request_that_only_loads_goes_where_that_is_cheapest() -> None:
    only_load = ask(tokens=0, needs_slot=False)
    assert Chooser()([node("cold", loaded=False), node("warm")], load({"warm": 5}), only_load).agent.name == "warm"
    choose = Chooser()
    choose.learn("slow disk", service_s=1.0, load_s=60.0)
    choose.learn("fast disk", service_s=1.0, load_s=2.0)
    assert choose([node("slow disk", loaded=False), node("fast disk", loaded=False)], asked=only_load).agent.name == "fast disk"


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6),
    st.integers(0, 10_000),
)
def test_auto_is_the_argmin_of_its_own_scores(fleet: list[tuple[bool, int, int, int, int]], prompt: int) -> None:
    nodes = [node(str(i), loaded=warm, slots=slots, beyond=beyond, last_chosen=-i) for i, (warm, slots, _, _, beyond) in enumerate(fleet)]
    counts = {str(i): min(count, slots) for i, (_, slots, count, _, _) in enumerate(fleet)}
    ahead = {str(i): waiting for i, (_, _, _, waiting, _) in enumerate(fleet)}
    found = Chooser()(nodes, load(counts, ahead), ask(prompt=prompt))
    scores = {row[0].name: row[1] for row in found.rows}
    assert scores[found.agent.name] == min(scores.values())
    assert all(isinstance(part, int) for row in found.rows for part in row[1:])
    assert found.room == (counts[found.agent.name] < found.agent.slots)
    for row in found.rows:
        _, score, work, count, cold, displaced = row
        assert score == (count + 1) * work + cold + displaced


# ---------------------------------------------------------------- the seed's


def metrics(nodes: list[Agent], given: Load | None = None) -> Choice:
    return SeedMetrics(120.0).choose(ask(), nodes, given or load(), now=NOW)


def told(name: str, cpu: float, memory: float, *, ago: float = 0.0, **fields: Any) -> Agent:
    return node(name, cpu_usage=cpu, memory_usage=memory, metrics_at=Instant(NOW - ago), **fields)


def test_metrics_is_cpu_plus_memory_plus_ten_per_request() -> None:
    found = metrics([told("a", 10, 50), told("b", 20, 20, beyond=1), told("c", 30, 30)], load({"a": 0, "b": 1, "c": 1}))
    assert {row[0].name: row[1] for row in found.rows} == {"a": 60_000, "b": 60_000, "c": 70_000}
    assert found.agent.name == "a"
    assert metrics([told("a", 10, 50), told("b", 20, 20)], load({"a": 1})).agent.name == "b"


def test_only_fresh_numbers_are_scored() -> None:
    found = metrics([told("stale", 1, 1, ago=120.1), told("fresh", 70, 70, ago=120)])
    assert [row[0].name for row in found.rows] == ["fresh"]


def test_agentless_nodes_count_with_the_fleets_mean() -> None:
    found = metrics([told("a", 10, 30), told("b", 30, 50), node("plain", agentless=True)])
    assert {row[0].name: row[1] for row in found.rows}["plain"] == 60_000


@pytest.mark.parametrize(
    "fleet", [[told("a", 81, 0), told("b", 100, 0)], [node("a"), node("b")], [node("a", agentless=True), node("b", agentless=True)]]
)
def test_round_robin_when_all_are_busy_or_nobody_told(fleet: list[Agent]) -> None:
    assert_round_robin(SeedMetrics(120.0), fleet)


def test_one_cpu_below_the_bar_is_enough_to_score() -> None:
    assert metrics([told("a", 100, 0), told("b", 80, 90)]).agent.name == "a"


# ---------------------------------------------------------------- the plain ones


def assert_round_robin(tried: Any, fleet: list[Agent]) -> None:
    chosen = []
    for number in range(1, 2 * len(fleet) + 1):
        agent = tried.choose(ask(), fleet, load(), now=NOW).agent
        agent.last_chosen = number
        chosen.append(agent.name)
    assert chosen == [agent.name for agent in fleet] * 2


def test_round_robin_takes_turns() -> None:
    assert_round_robin(RoundRobin(), [node("a"), node("b"), node("c")])


def test_least_busy_counts_others_requests_too_and_ties_take_turns() -> None:
    assert LeastBusy().choose(ask(), [node("a", beyond=2), node("b")], load({"b": 1}), now=NOW).agent.name == "b"
    assert_round_robin(LeastBusy(), [node("a"), node("b")])


@pytest.mark.parametrize("name", ["metrics", "least-busy", "round-robin"])
def test_those_that_forward_at_once_keep_only_the_cap(name: str) -> None:
    tried = strategy(RouterConfig(strategy=name), Speeds(RouterConfig()))
    busy = load({"a": 50})
    assert tried.choose(ask(), [node("a")], busy, now=NOW).room
    capped = node("a", max_concurrent=50)
    full = tried.choose(ask(), [capped], busy, now=NOW)
    assert (full.room, full.patience) == (False, None)
    assert tried.choose(ask(), [capped, node("b")], busy, now=NOW).agent.name == "b"
    assert tried.choose(ask(needs_slot=False, capped=False), [capped], busy, now=NOW).room
    assert not tried.choose(ask(None, needs_slot=False), [capped], busy, now=NOW).room


@pytest.mark.parametrize("name", STRATEGIES)
def test_equal_nodes_are_all_chosen_within_one_round(name: str) -> None:
    tried = strategy(RouterConfig(strategy=name), Speeds(RouterConfig()))
    fleet = [told(str(i), 10, 10) for i in range(4)]
    chosen = []
    for number in range(1, 9):
        agent = tried.choose(ask(), fleet, load(), now=NOW).agent
        agent.last_chosen = number
        chosen.append(agent.name)
    assert chosen == ["0", "1", "2", "3"] * 2


def test_the_best_come_first_and_not_too_many() -> None:
    rows = [(node(str(i), last_chosen=i % 2), i // 2, 0, 0, 0) for i in reversed(range(20))]
    best = best_first(rows)
    assert [row[0].name for row in best] == [str(i) for i in range(ROWS_MAX)]


def test_what_is_kept_of_many_are_some_of_the_best_and_the_chosen_one() -> None:
    rows = [(node(str(i)), score, 0, 0, 0, 0) for i, score in enumerate([5] * ROWS_KEPT_MAX + [1, 3])]
    assert some_best(rows[2:], None) == rows[2:]
    best = some_best(rows, AgentId(str(ROWS_KEPT_MAX)))
    assert [row[1] for row in best] == [1, 3, 5, 5, 5, 5, 5, 5]
    equal = [(node(str(i)), 5, 0, 0, 0, 0) for i in range(ROWS_KEPT_MAX + 1)]
    for chosen in (AgentId("0"), AgentId(str(ROWS_KEPT_MAX))):
        kept = some_best(equal, chosen)
        assert len(kept) == ROWS_MAX
        assert chosen in [row[0].id for row in kept]


class Dear:
    """Everything that a load pushes out is dear."""

    def of(self, node: Agent, key: ModelKey, *, now: Instant) -> tuple[int, tuple[ModelKey, ...]]:
        return 1_000_000, ()

    def of_runner(self, node: Agent, key: ModelKey, options: str, *, now: Instant) -> int:
        return 1_000_000


@given(
    states=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(("warm", "cold", "other", "loading")), st.integers(1, 4)), min_size=1, max_size=30
    ),
    prices=st.booleans(),
    prompt=st.sampled_from((0, 4000)),
)
def test_who_is_passed_over_would_not_have_been_chosen(states: list[tuple[int, str, int]], prices: bool, prompt: int) -> None:
    nodes, counts = [], {}
    for number, (busy, state, slots) in enumerate(states):
        one = node(f"n{number}", loaded=state != "cold", slots=slots, last_chosen=(number * 7) % 5)
        if state == "other":
            one.inventory.saw_loaded(M, "num_ctx=9", now=NOW)
        if state == "loading":
            one.inventory.begins(normalise("x"), Loading(NOW, 5.0, ""))
        nodes.append(one)
        counts[one.name] = busy
    speeds = Speeds(RouterConfig())
    for number in range(0, len(nodes), 3):
        sample = Sample(output_tokens=60, decode_s=0.5 + number / 10, load_s=None, cold=False)
        speeds.learn(AgentId(f"n{number}"), M, sample, size_bytes=SIZE)
    auto = Auto(speeds, Dear() if prices else None)  # type: ignore[arg-type]
    given_load = load({name: count for name, count in counts.items() if count})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.scoring.ROWS_MAX", 10**6)
        full = auto.choose(ask(prompt=prompt), nodes, given_load, now=NOW)
    short = auto.choose(ask(prompt=prompt), nodes, given_load, now=NOW)
    same = ("agent", "room", "start_us", "work_us", "patience", "spared")
    assert [getattr(short, name) for name in same] == [getattr(full, name) for name in same]
    assert {row[0].id for row in short.rows} <= {row[0].id for row in full.rows}


@pytest.mark.parametrize("strategy", ["auto", "metrics", "least-busy", "round-robin"])
def test_a_cap_holds_for_loads_and_for_bodies_whose_model_cannot_be_read(strategy: str) -> None:
    world = World(strategy=strategy)
    agent_id = world.agent_with("one", "m", slots=8)
    world.cap(agent_id, 1)
    world.ask("r1")
    assert isinstance(answer(world.ask("load", load_only=True), "load"), Wait)
    assert isinstance(answer(world.ask("unreadable", None), "unreadable"), Wait)
    assert isinstance(answer(world.ask("unload", load_only=True, unload=True), "unload"), Forward), "it frees memory"
    world.settle("unload")
    assert (node_of(world.settle("r1"), "load"), node_of(world.settle("load"), "unreadable")) == (agent_id, agent_id)


# ---------------------------------------------------------------- the one pass against a plain one


class OwnPrices(Displacement):
    """What a load pushes out, node by node."""

    def __init__(self, prices: Mapping[str, int]) -> None:
        super().__init__(Speeds(RouterConfig()), Heat(), ready=tuple, in_flight=lambda _: {})
        self.prices = prices

    def of(self, node: Agent, key: ModelKey, *, now: Instant) -> tuple[int, tuple[ModelKey, ...]]:
        return self.prices[node.name], ()


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 8), st.integers(1, 3), st.sampled_from((None, None, 0.5, 4.0))),
        min_size=1,
        max_size=14,
    )
)
def test_leaving_out_what_cannot_win_changes_no_choice(drawn: list[tuple[bool, int, int, int, float | None]]) -> None:
    """Nodes: (loaded, requests in flight, seconds that a load pushes out, slots, weight)."""
    nodes = [
        node(f"n{number}", loaded=loaded, slots=slots, weight=weight, last_chosen=number)
        for number, (loaded, _, _, slots, weight) in enumerate(drawn)
    ]
    prices = {f"n{number}": seconds * 1_000_000 for number, (_, _, seconds, _, _) in enumerate(drawn)}
    given_load = load({f"n{number}": count for number, (_, count, _, _, _) in enumerate(drawn)})
    auto = Auto(Speeds(RouterConfig()), OwnPrices(prices))
    rows = {row[0].name: row for one in nodes for row in auto.choose(ask(), [one], given_load, now=NOW).rows}
    plain = min(nodes, key=lambda one: (rows[one.name][1], one.last_chosen))
    open_ones = [one for one in nodes if given_load.of_model.get(one.id, 0) < one.slots]
    plain_open = min(open_ones, key=lambda one: (rows[one.name][1], one.last_chosen), default=None)
    found = auto.choose(ask(), nodes, given_load, now=NOW)
    if plain_open is not None and rows[plain_open.name][1] == rows[plain.name][1]:
        assert (found.agent, found.room) == (plain_open, True)
    else:
        assert (found.agent, found.room) == (plain, False)
        if plain_open is not None:
            assert found.patience == (rows[plain_open.name][1] - rows[plain.name][1] - 1) // rows[plain.name][2]


def test_of_very_many_loads_only_the_cheapest_are_priced() -> None:
    nodes = [node(f"n{number}", loaded=False, last_chosen=number) for number in range(200)]
    priced: list[str] = []

    class Counting(OwnPrices):
        def of(self, node: Agent, key: ModelKey, *, now: Instant) -> tuple[int, tuple[ModelKey, ...]]:
            priced.append(node.name)
            return super().of(node, key, now=now)

    prices = {f"n{number}": 1_000_000 * (number != 7) for number in range(200)}
    choice = Auto(Speeds(RouterConfig()), Counting(prices)).choose(ask(), nodes, load(), now=NOW)
    assert choice.agent.name == "n7"
    assert len(priced) == PRICED_MAX


class Herd:
    """More nodes than are looked at one by one; every tenth has the model in memory."""

    def __init__(self, *, every: int = 10) -> None:
        self.nodes = tuple(node(f"n{index}", loaded=index % every == 0, slots=2) for index in range(1, MANY + 11))
        self.auto = Auto(Speeds(RouterConfig()))

    def both(self, counts: Mapping[str, int], *, news: int = 1) -> tuple[Choice, Choice]:
        """With the short cut and without."""
        given = load(counts)
        short = Load(given.on, given.of_model, given.ahead, {}, news)
        return self.auto.choose(ask(), self.nodes, short, now=NOW), self.auto.choose(ask(), self.nodes, given, now=NOW)


@given(st.dictionaries(st.integers(1, MANY + 10), st.integers(1, 12), max_size=30), st.integers(0, 12))
def test_among_many_nodes_the_short_cut_chooses_no_worse(busy: dict[int, int], warm: int) -> None:
    herd = Herd()
    counts = {**{f"n{index}": warm for index in range(10, MANY + 11, 10) if warm}, **{f"n{index}": n for index, n in busy.items()}}
    short, full = herd.both(counts)
    assert short.room == full.room
    chosen = [next(row[1] for row in choice.rows if row[0] is choice.agent) for choice in (short, full)]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("every", [1, 1000])
def test_among_many_nodes_alike_there_is_no_short_cut(every: int) -> None:
    herd = Herd(every=every)
    for _ in range(2):
        short, full = herd.both({})
        assert short.rows == full.rows


def test_a_node_that_knows_the_prompt_has_less_work() -> None:
    nodes, given = [node("a"), node("b")], load()
    auto = Auto(Speeds(RouterConfig()))
    knows = Load(given.on, given.of_model, given.ahead, {AgentId("b"): 3000})
    rows = auto.choose(ask(prompt=4000), nodes, knows, now=NOW).rows
    alone = auto.choose(ask(prompt=1000), nodes, given, now=NOW).rows
    assert rows[1][2] == pytest.approx(alone[1][2], abs=1)
    assert rows[0][2] > rows[1][2]


def test_among_many_nodes_it_is_noticed_what_came_into_memory() -> None:
    herd = Herd()
    short, full = herd.both({})
    assert len(short.rows) < len(full.rows)
    herd.nodes[1].inventory.saw_loaded(M, "", now=NOW)
    counts = {f"n{index}": 1 for index in range(10, MANY + 11, 10)}
    assert herd.both(counts, news=2)[0].agent.name == "n2"


def test_the_warm_ones_of_so_many_models_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.scoring.WARM_MAX", 0)
    herd = Herd()
    assert herd.both({})[0].room
    assert herd.auto._warm == {}
