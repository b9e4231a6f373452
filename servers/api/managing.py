"""Ollama's own routes that change what nodes hold, for the fleet (`ollama-wire.md` 3.1 and 6): pull, delete, copy; and those that are
answered here because no node may be asked.

Decides which nodes are meant and what the client is told, in Ollama's own words where it has any. The work is tasks (`core.tasks`), so it
is serialised with all other work on a node. Invariants: nothing is begun before the request is known to be sound; a client that leaves
ends the download that it alone asked for; `success` is said when the router itself knows the model there.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Final

import msgspec
import trio
from quart import Response, request
from quart_trio import QuartTrio

from core import names
from core.errors import RemoteError
from core.keeping import sites_for
from core.lifecycle import AgentState
from core.merged_pull import MergedPull
from core.tasks import FINISHED, Kind, TaskState, TaskView, What, failures
from core.units import AgentId, ModelKey
from core.views import AgentView
from edge.headers import go_json
from edge.jsonscan import Scanner, fold, go_string
from servers.access import Area
from servers.api.models import checked_name, holders, may_go, must_fit
from servers.api.web import Web, caller, empty, error, guarded, ollama_json

LINES_EVERY_S: Final = 0.2
"""Between looks at the tasks for one client's stream."""
WORK_LIMIT_S: Final = 60.0
"""How long a client waits for a deletion or a copy; it is finished all the same."""
AWAY_LIMIT_S: Final = 60.0
"""How long a client's download waits for nodes that went away in the middle of it."""
NODE_HEADER: Final = "X-Ollama-Node"
"""In a pull: names or ids of the nodes that are meant, separated by commas."""

ADMIN_ONLY: Final = (
    "only an admin of this router may {}: run '{}' on its machine, or send the admin token as 'Authorization: Bearer <token>'"
)
OLLAMA_THERE: Final = "OLLAMA_HOST=127.0.0.1:{} ollama {}"
ON_A_NODE: Final = "models are not {} through the router: do it on one node (OLLAMA_HOST=<node>:11434 ollama {}), {}"
CREATE_THERE: Final = ON_A_NODE.format("created", "create", "then push the result to a registry and 'ollama-router pull' it from there")
PUSH_THERE: Final = ON_A_NODE.format("pushed", "push", "which acts with that node's own account")
SIGN_OUT_THERE: Final = "accounts belong to nodes, and the router signs none of them out: run 'ollama signout' on the node"


def add_routes(app: QuartTrio, web: Web) -> None:
    """`/api/pull`, `/api/delete`, `/api/copy`, and what is refused or answered at once."""
    _add_work(app, web)
    _add_local(app, web)


def _add_work(app: QuartTrio, web: Web) -> None:
    @app.post("/api/pull")
    async def ollama_pull() -> Response:
        await _admin(web, "download models", "ollama-router pull MODEL")
        asked = await _fields("PullRequest", "model", "name", "stream", "insecure")
        name = asked.text("model") or asked.text("name")
        streams, insecure = asked.flag("stream", default=True), asked.flag("insecure", default=False)
        if not name.strip():
            raise RemoteError("invalid model name", status=400)
        key = checked_name(name)
        agents = await _pulled_by(web, key)
        must_fit(web, key, agents)
        whats = [What(kind=Kind.PULL, agent_id=agent.id, model=name.strip(), insecure=insecure) for agent in agents]
        tasks = await web.moves.ask(whats, kept=False)
        if streams:
            return Response(_pull_lines(web, agents, tasks, key), content_type="application/x-ndjson")
        return await _pull_whole(web, agents, tasks, key)

    @app.delete("/api/delete")
    async def ollama_delete() -> Response:
        await _admin(web, "delete models", OLLAMA_THERE.format(web.settings.port, "rm MODEL"))
        asked = await _fields("DeleteRequest", "model", "name")
        name = (asked.text("model") or asked.text("name")).strip()
        if name and names.key_or_none(name) is None:
            raise RemoteError(f"name {_quoted(name)} is invalid", status=400)
        key = names.normalise(name)
        ready, away = holders(web, key)
        if not ready:
            _nowhere(f"model '{name}' not found", name, away)
        may_go(web, key)
        await _everywhere(web, [What(kind=Kind.DELETE, agent_id=agent.id, model=name) for agent in (*ready, *away)], ready)
        await web.moves.listed([agent.id for agent in ready], key, present=False)
        return empty(200)

    @app.post("/api/copy")
    async def ollama_copy() -> Response:
        await _admin(web, "copy models", OLLAMA_THERE.format(web.settings.port, "cp SOURCE DESTINATION"))
        asked = await _fields("CopyRequest", "source", "destination")
        source, destination = asked.text("source"), asked.text("destination")
        for field, name in (("source", source), ("destination", destination)):
            if name != name.strip() or names.key_or_none(name) is None:
                raise RemoteError(f"{field} {_quoted(name)} is invalid", status=400)
        key, to = names.normalise(source), names.normalise(destination)
        ready, away = holders(web, key)
        if key == to:
            return empty(200)
        if not ready:
            _nowhere(f"model {_quoted(source)} not found", source, away)
        whats = [What(kind=Kind.COPY, agent_id=agent.id, model=source, destination=destination) for agent in (*ready, *away)]
        await _everywhere(web, whats, ready)
        await web.moves.listed([agent.id for agent in ready], to)
        return empty(200)


def _add_local(app: QuartTrio, web: Web) -> None:
    refused: tuple[tuple[str, str, str], ...] = (
        ("/api/create", "POST", CREATE_THERE),
        ("/api/blobs/<digest>", "POST", CREATE_THERE),
        ("/api/blobs/<digest>", "HEAD", CREATE_THERE),
        ("/api/push", "POST", PUSH_THERE),
        ("/api/signout", "POST", SIGN_OUT_THERE),
        ("/api/user/keys/<key>", "DELETE", SIGN_OUT_THERE),
        ("/api/experimental/web_search", "POST", "ollama cloud is disabled: web search is unavailable"),
        ("/api/experimental/web_fetch", "POST", "ollama cloud is disabled: web fetch is unavailable"),
    )
    for path, method, text in refused:

        @guarded(web, Area.INFERENCE)
        async def refuse(text: str = text, **_: str) -> Response:
            return error(403, text)

        app.add_url_rule(path, f"{method} {path}", refuse, methods=[method], provide_automatic_options=False)

    @app.post("/api/me")
    @guarded(web, Area.INFERENCE)
    async def me() -> Response:
        return error(401, "unauthorized")

    @app.get("/api/experimental/model-recommendations")
    @guarded(web, Area.INFERENCE)
    async def recommendations() -> Response:
        return ollama_json({"recommendations": []})


# ---------------------------------------------------------------- who, what


async def _admin(web: Web, what: str, command: str) -> None:
    """Only admins. Others, with a key or without, get 403 and a sentence: `ollama` shows no word of a 401. Raises RemoteError."""
    try:
        await web.access.check(Area.MANAGEMENT, caller())
    except RemoteError as problem:
        if caller().token is not None and not web.access.shows_key(caller()):
            raise
        raise RemoteError(ADMIN_ONLY.format(what, command), status=403) from problem


class _Fields:
    """A body's members as Ollama reads them: folded keys, the last one wins."""

    def __init__(self, struct: str, members: dict[str, bytes]) -> None:
        self._struct = struct
        self._members = members

    def text(self, name: str) -> str:
        raw = self._members.get(name, b'""')
        if raw[:1] != b'"':
            raise self._wrong(name, raw, "string")
        return go_string(raw)

    def flag(self, name: str, *, default: bool) -> bool:
        raw = self._members.get(name)
        if raw is None:
            return default
        if raw not in (b"true", b"false"):
            raise self._wrong(name, raw, "bool")
        return raw == b"true"

    def _wrong(self, name: str, raw: bytes, kind: str) -> RemoteError:
        return RemoteError(f"json: cannot unmarshal {_kind(raw)} into Go struct field {self._struct}.{name} of type {kind}", status=400)


async def _fields(struct: str, *wanted: str) -> _Fields:
    """The request's body. Raises RemoteError in Ollama's words."""
    data = await request.get_data(cache=False)
    assert isinstance(data, bytes)
    scanner = Scanner(lambda key: name if (name := fold(key)) in wanted else None)
    scanner.feed(data)
    scanner.close()
    if scanner.top == 0:
        raise RemoteError("missing request body", status=400)
    if scanner.problem is not None:
        text = "unexpected EOF" if scanner.problem.startswith("unexpected end") else f"the request body is not JSON: {scanner.problem}"
        raise RemoteError(text, status=400)
    if chr(scanner.top) not in "{n":
        raise RemoteError(f"json: cannot unmarshal {_kind(bytes([scanner.top]))} into Go value of type api.{struct}", status=400)
    members = {member.name: member.raw for member in scanner.members if member.raw is not None and member.raw != b"null"}
    return _Fields(struct, members)


def _kind(raw: bytes) -> str:
    return {"{": "object", "[": "array", '"': "string", "t": "bool", "f": "bool"}.get(raw[:1].decode("latin-1"), "number")


def _quoted(name: str) -> str:
    """As Go's `%q` for ordinary text."""
    return msgspec.json.encode(name).decode()


def _nowhere(not_found: str, name: str, away: Sequence[AgentView]) -> None:
    """No ready node holds it: contract 4's two answers. Raises RemoteError."""
    if not away:
        raise RemoteError(not_found, status=404)
    asleep = ", ".join(agent.name for agent in away)
    raise RemoteError(f"only nodes that are not ready hold {name}: {asleep}; try again when one is back", status=503)


async def _pulled_by(web: Web, key: ModelKey) -> list[AgentView]:
    """The nodes that a pull means: those named, else those of the policy's entry, else all that are ready. Raises RemoteError."""
    agents = [agent for agent in web.driver.router.agents() if agent.state != AgentState.PENDING.value]
    if (named := request.headers.get(NODE_HEADER)) is not None:
        wanted = [name.strip() for name in named.split(",") if name.strip()]
        if unknown := [name[:100] for name in wanted if not any(name in (agent.name, agent.id) for agent in agents)]:
            raise RemoteError(f"there is no node {', '.join(unknown)}", status=404)
        return [agent for agent in agents if agent.name in wanted or agent.id in wanted]
    for rule in web.keeping.keeper.policy.models:
        if names.normalise(rule.model) == key:
            meant = {site.agent_id for site in sites_for(rule, await web.keeping.sites())}
            agents = [agent for agent in agents if agent.id in meant]
    ready = [agent for agent in agents if agent.state == AgentState.READY.value]
    if not ready:
        raise RemoteError("no node is ready to download: start one, and see 'ollama-router agents list'", status=503)
    return ready


# ---------------------------------------------------------------- the answers


async def _pull_lines(web: Web, agents: Sequence[AgentView], tasks: Sequence[str], key: ModelKey) -> AsyncIterator[bytes]:
    """The merged progress as NDJSON. Whoever stops reading it, leaves the tasks."""
    merged = MergedPull(_names(agents))
    try:
        async with aclosing(_looks(web, tasks)) as looks:
            async for views in looks:
                if lines := merged.lines(views):
                    yield _encoded(lines)
        await _known(web, views, key)
        yield _encoded(merged.last(views))
    finally:
        web.moves.leave(tasks)


async def _pull_whole(web: Web, agents: Sequence[AgentView], tasks: Sequence[str], key: ModelKey) -> Response:
    try:
        async with aclosing(_looks(web, tasks)) as looks:
            async for latest in looks:
                views = latest
    finally:
        web.moves.leave(tasks)
    await _known(web, views, key)
    if wrong := failures(views, _names(agents)):
        return error(500, wrong)
    return ollama_json({"status": "success"}, content_type="application/json")


async def _looks(web: Web, tasks: Sequence[str]) -> AsyncGenerator[list[TaskView], None]:
    """How the tasks stand, again and again; the last time when all are over. What waits for a node that stays away is given up."""
    away_since: dict[AgentId, float] = {}
    while True:
        changed, views = web.moves.changed, web.moves.views(tasks)
        yield views
        unfinished = [view for view in views if view.status not in FINISHED]
        if not unfinished:
            return
        now = trio.current_time()
        for view in unfinished:
            agent = web.driver.router.agent(view.agent_id)
            if agent is None or agent.state == AgentState.READY.value:
                away_since.pop(view.agent_id, None)
            elif now - away_since.setdefault(view.agent_id, now) > AWAY_LIMIT_S:
                web.moves.cancel(view.id, f"it is {agent.state}: {agent.detail}")
        with trio.move_on_after(LINES_EVERY_S):
            await changed.wait()


async def _known(web: Web, views: Sequence[TaskView], key: ModelKey) -> None:
    """Until the router knows the model where it was downloaded, so that the client's next request finds it."""
    await web.moves.listed([view.agent_id for view in views if view.status is TaskState.COMPLETED], key)


async def _everywhere(web: Web, whats: Sequence[What], ready: Sequence[AgentView]) -> None:
    """Have it done on all nodes, and wait for those that are ready; the others do it when they are back. Raises RemoteError 500."""
    tasks = (await web.moves.ask(whats, kept=True))[: len(ready)]
    with trio.move_on_after(WORK_LIMIT_S):
        await web.moves.finished(tasks)
    views = web.moves.views(tasks)
    called = _names(ready)
    late = [f"{called[view.agent_id]}: not done yet, it goes on as task {view.id}" for view in views if view.status not in FINISHED]
    if wrong := "; ".join(filter(None, [failures(views, called), *late])):
        raise RemoteError(wrong, status=500)


def _names(agents: Sequence[AgentView]) -> dict[AgentId, str]:
    return {agent.id: agent.name for agent in agents}


def _encoded(lines: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(go_json(line) + b"\n" for line in lines)
