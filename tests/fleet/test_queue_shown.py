"""`GET /api/queue`: who waits for what, how long, and when it is expected to start."""

from typing import Any

import pytest
import trio

from tests.fleet.fleet import ScriptedNode, line, open_fleet, serving
from tests.fleet.rawhttp import Caller, wait_until

WORK_S = 10.0
TELLS: dict[str, Any] = {"eval_count": 10, "eval_duration": int(WORK_S * 1e9), "prompt_eval_count": 1, "prompt_eval_duration": 1}
"""The node says that each answer took it so long, whatever it took: what is expected then does not depend on this machine."""


async def test_the_expected_start_is_what_is_ahead_on_the_node() -> None:
    gate = trio.Event()
    held = 0

    async def node(caller: Caller) -> None:
        nonlocal held
        held += 1
        if held > 2:
            await gate.wait()
        await caller.begin_chunks()
        await caller.chunk(line("", done=True, done_reason="stop", **TELLS))
        await caller.end_chunks()

    async with serving(ScriptedNode(node)) as (port,), open_fleet(OLLAMA_BACKENDS=f"n=http://127.0.0.1:{port};slots=1") as fleet:
        await fleet.wait_ready(1)
        for _ in range(2):
            assert (await fleet.chat()).status == 200
        async with trio.open_nursery() as nursery:
            for count in range(3):
                nursery.start_soon(fleet.chat)
                await wait_until(lambda want=count: fleet.statistics().waiting == want)  # type: ignore[misc]
            shown = (await fleet.ask("GET", "/api/queue")).json()
            gate.set()
    assert shown["total"] == 2
    first, second = shown["waiting"]
    assert [row["position"] for row in shown["waiting"]] == [1, 2]
    assert first["model"] == "m"
    assert "slots are taken" in first["why"]
    assert first["waited_ms"] >= second["waited_ms"] >= 0
    assert first["expected_start_ms"] + first["waited_ms"] == pytest.approx(WORK_S * 1000, rel=0.1)
    assert second["expected_start_ms"] + second["waited_ms"] == pytest.approx(2 * WORK_S * 1000, rel=0.1)
