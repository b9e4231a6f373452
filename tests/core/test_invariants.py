"""The router under everything at once: Hypothesis makes the weather, an oracle of its own watches from outside, and the invariants are
checked at each step. And that the checks bite: a router that was damaged on purpose is caught, by number.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from core.events import Command, Cut, Effect, Ending, Failure, Forward, PassOn, Record, Refuse, Route, Wait
from core.invariants import check
from core.inventory import Inventory
from core.leases import Held
from core.lifecycle import AgentInput
from core.requests import Phase
from core.router import Router
from core.units import AgentId, Instant, LeaseId, RequestId
from tests.core.routing import World, registration, row, usage

MODELS = ("a", "b", "c")
TIMEOUT_S = 60.0
TTL_S = 30.0
REPORT_S = 10.0
SLOTS = 2


class Node:
    """What the oracle knows of a node, by what was delivered."""

    def __init__(self, *, agentless: bool) -> None:
        self.agentless = agentless
        self.heard_at = -1e9
        self.well = False
        self.out = False
        self.models: tuple[str, ...] = ()
        self.boot = 1
        self.sequence = 0


class Asked:
    """What the oracle knows of a request."""

    def __init__(self, model: str | None, route: Route) -> None:
        self.model = model
        self.runs = route.runs_model and model is not None
        self.where: str | None = None
        self.on: AgentId | None = None
        self.renewed_at = 0.0
        self.tries: dict[AgentId, int] = {}
        self.first = False
        self.no_repeat: dict[AgentId, None] = {}


class Weather(RuleBasedStateMachine):
    """Nodes come and go, requests come, fail and leave, time jumps."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[AgentId, Node] = {}
        self.live: dict[str, Asked] = {}
        self.gone: dict[str, None] = {}
        self.recorded: dict[str, None] = {}
        self.number = 0

    @initialize(strategy=st.sampled_from(("auto", "auto", "metrics", "least-busy", "round-robin")))
    def start(self, strategy: str) -> None:
        self.strategy = strategy
        self.world = World(
            strategy=strategy, agent_timeout_s=TIMEOUT_S, lease_ttl_s=TTL_S, slots_default=SLOTS, queue_max=6, queue_per_client=4,
            queue_timeout_s=40.0, agents_max=8,
        )  # fmt: skip
        self.world.watch = self.see

    # ------------------------------------------------------------ what the oracle sees

    def see(self, effects: list[Effect]) -> None:
        """Judge what the router wants, from outside."""
        for effect in effects:
            match effect:
                case Forward():
                    self.forwarded(effect)
                case Wait() | Refuse() | PassOn():
                    asked = self.live[effect.request_id]
                    assert asked.where != "answered", "R2: answered twice"
                    assert not asked.first, "R4: answered after its first byte"
                    asked.where, asked.on = "waiting" if isinstance(effect, Wait) else "answered", None
                    asked.renewed_at = self.world.now
                case Cut():
                    assert effect.request_id in self.live, "R14: a cut of nothing"
                case Record():
                    assert effect.request_id not in self.recorded, "R2: recorded twice"
                    self.recorded[effect.request_id] = None
                    if effect.ending is Ending.UNKNOWN:
                        asked = self.live.pop(effect.request_id)
                        ttl_s = REPORT_S if asked.where == "freed" else TTL_S
                        assert self.world.now - asked.renewed_at >= ttl_s, "R8: a lease ended early"
                case _:
                    pass
        in_flight: dict[AgentId, int] = {}
        for asked in self.live.values():
            if asked.on is not None:
                in_flight[asked.on] = in_flight.get(asked.on, 0) + 1
        assert self.world.router.statistics().in_flight_by_agent == in_flight, "R7: in flight differs"
        assert len([asked for asked in self.live.values() if asked.where == "waiting"]) == len(self.world.router.waiting()), "R1"

    def forwarded(self, effect: Forward) -> None:
        lease, now = effect.lease, self.world.now
        asked, node = self.live[effect.request_id], self.nodes[lease.agent_id]
        assert not asked.first, "R4: an attempt after the first byte"
        assert asked.on is None, "R2: on two nodes at once"
        assert node.well, "R5: given to a node that cannot serve"
        assert not node.out, "R5: given to a node that was ordered out"
        assert now - node.heard_at < TIMEOUT_S, "R5: given to a node that was not heard"
        assert asked.model is None or asked.model in node.models, "R5: given to a node without the model"
        asked.tries[lease.agent_id] = asked.tries.get(lease.agent_id, 0) + 1
        assert lease.agent_id not in asked.no_repeat, "R3: tried again where it failed"
        if self.strategy == "auto" and asked.runs:
            same = [other for other in self.live.values() if other.runs and other.on == lease.agent_id and other.model == asked.model]
            assert len(same) < SLOTS, "R7: more than the slots"
        asked.where, asked.on, asked.renewed_at = "trying", lease.agent_id, now

    def pick(self, among: list[str], data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(among)))

    def where(self, *places: str) -> list[str]:
        return [request_id for request_id, asked in self.live.items() if asked.where in places]

    # ------------------------------------------------------------ nodes

    @precondition(lambda self: len(self.nodes) < 5)
    @rule(models=st.sets(st.sampled_from(MODELS)), agentless=st.booleans())
    def node_comes(self, models: set[str], agentless: bool) -> None:
        self.number += 1
        name, held = f"n{self.number}", tuple(sorted(models))
        if agentless:
            agent_id = AgentId(f"id of {name}")
            node = self.nodes[agent_id] = Node(agentless=True)
            node.heard_at, node.well, node.models = self.world.now, True, held
            self.world.backend(name, *held, loaded=held[:1], slots=SLOTS)
        else:
            agent_id = AgentId(name)
            node = self.nodes[agent_id] = Node(agentless=False)
            node.models, node.heard_at = held, self.world.now
            self.world.register(registration(name, boot=1), agent_id=name)
            self.heartbeat_of(agent_id, well=True)

    def heartbeat_of(self, agent_id: AgentId, *, well: bool, **fields: Any) -> None:
        node = self.nodes[agent_id]
        node.heard_at, node.well = self.world.now, well
        node.sequence += 1
        rows = [row(model) for model in node.models]
        self.world.beat(agent_id, boot=node.boot, sequence=node.sequence, ollama_ok=well, installed_models=rows, **fields)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), well=st.booleans(), loaded=st.sets(st.sampled_from(MODELS)))
    def node_is_heard(self, data: st.DataObject, well: bool, loaded: set[str]) -> None:
        agent_id = AgentId(self.pick(list(self.nodes), data))
        node, rows = self.nodes[agent_id], [row(model) for model in sorted(loaded)]
        if node.agentless:
            node.heard_at, node.well = self.world.now, True
            self.world.poll(agent_id, loaded=rows, installed=[row(model) for model in node.models])
        else:
            self.heartbeat_of(agent_id, well=well, loaded_models=rows)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), loaded=st.sets(st.sampled_from(MODELS)))
    def ps_is_polled(self, data: st.DataObject, loaded: set[str]) -> None:
        agent_id = AgentId(self.pick(list(self.nodes), data))
        self.world.poll(agent_id, alive=False, loaded=[row(model) for model in sorted(loaded)])

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), refused=st.booleans())
    def node_is_silent(self, data: st.DataObject, refused: bool) -> None:
        agent_id = AgentId(self.pick(list(self.nodes), data))
        node = self.nodes[agent_id]
        node.well = node.well and not (refused and node.agentless)
        self.world.silent(agent_id, refused=refused)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data(), command=st.sampled_from((Command.DRAIN, Command.DISCONNECT, Command.DISCONNECT_NOW)))
    def node_is_ordered_out(self, data: st.DataObject, command: Command) -> None:
        agent_id = AgentId(self.pick(list(self.nodes), data))
        self.nodes[agent_id].out = True
        self.world.order(agent_id, command)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def node_is_connected(self, data: st.DataObject) -> None:
        agent_id = AgentId(self.pick(list(self.nodes), data))
        self.nodes[agent_id].out = False
        self.world.order(agent_id, Command.CONNECT)

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def node_is_deleted(self, data: st.DataObject) -> None:
        agent_id = AgentId(self.pick(list(self.nodes), data))
        self.nodes[agent_id].well = False
        self.world.order(agent_id, Command.DELETE)
        del self.nodes[agent_id]

    @precondition(lambda self: any(not node.agentless for node in self.nodes.values()))
    @rule(data=st.data())
    def agent_reboots(self, data: st.DataObject) -> None:
        agent_id = AgentId(self.pick([agent_id for agent_id, node in self.nodes.items() if not node.agentless], data))
        node = self.nodes[agent_id]
        node.boot, node.sequence, node.out, node.well = node.boot + 1, 0, False, False
        self.world.register(registration(agent_id, boot=node.boot), agent_id="not used")
        self.heartbeat_of(agent_id, well=True)

    @precondition(lambda self: any(not node.agentless for node in self.nodes.values()))
    @rule(data=st.data())
    def stale_heartbeat(self, data: st.DataObject) -> None:
        agent_id = self.pick([agent_id for agent_id, node in self.nodes.items() if not node.agentless], data)
        node = self.nodes[AgentId(agent_id)]
        before = self.world.router.agents()
        self.world.beat(agent_id, boot=node.boot, sequence=max(node.sequence, 0), ollama_ok=False)
        assert self.world.router.agents() == before, "R6: an old report changed something"

    # ------------------------------------------------------------ requests

    @precondition(lambda self: len(self.live) < 20)
    @rule(
        model=st.sampled_from((*MODELS, "a", "unknown", None)),
        client=st.sampled_from("xy"),
        route=st.sampled_from((Route.CHAT, Route.CHAT, Route.EMBED, Route.SHOW)),
        options=st.sampled_from(("", "", "num_ctx=4096")),
    )
    def request_comes(self, model: str | None, client: str, route: Route, options: str) -> None:
        self.number += 1
        request_id = f"r{self.number}"
        self.live[request_id] = Asked(model, route)
        self.world.ask(request_id, model, client=client, route=route, runner_options=options)

    @precondition(lambda self: self.where("trying"))
    @rule(data=st.data())
    def first_byte(self, data: st.DataObject) -> None:
        request_id = self.pick(self.where("trying"), data)
        self.live[request_id].where, self.live[request_id].first = "streaming", True
        self.world.first(request_id)

    @precondition(lambda self: self.where("trying"))
    @rule(data=st.data(), failure=st.sampled_from(list(Failure)), status=st.sampled_from((400, 404, 499, 500, 501, 503, 503, 503)))
    def attempt_fails(self, data: st.DataObject, failure: Failure, status: int) -> None:
        request_id = self.pick(self.where("trying"), data)
        asked = self.live[request_id]
        agent_id = asked.on
        assert agent_id is not None
        busy = failure is Failure.ANSWERED and status == 503
        if not busy and (failure is not Failure.NOT_TAKEN or asked.tries[agent_id] > 1):
            asked.no_repeat[agent_id] = None
        if failure is Failure.REFUSED and agent_id in self.nodes and self.nodes[agent_id].agentless:
            self.nodes[agent_id].well = False
        asked.where, asked.on = None, None
        text = {400: "m does not support tools", 404: "model not found", 500: "CUDA error: out of memory"}.get(status, "")
        self.world.fail(request_id, failure, status if failure is Failure.ANSWERED else 0, text)
        assert self.live[request_id].where is not None, "nothing was said of a failed attempt"

    @precondition(lambda self: self.where("trying", "streaming"))
    @rule(data=st.data(), delivered=st.booleans())
    def edge_sees_the_end(self, data: st.DataObject, delivered: bool) -> None:
        request_id = self.pick(self.where("trying", "streaming"), data)
        asked = self.live[request_id]
        asked.where, asked.on, asked.renewed_at = "freed", None, self.world.now
        asked.first = asked.first or delivered
        self.world.free(request_id, delivered=delivered)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), ending=st.sampled_from((Ending.SUCCESS, Ending.SUCCESS, Ending.ERROR, Ending.CANCELLED)), fault=st.booleans())
    def request_ends(self, data: st.DataObject, ending: Ending, fault: bool) -> None:
        request_id = self.pick(list(self.live), data)
        asked = self.live.pop(request_id)
        self.gone[request_id] = None
        node_fault = Failure.DIED if fault and asked.first and ending is Ending.ERROR else None
        told = usage() if ending is Ending.SUCCESS and asked.first else None
        self.world.settle(request_id, ending, node_fault=node_fault, usage=told)
        assert request_id in self.recorded, "R2: settled and not recorded"

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def late_report(self, data: st.DataObject) -> None:
        request_id = self.pick(list(self.gone), data)
        self.world.first(request_id)
        self.world.fail(request_id, Failure.DIED)
        self.world.settle(request_id)

    @rule()
    def pulse(self) -> None:
        heard = tuple(agent_id for agent_id in sorted(self.nodes) if self.where("streaming"))
        for agent_id in heard:
            node = self.nodes[agent_id]
            if self.world.state(agent_id) in ("ready", "initializing", "draining"):
                node.heard_at = self.world.now
        for asked in self.live.values():
            if asked.where != "freed":
                asked.renewed_at = self.world.now
        self.world.pulse(*self.live, heard=heard)

    @rule(seconds=st.sampled_from((1 / 64, 0.5, 1.0, 2.0, 7.5, 20.0, 31.0, 61.0)))
    def time_passes(self, seconds: float) -> None:
        self.world.wait(seconds)

    # ------------------------------------------------------------ the end: everything heals

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for view in self.world.router.agents():
            self.nodes[view.id].well = False
            self.world.order(view.id, Command.DELETE)
            del self.nodes[view.id]
        self.nodes[AgentId("id of healer")] = node = Node(agentless=True)
        node.heard_at, node.well, node.models = self.world.now, True, (*MODELS, "unknown")
        self.world.backend("healer", *MODELS, "unknown", slots=SLOTS)
        for _ in range(1000):
            able = self.where("trying", "streaming", "answered", "freed")
            if able:
                request_id = sorted(able)[0]
                self.live.pop(request_id)
                self.world.settle(request_id)
            elif self.live:
                node.heard_at = self.world.now
                self.world.pulse(heard=(AgentId("id of healer"),))
                self.world.wait(1.0)
        assert not self.live, f"L1: never settled: {sorted(self.live)}"
        statistics = self.world.router.statistics()
        assert (statistics.in_flight, statistics.waiting, statistics.in_flight_by_agent) == (0, 0, {}), "L2: something is left"


TestWeather = Weather.TestCase
TestWeather.settings = settings(max_examples=120, stateful_step_count=50, report_multiple_bugs=False)


# ---------------------------------------------------------------- the checks bite


def busy_world() -> World:
    """One request on a node, one that waits, one that was answered."""
    world = World()
    world.backend("one", "m", loaded=("m",))
    world.ask("runs")
    world.ask("waits")
    world.ask("refused", "unknown")
    world.wait(20)
    world.ask("refused too", "unknown")
    return world


def lose_request(router: Router) -> None:
    del router._requests[RequestId("refused too")]


def forget_waiting(router: Router) -> None:
    router._queue.remove(RequestId("waits"))


def phase_without_reason(router: Router) -> None:
    router._requests[RequestId("waits")].phase = Phase.NEW


def forget_answer(router: Router) -> None:
    router._dispatcher.answered.discard(RequestId("refused too"))


def lease_without_request(router: Router) -> None:
    router._requests[RequestId("runs")].lease_id = None


def dead_lease(router: Router) -> None:
    router._requests[RequestId("runs")].lease_id = LeaseId("another")


def too_many_attempts(router: Router) -> None:
    router._requests[RequestId("runs")].spent = 9


def plan_without_waiting(router: Router) -> None:
    router._requests[RequestId("runs")].plan = AgentId("id of one")


def stray_lease(router: Router) -> None:
    router._ledger.grant(Held(LeaseId("stray"), RequestId("nobody"), AgentId("id of one"), None), now=router._now)


def wrong_count(router: Router) -> None:
    router._ledger._on[AgentId("id of one")].clear()


def lease_without_deadline(router: Router) -> None:
    router._ledger._expiry.discard(LeaseId("runs/1"))
    router._ledger._expiry.set(LeaseId("other"), now=router._now)


def lease_of_the_past(router: Router) -> None:
    router._ledger._expiry.ttl_s = 1000.0
    router._ledger._expiry.set(LeaseId("runs/1"), now=router._now)


def plan_of_nobody(router: Router) -> None:
    router._dispatcher._planned.clear()


def passed_deadline(router: Router) -> None:
    router._registry._expiry.until_of[AgentId("id of one")] = router._now


class _WithoutDeadlines(Router):
    """Never due."""

    __slots__ = ()

    def next_deadline(self) -> Instant | None:
        return None


def passed_patience(router: Router) -> None:
    waiter = router._queue.remove(RequestId("waits"))
    assert waiter is not None
    router._queue.push(waiter.request_id, waiter.client, waiter.place, deadline=router._now)
    router.__class__ = _WithoutDeadlines


def stale_deadline(router: Router) -> None:
    router.wake.at = Instant(router._now + 1e6)


def one_name_twice(router: Router) -> None:
    router._registry.all()[0].name = router._registry.all()[1].name


def drains_empty(router: Router) -> None:
    router._registry.all()[1].step(AgentInput.DRAIN)


def never_silent(router: Router) -> None:
    router._registry._expiry.discard(AgentId("id of one"))


def ready_unknown(router: Router) -> None:
    router._registry.all()[0].inventory = Inventory()


def listed_wrongly(router: Router) -> None:
    router._registry.all()[1].step(AgentInput.HOLD)


def not_listed(router: Router) -> None:
    router._registry._ready = ()


def report_before_boot(router: Router) -> None:
    agent = router._registry.all()[0]
    agent.boot, agent.last_report = 5, (4, 1)


def kinds_of_nobody(router: Router) -> None:
    router._dispatcher._kinds.clear()


@pytest.mark.parametrize(
    ("damage", "number"),
    [
        (lose_request, "R1"), (forget_waiting, "R1"), (phase_without_reason, "R1"), (forget_answer, "R1"), (stray_lease, "R1"),
        (too_many_attempts, "R3"), (lease_without_request, "R5"), (dead_lease, "R5"), (ready_unknown, "R5"), (listed_wrongly, "R5"),
        (not_listed, "R5"), (report_before_boot, "R6"), (wrong_count, "R7"), (lease_without_deadline, "R8"), (lease_of_the_past, "R8"),
        (passed_patience, "R11"), (plan_without_waiting, "R12"), (plan_of_nobody, "R12"), (kinds_of_nobody, "R12"),
        (passed_deadline, "R13"), (stale_deadline, "R13"),
        (drains_empty, "R15"), (one_name_twice, "R18"), (never_silent, "R18"),
    ],
)  # fmt: skip
def test_damage_is_found(damage: Callable[[Router], None], number: str) -> None:
    world = busy_world()
    world.backend("two")
    check(world.router, now=Instant(world.now))
    damage(world.router)
    with pytest.raises(AssertionError, match=f"^{number}:?"):
        check(world.router, now=Instant(world.now))
