"""Every limit of the core, with its unit and its reason, checked once at birth.

Shells read the environment (`servers.settings`); the core only ever sees this struct. Invariant: a `RouterConfig` that exists is usable.
"""

from typing import Final

import msgspec

from core.errors import ConfigError
from core.units import MIB

STRATEGIES: Final = ("auto", "metrics", "least-busy", "round-robin")


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the router's decisions depend on. Times in seconds, sizes in bytes."""

    strategy: str = "auto"
    """`LOAD_BALANCER_MODE`: one of `STRATEGIES`."""

    agent_timeout_s: float = 60.0
    """`AGENT_TIMEOUT`: silence after which a node is offline, at that instant."""

    startup_grace_s: float = 15.0
    """After a start, how long a request for a model nobody listed waits for the known nodes to be heard."""

    metrics_fresh_s: float = 120.0
    """`metrics` scores only nodes whose numbers are younger (seed)."""

    queue_max: int = 1024
    """`ROUTER_QUEUE_MAX`: requests that may wait in all."""

    queue_per_client: int = 64
    """`ROUTER_QUEUE_PER_CLIENT`: requests that one client may have waiting."""

    queue_timeout_s: float = 300.0
    """`ROUTER_QUEUE_TIMEOUT`: longest wait before the 503."""

    busy_pause_s: float = 1.0
    """How long a node that said 503 for a model is passed over for it, doubled at each repeat up to `busy_pause_max_s`."""

    busy_pause_max_s: float = 8.0

    retries_budgeted: int = 2
    """Further attempts after failures that may have cost a node work (500, death after the request was taken)."""

    eject_after: int = 3
    """Consecutive failures of one (node, model) that eject it; also of a node over several models."""

    eject_s: float = 30.0
    """First ejection; multiplied by its count up to `eject_max_s` (Envoy's 30 s x count, at most 300 s)."""

    eject_max_s: float = 300.0

    lease_ttl_s: float = 30.0
    """A lease that nobody renewed for so long ends by itself. The embedded edge renews every `pulse_s`."""

    pulse_s: float = 5.0
    """How often a shell says which leases live and which nodes were heard."""

    report_s: float = 10.0
    """How long the end of a request may stay untold whose lease an edge has given back already."""

    slots_default: int = 1
    """`OLLAMA_NUM_PARALLEL` of a node that did not tell (Ollama's own default since v0.9.7)."""

    load_bytes_per_s: float = 1.5e9
    """Prior for reading a model's weights (routing.md 1.4), until a load was seen."""

    decode_prior_tok_s: float = 60.0
    """Prior single-stream decode speed of a 4.9 GB model; scaled by size."""

    prefill_prior_tok_s: float = 1500.0
    """Prior prefill speed of a 4.9 GB model; scaled by size."""

    output_prior_tokens: int = 150
    """Answer length of a model that has not answered yet."""

    agents_max: int = 4096
    """Registrations held, pending ones included; more are refused with 503."""

    explain_ring: int = 10_000
    """Recent requests whose decision can be explained."""

    raise_context: bool = False
    """`ROUTER_RAISE_CONTEXT`: raise a request's smaller `num_ctx` to that of the loaded runner where that spares a reload."""

    answer_hold_bytes: int = 16 * MIB
    """A non-streaming answer is held until whole up to this size, then passed through (contract 4)."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"LOAD_BALANCER_MODE must be one of {', '.join(STRATEGIES)}, not {self.strategy!r}")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if type(value) in (int, float) and not (value > 0 or (name == "retries_budgeted" and value == 0)):
                raise ConfigError(f"{name} must be above 0, not {value}")
        if self.pulse_s * 2 >= self.lease_ttl_s:
            raise ConfigError("lease_ttl_s must be more than twice pulse_s, or a late pulse would end living leases")
        if self.busy_pause_s > self.busy_pause_max_s or self.eject_s > self.eject_max_s:
            raise ConfigError("a first pause may not be longer than the longest one")
        if self.queue_per_client > self.queue_max:
            raise ConfigError("ROUTER_QUEUE_PER_CLIENT may not be above ROUTER_QUEUE_MAX")
