"""Boards: whatever one says is what looking at every node would say, and it notices whatever changes."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.agents import Agent
from core.config import RouterConfig
from core.events import Upstream
from core.inventory import Loading, News
from core.learning import Sample, Speeds
from core.leases import Held
from core.lifecycle import AgentState
from core.names import normalise
from core.scoring import BOARDS_MAX, Ask, Auto, Choice, LeastBusy, Load, best_first
from core.units import AgentId, Instant, LeaseId, ModelKey, RequestId, UnixMs
from core.warm import KINDS_SPARE, SHOWN_MAX, Board
from tests.core.routing import World

M = normalise("m")
OTHER = normalise("other")
SIZE = 4_900_000_000
NOW = Instant(1000.0)
CTX = '{"num_ctx":8192}'

memory = st.sampled_from(("warm", "warm", "warm", "warm", "warm", "cold", "loads another", "loading", "other options"))
one_node = st.fixed_dictionaries(
    {
        "memory": memory,
        "leases": st.integers(0, 4),
        "others": st.integers(0, 1),
        "beyond": st.sampled_from((0, 0, 1)),
        "slots": st.integers(1, 5),
        "limit": st.sampled_from((None, None, 2)),
        "probe": st.booleans(),
        "weight": st.sampled_from((None, None, None, 0.5, 2.0, 3.3)),
        "max_concurrent": st.sampled_from((None, None, 3)),
        "last_chosen": st.integers(0, 3),
        "speed": st.sampled_from((None, 50.0, 50.0, 80.0)),
        "known_tokens": st.sampled_from((0, 0, 0, 100, 900)),
        "ahead": st.sampled_from((0,) * 15 + (1,)),
    }
)


class Fleet:
    """Nodes with what is in flight on them, and `auto` for them."""

    def __init__(self) -> None:
        self.speeds = Speeds(RouterConfig())
        self.auto = Auto(self.speeds)
        self.news = News()
        self.nodes: tuple[Agent, ...] = ()
        self.on: dict[AgentId, dict[LeaseId, Held]] = {}
        self.of_model: dict[AgentId, int] = {}
        self.ahead: dict[AgentId, int] = {}
        self.cached: dict[AgentId, int] = {}

    def add(self, name: str, **facts: Any) -> Agent:
        node = Agent(AgentId(name), Upstream(host="h", port=1), state=AgentState.READY, now_unix=UnixMs(0))
        node.name, node.inventory.news = name, self.news
        node.inventory.report_installed([{"name": model, "size": SIZE, "digest": model} for model in ("m", "other")])
        held = facts.get("memory", "warm")
        node.inventory.report_loaded([] if held in ("cold", "loading") else [{"name": "m"}], asked_at=NOW, now=NOW)
        if held == "loads another":
            node.inventory.begins(OTHER, Loading(NOW, 5.0))
        elif held == "loading":
            node.inventory.begins(M, Loading(NOW, 5.0))
        elif held == "other options":
            node.inventory.saw_loaded(M, '{"num_ctx":4096}', now=NOW)
        elif held == "warm" and facts.get("options"):
            node.inventory.saw_loaded(M, facts["options"], now=NOW)
        node.slots = facts.get("slots", 9)
        node.weight, node.max_concurrent = facts.get("weight"), facts.get("max_concurrent")
        node.beyond = facts.get("beyond", 0)
        node.takes(0, facts.get("last_chosen", 0))
        if facts.get("limit"):
            node.limits[M] = facts["limit"]
        if facts.get("probe"):
            node.probes[M] = None
        if facts.get("speed"):
            self.learn(node, facts["speed"])
        if facts.get("known_tokens") and M in node.inventory.resident:
            self.cached[node.id] = facts["known_tokens"]
        if facts.get("ahead"):
            self.ahead[node.id] = facts["ahead"]
        self.nodes = (*self.nodes, node)
        self.busy(node, facts.get("leases", 0), others=facts.get("others", 0))
        return node

    def busy(self, node: Agent, leases: int, *, others: int = 0) -> None:
        """So many requests for the model are on the node, and for another model."""
        held = {LeaseId(f"{node.id}{i}"): Held(LeaseId(""), RequestId(""), node.id, M) for i in range(leases + others)}
        self.on[node.id], self.of_model[node.id] = held, leases
        node.works_on(len(held))

    def learn(self, node: Agent, tokens_per_s: float) -> None:
        sample = Sample(output_tokens=100, decode_s=100 / tokens_per_s, prompt_tokens=100, prefill_s=10 / tokens_per_s, cold=True)
        self.speeds.learn(node.id, M, sample, size_bytes=SIZE)

    def load(self) -> Load:
        return Load(self.on, self.of_model, self.ahead, self.cached, self.news.count)

    def ask(self, auto: Auto, asked: Ask) -> Choice | None:
        return auto.at_once(asked, self.nodes, self.of_model, self.ahead, self.cached, self.news.changes)

    def at_once(self, asked: Ask) -> Choice | None:
        """What the board says, once it is the same as what looking at all says, and as what a new board says."""
        full = Auto(self.speeds).choose(asked, self.nodes, self.load(), now=NOW)
        found = self.ask(self.auto, asked)
        self.auto.check(lambda _: self.nodes, self.news.changes)
        anew = self.ask(Auto(self.speeds), asked)
        assert (found is None) == (anew is None)
        if found is not None:
            assert found.warm is not None
            assert (found.agent, found.room, found.start_us, found.work_us, found.spared) == (full.agent, True, 0, full.work_us, False)
            assert (full.room, full.start_us, full.spared) == (True, 0, False)
            rows = found.warm.rows()
            assert rows[0][0] is found.agent
            assert best_first(rows)[0][1] == rows[0][1], "no other node that is shown is better"
            looked = {row[0].id: row for row in Auto(self.speeds).choose(asked, self.nodes, self.load(), now=NOW).rows}
            for row in rows:
                there = looked.get(row[0].id, row)
                if row[0].inventory.loading:  # what is left of other loads is not in it
                    assert there[1] - there[4] == row[1] - row[4]
                else:
                    assert there == row
        return found


def ask(*, tokens: int = 60, prompt: int = 1000, options: str = "", key: ModelKey | None = M, needs_slot: bool = True) -> Ask:
    return Ask(key, options, prompt, tokens, needs_slot)


def fleet(count: int, **facts: Any) -> Fleet:
    made = Fleet()
    for number in range(count):
        made.add(f"n{number}", **facts)
    return made


def name_of(choice: Choice | None) -> str | None:
    return None if choice is None else choice.agent.name


@given(st.lists(one_node, min_size=1, max_size=24), st.sampled_from(("", CTX)), st.integers(0, 300), st.integers(1000, 4000))
def test_what_it_says_is_what_looking_at_all_says(nodes: list[dict[str, Any]], options: str, tokens: int, prompt: int) -> None:
    made = Fleet()
    for number, facts in enumerate(nodes):
        made.add(f"n{number}", **facts, options=options)
    made.at_once(ask(tokens=tokens, prompt=prompt, options=options))


changes: dict[str, Callable[[Fleet, Agent], Any]] = {
    "one more request": lambda fleet, node: fleet.busy(node, node.in_flight + 1),
    "idle": lambda fleet, node: fleet.busy(node, 0),
    "others' requests": lambda fleet, node: setattr(node, "beyond", 2),
    "faster": lambda fleet, node: fleet.learn(node, 200.0),
    "slower": lambda fleet, node: [fleet.learn(node, 10.0) for _ in range(9)],
    "other slots": lambda fleet, node: (setattr(node, "slots", 1), fleet.speeds.refresh(node.id)),
    "unloaded": lambda fleet, node: node.inventory.saw_unloaded(M, now=NOW),
    "loaded": lambda fleet, node: node.inventory.saw_loaded(M, "", now=NOW),
    "loaded by others": lambda fleet, node: node.inventory.report_loaded([{"name": "m"}], asked_at=NOW, now=Instant(NOW + 9)),
    "loaded otherwise": lambda fleet, node: node.inventory.saw_loaded(M, CTX, now=NOW),
    "others' context": lambda fleet, node: [
        node.inventory.report_loaded([{"name": "m", "context_length": tokens}], asked_at=NOW, now=Instant(NOW + 9)) for tokens in (5, 6)
    ],
    "gone by its report": lambda fleet, node: node.inventory.report_loaded([], asked_at=Instant(NOW + 9), now=Instant(NOW + 9)),
    "begins a load": lambda fleet, node: node.inventory.begins(M, Loading(NOW, 5.0)),
    "breaks a load off": lambda fleet, node: M in node.inventory.loading and node.inventory.breaks_off(M),
    "restarted": lambda fleet, node: node.inventory.forget_loaded(now=NOW),
    "deleted": lambda fleet, node: (
        node.inventory.report_installed([{"name": "m", "size": SIZE + node.in_flight}]), fleet.speeds.refresh(node.id)
    ),
    "a limit": lambda fleet, node: node.limits.update({M: 1}),
    "chosen": lambda fleet, node: node.takes(node.in_flight, max(each.last_chosen for each in fleet.nodes) + 1),
}  # fmt: skip


@given(
    st.lists(memory, min_size=2, max_size=8),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from(list(changes)), st.sampled_from(("", CTX))), max_size=20),
)
def test_it_notices_whatever_changes(nodes: list[str], steps: list[tuple[int, str, str]]) -> None:
    made = Fleet()
    for number, held in enumerate(nodes):
        made.add(f"n{number}", memory=held)
    for at, change, options in steps:
        changes[change](made, made.nodes[at % len(nodes)])
        made.at_once(ask(options=options))


def test_the_least_loaded_is_chosen_and_of_equals_the_least_recently_chosen() -> None:
    made = fleet(3)
    made.busy(made.nodes[0], 1)
    made.nodes[1].takes(0, 7)
    assert name_of(made.at_once(ask())) == "n2"
    made.nodes[2].takes(0, 8)
    assert name_of(made.at_once(ask())) == "n1"
    for node, tokens_per_s in zip(made.nodes, (500.0, 50.0, 50.0), strict=True):
        made.learn(node, tokens_per_s)
    assert name_of(made.at_once(ask())) == "n0"


def test_a_weight_and_a_known_prompt_count() -> None:
    made = fleet(2)
    made.add("heavy", weight=2.0)
    assert name_of(made.at_once(ask())) == "heavy"
    made.cached[AgentId("n1")] = 999
    assert name_of(made.at_once(ask(tokens=1))) == "n1"
    made.cached[AgentId("gone")] = 999
    made.cached[AgentId("heavy")] = 999
    choice = made.at_once(ask(tokens=1))
    assert name_of(choice) == "heavy"
    assert choice is not None
    assert choice.warm is not None
    assert {row[0].name: row[2] for row in choice.warm.rows()}["n1"] < choice.work_us * 3


@pytest.mark.parametrize(
    "facts",
    [{"slots": 1, "leases": 1}, {"max_concurrent": 1, "leases": 1}, {"memory": "loading"}, {"memory": "other options"}, {"ahead": 1}],
)
def test_where_it_cannot_tell_it_says_nothing(facts: dict[str, Any]) -> None:
    assert fleet(2, **facts).at_once(ask()) is None


def test_a_cold_node_matters_once_waiting_costs_more_than_a_load() -> None:
    made = fleet(1)
    cold = made.add("cold", memory="cold")
    assert name_of(made.at_once(ask())) == "n0"
    made.speeds.learn(cold.id, M, Sample(output_tokens=9, decode_s=0.1, load_s=0.01, cold=True), size_bytes=SIZE)
    assert made.at_once(ask()) is None
    assert fleet(2, memory="cold").at_once(ask()) is None


def test_what_needs_no_slot_has_no_board() -> None:
    made = fleet(1)
    assert made.ask(made.auto, ask(needs_slot=False)) is None
    assert made.ask(made.auto, ask(key=None)) is None
    assert LeastBusy().at_once(ask(), made.nodes, {}, {}, {}, 0) is None


def test_of_many_nodes_some_are_shown_and_the_chosen_one() -> None:
    made = fleet(SHOWN_MAX + 4, leases=1)
    made.busy(made.nodes[-1], 0)
    choice = made.at_once(ask())
    assert choice is not None
    assert choice.warm is not None
    assert [row[0].name for row in choice.warm.rows()] == [f"n{SHOWN_MAX + 3}", *(f"n{number}" for number in range(SHOWN_MAX // 2))]


def test_a_kind_of_as_many_as_are_shown_is_not_taken_for_those() -> None:
    made = fleet(SHOWN_MAX - SHOWN_MAX // 2 + 4, leases=3)
    for number in range(SHOWN_MAX // 2):
        made.add(f"quick{number}", weight=2.0)
    choice = made.at_once(ask())
    assert name_of(choice) == "quick0"
    assert choice is not None
    assert choice.warm is not None
    assert [row[3] for row in choice.warm.rows()] == [0, *[3] * (SHOWN_MAX // 2)]


def test_one_that_has_met_too_many_speeds_is_made_anew() -> None:
    made = fleet(1)
    assert made.at_once(ask()) is not None
    board = made.auto._boards[M, ""]
    overhead_s = 60.0
    while len(board._kinds) <= 2 + KINDS_SPARE:
        assert made.auto._boards[M, ""] is board
        overhead_s *= 0.8
        made.speeds.learn(made.nodes[0].id, M, Sample(service_s=overhead_s), size_bytes=SIZE)
        made.at_once(ask())
    made.at_once(ask())
    assert len(made.auto._boards[M, ""]._kinds) == 1


def test_boards_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BOARDS_MAX > 1
    monkeypatch.setattr("core.scoring.BOARDS_MAX", 2)
    made = fleet(1)
    for number in range(5):
        made.at_once(ask(options=f'{{"num_ctx":{number}}}'))
    assert len(made.auto._boards) <= 2


def test_a_board_that_is_wrong_is_found_out() -> None:
    made = fleet(3)
    spoils: list[Callable[[Board], Any]] = [
        lambda board: board._pairs.pop(),
        lambda board: board._kinds.clear() or board._kinds.setdefault((1, 2, 3, None), 0),  # type: ignore[func-returns-value]
    ]
    for spoil in spoils:
        board = Board(M, "", made.nodes, changes=made.news.changes, speeds=made.speeds)
        board.check(made.nodes, changes=made.news.changes)
        spoil(board)
        with pytest.raises(AssertionError, match="R19"):
            board.check(made.nodes, changes=made.news.changes)
        board.check(made.nodes, changes=-1)
    made.nodes[0].inventory.loading[M] = Loading(NOW, 5.0)
    board = Board(M, "", made.nodes, changes=made.news.changes, speeds=made.speeds)
    board.check(made.nodes, changes=made.news.changes)
    board._pairs.append((made.nodes[1], 0))
    with pytest.raises(AssertionError, match="R19"):
        board.check(made.nodes, changes=made.news.changes)
    made.nodes[0].inventory.loading.clear()
    made.nodes[0].inventory.resident.clear()
    board = Board(M, "", made.nodes, changes=made.news.changes, speeds=made.speeds)
    board._cold_us += 1
    with pytest.raises(AssertionError, match="R19"):
        board.check(made.nodes, changes=made.news.changes)


def test_the_router_uses_it_and_explains_it() -> None:
    world = World()
    for name in ("a", "b"):
        world.backend(name, "m", loaded=("m",), slots=2)
    world.ask("r1")
    boards = world.router._dispatcher._strategy._boards  # type: ignore[attr-defined]
    assert list(boards) == [(M, "")]
    why = world.router.why(RequestId("r1"))
    assert why is not None
    assert [(candidate.name, candidate.chosen) for candidate in why.decisions[0].candidates] == [("b", False), ("a", True)]
    assert why.decisions[0].candidates[0].parts.keys() == {"work", "ahead", "cold", "displaced"}
