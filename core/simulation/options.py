"""What a run of the world is made of: how large, how busy, how hostile.

Decides every probability of a run, once, at its start. Swarm testing: each run draws its own, and leaves whole kinds of trouble out, so
that rare mixes come up too. Knows nothing of what happens in the run. Invariant: the same seed draws the same options.
"""

from typing import Final

import msgspec

from core.config import STRATEGIES, RouterConfig
from core.simulation.prng import NEVER, Prng, Ratio

TROUBLES: Final = (
    "crash", "power_loss", "ollama_death", "pause", "slow", "drift", "failing", "partition", "clog", "command", "settings",
    "leaving", "restart", "storm", "echo", "forget", "inventory", "metrics",
)  # fmt: skip
"""Kinds of chaos (`core.simulation.fate` says what each one does)."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds. `troubles`: weight of each kind of `TROUBLES`, in that order."""

    config: RouterConfig = RouterConfig()
    nodes: int = 4
    agentless: int = 0
    """How many of the nodes have no agent; they are polled."""
    homogeneous: bool = False
    """All nodes alike, each with every model."""
    models: int = 3
    clients: int = 4
    slots: int = 2
    slots_told: bool = True
    """Whether all agents tell their slots; else every third one does not."""
    max_loaded: int = 3
    """Models that a node keeps in memory at most."""
    max_queue: int = 512
    keep_alive_s: float = 300.0
    heartbeat_s: float = 5.0
    check_s: float = 30.0
    """How often an agentless node is asked everything."""
    gap_s: float = 0.5
    """Mean time between two requests of all clients together."""
    patience_s: float = 120.0
    """Mean; clients wait between half of it and twice as long."""
    output_tokens: int = 200
    """The longest answers."""
    lag_s: float = 0.0005
    """Between an effect for a waiting request and its task's next turn."""
    delay_s: float = 0.002
    """Mean of a message's way."""
    loss: Ratio = NEVER
    duplicate: Ratio = NEVER
    reorder: Ratio = NEVER
    refuse_500: Ratio = NEVER
    refuse_503: Ratio = NEVER
    cut: Ratio = NEVER
    """Answers that break off after their first token."""
    empty: Ratio = NEVER
    """Answers with status 200 and nothing in it."""
    died: Ratio = NEVER
    """Connections that break after the request was taken, before a byte."""
    load_error: Ratio = NEVER
    leak: Ratio = NEVER
    """Streams that leak their slot when their client leaves in mid-answer."""
    strangers: Ratio = NEVER
    """Agents that an admin must approve first."""
    trouble_gap_s: float = 0.0
    """Mean time between two troubles; 0: none."""
    troubles: tuple[int, ...] = (0,) * len(TROUBLES)
    echo_heartbeats: int = 8
    """Heartbeats per node that may be delivered again, much later."""


def swarm(prng: Prng, *, nodes: int | None = None) -> Options:
    """Anything goes."""
    count = nodes or prng.between(1, 8)
    common = Ratio(1, prng.pick((20, 50, 200)))

    def now_and_then() -> Ratio:
        return common if prng.chance(Ratio(1, 3)) else NEVER

    homogeneous = prng.chance(Ratio(1, 4))
    return Options(
        config=_config(prng),
        nodes=count,
        agentless=prng.below(count + 1) if prng.chance(Ratio(1, 3)) else 0,
        homogeneous=homogeneous,
        models=prng.between(1, 6),
        clients=prng.between(1, 12),
        slots=prng.pick((1, 1, 2, 4)),
        slots_told=prng.chance(Ratio(1, 2)),
        max_loaded=prng.pick((1, 2, 3)),
        max_queue=prng.pick((1, 4, 512)),
        keep_alive_s=prng.pick((5.0, 30.0, 300.0)),
        heartbeat_s=prng.pick((1.0, 2.0, 5.0, 10.0)),
        check_s=prng.pick((5.0, 10.0, 30.0)),
        gap_s=prng.pick((0.1, 0.3, 1.0, 3.0)),
        patience_s=prng.pick((3.0, 30.0, 300.0)),
        output_tokens=prng.pick((5, 50, 400)),
        lag_s=prng.pick((0.0, 0.0005, 0.01)),
        delay_s=prng.pick((0.0005, 0.005, 0.05)),
        loss=now_and_then(),
        duplicate=now_and_then(),
        reorder=now_and_then(),
        refuse_500=now_and_then(),
        refuse_503=now_and_then(),
        cut=now_and_then(),
        empty=now_and_then(),
        died=now_and_then(),
        load_error=now_and_then(),
        strangers=now_and_then(),
        trouble_gap_s=prng.pick((0.0, 2.0, 10.0, 40.0)),
        troubles=tuple(prng.between(1, 4) if prng.chance(Ratio(1, 2)) else 0 for _ in TROUBLES),
        leak=now_and_then(),
    )


def lite(prng: Prng, *, nodes: int | None = None) -> Options:
    """Crashes of nodes and of the coordinator only, over a good network."""
    return Options(
        config=_config(prng),
        nodes=nodes or prng.between(2, 8),
        models=prng.between(1, 4),
        slots=prng.pick((1, 2, 4)),
        gap_s=prng.pick((0.2, 1.0)),
        trouble_gap_s=prng.pick((5.0, 20.0)),
        troubles=tuple(1 if kind in ("crash", "power_loss", "ollama_death", "restart") else 0 for kind in TROUBLES),
    )


def performance(*, nodes: int = 8) -> Options:
    """No faults, a fixed workload: what speed is measured with."""
    return Options(nodes=nodes, homogeneous=True, models=4, slots=4, clients=8, gap_s=1.6 / nodes, heartbeat_s=5.0)


def _config(prng: Prng) -> RouterConfig:
    queue_max = prng.pick((2, 16, 1024))
    eject_s = prng.pick((5.0, 30.0))
    return RouterConfig(
        strategy=prng.pick((*STRATEGIES, "auto", "auto")),
        agent_timeout_s=prng.pick((25.0, 60.0)),
        startup_grace_s=prng.pick((2.0, 15.0)),
        queue_max=queue_max,
        queue_per_client=min(queue_max, prng.pick((2, 8, 64))),
        queue_timeout_s=prng.pick((5.0, 60.0, 300.0)),
        retries_budgeted=prng.between(0, 3),
        eject_after=prng.pick((1, 3, 5)),
        eject_s=eject_s,
        eject_max_s=eject_s * 10,
        slots_default=prng.pick((1, 1, 4)),
    )
