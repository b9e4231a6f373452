"""One node: everything that is known about it.

Decides how it is shown, and whether it could serve. Never decides its own state: `core.registry` does, and every step goes through `step`,
the only place that assigns one. Shells see `AgentView`s, never this.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from core.events import Upstream
from core.inventory import Inventory
from core.lifecycle import AgentInput, AgentState, advance
from core.messages import AgentSettings, GpuDevice, Heartbeat, Registration
from core.names import display
from core.room import Room
from core.units import MIB, AgentId, Instant, ModelKey, UnixMs
from core.views import AgentView, EjectionView

if TYPE_CHECKING:
    from core.slots import Pair

CHOSEN_BITS: Final = 40
"""Of `Agent.rank`: enough for 10¹² decisions."""

SHOWN_AS: Final[Mapping[AgentState, str]] = {
    AgentState.OFFLINE: "offline",
    AgentState.INITIALIZING: "online",
    AgentState.READY: "online",
    AgentState.DRAINING: "online",
    AgentState.HELD: "offline",
    AgentState.PENDING: "pending",
}

_FROM_HEARTBEAT: Final = (
    "average_response_time_ms", "gpu_usage", "gpu_memory_usage", "gpu_memory_total_mb", "gpu_memory_used_mb", "gpu_temperature",
    "gpu_model_name", "gpu_compute_capability", "ollama_version", "disk_free_bytes",
)  # fmt: skip


class Agent:
    """One node, with or without an agent on it."""

    __slots__ = (
        "_beyond", "_state", "agent_api_port", "agent_version", "agentless", "average_response_time_ms", "boot", "code",
        "cpu_usage", "custom_name", "disk_free_bytes", "drained_by_itself", "gpu_available", "gpu_compute_capability", "gpu_count",
        "gpu_devices", "gpu_memory_total_mb", "gpu_memory_usage", "gpu_memory_used_mb", "gpu_model", "gpu_model_name",
        "gpu_temperature", "gpu_usage", "id", "in_flight", "instance_id", "inventory", "ip_address", "last_chosen", "last_heard",
        "last_report", "last_seen", "learned", "limits", "machine_name", "max_concurrent", "memory_usage", "metrics_at", "name",
        "notes", "ollama_managed", "ollama_ok", "ollama_port", "ollama_version", "probes", "rank", "registered_at", "room", "simulated",
        "slots", "slots_told", "tags", "upstream", "wants_inventory", "weight", "why",
    )  # fmt: skip

    def __init__(self, agent_id: AgentId, upstream: Upstream, *, state: AgentState, now_unix: UnixMs) -> None:
        self.id = agent_id
        self.upstream = upstream
        self._state = state
        self.registered_at = now_unix
        self.name = ""
        self.machine_name = ""
        self.ip_address = upstream.host
        self.ollama_version = ""
        self.ollama_port = upstream.port
        self.agent_api_port: int | None = None
        self.agent_version: str | None = None
        self.instance_id: str | None = None
        self.agentless = False
        self.simulated = False
        self.gpu_available = False
        self.gpu_devices: list[GpuDevice] = []
        self.gpu_count: int | None = None
        self.gpu_model: str | None = None
        self.code: str | None = None
        self.why = ""
        """Why it is in its state, where the state alone does not say."""
        self.boot = 0
        self.last_report: tuple[int, int] = (0, 0)
        """(boot, sequence) of the newest heartbeat."""
        self.last_heard: Instant | None = None
        """None: not since the coordinator started."""
        self.last_seen: UnixMs | None = None
        self.last_chosen = 0
        """Number of the decision that chose it last."""
        self.custom_name: str | None = None
        self.tags: list[str] = []
        self.notes: str | None = None
        self.weight: float | None = None
        self.max_concurrent: int | None = None
        self.slots = 1
        """Requests that one loaded model serves at once, as the node told, else as is assumed until it was learned."""
        self.slots_told = False
        self.limits: dict[ModelKey, int] = {}
        """Of models for which something else was learned (`core.slots`)."""
        self.probes: dict[ModelKey, None] = {}
        """Models of which one request beyond the limit may be sent, to learn."""
        self.learned: dict[ModelKey, Pair] = {}
        self.drained_by_itself = False
        self.inventory = Inventory()
        self.room = Room()
        self.wants_inventory = False
        """What it is said to hold was found wrong."""
        self.ollama_ok = True
        self.cpu_usage = 0.0
        self.memory_usage = 0.0
        self.metrics_at: Instant | None = None
        """When CPU and memory were told last."""
        self.in_flight = 0
        """Our own requests on it: what the ledger counts, written down by `core.dispatch` for who asks very often."""
        self._beyond = 0
        self.rank = 1 << CHOSEN_BITS
        """Requests on it, ours and others', with the one that may come next, above `CHOSEN_BITS` bits of `last_chosen`: of nodes that are
        equally fast the one with the least is the best."""
        self.average_response_time_ms: float | None = None
        self.gpu_usage: float | None = None
        self.gpu_memory_usage: float | None = None
        self.gpu_memory_total_mb: float | None = None
        self.gpu_memory_used_mb: float | None = None
        self.gpu_temperature: float | None = None
        self.gpu_model_name: str | None = None
        self.gpu_compute_capability: str | None = None
        self.disk_free_bytes: int | None = None
        self.ollama_managed = False

    def __repr__(self) -> str:
        return f"<Agent {self.name} {self._state.value}>"

    @property
    def state(self) -> AgentState:
        """Where it stands."""
        return self._state

    @property
    def beyond(self) -> int:
        """Requests that the node reported beyond our own."""
        return self._beyond

    @beyond.setter
    def beyond(self, count: int) -> None:
        self.rank += (count - self._beyond) << CHOSEN_BITS
        self._beyond = count

    def works_on(self, count: int) -> None:
        """So many of our own requests are on it now."""
        self.rank += (count - self.in_flight) << CHOSEN_BITS
        self.in_flight = count

    def takes(self, count: int, chosen: int) -> None:
        """The decision of that number has just chosen it; so many of our own requests are on it now."""
        self.rank += ((count - self.in_flight) << CHOSEN_BITS) + (chosen - self.last_chosen)
        self.in_flight, self.last_chosen = count, chosen

    @property
    def well(self) -> bool:
        """Whether it could serve: its models are known and its Ollama answers."""
        return self.ollama_ok and self.inventory.known

    def step(self, given: AgentInput) -> bool:
        """Take one step of the lifecycle. Returns whether the state is another one now.

        Raises:
            IllegalTransition: there is no such step.
        """
        before = self._state
        self._state = advance(before, given)
        return self._state is not before

    def introduce(self, registration: Registration, upstream: Upstream) -> None:
        """Take over what the agent says of itself; what an admin set stays."""
        self.upstream = upstream
        for name in ("machine_name", "ip_address", "ollama_version", "ollama_port", "agent_api_port", "agent_version", "instance_id",
                     "gpu_available", "simulated", "ollama_managed"):  # fmt: skip
            setattr(self, name, getattr(registration, name))
        self.gpu_devices = list(registration.gpu_devices)
        self.gpu_count = registration.gpu_count
        if self.gpu_count is None and registration.gpu_devices:
            self.gpu_count = sum(device.count for device in registration.gpu_devices)
        self.gpu_model = registration.gpu_model or (registration.gpu_devices[0].model if registration.gpu_devices else None)
        if registration.slots is not None:
            self.told_slots(registration.slots)
        self.measure_room()

    def told_slots(self, slots: int) -> None:
        """The node, or who added it, says how many requests one loaded model serves at once. What was learned under another number is
        forgotten."""
        if not self.slots_told or slots != self.slots:
            self.limits, self.probes, self.learned = {}, {}, {}
        self.slots, self.slots_told = slots, True

    def slots_for(self, key: ModelKey) -> int:
        """How many requests for this model it serves at once, as far as is known."""
        return self.limits.get(key, self.slots)

    def take_numbers(self, heartbeat: Heartbeat, *, now: Instant) -> None:
        """Take over the numbers of a heartbeat; what it does not tell stays."""
        self.cpu_usage = heartbeat.cpu_usage
        self.memory_usage = heartbeat.memory_usage
        self.metrics_at = now
        self.ollama_ok = heartbeat.ollama_ok
        for name in _FROM_HEARTBEAT:
            value = getattr(heartbeat, name)
            if value is not None:
                setattr(self, name, value)
        self.measure_room()

    def measure_room(self) -> None:
        """Take over GPU memory: as measured, else as the devices have it."""
        known = [device.memory * device.count for device in self.gpu_devices if device.memory]
        measured = self.gpu_memory_total_mb
        total = round(measured * MIB) if measured else sum(known) if len(known) == len(self.gpu_devices) else None
        self.room.told(total_bytes=total, gpus=self.gpu_count)

    def take_settings(self, settings: AgentSettings) -> None:
        """Set what an admin gave; null clears, absent leaves."""
        for name in settings.__struct_fields__:
            value = getattr(settings, name)
            if name == "tags" and value is None:
                self.tags = []
            elif value is None or isinstance(value, (str, int, float, list)):
                setattr(self, name, value)

    def inherit(self, former: "Agent") -> None:
        """Take over what an admin set for the agent that this one replaces."""
        for name in ("custom_name", "tags", "notes", "weight", "max_concurrent"):
            setattr(self, name, getattr(former, name))

    def detail(self, in_flight: int) -> str:
        """One sentence: why it is in its state."""
        match self._state:
            case AgentState.READY:
                return "takes requests"
            case AgentState.INITIALIZING:
                return "its models are not known yet" if self.ollama_ok else "its Ollama does not answer"
            case AgentState.DRAINING:
                return f"{self.why}; {in_flight} of its requests {'is' if in_flight == 1 else 'are'} still running"
            case AgentState.PENDING:
                return "waits for an admin's approval"
            case AgentState.OFFLINE | AgentState.HELD:
                return self.why

    def view(self, *, in_flight: int, ejections: list[EjectionView]) -> AgentView:
        """As it is shown."""
        same = {name: getattr(self, name) for name in _SAME}
        return AgentView(
            **same,
            status=SHOWN_AS[self._state],
            state=self._state.value,
            detail=self.detail(in_flight),
            cpu_usage=self.cpu_usage if self.metrics_at is not None else None,
            memory_usage=self.memory_usage if self.metrics_at is not None else None,
            installed=self.inventory.installed_rows,
            loaded=self.inventory.loaded_rows,
            in_flight=in_flight,
            active_requests=in_flight + self.beyond,
            ejections=ejections,
            slots_learned=not self.slots_told,
            model_slots={display(key): limit for key, limit in self.limits.items()},
        )

    def holds(self, key: ModelKey) -> bool:
        """Whether it has the model, loaded or not."""
        return key in self.inventory.installed


_OWN: Final = ("status", "state", "detail", "cpu_usage", "memory_usage", "installed", "loaded", "in_flight", "active_requests", "ejections",
        "slots_learned", "model_slots")  # fmt: skip
_SAME: Final = tuple(name for name in AgentView.__struct_fields__ if name not in _OWN)


def blank_agent() -> Agent:
    """One of which nothing is known, to be filled with what was kept of another (`core.snapshot`)."""
    return Agent(AgentId(""), Upstream(host="", port=0), state=AgentState.PENDING, now_unix=UnixMs(0))
