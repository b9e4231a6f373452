"""What outlives a restart, put together: the store, history, API keys, agents, tasks, the models' policy.

Decides what is kept as which thing, and when. Knows no statement of the database and no rule about what it keeps. Invariants: nothing
here waits for the disk in the loop; what cannot be read back at the start is left out with a warning that names it, never in silence.
"""

import os
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
import trio

from core.events import AgentRestored
from core.history import Numbers
from core.keeping import Policy
from core.keys import Key, Use
from core.tasks import TaskRestored
from core.units import AgentId, ModelKey, UnixMs
from servers import clock, history_file
from servers.access import Access
from servers.driver import Driver
from servers.history import History
from servers.keeping import Keeping
from servers.moves import Moves
from servers.poller import Poller
from servers.settings import Settings
from servers.store.store import Store
from servers.tokens import Tokens, kept_secret

COORDINATOR_FILE: Final = "coordinator-id"
KEY: Final = "key"
AGENT: Final = "agent"
TASK: Final = "task"
POLICY: Final = "policy"

TASKS_KEPT: Final = 1000
"""Tasks, the newest, that come back."""

SAVE_S: Final = 2.0
"""How often agents, and what keys have used, are looked at for what changed: a crash forgets that much of it."""
AGENTS_AT_ONCE: Final = 10
"""Agents looked at in one step of the loop."""
SEEN_STEP_MS: Final = 600_000
"""When an agent was seen last is kept so finely; otherwise each heartbeat would be written."""


class _KeptAgent(msgspec.Struct, kw_only=True):
    agent: AgentRestored
    token: str | None = None
    """Its token's hash."""
    listed: bool = False
    """In `OLLAMA_BACKENDS`: gone once it is not there any more."""


class _KeptPolicy(msgspec.Struct, kw_only=True):
    policy: Policy
    placed: list[tuple[AgentId, ModelKey]] = []


class _KeptKey(msgspec.Struct, kw_only=True):
    key: Key
    use: Use
    digest: str


class Memory:
    """Of one coordinator."""

    def __init__(self, settings: Settings, data_dir: Path) -> None:
        """Opens the database, which is made where there is none.

        Raises:
            ConfigError: it cannot be used.
        """
        bodies = settings.history_bodies or ("redacted" if settings.auth == "required" else "full")
        file = data_dir / history_file.FILE
        self._records = settings.history_retention_days > 0
        self.store = Store.open(
            settings.database_url,
            data_dir,
            coordinator_id=kept_secret(data_dir / COORDINATOR_FILE)[:16],
            retention_days=settings.history_retention_days or 1,
            max_bytes=settings.history_max_bytes,
            free_disk_bytes=lambda path: shutil.disk_usage(path).free,
            bodies=bodies,
            body_max_bytes=settings.history_body_max_bytes,
            masks=settings.history_mask,
            imported=_earlier(file) if self._records else (),
            mirror=file if self._records and settings.history_json else None,
        )
        self.history = History(
            put=self.store.put,
            bodies=bodies,
            body_max_bytes=settings.history_body_max_bytes,
            numbers=Numbers(after=self.store.last_number()),
            clock=clock.unix_ms,
            masks=settings.history_mask,
        )
        self.store.gather_from(self.history.gather)
        self._saved_use: dict[str, tuple[Any, ...]] = {}
        self._saved_agents: dict[AgentId, bytes] = {}
        self._driver: Driver | None = None
        self._listed: Container[AgentId] = ()
        self._moves: Moves | None = None
        self._keeping: Keeping | None = None
        self._saved_policy = b""
        self._access: Access | None = None
        self._tokens: Tokens | None = None
        self._log = structlog.get_logger()

    def restore(self, access: Access, tokens: Tokens) -> None:
        """Bring back what was kept, and keep from now on what changes."""
        for name, data in self.store.things(KEY).items():
            try:
                kept = msgspec.json.decode(data, type=_KeptKey)
                tokens.restore_key(kept.key.key_id, bytes.fromhex(kept.digest))
            except (msgspec.MsgspecError, ValueError):
                self._log.warning("an API key in the database cannot be read: it opens nothing", key_id=name)
                continue
            access.keys.add(kept.key, kept.use)
        self._access, self._tokens = access, tokens
        self.history.client_address = access.address_of

    def restore_agents(self, driver: Driver, poller: Poller, *, listed: Container[AgentId]) -> None:
        """Bring back the agents that were known. `listed`: those of `OLLAMA_BACKENDS`."""
        assert self._tokens is not None
        self._driver, self._listed = driver, listed
        for name, data in self.store.things(AGENT).items():
            try:
                kept = msgspec.json.decode(data, type=_KeptAgent)
                digest = None if kept.token is None else bytes.fromhex(kept.token)
            except (msgspec.MsgspecError, ValueError):
                self._log.warning("an agent in the database cannot be read: it must register again", agent_id=name)
                continue
            agent = kept.agent
            if kept.listed and agent.agent_id not in listed:
                self.store.put_thing(AGENT, name, None)
                continue
            self._saved_agents[agent.agent_id] = data
            driver.apply(agent)
            if digest is not None:
                self._tokens.restore_agent(agent.agent_id, digest)
            if not agent.upstream.gateway:
                poller.watch(agent.agent_id, agent.upstream)

    def restore_work(self, moves: Moves, keeping: Keeping) -> None:
        """Bring back tasks, the policy, and what it placed."""
        self._moves, self._keeping = moves, keeping
        moves.keep = self._save_task
        tasks = []
        for name, data in self.store.things(TASK).items():
            try:
                tasks.append(msgspec.json.decode(data, type=TaskRestored))
            except msgspec.MsgspecError:
                self._log.warning("a task in the database cannot be read: it is forgotten", task_id=name)
        tasks.sort(key=lambda task: task.created_at)
        for task in tasks[:-TASKS_KEPT]:
            self.store.put_thing(TASK, task.task_id, None)
        moves.restore(tasks[-TASKS_KEPT:])
        self._saved_policy = self.store.things(POLICY).get(POLICY, b"")
        if self._saved_policy:
            try:
                kept = msgspec.json.decode(self._saved_policy, type=_KeptPolicy)
            except msgspec.MsgspecError:
                self._log.warning("the models' policy in the database cannot be read: set it anew")
            else:
                keeping.keeper.adopt(kept.policy)
                keeping.keeper.placed.update(dict.fromkeys(kept.placed))

    def _save_task(self, task_id: str) -> None:
        task = None if self._moves is None else self._moves.tasks.lasting(task_id)
        self.store.put_thing(TASK, task_id, None if task is None else msgspec.json.encode(task))

    def _save_policy(self) -> None:
        if self._keeping is not None:
            keeper = self._keeping.keeper
            data = msgspec.json.encode(_KeptPolicy(policy=keeper.policy, placed=list(keeper.placed)))
            if data != self._saved_policy:
                self._saved_policy = data
                self.store.put_thing(POLICY, POLICY, data)

    async def _save_agents(self) -> None:
        """Keep what changed; a few agents in each step."""
        driver = self._driver
        if driver is None:
            return
        ids = driver.router.agent_ids()
        for gone in self._saved_agents.keys() - set(ids):
            del self._saved_agents[gone]
            self.store.put_thing(AGENT, gone, None)
        for number, agent_id in enumerate(ids, 1):
            self._save_agent(driver, agent_id)
            if number % AGENTS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()

    def _save_agent(self, driver: Driver, agent_id: AgentId) -> None:
        known = driver.router.known(agent_id)
        if known is None or known.simulated or self._tokens is None:
            return
        seen = None if known.last_seen is None else UnixMs(known.last_seen // SEEN_STEP_MS * SEEN_STEP_MS)
        digest = self._tokens.agent_digest(agent_id)
        kept = _KeptAgent(
            agent=msgspec.structs.replace(known, last_seen=seen),
            token=None if digest is None else digest.hex(),
            listed=agent_id in self._listed,
        )
        data = msgspec.json.encode(kept)
        if self._saved_agents.get(agent_id) != data:
            self._saved_agents[agent_id] = data
            self.store.put_thing(AGENT, agent_id, data)

    @property
    def recorder(self) -> History | None:
        """Who records requests; None: nobody does."""
        return self.history if self._records else None

    # ------------------------------------------------------------ API keys

    def save_key(self, key: Key, use: Use) -> None:
        """Keep a key and what it used."""
        digest = None if self._tokens is None else self._tokens.key_digest(key.key_id)
        if digest is not None:
            self._saved_use[key.key_id] = msgspec.structs.astuple(use)
            self.store.put_thing(KEY, key.key_id, msgspec.json.encode(_KeptKey(key=key, use=use, digest=digest.hex())))

    def forget_key(self, key_id: str) -> None:
        """The key was removed."""
        self._saved_use.pop(key_id, None)
        self.store.put_thing(KEY, key_id, None)

    # ------------------------------------------------------------ running

    def start(self) -> None:
        """Begin to write."""
        self.store.start()

    async def run(self) -> None:
        """Have written what changes, until cancelled; save now and then what changes all the time."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.store.run)
            while True:
                await trio.sleep(SAVE_S)
                await self._save_agents()
                self._save_use()
                self._save_policy()

    def close(self) -> None:
        """Save, write what waits, and let go of the database. Blocks, some seconds at most."""
        self._save_use()
        self._save_policy()
        if self._driver is not None:
            for agent_id in self._driver.router.agent_ids():
                self._save_agent(self._driver, agent_id)
        self.store.close()

    def _save_use(self) -> None:
        for key, use in [] if self._access is None else self._access.keys.listed():
            if self._saved_use.get(key.key_id) != msgspec.structs.astuple(use):
                self.save_key(key, use)


def _earlier(file: Path) -> list[Path]:
    """Where an earlier router's history may be: our `file`, and the one in its home, unless that is another coordinator's mirror."""
    home = Path(os.path.expanduser("~/.ollama-router"))
    is_anothers = home != file.parent and (home / COORDINATOR_FILE).exists()
    return [file] if is_anothers else [file, home / history_file.FILE]
