"""What keeps a chosen node from beginning: other models in its memory, other loads, and requests with other runner options."""

from core.events import Count, Ending, Forward, Wait
from core.turns import HOLD_LOADS, LINGER_S
from core.units import GIB, AgentId
from tests.core.routing import World, answer, node_of, of, one, registration, row, usage

WIDE, NARROW = "num_ctx=8192", "num_ctx=2048"
LOAD_S = 4.0
HOLD_S = HOLD_LOADS * LOAD_S


class Fleet(World):
    """Nodes whose loads take `LOAD_S`, as the router has learned."""

    def node(self, name: str, *, loaded: str | None = None, slots: int = 4, context: int | None = None) -> AgentId:
        agent_id = self.backend(name, "m", "other", slots=slots)
        if context is not None:
            self.poll(agent_id, loaded=[{**row("m"), "context_length": context}])
        if loaded is not None:
            request = f"loads {name}"
            assert node_of(self.ask(request, runner_options=loaded), request) == agent_id
            self.now += LOAD_S
            self.first(request)
            self.settle(request, usage=usage(load_s=LOAD_S))
        return agent_id

    def hear(self) -> None:
        """All nodes are alive, and so is every request."""
        self.pulse(*list(self.router._requests), heard=tuple(view.id for view in self.router.agents()))

    def why(self, request_id: str) -> str:
        return next(view.why for view in self.router.waiting() if view.request_id == request_id)


def test_two_clients_with_different_contexts_on_two_nodes_cost_two_loads_in_all() -> None:
    fleet = Fleet()
    fleet.backend("a", "m")
    fleet.backend("b", "m")
    homes: dict[str, set[AgentId | None]] = {WIDE: set(), NARROW: set()}
    for number in range(200):
        options = (WIDE, NARROW)[number % 2]
        fleet.hear()
        homes[options].add(node_of(fleet.ask(f"r{number}", runner_options=options), f"r{number}"))
        fleet.serve(f"r{number}", 1.0, usage=usage(load_s=LOAD_S if number < 2 else 0.0))
    assert {len(home) for home in homes.values()} == {1}
    statistics = fleet.router.statistics()
    assert (statistics.loads_total, statistics.reloads_total) == (2, 0)
    assert statistics.reloads_avoided_total > 90, "options disregarded, every second request would have been a reload"


def test_what_makes_no_difference_shares_a_runner() -> None:
    fleet = Fleet()
    agent_id = fleet.backend("a", "m")
    installed = {**row("m"), "details": {"context_length": 4096}}
    fleet.poll(agent_id, installed=[installed])
    for request_id, options in (("first", "num_ctx=4096"), ("clamped", "num_ctx=9999"), ("said", "num_ctx=4096,shift=true")):
        assert isinstance(answer(fleet.ask(request_id, runner_options=options), request_id), Forward)
        fleet.serve(request_id)
    assert fleet.router.statistics().loads_total == 1


def test_a_reported_context_tells_what_others_loaded() -> None:
    fleet = Fleet()
    fleet.node("a", context=8192)
    fleet.ask("fits", runner_options=WIDE)
    assert fleet.router.statistics().loads_total == 0
    fleet.serve("fits")
    assert of(fleet.ask("other", runner_options=NARROW), Count) == [
        Count(name="reloads_total", labels={"agent": "a"}), Count(name="loads_total", labels={"agent": "a"}),
    ]  # fmt: skip


def test_a_runner_that_was_just_loaded_has_its_turn_and_then_the_others_have_theirs() -> None:
    fleet = Fleet()
    fleet.node("only", loaded=WIDE, slots=1)
    loaded_at = fleet.now
    fleet.ask("w0", runner_options=WIDE)
    fleet.first("w0")
    assert isinstance(answer(fleet.ask("n0", runner_options=NARROW), "n0"), Wait)
    number = 0
    while fleet.router.statistics().reloads_total == 0:  # wide ones keep coming without a pause
        number += 1
        fleet.ask(f"w{number}", runner_options=WIDE)
        fleet.now += 1.0
        fleet.settle(f"w{number - 1}", usage=usage())
        if any(view.request_id == f"w{number}" for view in fleet.router.waiting()):
            break
        fleet.first(f"w{number}")
    assert HOLD_S <= fleet.now - loaded_at <= HOLD_S + 1.0, "the turn, and what was in flight at its end"
    assert fleet.router.statistics().reloads_total == 1
    assert [view.request_id for view in fleet.router.waiting()] == [f"w{number}"]


def test_batches_by_class_share_one_node() -> None:
    """Two clients that each ask again when they are answered: a load for each turn, not for each request."""
    fleet = Fleet()
    fleet.node("only", loaded=WIDE, slots=1)
    asked = {WIDE: 0, NARROW: 0}
    names = {WIDE: "w", NARROW: "n"}

    def ask(options: str) -> None:
        asked[options] += 1
        fleet.ask(f"{names[options]}{asked[options]}", runner_options=options)

    ask(WIDE)
    ask(NARROW)
    waited = 0.0
    for _ in range(100):
        fleet.hear()
        live = {f"{names[options]}{asked[options]}": options for options in (WIDE, NARROW)}
        waiting = {view.request_id: view.waited_ms / 1000 for view in fleet.router.waiting()}
        (runs,) = [request_id for request_id in live if request_id not in waiting]
        waited = max([waited, *waiting.values()])
        cold = fleet.router._requests[runs].cold  # type: ignore[index]
        fleet.wait(LOAD_S if cold else 0.0)
        fleet.first(runs)
        fleet.wait(0.5)
        fleet.settle(runs, usage=usage(load_s=LOAD_S if cold else 0.0, eval_s=0.4))
        fleet.wait(0.05)
        ask(live[runs])
    assert fleet.router.statistics().reloads_total <= 100 * 0.55 / HOLD_S + 1
    assert waited <= HOLD_S + 0.55 + LOAD_S, "a turn, what was in flight, a load"


def test_an_idle_runner_is_not_kept_for_long() -> None:
    fleet = Fleet()
    fleet.node("only", loaded=WIDE)
    assert isinstance(answer(fleet.ask("n", runner_options=NARROW), "n"), Wait)
    assert "turn" in fleet.why("n")
    assert node_of(fleet.wait(LINGER_S), "n") == "id of only"
    assert fleet.router.next_deadline() is not None


def test_requests_of_the_loaded_class_are_kept_away_once_their_turn_is_over() -> None:
    fleet = Fleet()
    fleet.node("only", loaded=WIDE)
    fleet.wait(HOLD_S)
    fleet.ask("w0", runner_options=WIDE)
    fleet.first("w0")
    assert "have ended" in one(fleet.ask("n0", runner_options=NARROW), Wait).why
    assert isinstance(answer(fleet.ask("w1", runner_options=WIDE), "w1"), Wait), "else they would keep it busy for ever"
    explanation = fleet.router.why(fleet.router.waiting()[-1].request_id)
    assert explanation is not None
    assert explanation.decisions[0].out == {"only": "makes room for other runner options"}
    assert isinstance(answer(fleet.ask("n1", runner_options=NARROW), "n1"), Wait)
    assert isinstance(answer(fleet.ask("o", "other"), "o"), Wait), "one barrier for a node"
    effects = fleet.settle("w0")
    assert (node_of(effects, "n0"), node_of(effects, "n1")) == ("id of only", "id of only")
    assert node_of(fleet.ask("n2", runner_options=NARROW), "n2") == "id of only", "it joins the load"
    assert "loading the model with other options" in fleet.why("w1")


def test_the_barrier_falls_with_who_wanted_it() -> None:
    fleet = Fleet()
    fleet.node("only", loaded=WIDE)
    fleet.wait(HOLD_S)
    fleet.ask("w0", runner_options=WIDE)
    fleet.ask("n0", runner_options=NARROW)
    fleet.ask("w1", runner_options=WIDE)
    assert node_of(fleet.settle("n0", Ending.CANCELLED), "w1") == "id of only"


def test_while_another_model_loads_a_reload_waits() -> None:
    fleet = Fleet()
    fleet.node("only", loaded=WIDE)
    fleet.wait(HOLD_S)
    fleet.ask("o", "other")
    assert "is loading another model" in one(fleet.ask("n", runner_options=NARROW), Wait).why
    assert isinstance(answer(fleet.ask("w", runner_options=WIDE), "w"), Forward), "what is loaded is not held up"


def test_raising_spares_the_reload_where_the_operator_allows_it() -> None:
    fleet = Fleet(raise_context=True)
    fleet.node("only", loaded=WIDE)
    forward = one(fleet.ask("n", runner_options=NARROW), Forward)
    assert forward.raise_context == 8192
    fleet.serve("n")
    assert one(fleet.ask("w", runner_options=WIDE), Forward).raise_context is None
    statistics = fleet.router.statistics()
    assert (statistics.reloads_total, statistics.reloads_avoided_total) == (0, 1)


def test_a_request_that_joins_a_load_is_raised_too() -> None:
    fleet = Fleet(raise_context=True)
    fleet.backend("only", "m", slots=4)
    fleet.ask("w", runner_options=WIDE)
    assert one(fleet.ask("n", runner_options=NARROW), Forward).raise_context == 8192
    assert isinstance(answer(fleet.ask("automatic"), "automatic"), Wait), "it has no value that could be raised"


def test_strategies_that_leave_it_to_the_nodes_hold_nobody_back() -> None:
    fleet = Fleet(strategy="least-busy")
    fleet.node("only", loaded=WIDE)
    for number in range(4):
        assert isinstance(answer(fleet.ask(f"r{number}", runner_options=(WIDE, NARROW)[number % 2]), f"r{number}"), Forward)


def test_a_load_waits_for_busy_victims_and_names_idle_ones() -> None:
    world = World()
    installed = [row(name, size=5 * GIB) for name in ("m", "other", "third")]
    world.register(registration("one", slots=4), agent_id="one")
    loaded = [{**row("m"), "size_vram": 6 * GIB}]
    world.beat("one", installed_models=installed, loaded_models=loaded, gpu_memory_total_mb=8 * 1024.0, sequence=1)
    world.ask("m")
    assert "m:latest may be unloaded" in one(world.ask("o", "other"), Wait).why
    assert isinstance(answer(world.ask("t", "third"), "t"), Wait), "the node has a victim already"
    forward = answer(world.settle("m"), "o")
    assert isinstance(forward, Forward)
    assert forward.unload == ("m:latest",)
