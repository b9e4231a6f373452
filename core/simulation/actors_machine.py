"""One machine of the fleet: an Ollama, perhaps an agent with its gateway, and everything that can go wrong with them.

Decides what the machine answers; the timing is `core.simulation.node`'s, the agent's part of the conversation the real `AgentLink`'s,
each on a clock of its own. Never knows the router. Invariants: a machine that is down says nothing; one that stands still answers what
came meanwhile when it goes on; an answer of an earlier boot reaches nobody.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from core import agent_link
from core.agent_link import AgentLink
from core.errors import RemoteError
from core.events import Failure, Usage
from core.messages import GpuDevice, HeartbeatAnswer, Registration, RegistrationAnswer, decode, encode
from core.names import key_or_none
from core.simulation.actors import Alarm, Answer, Clock, Connection, Stage
from core.simulation.network import DOWN, UP
from core.simulation.node import SimulatedNode
from core.simulation.node_words import (
    Came,
    Change,
    Finished,
    Left,
    LoadFailed,
    ModelTiming,
    NodeTiming,
    Produced,
    Refused,
    RunnerChanged,
    UnloadAsked,
)
from core.simulation.prng import Prng
from core.units import Instant

LOOK_S: Final = 2.0
"""How often an agent looks at its Ollama."""
KEEPALIVE_S: Final = 20.0
"""After a silent crash and a boot, how long until the coordinator's system finds a connection dead (`edge.pool` has it ask)."""
SOON_S: Final = 0.02
"""Until an agent sees a change, and until a node answers what takes no work."""
ROUNDING_S: Final = 1e-3
"""How far a deadline may lie ahead because clocks were converted."""
BUSY_TEXT: Final = "server busy, please try again.  maximum pending requests exceeded"
VERSION: Final = "0.12.6"


class Coordinator(Protocol):
    """The other end of the network."""

    def heard(self, connection: Connection, answer: Answer) -> None:
        """An answer arrived."""

    def called(self, machine: "Machine", boot: int, call: int, kind: str, data: bytes) -> None:
        """An agent's message arrived; `kind` is `register` or `heartbeat`."""


class Machine:
    """Node `index`. `models` are those it could run, `held` those that lie on its disk at first, by name."""

    def __init__(
        self,
        index: int,
        stage: Stage,
        coordinator: Coordinator,
        *,
        timing: NodeTiming,
        models: dict[str, ModelTiming],
        held: list[str],
        agented: bool,
        trusted: bool,
        prng: Prng,
        make_link: Callable[..., AgentLink] = AgentLink,
    ) -> None:
        self.index, self.agented, self.trusted = index, agented, trusted
        self._stage, self._coordinator = stage, coordinator
        self._timing, self._models = timing, models
        self._held = {name: models[name] for name in held}
        self._faults, self._link_dice, self._node_dice = prng.split("faults"), prng.split("link"), prng.split("node")
        self._make_link = make_link
        self.up = self.ollama_up = False
        self.leaks = self.pinned = 0
        """Requests that leak their slot if their client leaves in mid-answer, and that keep their model in memory for ever."""
        self.silent = False
        """While down: whether connections are met with silence instead of a reset."""
        self.boot = 0
        self.loads = 0
        """Model loads that it began."""
        self.agent_id: str | None = None
        """As the coordinator told its agent last."""
        self.token: str | None = None
        self.link: AgentLink | None = None
        self.heartbeats: deque[bytes] = deque(maxlen=stage.options.echo_heartbeats)
        self.load = agent_link.Load(cpu_usage=10.0 + index, memory_usage=20.0)
        self._paused = False
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._failing, self._failing_until = "", 0.0
        self._pins = True
        """Whether clients can have a model kept in memory for ever."""
        self._speed = 1.0
        self._clock = Clock(now=stage.now)
        self._link_clock = Clock(now=stage.now)
        self._connections: dict[str, Connection] = {}
        self._orphans: list[Connection] = []
        """Those that a silent crash left open at the other end."""
        self._ollama_alarm = Alarm(stage, self._ollama_due)
        self._link_alarm = Alarm(stage, self._link_due)
        self._look_alarm = Alarm(stage, self._look_due)
        self.start()

    # ------------------------------------------------------------ power

    def start(self) -> None:
        """Boot, unless it is up."""
        if self.up:
            return
        now = self._stage.now
        self.up, self.silent, self._paused, self._speed = True, False, False, 1.0
        self.boot += 1
        orphans, self._orphans = self._orphans, []
        for connection in orphans:
            self._stage.at(now + KEEPALIVE_S, self._say, connection, RESET)
        self._clock = Clock(now=now)
        self._link_clock.turn(self._link_clock.rate, now=now)
        self.start_ollama()
        if self.agented:
            self.link = self._make_link(
                self._registration(),
                interval_s=self._stage.options.heartbeat_s,
                dice=self._link_dice.below,
                now=self._link_clock.local(now=now),
            )
            self._look_due(now)

    def crash(self, *, silent: bool) -> None:
        """Go down. `silent`: as in a power failure, connections just stop."""
        if not self.up:
            return
        connections = list(self._connections.values())
        connections += [given[0] for deed, given in self._inbox if deed == self.taken]
        self.up = self.ollama_up = self._paused = False
        self.silent, self.link = silent, None
        self._inbox.clear()
        self._connections.clear()
        for alarm in (self._ollama_alarm, self._link_alarm, self._look_alarm):
            alarm.set(float("inf"))
        if silent:
            self._orphans += connections
            return
        for connection in connections:
            self._say(connection, RESET)

    def start_ollama(self) -> None:
        """Its Ollama starts with nothing in memory."""
        if self.up and not self.ollama_up:
            self.ollama_up = True
            self._node = SimulatedNode(self._timing, self._held, now=self._clock.local(now=self._stage.now), dice=self._node_dice)

    def kill_ollama(self) -> None:
        """Its Ollama dies, its connections are reset."""
        if self.ollama_up:
            self.ollama_up = False
            self._ollama_alarm.set(float("inf"))
            for connection in list(self._connections.values()):
                self._end(connection, Answer(failure=Failure.DIED, text="the node's Ollama is gone"))

    def pause(self) -> None:
        """Stand still."""
        if self.up:
            self._paused = True
            self._turn_clock()

    def resume(self) -> None:
        """Go on, and answer what came meanwhile."""
        if self._paused:
            self._paused = False
            self._turn_clock()
            inbox, self._inbox = self._inbox, []
            for deed, given in inbox:
                deed(*given)
            if self.link is not None:
                self._look_due(self._stage.now)

    def slow(self, percent: int) -> None:
        """Its Ollama works at this share of its speed."""
        self._speed = percent / 100
        if self.up:
            self._turn_clock()

    def drift(self, percent: int) -> None:
        """Its agent's clock runs at this share of true speed."""
        self._link_clock.turn(percent / 100, now=self._stage.now)
        self._drive_link()

    def fail(self, how: str, until: float) -> None:
        """What it is given fails in this way until then."""
        self._failing, self._failing_until = how, until

    def stop_agent(self) -> None:
        """The agent leaves in order."""
        if self.link is not None and not self._paused:
            self._link_effects(self.link.handle(agent_link.StopAsked(), now=self._link_clock.local(now=self._stage.now)))
            self._drive_link()

    def hold(self, name: str, held: bool) -> None:
        """A model comes to its disk or goes from it."""
        if held:
            self._held[name] = self._models[name]
        else:
            self._held.pop(name, None)

    def streaming(self, connection: Connection) -> bool:
        """Whether tokens of this answer leave it just now."""
        return connection.key in self._connections and not self._paused

    @property
    def could_hold(self) -> list[str]:
        """Names of the models that it could run."""
        return list(self._models)

    @property
    def in_flight(self) -> int:
        """Requests that it works on."""
        return len(self._connections)

    def _turn_clock(self) -> None:
        now = self._stage.now
        if self.ollama_up:
            self._ollama_effects(self._node.tick(now=self._clock.local(now=now)))
        self._clock.turn(0.0 if self._paused else self._speed, now=now)
        self._arm_ollama()

    # ------------------------------------------------------------ requests

    def dial(self, *, via_gateway: bool) -> str:
        """What a connection meets: `open`, `refused`, or `silence`."""
        if not self.up:
            return "silence" if self.silent else "refused"
        answers = self.link is not None if via_gateway else self.ollama_up
        return "open" if answers or self._paused else "refused"

    def taken(self, connection: Connection) -> None:
        """A request arrived whole."""
        if not self.up:
            if self.silent:
                self._orphans.append(connection)
            else:
                self._say(connection, RESET)
        elif self._paused:
            self._inbox.append((self.taken, (connection,)))
        elif not connection.client_closed:
            self._serve(connection)

    def mend(self) -> None:
        """It loses no slots and keeps nothing in memory for ever any more: its Ollama starts anew where that was asked for."""
        self._pins = False
        if self.leaks or self.pinned:
            self.leaks = self.pinned = 0
            self.kill_ollama()
            self.start_ollama()

    def closed(self, connection: Connection) -> None:
        """The coordinator closed the connection."""
        if self._paused:
            self._inbox.append((self.closed, (connection,)))
        elif self._connections.pop(connection.key, None) is not None:
            self._ollama_effects(self._node.handle(Left(connection.key), now=self._clock.local(now=self._stage.now)))

    def unload(self, name: str) -> None:
        """The coordinator asks it to unload a model."""
        if self._paused:
            self._inbox.append((self.unload, (name,)))
        elif self.up and self.ollama_up:
            key = key_or_none(name)
            held = next((model for model in self._held if key_or_none(model) == key), None)
            if held is not None:
                self._ollama_effects(self._node.handle(UnloadAsked(held), now=self._clock.local(now=self._stage.now)))

    def _serve(self, connection: Connection) -> None:
        ask = connection.ask
        how = self._fault()
        name = self._name(connection)
        refusal = _REFUSALS.get(how)
        if not self.ollama_up or (connection.via_gateway and self.link is None):
            refusal = Answer(failure=Failure.REFUSED, text="the node's Ollama does not answer")
        elif refusal is None and name is None and not connection.came.model:
            refusal = Answer(failure=Failure.ANSWERED, status=400, text="model is required")
        elif refusal is None and name is None:
            refusal = Answer(failure=Failure.ANSWERED, status=404, text=f"model '{connection.came.model}' not found, try pulling it first")
        if refusal is not None or name is None:
            assert refusal is not None
            self._stage.at(self._stage.now + SOON_S, self._say, connection, refusal)
            return
        if ask.kind in ("show", "unload"):
            if ask.kind == "unload":
                self.unload(name)
            self._stage.at(self._stage.now + SOON_S, self._say, connection, Answer(first=True, end=True, usage=Usage()))
            return
        self._connections[connection.key] = connection
        leaks = ask.stream and not self._stage.healed and (how == "leak" or self._faults.chance(self._stage.options.leak))
        self.leaks += leaks
        keep_alive_s = ask.keep_alive_s
        if keep_alive_s is not None and keep_alive_s < 0:
            self.pinned += 1
            keep_alive_s = keep_alive_s if self._pins else None
        came = Came(
            request_id=connection.key,
            model=name,
            prompt_tokens=0 if ask.kind == "load" else ask.input_tokens,
            output_tokens=ask.output_tokens,
            num_ctx=ask.num_ctx,
            keep_alive_s=keep_alive_s,
            conversation="" if ask.conversation is None else str(ask.conversation),
            leaks=leaks,
            hold_at=1 if how == "cut" and ask.output_tokens > 1 else None,
            load_error="llama runner process has terminated" if how == "load_error" else "",
        )
        self._ollama_effects(self._node.handle(came, now=self._clock.local(now=self._stage.now)))

    def _name(self, connection: Connection) -> str | None:
        """The held model that the request names."""
        key = key_or_none(connection.came.model or "")
        return next((name for name in self._held if key_or_none(name) == key), None) if key is not None else None

    def _fault(self) -> str:
        """In which way a new request fails; "" when it does not."""
        options, dice = self._stage.options, self._faults
        if self._stage.healed:
            return ""
        if self._stage.now < self._failing_until:
            return self._failing
        for how in FAULTS:
            if dice.chance(getattr(options, how)):
                return how
        return ""

    def _ollama_due(self, when: float) -> None:
        self._ollama_effects(self._node.tick(now=Instant(max(self._node_due, self._clock.local(now=when)))))

    def _arm_ollama(self) -> None:
        deadline = self._node.next_deadline() if self.ollama_up else None
        self._node_due = float("inf") if deadline is None else deadline
        self._ollama_alarm.set(float("inf") if deadline is None else self._clock.when(deadline))

    def _ollama_effects(self, effects: list[Any]) -> None:
        for effect in effects:
            match effect:
                case Produced(request_id=key):
                    if (connection := self._connections.get(key)) is not None and connection.ask.stream:
                        self._say(connection, Answer(first=True))
                case Finished(request_id=key, timing=timing):
                    rate = self._clock.rate or 1.0
                    usage = Usage(
                        prompt_tokens=timing.prompt_tokens,
                        output_tokens=timing.output_tokens,
                        total_ns=_ns(timing.finished - timing.came, rate),
                        load_ns=_ns(timing.obtained - timing.came, rate),
                        prompt_ns=_ns(timing.first - timing.started, rate),
                        eval_ns=_ns(timing.finished - timing.first, rate),
                    )
                    self._end_key(key, Answer(first=True, end=True, usage=usage))
                case Refused(request_id=key):
                    self._end_key(key, Answer(failure=Failure.ANSWERED, status=503, text=BUSY_TEXT))
                case LoadFailed(request_id=key, text=text):
                    self._end_key(key, Answer(failure=Failure.ANSWERED, status=500, text=text))
                case RunnerChanged(change=change):
                    self.loads += change is Change.LOADING
                    if self.link is not None:
                        self._look_alarm.set(self._stage.now + SOON_S)
                case _:  # held at its first token: this one breaks off
                    self._ollama_effects(self._node.handle(Left(effect.request_id), now=self._clock.local(now=self._stage.now)))
                    self._end_key(effect.request_id, Answer(failure=Failure.DIED, text="the node broke off"))
        self._arm_ollama()

    def _end_key(self, key: str, answer: Answer) -> None:
        if (connection := self._connections.get(key)) is not None:
            self._end(connection, answer)

    def _end(self, connection: Connection, answer: Answer) -> None:
        del self._connections[connection.key]
        self._say(connection, answer)

    def _say(self, connection: Connection, answer: Answer) -> None:
        stage = self._stage
        connection.arrives_up = stage.network.stream(self.index, UP, now=stage.now, after=connection.arrives_up)
        stage.at(connection.arrives_up, self._coordinator.heard, connection, answer)

    # ------------------------------------------------------------ what it holds

    def rows(self) -> list[dict[str, Any]]:
        """`/api/tags`."""
        return [{"name": name, "model": name, "size": model.size_bytes, "digest": _digest(model)} for name, model in self._held.items()]

    def loaded_rows(self) -> list[dict[str, Any]]:
        """`/api/ps`."""
        if not self.ollama_up:
            return []
        return [
            {
                "name": row.model,
                "model": row.model,
                "size": row.size_bytes,
                "size_vram": row.in_memory_bytes,
                "digest": _digest(self._models[row.model]),
                "context_length": row.context,
            }
            for row in self._node.loaded(now=self._clock.local(now=self._stage.now))
        ]

    def asked(self, answer: Callable[["Machine"], None]) -> None:
        """A poll of the coordinator arrived; `answer` is called when it can be answered."""
        if self._paused:
            self._inbox.append((self.asked, (answer,)))
        elif self.ollama_up:
            answer(self)

    # ------------------------------------------------------------ the agent

    def answered(self, boot: int, call: int, kind: str, status: int, data: bytes) -> None:
        """The coordinator's answer to a call arrived; status 0: no connection."""
        if self._paused:
            self._inbox.append((self.answered, (boot, call, kind, status, data)))
            return
        if self.link is None or boot != self.boot:
            return
        event: agent_link.Event
        try:
            if status == 0:
                event = agent_link.CallFailed(call=call, text="connection refused")
            elif status >= 300:
                event = agent_link.CallRefused(call=call, status=status, text=data.decode())
            elif kind == "heartbeat":
                event = agent_link.HeartbeatAnswered(call=call, answer=decode(data, HeartbeatAnswer))
            else:
                event = agent_link.RegistrationAnswered(call=call, answer=decode(data, RegistrationAnswer))
        except RemoteError as error:  # never happens while both ends are ours
            raise AssertionError(f"R17: the coordinator's own answer cannot be read: {error}") from error
        self._link_effects(self.link.handle(event, now=self._link_clock.local(now=self._stage.now)))
        self._drive_link()

    def _registration(self) -> Registration:
        index = self.index
        return Registration(
            machine_name=f"node-{index}",
            ip_address=f"192.0.2.{index + 1}",
            ollama_version=VERSION,
            ollama_port=11434,
            gpu_available=True,
            gpu_devices=[GpuDevice(model="simulated", count=1, memory=self._timing.memory_bytes)],
            agent_api_port=11435,
            slots=self._timing.slots if index % 3 or self._stage.options.slots_told else None,
            instance_id=f"instance-{index}" if index % 4 else None,
            boot=self.boot,
        )

    def _look_due(self, when: float) -> None:
        """The agent looks at its Ollama; not while it stands still."""
        if self.link is None or self._paused:
            return
        installed = self.rows() if self.ollama_up else None
        loaded = self.loaded_rows() if self.ollama_up else None
        seen = agent_link.OllamaPolled(ok=self.ollama_up, version=VERSION if self.ollama_up else None, installed=installed, loaded=loaded)
        now = self._link_clock.local(now=when)
        self.link.handle(agent_link.LoadSampled(load=self.load), now=now)
        self._link_effects(self.link.handle(seen, now=now))
        self._look_alarm.set(when + LOOK_S)
        self._drive_link()

    def _link_due(self, when: float) -> None:
        if self.link is None or self._paused:
            return
        now, due = self._link_clock.local(now=when), self.link.next_deadline()
        if due is not None and now < due < now + ROUNDING_S:
            now = due
        work = agent_link.WorkSeen(in_flight=tuple(connection.came.request_id for connection in self._connections.values()))
        self.link.handle(work, now=now)
        self._link_effects(self.link.tick(now=now))
        self._drive_link()

    def _drive_link(self) -> None:
        if self.link is None or self._paused:
            return
        due = self.link.next_deadline()
        self._link_alarm.set(float("inf") if due is None else max(self._stage.now, self._link_clock.when(due)))

    def _link_effects(self, effects: list[agent_link.Effect]) -> None:
        for effect in effects:
            match effect:
                case agent_link.SendRegistration(call=call, registration=registration):
                    self._send(call, "register", encode(registration))
                case agent_link.SendHeartbeat(call=call, heartbeat=heartbeat):
                    data = encode(heartbeat)
                    self.heartbeats.append(data)
                    self._send(call, "heartbeat", data)
                case agent_link.Admitted():
                    self.agent_id = effect.agent_id
                    self.token = effect.agent_token or self.token
                case agent_link.Left():
                    self._leave()
                case _:
                    pass

    def _leave(self) -> None:
        """The agent is gone, and its gateway with it."""
        self.link = None
        self._link_alarm.set(float("inf"))
        for connection in [connection for connection in self._connections.values() if connection.via_gateway]:
            self._node.handle(Left(connection.key), now=self._clock.local(now=self._stage.now))
            self._end(connection, Answer(failure=Failure.DIED, text="the agent stopped"))
        self._arm_ollama()

    def _send(self, call: int, kind: str, data: bytes) -> None:
        stage = self._stage
        for at in stage.network.datagram(self.index, UP, now=stage.now):
            stage.at(at, self._coordinator.called, self, self.boot, call, kind, data)

    def reply(self, boot: int, call: int, kind: str, status: int, data: bytes) -> None:
        """The coordinator sends its answer to a call."""
        stage = self._stage
        for at in stage.network.datagram(self.index, DOWN, now=stage.now):
            stage.at(at, self.answered, boot, call, kind, status, data)


def _digest(model: ModelTiming) -> str:
    return f"digest-of-{model.weights}"


def _ns(seconds: float, rate: float) -> int:
    return round(max(0.0, seconds) / rate * 1e9)


RESET: Final = Answer(failure=Failure.DIED, text="connection reset by the node")
FAULTS: Final = ("refuse_500", "refuse_503", "cut", "empty", "died", "load_error")
_REFUSALS: Final = {
    "refuse_500": Answer(failure=Failure.ANSWERED, status=500, text="llama runner process has terminated: exit status 2"),
    "refuse_503": Answer(failure=Failure.ANSWERED, status=503, text=BUSY_TEXT),
    "empty": Answer(failure=Failure.EMPTY, status=200, text="the node answered nothing"),
    "died": Answer(failure=Failure.DIED, text="the connection broke"),
}
"""Faults that need no work of the node."""
