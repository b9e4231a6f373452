"""Agents over HTTP (contract 3): registering, lists, settings, commands, heartbeats, nodes without an agent.

Decides the form of agents in JSON, nothing about them. Invariants: an unknown id is a 404, whatever it looks like; an agent's token and
its gateway's credential leave only in answers to that agent.
"""

from typing import Any, Final

import msgspec
import trio
from quart import Response, request
from quart_trio import QuartTrio

from core import names
from core.errors import RemoteError
from core.events import (
    Accepted,
    AgentCommanded,
    AgentRegistered,
    BackendAdded,
    Command,
    HeartbeatCame,
    MetricsCame,
    Registered,
    SettingsChanged,
    Upstream,
)
from core.messages import (
    AgentSettings,
    EndingReports,
    EndingReportsAnswer,
    Heartbeat,
    HeartbeatAnswer,
    Metrics,
    Registration,
    RegistrationAnswer,
)
from core.units import AgentId, ModelKey
from core.views import AgentView
from servers import clock
from servers.access import Area, check_node_address, node_host
from servers.api.web import Web, caller, empty, guarded, one, read, reply
from servers.peer import parse_address
from servers.settings import SLOTS_MAX, parse_upstream, upstream_name

SHOWN_INLINE: Final = 50
"""Longer lists become JSON in a worker thread."""

ENDINGS_PER_S: Final = 40
"""Messages about endings that a coordinator wants of all its agents; each costs it nearly a millisecond."""
ENDINGS_EVERY_S: Final = 0.25
ENDINGS_EVERY_MAX_S: Final = 1.0
"""Between two of one agent."""
ENDINGS_AT_ONCE: Final = 64
"""Endings that are taken in one step; each costs some 20 µs."""

STATUSES: Final = ("online", "offline", "pending")
HEARTBEAT_MAX_S: Final = 10.0
_STATUS_OF: Final = {"registered": 201, "updated": 200, "pending": 202}


class _Backend(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    name: str | None = None
    slots: int | None = None


class _Approval(msgspec.Struct, frozen=True, kw_only=True):
    code: str


def add_routes(app: QuartTrio, web: Web) -> None:
    """All routes under `/api/agents`, and `/api/health`."""
    _add_reporting(app, web)
    _add_lists(app, web)
    _add_commands(app, web)
    _add_admission(app, web)


# ---------------------------------------------------------------- what agents say


def _add_reporting(app: QuartTrio, web: Web) -> None:
    @app.post("/api/agents")
    async def register() -> Response:
        standing = await web.access.standing(caller())
        registration = await read(Registration)
        host = node_host(registration.ip_address, caller())
        gateway = registration.agent_api_port is not None
        upstream = Upstream(host=host, port=registration.agent_api_port or registration.ollama_port, gateway=gateway)
        answer: Registered = one(
            web.driver.apply(
                AgentRegistered(
                    registration=msgspec.structs.replace(registration, ip_address=host),
                    new_id=clock.new_agent_id(),
                    code=clock.new_code(),
                    trusted=standing.trusted,
                    gpu_exempt=standing.local or not web.settings.require_gpu,
                    upstream=upstream,
                    now_unix=clock.unix_ms(),
                    known_as=standing.known_as,
                )
            )
        )
        if not gateway and answer.status != "pending":
            web.poller.watch(answer.agent_id, upstream)
        elif gateway:
            web.poller.forget(answer.agent_id)
        return reply(_registration_answer(web, answer, known_as=standing.known_as, gateway=gateway), _STATUS_OF[answer.status])

    @app.post("/api/health")
    async def heartbeat() -> Response:
        beat = await read(Heartbeat)
        agent = _agent(web, beat.agent_id)
        await web.access.check(Area.AGENT, caller(), agent_id=agent.id)
        answer: Accepted = one(web.driver.apply(HeartbeatCame(heartbeat=beat, now_unix=clock.unix_ms())))
        credential = web.tokens.gateway_credential(agent.id) if agent.upstream.gateway and answer.status != "pending" else None
        orders = web.moves.orders(agent.id) if credential is not None else []
        return reply(
            HeartbeatAnswer(status=answer.status, gateway_credential=credential, send_inventory=answer.send_inventory, tasks=orders)
        )

    @app.post("/api/agents/<agent_id>/metrics")
    async def take_metrics(agent_id: str) -> Response:
        numbers = await read(Metrics)
        agent = _agent(web, agent_id)
        await web.access.check(Area.AGENT, caller(), agent_id=agent.id)
        one(web.driver.apply(MetricsCame(agent_id=agent.id, metrics=numbers, now_unix=clock.unix_ms())))
        return empty()

    @app.post("/api/agents/<agent_id>/endings")
    async def take_endings(agent_id: str) -> Response:
        message = await read(EndingReports)
        reports = message.reports
        agent = _agent(web, agent_id)
        await web.access.check(Area.AGENT, caller(), agent_id=agent.id)
        if message.dropped:
            web.metrics.count("ollama_router_endings_dropped_total", {"agent": agent.name}, message.dropped)
        for at in range(0, len(reports), ENDINGS_AT_ONCE):
            some = reports[at : at + ENDINGS_AT_ONCE]
            if web.endings is not None:
                web.endings(agent.id, some)
            else:
                web.metrics.count("ollama_router_endings_unknown_total", {}, len(some))
            await trio.lowlevel.checkpoint()
        gather_s = min(ENDINGS_EVERY_MAX_S, max(ENDINGS_EVERY_S, len(web.driver.router.agent_ids()) / ENDINGS_PER_S))
        return reply(EndingReportsAnswer(taken=len(reports), gather_s=gather_s))


def _registration_answer(web: Web, answer: Registered, *, known_as: AgentId | None, gateway: bool) -> RegistrationAnswer:
    admitted = answer.status != "pending"
    model, task_id = web.keeping.default_for(answer.agent_id) or (None, None)
    return RegistrationAnswer(
        agent_id=answer.agent_id,
        status=answer.status,
        agent_token=None if known_as == answer.agent_id else web.tokens.mint_agent_token(answer.agent_id),
        gateway_credential=web.tokens.gateway_credential(answer.agent_id) if gateway and admitted else None,
        code=answer.code,
        auto_distributed_model=model,
        download_task_id=task_id,
        heartbeat_interval_s=max(1.0, min(HEARTBEAT_MAX_S, web.settings.agent_timeout_s / 3)),
    )


# ---------------------------------------------------------------- lists


def _add_lists(app: QuartTrio, web: Web) -> None:
    @app.get("/api/agents")
    @guarded(web, Area.MANAGEMENT)
    async def agents() -> Response:
        found = _filtered(web.driver.router.agents())
        if len(found) > SHOWN_INLINE:
            return await trio.to_thread.run_sync(_shown, found)
        return _shown(found)

    @app.get("/api/agents/<agent_id>")
    @guarded(web, Area.MANAGEMENT)
    async def agent(agent_id: str) -> Response:
        return reply(agent_json(_agent(web, agent_id)))

    @app.get("/api/agents/metrics")
    @guarded(web, Area.MANAGEMENT)
    async def loads() -> Response:
        return reply([load_json(agent) for agent in web.driver.router.agents()])

    @app.get("/api/metrics/summary")
    @guarded(web, Area.MANAGEMENT)
    async def summary() -> Response:
        return reply(summary_json(web))


def _shown(agents: list[AgentView]) -> Response:
    return reply([agent_json(agent) for agent in agents])


def _filtered(agents: list[AgentView]) -> list[AgentView]:
    status, tag, model = request.args.get("status"), request.args.get("tag"), request.args.get("model")
    if status is not None and status not in STATUSES:
        raise RemoteError(f"status must be one of {', '.join(STATUSES)}", status=400)
    key = names.normalise(model) if model is not None else None
    return [
        agent
        for agent in agents
        if (status is None or agent.status == status)
        and (tag is None or tag in agent.tags)
        and (key is None or any(_key(row) == key for row in agent.installed))
    ]


def _model_name(row: Any) -> str | None:
    name = row.get("name") or row.get("model") if isinstance(row, dict) else row
    return name if isinstance(name, str) else None


def _key(row: Any) -> ModelKey | None:
    name = _model_name(row)
    return names.key_or_none(name) if name is not None else None


_AS_IT_IS: Final = (
    "id", "name", "machine_name", "ip_address", "ollama_version", "ollama_port", "agent_api_port", "agent_version", "agentless",
    "simulated", "status", "state", "detail", "gpu_available", "gpu_count", "gpu_model", "custom_name", "tags", "notes", "weight",
    "max_concurrent", "slots", "slots_learned", "model_slots", "in_flight", "active_requests",
)  # fmt: skip
_LOAD: Final = (
    "cpu_usage", "memory_usage", "gpu_usage", "gpu_memory_usage", "gpu_memory_total_mb", "gpu_memory_used_mb", "gpu_temperature",
    "gpu_model_name", "gpu_compute_capability", "average_response_time_ms", "active_requests",
)  # fmt: skip


def agent_json(agent: AgentView) -> dict[str, Any]:
    """An agent as the seed shows it, and what contract 3 adds."""
    shown: dict[str, Any] = {name: getattr(agent, name) for name in (*_AS_IT_IS, *_LOAD[:-1])}
    shown["registered_at"] = clock.rfc3339(agent.registered_at)
    shown["last_seen"] = clock.rfc3339(agent.last_seen) if agent.last_seen is not None else None
    shown["gpu_devices"] = [
        {name: value for name, value in msgspec.structs.asdict(device).items() if value is not None} for device in agent.gpu_devices
    ]
    shown["loaded_models"] = [name for row in agent.loaded if (name := _model_name(row)) is not None]
    shown["installed_models"] = [name for row in agent.installed if (name := _model_name(row)) is not None]
    shown["ejections"] = agent.ejections
    if agent.code is not None:
        shown["code"] = agent.code
    return shown


def load_json(agent: AgentView) -> dict[str, Any]:
    """How busy an agent said it is."""
    shown: dict[str, Any] = {"agent_id": agent.id, "agent_name": agent.name, "status": agent.status}
    shown |= {name: getattr(agent, name) for name in _LOAD}
    shown["timestamp"] = clock.rfc3339(agent.last_seen) if agent.last_seen is not None else None
    return shown


def summary_json(web: Web) -> dict[str, Any]:
    """The fleet's totals."""
    agents, statistics = web.driver.router.agents(), web.driver.router.statistics()
    counts = {f"{status}_agents": sum(agent.status == status for agent in agents) for status in STATUSES}

    def mean(name: str) -> float | None:
        values = [value for agent in agents if agent.status == "online" and (value := getattr(agent, name)) is not None]
        return round(sum(values) / len(values), 2) if values else None

    return {
        "total_agents": len(agents),
        **counts,
        "total_requests": statistics.requests_total,
        "active_requests": sum(agent.active_requests for agent in agents),
        "requests_in_flight": statistics.in_flight,
        "requests_waiting": statistics.waiting,
        "model_loads": statistics.loads_total,
        "model_reloads": statistics.reloads_total,
        "model_reloads_avoided": statistics.reloads_avoided_total,
        "average_cpu_usage": mean("cpu_usage"),
        "average_memory_usage": mean("memory_usage"),
        "average_response_time_ms": mean("average_response_time_ms"),
    }


# ---------------------------------------------------------------- what admins order


def _add_commands(app: QuartTrio, web: Web) -> None:
    @app.put("/api/agents/<agent_id>/settings")
    @guarded(web, Area.MANAGEMENT)
    async def settings(agent_id: str) -> Response:
        changed = await read(AgentSettings)
        agent = _agent(web, agent_id)
        one(web.driver.apply(SettingsChanged(agent_id=agent.id, settings=changed)))
        return reply(agent_json(_agent(web, agent_id)))

    @app.delete("/api/agents/<agent_id>")
    @guarded(web, Area.MANAGEMENT)
    async def delete(agent_id: str) -> Response:
        agent = _agent(web, agent_id)
        _order(web, agent.id, Command.DELETE)
        web.tokens.forget(agent.id)
        web.poller.forget(agent.id)
        return empty()

    @app.post("/api/agents/<agent_id>/drain")
    @guarded(web, Area.MANAGEMENT)
    async def drain(agent_id: str) -> Response:
        return _ordered(web, agent_id, Command.DRAIN)

    @app.post("/api/agents/<agent_id>/connect")
    @guarded(web, Area.MANAGEMENT)
    async def connect(agent_id: str) -> Response:
        return _ordered(web, agent_id, Command.CONNECT)

    @app.post("/api/agents/<agent_id>/disconnect")
    @guarded(web, Area.MANAGEMENT)
    async def disconnect(agent_id: str) -> Response:
        now = request.args.get("now", "false")
        if now not in ("true", "false"):
            raise RemoteError("now must be true or false", status=400)
        return _ordered(web, agent_id, Command.DISCONNECT_NOW if now == "true" else Command.DISCONNECT)


def _order(web: Web, agent_id: AgentId, command: Command) -> None:
    one(web.driver.apply(AgentCommanded(agent_id=agent_id, command=command)))


def _ordered(web: Web, agent_id: str, command: Command) -> Response:
    _order(web, _agent(web, agent_id).id, command)
    return reply(agent_json(_agent(web, agent_id)), 202)


# ---------------------------------------------------------------- who is let in


def _add_admission(app: QuartTrio, web: Web) -> None:
    @app.post("/api/agents/<agent_id>/approve")
    @guarded(web, Area.MANAGEMENT)
    async def approve(agent_id: str) -> Response:
        return _approved(web, _agent(web, agent_id))

    @app.post("/api/agents/approve")
    @guarded(web, Area.MANAGEMENT)
    async def approve_code() -> Response:
        code = (await read(_Approval)).code.strip().upper()
        waiting = [agent for agent in web.driver.router.agents() if agent.code == code]
        if not waiting:
            raise RemoteError("no agent waits with this code: compare it with what the agent prints", status=404)
        return _approved(web, waiting[0])

    @app.post("/api/agents/backends")
    @guarded(web, Area.MANAGEMENT)
    async def add_backend() -> Response:
        backend = await read(_Backend)
        try:
            upstream = parse_upstream(backend.url.strip())
        except ValueError as problem:
            raise RemoteError(f"url must be a node's URL such as http://10.0.0.5:11434: {problem}", status=400) from None
        if backend.slots is not None and not 1 <= backend.slots <= SLOTS_MAX:
            raise RemoteError(f"slots must be between 1 and {SLOTS_MAX}", status=422)
        if (address := parse_address(upstream.host)) is not None:
            check_node_address(address)
        name = (backend.name or "").strip() or upstream_name(upstream)
        if len(name) > 100:
            raise RemoteError("name may have 100 characters at most", status=400)
        return _added(web, name, upstream, backend.slots)


def _approved(web: Web, agent: AgentView) -> Response:
    _order(web, agent.id, Command.APPROVE)
    if not agent.upstream.gateway:
        web.poller.watch(agent.id, agent.upstream)
    return reply(agent_json(_agent(web, agent.id)))


def _added(web: Web, name: str, upstream: Upstream, slots: int | None) -> Response:
    agent_id = clock.stable_agent_id(upstream_name(upstream))
    known = web.driver.router.agent(agent_id) is not None
    add_backend(web, agent_id, name, upstream, slots)
    return reply(agent_json(_agent(web, agent_id)), 200 if known else 201)


def add_backend(web: Web, agent_id: AgentId, name: str, upstream: Upstream, slots: int | None, *, simulated: bool = False) -> None:
    """Make a node without an agent known, and poll it. Raises RemoteError when the router declines."""
    event = BackendAdded(agent_id=agent_id, name=name, upstream=upstream, slots=slots, simulated=simulated, now_unix=clock.unix_ms())
    one(web.driver.apply(event))
    web.poller.watch(agent_id, upstream)


def _agent(web: Web, agent_id: str) -> AgentView:
    agent = web.driver.router.agent(AgentId(agent_id))
    if agent is None:
        raise RemoteError("there is no agent with this id", status=404)
    return agent
