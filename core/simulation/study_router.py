"""The real `Router` as the dispatcher of a study: it sees what an agentless node shows, every two seconds.

Decides nothing. Invariant: what the router wants done is done at the instant it says so; a request is settled exactly once.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from core.config import RouterConfig
from core.events import (
    AttemptEnded,
    BackendAdded,
    Effect,
    Ending,
    Event,
    Failure,
    FirstByte,
    Forward,
    MetricsCame,
    NodePolled,
    PassOn,
    Pulse,
    Refuse,
    RequestCame,
    Route,
    Settled,
    Upstream,
    Usage,
)
from core.messages import Metrics
from core.router import Router
from core.simulation.node import Timing
from core.simulation.study import NodeSpec
from core.simulation.workload import Arrival
from core.units import AgentId, Instant, RequestId, UnixMs

Sent = list[tuple[int, int]]

FULL_CHECK_POLLS = 15
"""Every so many polls one is a full check, which is what keeps an agentless node alive."""

BUSY_CPU_PERCENT = 60.0
"""What `metrics` is told of a node that works; an idle one says `IDLE_CPU_PERCENT`. Synthetic: a study has no processors."""

IDLE_CPU_PERCENT = 5.0
MEMORY_PERCENT = 40.0
BUSY_TEXT = "server busy, please try again.  maximum pending requests exceeded"


class RouterDispatcher:
    """One per run."""

    def __init__(self, config: RouterConfig, fleet: Sequence[NodeSpec], *, with_metrics: bool = False) -> None:
        self.router = Router(config, now=Instant(0.0))
        self._fleet = fleet
        self._with_metrics = with_metrics
        self._polls = [0] * len(fleet)
        self._started: set[int] = set()
        self._live: dict[RequestId, None] = {}
        self._now = Instant(0.0)
        for index, node in enumerate(fleet):
            agent_id = AgentId(str(index))
            upstream = Upstream(host=node.name, port=11434)
            self._tell(BackendAdded(agent_id=agent_id, name=node.name, upstream=upstream, slots=node.timing.slots, now_unix=UnixMs(0)))
            self._tell(
                NodePolled(
                    agent_id=agent_id,
                    version="0.33.0",
                    installed=[_installed(name, model.size_bytes) for name, model in node.models.items()],
                    loaded=[],
                    now_unix=UnixMs(0),
                )
            )

    # ------------------------------------------------------------ Dispatcher

    def came(self, request: int, arrival: Arrival, *, now: Instant) -> Sent:
        self._now = now
        return self._tell(
            RequestCame(
                request_id=RequestId(str(request)),
                route=Route.CHAT,
                model=arrival.model,
                client=arrival.client,
                stream=True,
                input_tokens=arrival.input_tokens,
            )
        )

    def first_token(self, request: int, *, now: Instant) -> Sent:
        self._now = now
        if request in self._started:
            return []
        self._started.add(request)
        return self._tell(FirstByte(request_id=RequestId(str(request))))

    def finished(self, request: int, timing: Timing, *, now: Instant) -> Sent:
        self._now = now
        self._started.discard(request)
        usage = Usage(
            prompt_tokens=timing.prompt_tokens,
            output_tokens=timing.output_tokens,
            total_ns=_ns(timing.finished - timing.came),
            load_ns=_ns(timing.obtained - timing.came),
            prompt_ns=_ns(timing.first - timing.started),
            eval_ns=_ns(timing.finished - timing.first),
        )
        del self._live[RequestId(str(request))]
        return self._tell(Settled(request_id=RequestId(str(request)), ending=Ending.SUCCESS, status=200, usage=usage))

    def refused(self, request: int, node: int, *, now: Instant) -> Sent:
        self._now = now
        del self._live[RequestId(str(request))]
        return self._tell(AttemptEnded(request_id=RequestId(str(request)), failure=Failure.ANSWERED, status=503, text=BUSY_TEXT))

    def polled(self, node: int, loaded: Sequence[str], in_flight: int, *, now: Instant) -> Sent:
        self._now = now
        agent_id = AgentId(str(node))
        full = self._polls[node] % FULL_CHECK_POLLS == 0
        self._polls[node] += 1
        rows = [_installed(name, self._fleet[node].models[name].size_bytes) for name in loaded]
        sent = self._tell(NodePolled(agent_id=agent_id, loaded=rows, alive=full, now_unix=UnixMs(0)))
        if self._with_metrics:
            cpu = BUSY_CPU_PERCENT if in_flight else IDLE_CPU_PERCENT
            metrics = Metrics(cpu_usage=cpu, memory_usage=MEMORY_PERCENT, active_requests=in_flight)
            sent += self._tell(MetricsCame(agent_id=agent_id, metrics=metrics, now_unix=UnixMs(0)))
        if node == 0:
            sent += self._tell(Pulse(requests=tuple(self._live)))
        return sent

    def tick(self, *, now: Instant) -> Sent:
        self._now = now
        return self._carry_out(self.router.tick(now=now))

    def next_deadline(self) -> Instant | None:
        return self.router.next_deadline()

    # ------------------------------------------------------------ inside

    def _tell(self, event: Event) -> Sent:
        return self._carry_out(self.router.handle(event, now=self._now))

    def _carry_out(self, effects: Sequence[Effect]) -> Sent:
        sent: Sent = []
        for effect in effects:
            match effect:
                case Forward(request_id=request_id, lease=lease):
                    self._live[request_id] = None
                    sent.append((int(request_id), int(lease.agent_id)))
                case Refuse(request_id=request_id) | PassOn(request_id=request_id):
                    sent.append((int(request_id), -1))
                    sent += self._tell(Settled(request_id=request_id, ending=Ending.ERROR, status=503))
                case _:
                    pass
        return sent


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def _installed(name: str, size_bytes: int) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "size": size_bytes,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "modified_at": "2026-01-01T00:00:00Z",
    }
