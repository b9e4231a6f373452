"""A router with nodes, for the tests of what it decides: short ways to say what happens, and to pick effects."""

from collections.abc import Callable
from typing import Any, TypeVar

from core.config import RouterConfig
from core.events import (
    AgentCommanded,
    AgentRegistered,
    AttemptEnded,
    BackendAdded,
    Command,
    Effect,
    Ending,
    Event,
    Failure,
    FirstByte,
    Forward,
    Freed,
    HeartbeatCame,
    NodePolled,
    NodeSilent,
    PassOn,
    Pulse,
    Refuse,
    RequestCame,
    Route,
    SettingsChanged,
    Settled,
    Upstream,
    Usage,
    Wait,
)
from core.invariants import check
from core.inventory import Inventory
from core.messages import AgentSettings, GpuDevice, Heartbeat, Registration
from core.router import Router
from core.units import AgentId, Instant, RequestId, UnixMs

T = TypeVar("T")

GPU = [GpuDevice(model="RTX", count=1)]


def row(name: str, *, size: int = 4_900_000_000, digest: str = "") -> dict[str, Any]:
    """A row of `/api/tags` or `/api/ps`."""
    return {"name": name, "model": name, "size": size, "digest": digest or f"digest of {name}"}


def of(effects: list[Effect], kind: type[T]) -> list[T]:
    """The effects of one kind."""
    return [effect for effect in effects if isinstance(effect, kind)]


def one(effects: list[Effect], kind: type[T]) -> T:
    """The only effect of that kind."""
    (found,) = of(effects, kind)
    return found


def registration(name: str = "box", **changes: Any) -> Registration:
    """A plain agent's, with a GPU."""
    fields: dict[str, Any] = {
        "machine_name": name,
        "ip_address": "10.0.0.1",
        "ollama_version": "0.20.0",
        "ollama_port": 11434,
        "gpu_available": True,
        "gpu_devices": GPU,
    }
    return Registration(**{**fields, **changes})


def instead(part: Any, name: str, function: Callable[..., Any]) -> None:
    """Let `function` stand in the place of a method of one object whose attributes are slots. It is not given the object."""
    kind = type(part)
    own = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__, name: staticmethod(function)}
    part.__class__ = type(kind.__name__, (kind,), own)


class World:
    """A router that is checked after each step, and its time."""

    def __init__(self, **config: Any) -> None:
        self.now = 100.0
        self.router = Router(RouterConfig(**config), now=Instant(self.now))
        self.count = 0
        self.watch: Callable[[list[Effect]], None] = lambda effects: None
        """Shown the effects of each step, at its time."""

    def do(self, event: Event) -> list[Effect]:
        """`event` happens now."""
        effects = self.router.handle(event, now=Instant(self.now))
        check(self.router, now=Instant(self.now))
        self.watch(effects)
        return effects

    def wait(self, seconds: float) -> list[Effect]:
        """Time passes, deadline by deadline."""
        effects: list[Effect] = []
        end = self.now + seconds
        while (deadline := self.router.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            effects += self.tick()
        self.now = end
        return effects + self.tick()

    def tick(self) -> list[Effect]:
        """The timer rings."""
        effects = self.router.tick(now=Instant(self.now))
        assert self.router.tick(now=Instant(self.now)) == [], "R13: a second tick did something"
        check(self.router, now=Instant(self.now))
        self.watch(effects)
        return effects

    # ------------------------------------------------------------ nodes

    def backend(self, name: str, *models: str, loaded: tuple[str, ...] = (), slots: int = 1, size: int = 4_900_000_000) -> AgentId:
        """An agentless node that is ready."""
        agent_id = AgentId(f"id of {name}")
        upstream = Upstream(host="127.0.0.1", port=2000 + self.count)
        self.count += 1
        self.do(BackendAdded(agent_id=agent_id, name=name, upstream=upstream, slots=slots, now_unix=UnixMs(self.count)))
        self.poll(agent_id, installed=[row(model, size=size) for model in models], loaded=[row(model) for model in loaded])
        return agent_id

    def late_backend(self, name: str) -> AgentId:
        """An agentless node that was not heard yet."""
        agent_id = AgentId(f"id of {name}")
        self.do(BackendAdded(agent_id=agent_id, name=name, upstream=Upstream(host="127.0.0.1", port=1), now_unix=self.unix()))
        return agent_id

    def cap(self, agent_id: AgentId, requests: int) -> None:
        """An admin caps what is in flight on an agent."""
        self.do(SettingsChanged(agent_id=agent_id, settings=AgentSettings(max_concurrent=requests)))

    def poll(self, agent_id: AgentId, *, alive: bool = True, asked_at: float | None = None, **lists: Any) -> list[Effect]:
        """The node answers a poll."""
        asked = None if asked_at is None else Instant(asked_at)
        return self.do(NodePolled(agent_id=agent_id, alive=alive, asked_at=asked, now_unix=self.unix(), **lists))

    def silent(self, agent_id: AgentId, *, refused: bool = True) -> list[Effect]:
        """A check of the node fails."""
        return self.do(NodeSilent(agent_id=agent_id, refused=refused))

    def unix(self) -> UnixMs:
        """The calendar's time."""
        return UnixMs(1_700_000_000_000 + round(self.now * 1000))

    def register(
        self, given: Registration, *, agent_id: str = "", trusted: bool = True, host: str = "10.0.0.1", **changes: Any
    ) -> list[Effect]:
        """An agent introduces itself."""
        self.count += 1
        fields: dict[str, Any] = {
            "registration": given,
            "new_id": AgentId(agent_id or f"agent {self.count}"),
            "code": f"CODE-{self.count}",
            "trusted": trusted,
            "gpu_exempt": False,
            "upstream": Upstream(host=host, port=11435, gateway=True),
            "now_unix": self.unix(),
        }
        return self.do(AgentRegistered(**{**fields, **changes}))

    def beat(self, agent_id: str, **fields: Any) -> list[Effect]:
        """The agent reports."""
        given: dict[str, Any] = {"agent_id": agent_id, "cpu_usage": 10.0, "memory_usage": 20.0, **fields}
        return self.do(HeartbeatCame(heartbeat=Heartbeat(**given), now_unix=self.unix()))

    def agent_with(self, name: str, *models: str, **fields: Any) -> AgentId:
        """An agent that is ready; it tells one slot, if nothing else is said."""
        self.register(registration(name, **{"slots": 1, **fields}), agent_id=name)
        self.beat(name, installed_models=[row(model) for model in models], loaded_models=[], boot=fields.get("boot", 0), sequence=1)
        return AgentId(name)

    def order(self, agent_id: AgentId, command: Command) -> list[Effect]:
        """An admin orders something."""
        return self.do(AgentCommanded(agent_id=agent_id, command=command))

    def inventory(self, agent_id: AgentId) -> Inventory:
        """What the router believes the node holds."""
        agent = self.router._registry.get(agent_id)
        assert agent is not None
        return agent.inventory

    def state(self, agent_id: AgentId) -> str:
        """How the agent stands."""
        view = self.router.agent(agent_id)
        assert view is not None
        return view.state

    # ------------------------------------------------------------ requests

    def ask(self, request_id: str, model: str | None = "m", **fields: Any) -> list[Effect]:
        """A client asks."""
        given: dict[str, Any] = {"route": Route.CHAT, "client": "c", "stream": True, "input_tokens": 20, **fields}
        return self.do(RequestCame(request_id=RequestId(request_id), model=model, **given))

    def first(self, request_id: str) -> list[Effect]:
        """The first byte of an answer comes."""
        return self.do(FirstByte(request_id=RequestId(request_id)))

    def settle(self, request_id: str, ending: Ending = Ending.SUCCESS, **fields: Any) -> list[Effect]:
        """The request is over."""
        return self.do(Settled(request_id=RequestId(request_id), ending=ending, **fields))

    def free(self, request_id: str, **fields: Any) -> list[Effect]:
        """An edge that sees no bytes saw the attempt end."""
        return self.do(Freed(request_id=RequestId(request_id), **fields))

    def fail(self, request_id: str, failure: Failure, status: int = 0, text: str = "", **fields: Any) -> list[Effect]:
        """The attempt fails before its first byte."""
        return self.do(AttemptEnded(request_id=RequestId(request_id), failure=failure, status=status, text=text, **fields))

    def busy(self, request_id: str) -> list[Effect]:
        """The node says 503."""
        return self.fail(request_id, Failure.ANSWERED, 503, "server busy, please try again.  maximum pending requests exceeded")

    def serve(self, request_id: str, seconds: float = 1.0, **fields: Any) -> list[Effect]:
        """The node answers in `seconds`, first byte at once."""
        effects = self.first(request_id)
        self.now += seconds
        return effects + self.settle(request_id, **fields)

    def pulse(self, *requests: str, heard: tuple[AgentId, ...] = ()) -> list[Effect]:
        """The shell says what lives."""
        return self.do(Pulse(requests=tuple(RequestId(request_id) for request_id in requests), heard=heard))


class Fleet(World):
    """Nodes that serve: the model takes `service_s`, a load `load_s`; their answers come by themselves."""

    def __init__(self, *, service_s: float = 1.0, load_s: float = 5.0, **config: Any) -> None:
        super().__init__(**config)
        self.service_s, self.load_s = service_s, load_s
        self.ready_at: dict[AgentId, float] = {}
        self.ends: list[tuple[float, str, bool, str]] = []
        self.loads: list[AgentId] = []
        self.started: list[tuple[str, AgentId, float]] = []
        self.watch = self.serve_all

    def warm(self, name: str, **fields: Any) -> AgentId:
        """A node that has the model in memory."""
        agent_id = self.backend(name, "m", loaded=("m",), **fields)
        self.ready_at[agent_id] = self.now
        return agent_id

    def serve_all(self, effects: list[Effect]) -> None:
        """Note when each forwarded request will be answered."""
        for forward in of(effects, Forward):
            agent_id = forward.lease.agent_id
            cold = agent_id not in self.ready_at
            if cold:
                self.loads.append(agent_id)
                self.ready_at[agent_id] = self.now + self.load_s
            begins = max(self.now, self.ready_at[agent_id])
            self.started.append((forward.request_id, agent_id, begins))
            self.ends.append((begins + self.service_s / 4, "first", cold, forward.request_id))
            self.ends.append((begins + self.service_s, "settle", cold, forward.request_id))

    def run(self, *, seconds: float = 1000.0) -> None:
        """Let them serve until nothing happens any more, the nodes being heard all the time."""
        until = self.now + seconds
        while self.ends and min(self.ends)[0] <= until:
            event = min(self.ends)
            self.ends.remove(event)
            at, what, cold, request_id = event
            self.pulse(heard=tuple(view.id for view in self.router.agents()))
            self.wait(at - self.now)
            if what == "first":
                self.first(request_id)
            else:
                load_s = self.load_s if cold else 0.0
                self.settle(request_id, usage=usage(load_s=load_s, prompt_s=self.service_s / 4, eval_s=self.service_s * 3 / 4))


def three(**config: Any) -> tuple[World, list[AgentId]]:
    """A world with three equal nodes that have the model in memory."""
    world = World(**config)
    return world, [world.backend(name, "m", loaded=("m",), slots=9) for name in ("one", "two", "three")]


def answer(effects: list[Effect], request_id: str) -> Forward | Wait | Refuse | PassOn | None:
    """What is to be done with the request, if anything was decided; the last of it."""
    found = [effect for effect in effects if isinstance(effect, Forward | Wait | Refuse | PassOn) and effect.request_id == request_id]
    return found[-1] if found else None


def node_of(effects: list[Effect], request_id: str) -> AgentId | None:
    """Where the request is forwarded; None when it is not."""
    found = answer(effects, request_id)
    return found.lease.agent_id if isinstance(found, Forward) else None


def usage(*, prompt: int = 20, output: int = 50, load_s: float = 0.0, prompt_s: float = 0.1, eval_s: float = 0.9) -> Usage:
    """A node's own figures."""
    return Usage(
        prompt_tokens=prompt,
        output_tokens=output,
        total_ns=round((load_s + prompt_s + eval_s) * 1e9),
        load_ns=round(load_s * 1e9),
        prompt_ns=round(prompt_s * 1e9),
        eval_ns=round(eval_s * 1e9),
    )
