"""A web app with everything behind it but sockets, for tests of its routes."""

import json
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quart import Response

from core.router import Router
from edge.pool import Pool
from edge.wire import Watch
from servers import clock
from servers.access import Access
from servers.api.web import Web
from servers.catalogue import packaged
from servers.coordinator import make_web_app
from servers.driver import Driver
from servers.keeping import Keeping
from servers.memory import Memory
from servers.metrics import Metrics
from servers.moves import Moves
from servers.poller import Poller
from servers.settings import Settings
from servers.sinks import RecordRing, Sinks
from servers.tokens import Tokens
from tests.servers.store.migrated import put_database

ADMIN = "the-admin-token"
REGISTRATION = {
    "machine_name": "my-machine",
    "ip_address": "192.168.1.100",
    "ollama_version": "0.1.0",
    "ollama_port": 11434,
    "gpu_available": True,
    "gpu_devices": [{"model": "NVIDIA RTX 4090", "count": 2}],
}
STRANGER = {"peer": "192.168.1.20:4000"}


@dataclass
class Answer:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


HOUSES: "list[House]" = []
"""Those of the running test; closed after it."""


class House:
    """A web app with everything behind it but sockets."""

    def __init__(self, settings: Settings) -> None:
        router = Router(settings.router_config(), now=clock.now())
        metrics = Metrics()
        sinks = Sinks(metrics, RecordRing())
        self.driver = Driver(router, sinks)
        self.poller = Poller(self.driver.apply, now=self.driver.now, known=lambda _: True, check_every_s=30)
        self.tokens = Tokens(admin_token=ADMIN, join_token=None, fleet_secret="fleet")
        access = Access(settings, self.tokens, our_ports={8080}, owner_is_ours=lambda *_: True)
        self.moves = Moves(self.driver, Pool(Watch()), credential_of=self.tokens.credential_of, say=sinks.note)
        self.listening = True
        self.data = Path(tempfile.mkdtemp(prefix="web-"))
        put_database(self.data)
        self.memory = Memory(settings, self.data)
        self.memory.restore(access, self.tokens)
        self.web = Web(
            settings=settings, driver=self.driver, access=access, tokens=self.tokens, metrics=metrics, poller=self.poller,
            moves=self.moves, keeping=Keeping(self.driver, self.moves, packaged(), default_rule=True), memory=self.memory,
            secret=b"listener", listening=lambda: self.listening,
        )  # fmt: skip
        self.app = make_web_app(self.web)
        HOUSES.append(self)

    def close(self) -> None:
        """What is kept of it goes."""
        self.memory.close()
        shutil.rmtree(self.data)

    async def ask(
        self, method: str, path: str, body: Any = None, *, peer: str = "127.0.0.1:4000", token: str | None = None, **headers: str
    ) -> Answer:
        given = {"Host": "localhost:8080", "X-Router-Secret": "listener", "X-Router-Peer": peer}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            given["Authorization"] = f"Bearer {token}"
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        response: Response = await self.app.test_client().open(path, method=method, headers=given, data=data)
        answer = Answer(response.status_code, response.headers, await response.get_data(as_text=False))
        assert uuid.UUID(answer.headers["X-Request-Id"]).version == 4
        if answer.status >= 400 and answer.headers["Content-Type"].startswith("application/json"):
            assert answer.json["error"], answer.body
        return answer

    async def register(self, **changes: Any) -> Any:
        answer = await self.ask("POST", "/api/agents", {**REGISTRATION, **changes})
        assert answer.status == 201, answer.body
        return answer.json

    async def ready(self, models: list[Any], **changes: Any) -> str:
        """A registered agent that takes requests."""
        registered = await self.register(**changes)
        beat = {
            "agent_id": registered["agent_id"], "cpu_usage": 10.0, "memory_usage": 20.0, "installed_models": models, "loaded_models": [],
            "ollama_version": changes.get("ollama_version", "0.33.0"),
        }  # fmt: skip
        answer = await self.ask("POST", "/api/health", beat)
        assert answer.status == 200, answer.body
        return str(registered["agent_id"])


def row(name: str, *, digest: str = "d", modified: str = "2026-01-02T03:04:05Z", size: int = 7) -> dict[str, Any]:
    return {"name": name, "model": name, "size": size, "digest": digest, "modified_at": modified}
