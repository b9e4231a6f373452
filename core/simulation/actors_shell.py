"""The coordinator of the world: the real `Router`, driven as `servers.driver` and `edge.proxy` drive it.

Decides nothing about nodes: it carries out effects, one request at a time, and reports what became of them. It imitates the shells'
manners exactly: effects for other requests are left at their desks, a `Cut` that meets no attempt is dropped, `Settled` is said once per
request whatever happens, and the router is ticked at its deadlines, never before. All that goes in and comes out is shown to a witness.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from core import events, messages
from core.config import RouterConfig
from core.errors import RemoteError
from core.events import (
    Accepted,
    AgentCommanded,
    AgentRegistered,
    AttemptEnded,
    Command,
    Cut,
    Declined,
    Effect,
    Ending,
    Event,
    Failure,
    FirstByte,
    Forward,
    HeartbeatCame,
    Lease,
    PassOn,
    Pulse,
    Refuse,
    Registered,
    RequestCame,
    Route,
    Settled,
    Upstream,
    Wait,
)  # fmt: skip
from core.messages import Heartbeat, HeartbeatAnswer, Registration, RegistrationAnswer
from core.router import Router
from core.simulation.actors import Alarm, Answer, Connection, Stage
from core.simulation.actors_machine import Machine
from core.simulation.network import DOWN, UP
from core.simulation.script import Ask
from core.units import AgentId, Instant, RequestId, UnixMs

DIAL_S: Final = 3.0
"""No connection within this time counts as refused."""
TICK_PAUSE_S: Final = 0.001
"""Shortest time between two ticks."""
EPOCH_MS: Final = 1_760_000_000_000

MakeRouter = Callable[..., Router]


class Witness(Protocol):
    """Who is shown everything that passes between shell and router."""

    def started(self, router: Router, *, now: Instant) -> None:
        """A coordinator started; what an earlier one knew is gone."""

    def before(self, event: Event | None, *, now: Instant) -> None:
        """This is about to be handled; None: a tick."""

    def after(self, event: Event | None, effects: Sequence[Effect], *, now: Instant) -> None:
        """And that is what came of it."""


class Serving:
    """A client's request at the coordinator."""

    __slots__ = (
        "answers", "ask", "came", "connection", "cut", "early_cut", "first", "in_turn", "kept", "lease", "over", "request_id", "woken",
    )  # fmt: skip

    def __init__(self, request_id: RequestId, ask: Ask, came: RequestCame) -> None:
        self.request_id, self.ask, self.came = request_id, ask, came
        self.answers: deque[Forward | Wait | Refuse | PassOn] = deque()
        self.connection: Connection | None = None
        """Of the attempt that runs."""
        self.lease: Lease | None = None
        self.first = self.over = self.in_turn = self.woken = False
        self.cut: Cut | None = None
        """What ends the attempt that runs."""
        self.early_cut: Cut | None = None
        """What ends the attempt that was ordered, as soon as it begins."""
        self.kept: tuple[int, str] | None = None
        """The last node's own error answer."""


class Shell:
    """One coordinator after the other."""

    def __init__(self, stage: Stage, config: RouterConfig, names: list[str], witness: Witness, *, make_router: MakeRouter = Router) -> None:
        self._stage, self._config, self._names, self._witness = stage, config, names, witness
        self._make_router = make_router
        self.machines: list[Machine] = []
        self.up = False
        self.generation = 0
        self.servings: dict[int, Serving] = {}
        """By the number that the script gave the request."""
        self._by_id: dict[RequestId, Serving] = {}
        self.ids: dict[int, AgentId] = {}
        """Of each node, as this coordinator knows it."""
        self._tokens: dict[str, AgentId] = {}
        self._counter = 0
        self._heard: dict[AgentId, None] = {}
        self._timer = Alarm(stage, self._tick_due)
        self._pulse = Alarm(stage, self._pulse_due)
        self._armed_for = math.inf
        self.probe: Callable[[AgentId], None] = lambda _: None
        """Where probes go."""

    # ------------------------------------------------------------ life

    def start(self) -> None:
        """A new coordinator, with nothing but its settings."""
        now = self._stage.now
        self.up = True
        self.generation += 1
        self.router = self._make_router(self._config, now=now)
        self._witness.started(self.router, now=now)
        self._pulse.set(now + self._config.pulse_s)
        self._rearm()

    def crash(self) -> None:
        """It dies; its connections are reset, its clients see errors."""
        for serving in list(self._by_id.values()):
            self._close(serving)
            serving.over = True
        self.up = False
        self.servings.clear()
        self._by_id.clear()
        self.ids.clear()
        self._tokens.clear()
        self._heard.clear()
        self._timer.set(math.inf)
        self._pulse.set(math.inf)

    def apply(self, event: Event) -> list[Effect]:
        """Tell the router; leave request effects at their desks, return the answers to shells."""
        now = self._stage.now
        self._witness.before(event, now=now)
        effects = self.router.handle(event, now=now)
        self._witness.after(event, effects, now=now)
        rest = self._carry_out(effects)
        deadline = self.router.next_deadline()
        if deadline is not None and deadline < self._armed_for:
            self._arm(deadline)
        return rest

    def unix_ms(self) -> UnixMs:
        """The calendar."""
        return UnixMs(EPOCH_MS + round(self._stage.now * 1000))

    def new_agent_id(self) -> AgentId:
        """An id that was never used."""
        self._counter += 1
        return AgentId(f"agent-{self._counter}")

    def _tick_due(self, when: float) -> None:
        now = self._stage.now
        self._armed_for = math.inf
        self._witness.before(None, now=now)
        effects = self.router.tick(now=now)
        self._witness.after(None, effects, now=now)
        self._carry_out(effects)
        self._rearm()

    def _rearm(self) -> None:
        deadline = self.router.next_deadline()
        self._arm(math.inf if deadline is None else max(deadline, self._stage.now + TICK_PAUSE_S))

    def _arm(self, deadline: float) -> None:
        self._armed_for = deadline
        self._timer.set(deadline)

    def _pulse_due(self, when: float) -> None:
        network = self._stage.network
        for serving in self._by_id.values():
            if serving.first and serving.lease is not None and serving.connection is not None:
                node = serving.connection.node
                if self.machines[node].streaming(serving.connection) and network.reachable(node, now=when):
                    self._heard[serving.lease.agent_id] = None
        heard, self._heard = tuple(self._heard), {}
        self.apply(Pulse(requests=tuple(self._by_id), heard=heard))
        self._pulse.set(when + self._config.pulse_s)

    def _carry_out(self, effects: Sequence[Effect]) -> list[Effect]:
        rest: list[Effect] = []
        for effect in effects:
            match effect:
                case Forward() | Wait() | Refuse() | PassOn() | Cut():
                    if (serving := self._by_id.get(effect.request_id)) is not None:
                        self._put(serving, effect)
                case events.Probe(agent_id=agent_id):
                    self.probe(agent_id)
                case Registered() | Accepted() | Declined():
                    rest.append(effect)
                case _:
                    pass
        return rest

    # ------------------------------------------------------------ requests

    def ask(self, ask: Ask) -> None:
        """A client's request was read whole."""
        if not self.up or ask.request in self.servings:
            return
        self._counter += 1
        request_id = RequestId(f"request-{ask.request}-{self._counter}")
        came = self._came(request_id, ask)
        serving = Serving(request_id, ask, came)
        self.servings[ask.request] = self._by_id[request_id] = serving
        serving.in_turn = True
        self.apply(came)
        self._turn(serving)
        if ask.patience_s is not None:
            self._stage.at(self._stage.now + ask.patience_s, self._impatient, serving)

    def _impatient(self, serving: Serving) -> None:
        """It waited long enough; once the world is healed clients wait for ever, so that nobody hides what hangs."""
        if serving.over or self._stage.healed:
            self._stage.idle()
        else:
            self.leave(serving.ask.request)

    def leave(self, request: int) -> None:
        """The client closes its connection."""
        serving = self.servings.get(request)
        if serving is not None:
            self._close(serving)
            self._settle(serving, Ending.CANCELLED, 499, "the client left")

    def forget(self, request: int) -> None:
        """The edge that serves it dies: the node's connection closes, the router is told nothing."""
        serving = self.servings.pop(request, None)
        if serving is not None:
            self._close(serving)
            serving.over = True
            del self._by_id[serving.request_id]

    def heard(self, connection: Connection, answer: Answer) -> None:
        """A node's answer arrived."""
        serving = self._by_id.get(connection.came.request_id)
        if serving is None or serving.connection is not connection or serving.cut is not None:
            return
        if answer.failure is not None:
            self._failed(serving, answer)
            return
        if answer.first and not serving.first:
            serving.first = True
            if serving.lease is not None:
                self._heard[serving.lease.agent_id] = None
            self.apply(FirstByte(request_id=serving.request_id))
        if answer.end:
            serving.connection = None
            self._settle(serving, Ending.SUCCESS, 200, "", usage=answer.usage)

    def _failed(self, serving: Serving, answer: Answer) -> None:
        serving.connection = None
        failure = answer.failure
        assert failure is not None
        if serving.first:
            self._settle(serving, Ending.ERROR, 200, answer.text, node_fault=failure)
            return
        if failure is Failure.ANSWERED:
            serving.kept = (answer.status, answer.text)
        self._attempt_ended(serving, failure, answer.status, answer.text)

    def _attempt_ended(self, serving: Serving, failure: Failure, status: int, text: str) -> None:
        serving.lease, serving.in_turn = None, True
        self.apply(AttemptEnded(request_id=serving.request_id, failure=failure, status=status, text=text))
        self._turn(serving)

    def _put(self, serving: Serving, effect: Forward | Wait | Refuse | PassOn | Cut) -> None:
        if isinstance(effect, Cut):
            if serving.connection is not None:
                serving.cut = effect
                self._wake(serving)
            elif any(isinstance(answer, Forward) for answer in serving.answers):
                serving.early_cut = effect
            return
        serving.answers.append(effect)
        if not serving.in_turn and serving.connection is None:
            self._wake(serving)

    def _wake(self, serving: Serving) -> None:
        if not serving.woken:
            serving.woken = True
            self._stage.at(self._stage.now + self._stage.options.lag_s, self._woken, serving)

    def _woken(self, serving: Serving) -> None:
        serving.woken = False
        if serving.over:
            return
        if serving.cut is not None:
            self._cut_off(serving, serving.cut)
            return
        serving.in_turn = True
        self._turn(serving)

    def _cut_off(self, serving: Serving, cut: Cut) -> None:
        """Close the connection, have the node unload what it is to unload, and only then say that the attempt is over."""
        serving.cut = None
        connection = serving.connection
        self._close(serving)
        if serving.first:
            self._settle(serving, Ending.ERROR, 200, cut.reason, node_fault=Failure.VANISHED)
        elif connection is None or not cut.unload or not self._stage.network.reachable(connection.node, now=self._stage.now):
            self._attempt_ended(serving, Failure.VANISHED, 0, cut.reason)
        else:
            at = self._unload(connection, cut.unload)
            self._stage.at(at + self._stage.options.delay_s, self._unloaded, serving, cut.reason)

    def _unloaded(self, serving: Serving, reason: str) -> None:
        if not serving.over:
            self._attempt_ended(serving, Failure.VANISHED, 0, reason)

    def _unload(self, connection: Connection, models: tuple[str, ...]) -> float:
        """Have the node unload these; returns when it is told."""
        stage = self._stage
        at = connection.arrives_down = stage.network.stream(connection.node, DOWN, now=stage.now, after=connection.arrives_down)
        for model in models:
            stage.at(at, self.machines[connection.node].unload, model)
        return at

    def _turn(self, serving: Serving) -> None:
        """Carry out what lies on the desk."""
        while serving.answers and serving.connection is None and not serving.over:
            match serving.answers.popleft():
                case Forward(lease=lease, unload=unload):
                    self._attempt(serving, lease, unload)
                case Refuse() as refuse:
                    self._settle(serving, Ending.ERROR, refuse.status, refuse.text)
                case PassOn():
                    status, text = serving.kept or (502, "the node failed before it answered; try again")
                    self._settle(serving, Ending.ERROR, status, text)
                case _:
                    pass
        serving.in_turn = False

    def _attempt(self, serving: Serving, lease: Lease, unload: tuple[str, ...]) -> None:
        node = int(lease.upstream.host.removeprefix("node-"))
        machine, stage = self.machines[node], self._stage
        connection = Connection(lease.id, node, serving.ask, serving.came, via_gateway=lease.upstream.gateway)
        serving.connection, serving.lease = connection, lease
        serving.cut, serving.early_cut = serving.early_cut, None
        met = machine.dial(via_gateway=lease.upstream.gateway) if stage.network.reachable(node, now=stage.now) else "silence"
        if met == "open":
            self._unload(connection, unload)
            connection.arrives_down = stage.network.stream(node, DOWN, now=stage.now, after=connection.arrives_down)
            stage.at(connection.arrives_down, machine.taken, connection)
        else:
            after_s = DIAL_S if met == "silence" else stage.options.delay_s
            stage.at(stage.now + after_s, self.heard, connection, Answer(failure=Failure.REFUSED, text="no connection"))
        if serving.cut is not None:
            self._wake(serving)

    def _close(self, serving: Serving) -> None:
        """Close the connection to the node, if there is one."""
        connection, serving.connection = serving.connection, None
        if connection is not None and not connection.client_closed:
            connection.client_closed = True
            stage = self._stage
            at = stage.network.stream(connection.node, DOWN, now=stage.now, after=connection.arrives_down)
            stage.at(at, self.machines[connection.node].closed, connection)

    def _settle(self, serving: Serving, ending: Ending, status: int, message: str, **more: Any) -> None:
        serving.over = True
        self.servings.pop(serving.ask.request)
        del self._by_id[serving.request_id]
        self.apply(Settled(request_id=serving.request_id, ending=ending, status=status, message=message, **more))

    def _came(self, request_id: RequestId, ask: Ask) -> RequestCame:
        name = self._names[ask.model] if ask.model < len(self._names) else f"nobody-holds-{ask.model}:latest"
        spelled = (name, name.upper(), f"library/{name}", f"registry.ollama.ai/library/{name}")[ask.spelling % 4]
        route = {"show": Route.SHOW, "embed": Route.EMBED}.get(ask.kind, Route.CHAT if ask.request % 2 else Route.V1_CHAT)
        return RequestCame(
            request_id=request_id,
            route=route,
            model=None if ask.kind == "unreadable" else spelled,
            client=f"client-{ask.client}",
            stream=ask.stream,
            runner_options=f"num_ctx={ask.num_ctx}" if ask.num_ctx else "",
            input_tokens=ask.input_tokens,
            output_limit=ask.output_tokens if ask.request % 5 == 0 else None,
            load_only=ask.kind in ("load", "unload"),
            unload=ask.kind == "unload",
        )

    # ------------------------------------------------------------ agents

    def called(self, machine: Machine, boot: int, call: int, kind: str, data: bytes) -> None:
        """An agent's message arrived."""
        if not self.up:
            machine.reply(boot, call, kind, 0, b"")
            return
        try:
            status, answer = self._registered(machine, data) if kind == "register" else self._beat(data)
        except RemoteError as error:
            status, answer = error.status, str(error).encode()
        machine.reply(boot, call, kind, status, answer)

    def _registered(self, machine: Machine, data: bytes) -> tuple[int, bytes]:
        registration = messages.decode(data, Registration)
        known_as = self._tokens.get(machine.token) if machine.token is not None else None
        self._counter += 1
        event = AgentRegistered(
            registration=registration,
            new_id=self.new_agent_id(),
            code=f"CODE-{self._counter:04d}",
            trusted=machine.trusted,
            gpu_exempt=False,
            upstream=Upstream(host=f"node-{machine.index}", port=registration.agent_api_port or registration.ollama_port, gateway=True),
            now_unix=self.unix_ms(),
            known_as=known_as,
        )
        (effect,) = self.apply(event)
        if isinstance(effect, Declined):
            return effect.status, effect.text.encode()
        assert isinstance(effect, Registered), f"R14: a registration was answered with {effect}"
        self.ids[machine.index] = effect.agent_id
        token = f"token-{effect.agent_id}"
        self._tokens[token] = effect.agent_id
        answer = RegistrationAnswer(agent_id=effect.agent_id, status=effect.status, agent_token=token, code=effect.code)
        return {"registered": 201, "updated": 200, "pending": 202}[effect.status], messages.encode(answer)

    def _beat(self, data: bytes) -> tuple[int, bytes]:
        heartbeat = messages.decode(data, Heartbeat)
        (effect,) = self.apply(HeartbeatCame(heartbeat=heartbeat, now_unix=self.unix_ms()))
        if isinstance(effect, Declined):
            return effect.status, effect.text.encode()
        assert isinstance(effect, Accepted), f"R14: a heartbeat was answered with {effect}"
        return 200, messages.encode(HeartbeatAnswer(status=effect.status, send_inventory=effect.send_inventory))

    def order(self, node: int, command: Command) -> None:
        """An admin orders something; of a node that is not known, nothing."""
        if self.up and (agent_id := self.ids.get(node)) is not None:
            self.apply(AgentCommanded(agent_id=agent_id, command=command))


__all__ = ["UP", "MakeRouter", "Serving", "Shell", "Witness"]
