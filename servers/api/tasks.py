"""Tasks over HTTP (contract 5): how downloads stand, and stopping them; agents' reports on theirs.

Decides the form of a task in JSON, nothing about it. Invariant: an unknown id is a 404, whatever it looks like.
"""

from typing import Final

import trio
from quart import Response, request
from quart_trio import QuartTrio

from core.errors import RemoteError
from core.messages import PullReports, PullReportsAnswer
from core.tasks import FINISHED, TaskView
from core.units import AgentId
from servers.access import Area
from servers.api.web import Web, caller, guarded, read, reply
from servers.moves import task_json

SHOWN: Final = 100
"""Tasks in a list, the newest first, unless `limit` says otherwise."""
SHOWN_MAX: Final = 1000


def add_routes(app: QuartTrio, web: Web) -> None:
    """`/api/tasks...`, and `POST /api/agents/:id/tasks`."""

    def names() -> dict[AgentId, str]:
        return {node.agent_id: node.name for node in web.driver.router.inventories()}

    def task_of(task_id: str) -> TaskView:
        task = web.moves.tasks.get(task_id)
        if task is None:
            raise RemoteError("there is no task with this id", status=404)
        return task

    @app.get("/api/tasks")
    @guarded(web, Area.MANAGEMENT)
    async def list_tasks() -> Response:
        limit = request.args.get("limit", str(SHOWN))
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= SHOWN_MAX):
            raise RemoteError(f"limit must be a whole number from 1 to {SHOWN_MAX}", status=400)
        known = names()
        shown = []
        for number, task in enumerate(web.moves.tasks.newest(int(limit))):
            shown.append(task_json(task, known))
            if number % SHOWN == SHOWN - 1:
                await trio.lowlevel.checkpoint()
        return reply(shown)

    @app.get("/api/tasks/<task_id>")
    @guarded(web, Area.MANAGEMENT)
    async def show_task(task_id: str) -> Response:
        return reply(task_json(task_of(task_id), names()))

    @app.delete("/api/tasks/<task_id>")
    @guarded(web, Area.MANAGEMENT)
    async def cancel_task(task_id: str) -> Response:
        if (found := task_of(task_id)).status in FINISHED:
            raise RemoteError(f"the task is over already: it is {found.status.value}", status=409)
        web.moves.cancel(task_id, "cancelled by an admin")
        return reply(task_json(task_of(task_id), names()))

    @app.post("/api/agents/<agent_id>/tasks")
    async def report_tasks(agent_id: str) -> Response:
        reports = await read(PullReports)
        agent = web.driver.router.agent(AgentId(agent_id))
        if agent is None:
            raise RemoteError("there is no agent with this id", status=404)
        await web.access.check(Area.AGENT, caller(), agent_id=agent.id)
        return reply(PullReportsAnswer(stop=web.moves.report(agent.id, reports.reports)))
