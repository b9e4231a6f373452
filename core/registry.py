"""Who the nodes are: identity, state, inventory, and what an admin set.

Work in progress: so far only the view that the shells show.
"""

from typing import Any

import msgspec

from core.events import Upstream
from core.messages import GpuDevice
from core.units import AgentId, UnixMs


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
    """Requests that one loaded model serves at once."""
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
    ejections: list["EjectionView"] = []
    code: str | None = None
    """What an admin approves; pending agents only."""


class EjectionView(msgspec.Struct, frozen=True, kw_only=True):
    """A node, or one model on it, that is passed over because it failed."""

    model: str | None
    """As displayed; None: the node at large."""
    until_s: float
    """Seconds from now until a request is tried there again."""
    why: str
