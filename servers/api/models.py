"""Models of nodes, and the policy that keeps them (contract 5): the catalogue, distribution, downloads and deletions on one node.

Decides what is asked for and refuses what cannot be, all or nothing, before any task is made; nothing about how it is done. Invariants:
a list of unknown nodes is answered with all of them; a name is checked before anything is begun.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import trio
from quart import Response
from quart_trio import QuartTrio

from core import fleet, names
from core.errors import RemoteError
from core.keeping import Policy, sites_for
from core.lifecycle import AgentState
from core.tasks import Kind, What
from core.units import AgentId, ModelKey
from core.views import AgentView
from edge.model_work import row_of
from servers.access import Area
from servers.api.web import Web, guarded, read, reply
from servers.catalogue import GB, held_by
from servers.keeping import held_keys

ALL: Final = "all"
SPECIFIC: Final = "specific"
NODES_MAX: Final = 4096


class _Distribution(msgspec.Struct, frozen=True, kw_only=True):
    model_name: str
    target: str = ALL
    agent_ids: list[str] | None = None
    insecure: bool = False


class _Pull(msgspec.Struct, frozen=True, kw_only=True):
    model_name: str | None = None
    model: str | None = None
    insecure: bool = False


def add_routes(app: QuartTrio, web: Web) -> None:
    """`/api/models/...` and `/api/agents/:id/models...`."""
    _add_fleet_wide(app, web)
    _add_one_node(app, web)


def _add_fleet_wide(app: QuartTrio, web: Web) -> None:
    @app.get("/api/models/available")
    @guarded(web, Area.MANAGEMENT)
    async def catalogue() -> Response:
        known = web.keeping.catalogue
        held = held_by({node.name: node.installed for node in web.driver.router.inventories()})
        return reply({"models": known.with_fleet(held), "source": known.source})

    @app.get("/api/models/drift")
    @guarded(web, Area.MANAGEMENT)
    async def show_drift() -> Response:
        nodes = web.driver.router.inventories()
        found = await trio.to_thread.run_sync(fleet.drift, nodes)
        called = {node.agent_id: node.name for node in nodes}
        shown = [
            {
                "model": drift.model,
                "canonical": drift.canonical,
                "digests": [{"agent_id": agent_id, "agent_name": called[agent_id], "digest": digest} for agent_id, digest in drift.digests],
            }
            for drift in found
        ]
        return reply({"drift": shown})

    @app.post("/api/models/distribute")
    @guarded(web, Area.MANAGEMENT)
    async def distribute() -> Response:
        wanted = await read(_Distribution)
        key = checked_name(wanted.model_name)
        agents = _targets(web, wanted)
        must_fit(web, key, agents)
        whats = [What(kind=Kind.PULL, agent_id=agent.id, model=wanted.model_name, insecure=wanted.insecure) for agent in agents]
        return reply({"task_ids": await web.moves.ask(whats, kept=True)}, 202)

    @app.get("/api/models/policy")
    @guarded(web, Area.MANAGEMENT)
    async def show_policy() -> Response:
        return reply(await _policy_json(web))

    @app.put("/api/models/policy")
    @guarded(web, Area.MANAGEMENT)
    async def set_policy() -> Response:
        await web.keeping.adopt(await read(Policy))
        return reply(await _policy_json(web))


def _add_one_node(app: QuartTrio, web: Web) -> None:
    @app.get("/api/agents/<agent_id>/models")
    @guarded(web, Area.MANAGEMENT)
    async def installed(agent_id: str) -> Response:
        agent = agent_of(web, agent_id)
        return reply([shown for row in agent.installed if (shown := _model_json(agent, row)) is not None])

    @app.post("/api/agents/<agent_id>/models/pull")
    @guarded(web, Area.MANAGEMENT)
    async def pull_on_node(agent_id: str) -> Response:
        wanted = await read(_Pull)
        name = wanted.model_name or wanted.model or ""
        agent = agent_of(web, agent_id)
        must_fit(web, checked_name(name), [agent])
        what = What(kind=Kind.PULL, agent_id=agent.id, model=name, insecure=wanted.insecure)
        return reply({"task_id": (await web.moves.ask([what], kept=True))[0]}, 202)

    @app.delete("/api/agents/<agent_id>/models/<path:name>")
    @guarded(web, Area.MANAGEMENT)
    async def delete_on_node(agent_id: str, name: str) -> Response:
        agent, key = agent_of(web, agent_id), checked_name(name)
        row = row_of(agent.installed, key)
        if row is None:
            raise RemoteError(f"{agent.name} has no model {name[:200]}", status=404)
        may_go(web, key)
        spelled: Any = (row.get("name") or row.get("model")) if isinstance(row, dict) else row
        what = What(kind=Kind.DELETE, agent_id=agent.id, model=spelled)
        return reply({"task_id": (await web.moves.ask([what], kept=True))[0]}, 202)


# ---------------------------------------------------------------- what may be asked


def agent_of(web: Web, agent_id: str) -> AgentView:
    """The approved node with this id. Raises RemoteError."""
    agent = web.driver.router.agent(AgentId(agent_id))
    if agent is None:
        raise RemoteError("there is no agent with this id", status=404)
    if agent.state == AgentState.PENDING.value:
        raise RemoteError(f"{agent.name} waits for approval; approve it first", status=409)
    return agent


def checked_name(name: str) -> ModelKey:
    """The key of a model that nodes can hold. Raises RemoteError."""
    key = names.normalise(name)
    if names.is_cloud(key):
        raise RemoteError("ollama cloud is disabled: remote model is unavailable", status=403)
    return key


def must_fit(web: Web, key: ModelKey, agents: Sequence[AgentView]) -> None:
    """Refuse a download that no disk of these nodes can take, as far as sizes are known. Raises RemoteError."""
    size = size_of(web, key)
    if size is None or not agents:
        return
    room = [agent.disk_free_bytes for agent in agents if row_of(agent.installed, key) is None]
    if room and all(free is not None and free < size for free in room):
        most = max(free for free in room if free is not None)
        text = f"{names.display(key)} needs {size / GB:.1f} GB, and the most that is free on a chosen disk is {most / GB:.1f} GB: make room"
        raise RemoteError(text, status=507)


def size_of(web: Web, key: ModelKey) -> int | None:
    """Bytes of a model, by what the fleet holds, else by the catalogue."""
    held = held_by({node.name: node.installed for node in web.driver.router.inventories()}).get(key)
    return held[0] if held is not None and held[0] else web.keeping.catalogue.sizes().get(key)


def may_go(web: Web, key: ModelKey) -> None:
    """Refuse to delete what the policy would bring back. Raises RemoteError."""
    if web.keeping.keeper.wants(key):
        text = f"{names.display(key)} is in the placement policy and would come back: take it out with PUT /api/models/policy first"
        raise RemoteError(text, status=409)


def _targets(web: Web, wanted: _Distribution) -> list[AgentView]:
    agents = [agent for agent in web.driver.router.agents() if agent.state != AgentState.PENDING.value]
    if wanted.target == ALL:
        if not agents:
            raise RemoteError("there is no node to download to: start an agent, or add a node", status=503)
        return agents
    if wanted.target != SPECIFIC:
        raise RemoteError(f'target must be "{ALL}" or "{SPECIFIC}"', status=400)
    if not wanted.agent_ids or len(wanted.agent_ids) > NODES_MAX:
        raise RemoteError(f"agent_ids must name 1 to {NODES_MAX} agents when target is {SPECIFIC}", status=400)
    by_id = {agent.id: agent for agent in agents}
    chosen = list(dict.fromkeys(AgentId(agent_id) for agent_id in wanted.agent_ids))
    if unknown := [agent_id[:100] for agent_id in chosen if agent_id not in by_id]:
        raise RemoteError(f"there is no agent with the id {', '.join(unknown)}", status=404)
    return [by_id[agent_id] for agent_id in chosen]


# ---------------------------------------------------------------- what is shown


def _model_json(agent: AgentView, row: Any) -> dict[str, Any] | None:
    """A model on a node as contract 5 shows it."""
    name = (row.get("name") or row.get("model")) if isinstance(row, dict) else row
    if not isinstance(name, str):
        return None
    fields: dict[str, Any] = row if isinstance(row, dict) else {}
    size, key = fields.get("size"), names.key_or_none(name)
    return {
        "name": name,
        "size_gb": round(size / GB, 3) if isinstance(size, int) else None,
        "digest": fields.get("digest"),
        "installed_at": fields.get("modified_at"),
        "loaded": key is not None and row_of(agent.loaded, key) is not None,
    }


async def _policy_json(web: Web) -> dict[str, Any]:
    """The policy, and how far the fleet is from it."""
    keeper, sites = web.keeping.keeper, await web.keeping.sites()
    state = []
    for rule in keeper.policy.models:
        key, wanted = names.normalise(rule.model), sites_for(rule, sites)
        missing = [site.name for site in wanted if key not in site.holds]
        state.append({"model": names.display(key), "wanted_on": [site.name for site in wanted], "missing_on": missing})
    placed = [{"agent_id": agent_id, "model": names.display(key)} for agent_id, key in keeper.placed]
    return {"models": keeper.policy.models, "auto_distribute": keeper.default_rule, "state": state, "placed": placed}


def holders(web: Web, key: ModelKey) -> tuple[list[AgentView], list[AgentView]]:
    """The approved nodes that list a model: those that are ready, and the others."""
    listed = [agent for agent in web.driver.router.agents() if agent.state != AgentState.PENDING.value and key in held_keys(agent)]
    ready = [agent for agent in listed if agent.state == AgentState.READY.value]
    return ready, [agent for agent in listed if agent.state != AgentState.READY.value]
