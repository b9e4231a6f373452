"""Keeps the fleet as its policy says: tells `core.keeping` what there is, and has its wishes made tasks.

Decides when to look. Invariants: a wish becomes at most one task at a time; looking never holds the loop, however many nodes there are.
"""

from typing import Final

import trio

from core.errors import RemoteError
from core.keeping import Keeper, Policy, Site, Wish, checked
from core.lifecycle import AgentState
from core.names import key_or_none
from core.tasks import FINISHED, Kind, TaskState, What
from core.units import MIB, AgentId, ModelKey
from core.views import AgentView
from servers.catalogue import Catalogue
from servers.driver import Driver
from servers.moves import Moves

LOOK_S: Final = 5.0


class Keeping:
    """One per coordinator."""

    def __init__(self, driver: Driver, moves: Moves, catalogue: Catalogue, *, default_rule: bool) -> None:
        self.keeper = Keeper(default_rule=default_rule)
        self.catalogue = catalogue
        self._driver = driver
        self._moves = moves
        self._wished: dict[str, Wish] = {}
        self._wake = trio.Event()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self._wake = trio.Event()
            await self.look()
            with trio.move_on_after(LOOK_S):
                await self._wake.wait()

    async def sites(self) -> list[Site]:
        """The approved nodes as the policy sees them."""
        found: list[Site] = []
        for node in self._driver.router.inventories():
            agent = self._driver.router.agent(node.agent_id)
            if agent is not None:
                found.append(site_of(agent))
            await trio.lowlevel.checkpoint()
        return found

    async def adopt(self, policy: Policy) -> None:
        """Keep to `policy` from now on. Raises RemoteError when it cannot be meant."""
        self.keeper.adopt(checked(policy, await self.sites()))
        self._wake.set()

    async def look(self) -> None:
        """Have done what is missing."""
        now = self._driver.now()
        for task_id, wish in list(self._wished.items()):
            task = self._moves.tasks.get(task_id)
            if task is None or task.status in FINISHED:
                del self._wished[task_id]
                self.keeper.over(wish, succeeded=task is not None and task.status is TaskState.COMPLETED, now=now)
        if not self.keeper.policy.models and not self.keeper.placed and not self.keeper.default_rule:
            return
        sites = await self.sites()
        busy = self._moves.tasks.busy()
        for wish in self.keeper.wishes(sites, busy=busy, sizes=self.catalogue.sizes(), now=now):
            kind = Kind.DELETE if wish.delete else Kind.PULL
            what = What(kind=kind, agent_id=wish.agent_id, model=wish.model, origin=wish.origin)
            try:
                (task_id,) = await self._moves.ask([what], kept=True)
            except RemoteError:  # too many tasks: the next look is soon
                return
            self._wished[task_id] = wish

    def default_for(self, agent_id: AgentId) -> tuple[str, str] | None:
        """The model and the task that the default rule has in hand for a node."""
        for task_id, wish in self._wished.items():
            if wish.agent_id == agent_id and wish.origin != "policy":
                return wish.model, task_id
        return None


def site_of(agent: AgentView) -> Site:
    """A node as the policy sees it."""
    measured = agent.gpu_memory_total_mb
    known = [device.memory * device.count for device in agent.gpu_devices if device.memory]
    return Site(
        agent_id=agent.id,
        name=agent.name,
        ready=agent.state == AgentState.READY.value,
        holds=held_keys(agent),
        tags=agent.tags,
        managed=agent.ollama_managed,
        memory_bytes=round(measured * MIB) if measured else sum(known) or None,
        disk_free_bytes=agent.disk_free_bytes,
    )


def held_keys(agent: AgentView) -> frozenset[ModelKey]:
    """The models that a node lists."""
    names = ((row.get("name") or row.get("model")) if isinstance(row, dict) else row for row in agent.installed)
    return frozenset(key for name in names if isinstance(name, str) and (key := key_or_none(name)) is not None)
