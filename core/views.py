"""What the router shows of itself: agents, the queue, reasons, numbers.

Decides nothing; frozen snapshots that shells encode as they are. Times are relative ("from now", "since") or `UnixMs`, never an
`Instant`, which would mean nothing outside.
"""

from typing import Any

import msgspec

from core.events import Upstream
from core.messages import GpuDevice
from core.units import AgentId, Micros, RequestId, UnixMs


class EjectionView(msgspec.Struct, frozen=True, kw_only=True):
    """A node, or one model on it, that is passed over because it failed."""

    model: str | None
    """As displayed; None: the node at large."""
    until_s: float
    """Seconds from now until one request is tried there again; 0: at the next one."""
    why: str


class AgentView(msgspec.Struct, frozen=True, kw_only=True):
    """One agent as it is shown. Percentages 0-100, times as their names say; rows of models are Ollama's own."""

    id: AgentId
    name: str
    """Unique among all: `custom_name`, else `machine_name`, with a suffix where two would be equal."""
    machine_name: str
    ip_address: str
    ollama_version: str
    ollama_port: int
    agent_api_port: int | None = None
    agent_version: str | None = None
    upstream: Upstream
    agentless: bool = False
    simulated: bool = False
    status: str
    """`online`, `offline` or `pending`."""
    state: str
    """A `core.lifecycle.AgentState` value."""
    detail: str = ""
    """One sentence: why it is in this state."""
    registered_at: UnixMs
    last_seen: UnixMs | None = None
    gpu_available: bool = False
    gpu_devices: list[GpuDevice] = []
    gpu_count: int | None = None
    gpu_model: str | None = None
    custom_name: str | None = None
    tags: list[str] = []
    notes: str | None = None
    weight: float | None = None
    max_concurrent: int | None = None
    slots: int
    """Requests that one loaded model serves at once, as the node told; else what is assumed until it is learned."""
    slots_learned: bool = False
    """The node did not tell its slots: they are learned, model by model."""
    model_slots: dict[str, int] = {}
    """Models for which another number was learned than `slots`."""
    installed: list[Any] = []
    loaded: list[Any] = []
    in_flight: int = 0
    """Own leases."""
    active_requests: int = 0
    """Own leases and what the node reports beyond them."""
    cpu_usage: float | None = None
    memory_usage: float | None = None
    gpu_usage: float | None = None
    gpu_memory_usage: float | None = None
    gpu_memory_total_mb: float | None = None
    gpu_memory_used_mb: float | None = None
    gpu_temperature: float | None = None
    gpu_model_name: str | None = None
    gpu_compute_capability: str | None = None
    average_response_time_ms: float | None = None
    disk_free_bytes: int | None = None
    """On the disk that holds its models."""
    ollama_managed: bool = False
    """Its agent installed its Ollama."""
    ejections: list[EjectionView] = []
    code: str | None = None
    """What an admin approves; pending agents only."""


class WaitingView(msgspec.Struct, frozen=True, kw_only=True):
    """One waiting request."""

    request_id: RequestId
    position: int
    """From 1, over all clients."""
    route: str
    model: str | None
    client: str
    waited_ms: float
    expected_start_ms: float | None
    """From now; None when nobody can tell."""
    node: str | None = None
    """The node that it waits for."""
    slots: int | None = None
    """Requests for this model that that node serves at once."""
    slots_learned: bool = False
    """`slots` was learned, or is assumed until it is: the node did not tell."""
    why: str


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One node as a strategy saw it. `score` counts; the other fields are its parts, in the strategy's own unit (`auto`: µs)."""

    agent_id: AgentId
    name: str
    score: Micros
    parts: dict[str, int]
    chosen: bool


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision about a request."""

    after_ms: float
    """Since the request came."""
    outcome: str
    candidates: list[Candidate]
    """The best ones, best first."""
    out: dict[str, str]
    """Nodes that hold the model and could not be chosen, by name, and why."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request went where it went."""

    request_id: RequestId
    model: str | None
    strategy: str
    decisions: list[Decision]
    predicted_start_ms: float | None = None
    """When the first decision expected a node to begin with the prompt, since the request came; shown once the request is over."""
    observed_start_ms: float | None = None
    """When it began; None while the request lives, and where the node did not tell its times."""
    start_error_ms: float | None = None
    """Observed less predicted: above 0 it began later than expected."""


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """The router in numbers."""

    in_flight: int
    waiting: int
    agents: int
    agents_ready: int
    in_flight_by_agent: dict[AgentId, int]
    requests_total: int
    """Settled since the start."""
    loads_total: int = 0
    """Loads of a model that requests brought about."""
    reloads_total: int = 0
    """Those of them that replaced a runner of the same model with other options."""
    reloads_avoided_total: int = 0
    """Requests that fit a loaded runner, and would have replaced another one, had their runner options been disregarded."""
