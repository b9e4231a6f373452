"""Slots that leaked: which silent request is taken to hang on a runner that will never answer, and where nobody is sent meanwhile.

Decides suspicion only; unloading is a shell's deed, and where the request goes next `core.dispatch`'s. When a client leaves a stream in
mid-answer, a slot of Ollama's runner may stay taken for ever (ollama-failures.md 8): the runner looks idle, and whoever comes next hangs
without a byte. Unloading the model heals it.

Silence is normal, so a request is suspected only when all of this holds: one of our own streams on that runner was closed in mid-answer
since it was loaded; the request streams, without tools or format; the model is in memory, not being loaded; nothing else of ours runs on
the node (but others in the same plight), and nothing that is not ours; and no byte came for much longer than reading the prompt takes.
The silence of requests that gave up in the same way before counts too: each of them renews the runner's timer, and nobody else's.

Invariants: a request that fails one of these may be silent for as long as it likes; a quarantine ends with the requests it was raised for.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from core.agents import Agent
from core.events import Count, Cut, Effect, Note
from core.learning import Speeds
from core.leases import Ledger, Wake
from core.names import display
from core.parts import Part
from core.requests import Phase, Request
from core.units import MICROS_PER_S, NEVER, AgentId, Instant, ModelKey, RequestId

SILENCE_S: Final = 30.0
"""Longer than the 20.3 s after which Ollama itself replaces a runner that is frozen."""
PREFILL_TIMES: Final = 4
SHORTEST_S: Final = 0.001
"""A deadline lies ahead, whatever rounding has made of what is left."""
LEAKS_MAX: Final = 2
"""So often one request is taken off a node as a leak's victim; after that it is like any other whose node went away."""

_NO_MODEL: Final = ModelKey("")
_TRYING: Final = Phase.TRYING


class _Runner(msgspec.Struct):
    """A runner on which a stream of ours was closed in mid-answer."""

    alive_at: Instant
    """The last sign of life, or of something else to do, on its node."""
    hushed_s: float = 0.0
    """For how long requests were silent there that gave up."""
    unloading: bool = False
    """It was ordered to go: whether it went is not known before another one answers."""


class Leaks(Part):
    """Of all nodes."""

    __slots__ = ("_ledger", "_requests", "_speeds", "earliest", "flagged", "quarantine", "silence_s", "wake", "watched")

    def __init__(self, ledger: Ledger, requests: Mapping[RequestId, Request], speeds: Speeds) -> None:
        self._ledger = ledger
        self._requests = requests
        self._speeds = speeds
        self.silence_s = SILENCE_S
        self.flagged: dict[AgentId, dict[ModelKey, _Runner]] = {}
        """Runners that may have leaked; empty nearly always, and then nothing else here need be asked."""
        self.watched: dict[RequestId, Instant] = {}
        """Requests that may hang, and when to look at them. As long as none is watched and nothing flagged, attempts that begin and end
        need not be told."""
        self.quarantine: dict[tuple[AgentId, ModelKey], dict[RequestId, None]] = {}
        """Runners that are being unloaded, and for which requests."""
        self.wake = Wake()
        """Lowered by each request that is watched."""
        self.earliest = NEVER
        """When the next watched request is to be looked at."""

    @property
    def active(self) -> bool:
        """Whether attempts that begin and end are of any interest."""
        return bool(self.flagged or self.watched)

    def quarantined(self, agent_id: AgentId, key: ModelKey | None) -> bool:
        """Whether nobody is to be sent to this model there, for it is being unloaded."""
        return key is not None and (agent_id, key) in self.quarantine

    # ------------------------------------------------------------ what happened

    def given_up(self, request: Request, agent: Agent, *, by_us: bool, now: Instant) -> None:
        """A request did not end well; its lease is gone. `by_us`: we closed its connection. If that was a stream in mid-answer, others may
        hang from now on."""
        self._lift(request)
        key = request.ask.key
        if key is None or not by_us or not request.came.stream or request.first_byte_at is None:
            return
        self.flagged.setdefault(agent.id, {}).setdefault(key, _Runner(now)).alive_at = now
        for held in self._ledger.on(agent.id):
            if held.key == key:
                self._watch(self._requests[held.request_id], now)

    def began(self, request: Request, agent: Agent, *, now: Instant) -> None:
        """A request was sent to a node with flagged runners."""
        key, runners = request.ask.key, self.flagged.get(agent.id)
        runner = None if runners is None or key is None else runners.get(key)
        if runner is None:
            return
        assert key is not None, "a runner without a model"
        if request.cold and not runner.unloading:
            self._unflag(agent.id, key)  # the one that may have leaked is gone
        else:
            self._watch(request, now, runner.hushed_s)

    def answered(self, request: Request, agent: Agent, *, now: Instant) -> None:
        """The first byte of a good answer."""
        self._unwatch(request.id)
        key, runners = request.ask.key, self.flagged.get(agent.id)
        if runners is None or key is None:
            return
        for runner in runners.values():
            runner.alive_at = now
        own = runners.get(key)
        if own is not None:
            own.hushed_s = 0.0
            if request.cold:
                self._unflag(agent.id, key)

    def ended(self, request: Request, agent: Agent, *, now: Instant) -> None:
        """An attempt is over, however, and its lease is gone."""
        runners = self.flagged.get(agent.id)
        watched = self._unwatch(request.id)
        if runners is None:
            return
        runner = runners.get(request.ask.key or _NO_MODEL)
        if runner is not None and watched and request.first_byte_at is None and not self._ledger.in_flight(agent.id):
            runner.hushed_s += now - max(request.started_at, runner.alive_at)
        for other in runners.values():
            other.alive_at = now

    def taken_off(self, request: Request, *, now: Instant) -> bool:
        """An attempt ended while some runner is being unloaded. Returns whether it was one that hung, and may be tried there again."""
        agent, key = request.agent, request.ask.key
        if not self._lift(request) or agent is None or key is None:
            return False
        agent.inventory.saw_unloaded(key, now=now)
        runner = self.flagged.get(agent.id, {}).get(key)
        if runner is not None:
            runner.unloading, runner.hushed_s = True, 0.0
        return request.leaks <= LEAKS_MAX

    def forget(self, agent_id: AgentId) -> None:
        """The node is gone for good."""
        self.flagged.pop(agent_id, None)

    # ------------------------------------------------------------ suspicion

    def look(self, *, now: Instant) -> list[Effect]:
        """Look at the watched requests that are due: take those that hang off their nodes, and have the models unloaded there."""
        effects: list[Effect] = []
        for request_id in [request_id for request_id, until in self.watched.items() if until <= now]:
            request = self._requests[request_id]
            agent, key = request.agent, request.ask.key
            assert agent is not None, "watched without a node"
            assert key is not None, "watched without a model"
            runner = self.flagged.get(agent.id, {}).get(key)
            left_s = 0.0 if runner is None else self._left_s(request, agent, key, runner, now)
            if runner is None:
                del self.watched[request_id]  # another one runs there by now
            elif left_s > 0:
                self.watched[request_id] = Instant(now + max(left_s, SHORTEST_S))
            else:
                del self.watched[request_id]
                effects += self._quarantined_for(request, agent, key, now)
        self.earliest = min(self.watched.values(), default=NEVER)
        return effects

    def _quarantined_for(self, request: Request, agent: Agent, key: ModelKey, now: Instant) -> list[Effect]:
        hanging = self.quarantine.setdefault((agent.id, key), {})
        unload = () if hanging else (display(key),)
        hanging[request.id] = None
        request.leaks += 1
        silent_s = round(now - request.started_at, 1)
        fields = {"agent_id": agent.id, "agent": agent.name, "model": request.came.model, "request_id": request.id, "silent_s": silent_s}
        reason = f"{agent.name} seems to have lost a slot of this model: it is unloaded"
        return [
            Note(level="warning", event="leaked slot suspected", fields=fields),
            Count(name="slot_leaks_total", labels={"agent": agent.name}),
            Cut(request_id=request.id, reason=reason, unload=unload, again=True),
        ]

    def _lift(self, request: Request) -> bool:
        """The request is off its node. Returns whether it was one that hung."""
        for place, hanging in self.quarantine.items():
            if request.id in hanging:
                del hanging[request.id]
                if not hanging:
                    del self.quarantine[place]
                return True
        return False

    def _left_s(self, request: Request, agent: Agent, key: ModelKey, runner: _Runner, now: Instant) -> float:
        """How much longer the request may be silent; 0: it hangs."""
        limit_s = self._limit_s(request, agent, key)
        loading = key in agent.inventory.loading or key not in agent.inventory.resident
        if loading or agent.beyond or not all(self._in_the_same_plight(held.request_id) for held in self._ledger.on(agent.id)):
            runner.alive_at = now
            return limit_s
        return max(limit_s - runner.hushed_s - (now - max(request.started_at, runner.alive_at)), 0.0)

    def _in_the_same_plight(self, request_id: RequestId) -> bool:
        return request_id in self.watched or any(request_id in hanging for hanging in self.quarantine.values())

    def _limit_s(self, request: Request, agent: Agent, key: ModelKey) -> float:
        model = agent.inventory.installed.get(key)
        rates = self._speeds.rates(agent.id, key, size_bytes=0 if model is None else model.size_bytes, slots=agent.slots_for(key))
        prefill_us = rates.overhead_us + request.ask.input_tokens * rates.prefill_ns / 1000
        return self.silence_s + PREFILL_TIMES * prefill_us / MICROS_PER_S

    def _watch(self, request: Request, now: Instant, hushed_s: float = 0.0) -> None:
        came, agent, key = request.came, request.agent, request.ask.key
        if request.phase is not _TRYING or not came.stream or came.constrained or not request.ask.needs_slot:
            return
        assert agent is not None, "on no node"
        assert key is not None, "runs no model"
        until = Instant(now + max(self._limit_s(request, agent, key) - hushed_s, 1.0))
        self.watched[request.id] = until
        self.earliest = min(self.earliest, until)
        self.wake.at = min(self.wake.at, until)

    def _unwatch(self, request_id: RequestId) -> bool:
        until = self.watched.pop(request_id, None)
        if until is not None and until == self.earliest:
            self.earliest = min(self.watched.values(), default=NEVER)
        return until is not None

    def _unflag(self, agent_id: AgentId, key: ModelKey) -> None:
        runners = self.flagged[agent_id]
        del runners[key]
        if not runners:
            del self.flagged[agent_id]
