"""Where a request goes now: to a node, into the queue, or back to its client.

Decides by composing eligibility (`registry`, `health`), the strategy's choice (`scoring`) and the queue's order; the one place that
grants leases. Knows events only as far as a request carries its own; time passes in `core.router`.

How waiting works. A request waits when its best choice is a full node: that node is its plan. Whenever something may have changed
(`look`), waiting requests are looked at in the queue's order, each with those before it counted as work ahead on the nodes they
plan for. So the first few wait for a warm node, and the one for whom loading elsewhere is quicker by then takes the idle one. Equal
requests are not scored one by one: a choice says how many more of its kind would choose the same.

Invariants: R3 a node that was tried is not tried again while another one is eligible; R5 a lease is only granted on a node that is READY
and holds the model; R12 after `look` no request waits whose plan could start now.
"""

from typing import Final

from core import slots
from core.affinity import Affinity
from core.aliases import turned
from core.config import RouterConfig
from core.displacement import Displacement
from core.events import Count, Effect, Failure, Forward, Lease, PassOn, Record, Refuse, Wait
from core.explained import Explained, Raw
from core.health import Health
from core.inventory import Loading
from core.leaks import Leaks
from core.learning import Speeds
from core.leases import NONE, Expiry, Held, Ledger
from core.lifecycle import AgentState
from core.names import display
from core.obstacles import Obstacles
from core.parts import Part
from core.queue import FairQueue
from core.registry import Agent, Registry
from core.requests import BUSY_TEXT, Kind, Phase, Request, gave_up, not_found
from core.scoring import MANY, Choice, Load, Strategy, best_first, some_best
from core.units import MICROS_PER_S, AgentId, Instant, LeaseId, Micros, ModelKey, RequestId
from core.views import Candidate, Decision, Explanation
from core.warm import Glance, Row

RETRY_AFTER_MAX_S: Final = 60

BURST_S: Final = 4.0
"""What the fleet does in so long one client may have waiting before those who have less waiting come before it."""

SHORTEST_WAIT_S: Final = 0.001
"""A deadline lies ahead, whatever rounding has made of what is left."""


_TRYING: Final = Phase.TRYING  # members of enumerations cost a Python call each where they are looked up (up to CPython 3.11)
_WAITING: Final = Phase.WAITING
_DRAINING: Final = AgentState.DRAINING
_Forward: Final = Forward  # compiled code looks up by name what it imports of other code, but not what is final here
_Lease: Final = Lease


class Dispatcher(Part):
    """Places requests on nodes. Its parts are the router's own, shared with it."""

    __slots__ = (
        "_chosen", "_config", "_explained", "_health", "_holders", "_kinds", "_of", "_on", "_planned", "_registry", "_ring",
        "_ring_at", "_ring_max", "_speeds", "_strategy", "affinity", "answered", "grace_until", "leaks", "ledger", "loads", "obstacles",
        "owed", "queue", "reloads", "reloads_avoided", "requests", "stirred",
    )  # fmt: skip

    def __init__(
        self,
        config: RouterConfig,
        registry: Registry,
        health: Health,
        speeds: Speeds,
        strategy: Strategy,
        displacement: Displacement,
        *,
        now: Instant,
    ) -> None:
        self._config = config
        self._registry = registry
        self._health = health
        self._speeds = speeds
        self._strategy = strategy
        self.loads = self.reloads = self.reloads_avoided = 0
        """Loads begun, those of them that replaced a runner with other options, and requests that would have brought about one more."""
        self.stirred = False
        """Whether others should be looked at: somebody may have left who needed a barrier, or a model that others wait for is loaded
        beside another one."""
        self.requests: dict[RequestId, Request] = {}
        self.ledger = Ledger(config.lease_ttl_s)
        self._on, self._of = self.ledger.by_agent(), self.ledger.by_model()
        self._holders = registry.known_holders
        self.obstacles = Obstacles(self.ledger, displacement, speeds, makes_room=strategy.makes_room)
        self.affinity = Affinity(registry.get)
        self.leaks = Leaks(self.ledger, self.requests, speeds)
        self.queue = FairQueue(config)
        self.answered: Expiry[RequestId] = Expiry(config.lease_ttl_s)
        """Requests that a shell was told to answer itself, until it says that it did."""
        self.owed: Expiry[RequestId] = Expiry(config.report_s)
        """Requests whose leases were given back early, until their end is told."""
        self.grace_until: Instant | None = Instant(now + config.startup_grace_s)
        """Until then nodes that were not heard since the start are waited for; None: that is over."""
        self._planned: dict[AgentId, int] = {}
        self._kinds: dict[Kind, int] = {}
        self._chosen = 0
        self._explained: dict[RequestId, Explained] = {}
        self._ring: list[RequestId] = []
        """The requests in it; the oldest stands at `_ring_at` once there are `explain_ring`."""
        self._ring_at = 0
        self._ring_max = config.explain_ring

    @property
    def has_barriers(self) -> bool:
        """Whether some node gets no new requests for some model, to get rid of it."""
        return bool(self.obstacles.barriers)

    # ------------------------------------------------------------ placing

    def place(self, request: Request, effects: list[Effect], now: Instant) -> None:
        """Forward it, let it wait, or answer it."""
        nodes = self._candidates(request, now)
        if not nodes:
            self._without_nodes(request, effects, now=now)
            return
        choice = self._choose(request, nodes, self._planned, now)
        why = None if choice.warm is not None else self.obstacles.of(request, choice, now=now)
        if why is None:
            self._forward(request, choice, effects, now)
        else:
            self._wait(request, why, choice, effects, now=now)

    def look(self, effects: list[Effect], *, now: Instant) -> None:
        """Something may have changed: look at everybody who waits, in order."""
        self.obstacles.clear()
        self.stirred = False
        ahead: dict[AgentId, int] = {}
        settled: dict[Kind, tuple[AgentId | None, int | None]] = {}
        """Kinds that need no look: what they wait for, and up to how many ahead there (None: whatever comes)."""
        final: dict[Kind, None] = {}
        for request_id in self.queue.in_order():
            request = self.requests[request_id]
            known = settled.get(request.kind)
            if known is not None and (known[1] is None or known[0] is None or ahead.get(known[0], 0) < known[1]):
                self._plan(request, known[0], ahead)
                continue
            choice = self._look_at(request, ahead, effects, now=now)
            if request.phase is _TRYING and self.stirred:
                return  # those before it may go now: they come first, in the next look
            if request.phase is not _WAITING:
                continue
            plan = None if choice is None else choice.agent.id
            self._plan(request, plan, ahead)
            if choice is not None and choice.room and request.plan is not None:
                # It waits for a load there: as many of its kind as will be served together wait with it.
                settled[request.kind] = (request.plan, ahead[request.plan] + self._slots(choice.agent, request))
            elif choice is None or choice.patience is None:
                settled[request.kind] = (plan, None)
                final[request.kind] = None
                if len(final) == len(self._kinds):
                    return
            else:
                settled[request.kind] = (plan, ahead[choice.agent.id] + choice.patience)

    def _slots(self, agent: Agent, request: Request) -> int:
        return agent.slots if request.key is None else agent.slots_for(request.key)

    def leave(self, request: Request, *, now: Instant) -> None:
        """It does not wait any more."""
        if self.queue.remove(request.id) is None:
            return
        request.waited_s += now - request.waiting_since
        self._plan(request, None, {})
        kind = request.kind
        left = self._kinds[kind] - 1
        if left:
            self._kinds[kind] = left
        else:
            del self._kinds[kind]

    def release(self, request: Request, effects: list[Effect], now: Instant) -> None:
        """Its attempt is over: give up the lease."""
        if request.lease_id is not None and self.ledger.release(request.lease_id) is not None:
            self.freed(request, effects, now)

    def freed(self, request: Request, effects: list[Effect], now: Instant) -> None:
        """Its lease is gone: so is what it held on the node."""
        request.lease_id = None
        agent = request.agent
        assert agent is not None, "a lease without a node"
        agent_id, key, inventory = agent.id, request.ask.key, agent.inventory
        held = self._on.get(agent_id)
        in_flight = len(held) if held else 0
        agent.works_on(in_flight)
        if key is not None and not (in_flight and agent_id in self._of.get(key, NONE)):
            inventory.used_at[key] = now
        leaks = self.leaks
        if leaks.flagged or leaks.watched:
            leaks.ended(request, agent, now=now)
        loading = inventory.loading
        if loading and request.first_byte_at is None and request.key in loading:
            # Ollama gives up a load whose first request leaves, and starts it again for whoever waits for it.
            if not self.ledger.of_model(request.key).get(agent_id):
                inventory.breaks_off(request.key)
            elif request.cold:
                loading[request.key] = Loading(now, loading[request.key].expected_s, loading[request.key].options)
        if not in_flight and agent.state is _DRAINING:
            effects += self._registry.emptied(agent)

    def give_up(self, request: Request, effects: list[Effect], *, now: Instant) -> None:
        """Nothing is left to try: the last node's own answer, else the router's."""
        failed, verdict = request.failed, request.verdict
        if failed is not None and verdict is not None and verdict.own_answer:
            retry_after_s = self._retry_after_s() if failed.status == 503 else None
            self.answer(request, PassOn(request_id=request.id, retry_after_s=retry_after_s), "node answer", effects, now=now)
        else:
            self.answer(request, gave_up(request), "node failure", effects, now=now)

    def time_out(self, request: Request, effects: list[Effect], *, now: Instant) -> None:
        """It has waited long enough."""
        failed = request.failed
        if failed is not None and failed.failure is Failure.ANSWERED and failed.status == 503:
            self.give_up(request, effects, now=now)
        else:
            self.answer(request, self._busy(request), "waited too long", effects, now=now)

    def answer(self, request: Request, effect: Refuse | PassOn, reason: str, effects: list[Effect], *, now: Instant) -> None:
        """Have the shell answer it without a node."""
        self.leave(request, now=now)
        self.stirred = self.has_barriers
        request.phase = Phase.ANSWERED
        self.answered.set(request.id, now=now)
        effects.append(effect)
        if isinstance(effect, Refuse):
            effects.append(Count(name="refused_total", labels={"reason": reason}))
            self._explain(request, f"refused: {effect.text}", [], None, now)
        else:
            self._explain(request, "the node's own answer", [], None, now)

    # ------------------------------------------------------------ for showing

    def explanation(self, request_id: RequestId) -> Explanation | None:
        """Why a recent request went where it went; None when it is not known (any more)."""
        known = self._explained.get(request_id)
        if known is None:
            return None
        predicted, observed = known.expected_ms, known.observed_ms
        return Explanation(
            request_id=request_id,
            model=known.model,
            strategy=self._config.strategy,
            decisions=[self._readable(raw) for raw in known.made()],
            predicted_start_ms=predicted,
            observed_start_ms=observed,
            start_error_ms=None if predicted is None or observed is None else observed - predicted,
        )

    def started(self, request: Request, record: Record) -> None:
        """Keep with the request when it was expected to start, and when it did (ms since it came)."""
        known = self._explained.get(request.id)
        if known is not None:
            known.expected_ms, known.observed_ms = request.predicted_ms, record.observed_start_ms

    def explained(self, request_id: RequestId) -> bool:
        """Whether it is one of the recent requests."""
        return request_id in self._explained

    def check(self) -> None:
        """Recompute what is kept for speed.

        Raises:
            AssertionError: it differs.
        """
        planned: dict[AgentId, int] = {}
        kinds: dict[Kind, int] = {}
        for request_id in self.queue.in_order():
            request = self.requests[request_id]
            kinds[request.kind] = kinds.get(request.kind, 0) + 1
            if request.plan is not None:
                planned[request.plan] = planned.get(request.plan, 0) + 1
        assert planned == self._planned, "R12: planned work is not that of the waiting requests"
        assert kinds == self._kinds, "R12: kinds are not those of the waiting requests"

    # ------------------------------------------------------------ choosing

    def _candidates(self, request: Request, now: Instant) -> tuple[Agent, ...]:
        """The eligible nodes."""
        nodes = self._registry.ready() if request.key is None else self._registry.holders(request.key)
        if not self._health.quiet or request.tried or request.busy:
            nodes = self._healthy(request, nodes, now=now)
        elif request.barred:
            request.barred = {}
        if self.obstacles.barriers or self.leaks.quarantine or request.unload:
            nodes = self._free(request, nodes)
        return nodes

    def _free(self, request: Request, nodes: tuple[Agent, ...]) -> tuple[Agent, ...]:
        """Those that are not kept from new requests for the model; to unload it, those that have it in memory."""
        if self.obstacles.barriers and request.ask.needs_slot:
            nodes = tuple(node for node in nodes if not self.obstacles.keeps_away(request, node))
        if self.leaks.quarantine:
            nodes = tuple(node for node in nodes if not self.leaks.quarantined(node.id, request.key))
        if request.unload:
            nodes = tuple(node for node in nodes if request.key in node.inventory.resident) or nodes
        return nodes

    def _healthy(self, request: Request, nodes: tuple[Agent, ...], *, now: Instant) -> tuple[Agent, ...]:
        """Those that were not tried, are not paused and not ejected. When all that is left is ejected: the least bad."""
        health, key = self._health, request.key
        good: list[Agent] = []
        ejected: list[tuple[float, Instant, int, Agent]] = []
        barred: dict[str, str] = {}
        paused = False
        for node in nodes:
            if node.id in request.tried or node.id in request.busy:
                barred[node.name] = "was tried for this request"
            elif health.paused_until(node.id, key, now=now) is not None:
                barred[node.name] = "said that it is busy"
                paused = True
            elif (ejection := health.ejection(node.id, key, now=now)) is not None:
                barred[node.name] = f"is passed over: {ejection.why}"
                ejected.append((ejection.length_s, ejection.until, node.last_chosen, node))
            else:
                good.append(node)
        request.barred = barred
        if good or paused or request.busy or not ejected:
            return tuple(good)
        return (min(ejected, key=lambda entry: entry[:3])[3],)

    def _choose(self, request: Request, nodes: tuple[Agent, ...], ahead: dict[AgentId, int], now: Instant) -> Choice:
        key = request.ask.key
        if request.prefixes and request.phase is not _WAITING and key is not None:
            request.cached = self.affinity.known(key, request.prefixes, request.ask.input_tokens)
        of_model = NONE if request.key is None else self._of.get(request.key, NONE)
        news = self._registry.news
        if key is not None and nodes is self._holders.get(key):  # a tuple of a decision's own would have a board of its own
            choice = self._strategy.at_once(request.ask, nodes, of_model, ahead, request.cached, news.changes)
            if choice is not None:  # it begins at once
                if request.predicted_ms is None:
                    request.predicted_ms = 0.0
                return choice
        load = Load(self._on, of_model, ahead, request.cached, news.count)
        choice = self._strategy.choose(request.ask, nodes, load, now=now)
        request.expected_at = Instant(now + choice.start_us / MICROS_PER_S)
        if request.predicted_ms is None:
            request.predicted_ms = choice.start_us / 1000
        return choice

    def _look_at(self, request: Request, ahead: dict[AgentId, int], effects: list[Effect], *, now: Instant) -> Choice | None:
        """Decide anew about one that waits. Returns the choice, if there is a node to choose."""
        nodes = self._candidates(request, now)
        if not nodes and request.busy:
            self._ask_again(request)
            nodes = self._candidates(request, now)
        if not nodes:
            self._without_nodes(request, effects, now=now)
            return None
        choice = self._choose(request, nodes, ahead, now)
        why = self.obstacles.of(request, choice, now=now)
        if why is None:
            self._forward(request, choice, effects, now)
        else:
            request.why = why
        return choice

    def _forward(self, request: Request, choice: Choice, effects: list[Effect], now: Instant) -> None:
        if request.phase is _WAITING:
            self.leave(request, now=now)
        agent = choice.agent
        attempt = request.attempt = request.attempt + 1
        lease_id = LeaseId(request.id + "/1" if attempt == 1 else f"{request.id}/{attempt}")  # numbers take long to write
        request.agent, request.lease_id, request.started_at, request.phase = agent, lease_id, now, _TRYING
        unload: tuple[str, ...] = ()
        if request.victims:
            for victim in request.victims:
                agent.inventory.saw_unloaded(victim, now=now)
            unload, request.victims = tuple([display(victim) for victim in request.victims]), ()
        key = request.ask.key
        request_id, agent_id = request.id, agent.id
        beside = self.ledger.grant(Held(lease_id, request_id, agent_id, key), now)
        self._chosen += 1
        agent.takes(len(self._on[agent_id]), self._chosen)
        if key is not None and request.ask.needs_slot:
            request.beside = beside
            if beside >= (agent.limits.get(key, agent.slots) if agent.limits else agent.slots):
                slots.sent(agent, key, beside, now=now)
        if request.cold:
            request.cold = False
        raised = None
        if key is not None and not request.unload:
            raised = agent.inventory.raised(key, request.ask.options) if request.ask.options else None
            if choice.warm is None:
                self._begin_load(request, agent, key, effects, now=now)
        if self.leaks.flagged:
            self.leaks.began(request, agent, now=now)
        if not self._health.quiet:
            self._health.began(agent_id, request.key, request_id)
        lease = _Lease(lease_id, request_id, agent_id, agent.name, agent.upstream, attempt)
        effects.append(_Forward(request_id, lease, unload, request.renamed, raised))
        if (choice.spared or request.held or raised is not None) and not request.cold:
            self.reloads_avoided += 1
            effects.append(Count(name="reloads_avoided_total", labels={"agent": agent.name}))
        self._explain(request, "forwarded", choice.rows if choice.warm is None else choice.warm, agent_id, now)

    def _begin_load(self, request: Request, agent: Agent, key: ModelKey, effects: list[Effect], *, now: Instant) -> None:
        """If the node must load the model for it, remember that it is at it."""
        inventory = agent.inventory
        reload = key in inventory.resident
        if reload and not inventory.needs_reload(key, request.ask.options):
            return
        if key not in inventory.loading:
            if reload:
                inventory.saw_unloaded(key, now=now)
                self.reloads += 1
                effects.append(Count(name="reloads_total", labels={"agent": agent.name}))
            request.cold = True
            request.alone = not inventory.loading
            size = inventory.installed[key].size_bytes
            load_us = self._speeds.rates(agent.id, key, size_bytes=size, slots=agent.slots_for(key)).load_us
            self.stirred = self.stirred or reload or bool(inventory.loading)  # who waits for this model may go with it now
            inventory.begins(key, Loading(now, load_us / MICROS_PER_S, request.ask.options))
            self.loads += 1
            effects.append(Count(name="loads_total", labels={"agent": agent.name}))

    # ------------------------------------------------------------ waiting

    def _wait(self, request: Request, why: str, choice: Choice | None, effects: list[Effect], *, now: Instant) -> None:
        """Let it wait, if there is room in the queue."""
        request.why = why
        if request.phase is Phase.WAITING:
            return
        if request.attempt:
            place = self.queue.first_place(request.number)
        elif self.queue.full:
            self.answer(request, self._busy(request), "queue full", effects, now=now)
            return
        elif self.queue.client_full(request.client):
            text = f"{self._config.queue_per_client} of your requests are waiting already; try again when some of them were answered"
            refuse = Refuse(request_id=request.id, status=429, text=text, retry_after_s=self._retry_after_s())
            self.answer(request, refuse, "client full", effects, now=now)
            return
        else:
            cost = Micros(choice.work_us if choice is not None else 1)
            burst = round(BURST_S * MICROS_PER_S) * len(self._registry.ready())
            place = self.queue.new_place(request.client, cost=cost, number=request.number, burst=burst)
        if request.cached and len(self._registry.ready()) > MANY:
            request.cached = {}  # that would make too many kinds
        left_s = max(self._config.queue_timeout_s - request.waited_s, SHORTEST_WAIT_S)
        self.queue.push(request.id, request.client, place, deadline=Instant(now + left_s))
        request.phase = Phase.WAITING
        request.waiting_since = now
        self._kinds[request.kind] = self._kinds.get(request.kind, 0) + 1
        self._plan(request, None if choice is None else choice.agent.id, {})
        effects.append(Wait(request_id=request.id, position=self.queue.position(request.id), why=why))
        self._explain(request, why, [] if choice is None else choice.rows, request.plan, now)

    def _plan(self, request: Request, plan: AgentId | None, ahead: dict[AgentId, int]) -> None:
        """Note what a waiting request waits for, here and in `ahead`."""
        if plan is not None:
            ahead[plan] = ahead.get(plan, 0) + 1
        if plan == request.plan:
            return
        if request.plan is not None:
            left = self._planned[request.plan] - 1
            if left:
                self._planned[request.plan] = left
            else:
                del self._planned[request.plan]
        if plan is not None:
            self._planned[plan] = self._planned.get(plan, 0) + 1
        request.plan = plan

    def _without_nodes(self, request: Request, effects: list[Effect], *, now: Instant) -> None:
        """No node is eligible: wait for one, or say why there is none."""
        kind = request.kind
        if request.came.others and turned(request, self._registry):
            self._recount(request, kind)
            self.place(request, effects, now)
            return
        ready = self._registry.ready() if request.key is None else self._registry.holders(request.key)
        untried = [node for node in ready if node.id not in request.tried]
        if untried:
            # All of these are busy: they said 503, to this request or to another one.
            self._ask_again(request)
            self._wait(request, "waits for a node that is not too busy", None, effects, now=now)
        elif ready or request.attempt:
            self._tried_all(request, ready, effects, now=now)
        elif self.grace_until is not None and now < self.grace_until and self._registry.awaited():
            self._wait(request, "waits for nodes that were not heard since the start", None, effects, now=now)
        else:
            self._nobody_ready(request, effects, now=now)

    def _ask_again(self, request: Request) -> None:
        """Nobody else is left: the nodes that said 503 to it count like any other. It is of another kind then."""
        kind = request.kind
        request.busy.clear()
        self._recount(request, kind)

    def _recount(self, request: Request, kind: Kind) -> None:
        """It was of this kind; if it waits, it counts as of its present one."""
        if request.phase is _WAITING and kind != request.kind:
            self._kinds[kind] -= 1
            if not self._kinds[kind]:
                del self._kinds[kind]
            self._kinds[request.kind] = self._kinds.get(request.kind, 0) + 1

    def _tried_all(self, request: Request, ready: tuple[Agent, ...], effects: list[Effect], *, now: Instant) -> None:
        """Every eligible node was tried. One that had not even taken the request may be tried once more."""
        failed = request.failed
        agent = request.agent
        if (
            failed is not None
            and failed.failure is Failure.NOT_TAKEN
            and agent in ready
            and agent is not None
            and request.tried[agent.id] == 1
        ):
            request.tried[agent.id] = 2
            self._forward(request, Choice(agent, room=True, rows=[]), effects, now)
        else:
            self.give_up(request, effects, now=now)

    def _nobody_ready(self, request: Request, effects: list[Effect], *, now: Instant) -> None:
        """No node that holds it is ready."""
        key = request.key
        listed = [] if key is None else self._registry.listed_by(key)
        if not listed:
            self.answer(request, not_found(request.came, request.key), "model unknown", effects, now=now)
            return
        starting = [agent for agent in listed if agent.state is AgentState.INITIALIZING and agent.id not in request.tried]
        if starting:
            self._wait(request, f"waits for {starting[0].name}, which is starting", None, effects, now=now)
            return
        names = ", ".join(agent.name for agent in listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
        text = f"model '{request.came.model}' is only on nodes that take no requests now: {names}; try again when one of them is back"
        refuse = Refuse(request_id=request.id, status=503, text=text, retry_after_s=self._retry_after_s())
        self.answer(request, refuse, "nodes asleep", effects, now=now)

    def _busy(self, request: Request) -> Refuse:
        return Refuse(request_id=request.id, status=503, text=BUSY_TEXT, retry_after_s=self._retry_after_s())

    def _retry_after_s(self) -> int:
        """After the longest pause of a busy node somebody may have room again."""
        return max(1, min(round(self._config.busy_pause_max_s), RETRY_AFTER_MAX_S))

    # ------------------------------------------------------------ explaining

    def _explain(self, request: Request, outcome: str, rows: list[Row] | Glance, chosen: AgentId | None, now: Instant) -> None:
        out = self._registry.out(request.key)
        if request.barred:
            out = {**out, **request.barred}
        after_s, kept = now - request.at, some_best(rows, chosen) if isinstance(rows, list) else rows
        known = self._explained.get(request.id)
        if known is None:
            self._explained[request.id] = Explained(request.came.model, after_s, outcome, kept, chosen, out)
            ring, at = self._ring, self._ring_at
            if len(ring) < self._ring_max:
                ring.append(request.id)
                return
            del self._explained[ring[at]]
            ring[at] = request.id
            self._ring_at = at + 1 if at + 1 < len(ring) else 0
        else:
            known.add((after_s, outcome, kept, chosen, out))

    def _readable(self, raw: Raw) -> Decision:
        after_s, outcome, rows, chosen, out = raw
        candidates = [
            Candidate(
                agent_id=row[0].id,
                name=row[0].name,
                score=Micros(row[1]),
                parts=dict(zip(self._strategy.part_names, row[2:], strict=False)),
                chosen=row[0].id == chosen,
            )
            for row in best_first(rows if isinstance(rows, list) else rows.rows())
        ]
        return Decision(after_ms=after_s * 1000, outcome=outcome, candidates=candidates, out=dict(out))
