"""One client program against the router in front of two simulated nodes, case by case, and the judgement of each.

A client gets through the router what it gets from a node directly, except where the router promises more: a broken stream must be
noticed, and a client that leaves costs its node nothing. Knows the router's promises, no client's library.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from agent.simulated.faults import Fault
from agent.simulated.models import SimulatedModel, guessed_model
from agent.simulated.registry import Registry
from agent.simulated.server import SimulatedOllama
from core.events import Ending, RequestCame, Settled
from edge.listener import route_of
from tests.conformance.programs import PLACE, Case, Talk
from tests.fleet.clients import PASSING_KEYS
from tests.fleet.edges import current
from tests.fleet.fleet import Fleet, open_fleet
from tests.fleet.rawhttp import Answer, ask, wait_until

COMMON = json.loads((PLACE / "common.json").read_text(encoding="utf-8"))
MODELS: dict[str, str] = COMMON["models"]
SLOW_TOKENS_S = 20.0
REGISTRY_BYTES_S = 2e9
HUGE_BYTES = 8_000_000
"""The longest line that the `ollama` command reads."""
NODES_ERROR = "node's own error"
"""The node says that it failed, in the protocol's own way, and that passes as it is: who skips it there skips it here."""
BREAKS = (
    "connection cut", "connection cut inside a line", "connection cut, whole", "connection cut, helper", "end without a last line",
    NODES_ERROR,
)  # fmt: skip
"""Cases in which the node fails, which the client must notice."""
LEAVES = ("client leaves", "client leaves before the first token", "cancelled task leaves")
REFUSED = "refused"
"""What the router's own rules forbid: not compared with a node, which would allow it. It must say so, and what to do instead."""
OWN_KEYS = PASSING_KEYS | {"completed_at", "request_id", "_request_id", "item_id"}
TOLD_LATE = 4
"""Tokens that a node may have made for a client that had left: what was under way."""
IDS = re.compile(r"\b(req|msg|call|chatcmpl|cmpl|resp|fc|rs)_?-?[0-9a-zA-Z]+\b")

NAMED = re.compile(r"(?:north|south): (.*?); (?:north|south): \1")
"""What two nodes said alike of one pull, which the router tells of each, in the order in which they came."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case. `problem` is "" when it is as it must be."""

    case: Case
    problem: str = ""
    said: str = ""
    """Of a break: what the client makes of it behind the router."""
    said_directly: str = ""
    """Of a break: what it makes of it at the node; "" when it takes the answer for a whole one."""


def simulated_node(name: str) -> SimulatedOllama:
    """A quick node with models of every kind, some of which fail in their own way."""

    def model(number: int, kind: str, spelling: str) -> SimulatedModel:
        made = guessed_model(spelling, modified_at=f"2026-01-01T00:00:{number:02}Z")
        speed = SLOW_TOKENS_S if kind == "slow" else 20_000.0
        return msgspec.structs.replace(made, decode_tokens_s=speed, prefill_tokens_s=1.0 if kind == "late" else 1e6)

    models = [model(number, kind, spelling) for number, (kind, spelling) in enumerate(MODELS.items())]
    registry = Registry([COMMON["published"]], bytes_s=REGISTRY_BYTES_S)
    quick = {"slots": 4, "load_s": 0.01, "prompt_cache": False, "max_loaded": len(models)}
    node = SimulatedOllama(name=name, models=models, registry=registry, **quick)
    node.faults.add(Fault(kind="close", model=MODELS["cut"], after_tokens=3))
    node.faults.add(Fault(kind="cut", model=MODELS["torn"], after_tokens=3))
    node.faults.add(Fault(kind="end", model=MODELS["mute"], after_tokens=3))
    node.faults.add(Fault(kind="error", model=MODELS["broken"], after_tokens=3))
    node.faults.add(Fault(kind="huge", model=MODELS["huge"], after_tokens=3, size_bytes=HUGE_BYTES))
    return node


class Stage:
    """Two equal nodes, a coordinator in front of them, and the same kind of node alone."""

    def __init__(self, nodes: list[SimulatedOllama], alone: SimulatedOllama, fleet: Fleet) -> None:
        self.nodes = nodes
        self.alone = alone
        self.fleet = fleet

    async def judge(self, case: Case, talk: Talk) -> Outcome:
        """Have `case` done, and say what is wrong with it."""
        if case.route == "/api/ps":
            await self.load_chat()
        await self._at_rest()
        before, blamed = set(self._came()), self._blamed()
        routed = await talk.ask(case, self.fleet.url)
        if "failure" in routed:
            return Outcome(case, routed["failure"])
        problem = self._wrong_route(case, before)
        if case.what in LEAVES:
            return Outcome(case, problem or await self._wrong_departure(before, blamed))
        if case.what == REFUSED:
            return Outcome(case, problem or _wrong_refusal(routed["value"]))
        direct = await talk.ask(case, self.alone.url)
        if case.what in BREAKS:
            said, said_directly = _told(routed["value"]), _told(direct.get("value"))
            excused = case.what == NODES_ERROR and not said_directly
            return Outcome(case, problem or ("" if said or excused else f"unnoticed: {routed}"), said, said_directly)
        if not problem and settled(routed["value"]) != settled(direct.get("value")):
            problem = f"through the router: {routed}\nat a node: {direct}"
        return Outcome(case, problem)

    async def _at_rest(self) -> None:
        """Nothing of the case before is left: behind nginx its end is told after its lease is free, and a busy machine may lose a node for
        a while."""
        await wait_until(lambda: not self._unsettled(), what="the end of every request")
        await self.fleet.wait_ready(len(self.nodes))

    def _came(self) -> dict[str, RequestCame]:
        events = (event for _, event in self.fleet.coordinator.web.driver.recent_events())
        return {event.request_id: event for event in events if isinstance(event, RequestCame)}

    def _unsettled(self) -> set[str]:
        events = self.fleet.coordinator.web.driver.recent_events()
        return set(self._came()) - {event.request_id for _, event in events if isinstance(event, Settled)}

    def _wrong_route(self, case: Case, before: set[str]) -> str:
        expected = route_of("POST", case.route)
        seen = [event.route for name, event in self._came().items() if name not in before]
        return "" if expected is None or expected in seen else f"{case.route} was not asked, but {seen}"

    async def _wrong_departure(self, before: set[str], blamed: list[str]) -> str:
        """What a client that left cost, as a sentence; "" when nothing."""
        gone = set(self._came()) - before
        try:
            await self.fleet.wait_settled(within_s=2)
            await wait_until(lambda: not any(node.in_flight for node in self.nodes), within_s=2, what="nodes at rest")
        except AssertionError as error:
            return str(error)
        endings = [event for _, event in self.fleet.coordinator.web.driver.recent_events() if isinstance(event, Settled)]
        wrong = [event for event in endings if event.request_id in gone and event.ending is not Ending.CANCELLED]
        left = [entry for node in self.nodes for entry in node.log if entry.cancelled_at is not None]
        if wrong or not gone:
            return f"not settled as cancelled: {wrong}"
        if not left or any(entry.tokens_after_cancel > TOLD_LATE for entry in left):
            return f"the node was not told, or late: {[entry.tokens_after_cancel for entry in left]}"
        return "" if self._blamed() == blamed else f"counted against the node: {self._blamed()}"

    def _blamed(self) -> list[str]:
        return [f"{agent.name}, {one.model}: {one.why}" for agent in self.fleet.agents() for one in agent.ejections]

    async def ask_node(self, node: SimulatedOllama, path: str, body: dict[str, Any]) -> Answer:
        """Ask a node of the fleet directly."""
        return await ask(node.port, "POST", path, body)

    async def loaded_on(self, node: SimulatedOllama) -> list[str]:
        """What a node itself says it has in memory."""
        return [row["name"] for row in (await ask(node.port, "GET", "/api/ps")).json()["models"]]

    async def load_chat(self) -> None:
        """Have a model in memory on both sides, and known to be."""
        load = {"model": MODELS["chat"], "prompt": ""}
        await self.fleet.ask("POST", "/api/generate", load)
        await ask(self.alone.port, "POST", "/api/generate", load)
        await wait_until(lambda: any(agent.loaded for agent in self.fleet.agents()), what="a look at what is loaded")


def settled(value: Any) -> Any:
    """A client's result without what differs from call to call."""
    if isinstance(value, dict):
        return {key: settled(item) for key, item in value.items() if key not in OWN_KEYS}
    if isinstance(value, list):
        return [settled(item) for item in value]
    return NAMED.sub(r"\1", IDS.sub("ID", value)) if isinstance(value, str) else value


def _wrong_refusal(value: Any) -> str:
    told = isinstance(value, dict) and "through the router: do it on one node" in str(value.get("text"))
    return "" if told and value["status"] in (403, None) else f"not refused with a sentence that helps: {value}"


def _told(value: Any) -> str:
    """The name of what a client noticed."""
    return str(value.get("noticed") or value.get("error") or "") if isinstance(value, dict) else ""


@asynccontextmanager
async def open_stage() -> AsyncIterator[Stage]:
    """A fleet for one client."""
    north, south, alone = (simulated_node(name) for name in ("north", "south", "alone"))
    # Who comes through nginx is no neighbour, who may do everything: what a client may do must not differ here.
    settings = {"ROUTER_AUTH": "off"} if current().nginx else {}
    async with (
        north.serve(),
        south.serve(),
        alone.serve(),
        open_fleet({"north;slots=4": north.port, "south;slots=4": south.port}, **settings) as fleet,
    ):
        yield Stage([north, south], alone, fleet)
