"""A node for the soak: `python -m tests.bench.soak_node PORT SEED MODEL`. Answers most requests well, some by dice with 503, 500 or a cut.

Each answer is as long and as quick as the prompt asks (`tokens=20 rate=100`). Knows nothing of the router.
"""

import json
import random
import re
import sys
from functools import partial

import trio

from tests.fleet.fleet import ScriptedNode, last_line, line, openai_chunk, sse
from tests.fleet.rawhttp import Caller, Hangup, Reset

FAULTS = {"503": 0.02, "500": 0.01, "cut": 0.015, "reset": 0.01, "slow": 0.02}
"""How often; the rest is answered well."""
SLOW_S = 2.0
TOKENS, RATE = 10, 200.0
_WISHES = re.compile(rb"tokens=(\d+) rate=([\d.]+)")


def _drawn(dice: random.Random) -> str:
    at = dice.random()
    for fault, share in FAULTS.items():
        at -= share
        if at < 0:
            return fault
    return ""


async def answer(caller: Caller, *, dice: random.Random, node: list[ScriptedNode]) -> None:
    """One request for inference."""
    node[0].seen.clear()  # nobody looks at them here, and they would be growth
    fault = _drawn(dice)
    if fault in ("503", "500"):
        await caller.answer(json.dumps({"error": "server busy" if fault == "503" else "an error of this node"}).encode(), status=int(fault))
        return
    wishes = _WISHES.search(caller.body)
    tokens, rate = (int(wishes[1]), float(wishes[2])) if wishes is not None else (TOKENS, RATE)
    if fault == "slow":
        await trio.sleep(SLOW_S)
    if caller.target == "/api/embed":
        await caller.answer(json.dumps({"model": "m", "embeddings": [[0.1] * 64], "prompt_eval_count": 3}).encode())
        return
    if not json.loads(caller.body).get("stream", True):
        await trio.sleep(tokens / rate)
        await caller.answer(last_line(content="word " * tokens).rstrip())
        return
    events = caller.target.startswith("/v1/")
    await caller.begin_chunks("text/event-stream" if events else "application/x-ndjson")
    for number in range(tokens):
        await caller.chunk(sse(openai_chunk(f" {number}")) if events else line(f" {number}"))
        await trio.sleep(1 / rate)
        if number == tokens // 2 and fault:
            raise Reset if fault == "reset" else Hangup
    await caller.chunk(sse(b"[DONE]") if events else last_line())
    await caller.end_chunks()


def main() -> None:
    holder: list[ScriptedNode] = []
    node = ScriptedNode(partial(answer, dice=random.Random(int(sys.argv[2])), node=holder), models=(sys.argv[3],))
    holder.append(node)
    node.port = int(sys.argv[1])
    trio.run(node.run)


if __name__ == "__main__":
    main()
