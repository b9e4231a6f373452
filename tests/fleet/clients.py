"""One call of a client, made directly to a node and through the router, and what is compared of the two. Knows no client's library."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import trio

from agent.simulated.models import guessed_model
from agent.simulated.server import SimulatedOllama
from tests.fleet.fleet import Fleet, Tap, open_fleet, serving

CHAT, THINKER, VISION, EMBED = "llama3.2:3b", "qwen3:8b", "llava-vision:7b", "nomic-embed-text:latest"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PASSING_KEYS = frozenset(
    {"created_at", "expires_at", "created", "id", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}
)
PASSING = re.compile(rb'"(%s)":\s?("[^"]*"|[\d.]+),?' % "|".join(sorted(PASSING_KEYS)).encode())


def masked(body: bytes) -> bytes:
    """A body without what differs from call to call: times, durations and ids."""
    return PASSING.sub(b"", body)


def settled(value: Any) -> Any:
    """A client's result without the same."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, dict):
        return {key: settled(item) for key, item in value.items() if key not in PASSING_KEYS}
    if isinstance(value, list | tuple):
        return [settled(item) for item in value]
    return value


@dataclass
class Sides:
    """The same node twice: directly, and behind the router; each behind a tap that keeps what was asked of it."""

    node: SimulatedOllama
    direct: Tap
    routed: Tap
    fleet: Fleet

    async def compare(self, call: Callable[[str], Awaitable[Any]]) -> Any:
        """`call(base URL)` on both sides; asserts equal results, and equal bytes of what reached the node. Returns the routed result."""
        direct = settled(await call(f"http://127.0.0.1:{self.direct.port}"))
        routed = await call(self.fleet.url)
        assert settled(routed) == direct
        if self.routed.bodies:  # what the router answers itself reaches no node
            assert self.routed.bodies == self.direct.bodies, "the request's bytes were changed on the way"
        return routed

    async def compare_in_thread(self, call: Callable[[str], Any]) -> Any:
        """As `compare`, for a client that blocks."""

        async def threaded(url: str) -> Any:
            return await trio.to_thread.run_sync(call, url)

        return await self.compare(threaded)


@asynccontextmanager
async def open_sides() -> AsyncIterator[Sides]:
    """A quick node with models of every kind, on both sides."""
    models = [guessed_model(name, modified_at=f"2026-01-01T00:00:0{age}Z") for age, name in enumerate((CHAT, THINKER, VISION, EMBED))]
    quick: dict[str, Any] = {"slots": 4, "load_s": 0.01, "decode_tokens_s": 2000.0, "prefill_tokens_s": 1e6}
    node = SimulatedOllama(models=models, prompt_cache=False, max_loaded=4, **quick)
    async with node.serve():
        direct, routed = Tap(node.port), Tap(node.port)
        async with serving(direct, routed), open_fleet({"node;slots=4": routed.port}) as fleet:
            yield Sides(node, direct, routed, fleet)
