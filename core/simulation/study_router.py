"""The real `Router` as the dispatcher of a study: it sees what agents tell, every two seconds.

Decides nothing. Invariant: what the router wants done is done at the instant it says so; a request is settled exactly once.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from core.config import RouterConfig
from core.events import (
    AgentRegistered,
    AttemptEnded,
    Effect,
    Ending,
    Event,
    Failure,
    FirstByte,
    Forward,
    HeartbeatCame,
    PassOn,
    Pulse,
    Refuse,
    RequestCame,
    Route,
    Settled,
    Upstream,
    Usage,
)
from core.messages import GpuDevice, Heartbeat, Registration
from core.router import Router
from core.simulation.node import Timing
from core.simulation.study import NodeSpec
from core.simulation.workload import Arrival
from core.units import AgentId, Instant, RequestId, UnixMs

Sent = list[tuple[int, int]]

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
        self._beats = 0
        self._started: set[int] = set()
        self._live: dict[RequestId, None] = {}
        self._unload: dict[int, tuple[str, ...]] = {}
        self._now = Instant(0.0)
        for index, node in enumerate(fleet):
            registration = Registration(
                machine_name=node.name,
                ip_address=node.name,
                ollama_version="0.33.0",
                ollama_port=11434,
                gpu_available=True,
                gpu_devices=[GpuDevice(model=node.name, memory=node.timing.memory_bytes)],
                slots=node.timing.slots,
            )
            self._tell(
                AgentRegistered(
                    registration=registration,
                    new_id=AgentId(str(index)),
                    code="",
                    trusted=True,
                    gpu_exempt=True,
                    upstream=Upstream(host=node.name, port=11434),
                    now_unix=UnixMs(0),
                )
            )
            self._beat(index, [], 0, installed=[_row(name, model.size_bytes) for name, model in node.models.items()])

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
                prefixes=arrival.prefixes,
                output_limit=arrival.output_limit,
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
        rows = [_row(name, self._fleet[node].models[name].size_bytes) for name in loaded]
        sent = self._beat(node, rows, in_flight)
        if node == 0:
            sent += self._tell(Pulse(requests=tuple(self._live)))
        return sent

    def tick(self, *, now: Instant) -> Sent:
        self._now = now
        return self._carry_out(self.router.tick(now=now))

    def unload_before(self, request: int) -> Sequence[str]:
        return self._unload.pop(request, ())

    def next_deadline(self) -> Instant | None:
        return self.router.next_deadline()

    # ------------------------------------------------------------ inside

    def _beat(self, node: int, loaded: list[Any], in_flight: int, *, installed: list[Any] | None = None) -> Sent:
        self._beats += 1
        heartbeat = Heartbeat(
            agent_id=str(node),
            cpu_usage=(BUSY_CPU_PERCENT if in_flight else IDLE_CPU_PERCENT) if self._with_metrics else 0.0,
            memory_usage=MEMORY_PERCENT if self._with_metrics else 0.0,
            active_requests=in_flight,
            loaded_models=loaded,
            installed_models=installed,
            sequence=self._beats,
        )
        return self._tell(HeartbeatCame(heartbeat=heartbeat, now_unix=UnixMs(0)))

    def _tell(self, event: Event) -> Sent:
        return self._carry_out(self.router.handle(event, now=self._now))

    def _carry_out(self, effects: Sequence[Effect]) -> Sent:
        sent: Sent = []
        for effect in effects:
            match effect:
                case Forward(request_id=request_id, lease=lease):
                    self._live[request_id] = None
                    if effect.unload:
                        self._unload[int(request_id)] = effect.unload
                    sent.append((int(request_id), int(lease.agent_id)))
                case Refuse(request_id=request_id) | PassOn(request_id=request_id):
                    self._tell(Settled(request_id=request_id, ending=Ending.ERROR, status=503))
                    sent.append((int(request_id), -1))
                case _:
                    pass
        return sent


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def _row(name: str, size_bytes: int) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "size": size_bytes,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "modified_at": "2026-01-01T00:00:00Z",
    }
