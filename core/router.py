"""The composition of everything that is decided: what happened goes in, what must be done comes out.

Driven by three inputs: events from shells (`handle`), time (`tick`), and nothing else. This module knows the life of a request and which
part of the core each event concerns; where a request goes is `core.dispatch`'s decision, whose fault a failure was is
`core.health`'s, what an agent may say is `core.registry`'s.

Invariants (numbers as in `core.invariants`):
* R1, R2: a request is waiting, on a node, done there, or answered, until it is settled once; then it is forgotten. Late reports change
  nothing.
* R4: no attempt begins after a first byte, but one that its shell asks for to resume the answer.
* R13: `now` never goes back; after `tick(now)`, `next_deadline()` is None or later; a second `tick` at the same time returns nothing.
* Deadlines that have passed come into force before an event is looked at, also when nobody called `tick`.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

from core import slots
from core.advice import Prompts, Question, question
from core.agents import Agent
from core.config import RouterConfig
from core.dispatch import Dispatcher
from core.displacement import Displacement
from core.errors import LocalError
from core.events import (
    AgentCommanded,
    AgentRegistered,
    AgentRestored,
    AttemptEnded,
    BackendAdded,
    Count,
    Cut,
    Effect,
    Ending,
    Event,
    Failure,
    FirstByte,
    Freed,
    HeartbeatCame,
    MetricsCame,
    NodePolled,
    NodeSilent,
    Note,
    Pulse,
    RequestCame,
    SettingsChanged,
    Settled,
)
from core.fleet import NodeInventory
from core.health import Cost, Ejection, Fault, Health, Verdict, classify
from core.heat import Heat
from core.learning import Speeds
from core.leases import Wake
from core.lifecycle import AgentState
from core.names import display, is_cloud, key_or_none
from core.parts import Part
from core.registry import Registry
from core.requests import Phase, Request, begin, cloud_off, expected_output
from core.restoring import agent_of, known_of
from core.resume import begin_resume, thinks
from core.runner_options import canonical
from core.scoring import Ask, strategy
from core.units import NEVER, AgentId, Instant, RequestId
from core.views import AgentView, EjectionView, Explanation, Statistics, WaitingView

__all__ = ["AgentView", "Explanation", "Router", "Statistics", "WaitingView"]

# Members of enumerations cost a Python call each where they are looked up (up to CPython 3.11); and compiled code looks up by name what it
# imports of other code, but not what is final here.
_TRYING: Final = Phase.TRYING
_STREAMING: Final = Phase.STREAMING
_WAITING: Final = Phase.WAITING
_ANSWERED: Final = Phase.ANSWERED
_FREED: Final = Phase.FREED
_SUCCESS: Final = Ending.SUCCESS
_RequestCame: Final = RequestCame
_Settled: Final = Settled

WHY_MAX: Final = 200
"""Characters of a node's error text that logs and ejections quote."""


class Router(Part):
    """One per coordinator."""

    __slots__ = (
        "_barriers", "_came", "_clocks", "_config", "_dispatcher", "_displacement", "_handlers", "_health", "_heat", "_leaks",
        "_ledger", "_look", "_now", "_prompts", "_queue", "_registry", "_requests", "_settled_total", "_speeds", "wake",
    )  # fmt: skip

    def __init__(self, config: RouterConfig, *, now: Instant) -> None:
        self._config = config
        self._now = now
        self._speeds = Speeds(config)
        self._health = Health(config)
        self._registry = Registry(config, in_flight=lambda agent_id: self._dispatcher.ledger.in_flight(agent_id))
        self._heat = Heat()
        self._prompts = Prompts()
        self._displacement = displacement = Displacement(
            self._speeds, self._heat, ready=self._registry.ready, in_flight=lambda key: self._dispatcher.ledger.of_model(key)
        )
        chosen = strategy(config, self._speeds, displacement)
        self._dispatcher = Dispatcher(config, self._registry, self._health, self._speeds, chosen, displacement, now=now)
        self._ledger = self._dispatcher.ledger
        self._queue = self._dispatcher.queue
        self._leaks = self._dispatcher.leaks
        self._barriers = self._dispatcher.obstacles.barriers
        self._requests = self._dispatcher.requests
        self._came = 0
        self._settled_total = 0
        self._look = False
        """Whether somebody who waits may be able to go since the last look."""
        self._clocks = (
            self._ledger.deadlines, self._dispatcher.answered, self._dispatcher.owed, self._registry.deadlines, self._queue, self._health,
            self._dispatcher.obstacles.alarm, self._dispatcher.leaks,
        )  # fmt: skip
        """Everything that something is due of: each has its `earliest`."""
        self.wake = Wake()
        """When to call `tick`, in one number that is cheap to read with every event: never later than `next_deadline`."""
        for clock in self._clocks:
            clock.wake = self.wake
        self._set_wake()
        self._handlers: dict[type, Callable[[Any, list[Effect], Instant], None]] = {
            FirstByte: self._first_byte,
            AttemptEnded: self._attempt_ended,
            Freed: self._freed,
            Pulse: self._pulse,
            AgentRegistered: lambda event, effects, now: effects.extend(self._registry.registered(event, now=now)),
            HeartbeatCame: self._heartbeat_came,
            MetricsCame: lambda event, effects, now: effects.extend(self._registry.metrics(event, now=now)),
            BackendAdded: lambda event, effects, now: effects.extend(self._registry.backend_added(event, now=now)),
            AgentRestored: self._agent_restored,
            NodePolled: lambda event, effects, now: effects.extend(self._registry.polled(event, now=now)),
            NodeSilent: lambda event, effects, now: effects.extend(self._registry.silent(event)),
            SettingsChanged: lambda event, effects, now: effects.extend(self._registry.settings(event)),
            AgentCommanded: lambda event, effects, now: effects.extend(self._registry.command(event, now=now)),
        }

    # ------------------------------------------------------------ the three inputs

    def handle(self, event: Event, now: Instant) -> list[Effect]:
        """`event` happened. Returns what must be done about it, in order.

        Raises:
            LocalError: the shell broke the order of events that `core.events` describes.
        """
        assert now >= self._now, f"R13: time went back from {self._now} to {now}"
        effects: list[Effect] = self.tick(now=now) if self.wake.at <= now else []
        self._now = now
        if type(event) is _RequestCame:  # it and the next are most of all
            self._request_came(event, effects, now)
        elif type(event) is _Settled:
            self._settled(event, effects, now)
        else:
            self._handlers[type(event)](event, effects, now)
        if self._look and not self._queue.waiters and not self._barriers:
            self._look = False  # nobody is there to look at
        if self._look or self._dispatcher.stirred or self._registry.changes.any:
            self._follow(effects, now)
        return effects

    def tick(self, *, now: Instant) -> list[Effect]:
        """Time passed: bring into force what was due."""
        assert now >= self._now, f"R13: time went back from {self._now} to {now}"
        self._now = now
        effects: list[Effect] = []
        for held in self._ledger.expire(now=now):
            self._abandon(self._requests[held.request_id], effects, now)
        for request_id in [*self._dispatcher.answered.due(now=now), *self._dispatcher.owed.due(now=now)]:
            self._abandon(self._requests[request_id], effects, now)
        effects += self._registry.expire(now=now)
        for request_id in self._queue.due(now=now):
            self._dispatcher.time_out(self._requests[request_id], effects, now=now)
        if self._leaks.earliest <= now:
            effects += self._leaks.look(now=now)
        if self._health.woken(now=now) | self._dispatcher.obstacles.alarm.rings(now=now):
            self._look = True
        grace = self._dispatcher.grace_until
        if grace is not None and grace <= now:
            self._dispatcher.grace_until = None
            self._look = True
        self._follow(effects, now)
        self._set_wake()
        return effects

    def next_deadline(self) -> Instant | None:
        """When `tick` must be called, if no event comes before."""
        earliest = min([clock.earliest for clock in self._clocks])
        grace = self._dispatcher.grace_until
        earliest = earliest if grace is None else min(grace, earliest)
        return None if earliest == NEVER else earliest

    def _set_wake(self) -> None:
        deadline = self.next_deadline()
        self.wake.at = NEVER if deadline is None else deadline

    # ------------------------------------------------------------ snapshots

    def agents(self) -> list[AgentView]:
        """All agents, the first registered first."""
        return [self._view(agent.id) for agent in self._registry.all()]

    def agent(self, agent_id: AgentId) -> AgentView | None:
        """One agent; None when there is none of that id."""
        return None if self._registry.get(agent_id) is None else self._view(agent_id)

    def lives(self, request_id: RequestId) -> bool:
        """Whether a request has come and is not over."""
        return request_id in self._requests

    def agent_ids(self) -> list[AgentId]:
        """Of all agents."""
        return [agent.id for agent in self._registry.all()]

    def known(self, agent_id: AgentId) -> AgentRestored | None:
        """What is to be kept of an agent; None: nothing."""
        agent = self._registry.get(agent_id)
        return None if agent is None else known_of(agent)

    def inventories(self) -> list[NodeInventory]:
        """What the approved nodes hold and have loaded, for the fleet's merged lists."""
        return [
            NodeInventory(
                agent_id=agent.id,
                name=agent.name,
                ready=agent.state is AgentState.READY,
                version=agent.ollama_version,
                installed=agent.inventory.installed_rows,
                loaded=agent.inventory.loaded_rows,
            )
            for agent in self._registry.all()
            if agent.state is not AgentState.PENDING
        ]

    def waiting(self) -> list[WaitingView]:
        """Who waits, the next to be looked at first."""
        views = []
        for position, request_id in enumerate(self._queue.in_order(), start=1):
            request = self._requests[request_id]
            plan = None if request.plan is None else self._registry.get(request.plan)
            expected_ms = None if request.plan is None or request.expected_at is None else max(request.expected_at - self._now, 0.0) * 1000
            views.append(
                WaitingView(
                    request_id=request_id,
                    position=position,
                    route=request.came.route.value,
                    model=request.came.model,
                    client=request.client,
                    waited_ms=(request.waited_s + self._now - request.waiting_since) * 1000,
                    expected_start_ms=expected_ms,
                    node=None if plan is None else plan.name,
                    slots=None if plan is None or request.key is None else plan.slots_for(request.key),
                    slots_learned=plan is not None and not plan.slots_told,
                    why=request.why,
                )
            )
        return views

    def why(self, request_id: RequestId) -> Explanation | None:
        """Why one of the last `explain_ring` requests went where it went; None when it is not one of them."""
        return self._dispatcher.explanation(request_id)

    @property
    def someone_waits(self) -> bool:
        """Whether a request waits for a node."""
        return bool(self._queue.waiters)

    def statistics(self) -> Statistics:
        """The router in numbers."""
        return Statistics(
            in_flight=len(self._ledger),
            waiting=len(self._queue),
            agents=len(self._registry.all()),
            agents_ready=len(self._registry.ready()),
            in_flight_by_agent={agent_id: len(leases) for agent_id, leases in self._ledger.by_agent().items()},
            requests_total=self._settled_total,
            loads_total=self._dispatcher.loads,
            reloads_total=self._dispatcher.reloads,
            reloads_avoided_total=self._dispatcher.reloads_avoided,
        )

    def placement(self) -> Question:
        """What `core.placement` needs to say which model should be warm where; its `answer` takes long."""
        return question(self._registry.ready(), self._speeds, self._heat, self._prompts, now=self._now)

    # ------------------------------------------------------------ requests

    def _request_came(self, event: RequestCame, effects: list[Effect], now: Instant) -> None:
        request_id, model, input_tokens = event.request_id, event.model, event.input_tokens
        if request_id in self._requests:
            raise LocalError(f"request {request_id} came twice")
        self._came += 1
        key = key_or_none(model) if model is not None else None
        route, load_only, options = event.route, event.load_only, event.runner_options
        runs_model = route.runs_model
        if options and key is not None:
            options = canonical(options, self._registry.trained_context(key))
        needs_slot, capped = runs_model and not load_only, runs_model and not event.unload
        mean = self._speeds.output_tokens(key) if needs_slot and key is not None else 0
        ask = Ask(key if runs_model else None, options, input_tokens, expected_output(route, event.output_limit, mean), needs_slot, capped)
        if needs_slot and key is not None and self._registry.holders(key):
            self._heat.came(key, now)
            self._prompts.came(key, input_tokens)
            if options or key in self._displacement.mixed:
                self._displacement.came(key, options, now=now)
        request = begin(event, key, ask, self._came, now)
        self._requests[request_id] = request
        if key is not None and is_cloud(key):  # a node would pass it on, signed with its own key
            self._dispatcher.answer(request, cloud_off(event), "cloud model", effects, now=now)
        else:
            self._dispatcher.place(request, effects, now)

    def _first_byte(self, event: FirstByte, effects: list[Effect], now: Instant) -> None:
        request = self._requests.get(event.request_id)
        if request is None or request.phase is _ANSWERED:
            effects.append(Count(name="late_reports_total", labels={"kind": "first byte"}))
            return
        agent = request.agent
        if request.phase is not _TRYING or agent is None:
            raise LocalError(f"request {event.request_id} is {request.phase.value}: it cannot have a first byte")
        request.phase = _STREAMING
        self._delivered(request, agent, now)

    def _delivered(self, request: Request, agent: Agent, now: Instant) -> None:
        """A node gave the beginning of a good answer."""
        if request.first_byte_at is None:
            request.first_byte_at = now
        if not self._health.quiet:
            self._health.delivered(agent.id, request.key, request.id)
            self._look = True
        leaks = self._leaks
        if leaks.flagged or leaks.watched:
            leaks.answered(request, agent, now=now)
        key, beside = request.ask.key, request.beside
        if key is None:
            return
        if (
            beside > 1
            and beside > (agent.limits.get(key, agent.slots) if agent.limits else agent.slots)
            and slots.answered(agent, key, request.id, beside, self._ledger.on(agent.id), now=now)
        ):
            self._speeds.refresh(agent.id)
            self._look = True
        if request.unload:
            return
        if agent.inventory.saw_loaded(key, request.ask.options, now):
            self._look = True  # a load is through, whoever began it
        if request.prefixes:
            self._dispatcher.affinity.read(agent.id, key, request.prefixes, now=now)

    def _attempt_ended(self, event: AttemptEnded, effects: list[Effect], now: Instant) -> None:
        request = self._requests.get(event.request_id)
        if request is None or request.phase is Phase.ANSWERED:
            effects.append(Count(name="late_reports_total", labels={"kind": "attempt ended"}))
            return
        resumes = event.resume and request.phase is _STREAMING and not request.resumed
        if not (request.phase is _TRYING or resumes) or request.agent is None:
            raise LocalError(f"request {event.request_id} is {request.phase.value}: no attempt of it can have failed")
        verdict = classify(event.failure, status=event.status, text=event.text, repeat_guard=event.repeat_guard)
        request.failed, request.verdict = event, verdict
        outcome = event.failure.value if event.failure is not Failure.ANSWERED else f"status {event.status}"
        request.end_attempt(outcome, now)
        self._dispatcher.release(request, effects, now)
        self._look = True
        self._blame(request, verdict, event.failure, event.text, effects, now)
        agent_id = request.agent.id
        hung = bool(self._leaks.quarantine) and self._leaks.taken_off(request, now=now)
        if verdict.fault is Fault.SATURATION or hung:
            request.busy[agent_id] = None
        else:
            request.tried[agent_id] = request.tried.get(agent_id, 0) + 1
        if verdict.cannot:
            request.refused_by += (request.agent,)
        request.spent += verdict.cost is Cost.BUDGETED and not hung
        if resumes:
            effects += begin_resume(request, event)
        in_doubt = resumes and event.thinks_unasked and thinks(request.agent.inventory.installed_rows, request.key)
        if verdict.cost is Cost.FINAL or request.spent > self._config.retries_budgeted or in_doubt:
            self._dispatcher.give_up(request, effects, now=now)
        else:
            self._dispatcher.place(request, effects, now)

    def _freed(self, event: Freed, effects: list[Effect], now: Instant) -> None:
        request = self._requests.get(event.request_id)
        agent = None if request is None else request.agent
        if request is None or agent is None or request.phase not in (_TRYING, _STREAMING):
            effects.append(Count(name="late_reports_total", labels={"kind": "freed"}))
            return
        if event.ttft_ms is not None and request.first_byte_at is None:
            request.first_byte_at = request.after(event.ttft_ms, now=now)
        if event.delivered and request.phase is _TRYING:
            self._delivered(request, agent, now)
        request.phase, request.freed_at = _FREED, now
        self._dispatcher.release(request, effects, now)
        self._dispatcher.owed.set(request.id, now=now)
        self._look = True

    def _settled(self, event: Settled, effects: list[Effect], now: Instant) -> None:
        request = self._requests.pop(event.request_id, None)
        if request is None:
            effects.append(Count(name="late_reports_total", labels={"kind": "settled"}))
            return
        self._settled_total += 1
        agent = request.agent
        phase, ending, end = request.phase, event.ending, now
        if phase is _FREED or event.duration_ms is not None or event.ttft_ms is not None:
            end = self._told_late(request, event, now)
        if phase is _TRYING and ending is _SUCCESS and agent is not None:
            self._delivered(request, agent, now)
        if phase is _WAITING:
            self._dispatcher.leave(request, now=now)
            self._dispatcher.stirred = self._dispatcher.has_barriers
        elif phase is _ANSWERED:
            self._dispatcher.answered.discard(request.id)
        elif agent is not None:
            self._dispatcher.release(request, effects, now)
            self._look = True
            if ending is not _SUCCESS:
                self._leaks.given_up(request, agent, by_us=ending is Ending.CANCELLED or event.node_fault is Failure.VANISHED, now=now)
            fault = event.node_fault
            if fault is not None:
                verdict = classify(fault, status=500, text=event.message)  # told in-band: as late as a 500 can be
                self._blame(request, verdict, fault, event.message, effects, now)
                outcome = fault.value
            else:
                outcome = ending._value_
                if ending is _SUCCESS:
                    self._succeeded(request, event, effects, now, end)
                else:
                    self._health.ended(agent.id, request.id)
            request.end_attempt(outcome, end)
        record = request.record(ending, event, end)
        self._dispatcher.started(request, record)
        effects.append(record)

    def _told_late(self, request: Request, event: Settled, now: Instant) -> Instant:
        """An edge that saw no bytes tells how it was. Returns when it ended."""
        agent = request.agent
        if agent is None or request.phase not in (_TRYING, _STREAMING, _FREED):
            return now
        unseen = request.phase is _FREED and request.first_byte_at is None
        if request.phase is _FREED:
            self._dispatcher.owed.discard(request.id)
        if (ttft_ms := event.ttft_ms) is not None:
            request.first_byte_at = request.after(ttft_ms, now=now)
        if unseen and event.ending is _SUCCESS:
            self._delivered(request, agent, now)
        return request.ended_at(event, now=now)

    def _succeeded(self, request: Request, event: Settled, effects: list[Effect], now: Instant, end: Instant) -> None:
        """A node served it well, until `end`: what that teaches."""
        agent, key = request.agent, request.key
        assert agent is not None, "served by nobody"
        if not self._health.spotless:
            self._health.succeeded(agent.id, key)
        for refused_by in request.refused_by:
            # This node could: those that said the model cannot are the ones at fault.
            why = "said that the model cannot do what another node could"
            for ejection in self._health.failed(refused_by.id, key, Fault.MODEL, why, request_id=request.id, now=now):
                self._tell(ejection, refused_by.name, effects)
        run = request.ask.key
        if run is None or request.resumed:  # half an answer teaches nothing
            return
        if request.beside > 1 and slots.ended(agent, run, request.beside, event.usage, now):
            self._speeds.refresh(agent.id)
        if request.unload:
            agent.inventory.saw_unloaded(run, now=now)
        elif request.cold or (not request.came.load_only and self._speeds.curious(agent.id, run, now)):
            model = agent.inventory.installed.get(run)
            size_bytes = 0 if model is None else model.size_bytes
            self._speeds.learn(agent.id, run, request.sample(event, now=end), size_bytes=size_bytes)

    def _blame(self, request: Request, verdict: Verdict, failure: Failure, text: str, effects: list[Effect], now: Instant) -> None:
        """A node failed a request: hold it against whom it concerns, and say so."""
        agent, key = request.agent, request.key
        assert agent is not None, "nobody to blame"
        why = f"{failure.value}: {text[:WHY_MAX]}" if text else failure.value
        if verdict.fault is not Fault.CLIENT:
            fields = {"agent_id": agent.id, "agent": agent.name, "model": request.came.model, "why": why, "request_id": request.id}
            effects.append(Note(level="warning", event="attempt failed", fields=fields))
        for ejection in self._health.failed(agent.id, key, verdict.fault, why, request_id=request.id, now=now):
            self._tell(ejection, agent.name, effects)
        if failure is Failure.REFUSED:
            effects += self._registry.refused(agent)
        if verdict.lost_memory:
            agent.inventory.forget_loaded(now=now)
        if verdict.lacks_model and key is not None:
            self._health.pause(agent.id, key, now=now)
            effects += self._registry.lacks(agent)

    def _tell(self, ejection: Ejection, name: str, effects: list[Effect]) -> None:
        model = None if ejection.key is None else display(ejection.key)
        fields = {"agent_id": ejection.agent_id, "agent": name, "model": model, "for_s": ejection.length_s, "why": ejection.why}
        effects.append(Note(level="warning", event="passed over", fields=fields))
        effects.append(Count(name="ejections_total", labels={"agent": name}))

    def _pulse(self, event: Pulse, effects: list[Effect], now: Instant) -> None:
        for request_id in event.requests:
            request = self._requests.get(request_id)
            if request is None:
                continue
            if request.lease_id is not None:
                self._ledger.renew(request.lease_id, now=now)
            elif request.phase is Phase.ANSWERED:
                self._dispatcher.answered.set(request_id, now=now)
        for agent_id in event.heard:
            self._registry.heard(agent_id, now=now)

    # ------------------------------------------------------------ nodes

    def _agent_restored(self, event: AgentRestored, effects: list[Effect], now: Instant) -> None:
        agent = agent_of(event, slots_default=self._config.slots_default, raises=self._config.raise_context)
        effects += self._registry.restored(agent)

    def _heartbeat_came(self, event: HeartbeatCame, effects: list[Effect], now: Instant) -> None:
        heartbeat = event.heartbeat
        if heartbeat.in_flight is not None:
            ours = self._dispatcher.explained
            beyond = sum(1 for request_id in heartbeat.in_flight if request_id not in self._requests and not ours(RequestId(request_id)))
        else:
            beyond = max(0, heartbeat.active_requests - self._ledger.in_flight(AgentId(heartbeat.agent_id)))
        agent = self._registry.get(AgentId(heartbeat.agent_id))
        before = None if agent is None else agent.last_report
        effects += self._registry.heartbeat(event, beyond=beyond, now=now)
        if agent is not None and heartbeat.in_flight and (agent.last_report != before or (heartbeat.boot, heartbeat.sequence) == (0, 0)):
            self._renew(agent, heartbeat.in_flight, now)

    def _renew(self, agent: Agent, in_flight: Iterable[str], now: Instant) -> None:
        """Its gateway works on these. What was sent after that was written down is not among them, and keeps its time."""
        for request_id in in_flight:
            request = self._requests.get(RequestId(request_id))
            if request is not None and request.lease_id is not None and request.agent is agent:
                self._ledger.renew(request.lease_id, now=now)

    def _follow(self, effects: list[Effect], now: Instant) -> None:
        """Carry over what a step changed in one part to the others."""
        if self._dispatcher.stirred:
            self._dispatcher.stirred = False
            self._look = True
        changes = self._registry.changes
        if changes.any:
            self._registry.take_changes()
            for agent_id in changes.refreshed:
                self._speeds.refresh(agent_id)
            for agent_id in changes.reborn:
                self._health.forget(agent_id)
            for agent_id in changes.forgotten:
                self._health.forget(agent_id)
                self._speeds.forget(agent_id)
                self._leaks.forget(agent_id)
            for agent_id, reason in changes.lost:
                effects += [Cut(request_id=held.request_id, reason=reason) for held in self._ledger.on(agent_id)]
            self._look = self._look or changes.touched
        while self._look:  # who is sent or answered in a look may make another one worth while; each time somebody fewer waits
            self._look = False
            if len(self._queue) or self._dispatcher.has_barriers:  # barriers fall with the last one who waited
                self._dispatcher.look(effects, now=now)
                self._look, self._dispatcher.stirred = self._dispatcher.stirred, False

    # ------------------------------------------------------------ the rest

    def _abandon(self, request: Request, effects: list[Effect], now: Instant) -> None:
        """Nobody reported on it for so long that nobody will."""
        if request.phase is _FREED:
            assert request.agent is not None, "an attempt without a node"
            request.end_attempt(Ending.UNKNOWN.value, now=request.freed_at or now)
            self._leaks.given_up(request, request.agent, by_us=False, now=now)
        elif request.phase in (_TRYING, _STREAMING):
            effects.append(Cut(request_id=request.id, reason="nothing was heard of this request for too long"))
            request.end_attempt(Ending.UNKNOWN.value, now=now)
            self._dispatcher.freed(request, effects, now=now)
            assert request.agent is not None, "an attempt without a node"
            self._leaks.given_up(request, request.agent, by_us=True, now=now)
        del self._requests[request.id]
        self._settled_total += 1
        if request.agent is not None:
            self._health.ended(request.agent.id, request.id)
        self._look = True
        effects.append(request.record(Ending.UNKNOWN, None, now=now))

    def _view(self, agent_id: AgentId) -> AgentView:
        agent = self._registry.get(agent_id)
        assert agent is not None, "a view of nobody"
        ejections = [
            EjectionView(
                model=None if ejection.key is None else display(ejection.key),
                until_s=max(ejection.until - self._now, 0.0),
                why=ejection.why,
            )
            for ejection in self._health.ejections(agent_id)
        ]
        return agent.view(in_flight=self._ledger.in_flight(agent_id), ejections=ejections)
